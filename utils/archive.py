"""What a .pt file holds, read without believing anything in it: neither its code, nor its sizes.

The surprise: a .pt file is a zip of tensors as plain bytes and of a pickle, which `plain_pickle` reads. Python's zip
reader compares checksums on the way, so a tensor that a disk has damaged is found.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from utils.plain_pickle import Forbidden, Unreadable, unpickled
from utils.structures import UserError

_LARGEST_PICKLE = 32 << 20  # bytes; that of the largest network with its optimizer has less than one MiB
_BLOCK = 16 << 20  # bytes that are read at once
_PICKLES_OF_OLD = 4  # in a row, before the tensors


class DamagedFile(UserError):
    """A file that is not what was once written, or is there no longer."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    content: Any  # dict, list, tuple, str, bytes, int, float, bool, None, Tensor, Record
    names: tuple[str, ...]  # of classes and the like that the content mentions; none where it is plain
    size: int  # bytes of the file


def read_archive(path: Path) -> Archive:
    """All that a .pt file holds, tensors on the CPU. Raises UserError for what is none, or asks for more than data.

    It takes time and memory in proportion to the file, whatever is in it.
    """
    try:
        with path.open("rb") as file:
            return _archive(file)
    except FileNotFoundError:
        raise DamagedFile(f"checkpoint not found: {path}; weights are never downloaded") from None
    except IsADirectoryError:
        raise UserError(f"checkpoint is a folder, expected a .pt file: {path}") from None
    except PermissionError:
        raise UserError(f"checkpoint cannot be read, permission denied: {path}") from None
    except Unreadable as error:
        raise DamagedFile(f"checkpoint cannot be read: {path} {error}") from None
    except (MemoryError, OSError):  # of this machine, not of the file
        raise
    except Exception:  # what is fed with noise raises anything
        raise DamagedFile(f"checkpoint cannot be read: {path} is damaged, or no .pt file of torch") from None


def _archive(file: IO[bytes]) -> Archive:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if (start := file.read(2)) != b"PK":
        _refuse_other(start + file.read(_LARGEST_PICKLE))
    with zipfile.ZipFile(file) as zipped:
        members = _Members(zipped, size)
        content, names = unpickled(io.BytesIO(members.pickle()), members.storage)
    return Archive(content=content, names=names, size=size)


def _refuse_other(start: bytes) -> None:
    """Raise Unreadable for what is no zip. Before version 1.6 torch wrote pickles in a row."""
    if not start:
        raise Unreadable("is empty")
    if not start.startswith(b"\x80"):
        raise Unreadable("is damaged, or no .pt file of torch")
    pickles = io.BytesIO(start)
    try:
        for _ in range(_PICKLES_OF_OLD):
            unpickled(pickles, _no_storage)
    except Forbidden:
        raise
    except Unreadable:
        pass
    raise Unreadable(
        "is no .pt file of torch 1.6 or newer; if it is older, load it where it was made and save it with a newer torch"
    )


def _no_storage(key: str, dtype: torch.dtype) -> Tensor:
    raise KeyError(key)


class _Members:
    """The parts of a zip by torch. Raises Unreadable for one whose parts are more than its file holds."""

    def __init__(self, zipped: zipfile.ZipFile, size: int):
        infos = zipped.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise Unreadable("has compressed parts, which no .pt file has")
        if sum(max(info.file_size, info.compress_size) for info in infos) > size:
            raise Unreadable("is damaged: its parts are said to be larger than the file")
        if any(info.filename.endswith("/constants.pkl") for info in infos):
            raise Unreadable("is a compiled network (TorchScript); take the .pt file that it was made of")
        (pickle,) = (info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename))
        self._zipped = zipped
        self._pickle = pickle
        self._folder = pickle.filename.removesuffix("data.pkl")
        self._names = {info.filename for info in infos}
        self._storages: dict[str, Tensor] = {}  # as bytes

    def pickle(self) -> bytes:
        """Raises Unreadable where it is too large, or of a machine whose tensors are not as ours."""
        order = self._folder + "byteorder"  # older files have none
        if order in self._names and self._zipped.read(order) != sys.byteorder.encode():
            raise Unreadable("was written on a machine of another byte order")
        if self._pickle.file_size > _LARGEST_PICKLE:
            raise Unreadable(f"is no file of weights: it has {self._pickle.file_size:,} bytes beside tensors")
        return self._zipped.read(self._pickle)

    def storage(self, key: str, dtype: torch.dtype) -> Tensor:
        if key not in self._storages:
            self._storages[key] = self._read(self._zipped.getinfo(f"{self._folder}data/{key}"))
        return self._storages[key].view(dtype)

    def _read(self, info: zipfile.ZipInfo) -> Tensor:
        whole = torch.empty(info.file_size, dtype=torch.uint8)
        view, at = memoryview(whole.numpy()), 0
        with self._zipped.open(info) as file:
            while block := file.read(_BLOCK):
                view[at : at + len(block)] = block
                at += len(block)
        if at < len(view):
            raise Unreadable("is damaged: it ends too early")
        return whole
