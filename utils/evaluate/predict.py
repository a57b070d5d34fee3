"""From a batch to what the network sees in it, and back to source pixels: evaluation and detection are one here."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.yolo import DetectionModel, decode, fused
from utils.loss import LossGains, detection_losses
from utils.runtime import Runtime
from utils.structures import Batch, Detections, Losses


def for_evaluation(model: DetectionModel, runtime: Runtime) -> DetectionModel:
    """A copy of `model` as it is evaluated, on the device of `runtime`."""
    return fused(model).to(runtime.device, memory_format=torch.channels_last)


def predicted(
    network: DetectionModel, batch: Batch, runtime: Runtime, *, gains: LossGains | None = None, augment: bool = False
) -> tuple[Tensor, Losses | None]:
    """Decoded predictions (B, P, 5 + C) of a batch, and its losses where there are `gains`.

    With `augment` those of enlarged, reduced and mirrored images are among them, in the frame of the batch.
    """
    assert not augment  # to come
    batch = batch.to(runtime.device)
    with runtime.autocast():
        raw = network(runtime.network_input(batch.images))
    losses = detection_losses(raw, batch, network.head, gains) if gains else None
    return decode(raw, network.head), losses


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
