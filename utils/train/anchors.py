"""Autoanchor: do the anchors reach the labels, and if not, which would.

k-means on label sizes, then a genetic search (SPEC 6). Deterministic: its randomness comes from the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.data.images import base_scales
from utils.structures import CROWD, LabelStore

_ENOUGH_RECALL = 0.98
_GENERATIONS = 1000
_KMEANS_ROUNDS = 30
_MIN_SIDE_PX = 2.0
_SAMPLE = 50_000  # labels that the search looks at; recall is counted on all, so many at a time


@dataclass(frozen=True, kw_only=True)
class AnchorChoice:
    """The anchors to train with, (L, A, 2) px, the best possible recall of old and new, and whether they changed."""

    anchors: np.ndarray
    recall_before: float
    recall_after: float
    changed: bool


def choose_anchors(
    anchors: np.ndarray, store: LabelStore, *, imgsz: int, anchor_t: float, seed: int, force: bool = False
) -> AnchorChoice:
    """Keep `anchors` (L, A, 2) px where they reach 98% of the labels, else search; the better set is returned.

    `force` searches in any case and takes the result, as for a head whose number of anchors was changed.
    """
    sizes = label_sizes(store, imgsz)
    before = best_possible_recall(sizes, anchors.reshape(-1, 2), anchor_t)
    kept = AnchorChoice(anchors=anchors, recall_before=before, recall_after=before, changed=False)
    levels, per_level = anchors.shape[:2]
    if (before >= _ENOUGH_RECALL and not force) or not len(sizes):
        return kept
    rng = np.random.Generator(np.random.Philox(key=seed))
    sample = sizes[:: -(-len(sizes) // _SAMPLE)]
    found = _evolved(_kmeans(sample, levels * per_level, rng), sample, anchor_t, rng)
    found = found[np.argsort(found.prod(1), kind="stable")]
    after = best_possible_recall(sizes, found, anchor_t)
    if after <= before and not force:
        return kept
    return AnchorChoice(
        anchors=found.reshape(levels, per_level, 2).astype(np.float32),
        recall_before=before,
        recall_after=after,
        changed=True,
    )


def label_sizes(store: LabelStore, imgsz: int) -> np.ndarray:
    """(T, 2) width and height, in px of the base images, of the labels to train on: no crowd, none too small."""
    scales = np.repeat(base_scales(store.sizes, imgsz), np.diff(store.offsets), axis=0)  # (T, 2)
    sizes = (store.boxes[:, 2:] - store.boxes[:, :2]) * scales
    return sizes[(sizes >= _MIN_SIDE_PX).all(1) & (store.ignore != CROWD)]


def best_possible_recall(sizes: np.ndarray, anchors: np.ndarray, anchor_t: float) -> float:
    """Share of label sizes (T, 2) that some anchor (N, 2) is within the factor `anchor_t` of; 1 without labels."""
    if not len(sizes):
        return 1.0
    parts = np.array_split(sizes, -(-len(sizes) // _SAMPLE))
    return sum(int((_closeness(part, anchors) > 1 / anchor_t).sum()) for part in parts) / len(sizes)


def _closeness(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(T,) of each label size the ratio of its worse side to that of its best anchor, 1 where both are equal.

    Side by side and label after label, which is several times as fast as by pairs.
    """
    worse: np.ndarray | None = None
    for side, side_of_anchors in zip(np.ascontiguousarray(sizes.T), anchors.T):
        ratio = side / side_of_anchors[:, None]  # (N, T)
        np.minimum(ratio, 1 / ratio, out=ratio)
        worse = ratio if worse is None else np.minimum(worse, ratio, out=worse)
    return worse.max(0)


def _kmeans(sizes: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Lloyd's algorithm on sizes scaled to unit spread."""
    spread = np.maximum(sizes.std(0), 1e-9)
    points = sizes / spread
    centres = _spread_out(points, clusters, rng)
    for _ in range(_KMEANS_ROUNDS):
        nearest = np.square(points[:, None] - centres[None]).sum(2).argmin(1)
        members = [points[nearest == cluster] for cluster in range(clusters)]
        centres = np.stack([group.mean(0) if len(group) else old for group, old in zip(members, centres)])
    return centres * spread


def _spread_out(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the points, each drawn with a weight of its squared distance to the nearest before it.

    Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007. Points repeat where fewer
    than `count` are distinct.
    """
    chosen = points[rng.integers(len(points), size=1)]
    for _ in range(count - 1):
        distance = np.square(points[:, None] - chosen[None]).sum(2).min(1)
        weights = distance / distance.sum() if distance.any() else None
        chosen = np.concatenate([chosen, points[rng.choice(len(points), size=1, p=weights)]])
    return chosen


def _evolved(anchors: np.ndarray, sizes: np.ndarray, anchor_t: float, rng: np.random.Generator) -> np.ndarray:
    """Mutate, keep what is fitter: the mean closeness of each label to its best anchor, where that is within reach."""

    def fitness(candidate: np.ndarray) -> float:
        best = _closeness(sizes, candidate)
        return float((best * (best > 1 / anchor_t)).mean())

    best, best_fitness = anchors, fitness(anchors)
    for _ in range(_GENERATIONS):
        chosen = rng.random(anchors.shape) < 0.9
        factor = 1 + chosen * rng.random() * rng.normal(size=anchors.shape) * 0.1
        candidate = np.maximum(best * factor.clip(0.3, 3.0), _MIN_SIDE_PX)
        candidate_fitness = fitness(candidate)
        if candidate_fitness > best_fitness:
            best, best_fitness = candidate, candidate_fitness
    return best
