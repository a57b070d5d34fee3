"""From a batch to what the network sees in it, and back to source pixels: evaluation and detection are one here."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.yolo import DetectionModel, decode, fused
from utils.loss import LossGains, detection_losses
from utils.runtime import Runtime
from utils.structures import Batch, Detections, HeadSpec, Losses

_VIEWS = ((1.2, True), (0.83, False))  # of an augmented prediction, beside the batch itself: scale, mirrored
_GREY = 114  # as the letterbox pads


def for_evaluation(model: DetectionModel, runtime: Runtime) -> DetectionModel:
    """A copy of `model` as it is evaluated, on the device of `runtime`."""
    return fused(model).to(runtime.device, memory_format=torch.channels_last)


def predicted(
    network: DetectionModel, batch: Batch, runtime: Runtime, *, gains: LossGains | None = None, augment: bool = False
) -> tuple[Tensor, Losses | None]:
    """Decoded predictions (B, P, 5 + C) of a batch, and its losses where there are `gains`.

    With `augment` those of enlarged, reduced and mirrored images are among them, in the frame of the batch; the losses
    stay those of the batch as it is.
    """
    batch = batch.to(runtime.device)
    head = network.head
    with runtime.autocast():
        raw = network(runtime.network_input(batch.images))
    losses = detection_losses(raw, batch, head, gains) if gains else None
    predictions = decode(raw, head)
    if augment:
        views = [_predicted_in_view(network, head, batch.images, runtime, *view) for view in _VIEWS]
        predictions = torch.cat([predictions, *views], 1)
    return predictions, losses


def _predicted_in_view(
    network: DetectionModel, head: HeadSpec, images: Tensor, runtime: Runtime, scale: float, mirrored: bool
) -> Tensor:
    """Predictions for (B, 3, H, W) u8 images from another view of them, in their own frame.

    A reduced view has its say on what is large, an enlarged one on what is small: the level at the other end is left
    out (on BCCD at 320 px this makes the gain in AP four times as large).
    """
    H, W = images.shape[2:]
    size = max(round(H * scale), 1), max(round(W * scale), 1)
    view = F.interpolate(images.float(), size, mode="bilinear", align_corners=False).round_()
    view = view.flip(3) if mirrored else view
    stride = max(head.strides)
    view = F.pad(view, (0, -size[1] % stride, 0, -size[0] % stride), value=_GREY).to(torch.uint8)
    with runtime.autocast():
        raw = network(runtime.network_input(view.contiguous(memory_format=torch.channels_last)))
    if len(raw) > 1:
        heard = slice(None, -1) if scale > 1 else slice(1, None)
        raw, head = raw[heard], replace(head, strides=head.strides[heard], anchors=head.anchors[heard])
    predictions = decode(raw, head)
    predictions[..., 0:4:2] *= W / size[1]
    predictions[..., 1:4:2] *= H / size[0]
    if mirrored:
        predictions[..., 0:4:2] = W - predictions[..., [2, 0]]
    return predictions


def to_source(detections: Detections, placement: Tensor, size: tuple[int, int]) -> Detections:
    """Detections in network px -> source px, cut to the image of `size` (height, width).

    `placement` (3, 3) moves source px to network px by scale and shift alone.
    """
    scale, shift = placement.diagonal()[:2].repeat(2), placement[:2, 2].repeat(2)
    boxes = (detections.boxes.cpu().double() - shift) / scale
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    return replace(
        detections,
        boxes=boxes.clamp(min=0).minimum(limit).float(),
        scores=detections.scores.cpu(),
        classes=detections.classes.cpu(),
    )
