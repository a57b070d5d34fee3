"""The program of docs/two_devices.md: a split network computes what a whole one does, and ranks train as one process.

The surprise: this file is also what the launcher starts, with a folder as its argument, and then it is a rank.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.yolo import DetectionModel, count_parameters, read_network
from utils.data.images import BaseImages
from utils.data.loader import TrainBatches
from utils.data.scan import open_dataset, scan_dataset
from utils.hyp import Hyperparameters
from utils.loss import LossGains, detection_losses
from utils.structures import Batch
from utils.train.optim import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "two_devices.md").read_text(encoding="utf-8")
RANKS, BATCH_SIZE, EPOCHS = 2, 3, 2  # of a run on the 8 images of `tiny`: parts are uneven


def program(folder: Path, **in_place: str) -> ModuleType:
    """The page's program as a module, with what stands in place of some of its text."""
    [source] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for old, new in in_place.items():
        assert source.count(old) >= 1, old
        source = source.replace(old, new)
    path = folder / "two_devices.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("two_devices", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> ModuleType:
    return program(tmp_path_factory.mktemp("page"))


# ---- split as whole --------------------------------------------------------------------------------------------------


def test_a_split_network_computes_what_the_whole_does(page):
    """Outputs, gradients and running statistics, to the last bit, from weights that either can load."""
    whole, split = (DetectionModel(read_network("yolov5n.yaml")) for _ in range(2))
    page.split(split, ("cpu", "cpu")).load_state_dict(whole.to(memory_format=torch.channels_last).state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for model in (whole, split):
        sum(level.square().mean() for level in model(images)).backward()
    for one, other in zip(whole.parameters(), split.parameters()):
        assert torch.equal(one.grad, other.grad) and one.grad.any()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, split.state_dict()[name]), name


@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov5n6.yaml"])
def test_each_map_that_the_head_reads_crosses_once(page, cfg):
    """The backbone computes on the CPU and the head on torch's meta device, which refuses maps of any other."""
    network = read_network(cfg)
    model = page.split(DetectionModel(network), ("cpu", "meta"))
    assert [device_of(row) for row in parts(model, network)] == ["cpu", "meta"]
    images = torch.zeros(2, 3, 64, 64)
    with Crossings() as crossings:
        predictions = model(images)
    assert sorted(crossings.shapes) == sorted(maps_read(network, images))
    assert {level.device.type for level in predictions} == {"meta"}
    batch = batch_of_one_box().to(torch.device("meta"))
    losses = detection_losses(predictions, batch, model.head, LossGains.for_head(Hyperparameters(), model.head, 64))
    assert losses.total.device.type == "meta"
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # gradients go the same way back
        losses.total.backward()


class Crossings(TorchDispatchMode):
    """Takes down the shapes of all that is copied to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


def parts(model: DetectionModel, network: dict) -> tuple[nn.ModuleList, nn.ModuleList]:
    border = len(network["backbone"])
    return model.model[:border], model.model[border:]


def device_of(module: nn.Module) -> str:
    [device] = {tensor.device.type for tensor in module.state_dict().values()}
    return device


def maps_read(network: dict, images: Tensor) -> list[tuple[int, ...]]:
    """The shapes of the backbone's maps that rows of the head read, each once."""
    border = len(network["backbone"])
    read = {border - 1}
    for source, *_ in network["head"]:
        read |= {one for one in (source if isinstance(source, list) else [source]) if 0 <= one < border}
    with images.device:
        whole, shapes = DetectionModel(network), []
    for index in read:
        whole.model[index].register_forward_hook(lambda row, _, maps: shapes.append(tuple(maps.shape)))
    whole(images)
    return shapes


def batch_of_one_box() -> Batch:
    return Batch(
        images=torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        boxes=torch.tensor([[10.0, 10.0, 40.0, 50.0]]),
        classes=torch.tensor([1]),
        image_of=torch.tensor([1]),
        indices=torch.arange(2),
    )


# ---- two ranks as one ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, draw_tiny) -> SimpleNamespace:
    """What ranks started as the page says make of the tiny network: states by rank, with `still` or `active` norms."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = draw_tiny(folder / "set")
    [command] = re.findall(r"^python (-m torch\.distributed\.run .*) two_devices\.py$", PAGE, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = subprocess.Popen(
        [sys.executable, *command.split(), __file__, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        shown, errors = started.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        started.terminate()  # the launcher ends its ranks
        raise
    assert started.returncode == 0, errors
    states = {
        kind: [torch.load(folder / f"{kind}{rank}.pt", weights_only=True) for rank in range(RANKS)]
        for kind in ("still", "active")
    }
    return SimpleNamespace(tiny=tiny, shown=shown, **states)


def test_all_ranks_end_with_the_same_weights(trained):
    for first, second in (trained.still, trained.active):
        for name in dict(DetectionModel(read_network(str(trained.tiny.cfg))).named_parameters()):
            assert torch.equal(first[name], second[name]), name
    assert re.findall(r"epoch (\d): loss \d\.\d{3}", trained.shown) == ["1", "2"] * 2  # of one rank


def test_ranks_train_as_one_process_does(trained):
    """One whole network on whole batches, its batch norms left alone as they were in the ranks."""
    tiny = trained.tiny
    store = scan_dataset(open_dataset(str(tiny.data), note=print), ["train"]).stores["train"]
    images, hyp = BaseImages(store=store, imgsz=64), Hyperparameters()
    batches = TrainBatches(store=store, images=images, imgsz=64, batch_size=BATCH_SIZE, hyp=hyp, seed=0)
    model = with_fixed_norms(DetectionModel(read_network(str(tiny.cfg)), num_classes=2))
    optimizer = make_optimizer(model, hyp, weight_decay=hyp.weight_decay)
    gains = LossGains.for_head(hyp, model.head, 64)
    for epoch in range(EPOCHS):
        order = batches.order(epoch)
        for index in range(batches.per_epoch):
            batch = batches.batch_of(batches.lot(epoch, index, order))
            detection_losses(model(batch.images.float() / 255), batch, model.head, gains).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
    start = DetectionModel(read_network(str(tiny.cfg))).state_dict()
    for name, value in model.named_parameters():
        moved, apart = (value - start[name]).norm(), (value - trained.still[0][name]).norm()
        assert apart <= 1e-3 * moved and moved, name


def with_fixed_norms(model: DetectionModel) -> DetectionModel:
    """Its batch norms in eval mode, by the statistics of noise, so that gradients neither vanish nor explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    for norm in norms:
        norm.eval()
    return model


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_pages_figures_of_yolov5x6():
    network, image = read_network("yolov5x6.yaml"), torch.zeros(1, 3, 1280, 1280, device="meta")
    with torch.device("meta"):
        model = DetectionModel(network)
    backbone, head = kept_for_backward(model, image, border=len(network["backbone"]))
    for figure in ("keeps 5.4 GB", "about 70% of what the backward", "57 MB per image", "take 2.3 GB"):
        assert figure in PAGE
    assert (backbone + head) / 1e9 == pytest.approx(5.4, abs=0.05)
    assert backbone / (backbone + head) == pytest.approx(0.7, abs=0.01)
    assert 4 * sum(map(math.prod, maps_read(network, image))) / 1e6 == pytest.approx(57, abs=0.5)
    assert 4 * 4 * count_parameters(model) / 1e9 == pytest.approx(2.3, abs=0.05)  # four of the weights' size


def kept_for_backward(model: DetectionModel, images: Tensor, *, border: int) -> list[int]:
    """Bytes that the backbone, rows before the border, and the head keep, weights left out."""
    weights = {storage(parameter) for parameter in model.parameters()}
    kept: list[dict[int, Tensor]] = [{}, {}]  # tensors live on in it, or a storage's number would be another's
    part = kept[0]

    def enter(index: int) -> None:
        nonlocal part
        part = kept[index >= border]

    def keep(tensor: Tensor) -> Tensor:
        if storage(tensor) not in weights | kept[0].keys():
            part[storage(tensor)] = tensor
        return tensor

    for index, row in enumerate(model.model):
        row.register_forward_pre_hook(lambda row, maps, index=index: enter(index))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return [sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) for tensors in kept]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- what a rank does ------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """The page's main on the tiny data set, its training done twice: with batch norms that stay fixed, and as it is."""
    rank = os.environ["RANK"]
    (folder / rank).mkdir()
    toy = {"data/shapes.yaml": f"{folder}/set/data.yaml", "yolov5n.yaml": f"{folder}/set/cfg.yaml"}
    toy |= {"imgsz=160": "imgsz=64", "batch_size=16": f"batch_size={BATCH_SIZE}", "epochs=6": f"epochs={EPOCHS}"}
    two_devices = program(folder / rank, **toy)
    train = two_devices.train

    def twice(model: DetectionModel, *arguments, **options) -> None:
        still = with_fixed_norms(copy.deepcopy(model))
        for kind, trained in (("still", still), ("active", model)):
            train(trained, *arguments, **options)
            torch.save(trained.state_dict(), folder / f"{kind}{rank}.pt")

    two_devices.train = twice
    two_devices.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
