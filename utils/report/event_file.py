"""Events files of TensorBoard, written by whoever calls: what goes wrong is raised there, and on no other thread.

The messages are tensorboard's own, which is imported where it is used. TensorFlow and torch are not needed.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


def is_installed() -> bool:
    """Whether there is a tensorboard to be had, all of it that is used here and in summaries.py."""
    try:
        import tensorboard.plugins.hparams.metadata
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError:
        return False
    return True


def event(*values: Summary.Value, step: int = 0, seconds: float | None = None) -> Event:
    """What is known at a step, now or at a time of the clock."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(wall_time=time.time() if seconds is None else seconds, step=step, summary=Summary(value=values))


def graph_event(graph: bytes) -> Event:
    """A GraphDef, serialised."""
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), graph_def=graph)


def records(events: Iterable[Event]) -> bytes:
    """The content of an events file; more may follow it."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    for one in events:
        writer.write(one.SerializeToString())
    return content.getvalue()


def version_event(seconds: float) -> Event:
    """What a file begins with."""
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=seconds, file_version="brain.Event:2")


def withdrawal_event(seconds: float, step: int) -> Event:
    """Withdraws what earlier files of the folder say of a step and of all after it."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=seconds, step=step, session_log=SessionLog(status=SessionLog.START))


class EventFile:
    """A new file of events in a folder, whole after each `write`. Every method raises OSError where it cannot be.

    Several of one folder are one run to TensorBoard, which reads them in the order of their names: that of their start.
    Each has its own, so that half a record, which a process leaves that is killed as it writes, ends a file.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """What earlier files say of `first_step` and all after it is withdrawn."""
        now = time.time_ns()
        moment = f"{now // 10**9:010d}.{now % 10**9:09d}"
        self.path = folder / f"events.out.tfevents.{moment}.{platform.node()}.{os.getpid()}"
        self._file = self.path.open("xb", buffering=0)  # with a buffer, closing would fail on a full disk once more
        self.write([version_event(now / 1e9), withdrawal_event(now / 1e9, first_step)])

    def write(self, events: Iterable[Event]) -> None:
        """Add events, for TensorBoard to see at once."""
        left = memoryview(records(events))
        try:
            self.path.stat()  # writing to a file that was removed would not fail
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = os.fspath(self.path)  # a full disk has none
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()
