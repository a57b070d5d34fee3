"""Boxes and texts painted onto the pixels of images, and how classes look in every picture: colours and names.

Text comes from matplotlib's font renderer, as OpenCV writes ASCII alone; what it rendered is kept, so that the frames
of a video cost little.
"""

from __future__ import annotations

import colorsys
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

Colour = tuple[float, float, float]  # RGB, each 0..1

_CROWDED, _BURIED = 0.12, 0.25  # share of an image that text would cover: it is written smaller, or not at all
_LEAST_TEXT_PX = 7
_SILENCE = RLock()
_MOST_LETTERS = 200  # of a text; far more than fit
_WIDER_FONTS = (  # asked in this order for what DejaVu Sans lacks, where they are installed
    "Noto Sans CJK SC,Noto Sans CJK JP,Source Han Sans SC,WenQuanYi Zen Hei,WenQuanYi Micro Hei,Droid Sans Fallback,"
    "PingFang SC,Hiragino Sans,Microsoft YaHei,Yu Gothic,Malgun Gothic,Noto Sans Arabic,Noto Sans Devanagari,"
    "Noto Sans Thai,Nirmala UI,Leelawadee UI,Arial Unicode MS"
).split(",")


# ---------------------------------------------------------------------------------------------------------- classes


def class_colour(index: int) -> Colour:
    """Always the same for a class: hues a golden ratio apart, so that neighbours never look alike.

    Yellows and greens are darkened until a thin line of them shows on white.
    """
    saturation, value = ((0.85, 0.9), (0.6, 0.95), (0.95, 0.65))[index // 7 % 3]
    colour = colorsys.hsv_to_rgb((0.58 + index * 0.618034) % 1, saturation, value)
    dim = min(1.0, 0.4 / _luminance(colour)) ** (1 / 2.2)
    return tuple(dim * c for c in colour)


def _luminance(colour: Colour) -> float:
    """Relative luminance of WCAG 2.1, 0..1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever has more contrast by WCAG 2.1."""
    luminance = _luminance(colour)
    return (1.0, 1.0, 1.0) if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else (0.0, 0.0, 0.0)


def class_name(names: Sequence[str], index: int) -> str:
    """The name of a class as all pictures have it, on one line.

    Of a long one what tells it apart, its beginning and its end, 24 letters in all. Its number where it has no name, or
    where no font that is installed has any letter of it.
    """
    name = _printable(names[index]).strip() if index < len(names) else ""
    if not name or not _is_legible(name):
        return f"class {index}"
    return name if len(name) <= 24 else f"{name[:15]}…{name[-8:]}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


@lru_cache(4096)
def _is_legible(name: str) -> bool:
    return name.isascii() or any(ord(letter) in font for letter in name if not letter.isspace() for font in _letters())


@lru_cache(1)
def _letters() -> list[Mapping[int, int]]:
    """What each font for names has, by code point."""
    with quiet_matplotlib():
        from matplotlib.font_manager import findfont, get_font

        return [get_font(findfont(family)).get_charmap() for family in font_families()]


def _bytes(colour: Colour) -> np.ndarray:
    return np.rint(np.multiply(colour, 255)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ boxes


def annotated(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Colour],
    *,
    line_px: int = 0,
) -> np.ndarray:
    """A copy of `image`, (H, W, 3) u8 RGB, with boxes (K, 4) xyxy px and a text (K,) each, the most important first.

    Text is as high as befits the lines; `line_px` 0 goes by the size of the image. What lies outside is cut off, boxes
    without area are not drawn, and a text that finds no free place is left out: its box still has its colour.
    """
    painted = np.array(image, order="C")
    height, width, _ = painted.shape
    line_px = line_px or max(round(0.6 + 0.0009 * (height + width)), 1)
    draw_boxes(painted, boxes, texts, colours, line_px=line_px, text_px=6 + 5 * line_px)
    return painted


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Colour],
    *,
    line_px: int,
    text_px: int,
    dashed: Sequence[bool] | None = None,
) -> None:
    """As `annotated`, but onto `image` itself, which may be a part of a larger one.

    Where text of `text_px` would bury the image it is written smaller, and where that would too, not at all.
    """
    H, W, _ = image.shape
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    inside = boxes.clip(0, (W, H, W, H))
    seen = np.isfinite(boxes).all(1) & (inside[:, :2] < inside[:, 2:]).all(1)
    rows = np.flatnonzero(seen).tolist()
    for row in reversed(rows):  # the first on top
        _draw_outline(image, boxes[row], _bytes(colours[row]), line_px, dashed=dashed is not None and dashed[row])

    for px, most in ((text_px, _CROWDED), (round(0.75 * text_px), _BURIED)):
        masks = [_fitted(texts[row], min(px, H // 3), W - 4) for row in rows]
        if sum(mask.size for mask in masks) <= most * H * W:
            _draw_texts(image, inside[rows], masks, [colours[row] for row in rows])
            return


def _draw_texts(image: np.ndarray, boxes: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[Colour]) -> None:
    """The text of each box inside the image, where it has one, on a plate of its colour, where there is room for it."""
    H, W, _ = image.shape
    taken = np.empty((0, 4))
    for box, mask, colour in zip(boxes, masks, colours):
        if not mask.size:
            continue
        plate = _free_place(box, mask.shape[1] + 4, mask.shape[0], (W, H), taken, boxes)
        if plate is not None:
            taken = np.vstack([taken, plate])
            left, top, right, bottom = plate
            image[top:bottom, left:right] = _bytes(colour)
            _blend(image[top:bottom, left + 2 : right - 2], mask, ink_on(colour))


def _draw_outline(image: np.ndarray, box: np.ndarray, colour: np.ndarray, line_px: int, *, dashed: bool) -> None:
    """The sides of a box, but those that lie outside the image: there it goes on. White shows between dashes."""
    H, W, _ = image.shape
    left, right = (_stroke(side, line_px, W) for side in box[::2])
    top, bottom = (_stroke(side, line_px, H) for side in box[1::2])
    x = slice(left.start if left else 0, right.stop if right else W)
    y = slice(top.start if top else 0, bottom.stop if bottom else H)
    dash_px = 3 * line_px + 2 if dashed else max(H, W)
    for rows in filter(None, (top, bottom)):
        image[rows, x] = _dashes(colour, x, dash_px)
    for columns in filter(None, (left, right)):
        image[y, columns] = _dashes(colour, y, dash_px)[:, None]


def _stroke(side: float, line_px: int, room: int) -> slice | None:
    """The px that a line about the coordinate `side` covers, moved inside where it lies on the image's border."""
    if not 0 <= side <= room:
        return None
    start = max(min(round(side - line_px / 2), room - line_px), 0)
    return slice(start, min(start + line_px, room))


def _dashes(colour: np.ndarray, span: slice, dash_px: int) -> np.ndarray:
    """(n, 3) the colours along a line."""
    drawn = np.arange(max(span.stop - span.start, 0)) // dash_px % 2 == 0
    return np.where(drawn[:, None], colour, np.uint8(255))


def _free_place(
    box: np.ndarray, width: int, height: int, room: tuple[int, int], taken: np.ndarray, boxes: np.ndarray
) -> np.ndarray | None:
    """Whole px (xyxy) for a text: above its box, inside at the top or bottom, or below; None when all is taken.

    Of these the first that hides least of any box, in steps of a fifth. `room` is the width and height of the image,
    `taken` (n, 4) is where texts already are, and `boxes` (K, 4) are those that are seen.
    """
    left, top, right, bottom = np.rint(box).astype(int)
    corners = np.array(
        [
            (left, top - height),
            (left, top),
            (right - width, top - height),
            (right - width, top),
            (left, bottom),
            (left, bottom - height),
            (right - width, bottom),
            (right - width, bottom - height),
        ]
    )
    corners[:, 0] = corners[:, 0].clip(0, room[0] - width)
    plates = np.concatenate([corners, corners + np.array([width, height])], 1)
    meets = (plates[:, None, :2] < taken[:, 2:]) & (plates[:, None, 2:] > taken[:, :2])  # (8, n, 2)
    free = ~meets.all(2).any(1) & (plates[:, 1] >= 0) & (plates[:, 3] <= room[1])
    if not free.any():
        return None
    sides = np.minimum(plates[:, None, 2:], boxes[:, 2:]) - np.maximum(plates[:, None, :2], boxes[:, :2])
    shares = sides.clip(0).prod(2) / (boxes[:, 2:] - boxes[:, :2]).prod(1)  # (8, K)
    hidden = np.rint(5 * shares).sum(1)
    return plates[np.where(free, hidden, np.inf).argmin()]


def write_image(image: np.ndarray, path: Path) -> None:
    """Encode (H, W, 3) u8 RGB as the suffix of `path` says and write it."""
    done, encoded = cv2.imencode(path.suffix, image[..., ::-1])
    assert done, path
    write_atomic(path, lambda file: file.write(encoded.tobytes()) and None)


# ------------------------------------------------------------------------------------------------------------- text


def write_line(image: np.ndarray, text: str, corner: tuple[int, int], *, text_px: int, width: int, ink: Colour) -> None:
    """Write onto `image` from the top left `corner` (x, y) on, `width` px at most, shortened where it is longer."""
    x, y = corner
    mask = _fitted(text, text_px, min(width, image.shape[1] - x))[: max(image.shape[0] - y, 0)]
    _blend(image[y : y + mask.shape[0], x : x + mask.shape[1]], mask, ink)


def text_width(text: str, text_px: int) -> int:
    return _fitted(text, text_px, 10**6).shape[1]


def line_height(text_px: int) -> int:
    """Px from the top of a line of text, accents included, to its bottom, descenders included."""
    return math.ceil(1.3 * text_px)


def _blend(pixels: np.ndarray, mask: np.ndarray, ink: Colour) -> None:
    share = mask[..., None] / np.float32(255)
    pixels[:] = np.rint(pixels + share * (_bytes(ink) - pixels.astype(np.float32))).astype(np.uint8)


def _fitted(text: str, text_px: int, width: int) -> np.ndarray:
    """(h, w) u8 coverage of a line of text, w <= width; empty where there is no room for any of it.

    What is too long ends in an ellipsis. A number at its end stays, and is rendered by itself: names and scores recur,
    but seldom together.
    """
    if not text or text_px < _LEAST_TEXT_PX:
        return np.empty((0, 0), np.uint8)
    name, space, number = text.rpartition(" ")
    if not (space and len(number) < 8 and number.isascii() and number[:1].isdigit()):
        return _shortened(text, text_px, width)
    end = _rendered(f" {number}", text_px)
    start = _shortened(name, text_px, width - end.shape[1])
    return np.hstack([start, end]) if start.size else _shortened(text, text_px, width)


@lru_cache(4096)
def _shortened(text: str, text_px: int, width: int) -> np.ndarray:
    """The mask of `text`, or of its beginning and an ellipsis, where at least a letter of it fits; or an empty one."""
    if len(text) > _MOST_LETTERS:
        text = text[:_MOST_LETTERS] + "…"
    mask, kept = _rendered(text, text_px), len(text) - 1
    while mask.shape[1] > width and kept > 0:
        mask = _rendered(f"{text[:kept].rstrip()}…", text_px)
        kept = min(kept - 1, int(kept * width / mask.shape[1]) + 1)
    return mask if mask.shape[1] <= width else np.empty((0, 0), np.uint8)


@lru_cache(4096)
def _rendered(text: str, text_px: int) -> np.ndarray:
    """(line_height, w) u8, read-only."""
    text = _printable(text)
    with quiet_matplotlib():
        from matplotlib.backends.backend_agg import RendererAgg

        font = _font(text_px)
        width, _, _ = RendererAgg(1, 1, 72).get_text_width_height_descent(text, font, ismath=False)
        renderer = RendererAgg(max(math.ceil(width), 1), line_height(text_px), 72)
        renderer.draw_text(renderer.new_gc(), 0, text_px, text, font, 0)
    mask = np.asarray(renderer.buffer_rgba())[..., 3].copy()
    mask.flags.writeable = False
    return mask


@lru_cache(64)
def _font(text_px: int) -> FontProperties:
    from matplotlib.font_manager import FontProperties

    return FontProperties(family=font_families(), size=text_px)


@lru_cache(1)
def font_families() -> list[str]:
    """For names in any script: matplotlib's own font, then those installed that have what it lacks."""
    with quiet_matplotlib():
        from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _WIDER_FONTS if name in installed)]


@contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """No notice while matplotlib builds its font cache, no warning about a glyph that its fonts lack.

    One thread at a time: what is silenced here belongs to the process.
    """
    with _SILENCE, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        logger = logging.getLogger("matplotlib")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
