"""TensorBoard events of a run."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.report.logger import LoggedEpoch, LoggedRun, Logger, Row
from utils.structures import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_EVENTS_BYTES = 2**16  # more than the events of an epoch take


class TensorBoardLogger(Logger):
    """TensorBoard events under the column names of results.csv. Without tensorboard: a note, then nothing.

    It is imported with the first event, as that takes as long as some steps of training. Where its folder cannot be
    written any more, a note and nothing as well: its thread would fail with a traceback.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._folder, self._start_epoch, self._note = run.folder.resolve(), run.start_epoch, run.note
        self._fails = False

    def epoch(self, epoch: LoggedEpoch) -> None:
        self._scalars({tag: value for tag, value in epoch.results.items() if tag != "epoch"}, epoch.number)

    @functools.cached_property
    def _writer(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._note("no TensorBoard events: `pip install tensorboard` to get them")
            return None
        return SummaryWriter(str(self._folder), purge_step=self._start_epoch + 1)

    def _may_write(self) -> bool:
        if not self._fails and not _takes(self._folder):
            self._fails = True
            self._note(f"no more TensorBoard events: {self._folder} cannot be written")
        return not self._fails and self._writer is not None

    def _scalars(self, values: Row, step: int) -> None:
        if not self._may_write():
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def images(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        if self._may_write():
            for tag, picture in pictures.items():
                self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self, result: Metrics | None = None) -> None:
        if self._may_write():
            self._writer.close()


def _takes(folder: Path) -> bool:
    """Whether a folder is there, on a disk that can be written and has some room."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= _EVENTS_BYTES
