import copy
import itertools
import math
from collections import Counter
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.config import OptimizerName
from utils.hyp import Hyperparameters
from utils.train.optim import (
    OPTIMIZERS,
    Schedule,
    WeightAverage,
    apply_settings,
    blend_unless,
    choose_accumulation,
    guarded_step,
    make_optimizer,
    multi_scales,
    rates_of_sgd,
    restore_optimizer,
    trained_parameters,
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


def test_settings_name_their_batch():
    assert [schedule(per_epoch=50)(step).place for step in (0, 49, 50, 121)] == [(0, 0), (0, 49), (1, 0), (2, 21)]


def test_without_multi_scale_every_batch_has_one_size():
    assert {schedule()(step).scale for step in range(500)} == {1.0}


@given(st.integers(1, 40), st.sampled_from([8, 16, 32, 64]))
def test_scales_are_all_whole_strides_from_half_to_one_and_a_half(strides, stride):
    imgsz = strides * stride
    sizes = [scale * imgsz for scale in multi_scales(imgsz, stride)]
    slow = [size for size in range(stride, 2 * imgsz, stride) if imgsz / 2 <= size <= imgsz * 3 / 2]
    assert sizes == pytest.approx(slow)
    assert 1.0 in multi_scales(imgsz, stride)


def test_scales_are_drawn_evenly_and_from_seed_epoch_and_batch_alone():
    def drawn(seed: int) -> list[float]:
        plan = Schedule(
            hyp=Hyperparameters(),
            epochs=10,
            batches_per_epoch=200,
            accumulation=1,
            seed=seed,
            scales=multi_scales(160, 32),
        )
        return [plan(step).scale for step in range(2000)]

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert first[:200] != first[200:400]  # another epoch
    counts = Counter(round(scale * 160) for scale in first)
    assert counts.keys() == {96, 128, 160, 192, 224}
    assert all(abs(count - 400) < 80 for count in counts.values())  # 4.5 standard deviations


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


def test_choices_on_the_command_line_are_those_there_are():
    assert get_args(OptimizerName) == tuple(OPTIMIZERS)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_has_the_same_groups(kind):
    sgd = make_optimizer(model := Small(), Hyperparameters(), weight_decay=0.003)
    optimizer = make_optimizer(model, Hyperparameters(lr0=0.02), weight_decay=0.003, kind=kind)
    assert type(optimizer).__name__ == kind
    for ours, theirs in zip(optimizer.param_groups, sgd.param_groups):
        assert [id(parameter) for parameter in ours["params"]] == [id(parameter) for parameter in theirs["params"]]
        assert (ours["lr"], ours["weight_decay"]) == (0.02, theirs["weight_decay"])


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_three_updates_equal_adam_by_hand(kind):
    """With beta1 moving as the schedule says, and weight decay in the gradient (Adam) or beside it (AdamW)."""
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = make_optimizer(model, Hyperparameters(lr0=0.1), weight_decay=0.2, kind=kind)
    plan = schedule(per_epoch=3, lr0=0.1, warmup_epochs=3.0)
    weight, first, second = model.weight.item(), 0.0, 0.0
    for step in range(1, 4):
        settings = plan(step)
        apply_settings(optimizer, settings)
        optimizer.zero_grad()
        (step * model.weight.sum()).backward()
        optimizer.step()
        lr, beta1 = settings.lrs[1], settings.momentum
        gradient = step + (0.2 * weight if kind == "Adam" else 0)
        weight -= lr * 0.2 * weight if kind == "AdamW" else 0
        first = beta1 * first + (1 - beta1) * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight -= lr * (first / (1 - beta1**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
    assert model.weight.item() == pytest.approx(weight, rel=1e-9)


def steps_of(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for step in steps:
        apply_settings(optimizer, schedule()(100 + step))
        optimizer.zero_grad()
        model(images.to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fused_step_equals_one_over_lists(kind):
    """In channels-last memory too, which a kernel over raw memory could mistake.

    The gradients are drawn: that of a bias before a batch norm is mere rounding, which the Adams would blow up.
    """
    fused = Small().to(memory_format=torch.channels_last)
    listed = copy.deepcopy(fused)
    optimizers = [make_optimizer(model, Hyperparameters(), weight_decay=0.01, kind=kind) for model in (fused, listed)]
    for group in optimizers[1].param_groups:
        group.update(fused=False, foreach=True)
    drawn = torch.Generator().manual_seed(0)
    for step in range(5):
        for ours, theirs in zip(fused.parameters(), listed.parameters()):
            gradient = torch.randn(ours.shape, generator=drawn)
            ours.grad, theirs.grad = (torch.empty_like(ours).copy_(gradient) for _ in range(2))
        for optimizer in optimizers:
            apply_settings(optimizer, schedule()(100 + step))
            optimizer.step()
    for ours, theirs in zip(fused.parameters(), listed.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_a_fused_kernel_the_step_is_one_over_lists(kind, monkeypatch):
    honest = OPTIMIZERS[kind]

    def old(groups, hyp, **way):
        if "fused" in way:
            raise RuntimeError("`fused=True` requires all the params to be on another device")
        return honest(groups, hyp, **way)

    monkeypatch.setitem(OPTIMIZERS, kind, old)
    optimizer = make_optimizer(Small(), Hyperparameters(), weight_decay=0.0, kind=kind)
    assert [(group["foreach"], bool(group["fused"])) for group in optimizer.param_groups] == [(True, False)] * 3


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("moves", [False, True])
def test_a_restored_optimizer_goes_on_as_if_it_had_not_stopped(kind, moves):
    """Also on a machine that computes its steps in another way than the one that saved."""

    def made(model):
        return make_optimizer(model, Hyperparameters(), weight_decay=0.01, kind=kind)

    torch.manual_seed(0)
    whole = Small()
    optimizer = made(whole)
    steps_of(optimizer, whole, range(2))
    resumed, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    steps_of(optimizer, whole, range(2, 4))
    if moves:
        for group in state["param_groups"]:
            group.update(fused=None, foreach=True)
    second = made(resumed)
    ways = [group["fused"] for group in second.param_groups]
    restore_optimizer(second, state)
    assert [group["fused"] for group in second.param_groups] == ways
    steps_of(second, resumed, range(2, 4))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_first_step_that_overflows_leaves_no_trace(kind):
    """A GradScaler skips it; what follows equals a run that began one step later."""
    torch.manual_seed(0)
    skipping = Small()
    honest = copy.deepcopy(skipping)
    for model in (skipping, honest):
        optimizer = make_optimizer(model, Hyperparameters(), weight_decay=0.01, kind=kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        for step in range(1 if model is honest else 0, 4):
            optimizer.zero_grad()
            loss = (model.conv.weight.square().sum() + sum(one.sum() for one in model.parameters())) * 2.0
            scaler.scale(loss * (math.inf if step == 0 else 1)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    for ours, theirs in zip(skipping.parameters(), honest.parameters()):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_is_skipped_leaves_weights_and_state_to_the_bit(kind, fused):
    """The second of three, with gradients that are no numbers; and the third is as if there had been two."""
    torch.manual_seed(0)
    skipping = Small()
    honest = copy.deepcopy(skipping)
    optimizers = [
        make_optimizer(model, Hyperparameters(), weight_decay=0.01, kind=kind) for model in (skipping, honest)
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(fused=fused, foreach=not fused)

    def step(model, optimizer, *, factor: float) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3, 5, 5)).square().sum().backward()
        for parameter in model.parameters():
            parameter.grad.mul_(factor)
        guarded_step(optimizer, torch.tensor(not math.isfinite(factor)))

    def everything(model, optimizer) -> list[torch.Tensor]:
        state = [one for entry in optimizer.state_dict()["state"].values() for one in entry.values()]
        return [one.detach().clone() for one in (*model.parameters(), *state)]

    step(skipping, optimizers[0], factor=1.0)
    before = everything(skipping, optimizers[0])
    for factor in (math.nan, math.inf):
        step(skipping, optimizers[0], factor=factor)
        after = everything(skipping, optimizers[0])
        assert len(before) == len(after) > 10
        assert all(map(torch.equal, before, after))
    step(skipping, optimizers[0], factor=1.0)
    for _ in range(2):
        step(honest, optimizers[1], factor=1.0)
    assert all(map(torch.equal, everything(skipping, optimizers[0]), everything(honest, optimizers[1])))
    assert not {"found_inf", "grad_scale"} & vars(optimizers[0]).keys()  # a GradScaler would multiply by them


def test_a_fused_step_asks_nobody_to_read_the_verdict(monkeypatch):
    optimizer = make_optimizer(model := Small(), Hyperparameters(), weight_decay=0.0)
    if not all(group["fused"] for group in optimizer.param_groups):
        pytest.skip("this torch has no fused kernel for the CPU")
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a tensor was read"))
    guarded_step(optimizer, torch.tensor(False))


def test_what_is_frozen_is_not_in_the_optimizer():
    model = Small()
    model.head.requires_grad_(False)
    optimizer = make_optimizer(model, Hyperparameters(), weight_decay=0.0)
    trained = {id(parameter) for parameter in trained_parameters(optimizer)}
    assert trained == {id(one) for one in (model.conv.weight, model.norm.weight, model.norm.bias, model.scale)}


def test_all_kinds_of_batch_norms_are_spared_from_decay():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.SyncBatchNorm(2))
    groups = make_optimizer(model, Hyperparameters(), weight_decay=0.1).param_groups
    assert [len(group["params"]) for group in groups] == [2, 0, 2]


@pytest.mark.parametrize(
    ("kind", "hyp", "line"),
    [
        ("SGD", {}, None),
        ("Adam", {"lr0": 0.001, "warmup_bias_lr": 0.001}, None),
        (
            "Adam",
            {},
            "Adam runs with learning rates made for SGD (lr0: 0.01, warmup_bias_lr: 0.1): put lr0: 0.001, "
            "warmup_bias_lr: 0.001 into the --hyp file",
        ),
        (
            "AdamW",
            {"lr0": 0.001},
            "AdamW runs with learning rates made for SGD (warmup_bias_lr: 0.1): put warmup_bias_lr: 0.001 into the "
            "--hyp file",
        ),
    ],
)
def test_adam_with_the_rates_of_sgd_is_worth_a_line(kind, hyp, line):
    assert rates_of_sgd(kind, Hyperparameters(**hyp)) == line


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


def test_the_average_follows_weights_that_are_loaded_or_of_another_model():
    model, other = Small(), Small()
    average = WeightAverage(model)
    average.update(model)
    model.load_state_dict(other.state_dict())
    for _ in range(2):
        average.updates = 0  # decay 0.0005: nearly a copy
        average.update(model)
    torch.testing.assert_close(average.model.conv.weight, other.conv.weight, rtol=0, atol=1e-5)
    third = Small()
    for _ in range(2):
        average.updates = 0
        average.update(third)
    torch.testing.assert_close(average.model.conv.weight, third.conv.weight, rtol=0, atol=1e-5)


def test_an_old_average_hardly_moves():
    model = Small()
    average = WeightAverage(model)
    average.updates = 100_000
    before = average.model.conv.weight.clone()
    with torch.no_grad():
        model.conv.weight += 1
    average.update(model)
    assert torch.allclose(average.model.conv.weight - before, torch.tensor(1e-4), atol=1e-6)


def test_an_average_stays_where_an_update_was_skipped():
    """It counts nevertheless: the next decay is that of the third."""
    model, generator = Small().double(), torch.Generator().manual_seed(0)
    ours, others = WeightAverage(model), WeightAverage(model)
    for skip in (False, True, False):
        train_a_little(model, generator)
        before = copy.deepcopy(ours.model.state_dict())
        ours.update(model, torch.tensor(skip))
        moved = [not torch.equal(before[name], value) for name, value in ours.model.state_dict().items()]
        assert not any(moved) if skip else all(moved)
        others.updates += skip
        if not skip:
            others.update(model)
    assert ours.updates == others.updates == 3
    assert all(torch.equal(*pair) for pair in zip(ours.model.state_dict().values(), others.model.state_dict().values()))


@pytest.mark.parametrize("weight", [0.7, 0.0001])
def test_a_blend_on_a_device_that_nobody_waits_for(weight):
    generator = torch.Generator().manual_seed(0)
    mine, theirs = ([torch.randn(size, generator=generator) for size in (3, 7)] for _ in range(2))
    before = [one.clone() for one in mine]
    blend_unless(torch.tensor(True), mine, theirs, weight)
    assert all(map(torch.equal, before, mine))
    blend_unless(torch.tensor(False), mine, theirs, weight)
    for old, new, other in zip(before, mine, theirs):
        torch.testing.assert_close(new, old + weight * (other - old), rtol=1e-6, atol=1e-6)


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
