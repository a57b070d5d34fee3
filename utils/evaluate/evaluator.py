"""Evaluates a model on a split: network, NMS, back to source pixels, matching, metrics.

Works on a fused fp32 copy, so the model that is handed in, and the random state, are the same bytes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from models.yolo import DetectionModel
from utils.data.loader import EvalBatches, Stream
from utils.evaluate.matching import Labels
from utils.evaluate.metrics import Evidence, collect, compute_metrics, merge
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.evaluate.predict import for_evaluation, predicted, to_source
from utils.loss import LossGains
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
    rules: NmsRules = NmsRules()
    augment: bool = False
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
        predictions, losses = predicted(network, batch, self.runtime, gains=gains, augment=self.augment)
        return non_max_suppression(predictions, self.rules).detections, losses

    def _collect(self, batch: Batch, detections: list[Detections]) -> Evidence:
        store, images = self.batches.store, batch.indices.tolist()
        in_source = [
            to_source(one, placement, tuple(store.sizes[image]))
            for one, placement, image in zip(detections, batch.placements, images)
        ]
        return collect(images, in_source, [Labels.of(store, image) for image in images], len(self.names))


def evaluated_at_once(batch_size: int) -> int:
    """Images per batch of the evaluations in a run that trains on `batch_size`."""
    return 2 * batch_size
