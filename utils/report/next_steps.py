"""What to type next with a run: to watch it, to use its weights, to go on with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from utils.files import this_python


def next_steps(
    folder: Path,
    *,
    epochs: int,
    trained: int,
    patience: int,
    nproc: int = 1,
    python: str = "python",
    scripts: Path = Path(),
) -> dict[str, str]:
    """Commands by what they do, for a finished run in `folder`, which `trained` so many of its `epochs`.

    They begin with `python`, as it is typed, and `scripts` is the folder of train.py.
    """
    best, last = (str(folder / "weights" / name) for name in ("best.pt", "last.pt"))
    further = ["--epochs", str(2 * epochs)] if trained >= epochs else ["--patience", str(2 * patience)]
    further += ["--nproc", str(nproc)] if nproc > 1 else []
    steps = {
        "curves": ["-m", "tensorboard.main", "--logdir", str(folder.parent)],
        "evaluate": [str(scripts / "val.py"), "--weights", best],
        "detect": [str(scripts / "detect.py"), "--weights", best, "--source", "photo.jpg"],
        "train on": [str(scripts / "train.py"), "--resume", last, *further],
    }
    return {what: f"{python} {shlex.join(words)}" for what, words in steps.items()}


def this_command(argv: list[str]) -> str:
    """What was typed to start this program, or as near as can be told."""
    return f"{this_python()} {shlex.join(argv)}" if argv[:1] not in ([], [""], ["-c"]) else "from Python"
