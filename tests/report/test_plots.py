import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.stores import ImageLabels, build_store
from utils.data.store import plain_store
from utils.report import plots
from utils.report.plots import (
    class_colour,
    plot_batch,
    plot_confusion,
    plot_curves,
    plot_labels,
    plot_results,
    plot_worst,
)
from utils.structures import (
    FALSE_ALARM,
    HIT,
    MISSED,
    ClassMetrics,
    CocoFigures,
    Curves,
    JudgedImage,
    LabelStore,
    Metrics,
)

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


def batch(num_images=5, height=64, width=96, per_image=3):
    generator = np.random.default_rng(0)
    count = num_images * per_image
    corner = generator.uniform(-5, 50, (count, 2))
    return {
        "images": np.full((num_images, 3, height, width), 128, np.uint8),
        "boxes": np.concatenate([corner, corner + generator.uniform(1, 60, (count, 2))], 1).astype(np.float32),
        "classes": generator.integers(0, 2, count),
        "image_of": np.repeat(np.arange(num_images), per_image),
        "names": ("cat", "a_dog $with$ a name that is far longer than any tile is wide, äöü 猫"),
    }


@pytest.mark.parametrize("size", [(160, 160), (640, 480), (33, 900)])
def test_a_batch_fits_the_screen_and_small_images_grow(tmp_path, size):
    plot_batch(**batch(16, *size, per_image=1), path=tmp_path / "batch.jpg", captions=["folder/name.jpg"] * 16)
    height, width, _ = read(tmp_path / "batch.jpg").shape
    assert 900 < max(height, width) <= 1920


def test_a_box_lies_where_it_belongs_in_the_colour_of_its_class(tmp_path):
    image = np.zeros((1, 3, 400, 400), np.uint8)
    box = np.array([[100, 150, 300, 350]], np.float32)
    plot_batch(image, box, np.array([1]), np.array([0]), ("cat", "dog"), tmp_path / "batch.png")
    picture = read(tmp_path / "batch.png").astype(int)
    scale = (picture.shape[1] - 16) // 400
    coloured = np.abs(picture - np.multiply(class_colour(1), 255)).max(-1) < 40
    rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
    assert columns.min() - 8 == pytest.approx(100 * scale, abs=2)
    assert columns.max() - 8 == pytest.approx(300 * scale, abs=2)
    assert rows.max() - 30 == pytest.approx(350 * scale, abs=2)


def test_nothing_is_drawn_beside_a_tile(tmp_path):
    """Boxes that stick out and long names leave the gaps between tiles white."""
    plot_batch(**batch(), path=tmp_path / "batch.png")
    picture = read(tmp_path / "batch.png")
    assert (picture[:, :8] == 255).all() and (picture[:, -8:] == 255).all() and (picture[:30] == 255).all()


@pytest.mark.parametrize("width", [123, 240, 999])
def test_pixels_arrive_as_they_are(tmp_path, width):
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 1000, width)).astype(np.uint8)
    nothing = np.zeros(0, int)
    plot_batch(image, np.zeros((0, 4)), nothing, nothing, (), tmp_path / "batch.png")
    assert np.array_equal(read(tmp_path / "batch.png")[30:-8, 8:-8], image[0].transpose(1, 2, 0))


def test_only_confident_detections_are_drawn(tmp_path):
    for name, score in (("none", 0.1), ("all", 0.9)):
        plot_batch(**batch(), path=tmp_path / f"{name}.png", scores=np.full(15, score))
    assert (read(tmp_path / "none.png").max(-1) == read(tmp_path / "none.png").min(-1)).all()
    assert (read(tmp_path / "all.png").max(-1) != read(tmp_path / "all.png").min(-1)).any()


def test_batches_without_boxes_or_names(tmp_path):
    plot_batch(**batch(1, per_image=0), path=tmp_path / "empty.jpg")
    plot_batch(**{**batch(20), "names": ()}, path=tmp_path / "unnamed.jpg", max_images=4)
    assert read(tmp_path / "empty.jpg").size and read(tmp_path / "unnamed.jpg").size


@pytest.mark.parametrize("num_labels, num_classes", [(0, 3), (1, 1), (400, 3), (400, 80), (400, 1200)])
def test_labels(tmp_path, num_labels, num_classes):
    plot_labels(store_of(num_labels, num_classes), [f"_class $ {index}" for index in range(num_classes)], tmp_path)
    for name in ("labels.jpg", "labels_correlogram.jpg"):
        assert min(read(tmp_path / name).shape[:2]) >= 1000


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ["0" + ",0.1" * 13],
        ["0" + ",nan" * 13, "1" + ",0.2" * 13],
        ["0" + ",nan" * 13],
        ["0" + "," * 13, "1,0.1,0.2"],
        [f"{epoch}" + f",{epoch / 50:.5f}" * 13 for epoch in range(50)],
    ],
    ids=["no epoch", "one epoch", "NaN", "all NaN", "torn", "fifty"],
)
def test_results(tmp_path, rows):
    (tmp_path / "results.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert read(tmp_path / "results.png").shape == (900, 1800, 3)


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
            name=f"_{index} $x",
            images=1,
            labels=int(index < num_classes),
            **dict.fromkeys(("precision", "recall", "f1", "map50", "map50_95", "best_f1"), 0.5 * found),
            best_confidence=0.3,
            coco=none,
        )
        for index in range(num_classes + unlabelled)
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


@pytest.mark.parametrize("num_classes", [0, 1, 3, 30])
@pytest.mark.parametrize("found", [True, False])
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

    monkeypatch.setattr(plots, "_save", listen)
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


@pytest.mark.parametrize("num_classes", [0, 1, 10, 80, 300])
@pytest.mark.parametrize("filled", [True, False])
def test_confusion(tmp_path, num_classes, filled):
    shape = num_classes + 1, num_classes + 1
    confusion = np.random.default_rng(0).integers(0, 50, shape) if filled else np.zeros(shape, int)
    plot_confusion(confusion, [f"class {index}" for index in range(num_classes)], tmp_path)
    names = ["confusion_matrix.png", "confusion_matrix_counts.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if filled:
        assert all(400 < read(tmp_path / name).shape[0] <= 2600 for name in names)


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


# ---- the worst images


def pictured_store(folder, sizes=((60, 80), (200, 100), (40, 40))) -> LabelStore:
    paths = [folder / f"image {index}.png" for index in range(len(sizes))]
    for path, size in zip(paths, sizes):
        cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    one = ImageLabels(boxes=np.array([[0.2, 0.2, 0.8, 0.8]]), classes=np.zeros(1, int))
    return build_store(paths, sizes, [one] * len(sizes))


def judged(image: int, verdicts: Sequence[int], *, at: float = 10.0) -> JudgedImage:
    """Boxes of class 0 beside each other."""
    left = at + 2 * np.arange(len(verdicts))
    return JudgedImage(
        image=image,
        boxes=np.stack([left, np.full_like(left, at), left + 20, np.full_like(left, at + 20)], 1).astype(np.float32),
        classes=np.zeros(len(verdicts), int),
        scores=np.where(np.equal(verdicts, MISSED), np.nan, 0.5).astype(np.float32),
        verdicts=np.array(verdicts, np.uint8),
    )


def has_colour(picture: np.ndarray, colour) -> bool:
    return bool((np.abs(picture.astype(int) - np.multiply(colour, 255)).max(-1) < 8).any())


@pytest.mark.parametrize("verdict, colour", [(HIT, plots._GOOD), (FALSE_ALARM, plots._FALSE), (MISSED, plots._MISSED)])
def test_a_verdict_has_its_colour_and_no_other(tmp_path, verdict, colour):
    plot_worst([judged(0, [verdict])], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    below_key = read(tmp_path / "worst.png")[70:]
    shown = [one for one in (plots._GOOD, plots._FALSE, plots._MISSED) if has_colour(below_key, one)]
    assert shown == [colour]


def test_captions_count_and_boxes_name(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(plots, "write_line", lambda image, text, *args, **kwargs: said.append(text))
    monkeypatch.setattr(plots, "draw_boxes", lambda image, boxes, texts, *args, **kwargs: said.extend(texts))
    plot_worst(
        [judged(0, [HIT, FALSE_ALARM, MISSED, MISSED])],
        pictured_store(tmp_path),
        ("cat",),
        tmp_path / "worst.png",
        confidence=0.123,
    )
    assert {"image 0.png", "2 missed, 1 false, 1 found", "missed: cat", "false: cat 0.50"} <= set(said)
    assert any("0.123" in text for text in said)


def test_of_very_many_false_alarms_the_surest_are_drawn(tmp_path, monkeypatch):
    texts, captions = [], []
    monkeypatch.setattr(plots, "write_line", lambda image, text, *args, **kwargs: captions.append(text))
    monkeypatch.setattr(plots, "draw_boxes", lambda image, boxes, names, *args, **kwargs: texts.extend(names))
    many = judged(0, [MISSED, *[FALSE_ALARM] * 250, HIT])
    many = replace(many, scores=np.linspace(0.1, 0.9, 252).astype(np.float32))
    plot_worst([many], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    false = [float(text.split()[-1]) for text in texts if text.startswith("false")]
    assert len(false) == 30 and min(false) > 0.79 and false == sorted(false, reverse=True)
    assert "missed: cat" in texts
    assert "1 missed, 250 false (30 surest shown), 1 found" in captions


def test_without_labels_nothing_is_judged(tmp_path, monkeypatch):
    """All that is found would be false, which says nothing about the network."""
    said = []
    monkeypatch.setattr(plots, "write_line", lambda image, text, *args, **kwargs: said.append(text))
    plot_worst([judged(0, [FALSE_ALARM])], store_of(0, 1), ("cat",), tmp_path / "worst.png")
    plot_worst([], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    assert [text for text in said if text.startswith("No")] == [
        "No labels to judge by",
        "Nothing missed, and nothing false",
    ]


@pytest.mark.parametrize("count", range(9))
def test_any_number_of_images_of_any_shape(tmp_path, count):
    sizes = [(60, 80), (900, 20), (20, 900), (1, 1), (300, 400), (50, 50), (51, 49), (2000, 3000), (9, 9)][:count]
    store = pictured_store(tmp_path, sizes)
    plot_worst([judged(index, [HIT, MISSED]) for index in range(count)], store, (), tmp_path / "worst.jpg")
    height, width, _ = read(tmp_path / "worst.jpg").shape
    assert width <= 1920 and height < 4000


def test_images_that_are_gone_or_others_are_grey_tiles(tmp_path):
    store = pictured_store(tmp_path)
    (tmp_path / "image 0.png").unlink()
    cv2.imwrite(str(tmp_path / "image 1.png"), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "image 2.png").write_text("no image")
    plot_worst([judged(index, [MISSED]) for index in range(3)], store, ("cat",), tmp_path / "worst.png")
    picture = read(tmp_path / "worst.png")[70:]
    assert not has_colour(picture, plots._MISSED) and has_colour(picture, (200 / 255,) * 3)


def test_a_damaged_image_is_shown_in_silence(tmp_path, capfd):
    """libjpeg writes of it on the standard error of the process."""
    store = pictured_store(tmp_path, [(600, 800)])
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3)).astype(np.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + b"\xff\xd0" * 40 + whole[middle + 80 :]
    (tmp_path / "image 0.png").write_bytes(damaged)
    plot_worst([judged(0, [MISSED])], store, ("cat",), tmp_path / "worst.png")
    assert has_colour(read(tmp_path / "worst.png")[70:], plots._MISSED)
    assert capfd.readouterr() == ("", "")


def test_hundreds_of_mistakes_leave_the_image_visible(tmp_path):
    store = pictured_store(tmp_path, [(700, 1000)])
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, (960, 660), (600, 2))
    crowd = replace(judged(0, generator.integers(0, 3, 600).tolist()), boxes=np.concatenate([corner, corner + 30], 1))
    plot_worst([crowd], store, ("cat",), tmp_path / "worst.png")
    picture = read(tmp_path / "worst.png")[110:-10, 10:-10]
    assert (picture == 90).all(-1).mean() > 0.7


def test_colours_of_the_first_classes_differ_and_show_on_white():
    colours = np.array([class_colour(index) for index in range(20)])
    assert np.abs(colours[:, None] - colours[None]).sum(-1)[~np.eye(20, dtype=bool)].min() > 0.1
    assert (colours @ (0.2126, 0.7152, 0.0722) < 0.75).all()


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
