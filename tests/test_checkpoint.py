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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils import __version__
from utils.checkpoint import averaged_model, checksum, for_inference, load_checkpoint, main, save_checkpoint
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
    assert (trained / "weights/best.pt").stat().st_size < (trained / "weights/last.pt").stat().st_size / 3


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


@pytest.mark.parametrize(
    "change", [{"ema": {"w": torch.zeros(3)}}, {"epoch": 2}, {"more": None}, {"checksum": "0" * 32}]
)
def test_a_whole_file_of_other_values_is_damage(tmp_path, change):
    """As zip's own checksums would not tell."""
    save_checkpoint(tmp_path / "x.pt", {**SMALL, "ema": {"w": torch.ones(3)}})
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.save(content, tmp_path / "x.pt")
    load_checkpoint(tmp_path / "x.pt")
    torch.save(content | change, tmp_path / "x.pt")
    assert "its checksum is wrong" in one_line(tmp_path / "x.pt")


def test_a_checksum_tells_plain_values_apart():
    values = [{"a": 1}, {"a": 1.0}, {"b": 1}, {"a": [1]}, {"a": (1,)}, {"a": True}, {"a": "1"}, {"a": None}, {}]
    assert len(set(map(checksum, values))) == len(values)


def test_a_checksum_is_that_of_the_values_and_not_of_how_they_lie_in_memory():
    weights = torch.rand(4, 3, 2, 2)
    assert checksum(weights) == checksum(weights.to(memory_format=torch.channels_last))
    others = [weights.double(), weights.reshape(3, 4, 2, 2), weights + 1e-6, weights.bfloat16(), weights[0, 0, 0, 0]]
    assert len({checksum(one) for one in [weights, *others]}) == 6
    assert checksum(torch.tensor(3)) == checksum(torch.tensor(3))


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(
        OSError, match=r"No space left on device \(\d\.\d MiB are needed, 0\.0 MiB are free\)"
    ) as raised:
        save_checkpoint(tmp_path / "x.pt", SMALL)
    assert raised.value.filename == str(tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


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
    "arrays": lambda path: torch.save({**SMALL, "schema": 2, "epoch": np.float64(1)}, path),
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
    content = {**SMALL, "schema": 2, "hyp": Trap(made)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    one_line(tmp_path / "x.pt")
    assert not made.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert made.exists()  # the trap works


# ---- newest ---------------------------------------------------------------------------------------------------------
