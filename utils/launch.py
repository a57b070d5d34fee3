"""How ranks are started, what they know of it, and how they end; with runtime.py the only reader of os.environ.

The surprise: torch's agent works in a thread, where it leaves signals alone. It would give ranks half a minute.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from utils.machine import usable_cores
from utils.stopping import (
    STOP_SIGNALS,
    Interrupted,
    hear_signals,
    signals_to_main_thread,
    stop_signals,
    stop_with_parent,
)
from utils.structures import RunError, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Ours, which `launch` sets: the id of its process, and the file that is there once a signal has asked that to stop
_LAUNCHER, _ASKED = "NPROC_LAUNCHER", "NPROC_ASKED"
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ERROR_FILE = "error.json"  # of each rank, as torch names it
_ROOT = Path(__file__).resolve().parent.parent
_HERE = "127.0.0.1"  # not by name: no resolver, no IPv6
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has but this
_NO_ID = "none"  # torch's where several hosts meet at an address that was given, and nobody named the run
_START_TIME = 19  # of the fields that follow a process's name in /proc/PID/stat
_WATCH_S = 0.05  # between looks at the ranks: less than one takes to end, so that the first to end is known
_ASKED_S = 0.3  # that a launcher needs at most to hear of a signal
_LEAVE_S = 2.0  # that ranks have to go by themselves once they were told to do so at once
MISSED = " is gone; "  # how a rank says that another is; its step and what to do follow
_HOW = "start ranks with `--nproc N`, or `python -m torch.distributed.run --nproc_per_node N train.py ...`"


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that a launcher started."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int  # on this host; all ranks, where an old launcher does not say
    master: tuple[str, int]  # host and port where all meet
    served: bool  # by the launcher, at that port; else it is for the first rank to
    launch: str  # the same for all ranks of an agent, and after its restarts; "" where there is nothing like that
    restarts: int  # of the agent's ranks; not counted where hosts came or went
    ours: bool  # started by --nproc


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """None where no launcher started this process. Raises UserError for a part of what launchers set, or nonsense."""
    given = {name for name in _NEEDED if environ.get(name, "").strip()}
    if "LOCAL_RANK" not in given and _number(environ, "WORLD_SIZE", default=1, low=1) == 1:
        return None  # some containers and clusters set the others for one process, too
    if missing := [name for name in _NEEDED if name not in given]:
        there = "LOCAL_RANK is set" if "LOCAL_RANK" in given else f"WORLD_SIZE is {environ['WORLD_SIZE'].strip()}"
        raise UserError(f"{there} in the environment, but not {', '.join(missing)}: {_HOW}; for one process, unset it")
    ranks = _number(environ, "WORLD_SIZE", low=1)
    local_ranks = _number(environ, "LOCAL_WORLD_SIZE", default=ranks, low=1, high=ranks)
    run_id = environ.get("TORCHELASTIC_RUN_ID", "").strip()
    return Place(
        rank=_number(environ, "RANK", low=0, high=ranks - 1),
        ranks=ranks,
        local_rank=_number(environ, "LOCAL_RANK", low=0, high=local_ranks - 1),
        local_ranks=local_ranks,
        master=(environ["MASTER_ADDR"].strip(), _number(environ, "MASTER_PORT", low=1, high=65535)),
        served=environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True",
        launch=_id_of_agent() if run_id == _NO_ID else run_id,
        restarts=_number(environ, "TORCHELASTIC_RESTART_COUNT", default=0, low=0),
        ours=environ.get(_LAUNCHER, "").isdecimal(),
    )


def _number(
    environ: Mapping[str, str], name: str, *, default: int | None = None, low: int, high: int | None = None
) -> int:
    text = environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if text.isascii() and text.isdecimal() and low <= int(text) and (high is None or int(text) <= high):
        return int(text)
    limits = f"of {low} or more" if high is None else f"from {low} to {high}"
    raise UserError(f"{name}={text} in the environment: should be a whole number {limits}; {_HOW}")


def _id_of_agent() -> str:
    """Who started this process: host, process id, and on Linux when that process started, as ids come again."""
    parent, started = os.getppid(), ""
    with suppress(OSError, IndexError):
        # the name before it, in brackets, may hold spaces and brackets
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[_START_TIME]
    return "-".join(part for part in (socket.gethostname(), str(parent), started) if part)


# What launchers set, torch's and --nproc's
_OF_LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|(MASTER|TORCHELASTIC|NPROC)_\w+")


@contextmanager
def as_no_rank() -> Iterator[None]:
    """Processes that are started within the block know nothing of a launcher."""
    given = {name: value for name, value in os.environ.items() if _OF_LAUNCHERS.fullmatch(name)}
    for name in given:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(given)


# ---- a rank ---------------------------------------------------------------------------------------------------------


def place_if_any() -> Place | None:
    """For programs that have no use for ranks: what makes no sense in the environment is nothing to them."""
    with suppress(UserError):
        return place()
    return None


def tells_of_signals() -> bool:
    """Whether this process is the one to tell the user that a signal ends the work, and how it goes on: the first rank.

    With --nproc it keeps silent where none came from outside: another rank has failed, which the launcher tells.
    """
    here = place_if_any()
    if here is None or not here.ours:
        return here is None or here.rank == 0
    return here.rank == 0 and (_asked_to_stop() or os.getppid() != int(os.environ[_LAUNCHER]))


def _asked_to_stop() -> bool:
    """Whether the launcher was; a signal to all processes may be here first."""
    asked, end = Path(os.environ[_ASKED]), time.monotonic() + _ASKED_S
    while not asked.exists() and time.monotonic() < end:
        time.sleep(_WATCH_S)
    return asked.exists()


@contextmanager
def said_once() -> Iterator[None]:
    """A UserError within the block is one that all ranks come to alike, so the first of them is to say it."""
    try:
        yield
    except UserError as error:
        here = place_if_any()
        error.said_elsewhere = here is not None and here.local_rank > 0
        raise


def join(here: Place) -> None:
    """What a rank does first, once it handles signals: it stops when its launcher is gone."""
    stop_with_parent(int(os.environ[_LAUNCHER]) if here.ours else None)
    if here.ours:
        hear_signals()


def record(error: Exception) -> bool:
    """Write the error that ends this rank where its launcher looks for it. Whether that was possible."""
    now = time.time_ns()  # torch writes down whole seconds, and may be imported only now
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    with suppress(OSError, KeyError):
        try:
            raise error from (None if isinstance(error, UserError) else error.__cause__)
        except Exception:  # torch shows the way of what is being handled: for a mistake of the user it begins here
            get_error_handler().record_exception(error)
        os.utime(os.environ["TORCHELASTIC_ERROR_FILE"], ns=(now, now))
        return True
    return False


# ---- the launcher ---------------------------------------------------------------------------------------------------


def starts_ranks(nproc: int | None) -> bool:
    """Whether this process is to `launch` that many ranks; None where nobody asked for any.

    Raises UserError where it is a rank itself, and of another number.
    """
    here = place()
    if here is None:
        return nproc is not None and nproc > 1
    if nproc not in (None, here.local_ranks):
        raise UserError(
            f"--nproc {nproc}: another launcher has started {here.local_ranks} on this machine; leave it out"
        )
    return False


def refuse_ranks(program: str, nproc: Any) -> None:
    """Raises UserError where a call from Python asks for ranks, as it would have to start its caller anew."""
    if starts_ranks(nproc if isinstance(nproc, int) else None):
        raise UserError(f"nproc={nproc}: only a command line starts processes: python {program} --nproc {nproc} ...")


def launch(program: str, argv: Sequence[str], *, nproc: int) -> int:
    """Run a program of this project with these arguments as so many ranks on this machine; its exit code.

    A signal that asks to stop is passed on to the ranks, which tell the user of it; a second Ctrl-C ends them at once.
    Raises what ended the first rank that failed: the UserError or RunError that it has recorded, or that it was killed.
    Of a bug it shows the traceback.
    """
    folder = TemporaryDirectory(prefix="ranks_")
    asked = Path(folder.name) / "asked"
    with folder, stop_signals(ends_process=True, tells=lambda: False) as stop, _faults_named():
        ranks = _Ranks(_agent(program, argv, nproc, folder.name), asked)
        stop.check()  # not in between: an import of torch that an exception ends may end the process
        stop.before_leaving(ranks.end)
        stop.before_leaving(folder.cleanup)
        with _environment(**_for_ranks(nproc, asked)):
            ranks.start()
            while ranks.running:
                if stop.requested:
                    ranks.ask_to_stop(stop.signum)
        return _exit_code(ranks.failures(), _recorded(Path(folder.name)), stop.signum)


@contextmanager
def _faults_named() -> Iterator[None]:
    """What keeps ranks from being started becomes a RunError: they meet at a port, by torch's distributed part."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, ImportError)) and not type(error).__module__.startswith("torch."):
            raise
        raise RunError(f"--nproc: the ranks could not be started: {error.__cause__ or error}") from error


def _for_ranks(nproc: int, asked: Path) -> dict[str, str]:
    return {
        _LAUNCHER: str(os.getpid()),
        _ASKED: str(asked),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // nproc)),
    }


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables of this process, and of those that it starts, within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _agent(program: str, argv: Sequence[str], nproc: int, folder: str) -> LocalElasticAgent:
    """Torch's, as `torchrun --standalone` has it, for ranks that leave their errors in this folder."""
    level = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")  # sockets warn of each address that is not the right one
    with _environment(TORCH_CPP_LOG_LEVEL=level):
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.rendezvous import RendezvousParameters
        from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

        log = logging.getLogger("torch.distributed.elastic")
        log.addHandler(logging.NullHandler())
        log.propagate = False  # what there is to say the ranks say, or we do
        meeting = RendezvousParameters(
            backend="c10d", endpoint=f"{_HERE}:0", run_id=str(uuid.uuid4()), min_nodes=1, max_nodes=1, local_addr=_HERE
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=sys.executable,
            args=(str(_ROOT / program), *argv),
            rdzv_handler=get_rendezvous_handler(meeting),
            max_restarts=0,
            monitor_interval=_WATCH_S,
            local_addr=_HERE,
        )
        return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))


def _send_to_group(process: int, signum: int) -> None:
    (os.killpg if hasattr(os, "killpg") else os.kill)(process, signum)  # Windows has no groups


class _Ranks:
    """The processes of an agent, which it starts and watches in a thread."""

    def __init__(self, agent: LocalElasticAgent, asked: Path) -> None:
        """`asked` is the file that tells them of a signal from outside."""
        self._agent = agent
        self._asked = asked
        self._result: RunResult | Exception | None = None
        # Linux takes the thread for the parent of what it starts: it lives until all have ended
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        signals_to_main_thread()
        try:
            self._result = self._agent.run()
        except Exception as error:
            self._result = error

    @property
    def running(self) -> bool:
        """After a moment's wait."""
        self._thread.join(_WATCH_S)
        return self._thread.is_alive()

    def ask_to_stop(self, signum: int) -> None:
        """Once, as soon as all are there."""
        if not self._asked.exists() and self._ids():
            self._asked.touch()
            self._send(signum)

    def end(self) -> None:
        """Whatever they are at."""
        for signum in (signal.SIGINT, _KILL):
            self._send(signum)
            self._thread.join(_LEAVE_S)

    def _ids(self) -> list[int]:
        """None before all have started, and once all have ended."""
        ids = [worker.id for worker in self._agent.get_worker_group().workers]
        return ids if None not in ids and self._thread.is_alive() else []

    def _send(self, signum: int) -> None:
        """To the ranks and to their children."""
        for process in self._ids():
            with suppress(OSError):  # it has ended
                _send_to_group(process, signum)

    def failures(self) -> dict[int, ProcessFailure]:
        """By rank, those that ended the run; the first to end is first."""
        if isinstance(self._result, Exception):
            raise self._result
        return {} if self._result is None else self._result.failures


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a rank has written down of its end."""

    name: str  # of the error's class
    text: str
    traceback: str


def _recorded(folder: Path) -> list[_Recorded]:
    """In the order in which it happened. Torch's agent may know nothing of ranks that ended after the first."""
    files = sorted(folder.rglob(_ERROR_FILE), key=lambda path: path.stat().st_mtime_ns)
    errors = []
    for path in files:
        with suppress(ValueError):  # a rank was killed while it wrote this
            message = json.loads(path.read_text(encoding="utf-8"))["message"]
            name, _, text = message["message"].partition(": ")
            errors.append(_Recorded(name=name, text=text, traceback=message["extraInfo"]["py_callstack"]))
    return errors


def _exit_code(failures: Mapping[int, ProcessFailure], recorded: list[_Recorded], stopped_by: int | None) -> int:
    """Of all ranks together. Raises the error of the first that failed, if any is known."""
    if not failures:
        return 0
    rank, first = next(iter(failures.items()))
    if first.exitcode < 0 and stopped_by is None:
        # others may have said that they miss it, at which step, and how to go on
        missed = [one.text.partition(MISSED)[2] for one in recorded if MISSED in one.text]
        raise RunError("; ".join([_killed(rank, -first.exitcode), *missed[:1]]))
    if recorded:
        return _tell(recorded[0])
    if stopped_by is not None:
        return 128 + stopped_by
    signum = first.exitcode - 128
    if signum in STOP_SIGNALS:
        raise Interrupted(signum, f"the signal came to rank {rank} alone")
    if signum > 0:  # nobody reads what it prints
        return first.exitcode
    raise RunError(f"rank {rank} has ended with exit code {first.exitcode}")


def _killed(rank: int, signum: int) -> str:
    if signum == _KILL:
        return f"rank {rank} was killed (signal {signum:d}): out of memory? lower --batch-size, --workers or --nproc"
    names = {int(known): known.name for known in signal.Signals}
    return f"rank {rank} was ended by {names.get(signum, 'a signal')} (signal {signum})"


def _tell(error: _Recorded) -> int:
    """Raises what is a UserError or RunError; of anything else it shows the traceback, and returns the exit code."""
    for kind in (UserError, RunError):
        if error.name == kind.__name__:
            raise kind(error.text)
    sys.stderr.write(error.traceback)
    return 1
