"""Results of a sweep in a bucket: sent as they come, and fetched where a machine has none.

Any URL that fsspec knows is a bucket. The surprise: the study goes last, both ways, so that a folder with a study in it
has all that belongs to it.
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
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.evolve.storage import FILE_NAME, mask_password
from utils.files import nearest_name
from utils.structures import RunError, UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FLAG = "--bucket"
RESULT_FILES = ("opt.yaml", "evolve.csv", "hyp_evolved.yaml", "evolve.png", "confirm.json", FILE_NAME)
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

        Where this is cut short, each file there is the complete old or new one, as far as its file system renames at
        once. Raises RunError of one line.
        """
        with self._named(RunError, "cannot be written"), tempfile.TemporaryDirectory() as temporary:
            if not self._is_object_store:
                self._system.makedirs(self._root, exist_ok=True)
            for name, path in sorted(files.items(), key=lambda item: item[0] == FILE_NAME):
                if path.exists():
                    self._send(name, _snapshot(path, Path(temporary)) if path.suffix == ".db" else path)

    def fetch(self, folder: Path) -> bool:
        """Bring RESULT_FILES where the bucket holds a study and the folder has none; whether it did. All or nothing.

        Call it before the study is opened. Raises UserError where both have one, and that of the bucket is another one
        or has more finished trials.
        """
        with self._named(UserError, "cannot be read"):
            self._system.invalidate_cache()
            if not self._has(FILE_NAME):
                return False
        folder.mkdir(parents=True, exist_ok=True)
        local = folder / FILE_NAME
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            study = Path(temporary) / FILE_NAME
            with self._named(UserError, "cannot be read"):
                self._system.get_file(self._path(FILE_NAME), str(study))
            theirs = _contents(study, f"{FLAG} {self.shown}: {FILE_NAME}")
            if local.exists():
                self._compare(theirs, _contents(local, str(local)), folder)
                return False
            with self._named(UserError, "cannot be read"):
                names = [name for name in RESULT_FILES if name != FILE_NAME and self._has(name)]
                for name in names:
                    self._system.get_file(self._path(name), str(study.with_name(name)))
            for name in names:
                study.with_name(name).replace(folder / name)
            return _put_new(study, local)

    def _compare(self, theirs: _Contents, ours: _Contents, folder: Path) -> None:
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
            raise UserError(f"{FLAG} {self.shown}: {_missing(protocol, error)}") from None
        except Exception as error:  # each file system has its own
            raise UserError(f"{FLAG} {self.shown}: {self._reason(error)}") from None

    @contextmanager
    def _named(self, kind: type[UserError], what: str) -> Iterator[None]:
        try:
            yield
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


_IDS = "SELECT value_json FROM study_user_attributes WHERE key = 'id'"
_FINISHED = "SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"


def _contents(study: Path, shown: str) -> _Contents:
    """Raises UserError, naming the file as `shown`, where it is no database of Optuna."""
    try:
        with closing(sqlite3.connect(f"{study.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)) as database:
            ids = frozenset(str(json.loads(value)) for (value,) in database.execute(_IDS))
            ((finished,),) = database.execute(_FINISHED)
    except (sqlite3.Error, ValueError):
        raise UserError(f"{shown} is not the database of a study, or damaged; remove it, or name another") from None
    return _Contents(ids, finished)


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
