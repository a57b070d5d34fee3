"""`train.py` as a process under watch: what it shows, what files it makes, and whether anything of it lives on.

It writes to a terminal of its own, so that its bars tell what it is at, and its group of processes is its own as well.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.workers import ROOT

_POLL_S = 0.0002
_LONGEST_S = 180
_SHARED_MEMORY = Path("/dev/shm")


class Hung(Exception):
    """A process has not ended in time."""


class Watched:
    """`python COMMAND...` in the folder of the project, from its start on."""

    running: set[Watched]  # of this program

    def __init__(self, command: Sequence[str], folder: Path, number: int) -> None:
        """Its temporary files and its standard error go to `folder`, by `number`."""
        self.temporary, self._errors = folder / f"tmp{number}", folder / f"stderr{number}.txt"
        self.temporary.mkdir()
        self._shown, self._pieces = bytearray(), []  # and (time, bytes so far)
        terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 140, 0, 0))  # rows, columns
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        with self._errors.open("wb") as errors:
            self._started = time.monotonic()
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=errors,
                start_new_session=True,
            )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
        self._reader.start()
        Watched.running.add(self)

    # ---- what is seen of it -----------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def seconds_at(self, pattern: bytes, number: int = 1) -> float | None:
        """Its age when it showed a pattern for the so-manieth time; None before that."""
        found = list(re.finditer(pattern, bytes(self._shown)))
        if len(found) < number:
            return None
        end = found[number - 1].end()
        return next(moment for moment, size in self._pieces if size >= end) - self._started

    def is_there(self) -> bool:
        return self._process.poll() is None

    def lives_for(self, seconds: float) -> bool:
        """Waits so long; whether it is still there."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.is_there()

    def until(self, condition: Callable[[], object]) -> bool:
        """Waits until that holds; False when it ends first. Raises Hung when it takes too long."""
        deadline = time.monotonic() + _LONGEST_S
        while self.is_there():
            if condition():
                return True
            if time.monotonic() >= deadline:
                self.end(0)
            time.sleep(_POLL_S)
        return False

    def shows(self, pattern: bytes, number: int = 1) -> bool:
        """Waits until it has shown a pattern so many times; False when it ends first."""
        return self.until(lambda: len(re.findall(pattern, bytes(self._shown))) >= number)

    def _read(self, terminal: int) -> None:
        with suppress(OSError):  # how a terminal says that its other end is closed
            while piece := os.read(terminal, 65536):
                self._shown += piece
                self._pieces.append((time.monotonic(), len(self._shown)))
        os.close(terminal)

    # ---- what is done to it -----------------------------------------------------------------------------------------

    def send(self, signum: int, *, group: bool) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signum) if group else os.kill(self.pid, signum)

    def kill(self, *, group: bool) -> None:
        self.send(signal.SIGKILL, group=group)
        self.end(10)

    def end(self, seconds: float) -> int:
        """Its exit code. Raises Hung, after it was killed, when it takes longer than that."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.clear()
            raise Hung(f"no end after {seconds:.0f} s more, at an age of {self.age:.0f} s") from None
        finally:
            Watched.running.discard(self)

    def clear(self) -> None:
        """Kill what is left of it."""
        self.send(signal.SIGKILL, group=True)
        self._process.wait()
        Watched.running.discard(self)

    # ---- what is left of it -----------------------------------------------------------------------------------------

    def survivors(self, seconds: float) -> list[str]:
        """Processes of its session that are there so long after its end."""
        deadline = time.monotonic() + seconds
        while (left := _in_session(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def left_in_memory(self) -> list[str]:
        """Files of shared memory by torch that bear its name."""
        return [path.name for path in _SHARED_MEMORY.glob(f"torch_{self.pid}_*")]


Watched.running = set()


def _in_session(session: int) -> list[str]:
    """Processes that live, as `pid name`."""
    left = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            pid, _, rest = path.read_text(errors="replace").partition(" (")
            name, _, fields = rest.rpartition(") ")
            state, _, _, of_session, *_ = fields.split()
            if int(of_session) == session and state not in "ZX":
                left.append(f"{pid} {name}")
    return left


def train_command(*flags: str) -> list[str]:
    return [sys.executable, "train.py", *flags]
