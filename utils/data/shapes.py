"""The embedded data set: small pictures of shapes, drawn on first use, so that nothing need be downloaded to train.

The surprise: an outline is a polygon of V points grown by a radius, and that alone makes every class, from the circle
(V = 1) to the cross (V = 12). Its signed distance gives the label, the smooth edge, the rim and the shadow.
"""

from __future__ import annotations

import colorsys
import math
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.files import cache_folder
from utils.structures import UserError

RECIPE = 2  # raise it with any change of what is drawn, and existing sets are drawn anew
SPLITS = {"train": 512, "val": 128}  # images
SIZES = ((120, 160), (160, 160), (160, 120), (112, 160), (160, 112))  # height, width

_MARKER = "drawn.txt"
_SUBSAMPLES = 4  # per pixel and axis, where visibility and labels are decided
_BACKGROUND_SHARE = 0.08  # of the images hold no shape at all
_MOST_SHAPES = 6
_SMALLEST_PX, _LARGEST_PX = 26.0, 88.0  # longest extent
_LEAST_VISIBLE = 0.7  # of each shape: whatever is drawn can be found, so whatever is drawn is labelled
_HUE_SPREAD = 0.03  # of a class, standard deviation in turns of the colour wheel
_LEAST_CONTRAST = 120.0  # distance in RGB between a shape's colour and what it covers
_STALE_S = 3600.0  # an unfinished folder this old belongs to a process that was killed


# ---- folders ---------------------------------------------------------------------------------------------------------


def ensure_shapes(root: Path) -> Path:
    """The folder that holds the data set: `root`, or one in the user's cache where `root` cannot be written.

    Draws it first, which takes seconds, unless it is there complete and by this recipe. Raises UserError where neither
    folder can be written, or where `root` holds something else.
    """
    if _is_current(root):
        return root
    try:
        draw_shapes(root)
        return root
    except OSError as error:
        refused = f"{root} ({error.strerror or error})"
    cached = cache_folder() / "shapes"
    if _is_current(cached):
        return cached
    try:
        draw_shapes(cached)
    except OSError as error:
        also_refused = f"{cached} ({error.strerror or error})"
        raise UserError(f"the embedded data set can be written neither to {refused} nor to {also_refused}") from None
    return cached


def draw_shapes(root: Path, *, seed: int = 0) -> None:
    """Draw all images and YOLO labels below `root`, which appears at once and complete, or not at all.

    Labels are the same bytes everywhere, images the same for the same OpenCV. An earlier set is replaced. Raises
    OSError where `root` cannot be written, and UserError where it holds anything but such a set.
    """
    root = root.resolve()
    if _is_foreign(root):
        raise UserError(f"{root} is in the way of the embedded data set, which is drawn there: move it elsewhere")
    root.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    unfinished = _scratch_folder(root)
    unfinished.mkdir()
    try:
        _draw_into(unfinished, seed)
        _swap_in(unfinished, root, seed)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _draw_into(folder: Path, seed: int) -> None:
    for number, (split, count) in enumerate(SPLITS.items()):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            picture = draw_picture(np.random.default_rng((seed, number, index)))
            (images / f"{index:03d}.jpg").write_bytes(picture.jpeg)
            (labels / f"{index:03d}.txt").write_bytes(_label_lines(picture).encode())
    (folder / _MARKER).write_bytes(_marker(seed).encode())


def _label_lines(picture: Picture) -> str:
    height, width = picture.shape
    lines = []
    for class_index, (x1, y1, x2, y2) in zip(picture.classes, picture.boxes):
        fractions = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{class_index} " + " ".join(f"{fraction:.6f}" for fraction in fractions) + "\n")
    return "".join(lines)


def _swap_in(finished: Path, root: Path, seed: int) -> None:
    """Rename `finished` to `root`, unless another process has put the same set there in the meantime."""
    for _ in range(10):
        if _is_current(root, seed):
            return
        outdated = _scratch_folder(root)
        with suppress(FileNotFoundError):
            root.rename(outdated)
        try:
            finished.rename(root)
            return
        except OSError:
            if not root.exists():
                raise
            # the other process came between the two renames: look at what it brought
        finally:
            shutil.rmtree(outdated, ignore_errors=True)
    raise OSError(f"others keep replacing {root}")


def _is_current(root: Path, seed: int = 0) -> bool:
    """Whether `root` holds a set by this recipe and seed, with every file of it."""
    try:
        if (root / _MARKER).read_text(encoding="utf-8") != _marker(seed):
            return False
        return all(
            {f"{index:03d}{suffix}" for index in range(count)} <= _names_in(root / kind / split)
            for split, count in SPLITS.items()
            for kind, suffix in (("images", ".jpg"), ("labels", ".txt"))
        )
    except OSError:
        return False


def _marker(seed: int) -> str:
    return f"recipe {RECIPE}, seed {seed}\nDrawn by the program, which may replace it: keep nothing of yours here.\n"


def _is_foreign(root: Path) -> bool:
    """Whether something lies at `root` that is not a set of ours, whole or outdated."""
    try:
        names = _names_in(root)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return root.exists()
    return bool(names) and _MARKER not in names


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _scratch_folder(root: Path) -> Path:
    return root.with_name(f".{root.name}.{uuid.uuid4().hex}")


def _remove_leftovers(root: Path) -> None:
    for folder in root.parent.glob(f".{root.name}.{'?' * 32}"):
        with suppress(FileNotFoundError):  # another process may be tidying too
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


# ---- geometry --------------------------------------------------------------------------------------------------------
# All that a label depends on: exact steps of f32 from coordinates snapped to 1/64 px, so it is the same everywhere.


@dataclass(frozen=True)
class Shape:
    """A polygon grown by a radius: the points within `radius` of it."""

    class_index: int
    vertices: np.ndarray  # (V, 2) f64 px, V >= 1
    radius: float  # px


@dataclass(frozen=True)
class Picture:
    jpeg: bytes
    shape: tuple[int, int]  # height, width
    classes: list[int]
    boxes: np.ndarray  # (N, 4) f64 xyxy px, around the visible part of each shape


def _ring(count: int, *radii: float) -> np.ndarray:
    """(count, 2) points around the origin, at each of `radii` in turn."""
    angles = 2 * math.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _cross(arm: float, half_width: float) -> np.ndarray:
    quarter = np.array([(arm, -half_width), (arm, half_width), (half_width, half_width)])
    turns = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
    return np.concatenate([quarter @ np.reshape(turn, (2, 2)).T for turn in turns])


# name: (vertices, radius), which together reach 1 from the origin
OUTLINES = {
    "circle": (np.zeros((1, 2)), 1.0),
    "triangle": (_ring(3, 0.9), 0.1),
    "square": (_ring(4, 0.92), 0.08),
    "star": (_ring(10, 0.92, 0.38), 0.08),
    "cross": (_cross(0.88, 0.22), 0.08),
}


def signed_distance(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance in px from the outline, negative inside, at the grid of columns `x` (W,) and rows `y` (H,) -> (H, W)."""
    y = y[:, None]
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, x.dtype)  # squared
    inside = np.zeros(nearest.shape, bool)
    for (start_x, start_y), (end_x, end_y) in zip(
        shape.vertices.tolist(), np.roll(shape.vertices, -1, axis=0).tolist()
    ):
        edge_x, edge_y = end_x - start_x, end_y - start_y
        from_x, from_y = x - start_x, y - start_y
        along = np.clip((from_x * edge_x + from_y * edge_y) / ((edge_x**2 + edge_y**2) or 1.0), 0, 1)
        np.minimum(nearest, (from_x - along * edge_x) ** 2 + (from_y - along * edge_y) ** 2, out=nearest)
        spans = (y < start_y) != (y < end_y)  # a ray to the right meets this edge in these rows...
        inside ^= spans & ((from_x * edge_y < from_y * edge_x) == (edge_y > 0))  # ...if it starts left of it
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance) - shape.radius


def _centres(start: int, stop: int, per_pixel: int = 1) -> np.ndarray:
    """((stop - start) * per_pixel,) f32 coordinates of (sub)pixel centres between two pixel borders."""
    return (start + (np.arange((stop - start) * per_pixel) + 0.5) / per_pixel).astype(np.float32)


def random_shape(rng: np.random.Generator, height: int, width: int) -> Shape:
    """A shape of any class, with size, place and angle; up to a part of it may lie outside the image."""
    class_index = int(rng.integers(len(OUTLINES)))
    vertices, radius = list(OUTLINES.values())[class_index]
    scale = math.exp(rng.uniform(math.log(_SMALLEST_PX), math.log(_LARGEST_PX))) / 2
    angle = rng.uniform(0, 2 * math.pi)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = rng.uniform(0, (width, height))
    snapped = np.round((vertices @ turn.T + centre) * 64) / 64  # whatever a platform's cosine does in its last bit
    return Shape(class_index, snapped, round(radius * scale * 64) / 64)


class Scene:
    """Shapes in the order they are painted, and who owns each subpixel."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.shapes: list[Shape] = []
        self.owner = np.full((height * _SUBSAMPLES, width * _SUBSAMPLES), -1, np.int8)
        self.full: list[int] = []  # subpixels of each shape, were it alone on an endless canvas
        self.visible: list[int] = []

    def add(self, shape: Shape) -> bool:
        """Put a shape on top, unless it or one below would be hidden too much. Tells whether it did."""
        (x1, y1), (x2, y2) = _whole_px_around(shape)
        inside = signed_distance(shape, _centres(x1, x2, _SUBSAMPLES), _centres(y1, y2, _SUBSAMPLES)) <= 0
        full = int(inside.sum())
        left, top = max(x1, 0), max(y1, 0)
        right, bottom = min(x2, self.width), min(y2, self.height)
        inside = inside[_span(top - y1, bottom - y1), _span(left - x1, right - x1)]
        region = self.owner[_span(top, bottom), _span(left, right)]
        hidden = np.bincount(region[inside] + 1, minlength=len(self.shapes) + 1)[1:]
        visible = [*(np.array(self.visible, int) - hidden).tolist(), int(inside.sum())]
        if any(part < _LEAST_VISIBLE * whole for part, whole in zip(visible, [*self.full, full])):
            return False
        region[inside] = len(self.shapes)
        self.shapes.append(shape)
        self.full.append(full)
        self.visible = visible
        return True

    def boxes(self) -> np.ndarray:
        """(N, 4) f64 xyxy px around the visible part of each shape. A sliver thinner than a subpixel is not seen."""
        boxes = np.empty((len(self.shapes), 4))
        for index in range(len(self.shapes)):
            mine = self.owner == index
            columns, rows = np.flatnonzero(mine.any(0)), np.flatnonzero(mine.any(1))
            boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes / _SUBSAMPLES


def _whole_px_around(shape: Shape) -> tuple[list[int], list[int]]:
    low = np.floor(shape.vertices.min(0) - shape.radius)
    high = np.ceil(shape.vertices.max(0) + shape.radius)
    return low.astype(int).tolist(), high.astype(int).tolist()


def _span(start: int, stop: int) -> slice:
    return slice(start * _SUBSAMPLES, stop * _SUBSAMPLES)


def random_scene(rng: np.random.Generator) -> Scene:
    scene = Scene(*SIZES[rng.integers(len(SIZES))])
    if rng.random() < _BACKGROUND_SHARE:
        return scene
    wanted = int(rng.integers(1, _MOST_SHAPES + 1))
    for _ in range(20 * wanted):  # tries; a crowded scene may end with fewer, never with none
        scene.add(random_shape(rng, scene.height, scene.width))
        if len(scene.shapes) == wanted:
            break
    return scene


# ---- textures --------------------------------------------------------------------------------------------------------
# (rng, x, y) -> (H, W) f32 in 0..1, where x is (W,) and y (H, 1)


def _plain(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.zeros((y.size, x.size), np.float32)


def _gradient(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    ramp = _along(rng, x, y)
    return (ramp - ramp.min()) / np.ptp(ramp)


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _soft_steps(np.sin(_along(rng, x, y) * (2 * math.pi / rng.uniform(6, 24))), rng.uniform(1, 4))


def _checker(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle, cell = rng.uniform(0, math.pi / 2), rng.uniform(5, 12)
    across = x * math.cos(angle) + y * math.sin(angle)
    down = y * math.cos(angle) - x * math.sin(angle)
    return _soft_steps(np.sin(across * math.pi / cell) * np.sin(down * math.pi / cell), 4)


def _clouds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Noise of several scales, each half as strong as the next coarser one."""
    total = np.zeros((y.size, x.size), np.float32)
    strength = 1.0
    for cells in (3, 6, 12, 24):
        noise = rng.random((cells, cells), dtype=np.float32)
        total += strength * cv2.resize(noise, (x.size, y.size), interpolation=cv2.INTER_CUBIC)
        strength /= 2
    return (total - total.min()) / np.ptp(total)


def _blotches(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _soft_steps(2 * _clouds(rng, x, y) - 1, 6)


def _weave(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    step = math.pi / rng.uniform(2, 5)
    return (2 + np.sin(x * step) + np.sin(y * step)) / 4


def _along(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return x * math.cos(angle) + y * math.sin(angle)


def _soft_steps(wave: np.ndarray, hardness: float) -> np.ndarray:
    return np.clip(0.5 + 0.5 * hardness * wave, 0, 1)


BACKGROUNDS = (_gradient, _stripes, _checker, _clouds, _blotches, _weave)
FILLS = (_plain, _plain, _gradient, _stripes, _clouds, _blotches)


# ---- painting --------------------------------------------------------------------------------------------------------
# A class leans towards a hue of its own, as fruit does, or a minute of training would not tell outlines apart.


def draw_picture(rng: np.random.Generator) -> Picture:
    """Decide a scene and paint it. The scene comes first, so that labels depend on nothing that painting draws."""
    scene = random_scene(rng)
    x, y = _centres(0, scene.width), _centres(0, scene.height)
    canvas = _paint_background(rng, x, y)
    light = rng.uniform(0, 2 * math.pi)  # where shadows fall, one sun for all
    for shape in scene.shapes:
        _paint_shape(rng, canvas, shape, x, y, light)
    jpeg = _photograph(rng, canvas, x, y)
    return Picture(jpeg, (scene.height, scene.width), [shape.class_index for shape in scene.shapes], scene.boxes())


def _paint_background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(H, W, 3) f32 RGB 0..255."""
    texture = BACKGROUNDS[rng.integers(len(BACKGROUNDS))](rng, x, y[:, None])
    first = _random_colour(rng, hue=rng.random(), saturation=(0.05, 0.35), value=(0.3, 0.95))
    second = _nearby_colour(rng, first, 70)
    third = _nearby_colour(rng, first, 50)
    canvas = _blend(np.broadcast_to(first, (*texture.shape, 3)), second, texture)
    return _blend(canvas, third, 0.6 * _clouds(rng, x, y))


def _paint_shape(
    rng: np.random.Generator, canvas: np.ndarray, shape: Shape, x: np.ndarray, y: np.ndarray, light: float
) -> None:
    """Paint one shape over the canvas, in place: shadow, textured face, shading, rim."""
    rows, columns = _window(shape, *canvas.shape[:2])
    canvas, x, y = canvas[rows, columns], x[columns], y[rows]
    distance = signed_distance(shape, x, y)
    colour = _contrasting_colour(rng, canvas[distance < 0].mean(0), hue=shape.class_index / len(OUTLINES))

    drop, softness = rng.uniform(1, 4), rng.uniform(2, 5)
    shift = np.array([[1, 0, drop * math.cos(light)], [0, 1, drop * math.sin(light)]])
    below = cv2.warpAffine(distance, shift, distance.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    canvas *= 1 - rng.uniform(0.15, 0.5) * np.clip(0.5 - below / softness, 0, 1)[..., None]

    texture = FILLS[rng.integers(len(FILLS))](rng, x, y[:, None])
    face = _blend(np.broadcast_to(colour, canvas.shape), _nearby_colour(rng, colour, 60), texture)
    away = x * math.cos(light) + y[:, None] * math.sin(light)  # from the light, in px
    face *= 1 - rng.uniform(0, 0.5) * ((away - away.mean()) / _LARGEST_PX)[..., None]
    if rng.random() < 0.4:
        rim = np.clip(distance + rng.uniform(1.5, 3.5), 0, 1)
        face = _blend(face, colour * rng.choice((0.45, 0.6, 1.5)), rim)
    canvas[:] = _blend(canvas, face, np.clip(0.5 - distance, 0, 1))


def _window(shape: Shape, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that a shape and its shadow reach."""
    (x1, y1), (x2, y2) = _whole_px_around(shape)
    return slice(max(y1 - 8, 0), min(y2 + 8, height)), slice(max(x1 - 8, 0), min(x2 + 8, width))


def _photograph(rng: np.random.Generator, canvas: np.ndarray, x: np.ndarray, y: np.ndarray) -> bytes:
    """What a cheap camera makes of it: uneven light, blur, grain, and the losses of a JPEG."""
    canvas = canvas * (1 - rng.uniform(0, 0.3) * _gradient(rng, x, y[:, None]))[..., None]
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.2, 0.9))
    canvas += rng.uniform(1, 7) * rng.standard_normal(canvas.shape, dtype=np.float32)
    pixels = np.clip(np.round(canvas[..., ::-1]), 0, 255).astype(np.uint8)  # OpenCV writes BGR
    written, jpeg = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(75, 96))))
    assert written
    return jpeg.tobytes()


def _blend(below: np.ndarray, above: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return below + (above - below) * weight[..., None]


def _random_colour(
    rng: np.random.Generator, *, hue: float, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """(3,) f32 RGB 0..255."""
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value))
    return 255 * np.array(rgb, np.float32)


def _nearby_colour(rng: np.random.Generator, colour: np.ndarray, reach: float) -> np.ndarray:
    return np.clip(colour + rng.uniform(-reach, reach, 3), 0, 255).astype(np.float32)


def _contrasting_colour(rng: np.random.Generator, behind: np.ndarray, *, hue: float) -> np.ndarray:
    """The first of ten random colours near `hue` (0..1) that stands out enough, else the one that does most."""
    hues = rng.normal(hue, _HUE_SPREAD, 10)
    colours = np.stack([_random_colour(rng, hue=near, saturation=(0.6, 0.95), value=(0.4, 1.0)) for near in hues])
    contrast = np.linalg.norm(colours - behind, axis=1)
    return colours[np.argmax(np.minimum(contrast, _LEAST_CONTRAST))]
