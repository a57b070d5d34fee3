"""C++ files of this project as libraries: compiled once, on first use, into the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from utils.files import cache_folder

COMPILERS = ("g++", "clang++", "c++")
_ALWAYS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"),
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),
)


class NativeError(Exception):
    """There is no such library on this machine; the message says why, in one line."""


def native_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of a C++ file, for this machine's processor. Raises NativeError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    command = [compiler, *_ALWAYS, *flags]
    path = cache_folder() / f"{source.stem}-{_fingerprint(source, command)}.so"
    if not _is_ours(path):
        _build([*command, str(source)], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"cannot load {path}: {error}") from None


def _fingerprint(source: Path, command: Sequence[str]) -> str:
    """Of all that the library depends on; a home folder may be shared by machines with other instructions."""
    version = _said(command[0], "--version")
    native = _said(command[0], "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    parts = (source.read_bytes(), " ".join(command).encode(), version, native)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _said(*command: str) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=False).stdout
    except OSError as error:  # such as a program for another processor
        raise NativeError(f"{command[0]} does not run: {error.strerror}") from None


def _is_ours(path: Path) -> bool:
    """Whether the file exists and nobody else could have put it there."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return False
    return not hasattr(os, "getuid") or owner == os.getuid()


def _build(command: Sequence[str], path: Path) -> None:
    """Compile beside `path`, then rename, so that no half-written library is ever loaded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, errors="replace", check=False
            )
            if done.returncode:
                problem = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
                raise NativeError(f"{command[0]} cannot compile {Path(command[-1]).name}: {problem}")
            made.replace(path)
    except OSError as error:
        raise NativeError(f"cannot write {path}: {error.strerror}") from None
