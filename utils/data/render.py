"""Paints a SamplePlan with OpenCV, in a loader process.

A matrix moves points of the plane, where pixel i covers [i, i + 1); OpenCV counts from pixel centres, hence the halves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np

from utils.data.colours import recolour
from utils.data.coverage import convex_spans, within_rings, within_spans
from utils.data.images import ImageSource
from utils.data.pixels import change_pixels
from utils.data.plan import PADDING
from utils.structures import Cutout, QuadPlan, SamplePlan, Tile

_HALF_PX = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixel-centre coordinates -> points of the plane
_TO_CENTRES = np.linalg.inv(_HALF_PX)


def render(plan: SamplePlan, base_image_of: ImageSource, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) u8 RGB, written into `out` when given, whose last two axes lie close.

    Each image is asked for once, however many tiles show it.
    """
    base_image_of = functools.cache(base_image_of)
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


def render_quad(plan: QuadPlan, base_image_of: ImageSource, out: np.ndarray | None = None) -> np.ndarray:
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


def _paint(picture: np.ndarray, tiles: Sequence[Tile], base_image_of: ImageSource) -> np.ndarray:
    picture[:] = PADDING
    for tile in tiles:
        (_paint_tilted if tile.crop is None else _paint_upright)(picture, tile, base_image_of)
    return picture


def _paint_upright(picture: np.ndarray, tile: Tile, base_image_of: ImageSource) -> None:
    """A crop and a resize."""
    (left, top), (right, bottom) = tile.corners[::2].astype(int).tolist()
    x1, y1, x2, y2 = tile.crop
    region = picture[top:bottom, left:right]
    base = base_image_of(tile.image)
    cv2.resize(base[y1:y2, x1:x2], (right - left, bottom - top), dst=region, interpolation=cv2.INTER_LINEAR)


def _paint_tilted(picture: np.ndarray, tile: Tile, base_image_of: ImageSource) -> None:
    """Only what the tile's corners enclose is computed, as whole px of a rectangle."""
    limits = picture.shape[1::-1]
    low = np.clip(np.floor(tile.corners.min(0)), 0, limits).astype(int)
    high = np.clip(np.ceil(tile.corners.max(0)), 0, limits).astype(int)
    region = picture[low[1] : high[1], low[0] : high[0]]
    if not region.size:
        return
    mask = within_spans(convex_spans(tile.corners - low, region.shape[:2]), region.shape[1])
    if tile.rings:
        mask &= within_rings([ring - low for ring in tile.rings], region.shape[:2])
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


# ---- colours ------------------------------------------------------------------------------------------------------


def _to_rgb(picture: np.ndarray, plan: SamplePlan) -> None:
    """BGR to RGB in place, and the plan's colours; where no tile lies above or below, of one pixel.

    Rows are done whole: of short ones, the slow way with the last few pixels would be a large part.
    """
    top, bottom = 0, plan.shape[0]
    if plan.mix is None and all(tile.crop is not None for tile in plan.tiles):
        top = int(min((tile.corners[0, 1] for tile in plan.tiles), default=bottom))
        bottom = int(max((tile.corners[2, 1] for tile in plan.tiles), default=bottom))
    if top or bottom < plan.shape[0]:
        grey = np.full((1, 1, 3), PADDING, np.uint8)
        recolour(grey, plan.hsv)
        picture[:top] = picture[bottom:] = grey.item(0)
    if top < bottom:
        recolour(picture[top:bottom], plan.hsv)


def _cut_out(picture: np.ndarray, cutouts: Sequence[Cutout]) -> None:
    for cutout in cutouts:
        x1, y1, x2, y2 = cutout.box
        picture[y1:y2, x1:x2] = cutout.colour[::-1]
