"""One process: CPU time that a training sample takes, from its plan to its place in a batch.

    python -m benchmarks.sample --data ../shared/datasets/bccd/bccd.yaml --imgsz 640 --cache ram

`ram`: base images lie decoded in memory, as with `--cache ram`; `files`: each is read and decoded when a tile shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import cv2
import numpy as np
import torch

from benchmarks.measuring import AUGMENTATION, cpu_milliseconds, loading_flags
from utils.data.images import base_image
from utils.data.plan import generator, train_plan
from utils.data.render import render
from utils.data.scan import open_dataset, scan_split
from utils.hyp import hyperparameters
from utils.structures import LabelStore

_BATCH_SIZE = 16


def main() -> None:
    flags = loading_flags(__doc__).parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in a loader process
    store, _ = scan_split(open_dataset(flags.data, note=lambda line: None), "train")
    figures = cpu_milliseconds(_sampler(store, flags.imgsz, flags.cache), flags.samples)
    print(json.dumps({**figures, "opencv": cv2.__version__}), flush=True)


def _sampler(store: LabelStore, imgsz: int, cache: str) -> Callable[[int], None]:
    """Makes sample after sample of epoch after epoch; every sixteenth opens a new batch."""
    hyp = hyperparameters(AUGMENTATION, source="benchmark")
    kept = [base_image(store.path(image), imgsz) for image in range(len(store))] if cache == "ram" else None
    base_image_of = kept.__getitem__ if kept else lambda image: base_image(store.path(image), imgsz)
    batches = [np.empty((_BATCH_SIZE, imgsz, imgsz, 3), np.uint8)]

    def make(number: int) -> None:
        epoch, position = divmod(number, len(store))
        if number % _BATCH_SIZE == 0:
            batches[0] = np.empty((_BATCH_SIZE, imgsz, imgsz, 3), np.uint8)
        rng = generator(0, epoch, position)
        plan = train_plan(store, position, imgsz=imgsz, hyp=hyp, rng=rng)
        render(plan, base_image_of, batches[0][number % _BATCH_SIZE])

    return make


if __name__ == "__main__":
    main()
