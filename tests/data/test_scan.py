import csv
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from utils.config import read_dataset
from utils.data import scan, scan_cache
from utils.data.findings import write_findings
from utils.data.labels import Finding
from utils.data.probe import probe
from utils.data.scan import open_dataset, refuse_findings, scan_dataset, scan_split
from utils.data.store import single_class
from utils.structures import LabelStore, RunError, UserError

ROW = "0 .5 .5 .5 .5\n"


@pytest.fixture
def small(make_dataset):
    return make_dataset({"train": {"a.png": ROW + "1 .2 .2 .1 .1\n", "b.jpg": None, "c.png": "", "d.png": ROW}})


@pytest.fixture
def no_decoding(monkeypatch):
    """Call it, and from then on a scan fails the test."""

    def forbid() -> None:
        monkeypatch.setattr(scan, "probe", lambda path: pytest.fail("scanned, though the cache was good"))

    return forbid


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the images that scans look at."""
    names, probe = [], scan.probe
    monkeypatch.setattr(scan, "probe", lambda path: names.append(Path(path).name) or probe(path))
    return names


@pytest.fixture
def in_processes(monkeypatch):
    """However few images there are, processes look at them, three at a time."""
    monkeypatch.setattr(scan, "_IN_PROCESSES", 1)
    monkeypatch.setattr(scan, "_PART", 3)
    monkeypatch.setattr(scan, "usable_cores", lambda: 2)


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def counts_of(report):
    return {name: value for name, value in vars(report).items() if name not in ("defects", "copies")}


def assert_same(first, second):
    (store, report), (other_store, other_report) = first, second
    if report is not None:
        assert counts_of(report) == counts_of(other_report)
        assert list(report.findings) == list(other_report.findings)
    for name in (item.name for item in fields(LabelStore)):
        array = getattr(store, name)
        np.testing.assert_array_equal(array, getattr(other_store, name))
        assert array.dtype == getattr(other_store, name).dtype


# ---- report


def test_a_clean_split_is_counted(small):
    store, report = scan_split(small, "train")
    assert [Path(store.path(image)).name for image in range(4)] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert store.sizes.tolist() == [list(cv2.imread(store.path(image)).shape[:2]) for image in range(4)]
    assert np.diff(store.offsets).tolist() == [2, 0, 0, 1]
    assert report.lines() == ["train: 4 images, 3 boxes, 2 without boxes"]


def test_images_that_cannot_be_used_are_named_skipped_and_counted(small):
    folder = small.root / "images/train"
    (folder / "a.png").write_bytes(b"")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-300])
    (folder / "c.png").write_bytes(b"not an image")
    store, report = scan_split(small, "train")
    assert [Path(store.path(image)).name for image in range(len(store))] == ["d.png"]
    assert (report.images, report.skipped, report.background, report.boxes) == (1, 3, 0, 1)
    assert tuple(report.findings) == (
        Finding(file=str(folder / "a.png"), line=0, problem="empty file: image skipped"),
        Finding(file=str(folder / "b.jpg"), line=0, problem="truncated: image skipped"),
        Finding(file=str(folder / "c.png"), line=0, problem="not an image that OpenCV can decode: image skipped"),
    )
    assert report.lines() == [
        "train: 1 images, 1 boxes, 0 without boxes, 3 skipped",
        *(f"  {item.file}: {item.problem}" for item in report.findings),
    ]


def test_an_image_on_a_list_that_is_gone_is_named(small):
    (small.root / "train.txt").write_text("images/train/a.png\nimages/train/gone.png\n")
    _, report = scan_split(replace(small, train=(small.root / "train.txt",)), "train")
    (finding,) = report.findings
    assert finding.file == str(small.root / "images/train/gone.png")
    assert finding.problem == "No such file or directory: image skipped"


def test_many_findings_are_summed_up_on_screen_and_complete_in_the_file(make_dataset, tmp_path):
    spec = make_dataset({"train": {f"{number}.png": ROW + "0 1\n" + ROW for number in range(5)}})
    _, report = scan_split(spec, "train")
    assert len(report.findings) == 10
    lines = report.lines()
    problem = "2 values, expected 5 (class cx cy w h) or a polygon: dropped"
    assert lines[1].endswith(f"labels/train/0.txt:2: {problem} (and 4 more like it)")
    assert lines[2].endswith("labels/train/0.txt:3: duplicate row: dropped (and 4 more like it)")
    assert len(lines) == 3
    write_findings(tmp_path / "findings.csv", [report, report])
    with (tmp_path / "findings.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["split", "file", "line", "problem", "severity"]
    assert ["train", str(spec.root / "labels/train/0.txt"), "3", "duplicate row: dropped", "medium"] in rows
    assert len(rows) == 21


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_finding_on_a_name_that_is_not_utf8_can_be_printed_and_saved(make_dataset, tmp_path):
    spec = make_dataset({"train": {"a.png": ROW}})
    try:
        Path(spec.root / "images/train" / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for _ in range(2):  # scanned, then from the cache
        _, report = scan_split(spec, "train")
        assert "caf\N{REPLACEMENT CHARACTER}.png: empty file" in "\n".join(report.lines()).encode().decode()
        write_findings(tmp_path / "findings.csv", [report])


def test_progress_counts_up_to_the_number_of_images(small):
    seen = []

    @contextmanager
    def progress(total, text):
        seen.append((total, text))
        yield SimpleNamespace(update=lambda count: seen.append(count))

    scan_split(small, "train", progress=progress)
    assert seen[0] == (4, "Scanning train")
    assert sum(seen[1:]) == 4
    scan_split(small, "train", progress=progress)
    assert seen.count((4, "Scanning train")) == 1  # the cache needs none


def test_more_images_than_are_queued_at_a_time_keep_their_order(make_dataset, monkeypatch):
    spec = make_dataset({"train": {"0.png": None}})
    data = (spec.root / "images/train/0.png").read_bytes()
    for number in range(1, 700):
        (spec.root / f"images/train/{number}.png").write_bytes(data)
    seen = probe(spec.root / "images/train/0.png")
    monkeypatch.setattr(scan, "probe", lambda path: replace(seen, height=int(Path(path).stem) + 1))
    store, _ = scan_split(spec, "train")
    assert store.sizes[:, 0].tolist() == [int(Path(store.path(image)).stem) + 1 for image in range(700)]


@pytest.mark.parametrize("problem", ["none", "unusable", "class"])
def test_a_split_that_cannot_be_used_is_one_clear_line_and_leaves_no_cache(problem, make_dataset, home):
    spec = make_dataset({"train": {"a.png": "0 .5 .5 .1 .1\n3 .5 .5 .1 .1\n"}})
    image = spec.root / "images/train/a.png"
    if problem == "none":
        image.unlink()
    if problem == "unusable":
        image.write_bytes(b"x")
        (spec.root / "labels/train/a.txt").unlink()
    says = {
        "none": "no image found for 'train'",
        "unusable": f"none of the 1 images of 'train' can be read; first: {image}",
        "class": "labels/train/a.txt:2: class 3 does not exist",
    }[problem]
    with pytest.raises(UserError, match=says) as error:
        scan_split(spec, "train")
    assert "\n" not in str(error.value)
    assert not list(spec.root.glob(".*"))
    assert not list(home.rglob("*"))


def test_what_exif_turns_is_counted_and_no_finding(make_dataset):
    spec = make_dataset({"train": {"a.jpg": ROW, "b.jpg": ROW}})
    path = spec.root / "images/train/a.jpg"
    height, width = cv2.imread(str(path)).shape[:2]
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    segment = b"Exif\0\0" + tiff
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:])
    store, report = scan_split(spec, "train")
    assert store.sizes[0].tolist() == [width, height]
    np.testing.assert_allclose(store.boxes[0], np.array([0.25, 0.25, 0.75, 0.75]) * [height, width, height, width])
    assert not report.findings
    assert report.lines()[1:] == ["  images turned by EXIF, boxes are as they are shown: 1 of train"]
    refuse_findings(scan_dataset(spec, ["train"]))


def test_an_image_with_the_name_of_another_format_is_used_and_named(make_dataset):
    spec = make_dataset({"train": {"a.png": ROW, "b.jpg": ROW}})
    path = spec.root / "images/train/a.png"
    path.rename(path.with_suffix(".jpg"))
    _, report = scan_split(spec, "train")
    (finding,) = report.findings
    assert (finding.file, finding.problem) == (str(path.with_suffix(".jpg")), "is a PNG with the name .jpg")
    assert (report.images, report.boxes) == (2, 2)


def test_an_image_of_train_in_val_is_named_and_so_is_one_that_is_there_twice(make_dataset):
    spec = make_dataset({"train": {"a.png": ROW, "b.jpg": ROW}, "val": {"c.png": ROW, "d.jpg": ROW}})
    folder = spec.root / "images"
    (folder / "val/leak.png").write_bytes((folder / "train/a.png").read_bytes())
    (folder / "train/z.jpg").write_bytes((folder / "train/b.jpg").read_bytes())
    for name in ("c.png", "d.jpg"):
        image = cv2.imread(str(folder / "val" / name))
        cv2.imwrite(str(folder / "val" / name), 255 - image)
    scan = scan_dataset(spec, ["train", "val"])
    assert [(where.split("/")[-1], problem) for where, problem in found(scan.reports["train"])] == [
        ("z.jpg", f"is the same image as {folder / 'train/b.jpg'} of train")
    ]
    assert [(where.split("/")[-1], problem) for where, problem in found(scan.reports["val"])] == [
        ("leak.png", f"is the same image as {folder / 'train/a.png'} of train")
    ]
    lines = scan.lines(most_classes=3)
    assert lines[-2].endswith(f"val/leak.png: is the same image as {folder / 'train/a.png'} of train")  # the worse one
    assert not scan_split(spec, "val")[1].findings  # alone it has no fault


def found(report):
    return [(finding.file, finding.problem) for finding in report.findings]


def test_a_defect_that_is_mended_without_touching_a_listed_file_is_gone(make_dataset):
    spec = make_dataset({"train": {"a.png": ROW}})
    stray = spec.root / "labels/train/old.txt"
    stray.write_text(ROW)
    assert found(scan_split(spec, "train")[1]) == [(str(stray), "label file without an image")]
    stray.unlink()
    assert not scan_split(spec, "train")[1].findings


def test_a_photo_that_opencv_cannot_read_is_seen_though_its_folder_holds_no_image(make_dataset):
    spec = make_dataset({"train": {"deep/a.png": ROW}})
    (spec.root / "images/train/more").mkdir()
    assert not scan_split(spec, "train")[1].findings
    (spec.root / "images/train/more/IMG_1.HEIC").touch()
    assert [problem for _, problem in found(scan_split(spec, "train")[1])] == [
        "cannot be read: convert it to .jpg or .png: image skipped"
    ]


def test_strict_names_the_counts_and_where_all_findings_are(make_dataset):
    clean = make_dataset({"train": {"a.png": ROW}})
    refuse_findings(scan_dataset(clean, ["train"]))
    (clean.root / "labels/train/a.txt").write_text(ROW + ROW)
    dirty = scan_dataset(clean, ["train"])
    with pytest.raises(
        UserError, match=r"--strict: findings: 1 in train; .* -m utils\.data\.scan --data .*data\.yaml` "
    ) as e:
        refuse_findings(dirty)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"1 in train; all of them are in here/scan\.csv"):
        refuse_findings(dirty, listed=Path("here/scan.csv"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_named_pipes_among_the_files_keep_nobody_waiting(make_dataset):
    spec = make_dataset({"train": {"a.png": ROW, "b.png": None}})
    os.mkfifo(spec.root / "images/train/c.png")
    os.mkfifo(spec.root / "labels/train/b.txt")
    _, report = scan_split(spec, "train")
    assert (report.images, report.background) == (2, 1)
    assert found(report) == [(str(spec.root / "images/train/c.png"), "empty file: image skipped")]


# ---- damaged images


@pytest.fixture
def damage(make_dataset):
    """A data set of twelve JPEGs, of which 03 holds a stray marker and both have lost data."""
    spec = make_dataset({"train": {f"{number:02d}.jpg": ROW for number in range(12)}})
    rng = np.random.default_rng(0)
    for number in (3, 7):
        path = spec.root / f"images/train/{number:02d}.jpg"
        image = cv2.resize(rng.integers(0, 256, (20, 30, 3), np.uint8), (300, 200))
        data = bytearray(cv2.imencode(".jpg", image)[1].tobytes())
        start = len(data) // 2
        data[start : start + 8000] = b"\xff\xd3" if number == 3 else b""
        path.write_bytes(data)
    return spec


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_damage_that_libjpeg_alone_tells_is_a_finding_and_nothing_on_the_screen(how, damage, request, capfd):
    if how == "processes":
        request.getfixturevalue("in_processes")
    store, report = scan_split(damage, "train")
    assert len(store) == 12
    names = [(Path(finding.file).name, finding.problem) for finding in sorted(report.findings, key=str)]
    assert [name for name, _ in names] == ["03.jpg", "07.jpg"]
    for _, problem in names:
        assert problem.startswith("damaged (Corrupt JPEG data: ")
        assert problem.endswith("): kept as far as it can be read")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"as before")
    assert capfd.readouterr().err == "as before"


def test_what_others_write_to_standard_error_during_a_scan_appears_when_it_is_done(damage, monkeypatch, capfd):
    probe = scan.probe
    monkeypatch.setattr(scan, "probe", lambda path: os.write(2, b"a warning\n") and probe(path))
    scan_split(damage, "train")
    assert capfd.readouterr().err == "a warning\n" * 12


# ---- processes


def test_processes_see_what_threads_see(make_dataset, in_processes, tmp_path, monkeypatch):
    content = {f"{number:02d}.png": ROW + "0 2 2\n" * (number % 3 == 0) for number in range(11)}
    spec = make_dataset({"train": content})
    (spec.root / "images/train/04.png").write_bytes(b"")
    by_processes = scan_split(spec, "train", cache_dir=str(tmp_path / "one"))
    assert by_processes[1].skipped == 1 and len(by_processes[1].findings) == 5
    monkeypatch.setattr(scan, "_IN_PROCESSES", 10**9)
    by_threads = scan_split(spec, "train", cache_dir=str(tmp_path / "two"))
    assert_same((by_processes[0], None), (by_threads[0], None))
    assert counts_of(by_processes[1]) == counts_of(by_threads[1])
    assert sorted(found(by_processes[1])) == sorted(found(by_threads[1]))


def test_a_class_beyond_names_is_the_same_line_from_a_process(make_dataset, in_processes):
    spec = make_dataset({"train": {f"{number}.png": ("9" if number > 4 else "0") + ROW[1:] for number in range(9)}})
    with pytest.raises(UserError, match=r"labels/train/5\.txt:1: class 9 does not exist") as error:
        scan_split(spec, "train")
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_process_that_dies_ends_the_scan_and_names_the_images(make_dataset, in_processes, monkeypatch):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("a replaced function reaches forked processes only")
    spec = make_dataset({"train": {f"{number}.png": ROW for number in range(9)}})

    def die(path):
        if path.endswith("4.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return probe(path)

    monkeypatch.setattr(scan, "probe", die)
    with pytest.raises(RunError, match=r"killed by signal 9.* an image from .*3\.png to .*5\.png"):
        scan_split(spec, "train")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "method", [name for name in ("spawn", "forkserver") if name in multiprocessing.get_all_start_methods()]
)
def test_a_scan_works_however_processes_are_started(method, make_dataset, tmp_path):
    spec = make_dataset({"train": {f"{number}.png": ROW for number in range(7)}})
    (spec.root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [a]\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from utils.data import scan\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    scan._IN_PROCESSES, scan._PART, scan.usable_cores = 1, 3, lambda: 2\n"
        f"    spec = scan.open_dataset({str(spec.root / 'data.yaml')!r}, note=print)\n"
        "    print(scan.scan_split(spec, 'train')[1].lines())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(scan.__file__).parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.stdout, done.stderr) == ("['train: 7 images, 7 boxes, 0 without boxes']\n", "")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_all_processes_at_once_with_one_line(make_dataset, tmp_path):
    spec = make_dataset({"train": {f"{number}.png": ROW for number in range(9)}})
    (spec.root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [a]\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from utils.data import scan\n"
        "def slow(path):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    scan._IN_PROCESSES, scan._PART, scan.usable_cores, scan.probe = 1, 3, lambda: 2, slow\n"
        f"    sys.argv[1:] = ['--data', {str(spec.root / 'data.yaml')!r}]\n"
        "    sys.exit(scan.main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(scan.__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, script], env=environment, start_new_session=True, cwd=tmp_path, **pipes)
    try:
        if multiprocessing.get_start_method() != "fork":
            pytest.skip("a replaced function reaches forked processes only")
        assert process.stdout.readline().startswith("started")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, problems = process.communicate(timeout=100)
        assert (process.returncode, problems) == (130, "\npython -m utils.data.scan: interrupted\n")
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- cache


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_for_caches_is_the_only_place_they_go(there, small, home, tmp_path, no_decoding):
    folder = tmp_path / "caches/mine"
    if there:
        folder.mkdir(parents=True)
    before = files_of(small.root)
    first = scan_split(small, "train", cache_dir=str(folder))
    assert files_of(small.root) == before and not list(home.rglob("*"))
    assert [path.suffix for path in folder.iterdir()] == [".cache"]
    no_decoding()
    assert_same(first, scan_split(small, "train", cache_dir=str(folder)))


def test_what_a_scan_left_that_was_killed_while_it_wrote_its_cache_goes_with_the_next(small):
    half, others = (small.root / f"..data-{split}.cache.0123abcd" for split in ("train", "val"))
    for path in (half, others):
        path.write_bytes(b"YOLOPACK1")
    scan_split(small, "train")
    assert (half.exists(), others.exists()) == (False, True)


def test_a_folder_for_caches_that_cannot_be_is_a_mistake(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache-dir .*file/x: "):
        scan_split(small, "train", cache_dir=str(tmp_path / "file/x"))


def test_the_second_time_nothing_is_decoded_and_all_is_the_same(small, no_decoding):
    (small.root / "images/train/x.png").touch()
    (small.root / "labels/train/d.txt").write_text("0 2 2\n" + ROW)
    first = scan_split(small, "train")
    no_decoding()
    again = scan_split(small, "train")
    assert_same(first, again)
    assert again[1].findings
    assert not again[0].boxes.flags.writeable


def test_a_split_without_any_box_is_cached_too(make_dataset, no_decoding):
    spec = make_dataset({"train": {"a.png": None}})
    first = scan_split(spec, "train")
    no_decoding()
    assert_same(first, scan_split(spec, "train"))


def test_nothing_in_the_users_folder_changes_but_the_cache_file(small):
    before = files_of(small.root)
    scan_split(small, "train")
    scan_split(small, "train")
    after = files_of(small.root)
    assert {name: after[name] for name in before} == before
    assert [Path(name).name for name in after if name not in before] == [".data-train.cache"]


def change_a_label(spec):
    (spec.root / "labels/train/a.txt").write_text("0 .5 .5 .25 .25\n")
    return spec


def add_a_label(spec):
    (spec.root / "labels/train/b.txt").write_text(ROW)
    return spec


def add_a_label_in_capitals(spec):
    background = next(path for path in (spec.root / "images/train").iterdir() if not label_of(spec, path).exists())
    label_of(spec, background).with_suffix(".TXT").write_text(ROW)
    return spec


def label_of(spec, image):
    return (spec.root / "labels/train" / image.name).with_suffix(".txt")


def remove_a_label(spec):
    (spec.root / "labels/train/a.txt").unlink()
    return spec


def replace_an_image(spec):
    cv2.imwrite(str(spec.root / "images/train/a.png"), np.zeros((9, 9, 3), np.uint8))
    return spec


def touch_an_image(spec):
    os.utime(spec.root / "images/train/a.png", ns=(1, 1))
    return spec


def add_an_image(spec):
    cv2.imwrite(str(spec.root / "images/train/e.png"), np.zeros((9, 9, 3), np.uint8))
    return spec


def remove_an_image(spec):
    (spec.root / "images/train/a.png").unlink()
    return spec


def move_the_folder(spec):
    moved = spec.root.rename(spec.root.with_name("moved"))
    return replace(spec, source=moved / "data.yaml", root=moved, train=(moved / "images/train",))


def add_a_name(spec):
    return replace(spec, names=(*spec.names, "d"))


def damage_the_cache(spec):
    (spec.root / ".data-train.cache").write_bytes(b"YOLOPACK1\n" + b"\x10" * 8 + b"rubbish")
    return spec


def cut_the_cache(spec):
    cache = spec.root / ".data-train.cache"
    cache.write_bytes(cache.read_bytes()[:-700])
    return spec


def put_something_else_in_its_place(spec):
    (spec.root / ".data-train.cache").write_text("mine")
    return spec


def use_an_older_schema(spec):
    cache = spec.root / ".data-train.cache"
    cache.write_bytes(cache.read_bytes().replace(b'"boxes"', b'"rects"'))
    return spec


@pytest.mark.parametrize(
    "change",
    [
        change_a_label,
        add_a_label,
        add_a_label_in_capitals,
        remove_a_label,
        replace_an_image,
        touch_an_image,
        add_an_image,
        remove_an_image,
        move_the_folder,
        add_a_name,
        damage_the_cache,
        cut_the_cache,
        put_something_else_in_its_place,
        use_an_older_schema,
    ],
)
def test_any_change_is_seen_and_the_split_scanned_anew(change, small, decoded, no_decoding):
    scan_split(small, "train")
    decoded.clear()
    spec = change(small)
    store, report = scan_split(spec, "train")
    names = sorted(path.name for path in (spec.root / "images/train").iterdir())
    assert sorted(decoded) == names
    assert [Path(store.path(image)) for image in range(len(store))] == [
        spec.root / "images/train" / name for name in names
    ]
    assert report.images == len(names)
    no_decoding()
    assert_same((store, report), scan_split(spec, "train"))


@pytest.mark.parametrize("position", range(18, 500, 23))
def test_a_flipped_byte_in_the_head_of_the_cache_never_stops_a_run(position, small):
    scan_split(small, "train")
    cache = small.root / ".data-train.cache"
    data = bytearray(cache.read_bytes())
    data[position] ^= 0x15
    cache.write_bytes(data)
    scan_split(small, "train")


def test_splits_and_descriptions_have_caches_of_their_own(make_dataset, no_decoding):
    spec = make_dataset({"train": {"a.png": ROW}, "val": {"b.png": ROW}})
    other = replace(spec, source=spec.root / "other.yaml", names=("x",))
    wanted = [(spec, "train"), (spec, "val"), (other, "train")]
    first = [scan_split(*item) for item in wanted]
    no_decoding()
    for item, result in zip(wanted, first):
        assert_same(result, scan_split(*item))


def test_where_the_data_cannot_be_written_the_cache_goes_to_the_users_folder(small, home, monkeypatch, no_decoding):
    write = scan_cache.write_arrays

    def refuse(path, arrays, meta):
        if path.parent == small.root:
            raise PermissionError(13, "read-only file system")
        write(path, arrays, meta)

    monkeypatch.setattr(scan_cache, "write_arrays", refuse)
    before = files_of(small.root)
    first = scan_split(small, "train")
    assert files_of(small.root) == before
    (cache,) = [path for path in home.rglob("*") if path.is_file()]
    assert cache.parent == home / ".cache/yolo-trainer"
    no_decoding()
    assert_same(first, scan_split(small, "train"))


def test_where_no_cache_can_be_written_at_all_the_scan_still_works(small, home, monkeypatch, decoded):
    def refuse(path, arrays, meta):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(scan_cache, "write_arrays", refuse)
    assert_same(scan_split(small, "train"), scan_split(small, "train"))
    assert len(decoded) == 8


@pytest.fixture
def coco(make_dataset):
    """A data set whose labels are two COCO files, and the function that writes these."""
    spec = make_dataset({"train": {"a.png": None, "b.jpg": None}, "val": {"c.png": None}})

    def write(box=(4, 4, 8, 8)):
        for split, names in (("train", ["a.png", "b.jpg"]), ("val", ["c.png"])):
            images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
            boxes = [{"image_id": 0, "category_id": 7, "bbox": list(box)}]
            content = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "a"}]}
            (spec.root / f"{split}.json").write_text(json.dumps(content))

    write()
    return replace(spec, train=(spec.root / "train.json",), val=(spec.root / "val.json",)), write


def test_an_unchanged_coco_file_is_not_parsed_again(coco, no_decoding, monkeypatch):
    spec, _ = coco
    first = scan_split(spec, "train")
    assert first[1].boxes == 1
    no_decoding()
    monkeypatch.setattr(scan, "open_split", lambda *_: pytest.fail("opened"))
    assert_same(first, scan_split(spec, "train"))


def test_images_in_a_folder_that_had_none_beside_a_coco_file_are_seen(coco):
    spec, _ = coco
    (spec.root / "more").mkdir()
    spec = replace(spec, train=(*spec.train, spec.root / "more"))
    store, _ = scan_split(spec, "train")
    shutil.copyfile(store.path(0), spec.root / "more/new.png")
    assert len(scan_split(spec, "train")[0]) == len(store) + 1


def test_a_changed_coco_file_image_or_entry_is_seen(coco):
    spec, write = coco
    scan_split(spec, "train")
    write(box=(4, 4, 9, 9))
    assert scan_split(spec, "train")[0].boxes.tolist() == [[4, 4, 13, 13]]
    (spec.root / "images/train/a.png").write_bytes(b"")
    assert scan_split(spec, "train")[1].skipped == 1
    other = replace(spec, train=spec.val)
    assert scan_split(other, "train")[0].path(0).endswith("val/c.png")
    assert scan_split(replace(spec, train=(*spec.train, *spec.val)), "train")[1].images == 2
    with pytest.raises(UserError, match="category 'a' has boxes"):
        scan_split(replace(spec, names=("x",)), "train")


def test_an_image_of_a_coco_file_that_was_missing_is_seen_when_it_is_there(coco):
    spec, _ = coco
    image = spec.root / "images/train/b.jpg"
    image.rename(spec.root / "away")
    for _ in range(2):
        _, report = scan_split(spec, "train")
        assert found(report) == [(str(image), "No such file or directory: image skipped")]
    (spec.root / "away").rename(spec.root / "b.jpg")  # not where it was looked for, but as good
    assert not scan_split(spec, "train")[1].findings


def test_crowds_are_counted_by_themselves_and_notes_survive_the_cache(coco, no_decoding):
    spec, _ = coco
    for name, split in (("train.json", "train"), ("val.json", "val")):
        content = json.loads((spec.root / name).read_text())
        content["annotations"][0]["iscrowd"] = int(split == "train")
        content["categories"].append({"id": 9, "name": "unused"})
        (spec.root / name).write_text(json.dumps(content))
    first = scan_dataset(spec, ["train", "val"])
    counts = [(one.boxes, one.crowds, one.class_counts) for one in first.reports.values()]
    assert counts == [(0, 1, (0, 0, 0)), (1, 0, (1, 0, 0))]
    lines = first.lines(most_classes=3)
    assert "  no box to learn from in train: a (1 in val)" in lines
    assert lines[-3:] == [
        "  crowd regions, neither trained on nor counted: 1 of train",
        *(
            f"  {spec.root / name}: categories without boxes, which names lacks: unused"
            for name in ("train.json", "val.json")
        ),
    ]
    assert not scan_split(spec, "train")[1].findings  # a note is none
    no_decoding()
    assert scan_dataset(spec, ["train", "val"]).lines(most_classes=3) == lines


def test_a_root_that_is_not_there_is_not_made(small, home):
    spec = replace(small, root=small.root / "typo/deeper")
    scan_split(spec, "train")
    assert not (small.root / "typo").exists()
    assert [path.suffix for path in home.rglob("*") if path.is_file()] == [".cache"]


# ---- whole data sets


def test_bccd_is_as_its_readme_says_from_text_and_from_voc(shared_datasets, tmp_path):
    splits = ("train", "val", "test")
    opened = [read_dataset(str(shared_datasets / f"bccd/{name}.yaml")) for name in ("bccd", "bccd-voc")]
    for spec, notes in opened:
        assert not notes
        reports = scan_dataset(spec, splits, cache_dir=str(tmp_path)).reports
        assert [report.images for report in reports.values()] == [205, 87, 72]
        assert [report.boxes for report in reports.values()] == [2805, 1138, 945]
    text, voc = (scan_dataset(spec, splits, cache_dir=str(tmp_path)).stores for spec, _ in opened)
    for split in splits:
        np.testing.assert_allclose(text[split].boxes, voc[split].boxes, rtol=0, atol=1e-5)
        for name in ("classes", "offsets", "sizes", "digests"):
            np.testing.assert_array_equal(getattr(text[split], name), getattr(voc[split], name))


def test_a_roboflow_export_works_as_it_comes(shared_datasets, tmp_path):
    notes = []
    spec = open_dataset(str(shared_datasets / "road_signs/data.yaml"), note=notes.append)
    results = [scan_split(spec, split, cache_dir=str(tmp_path)) for split in ("train", "val", "test")]
    assert [len(store) for store, _ in results] == [128, 128, 128]
    assert sum(report.boxes for _, report in results) == 466
    assert len(set(np.concatenate([store.classes for store, _ in results]).tolist())) == 8
    assert len(spec.names) == 21
    assert all(store.sizes.tolist() == [[640, 640]] * 128 for store, _ in results)


def test_a_yaml_is_opened_and_scanned(make_dataset, capsys):
    root = make_dataset({"train": {"a.png": ROW}, "val": {"b.png": None}}).root
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\nproject: x\n")
    notes = []
    spec = open_dataset(str(root / "data.yaml"), note=notes.append)
    assert notes == ["data.yaml: keys that this trainer does not use: project"]
    assert scan_split(spec, "val")[1].lines() == ["val: 1 images, 0 boxes, 1 without boxes"]
    assert capsys.readouterr().out == ""


def test_the_embedded_data_set_is_drawn_where_its_yaml_says(tmp_path, monkeypatch):
    drawn = tmp_path / "elsewhere"  # a folder that cannot be written makes it draw in another place
    monkeypatch.setattr(scan, "ensure_shapes", lambda root: drawn)
    (tmp_path / "data.yaml").write_text(
        "path: here\ntrain: images/train\nval: images/val\nnames: [a]\nembedded: true\n"
    )
    notes = []
    spec = open_dataset(str(tmp_path / "data.yaml"), note=notes.append)
    assert (spec.root, spec.train, spec.val) == (drawn, (drawn / "images/train",), (drawn / "images/val",))
    assert notes == [f"drawing the embedded data set, once, in {tmp_path / 'here'}"]


def test_a_loader_process_that_is_not_forked_maps_the_labels(small, monkeypatch):
    store, _ = scan_split(small, "train")
    sent = pickle.dumps(store)
    assert len(sent) < 1000  # a path, whatever the number of labels
    received = pickle.loads(sent)
    assert_same((received, None), (store, None))
    change_key = replace(store, key="of another scan")
    with pytest.raises(UserError, match="scanned anew while it was in use"):
        pickle.loads(pickle.dumps(change_key))


def test_a_single_class_survives_the_way_to_a_process_that_is_not_forked(small):
    store, _ = scan_split(small, "train")
    assert store.classes.any()
    sent = pickle.dumps(single_class(store))
    assert len(sent) < 1000
    assert_same((pickle.loads(sent), None), (replace(store, classes=np.zeros_like(store.classes)), None))


def test_opencv_says_nothing_beside_the_finding(small, capfd):
    image = next(path for folder in small.train for path in sorted(folder.rglob("*")))
    image.with_suffix(".tif").write_bytes(b"II*\0 no tiff at all")
    _, report = scan_split(small, "train")
    assert report.skipped == 1
    assert capfd.readouterr() == ("", "")


def test_labels_in_pixels_stop_with_a_hint(make_dataset):
    spec = make_dataset({"train": {f"{number}.png": "0 30 30 20 20\n" for number in range(3)}})
    with pytest.raises(UserError, match=r"3 of 3 boxes of 'train' lie outside .*are these pixels\?"):
        scan_split(spec, "train")
