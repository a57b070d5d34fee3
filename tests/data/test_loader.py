import gc
import math
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import transform_boxes
from utils.data import loader
from utils.data.cache import cached_images
from utils.data.images import BaseImages
from utils.data.loader import (
    EvalBatches,
    Lot,
    Stream,
    TrainBatches,
    TrainStream,
    UnpaintedBatch,
    faults_named,
    part_of,
    resized,
)
from utils.data.plan import (
    QUAD,
    class_weights,
    enlarges,
    epoch_order,
    even_order,
    generator,
    image_weights,
    letterbox_plan,
    repeat_factors,
    train_plan,
)
from utils.data.render import render
from utils.data.scan import scan_split
from utils.hyp import Hyperparameters
from utils.structures import CROWD, DIFFICULT, Batch, DatasetSpec, Part, RunError, UserError

IMGSZ = 64
HYP = Hyperparameters(mosaic=0.7, mixup=0.3, degrees=5, fliplr=0.5)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores


@pytest.fixture
def store(make_dataset):
    text = "0 .5 .5 .5 .5\n1 .3 .3 .2 .2\n"
    spec = make_dataset({"train": {f"{number}.png": text if number % 3 else None for number in range(10)}})
    return scan_split(spec, "train")[0]


@pytest.fixture
def batches(store):
    return train_batches(store)


def train_batches(store, **changes) -> TrainBatches:
    usual = {"images": BaseImages(store=store, imgsz=IMGSZ), "imgsz": IMGSZ, "batch_size": 4, "hyp": HYP, "seed": 3}
    return TrainBatches(store=store, **{**usual, **changes})


def content(batch: Batch) -> dict[str, tuple | None]:
    """Everything in a batch, as bytes: equal means identical to the last bit."""
    return {
        name: (tuple(value.shape), value.dtype, value.contiguous().numpy().tobytes())
        if isinstance(value, torch.Tensor)
        else value
        for name, value in vars(batch).items()
    }


def streamed(batches: TrainBatches, start: int = 0, end: int = 1, *, workers: int = 0) -> list[Batch]:
    """The batches of the epochs `start` to `end` - 1."""
    stream = TrainStream(batches, end_epoch=end, workers=workers, num_classes=3)
    return [batch for epoch in range(start, end) for batch in stream.epoch(epoch)]


def lots(batches: TrainBatches, epoch: int) -> list[Lot]:
    order = batches.order(epoch)
    return [batches.lot(epoch, index, order) for index in range(batches.per_epoch)]


def by_hand(batches: TrainBatches, images, position: int, *, shape=(IMGSZ, IMGSZ), epoch=0) -> list[tuple]:
    """Pixels, boxes and classes of the samples of some images of an epoch, one at a time."""
    samples = []
    for offset, image in enumerate(images):
        rng = generator(batches.seed, epoch, position + offset)
        plan = train_plan(batches.store, int(image), imgsz=IMGSZ, shape=shape, hyp=batches.hyp, rng=rng)
        samples.append((render(plan, batches.images), plan.boxes, plan.classes))
    return samples


def of_batch(batch: Batch) -> list[tuple]:
    """The same of each network input of a batch."""
    return [
        (image, batch.boxes[batch.image_of == slot].numpy(), batch.classes[batch.image_of == slot].numpy())
        for slot, image in enumerate(batch.images.permute(0, 2, 3, 1).numpy())
    ]


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        for mine, theirs in zip(one, other):
            np.testing.assert_array_equal(mine, theirs)


# ---- training


def test_every_image_starts_one_sample_of_an_epoch_and_the_last_batch_is_smaller(batches):
    assert batches.per_epoch == 3
    for epoch in range(3):
        seen = [batch.indices.tolist() for batch in streamed(batches, epoch, epoch + 1)]
        assert [len(indices) for indices in seen] == [4, 4, 2]
        assert sorted(np.concatenate(seen).tolist()) == list(range(10))


def test_epochs_differ_in_order_and_in_augmentation(batches):
    first, second = streamed(replace(batches, batch_size=10), 0, 2)
    assert first.indices.tolist() != second.indices.tolist()
    images = [batch.images[batch.indices.argsort()] for batch in (first, second)]
    assert all(not torch.equal(*pair) for pair in zip(*images))


def test_a_sample_depends_on_its_place_in_the_epoch_and_not_on_the_batch_size(batches):
    images = [
        torch.cat([batch.images for batch in streamed(each, 1, 2)])
        for each in (batches, replace(batches, batch_size=10))
    ]
    assert torch.equal(*images)


def test_a_seed_is_a_stream_of_its_own(batches):
    first, other = (streamed(replace(batches, seed=seed, batch_size=10))[0] for seed in (3, 4))
    assert first.indices.tolist() != other.indices.tolist()
    images = [batch.images[batch.indices.argsort()] for batch in (first, other)]
    assert all(not torch.equal(*pair) for pair in zip(*images))


def test_a_training_batch_is_well_formed(batches):
    batch = streamed(batches)[0]
    assert batch.images.shape == (4, 3, IMGSZ, IMGSZ)
    assert batch.images.dtype == torch.uint8
    assert batch.boxes.dtype == torch.float32
    assert batch.boxes.shape == (len(batch.classes), 4)
    assert batch.classes.dtype == batch.image_of.dtype == batch.indices.dtype == torch.int64
    assert torch.equal(batch.image_of, batch.image_of.sort().values)
    assert set(batch.image_of.tolist()) <= {0, 1, 2, 3}
    assert batch.placements is None


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_channels_last_in_memory(workers, batches):
    for batch in streamed(batches, workers=workers):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_images_are_rgb(make_dataset):
    spec = make_dataset({"train": {"a.png": None}})
    red = np.zeros((IMGSZ, IMGSZ, 3), np.uint8)
    red[..., 2] = 255
    cv2.imwrite(str(spec.root / "images/train/a.png"), red)
    store, _ = scan_split(spec, "train")
    hyp = Hyperparameters(mosaic=0, scale=0, translate=0, hsv_h=0, hsv_s=0, hsv_v=0)
    [batch] = streamed(train_batches(store, batch_size=1, hyp=hyp))
    assert batch.images.amin((0, 2, 3)).tolist() == [255, 0, 0]
    assert batch.images.amax((0, 2, 3)).tolist() == [255, 0, 0]


def test_a_set_without_boxes_makes_batches(make_dataset):
    store, _ = scan_split(make_dataset({"train": {"a.png": None, "b.png": None}}), "train")
    [batch] = streamed(train_batches(store, batch_size=2))
    assert batch.boxes.shape == (0, 4)
    assert batch.image_of.shape == batch.classes.shape == (0,)


# ---- rectangular batches


def rect_shape(store, images) -> tuple[int, int]:
    """The smallest multiples of 32 with half a stride to spare around all images, one image at a time."""
    height = max(IMGSZ * h / max(h, w) for h, w in store.sizes[images].tolist())
    width = max(IMGSZ * w / max(h, w) for h, w in store.sizes[images].tolist())
    return math.ceil((height + 16) / 32) * 32, math.ceil((width + 16) / 32) * 32


@pytest.fixture
def photos(make_store, tmp_path, smooth_image):
    """22 images of widths from 20 to 146 at a height of 64, in mixed order, each with a box of its own class."""
    rng = np.random.default_rng(0)
    sizes = [(64, int(width)) for width in rng.permutation(np.arange(20, 152, 6))]
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes):
        assert cv2.imwrite(str(path), smooth_image(rng, *size))
    boxes = [[[2, 4, 0.7 * width, 50]] for _, width in sizes]
    return make_store(sizes, boxes, [[number] for number in range(len(sizes))], paths=paths)


@pytest.fixture
def rect(photos):
    return train_batches(photos, hyp=replace(HYP, mosaic=0), rect=True)


def test_a_rect_epoch_has_each_image_once_in_batches_of_like_aspect(rect, photos):
    for epoch in range(3):
        seen, spans = [], []
        for batch in streamed(rect, epoch, epoch + 1):
            images = batch.indices.numpy()
            assert tuple(batch.images.shape[2:]) == rect_shape(photos, images)
            assert batch.images.numel() <= rect.batch_bytes
            aspects = photos.sizes[images, 0] / photos.sizes[images, 1]
            spans.append((aspects.min(), aspects.max()))
            seen += images.tolist()
        assert sorted(seen) == list(range(22))
        assert all(low[1] <= high[0] for low, high in zip(sorted(spans), sorted(spans)[1:]))
        assert spans != sorted(spans)  # the batches themselves come in any order


def test_rect_batches_come_in_another_order_each_epoch_and_the_smaller_one_anywhere(rect):
    counts = [[len(lot.images) for lot in lots(rect, epoch)] for epoch in range(6)]
    assert {tuple(sorted(each)) for each in counts} == {(2, 4, 4, 4, 4, 4)}
    assert len({each.index(2) for each in counts}) > 1


def test_images_of_one_aspect_meet_others_each_epoch(rect, make_store, photos):
    same = replace(rect, store=replace(photos, sizes=np.full_like(photos.sizes, 64)))
    groups = [{frozenset(lot.images.tolist()) for lot in lots(same, epoch)} for epoch in (0, 1)]
    assert not groups[0] & groups[1]


def test_a_rect_batch_without_gains_is_its_images_letterboxed(rect, photos):
    still = Hyperparameters(mosaic=1, mixup=1, scale=0, translate=0, hsv_h=0, hsv_s=0, hsv_v=0, fliplr=0)
    batch = streamed(replace(rect, hyp=still))[2]  # mosaic, and mixup with it, is off
    for slot, image in enumerate(batch.indices.tolist()):
        plan = letterbox_plan(photos, image, shape=tuple(batch.images.shape[2:]), imgsz=IMGSZ)
        picture = render(plan, rect.images)
        np.testing.assert_array_equal(batch.images[slot].permute(1, 2, 0), picture)
        np.testing.assert_allclose(batch.boxes[batch.image_of == slot], plan.boxes, atol=1e-4)


def test_samples_of_a_rect_epoch_have_generators_of_their_own(rect):
    second = lots(rect, 1)
    positions = [lot.position + place for lot in second for place in range(len(lot.images))]
    assert sorted(positions) == list(range(22))
    for lot, batch in zip(second, streamed(rect, 1, 2)):
        shape = tuple(batch.images.shape[2:])
        assert_same(of_batch(batch), by_hand(rect, lot.images, lot.position, shape=shape, epoch=1))


# ---- quads


def quad_by_hand(batches: TrainBatches, images, position: int, shape, epoch: int) -> tuple:
    """A network input of twice the side out of up to four images, its samples made apart and pasted."""
    height, width = shape
    samples = by_hand(batches, images, position, shape=shape, epoch=epoch)
    if len(samples) == 4 and generator(batches.seed, epoch, position, QUAD).random() < 0.5:
        picture, boxes, classes = samples[0]
        return cv2.resize(picture, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR), boxes * 2, classes
    picture = np.full((2 * height, 2 * width, 3), 114, np.uint8)
    corners = [(0, 0), (width, 0), (0, height), (width, height)]
    for (pixels, _, _), (x, y) in zip(samples, corners):
        picture[y : y + height, x : x + width] = pixels
    boxes = [boxes + np.array((*corner, *corner), np.float32) for (_, boxes, _), corner in zip(samples, corners)]
    return picture, np.concatenate(boxes), np.concatenate([classes for *_, classes in samples])


@pytest.mark.parametrize("with_rect", [False, True])
@pytest.mark.parametrize("batch_size", [4, 8, 10])
def test_a_quad_batch_is_its_samples_pasted_by_hand(with_rect, batch_size, rect):
    hyp = rect.hyp if with_rect else HYP
    batches = replace(rect, rect=with_rect, quad=True, batch_size=batch_size, hyp=hyp)
    for epoch in range(2):
        for lot, batch in zip(lots(batches, epoch), streamed(batches, epoch, epoch + 1)):
            assert batch.indices.tolist() == lot.images.tolist()
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.numel() <= batches.batch_bytes
            shape = rect_shape(rect.store, lot.images) if with_rect else (IMGSZ, IMGSZ)
            expected = [
                quad_by_hand(batches, lot.images[first : first + 4], lot.position + first, shape, epoch)
                for first in range(0, len(lot.images), 4)
            ]
            assert_same(of_batch(batch), expected)


def test_what_a_quad_leaves_out_is_not_even_read(rect):
    read = []
    batches = replace(rect, rect=False, quad=True, images=lambda image: read.append(image) or rect.images(image))
    enlarged = 0
    for lot in (lot for epoch in range(4) for lot in lots(batches, epoch)):
        read.clear()
        batch = batches.batch_of(lot)
        if len(read) == 1 < len(batch.indices):
            enlarged += 1
            assert read == [int(batch.indices[0])]
        else:
            assert set(read) == set(batch.indices.tolist())
    assert 5 <= enlarged <= 15  # of 20 full groups


def test_quads_are_enlarged_as_often_as_merged():
    assert np.mean([enlarges(generator(0, 0, position, QUAD)) for position in range(2000)]) == pytest.approx(
        0.5, abs=0.04
    )


# ---- image weights


MAPS = [(), (0.9, 0.1, 0.0), (0.2, 0.8, 0.5)]


def weighted(batches, maps=MAPS) -> list[list[Batch]]:
    stream = TrainStream(batches, end_epoch=len(maps), workers=0, image_weights=True, num_classes=3)
    return [list(stream.epoch(epoch, class_maps)) for epoch, class_maps in enumerate(maps)]


def test_an_epoch_under_image_weights_draws_its_images_by_the_last_evaluation(batches, store):
    for epoch, made in enumerate(weighted(batches)):
        weights = image_weights(store, class_weights(store, 3, MAPS[epoch]))
        images = torch.cat([batch.indices for batch in made]).tolist()
        assert [len(batch.indices) for batch in made] == [4, 4, 2]
        assert images == epoch_order(3, epoch, 10, weights).tolist()
        assert all(image % 3 for image in images)  # the others have no labels


def test_class_maps_change_the_order(batches, photos):
    twenty = train_batches(replace(photos, classes=photos.classes % 2))
    orders = [
        [batch.indices.tolist() for batch in weighted(twenty, maps=[maps])[0]]
        for maps in [(), (0.0, 0.0, 0.0), (0.95, 0.0, 0.0)]
    ]
    assert orders[0] == orders[1] != orders[2]
    first = photos.classes[np.concatenate(orders[2])] % 2 == 0
    assert first.mean() < 0.2  # what is known well is seen less often


def test_a_rect_epoch_under_image_weights_sorts_what_was_drawn(rect, photos):
    for made in weighted(replace(rect, store=replace(photos, classes=photos.classes % 3))):
        for batch in made:
            assert tuple(batch.images.shape[2:]) == rect_shape(photos, batch.indices.numpy())
        assert sum(len(batch.indices) for batch in made) == 22


# ---- the stream of training


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("changes", [{}, {"rect": True}, {"quad": True, "batch_size": 6}])
def test_any_number_of_workers_streams_the_same_epochs(changes, drawn, batches):
    each = replace(batches, **changes)

    def epochs(workers: int, start: int = 0) -> list[list[dict]]:
        stream = TrainStream(each, end_epoch=3, workers=workers, image_weights=drawn, num_classes=3)
        assert stream.workers == workers
        return [[content(batch) for batch in stream.epoch(epoch, MAPS[epoch])] for epoch in range(start, 3)]

    alone = epochs(0)
    assert [len(made) for made in alone] == [each.per_epoch] * 3
    assert epochs(1) == alone
    assert epochs(4) == alone
    assert epochs(2, start=1) == alone[1:]


def test_batches_can_be_made_in_a_process_that_is_not_forked(batches):
    lot = lots(batches, 1)[0]
    make, sent = pickle.loads(pickle.dumps((batches.batch_of, lot)))
    assert content(make(sent)) == content(streamed(batches, 1, 2)[0])


@pytest.mark.parametrize("drawn", [False, True])
def test_an_epoch_taken_by_count_is_followed_by_the_next(drawn, batches):
    """As a loop does that knows how many batches there are, and never asks for one more."""
    stream = TrainStream(batches, end_epoch=3, workers=1, image_weights=drawn, num_classes=3)
    taken = []
    for epoch in range(3):
        made = stream.epoch(epoch)
        taken += [content(next(made)) for _ in range(batches.per_epoch)]
    other = TrainStream(batches, end_epoch=3, workers=0, image_weights=drawn, num_classes=3)
    assert taken == [content(batch) for epoch in range(3) for batch in other.epoch(epoch)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"rect": True}, {"image_weights": True}, {"repeat_factor": 0.5}])
def test_a_stream_begins_within_an_epoch_and_goes_back_to_any_other(changes, workers, batches):
    """As a run does that is resumed, or returns to a checkpoint: to its end or not, whatever came before."""
    drawn = {name: value for name, value in changes.items() if name != "rect"}
    each = replace(batches, rect=changes.get("rect", False))
    whole = TrainStream(each, end_epoch=3, workers=0, num_classes=3, **drawn)
    expected = [[content(batch) for batch in whole.epoch(epoch)] for epoch in range(3)]
    stream = TrainStream(each, end_epoch=3, workers=workers, num_classes=3, **drawn)
    assert [content(batch) for batch in stream.epoch(1, start=2)] == expected[1][2:]
    assert [content(batch) for batch in stream.epoch(2)] == expected[2]
    next(stream.epoch(0))
    assert [content(batch) for batch in stream.epoch(0, start=1)] == expected[0][1:]
    assert list(stream.epoch(1, start=each.per_epoch)) == []
    assert content(next(stream.epoch(2))) == expected[2][0]
    stream.close()
    assert content(next(stream.epoch(1))) == expected[1][0]  # by new processes
    stream.close()


def test_a_closed_stream_leaves_no_process_not_even_one_that_hangs(batches, monkeypatch):
    plain = still(batches, batch_size=2)
    hanging = replace(plain, images=Deadly(plain.images, int(lots(plain, 0)[4].images[1]), hang))
    stream = TrainStream(hanging, end_epoch=1, workers=2, num_classes=3)
    next(stream.epoch(0))
    processes = list(stream._supply._processes)
    monkeypatch.setattr(loader, "_CLOSING_S", 0.5)
    stream.close()
    assert [process.is_alive() for process in processes] == [False] * 2


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the program is this one's copy")
def test_a_program_ends_though_a_stream_was_left_to_the_garbage_collector(batches, monkeypatch):
    """Which takes down the way to the processes before torch says by it that they shall end."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # that it waits for them
    program = multiprocessing.get_context("fork").Process(target=abandon, args=(batches,))
    program.start()
    program.join(60)
    ended = program.exitcode
    program.kill()
    assert ended == 0


def abandon(batches: TrainBatches) -> None:
    stream = TrainStream(batches, end_epoch=9, workers=1, num_classes=3)
    next(stream.epoch(0))
    stream.itself = stream
    del stream
    gc.collect()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_stream_names_an_image_that_vanished(workers, batches, store, random_states):
    before = random_states()
    Path(store.path(7)).unlink()
    stream = TrainStream(batches, end_epoch=1, workers=workers, num_classes=3)
    with pytest.raises(UserError, match=f"^{re.escape(store.path(7))}: No such file"):
        list(stream.epoch(0))
    assert random_states() == before


# ---- resizing


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.3, 2), st.sampled_from([8, 32]))
def test_resized_sides_are_whole_strides_and_boxes_keep_their_place(rows, columns, factor, stride):
    images = torch.zeros(2, 3, 16 * rows, 16 * columns, dtype=torch.uint8)
    boxes = torch.tensor([[1.0, 2, 15, 9], [0, 0, 16 * columns, 16 * rows]])
    batch = Batch(
        images=images, boxes=boxes, classes=torch.tensor([1, 0]), image_of=torch.tensor([0, 1]), indices=torch.arange(2)
    )
    found = resized(batch, factor, stride)
    height, width = found.images.shape[2:]
    for old, new in ((16 * rows, height), (16 * columns, width)):
        assert new % stride == 0
        assert new >= old * factor - 1e-3
        assert new - stride < old * factor
    fractions = boxes / torch.tensor([16.0 * columns, 16.0 * rows]).tile(2)
    torch.testing.assert_close(found.boxes / torch.tensor([width, height]).tile(2), fractions)
    assert torch.equal(batch.boxes[1], torch.tensor([0.0, 0, 16 * columns, 16 * rows]))  # the batch itself is as it was
    assert (found.classes is batch.classes) and (found.image_of is batch.image_of)


@pytest.mark.parametrize("imgsz", [160, 320, 352, 640, 1056])
def test_a_factor_of_whole_strides_gives_just_these(imgsz):
    empty = torch.zeros(0)
    batch = Batch(
        images=torch.zeros(1, 3, imgsz, imgsz, dtype=torch.uint8),
        boxes=torch.zeros(0, 4),
        classes=empty,
        image_of=empty,
        indices=torch.zeros(1),
    )
    for strides in range(imgsz // 64, 3 * imgsz // 64 + 1):
        assert resized(batch, strides * 32 / imgsz, 32).images.shape[2:] == (strides * 32, strides * 32)
    assert resized(batch, 1.0, 32) is batch


@pytest.mark.parametrize("side", [32, 64, 96, 160])
def test_resized_pixels_are_the_bilinear_interpolation_in_the_same_layout(side, smooth_image):
    """As cv2 has it, which also counts from pixel centres."""
    pictures = [smooth_image(np.random.default_rng(seed), 96, 96) for seed in range(2)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    boxes, empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    batch = Batch(images=images, boxes=boxes, classes=empty, image_of=empty, indices=torch.arange(2))
    found = resized(batch, side / 96, 32).images
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    for image, picture in zip(found.permute(0, 2, 3, 1).numpy(), pictures):
        expected = cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR)
        assert np.abs(image.astype(int) - expected).max() <= 1
    meta = resized(  # a device that does not take bytes
        replace(batch, images=images.to("meta"), boxes=boxes.to("meta")), side / 96, 32
    ).images
    assert (meta.shape, meta.dtype) == (found.shape, found.dtype)
    assert meta.is_contiguous(memory_format=torch.channels_last)


# ---- evaluation


@pytest.fixture
def evaluation(store):
    images = BaseImages(store=store, imgsz=IMGSZ, area=True)
    return EvalBatches(store=store, images=images, imgsz=IMGSZ, batch_size=3, stride=32)


def test_evaluation_sees_each_image_once_and_each_box(evaluation, store):
    found = list(Stream(evaluation, evaluation.numbers(), workers=0))
    assert all(1 <= len(batch.indices) <= 3 for batch in found)
    assert sorted(torch.cat([batch.indices for batch in found]).tolist()) == list(range(10))
    assert sum(len(batch.boxes) for batch in found) == len(store.boxes)


def test_crowds_are_no_objects_to_an_evaluations_losses(evaluation, store):
    """Each image with labels has two, and its second is a crowd here; a difficult box counts."""
    ignore = np.resize(np.array([DIFFICULT, CROWD], np.uint8), len(store.boxes))
    crowded = replace(evaluation, store=replace(store, ignore=ignore))
    for number in crowded.numbers():
        batch, plain = crowded.batch(number), evaluation.batch(number)
        assert torch.equal(batch.images, plain.images)
        for name in ("boxes", "classes", "image_of"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)[0::2])


def test_evaluation_shapes_follow_the_formula_for_each_image(evaluation, store):
    shapes = []
    for number in evaluation.numbers():
        batch = evaluation.batch(number)
        for height, width in store.sizes[batch.indices.numpy()].tolist():
            ratios = height / max(height, width), width / max(height, width)
            assert tuple(batch.images.shape[2:]) == tuple(int(np.ceil(IMGSZ * r / 32 + 0.5)) * 32 for r in ratios)
        shapes.append((tuple(batch.images.shape[2:]), len(batch.images)))
    assert len({shape for shape, _ in shapes}) > 1  # else this shows little
    short = [shape for shape, count in shapes if count < 3]
    assert len(short) == len(set(short))  # batches are full but for the last of each shape


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_what_evaluation_sees_of_an_image_does_not_depend_on_its_batch(evaluation, batch_size):
    def inputs(batches):
        return {
            image: (pixels.numpy().tobytes(), placement.tolist())
            for batch in map(batches.batch, batches.numbers())
            for image, pixels, placement in zip(batch.indices.tolist(), batch.images, batch.placements)
        }

    assert inputs(replace(evaluation, batch_size=batch_size)) == inputs(evaluation)


def test_placements_take_source_pixels_to_the_network_input_and_back(evaluation, store):
    for key in range(4):
        batch = evaluation.batch(key)
        assert batch.placements.dtype == torch.float64
        for slot, (image, placement) in enumerate(zip(batch.indices.tolist(), batch.placements.numpy())):
            boxes = batch.boxes[batch.image_of == slot].numpy()
            source = store.boxes[store.rows(image)]
            np.testing.assert_allclose(transform_boxes(source, placement), boxes, atol=1e-4)
            np.testing.assert_allclose(transform_boxes(boxes, np.linalg.inv(placement)), source, atol=1e-4)


def test_evaluation_is_the_same_from_workers(evaluation):
    alone, apart = (
        [content(batch) for batch in Stream(evaluation, evaluation.numbers(), workers=workers)] for workers in (0, 2)
    )
    assert alone == apart


# ---- stream


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_states_are_left_alone(workers, batches, evaluation, random_states):
    before = random_states()
    streamed(batches, workers=workers)
    for _ in Stream(evaluation, evaluation.numbers(), workers=workers):
        pass
    assert random_states() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanished_after_the_scan_is_named(workers, evaluation, store):
    gone = Path(store.path(7))
    gone.unlink()
    stream = Stream(evaluation, evaluation.numbers(), workers=workers)
    says = f"^{re.escape(str(gone))}: No such file or directory, though it was fine when the data set was scanned$"
    with pytest.raises(UserError, match=says):
        list(stream)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the loader process must inherit the failure")
def test_shared_memory_that_is_full_is_named_and_nobody_waits(evaluation, monkeypatch):
    def full(self: torch.Tensor) -> None:
        raise RuntimeError("unable to resize file </torch_1> to the right size: No space left on device (28)\nmore")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    says = r"no room in shared memory \(unable to .* device \(28\)\): lower --workers \(0 needs none\), --batch-size or"
    with pytest.raises(UserError, match=says):
        list(Stream(evaluation, evaluation.numbers(), workers=1))
    assert list(Stream(evaluation, evaluation.numbers(), workers=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_can_be_left_and_asked_again(workers, evaluation):
    """Sanity checks and the evaluation after each epoch do so; the processes stay."""
    stream = Stream(evaluation, evaluation.numbers(), workers=workers)
    assert len(stream) == 4
    next(iter(stream))
    whole = [content(batch) for batch in stream]
    assert [content(batch) for batch in stream] == whole
    assert whole == [content(evaluation.batch(number)) for number in evaluation.numbers()]


@pytest.mark.parametrize(
    ("free_batches", "workers", "expected"),
    [(1000, 8, (8, 4)), (100, 8, (8, 3)), (16, 8, (4, 1)), (3, 8, (0, None)), (1000, 0, (0, None))],
)
def test_small_shared_memory_takes_fewer_processes(monkeypatch, tmp_path, free_batches, workers, expected):
    monkeypatch.setattr(loader, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_batches * 1000))
    assert loader._within_shared_memory(workers, 1000) == expected


# ---- caches


@pytest.mark.parametrize("changes", [{}, {"rect": True}, {"quad": True, "batch_size": 8}])
def test_cached_training_batches_are_those_from_files(changes, rect, cached):
    for batches in (replace(rect, rect=False, hyp=HYP), rect):
        each = replace(batches, **changes)
        from_cache = replace(each, images=cached(rect.images))
        assert [content(batch) for batch in streamed(each)] == [content(batch) for batch in streamed(from_cache)]


def test_cached_evaluation_batches_are_those_from_files(evaluation, cached):
    from_cache = replace(evaluation, images=cached(evaluation.images))
    for number in evaluation.numbers():
        assert content(evaluation.batch(number)) == content(from_cache.batch(number))


@pytest.fixture
def cached(tmp_path):
    """A cache of base images, on disk."""
    spec = DatasetSpec(source=tmp_path / "data.yaml", root=tmp_path, train=(), val=(), names=("a",))
    return lambda images: cached_images({"train": images}, "disk", spec=spec)["train"]


# ---- processes


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    """How loader processes begin."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(usual, force=True)


@dataclass(frozen=True)
class Deadly:
    """An image source that something befalls when it reads one of the images."""

    images: BaseImages
    image: int
    fate: Callable[[], object]

    def __call__(self, image: int) -> np.ndarray:
        if image == self.image:
            self.fate()
        return self.images(image)


killed = partial(signal.raise_signal, signal.SIGKILL)


def hang() -> None:
    """As a thread that waits for a dead network drive, which does not hear of SIGTERM either."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def test_the_stream_is_the_same_however_processes_start(start_method, batches, cached):
    """Under spawn everything is pickled: store, cache, plans' parameters and the board."""
    each = replace(batches, images=cached(batches.images))
    assert [content(batch) for batch in streamed(each, 0, 2, workers=2)] == [
        content(batch) for batch in streamed(batches, 0, 2)
    ]


def still(batches: TrainBatches, **changes) -> TrainBatches:
    """Without mosaics: a batch reads its own images alone."""
    return replace(batches, hyp=replace(batches.hyp, mosaic=0), **changes)


def test_a_killed_process_is_reported_with_what_it_was_at(start_method, batches):
    deadly = still(batches, batch_size=10, images=Deadly(batches.images, 7, killed))
    says = (
        r"^loader process 1 \(pid \d+\) was killed \(signal 9\) while it made batch 1 of epoch 1: out of memory\? "
        "lower --workers, --batch-size or --imgsz$"
    )
    with pytest.raises(RunError, match=says):
        streamed(deadly, workers=2)


def test_the_batch_of_a_killed_process_is_counted_as_people_do(batches):
    """Image 7 is read once an epoch; of its batches, only one is in the second epoch."""
    plain = still(batches, batch_size=2)
    deadly = replace(plain, images=Deadly(plain.images, 7, partial(signal.raise_signal, signal.SIGSEGV)))
    number = next(lot.index for lot in lots(plain, 1) if 7 in lot.images) + 1
    stream = TrainStream(deadly, end_epoch=2, workers=1, num_classes=3)
    with pytest.raises(RunError, match=rf"signal 11\) while it made batch {number} of epoch 2: a crash in a library"):
        list(stream.epoch(1))


def test_a_process_killed_in_an_evaluation_is_reported(evaluation):
    deadly = replace(evaluation, images=Deadly(evaluation.images, 7, killed))
    number = next(number for number in range(4) if 7 in evaluation.batch(number).indices) + 1
    with pytest.raises(RunError, match=rf"while it made batch {number} of the evaluation: "):
        list(Stream(deadly, evaluation.numbers(), workers=1))


KILLED = r"^loader process 1 \(pid \d+\) was killed \(signal 9\)"


def kill(stream: Stream | TrainStream) -> None:
    """Its first process. If anything is to strike the main thread for it, it does so here."""
    process = stream._supply._processes[0]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    signal.raise_signal(signal.SIGCHLD)  # the system's own may be on its way yet


def test_a_death_while_nobody_waits_disturbs_nothing_and_is_told_at_the_next_batch(batches):
    stream = TrainStream(batches, end_epoch=9, workers=2, num_classes=3)
    made = stream.epoch(0)
    next(made)
    kill(stream)
    with pytest.raises(RunError, match=KILLED):
        next(made)


def test_a_death_between_two_evaluations_is_told_by_the_second(evaluation):
    stream = Stream(evaluation, evaluation.numbers(), workers=1)
    list(stream)
    kill(stream)
    with pytest.raises(RunError, match=KILLED):
        next(iter(stream))


def test_a_death_is_nothing_to_another_stream(batches, evaluation):
    stream = TrainStream(batches, end_epoch=9, workers=1, num_classes=3)
    other = Stream(evaluation, evaluation.numbers(), workers=1)
    made = stream.epoch(0)
    with pytest.raises(RunError, match=KILLED), faults_named(other, stream):
        next(made)
        next(iter(other))
        kill(stream)
        assert len(list(other)) == 4
        next(made)


def test_a_death_in_the_wait_is_told_though_no_signal_is_heard(batches):
    """As outside of the main thread, on Windows, and where one comes between two waits of the system."""
    plain = still(batches, batch_size=2)
    deadly = replace(plain, images=Deadly(plain.images, int(lots(plain, 0)[1].images[0]), killed))
    told = []

    def work() -> None:
        try:
            list(TrainStream(deadly, end_epoch=1, workers=1, num_classes=3).epoch(0))
        except RunError as error:
            told.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    [line] = told
    assert re.match(KILLED, line)


def test_an_error_that_a_death_may_be_the_reason_of_is_told_as_that(batches):
    """As where the system has killed a process for memory that the main one lacks as well."""
    stream = TrainStream(batches, end_epoch=9, workers=1, num_classes=3)
    with pytest.raises(RunError, match=KILLED), faults_named(stream):
        next(stream.epoch(0))
        kill(stream)
        raise RuntimeError("can't allocate memory")


@pytest.mark.parametrize("torn", [ConnectionResetError, EOFError])
def test_a_death_that_cuts_a_batch_off_is_named(evaluation, monkeypatch, torn):
    """A process may end while it hands over a batch: what is told first is that of the connection."""

    def cut_off(supply, batches):
        supply._processes[0].kill()
        raise torn
        yield

    monkeypatch.setattr(loader._Supply, "_awaited", cut_off)
    stream = Stream(evaluation, evaluation.numbers(), workers=1)
    with pytest.raises(RunError, match=KILLED), faults_named(stream):
        list(stream)


def test_processes_say_nothing_when_the_main_one_breaks_off_while_a_batch_is_handed_over(batches, monkeypatch, capfd):
    """As by Ctrl-C."""
    stream = TrainStream(batches, end_epoch=1, workers=1, num_classes=3)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "answer_challenge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream.epoch(0))
    monkeypatch.undo()
    stream.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("other", [ConnectionResetError, OSError])
def test_errors_of_connections_that_no_death_explains_pass_through(evaluation, other):
    with pytest.raises(other), faults_named(Stream(evaluation, evaluation.numbers(), workers=0)):
        raise other


def test_other_errors_pass_through_unnamed(batches):
    stream = TrainStream(batches, end_epoch=1, workers=1, num_classes=3)
    with pytest.raises(RuntimeError, match="mine"), faults_named(stream):
        next(stream.epoch(0))
        raise RuntimeError("mine")


def test_a_hanging_process_is_reported_with_the_image_it_reads(start_method, batches, store, monkeypatch):
    plain = still(batches, batch_size=2)
    last = int(lots(plain, 0)[4].images[1])
    hanging = replace(plain, images=Deadly(plain.images, last, hang))
    stream = TrainStream(hanging, end_epoch=1, workers=2, num_classes=3)
    made = stream.epoch(0)
    for _ in range(4):
        next(made)
    wait_until_read(stream, last)
    little_patience(monkeypatch)
    path = re.escape(store.path(last))
    says = rf"^loader process 1 \(pid \d+\) hangs, reading {path} for \d+ s, in batch 5 of epoch 1: "
    with pytest.raises(RunError, match=says):
        list(made)
    assert [process.exitcode for process in stream._supply._processes] == [-signal.SIGKILL] * 2  # nobody is left


def little_patience(monkeypatch) -> None:
    """Five looks in vain."""
    monkeypatch.setattr(loader, "_LOOK_S", 0.1)
    monkeypatch.setattr(loader, "_PATIENCE_S", 0.5)


def after_looks(stream: TrainStream, monkeypatch, events: Sequence[Callable[[], object]]) -> list[bool]:
    """From now on, looks for a batch are in vain, each followed by one of the events, and then those that torch makes.

    Whether they found one is in the list.
    """
    kind, waiting, found = type(stream._supply._loader._iterator), list(events), []
    honest = kind._try_get_data

    def look(iterator, seconds):
        result = (False, None) if waiting else honest(iterator, seconds)
        if waiting:
            waiting.pop(0)()
        found.append(result[0])
        return result

    monkeypatch.setattr(kind, "_try_get_data", look)
    return found


@pytest.fixture
def gated(batches):
    """Training batches, the second of which is made when the gate opens; the image that waits for that; the gate."""
    gate = multiprocessing.Event()
    plain = still(batches, batch_size=5)
    image = int(lots(plain, 0)[1].images[2])
    return replace(plain, images=Deadly(plain.images, image, gate.wait)), image, gate


def wait_until_read(stream: TrainStream, image: int) -> None:
    """By its first process."""
    while stream._supply._board.image(0) != image:
        time.sleep(0.01)


def test_a_slow_process_that_goes_on_is_waited_for(batches, gated, monkeypatch):
    """Its batch takes longer than patience lasts, but no image does."""
    slow, image, gate = gated
    stream = TrainStream(slow, end_epoch=1, workers=1, num_classes=3)
    made = stream.epoch(0)
    first = next(made)
    wait_until_read(stream, image)
    little_patience(monkeypatch)
    sign = partial(stream._supply._board.reads, 0, image)  # as the process gives with each image
    found = after_looks(stream, monkeypatch, [int, int, int, sign] * 5 + [gate.set])
    monkeypatch.setattr(loader, "_LOOK_S", 0)  # the batch may take its time now
    assert [content(batch) for batch in (first, *made)] == [
        content(batch) for batch in streamed(still(batches, batch_size=5))
    ]
    assert found[:21] == [False] * 21


def test_a_run_that_was_stopped_and_continued_goes_on(batches, gated, monkeypatch):
    """As by Ctrl-Z and fg: meanwhile nobody could do anything for longer than patience lasts."""
    slow, image, gate = gated
    stream = TrainStream(slow, end_epoch=1, workers=1, num_classes=3)
    made = stream.epoch(0)
    first = next(made)
    wait_until_read(stream, image)

    def stop_and_go_on() -> None:
        honest = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: honest() + 36_000)
        gate.set()

    found = after_looks(stream, monkeypatch, [stop_and_go_on])
    assert [content(batch) for batch in (first, *made)] == [
        content(batch) for batch in streamed(still(batches, batch_size=5))
    ]
    assert found[0] is False


def test_threads_of_opencv_in_the_main_process_do_not_stop_a_forked_one(batches, monkeypatch):
    """Its pool is not there after a fork; who waits for it waits for ever."""
    monkeypatch.setattr(loader, "_PATIENCE_S", 20)
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        cv2.resize(np.zeros((1000, 1000, 3), np.uint8), (3000, 3000))
        large = replace(batches, imgsz=640, images=BaseImages(store=batches.store, imgsz=640))
        assert len(streamed(large, workers=2)) == 3
    finally:
        cv2.setNumThreads(before)


def test_processes_that_never_begin_are_reported(batches, monkeypatch):
    little_patience(monkeypatch)
    monkeypatch.setattr(loader, "_start_worker", stopped)
    stream = TrainStream(batches, end_epoch=1, workers=1, num_classes=3)
    with pytest.raises(RunError, match=r"^the loader processes have made nothing for 0.5 s; --workers 0"):
        next(stream.epoch(0))
    stream.close()


def stopped(worker: int) -> None:
    time.sleep(600)


def no_room(*_: object) -> None:
    raise RuntimeError("no way")


def test_without_a_way_to_allocate_shared_memory_batches_are_moved_there(batches, monkeypatch):
    whole = [content(batch) for batch in streamed(batches, workers=1)]
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", no_room, raising=False)
    assert [content(batch) for batch in streamed(batches, workers=1)] == whole


# ---- repeat factors


def test_an_epoch_under_a_repeat_factor_has_its_images_as_often_as_they_are_due(batches, photos):
    rare = replace(photos, classes=np.where(photos.classes < 2, photos.classes, 2).astype(np.int32))
    each = train_batches(rare)

    def epochs(workers: int) -> list[list[int]]:
        stream = TrainStream(each, end_epoch=3, workers=workers, repeat_factor=0.3, num_classes=3)
        return [[image for batch in stream.epoch(epoch) for image in batch.indices.tolist()] for epoch in range(3)]

    alone = epochs(0)
    assert alone == epochs(2)
    factors = repeat_factors(rare, 3, 0.3)
    for epoch, images in enumerate(alone):
        assert images == even_order(3, epoch, factors).tolist()
        counts = np.bincount(images, minlength=22)
        assert np.all(np.abs(counts - factors * 22 / factors.sum()) < 1)
        assert counts[rare.classes < 2].sum() >= 4  # 2.57 times each, of sum 25.1


# ---- close_mosaic


@pytest.mark.parametrize(("closed", "with_mosaics"), [(0, 3), (1, 2), (3, 0), (50, 0), (1.5, 2)])
def test_the_last_epochs_have_no_mosaics(closed, with_mosaics, batches):
    hyp = replace(HYP, mosaic=1, close_mosaic=closed)
    found = streamed(replace(batches, hyp=hyp, epochs=3), 0, 3)
    expected = [
        *streamed(replace(batches, hyp=replace(HYP, mosaic=1)), 0, with_mosaics),
        *streamed(replace(batches, hyp=replace(HYP, mosaic=0)), with_mosaics, 3),
    ]
    assert [content(batch) for batch in found] == [content(batch) for batch in expected]


# ---- painted on the device


CPU = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"rect": True}, {"quad": True}], ids=["plain", "rect", "quad"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unpainted_batches_become_those_of_the_loader(store, changes, workers):
    """To a rounding in the pixels, and to the last bit in all else."""
    painted = streamed(train_batches(store, **changes))
    unpainted = streamed(train_batches(store, unpainted=True, **changes), workers=workers)
    assert len(unpainted) == len(painted) == 3
    for batch, expected in zip(unpainted, painted):
        assert isinstance(batch, UnpaintedBatch)
        batch = batch.to(CPU)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        error = (batch.images.int() - expected.images.int()).abs().float()
        assert error.mean() <= 1
        assert (error.amax(1) > 8).float().mean() <= 0.02
        assert content(replace(batch, images=expected.images)) == content(expected)


# ---- ranks --------------------------------------------------------------------------------------------------------


@given(inputs=st.integers(0, 40), ranks=st.integers(1, 9))
def test_parts_are_disjoint_whole_and_differ_by_one(inputs, ranks):
    parts = [part_of(inputs, rank, ranks) for rank in range(ranks)]
    assert [number for part in parts for number in part] == list(range(inputs))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"rect": True}, {"quad": True, "batch_size": 8}, {"quad": True, "rect": True, "batch_size": 8}],
    ids=["plain", "rect", "quad", "both"],
)
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 2)])
def test_the_parts_of_ranks_make_up_the_batches_of_one_process(store, changes, ranks, workers):
    """10 images, so the last batch has 2: fewer than 3 ranks, and less than the 4 of a quad."""
    whole = streamed(train_batches(store, **changes))
    by_rank = [
        streamed(train_batches(store, rank=rank, ranks=ranks, **changes), workers=workers) for rank in range(ranks)
    ]
    for number, batch in enumerate(whole):
        parts = [batches[number] for batches in by_rank]
        inputs = len(batch.images)
        assert [part.part for part in parts] == [
            Part(len(part_of(inputs, rank, ranks)), inputs) for rank in range(ranks)
        ]
        assert all(torch.equal(part.indices, batch.indices) for part in parts)
        assert_same([sample for part in parts if part.part.own for sample in of_batch(part)], of_batch(batch))
        for idle in (part for part in parts if not part.part.own):
            assert len(idle.images) == 1
            assert not len(idle.boxes)
            assert not len(idle.classes)


def test_unpainted_parts_know_what_they_are_parts_of(store):
    batches = train_batches(store, rank=1, ranks=3, unpainted=True)
    parts = [batch.to(CPU).part for batch in streamed(batches, workers=1)]
    assert parts == [Part(1, 4), Part(1, 4), Part(1, 2)]


def test_ranks_share_the_memory_of_their_host(monkeypatch, batches):
    free = 4 * batches.batch_bytes * 8  # a quarter holds eight batches
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    workers = [TrainStream(batches, end_epoch=1, workers=8, sharers=count, num_classes=3).workers for count in (1, 4)]
    assert workers == [8, 2]
