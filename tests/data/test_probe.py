import io
import os
import shlex
import struct
import subprocess
import sys
from hashlib import blake2b

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.config import PROJECT_ROOT
from utils.data.images import ImageError, decode_image, quiet_opencv
from utils.data.probe import Probe, probe

SHAPES = ((40, 60), (64, 64), (57, 64), (64, 57), (8, 8), (7, 5), (1, 1), (1, 300), (123, 9), (480, 640))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with quiet_opencv():
        yield


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file of a name and returns its path."""

    def write(name: str, data: bytes):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def picture(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def encoded(suffix: str, image: np.ndarray, *how: int) -> bytes:
    written, data = cv2.imencode(suffix, image, how)
    assert written
    return data.tobytes()


def exif(orientation: int, order: str = ">") -> bytes:
    start = b"MM\0*" if order == ">" else b"II*\0"
    return start + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def with_exif(jpeg: bytes, tiff: bytes) -> bytes:
    payload = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def saved(image: Image.Image, kind: str, **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def same_as_decoded(path) -> Probe:
    """What `probe` says, after a check that decoding the file comes to the same."""
    seen = probe(path)
    try:
        assert (seen.height, seen.width) == decode_image(path).shape[:2]
        assert seen.problem is None
        assert seen.digest == int.from_bytes(blake2b(path.read_bytes(), digest_size=8).digest(), "little")
    except ImageError as error:
        assert seen == Probe(height=0, width=0, orientation=1, digest=0, problem=str(error), note=None)
    return seen


# ---- sizes


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm", ".gif", ".avif", ".jp2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_is_that_of_the_decoded_image(suffix, shape, file):
    try:
        data = encoded(suffix, picture(*shape))
    except (cv2.error, AssertionError):
        pytest.skip(f"this OpenCV writes no {suffix} of this size")
    seen = same_as_decoded(file(f"x{suffix}", data))
    assert (seen.height, seen.width, seen.orientation, seen.note) == (*shape, 1, None)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", "><")
def test_a_jpeg_turned_by_exif_has_the_size_it_is_shown_in(orientation, shape, order, file):
    data = with_exif(encoded(".jpg", picture(*shape)), exif(orientation, order))
    seen = same_as_decoded(file("x.jpg", data))
    assert (seen.height, seen.width) == (shape[::-1] if orientation in range(5, 9) else shape)
    assert seen.orientation == (orientation if orientation in range(1, 9) else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_turned_by_exif_have_the_size_that_opencv_gives_them(orientation, kind, file):
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = file(f"x.{kind.lower()}", saved(Image.fromarray(picture(40, 64)), kind, exif=tags))
    seen = same_as_decoded(path)
    turned = cv2.imread(str(path), cv2.IMREAD_COLOR)
    plain = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert seen.orientation == (1 if np.array_equal(turned, plain) else orientation)


def test_two_exif_blocks_are_for_opencv_to_choose_from(file):
    once = with_exif(encoded(".jpg", picture(40, 64)), exif(6))
    same_as_decoded(file("x.jpg", with_exif(once, exif(1))))
    same_as_decoded(file("y.jpg", with_exif(with_exif(encoded(".jpg", picture(40, 64)), exif(1)), exif(8))))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_of_every_colour_space(mode, progressive, file):
    image = Image.fromarray(picture(41, 66)).convert(mode)
    assert same_as_decoded(file("x.jpg", saved(image, "JPEG", progressive=progressive))).problem is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pngs_of_every_kind(mode, file):
    image = Image.fromarray(picture(41, 66)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(picture(41, 66, 1, np.uint16)[..., 0])
    assert same_as_decoded(file("x.png", saved(image, "PNG"))).problem is None


# ---- what is wrong


def test_what_cannot_be_used_is_said_as_decoding_says_it(tmp_path, file):
    (tmp_path / "folder.jpg").mkdir()
    paths = [tmp_path / "folder.jpg", tmp_path / "missing.jpg", file("empty.jpg", b""), file("page.jpg", b"<html>")]
    problems = [same_as_decoded(path).problem for path in paths]
    assert problems == [
        "Is a directory",
        "No such file or directory",
        "empty file",
        "not an image that OpenCV can decode",
    ]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm"])
def test_no_beginning_of_a_file_passes_for_the_whole(suffix, file):
    data = encoded(suffix, picture(40, 60))
    for length in [1, 3, 12, *np.linspace(20, len(data) - 1, 25).astype(int)]:
        assert same_as_decoded(file(f"x{suffix}", data[:length])).problem


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_judged_as_decoding_judges_it(data, tmp_path_factory):
    """Bytes changed or lost anywhere: `probe` may be faster than a decode, but never sees another image."""
    suffix = data.draw(st.sampled_from([".jpg", ".jpg", ".png", ".webp"]))
    content = bytearray(encoded(suffix, picture(*data.draw(st.sampled_from(SHAPES[:-1])))))
    if suffix == ".jpg" and data.draw(st.booleans()):
        content = bytearray(with_exif(bytes(content), exif(data.draw(st.integers(0, 9)))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(content), 700) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 20))]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(content)
    same_as_decoded(path)


@pytest.mark.parametrize(
    ("kind", "name", "note"),
    [
        (".png", "x.jpg", "is a PNG with the name .jpg"),
        (".jpg", "X.PNG", "is a JPEG with the name .png"),
        (".webp", "x.jpeg", "is a WebP with the name .jpeg"),
        (".bmp", "x.tif", "is a BMP with the name .tif"),
        (".jpg", "x.JPEG", None),
        (".jpg", "x.jfif", None),
        (".png", "x.y z", None),
        (".png", "x", None),
    ],
)
def test_a_name_that_says_another_format_is_noted(kind, name, note, file):
    assert same_as_decoded(file(name, encoded(kind, picture(9, 12)))).note == note


@pytest.mark.parametrize("name", ["a b.jpg", "a#b.jpg", "图像.jpg", "ы.JPG", "100%.jpg"])
def test_names_of_all_sorts(name, file):
    assert same_as_decoded(file(name, encoded(".jpg", picture(9, 12)))).height == 9


def test_copies_have_one_digest_and_others_have_others(file):
    data = encoded(".png", picture(9, 12))
    first, copy, other = (
        probe(file(name, content))
        for name, content in (("a.png", data), ("b.jpg", data), ("c.png", encoded(".png", picture(9, 13))))
    )
    assert first.digest == copy.digest != other.digest


def test_libraries_are_silenced_and_python_is_not():
    code = (
        "import os, sys; from utils.data.probe import silence_libraries; silence_libraries(); "
        "os.write(2, b'Corrupt JPEG data'); print('still here', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "still here\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_without_a_standard_error_the_file_that_has_its_number_is_left_alone(tmp_path):
    code = (
        "from utils.data.probe import overheard, silence_libraries\n"
        "file = open('x', 'wb', 0)\n"
        "assert file.fileno() == 2\n"
        "silence_libraries()\n"
        "with overheard() as heard:\n"
        "    file.write(b'mine')\n"
        "    print(heard.length(), heard.lines())\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = f"exec {shlex.quote(sys.executable)} run.py 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "0 []\n"
    assert (tmp_path / "x").read_bytes() == b"mine"
