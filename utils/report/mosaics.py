"""Mosaics of images with boxes: batches as the network sees them, and the images with most mistakes.

Nothing to show gives a picture that says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.data.images import ImageError, decode_image, quiet_opencv
from utils.data.probe import overheard
from utils.report.annotate import class_colour, class_name, draw_boxes, text_width, write_image, write_line
from utils.structures import FALSE_ALARM, HIT, MISSED, JudgedImage, LabelStore

MAX_SIDE_PX = 1920  # of a mosaic
PAIRS_PX, MAX_PAIRS = 1600, 8  # sides, and images, of one that is drawn again and again
SHOWN_CONFIDENCE = 0.25  # detections below it are not drawn

_TEXT_PX, _STRIP_PX, _GAP_PX = 13, 22, 8  # label text, caption strip, space between tiles
_TITLE_PX, _HEAD_PX = 14, 26  # text above a mosaic, and the room for it
_INK = (0.13, 0.13, 0.13)
_SMALL_PX = 320  # the side up to which images are enlarged


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class DrawnBoxes:
    """Boxes on the images of a batch: labels, or detections with scores."""

    boxes: np.ndarray  # (T, 4) xyxy px of the images
    classes: np.ndarray  # (T,)
    image_of: np.ndarray  # (T,)
    scores: np.ndarray | None = None  # (T,)

    def of(self, image: int) -> np.ndarray:
        """The rows that are drawn onto this image: all labels, or what is confident, the surest first."""
        rows = np.flatnonzero(self.image_of == image)
        if self.scores is None:
            return rows
        rows = rows[self.scores[rows] >= SHOWN_CONFIDENCE]
        return rows[np.argsort(-self.scores[rows], kind="stable")]


def draw_batch(
    images: np.ndarray,
    shown: DrawnBoxes,
    names: Sequence[str],
    *,
    title: str = "",
    captions: Sequence[str] | None = None,
    max_images: int = 16,
) -> np.ndarray:
    """A mosaic (H, W, 3) u8 RGB of the first `max_images` images with their boxes, names and, where given, scores.

    images (B, 3, H, W) u8 RGB; captions (B,), of which the last path part is shown. Boxes that score below
    `SHOWN_CONFIDENCE` are left out. Small images are enlarged so that text stays legible. A name that finds no free
    place is left out: its box still has the colour of the class.
    """
    images = images[:max_images]
    strip_px, head_px = _STRIP_PX if captions is not None else 0, _HEAD_PX if title else 0
    columns, scale = _arranged(len(images), images.shape[2:], MAX_SIDE_PX, strip_px=strip_px, head_px=head_px)
    size = _scaled(images, scale)
    mosaic, tiles = _white_mosaic(len(images), columns, size, strip_px=strip_px, head_px=head_px)
    if title:
        write_line(mosaic, title, (_GAP_PX, 6), text_px=_TITLE_PX, width=mosaic.shape[1] - 2 * _GAP_PX, ink=_INK)
    for index, (tile, image) in enumerate(zip(tiles, images)):
        tile.pixels[:] = _resized(image, size)
        _draw_on(tile, shown, index, scale, names)
        if captions is not None:
            tile.caption(Path(captions[index]).name)
    return mosaic


def draw_pairs(
    images: np.ndarray, labels: DrawnBoxes, found: DrawnBoxes, names: Sequence[str], captions: Sequence[str]
) -> np.ndarray:
    """A mosaic of the first images twice each: with labels, and to the right of it with what was found.

    As `draw_batch`, but at most `MAX_PAIRS` images and `PAIRS_PX` px wide and high.
    """
    images = images[:MAX_PAIRS]
    B, _, H, W = images.shape
    columns, scale = _arranged(B, (H, 2 * W), PAIRS_PX, strip_px=_STRIP_PX)
    height, width = size = _scaled(images, scale)
    mosaic, tiles = _white_mosaic(B, columns, (height, 2 * width), strip_px=_STRIP_PX)
    for index, (tile, image) in enumerate(zip(tiles, images)):
        left, right = tile.part(slice(0, width)), tile.part(slice(width, 2 * width))
        left.pixels[:] = right.pixels[:] = _resized(image, size)
        there, seen = (_draw_on(side, shown, index, scale, names) for side, shown in ((left, labels), (right, found)))
        left.caption(f"{there:,} label{'s' * (there != 1)}: {Path(captions[index]).name}")
        right.caption(f"{seen:,} predicted, confidence from {SHOWN_CONFIDENCE:g}")
        right.pixels[:, :2] = 255  # a line between the two
    return mosaic


def _draw_on(tile: _Tile, shown: DrawnBoxes, image: int, scale: float, names: Sequence[str]) -> int:
    """Says how many."""
    rows = shown.of(image)
    boxes, classes = shown.boxes[rows] * scale, shown.classes[rows].tolist()
    scores = [None] * len(rows) if shown.scores is None else shown.scores[rows].tolist()
    texts = [_box_text(names, one, score) for one, score in zip(classes, scores)]
    colours = [class_colour(one) for one in classes]
    draw_boxes(tile.pixels, boxes, texts, colours, line_px=_line_px(boxes), text_px=_TEXT_PX)
    return len(rows)


@dataclass(frozen=True)
class _Tile:
    """A part of a mosaic and the strip for captions above it, both views of its px."""

    pixels: np.ndarray  # (h, w, 3) u8 RGB
    strip: np.ndarray  # (s, w, 3)

    def caption(self, text: str, line: int = 0) -> None:
        corner = (0, 1 + line * (_STRIP_PX - 3))
        write_line(self.strip, text, corner, text_px=_TEXT_PX, width=self.strip.shape[1] - _GAP_PX, ink=_INK)

    def part(self, columns: slice) -> _Tile:
        return _Tile(self.pixels[:, columns], self.strip[:, columns])


def _white_mosaic(
    count: int, columns: int, size: tuple[int, int], *, strip_px: int, head_px: int = 0
) -> tuple[np.ndarray, list[_Tile]]:
    """A mosaic (H, W, 3) of `count` tiles of `size` (height, width), and below a head, row by row."""
    height, width = size
    down, right = height + _GAP_PX + strip_px, width + _GAP_PX
    rows = max(math.ceil(count / columns), 1)
    mosaic = np.full((head_px + rows * down + _GAP_PX, columns * right + _GAP_PX, 3), 255, np.uint8)
    tiles = []
    for index in range(count):
        x, y = _GAP_PX + index % columns * right, head_px + _GAP_PX + strip_px + index // columns * down
        tiles.append(_Tile(mosaic[y : y + height, x : x + width], mosaic[y - strip_px : y, x : x + width]))
    return mosaic, tiles


def _arranged(
    count: int, image: tuple[int, int], side_px: int, *, strip_px: int, head_px: int = 0
) -> tuple[int, float]:
    """The number of columns, and the scale, that show `count` images (height, width) largest in a square of `side_px`.

    Small images are enlarged by whole factors: pixels stay pixels.
    """
    height, width = image
    most = max(4, _SMALL_PX // max(height, width))

    def scale(columns: int) -> float:
        room_y = (side_px - head_px - _GAP_PX) / math.ceil(count / columns) - _GAP_PX - strip_px
        largest = min(((side_px - _GAP_PX) / columns - _GAP_PX) / width, room_y / height)
        return min(int(largest), most) if largest >= 1 else largest

    def unevenness(columns: int) -> float:
        return abs(math.log(columns * width / (math.ceil(count / columns) * height)))

    columns = max(range(1, max(count, 1) + 1), key=lambda columns: (scale(columns), -unevenness(columns)))
    return columns, scale(columns)


def _scaled(images: np.ndarray, scale: float) -> tuple[int, int]:
    """The height and width of a tile for images (B, 3, H, W)."""
    height, width = (
        max(int(side * scale + 1e-6), 1) for side in images.shape[2:]
    )  # cut off, not rounded: all of them fit
    return height, width


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(3, H, W) as (h, w, 3) of this height and width."""
    how = cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_NEAREST
    return cv2.resize(np.ascontiguousarray(image.transpose(1, 2, 0)), size[::-1], interpolation=how)


def _box_text(names: Sequence[str], index: int, score: float | None) -> str:
    name = class_name(names, index)
    return name if score is None else f"{name} {score:.2f}"


def _line_px(boxes: np.ndarray) -> int:
    """Thin lines where boxes are many or small, so that they do not hide what they are about."""
    if not len(boxes):
        return 2
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1))
    return 1 if len(boxes) > 30 or np.median(sides) < 20 else 2


# ------------------------------------------------------------------------------------------------ the worst images

# Colours of Okabe and Ito, told apart by every kind of colour blindness; so are the lines
_GOOD, _FALSE, _MISSED = ((0, 158 / 255, 115 / 255), (213 / 255, 94 / 255, 0), (0, 80 / 255, 200 / 255))
_WORST_STRIP_PX, _WORST_HEAD_PX = 42, 64
_MOST_FALSE = 30  # drawn in an image; a network that knows nothing yet says several hundred


def plot_worst(
    judged: Sequence[JudgedImage],
    store: LabelStore,
    names: Sequence[str],
    path: Path,
    *,
    confidence: float | None = None,
) -> None:
    """A mosaic of images with what was found, what is false, and what was missed in them, at this confidence.

    An image whose file is gone or has changed is a grey tile that says so. Without labels nothing can be judged.
    """
    if not len(store.classes):
        judged = ()
    columns = {0: 1, 1: 1, 2: 2, 3: 2, 4: 2}.get(len(judged), 3)
    width = (MAX_SIDE_PX - _GAP_PX) // max(columns, 2) - _GAP_PX
    sizes = np.array([store.sizes[one.image] for one in judged]).reshape(-1, 2)
    ratio = float(np.clip(np.median(sizes[:, 0] / sizes[:, 1]), 0.5, 1.5)) if len(sizes) else 0.2
    mosaic, tiles = _white_mosaic(
        max(len(judged), 1),
        columns,
        (round(width * ratio), width),
        strip_px=_WORST_STRIP_PX if judged else 0,
        head_px=_WORST_HEAD_PX,
    )
    _draw_head(mosaic[:_WORST_HEAD_PX, _GAP_PX:-_GAP_PX], confidence)
    with quiet_opencv(), overheard():  # a damaged image has been told of by the scan
        for one, tile in zip(judged, tiles):
            _draw_judged(tile, one, store, names)
    if not judged:
        nothing = "Nothing missed, and nothing false" if len(store.classes) else "No labels to judge by"
        _write_centred(tiles[0].pixels, nothing)
    write_image(mosaic, path)


def _draw_head(head: np.ndarray, confidence: float | None) -> None:
    """What the picture shows, and how to read it."""
    at = "" if confidence is None else f", at confidence {confidence:.3f} and IoU .5"
    write_line(head, f"Images with the most mistakes{at}", (0, 6), text_px=16, width=head.shape[1], ink=(0, 0, 0))
    x = 0
    for text, colour, verdict in (
        ("found", _GOOD, HIT),
        ("false: found, and not labelled", _FALSE, FALSE_ALARM),
        ("missed: labelled, and not found", _MISSED, MISSED),
    ):
        sample = np.array([[x + 1, 40, x + 27, 56]])
        line_px = 1 if verdict == HIT else 3
        draw_boxes(head, sample, [""], [colour], line_px=line_px, text_px=0, dashed=[verdict == MISSED])
        write_line(head, text, (x + 36, 39), text_px=_TEXT_PX, width=head.shape[1] - x - 36, ink=(0, 0, 0))
        x += 36 + text_width(text, _TEXT_PX) + 30


def _draw_judged(tile: _Tile, judged: JudgedImage, store: LabelStore, names: Sequence[str]) -> None:
    """An image with its boxes: the mistakes above the rest."""
    missed, false, hits = (int((judged.verdicts == verdict).sum()) for verdict in (MISSED, FALSE_ALARM, HIT))
    tile.caption(Path(store.path(judged.image)).name)
    surest = f" ({_MOST_FALSE} surest shown)" if false > _MOST_FALSE else ""
    tile.caption(f"{missed:,} missed, {false:,} false{surest}, {hits:,} found", line=1)
    try:
        image = decode_image(store.path(judged.image))
        if image.shape[:2] != tuple(store.sizes[judged.image]):
            raise ImageError("no longer the image that was evaluated")
    except ImageError as error:
        tile.pixels[:] = 200
        _write_centred(tile.pixels, f"cannot be shown: {error}")
        return
    room, (height, width) = tile.pixels.shape, image.shape[:2]
    scale = min(room[0] / height, room[1] / width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = tile.pixels[: size[1], : size[0]]
    pixels[:] = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)[..., ::-1]
    _draw_verdicts(pixels, judged, judged.boxes * scale, names)


def _draw_verdicts(pixels: np.ndarray, judged: JudgedImage, boxes: np.ndarray, names: Sequence[str]) -> None:
    good = judged.verdicts == HIT
    draw_boxes(pixels, boxes[good], [""] * good.sum(), [_GOOD] * good.sum(), line_px=1, text_px=0)
    rows = np.flatnonzero(~good)
    rows = rows[np.lexsort((-np.nan_to_num(judged.scores[rows]), judged.verdicts[rows]))]
    rows = np.delete(rows, slice(_MOST_FALSE, max(np.sum(judged.verdicts == FALSE_ALARM), _MOST_FALSE)))
    false = judged.verdicts[rows] == FALSE_ALARM
    texts = [
        f"false: {_box_text(names, int(judged.classes[row]), judged.scores[row])}"
        if judged.verdicts[row] == FALSE_ALARM
        else f"missed: {_box_text(names, int(judged.classes[row]), None)}"
        for row in rows
    ]
    colours = [_FALSE if one else _MISSED for one in false]
    line_px = 3 if len(rows) <= 12 else _line_px(boxes[rows])
    draw_boxes(pixels, boxes[rows], texts, colours, line_px=line_px, text_px=_TEXT_PX, dashed=~false)


def _write_centred(pixels: np.ndarray, text: str) -> None:
    corner = (max((pixels.shape[1] - text_width(text, _TEXT_PX + 1)) // 2, 4), max(pixels.shape[0] // 2 - 10, 0))
    write_line(pixels, text, corner, text_px=_TEXT_PX + 1, width=pixels.shape[1] - corner[0], ink=(0.2, 0.2, 0.2))
