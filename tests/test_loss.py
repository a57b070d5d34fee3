import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.boxes import ciou_factor
from utils.data.loader import part_of
from utils.hyp import Hyperparameters
from utils.loss import Detached, LossGains, detach, detection_losses, match_labels, pad_labels
from utils.structures import Batch, HeadSpec, Losses, Part

ANCHORS = [  # px, of levels of stride 8, 16, ...
    [(10, 13), (16, 30), (33, 23)],
    [(30, 61), (62, 45), (59, 119)],
    [(116, 90), (156, 198), (373, 326)],
    [(436, 615), (739, 380), (925, 792)],
]


def head_of(levels: int, num_classes: int, *, per_level: int = 3, shrink: float = 1.0) -> HeadSpec:
    anchors = torch.tensor(ANCHORS[:levels], dtype=torch.float32)[:, :per_level] * shrink
    return HeadSpec(strides=(8, 16, 32, 64)[:levels], anchors=anchors, num_classes=num_classes)


def batch_of(labels: list[tuple], *, images: int = 1, shape: tuple[int, int] = (64, 64)) -> Batch:
    """A batch with labels (image, class, x1, y1, x2, y2)."""
    rows = torch.tensor(labels, dtype=torch.float32).reshape(-1, 6)
    return Batch(
        images=torch.zeros(images, 3, *shape, dtype=torch.uint8),
        boxes=rows[:, 2:],
        classes=rows[:, 1].long(),
        image_of=rows[:, 0].long(),
        indices=torch.arange(images),
    )


def outputs_for(head: HeadSpec, batch: Batch, *, seed: int = 0, spread: float = 1.5) -> list[Tensor]:
    """Random head outputs (B, A, h, w, 5 + C) f64 per level."""
    generator = torch.Generator().manual_seed(seed)
    B, _, H, W = batch.images.shape
    return [
        spread
        * torch.randn(B, len(anchors), H // stride, W // stride, 5 + head.num_classes, generator=generator).double()
        for stride, anchors in zip(head.strides, head.anchors)
    ]


def gains_of(head: HeadSpec, imgsz: int = 64, *, label_smoothing: float = 0.0, **hyp: float) -> LossGains:
    return LossGains.for_head(Hyperparameters(**hyp), head, imgsz, label_smoothing=label_smoothing)


def random_labels(seed: int, count: int, num_classes: int, *, images: int, shape: tuple[int, int]) -> list[tuple]:
    """Boxes that start and end on multiples of 4 px or anywhere, up to the edges, some in the same place."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    labels = []
    for _ in range(count):
        snap = draw(0, 1) < 0.5
        sides = []
        for length in (shape[1], shape[0]):
            size = draw(4, length)
            start = draw(-size / 2, length - size / 2)
            low, high = max(start, 0), min(start + size, length)
            sides.append((4 * (low // 4), 4 * (low // 4) + 8 * (1 + (high - low) // 8)) if snap else (low, high))
        (x1, x2), (y1, y2) = sides
        x2, y2 = min(x2, shape[1]), min(y2, shape[0])
        image, label = int(draw(0, images)), int(draw(0, num_classes))
        labels.append((image, label, x1, y1, x2, y2))
        if draw(0, 1) < 0.3:  # another one in the same cells
            labels.append((image, int(draw(0, num_classes)), x1, y1, x2, (y1 + 3 * y2) / 4))
    return labels


# ---- the slow twin: SPEC 5 in plain Python, boxes in px -----------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_ciou(first, second) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = first, second
    overlap = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
    iou = overlap / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap)
    diagonal = (max(ax2, bx2) - min(ax1, bx1)) ** 2 + (max(ay2, by2) - min(ay1, by1)) ** 2
    between = ((ax1 + ax2) / 2 - (bx1 + bx2) / 2) ** 2 + ((ay1 + ay2) / 2 - (by1 + by2) / 2) ** 2
    v = 4 / math.pi**2 * (math.atan((bx2 - bx1) / (by2 - by1)) - math.atan((ax2 - ax1) / (ay2 - ay1))) ** 2
    return iou - between / diagonal - (v / (1 - iou + v) * v if v else 0)


def slow_bce(logit: float, target: float, positive_weight: float, gamma: float) -> float:
    p = sigmoid(logit)
    loss = -positive_weight * target * math.log(p) - (1 - target) * math.log(1 - p)
    if gamma:
        p_t = target * p + (1 - target) * (1 - p)
        loss *= (1 - p_t) ** gamma * (0.25 * target + 0.75 * (1 - target))
    return loss


def slow_cells(centre: float, cells: int) -> set[int]:
    """The cells along one side that take a label: its own and the nearer neighbour."""
    own = min(math.floor(centre), cells - 1)
    near = {own - 1} if centre - own < 0.5 else {own + 1} if centre - own > 0.5 else set()
    return {cell for cell in near if 0 <= cell < cells}


def slow_losses(outputs, labels, head: HeadSpec, hyp: Hyperparameters, imgsz: int, smoothing: float):
    box = objectness = classification = 0.0
    L, C = len(outputs), head.num_classes
    balance = (4, 1, 0.4) if L == 3 else (4, 1, 0.25, 0.06, 0.02)
    for level, (output, stride) in enumerate(zip(outputs, head.strides)):
        B, A, h, w, _ = output.shape
        output, anchors = output.tolist(), head.anchors[level].tolist()
        box_terms, class_terms, target = [], [], {}
        for (image, label, *truth), a in itertools.product(labels, range(A)):
            width, height = truth[2] - truth[0], truth[3] - truth[1]
            wa, ha = anchors[a]
            if max(width / wa, wa / width, height / ha, ha / height) >= hyp.anchor_t:
                continue
            cx, cy = (truth[0] + truth[2]) / 2 / stride, (truth[1] + truth[3]) / 2 / stride
            own_x, own_y = min(math.floor(cx), w - 1), min(math.floor(cy), h - 1)
            cells = [(own_x, own_y)]
            cells += [(x, own_y) for x in slow_cells(cx, w)] + [(own_x, y) for y in slow_cells(cy, h)]
            for x, y in cells:
                tx, ty, tw, th, _, *class_logits = output[image][a][y][x]
                px, py = (2 * sigmoid(tx) - 0.5 + x) * stride, (2 * sigmoid(ty) - 0.5 + y) * stride
                pw, ph = (2 * sigmoid(tw)) ** 2 * wa, (2 * sigmoid(th)) ** 2 * ha
                ciou = slow_ciou((px - pw / 2, py - ph / 2, px + pw / 2, py + ph / 2), truth)
                box_terms.append(1 - ciou)
                target[image, a, y, x] = max(ciou, 0, target.get((image, a, y, x), 0))
                for k in range(C):
                    wanted = 1 - smoothing / 2 if k == label else smoothing / 2
                    class_terms.append(slow_bce(class_logits[k], wanted, hyp.cls_pw, hyp.fl_gamma))
        terms = [
            slow_bce(output[image][a][y][x][4], target.get((image, a, y, x), 0), hyp.obj_pw, hyp.fl_gamma)
            for image, a, y, x in itertools.product(range(B), range(A), range(h), range(w))
        ]
        objectness += balance[level] * sum(terms) / len(terms)
        if box_terms:
            box += sum(box_terms) / len(box_terms)
            classification += sum(class_terms) / len(class_terms) if C > 1 else 0
    box *= hyp.box * 3 / L
    objectness *= hyp.obj * (imgsz / 640) ** 2 * 3 / L
    classification *= hyp.cls * C / 80 * 3 / L
    return box, objectness, classification, (box + objectness + classification) * B


def plain(losses: Losses) -> list[float]:
    return [losses.box.item(), losses.objectness.item(), losses.classification.item(), losses.total.item()]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9999),
    levels=st.sampled_from([2, 3, 3, 4]),
    num_classes=st.integers(1, 3),
    shape=st.sampled_from([(64, 128), (128, 64), (64, 64)]),
    images=st.integers(1, 2),
    count=st.integers(0, 6),
    smoothing=st.sampled_from([0.0, 0.1]),
    hyp=st.sampled_from(
        [{}, {"fl_gamma": 1.5}, {"fl_gamma": 0.5, "obj_pw": 2}, {"cls_pw": 1.7, "obj_pw": 0.6}, {"anchor_t": 2.5}]
    ),
)
def test_loss_equals_the_slow_twin(seed, levels, num_classes, shape, images, count, smoothing, hyp):
    head = head_of(levels, num_classes, shrink=0.5)
    batch = batch_of(random_labels(seed, count, num_classes, images=images, shape=shape), images=images, shape=shape)
    outputs = outputs_for(head, batch, seed=seed)
    labels = [
        (image, label, *box)
        for image, label, box in zip(batch.image_of.tolist(), batch.classes.tolist(), batch.boxes.tolist())
    ]
    got = detection_losses(outputs, batch, head, gains_of(head, 128, label_smoothing=smoothing, **hyp))
    expected = slow_losses(outputs, labels, head, Hyperparameters(**hyp), 128, smoothing)
    assert plain(got) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("levels", "box"),
    [
        (3, (0, 0, 128, 64)),  # the whole image: its centre is at a corner of four cells
        (3, (12, 12, 28, 44)),  # exactly at fraction 0.5 in x and y of stride 8
        (4, (8, 16, 40, 48)),  # exactly at fraction 0.5 of stride 16
        (3, (120, 56, 128, 64)),  # in the last corner
        (3, (0, 0, 6, 8)),  # in the first corner
        (3, (127.99, 20, 128, 40)),  # nearly on the far edge
    ],
)
def test_loss_of_one_label_equals_the_slow_twin(levels, box):
    head = head_of(levels, 2, shrink=0.5)
    batch = batch_of([(0, 1, *box)], shape=(64, 128))
    outputs = outputs_for(head, batch)
    labels = [(0, 1, *batch.boxes[0].tolist())]
    got = detection_losses(outputs, batch, head, gains_of(head, 128))
    assert plain(got) == pytest.approx(slow_losses(outputs, labels, head, Hyperparameters(), 128, 0.0), rel=1e-10)


# ---- matching -----------------------------------------------------------------------------------------------------


def cells_of(box: tuple, *, grid: tuple[int, int] = (8, 16), anchor_t: float = 4.0) -> list[tuple[int, int]]:
    """Cells (x, y) of stride 8 that one anchor of 16 x 16 px is matched in."""
    head = HeadSpec(strides=(8,), anchors=torch.tensor([[[16.0, 16.0]]]), num_classes=1)
    matches = match_labels(batch_of([(0, 0, *box)]), head, [grid], anchor_t, dtype=torch.float32)
    cells = [tuple(cell) for cell in matches.cell[matches.holds].long().tolist()]
    assert matches.rows[matches.holds].tolist() == [y * grid[1] + x for x, y in cells]
    return sorted(cells)


def around(x: float, y: float, width: float = 16, height: float = 16) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


@pytest.mark.parametrize(
    ("centre", "cells"),
    [
        ((36, 36), [(4, 4)]),  # fractions of exactly 0.5: no neighbour
        ((35, 36), [(3, 4), (4, 4)]),
        ((37, 36), [(4, 4), (5, 4)]),
        ((36, 33), [(4, 3), (4, 4)]),
        ((36, 39), [(4, 4), (4, 5)]),
        ((32, 32), [(3, 4), (4, 3), (4, 4)]),  # fraction 0
        ((1, 1), [(0, 0)]),  # no neighbour beyond the edge
        ((127, 63), [(15, 7)]),
        ((128, 64), [(15, 7)]),  # a centre on the far edge
    ],
)
def test_a_label_goes_to_its_cell_and_the_nearer_neighbours(centre, cells):
    assert cells_of(around(*centre)) == cells


@pytest.mark.parametrize(
    ("width", "height", "fits"),
    [(16, 16, True), (63, 16, True), (64, 16, False), (4, 16, False), (4.5, 60, True), (16, 65, False), (16, 3, False)],
)
def test_a_label_matches_an_anchor_within_the_factor(width, height, fits):
    assert bool(cells_of(around(36, 36, width, height))) == fits


def test_a_label_without_area_matches_nothing():
    assert cells_of((36, 30, 36, 40)) == []


def test_neighbours_that_do_not_exist_never_wrap_into_another_row_or_image():
    head = HeadSpec(strides=(8,), anchors=torch.tensor([[[16.0, 16.0], [12.0, 20.0]]]), num_classes=1)
    batch = batch_of([(1, 0, *around(1, 1)), (0, 0, *around(63, 63))], images=2)
    matches = match_labels(batch, head, [(8, 8)], 4.0, dtype=torch.float32)
    A, h, w = 2, 8, 8
    expected = [63 * A + a for a in range(A)] + [h * w * A + a for a in range(A)]
    assert sorted(matches.rows[matches.holds].tolist()) == expected


def test_shapes_depend_on_shapes_alone():
    """On the meta device there are no values: whatever reads one, to make a shape or a decision of it, fails."""
    head, batch, outputs = small_case(3, 7)
    elsewhere = replace(batch.to(torch.device("meta")), images=batch.images.to("meta"))
    levels = [level.detach().to("meta").requires_grad_() for level in outputs]
    for hyp in ({}, {"fl_gamma": 1.5, "cls_pw": 2.0, "obj_pw": 0.5}):
        on_meta = replace(head, anchors=head.anchors.to("meta"))
        detection_losses(levels, elsewhere, on_meta, gains_of(head, **hyp)).total.backward()
    assert [level.grad.shape for level in levels] == [level.shape for level in outputs]


@pytest.mark.parametrize("count", [0, 1, 64, 65, 130])
def test_labels_that_pad_a_batch_cost_nothing(count):
    head = head_of(3, 4, shrink=0.5)
    shape = (64, 96)
    batch = batch_of(random_labels(1, count, 4, images=2, shape=shape)[:count], images=2, shape=shape)
    outputs = [level.requires_grad_() for level in outputs_for(head, batch)]
    padded = pad_labels(batch)
    assert len(padded.boxes) == len(padded.classes) == len(padded.image_of) == {130: 256, 65: 128}.get(count, 64)
    expected, got = (detection_losses(outputs, one, head, gains_of(head)).total for one in (batch, padded))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(got, outputs), torch.autograd.grad(expected, outputs)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


def test_the_loss_compiles_in_one_piece():
    head, batch, outputs = small_case(3, 7)
    gains = gains_of(head)

    def total(levels: list[Tensor]) -> Tensor:
        return detection_losses(levels, batch, head, gains).total

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(total(outputs), outputs)
    for got, want in zip(torch.autograd.grad(compiled(outputs), outputs), expected):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_labels_in_one_place_the_largest_objectness_target_wins(order):
    head = HeadSpec(strides=(8,), anchors=torch.tensor([[[16.0, 16.0]]]), num_classes=2)
    labels = [(0, 0, *around(36, 36, 15, 17)), (0, 1, *around(36, 36, 40, 9))]
    outputs = [torch.zeros(1, 1, 8, 8, 7, dtype=torch.float64)]  # a box of 16 x 16 around the centre of each cell
    held = detach(outputs, batch_of([labels[at] for at in order]), head, gains_of(head))
    cious = [slow_ciou(around(36, 36), label[2:]) for label in labels]
    assert cious[0] > cious[1] > 0
    assert held.objectness[4 * 8 + 4].item() == pytest.approx(cious[0], rel=1e-12)
    assert held.objectness.count_nonzero() == 1


# ---- gradients ----------------------------------------------------------------------------------------------------


def small_case(num_classes: int, count: int, *, seed: int = 3) -> tuple[HeadSpec, Batch, list[Tensor]]:
    head = head_of(2, num_classes, per_level=2)
    shape = (16, 32)
    batch = batch_of(random_labels(seed, count, num_classes, images=2, shape=shape), images=2, shape=shape)
    return head, batch, [level.requires_grad_() for level in outputs_for(head, batch, seed=seed, spread=0.7)]


@pytest.mark.parametrize("hyp", [{}, {"fl_gamma": 1.5, "cls_pw": 1.3, "obj_pw": 0.8}, {"fl_gamma": 0.5}])
@pytest.mark.parametrize(("num_classes", "count"), [(2, 3), (1, 3), (2, 0), (1, 0)])
def test_gradient_equals_numerical_differentiation(num_classes, count, hyp):
    head, batch, outputs = small_case(num_classes, count)
    gains = gains_of(head, label_smoothing=0.1, **hyp)
    held = detach(outputs, batch, head, gains)
    matches = match_labels(batch, head, [tuple(level.shape[2:4]) for level in outputs], 4.0, dtype=torch.float64)
    assert matches.holds.sum() >= 2 * count

    def total(*levels: Tensor) -> Tensor:
        return detection_losses(levels, batch, head, gains, detached=held).total

    assert torch.autograd.gradcheck(total, outputs, atol=1e-7, rtol=1e-5)


def test_nothing_flows_through_the_detached_quantities():
    head, batch, outputs = small_case(2, 5)
    gains = gains_of(head)
    held = detach(outputs, batch, head, gains)
    assert not any(value.requires_grad for value in vars(held).values())

    def gradients(gains: LossGains, **constants) -> list[Tensor]:
        return torch.autograd.grad(detection_losses(outputs, batch, head, gains, **constants).total, outputs)

    for free, fixed in zip(gradients(gains), gradients(gains, detached=held)):
        assert torch.equal(free, fixed)
    objectness_alone = replace(gains, box=0.0, classification=0.0)
    assert all(not level[..., :4].any() and level[..., 4].all() for level in gradients(objectness_alone))


def test_the_detached_quantities_do_depend_on_the_predictions():
    """Else the tests above could not fail."""
    head, batch, outputs = small_case(2, 5)
    before, after = (detach([level + shift for level in outputs], batch, head, gains_of(head)) for shift in (0.0, 0.1))
    assert not torch.allclose(before.ciou_factor, after.ciou_factor, rtol=1e-3)
    assert not torch.allclose(before.objectness, after.objectness, rtol=1e-3)


def test_constants_passed_in_take_the_place_of_the_derived_ones():
    head, batch, outputs = small_case(2, 3)
    gains = gains_of(head)
    held = detach(outputs, batch, head, gains)
    usual = detection_losses(outputs, batch, head, gains)
    zeroed = Detached(ciou_factor=torch.zeros_like(held.ciou_factor), objectness=torch.zeros_like(held.objectness))
    changed = detection_losses(outputs, batch, head, gains, detached=zeroed)
    assert changed.box < usual.box  # DIoU: no aspect penalty
    assert changed.objectness != usual.objectness
    assert changed.classification == usual.classification


def test_the_factor_is_finite_for_equal_boxes():
    assert ciou_factor(torch.ones(1), torch.zeros(1)).item() == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("logit", [-100.0, -20.0, 20.0, 100.0])
def test_certain_predictions_keep_loss_and_gradient_finite(logit, gamma):
    head, batch, outputs = small_case(2, 4)
    saturated = [torch.full_like(level, logit, dtype=torch.float32).requires_grad_() for level in outputs]
    losses = detection_losses(saturated, batch, head, gains_of(head, fl_gamma=gamma))
    losses.total.backward()
    assert all(map(math.isfinite, plain(losses)))
    assert all(level.grad.isfinite().all() for level in saturated)


def test_without_labels_only_objectness_is_left():
    head, batch, outputs = small_case(3, 0)
    losses = detection_losses(outputs, batch, head, gains_of(head))
    assert losses.box == losses.classification == 0 < losses.objectness
    assert losses.total == 2 * losses.objectness


def test_one_class_has_no_class_loss():
    head, batch, outputs = small_case(1, 4)
    losses = detection_losses(outputs, batch, head, gains_of(head))
    losses.total.backward()
    assert losses.classification == 0 < losses.box
    assert not any(level.grad[..., 5:].any() for level in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_computed_in_float32(dtype):
    head, batch, outputs = small_case(2, 4)
    half = [level.detach().to(dtype) for level in outputs]
    losses = detection_losses(half, batch, head, gains_of(head))
    assert losses.total.dtype == torch.float32
    assert plain(losses) == plain(detection_losses([level.float() for level in half], batch, head, gains_of(head)))


def test_the_logged_parts_carry_no_graph():
    head, batch, outputs = small_case(2, 4)
    losses = detection_losses(outputs, batch, head, gains_of(head))
    assert losses.total.requires_grad
    assert not any(part.requires_grad for part in (losses.box, losses.objectness, losses.classification))


@pytest.fixture
def two_threads():
    """One thread alone adds in a fixed order whatever is asked of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_backward_is_the_same_to_the_byte():
    head = head_of(3, 3, shrink=0.5)
    shape = (128, 256)
    labels = random_labels(0, 150, 3, images=2, shape=shape) * 20  # many gradients meet in one place
    batch = batch_of(labels, images=2, shape=shape)
    outputs = [level.float().requires_grad_() for level in outputs_for(head, batch)]

    def gradients() -> list[bytes]:
        total = detection_losses(outputs, batch, head, gains_of(head)).total
        return [gradient.numpy().tobytes() for gradient in torch.autograd.grad(total, outputs)]

    first = gradients()
    assert all(gradients() == first for _ in range(3))


# ---- gains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "balance"),
    [(2, (4, 1)), (3, (4, 1, 0.4)), (4, (4, 1, 0.25, 0.06)), (5, (4, 1, 0.25, 0.06, 0.02))],
)
def test_gains_follow_levels_classes_and_image_size(levels, balance):
    head = HeadSpec(strides=(8, 16, 32, 64, 128)[:levels], anchors=torch.ones(levels, 3, 2), num_classes=20)
    gains = LossGains.for_head(Hyperparameters(box=0.06, cls=0.4, obj=0.7), head, 320)
    assert gains.level == balance
    assert gains.box == pytest.approx(0.06 * 3 / levels)
    assert gains.classification == pytest.approx(0.4 * 20 / 80 * 3 / levels)
    assert gains.objectness == pytest.approx(0.7 / 4 * 3 / levels)


def test_an_input_of_four_images_counts_four_times_for_the_gradient_alone():
    head, batch = head_of(3, 2), batch_of([(0, 1, 8, 8, 24, 40)])
    one, four = (LossGains.for_head(Hyperparameters(), head, 64, quad=quad) for quad in (False, True))
    outputs = outputs_for(head, batch)
    plain, quadruple = (detection_losses(outputs, batch, head, gains) for gains in (one, four))
    assert quadruple.total == 4 * plain.total
    assert replace(quadruple, total=plain.total) == plain


# ---- ranks --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), images=st.integers(1, 5), ranks=st.integers(1, 4), labels=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_losses_and_gradients_of_parts_add_up_to_those_of_the_batch(seed, images, ranks, labels):
    """However unevenly matches lie; a rank without an image goes along with one that counts for nothing."""
    head, shape = head_of(3, 3), (64, 64)
    whole = batch_of(random_labels(seed, labels, 3, images=images, shape=shape), images=images, shape=shape)
    outputs = [output.requires_grad_() for output in outputs_for(head, whole, seed=seed)]
    gains = gains_of(head)
    expected = detection_losses(outputs, whole, head, gains)
    wanted = torch.autograd.grad(expected.total, outputs)
    shares = [part_of(images, rank, ranks) for rank in range(ranks)]
    counted: list[Tensor] = []

    def losses_of(share: range, over_ranks) -> Losses:
        own = share or range(1)
        held = torch.isin(whole.image_of, torch.tensor(list(share)))
        part = replace(
            whole,
            images=whole.images[own.start : own.stop],
            boxes=whole.boxes[held],
            classes=whole.classes[held],
            image_of=whole.image_of[held] - own.start,
            part=Part(len(share), images),
        )
        return detection_losses(
            [output[own.start : own.stop] for output in outputs], part, head, gains, over_ranks=over_ranks
        )

    for share in shares:
        losses_of(share, lambda counts: counted.append(counts) or counts)
    parts = [losses_of(share, lambda _: sum(counted)) for share in shares]
    for name in ("box", "objectness", "classification", "total"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(expected, name))
    found = torch.autograd.grad(sum(part.total for part in parts), outputs)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)
