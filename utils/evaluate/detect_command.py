"""`detect.py`: a checkpoint and images or videos in, pictures, videos, label files and crops out.

The surprise: what is written is written by threads, so that the network goes on meanwhile. Texts and videos are painted
by one of them, in order; images are encoded by the others.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.clock import EVALUATION_PARTS, TimeSplit
from utils.config import DetectOptions, validated
from utils.data.findings import shortened
from utils.data.images import quiet_opencv
from utils.data.labels import shown_path
from utils.data.media import (
    Medium,
    Picture,
    Problem,
    VideoError,
    VideoFile,
    count_pictures,
    encoded,
    find_media,
    read_media,
)
from utils.data.probe import overheard
from utils.evaluate.detector import Detector, Found, detector_of
from utils.evaluate.nms import NmsRules
from utils.evaluate.saving import LABELS_FOLDER, write_txt
from utils.files import new_run_folder, write_atomic
from utils.machine import usable_cores
from utils.report.annotate import annotated, class_colour
from utils.report.loggers import Console
from utils.runtime import choose_runtime, mendable_errors
from utils.structures import Detections, RunError, UserError

CROPS_FOLDER = "crops"

_LINES_MOST = 20  # images and videos that have a line each; with more, the summary alone
_WARNINGS_MOST = 20
_CLASSES_MOST = 6  # in a line
_PENDING_MOST = 64  # pictures that wait to be written
_PENDING_BYTES = 256 << 20  # of their pixels
_WRITERS_MOST = 8  # threads
_STEM_BYTES = 200  # of a file name without its ending; file systems allow 255 in all


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of a source."""

    images: int
    frames: int  # of videos
    unreadable: tuple[str, ...]  # images and videos of which nothing could be read
    boxes: tuple[int, ...]  # by class
    folder: Path | None  # of the results; None: nothing was to be written


def detect(values: Mapping[str, Any]) -> Summary:
    """Detect for options by name. Raises UserError for what a user can mend."""
    options = validated(DetectOptions, dict(values))
    console = Console(quiet=options.quiet)
    runtime = choose_runtime(device=options.device, amp=options.amp, workers=0)
    media, warnings = find_media(options.source)
    detector = detector_of(Path(options.weights), runtime=runtime, imgsz=options.imgsz, note=console.note)
    rules = _rules(detector, options)
    folder = _result_folder(options, media)
    console.line(
        f"{options.weights}: {len(detector.names)} class{'es' * (len(detector.names) != 1)}, {detector.imgsz} px, "
        f"{runtime.device_description}"
    )
    _warn(console, warnings)
    stems = file_stems(media)
    tally = _Tally(media=media, stems=stems, names=detector.names, console=console)
    results = ResultFiles(folder, options, detector.names, media, stems, console) if folder else Results()
    try:
        with mendable_errors(batch_size=options.batch_size, imgsz=detector.imgsz), quiet_opencv(), overheard():
            times = _detect_all(options, detector, rules, tally, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"results so far: {folder}" if folder else "") from None
    _conclude(options, detector, tally, times, folder)
    return Summary(
        images=tally.images,
        frames=tally.frames,
        unreadable=tally.unreadable(),
        boxes=tuple(tally.boxes.tolist()),
        folder=folder,
    )


def _rules(detector: Detector, options: DetectOptions) -> NmsRules:
    try:
        return detector.rules(
            confidence=options.conf_thres,
            iou=options.iou_thres,
            max_detections=options.max_det,
            classes=options.classes,
            agnostic=options.agnostic,
        )
    except UserError as error:  # of --classes: the others are checked by now
        raise UserError(f"--{error}") from None


def _result_folder(options: DetectOptions, media: Sequence[Medium]) -> Path | None:
    """A folder for the results, if there will be any. Raises UserError where pictures would replace their sources."""
    if options.nosave and not options.save_txt and not options.save_crop:
        return None
    if options.exist_ok and not options.nosave:
        target = Path(options.project, options.name).resolve()
        inside = next((one.path for one in media if Path(one.path).resolve().parent == target), None)
        if inside is not None:
            raise UserError(
                f"--exist-ok: {shown_path(inside)} lies where its picture would be written; choose another --name"
            )
    return new_run_folder(Path(options.project), options.name, exist_ok=options.exist_ok)


def _detect_all(
    options: DetectOptions, detector: Detector, rules: NmsRules, tally: _Tally, results: Results
) -> TimeSplit:
    media = tally.media
    detector.warm_up()
    clock = detector.runtime.step_clock(EVALUATION_PARTS)
    reading = closing(read_media(media, detector.imgsz, keep=results.keep_pixels))
    with results, reading as looks, tally.console.bar(count_pictures(media), "Detecting") as bar:
        pictures = tally.readable(looks)
        for found in detector.stream(
            pictures, rules, batch_size=options.batch_size, augment=options.augment, clock=clock
        ):
            tally.add(found)
            results.add(found)
            bar.update(1)
        results.finish()
    tally.finish()
    return clock.split()


def _conclude(options: DetectOptions, detector: Detector, tally: _Tally, times: TimeSplit, folder: Path | None) -> None:
    """The last lines. Raises RunError where nothing could be read."""
    console = tally.console
    if not tally.images and not tally.frames:
        if folder is not None:
            with suppress(OSError):
                folder.rmdir()
        first = f"{shown_path(tally.media[0].path)}: {tally.problems[0].text}"
        several = len(tally.media) > 1
        raise RunError(
            f"--source {options.source}: none of {len(tally.media)} could be read; first: {first}" if several else first
        )
    for line in tally.lines():
        console.line(line)
    load, network, nms = (1000 * times.parts[part] / max(times.images, 1) for part in EVALUATION_PARTS)
    console.line(
        f"Per {'image' if tally.images else 'frame'}: {load:.1f} ms waiting for pixels, {network:.1f} ms network, "
        f"{nms:.1f} ms NMS at {detector.imgsz} px in batches of {options.batch_size} on "
        f"{detector.runtime.device_description}"
    )
    console.line(f"Results: {folder}" if folder else "Results: none kept (--nosave)")


# ---- what the user sees -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Tally:
    """What has been found so far, and the lines about it, in the order of the source."""

    media: Sequence[Medium]
    stems: Sequence[str]  # what results are called
    names: Sequence[str]  # of classes
    console: Console
    images: int = 0
    frames: int = 0
    videos: int = 0
    problems: list[Problem] = field(default_factory=list)  # told or still to be told
    non_finite: list[int] = field(default_factory=list)  # sources
    cut: list[int] = field(default_factory=list)
    boxes: np.ndarray = field(init=False)  # (C,) by class
    _told: int = 0  # of the problems
    _video: int = -1  # the source that is playing
    _video_frames: int = 0
    _video_boxes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.boxes = np.zeros(len(self.names), np.int64)
        self._video_boxes = np.zeros_like(self.boxes)

    def readable(self, looks: Iterator[Picture | Problem]) -> Iterator[Picture]:
        """The pictures among them."""
        for look in looks:
            if isinstance(look, Problem):
                self.problems.append(look)
            else:
                yield look

    def add(self, found: Found) -> None:
        source = found.picture.source
        counts = np.bincount(found.detections.classes.numpy(), minlength=len(self.names))
        self.boxes += counts
        if source != self._video:
            self._end_video()
        self._tell_problems(before=source)
        if found.non_finite:
            self.non_finite.append(source)
        if found.cut:
            self.cut.append(source)
        if found.picture.frame:
            self._video = source
            self._video_frames += 1
            self._video_boxes += counts
        else:
            self.images += 1
            self._line(source, f"{_counted(counts, self.names)}")

    def finish(self) -> None:
        """Tell what is left to tell."""
        self._end_video()
        self._tell_problems(before=len(self.media))

    def _end_video(self) -> None:
        if self._video < 0:
            return
        self._line(self._video, f"{_plural(self._video_frames, 'frame')}, {_counted(self._video_boxes, self.names)}")
        self._tell_problems(before=self._video + 1)
        self.videos, self.frames = self.videos + 1, self.frames + self._video_frames
        self._video, self._video_frames = -1, 0
        self._video_boxes[:] = 0

    def _line(self, source: int, text: str) -> None:
        if len(self.media) <= _LINES_MOST:
            self.console.line(f"{self._name(source)}: {text}")

    def _name(self, source: int) -> str:
        path = Path(self.media[source].path)
        return shown_path(path.name if path.stem == self.stems[source] else f"{path} ({self.stems[source]})")

    def _tell_problems(self, *, before: int) -> None:
        while self._told < len(self.problems) and self.problems[self._told].source < before:
            problem = self.problems[self._told]
            if problem.frames or (self._told < _WARNINGS_MOST and len(self.media) > 1):
                path = shown_path(self.media[problem.source].path)
                self.console.warn(f"{path}: {problem.text}{'' if problem.frames else '; left out'}")
            self._told += 1

    def unreadable(self) -> tuple[str, ...]:
        return tuple(self.media[problem.source].path for problem in self.problems if not problem.frames)

    def lines(self) -> Iterator[str]:
        """The summary."""
        for sources, what in (
            (self.non_finite, "the network said something that is no finite number"),
            (self.cut, "more candidates for a detection than NMS looks at, a higher --conf-thres has fewer"),
        ):
            if sources:
                yield f"warning: {_plural(len(sources), 'picture')}, first {self._name(sources[0])}: {what}"
        seen = [_plural(self.images, "image")] if self.images or not self.frames else []
        if self.frames:
            seen.append(f"{_plural(self.frames, 'frame')} of {_plural(self.videos, 'video')}")
        left_out = len(self.unreadable())
        end = f"; {left_out:,} could not be read" if left_out else ""
        kinds = np.count_nonzero(self.boxes)
        listed = f": {_counted(self.boxes, self.names)}" if kinds else ""
        yield f"{' and '.join(seen)}, {_plural(int(self.boxes.sum()), 'box', 'boxes')}{listed}{end}"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def _counted(counts: np.ndarray, names: Sequence[str]) -> str:
    """`12 RBC, 1 WBC`: names as they are, as nobody knows the plural of all."""
    order = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
    listed = [f"{counts[index]:,} {shortened(names[index])}" for index in order[:_CLASSES_MOST]]
    if len(order) > _CLASSES_MOST:
        listed.append(f"{counts[order[_CLASSES_MOST:]].sum():,} of {len(order) - _CLASSES_MOST:,} other classes")
    return ", ".join(listed) or "nothing found"


def _warn(console: Console, warnings: Sequence[str]) -> None:
    for warning in warnings[:_WARNINGS_MOST]:
        console.warn(warning)
    if len(warnings) > _WARNINGS_MOST:
        console.warn(f"and {len(warnings) - _WARNINGS_MOST:,} more of this kind")


# ---- what is left behind ------------------------------------------------------------------------------------------


class Results:
    """What is left behind of each picture; here nothing, and the contract of others. A context: its end is that of
    all work, and after an error what is under way is dropped."""

    keep_pixels = False  # whether pictures are wanted with their pixels

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        pass

    def add(self, found: Found) -> None:
        """Take one; the frames of a video come one after the other."""

    def finish(self) -> None:
        """Wait until all is written. Raises OSError where it could not be."""


class ResultFiles(Results):
    """Files in a folder, written by threads."""

    def __init__(
        self,
        folder: Path,
        options: DetectOptions,
        names: Sequence[str],
        media: Sequence[Medium],
        stems: Sequence[str],
        console: Console,
    ) -> None:
        self._folder, self._options, self._names, self._media, self._console = folder, options, names, media, console
        self._stems = stems
        self.keep_pixels = options.save_crop or not options.nosave
        self._class_folders = [*map(_unique(set()), map(_folder_name, names))]
        self._artist = ThreadPoolExecutor(1)
        self._writers = ThreadPoolExecutor(min(usable_cores(), _WRITERS_MOST))
        self._pending: deque[tuple[int, Future[list[Future]]]] = deque()
        self._video: VideoFile | None = None
        self._video_source = -1
        self._writes_videos = True
        self._tell_renamed()

    def _tell_renamed(self) -> None:
        renamed = [(one, stem) for one, stem in zip(self._media, self._stems) if stem != Path(one.path).stem]
        if renamed:
            (first, stem), count = renamed[0], len(renamed)
            more = f", and {count - 1:,} more likewise" if count > 1 else ""
            self._console.note(
                f"inputs of one name: the results of {shown_path(first.path)} are called {shown_path(stem)}{more}"
            )

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for pool in (self._artist, self._writers):
            pool.shutdown(cancel_futures=kind is not None)
        if self._video is not None:  # interrupted: what there is of it is worth having
            with suppress(OSError):
                self._video.close()

    def add(self, found: Found) -> None:
        size = 0 if found.picture.pixels is None else found.picture.pixels.nbytes
        self._pending.append((size, self._artist.submit(self._write, found)))
        self._settle(_PENDING_BYTES)

    def finish(self) -> None:
        self._pending.append((0, self._artist.submit(self._end_video)))
        self._settle(-1)

    def _settle(self, most_bytes: int) -> None:
        """Wait until no more than this, or nothing, waits to be written."""
        while self._pending and (
            len(self._pending) > _PENDING_MOST or sum(size for size, _ in self._pending) > most_bytes
        ):
            for written in self._pending.popleft()[1].result():
                written.result()

    def _write(self, found: Found) -> list[Future]:
        """In the artist's thread: what it hands on to the writers."""
        picture, detections = found.picture, found.detections
        stem = self._stems[picture.source] + (f"_{picture.frame}" if picture.frame else "")
        handed: list[Future] = []
        if picture.source != self._video_source:
            self._end_video()
        if self._options.save_txt:
            handed.append(self._writers.submit(self._write_labels, stem, picture, detections))
        if self._options.save_crop:
            handed.append(self._writers.submit(self._write_crops, stem, picture, detections))
        if not self._options.nosave:
            drawn = self._drawn(picture, detections)
            if picture.frame:
                self._add_frame(picture, drawn)
            else:
                handed.append(self._writers.submit(self._write_image, stem, picture.source, drawn))
        return handed

    def _drawn(self, picture: Picture, detections: Detections) -> np.ndarray:
        """(H, W, 3) u8 BGR."""
        classes, scores = detections.classes.tolist(), detections.scores.tolist()
        if not classes:
            return picture.pixels
        drawn = annotated(
            cv2.cvtColor(picture.pixels, cv2.COLOR_BGR2RGB),
            detections.boxes.numpy(),
            [f"{shortened(self._names[kind])} {score:.2f}" for kind, score in zip(classes, scores)],
            [class_colour(kind) for kind in classes],
            line_px=self._options.line_thickness,
        )
        return cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)

    def _add_frame(self, picture: Picture, drawn: np.ndarray) -> None:
        if picture.source != self._video_source:
            self._video_source = picture.source
            self._video = self._new_video(picture)
        if self._video is not None:
            self._video.add(drawn)

    def _new_video(self, picture: Picture) -> VideoFile | None:
        if not self._writes_videos:
            return None
        try:
            return VideoFile(self._folder, self._stems[picture.source], rate=picture.rate, size=picture.size)
        except VideoError as error:
            self._writes_videos = False
            self._console.warn(f"{error}: none is written; --save-txt and --save-crop work all the same")
            return None

    def _end_video(self) -> list[Future]:
        video, self._video, self._video_source = self._video, None, -1
        if video is not None:
            video.close()
        return []

    def _write_image(self, stem: str, source: int, drawn: np.ndarray) -> None:
        data, suffix = encoded(drawn, Path(self._media[source].path).suffix)
        _write_bytes(self._folder / f"{stem}{suffix}", data)

    def _write_labels(self, stem: str, picture: Picture, detections: Detections) -> None:
        """As val.py: no file where there is nothing to say, not even one of an earlier run."""
        path = self._folder / LABELS_FOLDER / f"{stem}.txt"
        if not len(detections.boxes):
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(exist_ok=True)
        scores = detections.scores.numpy() if self._options.save_conf else None
        write_txt(path, detections.boxes.numpy(), detections.classes.numpy(), scores, picture.size)

    def _write_crops(self, stem: str, picture: Picture, detections: Detections) -> None:
        """What lies in each box, rounded to whole px outwards; the number is that of the line in the label file."""
        height, width = picture.size
        for number, (box, kind) in enumerate(zip(detections.boxes.tolist(), detections.classes.tolist()), 1):
            left, top = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
            right, bottom = max(math.ceil(box[2]), left + 1), max(math.ceil(box[3]), top + 1)
            folder = self._folder / CROPS_FOLDER / self._class_folders[kind]
            folder.mkdir(parents=True, exist_ok=True)
            data, suffix = encoded(np.ascontiguousarray(picture.pixels[top:bottom, left:right]), ".jpg")
            _write_bytes(folder / f"{stem}-{number}{suffix}", data)


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomic(path, lambda file: file.write(data) and None, lasting=False)


def file_stems(media: Sequence[Medium]) -> list[str]:
    """What the results of each are called: its name without the ending, followed by -2, -3, ... where that is taken.

    Also where a frame of a video is called so, and where only the case of letters differs, as some drives ignore it.
    """
    stems = [_fitting(Path(medium.path).stem) for medium in media]
    videos: set[str] = set()
    unique = _unique(set(), videos)
    named: dict[int, str] = {}
    for index in sorted(range(len(media)), key=lambda index: not media[index].is_video):  # videos first
        named[index] = unique(stems[index])
        if media[index].is_video:
            videos.add(named[index].casefold())
    return [named[index] for index in range(len(media))]


def _unique(taken: set[str], videos: Collection[str] = ()) -> Callable[[str], str]:
    """Makes names that are not `taken`, which grows by them, nor those of a frame of `videos`."""

    def free(name: str) -> bool:
        folded = name.casefold()
        start, _, number = folded.rpartition("_")
        return folded not in taken and not (number.isdecimal() and start in videos)

    next_number: dict[str, int] = {}  # where thousands have one name

    def unique(name: str) -> str:
        chosen = name
        while not free(chosen):
            number = next_number.get(name, 2)
            next_number[name] = number + 1
            chosen = f"{name}-{number}"
        taken.add(chosen.casefold())
        return chosen

    return unique


def _folder_name(name: str) -> str:
    """The name of a class as that of a folder on any system."""
    safe = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).strip(" .")
    return _fitting(safe) or "_"


def _fitting(stem: str) -> str:
    """Short enough for the names of files that begin with it."""
    while len(os.fsencode(stem)) > _STEM_BYTES:
        stem = stem[:-1]
    return stem
