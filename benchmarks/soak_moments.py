"""When a run is struck: moments that are told by what it shows, by the files that it makes, or by the clock alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.soak_process import Watched

_SHARED_MEMORY = Path("/dev/shm")
_TEMPORARY = re.compile(r"\.(last|best|previous)\.pt\.[0-9a-f]{8}")  # of `utils.files.write_atomic`
_IMAGE_CACHE = re.compile(r".*\.partial")  # of `utils.data.cache`
_LABEL_CACHE = re.compile(r".*\.cache\.[0-9a-f]{8}")
_EVALUATING = rb"Evaluating +0%"  # shown once for each evaluation
_SCANNING = rb"Scanning train +0%"
_EPOCH = rb"[\r\n] *\d+/\d+ +\d\.\d{5} "  # the line of one that is done
_TRAINING = rb"Epoch \d+/"  # its bar
_REPORT = rb"split +images"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known from the run that nobody struck, and where files of this one appear."""

    seconds: float
    scan_s: float
    evaluation_s: float  # of one of them
    evaluations: int
    weights: Path = Path()  # the folder
    caches: Path = Path()
    stem: str = ""  # in the names of its caches
    caches_images: bool = False

    @classmethod
    def of(cls, process: Watched, seconds: float) -> dict[str, float]:
        """Those that a process tells which ended at that age."""
        scanning, report = (process.seconds_at(pattern) for pattern in (_SCANNING, _REPORT))
        began, epoch = process.seconds_at(_EVALUATING), process.seconds_at(_EPOCH)
        evaluations = len(re.findall(_EVALUATING, process.shown.encode()))
        evaluation_s = epoch - began if epoch and began and epoch > began else seconds - (began or seconds)
        return {
            "seconds": seconds,
            "scan_s": report - scanning if report and scanning else 0.0,
            "evaluation_s": evaluation_s,
            "evaluations": max(evaluations, 1),
        }


Moment = Callable[[Watched, Facts, Random], bool]  # waits for it; False when the process ends first


def _any(process: Watched, facts: Facts, rng: Random) -> bool:
    return process.lives_for(rng.uniform(0, facts.seconds) - process.age)


def _training(process: Watched, facts: Facts, rng: Random) -> bool:
    return process.shows(_TRAINING) and process.lives_for(rng.uniform(0, max(facts.seconds - process.age, 0.5)))


def _evaluation(process: Watched, facts: Facts, rng: Random) -> bool:
    number = rng.randint(1, facts.evaluations)
    return process.shows(_EVALUATING, number) and process.lives_for(rng.uniform(0, facts.evaluation_s))


def _scan(process: Watched, facts: Facts, rng: Random) -> bool:
    return process.shows(_SCANNING) and process.lives_for(rng.uniform(0, facts.scan_s))


def _checkpoint(process: Watched, facts: Facts, rng: Random) -> bool:
    """A temporary file appears, or its name has just gone."""
    number, delay, seen = rng.randint(1, 6), rng.choice([0.0, 0.0, rng.uniform(0, 0.004)]), set()

    def appears() -> bool:
        seen.update(name for name in _names(facts.weights) if _TEMPORARY.fullmatch(name))
        return len(seen) >= number

    return process.until(appears) and (not delay or process.lives_for(delay))


def _cache(process: Watched, facts: Facts, rng: Random) -> bool:
    """A file that is to become a cache appears, of images where it makes one, else of labels."""
    wanted = _IMAGE_CACHE if facts.caches_images else _LABEL_CACHE

    def appears() -> bool:
        names = [*_names(facts.caches), *(name for name in _names(_SHARED_MEMORY) if facts.stem in name)]
        return any(map(wanted.fullmatch, names))

    return process.until(appears)


def _under_way(process: Watched, facts: Facts, rng: Random) -> bool:
    """As any, but not before it listens to signals."""
    return process.shows(_SCANNING) and process.lives_for(rng.uniform(0, facts.seconds - process.age))


def _names(folder: Path) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)  # noqa: PTH208 (asked thousands of times a second)
    return []


MOMENTS: dict[str, Moment] = {
    "any": _any,
    "training": _training,
    "checkpoint": _checkpoint,
    "evaluation": _evaluation,
    "scan": _scan,
    "cache": _cache,
    "under way": _under_way,
}
