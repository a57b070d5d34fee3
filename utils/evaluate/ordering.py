"""Orders of millions of rows by several keys, 16 bits at a time.

Numpy sorts so few bits by counting, which is several times as fast as its lexsort.
"""

from __future__ import annotations

import numpy as np

_DIGIT_BITS = 16


def row_order(*keys: np.ndarray) -> np.ndarray:
    """(K,) rows by the first key, then the second, and so on, each ascending; rows that are equal keep their order.

    keys: (K,) whole numbers that are not negative.
    """
    order = np.arange(len(keys[0]))
    for key in reversed(keys):
        for digit in _digits(key):
            order = order[np.argsort(digit[order], kind="stable")]
    return order


def _digits(key: np.ndarray) -> list[np.ndarray]:
    """The key in parts of 16 bits, least significant first, as many as its largest value needs."""
    bits = int(key.max()).bit_length() if len(key) else 0
    return [(key >> key.dtype.type(shift)).astype(np.uint16) for shift in range(0, bits, _DIGIT_BITS)]


def descending(values: np.ndarray) -> np.ndarray:
    """Keys by which the largest of `values` (K,), f32 or f64 and none of them NaN, come first."""
    unsigned = np.uint32 if values.dtype == np.float32 else np.uint64
    sign = unsigned(1 << (8 * values.dtype.itemsize - 1))
    bits = (values + values.dtype.type(0)).view(unsigned)  # -0 becomes 0
    # IEEE 754: the bits of positive numbers rise with them, those of negative ones fall
    return np.where(bits & sign, bits, ~(bits | sign))


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Where each run begins, when runs of these lengths lie one after another."""
    return np.cumsum(counts) - counts


def positions_in(counts: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run, when runs of these lengths lie one after another."""
    return np.arange(int(counts.sum())) - np.repeat(starts_of(counts), counts)
