"""YOLO text: a label file for each image, rows of fractions of the image.

A row is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon of three points or more. The surprise: floats
are parsed by the file, not by the row, once it is known to hold nothing but numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import NoReturn

import numpy as np

from utils.data.labels import (
    NOT_A_NUMBER,
    NOT_FINITE,
    UNREADABLE,
    FileLabels,
    Finding,
    LabelRows,
    box_rows,
    offsets_of,
    shown_path,
)
from utils.structures import UserError

_IN_NUMBERS = b"0123456789+-.eE"  # float() takes `1_0`, `inf` and `nan` as well, which are none here
_IN_FILES = _IN_NUMBERS + b" \t\r\n"
_AT_ONCE = 1 << 16
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


def label_path(image: str) -> str:
    """`a/images/b/x.jpg` -> `a/labels/b/x.txt`; without a folder `images`, the .txt beside the image."""
    folder, name = image[: image.rfind(os.sep) + 1], image[image.rfind(os.sep) + 1 :]
    cut = folder.rfind(_IMAGES)
    if cut >= 0:
        folder = folder[:cut] + _LABELS + folder[cut + len(_IMAGES) :]
    elif folder.startswith(_IMAGES[1:]):
        folder = _LABELS[1:] + folder[len(_IMAGES) - 1 :]
    return folder + _stem(name) + ".txt"


_IMAGES, _LABELS = f"{os.sep}images{os.sep}", f"{os.sep}labels{os.sep}"


def _stem(name: str) -> str:
    dot = name.rfind(".")
    return name[:dot] if dot > 0 else name


def have_labels(folder: str) -> bool:
    """Whether the images of a folder seem to have label files where the rule wants them."""
    expected = os.path.dirname(label_path(f"{folder}{os.sep}x"))
    return _has_text(folder) if expected == folder else os.path.isdir(expected)


def labels_lie_beside(folder: str) -> bool:
    """Whether a folder `images` holds the .txt files itself: its `labels` does not exist, and it has some."""
    expected = os.path.dirname(label_path(f"{folder}{os.sep}x"))
    return expected != folder and not os.path.isdir(expected) and _has_text(folder)


def _has_text(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name[-4:].lower() == ".txt" for entry in entries)
    except OSError:
        return False


class _LabelPaths(Sequence[str]):
    """The label files of images, made as they are asked for."""

    def __init__(self, images: Sequence[str], beside: frozenset[str], respelled: Mapping[str, str]) -> None:
        self._images, self._beside, self._respelled = images, beside, respelled

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _LabelPaths(self._images[index], self._beside, self._respelled)
        image = self._images[index]
        is_beside = self._beside and image[: image.rfind(os.sep)] in self._beside
        expected = _stem(image) + ".txt" if is_beside else label_path(image)
        return self._respelled.get(expected, expected)

    def __iter__(self) -> Iterator[str]:
        by_rule = not self._beside and not self._respelled
        return map(label_path, self._images) if by_rule else map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Images with their YOLO text."""

    images: Sequence[str]
    beside: frozenset[str] = frozenset()  # folders `images` that hold their labels themselves, against the rule
    respelled: Mapping[str, str] = field(default_factory=dict)  # a/labels/x.txt: a/labels/x.TXT
    findings: tuple[Finding, ...] = ()
    category_ids: Sequence[int] = ()
    notes: tuple[str, ...] = ()

    @property
    def label_files(self) -> Sequence[str]:
        return _LabelPaths(self.images, self.beside, self.respelled)

    def part(self, start: int, stop: int) -> TextSource:
        part = replace(self, images=self.images[start:stop], findings=())
        if not self.respelled:
            return part
        mine = set(part.label_files)
        return replace(part, respelled={rule: path for rule, path in self.respelled.items() if path in mine})

    def chosen(self, keep: np.ndarray) -> TextSource:
        return replace(self, images=list(compress(self.images, keep.tolist())))

    def label_file(self, image: int) -> str:
        return self.label_files[image]

    def read(self, names: Sequence[str]) -> FileLabels:
        parsed = _Parsed()
        for image, path in enumerate(self.label_files):
            try:
                data = _read(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                parsed.finding(path, 0, UNREADABLE)
                continue
            if data:
                parsed.add(image, path, data)
        return parsed.labels(self, names)


def _read(path: str) -> bytes:
    """A file of a few hundred bytes in as few calls as can be."""
    handle = os.open(path, _OPEN_FLAGS)
    try:
        data = os.read(handle, _AT_ONCE)
        if len(data) < _AT_ONCE:
            return data
        with os.fdopen(os.dup(handle), "rb") as rest:
            return data + rest.read()
    finally:
        os.close(handle)


@dataclass
class _Parsed:
    """Rows as they come: what label files say before numpy sees it."""

    values: list[float] = field(default_factory=list)  # of all rows, one after the other
    counts: list[int] = field(default_factory=list)  # values of each row
    classes: list[bytes] = field(default_factory=list)  # as written, for an error message
    lines: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def finding(self, path: str, line: int, problem: str) -> None:
        self.findings.append(Finding(file=shown_path(path), line=line, problem=problem))

    def add(self, image: int, path: str, data: bytes) -> None:
        """The rows of a file."""
        if data.startswith(b"\xef\xbb\xbf"):
            data = data[3:]
        numbers_alone = not data.translate(None, _IN_FILES)
        if not numbers_alone and not _is_text(data):
            self.finding(path, 0, UNREADABLE)
            return
        tokens, before = [], len(self.counts)
        for number, line in enumerate(data.splitlines(), 1):
            fields = line.split()
            count = len(fields)
            if count == 5 or (count > 6 and count % 2):
                if numbers_alone or not line.translate(None, _IN_FILES):
                    tokens += fields
                    self._count(image, number, count, fields[0])
                else:
                    self.finding(path, number, _not_numbers(fields))
            elif count:
                values = "1 value" if count == 1 else f"{count} values"
                self.finding(path, number, f"{values}, expected 5 (class cx cy w h) or a polygon: dropped")
        try:
            self.values += list(map(float, tokens))
        except ValueError:
            self._add_one_by_one(path, tokens, before)

    def _count(self, image: int, line: int, count: int, label: bytes) -> None:
        self.counts.append(count)
        self.classes.append(label)
        self.lines.append(line)
        self.images.append(image)

    def _add_one_by_one(self, path: str, tokens: list[bytes], before: int) -> None:
        """Tokens of the rows from `before` on, of which some are no numbers."""
        columns = (self.images, self.lines, self.counts, self.classes)
        rows = list(zip(*(column[before:] for column in columns)))
        for column in columns:
            del column[before:]
        start = 0
        for image, line, count, label in rows:
            try:
                self.values += list(map(float, tokens[start : start + count]))
                self._count(image, line, count, label)
            except ValueError:
                self.finding(path, line, NOT_A_NUMBER)
            start += count

    def labels(self, source: TextSource, names: Sequence[str]) -> FileLabels:
        values, counts = np.array(self.values, np.float64), np.array(self.counts, np.int64)
        offsets = offsets_of(counts)
        keep = np.ones(len(counts), bool)
        if not np.isfinite(values).all():
            keep = np.logical_and.reduceat(np.isfinite(values), offsets[:-1])
            for row in np.flatnonzero(~keep).tolist():
                self.finding(source.label_file(self.images[row]), self.lines[row], NOT_FINITE)
        classes = values[offsets[:-1]]
        wrong = keep & ~((classes >= 0) & (classes < len(names)) & (classes == np.floor(classes)))
        if wrong.any():
            self._refuse_class(source, names, int(np.flatnonzero(wrong)[0]))
        kept = np.flatnonzero(keep)
        images = np.array(self.images, np.int64)[kept]
        return FileLabels(
            rows=_rows(values, offsets[:-1][kept], counts[kept], images),
            relative=True,
            lines=np.array(self.lines, np.int64)[kept],
            image_ids=np.full(len(source.images), -1),
            declared=np.zeros((len(source.images), 2), np.int32),
            findings=tuple(self.findings),
        )

    def _refuse_class(self, source: TextSource, names: Sequence[str], row: int) -> NoReturn:
        where = f"{shown_path(source.label_file(self.images[row]))}:{self.lines[row]}"
        label = self.classes[row].decode()
        raise UserError(
            f"{where}: class {label} does not exist; names has classes 0 to {len(names) - 1}, counted from 0"
        )


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _not_numbers(fields: list[bytes]) -> str:
    """Why a row is not finite numbers: `nan` and `inf` are no slips of a keyboard."""
    strange = [value for value in fields if value.translate(None, _IN_NUMBERS)]
    not_finite = all(value.lower().lstrip(b"+-") in (b"nan", b"inf", b"infinity") for value in strange)
    return NOT_FINITE if not_finite else NOT_A_NUMBER


def _rows(values: np.ndarray, starts: np.ndarray, counts: np.ndarray, images: np.ndarray) -> LabelRows:
    """Rows from (V,) `values`, in which row r is values[starts[r]:starts[r] + counts[r]]."""
    first = values[starts[:, None] + np.arange(5)]  # (R, 5); of a polygon, its beginning
    half = first[:, 3:] / 2
    boxes = np.concatenate([first[:, 1:3] - half, first[:, 1:3] + half], 1)
    rows = box_rows(images, first[:, 0], boxes)
    polygons = np.flatnonzero(counts != 5)
    if not len(polygons):
        return rows
    point_offsets = offsets_of(counts[polygons] // 2)
    ends = np.repeat(starts[polygons] + 1 - 2 * point_offsets[:-1], np.diff(point_offsets))
    points = values[(ends + 2 * np.arange(point_offsets[-1]))[:, None] + np.arange(2)]
    boxes[polygons, :2] = np.minimum.reduceat(points, point_offsets[:-1])
    boxes[polygons, 2:] = np.maximum.reduceat(points, point_offsets[:-1])
    return replace(rows, boxes=boxes, ring_offsets=offsets_of(counts != 5), point_offsets=point_offsets, points=points)
