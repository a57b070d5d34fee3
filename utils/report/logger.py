"""The contract of a logger: what it is told, and when.

A new one is a class here below `report/` and a line in `loggers.LOGGERS`; docs/loggers.md has an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from utils.config import TrainOptions
from utils.hyp import Hyperparameters
from utils.report.about import About
from utils.structures import Metrics

Row = Mapping[str, float]  # by column; a column may be missing, and `epoch` counts from 1 as people do
Note = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """What a logger may know of its run from the start."""

    folder: Path
    options: TrainOptions
    hyp: Hyperparameters
    about: About
    model: nn.Module  # that is trained, on its device
    start_epoch: int = 0  # a resumed run starts above 0; what was logged from there on is withdrawn
    note: Note = print  # takes a line for the user
    wandb_id: str | None = None  # of the run in Weights & Biases; None: that is not told

    def is_pictured(self, epoch: int) -> bool:
        """Whether predictions of this epoch, from 1, are shown: the first, the last, and at intervals."""
        every = self.options.bbox_interval
        every = math.ceil(self.options.epochs / 9) if every == -1 else every  # TensorBoard keeps ten of a tag
        return every > 0 and (epoch in (1, self.options.epochs) or epoch % every == 0)


@dataclass(frozen=True, kw_only=True)
class LoggedEpoch:
    """An epoch that is over."""

    number: int  # from 1
    results: Row  # by RESULT_COLUMNS
    timing: Row  # by TIMING_COLUMNS
    metrics: Metrics | None = None  # None: not evaluated
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # weights/NAME and gradients/NAME, --tb-histograms


class Logger:
    """The contract, and at once the null object: each method may be called and does nothing.

    One is made with a LoggedRun, on rank 0 alone, and anew where the run goes back. Whatever it raises ends this logger
    with a warning, never the run, unless it is `essential`.
    """

    essential: ClassVar[bool] = False

    def epoch(self, epoch: LoggedEpoch) -> None:
        """An epoch is over."""

    def images(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        """Pictures (H, W, 3) u8 RGB by tag, after so many epochs."""

    def close(self, result: Metrics | None = None) -> None:
        """Nothing is told afterwards. A run that came to its end has a result, and all its files; else it stopped."""


class Guard:
    """Calls what only shows a run: its first failure is a warning, and then nothing is called any more."""

    def __init__(self, what: str, warn: Note) -> None:
        self.what, self._warn, self.failed = what, warn, False

    def __call__(self, call: Callable[..., Any], *given: Any) -> Any:
        """What the call returns; None after a failure."""
        if self.failed:
            return None
        try:
            return call(*given)
        except Exception as error:
            self.failed = True
            self._warn(f"no more {self.what} in this run, which goes on: {first_line(error)}")
            return None


class Guarded(Logger):
    """A logger that may fail, which is let go then."""

    def __init__(self, make: Callable[[], Logger], guard: Guard) -> None:
        self._guard = guard
        self._logger = guard(make) or Logger()

    def epoch(self, epoch: LoggedEpoch) -> None:
        self._tell(self._logger.epoch, epoch)

    def images(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        self._tell(self._logger.images, pictures, step)

    def close(self, result: Metrics | None = None) -> None:
        self._tell(self._logger.close, result)

    def _tell(self, method: Callable[..., object], *what: Any) -> None:
        self._guard(method, *what)
        if self._guard.failed:
            self._logger = Logger()


def first_line(error: Exception) -> str:
    """What went wrong, for a line that people read."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__
