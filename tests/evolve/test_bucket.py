from __future__ import annotations

import fcntl
import functools
import multiprocessing
import sqlite3
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import fsspec
import optuna
import pytest

from utils.evolve.bucket import RESULT_FILES, Bucket
from utils.evolve.storage import open_storage
from utils.structures import RunError, UserError

SPACE = {"lr0": optuna.distributions.FloatDistribution(0.0, 1.0)}


@functools.cache
def empty_database() -> bytes:
    """With the tables of Optuna, which take a while to make."""
    with tempfile.TemporaryDirectory() as folder:
        open_storage("", Path(folder), heartbeat_s=1, grace_s=60)
        return (Path(folder) / "study.db").read_bytes()


def study_in(folder: Path, *, name: str = "a", finished: int = 1) -> dict[str, Path]:
    """The results of a study of so many finished trials, as `send` takes them."""
    folder.mkdir(exist_ok=True)
    if not (folder / "study.db").exists():
        (folder / "study.db").write_bytes(empty_database())
    backend = open_storage("", folder, heartbeat_s=1, grace_s=60).backend
    study = optuna.create_study(storage=backend, study_name=name, direction="maximize", load_if_exists=True)
    study.set_user_attr("id", name)
    for _ in range(finished - len(study.trials)):
        study.add_trial(optuna.create_trial(value=0.5, params={"lr0": 0.1}, distributions=SPACE))
    (folder / "evolve.csv").write_text(f"{name} {finished}")
    return {path.name: path for path in folder.iterdir() if path.name in RESULT_FILES}


def finished_in(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "study.db")) as database:
        ((finished,),) = database.execute("SELECT COUNT(*) FROM trials WHERE state = 'COMPLETE'")
    return finished


def names_in(folder: Path) -> list[str]:
    """But for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".bucket.lock")


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path: Path):
    yield {"file": f"file://{tmp_path}/b/c", "memory": "memory://b/c"}[request.param]
    memory = fsspec.filesystem("memory")
    if memory.exists("/b"):
        memory.rm("/b", recursive=True)


def refusal(action, kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert "secret" not in line
    return line


def test_results_come_back(url, tmp_path):
    Bucket(url).send(study_in(tmp_path / "one", finished=3))
    assert Bucket(url).fetch(tmp_path / "two")
    assert finished_in(tmp_path / "two") == 3
    assert (tmp_path / "two" / "evolve.csv").read_text() == "a 3"
    assert names_in(tmp_path / "two") == ["evolve.csv", "study.db"]


def test_results_are_replaced(url, tmp_path):
    bucket = Bucket(url)
    bucket.send(study_in(tmp_path / "one", finished=1))
    bucket.send(study_in(tmp_path / "one", finished=2))
    assert bucket.fetch(tmp_path / "two")
    assert finished_in(tmp_path / "two") == 2
    files, root = fsspec.core.url_to_fs(url)
    assert sorted(Path(path).name for path in files.ls(root, detail=False)) == ["evolve.csv", "study.db", "study.json"]


def test_nothing_comes_of_nothing(url, tmp_path):
    assert not Bucket(url).fetch(tmp_path / "two")
    Bucket(url).send({"evolve.csv": tmp_path / "missing"})
    assert not Bucket(url).fetch(tmp_path / "two")


def test_own_study_goes_on(url, tmp_path):
    files = study_in(tmp_path / "one", finished=2)
    Bucket(url).send(files)
    assert not Bucket(url).fetch(tmp_path / "one")
    study_in(tmp_path / "one", finished=3)
    assert not Bucket(url).fetch(tmp_path / "one")
    assert finished_in(tmp_path / "one") == 3


def test_another_study_is_refused(url, tmp_path):
    Bucket(url).send(study_in(tmp_path / "one"))
    study_in(tmp_path / "two", name="b", finished=9)
    assert "holds another study" in refusal(lambda: Bucket(url).fetch(tmp_path / "two"))
    assert finished_in(tmp_path / "two") == 9


def test_study_that_is_further_is_refused(url, tmp_path):
    study_in(tmp_path / "two", finished=1)
    Bucket(url).send(study_in(tmp_path / "one", finished=4))
    line = refusal(lambda: Bucket(url).fetch(tmp_path / "two"))
    assert "has 4 finished trials" in line
    assert f"move {tmp_path / 'two'} away" in line


def test_study_is_sent_while_it_is_written(tmp_path):
    files = study_in(tmp_path / "one", finished=1)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            study_in(tmp_path / "one", finished=finished_in(tmp_path / "one") + 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            Bucket(f"file://{tmp_path}/b").send(files)
            with sqlite3.connect(tmp_path / "b" / "study.db") as copy:
                assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        over.set()
        writer.join()


def test_fetch_is_all_or_nothing(tmp_path, monkeypatch):
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket.send(study_in(tmp_path / "one"))
    get_file = type(bucket._system).get_file

    def broken(self, path, *args, **options):
        if path.endswith(".csv"):
            raise ConnectionResetError(104, "Connection reset by peer")
        return get_file(self, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket._system), "get_file", broken)
        line = refusal(lambda: bucket.fetch(tmp_path / "two"))
    assert line.endswith("cannot be read: Connection reset by peer")
    assert not names_in(tmp_path / "two")
    assert bucket.fetch(tmp_path / "two")


def test_copy_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket.send(study_in(tmp_path / "one", finished=1))
    old = (tmp_path / "b" / "study.db").read_bytes()

    def half(self, source: str, target: str, **_):
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(bucket._system), "put_file", half)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        bucket.send(study_in(tmp_path / "one", finished=2))
    assert (tmp_path / "b" / "study.db").read_bytes() == old
    assert names_in(tmp_path / "b") == ["evolve.csv", "study.db", "study.json"]


def begin(folder: Path, url: str, number: int) -> None:
    """What each process of a sweep does at first, and after a trial."""
    Bucket(url).fetch(folder)
    study = optuna.load_study(study_name="a", storage=open_storage("", folder, heartbeat_s=1, grace_s=60).backend)
    study.add_trial(optuna.create_trial(value=number / 10, params={"lr0": 0.1}, distributions=SPACE))
    Bucket(url).send({"study.db": folder / "study.db"})


def test_processes_that_begin_at_once_keep_the_history(tmp_path):
    url, folder = f"file://{tmp_path}/b", tmp_path / "two"
    Bucket(url).send(study_in(tmp_path / "one", finished=30))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin, args=(folder, url, number), daemon=True) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert finished_in(folder) == finished_in(tmp_path / "b") == 34


@pytest.fixture
def meanwhile(monkeypatch):
    """Sets what happens in the middle of the next fetch, as if there were no locks."""

    def during(bucket: Bucket, action) -> None:
        get_file = type(bucket._system).get_file

        def slow(self, path, *args, **options):
            result = get_file(self, path, *args, **options)
            if path.endswith(".csv"):
                monkeypatch.undo()
                action()
            return result

        monkeypatch.setattr(type(bucket._system), "get_file", slow)

    monkeypatch.setattr("utils.files.fcntl", None)
    return during


def test_without_locks_two_fetch_at_once(tmp_path, meanwhile):
    """The second may not put a copy in the place of the study that the first has begun to write to."""
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket.send(study_in(tmp_path / "one", finished=1))

    def other() -> None:
        study_in(tmp_path / "two", finished=5)

    meanwhile(bucket, other)
    assert not bucket.fetch(tmp_path / "two")
    assert finished_in(tmp_path / "two") == 5


def test_study_that_another_command_began_meanwhile_is_refused(tmp_path, meanwhile):
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket.send(study_in(tmp_path / "one", finished=3))
    meanwhile(bucket, lambda: study_in(tmp_path / "two", name="b"))
    assert "holds another study" in refusal(lambda: bucket.fetch(tmp_path / "two"))


def test_worker_that_hangs_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.evolve.bucket._PATIENCE_S", 0.2)
    files = study_in(tmp_path / "one")
    (tmp_path / "one" / ".bucket.lock").touch()
    with (tmp_path / "one" / ".bucket.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refusal(lambda: Bucket(f"file://{tmp_path}/b").send(files), RunError)
    assert f"another process has copied to or from {tmp_path / 'one'}" in line
    Bucket(f"file://{tmp_path}/b").send(files)


# ---- what is in a bucket is not lost


@pytest.fixture(params=["study.json", "older version", "damaged"])
def full(request, tmp_path: Path) -> Bucket:
    """A bucket with a study of 4 trials, whatever the file beside it is."""
    Bucket(f"file://{tmp_path}/b").send(study_in(tmp_path / "one", finished=4))
    about = tmp_path / "b" / "study.json"
    if request.param == "older version":
        about.unlink()
    elif request.param == "damaged":
        about.write_text(about.read_text()[:9])
    return Bucket(f"file://{tmp_path}/b")


def test_another_study_is_not_replaced(full, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    line = refusal(lambda: full.send(study_in(tmp_path / "two", name="b", finished=9)), RunError)
    assert f"it holds another study than {tmp_path / 'two'}; give another bucket" in line
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before


def test_study_is_not_replaced_by_none(full, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "evolve.csv").write_text("of a study on a server")
    line = refusal(lambda: full.send({"evolve.csv": tmp_path / "two" / "evolve.csv"}), RunError)
    assert "it holds another study" in line
    assert (tmp_path / "b" / "evolve.csv").read_text() == "a 4"


def test_copy_that_is_behind_is_not_sent(full, tmp_path):
    line = refusal(lambda: full.send(study_in(tmp_path / "two", finished=3)), RunError)
    assert f"its study has more finished trials than that in {tmp_path / 'two'}" in line
    assert "end one of the two, and let machines share one study with --evolve-storage" in line
    assert finished_in(tmp_path / "b") == 4 and (tmp_path / "b" / "evolve.csv").read_text() == "a 4"


def test_copy_that_is_ahead_is_sent(full, tmp_path):
    full.send(study_in(tmp_path / "two", finished=5))
    assert finished_in(tmp_path / "b") == 5
    refusal(lambda: full.send(study_in(tmp_path / "one", finished=4)), RunError)


def test_lost_trials_put_no_copy_ahead(tmp_path):
    lost, failed = ({}, {"failure": "the loss is not finite"})
    for folder, attributes in (("one", failed), ("two", lost)):
        study_in(tmp_path / folder, finished=2)
        backend = open_storage("", tmp_path / folder, heartbeat_s=1, grace_s=60).backend
        study = optuna.load_study(study_name="a", storage=backend)
        study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=attributes))
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket.send(study_in(tmp_path / "one", finished=0))
    assert "more finished trials" in refusal(lambda: bucket.send(study_in(tmp_path / "two", finished=0)), RunError)


def test_send_does_not_read_the_study_that_is_there(tmp_path, monkeypatch):
    bucket, files = Bucket(f"file://{tmp_path}/b"), study_in(tmp_path / "one")
    bucket.send(files)
    monkeypatch.setattr(type(bucket._system), "get_file", None)
    bucket.send(files)


# ---- a study on a server


def test_results_without_a_study_can_be_resumed(url, tmp_path):
    for name in ("opt.yaml", "hyp.yaml", "evolve.csv"):
        (tmp_path / name).write_text(name)
    Bucket(url).send({name: tmp_path / name for name in RESULT_FILES})
    assert not Bucket(url).fetch(tmp_path / "two")
    assert names_in(tmp_path / "two") == ["hyp.yaml", "opt.yaml"]


@pytest.mark.parametrize("own", ["opt.yaml", "hyp.yaml", "study.db"])
def test_folder_that_was_begun_keeps_its_own(url, tmp_path, own):
    for name in ("opt.yaml", "hyp.yaml"):
        (tmp_path / name).write_text("theirs")
    Bucket(url).send({name: tmp_path / name for name in RESULT_FILES})
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / own).write_text("own")
    assert not Bucket(url).fetch(tmp_path / "two")
    assert names_in(tmp_path / "two") == [own] and (tmp_path / "two" / own).read_text() == "own"


# ---- mistakes


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "expected a name"),
        ("gss://b", "unknown kind of storage 'gss'"),
        ("s4://b", "did you mean"),
        ("sftp://u:secret@127.0.0.1:9/x", "--bucket sftp://u:***@127.0.0.1:9/x: "),
    ],
)
def test_bad_urls_are_refused(url, expected):
    assert expected in refusal(lambda: Bucket(url))


@pytest.mark.parametrize(("url", "package"), [("name", "gcsfs"), ("s3://b", "s3fs"), ("sftp://h/x", "paramiko")])
def test_missing_package_is_named(url, package, monkeypatch):
    def missing(*_, **__):
        raise ImportError(f"Install {package}")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert f"pip install {package}" in refusal(lambda: Bucket(url))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied"), "no permission (Permission denied)"),
        (RuntimeError("403 Forbidden: u:secret@h\nmore"), "no permission (403 Forbidden: u:***@h)"),
        (ConnectionRefusedError(111, "Connection refused"), "cannot be read: Connection refused"),
        (TimeoutError(), "cannot be read: TimeoutError"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, error, expected):
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket._password = "secret"

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(type(bucket._system), "info", broken)
    line = refusal(lambda: bucket.fetch(tmp_path / "two"))
    assert expected in line
    assert "more" not in line


def test_path_is_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Bucket("./b").send(study_in(tmp_path / "one"))
    assert Bucket(f"{tmp_path}/b").fetch(tmp_path / "two")


def test_file_in_the_way_of_a_bucket(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Bucket(f"file://{tmp_path}/file/b").send(study_in(tmp_path / "one"))


def test_damaged_study_is_refused(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "study.db").write_text("not a database" * 100)
    assert "is not the database of a study" in refusal(lambda: Bucket(f"file://{tmp_path}/b").fetch(tmp_path / "two"))
    assert not names_in(tmp_path / "two")
    with pytest.raises(RunError, match="is not the database of a study"):
        Bucket(f"file://{tmp_path}/b").send(study_in(tmp_path / "one"))
