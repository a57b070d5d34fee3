"""Where a study lives: a SQLite file of the run folder, a database server, or a journal on a shared file system.

The surprise: SQLite is told to begin each transaction as a writer. Optuna looks before it takes a trial that waits, and
with the usual beginning two workers could both see it waiting, and both take it.
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from utils.evolve.history import FAILURE, SURPLUS
from utils.files import nearest_name
from utils.structures import RunError, UserError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection

FLAG = "--evolve-storage"
FILE_NAME = "study.db"  # of the study that lives in its run folder
MAX_RETRIES = 3  # of a trial that is lost with its worker
_BUSY_S = 120  # that SQLite waits for another writer
_CONNECT_S = 7  # localhost is two addresses, and each has this long
_SILENT_S = 60  # after which a server that says nothing is gone
_LOCK_S = 30  # after which the lock of a journal is that of a killed process: one line is written in milliseconds
_PAUSE_S = 2.0  # between two calls while a server is away
_OPENINGS = 8  # that collide when many workers make the tables of a new study at once
_JOURNAL = "journal:"
_EXAMPLES = "postgresql://user:password@host/database, mysql://..., sqlite:///study.db or journal:/shared/study.log"

# How the packages are called that speak to a server, by what SQLAlchemy calls them; and what to install of them
_DRIVERS = {
    "postgresql": ({"psycopg": "psycopg", "psycopg2": "psycopg2"}, "'psycopg[binary]'"),
    "mysql": ({"pymysql": "pymysql", "mysqldb": "MySQLdb"}, "pymysql (or mysqlclient)"),
}
_ALIASES = {"postgres": "postgresql", "mariadb": "mysql"}
_CONNECTION: dict[str, dict[str, int]] = {
    "psycopg": {
        "connect_timeout": _CONNECT_S,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 1000 * _SILENT_S,
    },
    "pymysql": {"connect_timeout": _CONNECT_S, "read_timeout": _SILENT_S, "write_timeout": _SILENT_S},
}
_CONNECTION["psycopg2"] = _CONNECTION["psycopg"]
_CONNECTION["mysqldb"] = _CONNECTION["pymysql"]

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage; `shown` is what to call it."""

    backend: BaseStorage = field(repr=False)
    finds_lost: bool  # whether trials whose worker was lost are recognised
    shown: str

    def record_heartbeat(self, trial: Trial | FrozenTrial) -> None:
        """Say that its worker lives. Of any state: one that waits can be told before it is taken, so that it is never
        running without a heartbeat, by which alone Optuna finds out that it is lost."""
        if isinstance(self.backend, RDBStorage):
            self.backend.record_heartbeat(trial._trial_id)

    def hand_back(self, trial: Trial | FrozenTrial) -> None:
        """Let a running trial be the next that is asked for."""
        with suppress(UpdateFinishedTrialError):  # others have taken it
            self.backend.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def queue_again(self, study: Study, trial: Trial | FrozenTrial) -> bool:
        """End a trial as lost, and queue its values again unless they were queued MAX_RETRIES times.

        False where it has ended already: who ended it has queued it too, or it did not need it.
        """
        try:
            if not self.backend.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                return False
        except UpdateFinishedTrialError:
            return False
        _retry(study, self.backend.get_trial(trial._trial_id))
        return True

    def fail_stale(self, study: Study) -> None:
        """End trials whose worker has been silent for `grace_s` as lost, and queue them again as `queue_again` does.

        One that never had a heartbeat gets one now, and is lost when nobody gives it another.
        """
        if not isinstance(self.backend, RDBStorage):
            return
        with _without_warnings():
            optuna.storages.fail_stale_trials(study)
        for trial_id in _never_heard_of(self.backend, study):
            self.backend.record_heartbeat(trial_id)

    def queue_running(self, study: Study) -> None:
        """As `queue_again`, for all that run, as far as anybody can tell."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.queue_again(study, trial)


def _never_heard_of(backend: RDBStorage, study: Study) -> list[int]:
    """Trials that run and have no heartbeat: their worker was killed before the first."""
    import sqlalchemy

    query = sqlalchemy.text(
        "select trial_id from trials where state = 'RUNNING'"
        " and study_id = (select study_id from studies where study_name = :name)"
        " and trial_id not in (select trial_id from trial_heartbeats)"
    )
    with backend.engine.connect() as connection:
        return list(connection.execute(query, {"name": study.study_name}).scalars())


def _retry(study: Study, trial: FrozenTrial) -> None:
    """Queue the values of a lost trial again, and nothing else of it, noted as Optuna's own retries are."""
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    told = {FAILURE, SURPLUS} & trial.user_attrs.keys()  # what ended it; its worker was killed as it said so
    if told or len(history) > MAX_RETRIES:
        return
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs={"failed_trial": history[0], "retry_history": history},
        )
    )


def open_storage(given: str, folder: Path, *, heartbeat_s: int, grace_s: int) -> Storage:
    """The storage that --evolve-storage names; the empty string is the file study.db of `folder`, for one host.

    A trial is lost when its last heartbeat is older than `grace_s`. Raises UserError when there is no such storage.
    """
    if given.startswith(_JOURNAL):
        return _open_journal(given)
    lost = _callback() | {"heartbeat_interval": heartbeat_s, "grace_period": grace_s}
    if not given:
        path = folder / FILE_NAME
        return _open_sqlite(path.absolute(), str(path), lost, where=str(path))
    url, shown = _parsed(given), mask_password(given)
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise UserError(f"{FLAG} {shown}: others cannot join a study in memory; name a file: sqlite:///study.db")
        return _open_sqlite(Path(url.database).absolute(), shown, lost, where=f"{FLAG} {shown}")
    return _open_server(url, shown, lost)


# ------------------------------------------------------------------------------------------------------- relational


def _open_sqlite(path: Path, shown: str, lost: dict[str, Any], *, where: str) -> Storage:
    import sqlalchemy

    if not path.parent.is_dir():
        raise UserError(f"{where}: the folder {path.parent} does not exist")

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)

    # Paths hold what URLs do not, such as ? and braces, so SQLAlchemy is shown none
    backend = _open("sqlite:///study.db", where, {"creator": connect}, lost)
    backend.engine.dispose()
    sqlalchemy.event.listen(backend.engine, "connect", _leave_transactions_to_us)
    sqlalchemy.event.listen(backend.engine, "begin", _begin_as_writer)
    return Storage(backend=backend, finds_lost=True, shown=shown)


def _leave_transactions_to_us(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None


def _begin_as_writer(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _parsed(given: str) -> URL:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, separator, _ = given.partition("://")
    if not separator:
        raise UserError(f"{FLAG} {mask_password(given)}: expected a URL such as {_EXAMPLES}")
    dialect, plus, driver = scheme.partition("+")
    dialect = _ALIASES.get(dialect, dialect)
    if dialect not in (*_DRIVERS, "sqlite"):
        nearest = nearest_name(dialect, [*_DRIVERS, *_ALIASES, "sqlite", "journal"])
        raise UserError(f"{FLAG} {mask_password(given)}: unknown kind of storage '{dialect}'{nearest}")
    try:
        url = make_url(dialect + plus + driver + given.removeprefix(scheme))
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        url = None
    if url is None or "@" in (url.host or ""):
        raise UserError(
            f"{FLAG} {mask_password(given)}: not a valid URL; "
            "in a user name or password write %40 for @, %3A for :, %2F for / and %25 for %"
        )
    return url if plus or dialect == "sqlite" else url.set(drivername=f"{dialect}+{_installed_driver(dialect, given)}")


def _installed_driver(dialect: str, given: str) -> str:
    drivers, package = _DRIVERS[dialect]
    for name, module in drivers.items():
        if importlib.util.find_spec(module):
            return name
    raise UserError(f"{FLAG} {mask_password(given)}: no package that speaks to it is installed: pip install {package}")


def _open_server(url: URL, shown: str, lost: dict[str, Any]) -> Storage:
    settings = _CONNECTION.get(url.get_driver_name(), {})
    connection = {name: value for name, value in settings.items() if name not in url.query}
    rendered = url.render_as_string(hide_password=False)
    braces_kept = rendered.replace("{", "{{").replace("}", "}}")  # Optuna fills in a {SCHEMA_VERSION}
    backend = _open(braces_kept, f"{FLAG} {shown}", {"pool_pre_ping": True, "connect_args": connection}, lost)
    return Storage(backend=backend, finds_lost=True, shown=shown)


def _open(url: str, where: str, engine: dict[str, Any], lost: dict[str, Any]) -> RDBStorage:
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    for opening in range(_OPENINGS):
        try:
            with _without_warnings():
                return RDBStorage(url, engine_kwargs=dict(engine), **lost)
        except NoSuchModuleError:
            raise UserError(f"{where}: SQLAlchemy knows no driver of that name") from None
        except ImportError:
            package = _DRIVERS[url.partition("+")[0]][1]
            raise UserError(f"{where}: its driver is not installed: pip install {package}") from None
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            if opening + 1 == _OPENINGS or not _made_by_another(error):
                raise UserError(f"{where}: {_said(error, url)}") from None
            time.sleep(0.1 * (opening + 1))
        except RuntimeError as error:  # so Optuna says that the tables are of another version
            raise UserError(f"{where}: {_other_version(error)}") from None
    raise AssertionError("the last opening returns or raises")


def _made_by_another(error: Exception) -> bool:
    """Whether another worker was making the tables of a new study at the same time."""
    return bool(re.search("already exists|duplicate|unique constraint|deadlock", str(_cause(error)), re.IGNORECASE))


def _other_version(error: RuntimeError) -> str:
    made = re.search(r"set up by optuna ([\w.]+)", str(error))
    if made is None:
        return _one_line(str(error))
    older = "storage upgrade" in str(error)
    mend = "run `optuna storage upgrade --storage URL`" if older else "update Optuna: pip install -U optuna"
    return (
        f"the study was made by Optuna {made[1]}, whose tables version {optuna.__version__} cannot use; "
        f"{mend}, or begin a new study"
    )


def _callback() -> dict[str, Any]:
    names = ("heartbeat_stale_trial_callback", "failed_trial_callback")  # the second before Optuna 4.9
    known = inspect.signature(RDBStorage).parameters
    return {next(name for name in names if name in known): _retry}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Optuna says at each use that heartbeats are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


# ---------------------------------------------------------------------------------------------------------- journal


def _open_journal(given: str) -> Storage:
    path = Path(given.removeprefix(_JOURNAL)).expanduser().absolute()
    if given == _JOURNAL or path.is_dir():
        raise UserError(f"{FLAG} {given}: expected a file, as in journal:/shared/study.log")
    if not path.parent.is_dir():
        raise UserError(f"{FLAG} {given}: the folder {path.parent} does not exist")
    try:
        if not _is_journal(path):
            raise UserError(f"{FLAG} {given}: the file is not the journal of a study; name another")
        lock = _MendingLock(path)
        lock.acquire()  # what cannot be written to should be known now
        lock.release()
        backend = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise UserError(f"{FLAG} {given}: {_said(error, given)}") from None
    except (ValueError, KeyError, AssertionError) as error:  # UserError is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{FLAG} {given}: the journal is damaged; name another to begin a new study") from None
    return Storage(backend=backend, finds_lost=False, shown=given)


def _is_journal(path: Path) -> bool:
    """Whether its first line is one of a journal; a file that is new or empty will be."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    if not first.endswith(b"\n"):  # empty, or a first line that a crash cut short
        return first[:1] in (b"", b"{")
    try:
        return "op_code" in json.loads(first)
    except (TypeError, ValueError):
        return False


class _MendingLock(JournalFileOpenLock):
    """A lock that is taken from who holds it for too long, as was killed, and that mends what that one left.

    Half a line at the end, of a full disk or a lost machine, would make one line with the next and break the journal.
    Optuna's other lock, a symbolic link, asks for the age of what it links to, which says nothing of who holds it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=_LOCK_S)
        self._path = path

    def acquire(self) -> bool:
        super().acquire()
        try:
            _cut_half_line(self._path)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        with suppress(RuntimeError):  # another has taken it meanwhile
            super().release()


def _cut_half_line(path: Path) -> None:
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        position, block = size, b""
        while position and b"\n" not in block:
            start = max(position - 4096, 0)
            file.seek(start)
            block, position = file.read(position - start), start
        whole = position + block.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)


# ----------------------------------------------------------------------------------------------------------- errors


def mask_password(url: str) -> str:
    """A URL as it may be shown; a wrong one too."""
    masked = re.sub(r"(://[^:/@?]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:pass|secret|token)[^=&]*=)[^&]*", r"\1***", masked)


@contextmanager
def errors_named(shown: str) -> Iterator[None]:
    """Turn what calls of a storage raise when it is gone into a RunError of one line; but errors of other files."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None and Path(error.filename).name not in shown:
            raise
        away = "" if _is_full(error) else "cannot be reached: "
        raise RunError(f"the storage {shown} {away}{_said(error)}") from None


def with_patience(
    call: Callable[[], Result],
    *,
    shown: str,
    patience_s: float,
    say: Callable[[str], None] = lambda line: None,
    wait: Callable[[float], None] = time.sleep,
) -> Result:
    """What `call` returns; while the server is away it is made again, for up to `patience_s`, and `say` told once.

    A call may have done its work although it failed, so it should be one that does no harm when made twice. Raises
    RunError as `errors_named` does, at once where waiting is no help, as for a full disk.
    """
    until = time.monotonic() + patience_s
    said = False
    with errors_named(shown):
        while True:
            try:
                return call()
            except Exception as error:
                if not _is_away(error) or time.monotonic() >= until:
                    raise
                if not said:
                    say(f"the storage {shown} cannot be reached, waiting: {_said(error)}")
                    said = True
            wait(_PAUSE_S)


def _is_away(error: Exception) -> bool:
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    if _is_full(error) or re.search("unable to open database file|readonly database", str(_cause(error))):
        return False
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    return isinstance(cause, (OperationalError, InterfaceError, OSError))


def _is_full(error: Exception) -> bool:
    cause = _cause(error)
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return bool(re.search(r"disk is full|disk full|no space left|table '.*' is full", str(cause), re.IGNORECASE))


def _cause(error: BaseException) -> BaseException:
    """What the driver said, without what Optuna and SQLAlchemy wrap it into."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "orig", None) or error


# What drivers say, in words that say what to do; the first that fits
_PLAIN = (
    (r"file is not a database", "the file is not a SQLite database; name another"),
    (r"unable to open database file|readonly database", "the file cannot be written"),
    (r"database disk image is malformed", "the SQLite database is damaged"),
    (r"no such column|column \S+ does not exist|unknown column", "its tables are not those of an Optuna study"),
)


def _said(error: Exception, *hidden: str) -> str:
    cause = _cause(error)
    if _is_full(error):
        return "cannot be written: the disk is full"
    if isinstance(cause, OSError):
        return cause.strerror or _one_line(str(cause))
    for pattern, plain in _PLAIN:
        if re.search(pattern, str(cause), re.IGNORECASE):
            return plain
    return _one_line(str(cause), *hidden)


def _one_line(text: str, *urls: str) -> str:
    """The first line that names a problem of the many that a driver may say, without the passwords of `urls`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    problems = (line for line in lines if re.search("failed|error|refused|denied|not exist", line, re.IGNORECASE))
    line = next(problems, lines[0] if lines else "no reason given")
    for url in urls:
        password = re.search(r"://[^:/@?]*:(.{3,})@", url)
        line = line.replace(password[1], "***") if password and password[1] != "***" else line
    return line
