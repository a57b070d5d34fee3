"""Sweeps of several kinds with the same processor time each: what their best is worth on fresh seeds.

`python -m benchmarks.evolve_bccd` evolves how bccd is learned for six more epochs, from weights that were trained for
forty. A sweep is a `train.py --evolve` that is stopped when its time is used up. Of its trials up to then, and up to
a third of then, the best three and the default are trained again on fresh seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from benchmarks.cases import BCCD
from benchmarks.results import FOLDER, describe_machine
from benchmarks.workers import ROOT

KINDS = {  # what differs
    "default": (),
    "unpruned": ("--evolve-pruner", "none"),
    "classic": ("--evolve-sampler", "classic", "--evolve-pruner", "none"),
}
FRESH = (101, 102, 103)  # seeds
SHARES = (1 / 3, 1.0)  # of the time
BEST = 3
COMMON = ("--data", str(BCCD), "--imgsz", "160", "--device", "cpu", "--workers", "1", "--quiet", "--noplots")
_LOOK_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Sweep:
    """A sweep, and when its trials were done, in seconds of processor time."""

    kind: str
    seed: int
    folder: Path
    done_at: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"

    def rows(self) -> list[dict[str, str]]:
        return rows_of(self.folder / self.name)

    def best(self, seconds: float) -> list[dict[str, str]]:
        """The best complete trials of those that were done by then."""
        rows = self.rows()[: sum(done <= seconds for done in self.done_at)]
        complete = [row for row in rows if row["state"] == "complete" and row["trial"] != "0"]
        return sorted(complete, key=lambda row: -float(row["fitness"]))[:BEST]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Of evolve.csv, as far as it is there."""
    path = folder / "evolve.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name.strip(): cell.strip() for name, cell in row.items()} for row in csv.DictReader(file)]


def train(*flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *COMMON, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def processor_s(pid: int) -> float:
    """Of a process, its children, and theirs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / _TICKS  # user and system time, and those of children that have ended
    return own + sum(processor_s(int(child)) for child in children)


def run(sweep: Sweep, base: Path, epochs: int, seconds: float) -> Sweep:
    process = train(
        *("--evolve", "100000", "--evolve-confirm", "0", "--project", str(sweep.folder), "--name", sweep.name),
        *("--weights", str(base), "--epochs", str(epochs), "--seed", str(sweep.seed), *KINDS[sweep.kind]),
    )
    used = 0.0
    while used < seconds and process.poll() is None:
        time.sleep(_LOOK_S)
        used = max(used, processor_s(process.pid))
        sweep.done_at += [used] * (len(sweep.rows()) - len(sweep.done_at))
    process.send_signal(signal.SIGTERM)  # Ctrl-C may be ignored, as in the background of a shell
    process.wait()
    return sweep


def fitness(hyp: dict, seed: int, base: Path, epochs: int, folder: Path) -> float:
    """Of a training run with these hyperparameters: a sweep of nothing but what it is given."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "hyp.yaml"
        path.write_text(yaml.safe_dump(hyp))
        process = train(
            *("--evolve", "1", "--evolve-confirm", "0", "--evolve-pruner", "none", "--project", temporary),
            *("--weights", str(base), "--epochs", str(epochs), "--seed", str(seed), "--hyp", str(path)),
        )
        process.wait()
        (row,) = rows_of(Path(temporary) / "exp")
    return float(row["fitness"] or "nan")


def hyp_of(row: dict[str, str], given: dict) -> dict:
    return {name: float(row[name]) if row.get(name) else value for name, value in {**given, "anchors": 3.0}.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="processor time of a sweep")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["default", "classic"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "evolve-bccd")
    args = parser.parse_args(argv)
    folder, seconds = args.folder, 60 * args.minutes
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    base = folder / "base" / "weights" / "best.pt"
    if not base.exists():
        train("--epochs", "40", "--project", str(folder), "--name", "base", "--exist-ok").wait()
    sweeps = [Sweep(kind, seed, folder) for seed in args.seeds for kind in args.kinds]
    with ThreadPoolExecutor(2) as pool:
        sweeps = list(pool.map(lambda sweep: run(sweep, base, args.epochs, seconds), sweeps))
        given = yaml.safe_load((ROOT / "data" / "hyps" / "hyp.scratch.yaml").read_text())
        chosen = {  # each once, though it may be among the best at both times
            (sweep.name, row["trial"]): hyp_of(row, given)
            for sweep in sweeps
            for share in SHARES
            for row in sweep.best(share * seconds)
        }
        chosen["given", "0"] = {**given, "anchors": 3.0}
        jobs = [(key, seed) for key in chosen for seed in FRESH]
        values = pool.map(lambda job: fitness(chosen[job[0]], job[1], base, args.epochs, folder), jobs)
        confirmed: dict[tuple[str, str], list[float]] = {}
        for (key, _), value in zip(jobs, values):
            confirmed.setdefault(key, []).append(value)
    means = {key: statistics.mean(values) for key, values in confirmed.items()}
    report = {"machine": machine, "minutes": args.minutes, "epochs": args.epochs, "given": means["given", "0"]}
    print(f"given hyperparameters: {means['given', '0']:.4f}")
    report["sweeps"] = []
    for sweep in sweeps:
        entry = {**asdict(sweep), "folder": sweep.name, "states": [row["state"] for row in sweep.rows()]}
        for share in SHARES:
            top = [means[sweep.name, row["trial"]] for row in sweep.best(share * seconds)]
            entry[f"confirmed at {share:.2f}"] = max(top, default=None)
            entry[f"first confirmed at {share:.2f}"] = top[0] if top else None
            trials, best = sum(done <= share * seconds for done in sweep.done_at), max(top, default=0)
            print(f"{sweep.name:>10} {share:4.2f} of the time: {trials:3} trials, best confirmed {best:.4f}")
        report["sweeps"].append(entry)
    for kind in args.kinds:
        for share in SHARES:
            own = [
                one[f"confirmed at {share:.2f}"] or report["given"] for one in report["sweeps"] if one["kind"] == kind
            ]
            print(f"{kind}, {share:.2f} of the time: mean {statistics.mean(own):.4f}")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "evolve-bccd.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
