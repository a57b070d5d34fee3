"""What an evaluation has seen, as plain arrays that add up over batches and ranks, and the Metrics that come of it.

How the images were dealt out does not change the result, because equal scores are ordered by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from utils.evaluate.figures import (
    RECALL_GRID,
    Claims,
    ClassFigures,
    as_figures,
    best_first,
    class_figures,
    mean_figures,
)
from utils.evaluate.matching import (
    DetectionTable,
    Labels,
    LabelTable,
    confusion_matrix,
    confusions,
    match,
)
from utils.structures import ClassMetrics, Curves, Detections, LossMeans, Metrics

CONFIDENCES = np.linspace(0, 1, 1000)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen on some images: a row per detection, image after image, and sums over images; C classes.

    Bit `a * 10 + t` of `hits` and `ignored` is that of area range a and IoU threshold t; a detection that is neither
    is a false alarm there. Bit 0 is that of all areas at IoU .5.
    """

    image: np.ndarray  # (K,) i32 index of the detection's image in the split
    boxes: np.ndarray  # (K, 4) f32 xyxy px in the source image
    scores: np.ndarray  # (K,) f32
    classes: np.ndarray  # (K,) i32
    ranks: np.ndarray  # (K,) i32 within their image and class, by score
    hits: np.ndarray  # (K,) i64
    ignored: np.ndarray  # (K,) i64: neither hit nor false alarm
    confusions: np.ndarray  # (P, 2) i32 predicted and true class, C for background
    labels: np.ndarray  # (C, A) i64 labels to find, by area range
    images_with: np.ndarray  # (C,) i64 images that hold such a label of any area
    images: int


_ROWS = ("image", "boxes", "scores", "classes", "ranks", "hits", "ignored", "confusions")
_SUMS = ("labels", "images_with", "images")


def collect(
    indices: Sequence[int], detections: Sequence[Detections], labels: Sequence[Labels], num_classes: int
) -> Evidence:
    """The evidence of one batch: its images' indices in the split, detections and labels, boxes in source px."""
    found, truth = DetectionTable.of(detections), LabelTable.of(labels)
    verdicts = match(found, truth)
    return Evidence(
        image=np.array(indices, np.int32)[found.image],
        boxes=np.concatenate([np.empty((0, 4), np.float32), *(one.boxes.numpy(force=True) for one in detections)]),
        scores=found.scores,
        classes=found.classes.astype(np.int32),
        ranks=verdicts.ranks,
        hits=verdicts.hits,
        ignored=verdicts.ignored,
        confusions=confusions(found, truth, num_classes),
        labels=truth.to_find(num_classes),
        images_with=_images_with(truth, num_classes),
        images=len(labels),
    )


def _images_with(truth: LabelTable, num_classes: int) -> np.ndarray:
    """(C,) i64 how many images hold a label of each class that counts."""
    pairs = np.unique(np.stack([truth.image, truth.classes])[:, truth.counted()[:, 0]], axis=1)
    return np.bincount(pairs[1], minlength=num_classes)


def merge(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several batches or ranks together, at least one."""
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ROWS}
    return Evidence(**rows, **{name: sum(getattr(part, name) for part in parts) for name in _SUMS})


def compute_metrics(
    evidence: Evidence,
    names: Sequence[str],
    *,
    losses: LossMeans | None = None,
    image_ids: np.ndarray | None = None,
) -> Metrics:
    """Metrics of a whole split.

    Equal scores of different images go by `image_ids` (I,), as in COCO's tool; None, and ids that are equal: by index.
    `per_class` has an entry for every class, in order; means and curves leave out those without labels. Without any
    label everything is 0.
    """
    places = evidence.image if image_ids is None else _places(image_ids)[evidence.image]
    claims = Claims(**{item.name: getattr(evidence, item.name) for item in fields(Claims)})
    claims = best_first(claims, places)
    figures = class_figures(claims, evidence.labels)
    labelled = np.flatnonzero(evidence.labels[:, 0])
    curves = _curves(claims, evidence.labels[:, 0], figures, labelled)
    best = _highest_of_best(curves.f1.mean(0)) if len(labelled) else 0
    precision = np.nan_to_num(curves.precision[:, best])  # a class that makes no claim there has earned nothing
    coco = as_figures(mean_figures(figures.coco))
    return Metrics(
        precision=_mean(precision),
        recall=_mean(curves.recall[:, best]),
        f1=_mean(curves.f1[:, best]),
        map50=coco.ap50 or 0.0,
        map50_95=coco.ap or 0.0,
        images=evidence.images,
        labels=int(evidence.labels[:, 0].sum()),
        best_confidence=float(curves.confidence[best]),
        per_class=_per_class(evidence, names, figures, curves, best),
        coco=coco,
        losses=losses,
        curves=curves,
        confusion=confusion_matrix(evidence.confusions, len(names)),
    )


def _places(image_ids: np.ndarray) -> np.ndarray:
    """(I,) the place of each image in the order of their ids."""
    places = np.empty(len(image_ids), np.int32)
    places[np.argsort(image_ids, kind="stable")] = np.arange(len(image_ids))
    return places


def _highest_of_best(f1: np.ndarray) -> int:
    """Where (1000,) F1 is best: it is flat where there is no detection, and a higher confidence says the same of less.

    0 where nothing is found at any confidence.
    """
    return len(f1) - 1 - int(f1[::-1].argmax()) if f1.any() else 0


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _per_class(
    evidence: Evidence, names: Sequence[str], figures: ClassFigures, curves: Curves, best: int
) -> tuple[ClassMetrics, ...]:
    labels = evidence.labels[:, 0]
    row_of = np.cumsum(labels > 0) - 1  # in the curves
    result = []
    for index, name in enumerate(names):
        coco, row = as_figures(figures.coco[index]), row_of[index]
        labelled = labels[index] > 0
        own_best = _highest_of_best(curves.f1[row]) if labelled else 0
        result.append(
            ClassMetrics(
                name=name,
                images=int(evidence.images_with[index]),
                labels=int(labels[index]),
                precision=float(np.nan_to_num(curves.precision[row, best])) if labelled else 0.0,
                recall=float(curves.recall[row, best]) if labelled else 0.0,
                f1=float(curves.f1[row, best]) if labelled else 0.0,
                map50=coco.ap50 or 0.0,
                map50_95=coco.ap or 0.0,
                best_f1=float(curves.f1[row, own_best]) if labelled else 0.0,
                best_confidence=float(curves.confidence[own_best]),
                coco=coco,
            )
        )
    return tuple(result)


def _curves(claims: Claims, labels: np.ndarray, figures: ClassFigures, labelled: np.ndarray) -> Curves:
    """Curves at IoU .5 of the classes `labelled`, of all detections there are; labels (C,)."""
    reached = np.searchsorted(CONFIDENCES, claims.scores.astype(np.float64), "right")  # so many confidences
    hits = _at_confidences(claims.classes, reached, claims.hits & 1 == 1, len(labels))[labelled]
    claimed = _at_confidences(claims.classes, reached, claims.ignored & 1 == 0, len(labels))[labelled]
    precision = np.divide(hits, claimed, out=np.full(hits.shape, np.nan), where=claimed > 0)
    recall = hits / labels[labelled, None]
    # 2 hits / (claimed + labels) is 2 P R / (P + R), and 0 where nothing is claimed
    f1 = 2 * hits / (claimed + labels[labelled, None])
    return Curves(
        confidence=CONFIDENCES,
        precision=precision,
        recall=recall,
        f1=f1,
        recall_grid=RECALL_GRID,
        precision_at_recall=figures.precision_at_recall[labelled],
    )


def _at_confidences(classes: np.ndarray, reached: np.ndarray, chosen: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, 1000) how many of the chosen detections of each class score at least each confidence."""
    columns = len(CONFIDENCES) + 1
    cells = classes[chosen].astype(np.int64) * columns + reached[chosen]
    counts = np.bincount(cells, minlength=num_classes * columns).reshape(num_classes, columns)
    return counts[:, ::-1].cumsum(1)[:, -2::-1]
