"""What a source names, in which order it comes, how much of it waits in memory."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data import media
from utils.data.images import BaseImages
from utils.data.media import (
    Picture,
    Problem,
    count_pictures,
    find_media,
    picture_of,
    read_ahead,
    read_media,
)
from utils.data.store import plain_store
from utils.structures import UserError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path: str, value: int = 90, size=(48, 64)) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(path, np.full((*size, 3), value, np.uint8))


def film(path: str, frames: int, size=(64, 48)) -> None:
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, size)
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no .avi")
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), number % 256, np.uint8))
    writer.release()


def paths(source: str) -> list[str]:
    return [one.path for one in find_media(source)[0]]


# ---- what there is ------------------------------------------------------------------------------------------------


def test_a_folder_is_what_lies_in_it_by_name(tmp_path):
    for name in ("b.jpg", "a.png", ".hidden.jpg", "sub/c.jpg", "clip.MP4", "notes.txt", "x.jpg/y.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x")
    found, warnings = find_media(".")
    assert [(Path(one.path).name, one.is_video) for one in found] == [
        ("a.png", False),
        ("b.jpg", False),
        ("clip.MP4", True),
    ]
    assert warnings == ["2 subfolders are not searched: --source './**/*' takes them"]


def test_the_glob_that_takes_the_folders_below_is_right_for_any_name():
    picture("a [1]/b/c.jpg")
    with pytest.raises(UserError, match="1 subfolder is not searched") as caught:
        find_media("a [1]")
    assert paths(str(caught.value).split("'")[1]) == ["a [1]/b/c.jpg"]


def test_photos_of_cameras_are_warned_of_unless_they_are_there_as_images_too():
    for name in ("a.jpg", "a.cr2", "b.heic"):
        Path(name).write_bytes(b"x")
    found, warnings = find_media(".")
    assert [Path(one.path).name for one in found] == ["a.jpg"]
    assert len(warnings) == 1 and "b.heic" in warnings[0]


def test_globs_go_down_and_take_only_images_and_videos():
    for name in ("p/a.jpg", "p/q/b.jpg", "p/q/c.txt", "p/d.mov"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    assert paths("p/*") == ["p/a.jpg", "p/d.mov"]
    assert paths("p/**/*.*") == ["p/a.jpg", "p/d.mov", "p/q/b.jpg"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file():
    picture("photo[1].jpg")
    assert paths("photo[1].jpg") == ["photo[1].jpg"]


def test_a_file_whose_name_says_nothing_is_looked_into():
    picture("a.png")
    film("b.avi", 2)
    Path("a.png").rename("photo")
    Path("b.avi").rename("film")
    assert [one.is_video for name in ("photo", "film") for one in find_media(name)[0]] == [False, True]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_file_to_wait_for(tmp_path):
    os.mkfifo("pipe.jpg")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        find_media("pipe.jpg")
    with pytest.raises(UserError, match="no image or video in this folder"):
        find_media(".")


@pytest.mark.parametrize("source", ["", "\0", "x" * 5000, "a\nb", "~nobody/x", "[", "rtsp://camera/1", "/dev/video7"])
def test_no_source_is_a_traceback(source):
    with pytest.raises(UserError):
        find_media(source)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_pictures_come_in_order_with_the_base_images_of_evaluation():
    for number in range(20):
        picture(f"in/{number:02}.png", value=number, size=(48 + number, 640 - 9 * number))
    film("in/05.avi", 6)
    Path("in/07a.png").write_bytes(b"nothing")
    found, _ = find_media("in")
    looks = list(read_media(found, 320, keep=True))
    assert [look.source for look in looks] == sorted(look.source for look in looks)
    assert [look.frame for look in looks if isinstance(look, Picture) and look.rate] == [1, 2, 3, 4, 5, 6]
    assert [Path(found[look.source].path).name for look in looks if isinstance(look, Problem)] == ["07a.png"]
    for look in looks:
        if isinstance(look, Picture) and not look.frame:
            path = found[look.source].path
            assert np.array_equal(look.pixels, cv2.imread(path))
            store = plain_store(np.array([look.size]))
            object.__setattr__(store, "path", lambda image, path=path: path)
            assert np.array_equal(look.base, BaseImages(store=store, imgsz=320, area=True)(0))


def test_how_many_pictures_there_will_be_is_known_beforehand():
    picture("in/a.png")
    film("in/b.avi", 6)
    Path("in/c.avi").write_bytes(b"nothing")
    assert count_pictures(find_media("in")[0]) == 7


def test_no_memory_for_base_images_is_an_error_of_memory():
    with pytest.raises(MemoryError):
        picture_of(np.zeros((64, 64, 3), np.uint8), 10_000_000)


def test_pixels_are_dropped_unless_asked_for():
    image = np.zeros((48, 640, 3), np.uint8)
    assert picture_of(image, 64).pixels is None
    assert picture_of(image, 64, keep=True).pixels is image


def test_reading_stops_where_nobody_listens_any_more():
    film("long.avi", 200)
    before = threading.active_count()
    looks = read_media(find_media("long.avi")[0], 32, keep=False)
    assert next(looks).frame == 1
    looks.close()
    assert threading.active_count() == before


def test_what_waits_fits_into_memory(monkeypatch):
    monkeypatch.setattr(media, "READ_AHEAD_BYTES", 1000)
    begun = []
    with ThreadPoolExecutor(2) as pool:
        started = (begun.append(number) or pool.submit(lambda: b"x" * 300) for number in range(50))
        items = read_ahead(started, len)
        for taken in range(1, 51):
            next(items)
            assert len(begun) - taken <= 3
        assert next(items, None) is None


def test_small_items_are_read_far_ahead():
    release = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        items = read_ahead((pool.submit(lambda: b"small") for _ in range(500)), len)
        next(items)
        begun = []
        more = read_ahead((begun.append(1) or pool.submit(release.wait, 5) for _ in range(500)), lambda item: 5)
        release.set()
        next(more)
        next(more)
        assert len(begun) > 32
        more.close()
