"""Files of weights as a stranger may send them: nothing in them runs, and each gets one line and little time."""

import collections
import io
import os
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
import train
import val
from utils.archive import read_archive
from utils.plain_pickle import Record
from utils.structures import UserError


class Trap:
    """Unpickled in earnest, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Other:
    """An object whose state, arguments or items are as given."""

    def __init__(self, made: tuple):
        self.made = made

    def __reduce__(self):
        return self.made


def zip_of(path: Path, program: bytes, *, compression: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
    """A file as torch writes them, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as zipped:
        zipped.writestr("a/data.pkl", program)
        zipped.writestr("a/byteorder", "little")
        for key, content in storages.items():
            zipped.writestr(f"a/data/{key}", content)
        zipped.writestr("a/version", "3\n")
    return path


def one_line(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as raised:
        read_archive(path)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    assert time.monotonic() - started < 20
    return message


# ---- files that are sound -------------------------------------------------------------------------------------------

SOUND = {
    "numbers": [0, 1, -1, 255, 65_535, 2**31 - 1, -(2**31), 2**40, -(2**100), 0.5, float("inf")],
    "others": [None, True, False, "", "äöü 猫"],
    "bytes": b"\x00\xff",
    "a": {"nested": {"list": [[], {}, ()], 3: (1, (2, (3, 4), 5), 6, 7, 8)}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_as_they_were(tmp_path, protocol):
    content = SOUND if protocol > 2 else SOUND | {"bytes": None}  # which are a call in this protocol
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    assert read_archive(tmp_path / "x.pt").content == content


DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_as_they_were(tmp_path, dtype):
    base = torch.arange(24).remainder(2).to(getattr(torch, dtype))
    content = {
        "whole": base,
        "view": base[3:9],
        "turned": base.view(4, 6).t(),
        "channels last": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "one": base[1],
        "none": base[:0],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    content["twice"] = content["whole"]
    torch.save(content, tmp_path / "x.pt")
    archive = read_archive(tmp_path / "x.pt")
    assert archive.names == ()
    for name, tensor in content.items():
        found = archive.content[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.stride() == tensor.stride()
    assert archive.content["twice"] is archive.content["whole"]


def test_state_dicts_are_plain_dictionaries(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    archive = read_archive(tmp_path / "x.pt")
    assert archive.names == () and type(archive.content["model"]) is dict
    network.load_state_dict(archive.content["model"])
    optimizer.load_state_dict(archive.content["optimizer"])


def test_a_scribbled_weight_is_found(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] = 1
    path.write_bytes(content)
    assert "damaged" in one_line(path)


def test_classes_of_published_weights_are_records(tmp_path):
    numpy_values = {"scalar": np.float64(0.5), "array": np.arange(3), "path": Path("a/b")}
    torch.save(numpy_values | {"module": torch.nn.Conv2d(1, 2, 3)}, tmp_path / "x.pt")
    archive = read_archive(tmp_path / "x.pt")
    assert all(isinstance(value, Record) for value in archive.content.values())
    assert archive.content["module"].name == "torch.nn.modules.conv.Conv2d"
    assert archive.content["module"].state["_parameters"]["weight"].shape == (2, 1, 3, 3)
    assert "torch.nn.modules.conv.Conv2d" in archive.names


# ---- code -----------------------------------------------------------------------------------------------------------

PLACES = {
    "a value": lambda trap: {"ema": trap},
    "the whole": lambda trap: trap,
    "a key": lambda trap: {"ema": {trap: 1}},
    "in a list": lambda trap: {"ema": [1, [2, [trap]]]},
    "in a tuple": lambda trap: {"ema": (1, (trap, 2))},
    "in a set": lambda trap: {"ema": {1, trap}},
    "in an ordered dictionary": lambda trap: {"ema": collections.OrderedDict(w=trap)},
    "beside a tensor": lambda trap: {"ema": {"w": torch.ones(2), "v": trap}},
    "an argument of a class": lambda trap: {"model": Other((torch.nn.Module, (trap,)))},
    "the state of a module": lambda trap: {"model": Other((torch.nn.Module, (), {"_modules": {"0": trap}}))},
    "an item of a class": lambda trap: {"model": Other((torch.nn.ModuleList, (), None, iter([trap])))},
    "a function of a tensor": lambda trap: {"w": Other((torch._utils._rebuild_tensor_v2, (trap, 0, (1,), (1,))))},
    "a size": lambda trap: {"w": Other((torch._utils._rebuild_tensor_v2, (1, trap, (trap,), (1,))))},
    "a function's function": lambda trap: {"model": Other((torch._utils._rebuild_parameter, (Other((eval, ("1",))),)))},
}


def saved_with_trap(path: Path, place: str, how: str) -> Path:
    """Writes a file that makes a folder beside it when it is read in earnest; that folder."""
    made = path.with_name("made")
    content = PLACES[place](Trap(made))
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif how == "old format":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif how == "protocol 0":
        zip_of(path, pickle.dumps(content, protocol=0))
    else:
        torch.save(content, path, pickle_protocol=int(how))
    return made


@pytest.mark.parametrize("how", ["2", "4", "pickle", "old format", "protocol 0"])
@pytest.mark.parametrize("place", PLACES)
def test_code_does_not_run_and_is_named(tmp_path, place, how):
    if how in ("pickle", "protocol 0") and "tensor" in place:
        pytest.skip("torch has no such files")
    made = saved_with_trap(tmp_path / "x.pt", place, how)
    message = one_line(tmp_path / "x.pt")
    assert any(f"asks for {name}" in message for name in (f"{os.name}.mkdir", "builtins.eval")), message
    assert not made.exists()


@pytest.mark.parametrize("storage", ["made.up()", "../../x", "0"])
def test_a_storage_that_is_none(tmp_path, storage):
    call = pickle.dumps(Trap(tmp_path / "made"), 2)[2:-1]
    name = struct.pack("<I", len(storage)) + storage.encode()
    for persistent in (call, b"(X\x07\x00\x00\x00storage" + call + b"X" + name + b"X\x03\x00\x00\x00cpuK\x01t"):
        zip_of(tmp_path / "x.pt", b"\x80\x02}X\x01\x00\x00\x00a" + persistent + b"Qs.")
        assert f"asks for {os.name}.mkdir" in one_line(tmp_path / "x.pt")
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    [
        "posix system",
        "os system",
        "__builtin__ eval",
        "torch load",
        "torch.utils.data x",
        "models\x1b[31m x",
        "modelsx y",
    ],
)
def test_names_that_are_no_part_of_weights(tmp_path, name):
    module, function = name.split(" ")
    for program in (
        f"\x80\x02c{module}\n{function}\n)R.",
        f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(function))}{function}\x93)R.",
        f"(i{module}\n{function}\n.",
    ):
        message = one_line(zip_of(tmp_path / "x.pt", program.encode("latin-1")))
        assert "asks for " + f"{module}.{function}".replace("__builtin__", "builtins").replace("\x1b", "?") in message


@pytest.mark.parametrize("flag", ["--weights", "--resume"])
def test_train_refuses_code(tiny, cli, flag):
    made = saved_with_trap(Path("last.pt"), "beside a tensor", "2")
    code, _, problems = cli(train, *tiny.flags(flag, "last.pt") if flag == "--weights" else (flag, "last.pt"))
    assert (code, problems.count("\n")) == (2, 1)
    assert f"last.pt asks for {os.name}.mkdir" in problems
    assert not made.exists()


@pytest.mark.parametrize("script", [val, detect])
def test_val_and_detect_refuse_code(tiny, cli, script):
    made = saved_with_trap(Path("x.pt"), "the state of a module", "2")
    more = ["--source", str(tiny.image("val", 0))] if script is detect else ["--data", str(tiny.data)]
    code, _, problems = cli(script, "--weights", "x.pt", *more)
    assert (code, problems.count("\n")) == (2, 1)
    assert f"x.pt asks for {os.name}.mkdir" in problems
    assert not made.exists()


# ---- bombs ----------------------------------------------------------------------------------------------------------


def test_compressed_parts(tmp_path):
    zip_of(tmp_path / "x.pt", pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED, zeros=bytes(1 << 20))
    assert "compressed" in one_line(tmp_path / "x.pt")


def test_parts_that_are_said_to_be_larger_than_the_file(tmp_path):
    path = zip_of(tmp_path / "x.pt", pickle.dumps({}, 2), large=b"12345678")
    content = path.read_bytes().replace(struct.pack("<II", 8, 8), struct.pack("<II", 1 << 30, 1 << 30))
    path.write_bytes(content)
    assert "larger than the file" in one_line(path)


def test_parts_that_share_their_bytes(tmp_path):
    """A thousand entries in the table of contents, one in the file."""
    path = zip_of(tmp_path / "x.pt", pickle.dumps({}, 2), large=bytes(100_000))
    with zipfile.ZipFile(path, "a") as zipped:
        (info,) = (info for info in zipped.infolist() if info.filename.endswith("large"))
        zipped.filelist.extend([info] * 1000)
        zipped._didModify = True
    assert "larger than the file" in one_line(path)


def tensor_program(size: str, stride: str, offset: str = "K\x00", numbers: int = 1) -> bytes:
    return (
        "\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        f"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK{chr(numbers)}tQ{offset}{size}{stride}\x89ccollections\nOrderedDict\n)RtRs."
    ).encode("latin-1")


LONG = "\x8a\x05\x00\x00\x00\x00\x10"  # 2 ** 36

SHAPES = {
    "larger than its storage": (LONG + "\x85", "K\x01\x85"),
    "beyond its storage": ("K\x01\x85", "K\x01\x85", LONG),
    "a stride beyond": ("K\x02\x85", LONG + "\x85"),
    "negative": ("J\xff\xff\xff\xff\x85", "K\x01\x85"),
    "negative stride": ("K\x01\x85", "J\xff\xff\xff\xff\x85"),
    "strides missing": ("K\x01K\x01\x86", "K\x01\x85"),
    "no numbers": ("X\x01\x00\x00\x00a\x85", "K\x01\x85"),
    "true": ("\x88\x85", "K\x01\x85"),
    "not a tuple": ("K\x01", "K\x01"),
    "many dimensions": ("(" + 30 * "K\x01" + "t", "(" + 30 * "K\x01" + "t"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_tensors_that_are_not_there(tmp_path, kind):
    path = zip_of(tmp_path / "x.pt", tensor_program(*SHAPES[kind]), **{"0": bytes(4)})
    assert "damaged" in one_line(path)


def test_a_number_repeated_is_no_tensor(tmp_path):
    """Some published heads have grids of this kind, which are read past."""
    zip_of(tmp_path / "x.pt", tensor_program(LONG + "\x85", "K\x00\x85"), **{"0": bytes(4)})
    assert isinstance(read_archive(tmp_path / "x.pt").content["w"], Record)


def test_what_torch_would_make_is_not_made(tmp_path):
    """A gigabyte, or two to the power of thirty."""
    zip_of(tmp_path / "x.pt", b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.")
    assert read_archive(tmp_path / "x.pt").content.name == "builtins.bytearray"
    encoded = b"c_codecs\nencode\n" * 30 + b"X\x01\x00\x00\x00a" + b"X\x03\x00\x00\x00hex\x86R" * 30
    zip_of(tmp_path / "x.pt", b"\x80\x02" + encoded + b".")
    assert read_archive(tmp_path / "x.pt").content.name == "_codecs.encode"


def laughs(container: bytes, times: int) -> bytes:
    """A value of two of a value of two of ..."""
    return b"\x80\x02" + container + b"q\x00" + b"(h\x00h\x00tq\x00" * times + b"."


PROGRAMS = {
    "laughter": laughs(b")", 60),
    "laughter as a key": b"\x80\x02}" + laughs(b")", 60)[2:-1] + b"K\x01s.",
    "laughter in a set": b"\x80\x02c__builtin__\nset\n(" + b"]" + laughs(b")", 60)[2:-1] + b"atR.",
    "text repeated": b"\x80\x02X\x00\x00\x01\x00" + b"a" * 65_536 + b"q\x00(" + b"h\x00" * 100_000 + b"t.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "a deep key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "deep lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary in itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "a record in itself": b"\x80\x02cmodels.yolo\nModel\n)\x81q\x00h\x00b.",
    "many steps": b"\x80\x02" + b"N0" * 10 + b"]" * 2_500_000 + b".",
    "memory": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "a length of the future": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "endless number": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "a call of a value": b"\x80\x02K\x01)R.",
    "state of a number": b"\x80\x02K\x01}b.",
    "items of a number": b"\x80\x02K\x01K\x01a.",
    "half an item": b"\x80\x02}(K\x01u.",
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_that_are_no_weights(tmp_path, kind):
    path = zip_of(tmp_path / "x.pt", PROGRAMS[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_line(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_a_pickle_larger_than_any(tmp_path):
    path = zip_of(tmp_path / "x.pt", b"\x80\x02" + b"N" * (33 << 20))
    assert "beside tensors" in one_line(path)


# ---- other files ----------------------------------------------------------------------------------------------------


def test_empty_random_and_other_files(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"")
    assert "is empty" in one_line(path)
    for seed in range(20):
        start = (b"", b"PK\x03\x04", b"\x80\x02", b"PK\x05\x06")[seed % 4]
        path.write_bytes(start + np.random.default_rng(seed).bytes(5000))
        one_line(path)
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert "torch 1.6" in one_line(path)
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer)
    for cut in range(0, len(buffer.getvalue()), 37):
        path.write_bytes(buffer.getvalue()[:cut])
        one_line(path)


def test_a_machine_of_another_byte_order(tmp_path):
    path = zip_of(tmp_path / "x.pt", pickle.dumps({}, 2))
    path.write_bytes(path.read_bytes().replace(b"little", b"big---"))
    one_line(path)  # the checksum
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/data.pkl", pickle.dumps({}, 2))
        zipped.writestr("a/byteorder", "big")
    assert "byte order" in one_line(path)
