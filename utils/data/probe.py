"""One look at an image file: does it decode, how large is it as shown, which way is it turned, is it a copy of another.

The surprise: an ordinary JPEG is decoded to an eighth of its size in grey, which reads all of its data at a quarter of
the time; its size comes from the header. Where the two do not agree, and for anything else, it is decoded in full.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO

import cv2
import numpy as np

from utils.data.images import IMAGE_SUFFIXES, is_complete

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_KINDS: tuple[tuple[str, tuple[bytes, ...], tuple[str, ...]], ...] = (  # name, how a file starts, suffixes
    ("JPEG", (_JPEG,), (".jpg", ".jpeg", ".jpe", ".jfif")),
    ("PNG", (_PNG,), (".png",)),
    ("GIF", (b"GIF87a", b"GIF89a"), (".gif",)),
    ("BMP", (b"BM",), (".bmp", ".dib")),
    ("WebP", (b"RIFF",), (".webp",)),
    ("TIFF", (b"II*\0", b"MM\0*"), (".tif", ".tiff")),
)
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # of a JPEG: baseline, extended, progressive
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
_MOST_PIXELS = 2**30  # more and OpenCV refuses to decode in full
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What there is to know of an image file before anything is read into it."""

    height: int  # px as shown, after EXIF orientation; 0 with a problem
    width: int
    orientation: int  # of EXIF, 1..8; 1: as stored
    digest: int  # u64 of the bytes of the file
    problem: str | None  # why it cannot be used
    note: str | None  # what is odd about it though it can


def probe(path: str | os.PathLike[str]) -> Probe:
    """Look at an image file. Height and width are those of `images.decode_image`, and so is the problem."""
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            data = file.read()
    except OSError as error:
        return _unusable(error.strerror or "unreadable")
    if not data:
        return _unusable("empty file")
    if not is_complete(data):
        return _unusable("truncated")
    seen = _look_at_jpeg(data) if data.startswith(_JPEG) else None
    if seen is None:
        seen = _look_in_full(data)
    if seen is None:
        return _unusable("not an image that OpenCV can decode")
    (height, width), orientation = seen
    digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
    note = _wrong_suffix(data, os.fspath(path))
    return Probe(height=height, width=width, orientation=orientation, digest=digest, problem=None, note=note)


def _without_waiting(path: str, flags: int) -> int:
    """A named pipe among the images would keep a scan waiting for ever; so it is empty."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unusable(problem: str) -> Probe:
    return Probe(height=0, width=0, orientation=1, digest=0, problem=problem, note=None)


def _wrong_suffix(data: bytes, path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 (hot)
    for kind, starts, suffixes in _KINDS:
        if data.startswith(starts):
            misled = suffix in IMAGE_SUFFIXES and suffix not in suffixes
            return f"is a {kind} with the name {suffix}" if misled else None
    return None


def _decoded(data: bytes, how: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except cv2.error:
        return None


# ---- JPEG ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Header:
    """Of a JPEG; the frame is what its compressed data is made of."""

    stored: tuple[int, int]  # height and width in px
    orientation: int
    has_exif: bool


def _look_at_jpeg(data: bytes) -> tuple[tuple[int, int], int] | None:
    """(height, width) as shown and orientation; None where only a full decode can tell."""
    header = _jpeg_header(data)
    if header is None:
        return None
    small = _decoded(data, cv2.IMREAD_REDUCED_GRAYSCALE_8)
    if small is None:
        return None
    height, width = header.stored
    eighth = -(-height // 8), -(-width // 8)
    turned = header.orientation >= 5
    if small.shape[:2] != (eighth[::-1] if turned else eighth):
        return None
    if header.has_exif and height != width and eighth[0] == eighth[1]:
        return None  # the small image does not prove that OpenCV turns it as we read its EXIF
    return ((width, height) if turned else (height, width)), header.orientation


def _jpeg_header(data: bytes) -> _Header | None:
    """None for a frame that is not plain: 8 bits, one or three components, a size that is given and not excessive."""
    stored, orientation, has_exif = None, 1, False
    position, end = 2, len(data) - 9
    while position < end and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        if marker == 0xDA:
            break
        body, length = position + 4, data[position + 2] << 8 | data[position + 3]
        if marker in _OTHER_FRAMES or (marker in _PLAIN_FRAMES and stored is not None):
            return None
        if marker in _PLAIN_FRAMES:
            if data[body] != 8 or data[body + 5] not in (1, 3):
                return None
            stored = data[body + 1] << 8 | data[body + 2], data[body + 3] << 8 | data[body + 4]
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", body):
            if has_exif:  # which of two holds is OpenCV's to say
                return None
            has_exif, orientation = True, _orientation(data[body + 6 : position + 2 + length])
        position += 2 + length
    if stored is None or not 0 < stored[0] * stored[1] <= _MOST_PIXELS:
        return None
    return _Header(stored=stored, orientation=orientation, has_exif=has_exif)


# ---- the rest -----------------------------------------------------------------------------------------------------


def _look_in_full(data: bytes) -> tuple[tuple[int, int], int] | None:
    image = _decoded(data, cv2.IMREAD_COLOR)
    if image is None:
        return None
    orientation = _orientation(_exif(data))
    if orientation != 1 and np.array_equal(image, _decoded(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)):
        orientation = 1  # some versions of OpenCV do not honour it in this format
    return image.shape[:2], orientation


def _exif(data: bytes) -> bytes:
    """The EXIF block of a JPEG, PNG or WebP file, from its TIFF header on; empty where there is none."""
    if data.startswith(_JPEG):
        start = data.find(b"Exif\0\0")
        return data[start + 6 :] if start >= 0 else b""
    name = b"eXIf" if data.startswith(_PNG) else b"EXIF" if data[8:12] == b"WEBP" else b""
    position = 8 if name == b"eXIf" else 12
    order = "big" if name == b"eXIf" else "little"
    while name and position + 8 < len(data):
        if name == b"eXIf":  # length, name, content, checksum
            length, found, rest = int.from_bytes(data[position : position + 4], order), data[position + 4 :][:4], 4
        else:  # name, length, content, filled up to an even number
            length, found = int.from_bytes(data[position + 4 : position + 8], order), data[position : position + 4]
            rest = length % 2
        if found == name:
            return data[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0")
        position += 8 + length + rest
    return b""


def _orientation(exif: bytes) -> int:
    """The orientation that an EXIF block gives, 1 where it gives none. `exif` starts with its TIFF header."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1
    start = int.from_bytes(exif[4:8], order)
    for entry in range(int.from_bytes(exif[start : start + 2], order)):
        field = exif[start + 2 + 12 * entry :][:12]
        if len(field) < 12:
            break
        if int.from_bytes(field[:2], order) == _ORIENTATION_TAG:
            value = int.from_bytes(field[8:10], order)
            return value if 1 <= value <= 8 else 1
    return 1


# ---- damage -------------------------------------------------------------------------------------------------------

_OF_IMAGES = (b"JPEG", b"libpng", b" @ 0x", b"FFMPEG")  # in the lines that C libraries print on images and videos


class Overheard:
    """What has been written to standard error since it was taken from the screen."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file

    def length(self) -> int:
        """In bytes, so far."""
        return os.fstat(self._file.fileno()).st_size if self._file else 0

    def lines(self, start: int = 0) -> list[bytes]:
        """From byte `start` on; not while another thread may write."""
        if not self._file:
            return []
        self._file.seek(start)
        return self._file.read().splitlines(keepends=True)  # and stands at the end again, where writing goes on


@contextmanager
def overheard() -> Iterator[Overheard]:
    """libjpeg tells damaged data by a line on the standard error of the process, and by nothing else: it goes into a
    file. What is not about images appears on the screen in the end."""
    screen = _standard_error()
    if screen is None:
        yield Overheard(None)
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        heard = Overheard(file)
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            os.dup2(screen, 2)
            others = [line for line in heard.lines() if not any(mark in line for mark in _OF_IMAGES)]
            with suppress(OSError):
                os.write(screen, b"".join(others))
            os.close(screen)


def silence_libraries() -> None:
    """Nothing that C libraries print appears any more in this process; Python keeps its standard error."""
    screen = _standard_error()
    if screen is None:
        return
    if sys.stderr is sys.__stderr__:
        sys.stderr = os.fdopen(screen, "w", buffering=1, errors="backslashreplace")
    else:
        os.close(screen)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _standard_error() -> int | None:
    """A second handle on it; None where there is none: then 2 may be any file."""
    if sys.__stderr__ is not None:
        with suppress(OSError):
            return os.dup(2)
    return None


def damaged(paths: Sequence[str], heard: Overheard) -> dict[str, str]:
    """What is wrong with those of the images that decode all the same; one after the other, in one thread."""
    found = {}
    for path in paths:
        start = heard.length()
        usable = probe(path).problem is None
        lines = [line for line in heard.lines(start) if b"warning" not in line] if usable else []
        if lines:
            said = lines[0].strip().decode("ascii", "replace")
            found[path] = f"damaged ({said}): kept as far as it can be read"
    return found
