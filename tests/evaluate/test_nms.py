from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import pairwise_iou
from utils.evaluate import nms
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.structures import Detections

RULES = NmsRules()


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


def slow(image: torch.Tensor, rules: NmsRules, most: int):
    """One candidate at a time, in float64: anchor, class and score of what is kept; and whether the bound mattered."""
    rows = []
    for anchor, row in enumerate(image):
        for index, score in enumerate((row[4] * row[5:]).tolist()):
            if score > rules.confidence and (not rules.classes or index in rules.classes):
                rows.append((-score, anchor, index, row[:4].double().numpy()))
    rows.sort(key=lambda row: row[:3])
    kept = []
    for row in rows[:most]:
        rivals = [other[3] for other in kept if rules.agnostic or other[2] == row[2]]
        if not rivals or pairwise_iou(row[3][None], np.stack(rivals)).max() <= rules.iou:
            kept.append(row)
    found = [(anchor, index, -negative) for negative, anchor, index, _ in kept[: rules.max_detections]]
    return found, len(rows) > most and len(kept) < rules.max_detections


def assert_equal_to_slow(predictions: torch.Tensor, rules: NmsRules, most: int = nms.MAX_CANDIDATES):
    result = non_max_suppression(predictions, rules)
    assert len(result.detections) == len(predictions)
    assert not result.non_finite.any()
    for image, one, cut in zip(predictions, result.detections, result.cut):
        expected, expected_cut = slow(image, rules, most)
        assert one.classes.tolist() == [index for _, index, _ in expected]
        assert one.scores.tolist() == [score for _, _, score in expected]
        assert torch.equal(one.boxes, image[[anchor for anchor, _, _ in expected], :4])
        assert cut == expected_cut


def assert_same(one: Detections, other: Detections):
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(one.scores, other.scores) and torch.equal(one.classes, other.classes)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 9999),
    images=st.integers(0, 4),
    anchors=st.integers(0, 50),
    num_classes=st.integers(1, 4),
    steps=st.sampled_from([None, 2, 4]),
    confidence=st.sampled_from([0.0, 0.001, 0.3]),
    iou=st.sampled_from([0.3, 0.6]),
    max_detections=st.sampled_from([1, 7, 300]),
    agnostic=st.booleans(),
    classes=st.sampled_from([(), (0,), (0, 0)]),
    chunk=st.sampled_from([3, 16, 1024]),
    native=st.booleans(),
    first=st.sampled_from([1, 5, 20, 2048]),
    together=st.sampled_from([0, 10, 1000]),
    most=st.sampled_from([10, 30, 30_000]),
)
def test_equals_the_slow_twin_however_the_work_is_cut(
    seed, images, anchors, num_classes, steps, chunk, first, together, most, native, **rules
):
    predictions = random_predictions(seed, images, anchors, num_classes, steps=steps)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(nms, "_native", lambda: None)
        patch.setattr(nms, "_CHUNK", chunk)
        patch.setattr(nms, "_FIRST", min(first, most))
        patch.setattr(nms, "_FIRST_VALUES", 0)
        patch.setattr(nms, "_TOGETHER", {"cpu": together})
        patch.setattr(nms, "MAX_CANDIDATES", most)
        assert_equal_to_slow(predictions, NmsRules(**rules), most)


def test_classes_are_chosen_before_anything_is_suppressed_or_counted():
    predictions = random_predictions(5, 2, 60, 5, size=40)
    chosen = non_max_suppression(predictions, replace(RULES, classes=(3, 1), agnostic=True, max_detections=10))
    others_silent = predictions.clone()
    others_silent[..., [5, 7, 9]] = 0
    expected = non_max_suppression(others_silent, replace(RULES, agnostic=True, max_detections=10))
    for one, other in zip(chosen.detections, expected.detections):
        assert_same(one, other)
        assert len(one.scores) == 10 and set(one.classes.tolist()) == {1, 3}


def test_the_rest_of_the_batch_changes_nothing():
    """Few candidates, which images share a call for, beside many; boxes far from 0 and beyond the image."""
    predictions = random_predictions(7, 6, 300, 3)
    predictions[1:4, 10:] = 0
    predictions[2, :, :4] += 7000.3
    together = non_max_suppression(predictions, RULES)
    for image, one in zip(predictions, together.detections):
        assert_same(one, non_max_suppression(image[None], RULES).detections[0])


@pytest.mark.skipif(nms._native() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("wrong", ["boxes", "classes", "counts"])
def test_nothing_but_what_it_expects_goes_to_the_library(wrong):
    """It takes plain addresses, and would read on behind a table that is too short."""
    boxes, classes, counts = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), [3]
    boxes = boxes.float() if wrong == "boxes" else boxes
    classes = classes.int() if wrong == "classes" else classes
    counts = [4] if wrong == "counts" else counts
    with pytest.raises(AssertionError):
        list(nms._kept_by_library(nms._native(), boxes, classes, counts, NmsRules()))


@pytest.mark.skipif(nms._native() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("agnostic", [False, True])
def test_with_and_without_the_library_it_is_the_same(monkeypatch, agnostic):
    predictions = random_predictions(8, 3, 900, 3, size=200)
    predictions[..., :4] = predictions[..., :4].round() / 8  # many equal overlaps, and boxes of no size
    rules = replace(RULES, agnostic=agnostic, max_detections=3000)
    fast = non_max_suppression(predictions, rules).detections
    monkeypatch.setattr(nms, "_native", lambda: None)
    for one, other in zip(fast, non_max_suppression(predictions, rules).detections):
        assert_same(one, other)
        assert len(one.scores) > 20


def test_candidate_bound_keeps_the_first_of_equal_scores_and_tells(monkeypatch):
    monkeypatch.setattr(nms, "MAX_CANDIDATES", 5)
    monkeypatch.setattr(nms, "_FIRST", 3)
    monkeypatch.setattr(nms, "_FIRST_VALUES", 0)
    predictions = torch.zeros(2, 9, 6)
    predictions[:, :, 0] = torch.arange(9) * 10
    predictions[:, :, 2] = predictions[:, :, 0] + 5
    predictions[:, :, 3] = 5
    predictions[0, :, 4:] = 0.5
    predictions[0, 8, 4] = 1.0  # the best comes last
    predictions[1, :5, 4:] = 0.5
    result = non_max_suppression(predictions, RULES)
    assert result.detections[0].boxes[:, 0].tolist() == [80, 0, 10, 20, 30]
    assert result.cut.tolist() == [True, False]
    assert not non_max_suppression(predictions, replace(RULES, max_detections=5)).cut.any()  # nothing is lost by it


def test_many_classes_on_a_large_image_lose_no_pixel():
    """IoU just above and just below the limit, 80 classes, coordinates far from 0."""
    x = 7000.0
    predictions = torch.zeros(1, 3, 85)
    predictions[0, :, :4] = torch.tensor([[x, x, x + 10, x + 10], [x, x, x + 10, x + 6.001], [x, x, x + 10, x + 5.999]])
    predictions[0, :, 4] = torch.tensor([1.0, 0.9, 0.8])
    predictions[0, :, 84] = 1.0
    (found,) = non_max_suppression(predictions, RULES).detections
    assert torch.allclose(found.scores, torch.tensor([1.0, 0.8]))
    predictions[0, 2, 84], predictions[0, 2, 83] = 0, 1  # its own class: nothing to compete with
    predictions[0, 2, :4] = predictions[0, 0, :4]
    assert non_max_suppression(predictions, RULES).detections[0].classes.tolist() == [84 - 5, 83 - 5]


def test_nothing_found_is_an_empty_result_per_image():
    for predictions in (torch.zeros(3, 10, 7), torch.zeros(3, 0, 7)):
        result = non_max_suppression(predictions, RULES)
        assert [tuple(one.boxes.shape) for one in result.detections] == [(0, 4)] * 3
        assert all(one.classes.dtype == torch.int64 and one.scores.dtype == torch.float32 for one in result.detections)
        assert result.cut.shape == result.non_finite.shape == (3,)
    assert non_max_suppression(torch.zeros(0, 10, 7), RULES).detections == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", range(7))
def test_what_is_not_finite_is_told_and_hides_nothing_else(value, column):
    predictions = random_predictions(0, 3, 4, 2)
    sound = non_max_suppression(predictions[:, 1:], replace(RULES, iou=1.0))
    predictions[1, 0, column] = value
    result = non_max_suppression(predictions, replace(RULES, iou=1.0))
    assert_same(result.detections[1], sound.detections[1])
    assert result.non_finite.tolist() == [False, True, False]


def test_half_precision_input_gives_float32():
    for dtype in (torch.float16, torch.bfloat16):
        (found,) = non_max_suppression(random_predictions(1, 1, 20, 2).to(dtype), RULES).detections
        assert found.boxes.dtype == found.scores.dtype == torch.float32 and len(found.scores)


@pytest.mark.parametrize("scores", [None, 0.5])
def test_of_an_untrained_network_few_candidates_are_looked_at(monkeypatch, scores):
    predictions = random_predictions(2, 1, 25200, 80, size=640)
    if scores:
        predictions[..., 4:] = scores
    compared = []
    kept = nms._kept

    def counted(candidates, rules):
        compared.append(len(candidates.scores))
        return kept(candidates, rules)

    monkeypatch.setattr(nms, "_kept", counted)
    (found,) = non_max_suppression(predictions, RULES).detections
    assert len(found.scores) == 300
    assert compared == [nms._FIRST]  # of two million
