"""One training step: a batch in, weights and their average moved, losses out.

The surprise: it reads nothing back from the device. Losses are tensors, and whoever shows them waits for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from models.yolo import DetectionModel
from utils.clock import StepClock
from utils.data.loader import UnpaintedBatch, resized
from utils.loss import LossGains, detection_losses, pad_labels
from utils.runtime import Runtime
from utils.structures import Batch, Losses
from utils.train.health import RunningStatistics, StepHealth
from utils.train.optim import (
    StepSettings,
    WeightAverage,
    apply_settings,
    guarded_step,
    restore_optimizer,
    trained_parameters,
)

_MAX_GRADIENT_NORM = 10.0


@dataclass(kw_only=True)
class TrainStep:
    """Calling it with a batch and its settings trains on them: forward, loss, backward, an update where one is due.

    An update of which a loss or the gradient is not finite is skipped, and what `health` says of it is all it leaves.
    Several ranks each have a part of the batch, and end with the same weights, average, losses and verdicts.
    """

    runtime: Runtime
    model: DetectionModel
    optimizer: torch.optim.Optimizer
    gains: LossGains
    keeps_gradients: bool = False  # those of the next update
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # the kept ones, clipped, by parameter
    average: WeightAverage = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    health: StepHealth = field(init=False)
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.average = WeightAverage(self.model)
        self.scaler = self.runtime.grad_scaler()
        self.health = StepHealth(self.runtime.device)
        self.clock = self.runtime.step_clock()
        self._statistics = RunningStatistics(self.model)
        self._head = self.model.head
        self._parameters = trained_parameters(self.optimizer)
        self._ranks = self.runtime.ranks
        self._replicas = self.runtime.replicas(self.model)
        self._network = self.runtime.compiled(self._replicas)
        self._losses = self.runtime.compiled(detection_losses)

    def __call__(self, batch: Batch | UnpaintedBatch, settings: StepSettings) -> Losses:
        apply_settings(self.optimizer, settings)
        batch = batch.to(self.runtime.device)  # paints it, where that is still to be done
        self.clock.lap("transfer")
        batch = resized(batch, settings.scale, max(self._head.strides))
        with self._ranks.reduces(self._replicas, settings.update):
            with self.runtime.autocast():
                predictions = self._network(self.runtime.network_input(batch.images))
            self.clock.lap("forward")
            labels = pad_labels(batch) if self.runtime.compiles_network else batch
            own = self._losses(predictions, labels, self._head, self.gains, over_ranks=self._ranks.sum)
            losses = self._of_all_ranks(own)
            self.clock.lap("loss")
            share = self.health.batch(losses, batch.indices, settings.place)
            # gradients are means over the ranks, and those of the parts add up to that of the whole
            self.scaler.scale(own.total * (self._ranks.count * share)).backward()
        self._statistics.saw(batch.part)
        self.clock.lap("backward")
        if settings.update:
            self._update()
            self.clock.lap("optimizer")
        return losses

    def _of_all_ranks(self, own: Losses) -> Losses:
        """The losses of the whole batch, for people and for `health`."""
        parts = torch.stack([own.box, own.objectness, own.classification, own.total.detach()])
        box, objectness, classification, total = self._ranks.sum(parts)
        return Losses(box=box, objectness=objectness, classification=classification, total=total)

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        skip = ~norm.isfinite()
        if self.keeps_gradients:
            self.keeps_gradients = False
            self.gradients = {
                name: one.grad.clone() for name, one in self.model.named_parameters() if one.grad is not None
            }
        self._statistics.agree(self._ranks)  # before anything moves: should another rank be gone, nothing has
        guarded_step(self.optimizer, skip)  # not scaler.step: one verdict holds for all that an update moves
        self._update_scale()
        self.optimizer.zero_grad()
        self._statistics.settle(skip)
        self.average.update(self.model, skip)
        self.health.update(skip, scaled=self.scaler.is_enabled())

    def _update_scale(self) -> None:
        """As the scaler does; but of a loss that is no number it learns nothing."""
        if not self.scaler.is_enabled():
            return
        scale = self.scaler._get_scale_async()
        before = scale.clone()
        self.scaler.update()
        self.scaler.update(torch.where(self.health.lost(), before, scale))

    def roll_back(self) -> None:
        """Be as after the last update: what came since is forgotten."""
        self.optimizer.zero_grad()
        self._statistics.roll_back()
        self.health.roll_back()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict(),
            "ema_updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, also in the midst of an update; other entries are left aside."""
        self.optimizer.zero_grad()
        self.model.load_state_dict(state["model"])
        self._statistics.keep()
        self.average.model.load_state_dict(state["ema"])
        self.average.updates = state["ema_updates"]
        restore_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # else the run came from a device that needs none
            self.scaler.load_state_dict(state["scaler"])
        self.health.load_state_dict(state["health"])
