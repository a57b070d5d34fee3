"""The cache of a scan: one file per split, found again by what the split lists.

It is keyed by paths, sizes and modification times of all images and label files, so a moved, changed or foreign data
set is scanned anew. The surprise: findings of the listing itself, such as a label file without an image, depend on more
than that, the `surroundings`; where these have changed the scan is kept, and only the listing is judged anew.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.coco import CocoSource
from utils.data.findings import Findings, ScanReport, copies, map_findings
from utils.data.labels import Source
from utils.data.sources import EMPTY_ENTRY, FOREIGN_PHOTO
from utils.data.store import map_store
from utils.files import cache_folder, read_arrays, remove_unfinished, write_arrays
from utils.structures import DatasetSpec, LabelStore, UserError

_SCHEMA = 7  # raise it when LabelStore, the probe or the checks change
_AT_ONCE = 4096  # files digested in one go
_TICK_S = 2.0  # of the coarsest clock of a file system
_OF_FINDINGS = tuple(item.name for item in fields(Findings))
_COUNTS = ("images", "skipped", "background", "boxes", "crowds", "turned")  # of a report, kept as JSON
_LISTS = ("class_counts", "notes")  # likewise, tuples


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a cache file holds."""

    store: LabelStore
    report: ScanReport  # with the findings in files
    listed: Findings  # findings of the listing
    surroundings: str


def cache_files(spec: DatasetSpec, split: str, cache_dir: str) -> list[Path]:
    """Where the cache may lie: in `cache_dir` alone, else beside the data or, the second best, in the user's folder.

    Where caches of several data sets meet, names tell them apart. Raises UserError where `cache_dir` cannot be used.
    """
    whose = blake2b(os.fsencode(spec.source), digest_size=6).hexdigest()
    named = f"{spec.source.stem}-{whose}-{split}.cache"
    if not cache_dir:
        return [spec.root / f".{spec.source.stem}-{split}.cache", cache_folder() / named]
    folder = Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache-dir {cache_dir}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--cache-dir {cache_dir}: cannot be written")
    return [folder.resolve() / named]


def load(files: Sequence[Path], split: str, key: str) -> Kept | None:
    """The cache of that key, mapped; None where it is missing, foreign or damaged."""
    for path in files:
        with suppress(OSError, ValueError, KeyError, TypeError):
            arrays, meta = read_arrays(path)
            if meta["key"] != key:
                continue
            store = map_store(path, key, arrays)
            counts = {name: meta["report"][name] for name in _COUNTS}
            counts |= {name: tuple(meta["report"][name]) for name in _LISTS}
            among = copies({split: store})[split]
            report = ScanReport(split=split, **counts, defects=_mapped(arrays, "found"), copies=among)
            listed = _mapped(arrays, "listed")
            return Kept(store=store, report=report, listed=listed, surroundings=meta["surroundings"])
    return None


def _mapped(arrays: Mapping[str, np.ndarray], prefix: str) -> Findings:
    return map_findings({name: arrays[f"{prefix}_{name}"] for name in _OF_FINDINGS})


def save(
    files: Sequence[Path], spec: DatasetSpec, split: str, listing: Listing, sources: Sequence[Source], kept: Kept
) -> None:
    """Write the cache to the first of `files` that takes it."""
    arrays = {item.name: getattr(kept.store, item.name) for item in fields(LabelStore)}
    for prefix, found in (("found", kept.report.defects), ("listed", kept.listed)):
        arrays |= {f"{prefix}_{name}": getattr(found, name) for name in _OF_FINDINGS}
    counts = {name: getattr(kept.report, name) for name in (*_COUNTS, *_LISTS)}
    meta = {"key": listing.key, "surroundings": kept.surroundings, "report": counts}
    if len(sources) == len(_split_entries(spec, split)) and all(
        isinstance(source, CocoSource) and all(map(os.path.exists, source.images)) for source in sources
    ):
        arrays["listing"], meta["listing"] = _written_listing(sources, spec, split)
    for path in files:
        with suppress(OSError):  # a read-only or full place costs a scan next time, nothing else
            if path.parent != spec.root:  # a root that does not exist is the user's to make
                path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path.parent, path.name)
            write_arrays(path, arrays, meta)
            return


# ---- listings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Digests of all that a scan depends on."""

    key: str  # for what is in the files
    surroundings: str  # for findings of the listing, which files beside those of the split can change


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The files of a source."""

    kind: str
    images: Sequence[str]
    label_files: Sequence[str]
    left_out: Sequence[str] = ()  # what a folder holds, or a folder, without being of use


def listing_of(sources: Sequence[Source], spec: DatasetSpec) -> Listing:
    files = [
        _Files(
            kind=type(source).__name__,
            images=source.images,
            label_files=source.label_files,
            left_out=[one.file for one in source.findings if one.problem in (EMPTY_ENTRY, FOREIGN_PHOTO)],
        )
        for source in sources
    ]
    return _digested(files, spec)


def remembered_listing(files: Sequence[Path], spec: DatasetSpec, split: str) -> Listing | None:
    """The listing of COCO files without parsing these, which can take a minute; None where it is not known.

    It is as good as `listing_of` if the cache has its key: then the files are as they were.
    """
    for path in files:
        with suppress(OSError, ValueError, KeyError, TypeError):
            arrays, meta = read_arrays(path)
            if meta["listing"]["entries"] != _entries(spec, split):
                continue
            images, sources = arrays["listing"].tobytes(), []
            for kind, label_file, start, end in meta["listing"]["sources"]:
                names = os.fsdecode(images[start:end]).split("\0")
                sources.append(_Files(kind=kind, images=names, label_files=[label_file]))
            return _digested(sources, spec)
    return None


def _written_listing(sources: Sequence[CocoSource], spec: DatasetSpec, split: str) -> tuple[np.ndarray, dict[str, Any]]:
    written, table = b"", []
    for source in sources:
        start = len(written)
        written += os.fsencode("\0".join(source.images))
        table.append([type(source).__name__, source.label_files[0], start, len(written)])
    return np.frombuffer(written, np.uint8), {"entries": _entries(spec, split), "sources": table}


def _split_entries(spec: DatasetSpec, split: str) -> tuple[Path, ...]:
    return spec.train if split == "val" and spec.val_fraction else getattr(spec, split)


def _entries(spec: DatasetSpec, split: str) -> list[str]:
    entries = _split_entries(spec, split)
    return [str(spec.val_fraction), *map(ascii, (os.fspath(entry) for entry in (spec.root, *entries)))]


def _digested(sources: Sequence[_Files], spec: DatasetSpec) -> Listing:
    digest = blake2b(json.dumps([_SCHEMA, spec.names]).encode(), digest_size=16)
    folders: dict[str, None] = {}
    for source in sources:
        digest.update(f"{source.kind} {len(source.images)}\n".encode())
        beside = {} if source.kind == CocoSource.__name__ else folders  # that file says all
        for paths in (source.images, source.label_files):
            _digest_files(digest, paths, beside)
    key = digest.hexdigest()
    digest.update(ascii((spec.train, spec.val, spec.test, spec.val_fraction)).encode())
    digest.update(ascii([name for source in sources for name in source.left_out]).encode())
    _digest_files(digest, list(folders), {})
    digest.update(_moment(folders))
    return Listing(key=key, surroundings=digest.hexdigest())


def _moment(folders: Iterable[str]) -> bytes:
    """Something new where a folder has changed a moment ago: it may change again, and its time may not tell."""
    for folder in folders:
        with suppress(OSError, ValueError):
            if os.stat(folder).st_mtime > time.time() - _TICK_S:  # noqa: PTH116 (hot)
                return str(time.time_ns()).encode()
    return b""


def _digest_files(digest: Any, paths: Sequence[str], folders: dict[str, None]) -> None:
    """Path, size and modification time of each file, of which some may not be there; adds their folders to those."""
    rest = iter(paths)
    while chunk := list(islice(rest, _AT_ONCE)):
        states = array("q")
        for path in chunk:
            try:
                status = os.stat(path)  # noqa: PTH116 (hot)
            except (OSError, ValueError):
                states.append(-1)
            else:
                states.append(status.st_size)
                states.append(status.st_mtime_ns)
        digest.update(os.fsencode("\0".join(chunk)))
        digest.update(states.tobytes())
        folders.update(dict.fromkeys([path[: path.rfind(os.sep)] for path in chunk]))
