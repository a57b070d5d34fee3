"""`make bench`: what a step, the loader, an evaluation and a start cost on this machine; a table and a JSON file.

python -m benchmarks.bench [--quick] [--only step] [--threads N] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, describe_machine, figure, headline, table, write_json
from benchmarks.roofline import best_rate, floor_seconds, share_of_peak
from benchmarks.workers import ROOT, Measurement, run_worker, usable_cores
from utils.config import TrainOptions

Rates = dict[str, dict[str, Any]]  # by device flag, what `benchmarks.rates` found

_CPU_STEPS = (("yolov5n.yaml", 320, 16), ("yolov5s.yaml", 640, 8))
_CUDA_STEPS = (("yolov5s.yaml", 640, 64),)
_TOY = (64, 2)  # image size and batch size of quick steps
_BCCD = ROOT.parent / "shared" / "datasets" / "bccd" / "bccd.yaml"


def main() -> int:
    flags = _parser().parse_args()
    machine = describe_machine() | {"threads": flags.threads}
    print(headline(machine, quick=flags.quick))
    rates = _rates(flags.threads, quick=flags.quick)
    print("\n" + _rates_table(rates))
    chosen = [one for one in _measurements(rates, flags) if _wanted(one, flags.only)]
    if not chosen:
        print(f"bench: error: --only {' '.join(flags.only)} names no measurement; there is:", file=sys.stderr)
        for one in _measurements(rates, flags):
            print(f"  {one.section}: {one.name}", file=sys.stderr)
        return 2
    results = []
    for section in dict.fromkeys(one.section for one in chosen):
        of_section = [one for one in chosen if one.section == section]
        measured = [(one, _measured(one, flags.threads)) for one in of_section]
        results += measured
        headers, row = _TABLES[section]
        print("\n" + table(headers, [_row(row, one, figures, rates) for one, figures in measured]), flush=True)
    out = Path(flags.out) if flags.out else FOLDER / ("quick.json" if flags.quick else "bench.json")
    content = {
        "machine": machine,
        "quick": flags.quick,
        "rates": rates,
        "measurements": [
            {"section": one.section, "name": one.name, "command": one.command, "figures": figures}
            for one, figures in results
        ],
    }
    write_json(out, content)
    print(f"\nAll figures: {out}")
    return 1 if any("failed" in figures for _, figures in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that all of it runs, measures nothing")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="sections or whole names, e.g. step loader"
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: as many as there are cores")
    parser.add_argument("--out", default="", metavar="FILE", help="default: benchmarks/results/bench.json")
    return parser


def _wanted(one: Measurement, only: Sequence[str]) -> bool:
    return not only or one.section in only or one.name in only


def _measured(one: Measurement, threads: int) -> dict[str, Any]:
    print(f"measuring {one.section}: {one.name}", file=sys.stderr, flush=True)
    return run_worker(one, threads=threads)


# ---- what is measured ---------------------------------------------------------------------------------------------


def _rates(threads: int, *, quick: bool) -> Rates:
    """The CPU's rates, and those of the first GPU where there is one."""
    rates = {}
    for device in ("cpu", "0"):
        command = ["--device", device, "--threads", str(threads), *(["--quick"] if quick else [])]
        one = Measurement(section="rates", name=device, module="rates", flags=command)
        rates[device] = _measured(one, threads)
        if "failed" in rates[device]:
            raise SystemExit(f"bench: {one.command}: {rates[device]['failed']}")
        if not rates["cpu"]["cuda"]:
            break
    return rates


def _measurements(rates: Rates, flags: argparse.Namespace) -> list[Measurement]:
    return [
        *_steps(rates, flags.threads, quick=flags.quick),
        *_loaders(quick=flags.quick),
        *_evaluations(flags.threads, quick=flags.quick),
        *_starts(quick=flags.quick),
    ]


def _steps(rates: Rates, threads: int, *, quick: bool) -> list[Measurement]:
    cases = [("cpu", "auto", *size) for size in _CPU_STEPS]
    if "0" in rates:
        cases += [("0", amp, *size) for size in _CUDA_STEPS for amp in ("fp16", "bf16")]
    modes = [False, *([True] if can_compile() else [])]
    return [step_measurement(*case, threads, compiled=compiled, quick=quick) for case in cases for compiled in modes]


def can_compile() -> bool:
    return "compile" in {field.name for field in dataclasses.fields(TrainOptions)}


def step_measurement(
    device: str, amp: str, cfg: str, imgsz: int, batch_size: int, threads: int, *, compiled: bool, quick: bool
) -> Measurement:
    """The product's step; quick ones are of a toy size."""
    where = "" if device == "cpu" else f" {amp} on GPU {device}"
    name = f"{step_name(cfg, imgsz, batch_size, quick=quick)}{where}{' --compile' if compiled else ''}"
    if quick:
        imgsz, batch_size = _TOY
    flags = [
        *("--cfg", cfg),
        *("--imgsz", str(imgsz)),
        *("--batch-size", str(batch_size)),
        *("--device", device),
        *("--amp", amp),
        *("--threads", str(threads)),
        *step_counts(quick=quick),
        *(["--compile"] if compiled else []),
    ]
    return Measurement(section="step", name=name, module="step", flags=flags)


def step_name(cfg: str, imgsz: int, batch_size: int, *, quick: bool) -> str:
    imgsz, batch_size = _TOY if quick else (imgsz, batch_size)
    return f"{Path(cfg).stem} {imgsz} b{batch_size}"


def step_counts(*, quick: bool) -> list[str]:
    return ["--warmup", "1", "--steps", "2"] if quick else ["--warmup", "4", "--steps", "15"]


def _data_sets() -> dict[str, tuple[str, int]]:
    """Name: YAML and image size."""
    real = {"bccd 640": (str(_BCCD), 640)} if _BCCD.is_file() else {}
    return {"shapes 160": ("data/shapes.yaml", 160), **real}


def _loaders(*, quick: bool) -> list[Measurement]:
    return [
        Measurement(
            section="loader",
            name=f"{name}, {workers} loader process{'es' * (workers != 1)}",
            module="loading",
            flags=[
                *("--data", data),
                *("--imgsz", str(imgsz)),
                *("--workers", str(workers)),
                *("--batches", "8" if quick else "96"),
            ],
        )
        for name, (data, imgsz) in _data_sets().items()
        for workers in _worker_counts()
    ]


def _worker_counts() -> list[int]:
    """0, 1, 2, 4, ... up to the cores there are, 8 at most as is the default of train.py."""
    return [0, *(count for count in (1, 2, 4, 8) if count <= usable_cores())]


def _evaluations(threads: int, *, quick: bool) -> list[Measurement]:
    return [
        Measurement(
            section="evaluation",
            name=f"yolov5n {name}, {network}",
            module="evaluation",
            flags=[
                *("--data", data),
                *("--imgsz", str(imgsz)),
                *("--threads", str(threads)),
                *("--repeats", "1" if quick else "3"),
                *(["--weights", weights] if weights else []),
            ],
        )
        for name, (data, imgsz) in _data_sets().items()
        for network, weights in {"fresh": "", "trained": "newest"}.items()
    ]


def _starts(*, quick: bool) -> list[Measurement]:
    names = {
        "first-step": "python train.py to the first optimizer step",
        "help": "python train.py --help",
        "torch": "for comparison: python -c 'import torch'",
    }
    repeats = ["--repeats", "1" if quick else "5"]
    return [
        Measurement(section="start", name=name, module="start", flags=[what, *repeats]) for what, name in names.items()
    ]


# ---- tables -------------------------------------------------------------------------------------------------------


def _row(row: Callable[..., list[str]], one: Measurement, figures: dict[str, Any], rates: Rates) -> list[str]:
    missing = figures.get("failed") or figures.get("skipped")
    if missing:
        return [f"{one.name}: {missing:.120}", *[""] * (len(_TABLES[one.section][0]) - 1)]
    return [one.name, *row(one, figures, rates)]


def _rates_table(rates: Rates) -> str:
    rows = [
        [
            f"{found['device'].split(',')[0]}, {precision}",
            *(figure(rate, 0) for rate in of_precision.values()),
            figure(found["copy_gb_per_second"], 0),
        ]
        for found in rates.values()
        for precision, of_precision in found["gflop_per_second"].items()
    ]
    return table(["measured rates", "matrices GFLOP/s", "3x3 convolution GFLOP/s", "copy GB/s"], rows)


def _step_row(one: Measurement, figures: dict[str, Any], rates: Rates) -> list[str]:
    device = one.flags[one.flags.index("--device") + 1]
    rate = best_rate(rates[device], figures["precision"])
    memory, seconds = figures["memory_mib"], figures["seconds_median"]
    on_gpu = "cuda_peak_mib" in figures
    return [
        figures["precision"],
        figure(figures["images_per_second"]),
        figure(figures["images_per_second_best"]),
        figure(1000 * seconds, 0),
        figure(rate and 1000 * floor_seconds(figures["gflop"], rate), 0),
        figure(rate and 100 * share_of_peak(figures["gflop"], seconds, rate)),
        figure(memory["steps_add"], 0),
        figure(figures["cuda_peak_mib"] if on_gpu else memory["steps_peak"], 0),
        figure(figures["first_step_seconds"]),
        _waits(figures) if on_gpu else "-",
    ]


def _waits(figures: dict[str, Any]) -> str:
    """How often the host waits for the GPU within a step, by the profiler; `!` where torch's own check objects."""
    count = sum(figures["traced_waits_per_step"].values())
    return f"{count:g}{' !' if figures['synchronising_call'] else ''}"


def _loader_row(one: Measurement, figures: dict[str, Any], rates: Rates) -> list[str]:
    return [figure(figures["images_per_second"]), figure(figures["first_batch_seconds"], 2)]


def _evaluation_row(one: Measurement, figures: dict[str, Any], rates: Rates) -> list[str]:
    parts = [figure(figures["seconds"][part], 2) for part in ("loading", "network", "rest")]
    return [figure(figures["images_per_second"]), *parts, figure(figures["detections_per_image"])]


def _start_row(one: Measurement, figures: dict[str, Any], rates: Rates) -> list[str]:
    return [figure(figures["seconds_median"], 2), figure(figures["seconds_min"], 2)]


_TABLES: dict[str, tuple[list[str], Callable[..., list[str]]]] = {
    "step": (
        [
            "step",
            "precision",
            "images/s",
            "best",
            "ms",
            "floor ms",
            "% of peak",
            "adds MiB",
            "peak MiB",
            "first step s",
            "GPU waits",
        ],
        _step_row,
    ),
    "loader": (["loader", "images/s", "first batch s"], _loader_row),
    "evaluation": (
        ["evaluation", "images/s", "loading s", "network s", "NMS, matching s", "detections per image"],
        _evaluation_row,
    ),
    "start": (["start", "s", "best"], _start_row),
}

if __name__ == "__main__":
    sys.exit(main())
