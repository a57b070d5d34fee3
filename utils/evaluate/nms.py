"""Non-maximum suppression: raw predictions of a batch in, the detections of each image out.

The surprise: candidates are taken in score order, a chunk at a time, and the rest is never looked at once enough have
survived. That is exact, because greedy suppression only ever flows from better candidates to worse ones; it keeps an
untrained network, where nearly every anchor passes the confidence, as fast as a trained one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.structures import Detections

MAX_CANDIDATES = 30_000  # per image, the best by score; the only bound there is besides max_detections
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class NmsRules:
    """Which detections survive; the defaults are those of evaluation."""

    confidence: float = 0.001  # a score must exceed it
    iou: float = 0.6  # with a better survivor, above which a candidate falls
    max_detections: int = 300  # per image
    agnostic: bool = False  # candidates fall by survivors of other classes, too
    classes: tuple[int, ...] = ()  # none: all of them


@dataclass(frozen=True, kw_only=True)
class Suppressed:
    """What is left of the predictions of B images, and what to know about them."""

    detections: list[Detections]  # (B,) one per image, best first, empty where nothing was found
    cut: np.ndarray  # (B,) bool: more candidates than MAX_CANDIDATES, the best of which left room for detections
    non_finite: np.ndarray  # (B,) bool: the network said something that is no finite number; detections are without


@torch.no_grad()
def non_max_suppression(predictions: Tensor, rules: NmsRules) -> Suppressed:
    """Greedy suppression within each class, best first.

    predictions: (B, P, 5 + C): xyxy px, objectness, class probabilities, on any device. The score of (anchor, class) is
    objectness * probability, so an anchor may speak for several classes.
    Equal scores go by anchor, then class, so the result is the same every time. Only the MAX_CANDIDATES best of an
    image are considered; non-finite boxes and scores never are.
    """
    detections = [
        _suppress_image(image, rules.confidence, rules.iou, rules.max_detections, multi_label=True)
        for image in predictions.float()  # (P, 5 + C)
    ]
    finite = predictions.isfinite().flatten(1).all(1).numpy(force=True)
    return Suppressed(detections=detections, cut=np.zeros(len(finite), bool), non_finite=~finite)


def _suppress_image(image: Tensor, confidence: float, iou: float, max_detections: int, multi_label: bool) -> Detections:
    boxes, scores, classes = _candidates(image, confidence, multi_label)
    kept = torch.empty(0, dtype=torch.int64, device=image.device)
    for start in range(0, len(scores), _CHUNK):
        chunk = torch.arange(start, min(start + _CHUNK, len(scores)), device=image.device)
        contest = torch.cat([kept, chunk])  # survivors do not touch each other: they all survive again
        kept = contest[_survivors(boxes[contest], classes[contest], iou)]
        if len(kept) >= max_detections:
            break
    kept = kept[:max_detections]
    return Detections(boxes=boxes[kept], scores=scores[kept], classes=classes[kept])


def _candidates(image: Tensor, confidence: float, multi_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (K, 4), scores (K,) and classes (K,) of the MAX_CANDIDATES best above `confidence`, best first."""
    image = image[(image[:, 4] > confidence) & image[:, :4].isfinite().all(1)]  # score <= objectness: cheap first cut
    scores = image[:, 4:5] * image[:, 5:]  # (P', C)
    num_classes = scores.shape[1]
    if not multi_label:
        best = scores.argmax(1, keepdim=True)
        scores = torch.full_like(scores, -1.0).scatter(1, best, scores.gather(1, best))

    index = (scores > confidence).flatten().nonzero().squeeze(1)  # anchor * C + class
    scores = scores.flatten()[index]
    if len(scores) > MAX_CANDIDATES:  # topk breaks ties as it likes: use its last value, and let the sort decide
        enough = scores >= scores.topk(MAX_CANDIDATES).values[-1]
        index, scores = index[enough], scores[enough]
    scores, order = scores.sort(descending=True, stable=True)
    scores, index = scores[:MAX_CANDIDATES], index[order[:MAX_CANDIDATES]]
    return image[index // num_classes, :4], scores, index % num_classes


def _survivors(boxes: Tensor, classes: Tensor, iou: float) -> Tensor:
    """Ascending indices of the rows, sorted best first, that greedy suppression within each class keeps."""
    from torchvision.ops import nms

    if boxes.device.type == "mps":  # has no float64
        return _survivors(boxes.cpu(), classes.cpu(), iou).to(boxes.device)
    # Classes are moved apart so that one call serves all of them: in float64, where a shift costs no bit that matters.
    # torchvision's own batched_nms shifts in float32 or, for many boxes, runs once per class.
    apart = boxes.double()
    apart = apart + (classes * (apart.max() - apart.min() + 1))[:, None]
    ranks = torch.arange(len(boxes), 0, -1, dtype=torch.float64, device=boxes.device)  # no ties to break
    return nms(apart, ranks, iou)
