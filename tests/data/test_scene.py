"""Layouts, polygons, copy-paste, cutouts and crowds: where things land, in tests by slow twins and by counting."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.boxes import box_area, pairwise_iou, transform_points
from utils.data.images import base_scale, base_shape
from utils.data.plan import generator, letterbox_plan, train_plan
from utils.data.scene import covered_shares, letterboxed, mosaic_of_four, mosaic_of_nine
from utils.hyp import Hyperparameters
from utils.structures import CROWD, DIFFICULT

IMGSZ = 128
SIZES = ((128, 128), (96, 128), (128, 80), (200, 256), (150, 100))
STILL = Hyperparameters(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=1)
seeds = st.integers(0, 2**31)


def plan_of(store, seed, **changes):
    hyp = replace(STILL, **changes)
    return train_plan(store, seed % len(store), imgsz=IMGSZ, hyp=hyp, rng=generator(seed, 0, 0))


# ---- layouts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=9, max_size=9), st.integers(64, 192), st.integers(64, 192))
def test_no_two_images_of_a_mosaic_show_at_the_same_place(make_store, images, x, y):
    store = make_store(SIZES)
    for canvas in (
        mosaic_of_four(store, images[:4], (x, y), IMGSZ),
        mosaic_of_nine(store, images, (x, y), IMGSZ),
        letterboxed(store, images[0], (160, 160), IMGSZ),
    ):
        shown = np.zeros(canvas.shape, int)
        for laid in canvas.laid:
            x1, y1, x2, y2 = laid.visible
            shown[y1:y2, x1:x2] += 1
            height, width = base_shape(SIZES[laid.image], IMGSZ)
            assert laid.left <= x1 < x2 <= laid.left + width
            assert laid.top <= y1 < y2 <= laid.top + height
        assert shown.max() == 1


def test_nine_square_images_lie_in_three_rows_of_three(make_store):
    store = make_store([(IMGSZ, IMGSZ)] * 9)
    canvas = mosaic_of_nine(store, range(9), (150, 100), IMGSZ)
    corners = {laid.image: (laid.left, laid.top) for laid in canvas.laid}
    left, top = 150 - IMGSZ // 2, 100 - IMGSZ // 2
    assert corners[4] == (left, top)
    for image, corner in corners.items():
        assert corner == (left + (image % 3 - 1) * IMGSZ, top + (image // 3 - 1) * IMGSZ)
    assert set(corners) == {0, 1, 2, 3, 4, 5, 6, 7, 8}


def test_the_sample_is_in_the_middle_of_nine_and_mosaics_are_of_nine_as_often_as_asked(make_store):
    store = make_store([(IMGSZ, IMGSZ)] * 4)
    more = 0
    for seed in range(300):
        plan = plan_of(store, seed, mosaic9=0.3, scale=0.5)
        if len(plan.tiles) > 4:
            more += 1
        if len(plan.tiles) == 9:
            assert plan.tiles[4].image == seed % 4
    assert 20 < more < 110  # of some 90 not all show more than four


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([0.0, 1.0]), st.floats(0, 0.9), st.floats(0, 0.9))
def test_crop_rectangle_and_matrix_of_a_tile_agree(make_store, seed, of_nine, scale, translate):
    store = make_store(SIZES)
    for tile in plan_of(store, seed, mosaic9=of_nine, scale=scale, translate=translate).tiles:
        x1, y1, x2, y2 = tile.crop
        height, width = base_shape(SIZES[tile.image], IMGSZ)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert all(isinstance(value, int) for value in tile.crop)
        corners = transform_points(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], float), tile.matrix)
        np.testing.assert_allclose(corners, tile.corners, atol=1e-9)
        np.testing.assert_array_equal(tile.corners, np.rint(tile.corners))
        assert tile.corners.min() >= 0
        assert tile.corners.max() <= IMGSZ


# ---- which boxes


def test_crowds_are_no_objects_in_any_sample():
    flags = np.array([0, CROWD, DIFFICULT], np.uint8)
    boxes = np.array([[0.1, 0.1, 0.3, 0.3], [0.4, 0.4, 0.6, 0.6], [0.7, 0.7, 0.9, 0.9]])
    store = build_store([Path("0.png")], [(100, 100)], [ImageLabels(boxes=boxes, classes=np.arange(3), ignore=flags)])
    recipe = Hyperparameters(mosaic=0, scale=0, translate=0)
    for degrees in (0, 1e-9):
        hyp = replace(recipe, degrees=degrees)
        plan = train_plan(store, 0, imgsz=100, hyp=hyp, rng=generator(0, 0, 0))
        assert plan.classes.tolist() == [0, 2]
    assert letterbox_plan(store, 0, shape=(128, 128), imgsz=100).classes.tolist() == [0, 2]


@pytest.mark.parametrize("degrees", [0, 1e-9])
def test_a_polygon_needs_a_hundredth_of_its_area_and_a_box_a_tenth(degrees):
    box = np.array([[0.4, 0.4, 0.6, 0.6]])
    ring = np.array([[0.4, 0.4], [0.6, 0.4], [0.6, 0.6], [0.4, 0.6]])
    stores = [
        build_store([Path("0.png")], [(400, 400)], [ImageLabels(boxes=box, classes=np.zeros(1, int), rings=rings)])
        for rings in ((), [[ring]])
    ]
    hyp = Hyperparameters(mosaic=0, scale=0, translate=0.9, degrees=degrees, fliplr=0)
    seen = set()
    for seed in range(400):
        boxes, polygons = (train_plan(store, 0, imgsz=400, hyp=hyp, rng=generator(seed, 0, 0)) for store in stores)
        if not boxes.tiles:
            continue
        x, y = boxes.tiles[0].matrix[:2, 2]
        sides = [max(min(240 + shift, 400) - max(160 + shift, 0), 0) for shift in (x, y)]
        share = np.prod(sides) / 6400
        if min(sides) < 2.5 or min(abs(share - 0.1), abs(share - 0.01)) < 0.001:
            continue
        assert (len(boxes.boxes), len(polygons.boxes)) == (share > 0.1, share > 0.01)
        seen.add((share > 0.1, share > 0.01))
    assert len(seen) >= 2


def test_a_turned_polygon_has_a_tighter_box_than_its_turned_box(polygon_store):
    """A diamond turned by 45 degrees is a square; the box of its turned box would be twice as wide."""
    ring = np.array([[0.5, 0.3], [0.7, 0.5], [0.5, 0.7], [0.3, 0.5]])
    labels = ImageLabels(boxes=np.array([[0.3, 0.3, 0.7, 0.7]]), classes=np.zeros(1, int), rings=[[ring]])
    store = build_store([Path("0.png")], [(200, 200)], [labels])
    hyp = Hyperparameters(mosaic=0, scale=0, translate=0, degrees=180, fliplr=0)
    for seed in range(20):
        plan = train_plan(store, 0, imgsz=200, hyp=hyp, rng=generator(seed, 0, 0))
        moved = transform_points(ring * 200, plan.tiles[0].matrix)
        np.testing.assert_allclose(plan.boxes, [[*moved.min(0), *moved.max(0)]], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_box_of_a_cut_polygon_is_around_what_shows_of_it(polygon_store, seed):
    """Points along the polygon's outline and inside, those of them that show: their box, nearly."""
    store = polygon_store(SIZES)
    plan = plan_of(store, seed, degrees=30, shear=5, scale=0.5, translate=0.3)
    for tile in plan.tiles:
        row = store.rows(tile.image).start + 1
        ring = store.rings(row)[0] * base_scale(SIZES[tile.image], IMGSZ)
        dense = np.concatenate(
            [a + np.linspace(0, 1, 200)[:, None] * (b - a) for a, b in zip(ring, np.roll(ring, -1, 0))]
        )
        middle = dense.mean(0)
        points = np.concatenate([middle + size * (dense - middle) for size in np.linspace(0, 1, 60)])
        there = transform_points(points, tile.matrix)
        edges = np.roll(tile.corners, -1, axis=0) - tile.corners
        cross = edges[:, :1] * (there[:, 1] - tile.corners[:, 1:]) - edges[:, 1:] * (there[:, 0] - tile.corners[:, :1])
        shown = there[(cross >= -1e-6).all(0) & (there >= 0).all(1) & (there <= IMGSZ).all(1)]
        mine = plan.boxes[plan.classes == store.classes[row]]
        span = np.concatenate([shown.min(0), shown.max(0)]) if len(shown) else np.zeros(4)
        if len(shown) > 500 and min(span[2:] - span[:2]) > 3:  # a slice of less may be no label
            assert np.abs(mine - span).max(1).min() < 1


# ---- copy-paste


def test_objects_are_pasted_as_often_as_asked_and_only_in_mosaics(polygon_store):
    store = polygon_store(SIZES)
    pasted = [sum(bool(tile.rings) for tile in plan_of(store, seed, copy_paste=0.5).tiles) for seed in range(200)]
    always = [sum(bool(tile.rings) for tile in plan_of(store, seed, copy_paste=1).tiles) for seed in range(200)]
    assert 0.35 < sum(pasted) / sum(always) < 0.65
    assert not any(tile.rings for seed in range(20) for tile in plan_of(store, seed, copy_paste=1, mosaic=0).tiles)
    assert not any(tile.rings for seed in range(20) for tile in plan_of(store, seed).tiles)


@settings(max_examples=80, deadline=None)
@given(seeds)
def test_a_pasted_object_is_the_mirror_image_and_has_its_label(polygon_store, seed):
    """Of upright mosaics without any chance in their transform: then network and canvas differ by a shift."""
    store = polygon_store(SIZES)
    plan = plan_of(store, seed, copy_paste=1)
    mirrored = [tile for tile in plan.tiles if tile.rings]
    for tile in mirrored:
        assert tile.crop is None
        np.testing.assert_allclose(tile.matrix[:2, :2], [[-1, 0], [0, 1]], atol=1e-12)
        corners = tile.corners
        assert corners[0, 0] > corners[1, 0]  # what was left is right
        shown = np.concatenate([corners.min(0).clip(0), corners.max(0).clip(max=IMGSZ)])
        area = np.prod(corners.max(0) - corners.min(0))
        if min(shown[2:] - shown[:2]) > 3 and box_area(shown[None])[0] > 0.3 * area:
            kind = store.classes[store.rows(tile.image).start + 1]
            assert np.abs(plan.boxes[plan.classes == kind] - shown).max(1).min() < 1e-3


def test_a_pasted_object_covers_no_box_by_more_than_three_tenths(polygon_store):
    store = polygon_store(SIZES)
    refused = 0
    for seed in range(150):
        plain, plan = plan_of(store, seed), plan_of(store, seed, copy_paste=1)
        pasted = [tile for tile in plan.tiles if tile.rings]
        taken = plain.boxes.astype(float)
        whole = np.all((taken > 0) & (taken < IMGSZ), axis=1)  # cut ones were larger on the canvas
        for tile in pasted:
            target = np.concatenate([tile.corners.min(0), tile.corners.max(0)])[None]
            iou = pairwise_iou(target, taken[whole])[0]
            union_share = iou / (1 + iou)  # overlap over the sum of both areas
            overlap = union_share * (box_area(target) + box_area(taken[whole]))
            assert np.all(overlap <= 0.3 * box_area(taken[whole]) + 1e-2)
        refused += len(pasted) < 4
    assert refused


# ---- cutouts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_covered_shares_count_pixels_once(data):
    """Of boxes and rectangles of whole pixels, by painting."""
    corner = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12))
    rectangles = st.lists(corner.map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3])), min_size=1, max_size=5)
    boxes, covers = data.draw(rectangles), data.draw(rectangles)
    painted = np.zeros((40, 40), bool)
    for x1, y1, x2, y2 in covers:
        painted[y1:y2, x1:x2] = True
    expected = [painted[y1:y2, x1:x2].mean() for x1, y1, x2, y2 in boxes]
    np.testing.assert_allclose(covered_shares(np.array(boxes, float), covers), expected, atol=1e-12)


def test_cutouts_follow_their_law_and_take_the_labels_that_they_cover(make_store):
    rows = [[x, y, x + 8, y + 8] for x in range(0, 120, 10) for y in range(0, 120, 10)]
    store = make_store([(IMGSZ, IMGSZ)], [rows])
    plans = [plan_of(store, seed, mosaic=0, cutout=0.5) for seed in range(400)]
    cut = [plan for plan in plans if plan.cutouts]
    assert 150 < len(cut) < 250
    assert {len(plan.cutouts) for plan in cut} == set(range(1, 9))
    for plan in cut:
        boxes = [cutout.box for cutout in plan.cutouts]
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= IMGSZ and 0 <= y1 < y2 <= IMGSZ
            assert x2 - x1 <= IMGSZ / 4 + 1 and y2 - y1 <= IMGSZ / 4 + 1
        seen = covered_shares(np.array(rows, float), boxes) <= 0.6
        np.testing.assert_allclose(plan.boxes, np.array(rows)[seen])
        assert all(0 <= level <= 255 for cutout in plan.cutouts for level in cutout.colour)
    assert any(len(plan.boxes) < len(rows) for plan in cut)


def test_cutouts_are_decided_before_flips(make_store):
    store = make_store([(IMGSZ, IMGSZ)], [[[0, 0, 10, 10], [100, 100, 110, 110]]])
    for seed in range(50):
        plain, flipped = (plan_of(store, seed, mosaic=0, cutout=1, fliplr=odds) for odds in (0, 1))
        assert plain.cutouts == flipped.cutouts
        assert len(plain.boxes) == len(flipped.boxes)
