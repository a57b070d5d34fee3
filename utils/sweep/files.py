"""The files of a sweep, made anew as trials finish; what cannot be written costs a line, never the sweep."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study

from utils.evolve.bucket import RESULT_FILES, Bucket
from utils.evolve.hparams import HParamsLog
from utils.evolve.record import StudyRecord, draw
from utils.evolve.space import Gene, Space
from utils.hyp import GENES
from utils.report.loggers import Console
from utils.structures import RunError

_DRAWN_EACH_S = 60.0


@dataclass
class SweepFiles:
    """evolve.csv, hyp_evolved.yaml, evolve.png, TensorBoard's HParams, and their copies in a bucket."""

    folder: Path
    study: Study
    hyp: Mapping[str, Any]  # plain values, which a trial has but for its own
    space: Space
    console: Console
    bucket: Bucket | None = None
    plots: bool = True
    _drawn_at: float = -_DRAWN_EACH_S
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._record = StudyRecord(self.folder, names=tuple(GENES))
        self._hparams = HParamsLog(self.folder, self._genes, note=self.console.note)

    @property
    def _genes(self) -> dict[str, Gene]:
        return {gene.name: gene for gene in self.space.genes}

    def write(self, *, last: bool = False) -> None:
        """All that has changed; the picture, which takes a second, once in a while, and the `last` time."""
        with self._told_once():
            self._record.write(self.study, self.hyp)
        with self._told_once():
            self._hparams.write(self.study)
        now = time.monotonic()
        if self.plots and (last or now - self._drawn_at >= _DRAWN_EACH_S):
            self._drawn_at = now
            with self._told_once():
                draw(self.study, self._genes, self.folder)
        self.send()

    def send(self) -> None:
        """To the bucket, if there is one."""
        if self.bucket is not None:
            with self._told_once():
                self.bucket.send({name: self.folder / name for name in RESULT_FILES})

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RunError) as error:
            where = getattr(error, "filename", None)
            text = f"{where}: {error.strerror}" if isinstance(error, OSError) and where else str(error)
            if text not in self._told:
                self._told.add(text)
                self.console.warn(text)
