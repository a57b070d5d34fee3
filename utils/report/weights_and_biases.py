"""Weights & Biases: who asks for it, and the logger that tells it of a run.

The surprise: wandb is never imported here. It runs in a process of its own (wandb_process.py), which a thread writes
to, so that no step waits for that package or a network, and a run ends when it should.
"""

from __future__ import annotations

import os
import pickle
import queue
import re
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from utils.config import PROJECT_ROOT, TrainOptions, spelling
from utils.data.scan import open_dataset
from utils.data.sources import open_split
from utils.files import write_text
from utils.hyp import plain_values
from utils.report.logger import LoggedEpoch, LoggedRun, Logger, Note, first_line
from utils.report.pictures import OF_THE_END
from utils.report.wandb_process import FAILED
from utils.runtime import environment, wandb_mode
from utils.stopping import signals_held_back
from utils.structures import DatasetSpec, Metrics, UserError

_FOLDER = "wandb"  # in the run's
_LOG = "process.log"
_ID_FILE = "run_id.txt"
_FLAGS = ("entity", "upload_dataset", "artifact_alias")  # that have no meaning but for wandb's
_ALSO = "bbox_interval"  # has one for TensorBoard, too
_MODES = ("online", "offline", "dryrun", "run", "shared")

_PAGE = "report.html"
_MOST_WAITING = 256 << 20  # bytes of messages; more than comes while wandb begins, by far
_MOST_IMAGES = 20_000  # of an artifact; each is a file that is read, and sent by itself
_SAID_S = 5.0  # a wait that takes longer is announced
_FINISH_S = 300.0  # for weights and pictures to be sent, at the end
_DATASET_S = 3600.0  # with the images, which somebody asked for
_LEAVE_S = 10.0  # where the run is not at its end
_KILLED_S = 1.0  # for a process to be gone; one that waits for a disk may take longer


# ---- who asks for it ----------------------------------------------------------------------------------------------


def asked_for(options: TrainOptions, mode: str | None) -> str | None:
    """The flag that asks for Weights & Biases, else WANDB_MODE, of the value `mode`, if that does; else None.

    Raises UserError for a mode that there is not.
    """
    if mode == "disabled":
        return None
    if mode is not None and mode not in _MODES:
        raise UserError(f"WANDB_MODE={mode}: should be online, offline or disabled")
    default = TrainOptions()
    for name in (*_FLAGS, _ALSO):
        if getattr(options, name) != getattr(default, name):
            return spelling(name)
    return f"WANDB_MODE={mode}" if mode in _MODES else None


def check_installed(options: TrainOptions, mode: str | None) -> None:
    """Raises UserError where a flag that is for nothing else asks for a package that is not there."""
    by = asked_for(options, mode)
    if by in map(spelling, _FLAGS) and not _installed():
        raise UserError(f"{by}: {_NEEDS}; or leave it out")


def missing(options: TrainOptions, mode: str | None) -> str | None:
    """A line for the user where somebody asks for a package that is not there."""
    by = asked_for(options, mode)
    return None if by is None or _installed() else f"nothing goes to Weights & Biases: {by} {_NEEDS}"


_NEEDS = "needs the wandb package: pip install wandb"


def _installed() -> bool:
    """Not by looking for a module: a folder `wandb` beside the scripts would pass for one."""
    try:
        metadata.version("wandb")
    except metadata.PackageNotFoundError:
        return False
    return True


def is_known(folder: Path) -> bool:
    """Whether Weights & Biases knows the run in a folder."""
    return (folder / _FOLDER / _ID_FILE).is_file()


def run_id(folder: Path, *, resumed: bool) -> str:
    """How Weights & Biases knows the run in a folder: one that is `resumed` keeps its id, another gets a new one."""
    path = folder / _FOLDER / _ID_FILE
    with suppress(OSError):
        if resumed and (known := path.read_text(encoding="utf-8").strip()):
            return known
    fresh = secrets.token_hex(6)
    with suppress(OSError):  # the logger will say what is wrong with the folder
        path.parent.mkdir(exist_ok=True)
        write_text(path, fresh + "\n")
    return fresh


# ---- the logger ---------------------------------------------------------------------------------------------------


class WandbLogger(Logger):
    """Scalars, pictures, final figures, best.pt and, if asked for, the data, for a run that has a `wandb_id`.

    The process starts with the first thing to tell. An epoch that comes again after a resume is logged anew.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._run, self._epoch = run, run.start_epoch
        self._process: _Process | None = None

    def epoch(self, epoch: LoggedEpoch) -> None:
        self._epoch = epoch.number
        values = {tag: value for tag, value in epoch.results.items() if tag != "epoch"}
        values |= {f"time/{tag}": value for tag, value in epoch.timing.items() if tag != "epoch"}
        self._tell("scalars", values, epoch.number)

    def images(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        self._tell("images", dict(pictures), step)

    def close(self, result: Metrics | None = None) -> None:
        if result is not None:
            self._conclude(result)
        if self._process is not None:
            last = _DATASET_S if self._run.options.upload_dataset else _FINISH_S
            if result is None:
                self._process.finish(_LEAVE_S, self._run.note, exit_code=1)
            else:
                self._process.finish(last, self._run.note, exit_code=0)

    def _tell(self, *message: Any) -> None:
        if self._run.wandb_id is None:
            return
        if self._process is None:
            self._process = _Process(self._run.folder / _FOLDER, (_start_of(self._run), os.getpid()))
        self._process.tell(message)

    def _conclude(self, result: Metrics) -> None:
        if self._run.wandb_id is None:
            return
        folder, figures = self._run.folder.resolve(), _figures(result)
        self._tell("summary", {f"final/{name}": value for name, value in figures.items()})
        pictures = {f"final/{path.stem}": str(path) for pattern in OF_THE_END for path in sorted(folder.glob(pattern))}
        pages = {"final/report": str(folder / _PAGE)} if (folder / _PAGE).exists() else {}
        self._tell("files", pictures, pages, self._epoch)
        about = {
            "name": f"run-{_plain(folder.name)}-weights",
            "type": "model",
            "metadata": {"metrics": figures, "options": asdict(self._run.options)},
        }
        aliases = dict.fromkeys(["best", self._run.options.artifact_alias])
        self._tell("artifact", about, [(str(folder / "weights" / "best.pt"), "best.pt")], list(aliases))
        if self._run.options.upload_dataset:
            self._send_dataset()

    def _send_dataset(self) -> None:
        """Or a note why not: by then all else is told, and is to be sent."""
        try:
            spec = open_dataset(self._run.options.data, note=lambda _: None)
            files = _files_of(spec)
        except (ValueError, OSError) as error:
            self._run.note(f"--upload-dataset: not done: {first_line(error)}")
            return
        about = {"name": f"{_plain(spec.source.stem)}-dataset", "type": "dataset"}
        self._tell("artifact", about, files, ["latest"])


def _start_of(run: LoggedRun) -> dict[str, Any]:
    """What `wandb.init` is told."""
    folder = run.folder.resolve()
    return {
        "dir": str(folder),
        "id": run.wandb_id,
        "name": folder.name,
        "project": _plain(folder.parent.name) or "runs",
        "entity": run.options.entity or None,
        "resume": "allow",
        "config": {"options": asdict(run.options), "hyp": plain_values(run.hyp), "about": asdict(run.about)},
    }


def _figures(result: Metrics) -> dict[str, float]:
    """Under the names of metrics.json; none where there is no label to find."""
    if not result.labels:
        return {}
    return {
        "fitness": result.fitness,
        "precision": result.precision,
        "recall": result.recall,
        "f1": result.f1,
        "mAP_0.5": result.map50,
        "mAP_0.5:0.95": result.map50_95,
    }


def _plain(name: str) -> str:
    """A name that Weights & Biases takes, for a project or an artifact."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:100]


def _files_of(spec: DatasetSpec) -> list[tuple[str, str]]:
    """The files that a data set is made of, each with its path below the folder that holds all of them.

    Raises UserError where they cannot be found, or hold too many images.
    """
    paths, images = {str(spec.source.resolve())}, set()
    for split in ("train", "val", *(["test"] if spec.test else [])):
        paths.update(str(entry) for entry in getattr(spec, split) if entry.is_file())
        for source in open_split(spec, split):
            for image in source.images:
                images.add(image)
                if len(images) > _MOST_IMAGES:
                    raise UserError(f"{spec.source} has more than {_MOST_IMAGES:,} images")
            paths.update(path for path in source.label_files if Path(path).is_file())
    paths |= images
    whole = sorted({str(Path(path).absolute()) for path in paths})
    top = os.path.commonpath([str(Path(path).parent) for path in whole])
    return [(path, Path(path).relative_to(top).as_posix()) for path in whole]


# ---- the other process --------------------------------------------------------------------------------------------


class _Messages:
    """Pickled messages on their way to a process, in order, and how many bytes of them are not there yet."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._put = self._written = 0  # bytes; one is counted by whoever tells, the other by the thread that writes

    @property
    def waiting(self) -> int:
        return self._put - self._written

    def put(self, message: tuple) -> None:
        packed = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._put += len(packed)
        self._queue.put(packed)

    def end(self) -> None:
        """No more will come."""
        self._queue.put(None)

    def write(self, stream: IO[bytes]) -> None:
        """Write what comes, to the end."""
        with suppress(OSError), stream:  # a process that is gone is noticed by whoever tells it something
            for packed in iter(self._queue.get, None):
                stream.write(packed)
                stream.flush()
                self._written += len(packed)


class _Process:
    """wandb_process.py at work, which ends with this object, or with the program, if nobody finishes it before."""

    def __init__(self, folder: Path, start: tuple) -> None:
        """Its output, and all files of wandb, go to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._messages = folder / _LOG, _Messages()
        self._messages.put(start)
        code = f"import sys; sys.path[0] = {str(PROJECT_ROOT)!r}; from utils.report.wandb_process import main; main()"
        places = {"WANDB_MODE": wandb_mode() or "online"}  # empty, it would be a mistake
        inside = folder.resolve()
        places |= {"WANDB_CACHE_DIR": str(inside / "cache"), "WANDB_DATA_DIR": str(inside / "data")}
        with self._log.open("wb") as log, signals_held_back():  # what asks the run to stop is not for the process
            self._popen = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment(**places),
                start_new_session=True,  # it has no terminal, so nobody is asked for a password there
            )
            threading.Thread(target=self._messages.write, args=(self._popen.stdin,), name="wandb", daemon=True).start()
        self._end = weakref.finalize(self, _leave, self._popen, self._messages)

    def tell(self, message: tuple) -> None:
        """Never waits. Raises RuntimeError where the process has ended, or does not keep up and so was ended."""
        if self._popen.poll() is not None:
            raise RuntimeError(self._last_words())
        if self._messages.waiting > _MOST_WAITING:
            self._kill()
            raise RuntimeError(f"it does not keep up: {self._messages.waiting >> 20:,} MB wait for it")
        self._messages.put(message)

    def finish(self, within_s: float, note: Note, *, exit_code: int) -> None:
        """Wait until all is told, and sent where there is a network. Raises RuntimeError where that is not done."""
        self.tell(("finish", exit_code))
        self._messages.end()
        silent_s = min(_SAID_S, within_s)
        try:
            if not _ends(self._popen, silent_s):
                note(f"sending what is left to Weights & Biases, for {within_s - silent_s:.0f} s at most")
                if not _ends(self._popen, within_s - silent_s):
                    raise RuntimeError(f"not all was sent in {within_s:.0f} s; `wandb sync` sends {self._log.parent}")
        finally:
            self._kill()
        if self._popen.returncode:
            raise RuntimeError(self._last_words())

    def _kill(self) -> None:
        """If it has not ended by itself."""
        self._end.detach()
        self._popen.kill()
        _ends(self._popen, _KILLED_S)

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        told = (line.removeprefix(FAILED) for line in lines if line.startswith(FAILED))
        return next(told, f"its process ended, with exit code {self._popen.returncode}: see {self._log}")


def _leave(process: subprocess.Popen, messages: _Messages) -> None:
    """End a process whose run was interrupted."""
    messages.put(("finish", 1))
    messages.end()
    if not _ends(process, _LEAVE_S):
        process.kill()
        process.wait()


def _ends(process: subprocess.Popen, within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True
