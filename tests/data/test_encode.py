"""Videos and pictures written again."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data.encode import VideoFile, encoded


def frames_of(path: Path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (look := capture.read())[0]:
        frames.append(look[1])
    return frames


def test_a_video_is_there_when_it_is_whole(tmp_path):
    video = VideoFile(tmp_path, "clip", rate=29.97, size=(48, 64))
    for number in range(30):
        video.add(np.full((48, 64, 3), 8 * number, np.uint8))
        assert not video.path.exists()
    video.close()
    assert [path.name for path in tmp_path.iterdir()] == [video.path.name]
    frames = frames_of(video.path)
    assert len(frames) == 30
    assert [round(frame.mean() / 8) for frame in frames] == list(range(30))
    assert cv2.VideoCapture(str(video.path)).get(cv2.CAP_PROP_FPS) == pytest.approx(29.97, abs=0.01)


def test_frames_of_another_size_are_made_to_fit(tmp_path):
    video = VideoFile(tmp_path, "clip", rate=10, size=(48, 64))
    video.add(np.zeros((48, 64, 3), np.uint8))
    video.add(np.zeros((100, 30, 3), np.uint8))
    video.close()
    assert [frame.shape for frame in frames_of(video.path)] == [(48, 64, 3)] * 2


def test_a_video_without_frames_leaves_nothing(tmp_path):
    VideoFile(tmp_path, "clip", rate=10, size=(48, 64)).close()
    assert list(tmp_path.iterdir()) == []


def test_a_video_in_no_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"none/clip\.mp4") as caught:
        VideoFile(tmp_path / "none", "clip", rate=10, size=(48, 64))
    assert caught.value.strerror == "No such file or directory"


@pytest.mark.parametrize(
    ("suffix", "expected"), [(".jpg", ".jpg"), (".PNG", ".PNG"), (".jfif", ".jfif"), (".pgm", ".png"), ("", ".png")]
)
def test_pictures_keep_their_format_or_become_png(suffix, expected):
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    data, kept = encoded(cv2.GaussianBlur(image, (9, 9), 5), suffix)
    assert kept == expected
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 1).shape == image.shape


def test_what_a_format_cannot_hold_becomes_png():
    data, suffix = encoded(np.zeros((1, 70_000, 3), np.uint8), ".jpg")
    assert suffix == ".png" and data.startswith(b"\x89PNG")
