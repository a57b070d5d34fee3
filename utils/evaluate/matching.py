"""Which detections found a label: COCO's greedy matching by score, and the one-to-one pairs of a confusion matrix.

All images and thresholds go in step: step k settles the k-th best detection of every (image, class) at once. Only
detections that overlap some label enough to matter take part, so there are few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils.boxes import box_area
from utils.structures import CROWD, Detections, LabelStore

if TYPE_CHECKING:
    from torch import Tensor

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # .5:.05:.95, to the last bit as pycocotools has them
CONFUSION_CONFIDENCE = 0.25
CONFUSION_IOU = 0.45


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The true boxes of one image."""

    boxes: np.ndarray  # (N, 4) xyxy px in the source image
    classes: np.ndarray  # (N,) integers
    ignore: np.ndarray  # (N,) bool: neither hit nor miss, whatever finds it and however often
    crowd: np.ndarray | None = None  # (N,) bool, part of `ignore`: IoU becomes overlap / detection area, as in COCO

    @classmethod
    def of(cls, store: LabelStore, image: int) -> Labels:
        rows = store.rows(image)
        ignore = store.ignore[rows]
        return cls(boxes=store.boxes[rows], classes=store.classes[rows], ignore=ignore != 0, crowd=ignore == CROWD)


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What became of K detections at T thresholds. A detection that is neither hit nor ignored is a false alarm."""

    hits: np.ndarray  # (K, T) bool
    ignored: np.ndarray  # (K, T) bool: to be left out of the count


@dataclass(frozen=True, kw_only=True)
class _Detected:
    """The detections of several images in one table."""

    image: np.ndarray  # (K,) position in the sequence
    boxes: np.ndarray  # (K, 4) f64
    scores: np.ndarray  # (K,)
    classes: np.ndarray  # (K,)


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """The labels of several images in one table."""

    image: np.ndarray  # (N,)
    boxes: np.ndarray  # (N, 4) f64
    classes: np.ndarray  # (N,)
    ignore: np.ndarray  # (N,) bool
    crowd: np.ndarray  # (N,) bool


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Detections and labels that overlap enough to match; rows of the two tables."""

    detection: np.ndarray  # (M,)
    label: np.ndarray  # (M,)
    iou: np.ndarray  # (M,) f64

    def sorted(self, *keys: np.ndarray) -> _Pairs:
        """By the first key, then the second, and so on."""
        return self[np.lexsort(keys[::-1])]

    def __getitem__(self, rows: np.ndarray) -> _Pairs:
        return _Pairs(detection=self.detection[rows], label=self.label[rows], iou=self.iou[rows])


def match(
    detections: Sequence[Detections], labels: Sequence[Labels], *, thresholds: np.ndarray = IOU_THRESHOLDS
) -> Matches:
    """Match the detections of each image to its labels; rows follow the detections, image after image.

    As pycocotools: detections by descending score (equal scores: in the given order) each take, at every threshold,
    the free label of their class with the highest IoU at or above it; labels that count go before ignored ones, and of
    equal IoUs the last label wins. Boxes of both in px of the same frame. Memory grows with the detection-label pairs
    of the call, so feed batch after batch.
    """
    found, truth = _detected(detections), _labelled(labels)
    pairs = _overlaps(found, truth, at_least=thresholds[0], same_class=True)
    by_score = np.empty(len(found.scores), np.int64)
    by_score[np.argsort(-found.scores, kind="stable")] = np.arange(len(found.scores))
    preference = (truth.ignore[pairs.label], -pairs.iou, -pairs.label)
    pairs = pairs.sorted(by_score[pairs.detection], *preference)
    return _match_in_steps(found, truth, pairs, thresholds)


def _match_in_steps(found: _Detected, truth: _Labelled, pairs: _Pairs, thresholds: np.ndarray) -> Matches:
    """Greedy matching from pairs that lie detection by detection, best score first, and by preference within."""
    hits = np.zeros((len(found.scores), len(thresholds)), bool)
    ignored = np.zeros_like(hits)
    taken = np.zeros((len(truth.classes), len(thresholds)), bool)
    for first, count in _steps(found, pairs):
        position = np.arange(count.max())
        listed = position < count[:, None]  # (n, W): n detections of different groups, each with up to W labels
        rows = first[:, None] + np.where(listed, position, 0)
        label = pairs.label[rows]
        free = listed[..., None] & (pairs.iou[rows][..., None] >= thresholds) & ~taken[label]  # (n, W, T)
        detection, at = np.nonzero(free.any(1))
        chosen = label[detection, free.argmax(1)[detection, at]]  # the first free one is the preferred one
        excused = truth.ignore[chosen]
        hits[pairs.detection[first[detection]], at] = ~excused
        ignored[pairs.detection[first[detection]], at] = excused
        taken[chosen, at] = ~excused  # an ignored label takes any number
    return Matches(hits=hits, ignored=ignored)


def _steps(found: _Detected, pairs: _Pairs) -> list[tuple[np.ndarray, np.ndarray]]:
    """For k = 0, 1, ...: first pair and number of pairs of the k-th best detection of every (image, class)."""
    if not len(pairs.label):
        return []
    first = np.flatnonzero(np.diff(pairs.detection, prepend=-1))
    count = np.diff(first, append=len(pairs.label))
    detection = pairs.detection[first]
    group = _group(found.image[detection], found.classes[detection])
    by_group = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[by_group] = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    by_rank = np.argsort(rank, kind="stable")
    cuts = np.flatnonzero(np.diff(rank[by_rank])) + 1
    return [(first[rows], count[rows]) for rows in np.split(by_rank, cuts)]


def _overlaps(found: _Detected, truth: _Labelled, *, at_least: float, same_class: bool) -> _Pairs:
    """Every detection with every label of its image (and class) where their IoU reaches `at_least`."""
    if same_class:
        key, label_key = _group(found.image, found.classes), _group(truth.image, truth.classes)
    else:
        key, label_key = found.image, truth.image
    by_key = np.argsort(label_key, kind="stable")
    start = np.searchsorted(label_key[by_key], key, "left")
    count = np.searchsorted(label_key[by_key], key, "right") - start
    detection = np.repeat(np.arange(len(key)), count)
    within = np.arange(len(detection)) - np.repeat(np.cumsum(count) - count, count)
    label = by_key[np.repeat(start, count) + within]
    iou = _paired_iou(found.boxes[detection], truth.boxes[label], truth.crowd[label])
    enough = iou >= at_least
    return _Pairs(detection=detection[enough], label=label[enough], iou=iou[enough])


def _paired_iou(boxes: np.ndarray, label_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(M,) IoU of paired (M, 4) xyxy; over the detection's area alone where the label is a crowd."""
    sides = np.minimum(boxes[:, 2:], label_boxes[:, 2:]) - np.maximum(boxes[:, :2], label_boxes[:, :2])
    overlap = sides.clip(0).prod(1)
    area = box_area(boxes)
    union = np.where(crowd, area, area + box_area(label_boxes) - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _group(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return image.astype(np.int64) << 32 | classes.astype(np.int64)


def confusion_matrix(detections: Sequence[Detections], labels: Sequence[Labels], num_classes: int) -> np.ndarray:
    """(C + 1, C + 1) i64 counts, predicted x true, last = background; sums over batches are those of the whole.

    Detections above confidence 0.25 and labels of any class pair up one to one from IoU 0.45, highest IoU first. What
    is left over stands against the background, except detections on ignored labels, which are left out.
    """
    found, truth = _detected(detections), _labelled(labels)
    pairs = _overlaps(found, truth, at_least=CONFUSION_IOU, same_class=False)
    pairs = pairs[found.scores[pairs.detection] > CONFUSION_CONFIDENCE]
    pairs = pairs.sorted(truth.ignore[pairs.label], -pairs.iou, -found.scores[pairs.detection])

    predicted_as = np.full(len(truth.classes), num_classes)
    unpaired = found.scores > CONFUSION_CONFIDENCE
    for detection, label in zip(pairs.detection.tolist(), pairs.label.tolist()):
        if unpaired[detection] and predicted_as[label] == num_classes:
            unpaired[detection] = False
            if not truth.ignore[label]:
                predicted_as[label] = found.classes[detection]

    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    counted = ~truth.ignore
    np.add.at(matrix, (predicted_as[counted], truth.classes[counted]), 1)
    np.add.at(matrix, (found.classes[unpaired], num_classes), 1)
    return matrix


def _detected(detections: Sequence[Detections]) -> _Detected:
    return _Detected(
        image=_owners([len(one.scores) for one in detections]),
        boxes=_stack([_numpy(one.boxes) for one in detections], (0, 4), np.float64),
        scores=_stack([_numpy(one.scores) for one in detections], (0,), np.float64),
        classes=_stack([_numpy(one.classes) for one in detections], (0,), np.int64),
    )


def _labelled(labels: Sequence[Labels]) -> _Labelled:
    crowds = [np.zeros(len(one.classes), bool) if one.crowd is None else one.crowd for one in labels]
    return _Labelled(
        image=_owners([len(one.classes) for one in labels]),
        boxes=_stack([one.boxes for one in labels], (0, 4), np.float64),
        classes=_stack([one.classes for one in labels], (0,), np.int64),
        ignore=_stack([one.ignore for one in labels], (0,), bool),
        crowd=_stack(crowds, (0,), bool),
    )


def _owners(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), np.array(counts, np.int64))


def _stack(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(empty, dtype), *parts]).astype(dtype, copy=False)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.numpy(force=True)
