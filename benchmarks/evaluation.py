"""One process: how many images per second the evaluator takes, and where its time goes.

    python -m benchmarks.evaluation --data data/shapes.yaml --imgsz 160 --weights newest

A fresh network and a trained one differ: what NMS and matching cost depends on how much is detected.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.product import built_trainer
from benchmarks.workers import ROOT
from models.yolo import fused
from utils.checkpoint import load_checkpoint
from utils.data.scan import open_dataset
from utils.train.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", default="data/shapes.yaml")
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--weights", default="", help="newest: the best.pt of the newest run on this data set")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    options = {"data": flags.data, "imgsz": flags.imgsz, "batch_size": flags.batch_size, "device": flags.device}
    weights = newest_weights(flags.data) if flags.weights == "newest" else flags.weights
    if weights is None:
        print(json.dumps({"skipped": f"no finished run on {Path(flags.data).name} in runs/"}))
        return
    options |= {"weights": str(weights)} if weights else {"cfg": flags.cfg}
    with built_trainer(**options, workers=0, epochs=1, noautoanchor=True) as trainer:
        print(json.dumps(_figures(trainer, flags.repeats) | {"weights": options.get("weights")}), flush=True)


def newest_weights(data: str) -> Path | None:
    """The newest best.pt in runs/ whose classes are those of the data set."""
    names = list(open_dataset(data, note=lambda line: None).names)
    for path in sorted(ROOT.glob("runs/**/best.pt"), key=lambda path: path.stat().st_mtime, reverse=True):
        if load_checkpoint(path)["names"] == names:
            return path
    return None


def _figures(trainer: Trainer, repeats: int) -> dict[str, Any]:
    evaluator, model = trainer.evaluator, trainer.step.average.model
    found = []
    evaluator(model, on_batch=lambda index, batch, detections: found.extend(len(one.scores) for one in detections))
    total = _median_seconds(lambda: evaluator(model), repeats)
    loading = _median_seconds(lambda: [None for _ in evaluator.stream], repeats)
    batches = list(evaluator.stream)
    network = _median_seconds(lambda: _forward(trainer, batches), repeats)
    images = len(evaluator.batches.store)
    return {
        "images_per_second": images / total,
        "seconds": {"total": total, "loading": loading, "network": network, "rest": total - loading - network},
        "images": images,
        "detections_per_image": sum(found) / images,
    }


@torch.no_grad()
def _forward(trainer: Trainer, batches: list[Any]) -> None:
    """What the evaluator does before decoding."""
    runtime = trainer.evaluator.runtime
    network = fused(trainer.step.average.model).to(runtime.device, memory_format=torch.channels_last)
    for batch in batches:
        with runtime.autocast():
            raw = network(runtime.network_input(batch.to(runtime.device).images))
        raw[0].flatten()[0].item()  # waits for the device


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
