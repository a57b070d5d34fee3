"""A data set and a network so small that a test can afford to train: an epoch takes a tenth of a second."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent

NETWORK = {
    "nc": 2,
    "depth_multiple": 0.33,
    "width_multiple": 0.125,
    "anchors": [[10, 13, 33, 23], [30, 61, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [64, 6, 2, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C3", [128]],  # 3, stride 8
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 1, "SPPF", [256, 5]],  # 5, stride 16
    ],
    "head": [
        [-1, 1, "Conv", [128, 1, 1]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 3, "C3", [128, False]],  # 9
        [[9, 5], 1, "Detect", ["nc", "anchors"]],
    ],
}
LEARNS_FAST = {"lr0": 0.02, "lrf": 1.0, "warmup_epochs": 0, "box": 0.2}
AUGMENTS_LITTLE = {"mosaic": 0, "scale": 0, "translate": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0}
SIZES = ((64, 64), (45, 61), (63, 50))  # height, width: odd ones too


@dataclass(frozen=True)
class Tiny:
    """A data set of 8 + 4 drawn images, network and hyp YAML, and the options that train on them in a moment."""

    folder: Path
    data: Path
    cfg: Path
    hyp: Path

    def options(self, **changes) -> dict:
        """For `train.run`; runs go to `runs/train` of the working directory."""
        usual = {
            "data": str(self.data),
            "cfg": str(self.cfg),
            "hyp": str(self.hyp),
            "imgsz": 64,
            "batch_size": 4,
            "epochs": 1,
            "device": "cpu",
            "workers": 0,
            "amp": "off",
            "noplots": True,
        }
        return {name: value for name, value in {**usual, **changes}.items() if value is not None}

    def flags(self, *more: str, **changes) -> list[str]:
        """The same for the command line."""
        flags = []
        for name, value in self.options(**changes).items():
            flags += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        return [*flags, *more]

    def image(self, split: str, index: int) -> Path:
        return self.folder / "images" / split / f"{index}.png"

    def label(self, split: str, index: int) -> Path:
        return self.folder / "labels" / split / f"{index}.txt"


@pytest.fixture(scope="session", autouse=True)
def signals_as_usual():
    """Not ignored, as they may be where the tests run in the background; a run would leave them so."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}
    for signum, handler in usual.items():
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def threads_as_before():
    """A test that leaves torch another number of threads would change the last digits of the next one."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def draw_tiny():
    """Draws a tiny data set into a new folder."""
    return _draw


def _draw(folder: Path) -> Tiny:
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            (height, width), label = SIZES[index % len(SIZES)], index % 2
            picture = np.full((height, width, 3), 90, np.uint8)
            cv2.rectangle(picture, (10, 12), (34, 38), (0, 0, 255) if label else (255, 0, 0), -1)
            picture[0, 0] = 100 + 10 * index + (split == "val")  # copies would be findings
            assert cv2.imwrite(str(folder / "images" / split / f"{index}.png"), picture)
            row = f"{label} {22.5 / width} {25.5 / height} {25 / width} {27 / height}\n"
            (folder / "labels" / split / f"{index}.txt").write_text(row)
    files = {
        "data": {"path": ".", "train": "images/train", "val": "images/val", "names": ["blue", "red"]},
        "cfg": NETWORK,
        "hyp": LEARNS_FAST | AUGMENTS_LITTLE,
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return Tiny(folder, *(folder / f"{name}.yaml" for name in files))


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Tiny:
    """A data set of the test's own to damage; the working directory is an empty folder beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return _draw(tmp_path / "set")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run of 60 epochs on a tiny data set, which found most objects. Read only."""
    import train

    folder = tmp_path_factory.mktemp("trained")
    tiny = _draw(folder / "set")
    train.run(**tiny.options(project=str(folder), name="run", epochs=60, nominal_batch="4", quiet=True))
    return folder / "run"


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a script's main in this process: `cli(train, *flags)` -> exit code, standard output, standard error."""

    def call(script, *flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *flags])
        code = script.main()
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def start():
    """Starts `python SCRIPT flags...` in a process group of its own, its output piped; ends it with the test.

    Without a script, of the project's folder, it is `python flags...`.
    """
    processes = []

    def launch(script: str | None, *flags: str, **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has children ignore Ctrl-C
        process = subprocess.Popen(
            [sys.executable, *([str(ROOT / script)] if script else []), *flags],
            start_new_session=True,
            env=environment,
            **{**pipes, **options},
        )
        signal.signal(signal.SIGINT, usual)
        processes.append(process)
        return process

    yield launch
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def random_states():
    """Takes down the three global random states, as values to compare."""

    def states() -> tuple:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)

    return states


@pytest.fixture(scope="session")
def shared_datasets() -> Path:
    """The folder of real data sets."""
    folder = ROOT.parent / "shared" / "datasets"
    if not folder.is_dir():
        pytest.skip("the data sets of ../shared/datasets are not here")
    return folder
