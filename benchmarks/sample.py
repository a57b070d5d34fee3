"""One process: CPU time that a training sample takes, from its plan to a batch with its labels.

    python -m benchmarks.sample --data ../shared/datasets/bccd/bccd.yaml --imgsz 640 --cache ram

`ram`: base images come from the memory of `--cache ram`; `files`: each is read and decoded when a tile shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import cv2
import torch

from benchmarks.measuring import AUGMENTATION, cpu_milliseconds, loading_flags
from utils.data.cache import cached_images
from utils.data.images import BaseImages
from utils.data.loader import TrainBatches
from utils.data.scan import open_dataset, scan_split
from utils.hyp import hyperparameters

_BATCH_SIZE = 16


def main() -> None:
    flags = loading_flags(__doc__).parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in a loader process
    batches = _batches(flags.data, flags.imgsz, flags.cache)
    samples = -(-flags.samples // batches.batch_size) * batches.batch_size
    figures = cpu_milliseconds(_sampler(batches), samples)
    print(json.dumps({**figures, "opencv": cv2.__version__}), flush=True)


def _batches(data: str, imgsz: int, cache: str) -> TrainBatches:
    spec = open_dataset(data, note=lambda line: None)
    store, _ = scan_split(spec, "train")
    images = BaseImages(store=store, imgsz=imgsz)
    if cache == "ram":
        images = cached_images({"train": images}, "ram", spec=spec)["train"]
    hyp = hyperparameters(AUGMENTATION, source="benchmark")
    batch_size = min(_BATCH_SIZE, len(store))
    return TrainBatches(store=store, images=images, imgsz=imgsz, batch_size=batch_size, hyp=hyp, seed=0)


def _sampler(batches: TrainBatches) -> Callable[[int], None]:
    """The first sample of a batch makes all of it; whole batches only, epoch after epoch."""
    size = batches.batch_size

    def make(number: int) -> None:
        if number % size == 0:
            epoch, index = divmod(number // size, len(batches.store) // size)
            batches.batch_of(batches.lot(epoch, index, batches.order(epoch)))

    return make


if __name__ == "__main__":
    main()
