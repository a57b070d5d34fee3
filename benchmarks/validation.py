"""One process: our `val.py` on a data set; how long the evaluation took and the whole command, as a line of JSON.

    python -m benchmarks.validation --weights best.pt --data COPY/bccd.yaml --imgsz 320 --batch-size 32 --threads 2

`images_per_second` is of the evaluation: from before its first batch is asked for, when no loader process runs yet,
until its figures are there. `command_seconds` begin before torch is imported, and end with val.py.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def validation_flags(description: str | None) -> argparse.ArgumentParser:
    """Those that both sides take."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True, help="folder for results")
    parser.add_argument("--save-json", action="store_true")
    return parser


def figures(command_seconds: float, seconds: float, images: int, *, ap: float, ap50: float) -> dict[str, Any]:
    return {
        "images_per_second": images / seconds,
        "seconds": seconds,
        "command_seconds": command_seconds,
        "images": images,
        "ap": ap,
        "ap50": ap50,
    }


def main() -> None:
    flags = validation_flags(__doc__).parse_args()
    import torch

    import val
    from utils.evaluate.evaluator import Evaluator

    torch.set_num_threads(flags.threads)
    spent = []
    evaluation = Evaluator.evaluation

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = evaluation(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    Evaluator.evaluation = timed
    metrics = val.run(
        weights=flags.weights,
        data=flags.data,
        imgsz=flags.imgsz,
        batch_size=flags.batch_size,
        workers=flags.workers,
        device="cpu",
        noplots=True,
        quiet=True,
        save_json=flags.save_json,
        project=flags.out,
        name="ours",
        exist_ok=True,
        cache_dir=str(Path(flags.out) / "cache"),
    )
    command_seconds = time.perf_counter() - _START
    print(
        json.dumps(figures(command_seconds, spent[0], metrics.images, ap=metrics.map50_95, ap50=metrics.map50)),
        flush=True,
    )


if __name__ == "__main__":
    main()
