import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.hyp import Hyperparameters
from utils.train.optim import (
    Schedule,
    WeightAverage,
    apply_settings,
    choose_accumulation,
    make_optimizer,
    without_compiler,
)

# ---- nominal batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nominal", "batch_size", "accumulation"),
    [("64", 16, 4), ("64", 64, 1), ("64", 128, 1), ("64", 24, 3), ("1", 16, 1), ("256", 3, 85)],
)
def test_a_given_nominal_batch_is_made_up_of_whole_batches(nominal, batch_size, accumulation):
    assert choose_accumulation(nominal, batch_size=batch_size, batches_per_epoch=2, epochs=1) == accumulation


@pytest.mark.parametrize(
    ("batches_per_epoch", "epochs", "accumulation"),
    [
        (1000, 300, 4),  # 75,000 updates of 64 images
        (40, 100, 4),  # exactly 1,000 updates
        (39, 100, 4),  # 1,000 too: the last update of an epoch is of three batches
        (36, 100, 3),  # 900 updates of 64 would be too few
        (20, 100, 2),
        (10, 100, 1),
        (2, 10, 1),  # too few whatever one does
    ],
)
def test_auto_lowers_64_until_there_are_1000_updates(batches_per_epoch, epochs, accumulation):
    assert (
        choose_accumulation("auto", batch_size=16, batches_per_epoch=batches_per_epoch, epochs=epochs) == accumulation
    )


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 300))
def test_auto_takes_the_most_accumulation_that_leaves_1000_updates(batch_size, batches_per_epoch, epochs):
    def updates(accumulation: int) -> int:
        return sum(-(-batches_per_epoch // accumulation) for _ in range(epochs))

    chosen = choose_accumulation("auto", batch_size=batch_size, batches_per_epoch=batches_per_epoch, epochs=epochs)
    most = max(round(64 / batch_size), 1)
    assert 1 <= chosen <= most
    assert updates(chosen) >= 1000 or chosen == 1
    assert chosen == most or updates(chosen + 1) < 1000


# ---- schedule -----------------------------------------------------------------------------------------------------


def schedule(
    *, epochs: int = 10, per_epoch: int = 50, accumulation: int = 4, linear: bool = False, **hyp: float
) -> Schedule:
    return Schedule(
        hyp=Hyperparameters(**hyp), epochs=epochs, batches_per_epoch=per_epoch, accumulation=accumulation, linear=linear
    )


@pytest.mark.parametrize("linear", [False, True])
def test_the_factor_falls_from_one_to_lrf(linear):
    plan = schedule(linear=linear, lrf=0.2)
    factors = [plan.factor(epoch) for epoch in range(11)]
    assert factors[0] == 1
    assert factors[5] == pytest.approx(0.6)
    assert factors[10] == pytest.approx(0.2)
    assert factors == sorted(factors, reverse=True)
    quarter = (1 + math.cos(math.pi / 5)) / 2 if not linear else 0.8
    assert factors[2] == pytest.approx(0.2 + 0.8 * quarter)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "warmup_epochs", "batches"),
    [
        (100, 500, 3.0, 1500),
        (100, 500, 0.5, 250),
        (100, 30, 3.0, 100),  # never less than 100
        (10, 15, 3.0, 75),  # never more than half the run
        (1, 1, 3.0, 0),
        (100, 500, 0.0, 0),
    ],
)
def test_warmup_length(epochs, per_epoch, warmup_epochs, batches):
    assert schedule(epochs=epochs, per_epoch=per_epoch, warmup_epochs=warmup_epochs).warmup_batches == batches


def test_warmup_starts_from_its_own_values_and_ends_at_the_cycle():
    plan = schedule(lr0=0.02, warmup_epochs=3.0)  # 150 of 500 batches
    first, middle, after = plan(0), plan(75), plan(150)
    assert first.lrs == (0, 0, 0.1)
    assert first.momentum == 0.8
    lr = 0.02 * plan.factor(1)
    assert middle.lrs == pytest.approx((lr / 2, lr / 2, (0.1 + lr) / 2))
    assert middle.momentum == pytest.approx((0.8 + 0.937) / 2)
    assert after.lrs == pytest.approx((0.02 * plan.factor(3),) * 3)
    assert after.momentum == pytest.approx(0.937)


def test_after_warmup_one_learning_rate_per_epoch():
    plan = schedule(lr0=0.02)
    for step in range(150, 500):
        assert plan(step).lrs == (0.02 * plan.factor(step // 50),) * 3
        assert plan(step).momentum == 0.937


def test_without_warmup_the_first_batch_is_as_any_other():
    settings = schedule(warmup_epochs=0.0)(0)
    assert settings.lrs == (0.01,) * 3
    assert settings.momentum == 0.937


def test_accumulation_grows_from_one_batch_to_all():
    plan = schedule(epochs=10, per_epoch=200, accumulation=4, warmup_epochs=2.0)
    updates = [step for step in range(2000) if plan(step).update]
    gaps = [after - before for before, after in itertools.pairwise(updates)]
    assert updates[0] == 0
    assert gaps[:30] == [1] * 30
    steady = [gap for before, gap in zip(updates, gaps) if before >= 400]
    assert set(steady) == {4}  # 200 batches are 50 whole updates
    assert max(gaps) == 4


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 9))
def test_the_last_batch_of_an_epoch_always_updates_and_no_update_is_late(epochs, per_epoch, accumulation):
    plan = schedule(epochs=epochs, per_epoch=per_epoch, accumulation=accumulation)
    waiting = 0
    for step in range(epochs * per_epoch):
        waiting = 0 if plan(step).update else waiting + 1
        assert waiting < accumulation
        assert step % per_epoch != per_epoch - 1 or waiting == 0


@given(st.integers(0, 499), st.booleans())
def test_a_schedule_is_a_function_of_the_step(step, linear):
    plan = schedule(linear=linear)
    for other in (499, 3):
        plan(other)
    assert plan(step) == schedule(linear=linear)(step)


# ---- optimizer ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, images):
        return self.head(self.norm(self.conv(images))).mean((2, 3)) * self.scale


def test_parameter_groups_and_their_order():
    model = Small()
    optimizer = make_optimizer(model, Hyperparameters(lr0=0.02, momentum=0.9), weight_decay=0.003)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [sorted(names.pop(id(parameter)) for parameter in group["params"]) for group in optimizer.param_groups]
    assert groups == [
        ["head.1.weight", "norm.weight"],
        ["conv.weight", "head.0.weight", "scale"],
        ["head.0.bias", "head.1.bias", "norm.bias"],
    ]
    assert not names  # each in one group, once
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.003, 0.0]
    assert all(
        (group["lr"], group["momentum"], group["nesterov"]) == (0.02, 0.9, True) for group in optimizer.param_groups
    )


def test_settings_reach_the_groups_in_order():
    optimizer = make_optimizer(Small(), Hyperparameters(), weight_decay=0.0)
    settings = schedule()(7)
    apply_settings(optimizer, settings)
    assert tuple(group["lr"] for group in optimizer.param_groups) == settings.lrs
    assert {group["momentum"] for group in optimizer.param_groups} == {settings.momentum}


def test_two_updates_equal_nesterov_by_hand():
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = make_optimizer(model, Hyperparameters(lr0=0.1, momentum=0.9), weight_decay=0.01)
    weight, velocity = model.weight.item(), 0.0
    for _ in range(2):
        optimizer.zero_grad()
        (3 * model.weight.sum()).backward()
        optimizer.step()
        gradient = 3 + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight -= 0.1 * (gradient + 0.9 * velocity)
    assert model.weight.item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_without_the_compiler_an_optimizer_is_the_same(kind, fused):
    """Updates to the bit, state there and back, hooks, and the step's need of no gradient."""
    ours, theirs = Small(), Small()
    ours.load_state_dict(theirs.state_dict())
    steps = []
    pair = [(ours, without_compiler(kind)), (theirs, kind)]
    optimizers = [made(model.parameters(), lr=0.1, weight_decay=0.01, fused=fused) for model, made in pair]
    optimizers[0].register_step_post_hook(lambda *arguments: steps.append(1))
    for seed in range(3):
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
            model(images).square().sum().backward()
            optimizer.step()
        optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        for mine, theirs_too in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(mine, theirs_too) and mine.is_leaf
    assert str(optimizers[0]) == str(optimizers[1])
    assert str(optimizers[0].state_dict()) == str(optimizers[1].state_dict())
    assert len(steps) == 3


def test_momentum_zero_is_plain_gradient_descent():
    optimizer = make_optimizer(Small(), Hyperparameters(momentum=0.0), weight_decay=0.0)
    assert not any(group["nesterov"] for group in optimizer.param_groups)


# ---- moving average -----------------------------------------------------------------------------------------------


def train_a_little(model: nn.Module, generator: torch.Generator) -> None:
    model(torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64))  # moves the batch-norm statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def test_the_average_equals_a_slow_loop():
    model, generator = Small().double(), torch.Generator().manual_seed(0)
    average = WeightAverage(model)
    expected = {name: value.tolist() for name, value in model.state_dict().items()}

    def blend(mine, theirs, decay):
        if isinstance(mine, list):
            return [blend(*pair, decay) for pair in zip(mine, theirs)]
        return decay * mine + (1 - decay) * theirs

    for n in range(1, 30):
        train_a_little(model, generator)
        average.update(model)
        for name, value in model.state_dict().items():
            decay = 0.9999 * (1 - math.exp(-n / 2000)) if value.is_floating_point() else 0.0
            expected[name] = blend(expected[name], value.tolist(), decay)
    assert average.updates == 29
    for name, value in average.model.state_dict().items():
        assert torch.allclose(value, torch.tensor(expected[name], dtype=value.dtype), rtol=0, atol=1e-12), name
    assert not torch.allclose(average.model.conv.weight, model.conv.weight)


def test_counters_are_copied():
    model = Small()
    average = WeightAverage(model)
    model.norm.num_batches_tracked += 7
    average.update(model)
    assert average.model.norm.num_batches_tracked == 7


def test_an_old_average_hardly_moves():
    model = Small()
    average = WeightAverage(model)
    average.updates = 100_000
    before = average.model.conv.weight.clone()
    with torch.no_grad():
        model.conv.weight += 1
    average.update(model)
    assert torch.allclose(average.model.conv.weight - before, torch.tensor(1e-4), atol=1e-6)


def test_the_averaged_model_is_a_separate_copy():
    model = Small()
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in average.model.state_dict().items())
    average.update(model)
    assert not any(parameter.any() for parameter in model.parameters())


def test_the_averaged_model_evaluates_and_is_not_trained():
    model = Small().train()
    average = WeightAverage(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    average.update(model)
    assert not average.model.conv.weight.requires_grad
