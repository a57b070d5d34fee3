"""TO BE REMOVED when scan.py uses sources.py: which images a split has, and what their YOLO text labels say.

A row `class cx cy w h` or `class x1 y1 ... xn yn` (a polygon) is in fractions of the image, parsed in float64.
A bad row costs that box, never the image; only a class beyond `names` is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from utils.data.images import IMAGE_SUFFIXES
from utils.data.store import ImageLabels as _ImageLabels
from utils.structures import DatasetSpec, UserError

OUTSIDE = "outside the image: dropped"

_EDGE_TOLERANCE = 1e-4  # of the image: rounding in label files, not worth a finding


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One defect of a data set. `line` is 0 where it concerns the whole file."""

    file: str  # for people: from `shown_path`
    line: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class ImageLabels(_ImageLabels):
    findings: tuple[Finding, ...] = ()


def shown_path(path: Path) -> str:
    """A path as text that any terminal and file takes: names on Linux are bytes, and need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def list_images(spec: DatasetSpec, split: str) -> list[Path]:
    """The image files of a split, in a stable order. Raises UserError: where it looked, and what it expected."""
    sources = spec.train if split == "val" and spec.val_fraction else getattr(spec, split)
    if not sources:
        raise UserError(f"{spec.source}: it has no '{split}' split")
    images = [image for source in sources for image in _images_of(source, spec, split)]
    if not images:
        looked = ", ".join(str(source) for source in sources)
        raise UserError(f"{spec.source}: no image found for '{split}' in {looked}; expected files such as .jpg or .png")
    if not spec.val_fraction or split == "test":
        return images
    share = [image for image in images if (_name_fraction(image) < spec.val_fraction) == (split == "val")]
    if not share:
        raise UserError(f"{spec.source}: 'val: {spec.val_fraction}' leaves '{split}' none of the {len(images)} images")
    return share


def _images_of(source: Path, spec: DatasetSpec, split: str) -> list[Path]:
    if source.is_dir():
        return [Path(folder) / name for folder, names in _walk(source) for name in names if _is_image(name)]
    if source.suffix == ".txt" and source.is_file():
        return _listed_images(source, spec.root)
    if source.suffix in (".json", ".xml"):
        raise UserError(f"{spec.source}: '{split}': {source.name}: only YOLO text labels can be read yet")
    problem = "cannot be used" if source.exists() else "not found"
    raise UserError(
        f"{spec.source}: '{split}': {source} {problem}; expected a folder of images or a .txt list of images"
    )


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # .ipynb_checkpoints holds copies
        yield where, sorted(names)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (hot)


def _listed_images(source: Path, root: Path) -> list[Path]:
    try:
        entries = [line.strip() for line in _text_lines(source) if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{source}: cannot be read as a list of images, one path per line") from None
    # lists in the wild are relative to themselves or to the root of the data set
    bases = [root, source.parent]
    base = next((base for base in bases if any((base / entry).exists() for entry in entries)), root)
    return [base / entry for entry in entries]


def _text_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows put a byte order mark first


def _name_fraction(image: Path) -> float:
    """A number in [0, 1) that depends on the file name alone, so that a split survives added images and moves."""
    return int.from_bytes(blake2b(os.fsencode(image.name), digest_size=8).digest(), "big") / 2**64


def label_path(image: Path) -> Path:
    """`a/images/b/x.jpg` -> `a/labels/b/x.txt`; without a folder `images`, the .txt beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts)


def read_labels(path: Path, names: Sequence[str]) -> ImageLabels:
    """The boxes of a label file; no file or an empty one is a background image.

    Raises UserError, naming file and line, for a class that is not in `names`.
    """
    try:
        lines = _text_lines(path)
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError):
        return _packed(
            [], [Finding(file=shown_path(path), line=0, problem="label file unreadable: taken as background")]
        )
    rows, findings, seen = [], [], set()
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        row, problem = _parse_row(fields, names, where=f"{path}:{number}")
        if row in seen:
            row, problem = None, "duplicate row: dropped"
        if problem:
            findings.append(Finding(file=shown_path(path), line=number, problem=problem))
        if row is not None:
            rows.append(row)
            seen.add(row)
    return _packed(rows, findings)


def _packed(rows: list[tuple[float, ...]], findings: list[Finding]) -> ImageLabels:
    table = np.array(rows, np.float64).reshape(-1, 5)
    return ImageLabels(boxes=table[:, 1:], classes=table[:, 0].astype(np.int64), findings=tuple(findings))


def _parse_row(fields: list[str], names: Sequence[str], *, where: str) -> tuple[tuple[float, ...] | None, str]:
    """(class, x1, y1, x2, y2) or None, and the problem or an empty string."""
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        return None, f"{len(fields)} values, expected 5 (class cx cy w h) or a polygon: dropped"
    try:
        values = [float(field) for field in fields]
    except ValueError:
        return None, "not a number: dropped"
    if not np.isfinite(values).all():
        return None, "not a finite number: dropped"
    label, coordinates = values[0], values[1:]
    if label != int(label) or not 0 <= label < len(names):
        raise UserError(
            f"{where}: class {fields[0]} does not exist; names has classes 0 to {len(names) - 1}, counted from 0"
        )
    x1, y1, x2, y2 = _corners(coordinates)
    if x2 < x1 or y2 < y1:
        return None, "negative width or height: dropped"
    inside = tuple(min(max(value, 0.0), 1.0) for value in (x1, y1, x2, y2))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return None, "zero area: dropped" if x2 <= x1 or y2 <= y1 else OUTSIDE
    clipped = max(-x1, -y1, x2 - 1, y2 - 1) > _EDGE_TOLERANCE
    return (label, *inside), "reaches outside the image: clipped" if clipped else ""


def _corners(coordinates: list[float]) -> tuple[float, float, float, float]:
    if len(coordinates) == 4:
        cx, cy, width, height = coordinates
        return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    xs, ys = coordinates[0::2], coordinates[1::2]
    return min(xs), min(ys), max(xs), max(ys)
