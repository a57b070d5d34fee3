"""Options and hyperparameters of a run beside their defaults, as texts for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from utils.config import TrainOptions, spelling, usual_options
from utils.hyp import GENES, Hyperparameters, plain_values

DASH = "–"


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    default: str
    differs: bool
    meaning: str


def hyp_settings(hyp: Mapping[str, Any]) -> list[Setting]:
    """Of plain values, as hyp.yaml has them."""
    defaults = plain_values(Hyperparameters())
    meanings = {name: gene.meaning for name, gene in GENES.items()}
    return [_setting(name, value, defaults.get(name, MISSING), meanings.get(name, "")) for name, value in hyp.items()]


def option_settings(options: Mapping[str, Any]) -> list[Setting]:
    """Of options by field name, named by their flags."""
    defaults = usual_options()
    meanings = {item.name: item.metadata["meaning"] for item in fields(TrainOptions)}
    return [
        _setting(spelling(name), value, defaults.get(name, MISSING), meanings.get(name, ""))
        for name, value in options.items()
    ]


def flags_in_use(options: Mapping[str, Any]) -> list[str]:
    """Those that are on or off, and are on."""
    return [spelling(name) for name, value in options.items() if value is True]


def _setting(name: str, value: Any, default: Any, meaning: str) -> Setting:
    if default is MISSING:
        return Setting(name, _plain(value), "unknown", True, "not known to this version")
    return Setting(name, _plain(value), _plain(default), _plain(value) != _plain(default), meaning)


def _plain(value: Any) -> str:
    """A value of a YAML file for people; what is empty in one way or another is a dash."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or DASH  # str knows lists that hold themselves
    return DASH if value in (None, "") else str(value)
