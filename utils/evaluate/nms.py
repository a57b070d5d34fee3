"""Non-maximum suppression: raw predictions of a batch in, the detections of each image out.

The surprise: only the best candidates of an image are looked at, and the others not even sorted, unless these leave
room for more detections. That is exact, because greedy suppression only ever flows from better candidates to worse
ones; it keeps an untrained network, where nearly every anchor passes the confidence, as fast as a trained one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.native import NativeError, native_library
from utils.structures import Detections

MAX_CANDIDATES = 30_000  # per image, the best by score; the only bound there is besides max_detections
_FIRST = 1024  # candidates of an image that are looked at before all others, at least, ...
_FIRST_VALUES = 40_000  # ... or as many as there are anchors with so many values
_CHUNK = 1024  # of one image, suppressed in one call
_TOGETHER = {"cpu": 256, "cuda": 32_768}  # candidates of several images in one call, whose time grows by their square
_SOURCE = Path(__file__).with_name("nms.cpp")
_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


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
    Equal scores go by anchor, then class, so the result is the same every time, and whatever else is in the batch. Only
    the MAX_CANDIDATES best of an image are considered; an anchor of which anything is not finite never is.
    """
    if predictions.device.type == "mps":  # has no float64
        predictions = predictions.cpu()
    predictions = predictions.float()
    best = _best_scores(predictions, rules)
    non_finite = ~best.isfinite().all(1)
    detections, room = _detections(predictions, best, rules, most=max(_FIRST, _FIRST_VALUES // predictions.shape[2]))
    cut = np.zeros(len(predictions), bool)
    for image in room:
        alone = predictions[image : image + 1], best[image : image + 1]
        (detections[image],), still_room = _detections(*alone, rules, most=MAX_CANDIDATES)
        cut[image] = bool(still_room)
    return Suppressed(detections=detections, cut=cut, non_finite=non_finite.numpy(force=True))


def prepare_nms(device: torch.device) -> None:
    """Make and load what suppresses on this device, which takes seconds the first time on a machine."""
    if device.type == "cuda" or _native() is None:
        import torchvision.ops  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Candidates of several images in one table: image after image, and best first."""

    boxes: Tensor  # (n, 4) f32
    scores: Tensor  # (n,) f32
    classes: Tensor  # (n,) i64
    counts: list[int]  # (B,) of each image
    complete: list[bool]  # (B,) whether an image has no others

    def __getitem__(self, rows: Tensor) -> Detections:
        return Detections(boxes=self.boxes[rows], scores=self.scores[rows], classes=self.classes[rows])


def _detections(predictions: Tensor, best: Tensor, rules: NmsRules, *, most: int) -> tuple[list[Detections], list[int]]:
    """What survives of the `most` best candidates of each image, and the images where others might survive as well."""
    candidates = _candidates(predictions, best, rules, most)
    detections = [candidates[rows] for rows in _kept(candidates, rules)]
    counted = enumerate(zip(detections, candidates.complete))
    room = [image for image, (one, complete) in counted if not complete and len(one.scores) < rules.max_detections]
    return detections, room


# ---- candidates ---------------------------------------------------------------------------------------------------


def _best_scores(predictions: Tensor, rules: NmsRules) -> Tensor:
    """(B, P): of each anchor, that of its best class; not finite where anything is not."""
    if predictions.shape[1] == 0:
        return predictions.new_empty(predictions.shape[:2])
    best = predictions[..., 4] * _probabilities(predictions, rules).amax(-1)
    return best + 0 * predictions.sum(-1)  # 0 * infinity is NaN


def _probabilities(rows: Tensor, rules: NmsRules) -> Tensor:
    """(..., C'): those of the classes that are asked for, in ascending order."""
    return rows[..., [5 + index for index in _asked(rules)]] if rules.classes else rows[..., 5:]


def _asked(rules: NmsRules) -> list[int]:
    return sorted(set(rules.classes))


def _candidates(predictions: Tensor, best: Tensor, rules: NmsRules, most: int) -> _Candidates:
    """The `most` best of each image. They are among its `most` best anchors, so nothing is sorted but these."""
    B, P = best.shape
    anchor = ((best > rules.confidence) & (best < torch.inf)).flatten().nonzero().squeeze(1)  # of the batch
    image = anchor // max(P, 1)
    anchors = _Cut.of(best.flatten()[anchor], anchor, _counts(image, B), most, floor=rules.confidence)
    if anchors.any:
        anchor = anchor[anchors.holds(best.flatten()[anchor], anchor, image)]
        image = anchor // P

    rows = predictions.flatten(0, 1).index_select(0, anchor)
    scores = rows[:, 4:5] * _probabilities(rows, rules)  # (n, C')
    num_classes = scores.shape[1]
    pair = anchors.holds(scores, anchor[:, None], image[:, None]).flatten().nonzero().squeeze(1)  # row * C' + class
    scores, image = scores.flatten()[pair], image[pair // num_classes]
    pairs = _Cut.of(scores, pair, _counts(image, B), most, floor=rules.confidence)
    if pairs.any:
        chosen = pairs.holds(scores, pair, image).nonzero().squeeze(1)
        pair, scores, image = pair[chosen], scores[chosen], image[chosen]

    # One stable sort by image, then score: the bits of positive floats, taken for whole numbers, rise as they do
    order = (image * 2**32 - scores.view(torch.int32)).argsort(stable=True)
    pair = pair[order]
    index = pair % num_classes
    return _Candidates(
        boxes=rows[:, :4].index_select(0, pair // num_classes),
        scores=scores[order],
        classes=torch.tensor(_asked(rules), device=index.device)[index] if rules.classes else index,
        counts=_counts(image, B),
        complete=[not (one or other) for one, other in zip(anchors.cuts, pairs.cuts)],
    )


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Where the best of each image end: above a value, or at it and not behind a place."""

    value: Tensor  # (B,) f32
    place: Tensor  # (B,) i64
    cuts: list[bool]  # (B,) whether an image has more than may stay

    @classmethod
    def of(cls, values: Tensor, places: Tensor, counts: list[int], most: int, *, floor: float) -> _Cut:
        """Images lie one after the other, `counts` long; of equal values the first `places`, which ascend, are better.

        No image has values up to `floor`.
        """
        value = values.new_full((len(counts),), floor)
        place = places.new_full((len(counts),), -1)
        for image, (mine, at) in enumerate(zip(values.split(counts), places.split(counts))):
            if len(mine) > most:
                value[image] = last = mine.topk(most, sorted=False).values.amin()
                equals = (mine == last).cumsum(0)
                place[image] = at.take(torch.searchsorted(equals, most - (mine > last).sum()))
        return cls(value=value, place=place, cuts=[count > most for count in counts])

    @property
    def any(self) -> bool:
        return any(self.cuts)

    def holds(self, values: Tensor, places: Tensor, image: Tensor) -> Tensor:
        """Which of these values, at these places of these images, are among the best."""
        value = self.value[image]
        return (values > value) | ((values == value) & (places <= self.place[image]))


def _counts(image: Tensor, images: int) -> list[int]:
    return torch.bincount(image, minlength=images).tolist()


# ---- suppression --------------------------------------------------------------------------------------------------


def _kept(candidates: _Candidates, rules: NmsRules) -> Iterator[Tensor]:
    """Of each image the rows of `candidates` that survive, best first, and no more than shall be."""
    # Steps of 2^-20 px: no sum or difference of these loses a bit, so where a box lies has no say in what it overlaps
    boxes = candidates.boxes.double().mul(2**20).round().mul(2**-20)
    classes = torch.zeros_like(candidates.classes) if rules.agnostic else candidates.classes
    native = _native() if boxes.device.type == "cpu" else None
    if native:
        return _kept_by_library(native, boxes, classes, candidates.counts, rules)
    return _kept_by_torchvision(boxes, classes, candidates.counts, rules)


def _kept_by_library(
    native: Callable[..., int], boxes: Tensor, classes: Tensor, counts: list[int], rules: NmsRules
) -> Iterator[Tensor]:
    num_classes = int(classes.max()) + 1 if len(classes) else 1
    boxes, classes = boxes.contiguous(), classes.contiguous()
    assert boxes.dtype == torch.float64 and boxes.shape == (sum(counts), 4)  # C++ takes our word for it
    assert classes.dtype == torch.int64 and classes.shape == (sum(counts),) and (classes >= 0).all()
    assert boxes.device.type == classes.device.type == "cpu"
    start = 0
    for count in counts:
        kept = torch.empty(min(count, rules.max_detections), dtype=torch.int64)
        arrays = (boxes[start:].data_ptr(), classes[start:].data_ptr())
        found = native(*arrays, count, num_classes, rules.iou, len(kept), kept.data_ptr())
        yield start + kept[:found]
        start += count


def _kept_by_torchvision(boxes: Tensor, classes: Tensor, counts: list[int], rules: NmsRules) -> Iterator[Tensor]:
    """Classes and images are moved apart so that one call serves all of them.

    torchvision's own batched_nms shifts in float32 or, for many boxes, runs once per class.
    """
    if not len(boxes):
        yield from classes.split(counts)
        return
    image = torch.repeat_interleave(torch.tensor(counts, device=classes.device), output_size=len(classes))
    rivals = image * (classes.max() + 1) + classes
    apart = boxes + (rivals * (boxes.max() - boxes.min() + 1).ceil())[:, None]
    first = start = 0
    for group in _groups(counts, _TOGETHER[boxes.device.type]):
        rows = torch.arange(start, start + sum(group), device=boxes.device)
        if len(group) == 1:
            yield _survivors_of_one(apart, rows, rules)
        else:
            kept = _survivors(apart, rows, rules.iou)
            many = _counts(image[kept] - first, len(group))
            yield from (one[: rules.max_detections] for one in kept.split(many))
        first, start = first + len(group), start + len(rows)


def _groups(counts: list[int], most: int) -> Iterator[list[int]]:
    """Images that follow each other, as long as they have no more than `most` together, or one."""
    group: list[int] = []
    for count in counts:
        if group and sum(group) + count > most:
            yield group
            group = []
        group.append(count)
    if group:
        yield group


def _survivors_of_one(apart: Tensor, rows: Tensor, rules: NmsRules) -> Tensor:
    """The survivors among the `rows` of one image; the last of them are not looked at where there are enough."""
    kept = rows[:0]
    for chunk in rows.split(_CHUNK):
        kept = _survivors(apart, torch.cat([kept, chunk]), rules.iou)  # those of before all survive again
        if len(kept) >= rules.max_detections:
            break
    return kept[: rules.max_detections]


def _survivors(apart: Tensor, rows: Tensor, iou: float) -> Tensor:
    """Those of the ascending `rows`, best first, that greedy suppression keeps, ascending."""
    from torchvision.ops import nms

    ranks = torch.arange(len(rows), 0, -1, dtype=torch.float64, device=rows.device)  # no ties to break
    return rows[nms(apart[rows], ranks, iou)]


@functools.cache
def _native() -> Callable[..., int] | None:
    """The library's function; None where it cannot be had, and torchvision does as well."""
    try:
        function = native_library(_SOURCE, _FLAGS).suppress
    except NativeError:
        return None
    function.argtypes = [_POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_double, _SIZE, _POINTER]
    function.restype = _SIZE
    return function
