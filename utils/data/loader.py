"""Batches in order: which images make a batch, and a stream of them from loader processes.

A batch is a pure function of its number, so as many processes as you like yield the same stream. One stream serves a
whole run: the processes already work on the next epoch while this one is evaluated.
"""

from __future__ import annotations

import functools
import math
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.data.images import ImageError, base_image
from utils.data.plan import epoch_order, generator, letterbox_plan, source_to_network, train_plan
from utils.data.render import render
from utils.hyp import Hyperparameters
from utils.structures import Batch, LabelStore, SamplePlan, UserError

_PREFETCH = 4  # batches that each loader process works ahead
_SHARED_MEMORY = Path("/dev/shm")  # Linux; torch hands batches from process to process through it


class Batches(Protocol):
    """Batches by number. `batch_bytes` is what the images of one take at most."""

    batch_size: int
    batch_bytes: int

    def batch(self, number: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """The augmented batches of a training run, numbered through all epochs. The last one of an epoch may be smaller."""

    store: LabelStore
    imgsz: int
    batch_size: int
    hyp: Hyperparameters
    seed: int

    @property
    def batch_bytes(self) -> int:
        return self.batch_size * 3 * self.imgsz**2

    @property
    def per_epoch(self) -> int:
        return -(-len(self.store) // self.batch_size)

    def numbers(self, start_epoch: int, end_epoch: int) -> range:
        return range(start_epoch * self.per_epoch, end_epoch * self.per_epoch)

    def batch(self, number: int) -> Batch:
        epoch, index = divmod(number, self.per_epoch)
        start = index * self.batch_size
        images = _cached_order(self.seed, epoch, len(self.store))[start : start + self.batch_size]
        plans = [
            train_plan(
                self.store, int(image), imgsz=self.imgsz, hyp=self.hyp, rng=generator(self.seed, epoch, start + offset)
            )
            for offset, image in enumerate(images)
        ]
        return _assemble(plans, images, self.store, self.imgsz)


_cached_order = functools.lru_cache(maxsize=2)(epoch_order)


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """Every image of a split once, letterboxed. Images of like aspect share a batch and its shape."""

    store: LabelStore
    imgsz: int
    batch_size: int
    stride: int

    @property
    def batch_bytes(self) -> int:
        return self.batch_size * 3 * (self.imgsz + 2 * self.stride) ** 2

    def numbers(self) -> range:
        return range(-(-len(self.store) // self.batch_size))

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """(I,) images by their ratio of height to width."""
        return np.argsort(self.store.sizes[:, 0] / self.store.sizes[:, 1], kind="stable")

    def batch(self, number: int) -> Batch:
        images = self._order[number * self.batch_size : (number + 1) * self.batch_size]
        sizes = self.store.sizes[images]
        shape = self._shape(sizes[:, 0] / sizes[:, 1])
        plans = [letterbox_plan(self.store, int(image), shape=shape, imgsz=self.imgsz) for image in images]
        batch = _assemble(plans, images, self.store, self.imgsz, area=True)
        placements = np.stack([source_to_network(self.store, plan, self.imgsz) for plan in plans])
        return replace(batch, placements=torch.from_numpy(placements))

    def _shape(self, aspect: np.ndarray) -> tuple[int, int]:
        """Height and width that hold images of these ratios height / width, with half a stride or more to spare."""
        ratios = (min(aspect.max(), 1.0), min(1 / aspect.min(), 1.0))
        height, width = (int(np.ceil(self.imgsz * ratio / self.stride + 0.5)) * self.stride for ratio in ratios)
        return height, width


def _assemble(
    plans: Sequence[SamplePlan], images: np.ndarray, store: LabelStore, imgsz: int, *, area: bool = False
) -> Batch:
    def load(image: int) -> np.ndarray:
        path = store.path(image)
        try:
            return base_image(path, imgsz, area=area)
        except ImageError as error:
            raise UserError(f"{path}: {error}, though it was fine when the data set was scanned") from None

    pixels = np.empty((len(plans), *plans[0].shape, 3), np.uint8)
    for slot, plan in zip(pixels, plans):
        slot[:] = render(plan, load)
    counts = [len(plan.classes) for plan in plans]
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),  # a view: channels last in memory
        boxes=torch.from_numpy(np.concatenate([plan.boxes for plan in plans])),
        classes=torch.from_numpy(np.concatenate([plan.classes for plan in plans]).astype(np.int64)),
        image_of=torch.from_numpy(np.repeat(np.arange(len(plans)), counts)),
        indices=torch.from_numpy(images.astype(np.int64)),
    )


# ---- stream -------------------------------------------------------------------------------------------------------


class Stream:
    """Iterating yields the batches of `numbers` in order, as often as asked, made by `workers` processes (0: in here).

    The processes live as long as the stream; there are fewer where shared memory is too small for the batches they work
    ahead. Leaves the global random state alone. Raises UserError when an image has vanished since the scan.
    """

    def __init__(self, batches: Batches, numbers: Sequence[int], *, workers: int, pin_memory: bool = False):
        self.batch_size = batches.batch_size
        self.workers, prefetch = _within_shared_memory(workers, batches.batch_bytes)
        self._loader = DataLoader(
            _NumberedBatches(batches),
            sampler=numbers,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=prefetch,
            persistent_workers=self.workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default draws from the global one
            collate_fn=_unchanged,
        )

    def __len__(self) -> int:
        return len(self._loader.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for result in self._loader:
            if isinstance(result, _Failure):
                raise UserError(result.message)
            yield result


def _within_shared_memory(workers: int, batch_bytes: int) -> tuple[int, int | None]:
    """As many processes, and batches ahead for each, as a quarter of the free shared memory holds.

    A container has 64 MB of it unless told otherwise, and a run has two streams. (0, None) where not even a batch fits.
    """
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else math.inf
    slots = free / 4 / batch_bytes
    workers = int(min(workers, slots))
    return (workers, int(min(_PREFETCH, slots // workers))) if workers else (0, None)


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a loader process, which could only hand on a traceback."""

    message: str


class _NumberedBatches(Dataset):
    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, number: int) -> Batch | _Failure:
        try:
            return self.batches.batch(number)
        except UserError as error:
            return _Failure(str(error))
        except MemoryError:
            return _Failure("a loader process is out of memory: lower --workers, --batch-size or --imgsz")


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer, once
    cv2.setNumThreads(0)


def _unchanged(item: Iterable) -> Iterable:
    return item
