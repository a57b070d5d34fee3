from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.data.labels import (
    CLIPPED,
    DUPLICATE,
    NEGATIVE,
    OTHER_SIZE,
    OUTSIDE,
    TINY,
    ZERO_AREA,
    FileLabels,
    box_rows,
    checked,
    offsets_of,
    point_rows,
    taken,
)
from utils.data.store import single_class
from utils.data.yolo_text import TextSource
from utils.structures import CROWD, DIFFICULT


def file_labels(rows, *, images=1, relative=False, declared=None) -> FileLabels:
    """Labels of rows (image, class, x1, y1, x2, y2), which stand in lines 1, 2, ..."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return FileLabels(
        rows=box_rows(table[:, 0], table[:, 1], table[:, 2:]),
        relative=relative,
        lines=np.arange(1, len(table) + 1),
        image_ids=np.full(images, -1),
        declared=np.zeros((images, 2), np.int32) if declared is None else np.array(declared, np.int32),
        findings=(),
    )


def check(labels: FileLabels, sizes, orientations=None):
    images = [f"/d/images/{index}.jpg" for index in range(len(sizes))]
    orientations = np.ones(len(sizes), int) if orientations is None else np.array(orientations)
    rows, findings = checked(TextSource(images=images), labels, np.array(sizes, np.int32), orientations)
    return rows, [(Path(item.file).name, item.line, item.problem) for item in findings]


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ((50, 10, 40, 20), NEGATIVE),
        ((40, 20, 50, 10), NEGATIVE),
        ((40, 10, 40, 20), ZERO_AREA),
        ((40, 10, 50, 10), ZERO_AREA),
        ((100, 10, 120, 20), OUTSIDE),
        ((-20, 10, 0, 20), OUTSIDE),
        ((10, 80, 20, 90), OUTSIDE),
        ((99.99999999, 10, 120, 20), ZERO_AREA),  # nothing is left of it in float32
    ],
)
def test_a_bad_row_is_lost_and_no_other(box, problem):
    good = (10, 10, 30, 30)
    rows, findings = check(file_labels([(0, 1, *good), (0, 0, *box), (0, 2, *good)]), [(80, 100)])
    assert rows.classes.tolist() == [1, 2]
    assert rows.boxes.tolist() == [list(good)] * 2
    assert findings == [("0.txt", 2, problem)]


@pytest.mark.parametrize(
    ("box", "left"),
    [
        ((-10, 20, 40, 60), (0, 20, 40, 60)),
        ((40, 50, 60, 90), (40, 50, 60, 80)),
        ((-500, -500, 500, 500), (0, 0, 100, 80)),
        ((-1e308, -1e308, 1e308, 1e308), (0, 0, 100, 80)),
    ],
)
def test_a_box_that_reaches_outside_is_clipped_and_named(box, left):
    rows, findings = check(file_labels([(0, 0, *box)]), [(80, 100)])
    assert rows.boxes.tolist() == [list(left)]
    assert findings == [("0.txt", 1, CLIPPED)]


def test_rounding_at_the_edge_is_clipped_without_a_word():
    rows, findings = check(file_labels([(0, 0, -1e-5, -1e-5, 1.00001, 1.00001)], relative=True), [(80, 100)])
    assert rows.boxes.tolist() == [[0, 0, 100, 80]]
    assert findings == []


def test_a_duplicate_is_dropped_and_another_class_or_image_in_its_place_is_not():
    box = (10, 10, 30, 30)
    table = [(0, 0, *box), (0, 1, *box), (0, 0, *box), (0, 0, *box), (1, 0, *box), (1, 0, 10, 10, 30, 31)]
    rows, findings = check(file_labels(table, images=2), [(80, 100), (80, 100)])
    assert list(zip(rows.image_of, rows.classes)) == [(0, 0), (0, 1), (1, 0), (1, 0)]
    assert findings == [("0.txt", 3, DUPLICATE), ("0.txt", 4, DUPLICATE)]


def test_boxes_that_differ_outside_of_the_image_alone_are_duplicates():
    rows, findings = check(file_labels([(0, 0, 50, 10, 101, 20), (0, 0, 50, 10, 150, 20)]), [(80, 100)])
    assert rows.boxes.tolist() == [[50, 10, 100, 20]]
    assert [problem for _, _, problem in findings] == [CLIPPED, DUPLICATE]


def test_a_crowd_is_no_duplicate_of_an_object():
    labels = file_labels([(0, 0, 10, 10, 30, 30)] * 4)
    labels = replace(labels, rows=replace(labels.rows, ignore=np.array([0, CROWD, DIFFICULT, CROWD], np.uint8)))
    rows, _ = check(labels, [(80, 100)])
    assert rows.ignore.tolist() == [0, CROWD]


def test_a_tiny_box_is_kept_and_named():
    rows, findings = check(file_labels([(0, 0, 10, 10, 11.9, 30), (0, 0, 10, 10, 12, 12)]), [(80, 100)])
    assert len(rows.boxes) == 2
    assert findings == [("0.txt", 1, TINY)]


def test_rows_of_an_image_that_cannot_be_used_go_silently():
    table = [(0, 0, 10, 10, 30, 30), (1, 0, 50, 10, 40, 20), (2, 1, 10, 10, 30, 30)]
    rows, findings = check(
        file_labels(table, images=3, declared=[[0, 0], [4, 4], [0, 0]]), [(80, 100), (0, 0), (20, 99)]
    )
    assert rows.image_of.tolist() == [0, 2]
    assert findings == [("2.txt", 3, CLIPPED)]


def test_nothing_to_check():
    rows, findings = check(file_labels([], images=2), [(80, 100), (0, 0)])
    assert rows.boxes.shape == (0, 4)
    assert findings == []


def with_rings(labels: FileLabels, rings: list[list[list]]) -> FileLabels:
    """Labels with the rings of each row."""
    flat = [ring for of_row in rings for ring in of_row]
    rows = replace(
        labels.rows,
        ring_offsets=offsets_of([len(of_row) for of_row in rings]),
        point_offsets=offsets_of([len(ring) for ring in flat]),
        points=np.array([point for ring in flat for point in ring], np.float64).reshape(-1, 2),
    )
    return replace(labels, rows=rows)


def rings_of(rows, row: int) -> list[list]:
    offsets = rows.ring_offsets
    return [
        rows.points[rows.point_offsets[ring] : rows.point_offsets[ring + 1]].tolist()
        for ring in range(offsets[row], offsets[row + 1])
    ]


def test_polygons_stay_with_their_rows_and_are_clipped_as_boxes_are():
    labels = file_labels(
        [(0, 0, 0.1, 0.1, 0.5, 0.5), (0, 0, 3, 3, 4, 4), (1, 1, 0, 0, 1, 1), (1, 2, 0.5, 0, 1.5, 1)],
        images=2,
        relative=True,
    )
    triangle = [[0.5, 0], [1.5, 0.5], [0.5, 1]]
    labels = with_rings(labels, [[[[0.1, 0.1], [0.5, 0.1], [0.5, 0.5]]], [[[3, 3], [4, 4], [3, 4]]], [],
                                 [triangle, [[0.6, 0.5], [0.7, 0.5], [0.7, 0.6]]]])  # fmt: skip
    rows, _ = check(labels, [(80, 100), (10, 20)])
    assert rows.classes.tolist() == [0, 1, 2]
    assert rings_of(rows, 0) == [[[10, 8], [50, 8], [50, 40]]]
    assert rings_of(rows, 1) == []
    assert rings_of(rows, 2) == [[[10, 0], [20, 5], [10, 10]], [[12, 5], [14, 5], [14, 6]]]
    assert point_rows(rows).tolist() == [0] * 3 + [2] * 6


# ---- sizes and orientations


@pytest.mark.parametrize("declared", [(81, 100), (100, 80), (-1, 100)])
def test_the_image_decides_where_a_file_declares_another_size(declared):
    labels = file_labels([(0, 0, 10, 10, 30, 30)], declared=[declared])
    rows, findings = check(labels, [(80, 100)])
    assert rows.boxes.tolist() == [[10, 10, 30, 30]]
    assert findings == [("0.jpg", 0, OTHER_SIZE)]


@pytest.mark.parametrize("declared", [(0, 0), (80, 100), (80, 0)])
def test_no_size_and_the_right_one_are_fine(declared):
    assert check(file_labels([(0, 0, 10, 10, 30, 30)], declared=[declared]), [(80, 100)])[1] == []


def as_shown(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer makes of an image, by OpenCV: an EXIF tag is written into a JPEG and read back."""
    _, data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, 100])
    tag = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + orientation.to_bytes(2, "big") + b"\0\0\0\0\0\0"
    exif = b"Exif\0\0" + tag
    data = data.tobytes()
    data = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_pixels_of_an_image_that_exif_turns(orientation):
    stored = np.zeros((48, 80), np.uint8)
    stored[8:16, 24:56] = 255
    shown = as_shown(stored, orientation)
    declared = stored.shape
    labels = with_rings(
        file_labels([(0, 0, 24, 8, 56, 16)], declared=[declared]), [[[[24, 8], [56, 8], [56, 16], [24, 16]]]]
    )
    rows, findings = check(labels, [shown.shape], [orientation])
    if orientation < 5:  # sizes do not tell whether the labels were drawn before or after the turn
        assert rows.boxes.tolist() == [[24, 8, 56, 16]]
        assert findings == []
        return
    ys, xs = np.nonzero(shown > 128)
    assert rows.boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
    assert [rows.points.min(0).tolist(), rows.points.max(0).tolist()] == rows.boxes.reshape(2, 2).tolist()
    assert findings == []


def test_boxes_drawn_on_the_turned_image_and_square_ones_stay():
    for declared, size in (((80, 48), (80, 48)), ((64, 64), (64, 64))):
        rows, findings = check(file_labels([(0, 0, 10, 10, 30, 20)], declared=[declared]), [size], [6])
        assert rows.boxes.tolist() == [[10, 10, 30, 20]]
        assert findings == []


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_as_a_coco_file_has_them_follow_the_turn_and_are_not_clipped(orientation):
    labels = file_labels([(0, 0, 10, 40, 30, 60), (1, 0, 0.1, 0.2, 0.4, 0.6)], images=2, declared=[(48, 80), (48, 80)])
    annotated = np.array([[10, 40, 20, 20], [0.1, 0.2, 0.3, 0.4]])
    labels = replace(labels, rows=replace(labels.rows, annotated=annotated))
    rows, _ = check(labels, [(80, 48), (48, 80)], [orientation, orientation])
    corner = {5: [40, 10], 6: [-12, 10], 7: [-12, 50], 8: [40, 50]}[orientation]
    assert rows.annotated.tolist() == [[*corner, 20, 20], [0.1, 0.2, 0.3, 0.4]]  # the second is stored as it is shown
    assert (rows.boxes[0, 2:] - rows.boxes[0, :2]).tolist() == ([8, 20])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_negative_side_is_still_one_after_a_turn(orientation):
    table = [(0, 0, 30, 10, 10, 20), (0, 0, 10, 20, 30, 10), (0, 0, 10, 10, 10, 20), (0, 1, 10, 10, 30, 20)]
    rows, findings = check(file_labels(table, declared=[(48, 80)]), [(80, 48)], [orientation])
    assert rows.classes.tolist() == [1]
    assert [problem for _, _, problem in findings] == [NEGATIVE, NEGATIVE, ZERO_AREA]


# ---- against a slow twin

edge = st.one_of(st.floats(-200, 300), st.sampled_from([-1.0, 0.0, 10.0, 50.0, 99.999, 100.0, 101.0, -0.0, 1e300]))
row = st.tuples(st.integers(0, 2), st.integers(0, 1), edge, edge, edge, edge)
SIZES = [(80, 100), (0, 0), (37, 11)]


def checked_slowly(rows: list[tuple], relative: bool) -> tuple[list[tuple], list[tuple]]:
    """Kept rows and (image, line, problem), one row at a time."""
    kept, findings, seen = [], [], set()
    for line, (image, label, *box) in enumerate(rows, 1):
        height, width = SIZES[image]
        if height == 0:
            continue
        limits = [width, height, width, height]
        if relative:
            box = [value * limit for value, limit in zip(box, limits)]
        x1, y1, x2, y2 = box
        inside = [min(max(value, 0.0), limit) for value, limit in zip(box, limits)]
        wide, high = (float(np.float32(inside[axis + 2]) - np.float32(inside[axis])) for axis in (0, 1))
        if x2 < x1 or y2 < y1:
            findings.append((image, line, NEGATIVE))
        elif wide <= 0 or high <= 0:
            outside = x1 < x2 and y1 < y2 and (x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height)
            findings.append((image, line, OUTSIDE if outside else ZERO_AREA))
        elif (image, label, *inside) in seen:
            findings.append((image, line, DUPLICATE))
        else:
            seen.add((image, label, *inside))
            kept.append((image, label, *inside))
            if max(-x1 / width, -y1 / height, (x2 - width) / width, (y2 - height) / height) > 1e-4:
                findings.append((image, line, CLIPPED))
            if min(wide, high) < 2:
                findings.append((image, line, TINY))
    return kept, findings


@settings(max_examples=300, deadline=None)
@given(st.lists(row, max_size=12).map(lambda rows: sorted(rows, key=lambda item: item[0])), st.booleans())
def test_rows_are_judged_as_one_by_one(table, relative):
    if relative:
        table = [(*item[:2], *(value / 100 for value in item[2:])) for item in table]
    rows, findings = check(file_labels(table, images=3, relative=relative), SIZES)
    kept, expected = checked_slowly(table, relative)
    assert list(zip(rows.image_of.tolist(), rows.classes.tolist(), *rows.boxes.T.tolist())) == kept
    assert findings == [(f"{image}.txt", line, problem) for image, line, problem in expected]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_are_taken_with_their_rings(data):
    points = st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)).map(list), min_size=3, max_size=5)
    rings = data.draw(st.lists(st.lists(points, max_size=3), max_size=6))
    labels = with_rings(file_labels([(0, number, 0, 0, 1, 1) for number in range(len(rings))]), rings)
    index = data.draw(st.lists(st.integers(0, max(len(rings) - 1, 0)), max_size=6)) if rings else []
    rows = taken(labels.rows, np.array(index, np.int64))
    assert rows.classes.tolist() == index
    assert [rings_of(rows, row) for row in range(len(index))] == [rings[row] for row in index]


# ---- packing


def image_labels(*rows) -> ImageLabels:
    table = np.array(rows, np.float64).reshape(-1, 5)
    return ImageLabels(boxes=table[:, 1:], classes=table[:, 0].astype(np.int64))


def test_a_store_holds_pixels_of_each_image_and_its_path():
    labels = [
        image_labels((1, 0.25, 0.25, 0.75, 0.75), (0, 0, 0.5, 0.5, 1)),
        image_labels(),
        image_labels((2, 0, 0, 1, 1)),
    ]
    paths = [Path("/d/ä.jpg"), Path("/d/b.jpg"), Path("/d/ccc.jpg")]
    store = build_store(paths, [(100, 200), (10, 10), (30, 50)], labels)
    assert len(store) == 3
    assert [store.path(image) for image in range(3)] == [str(path) for path in paths]
    assert store.boxes[store.rows(0)].tolist() == [[50, 25, 150, 75], [0, 50, 100, 100]]
    assert store.boxes[store.rows(1)].shape == (0, 4)
    assert store.boxes[store.rows(2)].tolist() == [[0, 0, 50, 30]]
    assert store.classes.tolist() == [1, 0, 2]
    assert store.area.tolist() == [5000, 5000, 1500]
    assert not store.ignore.any()


def test_a_single_class_is_class_0_of_every_box_and_takes_no_memory():
    store = build_store([Path("/d/a.jpg")], [(100, 200)], [image_labels((1, 0, 0, 1, 1), (2, 0, 0, 0.5, 1))])
    one = single_class(store)
    assert one.classes.tolist() == [0, 0]
    assert one.classes.dtype == np.int32
    assert one.classes.strides == (0,)
    assert store.classes.tolist() == [1, 2]
    assert all(getattr(one, name) is value for name, value in vars(store).items() if name != "classes")
    empty = single_class(build_store([Path("/d/a.jpg")], [(100, 200)], [image_labels()]))
    assert empty.classes.shape == (0,)
