import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.report.looks import check_texts
from utils.data.store import plain_store
from utils.report import plots
from utils.report.annotate import write_image
from utils.report.plots import plot_confusion, plot_curves, plot_labels, plot_results
from utils.structures import ClassMetrics, CocoFigures, Curves, LabelStore, Metrics

pytestmark = pytest.mark.filterwarnings("error")

COLUMNS = (
    "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
    "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2"
)


def read(path) -> np.ndarray:
    """(H, W, 3) RGB of a picture that decodes and is not one flat colour."""
    image = cv2.imread(str(path))
    assert image is not None, path
    assert image.std() > 1
    return image[..., ::-1]


def store_of(num_labels: int, num_classes: int) -> LabelStore:
    generator = np.random.default_rng(0)
    corner, sides = generator.uniform(0, 50, (num_labels, 2)), generator.uniform(1, 50, (num_labels, 2))
    return plain_store(
        np.full((3, 2), 100),
        boxes=np.concatenate([corner, corner + sides], 1),
        classes=generator.integers(0, num_classes, num_labels),
        offsets=np.array([0, num_labels // 2, num_labels // 2, num_labels]),
    )


HOSTILE = ("_under", "$x$", r"$\frac{1}{0}$", "a\nb\tc", "", "猫", "x" * 300, "кошка длинное название класса", "a%d{0}")


def names_of(count: int) -> list[str]:
    return [HOSTILE[index] if index < len(HOSTILE) else f"class {index}" for index in range(count)]


@pytest.fixture
def checked(monkeypatch):
    """Every figure that is saved has no text cut off or over another."""

    def save(figure, path):
        check_texts(figure)
        write_image(np.asarray(figure.canvas.buffer_rgba())[..., :3], path)

    monkeypatch.setattr(plots, "save_figure", save)


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("num_labels, num_classes", [(0, 3), (1, 1), (9000, 20), (400, 80), (400, 1200)])
def test_labels(tmp_path, num_labels, num_classes):
    plot_labels(store_of(num_labels, num_classes), names_of(num_classes), tmp_path)
    for name in ("labels.jpg", "labels_correlogram.jpg"):
        assert min(read(tmp_path / name).shape[:2]) >= 900


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(
    "rows",
    [
        [],
        ["0" + ",0.1" * 13],
        ["0" + ",nan" * 13, "1" + ",0.2" * 13],
        ["0" + ",nan" * 13],
        ["0" + "," * 13, "1,0.1,0.2"],
        [f"{epoch}" + f",{epoch / 3000:.5f}" * 13 for epoch in range(3000)],
    ],
    ids=["no epoch", "one epoch", "NaN", "all NaN", "torn", "thousands"],
)
def test_results(tmp_path, rows):
    (tmp_path / "results.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert read(tmp_path / "results.png").shape == (900, 1800, 3)


def test_a_loss_that_blew_up_once_does_not_press_the_others_flat(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.extend(figure.axes))
    rows = [f"{epoch},{1e6 if epoch == 1 else 0.5}" + ",0.5" * 12 for epoch in range(1, 31)]
    (tmp_path / "results.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert [axes.get_yscale() for axes in drawn] == ["log"] + 7 * ["linear"]


@pytest.mark.parametrize(("told", "marked"), [(None, 2), (3, 3), (9, 2)])
def test_the_epoch_of_the_best_weights_is_marked(tmp_path, monkeypatch, told, marked):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.extend(figure.axes))
    rows = [f"{epoch}" + f",{score}" * 13 for epoch, score in ((1, 0.1), (2, 0.5), (3, 0.5))]
    (tmp_path / "results.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png", best_epoch=told)
    for axes in drawn:
        assert marked in [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]


def test_results_of_an_empty_file(tmp_path):
    (tmp_path / "results.csv").write_text("")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert read(tmp_path / "results.png").size


def evaluated(num_classes: int, *, unlabelled: int = 0, found: bool = True) -> Metrics:
    """Metrics of classes with labels and of others without, whose precision is unknown above confidence 0.8."""
    generator = np.random.default_rng(0)
    precision, recall, f1 = generator.uniform(0, 1, (3, num_classes, 1000)) * found
    precision[:, 800:] = np.nan
    none = CocoFigures(**dict.fromkeys(CocoFigures.__annotations__))
    classes = [
        ClassMetrics(
            name=name,
            images=1,
            labels=int(index < num_classes),
            **dict.fromkeys(("precision", "recall", "f1", "map50", "map50_95", "best_f1"), 0.5 * found),
            best_confidence=0.3,
            coco=none,
        )
        for index, name in enumerate(names_of(num_classes + unlabelled))
    ]
    return Metrics(
        **dict.fromkeys(("precision", "recall", "f1", "map50", "map50_95"), 0.5 * found),
        images=1,
        labels=num_classes,
        best_confidence=0.3,
        per_class=tuple(classes),
        coco=none,
        curves=Curves(
            confidence=np.linspace(0, 1, 1000),
            precision=precision,
            recall=recall,
            f1=f1,
            recall_grid=np.linspace(0, 1, 101),
            precision_at_recall=generator.uniform(0, 1, (num_classes, 101)) * found,
        ),
    )


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("num_classes, found", [(0, True), (1, True), (3, False), (9, True), (30, True)])
def test_curves(tmp_path, num_classes, found):
    plot_curves(evaluated(num_classes, unlabelled=2, found=found), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{x}_curve.png" for x in ("F1", "PR", "P", "R")]
    assert all(read(path).shape == (720, 1080, 3) for path in tmp_path.iterdir())


def texts_of(monkeypatch, draw) -> list[str]:
    """What the figures say that `draw` makes, title after title and legend after legend."""
    said = []

    def listen(figure, path):
        for axes in figure.axes:
            legend = axes.get_legend()
            said.extend([axes.get_title(loc="left"), *(one.get_text() for one in axes.texts)])
            said.extend(one.get_text() for one in (legend.get_texts() if legend else ()))

    monkeypatch.setattr(plots, "save_figure", listen)
    draw()
    return said


def test_legends_say_what_the_table_says(tmp_path, monkeypatch):
    """The mean of a curve is another figure where COCO's rules differ, or a class claims nothing."""
    metrics = evaluated(2)
    dog = replace(metrics.per_class[1], name="dog", precision=0.11, recall=0.22, f1=0.33, map50=0.444)
    metrics = replace(metrics, per_class=(metrics.per_class[0], dog), map50=0.777, f1=0.66)
    said = texts_of(monkeypatch, lambda: plot_curves(metrics, tmp_path))
    assert {"dog  0.11", "dog  0.22", "dog  0.33", "dog  0.444", "all classes  0.777"} <= set(said)
    assert "0.66 at 0.300" in said  # the mark in the F1 picture


def test_of_many_classes_the_best_and_the_worst_are_named(tmp_path, monkeypatch):
    metrics = evaluated(50)
    classes = [replace(one, name=f"c{index}", map50=index / 100) for index, one in enumerate(metrics.per_class)]
    said = texts_of(monkeypatch, lambda: plot_curves(replace(metrics, per_class=tuple(classes)), tmp_path))
    assert "c49  0.490" in said and "c0  0.000" in said and "c25  0.250" not in said
    assert "34 others between" in said


def test_unknown_precision_ends_the_line_and_is_left_out_of_the_mean(tmp_path):
    values = np.array([[0.5, 0.5, np.nan], [1.0, np.nan, np.nan]])
    mean = plots._mean_of_known(values)
    assert mean[:2].tolist() == [0.75, 0.5] and np.isnan(mean[2])


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("num_classes, most", [(0, 9), (1, 1), (9, 1_234_567), (9, 0), (30, 50), (300, 0)])
def test_confusion(tmp_path, num_classes, most):
    shape = num_classes + 1, num_classes + 1
    confusion = np.random.default_rng(0).integers(0, most + 1, shape) * (np.random.default_rng(1).random(shape) < 0.3)
    plot_confusion(confusion, names_of(num_classes), tmp_path)
    names = ["confusion_matrix.png", "confusion_matrix_counts.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if most:
        assert all(300 < read(tmp_path / name).shape[0] <= 2600 for name in names)


def test_confusion_shares_and_counts(tmp_path, monkeypatch):
    """Columns are true classes, of which shares are taken; a cell that would read 0 stays empty."""
    confusion = np.array([[30, 0, 1500], [10, 0, 0], [0, 0, 0]])
    said = texts_of(monkeypatch, lambda: plot_confusion(confusion, ("a", "b"), tmp_path))
    numbers = [text for text in said if text.replace(",", "").isdigit()]
    assert numbers == ["100", "75", "25", "1,500", "30", "10"]
    assert all("0.25" in text and "0.45" in text for text in said if text.startswith(("Percent", "Counts")))


def test_confusion_of_very_many_classes_adds_up_those_it_leaves_out():
    count = 500
    confusion = np.diag(np.full(count + 1, 7))
    confusion[3, 400] = confusion[count, 77] = 50
    merged, labels = plots._most_confused(confusion, [str(index) for index in range(count)])
    assert merged.sum() == confusion.sum()
    assert {"3", "77", "400", "all others", "background"} <= set(labels) and len(labels) == len(merged) < 100
    assert merged[labels.index("3"), labels.index("400")] == 50
    assert merged[-1, labels.index("77")] == 50 and merged[-1, -1] == 7


@pytest.mark.parametrize(("mistaken", "title"), [(0, "0 classes with"), (1, "1 class with"), (3, "3 classes with")])
def test_classes_without_a_mistake_are_not_those_with_the_most(tmp_path, monkeypatch, mistaken, title):
    confusion = np.diag(np.full(501, 7))
    confusion[500, 10 : 10 + mistaken] = 5
    _, labels = plots._most_confused(confusion, [str(index) for index in range(500)])
    assert labels == [*("10", "11", "12")[:mistaken], "all others", "background"]
    said = texts_of(monkeypatch, lambda: plot_confusion(confusion, [str(index) for index in range(500)], tmp_path))
    assert sum(f"{title} mistakes, {500 - mistaken} others as one" in text for text in said) == 2


def test_importing_and_drawing_leave_matplotlib_as_it_was(tmp_path):
    """In a fresh process: no pyplot, no changed style, nothing on the terminal."""
    program = f"""
import sys, warnings
warnings.simplefilter("error")
from utils.report import plots
assert not any(name.startswith("matplotlib") for name in sys.modules)
import matplotlib, numpy, pathlib
style = lambda: {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}  # backend: pyplot
before = style()
plots.plot_confusion(numpy.eye(3), ("猫", "b"), pathlib.Path({str(tmp_path)!r}))
assert style() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
