"""What COCO's own tool says of detections, as the reference for ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.boxes import xywh_from_xyxy
from utils.evaluate.matching import Labels
from utils.structures import Detections


@dataclass(frozen=True, kw_only=True)
class ToolFigures:
    """NaN where the tool has none."""

    twelve: np.ndarray  # (12,)
    ap: np.ndarray  # (C, T, A) average precision by class, IoU threshold and area range


def tool_figures(content: dict[str, Any], results: Sequence[dict[str, Any]]) -> ToolFigures:
    """The tool's figures for the parsed content of a COCO file and of a results file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = content
        truth.createIndex()
        # loadRes does no more for boxes, but refuses an empty list
        found.dataset = content | {
            "annotations": [
                one | {"id": number, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]}
                for number, one in enumerate(results, 1)
            ]
        }
        found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, :, 2]  # (T, 101, C, A)
    ap = np.where(precision < 0, np.nan, precision).mean(1).transpose(1, 0, 2)
    return ToolFigures(twelve=np.where(judge.stats < 0, np.nan, judge.stats), ap=ap)


def coco_content(labels: Sequence[Labels], image_ids: Sequence[int], num_classes: int) -> dict[str, Any]:
    """Labels as a parsed COCO file: category c + 1 for class c, annotations counted from 1.

    From 1, because the tool takes a match to annotation 0 for none.
    """
    rows = [
        {"image_id": image, "category_id": kind + 1, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for image, one in zip(image_ids, labels)
        for box, kind, area, crowd in zip(
            one.xywh.tolist(), one.classes.tolist(), one.area.tolist(), one.crowd.tolist()
        )
    ]
    return {
        "images": [{"id": image, "file_name": f"{image}.png", "width": 640, "height": 640} for image in image_ids],
        "categories": [{"id": kind + 1, "name": f"class {kind}"} for kind in range(num_classes)],
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
    }


def coco_results(detections: Sequence[Detections], image_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections as the entries of a COCO results file."""
    return [
        {"image_id": image, "category_id": kind + 1, "bbox": box, "score": score}
        for image, one in zip(image_ids, detections)
        for box, kind, score in zip(
            xywh_from_xyxy(one.boxes.double().numpy()).tolist(), one.classes.tolist(), one.scores.tolist()
        )
    ]
