"""Checkpoints: what a run is, in one file of tensors and plain values.

`last.pt` holds all that continues a run; `best.pt` the averaged weights alone, in fp16. Both load with torch's
`weights_only=True`, so opening a file runs nothing in it. `python -m utils.checkpoint PATH` tells what is in one.

The surprise: a thread writes the files of a run, from copies, while training goes on; `RunFolder.settle` waits for it.
"""

from __future__ import annotations

import errno
import io
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.yolo import DetectionModel
from utils import __version__
from utils.config import FlagParser, run_command
from utils.files import remove_unfinished, write_atomic
from utils.structures import RunError, UserError

SCHEMA = 2
METRICS_FILE = "metrics.json"
WEIGHTS_FOLDER = "weights"  # of a training run

Checkpoint = dict[str, Any]


class DamagedCheckpoint(UserError):
    """A file that is not what was once written."""


# ---- a run's folder -----------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """Where the files of a run lie."""

    path: Path
    saved: bool = False  # whether last.pt is of this run; with --exist-ok there may be that of an earlier one
    _background: _Background = field(default_factory=lambda: _Background(), repr=False)

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

    def save(self, checkpoint: Checkpoint, *, best: bool = False, final: bool = False, keep: bool = False) -> None:
        """Write last.pt and, where this is the best epoch so far, best.pt; `keep` writes epochN.pt, too.

        From a copy, by a thread; a failure is raised by the next call, or by `settle`. `final` says that none may
        follow. last.pt goes last: a run that dies in between repeats the epoch, and so never lacks the files it counts
        on.
        """
        content = snapshot(checkpoint)
        self._background.start(partial(self._write, content, for_inference(content) if best else None, keep=keep))

    def settle(self) -> None:
        """Return when everything is on disk. Raises what went wrong on the way."""
        self._background.wait()

    def take_over(self, source: Path | None = None) -> None:
        """Before the run begins, in a folder that may have seen an earlier one, or goes on from the checkpoint at
        `source`, last.pt or what it was before."""
        remove_unfinished(self.path)
        remove_unfinished(self.last.parent)
        if source is not None and source.name == self.previous.name:
            self.previous.replace(self.last)

    def tidy(self) -> None:
        """After the run: a finished one has no use for what last.pt was before."""
        self.settle()
        self.previous.unlink(missing_ok=True)

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

    def _write(self, content: Checkpoint, best: Checkpoint | None, *, keep: bool) -> None:
        self._check_there()
        self.last.parent.mkdir(exist_ok=True)
        if best is not None:
            save_checkpoint(self.best, best)
        if keep:
            save_checkpoint(self.last.with_name(f"epoch{content['epoch']}.pt"), content)
        if not self.saved:  # both would be of an earlier run
            self.previous.unlink(missing_ok=True)
        save_checkpoint(self.last, content, predecessor=self.previous if self.saved else None)
        self.saved = True


@dataclass
class LateRunFolder(RunFolder):
    """The folder of a run with `--nosave`: weights are written after the final epoch, or when a signal ends the run."""

    waiting: Checkpoint | None = field(default=None, repr=False)  # the best so far, as best.pt will hold them

    def save(self, checkpoint: Checkpoint, *, best: bool = False, final: bool = False, keep: bool = False) -> None:
        if best:
            self.waiting = for_inference(checkpoint)
        if final:
            self._background.start(partial(self._write, snapshot(checkpoint), self.waiting, keep=False))


class _Background:
    """One job at a time in a thread of its own, whose errors come back."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """When the job before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoints")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error


def predecessor_of(last: Path) -> Path:
    return last.with_name("previous.pt")


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` below `folder` that was written last. Raises UserError when there is none."""
    found = sorted(folder.glob(f"**/{WEIGHTS_FOLDER}/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: no last.pt below {folder}/; name the checkpoint to continue")
    return found[-1]


# ---- files --------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, predecessor: Path | None = None) -> None:
    """Replace `path` by the checkpoint, whole or not at all; see `write_atomic`. Raises OSError that names it."""
    content = {"schema": SCHEMA, "project": __version__, "torch": str(torch.__version__), **checkpoint}
    # torch ends the process where a file is closed below its writer, as an error from a signal handler would have it
    archive = io.BytesIO()
    torch.save({**content, "checksum": checksum(content)}, archive)
    _check_room(path, archive.getbuffer().nbytes)
    write_atomic(path, lambda file: file.write(archive.getbuffer()) and None, predecessor=predecessor)


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        needs, has = (f"{count / 2**20:.1f} MiB" for count in (size, free))
        raise OSError(errno.ENOSPC, f"No space left on device ({needs} are needed, {has} are free)", str(path))


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of this trainer, tensors on the CPU. Raises UserError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's thoughts on foreign formats; what follows says enough
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint not found: {path}; weights are never downloaded") from None
    except IsADirectoryError:
        raise UserError(f"checkpoint is a folder, expected a .pt file: {path}") from None
    except PermissionError:
        raise UserError(f"checkpoint cannot be read, permission denied: {path}") from None
    except Exception:  # an unpickler that is fed with noise raises anything
        raise UserError(f"checkpoint cannot be read: {path} is damaged or was not written by this trainer") from None
    if not isinstance(checkpoint, dict) or not {"schema", "ema", "network", "names"} <= checkpoint.keys():
        raise UserError(f"checkpoint was not written by this trainer: {path}")
    if checkpoint["schema"] != SCHEMA:
        raise UserError(f"checkpoint has format {checkpoint['schema']}, this version reads {SCHEMA}: {path}")
    return _verified(checkpoint, path)


def load_last(path: Path, warn: Callable[[str], object]) -> tuple[Checkpoint, Path]:
    """The checkpoint of a run to continue, and its file: where last.pt is damaged or lost, the one before it."""
    previous = predecessor_of(path)
    try:
        return load_checkpoint(path), path
    except UserError as error:
        if path.name != "last.pt" or not previous.exists():
            raise
        try:
            checkpoint = load_checkpoint(previous)
        except UserError:
            raise UserError(f"{error}; {previous}, which was saved before it, is damaged, too") from None
        warn(f"{error}; going on from {previous}, which was saved before it")
        return checkpoint, previous


def _verified(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Without its checksum, which is right."""
    stated = checkpoint.pop("checksum", None)
    try:
        intact = stated == checksum(checkpoint)
    except (RecursionError, TypeError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"checkpoint is damaged, its checksum is wrong: {path}")
    return checkpoint


def checksum(value: Any) -> str:
    """32 hexadecimal digits of tensors and plain values, with all that holds them together. Raises TypeError."""
    digest = blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)}\n".encode())
        for item in value.items() if isinstance(value, dict) else value:
            _feed(digest, item)
    elif value is None or type(value) in (bool, int, float, str):
        digest.update(f"{value!r}\n".encode())
    else:
        raise TypeError(f"{type(value).__name__} is no plain value")


def snapshot(value: Any) -> Any:
    """The same with tensors of its own, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(snapshot, value))
    return value


# ---- what is made of them -----------------------------------------------------------------------------------------


def for_inference(checkpoint: Checkpoint) -> Checkpoint:
    """What detection needs of a checkpoint: averaged weights in fp16, network, names; tensors of its own."""
    kept = ("network", "names", "options", "hyp", "epoch", "best_fitness")
    weights = {name: _half(tensor) for name, tensor in checkpoint["ema"].items()}
    return {"ema": weights, **{key: checkpoint[key] for key in kept}}


def _half(tensor: Tensor) -> Tensor:
    """fp16, unless a value is too large for it, as the variance of a wild channel may be."""
    if not tensor.is_floating_point():
        return tensor.clone()
    half = tensor.half()
    return half if half.isfinite().all() else tensor.clone()


def averaged_model(checkpoint: Checkpoint) -> DetectionModel:
    """The detector of a checkpoint: its averaged weights, in fp32 and eval mode."""
    model = DetectionModel(checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval().requires_grad_(False)


def transfer(model: DetectionModel, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Copy the weights that fit by name and shape into `model`; how many entries did, and how many there are.

    Anchors are left aside: they belong to the network that the model was built from, and to autoanchor.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".anchors")}
    fitting = {name: tensor for name, tensor in weights.items() if name in state and state[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(state)


# ---- python -m utils.checkpoint -----------------------------------------------------------------------------------


def described(path: Path) -> list[str]:
    """Lines on what a checkpoint holds. Raises UserError where it is none."""
    checkpoint = load_checkpoint(path)
    names, network, options = checkpoint["names"], checkpoint["network"], checkpoint["options"]
    trees = {name: checkpoint[name] for name in ("model", "ema", "optimizer") if name in checkpoint}
    rows = {
        "file": f"{path}, {path.stat().st_size / 2**20:.1f} MiB, checksum right",
        "written by": f"version {checkpoint['project']} of this trainer, torch {checkpoint['torch']}",
        "made on": checkpoint.get("made_on"),
        "network": f"{sum(map(torch.numel, _trained(checkpoint['ema']))):,} parameters, {len(network['backbone'])} + "
        f"{len(network['head'])} layers, depth {network['depth_multiple']}, width {network['width_multiple']}",
        "anchors": "; ".join(", ".join(f"{side:g}" for side in level) for level in network["anchors"]),
        "classes": f"{len(names)}: {', '.join(names)}",
        "epoch": _progress(checkpoint),
        "scores": f"best fitness {checkpoint['best_fitness']:.5f}" if checkpoint["best_fitness"] >= 0 else None,
        **{name: _size_of(tree) for name, tree in trees.items()},
        "digest": f"{checksum(checkpoint['ema'])} of the averaged weights",
        "hyp": _pairs(checkpoint["hyp"]),
        "options": _pairs(options),
    }
    return [f"{title:<11}{text}" for title, text in rows.items() if text]


def _trained(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Those that are parameters, and not what batch norms or the head remember."""
    return [tensor for name, tensor in weights.items() if name.rpartition(".")[2] in ("weight", "bias")]


def _progress(checkpoint: Checkpoint) -> str:
    of = checkpoint["options"]["epochs"]
    within = f" and {checkpoint['batch']} batches of the next" if checkpoint.get("batch") else ""
    best = f", the best is {checkpoint['best_epoch'] + 1}" if checkpoint.get("best_epoch", -1) >= 0 else ""
    return f"{checkpoint['epoch']} of {of} done{within}{best}"


def _size_of(tree: Any) -> str:
    tensors = list(_tensors(tree))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    return f"{len(tensors)} tensors, {size / 2**20:.1f} MiB, {kinds}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value not in (None, "", False, (), []))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m utils.checkpoint PATH [PATH ...]`."""
    parser = FlagParser(prog="utils.checkpoint", description="tell what is in checkpoints", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a .pt file")

    def tell() -> None:
        for path in parser.parse_args(argv).paths:
            print("\n".join(described(path)))

    return run_command("utils.checkpoint", tell)


if __name__ == "__main__":
    sys.exit(main())
