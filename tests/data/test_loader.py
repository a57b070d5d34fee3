import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from utils.boxes import transform_boxes
from utils.data import loader
from utils.data.loader import EvalBatches, Stream, TrainBatches
from utils.data.scan import scan_split
from utils.hyp import Hyperparameters
from utils.structures import Batch, UserError

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
    return TrainBatches(store=store, imgsz=IMGSZ, batch_size=4, hyp=HYP, seed=3)


def content(batch: Batch) -> dict[str, bytes | None]:
    """Everything in a batch, as bytes: equal means identical to the last bit."""
    return {
        name: None if value is None else (tuple(value.shape), value.dtype, value.contiguous().numpy().tobytes())
        for name, value in vars(batch).items()
    }


def contents(batches, keys, workers: int) -> list[dict]:
    return [content(batch) for batch in Stream(batches, keys, workers=workers)]


# ---- training


def test_any_number_of_workers_gives_identical_batches(batches):
    keys = batches.numbers(0, 2)
    alone = contents(batches, keys, 0)
    assert len(alone) == 6
    for workers in (1, 4):
        assert contents(batches, keys, workers) == alone


def test_every_image_starts_one_sample_of_an_epoch_and_the_last_batch_is_smaller(batches):
    assert batches.per_epoch == 3
    for epoch in range(3):
        seen = [batches.batch(key).indices.tolist() for key in batches.numbers(epoch, epoch + 1)]
        assert [len(indices) for indices in seen] == [4, 4, 2]
        assert sorted(np.concatenate(seen).tolist()) == list(range(10))


def test_epochs_differ_in_order_and_in_augmentation(batches):
    first, second = (contents(batches, batches.numbers(epoch, epoch + 1), 0) for epoch in (0, 1))
    assert first[0]["indices"] != second[0]["indices"]
    alone = replace(batches, store=batches.store, batch_size=10)
    images = [batch.images[batch.indices.argsort()] for batch in (alone.batch(0), alone.batch(alone.per_epoch))]
    assert all(not torch.equal(*pair) for pair in zip(*images))


def test_starting_late_gives_the_same_batches(batches):
    whole = contents(batches, batches.numbers(0, 4), 0)
    assert contents(batches, batches.numbers(2, 4), 0) == whole[6:]
    assert contents(batches, batches.numbers(0, 4)[5:], 1) == whole[5:]


def test_a_sample_depends_on_its_place_in_the_epoch_and_not_on_the_batch_size(batches):
    images = [
        torch.cat([batch.images for batch in Stream(each, each.numbers(1, 2), workers=0)])
        for each in (batches, replace(batches, batch_size=10))
    ]
    assert torch.equal(*images)


def test_a_seed_is_a_stream_of_its_own(batches):
    assert contents(batches, [0], 0) != contents(replace(batches, seed=4), [0], 0)


def test_a_training_batch_is_well_formed(batches):
    batch = batches.batch(0)
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
    for batch in Stream(batches, batches.numbers(0, 1), workers=workers):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_images_are_rgb(make_dataset):
    spec = make_dataset({"train": {"a.png": None}})
    red = np.zeros((IMGSZ, IMGSZ, 3), np.uint8)
    red[..., 2] = 255
    cv2.imwrite(str(spec.root / "images/train/a.png"), red)
    store, _ = scan_split(spec, "train")
    hyp = Hyperparameters(mosaic=0, scale=0, translate=0, hsv_h=0, hsv_s=0, hsv_v=0)
    batch = TrainBatches(store=store, imgsz=IMGSZ, batch_size=1, hyp=hyp, seed=0).batch(0)
    assert batch.images.amin((0, 2, 3)).tolist() == [255, 0, 0]
    assert batch.images.amax((0, 2, 3)).tolist() == [255, 0, 0]


def test_a_set_without_boxes_makes_batches(make_dataset):
    store, _ = scan_split(make_dataset({"train": {"a.png": None, "b.png": None}}), "train")
    batch = TrainBatches(store=store, imgsz=IMGSZ, batch_size=2, hyp=HYP, seed=0).batch(0)
    assert batch.boxes.shape == (0, 4)
    assert batch.image_of.shape == batch.classes.shape == (0,)


# ---- evaluation


@pytest.fixture
def evaluation(store):
    return EvalBatches(store=store, imgsz=IMGSZ, batch_size=3, stride=32)


def test_evaluation_sees_each_image_once_and_each_box(evaluation, store):
    found = list(Stream(evaluation, evaluation.numbers(), workers=0))
    assert [len(batch.indices) for batch in found] == [3, 3, 3, 1]
    assert sorted(torch.cat([batch.indices for batch in found]).tolist()) == list(range(10))
    assert sum(len(batch.boxes) for batch in found) == len(store.boxes)


def test_evaluation_shapes_follow_the_formula_and_like_aspects_share_a_batch(evaluation, store):
    spread = []
    for key in range(4):
        batch = evaluation.batch(key)
        sizes = store.sizes[batch.indices.numpy()]
        ratio_h = max(height / max(height, width) for height, width in sizes)
        ratio_w = max(width / max(height, width) for height, width in sizes)
        expected = tuple(int(np.ceil(IMGSZ * ratio / 32 + 0.5)) * 32 for ratio in (ratio_h, ratio_w))
        assert tuple(batch.images.shape[2:]) == expected
        spread.append((sizes[:, 0] / sizes[:, 1]).tolist())
    assert np.all(np.diff(np.concatenate(spread)) >= 0)


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
    assert contents(evaluation, evaluation.numbers(), 2) == contents(evaluation, evaluation.numbers(), 0)


# ---- stream


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_states_are_left_alone(workers, batches, random_states):
    before = random_states()
    for _ in Stream(batches, batches.numbers(0, 1), workers=workers):
        pass
    assert random_states() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanished_after_the_scan_is_named(workers, batches, store):
    gone = Path(store.path(7))
    gone.unlink()
    stream = Stream(batches, batches.numbers(0, 1), workers=workers)
    says = f"^{re.escape(str(gone))}: No such file or directory, though it was fine when the data set was scanned$"
    with pytest.raises(UserError, match=says):
        list(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_can_be_left_and_asked_again(workers, evaluation):
    """Sanity checks and the evaluation after each epoch do so; the processes stay."""
    stream = Stream(evaluation, evaluation.numbers(), workers=workers)
    assert len(stream) == 4
    next(iter(stream))
    whole = [content(batch) for batch in stream]
    assert [content(batch) for batch in stream] == whole
    assert whole == contents(evaluation, evaluation.numbers(), 0)


@pytest.mark.parametrize(
    ("free_batches", "workers", "expected"),
    [(1000, 8, (8, 4)), (100, 8, (8, 3)), (16, 8, (4, 1)), (3, 8, (0, None)), (1000, 0, (0, None))],
)
def test_small_shared_memory_takes_fewer_processes(monkeypatch, tmp_path, free_batches, workers, expected):
    monkeypatch.setattr(loader, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_batches * 1000))
    assert loader._within_shared_memory(workers, 1000) == expected
