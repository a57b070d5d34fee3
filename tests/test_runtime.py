import errno
import os
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from utils import runtime
from utils.clock import EventClock, StepClock
from utils.launch import Place
from utils.ranks import LostRank
from utils.runtime import Runtime, Strategy, choose_runtime, choose_strategy, mendable_errors
from utils.structures import RunError, UserError

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with the given devices: machine(cuda=2, capability=(8, 0), mps=False, bf16_cpu=False)."""

    def build(
        *, cuda: int = 0, capability: tuple[int, int] = (8, 0), mps: bool = False, bf16_cpu: bool = False
    ) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16_cpu, raising=False)

    return build


def chosen(device: str = "", amp: str = "off", workers: int = 0) -> Runtime:
    return choose_runtime(device=device, amp=amp, workers=workers)


@pytest.mark.parametrize(
    ("here", "flag", "device"),
    [
        ({}, "", "cpu"),
        ({"mps": True}, "", "mps"),
        ({"cuda": 2}, "", "cuda:0"),
        ({"cuda": 2, "mps": True}, "", "cuda:0"),
        ({"cuda": 2}, "cpu", "cpu"),
        ({"cuda": 2}, "1", "cuda:1"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, "cuda", "cuda:0"),
        ({"mps": True}, " MPS ", "mps"),
        ({"mps": True}, "CPU", "cpu"),
    ],
)
def test_device(machine, here, flag, device):
    machine(**here)
    assert chosen(flag).device == torch.device(device)


@pytest.mark.parametrize(
    ("here", "flag", "message"),
    [
        ({}, "0", "--device 0: no such device here; there is: cpu"),
        ({}, "cuda", "--device cuda: no such device here; there is: cpu"),
        ({"cuda": 2}, "2", "--device 2: no such device here; there is: 0, 1, cpu"),
        ({"cuda": 1, "mps": True}, "tpu", "--device tpu: no such device here; there is: 0, mps, cpu"),
        ({"cuda": 1}, "-1", "--device -1: no such device here; there is: 0, cpu"),
        ({"cuda": 1}, "cuda:cpu", "--device cuda:cpu: no such device here; there is: 0, cpu"),
        ({"cuda": 1}, "cuda:", "--device cuda:: no such device here; there is: 0, cpu"),
    ],
)
def test_a_device_that_is_not_there_names_those_that_are(machine, here, flag, message):
    machine(**here)
    with pytest.raises(UserError) as error:
        chosen(flag)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("here", "amp", "dtype"),
    [
        ({}, "auto", None),
        ({"bf16_cpu": True}, "auto", torch.bfloat16),
        ({"cuda": 1, "capability": (9, 0)}, "auto", torch.bfloat16),
        ({"cuda": 1, "capability": (8, 0)}, "auto", torch.bfloat16),
        ({"cuda": 1, "capability": (7, 5)}, "auto", torch.float16),
        ({"cuda": 1, "capability": (7, 5), "bf16_cpu": True}, "auto", torch.float16),
        ({"mps": True, "bf16_cpu": True}, "auto", None),
        ({}, "bf16", torch.bfloat16),
        ({"cuda": 1}, "fp16", torch.float16),
        ({"cuda": 1}, "off", None),
        ({"bf16_cpu": True}, "off", None),
    ],
)
def test_mixed_precision(machine, here, amp, dtype):
    machine(**here)
    assert chosen(amp=amp).amp_dtype == dtype


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_needs_scaled_losses_which_are_for_cuda_alone(machine, device):
    machine(cuda=1, mps=True)
    with pytest.raises(UserError, match=r"--amp fp16 \(--half\): needs a CUDA GPU; use --amp auto, bf16 or off"):
        chosen(device, amp="fp16")


@pytest.mark.parametrize("bf16_cpu", [False, True])
def test_a_run_that_cannot_be_given_another_precision_gets_it_by_itself(machine, bf16_cpu):
    machine(bf16_cpu=bf16_cpu)
    notes = []
    runtime = choose_runtime(device="", amp="fp16", workers=0, note=notes.append)
    assert runtime.amp_dtype is (torch.bfloat16 if bf16_cpu else None)
    assert notes == ["--amp fp16 (--half): needs a CUDA GPU; going on with --amp auto"]


def test_a_torch_without_the_private_questions_trains_in_fp32(machine, monkeypatch):
    machine()
    for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, question)
    assert chosen(amp="auto").amp_dtype is None


def test_workers_are_lowered_to_the_cores_there_are(machine, monkeypatch):
    machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 6}, raising=False)
    assert [chosen(workers=count).workers for count in (0, 2, 3, 8)] == [0, 2, 3, 3]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert chosen(workers=8).workers == 4


def test_work_for_one_process_is_not_done_by_several(machine, monkeypatch):
    machine()
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="for one process, and a launcher started 2: start it without one"):
        chosen()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert chosen().device == CPU


def at(local_rank: int = 0, local_ranks: int = 2) -> Place:
    return Place(
        rank=local_rank,
        ranks=8,
        local_rank=local_rank,
        local_ranks=local_ranks,
        master=("here", 1),
        served=False,
        launch="",
        restarts=0,
        ours=False,
    )


GPUS, APPLE, BARE = ("0", "1", "2", "cpu"), ("mps", "cpu"), ("cpu",)


@pytest.mark.parametrize(
    ("place", "available", "flag", "kind", "devices"),
    [
        (None, BARE, "", "single", "cpu"),
        (None, APPLE, "", "single", "mps"),
        (None, GPUS, "", "single", "cuda:0"),
        (None, GPUS, "cuda", "single", "cuda:0"),
        (None, GPUS, "2", "single", "cuda:2"),
        (None, GPUS, "cpu", "single", "cpu"),
        (None, GPUS, "0,1", "DataParallel", "cuda:0 cuda:1"),
        (None, GPUS, "cuda:2, cuda:0", "DataParallel", "cuda:2 cuda:0"),
        (at(), BARE, "", "DistributedDataParallel", "cpu"),
        (at(1), BARE, "cpu", "DistributedDataParallel", "cpu"),
        (at(1), APPLE, "", "DistributedDataParallel", "cpu"),
        (at(0), GPUS, "", "DistributedDataParallel", "cuda:0"),
        (at(1), GPUS, "", "DistributedDataParallel", "cuda:1"),
        (at(2, 3), GPUS, "cuda", "DistributedDataParallel", "cuda:2"),
        (at(0), GPUS, "2,0", "DistributedDataParallel", "cuda:2"),
        (at(1), GPUS, "2,0", "DistributedDataParallel", "cuda:0"),
        (at(1), GPUS, "cpu", "DistributedDataParallel", "cpu"),
        (at(0, 1), GPUS, "1", "DistributedDataParallel", "cuda:1"),
    ],
)
def test_strategy(place, available, flag, kind, devices):
    assert choose_strategy(place=place, available=available, flag=flag) == Strategy(
        kind=kind, devices=tuple(devices.split())
    )


@pytest.mark.parametrize(
    ("place", "available", "flag", "message"),
    [
        (None, ("0", "cpu"), "0,1", "--device 0,1: no such device here as 1; there is: 0, cpu"),
        (None, GPUS, "0,0", "--device 0,0: names a device twice"),
        (None, GPUS, "0,cpu", "--device 0,cpu: only GPUs are used several at a time; there is: 0, 1, 2, cpu"),
        (at(1, 4), GPUS, "", "4 ranks on this machine want a GPU each, and this machine has 3; start fewer ranks"),
        (at(0), GPUS, "1", "2 ranks on this machine want a GPU each, and --device 1 names 1; start fewer ranks, or"),
        (at(0), APPLE, "mps", "--device mps: ranks need GPUs of CUDA, or --device cpu"),
        (at(0), BARE, "0", "--device 0: no such device here; there is: cpu"),
    ],
)
def test_devices_that_ranks_cannot_have(place, available, flag, message):
    with pytest.raises(UserError) as error:
        choose_strategy(place=place, available=available, flag=flag)
    assert str(error.value).startswith(message)


def test_several_gpus_in_one_process_are_not_compiled_for(machine):
    machine(cuda=2)
    with pytest.raises(UserError, match="--compile with --device 1,0: not with several GPUs in one process; use --npr"):
        choose_runtime(device="1,0", amp="off", workers=0, compile=True)
    runtime = choose_runtime(device="1,0", amp="off", workers=0)
    assert runtime.devices == (torch.device("cuda:1"), torch.device("cuda:0"))
    assert (runtime.device, runtime.unused) == (torch.device("cuda:1"), 0)


@pytest.mark.parametrize(("flag", "unused"), [("", 2), ("0", 0), ("cpu", 0)])
def test_gpus_that_nobody_uses_are_counted(machine, flag, unused):
    machine(cuda=3)
    assert chosen(flag).unused == unused


def test_statistics_are_synchronised_among_ranks_on_gpus_alone(machine):
    machine()
    with pytest.raises(UserError, match="--sync-bn: is for several ranks on CUDA GPUs, and this is one process; leave"):
        chosen().check_synchronises()


@pytest.mark.parametrize(("dtype", "product"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_autocast_computes_products_in_the_chosen_precision(dtype, product):
    with Runtime(device=CPU, amp_dtype=dtype, workers=0).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_losses_are_scaled_for_fp16_alone(dtype):
    scaler = Runtime(device=CPU, amp_dtype=dtype, workers=0).grad_scaler()
    assert not scaler.is_enabled()
    assert scaler.scale(torch.tensor(3.0)) == 3
    assert Runtime(device=CPU, amp_dtype=torch.float16, workers=0).grad_scaler().is_enabled()


@pytest.mark.parametrize(
    ("device", "dtype", "workers", "phrase"),
    [
        ("cpu", None, 0, "CPU (1 thread), fp32, loading in place"),
        ("cpu", torch.bfloat16, 1, "CPU (1 thread), bf16, 1 loader process"),
        ("mps", torch.float16, 4, "Apple GPU, fp16, 4 loader processes"),
    ],
)
def test_description(monkeypatch, device, dtype, workers, phrase):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Runtime(device=torch.device(device), amp_dtype=dtype, workers=workers).description == phrase


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no labels"), "no labels"),
        (torch.OutOfMemoryError("CUDA"), "out of memory: lower --batch-size (now 16) or --imgsz (now 640)"),
        (MemoryError(), "out of memory: lower --batch-size (now 16) or --imgsz (now 640)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory: lower --batch-size"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."),
            "a loader process died, most likely of lack of memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "last.pt"), "No space left on device: last.pt"),
        (RuntimeError("MPS backend out of memory (9 bytes)"), "out of memory: lower --batch-size"),
    ],
)
def test_what_a_user_can_mend_in_mid_run_is_one_line(error, line):
    with pytest.raises(RunError) as caught, mendable_errors(batch_size=16, imgsz=640):
        raise error
    assert str(caught.value).startswith(line)
    assert caught.value.__cause__ is error


def test_what_breaks_in_the_compiler_is_one_line():
    def broken(graph, inputs):
        raise AssertionError("no compiler\nhere")

    network = torch.compile(torch.nn.Linear(2, 2), backend=broken)
    with pytest.raises(RunError) as caught, mendable_errors(batch_size=16, imgsz=640):
        network(torch.ones(1, 2))
    line = str(caught.value)
    assert line.startswith("--compile: ") and line.endswith("; leave it out")
    assert "no compiler" in line and "\n" not in line


def fail(*_, **__):
    raise RuntimeError("not on this moon.\n\nSee")


@pytest.mark.parametrize("compile_", [fail, lambda model: fail], ids=["at once", "when it computes"])
def test_a_compiler_that_does_not_work_is_known_at_once(machine, monkeypatch, compile_):
    machine(mps=True)
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)
    with pytest.raises(UserError) as error:
        choose_runtime(device="", amp="off", workers=0, compile=True)
    assert str(error.value) == "--compile: not on this moon; leave it out"
    assert choose_runtime(device="cpu", amp="off", workers=0, compile=True).compile  # not by torch
    notes = []
    assert not choose_runtime(device="", amp="off", workers=0, compile=True, note=notes.append).compile
    assert notes == ["--compile: not on this moon; going on without it"]


@pytest.mark.parametrize(
    ("device", "compile", "by_torch", "by_library"),
    [
        ("cpu", True, False, True),
        ("cuda", True, True, False),
        ("cpu", False, False, False),
        ("mps", False, False, False),
    ],
)
def test_what_compile_means_depends_on_the_device(monkeypatch, device, compile, by_torch, by_library):
    monkeypatch.setattr(torch, "compile", lambda model: ("compiled", model))
    model = torch.nn.Linear(2, 2)
    runtime = Runtime(device=torch.device(device), amp_dtype=None, workers=0, compile=compile)
    assert runtime.compiled(model) == (("compiled", model) if by_torch else model)
    assert runtime.uses_library == by_library


def test_a_compiled_run_says_so():
    assert ", compiled, " in Runtime(device=CPU, amp_dtype=None, workers=0, compile=True).description


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_images_enter_the_network_as_autocast_would_round_them(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    runtime = Runtime(device=torch.device("cpu"), amp_dtype=dtype, workers=0)
    assert torch.equal(runtime.network_input(levels), (levels.float() / 255).to(dtype or torch.float32))


def test_deterministic_is_torchs_own_switch(machine, monkeypatch):
    machine()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        chosen()
        assert not torch.are_deterministic_algorithms_enabled()
        choose_runtime(device="", amp="off", workers=0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("device", "options", "tries"),
    [
        ("0", {"fixed_shapes": True}, True),
        ("0", {}, False),
        ("0", {"fixed_shapes": True, "deterministic": True}, False),
        ("cpu", {"fixed_shapes": True}, "as it was"),
    ],
)
def test_cudnn_looks_for_the_fastest_kernels_where_shapes_stay(machine, monkeypatch, device, options, tries):
    machine(cuda=1)
    monkeypatch.setattr("utils.runtime._be_deterministic", lambda: setattr(torch.backends.cudnn, "benchmark", False))
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(benchmark="as it was"))
    choose_runtime(device=device, amp="off", workers=0, **options)
    assert torch.backends.cudnn.benchmark == tries


def test_only_a_cuda_device_counts_its_memory(machine):
    machine()
    assert chosen().free_memory() is None


@pytest.fixture
def gpu_of_100_bytes(monkeypatch) -> tuple[Runtime, list[int], list[int]]:
    """A runtime on a GPU of which 30 bytes are reserved; lists that hold how many are at most, and how many are now."""
    peak, held = [30], [30]
    for name, answer in {
        "empty_cache": lambda: None,
        "synchronize": lambda device: None,
        "mem_get_info": lambda device: (70, 100),
        "memory_reserved": lambda device: held[0],
        "reset_peak_memory_stats": lambda device: peak.__setitem__(0, 30),
        "max_memory_reserved": lambda device: peak[0],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return Runtime(device=torch.device("cuda:0"), amp_dtype=None, workers=0), peak, held


def test_the_memory_that_a_block_takes(gpu_of_100_bytes):
    runtime, most, now = gpu_of_100_bytes
    assert runtime.free_memory() == 70
    most[0] = 99  # of what came before
    with runtime.memory_peak() as peak:
        most[0], now[0] = 80, 40
    assert (peak.bytes, peak.kept) == (50, 10)


def test_a_block_that_runs_out_of_memory_ends_without_a_figure(gpu_of_100_bytes):
    runtime, *_ = gpu_of_100_bytes
    with runtime.memory_peak() as peak:
        raise torch.OutOfMemoryError("CUDA")
    assert peak.bytes is None
    with pytest.raises(RuntimeError, match="another"), runtime.memory_peak():
        raise RuntimeError("another")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
        OSError("a bug of ours"),
        KeyboardInterrupt(),
        AssertionError(),
    ],
)
def test_our_own_bugs_and_interrupts_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, mendable_errors(batch_size=16, imgsz=640):
        raise error
    assert caught.value is error


# ---- clock ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_time_is_the_hosts_where_there_are_no_events(device):
    assert type(Runtime(device=torch.device(device), amp_dtype=None, workers=0).step_clock()) is StepClock


def test_on_cuda_time_is_that_of_the_stream_of_the_device(monkeypatch):
    recorded = []

    class Event:
        def __init__(self, *, enable_timing: bool):
            assert enable_timing

        def record(self, stream):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = Runtime(device=torch.device("cuda:1"), amp_dtype=None, workers=0).step_clock()
    clock.lap("forward")
    assert isinstance(clock, EventClock)
    assert set(recorded) == {"stream of cuda:1"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_laps_on_cuda_fit_into_the_time_on_the_wall():
    clock = Runtime(device=torch.device("cuda"), amp_dtype=None, workers=0).step_clock()
    matrix = torch.rand(4096, 4096, device="cuda")
    clock.skip()
    for _ in range(200):
        matrix @ matrix
        clock.lap("forward")
    split = clock.split()
    assert 0 < split.parts["forward"] <= split.wall


# ---- several devices, several ranks ---------------------------------------------------------------------------------


def test_each_of_several_devices_computes_in_the_precision_of_the_run():
    """DataParallel has a thread for each, where autocast is told again."""
    runtime = Runtime(device=CPU, amp_dtype=torch.bfloat16, workers=0, devices=(CPU, CPU))
    network, found = runtime.replicas(torch.nn.Conv2d(3, 2, 1)).module, []
    thread = Thread(target=lambda: found.append(network(torch.zeros(1, 3, 4, 4)).dtype))
    thread.start()
    thread.join()
    assert found == [torch.bfloat16]


@pytest.mark.parametrize("kind", [UserError, RunError, LostRank])
def test_what_another_rank_tells_stays_so_under_way(kind):
    error = kind("told")
    error.said_elsewhere = True
    with pytest.raises(RunError, match="told") as raised, mendable_errors(batch_size=1, imgsz=64):
        raise error
    assert raised.value.said_elsewhere


def test_a_worker_by_itself_takes_its_share_of_the_machine(monkeypatch):
    """One of several that a launcher started, as the workers of an evolution."""
    monkeypatch.setattr(runtime, "_available_devices", lambda: GPUS)
    monkeypatch.setattr(runtime, "usable_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert runtime.share_of_machine(None, device="", workers=8) == ("", 8)
    assert runtime.share_of_machine(at(1), device="", workers=8) == ("1", 3)
    assert runtime.share_of_machine(at(1), device="2,0", workers=1) == ("0", 1)
    assert runtime.share_of_machine(at(1), device="cpu", workers=8) == ("cpu", 3)
