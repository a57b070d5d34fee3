"""What detect.py leaves behind: pictures, videos, label files and crops, and what they are called.

The surprise: threads write all of it, so that the network goes on meanwhile. One of them paints boxes and videos, in
order; the others encode images.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from utils.config import DetectOptions
from utils.data.encode import VideoError, VideoFile, encoded
from utils.data.findings import shortened
from utils.data.labels import shown_path
from utils.data.media import Medium, Picture
from utils.evaluate.detector import Found
from utils.evaluate.saving import LABELS_FOLDER, write_txt
from utils.files import write_atomic
from utils.machine import usable_cores
from utils.report.annotate import annotated, class_colour
from utils.report.console import Console
from utils.structures import Detections, RunError

CROPS_FOLDER = "crops"

_PENDING_MOST = 64  # pictures that wait to be written
_PENDING_BYTES = 256 << 20  # of their pixels
_WRITERS_MOST = 8  # threads
_STEM_BYTES = 200  # of a file name without its ending; file systems allow 255 in all


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
            with suppress(OSError, VideoError):
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
            try:
                video.close()
            except VideoError as error:
                raise RunError(f"{error}; --nosave draws none") from error
        return []

    def _write_image(self, stem: str, source: int, drawn: np.ndarray) -> None:
        data, suffix = encoded(drawn, Path(self._media[source].path).suffix)
        _write_bytes(self._folder / f"{stem}{suffix}", data)

    def _write_labels(self, stem: str, picture: Picture, detections: Detections) -> None:
        """As val.py: no file where there is nothing to say."""
        if not len(detections.boxes):
            return
        path = self._folder / LABELS_FOLDER / f"{stem}.txt"
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
