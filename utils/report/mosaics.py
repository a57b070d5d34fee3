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
from utils.report.annotate import Colour, class_colour, draw_boxes, short_name, text_width, write_image, write_line
from utils.structures import FALSE_ALARM, HIT, MISSED, JudgedImage, LabelStore

MAX_SIDE_PX = 1920  # of a mosaic

_TEXT_PX, _STRIP_PX, _GAP_PX = 13, 22, 8  # label text, caption strip, space between tiles


# ---------------------------------------------------------------------------------------------------------- batches


def draw_batch(
    images: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    image_of: np.ndarray,
    names: Sequence[str],
    *,
    scores: np.ndarray | None = None,
    captions: Sequence[str] | None = None,
    max_images: int = 16,
    confidence: float = 0.25,
) -> np.ndarray:
    """A mosaic (H, W, 3) u8 RGB of the first `max_images` images with their boxes, names and, where given, scores.

    images (B, 3, H, W) u8 RGB; boxes (T, 4) xyxy px of those images; classes, image_of, scores (T,); captions (B,), of
    which the last path part is shown. Boxes that score below `confidence` are left out. Small images are enlarged so
    that text stays legible. A name that finds no free place is left out: its box still has the colour of the class.
    """
    images = images[:max_images]
    keep = image_of < len(images)
    if scores is not None:
        keep &= scores >= confidence
    mosaic, tiles, scale = _tiled(images)
    for index, tile in enumerate(tiles):
        mine = np.flatnonzero(keep & (image_of == index))
        if scores is not None:
            mine = mine[np.argsort(-scores[mine], kind="stable")]
        texts = [_box_text(names, int(classes[row]), None if scores is None else scores[row]) for row in mine]
        colours = [class_colour(int(classes[row])) for row in mine]
        line_px = _line_px(boxes[mine] * scale)
        draw_boxes(tile.pixels, boxes[mine] * scale, texts, colours, line_px=line_px, text_px=_TEXT_PX)
        if captions is not None:
            tile.caption(Path(captions[index]).name)
    return mosaic


@dataclass(frozen=True)
class _Tile:
    """A part of a mosaic and the strip for captions above it, both views of its px."""

    pixels: np.ndarray  # (h, w, 3) u8 RGB
    strip: np.ndarray  # (s, w, 3)

    def caption(self, text: str, line: int = 0, ink: Colour = (0.13, 0.13, 0.13)) -> None:
        corner = (0, 1 + line * (_STRIP_PX - 3))
        write_line(self.strip, text, corner, text_px=_TEXT_PX, width=self.strip.shape[1], ink=ink)


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


def _tiled(images: np.ndarray) -> tuple[np.ndarray, list[_Tile], float]:
    """A mosaic of images (B, 3, H, W), its tiles, and the scale from image px to its px."""
    B, _, H, W = images.shape
    columns = max(min(math.ceil(math.sqrt(B * H / W)), B), 1)  # about as wide as high
    rows = max(math.ceil(B / columns), 1)
    room = (MAX_SIDE_PX - _GAP_PX) / columns - _GAP_PX, (MAX_SIDE_PX - _GAP_PX) / rows - _GAP_PX - _STRIP_PX
    scale = min(room[0] / W, room[1] / H)
    scale = float(min(int(scale), 4)) if scale >= 1 else scale  # enlarge by whole factors: pixels stay pixels
    size = max(round(H * scale), 1), max(round(W * scale), 1)
    mosaic, tiles = _white_mosaic(B, columns, size, strip_px=_STRIP_PX)
    for tile, image in zip(tiles, images):
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        tile.pixels[:] = cv2.resize(np.ascontiguousarray(image.transpose(1, 2, 0)), size[::-1], interpolation=how)
    return mosaic, tiles, scale


def _box_text(names: Sequence[str], index: int, score: float | None) -> str:
    name = short_name(names[index] if index < len(names) else str(index))
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
