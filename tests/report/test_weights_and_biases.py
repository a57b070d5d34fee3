"""Weights & Biases: one run in earnest, offline; the rest with a package that writes down what it is told."""

import gc
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import train
from tests.report.logged import METRICS, logged_epoch, logged_run
from utils.config import TrainOptions
from utils.report import weights_and_biases
from utils.report.csv_table import CsvTable
from utils.report.logger import Guard, Guarded
from utils.report.loggers import RESULT_COLUMNS, TIMING_COLUMNS
from utils.report.weights_and_biases import WandbLogger, asked_for, run_id
from utils.structures import UserError

ROOT = Path(__file__).resolve().parents[2]
FAKE = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace

def say(what, **more):
    with Path(os.environ["FAKE_SAYS"]).open("a") as file:
        print(json.dumps([what, more], default=str), file=file)

class Settings:
    def __init__(self, **values): self.values = values

def setup(): return SimpleNamespace(settings=SimpleNamespace(project=os.environ.get("WANDB_PROJECT")))

def Image(data, **_): return f"picture of {data}" if isinstance(data, str) else f"picture {data.shape}"

def Html(path, **_): return f"page of {path}"

class Artifact:
    def __init__(self, **about): self.about, self.files = about, []
    def add_file(self, path, *, name, policy, skip_cache): self.files.append([path, name])

class Run:
    step = int(os.environ.get("FAKE_STEP", 0))
    summary = SimpleNamespace(update=lambda values: say("summary", values=values))
    def define_metric(self, name, **more): say("axis", name=name, **more)
    def log(self, values, *, step, commit):
        say("log", values=values, step=step)
        self.step = step + commit
    def log_artifact(self, artifact, *, aliases):
        say("artifact", **artifact.about, files=artifact.files, aliases=aliases)
    def finish(self, *, exit_code):
        if os.environ.get("FAKE") == "never finishes": time.sleep(60)
        say("finish", exit_code=exit_code)

def init(settings, **values):
    say("init", pid=os.getpid(), tty=sys.stdin.isatty(), **settings.values, **values)
    if os.environ.get("FAKE") == "no login": raise RuntimeError("No API key configured.\\nLog in.")
    if os.environ.get("FAKE") == "never begins": time.sleep(60)
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The package that writes down; what it was told, by kind, in order."""
    package, says = tmp_path / "packages" / "wandb.py", tmp_path / "says.jsonl"
    package.parent.mkdir()
    package.write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FAKE_SAYS", str(says))

    def told(kind: str) -> list[dict]:
        lines = says.read_text().splitlines() if says.exists() else []
        return [more for what, more in map(json.loads, lines) if what == kind]

    return told


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "my runs" / "exp 2"
    (folder / "weights").mkdir(parents=True)
    return folder


def until(holds, within_s=10.0):
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- in earnest ---------------------------------------------------------------------------------------------------


def records(file: Path):
    """The records of a .wandb file, which is a log as LevelDB writes them, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = -place % 32768  # of the block
        if 0 < left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its end
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def key_of(item) -> str:
    return item.key or "/".join(item.nested_key)


def read_run(folder: Path):
    """Id, rows of the history, summary, and artifacts by type."""
    [file] = folder.glob("*.wandb")
    seen = list(records(file))
    [run] = [one.run for one in seen if one.WhichOneof("record_type") == "run"][:1]
    rows = [
        {key_of(item): json.loads(item.value_json) for item in one.history.item} for one in seen if one.history.item
    ]
    summary = {key_of(item): json.loads(item.value_json) for one in seen for item in one.summary.update}
    requests = [one.request.log_artifact.artifact for one in seen if one.request.HasField("log_artifact")]
    artifacts = {one.type: one for one in [*requests, *(one.artifact for one in seen if one.HasField("artifact"))]}
    return run, rows, summary, artifacts


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that have to do with the wandb of a run, known by their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder / "wandb") in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_an_offline_run_holds_the_metrics_and_a_resumed_one_continues_it(tiny, start, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start("train.py", *tiny.flags("--upload-dataset", "--artifact-alias", "mine", epochs=2))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    assert b"no more" not in output + errors
    folder = Path("runs/train/exp")
    [first] = folder.glob("wandb/offline-run-*")
    run, rows, summary, artifacts = read_run(first)
    assert (run.project, run.display_name) == ("train", "exp")
    table = CsvTable(folder / "results.csv", RESULT_COLUMNS).rows()
    logged = [row for row in rows if "train/box_loss" in row]
    for column in RESULT_COLUMNS:
        of_file = [float(row[column]) for row in table]
        assert [row[column] for row in logged] == pytest.approx(of_file, rel=1e-4), column
    assert [row["_step"] for row in logged] == [1, 2]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert summary["final/mAP_0.5:0.95"] == metrics["mAP_0.5:0.95"]
    assert set(artifacts["model"].aliases) == {"best", "mine", "latest"}  # the last is of wandb
    assert {entry.path for entry in artifacts["model"].manifest.contents} == {"best.pt"}
    assert {"data.yaml", "images/val/3.png", "labels/train/7.txt"} <= {
        entry.path for entry in artifacts["dataset"].manifest.contents
    }
    assert processes_of(folder.resolve()) == []

    train.run(resume=str(folder), epochs=3, quiet=True)
    [second] = set(folder.glob("wandb/offline-run-*")) - {first}
    again, rows, *_ = read_run(second)
    assert again.run_id == run.run_id
    assert [(row["_step"], row["epoch"]) for row in rows if "train/box_loss" in row] == [(3, 3)]
    assert processes_of(folder.resolve()) == []


# ---- what is told -------------------------------------------------------------------------------------------------


def test_all_of_a_run_is_told(fake, run_folder):
    for name in ("results.png", "val_batch0_pred.jpg", "report.html", "weights/best.pt"):
        (run_folder / name).write_text(name)
    logger = WandbLogger(logged_run(run_folder, wandb_id="abc", entity="us", artifact_alias="mine"))
    logger.images({"train/batch0": np.zeros((4, 6, 3), np.uint8)}, 0)
    for epoch in range(2):
        logger.epoch(logged_epoch(epoch, METRICS))
    logger.close(METRICS)

    [init] = fake("init")
    assert {name: init[name] for name in ("id", "entity", "project", "name", "resume", "dir", "console", "tty")} == {
        "id": "abc",
        "entity": "us",
        "project": "my-runs",
        "name": "exp 2",
        "resume": "allow",
        "dir": str(run_folder),
        "console": "off",
        "tty": False,
    }
    assert init["config"]["options"]["imgsz"] == 64
    assert init["config"]["hyp"]["lr0"] == 0.01
    assert init["config"]["about"]["splits"]["val"]["labels_of_class"] == [9, 3]
    picture, first, second, files = fake("log")
    assert picture == {
        "values": {"train/batch0": "picture (4, 6, 3)", "epoch": 0},
        "step": 0,
    }
    assert set(first["values"]) == {*RESULT_COLUMNS} | {f"time/{name}" for name in TIMING_COLUMNS[1:]}
    assert (second["values"]["epoch"], second["step"], second["values"]["x/lr0"]) == (2, 2, 0.1)
    assert files["values"] == {
        "final/results": f"picture of {run_folder}/results.png",
        "final/val_batch0_pred": f"picture of {run_folder}/val_batch0_pred.jpg",
        "final/report": f"page of {run_folder}/report.html",
        "epoch": 2,
    }
    assert fake("summary")[0]["values"]["final/mAP_0.5"] == METRICS.map50
    [model] = fake("artifact")
    assert (model["name"], model["type"], model["aliases"]) == ("run-exp-2-weights", "model", ["best", "mine"])
    assert model["files"] == [[str(run_folder / "weights/best.pt"), "best.pt"]]
    assert model["metadata"]["metrics"]["recall"] == METRICS.recall
    assert fake("finish") == [{"exit_code": 0}]
    assert not is_alive(init["pid"])


def test_an_epoch_that_comes_again_is_a_later_step(fake, run_folder, monkeypatch):
    monkeypatch.setenv("FAKE_STEP", "6")  # of what the server has
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    logger = WandbLogger(logged_run(run_folder, start_epoch=4, epochs=7, wandb_id="abc"))
    for epoch in range(4, 7):
        logger.epoch(logged_epoch(epoch))
    logger.close()
    assert [(row["step"], row["values"]["epoch"]) for row in fake("log")] == [(6, 5), (7, 6), (8, 7)]
    assert {"name": "*", "step_metric": "epoch"} in fake("axis")
    assert fake("init")[0]["project"] == "theirs"


@pytest.mark.parametrize(("most", "sent"), [(16, True), (15, False)])
def test_more_images_than_make_sense_are_not_sent(fake, run_folder, tiny, monkeypatch, most, sent):
    with tiny.data.open("a") as data:
        print("test: images/test", file=data)
    shutil.copytree(tiny.folder / "images/val", tiny.folder / "images/test")
    monkeypatch.setattr(weights_and_biases, "_MOST_IMAGES", most)  # of 8 + 4 + 4; labels do not count
    notes = []
    run = logged_run(run_folder, note=notes.append, wandb_id="abc", upload_dataset=True, data=str(tiny.data))
    WandbLogger(run).close(METRICS)
    assert [one["type"] for one in fake("artifact")] == ["model", "dataset"][: 1 + sent]
    assert fake("finish") == [{"exit_code": 0}]
    assert notes == ([] if sent else [f"--upload-dataset: not done: {tiny.data} has more than 15 images"])


@pytest.mark.parametrize("broken", ["not there", "unreadable"])
def test_data_that_cannot_be_sent_cost_no_weights(fake, run_folder, tmp_path, broken):
    path = tmp_path / "data.yaml"
    if broken == "unreadable":
        path.write_text("train: [")
    notes = []
    run = logged_run(run_folder, note=notes.append, wandb_id="abc", upload_dataset=True, data=str(path))
    WandbLogger(run).close(METRICS)
    assert [one["type"] for one in fake("artifact")] == ["model"] and fake("finish") == [{"exit_code": 0}]
    (note,) = notes
    assert note.startswith("--upload-dataset: not done: ") and "data.yaml" in note


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_without_a_login_there_is_one_warning(fake, run_folder, monkeypatch):
    monkeypatch.setenv("FAKE", "no login")
    warnings = []
    run = logged_run(run_folder, wandb_id="abc")
    logger = Guarded(lambda: WandbLogger(run), Guard("Weights & Biases", warnings.append))
    logger.epoch(logged_epoch(0))
    until(lambda: fake("init") and not is_alive(fake("init")[0]["pid"]))
    for epoch in range(1, 3):
        logger.epoch(logged_epoch(epoch))
    logger.close(METRICS)
    assert warnings == ["no more Weights & Biases in this run, which goes on: No API key configured."]


@pytest.mark.parametrize("state", ["never begins", "never finishes"])
def test_nothing_waits_for_a_package_that_hangs(fake, run_folder, monkeypatch, state):
    monkeypatch.setenv("FAKE", state)
    monkeypatch.setattr(weights_and_biases, "_SAID_S", 0.1)
    monkeypatch.setattr(weights_and_biases, "_FINISH_S", 0.4)
    notes = []
    logger = WandbLogger(logged_run(run_folder, note=notes.append, wandb_id="abc"))
    began = time.monotonic()
    logger.images({"large": np.zeros((1000, 1000, 3), np.uint8)}, 0)  # more than a pipe holds
    logger.epoch(logged_epoch(0))
    assert time.monotonic() - began < 0.3
    until(lambda: fake("init"))
    with pytest.raises(RuntimeError, match="not all was sent in 0 s; `wandb sync` sends"):
        logger.close(METRICS)
    assert notes == ["sending what is left to Weights & Biases, for 0 s at most"]
    assert not is_alive(fake("init")[0]["pid"])


def test_a_process_that_never_reads_is_ended_before_memory_is_full(fake, run_folder, monkeypatch):
    monkeypatch.setenv("FAKE", "never begins")
    monkeypatch.setattr(weights_and_biases, "_MOST_WAITING", 8 << 20)
    warnings, told = [], 0
    run = logged_run(run_folder, wandb_id="abc")
    logger = Guarded(lambda: WandbLogger(run), Guard("Weights & Biases", warnings.append))
    logger.epoch(logged_epoch(0))
    until(lambda: fake("init"))
    began = time.monotonic()
    while not warnings:
        logger.images({"large": np.zeros((1000, 1000, 3), np.uint8)}, told)
        told += 1
    assert time.monotonic() - began < 1
    assert told == 4  # of 3 MB, and one that is not taken
    assert warnings == [
        "no more Weights & Biases in this run, which goes on: it does not keep up: 8 MB wait for it",
    ]
    assert not is_alive(fake("init")[0]["pid"])
    logger.close(METRICS)
    assert len(warnings) == 1


@pytest.mark.parametrize("hears", [True, False])
def test_a_run_that_is_interrupted_is_told_so_and_leaves_no_process(fake, run_folder, hears):
    logger = WandbLogger(logged_run(run_folder, wandb_id="abc"))
    logger.epoch(logged_epoch(0))
    if hears:
        logger.close()
    del logger
    gc.collect()
    assert len(fake("log")) == 1
    assert fake("finish") == [{"exit_code": 1}]
    assert not is_alive(fake("init")[0]["pid"])


def test_a_run_that_is_interrupted_waits_for_nothing_that_hangs(fake, run_folder, monkeypatch):
    monkeypatch.setenv("FAKE", "never finishes")
    monkeypatch.setattr(weights_and_biases, "_LEAVE_S", 0.3)  # and not _SAID_S as well
    logger = WandbLogger(logged_run(run_folder, wandb_id="abc"))
    logger.epoch(logged_epoch(0))
    until(lambda: fake("log"))
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="not all was sent"):
        logger.close()
    assert time.monotonic() - began < 1
    assert not is_alive(fake("init")[0]["pid"])


def test_a_process_whose_run_was_killed_ends_too(fake, tmp_path):
    code = "from utils.report.wandb_process import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT)
    pickle.dump(({"project": "train"}, os.getpid()), process.stdin)
    pickle.dump(("scalars", {"x": 1.0}, 1), process.stdin)
    process.stdin.write(pickle.dumps(("scalars", {"x": 2.0}, 2))[:9])  # in the midst of it
    process.stdin.close()
    assert process.wait(10) == 0
    assert [row["values"] for row in fake("log")] == [{"x": 1.0, "epoch": 1}]
    assert fake("finish") == [{"exit_code": 1}]


# ---- who asks for it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode", "by"),
    [
        ({}, None, None),
        ({}, "offline", "WANDB_MODE=offline"),
        ({}, "dryrun", "WANDB_MODE=dryrun"),
        ({}, "disabled", None),
        ({"entity": "us"}, "disabled", None),
        ({"entity": "us"}, None, "--entity"),
        ({"upload_dataset": True}, None, "--upload-dataset"),
        ({"bbox_interval": 0}, "online", "--bbox-interval"),
        ({"artifact_alias": "mine"}, None, "--artifact-alias"),
    ],
)
def test_flags_and_the_environment_ask_for_it(options, mode, by):
    assert asked_for(TrainOptions(**options), mode) == by


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(UserError, match=r"^WANDB_MODE=nonsense: should be online, offline or disabled$"):
        asked_for(TrainOptions(), "nonsense")


def test_a_run_that_leaves_it_says_so(tiny, monkeypatch, capsys):
    train.run(**tiny.options())
    run_id(Path("runs/train/exp"), resumed=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train.run(resume="runs/train/exp/weights/last.pt", epochs=2)
    assert "note: this run is in Weights & Biases so far; with WANDB_MODE=online, or offline" in capsys.readouterr().out


def test_a_run_without_it_has_no_folder_of_it(tmp_path):
    logger = WandbLogger(logged_run(tmp_path))
    logger.epoch(logged_epoch(0))
    logger.close(METRICS)
    assert list(tmp_path.iterdir()) == []


def test_a_flag_without_the_package_is_refused_before_anything_is_written(tiny, cli, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "_installed", lambda: False)
    code, _, errors = cli(train, *tiny.flags("--entity", "us"))
    assert code == 2
    assert "--entity: needs the wandb package: pip install wandb; or leave it out" in errors
    assert not Path("runs").exists()


def test_the_environment_without_the_package_is_a_note(tiny, monkeypatch, capsys):
    monkeypatch.setattr(weights_and_biases, "_installed", lambda: False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train.run(**tiny.options())
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("WANDB_MODE=offline needs the wandb package: pip install wandb") == 1
    assert not Path("runs/train/exp/wandb").exists()


def test_a_resumed_run_keeps_its_id_and_a_new_one_in_its_folder_does_not(tmp_path):
    first = run_id(tmp_path, resumed=False)
    assert run_id(tmp_path, resumed=True) == first
    assert run_id(tmp_path, resumed=False) != first


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_is_a_logger(tmp_path):
    page = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(example, names)
    for first, last in ((0, 3), (1, 3), (2, 4)):  # ended, resumed and killed, resumed
        logger = names["JsonLogger"](logged_run(tmp_path, start_epoch=first))
        for epoch in range(first, last):
            logger.epoch(logged_epoch(epoch, METRICS))
            logger.images({}, epoch)
        logger.close(None if first == 1 else METRICS)
    *epochs, end = map(json.loads, (tmp_path / "epochs.jsonl").read_text().splitlines())
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert end == {"best mAP_0.5:0.95": METRICS.map50_95}
