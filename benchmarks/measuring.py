"""What both sides of a comparison share: synthetic batches, and one way to time steps and to weigh their memory.

Runs in our environment and in the peer's alike, so it knows numpy and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_CLASSES = 80
LEARNING_RATE = 0.001  # small: what a step costs must not depend on a loss that runs away
MOMENTUM = 0.937
TOGETHER_ON_CUDA = 5  # steps between two waits for the device, so that the program can work ahead as in training
_BATCHES_IN_MEMORY = 4  # they differ in their number of boxes, as real ones do; warm up with each of them
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def step_flags(description: str | None) -> argparse.ArgumentParser:
    """The flags of a process that measures one step."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--cfg", default="yolov5n.yaml", help="network YAML")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=4, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=10)
    return parser


def loading_flags(description: str | None) -> argparse.ArgumentParser:
    """The flags of a process that measures what training samples cost."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, help="data set YAML; its training images lie in images/train beside it"
    )
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--cache", choices=("files", "ram"), default="ram")
    parser.add_argument("--samples", type=int, default=96, help="per turn, of which there are five")
    return parser


# what both sides draw: the classic defaults
AUGMENTATION = {
    "hsv_h": 0.015,
    "hsv_s": 0.7,
    "hsv_v": 0.4,
    "degrees": 0.0,
    "translate": 0.1,
    "scale": 0.5,
    "shear": 0.0,
    "perspective": 0.0,
    "flipud": 0.0,
    "fliplr": 0.5,
    "mosaic": 1.0,
    "mixup": 0.0,
    "copy_paste": 0.0,
}
_TURNS = 5


# ---- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SyntheticBatch:
    """Invented photos of B images with T boxes."""

    images: np.ndarray  # (B, H, W, 3) u8
    boxes: np.ndarray  # (T, 4) f32 xyxy px
    classes: np.ndarray  # (T,) i64
    image_of: np.ndarray  # (T,) i64


def synthetic_batches(imgsz: int, batch_size: int, *, seed: int = 0) -> list[SyntheticBatch]:
    """Batches with 1 to 13 boxes per image, 7 on average, a tenth to a half of the image wide and high."""
    rng = np.random.default_rng(seed)
    return [_synthetic_batch(rng, imgsz, batch_size) for _ in range(_BATCHES_IN_MEMORY)]


def _synthetic_batch(rng: np.random.Generator, imgsz: int, batch_size: int) -> SyntheticBatch:
    patches = rng.integers(40, 216, (batch_size, imgsz // 16, imgsz // 16, 3))
    noise = rng.integers(-40, 40, (batch_size, imgsz, imgsz, 3))
    images = (patches.repeat(16, axis=1).repeat(16, axis=2) + noise).astype(np.uint8)
    counts = rng.integers(1, 14, batch_size)
    size = rng.uniform(0.1, 0.5, (counts.sum(), 2)) * imgsz
    corner = rng.uniform(0, 1, size.shape) * (imgsz - size)
    return SyntheticBatch(
        images=images,
        boxes=np.concatenate((corner, corner + size), 1).astype(np.float32),
        classes=rng.integers(0, NUM_CLASSES, len(size)),
        image_of=np.repeat(np.arange(batch_size), counts),
    )


# ---- memory -------------------------------------------------------------------------------------------------------


def memory_mib(field: str) -> float | None:
    """`VmRSS` (what this process holds now) or `VmHWM` (the most since the last reset); None where Linux is not.

    Not ru_maxrss: that one begins with what the parent held when it started this process.
    """
    if not _STATUS.is_file():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid it: then the peak is that of the whole process
        _CLEAR.write_text("5")


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


# ---- time ---------------------------------------------------------------------------------------------------------


def measure_steps(
    step: Callable[[int], object],
    *,
    batch_size: int,
    warmup: int,
    steps: int,
    synchronize: Callable[[], object] | None = None,
    together: int = 1,
) -> dict[str, object]:
    """Figures of `step(number)`: images per second, seconds, MiB of this process.

    With a device that works ahead of the program, `synchronize` waits for it once per `together` steps. The first step
    is timed by itself: where a network is compiled, that is when. `peak` is of the whole process since before the first
    step, `steps_peak` of the steps that count, without what compiling took.
    """
    wait = synchronize or (lambda: None)
    before = memory_mib("VmRSS")
    reset_peak_memory()
    first = _seconds(step, range(1), wait)
    _seconds(step, range(1, warmup), wait)
    peak = memory_mib("VmHWM")
    reset_peak_memory()
    starts = range(warmup, warmup + steps * together, together)
    seconds = [_seconds(step, range(start, start + together), wait) / together for start in starts]
    steps_peak = memory_mib("VmHWM")
    median = statistics.median(seconds)
    return {
        "images_per_second": batch_size / median,
        "images_per_second_best": batch_size / min(seconds),
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds": [round(second, 6) for second in seconds],
        "first_step_seconds": first,
        "memory_mib": {
            "before": before,
            "peak": None if peak is None else max(peak, steps_peak),
            "steps_peak": steps_peak,
            "steps_add": _difference(steps_peak, before),
        },
    }


def cpu_milliseconds(make: Callable[[int], object], samples: int) -> dict[str, object]:
    """CPU time of this process per sample, the least of some turns: other programs can only lengthen one."""
    for number in range(min(samples, 16)):
        make(number)
    turns = []
    for turn in range(_TURNS):
        start = time.process_time()
        for number in range(turn * samples, (turn + 1) * samples):
            make(number)
        turns.append((time.process_time() - start) / samples * 1000)
    return {"cpu_ms": min(turns), "cpu_ms_of_turns": [round(turn, 4) for turn in turns]}


def _seconds(step: Callable[[int], object], numbers: range, wait: Callable[[], object]) -> float:
    start = time.perf_counter()
    for number in numbers:
        step(number)
    wait()
    return time.perf_counter() - start
