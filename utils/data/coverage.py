"""Which pixels lie in a polygon, by their centres; both renderers ask here, so they agree to the pixel.

OpenCV's fillConvexPoly counts in whole rows, and misses pixels where a nearly level edge crosses the border.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_EDGE_SLACK = 1e-6  # px^2, far above what rounding does to an edge seen from both of its sides


def convex_spans(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(2, H) i32: in each row, the first pixel with its centre in the convex polygon, and the first one after those.

    `corners` (n, 2) either way round. Centres on an edge are inside, so that neighbours leave no gap.
    """
    edges = np.roll(corners, -1, axis=0) - corners
    if edges[0, 0] * edges[1, 1] < edges[0, 1] * edges[1, 0]:  # a mirror, or a shear beyond 45 degrees
        return convex_spans(corners[::-1], shape)
    height, width = shape
    rows = np.arange(height) + 0.5
    left, right = np.zeros(height), np.full(height, float(width))
    for (x, y), (along_x, along_y) in zip(corners, edges):  # inside is to the right of every edge
        room = along_x * (rows - y) + _EDGE_SLACK
        if along_y > 0:
            np.minimum(right, x + room / along_y, out=right)
        elif along_y < 0:
            np.maximum(left, x + room / along_y, out=left)
        else:
            right[room < 0] = -1
    return np.clip([np.ceil(left - 0.5), np.floor(right + 0.5)], 0, width).astype(np.int32)


def within_spans(spans: np.ndarray, width: int) -> np.ndarray:
    """(2, H) as of `convex_spans` -> (H, width) bool."""
    columns = np.arange(width, dtype=np.int32)
    return (columns >= spans[0, :, None]) & (columns < spans[1, :, None])


def within_rings(rings: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool by the even-odd rule: an odd number of edges crosses the row to the left of the pixel's centre."""
    height, width = shape
    starts = np.concatenate(rings)  # (n, 2), and the end of each edge:
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    rows = np.arange(height) + 0.5
    row, edge = np.nonzero((starts[:, 1] <= rows[:, None]) != (ends[:, 1] <= rows[:, None]))
    (x, y), (end_x, end_y) = starts[edge].T, ends[edge].T
    crossing = x + (rows[row] - y) / (end_y - y) * (end_x - x)
    column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)  # the first pixel centre behind it
    crossings = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).reshape(height, width + 1)
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
