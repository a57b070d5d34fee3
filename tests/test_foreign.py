"""Published weights: read without their package, as what they are, or refused with what is in the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import detect
import train
import val
from models import yolo
from models.yolo import DetectionModel, decode
from tests.conftest import NETWORK
from tests.published import V5, learned, publish
from utils.checkpoint import averaged_model, load_checkpoint, load_weights, save_checkpoint
from utils.structures import UserError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["blue", "red"]
OPTIONS = {"data": "", "imgsz": 64, "label_smoothing": 0.0}


def found(model: DetectionModel) -> torch.Tensor:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    return decode(model(images), model.head)


def same(path: Path, model: DetectionModel) -> bool:
    return torch.equal(found(averaged_model(load_weights(path))), found(model))


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_weights(path)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    return message


# ---- what they hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [NETWORK, V5], ids=["v7", "v5"])
@pytest.mark.parametrize("package", ["models", "yolov5.models"])
def test_the_network_finds_what_it_found(tmp_path, network, package):
    model = learned(network)
    path = publish(tmp_path / "x.pt", model, names=NAMES, package=package)
    assert same(path, model)
    weights = load_weights(path)
    assert weights["names"] == NAMES
    assert {tensor.dtype for tensor in weights["ema"].values()} == {torch.float16, torch.int64}
    assert next(averaged_model(weights).parameters()).dtype == torch.float32


def test_the_average_is_preferred(tmp_path):
    better, other = learned(NETWORK, seed=1), learned(NETWORK, seed=2)
    publish(tmp_path / "other.pt", other)
    path = publish(tmp_path / "x.pt", better, key="ema", more={"model": nn.Conv2d(1, 1, 1)})
    assert same(path, better)


def test_names_as_a_dictionary_a_list_or_none(tmp_path):
    model = learned(NETWORK)
    dictionaries = [({0: " a", 1: "A"}, [" a", "A"]), ({1: "b", 0: "a"}, ["a", "b"])]
    for given, names in [*dictionaries, (["x", "y"], ["x", "y"]), (None, ["0", "1"])]:
        assert load_weights(publish(tmp_path / "x.pt", model, names=given))["names"] == names
    for given in (["one"], {0: "a", 1: 2}):
        assert "names" in one_line(publish(tmp_path / "x.pt", model, names=given))


def test_anchors_are_those_of_the_head_not_of_the_yaml(tmp_path):
    model = learned(NETWORK)
    model.set_anchors(torch.tensor([[[8.0, 12], [20, 24]], [[40, 48], [80, 96]]]))
    assert same(publish(tmp_path / "x.pt", model, yaml={**NETWORK, "anchors": 2}), model)


def test_the_image_size_is_that_of_its_training(tmp_path):
    path = publish(tmp_path / "x.pt", learned(NETWORK), more={"opt": {"imgsz": 320, "data": Path("x.yaml")}})
    assert load_weights(path)["options"]["imgsz"] == 320
    assert load_weights(publish(tmp_path / "y.pt", learned(NETWORK)))["options"]["imgsz"] == 640


def test_grids_of_the_head_and_other_leftovers_are_read_past(tmp_path):
    def change(network):
        head = network.model[-1]
        head.grid = [torch.zeros(1, 1, 1, 2).expand(1, 80, 80, 2)]
        head.register_buffer("anchor_grid", torch.ones(2, 1, 2, 1, 1, 2))
        network.hyp = {"lr0": 0.01}
        network.later = Path("x")

    model = learned(NETWORK)
    assert same(publish(tmp_path / "x.pt", model, change=change, more={"best_fitness": torch.ones(1)}), model)


def test_no_package_is_imported(tmp_path):
    path = publish(tmp_path / "x.pt", learned(NETWORK), package="yolov5.models")
    code = (
        "import sys; from pathlib import Path; from utils.checkpoint import load_weights\n"
        f"load_weights(Path({str(path)!r}))\n"
        "print([name for name in sys.modules if name.startswith('yolov5')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


# ---- what is not built here -----------------------------------------------------------------------------------------


def renamed(kind: str, at: int | None):
    """Gives the network, or one of its layers, a class of another name."""

    def change(network):
        part = network if at is None else network.model[at]
        type(part).__name__ = type(part).__qualname__ = kind

    return change


@pytest.mark.parametrize(
    ("kind", "at"), [("SegmentationModel", None), ("ClassificationModel", None), ("Segment", -1), ("C3TR", 3)]
)
def test_other_networks_are_named(tmp_path, kind, at):
    path = publish(tmp_path / "x.pt", learned(NETWORK), change=renamed(kind, at))
    assert f".{kind}, which is not built here" in one_line(path)


def test_what_would_compute_something_else_is_named(tmp_path):
    def activation(network):
        network.model[0].act = nn.LeakyReLU(0.1)

    def statistics(network):
        network.model[0].bn.eps = 1e-5

    assert "LeakyReLU" in one_line(publish(tmp_path / "x.pt", learned(NETWORK), change=activation))
    assert "eps 1e-05" in one_line(publish(tmp_path / "x.pt", learned(NETWORK), change=statistics))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ({**NETWORK, "activation": "nn.ReLU()"}, "activation"),
        ({**NETWORK, "width_multiple": 0.25}, "model.0.conv.weight should have the shape [16, 3, 6, 6]"),
        ({**NETWORK, "width_multiple": 100}, "model.0.conv.weight should have"),
        ({**NETWORK, "depth_multiple": 90_000}, "10,000 blocks"),
        ({**NETWORK, "backbone": [[-1, 3, "GhostConv", [128]]]}, "GhostConv"),
        ({**NETWORK, "head": NETWORK["head"][:-1]}, "Detect"),
        ({}, "depth_multiple"),
        (None, "yaml"),
        ("yolov5n.yaml", ""),
    ],
)
def test_a_network_that_its_yaml_does_not_describe(tmp_path, yaml, said):
    def change(network):
        network.yaml = yaml

    assert said in one_line(publish(tmp_path / "x.pt", learned(NETWORK), change=change))


DAMAGE = {
    "no entry": lambda network: network.model[0].conv.__dict__["_parameters"].clear(),
    "another shape": lambda network: network.model[0].bn.register_buffer("running_mean", torch.zeros(3)),
    "a number for a tensor": lambda network: network.model[0].bn._buffers.update(running_mean=1.0),
    "a number repeated": lambda network: network.model[0].bn._buffers.update(running_mean=torch.zeros(1).expand(8)),
    "no head": lambda network: network.model.__delitem__(-1),
    "no stride": lambda network: network.__dict__.pop("stride"),
    "no layers": lambda network: network._modules.clear(),
    "more entries": lambda network: network.model[0].register_buffer("more", torch.zeros(1)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_networks(tmp_path, kind):
    one_line(publish(tmp_path / "x.pt", learned(NETWORK), change=DAMAGE[kind]))


@pytest.mark.parametrize(
    "content", [{"model": None, "ema": None}, {"model": nn.Linear(1, 1)}, {"weights": 1}, [nn.Linear(1, 1)]]
)
def test_other_modules(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    one_line(tmp_path / "x.pt")


# ---- our own files --------------------------------------------------------------------------------------------------


def test_our_own_weights_are_those_of_their_network(trained, tmp_path):
    for name in ("best.pt", "last.pt"):
        checkpoint = load_weights(trained / "weights" / name)
        assert checkpoint["names"] == NAMES
    sound = load_checkpoint(trained / "weights/best.pt")
    for change, said in (
        ({"ema": sound["ema"] | {"model.0.conv.weight": torch.zeros(1)}}, "model.0.conv.weight"),
        ({"ema": sound["ema"] | {"extra": torch.zeros(1)}}, "extra"),
        ({"network": {**sound["network"], "width_multiple": 100}}, "should have the shape"),
        ({"names": ["one"]}, "2 names"),
        ({"options": None}, "options"),
        ({"options": sound["options"] | {"imgsz": "large"}}, "imgsz"),
        ({"options": sound["options"] | {"imgsz": 10**9}}, "image size"),
        ({"network": {**sound["network"], "one\n\x1b[31mline": 1}}, "one??[31mline"),
        ({"network": {**sound["network"], "head": [["a" * 100_000]]}}, "a row is"),
    ):
        save_checkpoint(tmp_path / "x.pt", sound | change)
        assert said in one_line(tmp_path / "x.pt")
    torch.save(sound | {"epoch": Path("a")}, tmp_path / "x.pt")
    assert "pathlib" in one_line(tmp_path / "x.pt")


def test_one_tensor_for_many_entries_is_more_than_the_file(tmp_path):
    """Built in full it might be more than the memory."""
    network = {**NETWORK, "backbone": [*NETWORK["backbone"], *[[-1, 1, "Conv", [2048, 3]]] * 9]}
    network["head"] = [[-1, 1, "Conv", [64, 1]], [[3, -1], 1, "Detect", ["nc", "anchors"]]]
    state = learned(network).state_dict()
    first: dict[tuple, torch.Tensor] = {}
    shared = {name: first.setdefault(tuple(tensor.shape), tensor) for name, tensor in state.items()}
    content = {"ema": shared, "network": network, "names": NAMES, "options": OPTIONS, "hyp": {}}
    save_checkpoint(tmp_path / "x.pt", content)
    assert "more than the file" in one_line(tmp_path / "x.pt")


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(trained, tmp_path) -> Path:
    """The weights of the trained run as a published file."""
    model = averaged_model(load_weights(trained / "weights/best.pt"))
    return publish(tmp_path / "theirs.pt", model, names=dict(enumerate(NAMES)), more={"opt": {"imgsz": 64}})


def test_val_scores_them_as_it_scores_ours(theirs, trained, tiny, cli):
    flags = ["--data", str(tiny.data), "--device", "cpu", "--workers", "0", "--noplots", "--imgsz", "64"]
    for weights, name in ((theirs, "theirs"), (trained / "weights/best.pt", "ours")):
        assert cli(val, "--weights", str(weights), "--name", name, *flags)[0] == 0
    one, two = (json.loads(Path("runs/val", name, "metrics.json").read_text()) for name in ("theirs", "ours"))
    assert two.pop("epoch") == 60  # as the losses, whose gains are those of a run, it is not known of the file
    assert one | {"losses": {}} == two | {"losses": {}}
    assert one["mAP_0.5"] > 0.5


def test_val_asks_for_the_data_set_that_they_do_not_name(theirs, cli):
    code, _, problems = cli(val, "--weights", str(theirs), "--device", "cpu")
    assert (code, problems.count("\n")) == (2, 1)
    assert "--data" in problems


def test_detect_and_load_find_what_ours_finds(theirs, trained, tiny, cli):
    image = str(tiny.image("val", 0))
    found = [
        yolo.load(weights, device="cpu").detect(image, confidence=0.005)[0]
        for weights in (theirs, trained / "weights/best.pt")
    ]
    assert len(found[0].scores) and torch.equal(found[0].boxes, found[1].boxes)
    code, said, _ = cli(detect, "--weights", str(theirs), "--source", image, "--device", "cpu", "--conf-thres", "0.005")
    assert code == 0 and "blue" in said


def test_train_starts_from_them(theirs, tiny, cli):
    code, said, _ = cli(train, *tiny.flags("--weights", str(theirs), cfg=None))
    assert code == 0
    (line,) = [line for line in said.splitlines() if line.startswith("Weights:")]
    entries = len(load_weights(theirs)["ema"]) - 1
    assert line == f"Weights: {entries} of {entries} entries of {theirs} fit this network"


def test_they_are_no_run_to_resume(theirs, cli):
    code, _, problems = cli(train, "--resume", str(theirs))
    assert (code, problems.count("\n")) == (2, 1)
    assert f"start anew with --weights {theirs}" in problems
