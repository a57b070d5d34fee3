"""The graph of a network, as TensorBoard draws it: what is called, in which module, on whose outputs.

The surprise: the network is run, not analysed, as a copy whose weights are all one zero and take no memory, on images
of two small sizes. The shapes for images of any other size follow, as they grow in step with the image's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.yolo import DetectionModel

if TYPE_CHECKING:
    from tensorboard.compat.proto.node_def_pb2 import NodeDef

_LEAST_PX = 32
_Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """A call of a module that holds no others, or of a function between modules."""

    name: str  # scopes that are modules, each `path Class`, and the call's own; of its own in the graph
    op: str  # class or function
    inputs: tuple[str, ...] = ()  # `name`, or `name:n` for an output other than the first
    shapes: tuple[_Shape, ...] = ()  # of the outputs
    settings: str = ""  # of a module, as printing it shows them
    parameters: int = 0


def network_graph(model: nn.Module, imgsz: int) -> list[GraphNode]:
    """What `model` does with an image (1, 3, imgsz, imgsz), in the order of the calls, from `input` to `output`.

    It may lie on any device, and is left as it was.
    """
    stride = max(model.head.strides) if isinstance(model, DetectionModel) else 1
    small = -(-_LEAST_PX // stride) * stride
    weightless = _weightless(model)
    first, second = (_traced(weightless, side) for side in (small, 2 * small))
    growth = (imgsz - small) / small
    return [
        replace(one, shapes=tuple(_grown(*shapes, growth) for shapes in zip(one.shapes, other.shapes)))
        for one, other in zip(first, second)
    ]


def _grown(small: _Shape, large: _Shape, growth: float) -> _Shape:
    return tuple(round(low + growth * (high - low)) for low, high in zip(small, large))


def _weightless(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode and without hooks, of which every tensor is one zero seen many times."""
    instead: dict[int, Any] = {}  # as copy.deepcopy keeps what it has copied
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            instead[id(weight)] = nn.Parameter(_zeros_like(weight), requires_grad=False)
        for buffer in module.buffers(recurse=False):
            instead[id(buffer)] = _zeros_like(buffer)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            instead[id(hooks)] = type(hooks)()
    return copy.deepcopy(model, instead).eval()


def _zeros_like(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.zeros((), dtype=dtype, device="cpu").expand(tensor.shape)


@torch.no_grad()
def _traced(model: nn.Module, side: int) -> list[GraphNode]:
    trace = _Trace()
    hooks = list(_listened(model, trace))
    images = torch.zeros(1, 3, side, side, device="cpu")
    trace.add("input", "images", (), images)
    try:
        with _one_thread(), trace:
            outputs = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    trace.add("output", "raw predictions", (outputs,), ())
    return trace.nodes


@contextmanager
def _one_thread() -> Iterator[None]:
    """On work as small as this, threads wait for one another ten times as long as it takes."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _listened(model: nn.Module, trace: _Trace) -> Iterator[Any]:
    """Hooks by which `trace` hears of every call of a module but of `model` itself, unless it is all there is."""
    for path, module in model.named_modules():
        if path or not _holds_others(model):
            yield module.register_forward_pre_hook(partial(trace.enter, path))
            yield module.register_forward_hook(trace.leave)


class _Trace(TorchFunctionMode):
    """Writes down calls of modules and, between those, of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[GraphNode] = []
        self._paths, self._scopes = [""], [""]  # of the modules under way: as the model and as the graph names them
        self._in_leaf = False
        self._makers: dict[int, str] = {}  # of each tensor so far, by id
        self._kept: list[Tensor] = []  # so that no id is used again
        self._used: Counter[str] = Counter()

    def enter(self, path: str, module: nn.Module, _: Any) -> None:
        inside = path.removeprefix(f"{self._paths[-1]}.") if self._paths[-1] else path
        kind = type(module).__name__
        label = f"{inside.removeprefix('model.')} {kind}".strip()  # DetectionModel's layers, known by their number
        self._paths.append(path)
        self._scopes.append(self._unused(f"{self._scopes[-1]}{label}") + "/")
        self._in_leaf = not _holds_others(module)

    def leave(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        scope, self._in_leaf = self._scopes.pop(), False
        self._paths.pop()
        if not _holds_others(module):
            own = sum(weight.numel() for weight in module.parameters(recurse=False))
            self.add(scope[:-1], type(module).__name__, inputs, outputs, module.extra_repr(), own)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        sources = (*args, *(kwargs or {}).values())
        if not self._in_leaf and self._sources(sources) and next(_tensors(outputs), None) is not None:
            name = function.__name__.strip("_")
            self.add(self._unused(self._scopes[-1] + name), name, sources, outputs)
        return outputs

    def add(self, name: str, op: str, inputs: Any, outputs: Any, settings: str = "", parameters: int = 0) -> None:
        made = list(_tensors(outputs))
        self.nodes.append(
            GraphNode(
                name=name,
                op=op,
                inputs=tuple(self._sources(inputs)),
                shapes=tuple(tuple(tensor.shape) for tensor in made),
                settings=settings,
                parameters=parameters,
            )
        )
        self._kept += made
        self._makers |= {id(tensor): f"{name}:{place}" if place else name for place, tensor in enumerate(made)}

    def _sources(self, inputs: Any) -> list[str]:
        return [self._makers[id(tensor)] for tensor in _tensors(inputs) if id(tensor) in self._makers]

    def _unused(self, name: str) -> str:
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name} {self._used[name]}"


def _holds_others(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def graph_def(nodes: Iterable[GraphNode]) -> bytes:
    """The nodes as a serialised GraphDef, as TensorBoard reads it."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.versions_pb2 import VersionDef

    return GraphDef(node=map(_node_def, nodes), versions=VersionDef(producer=22)).SerializeToString()


def _node_def(node: GraphNode) -> NodeDef:
    from tensorboard.compat.proto.node_def_pb2 import NodeDef

    told = NodeDef(name=node.name, op=node.op, input=node.inputs)
    told.attr["_output_shapes"].list.shape.extend(map(_shape_proto, node.shapes))
    if node.settings:
        told.attr["settings"].s = node.settings.encode()
    if node.parameters:
        told.attr["parameters"].i = node.parameters
    return told


def _shape_proto(shape: Sequence[int]) -> Any:
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
