"""Evaluate a detector: `python val.py --weights runs/train/exp/weights/best.pt --data my.yaml`.

`python val.py --help` lists the flags; `import val; val.run(weights=...)` returns the Metrics.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from utils.config import ValOptions, parse_flags, run_command
from utils.stopping import leave_with

if TYPE_CHECKING:
    from utils.structures import Metrics


def run(**options: Any) -> Metrics | None:
    """Evaluate with options by the names of the flags; None for `task="speed"`. Raises as `train.run` does."""
    from utils.evaluate.command import evaluate  # torch only now, so that --help is instant

    return evaluate(options)


def main() -> int:
    return run_command("val.py", lambda: run(**parse_flags(ValOptions, sys.argv[1:], program="val.py")))


if __name__ == "__main__":
    leave_with(main)
