"""What makes a study this one: the options, genes, hyperparameters, network and data that all of its workers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.study import Study

from utils.evolve import space
from utils.evolve.study import agreed
from utils.structures import UserError
from utils.sweep.options import Sweep

_WORK = "work"  # user attribute of a study: what its trials train, as the first one found it


def differences(sweep: Sweep, study: Study) -> list[str]:
    """What it was begun with that this worker has otherwise, in words: options, genes, hyperparameters."""
    mine, hyp, genes = sweep.alike, sweep.plain_hyp, sweep.space.plain()
    theirs = agreed(study, "options", mine)
    differ = [
        f"{flag} {_shown(theirs.get(flag))} there, {_shown(value)} here"
        for flag, value in mine.items()
        if theirs.get(flag) != value
    ]
    differ += space.differences(genes, agreed(study, "space", genes))
    their_hyp = agreed(study, "hyp", hyp)
    differ += [
        f"{name}: {their_hyp.get(name)} there, {value} here (--hyp)"
        for name, value in hyp.items()
        if their_hyp.get(name) != value and name not in sweep.space.names
    ]
    return differ


class Work:
    """What the trials of a study train, as far as it is known yet."""

    def __init__(self, sweep: Sweep, study: Study) -> None:
        self._sweep, self._study = sweep, study
        self._agreed: Mapping[str, Any] = study.user_attrs.get(_WORK, {})

    @property
    def options(self) -> dict[str, Any]:
        """Of a trial, the batch size that the first one has found among them."""
        found = {"batch_size": self._agreed["--batch-size"]} if self._agreed else {}
        return {**self._sweep.trial_options, **found}

    def check(self, mine: Mapping[str, Any]) -> None:
        """Raises UserError where a trial of this worker would train something else."""
        if not self._agreed:
            self._agreed = agreed(self._study, _WORK, dict(mine))
        differ = [name for name, value in mine.items() if self._agreed.get(name) != value]
        refuse(self._sweep, [f"{name} there and here are not the same" for name in differ])


def refuse(sweep: Sweep, differ: list[str]) -> None:
    """Raises UserError where there is any difference."""
    if differ:
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise UserError(
            f"the study {sweep.options.name} in {sweep.folder} is another: {differ[0]}{more}; use what it was begun "
            "with, or begin another study with --name"
        )


def _shown(value: Any) -> str:
    return "nothing" if value in ("", None, []) else str(value)
