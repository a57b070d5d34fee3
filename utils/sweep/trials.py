"""Trials in processes of their own: started, listened to, and ended, whatever becomes of them."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from utils.evolve.study import Outcome, TrialFailed
from utils.launch import as_no_rank
from utils.stopping import StopRequest, signals_held_back
from utils.structures import UserError
from utils.sweep.process import Begun, Evaluated, Failed, Message, Ready, Request, main

_LISTEN_S = 0.2  # between looks at whether a signal has come
_ENDING_S = 5.0  # that a process may take to end once it has said its last word
_TRACEBACK_LINES = 40


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Calling it runs a trial; its outcome. One at a time."""

    stop: StopRequest
    failures: Path  # the folder that takes what failed trials said
    on_ready: Callable[[Ready], object]  # raises what speaks against the trial
    on_epoch: Callable[[int], object]

    def __call__(self, name: str, request: Request, goes_on: Callable[[Evaluated], object]) -> Outcome:
        """`goes_on` hears of each rung, and raises what is to end the trial.

        Raises TrialFailed where it failed by its own doing, UserError where all others would as well, and Interrupted
        when a signal asks to stop.
        """
        with tempfile.TemporaryDirectory(prefix="trial_") as folder:
            request = replace(request, log=Path(folder) / "stderr.txt")
            with _running(request) as (process, pipe):
                try:
                    return self._followed(process, pipe, goes_on)
                except TrialFailed:
                    process.join(_ENDING_S)
                    self._keep(name, request.log)
                    raise

    def _followed(self, process: BaseProcess, pipe: Connection, goes_on: Callable[[Evaluated], object]) -> Outcome:
        for message in self._messages(process, pipe):
            match message:
                case Ready():
                    self.on_ready(message)
                case Begun(epoch):
                    self.on_epoch(epoch)
                case Evaluated(last=True):
                    process.join(_ENDING_S)
                    return Outcome(fitness=message.fitness, results=message.results, epochs=message.epoch)
                case Evaluated():
                    self._judged(process, pipe, message, goes_on)
                case Failed(text, usage=True):
                    raise UserError(text)
                case Failed(text):
                    raise TrialFailed(text)
        raise TrialFailed(_how_it_ended(process))

    def _judged(
        self, process: BaseProcess, pipe: Connection, message: Evaluated, goes_on: Callable[[Evaluated], object]
    ) -> None:
        try:
            goes_on(message)
        except BaseException:
            _answer(pipe, False)
            process.join(_ENDING_S)
            raise
        _answer(pipe, True)

    def _messages(self, process: BaseProcess, pipe: Connection) -> Iterator[Message]:
        """Until the process ends."""
        while True:
            self.stop.check()
            if pipe in wait([pipe, process.sentinel], _LISTEN_S):
                try:
                    yield pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join(_ENDING_S)
                    return
            elif not process.is_alive():
                return

    def _keep(self, name: str, log: Path) -> None:
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        if said:
            self.failures.mkdir(exist_ok=True)
            (self.failures / f"{name}.txt").write_text("\n".join(said[-_TRACEBACK_LINES:]) + "\n")


def _answer(pipe: Connection, goes_on: bool) -> None:
    with suppress(BrokenPipeError):  # it has died meanwhile, which is found next
        pipe.send(goes_on)


@contextmanager
def _running(request: Request) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process within the block; it does not outlive it, and hears of no signal of a terminal or scheduler."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, request), name="trial")
    with as_no_rank(), signals_held_back():
        process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
        ours.close()


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"its process has ended with exit code {code}"
    if code == -getattr(signal, "SIGKILL", 9):
        return f"its process was killed (signal {-code}): out of memory? lower --batch-size or --workers"
    return f"its process was ended by signal {-code}"
