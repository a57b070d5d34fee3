"""Which labels each anchor must find, and what it costs when it does not (SPEC 5).

Two quantities are constants for the gradient although they depend on the predictions: CIoU's trade-off factor and the
objectness target. They are named in `Detached`, so that tests can hold them fixed and differentiate the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import ciou, ciou_factor, ciou_parts, cxcywh_from_xyxy, xyxy_from_cxcywh
from utils.hyp import Hyperparameters
from utils.structures import Batch, HeadSpec, Losses

_BALANCE_OF_THREE = (4.0, 1.0, 0.4)  # objectness weight per level
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
_FOCAL_ALPHA = 0.25


@dataclass(frozen=True, kw_only=True)
class LossGains:
    """Weights of the loss parts for one head and image size."""

    box: float
    objectness: float
    classification: float
    level: tuple[float, ...]  # of objectness, (L,)
    anchor_t: float
    obj_pw: float
    cls_pw: float
    fl_gamma: float
    label_smoothing: float
    total: float = 1.0

    @classmethod
    def for_head(
        cls, hyp: Hyperparameters, head: HeadSpec, imgsz: int, *, label_smoothing: float = 0.0, quad: bool = False
    ) -> LossGains:
        levels = len(head.strides)
        return cls(
            box=hyp.box * 3 / levels,
            objectness=hyp.obj * (imgsz / 640) ** 2 * 3 / levels,
            classification=hyp.cls * head.num_classes / 80 * 3 / levels,
            level=_BALANCE_OF_THREE if levels == 3 else _BALANCE[:levels],
            anchor_t=hyp.anchor_t,
            obj_pw=hyp.obj_pw,
            cls_pw=hyp.cls_pw,
            fl_gamma=hyp.fl_gamma,
            label_smoothing=label_smoothing,
            total=4.0 if quad else 1.0,  # an input stands for four images
        )


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The anchors of one level that have a label to find; M matches."""

    flat: Tensor  # (M,) i64 index into the level's B * A * h * w predictions
    cell: Tensor  # (M, 2) x and y of the grid cell
    anchor: Tensor  # (M, 2) width and height in cells
    boxes: Tensor  # (M, 4) xyxy in cells
    classes: Tensor  # (M,) i64


@dataclass(frozen=True, kw_only=True)
class Detached:
    """What depends on the predictions of one level but is a constant for the gradient."""

    ciou_factor: Tensor  # (M,)
    objectness: Tensor  # (B * A * h * w,) target


def match_labels(
    batch: Batch, head: HeadSpec, grids: Sequence[tuple[int, int]], anchor_t: float, *, dtype: torch.dtype
) -> list[Matches]:
    """Matches of each level; `grids` are its (h, w) in cells.

    A label matches an anchor whose sides differ from its own by less than the factor anchor_t. It goes to its own cell
    and to the nearer neighbour in x and in y, where that exists.
    """
    return [
        _match_level(batch, head.anchors[level].to(batch.boxes.device, dtype) / stride, stride, grid, anchor_t)
        for level, (stride, grid) in enumerate(zip(head.strides, grids))
    ]


def _match_level(batch: Batch, anchors: Tensor, stride: int, grid: tuple[int, int], anchor_t: float) -> Matches:
    boxes = batch.boxes.to(anchors.dtype) / stride  # (T, 4) cells
    centre, size = cxcywh_from_xyxy(boxes).split(2, dim=1)
    ratio = size[:, None] / anchors[None]  # (T, A, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t  # (T, A)

    height, width = grid
    cells, exists = _cells_of(centre, torch.tensor([width, height], device=centre.device))  # (T, 5, 2), (T, 5)
    label, anchor, place = (fits[:, :, None] & exists[:, None, :]).nonzero(as_tuple=True)  # (M,) each, label-major
    cell = cells[label, place]
    flat = ((batch.image_of[label] * len(anchors) + anchor) * height + cell[:, 1]) * width + cell[:, 0]
    return Matches(
        flat=flat,
        cell=cell.to(anchors.dtype),
        anchor=anchors[anchor],
        boxes=boxes[label],
        classes=batch.classes[label],
    )


def _cells_of(centre: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 5, 2) own, left, right, upper and lower cell of each centre, and (T, 5) whether it takes the label."""
    own = centre.long().clamp(min=torch.zeros_like(grid), max=grid - 1)  # (T, 2); a box may end at the far edge
    fraction = centre - own
    steps = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], device=centre.device)
    cells = own[:, None] + steps  # (T, 5, 2)
    lower, upper = fraction < 0.5, fraction > 0.5  # (T, 2) in x, y
    wanted = torch.stack(
        [torch.ones_like(lower[:, 0]), lower[:, 0], upper[:, 0], lower[:, 1], upper[:, 1]], dim=1
    )  # (T, 5)
    return cells, wanted & (cells >= 0).all(2) & (cells < grid).all(2)


def detection_losses(
    predictions: Sequence[Tensor],
    batch: Batch,
    head: HeadSpec,
    gains: LossGains,
    *,
    detached: Sequence[Detached] | None = None,
) -> Losses:
    """The losses of a batch from the head's raw outputs, L tensors (B, A, h, w, 5 + C).

    Computed in float32, or float64 when the predictions are. `detached` replaces what would be derived per level.
    """
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    grids = [tuple(level.shape[2:4]) for level in predictions]
    box = objectness = classification = predictions[0].new_zeros((), dtype=dtype)
    for level, matches in enumerate(match_labels(batch, head, grids, gains.anchor_t, dtype=dtype)):
        flat = predictions[level].to(dtype).reshape(-1, 5 + head.num_classes)
        # index_select, as the backward of indexing adds in any order on the CPU
        matched = flat.index_select(0, matches.flat)  # (M, 5 + C)
        parts = ciou_parts(_decode_matched(matched, matches), matches.boxes)
        constants = detached[level] if detached else _detach(parts, matches, len(flat))
        if len(matched):
            box = box + (1 - ciou(parts, constants.ciou_factor)).mean()
            if head.num_classes > 1:
                classification = classification + _class_loss(matched[:, 5:], matches.classes, gains)
        loss = _binary_cross_entropy(flat[:, 4], constants.objectness, gains.obj_pw, gains.fl_gamma)
        objectness = objectness + loss.mean() * gains.level[level]
    box, objectness = box * gains.box, objectness * gains.objectness
    classification = classification * gains.classification
    return Losses(
        box=box.detach(),
        objectness=objectness.detach(),
        classification=classification.detach(),
        total=(box + objectness + classification) * (len(predictions[0]) * gains.total),
    )


def detach(predictions: Sequence[Tensor], batch: Batch, head: HeadSpec, gains: LossGains) -> list[Detached]:
    """What `detection_losses` holds constant for these predictions, per level."""
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    grids = [tuple(level.shape[2:4]) for level in predictions]
    result = []
    for level, matches in zip(predictions, match_labels(batch, head, grids, gains.anchor_t, dtype=dtype)):
        flat = level.detach().to(dtype).reshape(-1, 5 + head.num_classes)
        parts = ciou_parts(_decode_matched(flat[matches.flat], matches), matches.boxes)
        result.append(_detach(parts, matches, len(flat)))
    return result


def _detach(parts: tuple[Tensor, Tensor, Tensor], matches: Matches, num_predictions: int) -> Detached:
    iou, distance, aspect = (part.detach() for part in parts)
    factor = ciou_factor(iou, aspect)
    score = ciou((iou, distance, aspect), factor).clamp(min=0)
    target = torch.zeros(num_predictions, dtype=score.dtype, device=score.device)
    # of several labels in one place the largest target wins, whatever their order
    target.scatter_reduce_(0, matches.flat, score, "amax")
    return Detached(ciou_factor=factor, objectness=target)


def _decode_matched(raw: Tensor, matches: Matches) -> Tensor:
    """(M, 4) xyxy in cells of matched raw predictions (M, 5 + C)."""
    centre = 2 * raw[:, :2].sigmoid() - 0.5 + matches.cell
    size = (2 * raw[:, 2:4].sigmoid()).square() * matches.anchor
    return xyxy_from_cxcywh(torch.cat([centre, size], dim=1))


def _class_loss(logits: Tensor, classes: Tensor, gains: LossGains) -> Tensor:
    """Mean over matches and classes, logits (M, C)."""
    smoothing = gains.label_smoothing
    target = torch.full_like(logits, smoothing / 2)
    target.scatter_(1, classes[:, None], 1 - smoothing / 2)
    return _binary_cross_entropy(logits, target, gains.cls_pw, gains.fl_gamma).mean()


def _binary_cross_entropy(logits: Tensor, target: Tensor, positive_weight: float, gamma: float) -> Tensor:
    """Element-wise BCE; gamma > 0 makes it focal (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""
    weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if gamma == 0:
        return loss
    missed = target * (-logits).sigmoid() + (1 - target) * logits.sigmoid()  # 1 - p_t without cancellation
    missed = missed.clamp(min=torch.finfo(logits.dtype).tiny)  # for gamma < 1 the slope at 0 is infinite
    alpha = target * _FOCAL_ALPHA + (1 - target) * (1 - _FOCAL_ALPHA)
    return loss * alpha * missed**gamma
