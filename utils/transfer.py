"""Weights of one network as the start of another: entry by entry, and the head row by row.

The surprise: a class is known by its name. Its rows of the head go to its namesake, whatever the order and the number
of classes on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.yolo import DetectionModel

_OTHERS = 5  # rows of an anchor that are of no class: box and objectness, which come first
_COUNTER = "num_batches_tracked"  # a single number, so it would fit any batch norm

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
    """Copy into `model` what fits it by name and shape.

    `learned` are the classes of the weights, `names` those of the model. Where they are not the same, the rows of a
    head for boxes and objectness are taken if the numbers of anchors agree, and those of a class from its namesake.
    Names that only count, "0", "1", ..., are none, and then the head is as any entry. Anchors stay: they belong to the
    network that the model was built from, and to autoanchor.
    """
    state, offered = _without_anchors(model.state_dict()), _without_anchors(weights)
    namesakes = _namesakes(learned, names)
    head = f"model.{len(model.model) - 1}."
    whole, by_class = {}, {}
    for name, start in state.items():
        if namesakes is not None and name.startswith(head):
            if name in offered:
                rows = _rows_of_classes(start, offered[name], len(names), len(learned), namesakes)
                by_class |= {} if rows is None else {name: rows}
        elif _fits(name, state, offered):
            whole[name] = offered[name]
    model.load_state_dict(whole | by_class, strict=False)
    taken = whole.keys() | by_class.keys()
    return Transfer(
        total=len(state),
        whole=tuple(whole),
        by_class=tuple(by_class),
        classes=tuple(names[here] for here in namesakes) if namesakes and by_class else (),
        left_out=tuple(name for name in state if name not in taken),
        unused=tuple(name for name in offered if name not in taken),
    )


def _without_anchors(entries: Entries) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in entries.items() if not name.endswith(".anchors")}


def _fits(name: str, state: Entries, offered: Entries) -> bool:
    counted = name.removesuffix(_COUNTER) + "running_mean" if name.endswith(_COUNTER) else name
    return all(one in state and one in offered and state[one].shape == offered[one].shape for one in (name, counted))


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
) -> Tensor | None:
    """`start`, (A * (5 + C), ...) of a head, with the rows that `offered` has for it; None where they do not fit."""
    rows, given = start.clone().unflatten(0, (-1, _OTHERS + classes)), offered.unflatten(0, (-1, _OTHERS + learned))
    if len(rows) != len(given) or rows.shape[2:] != given.shape[2:]:
        return None
    mine, theirs = (
        [*range(_OTHERS), *(_OTHERS + number for number in some)] for some in (namesakes.keys(), namesakes.values())
    )
    rows[:, mine] = given[:, theirs].to(rows)
    return rows.flatten(0, 1)
