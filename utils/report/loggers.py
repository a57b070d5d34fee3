"""What writes a run's progress: CSV tables, TensorBoard events, and the terminal.

The surprise: an epoch is one and the same line on a terminal and in a log file; the bar above it lives only meanwhile.
"""

from __future__ import annotations

import csv
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from tqdm import tqdm

from utils.clock import PARTS
from utils.data.findings import shortened
from utils.files import printable, write_text
from utils.structures import BadUpdate, CocoFigures, LabelStore, LossMeans, Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RESULT_COLUMNS = (
    "epoch",
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
    "train/skipped",  # updates, as loss or gradient was not finite
)
NONFINITE_COLUMNS = ("epoch", "batch", "what", "images")
TIMING_COLUMNS = ("epoch", "images_per_s", "epoch_s", *(f"{part}_s" for part in PARTS))

_EVENTS_BYTES = 2**16  # more than the events of an epoch take
_LONGEST_CELL = 2**31 - 1  # csv's own limit is less than the paths of a large batch can take

Row = Mapping[str, float]  # by column; a column may be missing, and `epoch` counts from 1 as people do
Note = Callable[[str], object]


def result_row(
    epoch: int, losses: LossMeans, metrics: Metrics | None, learning_rates: Iterable[float], *, skipped: int = 0
) -> dict[str, float]:
    """One epoch by RESULT_COLUMNS; `epoch` counts from 0, its cell from 1. Without evaluation those stay empty."""
    row: dict[str, float] = {"epoch": epoch + 1, **_loss_columns("train", losses)}
    if metrics is not None:
        row |= {
            "metrics/precision": metrics.precision,
            "metrics/recall": metrics.recall,
            "metrics/mAP_0.5": metrics.map50,
            "metrics/mAP_0.5:0.95": metrics.map50_95,
        }
        row |= _loss_columns("val", metrics.losses) if metrics.losses is not None else {}
    return row | {f"x/lr{group}": rate for group, rate in enumerate(learning_rates)} | {"train/skipped": skipped}


def _loss_columns(split: str, losses: LossMeans) -> dict[str, float]:
    return {
        f"{split}/box_loss": losses.box,
        f"{split}/obj_loss": losses.objectness,
        f"{split}/cls_loss": losses.classification,
    }


# ---- CSV ----------------------------------------------------------------------------------------------------------


class CsvTable:
    """A CSV file that grows by a row per epoch and survives being killed at any moment.

    Cells are right-aligned with spaces after the comma, text in quotes where it needs them; read it with
    `skipinitialspace`, or strip. Opening an existing file keeps its whole rows, moves them below today's columns if
    those are others, and drops a last row cut short.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, lasting: bool = False) -> None:
        """A row that is to be `lasting` is on disk before `append` returns, whatever becomes of the machine."""
        self.path, self.columns, self._lasting = path, columns, lasting
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != self._text(rows := self.rows()):
            self._replace(rows)

    def rows(self) -> list[dict[str, str]]:
        """The complete rows, cells as text without padding."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        csv.field_size_limit(_LONGEST_CELL)
        names, *rows = map(_cells, text[: text.rfind("\n") + 1].splitlines() or [""])
        return [dict(zip(names, row)) for row in rows if len(row) == len(names)]

    def append(self, row: Mapping[str, float | str]) -> None:
        """Add one row. A number is rounded to 6 significant digits; a missing value leaves its cell empty.

        An OSError on the way names the file, and what was written of the row is gone when the file is next opened.
        """
        unknown = set(row) - set(self.columns)
        assert not unknown, f"{self.path.name} has no column {sorted(unknown)}"
        cells = {name: _cell(value) for name, value in row.items()}
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                # one write, so that a kill cuts at most one row
                file.write(self._line(cells) if file.tell() else self._text([cells]))
                if self._lasting:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # a full disk has none
            raise

    def truncate(self, keep_epochs: int) -> None:
        """Drop the rows after the first `keep_epochs` epochs, which a resumed run is about to write again."""
        self.keep(lambda row: _is_within(row.get("epoch", ""), keep_epochs))

    def keep(self, wanted: Callable[[dict[str, str]], bool]) -> None:
        """Drop the other rows."""
        rows = self.rows()
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            self._replace(kept)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        write_text(self.path, self._text(rows))

    def _text(self, rows: list[dict[str, str]]) -> str:
        return "".join(map(self._line, [dict(zip(self.columns, self.columns)), *rows]))

    def _line(self, cells: Mapping[str, str]) -> str:
        return ", ".join(_quoted(cells.get(name, "")).rjust(max(len(name), 11)) for name in self.columns) + "\n"


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, float | str]]) -> str:
    """A whole table as `CsvTable` has it, its columns as wide as their widest cell, but for the last.

    A number that is to keep all its digits is given as text.
    """
    lines = [list(columns), *([_quoted(_cell(row.get(name, ""))) for name in columns] for row in rows)]
    widths = [max(11, *map(len, cells)) for cells in list(zip(*lines))[:-1]]
    return "".join(", ".join([*map(str.rjust, cells, widths), cells[-1]]) + "\n" for cells in lines)


def _cells(line: str) -> list[str]:
    """Of one line by itself, so that a stray quote swallows no other."""
    return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True), [])]


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if "," in cell or '"' in cell else cell


def _cell(value: float | str) -> str:
    return on_one_line(value) if isinstance(value, str) else _six_digits(value)


def on_one_line(text: str) -> str:
    """With escapes for line breaks, and for bytes of a file name that are no text."""
    if text.isprintable():  # a table of thousands of rows is nearly all numbers
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _six_digits(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{float(value):.6g}"


def _is_within(cell: str, epochs: int) -> bool:
    try:
        return float(cell) <= epochs
    except ValueError:  # a row that names no epoch belongs to none
        return False


# ---- loggers ------------------------------------------------------------------------------------------------------


class Logger:
    """The contract of a logger, and at once the null object: each method may be called and does nothing.

    Those of LOGGERS are made by `(folder, start_epoch=, note=)`: a resumed run starts above 0 and what an earlier run
    logged from there on is withdrawn; `note` takes a line for the user.
    """

    def epoch(self, results: Row, timing: Row) -> None:
        """An epoch is over: rows by RESULT_COLUMNS and TIMING_COLUMNS."""

    def scalars(self, values: Row, step: int) -> None:
        """Numbers by tag."""

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A (H, W, 3) u8 RGB picture."""

    def close(self) -> None:
        """Nothing is written afterwards."""


class CsvLogger(Logger):
    """results.csv, which an identical run repeats to the byte, and timing.csv, which no run repeats."""

    def __init__(self, folder: Path, *, start_epoch: int = 0, note: Note = print) -> None:
        self._results = CsvTable(folder / "results.csv", RESULT_COLUMNS, lasting=True)  # checkpoints count on it
        self._timing = CsvTable(folder / "timing.csv", TIMING_COLUMNS)
        for table in (self._results, self._timing):
            table.truncate(start_epoch)

    def epoch(self, results: Row, timing: Row) -> None:
        self._results.append(results)
        self._timing.append(timing)


class NonFiniteTable:
    """nonfinite.csv: the batches of updates that were skipped because a number was not finite. Made by the first one.

    Epochs and batches count from 1. `images` are paths joined by "; ": those that the order of the epoch named, without
    the partners that mosaic, mixup or copy-paste drew for them.
    """

    def __init__(self, folder: Path) -> None:
        self._table = CsvTable(self.path_in(folder), NONFINITE_COLUMNS)

    @staticmethod
    def path_in(folder: Path) -> Path:
        return folder / "nonfinite.csv"

    def append(self, bad: Iterable[BadUpdate], store: LabelStore) -> None:
        """`store` is that of the training split."""
        for update in bad:
            for batch in update.batches:
                images = "; ".join(map(store.path, batch.images))
                place = {"epoch": batch.epoch + 1, "batch": batch.index + 1}
                self._table.append({**place, "what": update.what, "images": images})

    def keep(self, before_epoch: int, before_batch: int) -> None:
        """Drop what happened at or after a batch of an epoch, both from 0, from which a resumed run goes on."""
        self._table.keep(lambda row: _place(row) < (before_epoch, before_batch))


def _place(row: Mapping[str, str]) -> tuple[float, float]:
    """Epoch and batch of a row, from 0; after all others where they are no numbers."""
    try:
        return int(row["epoch"]) - 1, int(row["batch"]) - 1
    except (KeyError, ValueError):
        return math.inf, math.inf


class TensorBoardLogger(Logger):
    """TensorBoard events under the column names of results.csv. Without tensorboard: a note, then nothing.

    It is imported with the first event, as that takes as long as some steps of training. Where its folder cannot be
    written any more, a note and nothing as well: its thread would fail with a traceback.
    """

    def __init__(self, folder: Path, *, start_epoch: int = 0, note: Note = print) -> None:
        self._folder, self._start_epoch, self._note = folder.resolve(), start_epoch, note
        self._fails = False

    def epoch(self, results: Row, timing: Row) -> None:
        self.scalars({tag: value for tag, value in results.items() if tag != "epoch"}, int(results["epoch"]))

    @functools.cached_property
    def _writer(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._note("no TensorBoard events: `pip install tensorboard` to get them")
            return None
        return SummaryWriter(str(self._folder), purge_step=self._start_epoch + 1)

    def _may_write(self) -> bool:
        if not self._fails and not _takes(self._folder):
            self._fails = True
            self._note(f"no more TensorBoard events: {self._folder} cannot be written")
        return not self._fails and self._writer is not None

    def scalars(self, values: Row, step: int) -> None:
        if not self._may_write():
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        if self._may_write():
            self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._may_write():
            self._writer.close()


def _takes(folder: Path) -> bool:
    """Whether a folder is there, on a disk that can be written and has some room."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= _EVENTS_BYTES


# ---- terminal -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """What the line of an epoch shows."""

    epoch: int  # from 0
    epochs: int
    losses: LossMeans  # of training
    metrics: Metrics | None  # None: not evaluated
    images_per_s: float
    seconds_left: float


def format_header(epochs: int) -> str:
    """The titles above the lines of `format_epoch`."""
    return "  ".join(title.rjust(_width(title, epochs)) for title in EPOCH_LINE)


def format_epoch(summary: EpochSummary) -> str:
    """One line, aligned with `format_header`."""
    cells = ((title, cell(summary)) for title, cell in EPOCH_LINE.items())
    return "  ".join(text.rjust(_width(title, summary.epochs)) for title, text in cells)


def format_losses(losses: LossMeans) -> str:
    """For a bar."""
    return f"box {losses.box:.4f}  obj {losses.objectness:.4f}  cls {losses.classification:.4f}"


def format_duration(seconds: float) -> str:
    """h:mm:ss; a time that is not known yet (nan, infinite) has dashes for digits."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _width(title: str, epochs: int) -> int:
    return max(len(title), len(f"{epochs}/{epochs}") if title == "epoch" else 8)


def _metric(name: str) -> Callable[[EpochSummary], str]:
    return lambda summary: "-" if summary.metrics is None else f"{getattr(summary.metrics, name):.4f}"


def table(metrics: Metrics, verbose: bool, *, best: bool = False) -> str:
    """The result as aligned text: header, the row 'all' and, with `verbose`, every class that has labels.

    With `best` these also have the best F1 of their own, and the confidence where it is.
    """
    listed = [one for one in metrics.per_class if one.labels] if verbose else []
    names = ["all", *(shortened(one.name) for one in listed)]
    width = max(12, *(len(name) + 2 for name in names))
    title = f"{'Class':>{width}}{'Images':>9}{'Labels':>9}{'P':>8}{'R':>8}{'F1':>8}{'mAP@.5':>9}{'mAP@.5:.95':>12}"
    lines = [title + f"{'best F1':>9}{'at conf':>9}" * best]
    for name, row in zip(names, [metrics, *listed]):
        figures = f"{row.precision:>8.3f}{row.recall:>8.3f}{row.f1:>8.3f}{row.map50:>9.3f}{row.map50_95:>12.3f}"
        own = f"{row.best_f1:>9.3f}{row.best_confidence:>9.3f}" if best and row is not metrics else ""
        lines.append(f"{name:>{width}}{row.images:>9}{row.labels:>9}{figures}{own}")
    return "\n".join(lines)


def result(metrics: Metrics, verbose: bool, *, best: bool = False, least: float = 0.001) -> str:
    """`table`, and below it the twelve figures of COCO in two lines, and what P, R and F1 are read at.

    `least` is the confidence that all detections exceed.
    """
    figures = [
        f"  {name:>5} {'-' if value is None else f'{value:.3f}':>5}" for name, value in coco_names(metrics.coco).items()
    ]
    at = f"P, R and F1 are those at confidence {metrics.best_confidence:.3f}, where the mean F1 is best"
    lines = (
        "",
        "COCO" + "".join(figures[:6]),
        "    " + "".join(figures[6:]),
        at if metrics.f1 else f"Nothing that is labelled was found above confidence {least:g}",
    )
    return table(metrics, verbose, best=best) + "\n".join(lines)


def coco_names(figures: CocoFigures) -> dict[str, float | None]:
    """The twelve by the names that they have for people and in files."""
    return {name: getattr(figures, field) for name, field in _COCO_NAMES.items()}


def strange_outputs(metrics: Metrics, whose: str = "the network") -> str:
    """A line for the user where the network said something that is no number; else empty."""
    if not metrics.non_finite:
        return ""
    return (
        f"for {metrics.non_finite:,} of {metrics.images:,} images {whose} said something that is no finite number "
        "(NaN or infinity): left out of the detections"
    )


_BAR = "{desc}  {percentage:3.0f}% {bar} {rate_noinv_fmt}  {remaining} left{postfix}"
_BAR_WITHOUT_END = "{desc}  {n_fmt}{unit}  {rate_noinv_fmt}{postfix}"


class Console:
    """The terminal side of a run: bars where a person watches, and lines that a log file takes as well.

    `stream` is standard output when not given; bars appear where it is a terminal, unless `quiet`.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._bars = self._stream.isatty() and not quiet
        self._headed = False

    def bar(
        self, items: Iterable | int, description: str, *, images_each: int = 1, of: str = "images", start: int = 0
    ) -> tqdm:
        """A bar over an iterable, or of a total that `bar.update(n)` counts up to. It vanishes when it is done.

        `images_each` is the number of images, or what they are `of`, per item, so that the speed is in images/s;
        `bar.set_postfix_str(text, refresh=False)` adds text such as `format_losses`. Use a bar of a total in a `with`;
        it counts from `start`. Without bars it iterates.
        """
        return self._bar(items, description, unit=f" {of}", unit_scale=images_each, start=start)

    def download_bar(self, megabytes: int, description: str) -> tqdm:
        """A bar of a total in MB, 0 where that is not known; see `bar`."""
        return self._bar(megabytes, description, unit=" MB", unit_scale=1)

    def _bar(self, items: Iterable | int, description: str, *, unit: str, unit_scale: int, start: int = 0) -> tqdm:
        total = items if isinstance(items, int) else None
        return _Bar(
            None if total is not None else items,
            total=total,
            initial=start,
            desc=description,
            file=self._stream,
            disable=not self._bars,
            leave=False,
            dynamic_ncols=True,
            unit=unit,
            unit_scale=unit_scale,
            bar_format=_BAR if total != 0 else _BAR_WITHOUT_END,
        )

    def line(self, text: str) -> None:
        """A line, above any bar, that is in the log file at once."""
        tqdm.write(printable(text, self._stream), file=self._stream)
        self._stream.flush()

    def note(self, text: str) -> None:
        self.line(f"note: {text}")

    def warn(self, text: str) -> None:
        self.line(f"warning: {text}")

    def epoch(self, summary: EpochSummary) -> None:
        """The line of an epoch, below the titles if it is the first."""
        if not self._headed:
            self.line(format_header(summary.epochs))
            self._headed = True
        self.line(format_epoch(summary))


class SilentConsole(Console):
    """The terminal side of what another process tells: the null object."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def line(self, text: str) -> None:
        pass


class _Bar(tqdm):
    monitor_interval = 0  # no thread of tqdm's: loader workers are forked from this process


# ---- tables -------------------------------------------------------------------------------------------------------

EPOCH_LINE: dict[str, Callable[[EpochSummary], str]] = {  # title: text of the cell
    "epoch": lambda summary: f"{summary.epoch + 1}/{summary.epochs}",
    "box": lambda summary: f"{summary.losses.box:.5f}",
    "obj": lambda summary: f"{summary.losses.objectness:.5f}",
    "cls": lambda summary: f"{summary.losses.classification:.5f}",
    "P": _metric("precision"),
    "R": _metric("recall"),
    "mAP@.5": _metric("map50"),
    "mAP@.5:.95": _metric("map50_95"),
    "images/s": lambda summary: f"{summary.images_per_s:.1f}",
    "time left": lambda summary: format_duration(summary.seconds_left),
}

_COCO_NAMES = {  # shown: the field of CocoFigures
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "AR1": "ar1",
    "AR10": "ar10",
    "AR100": "ar100",
    "ARs": "ar_small",
    "ARm": "ar_medium",
    "ARl": "ar_large",
}

LOGGERS = {"csv": CsvLogger, "tensorboard": TensorBoardLogger}
