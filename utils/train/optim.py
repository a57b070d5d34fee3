"""Optimizers, the schedule as a pure function of the step, and the moving average of the weights."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # what all batch norms are, synchronised ones too

from utils.data.plan import SIZE, generator
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
    scale: float = 1.0  # of the network input
    place: tuple[int, int] = (0, 0)  # its epoch, and its number there, both from 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Calling it with the number of a batch, counted over the whole run, gives its StepSettings."""

    hyp: Hyperparameters
    epochs: int
    batches_per_epoch: int
    accumulation: int  # batches per update after warm-up
    linear: bool = False
    seed: int = 0
    scales: tuple[float, ...] = (1.0,)  # each batch draws one

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
            scale=self._scale(epoch, index),
            place=(epoch, index),
        )

    def _scale(self, epoch: int, index: int) -> float:
        if len(self.scales) == 1:
            return self.scales[0]
        return self.scales[int(generator(self.seed, epoch, index, SIZE).integers(len(self.scales)))]

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


def multi_scales(imgsz: int, stride: int) -> tuple[float, ...]:
    """What `--multi-scale` draws from: all whole strides from 0.5 to 1.5 times imgsz, as shares of it."""
    fewest, most = -(-imgsz // (2 * stride)), 3 * imgsz // (2 * stride)
    return tuple(strides * stride / imgsz for strides in range(fewest, most + 1))


# ---- optimizer ----------------------------------------------------------------------------------------------------

_ADAM_BETA2 = 0.999
_SGD_LR0, _SGD_WARMUP_BIAS_LR = 0.01, 0.1
_ADVISED_LR = 0.001
_ASK_FOUND_INF = ("cpu", "cuda")  # devices whose fused kernels do; of those of MPS nobody says so


def make_optimizer(
    model: nn.Module, hyp: Hyperparameters, *, weight_decay: float, kind: str = "SGD"
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS over three groups: batch-norm weights, other weights (these alone decay), biases.

    What is frozen is left out. The step is one fused kernel where torch has it for the device, which also spares a
    GradScaler the wait for the device; else it is a few kernels over lists.
    """
    norms, weights, biases = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif isinstance(module, _BatchNorm):
                norms.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"params": norms, "weight_decay": 0.0},
        {"params": weights, "weight_decay": weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    make = partial(OPTIMIZERS[kind], groups, hyp)
    try:
        return make(fused=True)
    except (RuntimeError, TypeError):  # torch says so where it has no fused kernel, in these two ways
        return make(foreach=True)


def _sgd(groups: list[dict[str, Any]], hyp: Hyperparameters, **way: bool) -> torch.optim.SGD:
    """Nesterov's. Its momentum starts as zeros, which is what the first gradient makes of none.

    Left to torch, the fused step would start from memory as it lies where a GradScaler skips the first step.
    """
    optimizer = without_compiler(torch.optim.SGD)(
        groups, lr=hyp.lr0, momentum=hyp.momentum, nesterov=hyp.momentum > 0, **way
    )
    for parameter in trained_parameters(optimizer):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adam(groups: list[dict[str, Any]], hyp: Hyperparameters, **way: bool) -> torch.optim.Adam:
    return without_compiler(torch.optim.Adam)(groups, lr=hyp.lr0, betas=(hyp.momentum, _ADAM_BETA2), **way)


def _adamw(groups: list[dict[str, Any]], hyp: Hyperparameters, **way: bool) -> torch.optim.AdamW:
    return without_compiler(torch.optim.AdamW)(groups, lr=hyp.lr0, betas=(hyp.momentum, _ADAM_BETA2), **way)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"SGD": _sgd, "Adam": _adam, "AdamW": _adamw}


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without its ties to torch.compile, whose import would double the time until a first step.

    torch wraps these methods so that a compiled program need not look into them. No part of ours compiles an optimizer.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def apply_settings(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Learning rates and momentum, which is beta1 of the Adams."""
    for group, lr in zip(optimizer.param_groups, settings.lrs):
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (settings.momentum, group["betas"][1])
        else:
            group["momentum"] = settings.momentum


def guarded_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Step, but leave parameters and state as they are if `skip`, a () bool on the device of the parameters.

    A fused kernel reads that itself, as it does for a GradScaler, so that nobody waits for the device; else we do.
    """
    fused = all(group["fused"] for group in optimizer.param_groups)
    if fused and skip.device.type in _ASK_FOUND_INF:
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skip:
        optimizer.step()


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up a saved state; how steps are computed stays what suits this machine."""
    ways = [{way: group[way] for way in ("fused", "foreach")} for group in optimizer.param_groups]
    groups = [{**group, **way} for group, way in zip(state["param_groups"], ways)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def rates_of_sgd(kind: str, hyp: Hyperparameters) -> str | None:
    """A line for whoever runs an Adam with learning rates that are made for SGD, else None."""
    high = [
        f"{name}: {value:g}"
        for name, value, usual in (
            ("lr0", hyp.lr0, _SGD_LR0),
            ("warmup_bias_lr", hyp.warmup_bias_lr, _SGD_WARMUP_BIAS_LR),
        )
        if value >= usual
    ]
    if kind == "SGD" or not high:
        return None
    advised = ", ".join(f"{entry.split(':')[0]}: {_ADVISED_LR}" for entry in high)
    return f"{kind} runs with learning rates made for SGD ({', '.join(high)}): put {advised} into the --hyp file"


# ---- moving average -----------------------------------------------------------------------------------------------


class WeightAverage:
    """Exponential moving average of every floating-point entry of a model's state; `model` is what is evaluated.

    After update n the decay is 0.9999 (1 - exp(-n / 2000)): young averages follow the model closely.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0
        self._source: nn.Module | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor | None = None) -> None:
        """Move towards `model`, whose tensors stay where they are between updates: looking them up takes longer.

        But not if `skip`, a () bool on their device. Such an update counts nevertheless: `updates` are those that were
        due, which is known without waiting for the device.
        """
        if model is not self._source:
            self._pair_up(model)
        self.updates += 1
        weight = 1 - _EMA_DECAY * (1 - math.exp(-self.updates / _EMA_RAMP))
        if skip is not None and skip.is_cuda:
            blend_unless(skip, *self._averaged, weight)
        elif skip is None or not skip:
            torch._foreach_lerp_(*self._averaged, weight)
        else:
            return
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    def _pair_up(self, model: nn.Module) -> None:
        """The entries of both states, (mine, theirs): those that are averaged, and counters, which are copied."""
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values()))
        self._averaged, self._copied = (
            _columns([pair for pair in pairs if pair[0].is_floating_point() is averaged]) for averaged in (True, False)
        )
        self._source = model


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def blend_unless(skip: Tensor, mine: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    """mine += weight (theirs - mine), unless `skip`, which nobody waits for."""
    steps = torch._foreach_sub(theirs, mine)
    torch._foreach_mul_(steps, torch.where(skip, 0.0, weight))
    torch._foreach_add_(mine, steps)
