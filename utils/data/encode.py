"""Pictures and videos written again: the formats that they keep, and those that they get instead.

The surprise: OpenCV's writer of videos keeps its errors to itself, so folder and disk are asked before and meanwhile,
and what was written is played at the end.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

from utils.data.labels import shown_path

_VIDEO_KINDS = ((".mp4", "mp4v"), (".avi", "MJPG"))  # the second needs nothing but OpenCV itself
_LEAST_FREE = 8 << 20  # bytes on the drive: a video needs some to be ended properly
_LOOK_EVERY = 50  # frames


class VideoFile:
    """A video that grows by a frame at a time. Its name appears when it is closed, and it is whole then.

    It is MPEG-4 in .mp4, or Motion JPEG in .avi where this OpenCV has no encoder for that. Raises VideoError where it
    has none for either, or fails without a word, and OSError where folder or disk take no file.
    """

    def __init__(self, folder: Path, stem: str, *, rate: float, size: tuple[int, int]) -> None:
        """`size` is the height and width of the frames in px."""
        self._size, self._frames = size, 0
        for suffix, code in _VIDEO_KINDS:
            self.path = folder / f"{stem}{suffix}"
            self._unfinished = folder / f".{stem}.{os.getpid()}{suffix}"
            self._refuse_unwritable()
            fourcc = cv2.VideoWriter_fourcc(*code)
            self._writer = cv2.VideoWriter(os.fspath(self._unfinished), fourcc, rate, size[::-1])
            if self._writer.isOpened():
                return
            self._unfinished.unlink(missing_ok=True)
        raise VideoError("this OpenCV has no encoder for videos")

    def add(self, frame: np.ndarray) -> None:
        """(H, W, 3) u8 BGR; one of another size than the first is resized."""
        if frame.shape[:2] != self._size:
            frame = cv2.resize(frame, self._size[::-1], interpolation=cv2.INTER_AREA)
        self._writer.write(frame)
        self._frames += 1
        if self._frames % _LOOK_EVERY == 0:
            self._refuse_full_disk()

    def close(self) -> None:
        """End it and give it its name; without any frame it vanishes."""
        self._writer.release()
        if not self._frames:
            self._unfinished.unlink(missing_ok=True)
            return
        if not _plays(self._unfinished):  # the writer keeps errors to itself
            self._unfinished.unlink(missing_ok=True)
            self._refuse_full_disk()
            height, width = self._size
            raise VideoError(
                f"{shown_path(self.path)}: OpenCV could not write this video, though the disk has room: {width} x "
                f"{height} px may be more than its encoder takes, or the file larger than a quota allows"
            )
        self._unfinished.replace(self.path)

    def _refuse_unwritable(self) -> None:
        """OpenCV would not say why."""
        try:
            self._unfinished.write_bytes(b"")
        except OSError as error:
            error.filename = os.fspath(self.path)
            raise

    def _refuse_full_disk(self) -> None:
        if shutil.disk_usage(self.path.parent).free < _LEAST_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.path))


class VideoError(ValueError):
    """A video that cannot be written; the message says why."""


def _plays(path: Path) -> bool:
    capture = cv2.VideoCapture(os.fspath(path))
    try:
        return capture.read()[0]
    finally:
        capture.release()


_ENCODED = frozenset(".bmp .dib .jfif .jpe .jpeg .jpg .png .ppm .tif .tiff .webp".split())


def encoded(image: np.ndarray, suffix: str) -> tuple[bytes, str]:
    """A picture (H, W, 3) u8 BGR in the format of a file name's ending, and the ending that befits it.

    Formats that are seldom written, or lose colours, become PNG.
    """
    suffix = suffix if suffix.lower() in _ENCODED else ".png"
    kind = ".jpg" if suffix.lower() in (".jfif", ".jpe", ".jpeg") else suffix.lower()
    quality = {".jpg": [cv2.IMWRITE_JPEG_QUALITY, 95], ".webp": [cv2.IMWRITE_WEBP_QUALITY, 95]}.get(kind, [])
    try:
        done, data = cv2.imencode(kind, image, quality)
    except cv2.error:  # as for a JPEG of more than 65,500 px
        done = False
    if done:
        return data.tobytes(), suffix
    assert kind != ".png"
    return encoded(image, ".png")
