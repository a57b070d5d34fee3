"""LabelStores: packed from labels, and mapped from their file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.structures import LabelStore


@dataclass(frozen=True, kw_only=True)
class ImageLabels:
    """The labels of one image."""

    boxes: np.ndarray  # (N, 4) f64 xyxy as fractions of the image
    classes: np.ndarray  # (N,) i64
    ignore: np.ndarray | None = None  # (N,) u8; None: all count
    rings: Sequence[Sequence[np.ndarray]] = ()  # of each box, (n, 2) fractions; empty: no polygons


def build_store(
    paths: Sequence[Path], sizes: Sequence[tuple[int, int]], labels: Sequence[ImageLabels], *, num_classes: int = 0
) -> LabelStore:
    """Pack the labels of images of `sizes` (height, width) into one LabelStore."""
    hw = np.array(sizes, np.int32).reshape(-1, 2)
    counts = [len(item.classes) for item in labels]
    scale = np.repeat(hw[:, [1, 0, 1, 0]].astype(np.float64), counts, axis=0)  # (T, 4)
    boxes = np.concatenate([item.boxes for item in labels], axis=0) * scale if labels else np.empty((0, 4))
    names = [os.fsencode(path) for path in paths]
    polygons = [
        [np.asarray(ring) * (width, height) for ring in rings]
        for item, (height, width) in zip(labels, sizes)
        for rings in (item.rings or [()] * len(item.classes))
    ]  # of each box
    rings = [ring for polygon in polygons for ring in polygon]
    return LabelStore(
        boxes=boxes.astype(np.float32),
        classes=np.concatenate([item.classes for item in labels]).astype(np.int32) if labels else np.empty(0, np.int32),
        ignore=np.concatenate(
            [np.zeros(0, np.uint8)]
            + [np.zeros(n, np.uint8) if item.ignore is None else item.ignore for item, n in zip(labels, counts)]
        ),
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
        ring_offsets=_offsets(len(polygon) for polygon in polygons),
        point_offsets=_offsets(len(ring) for ring in rings),
        points=np.concatenate([np.empty((0, 2)), *rings]).astype(np.float32),
        offsets=_offsets(counts),
        sizes=hw,
        digests=np.arange(len(hw)).astype(np.uint64),
        image_ids=np.full(len(hw), -1),
        category_ids=np.full(num_classes, -1),
        path_bytes=np.frombuffer(b"".join(names), np.uint8),
        path_offsets=_offsets(len(name) for name in names),
    )


def _offsets(counts) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(counts), dtype=np.int64)]).astype(np.int64)


def single_class(store: LabelStore) -> LabelStore:
    """The store with all classes 0, however many boxes there are, in the memory of one."""
    return replace(store, classes=np.broadcast_to(np.int32(0), store.classes.shape))
