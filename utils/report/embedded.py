"""Pictures as data URIs, made smaller where they are large, so that a page holds all that it shows."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.data.images import quiet_opencv

_LONGEST_SIDE = 1600  # px
_JPEG_QUALITY = 82
_SHARE_OF_BYTES = 0.62  # of a picture as OpenCV writes it, at this quality
_KINDS = {".jpg": "jpeg", ".png": "png"}


@dataclass(frozen=True)
class EmbeddedPicture:
    uri: str
    width: int  # px
    height: int


def embedded(path: Path, *, most_bytes: int) -> EmbeddedPicture | None:
    """The picture as it is, or as the largest JPEG that has so many bytes at most; None where it cannot be read."""
    try:
        content = path.read_bytes()
        with quiet_opencv():
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    except (OSError, cv2.error):
        return None
    if image is None:
        return None
    height, width = image.shape[:2]
    kind = _KINDS[path.suffix]
    if len(content) > most_bytes:
        guess = math.sqrt(most_bytes / (_SHARE_OF_BYTES * len(content)))  # bytes go with the area
        content, kind = _shrunk(image, most_bytes, min(guess, _LONGEST_SIDE / max(height, width), 1.0)), "jpeg"
    return EmbeddedPicture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height)


def _shrunk(image: np.ndarray, most_bytes: int, scale: float) -> bytes:
    """A JPEG of so many bytes at most, of the image at this scale or, where that takes more, a smaller one."""
    height, width = image.shape[:2]
    while True:
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        smaller = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        content = cv2.imencode(".jpg", smaller, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
        if len(content) <= most_bytes or max(size) == 1:
            return content
        scale *= min(0.96 * math.sqrt(most_bytes / len(content)), 0.9)
