"""One rank of several: a training step that talks to the others, and the same step that keeps its gradients to itself.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.rank_step --imgsz 320 --batch-size 16

`--batch-size` counts the images of all ranks. Rank 0 answers with a line of JSON. A step is that of `benchmarks.step`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.measuring import LEARNING_RATE, MOMENTUM, NUM_CLASSES, step_flags, synthetic_batches
from benchmarks.step import as_batch
from models.yolo import DetectionModel, read_network
from utils.data.loader import part_of
from utils.hyp import Hyperparameters
from utils.loss import LossGains
from utils.ranks import Ranks
from utils.runtime import Runtime, choose_runtime, join_ranks
from utils.structures import Batch, Part
from utils.train.optim import StepSettings, make_optimizer
from utils.train.step import TrainStep

_TURNS = 5  # of each kind of step


def main() -> None:
    flags = step_flags(__doc__).parse_args()
    ranks = join_ranks()
    torch.set_num_threads(flags.threads)
    runtime = choose_runtime(device=flags.device, amp=flags.amp, workers=0, ranks=ranks)
    figures = _figures(runtime, flags)
    if ranks.speaks:
        print(json.dumps(figures), flush=True)
    ranks.leave()


def _figures(runtime: Runtime, flags: argparse.Namespace) -> dict[str, Any]:
    ranks = runtime.ranks
    whole = [as_batch(batch, pin=runtime.pin_memory) for batch in synthetic_batches(flags.imgsz, flags.batch_size)]
    batches = [share(batch, ranks.rank, ranks.count) for batch in whole]
    counted = Counted(ranks)
    first = _step(replace(runtime, ranks=counted), flags, batches)
    first(0)
    counted.sizes.clear()  # of the first step, after which DistributedDataParallel fills its buckets anew
    first(1)
    kinds = {
        "talking": _step(runtime, flags, batches),
        "silent": _step(replace(runtime, ranks=Silent(ranks.count)), flags, batches),
        "alone": lambda number: [ranks.sum(tensor) for tensor in parcels],
    }
    parcels = [torch.zeros(size // 4, device=runtime.device) for sizes in counted.sizes.values() for size in sizes]
    seconds = _in_turn(kinds, runtime, warmup=flags.warmup, steps=flags.steps)
    return {
        "sizes": dict(counted.sizes),
        "bytes": sum(map(sum, counted.sizes.values())),
        "seconds": {kind: statistics.median(of_kind) for kind, of_kind in seconds.items()},
        "all_seconds": {kind: [round(second, 6) for second in of_kind] for kind, of_kind in seconds.items()},
        "ranks": ranks.count,
        "threads": torch.get_num_threads(),
        "device": runtime.description,
    }


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    """A rank's part of a batch."""
    own = part_of(len(batch.images), rank, ranks)
    mine = (batch.image_of >= own.start) & (batch.image_of < own.stop)
    return Batch(
        images=batch.images[own.start : own.stop],
        boxes=batch.boxes[mine],
        classes=batch.classes[mine],
        image_of=batch.image_of[mine] - own.start,
        indices=batch.indices,
        part=Part(len(own), len(batch.images)),
    )


def _step(runtime: Runtime, flags: argparse.Namespace, batches: Sequence[Batch]) -> Callable[[int], object]:
    """A network of its own, and what trains it on one of the batches."""
    hyp = Hyperparameters()
    model = DetectionModel(read_network(flags.cfg), num_classes=NUM_CLASSES)
    model = model.to(runtime.device, memory_format=torch.channels_last)
    step = TrainStep(
        runtime=runtime,
        model=model,
        optimizer=make_optimizer(model, hyp, weight_decay=hyp.weight_decay),
        gains=LossGains.for_head(hyp, model.head, flags.imgsz),
    )
    settings = StepSettings(lrs=(LEARNING_RATE,) * 3, momentum=MOMENTUM, update=True)
    return lambda number: step(batches[number % len(batches)], settings)


def _in_turn(
    kinds: dict[str, Callable[[int], object]], runtime: Runtime, *, warmup: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each step, of the rank that took longest; kinds take turns, a few steps each."""
    ranks, seconds = runtime.ranks, defaultdict(list)
    for turn in range(_TURNS + 1):
        for kind, step in kinds.items():
            for number in range(steps if turn else warmup):
                ranks.gather(None)  # all begin at once
                start = time.perf_counter()
                step(number)
                if runtime.queues_work:
                    torch.cuda.synchronize()
                lasted = max(ranks.gather(time.perf_counter() - start))
                if turn:
                    seconds[kind].append(lasted)
    return seconds


# ---- ranks ----------------------------------------------------------------------------------------------------------


class Counted(Ranks):
    """Other ranks, and the bytes of each all-reduce among them, by what it is for."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.rank, self.count = ranks, ranks.rank, ranks.count
        self.sizes: dict[str, list[int]] = defaultdict(list)

    def sum(self, tensor: Tensor) -> Tensor:
        self.sizes["losses and matches"].append(tensor.nbytes)
        return self._ranks.sum(tensor)

    def mean(self, tensor: Tensor, weight: float) -> Tensor:
        self.sizes["batch norms"].append(tensor.nbytes)
        return self._ranks.mean(tensor, weight)

    def replicas(self, model: nn.Module) -> nn.Module:
        network = self._ranks.replicas(model)
        network.register_comm_hook(None, self._reduced)
        return network

    def _reduced(self, state, bucket):  # torch would compare annotations with types, and they are strings here
        self.sizes["gradients"].append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)


class Silent(Ranks):
    """As many ranks, but this one takes what it has for what all have: the work of a step without its talk."""

    def __init__(self, count: int) -> None:
        self.count = count

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.count)

    def mean(self, tensor: Tensor, weight: float) -> Tensor:
        return tensor


if __name__ == "__main__":
    main()
