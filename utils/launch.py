"""What a rank knows of those that were started with it: read from the environment that torch's launchers set."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.structures import UserError

_LAUNCHER = "NPROC_LAUNCHER"  # ours: the id of the process that `launch` started a rank from
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NO_ID = "none"  # torch's where several hosts meet at an address that was given, and nobody named the run
_START_TIME = 19  # of the fields that follow a process's name in /proc/PID/stat
_HOW = "start ranks with `--nproc N`, or `python -m torch.distributed.run --nproc_per_node N train.py ...`"


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that a launcher started."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int  # on this host; all ranks, where an old launcher does not say
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
        raise UserError(f"{there} in the environment, but not {', '.join(missing)}: {_HOW}")
    ranks = _number(environ, "WORLD_SIZE", low=1)
    local_ranks = _number(environ, "LOCAL_WORLD_SIZE", default=ranks, low=1, high=ranks)
    _number(environ, "MASTER_PORT", low=1, high=65535)
    run_id = environ.get("TORCHELASTIC_RUN_ID", "").strip()
    return Place(
        rank=_number(environ, "RANK", low=0, high=ranks - 1),
        ranks=ranks,
        local_rank=_number(environ, "LOCAL_RANK", low=0, high=local_ranks - 1),
        local_ranks=local_ranks,
        launch=_agent() if run_id == _NO_ID else run_id,
        restarts=_number(environ, "TORCHELASTIC_RESTART_COUNT", default=0, low=0),
        ours=_LAUNCHER in environ,
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


def _agent() -> str:
    """Who started this process: host, process id, and on Linux when that process started, as ids come again."""
    parent, started = os.getppid(), ""
    with suppress(OSError, IndexError):
        # the name before it, in brackets, may hold spaces and brackets
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[_START_TIME]
    return "-".join(part for part in (socket.gethostname(), str(parent), started) if part)
