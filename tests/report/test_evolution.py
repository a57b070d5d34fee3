import itertools
import math
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import pytest

from tests.report.looks import check_texts, texts_of
from utils.hyp import GENES
from utils.report import evolution
from utils.report.evolution import plot_evolution

pytestmark = pytest.mark.filterwarnings("error")


@dataclass(frozen=True)
class Trial:
    number: int
    state: str = "complete"
    fitness: float | None = 0.5
    values: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    low: float = 0.0
    high: float = 1.0
    scale: str = "linear"
    choices: tuple = ()


def ranges(count: int) -> dict[str, Range]:
    """Of the real hyperparameters, with every scale among them."""
    scales = {name: "log" if gene.low > 0 and gene.high > 5 * gene.low else "linear" for name, gene in GENES.items()}
    all_of_them = {name: Range(gene.low, gene.high, scales[name]) for name, gene in GENES.items()}
    all_of_them["anchors"] = Range(2.0, 9.0, "choice", (2.0, 3.0, 9.0))
    return dict(itertools.islice(all_of_them.items(), count))


def draws(count: int, genes: dict[str, Range]) -> list[Trial]:
    """As a study has them: every tenth failed, others were pruned early."""
    generator = np.random.default_rng(0)
    trials = []
    for number in range(count):
        values = {
            name: gene.choices[number % 3] if gene.choices else float(generator.uniform(gene.low, gene.high))
            for name, gene in genes.items()
        }
        state = "failed" if number % 10 == 9 else "pruned" if number % 10 in (3, 5) else "complete"
        fitness = float(generator.uniform(0.1, 0.2) if state == "pruned" else generator.uniform(0.3, 0.6))
        trials.append(Trial(number, state, None if state == "failed" else fitness, values))
    return trials


def best_of(trials: list[Trial]) -> int | None:
    complete = [trial for trial in trials if trial.state == "complete"]
    return max(complete, key=lambda trial: trial.fitness).number if complete else None


def shares(genes: dict[str, Range]) -> dict[str, float]:
    parts = 2.0 ** -np.arange(len(genes))
    return dict(zip(genes, (parts / parts.sum()).tolist()))


@pytest.fixture
def figures(monkeypatch):
    """Those drawn, none of them saved."""
    drawn = []
    monkeypatch.setattr(evolution, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def plot(path, trials, genes, importances=None):
    plot_evolution(path, trials=trials, genes=genes, importances=importances or {}, best=best_of(trials))


@pytest.mark.parametrize("num_genes, num_trials", [(1, 0), (3, 10), (3, 3000), (13, 300)])
def test_every_size_gives_a_picture_of_one_width(tmp_path, num_genes, num_trials):
    genes = ranges(num_genes)
    plot(tmp_path / "evolve.png", draws(num_trials, genes), genes, shares(genes) if num_trials > 9 else None)
    image = cv2.imread(str(tmp_path / "evolve.png"))
    assert image is not None and image.shape[1] == 1560 and image.std() > 1


@pytest.mark.parametrize("num_genes, num_trials", [(1, 0), (1, 1), (13, 1), (3, 10), (1, 300), (13, 300), (31, 300)])
def test_no_text_is_cut_off_or_over_another(figures, tmp_path, num_genes, num_trials):
    genes = ranges(num_genes)
    trials = [replace(one, number=one.number * 40) for one in draws(num_trials, genes)]
    plot(tmp_path / "evolve.png", trials, genes, shares(genes) if num_trials > 9 else None)
    check_texts(figures[0])


def test_the_caption_counts_and_names_the_best(figures, tmp_path):
    genes = ranges(1)
    plot(tmp_path / "evolve.png", draws(20, genes), genes)
    said = [text for text, _ in texts_of(figures[0])]
    assert any(text.startswith("Trials: 14 complete, 4 pruned, 2 failed") for text in said)
    assert {"pruned", "complete", "failed", "best so far", "start", "best"} <= set(said)


def line(axes, label):
    return next(one for one in axes.lines if one.get_label() == label)


def test_the_history_shows_what_happened(figures, tmp_path):
    trials = [
        Trial(0, fitness=0.3),
        Trial(1, "pruned", 0.1),
        Trial(2, fitness=0.2),
        Trial(4, "failed", 9.0),  # after a rung
        Trial(5, fitness=0.4),
    ]
    plot(tmp_path / "evolve.png", trials, {"lr0": Range()})
    history = figures[0].axes[0]
    assert line(history, "best so far").get_ydata().tolist() == [0.3, 0.3, 0.4, 0.4]
    assert line(history, "complete").get_xdata().tolist() == [0, 2, 5]
    assert (line(history, "pruned").get_xdata().tolist(), line(history, "pruned").get_ydata().tolist()) == ([1], [0.1])
    assert list(line(history, "failed").get_xdata()) == [4] and line(history, "failed").get_ydata()[0] < 0.1
    assert list(line(history, "start").get_ydata()) == [0.3, 0.3]
    assert history.get_ylim()[1] < 1
    assert (line(history, "best").get_xdata()[0], line(history, "best").get_ydata()[0]) == (5, 0.4)


def test_a_panel_shows_complete_trials_between_the_bounds(figures, tmp_path):
    genes = {"lr0": Range(1e-5, 0.1, "log"), "anchors": Range(2, 9, "choice", (2.0, 3.0, 9.0)), "box": Range(0.0, 0.2)}
    values = {"lr0": 0.01, "anchors": 9.0, "box": 0.1}
    trials = [Trial(0, values=values), Trial(1, "pruned", values=values), Trial(2, fitness=0.6)]  # 2 has no genes
    plot(tmp_path / "evolve.png", trials, genes)
    panels = dict(zip(genes, figures[0].axes[2:]))
    assert [[one.get_offsets().tolist() for one in axes.collections] for axes in panels.values()] == [
        [[[0.01, 0.5]]],
        [[[2, 0.5]]],
        [[[0.1, 0.5]]],
    ]
    assert panels["lr0"].get_xscale() == "log" and panels["box"].get_xscale() == "linear"
    for name in ("lr0", "box"):
        low, high = panels[name].get_xlim()
        assert low < genes[name].low < genes[name].high < high
    assert [one.get_text() for one in panels["anchors"].get_xticklabels()] == ["2", "3", "9"]


@pytest.mark.parametrize(
    "trials",
    [
        [Trial(0, "failed", None), Trial(1, "failed", None)],
        [Trial(0, "pruned", math.nan), Trial(1, fitness=math.inf), Trial(2, "pruned", None)],
        [Trial(3, fitness=0.0), Trial(4, fitness=0.0)],
        [Trial(0, fitness=1e-12, values={"lr0": 7.0}), Trial(1, fitness=0.9, values={"lr0": None})],
    ],
    ids=["failed", "not finite", "all nothing", "out of bounds"],
)
def test_strange_studies_are_drawn(tmp_path, trials):
    plot(tmp_path / "evolve.png", trials, {"lr0": Range(0.1, 1, "log"), "empty": Range()})
    assert cv2.imread(str(tmp_path / "evolve.png")) is not None
