"""How good the samplers of evolution are where the truth is known: synthetic landscapes over the real genes.

    python -m benchmarks.evolve_samplers [--samplers classic,genetic,random] [--family ridge] [--trials 300]

A landscape is drawn per optimum: where its top of 0.6 lies, how much each gene matters (much for few), which act
together; the start values lie 0.05 to 0.15 below the top. A `bowl` falls with the squared distance from a top that is
not far from the start in any gene; the genetic sampler was made on other bowls. A `ridge` falls with the distance
itself, in rotated coordinates, from a top that lies anywhere, and too far along one direction of three genes training
diverges; other ridges said how often the genetic sampler draws a gene anew, and no more. Each evaluation has noise of
its own. The figures are the true fitness of the trial that the noisy history calls best, and of the one among its best
three that is best on average when measured three times more: mean and standard error over optima.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optuna

from utils.evolve.samplers import History, classic, distributions, genetic, make_sampler
from utils.evolve.space import Space, search_space
from utils.hyp import Hyperparameters

GENES = {
    13: "lr0,lrf,momentum,weight_decay,box,cls,obj,hsv_s,degrees,translate,scale,mosaic,mixup",
    29: "lr0,lrf,momentum,weight_decay,warmup_epochs,warmup_momentum,warmup_bias_lr,box,cls,cls_pw,obj,obj_pw,iou_t,"
    "anchor_t,anchors,fl_gamma,hsv_h,hsv_s,hsv_v,degrees,translate,scale,shear,perspective,flipud,fliplr,mosaic,mixup,"
    "copy_paste",
}
NOISES = (0.0, 0.01, 0.03)
TOP_FITNESS = 0.6
_CONFIRMED, _CONFIRMATIONS = 3, 3
_DRAW, _NOISE, _CONFIRM, _PROPOSE = range(1, 5)  # what is random, each with a stream of its own

Landscape = Callable[[np.ndarray], float]  # the true fitness of genes in unit coordinates


@dataclass(frozen=True)
class Outcome:
    best: float  # true fitness of the trial that was measured best
    confirmed: float  # of the best few, that of the one which was best when measured again


def genes_space(num_genes: int) -> Space:
    return search_space(Hyperparameters(), genes=GENES[num_genes])


def bowl(start: np.ndarray, rng: np.random.Generator) -> Landscape:
    top = _reflected(start + rng.normal(0, 0.25, len(start)))
    root = np.exp(rng.normal(0, 1.5, len(start))) ** 0.5
    pairs = rng.permutation(len(start))[: len(start) // 2 * 2].reshape(-1, 2)
    signs = rng.choice([-1.0, 1.0], len(pairs))

    def fall(unit: np.ndarray) -> float:
        apart = root * (unit - top)
        return float(apart @ apart + (signs * apart[pairs[:, 0]]) @ apart[pairs[:, 1]])

    depth = rng.uniform(0.05, 0.15) / fall(start)
    return lambda unit: max(TOP_FITNESS - depth * fall(unit), 0.0)


def ridge(start: np.ndarray, rng: np.random.Generator) -> Landscape:
    top = rng.uniform(0, 1, len(start))
    rotation = np.linalg.qr(rng.normal(size=(len(start), len(start))))[0]
    rotation *= np.exp(rng.normal(0, 0.75, (len(start), 1)))
    steep = rng.choice(len(start), 3, replace=False)
    away = rng.normal(size=3)
    away *= -np.sign(away @ (top - start)[steep]) / np.linalg.norm(away)

    def fitness(unit: np.ndarray) -> float:
        diverges = away @ (unit - start)[steep] > 0.3
        return 0.0 if diverges else max(TOP_FITNESS - depth * fall(unit), 0.0)

    def fall(unit: np.ndarray) -> float:
        return float(np.linalg.norm(rotation @ (unit - top)))

    depth = rng.uniform(0.05, 0.15) / fall(start)
    return fitness


FAMILIES = {"bowl": bowl, "ridge": ridge}


def outcome(sampler: str, space: Space, *, family: str, noise: float, optimum: int, trials: int) -> Outcome:
    """Of one evolution on landscape `optimum` of a family, which is the same for every sampler, as is the noise."""
    start = space.to_unit(np.array(list(space.start.values())))
    landscape = FAMILIES[family](start, _rng(_DRAW, optimum, len(space.genes)))

    def measure(values: np.ndarray, number: int) -> float:
        return landscape(space.to_unit(values)) + noise * _rng(_NOISE, optimum, number).normal()

    run = _run_direct if sampler in _PROPOSALS else _run_study
    history = run(sampler, space, measure, optimum, trials)
    true = [landscape(space.to_unit(values)) for values in history.values]
    best = np.argsort(-history.fitness, kind="stable")[:_CONFIRMED]
    again = _rng(_CONFIRM, optimum).normal(0, noise, (len(best), _CONFIRMATIONS))
    means = [true[index] + noises.mean() for index, noises in zip(best, again)]
    return Outcome(best=true[best[0]], confirmed=true[best[int(np.argmax(means))]])


def _uniform(space: Space, history: History, rng: np.random.Generator) -> dict[str, float]:
    return dict(zip(space.names, space.from_unit(rng.random(len(space.genes)))))


_PROPOSALS = {"classic": classic, "genetic": genetic, "random": _uniform}  # Optuna's random draws from the same
Measure = Callable[[np.ndarray, int], float]


def _run_direct(sampler: str, space: Space, measure: Measure, seed: int, trials: int) -> History:
    """By the proposal function alone, without a study."""
    values = np.empty((trials, len(space.genes)))
    fitness = np.empty(trials)
    for number in range(trials):
        history = History(values=values[:number], fitness=fitness[:number])
        rng = _rng(_PROPOSE, seed, number)
        proposal = space.start if number == 0 else _PROPOSALS[sampler](space, history, rng)
        values[number] = [proposal[name] for name in space.names]
        fitness[number] = measure(values[number], number)
    return History(values=values, fitness=fitness)


def _run_study(sampler: str, space: Space, measure: Measure, seed: int, trials: int) -> History:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, space, seed=seed))
    values = []
    for number in range(trials):
        trial = study.ask(fixed_distributions=distributions(space))
        values.append([trial.params[name] for name in space.names])
        study.tell(trial, measure(np.array(values[-1]), number))
    return History(values=np.array(values), fitness=np.array([trial.value for trial in study.trials]))


def _rng(stream: int, *key: int) -> np.random.Generator:
    return np.random.default_rng((stream, *key))


def _reflected(unit: np.ndarray) -> np.ndarray:
    folded = np.abs(unit) % 2
    return np.minimum(folded, 2 - folded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samplers", default="classic,genetic,random", help="of classic,genetic,tpe,cmaes,gp,random")
    parser.add_argument("--family", default="bowl", choices=FAMILIES)
    parser.add_argument("--genes", default="13,29", help="how many: 13, 29 or both")
    parser.add_argument("--noises", default=",".join(f"{noise:g}" for noise in NOISES), help="standard deviations")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--optima", type=int, default=16)
    flags = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"| {flags.family}, {flags.trials} trials | genes | noise sd | best of the history | confirmed | s a run |")
    print("|---|---|---|---|---|---|")
    for num_genes in map(int, flags.genes.split(",")):
        for noise in map(float, flags.noises.split(",")):
            for sampler in flags.samplers.split(","):
                started = time.perf_counter()
                outcomes = [
                    outcome(
                        sampler,
                        genes_space(num_genes),
                        family=flags.family,
                        noise=noise,
                        optimum=optimum,
                        trials=flags.trials,
                    )
                    for optimum in range(flags.optima)
                ]
                seconds = (time.perf_counter() - started) / flags.optima
                best, confirmed = _shown([one.best for one in outcomes]), _shown([one.confirmed for one in outcomes])
                print(f"| {sampler} | {num_genes} | {noise:g} | {best} | {confirmed} | {seconds:.2f} |", flush=True)


def _shown(figures: list[float]) -> str:
    return f"{np.mean(figures):.4f} ± {np.std(figures, ddof=1) / len(figures) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
