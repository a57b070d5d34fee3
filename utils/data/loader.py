"""Batches in order: which images make a batch, and a stream of them from loader processes.

A batch is a pure function of its place in the run, so as many processes as you like yield the same stream. Only
--image-weights makes an epoch depend on the evaluation before it; else they already work on it while that one runs.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.data.images import ImageError, base_image
from utils.data.plan import (
    QUAD,
    batch_order,
    class_weights,
    enlarges,
    epoch_order,
    generator,
    image_weights,
    letterbox_plan,
    quad_plan,
    source_to_network,
    train_plan,
)
from utils.data.render import render, render_quad
from utils.hyp import Hyperparameters
from utils.structures import Batch, LabelStore, QuadPlan, SamplePlan, UserError

_PREFETCH = 4  # batches that each loader process works ahead
_SHARED_MEMORY = Path("/dev/shm")  # Linux; torch hands batches from process to process through it


@dataclass(frozen=True, kw_only=True)
class Lot:
    """The images that a training batch grows out of, and their place: with the seed, all that the batch depends on."""

    epoch: int
    position: int  # of the first image among the samples of its epoch
    images: np.ndarray  # (n,) into the LabelStore


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The images of an epoch, to be cut into batches, and which of these cuts is its first, second, ... batch."""

    images: np.ndarray  # (I,)
    cuts: Sequence[int]  # (batches,)


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """The augmented batches of a training run, each made of its lot. One batch of an epoch may be smaller.

    rect: images of like aspect share a batch and its shape, and there is no mosaic. quad: each four samples make one
    network input of twice the side; see `quad_plan`.
    """

    store: LabelStore
    imgsz: int
    batch_size: int
    hyp: Hyperparameters
    seed: int
    rect: bool = False
    quad: bool = False
    stride: int = 32  # of the network; sides of rectangular batches are multiples of it

    @property
    def batch_bytes(self) -> int:
        """What the images of a batch take at most."""
        height, width = self._shape(np.ones(1))
        samples = 4 * -(-self.batch_size // 4) if self.quad else self.batch_size
        return samples * 3 * height * width

    @property
    def per_epoch(self) -> int:
        return -(-len(self.store) // self.batch_size)

    def order(self, epoch: int, weights: np.ndarray | None = None) -> EpochOrder:
        """The order of an epoch whose images are all there once or, with (I,) `weights`, drawn by them."""
        images = epoch_order(self.seed, epoch, len(self.store), weights)
        if not self.rect:
            return EpochOrder(images=images, cuts=range(self.per_epoch))
        images = images[np.argsort(_aspects(self.store, images), kind="stable")]
        return EpochOrder(images=images, cuts=batch_order(self.seed, epoch, self.per_epoch))

    def lot(self, epoch: int, index: int, order: EpochOrder) -> Lot:
        position = int(order.cuts[index]) * self.batch_size
        return Lot(epoch=epoch, position=position, images=order.images[position : position + self.batch_size])

    def batch_of(self, lot: Lot) -> Batch:
        shape = self._shape(_aspects(self.store, lot.images))
        if self.quad:
            return _assemble(self._quads(lot, shape), lot.images, self.store, self.imgsz, paint=render_quad)
        plans = [self._sample(lot, place, shape) for place in range(len(lot.images))]
        return _assemble(plans, lot.images, self.store, self.imgsz)

    def _shape(self, aspects: np.ndarray) -> tuple[int, int]:
        return _rect_shape(aspects, self.imgsz, self.stride) if self.rect else (self.imgsz, self.imgsz)

    def _sample(self, lot: Lot, place: int, shape: tuple[int, int]) -> SamplePlan:
        hyp = replace(self.hyp, mosaic=0.0) if self.rect else self.hyp
        rng = generator(self.seed, lot.epoch, lot.position + place)
        return train_plan(self.store, int(lot.images[place]), imgsz=self.imgsz, shape=shape, hyp=hyp, rng=rng)

    def _quads(self, lot: Lot, shape: tuple[int, int]) -> list[QuadPlan]:
        """The groups of four. A last one of fewer is always merged, with padding where nothing lies."""
        plans = []
        for first in range(0, len(lot.images), 4):
            group = range(first, min(first + 4, len(lot.images)))
            enlarge = len(group) == 4 and enlarges(generator(self.seed, lot.epoch, lot.position + first, QUAD))
            shown = group[:1] if enlarge else group
            plans.append(quad_plan([self._sample(lot, place, shape) for place in shown], enlarge=enlarge))
        return plans


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """Every image of a split once, letterboxed. Images of like aspect share a batch and its shape."""

    store: LabelStore
    imgsz: int
    batch_size: int
    stride: int

    @property
    def batch_bytes(self) -> int:
        """What the images of a batch take at most."""
        return self.batch_size * 3 * (self.imgsz + 2 * self.stride) ** 2

    def numbers(self) -> range:
        return range(-(-len(self.store) // self.batch_size))

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """(I,) images by their ratio of height to width."""
        return np.argsort(_aspects(self.store, slice(None)), kind="stable")

    def batch(self, number: int) -> Batch:
        images = self._order[number * self.batch_size : (number + 1) * self.batch_size]
        shape = _rect_shape(_aspects(self.store, images), self.imgsz, self.stride)
        plans = [letterbox_plan(self.store, int(image), shape=shape, imgsz=self.imgsz) for image in images]
        batch = _assemble(plans, images, self.store, self.imgsz, area=True)
        placements = np.stack([source_to_network(self.store, plan, self.imgsz) for plan in plans])
        return replace(batch, placements=torch.from_numpy(placements))


def _aspects(store: LabelStore, images: np.ndarray | slice) -> np.ndarray:
    """(n,) ratios of height to width."""
    sizes = store.sizes[images]
    return sizes[:, 0] / sizes[:, 1]


def _rect_shape(aspects: np.ndarray, imgsz: int, stride: int) -> tuple[int, int]:
    """Height and width that hold images of these ratios height / width, with half a stride or more to spare."""
    ratios = (min(aspects.max(), 1.0), min(1 / aspects.min(), 1.0))
    height, width = (int(np.ceil(imgsz * ratio / stride + 0.5)) * stride for ratio in ratios)
    return height, width


_Plan = TypeVar("_Plan", SamplePlan, QuadPlan)


def _assemble(
    plans: Sequence[_Plan],
    images: np.ndarray,
    store: LabelStore,
    imgsz: int,
    *,
    paint: Callable[[_Plan, Callable[[int], np.ndarray]], np.ndarray] = render,
    area: bool = False,
) -> Batch:
    def load(image: int) -> np.ndarray:
        path = store.path(image)
        try:
            return base_image(path, imgsz, area=area)
        except ImageError as error:
            raise UserError(f"{path}: {error}, though it was fine when the data set was scanned") from None

    pixels = np.empty((len(plans), *plans[0].shape, 3), np.uint8)
    for slot, plan in zip(pixels, plans):
        slot[:] = paint(plan, load)
    counts = [len(plan.classes) for plan in plans]
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),  # a view: channels last in memory
        boxes=torch.from_numpy(np.concatenate([plan.boxes for plan in plans])),
        classes=torch.from_numpy(np.concatenate([plan.classes for plan in plans]).astype(np.int64)),
        image_of=torch.from_numpy(np.repeat(np.arange(len(plans)), counts)),
        indices=torch.from_numpy(images.astype(np.int64)),
    )


def resized(batch: Batch, factor: float, stride: int) -> Batch:
    """The batch with each side `factor` times as long, rounded up to the stride; itself where that changes nothing.

    On the device that the batch lies on, without waiting for it.
    """
    old = batch.images.shape[2:]
    # a factor that stands for whole strides may exceed them by a rounding error
    new = tuple(max(math.ceil(side * factor / stride - 1e-6), 1) * stride for side in old)
    if new == tuple(old):
        return batch
    assert batch.placements is None
    boxes = batch.boxes.clone()
    boxes[:, 0::2] *= new[1] / old[1]
    boxes[:, 1::2] *= new[0] / old[0]
    return replace(batch, images=_interpolated(batch.images, new), boxes=boxes)


def _interpolated(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear. Only on the CPU does torch interpolate bytes, and there that is ten times as fast as floats."""
    if images.device.type == "cpu":
        return F.interpolate(images, size, mode="bilinear")
    return F.interpolate(images.float(), size, mode="bilinear").round_().to(torch.uint8)


# ---- streams ------------------------------------------------------------------------------------------------------


class Stream:
    """Iterating yields the batches of `numbers` in order, as often as asked, made by `workers` processes (0: in here).

    The processes live as long as the stream; there are fewer where shared memory is too small for the batches they work
    ahead. Leaves the global random state alone. Raises UserError when an image has vanished since the scan.
    """

    def __init__(self, batches: EvalBatches, numbers: Sequence[int], *, workers: int, pin_memory: bool = False):
        self.batch_size = batches.batch_size
        self._numbers = numbers
        self._loader = _loader(batches.batch, numbers, batches.batch_bytes, workers=workers, pin_memory=pin_memory)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        return _delivered(self._loader)


class TrainStream:
    """The training batches of the epochs `start_epoch` to `end_epoch` - 1, one epoch after the other.

    As Stream otherwise. Without image weights, the processes do not stop between epochs. With them, an epoch has as
    many images as the split, drawn by what the class mAPs of the evaluation before it say; it cannot begin earlier.
    """

    def __init__(
        self,
        batches: TrainBatches,
        *,
        start_epoch: int,
        end_epoch: int,
        workers: int,
        pin_memory: bool = False,
        image_weights: bool = False,
        num_classes: int,
    ):
        self._batches, self._num_classes = batches, num_classes
        self._image_weights = image_weights
        self._next_epoch = start_epoch
        self._lots = _Lots(batches, range(start_epoch, end_epoch))
        self._loader = _loader(
            batches.batch_of, self._lots, batches.batch_bytes, workers=workers, pin_memory=pin_memory
        )
        self._all_epochs = _delivered(self._loader)

    @property
    def workers(self) -> int:
        return self._loader.num_workers

    def epoch(self, epoch: int, class_maps: Sequence[float] = ()) -> Iterator[Batch]:
        """The batches of an epoch. Each epoch is asked for once, in order, and taken to its end.

        `class_maps` are the mAPs of all classes, 0..1, empty before any evaluation; they matter to image weights only.
        """
        assert epoch == self._next_epoch, f"epoch {epoch}, not {self._next_epoch}"
        self._next_epoch += 1
        if not self._image_weights:
            return itertools.islice(self._all_epochs, self._batches.per_epoch)
        store = self._batches.store
        self._lots.epochs = range(epoch, epoch + 1)
        self._lots.weights = image_weights(store, class_weights(store, self._num_classes, class_maps))
        return _delivered(self._loader)


class _Lots:
    """The lots of some epochs, made when they are due: the order of an epoch is in no process but the main one."""

    def __init__(self, batches: TrainBatches, epochs: range):
        self.batches, self.epochs = batches, epochs
        self.weights: np.ndarray | None = None

    def __iter__(self) -> Iterator[Lot]:
        for epoch in self.epochs:
            order = self.batches.order(epoch, self.weights)
            for index in range(self.batches.per_epoch):
                yield self.batches.lot(epoch, index, order)


_Key = TypeVar("_Key")


def _loader(
    make: Callable[[_Key], Batch], keys: Iterable[_Key], batch_bytes: int, *, workers: int, pin_memory: bool
) -> DataLoader:
    """Iterating goes through the keys anew each time. Yields what `make` makes of each, or a _Failure."""
    workers, prefetch = _within_shared_memory(workers, batch_bytes)
    return DataLoader(
        _Made(make),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the default draws from the global one
        collate_fn=_unchanged,
    )


def _delivered(loader: DataLoader) -> Iterator[Batch]:
    for result in loader:
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


class _Made(Dataset):
    def __init__(self, make: Callable[[_Key], Batch]):
        self.make = make

    def __getitem__(self, key: _Key) -> Batch | _Failure:
        try:
            batch = self.make(key)
        except UserError as error:
            return _Failure(str(error))
        except MemoryError:
            return _Failure("a loader process is out of memory: lower --workers, --batch-size or --imgsz")
        return batch if get_worker_info() is None else _shared(batch)


def _shared(batch: Batch) -> Batch | _Failure:
    """The batch where the main process can see it; left to torch, a failure would be a wait without end."""
    try:
        batch.share_memory()
    except RuntimeError as error:
        reason = f"a loader process finds no room in shared memory ({str(error).splitlines()[0]})"
        return _Failure(f"{reason}: lower --workers (0 needs none), --batch-size or --imgsz")
    return batch


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer, once
    cv2.setNumThreads(0)


def _unchanged(item: Iterable) -> Iterable:
    return item
