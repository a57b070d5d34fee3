"""A run's time in words: rows that fill their columns, shares of the whole, and a bottleneck named with its remedy."""

import re

import pytest

from utils.clock import PARTS, TimeSplit
from utils.config import TrainOptions
from utils.report.loggers import TIMING_COLUMNS
from utils.report.timing import bottleneck, time_table, timing_row


def split(wall: float = 100.0, images: int = 0, **parts: float) -> TimeSplit:
    return TimeSplit(wall=wall, parts=dict.fromkeys(PARTS, 0.0) | parts, images=images)


def test_row_of_an_epoch():
    row = timing_row(
        7, split(wall=20.0, images=30, data_wait=1, forward=2, backward=3, optimizer=4, evaluate=5, save=1)
    )
    assert tuple(row) == TIMING_COLUMNS
    assert (row["epoch"], row["epoch_s"], row["backward_s"], row["evaluate_s"]) == (8, 20, 3, 5)
    assert row["images_per_s"] == 3  # of 10 s in training


def test_nothing_was_trained_in_no_time():
    nothing = split(wall=0.0)
    assert "images_per_s" not in timing_row(0, nothing)
    assert "0%" in time_table(nothing) and bottleneck(nothing)


def test_table_gives_seconds_and_shares_of_everything():
    title, seconds, shares = time_table(split(wall=200.0, forward=50, backward=90, evaluate=20)).splitlines()
    assert len({len(title), len(seconds), len(shares)}) == 1
    assert title.split() == "time data wait transfer forward loss backward optimizer evaluate save rest all".split()
    assert seconds.split()[1:] == ["0.0", "0.0", "50.0", "0.0", "90.0", "0.0", "20.0", "0.0", "40.0", "200.0"]
    assert shares.split()[1:] == ["0%", "0%", "25%", "0%", "45%", "0%", "10%", "0%", "20%", "100%"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"forward": 30, "backward": 60}, "The network takes 90% of the time, the most, as it should;"),
        ({"forward": 20, "backward": 20, "data_wait": 30}, "Next comes waiting for data with 30%"),
        ({"forward": 20, "backward": 20, "evaluate": 30}, "with 30%; --noval"),
        ({"forward": 20, "backward": 20, "data_wait": 50}, "Bottleneck: waiting for data, 50% of the time"),
        ({"forward": 30, "backward": 20, "transfer": 50.1}, "Bottleneck: the way of the batches"),
        ({"loss": 60}, "larger --batch-size"),
        ({"optimizer": 60}, "larger --batch-size"),
        ({"evaluate": 70}, "--noval"),
        ({"save": 55}, "--nosave"),
        ({"forward": 10}, "--noplots"),
        ({"forward": 60, "backward": 60}, "The network takes 100%"),  # two clocks may differ by a little
    ],
)
def test_bottleneck(parts, said):
    sentence = bottleneck(split(**parts))
    assert said in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_advice_names_flags_that_exist():
    flags = {"--" + name.replace("_", "-") for name in vars(TrainOptions(data=""))}
    advised = {flag for part in (*PARTS, "none") for flag in re.findall(r"--[\w-]+", bottleneck(split(**one(part))))}
    assert len(advised) > 6
    assert advised <= flags


def test_nobody_is_advised_to_do_what_they_did():
    for part in (*PARTS, "none"):
        sentence = bottleneck(split(**one(part)), ["--compile", "--noval", "--nosave", "--noplots"])
        assert not re.search("--compile|--noval (?!asks)|--nosave|--noplots", sentence.replace("as --noval asks", ""))
        assert sentence.endswith(".") and "; ." not in sentence


def one(part: str) -> dict[str, float]:
    return {part: 100.0} if part in PARTS else {}
