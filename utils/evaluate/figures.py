"""From verdicts on detections to average precision and recall by COCO's rules, for all classes at once.

Precision changes for the better at hits alone, so that only the detections that found a label are looked at; of the
others it is enough how many there are before each of these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from utils.evaluate.matching import AREA_RANGES, IOU_THRESHOLDS, Verdicts, verdict_bits
from utils.evaluate.ordering import descending, row_order, starts_of
from utils.structures import CocoFigures

RECALL_GRID = np.linspace(0, 1, 101)
MOST_DETECTIONS = 100  # per image and class
_ALL, _SMALL, _MEDIUM, _LARGE = range(len(AREA_RANGES))
_AT_50, _AT_75 = 0, 5  # of IOU_THRESHOLDS
_T = len(IOU_THRESHOLDS)
_WHOLE = (1 << _T) - 1  # the bits of one area range


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The detections of a split by class, the best of each first."""

    classes: np.ndarray  # (K,) integers
    scores: np.ndarray  # (K,)
    ranks: np.ndarray  # (K,) within their image and class
    hits: np.ndarray  # (K,) i64, as Verdicts has them
    ignored: np.ndarray  # (K,) i64

    def __getitem__(self, rows: np.ndarray) -> Ranked:
        return Ranked(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """Average precision and recall of C classes; NaN where a class has no labels to find."""

    coco: np.ndarray  # (C, 12) in the order of CocoFigures
    precision_at_recall: np.ndarray  # (C, 101) interpolated, at IoU .5


def ranked(places: np.ndarray, scores: np.ndarray, classes: np.ndarray, verdicts: Verdicts) -> Ranked:
    """The detections by class and score; equal scores go by the place of their image, (K,) integers >= 0."""
    order = row_order(classes, descending(scores), places, verdicts.ranks)
    return Ranked(
        classes=classes[order],
        scores=scores[order],
        ranks=verdicts.ranks[order],
        hits=verdicts.hits[order],
        ignored=verdicts.ignored[order],
    )


def class_figures(detections: Ranked, labels: np.ndarray) -> ClassFigures:
    """COCO's figures for every class. labels: (C, A) how many there are to find in each area range."""
    seen = detections[detections.ranks < MOST_DETECTIONS]
    sampled = [_precision_at_recall(seen, labels[:, area], area) for area in range(len(AREA_RANGES))]  # (C, T, 101)
    precision = [one.mean(2) for one in sampled]  # (C, T)
    recall = {1: _recall(seen[seen.ranks < 1], labels, _ALL), 10: _recall(seen[seen.ranks < 10], labels, _ALL)}
    sized = [_recall(seen, labels, area) for area in range(len(AREA_RANGES))]
    coco = CocoFigures(
        ap=precision[_ALL].mean(1),
        ap50=precision[_ALL][:, _AT_50],
        ap75=precision[_ALL][:, _AT_75],
        ap_small=precision[_SMALL].mean(1),
        ap_medium=precision[_MEDIUM].mean(1),
        ap_large=precision[_LARGE].mean(1),
        ar1=recall[1],
        ar10=recall[10],
        ar100=sized[_ALL],
        ar_small=sized[_SMALL],
        ar_medium=sized[_MEDIUM],
        ar_large=sized[_LARGE],
    )
    columns = np.stack([getattr(coco, item.name) for item in fields(CocoFigures)], 1)
    return ClassFigures(coco=columns, precision_at_recall=sampled[_ALL][:, _AT_50])


def as_figures(row: np.ndarray) -> CocoFigures:
    """(12,) figures, NaN for none, by name."""
    return CocoFigures(
        **{item.name: None if np.isnan(value) else value for item, value in zip(fields(CocoFigures), row.tolist())}
    )


def mean_figures(rows: np.ndarray) -> np.ndarray:
    """(C, 12) -> (12,): each the mean of the classes that have it."""
    known = ~np.isnan(rows)
    sums = np.where(known, rows, 0).sum(0)
    return np.divide(sums, known.sum(0), out=np.full(rows.shape[1], np.nan), where=known.any(0))


def _precision_at_recall(seen: Ranked, labels: np.ndarray, area: int) -> np.ndarray:
    """(C, T, 101) for one area range; NaN without labels.

    The best precision at that recall or any higher one, 0 where the recall is never reached.
    """
    num_classes = len(labels)
    claimed, rows = _claimed(seen, area)
    hits = verdict_bits(seen.hits[rows], area)  # (S, T)
    threshold, at = np.nonzero(hits.T)
    segment = threshold * num_classes + seen.classes[rows][at]  # ascending
    counts = np.bincount(segment, minlength=_T * num_classes)  # (T * C,)
    starts = starts_of(counts)
    true = np.arange(1, len(at) + 1) - starts[segment]
    precision = true / (claimed[at, threshold] + np.spacing(1))  # so rounds the tool

    # A zero after each segment stands for what is never reached; `first` is where each recall is reached
    padded = np.zeros(len(precision) + len(counts))
    padded[np.arange(len(precision)) + segment] = precision
    needed = _hits_needed(labels) - 1  # (C, 101)
    within = np.minimum(np.tile(needed, (_T, 1)), counts[:, None])  # (T * C, 101)
    first = within + (starts + np.arange(len(counts)))[:, None]
    best = np.maximum.reduceat(padded, first.ravel()).reshape(first.shape)  # from one recall up to the next
    best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
    best = best.reshape(_T, num_classes, len(RECALL_GRID)).transpose(1, 0, 2)
    return np.where(labels[:, None, None] > 0, best, np.nan)


def _claimed(seen: Ranked, area: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, T) how many detections of its class, down to each of S rows, count at each threshold; and the rows.

    Among the rows are all hits.
    """
    hits, ignored = ((bits >> area * _T) & _WHOLE for bits in (seen.hits, seen.ignored))
    rows = np.flatnonzero((hits != 0) | ((ignored != 0) & (ignored != _WHOLE)))
    counts_first = ignored & 1 == 0  # what counts at the first threshold does at all of them, but for the rows
    differs = (~verdict_bits(seen.ignored[rows], area)) - counts_first[rows, None].astype(np.int64)  # (S, T)
    first = _sums_in_classes(counts_first[:, None], seen.classes)[rows]
    return first + _sums_in_classes(differs, seen.classes[rows]), rows


def _sums_in_classes(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(K, n) sums from the first row of the class down to each; classes (K,) ascending."""
    sums = np.concatenate([np.zeros((1, values.shape[1]), np.int64), np.cumsum(values, axis=0, dtype=np.int64)])
    first = np.searchsorted(classes, classes)
    return sums[1:] - sums[first]


def _hits_needed(labels: np.ndarray) -> np.ndarray:
    """(C,) labels -> (C, 101): the least number of hits, one at least, with which each recall is reached."""
    needed = np.maximum(np.floor(labels[:, None] * RECALL_GRID) - 1, 0)
    of = np.maximum(labels, 1)[:, None]
    for _ in range(3):  # as floating point divides, so that the tool agrees
        needed += needed / of < RECALL_GRID
    return np.maximum(needed, 1).astype(np.int64)


def _recall(seen: Ranked, labels: np.ndarray, area: int) -> np.ndarray:
    """(C,) mean over thresholds; NaN without labels."""
    rows = np.flatnonzero(seen.hits)
    hits = verdict_bits(seen.hits[rows], area).sum(1)
    found = np.bincount(seen.classes[rows], weights=hits, minlength=len(labels)) / _T
    return np.divide(found, labels[:, area], out=np.full(len(labels), np.nan), where=labels[:, area] > 0)
