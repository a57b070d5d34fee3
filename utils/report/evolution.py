"""The picture of a study: fitness over its trials, fitness against each gene, and how much each gene matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from utils.report.plots import ACCENT, GREY, INK, PALE, SECOND, axes_at, blues, dress, new_figure, save_figure, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _EDGE = 1560, 24  # px, as all below
_CAPTION = 46
_LEFT, _ABOVE, _BELOW = 82, 34, 54  # of axes: for ticks and labels, for a title, and for ticks and labels again
_HISTORY, _LEAST_TOP, _BAR = 850, 330, 17
_NAMES, _SHARES = 190, 400  # of the bars
_MOST_COLUMNS, _LEAST_COLUMNS, _PANEL, _BESIDE, _UNDER = 5, 3, 150, 30, 38
_MOST_TICKS = 5  # of choices
_LEAST_SPAN = 0.02  # of a fitness axis: less is noise

_PRUNED, _FAILED = "#a9b8c8", "#b03a3a"


class Trial(Protocol):
    """What the picture asks of a trial that counts."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> Literal["complete", "pruned", "failed"]: ...
    @property
    def values(self) -> Mapping[str, Any]: ...
    @property
    def fitness(self) -> float | None: ...  # of a pruned one, the last


class Range(Protocol):
    """What the picture asks of a gene."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def scale(self) -> Literal["linear", "log", "choice"]: ...
    @property
    def choices(self) -> Sequence[float]: ...


def plot_evolution(
    path: Path,
    *,
    trials: Sequence[Trial],
    genes: Mapping[str, Range],
    importances: Mapping[str, float],
    best: int | None,
) -> None:
    """Draw what is known so far. `trials` are by number, `best` is the number of one that is complete.

    `importances` are shares that add up to 1, the largest first; empty where they cannot be told.
    """
    rows = math.ceil(len(genes) / _MOST_COLUMNS)
    columns = max(math.ceil(len(genes) / max(rows, 1)), _LEAST_COLUMNS)
    top = max(_LEAST_TOP, _BAR * len(importances))
    panels_y = _CAPTION + _ABOVE + top + _BELOW
    figure = new_figure(_WIDTH, panels_y + rows * (_ABOVE + _PANEL + _UNDER))
    known = [trial for trial in trials if _is_known(trial)]
    winner = next((trial for trial in known if trial.number == best), None)
    _write_caption(figure, trials, winner)
    _draw_history(axes_at(figure, _LEFT, _CAPTION + _ABOVE, _HISTORY, top), trials, known, winner)
    _draw_importances(axes_at(figure, _LEFT + _HISTORY + _NAMES, _CAPTION + _ABOVE, _SHARES, top), importances)
    complete = _of(known, "complete")
    width = (_WIDTH - _LEFT - _EDGE - (columns - 1) * _BESIDE) // columns
    for index, (name, gene) in enumerate(genes.items()):
        row, column = divmod(index, columns)
        x, y = _LEFT + column * (width + _BESIDE), panels_y + row * (_ABOVE + _PANEL + _UNDER) + _ABOVE
        _draw_gene(axes_at(figure, x, y, width, _PANEL), name, gene, complete, winner, labelled=column == 0)
    save_figure(figure, path)


def _is_known(trial: Trial) -> bool:
    """Whether there is a fitness to show."""
    return trial.state != "failed" and trial.fitness is not None and math.isfinite(trial.fitness)


def _of(trials: Sequence[Trial], state: str) -> list[Trial]:
    return [trial for trial in trials if trial.state == state]


def _write_caption(figure: Figure, trials: Sequence[Trial], winner: Trial | None) -> None:
    counts = ", ".join(f"{len(_of(trials, state)):,} {state}" for state in ("complete", "pruned", "failed"))
    best = "" if winner is None else f"     Best: trial {winner.number:,}, fitness {winner.fitness:.4f}"
    W, H = figure.get_size_inches() * figure.dpi
    y = 1 - _EDGE / H
    figure.text(_EDGE / W, y, f"Trials: {counts}{best}", fontsize=11, color=INK, va="center")
    key = "below: complete trials, later ones darker, the best with its value"
    figure.text(1 - _EDGE / W, y, key, fontsize=8, color=GREY, va="center", ha="right")


# ------------------------------------------------------------------------------------------------ fitness over trials


def _draw_history(axes: Axes, trials: Sequence[Trial], known: Sequence[Trial], winner: Trial | None) -> None:
    dress(axes, "Fitness over trials", "trial", "fitness")
    _rule(axes)
    if not trials:
        _say_none(axes)
        return
    first, last = trials[0].number, trials[-1].number
    beside = max(0.5, 0.01 * (last - first))
    low, high = _limits(known, room_below=0.1)
    axes.set(xlim=(first - beside, last + beside), ylim=(low, high))
    _count_ticks(axes)
    size = float(np.clip(60 / math.sqrt(len(trials)), 2, 6))
    dots = {"marker": "o", "linestyle": "none", "markeredgewidth": 0}
    _plot(axes, _of(known, "pruned"), color=_PRUNED, markersize=0.8 * size, label="pruned", **dots)
    _plot(axes, _of(known, "complete"), color=ACCENT, alpha=0.6, markersize=size, label="complete", **dots)
    failed = [trial.number for trial in _of(trials, "failed")]
    if failed:
        bottom = np.full(len(failed), low + 0.04 * (high - low))
        axes.plot(failed, bottom, "x", color=_FAILED, markersize=max(size, 3), markeredgewidth=0.7, label="failed")
    _draw_best_so_far(axes, _of(known, "complete"), last + beside)
    if winner is not None:
        axes.plot(winner.number, winner.fitness, "o", color=SECOND, markersize=7, zorder=4, label="best")
    if not axes.lines:
        say(axes, "no fitness yet")
        return
    look = {"fontsize": 8, "frameon": False, "labelcolor": INK, "columnspacing": 1.2, "handletextpad": 0.4}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=6, borderaxespad=0.2, borderpad=0.2, **look)


def _plot(axes: Axes, trials: Sequence[Trial], **look: Any) -> None:
    if trials:
        axes.plot([trial.number for trial in trials], [trial.fitness for trial in trials], **look)


def _draw_best_so_far(axes: Axes, complete: Sequence[Trial], end: float) -> None:
    """A step line, and, where trial 0 is known, a level line for what evolution started from."""
    if not complete:
        return
    so_far = np.maximum.accumulate([trial.fitness for trial in complete])
    numbers = [trial.number for trial in complete]
    axes.step([*numbers, end], [*so_far, so_far[-1]], where="post", color=INK, linewidth=1.2, label="best so far")
    if numbers[0] == 0:
        axes.axhline(so_far[0], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="start", zorder=1)


def _say_none(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    say(axes, "no trials yet")


def _rule(axes: Axes) -> None:
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


def _count_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _limits(trials: Sequence[Trial], *, room_below: float = 0.0) -> tuple[float, float]:
    """Of a fitness axis that shows them all, with a share of it left free at the bottom."""
    if not trials:
        return 0.0, 1.0
    values = [trial.fitness for trial in trials]
    low = max(min(*values, max(values) - _LEAST_SPAN), min(0.0, *values))
    span = max(max(values) - low, _LEAST_SPAN)
    return low - (0.08 + room_below) * span, low + 1.1 * span


# ---------------------------------------------------------------------------------------------------- importances


def _draw_importances(axes: Axes, importances: Mapping[str, float]) -> None:
    dress(axes, "What sets the best trials apart (PED-ANOVA)")
    if not importances:
        axes.set_axis_off()
        say(axes, "nothing to tell yet")
        return
    shares = list(importances.values())
    bars = axes.barh(range(len(shares)), shares, height=0.7, color=ACCENT)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8, color=INK, padding=3)
    axes.set_yticks(range(len(shares)), list(importances), fontsize=8)
    axes.set(xlim=(0, 1.12 * max(shares)), ylim=(max(len(shares), 6) - 0.4, -0.6), xticks=[])
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)


# ----------------------------------------------------------------------------------------------- fitness against genes


def _draw_gene(
    axes: Axes, name: str, gene: Range, complete: Sequence[Trial], winner: Trial | None, *, labelled: bool
) -> None:
    """Later trials are darker."""
    shown = [(trial, _place(gene, trial.values.get(name))) for trial in complete]
    shown = [(trial, x) for trial, x in shown if x is not None]
    dress(axes, name, y="fitness" if labelled else "")
    if winner is not None and name in winner.values:
        axes.set_title(_short(winner.values[name]), fontsize=9, color=SECOND, loc="right")
    _rule(axes)
    _mark_ticks(axes, gene)
    axes.set_ylim(*_limits(complete))
    axes.tick_params(labelleft=labelled)
    if not shown:
        _say_none(axes)
        return
    x, numbers, y = np.array([(x, trial.number, trial.fitness) for trial, x in shown]).T
    size = float(np.clip(250 / math.sqrt(len(x)), 4, 22))
    axes.scatter(x, y, c=numbers, cmap=blues(), vmin=-0.25 * (numbers.max() + 1), s=size, linewidths=0)
    at = None if winner is None else _place(gene, winner.values.get(name))
    if at is not None:
        axes.plot(at, winner.fitness, "o", color=SECOND, markersize=6, zorder=4)


def _place(gene: Range, value: float | None) -> float | None:
    """Where a value lies on the axis; of a choice, its rank. None where it is no value of the gene."""
    if gene.scale != "choice":
        return value
    return gene.choices.index(value) if value in gene.choices else None


def _mark_ticks(axes: Axes, gene: Range) -> None:
    """The bounds and what is half-way between them, on an axis with a little room beyond them."""
    from matplotlib.ticker import NullLocator

    if gene.scale == "choice":
        last = len(gene.choices) - 1
        ranks = range(last + 1) if last < _MOST_TICKS else (0, last // 2, last)
        axes.set(xlim=(-0.5, last + 0.5))
        axes.set_xticks(list(ranks), [_short(gene.choices[rank]) for rank in ranks])
        return
    if gene.scale == "log":
        beyond = (gene.high / gene.low) ** 0.04
        middle, limits = _middle(gene), (gene.low / beyond, gene.high * beyond)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        beyond = 0.04 * (gene.high - gene.low)
        middle, limits = (gene.low + gene.high) / 2, (gene.low - beyond, gene.high + beyond)
    axes.set(xlim=limits)
    axes.set_xticks([gene.low, middle, gene.high], [_short(value) for value in (gene.low, middle, gene.high)])


def _middle(gene: Range) -> float:
    """About half-way between the bounds on a log scale: a power of ten where there is one."""
    half_way = math.sqrt(gene.low * gene.high)
    power = 10.0 ** round(math.log10(half_way))
    return power if abs(math.log(power / half_way)) <= 0.25 * math.log(gene.high / gene.low) else half_way


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
