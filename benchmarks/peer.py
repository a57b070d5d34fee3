"""`make bench-peer`: our training step, samples and val.py and those of the published yolov5 package in turn, A B A B.

    python -m benchmarks.peer [--quick] [--only step|loading|val|weights] [--rounds 3] [--relaxed] [--out FILE]

Steps work on the same synthetic batches, with as many threads; samples are made of the same data set on one core, and
CPU time counts. val.py of both has the same weights (`--weights`, or those of the newest run on BCCD) and images, and
what they detect is scored by pycocotools as well. Weights that the peer trains and writes are read by us, and what both
find with them is compared, box by box. Each turn is a process of its own; the peer's in its own environment,
which `make bench-peer` fills from requirements-peer.txt. It is measured as published (see peer_step.py,
peer_loading.py and peer_val.py).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import BCCD, CPU_STEPS, CUDA_STEPS, StepSize, step_measurement
from benchmarks.results import FOLDER, describe_machine, figure, headline, table, write_json
from benchmarks.val_case import val_case, validation_table, validator
from benchmarks.weights_case import weights_case, weights_table
from benchmarks.workers import ROOT, Measurement, comparison, run_worker
from utils.machine import usable_cores

_STEPS = 8  # that count, per turn
_FONT = "Arial.ttf"  # what the package would download for its plots

Rounds = dict[str, list[dict[str, Any]]]  # by contender, its figures round by round; the peer comes first


def main() -> int:
    flags = _parser().parse_args()
    peer_python = Path(flags.peer_python).absolute()  # not resolved: an environment's python is a link
    if not peer_python.exists():
        print(f"bench-peer: error: {peer_python} is missing: `make bench-peer` makes it", file=sys.stderr)
        return 2
    machine = describe_machine() | {"threads": flags.threads}
    print(headline(machine, quick=flags.quick))
    cases = []
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as scratch:
        environment = _peer_environment(peer_python, Path(scratch) / "config")
        turns = 1 if flags.quick else flags.rounds
        for size in _steps(flags):
            contenders = _contenders(size, flags, peer_python, environment)
            rounds = _play(contenders, turns, flags.threads, Path(scratch) / "compiled")
            cases.append({"case": size.name, **_compared(contenders, rounds)})
            print("\n" + _table(cases[-1]), flush=True)
        for name, contenders in _loading(flags, peer_python, environment, Path(scratch)).items():
            rounds = _play(contenders, turns, 1, Path(scratch) / "compiled")
            cases.append({"case": name, "contenders": [sampler(one, rounds) for one in contenders]})
            print("\n" + _loading_table(cases[-1]), flush=True)
        if flags.only in (None, "val"):
            cases += _validation(flags, peer_python, environment, Path(scratch))
        if flags.only in (None, "weights"):
            cases += _weights(flags, peer_python, environment, Path(scratch))
    out = Path(flags.out) if flags.out else FOLDER / ("peer-quick.json" if flags.quick else "peer.json")
    write_json(out, {"machine": machine, "quick": flags.quick, "rounds": flags.rounds, "cases": cases})
    print(f"\nAll figures: {out}")
    return 1 if any(turn["failed"] for case in cases for turn in case["contenders"]) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, one round: shows that it runs")
    parser.add_argument("--only", choices=("step", "loading", "val", "weights"), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--weights", default="", help="for val.py and its training; default: of the newest run on BCCD")
    parser.add_argument("--relaxed", action="store_true", help="also the peer without deterministic algorithms")
    parser.add_argument("--device", default="cpu", help="cpu, or 0: the first GPU")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: as many as there are cores")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peer/bin/python"), metavar="PATH")
    parser.add_argument("--out", default="", metavar="FILE", help="default: benchmarks/results/peer.json")
    return parser


# ---- turns --------------------------------------------------------------------------------------------------------


def _contenders(
    size: StepSize, flags: argparse.Namespace, peer_python: Path, environment: dict[str, str]
) -> list[Measurement]:
    """The peer first."""
    turn = {"device": flags.device, "amp": "auto", "threads": flags.threads, "steps": 2 if flags.quick else _STEPS}
    ours = [
        replace(step_measurement(size, compiled=compiled, **turn), name="ours --compile" if compiled else "ours")
        for compiled in (False, True)
    ]
    peers = [[], *([["--relaxed"]] if flags.relaxed else [])]
    return [
        *(
            Measurement(
                section="step",
                name=" ".join(["yolov5 7.0.14", *extra]),
                module="peer_step",
                flags=[*ours[0].flags, *extra],
                python=peer_python,
                environment=environment,
            )
            for extra in peers
        ),
        *ours,
    ]


def _steps(flags: argparse.Namespace) -> list[StepSize]:
    sizes = CPU_STEPS if flags.device == "cpu" else CUDA_STEPS
    return [size.toy if flags.quick else size for size in sizes if flags.only in (None, "step")]


def _loading(
    flags: argparse.Namespace, peer_python: Path, environment: dict[str, str], scratch: Path
) -> dict[str, list[Measurement]]:
    """By case, the peer's measurement and ours, on copies of a real data set: the peer writes beside it."""
    if flags.only not in (None, "loading"):
        return {}
    if not BCCD.is_file():
        print(f"no samples are measured: {BCCD} is missing", file=sys.stderr)
        return {}
    data = shutil.copytree(BCCD.parent, scratch / "bccd") / BCCD.name
    cases = {}
    for imgsz in (64,) if flags.quick else (640, 320):
        for cache in ("ram", "files"):
            given = ["--data", str(data), "--imgsz", str(imgsz), "--cache", cache]
            given += ["--samples", "4"] if flags.quick else []
            cases[f"mosaic {imgsz}, {cache}"] = [
                Measurement(
                    section="loading",
                    name="yolov5 7.0.14",
                    module="peer_loading",
                    flags=given,
                    python=peer_python,
                    environment=environment,
                ),
                Measurement(section="loading", name="ours", module="sample", flags=given),
            ]
    return cases


def _validation(
    flags: argparse.Namespace, peer_python: Path, environment: dict[str, str], scratch: Path
) -> list[dict[str, Any]]:
    """The comparison of val.py, told; none where there is nothing to compare with."""
    given = {"peer_python": peer_python, "environment": environment, "scratch": scratch, "threads": flags.threads}
    case = val_case(flags.weights, imgsz=64 if flags.quick else 320, **given)
    if isinstance(case, str):
        print(f"val.py is not compared: {case}", file=sys.stderr)
        return []
    contenders = [case.peer, case.ours]
    rounds = _play(contenders, 1 if flags.quick else flags.rounds, flags.threads, scratch / "compiled")
    judged = case.measured_aps()
    told = {"case": case.name, "contenders": [validator(one, rounds, judged) for one in contenders]}
    print("\n" + validation_table(told), flush=True)
    return [told]


def _weights(
    flags: argparse.Namespace, peer_python: Path, environment: dict[str, str], scratch: Path
) -> list[dict[str, Any]]:
    """What both find with weights that the peer wrote, told; none where there are no photographs."""
    given = {"peer_python": peer_python, "environment": environment, "scratch": scratch, "threads": flags.threads}
    case = weights_case(flags.weights, imgsz=64 if flags.quick else 320, **given)
    if isinstance(case, str):
        print(f"weights are not compared: {case}", file=sys.stderr)
        return []
    told = {"case": "weights of the peer", "contenders": case.compared()}
    print("\n" + weights_table(told["contenders"]), flush=True)
    return [told]


def _peer_environment(peer_python: Path, folder: Path) -> dict[str, str]:
    """What the package needs to be content with itself: a font where it looks for one, no installing, old loading."""
    folder.mkdir()
    fonts = peer_python.parent.parent.glob("lib/python*/site-packages/matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")
    shutil.copyfile(next(fonts), folder / _FONT)
    return {"YOLOV5_CONFIG_DIR": str(folder), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "YOLOv5_AUTOINSTALL": "false"}


def _play(contenders: list[Measurement], rounds: int, threads: int, compile_cache: Path) -> Rounds:
    """Every contender once per round; the compiler's cache is empty in the first round and warm afterwards."""
    played: Rounds = {one.name: [] for one in contenders}
    for number in range(rounds):
        for one in contenders:
            print(f"round {number + 1} of {rounds}: {one.name}", file=sys.stderr, flush=True)
            played[one.name].append(run_worker(one, threads=threads, compile_cache=compile_cache))
    return played


# ---- ratios -------------------------------------------------------------------------------------------------------


def _compared(contenders: list[Measurement], rounds: Rounds) -> dict[str, Any]:
    return {"contenders": [contender(one, rounds[one.name], rounds[contenders[0].name]) for one in contenders]}


def contender(one: Measurement, mine: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's figures: medians over rounds, and their ratios to the peer's. `ratio_range` is of single rounds.

    Memory above 1 means that ours takes more.
    """
    summary = comparison(one, mine, peers)
    if summary["failed"]:
        return summary
    pairs = list(zip(mine, peers))
    ratios = [turn["images_per_second"] / peer["images_per_second"] for turn, peer in pairs]
    rate, peer_rate = (_median(turns, "images_per_second") for turns in (mine, peers))
    return summary | {
        "images_per_second": rate,
        "ratio": rate / peer_rate,
        "ratio_range": [min(ratios), max(ratios)],
        **{f"{kind}_mib": _memory(mine, kind) for kind in ("steps_add", "steps_peak", "peak")},
        **{
            f"{kind}_ratio": _divided(_memory(mine, kind), _memory(peers, kind)) for kind in ("steps_add", "steps_peak")
        },
    }


def _median(turns: list[dict[str, Any]], name: str) -> float:
    return statistics.median(turn[name] for turn in turns)


def _memory(turns: list[dict[str, Any]], kind: str) -> float | None:
    """The most over rounds; on a GPU the same figure, what torch had allocated at most, for every kind."""
    if "cuda_peak_mib" in turns[0]:
        return max(turn["cuda_peak_mib"] for turn in turns)
    values = [turn["memory_mib"][kind] for turn in turns]
    return None if None in values else max(values)


def _divided(mine: float | None, peers: float | None) -> float | None:
    return mine / peers if mine is not None and peers else None


def sampler(one: Measurement, rounds: Rounds) -> dict[str, Any]:
    """One side's CPU time per sample, the median over rounds, and the peer's, who comes first, over it."""
    mine, peers = rounds[one.name], next(iter(rounds.values()))
    summary = comparison(one, mine, peers)
    if summary["failed"]:
        return summary
    ratios = [peer["cpu_ms"] / turn["cpu_ms"] for turn, peer in zip(mine, peers)]
    cpu_ms, peer_ms = (_median(turns, "cpu_ms") for turns in (mine, peers))
    return summary | {"cpu_ms": cpu_ms, "ratio": peer_ms / cpu_ms, "ratio_range": [min(ratios), max(ratios)]}


def _loading_table(case: dict[str, Any]) -> str:
    headers = [case["case"], "CPU ms per sample", "x peer", "single rounds", "OpenCV"]
    rows = []
    for one in case["contenders"]:
        if one["failed"]:
            rows.append([f"{one['name']}: {one['failed']:.120}", *[""] * (len(headers) - 1)])
            continue
        span = " to ".join(figure(ratio, 2) for ratio in one["ratio_range"])
        rows.append([one["name"], figure(one["cpu_ms"], 2), figure(one["ratio"], 2), span, one["rounds"][0]["opencv"]])
    return table(headers, rows)


def _table(case: dict[str, Any]) -> str:
    headers = [
        case["case"],
        "precision",
        "images/s",
        "x peer",
        "single rounds",
        "steps add MiB",
        "x peer",
        "peak MiB",
        "x peer",
        "first step s",
    ]
    return table(headers, [_row(one, len(headers)) for one in case["contenders"]])


def _row(one: dict[str, Any], columns: int) -> list[str]:
    if one["failed"]:
        return [f"{one['name']}: {one['failed']:.120}", *[""] * (columns - 1)]
    return [
        one["name"],
        one["rounds"][0]["precision"],
        figure(one["images_per_second"], 2),
        figure(one["ratio"], 2),
        " to ".join(figure(ratio, 2) for ratio in one["ratio_range"]),
        figure(one["steps_add_mib"], 0),
        figure(one["steps_add_ratio"], 2),
        figure(one["steps_peak_mib"], 0),
        figure(one["steps_peak_ratio"], 2),
        figure(one["rounds"][0]["first_step_seconds"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
