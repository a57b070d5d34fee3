import subprocess
import sys

import cv2
import numpy as np
import pytest

from utils.data.store import plain_store
from utils.report.plots import (
    class_colour,
    plot_batch,
    plot_confusion,
    plot_curves,
    plot_labels,
    plot_results,
)
from utils.structures import Curves, LabelStore

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


@pytest.mark.parametrize("num_classes", [0, 1, 3, 30])
def test_curves(tmp_path, num_classes):
    generator = np.random.default_rng(0)
    precision, recall, f1 = generator.uniform(0, 1, (3, num_classes, 1000))
    curves = Curves(
        confidence=np.linspace(0, 1, 1000),
        precision=precision,
        recall=recall,
        f1=f1,
        recall_grid=np.linspace(0, 1, 101),
        precision_at_recall=generator.uniform(0, 1, (num_classes, 101)),
    )
    plot_curves(curves, [f"_{index}" for index in range(num_classes)], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{x}_curve.png" for x in ("F1", "PR", "P", "R")]
    assert all(read(path).shape == (720, 1080, 3) for path in tmp_path.iterdir())


@pytest.mark.parametrize("num_classes", [1, 10, 80, 300])
@pytest.mark.parametrize("filled", [True, False])
def test_confusion(tmp_path, num_classes, filled):
    shape = num_classes + 1, num_classes + 1
    confusion = np.random.default_rng(0).integers(0, 50, shape) if filled else np.zeros(shape, int)
    plot_confusion(confusion, [f"class {index}" for index in range(num_classes)], tmp_path / "confusion_matrix.png")
    assert 600 < read(tmp_path / "confusion_matrix.png").shape[0] <= 1500


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
plots.plot_confusion(numpy.eye(3), ("猫", "b"), pathlib.Path({str(tmp_path)!r}) / "x.png")
assert style() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
