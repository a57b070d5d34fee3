"""What the folder of a run holds, read for people.

The surprise: nothing here raises for what a file holds. One that is missing, damaged, older or half done leaves its
value empty and a sentence in `troubles`, by the name of the file. And nothing is written: the run may be under way.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from utils.files import read_json, read_yaml, try_lock
from utils.report.about import ABOUT_FILE, About, read_about
from utils.report.csv_table import read_rows
from utils.structures import UserError, fitness

RESULTS, TIMING, NONFINITE, SCAN = "results.csv", "timing.csv", "nonfinite.csv", "scan.csv"
METRICS, HYP, OPTIONS = "metrics.json", "hyp.yaml", "opt.yaml"
FILES = (RESULTS, TIMING, METRICS, HYP, OPTIONS, ABOUT_FILE, NONFINITE, SCAN)

Trouble = Callable[[str, str], None]  # told the name of a file and a sentence

_LARGEST = 1e30
_SCAN_ROWS = 20  # of scan.csv, which may list a million
_UNWRITTEN = {
    RESULTS: "There is no results.csv yet: it gets its first row when the first epoch is over.",
    TIMING: "There is no timing.csv: it gets its first row when the first epoch is over, and older runs have none.",
    METRICS: "There is no metrics.json yet: the final figures come when the run is finished.",
    HYP: "There is no hyp.yaml, so the hyperparameters are not known.",
    OPTIONS: "There is no opt.yaml, so the options are not known.",
    ABOUT_FILE: "There is no about.json, as in runs of older versions: data, network and environment are not known.",
}


@dataclass(frozen=True)
class Table:
    """A CSV file of epochs, in their order, each once; cells as they are written."""

    epochs: tuple[int, ...] = ()
    rows: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, str]]) -> Table:
        """Without the rows that name no epoch; of several that name the same one the last counts."""
        numbered = ((number_of(row.get("epoch", "")), row) for row in rows)
        by_epoch = {int(number): row for number, row in numbered if math.isfinite(number)}
        epochs = tuple(sorted(by_epoch))
        return cls(epochs, tuple(by_epoch[epoch] for epoch in epochs))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows[0]) if self.rows else ()

    def cells(self, column: str) -> list[str]:
        return [row.get(column, "") for row in self.rows]

    def numbers(self, column: str) -> list[float]:
        """NaN where there is none."""
        return [number_of(cell) for cell in self.cells(column)]

    def best_row(self, told: Any = None, *, noval: bool = False) -> int | None:
        """The row of the epoch that became best.pt: the one `told`, or else that of the best fitness.

        Of equals it is the first then, and with `noval` the last that was evaluated.
        """
        if told in self.epochs:
            return self.epochs.index(told)
        scores = list(map(fitness, self.numbers("metrics/mAP_0.5"), self.numbers("metrics/mAP_0.5:0.95")))
        known = [row for row, score in enumerate(scores) if math.isfinite(score)]
        if not known:
            return None
        return known[-1] if noval else max(known, key=lambda row: scores[row])


@dataclass(frozen=True)
class Findings:
    """What scan.csv lists: how many rows, and the first of them."""

    count: int = 0
    first: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run, as far as its folder tells."""

    folder: Path
    results: Table
    timing: Table
    nonfinite: Sequence[Mapping[str, str]]
    metrics: Mapping[str, Any] | None
    hyp: Mapping[str, Any] | None
    options: Mapping[str, Any] | None
    about: About | None
    scan: Findings
    is_finished: bool
    is_locked: bool  # by the process that trains
    troubles: Mapping[str, str]

    @property
    def name(self) -> str:
        return os.fspath(self.folder.resolve().name)

    @property
    def epochs_planned(self) -> int | None:
        epochs = (self.options or {}).get("epochs")
        return epochs if _is_count(epochs) else None

    @property
    def best_row(self) -> int | None:
        """The row of results.csv that became best.pt, as far as that is known."""
        noval = (self.options or {}).get("noval") is True
        return self.results.best_row((self.metrics or {}).get("epoch"), noval=noval)


def is_run(folder: Path) -> bool:
    """Whether a folder holds any file of a run."""
    return any((folder / name).is_file() for name in FILES)


def read_run(folder: Path) -> RunFiles:
    """Raises UserError where there is no such folder, or nothing of a run in it."""
    shown = os.fsencode(folder).decode("utf-8", "replace")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "not found"
        raise UserError(f"{shown}: {what}; expected the folder of a run, such as runs/train/exp")
    if not is_run(folder):
        raise UserError(f"{shown}: holds none of the files of a run ({', '.join(FILES[:5])}, ...)")
    troubles: dict[str, str] = {}

    def trouble(name: str, sentence: str) -> None:
        troubles[name] = sentence

    return RunFiles(
        folder=folder,
        results=_epochs(folder / RESULTS, trouble),
        timing=_epochs(folder / TIMING, trouble),
        nonfinite=_rows(folder / NONFINITE, trouble) if (folder / NONFINITE).exists() else (),
        metrics=_metrics(folder / METRICS, trouble),
        hyp=_yaml(folder / HYP, trouble),
        options=_yaml(folder / OPTIONS, trouble),
        about=_about(folder, trouble),
        scan=_findings(folder / SCAN, trouble),
        is_finished=(folder / METRICS).is_file(),
        is_locked=_is_locked(folder),
        troubles=troubles,
    )


def number_of(cell: str) -> float:
    """NaN where a text is no number, or one that no figure of a run can be."""
    try:
        number = float(cell)
    except ValueError:
        return math.nan
    return number if abs(number) < _LARGEST else math.nan


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the folder, as one that trains does for as long as it lives."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows has no handles on folders
        return False
    try:
        return not try_lock(handle, exclusive=False)
    finally:
        os.close(handle)


def _rows(path: Path, trouble: Trouble) -> list[dict[str, str]]:
    if not path.exists():
        trouble(path.name, _UNWRITTEN[path.name])
        return []
    try:
        rows = read_rows(path)
    except (OSError, csv.Error) as error:
        trouble(path.name, f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}.")
        return []
    if not rows:
        trouble(path.name, f"{path.name} has no complete row.")
    return rows


def _epochs(path: Path, trouble: Trouble) -> Table:
    rows = _rows(path, trouble)
    table = Table.of(rows)
    if rows and not table.rows:
        trouble(path.name, f"{path.name} is damaged: none of its rows names an epoch.")
    elif len(table.rows) < len(rows):
        left_out = len(rows) - len(table.rows)
        trouble(path.name, f"{path.name} is damaged: {left_out} of its {len(rows)} rows are left out.")
    return table


def _yaml(path: Path, trouble: Trouble) -> dict[str, Any] | None:
    if not path.exists():
        trouble(path.name, _UNWRITTEN[path.name])
        return None
    try:
        return {str(name): value for name, value in read_yaml(path, what=path.name).items()}
    except UserError as error:
        trouble(path.name, f"{error}.")
        return None


def _metrics(path: Path, trouble: Trouble) -> dict[str, Any] | None:
    if not path.exists():
        trouble(path.name, _UNWRITTEN[path.name])
        return None
    try:
        content = read_json(path)
    except UserError as error:
        trouble(path.name, f"{path.name} is damaged: {str(error).partition(path.name + ': ')[2]}.")
        return None
    if not (isinstance(content, dict) and isinstance(content.get("per_class"), list)):
        trouble(path.name, f"{path.name} is damaged: it does not hold the figures of an evaluation.")
        return None
    classes = [one for one in content["per_class"] if isinstance(one, dict) and isinstance(one.get("name"), str)]
    if len(classes) < len(content["per_class"]):
        left_out = len(content["per_class"]) - len(classes)
        trouble(path.name, f"{path.name} is damaged: {left_out} entries of its per_class are left out.")
    return {**dict.fromkeys(("images", "labels", "non_finite")), **content, "per_class": classes}


def _about(folder: Path, trouble: Trouble) -> About | None:
    if not (folder / ABOUT_FILE).exists():
        trouble(ABOUT_FILE, _UNWRITTEN[ABOUT_FILE])
        return None
    about = read_about(folder)
    if about is None or not _is_sound(about):
        trouble(
            ABOUT_FILE, "about.json is damaged, or of another version: data, network and environment are not known."
        )
        return None
    return about


def _is_sound(about: About) -> bool:
    """Whether values are of the kinds that they should be, as JSON promises nothing."""
    texts = [about.network, about.data, *about.names]
    counts: list[Any] = [about.parameters]
    for split in about.splits.values():
        counts += [split.images, split.background, split.skipped, split.labels, *split.labels_of_class]
        for found in split.findings:
            counts.append(found.count)
            texts += [found.severity, found.problem, found.where]
    for start in about.starts:
        counts.append(start.first_epoch)
        texts += [start.time, start.command]
        if not isinstance(start.environment, dict):
            return False
    is_number = isinstance(about.gflops, (int, float)) and not isinstance(about.gflops, bool)
    return is_number and all(map(_is_count, counts)) and all(isinstance(text, str) for text in texts)


def _findings(path: Path, trouble: Trouble) -> Findings:
    if not path.exists():  # as where there is no finding
        return Findings()
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            lines = (line.replace("\0", "\ufffd") for line in file)
            reader = csv.DictReader(lines, skipinitialspace=True)
            first = tuple(islice(reader, _SCAN_ROWS))
            count = len(first) + sum(1 for _ in file)
            named = {"split", "file", "problem"} <= set(reader.fieldnames or ())
    except (OSError, csv.Error) as error:
        trouble(path.name, f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}.")
        return Findings()
    if not named:
        trouble(path.name, f"{path.name} is damaged: it does not list findings.")
        return Findings()
    return Findings(count, first)
