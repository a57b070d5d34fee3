"""The process in which Weights & Biases runs, beside the training: it is told of the run on its standard input.

The surprise: nothing of the trainer is imported here, and of wandb nothing there. So whatever that package does, to
signals, `sys.exit` or the terminal, or by waiting for a network, it does to this process alone.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from wandb.sdk.wandb_run import Run

FAILED = "error: "  # begins the line
INIT_S = 30.0  # that a server has to answer
_ALONE_S = 30.0  # to finish in, when the trainer was killed


def main() -> None:
    """Tell Weights & Biases what comes, a pickled tuple each: how the run begins, then (name below, arguments...).

    The last one is ("finish", exit code). Without it the trainer was killed, and so is this process before long. What
    goes wrong ends it with one line, on standard error.
    """
    told = _messages(sys.stdin.buffer)
    try:
        run = _begin(*next(told))
        for name, *what in told:
            if name == "finish":
                run.finish(exit_code=what[0])
                return
            _TELL[name](run, *what)
        _end_within(_ALONE_S)
        run.finish(exit_code=1)
    except Exception as error:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        sys.exit(f"\n{FAILED}{line}")


def _messages(stream: BinaryIO) -> Iterator[tuple]:
    """Those that are whole."""
    while True:
        try:
            yield pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            return


def _end_within(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def _begin(start: Mapping[str, Any], trainer: int) -> Run:
    """The run of these arguments of `wandb.init`. `trainer` is the process whose memory and processor time it shows."""
    import wandb

    settings = {
        "console": "off",
        "silent": True,
        "symlink": False,
        "init_timeout": INIT_S,
        "disable_code": True,
        "disable_job_creation": True,
        "label_disable": True,
        "x_stats_pid": trainer,
    }
    project = wandb.setup().settings.project or start["project"]  # WANDB_PROJECT, where it is set
    run = wandb.init(settings=wandb.Settings(**settings), allow_val_change=True, **{**start, "project": project})
    run.define_metric("epoch", hidden=True)
    run.define_metric("*", step_metric="epoch")
    return run


def _scalars(run: Run, values: Mapping[str, float], epoch: int) -> None:
    run.log({**values, "epoch": epoch}, step=_step(run, epoch), commit=True)


def _images(run: Run, pictures: Mapping[str, np.ndarray], epoch: int) -> None:
    import wandb

    shown = {tag: wandb.Image(picture, file_type="jpg") for tag, picture in pictures.items()}
    run.log({**shown, "epoch": epoch}, step=_step(run, epoch), commit=False)


def _step(run: Run, epoch: int) -> int:
    """A step is an epoch, where wandb takes it: steps never go back, so an epoch that comes again is a later one."""
    return max(epoch, run.step)


def _summary(run: Run, values: Mapping[str, float]) -> None:
    run.summary.update(values)


def _files(run: Run, pictures: Mapping[str, str], pages: Mapping[str, str], epoch: int) -> None:
    """Files by tag: pictures, and pages of HTML."""
    import wandb

    shown: dict[str, Any] = {tag: wandb.Image(path) for tag, path in pictures.items()}
    shown |= {tag: wandb.Html(path, inject=False) for tag, path in pages.items()}
    run.log({**shown, "epoch": epoch}, step=_step(run, epoch), commit=True)


def _artifact(run: Run, about: Mapping[str, Any], files: Sequence[tuple[str, str]], aliases: Sequence[str]) -> None:
    """Files, each with its name there, which stay where they are and are read from there."""
    import wandb

    artifact = wandb.Artifact(**about)
    for path, name in files:
        artifact.add_file(path, name=name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=list(aliases))


_TELL = {"scalars": _scalars, "images": _images, "summary": _summary, "files": _files, "artifact": _artifact}
