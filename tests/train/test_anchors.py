import numpy as np
import pytest

from utils.data.store import plain_store
from utils.structures import LabelStore
from utils.train import anchors as anchors_module
from utils.train.anchors import best_possible_recall, choose_anchors, label_sizes

ANCHORS = np.array([[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]]], np.float32)
CENTRES = np.array([(300, 8), (8, 300), (120, 15), (15, 120), (350, 100), (100, 350)], np.float64)


def store_of(sizes, *, shape: tuple[int, int] = (640, 640)) -> LabelStore:
    """Images of one shape with one box of each size, in the corner."""
    sizes = np.array(sizes, np.float32).reshape(-1, 2)
    count = len(sizes)
    boxes = np.concatenate([np.zeros_like(sizes), sizes], 1)
    return plain_store(np.tile(shape, (count, 1)), boxes=boxes, offsets=np.arange(count + 1))


def clusters(per_centre: int = 40) -> np.ndarray:
    return np.repeat(CENTRES, per_centre, 0) * np.random.default_rng(0).uniform(0.95, 1.05, (6 * per_centre, 2))


def chosen(sizes, *, anchor_t: float = 4.0, seed: int = 0, anchors: np.ndarray = ANCHORS, force: bool = False):
    return choose_anchors(anchors, store_of(sizes), imgsz=640, anchor_t=anchor_t, seed=seed, force=force)


@pytest.mark.parametrize("anchor_t", [1.5, 2.9, 4.0])
def test_recall_equals_the_slow_twin(anchor_t):
    generator = np.random.default_rng(0)
    sizes, anchors = generator.uniform(2, 300, (200, 2)), generator.uniform(5, 200, (7, 2))
    reached = 0
    for w, h in sizes:
        reached += any(max(w / wa, wa / w, h / ha, ha / h) < anchor_t for wa, ha in anchors)
    assert best_possible_recall(sizes, anchors, anchor_t) == reached / 200
    assert 0 < reached < 200


def test_recall_at_the_limit_and_without_labels():
    anchor = np.array([[10.0, 10.0]])
    sizes = np.array([[40.0, 10.0], [39.9, 10.0], [2.5, 10.0], [2.6, 10.0]])
    assert best_possible_recall(sizes, anchor, 4.0) == 0.5
    assert best_possible_recall(np.empty((0, 2)), anchor, 4.0) == 1.0


def test_sizes_are_those_of_base_images():
    store = store_of([(100, 50), (3, 100), (100, 4)], shape=(640, 1280))
    assert label_sizes(store, 640).tolist() == [[50, 25], [50, 2]]  # 1.5 px are too few to train on
    assert label_sizes(store, 1280).tolist() == [[100, 50], [3, 100], [100, 4]]


def test_images_with_several_boxes_or_none():
    store = plain_store(
        np.array([[100, 200], [50, 50], [100, 100]]),
        boxes=np.array([[0, 0, 10, 20], [5, 5, 45, 25], [0, 0, 30, 30]]),
        offsets=np.array([0, 2, 2, 3]),
    )
    assert label_sizes(store, 400).tolist() == [[20, 40], [80, 40], [120, 120]]


def test_anchors_that_reach_98_percent_are_kept():
    sizes = np.concatenate([np.repeat(ANCHORS.reshape(-1, 2), 50, 0) * 1.1, [(400, 3)] * 6])
    choice = chosen(sizes)
    assert not choice.changed
    assert choice.anchors is ANCHORS
    assert choice.recall_before == choice.recall_after == 300 / 306


def test_clustered_sizes_are_found():
    choice = chosen(clusters(), anchor_t=1.5)
    assert choice.changed
    assert choice.recall_before == 0.0
    assert choice.recall_after == 1.0
    found = choice.anchors.reshape(-1, 2)
    assert choice.anchors.shape == ANCHORS.shape
    assert choice.anchors.dtype == np.float32
    assert choice.recall_after == best_possible_recall(clusters(), found, 1.5)
    for centre in CENTRES:
        assert (np.abs(found / centre - 1).max(1) < 0.15).sum() == 1


def test_found_anchors_grow_from_level_to_level():
    areas = chosen(clusters(), anchor_t=1.5).anchors.prod(2).ravel()
    assert (np.diff(areas) >= 0).all()


def test_the_same_seed_finds_the_same_anchors():
    first, again, other = (chosen(clusters(), anchor_t=1.5, seed=seed).anchors for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_found_anchors_that_are_no_better_are_not_taken():
    old = np.array([(10, 10), (20, 20), (40, 40), (80, 80), (160, 160), (320, 320)], np.float32).reshape(2, 3, 2)
    sizes = [*old.reshape(-1, 2).tolist() * 16, (10, 320), (320, 10), (20, 320), (320, 20)]
    choice = chosen(sizes, anchor_t=1.2, anchors=old)  # six anchors reach six of ten sizes at most
    assert choice.recall_before == choice.recall_after == 0.96
    assert choice.anchors is old
    assert not choice.changed


def test_force_takes_what_is_found_even_when_the_old_ones_are_good():
    choice = chosen(np.repeat(ANCHORS.reshape(-1, 2), 20, 0), force=True)
    assert choice.changed
    assert choice.recall_after == 1.0
    assert choice.anchors.shape == ANCHORS.shape


@pytest.mark.parametrize("force", [False, True])
def test_fewer_distinct_sizes_than_anchors(force):
    choice = chosen([(300, 8)] * 5 + [(8, 300)] * 5, force=force)
    assert choice.changed
    assert (choice.recall_before, choice.recall_after) == (0.0, 1.0)
    assert np.isfinite(choice.anchors).all()
    assert (choice.anchors > 0).all()


@pytest.mark.parametrize("force", [False, True])
def test_without_labels_the_anchors_are_kept(force):
    choice = chosen([], force=force)
    assert choice.anchors is ANCHORS
    assert not choice.changed


def test_a_large_set_is_searched_by_a_sample_and_counted_whole(monkeypatch):
    sizes = np.random.default_rng(0).uniform(5, 300, (1000, 2))
    candidates = np.array([[20.0, 30], [100, 90]])
    whole = best_possible_recall(sizes, candidates, 2.0)
    monkeypatch.setattr(anchors_module, "_SAMPLE", 64)
    assert best_possible_recall(sizes, candidates, 2.0) == whole
