"""The figures of a run: label statistics, training curves, curves and confusion of an evaluation.

Figures are drawn through matplotlib's object interface alone and encoded by OpenCV: no pyplot, no global style, no
display, so a picture can be made anywhere, also from a thread. Nothing to show gives a picture that says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.report.annotate import (
    Colour,
    class_colour,
    font_families,
    quiet_matplotlib,
    short_name,
    write_image,
)
from utils.structures import CONFUSION_CONFIDENCE, CONFUSION_IOU, CROWD, ClassMetrics, LabelStore, Metrics, fitness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#8a8a8a", "#e4e4e4"
ACCENT, SECOND, THIRD = "#1f5fa8", "#d9692a", "#3b8f5c"
DPI = 128  # a power of two, so that whole pixels survive the way through inches
MAX_BOXES = 2_000  # drawn one by one
MAX_LABELS = 1_000_000  # counted into 2-D histograms; class counts are always complete
MAX_NAMED_LINES = 20
MAX_CONFUSED, MOST_CONFUSED = 100, 60  # classes of a confusion matrix; where there are more, these
MAX_NUMBERS = 2_500  # in its cells
MAX_BARS = 40  # classes, in the picture of a data set


# ---------------------------------------------------------------------------------------------------------- figures


def new_figure(width_px: float, height_px: float, *, layout: str | None = "constrained") -> Figure:
    with quiet_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
    if layout:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    with quiet_matplotlib():
        figure.canvas.draw()
    write_image(np.asarray(figure.canvas.buffer_rgba())[..., :3], path)


def dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """The one look of all axes."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=GREY)


def _plain(name: str) -> str:
    """A name as text of a figure: no formulas, never kept out of a legend for a leading underscore, not too long."""
    return (" " if name.startswith("_") else "") + short_name(name).replace("$", r"\$")


def _points(px: float) -> float:
    return px * 72 / DPI


# ------------------------------------------------------------------------------------------------ label statistics


def plot_labels(store: LabelStore, names: Sequence[str], folder: Path) -> None:
    """labels.jpg (class counts, box shapes, where centres lie, sizes) and labels_correlogram.jpg (each against each).

    Positions and sizes are fractions of the image. Where there are very many labels an even selection stands for all.
    """
    figure = new_figure(1200, 1100)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    counts = np.bincount(store.classes, minlength=len(names))[: len(names)]
    _draw_counts(top_left, counts, names)
    _draw_shapes(top_right, store)
    x, y, width, height = _fractions(store, _even(len(store.classes), MAX_LABELS)).T
    _draw_histogram(bottom_left, x, y)
    dress(bottom_left, "Box centres", "x / image width", "y / image height")
    bottom_left.invert_yaxis()  # as in the image
    _draw_histogram(bottom_right, width, height)
    dress(bottom_right, "Box sizes", "width / image width", "height / image height")
    save_figure(figure, folder / "labels.jpg")
    _plot_correlogram({"x": x, "y": y, "width": width, "height": height}, folder / "labels_correlogram.jpg")


def _even(total: int, most: int) -> np.ndarray:
    """At most `most` row numbers, spread evenly over `total`."""
    return np.arange(total) if total <= most else np.linspace(0, total - 1, most).astype(np.int64)


def _fractions(store: LabelStore, rows: np.ndarray) -> np.ndarray:
    """(R, 4) centre x, centre y, width, height as fractions of the image."""
    image = np.searchsorted(store.offsets, rows, side="right") - 1
    boxes = store.boxes[rows].astype(np.float64) / np.maximum(store.sizes[image][:, [1, 0, 1, 0]], 1)
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def _draw_counts(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    bars = axes.bar(
        np.arange(len(counts)), counts, color=[class_colour(index) for index in range(len(counts))], width=0.8
    )
    dress(axes, f"Labels per class ({counts.sum():,} in all)")
    axes.margins(x=0.02, y=0.1)
    axes.set_ylim(0, max(counts.max(initial=0) * 1.1, 1))
    _name_ticks(axes.xaxis, names, 500)
    if len(counts) <= 12:
        axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8, color=INK, padding=2)


def _name_ticks(axis: Axis, names: Sequence[str], room_px: float) -> None:
    """Class names along an axis of `room_px`, upright where they would meet; numbers where even that is illegible."""
    pitch = room_px / max(len(names), 1)
    size = min(8.0, _points(0.9 * pitch))
    if size < 4:
        return
    names = [_plain(name) for name in names]
    letter_px = 0.6 * size * DPI / 72
    turned = axis.axis_name == "x" and max(map(len, names), default=0) * letter_px > pitch
    axis.set_ticks(range(len(names)), names, rotation=90 if turned else 0, fontsize=size, fontfamily=font_families())


def _draw_shapes(axes: Axes, store: LabelStore) -> None:
    from matplotlib.collections import LineCollection

    rows = _even(len(store.classes), MAX_BOXES)
    half = _fractions(store, rows)[:, 2:] / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
    colours = [(*class_colour(int(index)), 0.35) for index in store.classes[rows]]
    axes.add_collection(LineCollection(half[:, None] * corners, colors=colours, linewidths=0.7))
    axes.set(xlim=(-0.55, 0.55), ylim=(-0.55, 0.55))
    dress(axes, "Box shapes about a common centre", "width / image width", "height / image height")
    if not len(rows):
        say(axes, "no labels")


def _draw_histogram(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    bins = int(np.clip(0.8 * math.sqrt(len(x)), 10, 50))  # few labels in fine bins are only noise
    counts, _, _ = np.histogram2d(x, y, bins=bins, range=[[0, 1], [0, 1]])
    shown = np.where(counts.T > 0, np.sqrt(counts.T), np.nan)  # the root keeps rare places visible beside busy ones
    axes.set(xlim=(0, 1), ylim=(0, 1))
    if not len(x):
        say(axes, "no labels")
        return
    axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap=blues(), vmin=0, interpolation="none")


def blues():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blues", ["#eef4fa", "#8db4dc", ACCENT, "#0b2a52"])


def _plot_correlogram(values: dict[str, np.ndarray], path: Path) -> None:
    figure = new_figure(1100, 1100)
    grid = figure.subplots(4, 4)
    for row, (y_name, y) in enumerate(values.items()):
        for column, (x_name, x) in enumerate(values.items()):
            axes = grid[row, column]
            if column > row:
                axes.set_visible(False)
                continue
            if column == row:
                axes.hist(x, bins=50, range=(0, 1), color=ACCENT)
                axes.set(xlim=(0, 1), yticks=[])
            else:
                _draw_histogram(axes, x, y)
            dress(axes, x=x_name if row == 3 else "", y=y_name if column == 0 and row else "")
            axes.set_xticks([0, 0.5, 1])
            axes.tick_params(labelbottom=row == 3, labelleft=column == 0)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------- a whole data set


_SIZES_PX = 460  # height of the histograms of sizes


def plot_scan(stores: Mapping[str, LabelStore], names: Sequence[str], path: Path) -> None:
    """Boxes of each class in each split, and below, side by side, a histogram of the box sizes of each split.

    Of many classes the `MAX_BARS` with the most boxes are shown. The histograms are logarithmic in both sizes.
    """
    counts = {
        split: np.bincount(store.classes[store.ignore != CROWD], minlength=len(names))  # crowds are no objects
        for split, store in stores.items()
    }
    total = np.sum(list(counts.values()), axis=0)
    shown = np.arange(len(names)) if len(names) <= MAX_BARS else np.argsort(-total, kind="stable")[:MAX_BARS]
    bars_px = 130 + (8 + 11 * len(stores)) * len(shown)
    figure = new_figure(1500, bars_px + _SIZES_PX)
    top, bottom = figure.subfigures(2, 1, height_ratios=(bars_px, _SIZES_PX))
    _draw_class_bars(top.subplots(), counts, names, shown)
    panels = bottom.subplots(1, max(len(stores), 2), squeeze=False)[0]
    for axes in panels[len(stores) :]:
        axes.set_visible(False)
    for axes, (split, store) in zip(panels, stores.items()):
        _draw_sizes(axes, _fractions(store, _even(len(store.classes), MAX_LABELS))[:, 2:])
        height = "height / image height" if axes is panels[0] else ""
        dress(axes, f"Box sizes: {split}, {len(store):,} images", "width / image width", height)
    save_figure(figure, path)


def _draw_class_bars(axes: Axes, counts: Mapping[str, np.ndarray], names: Sequence[str], shown: np.ndarray) -> None:
    """Horizontal bars, the splits of a class below each other."""
    from matplotlib.ticker import MaxNLocator

    thick = 0.86 / len(counts)
    total = np.sum(list(counts.values()), axis=0)
    for index, ((split, values), colour) in enumerate(zip(counts.items(), (ACCENT, SECOND, THIRD))):
        places = np.arange(len(shown)) + thick * (index - (len(counts) - 1) / 2)
        bars = axes.barh(places, values[shown], height=0.9 * thick, color=colour, label=f"{split}  {values.sum():,}")
        texts = [f"{values[one]:,}" if total[one] else "" for one in shown.tolist()]
        axes.bar_label(bars, texts, fontsize=6.5, color=INK, padding=2)
    for place in np.flatnonzero(total[shown] == 0).tolist():
        axes.annotate("none", (0, place), (3, 0), textcoords="offset points", va="center", fontsize=6.5, color=GREY)
    more, left_out = len(names) - len(shown), int(total.sum() - total[shown].sum())
    dress(axes, f"Boxes per class{f'; {more:,} more classes have {left_out:,}' if more else ''}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    labels = [_plain(names[index]) for index in shown.tolist()]
    axes.set_yticks(range(len(shown)), labels, fontsize=8, fontfamily=font_families())
    largest = max(int(values.max(initial=0)) for values in counts.values())
    axes.set(xlim=(0, max(largest * 1.12, 1)), ylim=(len(shown) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(counts), fontsize=8, frameon=False, labelcolor=INK
    )  # above the bars, which may be anywhere


def _draw_sizes(axes: Axes, sizes: np.ndarray) -> None:
    """(N, 2) widths and heights as fractions of their images, counted on logarithmic axes."""
    low = -3.0  # as power of ten: a thousandth of the image
    powers = np.log10(np.clip(sizes, 10**low, 1))
    bins = int(np.clip(0.8 * math.sqrt(len(sizes)), 12, 60))
    counts, _, _ = np.histogram2d(powers[:, 0], powers[:, 1], bins=bins, range=[[low, 0], [low, 0]])
    ticks = ([-3, -2, -1, 0], ["0.1%", "1%", "10%", "100%"])
    axes.set_xticks(*ticks)
    axes.set_yticks(*ticks)
    axes.set(xlim=(low, 0), ylim=(low, 0))
    if not len(sizes):
        say(axes, "no boxes")
        return
    shown = np.where(counts.T > 0, np.sqrt(counts.T), np.nan)
    extent = (low, 0, low, 0)
    axes.imshow(shown, origin="lower", extent=extent, aspect="auto", cmap=blues(), vmin=0, interpolation="none")


# ------------------------------------------------------------------------------------------------- training curves

_PANELS = {  # title -> column of results.csv and its legend
    "Box loss": {"train/box_loss": "train", "val/box_loss": "val"},
    "Objectness loss": {"train/obj_loss": "train", "val/obj_loss": "val"},
    "Class loss": {"train/cls_loss": "train", "val/cls_loss": "val"},
    "Learning rate": {"x/lr0": "norms", "x/lr1": "weights", "x/lr2": "biases"},
    "Precision": {"metrics/precision": ""},
    "Recall": {"metrics/recall": ""},
    "mAP @ .5": {"metrics/mAP_0.5": ""},
    "mAP @ .5:.95": {"metrics/mAP_0.5:0.95": ""},
}


def plot_results(csv_path: Path, path: Path) -> None:
    """Every loss and metric of a results.csv over the epochs, the epoch of the best fitness marked."""
    columns = _read_columns(csv_path)
    epochs = columns.get("epoch", np.empty(0))
    best = _best_row(columns)
    figure = new_figure(1800, 900)
    for axes, (title, lines) in zip(figure.subplots(2, 4).flat, _PANELS.items()):
        dress(axes, title, "epoch")
        axes.grid(color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        if best is not None:
            axes.axvline(epochs[best], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        _draw_lines(axes, epochs, {legend: columns[name] for name, legend in lines.items() if name in columns}, best)
    if best is not None:
        figure.suptitle(f"Best fitness at epoch {epochs[best]:g} (dashed)", fontsize=11, color=INK)
    save_figure(figure, path)


def _read_columns(csv_path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV as numbers, NaN for an empty or unreadable cell."""
    with csv_path.open(newline="", encoding="utf-8") as file:
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row] or [[]]
    return {name: np.array([_number(row, at) for row in rows]) for at, name in enumerate(header)}


def _number(row: Sequence[str], at: int) -> float:
    try:
        return float(row[at])
    except (IndexError, ValueError):
        return math.nan


def _best_row(columns: dict[str, np.ndarray]) -> int | None:
    if "metrics/mAP_0.5" not in columns or "metrics/mAP_0.5:0.95" not in columns:
        return None
    scored = fitness(columns["metrics/mAP_0.5"], columns["metrics/mAP_0.5:0.95"])
    return int(np.nanargmax(scored)) if np.isfinite(scored).any() else None


def _draw_lines(axes: Axes, x: np.ndarray, lines: dict[str, np.ndarray], best: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = {legend: y for legend, y in lines.items() if np.isfinite(y).any()}
    if not drawn:
        say(axes, "no data")
        return
    for (legend, y), colour in zip(drawn.items(), (ACCENT, SECOND, THIRD)):
        known = np.isfinite(y)  # an epoch without evaluation has no metrics
        marker = "o" if known.sum() <= 30 else None
        axes.plot(x[known], y[known], color=colour, linewidth=1.6, marker=marker, markersize=3, label=legend)
        if best is not None and not legend:
            axes.plot(x[best], y[best], "o", color=SECOND, markersize=6)
            axes.set_title(f"{axes.get_title(loc='left')}   {y[best]:.3f}", fontsize=10, color=INK, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.set_xlim(x.min() - 0.5, x.max() + 0.5)
    if any(drawn):
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


# ------------------------------------------------------------------------------------------------------ evaluation


def plot_curves(metrics: Metrics, folder: Path) -> None:
    """F1_curve.png, P_curve.png, R_curve.png and PR_curve.png, of the classes with labels; legends as the table has it.

    Precision ends where a class claims nothing, and its mean is that of the classes that claim something.
    """
    curves, classes = metrics.curves, [one for one in metrics.per_class if one.labels]
    colours = [class_colour(index) for index, one in enumerate(metrics.per_class) if one.labels]
    at = f"; legend: at confidence {metrics.best_confidence:.3f}, the best mean F1" if metrics.f1 else ""
    for kind, title, values in (
        ("F1", "F1", curves.f1),
        ("P", "Precision", curves.precision),
        ("R", "Recall", curves.recall),
    ):
        figures = [getattr(one, title.lower()) for one in (metrics, *classes)]
        figure, axes = _plot_classes(
            (curves.confidence, "Confidence"),
            (values, title),
            _legend(classes, [f"{value:.2f}" for value in figures]),
            figures[1:],
            colours,
            title=f"{title} over confidence at IoU .5{at}",
        )
        if kind == "F1" and metrics.f1 > 0:
            _mark(axes, metrics.best_confidence, metrics.f1, f"{metrics.f1:.2f} at {metrics.best_confidence:.3f}")
        save_figure(figure, folder / f"{kind}_curve.png")
    figure, _ = _plot_classes(
        (curves.recall_grid, "Recall"),
        (curves.precision_at_recall, "Precision"),
        _legend(classes, [f"{one.map50:.3f}" for one in (metrics, *classes)]),
        [one.map50 for one in classes],
        colours,
        title="Precision over recall at IoU .5; legend: mAP@.5, as COCO has it",
    )
    save_figure(figure, folder / "PR_curve.png")


def _legend(classes: Sequence[ClassMetrics], figures: Sequence[str]) -> list[str]:
    """The mean, then the classes."""
    names = ["all classes", *(_plain(one.name) for one in classes)]
    return [f"{name}  {figure}" for name, figure in zip(names, figures)]


def _plot_classes(
    x: tuple[np.ndarray, str],
    y: tuple[np.ndarray, str],
    legend: Sequence[str],
    figures: Sequence[float],
    colours: Sequence[Colour],
    *,
    title: str,
) -> tuple[Figure, Axes]:
    """Thin lines for the classes, (C, X), and a thick one for their mean.

    The mean comes first in `legend`. Of many classes those with the highest and the lowest of `figures` are named.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.font_manager import FontProperties

    figure = new_figure(1080, 720)
    axes = figure.subplots()
    dress(axes, title, x[1], y[1])
    axes.grid(color=PALE, linewidth=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    count = len(y[0])
    if not count:
        say(axes, "no labels")
        return figure, axes
    if not np.nan_to_num(y[0]).any():
        say(axes, "nothing found")
    axes.plot(x[0], _mean_of_known(y[0]), color=INK, linewidth=2.6, zorder=4, label=legend[0])
    ranked = np.argsort(-np.asarray(figures), kind="stable").tolist()
    many = count > MAX_NAMED_LINES
    top, others, bottom = (ranked[:8], ranked[8:-8], ranked[-8:]) if many else (sorted(ranked), [], [])
    for index in top:
        axes.plot(x[0], y[0][index], linewidth=1, color=colours[index], label=legend[1 + index], zorder=3)
    if others:
        fade = {"color": GREY, "alpha": float(np.clip(25 / len(others), 0.06, 0.5)), "linewidth": 1}
        axes.add_collection(LineCollection([np.stack([x[0], y[0][index]], 1) for index in others], **fade))
        axes.plot([], [], color="#c6c6c6", linewidth=1, label=f"{len(others):,} others between")
    for index in bottom:
        axes.plot(x[0], y[0][index], linewidth=1, color=colours[index], label=legend[1 + index], zorder=3)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        prop=FontProperties(family=font_families(), size=8),
        frameon=False,
        labelcolor=INK,
        borderaxespad=0,
    )
    return figure, axes


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean of the columns of (C, X) -> (X,), without NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    count = known.sum(0)
    return np.divide(np.where(known, values, 0).sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    """A point of a curve, with what it says on the side where there is more room."""
    axes.axvline(x, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot([x], [y], "o", color=SECOND, markersize=6, zorder=4)
    left = x > 0.7
    axes.annotate(
        text,
        (x, y),
        (-7 if left else 7, 7),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=9,
        color=INK,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )


def plot_confusion(confusion: np.ndarray, names: Sequence[str], folder: Path) -> None:
    """confusion_matrix.png, shares of each true class (column), and confusion_matrix_counts.png.

    `confusion` holds (C + 1, C + 1) counts, predicted x true, last = background. Of very many classes those with the
    most mistakes are shown, if they have any, and the others as one.
    """
    counts, labels = _most_confused(confusion, names)
    totals = counts.sum(0, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    rules = f"\nconfidence above {CONFUSION_CONFIDENCE:g}, IoU from {CONFUSION_IOU:g}"
    if len(names) > MAX_CONFUSED:
        counts[-2, -2] = shares[-2, -2] = np.nan  # among the others: right and wrong in one
        shown = len(labels) - 2
        which = "the most mistakes" if shown == MOST_CONFUSED else "mistakes"
        rules += f"\n{shown} class{'es' * (shown != 1)} with {which}, {len(names) - shown:,} others as one"
    _plot_matrix(100 * shares, labels, f"Percent of each true class{rules}", folder / "confusion_matrix.png", top=100)
    _plot_matrix(counts, labels, f"Counts{rules}", folder / "confusion_matrix_counts.png")


def _most_confused(confusion: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The matrix as f64, other classes than the `MOST_CONFUSED` most confused ones added up, and its labels.

    Classes without any mistake are among the others.
    """
    count = len(names)
    if count <= MAX_CONFUSED:
        return confusion.astype(np.float64), [*names, "background"]
    mistakes = (confusion.sum(0) + confusion.sum(1) - 2 * confusion.diagonal())[:count]
    most = np.argsort(-mistakes, kind="stable")[:MOST_CONFUSED]
    shown = np.sort(most[mistakes[most] > 0])
    place = np.full(count + 1, len(shown))
    place[shown], place[count] = np.arange(len(shown)), len(shown) + 1
    merged = np.zeros((len(shown) + 2, len(shown) + 2))
    np.add.at(merged, (place[:, None], place), confusion)
    return merged, [*(names[index] for index in shown.tolist()), "all others", "background"]


def _plot_matrix(
    values: np.ndarray, labels: Sequence[str], title: str, path: Path, *, top: float | None = None
) -> None:
    """Cells in shades of blue, on a scale by the root up to the largest where there is no `top`, with their numbers."""
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.ticker import MaxNLocator

    count = len(labels)
    cell = float(np.clip(1100 / count, 22, 92))  # px
    beside = 60 + 8 * min(max(map(len, labels)), 25)
    figure = new_figure(max(cell * count + beside + 110, 640), max(cell * count + beside + 40, 480))
    axes = figure.subplots()
    norm = Normalize(0, top) if top else PowerNorm(0.5, 0, max(np.nanmax(values), 1))
    image = axes.imshow(values, cmap=blues(), norm=norm, interpolation="none")
    dress(axes, title, "True", "Predicted")
    for axis in (axes.xaxis, axes.yaxis):
        _name_ticks(axis, labels, cell * count)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _number_cells(axes, values, norm, cell)
    beside_it = axes.inset_axes((1 + 14 / (cell * count), 0, 24 / (cell * count), 1))
    bar = figure.colorbar(image, cax=beside_it, ticks=MaxNLocator(integer=True))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    save_figure(figure, path)


def _number_cells(axes: Axes, values: np.ndarray, norm: Normalize, cell_px: float) -> None:
    """Numbers in cells, none where they would read 0; of very many the largest."""
    text_px = min(0.42 * cell_px, 15)
    rows, columns = np.nonzero(np.nan_to_num(values) >= 0.5)
    largest = np.argsort(-values[rows, columns], kind="stable")[:MAX_NUMBERS]
    for row, column in zip(rows[largest].tolist(), columns[largest].tolist()):
        value = values[row, column]
        text = _number_text(round(value), int(cell_px / (0.66 * text_px)))
        colour = "white" if norm(value) > 0.45 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=_points(text_px), color=colour, in_layout=False)


def _number_text(value: int, letters: int) -> str:
    """As long as fits."""
    if len(f"{value:,}") <= letters:
        return f"{value:,}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            text = f"{value / unit:.1f}{letter}"
            return text if len(text) <= letters else f"{value / unit:.0f}{letter}"
    return str(value)
