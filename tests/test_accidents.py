"""What a user meets when a disk is full or read-only, a folder is removed, or a checkpoint is damaged."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import train
from benchmarks.soak_sameness import differences, unfinished
from utils.checkpoint import load_checkpoint
from utils.train.trainer import Trainer

RUN = Path("runs/train/exp")
LONGEST_S = 200  # that a process may take to end, on a busy machine
LAST, PREVIOUS = (RUN / "weights" / name for name in ("last.pt", "previous.pt"))


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """To the last byte."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return path


def fill_for_good(folder: Path, process: subprocess.Popen) -> Path:
    """Whatever the process may write or remove, which goes on when there is no room any more."""
    process.send_signal(signal.SIGSTOP)
    path = fill(folder)
    process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + LONGEST_S
    while process.poll() is None and time.monotonic() < deadline:
        fill(folder)
        time.sleep(0.01)
    return path


def wait_for(process: subprocess.Popen, words: bytes) -> None:
    while words not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and standard error."""
    _, problems = process.communicate(timeout=LONGEST_S)
    return process.returncode, problems.decode()


@pytest.mark.parametrize("flags", [{}, {"save_every": 1e-6}], ids=["epochs", "batches"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tiny, start, disk, flags):
    process = start("train.py", *tiny.flags(epochs=16, project=disk, name="run", **flags))
    wait_for(process, b" 2/16 ")
    filler = fill_for_good(disk, process)
    code, problems = end_of(process)
    assert code == 1
    assert re.fullmatch(rf"train\.py: error: No space left on device[^\n]*: {disk}/run/\S+\n", problems), problems
    last = disk / "run/weights/last.pt"
    assert load_checkpoint(last)["epoch"] >= 1 and not unfinished(disk)
    filler.unlink()
    for flags in (["--resume", last], tiny.flags(epochs=16)):
        assert end_of(start("train.py", *map(str, flags))) == (0, "")
    assert differences(disk / "run", RUN) == []


def test_a_disk_that_is_full_when_tables_grow_is_one_line_that_names_one(tiny, start, disk):
    process = start("train.py", *tiny.flags("--nosave", epochs=5000, project=disk, name="run"))
    wait_for(process, b" 2/5000 ")
    fill_for_good(disk, process)
    code, problems = end_of(process)
    assert code == 1
    assert re.fullmatch(rf"train\.py: error: No space left on device: {disk}/run/\S+\n", problems), problems


def test_a_full_disk_at_the_start_is_one_line(tiny, cli, disk):
    fill(disk)
    code, _, problems = cli(train, *tiny.flags(project=disk, name="run"))
    assert (code, problems.count("\n")) == (1, 1)
    assert re.match(rf"train\.py: error: No space left on device[^\n]*: {disk}/run", problems), problems


def test_a_disk_that_cannot_be_written_is_one_line_and_nothing_changes(tiny, start, cli, disk):
    process = start("train.py", *tiny.flags(epochs=5000, project=disk, name="run"))
    wait_for(process, b" 2/5000 ")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 128 + signal.SIGTERM
    before = contents(disk)
    mount("-o", "remount,ro", disk)
    for flags, codes in ((["--resume", disk / "run/weights/last.pt"], {1}), (tiny.flags(project=disk), {2})):
        code, _, problems = cli(train, *map(str, flags))
        assert code in codes
        assert re.fullmatch(rf"train\.py: error: [^\n]*{disk}/\S+?[^\n]*\n", problems)
        assert "Read-only file system" in problems
        assert contents(disk) == before
    mount("-o", "remount,rw", disk)
    epoch = load_checkpoint(disk / "run/weights/last.pt")["epoch"]
    assert cli(train, "--resume", str(disk / "run/weights/last.pt"), "--epochs", str(epoch + 1))[::2] == (0, "")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- folders --------------------------------------------------------------------------------------------------------


REMOVED = f"train.py: error: the folder of this run has been removed, so nothing can be saved: {RUN}\n"


@pytest.mark.parametrize("flags", [{}, {"save_every": 1e-6, "workers": 2}], ids=["epochs", "batches"])
def test_a_run_folder_that_is_removed_ends_the_run_with_a_line_that_says_so(tiny, start, flags):
    process = start("train.py", *tiny.flags(epochs=5000, **flags))
    wait_for(process, b" 2/5000 ")
    RUN.rename("elsewhere")  # at once, where removing it file by file would race with files that are written
    assert end_of(process) == (1, REMOVED)
    assert not RUN.exists()


@pytest.mark.parametrize("before", ["train_epoch", "evaluate", "_save", "finish"])
def test_whenever_a_run_folder_is_removed_the_line_is_the_same(tiny, cli, monkeypatch, before):
    honest = getattr(Trainer, before)

    def removing(self, *args, **kwargs):
        if self.state.epoch >= 1:
            self.run.settle()
            shutil.rmtree(RUN, ignore_errors=True)
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, before, removing)
    code, _, problems = cli(train, *tiny.flags(epochs=3))
    assert (code, problems) == (1, REMOVED)
    assert not RUN.exists()


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


DAMAGE = {
    "a byte": flip,
    "an end": lambda content: content[:-1000],
    "nothing but a start": lambda content: content[:1000],
    "everything": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, draw_tiny):
    """A run that was killed after two of three epochs, and the one that was not: (data set, folder, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    tiny = draw_tiny(folder / "set")
    options = tiny.options(epochs=3, project=str(folder), save_every=1e-6, quiet=True)
    train.run(**options, name="untouched")
    honest = Trainer.train_epoch

    def killed(self):
        if self.state.epoch == 2:
            raise MemoryError
        return honest(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", killed)
        with pytest.raises(ValueError, match="out of memory"):
            train.run(**options, name="killed")
    return tiny, folder / "killed", folder / "untouched"


def damage(path: Path, kind: str) -> None:
    content = DAMAGE[kind](path.read_bytes())
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_goes_on(whole, tmp_path, cli, kind):
    _, killed, untouched = whole
    run = shutil.copytree(killed, tmp_path / "run")
    damage(run / "weights/last.pt", kind)
    code, output, problems = cli(train, "--resume", str(run / "weights/last.pt"))
    assert (code, problems) == (0, "")
    [warning] = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert re.search(r"damaged.*last\.pt|last\.pt is damaged", warning)
    assert f"going on from {run}/weights/previous.pt, which was saved before it" in warning
    assert "after epoch 1 of 3 and batch 2 of the next" in output
    assert differences(run, untouched) == []


def test_two_damaged_checkpoints_are_one_line(whole, tmp_path, cli):
    run = shutil.copytree(whole[1], tmp_path / "run")
    for name in ("last.pt", "previous.pt"):
        damage(run / "weights" / name, "a byte")
    before = contents(run)
    code, _, problems = cli(train, "--resume", str(run / "weights/last.pt"))
    assert (code, problems.count("\n")) == (2, 1)
    assert problems.startswith("train.py: error: checkpoint cannot be read") and "/last.pt" in problems
    assert problems.endswith(f"{run}/weights/previous.pt, which was saved before it, is damaged, too\n")
    assert contents(run) == before


def test_a_lost_checkpoint_is_told_and_the_one_before_it_goes_on(whole, tmp_path, cli):
    run = shutil.copytree(whole[1], tmp_path / "run")
    (run / "weights/last.pt").unlink()
    code, output, problems = cli(train, "--resume", str(run / "weights/last.pt"))
    assert (code, problems) == (0, "")
    assert "warning: checkpoint not found" in output and "going on from" in output
    assert differences(run, whole[2]) == []


def test_a_finished_run_keeps_no_checkpoint_before_the_last(whole):
    _, killed, untouched = whole
    assert (killed / "weights/previous.pt").exists()
    assert sorted(path.name for path in (untouched / "weights").iterdir()) == ["best.pt", "last.pt"]
