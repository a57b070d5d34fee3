"""about.json: what a run is of, for whoever looks at its folder later: network, data, and where and how it was started.

Nothing in it is needed to train or to resume, and an identical run has another one.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from utils import __version__
from utils.data.findings import SEVERITIES, ScanReport, kinds_of, where
from utils.files import write_text
from utils.machine import usable_cores
from utils.report.next_steps import this_command

ABOUT_FILE = "about.json"
_PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class FoundKind:
    """Findings of one kind in the data."""

    severity: str  # high, medium or low
    problem: str  # of the first
    where: str  # the first: file, or file:line
    count: int


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What a split holds."""

    images: int
    background: int  # images without boxes
    skipped: int  # unusable images
    labels: int
    labels_of_class: tuple[int, ...]
    findings: tuple[FoundKind, ...]  # the most severe first

    @classmethod
    def of(cls, report: ScanReport, *, single_class: bool) -> SplitSummary:
        """`single_class`: all classes are one."""
        kinds = tuple(
            FoundKind(
                severity=SEVERITIES[kind.rank],
                problem=kind.first.problem,
                where=where(kind.first),
                count=kind.count,
            )
            for kind in kinds_of([report])
        )
        return cls(
            images=report.images,
            background=report.background,
            skipped=report.skipped,
            labels=report.boxes,
            labels_of_class=(sum(report.class_counts),) if single_class else report.class_counts,
            findings=kinds,
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """One time that the run was started, or resumed."""

    time: str  # ISO 8601, with the zone
    first_epoch: int  # that was trained then, from 1
    command: str
    environment: dict[str, str]  # by what it is


@dataclass(frozen=True, kw_only=True)
class About:
    """What about.json holds."""

    network: str  # its YAML, or the weights whose network it is
    parameters: int
    gflops: float  # at imgsz
    data: str  # the YAML
    names: tuple[str, ...]
    splits: dict[str, SplitSummary]  # train and val
    starts: tuple[Start, ...]  # the last one is under way

    def after(self, earlier: About | None) -> About:
        """With the starts of the run so far before this one's."""
        return self if earlier is None else replace(self, starts=(*earlier.starts, *self.starts))


def this_start(*, first_epoch: int, device: str, ranks: int) -> Start:
    """The present process."""
    environment = {
        "trainer": __version__,
        "Python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "system": platform.platform(),
        "computer": platform.node(),
        "processor": f"{_processor()}, {usable_cores()} cores for this process",
        "device": device,
        "processes": str(ranks),
    }
    return Start(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        first_epoch=first_epoch,
        command=this_command(sys.argv),
        environment=environment,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Its name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def write_about(path: Path, content: About) -> None:
    write_text(path, json.dumps(asdict(content), indent=2, ensure_ascii=False) + "\n")


def read_about(folder: Path) -> About | None:
    """What is known of the run in a folder; None where nothing is, or nothing that makes sense."""
    try:
        return _about(json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _about(content: Mapping[str, Any]) -> About:
    splits = {
        name: SplitSummary(
            **{
                **split,
                "labels_of_class": tuple(split["labels_of_class"]),
                "findings": _all_of(FoundKind, split["findings"]),
            }
        )
        for name, split in content["splits"].items()
    }
    starts = _all_of(Start, content["starts"])
    return About(**{**content, "names": tuple(content["names"]), "splits": splits, "starts": starts})


def _all_of(kind: type, rows: Sequence[Mapping[str, Any]]) -> tuple:
    return tuple(kind(**row) for row in rows)
