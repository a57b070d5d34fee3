import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import cxcywh_from_xyxy
from utils.data.labels import UNREADABLE, checked
from utils.data.yolo_text import TextSource, label_path
from utils.structures import UserError


@pytest.fixture
def parse(tmp_path):
    """The checked rows of one label file of an image of 100 x 100, and (line, problem)."""

    def read(content: str | bytes, names="abc"):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "x.txt").write_bytes(data)
        return parsed(tmp_path / "x.jpg", names)

    return read


def parsed(image: Path, names="abc"):
    source = TextSource(images=[str(image)])
    labels = source.read(names)
    rows, findings = checked(source, labels, np.array([[100, 100]]), np.ones(1, int))
    assert all(item.file == str(image.with_suffix(".txt")) for item in (*labels.findings, *findings))
    return rows, [(item.line, item.problem) for item in (*labels.findings, *findings)]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("a/images/b/x.jpg", "a/labels/b/x.txt"),
        ("images/x.y.png", "labels/x.y.txt"),
        ("/images/x.png", "/labels/x.txt"),
        ("images/train/images/x.jpg", "images/train/labels/x.txt"),
        ("images/images/x.jpg", "images/labels/x.txt"),
        ("a/b/x.jpg", "a/b/x.txt"),
        ("a/my_images/x.jpg", "a/my_images/x.txt"),
        ("a/images.jpg", "a/images.txt"),
        ("a/images/noext", "a/labels/noext.txt"),
        ("x.jpg", "x.txt"),
    ],
)
def test_where_the_labels_of_an_image_lie(image, label):
    assert label_path(image.replace("/", os.sep)) == label.replace("/", os.sep)


def test_no_file_an_empty_and_a_blank_one_are_background(tmp_path, parse):
    for rows, findings in (parsed(tmp_path / "none.jpg"), parse(""), parse("\n  \n"), parse(b"\xef\xbb\xbf")):
        assert rows.boxes.shape == (0, 4)
        assert rows.classes.shape == (0,)
        assert findings == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0 .5 .5 .1", "4 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .5 .5 .1 .1 .9", "6 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "8 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0,.5,.5,.1,.1", "1 value, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("# a note", "3 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .5 .5 .1 wide", "not a number: dropped"),
        ("cat .5 .5 .1 .1", "not a number: dropped"),
        ("0 .5 .5 .1 1_0", "not a number: dropped"),
        ("0 .5 .5 .1 0x1", "not a number: dropped"),
        ("0 .5 .5 .1 .", "not a number: dropped"),
        ("0 .5 .5 .1 1-2", "not a number: dropped"),
        ("0 .5 .5 .1 1e", "not a number: dropped"),
        ("0 .5 .5 .1 +-1", "not a number: dropped"),
        ("0 .5 .5 .1 ٣", "not a number: dropped"),  # a digit, but an Arabic one
        ("0 .5 nan .1 .1", "not a finite number: dropped"),
        ("0 .5 .5 inf .1", "not a finite number: dropped"),
        ("0 .5 .5 -Infinity .1", "not a finite number: dropped"),
        ("0 .5 .5 1e999 .1", "not a finite number: dropped"),
        ("1e999 .5 .5 .1 .1", "not a finite number: dropped"),
        ("0 .5 .5 -.1 .1", "negative width or height: dropped"),
        ("0 .5 .5 .1 -.1", "negative width or height: dropped"),
        ("0 .5 .5 0 .1", "zero area: dropped"),
        ("0 .1 .2 .5 .2 .9 .2", "zero area: dropped"),
        ("0 1.5 .5 .2 .2", "outside the image: dropped"),
        ("0 .5 -.5 .2 .2", "outside the image: dropped"),
    ],
)
def test_a_bad_row_costs_its_box_and_no_other(row, problem, parse):
    rows, findings = parse(f"1 .5 .5 .2 .2\n{row}\n2 .5 .5 .4 .4\n")
    assert rows.classes.tolist() == [1, 2]
    assert findings == [(2, problem)]


def test_a_polygon_becomes_the_box_around_it_and_stays(parse):
    rows, findings = parse("2 .2 .9 .5 .1 .7 .6 .3 .3\n1 .5 .5 .2 .2\n0 .1 .1 .2 .1 .2 .3")
    assert findings == []
    np.testing.assert_allclose(rows.boxes, [[20, 10, 70, 90], [40, 40, 60, 60], [10, 10, 20, 30]], atol=1e-12)
    assert rows.classes.tolist() == [2, 1, 0]
    assert rows.ring_offsets.tolist() == [0, 1, 1, 2]
    assert rows.point_offsets.tolist() == [0, 4, 7]
    expected = [[20, 90], [50, 10], [70, 60], [30, 30], [10, 10], [20, 10], [20, 30]]
    np.testing.assert_allclose(rows.points, expected, atol=1e-12)


@pytest.mark.parametrize("wrong", ["3", "-1", "0.5", "1e9", "03"])
def test_a_class_beyond_names_is_an_error_that_names_file_and_line(wrong, parse):
    with pytest.raises(UserError, match=rf"x\.txt:3: class {wrong} does not exist; names has classes 0 to 2"):
        parse(f"0 .5 .5 .1 .1\n0 .5 .5 .1 wide\n{wrong} .5 .5 .1 .1\n")


@pytest.mark.parametrize(
    "text", ["\ufeff0 .5 .5 .2 .2\r\n1.0\t0.5  5e-1 .2 .2 \r\n", "0 .5 .5 .2 .2\r+1 .5 +.5 2E-1 .2"]
)
def test_files_from_other_systems(text, parse):
    rows, findings = parse(text)
    assert rows.classes.tolist() == [0, 1]
    assert findings == []


@pytest.mark.parametrize("content", [b"\xff\xfe0\x00", b"0 .5 .5 .2 .2\n\0", "0 .5".encode("utf-16"), None])
def test_a_label_file_that_cannot_be_read_is_a_finding(content, tmp_path, parse):
    if content is None:
        (tmp_path / "x.txt").mkdir()
    rows, findings = parsed(tmp_path / "x.jpg") if content is None else parse(content)
    assert len(rows.boxes) == 0
    assert findings == [(0, UNREADABLE)]


def test_text_beside_numbers_costs_its_own_rows_alone(parse):
    rows, findings = parse("0 .5 .5 .2 .2\nhällo ä b c d\n1 1- .5 .2 .2\n2 .5 .5 .2 .2\n")
    assert rows.classes.tolist() == [0, 2]
    assert sorted(findings) == [(2, "not a number: dropped"), (3, "not a number: dropped")]


def test_two_thousand_boxes_in_one_image(parse):
    rows, findings = parse("".join(f"{index % 3} .5 .5 {(index + 90) / 4000} .5\n" for index in range(2000)))
    assert len(rows.boxes) == 2000
    assert findings == []


def test_numbers_are_parsed_in_float64(tmp_path):
    (tmp_path / "x.txt").write_text("0 0.123456789012345 0.5 0.1 0.1")
    labels = TextSource(images=[str(tmp_path / "x.jpg")]).read("a")
    assert labels.rows.boxes[0, 0] == 0.123456789012345 - 0.1 / 2


def test_parts_read_what_the_whole_reads(tmp_path):
    for index in range(7):
        rows = [f"{row % 3} .5 .5 .{index + 1} .{row + 1}\n" for row in range(index)]
        (tmp_path / f"{index}.txt").write_text("".join(rows))
    source = TextSource(images=[str(tmp_path / f"{index}.jpg") for index in range(7)], findings=(1,))
    whole = source.read("abc").rows
    for start, stop in ((0, 7), (2, 5), (6, 9)):
        part = pickle.loads(pickle.dumps(source.part(start, stop)))
        rows = part.read("abc").rows
        keep = (whole.image_of >= start) & (whole.image_of < stop)
        np.testing.assert_array_equal(rows.boxes, whole.boxes[keep])
        np.testing.assert_array_equal(rows.image_of, whole.image_of[keep] - start)
        assert part.findings == ()
        assert list(part.label_files) == list(source.label_files)[start:stop]
    odd = source.chosen(np.arange(7) % 2 == 1)
    assert odd.images == source.images[1::2]
    assert odd.label_file(1) == source.label_file(3)


# ---- fuzzing

start, share = st.floats(0, 0.99), st.floats(1e-5, 1)  # of a side: where a box begins, how much of the rest it takes
box = st.tuples(start, start, share, share).map(
    lambda box: (box[0], box[1], box[0] + (1 - box[0]) * box[2], box[1] + (1 - box[1]) * box[3])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), box), max_size=6, unique_by=lambda row: (row[0], *np.round(row[1], 12))))
def test_writing_and_parsing_give_the_boxes_back(tmp_path_factory, rows):
    boxes = np.array([box for _, box in rows]).reshape(-1, 4)
    lines = [
        f"{kind} " + " ".join(map(repr, values)) for (kind, _), values in zip(rows, cxcywh_from_xyxy(boxes).tolist())
    ]
    path = tmp_path_factory.getbasetemp() / "written.txt"
    path.write_text("\n".join(lines))
    labels, findings = parsed(path)
    assert all("px wide" in problem for _, problem in findings)
    np.testing.assert_allclose(labels.boxes, boxes * 100, atol=1e-12)
    assert labels.classes.tolist() == [kind for kind, _ in rows]


NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def rows_slowly(text: str, num_classes: int) -> list[list[float]] | str:
    """The rows that SPEC 3 accepts, or the class that does not exist."""
    rows = []
    for line in re.split(r"\r\n|\r|\n", text):
        fields = line.split()
        if len(fields) != 5 and not (len(fields) >= 7 and len(fields) % 2 == 1):
            continue
        if not all(NUMBER.fullmatch(field) and math.isfinite(float(field)) for field in fields):
            continue
        label = float(fields[0])
        if label not in range(num_classes):
            return fields[0]
        rows.append([float(field) for field in fields])
    return rows


words = st.one_of(
    st.sampled_from(
        ["0", "1", "2", "0.5", ".5", "5.", "1e-1", "-.1", "+0.25", "1_0", "nan", "inf", "0x1", "1e400", "e"]
    ),
    st.floats(0, 1).map(repr),
    st.text("0123456789.+-eE_naif", min_size=1, max_size=5),
)
lines = st.one_of(
    st.tuples(st.sampled_from("0120"), st.lists(words, min_size=4, max_size=4)).map(
        lambda row: " ".join([row[0], *row[1]])
    ),
    st.lists(words, max_size=10).map(" ".join),
    st.text("01.-+e ,\tnafi", max_size=30),
)
texts = st.tuples(st.lists(lines, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"])).map(
    lambda text: text[1].join(text[0])
)


@settings(max_examples=1500, deadline=None)
@given(texts)
def test_any_text_is_read_as_a_slow_twin_reads_it(tmp_path_factory, text):
    image = tmp_path_factory.getbasetemp() / "any.jpg"
    image.with_suffix(".txt").write_bytes(text.encode())
    source, expected = TextSource(images=[str(image)]), rows_slowly(text, 2)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=rf"any\.txt:\d+: class {re.escape(expected)} does not exist"):
            source.read("ab")
        return
    labels = source.read("ab")
    assert labels.rows.classes.tolist() == [row[0] for row in expected]
    assert len(labels.rows.classes) + len(labels.findings) == sum(bool(line.strip()) for line in text.split("\n"))
    for number, (row, box) in enumerate(zip(expected, labels.rows.boxes.tolist())):
        if len(row) == 5:
            _, cx, cy, width, height = row
            assert box == [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        else:
            assert box == [min(row[1::2]), min(row[2::2]), max(row[1::2]), max(row[2::2])]
        ring = labels.rows.ring_offsets[number]
        assert labels.rows.ring_offsets[number + 1] - ring == (len(row) > 5)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.binary(max_size=60), texts.map(str.encode)))
def test_any_bytes_are_boxes_inside_the_image_findings_or_a_user_error(tmp_path_factory, data):
    image = tmp_path_factory.getbasetemp() / "bytes.jpg"
    image.with_suffix(".txt").write_bytes(data)
    try:
        rows, _ = parsed(image)
    except UserError as error:
        assert "bytes.txt:" in str(error)
        assert "\n" not in str(error)
        return
    assert np.all((rows.boxes >= 0) & (rows.boxes <= 100))
    assert np.all(rows.boxes[:, :2] < rows.boxes[:, 2:])
