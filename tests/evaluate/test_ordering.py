import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluate.ordering import descending, positions_in, row_order, starts_of


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 9999),
    count=st.integers(0, 300),
    largest=st.sampled_from([0, 3, 70_000, 2**40]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_rows_are_ordered_as_by_lexsort(seed, count, largest, dtype):
    generator = np.random.default_rng(seed)
    whole = generator.integers(0, largest + 1, count)
    small = generator.integers(0, 3, count).astype(np.int32)
    scores = generator.normal(0, 1, count).round(int(generator.integers(0, 4))).astype(dtype)  # ties, and -0
    assert np.array_equal(row_order(small, descending(scores), whole), np.lexsort((whole, -scores, small)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbouring_numbers_and_extremes_are_told_apart(dtype):
    one = dtype(1)
    least, most = np.finfo(dtype).tiny, np.finfo(dtype).max
    values = np.array([np.inf, most, np.nextafter(one, one * 2), 1, least, 0, -least, -1, -2], dtype)
    assert row_order(descending(values[::-1])).tolist() == list(range(len(values)))[::-1]
    assert len(np.unique(descending(np.array([0.0, -0.0], dtype)))) == 1


def test_runs():
    assert starts_of(np.array([2, 0, 3])).tolist() == [0, 2, 2]
    assert positions_in(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
