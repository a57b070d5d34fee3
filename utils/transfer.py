"""Weights of one network as the start of another: part by part, and the head row by row.

The surprise: a class is known by its name. Its rows of the head go to its namesake, whatever the order and the number
of classes on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.yolo import DetectionModel

_OTHERS = 5  # rows of an anchor that are of no class: box and objectness, which come first

Entries = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What of some weights a network took. Entries are those of state dicts, but for anchors."""

    total: int  # entries of the network
    whole: tuple[str, ...]  # taken as they are
    by_class: tuple[str, ...]  # of the head, taken row by row
    classes: tuple[str, ...]  # whose rows were among them
    left_out: tuple[str, ...]  # of the network: as they were
    unused: tuple[str, ...]  # of the weights: they fit nowhere


def transfer(model: DetectionModel, weights: Entries, *, learned: Sequence[str], names: Sequence[str]) -> Transfer:
    """Copy into `model` what fits it by name and shape; a convolution or a batch norm whole, or not at all.

    `learned` are the classes of the weights, `names` those of the model. Where they are not the same, the rows of a
    head for boxes and objectness are taken if the numbers of anchors agree, and those of a class from its namesake.
    Names that only count, "0", "1", ..., are none, and then the head is as any other part. Anchors stay: they belong to
    the network that the model was built from, and to autoanchor.
    """
    state, offered = _without_anchors(model.state_dict()), _without_anchors(weights)
    namesakes = _namesakes(learned, names)
    by_class: dict[str, Tensor] = {}
    if namesakes is not None:
        head = f"model.{len(model.model) - 1}."
        by_class = {
            name: _rows_of_classes(start, offered[name], len(names), len(learned), namesakes)
            for name, start in state.items()
            if name.startswith(head) and name in offered
        }
    fitting = _whole_parts(state, offered | by_class)
    model.load_state_dict(fitting, strict=False)
    return Transfer(
        total=len(state),
        whole=tuple(name for name in fitting if name not in by_class),
        by_class=tuple(name for name in by_class if name in fitting),
        classes=tuple(names[here] for here in namesakes or () if by_class.keys() & fitting.keys()),
        left_out=tuple(name for name in state if name not in fitting),
        unused=tuple(name for name in offered if name not in fitting),
    )


def _without_anchors(entries: Entries) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in entries.items() if not name.endswith(".anchors")}


def _whole_parts(state: Entries, offered: Entries) -> dict[str, Tensor]:
    """What is offered for those parts of which every entry has the right shape."""
    fits = {name: name in offered and offered[name].shape == start.shape for name, start in state.items()}
    broken = {_part(name) for name, right in fits.items() if not right}
    return {name: offered[name] for name in state if _part(name) not in broken}


def _part(name: str) -> str:
    return name.rpartition(".")[0]


def _namesakes(learned: Sequence[str], names: Sequence[str]) -> dict[int, int] | None:
    """By number of a class of the model, that of the weights' class of that name; None where names do not count."""
    if list(learned) == list(names) or _only_count(learned) or _only_count(names):
        return None
    there = list(learned)
    return {here: there.index(name) for here, name in enumerate(names) if name in there}


def _only_count(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]


def _rows_of_classes(
    start: Tensor, offered: Tensor, classes: int, learned: int, namesakes: Mapping[int, int]
) -> Tensor:
    """`start`, (A * (5 + C), ...) of a head, with the rows that `offered` has for it; (0,) where they do not fit."""
    rows, given = start.clone().unflatten(0, (-1, _OTHERS + classes)), offered.unflatten(0, (-1, _OTHERS + learned))
    if len(rows) != len(given) or rows.shape[2:] != given.shape[2:]:
        return start.new_empty(0)
    mine, theirs = (
        [*range(_OTHERS), *(_OTHERS + number for number in some)] for some in (namesakes.keys(), namesakes.values())
    )
    rows[:, mine] = given[:, theirs].to(rows)
    return rows.flatten(0, 1)
