"""Detect objects: `python detect.py --weights runs/train/exp/weights/best.pt --source photos/`.

`python detect.py --help` lists the flags; `import detect; detect.run(weights=..., source=...)` does the same. For boxes
in Python see `models.yolo.load`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from utils.config import DetectOptions, parse_flags, run_command
from utils.stopping import leave_with

if TYPE_CHECKING:
    from utils.evaluate.detect_command import Summary


def run(**options: Any) -> Summary:
    """Detect with options by the names of the flags; raises as `train.run` does."""
    from utils.evaluate.detect_command import detect  # torch only now, so that --help is instant

    return detect(options)


def main() -> int:
    return run_command("detect.py", lambda: run(**parse_flags(DetectOptions, sys.argv[1:], program="detect.py")))


if __name__ == "__main__":
    leave_with(main)
