"""The folder of a run: what is written when, what a damaged file is replaced by, and what a death in between leaves."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.checkpoint import load_checkpoint
from utils.run_folder import LateRunFolder, RunFolder, load_last, newest_checkpoint
from utils.structures import RunError, UserError

SMALL = {"ema": {"w": torch.arange(6.0)}, "network": {}, "names": ["a"], "options": {}, "hyp": {}, "epoch": 1}
SMALL |= {"best_fitness": 0.5}


def scribble(path: Path) -> None:
    """Another bit in the midst of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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


# ---- deaths and damage -----------------------------------------------------------------------------------------------


def test_a_death_between_the_two_files_repeats_the_epoch(tmp_path, monkeypatch):
    """best.pt may be ahead of last.pt, never behind it: a resumed run would go without the best epoch."""
    run, written = RunFolder(tmp_path), []
    monkeypatch.setattr("utils.run_folder.save_checkpoint", lambda path, *_, **__: written.append(path.name))
    run.save(SMALL, best=True)
    run.save(SMALL, best=False)
    run.settle()
    assert written == ["best.pt", "last.pt", "last.pt"]


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


def test_a_new_run_keeps_no_checkpoint_of_an_earlier_one_to_go_on_from(tmp_path):
    run = saved_twice(tmp_path)
    RunFolder(tmp_path).take_over()
    assert files(run) == []


def test_a_write_that_failed_is_made_up_for_by_the_next(tmp_path, monkeypatch):
    run = saved_twice(tmp_path)
    with monkeypatch.context() as context:
        context.setattr("utils.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        run.save(SMALL | {"epoch": 3})
        run.pause()
        with pytest.raises(OSError, match="No space left"):
            run.save(SMALL | {"epoch": 4})  # for the second time
        run.save(SMALL | {"epoch": 5})
        run.pause()
    run.save(SMALL | {"epoch": 6})
    run.settle()
    assert [load_checkpoint(path)["epoch"] for path in (run.last, run.previous)] == [6, 2]


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_what_fails_for_another_reason_than_damage_is_no_damage(tmp_path, monkeypatch, error):
    """The newer file stays the one to go on from."""
    run = saved_twice(tmp_path)

    def fails(*_):
        raise error

    monkeypatch.setattr("utils.archive._archive", fails)
    with pytest.raises(type(error)):
        load_last(run.last, pytest.fail)


def test_another_format_is_no_damage(tmp_path):
    run = saved_twice(tmp_path)
    for path in (run.last, run.previous):
        torch.save({**SMALL, "schema": 99}, path)
    with pytest.raises(UserError, match="has format 99") as raised:
        load_last(run.last, pytest.fail)
    assert "damaged" not in str(raised.value)


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


def test_a_run_folder_that_was_removed_is_said_to_be(tmp_path):
    run = RunFolder(tmp_path / "gone")
    run.save(SMALL)
    with pytest.raises(RunError, match=r"the folder of this run has been removed.*gone"):
        run.settle()


def test_the_newest_run_may_have_lost_its_last_checkpoint(tmp_path):
    for age, name in ((2, "old/weights/last.pt"), (1, "new/weights/previous.pt")):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_checkpoint(tmp_path) == tmp_path / "new/weights/last.pt"


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
