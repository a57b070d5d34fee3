"""What the soak test trains: small data sets, a network that an epoch takes a second of, and variants of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import yaml

from utils.data.shapes import draw_picture

EPOCHS = 3
_NAMES = ("circle", "triangle", "square", "star", "cross")
_MANY = 4200  # images, from 4096 of which on a scan has processes
_NETWORK = {
    "nc": len(_NAMES),
    "depth_multiple": 0.33,
    "width_multiple": 0.5,
    "anchors": [[10, 13, 33, 23], [30, 61, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [64, 6, 2, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C3", [128]],  # 3, stride 8
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 1, "SPPF", [256, 5]],  # 5, stride 16
    ],
    "head": [
        [-1, 1, "Conv", [128, 1, 1]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 3, "C3", [128, False]],  # 9
        [[9, 5], 1, "Detect", ["nc", "anchors"]],
    ],
}
_HYP = {"lr0": 0.01, "warmup_epochs": 1.0, "box": 0.2, "mosaic": 0.5, "mixup": 0.2, "degrees": 5.0, "cutout": 0.2}
_LEARNS_FAST = {"lr0": 0.02, "lrf": 1.0, "warmup_epochs": 0.0, "box": 0.2, "mosaic": 0.0, "scale": 0.2}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train, on the data set of this name. `workers` are those of the run that nobody kills."""

    name: str
    flags: Sequence[str] = ()
    hyp: Mapping[str, float] = field(default_factory=dict)
    workers: int = 0
    data: str = "shapes"
    batch: int = 8
    nominal: int = 8  # images per update
    epochs: int = EPOCHS
    save_every: float = 0.005  # minutes: some checkpoints per epoch
    pictures: bool = False

    @property
    def caches_images(self) -> bool:
        return "--cache" in self.flags


_ADAM = {"lr0": 0.001, "warmup_bias_lr": 0.001}
VARIANTS = (
    Variant(name="plain", workers=2),
    Variant(name="multi-scale", flags=["--multi-scale"]),
    Variant(name="image weights", flags=["--image-weights"], workers=2),
    Variant(name="quad", flags=["--quad"]),
    Variant(name="rect", flags=["--rect"], workers=2),
    Variant(name="Adam", flags=["--optimizer", "Adam"], hyp=_ADAM),
    Variant(name="bf16", flags=["--amp", "bf16"], workers=2),
    Variant(name="close mosaic", hyp={"mosaic": 1.0, "mosaic9": 0.5, "close_mosaic": 1.0}),
    Variant(name="cache ram", flags=["--cache", "ram"], workers=2),
    Variant(name="cache disk", flags=["--cache", "disk"]),
    Variant(name="accumulation", nominal=40, workers=2),  # 5 batches an update, of 12 an epoch
    Variant(name="saves at ends", save_every=0.0),
    Variant(name="saves always", save_every=1e-6, workers=2),
    Variant(name="noval", flags=["--noval"]),
    Variant(name="nosave", flags=["--nosave"], save_every=0.0),
    Variant(name="pictures", pictures=True, workers=2),
    Variant(name="many images", data="many", batch=128, nominal=128, epochs=1, workers=2),
)
QUICK = Variant(
    name="quick", flags=["--multi-scale", "--image-weights"], batch=4, nominal=8, workers=1, save_every=0.002
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The files that all runs of a soak test share."""

    folder: Path
    weights: Path | None  # to start from, so that figures are none of zeros

    def write_settings(self, variant: Variant, folder: Path, stem: str) -> list[str]:
        """Data YAML, named `stem` as caches then are, and hyp YAML in `folder`; the flags of train.py."""
        sizes = {"shapes": 64, "many": 32}
        data = {"path": str(self.folder / variant.data), "train": "images/train", "val": "images/val"}
        files = {stem: {**data, "names": list(_NAMES)}, "hyp": _HYP | dict(variant.hyp)}
        for name, content in files.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        flags = ["--data", str(folder / f"{stem}.yaml"), "--hyp", str(folder / "hyp.yaml")]
        flags += ["--weights", str(self.weights)] if self.weights else ["--cfg", str(self.network)]
        flags += ["--imgsz", str(sizes[variant.data]), "--batch-size", str(variant.batch)]
        flags += ["--nominal-batch", str(variant.nominal), "--epochs", str(variant.epochs), "--device", "cpu"]
        flags += [] if "--amp" in variant.flags else ["--amp", "off"]
        flags += [] if variant.pictures else ["--noplots"]
        flags += ["--save-every", str(variant.save_every)] if variant.save_every else []
        return [*flags, *variant.flags, "--cache-dir", str(folder / "caches"), "--project", str(folder)]

    @property
    def network(self) -> Path:
        return self.folder / "network.yaml"

    def flags_for_weights(self) -> list[str]:
        """Of a run that teaches the network to see something."""
        learns = Variant(name="start", hyp=_LEARNS_FAST, epochs=25, save_every=0.0, flags=["--noval"])
        return self.write_settings(learns, self.folder, "start")


def draw(folder: Path, *, quick: bool) -> None:
    """The data sets, and the network."""
    (folder / "network.yaml").write_text(yaml.safe_dump(_NETWORK, sort_keys=False))
    for number, (split, count) in enumerate({"train": 24, "val": 16}.items() if quick else _COUNTS.items()):
        for index in range(count):
            picture = draw_picture(np.random.default_rng((0, number, index)))
            height, width = picture.shape
            boxes = picture.boxes / (width, height, width, height)
            _write(folder / "shapes", split, f"{index:03d}", picture.jpeg, picture.classes, boxes)
    if not quick:
        rng = np.random.default_rng(0)
        for split, count in (("train", _MANY), ("val", 64)):
            for index in range(count):
                noise = cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (32, 32))
                box = np.array([[0.25, 0.25, 0.75, 0.75]])
                _write(folder / "many", split, f"{index:04d}", cv2.imencode(".jpg", noise)[1].tobytes(), [0], box)


_COUNTS = {"train": 96, "val": 64}


def _write(folder: Path, split: str, name: str, jpeg: bytes, classes: Sequence[int], boxes: np.ndarray) -> None:
    """An image and its labels; boxes are (N, 4) xyxy fractions of it."""
    images, labels = folder / "images" / split, folder / "labels" / split
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    (images / f"{name}.jpg").write_bytes(jpeg)
    rows = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    lines = (" ".join([str(kind), *(f"{value:.6f}" for value in row)]) for kind, row in zip(classes, rows))
    (labels / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
