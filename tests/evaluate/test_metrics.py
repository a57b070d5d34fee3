from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.coco_tool import coco_content, coco_results, tool_figures
from tests.slow_coco import slow_figures
from utils.evaluate.matching import IOU_THRESHOLDS, Labels
from utils.evaluate.metrics import CONFIDENCES, Evidence, collect, compute_metrics, merge
from utils.report.console import labelled, table
from utils.structures import CocoFigures, Detections

NAMES = ("cat", "dog", "owl")
NO_LABELS = Labels(
    xywh=np.zeros((0, 4)),
    classes=np.zeros(0, np.int32),
    area=np.zeros(0),
    ignore=np.zeros(0, bool),
    crowd=np.zeros(0, bool),
)


def scenes_of(random_scene, seed: int, **options):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, len(NAMES), **options) for _ in range(8)]
    return [found for found, _ in scenes], [truth for _, truth in scenes]


def evidence_of(detections, labels) -> Evidence:
    return collect(range(len(labels)), detections, labels, len(NAMES))


# ---- against COCO's tool ------------------------------------------------------------------------------------------


def plain(figures: CocoFigures) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in astuple(figures)])


def assert_tool_agrees(detections, labels, image_ids, num_classes) -> None:
    """All twelve, and the average precision of each class. The tool knows crowds, and no difficult labels."""
    labels = [replace(one, ignore=one.crowd) for one in labels]
    evidence = collect(range(len(labels)), detections, labels, num_classes)
    metrics = compute_metrics(evidence, ["?"] * num_classes, image_ids=np.array(image_ids))
    theirs = tool_figures(coco_content(labels, image_ids, num_classes), coco_results(detections, image_ids))
    assert plain(metrics.coco) == pytest.approx(theirs.twelve, abs=1e-9, nan_ok=True)
    mine = np.stack([plain(one.coco)[:6] for one in metrics.per_class])
    expected = [theirs.ap[:, :, 0].mean(1), theirs.ap[:, 0, 0], theirs.ap[:, 5, 0], *theirs.ap[:, :, 1:].mean(1).T]
    assert mine == pytest.approx(np.stack(expected, 1), abs=1e-9, nan_ok=True)
    assert metrics.map50_95 == (metrics.coco.ap or 0)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 99999),
    images=st.integers(1, 6),
    num_classes=st.integers(1, 5),
    most=st.sampled_from([2, 12, 50]),
    coarse=st.booleans(),
    excused=st.sampled_from([0.0, 0.2]),
    span=st.sampled_from([40, 200]),
)
def test_all_figures_are_those_of_the_tool(random_scene, seed, images, num_classes, most, coarse, excused, span):
    generator = np.random.default_rng(seed)
    options = {"most": most, "coarse": coarse, "excused": excused, "span": span}
    scenes = [random_scene(generator, num_classes, **options) for _ in range(images)]
    image_ids = (generator.permutation(50)[:images] + 1).tolist()
    assert_tool_agrees([one for one, _ in scenes], [one for _, one in scenes], image_ids, num_classes)


sides = st.sampled_from([0, 1, 2, 31, 32, 33, 64, 95, 96, 97])  # limits of areas, and ties of IoU wherever one looks
boxes = st.tuples(sides, sides, sides.filter(bool), sides.filter(bool), st.integers(0, 2))
labels_of_image = st.lists(st.tuples(boxes, st.booleans(), st.sampled_from([0.5, 1, 2])), max_size=6)
detections_of_image = st.lists(st.tuples(boxes, st.sampled_from([0, 0.25, 0.5, 1])), max_size=12)


@settings(deadline=None, max_examples=150)
@given(images=st.lists(st.tuples(detections_of_image, labels_of_image), min_size=1, max_size=4))
def test_all_figures_are_those_of_the_tool_with_ties_everywhere(images):
    detections, labels = [], []
    for claims, truths in images:
        claimed = np.array([box[:4] for box, _ in claims], np.float32).reshape(-1, 4)
        true = np.array([box[:4] for box, _, _ in truths], np.float64).reshape(-1, 4)
        crowd = np.array([crowd for _, crowd, _ in truths], bool)
        detections.append(
            Detections(
                boxes=torch.from_numpy(np.concatenate([claimed[:, :2], claimed[:, :2] + claimed[:, 2:]], 1)),
                scores=torch.tensor([score for _, score in claims], dtype=torch.float32),
                classes=torch.tensor([box[4] for box, _ in claims], dtype=torch.int64),
            )
        )
        labels.append(
            Labels(
                xywh=true,
                classes=np.array([box[4] for box, _, _ in truths], np.int64),
                area=true[:, 2] * true[:, 3] * [share for _, _, share in truths],
                ignore=crowd,
                crowd=crowd,
            )
        )
    assert_tool_agrees(detections, labels, list(range(len(images), 0, -1)), 3)


def many(generator: np.random.Generator, count: int, num_classes: int, *, labels: int) -> tuple[Detections, Labels]:
    """`count` detections of one image around so many labels."""
    corner, sides = generator.uniform(0, 300, (labels, 2)), generator.uniform(10, 120, (labels, 2))
    classes, source = generator.integers(0, num_classes, labels), generator.integers(0, labels, count)
    noise = generator.normal(0, 4, (count, 4))
    low = corner[source] + noise[:, :2]
    boxes = np.concatenate([low, low + np.maximum(sides[source] + noise[:, 2:], 1)], 1)
    found = Detections(
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        scores=torch.from_numpy(generator.random(count).round(2).astype(np.float32)),
        classes=torch.from_numpy(classes[source]),
    )
    crowd = generator.random(labels) < 0.1
    truth = Labels(
        xywh=np.concatenate([corner, sides], 1), classes=classes, area=sides.prod(1), ignore=crowd, crowd=crowd
    )
    return found, truth


@pytest.mark.parametrize(
    ("count", "num_classes", "labels", "images"),
    [(400, 1, 12, 2), (150, 1, 1, 1), (3000, 2, 60, 1), (3000, 1200, 400, 2), (90, 1200, 5, 3)],
)
def test_all_figures_are_those_of_the_tool_for_many(count, num_classes, labels, images):
    generator = np.random.default_rng(count)
    scenes = [many(generator, count, num_classes, labels=labels) for _ in range(images)]
    assert_tool_agrees([one for one, _ in scenes], [one for _, one in scenes], range(1, images + 1), num_classes)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 9999), coarse=st.booleans(), span=st.sampled_from([40, 200]))
def test_all_figures_are_those_of_the_slow_twin_with_difficult_labels(random_scene, seed, coarse, span):
    detections, labels = scenes_of(random_scene, seed, coarse=coarse, span=span, excused=0.3, most=6)
    metrics = compute_metrics(evidence_of(detections, labels), NAMES)
    expected = plain(slow_figures(detections, labels, len(NAMES)))
    assert plain(metrics.coco) == pytest.approx(expected, abs=1e-9, nan_ok=True)


# ---- curves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_curves_equal_a_count_at_each_confidence(random_scene, seed):
    detections, labels = scenes_of(random_scene, seed, coarse=True, excused=0.2)
    evidence = evidence_of(detections, labels)
    metrics = compute_metrics(evidence, NAMES)
    totals = evidence.labels[:, 0]
    with_labels = [index for index in range(len(NAMES)) if totals[index]]
    for row, index in enumerate(with_labels):
        mine = (evidence.classes == index) & (evidence.ignored & 1 == 0)
        for at in range(0, 1000, 37):
            claimed = evidence.hits[mine & (evidence.scores.astype(float) >= CONFIDENCES[at])] & 1
            precision = claimed.mean() if len(claimed) else np.nan
            recall = claimed.sum() / totals[index]
            assert metrics.curves.precision[row, at] == pytest.approx(precision, nan_ok=True)
            assert metrics.curves.recall[row, at] == pytest.approx(recall)
            expected_f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0
            assert metrics.curves.f1[row, at] == pytest.approx(expected_f1)
    best = highest_of_best(metrics.curves.f1.mean(0))
    assert metrics.best_confidence == CONFIDENCES[best]
    assert metrics.f1 == pytest.approx(metrics.curves.f1[:, best].mean())
    assert metrics.precision == pytest.approx(metrics.curves.precision[:, best].mean())
    assert metrics.recall == pytest.approx(np.mean([metrics.per_class[index].recall for index in with_labels]))
    for row, index in enumerate(with_labels):
        assert metrics.per_class[index].best_f1 == metrics.curves.f1[row].max()
        assert metrics.per_class[index].best_confidence == CONFIDENCES[highest_of_best(metrics.curves.f1[row])]
        assert metrics.per_class[index].f1 == metrics.curves.f1[row, best]


def highest_of_best(f1) -> int:
    return max(at for at in range(1000) if f1[at] == max(f1))


def test_a_class_without_a_claim_has_no_precision_in_its_curve_and_none_in_the_table():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 50, 50]])
    truth = Labels(
        xywh=np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]]),
        classes=np.array([0, 1]),
        area=np.array([100, 900.0]),
        ignore=np.zeros(2, bool),
        crowd=np.zeros(2, bool),
    )
    found = Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32), scores=torch.tensor([0.9, 0.2]), classes=torch.tensor([0, 0])
    )
    metrics = compute_metrics(evidence_of([found], [truth]), NAMES)
    cat, dog, owl = metrics.per_class
    assert np.isnan(metrics.curves.precision[1]).all() and not metrics.curves.f1[1].any()
    assert np.isnan(metrics.curves.precision[0, 950]) and metrics.curves.precision[0, 500] == 1
    assert metrics.best_confidence == cat.best_confidence == CONFIDENCES[CONFIDENCES < 0.9][-1]
    assert dog.best_confidence == 0  # F1 is 0 everywhere
    assert (cat.precision, cat.best_f1, dog.precision, dog.f1, dog.best_f1) == (1, 1, 0, 0, 0)
    assert metrics.precision == 0.5
    assert dog.coco.ap == 0 and owl.coco.ap is None and owl.map50_95 == 0


def test_figures_of_coco_stop_at_100_detections_and_curves_do_not():
    rows = np.arange(110)
    truth = Labels(
        xywh=np.stack([20.0 * rows, 0 * rows, 10 + 0 * rows, 10 + 0 * rows], 1),
        classes=0 * rows,
        area=np.full(110, 100.0),
        ignore=np.zeros(110, bool),
        crowd=np.zeros(110, bool),
    )
    metrics = compute_metrics(evidence_of(exact([truth]), [truth]), NAMES)
    assert (metrics.recall, metrics.coco.ar100, metrics.coco.ar10, metrics.coco.ar1) == pytest.approx(
        (1, 100 / 110, 10 / 110, 1 / 110)
    )


# ---- how it adds up -----------------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_how_images_are_dealt(random_scene):
    detections, labels = scenes_of(random_scene, 3, coarse=True)  # many equal scores
    whole = compute_metrics(evidence_of(detections, labels), NAMES)
    parts = [collect(range(rank, 8, 3), detections[rank::3], labels[rank::3], len(NAMES)) for rank in (2, 0, 1)]
    dealt = compute_metrics(merge(parts), NAMES)
    assert (dealt.per_class, dealt.coco) == (whole.per_class, whole.coco)
    assert np.array_equal(dealt.confusion, whole.confusion)
    assert np.array_equal(dealt.curves.f1, whole.curves.f1)
    assert (dealt.images, dealt.labels) == (8, sum(len(one.classes) for one in labels))


def exact(labels: list[Labels]) -> list[Detections]:
    """A perfect detector."""
    return [
        Detections(
            boxes=torch.from_numpy(
                np.concatenate([one.xywh[:, :2], one.xywh[:, :2] + one.xywh[:, 2:]], 1).astype(np.float32)
            ),
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
    metrics = compute_metrics(evidence_of(detections, [NO_LABELS] * 8), NAMES)
    assert set(astuple(metrics.coco)) == {None}
    assert (metrics.precision, metrics.recall, metrics.map50, metrics.map50_95, metrics.fitness) == (0, 0, 0, 0, 0)
    assert metrics.best_confidence == 0 and metrics.curves.f1.shape == (0, 1000)
    assert "nan" not in table(metrics, labelled(metrics))


def test_without_any_detection_everything_is_zero(random_scene):
    _, labels = scenes_of(random_scene, 0)
    nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), classes=torch.zeros(0, dtype=torch.int64))
    metrics = compute_metrics(evidence_of([nothing] * 8, labels), NAMES)
    assert (metrics.precision, metrics.recall, metrics.map50_95) == (0, 0, 0)
    assert metrics.labels == sum(len(one.classes) for one in labels)


def test_means_leave_out_classes_without_labels(random_scene):
    detections, labels = scenes_of(random_scene, 1)
    keep = [one.classes != 1 for one in labels]
    labels = [Labels(**{name: values[rows] for name, values in vars(one).items()}) for one, rows in zip(labels, keep)]
    metrics = compute_metrics(evidence_of(detections, labels), NAMES)
    cat, dog, owl = metrics.per_class
    assert dog.labels == dog.map50 == dog.precision == 0
    assert metrics.map50 == pytest.approx((cat.map50 + owl.map50) / 2)
    assert metrics.curves.f1.shape == metrics.curves.recall.shape == (2, 1000)
    assert metrics.curves.precision_at_recall.mean(1) == pytest.approx([cat.map50, owl.map50])


def test_ignored_labels_are_neither_counted_nor_missed(random_scene):
    _, labels = scenes_of(random_scene, 2)
    detections = exact(labels)
    excused = [replace(one, ignore=np.arange(len(one.classes)) % 2 == 1) for one in labels]
    metrics = compute_metrics(evidence_of(detections, excused), NAMES)
    assert metrics.precision == metrics.recall == 1
    assert metrics.labels == sum((len(one.classes) + 1) // 2 for one in labels)


def test_table_is_aligned_with_all_first(random_scene):
    metrics = compute_metrics(evidence_of(*scenes_of(random_scene, 4)), NAMES)
    lines = table(metrics, labelled(metrics)).splitlines()
    assert lines[0].split() == ["Class", "Images", "Labels", "P", "R", "F1", "mAP@.5", "mAP@.5:.95"]
    assert [line.split()[0] for line in lines[1:]] == ["all", *NAMES]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == f"{metrics.map50_95:.3f}"
    assert table(metrics).splitlines() == lines[:2]


def test_thresholds_are_those_of_coco():
    assert IOU_THRESHOLDS.tolist() == np.linspace(0.5, 0.95, int(np.round((0.95 - 0.5) / 0.05)) + 1).tolist()
