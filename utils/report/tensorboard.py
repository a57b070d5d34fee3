"""A run in TensorBoard: what each of its tabs shows.

Nothing is imported or written before there is something to show, so that no run waits for that to take its first step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.clock import PARTS
from utils.hyp import plain_values
from utils.report import markdown, summaries
from utils.report.console import labelled
from utils.report.event_file import EventFile, event, graph_event, is_installed
from utils.report.graph import graph_def, network_graph
from utils.report.logger import LoggedEpoch, LoggedRun, Logger, first_line
from utils.structures import Metrics

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

FINAL_METRICS = {  # of best.pt: with this prefix they are the first metrics of HParams
    "final/fitness": "fitness",
    "final/mAP_0.5": "map50",
    "final/mAP_0.5:0.95": "map50_95",
    "final/precision": "precision",
    "final/recall": "recall",
}
CHARTS = {
    "losses, train and val": {
        title: (f"train/{loss}_loss", f"val/{loss}_loss")
        for loss, title in (("box", "box"), ("obj", "objectness"), ("cls", "classification"))
    },
    "metrics": {
        "mean average precision": ("metrics/mAP_0.5", "metrics/mAP_0.5:0.95"),
        "precision and recall": ("metrics/precision", "metrics/recall"),
    },
    "learning rates": {"of the three groups of parameters": ("x/lr0", "x/lr1", "x/lr2")},
    "time": {
        "seconds of an epoch, by what they went into": ("time/epoch_s", *(f"time/{part}_s" for part in PARTS)),
        "images trained on per second": ("time/images_per_s",),
    },
}
_COMPARED = (  # options that tell runs apart; --cfg is told as the network in use
    *("data", "weights", "imgsz", "batch_size", "nominal_batch", "epochs", "optimizer", "linear_lr", "label_smoothing"),
    *("rect", "multi_scale", "quad", "image_weights", "repeat_factor", "single_cls", "freeze", "noautoanchor", "seed"),
)
_MOST_CURVES = 20  # classes with a curve of their own


class TensorBoardLogger(Logger):
    """Events under the column names of results.csv, and pictures, curves, hyperparameters, texts and the graph.

    Steps are epochs from 1; what is known from the start has that of the last epoch before. Without tensorboard there
    is a note, then nothing.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._run, self._last_step = run, run.start_epoch
        self._timing: Counter[str] = Counter()  # of all epochs, by column
        self._opened: EventFile | None = None

    def epoch(self, epoch: LoggedEpoch) -> None:
        self._last_step = epoch.number
        self._timing.update(epoch.timing)
        if self._file is not None:
            self._file.write([event(*self._values_of(epoch), step=epoch.number)])

    def images(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        if self._file is not None:
            values = [summaries.picture(tag, pixels) for tag, pixels in pictures.items()]
            self._file.write([event(*values, step=step)])

    def close(self, result: Metrics | None = None) -> None:
        if result is not None and self._file is not None:
            over = event(summaries.session_end(time.time(), success=True))
            self._file.write([event(*self._last_values(result), step=self._last_step), over])
        if self._opened is not None:
            self._opened.close()

    @cached_property
    def _file(self) -> EventFile | None:
        """The file, which has told what is known from the start; None: without tensorboard there is none."""
        if not is_installed():
            self._run.note("no TensorBoard events: `pip install tensorboard` to get them")
            return None
        self._opened = EventFile(self._run.folder.resolve(), first_step=self._run.start_epoch + 1)
        self._opened.write(self._beginning())
        return self._opened

    def _beginning(self) -> Iterator[Event]:
        run = self._run
        yield event(summaries.charts(CHARTS))
        yield event(summaries.session_start(_hparams(run), time.time()))
        texts = {
            "run/options": markdown.options_text(run.options),
            "run/hyperparameters": markdown.hyp_text(run.hyp),
            "run/data": markdown.data_text(run.about),
            "run/environment": markdown.environment_text(run.about),
        }
        yield event(*(summaries.text(*one) for one in texts.items()), step=run.start_epoch)
        yield from self._graph()

    def _graph(self) -> Iterator[Event]:
        try:
            graph = graph_def(network_graph(self._run.model, self._run.options.imgsz))
        except Exception as error:  # a network may do what a trace cannot follow
            self._run.note(f"no graph of the network in TensorBoard: {first_line(error)}")
        else:
            yield graph_event(graph)

    def _values_of(self, epoch: LoggedEpoch) -> Iterator[Summary.Value]:
        scalars = dict(epoch.results) | {f"time/{column}": value for column, value in epoch.timing.items()}
        for tag, value in scalars.items():
            if tag not in ("epoch", "time/epoch"):
                yield summaries.scalar(tag, value)
        if epoch.metrics is not None and self._run.is_pictured(epoch.number):
            yield from _curves(epoch.metrics, "pr_curve")
        for tag, tensor in epoch.tensors.items():
            yield summaries.histogram(tag, tensor.float().cpu().numpy())

    def _last_values(self, result: Metrics) -> Iterator[Summary.Value]:
        if result.labels:
            for tag, field in FINAL_METRICS.items():
                yield summaries.scalar(tag, getattr(result, field))
        yield from _curves(result, "final/pr_curve")
        yield summaries.text("final/result", markdown.classes_text(result))
        if self._timing:
            yield summaries.text("final/time", markdown.time_text(self._timing))


def _hparams(run: LoggedRun) -> dict[str, float | bool | str]:
    """What tells this run from others. TensorBoard finds out by itself which of it differs, and shows that first."""
    values = {"cfg": run.about.network, **{name: getattr(run.options, name) for name in _COMPARED}}
    values |= plain_values(run.hyp)
    return {
        name: value if isinstance(value, (bool, int, float)) else _as_text(value)
        for name, value in values.items()
        if value not in (None, "", (), [])
    }


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(map(str, value))


def _curves(metrics: Metrics, tag: str) -> Iterator[Summary.Value]:
    """Of the classes with most labels, and of all with any: means of precision and recall, and sums of the counts.

    The mean of precision is that over the classes that claim something.
    """
    classes = labelled(metrics)
    if metrics.curves is None or not classes:
        return
    precision, recall = metrics.curves.precision, metrics.curves.recall
    labels = np.array([one.labels for one in classes])
    hits = np.rint(recall * labels[:, None])  # (C, 1000)
    # that of claims none of which is a hit is not to be told from precision; there the curve has come to its end
    claims = np.rint(np.divide(hits, precision, out=np.zeros_like(hits), where=precision > 0))
    claiming = np.isfinite(precision)
    yield summaries.pr_curve(
        f"{tag}/all classes",
        precision=np.where(claiming, precision, 0).sum(0) / np.maximum(claiming.sum(0), 1),
        recall=recall.mean(0),
        hits=hits.sum(0),
        claims=claims.sum(0),
        labels=labels.sum(),
    )
    for row in np.argsort(-labels, kind="stable")[:_MOST_CURVES]:
        yield summaries.pr_curve(
            f"{tag}/{classes[row].name}",
            precision=precision[row],
            recall=recall[row],
            hits=hits[row],
            claims=claims[row],
            labels=labels[row],
        )
