"""The soak test in its short form: three kills of a real run; and that it would see what it looks for."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from benchmarks import soak
from benchmarks.soak import plans_of
from benchmarks.soak_cases import VARIANTS
from benchmarks.soak_sameness import differences, position, unfinished
from utils.checkpoint import load_checkpoint, save_checkpoint


def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path, capsys):
    code = soak.main(["--quick", "--jobs", "1", "--out", str(tmp_path / "soak.json")])
    output = capsys.readouterr().out
    assert code == 0, output
    told = json.loads((tmp_path / "soak.json").read_text())
    assert [one["landed"] for one in told["rounds"]] == [["training"], ["checkpoint"], ["evaluation"]]
    assert {one["verdict"] for one in told["rounds"]} == {"identical"}
    for words in ("[3/3] quick", "identical", "3 runs were struck 3 times"):
        assert words in output


def test_an_unknown_variant_is_named(capsys):
    assert soak.main(["--only", "nothing"]) == 2
    assert "--only nothing names no variant; there is: plain, multi-scale" in capsys.readouterr().err


def test_fifty_rounds_strike_at_all_moments_in_all_variants():
    plans = plans_of(50, VARIANTS, seed=0)
    assert [plan.number for plan in plans] == list(range(1, 51))
    assert {plan.variant.name for plan in plans} == {one.name for one in VARIANTS}
    first = [plan.blows[0] for plan in plans]
    assert {blow.moment for blow in first if blow.kills} == {*soak._KILLS}
    assert {str(blow) for blow in first if not blow.kills} == {str(blow) for blow in soak._STOPS}
    assert any(plan.damages for plan in plans) and any(len(plan.blows) > 1 for plan in plans)
    assert plans_of(50, VARIANTS, seed=0) == plans != plans_of(50, VARIANTS, seed=1)


# ---- what it sees ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, draw_tiny) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train.run(**draw_tiny(folder / "set").options(project=str(folder), name="run", quiet=True))
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_a_copy_is_the_same_run(finished, copy):
    assert differences(copy, finished) == []
    assert position(copy / "weights/last.pt") == "1+0"


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "best_fitness"])
def test_a_last_bit_is_seen(finished, copy, part):
    path = copy / "weights/last.pt"
    checkpoint = load_checkpoint(path)
    if part == "best_fitness":
        checkpoint[part] += 1e-15
    else:
        tree = checkpoint[part]["state"][1] if part == "optimizer" else checkpoint[part]
        tensor = next(value for value in tree.values() if value.is_floating_point() and value.dim() == 1)
        tensor.view(torch.int32)[0] ^= 1
    save_checkpoint(path, checkpoint)
    assert differences(copy, finished) == [f"last.pt: {part} differs"]


@pytest.mark.parametrize("name", ["results.csv", "metrics.json"])
def test_a_byte_of_a_table_is_seen(finished, copy, name):
    with (copy / name).open("ab") as file:
        file.write(b" ")
    assert differences(copy, finished) == [f"{name} differs"]


def test_damage_and_leftovers_are_seen(finished, copy):
    (copy / "weights/previous.pt").touch()
    (copy / "weights/.last.pt.0123abcd").touch()
    (copy / "weights/best.pt").write_bytes(b"")
    found = differences(copy, finished)
    assert "weights/previous.pt is left over" in found
    assert any("best.pt is empty" in line for line in found)
    assert unfinished(copy) == [".last.pt.0123abcd"]
    assert (position(copy / "weights/best.pt"), position(copy / "weights/none.pt")) == ("damaged", "none")
