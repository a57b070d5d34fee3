"""What a worker shows of a study: a bar for the trial under way, and a line for each that it has finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from utils.evolve.history import Finished, best, finished
from utils.evolve.study import Watch
from utils.report.console import Console, format_duration

_RECENT = 20  # trials that the time left is told by


@dataclass
class Progress(Watch):
    """The trials of one study, as they come."""

    goal: int
    epochs: int
    grace_s: int
    console: Console
    wrote: Callable[[], object] = lambda: None  # is called when there is something new to tell of the study
    headed: bool = False  # the titles of the lines are there
    number: int = -1  # of the trial under way
    _bar: tqdm | None = None

    @property
    def name(self) -> str:
        """Of the trial under way, for files."""
        return f"trial_{self.number:04d}"

    def started(self, number: int) -> None:
        self.number = number

    def ready(self) -> None:
        """Training begins."""
        self._bar = self.console.bar(self.epochs, f"Trial {self.number}", of="epochs")

    def epoch(self, number: int) -> None:
        """One begins."""
        if self._bar is not None and number > 1:
            self._bar.update(1)

    def over(self) -> None:
        """Whatever it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def finished(self, number: int, trials: Sequence[FrozenTrial]) -> None:
        self.over()
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        counted = finished(trials)
        last = next(trial for trial in counted if trial.number == number)
        if not self.headed:
            self.headed = True
            self.console.line(self._titles())
        self.console.line(self._line(last, counted, workers=running + 1))
        self.wrote()

    def _titles(self) -> str:
        return _row([title for title, _ in _COLUMNS])

    def _line(self, last: Finished, counted: Sequence[Finished], *, workers: int) -> str:
        return _row(_cells(last, counted, goal=self.goal, left=self._left(counted, workers)))

    def _left(self, counted: Sequence[Finished], workers: int) -> str:
        recent = [trial.seconds for trial in counted[-_RECENT:]]
        return format_duration(max(self.goal - len(counted), 0) * sum(recent) / len(recent) / workers)

    def waits(self, numbers: Sequence[int]) -> None:
        which = f"trial {numbers[0]}" if len(numbers) == 1 else f"trials {', '.join(map(str, numbers))}"
        self.console.note(
            f"waiting for {which} of other workers; what is not heard of for {self.grace_s} s is run again"
        )

    def warn(self, text: str) -> None:
        self.console.warn(text)


@dataclass
class ConfirmProgress(Progress):
    """The runs that confirm: each of a candidate on a seed."""

    names: Sequence[str] = ()  # of the candidates

    @property
    def name(self) -> str:
        return f"confirm_{self.number:04d}"

    def _titles(self) -> str:
        width = max(map(len, self.names))
        return f"{'candidate':>{max(width, 9)}}  {'seed':>4}  {'fitness':>8}  {'finished':>9}  {'time left':>9}"

    def _line(self, last: Finished, counted: Sequence[Finished], *, workers: int) -> str:
        name, width = self.names[last.values["candidate"]], max(9, *map(len, self.names))
        failed = f"  failed: {last.failure}" * (last.state == "failed")
        return (
            f"{name:>{width}}  {last.values['seed']:>4}  {_figure(last.fitness):>8}  "
            f"{f'{len(counted)}/{self.goal}':>9}  {self._left(counted, workers):>9}{failed}"
        )


# ---- lines --------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("trial", 5),
    ("fitness", 8),
    ("mAP@.5", 8),
    ("mAP@.5:.95", 10),
    ("epochs", 6),
    ("best", 8),
    ("of trial", 8),
    ("finished", 9),
    ("pruned", 6),
    ("failed", 6),
    ("time left", 9),
)


def _row(cells: Sequence[str]) -> str:
    *cells, note = cells if len(cells) > len(_COLUMNS) else [*cells, ""]
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS)) + note


def _cells(last: Finished, counted: Sequence[Finished], *, goal: int, left: str) -> list[str]:
    """Of `_COLUMNS`, and at the end what became of the trial, if it is not complete."""
    winner = best(counted)
    states = [trial.state for trial in counted]
    notes = {"complete": "", "pruned": "  pruned", "failed": f"  failed: {last.failure}"}
    return [
        str(last.number),
        _figure(last.fitness),
        _figure(last.results.get("mAP_0.5")),
        _figure(last.results.get("mAP_0.5:0.95")),
        str(last.epochs),
        _figure(winner.fitness) if winner else "-",
        str(winner.number) if winner else "-",
        f"{len(counted)}/{goal}",
        str(states.count("pruned")),
        str(states.count("failed")),
        left,
        notes[last.state],
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
