"""`train.py --evolve` as people type it: trials, files, the end, and all that can come between."""

import csv
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import optuna
import pytest
import yaml

import train
from utils.config import TrainOptions, parse_flags, validated
from utils.evolve.history import best, finished_of, is_lost
from utils.evolve.study import Outcome, TrialFailed
from utils.hyp import GENES, plain_values, read_hyp
from utils.stopping import StopRequest
from utils.structures import UserError
from utils.sweep import objective
from utils.sweep.process import Evaluated, Ready, Request
from utils.sweep.trials import Trials

ROOT = Path(__file__).resolve().parent.parent
EXP = Path("runs/evolve/exp")
TRIALS = ("--evolve", "3", "--evolve-confirm", "0")
TWO = ("--evolve", "2", "--evolve-confirm", "0")


class Untrained:
    """In the place of `Trials`: trains nothing, and tells what it was asked for by a fitness of these values."""

    def __init__(self, *, on_ready, **_) -> None:
        self._on_ready = on_ready

    def __call__(self, name, request, goes_on) -> Outcome:
        work = {"the network": request.options["cfg"], "the weights": request.options["weights"], "--batch-size": 4}
        self._on_ready(Ready(work=work, caches=()))
        fitness = request.hyp["lr0"] + 1e-3 * request.options["seed"] + 1e-4 * request.options["epochs"]
        return Outcome(fitness=fitness, results={"mAP_0.5": fitness}, epochs=request.options["epochs"])


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(objective, "Trials", Untrained)


def study_of(folder: Path = EXP) -> optuna.Study:
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


def rows(folder: Path = EXP) -> list[dict[str, str]]:
    with (folder / "evolve.csv").open(newline="") as file:
        return [{name.strip(): cell.strip() for name, cell in row.items()} for row in csv.DictReader(file)]


def lines_of_trials(output: str) -> list[list[str]]:
    """The cells of the lines below the titles."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("trial "))
    return [line.split() for line in lines[start + 1 :] if line.strip() and line.split()[0].isdecimal()]


def sees(process, text: str) -> None:
    for line in process.stdout:
        if text in line.decode():
            return
    pytest.fail(f"it ended without '{text}': {process.stderr.read().decode()}")


def test_a_sweep_leaves_what_the_best_trial_was_made_with_and_training_takes_it(tiny, cli):
    code, output, errors = cli(train, *TWO, *tiny.flags(epochs=2, noplots=None))
    assert code == 0 and errors == ""
    table = lines_of_trials(output)
    assert [cells[0] for cells in table] == ["0", "1"] and [cells[7] for cells in table] == ["1/2", "2/2"]
    trials = finished_of(study_of())
    assert [int(row["trial"]) for row in rows()] == [trial.number for trial in trials] == [0, 1]
    given, start = read_hyp(tiny.hyp), read_hyp(tiny.hyp).__dict__
    for name, value in trials[0].values.items():  # trial 0 is what was given
        assert value == pytest.approx(3.0 if name == "anchors" else start[name])
    assert read_hyp(EXP / "hyp.yaml") == given
    winner = best(trials)
    evolved = read_hyp(EXP / "hyp_evolved.yaml")
    assert {name: getattr(evolved, name) for name in winner.values} == winner.values
    assert {"evolve.png", "opt.yaml", "study.db", "tensorboard"} <= {path.name for path in EXP.iterdir()}
    assert not list(EXP.rglob("*.pt")) and not Path("runs/train").exists()  # nothing is saved of a trial
    assert "Not confirmed on other seeds" in output and str(EXP / "hyp_evolved.yaml") in output
    again = tiny.flags(hyp=str(EXP / "hyp_evolved.yaml"), epochs=1)
    assert cli(train, *again)[0] == 0
    assert read_hyp(Path("runs/train/exp/hyp.yaml")) == evolved


def test_the_best_and_the_default_are_trained_again_on_fresh_seeds(tiny, cli, untrained):
    flags = ("--evolve", "3", "--evolve-confirm", "1", "--evolve-confirm-seeds", "2", "--evolve-confirm-epochs", "3")
    code, output, _ = cli(train, *flags, *tiny.flags(epochs=2, seed=7, noplots=None))
    assert code == 0
    verdict = json.loads((EXP / "confirm.json").read_text())
    assert verdict["seeds"] == [8, 9] and [len(one["fitness_by_seed"]) for one in verdict["candidates"]] == [2, 2]
    assert verdict["candidates"][0]["name"] == "default" and verdict["reason"] in output
    evolved, given = read_hyp(EXP / "hyp_evolved.yaml"), read_hyp(tiny.hyp)
    values = next(one["values"] for one in verdict["candidates"] if one["name"] == verdict["winner"])
    if verdict["winner"] == "default":
        assert evolved == given
    assert all(getattr(evolved, name) == value for name, value in values.items() if name in GENES)
    assert verdict["reason"] in (EXP / "hyp_evolved.yaml").read_text()
    pairs = [line.split() for line in output.splitlines() if line.strip().startswith(("default", "trial"))]
    assert sum("/4" in cells[-2] for cells in pairs) == 4
    code, output, _ = cli(train, *flags, *tiny.flags(epochs=2, seed=7))  # there is nothing left to do
    assert code == 0 and verdict["reason"] in output and json.loads((EXP / "confirm.json").read_text()) == verdict


def test_the_same_command_goes_on_and_resume_needs_no_flags(tiny, cli, untrained):
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    first = [trial.values for trial in finished_of(study_of())]
    assert cli(train, "--evolve", "4", "--evolve-confirm", "0", *tiny.flags())[0] == 0
    assert cli(train, "--evolve", "5", "--resume")[0] == 0
    assert cli(train, "--evolve", "6", "--resume", str(EXP), "--workers", "0")[0] == 0
    trials = finished_of(study_of())
    assert [trial.number for trial in trials] == list(range(6)) and [one.values for one in trials[:3]] == first
    code, _, errors = cli(train, "--evolve", "5", "--resume")
    assert code == 2 and "6 trials are done already" in errors


def test_the_same_seed_proposes_the_same(tiny, cli, untrained):
    for name in ("a", "b"):
        assert cli(train, *TRIALS, *tiny.flags(name=name))[0] == 0
    one, other = (finished_of(study_of(Path("runs/evolve") / name)) for name in ("a", "b"))
    assert [trial.values for trial in one] == [trial.values for trial in other]
    assert [trial.fitness for trial in one] == [trial.fitness for trial in other]


def test_a_trial_is_the_run_with_its_values(tiny, cli):
    assert cli(train, "--evolve", "1", "--evolve-confirm", "0", *tiny.flags(epochs=40, seed=3))[0] == 0
    tiny.hyp.write_text(yaml.safe_dump(yaml.safe_load(tiny.hyp.read_text()) | {"anchors": 3}))
    assert cli(train, *tiny.flags(epochs=40, seed=3, noval=True))[0] == 0
    with Path("runs/train/exp/results.csv").open(newline="") as file:
        last = {name.strip(): cell.strip() for name, cell in list(csv.DictReader(file))[-1].items()}
    (trial,) = finished_of(study_of())
    assert trial.epochs == 40 and len(trial.results) == 7
    for name, value in trial.results.items():
        column = name if name.startswith("val/") else f"metrics/{name}"
        assert f"{value:.6g}" == last[column]


def test_bad_trials_end_early_and_the_others_go_on(tiny, cli, untrained, monkeypatch):
    called = Untrained.__call__

    def judged(self, name, request, goes_on):
        outcome = called(self, name, request, goes_on)
        for epoch in request.rungs:
            goes_on(Evaluated(epoch=epoch, fitness=outcome.fitness, results=outcome.results))
        return outcome

    monkeypatch.setattr(Untrained, "__call__", judged)
    genes = tiny.folder / "genes.yaml"
    genes.write_text("lr0: {low: 0.00001, high: 0.1, scale: log}\nbox:\n")
    flags = ("--evolve", "12", "--evolve-confirm", "0", "--evolve-sampler", "random", "--evolve-genes", str(genes))
    code, output, _ = cli(train, *flags, *tiny.flags(epochs=30))
    assert code == 0
    trials = finished_of(study_of())
    pruned, complete = ([trial for trial in trials if trial.state == state] for state in ("pruned", "complete"))
    assert len(pruned) >= 4 and len(complete) >= 2 and len(pruned) + len(complete) == 12
    assert {trial.epochs for trial in pruned} <= {7, 14} and {trial.epochs for trial in complete} == {30}
    assert set(trials[0].values) == {"lr0", "box"}
    assert output.count("pruned") == len(pruned) + 1  # and the title


def test_the_process_of_a_trial_ends_when_it_is_to_go_on_no_further(tiny, tmp_path):
    begun, judged = [], []
    trials = Trials(stop=StopRequest(), failures=tmp_path, on_ready=lambda _: None, on_epoch=begun.append)

    def goes_on(message):
        judged.append(message.epoch)
        if message.epoch == 2:
            raise optuna.TrialPruned

    hyp = read_hyp(tiny.hyp)
    options = vars(validated(TrainOptions, tiny.options(epochs=50)))
    with pytest.raises(optuna.TrialPruned):
        trials("trial", Request(options=options, hyp=plain_values(hyp), rungs=(1, 2, 3), place=None), goes_on)
    assert judged == [1, 2] and begun == [1, 2] and not list(tmp_path.glob("*.txt"))


def test_a_trial_that_fails_is_one_line_and_evolution_goes_on(tiny, cli):
    genes = tiny.folder / "genes.yaml"
    genes.write_text("lr0: {low: 0.01, high: 1.0e+30, scale: log}\n")
    flags = ("--evolve", "3", "--evolve-confirm", "0", "--evolve-genes", str(genes), "--evolve-sampler", "random")
    code, output, _ = cli(train, *flags, *tiny.flags(epochs=12, nominal_batch="4"))
    assert code == 0
    failed = [trial for trial in finished_of(study_of()) if trial.state == "failed"]
    assert failed and all("finite" in trial.failure for trial in failed)
    assert all(trial.failure in output for trial in failed)
    assert [row["failure"] for row in rows() if row["state"] == "failed"] == [trial.failure for trial in failed]


def test_a_trial_whose_process_is_killed_counts_as_failed(tiny, start, monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in launched.items():  # as a launcher does, which is nothing to a trial
        monkeypatch.setenv(name, value)
    process = start("train.py", *TRIALS, *tiny.flags(epochs=400, evolve_pruner="none"), "--evolve", "2")
    sees(process, "Anchors reach")
    child = trial_process_of(process.pid)
    if sys.platform == "linux":
        names = {
            entry.partition(b"=")[0].decode() for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        }
        assert not names & set(launched) and "PATH" in names
    os.kill(child, signal.SIGKILL)
    until = time.monotonic() + 60
    while not (EXP / "evolve.csv").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.kill()
    first = rows()[0]
    assert first["state"] == "failed" and "out of memory?" in first["failure"]


def trial_process_of(worker: int) -> int:
    """The process that trains, once it is there."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for child in Path(f"/proc/{worker}/task/{worker}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        time.sleep(0.05)
    raise AssertionError("no trial has been started")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a trial outlives a worker that is killed")
def test_a_killed_worker_leaves_nothing_behind_and_its_trial_is_run_again(tiny, start):
    endless = tiny.flags(epochs=5000, evolve_grace=5, evolve_pruner="none")
    process = start("train.py", *TRIALS, *endless)
    sees(process, "Anchors reach")
    child = trial_process_of(process.pid)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    with sqlite3.connect(EXP / "study.db") as base:  # the sweep of short trials that it was meant to be
        base.execute(
            "update study_user_attributes set value_json = replace(value_json, '5000', '2') where key = 'options'"
        )
    begun = study_of().trials[0].params
    options = yaml.safe_load((EXP / "opt.yaml").read_text()) | {"epochs": 2}
    (EXP / "opt.yaml").write_text(yaml.safe_dump(options))
    done = start("train.py", *TWO, "--resume")
    assert done.wait(120) == 0
    study = study_of()
    assert len(finished_of(study)) == 2 and sum(map(is_lost, study.trials)) == 1
    assert begun in [trial.values for trial in finished_of(study)]
    assert len(rows()) == 2


def test_ctrl_c_says_how_to_go_on_and_the_trial_is_run_again(tiny, start):
    process = start("train.py", *TRIALS, *tiny.flags(epochs=3000))
    sees(process, "Anchors reach")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.decode().strip().splitlines() == [errors.decode().strip()]
    assert f"--evolve 3 --resume {EXP}" in errors.decode()
    trials = study_of().trials
    assert [trial.state.name for trial in trials] == ["FAIL", "WAITING"] and trials[0].params == trials[1].params


def test_ranks_are_workers_of_their_own(tiny, start):
    process = start("train.py", "--nproc", "2", *TRIALS, *tiny.flags())
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    assert len(finished_of(study_of())) == 3 and len(rows()) == 3
    table = [line.split() for line in output.decode().splitlines()]
    assert sorted(cells[0] for cells in table if len(cells) > 7 and "/3" in cells[7]) == ["0", "1", "2"]
    assert output.decode().count("finished  pruned") == 1 and output.decode().count("Train with them") == 1


def test_options_of_training_hold_for_trials(tiny, cli):
    """--single-cls, --noautoanchor and --weights, of which the sweep keeps the gene away that makes no sense."""
    assert cli(train, *tiny.flags(epochs=1, name="start"))[0] == 0
    weights = "runs/train/start/weights/best.pt"
    flags = ("--evolve", "2", "--evolve-confirm", "0", "--single-cls", "--noautoanchor", "--cache")
    before = set(Path("/dev/shm").glob("yolo-trainer-*"))
    process = subprocess.run(
        [sys.executable, ROOT / "train.py", *flags, *tiny.flags(weights=weights, cfg=None)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert f"entries of {weights} fit" in process.stdout
    study = study_of()
    assert len(study.trials) == 2 and all("anchors" not in trial.params for trial in study.trials)
    assert study.user_attrs["work"]["the classes"] == ["item"]
    # the cache in memory was there for the second trial, which does not tell, and is gone with the sweep
    assert process.stdout.count("Images cached in memory: train (8, 0.1 MiB, built)") == 1
    assert set(Path("/dev/shm").glob("yolo-trainer-*")) <= before


def test_results_go_to_a_bucket_and_come_back(tiny, cli, tmp_path, untrained):
    bucket = tmp_path / "bucket"
    assert cli(train, *TRIALS, "--bucket", str(bucket), *tiny.flags())[0] == 0
    assert {"evolve.csv", "hyp_evolved.yaml", "study.db"} <= {path.name for path in bucket.iterdir()}
    assert (bucket / "evolve.csv").read_bytes() == (EXP / "evolve.csv").read_bytes()
    other = ("--evolve", "4", "--evolve-confirm", "0", "--project", "elsewhere", "--bucket", str(bucket))
    code, output, _ = cli(train, *other, *tiny.flags())
    assert code == 0 and "going on with the study of" in output
    assert len(rows(Path("elsewhere/exp"))) == 4
    assert cli(train, *TRIALS, "--bucket", str(bucket), *tiny.flags())[0] == 2  # the bucket is ahead


def test_python_may_evolve_too(tiny, untrained):
    assert train.run(evolve=1, evolve_confirm=0, **tiny.options()) == EXP / "hyp_evolved.yaml"


# ---- mistakes --------------------------------------------------------------------------------------------------------


def refused(cli, *flags: str) -> str:
    """What is said of them, in one line."""
    code, output, errors = cli(train, *flags)
    assert code == 2 and errors.count("\n") == 1 and "Traceback" not in output + errors
    return errors


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--evolve-genes", "lr9"), "there is no gene 'lr9'"),
        (("--evolve-genes", "nowhere.yaml"), "nowhere.yaml"),
        (("--evolve-pruner", "asha"), "--evolve-pruner asha: a trial of 1 epoch has none to be judged at early"),
        (("--evolve-storage", "postgres"), "--evolve-storage postgres: expected a URL"),
        (("--evolve-storage", "oracle://a/b"), "unknown kind of storage 'oracle'"),
        (("--evolve-storage", "journal:/nowhere/at/all"), "the folder /nowhere/at does not exist"),
        (("--weights", "nowhere.pt"), "nowhere.pt"),
        (("--data", "nowhere.yaml"), "--data file not found: nowhere.yaml"),
        (("--noval",), "--evolve and --noval: trials are judged by their evaluations"),
        (("--bucket", "ghs://x"), "ghs"),
        (("--resume",), "--resume: runs/evolve/exp has no opt.yaml of a sweep"),
    ],
)
def test_a_mistake_is_one_line_before_any_trial(tiny, cli, flags, says):
    assert says in refused(cli, *TRIALS, *tiny.flags(), *flags)
    assert not (EXP / "evolve.csv").exists()


def test_an_unreachable_server_is_one_line_without_the_password(tiny, cli):
    said = refused(cli, *TRIALS, *tiny.flags(), "--evolve-storage", "postgresql://me:secret@127.0.0.1:9/base")
    assert "127.0.0.1:9" in said and "secret" not in said


def test_bounds_that_exclude_the_start_are_named(tiny, cli):
    (tiny.folder / "genes.yaml").write_text("lr0: {low: 0.05, high: 0.1}\n")
    said = refused(cli, *TRIALS, *tiny.flags(), "--evolve-genes", str(tiny.folder / "genes.yaml"))
    assert "lr0" in said and "0.02" in said and "0.05" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--imgsz", "96"), "--imgsz 64 there, 96 here"),
        (("--evolve-genes", "lr0,box"), "gene"),
        (("--cfg", "yolov5n.yaml", "--evolve", "4"), "the network there and here are not the same"),
        (("--weights", "OTHER", "--evolve", "4"), "the weights there and here are not the same"),
    ],
)
def test_another_study_is_not_joined(tiny, cli, change, says, untrained):
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    before = (EXP / "evolve.csv").read_bytes(), (EXP / "opt.yaml").read_bytes()
    other = tiny.folder / "other.pt"
    other.touch()
    said = refused(cli, *TRIALS, *tiny.flags(), *(str(other) if word == "OTHER" else word for word in change))
    assert says in said and "--name" in said
    assert before == ((EXP / "evolve.csv").read_bytes(), (EXP / "opt.yaml").read_bytes())


def test_a_mistake_spoils_no_name(tiny, cli, untrained):
    """What was begun with a mistake, and never ran a trial, is no obstacle to the command that is right."""
    (tiny.folder / "bad.yaml").write_text("lr0: 0.03\n")
    (tiny.folder / "genes.yaml").write_text("box:\n")
    wrong = (*TRIALS, *tiny.flags(hyp=str(tiny.folder / "bad.yaml")), "--evolve-genes", str(tiny.folder / "genes.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Untrained, "__call__", lambda *_: (_ for _ in ()).throw(UserError("--data: nothing there")))
        assert "nothing there" in refused(cli, *wrong)
    assert cli(train, *TRIALS, *tiny.flags(imgsz=96))[0] == 0
    assert [trial.number for trial in finished_of(study_of())] == [0, 1, 2]
    assert cli(train, "--evolve", "4", "--evolve-confirm", "0", "--resume")[0] == 0
    assert yaml.safe_load((EXP / "opt.yaml").read_text())["imgsz"] == 96


def test_a_study_that_was_lost_is_missed(tiny, cli, untrained):
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    before = (EXP / "evolve.csv").read_bytes()
    (EXP / "study.db").unlink()
    said = refused(cli, *TRIALS, *tiny.flags())
    assert "evolve.csv tells of trials" in said and (EXP / "evolve.csv").read_bytes() == before


def test_a_folder_that_is_removed_is_named(tiny, cli, monkeypatch, untrained):
    called = Untrained.__call__

    def removes(self, *arguments):
        shutil.rmtree(EXP)
        return called(self, *arguments)

    monkeypatch.setattr(Untrained, "__call__", removes)
    code, _, errors = cli(train, *TRIALS, *tiny.flags())
    assert code == 1 and errors == f"train.py: error: the folder of this sweep has been removed: {EXP}\n"


def test_a_bucket_of_another_study_is_left_alone(tiny, cli, tmp_path, untrained):
    bucket = tmp_path / "bucket"
    assert cli(train, *TRIALS, "--bucket", str(bucket), *tiny.flags())[0] == 0
    before = {path.name: path.read_bytes() for path in bucket.iterdir()}
    said = refused(cli, *TRIALS, "--bucket", str(bucket), *tiny.flags(name="other"))
    assert "it holds the study exp, not other" in said
    assert before == {path.name: path.read_bytes() for path in bucket.iterdir()}


def test_a_bucket_that_takes_nothing_is_known_at_once(tiny, cli, untrained):
    (tiny.folder / "file").touch()
    assert "--bucket" in refused(cli, *TRIALS, "--bucket", str(tiny.folder / "file"), *tiny.flags())


def test_the_last_line_trains_as_the_trials_were_trained(tiny, cli, untrained):
    code, output, _ = cli(train, *TRIALS, *tiny.flags(), "--single-cls")
    line = next(line for line in output.splitlines() if line.startswith("Train with them: "))
    given = parse_flags(TrainOptions, shlex.split(line)[5:], program="train.py")
    expected = {
        name: tiny.options()[name] for name in ("data", "cfg", "imgsz", "batch_size", "device", "workers", "amp")
    }
    assert code == 0 and given == {**expected, "single_cls": True, "hyp": str(EXP / "hyp_evolved.yaml")}


def test_resume_of_a_sweep_without_evolve_says_so(tiny, cli, untrained):
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    assert f"--resume {EXP}: is a sweep; add --evolve N" in refused(cli, "--resume", str(EXP))


def test_other_data_under_the_same_name_are_noticed(tiny, cli):
    assert cli(train, "--evolve", "1", "--evolve-confirm", "0", *tiny.flags())[0] == 0
    tiny.label("train", 0).write_text("1 0.5 0.5 0.3 0.3\n")
    said = refused(cli, *TWO, *tiny.flags())
    assert "images or labels of 'train'" in said and len(finished_of(study_of())) == 1


def test_another_hyp_is_noticed(tiny, cli, untrained):
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    tiny.hyp.write_text(tiny.hyp.read_text() + "iou_t: 0.3\n")
    assert "iou_t: 0.2 there, 0.3 here" in refused(cli, *TRIALS, *tiny.flags())


def test_resume_of_a_training_run_is_none_of_a_sweep(tiny, cli):
    assert cli(train, *tiny.flags())[0] == 0
    assert "is a training run" in refused(cli, "--evolve", "3", "--resume", "runs/train/exp")
    assert "is a training run" in refused(cli, "--evolve", "3", "--resume", "runs/train/exp/weights/last.pt")


def test_resume_refuses_what_would_make_it_another_sweep(tiny, cli, untrained):
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    assert "--imgsz cannot change" in refused(cli, "--evolve", "4", "--resume", "--imgsz", "96")


@pytest.mark.parametrize(
    ("found", "says"),
    [(None, "which is not installed: pip install 'optuna>=4.8,<6'"), ("4.7.1", "Optuna 4.7.1 is too old")],
)
def test_without_optuna_it_is_one_line(tiny, cli, monkeypatch, found, says):
    def version(_):
        if found is None:
            raise metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(metadata, "version", version)
    assert says in refused(cli, *TRIALS, *tiny.flags())


def test_flags_of_evolution_want_evolution(tiny):
    with pytest.raises(UserError, match="--evolve-sampler is of --evolve"):
        train.run(evolve_sampler="tpe", **tiny.options())


def test_a_password_is_written_nowhere(tiny, cli, tmp_path, untrained):
    secrets = (
        *("--bucket", "memory://me:topsecret@b/c"),
        *("--evolve-storage", f"sqlite:///{tmp_path / 'base.db'}?password=topsecret"),
    )
    code, output, errors = cli(train, *TRIALS, *tiny.flags(), *secrets)
    assert code == 0 and "topsecret" not in output + errors
    assert len(finished_of(optuna.load_study(study_name="exp", storage=f"sqlite:///{tmp_path / 'base.db'}"))) == 3
    files = [path for path in EXP.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"topsecret" in path.read_bytes()]
    assert "name it again, with its password" in refused(cli, "--evolve", "4", "--resume")
    assert cli(train, "--evolve", "4", "--evolve-confirm", "0", "--resume", *secrets)[0] == 0


def test_a_sweep_that_is_confirmed_stays_so(tiny, cli, untrained):
    """Whoever looks at it again, until more trials come."""
    flags = ("--evolve", "3", "--evolve-confirm", "2", "--evolve-confirm-seeds", "2")
    assert cli(train, *flags, *tiny.flags())[0] == 0
    told = (EXP / "hyp_evolved.yaml").read_bytes()
    assert json.loads((EXP / "confirm.json").read_text())["reason"].encode() in told
    assert cli(train, *TRIALS, *tiny.flags())[0] == 0
    assert (EXP / "hyp_evolved.yaml").read_bytes() == told
    assert cli(train, "--evolve", "5", "--evolve-confirm", "0", *tiny.flags())[0] == 0
    assert b"best so far" in (EXP / "hyp_evolved.yaml").read_bytes()


def test_a_journal_takes_up_what_was_lost_when_it_is_told_to(tiny, cli, tmp_path, untrained):
    journal = ("--evolve-storage", f"journal:{tmp_path / 'study.log'}")
    code, output, _ = cli(train, *TRIALS, *tiny.flags(), *journal)
    assert code == 0 and "cannot be recognised in a journal" in output
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    study = optuna.load_study(study_name="exp", storage=storage)
    lost = study.ask()  # and never heard of again
    for name, distribution in study.trials[0].distributions.items():
        lost._suggest(name, distribution)
    more = ("--evolve", "5", "--evolve-confirm", "0")
    code, output, _ = cli(train, *more, *tiny.flags(), *journal)
    assert code == 0 and "--resume runs them again" in output and len(finished_of(study)) == 4
    assert cli(train, *more, "--resume")[0] == 0
    assert len(finished_of(study)) == 5 and lost.params in [trial.values for trial in finished_of(study)]


def test_a_trial_that_dies_while_it_is_judged_is_a_failure(tmp_path, monkeypatch):
    trials = Trials(stop=StopRequest(), failures=tmp_path, on_ready=lambda _: None, on_epoch=lambda _: None)

    def killed(process, pipe, goes_on):
        process.kill()
        process.join()
        trials._judged(process, pipe, Evaluated(epoch=1, fitness=0.1, results={}), lambda _: None)
        return followed(process, pipe, goes_on)

    followed = trials._followed
    object.__setattr__(trials, "_followed", killed)
    with pytest.raises(TrialFailed, match="killed"):
        trials("trial_0000", Request(options={}, hyp={}, rungs=(), place=None), lambda _: None)
