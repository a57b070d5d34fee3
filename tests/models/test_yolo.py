import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.yolo import (
    NETWORK_FOLDER,
    DetectionModel,
    count_layers,
    count_parameters,
    decode,
    entry_shapes,
    fused,
    gflops,
    main,
    read_network,
)
from tests.published import V5
from utils.structures import HeadSpec, UserError

ROOT = Path(__file__).parents[2]

PUBLISHED = {  # SPEC 4: parameters with 80 classes, GFLOPs at 640, state-dict entries
    "n": (1_872_157, 4.47, 349),
    "s": (7_235_389, 16.43, 349),
    "m": (21_190_557, 48.87, 481),
    "l": (46_563_709, 108.99, 613),
    "x": (86_749_405, 205.45, 745),
    "n6": (3_246_940, 4.56, 459),
    "s6": (12_626_620, 16.80, 459),
    "m6": (35_731_932, 49.91, 627),
    "l6": (76_770_172, 111.24, 795),
    "x6": (140_794_780, 209.57, 963),
}

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

TINY = {  # a network with two levels that builds and runs in milliseconds
    "nc": 3,
    "depth_multiple": 0.5,
    "width_multiple": 0.5,
    "anchors": [[6, 8, 12, 10], [30, 22, 25, 40]],
    "backbone": [
        [-1, 1, "Conv", [16, 6, 2, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 4, "C3", [32]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 1, "C3", [32, False]],
        [[7, 4], 1, "Detect", ["nc", "anchors"]],
    ],
}


@pytest.fixture
def tiny() -> DetectionModel:
    return DetectionModel(TINY)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def on_meta(network: dict, **options) -> DetectionModel:
    with torch.device("meta"):
        return DetectionModel(network, **options)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    parameters, operations, entries = PUBLISHED[size]
    network = read_network(f"yolov5{size}.yaml")
    model = on_meta(network)
    assert count_parameters(model) == parameters
    assert len(model.state_dict()) == entries
    assert gflops(model) == pytest.approx(operations, abs=0.011)
    assert model.head.strides == ((8, 16, 32, 64) if "6" in size else (8, 16, 32))


@pytest.mark.parametrize("size", PUBLISHED)
def test_each_yaml_opens_with_its_command_and_result(size, capsys):
    name = f"yolov5{size}.yaml"
    main(["--cfg", name])
    command, result = (NETWORK_FOLDER / name).read_text().splitlines()[:2]
    assert command == f"# python -m models.yolo --cfg {name}"
    assert result == f"# {capsys.readouterr().out.strip()}"


@pytest.mark.parametrize(("size", "imgsz"), [("n", 640), ("n6", 320)])
def test_gflops_agree_with_torch_that_counts_a_forward_pass(size, imgsz):
    model = on_meta(read_network(f"yolov5{size}.yaml")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, imgsz, imgsz, device="meta"))
    assert gflops(model, imgsz) == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-12)


def test_gflops_of_a_network_are_those_of_its_model(tiny):
    assert gflops(TINY) == gflops(tiny) == gflops(fused(tiny))


def test_layers_are_the_modules_without_children(tiny):
    by_type = [module for module in tiny.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.SiLU))]
    assert count_layers(tiny) == len(by_type) + 3  # a pool, an enlargement, a concatenation


def test_state_dict_names_are_the_published_ones():
    names = list(on_meta(read_network("yolov5n.yaml")).state_dict())
    conv = ["conv.weight", *(f"bn.{name}" for name in ("weight", "bias", *STATISTICS))]
    blocks = {
        0: conv,
        4: [
            f"{part}.{name}"
            for part in ("cv1", "cv2", "cv3", "m.0.cv1", "m.0.cv2", "m.1.cv1", "m.1.cv2")
            for name in conv
        ],
        9: [f"{part}.{name}" for part in ("cv1", "cv2") for name in conv],
        24: ["anchors", *(f"m.{level}.{name}" for level in range(3) for name in ("weight", "bias"))],
    }
    for index, expected in blocks.items():
        prefix = f"model.{index}."
        assert [name.removeprefix(prefix) for name in names if name.startswith(prefix)] == expected
    assert all(name.startswith("model.") for name in names)


def test_forward_is_the_rows_one_by_one(tiny):
    tiny.eval()
    images = noise(2, 3, 64, 32)
    layers, outputs = tiny.model, [images]
    for layer in layers[:6]:
        outputs.append(layer(outputs[-1]))
    joined = torch.cat([outputs[6], outputs[3]], 1)
    expected = layers[8](layers[7](joined), outputs[5])
    raw = tiny(images)
    assert [tuple(level.shape) for level in raw] == [(2, 2, 16, 8, 8), (2, 2, 8, 4, 8)]
    for level, wanted in zip(raw, expected):
        assert torch.equal(level, wanted)


def test_logits_are_views_of_the_last_convolution(tiny):
    for level, conv in zip(tiny(noise(1, 3, 32, 32)), tiny.model[-1].m):
        assert level.permute(0, 1, 4, 2, 3).is_contiguous()
        assert level.untyped_storage().nbytes() == level.numel() * level.element_size()
        assert conv.out_channels == level.shape[1] * level.shape[4]


def test_one_bias_moves_one_output():
    model = DetectionModel(TINY).eval()
    images = noise(1, 3, 32, 32)
    for level, anchor, k in [(0, 0, 0), (0, 1, 4), (1, 0, 7), (1, 1, 2)]:
        before = model(images)
        with torch.no_grad():
            model.model[-1].m[level].bias[anchor * 8 + k] += 1
        moved = [(after - old) for after, old in zip(model(images), before)]
        expected = [torch.zeros_like(old) for old in before]
        expected[level][:, anchor, :, :, k] = 1
        for difference, wanted in zip(moved, expected):
            torch.testing.assert_close(difference, wanted, atol=1e-5, rtol=0)


def test_biases_start_from_rare_objects(tiny):
    for conv, stride in zip(tiny.model[-1].m, (4, 8)):
        bias = conv.bias.detach().view(2, 8)
        assert torch.all(bias[:, 4] == torch.tensor(math.log(8 / (640 / stride) ** 2)))
        assert torch.all(bias[:, 5:] == torch.tensor(math.log(0.6 / (3 - 0.99999))))


def slow_decode(raw: list[Tensor], head: HeadSpec) -> list[list[list[float]]]:
    """SPEC 4, one cell at a time in Python floats."""

    def s(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    images = []
    for b in range(len(raw[0])):
        rows = []
        for level, stride, anchors in zip(raw, head.strides, head.anchors.tolist()):
            _, A, h, w, _ = level.shape
            for a, y, x in ((a, y, x) for a in range(A) for y in range(h) for x in range(w)):
                tx, ty, tw, th, *others = level[b, a, y, x].tolist()
                cx, cy = (2 * s(tx) - 0.5 + x) * stride, (2 * s(ty) - 0.5 + y) * stride
                width, height = (2 * s(tw)) ** 2 * anchors[a][0], (2 * s(th)) ** 2 * anchors[a][1]
                corners = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
                rows.append(corners + [s(logit) for logit in others])
        images.append(rows)
    return images


@settings(max_examples=15, deadline=None)
@given(
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    classes=st.integers(1, 3),
    num_anchors=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_decode_cell_by_cell(h, w, classes, num_anchors, seed):
    generator = torch.Generator().manual_seed(seed)
    anchors = 10 + 90 * torch.rand(2, num_anchors, 2, generator=generator)
    head = HeadSpec(strides=(8, 16), anchors=anchors, num_classes=classes)
    shapes = [(2, num_anchors, 2 * h, 2 * w, 5 + classes), (2, num_anchors, h, w, 5 + classes)]
    raw = [3 * torch.randn(shape, generator=generator) for shape in shapes]
    expected = torch.tensor(slow_decode(raw, head), dtype=torch.float64)
    decoded = decode(raw, head)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=1e-3)
    exact = decode([level.double() for level in raw], head)
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_computes_in_float32(tiny, dtype):
    raw = [level.detach().to(dtype) for level in tiny(noise(1, 3, 32, 32))]
    assert torch.equal(decode(raw, tiny.head), decode([level.float() for level in raw], tiny.head))


def test_fused_gives_the_same_and_leaves_the_original():
    model = DetectionModel(read_network("yolov5n.yaml"), num_classes=4)
    images = noise(2, 3, 64, 96)
    for seed in range(3):
        model(noise(2, 3, 64, 64, seed=seed))  # statistics that differ from a fresh batch norm's
    before = copy.deepcopy(model.state_dict())
    folded = fused(model)
    assert model.training
    assert not folded.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for level, expected in zip(folded(images), model.eval()(images)):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_weights_depend_on_the_seed_alone():
    torch.rand(7)
    first = DetectionModel(TINY, seed=5).state_dict()
    torch.rand(3)
    again, other = DetectionModel(TINY, seed=5).state_dict(), DetectionModel(TINY, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.0.conv.weight"], other["model.0.conv.weight"])


def test_building_leaves_the_global_random_state():
    before = torch.get_rng_state()
    DetectionModel(TINY, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_convolutions_start_as_torch_starts_them(tiny):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 8, 6, 2, 2, bias=False)
    assert torch.equal(tiny.model[0].conv.weight, first.weight)


def test_network_is_plain_and_rebuilds_the_model():
    anchors = torch.tensor([[[3.25, 5], [7, 11]], [[13, 17], [19, 23]]])
    given_network = copy.deepcopy(TINY)
    model = DetectionModel(given_network, num_classes=7, anchors=anchors)
    assert given_network == TINY
    assert model.network["nc"] == model.head.num_classes == 7
    assert model.network["anchors"] == [[3.25, 5, 7, 11], [13, 17, 19, 23]]
    file = io.BytesIO()
    torch.save({"network": model.network, "weights": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["network"] == model.network
    rebuilt = DetectionModel(saved["network"], seed=1)
    rebuilt.load_state_dict(saved["weights"])
    assert rebuilt.network == model.network
    images = noise(1, 3, 32, 32)
    for level, expected in zip(rebuilt(images), model(images)):
        assert torch.equal(level, expected)


def test_head_and_network_follow_the_anchors(tiny):
    assert tiny.head.strides == (4, 8)
    assert tiny.head.anchors.dtype == torch.float32
    assert tiny.head.anchors.tolist() == [[[6, 8], [12, 10]], [[30, 22], [25, 40]]]
    anchors = tiny.head.anchors + 0.5
    tiny.set_anchors(anchors)
    assert torch.equal(tiny.head.anchors, anchors)
    assert tiny.network["anchors"] == anchors.flatten(1).tolist()
    other = DetectionModel(TINY)
    other.load_state_dict(tiny.state_dict())
    assert other.network == tiny.network


def test_more_anchors_widen_the_head():
    anchors = torch.arange(1.0, 21).view(2, 5, 2)
    raw = DetectionModel(TINY, anchors=anchors)(noise(1, 3, 16, 16))
    assert [level.shape[1] for level in raw] == [5, 5]


def test_channels_last_gives_the_same(tiny):
    tiny.eval()
    images = noise(2, 3, 32, 32)
    expected = tiny(images)
    tiny.to(memory_format=torch.channels_last)
    for level, wanted in zip(tiny(images.to(memory_format=torch.channels_last)), expected):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-5)


def test_autocast_gives_bfloat16_logits_near_the_float32_ones(tiny):
    tiny.eval()
    images = noise(2, 3, 32, 32)
    expected = tiny(images)
    with torch.autocast("cpu", torch.bfloat16):
        raw = tiny(images)
    for level, wanted in zip(raw, expected):
        assert level.dtype == torch.bfloat16
        torch.testing.assert_close(level.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("amp", [False, True])
def test_backward_repeats_to_the_byte(memory_format, amp):
    def gradients() -> list[Tensor]:
        model = DetectionModel(TINY).to(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            raw = model(noise(4, 3, 64, 64).to(memory_format=memory_format))
        sum(level.float().square().mean() for level in raw).backward()
        return [parameter.grad for parameter in model.parameters()]

    first = gradients()
    assert all(gradient.isfinite().all() for gradient in first)
    assert all(torch.equal(one, other) for one, other in zip(first, gradients()))


def test_a_repeated_block_is_a_sequence():
    network = copy.deepcopy(TINY)
    network["backbone"][2] = [-1, 4, "Bottleneck", [64]]
    network["backbone"].insert(3, [-1, 4, "Conv", [32, 3]])
    network["head"][1][0], network["head"][3][0] = [-1, 3], [8, 5]
    model = DetectionModel(network)
    assert [block.cv1.conv.in_channels for block in model.model[2]] == [16, 32]  # 4 * depth 0.5 = 2
    assert [block.conv.in_channels for block in model.model[3]] == [32, 16]
    assert model(noise(1, 3, 16, 16))[0].shape == (1, 2, 4, 4, 8)


def without(key: str):
    return lambda network: network.pop(key)


def with_value(key: str, value: object):
    return lambda network: network.__setitem__(key, value)


def with_row(part: str, index: int, row: object):
    return lambda network: network[part].__setitem__(index, row)


BAD = {
    "no nc": (without("nc"), ["`nc` is missing"]),
    "no head": (without("head"), ["`head` is missing"]),
    "typo": (with_value("width_multipel", 1.0), ["width_multipel", "did you mean width_multiple?"]),
    "nc text": (with_value("nc", "80"), ["`nc`", "whole number", "'80'"]),
    "nc zero": (with_value("nc", 0), ["`nc`", "1 to"]),
    "nc bool": (with_value("nc", True), ["`nc`", "True"]),
    "depth nan": (with_value("depth_multiple", math.nan), ["`depth_multiple`", "nan"]),
    "width negative": (with_value("width_multiple", -0.5), ["`width_multiple`", "-0.5"]),
    "grey images": (with_value("ch", 1), ["`ch` must be 3"]),
    "anchors count": (with_value("anchors", 3), ["`anchors`", "got 3"]),
    "anchors odd": (with_value("anchors", [[1, 2, 3], [4, 5, 6]]), ["`anchors`", "pairs"]),
    "anchors uneven": (with_value("anchors", [[1, 2], [4, 5, 6, 7]]), ["`anchors`", "equally many"]),
    "anchors negative": (with_value("anchors", [[1, -2], [4, 5]]), ["`anchors`", "above 0"]),
    "anchor levels": (with_value("anchors", [[1, 2]]), ["head row of layer 8", "2 layers", "1 levels"]),
    "empty backbone": (with_value("backbone", []), ["`backbone`", "rows"]),
    "no rows": (with_value("head", {"a": 1}), ["`head`", "rows"]),
    "short row": (
        with_row("backbone", 1, [-1, 1, "Conv"]),
        ["backbone row of layer 1", "[from, number, module"],
    ),
    "row no list": (with_row("head", 0, "Conv"), ["head row of layer 5", "'Conv'"]),
    "unknown block": (with_row("backbone", 2, [-1, 4, "C33", [32]]), ["layer 2", "'C33'", "did you mean C3?"]),
    "block no name": (with_row("backbone", 2, [-1, 4, [], [32]]), ["layer 2", "unknown module []"]),
    "number zero": (with_row("backbone", 2, [-1, 0, "C3", [32]]), ["layer 2", "number", "got 0"]),
    "number text": (with_row("backbone", 2, [-1, "n", "C3", [32]]), ["layer 2", "number", "'n'"]),
    "args no list": (with_row("backbone", 2, [-1, 1, "C3", 32]), ["layer 2", "args", "32"]),
    "args empty": (with_row("backbone", 2, [-1, 1, "C3", []]), ["layer 2", "C3 takes [out_channels: int, shortcut"]),
    "args many": (with_row("backbone", 4, [-1, 1, "SPPF", [64, 5, 5]]), ["layer 4", "SPPF takes", "[64, 5, 5]"]),
    "arg type": (with_row("backbone", 2, [-1, 1, "C3", [32, "no"]]), ["layer 2", "shortcut", "true or false", "'no'"]),
    "arg bool": (with_row("backbone", 1, [-1, 1, "Conv", [32, True]]), ["layer 1", "kernel", "whole number", "True"]),
    "stride zero": (with_row("backbone", 1, [-1, 1, "Conv", [32, 3, 0]]), ["layer 1", "stride", "got 0"]),
    "cells off": (with_row("backbone", 1, [-1, 1, "Conv", [32, 2, 2]]), ["layer 1", "kernel 2", "padding 1"]),
    "even pool": (with_row("backbone", 4, [-1, 1, "SPPF", [64, 4]]), ["layer 4", "kernel 4"]),
    "repeated stride": (with_row("backbone", 1, [-1, 4, "Conv", [32, 3, 2]]), ["layer 1", "cannot be repeated"]),
    "repeated concat": (with_row("head", 1, [[-1, 2], 2, "Concat", [1]]), ["layer 6", "cannot be repeated"]),
    "from future": (with_row("head", 1, [[-1, 6], 1, "Concat", [1]]), ["layer 6", "from 6 is out of range", "0 to 5"]),
    "from before": (with_row("backbone", 1, [-2, 1, "Conv", [32, 3, 2]]), ["layer 1", "from -2 is out of range"]),
    "first from": (with_row("backbone", 0, [0, 1, "Conv", [32, 3, 2]]), ["layer 0", "-1, the image"]),
    "from text": (with_row("head", 1, [["a"], 1, "Concat", [1]]), ["layer 6", "from", "'a'"]),
    "from empty": (with_row("head", 1, [[], 1, "Concat", [1]]), ["layer 6", "from"]),
    "two inputs": (with_row("head", 2, [[-1, 2], 1, "C3", [32]]), ["layer 7", "C3 reads one layer, got 2"]),
    "concat sizes": (with_row("head", 1, [[-1, 4], 1, "Concat", [1]]), ["layer 6", "one size", "[4, 8]"]),
    "concat axis": (with_row("head", 1, [[-1, 2], 1, "Concat", [2]]), ["layer 6", "channel dimension"]),
    "upsample args": (with_row("head", 0, [-1, 1, "nn.Upsample", [2]]), ["layer 5", "[None, factor, nearest]"]),
    "upsample 3": (
        with_row("head", 0, [-1, 1, "nn.Upsample", [None, 3, "nearest"]]),
        ["layer 5", "3 times"],
    ),
    "detect args": (with_row("head", 3, [[7, 4], 1, "Detect", [80]]), ["layer 8", "[nc, anchors]"]),
    "detect order": (with_row("head", 3, [[4, 7], 1, "Detect", []]), ["layer 8", "fine to coarse", "[8, 4]"]),
    "detect early": (with_row("head", 0, [[2, 4], 1, "Detect", []]), ["layer 5", "last row"]),
    "no detect": (lambda network: network["head"].pop(), ["layer 7", "last row must be Detect"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_network_is_one_line_that_names_file_and_row(case, tmp_path):
    spoil, fragments = BAD[case]
    network = copy.deepcopy(TINY)
    spoil(network)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(network))
    with pytest.raises(UserError) as caught:
        read_network(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for fragment in ["mine.yaml", *fragments]:
        assert fragment in message
    with pytest.raises(UserError):
        DetectionModel(network)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["Conv", "nc", "None", "Detect", ""]),
    lambda children: st.lists(children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(list(TINY)), row=st.integers(0, 3), field=st.integers(-1, 3), value=PLAIN)
def test_whatever_the_yaml_holds_it_is_sound_or_a_user_error(tmp_path, part, row, field, value):
    network = copy.deepcopy(TINY)
    if part not in ("backbone", "head"):
        network[part] = value
    elif field < 0:
        network[part][row] = value
    else:
        network[part][row][field] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(network))
    try:
        read_network(str(path))
    except UserError as error:
        assert "mine.yaml" in str(error)


def test_a_path_is_read_and_a_bare_name_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_network("yolov5s.yaml")["width_multiple"] == 0.5
    Path("mine.yaml").write_text(yaml.safe_dump(TINY))
    assert read_network("mine.yaml") == read_network("./mine.yaml") == TINY
    with pytest.raises(UserError, match=r"not found: yolov5q\.yaml"):
        read_network("yolov5q.yaml")
    with pytest.raises(UserError, match="folder"):
        read_network(str(tmp_path))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "models.yolo", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command_line_prints_one_line():
    done = run("--cfg", "yolov5s.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "yolov5s.yaml: 181 layers, 7,235,389 parameters, 16.43 GFLOPs at 640\n"


@pytest.mark.parametrize("arguments", [("--cfg", "absent.yaml"), ("--cgf", "yolov5s.yaml")])
def test_command_line_answers_a_mistake_with_one_line(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert arguments[0] in done.stderr or arguments[1] in done.stderr


# ---- freezing -----------------------------------------------------------------------------------------------------


def learning(model: DetectionModel) -> list[int]:
    """The layers with parameters that ask for gradients."""
    return [index for index, layer in enumerate(model.model) if any(one.requires_grad for one in layer.parameters())]


@pytest.mark.parametrize(
    ("layers", "left"),
    [((0,), [0, 1, 2, 3, 4, 7, 8]), ((3,), [3, 4, 7, 8]), ((0, 2), [1, 3, 4, 7, 8]), ((7, 7, 1), [0, 2, 3, 4, 8])],
)
def test_one_number_freezes_the_first_layers_several_freeze_those(tiny, layers, left):
    tiny.freeze(layers)
    assert learning(tiny) == left


def test_frozen_layers_stay_as_they_are_in_training(tiny):
    tiny.freeze((3,))
    tiny.train()
    before = copy.deepcopy(tiny.state_dict())
    sum(level.square().mean() for level in tiny(torch.rand(2, 3, 32, 32))).backward()
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    changed = {name.split(".")[1] for name, value in tiny.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3", "4", "7", "8"}
    assert all(module.training for layer in tiny.model[3:] for module in layer.modules())
    assert not any(module.training for module in tiny.eval().modules())
    assert [layer.training for layer in copy.deepcopy(tiny).train().model] == [False] * 3 + [True] * 6


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((10,), "--freeze 10: this network has 9 layers, 0 to 8"),
        ((2, 9), "--freeze 2 9: there is no layer 9, this network has 9 layers, 0 to 8"),
        ((9,), "--freeze 9: nothing would be left to learn, this network has 9 layers"),
        ((0, 1, 2, 3, 4, 7, 8), "--freeze 0 1 2 3 4 7 8: nothing would be left to learn"),
    ],
)
def test_layers_that_cannot_be_frozen(tiny, layers, message):
    with pytest.raises(UserError) as error:
        tiny.freeze(layers)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("network", [TINY, V5, read_network("yolov5n6.yaml")])
def test_shapes_are_those_of_the_state_dict(network):
    state = DetectionModel(network).state_dict()
    assert entry_shapes(network) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_focus_halves_the_maps():
    assert DetectionModel(V5).head.strides == (4, 8)
    assert [level.shape[2:4] for level in DetectionModel(V5)(torch.zeros(1, 3, 64, 32))] == [(16, 8), (8, 4)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-1, 1, "SPP", [64, [5, 4]]], "SPP's kernels must be a list of odd whole numbers, got [5, 4]"),
        ([-1, 1, "SPP", [64, 5]], "SPP's kernels must be a list of odd whole numbers, got 5"),
        ([-1, 1, "SPP", [64, []]], "SPP's kernels must be a list of odd whole numbers, got []"),
        ([-1, 2, "Focus", [64, 3]], "Focus cannot be repeated"),
        ([-1, 1, "Focus", [64, 2]], "kernel 2"),
        ([-1, 90_000, "Conv", [64]], "more than 10,000 blocks"),
    ],
)
def test_rows_of_v5_and_many_blocks(row, said):
    network = {**V5, "backbone": [*V5["backbone"][:4], row, *V5["backbone"][5:]]}
    with pytest.raises(UserError) as raised:
        DetectionModel(network)
    assert said in str(raised.value)
