"""One process: the product's training step on synthetic batches in memory, its figures as a line of JSON.

    python -m benchmarks.step --cfg yolov5n.yaml --imgsz 320 --batch-size 16 --threads 2

A step is forward, loss, backward, optimizer and moving average, by `TrainStep`; every batch is an update.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measuring import (
    LEARNING_RATE,
    MOMENTUM,
    TOGETHER_ON_CUDA,
    SyntheticBatch,
    measure_steps,
    step_flags,
    synthetic_batches,
)
from benchmarks.product import built_trainer, placeholder_data
from benchmarks.roofline import step_gflop
from models.yolo import gflops
from utils.structures import Batch
from utils.train.trainer import Trainer

_TRACED_STEPS = 3
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> None:
    flags = step_flags(__doc__).parse_args()
    torch.set_num_threads(flags.threads)
    options = {
        "cfg": flags.cfg,
        "imgsz": flags.imgsz,
        "batch_size": flags.batch_size,
        "device": flags.device,
        "amp": flags.amp,
        "noautoanchor": True,
        "workers": 0,
    }
    if flags.compile:
        options["compile"] = True
    with placeholder_data(flags.batch_size) as data, built_trainer(data=data, **options) as trainer:
        print(json.dumps(_figures(trainer, flags)), flush=True)


def _figures(trainer: Trainer, flags: argparse.Namespace) -> dict[str, Any]:
    on_cuda = trainer.runtime.device.type == "cuda"
    step = _step(trainer, [as_batch(batch, pin=on_cuda) for batch in synthetic_batches(flags.imgsz, flags.batch_size)])
    figures = measure_steps(
        step,
        batch_size=flags.batch_size,
        warmup=flags.warmup,
        steps=flags.steps,
        synchronize=torch.cuda.synchronize if on_cuda else None,
        together=TOGETHER_ON_CUDA if on_cuda else 1,
    )
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[trainer.runtime.amp_dtype]
    total = step(0).total.item()
    if not torch.isfinite(torch.tensor(total)):
        raise RuntimeError(f"the loss is no longer a number ({total}): these steps are no training")
    return {
        **figures,
        "gflop": step_gflop(gflops(trainer.step.model, flags.imgsz), flags.batch_size),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "device": trainer.runtime.description,
        "torch": torch.__version__,
        **(_cuda_figures(step) if on_cuda else {}),
    }


def _step(trainer: Trainer, batches: list[Batch]) -> Callable[[int], Any]:
    settings = replace(trainer.schedule(0), lrs=(LEARNING_RATE,) * 3, momentum=MOMENTUM, update=True)
    trainer.step.model.train()

    def step(number: int) -> Any:
        return trainer.step(batches[number % len(batches)], settings)

    return step


def as_batch(batch: SyntheticBatch, *, pin: bool) -> Batch:
    """As the loader would make it."""
    made = Batch(
        images=torch.from_numpy(batch.images).permute(0, 3, 1, 2),  # channels last in memory, as the loader's
        boxes=torch.from_numpy(batch.boxes),
        classes=torch.from_numpy(batch.classes),
        image_of=torch.from_numpy(batch.image_of),
        indices=torch.arange(len(batch.images)),
    )
    return made.pin_memory() if pin else made


# ---- CUDA ---------------------------------------------------------------------------------------------------------


def _cuda_figures(step: Callable[[int], Any]) -> dict[str, Any]:
    return {
        "cuda_peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "traced_waits_per_step": _traced_waits(step),
        "synchronising_call": _synchronising_call(step),  # last, for it may leave a step half done
    }


def _synchronising_call(step: Callable[[int], Any]) -> str | None:
    """What torch says of the first call within a step that waits for the device; None where there is none."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(_TRACED_STEPS):
            step(number)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _traced_waits(step: Callable[[int], Any]) -> dict[str, float]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for number in range(_TRACED_STEPS):
            with record_function("benchmarks.step"):
                step(number)
    return waits_per_step(trace.events())


def waits_per_step(events: Any) -> dict[str, float]:
    """Waits of the host by name, and copies from the device to the host, per step of a profiler's trace.

    A wait counts where it lies within a step; the profiler's own, at its end, does not. A copy counts wherever the
    device made it, for it runs after the program has asked for it.
    """
    events = list(events)
    spans = [event.time_range for event in events if event.name == "benchmarks.step" and _on_host(event)]
    counts = dict.fromkeys((*_WAITS, "Memcpy DtoH"), 0)
    for event in events:
        start = event.time_range.start
        if event.name in _WAITS and any(span.start <= start <= span.end for span in spans):
            counts[event.name] += 1
        elif event.name.startswith("Memcpy DtoH"):
            counts["Memcpy DtoH"] += 1
    return {name: count / len(spans) for name, count in counts.items()}


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU  # record_function shows on the device's row as well


if __name__ == "__main__":
    main()
