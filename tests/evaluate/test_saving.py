"""Label files and COCO results, read back by a plain reader and by COCO's own tool."""

import io
import json
import resource
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.stores import ImageLabels, build_store
from utils.evaluate.matching import Labels
from utils.evaluate.metrics import collect, compute_metrics
from utils.evaluate.saving import (
    check_folder,
    clear_results,
    coco_ids,
    label_names,
    write_labels,
    write_predictions,
    write_txt,
)
from utils.structures import CROWD, DIFFICULT, Detections, UserError

NAMES = ("cat", "größe", "猫")
SIZE = (80, 100)  # height, width
NOTHING = ImageLabels(boxes=np.empty((0, 4)), classes=np.empty(0, np.int64))


def store_of(*labels: ImageLabels, paths=(), **changes):
    paths = paths or [f"/set/images/{index}.jpg" for index in range(len(labels))]
    return replace(build_store(paths, [SIZE] * len(labels), labels, num_classes=len(NAMES)), **changes)


def labelled(*rows, ignore=None) -> ImageLabels:
    """Rows of class and xyxy px."""
    boxes = np.array([row[1:] for row in rows], float).reshape(-1, 4) / [100, 80, 100, 80]
    return ImageLabels(boxes=boxes, classes=np.array([row[0] for row in rows], np.int64), ignore=ignore)


def found(*rows) -> Detections:
    """Rows of class, score and xyxy px."""
    return Detections(
        boxes=torch.tensor([row[2:] for row in rows], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([row[1] for row in rows], dtype=torch.float32),
        classes=torch.tensor([row[0] for row in rows], dtype=torch.int64),
    )


def evidence_of(store, *detections: Detections, order=None):
    order = range(len(detections)) if order is None else order
    return collect(
        list(order), [detections[image] for image in order], [Labels.of(store, image) for image in order], len(NAMES)
    )


# ---- COCO results ---------------------------------------------------------------------------------------------------


def random_scene(seed: int):
    """A store of 12 images with crowds, and detections around the labels and elsewhere; many equal scores."""
    rng = np.random.default_rng(seed)
    labels, detections = [], []
    for _ in range(12):
        count = int(rng.integers(0, 5))
        corners = rng.uniform(0, 0.5, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.05, 0.5, (count, 2))], 1)
        kinds = rng.integers(0, len(NAMES), count)
        labels.append(
            ImageLabels(boxes=boxes, classes=kinds, ignore=(rng.random(count) < 0.2).astype(np.uint8) * CROWD)
        )
        around = np.repeat(boxes, 3, 0) * [100, 80, 100, 80] + rng.normal(0, 3, (3 * count, 4))
        around[:, 2:] = np.maximum(around[:, 2:], around[:, :2] + 1)
        scores = np.sort(rng.integers(1, 9, len(around)) / 10)[::-1]
        detections.append(
            found(*((kind, score, *box) for kind, score, box in zip(np.repeat(kinds, 3), scores, around)))
        )
    return labels, detections


def twelve_by_the_tool(annotations: Path, predictions: Path) -> list[float]:
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        run = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


def twelve(metrics) -> list[float]:
    return [-1 if value is None else value for value in vars(metrics.coco).values()]


@pytest.mark.parametrize("seed", range(4))
def test_the_tool_scores_the_two_files_as_we_do(seed, tmp_path):
    labels, detections = random_scene(seed)
    store = store_of(*labels)
    evidence = evidence_of(store, *detections)
    assert write_predictions(tmp_path, evidence, store, NAMES) == []
    metrics = compute_metrics(evidence, NAMES, image_ids=coco_ids(store, len(NAMES)).images)
    scored = twelve_by_the_tool(tmp_path / "annotations.json", tmp_path / "predictions.json")
    assert scored == pytest.approx(twelve(metrics), abs=1e-9)
    assert 0 < metrics.map50_95 < 1


@pytest.mark.parametrize("seed", range(4))
def test_equal_scores_go_by_the_ids_of_the_file(seed, tmp_path):
    """The tool walks images by id, which need not be the order of the file."""
    labels, detections = random_scene(seed)
    shuffled = np.random.default_rng(seed).permutation(len(labels)) * 10**12
    store = store_of(*labels, image_ids=shuffled, category_ids=np.array([7, 1, 90]))
    evidence = evidence_of(store, *detections)
    assert write_predictions(tmp_path, evidence, store, NAMES) == []
    metrics = compute_metrics(evidence, NAMES, image_ids=coco_ids(store, len(NAMES)).images)
    scored = twelve_by_the_tool(tmp_path / "annotations.json", tmp_path / "predictions.json")
    assert scored == pytest.approx(twelve(metrics), abs=1e-9)
    nameless = replace(store, image_ids=np.full(len(store), -1))
    write_predictions(made(tmp_path / "other"), evidence, nameless, NAMES)
    content = json.loads((tmp_path / "other/annotations.json").read_text())
    for item in content["images"]:
        item["id"] = int(shuffled[item["id"] - 1])
    for item in content["annotations"]:
        item |= {"image_id": int(shuffled[item["image_id"] - 1]), "category_id": [7, 1, 90][item["category_id"] - 1]}
    for item, number in zip(content["categories"], (7, 1, 90)):
        item["id"] = number
    (tmp_path / "truth.json").write_text(json.dumps(content))
    metrics = compute_metrics(evidence, NAMES, image_ids=coco_ids(store, len(NAMES)).images)
    scored = twelve_by_the_tool(tmp_path / "truth.json", tmp_path / "predictions.json")
    assert scored == pytest.approx(twelve(metrics), abs=1e-9)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_every_digit_of_a_detection_is_there_in_the_order_of_the_images(tmp_path):
    store = store_of(NOTHING, NOTHING, image_ids=np.array([5, 2**62]), category_ids=np.array([3, 1, 2]))
    third = np.float32(1) / 3
    one, two = found((1, third, third, 2, 30.1, 40)), found((0, 0.9, 1, 2, 3, 4), (2, 1e-7, 0, 0, 100, 80))
    write_predictions(tmp_path, evidence_of(store, one, two, order=[1, 0]), store, NAMES)
    told = json.loads((tmp_path / "predictions.json").read_text())
    x, right = float(third), float(np.float32(30.1))
    assert told == [
        {"image_id": 5, "category_id": 1, "bbox": [x, 2.0, right - x, 38.0], "score": float(third)},
        {"image_id": 2**62, "category_id": 3, "bbox": [1, 2, 2, 2], "score": float(np.float32(0.9))},
        {"image_id": 2**62, "category_id": 2, "bbox": [0, 0, 100, 80], "score": float(np.float32(1e-7))},
    ]


def test_classes_that_the_coco_file_lacks_are_left_out_and_named(tmp_path):
    store = store_of(NOTHING, image_ids=np.array([1]), category_ids=np.array([3, -1, 2]))
    evidence = evidence_of(store, found((0, 0.9, 1, 2, 3, 4), (1, 0.8, 1, 2, 3, 4), (1, 0.7, 1, 2, 30, 4)))
    (line,) = write_predictions(tmp_path, evidence, store, NAMES)
    assert "2 detections" in line and line.endswith("größe")
    assert [item["category_id"] for item in json.loads((tmp_path / "predictions.json").read_text())] == [3]


def test_nothing_found_is_an_empty_list(tmp_path):
    store = store_of(NOTHING)
    write_predictions(tmp_path, evidence_of(store, found()), store, NAMES)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []
    assert json.loads((tmp_path / "annotations.json").read_text())["annotations"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"image_ids": np.array([3, -1])},  # a mix of formats
        {"image_ids": np.array([3, 3])},  # two COCO files
        {"image_ids": np.array([3, 4]), "category_ids": np.array([1, 2])},  # --single-cls
        {"image_ids": np.array([3, 4]), "category_ids": np.array([-1, -1, -1])},  # words in place of numbers
        {"image_ids": np.array([3, 4]), "category_ids": np.array([1, 2, -1])},  # a word, and labels of that class
        {"image_ids": np.array([3, 4]), "category_ids": np.array([1, 1, 2])},  # two COCO files, each with a class 1
    ],
)
def test_ids_are_invented_where_those_of_the_split_will_not_do(changes):
    ids = coco_ids(store_of(NOTHING, labelled((2, 10, 20, 30, 60)), **changes), len(NAMES))
    assert ids.invented
    assert (ids.images.tolist(), ids.categories.tolist()) == ([1, 2], [1, 2, 3])


def test_an_invented_file_is_as_the_split_is(tmp_path):
    rows = labelled((2, 10, 20, 30, 60), (0, 0, 0, 100, 80), (1, 1, 1, 5, 9), ignore=np.array([0, CROWD, DIFFICULT]))
    store = store_of(NOTHING, rows, paths=["/set/a/x.jpg", "/set/b/猫.png"])
    (line,) = write_predictions(tmp_path, evidence_of(store, found(), found()), store, NAMES)
    assert "1 difficult" in line
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a/x.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "b/猫.png", "width": 100, "height": 80},
    ]
    assert content["categories"] == [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    box = {"id": 1, "image_id": 2, "category_id": 3, "bbox": [10, 20, 20, 40], "area": 800, "iscrowd": 0}
    assert [item | {"area": round(item["area"], 9)} for item in content["annotations"]] == [
        box,
        box | {"id": 2, "category_id": 1, "bbox": [0, 0, 100, 80], "area": 8000, "iscrowd": 1},
        box | {"id": 3, "category_id": 2, "bbox": [1, 1, 4, 8], "area": 32, "ignore": 1},
    ]


# ---- label files ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 70_000), st.integers(1, 70_000)), seed=st.integers(0, 2**20))
def test_boxes_come_back_from_a_label_file(tmp_path_factory, size, seed):
    height, width = size
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (6, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)
    scores, kinds = rng.random(6).astype(np.float32), rng.integers(0, 1000, 6)
    path = tmp_path_factory.mktemp("txt") / "x.txt"
    write_txt(path, boxes, kinds, scores, size)
    rows = np.array([line.split() for line in path.read_text().splitlines()]).astype(np.float64)
    centre, sides = rows[:, 1:3] * [width, height], rows[:, 3:5] * [width, height]
    np.testing.assert_allclose(np.concatenate([centre - sides / 2, centre + sides / 2], 1), boxes, atol=1e-4, rtol=0)
    assert rows[:, 0].tolist() == kinds.tolist()
    assert rows[:, 5].astype(np.float32).tolist() == scores.tolist()


def test_label_files_are_those_of_images_with_something_in_them(tmp_path):
    store = store_of(NOTHING, NOTHING, NOTHING)
    evidence = evidence_of(
        store, found((1, 0.5, 0, 0, 50, 40)), found(), found((0, 0.25, 25, 20, 75, 60)), order=[2, 0, 1]
    )
    assert write_labels(tmp_path, evidence, store) == 2
    assert {path.name: path.read_text() for path in (tmp_path / "labels").iterdir()} == {
        "0.txt": "1 0.25 0.25 0.5 0.5\n",
        "2.txt": "0 0.5 0.5 0.5 0.5\n",
    }
    write_labels(made(tmp_path / "other"), evidence, store, scores=True)
    assert (tmp_path / "other/labels/2.txt").read_text() == "0 0.5 0.5 0.5 0.5 0.25\n"


def test_hybrid_labels_are_the_truth_and_what_else_was_found(tmp_path):
    """Not what is known by another name, nor what is hardly there; a crowd hides nothing."""
    truth = labelled((1, 0, 0, 50, 40), (0, 0, 0, 100, 80), ignore=np.array([0, CROWD]))
    store = store_of(truth, labelled((2, 10, 10, 20, 20)))
    same, other_class, elsewhere = (1, 0.9, 1, 1, 50, 40), (2, 0.8, 1, 1, 50, 40), (1, 0.7, 60, 40, 100, 80)
    in_crowd, least, weak = (0, 0.6, 0, 0, 100, 80), (0, 0.26, 70, 0, 90, 20), (0, 0.25, 70, 0, 90, 20)
    evidence = evidence_of(store, found(same, other_class, elsewhere, in_crowd, least, weak), found())
    assert write_labels(tmp_path, evidence, store, scores=True, hybrid_iou=0.6) == 2
    rows = [line.split() for line in (tmp_path / "labels/0.txt").read_text().splitlines()]
    assert [(int(row[0]), float(row[5])) for row in rows] == [(1, 1.0), (1, 0.7), (0, 0.6), (0, 0.26)]
    assert (tmp_path / "labels/1.txt").read_text() == "2 0.15 0.1875 0.1 0.125 1.0\n"


NAMED = {
    "one folder": (["/d/val/a.jpg", "/d/val/b.c.jpg"], ["a.txt", "b.c.txt"]),
    "one image": (["/d/val/a.jpg"], ["a.txt"]),
    "equal names in two folders": (["/d/x/a.jpg", "/d/y/z/a.jpg"], ["x/a.txt", "y/z/a.txt"]),
    "a folder within": (["/d/x/a.jpg", "/d/x/y/a.jpg"], ["a.txt", "y/a.txt"]),
    "nothing in common": (["/d/a.jpg", "/e/a.jpg"], ["d/a.txt", "e/a.txt"]),
    "two formats": (["/d/a.jpg", "/d/a.png", "/d/b.png"], ["a.jpg.txt", "a.png.txt", "b.txt"]),
    "case": (["/d/a.jpg", "/d/A.jpg"], ["a.jpg.txt", "A.jpg-2.txt"]),
    "traps": (["/d/a.jpg", "/d/a.png", "/d/a.jpg.bmp"], ["a.jpg.txt", "a.png.txt", "a.jpg.bmp.txt"]),
    "listed twice": (["/d/a.jpg", "/d/a.jpg"], ["a.txt", "a.txt"]),
    "ways up": (["/d/x/../../../e/a.jpg", "/d/x/../b.jpg"], ["e/a.txt", "d/b.txt"]),
    "a folder that begins like another": (["/d/val/a.jpg", "/d/val2/a.jpg"], ["val/a.txt", "val2/a.txt"]),
}


@pytest.mark.parametrize("case", NAMED)
def test_no_label_file_stands_for_two_images(case):
    paths, names = NAMED[case]
    assert label_names(store_of(*[NOTHING] * len(paths), paths=paths)) == names


# ---- folders and disks ----------------------------------------------------------------------------------------------


def test_results_of_an_earlier_evaluation_go(tmp_path):
    files = "metrics.json predictions.json annotations.json val_batch2_pred.jpg PR_curve.png"
    files += " results.csv notes.txt worst_day.jpg"
    for name in files.split():
        (tmp_path / name).write_text("old")
    check_folder(tmp_path)
    clear_results(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "notes.txt", "worst_day.jpg"}
    clear_results(tmp_path)


def test_a_file_of_the_users_is_not_replaced(tmp_path):
    (tmp_path / "annotations.json").write_text("mine")
    with pytest.raises(UserError, match=r"--exist-ok: .*annotations\.json is not of an evaluation"):
        check_folder(tmp_path)


def test_a_full_disk_leaves_no_half_a_file(tmp_path):
    store = store_of(NOTHING)
    evidence = evidence_of(store, found(*[(0, 0.5, 0, 0, 50, 40)] * 5000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"predictions\.json"):
            write_predictions(tmp_path, evidence, store, NAMES)
        with pytest.raises(OSError, match=r"0\.txt"):
            write_labels(tmp_path, evidence, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert write_labels(tmp_path, evidence, store) == 1  # what was left is not in the way
