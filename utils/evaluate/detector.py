"""Images in, boxes out: a trained network with all that it takes to use it, for detect.py and for Python.

The surprise: images go through the very plan, network and NMS of evaluation, as a data set without labels would.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import torch

from models.yolo import DetectionModel
from utils.checkpoint import averaged_model, load_weights
from utils.clock import EVALUATION_PARTS, StepClock
from utils.config import LARGEST_IMGSZ, whole_strides
from utils.data.images import ImageError, decode_image
from utils.data.labels import shown_path
from utils.data.loader import EvalBatches
from utils.data.media import Picture, picture_of, read_ahead
from utils.data.store import plain_store
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.evaluate.predict import for_evaluation, predicted, to_source
from utils.machine import usable_cores
from utils.runtime import Runtime, choose_runtime
from utils.structures import Detections, UserError

# A path; (H, W, 3) u8 RGB, (H, W) grey or (H, W, 4) with alpha, which is left out; or an image of PIL
Image: TypeAlias = "str | os.PathLike[str] | np.ndarray | Any"

NON_FINITE = "the network computed NaN or infinity, so boxes may be missing; the weights may be damaged"

_WINDOW_BYTES = 256 << 20  # of pixels that are in the network's hands at once
_NAMES_SHOWN = 10  # of classes, in an error line


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found in a picture, in px of the picture as it is shown."""

    picture: Picture
    detections: Detections  # best first
    cut: bool  # there were more candidates than NMS looks at
    non_finite: bool  # the network said NaN or infinity somewhere


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A trained network, ready to be asked."""

    network: DetectionModel = field(repr=False)  # as `for_evaluation` yields it
    names: tuple[str, ...]  # of the classes
    imgsz: int  # px, a multiple of the network's strides
    runtime: Runtime

    def detect(
        self,
        images: Image | Iterable[Image],
        *,
        confidence: float = 0.25,
        iou: float = 0.45,
        max_detections: int = 1000,
        classes: Sequence[int] = (),
        agnostic: bool = False,
        augment: bool = False,
        batch_size: int = 16,
    ) -> list[Detections]:
        """What is found in each image, best first: boxes xyxy in px of the image, scores, classes; on the CPU.

        `images` is one or several: paths, u8 arrays (H, W, 3) in the order RGB, as PIL and matplotlib have them (for
        OpenCV's BGR give `image[..., ::-1]`), or PIL images, whose EXIF orientation is not applied, as theirs never is;
        that of files is. `confidence` is what a score must exceed, `iou` above what the weaker of two boxes of a class,
        or with `agnostic` of any, is dropped; `classes` the numbers of those wanted, none: all. Raises UserError, a
        ValueError, for what cannot be used.
        """
        rules = self.rules(
            confidence=confidence, iou=iou, max_detections=max_detections, classes=classes, agnostic=agnostic
        )
        _check_count("batch_size", batch_size)
        found = list(self.stream(_pictures(images, self.imgsz), rules, batch_size=batch_size, augment=augment))
        broken = [index for index, one in enumerate(found) if one.non_finite]
        if broken:
            more = f" and {len(broken) - 1:,} more" if len(broken) > 1 else ""
            warnings.warn(f"image {broken[0]}{more}: {NON_FINITE}", stacklevel=2)
        return [one.detections for one in found]

    def rules(
        self, *, confidence: float, iou: float, max_detections: int, classes: Sequence[int], agnostic: bool
    ) -> NmsRules:
        """As NMS takes them. Raises UserError where they make no sense, or name a class that is not there."""
        for name, value in (("confidence", confidence), ("iou", iou)):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"{name} {value!r}: should be a number from 0 to 1")
        _check_count("max_detections", max_detections)
        if not isinstance(classes, Iterable):
            raise UserError(f"classes {classes!r}: should be a list of numbers, of {self._classes_there()}")
        wanted = tuple(classes)
        for number in wanted:
            if not isinstance(number, (int, np.integer)) or number not in range(len(self.names)):
                raise UserError(f"classes {number!r}: should be of {self._classes_there()}")
        return NmsRules(
            confidence=float(confidence),
            iou=float(iou),
            max_detections=max_detections,
            agnostic=agnostic,
            classes=tuple(sorted(set(map(int, wanted)))),
        )

    def _classes_there(self) -> str:
        listed = ", ".join(f"{number} ({name})" for number, name in enumerate(self.names[:_NAMES_SHOWN]))
        more = f", ... {len(self.names) - 1} ({self.names[-1]})" if len(self.names) > _NAMES_SHOWN else ""
        return listed + more

    def stream(
        self,
        pictures: Iterable[Picture],
        rules: NmsRules,
        *,
        batch_size: int,
        augment: bool = False,
        clock: StepClock | None = None,
    ) -> Iterator[Found]:
        """What is found in pictures, whose bases are of this imgsz, in their order, some of them at a time.

        The clock takes down EVALUATION_PARTS, in which the time between two pictures taken is nobody's.
        """
        clock = clock or StepClock(EVALUATION_PARTS)
        clock.skip()
        for window in _windows(pictures, batch_size):
            found = self._found(window, rules, batch_size, augment, clock)
            clock.skip()
            yield from found
            clock.skip()

    def warm_up(self) -> None:
        """Let be done what only the first image has to wait for, such as imports, with a very small one."""
        small = replace(self, imgsz=2 * max(self.network.head.strides))
        speck = picture_of(np.zeros((8, 8, 3), np.uint8), small.imgsz)
        list(small.stream([speck], NmsRules(confidence=0.0, max_detections=1), batch_size=1))

    @torch.no_grad()
    def _found(
        self, window: Sequence[Picture], rules: NmsRules, batch_size: int, augment: bool, clock: StepClock
    ) -> list[Found]:
        batches = EvalBatches(
            store=plain_store(np.array([picture.size for picture in window])),
            images=lambda image: window[image].base,
            imgsz=self.imgsz,
            batch_size=batch_size,
            stride=max(self.network.head.strides),
        )
        found: dict[int, Found] = {}
        for batch in map(batches.batch, batches.numbers()):
            clock.lap("load")
            predictions, _ = predicted(self.network, batch, self.runtime, augment=augment)
            clock.lap("network")
            suppressed = non_max_suppression(predictions, rules)
            for row, index in enumerate(batch.indices.tolist()):
                picture = window[index]
                found[index] = Found(
                    picture=picture,
                    detections=to_source(suppressed.detections[row], batch.placements[row], picture.size),
                    cut=bool(suppressed.cut[row]),
                    non_finite=bool(suppressed.non_finite[row]),
                )
            clock.lap("nms")
        clock.count(len(window))
        return [found[index] for index in range(len(window))]


def load_detector(path: str | Path, *, device: str, imgsz: int | None) -> Detector:
    """See `models.yolo.load`."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UserError(f"path {path!r}: should be that of a checkpoint, such as runs/train/exp/weights/best.pt")
    if imgsz is not None:
        _check_count("imgsz", imgsz)
        if imgsz > LARGEST_IMGSZ:
            raise UserError(f"imgsz {imgsz}: should be {LARGEST_IMGSZ} or less")
    benchmark = torch.backends.cudnn.benchmark
    runtime = choose_runtime(device=str(device), amp="off", workers=0)
    torch.backends.cudnn.benchmark = benchmark  # the rest of the program is not ours
    return detector_of(Path(path), runtime=runtime, imgsz=imgsz, note=lambda text: warnings.warn(text, stacklevel=4))


def detector_of(path: Path, *, runtime: Runtime, imgsz: int | None, note: Callable[[str], object]) -> Detector:
    """The detector of a checkpoint, for a runtime. `imgsz` None: that of the training run."""
    checkpoint = load_weights(path)
    model = averaged_model(checkpoint)
    return Detector(
        network=for_evaluation(model, runtime),
        names=tuple(checkpoint["names"]),
        imgsz=whole_strides(imgsz or checkpoint["options"]["imgsz"], max(model.head.strides), note=note),
        runtime=runtime,
    )


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{name} {value!r}: should be a whole number of 1 or more")


def _windows(pictures: Iterable[Picture], most: int) -> Iterator[list[Picture]]:
    """Runs of up to `most` pictures, fewer where these are large."""
    window: list[Picture] = []
    taken = 0
    for picture in pictures:
        window.append(picture)
        taken += 0 if picture.pixels is None else picture.pixels.nbytes
        if len(window) >= most or taken >= _WINDOW_BYTES:
            yield window
            window, taken = [], 0
    if window:
        yield window


# ---- images from Python -------------------------------------------------------------------------------------------


def _pictures(images: Image | Iterable[Image], imgsz: int) -> Iterator[Picture]:
    """In order; some of them are read ahead."""
    threads = min(usable_cores(), 8)
    with ThreadPoolExecutor(threads) as readers:
        try:
            started: Iterator[Future[Picture]] = (
                readers.submit(_picture, image, imgsz, index) for index, image in enumerate(_several(images))
            )
            yield from read_ahead(started, lambda picture: picture.base.nbytes)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _several(images: Image | Iterable[Image]) -> Iterable[Image]:
    single = isinstance(images, (str, bytes, os.PathLike)) or _is_pil(images)
    if single or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    if not isinstance(images, Iterable):
        raise UserError(f"images: {type(images).__name__}: should be {_IMAGES}, or a list of these")
    return images


_IMAGES = "a path, a u8 array (H, W, 3) of RGB or an image of PIL"


def _picture(image: Image, imgsz: int, index: int) -> Picture:
    if not isinstance(image, (str, os.PathLike)):
        return picture_of(_bgr(image, index), imgsz, source=index)
    try:
        return picture_of(decode_image(os.path.expanduser(image)), imgsz, source=index)  # noqa: PTH111
    except ImageError as error:
        raise UserError(f"{shown_path(image)}: {error}") from None


def _bgr(image: Image, index: int) -> np.ndarray:
    """(H, W, 3) u8 BGR."""
    if _is_pil(image):
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise UserError(f"image {index}: {type(image).__name__}: should be {_IMAGES}")
    if image.dtype != np.uint8:
        raise UserError(f"image {index}: an array of {image.dtype}: should be of uint8, 0 to 255")
    channels = 1 if image.ndim == 2 else image.shape[-1]
    if image.ndim not in (2, 3) or channels not in _TO_BGR or not image.size:
        raise UserError(f"image {index}: an array of shape {image.shape}: should be (H, W, 3), (H, W) or (H, W, 4)")
    return cv2.cvtColor(np.ascontiguousarray(image), _TO_BGR[channels])


_TO_BGR = {1: cv2.COLOR_GRAY2BGR, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGR}


def _is_pil(image: Any) -> bool:
    """Whether it is an image of the PIL package, which is not imported: who has one has imported it."""
    package = sys.modules.get("PIL.Image")
    return package is not None and isinstance(image, package.Image)
