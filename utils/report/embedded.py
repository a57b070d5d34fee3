"""Pictures as data URIs, made smaller where they are large, so that a page holds all that it shows."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

_SIDES = (1600, 1280, 1024, 800, 640, 480)  # px, of the longer side
_JPEG_QUALITY = 82
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
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    except (OSError, cv2.error):
        return None
    if image is None:
        return None
    height, width = image.shape[:2]
    kind = _KINDS[path.suffix]
    if len(content) > most_bytes:
        content, kind = _shrunk(image, most_bytes), "jpeg"
    return EmbeddedPicture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height)


def _shrunk(image: np.ndarray, most_bytes: int) -> bytes:
    height, width = image.shape[:2]
    content = b""
    for side in _SIDES:
        scale = min(side / max(height, width), 1.0)
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        smaller = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        content = cv2.imencode(".jpg", smaller, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
        if len(content) <= most_bytes:
            break
    return content
