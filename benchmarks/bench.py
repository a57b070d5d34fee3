"""`make bench`: what a step, the loader, an evaluation and a start cost on this machine; a table and a JSON file.

    python -m benchmarks.bench [--quick] [--only step] [--threads N] [--out FILE]

What is measured stands in cases.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import all_measurements
from benchmarks.results import FOLDER, describe_machine, figure, headline, table, write_json
from benchmarks.roofline import best_rate, floor_seconds, share_of_peak
from benchmarks.workers import Measurement, run_worker
from utils.machine import usable_cores

Rates = dict[str, dict[str, Any]]  # by device flag, what `benchmarks.rates` found


def main() -> int:
    flags = _parser().parse_args()
    machine = describe_machine() | {"threads": flags.threads}
    print(headline(machine, quick=flags.quick))
    rates = _rates(flags.threads, quick=flags.quick)
    print("\n" + _rates_table(rates))
    everything = all_measurements(flags.threads, on_gpu="0" in rates, quick=flags.quick)
    chosen = [one for one in everything if _wanted(one, flags.only)]
    if not chosen:
        print(f"bench: error: --only {' '.join(flags.only)} names no measurement; there is:", file=sys.stderr)
        for one in everything:
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
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
