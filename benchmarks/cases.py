"""What `make bench` measures: every measurement with its name and the command that makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.workers import ROOT, Measurement
from utils.machine import usable_cores


@dataclass(frozen=True)
class StepSize:
    """What decides what a training step costs."""

    cfg: str
    imgsz: int
    batch_size: int

    @property
    def name(self) -> str:
        return f"{Path(self.cfg).stem} {self.imgsz} b{self.batch_size}"

    @property
    def toy(self) -> StepSize:
        """For a quick look at whether it runs."""
        return replace(self, imgsz=64, batch_size=2)


CPU_STEPS = (StepSize("yolov5n.yaml", 320, 16), StepSize("yolov5s.yaml", 640, 8))
CUDA_STEPS = (StepSize("yolov5s.yaml", 640, 64),)
BCCD = ROOT.parent / "shared" / "datasets" / "bccd" / "bccd.yaml"


def all_measurements(threads: int, *, on_gpu: bool, quick: bool) -> list[Measurement]:
    return [
        *_steps(threads, on_gpu=on_gpu, quick=quick),
        *_loaders(quick=quick),
        *_evaluations(threads, quick=quick),
        *_starts(quick=quick),
    ]


def _steps(threads: int, *, on_gpu: bool, quick: bool) -> list[Measurement]:
    cases = [("cpu", "auto", size) for size in CPU_STEPS]
    if on_gpu:
        cases += [("0", amp, size) for size in CUDA_STEPS for amp in ("fp16", "bf16")]
    return [
        step_measurement(
            size.toy if quick else size,
            device=device,
            amp=amp,
            compiled=compiled,
            threads=threads,
            steps=2 if quick else 15,
        )
        for device, amp, size in cases
        for compiled in (False, True)
    ]


def step_measurement(size: StepSize, *, device: str, amp: str, compiled: bool, threads: int, steps: int) -> Measurement:
    """The product's training step."""
    where = "" if device == "cpu" else f" {amp} on GPU {device}"
    flags = [
        *("--cfg", size.cfg),
        *("--imgsz", str(size.imgsz)),
        *("--batch-size", str(size.batch_size)),
        *("--device", device),
        *("--amp", amp),
        *("--threads", str(threads)),
        *("--warmup", "4"),  # as many as there are batches in memory
        *("--steps", str(steps)),
        *(["--compile"] if compiled else []),
    ]
    name = f"{size.name}{where}{' --compile' if compiled else ''}"
    return Measurement(section="step", name=name, module="step", flags=flags)


def _data_sets() -> dict[str, tuple[str, int]]:
    """Name: YAML and image size."""
    real = {"bccd 640": (str(BCCD), 640)} if BCCD.is_file() else {}
    return {"shapes 160": ("data/shapes.yaml", 160), **real}


def _loaders(*, quick: bool) -> list[Measurement]:
    return [
        Measurement(
            section="loader",
            name=f"{name}, {workers} loader process{'es' * (workers != 1)}",
            module="loading",
            flags=[
                *("--data", data),
                *("--imgsz", str(imgsz)),
                *("--workers", str(workers)),
                *("--batches", "8" if quick else "96"),
            ],
        )
        for name, (data, imgsz) in _data_sets().items()
        for workers in _worker_counts()
    ]


def _worker_counts() -> list[int]:
    """0, 1, 2, 4, ... up to the cores there are, 8 at most as is the default of train.py."""
    return [0, *(count for count in (1, 2, 4, 8) if count <= usable_cores())]


def _evaluations(threads: int, *, quick: bool) -> list[Measurement]:
    return [
        Measurement(
            section="evaluation",
            name=f"yolov5n {name}, {network}",
            module="evaluation",
            flags=[
                *("--data", data),
                *("--imgsz", str(imgsz)),
                *("--threads", str(threads)),
                *("--repeats", "1" if quick else "3"),
                *(["--weights", weights] if weights else []),
            ],
        )
        for name, (data, imgsz) in _data_sets().items()
        for network, weights in {"fresh": "", "trained": "newest"}.items()
    ]


def _starts(*, quick: bool) -> list[Measurement]:
    names = {
        "first-step": "python train.py to the first optimizer step",
        "help": "python train.py --help",
        "torch": "for comparison: python -c 'import torch'",
    }
    repeats = ["--repeats", "1" if quick else "5"]
    return [
        Measurement(section="start", name=name, module="start", flags=[what, *repeats]) for what, name in names.items()
    ]
