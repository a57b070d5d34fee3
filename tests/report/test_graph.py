import warnings

import pytest
import torch
from torch import nn

from models.norm_silu import norm_silu
from models.yolo import NETWORK_FOLDER, DetectionModel, count_parameters, read_network
from utils.report.graph import network_graph

NETWORKS = sorted(path.name for path in NETWORK_FOLDER.glob("yolov5*.yaml"))


def small(name: str) -> DetectionModel:
    """As deep as the YAML says, and as narrow as can be."""
    return DetectionModel({**read_network(name), "width_multiple": 0.02, "nc": 2})


@pytest.fixture(scope="module")
def nano() -> DetectionModel:
    return DetectionModel(read_network("yolov5n.yaml"))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_whole_and_without_a_warning(name):
    model = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nodes = network_graph(model, 1280)
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    for place, node in enumerate(nodes[1:], 1):
        assert node.inputs and {one.split(":")[0] for one in node.inputs} <= set(names[:place])
    assert sum(node.parameters for node in nodes) == count_parameters(model)
    strides = model.head.strides
    assert [nodes[names.index(one)].shapes for one in nodes[-1].inputs] == [
        ((1, 3, 1280 // stride, 1280 // stride, 7),) for stride in strides
    ]


def test_nodes_lie_in_their_modules_and_know_their_shapes(nano):
    nodes = {node.name: node for node in network_graph(nano, 640)}
    conv = nodes["2 C3/m Sequential/0 Bottleneck/cv2 Conv/conv Conv2d"]
    assert (conv.op, conv.shapes, conv.parameters) == ("Conv2d", ((1, 16, 160, 160),), 16 * 16 * 9)
    assert conv.inputs == ("2 C3/m Sequential/0 Bottleneck/cv1 Conv/act SiLU",)
    assert conv.settings.startswith("16, 16, kernel_size=(3, 3)")
    added = nodes["2 C3/m Sequential/0 Bottleneck/add"]
    assert added.inputs == ("2 C3/cv1 Conv/act SiLU", "2 C3/m Sequential/0 Bottleneck/cv2 Conv/act SiLU")
    assert nodes["12 Concat"].inputs == ("11 Upsample", "6 C3/cv3 Conv/act SiLU")
    assert [name for name in nodes if "MaxPool2d" in name] == [f"9 SPPF/m MaxPool2d{n}" for n in ("", " 2", " 3")]


def test_the_model_is_left_as_it_was(nano, random_states):
    called = []
    hook = nano.model[0].register_forward_hook(lambda *_: called.append(1))
    before = {name: (value.data_ptr(), value.clone()) for name, value in nano.state_dict().items()}
    states, modes = random_states(), [module.training for module in nano.modules()]
    network_graph(nano, 640)
    assert not called and [len(module._forward_hooks) for module in nano.modules() if module._forward_hooks] == [1]
    hook.remove()
    assert random_states() == states and [module.training for module in nano.modules()] == modes
    for name, value in nano.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])


def test_it_is_the_same_however_the_model_is_run(nano):
    plain = network_graph(nano, 640)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(small("yolov5n.yaml"))
    assert sum(node.op == "SyncBatchNorm" for node in network_graph(synchronised, 64)) == 57
    accelerated = small("yolov5n.yaml").bfloat16()
    for module in accelerated.modules():
        if "normalise" in vars(module):
            module.normalise = norm_silu
    assert sum(node.op == "silu" for node in network_graph(accelerated, 64)) == 57
    assert len(network_graph(nano.eval().to("cpu"), 640)) == len(plain)


def test_a_network_that_is_a_single_module_has_a_graph():
    first, conv, last = network_graph(nn.Conv2d(3, 4, 3), 64)
    assert (first.shapes, conv.shapes, last.inputs) == (((1, 3, 64, 64),), ((1, 4, 62, 62),), (conv.name,))
