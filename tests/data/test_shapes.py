import hashlib
import itertools
import math
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import xyxy_from_cxcywh
from utils.data import shapes
from utils.structures import UserError

SPLITS = {"train": 5, "val": 3}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", SPLITS)


@pytest.fixture(scope="module")
def scenes():
    return [shapes.random_scene(np.random.default_rng((0, 0, index))) for index in range(150)]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- the set on disk


def test_every_image_has_a_label_file_with_boxes_inside_it(small, tmp_path):
    shapes.draw_shapes(tmp_path / "shapes")
    for split, count in SPLITS.items():
        images = sorted((tmp_path / "shapes/images" / split).iterdir())
        assert [path.name for path in images] == [f"{index:03d}.jpg" for index in range(count)]
        for path in images:
            height, width = cv2.imread(str(path)).shape[:2]
            assert max(height, width) == 160
            text = (tmp_path / "shapes/labels" / split / f"{path.stem}.txt").read_text()
            rows = np.array([line.split() for line in text.splitlines()], float).reshape(-1, 5)
            boxes = xyxy_from_cxcywh(rows[:, 1:])
            assert np.all((boxes > -1e-6) & (boxes < 1 + 1e-6))
            assert np.all((rows[:, 0] >= 0) & (rows[:, 0] < len(shapes.OUTLINES)))


def test_drawing_again_gives_the_same_bytes_and_another_seed_others(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.draw_shapes(tmp_path / name, seed=seed)
    first, second, other = (files_of(tmp_path / name) for name in "abc")
    assert first == second
    assert first["images/train/000.jpg"] != other["images/train/000.jpg"]
    assert len({content for name, content in first.items() if name.endswith(".jpg")}) == sum(SPLITS.values())


def test_labels_are_those_of_the_published_recipe():
    """A change here changes everybody's data: raise RECIPE with it."""
    digest = hashlib.sha256()
    for index in range(40):
        scene = shapes.random_scene(np.random.default_rng((0, 0, index)))
        digest.update(np.array([shape.class_index for shape in scene.shapes], "<i4").tobytes())
        digest.update(scene.boxes().astype("<f8").tobytes())
    assert (shapes.RECIPE, digest.hexdigest()[:16]) == (2, "eb35f3beebde151a")


def test_a_complete_set_is_left_alone(small, tmp_path):
    root = shapes.ensure_shapes(tmp_path / "shapes")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert shapes.ensure_shapes(root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing image", "missing label", "older recipe"])
def test_a_damaged_or_outdated_set_is_drawn_anew(small, tmp_path, monkeypatch, damage):
    root = tmp_path / "shapes"
    if damage == "older recipe":
        monkeypatch.setattr(shapes, "RECIPE", shapes.RECIPE - 1)
        shapes.draw_shapes(root)
        monkeypatch.undo()
        monkeypatch.setattr(shapes, "SPLITS", SPLITS)
    else:
        shapes.draw_shapes(root)
        (root / {"missing image": "images/val/001.jpg", "missing label": "labels/train/002.txt"}[damage]).unlink()
    shapes.ensure_shapes(root)
    shapes.draw_shapes(tmp_path / "fresh")
    assert files_of(root) == files_of(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "shapes"]


def test_a_killed_drawing_leaves_no_set_and_the_next_one_tidies_up(small, tmp_path, monkeypatch):
    root = tmp_path / "shapes"

    def die(rng):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_picture", die)
        with pytest.raises(KeyboardInterrupt):
            shapes.draw_shapes(root)
    assert list(tmp_path.iterdir()) == []

    leftover = tmp_path / f".shapes.{'0' * 32}"  # of a process that could not even clean up
    (leftover / "images").mkdir(parents=True)
    os.utime(leftover, (0, 0))
    shapes.draw_shapes(root)
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_of_the_user_is_never_replaced(small, tmp_path):
    mine = tmp_path / "shapes/images/mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match="in the way"):
        shapes.ensure_shapes(tmp_path / "shapes")
    assert mine.read_bytes() == b"precious"


def test_an_empty_folder_is_as_good_as_none(small, tmp_path):
    (tmp_path / "shapes").mkdir()
    assert (shapes.ensure_shapes(tmp_path / "shapes") / "images/train/000.jpg").is_file()


@pytest.mark.parametrize("outdated", [False, True])
def test_two_at_once_both_end_well(small, tmp_path, outdated):
    root = tmp_path / "shapes"
    shapes.draw_shapes(tmp_path / "alone")
    if outdated:
        shapes.draw_shapes(root, seed=7)
    failures = []

    def draw():
        try:
            shapes.ensure_shapes(root)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files_of(root) == files_of(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shapes"]


def test_where_it_cannot_be_written_the_cache_takes_it(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path / "cache")
    root = shapes.ensure_shapes(tmp_path / "file/shapes")
    assert root == tmp_path / "cache/shapes"
    assert (root / "labels/val/002.txt").is_file()

    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path / "file")
    with pytest.raises(UserError, match=r"neither to .* nor to"):
        shapes.ensure_shapes(tmp_path / "file/shapes")


def test_the_yaml_names_what_is_drawn():
    content = yaml.safe_load(Path("data/shapes.yaml").read_text())
    assert content["names"] == list(shapes.OUTLINES)
    assert {"images/train", "images/val"} == {content["train"], content["val"]}
    assert content["embedded"] is True
    assert content["imgsz"] == max(max(size) for size in shapes.SIZES)


# ---- geometry


def slow_distance(shape: shapes.Shape, x: float, y: float) -> float:
    """Distance to each edge by dense points on it; inside by the winding angle."""
    corners = shape.vertices
    rings = list(zip(corners, np.roll(corners, -1, 0)))
    nearest = min(math.dist((x, y), a + (b - a) * t) for a, b in rings for t in np.linspace(0, 1, 801))
    turns = 0.0
    for a, b in rings:
        angle = math.atan2(b[1] - y, b[0] - x) - math.atan2(a[1] - y, a[0] - x)
        turns += (angle + math.pi) % (2 * math.pi) - math.pi
    inside = len(corners) > 2 and abs(turns) > math.pi
    return (-nearest if inside else nearest) - shape.radius


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), x=st.floats(-20, 180), y=st.floats(-20, 180))
def test_signed_distance_agrees_with_its_slow_twin(seed, x, y):
    shape = shapes.random_shape(np.random.default_rng(seed), 160, 160)
    got = shapes.signed_distance(shape, np.array([x], np.float32), np.array([y], np.float32))
    assert got.shape == (1, 1)
    assert got[0, 0] == pytest.approx(slow_distance(shape, x, y), abs=0.01)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_shape_alone_has_the_box_that_geometry_says(seed):
    shape = shapes.random_shape(np.random.default_rng(seed), 160, 160)
    scene = shapes.Scene(160, 160)
    low, high = shape.vertices.min(0) - shape.radius, shape.vertices.max(0) + shape.radius
    if scene.add(shape) and min(low) >= 0 and max(high) <= 160:
        assert scene.boxes()[0] == pytest.approx([*low, *high], abs=0.2)


def tight_box(mask: np.ndarray) -> np.ndarray:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_boxes_surround_what_is_seen_and_most_of_each_shape_is_seen(scenes):
    for scene in scenes[:40]:
        step = 1 / 8
        x, y = (np.arange(0, end, step, np.float32) + step / 2 for end in (scene.width, scene.height))
        covered = [shapes.signed_distance(shape, x, y) <= 0 for shape in scene.shapes]
        for index, box in enumerate(scene.boxes()):
            seen = covered[index] & ~np.any(covered[index + 1 :], axis=0)
            solid = cv2.morphologyEx(seen.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3))) > 0  # without slivers
            outer, inner = tight_box(seen) * step, tight_box(solid) * step
            assert np.all(box[:2] >= outer[:2] - 0.25) and np.all(box[2:] <= outer[2:] + 0.25)
            assert np.all(box[:2] <= inner[:2] + 0.25) and np.all(box[2:] >= inner[2:] - 0.25)
            assert seen.sum() >= 0.65 * covered[index].sum()


def test_a_shape_that_would_hide_another_is_refused():
    square = shapes.Shape(3, np.array([(40.0, 40), (80, 40), (80, 80), (40, 80)]), 2.0)
    scene = shapes.Scene(160, 160)
    assert scene.add(square)
    assert not scene.add(shapes.Shape(0, np.array([(60.0, 60)]), 18.0))
    assert scene.add(shapes.Shape(0, np.array([(38.0, 60)]), 14.0))  # covers a little, and moves the box
    assert scene.boxes() == pytest.approx(np.array([(38, 38, 82, 82), (24, 46, 52, 74)]), abs=0.3)
    assert not scene.add(shapes.Shape(0, np.array([(160.0, 100)]), 20.0))  # half of it outside


# ---- the task it sets


def test_classes_and_backgrounds_are_balanced_and_sizes_varied(scenes):
    counts = np.bincount([shape.class_index for scene in scenes for shape in scene.shapes], minlength=5)
    assert counts.min() > 0.6 * counts.mean()
    assert 0.03 < np.mean([not scene.shapes for scene in scenes]) < 0.16
    assert max(len(scene.shapes) for scene in scenes) <= 6
    boxes = np.concatenate([scene.boxes() for scene in scenes])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() > 5 and sides.max() < 92
    assert np.quantile(sides, 0.1) < 27 and np.quantile(sides, 0.9) > 50


def test_colour_hints_at_the_class():
    """The nearest of the classes' mean colours is mostly that of the shape, or a demo could not learn in minutes."""
    colours, classes = [], []
    for index in range(120):
        picture = shapes.draw_picture(np.random.default_rng((0, 0, index)))
        scene = shapes.random_scene(np.random.default_rng((0, 0, index)))
        pixels = cv2.imdecode(np.frombuffer(picture.jpeg, np.uint8), cv2.IMREAD_COLOR)
        owner = scene.owner[::4, ::4]
        for number, class_index in enumerate(picture.classes):
            colours.append(pixels[owner == number].mean(0))
            classes.append(class_index)
    colours, classes = np.array(colours), np.array(classes)
    half = len(classes) // 2
    means = np.stack([colours[:half][classes[:half] == index].mean(0) for index in range(5)])
    guesses = np.linalg.norm(colours[half:, None] - means, axis=2).argmin(1)
    assert np.mean(guesses == classes[half:]) > 0.8


def test_shapes_stand_out_where_the_labels_say():
    """On a dark ground, the box around the pixels that light up is the label."""
    x, y = np.arange(96) + np.float32(0.5), np.arange(64) + np.float32(0.5)
    for seed, (class_index, (vertices, radius)) in itertools.product(range(3), enumerate(shapes.OUTLINES.values())):
        shape = shapes.Shape(class_index, vertices * 20 + (45.0, 30.0), radius * 20)
        canvas = np.full((64, 96, 3), 40.0, np.float32)
        shapes._paint_shape(np.random.default_rng(seed), canvas, shape, x, y, light=0.7)
        scene = shapes.Scene(64, 96)
        assert scene.add(shape)
        assert tight_box(canvas.max(2) > 45) == pytest.approx(scene.boxes()[0], abs=1.5)  # a shadow only darkens
