"""The benchmarks: what they count and divide, and that a quick one leaves a table and a file. No test of a timing."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import evaluation, first_step, loading, measuring, sample
from benchmarks.coco_eval import summary
from benchmarks.measuring import measure_steps, synthetic_batches
from benchmarks.peer import contender, sampler
from benchmarks.results import table
from benchmarks.roofline import best_rate, floor_seconds, share_of_peak, step_gflop
from benchmarks.step import waits_per_step
from benchmarks.val_case import validation_table, validator
from benchmarks.weights_case import apart, weights_table
from benchmarks.workers import Measurement, run_worker

ROOT = Path(__file__).resolve().parent.parent


def bench(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--threads", "1", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ---- as a command -------------------------------------------------------------------------------------------------


def test_a_quick_step_gives_a_table_and_a_file(tmp_path):
    out = tmp_path / "bench.json"
    done = bench("--only", "yolov5n 64 b2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    [row] = [line for line in done.stdout.splitlines() if line.startswith("yolov5n 64 b2")]
    assert row.split()[3] in ("fp32", "bf16")
    content = json.loads(out.read_text())
    assert {"cpu", "cores", "threads", "torch", "date", "commit"} <= content["machine"].keys()
    [measured] = content["measurements"]
    figures = measured["figures"]
    assert measured["section"] == "step"
    assert "-m benchmarks.step --cfg yolov5n.yaml --imgsz 64 --batch-size 2" in measured["command"]
    assert figures["images_per_second"] == pytest.approx(2 / figures["seconds_median"])
    assert len(figures["seconds"]) == 2
    assert figures["gflop"] == pytest.approx(3 * 2 * 4.468 * (64 / 640) ** 2, rel=1e-3)  # SPEC 4: 4.47 at 640


def test_an_unknown_measurement_is_named(tmp_path):
    done = bench("--only", "nothing", "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 2
    assert "--only nothing names no measurement" in done.stderr
    assert "step: yolov5s 64 b2" in done.stderr
    assert not (tmp_path / "bench.json").exists()


def test_the_figures_of_coco_are_compared_between_tools(tmp_path):
    out = tmp_path / "coco.json"
    missing = tmp_path / "no-python"
    command = [sys.executable, "-m", "benchmarks.coco_eval", "--quick", "--peer-python", missing, "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # one of the tools is not there
    assert f"faster-coco-eval: {missing} is missing" in done.stdout
    ours, tool, _ = json.loads(out.read_text())["tools"]
    assert tool["name"].startswith("pycocotools ")
    assert 0 < ours["figures"][0] < ours["figures"][1] and tool["largest_difference"] < 1e-9
    [row] = [line for line in done.stdout.splitlines() if line.startswith("ap50 ")]
    assert row.split()[1:] == [f"{ours['figures'][1]:.12f}"] * 2


def test_lists_of_detections_are_compared_whatever_their_order():
    ours = torch.tensor([[0, 0, 10, 10, 0.5, 0], [0, 0, 10, 10, 0.4, 1], [20, 20, 30, 30, 0.3, 0]])
    theirs = ours[[2, 0, 1]] + torch.tensor([0, 0, 0.25, 0, 0.125, 0])
    assert apart(ours, theirs) == (0.25, pytest.approx(0.125))
    assert apart(ours[:0], ours[:0]) == (0, 0)
    missing, twice = ours[:2], ours[[0, 0, 2]]
    for other in (missing, twice, ours + torch.tensor([0, 0, 0, 0, 0, 1])):
        assert apart(ours, other) == (float("inf"), float("inf"))


def test_a_table_of_weights_has_a_row_for_each_file():
    row = {"name": "best.pt", "failed": None, "names_equal": True, "images": 2, "rows": 1000, "found_ours": 7}
    row |= {"anchors_px": 6e-5, "anchors_score": 2e-8, "found_px": 3e-5, "found_score": 0}
    _, _, first, second = weights_table([row, {"name": "other.pt", "failed": "no module"}]).splitlines()
    assert first.split() == ["best.pt", "2,000", "6.0e-05", "2.0e-08", "7", "3.0e-05", "0.0e+00", "yes"]
    assert second.strip() == "other.pt: no module"


def test_tools_are_compared_by_medians_of_what_they_need():
    def turn(load: float, evaluate: float, ap: float) -> dict:
        seconds = {"load": {"cpu": load, "wall": load}, "evaluate": {"cpu": evaluate, "wall": 2 * evaluate}}
        return {"version": "1", "seconds": seconds, "figures": [ap] * 12}

    ours = [turn(1, 1, 0.5), turn(1, 2, 0.5), turn(1, 9, 0.5)]
    one = summary("tool", [turn(1, 6, 0.25), turn(3, 8, 0.25), turn(2, 40, 0.25)], ours)
    assert one["seconds"] == {"evaluate": {"cpu": 8, "wall": 16}, "files": {"cpu": 11, "wall": 19}}
    assert one["ratio"]["evaluate"] == {"cpu": 4, "wall": 4}
    assert one["ratio"]["files"]["cpu"] == pytest.approx(11 / 3)
    assert one["largest_difference"] == 0.25
    assert summary("tool", [{"failed": "why"}], ours)["failed"] == "why"


def test_a_worker_that_fails_says_why():
    one = Measurement(section="step", name="broken", module="step", flags=["--cfg", "missing.yaml"])
    assert "missing.yaml" in run_worker(one, threads=1)["failed"]


def test_the_clock_of_the_start_stops_at_the_first_optimizer_step(tiny, tmp_path):
    command = [sys.executable, "-m", "benchmarks.first_step", *tiny.flags(project=str(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first_step.SIGN in done.stdout
    assert done.returncode == 130
    assert "no epoch was finished" in done.stderr


def test_loader_and_evaluation_are_measured(tiny, monkeypatch, capfd):
    shared = ["--data", str(tiny.data), "--imgsz", "64", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["loading", *shared, "--batches", "6"])
    loading.main()
    assert json.loads(capfd.readouterr().out)["batches"] == 6
    monkeypatch.setattr(sys, "argv", ["evaluation", *shared, "--cfg", str(tiny.cfg), "--repeats", "1"])
    evaluation.main()
    figures = json.loads(capfd.readouterr().out)
    assert figures["images"] == 4
    parts = figures["seconds"]
    assert parts["total"] == pytest.approx(parts["loading"] + parts["network"] + parts["rest"])


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def test_the_floor_of_a_step():
    """yolov5s at 640, batch 8: 16.43 GFLOP forward, 394.32 for a step; that takes 0.2 s at 1,971.6 a second."""
    gflop = step_gflop(16.43, 8)
    assert gflop == pytest.approx(394.32)
    assert floor_seconds(gflop, 1971.6) == pytest.approx(0.2)
    assert share_of_peak(gflop, 1.0, 1971.6) == pytest.approx(0.2)


def test_the_best_rate_is_of_the_same_precision():
    of_fp32, of_bf16 = {"matrices": 100, "convolution": 90}, {"matrices": 1, "convolution": 2}
    rates = {"gflop_per_second": {"fp32": of_fp32, "bf16": of_bf16}}
    assert best_rate(rates, "fp32") == 100
    assert best_rate(rates, "bf16") == 2
    assert best_rate(rates, "fp16") is None


def test_steps_are_timed_without_their_warm_up(monkeypatch):
    """The clock moves with each step: 50 s the first, 10 s the second, then 1, 2, 6, ..., two at a time."""
    lasting = [50, 10, 1, 2, 6, 2, 3, 3]
    now, taken, waits = [0.0], [], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def step(number: int) -> None:
        now[0] += lasting[number]
        taken.append(number)

    figures = measure_steps(
        step, batch_size=12, warmup=2, steps=3, synchronize=lambda: waits.append(len(taken)), together=2
    )
    assert taken == list(range(8))
    assert waits == [1, 2, 4, 6, 8]
    assert figures["first_step_seconds"] == 50
    assert figures["seconds"] == [1.5, 4, 3]
    assert (figures["seconds_median"], figures["seconds_min"]) == (3, 1.5)
    assert (figures["images_per_second"], figures["images_per_second_best"]) == (4, 8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what a process holds")
def test_memory_of_the_steps_is_what_they_hold_at_most():
    def step(number: int) -> None:
        np.ones((400 if number == 0 else 200) * 2**17)  # so many MiB, let go again; the first is the compiler's

    memory = measure_steps(step, batch_size=1, warmup=1, steps=2)["memory_mib"]
    assert 390 <= memory["peak"] - memory["before"] <= 500
    if memory["steps_peak"] < memory["peak"]:  # a sandbox may forbid to reset the peak
        assert 190 <= memory["steps_add"] <= 300


def test_synthetic_batches_are_sound_and_repeat():
    batches, again = synthetic_batches(96, 16), synthetic_batches(96, 16)
    counts = np.concatenate([np.bincount(batch.image_of, minlength=16) for batch in batches])
    assert counts.min() >= 1 and 5.5 < counts.mean() < 8.5
    assert len({len(batch.boxes) for batch in batches}) > 1
    for batch, same in zip(batches, again):
        assert batch.images.shape == (16, 96, 96, 3) and batch.images.dtype == np.uint8
        assert batch.boxes.min() >= 0 and batch.boxes.max() <= 96
        assert (batch.boxes[:, 2:] - batch.boxes[:, :2]).min() >= 9.5
        assert batch.classes.min() >= 0 and batch.classes.max() < 80
        assert np.array_equal(batch.images, same.images) and np.array_equal(batch.boxes, same.boxes)


def test_waits_within_a_step_are_counted():
    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name: str, start: int, end: int, where=host) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=where)

    events = [
        event("benchmarks.step", 0, 10),
        event("cudaStreamSynchronize", 4, 5),
        event("Memcpy HtoD (Pinned -> Device)", 4, 5, device),
        event("benchmarks.step", 20, 30),
        event("benchmarks.step", 22, 40, device),
        event("Memcpy DtoH (Device -> Pageable)", 33, 34, device),
        event("cudaDeviceSynchronize", 35, 60),  # the profiler's own
    ]
    counts = waits_per_step(events)
    assert counts == {
        "cudaStreamSynchronize": 0.5,
        "cudaDeviceSynchronize": 0,
        "cudaEventSynchronize": 0,
        "Memcpy DtoH": 0.5,
    }


def test_a_real_trace_has_the_fields_that_are_read():
    with profile(activities=[ProfilerActivity.CPU]) as trace, record_function("benchmarks.step"):
        torch.ones(3).sum()
    assert set(waits_per_step(trace.events()).values()) == {0}


def test_ratios_to_the_peer_are_of_medians():
    one = Measurement(section="step", name="ours", module="step", flags=[])
    mine = [turn(30, 100), turn(20, 90), turn(25, 95)]
    peers = [turn(8, 40), turn(10, 50), turn(10, 45)]
    summary = contender(one, mine, peers)
    assert summary["images_per_second"] == 25
    assert summary["ratio"] == 2.5
    assert summary["ratio_range"] == [2.0, 3.75]
    assert summary["steps_add_ratio"] == 2.0  # the most of each: 100 and 50


def test_samples_are_compared_by_cpu_time():
    """Twice the time is half as fast."""
    peer, ours = (Measurement(section="loading", name=name, module="sample", flags=[]) for name in ("peer", "ours"))
    rounds = {"peer": [{"cpu_ms": 6.0}, {"cpu_ms": 8.0}], "ours": [{"cpu_ms": 2.0}, {"cpu_ms": 1.0}]}
    summary = sampler(ours, rounds)
    assert summary["ratio"] == pytest.approx(7 / 1.5)
    assert summary["ratio_range"] == [3.0, 8.0]
    assert sampler(peer, rounds)["ratio"] == 1
    rounds["peer"][0] = {"failed": "no package"}
    assert sampler(ours, rounds)["failed"] == "no package"


def test_a_training_sample_is_measured(tiny, monkeypatch, capfd):
    for cache in ("ram", "files"):
        flags = ["sample", "--data", str(tiny.data), "--imgsz", "64", "--cache", cache, "--samples", "20"]
        monkeypatch.setattr(sys, "argv", flags)
        sample.main()
        figures = json.loads(capfd.readouterr().out)
        assert figures["cpu_ms"] == pytest.approx(min(figures["cpu_ms_of_turns"]), abs=1e-3)


def turn(rate: float, memory: float) -> dict:
    return {"images_per_second": rate, "memory_mib": dict.fromkeys(("steps_add", "steps_peak", "peak"), memory)}


def test_a_turn_that_fails_is_told_without_ratios():
    one = Measurement(section="step", name="ours", module="step", flags=[])
    summary = contender(one, [turn(1, 1), {"failed": "no compiler"}], [turn(1, 1), turn(1, 1)])
    assert summary["failed"] == "no compiler"
    assert "ratio" not in summary


def test_tables_align():
    assert table(["what", "s"], [["a long name", "1.5"], ["b", "10.0"]]).splitlines() == [
        "what            s",
        "-----------  ----",
        "a long name   1.5",
        "b            10.0",
    ]


def test_the_product_knows_neither_benchmarks_nor_peer():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]:
        source = path.read_text(encoding="utf-8")
        for foreign in ("benchmarks", "yolov5"):
            assert f"import {foreign}" not in source and f"from {foreign}" not in source, path


def test_val_is_compared_by_medians_and_shows_both_judgements():
    peer, ours = (Measurement(section="val", name=name, module="validation", flags=[]) for name in ("peer", "ours"))
    rounds = {
        name: [{"images_per_second": rate, "command_seconds": 3.0, "ap": 0.5, "ap50": 0.75} for rate in rates]
        for name, rates in (("peer", (10.0, 20.0, 12.0)), ("ours", (30.0, 40.0, 26.0)))
    }
    judged = {"peer": {"ap": 0.25, "ap50": 0.5}, "ours": {"ap": 0.5, "ap50": 0.75}}
    mine, theirs = (validator(one, rounds, judged) for one in (ours, peer))
    assert mine["ratio"] == 2.5 and mine["ratio_range"] == [2.0, 3.0] and theirs["ratio"] == 1
    shown = validation_table({"case": "val.py", "contenders": [theirs, mine]})
    assert "0.25000, 0.50000" in shown and "2.50" in shown
    rounds["peer"][0] = {"failed": "no package"}
    assert validator(ours, rounds, judged)["failed"] == "no package"
