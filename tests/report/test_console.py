import io
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.logged import COCO, LOSSES, METRICS
from utils.report.console import (
    Console,
    EpochSummary,
    format_duration,
    format_epoch,
    format_header,
    labelled,
    progress_texts,
    result,
    strange_outputs,
    table,
)
from utils.structures import ClassMetrics, LossMeans

COLUMNS = ("epoch", "train/box_loss", "x/lr0")

TITLES = ["epoch", "box", "obj", "cls", "P", "R", "mAP@.5", "mAP@.5:.95", "images/s"]


TEXTS = progress_texts(LOSSES, data_wait=0.031, memory=1_234_000_000)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def summary(**changes):
    fields = {
        "epoch": 0,
        "epochs": 30,
        "losses": LOSSES,
        "metrics": METRICS,
        "images_per_s": 123.45,
        "seconds_left": 3725.4,
    }
    return EpochSummary(**fields | changes)


def test_an_epoch_is_one_line_below_its_titles():
    assert format_header(30).split() == [*TITLES, "time", "left"]
    losses, metrics = ["0.08123", "0.03000", "0.00000"], ["0.5000", "0.2500", "0.7500", "0.4000"]
    assert format_epoch(summary()).split() == ["1/30", *losses, *metrics, "123.5", "1:02:05"]
    assert format_epoch(summary(metrics=None)).split()[4:8] == ["-"] * 4


@given(
    epochs=st.integers(1, 100_000),
    box=st.floats(0, 99),
    speed=st.floats(0, 99_999),
    left=st.floats(0, 3.5e6) | st.just(math.inf),
    metrics=st.sampled_from([METRICS, None]),
)
def test_lines_are_as_wide_as_their_titles(epochs, box, speed, left, metrics):
    line = format_epoch(
        summary(
            epoch=epochs - 1,
            epochs=epochs,
            losses=LossMeans(box=box, objectness=box, classification=box),
            metrics=metrics,
            images_per_s=speed,
            seconds_left=left,
        )
    )
    assert len(line) == len(format_header(epochs))
    assert len(line.split()) == 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3599.4, "0:59:59"),
        (360000, "100:00:00"),
        (math.nan, "-:--:--"),
        (-1, "0:00:00"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_a_log_file_gets_the_titles_once_and_one_line_per_epoch():
    stream = io.StringIO()
    console = Console(stream=stream)
    for epoch in range(3):
        assert list(console.bar(range(4), f"epoch {epoch}")) == [0, 1, 2, 3]
        console.epoch(summary(epoch=epoch))
    lines = stream.getvalue().splitlines()
    assert lines == [format_header(30), *(format_epoch(summary(epoch=epoch)) for epoch in range(3))]


def test_every_line_is_flushed(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        console = Console(stream=stream)
        console.note("drawing")
        console.warn("slow")
        assert (tmp_path / "log").read_text() == "note: drawing\nwarning: slow\n"


def test_on_a_terminal_the_bar_shows_speed_and_losses_and_gives_way_to_the_line():
    stream = Terminal()
    console = Console(stream=stream)
    for step in (bar := console.bar(range(3), "epoch 1/30", images_each=16)):
        bar.show(TEXTS)
        if step == 1:
            console.note("in between")
    console.epoch(summary())
    drawn = stream.getvalue()
    assert "epoch 1/30" in drawn and "images/s" in drawn and "box 0.0812" in drawn
    assert "data wait 3%" in drawn and "1.2 GB" in drawn
    assert "\rnote: in between\n" in drawn
    assert drawn.rpartition("\r")[2] == f"{format_header(30)}\n{format_epoch(summary())}\n"


@pytest.mark.parametrize(("columns", "shown"), [(60, 0), (80, 2), (100, 3), (140, 5)])
def test_a_narrow_terminal_shows_whole_texts_or_none(columns, shown):
    stream = Terminal()
    with Console(stream=stream).bar(3, "Epoch 10/300", images_each=16) as bar:
        bar.dynamic_ncols = lambda _: (columns, 24)
        bar.refresh()
        bar.show(TEXTS)
        bar.refresh()
        last = stream.getvalue().rpartition("\r")[2]
    assert last.partition("left")[2].strip(", ") == "  ".join(TEXTS[:shown])


def test_a_bar_of_a_total_is_counted_by_hand():
    stream = Terminal()
    with Console(stream=stream).bar(40, "drawing", of="frames") as bar:
        bar.update(40)
        bar.refresh()
    assert "drawing" in stream.getvalue()
    assert "frames/s" in stream.getvalue() and "images/s" not in stream.getvalue()


@pytest.mark.parametrize(("total", "says"), [(40, r"x\.zip +\d+% .* MB/s  \S+ left"), (0, r"x\.zip  30\.0 MB .* MB/s")])
def test_a_download_is_counted_in_megabytes_whether_its_size_is_known_or_not(total, says):
    stream = Terminal()
    with Console(stream=stream).download_bar(total, "x.zip") as bar:
        bar.update(30)
        bar.refresh()
    assert re.search(says, stream.getvalue())
    assert "images" not in stream.getvalue()


def test_quiet_on_a_terminal_means_lines_without_bars():
    stream = Terminal()
    console = Console(quiet=True, stream=stream)
    with console.bar(10, "drawing") as bar:
        bar.update(10)
    console.epoch(summary())
    assert stream.getvalue() == f"{format_header(30)}\n{format_epoch(summary())}\n"


# ---- results of an evaluation ---------------------------------------------------------------------------------------


def class_metrics(name: str, **changes) -> ClassMetrics:
    figures = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "map50": 0.75, "map50_95": 0.4}
    best = {"best_f1": 0.35, "best_confidence": 0.21}
    return ClassMetrics(**{"name": name, "images": 2, "labels": 3, **figures, **best, "coco": COCO, **changes})


CLASSES = (class_metrics("cat"), class_metrics("never there", labels=0), class_metrics("w" * 50))


@pytest.mark.parametrize(("verbose", "best"), [(True, True), (True, False), (False, False)])
def test_figures_stand_below_their_titles(verbose, best):
    metrics = replace(METRICS, per_class=CLASSES)
    text = table(metrics, labelled(metrics) if verbose else (), best=best)
    title, whole, *classes = text.splitlines()
    titles = ["Class", "Images", "Labels", "P", "R", "F1", "mAP@.5", "mAP@.5:.95"]
    assert re.findall(r"\S+(?: F1| conf)?", title) == [*titles, *(["best F1", "at conf"] if best else [])]
    assert whole.split() == ["all", "1", "1", "0.500", "0.250", "0.333", "0.750", "0.400"]
    assert [line.split()[0] for line in classes] == (["cat", "w" * 31 + "…"] if verbose else [])
    assert all(line.split()[8:] == (["0.350", "0.210"] if best else []) for line in classes)
    ends = [match.end() for match in re.finditer(r"\S+(?: F1| conf)?", title)]
    assert all([match.end() for match in re.finditer(r"\S+", line)] == ends[: len(line.split())] for line in classes)


def test_the_twelve_figures_are_shown_by_name_and_a_dash_stands_for_none():
    *_, precision, recall, note = result(replace(METRICS, coco=replace(COCO, ap_small=None))).splitlines()
    assert precision.split() == "COCO AP 0.000 AP50 0.010 AP75 0.020 APs - APm 0.040 APl 0.050".split()
    assert recall.split() == "AR1 0.060 AR10 0.070 AR100 0.080 ARs 0.090 ARm 0.100 ARl 0.110".split()
    assert len(precision) == len(recall) <= 90
    assert "confidence 0.300" in note


def test_nothing_found_is_said_in_place_of_a_confidence():
    nothing = replace(METRICS, f1=0.0, best_confidence=0.0)
    assert result(nothing).splitlines()[-1] == "Nothing that is labelled was found above confidence 0.001"


def test_outputs_that_are_no_numbers_are_counted():
    assert strange_outputs(METRICS) == ""
    assert "best.pt said" in strange_outputs(replace(METRICS, non_finite=3), "best.pt")
    assert "3 of 1,000 images" in strange_outputs(replace(METRICS, images=1000, non_finite=3))
