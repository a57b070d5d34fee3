"""Every random decision about an epoch and its samples, and where boxes land, without touching a pixel.

Randomness is a function of (seed, epoch, position): the generator of a sample is keyed by these three numbers, so the
batches do not depend on the number of loader processes or on where a run was resumed. Augmentation follows SPEC 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.boxes import box_area, clip_boxes, transform_boxes, transform_points
from utils.data.images import base_scale, base_shape
from utils.hyp import Hyperparameters
from utils.structures import CROWD, LabelStore, Mix, QuadPlan, SamplePlan, Tile

PADDING = 114  # grey level where no image lies

# What a generator is for: each purpose has its own stream at each position
SAMPLE = 0
BATCH_ORDER = 1  # of rectangular batches
QUAD = 2
SIZE = 3  # of the network input, with --multi-scale

_EPOCH_POSITION = 2**32 - 1  # the position whose generators decide about the epoch as a whole
_MIN_SIDE_PX = 2
_MIN_AREA_KEPT = 0.1
_MAX_ASPECT = 100
_MIXUP_BETA = 32.0


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


@dataclass(frozen=True, kw_only=True)
class _Canvas:
    """Base images laid on a plane, before the random transform."""

    shape: tuple[int, int]
    placed: tuple[tuple[int, int, int], ...]  # image, x and y of its top left corner


@dataclass(frozen=True, kw_only=True)
class _Warp:
    """A drawn transform from canvas px to network px."""

    matrix: np.ndarray  # (3, 3)
    scale: float
    upright: bool  # only scaled and moved


@dataclass(frozen=True, kw_only=True)
class _Scene:
    tiles: tuple[Tile, ...]
    boxes: np.ndarray  # (N, 4) f64 network px
    classes: np.ndarray  # (N,) i32


def train_plan(
    store: LabelStore,
    image: int,
    *,
    imgsz: int,
    shape: tuple[int, int] | None = None,
    hyp: Hyperparameters,
    rng: np.random.Generator,
) -> SamplePlan:
    """The augmented sample that grows out of `image`; the output is of `shape` (height, width), else imgsz x imgsz."""
    shape = shape or (imgsz, imgsz)
    mix = None
    if rng.random() < hyp.mosaic:
        scene = _warped(store, _mosaic(store, image, imgsz, rng), imgsz, shape, hyp, rng)
        if rng.random() < hyp.mixup:
            partner = int(rng.integers(len(store)))
            other = _warped(store, _mosaic(store, partner, imgsz, rng), imgsz, shape, hyp, rng)
            mix = Mix(tiles=other.tiles, weight=float(rng.beta(_MIXUP_BETA, _MIXUP_BETA)))
            scene = _Scene(
                tiles=scene.tiles,
                boxes=np.concatenate([scene.boxes, other.boxes]),
                classes=np.concatenate([scene.classes, other.classes]),
            )
    else:
        scene = _warped(store, _letterbox(store, image, shape, imgsz), imgsz, shape, hyp, rng)
    factors = 1 + rng.uniform(-1, 1, 3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)
    flip_ud, flip_lr = bool(rng.random() < hyp.flipud), bool(rng.random() < hyp.fliplr)
    return SamplePlan(
        shape=shape,
        tiles=scene.tiles,
        boxes=_flipped(scene.boxes, shape, flip_ud=flip_ud, flip_lr=flip_lr).astype(np.float32),
        classes=scene.classes,
        hsv=tuple(map(float, factors)) if hyp.hsv_h or hyp.hsv_s or hyp.hsv_v else None,
        flip_ud=flip_ud,
        flip_lr=flip_lr,
        mix=mix,
    )


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
    """The base image in the middle of a grey network input of `shape` (height, width); no chance in it."""
    canvas = _letterbox(store, image, shape, imgsz)
    scene = _projected(store, canvas, _Warp(matrix=np.eye(3), scale=1.0, upright=True), imgsz, shape)
    boxes, classes = _canvas_boxes(store, canvas.placed[0], imgsz)  # evaluation leaves out none
    return SamplePlan(shape=shape, tiles=scene.tiles, boxes=boxes.astype(np.float32), classes=classes)


def source_to_network(store: LabelStore, plan: SamplePlan, imgsz: int) -> np.ndarray:
    """(3, 3) source px -> network px of a plan with one tile."""
    (tile,) = plan.tiles
    scale_x, scale_y = base_scale(tuple(store.sizes[tile.image]), imgsz)
    return tile.matrix @ np.diag([scale_x, scale_y, 1.0])


# ---- laying out ---------------------------------------------------------------------------------------------------


def _letterbox(store: LabelStore, image: int, shape: tuple[int, int], imgsz: int) -> _Canvas:
    height, width = base_shape(tuple(store.sizes[image]), imgsz)
    return _Canvas(shape=shape, placed=((image, (shape[1] - width) // 2, (shape[0] - height) // 2),))


def _mosaic(store: LabelStore, image: int, imgsz: int, rng: np.random.Generator) -> _Canvas:
    """The image and three drawn ones, in shuffled order, meet at a drawn centre of a canvas of twice the size."""
    centre_x, centre_y = (int(value) for value in rng.uniform(imgsz / 2, 3 * imgsz / 2, 2))
    images = rng.permutation([image, *rng.integers(len(store), size=3)])
    placed = []
    for quadrant, member in enumerate(images):
        height, width = base_shape(tuple(store.sizes[member]), imgsz)
        right, below = quadrant % 2, quadrant // 2
        placed.append((int(member), centre_x - width * (1 - right), centre_y - height * (1 - below)))
    return _Canvas(shape=(2 * imgsz, 2 * imgsz), placed=tuple(placed))


# ---- moving -------------------------------------------------------------------------------------------------------


def _warped(
    store: LabelStore,
    canvas: _Canvas,
    imgsz: int,
    shape: tuple[int, int],
    hyp: Hyperparameters,
    rng: np.random.Generator,
) -> _Scene:
    return _projected(store, canvas, _draw_warp(canvas.shape, shape, hyp, rng), imgsz, shape)


def _draw_warp(
    canvas: tuple[int, int], shape: tuple[int, int], hyp: Hyperparameters, rng: np.random.Generator
) -> _Warp:
    """Perspective, rotation, scale and shear about the canvas centre, which then moves near that of the output."""
    perspective = rng.uniform(-1, 1, 2) * hyp.perspective
    angle = np.deg2rad(rng.uniform(-1, 1) * hyp.degrees)
    scale = float(rng.uniform(1 - hyp.scale, 1 + hyp.scale))
    shear = np.tan(np.deg2rad(rng.uniform(-1, 1, 2) * hyp.shear))
    centre = (0.5 + rng.uniform(-1, 1, 2) * hyp.translate) * shape[::-1]

    to_origin = np.array([[1, 0, -canvas[1] / 2], [0, 1, -canvas[0] / 2], [0, 0, 1]])
    project = np.array([[1, 0, 0], [0, 1, 0], [*perspective, 1]])
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    rotate = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    skew = np.array([[1, shear[0], 0], [shear[1], 1, 0], [0, 0, 1]])
    to_centre = np.array([[1, 0, centre[0]], [0, 1, centre[1]], [0, 0, 1]])
    return _Warp(
        matrix=to_centre @ skew @ rotate @ project @ to_origin,
        scale=scale,
        upright=not (hyp.degrees or hyp.shear or hyp.perspective),
    )


def _projected(store: LabelStore, canvas: _Canvas, warp: _Warp, imgsz: int, shape: tuple[int, int]) -> _Scene:
    """Tiles and boxes of a canvas in the network frame; what does not show is left out."""
    tiles, boxes, classes = [], [np.empty((0, 4))], [np.empty(0, np.int32)]
    for placed in canvas.placed:
        visible = _visible_part(store, placed, canvas.shape, imgsz)
        if visible is None or not _in_front(visible, warp.matrix):
            continue
        tile = _tile(placed, visible, warp, shape)
        if tile is not None:
            tiles.append(tile)
        laid, laid_classes = _canvas_boxes(store, placed, imgsz)
        shown = clip_boxes(laid, canvas.shape)
        moved = clip_boxes(transform_boxes(shown, warp.matrix), shape)
        keep = _worth_keeping(moved, box_area(laid) * warp.scale**2)
        keep &= box_area(shown) > _MIN_AREA_KEPT * box_area(laid)  # tilted, even a line lies in a box with an area
        boxes.append(moved[keep])
        classes.append(laid_classes[keep])
    return _Scene(tiles=tuple(tiles), boxes=np.concatenate(boxes), classes=np.concatenate(classes))


def _visible_part(
    store: LabelStore, placed: tuple[int, int, int], canvas: tuple[int, int], imgsz: int
) -> np.ndarray | None:
    """(4, 2) corners in canvas px, clockwise from the top left, of the part of a placed image inside the canvas."""
    image, left, top = placed
    height, width = base_shape(tuple(store.sizes[image]), imgsz)
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + width, canvas[1]), min(top + height, canvas[0])
    if x2 <= x1 or y2 <= y1:
        return None
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)


def _in_front(corners: np.ndarray, matrix: np.ndarray) -> bool:
    """Whether a strong perspective leaves all corners before the camera; behind it, they would come out mirrored."""
    return bool((corners @ matrix[2, :2] + matrix[2, 2] > 0.1).all())


def _tile(placed: tuple[int, int, int], visible: np.ndarray, warp: _Warp, shape: tuple[int, int]) -> Tile | None:
    image, left, top = placed
    corners = transform_points(visible, warp.matrix)
    if warp.upright:  # neighbours share canvas edges, so rounding leaves neither gap nor overlap
        corners = np.clip(np.rint(corners), 0, [shape[1], shape[0]])
    low, high = np.maximum(corners.min(0), 0), np.minimum(corners.max(0), [shape[1], shape[0]])
    if (high <= low).any():
        return None
    place = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]], np.float64)
    return Tile(
        image=image, matrix=warp.matrix @ place, corners=corners, crop=(0, 0, 1, 1) if warp.upright else None
    )  # TODO the crop


def _canvas_boxes(store: LabelStore, placed: tuple[int, int, int], imgsz: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) f64 boxes of a placed image in canvas px, and their classes."""
    image, left, top = placed
    rows = store.rows(image)
    scale_x, scale_y = base_scale(tuple(store.sizes[image]), imgsz)
    boxes = store.boxes[rows] * np.array([scale_x, scale_y, scale_x, scale_y]) + (left, top, left, top)
    return boxes, np.asarray(store.classes[rows])


def _worth_keeping(boxes: np.ndarray, full_area: np.ndarray) -> np.ndarray:
    """(N,) bool: large enough, not a sliver, and enough left of the `full_area` that the box had before clipping."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    aspect = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1e-9)
    return (
        (width > _MIN_SIDE_PX)
        & (height > _MIN_SIDE_PX)
        & (width * height > _MIN_AREA_KEPT * full_area)
        & (aspect < _MAX_ASPECT)
    )


def _flipped(boxes: np.ndarray, shape: tuple[int, int], *, flip_ud: bool, flip_lr: bool) -> np.ndarray:
    height, width = shape
    if flip_ud:
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1)
    if flip_lr:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    return boxes
