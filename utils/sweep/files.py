"""The files of a sweep, made anew as trials finish; what cannot be written costs a line, never the sweep."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.study import Study

from utils.evolve.bucket import RESULT_FILES
from utils.evolve.hparams import HParamsLog
from utils.evolve.record import CSV_NAME, StudyRecord, draw
from utils.evolve.storage import errors_named
from utils.hyp import GENES
from utils.report.console import Console
from utils.structures import RunError
from utils.sweep.options import Sweep

CONFIRM_NAME = "confirm.json"
_SELDOM_S = 60.0  # between pictures, which take a second, and between copies to a bucket


class SweepFiles:
    """evolve.csv, hyp_evolved.yaml, evolve.png, TensorBoard's HParams, and their copies in a bucket."""

    def __init__(self, sweep: Sweep, study: Study, console: Console, *, storage: str) -> None:
        """`storage`: what to call that of the study."""
        self._sweep, self._study, self._console, self._storage = sweep, study, console, storage
        self._genes = {gene.name: gene for gene in sweep.space.genes}
        self._record = StudyRecord(sweep.folder, names=tuple(GENES))
        self._hparams = HParamsLog(sweep.folder, self._genes, note=console.note)
        self._hyp = sweep.plain_hyp
        self._drawn_at = self._sent_at = -_SELDOM_S
        self._told: set[str] = set()

    def write(self, *, last: bool = False) -> None:
        """All that has changed; what takes long once in a while, and the `last` time."""
        with self._told_once():
            if not self._record.write(self._study, self._hyp):
                raise RunError(
                    f"{self._sweep.folder / CSV_NAME}: another worker holds it, so it may be behind the study"
                )
        with self._told_once():
            self._hparams.write(self._study)
        if self._sweep.speaks and not self._sweep.options.noplots and (last or _is_due(self._drawn_at)):
            self._drawn_at = time.monotonic()
            with self._told_once():
                draw(self._study, self._genes, self._sweep.folder)
        if _is_due(self._sent_at):
            self.send()

    def send(self) -> None:
        """To the bucket, if there is one."""
        if self._sweep.bucket is not None:
            self._sent_at = time.monotonic()
            with self._told_once():
                self._sweep.bucket.send({name: self._sweep.folder / name for name in RESULT_FILES})

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            with errors_named(self._storage), _files_named():
                yield
        except RunError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                self._console.warn(str(error))


@contextmanager
def _files_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise RunError(f"{error.filename}: {error.strerror}") from None


def _is_due(since: float) -> bool:
    return time.monotonic() - since >= _SELDOM_S
