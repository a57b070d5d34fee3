"""report.html: a run on one page that opens anywhere, and several runs side by side.

`python -m utils.report.html RUN [RUN ...]`. All that a page shows comes from the files in the folders of the runs, and
all of it is in the page: it asks the network for nothing, and its policy forbids that it could.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import statistics
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from utils.clock import PARTS, TRAINING_PARTS, TimeSplit
from utils.config import DEFAULT_EPOCHS, FlagParser, TrainOptions, run_command, spelling
from utils.files import from_here, write_text
from utils.hyp import GENES, Hyperparameters, plain_values
from utils.report.about import About
from utils.report.annotate import class_colour
from utils.report.charts import Chart, Source, chart
from utils.report.embedded import EmbeddedPicture, embedded
from utils.report.run_files import METRICS, RESULTS, RunFiles, number_of, read_run
from utils.report.timing import bottleneck
from utils.structures import UserError

REPORT_FILE, COMPARISON_FILE = "report.html", "comparison.html"
_PROGRAM = "python -m utils.report.html"
_PAGES = Path(__file__).resolve().parent / "pages"
_PICTURE_BYTES = 1_950_000  # of all together, so that a page stays below 3 MB
_LEAST_PICTURE_BYTES = 40_000  # of each, however many there are
_NONFINITE_SHOWN = 100  # rows
_DASH = "–"
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # HTML has no such characters

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
_BARRED = "map50_95"  # the column that is drawn as well
_PICTURES = {  # file: title, and what it shows
    "val_batch0_labels.jpg": ("Labels", "The first images of the validation split, as they are labelled."),
    "val_batch0_pred.jpg": ("Predictions", "The same images: what the network finds, with scores."),
    "worst_images.jpg": ("Worst misses", "The images with most mistakes: what was missed, and false alarms."),
    "confusion_matrix.png": ("Confusion matrix", "Which class was taken for which, and what was missed."),
    "PR_curve.png": ("Precision over recall", "At IoU .5, for each class and their mean."),
    "F1_curve.png": ("F1 over confidence", "Its peak is the confidence that suits precision and recall alike."),
    "labels.jpg": ("Labels of the training split", "Counts by class, shapes, places and sizes of boxes."),
    "train_batch0.jpg": ("A training batch", "As the network saw it, augmented."),
}
_NOT_COMPARED = ("labels.jpg", "train_batch0.jpg")  # they tell of the data
_PART_NAMES = {"data_wait": "waiting for data", "transfer": "to the device", "evaluate": "evaluation", "save": "saving"}


# ------------------------------------------------------------------------------------------------ what a page shows


@dataclass(frozen=True)
class Cell:
    """A figure: rounded as it is shown, and in full as its file has it."""

    shown: str = _DASH
    full: str = ""
    bar: float | None = None  # percent
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]
    colour: str = ""
    link: str = ""


@dataclass(frozen=True)
class Grid:
    """A table that can be sorted."""

    what: str  # a row is one of these
    columns: Mapping[str, str]  # titles by key
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Figure:
    """A headline figure, and where it is found."""

    title: str
    cell: Cell
    file: str
    key: str
    epoch: int | None = None  # of results.csv


@dataclass(frozen=True)
class Status:
    kind: str  # done, busy or stopped
    word: str
    sentence: str


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    default: str
    differs: bool
    meaning: str


@dataclass(frozen=True)
class Picture:
    file: str
    title: str
    caption: str
    image: EmbeddedPicture | None  # None: damaged


@dataclass(frozen=True)
class Part:
    """Of the time of a run."""

    key: str
    name: str
    seconds: float
    percent: float
    start: float  # percent, in a bar


@dataclass(frozen=True)
class Command:
    title: str
    text: str


# --------------------------------------------------------------------------------------------------- pages and files


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of a run, from what lies there. Raises UserError where that is no run."""
    return _written(folder / REPORT_FILE, "report.html.j2", **_report(read_run(folder)))


def compare(folders: Sequence[Path], path: Path) -> Path:
    """Write a page that shows runs side by side. Raises UserError where one of the folders is no run."""
    return _written(path, "comparison.html.j2", **_comparison([read_run(folder) for folder in folders]))


def _written(path: Path, template: str, **content: Any) -> Path:
    page = _NO_TEXT.sub("\ufffd", _rendered(template, **content))
    try:
        write_text(path, page, lasting=False)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{_text_of(path)}: cannot be written: {error.strerror}") from None
    return path


def _rendered(template: str, **content: Any) -> str:
    style, script = ((_PAGES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = {"default-src": "'none'", "img-src": "data:", "style-src": _hash(style), "script-src": _hash(script)}
    policy |= {"base-uri": "'none'", "form-action": "'none'"}
    page = _templates().get_template(template)
    return page.render(**content, style=style, script=script, policy="; ".join(map(" ".join, policy.items())))


@lru_cache(1)
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {}  # columns in their own order
    environment.filters |= {"flags": _with_flags, "path": _with_breaks}
    environment.globals.update(dash=_DASH, shown_seconds=_shown_seconds, text_of=_text_of)
    return environment


def _with_flags(text: str) -> Any:
    """Text of ours as HTML, in which flags look as they are typed and stay on their line."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"--[a-z][a-z0-9-]*", r"<code>\g<0></code>", str(markupsafe.escape(text))))


def _with_breaks(text: str) -> Any:
    """Text as HTML that breaks after a slash, if it must."""
    import markupsafe

    return markupsafe.Markup(str(markupsafe.escape(text)).replace("/", "/<wbr>"))


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _text_of(path: Path | str) -> str:
    """A path as text, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------- one run


def _report(run: RunFiles) -> dict[str, Any]:
    time = _time(run)
    return {
        "run": run,
        "title": _text_of(run.name),
        "status": _status(run),
        "facts": _facts(run, time),
        "figures": _figures(run),
        "coco": _coco(run.metrics),
        "classes": _classes(run),
        "charts": _charts([run]),
        "speed": chart("Speed", _SPEED, [Source("images/s", "images_per_s", run.timing)], file="timing"),
        "data": _chart_data([run]),
        "pictures": _pictures([run], list(_PICTURES))[0],
        "splits": _splits(run.about),
        "label_counts": _label_counts(run.about),
        "hyp": _hyp_settings(run.hyp),
        "options": _option_settings(run.options),
        "time": time,
        "parts_of_time": _parts(time),
        "verdict": bottleneck(time, _flags_in_use(run)) if time and time.wall else "",
        "nonfinite": run.nonfinite[:_NONFINITE_SHOWN],
        "skipped": int(sum(filter(math.isfinite, run.results.numbers("train/skipped")))),
        "commands": _commands(run),
    }


def _status(run: RunFiles) -> Status:
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
    facts = {"Epochs": _status(run).sentence}
    if run.best_row is not None:
        facts["Best epoch"] = f"{run.results.epochs[run.best_row]:,}"
    options, about = run.options or {}, run.about
    if about:
        size = f"{about.parameters:,} parameters, {about.gflops:.1f} GFLOPs"
        facts["Network"] = f"{_text_of(about.network)} ({size})"
        facts["Data"] = f"{_text_of(about.data)} ({len(about.names):,} class{'es' * (len(about.names) != 1)})"
    elif options:
        facts["Network"] = _text_of(str(options.get("weights") or options.get("cfg") or _DASH))
        facts["Data"] = _text_of(str(options.get("data", _DASH)))
    if options:
        facts["Input"] = f"{options.get('imgsz', _DASH)} px, {options.get('batch_size', _DASH)} images a batch"
    if time and time.wall:
        facts["Trained for"] = _shown_seconds(time.wall)
    if about and about.starts:
        facts["Device"] = str(about.starts[-1].environment.get("device", _DASH))
    return facts


def _cell(value: Any, shown: Callable[[float], str] = "{:.3f}".format) -> Cell:
    """Of a value of a JSON file."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _csv_cell(str(value), shown) if is_number else Cell()


def _csv_cell(cell: str, shown: Callable[[float], str] = "{:.3f}".format) -> Cell:
    number = number_of(cell)
    return Cell(shown(number), cell) if math.isfinite(number) else Cell(cell or _DASH, cell)


def _figures(run: RunFiles) -> list[Figure]:
    """The final ones, or those of the best epoch so far."""
    if run.metrics is not None:
        return [Figure(title, _cell(run.metrics.get(key)), METRICS, key) for key, (title, _) in HEADLINE.items()]
    if run.best_row is None:
        return []
    row, epoch = run.results.rows[run.best_row], run.results.epochs[run.best_row]
    named = [(title, column) for title, column in HEADLINE.values() if column]
    return [Figure(title, _csv_cell(row.get(column, "")), RESULTS, column, epoch) for title, column in named]


def _coco(metrics: Mapping[str, Any] | None) -> list[Figure]:
    """The twelve, the losses and the confidence that they belong to."""
    metrics = metrics or {}
    coco, losses = (metrics.get(name) if isinstance(metrics.get(name), dict) else {} for name in ("coco", "losses"))
    named = [Figure(str(name), _cell(value), METRICS, f"coco/{name}") for name, value in coco.items()]
    named += [
        Figure(f"{name} loss", _cell(value, "{:.4g}".format), METRICS, f"losses/{name}")
        for name, value in losses.items()
    ]
    others = [(title, key) for title, key in (("best confidence", "best_confidence"), ("fitness", "fitness"))]
    return [Figure(title, _cell(metrics[key]), METRICS, key) for title, key in others if key in metrics] + named


def _colours(run: RunFiles) -> dict[str, str]:
    """Of classes by name, as in all pictures."""
    names = run.about.names if run.about else [one["name"] for one in (run.metrics or {}).get("per_class", ())]
    return {name: _hex(class_colour(index)) for index, name in enumerate(names)}


def _hex(colour: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * share):02x}" for share in colour)


def _classes(run: RunFiles) -> Grid | None:
    per_class = (run.metrics or {}).get("per_class")
    if not per_class:
        return None
    colours = _colours(run)
    rows = [Row(one["name"], _class_cells(one), colours.get(one["name"], "")) for one in per_class]
    return Grid("class", _CLASS_COLUMNS, tuple(rows))


def _class_cells(one: Mapping[str, Any]) -> tuple[Cell, ...]:
    cells = []
    for key in _CLASS_COLUMNS:
        cell = _cell(one.get(key), "{:,.0f}".format if key in ("images", "labels") else "{:.3f}".format)
        cells.append(replace(cell, bar=_percent(one[key])) if key == _BARRED and cell.full else cell)
    return tuple(cells)


def _percent(share: float) -> float:
    return round(100 * min(max(0.0, share), 1.0), 1)  # of NaN 0


# ---------------------------------------------------------------------------------------------------------- curves


def _charts(runs: Sequence[RunFiles], names: Sequence[str] = ("",)) -> list[Chart]:
    """Of one run its figures beside one another; of several, each run a line."""
    if len(runs) > 1:
        curves = [_overlaid(title, unit, column, runs, names) for title, unit, column in _OVERLAID]
        return [*curves, _overlaid("Speed", _SPEED, "images_per_s", runs, names, file="timing")]
    (run,) = runs
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


def _overlaid(
    title: str, unit: str, column: str, runs: Sequence[RunFiles], names: Sequence[str], file: str = "results"
) -> Chart:
    sources = [
        Source(name, column, getattr(run, file), run.best_row if file == "results" else None, index, index)
        for index, (run, name) in enumerate(zip(runs, names))
    ]
    return chart(title, unit, sources, from_zero=column.startswith("metrics/"), file=file)


_LOSS_UNIT = "mean over batches, times its gain"
_SPEED = "training images per second"
_SHARE = "a share, 0 to 1, on validation images"
_RATES = (("lr0 norms", "x/lr0"), ("lr1 weights", "x/lr1"), ("lr2 biases", "x/lr2"))
_CHARTS = (
    ("Mean average precision", _SHARE, (("mAP@.5", "metrics/mAP_0.5"), ("mAP@.5:.95", "metrics/mAP_0.5:0.95")), True),
    ("Precision and recall", _SHARE, (("precision", "metrics/precision"), ("recall", "metrics/recall")), True),
    ("Learning rate", "at the end of each epoch", _RATES, True),
    ("Box loss", _LOSS_UNIT, (("train", "train/box_loss"), ("val", "val/box_loss")), False),
    ("Objectness loss", _LOSS_UNIT, (("train", "train/obj_loss"), ("val", "val/obj_loss")), False),
    ("Class loss", _LOSS_UNIT, (("train", "train/cls_loss"), ("val", "val/cls_loss")), False),
)
_OVERLAID = (
    ("mAP@.5:.95", _SHARE, "metrics/mAP_0.5:0.95"),
    ("mAP@.5", _SHARE, "metrics/mAP_0.5"),
    ("Precision", _SHARE, "metrics/precision"),
    ("Recall", _SHARE, "metrics/recall"),
    *(
        (f"{title} loss, {split}", _LOSS_UNIT, f"{split}/{key}_loss")
        for split in ("val", "train")
        for title, key in (("Box", "box"), ("Objectness", "obj"), ("Class", "cls"))
    ),
    ("Learning rate", "of weights, at the end of each epoch", "x/lr1"),
)


def _chart_data(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """What a reader may point at, by run: epochs, and cells by column."""
    return [
        {
            "best": None if run.best_row is None else run.results.epochs[run.best_row],
            "tables": {
                name: {"epochs": table.epochs, "columns": {column: table.cells(column) for column in table.columns}}
                for name, table in (("results", run.results), ("timing", run.timing))
            },
        }
        for run in runs
    ]


# -------------------------------------------------------------------------------------------------------- pictures


def _pictures(runs: Sequence[RunFiles], files: Sequence[str]) -> list[dict[str, Picture]]:
    """Those that are there, by file, for each run."""
    sizes = [path.stat().st_size for run in runs for path in map(run.folder.joinpath, files) if path.is_file()]
    most_bytes = max(_fair_share(sizes, _PICTURE_BYTES), _LEAST_PICTURE_BYTES)
    return [
        {
            file: Picture(file, *_PICTURES[file], embedded(run.folder / file, most_bytes=most_bytes))
            for file in files
            if (run.folder / file).is_file()
        }
        for run in runs
    ]


def _fair_share(sizes: Sequence[int], total: int) -> int:
    """The most that each may have of `total`, when what the small ones leave goes to the large ones."""
    for place, size in enumerate(sorted(sizes)):
        share = total // (len(sizes) - place)
        if size > share:
            return share
        total -= size
    return max(sizes, default=0)


# ------------------------------------------------------------------------------------------------------------ data


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
        Row(name, tuple(_cell(getattr(split, key), "{:,.0f}".format) for key in columns))
        for name, split in about.splits.items()
    ]
    return Grid("split", columns, tuple(rows))


def _label_counts(about: About | None) -> Grid | None:
    if about is None:
        return None
    counts = {name: split.labels_of_class for name, split in about.splits.items()}
    most = max((count for of_split in counts.values() for count in of_split), default=0)
    rows = [
        Row(name, tuple(_count_cell(of_split, index, most) for of_split in counts.values()), _hex(class_colour(index)))
        for index, name in enumerate(about.names)
    ]
    return Grid("class", {name: f"{name} labels" for name in counts}, tuple(rows))


def _count_cell(counts: Sequence[int], index: int, most: int) -> Cell:
    if index >= len(counts):
        return Cell()
    return replace(_cell(counts[index], "{:,.0f}".format), bar=_percent(counts[index] / max(most, 1)))


# -------------------------------------------------------------------------------------------------------- settings


def _hyp_settings(hyp: Mapping[str, Any] | None) -> list[Setting]:
    defaults = plain_values(Hyperparameters())
    meanings = {name: gene.meaning for name, gene in GENES.items()}
    return [
        _setting(name, value, defaults.get(name, MISSING), meanings.get(name, ""))
        for name, value in (hyp or {}).items()
    ]


def _option_settings(options: Mapping[str, Any] | None) -> list[Setting]:
    defaults = {**asdict(TrainOptions()), "epochs": DEFAULT_EPOCHS, "imgsz": 640}
    meanings = {item.name: item.metadata["meaning"] for item in fields(TrainOptions)}
    return [
        replace(_setting(name, value, defaults.get(name, MISSING), meanings.get(name, "")), name=spelling(name))
        for name, value in (options or {}).items()
    ]


def _setting(name: str, value: Any, default: Any, meaning: str) -> Setting:
    if default is MISSING:
        return Setting(name, _plain(value), "unknown", True, "not known to this version")
    return Setting(name, _plain(value), _plain(default), _plain(value) != _plain(default), meaning)


def _plain(value: Any) -> str:
    """A value of a YAML file for people; what is empty in one way or another is a dash."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or _DASH  # str knows lists that hold themselves
    return _DASH if value in (None, "") else str(value)


# ------------------------------------------------------------------------------------------------------------ time


def _time(run: RunFiles) -> TimeSplit | None:
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
        percent = 100 * seconds / max(whole, 1e-9)
        parts.append(Part(key, _PART_NAMES.get(key, key), seconds, percent, start))
        start += percent
    return parts


def _shown_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _flags_in_use(run: RunFiles) -> list[str]:
    return [spelling(name) for name, value in (run.options or {}).items() if value is True]


# -------------------------------------------------------------------------------------------------------- commands


def _commands(run: RunFiles) -> list[Command]:
    """What can be typed next, in the folder of the trainer."""
    folder = from_here(run.folder.resolve())
    best, last = (folder / "weights" / name for name in ("best.pt", "last.pt"))
    quoted = {path: shlex.quote(_text_of(path)) for path in (folder, best, last)}
    commands = []
    if last.is_file():
        more = f" --epochs {2 * (run.epochs_planned or DEFAULT_EPOCHS)}" if run.is_finished else ""
        commands.append(Command("Train longer" if more else "Resume", f"python train.py --resume {quoted[last]}{more}"))
    if best.is_file():
        commands += [
            Command("Evaluate", f"python val.py --weights {quoted[best]}"),
            Command("Detect", f"python detect.py --weights {quoted[best]} --source 'photos/*.jpg'"),
            Command("Use in Python", f"from models.yolo import load; load({_text_of(best)!r}).detect('photo.jpg')"),
        ]
    return [*commands, Command("Make this report anew", f"{_PROGRAM} {quoted[folder]}")]


# ---------------------------------------------------------------------------------------------------- several runs


def _comparison(runs: Sequence[RunFiles]) -> dict[str, Any]:
    names = _told_apart(runs)
    kinds = [file for file in _PICTURES if file not in _NOT_COMPARED]
    pictures = _pictures(runs, kinds)
    return {
        "title": f"{len(runs)} runs",
        "names": names,
        "runs": runs,
        "overview": _overview(runs, names),
        "charts": _charts(runs, names),
        "data": _chart_data(runs),
        "classes": _classes_compared(runs, names),
        "hyp": _differing([_hyp_settings(run.hyp) for run in runs]),
        "options": _differing([_option_settings(run.options) for run in runs]),
        "pictures": {
            file: (_PICTURES[file][0], [one.get(file) for one in pictures])
            for file in kinds
            if any(file in one for one in pictures)
        },
    }


def _told_apart(runs: Sequence[RunFiles]) -> list[str]:
    """Names of folders, with as many folders above them as it takes."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [_text_of("/".join(path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {name}" for index, name in enumerate(names)]


def _overview(runs: Sequence[RunFiles], names: Sequence[str]) -> Grid:
    columns = {
        "epoch": "Best epoch",
        **{key: title for key, (title, _) in HEADLINE.items()},
        "images_per_s": "Images/s",
        "wall": "Time",
        "parameters": "Parameters",
        "status": "Status",
    }
    rows = [_overview_cells(run) for run in runs]
    for key in (*HEADLINE, "images_per_s"):
        _mark_best(rows, key)
    return Grid(
        "run",
        columns,
        tuple(Row(name, tuple(cells[key] for key in columns)) for name, cells in zip(names, rows)),
    )


def _overview_cells(run: RunFiles) -> dict[str, Cell]:
    time, about, best = _time(run), run.about, run.best_row
    figures = {figure.title: figure.cell for figure in _figures(run)}
    speeds = [speed for speed in run.timing.numbers("images_per_s") if math.isfinite(speed)]
    status = _status(run)
    return {
        "epoch": Cell() if best is None else _epoch_cell(run.results.epochs[best], run.results.epochs[-1]),
        **{key: figures.get(title, Cell()) for key, (title, _) in HEADLINE.items()},
        "images_per_s": _cell(statistics.median(speeds), "{:.1f}".format) if speeds else Cell(),
        "wall": Cell(_shown_seconds(time.wall), f"{time.wall:.6g}") if time else Cell(),
        "parameters": _cell(about.parameters / 1e6, "{:.2f} M".format) if about else Cell(),
        "status": Cell(status.word, status.word),
    }


def _epoch_cell(epoch: int, last: int) -> Cell:
    return Cell(f"{epoch:,} of {last:,}", str(epoch))


def _mark_best(rows: Sequence[dict[str, Cell]], key: str) -> None:
    """The greatest of a column, and what equals it to the digits of results.csv, where there is more than one."""
    values = [float(f"{number_of(row[key].full):.6g}") for row in rows]
    known = [value for value in values if math.isfinite(value)]
    for row, value in zip(rows, values):
        if len(known) > 1 and value == max(known):
            row[key] = replace(row[key], is_best=True)


def _classes_compared(runs: Sequence[RunFiles], names: Sequence[str]) -> Grid | None:
    """The mAP@.5:.95 of each class, a run a column."""
    figures = [{one["name"]: one.get(_BARRED) for one in (run.metrics or {}).get("per_class", ())} for run in runs]
    colours: dict[str, str] = {}
    for run in reversed(runs):
        colours |= _colours(run)
    classes = dict.fromkeys(name for of_run in figures for name in of_run)
    if not classes:
        return None
    columns = {str(index): name for index, name in enumerate(names)}
    rows = []
    for name in classes:
        cells = {key: _cell(of_run.get(name)) for key, of_run in zip(columns, figures)}
        rows.append(Row(name, tuple(_best_marked(list(cells.values()))), colours.get(name, "")))
    return Grid("class", columns, tuple(rows))


def _best_marked(cells: Sequence[Cell]) -> list[Cell]:
    row = [{"": cell} for cell in cells]
    _mark_best(row, "")
    return [one[""] for one in row]


def _differing(settings: Sequence[Sequence[Setting]]) -> list[tuple[str, str, list[Setting | None]]]:
    """Name, default and the setting of each run, of those that are not the same in all."""
    by_name = [{one.name: one for one in of_run} for of_run in settings]
    names = dict.fromkeys(name for of_run in by_name for name in of_run)
    rows = [(name, [of_run.get(name) for of_run in by_name]) for name in names]
    return [
        (name, next(one.default for one in of_runs if one), of_runs)
        for name, of_runs in rows
        if len({one.value if one else None for one in of_runs}) > 1
    ]


# -------------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class PageOptions:
    """Make report.html of a run anew, or comparison.html of several, from what is in their folders."""

    runs: tuple[Path, ...]
    output: Path | None = None


def main() -> int:
    return run_command(_PROGRAM, lambda: print(_text_of(make_page(_parsed(sys.argv[1:])))))


def _parsed(argv: Sequence[str]) -> PageOptions:
    parser = FlagParser(prog=_PROGRAM, description=PageOptions.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/train/exp")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: RUN/{REPORT_FILE}, or {COMPARISON_FILE} beside the runs"
    )
    given = parser.parse_args(argv)
    return PageOptions(tuple(given.runs), given.output)


def make_page(options: PageOptions) -> Path:
    """The page that was written. Raises UserError for what a user can mend."""
    runs = list({folder.resolve(): folder for folder in options.runs}.values())
    if len(runs) > 1:
        beside = Path(os.path.commonpath([folder.resolve().parent for folder in runs]))
        return compare(runs, options.output or from_here(beside / COMPARISON_FILE))
    run = read_run(runs[0])
    return _written(options.output or runs[0] / REPORT_FILE, "report.html.j2", **_report(run))


if __name__ == "__main__":
    sys.exit(main())
