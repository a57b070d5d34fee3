import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.data.labels import box_rows
from utils.data.store import joined, map_store, packed, plain_store, single_class
from utils.files import read_arrays, write_arrays
from utils.structures import CROWD, LabelStore, UserError

NAMES = [item.name for item in fields(LabelStore)]


def random_image(rng: np.random.Generator) -> ImageLabels:
    count = int(rng.integers(0, 4))
    corners = rng.uniform(0, 0.5, (count, 2))
    rings = [[rng.uniform(0, 1, (int(rng.integers(3, 6)), 2)) for _ in range(rng.integers(0, 3))] for _ in range(count)]
    return ImageLabels(
        boxes=np.concatenate([corners, corners + rng.uniform(0.1, 0.5, (count, 2))], 1),
        classes=rng.integers(0, 5, count),
        ignore=rng.integers(0, 3, count).astype(np.uint8),
        rings=rings,
    )


def random_store(seed: int, images: int) -> tuple[LabelStore, list[ImageLabels]]:
    rng = np.random.default_rng(seed)
    labels = [random_image(rng) for _ in range(images)]
    paths = [Path(f"/d{seed}/{'x' * int(rng.integers(1, 9))}{index}.jpg") for index in range(images)]
    return build_store(paths, [(100, 200)] * images, labels, num_classes=5), labels


def assert_same(first: LabelStore, second: LabelStore) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
        assert getattr(first, name).dtype == getattr(second, name).dtype, name


def written(store: LabelStore, file: Path, key: str = "k") -> LabelStore:
    write_arrays(file, {name: getattr(store, name) for name in NAMES}, {"key": key})
    return map_store(file, key, read_arrays(file)[0])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_joined_parts_are_read_as_the_parts_are(seed, cuts):
    parts = [random_store(seed + index, images) for index, images in enumerate(cuts)]
    whole = joined([store for store, _ in parts])
    assert len(whole) == sum(cuts)
    image = 0
    for store, labels in parts:
        for index, item in enumerate(labels):
            rows, scale = whole.rows(image), np.array([200, 100])
            assert whole.path(image) == store.path(index)
            np.testing.assert_allclose(whole.boxes[rows], item.boxes * np.tile(scale, 2), rtol=1e-6)
            assert whole.classes[rows].tolist() == item.classes.tolist()
            assert whole.ignore[rows].tolist() == item.ignore.tolist()
            for box, rings in zip(range(rows.start, rows.stop), item.rings):
                assert len(whole.rings(box)) == len(rings)
                for ring, wanted in zip(whole.rings(box), rings):
                    np.testing.assert_allclose(ring, wanted * scale, rtol=1e-6)
            image += 1


def test_images_without_a_size_are_left_out_with_all_that_is_theirs():
    rows = replace(box_rows([0, 2, 2], [1, 0, 1], [[0, 0, 2, 4], [1, 1, 3, 3], [0, 0, 8, 8]]))
    rows = replace(rows, ignore=np.array([0, CROWD, 0], np.uint8), area=np.array([np.nan, 3.5, np.nan]))
    store = packed(
        rows,
        paths=["a", "bb", "ccc"],
        sizes=np.array([[10, 20], [0, 0], [30, 40]], np.int32),
        digests=np.array([7, 0, 2**64 - 1], np.uint64),
        image_ids=np.array([3, 4, 5]),
        category_ids=[1, -1],
    )
    assert [store.path(image) for image in range(2)] == ["a", "ccc"]
    assert store.sizes.tolist() == [[10, 20], [30, 40]]
    assert store.digests.tolist() == [7, 2**64 - 1]
    assert store.image_ids.tolist() == [3, 5]
    assert np.diff(store.offsets).tolist() == [1, 2]
    assert store.area.tolist() == [8, 3.5, 64]  # of its box where no file gives one


def test_without_an_area_it_is_that_of_the_box_as_a_coco_file_has_it_also_outside_of_the_image():
    rows = box_rows([0, 0, 0], [0, 0, 0], [[90, 0, 100, 20], [0, 0, 5, 5], [0, 0, 100, 80]])
    given = [[90, -5.5, 60.25, 25.5], [0, 0, 5, 5], [0, 0, 1e308, 1e308]]
    rows = replace(rows, annotated=np.array(given), area=np.array([np.nan, 0, np.nan]))
    store = packed(
        rows,
        paths=["a"],
        sizes=np.array([[80, 100]], np.int32),
        digests=np.zeros(1, np.uint64),
        image_ids=np.array([1]),
        category_ids=[1],
    )
    assert store.area.tolist() == [60.25 * 25.5, 0, np.inf]


def test_a_class_has_the_category_id_of_the_first_part_that_gives_one():
    one, other = plain_store(np.ones((1, 2))), plain_store(np.ones((1, 2)))
    parts = [replace(one, category_ids=np.array([-1, 5, -1])), replace(other, category_ids=np.array([3, 6, -1]))]
    assert joined(parts).category_ids.tolist() == [3, 5, -1]


def test_boxes_as_annotated_are_there_for_all_boxes_or_none():
    plain = plain_store(np.full((1, 2), 50), boxes=np.array([[1.5, 2, 11, 22]]), offsets=[0, 1])
    coco = replace(plain, annotated=np.array([[-7.1, 2.3, 9.25, 88]]))
    empty = plain_store(np.full((2, 2), 50))
    assert joined([plain, empty]).annotated.shape == (0, 4)
    found = joined([plain, empty, coco])
    assert found.annotated.tolist() == [[1.5, 2, 9.5, 20], [-7.1, 2.3, 9.25, 88]]


def test_a_mapped_store_travels_as_a_path_and_keeps_its_single_class(tmp_path):
    plain, _ = random_store(0, 6)
    store = written(plain, tmp_path / "x.cache")
    assert_same(store, plain)
    assert not store.boxes.flags.writeable
    assert len(pickle.dumps(store)) < 500
    assert_same(pickle.loads(pickle.dumps(store)), plain)
    one = pickle.loads(pickle.dumps(single_class(store)))
    assert_same(one, replace(plain, classes=np.zeros_like(plain.classes)))
    assert one.classes.strides == (0,)
    written(plain, tmp_path / "x.cache", key="another")
    with pytest.raises(UserError, match="scanned anew while it was in use"):
        pickle.loads(pickle.dumps(store))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "category_ids"])
def test_a_file_whose_arrays_do_not_fit_together_is_refused(name, tmp_path):
    store, _ = random_store(1, 6)
    store = replace(store, annotated=store.boxes.astype(np.float64))
    arrays = {one: getattr(store, one) for one in NAMES}
    for wrong in (arrays[name][:-1], arrays[name][:, None]):
        with pytest.raises(ValueError, match="damaged"):
            map_store(tmp_path, "", arrays | {name: wrong})
    del arrays[name]
    with pytest.raises(ValueError, match="not the arrays"):
        map_store(tmp_path, "", arrays)
