"""Image files to pixels: decoding (BGR, EXIF orientation honoured) and base images.

A base image is a decoded image resized so that its long side is imgsz; plans are made in its frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

# What OpenCV decodes, by suffix; a build without one of them makes a finding of such a file
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .exr .gif .hdr .jfif .jp2 .jpe .jpeg .jpg .jxl .pam .pbm .pfm .pgm .png .pnm .ppm .ras .sr .tif"
    " .tiff .webp".split()
)

_PNG_END = b"IEND\xae\x42\x60\x82"  # the type of the last chunk, and the checksum that it always has


class ImageError(ValueError):
    """An image file that cannot be used; the message says why, in a few words."""


def decode_image(path: Path | str) -> np.ndarray:
    """(H, W, 3) u8 BGR. Raises ImageError for a file that is missing, empty, truncated or no image."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or "unreadable") from None
    if not data:
        raise ImageError("empty file")
    if not is_complete(data):
        raise ImageError("truncated")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise ImageError("not an image that OpenCV can decode")
    return image


def is_complete(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end marker; libjpeg would fill what is missing with grey and say nothing."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _PNG_END in data  # other bytes may follow it
    if data[:3] == b"\xff\xd8\xff":
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


def base_scales(sizes: np.ndarray, imgsz: int) -> np.ndarray:
    """`base_scale` of (I, 2) heights and widths at once -> (I, 2) factors for x and y."""
    ratio = imgsz / sizes.max(1, keepdims=True)
    return (np.maximum(np.rint(sizes * ratio), 1) / sizes)[:, ::-1]


def base_image(path: Path | str, imgsz: int, *, area: bool = False) -> np.ndarray:
    """Decode and resize to the base image, bilinear; `area` averages when shrinking, as evaluation does."""
    image = decode_image(path)
    height, width = base_shape(image.shape[:2], imgsz)
    if (height, width) == image.shape[:2]:
        return image
    shrinks = imgsz < max(image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if area and shrinks else cv2.INTER_LINEAR)
