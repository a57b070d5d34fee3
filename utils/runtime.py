"""Where a run computes: on one device, on several by DataParallel, or as ranks; mixed precision, loader processes.

With launch.py the only reader of os.environ.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from utils.clock import PARTS, EventClock, StepClock
from utils.launch import Place, place
from utils.machine import resident_bytes, usable_cores
from utils.ranks import Group, Ranks
from utils.structures import RunError, UserError

Note = Callable[[str], object]  # takes a line for the user


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The device of a run and how to compute on it, and the processes that share the work."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: everything in fp32
    workers: int
    compile: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    devices: tuple[torch.device, ...] = ()  # all that this process computes on, where these are several
    unused: int = 0  # GPUs more that are there, where nobody named one

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    @property
    def compiles_network(self) -> bool:
        """Whether `compile` means torch.compile here: everywhere but on the CPU, where it gains nothing."""
        return self.compile and self.device.type != "cpu"

    @property
    def uses_library(self) -> bool:
        """Whether `compile` means that the network is given the operations of models/norm_silu.py."""
        return self.compile and self.device.type == "cpu"

    @property
    def queues_work(self) -> bool:
        """Whether the device works on while the host goes on, so that reading a result means to wait."""
        return self.device.type != "cpu"

    @property
    def pin_memory(self) -> bool:
        """Whether batches reach the device faster from memory that stays in its place."""
        return self.device.type == "cuda"

    def replicas(self, model: nn.Module) -> nn.Module:
        """What to call in the place of `model` in training, where several devices take their parts of a batch."""
        if self.devices:
            return nn.DataParallel(_InPrecision(model, self.autocast), device_ids=list(self.devices))
        return self.ranks.replicas(model)

    @property
    def synchronises(self) -> bool:
        """Whether there are batch norms over all ranks, for `--sync-bn`."""
        return self.ranks.place is not None and self.device.type == "cuda"

    def check_synchronises(self) -> None:
        """Raises UserError where there are none."""
        if not self.synchronises:
            has = "the CPU, where torch has none" if self.ranks.place else "one process"
            raise UserError(f"--sync-bn: is for several ranks on CUDA GPUs, and this is {has}; leave it out")

    def compiled(self, function: Callable) -> Callable:
        """What to call in the place of a network or a loss in training: its twin of torch.compile where that is due."""
        return torch.compile(function) if self.compiles_network else function

    def network_input(self, images: Tensor) -> Tensor:
        """u8 images as 0..1 in the precision of autocast, in which the quotients are rounded once, as they would be."""
        quotients = images.to(self.amp_dtype or torch.float32)
        return quotients.div_(255)  # in place: fresh memory costs more than the division

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales losses for fp16; for other precisions it is a disabled one that passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    def free_memory(self) -> int | None:
        """Bytes that the device has free for this process, its own idle reserve included; None where nobody counts."""
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def memory_used(self) -> int | None:
        """Bytes that training holds on the device, by torch's own count; on the CPU those of this process."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return resident_bytes()

    @contextlib.contextmanager
    def memory_peak(self) -> Iterator[MemoryPeak]:
        """How much device memory a `with` block takes. Running out of it ends the block, and `bytes` is None."""
        gc.collect()  # what ran out of memory before may live on in a cycle
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        peak = MemoryPeak()
        try:
            yield peak
            torch.cuda.synchronize(self.device)
            peak.bytes = torch.cuda.max_memory_reserved(self.device) - before
            torch.cuda.empty_cache()
            peak.kept = torch.cuda.memory_reserved(self.device) - before
        except torch.OutOfMemoryError:
            peak.bytes = None

    def step_clock(self, parts: Sequence[str] = PARTS) -> StepClock:
        """Tells where the time goes, by the device's clock on CUDA. MPS is timed as it is queued, by the host's."""
        if self.device.type != "cuda":
            return StepClock(parts)
        return EventClock(
            partial(torch.cuda.Event, enable_timing=True), partial(torch.cuda.current_stream, self.device), parts
        )

    @property
    def description(self) -> str:
        """One phrase for the first line of a run, e.g. `CPU (2 threads), bf16, 2 loader processes`."""
        processes = f"{self.workers} loader process{'es' * (self.workers != 1)}" if self.workers else "loading in place"
        each = " each" * (not self.ranks.alone)
        return f"{self._all_devices}{', compiled' * self.compile}, {processes}{each}"

    @property
    def made_on(self) -> str:
        """What computes, with all that the last digits of a result may depend on."""
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{self._all_devices}{', compiled' * self.compile}, {capability}"

    @property
    def _all_devices(self) -> str:
        """The devices of all ranks, which are taken to be alike."""
        count = max(self.ranks.count, len(self.devices))
        how = "ranks" if len(self.devices) < 2 else "devices"
        return f"{count} {how} of {self.device_description}" if count > 1 else self.device_description

    @property
    def device_description(self) -> str:
        """What computes, and how exactly, e.g. `CPU (2 threads), bf16`."""
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            where = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
        elif self.device.type == "mps":
            where = "Apple GPU"
        else:
            threads = torch.get_num_threads()
            where = f"CPU ({threads} thread{'s' * (threads > 1)})"
        precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.amp_dtype]
        return f"{where}, {precision}"


class _InPrecision(nn.Module):
    """A network under autocast of its own: in DataParallel's threads that of others would be fp16, whatever it is."""

    def __init__(self, network: nn.Module, autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
        super().__init__()
        self.network, self._autocast = network, autocast

    def forward(self, images: Tensor) -> list[Tensor]:
        with self._autocast():
            return self.network(images)


@dataclass
class MemoryPeak:
    bytes: int | None = None
    kept: int = 0  # bytes, of what still lives after the block


def choose_runtime(
    *,
    device: str,
    amp: str,
    workers: int,
    compile: bool = False,
    deterministic: bool = False,
    fixed_shapes: bool = False,
    ranks: Ranks | None = None,
    note: Note | None = None,
) -> Runtime:
    """The runtime for the options of these names. Raises UserError for a device that is not there.

    And for what the device cannot do; but with `note` that is a line, and something else is taken.

    `ranks` are those of `join_ranks`; without, for work that is not shared out, a launcher of several is refused.

    `deterministic` is torch's own switch, and so holds for the whole process, as does what follows from it and from
    `fixed_shapes`, inputs of one size: whether cuDNN tries which of its kernels are the fastest.
    """
    if ranks is None:
        ranks = _by_itself()
    available = _available_devices()
    strategy = choose_strategy(place=ranks.place, available=available, flag=device.strip().lower())
    chosen = torch.device(strategy.devices[0])
    if ranks.place and chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # for NCCL; and nothing of this rank shall be on the GPU of another
    try:
        amp_dtype = _choose_amp(amp, chosen)
    except UserError as refusal:
        raise_or_note(refusal, note, "with --amp auto")
        amp_dtype = _choose_amp("auto", chosen)
    several = strategy.kind == "DataParallel"
    if several and compile:
        names, count = ",".join(map(_plain_name, strategy.devices)), len(strategy.devices)
        raise UserError(
            f"--compile with --device {names}: not with several GPUs in one process; use --nproc {count}, too"
        )
    if compile and chosen.type != "cpu":
        try:
            _try_compiler(chosen)
        except UserError as refusal:
            raise_or_note(refusal, note, "without it")
            compile = False
    if deterministic:
        _be_deterministic()
    elif chosen.type == "cuda":
        torch.backends.cudnn.benchmark = fixed_shapes
    return Runtime(
        device=chosen,
        amp_dtype=amp_dtype,
        workers=min(workers, max(usable_cores() // ranks.local_count, 1)),
        compile=compile,
        ranks=ranks,
        devices=tuple(map(torch.device, strategy.devices)) if several else (),
        unused=sum(name.isdecimal() for name in available) - 1 if chosen.type == "cuda" and not device else 0,
    )


def join_ranks(*, dist_timeout: float = 10.0) -> Ranks:
    """The ranks that a launcher started, when all of them are there; this process by itself where there is no launcher.

    They wait for one another for `dist_timeout` minutes, and share the cores of their host. Raises UserError where they
    do not meet.
    """
    here = place()
    if here is None:
        return Ranks()
    if here.local_ranks == here.ranks:  # else gloo asks for the address of this host's name, which may have none
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    _share_cores(here)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    return Group(here, backend=backend, timeout_s=60 * dist_timeout)


def _share_cores(here: Place) -> None:
    if not here.ours and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # as torch says where nobody else does
        torch.set_num_threads(max(usable_cores() // here.local_ranks, 1))


_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def _by_itself() -> Ranks:
    here = place()
    if here is not None and here.ranks > 1:
        error = UserError(f"this is work for one process, and a launcher started {here.ranks}: start it without one")
        error.said_elsewhere = here.rank > 0
        raise error
    return Ranks()


# ---- strategy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the devices of a run are used, and those of this process, as torch names them."""

    kind: Literal["single", "DataParallel", "DistributedDataParallel"]
    devices: tuple[str, ...]


def choose_strategy(*, place: Place | None, available: Sequence[str], flag: str) -> Strategy:
    """Where this process computes: `available` are the names of devices, the best first, and `flag` is `--device`.

    Ranks of a launcher take one device each. Without one, several that the flag names are for DataParallel. Raises
    UserError for devices that are not there, and where there are fewer than ranks.
    """
    named = _named_devices(flag, available)
    if place is not None:
        return Strategy(kind="DistributedDataParallel", devices=(_device_of_rank(place, named, available, flag),))
    if len(named) > 1 and flag not in ("", "cuda"):
        return Strategy(kind="DataParallel", devices=tuple(map(_torch_name, named)))
    return Strategy(kind="single", devices=(_torch_name(named[0]),))


def share_of_machine(here: Place | None, *, device: str, workers: int) -> tuple[str, int]:
    """`--device` and `--workers` of a process that works by itself, though a launcher started it beside others."""
    if here is None:
        return device, workers
    _share_cores(here)
    strategy = choose_strategy(place=here, available=_available_devices(), flag=device.strip().lower())
    return _plain_name(strategy.devices[0]), min(workers, max(usable_cores() // here.local_ranks, 1))


def _named_devices(flag: str, available: Sequence[str]) -> list[str]:
    """What the flag names, as in `available`; with nothing it is all GPUs, or the best there is."""
    gpus = [name for name in available if name.isdecimal()]
    if flag == "" or (flag == "cuda" and gpus):
        return gpus or [available[0]]
    named = [_plain_name(name.strip()) for name in flag.split(",")]
    for name in named:
        if name not in available:
            where = f"--device {flag}: no such device here"
            raise UserError(f"{where}{f' as {name}' * (len(named) > 1)}; there is: {', '.join(available)}")
    if len(set(named)) < len(named):
        raise UserError(f"--device {flag}: names a device twice")
    if len(named) > 1 and not set(named) <= set(gpus):
        raise UserError(f"--device {flag}: only GPUs are used several at a time; there is: {', '.join(available)}")
    return named


def _device_of_rank(place: Place, named: Sequence[str], available: Sequence[str], flag: str) -> str:
    if named == ["mps"]:
        if flag:
            raise UserError("--device mps: ranks need GPUs of CUDA, or --device cpu")
        return "cpu"
    if named == ["cpu"]:
        return "cpu"
    if len(named) < place.local_ranks:
        whose = f"--device {flag} names" if flag else "this machine has"
        raise UserError(
            f"{place.local_ranks} ranks on this machine want a GPU each, and {whose} {len(named)}; "
            f"start fewer ranks, or use --device cpu; there is: {', '.join(available)}"
        )
    return _torch_name(named[place.local_rank])


def _plain_name(name: str) -> str:
    number = name.removeprefix("cuda:")
    return number if number.isdecimal() else name


def _torch_name(name: str) -> str:
    return f"cuda:{name}" if name.isdecimal() else name


def raise_or_note(refusal: UserError, note: Note | None, instead: str) -> None:
    """Raise the refusal; but where the user cannot choose any more, note its reason and what is done `instead`."""
    if note is None:
        raise refusal
    reason, _, _ = str(refusal).rpartition("; ")
    note(f"{reason}; going on {instead}")


def _try_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work, for lack of a C compiler for one."""
    try:
        torch.compile(nn.SiLU())(torch.ones(8, device=device))
    except RuntimeError as error:
        raise UserError(f"--compile: {_first_line(error)}; leave it out") from error


def _be_deterministic() -> None:
    """Kernels that repeat their result; where torch has none for an operation it warns and takes what there is."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would cost a pass, and we read nothing unwritten
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def keep_albumentations_offline() -> None:
    """Before its import: the package would ask the internet for a newer one."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


def wandb_mode() -> str | None:
    """How Weights & Biases is to work: offline, disabled, ...; None where the environment does not say."""
    return os.environ.get("WANDB_MODE", "").strip().lower() or None


def environment(**changes: str) -> dict[str, str]:
    """That of this process with changes, for one that it starts."""
    return {**os.environ, **changes}


def _available_devices() -> list[str]:
    cuda = [str(index) for index in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def _choose_amp(flag: str, device: torch.device) -> torch.dtype | None:
    if flag == "bf16":
        return torch.bfloat16
    if flag == "fp16":
        if device.type != "cuda":  # the scaler of losses counts in float64, which MPS lacks
            raise UserError("--amp fp16 (--half): needs a CUDA GPU; use --amp auto, bf16 or off")
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
    except RunError:
        raise
    except UserError as error:
        under_way = RunError(str(error))
        under_way.said_elsewhere = error.said_elsewhere
        raise under_way from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(f"out of memory: {remedy}") from error
    except BrokenPipeError:  # `| head` has read enough, which is no mistake
        raise
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
        if _is_of_compiler(error):
            raise RunError(f"--compile: {_first_line(error)}; leave it out") from error
        raise


def _is_of_compiler(error: RuntimeError) -> bool:
    """Told by where its class comes from: importing the classes would take a second, and they move about."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


def _first_line(error: RuntimeError) -> str:
    """What went wrong, in torch's words; a first line such as `backend='inductor' raised:` only says who speaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
    return telling.rstrip(".:;")


# How torch says it where it has no exception of its own
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_LOADER_DIED = ("exited unexpectedly", "is killed by signal", "shared memory")
