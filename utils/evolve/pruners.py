"""What ends bad trials early: the epochs at which trials are judged, and who judges.

A trial is planned for all of its epochs from the first, so its rates have the shape of a full run's at every rung, and
one that survives simply goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from utils.structures import UserError

FACTOR = 2  # between rungs; about one in so many of those that reach one goes on: with fewer, parents run short
_FIRST = 0.2  # of the epochs, the first rung
_LATEST = 0.5  # of the epochs: a later rung would save little
LEAST_EPOCHS = 2


def rungs(epochs: int, pruner: str) -> tuple[int, ...]:
    """The epochs, from 1, after which a trial of so many is judged, the second FACTOR times the first.

    Raises UserError where there is none and `pruner` needs one.
    """
    if pruner == "none":
        return ()
    first = max(round(_FIRST * epochs), 1)
    kept = tuple(step for step in (first, first * FACTOR) if step <= epochs * _LATEST)
    if not kept:
        raise UserError(
            f"--evolve-pruner {pruner}: a trial of {epochs} epoch{'s' * (epochs > 1)} has none to be judged at early; "
            f"use --epochs {LEAST_EPOCHS} or more, or --evolve-pruner none"
        )
    return kept


def make_pruner(name: str, epochs: int) -> BasePruner:
    """Of the table, for trials of so many epochs."""
    steps = rungs(epochs, name)
    return PRUNERS[name](steps[0] if steps else 0, epochs)


PRUNERS: dict[str, Callable[[int, int], BasePruner]] = {  # of the first rung and the epochs
    "asha": lambda first, _: SuccessiveHalvingPruner(min_resource=first, reduction_factor=FACTOR),
    "hyperband": lambda first, epochs: HyperbandPruner(
        min_resource=first, max_resource=epochs, reduction_factor=FACTOR
    ),
    "median": lambda *_: MedianPruner(n_startup_trials=5),
    "none": lambda *_: NopPruner(),
}
