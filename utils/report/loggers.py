"""Who is told of a run's progress: the CSV files that every run has, and the table of all loggers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from utils.clock import PARTS
from utils.report.csv_table import CsvTable
from utils.report.logger import Guard, Guarded, LoggedEpoch, LoggedRun, Logger
from utils.report.tensorboard import TensorBoardLogger
from utils.report.weights_and_biases import WandbLogger
from utils.structures import BadUpdate, LabelStore, LossMeans, Metrics

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


class ResultsLogger(Logger):
    """results.csv, which an identical run repeats to the byte. Checkpoints count on its rows."""

    essential = True

    def __init__(self, run: LoggedRun) -> None:
        self._table = CsvTable(run.folder / "results.csv", RESULT_COLUMNS, lasting=True)
        self._table.truncate(run.start_epoch)

    def epoch(self, epoch: LoggedEpoch) -> None:
        self._table.append(epoch.results)


class TimingLogger(Logger):
    """timing.csv, which no run repeats."""

    def __init__(self, run: LoggedRun) -> None:
        self._table = CsvTable(run.folder / "timing.csv", TIMING_COLUMNS)
        self._table.truncate(run.start_epoch)

    def epoch(self, epoch: LoggedEpoch) -> None:
        self._table.append(epoch.timing)


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


def loggers_of(run: LoggedRun, guards: Mapping[str, Guard]) -> list[Logger]:
    """All of the table; those that are not essential behind the guards of their names."""
    return [
        kind(run) if kind.essential else Guarded(partial(kind, run), guards[name]) for name, kind in LOGGERS.items()
    ]


LOGGERS: dict[str, type[Logger]] = {
    "results.csv": ResultsLogger,
    "timing.csv": TimingLogger,
    "TensorBoard": TensorBoardLogger,
    "Weights & Biases": WandbLogger,
}
