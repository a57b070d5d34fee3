"""Transforms of the albumentations package that a user's hyp YAML asks for: checked, made, applied.

The surprise: the package is imported only here, and only by runs that ask for it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from utils.files import nearest_name
from utils.structures import PixelChange, PixelTransform, UserError

_KEY = "albumentations"


def check_transforms(transforms: Sequence[PixelTransform], *, source: str) -> None:
    """Raises UserError, naming `source` and the key, for what cannot be applied to every image of a run."""
    if not transforms:
        return
    package = _package(source)
    for transform in transforms:
        try:
            _try_out(package, transform)
        except UserError as error:
            raise UserError(f"{source}: '{_KEY}': {error}") from None


def change_pixels(picture: np.ndarray, change: PixelChange) -> np.ndarray:
    """(H, W, 3) u8 RGB -> a new one; a function of the two."""
    pipeline = _pipeline(change.transforms)
    pipeline.set_random_seed(change.seed)
    return pipeline(image=np.ascontiguousarray(picture))["image"]


def _package(source: str) -> types.ModuleType:
    try:
        package = _imported()
    except ImportError as error:
        reason = "is not installed: `pip install albumentations`" if error.name == _KEY else f"does not work: {error}"
        raise UserError(f"{source}: '{_KEY}': the package {reason}, or leave the key out") from None
    if not hasattr(package.Compose, "set_random_seed"):
        raise UserError(f"{source}: '{_KEY}': this is albumentations {package.__version__}, it takes 2.0 or newer")
    return package


def _imported() -> types.ModuleType:
    from utils.runtime import keep_albumentations_offline

    keep_albumentations_offline()
    import albumentations

    return albumentations


def _try_out(package: types.ModuleType, transform: PixelTransform) -> None:
    """Raises UserError for an unknown name, a bad argument, or a transform that does not fit."""
    kind = getattr(package, transform.name, None)
    known = [name for name, value in vars(package).items() if _is_pixel_level(package, value)]
    if not inspect.isclass(kind) or not issubclass(kind, package.BasicTransform):
        raise UserError(f"unknown transform '{transform.name}'{nearest_name(transform.name, known)}")
    if not _is_pixel_level(package, kind):
        raise UserError(f"'{transform.name}' moves objects or is no single transform, and boxes would not follow")
    allowed = inspect.signature(kind).parameters
    for name, _ in transform.arguments:
        if name not in allowed:
            raise UserError(f"'{transform.name}' knows no '{name}'{nearest_name(name, allowed)}")
    always = replace(transform, arguments=(*(pair for pair in transform.arguments if pair[0] != "p"), ("p", 1.0)))
    picture = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    try:
        _pipeline((transform,))
        changed = change_pixels(picture, PixelChange(transforms=(always,), seed=0))
    except Exception as error:  # whatever the package says of its arguments
        raise UserError(f"'{transform.name}' does not work: {_in_one_line(error)}") from None
    if changed.shape != picture.shape or changed.dtype != np.uint8:
        raise UserError(f"'{transform.name}' makes {changed.dtype} of shape {changed.shape} of an image of bytes")


def _is_pixel_level(package: types.ModuleType, value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, package.ImageOnlyTransform)


def _in_one_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return "; ".join(line for line in lines if line and not line.startswith("For further information"))


@functools.lru_cache(maxsize=8)
def _pipeline(transforms: tuple[PixelTransform, ...]) -> Any:
    """Made once per process."""
    package = _imported()
    return package.Compose([getattr(package, each.name)(**dict(each.arguments)) for each in transforms])
