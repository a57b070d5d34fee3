"""What ranks tell one another, and how they fall out of it."""

import os
import re
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from threading import Thread

import pytest
import torch
from torch import distributed, nn

from tests.groups import in_ranks
from utils.ranks import LostRank, Ranks, _meet
from utils.structures import RunError, UserError


def refused(make) -> tuple[str, str, bool]:
    with pytest.raises(UserError) as error:
        make()
    return type(error.value).__name__, str(error.value), error.value.said_elsewhere


def fails(error: UserError):
    raise error


def agreed(ranks: Ranks) -> dict:
    """Everything that ranks can ask, once."""
    order = [time.monotonic()]
    first = ranks.host_first(
        lambda: order.append(time.monotonic()) or time.sleep(0.3 * (ranks.rank == 0)) or ranks.rank
    )
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(ranks.rank)
        model.bias.zero_()
    network = ranks.replicas(model)
    start = model.weight.tolist()
    with ranks.reduces(network, update=False):
        network(torch.full((1, 2), 1.0 + ranks.rank)).sum().backward()
    kept = model.weight.grad.tolist()
    with ranks.reduces(network, update=True):
        network(torch.full((1, 2), 1.0 + ranks.rank)).sum().backward()
    return {
        "gather": ranks.gather({"rank": ranks.rank}),
        "most": ranks.most(ranks.rank, 5 - ranks.rank, 0),
        "first": ranks.from_first(lambda: f"of {ranks.rank}"),
        "host first": (first, order[1]),
        "sum": ranks.sum(torch.tensor([1.0, ranks.rank])).tolist(),
        "mean": ranks.mean(torch.tensor([2.0, 4.0 * ranks.rank]), 0.75 if ranks.rank else 0.25).tolist(),
        "speaks": ranks.speaks,
        "start": start,
        "kept": kept,
        "gradient": model.weight.grad.tolist(),
        "first fails": refused(lambda: ranks.from_first(lambda: fails(UserError("no such file")))),
        "one fails": refused(lambda: ranks.each(lambda: fails(RunError("no room")) if ranks.rank else 1)),
        "all fail": refused(lambda: ranks.each(lambda: fails(UserError("the same")))),
        "host fails": refused(lambda: ranks.host_first(lambda: fails(UserError("no data")) if ranks.rank else 1)),
        "alike": ranks.check_alike(lambda: {"--epochs": 3}),
        "other data": refused(lambda: ranks.check_alike(lambda: {"--epochs": 3, "images": "ab"[ranks.rank]})),
        "names": ranks.names,
    }


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return in_ranks(2, agreed)


def test_what_ranks_say_is_known_to_all(two):
    zero, one = two
    assert zero["gather"] == one["gather"] == [{"rank": 0}, {"rank": 1}]
    assert zero["most"] == one["most"] == [1, 5, 0]
    assert zero["first"] == one["first"] == "of 0"
    assert [zero["host first"][0], one["host first"][0]] == [0, 1]
    assert one["host first"][1] - zero["host first"][1] >= 0.3
    assert zero["sum"] == one["sum"] == [2, 1]
    assert zero["mean"] == one["mean"] == [2, 3]
    assert [zero["speaks"], one["speaks"]] == [True, False]
    assert zero["start"] == one["start"] == [[0, 0]]
    assert [zero["kept"], one["kept"]] == [[[1, 1]], [[2, 2]]]
    assert zero["gradient"] == one["gradient"] == [[3, 3]]  # the mean of twice the own ones
    assert zero["names"] == one["names"]
    assert "pid" in zero["names"][1]


def test_an_error_of_any_rank_is_that_of_all_and_told_by_the_first(two):
    zero, one = two
    where = f"rank 1 ({zero['names'][1]})"
    expected = {
        "first fails": ("UserError", "no such file"),
        "one fails": ("RunError", f"{where}: no room"),
        "all fail": ("UserError", "the same"),
        "host fails": ("UserError", f"{where}: no data"),
        "other data": (
            "UserError",
            f"images: b on {where}, a on rank 0 ({zero['names'][0]}); all ranks should be at the same work",
        ),
    }
    for case, (kind, text) in expected.items():
        assert zero[case] == (kind, text, False)
        assert one[case] == (kind, text, True)


def test_alone_every_question_has_an_answer():
    ranks, tensor = Ranks(), torch.ones(2)
    assert ranks.gather(3) == [3]
    assert ranks.most(1, 2) == [1, 2]
    assert ranks.from_first(lambda: 4) == ranks.each(lambda: 4) == ranks.host_first(lambda: 4) == 4
    assert ranks.sum(tensor) is ranks.mean(tensor, 0.5) is tensor
    assert ranks.speaks
    with pytest.raises(UserError, match="mine"):
        ranks.each(lambda: fails(UserError("mine")))


# ---- losing one another ---------------------------------------------------------------------------------------------


def loses(ranks: Ranks, how: str) -> tuple | None:
    """What the others say when rank 1 goes, without or with a word, or hangs."""
    ranks.hurry()
    ranks.reached(f"step {ranks.rank + 7}")
    ranks.gather(0)
    if ranks.rank == 1:
        if how == "stops":
            with suppress(UserError), ranks.end_told():
                raise UserError("an image is gone")
        elif how == "hangs":
            time.sleep(15)
        os._exit(0)
    with pytest.raises(LostRank) as lost, ranks.losses_named(), ranks.end_told():
        while True:
            ranks.gather(0)
    return str(lost.value), lost.value.gone, lost.value.said_elsewhere


@pytest.mark.parametrize(
    ("how", "says", "gone"),
    [
        ("dies", r"rank 1 \(.*, pid \d+\) is gone; its last step was step 8", (1,)),
        (
            "hangs",
            r"rank 1 \(.*, pid \d+\) hangs: nothing for 0.1 minutes \(--dist-timeout\); .* was step 8",
            (1,),
        ),
        ("stops", "rank 1 has stopped", ()),
    ],
)
def test_a_rank_that_is_lost_is_named_with_its_last_step(how, says, gone):
    results = in_ranks(3, partial(loses, how=how), minutes=0.1, missing=[1])
    for rank, (text, lost, elsewhere) in ((0, results[0]), (2, results[2])):
        assert re.fullmatch(says, text), text
        assert lost == gone
        assert elsewhere == (rank == 2 or how == "stops")


def test_errors_that_are_not_of_the_connection_pass():
    with pytest.raises(RuntimeError, match="shapes"), Ranks().losses_named():
        raise RuntimeError("shapes differ")


# ---- meeting --------------------------------------------------------------------------------------------------------


def test_ranks_meet_over_a_store_that_holds_what_others_said_before():
    """As torch's launcher leaves it when it starts ranks again, be they as many or not."""
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = []
    for count in (3, 3, 2, 4):
        found: dict[int, str] = {}

        def meets(rank: int, count=count, found=found) -> None:
            mine = distributed.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
            found[rank] = _meet(mine, rank, count, timeout_s=20)

        threads = [Thread(target=meets, args=(rank,)) for rank in reversed(range(count))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == count
        assert len(set(found.values())) == 1
        words.append(found[0])
    assert len(set(words)) == 4


def test_a_rank_that_does_not_come_is_named():
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match="rank 1 has not come"):
        _meet(store, 0, 2, timeout_s=0.1)
    with pytest.raises(RuntimeError, match="rank 0 does not answer"):
        _meet(store, 1, 2, timeout_s=0.1)
