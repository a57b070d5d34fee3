"""The images that a network gets most wrong: labels that it missed and things that it saw where there are none.

Mistakes are counted from what an evaluation has seen; only the few images that are shown are matched once more, to tell
which of their labels were missed.
"""

from __future__ import annotations

import numpy as np

from utils.boxes import xywh_from_xyxy
from utils.evaluate.matching import DetectionTable, Labels, LabelTable, match
from utils.evaluate.metrics import Evidence
from utils.structures import FALSE_ALARM, HIT, MISSED, JudgedImage, LabelStore

_BIT = 1  # of all areas, at IoU .5


def worst_images(evidence: Evidence, store: LabelStore, confidence: float, *, most: int = 8) -> tuple[JudgedImage, ...]:
    """The images with the most mistakes at this confidence and IoU .5, equal ones by index; none without a mistake.

    Crowds and difficult labels cannot be missed, and what is found in them is no mistake.
    """
    claimed = evidence.scores.astype(np.float64) >= confidence  # (K,)
    hits, excused = evidence.hits & _BIT != 0, evidence.ignored & _BIT != 0
    found, false_alarms = (
        np.bincount(evidence.image[claimed & chosen], minlength=len(store)) for chosen in (hits, ~hits & ~excused)
    )
    mistakes = _labels_to_find(store) - found + false_alarms  # (I,)
    order = np.argsort(-mistakes, kind="stable")[:most]
    return tuple(_judged(evidence, store, image, claimed) for image in order[mistakes[order] > 0].tolist())


def _labels_to_find(store: LabelStore) -> np.ndarray:
    """(I,) how many labels of each image count."""
    before = np.concatenate([[0], np.cumsum(store.ignore == 0)])
    return before[store.offsets[1:]] - before[store.offsets[:-1]]


def _judged(evidence: Evidence, store: LabelStore, image: int, claimed: np.ndarray) -> JudgedImage:
    rows = np.flatnonzero(claimed & (evidence.image == image))
    detections = DetectionTable(
        image=np.zeros(len(rows), np.int64),
        xywh=xywh_from_xyxy(evidence.boxes[rows].astype(np.float64)),
        scores=evidence.scores[rows],
        classes=evidence.classes[rows],
    )
    labels = LabelTable.of([Labels.of(store, image)])
    verdicts = match(detections, labels)
    hit, counts = verdicts.hits & _BIT != 0, verdicts.ignored & _BIT == 0
    rows, hit = rows[counts], hit[counts]
    missed = np.flatnonzero(~labels.ignore & (verdicts.taken & _BIT == 0))
    return JudgedImage(
        image=image,
        boxes=np.concatenate([evidence.boxes[rows], store.boxes[store.rows(image)][missed]]),
        classes=np.concatenate([evidence.classes[rows], labels.classes[missed]]).astype(np.int64),
        scores=np.concatenate([evidence.scores[rows], np.full(len(missed), np.nan, np.float32)]),
        verdicts=np.concatenate([np.where(hit, HIT, FALSE_ALARM), np.full(len(missed), MISSED)]).astype(np.uint8),
    )
