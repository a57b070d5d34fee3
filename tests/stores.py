"""LabelStores for tests, out of the labels of one image after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.labels import LabelRows, offsets_of
from utils.data.store import packed
from utils.structures import LabelStore


@dataclass(frozen=True, kw_only=True)
class ImageLabels:
    """The labels of one image."""

    boxes: np.ndarray  # (N, 4) f64 xyxy as fractions of the image
    classes: np.ndarray  # (N,) i64
    ignore: np.ndarray | None = None  # (N,) u8; None: all count
    rings: Sequence[Sequence[np.ndarray]] = ()  # of each box, (n, 2) fractions; empty: no polygons


def build_store(
    paths: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    labels: Sequence[ImageLabels],
    *,
    num_classes: int = 0,
) -> LabelStore:
    """The labels of images of `sizes` (height, width) as a LabelStore."""
    hw = np.array(sizes, np.int32).reshape(-1, 2)
    counts = [len(item.classes) for item in labels]
    scale = np.repeat(hw[:, [1, 0, 1, 0]].astype(np.float64), counts, axis=0)  # (T, 4)
    polygons = [
        [np.asarray(ring, np.float64) * (width, height) for ring in rings]
        for item, (height, width) in zip(labels, sizes)
        for rings in (item.rings or [()] * len(item.classes))
    ]  # of each box
    rings = [ring for polygon in polygons for ring in polygon]
    ignore = [np.zeros(len(item.classes), np.uint8) if item.ignore is None else item.ignore for item in labels]
    rows = LabelRows(
        image_of=np.repeat(np.arange(len(hw)), counts),
        classes=np.concatenate([np.empty(0, np.int64), *(item.classes for item in labels)]),
        boxes=np.concatenate([np.empty((0, 4)), *(item.boxes for item in labels)]) * scale,
        ignore=np.concatenate([np.empty(0, np.uint8), *ignore]),
        area=np.full(sum(counts), np.nan),
        annotated=np.empty((0, 4)),
        ring_offsets=offsets_of([len(polygon) for polygon in polygons]),
        point_offsets=offsets_of([len(ring) for ring in rings]),
        points=np.concatenate([np.empty((0, 2)), *rings]),
    )
    return packed(
        rows,
        paths=[os.fspath(path) for path in paths],
        sizes=hw,
        digests=np.arange(len(hw)),
        image_ids=np.full(len(hw), -1, np.int64),
        category_ids=np.full(num_classes, -1),
    )
