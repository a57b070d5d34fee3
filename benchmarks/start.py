"""One process: seconds from starting Python to what a user waits for: the first optimizer step, the help, torch alone.

    python -m benchmarks.start first-step

The first start of each kind is not counted: it draws the embedded data set and fills the disk's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.first_step import SIGN
from benchmarks.workers import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    measure = _WHAT[flags.what]
    measure()
    seconds = [measure() for _ in range(flags.repeats)]
    print(
        json.dumps({"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "seconds": seconds}),
        flush=True,
    )


def _first_step() -> float:
    """`python train.py` with its usual options, but its run in a folder that vanishes."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        command = [sys.executable, "-m", "benchmarks.first_step", "--project", folder]
        start = time.perf_counter()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
            lines, seconds = [], None
            for line in process.stdout:
                if seconds is None and SIGN in line:
                    seconds = time.perf_counter() - start
                lines.append(line)
    if seconds is None:
        raise SystemExit("".join(lines))
    return seconds


def _help() -> float:
    return _whole(sys.executable, "train.py", "--help")


def _torch() -> float:
    return _whole(sys.executable, "-c", "import torch")


def _whole(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


_WHAT = {"first-step": _first_step, "help": _help, "torch": _torch}

if __name__ == "__main__":
    main()
