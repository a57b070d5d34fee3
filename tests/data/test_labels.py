import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import cxcywh_from_xyxy
from utils.data.old_text import label_path, list_images, read_labels
from utils.data.store import build_store, single_class
from utils.structures import DatasetSpec, UserError


@pytest.fixture
def spec(tmp_path):
    return DatasetSpec(source=tmp_path / "data.yaml", root=tmp_path, train=(tmp_path / "images",), val=(), names=("a",))


@pytest.fixture
def touch(tmp_path):
    """Makes empty files, which is all that a listing looks at."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return make


@pytest.fixture
def parse(tmp_path):
    def read(text: str, names="abc"):
        (tmp_path / "x.txt").write_text(text, encoding="utf-8")
        return read_labels(tmp_path / "x.txt", names)

    return read


def listed(spec: DatasetSpec, split: str = "train") -> list[str]:
    return [image.relative_to(spec.root).as_posix() for image in list_images(spec, split)]


# ---- which images


def test_a_folder_is_searched_to_the_bottom_in_a_stable_order(spec, touch):
    touch("images/b.jpg", "images/a.PNG", "images/deep/er/c.jpeg", "images/d.webp")
    touch("images/notes.txt", "images/b.json", "images/Thumbs.db", "images/noext", "outside.jpg")
    assert listed(spec) == ["images/a.PNG", "images/b.jpg", "images/d.webp", "images/deep/er/c.jpeg"]


def test_hidden_files_and_folders_are_nobodys_images(spec, touch):
    touch("images/a.jpg", "images/._a.jpg", "images/.jpg", "images/.ipynb_checkpoints/a-checkpoint.jpg")
    assert listed(spec) == ["images/a.jpg"]


def test_a_hidden_folder_that_is_asked_for_is_used(spec, touch):
    touch(".data/a.jpg")
    assert listed(replace(spec, train=(spec.root / ".data",))) == [".data/a.jpg"]


def test_folders_behind_links_are_searched(spec, touch):
    touch("images/a.jpg", "elsewhere/b.jpg")
    (spec.root / "images/link").symlink_to(spec.root / "elsewhere")
    assert listed(spec) == ["images/a.jpg", "images/link/b.jpg"]


@pytest.mark.parametrize("base", ["", "lists/"])
def test_a_list_is_relative_to_the_root_or_to_itself(base, spec, touch):
    touch(f"{base}images/a.jpg", f"{base}images/b.jpg", "lists/x")
    (spec.root / "lists/train.txt").write_text("images/gone.jpg\nimages/b.jpg\n\n  ./images/a.jpg \n")
    found = list_images(replace(spec, train=(spec.root / "lists/train.txt",)), "train")
    assert found == [spec.root / base / "images" / name for name in ("gone.jpg", "b.jpg", "a.jpg")]


def test_a_list_may_hold_absolute_paths_and_a_byte_order_mark(spec, tmp_path_factory):
    image = tmp_path_factory.mktemp("far") / "a.jpg"
    image.touch()
    (spec.root / "train.txt").write_text(f"{image}\n", encoding="utf-8-sig")
    assert list_images(replace(spec, train=(spec.root / "train.txt",)), "train") == [image]


def test_several_sources_come_one_after_the_other(spec, touch):
    touch("z/b.jpg", "a/c.jpg")
    (spec.root / "more.txt").write_text("a/c.jpg\n")
    assert listed(replace(spec, train=(spec.root / "z", spec.root / "more.txt"))) == ["z/b.jpg", "a/c.jpg"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "nowhere not found; expected a folder of images or a .txt list"),
        ("bare", "no image found for 'train' in .*bare; expected files such as .jpg or .png"),
        ("blank.txt", "no image found for 'train' in .*blank.txt"),
        ("binary.txt", "binary.txt: cannot be read as a list of images"),
        ("coco.json", "coco.json: only YOLO text labels"),
        ("x.csv", "x.csv cannot be used; expected a folder"),
    ],
)
def test_a_source_that_yields_nothing_is_named(source, says, spec, touch):
    touch("bare/notes.md", "blank.txt", "coco.json", "x.csv")
    (spec.root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=says) as error:
        list_images(replace(spec, train=(spec.root / source,)), "train")
    assert "\n" not in str(error.value)


def test_a_split_that_the_data_set_does_not_have_is_named(spec):
    with pytest.raises(UserError, match="no 'test' split"):
        list_images(spec, "test")


def test_a_fraction_cuts_train_in_two_and_files_keep_their_side(spec, touch):
    spec = replace(spec, val_fraction=0.2)
    touch(*(f"images/{number}.jpg" for number in range(0, 600, 2)))
    train, val = set(listed(spec, "train")), set(listed(spec, "val"))
    assert not train & val
    assert len(train | val) == 300
    assert len(val) == pytest.approx(60, abs=20)
    touch(*(f"images/{number}.jpg" for number in range(1, 600, 2)))
    assert train < set(listed(spec, "train"))
    assert val < set(listed(spec, "val"))
    larger = set(listed(replace(spec, val_fraction=0.5), "val"))
    assert set(listed(spec, "val")) < larger
    (spec.root / "images").rename(spec.root / "moved")
    moved = replace(spec, train=(spec.root / "moved",))
    assert {Path(name).name for name in val} <= {Path(name).name for name in listed(moved, "val")}


def test_a_fraction_that_leaves_a_split_empty_says_so(spec, touch):
    touch("images/a.jpg")
    spec = replace(spec, val_fraction=0.5)
    (empty,) = [split for split in ("train", "val") if not _has_images(spec, split)]
    with pytest.raises(UserError, match=f"'val: 0.5' leaves '{empty}' none of the 1 image"):
        list_images(spec, empty)


def _has_images(spec: DatasetSpec, split: str) -> bool:
    try:
        return bool(list_images(spec, split))
    except UserError:
        return False


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_a_name_like_any_other(spec, touch):
    touch("images/a.jpg")
    strange = os.fsdecode(b"caf\xe9.jpg")
    try:
        (spec.root / "images" / strange).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    spec = replace(spec, val_fraction=0.5)
    assert sum(len(list_images(spec, split)) for split in ("train", "val") if _has_images(spec, split)) == 2
    label = read_labels(label_path(spec.root / "images" / strange), "a")
    assert len(label.boxes) == 0
    store = build_store([spec.root / strange], [(4, 4)], [label])
    assert store.path(0) == str(spec.root / strange)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("a/images/b/x.jpg", "a/labels/b/x.txt"),
        ("images/x.y.png", "labels/x.y.txt"),
        ("images/train/images/x.jpg", "images/train/labels/x.txt"),
        ("a/b/x.jpg", "a/b/x.txt"),
        ("a/my_images/x.jpg", "a/my_images/x.txt"),
        ("a/images.jpg", "a/images.txt"),
    ],
)
def test_where_the_labels_of_an_image_lie(image, label):
    assert label_path(Path(image)) == Path(label)


# ---- what label rows say


def test_no_file_an_empty_and_a_blank_one_are_background(tmp_path, parse):
    for labels in (read_labels(tmp_path / "none.txt", "abc"), parse(""), parse("\n  \n")):
        assert labels.boxes.shape == (0, 4)
        assert labels.classes.shape == (0,)
        assert not labels.findings


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0 .5 .5 .1", "4 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .5 .5 .1 .1 .9", "6 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "8 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .5 .5 .1 wide", "not a number: dropped"),
        ("cat .5 .5 .1 .1", "not a number: dropped"),
        ("0,.5,.5,.1,.1", "1 values, expected 5 (class cx cy w h) or a polygon: dropped"),
        ("0 .5 nan .1 .1", "not a finite number: dropped"),
        ("0 .5 .5 inf .1", "not a finite number: dropped"),
        ("0 .5 .5 -.1 .1", "negative width or height: dropped"),
        ("0 .5 .5 .1 -.1", "negative width or height: dropped"),
        ("0 .5 .5 0 .1", "zero area: dropped"),
        ("0 .1 .2 .5 .2 .9 .2", "zero area: dropped"),
        ("0 1.5 .5 .2 .2", "outside the image: dropped"),
        ("0 .5 -.5 .2 .2", "outside the image: dropped"),
    ],
)
def test_a_bad_row_costs_its_box_and_no_other(row, problem, parse):
    labels = parse(f"1 .5 .5 .2 .2\n{row}\n2 .5 .5 .4 .4\n")
    assert labels.classes.tolist() == [1, 2]
    (finding,) = labels.findings
    assert (finding.line, finding.problem) == (2, problem)
    assert finding.file.endswith("x.txt")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0 .1 .5 .4 .2", [0, 0.4, 0.3, 0.6]),  # negative x1
        ("0 .5 .9 .2 .4", [0.4, 0.7, 0.6, 1]),  # above 1
        ("0 .5 .5 3 3", [0, 0, 1, 1]),
        ("0 -.1 .2 .5 .2 .5 1.5", [0, 0.2, 0.5, 1]),  # a polygon
    ],
)
def test_a_box_that_reaches_outside_is_clipped_and_named(row, expected, parse):
    labels = parse(row)
    np.testing.assert_allclose(labels.boxes, [expected], atol=1e-12)
    assert [(item.line, item.problem) for item in labels.findings] == [(1, "reaches outside the image: clipped")]


def test_rounding_at_the_edge_is_clipped_without_a_word(parse):
    labels = parse("0 .5 .5 1.00001 1.00001")
    assert labels.boxes.tolist() == [[0, 0, 1, 1]]
    assert not labels.findings


def test_a_duplicate_is_dropped_and_another_class_in_its_place_is_not(parse):
    labels = parse("0 .5 .5 .2 .2\n1 .5 .5 .2 .2\n0 0.50 0.5 .2 .2\n")
    assert labels.classes.tolist() == [0, 1]
    assert [(item.line, item.problem) for item in labels.findings] == [(3, "duplicate row: dropped")]


def test_a_polygon_becomes_the_box_around_it(parse):
    labels = parse("2 .2 .9 .5 .1 .7 .6 .3 .3\n0 .1 .1 .2 .1 .2 .3")
    assert labels.boxes.tolist() == [[0.2, 0.1, 0.7, 0.9], [0.1, 0.1, 0.2, 0.3]]
    assert labels.classes.tolist() == [2, 0]


@pytest.mark.parametrize("wrong", ["3", "-1", "0.5", "1e9"])
def test_a_class_beyond_names_is_an_error_that_names_file_and_line(wrong, parse):
    with pytest.raises(UserError, match=rf"x\.txt:2: class {wrong} does not exist; names has classes 0 to 2"):
        parse(f"0 .5 .5 .1 .1\n{wrong} .5 .5 .1 .1\n")


def test_files_from_other_systems(parse):
    labels = parse("\ufeff0 .5 .5 .2 .2\r\n1.0\t0.5  5e-1 .2 .2 \r\n")
    assert labels.classes.tolist() == [0, 1]
    assert not labels.findings


@pytest.mark.parametrize("content", [b"\xff\xfe0\x00", None])
def test_a_label_file_that_cannot_be_read_is_a_finding(content, tmp_path):
    path = tmp_path / "x.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    labels = read_labels(path, "abc")
    assert len(labels.boxes) == 0
    assert [(item.line, item.problem) for item in labels.findings] == [
        (0, "label file unreadable: taken as background")
    ]


def test_numbers_are_parsed_in_float64(parse):
    row = "0 0.123456789012345 0.5 0.1 0.1"
    assert parse(row).boxes[0, 0] == 0.123456789012345 - 0.1 / 2


start, share = st.floats(0, 0.99), st.floats(1e-5, 1)  # of a side: where a box begins, how much of the rest it takes
box = st.tuples(start, start, share, share).map(
    lambda box: (box[0], box[1], box[0] + (1 - box[0]) * box[2], box[1] + (1 - box[1]) * box[3])
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), box), max_size=6, unique_by=lambda row: (row[0], *np.round(row[1], 12))))
def test_writing_and_parsing_give_the_boxes_back(tmp_path_factory, rows):
    boxes = np.array([box for _, box in rows]).reshape(-1, 4)
    lines = [
        f"{kind} " + " ".join(map(repr, values)) for (kind, _), values in zip(rows, cxcywh_from_xyxy(boxes).tolist())
    ]
    path = tmp_path_factory.getbasetemp() / "written.txt"
    path.write_text("\n".join(lines))
    labels = read_labels(path, "abc")
    assert not labels.findings
    np.testing.assert_allclose(labels.boxes, boxes, atol=1e-15)
    assert labels.classes.tolist() == [kind for kind, _ in rows]


@settings(max_examples=100, deadline=None)
@given(st.text("01.-+e \n,nafi", max_size=60))
def test_any_text_is_boxes_inside_the_image_findings_or_a_user_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text(text)
    try:
        labels = read_labels(path, "a")
    except UserError as error:
        assert f"{path}:" in str(error)
        return
    assert np.all((labels.boxes >= 0) & (labels.boxes <= 1))
    assert np.all(labels.boxes[:, :2] < labels.boxes[:, 2:])
    assert len(labels.boxes) + sum("dropped" in item.problem for item in labels.findings) == sum(
        bool(line.strip()) for line in text.splitlines()
    )


# ---- packing


def test_a_store_holds_pixels_of_each_image_and_its_path(parse):
    first, empty, last = parse("1 .5 .5 .5 .5\n0 .25 .75 .5 .5"), parse(""), parse("2 .5 .5 1 1")
    paths = [Path("/d/ä.jpg"), Path("/d/b.jpg"), Path("/d/ccc.jpg")]
    store = build_store(paths, [(100, 200), (10, 10), (30, 50)], [first, empty, last])
    assert len(store) == 3
    assert [store.path(image) for image in range(3)] == [str(path) for path in paths]
    assert store.boxes[store.rows(0)].tolist() == [[50, 25, 150, 75], [0, 50, 100, 100]]
    assert store.boxes[store.rows(1)].shape == (0, 4)
    assert store.boxes[store.rows(2)].tolist() == [[0, 0, 50, 30]]
    assert store.classes.tolist() == [1, 0, 2]
    assert store.area.tolist() == [5000, 5000, 1500]
    assert not store.ignore.any()
    dtypes = {name: str(array.dtype) for name, array in vars(store).items()}
    assert dtypes == {
        "boxes": "float32",
        "classes": "int32",
        "ignore": "uint8",
        "area": "float64",
        "offsets": "int64",
        "sizes": "int32",
        "path_bytes": "uint8",
        "path_offsets": "int64",
    }


def test_a_single_class_is_class_0_of_every_box_and_takes_no_memory(parse):
    store = build_store([Path("/d/a.jpg")], [(100, 200)], [parse("1 .5 .5 .5 .5\n0 .25 .75 .5 .5\n2 .5 .5 1 1")])
    one = single_class(store)
    assert one.classes.tolist() == [0, 0, 0]
    assert one.classes.dtype == np.int32
    assert one.classes.strides == (0,)
    assert store.classes.tolist() == [1, 0, 2]
    assert all(getattr(one, name) is value for name, value in vars(store).items() if name != "classes")
    empty = single_class(build_store([Path("/d/a.jpg")], [(100, 200)], [parse("")]))
    assert empty.classes.shape == (0,)
