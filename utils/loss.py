"""Which labels each anchor must find, and what it costs when it does not (SPEC 5).

Two quantities are constants for the gradient although they depend on the predictions: CIoU's trade-off factor and the
objectness target. They are named in `Detached`, so that tests can hold them fixed and differentiate the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import ciou, ciou_factor, ciou_parts, cxcywh_from_xyxy, xyxy_from_cxcywh
from utils.hyp import Hyperparameters
from utils.structures import Batch, HeadSpec, Losses, Part

_BALANCE_OF_THREE = (4.0, 1.0, 0.4)  # objectness weight per level
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
_FOCAL_ALPHA = 0.25
_FEWEST_LABELS = 64  # of a padded batch


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


class Matches(NamedTuple):
    """Every place that may have a label to find, level by level: M = L * T * A * 3, whatever the labels.

    The three are a label's own cell and the nearer neighbours in x and in y. A place that has nothing to find is not
    left out but weighs nothing, so shapes depend on shapes alone and the device is never waited for.
    """

    holds: Tensor  # (M,) bool: a label is to be found here
    rows: Tensor  # (M,) i64 into the predictions of all levels, each ordered image, y, x, anchor
    cell: Tensor  # (M, 2) x and y of the grid cell
    anchor: Tensor  # (M, 2) width and height in cells
    boxes: Tensor  # (M, 4) xyxy in cells
    classes: Tensor  # (M,) i64


@dataclass(frozen=True, kw_only=True)
class Detached:
    """What depends on the predictions but is a constant for the gradient."""

    ciou_factor: Tensor  # (M,)
    objectness: Tensor  # (N,) target of each of the N predictions of all levels


def match_labels(
    batch: Batch, head: HeadSpec, grids: Sequence[tuple[int, int]], anchor_t: float, *, dtype: torch.dtype
) -> Matches:
    """The matches of a batch on levels of `grids` (h, w) in cells.

    A label matches an anchor whose sides differ from its own by less than the factor anchor_t. It goes to its own cell
    and to the nearer neighbour in x and in y, where that exists.
    """
    start, levels = 0, []
    for anchors, stride, grid in zip(head.anchors.to(batch.boxes.device, dtype), head.strides, grids):
        levels.append(_match_level(batch, anchors / stride, stride, grid, anchor_t, start=start))
        start += len(batch.images) * grid[0] * grid[1] * len(anchors)
    return Matches(*map(torch.cat, zip(*levels)))


def _match_level(
    batch: Batch, anchors: Tensor, stride: int, grid: tuple[int, int], anchor_t: float, *, start: int
) -> Matches:
    boxes = batch.boxes.to(anchors.dtype) / stride  # (T, 4) cells
    centre, size = cxcywh_from_xyxy(boxes).split(2, dim=1)
    ratio = size[:, None] / anchors  # (T, A, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t  # (T, A)

    T, A = fits.shape
    height, width = grid
    x, y, exists = _cells_of(centre, grid)  # (T, 3) each
    cell_rows = ((batch.image_of[:, None] * height + y) * width + x) * A  # (T, 3)
    of_anchor = torch.arange(A, device=boxes.device)[:, None]

    def places(values: Tensor) -> Tensor:
        return values.expand(T, A, 3, *values.shape[3:]).flatten(0, 2)

    return Matches(
        holds=places(fits[:, :, None] & exists[:, None]),
        rows=places(start + cell_rows[:, None] + of_anchor),
        cell=places(torch.stack([x, y], dim=2)[:, None].to(anchors.dtype)),
        anchor=places(anchors[None, :, None]),
        boxes=places(boxes[:, None, None]),
        classes=places(batch.classes[:, None, None]),
    )


def _cells_of(centre: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x and y, (T, 3) each, of a centre's own cell and its nearer neighbours in x and in y, and whether they exist."""
    height, width = grid
    (x, near_x, has_x), (y, near_y, has_y) = (
        _along_side(*side) for side in ((centre[:, 0], width), (centre[:, 1], height))
    )
    exists = torch.stack([torch.ones_like(has_x), has_x, has_y], dim=1)
    return torch.stack([x, near_x, x], dim=1), torch.stack([y, y, near_y], dim=1), exists


def _along_side(centre: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) the own cell, the nearer neighbour, and whether there is one; where there is none, it is the own cell."""
    own = centre.long().clamp(0, cells - 1)  # a box may end at the far edge
    fraction = centre - own
    near = own + (fraction > 0.5).long() - (fraction < 0.5).long()
    exists = (near != own) & (near >= 0) & (near < cells)
    return own, torch.where(exists, near, own), exists


def _of_one(values: Tensor) -> Tensor:
    return values


def detection_losses(
    predictions: Sequence[Tensor],
    batch: Batch,
    head: HeadSpec,
    gains: LossGains,
    *,
    detached: Detached | None = None,
    over_ranks: Callable[[Tensor], Tensor] = _of_one,
) -> Losses:
    """The losses of a batch from the head's raw outputs, L tensors (B, A, h, w, 5 + C).

    Computed in float32, or float64 when the predictions are. `detached` replaces what would be derived. Nothing here
    waits for the device, and every shape follows from those of the arguments.

    Of a batch that is a part of one which several ranks share, they are the part of the whole one's losses: means are
    taken over all its matches, which `over_ranks` sums up, and all its cells. Parts add up to the losses of the whole.
    """
    part = batch.part or Part(len(predictions[0]), len(predictions[0]))
    matches = _matches_for(predictions, batch, head, gains)
    matched, objectness_logits = _Gather.apply(matches.rows, *map(_in_memory_order, predictions))
    parts = ciou_parts(_decode_matched(matched, matches), matches.boxes)
    constants = detached or _detach(parts, matches, len(objectness_logits))

    by_level = (len(predictions), len(matches.holds) // len(predictions))
    holds = matches.holds.view(by_level)
    counts = over_ranks(holds.sum(1)).clamp(min=1)  # (L,)

    def mean_of_matches(values: Tensor) -> Tensor:
        return (torch.where(holds, values.view(by_level), 0).sum(1) / counts).sum()

    box = mean_of_matches(1 - ciou(parts, constants.ciou_factor)) * gains.box
    classification = box.new_zeros(())
    if head.num_classes > 1:
        classification = mean_of_matches(_class_loss(matched[:, 5:], matches.classes, gains)) * gains.classification
    each = _binary_cross_entropy(objectness_logits, constants.objectness, gains.obj_pw, gains.fl_gamma)
    per_level = each.split([level[..., 0].numel() for level in predictions])
    objectness = sum(weight * loss.mean() for weight, loss in zip(gains.level, per_level))
    objectness = objectness * (gains.objectness * part.share)
    return Losses(
        box=box.detach(),
        objectness=objectness.detach(),
        classification=classification.detach(),
        total=(box + objectness + classification) * (part.whole * gains.total),
    )


def pad_labels(batch: Batch) -> Batch:
    """The batch with labels up to a power of two, of boxes without area, which no anchor matches.

    Shapes then repeat from batch to batch, as a compiler of shapes or a CUDA graph wants them.
    """
    missing = max(_FEWEST_LABELS, 1 << (len(batch.boxes) - 1).bit_length()) - len(batch.boxes)

    def padded(labels: Tensor) -> Tensor:
        return torch.cat([labels, labels.new_zeros(missing, *labels.shape[1:])])

    return replace(batch, boxes=padded(batch.boxes), classes=padded(batch.classes), image_of=padded(batch.image_of))


def detach(predictions: Sequence[Tensor], batch: Batch, head: HeadSpec, gains: LossGains) -> Detached:
    """What `detection_losses` holds constant for these predictions."""
    matches = _matches_for(predictions, batch, head, gains)
    matched, objectness_logits = _Gather.apply(
        matches.rows, *(_in_memory_order(level).detach() for level in predictions)
    )
    return _detach(ciou_parts(_decode_matched(matched, matches), matches.boxes), matches, len(objectness_logits))


def _matches_for(predictions: Sequence[Tensor], batch: Batch, head: HeadSpec, gains: LossGains) -> Matches:
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    return match_labels(batch, head, [tuple(level.shape[2:4]) for level in predictions], gains.anchor_t, dtype=dtype)


def _in_memory_order(level: Tensor) -> Tensor:
    """(B, A, h, w, 5 + C) -> (B * h * w * A, 5 + C), a view where the network's maps are channels-last."""
    return level.permute(0, 2, 3, 1, 4).reshape(-1, level.shape[-1])


class _Gather(torch.autograd.Function):
    """Rows (M, 5 + C) and the objectness column (N,) of predictions (N, 5 + C), in float32 or wider.

    torch's own gradient would fill, per level and for each of the two, a float32 tensor as large as the predictions.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *levels: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.like = [(level.shape, level.dtype) for level in levels]
        wide = torch.promote_types(levels[0].dtype, torch.float32)
        matched = [level.index_select(0, local) for level, local in zip(levels, _local_rows(rows, ctx.like))]
        return torch.cat(matched).to(wide), torch.cat([level[:, 4] for level in levels]).to(wide)

    @staticmethod
    def backward(ctx: Any, for_matched: Tensor, for_objectness: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        columns = for_objectness.split([shape[0] for shape, _ in ctx.like])
        gradients = []
        for local, part, column, (shape, dtype) in zip(
            _local_rows(rows, ctx.like), for_matched.chunk(len(ctx.like)), columns, ctx.like
        ):
            gradient = part.new_zeros(shape, dtype=dtype)
            # in a fixed order on the CPU, which indexing is not; what meets in one row adds up in its precision
            gradient.index_add_(0, local, part.to(dtype))
            gradient[:, 4] += column
            gradients.append(gradient)
        return None, *gradients


def _local_rows(rows: Tensor, like: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """The rows of each level, counted within it."""
    starts = itertools.accumulate((shape[0] for shape, _ in like[:-1]), initial=0)
    return [part - start for part, start in zip(rows.chunk(len(like)), starts)]


def _detach(parts: tuple[Tensor, Tensor, Tensor], matches: Matches, num_predictions: int) -> Detached:
    iou, distance, aspect = (part.detach() for part in parts)
    factor = ciou_factor(iou, aspect)
    score = torch.where(matches.holds, ciou((iou, distance, aspect), factor).clamp(min=0), 0)
    target = score.new_zeros(num_predictions)
    # of several labels in one place the largest target wins, whatever their order
    target.scatter_reduce_(0, matches.rows, score, "amax")
    return Detached(ciou_factor=factor, objectness=target)


def _decode_matched(raw: Tensor, matches: Matches) -> Tensor:
    """(M, 4) xyxy in cells of matched raw predictions (M, 5 + C)."""
    centre = 2 * raw[:, :2].sigmoid() - 0.5 + matches.cell
    size = (2 * raw[:, 2:4].sigmoid()).square() * matches.anchor
    return xyxy_from_cxcywh(torch.cat([centre, size], dim=1))


def _class_loss(logits: Tensor, classes: Tensor, gains: LossGains) -> Tensor:
    """(M,) means over classes, logits (M, C)."""
    smoothing = gains.label_smoothing
    target = torch.full_like(logits, smoothing / 2)
    target.scatter_(1, classes[:, None], 1 - smoothing / 2)
    return _binary_cross_entropy(logits, target, gains.cls_pw, gains.fl_gamma).mean(1)


def _binary_cross_entropy(logits: Tensor, target: Tensor, positive_weight: float, gamma: float) -> Tensor:
    """Element-wise BCE; gamma > 0 makes it focal (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""
    weight = None if positive_weight == 1 else logits.new_full((), positive_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if gamma == 0:
        return loss
    missed = target * (-logits).sigmoid() + (1 - target) * logits.sigmoid()  # 1 - p_t without cancellation
    missed = missed.clamp(min=torch.finfo(logits.dtype).tiny)  # for gamma < 1 the slope at 0 is infinite
    alpha = target * _FOCAL_ALPHA + (1 - target) * (1 - _FOCAL_ALPHA)
    return loss * alpha * missed**gamma
