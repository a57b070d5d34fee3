"""The bookkeeping of bad numbers, against a slow twin that knows every verdict at once."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.ranks import Ranks
from utils.structures import BadUpdate, Losses, NamedBatch
from utils.train.health import RunningStatistics, StepHealth

CPU = torch.device("cpu")


def losses(total: float, parts: tuple[float, float, float] = (1.0, 2.0, 3.0)) -> Losses:
    box, objectness, classification, total = map(torch.tensor, (*parts, total))
    return Losses(box=box, objectness=objectness, classification=classification, total=total)


@dataclass(frozen=True)
class Update:
    """What befalls one update of the test: the totals of its batches, and whether it is skipped."""

    totals: tuple[float, ...] = (1.0,)
    skipped: bool = False
    scaled: bool = False


GOOD, NO_LOSS, NO_GRADIENT = Update(), Update(totals=(math.nan,), skipped=True), Update(skipped=True)
OVERFLOW = Update(skipped=True, scaled=True)


def feed(health: StepHealth, updates, *, epoch: int = 0) -> None:
    """Batches are numbered from 0; batch n is of the images 2 n and 2 n + 1."""
    index = 0
    for update in updates:
        for total in update.totals:
            health.batch(losses(total), torch.tensor([2 * index, 2 * index + 1]), (epoch, index))
            index += 1
        health.update(torch.tensor(update.skipped), scaled=update.scaled)


def named(*indices: int, epoch: int = 0) -> tuple[NamedBatch, ...]:
    return tuple(NamedBatch(epoch=epoch, index=index, images=(2 * index, 2 * index + 1)) for index in indices)


# ---- verdicts -------------------------------------------------------------------------------------------------------


def test_nothing_is_read_before_the_16th_update():
    health = StepHealth(CPU)
    feed(health, [GOOD, NO_LOSS, *[GOOD] * 13])
    assert health.poll().bad == ()
    feed(health, [NO_GRADIENT], epoch=1)
    report = health.poll()
    assert report.bad == (
        BadUpdate(what="loss", batches=named(1)),
        BadUpdate(what="gradient", batches=named(0, epoch=1)),
    )
    assert (report.in_row, report.longest, report.skipped) == (1, 1, 2)
    assert health.poll(now=True).bad == ()  # told once


def test_until_then_no_tensor_of_verdicts_is_read(monkeypatch):
    health = StepHealth(CPU)
    with monkeypatch.context() as context:
        for way in ("__bool__", "item"):
            context.setattr(torch.Tensor, way, lambda self: pytest.fail("a tensor was read"))
        feed(health, [NO_LOSS] * 15)
        health.poll()
    assert health.poll(now=True).in_row == 15


@pytest.mark.parametrize(
    ("totals", "guilty", "what"),
    [
        ((1.0, 1.0, 1.0), (0, 1, 2), "gradient"),  # any of them may be at fault
        ((1.0, math.nan, 1.0), (1,), "loss"),
        ((math.inf, 1.0, -math.inf), (0, 2), "loss"),
    ],
)
def test_of_an_update_the_batches_at_fault_are_named(totals, guilty, what):
    health = StepHealth(CPU)
    feed(health, [Update(totals=totals, skipped=True)])
    assert health.poll(now=True).bad == (BadUpdate(what=what, batches=named(*guilty)),)


def test_an_overflow_in_fp16_neither_counts_nor_ends_a_row():
    health = StepHealth(CPU)
    lost = Update(totals=(math.nan,), skipped=True, scaled=True)
    feed(health, [OVERFLOW, OVERFLOW])
    assert health.poll(now=True).longest == 0
    feed(health, [lost, OVERFLOW, lost])
    report = health.poll(now=True)
    assert (report.in_row, report.skipped, [one.what for one in report.bad]) == (2, 2, ["loss", "loss"])


def test_a_row_that_a_good_update_ended_is_told():
    """And one goes on over what was polled before."""
    health = StepHealth(CPU)
    feed(health, [NO_LOSS] * 12)
    health.poll(now=True)
    feed(health, [NO_LOSS] * 8 + [GOOD] + [NO_LOSS] * 2)
    report = health.poll(now=True)
    assert (report.longest, report.in_row, report.skipped) == (20, 2, 22)
    assert health.poll(now=True).longest == 2


updates = st.builds(
    Update,
    totals=st.lists(st.sampled_from([1.0, 2.0, math.nan, math.inf]), min_size=1, max_size=3).map(tuple),
    skipped=st.booleans(),
    scaled=st.booleans(),
)


@given(st.lists(st.tuples(updates, st.sampled_from([None, False, True])), max_size=60))
def test_reports_put_together_equal_a_slow_loop(steps):
    health, found, longest = StepHealth(CPU), [], 0
    expected, in_row, row = [], 0, 0
    for number, (update, polls) in enumerate(steps):
        feed(health, [update], epoch=number)
        if polls is not None:
            report = health.poll(now=polls)
            found, longest = [*found, *report.bad], max(longest, report.longest)
        sound = [math.isfinite(total) for total in update.totals]
        if not all(sound):
            guilty = [index for index, fine in enumerate(sound) if not fine]
            expected.append(BadUpdate(what="loss", batches=named(*guilty, epoch=number)))
        elif update.skipped and not update.scaled:
            expected.append(BadUpdate(what="gradient", batches=named(*range(len(sound)), epoch=number)))
        elif update.skipped:
            continue
        else:
            in_row = 0
            continue
        in_row += 1
        row = max(row, in_row)
    last = health.poll(now=True)
    assert [*found, *last.bad] == expected
    assert (last.in_row, max(longest, last.longest), last.skipped) == (in_row, row, len(expected))


# ---- means ----------------------------------------------------------------------------------------------------------


def test_means_are_over_the_images_of_finite_losses():
    health = StepHealth(CPU)
    for count, total, parts in (
        (3, 1.0, (1.0, 10.0, 100.0)),
        (4, math.nan, (math.nan, 5.0, 5.0)),
        (4, math.inf, (5.0, math.inf, 5.0)),
        (1, 1.0, (2.0, 20.0, 200.0)),
    ):
        health.batch(losses(total, parts), torch.arange(count), (0, 0))
    means = health.means()
    assert (means.box, means.objectness, means.classification) == (1.25, 12.5, 125.0)
    assert health.images.item() == 4


def test_an_epoch_begins_with_nothing():
    health = StepHealth(CPU)
    feed(health, [GOOD, NO_LOSS])
    health.start_epoch()
    assert math.isnan(health.means().box)
    report = health.poll(now=True)
    assert (report.skipped, report.in_row, len(report.bad)) == (0, 1, 1)  # the row goes on, and nothing is left untold


def test_the_gradient_of_a_loss_that_is_no_number_starts_as_none():
    health = StepHealth(CPU)
    starts = [health.batch(losses(total), torch.arange(1), (0, 0)) for total in (1.5, math.nan, math.inf, -math.inf)]
    assert starts[0].item() == 1 and starts[0].dtype == torch.float32
    assert all(start.isnan() for start in starts[1:])


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_a_resumed_count_goes_on_where_it_stood():
    whole, resumed = StepHealth(CPU), StepHealth(CPU)
    feed(whole, [GOOD, NO_LOSS, NO_LOSS])
    whole.poll()
    state = copy.deepcopy(whole.state_dict())
    assert all(type(value) in (int, torch.Tensor) for value in state.values())
    feed(resumed, [NO_LOSS] * 3)  # of a time that is undone
    resumed.batch(losses(1.0), torch.arange(2), (5, 5))
    resumed.load_state_dict(state)
    whole.poll(now=True)
    for health in (whole, resumed):
        feed(health, [NO_LOSS, GOOD, NO_GRADIENT], epoch=1)
    assert whole.poll(now=True) == resumed.poll(now=True)
    assert whole.means() == resumed.means()
    assert torch.equal(whole.images, resumed.images)


def test_what_a_checkpoint_reads_back_is_still_told():
    health = StepHealth(CPU)
    feed(health, [NO_LOSS])
    health.state_dict()
    assert health.poll().bad == (BadUpdate(what="loss", batches=named(0)),)


# ---- running statistics ---------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))


def statistics_of(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for name, value in model.state_dict().items() if "running" in name]


def settle(statistics: RunningStatistics, skipped: torch.Tensor) -> None:
    statistics.agree(Ranks())
    statistics.settle(skipped)


def test_statistics_return_to_those_after_the_last_update_that_counted():
    model = network()
    statistics = RunningStatistics(model)
    untouched = statistics_of(model)
    model(torch.full((2, 3, 4, 4), math.nan))
    assert not any(map(torch.equal, statistics_of(model), untouched))
    settle(statistics, torch.tensor(True))
    assert all(map(torch.equal, statistics_of(model), untouched))
    model(torch.rand(2, 3, 4, 4))
    moved = statistics_of(model)
    settle(statistics, torch.tensor(False))
    assert all(map(torch.equal, statistics_of(model), moved))
    model(torch.rand(2, 3, 4, 4))
    model(torch.full((2, 3, 4, 4), math.inf))
    settle(statistics, torch.tensor(True))
    assert all(map(torch.equal, statistics_of(model), moved))


def test_statistics_that_were_loaded_are_those_to_return_to():
    model, other = network(), network()
    statistics = RunningStatistics(model)
    other(torch.rand(2, 3, 4, 4))
    model.load_state_dict(other.state_dict())
    statistics.keep()
    model(torch.full((2, 3, 4, 4), math.nan))
    settle(statistics, torch.tensor(True))
    assert all(map(torch.equal, statistics_of(model), statistics_of(other)))


def test_a_network_without_batch_norms_has_none():
    statistics = RunningStatistics(nn.Conv2d(3, 4, 1))
    statistics.keep()
    settle(statistics, torch.tensor(True))
