"""Labels between their files and the LabelStore: what every format is read into, and the checks that all share.

A bad row costs that box, never the image; only a class beyond `names` is an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.boxes import xywh_from_xyxy
from utils.structures import CROWD

NEGATIVE = "negative width or height: dropped"
ZERO_AREA = "zero area: dropped"
OUTSIDE = "outside the image: dropped"
DUPLICATE = "duplicate row: dropped"
CLIPPED = "reaches outside the image: clipped"
TINY = "less than 2 px wide or high: kept"
OTHER_SIZE = "not of the size that its labels declare: boxes kept as they are"
NOT_A_NUMBER = "not a number: dropped"
NOT_FINITE = "not a finite number: dropped"
UNREADABLE = "label file unreadable: taken as background"

_EDGE_TOLERANCE = 1e-4  # of the image: rounding in label files, not worth a finding
_TINY_PX = 2.0  # a side below this is a slip of the mouse more often than an object, but a real one may be
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One defect of a data set. `line` is 0 where it concerns the whole file."""

    file: str  # for people: from `shown_path`
    line: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """Boxes of n images in one table, as their files say or, after `checked`, in source px; R rows.

    Rows follow the images. Rings and points are packed as in LabelStore.
    """

    image_of: np.ndarray  # (R,) i64, 0 <= image_of < n, ascending
    classes: np.ndarray  # (R,) i64
    boxes: np.ndarray  # (R, 4) f64 xyxy
    ignore: np.ndarray  # (R,) u8: 0, DIFFICULT or CROWD
    area: np.ndarray  # (R,) f64 px^2; NaN: that of the box
    annotated: np.ndarray  # (R, 4) f64 xywh px as a COCO file says, never clipped; (0, 4) from other formats
    ring_offsets: np.ndarray  # (R + 1,) i64
    point_offsets: np.ndarray  # (rings + 1,) i64
    points: np.ndarray  # (Q, 2) f64 xy, of boxes that were drawn as polygons


@dataclass(frozen=True, kw_only=True)
class FileLabels:
    """What label files say of n images that nobody has looked at yet."""

    rows: LabelRows  # boxes and points as fractions of the image where `relative`, else in px
    relative: bool
    lines: np.ndarray  # (R,) i64 where in its file a row stands; 0: the format has no lines
    image_ids: np.ndarray  # (n,) i64, -1 where there is none
    declared: np.ndarray  # (n, 2) i32 height and width as the file says, 0 where it does not, -1 where it is nonsense
    findings: tuple[Finding, ...]  # of rows that could not be read, and of whole files


class Source(Protocol):
    """Some images of a split and where their labels are. Pickles into the few bytes that its images need."""

    images: Sequence[str]  # image files, in a stable order
    label_files: Sequence[str]  # what labels depend on: one for each image, or one for all
    category_ids: Sequence[int]  # by class, -1 where the format has none
    findings: Sequence[Finding]  # of its listing, before anything is read; a part has none
    notes: Sequence[str]  # lines on what is odd and no defect

    def part(self, start: int, stop: int) -> Source:
        """The images start:stop."""

    def chosen(self, keep: np.ndarray) -> Source:
        """The images where `keep` (n,) bool."""

    def label_file(self, image: int) -> str:
        """The file that the labels of an image stand in."""

    def read(self, names: Sequence[str]) -> FileLabels:
        """The labels of all its images. Raises UserError, naming file and line, for a class that is not in `names`."""


def shown_path(path: Path | str) -> str:
    """A path as text that any terminal and file takes: names on Linux are bytes, and need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def class_numbers(names: Sequence[str]) -> dict[str, int]:
    """Class by name, for formats that know classes by their names; the first of two that are called the same."""
    return {name.strip(): number for number, name in reversed(list(enumerate(names)))}


def box_rows(
    image_of: np.ndarray | Sequence[int], classes: np.ndarray | Sequence[int], boxes: np.ndarray | Sequence
) -> LabelRows:
    """Rows that have nothing but a box."""
    count = len(classes)
    return LabelRows(
        image_of=np.asarray(image_of, np.int64),
        classes=np.asarray(classes, np.int64),
        boxes=np.asarray(boxes, np.float64).reshape(-1, 4),
        ignore=np.zeros(count, np.uint8),
        area=np.full(count, np.nan),
        annotated=np.empty((0, 4)),
        ring_offsets=np.zeros(count + 1, np.int64),
        point_offsets=np.zeros(1, np.int64),
        points=np.empty((0, 2)),
    )


def taken(rows: LabelRows, index: np.ndarray) -> LabelRows:
    """The rows of `index`, in its order, with their rings."""
    ring_offsets, rings = _packed(rows.ring_offsets, index)
    point_offsets, points = _packed(rows.point_offsets, rings)
    return LabelRows(
        image_of=rows.image_of[index],
        classes=rows.classes[index],
        boxes=rows.boxes[index],
        ignore=rows.ignore[index],
        area=rows.area[index],
        annotated=rows.annotated[index] if len(rows.annotated) else rows.annotated,
        ring_offsets=ring_offsets,
        point_offsets=point_offsets,
        points=rows.points[points],
    )


def rows_between(rows: LabelRows, first: int, last: int) -> LabelRows:
    """The rows first:last, as views where that can be."""
    first_ring, last_ring = rows.ring_offsets[first], rows.ring_offsets[last]
    first_point, last_point = rows.point_offsets[first_ring], rows.point_offsets[last_ring]
    flat = ("image_of", "classes", "boxes", "ignore", "area", "annotated")  # a slice of nothing is nothing
    return LabelRows(
        ring_offsets=rows.ring_offsets[first : last + 1] - first_ring,
        point_offsets=rows.point_offsets[first_ring : last_ring + 1] - first_point,
        points=rows.points[first_point:last_point],
        **{name: getattr(rows, name)[first:last] for name in flat},
    )


def _packed(offsets: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the groups `index` alone, and the items of these groups."""
    if offsets[-1] == 0:  # no polygons anywhere
        return np.zeros(len(index) + 1, np.int64), np.empty(0, np.int64)
    starts, counts = offsets[index], offsets[index + 1] - offsets[index]
    packed = offsets_of(counts)
    return packed, np.arange(packed[-1]) + np.repeat(starts - packed[:-1], counts)


def offsets_of(counts: np.ndarray | Sequence[int]) -> np.ndarray:
    """(n,) counts -> (n + 1,) i64: group i is offsets[i]:offsets[i + 1]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def point_rows(rows: LabelRows) -> np.ndarray:
    """(Q,) i64: the row that each point belongs to."""
    ring_rows = np.repeat(np.arange(len(rows.classes)), np.diff(rows.ring_offsets))
    return np.repeat(ring_rows, np.diff(rows.point_offsets))


def checked(
    source: Source, labels: FileLabels, sizes: np.ndarray, orientations: np.ndarray
) -> tuple[LabelRows, list[Finding]]:
    """The rows worth keeping, in source px, and what was wrong with the others.

    `sizes` (n, 2) i32 height and width of the images as shown, 0 where an image cannot be used: its rows go silently.
    `orientations` (n,) the EXIF orientation 1..8 that `sizes` allow for. Boxes and points are clipped to the image;
    boxes in px of an image as it is stored are turned into the shown frame where the declared size tells.
    """
    sizes, orientations = np.asarray(sizes).reshape(-1, 2), np.asarray(orientations)
    with np.errstate(
        over="ignore", invalid="ignore", divide="ignore"
    ):  # 1e308 is finite; unusable images are of size 0
        rows = _in_pixels(labels, sizes) if labels.relative else _turned(labels, sizes, orientations)
        inside, problems = _judged(rows, sizes)
    kept = np.flatnonzero(problems < _FIRST_DROPPED)
    findings = _size_findings(source, labels, sizes, orientations) if labels.declared.any() else []
    findings += _row_findings(source, labels, problems) if problems.any() else []
    clean = taken(inside, kept) if len(kept) < len(problems) else inside
    return clean, findings


# What is wrong with a row, as bits; from _FIRST_DROPPED on it is lost
_IS_CLIPPED, _IS_TINY, _FIRST_DROPPED = 1, 2, 4
_PROBLEMS = {
    _IS_CLIPPED: CLIPPED,
    _IS_TINY: TINY,
    4: NEGATIVE,
    8: ZERO_AREA,
    16: OUTSIDE,
    32: DUPLICATE,
    64: "",  # its image cannot be used, which is said elsewhere
}


def _in_pixels(labels: FileLabels, sizes: np.ndarray) -> LabelRows:
    rows = labels.rows
    extent = sizes[:, ::-1].astype(np.float64)  # (n, 2) width and height
    boxes = rows.boxes * np.concatenate([extent, extent], 1)[rows.image_of]
    if not len(rows.points):
        return replace(rows, boxes=boxes)
    return replace(rows, boxes=boxes, points=rows.points * extent[rows.image_of[point_rows(rows)]])


def _turned(labels: FileLabels, sizes: np.ndarray, orientations: np.ndarray) -> LabelRows:
    """Rows in px, those of images that were annotated as they are stored turned as a viewer turns the image."""
    rows, stored = labels.rows, _is_stored_size(labels, sizes, orientations)
    if not stored.any():
        return rows
    height, width = labels.declared[rows.image_of].T
    how = np.where(stored, orientations, 1)[rows.image_of]
    corners = rows.boxes.reshape(-1, 2, 2)
    turned = _turned_points(corners, how[:, None], height[:, None], width[:, None])
    # the sign of a side survives the turn: a negative one is a finding later
    sign = np.where((corners[:, 1] < corners[:, 0]).any(1) & (how > 1), -1, 1)[:, None]
    low, high = turned.min(1), turned.max(1)
    boxes = np.concatenate([np.where(sign < 0, high, low), np.where(sign < 0, low, high)], 1)
    of = point_rows(rows)
    points = _turned_points(rows.points, how[of], height[of], width[of])
    boxes, annotated = np.where(how[:, None] > 1, boxes, rows.boxes), rows.annotated
    if len(annotated):
        annotated = np.where(how[:, None] > 1, xywh_from_xyxy(boxes), annotated)
    return replace(rows, boxes=boxes, points=points, annotated=annotated)


def _is_stored_size(labels: FileLabels, sizes: np.ndarray, orientations: np.ndarray) -> np.ndarray:
    """(n,) bool: the declared size is exactly that of the image before its EXIF quarter turn, and not of that after."""
    turned = (labels.declared == sizes[:, ::-1]).all(1) & (labels.declared != sizes).any(1)
    return turned & np.isin(orientations, _QUARTER_TURNS)


def _turned_points(points: np.ndarray, how: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """(..., 2) points of an image stored as height x width, in the image as EXIF orientation `how` shows it."""
    x, y = points[..., 0], points[..., 1]
    from_left = np.where((how == 6) | (how == 7), height - y, y)
    from_top = np.where((how == 7) | (how == 8), width - x, x)
    return np.where((how > 4)[..., None], np.stack([from_left, from_top], -1), points)


def _judged(rows: LabelRows, sizes: np.ndarray) -> tuple[LabelRows, np.ndarray]:
    """Rows clipped to their images, and (R,) the bits of what is wrong with each."""
    height, width = sizes[rows.image_of].T.astype(np.float64)
    x1, y1, x2, y2 = rows.boxes.T
    limits = np.stack([width, height, width, height], 1)
    boxes = np.minimum(np.maximum(rows.boxes, 0.0), limits)
    in_store = boxes.astype(np.float32)  # as which boxes are kept
    sides = in_store[:, 2:] - in_store[:, :2]
    empty = (sides <= 0).any(1)
    reach = np.maximum(np.maximum(-x1, x2 - width) / width, np.maximum(-y1, y2 - height) / height)
    problems = np.where(reach > _EDGE_TOLERANCE, _IS_CLIPPED, 0)
    problems |= np.where((sides < _TINY_PX).any(1), _IS_TINY, 0)
    missed = (x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height)
    problems[empty] = np.where(missed & (x2 > x1) & (y2 > y1), 16, 8)[empty]
    problems[(x2 < x1) | (y2 < y1)] = 4
    problems[(sizes <= 0).any(1)[rows.image_of]] = 64
    problems[_duplicates(rows, boxes, problems)] = 32
    if not len(rows.points):
        return replace(rows, boxes=boxes), problems
    of = point_rows(rows)
    points = np.minimum(np.maximum(rows.points, 0.0), limits[of, :2])
    return replace(rows, boxes=boxes, points=points), problems


def _duplicates(rows: LabelRows, boxes: np.ndarray, problems: np.ndarray) -> list[int]:
    """Good rows that repeat the class and box of an earlier one of their image; a crowd repeats crowds alone."""
    crowd = rows.ignore == CROWD
    keys = np.ascontiguousarray(boxes + 0.0).view(np.uint64)  # no negative zeros
    with np.errstate(over="ignore"):
        digest = (rows.image_of * 2654435761 + rows.classes * 2 + crowd).astype(np.uint64)
        for column in keys.T:
            digest = (digest ^ (digest >> np.uint64(29)) ^ column) * np.uint64(0x9E3779B97F4A7C15)
    order = np.argsort(digest, kind="stable")
    ranked = digest[order]
    alike = np.flatnonzero(ranked[1:] == ranked[:-1])
    if not len(alike):
        return []
    repeats, seen = [], set()
    for row in np.unique(np.concatenate([order[alike], order[alike + 1]])).tolist():
        key = (rows.image_of[row], rows.classes[row], crowd[row], *keys[row])
        if problems[row] >= _FIRST_DROPPED:
            continue
        if key in seen:
            repeats.append(row)
        seen.add(key)
    return repeats


def _row_findings(source: Source, labels: FileLabels, problems: np.ndarray) -> list[Finding]:
    findings = []
    for row in np.flatnonzero(problems).tolist():
        image, line = int(labels.rows.image_of[row]), int(labels.lines[row])
        file = shown_path(source.label_file(image) if line else source.images[image])
        texts = [text for bit, text in _PROBLEMS.items() if problems[row] & bit and text]
        findings += [Finding(file=file, line=line, problem=text) for text in texts]
    return findings


def _size_findings(source: Source, labels: FileLabels, sizes: np.ndarray, orientations: np.ndarray) -> list[Finding]:
    declared = labels.declared
    wrong = ((declared != 0) & (declared != sizes)).any(1) & (sizes > 0).all(1)
    wrong &= ~_is_stored_size(labels, sizes, orientations)
    return [
        Finding(file=shown_path(source.images[image]), line=0, problem=OTHER_SIZE)
        for image in np.flatnonzero(wrong).tolist()
    ]
