import colorsys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.plan import PADDING, generator, letterbox_plan, train_plan
from utils.data.render import render
from utils.hyp import Hyperparameters
from utils.structures import Mix, SamplePlan, Tile

IMGSZ = 96
SIZES = [(96, 96), (48, 96), (96, 60)]  # base images already
STILL = Hyperparameters(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def store(make_store):
    return make_store(SIZES)


@pytest.fixture(scope="module")
def bases(smooth_image):
    return [smooth_image(np.random.default_rng(seed), *size) for seed, size in enumerate(SIZES)]


def plan_of(store, seed, **changes) -> SamplePlan:
    return train_plan(store, seed % 3, imgsz=IMGSZ, hyp=replace(STILL, **changes), rng=generator(seed, 0, 0))


def plain_plan(size, **changes) -> SamplePlan:
    """One image, as it is, as large as the output."""
    height, width = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
    tile = Tile(image=0, matrix=np.eye(3), corners=corners, crop=(0, 0, width, height))
    boxes, classes = np.empty((0, 4), np.float32), np.empty(0, np.int32)
    return SamplePlan(**{"shape": size, "tiles": (tile,), "boxes": boxes, "classes": classes, **changes})


def slow_paint(tiles, shape, bases) -> np.ndarray:
    """(H, W, 3) f64 BGR: each pixel looks up where its centre lies in the base image, and mixes the four around it.

    Upright tiles only, or single pixels of others.
    """
    picture = np.full((*shape, 3), float(PADDING))
    for tile in tiles:
        base, back = bases[tile.image].astype(float), np.linalg.inv(tile.matrix)
        first_x, first_y, last_x, last_y = tile.crop or (0, 0, *base.shape[1::-1])
        (x1, y1), (x2, y2) = tile.corners[0].astype(int), tile.corners[2].astype(int)
        for y in range(y1, y2):
            for x in range(x1, x2):
                u, v, w = back @ [x + 0.5, y + 0.5, 1]
                u, v = (
                    min(max(u / w - 0.5, first_x), last_x - 1),
                    min(max(v / w - 0.5, first_y), last_y - 1),
                )
                left, top = int(u), int(v)
                right, bottom = min(left + 1, last_x - 1), min(top + 1, last_y - 1)
                upper = base[top, left] * (1 - u + left) + base[top, right] * (u - left)
                lower = base[bottom, left] * (1 - u + left) + base[bottom, right] * (u - left)
                picture[y, x] = upper * (1 - v + top) + lower * (v - top)
    return picture


# ---- placing


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from([0.0, 1.0]))
def test_upright_tiles_are_the_bilinear_interpolation_of_their_images(store, bases, seed, mosaic):
    plan = plan_of(store, seed, mosaic=mosaic, scale=0.8, translate=0.4)
    picture = render(plan, bases.__getitem__)
    assert picture.dtype == np.uint8
    expected = slow_paint(plan.tiles, plan.shape, bases)[..., ::-1]
    assert np.abs(picture - expected).max() <= 2


@pytest.mark.parametrize("image", range(3))
@pytest.mark.parametrize("shape", [(96, 96), (128, 160), (97, 99)])
def test_a_letterbox_copies_base_pixels_and_the_rest_is_padding(image, shape, store):
    base = np.random.default_rng(image).integers(0, 256, (*SIZES[image], 3), dtype=np.uint8)
    plan = letterbox_plan(store, image, shape=shape, imgsz=IMGSZ)
    picture = render(plan, lambda _: base)
    assert picture.shape == (*shape, 3)
    expected = np.full((*shape, 3), 114, np.uint8)
    (left, top), (right, bottom) = plan.tiles[0].corners[[0, 2]].astype(int)
    expected[top:bottom, left:right] = base[..., ::-1]
    np.testing.assert_array_equal(picture, expected)


def test_where_no_tile_lies_is_padding(bases):
    plan = plain_plan((30, 40), tiles=())
    assert np.all(render(plan, bases.__getitem__) == 114)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_tilted_tiles_show_the_right_pixels(store, bases, seed):
    """Inside a tile, a pixel from its edges, a perspective picture is what the slow lookup says."""
    plan = plan_of(store, seed, mosaic=1, scale=0.3, degrees=45, shear=10, perspective=0.001)
    picture = render(plan, bases.__getitem__).astype(float)
    rng = np.random.default_rng(seed)
    for tile in plan.tiles:
        for point in rng.uniform(0, IMGSZ, (40, 2)).astype(int) + 0.5:
            if _distance_inside(point, tile.corners) > 1:
                pixel = replace(tile, corners=_pixel_at(point))
                x, y = (point - 0.5).astype(int)
                expected = slow_paint([pixel], plan.shape, bases)[y, x, ::-1]
                assert np.abs(picture[y, x] - expected).max() <= 4


def _pixel_at(point):
    return np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) + point


def _distance_inside(point, corners):
    """Px from the nearest edge of a clockwise convex polygon, negative outside."""
    edges = np.roll(corners, -1, axis=0) - corners
    to_point = point - corners
    cross = edges[:, 0] * to_point[:, 1] - edges[:, 1] * to_point[:, 0]
    return (cross / np.linalg.norm(edges, axis=1)).min()


@pytest.mark.parametrize(
    "tilt", [{"degrees": 45}, {"shear": 10}, {"perspective": 0.001}, {"degrees": 180, "perspective": 0.0005}, {}]
)
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_neighbouring_tiles_leave_no_seam(tilt, make_store, seed):
    """Four white squares around a centre make one white area, whatever moves them; what is outside stays grey."""
    store = make_store([(IMGSZ, IMGSZ)])
    plan = plan_of(store, 3 * seed, mosaic=1, scale=0.5, translate=0.1, **tilt)
    if len(plan.tiles) < 4:
        return
    picture = render(plan, lambda _: np.full((IMGSZ, IMGSZ, 3), 255, np.uint8))[..., 0]
    assert set(np.unique(picture)) <= {114, 255}
    outline = np.array([tile.corners[corner] for tile, corner in zip(plan.tiles, (0, 1, 3, 2))])[[0, 1, 3, 2]]
    y, x = np.mgrid[:IMGSZ, :IMGSZ] + 0.5
    edges = np.roll(outline, -1, axis=0) - outline
    cross = edges[:, :1, None] * (y - outline[:, 1:, None]) - edges[:, 1:, None] * (x - outline[:, :1, None])
    inside = (cross / np.linalg.norm(edges, axis=1)[:, None, None]).min(0)  # px from the outline, (H, W)
    slack = 0.51 if plan.tiles[0].crop is not None else 1e-3  # upright tiles end on whole pixels
    assert np.all(picture[inside >= slack] == 255)
    assert np.all(picture[inside <= -slack] == 114)


def test_a_shear_that_mirrors_is_painted_too(make_store):
    store = make_store([(IMGSZ, IMGSZ)])
    white = np.full((IMGSZ, IMGSZ, 3), 255, np.uint8)
    mirrored = 0
    for seed in range(60):
        plan = plan_of(store, 3 * seed, shear=70)
        (tile,) = plan.tiles
        if np.linalg.det(tile.matrix) < -0.05:
            mirrored += 1
            assert np.all(render(plan, lambda _: white)[IMGSZ // 2, IMGSZ // 2] == 255)
    assert mirrored


# ---- colours, flips, mixing


def slow_hsv(pixel: np.ndarray, factors: tuple[float, float, float]) -> np.ndarray:
    """An RGB pixel with its hue (0..180), saturation and value (0..255) as whole numbers times `factors`."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    hue, saturation, value = round(hue * 180) % 180, round(saturation * 255), round(value * 255)
    hue = int(hue * factors[0] % 180)
    saturation, value = (min(int(level * factor), 255) for level, factor in zip((saturation, value), factors[1:]))
    return 255 * np.array(colorsys.hsv_to_rgb(hue / 180, saturation / 255, value / 255))


@pytest.mark.parametrize("factors", [(1, 1, 1), (1.015, 0.3, 1.4), (0.985, 1.7, 0.6), (1.5, 1.2, 0.9), (1, 0, 1)])
def test_colours_move_in_hsv_as_the_slow_twin_says(factors):
    base = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    picture = render(plain_plan((24, 24), hsv=factors), lambda _: base)
    expected = np.array([[slow_hsv(pixel, factors) for pixel in row] for row in base[..., ::-1]])
    error = np.abs(picture - expected)
    assert error.mean() < 1
    assert error.max() <= 2 * 255 / 30  # two steps of hue, which OpenCV rounds in its own way


def test_the_value_factor_is_brightness_and_zero_saturation_is_grey(bases):
    plain = render(plain_plan((96, 96)), bases.__getitem__).astype(int)
    dark = render(plain_plan((96, 96), hsv=(1.0, 1.0, 0.5)), bases.__getitem__)
    assert np.abs(dark - plain / 2).max() <= 4
    grey = render(plain_plan((96, 96), hsv=(1.0, 0.0, 1.0)), bases.__getitem__)
    np.testing.assert_array_equal(grey, np.repeat(plain.max(-1, keepdims=True), 3, axis=-1))


@pytest.mark.parametrize("flip_lr", [False, True])
@pytest.mark.parametrize("flip_ud", [False, True])
@pytest.mark.parametrize("hsv", [None, (1.01, 1.2, 0.8)])
def test_flips_come_last_and_mirror_the_picture(flip_lr, flip_ud, hsv, bases):
    base = bases[1]
    plain = render(plain_plan((48, 96), hsv=hsv), lambda _: base)
    flipped = render(plain_plan((48, 96), hsv=hsv, flip_lr=flip_lr, flip_ud=flip_ud), lambda _: base)
    np.testing.assert_array_equal(flipped, plain[:: -1 if flip_ud else 1, :: -1 if flip_lr else 1])


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_mixing_is_the_weighted_mean_of_two_pictures(weight, store, bases):
    first, second = (plan_of(store, seed, mosaic=1, scale=0.5) for seed in (1, 2))
    mixed = render(replace(first, mix=Mix(tiles=second.tiles, weight=weight)), bases.__getitem__)
    expected = weight * render(first, bases.__getitem__) + (1 - weight) * render(second, bases.__getitem__)
    assert np.abs(mixed - expected).max() <= 0.51


def test_base_images_are_not_painted_on(store, bases):
    copies = [base.copy() for base in bases]
    for seed in range(10):
        render(plan_of(store, seed, mosaic=1, hsv_v=0.4, degrees=10, flipud=0.5, mixup=0.5), copies.__getitem__)
    assert all(np.array_equal(copy, base) for copy, base in zip(copies, bases))


def test_the_number_of_opencv_threads_does_not_change_a_pixel(store, bases):
    """Loader processes run OpenCV on one thread, --workers 0 on many."""
    before = cv2.getNumThreads()
    try:
        pictures = []
        for threads in (0, 4):
            cv2.setNumThreads(threads)
            pictures.append(
                [
                    render(plan_of(store, seed, mosaic=1, hsv_s=0.5, perspective=tilt), bases.__getitem__)
                    for seed in range(5)
                    for tilt in (0, 0.001)
                ]
            )
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(*pictures)
