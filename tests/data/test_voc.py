import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.labels import NOT_A_NUMBER, NOT_FINITE, UNREADABLE
from utils.data.voc import BROKEN, DOCTYPE, NO_ANNOTATION, NO_BOX, NO_NAME, VocSource, image_name
from utils.structures import DIFFICULT, UserError


def box(*sides) -> str:
    return "<bndbox>" + "".join(f"<{name}>{side}</{name}>" for name, side in zip(SIDES, sides)) + "</bndbox>"


SIDES = ("xmin", "ymin", "xmax", "ymax")
BOX = box(1, 2, 30, 40)


@pytest.fixture
def parse(tmp_path):
    """FileLabels of one XML, and (line, problem)."""

    def read(content: str | bytes, names=("cat", "dog")):
        path = tmp_path / "x.xml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        labels = VocSource(images=[str(tmp_path / "x.jpg")], label_files=[str(path)]).read(names)
        assert all(item.file == str(path) for item in labels.findings)
        return labels, [(item.line, item.problem) for item in labels.findings]

    return read


def test_boxes_count_from_1_and_include_their_last_pixel(parse):
    labels, findings = parse(
        "<annotation>\n<size><width>640</width><height>480</height><depth>3</depth></size>\n"
        f"<object><name>dog</name><difficult>1</difficult>{BOX}</object>\n"
        f"<object>{box(10.5, ' 20 ', '3e1', '40.25')}<name> cat\n</name><difficult>0</difficult></object></annotation>"
    )
    assert findings == []
    assert labels.rows.boxes.tolist() == [[0, 1, 30, 40], [9.5, 19, 30, 40.25]]
    assert labels.rows.classes.tolist() == [1, 0]
    assert labels.rows.ignore.tolist() == [DIFFICULT, 0]
    assert labels.declared.tolist() == [[480, 640]]
    assert labels.lines.tolist() == [3, 4]
    assert labels.image_ids.tolist() == [-1]
    assert np.isnan(labels.rows.area).all()
    assert not labels.relative


def test_parts_of_an_object_have_boxes_of_their_own(parse):
    part = f"<part><name>head</name>{box(5, 5, 6, 6)}</part>"
    labels, _ = parse(f"<annotation><object>{part}<name>cat</name>{BOX}{part}</object></annotation>")
    assert labels.rows.boxes.tolist() == [[0, 1, 30, 40]]


@pytest.mark.parametrize(
    ("size", "declared"),
    [
        ("", [0, 0]),
        ("<size/>", [0, 0]),
        ("<size><width>0</width><height>0</height></size>", [0, 0]),
        ("<size><width>640</width></size>", [0, 640]),
        ("<size><width>640.0</width><height>many</height></size>", [-1, 640]),
        ("<size><width>-3</width><height>1e99</height></size>", [-1, -1]),
    ],
)
def test_sizes_missing_and_wrong_are_told_apart(size, declared, parse):
    assert parse(f"<annotation>{size}</annotation>")[0].declared.tolist() == [declared]


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ("<name>cat</name>", NO_BOX),
        ("<name>cat</name><bndbox/>", NO_BOX),
        (f"<name>cat</name>{box(1, 2, 3)}", NO_BOX),
        (f"<name>cat</name>{box(1, 2, 3, '')}", NO_BOX),
        (f"<name>cat</name>{box(1, 2, 3, 'four')}", NOT_A_NUMBER),
        (f"<name>cat</name>{box(1, 2, 3, '1_0')}", NOT_A_NUMBER),
        (f"<name>cat</name>{box(1, 2, 3, 'nan')}", NOT_FINITE),
        (f"<name>cat</name>{box(1, 2, 3, '1e999')}", NOT_FINITE),
        (BOX, NO_NAME),
        (f"<name/>{BOX}", NO_NAME),
    ],
)
def test_a_bad_object_costs_its_box_and_no_other(inner, problem, parse):
    good = f"<object><name>cat</name>{BOX}</object>\n"
    labels, findings = parse(f"<annotation>{good}<object>{inner}</object>\n{good}</annotation>")
    assert len(labels.rows.boxes) == 2
    assert findings == [(2, problem)]


def test_a_name_that_is_not_in_names_is_an_error_that_names_file_and_line(parse):
    with pytest.raises(UserError, match=r"x\.xml:2: class 'cart' is not in names; did you mean 'cat'\?$"):
        parse(f"<annotation>\n<object><name>cart</name>{BOX}</object></annotation>")


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", BROKEN),
        ("<annotation>", BROKEN),
        ("<annotation>&lol;</annotation>", BROKEN),
        ("<annotation></annotation><x/>", BROKEN),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', BROKEN),
        (b"<annotation>\xff</annotation>", BROKEN),
        ("no markup", BROKEN),
        ("<annotations/>", NO_ANNOTATION),
        (BOMB + "<annotation>&b;</annotation>", DOCTYPE),
        ('<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>', DOCTYPE),
    ],
)
def test_a_file_that_is_no_annotation_is_a_background_and_a_finding(content, problem, parse):
    labels, findings = parse(content)
    assert len(labels.rows.boxes) == 0
    assert findings == [(0, problem)]


def test_a_file_that_breaks_off_yields_nothing(parse):
    labels, findings = parse(f"<annotation><object><name>cat</name>{BOX}</object><object>")
    assert len(labels.rows.boxes) == 0
    assert findings == [(0, BROKEN)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(encoding, parse):
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    item = f"<object><name>größe</name>{BOX}</object>"
    text = f'<?xml version="1.0" encoding="{declared}"?>\r\n<annotation>{item}</annotation>'
    labels, findings = parse(text.encode(encoding), names=["größe"])
    assert labels.rows.classes.tolist() == [0]
    assert findings == []


def test_no_file_is_background_and_a_folder_a_finding(tmp_path):
    (tmp_path / "b.xml").mkdir()
    source = VocSource(images=["a.jpg", "b.jpg"], label_files=[str(tmp_path / "a.xml"), str(tmp_path / "b.xml")])
    labels = source.read(["a"])
    assert labels.declared.tolist() == [[0, 0], [0, 0]]
    assert [(item.file, item.problem) for item in labels.findings] == [(str(tmp_path / "b.xml"), UNREADABLE)]


def test_parts_read_what_the_whole_reads(tmp_path):
    for index in range(5):
        objects = f"<object><name>cat</name>{BOX}</object>" * index
        (tmp_path / f"{index}.xml").write_text(f"<annotation>{objects}</annotation>")
    names = [str(tmp_path / f"{index}") for index in range(5)]
    source = VocSource(images=[f"{name}.jpg" for name in names], label_files=[f"{name}.xml" for name in names])
    part = pickle.loads(pickle.dumps(source.part(2, 4)))
    assert part.read(["cat"]).rows.image_of.tolist() == [0, 0, 1, 1, 1]
    assert part.label_file(0) == source.label_file(2)
    chosen = source.chosen(np.array([1, 0, 0, 1, 0], bool))
    assert chosen.read(["cat"]).rows.image_of.tolist() == [1, 1, 1]


def test_the_name_of_an_image(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text("<annotation><folder>f</folder><filename>\n a b.jpg </filename></annotation>")
    assert image_name(str(path)) == "a b.jpg"
    path.write_text("<annotation><filename/></annotation>")
    assert image_name(str(path)) is None
    assert image_name(str(tmp_path / "none.xml")) is None


# ---- fuzzing

side = st.one_of(
    st.integers(-3, 700).map(str),
    st.floats(0, 700).map(repr),
    st.sampled_from(["", " 7\n", "nan", "-inf", "1_0", "1e999", "x"]),
)
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["cat", "dog", ""]), st.tuples(side, side, side, side)), max_size=5))
def test_objects_are_read_as_a_slow_twin_reads_them(tmp_path_factory, objects):
    path = tmp_path_factory.getbasetemp() / "twin.xml"
    path.write_text(
        "<annotation>" + "".join(f"<object><name>{n}</name>{box(*s)}</object>\n" for n, s in objects) + "</annotation>"
    )
    labels = VocSource(images=["x.jpg"], label_files=[str(path)]).read(["cat", "dog"])
    expected = []
    for name, sides in objects:
        if name and all(NUMBER.fullmatch(side.strip()) and abs(float(side)) < 1e308 for side in sides):
            x1, y1, x2, y2 = map(float, sides)
            expected.append((["cat", "dog"].index(name), x1 - 1, y1 - 1, x2, y2))
    assert list(zip(labels.rows.classes.tolist(), *labels.rows.boxes.T.tolist())) == expected
    assert len(labels.findings) == len(objects) - len(expected)


MARKUP = (
    "<annotation> </annotation> <object> </object> <name>cat</name> <name> </name> <bndbox> </bndbox> <xmin>1</xmin> "
    "<size> </size> <width>3</width> &amp; &b; <!-- --> <![CDATA[ ]]> <?xml?> <!DOCTYPE"
)
pieces = st.sampled_from([*MARKUP.split(), BOX, BOMB, "\0", "é", "\n"])


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.lists(pieces, max_size=12).map(lambda parts: "".join(parts).encode()), st.binary(max_size=40)))
def test_any_file_is_rows_findings_or_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.xml"
    path.write_bytes(data)
    try:
        labels = VocSource(images=["x.jpg"], label_files=[str(path)]).read(["cat"])
    except UserError as error:
        assert "any.xml:" in str(error)
        return
    assert np.isfinite(labels.rows.boxes).all()
