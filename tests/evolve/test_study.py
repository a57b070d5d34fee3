"""Workers of a study: what counts, what is run again, and that killing them changes neither."""

import csv
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from tests.evolve.postgres import postgres  # noqa: F401 (a fixture)
from tests.evolve.workers import opened
from utils.evolve.history import best, finished_of, is_lost
from utils.evolve.storage import open_storage
from utils.evolve.study import Outcome, TrialFailed, Watch, Worker, open_study, quiet_optuna
from utils.hyp import read_hyp
from utils.stopping import Interrupted, StopRequest
from utils.structures import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
GENES = {"lr0": FloatDistribution(0.0, 1.0)}


class Bench:
    """A study in a folder, and workers on it."""

    def __init__(self, folder: Path, pruner=None, grace_s: int = 60) -> None:
        self.storage = open_storage("", folder, heartbeat_s=1, grace_s=grace_s)
        self.study = open_study("s", self.storage, sampler=RandomSampler(seed=0), pruner=pruner or NopPruner())
        self.ran: list[int] = []

    def worker(self, goal: int, objective, stop: StopRequest | None = None) -> Worker:
        bench = self

        class Listed(Watch):
            def started(self, number):
                bench.ran.append(number)

        return Worker(
            study=self.study,
            storage=self.storage,
            distributions=GENES,
            goal=goal,
            objective=objective,
            watch=Listed(),
            stop=stop or StopRequest(),
            heartbeat_s=0.2,
        )

    def trials(self, *states):
        return self.study.get_trials(states=states or None)


def outcome(fitness: float) -> Outcome:
    return Outcome(fitness=fitness, results={"mAP_0.5": fitness}, epochs=3)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_as_many_trials_are_run_as_there_should_be_and_no_more(bench):
    assert bench.worker(3, lambda values, report: outcome(values["lr0"])).work()
    assert bench.worker(3, lambda values, report: pytest.fail("there is nothing left to do")).work()
    assert bench.worker(5, lambda values, report: outcome(values["lr0"])).work()
    assert bench.ran == [0, 1, 2, 3, 4]
    assert [trial.fitness for trial in finished_of(bench.study)] == [
        trial.params["lr0"] for trial in bench.trials(TrialState.COMPLETE)
    ]


def test_failures_of_its_own_doing_count_and_say_why(bench):
    def objective(values, report):
        if len(bench.ran) == 2:
            raise TrialFailed("out of memory")
        return outcome(float("nan") if len(bench.ran) == 3 else 0.5)

    assert bench.worker(4, objective).work()
    states = [(trial.state, trial.failure) for trial in finished_of(bench.study)]
    assert states == [
        ("complete", ""),
        ("failed", "out of memory"),
        ("failed", "its fitness is nan"),
        ("complete", ""),
    ]
    assert best(finished_of(bench.study)).number == 0


def test_pruned_trials_count_but_are_never_the_best(tmp_path):
    bench = Bench(tmp_path, SuccessiveHalvingPruner(min_resource=1, reduction_factor=2))
    fitnesses = iter([0.5, 0.4, 0.9])

    def objective(values, report):
        fitness = next(fitnesses)
        report(1, fitness, {"mAP_0.5": fitness})
        return outcome(fitness / 10)

    assert bench.worker(3, objective).work()
    trials = finished_of(bench.study)
    assert [trial.state for trial in trials] == ["complete", "pruned", "complete"]
    assert trials[1].fitness == 0.4 and trials[1].epochs == 1 and trials[1].results == {"mAP_0.5": 0.4}
    assert best(trials).number == 2


def test_a_mistake_that_all_trials_would_meet_with_ends_the_work_and_costs_no_trial(bench):
    def objective(values, report):
        raise UserError("--data: not there")

    for _ in range(5):
        with pytest.raises(UserError, match="not there"):
            bench.worker(2, objective).work()
    assert not finished_of(bench.study)
    assert bench.worker(2, lambda values, report: outcome(0.1)).work()
    assert [trial.number for trial in finished_of(bench.study)] == [0, 1]


def test_an_interrupted_trial_is_run_again_with_its_values(bench):
    stop, seen = StopRequest(), []

    def objective(values, report):
        seen.append(values["lr0"])
        if len(seen) == 2:
            stop.receive(2)
            stop.check()
        return outcome(0.1)

    with pytest.raises(Interrupted):
        bench.worker(3, objective, stop).work()
    assert bench.worker(3, objective).work()
    assert seen[2] == seen[1] and len(set(seen)) == 3
    assert len(finished_of(bench.study)) == 3 and sum(map(is_lost, bench.trials())) == 1


def test_a_trial_is_run_again_three_times_at_most(bench):
    seen = []

    def objective(values, report):
        seen.append(values["lr0"])
        raise Interrupted(2)

    for _ in range(6):
        with pytest.raises(Interrupted):
            bench.worker(1, objective).work()
    assert len(set(seen[:4])) == 1 and seen[4] != seen[0]


def test_a_worker_that_others_took_for_lost_leaves_its_trial_to_them(bench):
    """As one that slept for longer than the grace period."""
    taken = []

    def objective(values, report):
        if not taken:
            taken.append(bench.trials(TrialState.RUNNING)[0])
            bench.storage.queue_again(bench.study, taken[0])
            report(1, 0.9, {})
            pytest.fail("it is no longer its own")
        return outcome(0.1)

    assert bench.worker(2, objective).work()
    trials = finished_of(bench.study)
    assert len(trials) == 2 and taken[0].params["lr0"] in [trial.values["lr0"] for trial in trials]
    assert taken[0].number not in [trial.number for trial in trials]


def test_workers_that_ask_for_the_last_trial_at_once_run_it_once(tmp_path):
    """The one that comes too late hands its trial back, which is there when the study is made longer."""
    bench = Bench(tmp_path)
    barrier = threading.Barrier(3)
    asked = Worker._asked

    def at_once(self):
        barrier.wait()
        return asked(self)

    def work(goal):
        worker = Bench(tmp_path).worker(goal, lambda values, report: time.sleep(0.5) or outcome(0.1))
        object.__setattr__(worker, "_asked", at_once.__get__(worker))
        worker.work()

    threads = [threading.Thread(target=work, args=(1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [trial.number for trial in finished_of(bench.study)] == [0]
    assert not bench.trials(TrialState.RUNNING)
    left = len(bench.trials(TrialState.WAITING))
    assert bench.worker(3, lambda values, report: outcome(0.1)).work()
    assert len(finished_of(bench.study)) == 3 and left <= 2
    assert [trial.number for trial in finished_of(bench.study)] == [0, 1, 2]


def test_a_trial_of_a_killed_worker_is_found_lost_though_it_was_killed_at_once(tmp_path):
    """Between asking and its first heartbeat; Optuna alone would take it for running for ever."""
    bench = Bench(tmp_path, grace_s=1)
    with quiet_optuna():
        bench.worker(1, lambda values, report: outcome(0.1))._asked()
    time.sleep(2.5)
    assert bench.worker(1, lambda values, report: outcome(0.2)).work()
    assert [trial.fitness for trial in finished_of(bench.study)] == [0.2]


def test_where_lost_trials_are_not_recognised_nobody_waits_for_them(tmp_path):
    storage = open_storage(f"journal:{tmp_path / 'study.log'}", tmp_path, heartbeat_s=1, grace_s=1)
    study = open_study("s", storage, sampler=RandomSampler(seed=0), pruner=NopPruner())

    def worker(goal):
        return Worker(
            study=study,
            storage=storage,
            distributions=GENES,
            goal=goal,
            objective=lambda values, report: outcome(0.1),
            watch=Watch(),
            stop=StopRequest(),
        )

    worker(3)._asked()  # and is never heard of again
    assert not worker(3).work()
    assert len(finished_of(study)) == 2


def test_a_study_tells_nothing_on_its_own(bench, capfd):
    bench.worker(2, lambda values, report: outcome(0.1)).work()
    assert capfd.readouterr() == ("", "")


# ---- killed workers -------------------------------------------------------------------------------------------------


@contextmanager
def working(given: str, folder: Path, goal: int, seconds: float):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.evolve.workers", given, str(folder), str(goal), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def kill(process: subprocess.Popen, *, after_lines: int, pause_s: float) -> None:
    """After it has begun so many trials, and a while."""
    for _ in range(after_lines):
        assert process.stdout.readline().startswith("run")
    time.sleep(pause_s)
    process.kill()
    process.wait()


GOAL = 16


def three_workers_of_which_two_are_killed(given: str, folder: Path) -> None:
    """One in the midst of a trial, one at about the end of one; and a third comes later."""
    with working(given, folder, GOAL, 0.3) as first, working(given, folder, GOAL, 0.3) as second:
        kill(first, after_lines=2, pause_s=0.15)
        kill(second, after_lines=2, pause_s=0.31)
        with working(given, folder, GOAL, 0.2) as third, working(given, folder, GOAL, 0.2) as fourth:
            assert third.communicate(timeout=90)[0].endswith("done\n")
            assert fourth.communicate(timeout=90)[0].endswith("done\n")
    study, _ = opened(given, folder)
    trials = study.get_trials()
    counted = finished_of(study)
    assert len(counted) == GOAL
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]
    assert len({tuple(trial.values.items()) for trial in counted}) == GOAL  # none twice
    lost = [trial for trial in trials if is_lost(trial)]
    again = {tuple(trial.params.items()) for trial in trials if not is_lost(trial)}
    assert 1 <= len(lost) <= 2 and all(tuple(trial.params.items()) in again for trial in lost)
    with (folder / "evolve.csv").open(newline="") as file:
        rows = [{name.strip(): cell.strip() for name, cell in row.items()} for row in csv.DictReader(file)]
    assert [int(row["trial"]) for row in rows] == [trial.number for trial in counted]
    winner = best(counted)
    assert read_hyp(folder / "hyp_evolved.yaml").lr0 == winner.values["lr0"]
    assert winner.fitness == study.best_value


def test_killed_workers_cost_no_trial_and_make_none_twice(tmp_path):
    three_workers_of_which_two_are_killed("", tmp_path)


def test_killed_workers_cost_no_trial_with_a_real_postgresql_server(postgres, tmp_path):  # noqa: F811
    three_workers_of_which_two_are_killed(postgres.url, tmp_path)


def test_optuna_opens_the_study_as_it_is(bench, tmp_path):
    bench.worker(2, lambda values, report: outcome(0.1)).work()
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert len(study.trials) == 2 and study.best_value == 0.1
