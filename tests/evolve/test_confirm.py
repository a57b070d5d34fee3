from __future__ import annotations

import json
import math
import threading

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from scipy import stats

from utils.evolve import confirm, storage
from utils.evolve.confirm import (
    CHANCE,
    Candidate,
    PairSampler,
    by_seed,
    candidates,
    comments,
    compare,
    distributions,
    fresh_seeds,
    plain_verdict,
    table,
    verdict,
)
from utils.evolve.history import FAILURE, SURPLUS, Finished, finished_of, is_lost
from utils.evolve.storage import open_storage

NAN = math.nan
START = {"lr0": 0.01, "mosaic": 1.0}

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning")


def done(number: int, fitness: float | None, state="complete", **values) -> Finished:
    values = values or {"lr0": 0.01 + number / 100, "mosaic": 1.0}
    return Finished(number=number, state=state, values=values, fitness=fitness, results={}, seconds=1.0, epochs=3)


# -------------------------------------------------------------------------------------------------------- candidates


def test_default_and_the_best_are_tried_again():
    trials = [done(0, 0.5, **START), done(1, 0.6), done(2, 0.9), done(3, 0.7), done(4, 0.8)]
    chosen = candidates(trials, START, 3)
    assert [one.name for one in chosen] == ["default", "trial 2", "trial 4", "trial 3"]
    assert [one.fitness for one in chosen] == [0.5, 0.9, 0.8, 0.7]
    assert chosen[0].values == START
    assert chosen[1].values == trials[2].values


def test_only_complete_and_distinct_trials_are_tried_again():
    twin = {"lr0": 0.05 * (1 + 1e-12), "mosaic": 1.0}
    trials = [
        done(1, 0.99, "pruned"),
        done(2, None, "failed"),
        done(3, 0.98, **START),  # the default once more, as when it was lost at first
        done(4, 0.97, lr0=0.05, mosaic=1.0),
        done(5, 0.97, **twin),
    ]
    assert [one.name for one in candidates(trials, START, 3)] == ["default", "trial 4"]


def test_trial_0_is_tried_again_where_it_has_more_than_the_default():
    first = done(0, 0.9, **START, anchors=3.0)
    chosen = candidates([first, done(1, 0.5)], {**START, "anchors": None}, 1)
    assert [one.name for one in chosen] == ["default", "trial 0"] and chosen[0].fitness is None


def test_nothing_complete_leaves_the_default():
    assert [one.name for one in candidates([], START, 3)] == ["default"]
    assert [one.name for one in candidates([done(1, 0.5)], START, 0)] == ["default"]


# ------------------------------------------------------------------------------------------------------------- pairs


def ask(study: optuna.Study, count: int, seeds: list[int]) -> optuna.Trial:
    return study.ask(distributions(count, seeds))


def new_study(count: int, seeds: list[int], storage=None) -> optuna.Study:
    sampler = PairSampler(count, seeds)
    return optuna.create_study(
        storage=storage, study_name="s", load_if_exists=True, direction="maximize", sampler=sampler
    )


def pair(trial) -> tuple[int, int]:
    return trial.params["candidate"], trial.params["seed"]


def test_all_candidates_come_before_the_second_seed():
    study = new_study(3, [5, 6])
    assert [pair(ask(study, 3, [5, 6])) for _ in range(6)] == [(0, 5), (1, 5), (2, 5), (0, 6), (1, 6), (2, 6)]


@pytest.mark.parametrize(("count", "seeds"), [(1, [1]), (1, [1, 2]), (2, [3])])
def test_single_candidates_and_seeds_are_pairs_too(count, seeds):
    study = new_study(count, seeds)
    asked = [pair(ask(study, count, seeds)) for _ in range(count * len(seeds))]
    assert asked == [(candidate, seed) for seed in seeds for candidate in range(count)]


def test_seeds_are_fresh():
    assert fresh_seeds(7, 3) == [8, 9, 10]
    assert 0 not in fresh_seeds(0, 5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_losses_are_made_up_for(data):
    """Whatever is lost, and whoever asks too late: when all is done, each pair has been run."""
    count, seeds, running = 3, [1, 2], []
    goal = count * len(seeds)
    study = new_study(count, seeds)

    def counted():
        return [trial for trial in study.trials if not is_lost(trial)][:goal]

    for _ in range(200):
        if len(counted()) == goal and all(trial.state.is_finished() for trial in counted()):
            break
        asks = not running or (len(running) < 4 and data.draw(st.booleans()))
        if asks:
            trial = ask(study, count, seeds)
            if trial.number in [one.number for one in counted()]:
                running.append(trial)
            else:  # as a worker does that was too late
                trial.set_user_attr(SURPLUS, True)
                study.tell(trial, state=TrialState.FAIL)
            continue
        trial = running.pop(data.draw(st.integers(0, len(running) - 1)))
        fate = data.draw(st.sampled_from(["done", "failed", "lost", "lost"]))
        if fate == "failed":
            trial.set_user_attr(FAILURE, "out of memory")
        study.tell(trial, *([1.0] if fate == "done" else [None, TrialState.FAIL]))
        if fate == "lost":
            storage._retry(study, study.trials[trial.number])
    else:
        return  # very unlucky
    trials = [trial for trial in finished_of(study) if trial.number in [one.number for one in counted()]]
    fitnesses = by_seed(trials, count)
    assert [sorted(own) for own in fitnesses] == [seeds] * count


def test_workers_share_the_pairs(tmp_path):
    count, seeds, taken = 3, [1, 2, 3, 4], []
    new_study(count, seeds, open_storage("", tmp_path, heartbeat_s=1, grace_s=60).backend)

    def work() -> None:
        study = new_study(count, seeds, open_storage("", tmp_path, heartbeat_s=1, grace_s=60).backend)
        taken.extend(pair(ask(study, count, seeds)) for _ in range(4))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == [(candidate, seed) for candidate in range(count) for seed in seeds]


def test_trial_that_another_is_asking_for_has_its_pair():
    study = new_study(2, [1])
    study._storage.create_new_trial(study._study_id)  # as another worker does, before it samples
    assert pair(ask(study, 2, [1])) == (1, 1)


def test_failed_runs_are_not_a_number():
    trials = [done(0, 0.5, candidate=0, seed=1), done(1, None, "failed", candidate=1, seed=1)]
    fitnesses = by_seed([*trials, done(2, 0.9, candidate=0, seed=1)], 3)
    assert fitnesses[0] == {1: 0.5}
    assert math.isnan(fitnesses[1][1])
    assert fitnesses[2] == {}


# -------------------------------------------------------------------------------------------------------- statistics


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_comparison_is_a_paired_t_test(pairs):
    default, candidate = zip(*pairs)
    if np.ptp(np.subtract(candidate, default)) < 1e-6:
        return
    result = compare(dict(enumerate(default)), dict(enumerate(candidate)))
    slow = stats.ttest_rel(candidate, default, alternative="greater")
    assert result.p == pytest.approx(slow.pvalue, rel=1e-6, abs=1e-9)
    assert result.difference / result.standard_error == pytest.approx(slow.statistic, rel=1e-6, abs=1e-9)
    assert result.mean == pytest.approx(np.mean(candidate))
    assert result.sd == pytest.approx(np.std(candidate, ddof=1))


def test_one_seed_has_no_error():
    result = compare({1: 0.5}, {1: 0.75})
    assert result.difference == 0.25
    assert all(map(math.isnan, (result.sd, result.standard_error, result.p)))


def test_only_seeds_of_both_are_compared():
    result = compare({1: 0.5, 2: 0.5, 3: NAN}, {1: 0.6, 3: 0.9, 4: NAN})
    assert result.difference == pytest.approx(0.1)
    assert result.mean == pytest.approx(0.75)
    assert result.failed == 1


def test_no_noise_at_all_is_certain():
    assert compare({1: 0.5, 2: 0.25}, {1: 0.75, 2: 0.5}).p == 0
    assert compare({1: 0.5, 2: 0.25}, {1: 0.5, 2: 0.25}).p == 0.5


@pytest.mark.parametrize(("k", "freedom"), [(1, 2), (2, 4), (3, 6), (5, 20)])
def test_chance_of_the_best_of_k_is_what_happens(k, freedom):
    random = np.random.default_rng(k)
    means = random.normal(size=(400_000, k + 1))
    sd = np.sqrt(random.chisquare(freedom, len(means)) / freedom)
    largest = ((means[:, 1:] - means[:, :1]).max(1)) / (math.sqrt(2) * sd)
    for t in (-0.5, 0.5, 1.5, 2.5, 4.0):
        assert confirm._chance(t, k, freedom) == pytest.approx((largest >= t).mean(), abs=0.003)


# ----------------------------------------------------------------------------------------------------------- verdict


def tried(count: int) -> list[Candidate]:
    names = ["default", *(f"trial {10 + index}" for index in range(1, count))]
    return [
        Candidate(name=name, trial=None if index == 0 else 10 + index, values={"lr0": 0.01 * (1 + index)}, fitness=0.5)
        for index, name in enumerate(names)
    ]


def judge(*rows: list[float]):
    """Rows of fitnesses on seeds 1, 2, ..., None where there was no run; the default first."""
    fitnesses = [{seed: value for seed, value in enumerate(row, 1) if value is not None} for row in rows]
    return verdict(tried(len(rows)), fitnesses)


STEADY = [0.500, 0.502, 0.501]


def test_clear_winner_wins():
    result = judge(STEADY, [0.503, 0.501, 0.502], [0.541, 0.540, 0.543])
    assert result.winner.name == "trial 12"
    assert [one.finding for one in result.judged] == ["default", "not shown better", "better"]
    assert "trial 12 beats the default" in result.reason


def test_best_of_those_that_are_better_wins():
    assert judge(STEADY, [0.561, 0.560, 0.562], [0.541, 0.540, 0.543]).winner.name == "trial 11"


def test_default_stays_where_seeds_blur():
    result = judge([0.50, 0.53, 0.47], [0.52, 0.49, 0.53], [0.51, 0.54, 0.49])
    assert result.winner.name == "default"
    assert "no more than seeds blur" in result.reason


def test_default_stays_where_it_is_ahead():
    result = judge(STEADY, [0.4, 0.41, 0.4], [0.3, 0.3, 0.31])
    assert result.winner.name == "default"
    assert "no candidate is ahead" in result.reason


def test_noise_that_all_seeds_share_does_not_count():
    """Seed 2 is hard for everybody."""
    result = judge([0.50, 0.30, 0.45], [0.521, 0.320, 0.471], [0.50, 0.301, 0.451])
    assert result.winner.name == "trial 11"


def test_failed_run_is_a_disqualification():
    result = judge(STEADY, [0.9, NAN, 0.9], [0.541, 0.540, 0.543])
    assert result.winner.name == "trial 12"
    assert result.judged[1].finding == "failed"
    assert judge(STEADY, [0.9, NAN, 0.9]).winner.name == "default"


def test_failed_default_leaves_the_largest_mean():
    result = judge([0.9, NAN, 0.9], [0.51, 0.50, 0.52], [0.5, 0.61, 0.60], [0.99, NAN, NAN])
    assert result.winner.name == "trial 12"
    assert "the default failed" in result.reason


def test_all_failed_leaves_the_default():
    assert judge([NAN, NAN], [NAN, NAN]).winner.name == "default"
    assert judge([0.5, 0.5]).winner.name == "default"


def test_one_seed_tells_nothing():
    result = judge([0.5], [0.9])
    assert result.winner.name == "default"
    assert "one seed tells nothing" in result.reason


def test_runs_that_are_missing_are_done_without():
    result = judge([*STEADY, 0.5], [0.541, 0.540, 0.543, None], [None] * 4)
    assert result.winner.name == "trial 11"
    assert result.judged[2].finding == "not run"


def test_no_noise_at_all():
    assert judge([0.5] * 3, [0.6] * 3, [0.5] * 3).winner.name == "trial 11"
    assert judge([0.5] * 3, [0.5] * 3).winner.name == "default"
    assert judge([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]).winner.name == "trial 11"  # but for rounding


def test_standard_error_is_that_of_least_squares():
    """Of fitness = candidate + seed, written out with a column for each."""
    rows = np.random.default_rng(0).normal(size=(4, 5))
    judged = judge(*rows.tolist()).judged
    columns = np.array(
        [
            [1, *(candidate == one for one in range(1, 4)), *(seed == one for one in range(1, 5))]
            for candidate in range(4)
            for seed in range(5)
        ],
        float,
    )
    solution, residual, rank, _ = np.linalg.lstsq(columns, rows.ravel())
    covariance = residual[0] / (rows.size - rank) * np.linalg.inv(columns.T @ columns)
    for one, difference, variance in zip(judged[1:], solution[1:4], np.diag(covariance)[1:4]):
        assert one.comparison.difference == pytest.approx(difference)
        assert one.standard_error == pytest.approx(math.sqrt(variance))


def test_default_is_seldom_replaced_by_equals():
    random = np.random.default_rng(0)
    replaced = [judge(*random.normal(size=(4, 3)).tolist()).winner.name != "default" for _ in range(300)]
    assert np.mean(replaced) < CHANCE + 3 * math.sqrt(CHANCE * (1 - CHANCE) / 300)


def test_what_is_clearly_better_is_found():
    random = np.random.default_rng(0)
    shift = np.array([[0], [4], [0], [0]])
    found = [judge(*(random.normal(size=(4, 3)) + shift).tolist()).winner.name == "trial 11" for _ in range(100)]
    assert np.mean(found) > 0.9


# ------------------------------------------------------------------------------------------------------------ report


def test_table_is_aligned():
    lines = table(judge(STEADY, [0.503, 0.501, 0.502], [0.541, 0.540, 0.543], [0.5, NAN, 0.5]))
    assert lines == [
        "             mean   spread  difference to default  chance",
        "default   0.50100  0.00100",
        "trial 11  0.50200  0.00100    +0.00100 +- 0.00109   0.315  not shown better",
        "trial 12  0.54133  0.00153    +0.04033 +- 0.00109  <0.001  better",
        "trial 13  0.50000  0.00000                                 1 of 3 runs failed",
        lines[-1],
    ]
    assert lines[-1].startswith("trial 12 beats the default")


def test_comments_are_comments():
    lines = comments(judge(STEADY, [0.541, 0.540, 0.543]))
    assert all(line.startswith("#") for line in lines)
    assert lines[0] == "# Trained again on seeds 1, 2, 3:"


def test_plain_verdict_is_json():
    content = plain_verdict(judge([0.5], [0.75], [NAN]))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["winner"] == "default"
    assert content["candidates"][1]["fitness_by_seed"] == {"1": 0.75}
    assert content["candidates"][1]["chance"] is None
    assert content["candidates"][2]["fitness_by_seed"] == {"1": None}
    assert content["candidates"][2]["finding"] == "failed"
