"""What a run's time went into, for people: rows of timing.csv, a table, and the bottleneck in words."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from utils.clock import PARTS, TimeSplit

_NOTABLE = 0.25  # of the time, beside a network that takes the most


def timing_row(epoch: int, split: TimeSplit) -> dict[str, float]:
    """An epoch, counted from 0, by loggers.TIMING_COLUMNS."""
    parts = {f"{part}_s": split.parts[part] for part in PARTS}
    speed = {"images_per_s": split.images_per_s} if split.images else {}  # a resumed run may have but to evaluate it
    return {"epoch": epoch + 1, **speed, "epoch_s": split.wall, **parts}


def time_table(split: TimeSplit) -> str:
    """Seconds and shares of each part, aligned in three lines."""
    columns = {**split.parts, "rest": split.rest, "all": split.wall}
    whole = max(split.wall, 1e-9)
    rows = [
        ("time", [name.replace("_", " ") for name in columns]),
        ("seconds", [f"{seconds:.1f}" for seconds in columns.values()]),
        ("share", [f"{seconds / whole:.0%}" for seconds in columns.values()]),
    ]
    return "\n".join(f"{title:>7}" + "".join(f"{cell:>11}" for cell in cells) for title, cells in rows)


# ---- the bottleneck -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """Something that takes time: what to call it, the parts it is made of, and what would make it less."""

    name: str
    parts: tuple[str, ...]
    remedy: str
    flag: str = ""  # that the remedy advises; a run that has it is told `otherwise`
    otherwise: str = ""

    def advice(self, in_use: Container[str]) -> str:
        return self.otherwise if self.flag in in_use else self.remedy


_NETWORK = _Cost(
    "the network",
    ("forward", "backward"),
    "only a smaller --cfg or --imgsz, --compile or a faster device would change that",
    "--compile",
    "only a smaller --cfg or --imgsz or a faster device would change that",
)
_COSTS = (
    _NETWORK,
    _Cost(
        "waiting for data",
        ("data_wait",),
        "more --workers help while there are cores for them, smaller image files or a smaller --imgsz always do",
    ),
    _Cost("the way of the batches to the device", ("transfer",), "a smaller --imgsz makes them smaller"),
    _Cost("the loss", ("loss",), "its cost is much the same for any batch, so a larger --batch-size makes it less"),
    _Cost(
        "the optimizer",
        ("optimizer",),
        "its cost is the same for any batch, so a larger --batch-size makes it less",
    ),
    _Cost(
        "evaluation",
        ("evaluate",),
        "--noval leaves it to the end of the run",
        "--noval",
        "there is none but of the final epoch and of best.pt, as --noval asks",
    ),
    _Cost(
        "saving",
        ("save",),
        "--nosave writes weights at the end alone, and --project can name a faster disk",
        "--nosave",
        "--project can name a faster disk",
    ),
    _Cost(
        "pictures, tables and the rest",
        ("rest",),
        "--noplots draws no pictures",
        "--noplots",
        "it weighs less in a longer run",
    ),
)


def bottleneck(split: TimeSplit, in_use: Container[str] = ()) -> str:
    """One sentence that names what took the most time, and what would make that less; not by flags already `in_use`."""
    seconds = {**split.parts, "rest": split.rest}
    whole = max(split.wall, sum(split.parts.values()), 1e-9)
    shares = {cost: sum(seconds[part] for part in cost.parts) / whole for cost in _COSTS}
    most, next_most = sorted(_COSTS, key=lambda cost: -shares[cost])[:2]
    if most is not _NETWORK:
        return f"Bottleneck: {most.name}, {shares[most]:.0%} of the time; {most.advice(in_use)}."
    verdict = f"The network takes {shares[_NETWORK]:.0%} of the time, the most, as it should"
    if shares[next_most] < _NOTABLE:
        return f"{verdict}; {_NETWORK.advice(in_use)}."
    return f"{verdict}. Next comes {next_most.name} with {shares[next_most]:.0%}; {next_most.advice(in_use)}."
