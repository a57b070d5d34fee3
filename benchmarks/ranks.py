"""Two ranks of one thread against one process of two: images/s of train.py, what ranks tell one another, an estimate.

    python -m benchmarks.ranks [--quick] [--only train traffic estimate] [--rounds 3] [--epochs 4] [--tflops 30]

Both sides train alike and in turn, by the command line, and timing.csv says how fast; its first epoch does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import BCCD
from benchmarks.estimate import TFLOPS, estimate_table
from benchmarks.product import placeholder_data
from benchmarks.results import FOLDER, describe_machine, figure, headline, table, write_json
from benchmarks.workers import ROOT, Measurement, first_failure, run_worker
from utils.machine import usable_cores

_AMPS = ("auto", "off")
_RANKS = 2
_LONGEST_S = 1800


def main(argv: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(argv)
    machine = describe_machine() | {"threads": usable_cores()}
    print(headline(machine, quick=flags.quick))
    content: dict[str, Any] = {"machine": machine, "quick": flags.quick}
    if "train" in flags.only:
        content["train"] = trained(flags)
        print("\n" + train_table(content["train"]), flush=True)
    if "traffic" in flags.only:
        content["traffic"] = traffic(quick=flags.quick)
        print("\n" + traffic_table(content["traffic"]), flush=True)
    if "estimate" in flags.only:
        print(f"\nBy arithmetic, were a GPU to reach {flags.tflops:g} TFLOP/s:\n{estimate_table(flags.tflops)}")
    out = Path(flags.out) if flags.out else FOLDER / ("ranks-quick.json" if flags.quick else "ranks.json")
    write_json(out, content)
    print(f"\nAll figures: {out}")
    rows = [*content.get("train", []), *content.get("traffic", [])]
    return 1 if any(row["failed"] for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("train", "traffic", "estimate")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that all of it runs, measures nothing")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3, help="of each training, in turn")
    parser.add_argument("--epochs", type=int, default=4, help="of each training; the first does not count")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of a GPU, for the estimate")
    parser.add_argument("--out", default="", metavar="FILE", help="default: benchmarks/results/ranks.json")
    return parser


# ---- train.py -------------------------------------------------------------------------------------------------------


def trained(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """For each precision and each side, images/s of its rounds."""
    sides = {"1 process": [], f"--nproc {_RANKS}": ["--nproc", str(_RANKS)]}
    rows = []
    with _data(quick=flags.quick) as data, tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        for amp in _AMPS[:1] if flags.quick else _AMPS:
            turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for number in range(1 if flags.quick else flags.rounds):
                for side, more in sides.items():
                    print(f"training: --amp {amp}, {side}", file=sys.stderr, flush=True)
                    run = Path(folder) / f"{amp}{number}{len(more)}"
                    turns[side].append(_trained(run, _command(data, flags, amp, more)))
            base, *_ = turns.values()
            for side, more in sides.items():
                command = shlex.join(["python", *_command(data, flags, amp, more)])
                rows.append({"amp": amp, "side": side, "command": command} | compared(turns[side], base))
    return rows


@contextlib.contextmanager
def _data(*, quick: bool) -> Iterator[str]:
    if quick:
        with placeholder_data(32) as data:
            yield data
    else:
        yield str(BCCD) if BCCD.is_file() else "data/shapes.yaml"


def _command(data: str, flags: argparse.Namespace, amp: str, more: Sequence[str]) -> list[str]:
    size = ["--imgsz", "64" if flags.quick else "320", "--batch-size", "16"]
    size += ["--epochs", str(2 if flags.quick else flags.epochs)]
    bare = ["--noautoanchor", "--noval", "--nosave", "--noplots", "--quiet"]
    machine = ["--workers", "2", "--device", "cpu", "--amp", amp]
    return ["train.py", "--data", data, "--cfg", "yolov5n.yaml", *size, *bare, *machine, *more]


def _trained(run: Path, command: Sequence[str]) -> dict[str, Any]:
    """One training, on as many threads as it takes by itself."""
    command = [sys.executable, *command, "--project", str(run.parent), "--name", run.name]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipes = {"capture_output": True, "text": True, "errors": "replace"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=_LONGEST_S, check=False, **pipes)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    [device] = re.findall(r"^(.*); writing to ", done.stdout, re.MULTILINE)
    return {"images_per_second": images_per_second(run / "timing.csv"), "device": device}


def images_per_second(timing: Path) -> float:
    """Of all epochs but the first, which are of equally many images."""
    with timing.open(encoding="utf-8", newline="") as file:
        rates = [float(row["images_per_s"]) for row in csv.DictReader(file, skipinitialspace=True)]
    return statistics.harmonic_mean(rates[1:])


def compared(turns: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of a side, and its ratio to that of the first one; the least and the greatest ratio of one round."""
    failed = first_failure([*turns, *base])
    if failed:
        return {"failed": failed}
    mine, theirs = ([turn["images_per_second"] for turn in side] for side in (turns, base))
    ratios = [one / other for one, other in zip(mine, theirs)]
    median = statistics.median(mine)
    return {
        "failed": None,
        "device": turns[0]["device"],
        "images_per_second": median,
        "rounds": mine,
        "ratio": median / statistics.median(theirs),
        "ratio_range": [min(ratios), max(ratios)],
    }


def train_table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ["train.py", "--amp", "images/s", "x one process", "single rounds"]
    return table(headers, [_train_row(row) for row in rows])


def _train_row(row: dict[str, Any]) -> list[str]:
    if row["failed"]:
        return [f"{row['side']}: {row['failed']:.120}", row["amp"], "", "", ""]
    least, most = row["ratio_range"]
    speeds = [figure(row["images_per_second"]), figure(row["ratio"], 2), f"{least:.2f} to {most:.2f}"]
    return [f"{row['side']}: {row['device']}", row["amp"], *speeds]


# ---- traffic --------------------------------------------------------------------------------------------------------


def traffic(*, quick: bool) -> list[dict[str, Any]]:
    """What `benchmarks.rank_step` finds, for each precision."""
    rows = []
    for amp in _AMPS[:1] if quick else _AMPS:
        size = ["--imgsz", "64" if quick else "320", "--batch-size", "4" if quick else "16"]
        steps = ["--steps", "1" if quick else "5", "--warmup", "1" if quick else "4"]
        one = Measurement(
            section="traffic",
            name=f"--amp {amp}",
            module="rank_step",
            flags=["--cfg", "yolov5n.yaml", *size, "--amp", amp, "--threads", "1", *steps],
            ranks=_RANKS,
        )
        print(f"measuring steps: {one.name}", file=sys.stderr, flush=True)
        found = run_worker(one, threads=1)
        rows.append({"name": one.name, "command": one.command, "failed": None} | found)
    return rows


def traffic_table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ["step of yolov5n", "MB per step", "all-reduces", "ms", "without", "share", "all-reduces alone ms"]
    return table(headers, [_traffic_row(row) for row in rows])


def _traffic_row(row: dict[str, Any]) -> list[str]:
    if row["failed"]:
        return [f"{row['name']}: {row['failed']:.120}", *[""] * 6]
    seconds = row["seconds"]
    return [
        row["name"],
        figure(row["bytes"] / 1e6, 2),
        str(sum(map(len, row["sizes"].values()))),
        figure(1e3 * seconds["talking"]),
        figure(1e3 * seconds["silent"]),
        f"{communication_share(seconds):.1%}",
        figure(1e3 * seconds["alone"]),
    ]


def communication_share(seconds: dict[str, float]) -> float:
    """Of a step: what it takes longer than one in which ranks work as much and say nothing."""
    return 1 - seconds["silent"] / seconds["talking"]


if __name__ == "__main__":
    sys.exit(main())
