"""Pure geometry of boxes: formats, the IoU family, and moving boxes between frames.

The functions of the first half take numpy arrays and torch tensors alike; `ciou` needs gradients and is torch only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)


def cxcywh_from_xyxy(boxes: Array) -> Array:
    """(..., 4) corners -> (..., 4) centre, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return _joined((low + high) / 2, high - low)


def xyxy_from_cxcywh(boxes: Array) -> Array:
    """(..., 4) centre, width, height -> (..., 4) corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return _joined(centre - half, centre + half)


def xywh_from_xyxy(boxes: Array) -> Array:
    """(..., 4) corners -> (..., 4) top-left corner, width, height, as COCO files have boxes."""
    return _joined(boxes[..., :2], boxes[..., 2:] - boxes[..., :2])


def _joined(first: Array, second: Array) -> Array:
    if isinstance(first, np.ndarray):
        return np.concatenate([first, second], axis=-1)
    import torch

    return torch.cat([first, second], dim=-1)


def box_area(boxes: Array) -> Array:
    """(..., 4) xyxy -> (...,)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(..., N, 4) and (..., M, 4) xyxy -> (..., N, M). A pair without any area has IoU 0."""
    top_left = np.maximum(first[..., :, None, :2], second[..., None, :, :2])
    bottom_right = np.minimum(first[..., :, None, 2:], second[..., None, :, 2:])
    overlap = (bottom_right - top_left).clip(0).prod(-1)  # (..., N, M)
    union = box_area(first)[..., :, None] + box_area(second)[..., None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def clip_boxes(boxes: np.ndarray, shape: tuple[float, float]) -> np.ndarray:
    """(N, 4) xyxy cut to an image of `shape` (height, width)."""
    height, width = shape
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(..., 2) points through a (3, 3) projective matrix."""
    homogeneous = points @ matrix[:, :2].T + matrix[:, 2]
    return homogeneous[..., :2] / homogeneous[..., 2:]


def transform_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy -> (N, 4) f64: the boxes around the four moved corners."""
    corners = boxes.astype(np.float64)[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    moved = transform_points(corners, matrix)  # (N, 4, 2)
    return np.concatenate([moved.min(1), moved.max(1)], axis=1)


def ciou_parts(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, squared centre distance over squared hull diagonal, and aspect term v, each (M,), of (M, 4) xyxy pairs.

    Zheng et al., "Distance-IoU Loss", AAAI 2020, equations 7 and 9.
    """
    import torch

    tiny = _tiny(boxes)
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    top_left = torch.maximum(boxes[:, :2], targets[:, :2])
    bottom_right = torch.minimum(boxes[:, 2:], targets[:, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(1)
    iou = overlap / (size.prod(1) + target_size.prod(1) - overlap + tiny)

    hull = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    offset = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2
    distance = offset.square().sum(1) / (hull.square().sum(1) + tiny)

    turned, target_turned = (torch.atan2(*sides.clamp(min=tiny).unbind(1)) for sides in (size, target_size))
    aspect = (2 / math.pi * (target_turned - turned)).square()  # a point has no angle, hence the clamp
    return iou, distance, aspect


def _tiny(like: Tensor) -> float:
    """Makes 0 / 0 a 0, in the gradient too, where its square must not vanish; changes no other quotient."""
    import torch

    return torch.finfo(like.dtype).tiny ** 0.5


def ciou_factor(iou: Tensor, aspect: Tensor) -> Tensor:
    """CIoU's trade-off factor v / (1 - IoU + v), equation 11, 0 for equal boxes; a constant for the gradient."""
    return (aspect / (1 - iou + aspect + _tiny(iou))).detach()


def ciou(parts: tuple[Tensor, Tensor, Tensor], factor: Tensor) -> Tensor:
    """(M,) complete IoU from `ciou_parts` and the trade-off factor."""
    iou, distance, aspect = parts
    return iou - distance - factor * aspect
