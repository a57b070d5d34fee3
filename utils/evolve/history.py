"""What the trials of a study mean to evolution: which of them count, which were lost, what they gave.

The surprise: Optuna knows one kind of failure, and here are two. A trial that failed by its own doing says so in a user
attribute and counts; one that was lost with its worker does not, and another with its values takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

RESULT_NAMES = ("precision", "recall", "mAP_0.5", "mAP_0.5:0.95", "val/box_loss", "val/obj_loss", "val/cls_loss")

# User attributes of a trial
FAILURE = "failure"  # one line: why it failed by its own doing
RESULTS = "results"  # the last that it gave, by RESULT_NAMES
SECONDS = "seconds"  # that it took
SURPLUS = "surplus"  # it was asked for when all had been given out, and never run

# User attribute of a study, once its best trials were trained again: {"trials": how many had finished by then, "name":
# of the winner, "default" or "trial 12", "trial": 12, or None for the default, "values": of its genes, or the whole
# given hyp for the default, "comments": lines of evidence}. Trials that finish later make it void
CONFIRMED = "confirmed"

State = Literal["complete", "pruned", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A trial that counts."""

    number: int
    state: State
    values: Mapping[str, Any]  # of the genes
    fitness: float | None  # None where it failed; of a pruned one, that at its last rung
    results: Mapping[str, float]  # by RESULT_NAMES; empty where there was no evaluation
    seconds: float
    epochs: int  # after which it was last evaluated, as it reported; 0 where it never was
    failure: str = ""


def is_lost(trial: FrozenTrial) -> bool:
    """Whether it was never run to its end: its worker was lost, or stopped, or had no need of it."""
    return trial.state == TrialState.FAIL and FAILURE not in trial.user_attrs


def finished(trials: Iterable[FrozenTrial]) -> list[Finished]:
    """Those that count, by number."""
    counted = [trial for trial in trials if trial.state.is_finished() and not is_lost(trial)]
    return [_finished(trial) for trial in sorted(counted, key=lambda trial: trial.number)]


def finished_of(study: Study) -> list[Finished]:
    return finished(study.get_trials(deepcopy=False))


def best(trials: Sequence[Finished]) -> Finished | None:
    """The complete trial of the highest fitness, of equals the first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return max(complete, key=lambda trial: trial.fitness, default=None)


def _finished(trial: FrozenTrial) -> Finished:
    reported = trial.intermediate_values
    return Finished(
        number=trial.number,
        state=_STATES[trial.state],
        values=trial.params,
        fitness=_fitness(trial),
        results=trial.user_attrs.get(RESULTS, {}),
        seconds=trial.user_attrs.get(SECONDS, 0.0),
        epochs=max(reported, default=0),
        failure=trial.user_attrs.get(FAILURE, ""),
    )


def _fitness(trial: FrozenTrial) -> float | None:
    if trial.state == TrialState.COMPLETE:
        return trial.value
    reported = trial.intermediate_values
    return reported[max(reported)] if trial.state == TrialState.PRUNED and reported else None
