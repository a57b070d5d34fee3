"""What COCO's own tool says of detections, as the reference for ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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
