import contextlib
import io

import numpy as np
import pytest
import torch

from utils.evaluate.matching import IOU_THRESHOLDS, Labels
from utils.evaluate.metrics import CONFIDENCES, Evidence, collect, compute_metrics, merge
from utils.report.loggers import table
from utils.structures import Detections

NAMES = ("cat", "dog", "owl")


def scenes_of(random_scene, seed: int, **options):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, len(NAMES), **options) for _ in range(8)]
    return [found for found, _ in scenes], [truth for _, truth in scenes]


def evidence_of(detections, labels) -> Evidence:
    return collect(range(len(labels)), detections, labels, len(NAMES))


def coco_average_precision(detections, labels) -> np.ndarray:
    """(C, 10) by pycocotools, NaN for a class without labels."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(boxes):
        boxes = np.asarray(boxes, np.float64)
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()

    annotations = [
        {"image_id": image, "category_id": int(index), "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for image, one in enumerate(labels)
        for box, index, crowd in zip(rows(one.boxes), one.classes, one.ignore)
    ]
    results = [
        {"image_id": image, "category_id": index, "bbox": box, "score": score}
        for image, one in enumerate(detections)
        for box, index, score in zip(rows(one.boxes), one.classes.tolist(), one.scores.tolist())
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(labels))],
            "categories": [{"id": index, "name": name} for index, name in enumerate(NAMES)],
            "annotations": [{"id": number + 1, **one} for number, one in enumerate(annotations)],
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.params.maxDets = [300]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, 0]  # (10, 101, C), -1 without labels
    return np.where(precision < 0, np.nan, precision).mean(1).T


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [{}, {"excused": 0.3}, {"most": 40, "excused": 0.1}])
def test_average_precision_is_that_of_pycocotools(random_scene, seed, options):
    detections, labels = scenes_of(random_scene, seed, **options)
    metrics = compute_metrics(evidence_of(detections, labels), NAMES)
    expected = coco_average_precision(detections, labels)
    for mine, theirs in zip(metrics.per_class, expected):
        if mine.labels:
            assert mine.map50 == pytest.approx(theirs[0], abs=1e-9)
            assert mine.map50_95 == pytest.approx(theirs.mean(), abs=1e-9)
    assert metrics.map50_95 == pytest.approx(np.nanmean(expected), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_curves_equal_a_count_at_each_confidence(random_scene, seed):
    detections, labels = scenes_of(random_scene, seed, coarse=True, excused=0.2)
    evidence = evidence_of(detections, labels)
    metrics = compute_metrics(evidence, NAMES)
    with_labels = [index for index in range(len(NAMES)) if evidence.labels[index]]
    for row, index in enumerate(with_labels):
        mine = (evidence.classes == index) & ~evidence.ignored[:, 0]
        for at in range(0, 1000, 37):
            claimed = evidence.hits[mine & (evidence.scores >= CONFIDENCES[at]), 0]
            precision = claimed.mean() if len(claimed) else 1.0
            recall = claimed.sum() / evidence.labels[index]
            assert metrics.curves.precision[row, at] == pytest.approx(precision)
            assert metrics.curves.recall[row, at] == pytest.approx(recall)
            expected_f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
            assert metrics.curves.f1[row, at] == pytest.approx(expected_f1)
    best = metrics.curves.f1.mean(0).argmax()
    assert metrics.best_confidence == CONFIDENCES[best]
    assert metrics.precision == pytest.approx(metrics.curves.precision[:, best].mean())
    assert metrics.recall == pytest.approx(np.mean([metrics.per_class[index].recall for index in with_labels]))


def test_the_result_does_not_depend_on_how_images_are_dealt(random_scene):
    detections, labels = scenes_of(random_scene, 3, coarse=True)  # many equal scores
    whole = compute_metrics(evidence_of(detections, labels), NAMES)
    parts = [collect(range(rank, 8, 3), detections[rank::3], labels[rank::3], len(NAMES)) for rank in (2, 0, 1)]
    dealt = compute_metrics(merge(parts), NAMES)
    assert (dealt.per_class, dealt.map50_95) == (whole.per_class, whole.map50_95)
    assert np.array_equal(dealt.confusion, whole.confusion)
    assert np.array_equal(dealt.curves.f1, whole.curves.f1)
    assert (dealt.images, dealt.labels) == (8, sum(len(one.classes) for one in labels))


def exact(labels: list[Labels]) -> list[Detections]:
    """A perfect detector."""
    return [
        Detections(
            boxes=torch.from_numpy(one.boxes),
            scores=torch.full((len(one.classes),), 0.9),
            classes=torch.from_numpy(one.classes).long(),
        )
        for one in labels
    ]


def test_a_perfect_detector_scores_one(random_scene):
    _, labels = scenes_of(random_scene, 0)
    metrics = compute_metrics(evidence_of(exact(labels), labels), NAMES)
    assert (metrics.precision, metrics.recall, metrics.map50, metrics.fitness) == pytest.approx((1, 1, 1, 1))
    assert np.array_equal(metrics.confusion, np.diag(np.diag(metrics.confusion)))


def test_without_any_label_everything_is_zero(random_scene):
    detections, _ = scenes_of(random_scene, 0)
    nothing = Labels(boxes=np.zeros((0, 4), np.float32), classes=np.zeros(0, np.int32), ignore=np.zeros(0, bool))
    metrics = compute_metrics(evidence_of(detections, [nothing] * 8), NAMES)
    assert (metrics.precision, metrics.recall, metrics.map50, metrics.map50_95, metrics.fitness) == (0, 0, 0, 0, 0)
    assert metrics.best_confidence == 0 and metrics.curves.f1.shape == (0, 1000)
    assert "nan" not in table(metrics, verbose=True)


def test_without_any_detection_everything_is_zero(random_scene):
    _, labels = scenes_of(random_scene, 0)
    nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), classes=torch.zeros(0, dtype=torch.int64))
    metrics = compute_metrics(evidence_of([nothing] * 8, labels), NAMES)
    assert (metrics.precision, metrics.recall, metrics.map50_95) == (0, 0, 0)
    assert metrics.labels == sum(len(one.classes) for one in labels)


def test_means_leave_out_classes_without_labels(random_scene):
    detections, labels = scenes_of(random_scene, 1)
    keep = [one.classes != 1 for one in labels]
    labels = [
        Labels(boxes=one.boxes[rows], classes=one.classes[rows], ignore=one.ignore[rows])
        for one, rows in zip(labels, keep)
    ]
    metrics = compute_metrics(evidence_of(detections, labels), NAMES)
    cat, dog, owl = metrics.per_class
    assert dog.labels == dog.map50 == dog.precision == 0
    assert metrics.map50 == pytest.approx((cat.map50 + owl.map50) / 2)
    assert metrics.curves.f1.shape == metrics.curves.recall.shape == (2, 1000)
    assert metrics.curves.precision_at_recall.mean(1) == pytest.approx([cat.map50, owl.map50])


def test_ignored_labels_are_neither_counted_nor_missed(random_scene):
    _, labels = scenes_of(random_scene, 2)
    detections = exact(labels)
    excused = [
        Labels(boxes=one.boxes, classes=one.classes, ignore=np.arange(len(one.classes)) % 2 == 1) for one in labels
    ]
    metrics = compute_metrics(evidence_of(detections, excused), NAMES)
    assert metrics.precision == metrics.recall == 1
    assert metrics.labels == sum((len(one.classes) + 1) // 2 for one in labels)


def test_table_is_aligned_with_all_first(random_scene):
    metrics = compute_metrics(evidence_of(*scenes_of(random_scene, 4)), NAMES)
    lines = table(metrics, verbose=True).splitlines()
    assert lines[0].split() == ["Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95"]
    assert [line.split()[0] for line in lines[1:]] == ["all", *NAMES]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == f"{metrics.map50_95:.3f}"
    assert table(metrics, verbose=False).splitlines() == lines[:2]


def test_thresholds_are_those_of_coco():
    assert IOU_THRESHOLDS.tolist() == np.linspace(0.5, 0.95, int(np.round((0.95 - 0.5) / 0.05)) + 1).tolist()
