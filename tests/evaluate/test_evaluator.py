"""The evaluator against pycocotools, with a network that claims boxes which the test knows in source pixels."""

import io
from contextlib import redirect_stdout
from dataclasses import is_dataclass, replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from models.yolo import DetectionModel, read_network
from tests.groups import in_ranks
from tests.stores import ImageLabels, build_store
from utils.data.images import BaseImages
from utils.data.loader import EvalBatches
from utils.data.plan import letterbox_plan, source_to_network
from utils.evaluate import nms
from utils.evaluate.evaluator import Evaluator
from utils.evaluate.nms import NmsRules, non_max_suppression
from utils.evaluate.predict import to_source
from utils.hyp import Hyperparameters
from utils.loss import LossGains
from utils.ranks import Ranks
from utils.runtime import Runtime
from utils.structures import HIT, Detections, HeadSpec

SIZES = ((101, 67), (64, 97), (33, 130), (80, 80), (121, 59), (55, 90), (90, 55))  # height, width
IMGSZ, STRIDE = 96, 32
NAMES = ("a", "b", "c")
NOTHING = ImageLabels(boxes=np.empty((0, 4)), classes=np.empty(0, np.int64))
CPU = Runtime(device=torch.device("cpu"), amp_dtype=None, workers=0)


class Oracle(nn.Module):
    """Detects what it is told to: `claims[i]` holds (box in source px, class, score) for the image of grey i + 1."""

    def __init__(self, store, claims):
        super().__init__()
        self.store, self.claims = store, claims
        self.head = HeadSpec(strides=(8,), anchors=torch.full((1, 6, 2), 40.0), num_classes=len(NAMES))

    def forward(self, images):
        """(B, 3, H, W) -> one level (B, 6, H / 8, W / 8, 5 + C): claim k of an image lies on anchor k."""
        B, _, H, W = images.shape
        raw = torch.full((B, 6, H // 8, W // 8, 5 + len(NAMES)), -30.0)
        for slot, grey in zip(raw, (images[:, 0, H // 2, W // 2] * 255).round().int().tolist()):
            plan = letterbox_plan(self.store, grey - 1, shape=(H, W), imgsz=IMGSZ)
            (sx, _, tx), (_, sy, ty), _ = source_to_network(self.store, plan, IMGSZ)
            for anchor, (box, label, score) in enumerate(self.claims[grey - 1]):
                x1, y1, x2, y2 = np.array(box) * [sx, sy, sx, sy] + [tx, ty, tx, ty]
                centre, sides = np.array([x1 + x2, y1 + y2]) / 2, np.array([x2 - x1, y2 - y1])
                cell = np.floor(centre / 8).astype(int)
                shares = [*(centre / 8 - cell + 0.5) / 2, *np.sqrt(sides / 40) / 2, 1 - 1e-9]
                slot[anchor, cell[1], cell[0], :5] = torch.tensor(np.log(shares) - np.log1p(-np.array(shares)))
                slot[anchor, cell[1], cell[0], 5 + label] = float(np.log(score / (1 - score)))
        return [raw]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A store of grey images with up to four labels each, and claims: labels shifted a little or much, some wrong."""
    folder, rng = tmp_path_factory.mktemp("grey"), np.random.default_rng(3)
    labels, claims, paths = [], [], []
    scores = iter(rng.permutation(np.linspace(0.05, 0.95, 6 * len(SIZES))))
    for index, (height, width) in enumerate(SIZES):
        paths.append(folder / f"{index}.png")
        assert cv2.imwrite(str(paths[-1]), np.full((height, width, 3), index + 1, np.uint8))
        corners = np.array([(x, y) for x in (0.06, 0.55) for y in (0.08, 0.54)])[: index % 5]  # the first has none
        boxes = np.concatenate([corners, corners + np.array([0.35, 0.37])], 1).reshape(-1, 4)
        kinds = rng.integers(0, len(NAMES), len(boxes))
        labels.append(ImageLabels(boxes=boxes, classes=kinds))
        moved = (boxes + rng.normal(0, 0.018, boxes.shape)).clip(0, 1) * [width, height, width, height]
        told = np.where(rng.random(len(kinds)) < 0.85, kinds, (kinds + 1) % len(NAMES))
        false_alarm = (np.array([0.3, 0.3, 0.7, 0.6]) * [width, height, width, height], 1)
        found = [*zip(moved, told), false_alarm]
        claims.append([(box, int(kind), float(next(scores))) for box, kind in found])
    return build_store(paths, SIZES, labels), claims


def evaluator(store, batch_size, **changes):
    batches = EvalBatches(
        store=store,
        images=BaseImages(store=store, imgsz=IMGSZ, area=True),
        imgsz=IMGSZ,
        batch_size=batch_size,
        stride=STRIDE,
    )
    return Evaluator(**{"batches": batches, "names": NAMES, "runtime": CPU, **changes})


def coco_ap(store, claims) -> tuple[float, float]:
    """mAP at .5 and at .5:.95 by pycocotools."""
    boxes, rows = store.boxes.astype(float), np.repeat(np.arange(len(store)), np.diff(store.offsets))
    truth, found = COCO(), COCO()
    truth.dataset = {
        "images": [{"id": index + 1} for index in range(len(store))],
        "categories": [{"id": index} for index in range(len(NAMES))],
        "annotations": [
            annotation(number, rows[number], box, store.classes[number]) for number, box in enumerate(boxes)
        ],
    }
    flat = [(image, *claim) for image, listed in enumerate(claims) for claim in listed]
    found.dataset = {
        **truth.dataset,
        "annotations": [
            annotation(number, image, box, label) | {"score": score}
            for number, (image, box, label, score) in enumerate(flat)
        ],
    }
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[1], run.stats[0]


def annotation(number, image, box, label) -> dict:
    x1, y1, x2, y2 = map(float, box)
    sides = [x1, y1, x2 - x1, y2 - y1]
    area = sides[2] * sides[3]
    return {
        "id": number + 1,
        "image_id": int(image) + 1,
        "category_id": int(label),
        "bbox": sides,
        "area": area,
        "iscrowd": 0,
    }


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_average_precision_is_that_of_pycocotools(scene, batch_size):
    store, claims = scene
    metrics = evaluator(store, batch_size)(Oracle(store, claims))
    map50, map50_95 = coco_ap(store, claims)
    assert 0.2 < map50_95 < map50 <= 1  # the scene is neither trivial nor hopeless
    assert (metrics.map50, metrics.map50_95) == pytest.approx((map50, map50_95), abs=1e-9)
    assert (metrics.images, metrics.labels) == (len(SIZES), len(store.boxes))


def test_every_image_is_seen_once_and_boxes_land_on_the_picture(scene):
    store, claims = scene
    seen = []

    def on_batch(index, batch, detections):
        seen.extend(batch.indices.tolist())
        for picture, one in zip(batch.images, detections):
            _, height, width = picture.shape
            assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
            assert (one.boxes[:, :2] > -1).all()
            assert (one.boxes[:, 2] < width + 1).all() and (one.boxes[:, 3] < height + 1).all()

    evaluator(store, 3)(Oracle(store, claims), on_batch=on_batch)
    assert sorted(seen) == list(range(len(SIZES)))


def test_watch_sees_every_batch(scene):
    store, claims = scene
    seen = []
    mine = evaluator(store, 2)
    mine(Oracle(store, claims), watch=lambda batches: [seen.append(len(batches)), *batches][1:])
    assert seen == [len(mine.batches.numbers())]


def sharded(ranks: Ranks, threads: int, cases, network, gains) -> list:
    """What a rank of several finds out, and the batches that the first one draws."""
    torch.set_num_threads(threads)
    found = []
    for store, claims, size in cases:
        mine, drawn = evaluator(store, size, runtime=replace(CPU, ranks=ranks)), []
        draw = (lambda number, *_, drawn=drawn: drawn.append(number)) if ranks.speaks else None
        oracle = mine.evaluation(Oracle(store, claims), on_batch=draw, shown=3)
        found.append((oracle, mine.evaluation(network, gains=gains), drawn))
    return found


def plain(value):
    """Dataclasses as dicts, for numpy to compare."""
    if is_dataclass(value):
        return {name: plain(item) for name, item in vars(value).items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("ranks", [2, 3])
def test_figures_of_several_ranks_are_those_of_one_to_the_last_bit(scene, network, ranks):
    """Batches of unequal size, and a single one for all ranks. The first batches are drawn whoever has them."""
    store, claims = scene
    one_image = build_store([store.path(0)], SIZES[:1], [NOTHING])
    cases = [(store, claims, 1), (store, claims, 2), (store, claims, 50), (one_image, claims, 2)]
    gains = LossGains.for_head(Hyperparameters(), network.head, IMGSZ)
    by_rank = in_ranks(ranks, sharded, torch.get_num_threads(), cases, network, gains)
    for number, (images, told, size) in enumerate(cases):
        alone = evaluator(images, size)
        expected = alone.evaluation(Oracle(images, told)), alone.evaluation(network, gains=gains)
        batches = len(alone.batches.numbers())
        drawn = by_rank[0][number][2]
        assert sorted(drawn) == sorted({*range(0, batches, ranks), *range(min(batches, 3))})
        for found in by_rank:
            for one, other in zip(found[number], expected):
                np.testing.assert_equal(plain(one.metrics), plain(other.metrics))
                np.testing.assert_equal(plain(one.evidence), plain(other.evidence))
                assert (one.cut, one.times.images) == (other.cut, other.times.images) == (0, len(images))
        assert expected[0].metrics.map50 > 0 or images is one_image
        assert expected[1].metrics.losses.objectness > 0


def test_the_order_of_the_ranks_and_of_their_batches_does_not_matter(scene, network, monkeypatch):
    """Losses are sums of floats, whose last digit goes by the order."""
    store, claims = scene
    gains = LossGains.for_head(Hyperparameters(), network.head, IMGSZ)
    mine = evaluator(store, 1)
    expected = mine.evaluation(network, gains=gains), mine.evaluation(Oracle(store, claims))
    shuffled = np.random.default_rng(0).permutation(len(SIZES))
    for order in (shuffled, shuffled[::-1], np.arange(len(SIZES))[::-1]):

        def dealt(self, value, order=order):
            seen, times = value
            return [([seen[at] for at in order[:3]], times), ([seen[at] for at in order[3:]], times)]

        monkeypatch.setattr(Ranks, "gather", dealt)
        found = mine.evaluation(network, gains=gains), mine.evaluation(Oracle(store, claims))
        for one, other in zip(found, expected):
            np.testing.assert_equal(plain(one.metrics), plain(other.metrics))
            np.testing.assert_equal(plain(one.evidence), plain(other.evidence))


def test_equal_scores_go_by_the_ids_of_the_images(scene):
    """As in COCO's tool: a hit before a false alarm is worth more than behind it."""
    store, _ = scene
    with_label = int(np.flatnonzero(np.diff(store.offsets))[0])
    label = store.rows(with_label).start
    hit, kind = store.boxes[label], int(store.classes[label])
    claims = [[] for _ in SIZES]
    claims[with_label], claims[-1] = [(hit, kind, 0.5)], [((0, 0, 9, 9), kind, 0.5)]
    ids = np.arange(len(SIZES))
    told = {}
    for name, image_ids in (("ascending", ids), ("descending", ids[::-1])):
        numbered = replace(store, image_ids=image_ids, category_ids=np.arange(len(NAMES)))
        told[name] = evaluator(numbered, 3)(Oracle(store, claims)).per_class[kind].map50
    assert told["ascending"] == pytest.approx(2 * told["descending"]) and told["descending"] > 0


def test_what_is_done_once_on_a_machine_is_not_on_the_clock(scene, monkeypatch):
    store, claims = scene
    order = []
    made, started = nms.native_library, Runtime.step_clock
    monkeypatch.setattr(nms, "native_library", lambda *given: order.append("library") or made(*given))
    monkeypatch.setattr(Runtime, "step_clock", lambda *given: order.append("clock") or started(*given))
    for name in ("evaluation", "measured"):
        nms._native.cache_clear()
        getattr(evaluator(store, 3), name)(Oracle(store, claims))
    assert order == ["library", "clock"] * 2


def test_classes_of_a_network_count_as_one_by_the_best_of_each_anchor(scene):
    """An anchor that speaks for two classes makes one detection, and a wrong name is no mistake."""
    store, claims = scene
    single = replace(store, classes=np.zeros_like(store.classes))
    wrong = [[(box, (kind + 1) % len(NAMES), score) for box, kind, score in listed] for listed in claims]
    expected = evaluator(single, 3)(Oracle(store, [[(box, 0, score) for box, _, score in each] for each in claims]))
    merged = evaluator(single, 3, names=("item",), merge_classes=True).evaluation(Oracle(store, wrong))
    assert merged.metrics.map50_95 == pytest.approx(expected.map50_95) and expected.map50_95 > 0.2
    assert [one.name for one in merged.metrics.per_class] == ["item"] and set(merged.evidence.classes) == {0}


def test_parts_of_the_time_are_told(scene):
    store, claims = scene
    mine = evaluator(store, 3)
    times = mine.evaluation(Oracle(store, claims)).times
    assert times.images == len(SIZES)
    assert set(times.parts) == {"load", "network", "nms"} and all(
        0 < each < times.wall for each in times.parts.values()
    )
    first = len(mine.batches.batch(0).images)  # in which everything gets going
    assert mine.measured(Oracle(store, claims)).images == len(SIZES) - first
    one_image = build_store([store.path(0)], SIZES[:1], [NOTHING])
    assert evaluator(one_image, 3).measured(Oracle(one_image, claims)).images == 1


class Broken(Oracle):
    """Says something senseless beside its claims, but of the first image."""

    def forward(self, images):
        (raw,) = super().forward(images)
        _, _, H, W = images.shape
        greys = (images[:, 0, H // 2, W // 2] * 255).round()
        raw[greys > 1, -1, 0, 0, 4] = torch.nan  # no image has as many claims as there are anchors
        return [raw]


def test_images_of_which_the_network_says_nan_are_counted(scene):
    store, claims = scene
    metrics = evaluator(store, 3)(Broken(store, claims))
    assert metrics.non_finite == len(SIZES) - 1
    assert metrics.map50 == evaluator(store, 3)(Oracle(store, claims)).map50 > 0
    assert evaluator(store, 3)(Oracle(store, claims)).non_finite == 0


def test_images_with_more_candidates_than_nms_looks_at_are_counted(scene, monkeypatch):
    store, claims = scene
    assert evaluator(store, 3).evaluation(Oracle(store, claims)).cut == 0

    def crowded(*given):
        suppressed = non_max_suppression(*given)
        return replace(suppressed, cut=np.ones_like(suppressed.cut))

    monkeypatch.setattr("utils.evaluate.evaluator.non_max_suppression", crowded)
    assert evaluator(store, 3).evaluation(Oracle(store, claims)).cut == len(SIZES)


def test_worst_images_come_with_the_metrics(scene):
    store, claims = scene
    worst = evaluator(store, 3)(Oracle(store, claims)).worst
    assert worst and all((one.verdicts != HIT).any() for one in worst)


def test_nothing_claimed_is_all_zero(scene):
    store, _ = scene
    metrics = evaluator(store, 4)(Oracle(store, [[]] * len(SIZES)))
    assert (metrics.map50, metrics.map50_95, metrics.precision, metrics.recall) == (0, 0, 0, 0)
    assert metrics.labels == len(store.boxes)


def test_confidence_and_max_detections_drop_the_weakest(scene):
    store, claims = scene
    kept = [[claim for claim in listed if claim[2] > 0.5] for listed in claims]
    fewer = evaluator(store, 4, rules=NmsRules(confidence=0.5))(Oracle(store, claims))
    assert (fewer.map50, fewer.map50_95) == pytest.approx(coco_ap(store, kept), abs=1e-9)
    best = [sorted(listed, key=lambda claim: -claim[2])[:1] for listed in claims]
    one_each = evaluator(store, 4, rules=NmsRules(max_detections=1))(Oracle(store, claims))
    assert (one_each.map50, one_each.map50_95) == pytest.approx(coco_ap(store, best), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    imgsz=st.sampled_from([32, 64, 96, 320, 640]),
    spare=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**20),
)
def test_to_source_inverts_the_letterbox(size, imgsz, spare, seed):
    """Any size, odd ones too: a box that went to the network comes back, but for the rounding of f32."""
    height, width = size
    store = build_store(["x.png"], [size], [NOTHING])
    shape = tuple(imgsz + 32 * extra for extra in spare)
    placement = source_to_network(store, letterbox_plan(store, 0, shape=shape, imgsz=imgsz), imgsz)
    corners = np.random.default_rng(seed).uniform(0, 1, (5, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    points = np.concatenate([boxes.reshape(-1, 2), np.ones((10, 1))], 1) @ placement.T
    there = Detections(
        boxes=torch.tensor(points[:, :2].reshape(-1, 4), dtype=torch.float32),
        scores=torch.linspace(1, 0, 5),
        classes=torch.arange(5),
    )
    back = to_source(there, torch.from_numpy(placement), size)
    rounding_px = 1e-4  # of f32 in network px, which an image that was shrunk stretches again
    np.testing.assert_allclose(back.boxes.numpy(), boxes, atol=rounding_px * max(1, max(size) / imgsz))
    assert torch.equal(back.scores, there.scores) and torch.equal(back.classes, there.classes)


def test_to_source_cuts_boxes_to_the_image():
    placement = torch.tensor([[2.0, 0, 10], [0, 2.0, 20], [0, 0, 1]], dtype=torch.float64)
    found = Detections(
        boxes=torch.tensor([[0.0, 0.0, 500.0, 500.0], [14.0, 24.0, 30.0, 44.0]]),
        scores=torch.tensor([0.9, 0.8]),
        classes=torch.tensor([0, 1]),
    )
    back = to_source(found, placement, (31, 47))
    assert back.boxes.tolist() == [[0, 0, 47, 31], [2, 2, 10, 12]]


@pytest.fixture
def network(tiny):
    return DetectionModel(read_network(str(tiny.cfg)), num_classes=len(NAMES)).train()


def test_model_and_random_state_are_the_same_bytes_afterwards(scene, network, random_states):
    store, _ = scene
    gains = LossGains.for_head(Hyperparameters(), network.head, IMGSZ)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = random_states()

    first = evaluator(store, 3)(network, gains=gains)

    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert random_states() == before
    again = evaluator(store, 3)(network, gains=gains)
    assert first.losses == again.losses


def test_losses_are_means_over_images(scene, network):
    """Batches of unequal size weigh by their images: the same as the mean of single images of one shape."""
    store, _ = scene
    gains = LossGains.for_head(Hyperparameters(box=0, cls=0), network.head, IMGSZ)
    square = build_store(
        [store.path(3)] * 5, [SIZES[3]] * 5, [ImageLabels(boxes=np.empty((0, 4)), classes=np.empty(0))] * 5
    )
    one, two = (evaluator(square, size)(network, gains=gains).losses.objectness for size in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    assert evaluator(square, 2)(network).losses is None
