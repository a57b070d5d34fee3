"""Pascal VOC: an XML file for each image, boxes in pixels that count from 1 and include their last one.

The surprise: expat is driven by hand. That gives line numbers, and stops at a DOCTYPE, before any entity can be
declared that would unfold to gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from xml.parsers import expat

import numpy as np

from utils.data.labels import (
    NOT_A_NUMBER,
    NOT_FINITE,
    UNREADABLE,
    FileLabels,
    Finding,
    box_rows,
    class_numbers,
    shown_path,
)
from utils.files import nearest_name
from utils.structures import DIFFICULT, UserError

BROKEN = "not valid XML: taken as background"
DOCTYPE = "XML with a DOCTYPE, which is not read: taken as background"
NO_ANNOTATION = "not a VOC annotation: taken as background"
NO_NAME = "object without a name: dropped"
NO_BOX = "object without xmin, ymin, xmax and ymax: dropped"

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class VocSource:
    """Images with an XML file each."""

    images: Sequence[str]
    label_files: Sequence[str]  # a file that does not exist is that of a background image
    findings: tuple[Finding, ...] = ()
    category_ids: Sequence[int] = ()
    notes: tuple[str, ...] = ()

    def part(self, start: int, stop: int) -> VocSource:
        images, files = self.images[start:stop], self.label_files[start:stop]
        return replace(self, images=images, label_files=files, findings=())

    def chosen(self, keep: np.ndarray) -> VocSource:
        images, files = (list(compress(paths, keep.tolist())) for paths in (self.images, self.label_files))
        return replace(self, images=images, label_files=files)

    def label_file(self, image: int) -> str:
        return self.label_files[image]

    def read(self, names: Sequence[str]) -> FileLabels:
        parsed, numbers = _Parsed(), class_numbers(names)
        for image, path in enumerate(self.label_files):
            annotation = _annotation(path, parsed)
            parsed.declared.append(annotation.declared())
            for item in annotation.objects:
                parsed.add(image, path, item, numbers)
        return parsed.labels()


@dataclass
class _Object:
    """An `object` element: the texts of what stands right below it and below its `bndbox`."""

    line: int
    texts: dict[str, str] = field(default_factory=dict)
    box: dict[str, str] = field(default_factory=dict)


class _Annotation:
    """What an XML file says, gathered as expat walks through it."""

    def __init__(self) -> None:
        self.objects: list[_Object] = []
        self.size: dict[str, str] = {}
        self._open: list[str] = []  # elements from the root down to where expat stands
        self._text: list[str] = []

    def parse(self, data: bytes) -> None:
        """Raises ValueError and expat.ExpatError."""
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = lambda name, attributes: self._start(name, parser.CurrentLineNumber)
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        parser.StartDoctypeDeclHandler = _refuse_doctype
        parser.Parse(data, True)

    def _start(self, name: str, line: int) -> None:
        if not self._open and name != "annotation":
            raise _Refused(NO_ANNOTATION)
        self._open.append(name)
        self._text.clear()
        if len(self._open) == 2 and name == "object":
            self.objects.append(_Object(line=line))

    def _end(self, name: str) -> None:
        depth, text = len(self._open), "".join(self._text).strip()
        parent = self._open[1] if depth > 2 else ""
        if depth == 3 and parent == "object":
            self.objects[-1].texts.setdefault(name, text)
        elif depth == 4 and parent == "object" and self._open[2] == "bndbox":
            self.objects[-1].box.setdefault(name, text)
        elif depth == 3 and parent == "size":
            self.size[name] = text
        self._open.pop()
        self._text.clear()

    def declared(self) -> tuple[int, int]:
        return _side(self.size.get("height", "")), _side(self.size.get("width", ""))


class _Refused(ValueError):
    """An XML file that is no annotation to read; the message is the finding."""


def _refuse_doctype(*declaration: object) -> None:
    raise _Refused(DOCTYPE)


def _side(text: str) -> int:
    """A side in px, 0 where there is none, -1 where it is nonsense."""
    if not text:
        return 0
    if not _NUMBER.fullmatch(text):
        return -1
    number = float(text)
    return int(number) if 0 <= number <= _LARGEST_SIDE and number == int(number) else -1


def _annotation(path: str, parsed: _Parsed) -> _Annotation:
    """What a file says; nothing, and a finding, where it cannot be read."""
    annotation, problem = _Annotation(), ""
    try:
        annotation.parse(Path(path).read_bytes())
    except FileNotFoundError:
        pass
    except OSError:
        problem = UNREADABLE
    except _Refused as refused:
        problem = str(refused)
    except (expat.ExpatError, ValueError, LookupError):  # the last two: of encodings
        problem = BROKEN
    if not problem:
        return annotation
    parsed.findings.append(Finding(file=shown_path(path), line=0, problem=problem))
    return _Annotation()


@dataclass
class _Parsed:
    """Rows as they come."""

    images: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    declared: list[tuple[int, int]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, image: int, path: str, item: _Object, numbers: dict[str, int]) -> None:
        name = item.texts.get("name", "")
        if name and name not in numbers:
            where = f"{shown_path(path)}:{item.line}"
            raise UserError(f"{where}: class '{name}' is not in names{nearest_name(name, numbers)}")
        sides = [item.box.get(side, "") for side in _SIDES]
        problem = NO_BOX if "" in sides else _problem_of(sides)
        if problem or not name:
            problem = problem if name else NO_NAME
            self.findings.append(Finding(file=shown_path(path), line=item.line, problem=problem))
            return
        x1, y1, x2, y2 = map(float, sides)
        self.images.append(image)
        self.classes.append(numbers[name])
        self.boxes.append((x1 - 1, y1 - 1, x2, y2))
        self.difficult.append(item.texts.get("difficult", "").lower() in ("1", "true"))
        self.lines.append(item.line)

    def labels(self) -> FileLabels:
        ignore = np.array(self.difficult, np.uint8) * np.uint8(DIFFICULT)
        return FileLabels(
            rows=replace(box_rows(self.images, self.classes, self.boxes), ignore=ignore),
            relative=False,
            lines=np.array(self.lines, np.int64),
            image_ids=np.full(len(self.declared), -1),
            declared=np.array(self.declared, np.int32).reshape(-1, 2),
            findings=tuple(self.findings),
        )


def _problem_of(sides: Sequence[str]) -> str:
    if not all(map(_NUMBER.fullmatch, sides)):
        no_number = not all(_NUMBER.fullmatch(side) or side.lower().lstrip("+-") in ("nan", "inf") for side in sides)
        return NOT_A_NUMBER if no_number else NOT_FINITE
    return "" if np.isfinite([float(side) for side in sides]).all() else NOT_FINITE


def image_name(path: str) -> str | None:
    """What a VOC XML calls its image, for one that does not bear its name; None where it says nothing."""
    try:
        found = re.search(rb"<filename>\s*([^<]*?)\s*</filename>", Path(path).read_bytes())
    except (OSError, ValueError):
        return None
    name = found[1].decode("utf-8", "replace") if found else ""
    return name or None
