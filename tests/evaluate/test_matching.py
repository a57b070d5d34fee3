import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import pairwise_iou
from utils.evaluate.matching import IOU_THRESHOLDS, Labels, confusion_matrix, match
from utils.structures import Detections


def detections(boxes=(), scores=(), classes=()) -> Detections:
    return Detections(
        boxes=torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        classes=torch.tensor(classes, dtype=torch.int64),
    )


def labels(boxes=(), classes=(), ignore=None, crowd=None) -> Labels:
    return Labels(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=np.array(classes, np.int32),
        ignore=np.zeros(len(classes), bool) if ignore is None else np.array(ignore, bool),
        crowd=None if crowd is None else np.array(crowd, bool),
    )


def slow_match(found: Detections, truth: Labels):
    hits = np.zeros((len(found.scores), 10), bool)
    ignored = np.zeros_like(hits)
    boxes, label_boxes = found.boxes.numpy().astype(float), truth.boxes.astype(float)
    for at, threshold in enumerate(IOU_THRESHOLDS):
        taken = set()
        for row in np.argsort(-found.scores.numpy(), kind="stable"):
            best = None
            for label in range(len(truth.classes)):
                if truth.classes[label] != found.classes[row] or label in taken:
                    continue
                iou = pairwise_iou(boxes[row, None], label_boxes[label, None])[0, 0]
                if iou >= threshold and (best is None or (not truth.ignore[label], iou, label) > best):
                    best = (not truth.ignore[label], iou, label)
            if best and best[0]:
                hits[row, at] = True
                taken.add(best[2])
            elif best:
                ignored[row, at] = True
    return hits, ignored


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 9999),
    images=st.integers(0, 4),
    num_classes=st.integers(1, 3),
    coarse=st.booleans(),
    excused=st.sampled_from([0.0, 0.4]),
)
def test_match_equals_the_slow_twin(random_scene, seed, images, num_classes, coarse, excused):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, num_classes, coarse=coarse, excused=excused) for _ in range(images)]
    scenes = [(one, Labels(boxes=true.boxes, classes=true.classes, ignore=true.ignore)) for one, true in scenes]
    matches = match([one for one, _ in scenes], [true for _, true in scenes])
    expected = [slow_match(*scene) for scene in scenes]
    assert np.array_equal(matches.hits, np.concatenate([np.zeros((0, 10), bool), *(hits for hits, _ in expected)]))
    assert np.array_equal(matches.ignored, np.concatenate([np.zeros((0, 10), bool), *(out for _, out in expected)]))


def test_the_better_score_takes_the_label():
    box = [0, 0, 10, 10]
    matches = match([detections([box, box], [0.4, 0.9], [0, 0])], [labels([box], [0])])
    assert matches.hits[:, 0].tolist() == [False, True]


def test_an_image_and_a_class_see_only_their_own_labels():
    box = [0, 0, 10, 10]
    found = [detections([box, box], [0.9, 0.8], [0, 1]), detections([box], [0.7], [0])]
    matches = match(found, [labels([box], [1]), labels()])
    assert matches.hits[:, 0].tolist() == [False, True, False]


def test_ignored_labels_excuse_any_number_and_come_last():
    box = [0, 0, 10, 10]
    found = [detections([box] * 3, [0.9, 0.8, 0.7], [0, 0, 0])]
    matches = match(found, [labels([box, [0, 0, 10, 9]], [0, 0], ignore=[True, False])])
    assert matches.hits[:, 0].tolist() == [True, False, False]
    assert matches.ignored[:, 0].tolist() == [False, True, True]


def test_a_crowd_excuses_what_lies_inside_it():
    found = [detections([[0, 0, 10, 10]], [0.9], [0])]
    plain, crowd = (labels([[0, 0, 100, 100]], [0], ignore=[True], crowd=[flag]) for flag in (False, True))
    assert not match(found, [plain]).ignored.any()
    assert match(found, [crowd]).ignored.all()


def slow_confusion(found: Detections, truth: Labels, num_classes: int) -> np.ndarray:
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    rows = [row for row in range(len(found.scores)) if found.scores[row] > 0.25]
    iou = pairwise_iou(found.boxes.numpy().astype(float), truth.boxes.astype(float))
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


@pytest.mark.parametrize("seed", range(5))
def test_confusion_equals_the_slow_twin_and_adds_up(random_scene, seed):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, 3) for _ in range(4)]
    matrix = confusion_matrix([one for one, _ in scenes], [true for _, true in scenes], 3)
    assert np.array_equal(matrix, sum(slow_confusion(one, true, 3) for one, true in scenes))
    assert matrix[:, :3].sum() == sum(len(true.classes) for _, true in scenes)


def test_confusion_leaves_out_what_is_ignored():
    box = [0, 0, 10, 10]
    found = [detections([box, box], [0.9, 0.8], [0, 1])]
    assert not confusion_matrix(found, [labels([box], [0], ignore=[True])], 2).any()
    assert confusion_matrix(found, [labels([box, box], [0, 0], ignore=[True, False])], 2).tolist() == [
        [1, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_confusion_without_images_or_labels():
    assert not confusion_matrix([], [], 2).any()
    assert confusion_matrix([detections([[0, 0, 1, 1]], [0.9], [1])], [labels()], 2)[1, 2] == 1
