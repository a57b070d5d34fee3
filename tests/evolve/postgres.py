"""A PostgreSQL server of the tests' own, on a free port of this machine, where one is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from utils.stopping import _at_death_of_parent

PASSWORD = "correct-horse"
_PATIENCE_S = 30


@dataclass
class Server:
    """A running server; `url` is of an empty database, as user tester."""

    folder: Path
    programs: Path
    port: int
    user: dict[str, int | list[int]]  # whom it runs as, for subprocess
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"postgresql://tester:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it; it stops with the thread that this is, so call it from the main one."""
        command = [self.programs / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", self.folder]
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *settings],
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=lambda: _at_death_of_parent(signal.SIGINT) and None,
                **self.user,
            )
        until = time.monotonic() + _PATIENCE_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL does not start: {(self.folder / 'log').read_text()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        command = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0

    def stop(self) -> None:
        """As an administrator does who does not wait for clients."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(_PATIENCE_S)
        self.process = None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server with an empty database; skips where none is installed."""
    with a_server() as server:
        yield server


@contextmanager
def a_server() -> Iterator[Server]:
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    user = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a folder of pytest cannot be entered by others
    server = Server(folder, programs, _free_port(), user)
    try:
        if user:
            os.chown(folder, user["user"], user["group"])
        _make_cluster(server)
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    found = [Path(path).resolve() for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    folders = [path.parent for path in found]
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


def _unprivileged() -> dict[str, int | list[int]]:
    """The server refuses to run as root, who can be anybody else."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user to run it as")
    raise AssertionError


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _make_cluster(server: Server) -> None:
    word = server.folder / "word"
    word.write_text(PASSWORD)
    word.chmod(0o644)
    command = [
        server.programs / "initdb",
        "-D",
        server.folder / "data",
        "-U",
        "tester",
        "--no-sync",
        "-A",
        "scram-sha-256",
    ]
    made = subprocess.run(
        [*command, f"--pwfile={word}", "-E", "UTF8", "--no-locale"],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        **server.user,
    )
    if made.returncode:
        pytest.skip(f"PostgreSQL makes no database here: {made.stderr.strip().splitlines()[-1]}")
