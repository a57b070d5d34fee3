from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.evolve.postgres import PASSWORD, postgres  # noqa: F401  a fixture
from utils.evolve.history import is_lost
from utils.evolve.storage import MAX_RETRIES, Storage, errors_named, mask_password, open_storage, with_patience
from utils.structures import RunError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning")
SPACE = {"lr0": optuna.distributions.FloatDistribution(0.0, 1.0)}


def opened(given: str, folder: Path, *, grace_s: int = 60) -> Storage:
    return open_storage(given, folder, heartbeat_s=1, grace_s=grace_s)


def study_in(storage: Storage) -> optuna.Study:
    return optuna.create_study(storage=storage.backend, study_name="s", load_if_exists=True, direction="maximize")


def refusal(given: str, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(given, folder)
    line = str(caught.value)
    assert "\n" not in line
    assert "secret" not in line
    return line


@pytest.fixture(params=["", "sqlite", "journal"])
def given_storage(request, tmp_path: Path) -> str:
    known = {"": "", "sqlite": f"sqlite:///{tmp_path}/other.db", "journal": f"journal:{tmp_path}/study.log"}
    return known[request.param]


@pytest.fixture
def storage(given_storage, tmp_path: Path) -> Storage:
    return opened(given_storage, tmp_path)


def test_study_is_found_again(given_storage, storage, tmp_path):
    study_in(storage).add_trial(optuna.create_trial(value=0.5, params={"lr0": 0.1}, distributions=SPACE))
    again = study_in(opened(given_storage, tmp_path))
    assert [trial.value for trial in again.trials] == [0.5]


@pytest.mark.parametrize("name", ["with space", "what?", "a#b", "100%25", "{braces}", "ü@:"])
def test_file_lies_in_any_run_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    study_in(opened("", folder))
    assert [path.name for path in folder.iterdir()] == ["study.db"]


def test_opening_and_beats_say_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage = opened("", tmp_path)
        study = study_in(storage)
        study.enqueue_trial({"lr0": 0.5})
        (trial,) = study.trials
        storage.record_heartbeat(trial)
        storage.fail_stale(study)
        storage.queue_again(study, trial)


def test_lost_trial_waits_again_with_its_values_three_times(storage):
    study, values = study_in(storage), []
    for _ in range(1 + MAX_RETRIES):
        trial = study.ask(SPACE)
        values.append(trial.params)
        assert storage.queue_again(study, trial)
        assert not storage.queue_again(study, trial)
    assert all(params == values[0] for params in values)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * (1 + MAX_RETRIES)
    assert all(map(is_lost, study.trials))


def test_finished_trial_is_not_queued_again(storage):
    study = study_in(storage)
    trial = study.ask(SPACE)
    study.tell(trial, 0.5)
    assert not storage.queue_again(study, trial)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


def test_silent_trial_is_lost_and_queued(tmp_path):
    storage = opened("", tmp_path, grace_s=1)
    study = study_in(storage)
    silent, alive = study.ask(SPACE), study.ask(SPACE)
    storage.record_heartbeat(silent)
    until = time.monotonic() + 20
    while len(study.trials) == 2 and time.monotonic() < until:
        storage.record_heartbeat(alive)
        time.sleep(0.3)
        storage.fail_stale(study)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert study.trials[2].params == silent.params


def test_trial_that_waits_can_have_a_heartbeat(tmp_path):
    """Its worker may be killed as soon as it has taken it, and then it is lost too."""
    storage = opened("", tmp_path, grace_s=1)
    study = study_in(storage)
    study.enqueue_trial({"lr0": 0.5})
    storage.record_heartbeat(study.trials[0])
    study.ask(SPACE)
    until = time.monotonic() + 20
    while len(study.trials) == 1 and time.monotonic() < until:
        time.sleep(0.3)
        storage.fail_stale(study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def at_once(count: int, work) -> None:
    """Run `work(index)` in so many threads, and raise what any raises."""
    barrier, errors = threading.Barrier(count), []

    def run(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_workers_make_one_study_at_once(tmp_path):
    at_once(4, lambda _: study_in(opened("", tmp_path)).ask(SPACE))
    assert [trial.number for trial in study_in(opened("", tmp_path)).trials] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_waiting_trials_are_taken_once(tmp_path, kind):
    given = {"sqlite": "", "journal": f"journal:{tmp_path}/study.log"}[kind]
    study = study_in(opened(given, tmp_path))
    for index in range(24):
        study.enqueue_trial({"lr0": index / 24})
    taken = []

    def work(_: int) -> None:
        mine = study_in(opened(given, tmp_path))
        taken.extend(mine.ask(SPACE).number for _ in range(6))

    at_once(4, work)
    assert sorted(taken) == list(range(24))


def test_reader_sees_what_another_process_wrote(tmp_path):
    mine = study_in(opened("", tmp_path))
    other = study_in(opened("", tmp_path))
    other.tell(other.ask(SPACE), 0.25)
    assert [trial.value for trial in mine.trials] == [0.25]


# ------------------------------------------------------------------------------------------------------ bad storages


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("study.db", "expected a URL such as postgresql://"),
        ("postgresq://u:secret@h/d", "did you mean 'postgresql'?"),
        ("redis://h/0", "unknown kind of storage 'redis'"),
        ("postgresql://u:se@secret@h/d", "write %40 for @"),
        ("postgresql+psycopg://u:secret@h:port/d", "not a valid URL"),
        ("postgresql+nothing://u:secret@h/d", "no driver of that name"),
        ("sqlite://", "in memory"),
        ("journal:", "expected a file"),
    ],
)
def test_bad_url_is_refused(tmp_path, given, expected):
    assert expected in refusal(given, tmp_path)


def test_missing_driver_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'psycopg[binary]'" in refusal("postgresql://u:secret@h/d", tmp_path)
    assert "pip install pymysql" in refusal("mysql://u:secret@h/d", tmp_path)


def test_driver_of_the_url_may_be_missing(tmp_path):
    assert "pip install 'psycopg[binary]'" in refusal("postgresql+psycopg2://u:secret@h/d", tmp_path)


def test_unreachable_server_is_refused_soon(tmp_path):
    begun = time.monotonic()
    line = refusal("postgresql://u:secret@127.0.0.1:9/d", tmp_path)
    assert "postgresql://u:***@127.0.0.1:9/d" in line
    assert "refused" in line
    assert time.monotonic() - begun < 15


def test_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "study.db").write_text("not a database, though of some length\n" * 100)
    assert refusal("", tmp_path).startswith(f"{tmp_path}/study.db: the file is not a SQLite database")
    assert refusal(f"sqlite:///{tmp_path}/study.db", tmp_path).startswith("--evolve-storage sqlite:///")


def test_folders_that_are_missing_or_closed_are_named(tmp_path):
    missing = tmp_path / "missing"
    assert f"{missing} does not exist" in refusal(f"sqlite:///{missing}/study.db", tmp_path)
    assert f"{missing} does not exist" in refusal(f"journal:{missing}/study.log", tmp_path)
    assert "cannot be written" in refusal("sqlite:////proc/study.db", tmp_path)
    assert "journal:/proc/study.log: " in refusal("journal:/proc/study.log", tmp_path)


@pytest.mark.parametrize(("revision", "mend"), [("v2.4.0.a", "optuna storage upgrade"), ("v99.a", "update Optuna")])
def test_study_of_another_version_is_refused(tmp_path, revision, mend):
    study_in(opened("", tmp_path))
    database = sqlite3.connect(tmp_path / "study.db")
    with database:
        database.execute("UPDATE alembic_version SET version_num = ?", [revision])
        database.execute("UPDATE version_info SET library_version = '2.5.0'")
    database.close()
    line = refusal("", tmp_path)
    assert "made by Optuna 2.5.0" in line
    assert mend in line


# ---------------------------------------------------------------------------------------------------------- journals


def test_file_that_is_no_journal_is_refused(tmp_path):
    file = tmp_path / "notes.txt"
    for content in ("some notes\nof mine\n", '{"a": 1}\n', "[1, 2]\n", "half a line"):
        file.write_text(content)
        assert "is not the journal of a study" in refusal(f"journal:{file}", tmp_path)
        assert file.read_text() == content


def test_damaged_journal_is_refused(tmp_path):
    file = tmp_path / "study.log"
    study_in(opened(f"journal:{file}", tmp_path)).ask(SPACE)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\0\0\0\n", *lines[1:]]))
    assert "the journal is damaged" in refusal(f"journal:{file}", tmp_path)


def test_journal_mends_half_a_line(tmp_path):
    given = f"journal:{tmp_path}/study.log"
    study = study_in(opened(given, tmp_path))
    study.tell(study.ask(SPACE), 0.5)
    with (tmp_path / "study.log").open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"' + b"x" * 10_000)
    study.tell(study.ask(SPACE), 0.75)
    assert [trial.value for trial in study_in(opened(given, tmp_path)).trials] == [0.5, 0.75]
    for line in (tmp_path / "study.log").read_text().splitlines():
        json.loads(line)


def test_journal_of_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = opened("journal:study.log", tmp_path)
    study_in(storage)
    assert (tmp_path / "study.log").exists()
    assert not storage.finds_lost


HOLDER = """
import os, sys
from pathlib import Path
from utils.evolve.storage import _MendingLock
_MendingLock(Path(sys.argv[1])).acquire()
os.kill(os.getpid(), 9)
"""


def test_lock_of_a_killed_worker_is_taken(tmp_path, monkeypatch):
    journal = tmp_path / "study.log"
    study_in(opened(f"journal:{journal}", tmp_path))
    holder = subprocess.run([sys.executable, "-c", HOLDER, str(journal)], cwd=Path.cwd(), check=False)
    assert holder.returncode == -signal.SIGKILL
    assert (tmp_path / "study.log.lock").exists()
    monkeypatch.setattr("utils.evolve.storage._LOCK_S", 3)
    study_in(opened(f"journal:{journal}", tmp_path)).ask(SPACE)
    assert [path.name for path in tmp_path.iterdir()] == ["study.log"]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:p@q/r@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d?password=p&a=b", "postgresql://u@h/d?password=***&a=b"),
        ("postgresql://h:5432/d", "postgresql://h:5432/d"),
        ("sqlite:////home/a/study.db", "sqlite:////home/a/study.db"),
    ],
)
def test_passwords_are_masked(url, shown):
    assert mask_password(url) == shown


def test_errors_of_calls_are_named():
    with pytest.raises(RunError, match="the storage S cannot be reached: Input/output error"), errors_named("S"):
        raise OSError(5, os.strerror(5))
    with pytest.raises(RunError, match="the storage S cannot be written: the disk is full"), errors_named("S"):
        raise OSError(28, os.strerror(28))
    with pytest.raises(ZeroDivisionError), errors_named("S"):
        raise ZeroDivisionError


def test_full_database_is_named(tmp_path):
    """As SQLite says it, and Optuna wraps it."""
    storage = opened("", tmp_path)
    study = study_in(storage)
    with storage.backend.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RunError, match=r"study\.db cannot be written: the disk is full"), errors_named(storage.shown):
        study.set_user_attr("long", ["x" * 2000] * 100)


class Away:
    """A call that fails so many times first."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error = failures, error

    def __call__(self) -> str:
        if self.failures:
            self.failures -= 1
            raise self.error
        return "done"


def test_patience_outlasts_a_restart_and_says_so_once():
    said, waited = [], []
    call = Away(3, ConnectionRefusedError(111, "Connection refused"))
    assert with_patience(call, shown="S", patience_s=60, say=said.append, wait=waited.append) == "done"
    assert len(waited) == 3
    assert said == ["the storage S cannot be reached, waiting: Connection refused"]


def test_patience_ends():
    with pytest.raises(RunError, match="the storage S cannot be reached: Connection refused"):
        with_patience(Away(9, ConnectionRefusedError(111, "Connection refused")), shown="S", patience_s=0)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), optuna.exceptions.StorageInternalError("x")])
def test_patience_does_not_wait_for_what_stays(error):
    with pytest.raises(RunError):
        with_patience(Away(1, error), shown="S", patience_s=60, wait=lambda _: pytest.fail("waits"))


# -------------------------------------------------------------------------------------------------------- PostgreSQL


def test_postgres_holds_a_study(postgres, tmp_path):  # noqa: F811
    storage = opened(postgres.url, tmp_path, grace_s=1)
    assert storage.shown == f"postgresql://tester:***@127.0.0.1:{postgres.port}/postgres"
    study = study_in(storage)
    done, silent = study.ask(SPACE), study.ask(SPACE)
    storage.record_heartbeat(silent)
    study.tell(done, 0.5)
    until = time.monotonic() + 20
    while len(study.trials) == 2 and time.monotonic() < until:
        time.sleep(0.3)
        storage.fail_stale(study)
    again = study_in(opened(postgres.url, tmp_path))
    assert [trial.state for trial in again.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert again.trials[2].params == silent.params


def test_postgres_says_what_is_wrong(postgres, tmp_path):  # noqa: F811
    assert "password authentication failed" in refusal(
        f"postgresql://tester:secret@127.0.0.1:{postgres.port}/postgres", tmp_path
    )
    assert 'database "none" does not exist' in refusal(postgres.url.replace("/postgres", "/none"), tmp_path)


def test_restart_of_postgres_is_waited_for(postgres, tmp_path):  # noqa: F811
    storage = opened(postgres.url, tmp_path)
    study = study_in(storage)
    trial = study.ask(SPACE)
    postgres.stop()
    try:
        with pytest.raises(RunError, match=r"tester:\*\*\*@.*cannot be reached"):
            with_patience(lambda: study.tell(trial, 0.5), shown=storage.shown, patience_s=0)
    finally:
        with_patience(
            lambda: study.tell(trial, 0.5), shown=storage.shown, patience_s=30, wait=lambda _: postgres.start()
        )
    assert study.trials[trial.number].value == 0.5
