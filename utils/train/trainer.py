"""The training loop as a story: an epoch of batches, an evaluation, a checkpoint, a line for the reader.

Everything it works with is made by `build.py`. All state that a resumed run needs is in `checkpoint()`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from utils.checkpoint import RunFolder, averaged_model, load_checkpoint
from utils.config import TrainOptions
from utils.data.loader import TrainStream, faults_named
from utils.evaluate.evaluator import Evaluator
from utils.evaluate.saving import coco_ids, write_predictions
from utils.files import this_python
from utils.hyp import Hyperparameters, plain_values
from utils.report.loggers import format_losses, strange_outputs
from utils.report.run_report import RunReport
from utils.runtime import Runtime, mendable_errors
from utils.structures import Batch, Detections, LossMeans, Metrics, UserError
from utils.train.optim import Schedule, StepSettings
from utils.train.step import TrainStep

_LEAST_LOSS_SCALE = 2.0**-10  # it starts at 2^16 and is halved by each step that is skipped


@dataclass(kw_only=True)
class RunState:
    """Where a run stands."""

    epoch: int = 0  # finished epochs
    best_fitness: float = -1.0
    best_epoch: int = -1
    class_maps: tuple[float, ...] = ()  # mAP@.5:.95 per class of the last evaluation; 0 where there is no label

    def finish_epoch(self, metrics: Metrics | None, *, only: bool = False) -> bool:
        """Count the epoch, evaluated or not; whether it is the best so far.

        That is each where there is no label to score it by, and the one that is the `only` one to be evaluated.
        """
        improved = metrics is not None and (only or metrics.labels == 0 or metrics.fitness > self.best_fitness)
        if improved:
            self.best_fitness, self.best_epoch = metrics.fitness, self.epoch
        if metrics is not None:
            self.class_maps = tuple(one.map50_95 if one.labels else 0.0 for one in metrics.per_class)
        self.epoch += 1
        return improved

    def out_of_patience(self, patience: int) -> bool:
        return patience > 0 and self.epoch - 1 - self.best_epoch >= patience


@dataclass(kw_only=True)
class Trainer:
    """A run under way."""

    options: TrainOptions
    hyp: Hyperparameters
    names: tuple[str, ...]
    runtime: Runtime
    step: TrainStep
    schedule: Schedule
    stream: TrainStream
    evaluator: Evaluator
    run: RunFolder
    report: RunReport
    state: RunState

    def __post_init__(self) -> None:
        self.clock = self.step.clock
        self._warned = False

    def fit(self) -> Metrics:
        """Train until the last epoch or until patience ends; the metrics of best.pt.

        Raises RunError for what a user can mend: no memory, no disk space, a loss that is no number.
        """
        options = self.options
        with (
            _interruptible(self),
            mendable_errors(batch_size=options.batch_size, imgsz=options.imgsz),
            faults_named(self.stream, self.evaluator.stream),
        ):
            while not self.finished:
                losses = self.train_epoch()
                with self.clock.part("evaluate"):
                    metrics = self.evaluate() if self._evaluates else None
                self._warn_of_strange_outputs(metrics)
                improved = self.state.finish_epoch(metrics, only=options.noval)
                self.report.epoch(self.state.epoch - 1, losses, metrics, self._last_settings().lrs, self.clock.split())
                with self.clock.part("save"):
                    self.run.save(self.checkpoint(), best=improved, final=self.finished, keep=self._keeps)
            if self.state.epoch < options.epochs:
                self.report.console.line(f"Stopped early: no improvement in {options.patience} epochs (--patience)")
            return self.finish()

    @property
    def finished(self) -> bool:
        done = self.state.epoch >= self.options.epochs
        return done or (not self.options.noval and self.state.out_of_patience(self.options.patience))

    @property
    def _evaluates(self) -> bool:
        """Whether the epoch under way is one to evaluate."""
        return not self.options.noval or self.state.epoch + 1 >= self.options.epochs

    @property
    def _keeps(self) -> bool:
        """Whether the checkpoint of the epoch just finished stays."""
        return self.options.save_period > 0 and self.state.epoch % self.options.save_period == 0

    def train_epoch(self) -> LossMeans:
        """One pass over the images; the means of its losses over images."""
        self.step.model.train()
        self.step.health.start_epoch()
        batches = self.stream.epoch(self.state.epoch, self.state.class_maps)
        epoch, per_epoch = self.state.epoch, self.schedule.batches_per_epoch
        sums, images = torch.zeros(3, device=self.runtime.device), 0
        with self.report.training_bar(epoch, per_epoch) as bar:
            for index in range(per_epoch):
                with self.clock.part("data_wait"):
                    batch = next(batches)
                losses = self.step(batch, self.schedule(epoch * per_epoch + index))
                self.step.health.poll()
                sums += len(batch.indices) * torch.stack([losses.box, losses.objectness, losses.classification])
                images += len(batch.indices)
                self.report.train_batch(epoch, index, batch)
                if bar.update(1):  # the bar was drawn: only now are losses read back from the device
                    bar.set_postfix_str(format_losses(_means(sums, images)), refresh=False)
        self.clock.count(images)
        means = _means(sums, images)  # waits for what the device has not done yet
        if not all(map(math.isfinite, asdict(means).values())):
            remedy = "use --amp bf16 or --amp off, or lower" if self.step.scaler.is_enabled() else "lower"
            raise UserError(f"the loss is no longer a number in epoch {epoch + 1}: {remedy} lr0 (now {self.hyp.lr0:g})")
        if self.step.scaler.is_enabled() and self.step.scaler.get_scale() < _LEAST_LOSS_SCALE:
            raise UserError(
                f"the gradients overflow in fp16 at every step of epoch {epoch + 1}, so nothing is learned: "
                "use --amp bf16 or --amp off"
            )
        return means

    def evaluate(self) -> Metrics:
        """The averaged model on the val split."""
        return self.evaluator(self.step.average.model, gains=self.step.gains, watch=self.report.evaluation_bar)

    def finish(self) -> Metrics:
        """Evaluate best.pt as it was written, with the pictures of a finished run.

        What it detects, and what that is scored against, is written where the split has ids of images and categories.
        """
        best = averaged_model(load_checkpoint(self.run.best)).to(self.runtime.device)
        with self.clock.part("evaluate"):
            evaluation = self.evaluator.evaluation(
                best, gains=self.step.gains, on_batch=self._picture, watch=self.report.evaluation_bar
            )
        metrics, store = evaluation.metrics, self.evaluator.batches.store
        self._warn_of_strange_outputs(metrics)
        if not coco_ids(store, len(self.names)).invented:
            for line in write_predictions(self.run.path, evaluation.evidence, store, self.names):
                self.report.console.note(line)
        self.report.finished(
            metrics, best_epoch=self.state.best_epoch, epochs=self.state.epoch, last_times=self.clock.split
        )
        return metrics

    def _warn_of_strange_outputs(self, metrics: Metrics | None) -> None:
        """Once in a run: it seldom stays with one evaluation."""
        if metrics is not None and metrics.non_finite and not self._warned:
            self.report.console.warn(strange_outputs(metrics))
            self._warned = True

    def _picture(self, index: int, batch: Batch, detections: Sequence[Detections]) -> None:
        """Drawn in the midst of an evaluation, but no part of what that takes."""
        self.clock.lap("evaluate")
        self.report.pictures.evaluated_batch(index, batch, detections)
        self.clock.skip()

    def checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values that continue this run."""
        return {
            **self.step.state_dict(),
            "network": self.step.model.network,
            "names": list(self.names),
            "options": asdict(self.options),
            "hyp": plain_values(self.hyp),
            "accumulation": self.schedule.accumulation,
            **asdict(self.state),
        }

    def _last_settings(self) -> StepSettings:
        return self.schedule(self.state.epoch * self.schedule.batches_per_epoch - 1)


def _means(sums: torch.Tensor, images: int) -> LossMeans:
    box, objectness, classification = (sums / images).tolist()
    return LossMeans(box=box, objectness=objectness, classification=classification)


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C leaves with a line on how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_continue(trainer)) from None


def _how_to_continue(trainer: Trainer) -> str:
    """What to type after Ctrl-C."""
    if trainer.run.saved:
        return f"continue with: {this_python()} train.py --resume {shlex.quote(str(trainer.run.last))}"
    waits = trainer.options.nosave and trainer.state.epoch > 0
    reason = "--nosave saves nothing before the end" if waits else "no epoch was finished"
    return f"{reason}, so there is no checkpoint to continue from"
