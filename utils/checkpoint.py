"""Checkpoints: what a run is, in one file of tensors and plain values.

`last.pt` holds all that continues a run; `best.pt` the averaged weights alone, in fp16. Both load with torch's
`weights_only=True`, so opening a file runs nothing in it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.yolo import DetectionModel, entry_shapes
from utils.archive import Archive, read_archive
from utils.config import LARGEST_IMGSZ
from utils.files import write_atomic
from utils.foreign import inference_checkpoint, is_foreign
from utils.plain_pickle import shown
from utils.structures import UserError

SCHEMA = 1
METRICS_FILE = "metrics.json"
WEIGHTS_FOLDER = "weights"  # of a training run

Checkpoint = dict[str, Any]

_INFERENCE = {"ema": dict, "network": dict, "names": list, "options": dict, "hyp": dict}  # what detection relies on
_INFERENCE_OPTIONS = {"data": str, "imgsz": int, "label_smoothing": float}


@dataclass
class RunFolder:
    """Where the files of a run lie."""

    path: Path
    saved: bool = False  # whether last.pt is of this run; with --exist-ok there may be that of an earlier one

    @property
    def last(self) -> Path:
        return self.path / WEIGHTS_FOLDER / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / WEIGHTS_FOLDER / "best.pt"

    @property
    def finished(self) -> bool:
        """Whether the final evaluation is done, too."""
        return (self.path / METRICS_FILE).exists()

    def save(self, checkpoint: Checkpoint, *, best: bool, final: bool = False, keep: bool = False) -> None:
        """Write last.pt and, where this is the best epoch so far, best.pt; `keep` writes epochN.pt, too.

        last.pt goes last: a run that dies in between repeats the epoch, and so never lacks the files it counts on.
        `final` says that no other epoch follows.
        """
        self.last.parent.mkdir(exist_ok=True)
        if best:
            save_checkpoint(self.best, for_inference(checkpoint))
        if keep:
            save_checkpoint(self.last.with_name(f"epoch{checkpoint['epoch']}.pt"), checkpoint)
        save_checkpoint(self.last, checkpoint)
        self.saved = True


@dataclass
class LateRunFolder(RunFolder):
    """The folder of a run with `--nosave`: weights are written after the final epoch."""

    waiting: Checkpoint | None = field(default=None, repr=False)  # the best so far, as best.pt will hold them

    def save(self, checkpoint: Checkpoint, *, best: bool, final: bool = False, keep: bool = False) -> None:
        if best:
            self.waiting = for_inference(checkpoint)
        if not final:
            return
        self.last.parent.mkdir(exist_ok=True)
        if self.waiting is not None:
            save_checkpoint(self.best, self.waiting)
        save_checkpoint(self.last, checkpoint)
        self.saved = True


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace `path` by the checkpoint, whole or not at all. Raises OSError that names it."""
    # torch ends the process where a file is closed below its writer, as an error from a signal handler would have it
    archive = io.BytesIO()
    torch.save({"schema": SCHEMA, **checkpoint}, archive)
    write_atomic(path, lambda file: file.write(archive.getbuffer()) and None)


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


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of this trainer, tensors on the CPU. Raises UserError for anything else."""
    return _own_checkpoint(read_archive(path), path)


def load_weights(path: Path) -> Checkpoint:
    """What training may start from, or detection use: at least what `for_inference` keeps, ours or of published YOLOv5.

    The weights are those of its network, entry by entry. Raises UserError for anything else.
    """
    archive = read_archive(path)
    weights = inference_checkpoint(archive, path) if is_foreign(archive) else _own_checkpoint(archive, path)
    try:
        _check_inference(weights, archive.size)
    except UserError as error:
        raise UserError(f"checkpoint cannot be used: {path}: {shown(str(error))}") from None
    return weights


def _own_checkpoint(archive: Archive, path: Path) -> Checkpoint:
    checkpoint = archive.content
    if is_foreign(archive):
        raise UserError(f"{path} holds weights of YOLOv5 and no run of this trainer; start anew with --weights {path}")
    if archive.names:
        raise UserError(f"checkpoint was not written by this trainer: {path} holds {archive.names[0]}")
    if not isinstance(checkpoint, dict) or not {"schema", "ema", "network", "names"} <= checkpoint.keys():
        raise UserError(f"checkpoint was not written by this trainer: {path}")
    if checkpoint["schema"] != SCHEMA:
        raise UserError(f"checkpoint has format {checkpoint['schema']}, this version reads {SCHEMA}: {path}")
    return checkpoint


def _check_inference(weights: Checkpoint, size: int) -> None:
    """Raise UserError unless weights, network and names belong together and, unfolded, fit into `size` bytes."""
    for key, kind in _INFERENCE.items():
        if not isinstance(weights.get(key), kind):
            raise UserError(f"it lacks `{key}`")
    state, network, names, options = (weights[key] for key in ("ema", "network", "names", "options"))
    for key, kind in _INFERENCE_OPTIONS.items():
        if type(options.get(key)) is not kind:
            raise UserError(f"it lacks the option `{key}`")
    if not 0 < options["imgsz"] <= LARGEST_IMGSZ:
        raise UserError(f"its image size is {options['imgsz']}")
    shapes = entry_shapes(network)
    for name, shape in shapes.items():
        if not isinstance(state.get(name), Tensor) or state[name].shape != shape:
            raise UserError(f"its weights are not those of its network: {name} should have the shape {list(shape)}")
    if extra := sorted(map(str, state.keys() - shapes.keys())):
        raise UserError(f"its weights are not those of its network, which has no {extra[0]}")
    if sum(tensor.nbytes for tensor in state.values()) > size:
        raise UserError("its weights are more than the file")
    if len(names) != network["nc"] or not all(isinstance(name, str) for name in names):
        raise UserError(f"it should have {network['nc']} names of classes")


def averaged_model(checkpoint: Checkpoint) -> DetectionModel:
    """The detector of a checkpoint: its averaged weights, in fp32 and eval mode."""
    model = DetectionModel(checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval().requires_grad_(False)


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` below `folder` that was written last. Raises UserError when there is none."""
    found = sorted(folder.glob("**/weights/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: no last.pt below {folder}/; name the checkpoint to continue")
    return found[-1]
