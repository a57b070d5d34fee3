"""Ranks: what they know of each other, how `--nproc` starts them, and that all of them end however it ends."""

import pytest

from utils.launch import Place, place
from utils.structures import UserError

ELASTIC = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job-7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def without(*names: str, **changes: str) -> dict[str, str]:
    return {name: value for name, value in {**ELASTIC, **changes}.items() if name not in names}


# ---- what a rank knows -----------------------------------------------------------------------------------------------


def test_a_rank_is_told_by_its_environment():
    here = Place(rank=5, ranks=8, local_rank=1, local_ranks=4, launch="job-7", restarts=2, ours=False)
    assert place(ELASTIC) == here
    assert place({**ELASTIC, "NPROC_LAUNCHER": "1"}).ours


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": " "},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "23456"},  # one container of a cluster
        {"MASTER_ADDR": "here", "MASTER_PORT": "29500"},
        {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "job-7"},
    ],
)
def test_one_process_is_no_rank(environment):
    assert place(environment) is None


def test_one_rank_is_a_rank():
    assert place(without(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")).ranks == 1


def test_where_a_launcher_does_not_say_all_ranks_are_taken_for_those_of_this_host():
    assert place(without("LOCAL_WORLD_SIZE")).local_ranks == 8


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"LOCAL_RANK": "0"},
            "LOCAL_RANK is set in the environment, but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: ",
        ),
        (without("RANK"), "LOCAL_RANK is set in the environment, but not RANK: start ranks with"),
        (without("MASTER_ADDR"), "LOCAL_RANK is set in the environment, but not MASTER_ADDR: "),
        (without(MASTER_PORT=" "), "LOCAL_RANK is set in the environment, but not MASTER_PORT: "),
        (without("LOCAL_RANK"), "WORLD_SIZE is 8 in the environment, but not LOCAL_RANK: "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: should be a whole number of 1 or more; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: should be a whole number of 1 or more; "),
        (without(RANK="8"), "RANK=8 in the environment: should be a whole number from 0 to 7; "),
        (without(RANK="-1"), "RANK=-1 in the environment: should be a whole number from 0 to 7; "),
        (without(RANK="²"), "RANK=² in the environment: should be a whole number from 0 to 7; "),
        (without(LOCAL_RANK="4"), "LOCAL_RANK=4 in the environment: should be a whole number from 0 to 3; "),
        (without(LOCAL_WORLD_SIZE="9"), "LOCAL_WORLD_SIZE=9 in the environment: should be a whole number from 1 to 8;"),
        (without(MASTER_PORT="http"), "MASTER_PORT=http in the environment: should be a whole number from 1 to 65535"),
        (without(TORCHELASTIC_RESTART_COUNT="x"), "TORCHELASTIC_RESTART_COUNT=x in the environment: should be"),
    ],
)
def test_a_part_of_what_launchers_set_is_refused_by_name(environment, message):
    with pytest.raises(UserError) as error:
        place(environment)
    line = str(error.value)
    assert line.startswith(message)
    assert "`--nproc N`, or `python -m torch.distributed.run --nproc_per_node N train.py ...`" in line
    assert "\n" not in line


def test_a_launch_that_nobody_named_is_its_agent():
    """torchrun's default where hosts meet at an address: all runs would have the one name."""
    launch = place(without(TORCHELASTIC_RUN_ID="none")).launch
    assert launch not in ("", "none")
    assert place(without(TORCHELASTIC_RUN_ID="none")).launch == launch
    assert place(without("TORCHELASTIC_RUN_ID")).launch == ""
