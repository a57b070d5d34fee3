"""Train a detector: `python train.py --data my.yaml`, or `import train; train.run(data="my.yaml")`.

Without any flag it trains on the embedded data set. `python train.py --help` lists the flags.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import TrainOptions, run_on_ranks
from utils.launch import refuse_ranks, tells_of_signals
from utils.stopping import StopRequest, leave_with, stop_signals
from utils.structures import UserError

if TYPE_CHECKING:
    from utils.structures import Metrics

_OPTUNA = "optuna>=4.8,<6"  # as in requirements.txt; training does without


def run(**options: Any) -> Metrics | Path:
    """Train with options by the names of the flags, e.g. `run(data="my.yaml", imgsz=320)`; the metrics of best.pt.

    With `evolve` it is the file of the hyperparameters that were found.

    Raises ValueError (structures.UserError) with one line for anything that a user can mend, and KeyboardInterrupt
    (stopping.Interrupted), with the run saved, when a signal asks to stop.
    """
    refuse_ranks("train.py", options.get("nproc"))
    return _run(options)


def _run(options: dict[str, Any], *, ends_process: bool = False) -> Metrics | Path:
    with stop_signals(ends_process=ends_process, tells=tells_of_signals) as stop:
        if options.get("evolve") is not None:
            return _evolve(options, stop)
        from utils.train.build import build_trainer  # torch only now, so that --help is instant

        with stop.at_once():  # but for the import: broken off, torch's may end the process
            trainer = build_trainer(options, stop)
        return trainer.fit()


def _evolve(options: dict[str, Any], stop: StopRequest) -> Path:
    try:
        installed = metadata.version("optuna")
    except metadata.PackageNotFoundError:
        raise UserError(f"--evolve: is built on Optuna, which is not installed: pip install '{_OPTUNA}'") from None
    if tuple(map(int, installed.split(".")[:2])) < (4, 8):
        raise UserError(f"--evolve: Optuna {installed} is too old: pip install '{_OPTUNA}'")
    from utils.sweep.command import evolve

    return evolve(options, stop)


def main() -> int:
    return run_on_ranks("train.py", TrainOptions, lambda options: _run(options, ends_process=True))


if __name__ == "__main__":
    leave_with(main)
