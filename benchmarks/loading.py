"""One process: how many augmented training images per second the loader delivers when nobody else wants the cores.

By hand: `python -m benchmarks.loading --data data/shapes.yaml --imgsz 160 --workers 2`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from typing import Any

from benchmarks.product import built_trainer
from utils.data.loader import Stream, TrainStream
from utils.structures import Batch

_SETTLED = 0.25  # of the batches pass before the clock starts: processes begin with some made in advance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", default="data/shapes.yaml")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=96)
    flags = parser.parse_args()
    options = {"data": flags.data, "imgsz": flags.imgsz, "batch_size": flags.batch_size, "workers": flags.workers}
    with built_trainer(**options, epochs=flags.batches, device="cpu", noautoanchor=True) as trainer:
        print(json.dumps(_figures(trainer.stream, flags.batches)), flush=True)


def _figures(stream: Stream | TrainStream, batches: int) -> dict[str, Any]:
    start, arrivals, images = time.perf_counter(), [], []
    for batch in itertools.islice(_through_epochs(stream), batches):
        arrivals.append(time.perf_counter())
        images.append(len(batch.images))
    settled = int(_SETTLED * batches)
    return {
        "images_per_second": sum(images[settled + 1 :]) / (arrivals[-1] - arrivals[settled]),
        "first_batch_seconds": arrivals[0] - start,
        "batches": len(images),
        "workers": stream.workers,
    }


def _through_epochs(stream: Stream | TrainStream) -> Iterable[Batch]:
    if isinstance(stream, Stream):  # as a Trainer had it before it had a TrainStream
        return stream
    return itertools.chain.from_iterable(map(stream.epoch, itertools.count()))


if __name__ == "__main__":
    main()
