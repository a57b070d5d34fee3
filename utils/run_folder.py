"""The folder of a training run: its checkpoints, when they are written, and which one a run goes on from.

The surprise: a thread writes them, from copies, while training goes on; `RunFolder.settle` waits for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from utils.archive import DamagedFile
from utils.checkpoint import Checkpoint, for_inference, load_checkpoint, save_checkpoint, snapshot
from utils.files import locked, remove_unfinished
from utils.structures import RunError, UserError

METRICS_FILE = "metrics.json"
WEIGHTS_FOLDER = "weights"  # of a training run
_PATIENCE_S = 3.0  # with a run that is just about to end

_held: dict[Path, int] = {}  # the folders that this process keeps others away from, each with what `locked` gave


class _Background:
    """One job at a time in a thread of its own, whose errors come back."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """When the job before is done. If something went wrong with that, this one is done here, and may raise."""
        self.join()
        if self._error is not None:
            self._error = None
            job()
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoints")
        self._thread.start()

    def wait(self) -> None:
        """Raises what went wrong, once."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error


@dataclass
class RunFolder:
    """Where the files of a run lie."""

    path: Path
    saved: bool = False  # whether there is a last.pt
    _background: _Background = field(default_factory=_Background, repr=False)

    @property
    def last(self) -> Path:
        return self.path / WEIGHTS_FOLDER / "last.pt"

    @property
    def previous(self) -> Path:
        """What last.pt was before, while the run is under way."""
        return predecessor_of(self.last)

    @property
    def best(self) -> Path:
        return self.path / WEIGHTS_FOLDER / "best.pt"

    @property
    def finished(self) -> bool:
        """Whether the final evaluation is done, too."""
        return (self.path / METRICS_FILE).exists()

    def save(
        self,
        checkpoint: Checkpoint,
        *,
        best: bool = False,
        final: bool = False,
        keep: bool = False,
        last: bool = True,
    ) -> bool:
        """Write last.pt unless told not to and, where this is the best epoch so far, best.pt; `keep`: epochN.pt, too.

        Whether last.pt is written.

        From a copy, by a thread. After a failure the next call does it here, and raises what `settle` would. `final`
        says that none may follow. last.pt goes last: a run that dies in between repeats the epoch, and so never lacks
        the files it counts on.
        """
        if best or keep or last:
            content = snapshot(checkpoint)
            inference = for_inference(content) if best else None
            self._background.start(partial(self._write, content, inference, keep=keep, last=last))
        return last

    def pause(self) -> None:
        """Return when nothing is being written."""
        self._background.join()

    def settle(self) -> None:
        """Return when everything is on disk. Raises what went wrong on the way."""
        self._background.wait()

    def hold(self) -> None:
        """Keep other processes away until `let_go`, or the end of this one. Raises UserError where one is at work."""
        folder = self.path.resolve()
        if folder not in _held:
            handle = locked(folder, patience_s=_PATIENCE_S)
            if handle is None:
                raise UserError(f"{self.path}: another process is training in this folder; wait for it, or stop it")
            _held[folder] = handle

    def let_go(self) -> None:
        handle = _held.pop(self.path.resolve(), None)
        if handle is not None:
            os.close(handle)

    def take_over(self, source: Path | None = None) -> None:
        """Before the run goes on from the checkpoint at `source`, last.pt or what it was before.

        Or before it begins, in a folder that may hold checkpoints of an earlier one, to go on from by mistake.
        """
        remove_unfinished(self.path)
        remove_unfinished(self.last.parent)
        if source is None:
            for path in (self.last, self.previous, self.best):
                path.unlink(missing_ok=True)
        elif source.name == self.previous.name:
            self.previous.replace(self.last)

    def tidy(self) -> None:
        """After the run: a finished one has no use for what last.pt was before."""
        self.settle()
        self.previous.unlink(missing_ok=True)

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` make a file of the run besides its checkpoints."""
        write(self.path / name)

    @contextmanager
    def removal_named(self) -> Iterator[None]:
        """What goes wrong with files while the folder is no longer there, goes wrong for that."""
        try:
            yield
        except (OSError, UserError):
            self._check_there()
            raise

    def _check_there(self) -> None:
        if not self.path.is_dir():
            raise RunError(f"the folder of this run has been removed, so nothing can be saved: {self.path}")

    def _write(self, content: Checkpoint, best: Checkpoint | None, *, keep: bool, last: bool) -> None:
        self._check_there()
        self.last.parent.mkdir(exist_ok=True)
        if best is not None:
            save_checkpoint(self.best, best)
        if keep:
            save_checkpoint(self.last.with_name(f"epoch{content['epoch']}.pt"), content)
        if last:
            save_checkpoint(self.last, content, predecessor=self.previous)
            self.saved = True


@dataclass
class LateRunFolder(RunFolder):
    """The folder of a run with `--nosave`: weights are written after the final epoch, or when a signal ends the run."""

    waiting: Checkpoint | None = field(default=None, repr=False)  # the best so far, as best.pt will hold them

    def save(self, checkpoint: Checkpoint, *, best: bool = False, final: bool = False, **_: bool) -> bool:
        if best:
            self.waiting = snapshot(for_inference(checkpoint))
        if final:
            self._background.start(partial(self._write, snapshot(checkpoint), self.waiting, keep=False, last=True))
        return final


@dataclass
class FollowedRunFolder(RunFolder):
    """The folder of a run as all ranks but the first have it: they write nothing. It may not even be there."""

    def save(self, checkpoint: Checkpoint, *, last: bool = True, **_: bool) -> bool:
        self.saved = self.saved or last
        return last

    def hold(self) -> None:
        pass

    def take_over(self, source: Path | None = None) -> None:
        pass

    def tidy(self) -> None:
        pass

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def _check_there(self) -> None:
        pass


def predecessor_of(last: Path) -> Path:
    return last.with_name("previous.pt")


def load_last(path: Path, warn: Callable[[str], object]) -> tuple[Checkpoint, Path]:
    """The checkpoint of a run to continue, and its file: where last.pt is damaged or lost, the one before it."""
    previous = predecessor_of(path)
    try:
        return load_checkpoint(path), path
    except DamagedFile as error:
        if path.name != "last.pt" or not previous.exists():
            raise
        damage = error
    try:
        checkpoint = load_checkpoint(previous)
    except DamagedFile:
        raise UserError(f"{damage}; {previous}, which was saved before it, is damaged, too") from None
    warn(f"{damage}; going on from {previous}, which was saved before it")
    return checkpoint, previous


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` below `folder` that was written last. Raises UserError when there is none."""
    names = ("last.pt", "previous.pt")  # where there are no hard links, there may be the second alone
    written = [path for name in names for path in folder.glob(f"**/{WEIGHTS_FOLDER}/{name}")]
    found = [path.with_name(names[0]) for path in sorted(written, key=lambda path: path.stat().st_mtime)]
    if not found:
        raise UserError(f"--resume: no last.pt below {folder}/; name the checkpoint to continue")
    return found[-1]
