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
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from tests.evolve.postgres import postgres  # noqa: F401 (a fixture)
from tests.evolve.workers import opened
from utils.evolve import storage as storage_file
from utils.evolve.history import FAILURE, SURPLUS, best, finished_of, is_lost
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
    bench = Bench(tmp_path)
    barrier, asked = threading.Barrier(3, timeout=20), Worker._asked

    def at_once(self):
        barrier.wait()
        return asked(self)

    def work():
        worker = Bench(tmp_path).worker(1, lambda values, report: time.sleep(0.5) or outcome(0.1))
        object.__setattr__(worker, "_asked", at_once.__get__(worker))
        worker.work()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [trial.number for trial in finished_of(bench.study)] == [0]
    assert not bench.trials(TrialState.RUNNING, TrialState.WAITING)
    assert bench.worker(3, lambda values, report: outcome(0.1)).work()
    assert len(finished_of(bench.study)) == 3


@pytest.mark.parametrize("heard_of", [True, False])
def test_a_trial_of_a_worker_that_was_killed_as_it_took_it_is_found_lost(tmp_path, heard_of):
    """Optuna takes a trial that runs without a heartbeat for running for ever."""
    bench = Bench(tmp_path, grace_s=1)
    with quiet_optuna():
        bench.worker(1, lambda values, report: outcome(0.1))._asked() if heard_of else bench.study.ask(GENES)
    assert bench.worker(1, lambda values, report: outcome(0.2)).work()
    assert [trial.fitness for trial in finished_of(bench.study)] == [0.2]
    assert bench.trials()[1].params == bench.trials()[0].params


def test_a_worker_that_was_killed_as_it_told_of_a_failure_has_told_it(tmp_path):
    bench = Bench(tmp_path, grace_s=1)
    with quiet_optuna():
        trial = bench.worker(1, lambda values, report: outcome(0.1))._asked()
    trial.set_user_attr(FAILURE, "out of memory")
    time.sleep(2.5)
    assert bench.worker(2, lambda values, report: outcome(0.2)).work()
    assert [(one.number, one.failure) for one in finished_of(bench.study)] == [(0, "out of memory"), (1, "")]


def test_nothing_that_a_lost_trial_gave_is_taken_for_that_of_the_next(tmp_path):
    bench = Bench(tmp_path, SuccessiveHalvingPruner(min_resource=1, reduction_factor=2))
    tries = []

    def objective(values, report):
        tries.append(values)
        if len(tries) == 1:
            report(1, 0.9, {"mAP_0.5": 0.9})
            raise Interrupted(2)
        raise TrialFailed("no finite numbers")

    with pytest.raises(Interrupted):
        bench.worker(1, objective).work()
    assert bench.worker(1, objective).work()
    (trial,) = finished_of(bench.study)
    assert trial.results == {} and trial.fitness is None and trial.epochs == 0 and tries[0] == tries[1]


def test_a_signal_is_heeded_while_the_storage_is_away(bench, monkeypatch):
    stop = StopRequest()

    def away(study):
        stop.receive(15)
        raise optuna.exceptions.StorageInternalError("gone") from sqlalchemy.exc.OperationalError("", {}, Exception())

    monkeypatch.setattr(type(bench.storage), "fail_stale", lambda self, study: away(study))
    began = time.monotonic()
    with pytest.raises(Interrupted):
        bench.worker(1, lambda values, report: outcome(0.1), stop).work()
    assert time.monotonic() - began < 5


def test_a_storage_that_is_away_for_a_moment_costs_nothing(bench, monkeypatch):
    """Whichever call it is that meets with it."""
    monkeypatch.setattr(storage_file, "_PAUSE_S", 0.01)
    calls = []

    def flaky(call):
        def with_outage(*args, **kwargs):
            calls.append(call.__name__)
            if calls.count(call.__name__) == 2:
                raise optuna.exceptions.StorageInternalError("") from sqlalchemy.exc.OperationalError(
                    "", {}, Exception()
                )
            return call(*args, **kwargs)

        return with_outage

    for name in ("set_trial_user_attr", "set_trial_intermediate_value", "get_all_trials", "set_trial_state_values"):
        monkeypatch.setattr(bench.study._storage, name, flaky(getattr(bench.study._storage, name)))

    def objective(values, report):
        report(1, 0.1, {})
        return outcome(0.2)

    assert bench.worker(3, objective).work()
    assert [trial.fitness for trial in finished_of(bench.study)] == [0.2] * 3


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
def working(given: str, folder: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.evolve.workers", given, str(folder), str(GOAL)],
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


GOAL = 12


def number_after(word: str, process: subprocess.Popen) -> int:
    said, number = process.stdout.readline().split()
    assert said == word
    return int(number)


def three_workers_of_which_two_are_killed(given: str, folder: Path) -> None:
    """One in the midst of a trial, one between two trials; and another comes later."""
    hold, pause = folder / "hold", folder / "pause"
    hold.touch()
    pause.touch()
    with working(given, folder) as first, working(given, folder) as second, working(given, folder) as third:
        taken = [number_after("run", process) for process in (first, second, third)]
        assert len(set(taken)) == 3
        first.kill()
        hold.unlink()
        assert number_after("end", second) == taken[1]
        second.kill()
        second.wait()
        pause.unlink()
        with working(given, folder) as fourth:
            assert third.communicate(timeout=90)[0].endswith("done\n")
            assert fourth.communicate(timeout=90)[0].endswith("done\n")
    study, _ = opened(given, folder)
    trials, counted = study.get_trials(), finished_of(study)
    assert len(counted) == GOAL and not [trial for trial in trials if trial.state == TrialState.RUNNING]
    assert len({tuple(trial.values.items()) for trial in counted}) == GOAL  # none twice
    lost = [trial for trial in trials if is_lost(trial) and SURPLUS not in trial.user_attrs]
    assert [trial.number for trial in lost] == taken[:1]
    assert lost[0].params in [trial.values for trial in counted]
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
