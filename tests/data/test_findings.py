import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.data.findings import (
    MOST_KINDS,
    ScanReport,
    class_lines,
    copies,
    finding_lines,
    joined_findings,
    map_findings,
    packed_findings,
    table_lines,
    untaught_lines,
    write_findings,
)
from utils.data.labels import Finding
from utils.data.store import plain_store

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
findings = st.lists(st.builds(Finding, file=texts, line=st.integers(0, 2**40), problem=texts), max_size=20)


def report_of(found=(), *, split="train", counts=(3, 0), **changes) -> ScanReport:
    report = ScanReport(
        split=split,
        images=1234,
        skipped=0,
        background=1,
        boxes=sum(counts),
        crowds=0,
        turned=0,
        class_counts=tuple(counts),
        notes=(),
        defects=packed_findings(found),
        copies=copies({split: plain_store(np.ones((2, 2)))})[split],
    )
    return replace(report, **changes)


def store_of(digests, folder="d"):
    paths = [Path(f"{folder}/{index}.jpg") for index in range(len(digests))]
    nothing = ImageLabels(boxes=np.empty((0, 4)), classes=np.empty(0, np.int64))
    store = build_store(paths, [(1, 1)] * len(digests), [nothing] * len(digests))
    return replace(store, digests=np.array(digests, np.uint64))


@given(parts=st.lists(findings, min_size=1, max_size=4))
def test_packed_findings_are_those_that_went_in(parts):
    whole = joined_findings([packed_findings(part) for part in parts])
    wanted = [finding for part in parts for finding in part]
    assert list(whole) == wanted
    assert len(whole.problems()) == len({finding.problem for finding in wanted})
    for problem in {finding.problem for finding in wanted}:
        assert whole.count(problem) == sum(finding.problem == problem for finding in wanted)
    assert list(map_findings(vars(whole))) == wanted


def test_findings_that_do_not_fit_together_are_refused():
    arrays = vars(packed_findings([Finding(file="a", line=1, problem="b"), Finding(file="c", line=2, problem="d")]))
    for name, array in arrays.items():
        with pytest.raises((ValueError, TypeError)):
            map_findings(arrays | {name: array[:-1]})


@given(splits=st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=3))
def test_copies_are_those_of_a_slow_twin(splits):
    names = ["train", "val", "test"][: len(splits)]
    stores = {name: store_of(digests, folder=name) for name, digests in zip(names, splits)}
    first: dict[int, str] = {}
    wanted = {name: [] for name in names}
    for name, digests in zip(names, splits):
        for index, digest in enumerate(digests):
            if digest in first:
                wanted[name].append((f"{name}/{index}.jpg", f"is the same image as {first[digest]}"))
            first.setdefault(digest, f"{name}/{index}.jpg of {name}")
    found = {name: [(one.file, one.problem) for one in some] for name, some in copies(stores).items()}
    assert found == wanted


def test_an_image_that_is_listed_twice_is_no_copy_of_itself_but_leaks():
    nothing = ImageLabels(boxes=np.empty((0, 4)), classes=np.empty(0, np.int64))
    names = ["a.jpg", "b.jpg", "a.jpg", "ab.jpg"]
    store = replace(
        build_store([Path(name) for name in names], [(1, 1)] * 4, [nothing] * 4), digests=np.full(4, 9, np.uint64)
    )
    found = copies({"train": store, "val": store})
    assert [one.file for one in found["train"]] == ["b.jpg", "ab.jpg"]
    assert [one.problem for one in found["val"]] == ["is the same image as a.jpg of train"] * 4


def test_the_worst_comes_first_and_like_findings_are_one_line():
    found = [Finding(file="l.txt", line=line, problem="reaches outside the image: clipped") for line in range(1, 9)]
    found += [Finding(file="l.txt", line=9, problem="zero area: dropped")]
    problems = ("2 values, expected 5: dropped", "1 value, expected 5: dropped")
    found += [Finding(file="m.txt", line=1, problem=problem) for problem in problems]
    found += [Finding(file="x.jpg", line=0, problem="truncated: image skipped")]
    copied = copies({"train": store_of([1, 2]), "val": store_of([2, 3, 3], "v")})["val"]
    lines = finding_lines([report_of(found), report_of(split="val", copies=copied)])
    assert lines == [
        "  v/0.jpg: is the same image as d/1.jpg of train",
        "  x.jpg: truncated: image skipped",
        "  m.txt:1: 2 values, expected 5: dropped (and 1 more like it)",
        "  l.txt:9: zero area: dropped",
        "  l.txt:1: reaches outside the image: clipped (and 7 more like it)",
        "  v/2.jpg: is the same image as v/1.jpg of val",
    ]


def test_rare_kinds_are_summed_up():
    found = [Finding(file="f", line=0, problem=f"{'x' * kind}: dropped") for kind in range(MOST_KINDS + 3)]
    assert finding_lines([report_of(found)])[MOST_KINDS:] == ["  3 other findings"]


def test_large_numbers_can_be_read():
    found = [Finding(file="f", line=0, problem="a: dropped")] * 2001
    report = report_of(found, boxes=98765, background=4321, skipped=1000)
    assert report.lines() == [
        "train: 1,234 images, 98,765 boxes, 4,321 without boxes, 1,000 skipped",
        "  f: a: dropped (and 2,000 more like it)",
    ]


def test_tables_line_up_and_many_classes_are_summed_up():
    reports = [report_of(counts=(1000, 0, 7)), report_of(split="val", counts=(5, 0, 0))]
    assert table_lines(reports) == [
        "split  images  without boxes  boxes  skipped  findings",
        "train   1,234              1  1,007        0         0",
        "val     1,234              1      5        0         0",
    ]
    names = ("cat", "a dog with a name that is longer than it has to be", "bird")
    assert class_lines(reports, names, most=3) == [
        "class                             train  val",
        "cat                               1,000    5",
        "a dog with a name that is longe…      0    0",
        "bird                                  7    0",
    ]
    assert class_lines(reports, names, most=2) == [
        "train: boxes in 2 of 3 classes; most: cat 1,000, bird 7",
        "val: boxes in 1 of 3 classes; most: cat 5",
    ]
    many = [report_of(counts=range(10))]
    assert class_lines(many, "abcdefghij", most=9) == [
        "train: boxes in 9 of 10 classes; most: j 9, i 8, h 7; fewest: d 3, c 2, b 1"
    ]


def test_the_file_holds_all_findings_the_worst_first(tmp_path):
    found = [
        Finding(file="b", line=3, problem="clipped"),
        Finding(file="a,\"'", line=0, problem="empty: image skipped"),
    ]
    copied = copies({"train": store_of([1, 2]), "val": store_of([2, 3, 3], "v")})["val"]
    write_findings(tmp_path / "scan.csv", [report_of(found), report_of(split="val", copies=copied)])
    with (tmp_path / "scan.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["split", "file", "line", "problem", "severity"],
            ["val", "v/0.jpg", "", "is the same image as d/1.jpg of train", "high"],
            ["train", "a,\"'", "", "empty: image skipped", "high"],
            ["train", "b", "3", "clipped", "low"],
            ["val", "v/2.jpg", "", "is the same image as v/1.jpg of val", "low"],
        ]


def test_classes_that_training_never_shows_are_named():
    train, val = report_of(counts=(5, 0, 0, 0)), report_of(split="val", counts=(1, 12, 0, 2))
    assert untaught_lines([train, val], "abcd") == ["  no box to learn from in train: b (12 in val), d (2 in val)"]
    assert untaught_lines([train, val], "abcd", most=1) == [
        "  no box to learn from in train: b (12 in val), and 1 more"
    ]
    assert untaught_lines([val], "abcd") == untaught_lines([train], "abcd") == []
