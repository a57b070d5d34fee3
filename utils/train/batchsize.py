"""`--batch-size -1`: how many images the device can train on at once, found by training on made-up ones.

The rehearsal works on copies, so model and random state are the same bytes afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from models.yolo import DetectionModel
from utils.config import TrainOptions
from utils.evaluate.evaluator import evaluated_at_once
from utils.evaluate.predict import for_evaluation, predicted
from utils.hyp import Hyperparameters
from utils.loss import LossGains
from utils.ranks import Ranks
from utils.runtime import Runtime, mendable_errors
from utils.structures import Batch, LabelStore, UserError
from utils.train.anchors import label_sizes
from utils.train.optim import StepSettings, make_optimizer, multi_scales
from utils.train.step import TrainStep

_WHERE_NOBODY_COUNTS = 16  # images, on devices that do not say how much memory they have
_SHARE_OF_FREE = 0.9
_STEPS = 2  # only the second has gradients and the optimizer's state side by side
_FITTED_PROBES = 3


def largest_batch_size(
    *,
    model: DetectionModel,
    hyp: Hyperparameters,
    options: TrainOptions,
    train: LabelStore,
    val: LabelStore,
    runtime: Runtime,
    limit: int,
    step: int,
    note: Callable[[str], object],
) -> int:
    """The batch size to train with, a multiple of `step`. Raises UserError when not even the least fits.

    RunError for what else may strike on the device.
    """
    with mendable_errors(batch_size=step, imgsz=options.imgsz):  # a GPU that others fill refuses even the question
        free = runtime.free_memory()
    if free is None:
        note(f"--batch-size -1: without a CUDA GPU that is {_WHERE_NOBODY_COUNTS}")
        return _WHERE_NOBODY_COUNTS
    rehearsal = Rehearsal(model=model, hyp=hyp, options=options, train=train, val=val, runtime=runtime)
    chosen = largest_batch(rehearsal.peak_bytes, budget=int(free * _SHARE_OF_FREE), limit=limit, step=step)
    if chosen is None:
        raise UserError(f"--batch-size -1: not even {step} fit into the memory: lower --imgsz (now {options.imgsz})")
    note(f"--batch-size -1: {chosen}, of at most {limit}, for {_SHARE_OF_FREE:.0%} of {free / 2**30:.1f} GiB free")
    return chosen


def largest_batch(probe: Callable[[int], int | None], *, budget: int, limit: int, step: int = 1) -> int | None:
    """The most images, a multiple of `step` and at most `limit`, that `probe` says take no more than `budget` bytes.

    `probe(batch_size)` is None where memory ran out. Sizes are doubled while they fit; a line through the last of them
    says how far to go between the last that fits and the first that does not, and one more probe confirms it. None
    when not even `step` fits.
    """
    fitting: dict[int, int] = {}
    too_many = limit + step

    def fits(size: int) -> bool:
        needed = probe(size)
        if needed is None or needed > budget:
            return False
        fitting[size] = needed
        return True

    size = step
    while size < too_many:
        if not fits(size):
            too_many = size
        elif size == limit:
            return limit
        size = min(2 * size, limit)
    if not fitting:
        return None
    best = max(fitting)
    guess = min(_reach(fitting, budget) // step * step, too_many - step)
    while guess > best and not fits(guess):
        guess = (best + guess) // 2 // step * step
    return max(fitting)


def _reach(fitting: dict[int, int], budget: int) -> int:
    """The size at which a straight line through the largest probes meets the budget."""
    sizes = sorted(fitting)[-_FITTED_PROBES:]
    if len(sizes) == 1:
        return sizes[0] * budget // max(fitting[sizes[0]], 1)
    slope, start = np.polyfit(sizes, [fitting[size] for size in sizes], 1)
    return int((budget - start) / max(slope, 1.0) + 1e-6)  # the fit is exact but for rounding


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The steps and the evaluation of the run, on copies of its parts, at the largest input and with many labels."""

    model: DetectionModel
    hyp: Hyperparameters
    options: TrainOptions
    train: LabelStore
    val: LabelStore
    runtime: Runtime

    def peak_bytes(self, batch_size: int) -> int | None:
        """What a run of this batch size takes of the device's memory; None where it ran out.

        Raises RunError for what a user can mend.
        """
        with mendable_errors(batch_size=batch_size, imgsz=self.options.imgsz):
            try:
                return self._peak_bytes(batch_size)
            except RuntimeError:
                # beyond 2^31 elements some kernels refuse to work, each in words of its own
                if batch_size <= 4:
                    raise
                return None

    def _peak_bytes(self, batch_size: int) -> int | None:
        with self.runtime.memory_peak() as training:
            step = self.after_steps(batch_size)
        if training.bytes is None:
            return None
        with self.runtime.memory_peak() as evaluation:
            self.evaluate(step.average.model, batch_size)
        return None if evaluation.bytes is None else max(training.bytes, training.kept + evaluation.bytes)

    def after_steps(self, batch_size: int) -> TrainStep:
        """What training keeps on the device while it is evaluated, after its first steps."""
        # as it is without torch.compile: that takes no more memory, but minutes for each size that is tried; and alone
        runtime = replace(self.runtime, compile=False, ranks=Ranks())
        model = copy.deepcopy(self.model).to(runtime.device, memory_format=torch.channels_last).train()
        step = TrainStep(
            runtime=runtime,
            model=model,
            optimizer=make_optimizer(model, self.hyp, weight_decay=0.0, kind=self.options.optimizer),
            gains=self._gains,
        )
        batch = self.batch(batch_size)
        settings = StepSettings(lrs=(0.0,) * 3, momentum=0.0, update=True, scale=self._largest_scale())
        for _ in range(_STEPS):
            step(batch, settings)
        return step

    @torch.no_grad()
    def evaluate(self, model: DetectionModel, batch_size: int) -> None:
        """One batch of the evaluations in between, up to NMS, which takes one image after the other."""
        images = min(evaluated_at_once(batch_size * self.runtime.ranks.count), len(self.val))
        runtime = replace(self.runtime, amp_dtype=None)
        side = self.options.imgsz + max(self.model.head.strides)  # of square images, with the padding they get
        batch = self._noise(images, side, sizes_of=self.val, labels=_densest(self.val, images))
        predicted(for_evaluation(model, runtime), batch, runtime, gains=self._gains)

    def batch(self, batch_size: int) -> Batch:
        """Noise with as many labels as the densest images have, each in all the tiles of a sample.

        Not the most there can be, as a mosaic may draw an image that another has, too, but far above what is usual.
        """
        quad, stride = self.options.quad, max(self.model.head.strides)
        side = (self.options.imgsz + (stride if self.options.rect else 0)) * (2 if quad else 1)
        mosaics = self.hyp.mosaic > 0 and not self.options.rect
        tiles = 9 if mosaics and self.hyp.mosaic9 > 0 else 4 if mosaics else 1
        tiles *= 2 if mosaics and self.hyp.mixup > 0 else 1
        repeated = self.options.image_weights or self.options.repeat_factor > 0
        labels = tiles * _densest(self.train, batch_size, repeated=repeated)
        batch = self._noise(-(-batch_size // 4) if quad else batch_size, side, sizes_of=self.train, labels=labels)
        return replace(batch, indices=torch.zeros(batch_size, dtype=torch.int64))

    def _noise(self, images: int, side: int, *, sizes_of: LabelStore, labels: int) -> Batch:
        device = self.runtime.device
        noise = torch.Generator(device).manual_seed(self.options.seed)
        pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, device=device, generator=noise)
        rng = np.random.Generator(np.random.Philox(key=self.options.seed))
        known = label_sizes(sizes_of, self.options.imgsz)
        sizes = np.resize(known if len(known) else [[16.0, 16.0]], (labels, 2))
        centres = rng.uniform(0, side, (labels, 2))
        corners = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1).clip(0, side)
        return Batch(
            images=pixels.permute(0, 3, 1, 2),
            boxes=torch.from_numpy(corners.astype(np.float32)),
            classes=torch.from_numpy(rng.integers(self.model.head.num_classes, size=labels)),
            image_of=torch.arange(labels) % images,
            indices=torch.zeros(images, dtype=torch.int64),
        )

    @property
    def _gains(self) -> LossGains:
        return LossGains.for_head(self.hyp, self.model.head, self.options.imgsz, quad=self.options.quad)

    def _largest_scale(self) -> float:
        if not self.options.multi_scale:
            return 1.0
        return max(multi_scales(self.options.imgsz, max(self.model.head.strides)))


def _densest(store: LabelStore, images: int, *, repeated: bool = False) -> int:
    """How many labels so many images have at most, if each is there but once or may be `repeated`."""
    counts = np.sort(np.diff(store.offsets))[::-1]
    return int(counts[0]) * images if repeated else int(counts[:images].sum())
