"""Every hyperparameter, declared once: default, domain, evolution gain and bounds, meaning.

`gain`, `low` and `high` serve evolution alone; a run accepts any finite value of the `domain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from utils.files import nearest_name, read_yaml
from utils.structures import PixelTransform, UserError


@dataclass(frozen=True)
class Gene:
    """What evolution and validation know of a hyperparameter."""

    gain: float
    low: float
    high: float
    domain: tuple[float, float]
    meaning: str


INFINITY = math.inf


def _hyp(default: float | None, gain: float, low: float, high: float, domain: tuple[float, float], meaning: str) -> Any:
    return field(default=default, metadata={"gene": Gene(gain, low, high, domain, meaning)})


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The values of a hyp YAML."""

    lr0: float = _hyp(0.01, 1, 1e-5, 1e-1, (0, INFINITY), "initial learning rate (SGD 1e-2, Adam 1e-3)")
    lrf: float = _hyp(0.1, 1, 0.01, 1.0, (0, INFINITY), "final learning rate = lr0 * lrf")
    momentum: float = _hyp(0.937, 0.3, 0.6, 0.98, (0, 1), "SGD momentum, Adam beta1")
    weight_decay: float = _hyp(0.0005, 1, 0.0, 0.001, (0, INFINITY), "L2 penalty of weights other than batch-norm")
    warmup_epochs: float = _hyp(3.0, 1, 0.0, 5.0, (0, INFINITY), "fractions allowed")
    warmup_momentum: float = _hyp(0.8, 1, 0.0, 0.95, (0, 1), "momentum at the first batch")
    warmup_bias_lr: float = _hyp(0.1, 1, 0.0, 0.2, (0, INFINITY), "learning rate of biases at the first batch")
    box: float = _hyp(0.05, 1, 0.02, 0.2, (0, INFINITY), "box loss gain")
    cls: float = _hyp(0.5, 1, 0.2, 4.0, (0, INFINITY), "class loss gain")
    cls_pw: float = _hyp(1.0, 1, 0.5, 2.0, (0, INFINITY), "class BCE positive weight")
    obj: float = _hyp(1.0, 1, 0.2, 4.0, (0, INFINITY), "objectness loss gain")
    obj_pw: float = _hyp(1.0, 1, 0.5, 2.0, (0, INFINITY), "objectness BCE positive weight")
    iou_t: float = _hyp(0.20, 0, 0.1, 0.7, (0, 1), "kept for compatibility, unused")
    anchor_t: float = _hyp(4.0, 1, 2.0, 8.0, (1, INFINITY), "largest label/anchor side ratio that still matches")
    anchors: float | None = _hyp(None, 2, 2.0, 10.0, (1, INFINITY), "anchors per output level; absent: the network's")
    fl_gamma: float = _hyp(0.0, 0, 0.0, 2.0, (0, INFINITY), "focal loss gamma, 0 = off")
    hsv_h: float = _hyp(0.015, 1, 0.0, 0.1, (0, 1), "hue gain, +/-")
    hsv_s: float = _hyp(0.7, 1, 0.0, 0.9, (0, 1), "saturation gain, +/-")
    hsv_v: float = _hyp(0.4, 1, 0.0, 0.9, (0, 1), "value gain, +/-")
    degrees: float = _hyp(0.0, 1, 0.0, 45.0, (0, 180), "rotation, +/-")
    translate: float = _hyp(0.1, 1, 0.0, 0.9, (0, 1), "shift as a fraction of the side, +/-")
    scale: float = _hyp(0.5, 1, 0.0, 0.9, (0, 0.999), "size gain, +/-")
    shear: float = _hyp(0.0, 1, 0.0, 10.0, (0, 80), "degrees, +/-")
    perspective: float = _hyp(0.0, 0, 0.0, 0.001, (0, 1), "projective terms per px, +/-")
    flipud: float = _hyp(0.0, 1, 0.0, 1.0, (0, 1), "probability of an upside-down flip")
    fliplr: float = _hyp(0.5, 0, 0.0, 1.0, (0, 1), "probability of a left-right flip")
    mosaic: float = _hyp(1.0, 1, 0.0, 1.0, (0, 1), "probability of a mosaic of four")
    mosaic9: float = _hyp(0.0, 1, 0.0, 1.0, (0, 1), "probability that a mosaic is one of nine")
    # 0 keeps the classic recipe; training ends better on images as they will be met, so recent ones take 10 or so
    close_mosaic: float = _hyp(0.0, 0, 0.0, 50.0, (0, INFINITY), "so many epochs at the end have no mosaics")
    mixup: float = _hyp(0.0, 1, 0.0, 1.0, (0, 1), "probability of mixing two mosaics")
    copy_paste: float = _hyp(0.0, 1, 0.0, 1.0, (0, 1), "probability of pasting each polygon again")
    cutout: float = _hyp(0.0, 1, 0.0, 1.0, (0, 1), "probability of painting rectangles over the image")
    albumentations: tuple[PixelTransform, ...] = ()  # no gene: `- Blur: {p: 0.01, blur_limit: 3}` or `- ToGray`


GENES: dict[str, Gene] = {item.name: item.metadata["gene"] for item in fields(Hyperparameters) if item.metadata}
_TRANSFORMS = "albumentations"  # the one key that is a list


def hyperparameters(values: dict[str, Any], *, source: str) -> Hyperparameters:
    """Validated hyperparameters from a mapping. Raises UserError that names `source`, the key, and what it takes."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name == _TRANSFORMS:
            checked[name] = _transforms(value, source)
            continue
        if name not in GENES:
            nearest = nearest_name(str(name), [*GENES, _TRANSFORMS])
            raise UserError(f"{source}: unknown hyperparameter '{name}: {value}'{nearest}")
        if name == "anchors" and value in (None, 0):  # 0 is how older files say that there is none
            continue
        checked[name] = _number(name, value, source)
    return Hyperparameters(**checked)


def _number(name: str, value: Any, source: str) -> float:
    low, high = GENES[name].domain
    takes = f"a number from {low:g} to {high:g}" if high < INFINITY else f"a number of {low:g} or more"
    try:
        # YAML reads 1e-2 as text (it wants 1.0e-2): accept what float() accepts
        number = float(value) if not isinstance(value, bool) else math.nan
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise UserError(f"{source}: '{name}: {value}' should be {takes} ({GENES[name].meaning})")
    return number


def _transforms(value: Any, source: str) -> tuple[PixelTransform, ...]:
    """Of the key `albumentations`; whether the package knows them is found out when it is imported."""
    if value is not None and not isinstance(value, (list, tuple)):
        raise UserError(f"{source}: '{_TRANSFORMS}: {value}' should be a list such as {_EXAMPLE}")
    return tuple(_transform(item, source) for item in value or ())


_EXAMPLE = "[ToGray, Blur: {p: 0.01, blur_limit: 3}]"


def _transform(item: Any, source: str) -> PixelTransform:
    if isinstance(item, str):
        return PixelTransform(name=item, arguments=())
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, arguments),) = item.items()
        if isinstance(name, str) and isinstance(arguments or {}, Mapping):
            pairs = tuple((str(key), _frozen(name, key, value, source)) for key, value in (arguments or {}).items())
            return PixelTransform(name=name, arguments=pairs)
    raise UserError(f"{source}: '{_TRANSFORMS}': '{item}' should be the name of a transform, as in {_EXAMPLE}")


def _frozen(name: str, key: Any, value: Any, source: str) -> Any:
    """A YAML value with tuples in place of lists, so that it can be a key."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(name, key, item, source) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{source}: '{_TRANSFORMS}': '{name}': '{key}: {value}' should be a plain value or a list of these")


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def plain_values(hyp: Hyperparameters) -> dict[str, Any]:
    """Numbers, strings and lists by name, as in a YAML file: what `hyperparameters` reads."""
    listed = [
        {item.name: {key: _thawed(value) for key, value in item.arguments}} if item.arguments else item.name
        for item in hyp.albumentations
    ]
    return {**asdict(hyp), _TRANSFORMS: listed}


def read_hyp(path: Path) -> Hyperparameters:
    """The hyperparameters of a YAML file; keys that it leaves out keep their defaults."""
    return hyperparameters(read_yaml(path, what="--hyp file"), source=str(path))
