"""The user's list of albumentations transforms: errors with a package of our own making, results with the real one."""

import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from utils.data import pixels
from utils.data.pixels import change_pixels, check_transforms
from utils.data.plan import generator, train_plan
from utils.data.render import render
from utils.hyp import Hyperparameters, hyperparameters
from utils.structures import Cutout, PixelChange, PixelTransform, UserError


def transforms_of(*items):
    return hyperparameters({"albumentations": list(items)}, source="a.yaml").albumentations


# ---- a package that is not the real one


class BasicTransform:
    def __init__(self, p=0.5):
        self.p = p


class ImageOnlyTransform(BasicTransform):
    pass


class HorizontalFlip(BasicTransform):
    pass


class Darken(ImageOnlyTransform):
    def __init__(self, levels=10, p=0.5):
        super().__init__(p)
        if levels < 0:
            raise ValueError("1 validation error\nlevels\n  Input should be 0 or more")
        self.levels = levels

    def apply(self, image, rng):
        return image - np.minimum(image, rng.integers(self.levels + 1)).astype(np.uint8)


class ToFloat(ImageOnlyTransform):
    def apply(self, image, rng):
        return image.astype(np.float32)


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def set_random_seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, image):
        for transform in self.transforms:
            if self.rng.random() < transform.p:
                image = transform.apply(image, self.rng)
        return {"image": image}


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("albumentations")
    for item in (BasicTransform, ImageOnlyTransform, HorizontalFlip, Darken, ToFloat, Compose):
        setattr(module, item.__name__, item)
    module.__version__ = "2.0"
    monkeypatch.setitem(sys.modules, "albumentations", module)
    pixels._pipeline.cache_clear()
    yield module
    pixels._pipeline.cache_clear()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("Darkn", "my.yaml: 'albumentations': unknown transform 'Darkn'; did you mean 'Darken'?"),
        ("__version__", "my.yaml: 'albumentations': unknown transform '__version__'"),
        ("HorizontalFlip", "my.yaml: 'albumentations': 'HorizontalFlip' moves objects or is no single transform, and"),
        ({"Darken": {"level": 3}}, "my.yaml: 'albumentations': 'Darken' knows no 'level'; did you mean 'levels'?"),
        (
            {"Darken": {"levels": -1}},
            "my.yaml: 'albumentations': 'Darken' does not work: 1 validation error; levels; Input should be 0 or more",
        ),
        ({"Darken": {"levels": "x"}}, "my.yaml: 'albumentations': 'Darken' does not work: '<' not supported"),
        ({"ToFloat": {"p": 0.0001}}, "my.yaml: 'albumentations': 'ToFloat' makes float32 of shape (64, 96, 3)"),
    ],
)
def test_what_cannot_be_applied_is_one_line(fake, item, message):
    with pytest.raises(UserError) as error:
        check_transforms(transforms_of({"Darken": {"levels": 3}}, item), source="my.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_or_old_package_is_one_line(fake, monkeypatch):
    wanted = transforms_of("Darken")
    monkeypatch.delattr(Compose, "set_random_seed")
    with pytest.raises(
        UserError, match=r"my.yaml: 'albumentations': this is albumentations 2.0, it takes 2.0 or newer"
    ):
        check_transforms(wanted, source="my.yaml")
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"my.yaml: 'albumentations': the package is not installed: `pip install"):
        check_transforms(wanted, source="my.yaml")
    check_transforms((), source="my.yaml")


def test_the_plan_draws_a_seed_and_the_picture_follows_it(fake, make_store, smooth_image):
    store, base = make_store([(48, 64)]), smooth_image(np.random.default_rng(0), 48, 64)
    hyp = Hyperparameters(mosaic=0, fliplr=1, albumentations=transforms_of({"Darken": {"levels": 200, "p": 1}}))
    plans = [train_plan(store, 0, imgsz=64, hyp=hyp, rng=generator(seed, 0, 0)) for seed in range(10)]
    assert len({plan.pixels.seed for plan in plans}) == 10
    assert train_plan(store, 0, imgsz=64, hyp=replace(hyp, albumentations=()), rng=generator(0, 0, 0)).pixels is None
    for plan in plans:
        plan = replace(plan, cutouts=(Cutout(box=(3, 5, 20, 9), colour=(1, 2, 3)),))
        picture = render(plan, lambda _: base)
        plain = render(replace(plan, pixels=None, cutouts=(), flip_lr=False), lambda _: base)
        expected = change_pixels(plain, plan.pixels)
        expected[5:9, 3:20] = (3, 2, 1)
        np.testing.assert_array_equal(picture, expected[:, ::-1])
        np.testing.assert_array_equal(picture, render(plan, lambda _: base))


def test_a_run_without_the_list_imports_nothing():
    code = "import sys, utils.data.render, utils.train.build; assert 'albumentations' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the real one


needs_package = pytest.mark.skipif(find_spec("albumentations") is None, reason="albumentations is not installed")


@needs_package
def test_results_depend_on_the_plan_alone(random_states):
    pixels._pipeline.cache_clear()
    wanted = transforms_of(
        {"Blur": {"p": 0.5, "blur_limit": [3, 7]}},
        {"RandomBrightnessContrast": {"p": 1.0}},
        {"CLAHE": {"p": 0.3}},
        {"ToGray": {"p": 0.2}},
        {"ImageCompression": {"p": 0.5, "quality_range": [50, 90]}},
        {"GaussNoise": {"p": 0.5}},
    )
    check_transforms(wanted, source="my.yaml")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    before = random_states()
    changes = [PixelChange(transforms=wanted, seed=seed) for seed in range(20)]
    first = [change_pixels(picture, change) for change in changes]
    again = [change_pixels(picture, change) for change in reversed(changes)][::-1]
    assert random_states() == before
    np.testing.assert_array_equal(first, again)
    assert len({item.tobytes() for item in first}) > 15


@needs_package
@pytest.mark.parametrize(
    ("transform", "problem"),
    [
        (PixelTransform(name="Blurr", arguments=()), "unknown transform 'Blurr'; did you mean 'Blur'?"),
        (PixelTransform(name="HorizontalFlip", arguments=()), "'HorizontalFlip' moves objects"),
        (PixelTransform(name="Compose", arguments=()), "unknown transform 'Compose'"),
        (PixelTransform(name="Normalize", arguments=()), "'Normalize' makes float32"),
        (PixelTransform(name="Blur", arguments=(("blur_limt", 3),)), "'Blur' knows no 'blur_limt'"),
        (PixelTransform(name="Blur", arguments=(("blur_limit", "wide"),)), "'Blur' does not work: "),
        (PixelTransform(name="Blur", arguments=(("p", 3),)), "'Blur' does not work: "),
    ],
)
def test_the_real_package_is_checked_likewise(transform, problem):
    pixels._pipeline.cache_clear()
    with pytest.raises(UserError) as error:
        check_transforms((transform,), source="my.yaml")
    assert str(error.value).startswith(f"my.yaml: 'albumentations': {problem}")
    assert "\n" not in str(error.value)
