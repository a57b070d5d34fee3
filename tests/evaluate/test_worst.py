import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.evaluate.matching import Labels
from utils.evaluate.metrics import collect
from utils.evaluate.worst import worst_images
from utils.structures import CROWD, DIFFICULT, FALSE_ALARM, HIT, MISSED, Detections

BOXES = np.array([[0, 0, 20, 20], [30, 30, 60, 60], [50, 0, 90, 40]], float)


def store_of(ignores: list[list[int]]):
    """Images of 100 x 100 px that hold the first BOXES, one for each number, all of class 0."""
    labels = [
        ImageLabels(boxes=BOXES[: len(one)] / 100, classes=np.zeros(len(one), int), ignore=np.array(one, np.uint8))
        for one in ignores
    ]
    return build_store([f"{index}.png" for index in range(len(ignores))], [(100, 100)] * len(ignores), labels)


def found(*claims: tuple[int, float, int]) -> Detections:
    """Claims of (box, score, class)."""
    return Detections(
        boxes=torch.tensor(BOXES[[box for box, _, _ in claims]].reshape(-1, 4), dtype=torch.float32),
        scores=torch.tensor([score for _, score, _ in claims], dtype=torch.float32),
        classes=torch.tensor([kind for _, _, kind in claims], dtype=torch.int64),
    )


def evidence_of(store, detections):
    images = range(len(store))
    return collect(images, detections, [Labels.of(store, image) for image in images], 2)


def test_most_mistakes_first_and_none_without():
    store = store_of([[0], [0, 0], [0, 0], [0]])
    detections = [found((0, 0.9, 0)), found((0, 0.9, 0), (1, 0.8, 1)), found((0, 0.9, 0)), found((0, 0.3, 0))]
    judged = worst_images(evidence_of(store, detections), store, 0.5)
    assert [one.image for one in judged] == [1, 2, 3]  # two mistakes, then one each by index; none in the first
    first = judged[0]
    assert first.verdicts.tolist() == [HIT, FALSE_ALARM, MISSED]
    assert np.array_equal(first.boxes, BOXES[[0, 1, 1]].astype(np.float32))
    assert first.classes.tolist() == [0, 1, 0]
    assert first.scores[:2] == pytest.approx([0.9, 0.8]) and np.isnan(first.scores[2])
    assert judged[2].verdicts.tolist() == [MISSED]  # found with too little confidence
    assert [one.image for one in worst_images(evidence_of(store, detections), store, 0.5, most=1)] == [1]


def test_what_is_ignored_is_neither_missed_nor_a_false_alarm():
    store = store_of([[CROWD, DIFFICULT], [CROWD, 0, DIFFICULT]])
    detections = [found((0, 0.9, 0), (0, 0.8, 0), (1, 0.7, 0)), found((0, 0.9, 0))]
    [judged] = worst_images(evidence_of(store, detections), store, 0.5)
    assert (judged.image, judged.verdicts.tolist()) == (1, [MISSED])
    assert judged.classes.tolist() == [0]


def test_without_detections_or_images():
    store = store_of([[0, 0], []])
    [judged] = worst_images(evidence_of(store, [found(), found()]), store, 0.5)
    assert (judged.image, judged.verdicts.tolist()) == (0, [MISSED, MISSED])
    empty = store_of([[], []])
    assert worst_images(evidence_of(empty, [found(), found()]), empty, 0.5) == ()
    [judged] = worst_images(evidence_of(empty, [found(), found((2, 0.9, 1))]), empty, 0.5)
    assert (judged.image, judged.verdicts.tolist()) == (1, [FALSE_ALARM])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 9999), confidence=st.floats(0, 1))
def test_the_verdicts_add_up_to_those_of_the_evaluation(random_scene, seed, confidence):
    generator = np.random.default_rng(seed)
    scenes = [random_scene(generator, 2, coarse=seed % 2 == 0, excused=0.3) for _ in range(4)]
    boxes = [np.concatenate([one.xywh[:, :2], one.xywh[:, :2] + one.xywh[:, 2:]], 1) for _, one in scenes]
    store = build_store(
        ["x.png"] * 4,
        [(100, 100)] * 4,
        [
            ImageLabels(boxes=box / 100, classes=one.classes, ignore=one.ignore * DIFFICULT + one.crowd * 1)
            for box, (_, one) in zip(boxes, scenes)
        ],
    )
    evidence = evidence_of(store, [one for one, _ in scenes])
    judged = {one.image: one for one in worst_images(evidence, store, confidence)}
    for image in range(4):
        mine = (evidence.image == image) & (evidence.scores.astype(float) >= confidence)
        hits = mine & (evidence.hits & 1 == 1)
        false = mine & ((evidence.hits | evidence.ignored) & 1 == 0)
        missed = (store.ignore[store.rows(image)] == 0).sum() - hits.sum()
        if image in judged:
            assert np.bincount(judged[image].verdicts, minlength=3).tolist() == [hits.sum(), false.sum(), missed]
        else:
            assert false.sum() + missed == 0
