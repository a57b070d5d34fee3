"""Where trials are judged early, and by whom."""

from itertools import pairwise
from typing import get_args

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils import config
from utils.evolve.history import finished_of
from utils.evolve.pruners import PRUNERS, make_pruner, rungs
from utils.evolve.samplers import SAMPLERS
from utils.structures import UserError


def test_choices_of_the_command_line_are_those_of_the_tables():
    assert set(get_args(config.Sampler)) == set(SAMPLERS)
    assert set(get_args(config.Pruner)) == set(PRUNERS)


@given(st.integers(2, 10_000))
def test_rungs_are_at_half_of_the_epochs_and_at_a_quarter_of_many(epochs):
    steps = rungs(epochs, "asha")
    assert epochs / 2 - 2 < steps[-1] <= epochs / 2
    assert len(steps) == (2 if epochs >= 20 else 1) and all(later == 2 * earlier for earlier, later in pairwise(steps))


def test_without_a_pruner_there_are_none_and_one_epoch_has_none():
    assert rungs(100, "none") == () == rungs(1, "none")
    for name in ("asha", "hyperband", "median"):
        with pytest.raises(UserError, match=f"--evolve-pruner {name}: a trial of 1 epoch .* --epochs 2 or more"):
            rungs(1, name)


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - {"none"}))
def test_each_pruner_ends_bad_trials_and_lets_good_ones_go_on(name):
    """Of trials as good as their number modulo 10 says, few bad ones and most of the best come to their end."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", pruner=make_pruner(name, 30))

    def objective(trial):
        for epoch in rungs(30, name):
            trial.report(trial.number % 10 + epoch / 100, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return trial.number % 10

    study.optimize(objective, n_trials=60)
    ended = [trial for trial in finished_of(study)[20:] if trial.state == "pruned"]
    assert len([trial for trial in ended if trial.number % 10 <= 3]) >= 8  # of 16
    assert len([trial for trial in ended if trial.number % 10 == 9]) <= 1  # of 4
