"""A worker of a study: it asks for trials, runs them and tells what they gave, until as many are finished as shall be.

Any number of workers share a study, each for itself. The surprise: none of them is in charge. How many trials are done,
whose turn it is and which were lost is what the study's storage says, at any moment, to whoever asks.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, TrialPruned, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from utils.evolve.history import FAILURE, RESULTS, SECONDS, SURPLUS, is_lost
from utils.evolve.storage import Storage, with_patience
from utils.stopping import StopRequest
from utils.structures import UserError

ID = "id"  # user attribute of a study: a name that no other has
HEARTBEAT_S = 5
_PATIENCE_S = 600.0  # with a storage that is away
_SETTLING_S = 0.1
_WAIT_S = 2.0  # between looks at whether other workers have done what is left
_LOOK_S = 0.2  # between looks at whether a signal has come


Result = TypeVar("Result")


class TrialFailed(Exception):
    """A trial has failed by its own doing; the text says why."""


class _Lost(Exception):
    """Others have taken this worker for lost, and its trial for theirs."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial gave."""

    fitness: float
    results: Mapping[str, float]  # by history.RESULT_NAMES
    epochs: int  # after which it gave them


Report = Callable[[int, float, Mapping[str, float]], None]  # epoch, fitness, results; it raises what ends the trial
Objective = Callable[[Mapping[str, Any], Report], Outcome]  # of the values of the genes; raises TrialFailed


class Watch:
    """Hears of what a worker does. This class keeps it to itself: the null object."""

    def started(self, number: int) -> None:
        """The trial of this number begins."""

    def finished(self, number: int, trials: Sequence[FrozenTrial]) -> None:
        """It is over, and counts; and these are all trials of the study."""

    def waits(self, numbers: Sequence[int]) -> None:
        """There is nothing left but trials that other workers are at."""

    def warn(self, text: str) -> None:
        """A line for the user."""


# ---- opening ------------------------------------------------------------------------------------------------------


def open_study(name: str, storage: Storage, *, sampler: BaseSampler, pruner: BasePruner) -> Study:
    """The study of this name, new or joined."""
    with quiet_optuna():
        study = optuna.create_study(
            storage=storage.backend,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            sampler=sampler,
            pruner=pruner,
        )
        if ID not in study.user_attrs:
            study.set_user_attr(ID, uuid.uuid4().hex)
    return study


def agreed(study: Study, key: str, mine: Any) -> Any:
    """What the study says of itself under this key: `mine`, if nobody was faster."""
    if key not in study.user_attrs:
        study.set_user_attr(key, mine)
        time.sleep(_SETTLING_S)  # of two that are as fast, the one that stays is the other's, too
    return study.user_attrs[key]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without what Optuna tells of each trial, and of what it calls experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # heartbeats are recorded here, without `Study.optimize`
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
            # of a trial that was handed back
            warnings.filterwarnings("ignore", message="The reported value is ignored")
            yield
    finally:
        optuna.logging.set_verbosity(before)


# ---- working ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of those that work on a study until `goal` trials have finished, pruned and failed ones among them."""

    study: Study
    storage: Storage
    distributions: Mapping[str, BaseDistribution]
    goal: int
    objective: Objective
    watch: Watch
    stop: StopRequest
    heartbeat_s: float = HEARTBEAT_S

    def work(self) -> bool:
        """Whether the goal is reached. Where the storage cannot know lost trials, others may still be at the last ones.

        Raises Interrupted when a signal asks to stop, and UserError for a mistake that all trials would meet with; the
        trial under way is for others then.
        """
        told = False
        with quiet_optuna():
            while True:
                self.stop.check()
                self._patient(self.storage.fail_stale, self.study)
                counted = self._counted()
                if len(counted) == self.goal and all(trial.state.is_finished() for trial in counted):
                    return True
                if len(counted) < self.goal or any(trial.state == TrialState.WAITING for trial in counted):
                    self._run_next()
                elif self.storage.finds_lost:
                    if not told:
                        self.watch.waits([trial.number for trial in counted if not trial.state.is_finished()])
                        told = True
                    self._wait()
                else:
                    return False

    def _trials(self) -> Sequence[FrozenTrial]:
        return sorted(self._patient(self.study.get_trials, deepcopy=False), key=lambda trial: trial.number)

    def _counted(self) -> Sequence[FrozenTrial]:
        """The first trials, up to the goal, that were not lost: once all of these have finished, all is done."""
        return [trial for trial in self._trials() if not is_lost(trial)][: self.goal]

    def _run_next(self) -> None:
        trial = self._patient(self._asked)
        with self._heartbeats(trial):
            if any(one.number == trial.number for one in self._counted()):
                self._run(trial)
            else:  # several have asked for the last one
                self._note(trial, SURPLUS, True)
                self._tell(trial, TrialState.FAIL)

    def _asked(self) -> Trial:
        """The next trial, which shows a sign of life before it is taken, in case this worker is lost right then."""
        if not self._waiting():
            self.study.add_trial(optuna.create_trial(state=TrialState.WAITING))
        for trial in self._waiting():
            self.storage.record_heartbeat(trial)
        return self.study.ask(fixed_distributions=dict(self.distributions))

    def _waiting(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _run(self, trial: Trial) -> None:
        self.watch.started(trial.number)
        began = time.monotonic()
        value, state = None, TrialState.COMPLETE
        try:
            outcome = self.objective(trial.params, partial(self._reported, trial))
            if not math.isfinite(outcome.fitness):
                raise TrialFailed(f"its fitness is {outcome.fitness}")
            value = outcome.fitness
            self._note(trial, RESULTS, dict(outcome.results))
            self._patient(trial.report, value, outcome.epochs)
        except TrialPruned:
            state = TrialState.PRUNED
        except TrialFailed as failure:
            state = TrialState.FAIL
            self._note(trial, FAILURE, str(failure))
        except (_Lost, UpdateFinishedTrialError):
            return
        except UserError:
            with suppress(Exception):  # else it will be found lost
                self.storage.hand_back(trial)
            raise
        except KeyboardInterrupt:
            with suppress(Exception):
                self.storage.queue_again(self.study, trial)
            raise
        self._note(trial, SECONDS, time.monotonic() - began)
        if self._tell(trial, state, value):
            self.watch.finished(trial.number, self._trials())

    def _tell(self, trial: Trial, state: TrialState, value: float | None = None) -> bool:
        """Whether that is how it has ended; else it was taken for lost."""
        with suppress(UpdateFinishedTrialError):
            told = self._patient(self.study.tell, trial, value, state=state, skip_if_finished=True)
            return told.state == state and not is_lost(told)
        return False

    def _reported(self, trial: Trial, epoch: int, fitness: float, results: Mapping[str, float]) -> None:
        self._note(trial, RESULTS, dict(results))
        try:
            self._patient(trial.report, fitness, epoch)
            prune = self._patient(trial.should_prune)
        except UpdateFinishedTrialError:
            raise _Lost from None
        if prune:
            raise TrialPruned

    def _note(self, trial: Trial, key: str, value: Any) -> None:
        with suppress(UpdateFinishedTrialError):
            self._patient(trial.set_user_attr, key, value)

    @contextmanager
    def _heartbeats(self, trial: Trial) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._show_life, args=(trial, over), name="heartbeats", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _show_life(self, trial: Trial, over: threading.Event) -> None:
        while True:
            with suppress(Exception):  # the next may reach the storage again
                self.storage.record_heartbeat(trial)
            if over.wait(self.heartbeat_s):
                return

    def _patient(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """What a call of the storage gives, which may be away for a while."""
        return with_patience(
            partial(call, *args, **kwargs),
            shown=self.storage.shown,
            patience_s=_PATIENCE_S,
            say=self.watch.warn,
            wait=self._wait,
        )

    def _wait(self, seconds: float = _WAIT_S) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.stop.check()
            time.sleep(_LOOK_S)
