import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.images import (
    IMAGE_SUFFIXES,
    BaseImages,
    ImageError,
    base_image,
    base_reduction,
    base_scale,
    base_scales,
    base_shape,
    base_shapes,
    decode_image,
)
from utils.structures import UserError


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
    base = base_image(path, 64, size=size, area=area)
    assert base.shape == (*base_shape(size, 64), 3)
    weight = base[..., 0].astype(float)
    y, x = np.mgrid[: base.shape[0], : base.shape[1]] + 0.5
    scale_x, scale_y = base_scale(size, 64)
    assert (weight * x).sum() / weight.sum() == pytest.approx(width * 0.4 * scale_x, abs=0.1)
    assert (weight * y).sum() / weight.sum() == pytest.approx(height * 0.6 * scale_y, abs=0.1)


def test_an_image_of_imgsz_is_untouched(picture, tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), picture)
    np.testing.assert_array_equal(base_image(tmp_path / "x.png", 60, size=(40, 60)), picture)


@pytest.mark.parametrize("shape", [(80, 120), (120, 1)])
def test_area_averages_when_shrinking(shape, tmp_path):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), pixels)
    height, width = base_shape(shape, 30)
    blocks = pixels.reshape(height, shape[0] // height, width, shape[1] // width, 3).mean((1, 3))
    assert np.abs(base_image(tmp_path / "x.png", 30, size=shape, area=True) - blocks).max() <= 1
    assert np.abs(base_image(tmp_path / "x.png", 30, size=shape) - blocks).max() > 20


def test_enlarging_is_bilinear_with_and_without_area(picture, tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), picture)
    expected = _bilinear(picture, (80, 120))
    for area in (False, True):
        assert np.abs(base_image(tmp_path / "x.png", 120, size=(40, 60), area=area) - expected).max() <= 1


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


# ---- decoding at reduced size


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(32, 1536))
def test_a_reduced_image_is_never_smaller_than_its_base_image_nor_twice_as_large(height, width, imgsz):
    factor, long = base_reduction((height, width), imgsz), max(height, width)
    assert factor in (1, 2, 4, 8)
    assert factor == 1 or long >= factor * imgsz
    assert factor == 8 or long < 2 * factor * imgsz


def blobs(size: tuple[int, int], points: np.ndarray) -> np.ndarray:
    """Bright spots on grey, at (x, y) as fractions of the image."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    radius = max(size) / 24
    spots = [np.exp(-((x - u * size[1]) ** 2 + (y - v * size[0]) ** 2) / radius**2) for u, v in points]
    return np.repeat((20 + 220 * np.sum(spots, 0))[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)


def centroids(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 2) where the spots of `blobs` lie in an image, in px."""
    height, width = image.shape[:2]
    light = np.maximum(image[..., 0].astype(float) - 40, 0)
    y, x = np.mgrid[:height, :width] + 0.5
    found = []
    for u, v in points:
        near = light * (np.hypot(x - u * width, y - v * height) < max(height, width) / 8)
        found.append([(near * x).sum() / near.sum(), (near * y).sum() / near.sum()])
    return np.array(found)


POINTS = np.array([[0.2, 0.2], [0.8, 0.25], [0.25, 0.8], [0.8, 0.8]])


@pytest.mark.parametrize("size", [(256, 192), (255, 191), (1021, 763), (517, 640), (640, 513), (130, 97)])
def test_what_a_reduced_image_shows_is_where_it_was(size, tmp_path):
    """Also where the last row and column stand for a part of the others."""
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(".jpg", blobs(size, POINTS)))
    base = base_image(path, 64, size=size)
    assert base_reduction(size, 64) > 1
    assert base.shape == (*base_shape(size, 64), 3)
    expected = POINTS * size[::-1] * base_scale(size, 64)
    np.testing.assert_allclose(centroids(base, POINTS), expected, atol=0.05)


@pytest.mark.parametrize("size", [(256, 192), (333, 250)])
def test_a_reduced_image_looks_like_one_that_was_averaged(size, smooth_image, tmp_path):
    image, path = smooth_image(np.random.default_rng(0), *size), tmp_path / "x.jpg"
    path.write_bytes(encoded(".jpg", image))
    base = base_image(path, 64, size=size).astype(int)
    assert np.abs(base - base_image(path, 64, size=size, area=True)).mean() < 1.5


def test_only_jpegs_that_train_are_reduced(smooth_image, tmp_path, monkeypatch):
    image, flags = smooth_image(np.random.default_rng(0), 256, 200), []
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: flags.append(flag) or decode(data, flag))
    for name in ("x.jpg", "x.png"):
        assert cv2.imwrite(str(tmp_path / name), image)
        for area in (False, True):
            base_image(tmp_path / name, 64, size=(256, 200), area=area)
    assert flags == [cv2.IMREAD_REDUCED_COLOR_4, *[cv2.IMREAD_COLOR] * 3]


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_honoured_at_reduced_size(orientation, tmp_path):
    plain, tagged = tmp_path / "plain.jpg", tmp_path / "tagged.jpg"
    data = encoded(".jpg", blobs((256, 160), POINTS[:3]))
    plain.write_bytes(data)
    tagged.write_bytes(with_exif(data, orientation))
    size = decode_image(tagged).shape[:2]
    expected = TURNED[orientation](base_image(plain, 64, size=(256, 160)))
    np.testing.assert_array_equal(base_image(tagged, 64, size=size), expected)


def test_grey_and_cmyk_jpegs_are_bgr_at_reduced_size(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(".jpg", np.full((128, 128), 200, np.uint8)))
    assert np.abs(base_image(path, 32, size=(128, 128)).astype(int) - 200).max() <= 1
    image = pytest.importorskip("PIL.Image").new("CMYK", (128, 128), (0, 255, 255, 0))
    image.save(path)
    blue, green, red = base_image(path, 32, size=(128, 128)).reshape(-1, 3).mean(0)
    assert red > 200 > 60 > max(blue, green)


# ---- the images of a store


def test_base_images_are_those_of_the_store(make_store, smooth_image, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, path in enumerate(paths):
        assert cv2.imwrite(str(path), smooth_image(np.random.default_rng(number), 40, 60 - number))
    images = BaseImages(store=make_store([(40, 60), (40, 59)], paths=paths), imgsz=30)
    for number, path in enumerate(paths):
        np.testing.assert_array_equal(images(number), base_image(path, 30, size=(40, 60 - number)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated"),
        (lambda path: cv2.imwrite(str(path), np.zeros((40, 61, 3), np.uint8)), "not of 60 x 40 px any more"),
        (lambda path: cv2.imwrite(str(path), np.zeros((60, 40, 3), np.uint8)), "not of 60 x 40 px any more"),
    ],
)
@pytest.mark.parametrize("imgsz", [60, 15])
@pytest.mark.parametrize("area", [False, True])
def test_an_image_that_changed_since_the_scan_is_named(damage, reason, imgsz, area, make_store, tmp_path):
    path = tmp_path / "a.jpg"
    assert cv2.imwrite(str(path), np.zeros((40, 60, 3), np.uint8))
    images = BaseImages(store=make_store([(40, 60)], paths=[path]), imgsz=imgsz, area=area)
    assert images(0).shape == (*base_shape((40, 60), imgsz), 3)
    damage(path)
    with pytest.raises(UserError) as error:
        images(0)
    assert str(error.value) == f"{path}: {reason}, though it was fine when the data set was scanned"


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
    assert base_shapes(sizes, 640).tolist() == [list(base_shape(tuple(size), 640)) for size in sizes.tolist()]
    assert base_scales(sizes, 640).tolist() == [list(base_scale(tuple(size), 640)) for size in sizes.tolist()]
