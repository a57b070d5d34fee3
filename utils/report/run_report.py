"""What a run shows and leaves behind besides its weights: lines, bars, tables, TensorBoard, pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.clock import TimeSplit
from utils.config import PROJECT_ROOT
from utils.data.loader import Stream, UnpaintedBatch
from utils.files import from_here, this_python, write_text
from utils.report.console import Console, EpochSummary, SilentConsole, coco_names, format_duration, labelled, result
from utils.report.html import REPORT_FILE, write_report
from utils.report.logger import Guard, LoggedEpoch, LoggedRun, first_line
from utils.report.loggers import LOGGERS, NonFiniteTable, loggers_of, result_row
from utils.report.next_steps import next_steps
from utils.report.pictures import GuardedPictures, Pictures, clear_pictures
from utils.report.settings import flags_in_use
from utils.report.timing import bottleneck, time_table, timing_row
from utils.run_folder import METRICS_FILE
from utils.structures import BadUpdate, Batch, ClassMetrics, Detections, LabelStore, LossMeans, Metrics

_CLASSES_SHOWN, _WEAKEST_SHOWN = 40, 15  # on the terminal: at most so many, and of more these


class RunReport:
    """The reporter of a training run, and at once the null object: this one says nothing, and writes nothing."""

    pictures = Pictures()

    def __init__(self, folder: Path) -> None:
        self.folder, self.console = folder, SilentConsole()

    def go_back(self, epoch: int) -> None:
        """What was said of epochs from this one on is withdrawn; but not which numbers were not finite."""

    def skipped(self, bad: Sequence[BadUpdate]) -> None:
        """Updates were skipped as their numbers were not finite."""

    @property
    def nonfinite(self) -> Path:
        """The file that names them."""
        return NonFiniteTable.path_in(self.folder)

    def training_bar(self, epoch: int, batches: int, *, start: int = 0) -> AbstractContextManager:
        """A bar of one epoch, of which `start` batches are done; `update(1)` is true when it was drawn."""
        return self.console.bar(batches, "", start=start)

    def evaluation_bar(self, batches: Stream) -> Iterable[Batch]:
        """The batches of an evaluation."""
        return batches

    def train_batch(self, epoch: int, index: int, batch: Batch | UnpaintedBatch) -> None:
        """A batch has been trained on. Pictures are drawn after it, so that no run waits for them to start."""

    def watches(self, epoch: int) -> bool:
        """Whether `predictions` of the evaluation after this epoch are wanted."""
        return False

    def predictions(self, epoch: int, batch: Batch, detections: Sequence[Detections]) -> None:
        """The first batch of an evaluation, the same images each time, and what was detected, in network px."""

    @property
    def wants_tensors(self) -> bool:
        """Whether `epoch` is to be told weights and gradients."""
        return False

    def epoch(
        self,
        epoch: int,
        losses: LossMeans,
        metrics: Metrics | None,
        learning_rates: Sequence[float],
        times: TimeSplit,
        *,
        skipped: int = 0,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """An epoch is over, evaluated or not: its line, its rows, its scalars. So many updates were skipped.

        To be called before its checkpoint is written: a resumed run drops a row too many, but never adds one.
        """

    def finished(
        self,
        metrics: Metrics,
        *,
        best_epoch: int,
        epochs: int,
        digests: Callable[[], Mapping[str, str]],
        last_times: Callable[[], TimeSplit],
    ) -> None:
        """The last words of a run: the table, the pictures, metrics.json, report.html, and where everything lies.

        `digests` tells those of the weights, by file. `last_times` tells what came since the row of the last epoch; it
        is asked when the pictures are drawn.
        """

    def close(self) -> None:
        """Nothing is told afterwards; for a run that has not `finished` this is all that loggers hear of its end."""


class WrittenReport(RunReport):
    """The reporter that shows and writes."""

    def __init__(
        self, run: LoggedRun, *, console: Console, pictures: Pictures, train: LabelStore, start_batch: int = 0
    ):
        """The run goes on at `run.start_epoch` and a batch of it, on the images of `train`."""
        super().__init__(run.folder)
        self.console, self._run, self._train = console, run, train
        self._clear(anew=(run.start_epoch, start_batch) == (0, 0))
        self.pictures = GuardedPictures(pictures, Guard("pictures", console.warn))
        self._flags = flags_in_use(asdict(run.options))
        self._guards = {name: Guard(name, console.warn) for name in LOGGERS}
        self._loggers = loggers_of(run, self._guards)
        self._nonfinite = NonFiniteTable(run.folder)
        self._nonfinite.keep(run.start_epoch, start_batch)
        self._times: list[TimeSplit] = []  # of the epochs
        self._started = time.perf_counter()

    def _clear(self, *, anew: bool) -> None:
        """A run that goes on is not finished: what says so, or is of its end, goes. Of another run all goes."""
        for name in (METRICS_FILE, REPORT_FILE):
            (self.folder / name).unlink(missing_ok=True)
        clear_pictures(self.folder, all_of_them=anew)

    def go_back(self, epoch: int) -> None:
        self.close()
        self._times = self._times[: epoch - self._run.start_epoch]
        self._loggers = loggers_of(replace(self._run, start_epoch=epoch), self._guards)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
        self._loggers = []

    def skipped(self, bad: Sequence[BadUpdate]) -> None:
        self._nonfinite.append(bad, self._train)

    def training_bar(self, epoch: int, batches: int, *, start: int = 0) -> AbstractContextManager:
        title = f"Epoch {epoch + 1}/{self._run.options.epochs}"
        return self.console.bar(batches, title, images_each=self._run.options.batch_size, start=start)

    def evaluation_bar(self, batches: Stream) -> Iterable[Batch]:
        return self.console.bar(batches, "Evaluating", images_each=batches.batch_size)

    def train_batch(self, epoch: int, index: int, batch: Batch | UnpaintedBatch) -> None:
        if epoch > 0:
            return
        if index == 0:
            self.pictures.labels()
        self._show(f"train/batch{index}", self.pictures.train_batch(index, batch), 0)

    def watches(self, epoch: int) -> bool:
        return self._run.is_pictured(epoch + 1)

    def predictions(self, epoch: int, batch: Batch, detections: Sequence[Detections]) -> None:
        self._show("val/labels_and_predictions", self.pictures.progress(batch, detections), epoch + 1)

    def _show(self, tag: str, picture: np.ndarray | None, step: int) -> None:
        if picture is not None:
            for logger in self._loggers:
                logger.images({tag: picture}, step)

    @property
    def wants_tensors(self) -> bool:
        return self._run.options.tb_histograms

    def epoch(
        self,
        epoch: int,
        losses: LossMeans,
        metrics: Metrics | None,
        learning_rates: Sequence[float],
        times: TimeSplit,
        *,
        skipped: int = 0,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._times.append(times)
        told = LoggedEpoch(
            number=epoch + 1,
            results=result_row(epoch, losses, metrics, learning_rates, skipped=skipped),
            timing=timing_row(epoch, times),
            metrics=metrics,
            tensors=tensors or {},
        )
        for logger in self._loggers:
            logger.epoch(told)
        recent = [one.wall - one.rest for one in self._times[-5:]]  # pictures are drawn once
        self.console.epoch(
            EpochSummary(
                epoch=epoch,
                epochs=self._run.options.epochs,
                losses=losses,
                metrics=metrics,
                images_per_s=times.images_per_s if times.images else None,
                seconds_left=sum(recent) / len(recent) * (self._run.options.epochs - epoch - 1),
            )
        )
        if skipped:
            self.console.warn(
                f"epoch {epoch + 1}: {skipped} update{'s' * (skipped > 1)} skipped, as loss or gradient was no finite "
                f"number; {self.nonfinite} names the batches"
            )

    def finished(
        self,
        metrics: Metrics,
        *,
        best_epoch: int,
        epochs: int,
        digests: Callable[[], Mapping[str, str]],
        last_times: Callable[[], TimeSplit],
    ) -> None:
        self._tell_result(metrics, best_epoch=best_epoch, epochs=epochs)  # what cannot be written costs no figure
        self.pictures.finished(metrics, best_epoch + 1)
        write_metrics(self.folder / METRICS_FILE, metrics, epoch=best_epoch + 1)  # it marks the run as finished
        page = self._page()
        self._account_for_time(last_times())
        self.console.line(
            f"Digest of the weights: {', '.join(f'{digest} {file}' for file, digest in digests().items())}"
        )
        self.console.line(f"Weights, tables and pictures: {self.folder}")
        if page is not None:
            self.console.line(f"All of it on one page: {page}")
        options = self._run.options
        steps = next_steps(
            self.folder,
            epochs=options.epochs,
            trained=epochs,
            patience=options.patience,
            nproc=options.nproc,
            python=this_python(),
            scripts=from_here(PROJECT_ROOT),
        )
        for what, typed in steps.items():
            self.console.line(f"  {what:<10}{typed}")
        for logger in self._loggers:  # the very last, as one may send much over a network
            logger.close(metrics)
        self._loggers = []

    def _page(self) -> Path | None:
        """report.html; None where it cannot be made, which costs no run."""
        try:
            return write_report(self.folder)
        except Exception as error:
            self.console.warn(f"no {REPORT_FILE}: {first_line(error)}")
            return None

    def _tell_result(self, metrics: Metrics, *, best_epoch: int, epochs: int) -> None:
        """Of very many classes the weakest."""
        took = format_duration(time.perf_counter() - self._started)
        first = self._run.start_epoch + 1
        trained = f"Epochs {first} to {epochs}" if epochs > first else f"Epoch {epochs}"
        self.console.line(f"\n{trained} in {took}; best.pt is of epoch {best_epoch + 1}:")
        classes = labelled(metrics)
        if not classes:
            self.console.line(
                f"nothing to score it by: there is no usable label in the {metrics.images:,} images of 'val'"
            )
            return
        if len(classes) <= _CLASSES_SHOWN:
            self.console.line(result(metrics, classes))
            return
        weakest = sorted(classes, key=lambda one: one.map50_95)[:_WEAKEST_SHOWN]
        self.console.line(result(metrics, weakest))
        self.console.line(
            f"Of {len(classes):,} classes these are the {_WEAKEST_SHOWN} with the lowest mAP@.5:.95; all of them: "
            f"{self.folder / METRICS_FILE}"
        )

    def _account_for_time(self, last: TimeSplit) -> None:
        """Where the time of the run went, unless it was resumed for its final evaluation alone."""
        if self._times:
            whole = reduce(add, self._times, last)
            self.console.line(f"\n{time_table(whole)}\n{bottleneck(whole, self._flags)}\n")


def write_metrics(path: Path, metrics: Metrics, *, epoch: int | None = None) -> None:
    """The figures of an evaluation as JSON, at full precision; nothing that an identical run would not repeat.

    Those that do not exist, because there is no label to find, are null. `epoch`, from 1, is that of the weights.
    """
    scores = {
        "fitness": metrics.fitness,
        "precision": metrics.precision,
        "recall": metrics.recall,
        "f1": metrics.f1,
        "mAP_0.5": metrics.map50,
        "mAP_0.5:0.95": metrics.map50_95,
        "best_confidence": metrics.best_confidence,
    }
    figures = {
        **({} if epoch is None else {"epoch": epoch}),
        **(scores if metrics.labels else dict.fromkeys(scores)),
        "images": metrics.images,
        "labels": metrics.labels,
        "non_finite": metrics.non_finite,
        "coco": coco_names(metrics.coco),
        "losses": asdict(metrics.losses) if metrics.losses else None,
        "per_class": [_class_figures(one) for one in metrics.per_class],
    }
    write_text(path, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def _class_figures(one: ClassMetrics) -> dict[str, Any]:
    figures = {**asdict(one), "coco": coco_names(one.coco)}
    if not one.labels:
        figures |= {name: None for name, value in figures.items() if isinstance(value, float)}
    return figures
