"""BGR to RGB and the plan's colours, in place: by a small C++ library where there is a compiler, else by OpenCV.

OpenCV takes three passes, which cost more than all else that a sample needs; the library is three times as fast. Both
round alike but for ties and the last bits of a float, so they differ by a grey level here and there.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from utils.native import NativeError, native_library

_SOURCE = Path(__file__).with_name("colours.cpp")
_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only")
_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_HUES = 180  # OpenCV's 8-bit hue counts two degrees
_NEARLY_DIAGONAL = np.float32([[0, 1e-4, 0], [0, 0, 0], [0, 0, 0]])  # OpenCV 4 is slow with matrices that are diagonal

Hsv = tuple[float, float, float]


def recolour(region: np.ndarray, hsv: Hsv | None) -> None:
    """(H, W, 3) u8 BGR to RGB in place, with hue, saturation and value, as bytes, times the factors 0..2, rounded."""
    if hsv is None:
        cv2.cvtColor(region, cv2.COLOR_BGR2RGB, dst=region)
        return
    native = _native()
    if native is None:
        recolour_with_opencv(region, hsv)
        return
    assert region.dtype == np.uint8 and region.strides[1:] == (3, 1) and region.flags.writeable
    native(region.ctypes.data, region.shape[0], region.shape[1], region.strides[0], *hsv)


def prepare() -> bool:
    """Make and load the library, so that loader processes find it, and all of them the same; whether there is one."""
    return _native() is not None


def recolour_with_opencv(region: np.ndarray, hsv: Hsv) -> None:
    """The same, without the library."""
    cv2.cvtColor(region, cv2.COLOR_BGR2HSV, dst=region)
    if (_HUES - 1) * hsv[0] < 255.5:  # the way back takes hues of more than a turn
        cv2.transform(region, _NEARLY_DIAGONAL + np.diag(hsv).astype(np.float32), dst=region)
    else:
        levels = np.arange(256)[:, None] * np.array(hsv)  # (256, 3)
        table = np.concatenate([np.rint(levels[:, :1]) % _HUES, np.clip(np.rint(levels[:, 1:]), 0, 255)], axis=1)
        cv2.LUT(region, table.astype(np.uint8)[None], dst=region)
    cv2.cvtColor(region, cv2.COLOR_HSV2RGB, dst=region)


@functools.cache
def _native() -> Callable[..., None] | None:
    """The library's function; None where it cannot be had, and OpenCV does as well."""
    try:
        function = native_library(_SOURCE, _FLAGS).recolour
    except NativeError:
        return None
    function.argtypes, function.restype = [_POINTER, *[_SIZE] * 3, *[_NUMBER] * 3], None
    return function
