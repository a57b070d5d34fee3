"""Checkpoints: what a run is, in one file of tensors and plain values.

`last.pt` holds all that continues a run; `best.pt` the averaged weights alone, in fp16. Both load with torch's
`weights_only=True`, too. `python -m utils.checkpoint PATH` tells what is in one.
"""

from __future__ import annotations

import errno
import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.yolo import DetectionModel, entry_shapes
from utils import __version__
from utils.archive import Archive, DamagedFile, read_archive
from utils.config import LARGEST_IMGSZ, FlagParser, run_command
from utils.files import write_atomic
from utils.foreign import inference_checkpoint, is_foreign
from utils.plain_pickle import shown
from utils.structures import UserError

SCHEMA = 2

Checkpoint = dict[str, Any]

_INFERENCE = {"ema": dict, "network": dict, "names": list, "options": dict, "hyp": dict}  # what detection relies on
_INFERENCE_OPTIONS = {"data": str, "imgsz": int, "label_smoothing": float}
_LONGEST_LINE = 10_000  # characters, of those that describe a file


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
        written = shown(str(checkpoint["schema"]))
        raise UserError(f"checkpoint has format {written}, this version reads {SCHEMA}: {path}")
    if sum(tensor.nbytes for tensor in _tensors(checkpoint)) > archive.size:
        raise UserError(f"checkpoint cannot be used: {path}: its tensors are more than the file")
    content = {key: value for key, value in checkpoint.items() if key != "checksum"}
    if not _is_intact(content, checkpoint.get("checksum")):
        raise DamagedFile(f"checkpoint is damaged, its checksum is wrong: {path}")
    return content


def _is_intact(content: Checkpoint, stated: Any) -> bool:
    try:
        return stated == checksum(content)
    except TypeError:  # of what is no plain value
        return False


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


# ---- content ------------------------------------------------------------------------------------------------------


def checksum(value: Any) -> str:
    """32 hexadecimal digits of tensors and plain values, with all that holds them together. Raises TypeError."""
    digest = blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def weights_digest(checkpoint: Mapping[str, Any]) -> str:
    """The checksum of what a checkpoint holds of trained and averaged weights."""
    return checksum({name: checkpoint[name] for name in ("model", "ema") if name in checkpoint})


def _feed(digest: blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        kind = next(kind.__name__ for kind in (dict, list, tuple) if isinstance(value, kind))
        digest.update(f"{kind} {len(value)}\n".encode())
        for item in value.items() if kind == "dict" else value:
            _feed(digest, item)
    elif value is None or type(value) in (bool, int, float, str):
        digest.update(f"{value!r}\n".encode())
    else:
        raise TypeError(f"{type(value).__name__} is no plain value")


def snapshot(value: Any) -> Any:
    """The same with tensors of its own, on the CPU.

    Equal texts become one, so that equal content makes equal files, wherever it was loaded from.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {snapshot(key): snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(snapshot, value))
    return sys.intern(value) if type(value) is str else value


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


# ---- python -m utils.checkpoint -----------------------------------------------------------------------------------


def described(path: Path) -> list[str]:
    """Lines on what a checkpoint holds, of ours or of published YOLOv5. Raises UserError where it is none."""
    checkpoint = load_weights(path)
    names, network, ours = checkpoint["names"], checkpoint["network"], "schema" in checkpoint
    trees = {name: checkpoint[name] for name in ("model", "ema", "optimizer") if name in checkpoint}
    writer = f"version {checkpoint['project']} of this trainer, torch {checkpoint['torch']}" if ours else "YOLOv5"
    rows = {
        "file": f"{path}, {path.stat().st_size / 2**20:.1f} MiB{', checksum right' * ours}",
        "written by": writer,
        "made on": checkpoint.get("made_on"),
        "network": f"{sum(map(torch.numel, _trained(checkpoint['ema']))):,} parameters, {len(network['backbone'])} + "
        f"{len(network['head'])} layers, depth {network['depth_multiple']}, width {network['width_multiple']}",
        "anchors": "; ".join(", ".join(f"{side:g}" for side in level) for level in network["anchors"]),
        "classes": f"{len(names)}: {', '.join(names)}",
        "epoch": _progress(checkpoint) if ours else None,
        "scores": f"best fitness {checkpoint['best_fitness']:.5f}" if checkpoint["best_fitness"] >= 0 else None,
        **{name: _size_of(tree) for name, tree in trees.items()},
        "digest": f"{weights_digest(checkpoint)} of the weights",
        "hyp": _pairs(checkpoint["hyp"]) if ours else None,
        "options": _pairs(checkpoint["options"]) if ours else None,
    }
    return [shown(f"{title:<11}{text}", most=_LONGEST_LINE) for title, text in rows.items() if text]


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
            print("\n".join(described(path)), end="\n\n")

    return run_command("utils.checkpoint", tell)


if __name__ == "__main__":
    sys.exit(main())
