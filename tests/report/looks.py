"""What a figure shows, read from its texts rather than its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def texts_of(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """Every text that shows, with where it is in pixels."""
    figure.canvas.draw()
    ticks = {}
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ends = sorted((low, high))
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                seen = ends[0] <= tick.get_loc() <= ends[1]
                ticks |= {id(tick.label1): seen, id(tick.label2): seen}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text() and ticks.get(id(text), True):
            yield text.get_text(), text.get_window_extent()


def check_texts(figure: Figure) -> None:
    """No text is cut off, and none lies over another."""
    texts = list(texts_of(figure))
    for text, box in texts:
        assert box.min.min() >= 0 and (box.max <= figure.bbox.max).all(), text
    for (text, box), (other, over) in itertools.combinations(texts, 2):
        assert not box.overlaps(over), (text, other)
