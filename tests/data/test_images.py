import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.images import IMAGE_SUFFIXES, ImageError, base_image, base_scale, base_scales, base_shape, decode_image


@pytest.fixture(scope="module")
def picture(smooth_image):
    return smooth_image(np.random.default_rng(0), 40, 60)


def encoded(suffix: str, image: np.ndarray) -> bytes:
    written, data = cv2.imencode(suffix, image)
    assert written
    return data.tobytes()


def with_exif(jpeg: bytes, orientation: int, thumbnail: bytes = b"") -> bytes:
    """A JPEG with an EXIF segment: one tag, and a thumbnail where the second directory would lie."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    payload = b"Exif\0\0" + tiff + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


# ---- what cannot be used


def test_every_defect_of_a_file_has_its_own_words(tmp_path):
    cases = {"missing.jpg": None, "empty.jpg": b"", "page.jpg": b"<html>404</html>", "start.png": b"\x89PNG\r\n\x1a\n"}
    for name, data in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.jpg").mkdir()
    said = {}
    for name in [*cases, "folder.jpg"]:
        with pytest.raises(ImageError) as error:
            decode_image(tmp_path / name)
        said[name] = str(error.value)
    assert said == {
        "missing.jpg": "No such file or directory",
        "empty.jpg": "empty file",
        "page.jpg": "not an image that OpenCV can decode",
        "start.png": "truncated",
        "folder.jpg": "Is a directory",
    }


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm"])
def test_no_beginning_of_a_file_passes_for_the_whole(suffix, picture, tmp_path):
    data, path = encoded(suffix, picture), tmp_path / f"x{suffix}"
    path.write_bytes(data)
    assert decode_image(path).shape == picture.shape
    for length in [1, 3, 12, *np.linspace(20, len(data) - 1, 15).astype(int)]:
        path.write_bytes(data[:length])
        with pytest.raises(ImageError):
            decode_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_what_programs_append_to_a_whole_image_does_no_harm(suffix, picture, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(encoded(suffix, picture) + b"appended " * 100)
    assert decode_image(path).shape == picture.shape


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photograph(picture, tmp_path):
    thumbnail = encoded(".jpg", picture[::4, ::4].copy())
    plain = encoded(".jpg", picture)
    data, path = with_exif(plain, 1, thumbnail), tmp_path / "x.jpg"
    path.write_bytes(data)
    assert decode_image(path).shape == picture.shape
    header = len(data) - len(plain) + 2  # start image, and the whole EXIF segment
    for length in [header, header + 30, data.rindex(b"\xff\xda"), data.rindex(b"\xff\xda") + 20, len(data) - 200]:
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match="truncated"):
            decode_image(path)


def test_fill_bytes_before_a_jpeg_marker_are_legal(picture, tmp_path):
    data, path = encoded(".jpg", picture), tmp_path / "x.jpg"
    path.write_bytes(data[:2] + b"\xff\xff" + data[2:])
    assert decode_image(path).shape == picture.shape


# ---- what can


def test_pixels_are_bgr_and_8_bit_whatever_the_file_holds(tmp_path):
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 2] = 255
    files = {
        "colour": red,
        "grey": np.full((4, 5), 200, np.uint8),
        "alpha": np.dstack([red, np.full((4, 5), 7, np.uint8)]),
        "deep": np.full((4, 5, 3), 200 * 257, np.uint16),
    }
    for name, pixels in files.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), pixels)
        image = decode_image(str(tmp_path / f"{name}.png"))
        assert image.dtype == np.uint8
        expected = red if name in ("colour", "alpha") else np.full((4, 5, 3), 200)
        np.testing.assert_array_equal(image, expected)


TURNED = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_honoured(orientation, picture, tmp_path):
    plain, tagged = tmp_path / "plain.jpg", tmp_path / "tagged.jpg"
    data = encoded(".jpg", picture)
    plain.write_bytes(data)
    tagged.write_bytes(with_exif(data, orientation))
    np.testing.assert_array_equal(decode_image(tagged), TURNED[orientation](decode_image(plain)))


def test_a_suffix_for_each_format_that_opencv_writes():
    for suffix in [".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm", ".jp2", ".gif"]:
        assert suffix in IMAGE_SUFFIXES


# ---- base images


@settings(deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(32, 1536))
def test_the_long_side_of_a_base_image_is_imgsz_and_the_other_keeps_the_aspect(height, width, imgsz):
    base = base_shape((height, width), imgsz)
    assert max(base) == imgsz
    exact = min(height, width) * imgsz / max(height, width)
    assert abs(min(base) - exact) <= 0.5 or min(base) == 1
    scale_x, scale_y = base_scale((height, width), imgsz)
    assert (scale_x * width, scale_y * height) == pytest.approx((base[1], base[0]), rel=1e-12)


@pytest.mark.parametrize("size", [(37, 61), (100, 64), (64, 64), (300, 200)])
@pytest.mark.parametrize("area", [False, True])
def test_base_image_has_the_base_shape_and_keeps_points_in_place(size, area, tmp_path):
    """The centre of a blob moves by exactly the scale, which a resize that is half a pixel off would break."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    blob = 255 * np.exp(-(((x - width * 0.4) / (width / 8)) ** 2) - ((y - height * 0.6) / (height / 8)) ** 2)
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), blob.astype(np.uint8))
    base = base_image(path, 64, area=area)
    assert base.shape == (*base_shape(size, 64), 3)
    weight = base[..., 0].astype(float)
    y, x = np.mgrid[: base.shape[0], : base.shape[1]] + 0.5
    scale_x, scale_y = base_scale(size, 64)
    assert (weight * x).sum() / weight.sum() == pytest.approx(width * 0.4 * scale_x, abs=0.1)
    assert (weight * y).sum() / weight.sum() == pytest.approx(height * 0.6 * scale_y, abs=0.1)


def test_an_image_of_imgsz_is_untouched(picture, tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), picture)
    np.testing.assert_array_equal(base_image(tmp_path / "x.png", 60), picture)


@pytest.mark.parametrize("shape", [(80, 120), (120, 1)])
def test_area_averages_when_shrinking(shape, tmp_path):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), pixels)
    height, width = base_shape(shape, 30)
    blocks = pixels.reshape(height, shape[0] // height, width, shape[1] // width, 3).mean((1, 3))
    assert np.abs(base_image(tmp_path / "x.png", 30, area=True) - blocks).max() <= 1
    assert np.abs(base_image(tmp_path / "x.png", 30) - blocks).max() > 20


def test_enlarging_is_bilinear_with_and_without_area(picture, tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), picture)
    expected = _bilinear(picture, (80, 120))
    for area in (False, True):
        assert np.abs(base_image(tmp_path / "x.png", 120, area=area) - expected).max() <= 1


def _bilinear(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The slow twin: each pixel of the result on its own, in floats."""
    result = np.empty((*shape, 3))
    for y, x in np.ndindex(shape):
        at = [
            min(max((position + 0.5) * old / new - 0.5, 0), old - 1)
            for position, new, old in zip((y, x), shape, image.shape)
        ]
        (top, left), (down, right) = np.floor(at).astype(int), np.mod(at, 1)
        bottom, end = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
        upper = image[top, left] * (1 - right) + image[top, end] * right
        lower = image[bottom, left] * (1 - right) + image[bottom, end] * right
        result[y, x] = upper * (1 - down) + lower * down
    return result


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF"]))
def test_rubbish_is_an_image_error_and_nothing_else(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "rubbish"
    path.write_bytes(start + data)
    try:
        decode_image(path)
    except ImageError as error:
        assert str(error)


def test_scales_of_many_images_are_those_of_each():
    sizes = np.random.default_rng(0).integers(1, 5000, (500, 2))
    assert base_scales(sizes, 640).tolist() == [list(base_scale(tuple(size), 640)) for size in sizes.tolist()]
