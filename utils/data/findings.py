"""What a scan has to say: findings as packed arrays, copies of images, and the report that people read.

The surprise: a million findings are a few arrays. A Finding is made when somebody asks for that one.
"""

from __future__ import annotations

import bisect
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from utils.data.labels import Finding, offsets_of, shown_path
from utils.data.store import joined_offsets
from utils.files import write_text
from utils.structures import LabelStore

SEVERITIES = ("high", "medium", "low")  # an image or its labels lost or leaked; a box lost; all the rest
MOST_KINDS = 8  # on screen

_COPY = "is the same image as"
_RANKS = {  # where a problem belongs, by how its text ends
    "image skipped": 0,
    "taken as background": 0,
    "dropped": 1,
    "ignored": 1,
    "shares its label file with another image": 1,
}


def is_leak(problem: str, split: str) -> bool:
    """Whether an image is one of another split, and so no judge of how well a network does: the worst there is."""
    return _COPY in problem and not problem.endswith(f" of {split}")


def severity(problem: str, split: str) -> int:
    """Index into SEVERITIES."""
    if _COPY in problem:
        return 0 if is_leak(problem, split) else 2
    return next((rank for ending, rank in _RANKS.items() if problem.endswith(ending)), 2)


def kind_of(problem: str) -> str:
    """Problems of one kind differ in numbers and names only."""
    return re.sub(r"\d+(?: values?\b)?", "n", re.sub(rf"{_COPY} .* of ", f"{_COPY} of ", problem))


# ---- many findings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings(Sequence[Finding]):
    """Findings as arrays, which may be memory-mapped; F findings with K different problems."""

    lines: np.ndarray  # (F,) i64, 0 where a finding concerns the whole file
    problem_of: np.ndarray  # (F,) i64, 0 <= problem_of < K
    file_bytes: np.ndarray  # u8, UTF-8
    file_offsets: np.ndarray  # (F + 1,) i64
    problem_bytes: np.ndarray  # u8, UTF-8
    problem_offsets: np.ndarray  # (K + 1,) i64

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Finding:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Finding(
            file=_text(self.file_bytes, self.file_offsets, index),
            line=int(self.lines[index]),
            problem=_text(self.problem_bytes, self.problem_offsets, int(self.problem_of[index])),
        )

    def problems(self) -> list[str]:
        """The K different ones."""
        return [
            _text(self.problem_bytes, self.problem_offsets, index) for index in range(len(self.problem_offsets) - 1)
        ]

    def count(self, problem: str) -> int:
        """How many findings have this very problem."""
        numbers = [number for number, text in enumerate(self.problems()) if text == problem]
        return int(np.isin(self.problem_of, numbers).sum())


def _text(data: np.ndarray, offsets: np.ndarray, index: int) -> str:
    return data[offsets[index] : offsets[index + 1]].tobytes().decode("utf-8", "replace")


def packed_findings(findings: Iterable[Finding]) -> Findings:
    lines, problem_of, files = [], [], []
    numbers: dict[str, int] = {}
    for finding in findings:
        lines.append(finding.line)
        files.append(finding.file.encode("utf-8", "replace"))
        problem_of.append(numbers.setdefault(finding.problem, len(numbers)))
    problems = [problem.encode("utf-8", "replace") for problem in numbers]
    return Findings(
        lines=np.array(lines, np.int64),
        problem_of=np.array(problem_of, np.int64),
        file_bytes=np.frombuffer(b"".join(files), np.uint8),
        file_offsets=offsets_of([len(file) for file in files]),
        problem_bytes=np.frombuffer(b"".join(problems), np.uint8),
        problem_offsets=offsets_of([len(problem) for problem in problems]),
    )


def map_findings(arrays: Mapping[str, np.ndarray]) -> Findings:
    """Findings of arrays by field. Raises ValueError and TypeError where they do not fit together."""
    found = Findings(**arrays)
    ends = (found.file_offsets[-1], len(found.file_bytes)), (found.problem_offsets[-1], len(found.problem_bytes))
    shapes = (found.lines.shape, found.problem_of.shape, (len(found.file_offsets) - 1,))
    most = found.problem_of.max(initial=-1)
    if len(set(shapes)) > 1 or any(end != length for end, length in ends) or most >= len(found.problem_offsets) - 1:
        raise ValueError("damaged findings")
    return found


def joined_findings(parts: Sequence[Findings]) -> Findings:
    """All findings of all parts, in their order; each problem once."""
    numbers: dict[str, int] = {}
    problem_of = []
    for part in parts:
        here = [numbers.setdefault(problem, len(numbers)) for problem in part.problems()]
        problem_of.append(np.array(here, np.int64)[part.problem_of])
    problems = packed_findings(Finding(file="", line=0, problem=problem) for problem in numbers)
    return replace(
        problems,
        lines=np.concatenate([part.lines for part in parts]),
        problem_of=np.concatenate(problem_of),
        file_bytes=np.concatenate([part.file_bytes for part in parts]),
        file_offsets=joined_offsets([part.file_offsets for part in parts]),
    )


# ---- copies of images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies(Sequence[Finding]):
    """Images of a split that are those of an earlier split, or stand earlier in their own, byte by byte."""

    images: np.ndarray  # (F,) i64 into `store`
    original_splits: np.ndarray  # (F,) i64 into `splits`
    originals: np.ndarray  # (F,) i64 into the store of that split
    store: LabelStore
    stores: tuple[LabelStore, ...]
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Finding:
        if not 0 <= index < len(self):
            raise IndexError(index)
        split = int(self.original_splits[index])
        original = shown_path(self.stores[split].path(int(self.originals[index])))
        return Finding(
            file=shown_path(self.store.path(int(self.images[index]))),
            line=0,
            problem=f"{_COPY} {original} of {self.splits[split]}",
        )


def copies(stores: Mapping[str, LabelStore]) -> dict[str, Copies]:
    """By split: the images that are copies, told by digest, of one in an earlier split or before them in their own."""
    splits, held = tuple(stores), tuple(stores.values())
    digests = np.concatenate([np.empty(0, np.uint64), *(store.digests for store in held)])
    starts = offsets_of([len(store) for store in held])
    order = np.argsort(digests, kind="stable")  # copies follow each other, the first one first
    ordered = digests[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    original_of = np.empty(len(order), np.int64)
    original_of[order] = order[is_first][np.cumsum(is_first) - 1]
    result = {}
    for index, (split, store) in enumerate(stores.items()):
        mine = original_of[starts[index] : starts[index + 1]]
        images = np.flatnonzero(mine != np.arange(starts[index], starts[index + 1]))
        origins = np.searchsorted(starts, mine[images], side="right") - 1
        originals = mine[images] - starts[origins]
        # one that is listed twice is no copy, and a finding of the listing
        real = (origins != index) | ~_same_paths(store, images, np.where(origins == index, originals, 0))
        result[split] = Copies(
            images=images[real],
            original_splits=origins[real],
            originals=originals[real],
            store=store,
            stores=held,
            splits=splits,
        )
    return result


def _same_paths(store: LabelStore, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) bool: whether images `first` (n,) have the paths of images `second` (n,)."""
    starts, lengths = store.path_offsets[:-1], np.diff(store.path_offsets)
    same = lengths[first] == lengths[second]
    for length in np.unique(lengths[first[same]]):
        rows = np.flatnonzero(same & (lengths[first] == length))
        for some in np.array_split(rows, len(rows) // 65536 + 1):
            ours, theirs = (
                store.path_bytes[starts[images[some], None] + np.arange(length)] for images in (first, second)
            )  # (some, length)
            same[some] = (ours == theirs).all(1)
    return same


# ---- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanReport:
    """What a scan saw in one split."""

    split: str
    images: int  # usable
    skipped: int  # unusable
    background: int  # usable, without boxes
    boxes: int  # of objects: crowd regions are none
    crowds: int
    turned: int  # usable, turned or mirrored by EXIF
    class_counts: tuple[int, ...]  # boxes of each class
    notes: tuple[str, ...]  # lines on what is odd and no defect
    defects: Findings  # of single files
    copies: Copies  # of images

    @property
    def findings(self) -> Sequence[Finding]:
        """All there are, in no order of importance."""
        return _Chain([self.copies, self.defects])

    def lines(self) -> list[str]:
        """The report as a user reads it: counts, and of each kind of finding how many there are, with an example."""
        counts = f"{self.split}: {self.images:,} images, {self.boxes:,} boxes, {self.background:,} without boxes"
        if self.skipped:
            counts += f", {self.skipped:,} skipped"
        return [counts, *finding_lines([self]), *remark_lines([self])]


class _Chain(Sequence[Finding]):
    def __init__(self, parts: Sequence[Sequence[Finding]]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Finding:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Finding]:
        return chain.from_iterable(self._parts)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Findings of one kind in one split."""

    rank: int  # into SEVERITIES
    leak: bool
    count: int
    first: Finding


def finding_lines(reports: Iterable[ScanReport]) -> list[str]:
    """Kinds of findings, leaks, then the most severe, then the most frequent first, with an example each."""
    kinds = kinds_of(reports)
    lines = [_example(kind) for kind in kinds[:MOST_KINDS]]
    if len(kinds) > MOST_KINDS:
        lines.append(f"  {sum(kind.count for kind in kinds[MOST_KINDS:]):,} other findings")
    return lines


def kinds_of(reports: Iterable[ScanReport]) -> list[Kind]:
    """In the order of `finding_lines`."""
    kinds = [kind for report in reports for kind in _kinds(report)]
    return sorted(kinds, key=lambda kind: (not kind.leak, kind.rank, -kind.count))  # stable: splits in their order


def _example(kind: Kind) -> str:
    more = f" (and {kind.count - 1:,} more like it)" if kind.count > 1 else ""
    return f"  {where(kind.first)}: {kind.first.problem}{more}"


def where(finding: Finding) -> str:
    return f"{finding.file}:{finding.line}" if finding.line else finding.file


def _kinds(report: ScanReport) -> list[Kind]:
    found: dict[str, Kind] = {}
    for first, count in chain(_first_copies(report.copies), _first_defects(report.defects)):
        name = kind_of(first.problem)
        if name in found:
            found[name] = replace(found[name], count=found[name].count + count)
        else:
            found[name] = Kind(
                rank=severity(first.problem, report.split),
                leak=is_leak(first.problem, report.split),
                count=count,
                first=first,
            )
    return list(found.values())


def _first_defects(defects: Findings) -> Iterator[tuple[Finding, int]]:
    """The first finding of each problem, in the order of their appearance, and how many there are."""
    _, firsts, counts = np.unique(defects.problem_of, return_index=True, return_counts=True)
    for at in np.argsort(firsts).tolist():
        yield defects[int(firsts[at])], int(counts[at])


def _first_copies(found: Copies) -> Iterator[tuple[Finding, int]]:
    _, firsts, counts = np.unique(found.original_splits, return_index=True, return_counts=True)
    for first, count in zip(firsts.tolist(), counts.tolist()):
        yield found[first], count


def remark_lines(reports: Sequence[ScanReport]) -> list[str]:
    """What is worth knowing and no defect."""
    counts = {
        "images turned by EXIF, boxes are as they are shown": [(report.turned, report.split) for report in reports],
        "crowd regions, neither trained on nor counted": [(report.crowds, report.split) for report in reports],
    }
    lines = []
    for what, of_splits in counts.items():
        named = ", ".join(f"{count:,} of {split}" for count, split in of_splits if count)
        lines += [f"  {what}: {named}"] if named else []
    notes = dict.fromkeys(chain.from_iterable(report.notes for report in reports))  # splits may share a file
    return [*lines, *(f"  {note}" for note in notes)]


def untaught_lines(reports: Sequence[ScanReport], names: Sequence[str], *, most: int = 5) -> list[str]:
    """Classes that evaluation asks for though training never shows them; up to so many by name."""
    train = next((report for report in reports if report.split == "train"), None)
    if train is None:
        return []
    found = [
        f"{shortened(name)} ({', '.join(asked)})"
        for index, name in enumerate(names)
        if not train.class_counts[index]
        and (asked := [f"{one.class_counts[index]:,} in {one.split}" for one in reports if one.class_counts[index]])
    ]
    more = f", and {len(found) - most:,} more" if len(found) > most else ""
    return [f"  no box to learn from in train: {', '.join(found[:most])}{more}"] if found else []


def table_lines(reports: Sequence[ScanReport]) -> list[str]:
    """A row of counts for each split."""
    rows = [("split", "images", "without boxes", "boxes", "skipped", "findings")]
    for report in reports:
        numbers = report.images, report.background, report.boxes, report.skipped, len(report.findings)
        rows.append((report.split, *(f"{number:,}" for number in numbers)))
    return _aligned(rows)


def class_lines(reports: Sequence[ScanReport], names: Sequence[str], *, most: int) -> list[str]:
    """Boxes of each class in each split, a row each for up to `most` classes; of more the fewest and the most."""
    if len(names) > most:
        return [line for report in reports for line in _extremes(report, names)]
    rows = [("class", *(report.split for report in reports))]
    for index, name in enumerate(names):
        rows.append((shortened(name), *(f"{report.class_counts[index]:,}" for report in reports)))
    return _aligned(rows)


def _extremes(report: ScanReport, names: Sequence[str], *, each: int = 3) -> list[str]:
    counts = np.array(report.class_counts, np.int64)
    held = np.flatnonzero(counts)
    if not len(held):
        return []
    order = held[np.argsort(-counts[held], kind="stable")]
    named = [f"{shortened(names[index])} {counts[index]:,}" for index in order.tolist()]
    most, fewest = named[:each], named[max(each, len(named) - each) :]
    line = f"{report.split}: boxes in {len(held):,} of {len(names):,} classes; most: {', '.join(most)}"
    return [f"{line}; fewest: {', '.join(fewest)}" if fewest else line]


def shortened(name: str, longest: int = 32) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def write_findings(path: Path, reports: Iterable[ScanReport]) -> None:
    """All findings as CSV: split, file, line, problem, severity.

    Leaks first, then split by split, the most severe first, then by file.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["split", "file", "line", "problem", "severity"])
    rows = [
        (not is_leak(one.problem, report.split), place, severity(one.problem, report.split), one, report.split)
        for place, report in enumerate(reports)
        for one in report.findings
    ]
    rows.sort(key=lambda row: (*row[:3], row[3].file, row[3].line, row[3].problem))
    for _, _, rank, one, split in rows:
        table.writerow([split, one.file, one.line or "", one.problem, SEVERITIES[rank]])
    write_text(path, text.getvalue())
