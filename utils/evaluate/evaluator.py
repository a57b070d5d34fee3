"""Evaluates a model on a split: network, NMS, back to source pixels, matching, metrics.

Works on a fused fp32 copy, so the model that is handed in, and the random state, are the same bytes afterwards. Of
several ranks each takes its share of the batches; what they saw is put together in the order of the batches, so that
all of them end with the very figures of a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import numpy as np
import torch

from models.yolo import DetectionModel
from utils.clock import EVALUATION_PARTS, StepClock, TimeSplit
from utils.data.loader import EvalBatches, Stream
from utils.evaluate.matching import Labels
from utils.evaluate.metrics import Evidence, collect, compute_metrics, merge
from utils.evaluate.nms import NmsRules, Suppressed, non_max_suppression, prepare_nms
from utils.evaluate.predict import for_evaluation, predicted, to_source
from utils.evaluate.saving import coco_ids
from utils.evaluate.worst import worst_images
from utils.loss import LossGains
from utils.runtime import Runtime
from utils.structures import Batch, Detections, Losses, LossMeans, Metrics

_MOST_AT_ONCE = 32  # images: more are no faster

OnBatch = Callable[[int, Batch, list[Detections]], None]  # number of the batch, batch, detections in network px
Watch = Callable[[Stream], Iterable[Batch]]  # wraps the batches, as a progress bar does


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found out, of all ranks together."""

    metrics: Metrics
    evidence: Evidence
    times: TimeSplit  # split into EVALUATION_PARTS; of several ranks the sum
    cut: int  # images with more candidates than NMS looks at


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one batch showed."""

    number: int  # of the batch
    evidence: Evidence
    losses: np.ndarray  # (3,) f64 box, objectness, classification, times the images; 0 where nobody asked
    cut: int  # images
    non_finite: int  # images


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Calling it with a model yields Metrics."""

    batches: EvalBatches
    names: tuple[str, ...]
    runtime: Runtime
    rules: NmsRules = NmsRules()
    augment: bool = False
    merge_classes: bool = False  # those of the network into one, the best of each anchor; without losses
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        stream = Stream(
            self.batches,
            self._numbers,
            workers=min(self.runtime.workers, len(self._numbers)),
            pin_memory=self.runtime.pin_memory,
            sharers=self.runtime.ranks.local_count,
        )
        object.__setattr__(self, "stream", stream)

    @property
    def _numbers(self) -> range:
        """The batches of this rank."""
        return self.batches.numbers()[self.runtime.ranks.rank :: self.runtime.ranks.count]

    def __call__(
        self,
        model: DetectionModel,
        *,
        gains: LossGains | None = None,
        on_batch: OnBatch | None = None,
        watch: Watch | None = None,
    ) -> Metrics:
        """Metrics on the split; see `evaluation`."""
        return self.evaluation(model, gains=gains, on_batch=on_batch, watch=watch).metrics

    @torch.no_grad()
    def evaluation(
        self,
        model: DetectionModel,
        *,
        gains: LossGains | None = None,
        on_batch: OnBatch | None = None,
        shown: int = 0,
        watch: Watch | None = None,
    ) -> Evaluation:
        """All that is found out on the split; with `gains` the losses too.

        `on_batch` sees each batch of this rank, for pictures, and of the first `shown` those of other ranks as well.
        """
        network, seen = self._prepared(model), []
        clock = self.runtime.step_clock(EVALUATION_PARTS)
        for number, batch in self._loaded(clock, watch):
            suppressed, losses = self._detect(network, batch, clock, gains)
            if on_batch:
                on_batch(number, batch, suppressed.detections)
            seen.append(self._seen(number, batch, suppressed, losses))
        times = clock.split()
        if on_batch:
            for number in sorted(set(self.batches.numbers()[:shown]) - set(self._numbers)):
                batch = self.batches.batch(number)
                on_batch(number, batch, self._detect(network, batch, clock, None)[0].detections)
        return self._concluded(seen, times, with_losses=gains is not None)

    @torch.no_grad()
    def measured(self, model: DetectionModel, *, watch: Watch | None = None) -> TimeSplit:
        """How long the images take, without figures; the first batch, in which all gets going, unless it is alone."""
        network = self._prepared(model)
        clock = self.runtime.step_clock(EVALUATION_PARTS)
        for number, batch in self._loaded(clock, watch):
            self._detect(network, batch, clock, None)
            if number == self._numbers[0] and len(self._numbers) > 1:
                clock.split()
        return clock.split()

    def _prepared(self, model: DetectionModel) -> DetectionModel:
        """What is evaluated; nothing that is done but once on a machine is left for the clock to count."""
        prepare_nms(self.runtime.device)
        return for_evaluation(model, self.runtime)

    def _loaded(self, clock: StepClock, watch: Watch | None) -> Iterator[tuple[int, Batch]]:
        """The batches of this rank with their numbers, and the wait for each on the clock."""
        batches = iter(watch(self.stream) if watch else self.stream)
        numbers = iter(self._numbers)
        while True:
            with clock.part("load"):
                batch = next(batches, None)
            if batch is None:
                return
            clock.count(len(batch.images))
            yield next(numbers), batch

    def _detect(
        self, network: DetectionModel, batch: Batch, clock: StepClock, gains: LossGains | None
    ) -> tuple[Suppressed, Losses | None]:
        with clock.part("network"):
            predictions, losses = predicted(network, batch, self.runtime, gains=gains, augment=self.augment)
        if self.merge_classes:
            predictions = torch.cat([predictions[..., :5], predictions[..., 5:].amax(-1, keepdim=True)], -1)
        with clock.part("nms"):
            return non_max_suppression(predictions, self.rules), losses

    def _seen(self, number: int, batch: Batch, suppressed: Suppressed, losses: Losses | None) -> _Seen:
        store, images = self.batches.store, batch.indices.tolist()
        in_source = [
            to_source(one, placement, tuple(store.sizes[image]))
            for one, placement, image in zip(suppressed.detections, batch.placements, images)
        ]
        parts = [losses.box, losses.objectness, losses.classification] if losses else [torch.zeros(())] * 3
        return _Seen(
            number=number,
            evidence=collect(images, in_source, [Labels.of(store, image) for image in images], len(self.names)),
            losses=len(images) * torch.stack(parts).double().numpy(force=True),
            cut=int(suppressed.cut.sum()),
            non_finite=int(suppressed.non_finite.sum()),
        )

    def _concluded(self, seen: list[_Seen], times: TimeSplit, *, with_losses: bool) -> Evaluation:
        """What all ranks saw, put together on each of them."""
        store, gathered = self.batches.store, self.runtime.ranks.gather((seen, times))
        everything = sorted((one for seen, _ in gathered for one in seen), key=lambda one: one.number)
        evidence = merge([one.evidence for one in everything])
        box, objectness, classification = (sum(one.losses for one in everything) / len(store)).tolist()
        metrics = compute_metrics(
            evidence,
            self.names,
            losses=LossMeans(box=box, objectness=objectness, classification=classification) if with_losses else None,
            image_ids=coco_ids(store, len(self.names)).images,
        )
        return Evaluation(
            metrics=replace(
                metrics,
                non_finite=sum(one.non_finite for one in everything),
                worst=worst_images(evidence, store, metrics.best_confidence),
            ),
            evidence=evidence,
            times=reduce(add, (times for _, times in gathered)),
            cut=sum(one.cut for one in everything),
        )


def evaluated_at_once(batch_size: int) -> int:
    """Images per batch of the evaluations in a run that trains on `batch_size`, however many ranks share that.

    Figures are the same to the last bit only where batches are, and each rank takes whole ones.
    """
    return min(2 * batch_size, _MOST_AT_ONCE)
