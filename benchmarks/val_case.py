"""The comparison of val.py with the peer's: the same weights and images for both, and one judge of what each detects.

The surprise: the judge is pycocotools, on the results files of both; the peer rounds what it writes there.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.cases import BCCD
from benchmarks.evaluation import newest_weights
from benchmarks.results import figure, table
from benchmarks.workers import Measurement, comparison, run_worker
from utils.checkpoint import averaged_model, load_checkpoint


@dataclass(frozen=True, kw_only=True)
class ValCase:
    """One data set and one set of weights, for both sides."""

    name: str
    peer: Measurement
    ours: Measurement
    out: Path  # where both write: in folders of their own
    threads: int

    def measured_aps(self) -> dict[str, dict[str, float]]:
        """By contender, AP and AP50 of pycocotools; a turn of each that does not count writes the detections."""
        for one in (self.peer, self.ours):
            turn = run_worker(replace(one, flags=[*one.flags, "--save-json"]), threads=self.threads)
            if "failed" in turn:
                return {}
        truth = next(self.out.glob("ours/annotations.json"))
        (theirs,) = self.out.glob("peer/*_predictions.json")
        return {
            self.peer.name: _judged(truth, _with_our_ids(theirs, truth)),
            self.ours.name: _judged(truth, self.out / "ours" / "predictions.json"),
        }


def val_case(
    weights: str, *, peer_python: Path, environment: Mapping[str, str], scratch: Path, threads: int, imgsz: int
) -> ValCase | str:
    """The case; or why there is none, in one line."""
    if not BCCD.is_file():
        return f"{BCCD} is missing"
    path = Path(weights) if weights else newest_weights(str(BCCD))
    if path is None:
        return f"no run on {BCCD.name} in runs/; train one, or give --weights"
    data = shutil.copytree(BCCD.parent, scratch / "bccd-val") / BCCD.name
    given = yaml.safe_load(data.read_text(encoding="utf-8"))
    peer_data = data.with_name("peer.yaml")
    peer_data.write_text(json.dumps(given | {"path": str(data.parent), "nc": len(given["names"])}), encoding="utf-8")
    peer_weights = for_peer(path, scratch, peer_python, environment)
    if isinstance(peer_weights, str):
        return peer_weights
    out = scratch / "val"
    common = ["--imgsz", str(imgsz), "--threads", str(threads), "--out", str(out)]
    peer = Measurement(
        section="val",
        name="yolov5 7.0.14",
        module="peer_val",
        flags=["--weights", str(peer_weights), "--data", str(peer_data), *common],
        python=peer_python,
        environment=environment,
    )
    flags = ["--weights", str(path.resolve()), "--data", str(data), *common]
    ours = Measurement(section="val", name="ours", module="validation", flags=flags)
    return ValCase(name=f"val.py on BCCD, {imgsz}", peer=peer, ours=ours, out=out, threads=threads)


def for_peer(weights: Path, scratch: Path, peer_python: Path, environment: Mapping[str, str]) -> Path | str:
    """Our weights as a file of the peer's; or what went wrong."""
    checkpoint = load_checkpoint(weights)
    model = averaged_model(checkpoint).float()
    plain, made = scratch / "plain.pt", scratch / "peer.pt"
    torch.save({"network": model.network, "names": list(checkpoint["names"]), "state": model.state_dict()}, plain)
    convert = Measurement(
        section="val",
        name="weights",
        module="peer_val",
        flags=["--from", str(plain), "--weights", str(made), "--data", "none", "--out", "none"],
        python=peer_python,
        environment=environment,
    )
    return run_worker(convert, threads=1).get("failed") or made


def _with_our_ids(results: Path, truth: Path) -> Path:
    """The peer names images by their files and counts classes from 0."""
    images = json.loads(truth.read_text(encoding="utf-8"))
    ids = {Path(image["file_name"]).stem: image["id"] for image in images["images"]}
    categories = [category["id"] for category in images["categories"]]
    rows = json.loads(results.read_text(encoding="utf-8"))
    for row in rows:
        row["image_id"], row["category_id"] = ids[str(row["image_id"])], categories[row["category_id"]]
    renamed = results.with_name("renamed.json")
    renamed.write_text(json.dumps(rows), encoding="utf-8")
    return renamed


def _judged(truth: Path, results: Path) -> dict[str, float]:
    from pycocotools.coco import COCO  # of the tests' requirements
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        labels = COCO(str(truth))
        judge = COCOeval(labels, labels.loadRes(str(results)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"ap": float(judge.stats[0]), "ap50": float(judge.stats[1])}


def validator(
    one: Measurement, rounds: Mapping[str, list[dict[str, Any]]], judged: Mapping[str, dict[str, float]]
) -> dict[str, Any]:
    """One side's figures: medians over rounds, images/s over the peer's, who comes first, and its APs."""
    mine, peers = rounds[one.name], next(iter(rounds.values()))
    summary = comparison(one, mine, peers)
    if summary["failed"]:
        return summary
    ratios = [turn["images_per_second"] / peer["images_per_second"] for turn, peer in zip(mine, peers)]
    rate, peer_rate = (statistics.median(turn["images_per_second"] for turn in turns) for turns in (mine, peers))
    return summary | {
        "images_per_second": rate,
        "ratio": rate / peer_rate,
        "ratio_range": [min(ratios), max(ratios)],
        "command_seconds": statistics.median(turn["command_seconds"] for turn in mine),
        "own": {name: mine[0][name] for name in ("ap", "ap50")},
        "pycocotools": judged.get(one.name),
    }


def validation_table(case: Mapping[str, Any]) -> str:
    headers = [
        case["case"],
        "images/s",
        "x peer",
        "single rounds",
        "command s",
        "its AP, AP50",
        "pycocotools' AP, AP50",
    ]
    rows = []
    for one in case["contenders"]:
        if one["failed"]:
            rows.append([f"{one['name']}: {one['failed']:.120}", *[""] * (len(headers) - 1)])
            continue
        span = " to ".join(figure(ratio, 2) for ratio in one["ratio_range"])
        rates = [figure(one["images_per_second"], 1), figure(one["ratio"], 2), span, figure(one["command_seconds"], 2)]
        rows.append([one["name"], *rates, _aps(one["own"]), _aps(one["pycocotools"])])
    return table(headers, rows)


def _aps(values: Mapping[str, float] | None) -> str:
    return f"{values['ap']:.5f}, {values['ap50']:.5f}" if values else "-"
