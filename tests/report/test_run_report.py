"""What a run shows and leaves behind: figures at full precision, rows in order, pictures where they are wanted."""

import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.report.logged import COCO, logged_run
from tests.stores import ImageLabels, build_store
from utils.clock import PARTS, TimeSplit
from utils.data.store import plain_store
from utils.report import mosaics, plots
from utils.report.console import Console
from utils.report.pictures import PictureFiles, Pictures
from utils.report.run_report import WrittenReport, write_metrics
from utils.structures import (
    MISSED,
    BadUpdate,
    Batch,
    ClassMetrics,
    Curves,
    Detections,
    JudgedImage,
    LossMeans,
    Metrics,
    NamedBatch,
)

LOSSES = LossMeans(box=0.1, objectness=0.2, classification=0.3)
METRICS = Metrics(
    precision=1 / 3,
    recall=0.5,
    f1=0.4,
    map50=2 / 3,
    map50_95=0.1 + 0.2,
    images=3,
    labels=4,
    best_confidence=0.25,
    per_class=(
        ClassMetrics(
            name="größe",
            images=3,
            labels=4,
            precision=1 / 3,
            recall=0.5,
            f1=0.4,
            map50=2 / 3,
            map50_95=0.3,
            best_f1=0.45,
            best_confidence=0.7,
            coco=replace(COCO, ap_small=None),
        ),
    ),
    coco=COCO,
    losses=LOSSES,
)


class Recorded(Pictures):
    """Takes down what it should have drawn."""

    def __init__(self):
        self.drawn = []

    def labels(self):
        self.drawn.append("labels")

    def train_batch(self, index, batch):
        self.drawn.append(f"train_batch{index}")

    def finished(self, metrics, best_epoch=None):
        self.drawn.append("finished")


def report(folder: Path, *, pictures=None, start=(0, 0), epochs=3) -> tuple[WrittenReport, io.StringIO]:
    stream = io.StringIO()
    return (
        WrittenReport(
            logged_run(folder, start_epoch=start[0], epochs=epochs),
            console=Console(stream=stream),
            pictures=pictures or Pictures(),
            train=plain_store(np.array([[8, 8]] * 4)),
            start_batch=start[1],
        ),
        stream,
    )


def took(wall: float, **parts: float) -> TimeSplit:
    return TimeSplit(wall=wall, parts=dict.fromkeys(PARTS, 0.0) | parts, images=8)


def tell(reporter: WrittenReport, epoch: int, metrics: Metrics | None = METRICS) -> None:
    reporter.epoch(epoch, LOSSES, metrics, (0.1, 0.1, 0.2), took(3.0, forward=1.0, evaluate=0.5))


def finish(reporter: WrittenReport, *, best_epoch: int, epochs: int, metrics: Metrics = METRICS) -> None:
    reporter.finished(
        metrics,
        best_epoch=best_epoch,
        epochs=epochs,
        digests=lambda: {"best.pt": "0123abcd", "last.pt": "4567cdef"},
        last_times=lambda: took(2.0, evaluate=0.7, save=0.2),
    )


# ---- figures --------------------------------------------------------------------------------------------------------


def test_metrics_file_keeps_every_digit(tmp_path):
    write_metrics(tmp_path / "metrics.json", METRICS)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    figures = json.loads(text)
    assert "größe" in text
    assert figures["mAP_0.5"] == METRICS.map50
    assert figures["mAP_0.5:0.95"] == 0.1 + 0.2
    assert figures["fitness"] == METRICS.fitness
    assert figures["losses"] == {"box": 0.1, "objectness": 0.2, "classification": 0.3}
    assert (figures["f1"], figures["best_confidence"]) == (0.4, 0.25)
    assert list(figures["coco"]) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert list(figures["coco"].values()) == list(vars(COCO).values())
    (one,) = figures["per_class"]
    assert (one["precision"], one["f1"], one["best_f1"], one["best_confidence"]) == (1 / 3, 0.4, 0.45, 0.7)
    assert one["coco"] == figures["coco"] | {"APs": None}  # no small labels


def test_metrics_file_without_losses(tmp_path):
    bare = Metrics(**{**vars(METRICS), "losses": None})
    write_metrics(tmp_path / "metrics.json", bare)
    assert json.loads((tmp_path / "metrics.json").read_text())["losses"] is None


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_story_of_a_run(tmp_path):
    pictures = Recorded()
    reporter, stream = report(tmp_path, pictures=pictures)
    assert pictures.drawn == []  # nothing delays the first step
    for epoch in range(3):
        reporter.train_batch(epoch, 0, None)
        tell(reporter, epoch)
    finish(reporter, best_epoch=1, epochs=3)
    assert pictures.drawn == ["labels", "train_batch0", "finished"]
    assert [row.split(",")[0].strip() for row in rows(tmp_path)] == ["epoch", "1", "2", "3"]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    said = stream.getvalue()
    assert "Digest of the weights: 0123abcd best.pt, 4567cdef last.pt" in said
    assert "Epochs 1 to 3 in 0:00:0" in said and "best.pt is of epoch 2" in said and str(tmp_path) in said
    assert json.loads((tmp_path / "metrics.json").read_text())["labels"] == 4


def test_of_very_many_classes_the_weakest_are_told(tmp_path):
    reporter, stream = report(tmp_path)
    classes = tuple(replace(METRICS.per_class[0], name=f"class {i}", map50_95=1 - i / 50) for i in range(50))
    finish(reporter, best_epoch=0, epochs=1, metrics=replace(METRICS, per_class=classes))
    told = [line.split()[1] for line in stream.getvalue().splitlines() if line.split()[:1] == ["class"]]
    assert told == [str(number) for number in range(49, 34, -1)]
    assert f"Of 50 classes these are the 15 with the lowest mAP@.5:.95; all of them: {tmp_path}" in stream.getvalue()


def test_the_last_words_are_what_to_type_next(tmp_path):
    reporter, stream = report(tmp_path)
    finish(reporter, best_epoch=0, epochs=3)
    *_, curves, evaluate, detect, train_on = stream.getvalue().splitlines()
    assert curves.split()[0] == "curves" and curves.endswith(f"-m tensorboard.main --logdir {tmp_path.parent}")
    assert evaluate.endswith(f"val.py --weights {tmp_path}/weights/best.pt")
    assert detect.endswith(f"detect.py --weights {tmp_path}/weights/best.pt --source photo.jpg")
    assert train_on.endswith(f"train.py --resume {tmp_path}/weights/last.pt --epochs 6")


def rows(folder: Path) -> list[str]:
    return (folder / "results.csv").read_text().splitlines()


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    reporter, _ = report(tmp_path)
    for epoch in range(3):
        tell(reporter, epoch)
    pictures = Recorded()
    reporter, stream = report(tmp_path, pictures=pictures, start=(2, 0), epochs=4)
    assert pictures.drawn == []
    assert len(rows(tmp_path)) == 1 + 2
    reporter.train_batch(2, 0, None)
    for epoch in (2, 3):
        tell(reporter, epoch)
    assert pictures.drawn == []
    assert [row.split(",")[0].strip() for row in rows(tmp_path)] == ["epoch", "1", "2", "3", "4"]
    assert "3/4" in stream.getvalue()


def test_updates_that_were_skipped_are_counted_told_and_named(tmp_path):
    reporter, stream = report(tmp_path)
    batches = [NamedBatch(epoch=1, index=index, images=(index,)) for index in range(3)]
    reporter.skipped([BadUpdate(what="loss", batches=(one,)) for one in batches])
    reporter.epoch(1, LOSSES, METRICS, (0.1, 0.1, 0.2), took(3.0), skipped=3)
    assert rows(tmp_path)[-1].split(",")[-1].strip() == "3"
    assert "warning: epoch 2: 3 updates skipped" in stream.getvalue()
    assert len(reporter.nonfinite.read_text().splitlines()) == 1 + 3
    report(tmp_path, start=(1, 2))  # resumed before the third
    assert len(reporter.nonfinite.read_text().splitlines()) == 1 + 2


def test_a_run_that_goes_back_withdraws_rows_but_no_names(tmp_path):
    reporter, _ = report(tmp_path)
    for epoch in range(2):
        tell(reporter, epoch)
    reporter.skipped([BadUpdate(what="loss", batches=(NamedBatch(epoch=1, index=0, images=(0,)),))])
    reporter.go_back(1)
    tell(reporter, 1)
    assert [row.split(",")[0].strip() for row in rows(tmp_path)] == ["epoch", "1", "2"]
    assert len(reporter.nonfinite.read_text().splitlines()) == 1 + 1


def test_a_run_that_goes_on_is_not_finished(tmp_path):
    write_metrics(tmp_path / "metrics.json", METRICS)
    report(tmp_path, start=(2, 0))
    assert not (tmp_path / "metrics.json").exists()


def test_pictures_that_fail_are_a_warning_and_the_run_ends_well(tmp_path):
    class Failing(Pictures):
        def labels(self):
            raise OSError("disk full")

        finished = train_batch = labels

    reporter, stream = report(tmp_path, pictures=Failing())
    reporter.train_batch(0, 0, None)
    finish(reporter, best_epoch=0, epochs=1)
    assert stream.getvalue().count("warning: no more pictures in this run, which goes on: disk full") == 1
    assert (tmp_path / "metrics.json").exists()


def test_epochs_without_evaluation(tmp_path, store):
    """Their metrics stay empty in the line, the table, TensorBoard and the curves."""
    reporter, stream = report(tmp_path, pictures=PictureFiles(tmp_path, ("größe",), val=store, train=store))
    for epoch in range(2):
        tell(reporter, epoch, metrics=None)
    assert stream.getvalue().splitlines()[-1].split()[4:8] == ["-"] * 4
    plots.plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    never = cv2.imread(str(tmp_path / "results.png"))
    tell(reporter, 2)
    plots.plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    cells = [[cell.strip() for cell in row.split(",")] for row in rows(tmp_path)[1:]]
    assert [row[4:11] == [""] * 7 for row in cells] == [True, True, False]
    assert all(row[1] and row[11] for row in cells)
    assert (cv2.imread(str(tmp_path / "results.png")) != never).any()


def test_the_summary_accounts_for_the_time_of_all_epochs_and_of_what_came_after(tmp_path):
    reporter, stream = report(tmp_path)
    for epoch in range(2):
        tell(reporter, epoch)
    finish(reporter, best_epoch=1, epochs=2)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    seconds = next(line for line in lines if line[:1] == ["seconds"])
    assert seconds[1:] == ["0.0", "0.0", "2.0", "0.0", "0.0", "0.0", "1.7", "0.2", "4.1", "8.0"]
    assert "Bottleneck: pictures" in stream.getvalue()


def test_a_run_resumed_to_be_evaluated_alone_has_no_time_to_account_for(tmp_path):
    reporter, stream = report(tmp_path, start=(2, 0))
    finish(reporter, best_epoch=1, epochs=2)
    assert "seconds" not in stream.getvalue()


def test_time_left_follows_the_last_epochs(tmp_path):
    reporter, stream = report(tmp_path, epochs=4)
    reporter.epoch(0, LOSSES, METRICS, (0.1, 0.1, 0.2), took(120.0, forward=70.0, evaluate=20.0))
    assert stream.getvalue().splitlines()[-1].endswith("0:04:30")


class BatchesOfFour(list):
    batch_size = 4


def test_bars_stay_away_from_a_log_file(tmp_path):
    reporter, stream = report(tmp_path)
    with reporter.training_bar(0, 2) as bar:
        assert [bar.update(1) for _ in range(2)] == [None, None]  # not drawn: no loss is read back from the device
    assert list(reporter.evaluation_bar(BatchesOfFour([1, 2]))) == [1, 2]
    assert stream.getvalue() == ""


# ---- pictures -------------------------------------------------------------------------------------------------------


def batch_of(store) -> Batch:
    return Batch(
        images=torch.full((2, 3, 64, 64), 90, dtype=torch.uint8),
        boxes=torch.tensor([[8.0, 8, 40, 40]]),
        classes=torch.tensor([0]),
        image_of=torch.tensor([1]),
        indices=torch.arange(len(store)),
    )


@pytest.fixture
def store():
    labels = [ImageLabels(boxes=np.array([[0.1, 0.1, 0.6, 0.6]]), classes=np.zeros(1, int))] * 2
    return build_store([Path("a/one.png"), Path("a/two.png")], [(64, 64)] * 2, labels)


def test_three_batches_are_pictured_and_no_more(tmp_path, store):
    files = PictureFiles(tmp_path, ("thing",), val=store, train=store)
    nothing = Detections(boxes=torch.empty(0, 4), scores=torch.empty(0), classes=torch.empty(0, dtype=torch.int64))
    found = Detections(
        boxes=torch.tensor([[8.0, 8, 40, 40]]), scores=torch.tensor([0.9]), classes=torch.zeros(1, dtype=torch.int64)
    )
    for index in range(5):
        files.train_batch(index, batch_of(store))
        files.evaluated_batch(index, batch_of(store), [nothing, found])
    kinds = ("train_batch{}.jpg", "val_batch{}_labels.jpg", "val_batch{}_pred.jpg")
    expected = {kind.format(index) for kind in kinds for index in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(cv2.imread(str(path)) is not None for path in tmp_path.iterdir())


def test_a_batch_without_any_detection(tmp_path, store):
    nothing = Detections(boxes=torch.empty(0, 4), scores=torch.empty(0), classes=torch.empty(0, dtype=torch.int64))
    PictureFiles(tmp_path, ("thing",), val=store).evaluated_batch(0, batch_of(store), [nothing, nothing])
    assert (tmp_path / "val_batch0_pred.jpg").exists()


def test_boxes_end_where_their_image_does(tmp_path, store, monkeypatch):
    """The padding of a letterbox is no part of the image: boxes are cut there, and go where they lie there alone."""
    drawn = {}

    def draw(images, shown, *_, **__):
        drawn.update(boxes=shown.boxes.tolist())
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(mosaics, "draw_batch", draw)
    placement = torch.tensor([[0.5, 0, 4], [0, 0.5, 10], [0, 0, 1]], dtype=torch.float64)  # (4, 10) to (36, 42)
    letterboxed = replace(batch_of(store), placements=placement.repeat(2, 1, 1))
    found = [
        Detections(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.full((len(boxes),), 0.9),
            classes=torch.zeros(len(boxes), dtype=torch.int64),
        )
        for boxes in ([[0, 0, 64, 64], [6, 12, 20, 30]], [[2, 20, 30, 60]])
    ]
    PictureFiles(tmp_path, ("thing",), val=store).evaluated_batch(0, letterboxed, found)
    assert drawn["boxes"] == [[4, 10, 36, 42], [6, 12, 20, 30], [4, 20, 30, 42]]


def test_pictures_of_a_finished_evaluation(tmp_path, store):
    line = np.linspace(0, 1, 1000)
    curves = Curves(
        confidence=line,
        **dict.fromkeys(("precision", "recall", "f1"), line[None]),
        recall_grid=np.linspace(0, 1, 101),
        precision_at_recall=np.zeros((1, 101)),
    )
    missed = JudgedImage(
        image=1,
        boxes=np.array([[5.0, 5, 30, 30]]),
        classes=np.zeros(1, int),
        scores=np.full(1, np.nan),
        verdicts=np.array([MISSED], np.uint8),
    )
    metrics = replace(METRICS, curves=curves, confusion=np.ones((2, 2), int), worst=(missed,))
    PictureFiles(tmp_path, ("größe",), val=store).finished(metrics)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{kind}_curve.png" for kind in ("F1", "P", "R", "PR")),
        *("confusion_matrix.png", "confusion_matrix_counts.png", "worst_images.jpg"),
    }


def test_without_labels_there_is_nothing_to_judge_in_pictures_and_figures(tmp_path, store):
    nothing = replace(METRICS, labels=0, per_class=(replace(METRICS.per_class[0], labels=0),))
    PictureFiles(tmp_path, ("größe",), val=store).finished(nothing)
    assert list(tmp_path.iterdir()) == []
    write_metrics(tmp_path / "metrics.json", nothing)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    (one,) = figures["per_class"]
    assert {one[name] for name in ("precision", "recall", "f1", "map50", "map50_95", "best_f1")} == {None}
    assert figures["fitness"] is figures["mAP_0.5"] is figures["best_confidence"] is None
    assert (figures["images"], figures["losses"]["box"], one["name"], one["labels"]) == (3, 0.1, "größe", 0)


def test_the_null_object_draws_nothing(tmp_path, store):
    pictures = Pictures()
    pictures.labels()
    pictures.train_batch(0, batch_of(store))
    pictures.evaluated_batch(0, batch_of(store), [])
    pictures.finished(METRICS)
    assert list(tmp_path.iterdir()) == []
