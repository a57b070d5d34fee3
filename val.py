"""Evaluate a detector: `python val.py --weights runs/train/exp/weights/best.pt --data my.yaml`.

`python val.py --help` lists the flags; `import val; val.run(weights=...)` returns the Metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.config import ValOptions, run_on_ranks
from utils.launch import refuse_ranks
from utils.stopping import leave_with, signals_held_back

if TYPE_CHECKING:
    from utils.structures import Metrics


def run(**options: Any) -> Metrics | None:
    """Evaluate with options by the names of the flags; None for `task="speed"`. Raises as `train.run` does."""
    refuse_ranks("val.py", options.get("nproc"))
    with signals_held_back():  # torch may end the process if its import is broken off
        from utils.evaluate.command import evaluate  # torch only now, so that --help is instant

    return evaluate(options)


def main() -> int:
    return run_on_ranks("val.py", ValOptions, lambda options: run(**options))


if __name__ == "__main__":
    leave_with(main)
