"""The pictures of a run: files in its folder, and some for loggers on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from utils.data.loader import UnpaintedBatch
from utils.report import mosaics, plots
from utils.report.annotate import write_image
from utils.report.logger import Guard
from utils.structures import Batch, Detections, LabelStore, Metrics

_OF_TRAINING = ("labels.jpg", "labels_correlogram.jpg", "train_batch*.jpg")
OF_THE_END = (
    *("val_batch*_labels.jpg", "val_batch*_pred.jpg", "worst_images.jpg", "results.png"),
    *("*_curve.png", "confusion_matrix*.png"),
)


def clear_pictures(folder: Path, *, all_of_them: bool) -> None:
    """Remove those of a final evaluation, which is still to come; or all, where another run begins in the folder."""
    for pattern in (*OF_THE_END, *(_OF_TRAINING if all_of_them else ())):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


class Pictures:
    """The pictures of a run. This class draws none: it is the null object of `--noplots`."""

    batches: ClassVar[int] = 0  # so many from the first are drawn

    def labels(self) -> None:
        """The label statistics of the training split."""

    def train_batch(self, index: int, batch: Batch | UnpaintedBatch) -> np.ndarray | None:
        """A training batch as the network sees it: a file, and the same (H, W, 3) u8 RGB for loggers."""

    def progress(self, batch: Batch, detections: Sequence[Detections]) -> np.ndarray | None:
        """Some images of a batch with their labels and, beside these, with what is detected; for loggers alone."""

    def evaluated_batch(self, index: int, batch: Batch, detections: Sequence[Detections]) -> None:
        """A batch of the final evaluation: labels, and detections in network px."""

    def finished(self, metrics: Metrics, best_epoch: int | None = None) -> None:
        """Curves and the worst images of the final evaluation, and curves of the run where there was one.

        Without any label there are none of the evaluation.
        """


@dataclass(frozen=True)
class PictureFiles(Pictures):
    """Pictures in a folder."""

    batches: ClassVar[int] = 3
    folder: Path
    names: tuple[str, ...]
    val: LabelStore
    train: LabelStore | None = None  # where there is no training, there are no pictures of it

    def labels(self) -> None:
        plots.plot_labels(self.train, self.names, self.folder)

    def train_batch(self, index: int, batch: Batch | UnpaintedBatch) -> np.ndarray | None:
        if index >= self.batches:
            return None
        batch = batch.to(torch.device("cpu"))
        picture = self._drawn(f"Training batch {index}, as the network sees it", batch, _labels(batch), self.train)
        write_image(picture, self.folder / f"train_batch{index}.jpg")
        return picture

    def progress(self, batch: Batch, detections: Sequence[Detections]) -> np.ndarray | None:
        found = self._found(batch, detections)
        captions = [self.val.path(image) for image in batch.indices.tolist()]
        return mosaics.draw_pairs(batch.images.numpy(), _labels(batch), found, self.names, captions)

    def evaluated_batch(self, index: int, batch: Batch, detections: Sequence[Detections]) -> None:
        if index >= self.batches:
            return
        least = f"{mosaics.SHOWN_CONFIDENCE:g}"
        for file, title, shown in (
            ("labels", f"Batch {index} of the evaluation: labels", _labels(batch)),
            (
                "pred",
                f"Batch {index} of the evaluation: predicted, confidence from {least}",
                self._found(batch, detections),
            ),
        ):
            write_image(self._drawn(title, batch, shown, self.val), self.folder / f"val_batch{index}_{file}.jpg")

    def _found(self, batch: Batch, detections: Sequence[Detections]) -> mosaics.DrawnBoxes:
        found = replace(
            batch,
            boxes=torch.cat([one.boxes.cpu() for one in detections]),
            classes=torch.cat([one.classes.cpu() for one in detections]),
            image_of=torch.cat([torch.full((len(one.scores),), image) for image, one in enumerate(detections)]),
        )
        scores = torch.cat([one.scores.cpu() for one in detections]).numpy()
        return replace(_labels(_cut_to_images(found, self.val)), scores=scores)

    def finished(self, metrics: Metrics, best_epoch: int | None = None) -> None:
        if metrics.labels:  # else there is nothing to judge by
            self._judgements(metrics)
        if (self.folder / "results.csv").exists():
            plots.plot_results(self.folder / "results.csv", self.folder / "results.png", best_epoch=best_epoch)

    def _judgements(self, metrics: Metrics) -> None:
        plots.plot_curves(metrics, self.folder)
        plots.plot_confusion(metrics.confusion, self.names, self.folder)
        mosaics.plot_worst(
            metrics.worst,
            self.val,
            self.names,
            self.folder / "worst_images.jpg",
            confidence=metrics.best_confidence if metrics.f1 else None,
        )

    def _drawn(self, title: str, batch: Batch, shown: mosaics.DrawnBoxes, store: LabelStore) -> np.ndarray:
        captions = None if batch.placements is None else [store.path(image) for image in batch.indices.tolist()]
        return mosaics.draw_batch(batch.images.numpy(), shown, self.names, title=title, captions=captions)


def _labels(batch: Batch) -> mosaics.DrawnBoxes:
    return mosaics.DrawnBoxes(batch.boxes.numpy(), batch.classes.numpy(), batch.image_of.numpy())


class GuardedPictures(Pictures):
    """Pictures that may fail, as on a full disk."""

    def __init__(self, pictures: Pictures, guard: Guard) -> None:
        self._pictures, self._guard = pictures, guard

    @property
    def batches(self) -> int:
        return 0 if self._guard.failed else self._pictures.batches

    def labels(self) -> None:
        self._guard(self._pictures.labels)

    def train_batch(self, index: int, batch: Batch | UnpaintedBatch) -> np.ndarray | None:
        return self._guard(self._pictures.train_batch, index, batch)

    def progress(self, batch: Batch, detections: Sequence[Detections]) -> np.ndarray | None:
        return self._guard(self._pictures.progress, batch, detections)

    def evaluated_batch(self, index: int, batch: Batch, detections: Sequence[Detections]) -> None:
        self._guard(self._pictures.evaluated_batch, index, batch, detections)

    def finished(self, metrics: Metrics, best_epoch: int | None = None) -> None:
        self._guard(self._pictures.finished, metrics, best_epoch)


def _cut_to_images(batch: Batch, store: LabelStore) -> Batch:
    """Its boxes without what lies on the padding around the images."""
    if batch.placements is None:
        return batch
    height, width = torch.from_numpy(store.sizes[batch.indices.numpy()]).double().unbind(1)
    scale, shift = batch.placements[:, [0, 1], [0, 1]], batch.placements[:, :2, 2]
    low, high = shift, shift + scale * torch.stack([width, height], 1)  # (B, 2)
    of_boxes = batch.boxes.reshape(-1, 2, 2)
    low, high = low[batch.image_of, None].to(of_boxes), high[batch.image_of, None].to(of_boxes)
    return replace(batch, boxes=of_boxes.maximum(low).minimum(high).flatten(1))
