"""What the process of a trial does: train as it is told, tell of its evaluations, and heed what is said of them.

The surprise: it is a new process for each trial, so that nothing of one can leak into the next.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from utils.launch import Place
from utils.stopping import end_with_parent
from utils.structures import Metrics, RunError, UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a trial is to try."""

    options: Mapping[str, Any]  # of TrainOptions, by name
    hyp: Mapping[str, Any]  # all hyperparameters
    rungs: tuple[int, ...]  # the epochs, from 1, after which it is judged
    place: Place | None  # of the worker, where a launcher started that
    speaks: bool = False  # it shows what a training run shows of its data and network
    log: Path = Path(os.devnull)  # takes what is said on standard error


# ---- what it says -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ready:
    """All is built; training begins."""

    work: Mapping[str, Any]  # what must be the same for all trials of a study, by the words for it
    caches: tuple[Path, ...]  # files of images that it uses


@dataclass(frozen=True)
class Begun:
    """An epoch, from 1."""

    epoch: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """After a rung it waits to be told whether to go on; after the last epoch it ends."""

    epoch: int
    fitness: float
    results: Mapping[str, float]
    last: bool = False


@dataclass(frozen=True)
class Failed:
    """`usage`: by a mistake that the next trial would make as well."""

    text: str
    usage: bool = False


Message = Ready | Begun | Evaluated | Failed


# ---- the process --------------------------------------------------------------------------------------------------


def main(pipe: Connection, request: Request) -> None:
    """Of a process that multiprocessing has started."""
    end_with_parent()
    multiprocessing.set_start_method(None, force=True)  # else loader processes would be started as this one was
    with request.log.open("wb") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        _try_out(pipe, request)
    except UserError as error:
        pipe.send(Failed(str(error), usage=not isinstance(error, RunError)))
    except BrokenPipeError:  # nobody listens any more
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send(Failed(f"{type(error).__name__}: {error}".splitlines()[0]))


def _try_out(pipe: Connection, request: Request) -> None:
    from utils.data.cache import CachedImages
    from utils.report.console import Console, SilentConsole
    from utils.report.run_report import RunReport
    from utils.runtime import share_of_machine
    from utils.train.build import build_trial

    class TellsEpochs(RunReport):
        """Tells of epochs where others draw a bar."""

        def training_bar(self, epoch: int, batches: int, *, start: int = 0) -> AbstractContextManager:
            pipe.send(Begun(epoch + 1))
            return super().training_bar(epoch, batches, start=start)

    options = dict(request.options)
    options["device"], options["workers"] = share_of_machine(
        request.place, device=options["device"], workers=options["workers"]
    )
    console = Console(quiet=options["quiet"]) if request.speaks else SilentConsole()
    trainer = build_trial(options, request.hyp, console=console)
    trainer.report = TellsEpochs(trainer.run.path)

    def goes_on(epoch: int, metrics: Metrics) -> bool:
        pipe.send(_evaluated(epoch, metrics))
        return pipe.recv()

    images = (trainer.stream.images, trainer.evaluator.batches.images)
    network = {name: value for name, value in trainer.step.model.network.items() if name != "anchors"}
    weights = Path(options["weights"])
    work = {
        "the network": network,
        "the weights": blake2b(weights.read_bytes(), digest_size=8).hexdigest() if options["weights"] else "",
        "--batch-size": trainer.options.batch_size,
        "the classes": list(trainer.names),
        **{f"images or labels of '{split}'": digest for split, digest in trainer.data.items()},
    }
    pipe.send(Ready(work=work, caches=tuple(one.path for one in images if isinstance(one, CachedImages))))
    metrics = trainer.try_out(request.rungs, goes_on)
    if metrics is not None:
        pipe.send(_evaluated(trainer.state.epoch, metrics, last=True))


def _evaluated(epoch: int, metrics: Metrics, *, last: bool = False) -> Evaluated:
    results = {
        "precision": metrics.precision,
        "recall": metrics.recall,
        "mAP_0.5": metrics.map50,
        "mAP_0.5:0.95": metrics.map50_95,
    }
    if (losses := metrics.losses) is not None:
        results |= {
            "val/box_loss": losses.box,
            "val/obj_loss": losses.objectness,
            "val/cls_loss": losses.classification,
        }
    return Evaluated(epoch=epoch, fitness=metrics.fitness, results=results, last=last)
