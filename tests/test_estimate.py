"""The estimate for many GPUs: held to a ring that is played through, and to a case worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.estimate import Load, Wire, buckets, estimate, estimate_rows, ring_seconds

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("count", [2, 3, 8])
def test_an_all_reduce_takes_as_long_as_a_ring_is_busy(count):
    """Its slow twin: every rank holds a vector of as many chunks, and passes one on to its neighbour at a time."""
    held = np.random.default_rng(0).integers(0, 9, (count, count))
    total, sent = held.sum(0), 0
    for step in range(2 * (count - 1)):
        passed = [(rank - step) % count for rank in range(count)]
        values = [held[rank, chunk] for rank, chunk in enumerate(passed)]
        for rank, (chunk, value) in enumerate(zip(passed, values)):
            neighbour = (rank + 1) % count
            held[neighbour, chunk] = value + (held[neighbour, chunk] if step < count - 1 else 0)
        sent += 1 / count  # of the bytes, by each rank
    assert (held == total).all()
    wire = Wire(name="", ranks=count, gb_per_second=2, start_us=5)
    assert ring_seconds(4e9, wire) == pytest.approx(sent * 4e9 / 2e9 + 5e-6)


def test_buckets_are_filled_from_the_end():
    mib = 2**20
    assert buckets([7 * mib, 30 * mib, 20 * mib, 4 * mib, mib, mib // 2, mib // 2]) == [
        mib,
        25 * mib,
        30 * mib,
        7 * mib,
    ]


def test_an_estimate_by_hand():
    """100 ms alone, 67 of them backward; 84 ms of gradients, the last bucket 60 of these; 9 ms that nothing hides."""
    wire = Wire(name="", ranks=2, gb_per_second=1, start_us=2000)
    load = Load(name="", gradients=(58_000_000, 22_000_000), statistics=3_000_000, norms=5, gflop=100 / 3)
    guess = estimate(load, wire, images=1, tflops=1)
    assert guess.compute == pytest.approx(0.1)
    assert guess.gradients == pytest.approx(0.084)
    assert guess.exposed_best == pytest.approx(0.060 + 0.009)
    assert guess.exposed_worst == pytest.approx(0.084 + 0.009)
    assert guess.efficiency == (pytest.approx(0.1 / 0.193), pytest.approx(0.1 / 0.169))
    assert guess.sync_bn == pytest.approx(2 * 5 * 0.002)
    slower = estimate(load, wire, images=1, tflops=100)  # 1 ms alone: no backward pass hides that much
    assert slower.exposed_best == pytest.approx(0.084 - 0.001 * 2 / 3 + 0.009)


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for row in estimate_rows()[1:]:
        assert f"| {' | '.join(row)} |" in page
