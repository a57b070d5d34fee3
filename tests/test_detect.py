"""`python detect.py` as a user meets it: what it leaves behind, what it says, and the mistakes it names."""

import errno
import os
import re
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import detect
import val
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data import encode
from utils.data.media import Medium
from utils.evaluate.detect_files import file_stems

RESULTS = Path("runs/detect/exp")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def best(trained, tmp_path) -> str:
    """Weights that are surer of what they see than those of so short a run: they find it at the usual threshold."""
    checkpoint = load_checkpoint(trained / "weights" / "best.pt")
    for head in ("model.10.m.0.bias", "model.10.m.1.bias"):
        logits = checkpoint["ema"][head].view(2, 7)  # of 2 anchors: box, objectness, 2 classes
        logits[:, 4] += 4.7
        logits[:, 5:] += 1
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    return "best.pt"


@pytest.fixture
def photos(trained, tmp_path) -> Path:
    """A folder of four images with something to find."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in (trained.parent / "set/images/val").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def command(best, cli):
    """`command("--source", ...)` -> exit code, standard output, standard error."""
    return lambda *flags: cli(detect, "--weights", best, "--device", "cpu", *map(str, flags))


def film(path: Path, images: list[Path], *, frames: int, size=(64, 64), rate=12.5) -> Path:
    """A video that shows the images in turn."""
    code = {".mp4": "mp4v", ".avi": "MJPG"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), rate, size)
    if not writer.isOpened():
        pytest.skip(f"this OpenCV writes no {path.suffix}")
    for number in range(frames):
        writer.write(cv2.resize(cv2.imread(str(images[number % len(images)])), size))
    writer.release()
    return path


def frames_of(path: Path) -> tuple[int, float]:
    """How many a player shows, and how fast."""
    capture = cv2.VideoCapture(str(path))
    rate, count = capture.get(cv2.CAP_PROP_FPS), 0
    while capture.read()[0]:
        count += 1
    return count, rate


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.loadtxt(path, ndmin=2) for path in sorted(folder.glob("labels/*.txt"))}


# ---- results ------------------------------------------------------------------------------------------------------


def test_a_folder_of_images(command, photos):
    code, output, problems = command("--source", photos, "--save-txt", "--save-conf", "--save-crop")
    assert (code, problems) == (0, "")
    lines = output.splitlines()
    assert re.match(r"best\.pt: 2 classes, 64 px, CPU", lines[0])
    assert [line.split(":")[0] for line in lines[1:5]] == ["0.png", "1.png", "2.png", "3.png"]
    assert re.match(r"4 images, \d+ boxes: \d+ (blue|red), ", lines[5])
    assert re.match(r"Per image: [\d.]+ ms waiting for pixels, [\d.]+ ms network, [\d.]+ ms NMS at 64 px", lines[6])
    boxes = int(re.search(r"(\d+) boxes", lines[5])[1])
    files = len(list(RESULTS.glob("labels/*.txt")))
    assert lines[7:] == [
        f"Label files of {files} of 4 images: {RESULTS}/labels",
        f"Crops of {boxes} boxes: {RESULTS}/crops",
        f"Results: {RESULTS}",
    ]
    for path in photos.iterdir():
        drawn, source = cv2.imread(str(RESULTS / path.name)), cv2.imread(str(path))
        assert drawn.shape == source.shape
        assert (drawn != source).any() == ((RESULTS / f"labels/{path.stem}.txt").exists())
    found = labels(RESULTS)
    assert sum(map(len, found.values())) == boxes > 1
    crops = {path.relative_to(RESULTS / "crops").as_posix() for path in RESULTS.glob("crops/*/*")}
    expected = {
        f"{('blue', 'red')[int(row[0])]}/{name[:-4]}-{number}.jpg"
        for name, rows in found.items()
        for number, row in enumerate(rows, 1)
    }
    assert crops == expected


def test_views_and_rivals_count_where_they_are_asked_for(command, photos):
    boxes = {}
    for name in ("usual", "augment", "agnostic"):
        flags = ["--nosave", "--save-txt", "--name", name, "--conf-thres", "0.02", *([f"--{name}"] * (name != "usual"))]
        assert command("--source", photos, *flags)[0] == 0
        boxes[name] = np.concatenate([*labels(Path("runs/detect", name)).values()])
    assert len(boxes["agnostic"]) < len(boxes["usual"])
    assert boxes["augment"].shape != boxes["usual"].shape or (boxes["augment"] != boxes["usual"]).any()


@pytest.mark.parametrize("kind", ["labels", "crops"])
def test_labels_and_crops_of_an_earlier_run_are_neither_replaced_nor_joined(command, photos, kind):
    flags = ["--source", photos, "--exist-ok", "--nosave", {"labels": "--save-txt", "crops": "--save-crop"}[kind]]
    command(*flags)
    (RESULTS / kind / "mine.txt").write_text("by hand")
    before = {path: path.read_bytes() for path in RESULTS.rglob("*") if path.is_file()}
    code, output, problems = command(*flags, "--conf-thres", "1")
    assert (code, output) == (2, "")
    assert problems == (
        f"detect.py: error: --exist-ok: {RESULTS / kind} is there already, and may have been edited; remove it or "
        "choose another --name\n"
    )
    assert {path: path.read_bytes() for path in RESULTS.rglob("*") if path.is_file()} == before


def test_pictures_of_an_earlier_run_are_replaced(command, photos):
    RESULTS.mkdir(parents=True)
    (RESULTS / "0.png").write_bytes(b"old")
    assert command("--source", photos, "--exist-ok")[0] == 0
    assert cv2.imread(str(RESULTS / "0.png")).shape == cv2.imread(str(photos / "0.png")).shape


def test_folders_below_are_told_of(command, photos):
    for name in ("a", "b/c", ".hidden"):
        (photos / name).mkdir(parents=True)
    (photos / "a/deep.png").write_bytes((photos / "0.png").read_bytes())
    Path("list.txt").write_text("photos/a\nphotos/b\n")
    code, output, _ = command("--source", "photos", "--nosave")
    assert code == 0 and "4 images" in output
    assert output.count("warning: 2 subfolders are not searched: --source 'photos/**/*' takes them\n") == 1
    code, output, _ = command("--source", "photos/**/*", "--nosave")
    assert code == 0 and "5 images" in output and "searched" not in output
    code, output, _ = command("--source", "list.txt", "--nosave")
    assert code == 0 and "1 subfolder is not searched: --source 'photos/b/**/*' takes it\n" in output
    assert "nothing there" not in output


def test_a_crop_is_what_its_box_holds(command, photos):
    command("--source", photos / "0.png", "--save-txt", "--save-crop")
    kind, cx, cy, w, h = labels(RESULTS)["0.txt"][0]
    crop = cv2.imread(str(RESULTS / "crops" / ("blue", "red")[int(kind)] / "0-1.jpg"))
    x1, y1, x2, y2 = ((cx - w / 2) * 64, (cy - h / 2) * 64, (cx + w / 2) * 64, (cy + h / 2) * 64)
    rows, columns = (slice(int(np.floor(low)), int(np.ceil(high))) for low, high in ((y1, y2), (x1, x2)))
    source = cv2.imread(str(photos / "0.png"))[rows, columns]
    assert crop.shape == source.shape
    assert np.abs(crop.astype(int) - source).mean() < 12  # JPEG


def test_nosave_leaves_no_pictures_and_nothing_to_save_no_folder(command, photos):
    code, output, _ = command("--source", photos, "--nosave")
    assert code == 0 and not Path("runs").exists()
    assert "none kept (--nosave)" in output
    command("--source", photos, "--nosave", "--save-txt")
    assert {path.name for path in RESULTS.iterdir()} == {"labels"}


def test_boxes_equal_those_of_val_on_images_of_many_shapes(trained, best, command, photos):
    same = ["--conf-thres", "0.25", "--iou-thres", "0.45", "--max-det", "1000", "--save-txt", "--save-conf"]
    val.run(
        weights=best, device="cpu", workers=0, noplots=True, conf_thres=0.25, iou_thres=0.45, max_det=1000,
        save_txt=True, save_conf=True,
    )  # fmt: skip
    assert command("--source", trained.parent / "set/images/val", *same)[0] == 0
    assert_same_boxes(labels(RESULTS), labels(Path("runs/val/exp")))


def test_boxes_equal_those_of_val_on_photographs(best, cli, shared_datasets, tmp_path):
    """A network that was trained on something else says nonsense, and the same nonsense."""
    content = f"path: {shared_datasets / 'bccd'}\ntrain: images/train\nval: images/test\nnames: [a, b]\n"
    (tmp_path / "lied.yaml").write_text(content)
    weak = ["--conf-thres", "0.02", "--imgsz", "128", "--save-txt", "--save-conf", "--device", "cpu"]
    source = shared_datasets / "bccd/images/test"
    assert cli(detect, "--weights", best, "--source", str(source), *weak, "--max-det", "300", "--nosave")[0] == 0
    (tmp_path / "set/labels").mkdir(parents=True)
    (tmp_path / "set/images").symlink_to(source)
    (tmp_path / "lied.yaml").write_text("path: set\ntrain: images\nval: images\nnames: [a, b]\n")
    flags = ["--data", str(tmp_path / "lied.yaml"), "--iou-thres", "0.45", "--workers", "0", "--noplots"]
    assert cli(val, "--weights", best, *flags, *weak, "--cache-dir", str(tmp_path))[0] == 0
    assert_same_boxes(labels(RESULTS), labels(Path("runs/val/exp")), size=(640, 480))


def assert_same_boxes(one: dict[str, np.ndarray], other: dict[str, np.ndarray], size=(64, 64)) -> None:
    assert one.keys() == other.keys() and len(one) > 2
    for name, rows in one.items():
        assert (rows[:, 0] == other[name][:, 0]).all()
        assert np.abs((rows - other[name])[:, 1:5] * [*size, *size]).max() < 1e-3
        assert np.abs(rows - other[name])[:, 5].max() < 1e-5


def test_inputs_of_one_name_do_not_overwrite_each_other(command, photos):
    (photos / "sub").mkdir()
    (photos / "0.png").rename(photos / "sub/1.png")
    cv2.imwrite(str(photos / "1.jpg"), cv2.imread(str(photos / "1.png")))
    code, output, _ = command("--source", "photos/**/*", "--save-txt")
    assert code == 0
    assert {path.name for path in RESULTS.iterdir()} == {"1.jpg", "1-2.png", "1-3.png", "2.png", "3.png", "labels"}
    assert (cv2.imread(str(RESULTS / "1-3.png")).shape) == cv2.imread(str(photos / "sub/1.png")).shape
    assert "note: inputs of one name: the results of photos/1.png are called 1-2, and 1 more likewise" in output
    assert "photos/sub/1.png (1-3): " in output


def test_names_of_results_do_not_meet_those_of_frames():
    paths = ["clip_3.jpg", "clip.mp4", "Clip.avi", "clip.jpg", "a/clip.jpg", "clip_x.jpg"]
    found = [Medium(path=path, is_video=path.endswith(("mp4", "avi"))) for path in paths]
    assert file_stems(found) == ["clip_3-2", "clip", "Clip-2", "clip-3", "clip-4", "clip_x"]


def test_thousands_of_inputs_of_one_name():
    found = [Medium(path=f"{number}/a.jpg", is_video=False) for number in range(20_000)]
    assert file_stems(found)[::19_999] == ["a", "a-20000"]


def test_a_reader_of_the_output_that_has_enough(best, start, photos):
    process = start("detect.py", "--weights", best, "--source", str(photos), "--device", "cpu")
    process.stdout.close()
    problems = process.stderr.read()
    assert (process.wait(60), problems) == (141, b"")


def test_a_list_takes_paths_folders_and_globs(command, photos):
    """Seen from the list or from the working directory, and from where it was written on another machine."""
    (photos / "list.txt").write_text("\ufeff0.png\nphotos/1.png\n\n# not this\n/other/machine/2.png\n[3].png\n")
    code, output, _ = command("--source", photos / "list.txt")
    assert code == 0
    assert {path.name for path in RESULTS.iterdir()} == {"0.png", "1.png", "2.png", "3.png"}
    (photos / "list.txt").write_text("0.png\nnone.png\n")
    code, output, _ = command("--source", "photos/list.txt")
    assert code == 0
    assert "warning: photos/list.txt, line 2: none.png: nothing there; left out" in output


def test_orientation_is_honoured(command, photos):
    """The picture is upright, and boxes are in its pixels."""
    upright = np.full((40, 80, 3), 90, np.uint8)
    cv2.rectangle(upright, (10, 12), (34, 38), (0, 0, 255), -1)
    _, data = cv2.imencode(".jpg", cv2.rotate(upright, cv2.ROTATE_90_COUNTERCLOCKWISE))
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    raw = data.tobytes()
    Path("turned.jpg").write_bytes(raw[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + raw[2:])
    assert command("--source", "turned.jpg")[0] == 0
    assert cv2.imread(str(RESULTS / "turned.jpg")).shape == (40, 80, 3)


def test_formats_that_are_seldom_written_become_png(command, photos):
    cv2.imwrite(str(photos / "gray.pgm"), cv2.imread(str(photos / "1.png"), 0))
    assert command("--source", photos / "gray.pgm")[0] == 0
    assert [path.name for path in RESULTS.iterdir()] == ["gray.png"]


def test_classes_and_threshold_choose_what_is_found(command, photos):
    command("--source", photos, "--save-txt", "--classes", "1")
    assert {int(row[0]) for rows in labels(RESULTS).values() for row in rows} == {1}
    code, output, _ = command("--source", photos, "--conf-thres", "1")
    assert code == 0 and ", 0 boxes\n" in output and "0.png: nothing found" in output


def test_many_images_have_a_summary_alone(command, photos):
    for number in range(30):
        (photos / f"{number}.png").write_bytes((photos / "0.png").read_bytes())
    code, output, _ = command("--source", photos, "--nosave")
    assert code == 0
    assert len(output.splitlines()) == 4 and "30 images" in output


def test_options_that_shape_the_pictures(command, photos):
    command("--source", photos / "0.png", "--name", "thin", "--line-thickness", "1")
    command("--source", photos / "0.png", "--name", "thick", "--line-thickness", "5")
    thin, thick = (cv2.imread(f"runs/detect/{name}/0.png") for name in ("thin", "thick"))
    source = cv2.imread(str(photos / "0.png"))
    assert (thick != source).sum() > 1.5 * (thin != source).sum() > 0


def test_names_of_classes_become_folders_on_any_system(best, cli, photos, tmp_path):
    checkpoint = load_checkpoint(Path(best))
    save_checkpoint(tmp_path / "odd.pt", checkpoint | {"names": ["../a:b", "../a?b"]})
    code, _, problems = cli(
        detect, "--weights", str(tmp_path / "odd.pt"), "--source", str(photos), "--save-crop", "--device", "cpu"
    )
    assert (code, problems) == (0, "")
    assert {path.name for path in (RESULTS / "crops").iterdir()} == {"_a_b", "_a_b-2"}


# ---- videos -------------------------------------------------------------------------------------------------------


def test_images_and_videos_in_one_folder(command, photos):
    images = sorted(photos.glob("*.png"))
    film(photos / "clip.mp4", images, frames=21)
    film(photos / "short.avi", images, frames=3, rate=5)
    code, output, problems = command("--source", photos, "--save-txt", "--save-crop")
    assert (code, problems) == (0, "")
    assert frames_of(RESULTS / "clip.mp4") == (21, 12.5)
    assert frames_of(RESULTS / "short.mp4") == (3, 5.0)
    assert not list(RESULTS.glob(".*"))
    assert "clip.mp4: 21 frames, " in output
    assert "4 images and 24 frames of 2 videos" in output
    assert f"Label files of {len(labels(RESULTS))} of 4 images and 24 frames: " in output
    of_frames = [name for name in labels(RESULTS) if name.startswith("clip_")]
    assert len(of_frames) > 4
    assert {int(name[5:-4]) for name in of_frames} <= set(range(1, 22))
    assert list(RESULTS.glob("crops/*/clip_*-1.jpg"))


def test_a_frame_is_an_image_like_any_other(command, photos):
    film(photos / "clip.avi", sorted(photos.glob("*.png")), frames=4)
    capture = cv2.VideoCapture(str(photos / "clip.avi"))
    (photos / "frames").mkdir()
    for number in range(1, 5):
        cv2.imwrite(str(photos / f"frames/clip_{number}.png"), capture.read()[1])
    command("--source", photos / "clip.avi", "--save-txt", "--save-conf", "--name", "video")
    command("--source", photos / "frames", "--save-txt", "--save-conf", "--name", "images")
    assert_same_boxes(labels(Path("runs/detect/video")), labels(Path("runs/detect/images")))


def test_a_video_that_ends_early_is_told(command, photos):
    whole = film(photos / "clip.avi", sorted(photos.glob("*.png")), frames=40).read_bytes()
    (photos / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (photos / "text.mp4").write_text("no video")
    code, output, problems = command("--source", photos)
    assert (code, problems) == (0, "")
    assert re.search(r"warning: \S+cut\.avi: damaged or cut short: \d+ of 40 frames could be read\n", output)
    assert re.search(r"warning: \S+text\.mp4: not a video that OpenCV can decode; left out\n", output)
    assert "1 could not be read" in output
    assert 0 < frames_of(RESULTS / "cut.mp4")[0] < 40


def test_where_no_encoder_is_there_everything_else_works(command, photos, monkeypatch):
    film(photos / "clip.avi", sorted(photos.glob("*.png")), frames=4)
    monkeypatch.setattr(encode, "_VIDEO_KINDS", ((".mp4", "nope"),))
    code, output, problems = command("--source", photos, "--save-txt")
    assert (code, problems) == (0, "")
    assert output.count("warning: this OpenCV has no encoder for videos: none is written") == 1
    assert not list(RESULTS.glob("*clip*"))
    assert any(name.startswith("clip_") for name in labels(RESULTS))


def test_motion_jpeg_stands_in_for_mpeg4(command, photos, monkeypatch):
    film(photos / "clip.avi", sorted(photos.glob("*.png")), frames=4)
    monkeypatch.setattr(encode, "_VIDEO_KINDS", ((".mp4", "nope"), (".avi", "MJPG")))
    assert command("--source", photos / "clip.avi")[0] == 0
    assert [path.name for path in RESULTS.iterdir()] == ["clip.avi"]
    assert frames_of(RESULTS / "clip.avi")[0] == 4


# ---- mistakes -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "no weights": (["--source", "photos"], ["--weights is missing"]),
    "no source": (["--weights", "BEST"], ["--source is missing"]),
    "weights not there": (["--weights", "none.pt", "--source", "photos"], ["checkpoint not found: none.pt"]),
    "weights that are none": (["--weights", "photos/0.png", "--source", "photos"], ["photos/0.png is damaged"]),
    "source not there": (["--weights", "BEST", "--source", "photo"], ["--source photo: not found", "mean 'photos'"]),
    "empty folder": (["--weights", "BEST", "--source", "empty"], ["--source empty: no image or video in this folder"]),
    "folders below": (["--weights", "BEST", "--source", "."], ["no image", "not searched: --source './**/*'"]),
    "a path alone": (["--weights", "BEST", "photos"], ["unknown argument 'photos'; did you mean '--source photos'?"]),
    "two sizes": (["--weights", "BEST", "--source", "photos", "--imgsz", "64", "64"], ["unknown argument '64'\n"]),
    "huge": (["--weights", "BEST", "--source", "photos", "--imgsz", "100000"], ["should be 16384 or less"]),
    "class by name": (["--weights", "BEST", "--source", "photos", "--classes", "red"], ["'red' should be a whole"]),
    "glob": (["--weights", "BEST", "--source", "photos/*.gif"], ["--source photos/*.gif: no image or video matches"]),
    "expanded glob": (["--weights", "BEST", "--source", "photos/0.png", "photos/1.png"], ["should be in quotes"]),
    "list of nothing": (["--weights", "BEST", "--source", "list.txt"], ["none of its 2 entries is there", "x.jpg"]),
    "empty list": (["--weights", "BEST", "--source", "empty.txt"], ["lists nothing"]),
    "list of bytes": (["--weights", "BEST", "--source", "bytes.txt"], ["is no text"]),
    "URL": (["--weights", "BEST", "--source", "https://a.b/c.jpg"], ["URLs are not fetched; download it first"]),
    "camera": (["--weights", "BEST", "--source", "0"], ["cameras are not supported"]),
    "foreign photos": (["--weights", "BEST", "--source", "heic"], ["none of its photos", "convert them", "a.heic"]),
    "class": (["--weights", "BEST", "--source", "photos", "--classes", "0", "99"], ["--classes 99", "1 (red)"]),
    "confidence": (["--weights", "BEST", "--source", "photos", "--conf-thres", "25"], ["--conf-thres 25", "0 and 1"]),
    "scores alone": (["--weights", "BEST", "--source", "photos", "--save-conf"], ["--save-conf", "--save-txt"]),
    "half on the CPU": (["--weights", "BEST", "--source", "photos", "--half", "--device", "cpu"], ["fp16", "CUDA"]),
    "file as project": (["--weights", "BEST", "--source", "photos", "--project", "list.txt"], ["is a file"]),
    "results over sources": (
        ["--weights", "BEST", "--source", "photos", "--project", ".", "--name", "photos", "--exist-ok"],
        ["--exist-ok", "photos/0.png", "choose another --name"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_no_folder(best, cli, photos, mistake):
    given, expected = MISTAKES[mistake]
    for folder in ("empty", "heic"):
        Path(folder).mkdir()
    Path("heic/a.heic").write_bytes(b"photo")
    Path("list.txt").write_text("x.jpg\ny.jpg\n")
    Path("empty.txt").write_text("\n")
    Path("bytes.txt").write_bytes(b"\0\1")
    before = {path: path.read_bytes() for path in photos.iterdir()}
    code, output, problems = cli(detect, *(best if one == "BEST" else one for one in given))
    assert code == 2
    assert problems.startswith("detect.py: error: ") and problems.count("\n") == 1
    assert all(part in problems for part in expected), problems
    assert "Traceback" not in output + problems
    assert not Path("runs").exists()
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_labels_of_a_data_set_are_not_replaced(command, photos):
    Path("set/labels").mkdir(parents=True)
    photos.rename("set/images")
    Path("set/labels/0.txt").write_text("true")
    flags = ("--project", ".", "--name", "set", "--exist-ok", "--nosave", "--save-txt")
    code, _, problems = command("--source", "set/images", *flags)
    assert code == 2 and "--exist-ok: set/images/0.png lies in set, " in problems
    assert Path("set/labels/0.txt").read_text() == "true"


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(command, photos):
    (photos / "0.png").write_bytes((photos / "0.png").read_bytes()[:100])
    (photos / "1.png").write_bytes(b"")
    (photos / "x.heic").write_bytes(b"photo")
    code, output, problems = command("--source", photos)
    assert (code, problems) == (0, "")
    warnings = [line for line in output.splitlines() if line.startswith("warning:")]
    assert [line.split("photos/")[1] for line in warnings] == [
        "x.heic: a photo that OpenCV cannot read; convert it to .jpg or .png; left out",
        "0.png: truncated; left out",
        "1.png: empty file; left out",
    ]
    assert "2 images, " in output and "; 2 could not be read" in output
    assert {path.name for path in RESULTS.iterdir()} == {"2.png", "3.png"}


@pytest.mark.parametrize("name", ["data.yaml", "found.json", "set.zip", "noname"])
def test_a_source_of_another_kind_is_told_what_kinds_there_are(command, name):
    Path(name).write_bytes(b"path: x\n" * 1000)
    code, _, problems = command("--source", name)
    assert code == 1
    assert problems == (
        f"detect.py: error: {name}: neither an image nor a video that OpenCV can decode; expected an image, a video, "
        "a folder of these, a glob in quotes such as 'photos/*.jpg', or a .txt list of paths\n"
    )
    assert not RESULTS.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_readable_is_an_error_and_no_folder(command, photos, count):
    for path in photos.iterdir():
        path.write_bytes(b"") if path.stem < str(count) else path.unlink()
    code, _, problems = command("--source", photos)
    assert code == 1
    assert problems.count("\n") == 1 and "0.png: empty file" in problems
    assert ("none of 2 could be read" in problems) == (count == 2)
    assert not RESULTS.exists()


def test_a_network_that_says_nonsense_is_named(best, cli, photos, tmp_path):
    checkpoint = load_checkpoint(Path(best))
    first = next(name for name, tensor in checkpoint["ema"].items() if tensor.is_floating_point())
    checkpoint["ema"][first].fill_(float("nan"))
    save_checkpoint(tmp_path / "nan.pt", checkpoint)
    code, output, _ = cli(detect, "--weights", str(tmp_path / "nan.pt"), "--source", str(photos), "--device", "cpu")
    assert code == 0
    assert "warning: 4 pictures, first 0.png: the network computed NaN or infinity" in output
    assert "the weights may be damaged" in output


def test_an_image_size_beyond_all_memory_is_one_line(command, photos, monkeypatch):
    def no_memory(*args, **kwargs):
        raise cv2.error("Failed to allocate 300000000000000 bytes")

    monkeypatch.setattr("utils.data.media.resized_to_base", no_memory)
    code, _, problems = command("--source", photos)
    assert code == 1
    assert re.fullmatch(r"detect\.py: error: out of memory: lower --batch-size .* or --imgsz .*\n", problems)


def test_a_full_disk_is_one_line(command, photos, monkeypatch):
    def full(path, write, *, lasting):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("utils.evaluate.detect_files.write_atomic", full)
    code, _, problems = command("--source", photos)
    assert code == 1
    assert re.fullmatch(r"detect\.py: error: No space left on device: \S+0\.png\n", problems)


def test_a_disk_that_a_video_fills_is_one_line(command, photos, monkeypatch):
    film(photos / "clip.avi", sorted(photos.glob("*.png")), frames=60)
    monkeypatch.setattr(encode, "_LEAST_FREE", 1 << 62)
    code, _, problems = command("--source", photos / "clip.avi")
    assert code == 1
    assert re.fullmatch(r"detect\.py: error: No space left on device: \S+clip\.mp4\n", problems)
    assert not list(RESULTS.glob(".*"))


def test_a_video_that_cannot_be_written_is_one_line_that_says_what_may_be_wrong(command, photos, monkeypatch):
    film(photos / "clip.avi", sorted(photos.glob("*.png")), frames=4)
    monkeypatch.setattr(encode, "_plays", lambda path: False)
    code, _, problems = command("--source", photos / "clip.avi", "--save-txt")
    assert code == 1
    assert re.fullmatch(
        r"detect\.py: error: \S+clip\.mp4: OpenCV could not write .* 64 x 64 px .* --nosave .*\n", problems
    )
    assert labels(RESULTS) and not list(RESULTS.glob("*clip*"))


def test_ctrl_c_leaves_whole_files(best, start, photos):
    images = sorted(photos.glob("*.png"))
    film(photos / "clip.avi", images, frames=20_000)
    process = start(
        "detect.py", "--weights", best, "--source", str(photos), "--device", "cpu", "--save-txt", "--batch-size", "1"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(RESULTS.glob("labels/clip_2*.txt")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 130, problems
    assert problems.decode().strip() == f"detect.py: interrupted; results so far: {RESULTS}"
    assert not list(RESULTS.glob(".*")) and not list(RESULTS.glob("labels/.*"))
    assert all(cv2.imread(str(RESULTS / path.name)) is not None for path in images)
    assert 0 < frames_of(RESULTS / "clip.mp4")[0] < 20_000


def test_from_python_it_returns_what_became_of_the_source(best, photos):
    summary = detect.run(weights=best, source=photos, device="cpu", save_txt=True)
    assert (summary.images, summary.frames, summary.unreadable, summary.folder) == (4, 0, (), RESULTS)
    assert sum(summary.boxes) == sum(map(len, labels(RESULTS).values()))
