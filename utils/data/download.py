"""Data sets that a YAML asks to fetch: downloaded with patience, checked, unpacked inside their folder alone.

Nothing appears under its name before it is whole: a file is a `.part` until it is checked, an archive is unpacked into
a folder of its own and moved. What lies there already stays as it is.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from utils.config import read_dataset
from utils.files import write_text
from utils.structures import DatasetSpec, Download, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Note = Callable[[str], object]  # takes a line for the user
Bar = Callable[[int, str], AbstractContextManager[Any]]  # (MB in all, description) -> a bar with `update(MB)`

_ATTEMPTS = 5  # without a byte of progress
_PAUSE_S = 1.0  # before the second attempt; each further one waits twice as long
_TIMEOUT_S = 30.0  # of silence
_AT_ONCE = 1 << 20
_ARCHIVE_NAME = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_LONGEST_LINK = 4096  # bytes
_SPARE_BYTES = 64 << 20  # left free on the disk
_MB = 1e6
_IN_URLS = "%/:=&?~#+!$,;'@()*[]"  # left as they are
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses of servers that may do better later


def ensure_downloaded(spec: DatasetSpec, *, note: Note, bar: Bar | None = None) -> DatasetSpec:
    """The data set with what its YAML has under `download`, fetched if an entry of train or val is missing.

    Raises UserError, in one line, when it cannot be had. An interrupted download is continued by the next call.
    """
    if not spec.downloads or (_missing(spec) is None and "" not in map(_marked, spec.downloads)):
        return spec
    for download in spec.downloads:
        fetch(download, note=note, bar=bar)
    fetched = read_dataset(os.fspath(spec.source))[0]  # where an entry lies depends on what exists
    missing = _missing(fetched)
    if missing is not None:
        marks = ", ".join(str(mark) for mark in map(_mark, spec.downloads) if mark.exists())
        again = f"; to fetch it again, remove {marks}" if marks else ""
        raise UserError(f"{spec.source}: {missing} is not in what 'download' brought{again}")
    return fetched


def _missing(spec: DatasetSpec) -> Path | None:
    return next((entry for entry in (*spec.train, *spec.val) if not os.path.exists(entry)), None)  # noqa: PTH110


def fetch(download: Download, *, note: Note, bar: Bar | None = None, pause_s: float = _PAUSE_S) -> None:
    """Download one file into its folder, unless it is there; an archive is unpacked, once, and not kept."""
    with _mendable_errors(download):
        if _marked(download) == download.url:
            return
        download.to.mkdir(parents=True, exist_ok=True)
        with _alone_in(download.to, note):
            if _marked(download) != download.url:  # by the process that was waited for
                _fetch(download, note, bar or (lambda total, description: nullcontext()), pause_s)


@contextmanager
def _alone_in(folder: Path, note: Note) -> Iterator[None]:
    """One process at a time, where there are locks: two would write to the same file."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"waiting for another process that downloads into {folder}")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _fetch(download: Download, note: Note, bar: Bar, pause_s: float) -> None:
    target = _target(download)
    there = target.exists()  # put there by hand, or by an earlier start
    if there and not _is_right(target, download):
        raise _refusal(download, f"{target} is there and is another file; remove it or name another folder in 'to'")
    transfer = _Transfer(download, target, note, bar, pause_s)
    file = target if there else transfer.run()
    if _is_archive(file):
        note(f"unpacking {target.name} into {download.to}")
        _unpack(file, download, note, discard=None if there else transfer.discard)
        write_text(_mark(download), download.url)
    elif _ARCHIVE_NAME.search(target.name):
        if not there:
            transfer.discard()
        raise _refusal(download, "is damaged, or no archive")
    elif not there:
        file.replace(target)
    if not there:
        transfer.discard()


def _refusal(download: Download, problem: str) -> UserError:
    return UserError(f"'download' {download.url}: {problem}")


def _target(download: Download) -> Path:
    return download.to / _file_name(download.url)


def _mark(download: Download) -> Path:
    """Says that an archive was unpacked: a YAML with a wrong path would otherwise fetch it at every start."""
    return download.to / f".{_file_name(download.url)}.unpacked"


def _marked(download: Download) -> str | None:
    """The URL whose archive was unpacked; empty where that was not finished, None where there was none."""
    try:
        return _mark(download).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _file_name(url: str) -> str:
    name = PureWindowsPath(PurePosixPath(unquote(urlsplit(url).path)).name).name
    name = "".join(letter for letter in name if letter.isprintable() and letter not in '<>:"|?*')
    return name.strip(". ")[-50:] or "download"


@contextmanager
def _mendable_errors(download: Download) -> Iterator[None]:
    """Errors of the disk as UserErrors that name the download."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise _refusal(download, f"{error.strerror or error}{where}") from None


def _is_right(target: Path, download: Download) -> bool:
    """Whether a file is the one that the YAML describes, as far as it does."""
    same_size = target.is_file() and download.size in (None, target.stat().st_size)
    return same_size and download.sha256 in (None, _digest(target))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


# ---- transfer -----------------------------------------------------------------------------------------------------


class _Broken(Exception):
    """A transfer that ended early, for a reason that may pass."""


@dataclass
class _Transfer:
    """A download into `target`, over as many connections as it takes."""

    download: Download
    target: Path
    note: Note
    bar: Bar
    pause_s: float

    def __post_init__(self) -> None:
        self.part = self.target.with_name(f"{self.target.name}.part")
        self.about = self.target.with_name(f"{self.target.name}.part.json")  # which file the .part is a part of

    def run(self) -> Path:
        """The checked file, under a name of its own."""
        failures = 0
        while True:
            before = self._have()
            try:
                self._connect()
                break
            except _Broken as error:
                failures = 0 if self._have() > before else failures + 1
                if failures >= _ATTEMPTS:
                    kept = "; what is there is kept, start again to continue" if self._have() else ""
                    raise _refusal(self.download, f"{error}{kept}") from None
                time.sleep(self.pause_s * 2 ** max(failures - 1, 0))
        self._check()
        return self.part

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)

    def _have(self) -> int:
        try:
            return self.part.stat().st_size
        except OSError:
            return 0

    def _connect(self) -> None:
        """Ask for what is missing and write it down."""
        start, known = self._have(), self._known()
        if start and known and start == known["size"]:
            return
        if start and not (known and known["validator"]):
            start = 0  # of another file, or of a server that does not tell its files apart
        headers = {"User-Agent": "yolo-trainer", "Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": known["validator"]}
        try:
            request = Request(quote(self.download.url, safe=_IN_URLS), headers=headers)
            with urlopen(request, timeout=_TIMEOUT_S) as response:
                self._receive(response, start)
        except HTTPError as error:
            error.close()
            if error.code == 416:  # the file shrank
                self.about.unlink(missing_ok=True)
                raise _Broken("the file changed on the server") from None
            problem = f"the server says {error.code} {error.reason}".rstrip()
            if error.code in _TRY_AGAIN:
                raise _Broken(problem) from None
            raise _refusal(self.download, problem) from None
        except (URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise _Broken(_no_connection(error)) from None
        except UserError:
            raise
        except ValueError as error:  # a port such as :x
            raise _refusal(self.download, str(error)) from None

    def _known(self) -> dict[str, Any] | None:
        """What the server said of the file that the .part is a part of."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(self.about.read_text(encoding="utf-8"))
            if about["url"] == self.download.url:
                return {"validator": about["validator"], "size": about["size"]}
        return None

    def _receive(self, response: Any, start: int) -> None:
        continued = start and response.status == 206 and _range_start(response) == start
        if start and response.status == 206 and not continued:
            raise _Broken("the server sent another part than the one asked for")
        start = start if continued else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isascii() and length.isdigit() else None
        self._check_total(total)
        self._check_space((total or self.download.size or 0) - start)
        self._remember(response, total)
        self._announce(start, total)
        limit = self.download.size or total
        with self.part.open("ab" if continued else "wb") as file:
            self._copy(response, file, start, total, limit)
        if limit is not None and self._have() > limit:
            self.discard()
            raise _refusal(self.download, f"more than the {limit} bytes that it should have")
        if total is not None and self._have() < total:
            raise _Broken("the connection broke off")

    def _check_total(self, total: int | None) -> None:
        if total is not None and self.download.size not in (None, total):
            says = f"the data set YAML says 'size: {self.download.size}'"
            raise _refusal(self.download, f"the server has {total} bytes, {says}")

    def _check_space(self, wanted: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if wanted + _SPARE_BYTES > free:
            raise _refusal(
                self.download, f"needs {wanted / _MB:,.0f} MB in {self.target.parent}, which has {free / _MB:,.0f} free"
            )

    def _remember(self, response: Any, total: int | None) -> None:
        tag = response.headers.get("ETag") or ""
        validator = response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
        about = {"url": self.download.url, "validator": validator, "size": total}
        self.about.write_text(json.dumps(about), encoding="utf-8")

    def _announce(self, start: int, total: int | None) -> None:
        size = "" if total is None else f" ({total / _MB:,.1f} MB)"
        there = f", of which {start / _MB:,.1f} MB are there" if start else ""
        self.note(f"downloading {self.download.url}{size}{there}")

    def _copy(self, response: Any, file: IO[bytes], start: int, total: int | None, limit: int | None) -> None:
        with self.bar(int((total or 0) / _MB), f"Downloading {self.target.name}") as bar:
            shown, have = 0, start
            while block := _block(response):
                file.write(block)
                have += len(block)
                if limit is not None and have > limit:
                    return
                if bar is not None and int(have / _MB) > shown:
                    bar.update(int(have / _MB) - shown)
                    shown = int(have / _MB)

    def _check(self) -> None:
        """The .part as a whole; a wrong one is removed, as continuing it would not mend it."""
        problem, size = "", self._have()
        if self.download.size not in (None, size):
            problem = f"{size} bytes, the data set YAML says 'size: {self.download.size}'"
        elif self.download.sha256 is not None and (got := _digest(self.part)) != self.download.sha256:
            problem = f"its sha256 is {got}, the data set YAML says {self.download.sha256}"
        if problem:
            self.discard()
            raise _refusal(self.download, problem)


def _block(response: Any) -> bytes:
    try:
        return response.read1(_AT_ONCE)
    except (OSError, http.client.HTTPException) as error:  # not of the disk: that is written to elsewhere
        raise _Broken(_no_connection(error)) from None


def _no_connection(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return f"no connection: {getattr(reason, 'strerror', None) or str(reason) or type(reason).__name__}"


def _range_start(response: Any) -> int | None:
    """Where the bytes of a partial answer begin, from `Content-Range: bytes 100-199/200`."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0].strip()
    return int(start) if start.isascii() and start.isdigit() else None


# ---- archives -----------------------------------------------------------------------------------------------------


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError, ValueError):  # compressed, and no tar
        return False


class _Unsafe(Exception):
    """An archive that would reach outside its folder."""


class _Full(Exception):
    """An archive that would fill the disk."""


def _unpack(archive: Path, download: Download, note: Note, discard: Callable[[], None] | None) -> None:
    """Into a folder within `to`, then moved. Raises UserError for what no honest archive holds.

    `discard` forgets an archive that no second attempt would unpack.
    """
    shown = _file_name(download.url)
    with tempfile.TemporaryDirectory(dir=download.to, prefix=".unpacking-") as name:
        unpacking = _Unpacking(Path(name))
        try:
            (unpacking.zip if zipfile.is_zipfile(archive) else unpacking.tar)(archive)
            lost = unpacking.link()
        except _Full as error:
            raise _refusal(download, f"unpacking {shown} {error}") from None
        except (_Unsafe, *_DAMAGE) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the archive
                raise
            if discard:
                discard()
            problem = str(error) if isinstance(error, _Unsafe) else f"cannot be unpacked: {error}"
            raise _refusal(download, f"{shown} {problem}; nothing was unpacked") from None
        if lost:
            note(f"{shown}: {lost} links in it, to folders or to nothing, were left out")
        top = list(unpacking.folder.iterdir())
        if len(top) == 1 and top[0].is_dir() and top[0].name == download.to.name:
            top = list(top[0].iterdir())
        write_text(_mark(download), "")  # from here on, some of it is there
        for path in top:
            _move(path, download.to / path.name)


_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError),
    *(NotImplementedError, RuntimeError),  # a way to compress that Python does not know, or a password
)


class _Unpacking:
    """An archive on its way into an empty folder. No link is made: one to a file becomes that file once more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._links: list[tuple[Path, Path]] = []  # where one should be, and what it leads to

    def zip(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            self._check_space(sum(member.file_size for member in members))
            for member in members:
                kind = stat.S_IFMT(member.external_attr >> 16)
                if kind == stat.S_IFLNK and member.file_size <= _LONGEST_LINK:
                    target = self._inside(member.filename)
                    self._add_link(member.filename, target, target.parent, os.fsdecode(content.read(member)))
                elif kind in (0, stat.S_IFREG):
                    with content.open(member) as source:
                        self._write(source, member.filename, member.file_size)
                else:
                    raise _Unsafe(f"holds {member.filename!a}, which is no file")

    def tar(self, archive: Path) -> None:
        with tarfile.open(archive) as content:
            for member in content:
                if member.isreg():
                    self._check_space(member.size)
                    self._write(content.extractfile(member), member.name, member.size)
                elif member.issym() or member.islnk():
                    target = self._inside(member.name)
                    base = target.parent if member.issym() else self.folder
                    self._add_link(member.name, target, base, member.linkname)
                elif not member.isdir():
                    raise _Unsafe(f"holds {member.name!a}, which is no file")
            while content.fileobj.read(_AT_ONCE):  # the checksum of what is compressed comes last
                pass

    def _write(self, source: IO[bytes], name: str, size: int) -> None:
        """A member of as many bytes as the archive declares, which is what was compared with the disk."""
        target = self._inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            while size > 0 and (block := source.read(min(size, _AT_ONCE))):
                file.write(block)
                size -= len(block)
        if size > 0 or source.read(1):
            raise ValueError(f"{name!a} is of another size than declared")

    def _inside(self, name: str) -> Path:
        """Where a member goes."""
        parts = name.replace("\\", "/").split("/")
        absolute = not parts[0] or (len(parts[0]) == 2 and parts[0].endswith(":"))
        if absolute or ".." in parts or "\0" in name:
            raise _Unsafe(f"holds {name!a}, which lies outside of the folder")
        return self.folder.joinpath(*(part for part in parts if part not in ("", ".")))

    def _add_link(self, name: str, path: Path, base: Path, leads_to: str) -> None:
        target = Path(os.path.normpath(base / leads_to))  # exact, as no link is on the way
        if "\0" in leads_to or not target.is_relative_to(self.folder):
            raise _Unsafe(f"holds {name!a}, which is a link that leads outside of the folder")
        self._links.append((path, target))

    def link(self) -> int:
        """Make files of the links, once all files are there, and return how many could not be."""
        lost = 0
        for path, target in self._links:
            if not target.is_file() or path.exists():
                lost += 1
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(target, path)
            except OSError:  # a file system without
                self._check_space(target.stat().st_size)
                shutil.copyfile(target, path)
        return lost

    def _check_space(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if size + _SPARE_BYTES > free:
            raise _Full(f"needs {size / _MB:,.0f} MB more, and {free / _MB:,.0f} MB are free")


def _move(path: Path, target: Path) -> None:
    """Move a file or folder; where there is one already, add to the folder and leave the file."""
    if not os.path.lexists(target):
        path.rename(target)
    elif path.is_dir() and target.is_dir():
        for below in path.iterdir():
            _move(below, target / below.name)
