"""The product's own Trainer, built by its own builder, for the processes that measure one part of it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from benchmarks.measuring import NUM_CLASSES
from utils.train.build import build_trainer
from utils.train.trainer import Trainer


@contextlib.contextmanager
def built_trainer(**options: Any) -> Iterator[Trainer]:
    """The Trainer of `train.run(**options)`, its run in a folder that vanishes, its lines on standard error."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with contextlib.redirect_stdout(sys.stderr):
            trainer = build_trainer({"project": folder, "name": "run", "quiet": True, "noplots": True, **options})
        yield trainer


@contextlib.contextmanager
def placeholder_data(images: int) -> Iterator[str]:
    """A data set YAML of as many tiny images, for a Trainer that is handed its batches."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        root = Path(folder)
        for kind in ("images", "labels"):
            (root / kind).mkdir()
        rng = np.random.default_rng(0)
        for index in range(images):
            cv2.imwrite(str(root / "images" / f"{index}.png"), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            (root / "labels" / f"{index}.txt").write_text(f"{index % NUM_CLASSES} 0.5 0.5 0.5 0.5\n")
        names = [f"class {index}" for index in range(NUM_CLASSES)]
        content = {"path": str(root), "train": "images", "val": "images", "names": names}
        (root / "data.yaml").write_text(yaml.safe_dump(content))
        yield str(root / "data.yaml")
