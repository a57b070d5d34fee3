"""A study as TensorBoard's HParams tab shows it: a session per trial, and what its columns are.

The events of a trial say the same whoever writes them, so that workers need no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.study import Study
from optuna.trial import FrozenTrial

from utils.evolve.history import RESULT_NAMES, Finished, finished
from utils.files import remove_unfinished, write_atomic
from utils.report.event_file import event, is_installed, records, version_event
from utils.report.evolution import Range
from utils.report.summaries import experiment, is_number, scalar, session_end, session_start

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.api_pb2 import HParamInfo

EVENTS_NAME = "events.out.tfevents.evolve"  # TensorBoard reads what has tfevents in its name
METRICS = ("fitness", *RESULT_NAMES)


class HParamsLog:
    """The folder `tensorboard` of a study, to which any of its workers may add what is missing."""

    def __init__(self, folder: Path, genes: Mapping[str, Range], *, note: Callable[[str], object] = print) -> None:
        """`note` takes a line for the user where tensorboard is not installed; then nothing is ever written."""
        self.folder = folder / "tensorboard"
        self._genes = genes
        self._known: set[int] = set()  # trials that need no look at the disk any more
        self._on = is_installed()
        if not self._on:
            note("no TensorBoard HParams: `pip install tensorboard` to get them")

    def write(self, study: Study) -> None:
        """Add the complete and the pruned trials: their genes, the fitness at each rung, and what they last gave.

        The status of a pruned one is failure, so that the tab can leave it out. An OSError names the file.
        """
        if not self._on:
            return
        _write(self.folder, lambda: [event(_description(self._genes))])
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self._known:
                for row in finished([trial]):
                    self._write_trial(trial, row)
                self._known.add(trial.number)

    def _write_trial(self, trial: FrozenTrial, row: Finished) -> None:
        if row.state != "failed":
            numbers = {name: row.values[name] for name in self._genes if is_number(row.values.get(name))}
            _write(self.folder / f"trial_{row.number:04d}", lambda: _session(trial, row, numbers))


# ---- what is told ---------------------------------------------------------------------------------------------------


def _description(genes: Mapping[str, Range]) -> Summary.Value:
    """Of the study: its columns, with the bounds that the tab filters by."""
    return experiment([_gene_info(name, gene) for name, gene in genes.items()], METRICS)


def _gene_info(name: str, gene: Range) -> HParamInfo:
    from tensorboard.plugins.hparams import api_pb2

    info = api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_FLOAT64)
    if gene.scale == "choice":
        info.domain_discrete.extend(gene.choices)
    else:
        info.domain_interval.min_value, info.domain_interval.max_value = gene.low, gene.high
    return info


def _session(trial: FrozenTrial, row: Finished, genes: Mapping[str, float]) -> list[Event]:
    """Of a trial that is complete or pruned."""
    start, end = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
    rungs = dict(sorted(trial.intermediate_values.items())) | ({} if row.fitness is None else {row.epochs: row.fitness})
    results = [scalar(name, row.results[name]) for name in RESULT_NAMES if name in row.results]
    return [
        event(session_start(genes, start), seconds=start),
        *(event(scalar("fitness", fitness), seconds=end, step=epoch) for epoch, fitness in rungs.items()),
        event(*results, seconds=end, step=row.epochs),
        event(session_end(end, success=row.state == "complete"), seconds=end),
    ]


# ---- files ----------------------------------------------------------------------------------------------------------


def _write(run: Path, events: Callable[[], Sequence[Event]]) -> None:
    """The events of a run, unless it has them. TensorBoard may read what is half written, which is as true."""
    path = run / EVENTS_NAME
    if path.exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run)
    told = events()
    content = records([version_event(told[0].wall_time), *told])
    write_atomic(path, lambda file: file.write(content) and None, lasting=False)
