"""Images and videos to look at: what `--source` names, decoded ahead by threads.

The surprise: whatever it is, it comes as one row of pictures in the order of the source, so a folder may hold both
kinds. A few hundred megabytes of them wait in memory at most, however long a video is.
"""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from utils.data.images import ImageError, base_shape, decode_image, resized_to_base
from utils.data.labels import shown_path
from utils.data.listing import Finder, foreign_photos, is_foreign_photo, is_image
from utils.files import nearest_name
from utils.machine import usable_cores
from utils.structures import UserError

VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)
READ_AHEAD_BYTES = 256 << 20  # of decoded pixels that wait for the network
_MOST_AHEAD = 64  # pictures
_MOST_THREADS = 16
_MOST_ASKED = 50  # videos opened only to ask how long they are
_USUAL_RATE = 25.0  # frames per second, of a video that does not say
_FIRST_GUESS = 16 << 20  # bytes of a picture, before there was any

KINDS = "an image, a video, a folder of these, a glob in quotes such as 'photos/*.jpg', or a .txt list of paths"


@dataclass(frozen=True, kw_only=True)
class Medium:
    """An image or a video, by its path."""

    path: str
    is_video: bool


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image, or a frame of a video, decoded."""

    source: int  # which of the media
    frame: int  # of a video, from 1; 0: an image
    rate: float  # frames per second of the video; 0: an image
    size: tuple[int, int]  # height and width in px, as shown
    pixels: np.ndarray | None  # (H, W, 3) u8 BGR; None where nobody asked for them
    base: np.ndarray  # its base image, (h, w, 3) u8 BGR


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one of the media, told when nothing more of it can be read."""

    source: int
    text: str
    frames: int = 0  # of a video, read before


def picture_of(
    image: np.ndarray, imgsz: int, *, source: int = 0, frame: int = 0, rate: float = 0.0, keep: bool = False
) -> Picture:
    """A decoded image (H, W, 3) u8 BGR as evaluation would see it; with `keep`, its pixels too.

    Raises MemoryError where `imgsz` is too large for that.
    """
    size = image.shape[:2]
    try:
        base = resized_to_base(image, base_shape(size, imgsz), area=True)
    except cv2.error as error:
        raise MemoryError(str(error)) from error
    return Picture(source=source, frame=frame, rate=rate, size=size, pixels=image if keep else None, base=base)


# ---- what a source names ------------------------------------------------------------------------------------------


def find_media(source: str) -> tuple[list[Medium], list[str]]:
    """The media that `--source` names, in order, and warnings on what it names besides.

    A folder stands for what lies in it, but not in folders below. Raises UserError where there is nothing to look at.
    """
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return _of_list(path) if path.lower().endswith(".txt") else ([_medium(path)], [])
    found = _several(path)
    if found is None:
        raise UserError(f"--source {source}: {_why_nothing(source, path)}")
    if not found.media:
        raise UserError(f"--source {source}: {_why_empty(path, found)}")
    return found.media, found.warnings()


_FOREIGN = "a photo that OpenCV cannot read; convert it to .jpg or .png"


@dataclass(frozen=True, kw_only=True)
class _Several:
    """What lies in a folder, or what a glob matches."""

    media: list[Medium]
    photos: list[str]  # that nobody can decode
    unsearched: str  # words on the folders below; empty where there are none

    def warnings(self) -> list[str]:
        photos = [f"{shown_path(photo)}: {_FOREIGN}; left out" for photo in self.photos]
        return [self.unsearched, *photos] if self.unsearched else photos


def _several(path: str) -> _Several | None:
    """None where it is neither a folder nor a glob."""
    below = 0
    if os.path.isdir(path):
        try:
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.path)
            below = sum(entry.is_dir() and entry.name[0] != "." for entry in found)
            files = [entry.path for entry in found if entry.is_file()]
        except OSError as error:
            raise UserError(f"--source {path}: cannot be read: {error.strerror}") from None
    elif glob.has_magic(path) and not os.path.lexists(path):
        files = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    else:
        return None
    names = [os.path.basename(file) for file in files]
    photos = set(foreign_photos(names, list(filter(is_image, names))))
    return _Several(
        media=[_medium(file) for file, name in zip(files, names) if is_image(name) or is_video(name)],
        photos=[file for file, name in zip(files, names) if name in photos],
        unsearched=_unsearched(path, below) if below else "",
    )


def _unsearched(path: str, folders: int) -> str:
    what = "1 subfolder is" if folders == 1 else f"{folders:,} subfolders are"
    deeper = shown_path(os.path.join(glob.escape(path), "**", "*"))
    return f"{what} not searched: --source '{deeper}' takes {'it' if folders == 1 else 'them'}"


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and name[0] != "."


def _medium(path: str) -> Medium:
    """By its name; a file whose name says nothing is an image if it begins like one."""
    name = os.path.basename(path)
    if is_image(name) or is_foreign_photo(name):
        return Medium(path=path, is_video=False)
    return Medium(path=path, is_video=is_video(name) or not cv2.haveImageReader(path))


def _of_list(file: str) -> tuple[list[Medium], list[str]]:
    """The media that a list names, a path, folder or glob per line, seen from the list or the working directory."""
    lines = _lines(file)
    finder = Finder([os.path.dirname(os.path.abspath(file)), os.getcwd()])
    media: list[Medium] = []
    warnings: list[str] = []
    for number, line in lines:
        found, told = _of_line(line, finder, os.path.dirname(file))
        media += found
        warnings += told
        if not found and not told:
            warnings.append(f"{shown_path(file)}, line {number}: {shown_path(line)}: nothing there; left out")
    if not media:
        first = f"; first: {shown_path(lines[0][1])}" if lines else ""
        what = f"none of its {len(lines)} entries is there" if lines else "lists nothing"
        raise UserError(f"--source {shown_path(file)}: {what}; expected a path of an image or video per line{first}")
    return media, warnings


def _lines(file: str) -> list[tuple[int, str]]:
    """Numbers and texts of the lines that say something."""
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--source {shown_path(file)}: cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise UserError(f"--source {shown_path(file)}: is no text; expected a path of an image or video per line")
    # names are bytes, as they are in folders; editors on Windows put a byte order mark first
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    return [(number, text) for number, line in enumerate(lines, 1) if (text := line.strip()) and text[0] != "#"]


def _of_line(line: str, finder: Finder, folder: str) -> tuple[list[Medium], list[str]]:
    """The media that a line names, and warnings."""
    line = os.path.expanduser(line)
    for path in (os.path.join(folder, line), line):
        if os.path.isfile(path):
            return [_medium(path)], []
        found = _several(path)
        if found and (found.media or found.warnings()):
            return found.media, found.warnings()
    path = finder.find(line)  # lists come from other machines
    return ([_medium(path)], []) if os.path.isfile(path) else ([], [])


def _why_nothing(source: str, path: str) -> str:
    if re.match(r"(?i)[a-z][a-z0-9+.-]+://", source):
        return "URLs are not fetched; download it first and name the file"
    if source.isdecimal() or source.startswith("/dev/video"):
        return "cameras are not supported; record a video and name its file"
    if os.path.lexists(path):
        return f"is neither a file nor a folder; expected {KINDS}"
    parent, name = os.path.split(path)
    try:
        beside = os.listdir(parent or ".")
    except OSError:
        beside = []
    return f"not found; expected {KINDS}{nearest_name(name, beside)}"


def _why_empty(path: str, found: _Several) -> str:
    if found.photos:
        first = shown_path(found.photos[0])
        return f"none of its photos can be read by OpenCV; convert them to .jpg or .png; first: {first}"
    if not os.path.isdir(path):
        return "no image or video matches"
    return f"no image or video in this folder{found.unsearched and f'; {found.unsearched}'}"


# ---- reading ------------------------------------------------------------------------------------------------------


def count_pictures(media: Sequence[Medium]) -> int:
    """How many `read_media` is likely to yield, by what videos say of themselves; 0 where one does not."""
    videos = [medium.path for medium in media if medium.is_video]
    if len(videos) > _MOST_ASKED:
        return 0
    frames = [cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT) for path in videos]
    readable = [count for count in frames if count >= 0]  # others cannot be opened
    return 0 if 0 in readable else len(media) - len(videos) + int(sum(readable))


def read_media(media: Sequence[Medium], imgsz: int, *, keep: bool) -> Iterator[Picture | Problem]:
    """Every image and every frame of every video in order, and problems where they strike; with `keep`, with pixels."""
    threads = min(usable_cores(), _MOST_THREADS)
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(1) as player:
        try:
            yield from filter(None, read_ahead(_started(media, imgsz, readers, player, keep), _pixel_bytes))
        finally:
            for pool in (readers, player):
                pool.shutdown(wait=False, cancel_futures=True)


def _started(
    media: Sequence[Medium], imgsz: int, readers: ThreadPoolExecutor, player: ThreadPoolExecutor, keep: bool
) -> Iterator[Future[Picture | Problem | None]]:
    """One read after the other, each begun when it is asked for."""
    for source, medium in enumerate(media):
        if not medium.is_video:
            yield readers.submit(_read_image, medium.path, imgsz, source, keep)
            continue
        video = _Video(medium.path, imgsz, source, keep)
        while not video.over:
            yield player.submit(video.read)


def _pixel_bytes(item: Picture | Problem | None) -> int:
    if not isinstance(item, Picture):
        return 0
    return item.base.nbytes + (0 if item.pixels is None else item.pixels.nbytes)


_Item = TypeVar("_Item")


def read_ahead(started: Iterator[Future[_Item]], size: Callable[[_Item], int]) -> Iterator[_Item]:
    """The results of futures in order. Later ones are begun meanwhile, as many as are thought to fit into memory."""
    waiting: deque[Future[_Item]] = deque()
    each, more = _FIRST_GUESS, True
    while True:
        while more and len(waiting) < min(max(READ_AHEAD_BYTES // each, 1), _MOST_AHEAD):
            future = next(started, None)
            more = future is not None
            if future is not None:
                waiting.append(future)
        if not waiting:
            return
        item = waiting.popleft().result()
        each = size(item) or each
        yield item


def _read_image(path: str, imgsz: int, source: int, keep: bool) -> Picture | Problem:
    try:
        return picture_of(decode_image(path), imgsz, source=source, keep=keep)
    except ImageError as error:
        foreign = is_foreign_photo(os.path.basename(path))
        return Problem(source=source, text=_FOREIGN if foreign else str(error))


class _Video:
    """The frames of a video, one at a time and always by the same thread. `over`: there are no more."""

    def __init__(self, path: str, imgsz: int, source: int, keep: bool) -> None:
        self.over = False
        self._path, self._imgsz, self._source, self._keep = path, imgsz, source, keep
        self._capture: cv2.VideoCapture | None = None
        self._frames = 0

    def read(self) -> Picture | Problem | None:
        """The next frame; at the end a problem, if there is any; then nothing."""
        if self.over:
            return None
        if self._capture is None:
            if problem := _unlike_file(self._path):
                return self._end(problem)
            self._capture = cv2.VideoCapture(self._path)
        frame = self._next_frame(self._capture)
        if frame is None:
            return self._end(self._missing(self._capture))
        self._frames += 1
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate <= 1000 else _USUAL_RATE
        return picture_of(frame, self._imgsz, source=self._source, frame=self._frames, rate=rate, keep=self._keep)

    def _next_frame(self, capture: cv2.VideoCapture) -> np.ndarray | None:
        try:
            there, frame = capture.read()
        except cv2.error:
            return None
        if not there or frame is None or not frame.size:
            return None
        return frame if frame.ndim == 3 else cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR)

    def _missing(self, capture: cv2.VideoCapture) -> str:
        """What a video lacks that has come to an end."""
        if not self._frames:
            if is_video(os.path.basename(self._path)):
                return "not a video that OpenCV can decode"
            return f"neither an image nor a video that OpenCV can decode; expected {KINDS}"
        promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)  # in some formats an estimate
        short = self._frames < 0.95 * promised - 1
        return f"damaged or cut short: {self._frames:,} of {promised:,.0f} frames could be read" if short else ""

    def _end(self, problem: str) -> Problem | None:
        self.over = True
        if self._capture is not None:
            self._capture.release()
        return Problem(source=self._source, text=problem, frames=self._frames) if problem else None


def _unlike_file(path: str) -> str:
    """Why a file cannot be read at all, which OpenCV does not say; empty where it can."""
    try:
        with open(path, "rb") as file:
            return "" if file.read(1) else "empty file"
    except OSError as error:
        return error.strerror or "unreadable"
