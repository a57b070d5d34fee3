import logging
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.report.annotate import _free_place, annotated, class_colour, class_name

pytestmark = pytest.mark.filterwarnings("error")

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def places(image: np.ndarray, colour) -> np.ndarray:
    """(n, 2) y and x of the px that have exactly this colour."""
    return np.argwhere((image == np.rint(np.multiply(colour, 255))).all(-1))


@pytest.mark.parametrize("line_px", [1, 2, 3, 7])
def test_an_outline_lies_about_the_sides_of_its_box(line_px):
    image = annotated(grey(200, 300), np.array([[50, 60, 250, 160]]), [""], [RED], line_px=line_px)
    y, x = places(image, RED).T
    low, high = line_px / 2, (line_px + 1) / 2
    assert 60 - high <= y.min() <= 60 - low + 0.5 and 160 - low - 0.5 <= y.max() <= 160 + high
    assert 50 - high <= x.min() <= 50 - low + 0.5 and 250 - low - 0.5 <= x.max() <= 250 + high
    assert len(y) == 2 * line_px * (200 + 100)  # nothing inside, nothing missing


def test_a_box_along_the_border_is_seen_on_all_four_sides():
    image = annotated(grey(40, 60), np.array([[0, 0, 60, 40]]), [""], [RED], line_px=2)
    assert len(places(image, RED)) == 60 * 40 - 56 * 36


def test_a_box_without_area_is_not_drawn():
    boxes = np.array([[20, 10, 20, 30], [-9, 5, 0, 9], [60, 0, 70, 9], [30, 30, 20, 20]])
    assert np.array_equal(annotated(grey(40, 60), boxes, ["a"] * 4, [RED] * 4), grey(40, 60))


def test_sides_outside_the_image_are_not_drawn():
    image = annotated(grey(40, 60), np.array([[20, 10, 500, 30]]), [""], [RED], line_px=2)
    assert not len(places(image[:, 59:][15:25], RED)) and len(places(image[9:11, 59:], RED))


def test_the_image_given_stays_as_it_is_and_need_not_be_contiguous():
    given = grey(120, 120)[::-2, ::-1]
    before = given.copy()
    image = annotated(given, np.array([[5, 20, 50, 50]]), ["a"], [RED])
    assert np.array_equal(given, before) and image.shape == given.shape and len(places(image, RED))


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3), (30, 30), (2000, 1000)])
@pytest.mark.parametrize("line_px", [0, 1, 50])
def test_any_image_any_boxes_any_texts(shape, line_px):
    height, width = shape
    boxes = [
        [0, 0, width, height],
        [-1e30, -1e30, 1e30, 1e30],
        [width + 5, 0, width + 9, 9],
        [-9, -9, -5, -5],
        [np.nan, 0, 1, 1],
        [0, 0, np.inf, 1],
        [0.5, 0.5, 0.5, 0.5],
    ]
    texts = ["", "x" * 100_000, "a\nb\t\0\x1b", "猫 äöü $\\frac$ 0.50", "b", "🙂", "0.12345 " * 30 + "0.5"]
    image = annotated(grey(*shape), np.array(boxes, np.float32), texts, [RED] * 7, line_px=line_px)
    assert image.shape == (*shape, 3) and image.dtype == np.uint8


def test_without_boxes_nothing_changes():
    assert np.array_equal(annotated(grey(9, 9), np.zeros((0, 4), np.float32), [], []), grey(9, 9))


def test_texts_do_not_cover_each_other_and_stay_inside():
    """The same box four times: plates of four colours, each whole."""
    colours = [class_colour(index) for index in range(4)]
    image = annotated(grey(300, 300), np.array([[100, 100, 200, 200]] * 4), ["one 0.91"] * 4, colours, line_px=1)
    filled = [len(places(image, colour)) for colour in colours]
    assert min(filled) > 500 and max(filled) - min(filled) < 700  # the first has the outline too


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_places_for_texts_are_inside_and_apart(height, width, seed):
    generator = np.random.default_rng(seed)
    corner = generator.uniform(0, (width, height), (30, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(0.5, 100, (30, 2))], 1).clip(0, (width, height) * 2)
    boxes = boxes[(boxes[:, :2] < boxes[:, 2:]).all(1)]
    room = np.zeros((height, width), int)
    taken = np.empty((0, 4))
    for box in boxes:
        w, h = generator.integers(1, (min(80, width) + 1, min(20, height) + 1))
        plate = _free_place(box, int(w), int(h), (width, height), taken, boxes)
        if plate is not None:
            left, top, right, bottom = plate
            assert left >= 0 and top >= 0 and right <= width and bottom <= height
            assert (right - left, bottom - top) == (w, h)
            room[top:bottom, left:right] += 1
            taken = np.vstack([taken, plate])
    assert room.max() <= 1


def test_a_text_hides_no_other_box_where_it_need_not():
    """Above its own box there is another one, below there is nothing."""
    lower, upper = [50, 100, 150, 150], [50, 60, 150, 98]
    alone = annotated(grey(300, 300), np.array([upper]), [""], [BLUE], line_px=1)
    both = annotated(grey(300, 300), np.array([upper, lower]), ["", "lower"], [BLUE, RED], line_px=1)
    assert np.array_equal(both[55:99], alone[55:99])
    assert len(places(both[151:], RED)) > 100


def test_a_score_survives_a_name_that_is_too_long():
    box, names = np.array([[10, 50, 60, 90]]), ["n" * 300, "n" * 400]
    low, high, same = (
        annotated(grey(100, 150), box, [text], [RED])
        for text in (f"{names[0]} 0.11", f"{names[0]} 0.99", f"{names[1]} 0.11")
    )
    assert (low != high).any() and np.array_equal(low, same)


def test_where_text_would_bury_the_image_there_is_none():
    corners = np.random.default_rng(0).uniform(0, 380, (400, 2))
    boxes = np.concatenate([corners, corners + 15], 1)
    crowded = annotated(grey(400, 400), boxes, ["some text"] * 400, [BLUE] * 400, line_px=1)
    silent = annotated(grey(400, 400), boxes, [""] * 400, [BLUE] * 400, line_px=1)
    assert np.array_equal(crowded, silent)


def test_lines_and_text_grow_with_the_image():
    small, large = (
        annotated(grey(side, side), np.array([[0.2, 0.2, 0.8, 0.8]]) * side, ["text"], [RED]) for side in (300, 3000)
    )
    assert len(places(large, RED)) > 30 * len(places(small, RED))


def test_letters_beyond_ascii_differ():
    images = [annotated(grey(99, 200), np.array([[20, 40, 90, 90]]), [text], [RED]) for text in ("Ä", "Ö", "A", "Ж")]
    assert len({image.tobytes() for image in images}) == 4


def test_threads_draw_the_same_and_leave_warnings_as_they_were():
    """Texts that nobody has rendered yet, by many threads at once."""
    filters, level = list(warnings.filters), logging.getLogger("matplotlib").level
    box = np.array([[10, 40, 190, 90]])

    def draw(number: int) -> np.ndarray:
        return annotated(grey(100, 200), box, [f"thread {number} 猫"], [RED])

    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(draw, [number % 50 for number in range(200)]))
    assert all(np.array_equal(image, draw(number % 50)) for number, image in enumerate(drawn))
    assert (list(warnings.filters), logging.getLogger("matplotlib").level) == (filters, level)


def test_drawing_is_silent_and_leaves_matplotlib_as_it_was():
    program = """
import sys, numpy
from utils.report.annotate import annotated
assert not any(name.startswith("matplotlib") for name in sys.modules)
annotated(numpy.zeros((99, 99, 3), numpy.uint8), numpy.array([[9, 30, 60, 60]]), ["猫"], [(1, 0, 0)])
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("cat",), "cat"),
        ((" a\nb\x1b[31m ",), "a b [31m"),
        (("x" * 20 + "y" * 20,), "x" * 15 + "…" + "y" * 8),
        (("größe ρ",), "größe ρ"),
        (("\U000e0041\U000e0042",), "class 0"),  # in no font
        (("",), "class 0"),
        ((), "class 0"),
    ],
)
def test_a_class_is_named_so_that_it_can_be_read(names, shown):
    assert class_name(names, 0) == shown


def test_colours_of_the_first_classes_differ_and_show_on_white():
    colours = np.array([class_colour(index) for index in range(20)])
    assert np.abs(colours[:, None] - colours[None]).sum(-1)[~np.eye(20, dtype=bool)].min() > 0.1
    assert (colours @ (0.2126, 0.7152, 0.0722) < 0.75).all()
