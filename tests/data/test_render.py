from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import transform_points
from utils.data.images import base_scale, base_shape
from utils.data.plan import PADDING, generator, letterbox_plan, quad_plan, train_plan
from utils.data.render import render, render_quad
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


# ---- whole plans


def slow_inside(point, polygon) -> bool:
    """Even-odd, by the edges that a ray to the right crosses."""
    inside = False
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0)):
        if (y1 <= point[1]) != (y2 <= point[1]):
            inside ^= bool(point[0] < x1 + (point[1] - y1) * (x2 - x1) / (y2 - y1))
    return inside


def slow_shows(tile, point) -> bool:
    return slow_inside(point, tile.corners) and (
        not tile.rings or sum(slow_inside(point, ring) for ring in tile.rings) % 2 == 1
    )


def edge_distance(tile, point) -> float:
    """Px from a pixel centre to the nearest edge of a tilted tile, where rounding decides what shows."""
    if tile.crop is not None:
        return np.inf
    distances = []
    for polygon in (tile.corners, *tile.rings):
        start, along = polygon, np.roll(polygon, -1, axis=0) - polygon
        share = np.clip(((point - start) * along).sum(1) / np.maximum((along**2).sum(1), 1e-12), 0, 1)
        distances.append(np.linalg.norm(start + share[:, None] * along - point, axis=1).min())
    return min(distances)


def slow_layer(tiles, shape, bases) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) f64 BGR, and (H, W) where an edge is too near to tell."""
    picture, unsure = np.full((*shape, 3), float(PADDING)), np.zeros(shape, bool)
    for tile in tiles:
        for y in range(shape[0]):
            for x in range(shape[1]):
                point = np.array([x + 0.5, y + 0.5])
                unsure[y, x] |= edge_distance(tile, point) < 1e-3
                if slow_shows(tile, point):
                    pixel = replace(tile, corners=_pixel_at(point))
                    picture[y, x] = slow_paint([pixel], shape, bases)[y, x]
    return picture, unsure


SMALL = 32
SMALL_SIZES = [(32, 32), (20, 32), (32, 24)]
EVERYTHING = {
    "nine": {"mosaic": 1, "mosaic9": 1, "scale": 0.5, "translate": 0.2},
    "pasted": {"mosaic": 1, "copy_paste": 1, "scale": 0.5, "flipud": 0.5},
    "tilted": {"mosaic": 1, "copy_paste": 0.5, "degrees": 45, "shear": 10, "perspective": 0.002, "fliplr": 0.5},
    "all": {"mosaic": 1, "mosaic9": 0.5, "mixup": 1, "copy_paste": 0.5, "degrees": 20, "cutout": 1, "fliplr": 0.5},
}


@pytest.mark.parametrize("recipe", EVERYTHING)
@settings(max_examples=3, deadline=None)
@given(seed=seeds)
def test_a_plan_is_painted_as_the_slow_twin_says(recipe, polygon_store, smooth_image, seed):
    store = polygon_store(SMALL_SIZES)
    small = [smooth_image(np.random.default_rng(index), *size) for index, size in enumerate(SMALL_SIZES)]
    hyp = replace(STILL, **EVERYTHING[recipe])
    plan = train_plan(store, seed % 3, imgsz=SMALL, hyp=hyp, rng=generator(seed, 0, 0))
    picture, unsure = slow_layer(plan.tiles, plan.shape, small)
    if plan.mix:
        other, unsure_too = slow_layer(plan.mix.tiles, plan.shape, small)
        picture, unsure = plan.mix.weight * picture + (1 - plan.mix.weight) * other, unsure | unsure_too
    picture = picture[..., ::-1].copy()
    for cutout in plan.cutouts:
        x1, y1, x2, y2 = cutout.box
        picture[y1:y2, x1:x2] = cutout.colour[::-1]
    turn = np.s_[:: -1 if plan.flip_ud else 1, :: -1 if plan.flip_lr else 1]
    error = np.abs(render(plan, small.__getitem__).astype(float) - picture[turn]).max(-1)
    assert error[~unsure[turn]].max() <= 5  # OpenCV knows 32 places between two pixels


# ---- boxes follow pixels

MARKED = 128
MARKED_SIZES = [(128, 128), (96, 128), (128, 80), (200, 256), (150, 100)]


@st.composite
def recipes(draw):
    """Hyperparameters of geometry, many of them off."""
    ranges = {
        "degrees": 45.0,
        "translate": 0.3,
        "scale": 0.5,
        "shear": 10.0,
        "perspective": 0.001,
    }
    chances = ("mosaic", "mosaic9", "copy_paste", "mixup", "flipud", "fliplr", "cutout")
    values = {name: draw(st.sampled_from([0.0, high / 3, high])) for name, high in ranges.items()}
    if draw(st.booleans()):
        values.update(degrees=0.0, shear=0.0, perspective=0.0)
    return replace(STILL, **values, **{name: draw(st.sampled_from([0.0, 0.5, 1.0])) for name in chances})


def marker(shape, point) -> np.ndarray:
    """(H, W, 3) u8: a soft dot whose centroid is `point`, where pixel i covers [i, i + 1)."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    dot = 255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 1.5**2))
    return np.repeat(np.rint(dot).astype(np.uint8)[..., None], 3, axis=-1)


def landed(plan, tiles, number, base_shapes, point) -> np.ndarray:
    """(2,) the centroid, in network px, of a marker at a `point` of the `number`-th of `tiles`."""
    alone = replace(plan, tiles=(replace(tiles[number], image=0),), mix=None, cutouts=())

    def painted(base):
        return render(alone, lambda _: base)[..., 0].astype(float)

    shape = base_shapes[tiles[number].image]
    weight = painted(marker(shape, point)) - painted(np.zeros((*shape, 3), np.uint8))
    y, x = np.mgrid[: plan.shape[0], : plan.shape[1]] + 0.5
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@settings(max_examples=40, deadline=None)
@given(hyp=recipes(), seed=seeds)
def test_markers_at_box_corners_land_on_the_corners_of_the_planned_boxes(polygon_store, hyp, seed):
    """Of boxes that show as a whole: their markers span a planned box, to 0.75 px; of polygons, those at its points."""
    store = polygon_store(MARKED_SIZES)
    plan = train_plan(store, seed % 5, imgsz=MARKED, hyp=hyp, rng=generator(seed, 0, 0))
    base_shapes = [base_shape(size, MARKED) for size in MARKED_SIZES]
    tiles = [*plan.tiles, *(plan.mix.tiles if plan.mix else ())]
    for number, tile in enumerate(tiles):
        scale = np.tile(base_scale(MARKED_SIZES[tile.image], MARKED), 2)
        rows = store.rows(tile.image)
        for row in range(rows.start, rows.stop):
            kind = store.classes[row]
            ring = store.rings(row)  # of a polygon, its points
            corners = (ring[0] if ring else store.boxes[row][[[0, 1], [2, 1], [2, 3], [0, 3]]]) * scale[:2]
            if not _shows_whole(tile, corners, plan.shape):
                continue
            if tile.crop is None:  # only where things land: what of it shows is another test's
                tiles[number] = replace(tile, rings=(), corners=np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * MARKED)
            found = np.array([landed(plan, tiles, number, base_shapes, corner) for corner in corners])
            span = np.concatenate([found.min(0), found.max(0)])
            mine = plan.boxes[plan.classes == kind]
            if (span[2:] - span[:2]).min() > 4 and not plan.cutouts:
                assert len(mine), (kind, span)
            if len(mine) and not (plan.cutouts and np.abs(mine - span).max(1).min() > 5):
                assert np.abs(mine - span).max(1).min() <= 0.75, (kind, span, mine)


def _shows_whole(tile, corners, shape) -> bool:
    """Whether four points of a base image, and the markers around them, lie in what shows of a tile."""
    there = transform_points(corners, tile.matrix)
    room = 4.5 * max(1.0, np.sqrt(abs(np.linalg.det(tile.matrix[:2, :2]))))
    inside = np.all((there >= room) & (there <= np.array(shape[::-1]) - room))
    if tile.rings:  # of a pasted object all shows, or it is cut off like its box
        back = transform_points(tile.corners, np.linalg.inv(tile.matrix))
        return bool(inside) and np.all(corners > back.min(0) - 1e-3) and np.all(corners < back.max(0) + 1e-3)
    limits = tile.corners if np.linalg.det(tile.matrix[:2, :2]) > 0 else tile.corners[::-1]
    return bool(inside) and all(_distance_inside(point, limits) > room for point in there)


# ---- where it is written


@pytest.mark.parametrize("recipe", EVERYTHING)
def test_a_sample_can_be_painted_into_its_place_in_a_batch(recipe, polygon_store, smooth_image):
    """Into a part of a larger array too, of which the rest stays."""
    store = polygon_store(SMALL_SIZES)
    small = [smooth_image(np.random.default_rng(index), *size) for index, size in enumerate(SMALL_SIZES)]
    for seed in range(20):
        hyp = replace(STILL, **EVERYTHING[recipe], hsv_h=0.015, hsv_s=0.7, hsv_v=0.4)
        plan = train_plan(store, seed % 3, imgsz=SMALL, hyp=hyp, rng=generator(seed, 0, 0))
        expected = render(plan, small.__getitem__)
        batch = np.full((3, SMALL, SMALL, 3), 7, np.uint8)
        assert np.shares_memory(render(plan, small.__getitem__, batch[1]), batch)
        np.testing.assert_array_equal(batch[1], expected)
        assert np.all(batch[[0, 2]] == 7)
        wide = np.full((2 * SMALL, 2 * SMALL, 3), 7, np.uint8)
        render(plan, small.__getitem__, wide[:SMALL, SMALL:])
        np.testing.assert_array_equal(wide[:SMALL, SMALL:], expected)
        assert np.all(wide[:, :SMALL] == 7) and np.all(wide[SMALL:] == 7)


def test_a_quad_is_its_samples_side_by_side(polygon_store, smooth_image):
    store = polygon_store(SMALL_SIZES)
    small = [smooth_image(np.random.default_rng(index), *size) for index, size in enumerate(SMALL_SIZES)]
    plans = [
        train_plan(store, seed % 3, imgsz=SMALL, hyp=replace(STILL, mosaic=1), rng=generator(seed, 0, 0))
        for seed in range(3)
    ]
    pictures = [render(plan, small.__getitem__) for plan in plans]
    pictures.append(np.full((SMALL, SMALL, 3), PADDING, np.uint8))
    out = np.full((2 * SMALL, 2 * SMALL, 3), 7, np.uint8)
    render_quad(quad_plan(plans, enlarge=False), small.__getitem__, out)
    np.testing.assert_array_equal(out, np.vstack([np.hstack(pictures[:2]), np.hstack(pictures[2:])]))
    large = render_quad(quad_plan(plans[:1], enlarge=True), small.__getitem__)
    np.testing.assert_array_equal(large, cv2.resize(pictures[0], (2 * SMALL, 2 * SMALL)))


# ---- colours, flips, mixing


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


def test_an_image_is_asked_for_once_however_often_it_shows(polygon_store, smooth_image):
    store = polygon_store([(SMALL, SMALL)])
    base = smooth_image(np.random.default_rng(0), SMALL, SMALL)
    hyp = replace(STILL, mosaic=1, copy_paste=1, mixup=1)
    plan = train_plan(store, 0, imgsz=SMALL, hyp=hyp, rng=generator(0, 0, 0))
    assert len(plan.tiles) + len(plan.mix.tiles) > 8
    asked = []
    render(plan, lambda image: asked.append(image) or base)
    assert asked == [0]


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
