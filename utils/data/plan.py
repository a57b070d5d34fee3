"""Every random decision about an epoch and its samples, without touching a pixel; scene.py works out where things land.

Randomness is a function of (seed, epoch, position): the generator of a sample is keyed by these three numbers, so the
batches do not depend on the number of loader processes or on where a run was resumed. Augmentation follows SPEC 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.boxes import box_area
from utils.data.images import base_scale
from utils.data.scene import (
    Canvas,
    Paste,
    Scene,
    Warp,
    canvas_boxes,
    covered_shares,
    has_polygon,
    letterboxed,
    mosaic_of_four,
    mosaic_of_nine,
    projected,
    shown_part,
)
from utils.hyp import Hyperparameters
from utils.structures import CROWD, Cutout, LabelStore, Mix, PixelChange, QuadPlan, SamplePlan

PADDING = 114  # grey level where no image lies

# What a generator is for: each purpose has its own stream at each position
SAMPLE = 0
BATCH_ORDER = 1  # of rectangular batches
QUAD = 2
SIZE = 3  # of the network input, with --multi-scale

_EPOCH_POSITION = 2**32 - 1  # the position whose generators decide about the epoch as a whole
_STOCK = 32  # uniform numbers that are drawn at once
_MIXUP_BETA = 32.0
_MAX_PASTED_OVER = 0.3  # of a box, by a pasted one
_MAX_CUTOUTS = 8
_MAX_COVERED = 0.6  # of a box, by cutouts


def generator(seed: int, epoch: int, position: int, purpose: int = SAMPLE) -> np.random.Generator:
    """The random generator of one sample: counter-based, so any one is made without making those before it.

    Streams of different purposes start 2^192 numbers apart, so they never overlap.
    """
    key = np.array([seed, epoch << 32 | position], np.uint64)
    counter = np.array([0, 0, 0, purpose], np.uint64)  # lowest word first
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


# ---- the images of an epoch ---------------------------------------------------------------------------------------


def epoch_order(seed: int, epoch: int, num_images: int, weights: np.ndarray | None = None) -> np.ndarray:
    """(num_images,) the images that an epoch goes through: a permutation, or draws with replacement by `weights`."""
    rng = generator(seed, epoch, _EPOCH_POSITION)
    if weights is None:
        return rng.permutation(num_images)
    return rng.choice(num_images, num_images, p=weights / weights.sum())


def even_order(seed: int, epoch: int, weights: np.ndarray) -> np.ndarray:
    """(I,) images drawn by `weights` (I,), each as often as is its due, rounded down or up, in random order.

    Systematic resampling: its due is an image's share of a line of I units, on which a comb of I teeth one unit apart
    falls at random. The line is laid in another order each epoch, so no two images always go together.
    """
    rng, count = generator(seed, epoch, _EPOCH_POSITION), len(weights)
    laid = rng.permutation(count)
    ends = np.cumsum(weights[laid] * (count / weights.sum()))
    teeth = np.arange(count) + rng.random()
    drawn = laid[np.minimum(np.searchsorted(ends, teeth, side="right"), count - 1)]
    return rng.permutation(drawn)


def batch_order(seed: int, epoch: int, num_batches: int) -> np.ndarray:
    """(num_batches,) the permutation of batches that an epoch goes through, where their images are not in order."""
    return generator(seed, epoch, _EPOCH_POSITION, BATCH_ORDER).permutation(num_batches)


def class_weights(store: LabelStore, num_classes: int, class_maps: Sequence[float] = ()) -> np.ndarray:
    """(C,) f64: inverse class frequency, of sum 1, times (1 - mAP)^2; 0 for classes without labels.

    `class_maps` are the mAPs of all classes, 0..1; empty stands for zeros. Crowds are no labels to train on.
    """
    counts = np.bincount(store.classes[store.ignore != CROWD], minlength=num_classes)
    weights = np.divide(1, counts, out=np.zeros(num_classes), where=counts > 0)
    shares = weights / max(weights.sum(), np.finfo(float).tiny)  # no labels: all stay 0
    return shares * (1 - np.array(class_maps if len(class_maps) else [0.0] * num_classes)) ** 2


def image_weights(store: LabelStore, class_weights: np.ndarray) -> np.ndarray:
    """(I,) f64: the sum of the class weights of an image's labels; ones when no image has any weight."""
    weights = np.zeros(len(store))
    labelled = np.diff(store.offsets) > 0
    if labelled.any():
        of_boxes = np.where(store.ignore == CROWD, 0, class_weights[store.classes])
        weights[labelled] = np.add.reduceat(of_boxes, store.offsets[:-1][labelled])
    return weights if weights.any() else np.ones(len(store))


def repeat_factors(store: LabelStore, num_classes: int, threshold: float) -> np.ndarray:
    """(I,) f64: how much more often an image is due than one of frequent classes alone.

    Gupta, Dollar, Girshick: LVIS, 2019: r(c) = max(1, sqrt(threshold / f(c))), where f(c) is the share of images with
    the class c, and an image's factor is the largest of its classes; 1 where it has none. Crowds do not count.
    """
    counted = np.flatnonzero(store.ignore != CROWD)
    image_of = np.repeat(np.arange(len(store)), np.diff(store.offsets))
    pairs = np.unique(image_of[counted] * num_classes + store.classes[counted])  # of an image and a class that it has
    images, classes = pairs // num_classes, pairs % num_classes
    shares = np.bincount(classes, minlength=num_classes) / len(store)
    of_classes = np.sqrt(threshold / np.maximum(shares, np.finfo(float).tiny))
    factors = np.ones(len(store))
    np.maximum.at(factors, images, of_classes[classes])
    return factors


# ---- samples ------------------------------------------------------------------------------------------------------


class _Chance:
    """Numbers drawn one after the other; from a stock of them, as a call of the generator for each would cost more."""

    def __init__(self, rng: np.random.Generator):
        self._numbers = itertools.chain.from_iterable(iter(lambda: rng.random(_STOCK).tolist(), None))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def below(self, count: int) -> int:
        return int(next(self._numbers) * count)

    def happens(self, probability: float) -> bool:
        return next(self._numbers) < probability


def train_plan(
    store: LabelStore,
    image: int,
    *,
    imgsz: int,
    shape: tuple[int, int] | None = None,
    hyp: Hyperparameters,
    rng: np.random.Generator,
) -> SamplePlan:
    """The augmented sample that grows out of `image`; the output is of `shape` (height, width), else imgsz x imgsz.

    Chance is drawn in the order of the code: mosaic and mixup, colours, flips, cutouts, pixels.
    """
    shape = shape or (imgsz, imgsz)
    chance, mix = _Chance(rng), None
    if chance.happens(hyp.mosaic):
        scene = _mosaic(store, image, imgsz, shape, hyp, chance)
        if chance.happens(hyp.mixup):
            other = _mosaic(store, chance.below(len(store)), imgsz, shape, hyp, chance)
            mix = Mix(tiles=other.tiles, weight=float(rng.beta(_MIXUP_BETA, _MIXUP_BETA)))
            scene = replace(
                scene,
                boxes=np.concatenate([scene.boxes, other.boxes]),
                classes=np.concatenate([scene.classes, other.classes]),
            )
    else:
        canvas = letterboxed(store, image, shape, imgsz)
        scene = projected(store, canvas, _draw_warp(canvas.shape, shape, hyp, chance), shape)
    hsv = tuple(1 + chance.uniform(-1, 1) * gain for gain in (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v))
    flip_ud, flip_lr = chance.happens(hyp.flipud), chance.happens(hyp.fliplr)
    cutouts, boxes, classes = (), scene.boxes, scene.classes
    if chance.happens(hyp.cutout):
        cutouts = _draw_cutouts(shape, chance)
        seen = covered_shares(boxes, [cutout.box for cutout in cutouts]) <= _MAX_COVERED
        boxes, classes = boxes[seen], classes[seen]
    pixels = None
    if hyp.albumentations:
        pixels = PixelChange(transforms=hyp.albumentations, seed=chance.below(2**31))
    return SamplePlan(
        shape=shape,
        tiles=scene.tiles,
        boxes=_flipped(boxes, shape, flip_ud=flip_ud, flip_lr=flip_lr),
        classes=classes,
        hsv=hsv if hyp.hsv_h or hyp.hsv_s or hyp.hsv_v else None,
        flip_ud=flip_ud,
        flip_lr=flip_lr,
        mix=mix,
        pixels=pixels,
        cutouts=cutouts,
    )


def _mosaic(
    store: LabelStore, image: int, imgsz: int, shape: tuple[int, int], hyp: Hyperparameters, chance: _Chance
) -> Scene:
    """Four images in shuffled order, or nine around `image`; the others are drawn. Then copy-paste, then the warp.

    Four meet, and the fifth of nine has its middle, at a point of the canvas that is uniform in [S/2, 3S/2]^2. For nine
    that is a window of 2S, drawn from the 3S that nine square images take.
    """
    of_nine = chance.happens(hyp.mosaic9)
    centre = int(chance.uniform(imgsz / 2, 3 * imgsz / 2)), int(chance.uniform(imgsz / 2, 3 * imgsz / 2))
    images = [chance.below(len(store)) for _ in range(9 if of_nine else 4)]
    images[4 if of_nine else chance.below(4)] = image
    canvas = (mosaic_of_nine if of_nine else mosaic_of_four)(store, images, centre, imgsz)
    if hyp.copy_paste:
        canvas = replace(canvas, pastes=_draw_pastes(store, canvas, hyp.copy_paste, chance))
    return projected(store, canvas, _draw_warp(canvas.shape, shape, hyp, chance), shape)


def _draw_pastes(store: LabelStore, canvas: Canvas, probability: float, chance: _Chance) -> tuple[Paste, ...]:
    """Objects with polygons to show again, each drawn for itself, mirrored left-right across the canvas.

    One that would cover more than a share of any box there, pasted ones included, is left out. A crowd is no object,
    but neither to be covered.
    """
    shown = [shown_part(canvas_boxes(store, laid), laid) for laid in canvas.laid]
    taken = np.concatenate([np.empty((0, 4)), *shown])
    pastes = []
    for laid, boxes in zip(canvas.laid, shown):
        rows = store.rows(laid.image)
        candidates = has_polygon(store, rows) & (store.ignore[rows] != CROWD) & (box_area(boxes) > 0)
        for number in np.flatnonzero(candidates).tolist():
            if not chance.happens(probability):
                continue
            x1, y1, x2, y2 = boxes[number].tolist()
            target = np.array([[canvas.shape[1] - x2, y1, canvas.shape[1] - x1, y2]])
            overlap = box_area(np.clip(target, taken[:, [0, 1, 0, 1]], taken[:, [2, 3, 2, 3]]))
            if (overlap <= _MAX_PASTED_OVER * box_area(taken)).all():
                pastes.append(Paste(laid=laid, row=rows.start + number, source=boxes[number]))
                taken = np.concatenate([taken, target])
    return tuple(pastes)


def _draw_warp(canvas: tuple[int, int], shape: tuple[int, int], hyp: Hyperparameters, chance: _Chance) -> Warp:
    """Perspective, rotation, scale and shear about the canvas centre, which then moves near that of the output."""
    perspective = [chance.uniform(-1, 1) * hyp.perspective for _ in range(2)]
    angle = math.radians(chance.uniform(-1, 1) * hyp.degrees)
    scale = chance.uniform(1 - hyp.scale, 1 + hyp.scale)
    shear = [math.tan(math.radians(chance.uniform(-1, 1) * hyp.shear)) for _ in range(2)]
    x, y = ((0.5 + chance.uniform(-1, 1) * hyp.translate) * side for side in shape[::-1])
    if not (hyp.degrees or hyp.shear or hyp.perspective):
        left, top = x - scale * canvas[1] / 2, y - scale * canvas[0] / 2
        return Warp(matrix=np.array([[scale, 0, left], [0, scale, top], [0, 0, 1]]), scale=scale, upright=True)
    to_origin = np.array([[1, 0, -canvas[1] / 2], [0, 1, -canvas[0] / 2], [0, 0, 1]])
    project = np.array([[1, 0, 0], [0, 1, 0], [*perspective, 1]])
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    rotate = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    skew = np.array([[1, shear[0], 0], [shear[1], 1, 0], [0, 0, 1]])
    to_centre = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
    return Warp(matrix=to_centre @ skew @ rotate @ project @ to_origin, scale=scale, upright=False)


def _draw_cutouts(shape: tuple[int, int], chance: _Chance) -> tuple[Cutout, ...]:
    """One to eight rectangles, of any colour; middles are uniform in the output, sides in 1/32 to 1/4 of its sides."""
    cutouts = []
    for _ in range(1 + chance.below(_MAX_CUTOUTS)):
        spans = []
        for side in shape[::-1]:
            length, middle = chance.uniform(side / 32, side / 4), chance.uniform(0, side)
            low = max(int(middle - length / 2), 0)
            spans.append((low, min(max(round(middle + length / 2), low + 1), side)))
        (x1, x2), (y1, y2) = spans
        colour = (chance.below(256), chance.below(256), chance.below(256))
        cutouts.append(Cutout(box=(x1, y1, x2, y2), colour=colour))
    return tuple(cutouts)


def _flipped(boxes: np.ndarray, shape: tuple[int, int], *, flip_ud: bool, flip_lr: bool) -> np.ndarray:
    """(N, 4) f32."""
    flipped = boxes.astype(np.float32)
    if flip_ud:
        flipped[:, 1], flipped[:, 3] = shape[0] - boxes[:, 3], shape[0] - boxes[:, 1]
    if flip_lr:
        flipped[:, 0], flipped[:, 2] = shape[1] - boxes[:, 2], shape[1] - boxes[:, 0]
    return flipped


def enlarges(rng: np.random.Generator) -> bool:
    """Whether, of a group of four samples, the first is enlarged and the others are left out: even odds."""
    return bool(rng.random() < 0.5)


def quad_plan(samples: Sequence[SamplePlan], *, enlarge: bool) -> QuadPlan:
    """A network input of twice the side out of up to four samples of one shape, side by side from the top left.

    `enlarge`: out of the one sample given, enlarged twice.
    """
    height, width = samples[0].shape
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float32)
    factor = 2 if enlarge else 1
    return QuadPlan(
        shape=(2 * height, 2 * width),
        samples=tuple(samples),
        enlarge=enlarge,
        boxes=np.concatenate([factor * plan.boxes + np.tile(corner, 2) for plan, corner in zip(samples, corners)]),
        classes=np.concatenate([plan.classes for plan in samples]),
    )


def letterbox_plan(store: LabelStore, image: int, *, shape: tuple[int, int], imgsz: int) -> SamplePlan:
    """The base image in the middle of a grey network input of `shape` (height, width), and its objects; no chance.

    No box is too small here. A crowd is no object: the losses of an evaluation would count it as one.
    """
    canvas = letterboxed(store, image, shape, imgsz)
    scene = projected(store, canvas, Warp(matrix=np.eye(3), scale=1.0, upright=True), shape)
    rows = store.rows(image)
    objects = store.ignore[rows] != CROWD
    return SamplePlan(
        shape=shape,
        tiles=scene.tiles,
        boxes=canvas_boxes(store, canvas.laid[0])[objects].astype(np.float32),
        classes=store.classes[rows][objects],
    )


def source_to_network(store: LabelStore, plan: SamplePlan, imgsz: int) -> np.ndarray:
    """(3, 3) source px -> network px of a plan with one tile."""
    (tile,) = plan.tiles
    scale_x, scale_y = base_scale(tuple(store.sizes[tile.image]), imgsz)
    return tile.matrix @ np.diag([scale_x, scale_y, 1.0])
