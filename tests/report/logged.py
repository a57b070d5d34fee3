"""A run that loggers can be told of, and epochs of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from utils.clock import PARTS, TimeSplit
from utils.config import TrainOptions
from utils.hyp import Hyperparameters
from utils.report.about import About, FoundKind, SplitSummary, this_start
from utils.report.logger import LoggedEpoch, LoggedRun
from utils.report.loggers import result_row
from utils.report.timing import timing_row
from utils.structures import CocoFigures, LossMeans, Metrics

LOSSES = LossMeans(box=0.0812345678, objectness=0.03, classification=1e-7)
COCO = CocoFigures(**{name: place / 100 for place, name in enumerate(CocoFigures.__annotations__)})
METRICS = Metrics(
    precision=0.5,
    recall=0.25,
    f1=1 / 3,
    map50=0.75,
    map50_95=0.4,
    images=1,
    labels=1,
    best_confidence=0.3,
    per_class=(),
    coco=COCO,
    losses=LOSSES,
)
NAMES = ("größe", "red")


def about(*, first_epoch: int = 1) -> About:
    finding = FoundKind(severity="medium", problem="box 2 of 3 is empty: dropped", where="labels/7.txt:2", count=3)
    split = SplitSummary(images=8, background=1, skipped=0, labels=12, labels_of_class=(9, 3), findings=(finding,))
    return About(
        network="yolov5n.yaml",
        parameters=1_234_567,
        gflops=4.2,
        data="data/shapes.yaml",
        names=NAMES,
        splits={"train": split, "val": split},
        starts=(this_start(first_epoch=first_epoch, device="cpu, fp32", ranks=1),),
    )


def logged_run(
    folder: Path,
    *,
    start_epoch: int = 0,
    model: nn.Module | None = None,
    note=print,
    wandb_id: str | None = None,
    **options,
) -> LoggedRun:
    return LoggedRun(
        folder=folder,
        options=TrainOptions(**{"epochs": 3, "imgsz": 64, "batch_size": 4, **options}),
        hyp=Hyperparameters(),
        about=about(first_epoch=start_epoch + 1),
        model=model or nn.Conv2d(3, 4, 3),
        start_epoch=start_epoch,
        note=note,
        wandb_id=wandb_id,
    )


def logged_epoch(epoch: int, metrics: Metrics | None = None, **changes) -> LoggedEpoch:
    """`epoch` counts from 0."""
    times = TimeSplit(wall=3.0 + epoch, parts=dict.fromkeys(PARTS, 0.1), images=8)
    values = {
        "number": epoch + 1,
        "results": result_row(epoch, LOSSES, metrics, [0.1 * epoch] * 3),
        "timing": timing_row(epoch, times),
        "metrics": metrics,
    }
    return LoggedEpoch(**{**values, **changes})
