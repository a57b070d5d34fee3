"""What a worker shows of a study: a bar for the trial under way, and a line for each that it has finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optuna.study import Study
from optuna.trial import TrialState
from tqdm import tqdm

from utils.evolve.history import Finished, best, finished
from utils.evolve.study import Watch
from utils.report.loggers import Console, format_duration

_RECENT = 20  # trials that the time left is told by


@dataclass
class Progress(Watch):
    """The trials of one study, as they come."""

    study: Study
    goal: int
    epochs: int
    console: Console
    wrote: Callable[[], object] = lambda: None  # is called when there is something new to tell of the study
    number: int = -1  # of the trial under way
    _bar: tqdm | None = None
    _headed: bool = False

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

    def finished(self, number: int) -> None:
        self.over()
        trials = self.study.get_trials(deepcopy=False)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        counted = finished(trials)
        last = next(trial for trial in counted if trial.number == number)
        if not self._headed:
            self._headed = True
            self.console.line(_row([title for title, _ in _COLUMNS]))
        self.console.line(_row(_cells(last, counted, goal=self.goal, workers=running + 1)))
        self.wrote()

    def warn(self, text: str) -> None:
        self.console.warn(text)


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


def _cells(last: Finished, counted: Sequence[Finished], *, goal: int, workers: int) -> list[str]:
    """Of `_COLUMNS`, and at the end what became of the trial, if it is not complete."""
    winner = best(counted)
    states = [trial.state for trial in counted]
    recent = [trial.seconds for trial in counted[-_RECENT:]]
    left = max(goal - len(counted), 0) * sum(recent) / len(recent) / workers
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
        format_duration(left),
        notes[last.state],
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
