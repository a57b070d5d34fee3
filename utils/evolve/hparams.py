"""A study as TensorBoard's HParams tab shows it: a session per trial, and what its columns are.

Torch has a writer for events, which a process that only looks after trials should not pay for: here tensorboard's own
messages are put into files. Those of a trial say the same whoever writes them, so that workers need no lock.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.study import Study
from optuna.trial import FrozenTrial

from utils.evolve.history import RESULT_NAMES, Finished, finished
from utils.files import remove_unfinished, write_atomic
from utils.report.evolution import Range

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
        self._on = _is_installed(note)

    def write(self, study: Study) -> None:
        """Add the complete and the pruned trials: their genes, the fitness at each rung, and what they last gave.

        The status of a pruned one is failure, so that the tab can leave it out. An OSError names the file.
        """
        if not self._on:
            return
        _write(self.folder, lambda: [_event(_description(self._genes), seconds=time.time())])
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self._known:
                for row in finished([trial]):
                    self._write_trial(trial, row)
                self._known.add(trial.number)

    def _write_trial(self, trial: FrozenTrial, row: Finished) -> None:
        if row.state != "failed":
            numbers = {name: row.values[name] for name in self._genes if _is_number(row.values.get(name))}
            _write(self.folder / f"trial_{row.number:04d}", lambda: _session(trial, row, numbers))


def _is_installed(note: Callable[[str], object]) -> bool:
    try:
        import tensorboard.plugins.hparams.metadata  # noqa: F401
    except ImportError:
        note("no TensorBoard HParams: `pip install tensorboard` to get them")
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# ---- what is told ---------------------------------------------------------------------------------------------------


def _description(genes: Mapping[str, Range]) -> Summary:
    """Of the study: its columns, with the bounds that the tab filters by."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    experiment = api_pb2.Experiment(
        hparam_infos=[_gene_info(name, gene) for name, gene in genes.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS],
    )
    return _plugin_summary(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))


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
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    start, end = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
    begun = plugin_data_pb2.SessionStartInfo(start_time_secs=start)
    for name, value in genes.items():
        begun.hparams[name].number_value = value
    status = api_pb2.STATUS_SUCCESS if row.state == "complete" else api_pb2.STATUS_FAILURE
    ended = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=end)
    data = plugin_data_pb2.HParamsPluginData
    rungs = dict(sorted(trial.intermediate_values.items())) | ({} if row.fitness is None else {row.epochs: row.fitness})
    results = {name: row.results[name] for name in RESULT_NAMES if name in row.results}
    return [
        _event(_plugin_summary(metadata.SESSION_START_INFO_TAG, data(session_start_info=begun)), seconds=start),
        *(_event(_scalars({"fitness": fitness}), seconds=end, step=epoch) for epoch, fitness in rungs.items()),
        _event(_scalars(results), seconds=end, step=row.epochs),
        _event(_plugin_summary(metadata.SESSION_END_INFO_TAG, data(session_end_info=ended)), seconds=end),
    ]


def _plugin_summary(tag: str, data: object) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    summary = Summary()
    summary.value.add(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
    return summary


def _scalars(values: Mapping[str, float]) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


# ---- files ----------------------------------------------------------------------------------------------------------


def _event(summary: Summary, *, seconds: float, step: int = 0) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=seconds, step=step, summary=summary)


def _write(run: Path, events: Callable[[], Sequence[Event]]) -> None:
    """The events of a run, unless it has them. TensorBoard may read what is half written, which is as true."""
    path = run / EVENTS_NAME
    if path.exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    remove_unfinished(run)
    content = _records(events())
    write_atomic(path, lambda file: file.write(content) and None, lasting=False)


def _records(events: Sequence[Event]) -> bytes:
    """The content of an events file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in (Event(wall_time=events[0].wall_time, file_version="brain.Event:2"), *events):
        writer.write(event.SerializeToString())
    return content.getvalue()
