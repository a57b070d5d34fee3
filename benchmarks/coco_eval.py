"""COCO's twelve figures by three tools, in turn, on one thread: ours, pycocotools, and faster-coco-eval.

    python -m benchmarks.coco_eval [--quick] [--rounds 3] [--out FILE]

All read the same two JSON files and run in processes of their own, faster-coco-eval in .venv-peer. Counted are CPU time
and wall time from what a tool has loaded to the figures, and from the files to the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import FOLDER, describe_machine, figure, headline, table, write_json
from benchmarks.workers import ROOT, Measurement, first_failure, run_worker
from utils.structures import CocoFigures

_WIDTH, _HEIGHT = 640, 480  # of every image, px


@dataclass(frozen=True, kw_only=True)
class CaseSize:
    """How much there is to evaluate."""

    images: int
    detections: int  # per image
    classes: int
    labels: float = 7.0  # per image, on average, as in COCO

    @property
    def name(self) -> str:
        return f"{self.images:,} images x {self.detections} detections x {self.classes} classes"


FULL = CaseSize(images=5000, detections=100, classes=80)
QUICK = CaseSize(images=40, detections=100, classes=80)


def main() -> int:
    flags = _parser().parse_args()
    size = QUICK if flags.quick else FULL
    machine = describe_machine() | {"threads": 1}
    print(headline(machine, quick=flags.quick))
    with tempfile.TemporaryDirectory(prefix="bench-coco-") as scratch:
        files = write_case(size, Path(scratch))
        rounds = _play(files, 1 if flags.quick else flags.rounds, Path(flags.peer_python).absolute())
    tools = [summary(name, turns, rounds["ours"]) for name, turns in rounds.items()]
    print(f"\n{_seconds_table(size, tools)}\n\n{_figures_table(tools)}", flush=True)
    out = Path(flags.out) if flags.out else FOLDER / ("coco-eval-quick.json" if flags.quick else "coco-eval.json")
    write_json(out, {"machine": machine, "quick": flags.quick, "case": size.name, "tools": tools})
    print(f"\nAll figures: {out}")
    return 1 if any(tool["failed"] for tool in tools) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images, one round: shows that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tool")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peer/bin/python"), metavar="PATH")
    parser.add_argument("--out", default="", metavar="FILE", help="default: benchmarks/results/coco-eval.json")
    return parser


# ---- the case -----------------------------------------------------------------------------------------------------


def write_case(size: CaseSize, folder: Path) -> tuple[Path, Path]:
    """A COCO file and a results file as a middling detector at confidence 0.001 leaves it.

    Half of the detections lie around labels, most of these of the right class; the others lie anywhere. Images hold few
    classes, some of which are much more frequent than others; one label in a hundred is a crowd.
    """
    generator = np.random.default_rng(0)
    counts = generator.poisson(size.labels, size.images)
    image = np.repeat(np.arange(size.images), counts)
    frequency = 1 / np.arange(1, size.classes + 1) ** 0.8
    frequency /= frequency.sum()
    present = generator.choice(size.classes, (size.images, 3), p=frequency)  # (I, 3)
    classes = present[image, generator.integers(0, 3, len(image))]
    boxes = _boxes(generator, len(image))

    of = np.repeat(np.arange(size.images), size.detections)  # the image of each detection
    some = np.minimum(
        (np.cumsum(counts) - counts)[of] + (generator.random(len(of)) * counts[of]).astype(int), len(image) - 1
    )
    near = (generator.random(len(of)) < 0.5) & (counts[of] > 0)
    noise = generator.normal(0, 0.15, (len(of), 4)) * boxes[some][:, [2, 3, 2, 3]]
    around = boxes[some] + noise
    around[:, 2:] = np.maximum(around[:, 2:], 2)
    found = np.where(near[:, None], around, _boxes(generator, len(of)))
    right = near & (generator.random(len(of)) < 0.8)
    guess = np.where(right, classes[some], generator.choice(size.classes, len(of), p=frequency))
    scores = generator.beta(0.5, 3, len(of)) * np.where(near, 1, 0.5)
    return (
        _annotations(folder / "annotations.json", size, image, classes, boxes, generator.random(len(image)) < 0.01),
        _results(folder / "results.json", of, guess, found, scores),
    )


def _boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) xywh px of all sizes, most of them medium."""
    sides = np.exp(generator.normal(4, 1, (count, 2))).clip(4, 460)
    return np.concatenate([generator.random((count, 2)) * ([_WIDTH, _HEIGHT] - sides), sides], 1)


def _annotations(
    path: Path, size: CaseSize, image: np.ndarray, classes: np.ndarray, boxes: np.ndarray, crowd: np.ndarray
) -> Path:
    boxes = boxes.round(2)
    areas = (boxes[:, 2] * boxes[:, 3] * 0.6).round(2)  # of the object, which does not fill its box
    rows = zip(image.tolist(), classes.tolist(), boxes.tolist(), areas.tolist(), crowd.tolist())
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "width": _WIDTH, "height": _HEIGHT}
            for number in range(1, size.images + 1)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, size.classes + 1)],
        "annotations": [
            {
                "id": number,
                "image_id": of + 1,
                "category_id": kind + 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (of, kind, box, area, crowd) in enumerate(rows, 1)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def _results(path: Path, image: np.ndarray, classes: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> Path:
    rows = zip(image.tolist(), classes.tolist(), boxes.round(3).tolist(), scores.round(5).tolist())
    path.write_text(
        json.dumps(
            [{"image_id": of + 1, "category_id": kind + 1, "bbox": box, "score": one} for of, kind, box, one in rows]
        )
    )
    return path


# ---- turns --------------------------------------------------------------------------------------------------------


def _play(files: tuple[Path, Path], rounds: int, peer_python: Path) -> dict[str, list[dict[str, Any]]]:
    """The turns of each tool, all tools in every round."""
    given = ["--annotations", str(files[0]), "--results", str(files[1])]
    pythons = {"ours": Path(sys.executable), "pycocotools": Path(sys.executable), "faster-coco-eval": peer_python}
    played: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(rounds):
        for name, python in pythons.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            one = Measurement(
                section="coco", name=name, module="coco_turn", flags=["--tool", name, *given], python=python
            )
            played[name].append(run_worker(one, threads=1) if python.exists() else {"failed": f"{python} is missing"})
    return played


def summary(name: str, turns: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One tool's seconds, medians over rounds, its figures, and how many times ours it takes.

    `evaluate` is from what is loaded to the figures, `files` from the files to the figures.
    """
    failed = first_failure([*turns, *ours])
    if failed:
        return {"name": name, "failed": failed, "rounds": list(turns)}
    mine, others = _medians(turns), _medians(ours)
    ratios = {part: {clock: mine[part][clock] / others[part][clock] for clock in mine[part]} for part in mine}
    figures = np.array(turns[0]["figures"])
    return {
        "name": " ".join(filter(None, [name, turns[0]["version"]])),
        "failed": None,
        "seconds": mine,
        "ratio": ratios,
        "figures": figures.tolist(),
        "largest_difference": float(np.abs(figures - ours[0]["figures"]).max()),
        "rounds": list(turns),
    }


def _medians(turns: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    def median(clock: str, *parts: str) -> float:
        return statistics.median(sum(turn["seconds"][part][clock] for part in parts) for turn in turns)

    return {
        "evaluate": {clock: median(clock, "evaluate") for clock in ("cpu", "wall")},
        "files": {clock: median(clock, "load", "evaluate") for clock in ("cpu", "wall")},
    }


def _seconds_table(size: CaseSize, tools: Sequence[dict[str, Any]]) -> str:
    headers = [size.name, "CPU s", "x ours", "wall s", "x ours", "from files: CPU s", "x ours", "wall s", "x ours"]
    rows = []
    for tool in tools:
        if tool["failed"]:
            rows.append([f"{tool['name']}: {tool['failed']:.120}", *[""] * (len(headers) - 1)])
            continue
        cells = [
            figure(tool[kind][part][clock], 2)
            for part in ("evaluate", "files")
            for clock in ("cpu", "wall")
            for kind in ("seconds", "ratio")
        ]
        rows.append([tool["name"], *cells])
    return table(headers, rows)


def _figures_table(tools: Sequence[dict[str, Any]]) -> str:
    """The twelve of each tool, -1 for none, and the largest difference to ours."""
    done = [tool for tool in tools if not tool["failed"]]
    rows = [
        [item.name, *(f"{tool['figures'][place]:.12f}" for tool in done)]
        for place, item in enumerate(fields(CocoFigures))
    ]
    rows.append(["largest difference", *(f"{tool['largest_difference']:.1e}" for tool in done)])
    return table(["figure", *(tool["name"] for tool in done)], rows)


if __name__ == "__main__":
    sys.exit(main())
