"""Both ways to change colours against a slow twin, and against each other."""

import colorsys
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import native
from utils.data import colours
from utils.data.colours import recolour, recolour_with_opencv

seeds = st.integers(0, 2**31)
factors = st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
with_library = pytest.param(
    recolour, id="library", marks=pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no compiler")
)
both_ways = pytest.mark.parametrize("way", [with_library, pytest.param(recolour_with_opencv, id="opencv")])


def noise(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slow_hsv(pixel: np.ndarray, hsv: tuple[float, float, float]) -> np.ndarray:
    """An RGB pixel with its hue (0..180), saturation and value (0..255) as whole numbers times factors."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    hue, saturation, value = round(hue * 180) % 180, round(saturation * 255), round(value * 255)
    hue = round(hue * hsv[0]) % 180
    saturation, value = (min(round(level * factor), 255) for level, factor in zip((saturation, value), hsv[1:]))
    return 255 * np.array(colorsys.hsv_to_rgb(hue / 180, saturation / 255, value / 255))


@both_ways
@pytest.mark.parametrize(
    "hsv", [(1, 1, 1), (1.015, 0.3, 1.4), (0.985, 1.7, 0.6), (1.5, 1.2, 0.9), (1, 0, 1), (2, 2, 2)]
)
def test_hue_saturation_and_value_are_bytes_times_factors(way, hsv):
    picture = noise(0, 24, 24)
    expected = np.array([[slow_hsv(pixel, hsv) for pixel in row] for row in picture[..., ::-1]])
    way(picture, hsv)
    error = np.abs(picture - expected)
    assert error.mean() < 1
    assert error.max() <= 2 * 255 / 30 * max(hsv[0], 1)  # two steps of hue, which OpenCV rounds in its own way


@both_ways
@settings(max_examples=60, deadline=None)
@given(seed=seeds, hsv=factors)
def test_either_way_is_opencvs_conversion_to_hsv_and_back(way, seed, hsv):
    picture = noise(seed)
    levels = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)
    seam = np.isin(levels[..., 0], (0, 179))  # one may be taken for the other, and their products are far apart
    levels = levels * np.array(hsv)
    levels[..., 0] %= 180
    expected = cv2.cvtColor(np.clip(np.rint(levels), 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
    way(picture, hsv)
    error = np.abs(picture.astype(int) - expected)[~seam]
    assert error.max() <= 9 * (2 + np.ceil(hsv[0]))  # of a hue that is rounded the other way
    assert error.mean() < 0.8  # factors such as a half have many ties
    assert (error > 1).mean() < 0.15


@both_ways
@pytest.mark.parametrize("level", [0, 1, 114, 254, 255])
def test_grey_stays_grey_and_value_is_its_brightness(way, level):
    for factor in (0.6, 1.0, 1.3):
        picture = np.full((3, 200, 3), level, np.uint8)
        way(picture, (1.01, 1.7, factor))
        assert np.all(picture == min(round(level * factor), 255))


@both_ways
@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 300), st.integers(1, 5), st.integers(0, 40))
def test_a_pixel_is_the_same_wherever_it_lies_and_others_stay(way, seed, width, height, left):
    """In parts of larger pictures of any width; OpenCV rounds the last few pixels of a row in another way."""
    hsv = (1.013, 0.7, 1.2)
    large = noise(seed, height + 3, left + width + 5)
    before, part = large.copy(), np.s_[1 : 1 + height, left : left + width]
    alone = np.array([[[pixel]] for pixel in large[part].reshape(-1, 3)])  # (n, 1, 1, 3)
    for pixel in alone:
        way(pixel, hsv)
    way(large[part], hsv)
    assert np.abs(large[part].reshape(-1, 3).astype(int) - alone[:, 0, 0]).max() <= (0 if way is recolour else 1)
    large[part] = before[part]
    np.testing.assert_array_equal(large, before)


def test_without_factors_only_the_order_of_channels_changes():
    picture = noise(0)
    expected = picture[..., ::-1].copy()
    recolour(picture, None)
    np.testing.assert_array_equal(picture, expected)


@pytest.fixture
def fresh_library():
    colours._native.cache_clear()
    yield
    colours._native.cache_clear()


def test_without_a_compiler_opencv_does_it(fresh_library, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    picture, expected = noise(1), noise(1)
    recolour(picture, (1.01, 1.2, 0.8))
    recolour_with_opencv(expected, (1.01, 1.2, 0.8))
    np.testing.assert_array_equal(picture, expected)


def test_importing_compiles_nothing(tmp_path):
    code = "import utils.data.colours, utils.data.render"
    subprocess.run([sys.executable, "-c", code], check=True, env={"HOME": str(tmp_path), "PATH": ""})
    assert not any(tmp_path.iterdir())
