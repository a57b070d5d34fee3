"""The figures of a run: label statistics, training curves, curves and confusion of an evaluation.

Figures are drawn through matplotlib's object interface alone and encoded by OpenCV: no pyplot, no global style, no
display, so a picture can be made anywhere, also from a thread. Places are counted in pixels, not left to a layout
engine, which would take half of the time. Nothing to show gives a picture that says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.report.annotate import (
    Colour,
    class_colour,
    class_name,
    font_families,
    quiet_matplotlib,
    text_width,
    write_image,
)
from utils.report.csv_table import read_rows
from utils.report.run_files import Table
from utils.structures import CONFUSION_CONFIDENCE, CONFUSION_IOU, CROWD, ClassMetrics, LabelStore, Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#767676", "#e4e4e4"
ACCENT, SECOND, THIRD = "#1f5fa8", "#d9692a", "#3b8f5c"
DPI = 128  # a power of two, so that whole pixels survive the way through inches
LEFT, ABOVE, BELOW, EDGE = 84, 40, 56, 24  # px around axes: ticks and labels, a title, ticks and labels, nothing
MAX_BOXES = 2_000  # drawn one by one
MAX_LABELS = 1_000_000  # counted into 2-D histograms; class counts are always complete
MAX_NAMED_LINES = 20
MAX_CONFUSED, MOST_CONFUSED = 100, 60  # classes of a confusion matrix; where there are more, these
MAX_NUMBERS = 800  # in its cells
MAX_BARS = 40  # classes, in the picture of a data set

_LEAST_PT = 5.5  # of letters: less cannot be read


# ---------------------------------------------------------------------------------------------------------- figures


def new_figure(width_px: float, height_px: float) -> Figure:
    with quiet_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the top left corner; ticks, labels and title lie around it."""
    W, H = figure.get_size_inches() * figure.dpi
    return figure.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))


def save_figure(figure: Figure, path: Path) -> None:
    with quiet_matplotlib():
        figure.canvas.draw()
    write_image(np.asarray(figure.canvas.buffer_rgba())[..., :3], path)


def dress(axes: Axes, title: str = "", x: str = "", y: str = "", note: str = "") -> None:
    """The one look of all axes. The note is at the right of the title."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    if note:
        axes.set_title(note, fontsize=8, color=GREY, loc="right")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
    axes.tick_params(which="minor", color=GREY, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=GREY)


def _count_axis(axis: Axis, most: int = 8) -> None:
    """Whole numbers at not many more than so many places."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def _plain(name: str) -> str:
    """A name as text of a figure: no formulas, never kept out of a legend for a leading underscore, not too long."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _plain_names(names: Sequence[str], indices: Iterable[int] | None = None) -> list[str]:
    return [_plain(class_name(names, index)) for index in (range(len(names)) if indices is None else indices)]


def _points(px: float) -> float:
    return px * 72 / DPI


def _px(points: float) -> int:
    return round(points * DPI / 72)


def _width_px(texts: Iterable[str], points: float) -> int:
    """Of the widest, which is among those with most letters."""
    longest = sorted(texts, key=len)[-8:]
    return max((text_width(text.replace(r"\$", "$"), _px(points)) for text in longest), default=0)


def _room_px(texts: Iterable[str], points: float) -> int:
    """For the widest, and as much for a text that is a little wider, as another version of matplotlib draws it."""
    return 16 * math.ceil(_width_px(texts, points) / 16)


# ------------------------------------------------------------------------------------------------ label statistics


_WIDTH = 1200  # px, as all below
_MOST_COUNTED = 25  # classes whose bars fit into half of it
_TALL, _LOW, _CORRELATED = 430, 320, 220  # heights of axes
_ENDS = (0.1, 0.2, 0.3, 0.5)  # of axes for sizes where all boxes are small


def plot_labels(store: LabelStore, names: Sequence[str], folder: Path) -> None:
    """labels.jpg (class counts, box shapes, where centres lie, sizes) and labels_correlogram.jpg (each against each).

    Positions and sizes are fractions of the image. Where there are very many labels an even selection stands for all.
    """
    counts = np.bincount(store.classes, minlength=len(names))[: len(names)]
    many = len(names) > _MOST_COUNTED
    columns, tall = (3, _LOW) if many else (2, _TALL)
    across = _WIDTH // columns
    wide = (_WIDTH if many else across) - LEFT - EDGE
    ticks = _NameTicks.along(names, wide)
    second = ABOVE + _TALL + ticks.room_px + BELOW + ABOVE - 20
    figure = new_figure(_WIDTH, second + tall + BELOW)
    _draw_counts(axes_at(figure, LEFT, ABOVE, wide, _TALL), counts, names, ticks)
    places = [(LEFT + across * column, second) for column in range(columns)]
    if not many:
        places.insert(0, (LEFT + across, ABOVE))
    shapes, centres, sizes = (axes_at(figure, *place, across - LEFT - EDGE, tall) for place in places)
    x, y, width, height = _fractions(store, _even(len(store.classes), MAX_LABELS)).T
    largest = max(width.max(initial=0), height.max(initial=0))
    end = next((end for end in _ENDS if largest <= end), 1.0)
    _draw_shapes(shapes, store, end)
    dress(centres, "Box centres", "x / image width", "y / image height", _draw_histogram(centres, x, y))
    centres.invert_yaxis()  # as in the image
    note = _draw_histogram(sizes, width, height, end, end)
    dress(sizes, "Box sizes", "width / image width", "height / image height", note)
    save_figure(figure, folder / "labels.jpg")
    values = {"x": (x, 1.0), "y": (y, 1.0), "width": (width, end), "height": (height, end)}
    _plot_correlogram(values, folder / "labels_correlogram.jpg")


def _even(total: int, most: int) -> np.ndarray:
    """At most `most` row numbers, spread evenly over `total`."""
    return np.arange(total) if total <= most else np.linspace(0, total - 1, most).astype(np.int64)


def _fractions(store: LabelStore, rows: np.ndarray) -> np.ndarray:
    """(R, 4) centre x, centre y, width, height as fractions of the image."""
    image = np.searchsorted(store.offsets, rows, side="right") - 1
    boxes = store.boxes[rows].astype(np.float64) / np.maximum(store.sizes[image][:, [1, 0, 1, 0]], 1)
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


@dataclass(frozen=True)
class _NameTicks:
    """The names of classes along an axis: none where they would be illegible, upright where they would meet."""

    names: Sequence[str]
    points: float
    upright: bool
    room_px: int  # beside the axis

    @classmethod
    def along(cls, names: Sequence[str], length_px: float, *, level: bool = True) -> _NameTicks:
        """Of a `level` axis of this length, or of an upright one, where names are never turned."""
        pitch = length_px / max(len(names), 1)
        points = min(8.0, _points(0.9 * pitch))
        if points < _LEAST_PT:
            return cls((), 8.0, False, _px(8))
        names = _plain_names(names)
        upright = level and _width_px(names, points) > pitch - 6
        return cls(names, points, upright, _room_px(names, points) if upright or not level else _px(points))

    def put_on(self, axis: Axis) -> None:
        look = {"fontsize": self.points, "fontfamily": font_families(), "rotation": 90 if self.upright else 0}
        axis.set_ticks(range(len(self.names)), self.names, **look)


def _draw_counts(axes: Axes, counts: np.ndarray, names: Sequence[str], ticks: _NameTicks) -> None:
    """A bar for each class; of more than can be named, the counts alone, the largest first."""
    title = f"Labels per class ({counts.sum():,} in all)"
    if len(counts) and not ticks.names:
        _draw_ranks(axes, counts, names)
        dress(axes, f"{title}, the most frequent of {len(counts):,} classes first", "rank of the class", "labels")
        return
    colours = [class_colour(index) for index in range(len(counts))]
    bars = axes.bar(np.arange(len(counts)), counts, color=colours, width=0.8)
    dress(axes, title, y="labels")
    axes.set(xlim=(-0.6, len(counts) - 0.4), ylim=(0, max(counts.max(initial=0) * 1.1, 1)))
    ticks.put_on(axes.xaxis)
    _count_axis(axes.yaxis)
    texts = [f"{count:,}" for count in counts]
    pitch = axes.bbox.width / max(len(counts), 1)
    points = next((size for size in (8, 6.5, _LEAST_PT) if _width_px(texts, size) < pitch), None)
    if points:
        axes.bar_label(bars, texts, fontsize=points, color=INK, padding=2)


def _draw_ranks(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """On a logarithmic axis, with the names of the most frequent classes."""
    order = np.argsort(-counts, kind="stable")
    axes.stairs(np.maximum(counts[order], 0.5), np.arange(len(counts) + 1) + 0.5, fill=True, baseline=0.5, color=ACCENT)
    axes.set_yscale("log")
    axes.tick_params(which="minor", labelleft=False)
    axes.set(xlim=(0.5, len(counts) + 0.5), ylim=(0.5, max(counts.max() * 2, 10)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _count_axis(axes.xaxis)
    lines = [f"{name}  {counts[index]:,}" for name, index in zip(_plain_names(names, order[:10]), order[:10].tolist())]
    empty = int((counts == 0).sum())
    if empty:
        lines.append(f"{empty:,} class{'es have' if empty > 1 else ' has'} none")
    look = {"fontsize": 8, "fontfamily": font_families(), "color": INK, "ha": "right", "va": "top"}
    plate = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.text(0.99, 0.98, "\n".join(lines), transform=axes.transAxes, linespacing=1.4, bbox=plate, **look)


def _draw_shapes(axes: Axes, store: LabelStore, end: float) -> None:
    """Up to sizes of `end`; the largest first, so that they hide none."""
    from matplotlib.collections import LineCollection

    rows = _even(len(store.classes), MAX_BOXES)
    sides = _fractions(store, rows)[:, 2:]
    order = np.argsort(-sides.prod(1), kind="stable")
    rows, half = rows[order], sides[order] / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
    colours = [(*class_colour(int(index)), 0.35) for index in store.classes[rows]]
    axes.add_collection(LineCollection(half[:, None] * corners, colors=colours, linewidths=0.7), autolim=False)
    axes.set(xlim=(-0.52 * end, 0.52 * end), ylim=(0.52 * end, -0.52 * end))
    selected = f"{len(rows):,} of {len(store.classes):,}" if len(rows) < len(store.classes) else ""
    dress(axes, "Box shapes", "from centre / image width", "from centre / image height", selected)
    if not len(rows):
        say(axes, "no labels")


def _draw_histogram(axes: Axes, x: np.ndarray, y: np.ndarray, end_x: float = 1.0, end_y: float = 1.0) -> str:
    """From nought to the ends. Says what the darkest shade stands for."""
    bins = int(np.clip(0.8 * math.sqrt(len(x)), 10, 50))  # few labels in fine bins are only noise
    counts, _, _ = np.histogram2d(x, y, bins=bins, range=[[0, end_x], [0, end_y]])
    shown = np.where(counts.T > 0, np.sqrt(counts.T), np.nan)  # the root keeps rare places visible beside busy ones
    axes.set(xlim=(0, end_x), ylim=(0, end_y))
    if not len(x):
        say(axes, "no labels")
        return ""
    extent = (0, end_x, 0, end_y)
    axes.imshow(shown, origin="lower", extent=extent, aspect="auto", cmap=blues(), vmin=0, interpolation="none")
    return f"darkest: {counts.max():,.0f}"


def blues():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blues", ["#e6eef8", "#8db4dc", ACCENT, "#0b2a52"])


def _plot_correlogram(values: dict[str, tuple[np.ndarray, float]], path: Path) -> None:
    """Of values between nought and an end."""
    side, apart = _CORRELATED, _CORRELATED + 38
    figure = new_figure(LEFT + 3 * apart + side + EDGE, EDGE + 3 * apart + side + BELOW)
    for row, (y_name, (y, end_y)) in enumerate(values.items()):
        for column, (x_name, (x, end_x)) in enumerate(list(values.items())[: row + 1]):
            axes = axes_at(figure, LEFT + column * apart, EDGE + row * apart, side, side)
            if column == row:
                axes.stairs(*np.histogram(x, bins=50, range=(0, end_x)), fill=True, color=ACCENT)
                axes.set(xlim=(0, end_x), ylim=(0, None if len(x) else 1), yticks=[])
            else:
                _draw_histogram(axes, x, y, end_x, end_y)
                axes.set_yticks(np.linspace(0, end_y, 6))
            dress(axes, x=x_name if row == 3 else "", y="labels" if column == row else y_name if column == 0 else "")
            axes.set_xticks(np.linspace(0, end_x, 3))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(labelbottom=row == 3, labelleft=column == 0)
            if (row, column) == (1, 0):
                axes.invert_yaxis()  # as in the image
    W, H = figure.get_size_inches() * figure.dpi
    said = f"Centres and sizes of {len(values['x'][0]):,} boxes\nas fractions of the image; darker: more"
    figure.text(1 - EDGE / W, 1 - EDGE / H, said, fontsize=10, color=INK, ha="right", va="top", linespacing=1.5)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------- a whole data set


_SCAN, _SIZES = 1500, 360  # px: width of the picture, height of the histograms of sizes


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
    labels = _plain_names(names, shown.tolist())
    bars_px = (8 + 11 * len(stores)) * max(len(shown), 1)
    second = ABOVE + bars_px + BELOW + ABOVE - 10
    figure = new_figure(_SCAN, second + _SIZES + BELOW)
    beside = EDGE + _room_px(labels, 8)
    _draw_class_bars(axes_at(figure, beside, ABOVE, _SCAN - beside - EDGE, bars_px), counts, len(names), shown, labels)
    across = _SCAN // max(len(stores), 2)
    for place, (split, store) in enumerate(stores.items()):
        axes = axes_at(figure, LEFT + place * across, second, across - LEFT - EDGE, _SIZES)
        note = _draw_sizes(axes, _fractions(store, _even(len(store.classes), MAX_LABELS))[:, 2:])
        height = "height / image height" if not place else ""
        dress(axes, f"Box sizes: {split}, {len(store):,} images", "width / image width", height, note)
    save_figure(figure, path)


def _draw_class_bars(
    axes: Axes, counts: Mapping[str, np.ndarray], num_classes: int, shown: np.ndarray, labels: Sequence[str]
) -> None:
    """Horizontal bars of the classes shown, the splits of a class below each other."""
    thick = 0.86 / len(counts)
    total = np.sum(list(counts.values()), axis=0)
    for index, ((split, values), colour) in enumerate(zip(counts.items(), (ACCENT, SECOND, THIRD))):
        places = np.arange(len(shown)) + thick * (index - (len(counts) - 1) / 2)
        bars = axes.barh(places, values[shown], height=0.9 * thick, color=colour, label=f"{split}  {values.sum():,}")
        texts = [f"{values[one]:,}" if total[one] else "" for one in shown.tolist()]
        axes.bar_label(bars, texts, fontsize=6.5, color=INK, padding=2)
    for place in np.flatnonzero(total[shown] == 0).tolist():
        axes.annotate("none", (0, place), (3, 0), textcoords="offset points", va="center", fontsize=6.5, color=GREY)
    more, left_out = num_classes - len(shown), int(total.sum() - total[shown].sum())
    dress(axes, f"Boxes per class{f'; {more:,} more classes have {left_out:,}' if more else ''}")
    _count_axis(axes.xaxis)
    axes.set_yticks(range(len(shown)), labels, fontsize=8, fontfamily=font_families())
    largest = max(int(values.max(initial=0)) for values in counts.values())
    axes.set(xlim=(0, max(largest * 1.12, 1)), ylim=(len(shown) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(counts), fontsize=8, frameon=False, labelcolor=INK
    )  # above the bars, which may be anywhere


def _draw_sizes(axes: Axes, sizes: np.ndarray) -> str:
    """(N, 2) widths and heights as fractions of their images, counted on logarithmic axes. Says what the darkest is."""
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
        return ""
    shown = np.where(counts.T > 0, np.sqrt(counts.T), np.nan)
    extent = (low, 0, low, 0)
    axes.imshow(shown, origin="lower", extent=extent, aspect="auto", cmap=blues(), vmin=0, interpolation="none")
    return f"darkest: {counts.max():,.0f}"


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


def plot_results(csv_path: Path, path: Path, *, best_epoch: int | None = None) -> None:
    """Every loss and metric of a results.csv over the epochs; the one of best.pt, `best_epoch` if given, is marked."""
    table = Table.of(read_rows(csv_path))
    columns, epochs = {name: np.array(table.numbers(name)) for name in table.columns}, np.array(table.epochs)
    best = table.best_row(best_epoch)
    W, H, head = 1800, 900, 46
    figure = new_figure(W, H)
    width, height = W / 4 - LEFT - EDGE, (H - head) / 2 - ABOVE - BELOW
    for place, (title, lines) in enumerate(_PANELS.items()):
        row, column = divmod(place, 4)
        axes = axes_at(figure, LEFT + column * W / 4, head + ABOVE + row * (H - head) / 2, width, height)
        dress(axes, title, "epoch")
        axes.grid(color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        if best is not None:
            axes.axvline(epochs[best], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        _draw_lines(axes, epochs, {legend: columns[name] for name, legend in lines.items() if name in columns}, best)
    if best is not None:
        of = f"epoch {epochs[best]:,g} of {epochs.max():,g}"
        said = f"Best fitness at {of}: dashed lines, and the figures beside titles"
        figure.text(LEFT / W, 1 - EDGE / H, said, fontsize=11, color=INK, va="center")
    save_figure(figure, path)


def _draw_lines(axes: Axes, x: np.ndarray, lines: dict[str, np.ndarray], best: int | None) -> None:
    drawn = {legend: y for legend, y in lines.items() if np.isfinite(y).any()}
    if not drawn:
        axes.set(xticks=[], yticks=[])
        say(axes, "no data")
        return
    few = len(drawn) < 3
    for place, ((legend, y), colour) in enumerate(zip(drawn.items(), (ACCENT, SECOND, THIRD))):
        known = np.isfinite(y)  # an epoch without evaluation has no metrics
        marker = "o" if known.sum() <= (30 if few else 1) else None
        width = 1.6 if known.sum() <= 300 else 1.0
        if not few:
            width += 1.2 * (2 - place)  # rates coincide, and all show
        axes.plot(x[known], y[known], color=colour, linewidth=width, marker=marker, markersize=3, label=legend)
        if best is not None and not legend:
            axes.plot(x[best], y[best], "o", color=SECOND, markersize=6)
            axes.set_title(f"{axes.get_title(loc='left')}   {y[best]:.3f}", fontsize=10, color=INK, loc="left")
    _scale_lines(axes, x, np.concatenate([y[np.isfinite(y)] for y in drawn.values()]), loss=few and any(drawn))
    look = {"fontsize": 8, "labelcolor": INK, "handlelength": 1.6, "handletextpad": 0.5, "bbox_to_anchor": (1, 1)}
    if not few:  # rates fall: there is room above their end
        axes.legend(loc="upper right", edgecolor="none", **look)
    elif any(drawn):  # beside the title, where no line can be
        axes.legend(loc="lower right", ncols=2, columnspacing=1.2, borderaxespad=0.2, frameon=False, **look)


def _scale_lines(axes: Axes, x: np.ndarray, y: np.ndarray, *, loss: bool) -> None:
    """Whole epochs; values on a logarithmic axis where a few would press the others flat, as of a loss that blew up."""
    from matplotlib.ticker import MaxNLocator

    _count_axis(axes.xaxis, 6)
    beyond = max(0.5, 0.01 * (x.max() - x.min()))
    axes.set_xlim(x.min() - beyond, x.max() + beyond)
    if loss and y.min() > 0 and y.max() > 100 * np.median(y):
        axes.set_yscale("log")
        axes.tick_params(which="minor", labelleft=False)
        axes.set_ylabel("logarithmic", fontsize=8, color=GREY)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        top = axes.get_ylim()[1] if y.max() > 0 else 1.0
        if y.min() >= 0:  # what is never negative has no axis for it
            axes.set_ylim(max(axes.get_ylim()[0], -0.03 * top), top)
    axes.yaxis.set_major_formatter("{x:.4g}")


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
    names = ["all classes", *_plain_names([one.name for one in classes])]
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

    count = len(y[0])
    ranked = np.argsort(-np.asarray(figures), kind="stable").tolist()
    many = count > MAX_NAMED_LINES
    top, others, bottom = (ranked[:8], ranked[8:-8], ranked[-8:]) if many else (sorted(ranked), [], [])
    rest = f"{len(others):,} others between"
    named = [legend[0], *(legend[1 + index] for index in (*top, *bottom)), *([rest] if others else [])]
    W, H = 1080, 720
    figure = new_figure(W, H)
    width = W - LEFT - EDGE - (_room_px(named, 8) + 56 if count else 0)  # 56: sample and spaces of the legend
    axes = axes_at(figure, LEFT, ABOVE, width, H - ABOVE - BELOW)
    dress(axes, title, x[1], y[1])
    axes.grid(color=PALE, linewidth=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    if not count:
        say(axes, "no labels")
        return figure, axes
    if not np.nan_to_num(y[0]).any():
        say(axes, "nothing found")
    axes.plot(x[0], _mean_of_known(y[0]), color=INK, linewidth=2.6, zorder=4, label=legend[0])
    for index in top:  # a single class is its own mean, and is seen on top of it
        order = 3 if count > 1 else 5
        axes.plot(x[0], y[0][index], linewidth=1, color=colours[index], label=legend[1 + index], zorder=order)
    if others:
        fade = {"color": GREY, "alpha": float(np.clip(25 / len(others), 0.06, 0.5)), "linewidth": 1}
        axes.add_collection(LineCollection([np.stack([x[0], y[0][index]], 1) for index in others], **fade))
        axes.plot([], [], color="#c6c6c6", linewidth=1, label=rest)
    for index in bottom:
        axes.plot(x[0], y[0][index], linewidth=1, color=colours[index], label=legend[1 + index], zorder=3)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1 + 14 / width, 1),
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
    percent = "Percent of each true class; last column: of false detections"
    _plot_matrix(100 * shares, labels, f"{percent}{rules}", folder / "confusion_matrix.png", top=100)
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

    count = len(labels)
    cell = float(np.clip(1100 / count, 22, max(92, 280 / count)))
    side = cell * count
    beside = _NameTicks.along(labels, side, level=False)
    under = _NameTicks.along(labels, side)
    left = beside.room_px + EDGE + 34
    above = ABOVE + 24 * title.count("\n")
    norm = Normalize(0, top) if top else PowerNorm(0.5, 0, max(np.nanmax(values), 1))
    scale_px = 50 + _room_px([f"{norm.vmax:,.0f}"], 8)
    width = left + max(side + scale_px, _room_px(title.split("\n"), 10)) + EDGE
    figure = new_figure(width, above + side + under.room_px + BELOW - 8)
    axes = axes_at(figure, left, above, side, side)
    axes.imshow(values, cmap=blues(), norm=norm, interpolation="none", aspect="auto")
    dress(axes, title, "True", "Predicted")
    under.put_on(axes.xaxis)
    beside.put_on(axes.yaxis)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _rule_cells(axes, count)
    _number_cells(axes, values, norm, cell)
    _draw_scale(axes_at(figure, left + side + 16, above + 8, 22, side - 8), norm)  # its top number is below the title
    save_figure(figure, path)


def _rule_cells(axes: Axes, count: int) -> None:
    """White between cells, and more of it before the background, which is no class."""
    between = np.arange(count - 1) + 0.5
    for place, width in zip(between, [*[0.6] * (count - 2), 2.5]):
        axes.axhline(place, color="white", linewidth=width)
        axes.axvline(place, color="white", linewidth=width)


def _draw_scale(axes: Axes, norm: Normalize) -> None:
    """The shades of `norm`, with what they stand for."""
    dress(axes)
    shades = np.linspace(norm.vmin, norm.vmax, 256)
    axes.pcolormesh([0, 1], np.linspace(norm.vmin, norm.vmax, 257), shades[:, None], cmap=blues(), norm=norm)
    axes.set(xlim=(0, 1), ylim=(norm.vmin, norm.vmax), xticks=[])
    axes.spines[:].set_visible(False)
    axes.yaxis.tick_right()
    _count_axis(axes.yaxis)
    axes.tick_params(length=0)


def _number_cells(axes: Axes, values: np.ndarray, norm: Normalize, cell_px: float) -> None:
    """Numbers in cells, none where they would read 0; of very many the largest."""
    text_px = min(0.5 * cell_px, 15)
    rows, columns = np.nonzero(np.nan_to_num(values) >= 0.5)
    largest = np.argsort(-values[rows, columns], kind="stable")[:MAX_NUMBERS]
    for row, column in zip(rows[largest].tolist(), columns[largest].tolist()):
        value = values[row, column]
        text = _number_text(round(value), int(cell_px / (0.66 * text_px)))
        colour = "white" if norm(value) > 0.45 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=_points(text_px), color=colour)
    if cell_px >= 40:
        for column in np.flatnonzero(np.isnan(values).all(0)).tolist():
            axes.text(column, len(values) - 1, "none", ha="center", va="center", fontsize=7, color=GREY, rotation=90)


def _number_text(value: int, letters: int) -> str:
    """As long as fits."""
    if len(f"{value:,}") <= letters:
        return f"{value:,}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            text = f"{value / unit:.1f}{letter}"
            return text if len(text) <= letters else f"{value / unit:.0f}{letter}"
    return str(value)
