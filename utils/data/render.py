"""Paints a SamplePlan with OpenCV, in a loader process.

A matrix moves points of the plane, where pixel i covers [i, i + 1); OpenCV counts from pixel centres, hence the halves.
Colours are changed in place, by functions of OpenCV that look at one pixel at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from utils.data.pixels import change_pixels
from utils.data.plan import PADDING
from utils.structures import Cutout, QuadPlan, SamplePlan, Tile

BaseImageOf = Callable[[int], np.ndarray]

_HALF_PX = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixel-centre coordinates -> points of the plane
_TO_CENTRES = np.linalg.inv(_HALF_PX)
_EDGE_SLACK = 1e-6  # px^2, far above what rounding does to an edge seen from both of its sides
_HUES = 180  # OpenCV's 8-bit hue counts two degrees
_NEARLY_DIAGONAL = np.float32([[0, 1e-4, 0], [0, 0, 0], [0, 0, 0]])  # OpenCV 4 is slow with matrices that are diagonal


def render(plan: SamplePlan, base_image_of: BaseImageOf, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) u8 RGB, written into `out` when given, whose last two axes lie close.

    `base_image_of(image)` yields the base image, BGR, of an index into the LabelStore.
    """
    picture = np.empty((*plan.shape, 3), np.uint8) if out is None else out
    _paint(picture, plan.tiles, base_image_of)
    if plan.mix is not None:
        other = _paint(np.empty_like(picture), plan.mix.tiles, base_image_of)
        cv2.addWeighted(picture, plan.mix.weight, other, 1 - plan.mix.weight, 0, dst=picture)
    _to_rgb(picture, plan)
    if plan.pixels is not None:
        picture[:] = change_pixels(picture, plan.pixels)
    _cut_out(picture, plan.cutouts)
    if plan.flip_ud or plan.flip_lr:
        cv2.flip(picture, -1 if plan.flip_ud and plan.flip_lr else int(plan.flip_lr), dst=picture)
    return picture


def render_quad(plan: QuadPlan, base_image_of: BaseImageOf, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) u8 RGB, as `render`."""
    height, width = plan.shape
    picture = np.empty((height, width, 3), np.uint8) if out is None else out
    if plan.enlarge:
        sample = render(plan.samples[0], base_image_of)
        return cv2.resize(sample, (width, height), dst=picture, interpolation=cv2.INTER_LINEAR)
    if len(plan.samples) < 4:
        picture[:] = PADDING
    for number, sample in enumerate(plan.samples):
        y, x = height // 2 * (number // 2), width // 2 * (number % 2)
        render(sample, base_image_of, picture[y : y + height // 2, x : x + width // 2])
    return picture


# ---- tiles --------------------------------------------------------------------------------------------------------


def _paint(picture: np.ndarray, tiles: Sequence[Tile], base_image_of: BaseImageOf) -> np.ndarray:
    picture[:] = PADDING
    for tile in tiles:
        (_paint_tilted if tile.crop is None else _paint_upright)(picture, tile, base_image_of)
    return picture


def _paint_upright(picture: np.ndarray, tile: Tile, base_image_of: BaseImageOf) -> None:
    """A crop and a resize."""
    (left, top), _, (right, bottom), _ = tile.corners.astype(int).tolist()
    x1, y1, x2, y2 = tile.crop
    region = picture[top:bottom, left:right]
    base = base_image_of(tile.image)
    cv2.resize(base[y1:y2, x1:x2], (right - left, bottom - top), dst=region, interpolation=cv2.INTER_LINEAR)


def _paint_tilted(picture: np.ndarray, tile: Tile, base_image_of: BaseImageOf) -> None:
    """Only what the tile's corners enclose is computed, as whole px of a rectangle."""
    limits = picture.shape[1::-1]
    low = np.clip(np.floor(tile.corners.min(0)), 0, limits).astype(int)
    high = np.clip(np.ceil(tile.corners.max(0)), 0, limits).astype(int)
    region = picture[low[1] : high[1], low[0] : high[0]]
    if not region.size:
        return
    mask = _inside(tile.corners - low, region.shape[:2])
    if tile.rings:
        mask &= _inside_rings([ring - low for ring in tile.rings], region.shape[:2])
    patch = _patch(base_image_of(tile.image), tile.matrix, low, region.shape[1::-1])
    cv2.copyTo(patch, mask.view(np.uint8), dst=region)


def _patch(base: np.ndarray, matrix: np.ndarray, low: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The rectangle of `size` (width, height) at `low` of the moved base image; its edge pixels go on for ever."""
    move = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]])
    centres = _TO_CENTRES @ move @ matrix @ _HALF_PX
    options = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
    if np.array_equal(matrix[2], [0, 0, 1]):
        return cv2.warpAffine(base, centres[:2], size, **options)
    return cv2.warpPerspective(base, centres, size, **options)


def _inside(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels with their centre in the convex polygon, edge included, so that neighbours leave no gap.

    cv2.fillConvexPoly counts in whole rows, and misses pixels where a nearly level edge crosses the border.
    """
    edges = np.roll(corners, -1, axis=0) - corners
    if edges[0, 0] * edges[1, 1] < edges[0, 1] * edges[1, 0]:  # a mirror, or a shear beyond 45 degrees
        return _inside(corners[::-1], shape)
    rows, columns = (np.arange(side) + 0.5 for side in shape)
    first, last = np.full(shape[0], -np.inf), np.full(shape[0], np.inf)  # of each row, where the inside starts and ends
    for (x, y), (along_x, along_y) in zip(corners, edges):  # a pixel lies to the right of every edge
        room = along_x * (rows - y) + _EDGE_SLACK  # >= along_y * (column - x)
        if along_y > 0:
            last = np.minimum(last, x + room / along_y)
        elif along_y < 0:
            first = np.maximum(first, x + room / along_y)
        else:
            last[room < 0] = -np.inf
    return (columns >= first[:, None]) & (columns <= last[:, None])


def _inside_rings(rings: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels with their centre inside by the even-odd rule."""
    height, width = shape
    starts = np.concatenate(rings)  # (n, 2), and the end of each edge:
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    rows = np.arange(height)[:, None] + 0.5
    crosses = (starts[:, 1] <= rows) != (ends[:, 1] <= rows)  # (H, n)
    row, edge = np.nonzero(crosses)
    (x, y), (end_x, end_y) = starts[edge].T, ends[edge].T
    at = x + (row + 0.5 - y) * (end_x - x) / (end_y - y)
    column = np.clip(np.ceil(at - 0.5), 0, width).astype(int)  # the first pixel beyond
    changes = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).reshape(height, width + 1)
    return np.cumsum(changes, axis=1)[:, :width] % 2 == 1


# ---- colours ------------------------------------------------------------------------------------------------------


def _to_rgb(picture: np.ndarray, plan: SamplePlan) -> None:
    """BGR to RGB in place, and the plan's colours; where no tile lies above or below, of one pixel.

    Rows are done whole: of short ones, OpenCV's slow way with the last few pixels would be a large part.
    """
    top, bottom = 0, plan.shape[0]
    if plan.mix is None:
        edges = [tile.corners[:, 1] for tile in plan.tiles]
        top = min((max(math.floor(y.min()), 0) for y in edges), default=bottom)
        bottom = max((min(math.ceil(y.max()), bottom) for y in edges), default=bottom)
    if top or bottom < plan.shape[0]:
        grey = np.full((1, 1, 3), PADDING, np.uint8)
        _recolour(grey, plan.hsv)
        picture[:top] = picture[bottom:] = grey.item(0)
    if top < bottom:
        _recolour(picture[top:bottom], plan.hsv)


def _recolour(region: np.ndarray, hsv: tuple[float, float, float] | None) -> None:
    """BGR to RGB in place, with hue, saturation and value, as bytes, times the factors, rounded."""
    if hsv is None:
        cv2.cvtColor(region, cv2.COLOR_BGR2RGB, dst=region)
        return
    cv2.cvtColor(region, cv2.COLOR_BGR2HSV, dst=region)
    if (_HUES - 1) * hsv[0] < 255.5:  # the way back takes hues of more than a turn
        cv2.transform(region, _NEARLY_DIAGONAL + np.diag(hsv).astype(np.float32), dst=region)
    else:
        levels = np.arange(256)[:, None] * np.array(hsv)  # (256, 3)
        table = np.concatenate([np.rint(levels[:, :1]) % _HUES, np.clip(np.rint(levels[:, 1:]), 0, 255)], axis=1)
        cv2.LUT(region, table.astype(np.uint8)[None], dst=region)
    cv2.cvtColor(region, cv2.COLOR_HSV2RGB, dst=region)


def _cut_out(picture: np.ndarray, cutouts: Sequence[Cutout]) -> None:
    for cutout in cutouts:
        x1, y1, x2, y2 = cutout.box
        picture[y1:y2, x1:x2] = cutout.colour[::-1]
