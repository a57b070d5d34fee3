"""The training loop as a story: an epoch of batches, an evaluation, a checkpoint, a line for the reader.

Everything it works with is made by `build.py`. All state that a resumed run needs is in `checkpoint()`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from utils.checkpoint import averaged_model, load_checkpoint, weights_digest
from utils.config import PROJECT_ROOT, TrainOptions
from utils.data.loader import TrainStream, faults_named
from utils.evaluate.evaluator import Evaluator
from utils.evaluate.saving import coco_ids, write_predictions
from utils.files import from_here, this_python
from utils.hyp import Hyperparameters, plain_values
from utils.ranks import LostRank
from utils.report.console import progress_texts, strange_outputs
from utils.report.run_report import RunReport
from utils.run_folder import RunFolder
from utils.runtime import Runtime, mendable_errors
from utils.stopping import Interrupted, StopRequest
from utils.structures import Batch, Detections, LossMeans, Metrics, UserError
from utils.train.health import HealthReport
from utils.train.optim import Schedule, StepSettings
from utils.train.step import TrainStep

_LEAST_LOSS_SCALE = 2.0**-10  # it starts at 2^16 and is halved by each step that is skipped
_BAD_IN_ROW = 20  # updates that were no finite numbers, after which training is out of hand


class _Diverged(Exception):
    """Training is out of hand."""


@dataclass(kw_only=True)
class RunState:
    """Where a run stands."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # of the epoch under way, those that were trained on
    best_fitness: float = -1.0
    best_epoch: int = -1
    class_maps: tuple[float, ...] = ()  # mAP@.5:.95 per class of the last evaluation; 0 where there is no label
    lr_scale: float = 1.0  # of all learning rates; below 1 once the run went back for numbers that are none

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> RunState:
        return cls(**{item.name: checkpoint[item.name] for item in fields(cls)})

    def finish_epoch(self, metrics: Metrics | None, *, only: bool = False) -> bool:
        """Count the epoch, evaluated or not; whether it is the best so far.

        That is each where there is no label to score it by, and the one that is the `only` one to be evaluated.
        """
        improved = metrics is not None and (only or metrics.labels == 0 or metrics.fitness > self.best_fitness)
        if improved:
            self.best_fitness, self.best_epoch = metrics.fitness, self.epoch
        if metrics is not None:
            self.class_maps = tuple(one.map50_95 if one.labels else 0.0 for one in metrics.per_class)
        self.epoch, self.batch = self.epoch + 1, 0
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
    data: dict[str, str]  # by split, a digest of images and labels
    made_on: str  # the machine
    stop: StopRequest = field(default_factory=StopRequest)
    save_first: bool = True  # before the first step: there is no checkpoint yet, or it knows other options

    def __post_init__(self) -> None:
        self.clock, self.ranks = self.step.clock, self.runtime.ranks
        self._warned = False
        self._best_is_due = False  # the last evaluation was the best, and its weights are still to be written
        self._is_saved = False  # all of the run, as it is now
        self._saved_at = time.monotonic()

    def fit(self) -> Metrics:
        """Train until the last epoch or until patience ends; the metrics of best.pt.

        Raises RunError for what a user can mend: no memory, no disk space, a loss that is no number. Raises Interrupted
        when a signal asks to stop, with the run saved and how to continue it.
        """
        options = self.options
        with (
            mendable_errors(batch_size=options.batch_size, imgsz=options.imgsz),
            faults_named(self.stream, self.evaluator.stream),
            self.run.removal_named(),
            _interruptible(self),
            self.ranks.losses_named(),
            self.ranks.end_told(),
        ):
            self.ranks.hurry()
            if self.finished and self.save_first:
                self._save(final=True)
            while not self.finished:
                try:
                    self._run_epoch()
                except _Diverged:
                    self._go_back()
            if self.state.epoch < options.epochs:
                self.report.console.line(f"Stopped early: no improvement in {options.patience} epochs (--patience)")
            with self.stop.at_once():
                metrics = self.finish()
            self.ranks.leave()
            return metrics

    def try_out(self, rungs: Container[int], goes_on: Callable[[int, Metrics], bool]) -> Metrics | None:
        """Train to the last epoch; its metrics. Nothing is saved, shown or taken up again.

        After each epoch whose number, from 1, is among `rungs` it is evaluated as well, and where `goes_on` then says
        no, that is the end, and there are no metrics. Raises RunError as `fit` does, and for numbers that are none.
        """
        options = self.options
        with (
            mendable_errors(batch_size=options.batch_size, imgsz=options.imgsz),
            faults_named(self.stream, self.evaluator.stream),
        ):
            while True:
                metrics = self._tried_epoch(rungs)
                if self.state.epoch >= options.epochs:
                    return metrics
                if metrics is not None and not goes_on(self.state.epoch, metrics):
                    return None

    def _tried_epoch(self, rungs: Container[int]) -> Metrics | None:
        try:
            self.train_epoch()
        except _Diverged:
            raise UserError(f"{_BAD_IN_ROW} updates in a row gave no finite numbers") from None
        number = self.state.epoch + 1
        metrics = self.evaluate() if number in rungs or number == self.options.epochs else None
        if metrics is not None and metrics.non_finite == metrics.images:
            raise UserError("the network gives no finite numbers")
        self.state.finish_epoch(metrics)
        return metrics

    def _run_epoch(self) -> None:
        losses = self.train_epoch()
        metrics = self._evaluated()
        self._warn_of_strange_outputs(metrics)
        self._best_is_due, self._is_saved = self.state.finish_epoch(metrics, only=self.options.noval), False
        self.report.epoch(
            self.state.epoch - 1,
            losses,
            metrics,
            self._last_settings().lrs,
            self.clock.split(),
            skipped=self.step.health.poll().skipped,
            tensors=self._tensors() if self.report.wants_tensors else None,
        )
        self._save(final=self.finished, keep=self._keeps)

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
        """One pass over the images, or what is left of it; the means of its losses over images."""
        self.step.model.train()
        epoch, start, per_epoch = self.state.epoch, self.state.batch, self.schedule.batches_per_epoch
        batches = self.stream.epoch(epoch, self.state.class_maps, start=start)
        if start == 0:
            self.step.health.start_epoch()
        self.step.keeps_gradients, self.step.gradients = self.report.wants_tensors, {}
        with self.report.training_bar(epoch, per_epoch, start=start) as bar:
            for index in range(start, per_epoch):
                batch = self._next(batches)
                settings = self.schedule(epoch * per_epoch + index)
                self.step(batch, settings)
                self.clock.count(len(batch.indices))
                self.report.train_batch(epoch, index, batch)
                if bar.update(1):  # the bar was drawn: only now are losses read back from the device
                    bar.show(self._progress())
                if settings.update:
                    self._updated(index)
        self._heed(self.step.health.poll(now=True))  # waits for what the device has not done yet
        if self.step.scaler.is_enabled() and self.step.scaler.get_scale() < _LEAST_LOSS_SCALE:
            raise self.ranks.of_all(
                UserError(
                    f"the gradients overflow in fp16 at every step of epoch {epoch + 1}, so nothing is learned: "
                    "use --amp bf16 or --amp off"
                )
            )
        return self.step.health.means()

    def _tensors(self) -> dict[str, Tensor]:
        """The weights, and the gradients of the first update of the epoch, by kind and name."""
        weights = {f"weights/{name}": weight.detach() for name, weight in self.step.model.named_parameters()}
        return weights | {f"gradients/{name}": gradient for name, gradient in self.step.gradients.items()}

    def _progress(self) -> list[str]:
        """What the bar of an epoch shows besides images and time."""
        means, wait = self.step.health.means(), self.clock.share("data_wait")
        return progress_texts(means, data_wait=wait, memory=self.runtime.memory_used())

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, for which no signal waits."""
        with self.clock.part("data_wait"), self._waits():
            batch = next(batches)
        if self.save_first:  # with the first batch at hand, as no loader process should be forked while a thread writes
            self.save_first = False
            self._save()
        return batch

    def _waits(self) -> AbstractContextManager:
        """Around a wait that a signal ends at once; but ranks, which need one another's gradients, stop as one."""
        return self.stop.at_once() if self.ranks.alone else nullcontext()

    def _updated(self, index: int) -> None:
        """The batch of this number is trained on, and with it those that waited for an update."""
        self.state.batch, self._is_saved = index + 1, False
        self.ranks.reached(f"batch {index + 1} of epoch {self.state.epoch + 1}")
        self._heed(self.step.health.poll(now=not self.runtime.queues_work))
        with self.clock.part("optimizer"):  # the end of an update is where ranks wait for the slower ones
            signum, due = self.ranks.most(self.stop.signum or 0, self._is_save_due)  # signals reach them one by one
        if signum:
            raise Interrupted(signum)
        if due:
            self._save()

    @property
    def _is_save_due(self) -> bool:
        """Whether it is time for a checkpoint within the epoch."""
        return 0 < 60 * self.options.save_every <= time.monotonic() - self._saved_at

    def _evaluated(self) -> Metrics | None:
        """The evaluation of an epoch, where one is due. Ended by a signal, it is for the resumed run to make."""
        self.run.pause()  # loader processes may start, and none should be forked while a thread is writing
        with self.clock.part("evaluate"), self.stop.at_once():
            return self.evaluate() if self._evaluates else None

    def evaluate(self) -> Metrics:
        """The averaged model on the val split."""
        mine = self.evaluator(
            self.step.average.model,
            gains=self.step.gains,
            on_batch=self._show if self.report.watches(self.state.epoch) else None,
            watch=self.report.evaluation_bar,
        )
        return self.ranks.from_first(lambda: mine)  # another processor may differ in the last bit, and all are to agree

    def finish(self) -> Metrics:
        """Evaluate best.pt as it was written, with the pictures of a finished run.

        What it detects, and what that is scored against, is written where the split has ids of images and categories.
        """
        self.run.settle()
        checkpoint = self.ranks.from_first(lambda: load_checkpoint(self.run.best))
        best = averaged_model(checkpoint).to(self.runtime.device)
        with self.clock.part("evaluate"):
            evaluation = self.evaluator.evaluation(
                best,
                gains=self.step.gains,
                on_batch=self._picture,
                shown=self.report.pictures.batches,
                watch=self.report.evaluation_bar,
            )
        metrics, store = evaluation.metrics, self.evaluator.batches.store
        self._warn_of_strange_outputs(metrics)
        if self.ranks.speaks and not coco_ids(store, len(self.names)).invented:
            for line in write_predictions(self.run.path, evaluation.evidence, store, self.names):
                self.report.console.note(line)
        self.run.tidy()
        weights = {self.run.best.name: checkpoint, self.run.last.name: self.step.state_dict()}
        self.report.finished(
            metrics,
            best_epoch=checkpoint["epoch"] - 1,
            epochs=self.state.epoch,
            digests=lambda: {name: weights_digest(content) for name, content in weights.items()},
            last_times=self.clock.split,
        )
        return metrics

    def _warn_of_strange_outputs(self, metrics: Metrics | None) -> None:
        """Once in a run: it seldom stays with one evaluation."""
        if metrics is not None and metrics.non_finite and not self._warned:
            self.report.console.warn(strange_outputs(metrics))
            self._warned = True

    def _show(self, index: int, batch: Batch, detections: Sequence[Detections]) -> None:
        """As `_picture`, after an epoch."""
        if index == 0:
            self.clock.lap("evaluate")
            self.report.predictions(self.state.epoch, batch, detections)
            self.clock.skip()

    def _picture(self, index: int, batch: Batch, detections: Sequence[Detections]) -> None:
        """Drawn in the midst of an evaluation, but no part of what that takes."""
        self.clock.lap("evaluate")
        self.report.pictures.evaluated_batch(index, batch, detections)
        self.clock.skip()

    # ---- numbers that are none --------------------------------------------------------------------------------------

    def _heed(self, health: HealthReport) -> None:
        """Raises _Diverged where training is out of hand."""
        self.report.skipped(health.bad)
        if health.longest >= _BAD_IN_ROW:
            raise _Diverged

    def _go_back(self) -> None:
        """To the last checkpoint, at half the learning rate. Raises UserError where that was done, or cannot be."""
        self.run.settle()
        told = f"{_BAD_IN_ROW} updates in a row, or more, gave no finite numbers"
        if self.state.lr_scale < 1:
            told += ", at half the learning rate as well"
        if self.state.lr_scale < 1 or not self.ranks.from_first(lambda: self.run.saved):
            amp = "" if self.runtime.amp_dtype is None else ", or use --amp off"
            raise self.ranks.of_all(
                UserError(
                    f"{told}: {self.report.nonfinite} names batches and images; look at these, lower lr0 (now "
                    f"{self.hyp.lr0:g}){amp}"
                )
            )
        self.load_state_dict(self.ranks.from_first(lambda: load_checkpoint(self.run.last)))
        self.state.lr_scale = 0.5
        self.schedule = replace(self.schedule, lr_scale=0.5)
        self.report.go_back(self.state.epoch)
        self.report.console.warn(
            f"{told}: back to the last checkpoint, after epoch {self.state.epoch}, and on at half the learning rate"
        )

    # ---- what is saved ----------------------------------------------------------------------------------------------

    def _save(self, *, final: bool = False, keep: bool = False) -> None:
        """Write a checkpoint; but no last.pt amid numbers that are none: it would be one to go back to."""
        health = self.step.health.poll(now=True)
        self._heed(health)
        last = health.in_row == 0 or final or not self.run.saved
        if self._best_is_due or keep or last:
            with self.clock.part("save"):
                self._is_saved = self.run.save(
                    self.checkpoint(), best=self._best_is_due, final=final, keep=keep, last=last
                )
            self._best_is_due = False
        if last:
            self._saved_at = time.monotonic()

    def save_for_later(self) -> None:
        """Before the run ends for another reason than its last epoch."""
        self.step.roll_back()
        health = self.step.health.poll(now=True)
        self.report.skipped(health.bad)
        if not self._is_saved:
            last = health.in_row == 0 or not self.run.saved
            self.run.save(self.checkpoint(), best=self._best_is_due, final=True, last=last)
        self.run.settle()

    def checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values that continue this run."""
        return {
            **self.step.state_dict(),
            "network": self.step.model.network,
            "names": list(self.names),
            "options": asdict(self.options),
            "hyp": plain_values(self.hyp),
            "accumulation": self.schedule.accumulation,
            "made_on": self.made_on,
            "data": self.data,
            **asdict(self.state),
        }

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there, in the same run."""
        self.step.load_state_dict(checkpoint)
        self.state = RunState.of(checkpoint)

    def _last_settings(self) -> StepSettings:
        return self.schedule(self.state.epoch * self.schedule.batches_per_epoch - 1)


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """A signal leaves with the run saved and a line on how to go on; however the block ends, no file is half done."""
    try:
        yield
    except Interrupted as interrupted:
        trainer.save_for_later()
        raise Interrupted(interrupted.signum, _how_to_continue(trainer)) from None
    except LostRank as lost:
        if trainer.runtime.queues_work:  # the device may wait without end, or have gone on with half a sum
            trainer.run.settle()
        else:
            trainer.save_for_later()
        if trainer.stop.signum and not lost.gone:  # all are to stop, and some were faster
            raise Interrupted(trainer.stop.signum, _how_to_continue(trainer)) from None
        lost.args = (f"{lost}; {_how_to_continue(trainer)}",)
        raise
    except (BrokenPipeError, UserError):  # such as an image that vanished: what was trained is sound
        with suppress(Exception):
            trainer.save_for_later()
        raise
    except KeyboardInterrupt:  # of a thread that may not ask for signals
        trainer.run.settle()
        raise KeyboardInterrupt(_how_to_continue(trainer)) from None
    finally:
        with suppress(Exception):  # the first one is on its way already
            trainer.run.settle()
        trainer.report.close()
        trainer.run.let_go()


def _how_to_continue(trainer: Trainer) -> str:
    """What to type to go on."""
    if trainer.run.finished:
        return f"the run was finished: {trainer.run.path}"
    if trainer.run.saved:
        script, last = (shlex.quote(str(path)) for path in (from_here(PROJECT_ROOT / "train.py"), trainer.run.last))
        return trainer.ranks.how_to_start(this_python(), f"{script} --resume {last}")
    waits = trainer.options.nosave and trainer.state.epoch > 0
    return f"{'--nosave saves nothing before the end' if waits else 'nothing was trained yet'}: start it again"
