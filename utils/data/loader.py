"""Batches in order: which images make a batch, and a stream of them from loader processes.

A batch is a pure function of its place in the run, so as many processes as you like yield the same stream. Only
--image-weights makes an epoch depend on the evaluation before it; else they already work on it while that one runs.
A process that dies or hangs ends the run, with a line that says what it was at.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _BaseDataLoaderIter

from utils.data.images import ImageSource
from utils.data.plan import (
    QUAD,
    batch_order,
    class_weights,
    enlarges,
    epoch_order,
    even_order,
    generator,
    image_weights,
    letterbox_plan,
    quad_plan,
    repeat_factors,
    source_to_network,
    train_plan,
)
from utils.data.probe import silence_libraries
from utils.data.render import render, render_quad
from utils.data.render_torch import Allocate, PackedPlans, PackedQuads, pack, paint
from utils.hyp import Hyperparameters
from utils.stopping import end_with_parent, signals_held_back
from utils.structures import Batch, LabelStore, Part, QuadPlan, RunError, SamplePlan, UserError

_UNPAINTED_SIZE = 2  # in painted ones: 1.2 on average with scale 0.5, as much again for mixup
_PREFETCH = 4  # batches that each loader process works ahead
_SHARED_MEMORY = Path("/dev/shm")  # Linux; torch hands batches from process to process through it
_LOOK_S = 1.0  # for a batch, until it is seen whether those who make it are there
_PATIENCE_S = 300  # of looking, without a batch or a sign of life


@dataclass(frozen=True, kw_only=True)
class Lot:
    """The images that a training batch grows out of, and their place: with the seed, all that the batch depends on."""

    epoch: int
    index: int  # of the batch in its epoch
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
    images: ImageSource
    imgsz: int
    batch_size: int
    hyp: Hyperparameters
    seed: int
    rect: bool = False
    quad: bool = False
    stride: int = 32  # of the network; sides of rectangular batches are multiples of it
    epochs: int | None = None  # of the run, the last of which may have no mosaics
    unpainted: bool = False  # its batches are painted on the device that they go to
    rank: int = 0  # who has these parts of the batches
    ranks: int = 1

    @property
    def batch_bytes(self) -> int:
        """What the images of a batch take here at most; where they are unpainted, it may be more, but seldom is."""
        height, width = self._shape(np.ones(1))
        samples = -(-self._inputs(self.batch_size) // self.ranks) * self._images_each
        return (_UNPAINTED_SIZE if self.unpainted else 1) * samples * 3 * height * width

    @property
    def per_epoch(self) -> int:
        return -(-len(self.store) // self.batch_size)

    def order(self, epoch: int, images: np.ndarray | None = None) -> EpochOrder:
        """The order of an epoch whose (I,) images were drawn or, by themselves, are all there once."""
        if images is None:
            images = epoch_order(self.seed, epoch, len(self.store))
        if not self.rect:
            return EpochOrder(images=images, cuts=range(self.per_epoch))
        images = images[np.argsort(_aspects(self.store, images), kind="stable")]
        return EpochOrder(images=images, cuts=batch_order(self.seed, epoch, self.per_epoch))

    def lot(self, epoch: int, index: int, order: EpochOrder) -> Lot:
        position = int(order.cuts[index]) * self.batch_size
        images = order.images[position : position + self.batch_size]
        return Lot(epoch=epoch, index=index, position=position, images=images)

    def batch_of(self, lot: Lot, allocate: Allocate | None = None) -> Batch | UnpaintedBatch:
        """Its images, or what they will be painted from, are written into what `allocate` yields."""
        shape, inputs = self._shape(_aspects(self.store, lot.images)), self._inputs(len(lot.images))
        own = part_of(inputs, self.rank, self.ranks)
        plans = [(self._quad if self.quad else self._sample)(lot, number, shape) for number in own or range(1)]
        if not own:  # every rank takes part in every step
            plans = [replace(plans[0], boxes=plans[0].boxes[:0], classes=plans[0].classes[:0])]
        part = Part(len(own), inputs) if self.ranks > 1 else None
        if self.unpainted:
            packed = pack(plans, self.images, allocate)
            return UnpaintedBatch(packed=packed, part=part, **_labels(plans, lot.images))
        batch = _assemble(plans, lot.images, self.images, allocate, paint=render_quad if self.quad else render)
        return replace(batch, part=part)

    @property
    def _images_each(self) -> int:
        return 4 if self.quad else 1

    def _inputs(self, images: int) -> int:
        """What so many images make."""
        return -(-images // self._images_each)

    def _shape(self, aspects: np.ndarray) -> tuple[int, int]:
        return _rect_shape(aspects, self.imgsz, self.stride) if self.rect else (self.imgsz, self.imgsz)

    def _sample(self, lot: Lot, place: int, shape: tuple[int, int]) -> SamplePlan:
        hyp = self.hyp if self._has_mosaics(lot.epoch) else replace(self.hyp, mosaic=0.0)
        rng = generator(self.seed, lot.epoch, lot.position + place)
        return train_plan(self.store, int(lot.images[place]), imgsz=self.imgsz, shape=shape, hyp=hyp, rng=rng)

    def _has_mosaics(self, epoch: int) -> bool:
        return not self.rect and (self.epochs is None or epoch < self.epochs - self.hyp.close_mosaic)

    def _quad(self, lot: Lot, number: int, shape: tuple[int, int]) -> QuadPlan:
        """A group of four. A last one of fewer is always merged, with padding where nothing lies."""
        first = 4 * number
        group = range(first, min(first + 4, len(lot.images)))
        enlarge = len(group) == 4 and enlarges(generator(self.seed, lot.epoch, lot.position + first, QUAD))
        shown = group[:1] if enlarge else group
        return quad_plan([self._sample(lot, place, shape) for place in shown], enlarge=enlarge)


def part_of(inputs: int, rank: int, ranks: int) -> range:
    """Which of so many are a rank's: parts differ by one at most, and the first ones are the larger."""
    size, more = divmod(inputs, ranks)
    first = rank * size + min(rank, more)
    return range(first, first + size + (rank < more))


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """Every image of a split once, letterboxed. A batch is of images that have one shape, each by itself.

    So what a network sees of an image does not depend on its company, nor on the size of batches.
    """

    store: LabelStore
    images: ImageSource  # averaged by area
    imgsz: int
    batch_size: int
    stride: int

    @property
    def batch_bytes(self) -> int:
        """What the images of a batch take at most."""
        return self.batch_size * 3 * (self.imgsz + 2 * self.stride) ** 2

    def numbers(self) -> range:
        return range(len(self._cuts))

    @functools.cached_property
    def _cuts(self) -> list[np.ndarray]:
        """The images of each batch; those of the most common shape come first."""
        shapes = _rect_shapes(_aspects(self.store, slice(None)), self.imgsz, self.stride)  # (I, 2)
        _, shape_of, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
        shape_of = shape_of.ravel()  # in numpy 2.0 it is (I, 1)
        order = np.lexsort((shape_of, -counts[shape_of]))
        alike = np.split(order, np.flatnonzero(np.diff(shape_of[order])) + 1)
        return [images[at : at + self.batch_size] for images in alike for at in range(0, len(images), self.batch_size)]

    def batch(self, number: int, allocate: Allocate | None = None) -> Batch:
        """Its images are painted into what `allocate` yields."""
        images = self._cuts[number]
        shape = _rect_shape(_aspects(self.store, images), self.imgsz, self.stride)
        plans = [letterbox_plan(self.store, int(image), shape=shape, imgsz=self.imgsz) for image in images]
        batch = _assemble(plans, images, self.images, allocate)
        placements = np.stack([source_to_network(self.store, plan, self.imgsz) for plan in plans])
        return replace(batch, placements=torch.from_numpy(placements))


def _aspects(store: LabelStore, images: np.ndarray | slice) -> np.ndarray:
    """(n,) ratios of height to width."""
    sizes = store.sizes[images]
    return sizes[:, 0] / sizes[:, 1]


def _rect_shape(aspects: np.ndarray, imgsz: int, stride: int) -> tuple[int, int]:
    """Height and width that hold images of these ratios height / width, with half a stride or more to spare."""
    height, width = _rect_shapes(aspects, imgsz, stride).max(0).tolist()
    return height, width


def _rect_shapes(aspects: np.ndarray, imgsz: int, stride: int) -> np.ndarray:
    """(n, 2) i64 height and width for each image by itself."""
    ratios = np.stack([np.minimum(aspects, 1.0), np.minimum(1 / aspects, 1.0)], 1)
    return np.ceil(imgsz * ratios / stride + 0.5).astype(np.int64) * stride


_Plan = TypeVar("_Plan", SamplePlan, QuadPlan)


def _assemble(
    plans: Sequence[_Plan],
    indices: np.ndarray,
    images: ImageSource,
    allocate: Allocate | None,
    *,
    paint: Callable[..., np.ndarray] = render,
) -> Batch:
    """A batch painted in its place, so that nothing is copied afterwards."""
    pixels = (allocate or _private)((len(plans), *plans[0].shape, 3))
    for slot, plan in zip(pixels.numpy(), plans):
        paint(plan, images, out=slot)
    return Batch(images=pixels.permute(0, 3, 1, 2), **_labels(plans, indices))  # a view: channels last in memory


def _labels(plans: Sequence[_Plan], indices: np.ndarray) -> dict[str, torch.Tensor]:
    """What a batch holds beside its images."""
    counts = [len(plan.classes) for plan in plans]
    return {
        "boxes": torch.from_numpy(np.concatenate([plan.boxes for plan in plans])),
        "classes": torch.from_numpy(np.concatenate([plan.classes for plan in plans]).astype(np.int64)),
        "image_of": torch.from_numpy(np.repeat(np.arange(len(plans)), counts)),
        "indices": torch.from_numpy(indices.astype(np.int64)),
    }


def _private(shape: tuple[int, ...], *, pinned: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)


def _shared(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory that the main process sees; where there is no way to it, private memory, to be moved later."""
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
    except (AttributeError, RuntimeError):
        return _private(shape)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


@dataclass(frozen=True, kw_only=True)
class UnpaintedBatch:
    """A Batch with all that its images depend on in their place; `to` paints them."""

    packed: PackedPlans | PackedQuads
    boxes: torch.Tensor
    classes: torch.Tensor
    image_of: torch.Tensor
    indices: torch.Tensor
    part: Part | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on the device, which nobody waits for."""
        labels = Batch(images=paint(self.packed, device), part=self.part, **self._labels())
        return labels.to(device)

    def pin_memory(self) -> UnpaintedBatch:
        pinned = {name: tensor.pin_memory() for name, tensor in self._labels().items() if name != "indices"}
        return replace(self, packed=self.packed.pin_memory(), **pinned)

    def share_memory(self) -> None:
        """As Batch.share_memory."""
        self.packed.share_memory()
        for tensor in self._labels().values():
            tensor.share_memory_()

    def _labels(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if name not in ("packed", "part")}


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
    ahead. Leaves the global random state alone. Raises UserError when an image has vanished since the scan, and
    RunError when a process dies or hangs.
    """

    def __init__(
        self,
        batches: EvalBatches,
        numbers: Sequence[int],
        *,
        workers: int,
        pin_memory: bool = False,
        sharers: int = 1,
    ):
        """`sharers` are the ranks on this host, which share its memory."""
        self.batch_size = batches.batch_size
        self._numbers = numbers
        self._supply = _Supply(
            batches,
            EvalBatches.batch,
            _evaluated_at,
            numbers,
            workers=workers,
            pin_memory=pin_memory,
            sharers=sharers,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._supply)

    def fault(self) -> str:
        """What a process died of; empty while all are well."""
        return self._supply.death()

    def end(self) -> None:
        """Kill the processes, after a fault."""
        self._supply.end()

    def close(self) -> None:
        """End the processes. Iterating again would start new ones."""
        self._supply.close()


class TrainStream:
    """The training batches of the epochs up to `end_epoch` - 1, one epoch after the other, from wherever it is asked.

    As Stream otherwise. Without image weights, the processes do not stop between epochs. With them, an epoch has as
    many images as the split, drawn by what the class mAPs of the evaluation before it say; it cannot begin earlier.
    With a `repeat_factor`, images of classes that fewer have are there more often; see `repeat_factors`.
    """

    def __init__(
        self,
        batches: TrainBatches,
        *,
        end_epoch: int,
        workers: int,
        pin_memory: bool = False,
        sharers: int = 1,
        image_weights: bool = False,
        repeat_factor: float = 0.0,
        num_classes: int,
    ):
        assert not (image_weights and repeat_factor)
        self._batches, self._num_classes = batches, num_classes
        self._image_weights, self._end_epoch = image_weights, end_epoch
        self._next_epoch = -1  # that the processes work on already
        self._lots = _Lots(batches)
        if repeat_factor:
            factors = repeat_factors(batches.store, num_classes, repeat_factor)
            self._lots.draw = partial(even_order, batches.seed, weights=factors)
        self._supply = _Supply(
            batches,
            TrainBatches.batch_of,
            _trained_at,
            self._lots,
            workers=workers,
            pin_memory=pin_memory,
            sharers=sharers,
        )
        self._following: Iterator[Batch | UnpaintedBatch] = iter(())

    @property
    def images(self) -> ImageSource:
        return self._batches.images

    @property
    def workers(self) -> int:
        return self._supply.workers

    def epoch(
        self, epoch: int, class_maps: Sequence[float] = (), *, start: int = 0
    ) -> Iterator[Batch | UnpaintedBatch]:
        """The batches of an epoch, from the one of number `start` on, to be taken to their end.

        `class_maps` are the mAPs of all classes, 0..1, empty before any evaluation; they matter to image weights only.
        """
        if self._image_weights:
            store, seed = self._batches.store, self._batches.seed
            weights = image_weights(store, class_weights(store, self._num_classes, class_maps))
            self._lots.draw = partial(epoch_order, seed, num_images=len(store), weights=weights)
            self._seek(range(epoch, epoch + 1), start)
        elif start or epoch != self._next_epoch:
            self._seek(range(epoch, self._end_epoch), start)
        self._next_epoch = epoch + 1
        return itertools.islice(self._following, self._batches.per_epoch - start)

    def _seek(self, epochs: range, start: int) -> None:
        self._lots.epochs, self._lots.start = epochs, start
        self._following = iter(self._supply)

    def fault(self) -> str:
        """What a process died of; empty while all are well."""
        return self._supply.death()

    def end(self) -> None:
        """Kill the processes, after a fault."""
        self._supply.end()

    def close(self) -> None:
        """End the processes. Iterating again would start new ones."""
        self._supply.close()


_SIGNS_OF_DEATH = (RuntimeError, ConnectionError, EOFError)  # torch says so, or a batch is cut off on its way
_DYING_S = 2.0  # from its last connection to the end of a process
_CLOSING_S = 3.0  # that a process has to finish a batch which nobody waits for


@contextmanager
def faults_named(*streams: Stream | TrainStream) -> Iterator[None]:
    """Errors that the death of a loader process may be the reason of are reported as that, by name.

    As of memory that was short for all. After the block there are no such processes any more.
    """
    try:
        yield
    except _SIGNS_OF_DEATH as error:
        fault = next(filter(None, (stream.fault() for stream in streams)), "")
        if not fault:
            raise
        for stream in streams:
            stream.end()
        raise RunError(fault) from error
    finally:
        for stream in streams:
            stream.close()


class _Lots:
    """The lots of some epochs, made when they are due: the order of an epoch is in no process but the main one."""

    def __init__(self, batches: TrainBatches):
        self.batches, self.epochs = batches, range(0)
        self.start = 0  # of the first of them, the number of its first batch
        self.draw: Callable[[int], np.ndarray | None] = lambda epoch: None  # the images of an epoch; None: each once

    def __iter__(self) -> Iterator[Lot]:
        for epoch in self.epochs:
            order = self.batches.order(epoch, self.draw(epoch))
            for index in range(self.start if epoch == self.epochs[0] else 0, self.batches.per_epoch):
                yield self.batches.lot(epoch, index, order)


_Batches = TypeVar("_Batches", EvalBatches, TrainBatches)
_Key = TypeVar("_Key", int, Lot)
_Result = TypeVar("_Result")


class _Supply(Generic[_Batches, _Key]):
    """Batches made out of keys. Iterating goes through the keys anew each time."""

    def __init__(
        self,
        batches: _Batches,
        make: Callable[[_Batches, _Key, Allocate], Batch | UnpaintedBatch],
        place: Callable[[_Key], tuple[int, int]],
        keys: Iterable[_Key],
        *,
        workers: int,
        pin_memory: bool,
        sharers: int,
    ):
        """`place` yields the epoch of a key, or _EVALUATION, and the number of its batch."""
        self.workers, prefetch = _within_shared_memory(workers, batches.batch_bytes * sharers)
        self._store = batches.store
        self._board = _Board(self.workers)
        self._processes: Sequence[multiprocessing.Process] = ()
        self._signs, self._silent_looks = self._board.signs(), 0
        if self.workers:
            made = _MadeApart(replace(batches, images=_Watched(batches.images, self._board)), make, place, self._board)
        else:
            made = _Made(batches, make, partial(_private, pinned=pin_memory))
        self._loader = DataLoader(
            made,
            sampler=keys,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=prefetch,
            persistent_workers=self.workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default draws from the global one
            collate_fn=_unchanged,
        )

    def __iter__(self) -> Iterator[Batch | UnpaintedBatch]:
        try:
            with signals_held_back():
                batches = iter(self._loader)
                if self.workers and not self._processes:
                    self._take_over(batches)
            for result in self._awaited(batches):
                if isinstance(result, _Failure):
                    raise UserError(result.message)
                yield result
        except _SIGNS_OF_DEATH as error:
            fault = self._fault(error)
            if not fault:
                raise
            self.end()
            raise RunError(fault) from error

    def _take_over(self, batches: _BaseDataLoaderIter) -> None:
        """Watch over the processes in torch's place, which raises an error wherever the main thread is when one dies.

        It would break off what is never to be broken off: the start of a thread, say, or talk with another process.
        """
        self._at_exit = Finalize(None, _kill, args=(batches._workers,), exitpriority=0)
        self._processes = batches._workers
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
        batches._try_get_data = partial(_look, weakref.ref(batches), weakref.ref(self))

    def _fault(self, error: Exception) -> str:
        """What the processes have to do with it; empty where nothing."""
        if self._processes and not isinstance(error, RuntimeError):
            ended = connection.wait([process.sentinel for process in self._processes], timeout=_DYING_S)
            for process in self._processes:
                if process.sentinel in ended:
                    process.join()
        return self.death() or (self._hang() if isinstance(error, _Silence) else "")

    def _awaited(self, batches: Iterator[_Result]) -> Iterator[_Result]:
        """The same. Raises RuntimeError where a process has died, and _Silence where all seem to hang."""
        while not self.death():
            result = next(batches, None)
            if result is None:
                return
            yield result
        raise RuntimeError("a process has died while nobody waited")

    def heed(self, *, found: bool) -> None:
        """After a look for a batch, whether there was one. Raises _Silence when too many in a row were in vain.

        They are counted, not timed, as the whole run may be stopped meanwhile (Ctrl-Z). As long as anybody gives signs
        of life, as with a slow drive, nothing is in vain.
        """
        signs = self._board.signs()
        self._silent_looks = 0 if found or signs != self._signs else self._silent_looks + 1
        self._signs = signs
        if self._silent_looks * _LOOK_S >= _PATIENCE_S:
            raise _Silence

    def death(self) -> str:
        """Of the first process that ended by itself; empty when there is none."""
        for worker, process in enumerate(self._processes):
            if process.exitcode:
                end = f"was killed (signal {-process.exitcode})" if process.exitcode < 0 else "died"
                reason = _REASONS.get(-process.exitcode, "a crash in a library? --workers 0 does without processes")
                at = self._board.work(worker)
                return f"{_name(worker, process)} {end}{f' while it made {at}' if at else ''}: {reason}"
        return ""

    def _hang(self) -> str:
        """Of the process that has given no sign of life for longest."""
        worker = max(range(self.workers), key=self._board.seconds)
        work = self._board.work(worker)
        if not work:
            return f"the loader processes have made nothing for {_PATIENCE_S} s; --workers 0 does without them"
        image, process = self._board.image(worker), self._processes[worker]
        at = "painting" if image is None else f"reading {self._store.path(image)}"
        return (
            f"{_name(worker, process)} hangs, {at} for {self._board.seconds(worker):.0f} s, in {work}: is its drive "
            "still there? --resume continues the run"
        )

    def end(self) -> None:
        """Kill the processes: one that hangs hears nothing else."""
        for process in self._processes:
            process.kill()
            process.join(timeout=5)

    def close(self) -> None:
        """End the processes as torch does, which lets them finish what they are at; but not for long."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if not self._processes:
            return
        timer = threading.Timer(_CLOSING_S, _kill, args=(self._processes,))
        timer.start()
        try:
            iterator._shutdown_workers()
        finally:
            timer.cancel()
            _kill(self._processes)
            self._at_exit.cancel()
            self._processes = ()


class _Silence(RuntimeError):
    """No batch has come for long, and no sign of life."""


def _look(batches: weakref.ref[_BaseDataLoaderIter], supply: weakref.ref[_Supply], *_: float) -> tuple[bool, object]:
    """In place of torch's look for a batch, which may be a longer one.

    Whether there was one, and the batch. Raises RuntimeError where a process has died.
    """
    found, batch = type(batches())._try_get_data(batches(), _LOOK_S)
    supply().heed(found=found)
    return found, batch


def _kill(processes: Sequence[multiprocessing.Process]) -> None:
    """Those still alive; they hear of no other signal, and would be waited for when this process ends."""
    for process in processes:
        if process.is_alive():
            process.kill()


_LOWER = "lower --workers, --batch-size or --imgsz"
_REASONS = {
    9: f"out of memory? {_LOWER}",
    getattr(signal, "SIGBUS", None): f"out of shared memory? {_LOWER}",  # no such signal on Windows
}


def _name(worker: int, process: multiprocessing.Process) -> str:
    return f"loader process {worker + 1} (pid {process.pid})"


_EVALUATION = -1  # in the place of an epoch


def _trained_at(lot: Lot) -> tuple[int, int]:
    return lot.epoch, lot.index


def _evaluated_at(number: int) -> tuple[int, int]:
    return _EVALUATION, number


class _Board:
    """What each loader process is at, in memory that all of them see, and that outlives them."""

    _ROW = 4  # epoch, number of the batch (-1: none), time of the last entry, image being read (-1: none)

    def __init__(self, workers: int):
        self._cells = multiprocessing.RawArray("d", [0, -1, 0, -1] * workers or 1)

    def begin(self, worker: int, epoch: int, number: int) -> None:
        self._set(worker, [epoch, number, time.monotonic(), -1])

    def reads(self, worker: int, image: int | None) -> None:
        self._cells[worker * self._ROW + 2] = time.monotonic()
        self._cells[worker * self._ROW + 3] = -1 if image is None else image

    def rest(self, worker: int) -> None:
        self._set(worker, [0, -1, 0, -1])

    def signs(self) -> list[float]:
        """Of life: other ones, once anybody has made an entry."""
        return self._cells[:]

    def work(self, worker: int) -> str:
        epoch, number, *_ = self._get(worker)
        if number < 0:
            return ""
        whose = "the evaluation" if epoch == _EVALUATION else f"epoch {epoch + 1:.0f}"
        return f"batch {number + 1:.0f} of {whose}"

    def seconds(self, worker: int) -> float:
        """Since it last gave a sign of life; 0 while it has no batch."""
        _, number, since, _ = self._get(worker)
        return time.monotonic() - since if number >= 0 else 0.0

    def image(self, worker: int) -> int | None:
        image = int(self._get(worker)[3])
        return None if image < 0 else image

    def _set(self, worker: int, row: list[float]) -> None:
        self._cells[worker * self._ROW : (worker + 1) * self._ROW] = row

    def _get(self, worker: int) -> list[float]:
        return self._cells[worker * self._ROW : (worker + 1) * self._ROW]


@dataclass(frozen=True)
class _Watched:
    """An ImageSource in a loader process, which says on the board what it reads."""

    images: ImageSource
    board: _Board

    def __call__(self, image: int) -> np.ndarray:
        worker = get_worker_info().id
        self.board.reads(worker, image)
        pixels = self.images(image)
        self.board.reads(worker, None)
        return pixels


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


class _Made(Dataset, Generic[_Batches, _Key]):
    """The batches that `make` makes of keys, in the main process."""

    def __init__(
        self, batches: _Batches, make: Callable[[_Batches, _Key, Allocate], Batch | UnpaintedBatch], allocate: Allocate
    ):
        self.batches, self.make, self.allocate = batches, make, allocate

    def __getitem__(self, key: _Key) -> Batch | UnpaintedBatch | _Failure:
        try:
            return self.make(self.batches, key, self.allocate)
        except UserError as error:
            return _Failure(str(error))
        except MemoryError:
            return _Failure(f"a loader process is out of memory: {_LOWER}")


class _MadeApart(_Made[_Batches, _Key]):
    """The same in a loader process."""

    def __init__(
        self,
        batches: _Batches,
        make: Callable[[_Batches, _Key, Allocate], Batch | UnpaintedBatch],
        place: Callable[[_Key], tuple[int, int]],
        board: _Board,
    ):
        super().__init__(batches, make, _shared)
        self.place, self.board = place, board

    def __getitem__(self, key: _Key) -> Batch | UnpaintedBatch | _Failure:
        worker = get_worker_info().id
        self.board.begin(worker, *self.place(key))
        result = super().__getitem__(key)
        self.board.rest(worker)
        return result if isinstance(result, _Failure) else _moved(result)


def _moved(batch: Batch | UnpaintedBatch) -> Batch | UnpaintedBatch | _Failure:
    """The batch where the main process can see all of it; left to torch, a failure would be a wait without end."""
    try:
        batch.share_memory()
    except RuntimeError as error:
        reason = f"a loader process finds no room in shared memory ({str(error).splitlines()[0]})"
        return _Failure(f"{reason}: lower --workers (0 needs none), --batch-size or --imgsz")
    return batch


def _start_worker(worker: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where `signals_held_back` holds none
    sys.excepthook = _tell_of_mistakes
    cv2.setNumThreads(0)
    silence_libraries()  # the scan has named damaged images, once


def _tell_of_mistakes(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """None is that the main process broke off while a batch was handed over: Ctrl-C may come at any time."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _unchanged(item: Iterable) -> Iterable:
    return item
