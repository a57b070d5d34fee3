"""What a sweep found, tried again: which candidates, on which seeds, and whether one of them beats the default.

Pure: trains nothing. The runs are the trials of a second study, of pairs (candidate, seed), so that workers share them
and lost ones are repeated. The surprise: the winner of a sweep usually owes part of its fitness to luck, so what it got
there is not used here at all.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from utils.evolve.history import SURPLUS, Finished, is_lost
from utils.evolve.storage import MAX_RETRIES

DEFAULT = "default"
CHANCE = 0.05  # how often a default that nothing beats may be replaced all the same
_GRID = 128  # points an axis, for an integral

Pair = tuple[int, int]  # number of the candidate, seed


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Values of the genes to be tried again."""

    name: str
    trial: int | None  # of the sweep; None: the default
    values: Mapping[str, Any]
    fitness: float | None  # that the sweep gave it


def candidates(trials: Sequence[Finished], given: Mapping[str, Any], k: int) -> list[Candidate]:
    """The default, which is `given`, and the best `k` complete trials whose values differ from it and one another.

    Trial 0 is one of them where it has what the default leaves open: a number of anchors.
    """
    chosen = [Candidate(name=DEFAULT, trial=None, values=given, fitness=_fitness_of(given, trials))]
    complete = [trial for trial in trials if trial.state == "complete"]
    for trial in sorted(complete, key=lambda trial: (-trial.fitness, trial.number)):
        if len(chosen) > k:
            break
        if not any(_same(trial.values, other.values) for other in chosen):
            name = f"trial {trial.number}"
            chosen.append(
                Candidate(name=name, trial=trial.number, values=dict(trial.values), fitness=trial.fitness),
            )
    return chosen


def _fitness_of(given: Mapping[str, Any], trials: Sequence[Finished]) -> float | None:
    """That the sweep gave it."""
    same = (trial.fitness for trial in trials if trial.state == "complete" and _same(trial.values, given))
    return next(same, None)


def _same(values: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether all of `values` are those of `others`, up to what a logarithm and back may change."""
    return all(name in others and _equal(value, others[name]) for name, value in values.items())


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, (int, float)):
        return math.isclose(value, other, rel_tol=1e-9)
    return value == other


# ------------------------------------------------------------------------------------------------------------ pairs


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Other seeds than that of the sweep, on which its trials were chosen."""
    return list(range(seed + 1, seed + 1 + count))


def distributions(count: int, seeds: Sequence[int]) -> dict[str, BaseDistribution]:
    """The space of the confirming study, of `count` candidates."""
    return {"candidate": IntDistribution(0, count - 1), "seed": IntDistribution(min(seeds), max(seeds))}


class PairSampler(BaseSampler):
    """Gives each trial a pair that no other has; all candidates on the first seed come first, then the next seed.

    A lost trial keeps its pair while it is queued again, and gives it up after that.
    """

    def __init__(self, count: int, seeds: Sequence[int]) -> None:
        self._space = distributions(count, seeds)
        self._pairs: list[Pair] = [(candidate, seed) for seed in seeds for candidate in range(count)]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, int]:
        candidate, seed = pair_of(trial.number, study.get_trials(deepcopy=False), self._pairs)
        return {"candidate": candidate, "seed": seed}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> int:
        raise AssertionError(f"the confirming study has no '{param_name}'")


def pair_of(number: int, trials: Sequence[FrozenTrial], pairs: Sequence[Pair]) -> Pair:
    """The pair for trial `number`, which has none yet.

    Trials with lower numbers that have none yet either are just being asked for by other workers; they get what they
    would get here, so that no two get the same. Where all pairs are held, that of a lost trial is repeated.
    """
    retried = {other for trial in trials for other in _retry_history(trial)}
    held = [_pair(trial) for trial in trials if not is_lost(trial) or _will_be_retried(trial, retried)]
    undecided = sum(
        trial.number < number and not is_lost(trial) and _pair(trial) is None and not trial.state.is_finished()
        for trial in trials
    )
    free = [pair for pair in pairs if pair not in held]
    if undecided < len(free):
        return free[undecided]
    alive = [_pair(trial) for trial in trials if not is_lost(trial)]
    return min(pairs, key=alive.count)


def _pair(trial: FrozenTrial) -> Pair | None:
    return (trial.params["candidate"], trial.params["seed"]) if "seed" in trial.params else None


def _will_be_retried(trial: FrozenTrial, retried: Container[int]) -> bool:
    """Whether a lost trial is about to be queued again, with its pair."""
    return SURPLUS not in trial.user_attrs and trial.number not in retried and len(_retry_history(trial)) < MAX_RETRIES


def _retry_history(trial: FrozenTrial) -> list[int]:
    return trial.system_attrs.get("retry_history", [])  # so Optuna keeps it


def by_seed(trials: Sequence[Finished], count: int) -> list[dict[int, float]]:
    """For each candidate the fitness on each seed that was run; not a number where the run failed."""
    fitnesses: list[dict[int, float]] = [{} for _ in range(count)]
    for trial in trials:
        fitness = trial.fitness if trial.state == "complete" else math.nan
        fitnesses[trial.values["candidate"]].setdefault(trial.values["seed"], fitness)
    return fitnesses


# -------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against the default, on the seeds that both were run on. Not a number: not known."""

    mean: float  # over all its runs
    sd: float
    difference: float  # mean over the seeds
    standard_error: float  # of the difference
    p: float  # one-sided, of a paired t test: chance alone gives such a difference so often
    failed: int  # runs


def compare(default: Mapping[int, float], candidate: Mapping[int, float]) -> Comparison:
    """Of fitnesses by seed. With one seed in common no error is known."""
    own = [fitness for fitness in candidate.values() if not math.isnan(fitness)]
    paired = np.array([candidate[seed] - default[seed] for seed in sorted(candidate) if seed in default])
    paired = paired[~np.isnan(paired)]
    error = float(paired.std(ddof=1) / math.sqrt(len(paired))) if len(paired) > 1 else math.nan
    difference = float(paired.mean()) if len(paired) else math.nan
    return Comparison(
        mean=float(np.mean(own)) if own else math.nan,
        sd=float(np.std(own, ddof=1)) if len(own) > 1 else math.nan,
        difference=difference,
        standard_error=error,
        p=_chance(_ratio(difference, error), 1, len(paired) - 1),
        failed=len(candidate) - len(own),
    )


def _ratio(difference: float, error: float) -> float:
    """t; without any noise a difference is certain."""
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def _chance(t: float, k: int, freedom: int) -> float:
    """How often the largest of `k` differences to one default, all 0 in truth, is t standard errors or more.

    The standard error is estimated with so many degrees of freedom. For k = 1 this is Student's t, else Dunnett's test
    ("A multiple comparison procedure for comparing several treatments with a control", 1955), one-sided: given the
    mean z of the default and the estimated sd s, both of unit scale, all k stay below with probability
    cdf(sqrt(2) t s + z) ** k.
    """
    if math.isnan(t) or freedom < 1:
        return math.nan
    from scipy import stats

    if k == 1:
        return float(stats.t.sf(t, freedom))
    if math.isinf(t):
        return float(t < 0)
    quantiles = (np.arange(_GRID) + 0.5) / _GRID
    sd = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)[:, None]
    below = stats.norm.cdf(math.sqrt(2) * t * sd + stats.norm.ppf(quantiles)) ** k  # (sd, z)
    return float(1 - below.mean())


# ----------------------------------------------------------------------------------------------------------- verdict

Finding = Literal["default", "better", "not shown better", "failed", "not run"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate with the finding on it."""

    candidate: Candidate
    fitnesses: Mapping[int, float]  # by seed
    comparison: Comparison
    standard_error: float  # of the difference, by the noise of all candidates together
    chance: float  # that the best of so many equals is so far ahead
    finding: Finding


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a confirmation; `judged` begins with the default."""

    winner: Candidate
    reason: str  # one line
    judged: tuple[Judged, ...]
    seeds: tuple[int, ...]


def verdict(tried: Sequence[Candidate], fitnesses: Sequence[Mapping[int, float]]) -> Verdict:
    """Which candidate holds up, the first of `tried` being the default; `fitnesses` are by seed, as `by_seed` gives.

    The best candidate wins if its mean difference to the default, over the seeds, is positive and one that the best of
    so many candidates, were all equal to the default, would reach with probability CHANCE at most: Dunnett's test, as
    the best of k was picked, with the noise of all runs together (residuals of candidates and seeds), as three seeds
    of one candidate alone say next to nothing of it. Else the default wins.

    4,000 times 3 candidates, 3 seeds, normal noise of sd 1 (benchmarks/evolve_confirm.py). Nothing differs: 5 % of the
    defaults are replaced (by the largest mean 74 %, by the best of three paired t tests 13 %). One candidate better by
    1 sd: something wins in 16 %, by 2 sd 51 %; all three better by 1 sd: 28 %, by 2 sd: 71 %. With 5 seeds and one
    better: 28 and 81 %.

    A candidate with a failed run is out. Where a run of the default failed, the largest mean of the others wins.
    """
    comparisons = [compare(fitnesses[0], own) for own in fitnesses]
    in_play = [index for index, own in enumerate(fitnesses) if own and not comparisons[index].failed]
    errors, chances = _by_all_noise(fitnesses, comparisons, in_play)
    findings = [_finding(index, fitnesses[index], comparisons[index], chances[index]) for index in range(len(tried))]
    judged = [
        Judged(
            candidate=candidate,
            fitnesses=dict(fitnesses[index]),
            comparison=comparisons[index],
            standard_error=errors[index],
            chance=chances[index],
            finding=findings[index],
        )
        for index, candidate in enumerate(tried)
    ]
    winner, reason = _winner(judged)
    seeds = tuple(sorted({seed for own in fitnesses for seed in own}))
    return Verdict(winner=winner, reason=reason, judged=tuple(judged), seeds=seeds)


def _by_all_noise(
    fitnesses: Sequence[Mapping[int, float]], comparisons: Sequence[Comparison], in_play: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Standard error of each difference and the chance of it; not a number out of play and for the default."""
    errors, chances = [math.nan] * len(fitnesses), [math.nan] * len(fitnesses)
    others = [index for index in in_play if index > 0]
    if 0 not in in_play or not others:
        return errors, chances
    seeds = sorted(set.intersection(*(set(fitnesses[index]) for index in in_play)))
    if len(seeds) < 2:
        return errors, chances
    table = np.array([[fitnesses[index][seed] for seed in seeds] for index in in_play])  # (candidates, seeds)
    residuals = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = len(others) * (len(seeds) - 1)
    variance = float((residuals**2).sum()) / freedom
    scale = float(np.abs(table).max())
    variance = 0.0 if variance < (1e-12 * scale) ** 2 else variance  # rounding is no noise
    for index in others:
        shared = len(set(fitnesses[index]) & set(fitnesses[0]))
        errors[index] = math.sqrt(2 * variance / shared)
        chances[index] = _chance(_ratio(comparisons[index].difference, errors[index]), len(others), freedom)
    return errors, chances


def _finding(index: int, own: Mapping[int, float], comparison: Comparison, chance: float) -> Finding:
    if comparison.failed:
        return "failed"
    if not own:
        return "not run"
    if index == 0:
        return "default"
    return "better" if comparison.difference > 0 and chance <= CHANCE else "not shown better"


def _winner(judged: Sequence[Judged]) -> tuple[Candidate, str]:
    default, *others = judged
    complete = [other for other in others if other.finding not in ("failed", "not run")]
    if not complete:
        return default.candidate, "no candidate was run to its end: the default stays"
    if default.finding in ("failed", "not run"):
        best = max(complete, key=lambda one: one.comparison.mean)
        return best.candidate, f"the default {_did(default)}: {best.candidate.name} has the largest mean of the others"
    best = max(complete, key=lambda one: _or_least(one.comparison.difference))
    name = best.candidate.name
    better = [one for one in complete if one.finding == "better"]
    if better:
        best = max(better, key=lambda one: one.comparison.difference)
        return best.candidate, f"{best.candidate.name} beats the default, beyond what seeds blur ({_percent(best)})"
    if math.isnan(best.comparison.difference) or best.comparison.difference <= 0:
        return default.candidate, "no candidate is ahead of the default: it stays"
    if math.isnan(best.chance):
        return default.candidate, f"{name} is ahead, but one seed tells nothing of chance: the default stays"
    return default.candidate, f"{name} is ahead by no more than seeds blur ({_percent(best)}): the default stays"


def _or_least(number: float) -> float:
    return -math.inf if math.isnan(number) else number


def _did(one: Judged) -> str:
    return "failed" if one.finding == "failed" else "was not run"


def _percent(one: Judged) -> str:
    return f"chance alone: {'under 0.1' if one.chance < 0.001 else f'{100 * one.chance:.2g}'} %"


# -------------------------------------------------------------------------------------------------------- the report


def table(outcome: Verdict) -> list[str]:
    """Aligned lines for people, the last of them the verdict."""
    rows = [["", "mean", "spread", "difference to default", "chance", ""], *map(_row, outcome.judged)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column in (0, 5) else cell.rjust(width) for column, (cell, width) in cells)
        for cells in (list(enumerate(zip(row, widths))) for row in rows)
    ]
    return [line.rstrip() for line in [*lines, outcome.reason]]


def _row(one: Judged) -> list[str]:
    comparison = one.comparison
    finding = f"{comparison.failed} of {len(one.fitnesses)} runs failed" if comparison.failed else one.finding
    is_default = one.candidate.trial is None
    return [
        one.candidate.name,
        _number(comparison.mean),
        _number(comparison.sd),
        "" if is_default or one.finding in ("failed", "not run") else _difference(one),
        "" if math.isnan(one.chance) else "<0.001" if one.chance < 0.001 else f"{one.chance:.3f}",
        "" if is_default and finding == "default" else finding,
    ]


def _number(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.5f}"


def _difference(one: Judged) -> str:
    if math.isnan(one.comparison.difference):
        return "-"
    error = "" if math.isnan(one.standard_error) else f" +- {one.standard_error:.5f}"
    return f"{one.comparison.difference:+.5f}{error}"


def comments(outcome: Verdict) -> list[str]:
    """The same for the head of hyp_evolved.yaml."""
    seeds = ", ".join(map(str, outcome.seeds))
    return [f"# Trained again on seeds {seeds}:", *(f"#   {line}".rstrip() for line in table(outcome))]


def plain_verdict(outcome: Verdict) -> dict[str, Any]:
    """The same in plain values, for confirm.json; null: not known."""
    return {
        "winner": outcome.winner.name,
        "reason": outcome.reason,
        "seeds": list(outcome.seeds),
        "candidates": [
            {
                "name": one.candidate.name,
                "trial": one.candidate.trial,
                "fitness_in_sweep": one.candidate.fitness,
                "fitness_by_seed": {str(seed): _plain(fitness) for seed, fitness in sorted(one.fitnesses.items())},
                "mean": _plain(one.comparison.mean),
                "sd": _plain(one.comparison.sd),
                "difference": _plain(one.comparison.difference),
                "standard_error": _plain(one.standard_error),
                "chance": _plain(one.chance),
                "paired_standard_error": _plain(one.comparison.standard_error),
                "paired_p": _plain(one.comparison.p),
                "finding": one.finding,
                "values": dict(one.candidate.values),
            }
            for one in outcome.judged
        ],
    }


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
