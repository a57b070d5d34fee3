"""Paints a batch of plans with torch, on any device: `pack` on the CPU, then `paint`, the device's part.

Which tile shows at which pixel is decided in `pack`, with whole numbers that the device only spreads out; there, every
pixel is looked up once, however many tiles lie over each other, and nothing waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.coverage import convex_spans, within_rings, within_spans
from utils.data.images import ImageSource
from utils.data.plan import PADDING
from utils.data.scene import Rectangle
from utils.structures import QuadPlan, SamplePlan, Tile, UserError

_CHUNK_PX = 16 * 640 * 640  # painted at once, with up to 170 bytes of the device for each
_MOST_INT32 = 2**31 - 1
_NO_IMAGE = -1
_SIXTH = 30  # steps of OpenCV's 8-bit hue in a sixth of the colour circle
Allocate = Callable[[tuple[int, ...]], Tensor]  # shape -> u8 of any content


@dataclass(frozen=True, kw_only=True)
class PackedPlans:
    """All that the pixels of B pictures depend on, as CPU tensors that may travel between processes and to a device.

    A surface is what one tile shows of its base image, a cutout, or the padding of one picture. Behind the B pictures
    come the partners that M of them are mixed with; runs go through the pixels of each, row by row.
    """

    shape: tuple[int, int]  # height, width
    texels: Tensor  # (P, 3) u8 BGR: for each surface a rectangle of its base image, row by row
    parts: Tensor  # (3, S) i32 or i64: where a surface's texels start, their width and height
    matrices: Tensor  # (9, S) f32: column and row of a pixel -> column and row of a texel
    shares: Tensor  # (S,) f32: of a surface, when its picture is mixed; the partner has the rest
    looks: Tensor  # (S,) i32: its picture's place in `colours`; -1: it shows as it is
    colours: Tensor  # (C, 5, 256) u8, see `_colour_table`
    runs: Tensor  # (2, R) i32: how many pixels in a row show which surface
    mixed: Tensor  # (M,) i64, ascending: the pictures that are mixed
    run_offsets: tuple[int, ...]  # (B + M + 1), of the pictures in `runs`
    mixed_pictures: tuple[int, ...]  # `mixed`, for those who must not wait for a device
    projective: bool  # the last rows of `matrices` matter

    def __len__(self) -> int:
        return len(self.run_offsets) - 1 - len(self.mixed_pictures)

    def to(self, device: torch.device | str) -> PackedPlans:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedPlans:
        return self._each(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> None:
        """As Batch.share_memory."""
        self._each(lambda tensor: tensor.share_memory_())

    def _each(self, move: Callable[[Tensor], Tensor]) -> PackedPlans:
        return replace(self, **{name: move(item) for name, item in vars(self).items() if isinstance(item, Tensor)})


@dataclass(frozen=True, kw_only=True)
class PackedQuads:
    """QuadPlans: the samples of the merged ones, four each, then those that fill a picture of their own."""

    samples: PackedPlans
    merged: int
    order: Tensor  # (B,) i64: the place of each picture among the merged and then the enlarged ones

    def to(self, device: torch.device | str) -> PackedQuads:
        return replace(self, samples=self.samples.to(device), order=self.order.to(device, non_blocking=True))

    def pin_memory(self) -> PackedQuads:
        return replace(self, samples=self.samples.pin_memory(), order=self.order.pin_memory())

    def share_memory(self) -> None:
        self.samples.share_memory()
        self.order.share_memory_()


# ---- packing, on the CPU


@dataclass(frozen=True, kw_only=True)
class _Surface:
    part: Rectangle  # xyxy px of the base image, perhaps a px beyond its edges, which go on there
    matrix: np.ndarray  # (3, 3) f64, column and row of a pixel -> of a texel of the part
    image: int = _NO_IMAGE
    colour: tuple[int, int, int] | None = None  # BGR, in place of an image
    look: int = -1
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _Picture:
    surfaces: list[_Surface]
    lengths: np.ndarray  # (r,) of runs of pixels
    owners: np.ndarray  # (r,) into surfaces


def pack(
    plans: Sequence[SamplePlan] | Sequence[QuadPlan], base_image_of: ImageSource, allocate: Allocate | None = None
) -> PackedPlans | PackedQuads:
    """What painting the plans, all of one shape, takes: of each base image what shows, and who owns which pixels.

    What shows of the base images is copied into what `allocate` yields. Raises UserError for transforms of
    albumentations, which know OpenCV's pictures alone.
    """
    if isinstance(plans[0], QuadPlan):
        return _pack_quads(plans, base_image_of, allocate)
    return _pack_samples(plans, base_image_of, allocate)


def _pack_samples(plans: Sequence[SamplePlan], base_image_of: ImageSource, allocate: Allocate | None) -> PackedPlans:
    if any(plan.pixels is not None for plan in plans):
        raise UserError(
            "'albumentations' of the hyperparameters: only what loader processes paint can have them, not a device"
        )
    looks = np.cumsum([plan.hsv is not None for plan in plans]) - 1
    pictures = [
        _picture(plan, plan.tiles, look=int(look) if plan.hsv is not None else -1) for plan, look in zip(plans, looks)
    ]
    mixed = [index for index, plan in enumerate(plans) if plan.mix is not None]
    pictures += [_picture(replace(plans[index], cutouts=()), plans[index].mix.tiles) for index in mixed]
    surfaces = [surface for picture in pictures for surface in picture.surfaces]
    counts = np.cumsum([0] + [len(picture.surfaces) for picture in pictures])
    owners = [picture.owners + first for picture, first in zip(pictures, counts)]
    runs = np.stack([np.concatenate([picture.lengths for picture in pictures]), np.concatenate(owners)])
    texels, parts = _texels(surfaces, base_image_of, allocate)
    matrices = np.stack([surface.matrix.ravel() for surface in surfaces], axis=1)
    tables = [_colour_table(plan.hsv) for plan in plans if plan.hsv is not None]
    return PackedPlans(
        shape=plans[0].shape,
        texels=texels,
        parts=torch.from_numpy(parts.astype(np.int32 if len(texels) <= _MOST_INT32 else np.int64)),
        matrices=torch.from_numpy(matrices.astype(np.float32)),
        shares=torch.tensor([surface.share for surface in surfaces], dtype=torch.float32),
        looks=torch.tensor([surface.look for surface in surfaces], dtype=torch.int32),
        colours=torch.from_numpy(np.stack(tables) if tables else np.empty((0, 5, 256), np.uint8)),
        runs=torch.from_numpy(runs.astype(np.int32)),
        mixed=torch.tensor(mixed, dtype=torch.int64),
        run_offsets=tuple(np.cumsum([0] + [len(picture.lengths) for picture in pictures]).tolist()),
        mixed_pictures=tuple(mixed),
        projective=bool((matrices[6:8] != 0).any()),
    )


def _pack_quads(plans: Sequence[QuadPlan], base_image_of: ImageSource, allocate: Allocate | None) -> PackedQuads:
    """Where a plan has fewer than four samples, there is padding."""
    nothing = replace(plans[0].samples[0], tiles=(), hsv=None, mix=None, cutouts=())
    merged = [index for index, plan in enumerate(plans) if not plan.enlarge]
    enlarged = [index for index, plan in enumerate(plans) if plan.enlarge]
    samples = [sample for index in merged for sample in (*plans[index].samples, *[nothing] * 4)[:4]]
    samples += [plans[index].samples[0] for index in enlarged]
    order = torch.from_numpy(np.argsort(merged + enlarged))
    return PackedQuads(samples=_pack_samples(samples, base_image_of, allocate), merged=len(merged), order=order)


def _picture(plan: SamplePlan, tiles: Sequence[Tile], *, look: int = -1) -> _Picture:
    """Later surfaces lie over earlier ones; flips are part of the matrices and of the runs."""
    share = 1.0 if plan.mix is None else plan.mix.weight
    surfaces = [_plain((PADDING,) * 3, look=look, share=share)]
    owners = np.zeros(plan.shape, np.min_scalar_type(len(tiles) + len(plan.cutouts)))
    to_plane = _to_plane(plan)
    for tile in tiles:
        back = np.linalg.inv(tile.matrix)
        part = _take(tile, back, owners, len(surfaces))
        if part is not None:
            matrix = _to_part(part) @ back @ to_plane
            matrix /= np.abs(matrix[2]).max()
            surfaces.append(_Surface(image=tile.image, part=part, matrix=matrix, look=look, share=share))
    for cutout in plan.cutouts:
        x1, y1, x2, y2 = np.maximum(cutout.box, 0)
        owners[y1:y2, x1:x2] = len(surfaces)
        surfaces.append(_plain(cutout.colour))
    if plan.flip_ud or plan.flip_lr:
        owners = cv2.flip(owners, -1 if plan.flip_ud and plan.flip_lr else int(plan.flip_lr))
    owners = owners.ravel()
    starts = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
    return _Picture(surfaces=surfaces, lengths=np.diff(starts, append=owners.size), owners=owners[starts])


def _to_plane(plan: SamplePlan) -> np.ndarray:
    """(3, 3) column and row of a pixel of the flipped picture -> where its centre lay before the flips."""
    height, width = plan.shape
    sign_x, sign_y = 1 - 2 * plan.flip_lr, 1 - 2 * plan.flip_ud
    left, top = width * plan.flip_lr, height * plan.flip_ud
    return np.array([[sign_x, 0, left + sign_x / 2], [0, sign_y, top + sign_y / 2], [0, 0, 1]])


def _to_part(part: Rectangle) -> np.ndarray:
    """(3, 3) base-image px -> column and row of a texel of the part, whole numbers at its centre."""
    return np.array([[1, 0, -part[0] - 0.5], [0, 1, -part[1] - 0.5], [0, 0, 1]])


def _take(tile: Tile, back: np.ndarray, owners: np.ndarray, number: int) -> Rectangle | None:
    """Writes `number` where the tile shows. The part of the base image that this takes; None: nothing shows.

    `back` is the inverse of the tile's matrix.
    """
    limits = owners.shape[::-1]
    low, high = (np.clip(edge, 0, limits).astype(int) for edge in (tile.corners.min(0), np.ceil(tile.corners.max(0))))
    region = owners[low[1] : high[1], low[0] : high[0]]
    if not region.size:
        return None
    if tile.crop is not None and not tile.rings:
        region[:] = number
        return tile.crop
    spans = convex_spans(tile.corners - low, region.shape)
    shows = within_spans(spans, region.shape[1])
    if tile.rings:
        shows &= within_rings([ring - low for ring in tile.rings], region.shape)
        spans = np.stack([shows.argmax(1), shows.shape[1] - shows[:, ::-1].argmax(1)]) * shows.any(1)
    np.copyto(region, number, where=shows)
    return tile.crop or _part_below(spans, low, back)


def _plain(colour: tuple[int, int, int], *, look: int = -1, share: float = 1.0) -> _Surface:
    """A surface of a single texel."""
    return _Surface(part=(0, 0, 1, 1), matrix=np.diag([0.0, 0, 1]), colour=colour, look=look, share=share)


def _part_below(spans: np.ndarray, low: np.ndarray, back: np.ndarray) -> Rectangle | None:
    """The base image's pixels (xyxy) that the pixels of the spans interpolate; None where there is no pixel.

    The ends of the rows enclose all others, and a projection keeps that so.
    """
    (rows,) = np.nonzero(spans[0] < spans[1])
    if not rows.size:
        return None
    centres = np.stack([np.concatenate([spans[0, rows], spans[1, rows] - 1]), np.tile(rows, 2)], axis=1) + low + 0.5
    moved = centres @ back[:, :2].T + back[:, 2]
    first = np.floor(moved[:, :2] / moved[:, 2:] - 0.5).astype(int)
    return (*first.min(0).tolist(), *(first.max(0) + 2).tolist())


def _texels(
    surfaces: Sequence[_Surface], base_image_of: ImageSource, allocate: Allocate | None
) -> tuple[Tensor, np.ndarray]:
    """(P, 3) u8: the parts of all surfaces one behind the other; (3, S) i64: their starts, widths and heights.

    Each image is asked for once, and none is kept, however many surfaces show it.
    """
    x1, y1, x2, y2 = np.array([surface.part for surface in surfaces], np.int64).T
    widths, heights = x2 - x1, y2 - y1
    ends = np.cumsum(widths * heights)
    starts = ends - widths * heights
    shape = (int(ends[-1]), 3)
    texels = torch.empty(shape, dtype=torch.uint8) if allocate is None else allocate(shape)
    outs = [
        texels.numpy()[start:end].reshape(height, width, 3)
        for start, end, width, height in zip(starts, ends, widths, heights)
    ]
    by_image = sorted(zip(surfaces, outs), key=lambda pair: pair[0].image)
    for image, group in itertools.groupby(by_image, key=lambda pair: pair[0].image):
        base = None if image == _NO_IMAGE else base_image_of(image)
        for surface, out in group:
            if base is None:
                out[:] = surface.colour
            else:
                _copy_part(base, surface.part, out)
    return texels, np.stack([starts, widths, heights])


def _copy_part(base: np.ndarray, part: Rectangle, out: np.ndarray) -> None:
    x1, y1, x2, y2 = part
    height, width = base.shape[:2]
    beyond = (max(-y1, 0), max(y2 - height, 0), max(-x1, 0), max(x2 - width, 0))
    inner = base[max(y1, 0) : y2, max(x1, 0) : x2]
    if any(beyond):
        cv2.copyMakeBorder(inner, *beyond, cv2.BORDER_REPLICATE, dst=out)
    else:
        out[:] = inner


def _colour_table(hsv: tuple[float, float, float]) -> np.ndarray:
    """(5, 256) u8: by old 8-bit hue, how many thirtieths of its range red, green and blue lie below the value; new
    saturation by old; new value by old."""
    levels = np.arange(256)
    hue = np.rint(levels * hsv[0]).astype(int) % (6 * _SIXTH)
    circle = (np.array([5, 3, 1])[:, None] * _SIXTH + hue) % (6 * _SIXTH)
    below = np.clip(np.minimum(circle, 4 * _SIXTH - circle), 0, _SIXTH)
    factors = np.array(hsv[1:])[:, None]
    return np.concatenate([below, np.clip(np.rint(levels * factors), 0, 255)]).astype(np.uint8)


# ---- painting, on the device


def paint(packed: PackedPlans | PackedQuads, device: torch.device | str, *, chunk_px: int = _CHUNK_PX) -> Tensor:
    """(B, 3, H, W) u8 RGB, channels last in memory. Never waits for the device.

    As many pictures at once as have `chunk_px` pixels, at least one.
    """
    if isinstance(packed, PackedQuads):
        return _paint_quads(packed, device, chunk_px=chunk_px)
    packed = packed.to(device)
    height, width = packed.shape
    texels = F.pad(packed.texels, (0, 1)).view(torch.int32).view(-1)  # four bytes are read as fast as one
    images = torch.empty((len(packed), height, width, 3), dtype=torch.uint8, device=device)
    step = max(chunk_px // (height * width), 1)
    for first in range(0, len(packed), step):
        last = min(first + step, len(packed))
        _paint_chunk(packed, texels, first, last, images[first:last])
    return images.permute(0, 3, 1, 2)


def _paint_quads(packed: PackedQuads, device: torch.device | str, *, chunk_px: int) -> Tensor:
    samples = paint(packed.samples, device, chunk_px=chunk_px).permute(0, 2, 3, 1)
    height, width = packed.samples.shape
    merged = samples[: 4 * packed.merged].view(-1, 2, 2, height, width, 3).transpose(2, 3)
    merged = merged.reshape(-1, 2 * height, 2 * width, 3)
    step = max(chunk_px // (4 * height * width), 1)
    enlarged = [_twice_as_large(some) for some in samples[4 * packed.merged :].split(step)]
    pictures = torch.cat([merged, *enlarged])
    return pictures.index_select(0, packed.order.to(device, non_blocking=True)).permute(0, 3, 1, 2)


def _twice_as_large(images: Tensor) -> Tensor:
    """(n, H, W, 3) u8 -> (n, 2 H, 2 W, 3), bilinear."""
    planes = images.permute(0, 3, 1, 2).float()
    return F.interpolate(planes, scale_factor=2, mode="bilinear").add_(0.5).to(torch.uint8).permute(0, 2, 3, 1)


def _paint_chunk(packed: PackedPlans, texels: Tensor, first: int, last: int, images: Tensor) -> None:
    """Pictures `first` to `last` - 1 into `images` (n, H, W, 3)."""
    owners = _owners(packed, first, last)
    levels = _looked_up(packed, texels, owners)
    mixed = [place for place, picture in enumerate(packed.mixed_pictures) if first <= picture < last]
    if mixed:
        _mix(packed, texels, owners, levels, slice(mixed[0], mixed[-1] + 1), first)
    if len(packed.colours):
        levels = _recoloured(packed, owners, levels)
    for channel, level in enumerate(reversed(levels)):  # BGR -> RGB
        images.view(-1, 3)[:, channel] = level.reshape(-1)


def _owners(packed: PackedPlans, first: int, last: int) -> Tensor:
    """(n H W) i32: the surface that each pixel of the pictures `first` to `last` - 1 shows."""
    lengths, owners = packed.runs[:, packed.run_offsets[first] : packed.run_offsets[last]]
    height, width = packed.shape
    return torch.repeat_interleave(owners, lengths, output_size=(last - first) * height * width)


def _looked_up(packed: PackedPlans, texels: Tensor, owners: Tensor) -> list[Tensor]:
    """Three of (n H W) f32, blue, green, red in whole numbers: the base images bilinearly, at the pixels' centres."""
    height, width = packed.shape
    column = torch.arange(width, dtype=torch.float32, device=owners.device)
    row = torch.arange(height, dtype=torch.float32, device=owners.device)[:, None]

    def along(line: int) -> Tensor:
        a, b, c = (
            packed.matrices[3 * line + place].index_select(0, owners).view(-1, height, width) for place in range(3)
        )
        return torch.addcmul(torch.addcmul(c, a, column), b, row).view(-1)

    x, y = along(0), along(1)
    if packed.projective:
        w = along(2)
        x, y = x / w, y / w
    start, part_width, part_height = (line.index_select(0, owners) for line in packed.parts)
    left, x, step_x = _between(x, part_width)
    top, y, step_y = _between(y, part_height)
    upper = start + top * part_width + left
    lower = upper + step_y * part_width
    four = texels.index_select(0, torch.cat([upper, lower, upper + step_x, lower + step_x])).view(2, 2, -1)
    levels = []
    for channel in range(3):
        before, behind = (four >> 8 * channel & 255).float()
        above, below = torch.lerp(before, behind, x)
        levels.append(torch.lerp(above, below, y).add_(0.5).floor_())
    return levels


def _between(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The texel before each position, clamped to 0..size - 1; the way from there, 0..1; the step to the next, 0 at the
    end."""
    position = torch.minimum(position.clamp_(min=0), size - 1)
    before = position.to(size.dtype)
    return before, position - before, (before < size - 1).to(size.dtype)


def _mix(packed: PackedPlans, texels: Tensor, owners: Tensor, levels: list[Tensor], mixed: slice, first: int) -> None:
    """Blends the partners `mixed` into the pictures of a chunk that starts with picture `first`, in place."""
    area = packed.shape[0] * packed.shape[1]
    partners = _owners(packed, len(packed) + mixed.start, len(packed) + mixed.stop)
    places = packed.mixed[mixed] - first
    share = packed.shares.index_select(0, owners.view(-1, area).index_select(0, places).view(-1)).view(-1, area)
    for level, other in zip(levels, _looked_up(packed, texels, partners)):
        pictures = level.view(-1, area)
        one = pictures.index_select(0, places)
        pictures.index_copy_(0, places, torch.lerp(other.view(-1, area), one, share).round_())


def _recoloured(packed: PackedPlans, owners: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """Blue, green and red after the colour tables, exactly as OpenCV's 8-bit HSV rounds on the way there."""
    looks = packed.looks.index_select(0, owners)
    blue, green, red = (level.to(torch.int32) for level in levels)
    value = torch.maximum(torch.maximum(blue, green), red)
    span = value - torch.minimum(torch.minimum(blue, green), red)
    saturation = span * _reciprocals(255, value.device).index_select(0, value) + 2048 >> 12
    hue = torch.where(value == green, blue - red + 2 * span, red - green + 4 * span)
    hue = torch.where(value == red, green - blue, hue)
    hue = hue * _reciprocals(_SIXTH, value.device).index_select(0, span) + 2048 >> 12
    hue = torch.where(hue < 0, hue + 6 * _SIXTH, hue)

    tables = packed.colours.view(-1)
    at = looks.clamp(min=0) * packed.colours[0].numel()
    saturation, value = (
        tables.index_select(0, at + (256 * line + old)).int() for line, old in ((3, saturation), (4, value))
    )
    drop = saturation * value
    full = value * (255 * _SIXTH)
    recoloured = []
    for line, level in ((2, levels[0]), (1, levels[1]), (0, levels[2])):
        below = tables.index_select(0, at + (256 * line + hue))
        # a half, far above rounding errors, keeps whole quotients whole
        new = (full - drop * below).float().add_(0.5).div_(255 * _SIXTH).floor_()
        recoloured.append(torch.where(looks < 0, level, new))
    return recoloured


def _reciprocals(numerator: int, device: torch.device) -> Tensor:
    """(256,) i32: round(4096 numerator / n), and for n = 0 anything: it is multiplied by 0."""
    twice = 2 * torch.arange(256, dtype=torch.int32, device=device).clamp_(min=1)
    return torch.div(2 * 4096 * numerator + twice // 2, twice, rounding_mode="floor")
