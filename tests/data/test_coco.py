import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.coco import BAD_BOX, NO_BOX, NO_IMAGE, SAME_IMAGE, open_coco
from utils.data.labels import NOT_A_NUMBER, NOT_FINITE, checked
from utils.structures import CROWD, UserError

NAMES = ("cat", "dog")


def content(**changes) -> dict:
    base = {
        "images": [
            {"id": 70, "file_name": "b.jpg", "height": 80, "width": 100},
            {"id": 0, "file_name": "a.jpg"},
            {"id": 5, "file_name": "c.jpg", "height": 30, "width": 50},
        ],
        "annotations": [
            {"id": 9, "image_id": 5, "category_id": 33, "bbox": [1, 2, 3.5, 4], "area": 7.25, "iscrowd": 0},
            {"id": 1, "image_id": 70, "category_id": 0, "bbox": [10, 20, 30, 40], "area": 1200},
            {"id": 2, "image_id": 5, "category_id": 0, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        ],
        "categories": [{"id": 33, "name": "cat"}, {"id": 2, "name": "pets"}, {"id": 0, "name": "dog"}],
    }
    return {**base, **changes}


def annotation(**changes) -> dict:
    fields = {"image_id": 70, "category_id": 33, "bbox": [10, 20, 30, 40], **changes}
    return {key: value for key, value in fields.items() if value != "absent"}


@pytest.fixture
def opened(tmp_path):
    def open_it(data, names=NAMES):
        path = tmp_path / "x.json"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        return open_coco(path, names, lambda name: f"/d/{name}")

    return open_it


def test_annotations_go_to_their_images_whatever_the_ids(opened):
    source = opened(content())
    labels = source.read(NAMES)
    assert source.images == ["/d/b.jpg", "/d/a.jpg", "/d/c.jpg"]
    assert labels.rows.image_of.tolist() == [0, 2, 2]
    assert labels.rows.boxes.tolist() == [[10, 20, 40, 60], [1, 2, 4.5, 6], [0, 0, 5, 5]]
    assert labels.rows.classes.tolist() == [1, 0, 1]
    assert labels.rows.ignore.tolist() == [0, 0, CROWD]
    assert labels.rows.area[:2].tolist() == [1200, 7.25]
    assert math.isnan(labels.rows.area[2])
    assert labels.image_ids.tolist() == [70, 0, 5]
    assert labels.declared.tolist() == [[80, 100], [0, 0], [30, 50]]
    assert list(source.category_ids) == [33, 0]
    assert list(source.label_files) == [source.label_file(1)]
    assert not labels.relative
    assert labels.findings == source.findings == ()


def test_boxes_are_kept_as_annotated_beside_what_lies_in_the_image(opened):
    """To the last bit and not clipped, since COCO's own tool scores against these."""
    inside, outside = [0.1, 20.3, 30.7, 40.9], [90.1, 70, 33.3, 20.7]
    source = opened(content(annotations=[annotation(bbox=outside), annotation(bbox=inside, image_id=5)]))
    labels = source.read(NAMES)
    rows, _ = checked(source, labels, np.array([[80, 100], [10, 10], [80, 100]]), np.ones(3, int))
    assert rows.annotated.tolist() == [outside, inside]
    assert rows.boxes[0].tolist() == [90.1, 70, 100, 80]
    part = source.part(2, 3).read(NAMES)
    assert part.rows.annotated.tolist() == [inside]


def test_an_area_is_what_the_file_says_also_0(opened):
    areas = opened(content(annotations=[annotation(area=0), annotation(area=-1)])).read(NAMES).rows.area
    assert areas[0] == 0
    assert math.isnan(areas[1])


def test_parts_read_what_the_whole_reads(opened):
    ring = [1, 1, 9, 1, 9, 9]
    annotations = [
        annotation(image_id=number % 7, bbox=[number, 0, 1, 1], segmentation=[ring] * (number % 3))
        for number in range(40)
    ]
    for broken in (11, 12):
        annotations[broken]["bbox"] = []
        annotations[broken]["segmentation"] = []
    annotations[11], annotations[12] = annotations[12], annotations[11]  # not in the order of the images
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(7)]
    source = opened(content(images=images, annotations=annotations))
    whole = source.read(NAMES)
    part = pickle.loads(pickle.dumps(source.part(3, 6)))
    labels = part.read(NAMES)
    keep = (whole.rows.image_of >= 3) & (whole.rows.image_of < 6)
    np.testing.assert_array_equal(labels.rows.boxes, whole.rows.boxes[keep])
    np.testing.assert_array_equal(labels.rows.image_of + 3, whole.rows.image_of[keep])
    np.testing.assert_array_equal(np.diff(labels.rows.ring_offsets), np.diff(whole.rows.ring_offsets)[keep])
    assert labels.rows.points[:3].tolist() == [[1, 1], [9, 1], [9, 9]]
    assert labels.image_ids.tolist() == [3, 4, 5]
    assert [item.file for item in labels.findings] == ["/d/4.jpg", "/d/5.jpg"] == [item.file for item in whole.findings]
    assert [item.file for item in source.part(5, 7).read(NAMES).findings] == ["/d/5.jpg"]
    chosen = source.chosen(np.array([0, 0, 0, 1, 1, 1, 0], bool)).read(NAMES)
    np.testing.assert_array_equal(chosen.rows.boxes, labels.rows.boxes)
    assert source.part(0, 3).read(NAMES).findings == ()
    assert len(pickle.dumps(source.part(0, 1))) < 3000


def test_categories_are_known_by_name_alone(opened, tmp_path):
    assert opened(content(), names=("dog", "bird", "cat")).read(()).rows.classes.tolist() == [0, 2, 0]
    twice = [{"id": 33, "name": "cat"}, {"id": 0, "name": " cat "}]
    source = opened(content(categories=twice))
    assert source.read(NAMES).rows.classes.tolist() == [0, 0, 0]
    assert list(source.category_ids) == [33, -1]
    assert source.notes == (f"{tmp_path / 'x.json'}: categories 33, 0 are all called 'cat': taken as one class",)


def test_categories_that_are_not_used_and_not_in_names_are_a_note(opened, tmp_path):
    (note,) = opened(content()).notes
    assert note == f"{tmp_path / 'x.json'}: categories without boxes, which names lacks: pets"
    many = [*content()["categories"], *({"id": 100 + number, "name": f"x\n{number}"} for number in range(6))]
    assert opened(content(categories=many)).notes[0].endswith(": pets, x 0, x 1, x 2, x 3, and 2 more")
    assert not opened(content(), names=("cat", "dog", "pets")).notes


def test_polygons_are_kept_and_run_lengths_are_not(opened):
    annotations = [
        annotation(segmentation=[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14]]),
        annotation(segmentation={"counts": [1, 2], "size": [9, 9]}),
        annotation(segmentation=[[1, 2, 3, 4], [1, 2, 3, 4, 5, "6"], [1, 2, 3, 4, 5, 6, 7]]),
        annotation(segmentation=[1, 2, 3, 4, 5, 6]),
    ]
    rows = opened(content(annotations=annotations)).read(NAMES).rows
    assert np.diff(rows.ring_offsets).tolist() == [2, 0, 0, 1]
    assert np.diff(rows.point_offsets).tolist() == [3, 4, 3]
    assert rows.points[3:7].tolist() == [[7, 8], [9, 10], [11, 12], [13, 14]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bbox": "absent"}, NO_BOX),
        ({"bbox": None}, NO_BOX),
        ({"bbox": []}, NO_BOX),
        ({"bbox": [1, 2, 3]}, BAD_BOX),
        ({"bbox": "1 2 3 4"}, BAD_BOX),
        ({"bbox": {"x": 1}}, BAD_BOX),
        ({"bbox": [1, 2, 3, "4"]}, NOT_A_NUMBER),
        ({"bbox": [1, 2, 3, True]}, NOT_A_NUMBER),
        ({"bbox": [1, 2, 3, None]}, NOT_A_NUMBER),
        ({"bbox": [1, 2, 3, float("nan")]}, NOT_FINITE),
        ({"bbox": [1, 2, 3, float("inf")]}, NOT_FINITE),
        ({"bbox": [1, 2, 3, 10**400]}, NOT_FINITE),
    ],
)
def test_a_bad_annotation_costs_its_box_and_no_other(changes, problem, opened):
    labels = opened(content(annotations=[annotation(), annotation(**changes), annotation()])).read(NAMES)
    assert len(labels.rows.boxes) == 2
    assert [(item.file, item.problem) for item in labels.findings] == [("/d/b.jpg", problem)]


def test_keypoints_without_a_box_are_background_and_a_polygon_gives_one(opened):
    source = opened(content(annotations=[annotation(bbox="absent", keypoints=[1, 2, 2])]))
    assert len(source.read(NAMES).rows.boxes) == 0
    assert source.read(NAMES).findings == ()
    source = opened(content(annotations=[annotation(bbox=[], segmentation=[[1, 2, 9, 4, 5, 6], [0, 3, 1, 3, 1, 8]])]))
    assert source.read(NAMES).rows.boxes.tolist() == [[0, 2, 9, 8]]


def test_annotations_of_no_image_and_images_listed_twice_are_findings(opened):
    data = content(annotations=[annotation(), annotation(image_id=71), annotation(image_id="70")])
    data["images"].append(data["images"][0])
    source = opened(data)
    assert [item.problem for item in source.findings] == [SAME_IMAGE, NO_IMAGE, NO_IMAGE]
    assert source.images == ["/d/b.jpg", "/d/a.jpg", "/d/c.jpg"]
    assert source.read(NAMES).rows.image_of.tolist() == [0]
    assert source.part(0, 1).findings == ()


def test_ids_may_be_strings_and_large_numbers(opened):
    images = [
        {"id": "000001", "file_name": "a.jpg"},
        {"id": 10**30, "file_name": "b.jpg"},
        {"id": 2.0, "file_name": "c"},
    ]
    annotations = [annotation(image_id="000001"), annotation(image_id=10**30), annotation(image_id=2)]
    labels = opened(content(images=images, annotations=annotations)).read(NAMES)
    assert labels.rows.image_of.tolist() == [0, 1, 2]
    assert labels.image_ids.tolist() == [-1, -1, 2]


def test_findings_of_checks_name_the_image(opened):
    source = opened(content(annotations=[annotation(bbox=[50, 10, 5000, 20]), annotation(), annotation()]))
    sizes = np.array([[80, 100], [5, 5], [31, 50]])
    _, findings = checked(source, source.read(NAMES), sizes, np.ones(3, int))
    assert [(item.file, item.line) for item in findings] == [("/d/c.jpg", 0), ("/d/b.jpg", 0), ("/d/b.jpg", 0)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON: line 1, column 1: expecting value"),
        (b'{"images: []}', "not valid JSON: line 1, column 2: unterminated string"),
        (b'{"images": [}', "not valid JSON: line 1"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", ""),  # Python refuses to parse a number of that length
        ([], "should be a COCO file, with 'images', 'annotations' and 'categories', got a list"),
        ({}, "'images' is missing; a COCO file has"),
        ({"images": []}, "'annotations' is missing"),
        (content(categories={}), "'categories' should be a list, got a mapping"),
        (content(images=[3]), "images[0] should be a mapping, got a number"),
        (content(images=[{"file_name": "a"}]), "images[0] has no 'id'"),
        (content(images=[{"id": 1}]), "images[0] has no 'file_name'"),
        (content(images=[{"id": [1], "file_name": "a"}]), "images[0]: 'id' should be a number or a string, got a list"),
        (content(images=[{"id": True, "file_name": "a"}]), "images[0]: 'id' should be a number or a string, got true"),
        (content(images=[{"id": 1, "file_name": None}]), "images[0]: 'file_name' should be a string, got null"),
        (content(images=[{"id": 1, "file_name": "a\0"}]), "images[0]: 'file_name' 'a\\x00' is no name of a file"),
        (content(images=[{"id": 1, "file_name": "\ud800"}]), "images[0]: 'file_name' '\\ud800' is no name of a file"),
        (content(images=[{"id": 1, "file_name": ""}]), "images[0]: 'file_name' '' is no name of a file"),
        (content(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "images[1]: id 1 is that of 'a'"),
        (content(annotations=[annotation(), annotation(image_id="absent")]), "annotations[1] has no 'image_id'"),
        (content(annotations=[annotation(category_id="absent")]), "annotations[0] has no 'category_id'"),
        (content(annotations=[annotation(category_id=None)]), "annotations[0]: 'category_id' should be a number or"),
        (content(annotations=[annotation(category_id=8)]), "annotations[0]: category_id 8 is not in 'categories'"),
        (content(annotations=[annotation(category_id=2)]), "category 'pets' has boxes and is not in names"),
        (content(categories=[{"id": 33, "name": "kat"}]), "category 'kat' has boxes and is not in names; did you me"),
        (content(categories=[{"id": 33}]), "categories[0] has no 'name'"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "categories[1]: id 3 is taken"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_coco_is_an_error_that_names_what_is_wrong(data, says, opened, tmp_path):
    with pytest.raises(UserError) as error:
        opened(data)
    assert str(error.value).startswith(f"{tmp_path / 'x.json'}: {says}")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_json(opened):
    assert len(opened(b"\xef\xbb\xbf" + json.dumps(content()).encode()).images) == 3


# ---- fuzzing

number = st.one_of(st.integers(-3, 70), st.floats(allow_nan=True), st.sampled_from([10**400, -0.0, 1e308]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), number, st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)
boxes = st.lists(number, min_size=4, max_size=4)


def mapping(**fields):
    """Mappings that mostly have these fields, and now and then junk in one, or lack it."""
    whole = st.fixed_dictionaries({name: st.one_of(*[value] * 9, junk) for name, value in fields.items()})
    lost = st.sampled_from([None] * 9 + list(fields))
    return st.tuples(whole, lost).map(lambda pair: {name: value for name, value in pair[0].items() if name != pair[1]})


ids = st.integers(0, 3)
jsons = mapping(
    images=st.lists(mapping(id=ids, file_name=st.sampled_from("abc"), height=number, width=number), max_size=3),
    annotations=st.lists(
        mapping(image_id=ids, category_id=ids, bbox=boxes, area=number, iscrowd=st.integers(0, 1),
                segmentation=st.lists(st.lists(number, max_size=8), max_size=2)),
        max_size=3,
    ),
    categories=st.lists(mapping(id=ids, name=st.sampled_from(NAMES)), max_size=3),
)  # fmt: skip


@settings(max_examples=800, deadline=None)
@given(st.one_of(jsons, junk))
def test_any_json_is_rows_findings_or_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    try:
        source = open_coco(path, NAMES, str)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
        return
    labels = source.read(NAMES)
    sizes = np.full((len(source.images), 2), 50)
    rows, _ = checked(source, labels, sizes, np.ones(len(sizes), int))
    assert np.all((rows.boxes >= 0) & (rows.boxes <= 50))
    assert np.all(rows.boxes[:, :2] < rows.boxes[:, 2:])


values = st.floats(-1e6, 1e6)
objects = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 1), st.lists(values, min_size=4, max_size=4)), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(objects, st.permutations(range(5)))
def test_valid_files_are_read_as_a_slow_twin_reads_them(tmp_path_factory, rows, order):
    path = tmp_path_factory.getbasetemp() / "valid.json"
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in order]
    annotations = [{"image_id": image, "category_id": 7 - kind, "bbox": box} for image, kind, box in rows]
    categories = [{"id": 7, "name": "cat"}, {"id": 6, "name": "dog"}]
    path.write_text(json.dumps({"annotations": annotations, "categories": categories, "images": images}))
    labels = open_coco(path, NAMES, str).read(NAMES)
    expected = [
        (place, kind, x, y, x + width, y + height)
        for place, number in enumerate(order)
        for image, kind, (x, y, width, height) in rows
        if image == number
    ]
    found = zip(labels.rows.image_of.tolist(), labels.rows.classes.tolist(), *labels.rows.boxes.T.tolist())
    assert list(found) == expected
