"""Whether the numbers of training are finite: updates that were skipped as they were not, and means over the rest.

The surprise: nothing here is known at once. Verdicts stay on the device, and `StepHealth.poll` reads many in one wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.ranks import Ranks
from utils.structures import BadUpdate, Losses, LossMeans, NamedBatch, Part

_READ_AFTER = 16  # updates


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """What became known since the report before."""

    bad: tuple[BadUpdate, ...]
    in_row: int  # bad updates up to the last one that is known
    longest: int  # such row since the report before, which a good update may have ended meanwhile
    skipped: int  # bad updates of this epoch


@dataclass(kw_only=True)
class _Update:
    """An update and what the device will say of it: () bool tensors."""

    batches: list[NamedBatch] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)  # of each batch: its loss
    skipped: Tensor | None = None  # None: still to come
    scaled: bool = False


class StepHealth:
    """Counts, names and averages what a TrainStep goes through.

    An update is bad if the loss of one of its batches or its gradient is not finite. Where a GradScaler is at work, an
    overflow of the gradient alone is its way of finding a scale: such an update is skipped, but neither counts as bad
    nor ends a row of bad ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)  # of box, objectness and classification loss, over images
        self.images = torch.zeros((), dtype=torch.int64, device=device)  # of this epoch whose batch had a finite loss
        self._settled = self.sums.clone(), self.images.clone()  # as they were after the last update
        self._in_row = self._longest = self._skipped = 0
        self._bad: list[BadUpdate] = []
        self._waiting: list[_Update] = []
        self._current = _Update()

    def start_epoch(self) -> None:
        """Means and the number of skipped updates begin anew."""
        self._read()
        self.sums.zero_()
        self.images.zero_()
        self._settle()
        self._skipped = 0

    def batch(self, losses: Losses, indices: Tensor, place: tuple[int, int]) -> Tensor:
        """Take note of a batch. What to multiply its total by: 1, or NaN if the total is not finite.

        Thus the norm of the gradient, summed over batches and ranks, tells of such a loss as well, and all ranks agree.
        """
        finite = losses.total.detach().isfinite()
        parts = torch.stack([losses.box, losses.objectness, losses.classification]).detach()
        self.sums += torch.where(finite, len(indices) * parts, 0.0)
        self.images += len(indices) * finite
        epoch, index = place
        self._current.batches.append(NamedBatch(epoch=epoch, index=index, images=tuple(indices.tolist())))
        self._current.finite.append(finite)
        return torch.where(finite, 1.0, math.nan)

    def update(self, skipped: Tensor, *, scaled: bool) -> None:
        """Take note of the update that the batches so far made: whether it was skipped, () bool on the device.

        `scaled`: a GradScaler is at work.
        """
        self._current.skipped, self._current.scaled = skipped, scaled
        self._waiting.append(self._current)
        self._current = _Update()
        self._settle()

    def _settle(self) -> None:
        torch._foreach_copy_(self._settled, (self.sums, self.images))

    def roll_back(self) -> None:
        """Forget the batches since the last update."""
        torch._foreach_copy_((self.sums, self.images), self._settled)
        self._current = _Update()

    def lost(self) -> Tensor:
        """Whether a loss since the last update was not finite, () bool on the device."""
        return ~torch.stack(self._current.finite).all()

    def poll(self, *, now: bool = False) -> HealthReport:
        """What is known; the device is waited for after every 16th update, and where it must be known `now`."""
        if now or len(self._waiting) >= _READ_AFTER:
            self._read()
        report = HealthReport(bad=tuple(self._bad), in_row=self._in_row, longest=self._longest, skipped=self._skipped)
        self._bad, self._longest = [], self._in_row
        return report

    def means(self) -> LossMeans:
        """Of this epoch so far, over the images of batches whose loss was finite; NaN if there are none. Waits."""
        box, objectness, classification = (self.sums / self.images).tolist()
        return LossMeans(box=box, objectness=objectness, classification=classification)

    def _read(self) -> None:
        flags = [flag for update in self._waiting for flag in (*update.finite, update.skipped)]
        said = iter(torch.stack(flags).tolist() if flags else [])
        for update in self._waiting:
            self._judge(update, finite=[next(said) for _ in update.finite], skipped=next(said))
        self._waiting = []

    def _judge(self, update: _Update, *, finite: list[bool], skipped: bool) -> None:
        lost = not all(finite)
        if lost or (skipped and not update.scaled):
            named = [batch for batch, sound in zip(update.batches, finite) if not (lost and sound)]
            self._bad.append(BadUpdate(what="loss" if lost else "gradient", batches=tuple(named)))
            self._skipped += 1
            self._in_row += 1
            self._longest = max(self._longest, self._in_row)
        elif not skipped:
            self._in_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a run resumed after an update goes on from. What was not polled is not in it."""
        self._read()
        return {"in_row": self._in_row, "skipped": self._skipped, "sums": self.sums, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; all that is noted or known of other updates is forgotten."""
        self._in_row = self._longest = state["in_row"]
        self._skipped = state["skipped"]
        self.sums.copy_(state["sums"])
        self.images.copy_(state["images"])
        self._settle()
        self._bad, self._waiting, self._current = [], [], _Update()


class RunningStatistics:
    """What a model's batch norms remember of past batches, and how it was after the last update that was not skipped.

    A forward pass that is not finite poisons these at once, whatever then becomes of the update. Ranks have each seen
    their parts of the batches: what they go on with is the mean, weighted by how much that was.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and _learns(module)]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._live = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._counters = [buffer for buffer in buffers if not buffer.is_floating_point()]  # of batches, bad ones too
        self._counted = [counter.clone() for counter in self._counters]
        self._own = self._whole = 0  # network inputs since the last update
        if self._live:
            self._kept = torch.cat(self._live)
            self._now = torch.empty_like(self._kept)
            self._views = self._kept.split([len(buffer) for buffer in self._live])

    def keep(self) -> None:
        """Take them as they are, after weights were loaded."""
        self._own = self._whole = 0
        if self._live:
            torch.cat(self._live, out=self._kept)
            torch._foreach_copy_(self._counted, self._counters)

    def saw(self, part: Part | None) -> None:
        """A batch has gone through the network, or a part of it."""
        self._own += part.own if part else 1
        self._whole += part.whole if part else 1

    def agree(self, ranks: Ranks) -> None:
        """Before an update: make them those of all ranks, to be taken up or not when that is settled."""
        if self._live:
            torch.cat(self._live, out=self._now)
            self._now = ranks.mean(self._now, self._own / max(self._whole, 1))
        self._own = self._whole = 0

    def settle(self, skipped: Tensor) -> None:
        """After an update: keep them, or go back to those kept if it was `skipped`, a () bool that nobody waits for."""
        if self._live:
            torch.where(skipped, self._kept, self._now, out=self._kept)
            torch._foreach_copy_(self._live, self._views)
            torch._foreach_copy_(self._counted, self._counters)

    def roll_back(self) -> None:
        """Be as after the last update."""
        self._own = self._whole = 0
        if self._live:
            torch._foreach_copy_(self._live, self._views)
            torch._foreach_copy_(self._counters, self._counted)


def _learns(norm: _BatchNorm) -> bool:
    """What is frozen keeps its statistics."""
    frozen = [not parameter.requires_grad for parameter in norm.parameters()]
    return not (frozen and all(frozen))
