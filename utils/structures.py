"""The values that cross borders between modules: shapes, units and dtypes, no logic. Read this file first.

B images of a batch, N boxes of an image, T boxes of a batch or split, L output levels, A anchors of a level,
C classes, K detections. Boxes are xyxy in pixels unless a name says otherwise; pixel i covers [i, i + 1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:  # config.py and `--help` pass through here and must not wait for torch
    import torch
    from torch import Tensor


class UserError(ValueError):
    """A mistake that the user can mend. The message is the one line they see: what is wrong, what would be right."""

    said_elsewhere: bool = False  # another rank tells the user of it; the exit code is the same


class RunError(UserError):
    """A UserError that struck when work was under way: exit code 1 in place of 2."""


Figures = TypeVar("Figures", float, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file that a data set YAML asks for; an archive is unpacked."""

    url: str
    to: Path  # folder; one of that name at the top of the archive is the same
    size: int | None = None  # bytes; None: not known
    sha256: str | None = None  # 64 lower-case hexadecimal digits


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set YAML after parsing. Each split is a tuple of entries, of the kinds in `utils/data/sources.py`."""

    source: Path  # the YAML itself
    root: Path  # its `path`, resolved; scan caches lie here
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    names: tuple[str, ...]
    val_fraction: float = 0.0  # > 0: val is this share of train, chosen by a hash of the file name
    imgsz: int | None = None  # defaults that the data set asks for
    epochs: int | None = None
    embedded: bool = False  # drawn by the program on first use
    downloads: tuple[Download, ...] = ()  # fetched when a part of train or val is not there


# LabelStore.ignore: boxes that are neither hit nor miss in evaluation
DIFFICULT = 1  # VOC: takes part in training like any other
CROWD = 2  # COCO: a region of many objects; no object to train on


@dataclass(frozen=True, kw_only=True)
class LabelStore:
    """The labels of one split as packed arrays, in pixels of the source images; I images, T boxes, C classes.

    Boxes of image i are rows offsets[i]:offsets[i + 1]. The polygon of box t is made of rings
    ring_offsets[t]:ring_offsets[t + 1] (none: it has no polygon), and ring r of points
    point_offsets[r]:point_offsets[r + 1]. Arrays may be memory-mapped and are read-only.
    """

    boxes: np.ndarray  # (T, 4) f32 xyxy px in the source image
    classes: np.ndarray  # (T,) i32
    ignore: np.ndarray  # (T,) u8: 0, DIFFICULT or CROWD
    area: np.ndarray  # (T,) f64 px^2
    annotated: np.ndarray  # (T, 4) f64 xywh px as COCO files have them, not clipped; (0, 4) where no file is COCO's
    ring_offsets: np.ndarray  # (T + 1,) i64
    point_offsets: np.ndarray  # (R + 1,) i64
    points: np.ndarray  # (Q, 2) f32 xy px in the source image
    offsets: np.ndarray  # (I + 1,) i64
    sizes: np.ndarray  # (I, 2) i32, height and width
    digests: np.ndarray  # (I,) u64 of the image file's bytes: equal for copies
    image_ids: np.ndarray  # (I,) i64 as the annotation file counts, -1 where there is no such number
    category_ids: np.ndarray  # (C,) i64 likewise, by class
    path_bytes: np.ndarray  # (P,) u8, UTF-8
    path_offsets: np.ndarray  # (I + 1,) i64

    def __len__(self) -> int:
        return len(self.sizes)

    def path(self, image: int) -> str:
        start, end = self.path_offsets[image], self.path_offsets[image + 1]
        return os.fsdecode(self.path_bytes[start:end].tobytes())

    def rows(self, image: int) -> slice:
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    def rings(self, box: int) -> list[np.ndarray]:
        """The polygon of a box: (n, 2) f32 points for each ring; empty when it has none."""
        rings = range(self.ring_offsets[box], self.ring_offsets[box + 1])
        return [self.points[self.point_offsets[ring] : self.point_offsets[ring + 1]] for ring in rings]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One source image's part in a sample.

    Upright: `crop` fills the rectangle `corners`, both of whole px; that is what `matrix` does. With rings, only what
    lies inside these shows, as of an object that copy-paste shows again.
    """

    image: int  # index into the LabelStore
    matrix: np.ndarray  # (3, 3) f64, base-image px (long side = imgsz) -> network px
    corners: np.ndarray  # (4, 2) f64 network px: the visible part, clockwise from that of the base image's top left
    crop: tuple[int, int, int, int] | None  # xyxy base-image px; None: tilted or mirrored, `matrix` says what shows
    rings: tuple[np.ndarray, ...] = ()  # (n, 2) f64 network px each; inside by the even-odd rule


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """A rectangle painted over in one colour."""

    box: tuple[int, int, int, int]  # xyxy network px, before flips
    colour: tuple[int, int, int]  # BGR


@dataclass(frozen=True, kw_only=True)
class PixelTransform:
    """A transform of the albumentations package, as the user's hyp YAML asks for it."""

    name: str
    arguments: tuple[tuple[str, Any], ...]  # plain values, lists as tuples


@dataclass(frozen=True, kw_only=True)
class PixelChange:
    """Transforms that change colours and leave every object where it is, and the seed of their chance."""

    transforms: tuple[PixelTransform, ...]
    seed: int  # 0 <= seed < 2^31


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The mixup partner: its tiles are painted alone, then blended in with `1 - weight`."""

    tiles: tuple[Tile, ...]
    weight: float  # of the first image


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Everything decided about one network input before a pixel is touched.

    Painted in this order: tiles, mix, hsv, pixels, cutouts, flips.
    """

    shape: tuple[int, int]  # height, width in network px
    tiles: tuple[Tile, ...]
    boxes: np.ndarray  # (N, 4) f32 xyxy network px, after flips
    classes: np.ndarray  # (N,) i32
    hsv: tuple[float, float, float] | None = None  # factors on 8-bit hue, saturation, value
    flip_lr: bool = False
    flip_ud: bool = False
    mix: Mix | None = None
    pixels: PixelChange | None = None
    cutouts: tuple[Cutout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuadPlan:
    """A network input of twice the side: up to four samples, two by two from the top left, or one enlarged twice."""

    shape: tuple[int, int]  # height, width in network px
    samples: tuple[SamplePlan, ...]  # in their own frames; where there are fewer than four, padding
    enlarge: bool  # the only sample fills everything
    boxes: np.ndarray  # (N, 4) f32 xyxy network px
    classes: np.ndarray  # (N,) i32


class Part(NamedTuple):
    """What a rank has of a batch that several ranks share, in network inputs."""

    own: int  # 0: this rank goes along with an input of another, which counts for nothing
    whole: int

    @property
    def share(self) -> float:
        return self.own / self.whole


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One network input with its labels. Images are RGB, channels-last in memory."""

    images: Tensor  # (B, 3, H, W) u8
    boxes: Tensor  # (T, 4) f32 xyxy network px
    classes: Tensor  # (T,) i64
    image_of: Tensor  # (T,) i64, 0 <= image_of < B
    indices: Tensor  # (B,) i64 into the LabelStore; with --quad up to 4 B, also of images that were left out
    placements: Tensor | None = None  # (B, 3, 3) f64 source px -> network px, when each image stands alone
    part: Part | None = None  # of a batch of several ranks, whose images `indices` are; None: all of it

    def to(self, device: torch.device) -> Batch:
        """What network and loss work on goes to the device; indices and placements stay."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> None:
        """Move all of it to where other processes can see it. Raises RuntimeError where there is no room."""
        for value in vars(self).values():
            if value is not None and value is not self.part:
                value.share_memory_()

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        moved = {name: move(getattr(self, name)) for name in ("images", "boxes", "classes", "image_of")}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What loss, decoding and autoanchor need to know of the Detect head."""

    strides: tuple[int, ...]  # (L,) px, ascending
    anchors: Tensor  # (L, A, 2) f32 width and height in px of the network input
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Means over a batch after gains, () f32. `total` is what is differentiated: (box + obj + cls) * batch size."""

    box: Tensor
    objectness: Tensor
    classification: Tensor
    total: Tensor


@dataclass(frozen=True, kw_only=True)
class NamedBatch:
    """A batch of training, to be told of."""

    epoch: int  # from 0
    index: int  # in its epoch, from 0
    images: tuple[int, ...]  # indices into the LabelStore, as Batch.indices


@dataclass(frozen=True, kw_only=True)
class BadUpdate:
    """An update that was skipped because a number in it was not finite, and the batches that may be at fault."""

    what: Literal["loss", "gradient"]  # a loss whenever one was not finite, as its gradient then is not, either
    batches: tuple[NamedBatch, ...]  # those with such a loss; for a gradient, all of the update


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What the detector says of one image, best first."""

    boxes: Tensor  # (K, 4) f32 xyxy px
    scores: Tensor  # (K,) f32
    classes: Tensor  # (K,) i64


@dataclass(frozen=True, kw_only=True)
class LossMeans:
    """Losses of an epoch, averaged over batches, as plain numbers."""

    box: float
    objectness: float
    classification: float


@dataclass(frozen=True, kw_only=True)
class CocoFigures:
    """The twelve figures that COCO's own tool prints, by its rules; None where there are no labels to find.

    Average precision over IoU .5:.05:.95, at .5, at .75, and over .5:.05:.95 for labels of up to 32^2 px, up to 96^2 px
    and more; average recall with 1, 10 and 100 detections per image and class, and with 100 by size.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """One class of an evaluation. Precision, recall and F1 at the confidence of the best mean F1, at IoU .5."""

    name: str
    images: int  # that hold the class
    labels: int
    precision: float  # 0 where the class makes no claim at that confidence
    recall: float
    f1: float
    map50: float
    map50_95: float
    best_f1: float  # of this class alone
    best_confidence: float  # where it is reached
    coco: CocoFigures


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Per-class curves at IoU .5, for classes that have labels, in the order of Metrics.per_class."""

    confidence: np.ndarray  # (1000,) 0..1, the x of the next three
    precision: np.ndarray  # (C, 1000), NaN where nothing is claimed
    recall: np.ndarray  # (C, 1000)
    f1: np.ndarray  # (C, 1000)
    recall_grid: np.ndarray  # (101,) 0..1
    precision_at_recall: np.ndarray  # (C, 101) interpolated


def fitness(map50: Figures, map50_95: Figures) -> Figures:
    """The one definition of better, of numbers or arrays: used for best.pt, early stopping and evolution."""
    return 0.1 * map50 + 0.9 * map50_95


HIT, FALSE_ALARM, MISSED = range(3)  # JudgedImage.verdicts

# Metrics.confusion counts detections above this score, and pairs them with labels from this IoU on
CONFUSION_CONFIDENCE = 0.25
CONFUSION_IOU = 0.45


@dataclass(frozen=True, kw_only=True)
class JudgedImage:
    """What was found in an image, and what was not, at the confidence of the best mean F1 and IoU .5.

    Detections that are hits or false alarms, then labels that nothing found; neither with what is ignored.
    """

    image: int  # index into the LabelStore
    boxes: np.ndarray  # (J, 4) f32 xyxy px in the source image
    classes: np.ndarray  # (J,) i64
    scores: np.ndarray  # (J,) f32, NaN for labels
    verdicts: np.ndarray  # (J,) u8: HIT, FALSE_ALARM or MISSED


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The result of an evaluation. Class means leave out classes without labels; without any label all are 0."""

    precision: float
    recall: float
    f1: float
    map50: float  # as COCO has it
    map50_95: float  # likewise
    images: int
    labels: int
    best_confidence: float  # where the mean F1 is best
    per_class: tuple[ClassMetrics, ...]
    coco: CocoFigures
    non_finite: int = 0  # images of which the network said something that is no finite number
    losses: LossMeans | None = None
    worst: tuple[JudgedImage, ...] = field(default=(), repr=False)  # most mistakes first
    curves: Curves | None = field(default=None, repr=False)
    confusion: np.ndarray | None = field(default=None, repr=False)  # (C + 1, C + 1) predicted x true, last = background

    @property
    def fitness(self) -> float:
        return fitness(self.map50, self.map50_95)
