"""The samplers: from the trials so far to the values of the next one.

The surprise: none of them has a state. Each proposal is drawn anew from the seed, the number of the trial and the history,
so that any worker can make any of them, and two workers never make the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from utils.evolve.space import Gene, Space

Parents = Literal["single", "weighted"]
Values = dict[str, float]


@dataclass(frozen=True)
class History:
    """The complete trials, by number."""

    values: np.ndarray  # (N, G), genes in the order of the space
    fitness: np.ndarray  # (N,)


Propose = Callable[[Space, History, np.random.Generator], Values]


def make_sampler(name: str, space: Space, *, seed: int, parents: Parents = "single") -> BaseSampler:
    """The sampler of a name in SAMPLERS, for a study that maximises. `parents` is of the classic and the genetic one.

    Trial 0 gets the start values. Ask by `study.ask(fixed_distributions=distributions(space))`.
    """
    return SAMPLERS[name](space, seed, parents)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    return {gene.name: _distribution(gene) for gene in space.genes}


def _distribution(gene: Gene) -> BaseDistribution:
    if gene.scale == "choice":
        return CategoricalDistribution(gene.choices)
    return FloatDistribution(gene.low, gene.high, log=gene.scale == "log")


class SeededSampler(BaseSampler):
    """All values of a trial at once, by `propose(study, trial)`; the start values for trial 0."""

    def __init__(self, space: Space, propose: Callable[[Study, FrozenTrial], Values]) -> None:
        self._space = space
        self._propose = propose

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._space.start if trial.number == 0 else self._propose(study, trial)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is not of the space that the sampler was made for")


# -------------------------------------------------------------------------------------------------------------- ours


def _ours(propose: Callable[..., Values]) -> Callable[[Space, int, Parents], BaseSampler]:
    def make(space: Space, seed: int, parents: Parents) -> BaseSampler:
        def sample(study: Study, trial: FrozenTrial) -> Values:
            rng = np.random.default_rng((seed, trial.number))
            return propose(space, history_of(study, space), rng, parents=parents)

        return SeededSampler(space, sample)

    return make


def history_of(study: Study, space: Space) -> History:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = sorted(trials, key=lambda trial: trial.number)
    values = [[trial.params[name] for name in space.names] for trial in trials]
    return History(
        values=np.array(values, np.float64).reshape(len(trials), len(space.names)),
        fitness=np.array([trial.value for trial in trials], np.float64),
    )


_TOP = 5


def classic(space: Space, history: History, rng: np.random.Generator, *, parents: Parents = "single") -> Values:
    """The sampler of YOLOv5's evolution: a parent of the best five, times factors drawn around 1.

    A gene at 0 stays there, for it is multiplied. A choice becomes the nearest one.
    """
    parent = _classic_parent(space, history, rng, parents)
    child = parent * _factors(space, rng)
    return {gene.name: gene.clip(round(gene.clip(value), 5)) for gene, value in zip(space.genes, child)}


def _classic_parent(space: Space, history: History, rng: np.random.Generator, parents: Parents) -> np.ndarray:
    if not len(history.fitness):
        return np.array(list(space.start.values()))
    top = np.argsort(-history.fitness, kind="stable")[:_TOP]
    weights = history.fitness[top] - history.fitness[top].min() + 1e-6
    weights /= weights.sum()
    if parents == "weighted":
        return weights @ history.values[top]
    return history.values[rng.choice(top, p=weights)]


def _factors(space: Space, rng: np.random.Generator) -> np.ndarray:
    """(G,) from 0.3 to 3, each 1 with probability 0.2 and not all of them."""
    gains = np.array([gene.gain for gene in space.genes])
    factors = np.ones_like(gains)
    while (factors == 1).all():
        mutates = rng.random(len(gains)) < 0.8
        factors = gains * mutates * rng.standard_normal(len(gains)) * rng.random() * 0.2 + 1
        factors = factors.clip(0.3, 3.0)
    return factors


def genetic(space: Space, history: History, rng: np.random.Generator, *, parents: Parents = "single") -> Values:
    """The classic parent and draw, but the factor less 1 is added to the gene as it lies between its bounds."""
    parent = _classic_parent(space, history, rng, parents)
    steps = _factors(space, rng) - 1
    child = {}
    for gene, value, step in zip(space.genes, parent, steps):
        child[gene.name] = _rounded(gene, gene.from_unit(_reflected(gene.to_unit(value) + step)))
    return child


def _reflected(unit: float) -> float:
    """A step over a bound comes back from it by as much."""
    unit = abs(unit) % 2
    return min(unit, 2 - unit)


def _rounded(gene: Gene, value: float) -> float:
    """To five digits, of which small values have as many as large ones."""
    return gene.clip(float(f"{value:.5g}"))


# ------------------------------------------------------------------------------------------------------------ Optuna's


def _optuna(build: Callable[[Space, int, int], BaseSampler]) -> Callable[[Space, int, Parents], BaseSampler]:
    def make(space: Space, seed: int, parents: Parents) -> BaseSampler:
        def sample(study: Study, trial: FrozenTrial) -> Values:
            own_seed = int(np.random.SeedSequence((seed, trial.number)).generate_state(1)[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                warnings.filterwarnings("ignore", "`x0`", FutureWarning)  # which nothing replaces, in Optuna 4.9 and 5
                return _from_optuna(build(space, seed, own_seed), space, study, trial)

        return SeededSampler(space, sample)

    return make


def _from_optuna(sampler: BaseSampler, space: Space, study: Study, trial: FrozenTrial) -> Values:
    """All values at once; those that the sampler has no joint draw for, as yet or ever, one by one."""
    searched = distributions(space)
    joint = searched
    if isinstance(sampler, CmaEsSampler):
        joint = {name: one for name, one in searched.items() if isinstance(one, FloatDistribution)}
    values = sampler.sample_relative(study, trial, joint)
    alone = [name for name in searched if name not in values]
    return values | {name: sampler.sample_independent(study, trial, name, searched[name]) for name in alone}


def _tpe(space: Space, seed: int, own_seed: int) -> BaseSampler:
    # constant_liar keeps away from what other workers are trying
    return TPESampler(seed=own_seed, multivariate=True, constant_liar=True)


def _cmaes(space: Space, seed: int, own_seed: int) -> BaseSampler:
    """Optuna adds the number of the trial to its draw from the seed: the same seed each time keeps numbers apart."""
    return CmaEsSampler(
        x0={gene.name: gene.start for gene in space.genes if gene.scale != "choice"},
        seed=seed,
        independent_sampler=RandomSampler(seed=own_seed),
        warn_independent_sampling=False,
    )


def _gp(space: Space, seed: int, own_seed: int) -> BaseSampler:
    logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)  # it says that greenlet would be faster
    return GPSampler(seed=own_seed, independent_sampler=RandomSampler(seed=own_seed))


def _random(space: Space, seed: int, own_seed: int) -> BaseSampler:
    return RandomSampler(seed=own_seed)


SAMPLERS: dict[str, Callable[[Space, int, Parents], BaseSampler]] = {
    "classic": _ours(classic),
    "genetic": _ours(genetic),
    "tpe": _optuna(_tpe),
    "cmaes": _optuna(_cmaes),
    "gp": _optuna(_gp),
    "random": _optuna(_random),
}
