"""Files like those of the published YOLOv5, without it: our networks in modules whose classes go by its names."""

from __future__ import annotations

import copy
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.yolo import DetectionModel

V5 = {  # a network of v5: Focus at its start, SPP before its last C3
    "nc": 2,
    "depth_multiple": 0.33,
    "width_multiple": 0.125,
    "anchors": [[10, 13, 33, 23], [30, 61, 59, 119]],
    "backbone": [
        [-1, 1, "Focus", [64, 3]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C3", [128]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 1, "SPP", [256, [5, 9, 13]]],
        [-1, 3, "C3", [256, False]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 1, "C3", [128, False]],
        [[8, 5], 1, "Detect", ["nc", "anchors"]],
    ],
}


def learned(network: dict[str, Any], seed: int = 0) -> DetectionModel:
    """A network in eval mode whose batch norms do something and which finds much; values that fp16 can hold."""
    model = DetectionModel(network, seed=seed).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.8, 1.5, generator=generator)
            module.bias.uniform_(-0.5, 0.5, generator=generator)
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    for conv in model.model[-1].m:
        conv.bias.uniform_(-1, 1, generator=generator)
    return model.half().float()


def publish(
    path: Path,
    model: DetectionModel,
    *,
    names: Any = None,
    yaml: Any = None,
    package: str = "models",
    key: str = "model",
    more: dict[str, Any] | None = None,
    change: Callable[[Any], object] | None = None,
) -> Path:
    """Write `model` as a published file of fp16 weights. `change` may do something to the network's object first."""
    classes: dict[str, type] = {}
    network = _object(classes, "yolov5.models.yolo", "DetectionModel", vars(nn.Module()))
    network.model = nn.Sequential(*(_published(classes, layer) for layer in copy.deepcopy(model).model))
    network.yaml = yaml or {**model.network, "ch": 3}
    network.names = names
    network.stride = torch.tensor([float(stride) for stride in model.head.strides])
    network.nc = model.head.num_classes
    network.half()
    if change:
        change(network)
    content = {"epoch": -1, "best_fitness": None, "model": None, "ema": None, "optimizer": None}
    with _importable(classes):
        torch.save(content | {key: network} | (more or {}), path)
    return _renamed(path, package)


def _published(classes: dict[str, type], module: nn.Module) -> nn.Module:
    kind = type(module).__name__
    if type(module).__module__ == "models.layers":
        place = "yolov5.models.yolo" if kind == "Detect" else "yolov5.models.common"
        module = _object(classes, place, kind, vars(module))
    module._modules = {name: _published(classes, child) for name, child in module._modules.items()}
    return module


def _object(classes: dict[str, type], module: str, name: str, attributes: dict[str, Any]) -> Any:
    """An object of a class of that name, with those attributes."""
    kind = classes.setdefault(name, type(name, (nn.Module,), {"__module__": module}))
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


@contextmanager
def _importable(classes: dict[str, type]) -> Iterator[None]:
    """Pickle looks whether a class is where it says it is."""
    places = {"yolov5", "yolov5.models", *(one.__module__ for one in classes.values())}
    modules = {name: types.ModuleType(name) for name in places}
    for one in classes.values():
        setattr(modules[one.__module__], one.__name__, one)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _renamed(path: Path, package: str) -> Path:
    """With the classes of that package: `models` in files of the repository, `yolov5.models` in those of pip."""
    with zipfile.ZipFile(path) as zipped:
        parts = {info.filename: zipped.read(info) for info in zipped.infolist()}
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in parts.items():
            zipped.writestr(name, content.replace(b"cyolov5.models.", f"c{package}.".encode()))
    return path
