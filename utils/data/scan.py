"""Looks at every image and label of a split once, reports what is wrong, and caches the result.

User files are never touched. `python -m utils.data.scan --data D` shows and saves the report of a data set.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from utils.config import PROJECT_ROOT, read_dataset
from utils.data.download import ensure_downloaded
from utils.data.findings import (
    Findings,
    ScanReport,
    class_lines,
    copies,
    finding_lines,
    joined_findings,
    packed_findings,
    remark_lines,
    table_lines,
    untaught_lines,
    where,
)
from utils.data.images import quiet_opencv
from utils.data.labels import OUTSIDE, Finding, Source, checked, shown_path
from utils.data.pool import by_processes, by_threads, can_start_processes
from utils.data.probe import Overheard, damaged, overheard, probe
from utils.data.scan_cache import Kept, Listing, cache_files, listing_of, load, remembered_listing, save
from utils.data.shapes import ensure_shapes
from utils.data.sources import open_split, split_findings
from utils.data.store import joined, packed
from utils.files import from_here, this_python
from utils.machine import usable_cores
from utils.structures import CROWD, DatasetSpec, LabelStore, UserError

_IN_PROCESSES = 4096  # images from which on it pays to start processes
_PART, _SMALL_PART = 256, 32  # images looked at in one go


class Bar(Protocol):
    def update(self, count: int) -> object: ...


Progress = Callable[[int, str], AbstractContextManager[Bar]]  # (total, description) -> what to count up


class _NoBar:
    def update(self, count: int) -> None:
        pass


def no_progress(total: int, description: str) -> AbstractContextManager[Bar]:
    return nullcontext(_NoBar())


# ---- data sets ----------------------------------------------------------------------------------------------------


def open_dataset(given: str, *, note: Callable[[str], object], bar: Progress = no_progress) -> DatasetSpec:
    """The data set of a YAML, drawn or downloaded first where it asks for that. `note` takes lines for the user."""
    spec, notes = read_dataset(given)
    for text in notes:
        note(text)
    if not spec.embedded:
        return ensure_downloaded(spec, note=note, bar=bar)
    if not spec.root.exists():
        note(f"drawing the embedded data set, once, in {spec.root}")
    root = ensure_shapes(spec.root)
    train, val = (
        tuple(root / path.relative_to(spec.root) for path in getattr(spec, split)) for split in ("train", "val")
    )
    return replace(spec, root=root, train=train, val=val)


@dataclass(frozen=True, kw_only=True)
class DatasetScan:
    """The scan of several splits, by name, which know of copies of images among them."""

    spec: DatasetSpec
    stores: Mapping[str, LabelStore]
    reports: Mapping[str, ScanReport]

    @property
    def count(self) -> int:
        """Findings of all splits."""
        return sum(len(report.findings) for report in self.reports.values())

    def lines(self, *, most_classes: int) -> list[str]:
        """A table of the splits, one of up to so many classes, and what was found."""
        reports = list(self.reports.values())
        counts = [*table_lines(reports), *class_lines(reports, self.spec.names, most=most_classes)]
        counts += untaught_lines(reports, self.spec.names)
        return [*counts, *finding_lines(reports), *remark_lines(reports)]


def scan_dataset(
    spec: DatasetSpec, splits: Sequence[str], *, progress: Progress = no_progress, cache_dir: str = ""
) -> DatasetScan:
    """`scan_split` of each; an image in two splits is a finding in the later one."""
    stores, reports = {}, {}
    for split in splits:
        stores[split], reports[split] = scan_split(spec, split, progress=progress, cache_dir=cache_dir)
    among = copies(stores)
    reports = {split: replace(report, copies=among[split]) for split, report in reports.items()}
    return DatasetScan(spec=spec, stores=stores, reports=reports)


def refuse_findings(scan: DatasetScan, *, listed: Path | None = None) -> None:
    """For --strict: raises UserError where there is any finding; `listed` is the file that names them all."""
    if not scan.count:
        return
    found = [f"{len(report.findings):,} in {split}" for split, report in scan.reports.items() if report.findings]
    where = f"`{_scan_command(scan.spec.source)}` lists them" if listed is None else f"all of them are in {listed}"
    raise UserError(f"--strict: findings: {', '.join(found)}; {where}")


def _scan_command(source: Path) -> str:
    """What to type for a report; Python finds the module in the project's folder alone."""
    if Path.cwd() == PROJECT_ROOT:
        return f"{this_python()} -m utils.data.scan --data {shlex.quote(str(from_here(source)))}"
    folder, python, data = (shlex.quote(str(path)) for path in (PROJECT_ROOT, sys.executable, source))
    return f"cd {folder} && {python} -m utils.data.scan --data {data}"


def refuse_no_label(scan: DatasetScan) -> None:
    """Raises UserError where 'train', which must be among the splits, has nothing to train on."""
    if not scan.reports["train"].boxes:
        raise UserError(f"{scan.spec.source}: no usable label for 'train'; {_why_no_label(scan)}")


def _why_no_label(scan: DatasetScan) -> str:
    if scan.reports["train"].crowds:
        return "all of its boxes are crowd regions (iscrowd: 1), which are no objects to train on"
    if any(problem.endswith("dropped") for problem in scan.reports["train"].defects.problems()):
        return "every row was dropped; YOLO text is `class cx cy width height` as fractions of the image, not pixels"
    source = open_split(scan.spec, "train")[0]
    return f"those of {shown_path(source.images[0])} should be in {shown_path(source.label_file(0))}"


# ---- one split ----------------------------------------------------------------------------------------------------


def scan_split(
    spec: DatasetSpec, split: str, *, progress: Progress = no_progress, cache_dir: str = ""
) -> tuple[LabelStore, ScanReport]:
    """The labels of a split, from the cache when nothing has changed; `cache_dir` says where that lies.

    Raises UserError when there is no image, no usable image, a class beyond `names`, or no way to use `cache_dir`.
    """
    files = cache_files(spec, split, cache_dir)
    sources, listing = None, remembered_listing(files, spec, split)
    kept = load(files, split, listing.key) if listing else None
    if kept is None:
        sources = open_split(spec, split)
        listing = listing_of(sources, spec)
        kept = load(files, split, listing.key) or _scanned(sources, listing, files, spec, split, progress)
    listed = kept.listed
    if kept.surroundings != listing.surroundings:
        listed = packed_findings(split_findings(spec, split, sources or open_split(spec, split)))
    report = kept.report
    return kept.store, replace(report, defects=joined_findings([listed, report.defects])) if len(listed) else report


def _scanned(
    sources: Sequence[Source],
    listing: Listing,
    files: Sequence[Path],
    spec: DatasetSpec,
    split: str,
    progress: Progress,
) -> Kept:
    """A scan, mapped from the cache that it leaves where it could be saved."""
    store, report = _scan(sources, spec, split, progress)
    listed = packed_findings(split_findings(spec, split, sources))
    fresh = Kept(store=store, report=report, listed=listed, surroundings=listing.surroundings)
    save(files, spec, split, listing, sources, fresh)
    return load(files, split, listing.key) or fresh


@dataclass(frozen=True, kw_only=True)
class _Task:
    source: Source  # of a few images
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What became of a task."""

    images: int
    store: LabelStore  # of those that can be used
    findings: Findings
    turned: int
    relative: bool
    suspects: Sequence[str] = ()  # images of which one may be damaged


def _scan(
    sources: Sequence[Source], spec: DatasetSpec, split: str, progress: Progress
) -> tuple[LabelStore, ScanReport]:
    total = sum(len(source.images) for source in sources)
    with progress(total, f"Scanning {split}") as bar, quiet_opencv(), overheard() as heard:
        parts = _looked_at(sources, spec, total, heard, bar)
        damage = _damage(list(chain.from_iterable(part.suspects for part in parts)), heard)
    store = joined([part.store for part in parts])
    if not len(store):
        first = shown_path(sources[0].images[0])
        raise UserError(f"{spec.source}: none of the {total:,} images of '{split}' can be read; first: {first}")
    defects = joined_findings([*(part.findings for part in parts), damage])
    _refuse_foreign_units(spec, split, defects, len(store.boxes), relative=any(part.relative for part in parts))
    objects = store.ignore != CROWD
    report = ScanReport(
        split=split,
        images=len(store),
        skipped=total - len(store),
        background=int((np.diff(store.offsets) == 0).sum()),
        boxes=int(objects.sum()),
        crowds=int((~objects).sum()),
        turned=sum(part.turned for part in parts),
        class_counts=tuple(np.bincount(store.classes[objects], minlength=len(spec.names)).tolist()),
        notes=tuple(chain.from_iterable(source.notes for source in sources)),
        defects=defects,
        copies=copies({split: store})[split],
    )
    return store, report


def _looked_at(sources: Sequence[Source], spec: DatasetSpec, total: int, heard: Overheard, bar: Bar) -> list[_Seen]:
    """All parts, in their order."""
    seen: dict[int, _Seen] = {}
    with closing(_looks(sources, spec, total, heard)) as looks:
        for index, part in looks:
            seen[index] = part
            bar.update(part.images)
    return [seen[index] for index in sorted(seen)]


def _looks(sources: Sequence[Source], spec: DatasetSpec, total: int, heard: Overheard) -> Iterator[tuple[int, _Seen]]:
    cores = usable_cores()
    if cores > 1 and total >= _IN_PROCESSES and can_start_processes():
        return by_processes(_look_in_process, _tasks(sources, spec, _PART), cores, name=_task_name)
    return by_threads(partial(_look_in_thread, heard), _tasks(sources, spec, _SMALL_PART), cores)


def _tasks(sources: Sequence[Source], spec: DatasetSpec, size: int) -> Iterator[_Task]:
    for source in sources:
        for start in range(0, len(source.images), size):
            yield _Task(source=source.part(start, min(start + size, len(source.images))), names=spec.names)


def _task_name(task: _Task) -> str:
    images = task.source.images
    return f"an image from {shown_path(images[0])} to {shown_path(images[-1])}"


def _look_in_process(task: _Task) -> _Seen:
    cv2.setNumThreads(0)  # the cores have processes of their own; 1 would wait for threads that a fork has lost
    with quiet_opencv(), overheard() as heard:
        seen = _look(task)
        damage = _damage(task.source.images if heard.length() else (), heard)
    return replace(seen, findings=joined_findings([seen.findings, damage]))


def _look_in_thread(heard: Overheard, task: _Task) -> _Seen:
    """A line that is overheard may be due to any of the threads; who it was is found out later."""
    before = heard.length()
    seen = _look(task)
    return replace(seen, suspects=task.source.images) if heard.length() > before else seen


def _look(task: _Task) -> _Seen:
    source, paths = task.source, task.source.images
    probes = [probe(path) for path in paths]  # decoding is the only test that a file holds an image
    sizes = np.array([(seen.height, seen.width) for seen in probes], np.int32).reshape(-1, 2)
    orientations = np.array([seen.orientation for seen in probes], np.uint8)
    labels = source.read(task.names)
    rows, found = checked(source, labels, sizes, orientations)
    store = packed(
        rows,
        paths=paths,
        sizes=sizes,
        digests=np.array([seen.digest for seen in probes], np.uint64),
        image_ids=labels.image_ids,
        category_ids=source.category_ids,
    )
    problems = [
        Finding(file=shown_path(path), line=0, problem=f"{seen.problem}: image skipped" if seen.problem else seen.note)
        for path, seen in zip(paths, probes)
        if seen.problem or seen.note
    ]
    return _Seen(
        images=len(paths),
        store=store,
        findings=packed_findings([*problems, *labels.findings, *found]),
        turned=int((orientations != 1).sum()),
        relative=labels.relative,
    )


def _damage(images: Sequence[str], heard: Overheard) -> Findings:
    problems = damaged(images, heard)
    return packed_findings(Finding(file=shown_path(path), line=0, problem=text) for path, text in problems.items())


def _refuse_foreign_units(spec: DatasetSpec, split: str, defects: Findings, boxes: int, *, relative: bool) -> None:
    outside = defects.count(OUTSIDE)
    if outside <= boxes:
        return
    example = next(finding for finding in defects if finding.problem == OUTSIDE)
    hint = "boxes should be fractions of the image: are these pixels?"
    if not relative:
        hint = "boxes should be in px of the images: are these other images, or fractions?"
    raise UserError(
        f"{spec.source}: {outside:,} of {outside + boxes:,} boxes of '{split}' lie outside their images, "
        f"e.g. {where(example)}; {hint}"
    )


def main() -> int:
    from utils.report.scan_command import main as command  # above us: only the command draws

    return command()


if __name__ == "__main__":
    sys.exit(main())
