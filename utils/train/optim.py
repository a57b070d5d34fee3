"""Parameter groups, the schedule as a pure function of the step, and the moving average of the weights."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn

from utils.hyp import Hyperparameters

NOMINAL_BATCH = 64
_MIN_UPDATES = 1000  # fewer optimizer updates than this in a run, and the nominal batch is lowered
_MIN_WARMUP_BATCHES = 100
_EMA_DECAY = 0.9999
_EMA_RAMP = 2000


# ---- nominal batch ------------------------------------------------------------------------------------------------


def choose_accumulation(nominal_batch: str, *, batch_size: int, batches_per_epoch: int, epochs: int) -> int:
    """Batches per optimizer update for `--nominal-batch`; auto lowers 64 until a run has some 1,000 updates."""
    if nominal_batch != "auto":
        return max(round(int(nominal_batch) / batch_size), 1)
    accumulation = max(round(NOMINAL_BATCH / batch_size), 1)
    while accumulation > 1 and epochs * math.ceil(batches_per_epoch / accumulation) < _MIN_UPDATES:
        accumulation -= 1
    return accumulation


# ---- schedule -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What one batch is trained with."""

    lrs: tuple[float, float, float]  # batch-norm weights, other weights, biases
    momentum: float
    update: bool  # the optimizer steps after this batch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Calling it with the number of a batch, counted over the whole run, gives its StepSettings."""

    hyp: Hyperparameters
    epochs: int
    batches_per_epoch: int
    accumulation: int  # batches per update after warm-up
    linear: bool = False

    def __call__(self, step: int) -> StepSettings:
        epoch, index = divmod(step, self.batches_per_epoch)
        lr = self.hyp.lr0 * self.factor(epoch)
        share = self._warmup_share(step)
        accumulation = self._accumulation(step)
        return StepSettings(
            lrs=(share * lr, share * lr, share * lr + (1 - share) * self.hyp.warmup_bias_lr),
            momentum=share * self.hyp.momentum + (1 - share) * self.hyp.warmup_momentum,
            update=(index + 1) % accumulation == 0
            or self._accumulation(step + 1) > accumulation  # else the next update could hold up to twice as many
            or index + 1 == self.batches_per_epoch,
        )

    def _warmup_share(self, step: int) -> float:
        """How much of warm-up lies behind, from 0 to 1."""
        return min(step / self.warmup_batches, 1.0) if self.warmup_batches else 1.0

    def _accumulation(self, step: int) -> int:
        """Batches per update at a batch: from 1 up to the final value during warm-up."""
        return round(1 + self._warmup_share(step) * (self.accumulation - 1))

    @property
    def warmup_batches(self) -> int:
        """Of warm-up: at least 100, at most half the run, none for warmup_epochs 0."""
        if self.hyp.warmup_epochs == 0:
            return 0
        wanted = max(round(self.hyp.warmup_epochs * self.batches_per_epoch), _MIN_WARMUP_BATCHES)
        return min(wanted, self.epochs * self.batches_per_epoch // 2)

    def factor(self, epoch: int) -> float:
        """The learning rate of an epoch as a share of lr0: from 1 to lrf, along a half cosine or a line."""
        progress = epoch / self.epochs
        if self.linear:
            return (1 - progress) * (1 - self.hyp.lrf) + self.hyp.lrf
        return (1 - math.cos(math.pi * progress)) / 2 * (self.hyp.lrf - 1) + 1


# ---- optimizer ----------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, hyp: Hyperparameters, *, weight_decay: float) -> torch.optim.SGD:
    """Nesterov SGD over three groups: batch-norm weights, other weights (these alone decay), biases."""
    norms, weights, biases = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                biases.append(parameter)
            elif isinstance(module, nn.BatchNorm2d):
                norms.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"params": norms, "weight_decay": 0.0},
        {"params": weights, "weight_decay": weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    return without_compiler(torch.optim.SGD)(groups, lr=hyp.lr0, momentum=hyp.momentum, nesterov=hyp.momentum > 0)


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without its ties to torch.compile, whose import would double the time until a first step.

    torch wraps these methods so that a compiled program need not look into them. No part of ours compiles an optimizer.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def apply_settings(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    for group, lr in zip(optimizer.param_groups, settings.lrs):
        group["lr"], group["momentum"] = lr, settings.momentum


# ---- moving average -----------------------------------------------------------------------------------------------


class WeightAverage:
    """Exponential moving average of every floating-point entry of a model's state; `model` is what is evaluated.

    After update n the decay is 0.9999 (1 - exp(-n / 2000)): young averages follow the model closely.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = _EMA_DECAY * (1 - math.exp(-self.updates / _EMA_RAMP))
        averaged, latest = [], []
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values()):
            if mine.is_floating_point():
                averaged.append(mine)
                latest.append(theirs)
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(averaged, latest, 1 - decay)
