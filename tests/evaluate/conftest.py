import numpy as np
import pytest
import torch

from utils.evaluate.matching import Labels
from utils.structures import Detections


@pytest.fixture(scope="session")
def random_scene():
    return _random_scene


def _random_scene(generator: np.random.Generator, num_classes: int, *, most=12, coarse=False, excused=0.0, span=60):
    """Labels of one image and detections scattered around them, some wrong, some twice.

    `coarse`: ties of boxes, of scores and of IoUs, areas on the limits of ranges. `excused`: share of crowds, and of
    difficult labels. Corners lie within `span` px, and larger objects than 96^2 px come with a span above 100.
    """
    count, extra = generator.integers(0, most), generator.integers(0, most)
    corner = generator.uniform(0, span, (count, 2))
    sides = generator.uniform(5, 40, (count, 2)) * generator.choice([0.5, 1, span / 20], (count, 1))
    true = np.concatenate([corner, corner + sides], 1)
    classes = generator.integers(0, num_classes, count)
    source = generator.integers(0, count, 2 * count + extra) if count else np.empty(0, int)
    boxes = true[source] + generator.normal(0, 2, (len(source), 4))
    scores = generator.uniform(0.01, 1, len(source))
    if coarse:
        true, boxes, scores = (true / 16).round() * 16, (boxes / 16).round() * 16, scores.round(1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    true[:, 2:] = np.maximum(true[:, 2:], true[:, :2] + 1)
    guess = np.where(
        generator.random(len(source)) < 0.8, classes[source], generator.integers(0, num_classes, len(source))
    )
    crowd, difficult = generator.random((2, count)) < excused
    sides = true[:, 2:] - true[:, :2]
    found = Detections(
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        scores=torch.from_numpy(scores.astype(np.float32)),
        classes=torch.from_numpy(guess),
    )
    truth = Labels(
        xywh=np.concatenate([true[:, :2], sides], 1),
        classes=classes,
        area=sides.prod(1) * generator.choice([1, 0.7], count),
        ignore=crowd | difficult,
        crowd=crowd,
    )
    return found, truth
