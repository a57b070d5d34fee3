"""Detection from Python: what may be given, that it is the same whatever way it is given, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import yolo
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data.images import BaseImages
from utils.data.loader import EvalBatches
from utils.data.store import plain_store
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.evaluate.predict import predicted, to_source
from utils.structures import UserError

ROOT = Path(__file__).resolve().parents[2]
LOW = 0.001  # the network of the tests is not sure of anything


@pytest.fixture(scope="module")
def detector(trained):
    return yolo.load(trained / "weights/best.pt", device="cpu")


@pytest.fixture
def photos(trained) -> list[Path]:
    """Of three shapes."""
    return sorted((trained.parent / "set/images/val").iterdir())


def same(one, other) -> bool:
    """Whether these are the same detections, but for what the size of a batch does to the last digits."""
    return (
        torch.equal(one.classes, other.classes)
        and torch.allclose(one.boxes, other.boxes, atol=1e-3)
        and torch.allclose(one.scores, other.scores, atol=1e-5)
    )


def test_in_a_few_lines(trained, photos):
    detector = yolo.load(str(trained / "weights/best.pt"))
    (found,) = detector.detect(str(photos[0]), confidence=LOW)
    assert detector.names == ("blue", "red") and detector.imgsz == 64
    assert len(found.boxes) == len(found.scores) == len(found.classes) > 0
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert found.boxes.device.type == "cpu" and not found.boxes.requires_grad


def test_boxes_are_those_of_an_evaluation(detector, photos):
    """A twin that goes image by image through the loader of val.py."""
    found = detector.detect(photos, confidence=LOW)
    for path, one in zip(photos, found):
        size = cv2.imread(str(path)).shape[:2]
        store = plain_store(np.array([size]))
        object.__setattr__(store, "path", lambda image, path=path: str(path))
        images = BaseImages(store=store, imgsz=64, area=True)
        batch = EvalBatches(store=store, images=images, imgsz=64, batch_size=1, stride=16).batch(0)
        rules = NmsRules(confidence=LOW, iou=0.45, max_detections=1000)
        with torch.no_grad():
            predictions, _ = predicted(detector.network, batch, detector.runtime)
        expected = to_source(non_max_suppression(predictions, rules).detections[0], batch.placements[0], size)
        assert same(one, expected)


def test_all_ways_to_give_an_image_are_the_same(detector, photos):
    pil = pytest.importorskip("PIL.Image")
    rgb = [cv2.imread(str(path))[..., ::-1] for path in photos]
    alpha = [np.dstack([image, np.full(image.shape[:2], 7, np.uint8)]) for image in rgb]
    expected = detector.detect(photos, confidence=LOW)
    ways = [list(map(str, photos)), iter(photos), tuple(rgb), alpha, [pil.open(path) for path in photos]]
    for given in ways:
        assert all(map(same, detector.detect(given, confidence=LOW), expected))
    assert same(detector.detect(rgb[1], confidence=LOW)[0], expected[1])
    assert same(detector.detect(np.stack([rgb[0], rgb[3]]), confidence=LOW)[1], expected[3])


def test_grey_arrays_are_images_without_colour(detector, photos):
    grey = cv2.imread(str(photos[0]), cv2.IMREAD_GRAYSCALE)
    expected = detector.detect(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), confidence=LOW)
    for given in (grey, grey[..., None]):
        assert same(detector.detect(given, confidence=LOW)[0], expected[0])


def test_palettes_of_pil_are_colours(detector, photos):
    pil = pytest.importorskip("PIL.Image")
    few = pil.open(photos[0]).convert("P")
    expected = detector.detect(np.asarray(few.convert("RGB")), confidence=LOW)
    assert same(detector.detect(few, confidence=LOW)[0], expected[0])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_order_and_boxes_do_not_depend_on_the_batch(detector, photos, batch_size):
    alone = [detector.detect(path, confidence=LOW)[0] for path in photos]
    many = detector.detect(photos * 3, confidence=LOW, batch_size=batch_size)
    assert len(many) == 12
    assert all(map(same, many, alone * 3))


def test_options_limit_what_is_found(detector, photos):
    everything = detector.detect(photos[1], confidence=LOW)[0]
    confidence = everything.scores[1].item()
    assert len(detector.detect(photos[1], confidence=confidence)[0].scores) == 1
    assert len(detector.detect(photos[1], confidence=LOW, max_detections=3)[0].scores) == 3
    only = detector.detect(photos[1], confidence=LOW, classes=[1])[0]
    assert set(only.classes.tolist()) == {1}
    fewer = detector.detect(photos[1], confidence=LOW, agnostic=True)[0]
    assert len(fewer.scores) < len(everything.scores)


def test_nothing_given_is_nothing_found(detector):
    assert detector.detect([]) == []
    (found,) = detector.detect(np.zeros((30, 200, 3), np.uint8), confidence=1)
    assert found.boxes.shape == (0, 4)


def test_extreme_shapes(detector):
    shapes = [(1, 1, 3), (1, 500, 3), (700, 2, 3), (64, 64, 3)]
    for shape, found in zip(shapes, detector.detect([np.zeros(shape, np.uint8) for shape in shapes], confidence=0)):
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2:] <= torch.tensor([shape[1], shape[0]])).all()


MISTAKES = {
    "number": (5, "should be a path"),
    "none": ([None], "image 0: NoneType: should be a path"),
    "floats": (np.zeros((4, 4, 3)), "array of float64: should be of uint8"),
    "channels first": (np.zeros((3, 8, 9), np.uint8), r"shape \(3, 8, 9\)"),
    "no pixels": (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)"),
    "tensor": ([torch.zeros(3, 4, 4)], "Tensor: should be a path"),
    "missing": ("none.jpg", "none.jpg: No such file"),
    "folder": (".", "Is a directory"),
    "no image": (__file__, "not an image that OpenCV can decode"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_image_is_one_line(detector, mistake):
    given, expected = MISTAKES[mistake]
    with pytest.raises(ValueError, match=expected) as caught:
        detector.detect(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"confidence": 25}, "confidence 25: should be a number from 0 to 1"),
        ({"iou": float("nan")}, "iou nan: should be"),
        ({"max_detections": 0}, "max_detections 0: should be a whole number of 1 or more"),
        ({"classes": [2]}, r"^classes 2: should be of 0 \(blue\), 1 \(red\)$"),
        ({"classes": ["red"]}, "^classes 'red': should be of 0"),
        ({"classes": [1.0]}, "^classes 1.0: should be of 0"),
        ({"classes": 1}, "^classes 1: should be a list of numbers, of 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_options_that_make_no_sense(detector, option, expected):
    with pytest.raises(UserError, match=expected):
        detector.detect(np.zeros((8, 8, 3), np.uint8), **option)


def test_what_cannot_be_loaded(trained, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint not found: \S+none\.pt"):
        yolo.load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="--device 77: no such device"):
        yolo.load(trained / "weights/best.pt", device="77")
    with pytest.raises(UserError, match="imgsz 0: should be"):
        yolo.load(trained / "weights/best.pt", imgsz=0)
    with pytest.raises(UserError, match="imgsz 100000: should be 16384 or less"):
        yolo.load(trained / "weights/best.pt", imgsz=100_000)
    for path in ("", None, 3):
        with pytest.raises(UserError, match=f"^path {path!r}: should be that of a checkpoint, such as .*best.pt$"):
            yolo.load(path)
    with pytest.warns(UserWarning, match="using 80"):
        assert yolo.load(trained / "weights/best.pt", device="cpu", imgsz=70).imgsz == 80


def test_the_rest_of_the_program_is_left_alone(trained, photos):
    """In a process of its own: random states, threads, the grad mode, log levels, what is imported, files."""
    code = f"""
import json, logging, os, random, sys, threading
import cv2, numpy, torch

def world():
    return {{
        "random": [str(torch.get_rng_state().tolist()), str(numpy.random.get_state()), str(random.getstate())],
        "threads": [torch.get_num_threads(), cv2.getNumThreads(), threading.active_count()],
        "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), str(torch.get_default_dtype())],
        "flags": [torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()],
        "logs": [cv2.utils.logging.getLogLevel(), logging.getLogger().level],
        "environment": dict(os.environ), "folder": os.getcwd(),
    }}

torch.backends.cudnn.benchmark = True
from models import yolo
before = world()
found = yolo.load({str(trained / "weights/best.pt")!r}).detect({[*map(str, photos)]!r}, confidence=0.001)
assert sum(len(one.boxes) for one in found)
after = world()
print(json.dumps([name for name in before if before[name] != after[name]]))
print([name for name in ("matplotlib", "tensorboard", "pycocotools") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    changed, heavy = done.stdout.splitlines()
    assert (json.loads(changed), heavy) == ([], "[]")


def test_a_network_that_says_nonsense_warns(trained, photos, tmp_path):
    checkpoint = load_checkpoint(trained / "weights/best.pt")
    first = next(name for name, tensor in checkpoint["ema"].items() if tensor.is_floating_point())
    checkpoint["ema"][first].fill_(float("nan"))
    save_checkpoint(tmp_path / "nan.pt", checkpoint)
    with pytest.warns(UserWarning, match="^image 0 and 3 more: the network computed NaN .* may be damaged$"):
        assert [len(one.boxes) for one in yolo.load(tmp_path / "nan.pt", device="cpu").detect(photos)] == [0] * 4
