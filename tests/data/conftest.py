import functools
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.stores import ImageLabels, build_store
from utils.structures import DatasetSpec, LabelStore


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory) -> Path:
    """A home of its own for every test, so that none touches the user's cache folder."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", os.fspath(folder))
    return folder


@pytest.fixture(scope="session")
def make_store():
    return _make_store


def _make_store(sizes, boxes=None, classes=None, *, paths=None) -> LabelStore:
    """A store of images of `sizes` (height, width) with `boxes` in pixels, one list for each image."""
    boxes = [np.reshape(item, (-1, 4)).astype(float) for item in boxes or [[]] * len(sizes)]
    classes = [np.zeros(len(item)) for item in boxes] if classes is None else classes
    labels = [
        ImageLabels(boxes=item / np.array([width, height, width, height]), classes=np.array(kinds, np.int64))
        for item, kinds, (height, width) in zip(boxes, classes, sizes)
    ]
    return build_store(paths or [Path(f"{index}.png") for index in range(len(sizes))], sizes, labels)


@pytest.fixture(scope="session")
def polygon_store():
    """Makes a store of images of `sizes` with two boxes each, of classes of their own; one is drawn as a heptagon."""

    @functools.cache
    def make(sizes: tuple[tuple[int, int], ...]) -> LabelStore:
        corners = np.array([[0.2, 0.3], [0.35, 0.15], [0.4, 0.3], [0.25, 0.45]])
        heptagon = np.array([[0.5, 0.6], [0.6, 0.55], [0.75, 0.6], [0.8, 0.7], [0.75, 0.8], [0.6, 0.85], [0.55, 0.8]])
        rings = [[], [heptagon]]
        return build_store(
            [Path(f"{index}.png") for index in range(len(sizes))],
            sizes,
            [
                ImageLabels(
                    boxes=np.array([[*ring.min(0), *ring.max(0)] for ring in (corners, heptagon)]),
                    classes=np.array([2 * index, 2 * index + 1]),
                    rings=rings,
                )
                for index in range(len(sizes))
            ],
        )

    return lambda sizes: make(tuple(sizes))


@pytest.fixture(scope="session")
def smooth_image():
    return _smooth_image


def _smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) u8 with all grey levels and no sharp edge: interpolation has little room for choice."""
    noise = cv2.GaussianBlur(rng.standard_normal((height, width, 3)), (0, 0), 4)
    low, high = noise.min(), noise.max()
    return np.rint((noise - low) / (high - low) * 255).astype(np.uint8)


@pytest.fixture
def make_dataset(tmp_path):
    """Writes `root/images/SPLIT/NAME` and its labels: {split: {name: label text or None}}; returns the spec."""

    def make(content: dict[str, dict[str, str | None]], *, root: Path = tmp_path / "set", names="abc", **fields):
        for split, files in content.items():
            for number, (name, text) in enumerate(files.items()):
                image = root / "images" / split / name
                image.parent.mkdir(parents=True, exist_ok=True)
                pixels = _smooth_image(np.random.default_rng(number), 40 + 8 * (number % 3), 64 - 8 * (number % 4))
                assert cv2.imwrite(str(image), pixels)
                if text is not None:
                    label = (root / "labels" / split / name).with_suffix(".txt")
                    label.parent.mkdir(parents=True, exist_ok=True)
                    label.write_text(text)
        splits = {"train": (root / "images/train",), "val": (root / "images/val",)}
        return DatasetSpec(**{"source": root / "data.yaml", "root": root, "names": tuple(names), **splits, **fields})

    return make
