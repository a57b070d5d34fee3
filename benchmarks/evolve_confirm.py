"""How often the end of a sweep replaces the default, where it is known whether it should.

`python -m benchmarks.evolve_confirm` draws the fitness of three candidates and the default on a few seeds, with normal
noise of sd 1, and asks `confirm.verdict`; beside it two simpler rules, the largest mean and the best of three t tests.
"""

from __future__ import annotations

import numpy as np

from utils.evolve.confirm import CHANCE, Candidate, verdict

CASES = {  # by how many sd each candidate is better than the default
    "all equal": (0, 0, 0),
    "one better by 1 sd": (1, 0, 0),
    "one better by 2 sd": (2, 0, 0),
    "all better by 1 sd": (1, 1, 1),
    "all better by 2 sd": (2, 2, 2),
}
_ROUNDS = 4_000


def shares(better: tuple[float, ...], seeds: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Of rounds in which the default is replaced: by the verdict, the largest mean, and t tests."""
    names = ("default", *(f"trial {number}" for number in range(1, len(better) + 1)))
    tried = [Candidate(name=name, trial=number or None, values={}, fitness=None) for number, name in enumerate(names)]
    replaced = np.zeros(3)
    for _ in range(_ROUNDS):
        fitness = rng.normal(np.array([0, *better])[:, None], 1, (len(tried), seeds))
        outcome = verdict(tried, [dict(enumerate(own.tolist())) for own in fitness])
        largest = fitness.mean(1).argmax() > 0
        tests = any(one.comparison.p <= CHANCE for one in outcome.judged[1:])
        replaced += outcome.winner.trial is not None, largest, tests
    return tuple(replaced / _ROUNDS)


def main() -> None:
    rng = np.random.default_rng(0)
    for seeds in (3, 5):
        for name, better in CASES.items():
            ours, largest, tests = shares(better, seeds, rng)
            print(f"{seeds} seeds, {name}: {ours:.1%}; by the largest mean {largest:.1%}, by t tests {tests:.1%}")


if __name__ == "__main__":
    main()
