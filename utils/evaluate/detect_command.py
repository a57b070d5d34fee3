"""`detect.py`: a checkpoint and images or videos in; lines on the screen and what `detect_files.py` writes out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.clock import EVALUATION_PARTS, TimeSplit
from utils.config import DetectOptions, validated
from utils.data.findings import shortened
from utils.data.images import quiet_opencv
from utils.data.labels import shown_path
from utils.data.media import Medium, Picture, Problem, count_pictures, find_media, read_media
from utils.data.probe import overheard
from utils.evaluate.detect_files import CROPS_FOLDER, ResultFiles, Results, file_stems
from utils.evaluate.detector import NON_FINITE, Detector, Found, detector_of
from utils.evaluate.nms import NmsRules
from utils.evaluate.saving import LABELS_FOLDER
from utils.files import new_run_folder
from utils.report.console import Console
from utils.runtime import choose_runtime, mendable_errors
from utils.stopping import Interrupted
from utils.structures import RunError, UserError

_LINES_MOST = 20  # images and videos that have a line each; with more, the summary alone
_WARNINGS_MOST = 20
_CLASSES_MOST = 6  # in a line


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
    except KeyboardInterrupt as interrupt:
        signum = interrupt.signum if isinstance(interrupt, Interrupted) else signal.SIGINT
        raise Interrupted(signum, f"results so far: {folder}" if folder else "") from None
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
    """A folder for the results, if there will be any.

    Raises UserError where they could replace what they are made of, or mingle with label files and crops that are
    there: those of another run, edited since, or of a data set.
    """
    if options.nosave and not options.save_txt and not options.save_crop:
        return None
    if options.exist_ok:
        folder = Path(options.project, options.name)
        target = folder.resolve()
        inside = next((one.path for one in media if target in Path(one.path).resolve().parents), None)
        if inside is not None:
            raise UserError(
                f"--exist-ok: {shown_path(inside)} lies in {folder}, where results could replace it; choose another "
                "--name or --project"
            )
        for asked, below in ((options.save_txt, LABELS_FOLDER), (options.save_crop, CROPS_FOLDER)):
            if asked and os.path.lexists(folder / below):
                raise UserError(
                    f"--exist-ok: {folder / below} is there already, and may have been edited; remove it or choose "
                    "another --name"
                )
    return new_run_folder(Path(options.project), options.name, exist_ok=options.exist_ok)


def _detect_all(
    options: DetectOptions, detector: Detector, rules: NmsRules, tally: _Tally, results: Results
) -> TimeSplit:
    media = tally.media
    detector.warm_up()
    clock = detector.runtime.step_clock(EVALUATION_PARTS)
    reading = closing(read_media(media, detector.imgsz, keep=results.keep_pixels))
    of = "frames" if all(medium.is_video for medium in media) else "images"
    with results, reading as looks, tally.console.bar(count_pictures(media), "Detecting", of=of) as bar:
        pictures = tally.readable(looks)
        for found in detector.stream(
            pictures, rules, batch_size=options.batch_size, augment=options.augment, clock=clock
        ):
            tally.add(found)
            results.add(found)
            bar.update(1)
        results.finish()
    tally.end_video()
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
    tally.tell_summary()
    ms = times.ms_per_image
    console.line(
        f"Per {'image' if tally.images else 'frame'}: {ms['load']:.1f} ms waiting for pixels, {ms['network']:.1f} ms "
        f"network, {ms['nms']:.1f} ms NMS at {detector.imgsz} px in batches of {options.batch_size} on "
        f"{detector.runtime.device_description}"
    )
    if options.save_txt and folder:
        console.line(f"Label files of {tally.with_boxes:,} of {tally.seen()}: {folder / LABELS_FOLDER}")
    if options.save_crop and folder:
        console.line(f"Crops of {_plural(int(tally.boxes.sum()), 'box', 'boxes')}: {folder / CROPS_FOLDER}")
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
    with_boxes: int = 0  # images and frames in which something was found
    problems: list[Problem] = field(default_factory=list)
    non_finite: list[int] = field(default_factory=list)  # sources
    cut: list[int] = field(default_factory=list)
    boxes: np.ndarray = field(init=False)  # (C,) by class
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
                self._tell(look)
            else:
                yield look

    def add(self, found: Found) -> None:
        source = found.picture.source
        counts = np.bincount(found.detections.classes.numpy(), minlength=len(self.names))
        self.boxes += counts
        self.with_boxes += bool(counts.any())
        if source != self._video:
            self.end_video()
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
            self._line(source, _counted(counts, self.names))

    def end_video(self) -> None:
        """Its line, if one was playing."""
        if self._video < 0:
            return
        self._line(self._video, f"{_plural(self._video_frames, 'frame')}, {_counted(self._video_boxes, self.names)}")
        self.videos, self.frames = self.videos + 1, self.frames + self._video_frames
        self._video, self._video_frames = -1, 0
        self._video_boxes[:] = 0

    def _line(self, source: int, text: str) -> None:
        if len(self.media) <= _LINES_MOST:
            self.console.line(f"{self._name(source)}: {text}")

    def _name(self, source: int) -> str:
        path = Path(self.media[source].path)
        return shown_path(path.name if path.stem == self.stems[source] else f"{path} ({self.stems[source]})")

    def _tell(self, problem: Problem) -> None:
        """A source that is nothing but a problem is an error, which comes at the end; of many problems some will do."""
        if problem.frames or (len(self.problems) <= _WARNINGS_MOST and len(self.media) > 1):
            path = shown_path(self.media[problem.source].path)
            self.console.warn(f"{path}: {problem.text}{'' if problem.frames else '; left out'}")

    def unreadable(self) -> tuple[str, ...]:
        return tuple(self.media[problem.source].path for problem in self.problems if not problem.frames)

    def seen(self) -> str:
        """`4 images and 24 frames`."""
        counts = ((self.images, "image"), (self.frames, "frame"))
        return " and ".join(_plural(count, one) for count, one in counts if count)

    def tell_summary(self) -> None:
        for sources, what in (
            (self.non_finite, NON_FINITE),
            (self.cut, "more candidates for a detection than NMS looks at, a higher --conf-thres has fewer"),
        ):
            if sources:
                self.console.warn(f"{_plural(len(sources), 'picture')}, first {self._name(sources[0])}: {what}")
        videos = f" of {_plural(self.videos, 'video')}" if self.frames else ""
        left_out = len(self.unreadable())
        end = f"; {left_out:,} could not be read" if left_out else ""
        listed = f": {_counted(self.boxes, self.names)}" if self.boxes.any() else ""
        self.console.line(f"{self.seen()}{videos}, {_plural(int(self.boxes.sum()), 'box', 'boxes')}{listed}{end}")


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
