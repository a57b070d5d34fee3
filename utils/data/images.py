"""Image files to pixels: decoding (BGR, EXIF orientation honoured) and base images.

A base image is a decoded image resized so that its long side is imgsz; plans are made in its frame. For training, JPEGs
that are much larger are decoded at a half, a quarter or an eighth of their size, which is up to four times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.structures import LabelStore, UserError

ImageSource = Callable[[int], np.ndarray]  # index into a LabelStore -> its base image, (H, W, 3) u8 BGR, read-only

# What OpenCV decodes, by suffix; a build without one of them makes a finding of such a file
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .exr .gif .hdr .jfif .jp2 .jpe .jpeg .jpg .jxl .pam .pbm .pfm .pgm .png .pnm .ppm .ras .sr .tif"
    " .tiff .webp".split()
)

_JPEG_START = b"\xff\xd8\xff"
_PNG_END = b"IEND\xae\x42\x60\x82"  # the type of the last chunk, and the checksum that it always has


class ImageError(ValueError):
    """An image file that cannot be used; the message says why, in a few words."""


_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def decode_image(path: Path | str) -> np.ndarray:
    """(H, W, 3) u8 BGR. Raises ImageError for a file that is missing, empty, truncated or no image."""
    return _decoded(_file_content(path), 1)


def _file_content(path: Path | str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or "unreadable") from None
    if not data:
        raise ImageError("empty file")
    if not is_complete(data):
        raise ImageError("truncated")
    return data


def _decoded(data: bytes, reduction: int) -> np.ndarray:
    """(H, W, 3) u8 BGR, each side a `reduction`-th, rounded up."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduction])
    except cv2.error:
        image = None
    if image is None:
        raise ImageError("not an image that OpenCV can decode")
    return image


def is_complete(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end marker; libjpeg would fill what is missing with grey and say nothing."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _PNG_END in data  # other bytes may follow it
    if data.startswith(_JPEG_START):
        return data.rfind(b"\xff\xd9") > _jpeg_scan_start(data)
    return True


def _jpeg_scan_start(data: bytes) -> int:
    """Offset of the first entropy-coded scan: an embedded EXIF thumbnail before it has an end marker of its own."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return position
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return len(data)


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """OpenCV's own lines on damaged files are left out: an ImageError says it once, and names the file."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def base_shape(size: tuple[int, int], imgsz: int) -> tuple[int, int]:
    """Height and width of the base image of an image of `size` (height, width)."""
    height, width = size
    ratio = imgsz / max(height, width)
    return max(round(height * ratio), 1), max(round(width * ratio), 1)


def base_scale(size: tuple[int, int], imgsz: int) -> tuple[float, float]:
    """Factors (x, y) from source px to base-image px. They differ a little, as base images have whole sides."""
    height, width = base_shape(size, imgsz)
    return width / size[1], height / size[0]


def base_shapes(sizes: np.ndarray, imgsz: int) -> np.ndarray:
    """`base_shape` of (I, 2) heights and widths at once -> (I, 2) i32."""
    return np.maximum(np.rint(sizes * (imgsz / sizes.max(1, keepdims=True))), 1).astype(np.int32)


def base_scales(sizes: np.ndarray, imgsz: int) -> np.ndarray:
    """`base_scale` of (I, 2) heights and widths at once -> (I, 2) factors for x and y."""
    return (base_shapes(sizes, imgsz) / sizes)[:, ::-1]


def base_reduction(size: tuple[int, int], imgsz: int) -> int:
    """By how much a JPEG of `size` (height, width) is decoded smaller when it trains: 1, 2, 4 or 8."""
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or max(size) >= factor * imgsz)


def base_image(path: Path | str, imgsz: int, *, size: tuple[int, int], area: bool = False) -> np.ndarray:
    """Decode and resize to the base image, bilinear; `area` averages when shrinking, as evaluation does.

    `size` is the height and width that the image is known to have. Raises ImageError, also for another size.
    """
    data = _file_content(path)
    reduction = 1 if area or not data.startswith(_JPEG_START) else base_reduction(size, imgsz)
    image = _decoded(data, reduction)
    if image.shape[:2] != tuple(-(-side // reduction) for side in size):
        raise ImageError(f"not of {size[1]} x {size[0]} px any more")
    if any(side % reduction for side in size):
        return _resized_exactly(image, base_shape(size, imgsz), size, reduction)
    return resized_to_base(image, base_shape(size, imgsz), area=area)


def resized_to_base(image: np.ndarray, shape: tuple[int, int], *, area: bool) -> np.ndarray:
    """The base image, of height and width `shape`, of a decoded image; itself where it has that size already."""
    if shape == image.shape[:2]:
        return image
    averages = area and max(shape) < max(image.shape[:2])
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA if averages else cv2.INTER_LINEAR)


def _resized_exactly(reduced: np.ndarray, shape: tuple[int, int], size: tuple[int, int], reduction: int) -> np.ndarray:
    """As cv2.resize, of an image whose last row or column stands for less of the source of `size` than the others.

    To resize it as if it were whole would move what it shows by up to one base px.
    """
    scale_y, scale_x = (new / old * reduction for new, old in zip(shape, size))
    centres = np.array([[scale_x, 0, (scale_x - 1) / 2], [0, scale_y, (scale_y - 1) / 2]])  # OpenCV counts from these
    return cv2.warpAffine(reduced, centres, shape[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@dataclass(frozen=True, kw_only=True)
class BaseImages:
    """The ImageSource that decodes an image of the store from its file each time."""

    store: LabelStore
    imgsz: int
    area: bool = False  # as evaluation has it

    def __call__(self, image: int) -> np.ndarray:
        """Raises UserError when the image is no longer what it was when the data set was scanned."""
        path, (height, width) = self.store.path(image), self.store.sizes[image].tolist()
        try:
            return base_image(path, self.imgsz, size=(height, width), area=self.area)
        except ImageError as error:
            raise UserError(f"{path}: {error}, though it was fine when the data set was scanned") from None
