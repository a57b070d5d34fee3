import copy
import shutil
import stat

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import norm_silu as library
from models.layers import Conv
from models.yolo import DetectionModel, fused, read_network
from utils import native
from utils.structures import UserError

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler, which --compile needs on the CPU"
)

SHAPES = [(2, 8, 5, 7), (1, 3, 1, 7), (3, 17, 16, 16), (1, 32, 33, 31), (2, 1, 4, 4), (5, 16, 1, 1)]


def maps_of(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Maps whose channels have means far from 0."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(shape, generator=generator) * 2 + 10 * torch.randn(shape[1], generator=generator)[:, None, None]
    return maps.to(dtype).to(memory_format=torch.channels_last)


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-2, 2, channels))
    return norm


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "exact", "rounded"), [(torch.float32, 2e-6, 2e-5), (torch.bfloat16, 2e-6, 1e-2)])
def test_equals_torch_in_double_precision(shape, dtype, exact, rounded):
    """`exact` is asked of what stays in float32 in any case: running statistics."""
    maps = maps_of(shape, dtype).requires_grad_()
    upstream = maps_of(shape, dtype, seed=1) / 10
    norm = norm_of(shape[1])
    wide = copy.deepcopy(norm).double()
    wide_maps = maps.detach().double().requires_grad_()

    out, wide_out = library.norm_silu(norm, maps), F.silu(wide(wide_maps))
    out.backward(upstream)
    wide_out.backward(upstream.double())

    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert relative(norm.running_mean, wide.running_mean) < exact
    assert relative(norm.running_var, wide.running_var) < exact
    assert norm.num_batches_tracked == 1
    assert relative(out, wide_out) < rounded
    assert relative(maps.grad, wide_maps.grad) < rounded
    assert relative(norm.weight.grad, wide.weight.grad) < rounded
    assert relative(norm.bias.grad, wide.bias.grad) < rounded


def test_an_outlier_in_the_corner_costs_no_precision():
    """As zero padding may make one."""
    maps = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[0, :, 0, 0] = 1000.0
    maps = maps.to(memory_format=torch.channels_last).requires_grad_()
    norm, wide_maps = norm_of(4), maps.detach().double().requires_grad_()
    wide = copy.deepcopy(norm).double()
    out, wide_out = library.norm_silu(norm, maps), F.silu(wide(wide_maps))
    out.sum().backward()
    wide_out.sum().backward()
    torch.testing.assert_close(out.double(), wide_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.grad.double(), wide_maps.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (3, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_may_lie_in_any_order(size, layout):
    """Where a side is 1, one tensor counts as lying in both orders."""
    maps = maps_of((4, 16, *size), torch.float32).requires_grad_()
    upstream = torch.randn(4, 16, *size, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=layout)
    assert upstream.is_contiguous(memory_format=layout)
    wide = norm_of(16).double()
    wide_maps = maps.detach().double().requires_grad_()
    library.norm_silu(norm_of(16), maps).backward(upstream)
    F.silu(wide(wide_maps)).backward(upstream.double())
    torch.testing.assert_close(maps.grad.double(), wide_maps.grad, rtol=1e-4, atol=1e-5)


def test_large_and_small_inputs_of_silu_keep_their_limits():
    norm = nn.BatchNorm2d(1)
    maps = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).view(1, 1, 1, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        norm.weight.fill_(500.0)
        torch.testing.assert_close(
            library.norm_silu(norm, maps), F.silu(copy.deepcopy(norm)(maps)), rtol=1e-5, atol=1e-4
        )


def test_what_is_no_number_stays_none():
    maps = maps_of((1, 4, 3, 3), torch.float32)
    maps[0, 2, 1, 1] = float("nan")
    out = library.norm_silu(norm_of(4), maps)
    assert out[:, 2].isnan().all() and not out[:, [0, 1, 3]].isnan().any()


def test_gradient_of_a_part_of_concatenated_maps():
    """It arrives as a slice of wider rows."""
    maps, beside = maps_of((2, 8, 5, 6), torch.float32).requires_grad_(), maps_of((2, 4, 5, 6), torch.float32)
    weights = maps_of((2, 12, 5, 6), torch.float32, seed=2)

    def gradient(normalise) -> torch.Tensor:
        joined = torch.cat([beside, normalise(norm_of(8), maps)], 1)
        return torch.autograd.grad((joined * weights).sum(), maps)[0]

    expected = gradient(lambda norm, x: F.silu(norm(x)))
    torch.testing.assert_close(gradient(library.norm_silu), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bytes(dtype):
    maps, upstream = maps_of((3, 24, 40, 40), dtype), maps_of((3, 24, 40, 40), dtype, seed=1)

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        norm, leaf = norm_of(24), maps.clone().requires_grad_()
        library.norm_silu(norm, leaf).backward(upstream)
        return [leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(one, two) for one, two in zip(results(1), results(3)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("norm", "maps"),
    [
        (norm_of(4).eval(), maps_of((1, 4, 3, 3), torch.float32)),
        (nn.Identity(), maps_of((1, 4, 3, 3), torch.float32)),
        (norm_of(4), torch.randn(2, 4, 3, 3)),  # not channels-last
        (norm_of(4).double(), maps_of((1, 4, 3, 3), torch.float64)),
        (nn.BatchNorm2d(4, affine=False), maps_of((1, 4, 3, 3), torch.float32)),
        (nn.BatchNorm2d(4, track_running_stats=False), maps_of((1, 4, 3, 3), torch.float32)),
    ],
)
def test_where_it_does_not_fit_torch_computes(norm, maps):
    assert torch.equal(library.norm_silu(copy.deepcopy(norm), maps), F.silu(norm(maps)))


def test_a_network_learns_as_it_does_without():
    network = {**read_network("yolov5n.yaml"), "nc": 2}
    plain = DetectionModel(network).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    library.accelerate(fast)
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def gradients(model: DetectionModel) -> dict[str, torch.Tensor]:
        sum(level.square().mean() for level in model(images)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(plain)
    for name, got in gradients(fast).items():
        assert (got - expected[name]).norm() < 1e-3 * expected[name].norm(), name
    for name, got in fast.state_dict().items():
        torch.testing.assert_close(got, plain.state_dict()[name], msg=name)
    same = fused(fast)(images)  # a copy for inference leaves training's operation behind
    for got, want in zip(same, fused(plain)(images)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_loading_the_library_leaves_torchs_arithmetic_alone():
    """Compiled with -ffast-math it would round the smallest numbers to 0, in the whole process."""
    library.accelerate(Conv(3, 8))
    assert (torch.tensor([1e-40]) * 0.5).item() > 0


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "cache")
    library._library.cache_clear()
    yield tmp_path / "cache"
    library._library.cache_clear()


def test_the_library_is_compiled_once(fresh_cache, monkeypatch):
    library.accelerate(Conv(3, 8))
    (made,) = fresh_cache.iterdir()
    library._library.cache_clear()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("compiled again"))
    library.accelerate(Conv(3, 8))
    assert [made] == list(fresh_cache.iterdir())


def test_without_a_compiler_it_says_so(fresh_cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"^--compile: there is no C\+\+ compiler .*; leave it out$"):
        library.accelerate(Conv(3, 8))


def test_a_library_that_cannot_be_loaded_is_named(fresh_cache, monkeypatch):
    """As from a cache folder on a disk that holds no programs."""
    monkeypatch.setattr(native, "_build", lambda command, path: (path.parent.mkdir(), path.write_text("no program")))
    with pytest.raises(UserError, match=r"^--compile: cannot load .*norm_silu-\w+\.so: .*; leave it out$"):
        library.accelerate(Conv(3, 8))


def test_a_compiler_that_fails_is_named_and_leaves_nothing(fresh_cache, monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'norm_silu.cpp:1: error: no OpenMP here' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(shutil, "which", lambda _: str(broken))
    with pytest.raises(
        UserError, match=r"^--compile: .*g\+\+ cannot compile norm_silu.cpp: .*no OpenMP here; leave it out$"
    ):
        library.accelerate(Conv(3, 8))
    assert list(fresh_cache.iterdir()) == []
