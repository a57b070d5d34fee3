"""A pickle, which is a program, run by a machine that builds values and has no instruction to import or to call.

The surprise: what a pickle asks for by name stays a name. A few names mean tensors and containers, those of `_CLASSES`
become inert Records, and any other ends the reading. torch's own restricted loader would do for honest files; one of a
megabyte makes it crash, and one of a hundred bytes makes it fill the memory.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_STEPS = 2_000_000  # instructions; the largest network with its optimizer needs 200,000
_MOST_VALUES = 2_000_000  # each counted wherever it is seen, so that lists of lists of one list end here
_MOST_TEXT = 32 << 20  # characters, counted likewise
_DEEPEST = 100  # values within values
_MOST_DIMENSIONS = 8
_SHOWN = 200  # characters

EXPANDED = "torch.Tensor.expand"  # the name of such a Record

ReadStorage = Callable[[str, torch.dtype], Tensor]  # by its key: all its numbers in a row. Raises KeyError

# Classes that published checkpoints hold
_CLASSES = re.compile(
    r"(models|utils|yolov5|ultralytics|torch\.nn\.modules|pathlib)\.[\w.]+"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+)"
)
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_INERT = re.compile(  # what torch's loader would make; it has a use in no weights
    r"torch\.(Size|device|b?float\d+|u?int\d+|bool)|builtins\.(set|bytearray|complex)|collections\.Counter|_codecs\.encode"
)


class Unreadable(Exception):
    """What is wrong with a file; to follow its name."""


class Forbidden(Unreadable):
    """It asks for something that might do anything."""


@dataclass(eq=False)
class Record:
    """An object of a class that is not here: the class's name, and the object's data as the file has it."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


def unpickled(program: io.BytesIO, read: ReadStorage) -> tuple[Any, tuple[str, ...]]:
    """The value of a pickle by `torch.save`, and what it names besides tensors and containers.

    Values are dict, list, tuple, str, bytes, int, float, bool, None, Tensor and Record; OrderedDicts are dicts. They
    form a tree of bounded depth and size, so that whoever walks it comes to an end. Raises Unreadable.
    """
    start, machine = program.tell(), _Machine(read)
    try:
        value = machine.run(program)
    except Unreadable:
        raise
    except Exception:  # what is fed with noise raises anything
        program.seek(start)
        _refuse_names(program)
        raise Unreadable("is damaged") from None
    _check_extent(value)
    return value, tuple(machine.names)


def _refuse_names(program: io.BytesIO) -> None:
    """Raise Forbidden for the first name in damaged pickles, or in those of formats that no weights have."""
    try:
        while program.tell() < len(program.getbuffer()):
            for operation, argument, _ in pickletools.genops(program):
                if operation.name in ("GLOBAL", "INST"):
                    _checked_name(*argument.split(" ", 1))
    except (ValueError, IndexError):  # it ends early, or is none
        return


def shown(text: str, *, most: int = _SHOWN) -> str:
    """What a file says, fit for a line on a screen of so many characters at most."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


def _checked_name(module: str, name: str) -> str:
    """The whole name, of Python 3. Raises Forbidden where weights have no use for it."""
    full = f"{module.replace('__builtin__', 'builtins')}.{name}"
    if not (full in _BUILDERS or full in _STORAGES or _INERT.fullmatch(full) or _CLASSES.fullmatch(full)):
        raise Forbidden(f"asks for {shown(full)}, which is no part of weights; nothing in it was run")
    return full


def _check_extent(value: Any) -> None:
    """Raise Unreadable for a value that, walked as a tree, is deeper or larger than any checkpoint."""
    values = text = 0
    levels: list[Iterator[Any]] = [iter((value,))]
    while levels:
        for item in levels[-1]:
            values += 1
            if isinstance(item, (str, bytes)):
                text += len(item)
            elif inner := _inside(item):
                levels.append(iter(inner))
                break
        else:
            levels.pop()
        if len(levels) > _DEEPEST or values > _MOST_VALUES or text > _MOST_TEXT:
            raise Unreadable("holds values within values without end, and no weights")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    if isinstance(value, (list, tuple)):
        return value
    return (value.args, value.state) if isinstance(value, Record) else ()


# ---- the machine --------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """A class or function that a pickle asks for."""

    full: str


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


class _Machine:
    def __init__(self, read: ReadStorage):
        self.read = read
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks up to each mark
        self.memo: dict[int, Any] = {}
        self.names: dict[str, None] = {}  # in their order

    def run(self, program: io.BytesIO) -> Any:
        for _ in range(_MOST_STEPS):
            operation = pickletools.code2op[program.read(1).decode("latin-1")]
            instruction = _INSTRUCTIONS[operation.name]
            argument = operation.arg.reader(program) if operation.arg else None
            if operation.name == "STOP":
                return self.stack.pop()
            instruction(self, argument)
        raise Unreadable(f"describes its content in more than {_MOST_STEPS:,} steps")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        assert len(self.stack) >= count
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def name(self, module: str, name: str) -> None:
        full = _checked_name(module, name)
        if full not in _BUILDERS and full not in _STORAGES:
            self.names[full] = None
        self.push(_Name(full))

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif not isinstance(target, Record):  # such as a set, whose items nobody needs
            raise ValueError("only lists grow")

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        keys, values = flat[::2], flat[1::2]
        if type(target) is not dict or len(keys) != len(values) or not all(type(key) in _KEYS for key in keys):
            raise ValueError("no mapping from plain keys")
        target.update(zip(keys, values))

    def build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not dict:  # an OrderedDict may have attributes, such as those of a state dict
            raise ValueError("only records have state")

    def call(self, _: None) -> None:
        function, args = self.pop(2)
        if not isinstance(function, _Name) or type(args) is not tuple:
            raise ValueError("a call of no name")
        build = _BUILDERS.get(function.full)
        self.push(build(self, *args) if build else Record(function.full, args))

    def storage(self, _: None) -> None:
        kind, name, key, _, _ = self.stack.pop()  # the others: its device, and how many numbers it has
        if kind != "storage" or type(key) is not str:
            raise ValueError("no storage")
        self.push(_Storage(key, _STORAGES[name.full]))


_KEYS = (str, int, float, bool, bytes, type(None))  # of dictionaries: to hash a tuple of tuples of tuples never ends


def _tensor(machine: _Machine, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor | Record:
    """A view of a storage, within its bounds. One of more numbers than the storage has becomes a Record."""
    numbers = machine.read(*storage)
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= _MOST_DIMENSIONS:
        raise ValueError("no shape")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise ValueError("no shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if all(size) and last >= len(numbers):
        raise Unreadable("is damaged: a tensor in it is larger than what it holds of it")
    if math.prod(size) > len(numbers):  # repeated, as the grids of some published heads are; nobody needs those
        machine.names[EXPANDED] = None
        return Record(EXPANDED, (size,))
    return numbers.as_strided(size, stride, offset)


def _first(_: _Machine, tensor: Any, *__: Any) -> Any:
    return tensor


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda machine: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
}

_push = _Machine.push
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push(Record("builtins.set")),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "BINPUT": lambda machine, index: machine.memo.__setitem__(index, machine.stack[-1]),
    "LONG_BINPUT": lambda machine, index: machine.memo.__setitem__(index, machine.stack[-1]),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop(2)),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,  # of a class with arguments, which is a call to whom both are names
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
