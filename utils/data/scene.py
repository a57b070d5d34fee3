"""Where base images, boxes and polygons land: layouts on a canvas, and its way to the network; no chance in it.

Upright scenes, as most are, are worked out in plain numbers and with all tiles' boxes at once: a plan must cost next to
nothing beside its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.boxes import box_area, clip_boxes, transform_boxes, transform_points
from utils.data.images import base_shape
from utils.structures import CROWD, LabelStore, Tile

_MIN_SIDE_PX = 2
_MIN_AREA_KEPT = 0.1
_MIN_AREA_KEPT_POLYGON = 0.01
_MAX_ASPECT = 100
_NEAREST_DEPTH = 0.1  # of what a perspective shows; behind the camera all would come out mirrored

Rectangle = tuple[int, int, int, int]  # xyxy px


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A base image on a canvas, of which a part shows. Canvas px."""

    image: int
    scale: tuple[float, float]  # x and y, from source px
    left: int
    top: int
    visible: Rectangle  # never empty


@dataclass(frozen=True, kw_only=True)
class Paste:
    """The object of a box, shown again mirrored left-right across the canvas."""

    laid: Laid  # the image that it comes from
    row: int  # of its box in the LabelStore
    source: np.ndarray  # (4,) f64 xyxy canvas px: what of its box shows there


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Base images laid on a plane, before the random transform. Where pastes lie on one another the later one shows."""

    shape: tuple[int, int]
    laid: tuple[Laid, ...]
    pastes: tuple[Paste, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Warp:
    """A transform from canvas px to network px."""

    matrix: np.ndarray  # (3, 3) f64
    scale: float
    upright: bool  # only scaled and moved


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a canvas gives in the network frame."""

    tiles: tuple[Tile, ...]
    boxes: np.ndarray  # (N, 4) f64 xyxy network px
    classes: np.ndarray  # (N,) i32


# ---- layouts ------------------------------------------------------------------------------------------------------


def letterboxed(store: LabelStore, image: int, shape: tuple[int, int], imgsz: int) -> Canvas:
    """The base image in the middle of a canvas."""
    piece = _Piece.of(store, image, imgsz)
    left, top = (shape[1] - piece.width) // 2, (shape[0] - piece.height) // 2
    return _canvas(shape, [piece.at(left, top, shape, (0, 0, shape[1], shape[0]))])


def mosaic_of_four(store: LabelStore, images: Sequence[int], centre: tuple[int, int], imgsz: int) -> Canvas:
    """Four images, from the top left by rows, meet at `centre` (x, y) of a canvas of twice the size."""
    side = 2 * imgsz
    laid = []
    for quadrant, image in enumerate(images):
        piece = _Piece.of(store, image, imgsz)
        left = centre[0] if quadrant % 2 else centre[0] - piece.width
        top = centre[1] if quadrant // 2 else centre[1] - piece.height
        laid.append(piece.at(left, top, (side, side), (0, 0, side, side)))
    return _canvas((side, side), laid)


def mosaic_of_nine(store: LabelStore, images: Sequence[int], centre: tuple[int, int], imgsz: int) -> Canvas:
    """Nine images, by rows, on a canvas of twice the size; the middle of the fifth lies at `centre` (x, y).

    The edges of the fifth, drawn out, cut the plane into nine cells; every other image fills its cell from the corner,
    or the upper or left end of the edge, that it shares with the fifth, and is cut off where its cell ends.
    """
    side = 2 * imgsz
    pieces = [_Piece.of(store, image, imgsz) for image in images]
    left, top = centre[0] - pieces[4].width // 2, centre[1] - pieces[4].height // 2
    xs, ys = (0, left, left + pieces[4].width, side), (0, top, top + pieces[4].height, side)
    laid = []
    for number, piece in enumerate(pieces):
        row, column = divmod(number, 3)
        x = xs[1] - piece.width if column == 0 else xs[column]
        y = ys[1] - piece.height if row == 0 else ys[row]
        laid.append(piece.at(x, y, (side, side), (xs[column], ys[row], xs[column + 1], ys[row + 1])))
    return _canvas((side, side), laid)


class _Piece(NamedTuple):
    """A base image that is to be laid on a canvas."""

    image: int
    width: int
    height: int
    scale: tuple[float, float]

    @classmethod
    def of(cls, store: LabelStore, image: int, imgsz: int) -> _Piece:
        source_height, source_width = store.sizes[image].tolist()
        height, width = base_shape((source_height, source_width), imgsz)
        return cls(image, width, height, (width / source_width, height / source_height))

    def at(self, left: int, top: int, canvas: tuple[int, int], cell: Rectangle) -> Laid | None:
        """Its top left corner there, cut to a cell of the canvas; None where nothing shows."""
        x1, y1 = max(left, cell[0], 0), max(top, cell[1], 0)
        x2, y2 = min(left + self.width, cell[2], canvas[1]), min(top + self.height, cell[3], canvas[0])
        if x1 >= x2 or y1 >= y2:
            return None
        return Laid(image=self.image, scale=self.scale, left=left, top=top, visible=(x1, y1, x2, y2))


def _canvas(shape: tuple[int, int], laid: Sequence[Laid | None]) -> Canvas:
    return Canvas(shape=shape, laid=tuple(item for item in laid if item is not None))


# ---- labels on the canvas -----------------------------------------------------------------------------------------


def canvas_boxes(store: LabelStore, laid: Laid) -> np.ndarray:
    """(N, 4) f64 boxes of a laid image in canvas px, whole even where they do not show."""
    offset = (laid.left, laid.top, laid.left, laid.top)
    return store.boxes[store.rows(laid.image)] * np.array([*laid.scale, *laid.scale]) + offset


def _canvas_rings(store: LabelStore, row: int, laid: Laid) -> list[np.ndarray]:
    """The polygon of a box in canvas px: (n, 2) f64 for each ring."""
    return [ring * np.array(laid.scale) + (laid.left, laid.top) for ring in store.rings(row)]


def has_polygon(store: LabelStore, rows: slice) -> np.ndarray:
    """(N,) bool."""
    offsets = store.ring_offsets[rows.start : rows.stop + 1]
    return offsets[1:] > offsets[:-1]


def shown_part(boxes: np.ndarray, laid: Laid) -> np.ndarray:
    """(N, 4) boxes in canvas px cut to what shows of their image; where nothing does, without area."""
    x1, y1, x2, y2 = laid.visible
    return np.clip(boxes, (x1, y1, x1, y1), (x2, y2, x2, y2))


# ---- to the network -----------------------------------------------------------------------------------------------


def projected(store: LabelStore, canvas: Canvas, warp: Warp, shape: tuple[int, int]) -> Scene:
    """Tiles of a canvas in an output of `shape` (height, width), and the boxes worth training on."""
    scene = (_upright if warp.upright else _tilted)(store, canvas.laid, warp, shape)
    for paste in canvas.pastes:
        scene = _with_paste(scene, store, paste, canvas.shape[1], warp, shape)
    return scene


def _upright(store: LabelStore, laid: Sequence[Laid], warp: Warp, shape: tuple[int, int]) -> Scene:
    shift_x, shift_y = warp.matrix[:2, 2].tolist()
    tiles, rows, frames = [], [], []
    for item in laid:
        across = _span(item.visible[0], item.visible[2], item.left, warp.scale, shift_x, shape[1])
        down = _span(item.visible[1], item.visible[3], item.top, warp.scale, shift_y, shape[0])
        if across is None or down is None:
            continue
        tiles.append(_upright_tile(item.image, across, down))
        rows.append(store.rows(item.image))
        gain_x, gain_y = across.zoom * item.scale[0], down.zoom * item.scale[1]
        frames.append(
            (
                (gain_x, gain_y, gain_x, gain_y),
                (across.shift, down.shift, across.shift, down.shift),
                (across.low, down.low, across.low, down.low),
                (across.high, down.high, across.high, down.high),
            )
        )
    if not tiles:
        return Scene(tiles=(), boxes=np.empty((0, 4)), classes=np.empty(0, np.int32))
    counts = [part.stop - part.start for part in rows]
    gain, offset, low, high = np.repeat(np.array(frames).transpose(1, 0, 2), counts, axis=1)  # (N, 4) each
    moved = np.concatenate([store.boxes[part] for part in rows]) * gain + offset
    boxes = np.minimum(np.maximum(moved, low), high)
    keep = _worth_training(boxes, box_area(moved), store, rows)
    classes = np.concatenate([store.classes[part] for part in rows])
    return Scene(tiles=tuple(tiles), boxes=boxes[keep], classes=classes[keep])


class _Span(NamedTuple):
    """Along one side: base px `first` to `last` fill network px `low` to `high`, through `zoom` and `shift`."""

    low: int
    high: int
    first: int
    last: int
    zoom: float
    shift: float


def _span(start: int, stop: int, origin: int, scale: float, shift: float, side: int) -> _Span | None:
    """What canvas px `start` to `stop`, of an image that begins at `origin`, give on a side of the output; all whole.

    Neighbours share canvas edges, so rounding leaves neither gap nor overlap. Where the output cuts an image, so does
    the crop, at the nearest whole px. None: nothing shows.
    """
    exact_low, exact_high = scale * start + shift, scale * stop + shift
    low, high = max(round(exact_low), 0), min(round(exact_high), side)
    if high <= low:
        return None
    first, last = start, stop
    if exact_low < 0:
        first = min(max(round(-shift / scale), start), stop - 1)
    if exact_high > side:
        last = max(min(round((side - shift) / scale), stop), first + 1)
    first, last = first - origin, last - origin
    zoom = (high - low) / (last - first)
    return _Span(low, high, first, last, zoom, low - zoom * first)


def _upright_tile(image: int, x: _Span, y: _Span) -> Tile:
    matrix = (x.zoom, 0, x.shift, 0, y.zoom, y.shift, 0, 0, 1)  # flat: nested tuples take numpy twice as long
    corners = (x.low, y.low, x.high, y.low, x.high, y.high, x.low, y.high)
    return Tile(
        image=image,
        matrix=np.array(matrix, np.float64).reshape(3, 3),
        corners=np.array(corners, np.float64).reshape(4, 2),
        crop=(x.first, y.first, x.last, y.last),
    )


def _tilted(store: LabelStore, laid: Sequence[Laid], warp: Warp, shape: tuple[int, int]) -> Scene:
    tiles, boxes, classes = [], [np.empty((0, 4))], [np.empty(0, np.int32)]
    for item in laid:
        corners = _moved_corners(item.visible, warp.matrix)
        if corners is None or not _shows(corners, shape):
            continue
        matrix = warp.matrix @ _translation(item.left, item.top)
        tiles.append(Tile(image=item.image, matrix=matrix, corners=corners, crop=None))
        rows = store.rows(item.image)
        laid_boxes = canvas_boxes(store, item)
        shown = shown_part(laid_boxes, item)
        moved = clip_boxes(transform_boxes(shown, warp.matrix), shape)
        polygons = has_polygon(store, rows)
        for number in np.flatnonzero(polygons):
            rings = _canvas_rings(store, rows.start + int(number), item)
            moved[number] = _box_of_rings(rings, item.visible, warp.matrix, shape)
        full = box_area(laid_boxes)
        keep = _worth_training(moved, full * warp.scale**2, store, [rows])
        # tilted, even a line lies in a box with an area
        keep &= box_area(shown) > np.where(polygons, _MIN_AREA_KEPT_POLYGON, _MIN_AREA_KEPT) * full
        boxes.append(moved[keep])
        classes.append(store.classes[rows][keep])
    return Scene(tiles=tuple(tiles), boxes=np.concatenate(boxes), classes=np.concatenate(classes))


def _with_paste(
    scene: Scene, store: LabelStore, paste: Paste, canvas_width: int, warp: Warp, shape: tuple[int, int]
) -> Scene:
    """The scene with an object shown again on top, and its box."""
    matrix = warp.matrix @ np.array([[-1, 0, canvas_width], [0, 1, 0], [0, 0, 1]])
    corners = _moved_corners(paste.source, matrix)
    if corners is None or not _shows(corners, shape):
        return scene
    rings = _canvas_rings(store, paste.row, paste.laid)
    tile = Tile(
        image=paste.laid.image,
        matrix=matrix @ _translation(paste.laid.left, paste.laid.top),
        corners=corners,
        crop=None,
        rings=tuple(transform_points(ring, matrix) for ring in rings),
    )
    if warp.upright:
        box = clip_boxes(transform_boxes(paste.source[None], matrix), shape)
    else:
        box = _box_of_rings(rings, paste.source, matrix, shape)[None]
    row = slice(paste.row, paste.row + 1)
    full = box_area(canvas_boxes(store, paste.laid)[[paste.row - store.rows(paste.laid.image).start]])
    keep = _worth_training(box, full * warp.scale**2, store, [row])
    return Scene(
        tiles=(*scene.tiles, tile),
        boxes=np.concatenate([scene.boxes, box[keep]]),
        classes=np.concatenate([scene.classes, store.classes[row][keep]]),
    )


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _moved_corners(rectangle: Sequence[float], matrix: np.ndarray) -> np.ndarray | None:
    """(4, 2) corners of xyxy through the matrix, clockwise from the top left; None: in part behind the camera."""
    x1, y1, x2, y2 = rectangle
    corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)
    if (corners @ matrix[2, :2] + matrix[2, 2] <= _NEAREST_DEPTH).any():
        return None
    return transform_points(corners, matrix)


def _shows(corners: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether a convex polygon reaches into an output; none of its pixels need be decoded or drawn otherwise."""
    return len(_clipped(corners, (0, 0, shape[1], shape[0]))) > 2


def _box_of_rings(
    rings: Sequence[np.ndarray], visible: Sequence[float], matrix: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """(4,) the box around what shows of a polygon in canvas px, tighter than that of its moved box; else zeros."""
    shown = [_clipped(ring, visible) for ring in rings]
    moved = [_clipped(transform_points(ring, matrix), (0, 0, shape[1], shape[0])) for ring in shown if len(ring)]
    points = np.concatenate([np.empty((0, 2)), *moved])
    return np.concatenate([points.min(0), points.max(0)]) if len(points) else np.zeros(4)


def _clipped(points: np.ndarray, rectangle: Sequence[float]) -> np.ndarray:
    """(m, 2) a polygon cut to xyxy, side by side of it (Sutherland and Hodgman, CACM 1974)."""
    for axis, sign, limit in ((0, 1, rectangle[0]), (1, 1, rectangle[1]), (0, -1, rectangle[2]), (1, -1, rectangle[3])):
        inside = sign * (points[:, axis] - limit)  # >= 0 within
        if len(points) == 0 or inside.min() >= 0:
            continue
        following, beyond = np.roll(points, -1, axis=0), np.roll(inside, -1)
        crosses = (inside >= 0) != (beyond >= 0)
        share = np.divide(inside, inside - beyond, out=np.zeros_like(inside), where=crosses)
        both = np.stack([points, points + share[:, None] * (following - points)], axis=1)  # (n, 2, 2) point, crossing
        points = both[np.stack([inside >= 0, crosses], axis=1)]
    return points


def covered_shares(boxes: np.ndarray, covers: Sequence[Rectangle]) -> np.ndarray:
    """(N,) the share of each box that lies under at least one of the rectangles."""
    rectangles = np.array(covers, np.float64)  # (M, 4)
    xs, ys = np.unique(rectangles[:, 0::2]), np.unique(rectangles[:, 1::2])
    # between two neighbouring edges, a rectangle covers all or nothing
    in_columns = (rectangles[:, :1] <= xs[:-1]) & (xs[1:] <= rectangles[:, 2:3])  # (M, columns)
    in_rows = (rectangles[:, 1:2] <= ys[:-1]) & (ys[1:] <= rectangles[:, 3:])
    cells = (in_rows[:, :, None] & in_columns[:, None]).any(0)  # (rows, columns)
    widths = np.diff(np.clip(xs, boxes[:, :1], boxes[:, 2:3]), axis=1)  # (N, columns) of a box
    heights = np.diff(np.clip(ys, boxes[:, 1:2], boxes[:, 3:]), axis=1)
    return ((heights @ cells) * widths).sum(1) / box_area(boxes)


def _worth_training(boxes: np.ndarray, full_area: np.ndarray, store: LabelStore, rows: Sequence[slice]) -> np.ndarray:
    """(N,) bool: no crowd, large enough, not a sliver, and enough left of the `full_area` before clipping.

    `rows` are those of the boxes in the store.
    """
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shorter = np.minimum(width, height)
    share = _MIN_AREA_KEPT
    if len(store.points):
        polygons = np.concatenate([has_polygon(store, part) for part in rows])
        share = np.where(polygons, _MIN_AREA_KEPT_POLYGON, _MIN_AREA_KEPT)
    return (
        (shorter > _MIN_SIDE_PX)
        & (width * height > share * full_area)
        & (np.maximum(width, height) < _MAX_ASPECT * shorter)
        & (np.concatenate([store.ignore[part] for part in rows]) != CROWD)
    )
