"""Which detections found a label: COCO's greedy matching by score, and the one-to-one pairs of a confusion matrix.

What happens to a detection at the ten IoU thresholds and in the four area ranges is a number of 40 bits, so that all of
them are settled at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from utils.boxes import xywh_from_xyxy
from utils.evaluate.ordering import descending, positions_in, row_order, starts_of
from utils.structures import CONFUSION_CONFIDENCE, CONFUSION_IOU, CROWD, Detections, LabelStore

if TYPE_CHECKING:
    from torch import Tensor

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # .5:.05:.95, to the last bit as pycocotools has them
AREA_RANGES = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # all, small, medium, large: px^2, limits included

_T, _A = len(IOU_THRESHOLDS), len(AREA_RANGES)
_OF_RANGE = (1 << _T) - 1  # the bits of the first range
_EVERYWHERE = (1 << _T * _A) - 1
_IN_ALL_RANGES = sum(1 << _T * area for area in range(_A))
_REACHED = np.array([((1 << level) - 1) * _IN_ALL_RANGES for level in range(_T + 1)])  # by number of thresholds reached
_HIGHER = 16  # than any level: levels of one label end where those of the next begin
_PAIRS_AT_ONCE = 1 << 18  # what bounds the memory of the search for overlaps


def verdict_bits(verdicts: np.ndarray, area: int) -> np.ndarray:
    """(K,) verdicts -> (K, T) bool at the IoU thresholds, for one area range."""
    return (verdicts[:, None] >> np.arange(area * _T, (area + 1) * _T) & 1).astype(bool)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The true boxes of one image."""

    xywh: np.ndarray  # (N, 4) f64 px in the source image
    classes: np.ndarray  # (N,) integers
    area: np.ndarray  # (N,) f64 px^2, which says in what area ranges a label counts
    ignore: np.ndarray  # (N,) bool: neither hit nor miss, whatever finds it and however often
    crowd: np.ndarray  # (N,) bool, part of `ignore`: IoU becomes overlap / detection area, as in COCO

    @classmethod
    def of(cls, store: LabelStore, image: int) -> Labels:
        rows = store.rows(image)
        ignore, boxes = store.ignore[rows], store.boxes[rows].astype(np.float64)
        return cls(
            xywh=store.annotated[rows] if len(store.annotated) else xywh_from_xyxy(boxes),
            classes=store.classes[rows],
            area=store.area[rows],
            ignore=ignore != 0,
            crowd=ignore == CROWD,
        )


@dataclass(frozen=True, kw_only=True)
class DetectionTable:
    """The detections of several images, one after another."""

    image: np.ndarray  # (K,) integers >= 0
    xywh: np.ndarray  # (K, 4) f64 px in the source image
    scores: np.ndarray  # (K,) f32 or f64
    classes: np.ndarray  # (K,) integers >= 0

    @classmethod
    def of(cls, detections: Sequence[Detections]) -> DetectionTable:
        return cls(
            image=_owners([len(one.scores) for one in detections]),
            xywh=xywh_from_xyxy(_stack([_numpy(one.boxes) for one in detections], (0, 4), np.float64)),
            scores=_stack([_numpy(one.scores) for one in detections], (0,), np.float32),
            classes=_stack([_numpy(one.classes) for one in detections], (0,), np.int64),
        )

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """The labels of several images, one after another."""

    image: np.ndarray  # (N,) integers >= 0
    xywh: np.ndarray  # (N, 4) f64
    classes: np.ndarray  # (N,) integers >= 0
    area: np.ndarray  # (N,) f64
    ignore: np.ndarray  # (N,) bool
    crowd: np.ndarray  # (N,) bool

    @classmethod
    def of(cls, labels: Sequence[Labels]) -> LabelTable:
        return cls(
            image=_owners([len(one.classes) for one in labels]),
            xywh=_stack([one.xywh for one in labels], (0, 4), np.float64),
            classes=_stack([one.classes for one in labels], (0,), np.int64),
            area=_stack([one.area for one in labels], (0,), np.float64),
            ignore=_stack([one.ignore for one in labels], (0,), bool),
            crowd=_stack([one.crowd for one in labels], (0,), bool),
        )

    def __len__(self) -> int:
        return len(self.classes)

    def counted(self) -> np.ndarray:
        """(N, A) bool: the area ranges in which each label is one to find."""
        return _in_ranges(self.area) & ~self.ignore[:, None]

    def to_find(self, num_classes: int) -> np.ndarray:
        """(C, A) i64 how many labels of each class count in each area range."""
        counted = self.counted()
        return np.stack([np.bincount(self.classes[counted[:, area]], minlength=num_classes) for area in range(_A)], 1)


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What became of K detections and N labels; bit `a * 10 + t` is that of area range a and IoU threshold t.

    A detection that is neither hit nor ignored is a false alarm.
    """

    hits: np.ndarray  # (K,) i64
    ignored: np.ndarray  # (K,) i64: to be left out of the count
    ranks: np.ndarray  # (K,) i32: how many detections of the same image and class come before it
    taken: np.ndarray  # (N,) i64: what was found


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Detections and labels that overlap enough to match; rows of the two tables."""

    detection: np.ndarray  # (M,)
    label: np.ndarray  # (M,)
    iou: np.ndarray  # (M,) f64

    def __getitem__(self, rows: np.ndarray) -> _Pairs:
        return _Pairs(detection=self.detection[rows], label=self.label[rows], iou=self.iou[rows])


def match(found: DetectionTable, truth: LabelTable) -> Verdicts:
    """Match the detections of each image to its labels.

    As COCO's tool: detections by descending score (equal scores: in the given order) each take, at every threshold,
    the free label of their class with the highest IoU at or above it; labels that count go before those that do not,
    and of equal IoUs the last label wins. A label that does not count because of its area is taken once, one of
    `ignore` any number of times. What takes no label and lies outside an area range is ignored there.
    """
    order = row_order(found.image, found.classes, descending(found.scores))
    group = _group(found.image, found.classes)[order]
    ranks = np.empty(len(order), np.int32)
    ranks[order] = positions_in(_run_lengths(group))
    pairs = _overlaps(found, truth, order, group, _group(truth.image, truth.classes), at_least=IOU_THRESHOLDS[0])
    hits, ignored, taken = _settled(len(found), truth, pairs)
    outside = _EVERYWHERE & ~_bits_of_ranges(_in_ranges(found.xywh[:, 2] * found.xywh[:, 3]))
    return Verdicts(hits=hits, ignored=ignored | outside & ~hits, ranks=ranks, taken=taken)


def _settled(num_detections: int, truth: LabelTable, pairs: _Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts on detections and labels, from pairs in the order of their detections.

    Most detections could only take one label, which nothing else wants that could take another: those are settled all
    at once, and what is left one after the other.
    """
    hits, ignored = np.zeros((2, num_detections), np.int64)
    taken = np.zeros(len(truth), np.int64)
    counted = _bits_of_ranges(truth.counted())
    has_choice = np.bincount(pairs.detection, minlength=num_detections)[pairs.detection] > 1
    contested = np.zeros(len(truth), bool)
    contested[pairs.label[has_choice]] = True
    contested = contested[pairs.label]
    _settle_plain(pairs[~contested], truth, counted, hits, ignored, taken)
    _settle_contested(_by_preference(pairs[contested]), truth, counted, hits, ignored, taken)
    return hits, ignored, taken


def _settle_plain(
    pairs: _Pairs, truth: LabelTable, counted: np.ndarray, hits: np.ndarray, ignored: np.ndarray, taken: np.ndarray
) -> None:
    """A label goes to its first detection at all thresholds that this one reaches, to a later one at higher ones."""
    pairs = pairs[row_order(pairs.label)]
    label, detection = pairs.label, pairs.detection
    first = np.diff(label, prepend=-1) != 0
    level = _levels(pairs.iou)
    highest = np.maximum.accumulate(label * _HIGHER + level) - label * _HIGHER  # of the label's detections so far
    before = np.where(first | truth.ignore[label], 0, np.roll(highest, 1))
    new = _REACHED[level] & ~_REACHED[before]
    hits[detection] = new & counted[label]
    ignored[detection] = new & ~counted[label]
    last = np.roll(first, -1)
    taken[label[last]] = np.where(truth.ignore[label[last]], 0, _REACHED[highest[last]])


def _settle_contested(
    pairs: _Pairs, truth: LabelTable, counted: np.ndarray, hits: np.ndarray, ignored: np.ndarray, taken: np.ndarray
) -> None:
    """Detection after detection, from pairs by preference."""
    levels, label = _levels(pairs.iou).tolist(), pairs.label.tolist()
    reached, counts, any_number = _REACHED.tolist(), counted.tolist(), truth.ignore.tolist()
    gone = dict.fromkeys(label, 0)
    starts = np.flatnonzero(np.diff(pairs.detection, prepend=-1))
    stops = [*starts[1:].tolist(), len(label)]
    for detection, start, stop in zip(pairs.detection[starts].tolist(), starts.tolist(), stops):
        left, hit, out = _EVERYWHERE, 0, 0
        for at in range(start, stop):
            one = label[at]
            new = left & reached[levels[at]] & counts[one] & ~gone[one]
            gone[one] |= new
            hit |= new
            left ^= new
        for at in range(start, stop):
            if not left:
                break
            one = label[at]
            new = left & reached[levels[at]] & ~counts[one] & ~gone[one]
            if not any_number[one]:
                gone[one] |= new
            out |= new
            left ^= new
        hits[detection], ignored[detection] = hit, out
    taken[list(gone)] = list(gone.values())


def _levels(iou: np.ndarray) -> np.ndarray:
    """(M,) how many thresholds each IoU reaches."""
    return np.searchsorted(IOU_THRESHOLDS, iou, "right")


def _by_preference(pairs: _Pairs) -> _Pairs:
    """Within each detection the highest IoU first, and of equal ones the last label."""
    place = np.cumsum(np.diff(pairs.detection, prepend=-1) != 0)
    return pairs[np.lexsort((-pairs.label, -pairs.iou, place))]


def _overlaps(
    found: DetectionTable,
    truth: LabelTable,
    order: np.ndarray,
    group: np.ndarray,
    label_group: np.ndarray,
    *,
    at_least: float,
) -> _Pairs:
    """Every detection with every label of its group where their IoU reaches `at_least`, in the order of detections.

    order: (K',) rows of detections, by group; group: (K',) that of each; label_group: (N,).
    """
    by_group = np.argsort(label_group, kind="stable")
    known, counts = np.unique(label_group[by_group], return_counts=True)
    if not len(known):
        return _Pairs(detection=order[:0], label=by_group[:0], iou=np.empty(0))
    at = np.minimum(np.searchsorted(known, group), len(known) - 1)
    matching = known[at] == group
    order, first, count = order[matching], starts_of(counts)[at[matching]], counts[at[matching]]
    parts = []
    for part in _parts(count):
        label = by_group[np.repeat(first[part], count[part]) + positions_in(count[part])]
        parts.append(_overlapping(found, truth, np.repeat(order[part], count[part]), label, at_least))
    return _Pairs(
        detection=np.concatenate([order[:0], *(part.detection for part in parts)]),
        label=np.concatenate([by_group[:0], *(part.label for part in parts)]),
        iou=np.concatenate([np.empty(0), *(part.iou for part in parts)]),
    )


def _parts(counts: np.ndarray) -> Iterator[slice]:
    """Runs of rows whose counts sum up to some _PAIRS_AT_ONCE each."""
    number = np.cumsum(counts) // _PAIRS_AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(counts)]
    return (slice(start, stop) for start, stop in pairwise(cuts))


def _overlapping(
    found: DetectionTable, truth: LabelTable, detection: np.ndarray, label: np.ndarray, at_least: float
) -> _Pairs:
    """Those of the pairs whose IoU reaches `at_least`, to the last bit as COCO's tool computes it."""
    width = _shared(found.xywh, detection, truth.xywh, label, 0)
    near = width > 0
    detection, label, width = detection[near], label[near], width[near]
    height = _shared(found.xywh, detection, truth.xywh, label, 1)
    near = height > 0
    detection, label = detection[near], label[near]
    overlap = width[near] * height[near]
    area, label_area = (xywh[rows, 2] * xywh[rows, 3] for xywh, rows in ((found.xywh, detection), (truth.xywh, label)))
    iou = overlap / np.where(truth.crowd[label], area, area + label_area - overlap)
    return _Pairs(detection=detection, label=label, iou=iou)[iou >= at_least]


def _shared(boxes: np.ndarray, rows: np.ndarray, others: np.ndarray, other_rows: np.ndarray, axis: int) -> np.ndarray:
    """How far paired boxes xywh overlap along an axis; negative where they lie apart."""
    high, other_high = boxes[:, axis] + boxes[:, axis + 2], others[:, axis] + others[:, axis + 2]
    low, other_low = boxes[rows, axis], others[other_rows, axis]
    return np.minimum(high[rows], other_high[other_rows]) - np.maximum(low, other_low)


def _in_ranges(area: np.ndarray) -> np.ndarray:
    """(N,) px^2 -> (N, A) bool."""
    return np.stack([(area >= low) & (area <= high) for low, high in AREA_RANGES], 1)


def _bits_of_ranges(ranges: np.ndarray) -> np.ndarray:
    """(N, A) bool -> (N,) i64 with the bits of all thresholds of these ranges."""
    return ranges @ np.array([_OF_RANGE << area * _T for area in range(_A)])


def _group(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return image.astype(np.int64) << 32 | classes.astype(np.int64)


def _run_lengths(sorted_values: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(sorted_values, prepend=-1))
    return np.diff(starts, append=len(sorted_values))


def confusions(found: DetectionTable, truth: LabelTable, num_classes: int) -> np.ndarray:
    """(P, 2) i32 predicted and true class, `num_classes` for background; the rows of several batches add up.

    Detections above CONFUSION_CONFIDENCE and labels of any class pair up one to one from CONFUSION_IOU on, highest IoU
    first. What is left over stands against the background, except detections on ignored labels, which are left out.
    """
    confident = np.flatnonzero(found.scores > CONFUSION_CONFIDENCE)
    order = confident[np.argsort(found.image[confident], kind="stable")]
    pairs = _overlaps(found, truth, order, found.image[order], truth.image, at_least=CONFUSION_IOU)
    pairs = pairs[np.lexsort((-found.scores[pairs.detection], -pairs.iou, truth.ignore[pairs.label]))]

    predicted_as = np.full(len(truth), num_classes)
    unpaired = np.zeros(len(found), bool)
    unpaired[confident] = True
    for detection, label in zip(pairs.detection.tolist(), pairs.label.tolist()):
        if unpaired[detection] and predicted_as[label] == num_classes:
            unpaired[detection] = False
            if not truth.ignore[label]:
                predicted_as[label] = found.classes[detection]

    on_labels = np.stack([predicted_as, truth.classes], 1)[~truth.ignore]
    alone = found.classes[unpaired]
    return np.concatenate([on_labels, np.stack([alone, np.full(len(alone), num_classes)], 1)]).astype(np.int32)


def confusion_matrix(pairs: np.ndarray, num_classes: int) -> np.ndarray:
    """(P, 2) predicted and true class -> (C + 1, C + 1) i64 counts, predicted x true, last = background."""
    side = num_classes + 1
    return np.bincount(pairs[:, 0].astype(np.int64) * side + pairs[:, 1], minlength=side * side).reshape(side, side)


def _owners(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), np.array(counts, np.int64))


def _stack(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(empty, dtype), *parts]).astype(dtype, copy=False)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.numpy(force=True)
