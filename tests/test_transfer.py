"""Weights of one network as the start of another, as the user is told and as the tensors are."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import train
from models.yolo import DetectionModel
from tests.conftest import NETWORK
from tests.published import learned, publish
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.structures import UserError
from utils.train.build import build_trainer
from utils.transfer import transfer

HEAD = "model.10.m."
HEAD_ENTRIES = [f"{HEAD}{level}.{kind}" for level in (0, 1) for kind in ("weight", "bias")]


def model(classes: int, seed: int, **changes) -> DetectionModel:
    return DetectionModel({**NETWORK, **changes}, num_classes=classes, seed=seed)


def copied(network: DetectionModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def taken(donor: DetectionModel, learned: list[str], taker: DetectionModel, names: list[str]):
    """The transfer, and the taker's state before and after it."""
    before = copied(taker)
    return transfer(taker, donor.state_dict(), learned=learned, names=names), before, copied(taker)


def slow_rows(donor: torch.Tensor, start: torch.Tensor, learned: list[str], names: list[str], anchors: int = 2):
    """Row by row."""
    rows = start.clone()
    for anchor in range(anchors):
        here, there = anchor * (5 + len(names)), anchor * (5 + len(learned))
        for row in range(5):
            rows[here + row] = donor[there + row]
        for number, name in enumerate(names):
            if name in learned:
                rows[here + 5 + number] = donor[there + 5 + learned.index(name)]
    return rows


def test_what_fits_by_name_and_shape_is_taken_and_the_rest_named():
    donor, taker = model(2, 1), model(5, 2)
    before = copied(taker)
    given = {name: tensor + 1 for name, tensor in donor.state_dict().items()} | {"model.99.conv.weight": torch.ones(1)}

    report = transfer(taker, given, learned=["0", "1"], names=list("abcde"))  # names that only count are none

    after = taker.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert set(report.whole) == changed
    assert set(before) - changed == {"model.10.anchors", *HEAD_ENTRIES}
    assert all(torch.equal(after[name], given[name]) for name in changed)
    assert report.total == len(before) - 1
    assert (sorted(report.left_out), report.by_class, report.classes) == (sorted(HEAD_ENTRIES), (), ())
    assert sorted(report.unused) == sorted([*HEAD_ENTRIES, "model.99.conv.weight"])


@pytest.mark.parametrize(
    ("learned", "names"),
    [
        (["a", "b", "c"], ["c", "a", "b"]),
        (["a", "b"], ["x", "b", "y", "a"]),
        (["a", "b", "c", "d"], ["d"]),
        (["a", "b"], ["A", "b "]),
        (["a", "b"], ["b", "z"]),
    ],
)
def test_a_class_is_known_by_its_name(learned, names):
    donor, taker = model(len(learned), 1), model(len(names), 2)
    report, before, after = taken(donor, learned, taker, names)
    for name in HEAD_ENTRIES:
        assert torch.equal(after[name], slow_rows(donor.state_dict()[name], before[name], learned, names))
    assert report.classes == tuple(name for name in names if name in learned)
    assert sorted(report.by_class) == sorted(HEAD_ENTRIES)
    assert (report.left_out, report.unused) == ((), ())
    assert len(report.whole) == report.total - len(HEAD_ENTRIES)


def test_equal_names_and_no_names_make_the_head_an_entry_like_any():
    donor = model(2, 1)
    for before, names in ((["a", "b"], ["a", "b"]), (["0", "1"], ["a", "b"]), (["a", "b"], ["0", "1"])):
        report, _, after = taken(donor, before, model(2, 2), names)
        assert len(report.whole) == report.total and not report.by_class
        assert all(torch.equal(after[name], donor.state_dict()[name]) for name in HEAD_ENTRIES)


def test_heads_of_other_anchors_or_widths_are_left_out():
    for donor in (model(3, 1, anchors=[[10, 13], [30, 61]]), model(3, 1, width_multiple=0.25)):
        report, before, after = taken(donor, ["a", "b", "c"], model(2, 2), ["a", "b"])
        assert report.by_class == () and report.classes == ()
        assert set(HEAD_ENTRIES) <= set(report.left_out)
        assert all(torch.equal(before[name], after[name]) for name in report.left_out)


def test_a_head_of_as_many_rows_that_mean_other_things_is_left_out():
    """3 x (5 + 2) and 1 x (5 + 16) are 21."""
    donor, taker = model(16, 1, anchors=[[10, 13], [30, 61]]), model(2, 2, anchors=[[10, 13] * 3, [30, 61] * 3])
    report, *_ = taken(donor, list("abcdefghijklmnop"), taker, ["a", "b"])
    assert not {*report.whole, *report.by_class} & set(HEAD_ENTRIES)


def test_a_counter_goes_with_its_batch_norm_and_a_bias_with_its_weight():
    report, *_ = taken(model(2, 1, width_multiple=0.25), ["a", "b"], model(2, 2), ["a", "b"])
    assert report.whole == ()


def test_half_precision_is_taken_as_it_is():
    donor, taker = learned(NETWORK), model(2, 2)
    transfer(taker, donor.half().state_dict(), learned=["a", "b"], names=["b", "a"])
    assert {parameter.dtype for parameter in taker.parameters()} == {torch.float32}
    weight, bias = f"{HEAD}0.weight", f"{HEAD}0.bias"
    for name in (weight, bias):
        assert torch.equal(taker.state_dict()[name][5], donor.state_dict()[name][6].float())


# ---- as told --------------------------------------------------------------------------------------------------------


def said(capsys, kind: str = "Weights:") -> list[str]:
    output = capsys.readouterr()
    return [line for line in (output.out + output.err).splitlines() if kind in line]


def test_train_tells_what_it_took(trained, tiny, capsys):
    content = yaml.safe_load(tiny.data.read_text()) | {"names": ["red", "blue", "green"]}
    tiny.data.write_text(yaml.safe_dump(content))
    weights = trained / "weights/best.pt"
    trainer = build_trainer(tiny.options(weights=str(weights)))
    first, second = said(capsys)
    total = len(trainer.step.model.state_dict()) - 1
    assert first == f"Weights: {total - 4} of {total} entries of {weights} fit this network"
    assert second == "Weights: 4 entries of the head by class: boxes, objectness and the rows of red, blue"
    given, entries = load_checkpoint(weights)["ema"], trainer.step.model.state_dict()
    for name in HEAD_ENTRIES:
        assert torch.equal(
            entries[name], slow_rows(given[name].float(), entries[name], ["blue", "red"], ["red", "blue", "green"])
        )


def test_train_names_what_it_left(trained, tiny, capsys):
    content = yaml.safe_load(tiny.cfg.read_text())
    content["backbone"][4][3][0] = 512  # wider from layer 4 on
    tiny.cfg.write_text(yaml.safe_dump(content))
    build_trainer(tiny.options(weights=str(trained / "weights/best.pt")))
    _, left, unused = said(capsys)
    for line, kind in ((left, "left as they start"), (unused, "not used")):
        assert re.fullmatch(rf"Weights: {kind}: model\.4\.conv\.weight, model\.4\.bn\.weight, .* and \d+ more", line)


def test_a_network_that_nothing_fits_is_refused(trained, tiny):
    content = yaml.safe_load(tiny.cfg.read_text()) | {"width_multiple": 0.5}
    tiny.cfg.write_text(yaml.safe_dump(content))
    weights = trained / "weights/best.pt"
    with pytest.raises(
        UserError, match=r"not one of its entries fits .*model\.0\.conv\.weight.*leave out --cfg"
    ) as raised:
        build_trainer(tiny.options(weights=str(weights)))
    assert "\n" not in str(raised.value) and str(weights) in str(raised.value)
    assert not Path("runs").exists()


def test_weights_of_an_unfinished_run_start_anew_and_say_so(tiny, trained, capsys):
    options = tiny.options(epochs=2, name="first")
    train.run(**options)
    last = Path("runs/train/first/weights/last.pt")
    capsys.readouterr()
    build_trainer(tiny.options(weights=str(last), cfg=None))
    assert said(capsys, "--resume") == []  # it is finished

    Path("runs/train/first/metrics.json").unlink()
    trainer = build_trainer(tiny.options(weights=str(last), cfg=None))
    (line,) = said(capsys, "--resume")
    assert f"--weights {last} starts anew" in line and f"--resume {last} continues it" in line
    assert trainer.state.epoch == 0
    build_trainer(tiny.options(weights=str(last.with_name("best.pt")), cfg=None))
    assert said(capsys, "--resume") == []
    save_checkpoint(Path("moved.pt"), load_checkpoint(last))
    build_trainer(tiny.options(weights="moved.pt", cfg=None))
    assert said(capsys, "--resume") == []  # nowhere to continue


def test_published_weights_of_other_classes(tiny, tmp_path, capsys):
    path = publish(tmp_path / "x.pt", learned({**NETWORK, "nc": 3}), names={0: "red", 1: "cat", 2: "blue"})
    trainer = build_trainer(tiny.options(weights=str(path), cfg=None))
    assert said(capsys)[1].endswith("the rows of blue, red")
    assert trainer.step.model.head.num_classes == 2
