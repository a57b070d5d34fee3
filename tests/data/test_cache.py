import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from utils.data import cache
from utils.data.cache import CachedImages, NoRoom, cached_images, remove_abandoned, summary
from utils.data.images import BaseImages
from utils.data.scan import scan_split
from utils.structures import DatasetSpec, UserError

IMGSZ = 48
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path) -> Path:
    """In place of /dev/shm, an empty folder."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(cache, "_MEMORY", folder)
    return folder


@pytest.fixture
def spec(make_dataset) -> DatasetSpec:
    return make_dataset({"train": {f"{n}.png": None for n in range(7)}, "val": {f"{n}.png": None for n in range(3)}})


@pytest.fixture
def splits(spec) -> dict[str, BaseImages]:
    return {
        split: BaseImages(store=scan_split(spec, split)[0], imgsz=IMGSZ, area=split == "val")
        for split in ("train", "val")
    }


def files_in(folder: Path) -> list[str]:
    """But for those of labels."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".cache")


def assert_same(found: CachedImages, expected: BaseImages) -> None:
    assert len(found) == len(expected.store)
    for image in range(len(found)):
        np.testing.assert_array_equal(found(image), expected(image))


# ---- content


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached_images_are_those_of_the_files(kind, splits, spec):
    caches = cached_images(splits, kind, spec=spec)
    for split, images in splits.items():
        assert_same(caches[split], images)
        assert caches[split](0).dtype == np.uint8
        assert not caches[split](0).flags.writeable
        assert caches[split].size == sum(images(image).nbytes for image in range(len(images.store)))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_another_process_maps_the_file_and_gets_no_copy(kind, splits, spec):
    found = cached_images(splits, kind, spec=spec)["train"]
    sent = pickle.dumps(found)
    assert len(sent) < 500
    assert_same(pickle.loads(sent), splits["train"])


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_second_run_finds_what_the_first_built(kind, splits, spec, monkeypatch):
    first = cached_images(splits, kind, spec=spec)
    monkeypatch.setattr(BaseImages, "__call__", None)  # nothing is decoded
    second = cached_images(splits, kind, spec=spec)
    assert [one.built for one in first.values()] == [True, True]
    assert [one.built for one in second.values()] == [False, False]
    assert second["train"].path == first["train"].path


def test_the_user_reads_what_is_cached_and_where(splits, spec, memory):
    assert summary("ram", cached_images(splits, "ram", spec=spec)).replace("0.0 MiB", "1 MiB") == (
        f"Images cached in memory: train (7, 1 MiB, built), val (3, 1 MiB, built); in {memory}"
    )
    caches = cached_images({"train": splits["train"]}, "disk", spec=spec)
    caches |= cached_images(splits, "disk", spec=spec)
    assert summary("disk", caches).startswith("Images cached on disk: train (7, 0.0 MiB, found), val (3, ")


def test_whatever_changes_the_pixels_makes_another_file(splits, spec, monkeypatch):
    images = splits["train"]
    store = images.store
    changes = [
        images,
        replace(images, imgsz=IMGSZ + 1),
        replace(images, area=True),
        replace(images, store=replace(store, digests=store.digests + np.uint64(1))),
    ]
    paths = {cached_images({"train": each}, "disk", spec=spec)["train"].path for each in changes}
    monkeypatch.setattr(cv2, "__version__", "99")
    paths.add(cached_images({"train": images}, "disk", spec=spec)["train"].path)
    assert len(paths) == 5
    names = [f".data-train-{IMGSZ}-*.images", f".data-train-{IMGSZ + 1}-*.images"]  # for those who clear up
    assert [len(list(spec.root.glob(name))) for name in names] == [4, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"x" * len(data),
        lambda data: data[:30] + b"\xff" * 60 + data[90:],
        lambda data: data.replace(b'"key"', b'"kex"', 1),
    ],
)
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_damaged_file_is_built_anew(kind, damage, splits, spec, memory):
    first = cached_images(splits, kind, spec=spec)["train"]
    path, data = first.path, first.path.read_bytes()
    del first
    path.write_bytes(damage(data))
    again = cached_images(splits, kind, spec=spec)
    assert again["train"].built
    assert path.read_bytes() == data
    assert_same(again["train"], splits["train"])


# ---- places


def test_disk_caches_lie_beside_the_data_and_stay(splits, spec, memory):
    cached_images(splits, "disk", spec=spec)
    names = files_in(spec.root)
    assert [name.rsplit("-", 1)[0] for name in names] == [f".data-train-{IMGSZ}", f".data-val-{IMGSZ}"]
    assert not files_in(memory)


def test_where_data_cannot_be_written_to_the_users_folder_takes_them(splits, spec, home, monkeypatch):
    """As root, who runs such tests in containers, may write anywhere, the question is answered by hand."""
    honest = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != spec.root and honest(path, mode))
    found = cached_images(splits, "disk", spec=spec)["train"]
    assert found.path.parent == home / ".cache/yolo-trainer"
    assert not cached_images(splits, "disk", spec=spec)["train"].built
    monkeypatch.undo()
    assert not files_in(spec.root)


def test_a_cache_in_a_read_only_folder_is_found(splits, spec, monkeypatch):
    path = cached_images(splits, "disk", spec=spec)["train"].path
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cached_images(splits, "disk", spec=spec)["train"].path == path


def test_cache_dir_is_made_and_used(splits, spec, tmp_path):
    folder = tmp_path / "some/where"
    found = cached_images(splits, "disk", spec=spec, cache_dir=str(folder))
    assert {one.path.parent for one in found.values()} == {folder}
    assert not files_in(spec.root)
    (tmp_path / "file").touch()
    with pytest.raises(NoRoom, match=r"^--cache disk: .*file/x: Not a directory; "):
        cached_images(splits, "disk", spec=spec, cache_dir=str(tmp_path / "file/x"))


# ---- room


def room(monkeypatch, *, disk: float = 1e15, memory: float = 1e15) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    monkeypatch.setattr(cache, "_free_memory", lambda: memory)


def size_of(splits, spec) -> int:
    return sum(cache._Content.of(split, images, spec).size for split, images in splits.items())


@pytest.mark.parametrize(
    ("kind", "free", "says"),
    [
        (
            "disk",
            {"disk": 10e3},
            r"^--cache disk: the images take 0\.1 MiB, and of the 0\.0 MiB free in .*/set they may take 95%; "
            "name a larger disk with --cache-dir, lower --imgsz, or leave out --cache$",
        ),
        (
            "ram",
            {"disk": 10e3},
            r"free in .*/shm they may take 80%; raise its size \(in a container: --shm-size\), use",
        ),
        ("ram", {"memory": 10e3}, "free in memory they may take 80%; use --cache disk, lower --imgsz, or leave out"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(kind, free, says, splits, spec, memory, monkeypatch):
    room(monkeypatch, **free)
    monkeypatch.setattr(BaseImages, "__call__", None)
    with pytest.raises(NoRoom, match=says):
        cached_images(splits, kind, spec=spec)
    assert not files_in(spec.root)
    assert not files_in(memory)


@pytest.mark.parametrize(("kind", "share"), [("ram", 0.8), ("disk", 0.95)])
def test_the_size_is_known_to_the_byte(kind, share, splits, spec, monkeypatch):
    size = size_of(splits, spec)
    room(monkeypatch, disk=(size - 1) / share, memory=(size - 1) / share)
    with pytest.raises(NoRoom):
        cached_images(splits, kind, spec=spec)
    room(monkeypatch, disk=(size + 1) / share, memory=(size + 1) / share)
    found = cached_images(splits, kind, spec=spec)
    room(monkeypatch, disk=0, memory=0)  # what is there needs no room
    again = cached_images(splits, kind, spec=spec)
    assert sum(one.path.stat().st_size for one in again.values()) == size
    assert found["train"].path == again["train"].path


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_disk_that_fills_up_meanwhile_is_one_line_and_leaves_nothing(kind, call, splits, spec, memory, monkeypatch):
    calls, honest = [], getattr(os, call)

    def full(*arguments):
        calls.append(arguments)
        if call == "posix_fallocate" or len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(NoRoom, match=rf"^--cache {kind}: .*\.images: No space left on device; leave out --cache"):
        cached_images(splits, kind, spec=spec)
    assert not files_in(spec.root)
    assert not files_in(memory)


def test_file_systems_that_cannot_reserve_room_are_fine(splits, spec, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    assert_same(cached_images(splits, "disk", spec=spec)["train"], splits["train"])


def test_writes_may_be_cut_short_and_pwrite_may_be_missing(splits, spec, monkeypatch):
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, position: honest(handle, data[:1000], position))
    first = cached_images(splits, "disk", spec=spec)["train"]
    assert_same(first, splits["train"])
    data = first.path.read_bytes()
    first.path.unlink()
    monkeypatch.delattr(os, "pwrite")  # Windows
    monkeypatch.delattr(os, "posix_fallocate")
    assert cached_images(splits, "disk", spec=spec)["train"].path.read_bytes() == data


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_the_memory_of_its_control_group(version, tmp_path, monkeypatch):
    name, group, most, used, stat = (
        ("memory", "memory/docker/x", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 20\nx 1")
        if version == 1
        else ("", "docker/x", "memory.max", "memory.current", "inactive_file 20\nanon 1")
    )
    folder = tmp_path / "cgroup" / group
    folder.mkdir(parents=True)
    (folder / most).write_text("1000\n")
    (folder / used).write_text("300\n")
    (folder / "memory.stat").write_text(stat)
    monkeypatch.setattr(cache, "_CGROUPS", tmp_path / "cgroup")
    honest = Path.read_text
    listed = f"3:cpu:/other\n0:{name}:/docker/x/below\n"
    monkeypatch.setattr(Path, "read_text", lambda path: listed if str(path) == "/proc/self/cgroup" else honest(path))
    assert cache._free_memory() == 720
    (folder / most).write_text("max\n")
    assert cache._free_memory() > 1e6


# ---- half-written files


def test_an_image_that_vanished_is_named_and_leaves_no_file(splits, spec, memory):
    path = Path(splits["val"].store.path(1))
    path.unlink()
    for kind in ("ram", "disk"):
        with pytest.raises(UserError, match=f"^{path}: No such file or directory, though it was fine"):
            cached_images(splits, kind, spec=spec)
        assert not any(name.endswith(".partial") for name in [*files_in(memory), *files_in(spec.root)])
    assert not files_in(memory)  # nor that of train, which was whole


@dataclass(frozen=True, kw_only=True)
class Slow(BaseImages):
    """Says in a file that it was asked, and waits for another."""

    def __call__(self, image: int) -> np.ndarray:
        with Path(os.environ["ASKED"]).open("a") as file:
            file.write(f"{image}\n")
        until(Path(os.environ["GO_ON"]).exists)
        return super().__call__(image)


@pytest.fixture
def go_on(monkeypatch, tmp_path) -> Path:
    """What the slow ones wait for."""
    monkeypatch.setenv("GO_ON", str(tmp_path / "go_on"))
    return tmp_path / "go_on"


@pytest.fixture
def asked(monkeypatch, tmp_path, go_on) -> Path:
    """What they write."""
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def slow(splits) -> dict[str, Slow]:
    return {split: Slow(**vars(images)) for split, images in splits.items()}


def in_process(work) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_of_two_runs_at_once_one_builds_and_the_other_waits(kind, splits, spec, asked, go_on):
    other = in_process(lambda: (cached_images(slow(splits), kind, spec=spec), time.sleep(600)))
    try:
        until(asked.exists)
        notes = []

        def note(line: str) -> None:
            notes.append(line)
            go_on.touch()

        found = cached_images(slow(splits), kind, spec=spec, note=note)
        assert not found["train"].built
        assert notes[0].startswith("waiting for another run that builds /")
        assert_same(found["train"], splits["train"])
        assert len(asked.read_text().split()) == 10  # val may be built by either
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_a_killed_builder_left_is_never_used(kind, splits, spec, asked, memory):
    other = in_process(lambda: cached_images(slow(splits), kind, spec=spec))
    until(asked.exists)
    other.kill()
    other.join()
    folder = memory if kind == "ram" else spec.root
    [left] = files_in(folder)
    assert left.endswith(".images.partial")
    found = cached_images(splits, kind, spec=spec)
    assert all(one.built for one in found.values())
    assert_same(found["train"], splits["train"])
    assert not any(name.endswith(".partial") for name in files_in(folder))


# ---- the life of a cache in memory


def test_a_cache_in_memory_goes_with_its_last_user(splits, spec, memory):
    first = cached_images(splits, "ram", spec=spec)
    second = cached_images({"train": splits["train"]}, "ram", spec=spec)
    assert len(files_in(memory)) == 2
    del first
    assert [name.split("-")[3] for name in files_in(memory)] == ["train"]
    assert_same(second["train"], splits["train"])
    del second
    assert not files_in(memory)


def test_a_cache_stays_while_another_run_uses_it(splits, spec, memory, tmp_path):
    def use() -> None:
        mine = cached_images(splits, "ram", spec=spec)
        (tmp_path / "using").touch()
        until((tmp_path / "end").exists)
        assert_same(mine["train"], splits["train"])

    first = cached_images(splits, "ram", spec=spec)
    other = in_process(use)
    until((tmp_path / "using").exists)
    del first
    assert len(files_in(memory)) == 2
    remove_abandoned()
    assert len(files_in(memory)) == 2
    (tmp_path / "end").touch()
    other.join(30)
    assert other.exitcode == 0


def test_a_forked_process_has_no_say_in_the_life_of_a_cache(splits, spec, memory):
    mine = cached_images(splits, "ram", spec=spec)
    child = in_process(lambda: mine.clear())
    child.join(30)
    assert child.exitcode == 0
    assert len(files_in(memory)) == 2


@pytest.mark.parametrize("later", ["any run", "the same"])
def test_what_a_killed_run_left_in_memory_goes_with_the_next(later, splits, spec, memory, tmp_path):
    other = in_process(
        lambda: (
            cached := cached_images(splits, "ram", spec=spec),
            (tmp_path / "built").touch(),
            time.sleep(600),
            cached,
        )
    )
    until((tmp_path / "built").exists)
    other.kill()
    other.join()
    assert len(files_in(memory)) == 2
    if later == "any run":
        remove_abandoned()
    else:
        smaller = {split: replace(images, imgsz=32) for split, images in splits.items()}
        assert all(one.built for one in cached_images(smaller, "ram", spec=spec).values())
    assert not files_in(memory)


def test_what_a_killed_run_left_is_used_when_it_is_what_is_wanted(splits, spec, memory):
    other = in_process(lambda: (cached_images(splits, "ram", spec=spec), os.kill(os.getpid(), signal.SIGKILL)))
    other.join(30)
    for name in files_in(memory):
        assert (memory / name).stat().st_mode & 0o077 == 0
    found = cached_images(splits, "ram", spec=spec)
    assert_same(found["train"], splits["train"])


def test_files_and_links_of_others_are_left_alone(splits, spec, memory, tmp_path):
    (tmp_path / "mine").write_text("content")
    (memory / "something").touch()
    name = cache._Content.of("train", splits["train"], spec).name(in_memory=True)
    (memory / f"{name}.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(NoRoom):
        cached_images({"train": splits["train"]}, "ram", spec=spec)
    assert (tmp_path / "mine").read_text() == "content"
    assert (memory / "something").exists()


def test_a_process_that_ends_leaves_nothing_in_memory(splits, spec, memory):
    """At the end of the interpreter, too."""
    code = f"""
import pickle, sys
from pathlib import Path
from utils.data import cache
cache._MEMORY = Path({str(memory)!r})
splits, spec = pickle.load(open({str(memory.parent / "given")!r}, 'rb'))
held = cache.cached_images(splits, 'ram', spec=spec)
print(len(list(cache._MEMORY.iterdir())))
"""
    (memory.parent / "given").write_bytes(pickle.dumps((splits, spec)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert not files_in(memory)
