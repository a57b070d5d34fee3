"""One process, one tool: seconds from a COCO file and a results file to COCO's twelve figures.

    python -m benchmarks.coco_turn --tool ours --annotations truth.json --results found.json

The tools are imported before the clock starts. Parsed JSON is not yet "loaded": each tool turns it into what it works
on (COCO objects with their indices, or our tables), which counts to the loading.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Turn = tuple[Callable[[], Any], Callable[[Any], list[float]]]  # load the files; figures of what was loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tool", choices=tuple(TOOLS), required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    flags = parser.parse_args()
    load, evaluate = TOOLS[flags.tool](flags.annotations, flags.results)
    start = _now()
    loaded = load()
    between = _now()
    figures = evaluate(loaded)
    end = _now()
    spent = {
        "load": dict(zip(("cpu", "wall"), (between - start).tolist())),
        "evaluate": dict(zip(("cpu", "wall"), (end - between).tolist())),
    }
    version = None if flags.tool == "ours" else importlib.metadata.version(flags.tool)
    print(json.dumps({"version": version, "seconds": spent, "figures": figures}), flush=True)


def _now() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter()])


def _ours(annotations: Path, results: Path) -> Turn:
    from utils.evaluate.coco import CocoCase, CocoOptions, read_case
    from utils.evaluate.figures import coco_figures

    def evaluate(case: CocoCase) -> list[float]:
        figures = coco_figures(case.found, case.truth, case.classes)
        return [-1.0 if value is None else value for value in vars(figures).values()]

    return lambda: read_case(CocoOptions(annotations=annotations, results=results)), evaluate


def _pycocotools(annotations: Path, results: Path) -> Turn:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _as_published(COCO, COCOeval, annotations, results)


def _faster_coco_eval(annotations: Path, results: Path) -> Turn:
    from faster_coco_eval import COCO, COCOeval_faster

    return _as_published(COCO, COCOeval_faster, annotations, results)


def _as_published(coco: type, judge: type, annotations: Path, results: Path) -> Turn:
    """As the README files of both say."""

    def load() -> tuple[Any, Any]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco(str(annotations))
            return truth, truth.loadRes(str(results))

    def evaluate(loaded: tuple[Any, Any]) -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            one = judge(*loaded, iouType="bbox")
            one.evaluate()
            one.accumulate()
            one.summarize()
        return [float(value) for value in one.stats[:12]]

    return load, evaluate


TOOLS: dict[str, Callable[[Path, Path], Turn]] = {
    "ours": _ours,
    "pycocotools": _pycocotools,
    "faster-coco-eval": _faster_coco_eval,
}

if __name__ == "__main__":
    main()
