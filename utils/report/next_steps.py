"""What to type next with a run: to watch it, to go on with it, to use its weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from utils.config import PROJECT_ROOT
from utils.files import from_here, this_python
from utils.run_folder import RunFolder


def next_steps(folder: Path, *, epochs: int) -> dict[str, str]:
    """Commands by what they do, as a user would type them here and now for a run of so many epochs."""
    run = RunFolder(folder)
    return {
        "curves": command("-m", "tensorboard.main", "--logdir", str(folder.parent)),
        "evaluate": command(_script("val.py"), "--weights", str(run.best)),
        "detect": command(_script("detect.py"), "--weights", str(run.best), "--source", "photo.jpg"),
        "train on": command(_script("train.py"), "--resume", str(run.last), "--epochs", str(2 * epochs)),
    }


def command(*words: str) -> str:
    """The running Python with these words."""
    return f"{this_python()} {shlex.join(words)}"


def aligned(steps: dict[str, str]) -> Sequence[str]:
    """A line each, the commands below one another."""
    width = max(map(len, steps))
    return [f"  {what:<{width}}  {typed}" for what, typed in steps.items()]


def _script(name: str) -> str:
    return str(from_here(PROJECT_ROOT / name))
