"""COCO JSON: one file for many images, boxes `[x, y, w, h]` in pixels, categories known by their names.

The file is read as a whole and packed at once, so that the part of a source that goes to another process is small.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.labels import (
    NOT_A_NUMBER,
    NOT_FINITE,
    FileLabels,
    Finding,
    LabelRows,
    box_rows,
    class_numbers,
    offsets_of,
    rows_between,
    shown_path,
    taken,
)
from utils.files import json_kind, nearest_name, read_json
from utils.structures import CROWD, UserError

NO_IMAGE = "annotation of an image that the file does not list: ignored"
NO_BOX = "no box and no polygon: dropped"
BAD_BOX = "bbox is not [x, y, width, height]: dropped"
SAME_IMAGE = "listed twice in its COCO file: taken once"

_LARGEST_ID = 2**63 - 1024  # the largest float of 64 bits
_LARGEST_SIDE = 2**31 - 1
_LONGEST_NAME = 32  # characters of a category in a line for people


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """Images of a COCO JSON with their annotations. Rows of image i are offsets[i]:offsets[i + 1]."""

    file: str
    images: Sequence[str]
    rows: LabelRows  # as the file says, in px; image_of is left at 0
    offsets: np.ndarray  # (n + 1,) i64
    image_ids: np.ndarray  # (n,) i64
    declared: np.ndarray  # (n, 2) i32 height and width
    bad_rows: tuple[tuple[int, str], ...]  # image and problem of annotations that could not be read, by image
    category_ids: Sequence[int] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def label_files(self) -> Sequence[str]:
        return (self.file,)

    def part(self, start: int, stop: int) -> CocoSource:
        first, last = self.offsets[start], self.offsets[min(stop, len(self.images))]
        bad = slice(*(bisect_left(self.bad_rows, (image,)) for image in (start, stop)))
        return replace(
            self,
            images=self.images[start:stop],
            rows=rows_between(self.rows, first, last),
            offsets=self.offsets[start : stop + 1] - first,
            image_ids=self.image_ids[start:stop],
            declared=self.declared[start:stop],
            bad_rows=tuple((image - start, problem) for image, problem in self.bad_rows[bad]),
            findings=(),
        )

    def chosen(self, keep: np.ndarray) -> CocoSource:
        images, counts = np.flatnonzero(keep), np.diff(self.offsets)
        place = np.cumsum(keep) - 1  # of each image among those kept
        return replace(
            self,
            images=[self.images[image] for image in images.tolist()],
            rows=taken(self.rows, np.flatnonzero(np.repeat(keep, counts))),
            offsets=offsets_of(counts[images]),
            image_ids=self.image_ids[images],
            declared=self.declared[images],
            bad_rows=tuple((int(place[image]), problem) for image, problem in self.bad_rows if keep[image]),
        )

    def label_file(self, image: int) -> str:
        return self.file

    def read(self, names: Sequence[str]) -> FileLabels:
        bad = [Finding(file=shown_path(self.images[image]), line=0, problem=text) for image, text in self.bad_rows]
        return FileLabels(
            rows=replace(self.rows, image_of=np.repeat(np.arange(len(self.images)), np.diff(self.offsets))),
            relative=False,
            lines=np.zeros(len(self.rows.classes), np.int64),
            image_ids=self.image_ids,
            declared=self.declared,
            findings=tuple(bad),
        )


def open_coco(path: Path, names: Sequence[str], find: Callable[[str], str]) -> CocoSource:
    """A COCO JSON, with images where `find(file_name)` says. Raises UserError, naming what is missing or wrong."""
    file = _File(path)
    images, twice = _images(file)
    classes, category_ids = _classes(file, names)
    listed = {item["id"]: place for place, item in enumerate(images)}
    packed = _pack(file, listed, classes, len(images))
    source = CocoSource(
        file=str(path),
        images=[find(item["file_name"]) for item in images],
        rows=packed.rows,
        offsets=packed.offsets,
        image_ids=np.array([_whole(item["id"]) for item in images], np.int64),
        declared=np.array([[_side(item, side) for side in ("height", "width")] for item in images], np.int32),
        bad_rows=tuple(sorted(packed.bad_rows, key=lambda pair: pair[0])),
        category_ids=category_ids,
        notes=(*_unused(file, names), *_of_one_name(file, names)),
    )
    findings = [Finding(file=shown_path(find(name)), line=0, problem=SAME_IMAGE) for name in twice]
    stray = [Finding(file=shown_path(path), line=0, problem=NO_IMAGE)] * packed.stray
    return replace(source, declared=source.declared.reshape(-1, 2), findings=(*findings, *stray))


class _File:
    """A parsed JSON with the three lists that make it COCO."""

    def __init__(self, path: Path) -> None:
        self.shown = shown_path(path)
        content = read_json(path)
        if not isinstance(content, dict):
            self.refuse(
                f"should be a COCO file, with 'images', 'annotations' and 'categories', got {json_kind(content)}"
            )
        self.images = self._list(content, "images")
        self.annotations = self._list(content, "annotations")
        self.categories = self._list(content, "categories")

    def refuse(self, problem: str) -> None:
        raise UserError(f"{self.shown}: {problem}")

    def _list(self, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
        if key not in content:
            self.refuse(f"'{key}' is missing; a COCO file has 'images', 'annotations' and 'categories'")
        items = content[key]
        if not isinstance(items, list):
            self.refuse(f"'{key}' should be a list, got {json_kind(items)}")
        for place, item in enumerate(items):
            if type(item) is not dict:
                self.refuse(f"{key}[{place}] should be a mapping, got {json_kind(item)}")
        return items

    def require(self, key: str, place: int, item: dict[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
        """A field that an entry of the list `key` must have."""
        if name not in item:
            self.refuse(f"{key}[{place}] has no '{name}'")
        if type(item[name]) not in kinds:
            words = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
            self.refuse(f"{key}[{place}]: '{name}' should be {words}, got {json_kind(item[name])}")
        return item[name]


_WORDS = {int: "a number", str: "a string", dict: "a mapping", list: "a list"}
_ID = (int, str, float)  # 1.0 is 1, as tables write it


def _images(file: _File) -> tuple[list[dict[str, Any]], list[str]]:
    """The images, each id once, and the names of those that were there twice."""
    by_id: dict[float | str, dict[str, Any]] = {}
    twice = []
    for place, item in enumerate(file.images):
        number = file.require("images", place, item, "id", _ID)
        name = file.require("images", place, item, "file_name", (str,))
        if not _is_file_name(name):
            file.refuse(f"images[{place}]: 'file_name' {name!a} is no name of a file")
        if number not in by_id:
            by_id[number] = item
        elif by_id[number]["file_name"] == name:
            twice.append(name)
        else:
            file.refuse(f"images[{place}]: id {number!r} is that of {by_id[number]['file_name']!r} as well")
    return list(by_id.values()), twice


def _is_file_name(name: str) -> bool:
    try:
        shown_path(name)
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return bool(name.strip()) and "\0" not in name


def _classes(file: _File, names: Sequence[str]) -> tuple[dict[float | str, int], list[int]]:
    """Category id -> class, for the categories that are used; and the category id of each class, -1 for none."""
    used = {
        file.require("annotations", place, item, "category_id", _ID): place
        for place, item in reversed(list(enumerate(file.annotations)))
    }
    numbers = class_numbers(names)
    classes, category_ids, known = {}, [-1] * len(names), set()
    for place, item in enumerate(file.categories):
        number = file.require("categories", place, item, "id", _ID)
        name = str(file.require("categories", place, item, "name", (str, int))).strip()
        if number in known:
            file.refuse(f"categories[{place}]: id {number!r} is taken")
        known.add(number)
        if name not in numbers and number in used:
            file.refuse(f"category '{name}' has boxes and is not in names{nearest_name(name, numbers)}")
        if name in numbers:
            classes[number] = numbers[name]
            if category_ids[numbers[name]] == -1:
                category_ids[numbers[name]] = _whole(number)
    for number, place in sorted(used.items(), key=lambda pair: pair[1]):
        if number not in known:
            file.refuse(f"annotations[{place}]: category_id {number!r} is not in 'categories'")
    return classes, category_ids


def _of_one_name(file: _File, names: Sequence[str]) -> list[str]:
    """Lines for people on the categories that are one class."""
    ids: dict[str, list[float | str]] = {}
    for item in file.categories:
        ids.setdefault(str(item["name"]).strip(), []).append(item["id"])
    return [
        f"{file.shown}: categories {', '.join(map(repr, ids[name]))} are all called '{name}': taken as one class"
        for name in class_numbers(names)
        if len(ids.get(name, ())) > 1
    ]


def _unused(file: _File, names: Sequence[str], *, most: int = 5) -> tuple[str, ...]:
    """A line for people on the categories that `names` lacks, which have no boxes."""
    numbers = class_numbers(names)
    found = [name for item in file.categories if (name := str(item["name"]).strip()) not in numbers]
    shown = [" ".join(name.split())[:_LONGEST_NAME] for name in found[:most]]
    more = f", and {len(found) - most} more" if len(found) > most else ""
    line = f"{file.shown}: categories without boxes, which names lacks: {', '.join(shown)}{more}"
    return (line,) if found else ()


def _whole(number: float | str) -> int:
    """An id as a number of 64 bits, -1 where it is none."""
    return int(number) if not isinstance(number, str) and 0 <= number <= _LARGEST_ID and number % 1 == 0 else -1


def _side(item: dict[str, Any], side: str) -> int:
    """A declared side in px, 0 where there is none, -1 where it is nonsense."""
    value = item.get(side)
    if value is None:
        return 0
    if type(value) not in (int, float) or not 0 <= value <= _LARGEST_SIDE or value != int(value):
        return -1
    return int(value)


@dataclass
class _Packed:
    """Annotations as flat lists, in the order of the file; `finish` puts them in that of the images."""

    images: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    annotated: list[Sequence[float]] = field(default_factory=list)  # xywh
    area: list[float] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    ring_counts: list[int] = field(default_factory=list)
    point_counts: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # x and y of all points
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    stray: int = 0
    rows: LabelRows | None = None
    offsets: np.ndarray | None = None

    def finish(self, num_images: int) -> None:
        images = np.array(self.images, np.int64)
        annotated = np.array(self.annotated, np.float64).reshape(-1, 4)
        with np.errstate(over="ignore"):  # 1e308 is finite
            boxes = np.concatenate([annotated[:, :2], annotated[:, :2] + annotated[:, 2:]], 1)
        rows = replace(
            box_rows(np.zeros(len(images)), self.classes, boxes),
            ignore=np.array(self.crowd, np.uint8) * np.uint8(CROWD),
            area=np.array(self.area, np.float64),
            annotated=annotated,
            ring_offsets=offsets_of(self.ring_counts),
            point_offsets=offsets_of(self.point_counts),
            points=np.array(self.values, np.float64).reshape(-1, 2),
        )
        self.rows = taken(rows, np.argsort(images, kind="stable"))
        self.offsets = offsets_of(np.bincount(images, minlength=num_images))


def _pack(file: _File, listed: dict, classes: dict, num_images: int) -> _Packed:
    packed = _Packed()
    for place, item in enumerate(file.annotations):
        image = listed.get(file.require("annotations", place, item, "image_id", _ID))
        if image is None:
            packed.stray += 1
            continue
        rings = _rings(item.get("segmentation"))
        box, problem = _box(item.get("bbox"), rings)
        if problem and not (problem == NO_BOX and "keypoints" in item):
            packed.bad_rows.append((image, problem))
        if box is None:
            continue
        packed.images.append(image)
        packed.classes.append(classes[item["category_id"]])
        packed.annotated.append(box)
        packed.area.append(_area(item.get("area")))
        packed.crowd.append(item.get("iscrowd") in (1, True))
        packed.ring_counts.append(len(rings))
        for ring in rings:
            packed.point_counts.append(len(ring) // 2)
            packed.values += ring
    packed.finish(num_images)
    return packed


def _box(value: Any, rings: list[list[float]]) -> tuple[Sequence[float] | None, str]:
    """xywh and no problem, or None and a problem."""
    if value is None or value == []:
        if not rings:
            return None, NO_BOX
        xs, ys = ([value for ring in rings for value in ring[axis::2]] for axis in (0, 1))
        return (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), ""
    if type(value) is not list or len(value) != 4:
        return None, BAD_BOX
    numbers = _numbers(value)
    if numbers is None:
        return None, NOT_A_NUMBER
    if not all(map(math.isfinite, numbers)):
        return None, NOT_FINITE
    return numbers, ""


def _numbers(values: list) -> list[float] | None:
    for value in values:
        if type(value) is not float and type(value) is not int:
            return None
    try:
        return list(map(float, values))
    except OverflowError:
        return [math.inf]


def _rings(segmentation: Any) -> list[list[float]]:
    """Polygons of three points or more, as x, y, x, y, ...; run lengths are no polygons."""
    if type(segmentation) is not list:
        return []
    if segmentation and type(segmentation[0]) is not list:
        segmentation = [segmentation]  # one polygon without its brackets
    rings = []
    for ring in segmentation:
        numbers = _numbers(ring) if type(ring) is list and len(ring) >= 6 and len(ring) % 2 == 0 else None
        if numbers and all(map(math.isfinite, numbers)):
            rings.append(numbers)
    return rings


def _area(value: Any) -> float:
    """px^2, NaN where there is no sensible number."""
    numbers = _numbers([value])
    return numbers[0] if numbers and 0 <= numbers[0] < math.inf else math.nan
