"""One process: what a scan costs, and a second start that finds its cache, on invented images, as a line of JSON.

    python -m benchmarks.scan --images 100000
    python -m benchmarks.scan --images 1000000 --links --folder /tmp/links

Images are 64x64 JPEGs with 5 boxes each; with `--links` 1,000 of them under many names, which is quickly made and
enough for a second start. CPU seconds are those of all processes together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.data import scan, scan_cache
from utils.data.sources import open_split
from utils.files import read_arrays
from utils.structures import DatasetSpec

_NAMES = tuple(f"class {index}" for index in range(80))
_IN_A_FOLDER = 10_000
_LINKED = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--links", action="store_true", help="hard links to few files")
    parser.add_argument("--folder", type=Path, help="keep the images here, for the next time")
    flags = parser.parse_args()
    temporary = tempfile.TemporaryDirectory(prefix="bench-scan-") if flags.folder is None else contextlib.nullcontext()
    with temporary as folder:
        print(json.dumps(_measured(flags.folder or Path(folder), flags.images, links=flags.links)), flush=True)


def _measured(folder: Path, images: int, *, links: bool) -> dict[str, float]:
    if not (folder / "images").exists():
        _draw(folder, images, _LINKED if links else images)
    spec = DatasetSpec(
        source=folder / "data.yaml", root=folder, train=(folder / "images",), val=(folder / "images",), names=_NAMES
    )
    figures: dict[str, float] = {"images": images}
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
        with _clocked(figures, "scan"):
            scan.scan_split(spec, "train", cache_dir=cache)
        figures["images_per_cpu_s"] = images / figures["scan_cpu_s"]
        with _clocked(figures, "second_start"):
            scan.scan_split(spec, "train", cache_dir=cache)
        with _clocked(figures, "listing"):
            sources = open_split(spec, "train")
        with _clocked(figures, "stat"):
            key = scan_cache.listing_of(sources, spec).key
        del sources
        files = scan_cache.cache_files(spec, "train", cache)
        with _clocked(figures, "mapping"):
            assert scan_cache.load(files, "train", key) is not None
        figures["cache_mb"] = files[0].stat().st_size / 1e6
        assert len(read_arrays(files[0])[0]["boxes"]) == 5 * images
    return {name: round(value, 3) for name, value in figures.items()}


@contextlib.contextmanager
def _clocked(figures: dict[str, float], what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield
    figures[f"{what}_s"], figures[f"{what}_cpu_s"] = time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """Of this process, its threads and all of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _draw(folder: Path, images: int, different: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(images):
        place = f"{index // _IN_A_FOLDER:04d}"
        image, label = (folder / kind / place / f"{index:07d}" for kind in ("images", "labels"))
        image, label = image.with_suffix(".jpg"), label.with_suffix(".txt")
        if index % _IN_A_FOLDER == 0:
            image.parent.mkdir(parents=True)
            label.parent.mkdir(parents=True)
        if index >= different:
            os.link(folder / f"images/0000/{index % different:07d}.jpg", image)
            os.link(folder / f"labels/0000/{index % different:07d}.txt", label)
            continue
        noise = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (64, 64))
        image.write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
        boxes = np.concatenate([rng.uniform(0.3, 0.7, (5, 2)), rng.uniform(0.1, 0.5, (5, 2))], 1)
        classes = rng.integers(0, len(_NAMES), 5)
        rows = (" ".join([str(kind), *(f"{value:.6f}" for value in box)]) for kind, box in zip(classes, boxes))
        label.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
