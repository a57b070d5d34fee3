"""What report.html shows of a run: the content of `pages/report.html.j2`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from utils.clock import PARTS, TRAINING_PARTS, TimeSplit
from utils.config import DEFAULT_EPOCHS, TrainOptions
from utils.files import from_here
from utils.report.about import About
from utils.report.annotate import class_colour
from utils.report.charts import Chart, Source, chart
from utils.report.next_steps import next_steps
from utils.report.page_parts import (
    DASH,
    LOSS_UNIT,
    OF_DATA,
    PICTURES,
    SHARE_UNIT,
    SPEED_UNIT,
    Cell,
    Command,
    Figure,
    Grid,
    Part,
    Row,
    Status,
    cell_of,
    chart_data,
    csv_cell,
    hex_colour,
    percent,
    pictures_of,
    shown_seconds,
    text_of,
)
from utils.report.run_files import METRICS, RESULTS, RunFiles
from utils.report.settings import flags_in_use, hyp_settings, option_settings
from utils.report.timing import bottleneck

HEADLINE = {  # by their names in metrics.json: for people, and in results.csv
    "mAP_0.5:0.95": ("mAP@.5:.95", "metrics/mAP_0.5:0.95"),
    "mAP_0.5": ("mAP@.5", "metrics/mAP_0.5"),
    "precision": ("Precision", "metrics/precision"),
    "recall": ("Recall", "metrics/recall"),
    "f1": ("F1", ""),
}
_CLASS_COLUMNS = {
    "images": "Images",
    "labels": "Labels",
    "precision": "P",
    "recall": "R",
    "f1": "F1",
    "map50": "mAP@.5",
    "map50_95": "mAP@.5:.95",
    "best_f1": "best F1",
    "best_confidence": "at confidence",
}
BARRED = "map50_95"  # the column that is drawn as well
_PART_NAMES = {"data_wait": "waiting for data", "transfer": "to the device", "evaluate": "evaluation", "save": "saving"}
_NONFINITE_SHOWN = 100  # rows


def report_content(run: RunFiles) -> dict[str, Any]:
    time = time_of(run)
    return {
        "run": run,
        "title": text_of(run.name),
        "status": status_of(run),
        "facts": _facts(run, time),
        "figures": figures_of(run),
        "coco": _coco(run.metrics),
        "classes": _classes(run),
        "charts": _charts(run),
        "speed": chart("Speed", SPEED_UNIT, [Source("images/s", "images_per_s", run.timing)], file="timing"),
        "data": chart_data([run]),
        "pictures": pictures_of([run], list(PICTURES))[0],
        "of_evaluation": [file for file in PICTURES if file not in OF_DATA],
        "of_data": OF_DATA,
        "splits": _splits(run.about),
        "label_counts": _label_counts(run.about),
        "hyp": hyp_settings(run.hyp or {}),
        "options": option_settings(run.options or {}),
        "time": time,
        "parts_of_time": _parts(time),
        "verdict": bottleneck(time, flags_in_use(run.options or {})) if time and time.wall else "",
        "nonfinite": run.nonfinite[:_NONFINITE_SHOWN],
        "skipped": int(sum(filter(math.isfinite, run.results.numbers("train/skipped")))),
        "commands": _commands(run),
    }


def status_of(run: RunFiles) -> Status:
    epochs, planned = run.results.epochs, run.epochs_planned
    last = epochs[-1] if epochs else 0
    of = f"{last:,} of {planned:,} epochs" if planned else f"{last:,} epoch{'s' * (last != 1)}"
    if run.is_locked and not run.is_finished:
        return Status("busy", "Under way", f"{of} so far")
    if not run.is_finished and planned and last >= planned:
        return Status("stopped", "Not finished", f"{of}, but not the final evaluation")
    if not run.is_finished:
        return Status("stopped", "Not finished", f"{of}: it ended early, or is under way on another machine")
    if not epochs:
        return Status("done", "Finished", "how many is not known")
    return Status(
        "done",
        "Finished",
        f"{of}: it ended early" if planned and last < planned else f"{last:,} epoch{'s' * (last != 1)}",
    )


def _facts(run: RunFiles, time: TimeSplit | None) -> dict[str, str]:
    """What a reader wants to know first."""
    facts = {"Epochs": status_of(run).sentence}
    if run.best_row is not None:
        facts["Best epoch"] = f"{run.results.epochs[run.best_row]:,}"
    options, about = run.options or {}, run.about
    if about:
        size = f"{about.parameters:,} parameters, {about.gflops:.1f} GFLOPs"
        facts["Network"] = f"{text_of(about.network)} ({size})"
        facts["Data"] = f"{text_of(about.data)} ({len(about.names):,} class{'es' * (len(about.names) != 1)})"
    elif options:
        facts["Network"] = text_of(str(options.get("weights") or options.get("cfg") or DASH))
        facts["Data"] = text_of(str(options.get("data", DASH)))
    if options:
        facts["Input"] = f"{options.get('imgsz', DASH)} px, {options.get('batch_size', DASH)} images a batch"
    if time and time.wall:
        facts["Trained for"] = shown_seconds(time.wall)
    if about and about.starts:
        facts["Device"] = str(about.starts[-1].environment.get("device", DASH))
    return facts


# ------------------------------------------------------------------------------------------------------------- figures


def figures_of(run: RunFiles) -> list[Figure]:
    """The final ones, or those of the best epoch so far."""
    if run.metrics is not None:
        return [Figure(title, cell_of(run.metrics.get(key)), METRICS, key) for key, (title, _) in HEADLINE.items()]
    if run.best_row is None:
        return []
    row, epoch = run.results.rows[run.best_row], run.results.epochs[run.best_row]
    named = [(title, column) for title, column in HEADLINE.values() if column]
    return [Figure(title, csv_cell(row.get(column, "")), RESULTS, column, epoch) for title, column in named]


def _coco(metrics: Mapping[str, Any] | None) -> list[Figure]:
    """The twelve, the losses and the confidence that they belong to."""
    metrics = metrics or {}
    coco, losses = (metrics.get(name) if isinstance(metrics.get(name), dict) else {} for name in ("coco", "losses"))
    named = [Figure(str(name), cell_of(value), METRICS, f"coco/{name}") for name, value in coco.items()]
    named += [
        Figure(f"{name} loss", cell_of(value, "{:.4g}".format), METRICS, f"losses/{name}")
        for name, value in losses.items()
    ]
    others = [(title, key) for title, key in (("best confidence", "best_confidence"), ("fitness", "fitness"))]
    return [Figure(title, cell_of(metrics[key]), METRICS, key) for title, key in others if key in metrics] + named


def class_colours(run: RunFiles) -> dict[str, str]:
    """Of classes by name, as in all pictures."""
    names = run.about.names if run.about else [one["name"] for one in (run.metrics or {}).get("per_class", ())]
    return {name: hex_colour(class_colour(index)) for index, name in enumerate(names)}


def _classes(run: RunFiles) -> Grid | None:
    per_class = (run.metrics or {}).get("per_class")
    if not per_class:
        return None
    colours = class_colours(run)
    rows = [Row(one["name"], _class_cells(one), colours.get(one["name"], "")) for one in per_class]
    return Grid("class", _CLASS_COLUMNS, tuple(rows))


def _class_cells(one: Mapping[str, Any]) -> tuple[Cell, ...]:
    cells = []
    for key in _CLASS_COLUMNS:
        cell = cell_of(one.get(key), "{:,.0f}".format if key in ("images", "labels") else "{:.3f}".format)
        cells.append(replace(cell, bar=percent(one[key])) if key == BARRED and cell.full else cell)
    return tuple(cells)


def _charts(run: RunFiles) -> list[Chart]:
    return [
        chart(
            title,
            unit,
            [
                Source(label, column, run.results, run.best_row, 0, colour)
                for colour, (label, column) in enumerate(lines)
            ],
            from_zero=from_zero,
        )
        for title, unit, lines, from_zero in _CHARTS
    ]


_MAPS = (("mAP@.5", "metrics/mAP_0.5"), ("mAP@.5:.95", "metrics/mAP_0.5:0.95"))
_RATES = (("lr0 norms", "x/lr0"), ("lr1 weights", "x/lr1"), ("lr2 biases", "x/lr2"))
_CHARTS = (
    ("Mean average precision", SHARE_UNIT, _MAPS, True),
    ("Precision and recall", SHARE_UNIT, (("precision", "metrics/precision"), ("recall", "metrics/recall")), True),
    ("Learning rate", "at the end of each epoch", _RATES, True),
    ("Box loss", LOSS_UNIT, (("train", "train/box_loss"), ("val", "val/box_loss")), False),
    ("Objectness loss", LOSS_UNIT, (("train", "train/obj_loss"), ("val", "val/obj_loss")), False),
    ("Class loss", LOSS_UNIT, (("train", "train/cls_loss"), ("val", "val/cls_loss")), False),
)


# ---------------------------------------------------------------------------------------------------------------- data


def _splits(about: About | None) -> Grid | None:
    if about is None:
        return None
    columns = {
        "images": "Images",
        "background": "without boxes",
        "skipped": "unusable",
        "labels": "Labels",
    }
    rows = [
        Row(name, tuple(cell_of(getattr(split, key), "{:,.0f}".format) for key in columns))
        for name, split in about.splits.items()
    ]
    return Grid("split", columns, tuple(rows))


def _label_counts(about: About | None) -> Grid | None:
    if about is None:
        return None
    counts = {name: split.labels_of_class for name, split in about.splits.items()}
    most = max((count for of_split in counts.values() for count in of_split), default=0)
    rows = [
        Row(
            name,
            tuple(_count_cell(of_split, index, most) for of_split in counts.values()),
            hex_colour(class_colour(index)),
        )
        for index, name in enumerate(about.names)
    ]
    return Grid("class", {name: f"{name} labels" for name in counts}, tuple(rows))


def _count_cell(counts: Sequence[int], index: int, most: int) -> Cell:
    if index >= len(counts):
        return Cell()
    return replace(cell_of(counts[index], "{:,.0f}".format), bar=percent(counts[index] / max(most, 1)))


# ---------------------------------------------------------------------------------------------------------------- time


def time_of(run: RunFiles) -> TimeSplit | None:
    """Of all epochs; None where nothing is known of them."""
    columns = [f"{part}_s" for part in PARTS]
    if not run.timing.rows or not {"epoch_s", "images_per_s", *columns} <= set(run.timing.columns):
        return None
    sums = {column: _sum(run.timing.numbers(column)) for column in ("epoch_s", *columns)}
    training = zip(*(run.timing.numbers(f"{part}_s") for part in TRAINING_PARTS))
    images = [speed * sum(parts) for speed, parts in zip(run.timing.numbers("images_per_s"), training)]
    return TimeSplit(
        wall=sums["epoch_s"], parts={part: sums[f"{part}_s"] for part in PARTS}, images=round(_sum(images))
    )


def _sum(values: Iterable[float]) -> float:
    return math.fsum(filter(math.isfinite, values))


def _parts(time: TimeSplit | None) -> list[Part]:
    if time is None or not time.wall:
        return []
    parts, start = [], 0.0
    whole = sum(time.parts.values()) + time.rest
    for key, seconds in {**time.parts, "rest": time.rest}.items():
        share = 100 * seconds / max(whole, 1e-9)
        parts.append(Part(key, _PART_NAMES.get(key, key), seconds, share, start))
        start += share
    return parts


# ------------------------------------------------------------------------------------------------------------ commands


def _commands(run: RunFiles) -> list[Command]:
    """What can be typed next, in the folder of the trainer."""
    folder = from_here(run.folder.resolve())
    best, last = (folder / "weights" / name for name in ("best.pt", "last.pt"))
    planned, options = run.epochs_planned or DEFAULT_EPOCHS, run.options or {}
    patience, nproc = (
        value if isinstance(value := options.get(name), int) else getattr(TrainOptions, name)
        for name in ("patience", "nproc")
    )
    trained = run.results.epochs[-1] if run.results.epochs else planned
    steps = next_steps(folder, epochs=planned, trained=trained, patience=patience, nproc=nproc)
    commands = []
    if last.is_file() and run.is_finished:
        commands.append(Command("Train longer", steps["train on"]))
    elif last.is_file():
        commands.append(Command("Resume", f"python train.py --resume {shlex.quote(str(last))}"))
    if best.is_file():
        commands += [
            Command("Evaluate", steps["evaluate"]),
            Command("Detect", steps["detect"]),
            Command("Use in Python", f"from models.yolo import load; load({text_of(best)!r}).detect('photo.jpg')"),
        ]
    commands.append(Command("Make this report anew", f"python -m utils.report.html {shlex.quote(str(folder))}"))
    return [Command(one.title, text_of(one.text)) for one in commands]
