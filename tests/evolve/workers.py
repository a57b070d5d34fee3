"""A worker of a study as a process, for tests that kill it: `-m tests.evolve.workers STORAGE FOLDER GOAL`.

Its trials last while there is a file `hold` in the folder, and what follows each of them while there is a file `pause`.
It prints `run NUMBER` and `end NUMBER`, and `done` when the goal is reached.
"""

import sys
import time
from pathlib import Path

from optuna.distributions import FloatDistribution
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.study import Study

from utils.evolve.record import StudyRecord
from utils.evolve.storage import Storage, open_storage
from utils.evolve.study import Outcome, TrialFailed, Watch, Worker, open_study
from utils.stopping import StopRequest

GENES = {"lr0": FloatDistribution(0.0, 1.0), "box": FloatDistribution(0.0, 1.0)}
HEARTBEAT_S, GRACE_S = 1, 3


def opened(given: str, folder: Path) -> tuple[Study, Storage]:
    storage = open_storage(given, folder, heartbeat_s=HEARTBEAT_S, grace_s=GRACE_S)
    return open_study("study", storage, sampler=RandomSampler(), pruner=NopPruner()), storage


class Printed(Watch):
    def __init__(self, study: Study, folder: Path) -> None:
        self._study, self._record = study, StudyRecord(folder, names=tuple(GENES))

    def started(self, number: int) -> None:
        print(f"run {number}", flush=True)

    def finished(self, number: int, trials: object) -> None:
        self._record.write(self._study, {})
        print(f"end {number}", flush=True)
        wait_for(self._record.folder / "pause")


def wait_for(file: Path) -> None:
    """To be removed."""
    while file.exists():
        time.sleep(0.02)


def main(given: str, folder: str, goal: str) -> None:
    study, storage = opened(given, Path(folder))

    def objective(values, report):
        wait_for(Path(folder) / "hold")
        time.sleep(0.1)
        report(1, values["lr0"], {"mAP_0.5": values["lr0"]})
        if values["lr0"] < 0.05:
            raise TrialFailed("too small")
        return Outcome(fitness=values["lr0"] + values["box"], results={"mAP_0.5": values["lr0"]}, epochs=2)

    worker = Worker(
        study=study,
        storage=storage,
        distributions=GENES,
        goal=int(goal),
        objective=objective,
        watch=Printed(study, Path(folder)),
        stop=StopRequest(),
        heartbeat_s=HEARTBEAT_S,
    )
    print("done" if worker.work() else "left", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
