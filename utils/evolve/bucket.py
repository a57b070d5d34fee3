"""Results of a sweep in a bucket: sent as they come, and fetched where a machine has none.

Any URL that fsspec knows is a bucket. The surprise: the study goes last, both ways, so that a folder with a study in it
has all that belongs to it. A small file in the bucket says which study it is and how far: it is read before a study
is sent, and written after, as one that promised more than there is would refuse all that follow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.evolve.history import FAILURE
from utils.evolve.record import alone
from utils.evolve.storage import FILE_NAME, mask_password
from utils.files import nearest_name
from utils.structures import RunError, UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FLAG = "--bucket"
_BEGUN_WITH = ("opt.yaml", "hyp.yaml")  # all else can be made anew from the study
RESULT_FILES = (*_BEGUN_WITH, "evolve.csv", "hyp_evolved.yaml", "evolve.png", "confirm.json", FILE_NAME)
_ABOUT = "study.json"  # of the study in a bucket: its ids and how many finished trials it has
_LOCK_NAME = ".bucket.lock"
_PATIENCE_S = 120.0  # with another worker of this machine, whose network may be slow
_BUSY_S = 120
# Where a file is there when it is complete, and renaming is copying
_OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "abfs", "az", "oss", "oci", "tos", "hf"}


class Bucket:
    """A folder that fsspec reaches. A bare name is gs://name; what begins with / or . is a folder of this machine."""

    def __init__(self, url: str) -> None:
        """Raises UserError for a URL that nothing here can open."""
        self.shown = mask_password(url)
        self._password = next(iter(re.findall(r"://[^:/@?]*:(.+)@", url)), "")
        self._system, self._root = self._opened(_full(url))

    def send(self, files: Mapping[str, Path]) -> None:
        """Copy these, under these names; what is not there is left out. A study is copied as it is at one moment.

        The files are of one folder; its workers send one after another. Where this is cut short, each file there is the
        complete old or new one, as far as its file system renames at once. Raises RunError of one line, also where the
        study there is another one or has more finished trials; nothing is replaced then.
        """
        here = {name: path for name, path in files.items() if path.exists()}
        if not here:
            return
        folder = next(iter(here.values())).parent
        with (
            self._alone(folder, RunError),
            self._named(RunError, "cannot be written"),
            tempfile.TemporaryDirectory() as temporary,
        ):
            self._send_all(here, folder, Path(temporary))

    def check_writable(self) -> None:
        """Raises UserError where nothing can be written."""
        path = self._path(f".check.{secrets.token_hex(4)}")
        with self._named(UserError, "cannot be written"):
            if not self._is_object_store:
                self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(path, b"-")
            self._system.rm_file(path)

    def fetch(self, folder: Path, study: str | None = None) -> bool:
        """Bring RESULT_FILES where the bucket holds a study and the folder has none; whether it did. All or nothing.

        Call it in each process before it opens the study: the first brings it, the others wait for that. Raises
        UserError where the study there has another name than `study`, and where folder and bucket have one and that of
        the bucket is another one, or has more finished trials. Where neither has one, as when it is on a server,
        opt.yaml and hyp.yaml are brought if the folder lacks both, so that it can be resumed there; that gives False.
        """
        with self._named(UserError, "cannot be read"):
            self._system.invalidate_cache()
            if not any(map(self._has, (FILE_NAME, *_BEGUN_WITH))):
                return False
        folder.mkdir(parents=True, exist_ok=True)
        with (
            self._alone(folder, UserError),
            tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary,
        ):
            return self._fetch(folder, Path(temporary), study)

    def _send_all(self, here: dict[str, Path], folder: Path, temporary: Path) -> None:
        theirs = self._study_there(temporary)  # before ours is copied: that may find more later than the copy has
        study = here.get(FILE_NAME)
        copy = None if study is None else _snapshot(study, temporary)
        ours = None if copy is None else _contents(copy, str(study))
        self._check_may_replace(theirs, ours, folder)
        if not self._is_object_store:
            self._system.makedirs(self._root, exist_ok=True)
        for name, path in here.items():
            if name != FILE_NAME:
                self._send(name, path)
        if ours is not None:
            self._send(FILE_NAME, copy)
            self._send(_ABOUT, _written(ours, temporary))

    def _fetch(self, folder: Path, temporary: Path, name: str | None) -> bool:
        local, study = folder / FILE_NAME, temporary / FILE_NAME
        if not self._get(FILE_NAME, study):
            if not any((folder / name).exists() for name in (FILE_NAME, *_BEGUN_WITH)):
                self._bring(_BEGUN_WITH, folder, temporary)
            return False
        theirs = _contents(study, f"{FLAG} {self.shown}: {FILE_NAME}")
        if name is not None and name not in theirs.names:
            raise UserError(
                f"{FLAG} {self.shown}: it holds the study {min(theirs.names, key=len, default='of nobody')}, not "
                f"{name}; give another bucket, or go on with that by --name"
            )
        if not local.exists():
            self._bring([name for name in RESULT_FILES if name != FILE_NAME], folder, temporary)
            if _put_new(study, local):
                return True
        self._check_is_no_news(theirs, _contents(local, str(local)), folder)
        return False

    def _bring(self, names: Iterable[str], folder: Path, temporary: Path) -> None:
        for name in [name for name in names if self._get(name, temporary / name)]:
            (temporary / name).replace(folder / name)

    def _get(self, name: str, target: Path) -> bool:
        """Whether there is such a file, which is copied then."""
        with self._named(UserError, "cannot be read"):
            if not self._has(name):
                return False
            self._system.get_file(self._path(name), str(target))
            return True

    def _check_is_no_news(self, theirs: _Contents, ours: _Contents, folder: Path) -> None:
        if not theirs.ids & ours.ids:
            raise UserError(
                f"{FLAG} {self.shown}: it holds another study than {folder}; "
                "give another bucket, or begin in another folder (--name)"
            )
        if theirs.finished > ours.finished:
            raise UserError(
                f"{FLAG} {self.shown}: its study has {theirs.finished} finished trials, that in {folder} "
                f"{ours.finished}; move {folder} away to go on with that of the bucket, or give another bucket"
            )

    def _check_may_replace(self, theirs: _Contents | None, ours: _Contents | None, folder: Path) -> None:
        if theirs is not None and (ours is None or not theirs.ids & ours.ids):
            raise RunError(f"{FLAG} {self.shown}: not sent: it holds another study than {folder}; give another bucket")
        if theirs is not None and theirs.finished > ours.finished:
            raise RunError(
                f"{FLAG} {self.shown}: not sent: its study has more finished trials than that in {folder}, so another "
                "machine works on a copy; end one of the two, and let machines share one study with --evolve-storage"
            )

    def _study_there(self, temporary: Path) -> _Contents | None:
        """Of the study in the bucket; None where there is none."""
        self._system.invalidate_cache()
        if not self._has(FILE_NAME):
            return None
        with suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # of an older version, or cut short
            about = json.loads(self._system.cat_file(self._path(_ABOUT)))
            return _Contents(frozenset(about["ids"]), int(about["finished"]))
        study = temporary / f"theirs-{FILE_NAME}"
        self._system.get_file(self._path(FILE_NAME), str(study))
        return _contents(study, f"{FLAG} {self.shown}: {FILE_NAME}")

    @contextmanager
    def _alone(self, folder: Path, kind: type[UserError]) -> Iterator[None]:
        """Without the other workers in this folder."""
        with alone(folder / _LOCK_NAME, patience_s=_PATIENCE_S) as is_alone:
            if not is_alone:
                raise kind(
                    f"{FLAG} {self.shown}: another process has copied to or from {folder} for {_PATIENCE_S:g} s; "
                    "end it if it hangs, and start again"
                )
            yield

    @property
    def _is_object_store(self) -> bool:
        protocol = self._system.protocol
        return bool(_OBJECT_STORES & {protocol} if isinstance(protocol, str) else _OBJECT_STORES & set(protocol))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _has(self, name: str) -> bool:
        try:  # fsspec's `exists` takes a bucket that cannot be reached for an empty one
            self._system.info(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def _send(self, name: str, path: Path) -> None:
        if self._is_object_store:
            self._system.put_file(str(path), self._path(name))
            return
        temporary = self._path(f".{name}.{secrets.token_hex(4)}")
        try:
            self._system.put_file(str(path), temporary)
            self._system.mv(temporary, self._path(name))
        except BaseException:
            with suppress(Exception):
                self._system.rm(temporary)
            raise

    def _opened(self, url: str) -> tuple[AbstractFileSystem, str]:
        try:
            import fsspec
        except ImportError:
            package = "gcsfs" if url.startswith(("gs:", "gcs:")) else "fsspec"
            raise UserError(f"{FLAG} {self.shown}: a package is missing: pip install {package}") from None
        protocol = re.split("::|://", url)[0]
        known = fsspec.available_protocols()
        if protocol not in known:
            nearest = nearest_name(protocol, known) or "; expected a URL such as gs://name/folder or s3://name/folder"
            raise UserError(f"{FLAG} {self.shown}: unknown kind of storage '{protocol}'{nearest}")
        try:
            return fsspec.core.url_to_fs(url)
        except ImportError as error:
            bare = url == f"gs://{self.shown}"
            hint = f" (a bare name means gs://{self.shown}; for a folder write ./{self.shown})" if bare else ""
            raise UserError(f"{FLAG} {self.shown}: {_missing(protocol, error)}{hint}") from None
        except Exception as error:  # each file system has its own
            raise UserError(f"{FLAG} {self.shown}: {self._reason(error)}") from None

    @contextmanager
    def _named(self, kind: type[UserError], what: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise kind(str(error)) from None
        except Exception as error:  # each file system has its own
            raise kind(f"{FLAG} {self.shown}: {what}: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        """One line, without the password."""
        said = getattr(error, "strerror", None) or str(error)
        line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, FileNotFoundError):
            line = f"there is no {error.filename or line}"
        elif isinstance(error, PermissionError) or re.search(r"(?i)\b40[13]\b|forbidden|denied|credential", line):
            line = f"no permission ({line})"
        return line.replace(self._password, "***") if len(self._password) > 2 else line


def _full(url: str) -> str:
    if "://" in url or "::" in url:
        return url
    if url.startswith(("/", ".", "~")):
        return f"file://{Path(url).expanduser().absolute()}"
    if not url:
        raise UserError(f"{FLAG}: expected a name, or a URL such as gs://name/folder or s3://name/folder")
    return f"gs://{url}"


def _missing(protocol: str, error: ImportError) -> str:
    from fsspec.registry import known_implementations

    entry = known_implementations.get(protocol, {})
    package = entry.get("class", "").partition(".")[0]
    if package == "fsspec":  # it says of whom it is itself in need
        package = " ".join(re.findall(r'"([\w-]+)"', entry.get("err", "")))
    if not package or importlib.util.find_spec(package.split()[0]):
        return f"a package is missing: {str(error).splitlines()[0]}"
    return f"a package is missing: pip install {package}"


def _snapshot(study: Path, folder: Path) -> Path:
    """A copy of a SQLite database as it is at one moment, whoever writes to it."""
    copy = folder / study.name
    with (
        closing(sqlite3.connect(f"{study.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


@dataclass(frozen=True)
class _Contents:
    """Of a study's database."""

    ids: frozenset[str]  # the user attributes "id" of its studies
    finished: int  # trials
    names: frozenset[str] = frozenset()  # of the studies


_IDS = "SELECT value_json FROM study_user_attributes WHERE key = 'id'"
# As history.finished: those that failed and do not say why were lost with their worker
_FINISHED = f"""
SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED') OR state = 'FAIL' AND EXISTS (
    SELECT * FROM trial_user_attributes AS said WHERE said.trial_id = trials.trial_id AND said.key = '{FAILURE}'
)
"""


def _contents(study: Path, shown: str) -> _Contents:
    """Raises UserError, naming the file as `shown`, where it is no database of Optuna."""
    try:
        with closing(sqlite3.connect(f"{study.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)) as database:
            ids = frozenset(str(json.loads(value)) for (value,) in database.execute(_IDS))
            ((finished,),) = database.execute(_FINISHED)
            names = frozenset(name for (name,) in database.execute("SELECT study_name FROM studies"))
    except (sqlite3.Error, ValueError):
        raise UserError(f"{shown} is not the database of a study, or damaged; remove it, or name another") from None
    return _Contents(ids, finished, names)


def _written(contents: _Contents, folder: Path) -> Path:
    path = folder / _ABOUT
    path.write_text(json.dumps({"ids": sorted(contents.ids), "finished": contents.finished}) + "\n")
    return path


def _put_new(source: Path, target: Path) -> bool:
    """Give a file its place unless another process has put one there meanwhile; whether it did."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if target.exists():
            return False
        shutil.move(source, target)
    return True
