"""LabelStores: packed from labels, joined from parts, and mapped from their file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from utils.boxes import xywh_from_xyxy
from utils.data.labels import LabelRows, box_rows, offsets_of
from utils.files import read_arrays
from utils.structures import LabelStore, UserError

_FIELDS = tuple(item.name for item in fields(LabelStore))
_OFFSETS = ("ring_offsets", "point_offsets", "offsets", "path_offsets")  # those of parts are joined one after another
_OF_CLASSES = ("category_ids",)  # one for all images


# ---- packing ------------------------------------------------------------------------------------------------------


def packed(
    rows: LabelRows,
    *,
    paths: Sequence[str],
    sizes: np.ndarray,
    digests: np.ndarray,
    image_ids: np.ndarray,
    category_ids: Sequence[int],
) -> LabelStore:
    """The store of n images, those left out whose size is 0; none of `rows` belongs to such a one.

    Paths (n,), sizes (n, 2) height and width in px, digests (n,), image_ids (n,), category_ids (C,).
    """
    usable = sizes[:, 0] > 0  # (n,)
    counts = np.bincount(rows.image_of, minlength=len(sizes))
    assert not counts[~usable].any(), "rows of images that cannot be used"
    names = [os.fsencode(path) for path, keep in zip(paths, usable.tolist()) if keep]
    return LabelStore(
        boxes=rows.boxes.astype(np.float32),
        classes=rows.classes.astype(np.int32),
        ignore=rows.ignore.astype(np.uint8),
        area=np.where(np.isnan(rows.area), _box_area(rows), rows.area),
        annotated=rows.annotated,
        ring_offsets=rows.ring_offsets.astype(np.int64),
        point_offsets=rows.point_offsets.astype(np.int64),
        points=rows.points.astype(np.float32),
        offsets=offsets_of(counts[usable]),
        sizes=sizes[usable].astype(np.int32),
        digests=digests[usable].astype(np.uint64),
        image_ids=image_ids[usable].astype(np.int64),
        category_ids=np.array(category_ids, np.int64),
        path_bytes=np.frombuffer(b"".join(names), np.uint8),
        path_offsets=offsets_of([len(name) for name in names]),
    )


def _box_area(rows: LabelRows) -> np.ndarray:
    """(R,) f64 px^2; of boxes in a COCO file as they stand there, since whoever scores against it knows no other."""
    width, height = (rows.annotated if len(rows.annotated) else xywh_from_xyxy(rows.boxes))[:, 2:].T
    with np.errstate(over="ignore"):  # 1e308 is finite
        return width * height


def joined(parts: Sequence[LabelStore]) -> LabelStore:
    """One store of the images of all parts, in their order. A class has the category id of the first part with one."""
    arrays = {}
    for name in _FIELDS:
        each = [getattr(part, name) for part in parts]
        if name in _OFFSETS:
            arrays[name] = joined_offsets(each)
        elif name == "annotated":
            arrays[name] = _annotated(parts)
        elif name in _OF_CLASSES:
            arrays[name] = _first_known(each)
        else:
            arrays[name] = np.concatenate(each)
    return LabelStore(**arrays)


def _annotated(parts: Sequence[LabelStore]) -> np.ndarray:
    """For all boxes or none; a part without has them from its boxes."""
    if not any(len(part.annotated) for part in parts):
        return np.empty((0, 4))
    each = [part.annotated if len(part.annotated) else xywh_from_xyxy(part.boxes.astype(np.float64)) for part in parts]
    return np.concatenate(each)


def joined_offsets(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Offsets (n + 1,) of runs that lie one after another, from those of parts, which each start at 0."""
    return offsets_of(np.concatenate([np.diff(part) for part in parts]))


def _first_known(parts: Sequence[np.ndarray]) -> np.ndarray:
    ids = parts[0].copy()
    for part in parts[1:]:
        np.copyto(ids, part, where=ids < 0)
    return ids


def single_class(store: LabelStore) -> LabelStore:
    """The store with all classes 0, however many boxes there are, in the memory of one."""
    return replace(store, classes=np.broadcast_to(np.int32(0), store.classes.shape))


def content_digest(store: LabelStore) -> str:
    """32 hexadecimal digits of images and labels in their order, wherever their files lie."""
    digest = blake2b(digest_size=16)
    for name in ("digests", "sizes", "offsets", "boxes", "classes", "ignore"):
        digest.update(np.ascontiguousarray(getattr(store, name)))
    return digest.hexdigest()


# ---- mapping ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MappedStore(LabelStore):
    """A LabelStore whose arrays lie in a file: a loader process that is not forked maps it, and gets no copy."""

    file: Path
    key: str  # of the scan that wrote it

    def __reduce__(self) -> tuple[Callable, tuple]:
        one_class = self.classes.strides == (0,)  # by `single_class`: the file still has them all
        return _map_again, (self.file, self.key, one_class)


def map_store(file: Path, key: str, arrays: dict[str, np.ndarray]) -> MappedStore:
    """The store among the arrays of a file by `read_arrays`. Raises ValueError where they do not make one."""
    try:
        mine = {name: arrays[name] for name in _FIELDS}
    except KeyError as missing:
        raise ValueError(f"not the arrays of a LabelStore: {file}") from missing
    store = MappedStore(**mine, file=file, key=key)
    if not _is_whole(store):
        raise ValueError(f"damaged LabelStore: {file}")
    return store


def _is_whole(store: LabelStore) -> bool:
    """Whether the lengths of all arrays, and the ends of their offsets, agree."""
    images, boxes = len(store.sizes), len(store.boxes)
    rings = len(store.point_offsets) - 1
    shapes: dict[str, tuple[int, ...]] = {
        "boxes": (boxes, 4),
        "classes": (boxes,),
        "ignore": (boxes,),
        "area": (boxes,),
        "annotated": (boxes if len(store.annotated) else 0, 4),
        "ring_offsets": (boxes + 1,),
        "point_offsets": (rings + 1,),
        "points": (len(store.points), 2),
        "offsets": (images + 1,),
        "sizes": (images, 2),
        "digests": (images,),
        "image_ids": (images,),
        "path_bytes": (store.path_bytes.size,),
        "path_offsets": (images + 1,),
    }
    ends = {"ring_offsets": rings, "point_offsets": len(store.points), "offsets": boxes}
    ends["path_offsets"] = len(store.path_bytes)
    return all(getattr(store, name).shape == shape for name, shape in shapes.items()) and all(
        getattr(store, name)[0] == 0 and getattr(store, name)[-1] == end for name, end in ends.items()
    )


def _map_again(file: Path, key: str, one_class: bool) -> LabelStore:
    arrays, meta = read_arrays(file)
    if meta["key"] != key:
        raise UserError(f"{file}: the data set was scanned anew while it was in use; start again")
    store = map_store(file, key, arrays)
    return single_class(store) if one_class else store


# ---- by hand ------------------------------------------------------------------------------------------------------


def plain_store(
    sizes: np.ndarray, *, boxes: np.ndarray | None = None, classes: np.ndarray | None = None, offsets=None
) -> LabelStore:
    """Images without names or polygons; sizes (I, 2) height and width, boxes (T, 4) px, offsets (I + 1,)."""
    boxes = np.empty((0, 4)) if boxes is None else boxes
    offsets = np.zeros(len(sizes) + 1, np.int64) if offsets is None else np.asarray(offsets)
    classes = np.zeros(len(boxes), np.int64) if classes is None else classes
    rows = box_rows(np.repeat(np.arange(len(sizes)), np.diff(offsets)), classes, boxes)
    return packed(
        rows,
        paths=[""] * len(sizes),
        sizes=np.asarray(sizes, np.int32),
        digests=np.arange(len(sizes)),
        image_ids=np.full(len(sizes), -1),
        category_ids=(),
    )
