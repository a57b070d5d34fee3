from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import transform_boxes, transform_points
from utils.data.images import base_scale, base_shape
from utils.data.plan import (
    QUAD,
    SAMPLE,
    SIZE,
    batch_order,
    class_weights,
    epoch_order,
    generator,
    image_weights,
    letterbox_plan,
    quad_plan,
    source_to_network,
    train_plan,
)
from utils.data.render import render
from utils.hyp import Hyperparameters

IMGSZ = 160
STILL = Hyperparameters(
    hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0
)  # each test turns on what it is about
CLASSIC = replace(STILL, translate=0.1, scale=0.5, fliplr=0.5, flipud=0.5, mosaic=1)
RECIPES = {
    "letterbox": replace(CLASSIC, mosaic=0),
    "mosaic": CLASSIC,
    "wide": replace(CLASSIC, translate=0.5, scale=0.9),
    "rotation": replace(CLASSIC, degrees=45),
    "turn": replace(CLASSIC, degrees=180, mosaic=0),
    "shear": replace(CLASSIC, shear=10),
    "perspective": replace(CLASSIC, perspective=0.001),
    "all": replace(CLASSIC, degrees=20, shear=5, perspective=0.0005, mosaic=0.7, mixup=0.5),
    "mixup": replace(CLASSIC, mixup=1),
}
SIZES = [(160, 160), (120, 200), (333, 250), (80, 100), (64, 300), (240, 240)]
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def store(make_store):
    """Images of all aspects; every box has a class of its own, so that it is known again in a plan."""
    rng = np.random.default_rng(0)
    boxes = []
    for height, width in SIZES:
        corners = rng.uniform(0, 0.75, (4, 2)) * (width, height)
        boxes.append(np.concatenate([corners, corners + rng.uniform(0.1, 0.25, (4, 2)) * (width, height)], axis=1))
    boxes[0][0] = [0, 0, 160, 160]
    boxes[1] = boxes[1][:0]
    counts = [len(item) for item in boxes]
    classes = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    return make_store(SIZES, boxes, classes)


def plan_of(store, recipe, seed, *, imgsz=IMGSZ, shape=None):
    image = seed % len(store)
    return train_plan(store, image, imgsz=imgsz, shape=shape, hyp=recipe, rng=generator(seed, 0, 0))


def all_tiles(plan):
    return [*plan.tiles, *(plan.mix.tiles if plan.mix else ())]


def base_boxes(store, image, imgsz=IMGSZ):
    """(N, 4) boxes of an image in the frame of its base image."""
    scale_x, scale_y = base_scale(tuple(store.sizes[image]), imgsz)
    return store.boxes[store.rows(image)] * np.array([scale_x, scale_y, scale_x, scale_y])


def fields_of(plan):
    """A plan as nested plain values, which compare."""
    value = {name: getattr(plan, name) for name in ("shape", "hsv", "flip_lr", "flip_ud")}
    tiles = [
        (tile.image, tile.matrix.tolist(), tile.corners.tolist(), tile.crop is not None) for tile in all_tiles(plan)
    ]
    return value, tiles, plan.boxes.tolist(), plan.classes.tolist(), plan.mix and plan.mix.weight


# ---- chance


@settings(deadline=None)
@given(seeds, st.integers(0, 1000), st.integers(0, 2**32 - 2))
def test_a_generator_depends_on_all_three_numbers_and_nothing_else(seed, epoch, position):
    draw = generator(seed, epoch, position).random(4).tolist()
    assert generator(seed, epoch, position).random(4).tolist() == draw
    for other in [(seed + 1, epoch, position), (seed, epoch + 1, position), (seed, epoch, position + 1)]:
        assert generator(*other).random(4).tolist() != draw
    assert generator(seed, 1, 0).random() != generator(seed, 0, 1).random()


def test_purposes_are_streams_of_their_own_and_samples_keep_theirs():
    """Far apart in the counter of one key: the other purposes came later, and left samples as they were."""
    sample = np.random.Philox(key=np.array([5, 2 << 32 | 9], np.uint64))
    assert generator(5, 2, 9).random(8).tolist() == np.random.Generator(sample).random(8).tolist()
    draws = {tuple(generator(5, 2, 9, purpose).random(4)) for purpose in (SAMPLE, QUAD, SIZE)}
    assert len(draws) == 3


@settings(deadline=None)
@given(seeds, st.integers(0, 500), st.integers(1, 300))
def test_an_epoch_goes_through_every_image_once(seed, epoch, num_images):
    order = epoch_order(seed, epoch, num_images)
    assert sorted(order.tolist()) == list(range(num_images))
    assert order.tolist() == epoch_order(seed, epoch, num_images).tolist()


def test_orders_of_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@settings(deadline=None)
@given(seeds, st.integers(0, 500), st.integers(1, 300))
def test_the_batches_of_an_epoch_come_in_an_order_drawn_anew(seed, epoch, num_batches):
    assert sorted(batch_order(seed, epoch, num_batches).tolist()) == list(range(num_batches))
    if num_batches > 20:
        orders = {
            tuple(batch_order(*key, num_batches)) for key in [(seed, epoch), (seed, epoch + 1), (seed + 1, epoch)]
        }
        assert len(orders) == 3


# ---- image weights


@st.composite
def labelled_images(draw):
    """Classes of the labels of each image, and how many classes there are."""
    num_classes = draw(st.integers(1, 5))
    kinds = st.lists(st.integers(0, num_classes - 1), max_size=4)
    return draw(st.lists(kinds, min_size=1, max_size=12)), num_classes


def _store_of_classes(make_store, classes):
    boxes = [[[1, 1, 9, 9]] * len(kinds) for kinds in classes]
    return make_store([(10, 10)] * len(classes), boxes, [np.array(kinds, int) for kinds in classes])


@settings(deadline=None)
@given(labelled_images(), st.data())
def test_class_and_image_weights_are_what_the_words_say(make_store, labelled, data):
    classes, num_classes = labelled
    store = _store_of_classes(make_store, classes)
    maps = data.draw(st.one_of(st.just([]), st.lists(st.floats(0, 1), min_size=num_classes, max_size=num_classes)))

    counts = [sum(kinds.count(index) for kinds in classes) for index in range(num_classes)]
    inverse = [1 / count if count else 0 for count in counts]
    per_class = [
        (value / sum(inverse) if value else 0) * (1 - (maps[index] if maps else 0)) ** 2
        for index, value in enumerate(inverse)
    ]
    per_image = [sum(per_class[kind] for kind in kinds) for kinds in classes]
    np.testing.assert_allclose(class_weights(store, num_classes, maps), per_class)
    expected = per_image if sum(per_image) else [1] * len(classes)
    np.testing.assert_allclose(image_weights(store, class_weights(store, num_classes, maps)), expected)


def test_images_are_drawn_as_often_as_their_weights_say():
    weights = np.array([0.0, 1, 2, 0, 5, 0.5] * 4000)
    drawn = np.bincount(epoch_order(3, 1, len(weights), weights) % 6, minlength=6) / len(weights)
    np.testing.assert_allclose(drawn, weights[:6] / weights[:6].sum(), atol=0.015)
    assert drawn[0] == drawn[3] == 0
    assert epoch_order(3, 2, 50, weights[:50]).tolist() != epoch_order(3, 1, 50, weights[:50]).tolist()


# ---- samples


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_key_gives_the_same_plan_and_another_another(recipe, store):
    plans = [fields_of(plan_of(store, RECIPES[recipe], seed)) for seed in (6, 6, 12)]  # all of image 0
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_decisions_follow_the_recipe(store):
    """Frequencies and ranges over many samples, each as SPEC 6 has it."""
    recipe = replace(CLASSIC, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5, flipud=0.2, mosaic=0.6, mixup=0.3)
    plans = [plan_of(store, recipe, seed) for seed in range(600)]
    assert np.mean([plan.flip_lr for plan in plans]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([plan.flip_ud for plan in plans]) == pytest.approx(0.2, abs=0.08)
    mixed = [plan for plan in plans if plan.mix]
    assert len(mixed) / len(plans) == pytest.approx(0.6 * 0.3, abs=0.07)  # mixup only of mosaics
    weights = [plan.mix.weight for plan in mixed]
    assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
    assert np.std(weights) == pytest.approx(np.sqrt(1 / (4 * 65)), abs=0.02)  # Beta(32, 32)
    gains = np.array([plan.hsv for plan in plans]) - 1
    for column, gain in zip(gains.T, (0.015, 0.7, 0.4)):
        assert np.abs(column).max() <= gain
        assert column.min() < -0.95 * gain
        assert column.max() > 0.95 * gain
    widest = [max(plan.tiles, key=lambda tile: tile.crop[2] - tile.crop[0]) for plan in plans if plan.tiles]
    scales = np.array([tile.matrix[0, 0] for tile in widest])
    assert 0.49 <= scales.min() < 0.53  # crop and rectangle are whole pixels, so they may differ a little
    assert 1.47 < scales.max() <= 1.52


def test_the_sample_itself_is_in_each_quadrant_as_often(store):
    """And the three others are drawn from all images."""
    quadrants, others = [], []
    for seed in range(400):
        plan = train_plan(store, 5, imgsz=IMGSZ, hyp=replace(STILL, mosaic=1, scale=0.5), rng=generator(seed, 0, 0))
        centres = {tile.image: tile.corners.mean(0) for tile in plan.tiles}
        others += [tile.image for tile in plan.tiles if tile.image != 5]
        if 5 in centres and len(centres) == 4:
            middle = np.mean(list(centres.values()), axis=0)
            quadrants.append(tuple((centres[5] > middle).tolist()))
    assert set(others) == {0, 1, 2, 3, 4}
    shares = [quadrants.count(each) / len(quadrants) for each in set(quadrants)]
    assert len(shares) == 4
    assert max(shares) < 0.4


def test_without_any_gain_a_training_sample_is_the_letterbox(store):
    for image in range(len(store)):
        plan = train_plan(store, image, imgsz=IMGSZ, hyp=STILL, rng=generator(0, 0, image))
        still = letterbox_plan(store, image, shape=(IMGSZ, IMGSZ), imgsz=IMGSZ)
        np.testing.assert_allclose(plan.tiles[0].matrix, still.tiles[0].matrix, atol=1e-12)
        np.testing.assert_array_equal(plan.tiles[0].corners, still.tiles[0].corners)
        np.testing.assert_allclose(plan.boxes, still.boxes, atol=1e-5)
        assert plan.hsv is None
        shape = (192, 224)
        plan = train_plan(store, image, imgsz=IMGSZ, shape=shape, hyp=STILL, rng=generator(0, 0, image))
        still = letterbox_plan(store, image, shape=shape, imgsz=IMGSZ)
        np.testing.assert_array_equal(plan.tiles[0].corners, still.tiles[0].corners)
        np.testing.assert_allclose(plan.boxes, still.boxes, atol=1e-5)


def test_translation_is_a_share_of_each_side(make_store):
    store, shape = make_store([(64, 160)]), (96, 224)
    recipe = replace(STILL, translate=0.2)
    plans = [train_plan(store, 0, imgsz=160, shape=shape, hyp=recipe, rng=generator(seed, 0, 0)) for seed in range(300)]
    shifts = np.array([plan.tiles[0].matrix[:2, 2] - (32, 16) for plan in plans])
    for column, side in zip(shifts.T, (224, 96)):
        assert np.abs(column).max() <= 0.2 * side + 0.5  # on whole pixels
        assert np.abs(column).max() > 0.19 * side


# ---- boxes and pixels


def coverage_of(plan, number, box):
    """(H, W) 0..1: how much of each pixel shows `box` of the `number`-th tile, found by painting nothing else."""
    shown = replace(plan, hsv=None)
    tiles = [replace(tile, image=index) for index, tile in enumerate(all_tiles(plan))]
    shown = replace(shown, tiles=tuple(tiles[: len(plan.tiles)]))
    share = 1.0
    if plan.mix:
        shown = replace(shown, mix=replace(plan.mix, tiles=tuple(tiles[len(plan.tiles) :])))
        share = plan.mix.weight if number < len(plan.tiles) else 1 - plan.mix.weight

    def painted(value: int) -> np.ndarray:
        def base(index: int) -> np.ndarray:
            image = np.zeros((IMGSZ, IMGSZ, 3), np.uint8)  # as large as any: what lies outside of it is never shown
            if index == number:
                x1, y1, x2, y2 = np.rint(box).astype(int)
                image[y1:y2, x1:x2] = value
            return image

        return render(shown, base)[..., 0].astype(float)

    return (painted(255) - painted(0)) / (255 * share)


def extent(mask):
    """xyxy around the pixels that are set, or None."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


@pytest.fixture(scope="module")
def snapped(store):
    """The store with boxes that fill whole pixels of the base images, so that they can be painted exactly."""
    boxes = store.boxes.astype(np.float64)
    for image in range(len(store)):
        scale = np.tile(base_scale(tuple(store.sizes[image]), IMGSZ), 2)
        boxes[store.rows(image)] = np.rint(boxes[store.rows(image)] * scale) / scale
    return replace(store, boxes=boxes.astype(np.float32))


@pytest.mark.parametrize("shape", [(IMGSZ, IMGSZ), (96, 224)])
@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=12, deadline=None)
@given(seed=seeds)
def test_planned_boxes_are_where_the_pixels_are(recipe, shape, snapped, seed):
    """Paint every box of a plan alone and look where it went: there lies a planned box, or too little to keep one."""
    plan = plan_of(snapped, RECIPES[recipe], seed, shape=shape)
    tilted = not all(tile.crop is not None for tile in all_tiles(plan))
    tolerance = 1.5 if tilted else 1.0  # a corner that is sharp fills its last pixels by less than half
    planned = list(zip(plan.classes.tolist(), plan.boxes))
    for number, tile in enumerate(all_tiles(plan)):
        rows = snapped.rows(tile.image)
        for kind, box in zip(snapped.classes[rows].tolist(), base_boxes(snapped, tile.image)):
            found = extent(coverage_of(plan, number, box) > (0.3 if tilted else 0.5))
            mine = [
                item
                for item in planned
                if item[0] == kind and found is not None and _agree(item[1], found, tolerance, shape)
            ]
            if mine:
                planned = [item for item in planned if item is not mine[0]]
            elif found is not None:
                assert not _is_clearly_kept(found, box, tile.matrix, exact=not tilted), (kind, found, plan.boxes)
    without_pixels = [
        box for _, box in planned if not (tilted and _touches_border(box, shape))
    ]  # there, its corner may be empty
    assert not without_pixels


def _agree(box, found, tolerance, shape):
    """Whether the pixels `found` fill a planned box. Cut by the border, a tilted one may show less than its box."""
    if tolerance == 1.0 or not _touches_border(box, shape):
        return np.abs(box - found).max() <= tolerance
    return bool(np.all(found[:2] >= box[:2] - tolerance) and np.all(found[2:] <= box[2:] + tolerance))


def _touches_border(box, shape):
    return bool(np.any((box <= 0) | (box >= np.tile(shape[::-1], 2))))


def _is_clearly_kept(found, box, matrix, *, exact):
    """Whether the rules keep a box that shows as `found`, even when each side is a pixel or two off."""
    if not exact:
        return False
    width, height = found[2:] - found[:2] - 2
    full = (box[2] - box[0]) * (box[3] - box[1]) * abs(matrix[0, 0] * matrix[1, 1])
    return min(width, height) > 2 and width * height > 0.1 * full


# ---- which boxes are kept


def slow_boxes(store, tile, scale):
    """The boxes of a tile in network px before flips, by the words of SPEC 6, one at a time."""
    kept = []
    visible = transform_points(tile.corners, np.linalg.inv(tile.matrix))  # base px
    low, high = visible.min(0), visible.max(0)
    rows = store.rows(tile.image)
    for kind, (x1, y1, x2, y2) in zip(store.classes[rows].tolist(), base_boxes(store, tile.image).tolist()):
        full = (x2 - x1) * (y2 - y1)
        x1, x2 = (min(max(value, low[0]), high[0]) for value in (x1, x2))
        y1, y2 = (min(max(value, low[1]), high[1]) for value in (y1, y2))
        moved = [tile.matrix @ [x, y, 1] for x in (x1, x2) for y in (y1, y2)]
        xs, ys = [x / z for x, _, z in moved], [y / z for _, y, z in moved]
        left, right = (min(max(value, 0), IMGSZ) for value in (min(xs), max(xs)))
        top, bottom = (min(max(value, 0), IMGSZ) for value in (min(ys), max(ys)))
        width, height = right - left, bottom - top
        if not (width > 2 and height > 2 and width * height > 0.1 * full * scale**2):
            continue
        if not (x2 - x1) * (y2 - y1) > 0.1 * full:  # the mosaic's own border cut off the rest
            continue
        if max(width / height, height / width) < 100:
            kept.append((kind, left, top, right, bottom))
    return kept


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_box_is_kept_by_the_rules_and_no_other(store, seed):
    """Rotated mosaics: their corners are not cut by the output, so they tell what part of each image shows."""
    plan = plan_of(store, replace(STILL, degrees=20, scale=0.9, translate=0.5, mosaic=1), seed)
    expected = []
    for tile in plan.tiles:
        expected += slow_boxes(store, tile, np.sqrt(np.linalg.det(tile.matrix[:2, :2])))
    got = [(kind, *box) for kind, box in zip(plan.classes.tolist(), plan.boxes.tolist())]
    np.testing.assert_allclose(np.reshape(got, (-1, 5)), np.reshape(expected, (-1, 5)), atol=1e-3)


def test_a_line_at_the_edge_of_a_mosaic_is_no_box(make_store):
    """What the mosaic's own border cut off entirely leaves a line, and a tilted line lies in a box with an area."""
    store = make_store([(160, 160)], [[[0, 0, 2, 160]]])
    for seed in range(200):
        plan = plan_of(store, replace(STILL, mosaic=1, degrees=45), seed)
        assert len(plan.boxes) <= sum(_reaches_base_column(tile, 1) for tile in plan.tiles)


def _reaches_base_column(tile, x):
    return transform_points(tile.corners, np.linalg.inv(tile.matrix))[:, 0].min() < x


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([10, 10, 12, 50], False),  # 2 px wide
        ([10, 10, 12.1, 50], True),
        ([10, 10, 50, 11.9], False),
        ([10, 10, 300, 12.5], False),  # aspect of 100 and more
        ([10, 10, 240, 12.5], True),
        ([0, 0, 320, 320], True),
    ],
)
def test_what_is_too_small_or_too_thin_for_training(box, kept, make_store):
    store = make_store([(320, 320)], [[box]])
    plan = train_plan(store, 0, imgsz=320, hyp=STILL, rng=generator(0, 0, 0))
    np.testing.assert_allclose(plan.boxes, [box] if kept else np.empty((0, 4)), atol=1e-4)
    assert len(letterbox_plan(store, 0, shape=(352, 352), imgsz=320).boxes) == 1  # evaluation leaves out none


def test_a_box_needs_a_tenth_of_its_scaled_area(make_store):
    store = make_store([(160, 160)], [[[60, 60, 100, 100]]])
    seen = set()
    for seed in range(300):
        plan = train_plan(store, 0, imgsz=160, hyp=replace(STILL, translate=0.9), rng=generator(seed, 0, 0))
        if not plan.tiles:
            continue
        x, y = plan.tiles[0].matrix[:2, 2]
        shown = np.prod([max(min(100 + shift, 160) - max(60 + shift, 0), 0) for shift in (x, y)]) / 1600
        assert len(plan.boxes) == (shown > 0.1)
        seen.add((shown > 0.1, 0 < shown <= 0.1))
    assert len(seen) == 3


def test_images_without_boxes_and_a_single_image_make_plans(make_store):
    store = make_store([(50, 100)])
    for recipe in RECIPES.values():
        plan = plan_of(store, recipe, 3)
        assert plan.boxes.shape == (0, 4)
        assert plan.boxes.dtype == np.float32
        assert plan.classes.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(sorted(RECIPES)))
def test_boxes_lie_inside_the_output_whatever_the_recipe(store, seed, recipe):
    plan = plan_of(store, RECIPES[recipe], seed)
    assert np.all((plan.boxes >= 0) & (plan.boxes <= IMGSZ))
    assert np.all(plan.boxes[:, 2:] - plan.boxes[:, :2] > 1.99)
    assert plan.boxes.dtype == np.float32
    assert plan.classes.dtype == np.int32
    assert len(plan.boxes) == len(plan.classes)


# ---- tiles


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_tiles_of_an_upright_mosaic_are_whole_pixels_without_gap_or_overlap(make_store, seed):
    """Of square images: then the tiles around the centre fill a rectangle."""
    store = make_store([(100, 100)] * 3)
    plan = plan_of(store, replace(STILL, mosaic=1, scale=0.9, translate=0.5), seed)
    count = np.zeros(plan.shape, int)
    for tile in plan.tiles:
        assert tile.crop is not None
        np.testing.assert_array_equal(tile.corners, np.rint(tile.corners))
        (x1, y1), (x2, y2) = tile.corners[0].astype(int), tile.corners[2].astype(int)
        assert 0 <= x1 < x2 <= IMGSZ
        assert 0 <= y1 < y2 <= IMGSZ
        count[y1:y2, x1:x2] += 1
    if plan.tiles:
        x1, y1, x2, y2 = extent(count > 0)
        assert np.all(count[y1:y2, x1:x2] == 1)
    assert count.max(initial=0) <= 1


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_neighbours_of_a_tilted_mosaic_share_their_corners(make_store, seed):
    store = make_store([(100, 100)] * 3)
    plan = plan_of(store, replace(STILL, mosaic=1, degrees=45, shear=10, perspective=0.0005), seed)
    if len(plan.tiles) == 4:
        top_left, top_right, bottom_left, bottom_right = (tile.corners for tile in plan.tiles)
        np.testing.assert_allclose(top_left[[1, 2]], top_right[[0, 3]])
        np.testing.assert_allclose(top_left[[3, 2]], bottom_left[[0, 1]])
        np.testing.assert_allclose(bottom_right[0], top_left[2])


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(sorted(RECIPES)))
def test_a_tile_shows_nothing_beyond_its_base_image(store, seed, recipe):
    for tile in all_tiles(plan_of(store, RECIPES[recipe], seed)):
        height, width = base_shape(tuple(store.sizes[tile.image]), IMGSZ)
        inside = transform_points(tile.corners, np.linalg.inv(tile.matrix))
        slack = 0.5 / np.sqrt(abs(np.linalg.det(tile.matrix[:2, :2]))) + 1e-6 if tile.crop is not None else 1e-6
        assert np.all(inside >= -slack)
        assert np.all(inside <= [width + slack, height + slack])


# ---- quads


def test_a_merged_quad_moves_boxes_into_their_quadrants(store):
    samples = [plan_of(store, CLASSIC, seed, shape=(96, 128)) for seed in range(4)]
    quad = quad_plan(samples, enlarge=False)
    assert quad.shape == (192, 256)
    expected = []
    for sample, (left, top) in zip(samples, [(0, 0), (128, 0), (0, 96), (128, 96)]):
        for kind, (x1, y1, x2, y2) in zip(sample.classes.tolist(), sample.boxes.tolist()):
            expected.append((kind, x1 + left, y1 + top, x2 + left, y2 + top))
    assert len(expected) > 8
    np.testing.assert_allclose(np.column_stack([quad.classes, quad.boxes]), expected, atol=1e-4)
    assert quad.boxes.dtype == np.float32


def test_an_enlarged_quad_is_its_first_sample_at_twice_the_size(store):
    sample = plan_of(store, CLASSIC, 2)
    quad = quad_plan([sample], enlarge=True)
    assert quad.shape == (2 * IMGSZ, 2 * IMGSZ)
    np.testing.assert_allclose(quad.boxes, 2 * sample.boxes)
    np.testing.assert_array_equal(quad.classes, sample.classes)
    assert quad.boxes.dtype == np.float32


# ---- letterbox


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([64, 160, 640]), st.integers(0, 3), st.integers(0, 3)
)
def test_a_letterbox_is_centred_and_its_placement_goes_back_to_the_source(make_store, height, width, imgsz, more, wide):
    box = [width * 0.125, height * 0.25, width, height * 0.75]
    store = make_store([(height, width)], [[box]])
    base_height, base_width = base_shape((height, width), imgsz)
    shape = (base_height + 31 * more, base_width + 31 * wide)
    plan = letterbox_plan(store, 0, shape=shape, imgsz=imgsz)
    (tile,) = plan.tiles
    assert plan.shape == shape
    assert tile.crop is not None
    (left, top), (right, bottom) = tile.corners[0], tile.corners[2]
    assert (right - left, bottom - top) == (base_width, base_height)
    assert 0 <= (shape[1] - right) - left <= 1
    assert 0 <= (shape[0] - bottom) - top <= 1

    placement = source_to_network(store, plan, imgsz)
    frame = np.array([[0.0, 0.0], [width, 0], [width, height], [0, height]])
    np.testing.assert_allclose(transform_points(frame, placement), tile.corners, atol=1e-6)
    back = transform_boxes(plan.boxes.astype(np.float64), np.linalg.inv(placement))
    np.testing.assert_allclose(back, [box], rtol=1e-6, atol=1e-6 * max(height, width))  # of f32 boxes
    points = np.random.default_rng(0).uniform(0, max(shape), (20, 2))
    there = transform_points(points, np.linalg.inv(placement))
    np.testing.assert_allclose(transform_points(there, placement), points, atol=1e-6)
