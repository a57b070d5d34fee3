"""From matched detections to Metrics: average precision as COCO has it, curves over confidence, and the class table.

Everything is counted from Evidence, plain arrays that add up over batches and ranks; how the images were dealt out does
not change the result, because equal scores are ordered by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluate.matching import IOU_THRESHOLDS, Labels, confusion_matrix, match
from utils.structures import ClassMetrics, CocoFigures, Curves, Detections, LossMeans, Metrics

CONFIDENCES = np.linspace(0, 1, 1000)
RECALL_GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen on some images: a row per detection, a count per class, C classes, T IoU thresholds."""

    image: np.ndarray  # (K,) i64 index of the detection's image in the split
    boxes: np.ndarray  # (K, 4) f32 xyxy px in the source image
    scores: np.ndarray  # (K,) f32
    classes: np.ndarray  # (K,) i64
    hits: np.ndarray  # (K, T) bool
    ignored: np.ndarray  # (K, T) bool: neither hit nor false alarm
    labels: np.ndarray  # (C,) i64 labels that count
    images_with: np.ndarray  # (C,) i64 images that hold such a label
    images: int
    confusion: np.ndarray  # (C + 1, C + 1) i64


def collect(
    indices: Sequence[int], detections: Sequence[Detections], labels: Sequence[Labels], num_classes: int
) -> Evidence:
    """The evidence of one batch: its images' indices in the split, detections and labels, boxes in source px."""
    matches = match(detections, labels)
    counted = [one.classes[~one.ignore] for one in labels]
    return Evidence(
        image=np.repeat(np.array(indices, np.int64), np.array([len(one.scores) for one in detections], np.int64)),
        boxes=np.concatenate([np.empty((0, 4), np.float32), *(one.boxes.numpy(force=True) for one in detections)]),
        scores=np.concatenate([np.empty(0, np.float32), *(one.scores.numpy(force=True) for one in detections)]),
        classes=np.concatenate([np.empty(0, np.int64), *(one.classes.numpy(force=True) for one in detections)]),
        hits=matches.hits,
        ignored=matches.ignored,
        labels=_count(counted, num_classes),
        images_with=_count([np.unique(classes) for classes in counted], num_classes),
        images=len(labels),
        confusion=confusion_matrix(detections, labels, num_classes),
    )


def _count(classes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    return np.bincount(np.concatenate([np.empty(0, np.int64), *classes]), minlength=num_classes)


def merge(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several batches or ranks together, at least one."""
    rows = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("image", "boxes", "scores", "classes", "hits", "ignored")
    }
    sums = {
        name: sum(getattr(part, name) for part in parts) for name in ("labels", "images_with", "images", "confusion")
    }
    return Evidence(**rows, **sums)


def compute_metrics(evidence: Evidence, names: Sequence[str], *, losses: LossMeans | None = None) -> Metrics:
    """Metrics of a whole split.

    `per_class` has an entry for every class, in order; means and curves leave out those without labels. A class that
    nothing was detected of has precision 0; a class detected only below the chosen confidence, where it makes no
    claim, has precision 1. Without any label everything is 0.
    """
    labelled = np.flatnonzero(evidence.labels)
    order = np.lexsort((evidence.image, -evidence.scores, evidence.classes))
    of_class = np.split(order, np.searchsorted(evidence.classes[order], np.arange(1, len(names))))
    mine = [of_class[index] for index in labelled]
    curves = _curves(evidence, labelled, mine)
    best = int(curves.f1.mean(0).argmax()) if len(labelled) else 0

    ap = np.zeros((len(names), len(IOU_THRESHOLDS)))
    precision, recall = np.zeros(len(names)), np.zeros(len(names))
    for index, rows in zip(labelled, mine):
        sampled = precision_at_recall(evidence.hits[rows], evidence.ignored[rows], evidence.labels[index])
        ap[index] = sampled.mean(1)
    precision[labelled], recall[labelled] = curves.precision[:, best], curves.recall[:, best]

    return Metrics(
        precision=_mean(precision[labelled]),
        recall=_mean(recall[labelled]),
        f1=_mean(curves.f1[:, best]),
        coco=_unknown(),
        map50=_mean(ap[labelled, 0]),
        map50_95=_mean(ap[labelled]),
        images=evidence.images,
        labels=int(evidence.labels.sum()),
        best_confidence=float(curves.confidence[best]),
        per_class=tuple(
            ClassMetrics(
                name=name,
                images=int(evidence.images_with[index]),
                labels=int(evidence.labels[index]),
                precision=float(precision[index]),
                recall=float(recall[index]),
                map50=float(ap[index, 0]),
                map50_95=float(ap[index].mean()),
                f1=0.0,
                best_f1=0.0,
                best_confidence=0.0,
                coco=_unknown(),
            )
            for index, name in enumerate(names)
        ),
        losses=losses,
        curves=curves,
        confusion=evidence.confusion,
    )


def _unknown() -> CocoFigures:
    return CocoFigures(**dict.fromkeys(CocoFigures.__annotations__))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def precision_at_recall(hits: np.ndarray, ignored: np.ndarray, num_labels: int) -> np.ndarray:
    """(T, 101) interpolated precision at recall 0, .01, ... 1 of one class with labels; its mean over recall is the AP.

    hits, ignored: (K, T) bool, best score first. As pycocotools: the best precision at that recall or any higher one,
    0 where the recall is never reached.
    """
    true = hits.cumsum(0)  # (K, T)
    claimed = (~ignored).cumsum(0)
    precision = true / np.maximum(claimed, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    envelope = np.concatenate([envelope, np.zeros((1, hits.shape[1]))])  # row K: never reached
    reached = [np.searchsorted(recall, RECALL_GRID) for recall in (true / num_labels).T]
    return np.stack([column[at] for column, at in zip(envelope.T, reached)])


def _curves(evidence: Evidence, labelled: np.ndarray, mine: Sequence[np.ndarray]) -> Curves:
    """Curves at IoU .5; `mine` holds the rows of each labelled class, best score first."""
    precision = np.zeros((len(labelled), len(CONFIDENCES)))
    recall = np.zeros_like(precision)
    sampled = np.zeros((len(labelled), len(RECALL_GRID)))
    for at, (index, rows) in enumerate(zip(labelled, mine)):
        hits, ignored = evidence.hits[rows, :1], evidence.ignored[rows, :1]  # (K, 1)
        precision[at], recall[at] = _at_confidences(evidence.scores[rows], hits[:, 0], ignored[:, 0])
        recall[at] /= evidence.labels[index]
        sampled[at] = precision_at_recall(hits, ignored, evidence.labels[index])[0]
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return Curves(
        confidence=CONFIDENCES,
        precision=precision,
        recall=recall,
        f1=f1,
        recall_grid=RECALL_GRID,
        precision_at_recall=sampled,
    )


def _at_confidences(scores: np.ndarray, hits: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and number of hits, each (1000,), of the detections that score at least each confidence."""
    many = len(scores) - np.searchsorted(scores[::-1].astype(np.float64), CONFIDENCES)
    true = np.concatenate([[0], hits.cumsum()])[many]
    claimed = np.concatenate([[0], (~ignored).cumsum()])[many]
    nothing_claimed = 1.0 if (~ignored).any() else 0.0
    return np.where(claimed > 0, true / np.maximum(claimed, 1), nothing_claimed), true.astype(np.float64)
