from __future__ import annotations

import functools
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


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path: Path):
    yield {"file": f"file://{tmp_path}/b/c", "memory": "memory://b/c"}[request.param]
    memory = fsspec.filesystem("memory")
    if memory.exists("/b"):
        memory.rm("/b", recursive=True)


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
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
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["evolve.csv", "study.db"]


def test_results_are_replaced(url, tmp_path):
    bucket = Bucket(url)
    bucket.send(study_in(tmp_path / "one", finished=1))
    bucket.send(study_in(tmp_path / "one", finished=2))
    assert bucket.fetch(tmp_path / "two")
    assert finished_in(tmp_path / "two") == 2
    files, root = fsspec.core.url_to_fs(url)
    assert sorted(Path(path).name for path in files.ls(root, detail=False)) == ["evolve.csv", "study.db"]


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
    assert not list((tmp_path / "two").iterdir())
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
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["evolve.csv", "study.db"]


def test_two_workers_fetch_at_once(tmp_path, monkeypatch):
    """The second may not put a copy in the place of the study that the first has begun to write to."""
    bucket = Bucket(f"file://{tmp_path}/b")
    bucket.send(study_in(tmp_path / "one", finished=1))
    get_file = type(bucket._system).get_file

    def slow(self, path, *args, **options):
        result = get_file(self, path, *args, **options)
        if path.endswith(".csv"):
            monkeypatch.undo()
            assert bucket.fetch(tmp_path / "two")
            study_in(tmp_path / "two", finished=5)
        return result

    monkeypatch.setattr(type(bucket._system), "get_file", slow)
    assert not bucket.fetch(tmp_path / "two")
    assert finished_in(tmp_path / "two") == 5


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
    assert not list((tmp_path / "two").iterdir())
