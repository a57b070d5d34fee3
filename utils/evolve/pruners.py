"""What ends bad trials early: the epochs at which trials are judged, and who judges.

A trial is planned for all of its epochs from the first, so its rates have the shape of a full run's at every rung, and
one that survives simply goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from utils.structures import UserError

_FACTOR = 2  # between rungs; about one in so many of those that reach one goes on: with fewer, parents run short
_FEW = 5  # epochs tell little of the end: on bccd their fitness hardly goes with it (docs/benchmarks.md)
_LEAST_EPOCHS = 2


def rungs(epochs: int, pruner: str) -> tuple[int, ...]:
    """The epochs, from 1, after which a trial of so many is judged: half of them, and a quarter where that is not few.

    Raises UserError where there is none and `pruner` needs one.
    """
    if pruner == "none":
        return ()
    if epochs < _LEAST_EPOCHS:
        raise UserError(
            f"--evolve-pruner {pruner}: a trial of {epochs} epoch has none to be judged at early; use --epochs "
            f"{_LEAST_EPOCHS} or more, or --evolve-pruner none"
        )
    quarter = epochs // (2 * _FACTOR)
    return (quarter, _FACTOR * quarter) if quarter >= _FEW else (epochs // 2,)


def make_pruner(name: str, epochs: int) -> BasePruner:
    """Of the table, for trials of so many epochs."""
    steps = rungs(epochs, name)
    return PRUNERS[name](steps[0] if steps else 0, epochs)


PRUNERS: dict[str, Callable[[int, int], BasePruner]] = {  # of the first rung and the epochs
    "asha": lambda first, _: SuccessiveHalvingPruner(min_resource=first, reduction_factor=_FACTOR),
    "hyperband": lambda first, epochs: HyperbandPruner(
        min_resource=first, max_resource=epochs, reduction_factor=_FACTOR
    ),
    "median": lambda *_: MedianPruner(n_startup_trials=5),
    "none": lambda *_: NopPruner(),
}
