"""Image caches: the base images of a split in one memory-mapped file, for all loader processes, ranks and later runs.

A file gets its name when it is whole, so a half-written one is never used. One in memory (/dev/shm) is removed by the
last run that uses it; runs know of each other by locks on it, which the system drops however a run ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.config import CacheKind
from utils.data.images import BaseImages, base_shapes
from utils.data.pool import by_threads
from utils.data.probe import overheard
from utils.files import array_layout, cache_folder, read_arrays, try_lock
from utils.machine import usable_cores
from utils.structures import DatasetSpec, UserError

_SCHEMA = 1  # raise it when the pixels of base images change, or the layout of the file
_MEMORY = Path("/dev/shm")  # Linux; elsewhere a temporary file is in the system's page cache, which is as good
_CGROUPS = Path("/sys/fs/cgroup")
_SHARE = {"ram": 0.8, "disk": 0.95}  # of what is free, that caches may take; training wants memory, too
_WAIT_S = 0.2  # between looks at whether another run has built what this one wants

# What posix_fallocate says of file systems that cannot
_CANNOT_RESERVE = (errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOSYS)

Progress = Callable[[Iterable, str], Iterable]  # (items, description) -> the same items


class NoRoom(UserError):
    """A cache does not fit, or its place cannot be written; without it, all would go on."""


class CachedImages:
    """The ImageSource that reads a cache file. A loader process that is not forked maps the file again."""

    def __init__(self, path: Path, key: str, lease: _Lease | None = None, *, built: bool = False) -> None:
        """Raises OSError or ValueError where there is no whole cache of this key."""
        arrays, meta = read_arrays(path)
        if meta["key"] != key:
            raise ValueError(f"not the cache that is wanted: {path}")
        self.path, self.built = path, built
        self._key, self._lease = key, lease
        self._shapes, self._starts, self._pixels = (arrays[name] for name in ("shapes", "starts", "pixels"))

    @property
    def size(self) -> int:
        """Bytes."""
        return self._pixels.nbytes

    def __len__(self) -> int:
        return len(self._shapes)

    def __call__(self, image: int) -> np.ndarray:
        (height, width), start = self._shapes[image].tolist(), int(self._starts[image])
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    def release(self) -> None:
        """No longer in use by this process: one in memory goes with its last user."""
        if self._lease is not None:
            self._lease.end()

    def __reduce__(self) -> tuple[type, tuple]:
        return CachedImages, (self.path, self._key)


def cached_images(
    splits: Mapping[str, BaseImages],
    kind: CacheKind,
    *,
    spec: DatasetSpec,
    cache_dir: str = "",
    progress: Progress | None = None,
    note: Callable[[str], object] | None = None,
) -> dict[str, CachedImages]:
    """A cache of the images of each split, built where there is none. It stays at least as long as it is in use.

    Raises NoRoom when they do not fit, before any work, and UserError for an image that is no longer what it was.
    """
    contents = {split: _Content.of(split, images, spec) for split, images in splits.items()}
    folders = _folders(kind, spec, cache_dir)
    names = {split: one.name(in_memory=kind == "ram") for split, one in contents.items()}
    remove_abandoned(keep=names.values())
    caches = {
        split: _found([folder / name for folder in folders], contents[split].key) for split, name in names.items()
    }
    missing = [split for split, cache in caches.items() if cache is None]
    if missing:
        folder = _writable(folders, kind)
        to_write = [split for split in missing if not _others_build(folder / names[split], note)]
        _check_room(kind, folder, size=sum(contents[split].size for split in to_write))
        with ExitStack() as leave:
            for cache in filter(None, caches.values()):
                leave.callback(cache.release)
            for split in missing:
                caches[split] = _built(folder / names[split], contents[split], kind, progress)
                leave.callback(caches[split].release)
            leave.pop_all()  # nothing went wrong
    return caches


def remove_abandoned(keep: Container[str] = ()) -> None:
    """Remove what runs left in memory that were killed, which nobody holds a lock on; not files of the names `keep`."""
    for path in _memory().glob(f"{_ours()}.*"):
        if path.name not in keep:
            _removed(path)


def summary(kind: CacheKind, caches: Mapping[str, CachedImages]) -> str:
    """One line for the user: what is cached, its size, where, and whether it was there already."""
    parts = [
        f"{split} ({len(cache):,}, {_size(cache.size)}, {'built' if cache.built else 'found'})"
        for split, cache in caches.items()
    ]
    where = " and ".join(dict.fromkeys(str(cache.path.parent) for cache in caches.values()))
    return f"Images cached {'in memory' if kind == 'ram' else 'on disk'}: {', '.join(parts)}; in {where}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What a cache file should hold, and where in it."""

    label: str  # for the name of the file
    images: BaseImages
    shapes: np.ndarray  # (I, 2) i32 of base images
    starts: np.ndarray  # (I,) i64 among the pixels
    header: bytes
    layout: Mapping[str, int]  # where in the file each array starts
    size: int  # of the file, bytes
    key: str

    @classmethod
    def of(cls, split: str, images: BaseImages, spec: DatasetSpec) -> _Content:
        shapes = base_shapes(images.store.sizes, images.imgsz)
        ends = np.cumsum(3 * shapes.prod(1, dtype=np.int64))
        kinds = {
            "shapes": (shapes.dtype, shapes.shape),
            "starts": (ends.dtype, ends.shape),
            "pixels": (np.dtype(np.uint8), (int(ends[-1]),)),
        }
        key = _content_key(images)
        header, layout = array_layout(kinds, {"key": key})
        return cls(
            label=f"{spec.source.stem}-{split}-{images.imgsz}",
            images=images,
            shapes=shapes,
            starts=np.concatenate([[0], ends[:-1]]),
            header=header,
            layout=layout,
            size=layout["pixels"] + int(ends[-1]),
            key=key,
        )

    def name(self, *, in_memory: bool) -> str:
        """In a folder that all may write to, a name tells users apart."""
        return f"{_ours() if in_memory else ''}.{self.label}-{self.key[:8]}.images"


def _ours() -> str:
    """What the names of our files in memory begin with."""
    return f"yolo-trainer-{getattr(os, 'getuid', int)()}"


def _content_key(images: BaseImages) -> str:
    """Of all that the pixels depend on. Another OpenCV may decode a little differently."""
    store = images.store
    digest = blake2b(f"{_SCHEMA} {cv2.__version__} {images.imgsz} {images.area}\n".encode(), digest_size=16)
    for array in (store.path_bytes, store.path_offsets, store.digests, store.sizes):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ---- places -------------------------------------------------------------------------------------------------------


def _folders(kind: CacheKind, spec: DatasetSpec, cache_dir: str) -> list[Path]:
    """Where a cache may lie, the best place first."""
    if kind == "ram":
        return [_memory()]
    return [Path(cache_dir).expanduser()] if cache_dir else [spec.root, cache_folder()]


def _memory() -> Path:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _writable(folders: Iterable[Path], kind: CacheKind) -> Path:
    """The first that files can be made in; the last is made if need be, the others belong to the data."""
    *beside, last = folders
    for folder in beside:
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder
    with _as_no_room(kind, last):
        last.mkdir(parents=True, exist_ok=True)
    if not os.access(last, os.W_OK):
        raise NoRoom(f"--cache {kind}: {last} cannot be written; name another folder with --cache-dir")
    return last


def _check_room(kind: CacheKind, folder: Path, *, size: int) -> None:
    """Raises NoRoom where `size` bytes are too many."""
    free, place = shutil.disk_usage(folder).free, str(folder)
    remedy = "name a larger disk with --cache-dir, lower --imgsz, or leave out --cache"
    if kind == "ram":
        remedy = "use --cache disk, lower --imgsz, or leave out --cache"
        memory = _free_memory()
        if folder == _MEMORY and free < memory:
            remedy = f"raise its size (in a container: --shm-size), {remedy}"
        elif memory < free:
            free, place = memory, "memory"
    if size > _SHARE[kind] * free:
        raise NoRoom(
            f"--cache {kind}: the images take {_size(size)}, and of the {_size(free)} free in {place} they may take "
            f"{_SHARE[kind]:.0%}; {remedy}"
        )


def _free_memory() -> float:
    """Bytes that this machine has free, or this container; infinity where nobody says."""
    free = [float("inf")]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    return min(free + [room for folder in _memory_groups() if (room := _room_in(folder)) is not None])


def _memory_groups() -> Iterator[Path]:
    """The control groups, and those around them, that bound the memory of this process."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # version 2, or the one of version 1 that matters
                top = _CGROUPS / controllers
                group = top / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _room_in(group: Path) -> int | None:
    """Bytes that a control group may still take; None where it has no limit."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such file, or `max`
            most, used = (int((group / name).read_text()) for name in (limit, usage))
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(most - used + int(counts.get(cached, 0)), 0)  # files read once give way
    return None


# ---- files and their locks ----------------------------------------------------------------------------------------


class _Lease:
    """A cache file in use: a shared lock that lasts as long as this object, or as the process."""

    def __init__(self, handle: int, path: Path) -> None:
        self.end = weakref.finalize(self, _end_lease, handle, path, os.getpid())


def hold(path: Path) -> _Lease | None:
    """Keep a cache file for others, until this process lets go of it or ends; None where it is gone."""
    with suppress(OSError):
        handle = _open(path, os.O_RDONLY)
        if try_lock(handle, exclusive=False) and _is_at(handle, path):
            return _Lease(handle, path)
        os.close(handle)
    return None


def _end_lease(handle: int, path: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked loader process has no say in it
        return
    if _is_temporary(path) and try_lock(handle) and _is_at(handle, path):
        with suppress(OSError):
            path.unlink()
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file: who waits for a lock may get that of a removed one."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    return False


def _open(path: Path, flags: int) -> int:
    """Never follows a link: in a folder that all may write, it might lead anywhere. Raises OSError."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o600 if _is_temporary(path) else 0o666)


def _is_temporary(path: Path) -> bool:
    """Whether a file goes with its last user."""
    return path.name.startswith(_ours())


def _found(paths: Iterable[Path], key: str) -> CachedImages | None:
    """The first whole cache of this key among the paths, from now on in use."""
    for path in paths:
        try:
            handle = _open(path, os.O_RDONLY)
        except OSError:
            continue
        lease = _Lease(handle, path)
        with suppress(OSError, ValueError, KeyError, TypeError):  # gone, damaged, or of other content
            if try_lock(handle, exclusive=False) and _is_at(handle, path) and _is_mine(handle, path):
                return CachedImages(path, key, lease)
        lease.end()
    return None


def _is_mine(handle: int, path: Path) -> bool:
    """Whether nobody else can have made a file in memory."""
    return not (_is_temporary(path) and hasattr(os, "getuid")) or os.fstat(handle).st_uid == os.getuid()


def _removed(path: Path) -> bool:
    """Whether nobody held a lock on the file, which is gone then."""
    try:
        handle = _open(path, os.O_RDWR)
    except OSError:
        return not path.exists()
    try:
        if not (try_lock(handle) and _is_at(handle, path)):
            return False
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


# ---- building -----------------------------------------------------------------------------------------------------


def _partial(path: Path) -> Path:
    """What a cache is called until it is whole. Its builder holds a lock on it."""
    return path.with_name(path.name + ".partial")


def _others_build(path: Path, note: Callable[[str], object] | None) -> bool:
    """Whether another run is building this cache; what one left that was killed is removed."""
    if _removed(_partial(path)):
        return False
    if note is not None:
        note(f"waiting for another run that builds {path}")
    return True


def _built(path: Path, content: _Content, kind: CacheKind, progress: Progress | None) -> CachedImages:
    """The cache at `path`, built here, or by another run that is at it already."""
    with _as_no_room(kind, path):
        while True:
            cache = _found([path], content.key)
            if cache is None:
                cache = _build(path, content, progress, durable=kind == "disk")
            if cache is not None:
                return cache
            time.sleep(_WAIT_S)


def _build(path: Path, content: _Content, progress: Progress | None, *, durable: bool) -> CachedImages | None:
    """None where another run is at it, or just was."""
    partial = _partial(path)
    handle = _open(partial, os.O_RDWR | os.O_CREAT)
    lease = _Lease(handle, path)
    if not (try_lock(handle) and _is_at(handle, partial)):
        lease.end()
        return None
    try:
        if (cache := _found([path], content.key)) is not None or _is_fresh(path):
            partial.unlink()
            return cache
        _fill(handle, content, progress)
        if durable:
            os.fsync(handle)
        with suppress(FileNotFoundError):  # without locks, another run may have done it
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    try_lock(handle, exclusive=False)
    return CachedImages(path, content.key, lease, built=True)


def _is_fresh(path: Path) -> bool:
    """Whether the builder of a cache has yet to give up its lock."""
    try:
        handle = _open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_lock(handle, exclusive=False)
    finally:
        os.close(handle)


@contextmanager
def _as_no_room(kind: CacheKind, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoRoom(f"--cache {kind}: {path}: {error.strerror}; leave out --cache, or make room") from None


def _fill(handle: int, content: _Content, progress: Progress | None) -> None:
    """Write the whole file. By system calls: a full disk is an error to them, and the end of a process to a map."""
    _reserve(handle, content.size)
    _write_at(handle, content.header, 0)
    for name, array in (("shapes", content.shapes), ("starts", content.starts)):
        _write_at(handle, array, content.layout[name])

    def put(image: int) -> None:
        position = content.layout["pixels"] + int(content.starts[image])
        _write_at(handle, np.ascontiguousarray(content.images(image)), position)

    numbers = range(len(content.starts))
    watched = progress(numbers, f"Caching {content.label}") if progress else numbers
    with closing(by_threads(put, numbers, usable_cores())) as written, overheard():
        for _ in zip(watched, written):
            pass


def _reserve(handle: int, size: int) -> None:
    """Take all the room at once, where the file system can; what an earlier builder left is of the same content."""
    os.ftruncate(handle, size)
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise


def _write_at(handle: int, data: Any, position: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, position) if hasattr(os, "pwrite") else _pwrite(handle, view, position)
        view, position = view[written:], position + written


_one_at_a_time = threading.Lock()


def _pwrite(handle: int, data: memoryview, position: int) -> int:
    """For Windows."""
    with _one_at_a_time:
        os.lseek(handle, position, os.SEEK_SET)
        return os.write(handle, data)
