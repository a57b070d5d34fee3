import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import C3, SPP, SPPF, Bottleneck, Concat, Conv, Detect, Focus


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.weight.data, 0.5, 2.0),
                (layer.bias.data, -1.0, 1.0),
                (layer.running_mean, -1.0, 1.0),
                (layer.running_var, 0.1, 3.0),
            ):
                tensor.uniform_(low, high, generator=generator)
    return module.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_conv(block: Conv, maps: Tensor) -> Tensor:
    """SPEC 4 in functions: convolution without bias, normalisation with eps 1e-3, x * sigmoid(x)."""
    bn = block.bn
    out = F.conv2d(maps, block.conv.weight, stride=block.conv.stride, padding=block.conv.padding)
    statistics = [value[:, None, None] for value in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
    mean, variance, weight, bias = statistics
    out = (out - mean) / (variance + 1e-3).sqrt() * weight + bias
    return out * out.sigmoid()


@pytest.mark.parametrize(("arguments", "padding"), [((1,), 0), ((3, 2), 1), ((6, 2, 2), 2), ((3, 1, 0), 0)])
def test_conv_is_its_definition(arguments, padding):
    block = randomised(Conv(3, 8, *arguments))
    maps = noise(2, 3, 16, 16)
    assert block.conv.padding == (padding, padding)
    assert block.conv.bias is None
    torch.testing.assert_close(block(maps), slow_conv(block, maps))


def test_conv_running_statistics_move_by_the_momentum():
    block = Conv(3, 8).train()
    maps = noise(4, 3, 8, 8)
    block(maps)
    mean = block.conv(maps).mean((0, 2, 3))
    torch.testing.assert_close(block.bn.running_mean, 0.03 * mean)


@settings(max_examples=20, deadline=None)
@given(
    kernel=st.sampled_from([1, 3, 6]),
    stride=st.integers(1, 2),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_folding_keeps_the_function(kernel, stride, seed, dtype):
    block = randomised(Conv(4, 8, kernel, stride), seed).to(dtype)
    maps = noise(1, 4, 12, 12, seed=seed).to(dtype)
    with torch.no_grad():
        before = block(maps)
    block.fold()
    block.fold()  # a second time changes nothing
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
    torch.testing.assert_close(block(maps), before, rtol=1e-5, atol=1e-5)


def test_folding_half_weights_is_done_in_float32():
    block = randomised(Conv(4, 8, 3)).half()
    wide = Conv(4, 8, 3).eval()
    wide.load_state_dict(block.state_dict())
    block.fold()
    wide.fold()
    assert block.conv.weight.dtype == torch.float16
    assert torch.equal(block.conv.weight, wide.conv.weight.half())
    assert torch.equal(block.conv.bias, wide.conv.bias.half())


@pytest.mark.parametrize(("channels", "shortcut", "adds"), [(8, True, True), (8, False, False), (16, True, False)])
def test_bottleneck_adds_its_input_where_it_may(channels, shortcut, adds):
    block = randomised(Bottleneck(8, channels, shortcut))
    maps = noise(1, 8, 6, 6)
    expected = slow_conv(block.cv2, slow_conv(block.cv1, maps))
    torch.testing.assert_close(block(maps), expected + maps if adds else expected)


def test_c3_is_its_definition():
    block = randomised(C3(8, 16, False, number=2))
    maps = noise(1, 8, 6, 6)
    left = slow_conv(block.cv1, maps)
    for bottleneck in block.m:
        left = slow_conv(bottleneck.cv2, slow_conv(bottleneck.cv1, left))
    merged = torch.cat([left, slow_conv(block.cv2, maps)], 1)
    torch.testing.assert_close(block(maps), slow_conv(block.cv3, merged))


def test_sppf_equals_parallel_pools():
    block = randomised(SPPF(8, 16, 5))
    maps = noise(1, 8, 20, 20)
    reduced = slow_conv(block.cv1, maps)
    pools = [F.max_pool2d(reduced, kernel, 1, kernel // 2) for kernel in (5, 9, 13)]
    torch.testing.assert_close(block(maps), slow_conv(block.cv2, torch.cat([reduced, *pools], 1)))


def test_blocks_leave_their_input_alone():
    for block in (Conv(8, 8), Bottleneck(8, 8), C3(8, 8), SPPF(8, 8), Concat()):
        maps = noise(1, 8, 6, 6)
        block.eval()(maps)
        assert torch.equal(maps, noise(1, 8, 6, 6))


ANCHORS = torch.tensor([[[10.0, 14], [20, 22]], [[40, 40], [50, 70]]])  # (L, A, 2) px


def test_detect_gives_each_channel_its_place():
    detect = Detect([4, 8], (8, 16), ANCHORS, num_classes=3)
    maps = [noise(2, 4, 6, 5), noise(2, 8, 3, 2)]
    for conv, level, logits in zip(detect.m, maps, detect(*maps)):
        B, _, h, w = level.shape
        assert logits.shape == (B, 2, h, w, 8)
        channels = conv(level)
        for a in range(2):
            for k in range(8):
                assert torch.equal(logits[:, a, :, :, k], channels[:, a * 8 + k])


def test_detect_keeps_anchors_in_units_of_the_stride():
    detect = Detect([4, 8], (8, 16), ANCHORS, num_classes=3)
    assert torch.equal(detect.state_dict()["anchors"], ANCHORS / torch.tensor([8, 16])[:, None, None])
    assert torch.equal(detect.anchors_px, ANCHORS)
    detect.set_anchors(ANCHORS * 2)
    assert torch.equal(detect.anchors_px, ANCHORS * 2)
    with pytest.raises(ValueError, match=r"\(2, 2, 2\), got \(1, 2, 2\)"):
        detect.set_anchors(ANCHORS[:1])


# ---- blocks of networks up to YOLOv5 v5 ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [[5, 9, 13], [3], [3, 5, 7]])
def test_spp_pools_side_by_side(kernels):
    block, maps = randomised(SPP(8, 12, kernels)), noise(2, 8, 9, 11)
    inner = block.cv1(maps)
    pooled = [F.max_pool2d(inner, kernel, 1, kernel // 2) for kernel in kernels]
    torch.testing.assert_close(block(maps), block.cv2(torch.cat([inner, *pooled], 1)))
    assert {name.split(".")[0] for name in block.state_dict()} == {"cv1", "cv2"}


def test_spp_of_5_9_13_is_sppf_of_5():
    one, two = randomised(SPP(8, 12, [5, 9, 13])), SPPF(8, 12, 5).eval()
    two.load_state_dict(one.state_dict())
    maps = noise(2, 8, 20, 17)
    torch.testing.assert_close(one(maps), two(maps))


def test_focus_takes_the_four_phases_of_pixels_in_their_order():
    block, maps = randomised(Focus(3, 8, 3)), noise(2, 3, 8, 6)
    phases = torch.zeros(2, 12, 4, 3)
    for number, (y, x) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        for row in range(4):
            for column in range(3):
                phases[:, 3 * number : 3 * number + 3, row, column] = maps[:, :, 2 * row + y, 2 * column + x]
    torch.testing.assert_close(block(maps), block.conv(phases))
    assert {name.split(".")[0] for name in block.state_dict()} == {"conv"}
