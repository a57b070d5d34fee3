"""The building blocks of the networks; a network YAML names them by their key in BLOCKS, at the end of this file.

The surprise: a block's signature is its YAML syntax. `in_channels`, and `number` where a block has one, come from the
network; the other arguments are the row's, checked against the annotations here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, SiLU. `padding` None is kernel // 2."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, padding: int | None = None
    ):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()  # in place, autograd would copy its input first
        self.normalise: Callable[[nn.Module, Tensor], Tensor] | None = None  # for bn and act: norm_silu.py

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.conv(maps)
        return self.normalise(self.bn, maps) if self.normalise else self.act(self.bn(maps))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the batch norm's running statistics into the convolution, in float32 or wider. For inference only."""
        if isinstance(self.bn, nn.Identity):
            return
        conv, bn = self.conv, self.bn
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        scale = bn.weight.to(wide) / (bn.running_var.to(wide) + bn.eps).sqrt()  # (out,)
        bias = bn.bias.to(wide) - bn.running_mean.to(wide) * scale
        weight = conv.weight.to(wide) * scale[:, None, None, None]
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        self.bn, self.normalise = nn.Identity(), None
        self.act = nn.SiLU(inplace=True)  # a fifth of a network's time on the CPU is saved with memory that is at hand


class Bottleneck(nn.Module):
    """1x1, then 3x3 at full width; plus the input where `shortcut` and the widths allow."""

    def __init__(self, in_channels: int, out_channels: int, shortcut: bool = True):
        super().__init__()
        self.cv1 = Conv(in_channels, out_channels)
        self.cv2 = Conv(out_channels, out_channels, 3)
        self.adds = shortcut and in_channels == out_channels

    def forward(self, maps: Tensor) -> Tensor:
        out = self.cv2(self.cv1(maps))
        return maps + out if self.adds else out


class C3(nn.Module):
    """Two 1x1 branches at half width, `number` bottlenecks on the first, merged by a third 1x1.

    A cross-stage partial block: Wang et al., "CSPNet", CVPR Workshops 2020.
    """

    def __init__(self, in_channels: int, out_channels: int, shortcut: bool = True, *, number: int = 1):
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(in_channels, hidden)
        self.cv3 = Conv(2 * hidden, out_channels)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut) for _ in range(number)))

    def forward(self, maps: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(maps)), self.cv2(maps)), 1))


class SPPF(nn.Module):
    """Three max pools in a row, equal to parallel ones of 1, 2 and 3 times the reach: He et al., "SPP", ECCV 2014.

    Half the input's channels enter the pools; a 1x1 merges what went in with the three that come out.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 5):
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(4 * hidden, out_channels)
        self.m = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.cv1(maps)
        once = self.m(maps)
        twice = self.m(once)
        return self.cv2(torch.cat((maps, once, twice, self.m(twice)), 1))


class SPP(nn.Module):
    """Max pools side by side, `kernels` of them, where SPPF has three in a row: He et al., "SPP", ECCV 2014.

    Of networks up to YOLOv5 v5; with kernels 5, 9 and 13 it computes what SPPF with kernel 5 does.
    """

    def __init__(self, in_channels: int, out_channels: int, kernels: list[int]):
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv((1 + len(kernels)) * hidden, out_channels)
        self.m = nn.ModuleList(nn.MaxPool2d(kernel, stride=1, padding=kernel // 2) for kernel in kernels)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.cv1(maps)
        return self.cv2(torch.cat((maps, *(pool(maps) for pool in self.m)), 1))


class Focus(nn.Module):
    """Each 2 x 2 pixels into one of four times the channels, then a convolution. Of networks up to YOLOv5 v5.

    The channels of a pixel's four phases (y, x) come in the order (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1):
        super().__init__()
        self.conv = Conv(4 * in_channels, out_channels, kernel)

    def forward(self, maps: Tensor) -> Tensor:
        phases = maps.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H / 2, 2, W / 2, 2)
        return self.conv(phases.permute(0, 5, 3, 1, 2, 4).flatten(1, 3))


class Concat(nn.Module):
    """Several maps of one size side by side in the channel dimension."""

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, 1)


class Detect(nn.Module):
    """The head: a 1x1 convolution per level, whose output channel a * (5 + C) + k is logit k of anchor a.

    The buffer `anchors` (L, A, 2) is in units of the level's stride, as published checkpoints carry it.
    """

    def __init__(self, in_channels: list[int], strides: tuple[int, ...], anchors_px: Tensor, num_classes: int):
        super().__init__()
        self.strides = strides
        self.num_classes = num_classes
        self.register_buffer("anchors", torch.empty_like(anchors_px))
        self.set_anchors(anchors_px)
        num_anchors = anchors_px.shape[1]
        self.m = nn.ModuleList(nn.Conv2d(channels, num_anchors * (5 + num_classes), 1) for channels in in_channels)
        self._start_biases()

    def forward(self, *maps: Tensor) -> list[Tensor]:
        """L maps (B, channels, h, w) -> L views (B, A, h, w, 5 + C) of the convolutions' outputs."""
        num_anchors = self.anchors.shape[1]
        return [
            conv(level).unflatten(1, (num_anchors, 5 + self.num_classes)).permute(0, 1, 3, 4, 2)
            for conv, level in zip(self.m, maps)
        ]

    @property
    def anchors_px(self) -> Tensor:
        """(L, A, 2) f32 px of the network input."""
        return self.anchors.float() * self._strides_of_levels()

    @torch.no_grad()
    def set_anchors(self, anchors_px: Tensor) -> None:
        """Replace the anchors by (L, A, 2) others, levels in the order of the strides."""
        if anchors_px.shape != self.anchors.shape:
            raise ValueError(f"anchors must have shape {tuple(self.anchors.shape)}, got {tuple(anchors_px.shape)}")
        self.anchors.copy_(anchors_px.to(self.anchors.device) / self._strides_of_levels())

    def _strides_of_levels(self) -> Tensor:
        return torch.tensor(self.strides, device=self.anchors.device)[:, None, None]  # (L, 1, 1)

    @torch.no_grad()
    def _start_biases(self) -> None:
        """Start from rare objects, 8 in an image of 640 px, to spare the first batches from learning that."""
        for conv, stride in zip(self.m, self.strides):
            logits = conv.bias.view(-1, 5 + self.num_classes)  # (A, 5 + C)
            logits[:, 4] = math.log(8 / (640 / stride) ** 2)
            logits[:, 5:] = math.log(0.6 / (self.num_classes - 0.99999))


BLOCKS: dict[str, type[nn.Module]] = {
    "Conv": Conv,
    "Bottleneck": Bottleneck,
    "C3": C3,
    "SPPF": SPPF,
    "SPP": SPP,
    "Focus": Focus,
    "nn.Upsample": nn.Upsample,
    "Concat": Concat,
    "Detect": Detect,
}
