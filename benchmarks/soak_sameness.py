"""What two finished runs differ in, but for the time that they took and where they lie; and what a run left over."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from utils.checkpoint import checksum, load_checkpoint
from utils.structures import UserError

_ALIKE = ("results.csv", "metrics.json", "nonfinite.csv", "hyp.yaml")  # to the byte
_SETTINGS = "options"  # paths and the number of loader processes, which change nothing
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}|.*\.partial|tmp.*")


def differences(run: Path, reference: Path) -> list[str]:
    """Lines on what a run has that the other has not; none where they are the same run."""
    found = [f"{name} differs" for name in _ALIKE if _content(run / name) != _content(reference / name)]
    for name in ("last.pt", "best.pt"):
        found += _in_checkpoints(run / "weights" / name, reference / "weights" / name)
    ours, theirs = _names(run), _names(reference)
    found += [f"{name} is left over" for name in sorted(ours - theirs)]
    found += [f"{name} is missing" for name in sorted(theirs - ours)]
    if _epochs(run) != _epochs(reference):
        found.append(f"timing.csv has the epochs {_epochs(run)}")
    return found


def unfinished(*folders: Path) -> list[str]:
    """Files that are half done, or meant to be gone."""
    files = (path for folder in folders if folder.is_dir() for path in folder.rglob("*"))
    return sorted(path.name for path in files if path.is_file() and _UNFINISHED.fullmatch(path.name))


def position(path: Path) -> str:
    """Where the run of a checkpoint stands, as finished epochs + batches; or what is wrong with the file."""
    if not path.exists():
        return "none"
    try:
        checkpoint = load_checkpoint(path)
    except UserError:
        return "damaged"
    return f"{checkpoint['epoch']}+{checkpoint.get('batch', 0)}"


def _in_checkpoints(ours: Path, theirs: Path) -> list[str]:
    try:
        one, other = _parts(load_checkpoint(ours)), _parts(load_checkpoint(theirs))
    except UserError as error:
        return [str(error)]
    keys = sorted(one.keys() | other.keys())
    return [f"{ours.name}: {key} differs" for key in keys if one.get(key) != other.get(key)]


def _parts(checkpoint: dict[str, Any]) -> dict[str, str]:
    """A checksum of each part, so of dtype, shape and bytes of each tensor in it."""
    return {key: checksum(value) for key, value in checkpoint.items() if key != _SETTINGS}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _names(run: Path) -> set[str]:
    """All files; of those of TensorBoard each start leaves one more."""
    names = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return {"events" if name.startswith("events.out.tfevents.") else name for name in names}


def _epochs(run: Path) -> list[str]:
    with (run / "timing.csv").open() as file:
        return [row[0].strip() for row in csv.reader(file)][1:]
