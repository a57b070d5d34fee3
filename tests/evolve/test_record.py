import contextlib
import csv
import gc
import itertools
import math
import multiprocessing
import shlex
import time
import warnings
from pathlib import Path

import optuna
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from optuna.trial import TrialState

from tests.evolve.studies import DISTRIBUTIONS, RANGES, add, new_study, searched
from utils.evolve import record
from utils.evolve.history import CONFIRMED, RESULT_NAMES, best, finished_of
from utils.evolve.record import CSV_NAME, HYP_NAME, PICTURE_NAME, StudyRecord, draw, importances, write_hyp
from utils.hyp import GENES, Hyperparameters, hyperparameters, plain_values, read_hyp
from utils.report.csv_table import on_one_line
from utils.structures import PixelTransform

HYP = plain_values(Hyperparameters())


def rows_of(folder):
    with (folder / CSV_NAME).open(newline="") as file:
        return list(csv.DictReader(file, skipinitialspace=True))


def comments_of(path):
    return [line[2:] for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def table(folder):
    return StudyRecord(folder, names=list(GENES))


# ---- evolve.csv and hyp_evolved.yaml


def test_a_row_says_what_became_of_a_trial(table, folder):
    study = new_study()
    add(study, fitness=0.25, values={"lr0": 0.0123456789012345}, reports={10: 0.25})
    add(study, TrialState.PRUNED, values={"lr0": 0.02}, reports={3: 0.1, 5: 0.125}, results={"precision": 1 / 3})
    add(study, TrialState.FAIL, failure='out of memory, "all" of it\nthe rest', results={})
    add(study, TrialState.FAIL)  # lost
    add(study, TrialState.RUNNING)
    assert table.write(study, HYP)
    first, second, third = rows_of(folder)
    assert list(first) == ["trial", "state", "fitness", *RESULT_NAMES, *GENES, "seconds", "epochs", "failure"]
    assert [row["trial"] for row in (first, second, third)] == ["0", "1", "2"]
    assert [row["state"] for row in (first, second, third)] == ["complete", "pruned", "failed"]
    assert (first["fitness"], first["recall"], first["lr0"]) == ("0.25", "0.25", "0.0123456789012345")
    assert (first["momentum"], first["anchors"], first["seconds"], first["epochs"]) == ("0.937", "", "12.5", "10")
    assert (second["fitness"], second["precision"], second["recall"], second["epochs"]) == (
        "0.125",
        "0.333333",
        "",
        "5",
    )
    assert (third["fitness"], third["failure"]) == ("", 'out of memory, "all" of it\\nthe rest')


def test_columns_are_straight_whatever_is_in_them(table, folder):
    study = searched(20, ["lr0", "mosaic"])
    table.write(study, HYP)
    lines = (folder / CSV_NAME).read_text().splitlines()
    assert len({line.rindex(",") for line in lines}) == 1 and len(lines) == 21


def test_the_best_is_a_hyp_file_that_says_where_it_is_from(table, folder):
    study = new_study("strange\nname")
    add(study, fitness=0.5, values={"lr0": 0.02, "anchors": None})
    add(study, fitness=0.75, values={"lr0": 1e-5, "anchors": 5.0})
    add(study, fitness=0.75, values={"lr0": 0.03, "anchors": 3.0})
    add(study, TrialState.PRUNED, fitness=0.9, values={"lr0": 0.04}, reports={1: 0.9})
    add(study, TrialState.FAIL, failure="NaN")
    table.write(study, HYP)
    path = folder / HYP_NAME
    assert read_hyp(path) == Hyperparameters(lr0=1e-5, anchors=5.0)
    command, of, result, figures = comments_of(path)
    assert shlex.split(command) == ["python", "train.py", "--hyp", str(path)]
    assert of == r"The best so far of study strange\nname; its trials: 3 complete, 1 pruned, 1 failed"
    assert result == "trial 1: fitness 0.75" and figures.startswith("precision 0.75, recall 0.75, mAP_0.5 0.75, ")


def test_a_best_without_anchors_says_nothing_of_them(table, folder):
    study = new_study()
    add(study, values={"lr0": 0.02, "anchors": None})
    table.write(study, {**HYP, "anchors": 3.0})
    assert "anchors" not in yaml.safe_load((folder / HYP_NAME).read_text())
    assert read_hyp(folder / HYP_NAME).anchors is None


def test_nothing_complete_is_no_hyp_file(table, folder):
    study = new_study()
    assert table.write(study, HYP) and rows_of(folder) == []
    add(study, TrialState.PRUNED, reports={1: 0.5})
    assert table.write(study, HYP)
    assert len(rows_of(folder)) == 1 and not (folder / HYP_NAME).exists()


def test_transforms_of_the_given_hyp_are_in_the_best(table, folder):
    given = Hyperparameters(albumentations=(PixelTransform(name="Blur", arguments=(("p", 0.01),)),))
    study = new_study()
    add(study, values={"lr0": 0.02})
    table.write(study, plain_values(given))
    assert read_hyp(folder / HYP_NAME).albumentations == given.albumentations


def confirm(study, *, trial=None, values, comments=()):
    name = "default" if trial is None else f"trial {trial}"
    count = len(finished_of(study))
    study.set_user_attr(
        CONFIRMED, {"trials": count, "name": name, "trial": trial, "values": values, "comments": list(comments)}
    )


def test_a_confirmed_winner_stays_until_another_trial_has_finished(table, folder):
    study = new_study()
    add(study, fitness=0.25, values={"lr0": 0.02})
    add(study, fitness=0.5, values={"lr0": 0.03}, results={"recall": 0.5})
    add(study, fitness=0.75, values={"lr0": 0.04})  # by luck
    add(study, TrialState.FAIL)  # lost
    confirm(study, trial=1, values={"lr0": 0.03}, comments=["Trained again on seeds 1, 2:", "  trial 1  0.5"])
    add(study, TrialState.RUNNING)
    for _ in range(2):
        assert table.write(study, HYP) and len(rows_of(folder)) == 3
        assert read_hyp(folder / HYP_NAME) == Hyperparameters(lr0=0.03)
        command, *comments = comments_of(folder / HYP_NAME)
        assert shlex.split(command) == ["python", "train.py", "--hyp", str(folder / HYP_NAME)]
        assert comments == [
            "Of study exp; its trials: 3 complete, 0 pruned, 0 failed",
            "The confirmed winner: trial 1, which gave in the sweep:",
            "trial 1: fitness 0.5",
            "recall 0.5",
            "Trained again on seeds 1, 2:",
            "  trial 1  0.5",
        ]
    add(study, fitness=0.3, values={"lr0": 0.05})
    assert table.write(study, HYP)
    assert read_hyp(folder / HYP_NAME).lr0 == 0.04
    assert comments_of(folder / HYP_NAME)[1].startswith("The best so far of study exp; ")


def test_a_confirmed_default_is_the_hyp_that_was_given(table, folder):
    given = Hyperparameters(
        lr0=1 / 3, anchors=None, albumentations=(PixelTransform(name="Blur", arguments=(("p", 0.01),)),)
    )
    study = new_study()
    add(study, fitness=0.75, values={"lr0": 0.02, "anchors": 5.0})
    confirm(study, values=plain_values(given), comments=["no candidate is ahead"])
    assert table.write(study, plain_values(given))
    assert read_hyp(folder / HYP_NAME) == given
    assert comments_of(folder / HYP_NAME)[2:] == ["The confirmed winner: the default", "no candidate is ahead"]


def test_one_line_stays_as_it_is_and_others_are_escaped():
    assert on_one_line("lr0, 猫 ") == "lr0, 猫 "
    assert on_one_line("a\nb\udc80\t") == "a\\nb\\udc80\\t"


def one_of(distribution):
    if hasattr(distribution, "choices"):
        return st.sampled_from(distribution.choices)
    return st.floats(distribution.low, distribution.high)


FIGURES = st.floats(0, 1)
TRIALS = st.lists(
    st.fixed_dictionaries(
        {
            "state": st.sampled_from(TrialState),
            "fitness": FIGURES,
            "values": st.fixed_dictionaries({}, optional={name: one_of(d) for name, d in DISTRIBUTIONS.items()}),
            "reports": st.dictionaries(st.integers(1, 9), FIGURES, max_size=2),
            "failure": st.none() | st.text(),
            "results": st.dictionaries(st.sampled_from(RESULT_NAMES), FIGURES),
        }
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trials=TRIALS, name=st.text(), confirmed=st.none() | st.integers(0, 6), data=st.data())
def test_whatever_the_trials_the_files_agree_with_the_study(tmp_path_factory, trials, name, confirmed, data):
    given = data.draw(st.fixed_dictionaries({}, optional={name: one_of(d) for name, d in DISTRIBUTIONS.items()}))
    folder, study, hyp = tmp_path_factory.mktemp("evolve"), new_study(name), {**HYP, **given}
    for trial in trials:
        if len(study.trials) == confirmed:
            confirm(study, values=hyp)
        add(study, **trial)
    assert StudyRecord(folder, names=list(GENES)).write(study, hyp)
    counted = finished_of(study)
    for row, trial in itertools.zip_longest(rows_of(folder), counted):
        assert (int(row["trial"]), row["state"]) == (trial.number, trial.state)
        assert row["fitness"] == ("" if trial.fitness is None else repr(trial.fitness))
        read = {gene: float(row[gene]) for gene in GENES if row[gene]}
        assert hyperparameters(read, source="csv") == hyperparameters({**hyp, **trial.values}, source="study")
        assert {name: float(row[name]) for name in RESULT_NAMES if row[name]} == pytest.approx(trial.results, rel=1e-5)
    winner = best(counted)
    still = study.user_attrs.get(CONFIRMED, {}).get("trials") == len(counted)
    assert (folder / HYP_NAME).exists() == (still or winner is not None)
    if still:
        assert read_hyp(folder / HYP_NAME) == hyperparameters(hyp, source="given")
    elif winner:
        assert read_hyp(folder / HYP_NAME) == hyperparameters({**hyp, **winner.values}, source="study")
        assert f"trial {winner.number}: fitness {winner.fitness!r}" in comments_of(folder / HYP_NAME)


@given(value=st.floats(1e-5, 0.1), comments=st.lists(st.text(), max_size=3))
def test_any_comment_leaves_the_values_alone(tmp_path_factory, value, comments):
    path = tmp_path_factory.mktemp("hyp") / "it's a hyp.yaml"
    write_hyp(path, {"lr0": value, "anchors": None}, comments)
    assert read_hyp(path) == Hyperparameters(lr0=value)
    assert shlex.split(path.read_text().splitlines()[0][2:])[-1] == str(path)


def test_the_command_is_as_short_as_one_would_type_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (tmp_path / "runs" / "hyp.yaml", Path("runs/hyp.yaml")):
        write_hyp(path, {"lr0": 0.01}, ["why"])
        assert comments_of(path) == ["python train.py --hyp runs/hyp.yaml", "why"]


# ---- several workers


class Slow:
    """A study that is asked while another worker waits, with what it held at that time."""

    def __init__(self, study, asked, goes_on):
        self._study, self._asked, self._goes_on = study, asked, goes_on
        self.study_name, self.user_attrs = study.study_name, study.user_attrs

    def get_trials(self, **options):
        trials = self._study.get_trials(**options)
        self._asked.set()
        assert self._goes_on.wait(30)
        return trials


def write_slowly(folder, asked, goes_on, num_trials):
    study = searched(num_trials, ["lr0"])
    StudyRecord(folder, names=["lr0"]).write(Slow(study, asked, goes_on), HYP)


@pytest.fixture
def slow_writer(folder):
    """Starts another process that has read a study of 2 trials and not written them yet; gives it and what lets it."""
    context = multiprocessing.get_context("fork")
    asked, goes_on = context.Event(), context.Event()
    writer = context.Process(target=write_slowly, args=(folder, asked, goes_on, 2), daemon=True)
    writer.start()
    assert asked.wait(30)
    yield writer, goes_on
    writer.kill()
    writer.join()


def test_a_worker_that_read_less_never_overwrites_more(table, folder, slow_writer, monkeypatch):
    writer, goes_on = slow_writer
    monkeypatch.setattr(record, "PATIENCE_S", 0.2)
    study = searched(5, ["lr0"])
    assert not table.write(study, HYP) and not (folder / CSV_NAME).exists()
    goes_on.set()
    writer.join()
    assert len(rows_of(folder)) == 2
    assert table.write(study, HYP) and len(rows_of(folder)) == 5


def test_a_worker_killed_while_it_writes_blocks_nobody(table, folder, slow_writer):
    writer, _ = slow_writer
    writer.kill()
    assert table.write(searched(5, ["lr0"]), HYP) and len(rows_of(folder)) == 5


def work(folder, url, num_trials):
    study = optuna.load_study(study_name="exp", storage=url)
    for number in range(num_trials):
        add(study, fitness=number / 10, values={"lr0": 0.001 * (number + 1)})
        assert StudyRecord(folder, names=["lr0"]).write(study, HYP)


def test_rows_never_get_fewer_while_three_workers_write(folder):
    url = f"sqlite:///{folder}/study.db"
    study = optuna.create_study(study_name="exp", storage=url, direction="maximize")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(folder, url, 6), daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    seen = [0]
    while any(worker.is_alive() for worker in workers):
        with contextlib.suppress(FileNotFoundError):
            seen.append(len(rows_of(folder)))
        time.sleep(0.005)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert seen == sorted(seen) and len(set(seen)) > 2
    assert len(rows_of(folder)) == 18 and read_hyp(folder / HYP_NAME).lr0 == best(finished_of(study)).values["lr0"]


def test_a_folder_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(OSError, match="gone"):
        StudyRecord(gone, names=list(GENES)).write(new_study(), HYP)


# ---- importances


@pytest.mark.parametrize("num_trials", [30, 300])
def test_the_gene_that_sets_fitness_is_the_most_important(num_trials):
    shares = importances(searched(num_trials, ["mosaic", "lr0", "anchors", "box"]))
    assert set(shares) == {"mosaic", "lr0", "anchors", "box"}
    assert next(iter(shares)) == "mosaic" and math.fsum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_importances_come_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importances(searched(30, ["mosaic", "lr0"]))


def test_what_cannot_be_told_is_empty():
    assert importances(new_study()) == {}
    assert importances(searched(7, ["lr0"])) == {}
    same, still = new_study(), new_study()
    for number in range(20):
        add(same, fitness=0.5, values={"lr0": 0.001 * (number + 1)})
        add(still, fitness=number / 20, values={"lr0": 0.01})
    assert importances(same) == importances(still) == {}


@pytest.mark.filterwarnings("error")
def test_where_nearly_all_are_the_best_nothing_sets_them_apart():
    study = new_study()
    for number in range(20):
        add(study, fitness=0.5 if number else math.inf, values={"lr0": 0.001 * (number + 1)})
    add(study, fitness=math.nextafter(0.5, 0), values={"lr0": 0.05})
    assert set(importances(study)) <= {"lr0"}


def test_a_gene_that_never_moved_has_no_share():
    study = new_study()
    for number in range(20):
        add(study, fitness=number / 20, values={"lr0": 0.001 * (number + 1), "box": 0.05})
    assert importances(study) == {"lr0": 1}


@pytest.mark.filterwarnings("error")
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1) | st.sampled_from([0.5, math.inf, -math.inf]),
            st.fixed_dictionaries({"box": one_of(DISTRIBUTIONS["box"]), "anchors": one_of(DISTRIBUTIONS["anchors"])}),
        ),
        min_size=8,
        max_size=20,
    )
)
def test_importances_are_shares_whatever_the_trials(trials):
    study = new_study()
    for fitness, values in trials:
        add(study, fitness=fitness, values=values)
    shares = importances(study)
    assert set(shares) <= {"box", "anchors"} and (not shares or math.fsum(shares.values()) == pytest.approx(1))
    assert all(share >= 0 for share in shares.values())


# ---- the picture


def figures_alive():
    gc.collect()
    return sum(type(thing) is Figure for thing in gc.get_objects())


@pytest.mark.parametrize("num_trials", [0, 30])
def test_a_study_is_drawn_again_and_again_without_a_trace(folder, num_trials):
    study, genes = searched(num_trials, ["mosaic", "lr0", "anchors"]), ("mosaic", "lr0", "anchors")
    before = figures_alive()
    for _ in range(2):
        draw(study, {name: RANGES[name] for name in genes}, folder)
    assert [path.name for path in folder.iterdir()] == [PICTURE_NAME]
    assert figures_alive() == before
