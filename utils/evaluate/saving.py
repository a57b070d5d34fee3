"""The files that an evaluation leaves besides its figures: results in COCO's format, label files in YOLO's.

The surprise: results never go without an annotation file of what they were scored against, so that any COCO tool
comes to our figures. Where a split has no ids of images and categories, the two have ids of their own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import numpy as np

from utils.boxes import cxcywh_from_xyxy, pairwise_iou, xywh_from_xyxy
from utils.evaluate.matching import Labels
from utils.evaluate.metrics import Evidence
from utils.files import write_atomic, write_text
from utils.run_folder import METRICS_FILE, WEIGHTS_FOLDER
from utils.structures import CROWD, DIFFICULT, LabelStore, UserError

PREDICTIONS_FILE = "predictions.json"
ANNOTATIONS_FILE = "annotations.json"
LABELS_FOLDER = "labels"

_SAVED = (PREDICTIONS_FILE, ANNOTATIONS_FILE)
_PICTURES = (
    *("val_batch?_labels.jpg", "val_batch?_pred.jpg", "confusion_matrix.png", "confusion_matrix_counts.png"),
    *("F1_curve.png", "P_curve.png", "R_curve.png", "PR_curve.png", "worst_images.jpg"),
)
_HYBRID_CONFIDENCE = 0.25  # what is below would be taken out again by hand
_AT_ONCE = 100_000  # detections turned into text in one go


def check_folder(folder: Path) -> None:
    """Refuse a folder whose contents results would replace, or pass for them, and that nobody can make again.

    Raises UserError for that of a training run, for label files, which a user may have gone on to edit, and for files
    of our names that no evaluation wrote.
    """
    if (folder / WEIGHTS_FOLDER).exists():
        raise UserError(
            f"--exist-ok: {folder} is the folder of a training run, whose results would be replaced; choose another "
            "--name or --project"
        )
    labels = folder / LABELS_FOLDER
    if os.path.lexists(labels):
        raise UserError(
            f"--exist-ok: {labels} is there already, with label files that may have been edited; remove it or choose "
            "another --name"
        )
    saved = [path for path in map(folder.joinpath, _SAVED) if os.path.lexists(path)]
    if saved and not (folder / METRICS_FILE).exists():
        raise UserError(
            f"--exist-ok: {saved[0]} is not of an evaluation (there is no {METRICS_FILE} beside it) and would be "
            "replaced; choose another --name or --project"
        )


def clear_results(folder: Path) -> None:
    """Remove what an earlier evaluation left, but for label files, so that none of it passes for that of a new one."""
    pictures = [path for pattern in _PICTURES for path in folder.glob(pattern)]
    saved = [folder / name for name in (*_SAVED, METRICS_FILE)]  # that one last: it says whose the others are
    for path in (*pictures, *saved):
        path.unlink(missing_ok=True)


# ---- COCO results -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CocoIds:
    """What the images and classes of a split are called in a COCO file."""

    images: np.ndarray  # (I,) i64, each once
    categories: np.ndarray  # (C,) i64, -1 for a class that the file lacks
    invented: bool  # there is no such file


def coco_ids(store: LabelStore, num_classes: int) -> CocoIds:
    """The ids of a split, or where it has none the numbers of its images and classes, counted from 1."""
    if _has_image_ids(store) and _has_category_ids(store, num_classes):
        return CocoIds(images=store.image_ids, categories=store.category_ids, invented=False)
    return CocoIds(images=np.arange(1, len(store) + 1), categories=np.arange(1, num_classes + 1), invented=True)


def _has_image_ids(store: LabelStore) -> bool:
    """Whether each image has a number of its own in an annotation file."""
    ids = store.image_ids
    return bool((ids >= 0).all()) and len(np.unique(ids)) == len(ids)


def _has_category_ids(store: LabelStore, num_classes: int) -> bool:
    """Whether each class that has labels, and one at least, has a number of its own."""
    if len(store.category_ids) != num_classes:
        return False
    known = store.category_ids >= 0
    is_used = np.bincount(store.classes, minlength=num_classes) > 0
    return bool(known.any() and known[is_used].all()) and len(np.unique(store.category_ids[known])) == known.sum()


def write_predictions(folder: Path, evidence: Evidence, store: LabelStore, names: Sequence[str]) -> list[str]:
    """Write predictions.json and annotations.json, what they are scored against; lines for the user.

    Boxes are xywh in px of the source image. Detections of a class without a category are left out.
    """
    ids = coco_ids(store, len(names))
    nameless = ids.categories[evidence.classes] < 0
    lines = []
    if nameless.any():
        missing = [names[index] for index in np.unique(evidence.classes[nameless])]
        lines.append(
            f"{PREDICTIONS_FILE}: {nameless.sum():,} detections left out, of classes that the COCO file has no "
            f"category for: {', '.join(missing)}"
        )
    by_image = np.argsort(evidence.image, kind="stable")
    _write_list(folder / PREDICTIONS_FILE, _results(evidence, by_image[~nameless[by_image]], ids))
    write_atomic(folder / ANNOTATIONS_FILE, lambda file: _write_annotations(file, store, names, ids))
    difficult = int((store.ignore == DIFFICULT).sum())
    if difficult:
        lines.append(
            f"{ANNOTATIONS_FILE}: {difficult:,} difficult boxes, which COCO's tool takes for ordinary ones: "
            f"its figures differ from those in {METRICS_FILE}"
        )
    return lines


def _results(evidence: Evidence, rows: np.ndarray, ids: CocoIds) -> Iterator[str]:
    """One JSON object for each of these detections, to the last digit."""
    for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE)):
        images, categories = ids.images[evidence.image[part]], ids.categories[evidence.classes[part]]
        boxes = xywh_from_xyxy(evidence.boxes[part].astype(np.float64))
        scores = evidence.scores[part].astype(np.float64)
        for image, category, box, score in zip(*(each.tolist() for each in (images, categories, boxes, scores))):
            yield f'{{"image_id": {image}, "category_id": {category}, "bbox": {box}, "score": {score}}}'


def _write_annotations(file: IO[bytes], store: LabelStore, names: Sequence[str], ids: CocoIds) -> None:
    images = (
        _dumped({"id": int(number), "file_name": name.replace(os.sep, "/"), "width": int(width), "height": int(height)})
        for number, name, (height, width) in zip(ids.images, _below_common_folder(store), store.sizes)
    )
    named = zip(ids.categories.tolist(), names)
    categories = (_dumped({"id": number, "name": name}) for number, name in named if number >= 0)
    lists = {"images": images, "annotations": _annotations(store, ids), "categories": categories}
    for place, (key, items) in enumerate(lists.items()):
        file.write(f"{',' if place else '{'}\n{json.dumps(key)}: ".encode())
        _write_items(file, items)
    file.write(b"}\n")


def _annotations(store: LabelStore, ids: CocoIds) -> Iterator[str]:
    """The true boxes as they are evaluated."""
    numbers = count(1)  # 0 is no match to COCO's tool
    for image, image_id in enumerate(ids.images.tolist()):
        labels, ignore = Labels.of(store, image), store.ignore[store.rows(image)]
        for box, kind, area, ignored in zip(labels.xywh, labels.classes, labels.area, ignore):
            item: dict[str, Any] = {
                "id": next(numbers),
                "image_id": image_id,
                "category_id": int(ids.categories[kind]),
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(ignored == CROWD),
            }
            yield _dumped(item | {"ignore": 1} if ignored == DIFFICULT else item)


def _dumped(item: dict[str, Any]) -> str:
    return json.dumps(item)


def _write_list(path: Path, items: Iterable[str]) -> None:
    write_atomic(path, lambda file: _write_items(file, items))


def _write_items(file: IO[bytes], items: Iterable[str]) -> None:
    """A JSON list, an item a line, that is never in memory as a whole."""
    file.write(b"[")
    for place, item in enumerate(items):
        file.write(f"{',' if place else ''}\n{item}".encode())
    file.write(b"\n]\n")


# ---- label files --------------------------------------------------------------------------------------------------


def write_labels(
    folder: Path, evidence: Evidence, store: LabelStore, *, scores: bool = False, hybrid_iou: float | None = None
) -> int:
    """Write `labels/IMAGE.txt` below `folder` for each image with something in it; how many these are.

    There must be no such folder yet, and it appears when it is whole. With `hybrid_iou` the true boxes come first, with
    score 1, and of the detections only those are left that score above 0.25 and overlap no true box, of any class, by
    more.
    """
    unfinished = folder / f".{LABELS_FOLDER}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of an evaluation that was killed
    unfinished.mkdir()
    try:
        written = _write_label_files(unfinished, evidence, store, scores, hybrid_iou)
        unfinished.rename(folder / LABELS_FOLDER)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return written


def _write_label_files(
    folder: Path, evidence: Evidence, store: LabelStore, scores: bool, hybrid_iou: float | None
) -> int:
    by_image = np.argsort(evidence.image, kind="stable")
    of_image = np.split(by_image, np.searchsorted(evidence.image[by_image], np.arange(1, len(store))))
    written = 0
    for image, (name, rows) in enumerate(zip(label_names(store), of_image)):
        boxes, classes, confidences = evidence.boxes[rows], evidence.classes[rows], evidence.scores[rows]
        if hybrid_iou is not None:
            sure = confidences > _HYBRID_CONFIDENCE
            found = boxes[sure], classes[sure], confidences[sure]
            boxes, classes, confidences = _with_truth(store, image, *found, hybrid_iou)
        if len(boxes):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_txt(path, boxes, classes, confidences if scores else None, tuple(store.sizes[image]))
            written += 1
    return written


def _with_truth(
    store: LabelStore, image: int, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = store.rows(image)
    objects = store.ignore[rows] != CROWD
    true_boxes, true_classes = store.boxes[rows][objects], store.classes[rows][objects]
    known = (pairwise_iou(boxes.astype(np.float64), true_boxes.astype(np.float64)) > iou).any(1)  # (K,)
    return (
        np.concatenate([true_boxes, boxes[~known]]),
        np.concatenate([true_classes, classes[~known]]),
        np.concatenate([np.ones(len(true_boxes), scores.dtype), scores[~known]]),
    )


def write_txt(
    path: Path, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray | None, size: tuple[int, int]
) -> None:
    """A YOLO label file: `class cx cy w h`, fractions of the image, and the score where there are `scores`.

    boxes (K, 4) xyxy px of an image of `size` (height, width), classes (K,), scores (K,) f32. Read again, a box is off
    by less than 1e-4 px.
    """
    height, width = map(int, size)
    fractions = cxcywh_from_xyxy(np.asarray(boxes, np.float64)) / [width, height, width, height]
    lines = [
        f"{kind} " + " ".join(f"{value:.10g}" for value in row)
        for kind, row in zip(np.asarray(classes).tolist(), fractions.tolist())
    ]
    if scores is not None:  # the shortest text that is this very f32
        lines = [f"{line} {score!s}" for line, score in zip(lines, np.asarray(scores, np.float32))]
    write_text(path, "".join(f"{line}\n" for line in lines), lasting=False)


def label_names(store: LabelStore) -> list[str]:
    """Where the label file of each image lies below the folder of labels: as its image does below the common one.

    Images of one name but for the ending keep the ending: x.jpg.txt, x.png.txt.
    """
    images = _below_common_folder(store)
    stems = Counter(os.path.splitext(image)[0].casefold() for image in set(images))  # noqa: PTH122 (millions of names)
    names: dict[str, str] = {}
    taken: set[str] = set()  # without case, as the file systems of Windows and macOS have it
    for image in images:
        if image in names:
            continue  # listed twice
        stem = os.path.splitext(image)[0]  # noqa: PTH122
        kept = stem if stems[stem.casefold()] == 1 else image
        candidates = chain((kept, image), (f"{image}-{number}" for number in count(2)))
        names[image] = next(f"{name}.txt" for name in candidates if name.casefold() not in taken)
        taken.add(names[image][:-4].casefold())
    return [names[image] for image in images]


def _below_common_folder(store: LabelStore) -> list[str]:
    """The path of each image below the folder that all of them lie in, without `..`, which would lead out of it."""
    paths = [os.path.normpath(store.path(image)) for image in range(len(store))]
    try:
        root = os.path.commonpath({os.path.dirname(path) for path in paths})  # noqa: PTH120
    except ValueError:  # several drives
        return [os.path.splitdrive(path)[1].lstrip("\\/") for path in paths]
    return [path[len(root) :].lstrip("\\/" if os.sep == "\\" else "/") for path in paths]
