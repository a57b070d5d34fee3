"""How much private memory loader processes gain by the labels of very many images, as a line of JSON. Linux only.

    python -m benchmarks.label_memory --images 1000000 --start spawn

The images are invented: one 64x64 file under a million paths in a scan's cache, 5 boxes each. Private memory is
Private_Dirty of /proc/PID/smaps_rollup, that of each loader process after its first batch and after its last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import torch

from utils.data.images import BaseImages
from utils.data.loader import TrainBatches, TrainStream
from utils.data.store import map_store, plain_store
from utils.files import read_arrays, write_arrays
from utils.hyp import Hyperparameters
from utils.structures import LabelStore

_BOXES = 5
_BATCH = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shown", type=int, default=1_000, help="images that the loader gives out in the run")
    parser.add_argument("--start", choices=multiprocessing.get_all_start_methods(), default="fork")
    parser.add_argument("--image-weights", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.set_start_method(flags.start)
    with tempfile.TemporaryDirectory(prefix="bench-labels-") as folder:
        store = _store(Path(folder), flags.images)
        print(json.dumps(_measured(store, flags) | {"start": flags.start, "images": flags.images}), flush=True)


def _store(folder: Path, images: int) -> LabelStore:
    """A store as a scan leaves it: mapped from a file."""
    image = folder / "image.png"
    cv2.imwrite(str(image), np.full((64, 64, 3), 128, np.uint8))
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (images * _BOXES, 2))
    store = plain_store(
        np.full((images, 2), 64, np.int32),
        boxes=np.concatenate([corners, corners + rng.uniform(3, 20, corners.shape)], 1),
        classes=rng.integers(0, 80, len(corners)),
        offsets=np.arange(images + 1) * _BOXES,
    )
    arrays = {item.name: getattr(store, item.name) for item in fields(LabelStore)}
    name = np.frombuffer(str(image).encode(), np.uint8)
    arrays["path_bytes"], arrays["path_offsets"] = np.tile(name, images), np.arange(images + 1) * len(name)
    write_arrays(folder / "labels.cache", arrays, {"key": ""})
    return map_store(folder / "labels.cache", "", read_arrays(folder / "labels.cache")[0])


def _measured(store: LabelStore, flags: argparse.Namespace) -> dict[str, object]:
    batches = TrainBatches(
        store=store,
        imgsz=64,
        batch_size=_BATCH,
        hyp=Hyperparameters(),
        seed=0,
        images=BaseImages(store=store, imgsz=64),
    )
    stream = TrainStream(batches, end_epoch=1, workers=2, image_weights=flags.image_weights, num_classes=80)
    before, epoch = _private_mb("self"), stream.epoch(0, [0.5] * 80 if flags.image_weights else ())
    next(epoch)
    first = _workers_mb()
    for _ in range(flags.shown // _BATCH - 1):
        next(epoch)
    time.sleep(0.5)
    last = _workers_mb()
    grown = {f"{what}_mb": [round(value, 1) for value in values] for what, values in (("first", first), ("last", last))}
    return grown | {"main_before_mb": round(before, 1), "main_after_mb": round(_private_mb("self"), 1)}


def _workers_mb() -> list[float]:
    return [_private_mb(str(child.pid)) for child in multiprocessing.active_children()]


def _private_mb(process: str) -> float:
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no Private_Dirty in smaps_rollup")


if __name__ == "__main__":
    main()
