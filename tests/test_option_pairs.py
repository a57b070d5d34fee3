"""Every pair of options trains, or is refused by one line that names both."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from utils.checkpoint import load_checkpoint
from utils.config import TrainOptions, validated
from utils.structures import UserError

RUN = Path("runs/train/exp")

# Each option that is switched on, under the flag that its refusals name. What says where things lie is left out.
SWITCHES = {
    "--rect": {"rect": True},
    "--noautoanchor": {"noautoanchor": True},
    "--multi-scale": {"multi_scale": True},
    "--label-smoothing": {"label_smoothing": 0.1},
    "--linear-lr": {"linear_lr": True},
    "--cos-lr": {"cos_lr": True},
    "--image-weights": {"image_weights": True},
    "--repeat-factor": {"repeat_factor": 0.9},
    "--cache ram": {"cache": "ram"},
    "--cache disk": {"cache": "disk"},
    "--strict": {"strict": True},
    "--single-cls": {"single_cls": True},
    "--optimizer Adam": {"optimizer": "Adam"},
    "--optimizer AdamW": {"optimizer": "AdamW"},
    "--sync-bn": {"sync_bn": True},
    "--amp": {"amp": "bf16"},
    "--batch-size": {"batch_size": -1},
    "--nominal-batch": {"nominal_batch": "8"},
    "--workers": {"workers": 1},
    "--compile": {"compile": True},
    "--deterministic": {"deterministic": True},
    "--nosave": {"nosave": True},
    "--noval": {"noval": True},
    "--quad": {"quad": True},
    "--paint": {"paint": "device"},
    "--quiet": {"quiet": True},
    "--freeze": {"freeze": 3},
    "--patience": {"patience": 1},
    "--save-period": {"save_period": 1},
    "--seed": {"seed": 3},
    "--local-rank": {"local_rank": 0},
    "pictures": {"noplots": False},  # --noplots is what the other runs have
    "focal loss": {},  # of the hyp file, and so is what follows
    "mosaic": {},
    "other augmentation": {},
}
HYP = {
    "focal loss": {"fl_gamma": 1.5},
    "mosaic": {"mosaic": 0.7, "mosaic9": 0.3, "mixup": 0.5, "scale": 0.5, "close_mosaic": 1},
    "other augmentation": {"copy_paste": 0.5, "cutout": 0.5, "degrees": 5, "flipud": 0.3},
}
# Of one option: there is no pair to make
ALTERNATIVES = {frozenset(("--optimizer Adam", "--optimizer AdamW")), frozenset(("--cache ram", "--cache disk"))}
REFUSED = {
    frozenset(("--linear-lr", "--cos-lr")),
    frozenset(("--nosave", "--save-period")),
    frozenset(("--noval", "--patience")),
    frozenset(("--noval", "--image-weights")),
    frozenset(("--image-weights", "--repeat-factor")),
}
ON_GPUS = "--sync-bn"  # of several ranks
PAIRS = [pair for pair in map(frozenset, itertools.combinations(SWITCHES, 2)) if pair not in ALTERNATIVES]


def options_of(switches) -> dict:
    return {name: value for switch in switches for name, value in SWITCHES[switch].items()}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join(sorted(pair)))
def test_a_pair_is_valid_or_refused_by_name(pair):
    if pair not in REFUSED:
        validated(TrainOptions, options_of(pair))
        return
    with pytest.raises(UserError) as refusal:
        validated(TrainOptions, options_of(pair))
    line = str(refusal.value)
    assert "\n" not in line
    assert all(flag in line for flag in pair)


def covering_rows() -> list[frozenset[str]]:
    """Sets of switches, every two of them allowed together, in which each two switches are seen in all four ways.

    Greedy: of some random rows, the one that shows the most of what has not been seen.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    names = [name for name in SWITCHES if name != ON_GPUS]
    apart = REFUSED | ALTERNATIVES

    def shown(row: frozenset[str]) -> set:
        return {(a, a in row, b, b in row) for a, b in itertools.combinations(names, 2)}

    def drawn() -> frozenset[str]:
        row: set[str] = set()
        for name in rng.permutation(names).tolist():
            if rng.random() < 0.6 and not any(frozenset((name, other)) in apart for other in row):
                row.add(name)
        return frozenset(row)

    impossible = {(a, True, b, True) for a, b in itertools.combinations(names, 2) if frozenset((a, b)) in apart}
    ways = list(itertools.product((False, True), repeat=2))
    all_pairs = {(a, first, b, second) for a, b in itertools.combinations(names, 2) for first, second in ways}
    unseen = all_pairs - impossible
    rows = []
    while unseen:
        rows.append(max((drawn() for _ in range(100)), key=lambda row: len(unseen & shown(row))))
        unseen -= shown(rows[-1])
    return rows


ROWS = covering_rows()


@pytest.fixture
def unchanged_torch(monkeypatch):
    """--deterministic ends with the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_many_options_at_once_train(row, tiny, unchanged_torch):
    """A run of two epochs gives figures and a complete folder, whatever is switched on."""
    hyp = yaml.safe_load(tiny.hyp.read_text())
    for switch in row & HYP.keys():
        hyp |= HYP[switch]
    tiny.hyp.write_text(yaml.safe_dump(hyp))
    metrics = train.run(**tiny.options(epochs=2) | options_of(row))
    assert all(math.isfinite(figure) for figure in (metrics.precision, metrics.recall, metrics.fitness))
    assert (metrics.images, metrics.labels) == (4, 4)
    weights = {"last.pt", "best.pt"} | ({"epoch1.pt", "epoch2.pt"} if "--save-period" in row else set())
    assert {path.name for path in (RUN / "weights").iterdir()} == weights
    checkpoint = load_checkpoint(RUN / "weights/last.pt")
    epochs = checkpoint["epoch"]
    assert epochs == 2
    assert checkpoint["names"] == (["item"] if "--single-cls" in row else ["blue", "red"])
    table = [[cell.strip() for cell in line.split(",")] for line in (RUN / "results.csv").read_text().splitlines()[1:]]
    assert len(table) == epochs
    for index, cells in enumerate(table):
        evaluated = "--noval" not in row or index + 1 == epochs
        assert [cell != "" for cell in cells] == [True] * 4 + [evaluated] * 7 + [True] * 4
        assert all(math.isfinite(float(cell)) for cell in cells if cell)
    assert json.loads((RUN / "metrics.json").read_text())["images"] == 4
    assert (RUN / "train_batch0.jpg").exists() == (RUN / "results.png").exists() == ("pictures" in row)
