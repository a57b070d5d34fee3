import numpy as np
import pytest
import torch

from utils.evaluate.matching import Labels
from utils.structures import Detections


@pytest.fixture(scope="session")
def random_scene():
    return _random_scene


def _random_scene(generator: np.random.Generator, num_classes: int, *, most=12, coarse=False, excused=0.0):
    """Labels of one image and detections scattered around them, some wrong, some twice."""
    count, extra = generator.integers(0, most), generator.integers(0, most)
    corner, sides = generator.uniform(0, 60, (count, 2)), generator.uniform(5, 40, (count, 2))
    true = np.concatenate([corner, corner + sides], 1)
    classes = generator.integers(0, num_classes, count)
    source = generator.integers(0, count, 2 * count + extra) if count else np.empty(0, int)
    boxes = true[source] + generator.normal(0, 2, (len(source), 4))
    scores = generator.uniform(0.01, 1, len(source))
    if coarse:  # ties of boxes and of scores
        true, boxes, scores = true.round(-1), boxes.round(-1), scores.round(1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    true[:, 2:] = np.maximum(true[:, 2:], true[:, :2] + 1)
    guess = np.where(
        generator.random(len(source)) < 0.8, classes[source], generator.integers(0, num_classes, len(source))
    )
    crowd = generator.random(count) < excused
    found = Detections(
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        scores=torch.from_numpy(scores.astype(np.float32)),
        classes=torch.from_numpy(guess),
    )
    return found, Labels(boxes=true.astype(np.float32), classes=classes, ignore=crowd, crowd=crowd)
