import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.ops import box_iou, complete_box_iou_loss

from utils.boxes import (
    box_area,
    ciou,
    ciou_factor,
    ciou_parts,
    clip_boxes,
    cxcywh_from_xyxy,
    pairwise_iou,
    transform_boxes,
    transform_points,
    xywh_from_xyxy,
    xyxy_from_cxcywh,
)


def random_boxes(count: int, *, seed: int = 0, whole: bool = False) -> np.ndarray:
    """(count, 4) xyxy f64, some overlapping, some apart; on whole px some also touch or coincide."""
    generator = np.random.default_rng(seed)
    corner, size = generator.uniform(0, 60, (count, 2)), generator.uniform(1, 40, (count, 2))
    boxes = np.concatenate([corner, corner + size], 1)
    return boxes.round(-1) if whole else boxes


quarters = st.integers(-4000, 4000).map(lambda value: value / 4)  # sums and halves of these are exact


@given(arrays(np.float64, st.tuples(st.integers(0, 5), st.just(4)), elements=quarters))
def test_formats_are_each_others_inverse(boxes):
    assert np.array_equal(xyxy_from_cxcywh(cxcywh_from_xyxy(boxes)), boxes)
    assert np.array_equal(cxcywh_from_xyxy(xyxy_from_cxcywh(boxes)), boxes)
    assert np.array_equal(cxcywh_from_xyxy(torch.from_numpy(boxes)).numpy(), cxcywh_from_xyxy(boxes))
    assert np.array_equal(xyxy_from_cxcywh(torch.from_numpy(boxes)).numpy(), xyxy_from_cxcywh(boxes))


def test_formats_of_a_known_box():
    assert xywh_from_xyxy(np.array([[[10.0, 20.0, 30.0, 60.0]]])).tolist() == [[[10, 20, 20, 40]]]
    corners, centred = np.array([[[10.0, 20.0, 30.0, 60.0]]]), np.array([[[20.0, 40.0, 20.0, 40.0]]])
    assert np.array_equal(cxcywh_from_xyxy(corners), centred)
    assert np.array_equal(xyxy_from_cxcywh(centred), corners)
    assert box_area(corners).tolist() == box_area(torch.from_numpy(corners)).tolist() == [[800.0]]


def slow_iou(first, second) -> float:
    overlap = 1.0
    for axis in (0, 1):
        overlap *= max(0.0, min(first[axis + 2], second[axis + 2]) - max(first[axis], second[axis]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - overlap
    return overlap / union if union > 0 else 0.0


@pytest.mark.parametrize("whole", [False, True])
def test_pairwise_iou_equals_the_slow_twin_and_torchvision(whole):
    first, second = random_boxes(13, whole=whole), random_boxes(9, seed=1, whole=whole)
    iou = pairwise_iou(first, second)
    assert iou == pytest.approx(np.array([[slow_iou(a, b) for b in second] for a in first]), abs=1e-14)
    if not whole:  # torchvision gives NaN for pairs without area
        assert iou == pytest.approx(box_iou(torch.from_numpy(first), torch.from_numpy(second)).numpy(), abs=1e-12)


def test_pairwise_iou_of_stacks_and_of_nothing():
    stacked = pairwise_iou(random_boxes(6).reshape(2, 3, 4), random_boxes(8, seed=1).reshape(2, 4, 4))
    assert stacked.shape == (2, 3, 4)
    assert np.array_equal(stacked[1], pairwise_iou(random_boxes(6)[3:], random_boxes(8, seed=1)[4:]))
    assert pairwise_iou(np.empty((0, 4)), random_boxes(3)).shape == (0, 3)


def test_boxes_without_area_have_iou_zero():
    point = np.array([[5.0, 5.0, 5.0, 5.0]])
    assert pairwise_iou(point, point) == 0
    assert pairwise_iou(point, np.array([[0.0, 0.0, 10.0, 10.0]])) == 0


def test_clip_boxes_keeps_what_is_inside():
    boxes = np.array([[-5, -5, 5, 5], [90, 40, 200, 200], [10, 10, 20, 20]], np.float32)
    clipped = clip_boxes(boxes, (50, 100))
    assert clipped.tolist() == [[0, 0, 5, 5], [90, 40, 100, 50], [10, 10, 20, 20]]
    assert clipped.dtype == np.float32


# ---- frames -------------------------------------------------------------------------------------------------------

PERSPECTIVE = np.array([[0.9, -0.2, 30.0], [0.3, 1.1, -5.0], [1e-4, -2e-4, 1.0]])


def slow_transform(point, matrix) -> tuple[float, float]:
    x, y, w = (sum(row[k] * value for k, value in enumerate((*point, 1.0))) for row in matrix)
    return x / w, y / w


def test_points_and_boxes_move_as_their_slow_twins_do():
    boxes = random_boxes(7)
    points = transform_points(boxes.reshape(-1, 2, 2), PERSPECTIVE)
    for box, (low, high), moved in zip(boxes, points, transform_boxes(boxes, PERSPECTIVE)):
        assert tuple(low) == pytest.approx(slow_transform(box[:2], PERSPECTIVE))
        assert tuple(high) == pytest.approx(slow_transform(box[2:], PERSPECTIVE))
        corners = [slow_transform((box[i], box[j]), PERSPECTIVE) for i in (0, 2) for j in (1, 3)]
        xs, ys = zip(*corners)
        assert moved == pytest.approx([min(xs), min(ys), max(xs), max(ys)])


@given(
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.floats(-500, 500),
    st.floats(-500, 500),
    st.booleans(),
)
def test_a_letterbox_and_its_inverse_return_the_boxes(scale_x, scale_y, left, top, flip):
    matrix = np.array([[-scale_x if flip else scale_x, 0, left], [0, scale_y, top], [0, 0, 1]])
    boxes = random_boxes(5)
    there = transform_boxes(boxes.astype(np.float32), matrix)
    assert there.dtype == np.float64
    assert (there[:, :2] < there[:, 2:]).all()
    assert transform_boxes(there, np.linalg.inv(matrix)) == pytest.approx(boxes, abs=1e-4)


def test_no_boxes_move_to_no_boxes():
    assert transform_boxes(np.empty((0, 4), np.float32), PERSPECTIVE).shape == (0, 4)


# ---- complete IoU -------------------------------------------------------------------------------------------------


def whole_ciou(boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    parts = ciou_parts(boxes, targets)
    return ciou(parts, ciou_factor(parts[0], parts[2]))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9999))
def test_ciou_and_its_gradient_equal_torchvision(seed):
    scale = 100  # torchvision adds 1e-7 to the squared diagonal of the hull
    boxes = torch.from_numpy(random_boxes(20, seed=seed) * scale).requires_grad_()
    targets = torch.from_numpy(random_boxes(20, seed=seed + 1) * scale)
    ours, theirs = 1 - whole_ciou(boxes, targets), complete_box_iou_loss(boxes, targets, eps=1e-18)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(loss.sum(), boxes)[0] * scale for loss in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-10)


@given(st.integers(0, 9999), st.integers(-20, 20))
def test_ciou_knows_no_units(seed, power):
    boxes, targets = (torch.from_numpy(random_boxes(20, seed=seed + k)) for k in (0, 1))
    assert torch.equal(whole_ciou(boxes * 2.0**power, targets * 2.0**power), whole_ciou(boxes, targets))


def test_ciou_of_hand_calculated_pairs():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 20, 10]], dtype=torch.float64)
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    expected = [1, -400 / 1000, 0.5 - 25 / 500 - v / (0.5 + v) * v]
    assert whole_ciou(boxes, targets).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("box", [(3.0, 4.0, 11.0, 9.0), (0.0, 0.0, 1e-3, 1e-3), (5.0, 5.0, 5.0, 5.0)])
def test_equal_boxes_have_a_finite_gradient(box, dtype):
    boxes = torch.tensor([box], dtype=dtype, requires_grad=True)
    value = whole_ciou(boxes, boxes.detach().clone())
    value.sum().backward()
    assert value.item() == (1 if box[2] > box[0] else 0)
    assert boxes.grad.isfinite().all()


def test_the_factor_is_a_constant():
    boxes = torch.from_numpy(random_boxes(4)).requires_grad_()
    iou, _, aspect = ciou_parts(boxes, torch.from_numpy(random_boxes(4, seed=1)))
    assert not ciou_factor(iou, aspect).requires_grad


@given(st.integers(0, 9999))
def test_ciou_lies_between_minus_two_and_iou(seed):
    boxes, targets = (torch.from_numpy(random_boxes(30, seed=seed + k)) for k in (0, 1))
    iou = ciou_parts(boxes, targets)[0]
    value = whole_ciou(boxes, targets)
    assert (value <= iou).all()
    assert (value > -2).all()
