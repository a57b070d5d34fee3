"""The objective of a study: a training run with the values of a trial, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.data import cache
from utils.evolve.study import Outcome, Report
from utils.stopping import StopRequest
from utils.sweep.process import Evaluated, Ready, Request
from utils.sweep.progress import Progress
from utils.sweep.trials import Trials


class Caches:
    """The image caches of trials, which stay from one to the next."""

    def __init__(self) -> None:
        self._held: dict[Path, object] = {}

    def hold(self, path: Path) -> None:
        if path not in self._held:
            self._held[path] = cache.hold(path)


@dataclass
class TrainingObjective:
    """To be called with the values of the genes; see `study.Objective`."""

    request: Callable[[Mapping[str, Any]], Request]
    progress: Progress
    caches: Caches
    check: Callable[[Mapping[str, Any]], None]  # raises UserError for what a trial would train that it should not
    failures: Path
    speaks: bool  # the first trial of the study shows what a training run shows of its data and network
    stop: StopRequest
    _run: Trials = field(init=False)

    def __post_init__(self) -> None:
        self._run = Trials(stop=self.stop, failures=self.failures, on_ready=self._ready, on_epoch=self.progress.epoch)

    def __call__(self, values: Mapping[str, Any], report: Report) -> Outcome:
        request = replace(self.request(values), speaks=self.speaks and self.progress.number == 0)

        def judged(message: Evaluated) -> None:
            report(message.epoch, message.fitness, message.results)

        try:
            return self._run(self.progress.name, request, judged)
        finally:
            self.progress.over()

    def _ready(self, message: Ready) -> None:
        self.check(message.work)
        for path in message.caches:
            self.caches.hold(path)
        self.progress.ready()
