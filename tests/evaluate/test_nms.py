import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import pairwise_iou
from utils.evaluate import nms
from utils.evaluate.nms import non_max_suppression


def random_predictions(seed: int, images: int, anchors: int, num_classes: int, *, size=100.0, steps=None):
    generator = np.random.default_rng(seed)
    centre, sides = (
        generator.uniform(0, size, (images, anchors, 2)),
        generator.uniform(1, size / 2, (images, anchors, 2)),
    )
    scores = generator.uniform(0, 1, (images, anchors, 1 + num_classes))
    if steps:  # few distinct values: many ties
        scores = np.ceil(scores * steps) / steps
    return torch.from_numpy(np.concatenate([centre - sides / 2, centre + sides / 2, scores], 2)).float()


def slow(image: torch.Tensor, confidence: float, iou: float, max_detections: int, multi_label: bool):
    """One candidate at a time, in float64."""
    rows = []
    for anchor, row in enumerate(image):
        scores = row[4] * row[5:]
        for index, score in enumerate(scores.tolist()):
            if score > confidence and (multi_label or index == int(scores.argmax())):
                rows.append((-score, anchor, index, row[:4].double().numpy()))
    rows.sort(key=lambda row: row[:3])
    kept = []
    for row in rows:
        rivals = [other[3] for other in kept if other[2] == row[2]]
        if not rivals or pairwise_iou(row[3][None], np.stack(rivals)).max() <= iou:
            kept.append(row)
    return [(anchor, index, -negative) for negative, anchor, index, _ in kept[:max_detections]]


def assert_equal_to_slow(predictions, **options):
    found = non_max_suppression(predictions, **options)
    assert len(found) == len(predictions)
    for image, one in zip(predictions, found):
        expected = slow(image, *(options[key] for key in ("confidence", "iou", "max_detections", "multi_label")))
        assert one.classes.tolist() == [index for _, index, _ in expected]
        assert one.scores.tolist() == [score for _, _, score in expected]
        assert torch.equal(one.boxes, image[[anchor for anchor, _, _ in expected], :4])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 9999),
    anchors=st.integers(0, 60),
    num_classes=st.integers(1, 4),
    steps=st.sampled_from([None, 2, 4]),
    confidence=st.sampled_from([0.001, 0.3]),
    iou=st.sampled_from([0.3, 0.6]),
    max_detections=st.sampled_from([1, 7, 300]),
    multi_label=st.booleans(),
    chunk=st.sampled_from([3, 16, 1024]),
)
def test_equals_the_slow_twin_whatever_the_chunk(seed, anchors, num_classes, steps, chunk, **options):
    predictions = random_predictions(seed, 2, anchors, num_classes, steps=steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "_CHUNK", chunk)
        assert_equal_to_slow(predictions, **options)


def test_candidate_bound_keeps_the_first_of_equal_scores(monkeypatch):
    monkeypatch.setattr(nms, "MAX_CANDIDATES", 5)
    predictions = torch.zeros(1, 9, 6)
    predictions[0, :, 0] = torch.arange(9) * 10
    predictions[0, :, 2] = predictions[0, :, 0] + 5
    predictions[0, :, 3], predictions[0, :, 4:] = 5, 0.5
    predictions[0, 8, 4] = 1.0  # the best comes last
    (found,) = non_max_suppression(predictions)
    assert found.boxes[:, 0].tolist() == [80, 0, 10, 20, 30]


def test_many_classes_on_a_large_image_lose_no_pixel():
    """IoU just above and just below the limit, 80 classes, coordinates far from 0."""
    x = 7000.0
    predictions = torch.zeros(1, 3, 85)
    predictions[0, :, :4] = torch.tensor([[x, x, x + 10, x + 10], [x, x, x + 10, x + 6.001], [x, x, x + 10, x + 5.999]])
    predictions[0, :, 4] = torch.tensor([1.0, 0.9, 0.8])
    predictions[0, :, 84] = 1.0
    (found,) = non_max_suppression(predictions)
    assert torch.allclose(found.scores, torch.tensor([1.0, 0.8]))
    predictions[0, 2, 84], predictions[0, 2, 83] = 0, 1  # its own class: nothing to compete with
    predictions[0, 2, :4] = predictions[0, 0, :4]
    assert non_max_suppression(predictions)[0].classes.tolist() == [84 - 5, 83 - 5]


def test_nothing_found_is_an_empty_result_per_image():
    for predictions in (torch.zeros(3, 10, 7), torch.zeros(3, 0, 7)):
        found = non_max_suppression(predictions)
        assert [tuple(one.boxes.shape) for one in found] == [(0, 4)] * 3
        assert all(one.classes.dtype == torch.int64 and one.scores.dtype == torch.float32 for one in found)
    assert non_max_suppression(torch.zeros(0, 10, 7)) == []


def test_non_finite_predictions_do_not_hide_the_others():
    predictions = random_predictions(0, 1, 4, 2)
    predictions[0, 0, 0], predictions[0, 1, 4], predictions[0, 2, 3] = float("nan"), float("nan"), float("inf")
    (found,) = non_max_suppression(predictions)
    assert len(found.scores) == 2 and torch.equal(found.boxes[0], predictions[0, 3, :4])


def test_half_precision_input_gives_float32():
    (found,) = non_max_suppression(random_predictions(1, 1, 20, 2).half())
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and len(found.scores)


def test_an_untrained_network_takes_no_longer():
    predictions = random_predictions(2, 1, 25200, 80, size=640)
    start = time.perf_counter()
    (found,) = non_max_suppression(predictions)
    assert len(found.scores) == 300
    assert time.perf_counter() - start < 3  # 0.1 s on two free cores
