"""Looks at every image and label of a split once, reports what is wrong, and caches the result.

User files are never touched. The cache is keyed by the listing (paths, sizes, modification times), so a moved, changed
or foreign data set is scanned anew.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from utils.config import read_dataset
from utils.data.images import ImageError, decode_image, quiet_opencv
from utils.data.old_text import OUTSIDE, Finding, ImageLabels, label_path, list_images, read_labels, shown_path
from utils.data.shapes import ensure_shapes
from utils.data.store import build_store, single_class
from utils.files import cache_folder, read_arrays, write_arrays, write_text
from utils.structures import DatasetSpec, LabelStore, UserError

_SCHEMA = 2  # raise it when LabelStore or the checks change
_KINDS_SHOWN = 8  # kinds of findings on screen

Progress = Callable[[Iterable, str], Iterable]  # (items, description) -> the same items


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """What a scan saw. `findings` name file, line and problem."""

    split: str
    images: int  # usable
    skipped: int  # unusable
    background: int  # usable, without boxes
    boxes: int
    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """The report as a user reads it: counts, and of each kind of finding how many there are, with an example."""
        counts = f"{self.split}: {self.images} images, {self.boxes} boxes, {self.background} without boxes"
        if self.skipped:
            counts += f", {self.skipped} skipped"
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.problem, []).append(finding)
        often = sorted(kinds.values(), key=len, reverse=True)
        lines = [_first_of(alike) for alike in often[:_KINDS_SHOWN]]
        if len(often) > _KINDS_SHOWN:
            lines.append(f"  {sum(map(len, often[_KINDS_SHOWN:]))} other findings")
        return [counts, *lines]


def _first_of(alike: Sequence[Finding]) -> str:
    more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
    return f"  {_where(alike[0])}: {alike[0].problem}{more}"


def _where(finding: Finding) -> str:
    return f"{finding.file}:{finding.line}" if finding.line else finding.file


def open_dataset(given: str, *, note: Callable[[str], object]) -> DatasetSpec:
    """The data set of a YAML; the embedded one is drawn if it is not there yet. `note` takes lines for the user."""
    spec, notes = read_dataset(given)
    for text in notes:
        note(text)
    if not spec.embedded:
        return spec
    if not spec.root.exists():
        note(f"drawing the embedded data set, once, in {spec.root}")
    root = ensure_shapes(spec.root)
    train, val = (
        tuple(root / path.relative_to(spec.root) for path in getattr(spec, split)) for split in ("train", "val")
    )
    return replace(spec, root=root, train=train, val=val)


def scan_split(spec: DatasetSpec, split: str, *, progress: Progress | None = None) -> tuple[LabelStore, ScanReport]:
    """The labels of a split, from the cache when nothing has changed.

    Raises UserError when there is no image, no usable image, or a class beyond `names`.
    """
    images = list_images(spec, split)
    key = _listing_key(images, spec)
    cached = _load(spec, split, key)
    if cached is not None:
        return cached
    store, report = _scan(images, spec, split, progress or (lambda items, description: items))
    _save(spec, split, key, store, report)
    return _load(spec, split, key) or (store, report)  # mapped, where it could be saved


def write_findings(path: Path, reports: Iterable[ScanReport]) -> None:
    """All findings as CSV: split, file, line, problem."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["split", "file", "line", "problem"])
    for report in reports:
        table.writerows([report.split, item.file, item.line or "", item.problem] for item in report.findings)
    write_text(path, text.getvalue())


def _scan(images: list[Path], spec: DatasetSpec, split: str, progress: Progress) -> tuple[LabelStore, ScanReport]:
    def look(image: Path) -> tuple[tuple[int, int] | None, ImageLabels | Finding]:
        try:
            size = decode_image(image).shape[:2]  # decoding is the only test that a file holds an image
        except ImageError as error:
            return None, Finding(file=shown_path(image), line=0, problem=f"{error}: image skipped")
        return size, read_labels(label_path(image), spec.names)

    usable, sizes, labels, findings = [], [], [], []
    with ThreadPoolExecutor() as pool, quiet_opencv():
        seen = _ordered(pool, look, images)
        for image, (size, result) in zip(progress(images, f"Scanning {split}"), seen):
            if size is None:
                findings.append(result)
                continue
            usable.append(image)
            sizes.append(size)
            labels.append(result)
            findings += result.findings
    if not usable:
        raise UserError(f"{spec.source}: none of the {len(images)} images of '{split}' can be read; first: {images[0]}")
    store = build_store(usable, sizes, labels, num_classes=len(spec.names))
    outside = [finding for finding in findings if finding.problem == OUTSIDE]
    if len(outside) > len(store.boxes):
        raise UserError(
            f"{spec.source}: {len(outside)} of {len(outside) + len(store.boxes)} boxes of '{split}' lie outside their "
            f"images, e.g. {_where(outside[0])}; boxes should be fractions of the image: are these pixels?"
        )
    report = ScanReport(
        split=split,
        images=len(usable),
        skipped=len(images) - len(usable),
        background=int((np.diff(store.offsets) == 0).sum()),
        boxes=len(store.boxes),
        findings=tuple(findings),
    )
    return store, report


def _ordered(pool: ThreadPoolExecutor, look: Callable, images: list[Path]) -> Iterator:
    """`pool.map` with a bounded queue: an error or Ctrl-C does not wait for a million queued images."""
    ahead, chunk = 256, []
    for image in images:
        chunk.append(pool.submit(look, image))
        if len(chunk) >= ahead:
            yield chunk.pop(0).result()
    for future in chunk:
        yield future.result()


# ---- cache --------------------------------------------------------------------------------------------------------


def _listing_key(images: list[Path], spec: DatasetSpec) -> str:
    digest = blake2b(f"{_SCHEMA} {len(spec.names)}\n".encode(), digest_size=16)
    for image in images:
        for path in (image, label_path(image)):
            try:
                status = os.stat(path)  # noqa: PTH116 (hot)
                entry = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                entry = "-"
            digest.update(os.fsencode(path) + f"\0{entry}\n".encode())
    return digest.hexdigest()


def _cache_files(spec: DatasetSpec, split: str) -> list[Path]:
    """Beside the data, else in the user's cache folder under a name that tells data sets apart."""
    whose = blake2b(os.fsencode(spec.source), digest_size=6).hexdigest()
    return [
        spec.root / f".{spec.source.stem}-{split}.cache",
        cache_folder() / f"{spec.source.stem}-{whose}-{split}.cache",
    ]


def _load(spec: DatasetSpec, split: str, key: str) -> tuple[LabelStore, ScanReport] | None:
    for path in _cache_files(spec, split):
        with suppress(OSError, ValueError, KeyError, TypeError):  # missing, foreign or damaged: scan anew
            arrays, meta = read_arrays(path)
            if meta["key"] == key:
                findings = tuple(Finding(**item) for item in meta["report"].pop("findings"))
                return _MappedStore(**arrays, file=path, key=key), ScanReport(**meta["report"], findings=findings)
    return None


@dataclass(frozen=True, kw_only=True)
class _MappedStore(LabelStore):
    """A LabelStore whose arrays lie in a file: a loader process that is not forked maps it, and gets no copy."""

    file: Path
    key: str

    def __reduce__(self) -> tuple[Callable, tuple]:
        one_class = self.classes.strides == (0,)  # by `single_class`: the file still has them all
        return _map_store, (self.file, self.key, one_class)


def _map_store(file: Path, key: str, one_class: bool) -> LabelStore:
    arrays, meta = read_arrays(file)
    if meta["key"] != key:
        raise UserError(f"{file}: the data set was scanned anew while it was in use; start again")
    store = _MappedStore(**arrays, file=file, key=key)
    return single_class(store) if one_class else store


def _save(spec: DatasetSpec, split: str, key: str, store: LabelStore, report: ScanReport) -> None:
    for path in _cache_files(spec, split):
        with suppress(OSError):  # a read-only or full place costs a scan next time, nothing else
            if path.parent != spec.root:  # a root that does not exist is the user's to make
                path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, vars(store), {"key": key, "report": asdict(report)})
            return
