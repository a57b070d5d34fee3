import pytest
import torch

from models.yolo import DetectionModel, decode, read_network
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.evaluate.predict import for_evaluation, predicted
from utils.hyp import hyperparameters
from utils.loss import LossGains
from utils.runtime import Runtime
from utils.structures import Batch, HeadSpec


def runtime(amp_dtype=None) -> Runtime:
    return Runtime(device=torch.device("cpu"), amp_dtype=amp_dtype, workers=0)


def batch_of(images: torch.Tensor) -> Batch:
    count = len(images)
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        boxes=torch.tensor([[4.0, 4, 20, 24]]),
        classes=torch.tensor([0]),
        image_of=torch.tensor([0]),
        indices=torch.arange(count),
    )


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class FindsWhite:
    """A network that claims, in each image, the box of the white pixels, and is sure of nothing else."""

    stride, anchor = 16, 64.0

    def __init__(self):
        self.seen = []
        self.head = HeadSpec(strides=(self.stride,), anchors=torch.full((1, 1, 2), self.anchor), num_classes=1)

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        B, _, H, W = images.shape
        assert H % self.stride == W % self.stride == 0
        self.seen.append((images.shape, images.dtype))
        raw = torch.full((B, 1, H // self.stride, W // self.stride, 6), -9.0)
        for image, out in zip(images.float(), raw):
            y, x = (image[0] > 0.8).nonzero(as_tuple=True)
            left, top, right, bottom = x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1
            centre, size = ((left + right) / 2, (top + bottom) / 2), (right - left, bottom - top)
            column, row = (int(value // self.stride) for value in centre)
            place = [(c / self.stride - cell + 0.5) / 2 for c, cell in zip(centre, (column, row))]
            out[0, row, column] = torch.tensor(
                [*place, *((s / self.anchor) ** 0.5 / 2 for s in size), 0.9, 0.9]
            ).logit()
        return [raw]


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [(160, 160), (96, 224), (224, 96)])
def test_every_view_claims_the_box_where_it_is_in_the_batch(size, amp_dtype):
    images = torch.full((2, 3, *size), 60, dtype=torch.uint8)
    true = torch.tensor([[10.0, 20, 50, 80], [50.0, 30, 90, 60]])
    for image, (left, top, right, bottom) in zip(images, true.int().tolist()):
        image[:, top:bottom, left:right] = 255
    network = FindsWhite()
    predictions, losses = predicted(network, batch_of(images), runtime(amp_dtype), augment=True)
    assert losses is None
    assert len({shape for shape, _ in network.seen}) == 3
    assert all(dtype == (amp_dtype or torch.float32) for _, dtype in network.seen)
    for found, box in zip(predictions, true):
        sure = found[found[:, 4] > 0.5]
        assert len(sure) == 3
        assert (sure[:, :4] - box).abs().max() < 1.3  # a pixel of the smallest view
        assert (sure[0, :4] - box).abs().max() < 0.01


def test_augmented_predictions_begin_with_the_plain_ones_and_losses_are_theirs():
    model = DetectionModel(read_network("yolov5n.yaml"), num_classes=2)
    hyp = hyperparameters({}, source="test")
    gains = LossGains.for_head(hyp, model.head, 64)
    network, batch = for_evaluation(model, runtime()), batch_of(random_images(2, 3, 64, 96))
    plain, losses = predicted(network, batch, runtime(), gains=gains)
    augmented, same_losses = predicted(network, batch, runtime(), gains=gains, augment=True)
    # 96 x 128 px of 80 x 115 without the coarsest level, 64 x 96 px of 53 x 80 without the finest
    assert augmented.shape[1] == plain.shape[1] + 3 * (12 * 16 + 6 * 8) + 3 * (4 * 6 + 2 * 3)
    assert torch.equal(augmented[:, : plain.shape[1]], plain)
    assert torch.equal(losses.total, same_losses.total)


def test_what_is_evaluated_computes_as_the_model_and_leaves_it_alone():
    model = DetectionModel(read_network("yolov5n.yaml"), num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network, batch = for_evaluation(model, runtime()), batch_of(random_images(2, 3, 64, 96))
    found, _ = predicted(network, batch, runtime())
    again, _ = predicted(network, batch, runtime())
    with torch.no_grad():
        expected = decode(model.eval()(batch.images / 255), model.head)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found, again)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(batch.images, random_images(2, 3, 64, 96))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("logit", range(7))
def test_a_logit_that_is_no_number_is_told_and_never_detected(logit, value):
    raw = torch.full((2, 1, 2, 2, 7), 2.0, dtype=torch.float16)
    raw[1, 0, 1, 0, logit] = value
    head = HeadSpec(strides=(16,), anchors=torch.full((1, 1, 2), 4.0), num_classes=2)
    result = non_max_suppression(decode([raw], head), NmsRules())
    assert [len(one.scores) for one in result.detections] == [8, 6]
    assert result.non_finite.tolist() == [False, True]
