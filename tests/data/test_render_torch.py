import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.data import render_torch
from utils.data.plan import PADDING, generator, letterbox_plan, quad_plan, train_plan
from utils.data.render import render, render_quad
from utils.data.render_torch import pack, paint
from utils.hyp import Hyperparameters
from utils.structures import Cutout, Mix, PixelChange, PixelTransform, QuadPlan, SamplePlan, Tile, UserError

SHAPE = (40, 56)
IMGSZ = 96
SIZES = [(96, 96), (48, 96), (96, 60), (1, 1), (1, 9)]  # the first three are base images
EMPTY = {"boxes": np.empty((0, 4), np.float32), "classes": np.empty(0, np.int32)}
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def bases(smooth_image):
    return [smooth_image(np.random.default_rng(seed), *size) for seed, size in enumerate(SIZES)]


# ---- random plans


def random_plan(rng: np.random.Generator, **changes) -> SamplePlan:
    fields = {
        "tiles": random_tiles(rng),
        "mix": Mix(tiles=random_tiles(rng), weight=float(rng.uniform())) if rng.random() < 0.5 else None,
        "hsv": tuple(1 + rng.uniform(-1, 1, 3) * (0.1, 0.9, 0.9)) if rng.random() < 0.7 else None,
        "cutouts": tuple(random_cutout(rng) for _ in range(rng.integers(3))),
        "flip_lr": bool(rng.random() < 0.5),
        "flip_ud": bool(rng.random() < 0.5),
    }
    return SamplePlan(shape=SHAPE, **{**EMPTY, **fields, **changes})


def random_tiles(rng: np.random.Generator) -> tuple[Tile, ...]:
    kinds = rng.choice([upright_tile, tilted_tile, pasted_tile], rng.integers(6))
    return tuple(kind(rng) for kind in kinds)


def interval(rng: np.random.Generator, length: int) -> tuple[int, int]:
    start = int(rng.integers(length))
    return start, int(rng.integers(start + 1, length + 1))


def upright_tile(rng: np.random.Generator) -> Tile:
    image = int(rng.integers(len(SIZES)))
    (x1, x2), (y1, y2) = (interval(rng, side) for side in SIZES[image][::-1])
    (left, right), (top, bottom) = (interval(rng, side) for side in SHAPE[::-1])
    scale_x, scale_y = (right - left) / (x2 - x1), (bottom - top) / (y2 - y1)
    matrix = np.array([[scale_x, 0, left - x1 * scale_x], [0, scale_y, top - y1 * scale_y], [0, 0, 1]])
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)
    return Tile(image=image, matrix=matrix, corners=corners, crop=(x1, y1, x2, y2))


def tilted_tile(rng: np.random.Generator) -> Tile:
    image = int(rng.integers(len(SIZES)))
    height, width = SIZES[image]
    (x1, x2), (y1, y2) = interval(rng, width), interval(rng, height)
    angle, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 2)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turn = turn @ np.array([[rng.choice([-1, 1]), rng.uniform(-0.3, 0.3)], [0, 1]])
    move = rng.uniform(0.2, 0.8, 2) * SHAPE[::-1] - turn @ ((x1 + x2) / 2, (y1 + y2) / 2)
    matrix = np.vstack([np.column_stack([turn, move]), [*rng.uniform(-1, 1, 2) * rng.choice([0, 0.001]), 1]])
    return Tile(image=image, matrix=matrix, corners=projected(matrix, square(x1, y1, x2, y2)), crop=None)


def pasted_tile(rng: np.random.Generator) -> Tile:
    """A star, and sometimes a second one that leaves a hole."""
    tile = tilted_tile(rng)
    height, width = SIZES[tile.image]
    spikes = np.linspace(0, 2 * np.pi, 11)[:10]
    rings = []
    for _ in range(rng.integers(1, 3)):
        star = np.stack([np.cos(spikes), np.sin(spikes)], 1) * rng.uniform(0.2, 0.5, (10, 1)) + 0.5
        rings.append(projected(tile.matrix, star * (width, height)))
    corners = projected(tile.matrix, square(0, 0, width, height))
    return replace(tile, rings=tuple(rings), corners=corners)


def square(x1, y1, x2, y2) -> np.ndarray:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], float)


def projected(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    moved = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return moved[:, :2] / moved[:, 2:]


def random_cutout(rng: np.random.Generator) -> Cutout:
    (x1, x2), (y1, y2) = (interval(rng, side) for side in SHAPE[::-1])
    return Cutout(box=(x1, y1, x2, y2), colour=tuple(rng.integers(0, 256, 3).tolist()))


# ---- the other executor


def render_batch(plans, base_image_of) -> torch.Tensor:
    """(B, 3, H, W) u8 RGB: what `render` and `render_quad` paint, to a rounding."""
    return paint(pack(plans, base_image_of), "cpu")


UPRIGHT = {"mosaic": 0.8, "mosaic9": 0.5, "mixup": 0.5, "cutout": 0.5, "flipud": 0.5}
TILTED = {**UPRIGHT, "degrees": 45.0, "shear": 10.0, "perspective": 0.001}
HYPS = [UPRIGHT, TILTED, {**UPRIGHT, "copy_paste": 1.0}, {**TILTED, "copy_paste": 1.0}, {**TILTED, "shear": 70.0}]


@pytest.fixture(scope="module")
def store():
    """Three images with polygons."""
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(3):
        rings = [[rng.uniform(0, 1, (1, 2)) + rng.uniform(-0.2, 0.2, (7, 2))] for _ in range(4)]
        rings = [[np.clip(ring, 0, 1) for ring in polygon] for polygon in rings]
        boxes = [np.concatenate([polygon[0].min(0), polygon[0].max(0)]) for polygon in rings]
        labels.append(ImageLabels(boxes=np.array(boxes), classes=np.zeros(4, np.int64), rings=rings))
    return build_store([Path(f"{index}.png") for index in range(3)], SIZES[:3], labels)


def plan_of(store, seed: int, position: int, hyp: dict[str, float]) -> SamplePlan:
    rng = generator(seed, 0, position)
    return train_plan(store, position % 3, imgsz=IMGSZ, shape=(80, 112), hyp=Hyperparameters(**hyp), rng=rng)


def assert_alike(pictures: torch.Tensor, expected: list[np.ndarray]):
    error = np.abs(rgb(pictures).astype(float) - np.stack(expected))
    assert error.mean() <= 1.0
    assert (error.max(-1) > 8).mean() <= 0.02


@pytest.mark.parametrize("hyp", HYPS, ids=["upright", "tilted", "upright-paste", "tilted-paste", "mirrored"])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_the_renderers_agree(store, bases, hyp, seed):
    plans = [plan_of(store, seed, position, hyp) for position in range(4)]
    assert_alike(render_batch(plans, bases.__getitem__), [render(plan, bases.__getitem__) for plan in plans])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds)
def test_the_renderers_agree_on_plans_that_nothing_drew(bases, seed):
    """The same ones each time: a plan may show one pixel all over, and a hue that is nearly a half is rounded by OpenCV
    to either side."""
    rng = np.random.default_rng(seed)
    plans = [random_plan(rng) for _ in range(4)]
    assert_alike(render_batch(plans, bases.__getitem__), [render(plan, bases.__getitem__) for plan in plans])


@pytest.mark.parametrize("shape", [(96, 96), (128, 160), (97, 99)])
def test_the_renderers_agree_on_letterboxes_to_the_last_bit(store, bases, shape):
    plans = [letterbox_plan(store, image, shape=shape, imgsz=IMGSZ) for image in range(3)]
    pictures = rgb(render_batch(plans, bases.__getitem__))
    np.testing.assert_array_equal(pictures, [render(plan, bases.__getitem__) for plan in plans])


def test_the_renderers_agree_on_quads(store, bases):
    plans = []
    for group, count in enumerate((4, 1, 3, 1, 4)):
        samples = [plan_of(store, group, place, UPRIGHT) for place in range(count)]
        plans.append(quad_plan(samples, enlarge=count == 1))
    pictures = render_batch(plans, bases.__getitem__)
    assert_alike(pictures, [render_quad(plan, bases.__getitem__) for plan in plans])


def test_albumentations_are_refused(bases):
    change = PixelChange(transforms=(PixelTransform(name="Blur", arguments=()),), seed=0)
    with pytest.raises(UserError, match="albumentations"):
        pack([whole_plan(SHAPE, pixels=change)], bases.__getitem__)


# ---- the slow twin


def slow_render(plan: SamplePlan, bases) -> np.ndarray:
    """(H, W, 3) f64 RGB, one step after the other, as structures.py tells them."""
    picture = slow_paint(plan.tiles, plan.shape, bases)
    if plan.mix is not None:
        other = slow_paint(plan.mix.tiles, plan.shape, bases)
        picture = np.rint(plan.mix.weight * picture + (1 - plan.mix.weight) * other)
    if plan.hsv is not None:
        hue, saturation, value = cv2.cvtColor(picture.astype(np.uint8), cv2.COLOR_BGR2HSV).transpose(2, 0, 1)
        hue = np.rint(hue * plan.hsv[0]) % 180
        saturation, value = (
            np.minimum(np.rint(level * gain), 255) for level, gain in zip((saturation, value), plan.hsv[1:])
        )
        moved = np.stack([hue, saturation, value], axis=-1).astype(np.uint8)
        picture = cv2.cvtColor(moved, cv2.COLOR_HSV2BGR).astype(float)
    for cutout in plan.cutouts:
        x1, y1, x2, y2 = cutout.box
        picture[y1:y2, x1:x2] = cutout.colour
    return picture[:: -1 if plan.flip_ud else 1, :: -1 if plan.flip_lr else 1, ::-1]


def slow_paint(tiles, shape, bases) -> np.ndarray:
    """(H, W, 3) f64 BGR, whole numbers: each pixel looks up where its centre lies in the tile's image."""
    picture = np.full((*shape, 3), float(PADDING))
    for tile in tiles:
        base, back = bases[tile.image].astype(float), np.linalg.inv(tile.matrix)
        x1, y1, x2, y2 = tile.crop or (0, 0, base.shape[1], base.shape[0])
        for y, x in np.ndindex(shape):
            if not covers(tile, x + 0.5, y + 0.5):
                continue
            u, v, w = back @ [x + 0.5, y + 0.5, 1]
            u, v = min(max(u / w - 0.5, x1), x2 - 1), min(max(v / w - 0.5, y1), y2 - 1)
            left, top = int(u), int(v)
            right, bottom = min(left + 1, x2 - 1), min(top + 1, y2 - 1)
            upper = base[top, left] * (1 - u + left) + base[top, right] * (u - left)
            lower = base[bottom, left] * (1 - u + left) + base[bottom, right] * (u - left)
            picture[y, x] = np.floor(upper * (1 - v + top) + lower * (v - top) + 0.5)
    return picture


def covers(tile: Tile, x: float, y: float) -> bool:
    if tile.crop is not None:
        (left, top), (right, bottom) = tile.corners[[0, 2]]
        inside = left < x < right and top < y < bottom
    else:
        inside = odd_crossings([tile.corners], x, y)
    return inside and (not tile.rings or odd_crossings(tile.rings, x, y))


def odd_crossings(rings, x: float, y: float) -> bool:
    """Whether a ray to the left crosses an odd number of edges."""
    odd = False
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0)):
            if (y1 <= y) != (y2 <= y) and x1 + (y - y1) / (y2 - y1) * (x2 - x1) <= x:
                odd = not odd
    return odd


def rgb(pictures: torch.Tensor) -> np.ndarray:
    assert pictures.dtype == torch.uint8
    assert pictures.is_contiguous(memory_format=torch.channels_last)
    return pictures.permute(0, 2, 3, 1).numpy()


@settings(max_examples=12, deadline=None)
@given(seeds)
def test_every_pixel_is_what_the_slow_twin_says(bases, seed):
    rng = np.random.default_rng(seed)
    plans = [random_plan(rng) for _ in range(2)]
    pictures = rgb(render_batch(plans, bases.__getitem__))
    for plan, picture in zip(plans, pictures):
        error = np.abs(picture - slow_render(plan, bases))
        assert error.mean() < 0.3
        if plan.hsv is None:
            assert np.sort(error.max(-1).ravel())[:-8].max() <= 1  # but for a few centres on an edge


def whole_plan(size: tuple[int, int], **changes) -> SamplePlan:
    """One image, as it is, as large as the output."""
    height, width = size
    tile = Tile(image=0, matrix=np.eye(3), corners=square(0, 0, width, height), crop=(0, 0, width, height))
    return SamplePlan(shape=size, **{**EMPTY, "tiles": (tile,), **changes})


@pytest.mark.parametrize("factors", [(1, 1, 1), (1.015, 0.3, 1.4), (0.985, 1.7, 0.6), (1.5, 1.2, 0.9), (1, 0, 1)])
def test_colours_are_those_of_opencv(factors):
    """All levels, greys and pure colours too. OpenCV's last step rounds now and then to the other side."""
    base = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    base[:9] = np.arange(256)[:, None] * np.arange(9)[:, None, None] // 8  # greys
    base[9:12] = np.eye(3)[:, None] * np.arange(256)[:, None]
    plan = whole_plan((256, 256), hsv=factors)
    (picture,) = rgb(render_batch([plan], lambda _: base))
    hsv = cv2.cvtColor(base, cv2.COLOR_BGR2HSV) * np.array(factors)
    hsv = np.stack([np.rint(hsv[..., 0]) % 180, *np.clip(np.rint(hsv[..., 1:]), 0, 255).transpose(2, 0, 1)], axis=-1)
    expected = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
    error = np.abs(picture - expected.astype(int))
    assert error.max() <= 1
    assert error.mean() < 0.1


@pytest.mark.parametrize("flips", [{}, {"flip_lr": True}, {"flip_ud": True}, {"flip_lr": True, "flip_ud": True}])
def test_an_image_in_its_own_size_is_copied(flips):
    base = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    (picture,) = rgb(render_batch([whole_plan((37, 53), **flips)], lambda _: base))
    expected = base[:: -1 if "flip_ud" in flips else 1, :: -1 if "flip_lr" in flips else 1, ::-1]
    np.testing.assert_array_equal(picture, expected)


def test_where_no_tile_lies_is_padding(bases):
    plans = [whole_plan(SHAPE, tiles=()), whole_plan(SHAPE, tiles=(), hsv=(1.1, 1.1, 0.5))]
    grey, dark = rgb(render_batch(plans, bases.__getitem__))
    assert np.all(grey == PADDING)
    assert np.all(dark == PADDING // 2)


def test_a_picture_does_not_depend_on_its_batch(bases):
    """Neither on its neighbours, nor on how many are painted at once."""
    rng = np.random.default_rng(8)
    plans = [random_plan(rng) for _ in range(12)]
    packed = pack(plans, bases.__getitem__)
    assert len(packed) == 12
    assert 2 < len(packed.mixed) < 11
    together = paint(packed, "cpu")
    for count in (1, 5):
        chunks = paint(packed, "cpu", chunk_px=count * SHAPE[0] * SHAPE[1])
        assert torch.equal(chunks, together)
    alone = torch.cat([render_batch([plan], bases.__getitem__) for plan in plans])
    assert torch.equal(alone, together)


# ---- what is sent, and what the device does not do


def test_of_a_base_image_only_what_shows_is_sent(bases):
    rng = np.random.default_rng(2)
    height, width = SIZES[0]
    corners = square(10, 20, 50, 50)
    crop = Tile(image=0, matrix=np.eye(3), corners=corners, crop=(10, 20, 50, 50))
    packed = pack([whole_plan(SHAPE, tiles=(crop,))], bases.__getitem__)
    assert len(packed.texels) == 1 + 40 * 30
    tilted = replace(crop, crop=None)
    packed = pack([whole_plan(SHAPE, tiles=(tilted,))], bases.__getitem__)
    assert len(packed.texels) <= 1 + 42 * 32
    ring = rng.uniform(20, 30, (5, 2))
    packed = pack([whole_plan(SHAPE, tiles=(replace(tilted, rings=(ring,)),))], bases.__getitem__)
    assert len(packed.texels) <= 1 + 12 * 12
    assert height * width > 5 * 40 * 30


def test_images_that_do_not_show_are_not_asked_for():
    beside = Tile(image=7, matrix=np.eye(3), corners=square(-9, 0, 0, 9), crop=None)
    between = replace(beside, corners=square(3.6, 3.6, 4.4, 4.4))  # no pixel centre in it
    pictures = render_batch([whole_plan(SHAPE, tiles=(beside, between))], {}.__getitem__)
    assert torch.all(pictures == PADDING)


def test_an_image_is_asked_for_once_however_often_a_batch_shows_it(bases):
    rng = np.random.default_rng(5)
    asked = []
    pack([random_plan(rng) for _ in range(9)], lambda image: asked.append(image) or bases[image])
    assert sorted(asked) == list(range(len(bases)))


def test_packed_plans_travel_between_processes(bases):
    rng = np.random.default_rng(3)
    packed = pack([random_plan(rng) for _ in range(4)], bases.__getitem__)
    assert torch.equal(paint(pickle.loads(pickle.dumps(packed)), "cpu"), paint(packed, "cpu"))


def test_nothing_waits_for_the_device(bases):
    """On the meta device there are no values: whatever reads one, to make a shape or a decision of it, fails."""
    rng = np.random.default_rng(4)
    plans = [random_plan(rng) for _ in range(9)]
    packed = pack(plans, bases.__getitem__).to("meta")
    assert paint(packed, "meta", chunk_px=4 * SHAPE[0] * SHAPE[1]).shape == (9, 3, *SHAPE)
    quads = pack(random_quads(rng, 5), bases.__getitem__).to("meta")
    assert paint(quads, "meta").shape == (5, 3, 2 * SHAPE[0], 2 * SHAPE[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_a_gpu_paints_the_same_and_is_not_waited_for(bases):
    rng = np.random.default_rng(9)
    for plans in ([random_plan(rng) for _ in range(9)], random_quads(rng, 5)):
        packed = pack(plans, bases.__getitem__)
        expected = paint(packed, "cpu")
        paint(packed, "cuda")  # what is made on first use may wait
        torch.cuda.synchronize()
        pinned = packed.pin_memory()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pictures = paint(pinned, "cuda", chunk_px=4 * SHAPE[0] * SHAPE[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        error = (pictures.cpu().int() - expected.int()).abs()
        assert error.max() <= 20  # a level in the base image may be several after the colours
        assert error.float().mean() < 0.01


def test_images_beyond_what_32_bits_count(bases, monkeypatch):
    rng = np.random.default_rng(6)
    plans = [random_plan(rng) for _ in range(4)]
    expected = render_batch(plans, bases.__getitem__)
    monkeypatch.setattr(render_torch, "_MOST_INT32", 1000)
    packed = pack(plans, bases.__getitem__)
    assert packed.parts.dtype == torch.int64
    assert torch.equal(paint(packed, "cpu"), expected)


# ---- quads


def random_quads(rng: np.random.Generator, count: int) -> list[QuadPlan]:
    quads = []
    for index in range(count):
        enlarge = index % 3 == 1
        samples = tuple(random_plan(rng) for _ in range(1 if enlarge else rng.integers(1, 5)))
        quads.append(QuadPlan(shape=(2 * SHAPE[0], 2 * SHAPE[1]), samples=samples, enlarge=enlarge, **EMPTY))
    return quads


def test_quads_are_their_samples_side_by_side_or_enlarged(bases):
    quads = random_quads(np.random.default_rng(7), 7)
    pictures = rgb(render_batch(quads, bases.__getitem__))
    for quad, picture in zip(quads, pictures):
        samples = [rgb(render_batch([sample], bases.__getitem__))[0] for sample in quad.samples]
        if quad.enlarge:
            expected = cv2.resize(samples[0], quad.shape[::-1], interpolation=cv2.INTER_LINEAR)
            assert np.abs(picture - expected.astype(int)).max() <= 1
        else:
            samples += [np.full((*SHAPE, 3), PADDING)] * (4 - len(samples))
            expected = np.block([[[samples[0]], [samples[1]]], [[samples[2]], [samples[3]]]])
            np.testing.assert_array_equal(picture, expected)
