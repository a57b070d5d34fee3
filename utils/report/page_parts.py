"""What the pages of runs are made of: figures as they are shown and in full, tables, pictures, curves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.report.console import format_duration
from utils.report.embedded import EmbeddedPicture, embedded
from utils.report.run_files import RunFiles, number_of
from utils.report.settings import DASH

_PICTURE_BYTES = 1_950_000  # of all together, so that a page stays below 3 MB
_LEAST_PICTURE_BYTES = 40_000  # of each, however many there are
PICTURES = {  # file: title, and what it shows
    "val_batch0_labels.jpg": ("Labels", "The first images of the validation split, as they are labelled."),
    "val_batch0_pred.jpg": ("Predictions", "The same images: what the network finds, with scores."),
    "worst_images.jpg": ("Worst misses", "The images with most mistakes: what was missed, and false alarms."),
    "confusion_matrix.png": ("Confusion matrix", "Which class was taken for which, and what was missed."),
    "PR_curve.png": ("Precision over recall", "At IoU .5, for each class and their mean."),
    "F1_curve.png": ("F1 over confidence", "Its peak is the confidence that suits precision and recall alike."),
    "labels.jpg": ("Labels of the training split", "Counts by class, shapes, places and sizes of boxes."),
    "train_batch0.jpg": ("A training batch", "As the network saw it, augmented."),
}
OF_DATA = ("labels.jpg", "train_batch0.jpg")  # among these; the others are of an evaluation
LOSS_UNIT = "mean over batches, times its gain"
SPEED_UNIT = "training images per second"
SHARE_UNIT = "a share, 0 to 1, on validation images"


@dataclass(frozen=True)
class Cell:
    """A figure: rounded as it is shown, and in full as its file has it."""

    shown: str = DASH
    full: str = ""
    bar: float | None = None  # percent
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]
    colour: str = ""


@dataclass(frozen=True)
class Grid:
    """A table that can be sorted."""

    what: str  # a row is one of these
    columns: Mapping[str, str]  # titles by key
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Figure:
    """A headline figure, and where it is found."""

    title: str
    cell: Cell
    file: str
    key: str
    epoch: int | None = None  # of results.csv


@dataclass(frozen=True)
class Status:
    kind: str  # done, busy or stopped
    word: str
    sentence: str


@dataclass(frozen=True)
class Picture:
    file: str
    title: str
    caption: str
    image: EmbeddedPicture | None  # None: damaged


@dataclass(frozen=True)
class Part:
    """Of the time of a run."""

    key: str
    name: str
    seconds: float
    percent: float
    start: float  # percent, in a bar


@dataclass(frozen=True)
class Command:
    title: str
    text: str


# --------------------------------------------------------------------------------------------------- texts and figures


def text_of(path: Path | str) -> str:
    """A path as text, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "replace")


def cell_of(value: Any, shown: Callable[[float], str] = "{:.3f}".format) -> Cell:
    """Of a value of a JSON file."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return csv_cell(str(value), shown) if is_number else Cell()


def csv_cell(cell: str, shown: Callable[[float], str] = "{:.3f}".format) -> Cell:
    number = number_of(cell)
    return Cell(shown(number), cell) if math.isfinite(number) else Cell(cell or DASH, cell)


def percent(share: float) -> float:
    return round(100 * min(max(0.0, share), 1.0), 1)  # of NaN 0


def hex_colour(colour: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * share):02x}" for share in colour)


def shown_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


# ------------------------------------------------------------------------------------------------- pictures and curves


def pictures_of(runs: Sequence[RunFiles], files: Sequence[str]) -> list[dict[str, Picture]]:
    """Those that are there, by file, for each run."""
    sizes = [path.stat().st_size for run in runs for path in map(run.folder.joinpath, files) if path.is_file()]
    most_bytes = max(_fair_share(sizes, _PICTURE_BYTES), _LEAST_PICTURE_BYTES)
    return [
        {
            file: Picture(file, *PICTURES[file], embedded(run.folder / file, most_bytes=most_bytes))
            for file in files
            if (run.folder / file).is_file()
        }
        for run in runs
    ]


def _fair_share(sizes: Sequence[int], total: int) -> int:
    """The most that each may have of `total`, when what the small ones leave goes to the large ones."""
    for place, size in enumerate(sorted(sizes)):
        share = total // (len(sizes) - place)
        if size > share:
            return share
        total -= size
    return max(sizes, default=0)


def chart_data(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """What a reader may point at, by run: epochs, and cells by column."""
    return [
        {
            "best": None if run.best_row is None else run.results.epochs[run.best_row],
            "tables": {
                name: {"epochs": table.epochs, "columns": {column: table.cells(column) for column in table.columns}}
                for name, table in (("results", run.results), ("timing", run.timing))
            },
        }
        for run in runs
    ]
