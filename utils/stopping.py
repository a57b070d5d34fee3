"""Signals that ask a run to stop, and how it hears them: between two steps, or at once where nothing is lost by it.

The surprise: a thread listens as well. The main one hears of a signal between two lines of Python only, which may be
many seconds apart, and a second Ctrl-C should not wait for that.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

# As terminals send, when they are closed too, and batch schedulers and service managers; Windows has but two of them
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_ONE_PRESS_S = 0.1  # within which a Ctrl-C may arrive twice, at the process and at its group, as `timeout` sends it
_SILENT_S = 1.0  # a stop that takes longer is announced


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work; the text, if any, says how to go on."""

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text)
        self.signum = signum

    @property
    def by(self) -> str:
        """How to tell a person; nothing for Ctrl-C, which they pressed themselves."""
        return "" if self.signum == signal.SIGINT else f" by {signal.Signals(self.signum).name}"


class StopRequest:
    """Whether a signal has asked to stop. One that nobody connects to signals never has: the null object."""

    def __init__(self, *, ends_process: bool = False, tells: Callable[[], bool] = lambda: True) -> None:
        """A second Ctrl-C ends the process where `ends_process`, as the process is ours; else it is raised.

        Where not `tells()`, another process tells the user what is going on.
        """
        self.ends_process = ends_process
        self.tells = tells
        self._signum: int | None = None
        self._raises = False
        self._leaving: list[Callable[[], object]] = []

    @property
    def requested(self) -> bool:
        return self._signum is not None

    @property
    def signum(self) -> int | None:
        """The first signal that asked."""
        return self._signum

    def check(self) -> None:
        """Raises Interrupted where a signal has come."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends wherever it is, by Interrupted. Nothing in it may be half done for good."""
        before, self._raises = self._raises, True
        try:
            self.check()
            yield
        finally:
            self._raises = before
        self.check()  # what was raised may have been swallowed, as in a __del__

    def before_leaving(self, clean: Callable[[], object]) -> None:
        """Call this, too, when a second Ctrl-C ends the process."""
        self._leaving.append(clean)

    def receive(self, signum: int, _frame: object = None) -> None:
        """What the signals are connected to."""
        again = self._signum is not None and signum == signal.SIGINT
        self._signum = self._signum or signum
        if self._raises:
            self._raises = False  # a second one must not strike while the first is on its way out
            raise Interrupted(self._signum)
        if again and not self.ends_process:
            raise KeyboardInterrupt

    def leave(self) -> None:
        """End the process here and now, with its children."""
        for child in multiprocessing.active_children():
            child.kill()
            child.join(_SILENT_S)
        for clean in self._leaving:
            with suppress(Exception):
                clean()
        self.say("left at once")
        os._exit(128 + signal.SIGINT)

    def say(self, text: str) -> None:
        """By a system call: the main thread may be in the midst of a line of its own."""
        if self.tells():
            with suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


@contextmanager
def signals_raised() -> Iterator[None]:
    """STOP_SIGNALS are raised as Interrupted within the block, but those that are ignored or have a handler already.

    One is on its way out then, and of the others Ctrl-C alone strikes again.
    """
    mine = [signum for signum in STOP_SIGNALS if _in_main_thread() and signal.getsignal(signum) in _usual()]
    strike = _Raise()
    handlers = {signum: signal.signal(signum, strike) for signum in mine}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def leave_with(command: Callable[[], int]) -> NoReturn:
    """Run a program and end with its exit code.

    Signals that ask to stop do nothing but where the program listens: its last words are said whatever comes meanwhile.
    Once all is said and saved, a further Ctrl-C changes nothing either.
    """
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    heeded = [signum for signum, handler in before.items() if handler in _usual()]
    for signum in heeded:
        signal.signal(signum, _spent)
    code = command()
    for signum in heeded:
        if signum != signal.SIGINT:  # one that asks again means what is left of the process
            signal.signal(signum, before[signum])
        elif code >= 128:
            signal.signal(signum, signal.SIG_IGN)
    sys.exit(code)


def _usual() -> tuple:
    """Handlers of signals that nobody has a use for."""
    return signal.SIG_DFL, signal.default_int_handler, _spent


def _spent(_signum: int, _frame: object) -> None:
    """Where there is nothing to stop any more."""


class _Raise:
    """The handler of `signals_raised`."""

    def __init__(self) -> None:
        self._first: int | None = None

    def __call__(self, signum: int, _frame: object) -> None:
        again, self._first = self._first is not None, self._first or signum
        if not again or signum == signal.SIGINT:
            raise Interrupted(self._first)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stop_signals(*, ends_process: bool = False, tells: Callable[[], bool] = lambda: True) -> Iterator[StopRequest]:
    """STOP_SIGNALS make a request of themselves within the block; see StopRequest for a second Ctrl-C and for `tells`.

    Those that are ignored stay so, as under nohup, and so do those that somebody handles. Outside of the main thread,
    which alone may ask for signals, nothing is ever requested.
    """
    stop = StopRequest(ends_process=ends_process, tells=tells)
    if not _in_main_thread():
        yield stop
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_listen, args=(stop, reader), name="signals", daemon=True)
    thread.start()
    now = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    heeded = [signum for signum, handler in now.items() if handler in _usual() or isinstance(handler, _Raise)]
    handlers = {signum: signal.signal(signum, stop.receive) for signum in heeded}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in handlers.items():  # one is on its way out: another is not to take its place
            signal.signal(signum, _spent if stop.requested and isinstance(handler, _Raise) else handler)
        writer.send(_END)  # closing it is no end to whoever was forked meanwhile
        thread.join()
        writer.close()
        reader.close()


_END = b"\0"  # no signal has this number


def _listen(stop: StopRequest, reader: socket.socket) -> None:
    """Hears of signals as they come, until _END does."""
    asked = announced = False
    first = math.inf  # when the first Ctrl-C came
    while True:
        waits = asked and not announced
        if not select.select([reader], [], [], _SILENT_S if waits else None)[0]:
            announced = True
            stop.say("stopping as soon as this step is done; a second Ctrl-C does not wait for it")
            continue
        numbers, now = reader.recv(64), time.monotonic()
        if _END in numbers:
            return
        asked = asked or any(number in STOP_SIGNALS for number in numbers)
        if signal.SIGINT in numbers:
            if now - first > _ONE_PRESS_S and stop.ends_process:
                stop.leave()
            first = min(first, now)


def end_with_parent() -> None:
    """Let Linux kill this child process as soon as the one that started it is gone, were it by SIGKILL."""
    parent = multiprocessing.parent_process()
    _at_death_of_parent(signal.SIGKILL)
    if parent is not None and not parent.is_alive():  # it was gone before
        os._exit(1)


def stop_with_parent(parent: int | None = None) -> None:
    """Let Linux ask this process to stop, by SIGTERM, as soon as the one that started it is gone.

    If it is gone already that is now; which takes its id to know, as this process has been given another parent then.
    """
    before = os.getppid() if parent is None else parent
    if _at_death_of_parent(signal.SIGTERM) and os.getppid() != before:
        signal.raise_signal(signal.SIGTERM)


def _at_death_of_parent(signum: int) -> bool:
    """Whether the system will send this process a signal then: Linux does."""
    with suppress(AttributeError, OSError, TypeError):  # TypeError: Windows, where there is no such library
        return ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signum) == 0
    return False


def signals_to_main_thread() -> None:
    """Let no STOP_SIGNALS come to this thread, nor to processes that it starts, before they call `hear_signals`."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def hear_signals() -> None:
    """STOP_SIGNALS come from now on, and those that have come since such a process was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """For the start of child processes: they never hear of STOP_SIGNALS, and this process does when all have started.

    Children inherit what is blocked, for good: what asks to stop is the main process's alone, though it may be sent to
    the whole group. Here, the system may hand a signal to any other thread, so the handlers wait as well.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    came: list[int] = []
    handlers = {signum: signal.signal(signum, lambda signum, _: came.append(signum)) for signum in _handled()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in came:
            handlers[signum](signum, None)


def _handled() -> list[int]:
    """Those that have a handler which this thread may change."""
    return [signum for signum in STOP_SIGNALS if _in_main_thread() and callable(signal.getsignal(signum))]
