"""What a trial costs besides its training and evaluation, and whether the worker of a sweep grows.

`python -m benchmarks.evolve_trials overhead` runs a sweep on bccd, and the same trials without it, one after another in
one process; the difference is processes, imports, data, networks, the study and its files. `... memory` runs a hundred
tiny trials and looks at the memory of the worker after each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cases import BCCD
from benchmarks.evolve_bccd import rows_of
from benchmarks.workers import ROOT

_OVERHEAD = {"data": str(BCCD), "imgsz": 160, "cfg": "yolov5n.yaml", "epochs": 2, "workers": 1, "quiet": True}
_LOOK_S = 0.05


def overhead(trials: int) -> None:
    """Prints seconds per trial; the first two, which look at the data, stay out."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [text for name, value in _OVERHEAD.items() for text in _flag(name, value)]
        process = _sweep(trials, folder, *flags, "--evolve-pruner", "none", "--noplots")
        path, ends = Path(folder) / "exp", []
        while process.poll() is None:
            ends += [time.monotonic()] * (len(rows_of(path)) - len(ends))
            time.sleep(_LOOK_S)
    whole = (ends[-1] - ends[1]) / (len(ends) - 2)
    alone = _training_and_evaluation(trials)
    print(f"a trial {whole:.2f} s, of which training and evaluation {alone:.2f} s: overhead {whole - alone:.2f} s")


def _training_and_evaluation(trials: int) -> float:
    from utils.config import TrainOptions, validated
    from utils.hyp import Hyperparameters, plain_values
    from utils.report.console import SilentConsole
    from utils.train.build import build_trial

    options = vars(validated(TrainOptions, _OVERHEAD))
    hyp = {**plain_values(Hyperparameters()), "anchors": 3.0}
    seconds = []
    for _ in range(trials - 1):
        trainer = build_trial(options, hyp, console=SilentConsole())
        began = time.monotonic()
        trainer.try_out((), lambda epoch, metrics: True)
        seconds.append(time.monotonic() - began)
    return sum(seconds[1:]) / len(seconds[1:])


def memory(trials: int) -> None:
    """Prints the resident memory of the worker in MB as trials pass."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--data", "data/shapes.yaml", "--imgsz", "32", "--epochs", "1", "--workers", "0", "--batch-size", "64")
        process = _sweep(trials, folder, *flags, "--evolve-pruner", "none")
        seen: list[float] = []
        while process.poll() is None:
            done = len(rows_of(Path(folder) / "exp"))
            if done > len(seen):
                seen += [_resident_mb(process.pid)] * (done - len(seen))
            time.sleep(_LOOK_S)
    for trial in sorted({0, 4, *range(9, len(seen), 10), len(seen) - 1}):
        print(f"after {trial + 1:4} trials {seen[trial]:7.1f} MB")


def _flag(name: str, value: object) -> list[str]:
    return ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]


def _sweep(trials: int, folder: str, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "--evolve", str(trials), "--evolve-confirm", "0"]
    return subprocess.Popen(
        [*command, "--project", folder, "--device", "cpu", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
        stdout=subprocess.DEVNULL,
    )


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "memory"))
    parser.add_argument("--trials", type=int, default=None, help="default: 8 for overhead, 100 for memory")
    args = parser.parse_args()
    overhead(args.trials or 8) if args.what == "overhead" else memory(args.trials or 100)
