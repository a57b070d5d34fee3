"""What a run is, and what came of it, as texts in Markdown: tables for whoever cannot look into its folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from utils.clock import PARTS, TimeSplit
from utils.config import TrainOptions
from utils.hyp import Hyperparameters, plain_values
from utils.report.about import About, SplitSummary
from utils.report.console import labelled
from utils.report.settings import Setting, hyp_settings, option_settings
from utils.structures import Metrics

_MOST_CLASSES = 100  # of a table


def table(titles: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """Of texts, which are shown as they are, and counts."""
    texts = ([cell if isinstance(cell, str) else _count(cell) for cell in row] for row in (titles, *rows))
    first, *others = [f"| {' | '.join(map(_plain, line))} |" for line in texts]
    return "\n".join([first, f"|{' --- |' * len(titles)}", *others])


def options_text(options: TrainOptions) -> str:
    """Every option with its meaning; those that are not as by default come first, with what that is."""
    return _settings("option", option_settings(asdict(options)))


def hyp_text(hyp: Hyperparameters) -> str:
    """Every hyperparameter likewise."""
    return _settings("hyperparameter", hyp_settings(plain_values(hyp)))


def _settings(what: str, settings: Iterable[Setting]) -> str:
    rows = [
        [one.name, one.value, one.default if one.differs else "", one.meaning]
        for one in sorted(settings, key=lambda one: not one.differs)
    ]
    return table([what, "value", "default, where it differs", "meaning"], rows)


def data_text(about: About) -> str:
    """What each split holds, how often each class is labelled, and what was found to be wrong."""
    splits = about.splits
    titles = ["split", "images", "without labels", "unusable", "labels"]
    counts = [[name, one.images, one.background, one.skipped, one.labels] for name, one in splits.items()]
    classes = [[name, *counts] for name, *counts in zip(about.names, *(one.labels_of_class for one in splits.values()))]
    classes.sort(key=lambda row: -row[1])
    shown = f" (the {_MOST_CLASSES} with most labels of {len(classes):,})" if len(classes) > _MOST_CLASSES else ""
    parts = [
        f"Data set `{about.data}`",
        table(titles, counts),
        f"Labels per class{shown}",
        table(["class", *splits], classes[:_MOST_CLASSES]),
        _findings(splits),
    ]
    return "\n\n".join(parts)


def _findings(splits: Mapping[str, SplitSummary]) -> str:
    rows = [
        [one.severity, split, one.count, one.problem, one.where]
        for split, summary in splits.items()
        for one in summary.findings
    ]
    if not rows:
        return "Nothing was found to be wrong with it."
    return "Findings\n\n" + table(["severity", "split", "times", "the first of them", "where"], rows)


def environment_text(about: About) -> str:
    """The network, what it is trained on this time, and when and how the run was started."""
    network = {"network": about.network, "parameters": f"{about.parameters:,}", "GFLOPs": f"{about.gflops:.1f}"}
    rows = (network | about.starts[-1].environment).items()
    starts = [[one.time, one.first_epoch, one.command] for one in about.starts]
    return table(["", ""], rows) + "\n\nStarts\n\n" + table(["time", "first epoch", "command"], starts)


def time_text(timing: Mapping[str, float]) -> str:
    """Seconds by column of timing.csv, and what share of all they are."""
    time = TimeSplit(wall=timing["epoch_s"], parts={part: timing[f"{part}_s"] for part in PARTS}, images=0)
    parts = {**time.parts, "rest": time.rest, "all": time.wall}
    rows = [
        [part.replace("_", " "), f"{seconds:.1f}", f"{seconds / max(time.wall, 1e-9):.1%}"]
        for part, seconds in parts.items()
    ]
    return table(["part", "seconds", "share"], rows)


def classes_text(metrics: Metrics) -> str:
    """Figures of all classes together and of each that has labels."""
    rows = [
        [
            name,
            one.images,
            one.labels,
            *(f"{figure:.3f}" for figure in (one.precision, one.recall, one.f1, one.map50, one.map50_95)),
        ]
        for name, one in [("all", metrics), *((one.name, one) for one in labelled(metrics))]
    ]
    return table(["class", "images", "labels", "precision", "recall", "F1", "mAP@.5", "mAP@.5:.95"], rows)


def _count(number: int) -> str:
    return f"{number:,}" if number >= 10_000 else str(number)


def _plain(cell: str) -> str:
    """Markdown that shows a text as it is, in one line."""
    cell = " ".join(cell.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]>#|~])", r"\\\1", cell)
