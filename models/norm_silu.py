"""Batch normalisation and SiLU as one operation on the CPU, by a small C++ library that is compiled on first use.

torch takes them apart into many passes over the maps, which cost more than the convolutions between them, and
torch.compile's own code for the CPU was measured to be no faster than that (docs/benchmarks.md). `accelerate` gives a
network these operations instead; where one does not fit, torch's are used.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Conv
from utils.native import NativeError, native_library
from utils.structures import UserError

_SOURCE = Path(__file__).with_name("norm_silu.cpp")
_FLAGS = (
    "-fopenmp",
    # what vectorising sums and divisions needs of -ffast-math, whose rest would change how torch computes as well
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "forward": [*[_POINTER] * 7, _SIZE, _SIZE, _NUMBER, _NUMBER, _SIZE],
    "backward": [_POINTER, _SIZE, *[_POINTER] * 5, _SIZE, _SIZE, _SIZE],
}
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def accelerate(model: nn.Module) -> None:
    """Let each Conv of `model` normalise and activate in one, when training on the CPU.

    Raises UserError where there is no C++ compiler, or none that can compile the library.
    """
    _library()
    for module in model.modules():
        if isinstance(module, Conv):
            module.normalise = norm_silu


def norm_silu(norm: nn.Module, maps: Tensor) -> Tensor:
    """silu(norm(maps)) of (B, C, h, w) maps."""
    if not _fits(norm, maps):
        return F.silu(norm(maps))
    norm.num_batches_tracked.add_(1)
    return _NormSiLU.apply(maps, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum)


def _fits(norm: nn.Module, maps: Tensor) -> bool:
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.weight.dtype == torch.float32
        and maps.device.type == "cpu"
        and maps.dtype in _SUFFIXES
        and maps.is_contiguous(memory_format=torch.channels_last)
        and maps.numel() > maps.shape[1]  # of a single value torch says that it has no variance
    )


class _NormSiLU(torch.autograd.Function):
    """Ioffe and Szegedy, "Batch Normalization", ICML 2015, with SiLU's derivative folded into its gradient.

    For the gradient only the input is kept; what lies between norm and activation is computed anew.
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, momentum: float
    ) -> Tensor:
        out, kept = torch.empty_like(maps), maps.new_empty(4, maps.shape[1], dtype=torch.float32)
        size = maps.numel() // maps.shape[1], maps.shape[1]
        arrays = (maps, out, weight, bias, mean, var, kept)
        _call("forward", maps.dtype, *arrays, *size, eps, momentum)
        ctx.save_for_backward(maps, kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, kept = ctx.saved_tensors
        row = gradient.stride(3)
        if not _lies_in_rows(gradient):
            gradient, row = gradient.contiguous(memory_format=torch.channels_last), gradient.shape[1]
        for_maps, for_weight, for_bias = torch.empty_like(maps), torch.empty_like(kept[0]), torch.empty_like(kept[0])
        size = maps.numel() // maps.shape[1], maps.shape[1]
        _call("backward", maps.dtype, gradient, row, maps, for_maps, kept, for_weight, for_bias, *size)
        return for_maps, for_weight, for_bias, None, None, None, None


def _lies_in_rows(maps: Tensor) -> bool:
    """Whether channels lie side by side and pixels at equal distances, as in a part of concatenated maps."""
    _, C, H, W = maps.shape
    image, channel, row, column = maps.stride()
    return channel == 1 and H > 1 and W > 1 and row == W * column and image == H * row and column >= C


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    passed = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(_library(), f"{name}_{_SUFFIXES[dtype]}")(*passed, torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = native_library(_SOURCE, _FLAGS)
    except NativeError as error:
        raise UserError(f"--compile: {error}; leave it out") from None
    for name, arguments in _ARGUMENTS.items():
        for suffix in _SUFFIXES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return library
