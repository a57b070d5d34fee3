"""The benchmark of ranks: what it counts and divides, and that ranks send what the estimate counts."""

import json

import pytest
import torch

from benchmarks import ranks
from benchmarks.estimate import Load, buckets
from benchmarks.measuring import NUM_CLASSES, synthetic_batches
from benchmarks.rank_step import Silent, share
from benchmarks.ranks import communication_share, compared, images_per_second, traffic
from benchmarks.step import as_batch
from benchmarks.workers import Measurement, run_worker
from models.yolo import DetectionModel, count_parameters, read_network

# ---- two ranks ------------------------------------------------------------------------------------------------------


def test_ranks_send_what_the_estimate_counts():
    """Two real ranks: gradients of all parameters, in as many buckets; statistics; two sums of hardly anything."""
    [row] = traffic(quick=True)
    assert row["failed"] is None
    assert "torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.rank_step" in row["command"]
    sizes, load = row["sizes"], Load.of("yolov5n.yaml", 64)
    model = DetectionModel(read_network("yolov5n.yaml"), num_classes=NUM_CLASSES)
    assert sum(sizes["gradients"]) == sum(load.gradients) == 4 * count_parameters(model)
    assert len(sizes["gradients"]) == len(buckets(load.gradients))
    assert sizes["batch norms"] == [load.statistics]
    assert len(sizes["losses and matches"]) == 2 and sum(sizes["losses and matches"]) < 100
    assert row["bytes"] == sum(sum(of_kind) for of_kind in sizes.values())
    assert row["ranks"] == 2 and row["threads"] == 1
    assert set(row["seconds"]) == {"talking", "silent", "alone"}


def test_a_rank_that_fails_says_why():
    flags = ["--cfg", "missing.yaml", "--batch-size", "2"]
    one = Measurement(section="traffic", name="broken", module="rank_step", flags=flags, ranks=2)
    assert "missing.yaml" in run_worker(one, threads=1)["failed"]


def test_the_parts_of_a_batch_are_the_batch():
    batch = as_batch(synthetic_batches(64, 5)[0], pin=False)
    parts = [share(batch, rank, 2) for rank in range(2)]
    assert [part.part for part in parts] == [(3, 5), (2, 5)]
    for name in ("images", "boxes", "classes"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([parts[0].image_of, parts[1].image_of + 3]), batch.image_of)


def test_a_silent_rank_has_said_what_the_others_would():
    assert Silent(3).sum(torch.tensor([2.0])).item() == 6
    assert Silent(3).mean(torch.tensor([2.0]), 1 / 3).item() == 2


def test_both_ways_of_training_are_run_by_the_command_line(tmp_path, capsys):
    assert ranks.main(["--quick", "--only", "train", "--out", str(tmp_path / "ranks.json")]) == 0
    one, two = json.loads((tmp_path / "ranks.json").read_text())["train"]
    assert two["command"] == f"{one['command']} --nproc 2"
    assert two["ratio"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    assert two["device"].startswith("2 ranks of CPU") and "ranks" not in one["device"]
    assert f"--nproc 2: {two['device']}" in capsys.readouterr().out


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_the_first_epoch_does_not_count(tmp_path):
    (tmp_path / "timing.csv").write_text(" epoch, images_per_s, epoch_s\n 1,  1, 9\n 2, 10, 9\n 3, 40, 9\n")
    assert images_per_second(tmp_path / "timing.csv") == 16  # 2 / (1 / 10 + 1 / 40)


def test_sides_are_compared_by_medians():
    base, mine = (
        [{"images_per_second": rate, "device": "CPU"} for rate in rates] for rates in ((10, 20, 40), (30, 10, 40))
    )
    summary = compared(mine, base)
    assert (summary["images_per_second"], summary["ratio"], summary["ratio_range"]) == (30, 1.5, [0.5, 3])
    assert compared(mine, [*base, {"failed": "why"}]) == {"failed": "why"}


def test_the_share_of_talk_is_of_the_step_with_it():
    assert communication_share({"talking": 0.5, "silent": 0.4}) == pytest.approx(0.2)
