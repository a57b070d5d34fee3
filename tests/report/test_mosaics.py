from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.stores import ImageLabels, build_store
from utils.data.store import plain_store
from utils.report import mosaics
from utils.report.annotate import class_colour, write_image
from utils.report.mosaics import DrawnBoxes, draw_batch, draw_pairs, plot_worst
from utils.structures import FALSE_ALARM, HIT, MISSED, JudgedImage, LabelStore

pytestmark = pytest.mark.filterwarnings("error")


def plot_batch(images, boxes, classes, image_of, names, *, path, scores=None, **options):
    write_image(draw_batch(images, DrawnBoxes(boxes, classes, image_of, scores), names, **options), path)


def read(path) -> np.ndarray:
    """(H, W, 3) RGB of a picture that decodes and is not one flat colour."""
    image = cv2.imread(str(path))
    assert image is not None, path
    assert image.std() > 1
    return image[..., ::-1]


def batch(num_images=5, height=64, width=96, per_image=3):
    generator = np.random.default_rng(0)
    count = num_images * per_image
    corner = generator.uniform(-5, 50, (count, 2))
    return {
        "images": np.full((num_images, 3, height, width), 128, np.uint8),
        "boxes": np.concatenate([corner, corner + generator.uniform(1, 60, (count, 2))], 1).astype(np.float32),
        "classes": generator.integers(0, 2, count),
        "image_of": np.repeat(np.arange(num_images), per_image),
        "names": ("cat", "a_dog $with$ a name that is far longer than any tile is wide, äöü 猫"),
    }


@pytest.mark.parametrize("size", [(160, 160), (640, 480), (33, 900)])
def test_a_batch_fits_the_screen_and_small_images_grow(tmp_path, size):
    plot_batch(**batch(16, *size, per_image=1), path=tmp_path / "batch.jpg", captions=["folder/name.jpg"] * 16)
    height, width, _ = read(tmp_path / "batch.jpg").shape
    assert 900 < max(height, width) <= 1920


def test_a_box_lies_where_it_belongs_in_the_colour_of_its_class(tmp_path):
    image = np.zeros((1, 3, 400, 400), np.uint8)
    box = np.array([[100, 150, 300, 350]], np.float32)
    plot_batch(image, box, np.array([1]), np.array([0]), ("cat", "dog"), path=tmp_path / "batch.png")
    picture = read(tmp_path / "batch.png").astype(int)
    scale = (picture.shape[1] - 16) // 400
    coloured = np.abs(picture - np.multiply(class_colour(1), 255)).max(-1) < 40
    rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
    assert columns.min() - 8 == pytest.approx(100 * scale, abs=2)
    assert columns.max() - 8 == pytest.approx(300 * scale, abs=2)
    assert rows.max() - 8 == pytest.approx(350 * scale, abs=2)


def test_nothing_is_drawn_beside_a_tile(tmp_path):
    """Boxes that stick out and long names leave the gaps between tiles white."""
    plot_batch(**batch(), path=tmp_path / "batch.png")
    picture = read(tmp_path / "batch.png")
    assert (picture[:, :8] == 255).all() and (picture[:, -8:] == 255).all() and (picture[:8] == 255).all()


@pytest.mark.parametrize("width", [123, 240, 999])
def test_pixels_arrive_as_they_are(tmp_path, width):
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 1000, width)).astype(np.uint8)
    nothing = np.zeros(0, int)
    plot_batch(image, np.zeros((0, 4)), nothing, nothing, (), path=tmp_path / "batch.png")
    assert np.array_equal(read(tmp_path / "batch.png")[8:-8, 8:-8], image[0].transpose(1, 2, 0))


def test_only_confident_detections_are_drawn(tmp_path):
    for name, score in (("none", 0.1), ("all", 0.9)):
        plot_batch(**batch(), path=tmp_path / f"{name}.png", scores=np.full(15, score))
    assert (read(tmp_path / "none.png").max(-1) == read(tmp_path / "none.png").min(-1)).all()
    assert (read(tmp_path / "all.png").max(-1) != read(tmp_path / "all.png").min(-1)).any()


@pytest.mark.parametrize("count", [1, 2, 5, 8, 20])
@pytest.mark.parametrize("size", [(32, 32), (320, 416), (1280, 96), (64, 1280)])
def test_pairs_fit_and_are_of_the_same_images_at_each_call(count, size):
    given = batch(count, *size)
    labels = DrawnBoxes(given["boxes"], given["classes"], given["image_of"])
    captions = [f"folder/{index}.jpg" for index in range(count)]
    first, later = (
        draw_pairs(given["images"], labels, replace(labels, scores=np.full(3 * count, score)), given["names"], captions)
        for score in (0.1, 0.9)
    )
    assert first.shape == later.shape and max(first.shape[:2]) <= 1600
    assert (first != later).any()
    if count == 1:
        (labels, found), (labels_later, found_later) = (np.split(one, [one.shape[1] // 2], 1) for one in (first, later))
        assert np.array_equal(labels, labels_later) and not np.array_equal(found, found_later)


def test_a_pair_has_labels_on_the_left_and_what_was_found_on_the_right(monkeypatch):
    said = []
    monkeypatch.setattr(mosaics, "write_line", lambda image, text, *args, **kwargs: said.append(text))
    box, zero = np.array([[100, 150, 300, 350]], np.float32), np.zeros(1, int)
    nothing = DrawnBoxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    for labels, found, expected in (
        (DrawnBoxes(box, zero, zero), nothing, (True, False)),
        (nothing, DrawnBoxes(box, zero, zero, np.full(1, 0.9)), (False, True)),
    ):
        picture = draw_pairs(np.full((1, 3, 400, 400), 128, np.uint8), labels, found, ("cat",), ["a/b.jpg"])
        halves = np.split(picture, [picture.shape[1] // 2], 1)
        assert tuple(has_colour(half, class_colour(0)) for half in halves) == expected
    assert said[:2] == ["1 label: b.jpg", "0 predicted, confidence from 0.25"]


def test_batches_without_boxes_or_names(tmp_path):
    plot_batch(**batch(1, per_image=0), path=tmp_path / "empty.jpg")
    plot_batch(**{**batch(20), "names": ()}, path=tmp_path / "unnamed.jpg", max_images=4)
    assert read(tmp_path / "empty.jpg").size and read(tmp_path / "unnamed.jpg").size


# ---- the worst images


def pictured_store(folder, sizes=((60, 80), (200, 100), (40, 40))) -> LabelStore:
    paths = [folder / f"image {index}.png" for index in range(len(sizes))]
    for path, size in zip(paths, sizes):
        cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    one = ImageLabels(boxes=np.array([[0.2, 0.2, 0.8, 0.8]]), classes=np.zeros(1, int))
    return build_store(paths, sizes, [one] * len(sizes))


def judged(image: int, verdicts: Sequence[int], *, at: float = 10.0) -> JudgedImage:
    """Boxes of class 0 beside each other."""
    left = at + 2 * np.arange(len(verdicts))
    return JudgedImage(
        image=image,
        boxes=np.stack([left, np.full_like(left, at), left + 20, np.full_like(left, at + 20)], 1).astype(np.float32),
        classes=np.zeros(len(verdicts), int),
        scores=np.where(np.equal(verdicts, MISSED), np.nan, 0.5).astype(np.float32),
        verdicts=np.array(verdicts, np.uint8),
    )


def has_colour(picture: np.ndarray, colour) -> bool:
    return bool((np.abs(picture.astype(int) - np.multiply(colour, 255)).max(-1) < 8).any())


@pytest.mark.parametrize(
    "verdict, colour", [(HIT, mosaics._GOOD), (FALSE_ALARM, mosaics._FALSE), (MISSED, mosaics._MISSED)]
)
def test_a_verdict_has_its_colour_and_no_other(tmp_path, verdict, colour):
    plot_worst([judged(0, [verdict])], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    below_key = read(tmp_path / "worst.png")[70:]
    shown = [one for one in (mosaics._GOOD, mosaics._FALSE, mosaics._MISSED) if has_colour(below_key, one)]
    assert shown == [colour]


def test_what_was_missed_is_dashed_and_what_is_false_is_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(mosaics, "draw_boxes", lambda *args, dashed=(), **kwargs: drawn.append(list(dashed)))
    plot_worst([judged(0, [FALSE_ALARM, MISSED])], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    assert drawn[-1] == [False, True]


def test_captions_count_and_boxes_name(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(mosaics, "write_line", lambda image, text, *args, **kwargs: said.append(text))
    monkeypatch.setattr(mosaics, "draw_boxes", lambda image, boxes, texts, *args, **kwargs: said.extend(texts))
    plot_worst(
        [judged(0, [HIT, FALSE_ALARM, MISSED, MISSED])],
        pictured_store(tmp_path),
        ("cat",),
        tmp_path / "worst.png",
        confidence=0.123,
    )
    assert {"image 0.png", "2 missed, 1 false, 1 found", "missed: cat", "false: cat 0.50"} <= set(said)
    assert any("0.123" in text for text in said)


def test_of_very_many_false_alarms_the_surest_are_drawn(tmp_path, monkeypatch):
    texts, captions = [], []
    monkeypatch.setattr(mosaics, "write_line", lambda image, text, *args, **kwargs: captions.append(text))
    monkeypatch.setattr(mosaics, "draw_boxes", lambda image, boxes, names, *args, **kwargs: texts.extend(names))
    many = judged(0, [MISSED, *[FALSE_ALARM] * 250, HIT])
    many = replace(many, scores=np.linspace(0.1, 0.9, 252).astype(np.float32))
    plot_worst([many], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    false = [float(text.split()[-1]) for text in texts if text.startswith("false")]
    assert len(false) == 30 and min(false) > 0.79 and false == sorted(false, reverse=True)
    assert "missed: cat" in texts
    assert "1 missed, 250 false (30 surest shown), 1 found" in captions


def test_without_labels_nothing_is_judged(tmp_path, monkeypatch):
    """All that is found would be false, which says nothing about the network."""
    said = []
    monkeypatch.setattr(mosaics, "write_line", lambda image, text, *args, **kwargs: said.append(text))
    plot_worst([judged(0, [FALSE_ALARM])], plain_store(np.full((3, 2), 100)), ("cat",), tmp_path / "worst.png")
    plot_worst([], pictured_store(tmp_path), ("cat",), tmp_path / "worst.png")
    assert [text for text in said if text.startswith("No")] == [
        "No labels to judge by",
        "Nothing missed, and nothing false",
    ]


@pytest.mark.parametrize("count", range(9))
def test_any_number_of_images_of_any_shape(tmp_path, count):
    sizes = [(60, 80), (900, 20), (20, 900), (1, 1), (300, 400), (50, 50), (51, 49), (2000, 3000), (9, 9)][:count]
    store = pictured_store(tmp_path, sizes)
    plot_worst([judged(index, [HIT, MISSED]) for index in range(count)], store, (), tmp_path / "worst.jpg")
    height, width, _ = read(tmp_path / "worst.jpg").shape
    assert width <= 1920 and height < 4000


def test_images_that_are_gone_or_others_are_grey_tiles(tmp_path):
    store = pictured_store(tmp_path)
    (tmp_path / "image 0.png").unlink()
    cv2.imwrite(str(tmp_path / "image 1.png"), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "image 2.png").write_text("no image")
    plot_worst([judged(index, [MISSED]) for index in range(3)], store, ("cat",), tmp_path / "worst.png")
    picture = read(tmp_path / "worst.png")[70:]
    assert not has_colour(picture, mosaics._MISSED) and has_colour(picture, (200 / 255,) * 3)


def test_a_damaged_image_is_shown_in_silence(tmp_path, capfd):
    """libjpeg writes of it on the standard error of the process."""
    store = pictured_store(tmp_path, [(600, 800)])
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3)).astype(np.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + b"\xff\xd0" * 40 + whole[middle + 80 :]
    (tmp_path / "image 0.png").write_bytes(damaged)
    plot_worst([judged(0, [MISSED])], store, ("cat",), tmp_path / "worst.png")
    assert has_colour(read(tmp_path / "worst.png")[70:], mosaics._MISSED)
    assert capfd.readouterr() == ("", "")


def test_hundreds_of_mistakes_leave_the_image_visible(tmp_path):
    store = pictured_store(tmp_path, [(700, 1000)])
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, (960, 660), (600, 2))
    crowd = replace(judged(0, generator.integers(0, 3, 600).tolist()), boxes=np.concatenate([corner, corner + 30], 1))
    plot_worst([crowd], store, ("cat",), tmp_path / "worst.png")
    picture = read(tmp_path / "worst.png")[110:-10, 10:-10]
    assert (picture == 90).all(-1).mean() > 0.7
