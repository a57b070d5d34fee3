"""What a run, an evaluation or a sweep says on the terminal: bars, lines of epochs, tables of results.

The surprise: an epoch is one and the same line on a terminal and in a log file; the bar above it lives only meanwhile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TextIO

from tqdm import tqdm

from utils.data.findings import shortened
from utils.files import printable
from utils.structures import ClassMetrics, CocoFigures, LossMeans, Metrics


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """What the line of an epoch shows."""

    epoch: int  # from 0
    epochs: int
    losses: LossMeans  # of training
    metrics: Metrics | None  # None: not evaluated
    images_per_s: float | None  # None: there was nothing left to train on
    seconds_left: float


def format_header(epochs: int) -> str:
    """The titles above the lines of `format_epoch`."""
    return "  ".join(title.rjust(_width(title, epochs)) for title in EPOCH_LINE)


def format_epoch(summary: EpochSummary) -> str:
    """One line, aligned with `format_header`."""
    cells = ((title, cell(summary)) for title, cell in EPOCH_LINE.items())
    return "  ".join(text.rjust(_width(title, summary.epochs)) for title, text in cells)


def progress_texts(losses: LossMeans, *, data_wait: float, memory: int | None) -> list[str]:
    """For a bar: losses, the share of the time that is spent waiting for data, and memory in bytes."""
    texts = [f"box {losses.box:.4f}", f"obj {losses.objectness:.4f}", f"cls {losses.classification:.4f}"]
    return [*texts, f"data wait {data_wait:.0%}", *([] if memory is None else [f"{memory / 1e9:.1f} GB"])]


def format_duration(seconds: float) -> str:
    """h:mm:ss; a time that is not known yet (nan, infinite) has dashes for digits."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _width(title: str, epochs: int) -> int:
    return max(len(title), len(f"{epochs}/{epochs}") if title == "epoch" else 8)


def _metric(name: str) -> Callable[[EpochSummary], str]:
    return lambda summary: "-" if summary.metrics is None else f"{getattr(summary.metrics, name):.4f}"


def labelled(metrics: Metrics) -> list[ClassMetrics]:
    """The classes that have labels."""
    return [one for one in metrics.per_class if one.labels]


def table(metrics: Metrics, listed: Sequence[ClassMetrics] = (), *, best: bool = False) -> str:
    """The result as aligned text: header, the row 'all' and those of the classes `listed`.

    With `best` these also have the best F1 of their own, and the confidence where it is.
    """
    names = ["all", *(shortened(one.name) for one in listed)]
    width = max(12, *(len(name) + 2 for name in names))
    title = f"{'Class':>{width}}{'Images':>9}{'Labels':>9}{'P':>8}{'R':>8}{'F1':>8}{'mAP@.5':>9}{'mAP@.5:.95':>12}"
    lines = [title + f"{'best F1':>9}{'at conf':>9}" * best]
    for name, row in zip(names, [metrics, *listed]):
        figures = f"{row.precision:>8.3f}{row.recall:>8.3f}{row.f1:>8.3f}{row.map50:>9.3f}{row.map50_95:>12.3f}"
        own = f"{row.best_f1:>9.3f}{row.best_confidence:>9.3f}" if best and row is not metrics else ""
        lines.append(f"{name:>{width}}{row.images:>9}{row.labels:>9}{figures}{own}")
    return "\n".join(lines)


def result(metrics: Metrics, listed: Sequence[ClassMetrics] = (), *, best: bool = False, least: float = 0.001) -> str:
    """`table`, and below it the twelve figures of COCO in two lines, and what P, R and F1 are read at.

    `least` is the confidence that all detections exceed.
    """
    figures = [
        f"  {name:>5} {'-' if value is None else f'{value:.3f}':>5}" for name, value in coco_names(metrics.coco).items()
    ]
    at = f"P, R and F1 are those at confidence {metrics.best_confidence:.3f}, where the mean F1 is best"
    lines = (
        "",
        "COCO" + "".join(figures[:6]),
        "    " + "".join(figures[6:]),
        at if metrics.f1 else f"Nothing that is labelled was found above confidence {least:g}",
    )
    return table(metrics, listed, best=best) + "\n".join(lines)


def coco_names(figures: CocoFigures) -> dict[str, float | None]:
    """The twelve by the names that they have for people and in files."""
    return {name: getattr(figures, field) for name, field in _COCO_NAMES.items()}


def strange_outputs(metrics: Metrics, whose: str = "the network") -> str:
    """A line for the user where the network said something that is no number; else empty."""
    if not metrics.non_finite:
        return ""
    return (
        f"for {metrics.non_finite:,} of {metrics.images:,} images {whose} said something that is no finite number "
        "(NaN or infinity): left out of the detections"
    )


_BAR = "{desc}  {percentage:3.0f}% {bar} {rate_noinv_fmt}  {remaining} left{postfix}"
_BESIDE_TEXTS = 42  # columns: percent, a short bar, speed, time left
_BAR_WITHOUT_END = "{desc}  {n_fmt}{unit}  {rate_noinv_fmt}{postfix}"


class Console:
    """The terminal side of a run: bars where a person watches, and lines that a log file takes as well.

    `stream` is standard output when not given; bars appear where it is a terminal, unless `quiet`.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._bars = self._stream.isatty() and not quiet
        self._headed = False

    def bar(
        self, items: Iterable | int, description: str, *, images_each: int = 1, of: str = "images", start: int = 0
    ) -> tqdm:
        """A bar over an iterable, or of a total that `bar.update(n)` counts up to. It vanishes when it is done.

        `images_each` is the number of images, or what they are `of`, per item, so that the speed is in images/s;
        `bar.show(texts)` adds texts, as those of `progress_texts`. Use a bar of a total in a `with`; it counts from
        `start`. Without bars it iterates.
        """
        return self._bar(items, description, unit=f" {of}", unit_scale=images_each, start=start)

    def download_bar(self, megabytes: int, description: str) -> tqdm:
        """A bar of a total in MB, 0 where that is not known; see `bar`."""
        return self._bar(megabytes, description, unit=" MB", unit_scale=1)

    def _bar(self, items: Iterable | int, description: str, *, unit: str, unit_scale: int, start: int = 0) -> tqdm:
        total = items if isinstance(items, int) else None
        return _Bar(
            None if total is not None else items,
            total=total,
            initial=start,
            desc=description,
            file=self._stream,
            disable=not self._bars,
            leave=False,
            dynamic_ncols=True,
            unit=unit,
            unit_scale=unit_scale,
            bar_format=_BAR if total != 0 else _BAR_WITHOUT_END,
        )

    def line(self, text: str) -> None:
        """A line, above any bar, that is in the log file at once."""
        tqdm.write(printable(text, self._stream), file=self._stream)
        self._stream.flush()

    def note(self, text: str) -> None:
        self.line(f"note: {text}")

    def warn(self, text: str) -> None:
        self.line(f"warning: {text}")

    def epoch(self, summary: EpochSummary) -> None:
        """The line of an epoch, below the titles if it is the first."""
        if not self._headed:
            self.line(format_header(summary.epochs))
            self._headed = True
        self.line(format_epoch(summary))


class SilentConsole(Console):
    """The terminal side of what another process tells: the null object."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def line(self, text: str) -> None:
        pass


class _Bar(tqdm):
    monitor_interval = 0  # no thread of tqdm's: loader workers are forked from this process

    def show(self, texts: Sequence[str]) -> None:
        """Add the first of the texts, as many as leave room for a bar; they are drawn next time."""
        room = (self.ncols or 120) - len(self.desc) - _BESIDE_TEXTS  # as wide as it was last drawn
        ends = accumulate(len(text) + 2 for text in texts)
        self.set_postfix_str("  ".join(text for text, end in zip(texts, ends) if end <= room), refresh=False)


# ---- tables -------------------------------------------------------------------------------------------------------

EPOCH_LINE: dict[str, Callable[[EpochSummary], str]] = {  # title: text of the cell
    "epoch": lambda summary: f"{summary.epoch + 1}/{summary.epochs}",
    "box": lambda summary: f"{summary.losses.box:.5f}",
    "obj": lambda summary: f"{summary.losses.objectness:.5f}",
    "cls": lambda summary: f"{summary.losses.classification:.5f}",
    "P": _metric("precision"),
    "R": _metric("recall"),
    "mAP@.5": _metric("map50"),
    "mAP@.5:.95": _metric("map50_95"),
    "images/s": lambda summary: "-" if summary.images_per_s is None else f"{summary.images_per_s:.1f}",
    "time left": lambda summary: format_duration(summary.seconds_left),
}

_COCO_NAMES = {  # shown: the field of CocoFigures
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "AR1": "ar1",
    "AR10": "ar10",
    "AR100": "ar100",
    "ARs": "ar_small",
    "ARm": "ar_medium",
    "ARl": "ar_large",
}
