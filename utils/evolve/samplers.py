"""The samplers: from the trials so far to the values of the next one.

The surprise: none of them has a state. Each proposal is drawn anew from the seed, the trial's number and the history,
so that any worker can make any of them, and two workers never make the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from utils.config import Parents
from utils.evolve.space import Gene, Space

Values = dict[str, float]


@dataclass(frozen=True)
class History:
    """The complete trials, by number."""

    values: np.ndarray  # (N, G), genes in the order of the space
    fitness: np.ndarray  # (N,)


Propose = Callable[[Space, History, np.random.Generator], Values]


def make_sampler(name: str, space: Space, *, seed: int, parents: Parents = "single") -> BaseSampler:
    """The sampler of a name in SAMPLERS, for a study that maximises. `parents` is of the classic one alone.

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


def _classic(space: Space, seed: int, parents: Parents) -> BaseSampler:
    return _ours(space, seed, partial(classic, parents=parents))


def _genetic(space: Space, seed: int, parents: Parents) -> BaseSampler:
    return _ours(space, seed, genetic)


def _ours(space: Space, seed: int, propose: Propose) -> BaseSampler:
    def sample(study: Study, trial: FrozenTrial) -> Values:
        return propose(space, history_of(study, space), np.random.default_rng((seed, trial.number)))

    return SeededSampler(space, sample)


def history_of(study: Study, space: Space) -> History:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = sorted(trials, key=lambda trial: trial.number)
    values = [[trial.params[name] for name in space.names] for trial in trials]
    return History(
        values=np.array(values, np.float64).reshape(len(trials), len(space.names)),
        fitness=np.array([trial.value for trial in trials], np.float64),
    )


_TOP = 5


def classic(space: Space, history: History, rng: np.random.Generator, parents: Parents = "single") -> Values:
    """The sampler of YOLOv5's evolution: a parent of the best five, times factors drawn around 1.

    A gene at 0 stays there, for it is multiplied. A choice becomes the nearest one.
    """
    child = _parent(space, history, rng, parents) * _factors(space, rng, 1)[0]
    # clipped twice, for five decimals may lie outside of narrow bounds
    return {gene.name: float(gene.clip(np.round(gene.clip(value), 5))) for gene, value in zip(space.genes, child)}


def _parent(space: Space, history: History, rng: np.random.Generator, parents: Parents) -> np.ndarray:
    history = _or_start(history, space)
    best = _best(history.fitness, _TOP)
    weights = history.fitness[best] - history.fitness[best].min() + 1e-6
    weights /= weights.sum()
    return weights @ history.values[best] if parents == "weighted" else history.values[rng.choice(best, p=weights)]


def _or_start(history: History, space: Space) -> History:
    """While no trial is complete, the start values are the parent."""
    if len(history.fitness):
        return history
    return History(values=np.array([list(space.start.values())]), fitness=np.zeros(1))


def _best(fitness: np.ndarray, num: int) -> np.ndarray:
    """The indices of the best, best first; of equals the first."""
    return np.argsort(-fitness, kind="stable")[:num]


def _factors(space: Space, rng: np.random.Generator, num: int) -> np.ndarray:
    """(num, G) from 0.3 to 3, each 1 with probability 0.2, but not all of a row."""
    gains = np.array([gene.gain for gene in space.genes])
    factors = np.ones((num, len(gains)))
    while (same := (factors == 1).all(1)).any():
        shape = (same.sum(), len(gains))
        mutates = rng.random(shape) < 0.8
        drawn = gains * mutates * rng.standard_normal(shape) * rng.random() * 0.2 + 1
        factors[same] = drawn.clip(0.3, 3.0)
    return factors


_PARENTS, _CHILDREN = 10, 8
_ANEW = 0.05  # the probability that a gene is drawn from all of its range
_RIDGE = 0.03  # holds the parabolas down, where ranks go from 0 to 1


def genetic(space: Space, history: History, rng: np.random.Generator) -> Values:
    """The classic draw, added where that multiplies, upon many parents, and the best-looking of eight children.

    All genes are taken as they lie between their bounds, from 0 to 1.
    - A child has each gene from one of the best ten trials, from better ones more often, which averages the luck of
      single trials away.
    - The classic factors less 1 are added, and clipped: genes at 0 can move, and a bound is a place to stay. A gene in
      twenty is drawn from all of its range instead, for steps seldom lead far, or from one choice to the next.
    - Of eight such children that one is tried which the history promises most. It says so by a ridge regression of the
      trials' ranks on a parabola per gene: ranks, so that a diverged trial weighs no more than any bad one.
    On the bowls of benchmarks/evolve_samplers.py (29 genes, noise 0.01) 300 trials leave 0.049 of the start's 0.091 to
    the top with the classic sampler, 0.025 where its factors are added, 0.021 with ten parents, 0.017 with all of this.
    """
    history = _or_start(history, space)
    units = space.to_unit(history.values)
    best = _best(history.fitness, _PARENTS)
    weights = np.log(len(best) + 1) - np.log(np.arange(1, len(best) + 1))
    weights /= weights.sum()
    genes = np.arange(len(space.genes))
    children = units[rng.choice(best, (_CHILDREN, len(genes)), p=weights), genes]
    children = (children + _factors(space, rng, _CHILDREN) - 1).clip(0, 1)
    children = np.where(rng.random(children.shape) < _ANEW, rng.random(children.shape), children)
    values = _rounded_values(space, children)
    tried = (values[:, None] == history.values).all(-1).any(-1)  # where steps over a bound led nowhere
    values[tried] = _rounded_values(space, rng.random((tried.sum(), len(genes))))
    promises = _promises(units, history.fitness, space.to_unit(values), centre=weights @ units[best])
    return dict(zip(space.names, values[promises.argmax()].tolist()))


def _rounded_values(space: Space, units: np.ndarray) -> np.ndarray:
    """To five digits, of which small values have as many as large ones."""
    values = space.from_unit(units)
    rounded = [float(f"{value:.5g}") for value in values.flat]
    return space.clip(np.array(rounded).reshape(values.shape))


def _promises(units: np.ndarray, fitness: np.ndarray, children: np.ndarray, *, centre: np.ndarray) -> np.ndarray:
    """What a sum of parabolas, one per gene, makes of children, up to a constant.

    It is fitted to the ranks of the trials, from 0 to 1, by ridge regression; `centre` is where it is flat unless the
    trials say otherwise.
    """
    ranks = np.unique(fitness, return_inverse=True)[1] / len(fitness)
    terms, terms_children = (np.hstack([apart, apart**2]) for apart in (units - centre, children - centre))
    terms_children = terms_children - terms.mean(0)
    terms = terms - terms.mean(0)  # (N, 2 G)
    slopes = np.linalg.solve(terms.T @ terms + _RIDGE * np.eye(terms.shape[1]), terms.T @ (ranks - ranks.mean()))
    return terms_children @ slopes


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
    "classic": _classic,
    "genetic": _genetic,
    "tpe": _optuna(_tpe),
    "cmaes": _optuna(_cmaes),
    "gp": _optuna(_gp),
    "random": _optuna(_random),
}
