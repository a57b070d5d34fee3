"""Checkpoint files: written whole or not at all, plain inside, and harmless whatever they hold."""

import errno
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.yolo import DetectionModel, read_network
from utils import __version__
from utils.checkpoint import (
    LateRunFolder,
    RunFolder,
    averaged_model,
    checksum,
    for_inference,
    load_checkpoint,
    load_last,
    main,
    newest_checkpoint,
    save_checkpoint,
    transfer,
)
from utils.structures import RunError, UserError

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
    with pytest.raises(TypeError, match="function is no plain value"):
        save_checkpoint(path, {**SMALL, "options": {"f": lambda: None}})
    assert load_checkpoint(path)["options"] == {}
    assert list(tmp_path.iterdir()) == [path]


def test_a_death_between_the_two_files_repeats_the_epoch(tmp_path, monkeypatch):
    """best.pt may be ahead of last.pt, never behind it: a resumed run would go without the best epoch."""
    run, written = RunFolder(tmp_path), []
    monkeypatch.setattr("utils.checkpoint.save_checkpoint", lambda path, *_, **__: written.append(path.name))
    run.save(SMALL, best=True)
    run.save(SMALL, best=False)
    run.settle()
    assert written == ["best.pt", "last.pt", "last.pt"]


# ---- damage ---------------------------------------------------------------------------------------------------------


def scribble(path: Path, *, at: float = 0.5) -> None:
    """Another bit in the midst of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def test_one_wrong_bit_in_a_tensor_is_damage(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {**SMALL, "ema": {"w": torch.rand(10_000)}})
    load_checkpoint(path)
    scribble(path)
    assert "damaged" in one_line(path)


def test_a_checksum_tells_plain_values_apart():
    values = [{"a": 1}, {"a": 1.0}, {"b": 1}, {"a": [1]}, {"a": (1,)}, {"a": True}, {"a": "1"}, {"a": None}, {}]
    assert len(set(map(checksum, values))) == len(values)


def test_a_checksum_is_that_of_the_values_and_not_of_how_they_lie_in_memory():
    weights = torch.rand(4, 3, 2, 2)
    assert checksum(weights) == checksum(weights.to(memory_format=torch.channels_last))
    others = [weights.double(), weights.reshape(3, 4, 2, 2), weights + 1e-6, weights.bfloat16(), weights[0, 0, 0, 0]]
    assert len({checksum(one) for one in [weights, *others]}) == 6
    assert checksum(torch.tensor(3)) == checksum(torch.tensor(3))


def saved_twice(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    for epoch in (1, 2):
        run.save(SMALL | {"epoch": epoch, "ema": {"w": torch.rand(10_000)}})
    run.settle()
    return run


@pytest.mark.parametrize("damage", [scribble, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_in_the_place_of_a_damaged_last_the_one_before_it_is_taken(tmp_path, damage):
    run, said = saved_twice(tmp_path), []
    assert load_last(run.last, said.append)[1] == run.last
    damage(run.last)
    checkpoint, source = load_last(run.last, said.append)
    assert (checkpoint["epoch"], source) == (1, run.previous)
    [line] = said
    assert str(run.last) in line and f"going on from {run.previous}" in line
    run.take_over(source)
    assert load_checkpoint(run.last)["epoch"] == 1
    assert not run.previous.exists()


def test_where_both_are_damaged_the_newer_one_is_complained_of(tmp_path):
    run, said = saved_twice(tmp_path), []
    for path in (run.last, run.previous):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(str(run.last))):
        load_last(run.last, said.append)
    assert said == []


def test_the_one_before_is_kept_until_the_next_is_complete(tmp_path, monkeypatch):
    run = saved_twice(tmp_path)
    assert load_checkpoint(run.previous)["epoch"] == 1

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.files.os.fsync", fails)
    run.save(SMALL | {"epoch": 3})
    with pytest.raises(OSError, match="No space left"):
        run.settle()
    assert [load_checkpoint(path)["epoch"] for path in (run.last, run.previous)] == [2, 1]
    run.settle()  # said once


def test_where_there_are_no_hard_links_the_one_before_is_kept_as_well(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    run = saved_twice(tmp_path)
    assert [load_checkpoint(path)["epoch"] for path in (run.last, run.previous)] == [2, 1]


def test_a_new_run_keeps_nothing_of_an_earlier_one_in_its_folder(tmp_path):
    saved_twice(tmp_path)
    run = RunFolder(tmp_path)
    run.save(SMALL | {"epoch": 0})
    run.settle()
    assert load_checkpoint(run.last)["epoch"] == 0
    assert not run.previous.exists()


def test_what_a_killed_write_left_is_removed(tmp_path):
    run = saved_twice(tmp_path)
    left = [run.last.with_name(".last.pt.0123abcd"), run.path / ".opt.yaml.89abcdef"]
    mine = [run.path / ".gitignore", run.path / ".mydata-train.cache"]
    for path in left + mine:
        path.touch()
    run.take_over(run.last)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in mine)


def test_a_finished_run_keeps_last_alone(tmp_path):
    run = saved_twice(tmp_path)
    run.tidy()
    assert files(run) == ["last.pt"]


def test_a_copy_is_saved_while_training_goes_on(tmp_path):
    weights, run = {"w": torch.zeros(1_000_000)}, RunFolder(tmp_path)
    run.save(SMALL | {"ema": weights})
    weights["w"] += 1
    run.settle()
    assert load_checkpoint(run.last)["ema"]["w"].max() == 0


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(
        OSError, match=r"No space left on device \(\d\.\d MiB are needed, 0\.0 MiB are free\)"
    ) as raised:
        save_checkpoint(tmp_path / "x.pt", SMALL)
    assert raised.value.filename == str(tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_was_removed_is_said_to_be(tmp_path):
    run = RunFolder(tmp_path / "gone")
    run.save(SMALL)
    with pytest.raises(RunError, match=r"the folder of this run has been removed.*gone"):
        run.settle()


# ---- what is in a file ----------------------------------------------------------------------------------------------


def test_a_file_says_what_it_is(trained, capsys):
    assert main([str(trained / "weights/last.pt"), str(trained / "weights/best.pt")]) == 0
    last, best = capsys.readouterr().out.split("file ")[1:]
    for words in (
        "checksum right",
        "classes    2: blue, red",
        "60 of 60 done",
        "lr0: 0.02",
        "batch_size: 4",
        "made on",
    ):
        assert words in last
    assert "\noptimizer" in last and "\noptimizer" not in best
    assert "float16" in best and "float16" not in last
    assert f"torch {torch.__version__}" in best


def test_a_file_that_is_none_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.pt")]) == 2
    problems = capsys.readouterr().err
    assert problems.startswith("utils.checkpoint: error: checkpoint not found") and problems.count("\n") == 1


def test_the_version_is_that_of_the_project():
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


# ---- what is kept when ----------------------------------------------------------------------------------------------


def files(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.rglob("*.pt"))


def test_epochs_to_keep_are_complete(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(SMALL, best=False, keep=True)
    folder.settle()
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
        folder.settle()
        assert files(folder) == (["best.pt", "last.pt"] if epoch == 3 else [])
    best, last = load_checkpoint(folder.best), load_checkpoint(folder.last)
    assert (best["epoch"], last["epoch"]) == (2, 3)
    assert [tensor.max().item() for tensor in best["ema"].values()] == [2, 3, 1e6 + 2]
    assert last["ema"]["w"].tolist() == [3] * 3


def test_a_late_folder_without_better_weights_leaves_the_best_that_are_there(tmp_path):
    first, second = RunFolder(tmp_path), LateRunFolder(tmp_path)
    first.save(SMALL, best=True)
    first.settle()
    before = (tmp_path / "weights/best.pt").read_bytes()
    second.save(SMALL | {"epoch": 2}, best=False, final=True)
    second.settle()
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


# ---- transfer, newest -----------------------------------------------------------------------------------------------


def test_transfer_takes_what_fits_by_name_and_shape(tiny):
    network = read_network(str(tiny.cfg))
    donor, model = DetectionModel(network, seed=1), DetectionModel(network, num_classes=5, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in donor.state_dict().items()} | {"model.99.conv.weight": torch.ones(1)}

    count, _ = transfer(model, given)

    copied = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if name not in copied} == {name for name in before if name.startswith("model.10.")}
    assert count == len(copied)
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in copied)


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
