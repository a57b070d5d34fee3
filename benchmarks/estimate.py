"""What training would reach on many GPUs: arithmetic from the bytes of a step, the rate of a GPU and that of a wire.

The surprise: it gives no figure but two, between which the truth lies. At best all of a gradient but its last bucket
travels while the backward pass goes on, at worst nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.results import figure, table
from benchmarks.roofline import step_gflop
from models.yolo import DetectionModel, gflops, read_network

_BACKWARD = 2 / 3  # of a step's operations
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes from which on DistributedDataParallel begins another
_SUMS = 2  # small all-reduces of a step that nothing hides: of matches, and of losses
_PER_NORM = 2  # those of a synchronised batch norm, one forward and one backward
_BYTES = 4  # gradients are fp32 whatever the precision of the products, and so are statistics


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a network makes ranks do in a step."""

    name: str
    gradients: tuple[int, ...]  # bytes of each parameter, in the order of the network
    statistics: int  # bytes of the means and variances of batch norms, made those of all ranks at each update
    norms: int
    gflop: float  # of an image, forward

    @classmethod
    def of(cls, cfg: str, imgsz: int) -> Load:
        """The load of a network YAML, without its weights."""
        network = read_network(cfg)
        with torch.device("meta"):
            model = DetectionModel(network)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        return cls(
            name=f"{Path(cfg).stem} {imgsz}",
            gradients=tuple(_BYTES * parameter.numel() for parameter in model.parameters()),
            statistics=sum(2 * _BYTES * norm.num_features for norm in norms),
            norms=len(norms),
            gflop=gflops(network, imgsz),
        )


@dataclass(frozen=True, kw_only=True)
class Wire:
    """The narrowest way between neighbours in the ring of all ranks."""

    name: str
    ranks: int
    gb_per_second: float  # each way, as an all-reduce uses it
    start_us: float  # of any all-reduce, however small


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a step of which every rank has as many images."""

    compute: float
    gradients: float  # on the wire, by themselves
    exposed_best: float  # that the step is longer than by itself: behind the backward pass, all but the last bucket
    exposed_worst: float  # nothing behind it
    sync_bn: float  # more with --sync-bn

    @property
    def efficiency(self) -> tuple[float, float]:
        """Images per second over those of as many GPUs that need not talk: at worst, at best; 0..1."""
        return tuple(self.compute / (self.compute + exposed) for exposed in (self.exposed_worst, self.exposed_best))


def ring_seconds(num_bytes: float, wire: Wire) -> float:
    """An all-reduce: each rank sends, and receives, 2 (N - 1) / N of the bytes (Patarasuk and Yuan, 2009)."""
    return 2 * (wire.ranks - 1) / wire.ranks * num_bytes / (1e9 * wire.gb_per_second) + wire.start_us / 1e6


def buckets(gradients: Sequence[int]) -> list[int]:
    """The bytes of DistributedDataParallel's buckets, filled from the last parameter on."""
    filled, limit = [0], _FIRST_BUCKET
    for size in reversed(gradients):
        if filled[-1] >= limit:
            filled.append(0)
            limit = _BUCKET
        filled[-1] += size
    return filled


def estimate(load: Load, wire: Wire, *, images: int, tflops: float) -> Estimate:
    """A step of as many images per rank, by GPUs that reach `tflops` in it when alone."""
    compute = step_gflop(load.gflop, images) / (1e3 * tflops)
    of_buckets = [ring_seconds(size, wire) for size in buckets(load.gradients)]
    always = ring_seconds(load.statistics, wire) + _SUMS * ring_seconds(0, wire)
    return Estimate(
        compute=compute,
        gradients=sum(of_buckets),
        exposed_best=max(of_buckets[-1], sum(of_buckets) - _BACKWARD * compute) + always,
        exposed_worst=sum(of_buckets) + always,
        sync_bn=_PER_NORM * load.norms * ring_seconds(0, wire),
    )


# ---- the table ------------------------------------------------------------------------------------------------------

WIRES = (
    Wire(name="8 GPUs, NVLink", ranks=8, gb_per_second=200, start_us=30),
    Wire(name="64 GPUs, 100 Gb/s per 8", ranks=64, gb_per_second=10, start_us=150),
)
SIZES = (
    *((f"yolov5{size}.yaml", 640, 16) for size in "nsmlx"),
    ("yolov5x6.yaml", 1280, 4),
)  # network, image size in px, images per GPU
TFLOPS = 30.0  # of a GPU: a tenth of what an A100 could, and the share that these networks reach of a CPU's peak


def estimate_rows(tflops: float = TFLOPS) -> list[list[str]]:
    """Headers, and every network on every wire."""
    headers = ["network, images per GPU", "MB per step", "alone ms"]
    for wire in WIRES:
        headers += [f"{wire.name}: ms", "efficiency", "--sync-bn ms"]
    rows = [headers]
    for cfg, imgsz, images in SIZES:
        load = Load.of(cfg, imgsz)
        guesses = [estimate(load, wire, images=images, tflops=tflops) for wire in WIRES]
        megabytes = (sum(load.gradients) + load.statistics) / 1e6
        cells = [f"{load.name} b{images}", figure(megabytes), figure(1e3 * guesses[0].compute)]
        for guess in guesses:
            shares = " to ".join(f"{share:.0%}" for share in guess.efficiency)
            cells += [figure(1e3 * guess.gradients), shares, f"+ {figure(1e3 * guess.sync_bn)}"]
        rows.append(cells)
    return rows


def estimate_table(tflops: float = TFLOPS) -> str:
    headers, *rows = estimate_rows(tflops)
    return table(headers, rows)
