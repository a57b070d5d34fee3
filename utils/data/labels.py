"""Labels between their files and the LabelStore: what every format is read into, and the checks that all share.

A bad row costs that box, never the image; only a class beyond `names` is an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One defect of a data set. `line` is 0 where it concerns the whole file."""

    file: str  # for people: from `shown_path`
    line: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """Boxes of n images in one table, as their files say or, after `checked`, in source px; R rows.

    Rows follow the images. Rings and points are packed as in LabelStore.
    """

    image_of: np.ndarray  # (R,) i64, 0 <= image_of < n, ascending
    classes: np.ndarray  # (R,) i64
    boxes: np.ndarray  # (R, 4) f64 xyxy
    ignore: np.ndarray  # (R,) u8: 0, DIFFICULT or CROWD
    area: np.ndarray  # (R,) f64 px^2; NaN: that of the box
    ring_offsets: np.ndarray  # (R + 1,) i64
    point_offsets: np.ndarray  # (rings + 1,) i64
    points: np.ndarray  # (Q, 2) f64 xy, of boxes that were drawn as polygons


@dataclass(frozen=True, kw_only=True)
class FileLabels:
    """What label files say of n images that nobody has looked at yet."""

    rows: LabelRows  # boxes and points as fractions of the image where `relative`, else in px
    relative: bool
    lines: np.ndarray  # (R,) i64 where in its file a row stands; 0: the format has no lines
    image_ids: np.ndarray  # (n,) i64, -1 where there is none
    declared: np.ndarray  # (n, 2) i32 height and width as the file says, 0 where it does not
    findings: tuple[Finding, ...]  # of rows that could not be read, and of whole files


class Source(Protocol):
    """Some images of a split and where their labels are. Pickles into the few bytes that its images need."""

    images: Sequence[str]  # image files, in a stable order
    label_files: Sequence[str]  # what labels depend on: one for each image, or one for all
    category_ids: Sequence[int]  # by class, -1 where the format has none

    def part(self, start: int, stop: int) -> Source:
        """The images start:stop."""

    def chosen(self, keep: np.ndarray) -> Source:
        """The images where `keep` (n,) bool."""

    def label_file(self, image: int) -> str:
        """The file that the labels of an image stand in."""

    def read(self, names: Sequence[str]) -> FileLabels:
        """The labels of all its images. Raises UserError, naming file and line, for a class that is not in `names`."""


def shown_path(path: Path | str) -> str:
    """A path as text that any terminal and file takes: names on Linux are bytes, and need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def checked(
    source: Source, labels: FileLabels, sizes: np.ndarray, orientations: np.ndarray
) -> tuple[LabelRows, list[Finding]]:
    """The rows worth keeping, in source px, and what was wrong with the others.

    `sizes` (n, 2) i32 height and width of the images as shown, 0 where an image cannot be used: its rows go silently.
    `orientations` (n,) the EXIF orientation 1..8 that `sizes` allow for.
    """
    raise NotImplementedError
