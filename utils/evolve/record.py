"""What a study leaves in its folder: evolve.csv, hyp_evolved.yaml and evolve.png.

The surprise: whoever writes reads the study after taking the lock, not before. So a worker that was slow to get there
never puts older rows over newer ones.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import Study
from optuna.trial import TrialState

from utils.evolve.history import CONFIRMED, RESULT_NAMES, Finished, best, finished_of
from utils.files import from_here, locked, write_text, write_yaml
from utils.report.csv_table import csv_text, on_one_line
from utils.report.evolution import Range, plot_evolution

CSV_NAME, HYP_NAME, PICTURE_NAME = "evolve.csv", "hyp_evolved.yaml", "evolve.png"

LOCK_NAME = ".evolve.lock"
PATIENCE_S = 30.0  # with who holds it: writing takes well under a second
_FEW_TRIALS = 8  # complete; importances of so few would be noise
_TOP, _LEAST_TOP = 0.1, 5  # PED-ANOVA asks what sets the best tenth apart, which should be five trials at least


class StudyRecord:
    """evolve.csv and hyp_evolved.yaml of a study, which any of its workers may write."""

    def __init__(self, folder: Path, *, names: Sequence[str]) -> None:
        """`names` are the columns of hyperparameters, in their order."""
        self.folder = folder
        self._names = tuple(names)

    def write(self, study: Study, hyp: Mapping[str, Any]) -> bool:
        """Make both files agree with the study; a trial has the plain values `hyp`, but for its own.

        hyp_evolved.yaml is the confirmed winner (history.CONFIRMED) while no trial has finished since, else the best so
        far; there is none before a trial is complete. False, and nothing is written, where another worker stays in the
        lock for half a minute, as one that was stopped does. An OSError names the file.
        """
        with alone(self.folder / LOCK_NAME, patience_s=PATIENCE_S) as is_alone:
            if is_alone:
                trials = finished_of(study)
                write_text(self.folder / CSV_NAME, self._table(trials, hyp))
                self._write_hyp(study, trials, hyp)
        return is_alone

    def _table(self, trials: Sequence[Finished], hyp: Mapping[str, Any]) -> str:
        columns = ("trial", "state", "fitness", *RESULT_NAMES, *self._names, "seconds", "epochs", "failure")
        given = {name: _exact(hyp.get(name)) for name in self._names}
        return csv_text(columns, [self._row(trial, given) for trial in trials])

    def _row(self, trial: Finished, given: Mapping[str, str]) -> dict[str, float | str]:
        return {
            **given,
            **{name: _exact(value) for name, value in trial.values.items()},
            "trial": trial.number,
            "state": trial.state,
            "fitness": _exact(trial.fitness),
            **{name: trial.results[name] for name in RESULT_NAMES if name in trial.results},
            "seconds": trial.seconds,
            "epochs": trial.epochs,
            "failure": trial.failure,
        }

    def _write_hyp(self, study: Study, trials: Sequence[Finished], hyp: Mapping[str, Any]) -> None:
        confirmed, winner = study.user_attrs.get(CONFIRMED, {}), best(trials)
        path, of = self.folder / HYP_NAME, f"study {study.study_name}; its trials: {_counts(trials)}"
        if confirmed.get("trials") == len(trials):
            comments = [f"Of {of}", *_confirmed_lines(confirmed, trials)]
            write_hyp(path, {**hyp, **confirmed["values"]}, comments)
        elif winner is not None:
            write_hyp(path, {**hyp, **winner.values}, [f"The best so far of {of}", *_result_lines(winner)])


@contextmanager
def alone(lock: Path, *, patience_s: float) -> Iterator[bool]:
    """Whether this file, made where there is none, is ours until the end of the block, or of this process."""
    lock.touch()  # not the folder itself: who claims a run's folder keeps it for long
    handle = locked(lock, patience_s=patience_s)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def write_hyp(path: Path, values: Mapping[str, Any], comments: Sequence[str]) -> None:
    """A hyp YAML for `--hyp` that begins with its command, then `comments`, one a line. What is None is left out."""
    lines = [f"python train.py --hyp {shlex.quote(str(from_here(path.absolute())))}", *comments]
    header = "".join(f"# {on_one_line(line)}\n" for line in lines)
    write_yaml(path, {name: _plain(value) for name, value in values.items() if value is not None}, header=header)


def _counts(trials: Sequence[Finished]) -> str:
    states = Counter(trial.state for trial in trials)
    return f"{states['complete']} complete, {states['pruned']} pruned, {states['failed']} failed"


def _confirmed_lines(confirmed: Mapping[str, Any], trials: Sequence[Finished]) -> list[str]:
    if confirmed["trial"] is None:
        return [
            f"The confirmed winner: the {confirmed['name']}",
            *confirmed["comments"],
        ]
    results = [line for trial in trials if trial.number == confirmed["trial"] for line in _result_lines(trial)]
    return [f"The confirmed winner: {confirmed['name']}, which gave in the sweep:", *results, *confirmed["comments"]]


def _result_lines(trial: Finished) -> list[str]:
    results = ", ".join(f"{name} {trial.results[name]:.4g}" for name in RESULT_NAMES if name in trial.results)
    return [f"trial {trial.number}: fitness {trial.fitness!r}", *([results] if results else [])]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _exact(value: Any) -> str:
    """The shortest text that reads back as the same number; empty for None."""
    return "" if value is None else str(_plain(value))


def importances(study: Study) -> dict[str, float]:
    """The share of each gene in what sets the best trials apart, the largest first, by PED-ANOVA (arXiv 2304.10255).

    Empty where fewer than 8 trials are complete, or all came out the same.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    known = [trial for trial in complete if np.isfinite(trial.value)]
    if len(known) < _FEW_TRIALS or len({trial.value for trial in known}) == 1:
        return {}
    genes = set.intersection(*(set(trial.params) for trial in known))
    varied = [name for name in known[0].params if name in genes and len({trial.params[name] for trial in known}) > 1]
    if not varied:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of the evaluator, in Optuna 4
        warnings.filterwarnings("ignore", "Target and region quantiles select the same")  # all shares are 0 then
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(_TOP, min(_LEAST_TOP / len(known), 0.5)))
        shares = evaluator.evaluate(study, params=varied)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()} if total > 0 else {}


def draw(study: Study, genes: Mapping[str, Range], folder: Path) -> None:
    """evolve.png of what the study holds now."""
    trials = finished_of(study)
    winner = best(trials)
    plot_evolution(
        folder / PICTURE_NAME,
        trials=trials,
        genes=genes,
        importances=importances(study),
        best=None if winner is None else winner.number,
    )
