"""The search space of evolution: which hyperparameters are its genes, between which bounds, on which scale.

The surprise: the scale follows from the bounds. Where both are above 0 and at least a factor of ten apart, as for
learning rates and loss gains, a gene is searched on a log scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from utils.files import nearest_name, read_yaml
from utils.hyp import GENES, Hyperparameters
from utils.structures import UserError

Scale = Literal["linear", "log", "choice"]

_FLAG = "--evolve-genes"
_KEYS = ("low", "high", "scale", "gain", "choices")
_START = {"anchors": 3.0}  # where the hyperparameters have none
_LOG_RATIO = 10


@dataclass(frozen=True)
class Gene:
    """A hyperparameter that evolves. Of a choice, `low` and `high` are the least and the largest of `choices`."""

    name: str
    start: float
    low: float
    high: float
    gain: float  # of the classic draw
    scale: Scale
    choices: tuple[float, ...] = ()  # ascending

    def to_unit(self, values: np.ndarray) -> np.ndarray:
        """Where values lie between the bounds, from 0 to 1, on the gene's scale; of a choice, its rank."""
        if self.scale == "choice":
            return self._nearest(values) / (len(self.choices) - 1)
        if self.scale == "log":
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def from_unit(self, units: np.ndarray) -> np.ndarray:
        """The inverse of `to_unit`."""
        if self.scale == "choice":
            return np.array(self.choices)[np.rint(units * (len(self.choices) - 1)).astype(int)]
        if self.scale == "log":
            return self.clip(self.low * (self.high / self.low) ** units)
        return self.clip(self.low + units * (self.high - self.low))

    def clip(self, values: np.ndarray) -> np.ndarray:
        """The nearest ones that the gene can have."""
        if self.scale == "choice":
            return np.array(self.choices)[self._nearest(values)]
        return np.clip(values, self.low, self.high)

    def _nearest(self, values: np.ndarray) -> np.ndarray:
        return np.abs(np.asarray(values)[..., None] - np.array(self.choices)).argmin(-1)


@dataclass(frozen=True)
class Space:
    """The genes, in the order of utils/hyp.py."""

    genes: tuple[Gene, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(gene.name for gene in self.genes)

    @property
    def start(self) -> dict[str, float]:
        return {gene.name: gene.start for gene in self.genes}

    def to_unit(self, values: np.ndarray) -> np.ndarray:
        """(..., G) of values as the genes' `to_unit` sees them."""
        return np.stack([gene.to_unit(values[..., index]) for index, gene in enumerate(self.genes)], -1)

    def from_unit(self, units: np.ndarray) -> np.ndarray:
        return np.stack([gene.from_unit(units[..., index]) for index, gene in enumerate(self.genes)], -1)

    def clip(self, values: np.ndarray) -> np.ndarray:
        return np.stack([gene.clip(values[..., index]) for index, gene in enumerate(self.genes)], -1)

    def plain(self) -> dict[str, dict[str, Any]]:
        """By gene what JSON can hold: for a study to keep, and for `differences`."""
        return {
            gene.name: {
                "start": gene.start,
                "low": gene.low,
                "high": gene.high,
                "gain": gene.gain,
                "scale": gene.scale,
                "choices": list(gene.choices),
            }
            for gene in self.genes
        }


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What a `Space.plain()` of this worker and the one of a study disagree on, a short line each."""
    lines = [f"gene {name}: here, not in the study" for name in mine if name not in theirs]
    lines += [f"gene {name}: in the study, not here" for name in theirs if name not in mine]
    for name in mine:
        if name in theirs:
            here, there = _described(mine[name]), _described(theirs[name])
            lines += [
                f"gene {name}: {what} {here[what]} here, {there[what]} in the study"
                for what in here
                if here[what] != there[what]
            ]
    return lines


def _described(gene: Mapping[str, Any]) -> dict[str, str]:
    number = "{:.12g}".format
    bounds = f"{number(gene['low'])} to {number(gene['high'])}"
    return {
        "start": number(gene["start"]),
        "bounds": f"one of {', '.join(map(number, gene['choices']))}" if gene["choices"] else bounds,
        "scale": gene["scale"],
        "gain": number(gene["gain"]),
    }


def search_space(hyp: Hyperparameters, *, genes: str = "", noautoanchor: bool = False) -> Space:
    """The genes to evolve, from the values of `hyp`.

    `genes` is what --evolve-genes was given: nothing, for every gene that is declared with a gain; names with commas
    between them; or the path of a YAML file, a list of names or a mapping of names to nothing or to any of
    {low, high, scale: linear or log, gain} or {choices, gain}. A gene that is declared without a gain gets 1 when it
    is named. Raises UserError, naming what is wrong and what would be right.
    """
    asked, source = _asked(genes)
    if noautoanchor and genes and "anchors" in asked:
        raise UserError(f"{source}: 'anchors' evolves with autoanchor alone; drop it, or --noautoanchor")
    if noautoanchor:
        asked.pop("anchors", None)
    return Space(tuple(_gene(name, asked[name], hyp, source) for name in GENES if name in asked))


def _asked(genes: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What is asked of each gene, and the source that errors name."""
    if not genes:
        return {name: {} for name, declared in GENES.items() if declared.gain > 0}, "--hyp"
    path = Path(genes).expanduser()
    from_file = path.suffix.lower() in (".yaml", ".yml") or path.exists()
    source = str(path) if from_file else f"{_FLAG} {genes}"
    asked = _read(path) if from_file else dict.fromkeys(filter(None, map(str.strip, genes.split(","))))
    if not asked:
        raise UserError(f"{source}: names no gene; it should name at least one, such as lr0")
    for name in asked:
        if name not in GENES:
            raise UserError(f"{source}: there is no gene '{name}'{nearest_name(str(name), GENES)}")
    return {name: _options(name, options, source) for name, options in asked.items()}, source


def _read(path: Path) -> dict[Any, Any]:
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # which `read_yaml` puts in words
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            return {item if isinstance(item, str) else str(item): None for item in content}
    return read_yaml(path, what=f"{_FLAG} file")


def _options(name: str, options: Any, source: str) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UserError(f"{source}: '{name}: {options}' should be nothing, or a mapping such as {{low: 0.1, high: 1}}")
    for key in options:
        if key not in _KEYS:
            hint = nearest_name(str(key), _KEYS) or f"; it takes {', '.join(_KEYS)}"
            raise UserError(f"{source}: '{name}' has the unknown key '{key}'{hint}")
    for key in ("low", "high", "scale"):
        if "choices" in options and key in options:
            raise UserError(f"{source}: '{name}' has both choices and {key}; choose one")
    return options


def _gene(name: str, options: Mapping[str, Any], hyp: Hyperparameters, source: str) -> Gene:
    declared = GENES[name]
    start = getattr(hyp, name)
    start = _START[name] if start is None else start
    gain = _number(name, "gain", options.get("gain", declared.gain or 1.0), source)
    if gain <= 0:
        raise UserError(f"{source}: '{name}': 'gain: {gain:g}' should be above 0")
    if "choices" in options:
        choices = _choices(name, options["choices"], start, source)
        return Gene(name, start, choices[0], choices[-1], gain, "choice", choices)
    low, high = (_bound(name, key, options.get(key, getattr(declared, key)), source) for key in ("low", "high"))
    if low >= high:
        raise UserError(f"{source}: '{name}': low {low:g} should be below high {high:g}")
    _check_start(name, start, low, high, source)
    return Gene(name, start, low, high, gain, _scale(name, options, low, high, source))


def _scale(name: str, options: Mapping[str, Any], low: float, high: float, source: str) -> Scale:
    scale = options.get("scale", "log" if low > 0 and high >= _LOG_RATIO * low else "linear")
    if scale not in ("linear", "log"):
        raise UserError(f"{source}: '{name}': 'scale: {scale}' should be linear or log; choices need no scale")
    if scale == "log" and low <= 0:
        raise UserError(f"{source}: '{name}': a log scale needs a low above 0, got {low:g}")
    return scale


def _check_start(name: str, start: float, low: float, high: float, source: str) -> None:
    if low <= start <= high:
        return
    bound = f"low: {start:g}" if start < low else f"high: {start:g}"
    where = f"of {_FLAG}" if source == "--hyp" else "there"
    raise UserError(
        f"{source}: '{name}: {start:g}', where evolution starts, lies outside {low:g} to {high:g};"
        f" change the value in --hyp, or write '{name}: {{{bound}}}' in the YAML {where}"
    )


def _choices(name: str, given: Any, start: float, source: str) -> tuple[float, ...]:
    listed = given if isinstance(given, list) else []
    choices = tuple(sorted({_bound(name, "choices", item, source) for item in listed}))
    if len(choices) < 2:
        raise UserError(f"{source}: '{name}': 'choices: {given}' should be a list of two numbers or more")
    if start not in choices:
        raise UserError(
            f"{source}: '{name}': choices {given} leave out {start:g}, where evolution starts;"
            f" add it, or change '{name}' in --hyp"
        )
    return choices


def _bound(name: str, key: str, value: Any, source: str) -> float:
    number = _number(name, key, value, source)
    low, high = GENES[name].domain
    if not low <= number <= high:
        domain = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        raise UserError(f"{source}: '{name}': '{key}: {number:g}' should be {domain} ({GENES[name].meaning})")
    return number


def _number(name: str, key: str, value: Any, source: str) -> float:
    try:
        # YAML reads 1e-2 as text (it wants 1.0e-2): accept what float() accepts
        number = float(value) if not isinstance(value, bool) else math.nan
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{source}: '{name}': '{key}: {value}' should be a number")
    return number
