"""Paints a SamplePlan with OpenCV, in a loader process.

A matrix moves points of the plane, where pixel i covers [i, i + 1); OpenCV counts from pixel centres, hence the halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cv2
import numpy as np

from utils.data.plan import PADDING
from utils.structures import QuadPlan, SamplePlan, Tile

_HALF_PX = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixel-centre coordinates -> points of the plane
_EDGE_SLACK = 1e-6  # px^2, far above what rounding does to an edge seen from both of its sides


def render(plan: SamplePlan, base_image_of: Callable[[int], np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) u8 RGB, in `out` if given. `base_image_of(image)` yields the base image, BGR, of an index into the
    LabelStore."""
    picture = _paint(plan.tiles, plan.shape, base_image_of)
    if plan.mix is not None:
        other = _paint(plan.mix.tiles, plan.shape, base_image_of)
        picture = cv2.addWeighted(picture, plan.mix.weight, other, 1 - plan.mix.weight, 0)
    picture = _to_rgb(picture, plan.hsv)
    if plan.flip_ud or plan.flip_lr:
        picture = cv2.flip(picture, -1 if plan.flip_ud and plan.flip_lr else int(plan.flip_lr))
    if out is None:
        return picture
    out[:] = picture
    return out


def render_quad(
    plan: QuadPlan, base_image_of: Callable[[int], np.ndarray], out: np.ndarray | None = None
) -> np.ndarray:
    """(H, W, 3) u8 RGB, as `render`."""
    height, width = plan.shape
    picture = np.empty((height, width, 3), np.uint8) if out is None else out
    if plan.enlarge:
        sample = render(plan.samples[0], base_image_of)
        return cv2.resize(sample, (width, height), dst=picture, interpolation=cv2.INTER_LINEAR)
    picture[:] = PADDING
    for number, sample in enumerate(plan.samples):
        y, x = (height // 2 * (number // 2), width // 2 * (number % 2))
        picture[y : y + height // 2, x : x + width // 2] = render(sample, base_image_of)
    return picture


def _paint(tiles: Iterable[Tile], shape: tuple[int, int], base_image_of: Callable[[int], np.ndarray]) -> np.ndarray:
    picture = np.full((*shape, 3), PADDING, np.uint8)
    for tile in tiles:
        low = np.clip(np.floor(tile.corners.min(0)), 0, shape[::-1]).astype(int)
        high = np.clip(np.ceil(tile.corners.max(0)), 0, shape[::-1]).astype(int)
        region = picture[low[1] : high[1], low[0] : high[0]]  # a view: nothing outside it is computed
        patch = _patch(base_image_of(tile.image), tile.matrix, low, region.shape[1::-1])
        if tile.crop is not None:
            region[:] = patch
        else:
            np.copyto(region, patch, where=_inside(tile.corners - low, region.shape[:2])[..., None])
    return picture


def _patch(base: np.ndarray, matrix: np.ndarray, low: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The rectangle of `size` (width, height) at `low` of the moved base image; its edge pixels go on for ever."""
    move = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]])
    centres = np.linalg.inv(_HALF_PX) @ move @ matrix @ _HALF_PX
    options = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
    if np.array_equal(matrix[2], [0, 0, 1]):
        return cv2.warpAffine(base, centres[:2], size, **options)
    return cv2.warpPerspective(base, centres, size, **options)


def _inside(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels with their centre in the convex polygon, edge included, so that neighbours leave no gap.

    cv2.fillConvexPoly counts in whole rows, and misses pixels where a nearly level edge crosses the border.
    """
    edges = np.roll(corners, -1, axis=0) - corners
    if edges[0, 0] * edges[1, 1] < edges[0, 1] * edges[1, 0]:  # a shear beyond 45 degrees mirrors
        return _inside(corners[::-1], shape)
    rows, columns = (np.arange(side) + 0.5 for side in shape)
    mask = np.ones(shape, bool)
    for (x, y), (along_x, along_y) in zip(corners, edges):  # a pixel lies to the right of every edge
        mask &= (along_x * (rows - y) + _EDGE_SLACK)[:, None] >= along_y * (columns - x)
    return mask


def _to_rgb(picture: np.ndarray, hsv: tuple[float, float, float] | None) -> np.ndarray:
    if hsv is None:
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    levels = np.arange(256)
    hue = levels * hsv[0] % 180  # OpenCV's 8-bit hue counts two degrees
    saturation, value = (np.clip(levels * factor, 0, 255) for factor in hsv[1:])
    table = np.stack([hue, saturation, value], axis=-1).astype(np.uint8)[None]  # (1, 256, 3)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(picture, cv2.COLOR_BGR2HSV), table), cv2.COLOR_HSV2RGB)
