"""Network YAML -> DetectionModel, and raw logits -> boxes.

The surprise: a network is planned before it is built. `_plan` knows channels and stride of every layer and finds every
mistake without touching a weight; building only calls what the plan says.

    python -m models.yolo --cfg yolov5s.yaml
"""

from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from models.layers import BLOCKS, Concat, Conv, Detect
from utils.files import read_yaml
from utils.structures import HeadSpec, UserError

if TYPE_CHECKING:
    from utils.evaluate.detector import Detector

NETWORK_FOLDER = Path(__file__).parent


class DetectionModel(nn.Module):
    """The network that a YAML describes, ending in a Detect head.

    `network` comes from `read_network` or from another model's `.network`; `num_classes` and `anchors` (L, A, 2) px
    replace its own. The weights depend on `seed` alone, and the global random state is left as it was. Raises UserError
    where the network makes no sense.
    """

    def __init__(
        self, network: dict[str, Any], *, num_classes: int | None = None, anchors: Tensor | None = None, seed: int = 0
    ):
        super().__init__()
        network = dict(network)
        if num_classes is not None:
            network["nc"] = num_classes
        if anchors is not None:
            network["anchors"] = _anchor_rows(anchors)
        plan = _plan(network, where="network")
        self._network = copy.deepcopy({key: network[key] for key in _KEYS})
        self._sources = tuple(layer.sources for layer in plan)
        self._reused = {source for index, layer in enumerate(plan) for source in layer.sources if source != index - 1}
        self._strides = tuple(layer.maps.stride for layer in plan)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
            self.model = nn.ModuleList(layer.build() for layer in plan)
        self._frozen: tuple[int, ...] = ()

    def freeze(self, layers: Sequence[int]) -> None:
        """What `--freeze` says: one number N stands for the first N layers, several for themselves.

        Their parameters ask for no gradient, and their batch norms keep their statistics in training. Raises UserError
        for a layer that is not there, and where nothing would be left to learn.
        """
        total = len(self.model)
        there = f"this network has {total} layers, 0 to {total - 1}"
        if len(layers) == 1 and layers[0] > total:
            raise UserError(f"--freeze {layers[0]}: {there}")
        frozen = range(layers[0]) if len(layers) == 1 else sorted(set(layers))
        for layer in frozen:
            if layer >= total:
                raise UserError(f"--freeze {' '.join(map(str, layers))}: there is no layer {layer}, {there}")
            self.model[layer].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"--freeze {' '.join(map(str, layers))}: nothing would be left to learn, {there}")
        self._frozen = tuple(frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> DetectionModel:
        super().train(mode)
        for layer in self._frozen:
            self.model[layer].eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) RGB 0..1 -> L views (B, A, H / stride, W / stride, 5 + C) of raw logits x y w h obj classes.

        H and W must be multiples of the largest stride.
        """
        maps, kept = images, {}
        for index, (layer, sources) in enumerate(zip(self.model, self._sources)):
            maps = layer(*[maps if source == index - 1 else kept[source] for source in sources])
            if index in self._reused:
                kept[index] = maps
        return maps

    @property
    def network(self) -> dict[str, Any]:
        """What builds this network again: the YAML with the classes and anchors in use, as plain Python values."""
        return {**copy.deepcopy(self._network), "anchors": _anchor_rows(self._detect.anchors_px)}

    @property
    def head(self) -> HeadSpec:
        detect = self._detect
        return HeadSpec(strides=detect.strides, anchors=detect.anchors_px, num_classes=detect.num_classes)

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Replace the anchors by (L, A, 2) others in pixels, levels in the order of ascending strides."""
        self._detect.set_anchors(anchors_px)

    @property
    def _detect(self) -> Detect:
        return self.model[-1]


def decode(raw: list[Tensor], head: HeadSpec) -> Tensor:
    """Raw logits of L levels (B, A, h, w, 5 + C) -> (B, sum of A * h * w, 4 + 1 + C), float32 or wider.

    Columns: x1 y1 x2 y2 in pixels of the network input, objectness, class probabilities. Rows: level, anchor, y, x.
    Where a logit of a row is not finite, its objectness is NaN: the probability of an infinite one would look sound.
    """
    levels = [_decode_level(*level) for level in zip(raw, head.strides, head.anchors)]
    return torch.cat(levels, 1)


def _decode_level(logits: Tensor, stride: int, anchors: Tensor) -> Tensor:
    """(B, A, h, w, 5 + C) -> (B, A * h * w, 5 + C)."""
    _, A, h, w, _ = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sigmoid = logits.sigmoid()
    rows = torch.arange(h, device=sigmoid.device, dtype=sigmoid.dtype)
    columns = torch.arange(w, device=sigmoid.device, dtype=sigmoid.dtype)
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2) x and y
    centre = (2 * sigmoid[..., :2] - 0.5 + cells) * stride
    half = (2 * sigmoid[..., 2:4]).square() * (anchors.to(sigmoid) / 2).view(A, 1, 1, 2)
    objectness = sigmoid[..., 4:5] + 0 * logits.sum(-1, keepdim=True)
    return torch.cat((centre - half, centre + half, objectness, sigmoid[..., 5:]), -1).flatten(1, 3)


def fused(model: DetectionModel) -> DetectionModel:
    """A copy for inference, in eval mode, whose batch norms are folded into the convolutions before them."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv):
            module.fold()
    return model


def entry_shapes(network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a network's state dict, without its weights. Raises as DetectionModel does."""
    *layers, head = plan = _plan(network, where="network")
    with torch.device("meta"):  # but for the head, whose arithmetic would have torch import its compiler
        built = nn.ModuleDict({"model": nn.ModuleList(layer.build() for layer in layers)})
    anchors = torch.tensor(network["anchors"]).unflatten(1, (-1, 2))  # (L, A, 2)
    outputs = anchors.shape[1] * (5 + network["nc"])
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    shapes[f"model.{len(layers)}.anchors"] = tuple(anchors.shape)
    for level, source in enumerate(head.sources):
        name = f"model.{len(layers)}.m.{level}"
        shapes |= {f"{name}.weight": (outputs, plan[source].maps.channels, 1, 1), f"{name}.bias": (outputs,)}
    return shapes


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_layers(model: nn.Module) -> int:
    """Modules that hold no other module."""
    return sum(next(module.children(), None) is None for module in model.modules())


def gflops(model: DetectionModel | dict[str, Any], imgsz: int = 640) -> float:
    """1e9 floating-point operations for one square image: 2 x multiply-adds of the convolutions, by arithmetic."""
    if isinstance(model, dict):
        with torch.device("meta"):
            model = DetectionModel(model)
    *layers, detect = model.model
    placed = [*zip(layers, model._strides), *zip(detect.m, detect.strides)]
    multiply_adds = sum(
        module.weight.numel() * math.ceil(imgsz / stride) ** 2
        for layer, stride in placed
        for module in layer.modules()
        if isinstance(module, nn.Conv2d)
    )
    return 2e-9 * multiply_adds


def read_network(name_or_path: str) -> dict[str, Any]:
    """The network YAML as plain values, found sound. A bare name is looked up beside this file, else it is a path.

    Raises UserError that names file and row.
    """
    path = NETWORK_FOLDER / name_or_path
    if Path(name_or_path).name != name_or_path or not path.is_file():
        path = Path(name_or_path)
    network = read_yaml(path, what="network YAML")
    _plan(network, where=str(path))
    return network


def load(path: str | Path, device: str = "", imgsz: int | None = None) -> Detector:
    """The detector of a checkpoint: `load("best.pt").detect("photo.jpg")`; see `Detector.detect`.

    `device` is cpu, 0 (the first GPU) or mps, by itself the best there is; `imgsz` the network input size in px, by
    itself that of the training run. Raises UserError where one of them cannot be used.
    """
    from utils.evaluate.detector import load_detector  # the one way upwards, for the sake of a short name

    return load_detector(path, device=device, imgsz=imgsz)


class _Maps(NamedTuple):
    """What flows between layers: (B, channels, H / stride, W / stride)."""

    channels: int
    stride: int


class _Row(NamedTuple):
    """One row of a network, its fields checked: what it reads, how often, which block, and the block's arguments."""

    inputs: list[_Maps]
    number: int
    block: type[nn.Module]
    args: list[Any]


class _Layer(NamedTuple):
    sources: tuple[int, ...]  # layers whose outputs are read; -1 is the image
    build: Callable[[], nn.Module]
    maps: _Maps  # the output
    number: int = 1  # of blocks


_LARGEST = 100_000  # of any number in a network; keeps products finite
_MOST_BLOCKS = 10_000  # of a network
_IMAGE = _Maps(channels=3, stride=1)
_FROM_NETWORK = ("in_channels", "number")  # parameters of blocks that a row's args do not set
_KEYS = ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head")


def _plan(network: dict[str, Any], *, where: str) -> list[_Layer]:
    """Every row resolved. Raises UserError that begins with `where` and names the row."""
    try:
        _check_values(network)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    layers: list[_Layer] = []
    blocks = 0
    rows = [(part, row) for part in ("backbone", "head") for row in network[part]]
    for index, (part, row) in enumerate(rows):
        try:
            layers.append(_plan_row(row, layers, network))
            if (row[2] == "Detect") != (index == len(rows) - 1):
                raise UserError("Detect must be the last row, and the last row must be Detect")
            blocks += layers[-1].number
            if blocks > _MOST_BLOCKS:
                raise UserError(f"these are more than {_MOST_BLOCKS:,} blocks")
        except UserError as error:
            raise UserError(f"{where}: {part} row of layer {index}: {error}") from None
    return layers


def _check_values(network: dict[str, Any]) -> None:
    for key in network:
        if key not in (*_KEYS, "ch"):  # published checkpoints write down `ch`, the image's channels
            raise UserError(f"unknown key `{key}`{_nearest(key, _KEYS)}")
    for key in _KEYS:
        if key not in network:
            raise UserError(f"`{key}` is missing")
        wanted, holds = _VALUES[key]
        if not holds(network[key]):
            raise UserError(f"`{key}` must be {wanted}, got {network[key]!r:.60}")
    if network.get("ch", 3) != 3:
        raise UserError(f"`ch` must be 3, images are RGB; got {network['ch']!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST  # a bool is an int too, and no count


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _LARGEST


def _are_anchors(levels: Any) -> bool:
    return (
        _are_rows(levels)
        and all(_are_rows(level) and len(level) % 2 == 0 and all(map(_is_size, level)) for level in levels)
        and len({len(level) for level in levels}) == 1
    )


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "nc": (f"a whole number of classes, 1 to {_LARGEST}", _is_count),
    "depth_multiple": (f"a number above 0, at most {_LARGEST}", _is_size),
    "width_multiple": (f"a number above 0, at most {_LARGEST}", _is_size),
    "anchors": ("one list per level of equally many pairs of pixels above 0", _are_anchors),
    "backbone": ("a list of rows [from, number, module, args]", _are_rows),
    "head": ("a list of rows [from, number, module, args]", _are_rows),
}


def _plan_row(row: Any, layers: list[_Layer], network: dict[str, Any]) -> _Layer:
    if not isinstance(row, list) or len(row) != 4:
        raise UserError(f"a row is [from, number, module, args], got {row!r}")
    source, number, name, args = row
    if not isinstance(name, str) or name not in BLOCKS:
        raise UserError(f"unknown module {name!r}{_nearest(name, BLOCKS)}")
    if not _is_count(number):
        raise UserError(f"number must be a whole number, 1 to {_LARGEST}, got {number!r}")
    if number > 1 and name in _PLANNERS:
        raise UserError(f"{name} cannot be repeated, number must be 1, got {number}")
    if not isinstance(args, list):
        raise UserError(f"args must be a list, got {args!r}")
    sources = _sources(source, index=len(layers))
    inputs = [layers[source].maps if source >= 0 else _IMAGE for source in sources]
    number = max(round(number * network["depth_multiple"]), 1) if number > 1 else 1
    args = [None if arg == "None" else arg for arg in args]  # YAML's own word for it is null
    build, maps = _PLANNERS.get(name, _plan_block)(_Row(inputs, number, BLOCKS[name], args), network)
    return _Layer(sources, build, maps, number)


def _sources(source: Any, *, index: int) -> tuple[int, ...]:
    """`from` of layer `index` as layer numbers. Negative ones count back from here; -1 of the first is the image."""
    listed = source if isinstance(source, list) else [source]
    if not listed or any(type(number) is not int for number in listed):
        raise UserError(f"from must be a layer's number or a list of them, got {source!r}")
    sources = tuple(number + index if number < 0 else number for number in listed)
    for number, resolved in zip(listed, sources):
        if not 0 <= resolved < index and (index, number) != (0, -1):
            earlier = f"layers 0 to {index - 1}, or -1 to {-index}" if index else "-1, the image"
            raise UserError(f"from {number} is out of range, expected {earlier}")
    return sources


def _plan_block(row: _Row, network: dict[str, Any]) -> tuple[Callable[[], nn.Module], _Maps]:
    """A block of one input whose first argument is its output channels before the width multiple."""
    maps = _only_input(row)
    arguments = _bind(row, maps.channels)
    channels = math.ceil(arguments["out_channels"] * network["width_multiple"] / 8) * 8
    arguments["out_channels"] = channels
    stride = _checked_stride(arguments)
    out = _Maps(channels, maps.stride * stride)
    if "number" in arguments:
        arguments["number"] = row.number
    if "number" in arguments or row.number == 1:
        return partial(row.block, **arguments), out
    if stride > 1:
        raise UserError(f"a block of stride {stride} cannot be repeated, number must be 1")

    def build() -> nn.Sequential:
        following = [row.block(**arguments | {"in_channels": channels}) for _ in range(row.number - 1)]
        return nn.Sequential(row.block(**arguments), *following)

    return build, out


def _bind(row: _Row, in_channels: int) -> dict[str, Any]:
    """All arguments of the row's block by name, each of the type that the block declares."""
    parameters = inspect.signature(row.block).parameters
    try:
        bound = inspect.signature(row.block).bind(in_channels, *row.args)
    except TypeError:
        wanted = ", ".join(str(parameter) for name, parameter in parameters.items() if name not in _FROM_NETWORK)
        raise UserError(f"{row.block.__name__} takes [{wanted}], got {row.args!r}") from None
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        hint = parameters[name].annotation
        least = 0 if name == "padding" else 1
        if not _suits(value, hint, least):
            raise UserError(f"{row.block.__name__}'s {name} must be {_in_words(hint, least)}, got {value!r}")
    return bound.arguments


def _suits(value: Any, hint: Any, least: int) -> bool:
    if hint == list[int]:
        return _are_rows(value) and all(_is_count(item) and item % 2 for item in value)
    return type(value) in (get_args(hint) or (hint,)) and (type(value) is not int or least <= value <= _LARGEST)


def _in_words(hint: Any, least: int) -> str:
    if hint == list[int]:
        return "a list of odd whole numbers"  # the sizes of pools, which keep the size of maps
    return "true or false" if hint is bool else f"a whole number, {least} to {_LARGEST}"


def _checked_stride(arguments: dict[str, Any]) -> int:
    """The block's stride. Its output must have the input's size / stride, or cells would not lie where boxes are."""
    kernel, stride = arguments.get("kernel", 1), arguments.get("stride", 1)
    padding = arguments.get("padding")  # None: as Conv does
    padding = kernel // 2 if padding is None else padding
    if not 0 < kernel - 2 * padding <= stride:
        raise UserError(
            f"kernel {kernel}, stride {stride} and padding {padding} do not divide the size by {stride}: "
            f"kernel - 2 * padding must be 1 to {stride}"
        )
    return stride


def _plan_focus(row: _Row, network: dict[str, Any]) -> tuple[Callable[[], nn.Module], _Maps]:
    build, maps = _plan_block(row, network)
    return build, maps._replace(stride=2 * maps.stride)


def _plan_upsample(row: _Row, network: dict[str, Any]) -> tuple[Callable[[], nn.Module], _Maps]:
    maps = _only_input(row)
    size, factor, mode = row.args if len(row.args) == 3 else (None, None, None)
    if size is not None or not _is_count(factor) or mode != "nearest":
        raise UserError(f"nn.Upsample takes [None, factor, nearest], got {row.args!r}")
    if maps.stride % factor:
        raise UserError(f"maps of stride {maps.stride} cannot be enlarged {factor} times")
    return partial(nn.Upsample, size, factor, mode), _Maps(maps.channels, maps.stride // factor)


def _plan_concat(row: _Row, network: dict[str, Any]) -> tuple[Callable[[], nn.Module], _Maps]:
    if row.args not in ([], [1]):
        raise UserError(f"Concat takes [1], the channel dimension, got {row.args!r}")
    strides = [maps.stride for maps in row.inputs]
    if len(set(strides)) > 1:
        raise UserError(f"Concat's maps must have one size, got strides {strides}")
    return Concat, _Maps(sum(maps.channels for maps in row.inputs), strides[0])


def _plan_detect(row: _Row, network: dict[str, Any]) -> tuple[Callable[[], nn.Module], _Maps]:
    if row.args not in ([], ["nc", "anchors"]):
        raise UserError(f"Detect takes [nc, anchors], got {row.args!r}")
    strides = tuple(maps.stride for maps in row.inputs)
    if len(strides) != len(network["anchors"]):
        raise UserError(f"Detect reads {len(strides)} layers, but anchors has {len(network['anchors'])} levels")
    if sorted(set(strides)) != list(strides):
        raise UserError(f"Detect's maps must go from fine to coarse, got strides {list(strides)}")

    def build() -> Detect:
        anchors_px = torch.tensor(network["anchors"], dtype=torch.float32).unflatten(1, (-1, 2))  # (L, A, 2)
        return Detect([maps.channels for maps in row.inputs], strides, anchors_px, network["nc"])

    return build, row.inputs[-1]


_PLANNERS = {  # the others: _plan_block
    "Focus": _plan_focus,
    "nn.Upsample": _plan_upsample,
    "Concat": _plan_concat,
    "Detect": _plan_detect,
}


def _only_input(row: _Row) -> _Maps:
    if len(row.inputs) != 1:
        raise UserError(f"{row.block.__name__} reads one layer, got {len(row.inputs)}")
    return row.inputs[0]


def _anchor_rows(anchors_px: Tensor) -> list[list[float]]:
    """(L, A, 2) -> one flat list of widths and heights per level, as network YAMLs have them."""
    return anchors_px.flatten(1).tolist()


def _nearest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f", did you mean {close[0]}?" if close else f", expected one of {', '.join(names)}"


def main(argv: list[str] | None = None) -> None:
    """Print one line about a network."""
    parser = argparse.ArgumentParser(prog="models.yolo", description=main.__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--cfg", metavar="YAML", default="yolov5n.yaml", help="network, by name or path")
    cfg = parser.parse_args(argv).cfg
    try:
        with torch.device("meta"):  # counting needs no weights
            model = DetectionModel(read_network(cfg))
    except UserError as error:
        parser.error(str(error))
    print(
        f"{Path(cfg).name}: {count_layers(model)} layers, {count_parameters(model):,} parameters, "
        f"{gflops(model):.2f} GFLOPs at 640"
    )


if __name__ == "__main__":
    main()
