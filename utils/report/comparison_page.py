"""What comparison.html shows of several runs: the content of `pages/comparison.html.j2`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from utils.report.charts import Chart, Source, chart
from utils.report.page_parts import (
    LOSS_UNIT,
    OF_DATA,
    PICTURES,
    SHARE_UNIT,
    SPEED_UNIT,
    Cell,
    Grid,
    Row,
    cell_of,
    chart_data,
    pictures_of,
    shown_seconds,
    text_of,
)
from utils.report.run_files import RunFiles, number_of
from utils.report.run_page import (
    BARRED,
    HEADLINE,
    class_colours,
    figures_of,
    status_of,
    time_of,
)
from utils.report.settings import Setting, hyp_settings, option_settings


def comparison_content(runs: Sequence[RunFiles]) -> dict[str, Any]:
    names = _told_apart(runs)
    kinds = [file for file in PICTURES if file not in OF_DATA]
    pictures = pictures_of(runs, kinds)
    return {
        "title": f"{len(runs)} runs",
        "names": names,
        "runs": runs,
        "overview": _overview(runs, names),
        "charts": _charts(runs, names),
        "data": chart_data(runs),
        "classes": _classes_compared(runs, names),
        "hyp": _differing([hyp_settings(run.hyp or {}) for run in runs]),
        "options": _differing([option_settings(run.options or {}) for run in runs]),
        "unknown": {
            "options": [name for name, run in zip(names, runs) if not run.options],
            "hyperparameters": [name for name, run in zip(names, runs) if not run.hyp],
        },
        "pictures": {
            file: (PICTURES[file][0], [one.get(file) for one in pictures])
            for file in kinds
            if any(file in one for one in pictures)
        },
    }


def _told_apart(runs: Sequence[RunFiles]) -> list[str]:
    """Names of folders, with as many folders above them as it takes."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [text_of("/".join(path.parts[-depth:])) for path in paths]
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
    time, about, best = time_of(run), run.about, run.best_row
    figures = {figure.title: figure.cell for figure in figures_of(run)}
    speeds = [speed for speed in run.timing.numbers("images_per_s") if math.isfinite(speed)]
    status = status_of(run)
    return {
        "epoch": Cell()
        if best is None
        else _epoch_cell(run.results.epochs[best], run.epochs_planned or run.results.epochs[-1]),
        **{key: figures.get(title, Cell()) for key, (title, _) in HEADLINE.items()},
        "images_per_s": cell_of(statistics.median(speeds), "{:.1f}".format) if speeds else Cell(),
        "wall": Cell(shown_seconds(time.wall), f"{time.wall:.6g}") if time else Cell(),
        "parameters": cell_of(about.parameters / 1e6, "{:.2f} M".format) if about else Cell(),
        "status": Cell(status.word, status.word),
    }


def _epoch_cell(epoch: int, planned: int) -> Cell:
    return Cell(f"{epoch:,} of {planned:,}", str(epoch))


def _mark_best(rows: Sequence[dict[str, Cell]], key: str) -> None:
    """The greatest of a column, and what equals it to the digits of results.csv, unless all are alike."""
    values = [float(f"{number_of(row[key].full):.6g}") for row in rows]
    known = [value for value in values if math.isfinite(value)]
    for row, value in zip(rows, values):
        if len(set(known)) > 1 and value == max(known):
            row[key] = replace(row[key], is_best=True)


def _charts(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """Each run is a line."""
    curves = [_overlaid(title, unit, column, runs, names) for title, unit, column in _OVERLAID]
    return [*curves, _overlaid("Speed", SPEED_UNIT, "images_per_s", runs, names, file="timing")]


def _overlaid(
    title: str, unit: str, column: str, runs: Sequence[RunFiles], names: Sequence[str], file: str = "results"
) -> Chart:
    sources = [
        Source(name, column, getattr(run, file), run.best_row if file == "results" else None, index, index)
        for index, (run, name) in enumerate(zip(runs, names))
    ]
    return chart(title, unit, sources, from_zero=column.startswith("metrics/"), file=file)


_OVERLAID = (
    ("mAP@.5:.95", SHARE_UNIT, "metrics/mAP_0.5:0.95"),
    ("mAP@.5", SHARE_UNIT, "metrics/mAP_0.5"),
    ("Precision", SHARE_UNIT, "metrics/precision"),
    ("Recall", SHARE_UNIT, "metrics/recall"),
    *(
        (f"{title} loss, {split}", LOSS_UNIT, f"{split}/{key}_loss")
        for split in ("val", "train")
        for title, key in (("Box", "box"), ("Objectness", "obj"), ("Class", "cls"))
    ),
    ("Learning rate", "of weights, at the end of each epoch", "x/lr1"),
)


def _classes_compared(runs: Sequence[RunFiles], names: Sequence[str]) -> Grid | None:
    """The mAP@.5:.95 of each class, a run a column."""
    figures = [{one["name"]: one.get(BARRED) for one in (run.metrics or {}).get("per_class", ())} for run in runs]
    colours: dict[str, str] = {}
    for run in reversed(runs):
        colours |= class_colours(run)
    classes = dict.fromkeys(name for of_run in figures for name in of_run)
    if not classes:
        return None
    columns = {str(index): name for index, name in enumerate(names)}
    rows = []
    for name in classes:
        cells = {key: cell_of(of_run.get(name)) for key, of_run in zip(columns, figures)}
        rows.append(Row(name, tuple(_best_marked(list(cells.values()))), colours.get(name, "")))
    return Grid("class", columns, tuple(rows))


def _best_marked(cells: Sequence[Cell]) -> list[Cell]:
    row = [{"": cell} for cell in cells]
    _mark_best(row, "")
    return [one[""] for one in row]


def _differing(settings: Sequence[Sequence[Setting]]) -> list[tuple[str, str, list[Setting | None]]]:
    """Name, default and the setting of each run, of those that are not the same in all whose settings are known."""
    by_name = [{one.name: one for one in of_run} for of_run in settings]
    names = dict.fromkeys(name for of_run in by_name for name in of_run)
    rows = [(name, [of_run.get(name) for of_run in by_name]) for name in names]
    return [
        (name, next(one.default for one in of_runs if one), of_runs)
        for name, of_runs in rows
        if len({one.value if one else None for one, known in zip(of_runs, by_name) if known}) > 1
    ]
