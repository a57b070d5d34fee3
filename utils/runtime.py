"""Where a run computes: device, mixed precision, loader processes. The only reader of RANK and os.environ."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from utils.clock import EventClock, StepClock
from utils.structures import RunError, UserError


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The device of a run and how to compute on it."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: everything in fp32
    workers: int

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales losses for fp16 on CUDA; elsewhere it is a disabled one that passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    def step_clock(self) -> StepClock:
        """Tells where the time goes, by the device's clock on CUDA. MPS is timed as it is queued, by the host's."""
        if self.device.type != "cuda":
            return StepClock()
        return EventClock(
            partial(torch.cuda.Event, enable_timing=True), partial(torch.cuda.current_stream, self.device)
        )

    @property
    def description(self) -> str:
        """One phrase for the first line of a run, e.g. `CPU (2 threads), bf16, 2 loader processes`."""
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            where = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
        elif self.device.type == "mps":
            where = "Apple GPU"
        else:
            threads = torch.get_num_threads()
            where = f"CPU ({threads} thread{'s' * (threads > 1)})"
        precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.amp_dtype]
        processes = f"{self.workers} loader process{'es' * (self.workers != 1)}" if self.workers else "loading in place"
        return f"{where}, {precision}, {processes}"


def choose_runtime(*, device: str, amp: str, workers: int) -> Runtime:
    """The runtime for the options --device, --amp and --workers. Raises UserError for a device that is not there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes (WORLD_SIZE > 1) are not supported yet; start train.py without the launcher")
    chosen = _choose_device(device.strip().lower())
    return Runtime(device=chosen, amp_dtype=_choose_amp(amp, chosen), workers=min(workers, _usable_cores()))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_devices() -> list[str]:
    cuda = [str(index) for index in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def _choose_device(flag: str) -> torch.device:
    available = _available_devices()
    spellings = {f"cuda:{name}": name for name in available if name.isdecimal()} | {"cuda": "0", "": available[0]}
    name = spellings.get(flag, flag)
    if "," in name:
        raise UserError(
            f"--device {flag}: several devices are not supported yet; choose one of: {', '.join(available)}"
        )
    if name not in available:
        raise UserError(f"--device {flag}: no such device here; there is: {', '.join(available)}")
    return torch.device(f"cuda:{name}" if name.isdecimal() else name)


def _choose_amp(flag: str, device: torch.device) -> torch.dtype | None:
    if flag == "bf16":
        return torch.bfloat16
    if flag == "fp16":
        if device.type == "cpu":
            raise UserError("--amp fp16: the CPU trains in bf16 or fp32; use --amp auto, bf16 or off")
        return torch.float16
    if flag == "off":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_computes_bf16() else None


def _cpu_computes_bf16() -> bool:
    """Whether bf16 products are instructions of this CPU; torch emulates them elsewhere, slower than fp32."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # no public question exists up to torch 2.15
    return any(getattr(torch.cpu, question, lambda: False)() for question in asked)


@contextlib.contextmanager
def mendable_errors(*, batch_size: int, imgsz: int) -> Iterator[None]:
    """What strikes when work is under way and a user can mend becomes a RunError with one line."""
    remedy = f"lower --batch-size (now {batch_size}) or --imgsz (now {imgsz})"
    try:
        yield
    except UserError as error:
        raise RunError(str(error)) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(f"out of memory: {remedy}") from error
    except OSError as error:
        if error.strerror is None:  # not from the system: one of our own bugs
            raise
        where = f": {error.filename}" if error.filename else ""
        raise RunError(f"{error.strerror}{where}") from error
    except RuntimeError as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise RunError(f"out of memory: {remedy}") from error
        if any(words in str(error) for words in _LOADER_DIED):
            reason = "a loader process died, most likely of lack of memory (in a container: of its --shm-size)"
            raise RunError(f"{reason}: lower --workers, or {remedy}") from error
        raise


# How torch says it where it has no exception of its own
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_LOADER_DIED = ("exited unexpectedly", "is killed by signal", "shared memory")
