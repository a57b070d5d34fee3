"""Checkpoint files: written whole or not at all, plain inside, and harmless whatever they hold."""

import errno
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import (
    LateRunFolder,
    RunFolder,
    averaged_model,
    for_inference,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from utils.structures import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"ema": {"w": torch.arange(6.0)}, "network": {}, "names": ["a"], "options": {}, "hyp": {}, "epoch": 1}
SMALL |= {"best_fitness": 0.5}


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)


# ---- what a run leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_files_of_a_run_hold_plain_values_only(trained, name):
    assert plain(torch.load(trained / "weights" / name, weights_only=True))


def test_last_holds_all_of_a_run_and_best_half_the_weights(trained):
    last, best = (load_checkpoint(trained / "weights" / name) for name in ("last.pt", "best.pt"))
    assert {"model", "ema", "optimizer", "scaler", "ema_updates", "epoch", "options", "hyp"} <= last.keys()
    assert last["epoch"] == 60
    assert last["names"] == best["names"] == ["blue", "red"]
    assert not {"model", "optimizer"} & best.keys()
    assert {tensor.dtype for tensor in best["ema"].values()} == {torch.float16, torch.int64}
    assert {tensor.dtype for tensor in last["ema"].values()} == {torch.float32, torch.int64}
    assert (trained / "weights/best.pt").stat().st_size < (trained / "weights/last.pt").stat().st_size / 4


def test_averaged_model_is_ready_for_inference(trained):
    checkpoint = load_checkpoint(trained / "weights/best.pt")
    model = averaged_model(checkpoint)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in checkpoint["ema"].items())


def test_a_value_too_large_for_half_precision_keeps_its_own():
    variance = torch.tensor([1.0, 1e6])
    kept = for_inference({**SMALL, "ema": {"wild": variance, "tame": variance / 1e6, "count": torch.tensor(3)}})["ema"]
    assert torch.equal(kept["wild"], variance)
    assert kept["tame"].dtype == torch.float16
    assert kept["count"].dtype == torch.int64


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in ("one.pt", "two.pt"):
        save_checkpoint(tmp_path / name, SMALL)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


# ---- interrupted and failing writes ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """Lets no file grow beyond 50 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, small_disk):
    path = tmp_path / "last.pt"
    save_checkpoint(path, SMALL)
    old = path.read_bytes()
    with pytest.raises(OSError) as raised:
        save_checkpoint(path, {**SMALL, "ema": {"w": torch.zeros(100_000)}})
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


_INTERRUPTED = """
import random, signal, sys
from pathlib import Path
import torch
from utils.checkpoint import load_checkpoint, save_checkpoint

def interrupt(*_):
    raise KeyboardInterrupt

path = Path(sys.argv[1])
small = {"ema": {str(i): torch.full((50,), float(i)) for i in range(100)}, "network": {}, "names": []}
save_checkpoint(path, small)
signal.signal(signal.SIGALRM, interrupt)
interrupted = 0
for _ in range(200):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 8e-3))
        save_checkpoint(path, small)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException:  # torch may turn it into an error of its own
        interrupted += 1
signal.setitimer(signal.ITIMER_REAL, 0)
load_checkpoint(path)
print(interrupted)
"""


def test_an_interruption_at_any_instant_ends_no_process_and_leaves_a_whole_file(tmp_path):
    """As by Ctrl-C, or by torch's word that a loader process has died."""
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "last.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_values_that_cannot_be_saved_leave_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, SMALL)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {**SMALL, "options": {"f": lambda: None}})
    assert load_checkpoint(path)["options"] == {}
    assert list(tmp_path.iterdir()) == [path]


def test_a_death_between_the_two_files_repeats_the_epoch(tmp_path, monkeypatch):
    """best.pt may be ahead of last.pt, never behind it: a resumed run would go without the best epoch."""
    run, written = RunFolder(tmp_path), []
    monkeypatch.setattr("utils.checkpoint.save_checkpoint", lambda path, checkpoint: written.append(path.name))
    run.save(SMALL, best=True)
    run.save(SMALL, best=False)
    assert written == ["best.pt", "last.pt", "last.pt"]


# ---- what is kept when ----------------------------------------------------------------------------------------------


def files(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.rglob("*.pt"))


def test_epochs_to_keep_are_complete(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(SMALL, best=False, keep=True)
    assert files(folder) == ["epoch1.pt", "last.pt"]
    assert (tmp_path / "weights/epoch1.pt").read_bytes() == folder.last.read_bytes()


def test_a_late_folder_keeps_the_best_weights_in_memory_and_writes_them_at_the_end(tmp_path):
    """As they were then: training goes on in the very same tensors."""
    weights = {"w": torch.zeros(3), "n": torch.tensor(1), "wild": torch.tensor(1e6)}
    folder = LateRunFolder(tmp_path)
    for epoch in (1, 2, 3):
        for tensor in weights.values():
            tensor += 1
        folder.save(SMALL | {"ema": weights, "epoch": epoch}, best=epoch == 2, final=epoch == 3)
        assert files(folder) == (["best.pt", "last.pt"] if epoch == 3 else [])
    best, last = load_checkpoint(folder.best), load_checkpoint(folder.last)
    assert (best["epoch"], last["epoch"]) == (2, 3)
    assert [tensor.max().item() for tensor in best["ema"].values()] == [2, 3, 1e6 + 2]
    assert last["ema"]["w"].tolist() == [3] * 3


def test_a_late_folder_without_better_weights_leaves_the_best_that_are_there(tmp_path):
    RunFolder(tmp_path).save(SMALL, best=True)
    before = (tmp_path / "weights/best.pt").read_bytes()
    LateRunFolder(tmp_path).save(SMALL | {"epoch": 2}, best=False, final=True)
    assert (tmp_path / "weights/best.pt").read_bytes() == before
    assert load_checkpoint(tmp_path / "weights/last.pt")["epoch"] == 2


# ---- files that are none --------------------------------------------------------------------------------------------


class Trap:
    """Unpickled in earnest, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_checkpoint(path)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    return message


def test_missing_file_and_folder(tmp_path):
    assert "not found" in one_line(tmp_path / "none.pt")
    assert "not found" in one_line(tmp_path / "none" / "none.pt")
    assert "folder" in one_line(tmp_path)


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "text": lambda path: path.write_text("hello, I am a checkpoint\n"),
    "yaml": lambda path: path.write_text("nc: 2\nnames: [a, b]\n"),
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "other zip": lambda path: zipfile.ZipFile(path, "w").writestr("a/data.pkl", b"junk"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"ema": {}})),
    "popped pickle": lambda path: path.write_bytes(b"\x80\x02."),
    "other tensors": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a list": lambda path: torch.save(["schema", "ema", "network", "names"], path),
    "a whole module": lambda path: torch.save({"model": nn.Linear(2, 2)}, path),
    "old format": lambda path: torch.save({"model": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
    "arrays": lambda path: torch.save({**SMALL, "schema": 1, "epoch": np.float64(1)}, path),
    "from the future": lambda path: torch.save({**SMALL, "schema": 99}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(tmp_path, kind, recwarn):
    FOREIGN[kind](tmp_path / "x.pt")
    one_line(tmp_path / "x.pt")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model(tmp_path, recwarn):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "x.pt")
    recwarn.clear()
    one_line(tmp_path / "x.pt")
    assert [str(warning.message) for warning in recwarn] == []


def test_truncated_and_scribbled_files(tmp_path):
    """Whatever is left of a file: it loads as it was, or it is one line. Never another exception."""
    path, rng = tmp_path / "x.pt", random.Random(0)
    save_checkpoint(path, SMALL)
    whole = path.read_bytes()
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(60)]
    for _ in range(150):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + rng.randbytes(rng.choice([1, 4, 64])) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, new_format):
    made = tmp_path / "made"
    content = {**SMALL, "schema": 1, "hyp": Trap(made)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    one_line(tmp_path / "x.pt")
    assert not made.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert made.exists()  # the trap works


# ---- newest ---------------------------------------------------------------------------------------------------------


def test_newest_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no last\.pt below"):
        newest_checkpoint(tmp_path / "runs")
    for age, name in enumerate(["b", "a", "c/d"]):
        path = tmp_path / name / "weights" / "last.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    os.utime(tmp_path / "a/weights/last.pt", (2000, 2000))
    assert newest_checkpoint(tmp_path) == tmp_path / "a/weights/last.pt"
