from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slow_coco import slow_match
from tests.stores import ImageLabels, build_store
from utils.boxes import pairwise_iou, xywh_from_xyxy
from utils.evaluate import matching
from utils.evaluate.matching import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    DetectionTable,
    Labels,
    LabelTable,
    confusion_matrix,
    confusions,
    match,
    verdict_bits,
)
from utils.structures import CROWD, DIFFICULT, Detections


def detections(boxes=(), scores=(), classes=()) -> Detections:
    return Detections(
        boxes=torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        classes=torch.tensor(classes, dtype=torch.int64),
    )


def labels(boxes=(), classes=(), ignore=None, crowd=None, area=None) -> Labels:
    xywh = xywh_from_xyxy(np.array(boxes, np.float32).reshape(-1, 4).astype(float))
    crowd = np.zeros(len(classes), bool) if crowd is None else np.array(crowd, bool)
    return Labels(
        xywh=xywh,
        classes=np.array(classes, np.int32),
        area=xywh[:, 2] * xywh[:, 3] if area is None else np.array(area, float),
        ignore=crowd if ignore is None else np.array(ignore, bool),
        crowd=crowd,
    )


def matched(found: list[Detections], truth: list[Labels]):
    return match(DetectionTable.of(found), LabelTable.of(truth))


def outcome(found: Detections, truth: Labels, area: int = 0) -> str:
    """A letter per detection at IoU .5: hit, ignored or false alarm."""
    verdicts = matched([found], [truth])
    hits, ignored = verdict_bits(verdicts.hits, area)[:, 0], verdict_bits(verdicts.ignored, area)[:, 0]
    assert not (hits & ignored).any()
    return "".join("h" if hit else "i" if out else "f" for hit, out in zip(hits, ignored))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 9999),
    images=st.integers(0, 4),
    num_classes=st.integers(1, 3),
    coarse=st.booleans(),
    excused=st.sampled_from([0.0, 0.3]),
    span=st.sampled_from([40, 200]),
)
def test_match_equals_the_slow_twin(random_scene, seed, images, num_classes, coarse, excused, span):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, num_classes, coarse=coarse, excused=excused, span=span) for _ in range(images)]
    verdicts = matched([one for one, _ in scenes], [true for _, true in scenes])
    for area in range(len(AREA_RANGES)):
        hits, ignored = verdict_bits(verdicts.hits, area), verdict_bits(verdicts.ignored, area)
        for at, threshold in enumerate(IOU_THRESHOLDS):
            expected = [slow_match(*scene, area, threshold) for scene in scenes]
            letters = np.where(hits[:, at], "h", np.where(ignored[:, at], "i", "f"))
            assert "".join(letters) == "".join(one for one, _ in expected)
            if area == 0:
                taken = np.flatnonzero(verdict_bits(verdicts.taken, 0)[:, at])
                starts = np.cumsum([0, *(len(true.classes) for _, true in scenes)])
                counted = [~true.ignore for _, true in scenes]
                mine = {label for label in taken.tolist() if np.concatenate(counted)[label]}
                wanted = {starts[k] + one for k, (_, found) in enumerate(expected) for one in found if counted[k][one]}
                assert mine == wanted


def test_the_search_for_overlaps_in_parts_finds_them_all(random_scene, monkeypatch):
    generator = np.random.default_rng(5)
    scenes = [random_scene(generator, 2, most=30) for _ in range(5)]
    found, truth = [one for one, _ in scenes], [one for _, one in scenes]
    whole = matched(found, truth)
    monkeypatch.setattr(matching, "_PAIRS_AT_ONCE", 7)
    assert np.array_equal(whole.hits, matched(found, truth).hits) and whole.hits.any()


def test_the_better_score_takes_the_label():
    box = [0, 0, 10, 10]
    assert outcome(detections([box, box], [0.4, 0.9], [0, 0]), labels([box], [0])) == "fh"
    assert outcome(detections([box, box], [0.9, 0.9], [0, 0]), labels([box], [0])) == "hf"  # as given


def test_ranks_count_within_image_and_class():
    box = [0, 0, 10, 10]
    found = [detections([box] * 4, [0.4, 0.9, 0.4, 0.1], [0, 0, 0, 1]), detections([box], [0.7], [0])]
    assert matched(found, [labels(), labels()]).ranks.tolist() == [1, 0, 2, 0, 0]


def test_an_image_and_a_class_see_only_their_own_labels():
    box = [0, 0, 10, 10]
    found = [detections([box, box], [0.9, 0.8], [0, 1]), detections([box], [0.7], [0])]
    verdicts = matched(found, [labels([box], [1]), labels()])
    assert (verdicts.hits & 1).tolist() == [0, 1, 0]


def test_ignored_labels_excuse_any_number_and_come_last():
    box = [0, 0, 10, 10]
    truth = labels([box, [0, 0, 10, 9]], [0, 0], ignore=[True, False])
    assert outcome(detections([box] * 3, [0.9, 0.8, 0.7], [0, 0, 0]), truth) == "hii"


def test_a_label_of_another_size_excuses_one_detection_and_a_difficult_one_any_number():
    box = [0, 0, 32, 33]
    found = detections([box] * 3, [0.9, 0.8, 0.7], [0, 0, 0])
    far_off = detections([[0, 0, 20, 20]], [0.9], [0])
    assert outcome(found, labels([box], [0], area=[1024]), area=1) == "hii"  # too large themselves
    assert outcome(found, labels([box], [0], area=[1025]), area=1) == "iii"
    assert outcome(found, labels([box], [0], area=[1023]), area=2) == "iff"
    assert outcome(found, labels([box], [0], area=[1023], ignore=[True]), area=2) == "iii"
    assert outcome(far_off, labels([box], [0], area=[1025]), area=1) == "f"
    assert outcome(far_off, labels([box], [0], area=[1025]), area=2) == "i"


def test_a_crowd_excuses_what_lies_inside_it():
    found = detections([[0, 0, 10, 10]], [0.9], [0])
    assert outcome(found, labels([[0, 0, 100, 100]], [0], ignore=[True])) == "f"
    assert outcome(found, labels([[0, 0, 100, 100]], [0], crowd=[True])) == "i"


def test_labels_are_those_of_the_store():
    boxes = np.array([[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]])
    rows = ImageLabels(boxes=boxes, classes=np.array([2, 0, 1]), ignore=np.array([0, CROWD, DIFFICULT], np.uint8))
    store = build_store(["a.png", "b.png"], [(40, 80)] * 2, [rows, rows])
    one = Labels.of(store, 1)
    assert one.xywh.tolist() == [[0, 0, 40, 10], [40, 20, 40, 20], [0, 20, 40, 20]]
    assert (one.classes.tolist(), one.area.tolist()) == ([2, 0, 1], [400, 800, 800])
    assert (one.ignore.tolist(), one.crowd.tolist()) == ([False, True, True], [False, True, False])


def test_labels_of_a_coco_file_are_as_annotated():
    boxes = np.array([[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]])
    rows = ImageLabels(boxes=boxes, classes=np.array([2, 0, 1]))
    store = build_store(["a.png", "b.png"], [(40, 80)] * 2, [rows, rows])
    annotated = np.arange(24).reshape(6, 4) / 3
    assert np.array_equal(Labels.of(replace(store, annotated=annotated), 1).xywh, annotated[3:])


def slow_confusion(found: Detections, truth: Labels, num_classes: int) -> np.ndarray:
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    corners = np.concatenate([truth.xywh[:, :2], truth.xywh[:, :2] + truth.xywh[:, 2:]], 1)
    rows = [row for row in range(len(found.scores)) if found.scores[row] > 0.25]
    iou = pairwise_iou(found.boxes.numpy().astype(float), corners)
    open_labels = set(range(len(truth.classes)))
    while options := [
        (iou[row, label], row, label) for row in rows for label in open_labels if iou[row, label] >= 0.45
    ]:
        _, row, label = max(options)
        matrix[found.classes[row], truth.classes[label]] += 1
        rows.remove(row)
        open_labels.remove(label)
    for row in rows:
        matrix[found.classes[row], num_classes] += 1
    for label in open_labels:
        matrix[num_classes, truth.classes[label]] += 1
    return matrix


def confused(found, truth, num_classes):
    return confusion_matrix(confusions(DetectionTable.of(found), LabelTable.of(truth), num_classes), num_classes)


@pytest.mark.parametrize("seed", range(5))
def test_confusion_equals_the_slow_twin_and_adds_up(random_scene, seed):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, 3) for _ in range(4)]
    matrix = confused([one for one, _ in scenes], [true for _, true in scenes], 3)
    assert np.array_equal(matrix, sum(slow_confusion(one, true, 3) for one, true in scenes))
    assert matrix[:, :3].sum() == sum(len(true.classes) for _, true in scenes)


def test_confusion_leaves_out_what_is_ignored():
    box = [0, 0, 10, 10]
    found = [detections([box, box], [0.9, 0.8], [0, 1])]
    assert not confused(found, [labels([box], [0], ignore=[True])], 2).any()
    assert confused(found, [labels([box, box], [0, 0], ignore=[True, False])], 2).tolist() == [
        [1, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_confusion_without_images_or_labels():
    assert not confused([], [], 2).any()
    assert confused([detections([[0, 0, 1, 1]], [0.9], [1])], [labels()], 2)[1, 2] == 1
