import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.report.logged import COCO, METRICS, NAMES, logged_epoch, logged_run
from utils.clock import PARTS
from utils.report import summaries
from utils.report.logger import Guard, Guarded
from utils.report.loggers import RESULT_COLUMNS
from utils.report.tensorboard import FINAL_METRICS, TensorBoardLogger
from utils.structures import ClassMetrics, Curves

accumulators = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
from tensorboard.plugin_util import markdown_to_safe_html  # noqa: E402
from tensorboard.plugins.hparams import metadata as hparams  # noqa: E402
from tensorboard.util.tensor_util import make_ndarray  # noqa: E402

TIMES = {f"time/{name}" for name in ("images_per_s", "epoch_s", *(f"{part}_s" for part in PARTS))}


class Shown:
    """What TensorBoard reads in a folder."""

    def __init__(self, folder):
        self.events = accumulators.EventAccumulator(str(folder)).Reload()

    def tags(self, plugin):
        return {tag for tag in self.events.Tags()["tensors"] if self.plugin_of(tag) == plugin}

    def plugin_of(self, tag):
        return self.events.SummaryMetadata(tag).plugin_data.plugin_name

    def at(self, tag):
        """Values by step."""
        return {one.step: make_ndarray(one.tensor_proto) for one in self.events.Tensors(tag)}

    def text(self, tag):
        (content,) = self.at(tag).values()
        return markdown_to_safe_html(content.item())

    def hparams(self):
        content = self.events.PluginTagToContent("hparams")
        return hparams.parse_session_start_info_plugin_data(content[hparams.SESSION_START_INFO_TAG]).hparams

    def status(self):
        content = self.events.PluginTagToContent("hparams").get(hparams.SESSION_END_INFO_TAG)
        return content and hparams.parse_session_end_info_plugin_data(content).status


def log_run(folder, epochs, start_epoch=0, result=None, metrics=METRICS, **changes):
    logger = TensorBoardLogger(logged_run(folder, start_epoch=start_epoch, note=pytest.fail))
    for epoch in range(start_epoch, epochs):
        logger.epoch(logged_epoch(epoch, metrics, **changes))
    logger.close(result)
    return Shown(folder)


def class_metrics(name, labels):
    figures = dict.fromkeys("precision recall f1 map50 map50_95 best_f1 best_confidence".split(), 0.5)
    return ClassMetrics(name=name, images=1, labels=labels, coco=COCO, **figures)


def curves(hits, claims, labels):
    """Of classes with hits and claims (C, 1000)."""
    precision = np.divide(hits, claims, out=np.full(hits.shape, np.nan), where=claims > 0)
    return Curves(
        confidence=np.linspace(0, 1, 1000),
        precision=precision,
        recall=hits / np.array(labels)[:, None],
        f1=np.zeros_like(precision),
        recall_grid=np.linspace(0, 1, 101),
        precision_at_recall=np.zeros((len(hits), 101)),
    )


def test_scalars_are_the_columns_of_the_tables_and_a_resumed_run_is_there_once(tmp_path):
    log_run(tmp_path, 3)
    shown = log_run(tmp_path, 4, start_epoch=2)
    assert shown.tags("scalars") == (set(RESULT_COLUMNS) - {"epoch"}) | TIMES
    assert list(shown.at("x/lr1")) == [1, 2, 3, 4]
    assert shown.at("metrics/mAP_0.5:0.95")[1] == pytest.approx(0.4)
    assert shown.at("time/epoch_s")[4] == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_cells_that_are_missing_are_no_scalars(tmp_path):
    shown = log_run(tmp_path, 1, metrics=None)
    assert not {tag for tag in shown.tags("scalars") if tag.startswith(("metrics", "val"))}
    assert not shown.tags("pr_curves")


def test_pictures_are_shown_as_they_are(tmp_path):
    import cv2

    picture = np.full((40, 60, 3), (200, 30, 90), np.uint8)
    logger = TensorBoardLogger(logged_run(tmp_path))
    logger.images({"val/some": picture}, 4)
    logger.close()
    (width, height, encoded) = Shown(tmp_path).at("val/some")[4]
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert (int(width), int(height), pixels.shape) == (60, 40, picture.shape)
    assert np.abs(pixels.astype(int) - picture).max() < 8


def test_curves_tell_true_counts_of_the_classes_with_labels(tmp_path):
    labels, steps = [4, 40], np.linspace(0, 1, 1000)
    hits = np.stack([(4 * (1 - steps)).round(), (30 * (1 - steps)).round()])
    claims = np.stack([hits[0] + (steps < 0.5), 2 * hits[1]])
    per_class = (class_metrics("rare", 4), class_metrics("absent", 0), class_metrics("common", 40))
    metrics = replace(METRICS, per_class=per_class, curves=curves(hits, claims, labels))
    shown = log_run(tmp_path, 3, metrics=metrics, result=metrics)
    assert shown.tags("pr_curves") == {
        f"{kind}/{name}" for kind in ("pr_curve", "final/pr_curve") for name in ("all classes", "rare", "common")
    }
    assert list(shown.at("pr_curve/rare")) == [1, 2, 3] and list(shown.at("final/pr_curve/rare")) == [3]
    rows = shown.at("pr_curve/rare")[3]
    at = [
        round(999 * place / (rows.shape[1] - 1)) for place in (0, 100, 200)
    ]  # of confidences that are as evenly apart
    found, wrong, neither, missed, precision, recall = rows[:, [0, 100, 200]]
    assert found == pytest.approx(hits[0, at]) and wrong == pytest.approx((claims - hits)[0, at])
    assert missed == pytest.approx(4 - found) and not neither.any()
    assert precision == pytest.approx(found / (found + wrong)) and recall == pytest.approx(found / 4)
    whole = shown.at("pr_curve/all classes")[3]
    assert whole[0, 0] == hits[:, 0].sum() and whole[4, 0] == pytest.approx((4 / 5 + 0.5) / 2)


def test_of_many_classes_those_with_most_labels_have_a_curve(tmp_path):
    labels = list(range(1, 31))
    ones = np.ones((30, 1000))
    per_class = tuple(class_metrics(f"c{count}", count) for count in labels)
    metrics = replace(METRICS, per_class=per_class, curves=curves(ones, ones, labels))
    shown = log_run(tmp_path, 1, metrics=metrics)
    assert shown.tags("pr_curves") == {"pr_curve/all classes", *(f"pr_curve/c{count}" for count in range(11, 31))}


def test_histograms_of_tensors_without_what_is_no_number(tmp_path):
    tensor = torch.tensor([1.0, 2.0, 2.0, torch.nan], dtype=torch.bfloat16)
    shown = log_run(tmp_path, 1, tensors={"weights/a": tensor, "gradients/b": torch.full((2,), torch.inf)})
    buckets = shown.at("weights/a")[1]
    assert buckets[:, 2].sum() == 3 and buckets[-1, 2] == 2
    assert shown.tags("histograms") == {"weights/a", "gradients/b"}


def test_hyperparameters_are_there_from_the_start_and_metrics_at_the_end(tmp_path):
    shown = log_run(tmp_path, 1)
    values = shown.hparams()
    assert (values["lr0"].number_value, values["imgsz"].number_value) == (0.01, 64)
    assert (values["optimizer"].string_value, values["rect"].bool_value) == ("SGD", False)
    assert "anchors" not in values and shown.status() is None
    shown = log_run(tmp_path, 3, start_epoch=1, result=METRICS)
    assert shown.status() == 1  # success
    assert {tag: float(shown.at(tag)[3]) for tag in FINAL_METRICS} == pytest.approx(
        {tag: getattr(METRICS, field) for tag, field in FINAL_METRICS.items()}
    )


def test_texts_tell_what_the_run_is_and_what_came_of_it(tmp_path):
    result = replace(METRICS, per_class=(class_metrics("a|b <i>*c*_d_", 7),))
    shown = log_run(tmp_path, 2, result=result)
    texts = ("run/options", "run/hyperparameters", "run/data", "run/environment", "final/result", "final/time")
    assert shown.tags("text") == set(texts)
    options, hyp, data, environment, classes, times = map(shown.text, texts)
    assert "<td>--batch-size</td>\n<td>4</td>\n<td>16</td>" in options
    assert "<td>warmup_bias_lr</td>\n<td>0.1</td>\n<td></td>" in hyp
    assert all(part in data for part in (*NAMES, "box 2 of 3 is empty", "labels/7.txt:2"))
    assert "<td>GFLOPs</td>\n<td>4.2</td>" in environment
    assert "<td>a|b &lt;i&gt;*c*_d_</td>\n<td>1</td>\n<td>7</td>" in classes
    assert "<td>forward</td>\n<td>0.2</td>" in times and "<td>all</td>\n<td>7.0</td>" in times


def test_the_network_has_a_graph_and_one_that_cannot_is_a_note(tmp_path):
    class Odd(nn.Module):
        def forward(self, images):
            raise RuntimeError("needs two images\nat least")

    assert b"Conv2d" in log_run(tmp_path, 1).events.Graph().SerializeToString()
    notes = []
    (tmp_path / "odd").mkdir()
    logger = TensorBoardLogger(logged_run(tmp_path / "odd", model=Odd(), note=notes.append))
    logger.epoch(logged_epoch(0))
    assert notes == ["no graph of the network in TensorBoard: needs two images"]
    assert list(Shown(tmp_path / "odd").at("x/lr0")) == [1]


def test_without_tensorboard_there_is_one_note(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    notes = []
    logger = TensorBoardLogger(logged_run(tmp_path, note=notes.append))
    for epoch in range(2):
        logger.epoch(logged_epoch(epoch))
    logger.images({"a": np.zeros((1, 1, 3), np.uint8)}, 1)
    logger.close(METRICS)
    assert notes == ["no TensorBoard events: `pip install tensorboard` to get them"] and not list(tmp_path.iterdir())


def test_a_folder_that_goes_is_one_warning(tmp_path):
    warnings, folder = [], tmp_path / "run"
    folder.mkdir()
    logger = Guarded(lambda: TensorBoardLogger(logged_run(folder)), Guard("TensorBoard", warnings.append))
    logger.epoch(logged_epoch(0))
    shutil.rmtree(folder)
    for epoch in (1, 2):
        logger.epoch(logged_epoch(epoch))
    logger.close(METRICS)
    (warning,) = warnings
    assert warning.startswith("no more TensorBoard in this run, which goes on: No such file or directory: ")


def test_a_run_that_ends_before_anything_is_told_leaves_nothing(tmp_path):
    TensorBoardLogger(logged_run(tmp_path)).close()
    assert not list(tmp_path.iterdir())


def test_sixty_epochs_take_little_room(tmp_path):
    ones = np.ones((3, 1000))
    per_class = tuple(class_metrics(name, 100) for name in "abc")
    metrics = replace(METRICS, per_class=per_class, curves=curves(ones, ones, [100] * 3))
    logger = TensorBoardLogger(logged_run(tmp_path, epochs=60, note=pytest.fail))
    for epoch in range(60):
        logger.epoch(logged_epoch(epoch, metrics))
    logger.close(metrics)
    [file] = tmp_path.glob("events.*")
    assert file.stat().st_size < 1_000_000  # with curves in every epoch it would be 2 MB


@pytest.mark.parametrize("values", [[1, 1 - 6e-8], [3e38, -3e38], [0.5], [], [math.nan, math.inf]])
def test_histograms_of_any_weights(values):
    told = summaries.histogram("weights/x", np.array(values, np.float32)).histo
    finite = [value for value in values if math.isfinite(value)]
    assert told.num == sum(told.bucket) == len(finite)
    assert told.sum == pytest.approx(sum(finite))
