"""The floor that a machine sets under a training step: its operations over a measured rate."""

from __future__ import annotations

from typing import Any

_PRODUCTS_PER_STEP = 3  # forward, and for each convolution the gradients of its input and of its weights


def step_gflop(forward_gflop: float, batch_size: int) -> float:
    """1e9 operations of the convolutions of a training step; `forward_gflop` is of one image, forward only.

    Nothing else is counted, and nothing is taken off for the first layer, which needs no gradient of its input.
    """
    return _PRODUCTS_PER_STEP * forward_gflop * batch_size


def floor_seconds(gflop: float, gflop_per_second: float) -> float:
    """The least time for so many 1e9 operations."""
    return gflop / gflop_per_second


def share_of_peak(gflop: float, seconds: float, gflop_per_second: float) -> float:
    """0..1: the floor over the time taken."""
    return floor_seconds(gflop, gflop_per_second) / seconds


def best_rate(rates: dict[str, Any], precision: str) -> float | None:
    """The highest rate that `benchmarks.rates` found in this precision; None where it measured none."""
    return max(rates["gflop_per_second"].get(precision, {}).values(), default=None)
