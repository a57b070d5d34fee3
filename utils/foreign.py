"""Published YOLOv5 weights, v5 to v7, as an inference checkpoint of ours.

Such a file holds whole modules of classes that are not here. They arrive as Records (`plain_pickle`), of which the
tensors, the network's YAML and the class names are taken. The surprise: what classes they were of counts, too. Another
activation than ours would have the same weights, and find something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.archive import Archive
from utils.hyp import Hyperparameters, plain_values
from utils.plain_pickle import Record, shown
from utils.structures import UserError

_NETWORKS = {"Model", "DetectionModel"}
_BLOCKS = {"Conv", "Bottleneck", "C3", "SPP", "SPPF", "Focus", "Concat", "Detect"}
_TORCH = {"Sequential", "ModuleList", "Conv2d", "BatchNorm2d", "SiLU", "MaxPool2d", "Upsample"}
_IGNORED = "anchor_grid"  # a buffer of v5: the anchors once more, in pixels
_BATCH_NORM_EPS = 1e-3
_IMGSZ = 640  # px; what published weights were trained on, unless the file says otherwise


def is_foreign(archive: Archive) -> bool:
    """Whether the file holds modules, as those of YOLOv5 do."""
    return isinstance(archive.content, dict) and any(
        isinstance(archive.content.get(key), Record) for key in ("ema", "model")
    )


def inference_checkpoint(archive: Archive, path: Path) -> dict[str, Any]:
    """As `checkpoint.for_inference` makes them, with the weights as the file has them. Raises UserError.

    The data set is none: what such a file says of it helps nobody else.
    """
    try:
        return _converted(archive.content)
    except UserError as error:
        raise UserError(f"{path}: {shown(str(error))}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no weights of YOLOv5 v5 to v7 that this version knows ({error!r:.60})") from None


def _converted(content: dict[str, Any]) -> dict[str, Any]:
    module = content["ema"] if isinstance(content.get("ema"), Record) else content["model"]
    _check_classes(module)
    state = {name: tensor for name, tensor in _entries(module) if not name.endswith(_IGNORED)}
    (head,) = (name.removesuffix("anchors") for name in state if name.endswith(".anchors"))
    anchors = state[head + "anchors"].float()  # (L, A, 2) in units of the stride
    num_classes = len(state[head + "m.0.bias"]) // anchors.shape[1] - 5
    anchors_px = anchors * torch.as_tensor(module.state["stride"]).float().view(-1, 1, 1)
    options = content.get("opt") or {}
    return {
        "ema": state,
        "network": {**module.state["yaml"], "nc": num_classes, "anchors": anchors_px.flatten(1).tolist()},
        "names": _names(module.state.get("names"), num_classes),
        "options": {"data": "", "imgsz": _imgsz(options), "label_smoothing": 0.0, "single_cls": False},
        "hyp": plain_values(Hyperparameters()),
        "epoch": 0,
        "best_fitness": 0.0,
    }


def _imgsz(options: Any) -> int:
    given = options.get("imgsz") if isinstance(options, dict) else None
    return given if type(given) is int and given > 0 else _IMGSZ


def _names(given: Any, num_classes: int) -> list[str]:
    """In the order of their numbers; where the file has none, the numbers."""
    names = [given[number] for number in range(len(given))] if isinstance(given, (dict, list)) else []
    if not names:
        return [str(number) for number in range(num_classes)]
    if len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"its head tells {num_classes} classes apart, but it has {len(names)} names")
    return names


def _modules(module: Record, prefix: str = "") -> Iterator[tuple[str, Record]]:
    """A module and all below it, by the beginning of the names of their entries."""
    yield prefix, module
    for name, child in module.state["_modules"].items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.")


def _entries(module: Record) -> Iterator[tuple[str, Tensor]]:
    """What the state dict of the module would hold."""
    for prefix, part in _modules(module):
        for name, tensor in (part.state["_parameters"] | part.state["_buffers"]).items():
            if tensor is not None:
                yield prefix + name, _checked_tensor(prefix + name, tensor)


def _checked_tensor(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} is damaged: it is larger than what the file holds of it")
    return tensor


def _check_classes(network: Record) -> None:
    """Raise UserError for the first part of the network that this trainer does not build."""
    for prefix, module in _modules(network):
        kind = module.name.rpartition(".")[2]
        known = _TORCH if module.name.startswith("torch.") else _BLOCKS if prefix else _NETWORKS
        if kind not in known:
            raise UserError(f"holds {module.name}, which is not built here; detectors of YOLOv5 v5 to v7 are")
        if kind == "BatchNorm2d" and module.state["eps"] != _BATCH_NORM_EPS:
            raise UserError(f"{prefix}: batch norm of eps {module.state['eps']}, here it is {_BATCH_NORM_EPS}")
