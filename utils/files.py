"""Files: atomic writes, YAML and JSON, the user's cache folder, run-folder names.

A file written here is either the complete old one or the complete new one, whenever the program is killed, and unless
it is said not to last, whenever the machine stops.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
import yaml

from utils.structures import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PACK_MAGIC = b"YOLOPACK1\n"
_PACK_ALIGN = 64


def write_atomic(
    path: Path, write: Callable[[IO[bytes]], None], *, lasting: bool = True, predecessor: Path | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it over `path`.

    A flush takes some milliseconds, which thousands of files have not: those that can be made anew go without, not
    `lasting`. What `path` was before is kept as `predecessor`, if that is named. An OSError on the way names `path`.
    """
    try:
        _write_atomic(path, write, lasting, predecessor)
    except OSError as error:
        if error.errno is not None:
            error.filename = os.fspath(path)  # a full disk has none, other errors that of the temporary file
        raise


def _write_atomic(path: Path, write: Callable[[IO[bytes]], None], lasting: bool, predecessor: Path | None) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = temporary.open("xb")  # with the permissions that any new file gets; asking for them would race with threads
    try:
        with _in_use(file):
            with file:
                write(file)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            if predecessor is not None and path.exists():
                _keep(path, predecessor)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if lasting:
        _flush_folder(path.parent)


@contextmanager
def _in_use(file: IO[bytes]) -> Iterator[None]:
    """A lock on the file within the block, though it is closed there; it ends with the program, however that ends."""
    if fcntl is None:  # Windows, where nothing that is open can be renamed
        yield
        return
    handle = os.dup(file.fileno())
    try_lock(handle)
    try:
        yield
    finally:
        os.close(handle)


def _keep(path: Path, predecessor: Path) -> None:
    """Give the file at `path` a second name, so that there is one under the first at any time; where links are not to
    be had, there is none until the next moment."""
    link = path.with_name(f".{predecessor.name}.{secrets.token_hex(4)}")
    try:
        link.hardlink_to(path)
    except OSError:
        path.replace(predecessor)
    else:
        link.replace(predecessor)
        link.unlink(missing_ok=True)  # still there where both names were of one file


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what `write_atomic` left in `folder` where a program was killed half-way, of the file `name` or of all.

    What another program is writing stays.
    """
    for path in folder.glob(".*"):
        half = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}", path.name)
        if half and name in ("", half[1]) and not _is_in_use(path):
            path.unlink(missing_ok=True)


def _is_in_use(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not try_lock(file.fileno(), exclusive=False)
    except OSError:  # it is gone
        return False


def try_lock(handle: int, *, exclusive: bool = True) -> bool:
    """Whether nobody objects to a lock. Without locks in the file system, or the system, nobody ever does."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def locked(folder: Path, *, patience_s: float) -> int | None:
    """A handle on a folder with a lock until it is closed, or this process ends; None where another stays there."""
    if fcntl is None:  # Windows, where folders have no handles
        return os.open(os.devnull, os.O_RDONLY)
    until = time.monotonic() + patience_s
    handle = os.open(folder, os.O_RDONLY)
    while not try_lock(handle):
        if time.monotonic() > until:
            os.close(handle)
            return None
        time.sleep(0.1)
    return handle


def write_text(path: Path, text: str, *, lasting: bool = True) -> None:
    write_atomic(path, lambda file: file.write(text.encode()) and None, lasting=lasting)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows has no handle on folders, and some network file systems cannot flush them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_yaml(path: Path, *, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, naming `what` the file should be, when it is not one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{what} is a folder, expected a YAML file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {path} ({getattr(error, 'strerror', None) or 'not text'})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-45 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{what} is not valid YAML: {where}: {problem}") from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise UserError(f"{what} must be a YAML mapping of `key: value` lines, got {got}: {path}")
    return content


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError, naming the place in it, when it is none."""
    shown = os.fsencode(path).decode("utf-8", "replace")  # names on Linux are bytes
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        problem = re.sub(" (starting )?at$", "", error.msg)
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{shown}: not valid JSON: {where}: {problem[:1].lower()}{problem[1:]}") from None
    except (ValueError, RecursionError):  # not UTF-8, numbers of 5,000 digits, lists in lists in lists
        raise UserError(f"{shown}: not valid JSON") from None


def json_kind(value: Any) -> str:
    """What a value of a JSON file is, for people."""
    words = {dict: "a mapping", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


def nearest_name(wrong: str, names: Iterable[str]) -> str:
    """A hint to end an error line with: "; did you mean 'x'?", or the empty string when nothing is near."""
    known = list(names)
    same = [name for name in known if name.casefold() == wrong.casefold()]
    near = same[:1] or difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def write_yaml(path: Path, content: dict[str, Any], *, header: str = "") -> None:
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(path, header + body)


def write_arrays(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays and a JSON-able `meta` to one file that `read_arrays` maps into memory."""
    header, _ = array_layout({name: (array.dtype, array.shape) for name, array in arrays.items()}, meta)

    def write(file: IO[bytes]) -> None:
        file.write(header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes() + b"\0" * (-array.nbytes % _PACK_ALIGN))

    write_atomic(path, write)


def array_layout(
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], meta: dict[str, Any]
) -> tuple[bytes, dict[str, int]]:
    """How a file for `read_arrays` begins, and at which byte of it each array of this dtype and shape does."""
    table, offset = {}, 0
    for name, (dtype, shape) in kinds.items():
        table[name] = {"dtype": np.dtype(dtype).str, "shape": list(shape), "offset": offset}
        offset += -(-np.dtype(dtype).itemsize * math.prod(shape) // _PACK_ALIGN) * _PACK_ALIGN
    header = json.dumps({"meta": meta, "arrays": table}).encode()
    header += b" " * (-(len(_PACK_MAGIC) + 8 + len(header)) % _PACK_ALIGN)
    start = _PACK_MAGIC + len(header).to_bytes(8, "little") + header
    return start, {name: len(start) + entry["offset"] for name, entry in table.items()}


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file by `write_arrays`, memory-mapped read-only, and its meta. Raises ValueError on others."""
    with path.open("rb") as file:
        if file.read(len(_PACK_MAGIC)) != _PACK_MAGIC:
            raise ValueError(f"not an array file: {path}")
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > path.stat().st_size:
            raise ValueError(f"damaged array file: {path}")
        header = json.loads(file.read(header_size))
        start = file.tell()
    try:
        return {name: _mapped(path, start, entry) for name, entry in header["arrays"].items()}, header["meta"]
    except (AttributeError, KeyError, OverflowError, TypeError) as error:  # JSON, but not that of `write_arrays`
        raise ValueError(f"damaged array file: {path}") from error


def _mapped(path: Path, start: int, entry: dict[str, Any]) -> np.ndarray:
    shape = tuple(entry["shape"])
    if 0 in shape:  # an empty range cannot be mapped
        return np.empty(shape, entry["dtype"])
    array = np.memmap(path, entry["dtype"], "r", start + entry["offset"], shape)
    return np.asarray(array)  # slices of a memmap itself are slow


def cache_folder() -> Path:
    """Where caches go when they cannot lie beside what they describe. May not exist yet."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in some containers
        home = Path(tempfile.gettempdir())
    return home / ".cache" / "yolo-trainer"


def this_python() -> str:
    """How to type the running Python in a command."""
    return shlex.quote(str(from_here(Path(sys.executable))))


def from_here(path: Path) -> Path:
    """An absolute path as a user would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def printable(text: str, stream: TextIO) -> str:
    """`text` with escapes for what the encoding of `stream` lacks, as for Chinese names on a Western terminal."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def new_run_folder(project: Path, name: str, *, exist_ok: bool) -> Path:
    """Make and return `project/name`, or the first free of name2, name3, ... unless `exist_ok`.

    Raises UserError where a file is in the way or the folder cannot be made.
    """
    for parent in (project, *project.parents):
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--project {project}: {parent} is a file, expected a folder to put runs into")
    for candidate in _run_folders(project, name):
        if candidate.is_file() and exist_ok:
            raise UserError(f"--name {name}: {candidate} is a file; remove it or choose another --name")
        try:
            candidate.mkdir(parents=True, exist_ok=exist_ok)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--project {project}: cannot make {candidate}: {error.strerror}") from None
        return candidate
    raise AssertionError("the candidates never end")


def run_folders(project: Path, name: str) -> list[Path]:
    """Those that are there, of the names that `new_run_folder` gives."""
    known = re.compile(re.escape(name) + r"\d*")
    return [path for path in project.glob("*") if known.fullmatch(path.name) and path.is_dir()]


def code_digest(root: Path) -> str:
    """16 hexadecimal digits of the program files of the project at `root`."""
    digest = blake2b(digest_size=8)
    kinds = ("*.py", *(f"{folder}/**/*.{kind}" for folder in ("models", "utils") for kind in ("py", "cpp")))
    for path in sorted(path for kind in kinds for path in root.glob(kind)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run_folders(project: Path, name: str) -> Iterable[Path]:
    yield project / name
    for number in itertools.count(2):
        yield project / f"{name}{number}"
