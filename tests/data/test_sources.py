import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import read_dataset
from utils.data.coco import CocoSource
from utils.data.labels import checked
from utils.data.sources import (
    EMPTY_ENTRY,
    FOREIGN_PHOTO,
    NO_ANNOTATION,
    NO_IMAGE,
    SHARED_LABELS,
    TWICE,
    open_split,
    split_findings,
)
from utils.data.voc import VocSource
from utils.data.yolo_text import TextSource
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


def images_of(spec: DatasetSpec, split: str = "train") -> list[str]:
    return [image for source in open_split(spec, split) for image in source.images]


def below(spec: DatasetSpec, paths) -> list[str]:
    return [Path(path).relative_to(spec.root).as_posix() for path in paths]


def listed(spec: DatasetSpec, split: str = "train") -> list[str]:
    return below(spec, images_of(spec, split))


def labels_of(spec: DatasetSpec) -> list[str]:
    return below(spec, [label for source in open_split(spec, "train") for label in source.label_files])


def entries(spec: DatasetSpec, *names: str) -> DatasetSpec:
    return replace(spec, train=tuple(spec.root / name for name in names))


def problems(spec: DatasetSpec, split: str = "train") -> list[tuple[str, str]]:
    findings = split_findings(spec, split, open_split(spec, split))
    return [(Path(item.file).relative_to(spec.root).as_posix(), item.problem) for item in findings]


# ---- folders


def test_a_folder_is_searched_to_the_bottom_in_a_stable_order(spec, touch):
    touch("images/b.jpg", "images/a.PNG", "images/deep/er/c.jpeg", "images/d.webp")
    touch("images/notes.txt", "images/b.json", "images/Thumbs.db", "images/noext", "images/jpg", "outside.jpg")
    assert listed(spec) == ["images/a.PNG", "images/b.jpg", "images/d.webp", "images/deep/er/c.jpeg"]


def test_hidden_files_and_folders_are_nobodys_images(spec, touch):
    touch("images/a.jpg", "images/._a.jpg", "images/.jpg", "images/.ipynb_checkpoints/a-checkpoint.jpg")
    assert listed(spec) == ["images/a.jpg"]


def test_a_hidden_folder_that_is_asked_for_is_used(spec, touch):
    touch(".data/a.jpg")
    assert listed(entries(spec, ".data")) == [".data/a.jpg"]


def test_folders_behind_links_are_searched_and_circles_are_not(spec, touch):
    touch("images/a.jpg", "images/deep/c.jpg", "elsewhere/b.jpg")
    (spec.root / "images/link").symlink_to(spec.root / "elsewhere")
    (spec.root / "images/deep/up").symlink_to(spec.root / "images")
    assert listed(spec) == ["images/a.jpg", "images/deep/c.jpg", "images/link/b.jpg"]


@pytest.mark.parametrize("side", ["link", "target"])
def test_a_folder_behind_a_link_has_the_labels_of_either_side(side, spec, touch):
    touch("far/images/a.jpg", "far/labels/a.txt" if side == "target" else "set/labels/train/a.txt", "set/images/x")
    (spec.root / "set/images/train").symlink_to(spec.root / "far/images")
    (spec.root / "data.yaml").write_text("{train: set/images/train, val: set/images/train, names: [a]}")
    spec, _ = read_dataset(str(spec.root / "data.yaml"))
    assert labels_of(spec) == ["far/labels/a.txt" if side == "target" else "set/labels/train/a.txt"]


def test_an_image_behind_a_link_has_the_labels_of_the_link(spec, touch):
    touch("far/b.jpg", "images/x", "labels/a.txt")
    (spec.root / "images/a.jpg").symlink_to(spec.root / "far/b.jpg")
    (spec.root / "images/dangling.jpg").symlink_to("nowhere.jpg")
    assert labels_of(spec) == ["labels/a.txt", "labels/dangling.txt"]


def test_names_with_spaces_signs_and_letters_of_the_world(spec, touch):
    names = ["a b.jpg", "c#d.jpg", "größe.jpg", "猫.JPG", "100%.jpg"]
    touch(*(f"images/{name}" for name in names), *(f"labels/{name[:-4]}.txt" for name in names))
    assert listed(spec) == [f"images/{name}" for name in sorted(names)]
    assert labels_of(spec) == [f"labels/{name[:-4]}.txt" for name in sorted(names)]
    assert problems(spec) == []


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_a_name_like_any_other(spec, touch):
    touch("images/a.jpg")
    strange = os.fsdecode(b"caf\xe9.jpg")
    try:
        (spec.root / "images" / strange).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert listed(spec) == ["images/a.jpg", f"images/{strange}"]
    (spec.root / "list.txt").write_bytes(b"images/caf\xe9.jpg\n")
    assert listed(entries(spec, "list.txt")) == [f"images/{strange}"]
    (source,) = open_split(spec, "train")
    assert len(source.read("a").rows.boxes) == 0
    halves = replace(spec, val_fraction=0.5)
    assert sum(len(images_of(halves, split)) for split in ("train", "val") if has_images(halves, split)) == 2


def test_labels_beside_images_in_a_folder_images_are_found_where_no_folder_labels_is(spec, touch):
    touch("images/cvat/a.jpg", "images/cvat/a.txt", "images/b/b.jpg", "labels/b/b.txt", "images/b/b.txt")
    assert labels_of(spec) == ["labels/b/b.txt", "images/cvat/a.txt"]
    (source,) = open_split(spec, "train")
    assert pickle.loads(pickle.dumps(source.part(1, 2))).label_file(0) == source.label_file(1)


@pytest.mark.parametrize("entry", ["images", "beside", "list.txt"])
def test_label_files_in_capitals_are_read(entry, spec, touch):
    touch("images/DSC_1.JPG", "images/b.jpg", "images/c.jpg", "beside/d.jpg")
    for name in ("labels/DSC_1.TXT", "labels/b.txt", "beside/d.Txt"):
        (spec.root / name).parent.mkdir(exist_ok=True)
        (spec.root / name).write_text("0 .5 .5 .1 .1\n")
    (spec.root / "list.txt").write_text("images/DSC_1.JPG\nbeside/d.jpg\n")
    spec = entries(spec, entry)
    wanted = {
        "images": ["labels/DSC_1.TXT", "labels/b.txt", "labels/c.txt"],
        "beside": ["beside/d.Txt"],
        "list.txt": ["labels/DSC_1.TXT", "beside/d.Txt"],
    }[entry]
    assert labels_of(spec) == wanted
    (source,) = open_split(spec, "train")
    parts = [pickle.loads(pickle.dumps(source.part(at, at + 1))) for at in range(len(source.images))]
    assert below(spec, [part.label_file(0) for part in parts]) == wanted
    assert [len(part.read("a").rows.boxes) for part in parts] == [name != "labels/c.txt" for name in wanted]
    assert problems(spec) == []


def test_of_two_label_files_the_one_by_the_rule_is_read(spec, touch):
    touch("images/a.jpg", "labels/a.txt", "labels/a.TXT")
    assert labels_of(spec) == ["labels/a.txt"]


# ---- lists


@pytest.mark.parametrize("base", ["", "lists/"])
def test_a_list_is_relative_to_the_root_or_to_itself(base, spec, touch):
    touch(f"{base}images/a.jpg", f"{base}images/b.jpg", "lists/x")
    (spec.root / "lists/train.txt").write_text("images/gone.jpg\nimages/b.jpg\n\n  ./images/a.jpg \r\n")
    assert listed(entries(spec, "lists/train.txt")) == [
        f"{base}images/{name}" for name in ("gone.jpg", "b.jpg", "a.jpg")
    ]


def test_a_list_may_hold_absolute_paths_and_a_byte_order_mark(spec, tmp_path_factory):
    image = tmp_path_factory.mktemp("far") / "a.jpg"
    image.touch()
    (spec.root / "train.txt").write_text(f"{image}\n", encoding="utf-8-sig")
    assert images_of(entries(spec, "train.txt")) == [str(image)]


@pytest.mark.parametrize(
    "line",
    [
        r"C:\Users\me\set\images\train\a.jpg",
        r"images\train\a.jpg",
        r".\images\train\a.jpg",
        "/home/other/set/images/train/a.jpg",
        "data/images/train/a.jpg",
        "../images/train/a.jpg",
        "images//train/a.jpg",
    ],
)
def test_paths_of_other_machines_are_matched_by_their_tails(line, spec, touch):
    touch("images/train/a.jpg")
    (spec.root / "train.txt").write_text(f"{line}\r\n")
    assert listed(entries(spec, "train.txt")) == ["images/train/a.jpg"]
    assert labels_of(entries(spec, "train.txt")) == ["labels/train/a.txt"]


def test_each_line_of_a_list_is_found_for_itself(spec, touch):
    touch("lists/images/a.jpg", "images/b.jpg", "c.jpg")
    (spec.root / "lists/train.txt").write_text("images/a.jpg\nimages/b.jpg\nD:\\x\\c.jpg\n/nowhere/d.jpg\n")
    found = images_of(entries(spec, "lists/train.txt"))
    assert below(spec, found[:3]) == ["lists/images/a.jpg", "images/b.jpg", "c.jpg"]
    assert Path(found[3]).name == "d.jpg"
    assert not Path(found[3]).exists()


def test_a_cvat_export_is_read_as_it_comes(spec, touch):
    touch("export/obj_train_data/a.jpg", "export/obj_train_data/b.PNG", "export/obj.data", "export/obj.names")
    (spec.root / "export/obj_train_data/a.txt").write_text("0 .5 .5 .1 .1\n")
    (spec.root / "export/train.txt").write_text("data/obj_train_data/a.jpg\ndata/obj_train_data/b.PNG\n")
    for entry in ("export/train.txt", "export/obj_train_data"):
        export = replace(entries(spec, entry), root=spec.root / "export")
        (source,) = open_split(export, "train")
        assert below(spec, source.images) == ["export/obj_train_data/a.jpg", "export/obj_train_data/b.PNG"]
        assert source.read("a").rows.image_of.tolist() == [0]
        assert split_findings(export, "train", [source]) == []


def test_a_label_studio_export_is_read_as_it_comes(spec, touch):
    touch("images/1f-a.jpg", "labels/1f-a.txt", "labels/classes.txt", "classes.txt", "notes.json")
    assert listed(entries(spec, ".")) == ["images/1f-a.jpg"]
    assert labels_of(spec) == ["labels/1f-a.txt"]
    assert problems(spec) == []


def test_several_entries_come_one_after_the_other(spec, touch):
    touch("z/b.jpg", "a/c.jpg")
    (spec.root / "more.txt").write_text("a/c.jpg\n")
    assert listed(entries(spec, "z", "more.txt")) == ["z/b.jpg", "a/c.jpg"]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("nowhere", "nowhere not found; expected a folder of images, a .txt list of images, a COCO .json, a VOC list"),
        ("bare", "no image found for 'train' in .*bare; expected a folder of images"),
        ("blank.txt", "no image found for 'train' in .*blank.txt"),
        ("binary.txt", "binary.txt: cannot be read as a list of images"),
        ("ids.txt", "ids.txt: '0001' is no image file such as a.jpg, and for a VOC list of ids there is no folder Ann"),
        ("coco.json", "coco.json: not valid JSON"),
        ("bare.json", "'train': .*bare.json: lists no images"),
        ("x.csv", "x.csv cannot be used; expected a folder"),
        ("x.xml", "x.xml cannot be used; expected a folder"),
        ("dangling.txt", "dangling.txt cannot be used"),
        ("n" * 300, "nnn not found"),
    ],
)
def test_an_entry_that_yields_nothing_is_named(entry, says, spec, touch):
    touch("bare/notes.md", "blank.txt", "coco.json", "x.csv", "x.xml")
    (spec.root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (spec.root / "ids.txt").write_text("0001\n0002\n")
    (spec.root / "bare.json").write_text('{"images": [], "annotations": [], "categories": []}')
    (spec.root / "dangling.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=says) as error:
        open_split(entries(spec, entry), "train")
    assert "\n" not in str(error.value)


def test_a_split_that_the_data_set_does_not_have_is_named(spec):
    with pytest.raises(UserError, match="no 'test' split"):
        open_split(spec, "test")


# ---- val as a fraction


def test_a_fraction_cuts_train_in_two_and_files_keep_their_side(spec, touch):
    spec = replace(spec, val_fraction=0.2)
    touch(*(f"images/{number}.jpg" for number in range(0, 600, 2)))
    train, val = set(listed(spec, "train")), set(listed(spec, "val"))
    assert not train & val
    assert len(train | val) == 300
    assert len(val) == pytest.approx(60, abs=20)
    chosen = [number for number in range(0, 60, 2) if f"images/{number}.jpg" in val]
    assert chosen == [12, 30, 38]  # as by earlier versions
    touch(*(f"images/{number}.jpg" for number in range(1, 600, 2)))
    assert train < set(listed(spec, "train"))
    assert val < set(listed(spec, "val"))
    larger = set(listed(replace(spec, val_fraction=0.5), "val"))
    assert set(listed(spec, "val")) < larger
    (spec.root / "images").rename(spec.root / "moved")
    moved = entries(spec, "moved")
    assert {Path(name).name for name in val} <= {Path(name).name for name in listed(moved, "val")}


def test_a_fraction_that_leaves_a_split_empty_says_so(spec, touch):
    touch("images/a.jpg")
    spec = replace(spec, val_fraction=0.5)
    (empty,) = [split for split in ("train", "val") if not has_images(spec, split)]
    with pytest.raises(UserError, match=f"'val: 0.5' leaves '{empty}' none of the 1 image"):
        open_split(spec, empty)


@pytest.mark.parametrize("fraction", [1e-9, 0.2, 0.8, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_fraction_of_few_images_leaves_each_split_one(fraction, count, spec, touch):
    touch(*(f"images/{number}.jpg" for number in range(count)), "more/x.jpg")
    spec = replace(entries(spec, "images", "more"), val_fraction=fraction)
    train, val = listed(spec, "train"), listed(spec, "val")
    assert train
    assert val
    assert sorted(train + val) == sorted(listed(replace(spec, val_fraction=0.0)))
    if fraction == 1e-9:
        assert len(val) == 1
    if fraction == 1 - 1e-9:
        assert len(train) == 1


def test_files_of_one_name_are_on_one_side_of_a_fraction(spec, touch):
    touch("images/a/x.jpg", "images/b/x.jpg")
    sides = [has_images(replace(spec, val_fraction=0.5), split) for split in ("train", "val")]
    assert sorted(sides) == [False, True]


def has_images(spec: DatasetSpec, split: str) -> bool:
    try:
        return bool(open_split(spec, split))
    except UserError:
        return False


# ---- VOC


def write_voc(path: Path, *objects: str, filename: str = "", size: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>8</xmax><ymax>9</ymax></bndbox>"
    inner = "".join(f"<object><name>{name}</name>{box}</object>" for name in objects)
    path.write_text(f"<annotation><filename>{filename}</filename>{size}{inner}</annotation>")


@pytest.mark.parametrize("entry", ["ImageSets/Main/train.txt", "ImageSets/train.txt"])
def test_a_voc_list_names_ids_with_files_two_levels_up(entry, spec, touch):
    touch("JPEGImages/2007_000032.jpg", "JPEGImages/b.c.PNG", "JPEGImages/unlisted.jpg")
    write_voc(spec.root / "Annotations/2007_000032.xml", "a")
    (spec.root / entry).parent.mkdir(parents=True)
    (spec.root / entry).write_text("2007_000032\r\nb.c\n\ngone\n")
    spec = entries(spec, entry)
    (source,) = open_split(spec, "train")
    assert isinstance(source, VocSource)
    assert below(spec, source.images) == [f"JPEGImages/{name}" for name in ("2007_000032.jpg", "b.c.PNG", "gone.jpg")]
    assert below(spec, source.label_files) == [f"Annotations/{name}.xml" for name in ("2007_000032", "b.c", "gone")]
    assert source.read("a").rows.image_of.tolist() == [0]
    assert problems(spec) == [("Annotations/b.c.xml", NO_ANNOTATION), ("Annotations/gone.xml", NO_ANNOTATION)]


def test_voc_files_in_capitals_are_read(spec, touch):
    touch("JPEGImages/A.JPG", "JPEGImages/b.jpg", "ImageSets/Main/x")
    write_voc(spec.root / "Annotations/A.XML", "a")
    write_voc(spec.root / "Annotations/b.xml", "a")
    (spec.root / "ImageSets/Main/train.txt").write_text("A\nb\n")
    for entry in ("ImageSets/Main/train.txt", "Annotations"):
        assert listed(entries(spec, entry)) == ["JPEGImages/A.JPG", "JPEGImages/b.jpg"]
        assert labels_of(entries(spec, entry)) == ["Annotations/A.XML", "Annotations/b.xml"]
        assert problems(entries(spec, entry)) == []


def test_a_voc_list_of_one_class_has_flags_behind_its_ids(spec, touch):
    touch(
        "JPEGImages/0001.jpg", "JPEGImages/0002.jpg", "ImageSets/Main/x", "Annotations/0001.xml", "Annotations/0002.xml"
    )
    (spec.root / "ImageSets/Main/cat_train.txt").write_text("0001 -1\n0002  1\n")
    spec = entries(spec, "ImageSets/Main/cat_train.txt")
    assert listed(spec) == ["JPEGImages/0001.jpg", "JPEGImages/0002.jpg"]
    assert problems(spec) == []


def test_a_list_of_image_paths_in_imagesets_is_one_of_paths(spec, touch):
    touch("JPEGImages/0001.jpg", "Annotations/0001.xml")
    (spec.root / "ImageSets/Main").mkdir(parents=True)
    (spec.root / "ImageSets/Main/train.txt").write_text("JPEGImages/0001.jpg\n")
    (source,) = open_split(entries(spec, "ImageSets/Main/train.txt"), "train")
    assert isinstance(source, TextSource)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("x", "x"), ("Annotations", "JPEGImages"), ("annotations", "images"), ("Annotations/deep", "JPEGImages/deep")],
)
def test_a_folder_of_voc_files_finds_its_images(annotations, images, spec, touch):
    touch(f"{images}/a.jpg", f"{images}/b.JPEG", f"{images}/old name.png")
    for stem in ("a", "b"):
        write_voc(spec.root / annotations / f"{stem}.xml", "a")
    write_voc(spec.root / annotations / "c.xml", filename="old name.png")
    write_voc(spec.root / annotations / "d.xml", filename=r"C:\gone.png")
    (source,) = open_split(entries(spec, annotations.split("/")[0]), "train")
    assert isinstance(source, VocSource)
    expected = [f"{images}/{name}" for name in ("a.jpg", "b.JPEG", "old name.png", "d.jpg")]
    assert below(spec, source.images) == expected
    assert source.read("a").rows.image_of.tolist() == [0, 1]


def test_images_among_voc_files_without_one_are_background(spec, touch):
    touch("train/a.jpg", "train/b.jpg", "train/c.jpg")
    write_voc(spec.root / "train/b.xml", "a")
    (source,) = open_split(entries(spec, "train"), "train")
    assert sorted(below(spec, source.images)) == ["train/a.jpg", "train/b.jpg", "train/c.jpg"]
    labels = source.read("a")
    assert [source.images[image] for image in labels.rows.image_of] == [str(spec.root / "train/b.jpg")]
    assert labels.findings == ()


@pytest.mark.parametrize("label", ["labels/b.txt", "images/b.txt"])
def test_text_labels_go_before_stray_xml(label, spec, touch):
    touch("images/a.jpg", "images/b.jpg", label)
    write_voc(spec.root / "images/a.xml", "a")
    (source,) = open_split(spec, "train")
    assert isinstance(source, TextSource)
    assert len(source.images) == 2


# ---- COCO


def write_coco(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))


@pytest.mark.parametrize(
    ("file", "name", "image"),
    [
        ("train/_annotations.coco.json", "a.jpg", "train/a.jpg"),
        ("train.json", "images/a.jpg", "images/a.jpg"),
        ("train.json", "a.jpg", "images/a.jpg"),
        ("train.json", "a.jpg", "images/train/a.jpg"),
        ("annotations/instances_train2017.json", "a.jpg", "train2017/a.jpg"),
        ("annotations/instances_train2017.json", "a.jpg", "images/train2017/a.jpg"),
        ("annotations/instances_default.json", "b/a.jpg", "images/b/a.jpg"),
        ("result.json", r"images\a.jpg", "images/a.jpg"),
        ("result.json", "../../label-studio/data/media/upload/1/a.jpg", "images/a.jpg"),
        ("result.json", r"C:\set\images\deep\a.jpg", "images/deep/a.jpg"),
        ("a/b/x.json", "a.jpg", "a/a.jpg"),
    ],
)
def test_images_of_a_coco_file_are_found_where_they_usually_lie(file, name, image, spec, touch):
    touch(image)
    write_coco(spec.root / file, name)
    (source,) = open_split(entries(spec, file), "train")
    assert isinstance(source, CocoSource)
    assert below(spec, source.images) == [image]


def test_images_of_a_split_go_before_those_of_the_other(spec, touch):
    touch("images/train/a.jpg", "images/val/a.jpg", "images/train/b.jpg")
    for split in ("train", "val"):
        write_coco(spec.root / f"annotations/{split}.json", "a.jpg")
    spec = replace(entries(spec, "annotations/train.json"), val=(spec.root / "annotations/val.json",))
    assert [listed(spec, split) for split in ("train", "val")] == [["images/train/a.jpg"], ["images/val/a.jpg"]]


def test_entries_of_all_kinds_make_one_split(spec, touch):
    touch("images/a.jpg", "more/b.jpg", "coco/c.jpg", "JPEGImages/d.jpg", "voc/e.jpg")
    (spec.root / "list.txt").write_text("more/b.jpg\n")
    write_coco(spec.root / "coco/x.json", "c.jpg")
    write_voc(spec.root / "Annotations/d.xml", "a")
    write_voc(spec.root / "voc/e.xml", "a")
    (spec.root / "ImageSets/Main").mkdir(parents=True)
    (spec.root / "ImageSets/Main/train.txt").write_text("d\n")
    spec = entries(spec, "images", "list.txt", "coco/x.json", "ImageSets/Main/train.txt", "voc")
    kinds = [type(source).__name__ for source in open_split(spec, "train")]
    assert kinds == ["TextSource", "TextSource", "CocoSource", "VocSource", "VocSource"]
    assert [Path(image).name for image in images_of(spec)] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert problems(spec) == []
    halves = replace(spec, val_fraction=0.68)
    assert sorted(listed(halves, "train") + listed(halves, "val")) == sorted(listed(spec))


# ---- findings of the listing


def test_an_image_of_two_entries_is_named_once(spec, touch):
    touch("images/a.jpg", "images/b.jpg")
    (spec.root / "more.txt").write_text("images/b.jpg\nimages/b.jpg\n")
    assert problems(entries(spec, "images", "more.txt")) == [("images/b.jpg", TWICE)]


def test_images_that_share_a_label_file_are_named(spec, touch):
    touch("images/a.jpg", "images/a.png", "images/b.jpg", "labels/a.txt", "labels/b.txt")
    assert problems(spec) == [("images/a.jpg", SHARED_LABELS), ("images/a.png", SHARED_LABELS)]


def test_label_files_without_an_image_are_named(spec, touch):
    touch("images/a.jpg", "labels/a.txt", "labels/gone.txt", "labels/classes.txt", "labels/README.dataset.txt")
    touch("labels/LOST.TXT", "labels/CLASSES.TXT")
    assert problems(spec) == [("labels/LOST.TXT", NO_IMAGE), ("labels/gone.txt", NO_IMAGE)]


def test_the_lists_of_a_data_set_are_no_labels_without_an_image(spec, touch):
    touch("a.jpg", "a.txt", "b.txt")
    (spec.root / "mine.txt").write_text("a.jpg\n")
    assert problems(entries(spec, "mine.txt")) == [("b.txt", NO_IMAGE)]


def test_a_list_of_some_images_leaves_the_labels_of_the_others_alone(spec, touch):
    touch("images/a.jpg", "images/b.jpg", "labels/a.txt", "labels/b.txt")
    (spec.root / "train.txt").write_text("images/a.jpg\n")
    assert problems(entries(spec, "train.txt")) == []


def test_an_entry_without_images_is_named(spec, touch):
    touch("images/a.jpg", "bare/x")
    assert problems(entries(spec, "bare", "images")) == [("bare", EMPTY_ENTRY)]


def test_photos_that_opencv_cannot_read_are_named_once(spec, touch):
    touch("images/a.jpg", "images/IMG_1.HEIC", "images/deep/b.nef", "images/._c.heic", "labels/IMG_1.txt")
    touch("images/both.CR2", "images/both.JPG", "labels/deep/x")
    lost = [("images/IMG_1.HEIC", FOREIGN_PHOTO), ("images/deep/b.nef", FOREIGN_PHOTO)]
    assert problems(spec) == lost
    halves = replace(spec, val_fraction=0.5)
    assert problems(halves, "train") + problems(halves, "val") == lost
    assert problems(entries(spec, "images/deep", "images")) == [("images/deep", EMPTY_ENTRY), lost[1], *lost]


def test_a_folder_of_photos_that_opencv_cannot_read_says_so(spec, touch):
    touch("images/IMG_1.HEIC", "images/IMG_2.heic")
    with pytest.raises(UserError, match=r"none of the photos for 'train' can be read; convert them .*IMG_1\.HEIC"):
        open_split(spec, "train")


def test_an_entry_of_two_splits_is_named_in_the_later_one(spec, touch):
    touch("images/a.jpg")
    spec = replace(spec, val=spec.train, test=spec.train)
    assert problems(spec, "train") == []
    assert problems(spec, "val") == [("images", "entry of 'val' and of 'train'")]
    assert len(problems(spec, "test")) == 2


# ---- real data


def boxes_of(source: Path, split: str) -> tuple[dict[str, tuple], list]:
    """{image name: (classes, boxes)} of a split, and the findings."""
    spec, _ = read_dataset(str(source))
    found, findings = {}, []
    sources = open_split(spec, split)
    for part in sources:
        sizes = np.array([cv2.imread(image, cv2.IMREAD_GRAYSCALE).shape for image in part.images])
        labels = part.read(spec.names)
        rows, problems = checked(part, labels, sizes, np.ones(len(sizes), int))
        findings += [*labels.findings, *problems]
        for number, image in enumerate(part.images):
            mine = rows.image_of == number
            found[Path(image).name] = (rows.classes[mine], rows.boxes[mine])
    return found, findings + split_findings(spec, split, sources)


@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 205, 2805), ("val", 87, 1138), ("test", 72, 945)])
def test_the_same_boxes_in_two_formats(split, images, boxes, shared_datasets):
    text, text_findings = boxes_of(shared_datasets / "bccd/bccd.yaml", split)
    voc, voc_findings = boxes_of(shared_datasets / "bccd/bccd-voc.yaml", split)
    assert len(text) == images
    assert sum(len(classes) for classes, _ in text.values()) == boxes
    assert list(text) == list(voc)
    for name, (classes, rows) in text.items():
        assert classes.tolist() == voc[name][0].tolist()
        np.testing.assert_allclose(rows, voc[name][1], atol=1e-5)
    assert [item.problem for item in text_findings] == [item.problem for item in voc_findings]


@pytest.mark.parametrize(
    ("data", "split", "images", "boxes"),
    [
        ("road_signs/data.yaml", "train", 128, 179),
        ("chess/chess.yaml", "train", 58, 386),
        ("chess/chess.yaml", "val", 29, 376),
    ],
)
def test_exports_of_a_labelling_service_are_read_as_they_come(data, split, images, boxes, shared_datasets):
    found, findings = boxes_of(shared_datasets / data, split)
    assert (len(found), sum(len(classes) for classes, _ in found.values())) == (images, boxes)
    assert findings == []
    if data.startswith("chess") and split == "val":
        assert sum(len(classes) == 0 for classes, _ in found.values()) == 1


# ---- fuzzing

lines = st.one_of(
    st.sampled_from(
        ["images/a.jpg", r"C:\x\images\a.jpg", "/images/a.jpg", "a", "", "..", "/", "./", "a.jpg", ".jpg", "a 1"]
    ),
    st.text(max_size=12),
    st.text("/\\. ~ab:jpg", max_size=12),
)


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.lists(lines, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=40),
    )
)
def test_any_list_is_paths_or_a_user_error(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp() / "lists"
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "images/a.jpg").touch()
    (root / "any.txt").write_bytes(data)
    spec = DatasetSpec(source=root / "d.yaml", root=root, train=(root / "any.txt",), val=(), names=("a",))
    try:
        sources = open_split(spec, "train")
    except UserError as error:
        assert "\n" not in str(error)
        return
    for source in sources:
        assert len(source.label_files) == len(source.images)
        source.read("a")
    split_findings(spec, "train", sources)
