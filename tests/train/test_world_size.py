"""One training by one process, by two and by four: the same images, losses and weights."""

import pytest
import torch
from torch import nn

from tests.groups import in_places
from utils.train.build import build_trainer
from utils.train.trainer import Trainer

STEPS = 20
PLAIN = {"batch_size": 5, "nominal_batch": "10"}  # of 8 images: a batch of 5, and one of 3 for up to four ranks
# with SGD: the Adams divide gradients by their size, and with them what rounding made of zero
CASES = {
    "plain": PLAIN,
    "rect": {**PLAIN, "rect": True, "multi_scale": True},
    "device": {**PLAIN, "paint": "device", "freeze": (2,), "label_smoothing": 0.1},
    "weights": {"batch_size": 6, "image_weights": True, "linear_lr": True},
}
QUAD = {"quad": {"batch_size": 8, "quad": True, "nominal_batch": "8"}}  # two inputs


def steps_of(cases: dict[str, dict]) -> dict[str, tuple]:
    """Images, losses and weights of 20 steps, in this process or on its rank. Batch norms keep their statistics."""
    told = {}
    for name, options in cases.items():
        trainer = build_trainer({**options, "name": name, "exist_ok": True})
        told[name] = _steps(trainer)
        trainer.stream.close()
        trainer.runtime.ranks.leave()
    return told


def _steps(trainer: Trainer) -> tuple:
    model, per_epoch = trainer.step.model.train(), trainer.schedule.batches_per_epoch
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images, losses, parts = [], [], []
    for number in range(STEPS):
        epoch, index = divmod(number, per_epoch)
        if index == 0:
            batches = trainer.stream.epoch(epoch, (0.2, 0.6))
        batch = next(batches)
        step = trainer.step(batch, trainer.schedule(number))
        images.append(batch.indices.tolist())
        losses.append(torch.stack([step.box, step.objectness, step.classification, step.total]))
        parts.append(batch.part)
    average = trainer.step.average.model.state_dict()
    return (
        images,
        torch.stack(losses),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        average,
        parts,
    )


def assert_the_same(found: tuple, expected: tuple) -> None:
    """The goal is a relative distance of 1e-5 for each tensor."""
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(found[2:4], expected[2:4]):
        for name, tensor in theirs.items():
            distance = (mine[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)
            assert distance <= 1e-5, (name, float(distance))


@pytest.mark.parametrize("ranks", [2, 4])
def test_so_many_ranks_train_as_one_process(tiny, ranks):
    cases = CASES | (QUAD if ranks == 2 else {})
    cases = {name: tiny.options(**options, hyp=None, cache="ram", epochs=STEPS) for name, options in cases.items()}
    by_rank = in_places(ranks, steps_of, cases)
    expected = steps_of(cases)
    for name, alone in expected.items():
        assert not any(alone[4])
        for told in by_rank:
            assert_the_same(told[name], alone)
            for mine, first in zip(told[name][2:4], by_rank[0][name][2:4]):
                assert all(torch.equal(mine[key], first[key]) for key in first)
        parts = [told[name][4] for told in by_rank]
        for step in range(STEPS):
            owns = [mine[step].own for mine in parts]
            assert sum(owns) == parts[0][step].whole == len(alone[0][step]) // (4 if name == "quad" else 1)
            assert max(owns) - min(owns) <= 1
    if ranks == 4:  # the last batch has an image for three of them alone
        assert [mine[1].own for mine in (told["plain"][4] for told in by_rank)] == [1, 1, 1, 0]
