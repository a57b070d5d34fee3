"""The pictures of a run: batches with boxes, label statistics, training curves, the confusion matrix.

Figures are drawn through matplotlib's object interface alone and encoded by OpenCV: no pyplot, no global style, no
display, so a picture can be made anywhere, also from a thread. Nothing to show gives a picture that says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.files import write_atomic
from utils.report.annotate import class_colour, ink_on, quiet_matplotlib
from utils.structures import CROWD, Curves, LabelStore, fitness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#8a8a8a", "#e4e4e4"
ACCENT, SECOND, THIRD = "#1f5fa8", "#d9692a", "#3b8f5c"
DPI = 128  # a power of two, so that whole pixels survive the way through inches
MAX_SIDE_PX = 1920  # of a mosaic
MAX_BOXES = 2_000  # drawn one by one
MAX_LABELS = 1_000_000  # counted into 2-D histograms; class counts are always complete
MAX_NAMED_LINES = 20
MAX_NUMBERED_CLASSES = 30
MAX_BARS = 40  # classes, in the picture of a data set

_TEXT_PX, _STRIP_PX, _GAP_PX = 13, 22, 8  # of a mosaic: label text, caption strip, space between tiles


# ---------------------------------------------------------------------------------------------------------- figures


def _figure(width_px: float, height_px: float, *, layout: str | None = "constrained") -> Figure:
    with quiet_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
    if layout:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    return figure


def _save(figure: Figure, path: Path) -> None:
    with quiet_matplotlib():
        figure.canvas.draw()
    _write_image(np.asarray(figure.canvas.buffer_rgba())[..., :3], path)


def _write_image(image: np.ndarray, path: Path) -> None:
    """Encode (H, W, 3) u8 RGB as the suffix of `path` says and write it."""
    done, encoded = cv2.imencode(path.suffix, image[..., ::-1])
    assert done, path
    write_atomic(path, lambda file: file.write(encoded.tobytes()) and None)


def _dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """The one look of all axes."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=GREY)


def _shorten(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _plain(name: str) -> str:
    """A name as text of a figure: no formulas, never kept out of a legend for a leading underscore, not too long."""
    return (" " if name.startswith("_") else "") + _shorten(name).replace("$", r"\$")


# ---------------------------------------------------------------------------------------------------------- batches


def plot_batch(
    images: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    image_of: np.ndarray,
    names: Sequence[str],
    path: Path,
    *,
    scores: np.ndarray | None = None,
    captions: Sequence[str] | None = None,
    max_images: int = 16,
    confidence: float = 0.25,
) -> None:
    """A mosaic of the first `max_images` images with their boxes, names and, where given, scores.

    images (B, 3, H, W) u8 RGB; boxes (T, 4) xyxy px of those images; classes, image_of, scores (T,); captions (B,), of
    which the last path part is shown. Boxes that score below `confidence` are left out. Small images are enlarged so
    that text stays legible. A name that finds no free place is left out: its box still has the colour of the class.
    """
    images = images[:max_images]
    keep = image_of < len(images)
    if scores is not None:
        keep &= scores >= confidence
    mosaic, origins, scale = _tile(images)
    H, W, _ = mosaic.shape
    tile_px = np.array(images.shape[:1:-1]) * scale  # width, height

    figure = _figure(W, H, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(mosaic, interpolation="none", extent=(0, W, H, 0), aspect="auto")
    axes.set(xlim=(0, W), ylim=(H, 0))
    for index, origin in enumerate(origins):
        area = (*origin, *(origin + tile_px))
        mine = np.flatnonzero(keep & (image_of == index))
        if scores is not None:
            mine = mine[np.argsort(-scores[mine], kind="stable")]
        texts = [_box_text(names, int(classes[row]), None if scores is None else scores[row]) for row in mine]
        colours = [class_colour(int(classes[row])) for row in mine]
        _draw_boxes(axes, boxes[mine] * scale + np.tile(origin, 2), texts, colours, area)
        if captions is not None:
            caption = _fit_text(figure.canvas.get_renderer(), Path(captions[index]).name, tile_px[0])
            axes.text(
                origin[0],
                origin[1] - 5,
                caption,
                fontsize=_points(_TEXT_PX),
                color=INK,
                va="baseline",
                parse_math=False,
            )
    _save(figure, path)


def _tile(images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], float]:
    """A mosaic (H, W, 3) on white, the top-left px of each tile in it, and the scale from image px."""
    B, _, H, W = images.shape
    columns = max(min(math.ceil(math.sqrt(B * H / W)), B), 1)  # about as wide as high
    rows = max(math.ceil(B / columns), 1)
    room = (MAX_SIDE_PX - _GAP_PX) / columns - _GAP_PX, (MAX_SIDE_PX - _GAP_PX) / rows - _GAP_PX - _STRIP_PX
    scale = min(room[0] / W, room[1] / H)
    scale = float(min(int(scale), 4)) if scale >= 1 else scale  # enlarge by whole factors: pixels stay pixels
    width, height = max(round(W * scale), 1), max(round(H * scale), 1)

    step = np.array([width + _GAP_PX, height + _GAP_PX + _STRIP_PX])
    mosaic = np.full((rows * step[1] + _GAP_PX, columns * step[0] + _GAP_PX, 3), 255, np.uint8)
    origins = []
    for index, image in enumerate(images):
        x, y = origin = np.array([index % columns, index // columns]) * step + (_GAP_PX, _GAP_PX + _STRIP_PX)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
        mosaic[y : y + height, x : x + width] = cv2.resize(pixels, (width, height), interpolation=how)
        origins.append(origin)
    return mosaic, origins, scale


def _box_text(names: Sequence[str], index: int, score: float | None) -> str:
    name = _shorten(names[index] if index < len(names) else str(index))
    return name if score is None else f"{name} {score:.2f}"


def _draw_boxes(
    axes: Axes,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[tuple[float, float, float]],
    area: tuple[float, float, float, float],
) -> None:
    """Boxes in px of the mosaic, cut to the tile `area` (xyxy), each with its text where there is room."""
    from matplotlib.patches import Rectangle

    tile = Rectangle(area[:2], area[2] - area[0], area[3] - area[1], transform=axes.transData)
    renderer = axes.figure.canvas.get_renderer()
    taken = np.empty((0, 4))
    for box, colour in zip(boxes, colours):
        outline = Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, edgecolor=colour, linewidth=_points(2))
        axes.add_patch(outline).set_clip_path(tile)
    for box, text, colour in zip(boxes, texts, colours):
        text = _fit_text(renderer, text, area[2] - area[0] - 6)
        size = np.array([_text_width(renderer, text) + 6, _TEXT_PX + 5])
        plate = _free_place(box, size, area, taken)
        if plate is None:
            continue
        taken = np.vstack([taken, plate])
        axes.add_patch(Rectangle(plate[:2], *size, facecolor=colour, edgecolor="none", zorder=3))
        axes.text(
            plate[0] + 3,
            plate[3] - 5,
            text,
            fontsize=_points(_TEXT_PX),
            color=ink_on(colour),
            va="baseline",
            zorder=4,
            parse_math=False,
        )


def _free_place(
    box: np.ndarray, size: np.ndarray, area: tuple[float, float, float, float], taken: np.ndarray
) -> np.ndarray | None:
    """Where a text of `size` goes: above its box, inside at the top or bottom, or below; None when all is taken."""
    width, height = size
    left, top, right, bottom = box
    for x, y in (
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (right - width, top),
        (left, bottom),
        (left, bottom - height),
        (right - width, bottom),
        (right - width, bottom - height),
    ):
        if y < area[1] or y + height > area[3]:
            continue
        x = min(max(x, area[0]), area[2] - width)
        plate = np.array([x, y, x + width, y + height])
        if not ((plate[:2] < taken[:, 2:]) & (plate[2:] > taken[:, :2])).all(1).any():
            return plate
    return None


def _points(px: float) -> float:
    return px * 72 / DPI


def _text_width(renderer: RendererAgg, text: str) -> float:
    from matplotlib.font_manager import FontProperties

    with quiet_matplotlib():
        width, _, _ = renderer.get_text_width_height_descent(text, FontProperties(size=_points(_TEXT_PX)), ismath=False)
    return width


def _fit_text(renderer: RendererAgg, text: str, width: float) -> str:
    """`text`, shortened with an ellipsis until it is at most `width` px wide."""
    if _text_width(renderer, text) <= width:
        return text
    while text and _text_width(renderer, text + "…") > width:
        text = text[:-1]
    return text + "…"


# ------------------------------------------------------------------------------------------------ label statistics


def plot_labels(store: LabelStore, names: Sequence[str], folder: Path) -> None:
    """labels.jpg (class counts, box shapes, where centres lie, sizes) and labels_correlogram.jpg (each against each).

    Positions and sizes are fractions of the image. Where there are very many labels an even selection stands for all.
    """
    figure = _figure(1200, 1100)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    counts = np.bincount(store.classes, minlength=len(names))[: len(names)]
    _draw_counts(top_left, counts, names)
    _draw_shapes(top_right, store)
    x, y, width, height = _fractions(store, _even(len(store.classes), MAX_LABELS)).T
    _draw_histogram(bottom_left, x, y)
    _dress(bottom_left, "Box centres", "x / image width", "y / image height")
    bottom_left.invert_yaxis()  # as in the image
    _draw_histogram(bottom_right, width, height)
    _dress(bottom_right, "Box sizes", "width / image width", "height / image height")
    _save(figure, folder / "labels.jpg")
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
    _dress(axes, f"Labels per class ({counts.sum():,} in all)")
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
    axis.set_ticks(range(len(names)), names, rotation=90 if turned else 0, fontsize=size)


def _draw_shapes(axes: Axes, store: LabelStore) -> None:
    from matplotlib.collections import LineCollection

    rows = _even(len(store.classes), MAX_BOXES)
    half = _fractions(store, rows)[:, 2:] / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
    colours = [(*class_colour(int(index)), 0.35) for index in store.classes[rows]]
    axes.add_collection(LineCollection(half[:, None] * corners, colors=colours, linewidths=0.7))
    axes.set(xlim=(-0.55, 0.55), ylim=(-0.55, 0.55))
    _dress(axes, "Box shapes about a common centre", "width / image width", "height / image height")
    if not len(rows):
        _say(axes, "no labels")


def _draw_histogram(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    bins = int(np.clip(0.8 * math.sqrt(len(x)), 10, 50))  # few labels in fine bins are only noise
    counts, _, _ = np.histogram2d(x, y, bins=bins, range=[[0, 1], [0, 1]])
    shown = np.where(counts.T > 0, np.sqrt(counts.T), np.nan)  # the root keeps rare places visible beside busy ones
    axes.set(xlim=(0, 1), ylim=(0, 1))
    if not len(x):
        _say(axes, "no labels")
        return
    axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap=_blues(), vmin=0, interpolation="none")


def _blues():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blues", ["#eef4fa", "#8db4dc", ACCENT, "#0b2a52"])


def _plot_correlogram(values: dict[str, np.ndarray], path: Path) -> None:
    figure = _figure(1100, 1100)
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
            _dress(axes, x=x_name if row == 3 else "", y=y_name if column == 0 and row else "")
            axes.set_xticks([0, 0.5, 1])
            axes.tick_params(labelbottom=row == 3, labelleft=column == 0)
    _save(figure, path)


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
    figure = _figure(1500, bars_px + _SIZES_PX)
    top, bottom = figure.subfigures(2, 1, height_ratios=(bars_px, _SIZES_PX))
    _draw_class_bars(top.subplots(), counts, names, shown)
    panels = bottom.subplots(1, max(len(stores), 2), squeeze=False)[0]
    for axes in panels[len(stores) :]:
        axes.set_visible(False)
    for axes, (split, store) in zip(panels, stores.items()):
        _draw_sizes(axes, _fractions(store, _even(len(store.classes), MAX_LABELS))[:, 2:])
        height = "height / image height" if axes is panels[0] else ""
        _dress(axes, f"Box sizes: {split}, {len(store):,} images", "width / image width", height)
    _save(figure, path)


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
    _dress(axes, f"Boxes per class{f'; {more:,} more classes have {left_out:,}' if more else ''}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks(range(len(shown)), [_plain(names[index]) for index in shown.tolist()], fontsize=8)
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
        _say(axes, "no boxes")
        return
    shown = np.where(counts.T > 0, np.sqrt(counts.T), np.nan)
    extent = (low, 0, low, 0)
    axes.imshow(shown, origin="lower", extent=extent, aspect="auto", cmap=_blues(), vmin=0, interpolation="none")


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
    figure = _figure(1800, 900)
    for axes, (title, lines) in zip(figure.subplots(2, 4).flat, _PANELS.items()):
        _dress(axes, title, "epoch")
        axes.grid(color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        if best is not None:
            axes.axvline(epochs[best], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        _draw_lines(axes, epochs, {legend: columns[name] for name, legend in lines.items() if name in columns}, best)
    if best is not None:
        figure.suptitle(f"Best fitness at epoch {epochs[best]:g} (dashed)", fontsize=11, color=INK)
    _save(figure, path)


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
        _say(axes, "no data")
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


def plot_curves(curves: Curves, names: Sequence[str], folder: Path) -> None:
    """F1_curve.png, P_curve.png, R_curve.png and PR_curve.png; `names` are those of the rows of `curves`."""
    over_confidence: dict[str, tuple[np.ndarray, str]] = {
        "F1": (curves.f1, "F1"),
        "P": (curves.precision, "Precision"),
        "R": (curves.recall, "Recall"),
    }
    best = int(curves.f1.mean(0).argmax()) if len(curves.f1) else 0
    for prefix, (values, title) in over_confidence.items():
        _plot_classes(
            (curves.confidence, "Confidence"),
            (values, title),
            names,
            legend=lambda name, line: f"{name}  {line[best]:.2f}",
            title=f"{title} over confidence at IoU .5; legend: at {curves.confidence[best]:.3f}, the best mean F1",
            path=folder / f"{prefix}_curve.png",
        )
    _plot_classes(
        (curves.recall_grid, "Recall"),
        (curves.precision_at_recall, "Precision"),
        names,
        legend=lambda name, line: f"{name}  {line.mean():.3f}",
        title="Precision over recall at IoU .5; the legend gives mAP@.5",
        path=folder / "PR_curve.png",
    )


def _plot_classes(
    x: tuple[np.ndarray, str],
    y: tuple[np.ndarray, str],
    names: Sequence[str],
    *,
    legend: Callable[[str, np.ndarray], str],
    title: str,
    path: Path,
) -> None:
    """Thin lines for the classes, (C, X), named where they are few, and a thick one for their mean."""
    figure = _figure(1080, 720)
    axes = figure.subplots()
    _dress(axes, title, x[1], y[1])
    axes.grid(color=PALE, linewidth=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    named = len(names) <= MAX_NAMED_LINES
    if len(y[0]):
        mean = y[0].mean(0)
        axes.plot(x[0], mean, color=INK, linewidth=2.6, zorder=3, label=legend("all classes", mean))
    for index, (name, line) in enumerate(zip(names, y[0])):
        look = {"color": class_colour(index), "label": legend(_plain(name), line)} if named else {"color": "#c6c6c6"}
        axes.plot(x[0], line, linewidth=1, **look)
    if len(y[0]):
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, labelcolor=INK, borderaxespad=0
        )
    else:
        _say(axes, "no labels")
    _save(figure, path)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """(C + 1, C + 1) counts, predicted x true, last = background, as shares of each true class (column)."""
    count = len(confusion)
    totals = confusion.sum(0, keepdims=True)
    shares = np.divide(confusion, totals, out=np.full(confusion.shape, np.nan), where=totals > 0)
    side = float(np.clip(420 + 62 * count, 640, 1500))
    figure = _figure(side * 1.08, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap=_blues(), vmin=0, vmax=1, interpolation="none")
    _dress(axes, "Share of each true class at confidence above 0.25, IoU above 0.45", "True", "Predicted")
    for axis in (axes.xaxis, axes.yaxis):
        _name_ticks(axis, [*names, "background"], 0.8 * side)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if count - 1 <= MAX_NUMBERED_CLASSES:
        _number_cells(axes, shares)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    _save(figure, path)


def _number_cells(axes: Axes, shares: np.ndarray) -> None:
    """Numbers in cells, none where they would read 0.00."""
    size = 10 if len(shares) <= 10 else 8 if len(shares) <= 20 else 6
    for row, column in np.argwhere(np.nan_to_num(shares) >= 0.005):
        share = shares[row, column]
        colour = "white" if share > 0.45 else INK
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=size, color=colour)
