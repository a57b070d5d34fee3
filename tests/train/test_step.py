"""A step that meets numbers that are not finite: it leaves no trace but in what is told of it."""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from utils.structures import Batch, Losses
from utils.train.build import build_trainer
from utils.train.optim import OPTIMIZERS
from utils.train.step import TrainStep


class Faults:
    """What goes wrong in a step while one is `of` a kind: in the network's input, its gradient, or the loss alone."""

    KINDS = ("nan forward", "inf forward", "nan gradient", "inf gradient", "inf loss")

    def __init__(self, step: TrainStep) -> None:
        self.kind = ""
        network = step.model
        first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda module, images: images[0] + self._value("forward"))
        parameter = next(reversed(list(network.parameters())))
        parameter.register_hook(lambda gradient: gradient + self._value("gradient"))
        honest = step._losses
        step._losses = lambda *arguments, **named: self._lost(honest(*arguments, **named))

    def _value(self, where: str) -> float:
        return float(self.kind.split()[0]) if where in self.kind else 0.0

    def _lost(self, losses: Losses) -> Losses:
        """The gradient of such a loss is as finite as ever."""
        return replace(losses, total=losses.total + self._value("loss"))

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        self.kind = kind
        yield
        self.kind = ""


class Rig:
    """A step of the tiny network, its four batches of two images, and what can go wrong."""

    def __init__(self, tiny, *, kind: str = "SGD", fused: bool = True, scale: float | None = None) -> None:
        trainer = build_trainer(tiny.options(batch_size=2, optimizer=kind))
        self.step = trainer.step
        self.step.model.train()
        if scale is not None:  # as on a GPU in fp16
            self.step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for group in self.step.optimizer.param_groups:
            group.update(fused=fused, foreach=not fused)
        self.faults = Faults(self.step)
        self._batches: list[Batch] = list(trainer.stream.epoch(0))
        self._settings = trainer.schedule(1)

    def train(self, *batches: int, fault: str = "", faulty: int | None = None, update: bool = True) -> None:
        """One update of these batches, the last of which, or the `faulty` one, has the fault; or all but the update."""
        for place, index in enumerate(batches):
            settings = replace(self._settings, update=update and place + 1 == len(batches), place=(0, index))
            with self.faults.of(fault if index == (batches[-1] if faulty is None else faulty) else ""):
                self.step(self._batches[index], settings)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """All that training moves; not how many batches the norms have seen, which nothing depends on."""
        state = self.step.state_dict()
        moved = {f"{part}/{name}": value for part in ("model", "ema") for name, value in state[part].items()}
        for number, entry in state["optimizer"]["state"].items():
            moved |= {f"optimizer/{number}/{name}": value for name, value in entry.items()}
        return {name: value.clone() for name, value in moved.items() if "num_batches" not in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(params=[(kind, fused) for kind in OPTIMIZERS for fused in (True, False)], ids=str)
def way(request) -> dict:
    kind, fused = request.param
    return {"kind": kind, "fused": fused}


@pytest.mark.parametrize("fault", Faults.KINDS)
def test_a_bad_update_leaves_no_trace_and_the_next_is_as_if_it_had_not_been(tiny, way, fault):
    rig, honest = Rig(tiny, **way), Rig(tiny, **way)
    for one in (rig, honest):
        one.train(0)
    before = rig.snapshot()
    rig.train(1, fault=fault)
    assert equal(before, rig.snapshot())
    assert rig.step.average.updates == 2
    honest.step.average.updates = 2  # it was due
    for one in (rig, honest):
        one.train(2)
        one.train(3)
    assert equal(rig.snapshot(), honest.snapshot())
    assert not equal(rig.snapshot(), before)
    (bad,) = rig.step.health.poll(now=True).bad
    assert (bad.what, [batch.index for batch in bad.batches]) == ("gradient" if "gradient" in fault else "loss", [1])
    assert len(bad.batches[0].images) == 2
    assert honest.step.health.poll(now=True).bad == ()


def test_a_first_update_may_be_bad(tiny, way):
    rig, honest = Rig(tiny, **way), Rig(tiny, **way)
    rig.train(1, fault="nan forward")
    honest.step.average.updates = 1
    for one in (rig, honest):
        one.train(0)
        one.train(2)
    assert equal(rig.snapshot(), honest.snapshot())


@pytest.mark.parametrize("faulty", [0, 1, 2])
@pytest.mark.parametrize("fault", ["nan forward", "inf gradient", "inf loss"])
def test_one_bad_batch_spoils_its_update(tiny, fault, faulty):
    """Statistics that good batches of that update moved return as well."""
    rig, honest = Rig(tiny), Rig(tiny)
    for one in (rig, honest):
        one.train(3)
    before = rig.snapshot()
    rig.train(0, 1, 2, fault=fault, faulty=faulty)
    assert equal(before, rig.snapshot())
    (bad,) = rig.step.health.poll(now=True).bad
    assert [batch.index for batch in bad.batches] == ([0, 1, 2] if "gradient" in fault else [faulty])
    honest.step.average.updates = 2
    for one in (rig, honest):
        one.train(0, 1)
    assert equal(rig.snapshot(), honest.snapshot())


@pytest.mark.parametrize("fault", ["inf loss", "nan gradient", "inf gradient"])
def test_with_a_scaler_an_overflow_is_skipped_but_does_not_count(tiny, way, fault):
    rig, honest = Rig(tiny, scale=2.0**8, **way), Rig(tiny, scale=2.0**7, **way)
    for one in (rig, honest):
        one.train(0)
    before = rig.snapshot()
    rig.train(1, fault=fault)
    assert equal(before, rig.snapshot())
    lost = "loss" in fault  # which says nothing about the scale
    assert rig.step.scaler.get_scale() == (2.0**8 if lost else 2.0**7)
    report = rig.step.health.poll(now=True)
    assert report.in_row == len(report.bad) == ("gradient" not in fault)
    honest.step.average.updates = 2
    for one in (rig, honest):
        one.train(2)
    after, expected = rig.snapshot(), honest.snapshot()
    assert after.keys() == expected.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_losses_that_are_no_numbers_are_in_no_mean(tiny):
    rig, honest = Rig(tiny), Rig(tiny)
    for one in (rig, honest):
        one.train(0)
    rig.train(1, fault="nan forward")
    assert rig.step.health.means() == honest.step.health.means()
    assert math.isfinite(rig.step.health.means().box)


@pytest.mark.parametrize("last", ["", "nan forward"])
def test_a_step_resumed_in_mid_epoch_goes_on_bit_for_bit(tiny, last):
    """Right after a good update or a bad one; and what lay open when it was loaded is forgotten."""
    whole, resumed = Rig(tiny), Rig(tiny)
    whole.train(0)
    whole.train(1, fault="nan gradient")
    whole.train(2, fault=last)
    whole.step.health.poll()
    state = copy.deepcopy(whole.step.state_dict())
    whole.step.health.poll(now=True)
    resumed.train(3)
    with resumed.faults.of("nan forward"):  # an update that is begun, and never made
        resumed.step(resumed._batches[0], replace(resumed._settings, update=False))
    resumed.step.load_state_dict(state)
    for rig in (whole, resumed):
        rig.train(0, 1)
        rig.train(3, fault="inf loss")
        rig.train(2)
    assert equal(whole.snapshot(), resumed.snapshot())
    assert whole.step.health.poll(now=True) == resumed.step.health.poll(now=True)
    assert whole.step.health.means() == resumed.step.health.means()


@pytest.mark.parametrize("fault", ["", "nan forward", "inf loss"])
def test_what_came_since_the_last_update_can_be_forgotten(tiny, fault):
    """As when a signal ends a run: the next update is as if nobody had begun with it before."""
    rig, honest = Rig(tiny), Rig(tiny)
    for one in (rig, honest):
        one.train(0, 1)
    rig.train(2, 3, fault=fault, faulty=2, update=False)
    rig.step.roll_back()
    assert equal(rig.step.model.state_dict(), honest.step.model.state_dict())  # counters, too
    for one in (rig, honest):
        one.train(3, 2)
    assert equal(rig.snapshot(), honest.snapshot())
    assert rig.step.health.means() == honest.step.health.means()
    assert rig.step.health.poll(now=True) == honest.step.health.poll(now=True)
