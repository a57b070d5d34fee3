"""One measurement, one process: started clean, on as many threads as all the others, answering with a line of JSON."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LONGEST_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """`python -m benchmarks.MODULE FLAGS`, and what to call it."""

    section: str
    name: str
    module: str
    flags: Sequence[str]
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1  # processes that torch's launcher starts, of which one answers

    @property
    def arguments(self) -> list[str]:
        """Of Python."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        return [*(launcher if self.ranks > 1 else []), "-m", f"benchmarks.{self.module}", *self.flags]

    @property
    def command(self) -> str:
        """What a reader types to get this one again."""
        python = self.python.relative_to(ROOT) if self.python.is_relative_to(ROOT) else Path("python")
        return shlex.join([str(python), *self.arguments])


def comparison(one: Measurement, mine: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """What one side's figures begin with; `failed` is the first complaint of a turn of either side, or None."""
    failed = first_failure([*mine, *others])
    return {"name": one.name, "command": one.command, "failed": failed, "rounds": mine}


def first_failure(turns: Sequence[dict[str, Any]]) -> str | None:
    return next((turn["failed"] for turn in turns if "failed" in turn), None)


def run_worker(measurement: Measurement, *, threads: int, compile_cache: Path | None = None) -> dict[str, Any]:
    """The figures of a measurement, or {"failed": the last line of its complaint}.

    Without a `compile_cache` it compiles into an empty folder that vanishes, so no earlier run helps it.
    """
    command = [str(measurement.python), *measurement.arguments]
    with tempfile.TemporaryDirectory(prefix="bench-compiled-") as fresh:
        environment = {
            **os.environ,
            **measurement.environment,
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(compile_cache or fresh),
        }
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LONGEST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {_LONGEST_SECONDS} s"}
    if done.returncode:
        complaint = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        complaint = [line for line in complaint if line.startswith("[rank")] or complaint  # before the launcher's own
        return {"failed": complaint[-1] if complaint else f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])
