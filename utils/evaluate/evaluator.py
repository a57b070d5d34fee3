"""Evaluates a model on a split: network, NMS, back to source pixels, matching, metrics.

Works on a fused fp32 copy, so the model that is handed in, and the random state, are the same bytes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.yolo import DetectionModel, decode, fused
from utils.data.loader import EvalBatches, Stream
from utils.evaluate.matching import Labels
from utils.evaluate.metrics import Evidence, collect, compute_metrics, merge
from utils.evaluate.nms import non_max_suppression
from utils.loss import LossGains, detection_losses
from utils.runtime import Runtime
from utils.structures import Batch, Detections, Losses, LossMeans, Metrics

OnBatch = Callable[[int, Batch, list[Detections]], None]  # index, batch, detections in network px
Watch = Callable[[Stream], Iterable[Batch]]  # wraps the batches, as a progress bar does


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Calling it with a model yields Metrics."""

    batches: EvalBatches
    names: tuple[str, ...]
    runtime: Runtime
    confidence: float = 0.001
    iou: float = 0.6
    max_detections: int = 300
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        stream = Stream(
            self.batches,
            self.batches.numbers(),
            workers=min(self.runtime.workers, len(self.batches.numbers())),
            pin_memory=self.runtime.pin_memory,
        )
        object.__setattr__(self, "stream", stream)

    @torch.no_grad()
    def __call__(
        self,
        model: DetectionModel,
        *,
        gains: LossGains | None = None,
        on_batch: OnBatch | None = None,
        watch: Watch | None = None,
    ) -> Metrics:
        """Metrics on the split; with `gains` the losses too. `on_batch` sees each batch, for pictures."""
        network = for_evaluation(model, self.runtime)
        evidence: list[Evidence] = []
        losses = torch.zeros(3, dtype=torch.float64)
        for index, batch in enumerate(watch(self.stream) if watch else self.stream):
            detections, part = self._detect(network, batch, gains)
            if part:
                losses += len(batch.images) * torch.stack([part.box, part.objectness, part.classification]).cpu()
            if on_batch:
                on_batch(index, batch, detections)
            evidence.append(self._collect(batch, detections))
        box, objectness, classification = (losses / len(self.batches.store)).tolist()
        means = LossMeans(box=box, objectness=objectness, classification=classification) if gains else None
        return compute_metrics(merge(evidence), self.names, losses=means)

    def _detect(
        self, network: DetectionModel, batch: Batch, gains: LossGains | None
    ) -> tuple[list[Detections], Losses | None]:
        predictions, losses = predicted(network, batch, self.runtime, gains)
        detections = non_max_suppression(
            predictions, confidence=self.confidence, iou=self.iou, max_detections=self.max_detections
        )
        return detections, losses

    def _collect(self, batch: Batch, detections: list[Detections]) -> Evidence:
        store, images = self.batches.store, batch.indices.tolist()
        in_source = [
            to_source(one, placement, tuple(store.sizes[image]))
            for one, placement, image in zip(detections, batch.placements, images)
        ]
        return collect(images, in_source, [Labels.of(store, image) for image in images], len(self.names))


def for_evaluation(model: DetectionModel, runtime: Runtime) -> DetectionModel:
    """A copy of `model` as it is evaluated, on the device of `runtime`."""
    return fused(model).to(runtime.device, memory_format=torch.channels_last)


def predicted(
    network: DetectionModel, batch: Batch, runtime: Runtime, gains: LossGains | None
) -> tuple[Tensor, Losses | None]:
    """Decoded predictions (B, P, 5 + C) of a batch, and its losses where there are `gains`."""
    batch = batch.to(runtime.device)
    with runtime.autocast():
        raw = network(runtime.network_input(batch.images))
    losses = detection_losses(raw, batch, network.head, gains) if gains else None
    return decode(raw, network.head), losses


def evaluated_at_once(batch_size: int) -> int:
    """Images per batch of the evaluations in a run that trains on `batch_size`."""
    return 2 * batch_size


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
