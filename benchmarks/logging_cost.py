"""What all logging of a run costs: TensorBoard, tables, pictures, the report.

`python -m benchmarks.logging_cost --data ../shared/datasets/bccd/bccd.yaml --imgsz 320 --epochs 60` trains with these
flags of train.py and times every call to the reporter of the run, and to its pictures.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from utils.config import TrainOptions, parse_flags
from utils.train.build import build_trainer


class Timed:
    """Stands for an object, and books the time of each call to it under a name."""

    def __init__(self, of: Any, seconds: Counter[str], calls: Counter[str], prefix: str = "") -> None:
        self._of, self._seconds, self._calls, self._prefix = of, seconds, calls, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        if name == "pictures":
            return Timed(value, self._seconds, self._calls, "pictures.")
        if not callable(value) or name.endswith("_bar"):
            return value
        return self._timed(self._prefix + name, value)

    def _timed(self, name: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - started
                self._calls[name] += 1

        return timed


def main() -> None:
    seconds, calls = Counter(), Counter()
    trainer = build_trainer(parse_flags(TrainOptions, sys.argv[1:], program="logging_cost"))
    trainer.report = Timed(trainer.report, seconds, calls)
    started = time.perf_counter()
    trainer.fit()
    whole = time.perf_counter() - started
    print(f"\n{'call':<28}{'times':>7}{'seconds':>10}{'share':>8}")
    rows = [*seconds.most_common(), ("all of them", sum(seconds.values())), ("the run", whole)]
    for name, spent in rows:
        print(f"{name:<28}{calls[name] or '':>7}{spent:>10.2f}{spent / whole:>8.2%}")


if __name__ == "__main__":
    main()
