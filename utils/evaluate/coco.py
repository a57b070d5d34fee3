"""COCO's figures of a results file, without COCO's tool: `python -m utils.evaluate.coco ANNOTATIONS RESULTS`.

Results are what `val.py --save-json` writes, or any other detector. Annotations count as they stand in the file, images
need not be there.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from utils.config import FlagParser, run_command
from utils.evaluate.figures import coco_figures
from utils.evaluate.matching import DetectionTable, LabelTable
from utils.files import json_kind, read_json
from utils.report.console import Console
from utils.structures import CocoFigures, UserError

_PROGRAM = "python -m utils.evaluate.coco"
_LINES = (  # in the order of CocoFigures: what, IoU, area, detections per image and class
    *(("Average precision", iou, "all", 100) for iou in (".50:.95", ".50", ".75")),
    *(("Average precision", ".50:.95", area, 100) for area in ("small", "medium", "large")),
    *(("Average recall", ".50:.95", "all", most) for most in (1, 10, 100)),
    *(("Average recall", ".50:.95", area, 100) for area in ("small", "medium", "large")),
)

_Places = dict[int | float | str, int]
_LONGEST = 60  # characters of a wrong value in a line for people


@dataclass(frozen=True, kw_only=True)
class CocoOptions:
    """The average precision and recall of detections, by COCO's rules."""

    annotations: Path
    results: Path


@dataclass(frozen=True, kw_only=True)
class CocoCase:
    """Annotations and results as tables; images and classes are places among the sorted ids."""

    images: int
    classes: int
    truth: LabelTable
    found: DetectionTable
    strays: int  # annotations of images or categories that the file does not list: left out, as the tool does


def main() -> int:
    return run_command(_PROGRAM, lambda: report(_parsed(sys.argv[1:])))


def _parsed(argv: Sequence[str]) -> CocoOptions:
    parser = FlagParser(prog=_PROGRAM, description=CocoOptions.__doc__, allow_abbrev=False)
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO file: images, annotations, ...")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="list of image_id, category_id, bbox and score")
    return CocoOptions(**vars(parser.parse_args(argv)))


@np.errstate(over="ignore", invalid="ignore")  # 1e308 is finite, and its square is not
def report(options: CocoOptions) -> CocoFigures:
    """Show the figures. Raises UserError for what a user can mend."""
    case = read_case(options)
    figures = coco_figures(case.found, case.truth, case.classes)
    console = Console(quiet=True)
    console.line(
        f"{case.images:,} images, {case.classes:,} categories, {len(case.truth):,} annotations, "
        f"{len(case.found):,} detections"
    )
    if case.strays:
        console.note(f"{options.annotations}: {case.strays:,} annotations are of no image or category that it lists")
    for (what, iou, area, most), value in zip(_LINES, vars(figures).values()):
        shown = "-" if value is None else f"{value:.4f}"
        console.line(f"{what:17}  IoU {iou:7}  area {area:6}  detections {most:3}  {shown:>6}")
    return figures


def read_case(options: CocoOptions) -> CocoCase:
    """Both files. Raises UserError, naming file, entry and key."""
    with _without_collector():
        return _read_case(options)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Half a million entries that all stay: looking for cycles among them again and again is half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_case(options: CocoOptions) -> CocoCase:
    content = read_json(options.annotations)
    if not isinstance(content, dict):
        hint = "; are the two files swapped?" if isinstance(content, list) else ""
        raise UserError(
            f"{options.annotations}: should be a COCO file, which is a mapping, got {json_kind(content)}{hint}"
        )
    images, categories, annotations = (
        _Rows(file=options.annotations, name=name, entries=_list(options.annotations, content, name))
        for name in ("images", "categories", "annotations")
    )
    results = read_json(options.results)
    if not isinstance(results, list):
        raise UserError(f"{options.results}: should be a list, as --save-json writes it, got {json_kind(results)}")
    image_places, class_places = images.places(), categories.places()
    found = _detections(options, results, image_places, class_places)
    truth, listed = _labels(annotations, image_places, class_places)
    return CocoCase(
        images=len(image_places),
        classes=len(class_places),
        truth=truth,
        found=found,
        strays=len(listed) - int(listed.sum()),
    )


def _labels(rows: _Rows, image_places: _Places, class_places: _Places) -> tuple[LabelTable, np.ndarray]:
    """The labels, and which annotations (n,) they are: those of images and categories that are listed."""
    image, classes = rows.ids("image_id", image_places), rows.ids("category_id", class_places)
    listed = (image >= 0) & (classes >= 0)
    # The tool goes by `iscrowd`, too, and overwrites `ignore` with it. It takes annotation 0 for "no match": we do not.
    crowd = np.array([bool(entry.get("iscrowd")) for entry in rows.entries], bool)[listed]
    xywh = rows.boxes()
    table = LabelTable(
        image=image[listed],
        xywh=xywh[listed],
        classes=classes[listed],
        area=rows.areas(xywh)[listed],
        ignore=crowd,
        crowd=crowd,
    )
    return table, listed


def _detections(
    options: CocoOptions, results: list[Any], image_places: _Places, class_places: _Places
) -> DetectionTable:
    rows = _Rows(file=options.results, name="", entries=results)
    image, classes = rows.ids("image_id", image_places), rows.ids("category_id", class_places)
    for key, places in (("image_id", image), ("category_id", classes)):
        unknown = np.flatnonzero(places < 0)
        if len(unknown):
            raise UserError(
                f"{options.results}: [{unknown[0]}]: {options.annotations} has no {key} "
                f"{json.dumps(results[unknown[0]][key])}; {len(unknown):,} of {len(results):,} detections "
                "have one that it lacks"
            )
    return DetectionTable(image=image, xywh=rows.boxes(), scores=rows.numbers("score"), classes=classes)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A list of a JSON file, read column by column; only a column that is not sound is looked at entry by entry."""

    file: Path
    name: str  # of the list, empty where it is all of the file
    entries: Sequence[Any]

    def places(self) -> _Places:
        """The place of each `id` among all of them, sorted as the tool sorts them."""
        self._check("id", _is_id, "a number or a string")
        ids = {entry["id"] for entry in self.entries}
        if len({isinstance(number, str) for number in ids}) > 1:
            raise UserError(f"{self.file}: {self.name}: ids should be all numbers or all strings, and are mixed")
        return {number: place for place, number in enumerate(sorted(ids))}

    def ids(self, key: str, places: _Places) -> np.ndarray:
        """(n,) the place of each id, -1 where it has none."""
        try:
            return np.array([places.get(entry[key], -1) for entry in self.entries], np.int64)
        except (KeyError, TypeError):
            self._check(key, _is_id, "a number or a string")
            raise

    def boxes(self) -> np.ndarray:
        """(n, 4) f64."""
        return self._floats("bbox", _is_box, "[x, y, width, height]", (4,))

    def numbers(self, key: str) -> np.ndarray:
        """(n,) f64."""
        return self._floats(key, _is_number, "a number", ())

    def areas(self, xywh: np.ndarray) -> np.ndarray:
        """(n,) f64 px^2; that of the box where there is none."""
        given = [entry.get("area") for entry in self.entries]
        for place, value in enumerate(given):
            if value is not None and not _is_number(value):
                self._refuse(place, "area", "a number")
        of_box = (xywh[:, 2] * xywh[:, 3]).tolist()
        return np.array([box if area is None else area for area, box in zip(given, of_box)], np.float64)

    def _floats(self, key: str, is_sound: Callable[[Any], bool], should_be: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            values = np.array([entry[key] for entry in self.entries])
            sound = values.dtype.kind in "iuf" and values.shape[1:] == shape and bool(np.isfinite(values).all())
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            self._check(key, is_sound, should_be)
            values = np.array([entry[key] for entry in self.entries], np.float64).reshape(-1, *shape)
        return values.astype(np.float64)

    def _check(self, key: str, is_sound: Callable[[Any], bool], should_be: str) -> None:
        """Entry by entry. Raises UserError, naming the first that is not sound."""
        for place, entry in enumerate(self.entries):
            if not isinstance(entry, dict):
                raise UserError(f"{self.file}: {self.name}[{place}] should be a mapping, got {json_kind(entry)}")
            if key not in entry:
                raise UserError(f"{self.file}: {self.name}[{place}] has no '{key}'")
            if not is_sound(entry[key]):
                self._refuse(place, key, should_be)

    def _refuse(self, place: int, key: str, should_be: str) -> NoReturn:
        shown = json.dumps(self.entries[place][key])[:_LONGEST]
        raise UserError(f"{self.file}: {self.name}[{place}]: '{key}' should be {should_be}, got {shown}")


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither NaN nor infinite


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _list(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(content.get(key), list):
        problem = f"should be a list, got {json_kind(content[key])}" if key in content else "is missing"
        raise UserError(f"{file}: '{key}' {problem}; a COCO file has 'images', 'annotations' and 'categories'")
    return content[key]


if __name__ == "__main__":
    sys.exit(main())
