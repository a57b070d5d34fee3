"""The comparison of what published weights find: in yolov5 7.0.14, which wrote them, and read by us without it.

The surprise: both get the same tensor of images, to the bit, so that weights, network, decoding and NMS are compared
and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.cases import BCCD
from benchmarks.evaluation import newest_weights
from benchmarks.results import table
from benchmarks.val_case import for_peer
from benchmarks.workers import Measurement, run_worker
from models.yolo import decode, read_network
from utils.checkpoint import averaged_model, load_weights
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.evaluate.predict import for_evaluation
from utils.runtime import choose_runtime

_PHOTOGRAPHS = 16
_V5 = {  # what v5 had in place of today's first convolution and SPPF
    0: [-1, 1, "Focus", [64, 3]],
    8: [-1, 1, "SPP", [1024, [5, 9, 13]]],
    9: [-1, 3, "C3", [1024, False]],
}


@dataclass(frozen=True, kw_only=True)
class WeightsCase:
    """The peer's process, to which flags are added, and where files may lie."""

    worker: Measurement
    scratch: Path
    threads: int
    imgsz: int
    start: str  # weights of its own kind that its training begins with; empty: none

    def compared(self) -> list[dict[str, Any]]:
        """By file, how far the two are apart; `failed` where one of them could not say."""
        images = self.scratch / "images.pt"
        torch.save(_photographs(self.imgsz), images)
        files = self._files().items()
        return [self._compared(name, path, images, folded=folded) for folded in (False, True) for name, path in files]

    def _files(self) -> dict[str, Path | str]:
        """Weights by what they are; in place of a path, why there are none."""
        return {**self._trained(), **{name: self._built(name, network) for name, network in _networks().items()}}

    def _trained(self) -> dict[str, Path | str]:
        """Of two epochs of its train.py, from `start` where there is one: from nothing they would find nothing."""
        data = shutil.copytree(BCCD.parent, self.scratch / "bccd-weights") / "peer.yaml"
        given = yaml.safe_load(BCCD.read_text(encoding="utf-8"))
        data.write_text(json.dumps(given | {"path": str(data.parent), "nc": len(given["names"])}), encoding="utf-8")
        flags = ["--train", str(data), "--weights", self.start, "--imgsz", str(self.imgsz), "--out", str(self.scratch)]
        failed = self._run(*flags).get("failed")
        names = {"trained: best.pt": "best.pt", "trained: epoch1.pt": "epoch1.pt"}
        return {name: failed or self.scratch / "run" / "weights" / file for name, file in names.items()}

    def _built(self, name: str, network: dict[str, Any]) -> Path | str:
        cfg = self.scratch / f"{name.replace(' ', '-')}.yaml"
        cfg.write_text(json.dumps(network), encoding="utf-8")
        weights = cfg.with_suffix(".pt")
        return self._run("--build", str(cfg), "--weights", str(weights)).get("failed") or weights

    def _compared(self, name: str, weights: Path | str, images: Path, *, folded: bool) -> dict[str, Any]:
        """With the network as the file has it; or `folded`, as both use it, each in its own way."""
        name += ", folded" if folded else ""
        if isinstance(weights, str):
            return {"name": name, "failed": weights}
        out = self.scratch / "found.pt"
        more = [] if folded else ["--unfused"]
        told = self._run("--weights", str(weights), "--images", str(images), "--out", str(out), *more)
        if "failed" in told:
            return {"name": name, **told}
        return {"name": name, "failed": None, **told, **differences(out, weights, images, folded=folded)}

    def _run(self, *flags: str) -> dict[str, Any]:
        return run_worker(replace(self.worker, flags=flags), threads=self.threads)


def weights_case(
    weights: str, *, peer_python: Path, environment: Mapping[str, str], scratch: Path, threads: int, imgsz: int
) -> WeightsCase | str:
    """The case; or why there is none, in one line. `weights` of ours are where its training starts."""
    if not BCCD.is_file():
        return f"{BCCD} is missing"
    path = Path(weights) if weights else newest_weights(str(BCCD))
    start = for_peer(path, scratch, peer_python, environment) if path else ""
    if isinstance(start, str) and start:
        return start
    worker = Measurement(
        section="weights",
        name="yolov5 7.0.14",
        module="peer_weights",
        flags=[],
        python=peer_python,
        environment=environment,
    )
    return WeightsCase(worker=worker, scratch=scratch, threads=threads, imgsz=imgsz, start=str(start))


def _networks() -> dict[str, dict[str, Any]]:
    newer = read_network("yolov5n.yaml")
    rows = [_V5.get(index, row) for index, row in enumerate(newer["backbone"])]
    return {
        "untrained n": newer,
        "untrained n6": read_network("yolov5n6.yaml"),
        "untrained n of v5": {**newer, "backbone": rows},
    }


def _photographs(imgsz: int) -> Tensor:
    """(B, 3, H, W) RGB 0..1, of the shape that evaluation gives to photographs of 4 to 3."""
    size = imgsz, max(imgsz * 3 // 4 // 64 * 64, 64)
    paths = sorted((BCCD.parent / "images" / "val").iterdir())[:_PHOTOGRAPHS]
    pixels = np.stack([cv2.resize(cv2.imread(str(path)), size)[..., ::-1] for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


# ---- how far they are apart ---------------------------------------------------------------------------------------


@torch.no_grad()
def differences(theirs: Path, weights: Path, images: Path, *, folded: bool) -> dict[str, Any]:
    """The largest, of every anchor and of what NMS leaves, in px of the network input and in score."""
    given = torch.load(theirs, weights_only=True)
    checkpoint = load_weights(weights)
    network, pixels = averaged_model(checkpoint), torch.load(images, weights_only=True)
    if folded:
        network = for_evaluation(network, choose_runtime(device="cpu", amp="off", workers=0))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    raw = decode(network(pixels), network.head)
    found = non_max_suppression(raw, NmsRules(confidence=0.25, iou=0.45, max_detections=1000)).detections
    ours = [torch.cat((one.boxes, one.scores[:, None], one.classes[:, None]), 1) for one in found]
    centre, size = given["raw"][..., :2], given["raw"][..., 2:4]
    boxes = torch.cat((centre - size / 2, centre + size / 2), -1)
    scores, their_scores = (rows[..., 4:5] * rows[..., 5:] for rows in (raw, given["raw"]))
    pairs = [apart(mine, other) for mine, other in zip(ours, given["found"])]
    return {
        "names_equal": list(given["names"].values()) == checkpoint["names"],
        "anchors_px": (raw[..., :4] - boxes).abs().max().item(),
        "anchors_score": (scores - their_scores).abs().max().item(),
        "found_ours": sum(map(len, ours)),
        "best_score": scores.max().item(),
        "found_px": max(pair[0] for pair in pairs),
        "found_score": max(pair[1] for pair in pairs),
    }


def apart(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference of two (K, 6) lists of x1 y1 x2 y2 score class, in px and in score; order does not count.

    Infinite where one has what the other has not.
    """
    if len(ours) != len(theirs):
        return float("inf"), float("inf")
    if not len(ours):
        return 0.0, 0.0
    pixels = (ours[:, None, :4] - theirs[None, :, :4]).abs().amax(-1)  # (K, K)
    pixels[ours[:, None, 5] != theirs[None, :, 5]] = float("inf")
    nearest = pixels.argmin(1)
    if len(nearest.unique()) < len(theirs):
        return float("inf"), float("inf")
    return pixels.amin(1).max().item(), (ours[:, 4] - theirs[nearest, 4]).abs().max().item()


def weights_table(rows: list[dict[str, Any]]) -> str:
    headers = ["weights", "anchors", "largest px", "score", "detections", "largest px", "score", "names equal"]
    return table(headers, [_row(row, len(headers)) for row in rows])


def _row(row: dict[str, Any], columns: int) -> list[str]:
    if row["failed"]:
        return [f"{row['name']}: {row['failed']:.120}", *[""] * (columns - 1)]
    return [
        row["name"],
        f"{row['images'] * row['rows']:,}",
        f"{row['anchors_px']:.1e}",
        f"{row['anchors_score']:.1e}",
        f"{row['found_ours']:,}",
        f"{row['found_px']:.1e}",
        f"{row['found_score']:.1e}",
        "yes" if row["names_equal"] else "no",
    ]
