"""Studies in memory, for tests: trials as evolution leaves them, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import Study
from optuna.trial import TrialState

from utils.evolve.history import FAILURE, RESULT_NAMES, RESULTS, SECONDS
from utils.hyp import GENES

DISTRIBUTIONS = {
    **{name: FloatDistribution(gene.low, gene.high) for name, gene in GENES.items()},
    "lr0": FloatDistribution(1e-5, 1e-1, log=True),
    "anchors": CategoricalDistribution([None, 3.0, 5.0]),
}


@dataclass(frozen=True)
class Range:
    """What pictures and TensorBoard ask of a gene."""

    low: float
    high: float
    scale: str = "linear"
    choices: tuple[float, ...] = ()


RANGES = {
    **{name: Range(gene.low, gene.high) for name, gene in GENES.items()},
    "lr0": Range(1e-5, 1e-1, "log"),
    "anchors": Range(3.0, 5.0, "choice", (3.0, 5.0)),
}


def new_study(name: str = "exp") -> Study:
    return optuna.create_study(direction="maximize", study_name=name)


def add(
    study: Study,
    state: TrialState = TrialState.COMPLETE,
    *,
    fitness: float = 0.5,
    values: dict[str, float | None] | None = None,
    reports: dict[int, float] | None = None,
    failure: str | None = None,
    results: dict[str, float] | None = None,
    distributions: dict[str, object] = DISTRIBUTIONS,
) -> None:
    attributes = {
        RESULTS: dict.fromkeys(RESULT_NAMES, fitness) if results is None else results,
        SECONDS: 12.5,
        **({} if failure is None else {FAILURE: failure}),
    }
    values = values or {}
    study.add_trial(
        optuna.create_trial(
            state=state,
            value=fitness if state == TrialState.COMPLETE else None,
            params=values,
            distributions={name: distributions[name] for name in values},
            user_attrs=attributes,
            intermediate_values=reports or {},
        )
    )


def searched(num_trials: int, names: Sequence[str], *, seed: int = 0) -> Study:
    """A study whose fitness is set by the first of its genes, with some trials pruned and some failed."""
    generator, study = np.random.default_rng(seed), new_study()
    for number in range(num_trials):
        unit = generator.uniform(size=len(names)) if number else np.full(len(names), 0.5)
        values = {name: _scaled(name, u) for name, u in zip(names, unit)}
        fitness = float(0.6 - 0.5 * (unit[0] - 0.4) ** 2 + generator.normal(0, 0.01))
        kind = number % 10 if number else 0
        if kind == 9:
            add(study, TrialState.FAIL, values=values, failure="the loss is not finite", results={})
        elif kind in (3, 5, 7):
            add(study, TrialState.PRUNED, fitness=fitness / 2, values=values, reports={3: fitness / 2})
        else:
            add(study, fitness=fitness, values=values, reports={3: fitness / 2, 9: fitness})
    return study


def _scaled(name: str, unit: float) -> float | None:
    distribution = DISTRIBUTIONS[name]
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(3 * unit), 2)]
    low, high = distribution.low, distribution.high
    return float(low * (high / low) ** unit if distribution.log else low + unit * (high - low))
