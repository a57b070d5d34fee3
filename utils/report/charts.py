"""Curves over epochs as the geometry of small SVG charts: what a template needs to draw one, and a script to read it.

The surprise: of thousands of epochs the line has a few hundred points, the least and the greatest of each stretch; what
a reader points at comes from the whole table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.report.run_files import Table

_MOST_POINTS = 600  # of a line
_TICK_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Frame:
    """Of a chart, and of the plot within; px."""

    width: int = 360
    height: int = 196
    left: int = 46
    right: int = 350
    top: int = 14
    bottom: int = 158


FRAME = Frame()


@dataclass(frozen=True)
class Tick:
    px: float
    label: str


@dataclass(frozen=True)
class Line:
    """A column of a run over its epochs."""

    label: str
    column: str
    run: int
    colour: int  # of the style sheet's
    path: str  # of an SVG <path>
    dots: tuple[tuple[float, float], ...]  # points without neighbours, which no path shows
    marks: tuple[tuple[float, float], ...]  # at the best epoch
    shown: str  # at the best epoch, else at the last: the cell as it is written
    summary: str  # for who cannot see it


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_span: tuple[float, float]  # epochs at the left and the right of the plot
    y_span: tuple[float, float]  # values at its bottom and top
    best_px: float | None  # of the only run
    file: str  # the table that the columns are of: results or timing


@dataclass(frozen=True)
class Source:
    """A line to be drawn."""

    label: str
    column: str
    table: Table
    best_row: int | None = None
    run: int = 0
    colour: int = 0


def chart(title: str, unit: str, sources: Sequence[Source], *, from_zero: bool = False, file: str = "results") -> Chart:
    """`from_zero`: the axis begins there. Sources without any finite value are left out, which may leave no line."""
    known = [source for source in sources if any(map(math.isfinite, source.table.numbers(source.column)))]
    epochs = [epoch for source in known for epoch in source.table.epochs]
    values = [value for source in known for value in source.table.numbers(source.column) if math.isfinite(value)]
    values += [0.0] if from_zero or not values else []
    x_span, y_span = _wide(min(epochs, default=0), max(epochs, default=1)), _wide(min(values), max(values))
    y_ticks = _ticks(*y_span, 5)
    y_span = (y_ticks[0], y_ticks[-1])
    scale = _Scale(x_span, y_span)
    best = {source.table.epochs[source.best_row] for source in known if source.best_row is not None}
    return Chart(
        title=title,
        unit=unit,
        lines=tuple(_line(source, scale) for source in known),
        x_ticks=tuple(Tick(scale.x(tick), f"{tick:g}") for tick in _ticks(*x_span, 6, whole=True)),
        y_ticks=tuple(Tick(scale.y(tick), f"{tick:.6g}") for tick in y_ticks),
        x_span=x_span,
        y_span=y_span,
        best_px=scale.x(*best) if len(best) == 1 and len({source.run for source in known}) == 1 else None,
        file=file,
    )


@dataclass(frozen=True)
class _Scale:
    x_span: tuple[float, float]
    y_span: tuple[float, float]

    def x(self, epoch: float) -> float:
        low, high = self.x_span
        return round(FRAME.left + (epoch - low) / (high - low) * (FRAME.right - FRAME.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return round(FRAME.bottom - (value - low) / (high - low) * (FRAME.bottom - FRAME.top), 1)

    def point(self, epoch: float, value: float) -> tuple[float, float]:
        return self.x(epoch), self.y(value)


def _wide(low: float, high: float) -> tuple[float, float]:
    """The span, or one around it where it is as good as a single value."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round values that reach from `low` to `high` or, of `whole` numbers, lie within."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _TICK_STEPS if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(math.ceil(step), 1)
        return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [step * n for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _line(source: Source, scale: _Scale) -> Line:
    cells, numbers, epochs = source.table.cells(source.column), source.table.numbers(source.column), source.table.epochs
    known = [row for row, number in enumerate(numbers) if math.isfinite(number)]
    parts = list(_unbroken(list(zip(epochs, numbers))))
    best = source.best_row if source.best_row in known else None
    shown = cells[known[-1] if best is None else best]
    first, last = known[0], known[-1]
    return Line(
        label=source.label,
        column=source.column,
        run=source.run,
        colour=source.colour,
        path="".join(_path(_thinned(part), scale) for part in parts if len(part) > 1),
        dots=tuple(scale.point(*part[0]) for part in parts if len(part) == 1),
        marks=() if best is None else (scale.point(epochs[best], numbers[best]),),
        shown=shown,
        summary=f"{source.label} from {cells[first]} in epoch {epochs[first]} to {cells[last]} in epoch {epochs[last]}",
    )


def _unbroken(points: Sequence[tuple[float, float]]) -> Iterable[list[tuple[float, float]]]:
    """Stretches of points with finite values."""
    part: list[tuple[float, float]] = []
    for point in [*points, (0, math.nan)]:
        if math.isfinite(point[1]):
            part.append(point)
        elif part:
            yield part
            part = []


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The first, the last, and of each stretch between them the lowest and the highest."""
    if len(points) <= _MOST_POINTS:
        return points
    length = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = [points[0], points[-1]]
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        kept += [min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])]
    return sorted(set(kept))


def _path(points: Iterable[tuple[float, float]], scale: _Scale) -> str:
    return "M" + "L".join("{:g} {:g}".format(*scale.point(*point)) for point in points)
