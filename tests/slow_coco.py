"""COCO's rules one by one, in plain loops, with the difficult labels that its own tool does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.boxes import xywh_from_xyxy
from utils.evaluate.matching import AREA_RANGES, IOU_THRESHOLDS, Labels
from utils.structures import CocoFigures, Detections


def slow_iou(box, label, crowd):
    (x, y, w, h), (u, v, a, b) = box, label
    width, height = min(x + w, u + a) - max(x, u), min(y + h, v + b) - max(y, v)
    overlap = max(width, 0) * max(height, 0)
    return overlap / (w * h if crowd else w * h + a * b - overlap)


def slow_match(found: Detections, truth: Labels, area: int, threshold: float):
    """The rules one by one, for one image, area range and threshold: a letter per detection, and the labels taken."""
    low, high = AREA_RANGES[area]
    boxes, letters = xywh_from_xyxy(found.boxes.double().numpy()), ["?"] * len(found.scores)
    counts = [low <= truth.area[label] <= high and not truth.ignore[label] for label in range(len(truth.classes))]
    taken = set()
    for row in sorted(range(len(letters)), key=lambda row: -found.scores[row].item()):
        options = []
        for label in range(len(truth.classes)):
            iou = slow_iou(boxes[row], truth.xywh[label], truth.crowd[label])
            free = truth.ignore[label] or label not in taken
            if truth.classes[label] == found.classes[row] and free and iou >= threshold:
                options.append((counts[label], iou, label))
        if options:
            counted, _, label = max(options)
            letters[row] = "h" if counted else "i"
            taken.add(label)
        else:
            letters[row] = "f" if low <= boxes[row, 2] * boxes[row, 3] <= high else "i"
    return "".join(letters), taken


def slow_figures(detections: Sequence[Detections], labels: Sequence[Labels], num_classes: int) -> CocoFigures:
    """All twelve, with None where there is nothing to find."""
    everywhere = IOU_THRESHOLDS.tolist()

    def mean(kind: int, area: int = 0, most: int = 100, thresholds: Sequence[float] = everywhere) -> float | None:
        each = [
            _slow_class(*_of_class(detections, labels, index, most), area, threshold)
            for index in range(num_classes)
            for threshold in thresholds
        ]
        values = [pair[kind] for pair in each if pair is not None]
        return float(np.mean(values)) if values else None

    precision, recall = 0, 1
    return CocoFigures(
        ap=mean(precision),
        ap50=mean(precision, thresholds=everywhere[:1]),
        ap75=mean(precision, thresholds=everywhere[5:6]),
        ap_small=mean(precision, 1),
        ap_medium=mean(precision, 2),
        ap_large=mean(precision, 3),
        ar1=mean(recall, most=1),
        ar10=mean(recall, most=10),
        ar100=mean(recall),
        ar_small=mean(recall, 1),
        ar_medium=mean(recall, 2),
        ar_large=mean(recall, 3),
    )


def _of_class(detections, labels, index: int, most: int) -> tuple[list[Detections], list[Labels]]:
    """What belongs to one class, with at most so many detections in each image."""
    found, truth = [], []
    for one, true in zip(detections, labels):
        rows = [row for row in range(len(one.scores)) if one.classes[row] == index]
        rows = sorted(rows, key=lambda row: -one.scores[row].item())[:most]
        found.append(replace(one, boxes=one.boxes[rows], scores=one.scores[rows], classes=one.classes[rows]))
        mine = true.classes == index
        truth.append(Labels(**{name: values[mine] for name, values in vars(true).items()}))
    return found, truth


def _slow_class(found, truth, area: int, threshold: float) -> tuple[float, float] | None:
    """Average precision and recall of one class; None without labels."""
    low, high = AREA_RANGES[area]
    to_find = sum(((one.area >= low) & (one.area <= high) & ~one.ignore).sum() for one in truth)
    if not to_find:
        return None
    claims = []
    for one, true in zip(found, truth):
        letters, _ = slow_match(one, true, area, threshold)
        claims += [(score, letter) for score, letter in zip(one.scores.tolist(), letters) if letter != "i"]
    claims.sort(key=lambda claim: -claim[0])
    hits, points = 0, []
    for place, (_, letter) in enumerate(claims, 1):
        hits += letter == "h"
        points.append((hits / to_find, hits / place))
    grid = [max([p for r, p in points if r >= recall], default=0) for recall in np.linspace(0, 1, 101)]
    return float(np.mean(grid)), hits / to_find
