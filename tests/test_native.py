"""Where a library cannot be had; what one does once it is there is tested with those who use it."""

from pathlib import Path

import pytest

from utils import native
from utils.native import NativeError, native_library


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "nothing.cpp"
    path.write_text('extern "C" void nothing() {}\n')
    return path


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Writes the only compiler that there is."""

    def write(content: str) -> None:
        path = tmp_path / "bin" / native.COMPILERS[0]
        path.parent.mkdir()
        path.write_text(content)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))

    return write


def test_without_a_compiler_there_is_no_library(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeError, match=r"^there is no C\+\+ compiler \(g\+\+, "):
        native_library(source, ())


def test_a_compiler_that_does_not_run_is_named(source, compiler):
    compiler("\0 for another processor")
    with pytest.raises(NativeError, match=r"g\+\+ does not run: "):
        native_library(source, ())


def test_a_compiler_that_fails_is_quoted(source, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "cache")
    compiler("#!/bin/sh\necho error: no room >&2\nexit 1\n")
    with pytest.raises(NativeError, match=r"g\+\+ cannot compile nothing.cpp: error: no room$"):
        native_library(source, ())
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "file/below"], ids=["a name too long", "below a file"])
def test_a_cache_folder_that_cannot_be_used_is_named(name, source, compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / name)
    compiler("#!/bin/sh\n")
    with pytest.raises(NativeError, match=f"^cannot write {tmp_path / name}"):
        native_library(source, ())
