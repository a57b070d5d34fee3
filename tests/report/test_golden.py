"""Pictures against small goldens: what is drawn where and in which colour, not px by px.

A golden is a picture brought down to cells of some thirty px, with what is drawn made stronger, so that a thin line
counts. Letters and smoothing differ among the versions of matplotlib, and stay within the tolerance; a panel, a legend,
a colour or a box that goes missing does not, as the last test shows. `python -m tests.report.test_golden` draws them
anew: then look at the pictures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from tests.report.test_plots import COLUMNS, evaluated
from tests.stores import ImageLabels, build_store
from utils.report import mosaics, plots
from utils.report.annotate import write_image
from utils.report.mosaics import DrawnBoxes
from utils.structures import FALSE_ALARM, HIT, MISSED, JudgedImage, Metrics

pytestmark = pytest.mark.filterwarnings("error")

GOLDEN = Path(__file__).parent / "golden"
CELL_PX, STRENGTH = 32, 4
MOST_PART, MOST_MEAN = 56, 2.5  # of 255, by which a cell, and all of them, may be off

NAMES = ("cat", "dog", "traffic light")


def labelled(folder: Path):
    """A store of two images that exist."""
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 0.6, (60, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(0.05, 0.4, (60, 2))], 1)
    classes = np.repeat([0, 1, 2], [30, 20, 10])
    paths = [folder / "one.png", folder / "two.png"]
    for path in paths:
        cv2.imwrite(str(path), np.full((240, 320, 3), 200, np.uint8))
    halves = (slice(0, None, 2), slice(1, None, 2))
    labels = [ImageLabels(boxes=boxes[half], classes=classes[half]) for half in halves]
    return build_store(paths, [(240, 320)] * 2, labels, num_classes=3)


def metrics() -> Metrics:
    line = np.linspace(0, 1, 1000)
    best = np.array([[0.9], [0.7], [0.3]])
    precision, recall = 1 - best * (1 - line) ** 2, best * (1 - line**3)
    found = evaluated(3)
    curves = replace(
        found.curves,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall),
        precision_at_recall=best * (1 - found.curves.recall_grid**4),
    )
    classes = [replace(one, name=name) for one, name in zip(found.per_class, NAMES)]
    return replace(found, curves=curves, per_class=tuple(classes), f1=0.6, best_confidence=0.4)


def draw_labels(folder: Path) -> Path:
    plots.plot_labels(labelled(folder), NAMES, folder)
    return folder / "labels.jpg"


def draw_correlogram(folder: Path) -> Path:
    draw_labels(folder)
    return folder / "labels_correlogram.jpg"


def draw_results(folder: Path) -> Path:
    t = np.arange(1, 41)
    values = [0.1 / t**0.5, 0.08 / t**0.4, 0.05 / t, *(np.sin(t / 16) * most for most in (0.8, 0.7, 0.75, 0.5))]
    values += [
        0.12 / t**0.4,
        0.1 / t**0.3,
        0.06 / t,
        0.01 - t / 5000,
        0.01 - t / 5000,
        np.maximum(0.1 - t / 100, 0.002),
    ]
    lines = [",".join(map(str, row)) for row in np.stack([t, *values], 1).tolist()]
    (folder / "results.csv").write_text("\n".join([COLUMNS, *lines]) + "\n")
    plots.plot_results(folder / "results.csv", folder / "results.png")
    return folder / "results.png"


def draw_curves(folder: Path) -> Path:
    plots.plot_curves(metrics(), folder)
    return folder / "F1_curve.png"


def draw_confusion(folder: Path) -> Path:
    counts = np.array([[30, 2, 0, 5], [1, 12, 0, 0], [0, 0, 0, 9], [4, 6, 10, 0]])
    plots.plot_confusion(counts, NAMES, folder)
    return folder / "confusion_matrix.png"


def batch(*, scores: bool = False) -> tuple[np.ndarray, DrawnBoxes]:
    images = np.full((5, 3, 240, 320), 225, np.uint8)
    corner = np.tile([[20.0, 40.0], [180.0, 50.0], [90.0, 150.0]], (5, 1))
    boxes = np.concatenate([corner, corner + np.array([100, 70])], 1).astype(np.float32)
    surety = np.tile([0.9, 0.5, 0.2], 5) if scores else None
    return images, DrawnBoxes(boxes, np.tile([0, 1, 2], 5), np.repeat(np.arange(5), 3), surety)


def draw_batch(folder: Path) -> Path:
    images, shown = batch()
    captions = [f"{index}.jpg" for index in range(5)]
    picture = mosaics.draw_batch(images, shown, NAMES, title="Batch 0", captions=captions)
    write_image(picture, folder / "batch.png")
    return folder / "batch.png"


def draw_pairs(folder: Path) -> Path:
    images, labels = batch()
    picture = mosaics.draw_pairs(images, labels, batch(scores=True)[1], NAMES, [f"{index}.jpg" for index in range(5)])
    write_image(picture, folder / "pairs.png")
    return folder / "pairs.png"


def draw_worst(folder: Path) -> Path:
    judged = JudgedImage(
        image=0,
        boxes=np.array([[20, 20, 120, 100], [160, 30, 260, 110], [60, 130, 200, 220]], np.float32),
        classes=np.arange(3),
        scores=np.array([0.9, 0.8, np.nan], np.float32),
        verdicts=np.array([HIT, FALSE_ALARM, MISSED], np.uint8),
    )
    plots_of = [judged, replace(judged, image=1)]
    mosaics.plot_worst(plots_of, labelled(folder), NAMES, folder / "worst.png", confidence=0.4)
    return folder / "worst.png"


DRAWN = {
    "labels": draw_labels,
    "correlogram": draw_correlogram,
    "results": draw_results,
    "curves": draw_curves,
    "confusion": draw_confusion,
    "batch": draw_batch,
    "pairs": draw_pairs,
    "worst": draw_worst,
}


def essence(path: Path) -> np.ndarray:
    """(h, w, 3) u8 of a picture."""
    image = cv2.imread(str(path))
    size = [round(side / CELL_PX) for side in image.shape[1::-1]]
    mean = cv2.resize(cv2.GaussianBlur(image, (0, 0), CELL_PX / 4), size, interpolation=cv2.INTER_AREA)
    return (255 - STRENGTH * (255 - mean.astype(int))).clip(0, 255).astype(np.uint8)


def difference(name: str, path: Path) -> tuple[float, float]:
    """By how much a picture is off its golden, in its worst cell and in the mean, as shares of what may be."""
    seen, golden = essence(path).astype(int), cv2.imread(str(GOLDEN / f"{name}.png")).astype(int)
    assert seen.shape == golden.shape, name
    off = np.abs(seen - golden)
    return off.max() / MOST_PART, off.mean() / MOST_MEAN


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_looks_as_it_should(tmp_path, name):
    assert max(difference(name, DRAWN[name](tmp_path))) < 1


def without_box(draw: Callable) -> Callable:
    return lambda image, boxes, texts, colours, **look: draw(image, boxes[1:], texts[1:], colours[1:], **look)


CHANGES = {
    "no legend beside curves": ("curves", Axes, "legend", lambda self, *_, **__: None),
    "no legends of losses": ("results", Axes, "legend", lambda self, *_, **__: None),
    "no marked best": ("curves", plots, "_mark", lambda *_: None),
    "a panel less": ("results", plots, "_PANELS", dict(list(plots._PANELS.items())[:-1])),
    "a panel is empty": ("labels", plots, "_draw_shapes", lambda *_: None),
    "no title": ("confusion", Axes, "set_title", lambda self, *_, **__: None),
    "no names of classes": ("confusion", plots._NameTicks, "put_on", lambda self, axis: axis.set_ticks([])),
    "bars of another class": ("labels", plots, "class_colour", lambda index: mosaics.class_colour(index + 1)),
    "boxes of another class": ("batch", mosaics, "class_colour", lambda index: plots.class_colour(index + 1)),
    "a box less": ("batch", mosaics, "draw_boxes", without_box(mosaics.draw_boxes)),
    "a box less of a pair": ("pairs", mosaics, "draw_boxes", without_box(mosaics.draw_boxes)),
    "no captions": ("worst", mosaics._Tile, "caption", lambda self, *_, **__: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_missing_is_noticed(tmp_path, monkeypatch, change):
    name, owner, attribute, other = CHANGES[change]
    monkeypatch.setattr(owner, attribute, other)
    assert max(difference(name, DRAWN[name](tmp_path))) > 1


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in DRAWN.items():
            cv2.imwrite(str(GOLDEN / f"{name}.png"), essence(draw(Path(folder))))
