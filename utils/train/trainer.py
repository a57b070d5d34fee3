"""The training loop as a story: an epoch of batches, an evaluation, a checkpoint, a line for the reader.

Everything it works with is made by `build.py`. All state that a resumed run needs is in `checkpoint()`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.yolo import DetectionModel
from utils.checkpoint import RunFolder, averaged_model, load_checkpoint
from utils.config import TrainOptions
from utils.data.loader import Stream
from utils.evaluate.evaluator import Evaluator
from utils.files import this_python
from utils.hyp import Hyperparameters
from utils.loss import LossGains, detection_losses
from utils.report.loggers import format_losses
from utils.report.run_report import RunReport
from utils.runtime import Runtime, mendable_errors
from utils.structures import Batch, Losses, LossMeans, Metrics, UserError
from utils.train.optim import Schedule, StepSettings, WeightAverage, apply_settings

_MAX_GRADIENT_NORM = 10.0


@dataclass(kw_only=True)
class RunState:
    """Where a run stands."""

    epoch: int = 0  # finished epochs
    best_fitness: float = -1.0
    best_epoch: int = -1

    def finish_epoch(self, metrics: Metrics) -> bool:
        """Count the epoch; whether it is the best so far, as each is where there is no label to score it by."""
        improved = metrics.fitness > self.best_fitness or metrics.labels == 0
        if improved:
            self.best_fitness, self.best_epoch = metrics.fitness, self.epoch
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
    model: DetectionModel
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    gains: LossGains
    stream: Stream  # the batches of all epochs that are left
    evaluator: Evaluator
    run: RunFolder
    report: RunReport
    state: RunState

    def __post_init__(self) -> None:
        self.head = self.model.head
        self.clock = self.runtime.step_clock()

    def fit(self) -> Metrics:
        """Train until the last epoch or until patience ends; the metrics of best.pt.

        Raises RunError for what a user can mend: no memory, no disk space, a loss that is no number.
        """
        options = self.options
        with (
            _interruptible(self.run, self.state),
            mendable_errors(batch_size=options.batch_size, imgsz=options.imgsz),
        ):
            batches = iter(self.stream)
            while not self.finished:
                losses = self.train_epoch(batches)
                with self.clock.part("evaluate"):
                    metrics = self.evaluate()
                improved = self.state.finish_epoch(metrics)
                self.report.epoch(self.state.epoch - 1, losses, metrics, self._last_settings().lrs, self.clock.split())
                with self.clock.part("save"):
                    self.run.save(self.checkpoint(), best=improved)
            if self.state.epoch < options.epochs:
                self.report.console.line(f"Stopped early: no improvement in {options.patience} epochs (--patience)")
            return self.finish()

    @property
    def finished(self) -> bool:
        done = self.state.epoch >= self.options.epochs
        return done or self.state.out_of_patience(self.options.patience)

    def train_epoch(self, batches: Iterator[Batch]) -> LossMeans:
        """One pass over the images; the means of its losses over images."""
        self.model.train()
        epoch, per_epoch = self.state.epoch, self.schedule.batches_per_epoch
        sums, images = torch.zeros(3, device=self.runtime.device), 0
        with self.report.training_bar(epoch, per_epoch) as bar:
            for index in range(per_epoch):
                with self.clock.part("data_wait"):
                    batch = next(batches)
                losses = self.train_batch(batch, self.schedule(epoch * per_epoch + index))
                sums += len(batch.indices) * torch.stack([losses.box, losses.objectness, losses.classification])
                images += len(batch.indices)
                self.report.train_batch(epoch, index, batch)
                if bar.update(1):  # the bar was drawn: only now are losses read back from the device
                    bar.set_postfix_str(format_losses(_means(sums, images)), refresh=False)
        self.clock.count(images)
        means = _means(sums, images)  # waits for what the device has not done yet
        if not all(map(math.isfinite, asdict(means).values())):
            raise UserError(f"the loss is no longer a number in epoch {epoch + 1}: lower lr0 (now {self.hyp.lr0:g})")
        return means

    def train_batch(self, batch: Batch, settings: StepSettings) -> Losses:
        """Forward, loss, backward, and the optimizer's step where the schedule has one."""
        apply_settings(self.optimizer, settings)
        batch = batch.to(self.runtime.device)
        self.clock.lap("transfer")
        with self.runtime.autocast():
            predictions = self.model(batch.images.float() / 255)
        self.clock.lap("forward")
        losses = detection_losses(predictions, batch, self.head, self.gains)
        self.clock.lap("loss")
        self.scaler.scale(losses.total).backward()
        self.clock.lap("backward")
        if settings.update:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRADIENT_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.average.update(self.model)
            self.clock.lap("optimizer")
        return losses

    def evaluate(self) -> Metrics:
        """The averaged model on the val split."""
        return self.evaluator(self.average.model, gains=self.gains, watch=self.report.evaluation_bar)

    def finish(self) -> Metrics:
        """Evaluate best.pt as it was written, with the pictures of a finished run."""
        best = averaged_model(load_checkpoint(self.run.best)).to(self.runtime.device)
        metrics = self.evaluator(
            best, gains=self.gains, on_batch=self.report.pictures.evaluated_batch, watch=self.report.evaluation_bar
        )
        self.report.finished(metrics, best_epoch=self.state.best_epoch, epochs=self.state.epoch)
        return metrics

    def checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values that continue this run."""
        return {
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict(),
            "ema_updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "network": self.model.network,
            "names": list(self.names),
            "options": asdict(self.options),
            "hyp": asdict(self.hyp),
            "accumulation": self.schedule.accumulation,
            **asdict(self.state),
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take up the run of a checkpoint."""
        self.model.load_state_dict(checkpoint["model"])
        self.average.model.load_state_dict(checkpoint["ema"])
        self.average.updates = checkpoint["ema_updates"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])

    def _last_settings(self) -> StepSettings:
        return self.schedule(self.state.epoch * self.schedule.batches_per_epoch - 1)


def _means(sums: torch.Tensor, images: int) -> LossMeans:
    box, objectness, classification = (sums / images).tolist()
    return LossMeans(box=box, objectness=objectness, classification=classification)


@contextmanager
def _interruptible(run: RunFolder, state: RunState) -> Iterator[None]:
    """Ctrl-C leaves with a line on how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_continue(run, state)) from None


def _how_to_continue(run: RunFolder, state: RunState) -> str:
    if state.epoch == 0 or not run.last.exists():  # a last.pt may be of an earlier run, with --exist-ok
        return "no epoch was finished, so there is no checkpoint to continue from"
    return f"continue with: {this_python()} train.py --resume {shlex.quote(str(run.last))}"
