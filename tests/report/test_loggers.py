import csv
import io
import itertools
import math
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stores import ImageLabels, build_store
from utils.report.loggers import (
    LOGGERS,
    RESULT_COLUMNS,
    TIMING_COLUMNS,
    Console,
    CsvTable,
    EpochSummary,
    Logger,
    NonFiniteTable,
    TensorBoardLogger,
    format_duration,
    format_epoch,
    format_header,
    format_losses,
    result,
    result_row,
    strange_outputs,
    table,
)
from utils.structures import BadUpdate, ClassMetrics, CocoFigures, LossMeans, Metrics, NamedBatch

TITLES = ["epoch", "box", "obj", "cls", "P", "R", "mAP@.5", "mAP@.5:.95", "images/s"]
COLUMNS = ("epoch", "train/box_loss", "x/lr0")
LOSSES = LossMeans(box=0.0812345678, objectness=0.03, classification=1e-7)
COCO = CocoFigures(**{name: place / 100 for place, name in enumerate(CocoFigures.__annotations__)})
METRICS = Metrics(
    precision=0.5,
    recall=0.25,
    f1=1 / 3,
    map50=0.75,
    map50_95=0.4,
    images=1,
    labels=1,
    best_confidence=0.3,
    per_class=(),
    coco=COCO,
    losses=LOSSES,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, skipinitialspace=True))


def row(epoch):
    return {"epoch": epoch, "train/box_loss": epoch + 0.123456789, "x/lr0": 1e-5}


# ---- CSV


def test_rows_have_a_header_six_digits_and_straight_columns(tmp_path):
    table = CsvTable(tmp_path / "t.csv", COLUMNS)
    for epoch in (0, 1, 10):
        table.append(row(epoch))
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0].replace(" ", "") == ",".join(COLUMNS)
    assert len({len(line) for line in lines}) == 1
    assert [line.replace(" ", "") for line in lines[1:]] == ["0,0.123457,1e-05", "1,1.12346,1e-05", "10,10.1235,1e-05"]
    assert [cells["epoch"] for cells in read(table.path)] == ["0", "1", "10"]


def test_a_missing_value_is_an_empty_cell_and_a_strange_one_is_a_bug(tmp_path):
    table = CsvTable(tmp_path / "t.csv", COLUMNS)
    table.append({"epoch": 0, "x/lr0": math.nan})
    assert table.rows() == [{"epoch": "0", "train/box_loss": "", "x/lr0": "nan"}]
    with pytest.raises(AssertionError):
        table.append({"epoch": 1, "lr": 1.0})


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_values_read_back_to_six_digits(tmp_path_factory, value):
    table = CsvTable(tmp_path_factory.mktemp("csv") / "t.csv", COLUMNS)
    table.append({"epoch": 0, "x/lr0": np.float64(value)})
    assert float(read(table.path)[0]["x/lr0"]) == pytest.approx(value, rel=1e-5)


def test_killed_at_any_byte_whole_rows_survive_and_the_next_follows_them(tmp_path):
    path = tmp_path / "t.csv"
    table = CsvTable(path, COLUMNS)
    for epoch in range(3):
        table.append(row(epoch))
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = max(whole[:size].count(b"\n") - 1, 0)
        again = CsvTable(path, COLUMNS)
        again.append(row(expected))
        assert [int(cells["epoch"]) for cells in read(path)] == list(range(expected + 1))


def test_a_table_that_is_whole_is_not_rewritten(tmp_path):
    table = CsvTable(tmp_path / "t.csv", COLUMNS)
    table.append(row(0))
    before = table.path.stat()
    CsvTable(table.path, COLUMNS).truncate(1)
    assert table.path.stat().st_ino == before.st_ino and table.path.stat().st_mtime_ns == before.st_mtime_ns


def test_resuming_drops_the_epochs_that_come_again(tmp_path):
    table = CsvTable(tmp_path / "t.csv", COLUMNS)
    for epoch in range(1, 6):
        table.append(row(epoch))
    straight = table.path.read_bytes()
    table.truncate(3)
    assert [cells["epoch"] for cells in table.rows()] == ["1", "2", "3"]
    for epoch in (4, 5):
        table.append(row(epoch))
    assert table.path.read_bytes() == straight
    table.truncate(0)
    assert table.rows() == [] and table.path.read_text().count("\n") == 1
    CsvTable(tmp_path / "none.csv", COLUMNS).truncate(0)
    assert not (tmp_path / "none.csv").exists()


def test_rows_of_an_older_header_move_below_the_new_one(tmp_path):
    CsvTable(tmp_path / "t.csv", ("epoch", "gone", "x/lr0")).append({"epoch": 0, "gone": 1, "x/lr0": 0.5})
    table = CsvTable(tmp_path / "t.csv", COLUMNS)
    assert read(table.path) == table.rows() == [{"epoch": "0", "train/box_loss": "", "x/lr0": "0.5"}]


def test_a_result_row_fills_every_column_of_an_evaluated_epoch():
    filled = result_row(4, LOSSES, METRICS, [0.1, 0.2, 0.3])
    assert tuple(filled) == RESULT_COLUMNS
    assert filled["epoch"] == 5 and filled["metrics/mAP_0.5:0.95"] == 0.4 and filled["x/lr2"] == 0.3
    assert filled["val/box_loss"] == filled["train/box_loss"] == LOSSES.box
    skipped = result_row(4, LOSSES, None, [0.1, 0.2, 0.3])
    assert set(RESULT_COLUMNS) - set(skipped) == {
        name for name in RESULT_COLUMNS if name.startswith(("metrics", "val"))
    }


ODD = ["plain.jpg", "a, b.jpg", 'the "best".jpg', "two\nlines\u2028.jpg", "\udcff.jpg", '",".jpg', "日本 é.jpg"]


def store_of(names):
    nothing = ImageLabels(boxes=np.empty((0, 4)), classes=np.empty(0, np.int64))
    return build_store(list(map(Path, names)), [(64, 64)] * len(names), [nothing] * len(names))


def bad(epoch, index, *images, what="loss"):
    return BadUpdate(what=what, batches=(NamedBatch(epoch=epoch, index=index, images=images),))


def test_batches_that_are_not_finite_are_told_with_paths_of_any_kind(tmp_path):
    """In a file that others read too, and that is a whole one for ourselves."""
    update = BadUpdate(
        what="gradient",
        batches=(NamedBatch(epoch=0, index=4, images=(0, 1)), NamedBatch(epoch=0, index=5, images=tuple(range(7)))),
    )
    NonFiniteTable(tmp_path).append([update, bad(2, 0, 0)], store_of(ODD))
    path = tmp_path / "nonfinite.csv"
    before = path.stat().st_ino
    shown = [*ODD[:3], "two\\nlines\\u2028.jpg", "\\udcff.jpg", *ODD[5:]]
    assert read(path) == [
        {"epoch": "1", "batch": "5", "what": "gradient", "images": "plain.jpg; a, b.jpg"},
        {"epoch": "1", "batch": "6", "what": "gradient", "images": "; ".join(shown)},
        {"epoch": "3", "batch": "1", "what": "loss", "images": "plain.jpg"},
    ]
    again = NonFiniteTable(tmp_path)
    again.keep(5, 0)
    assert path.stat().st_ino == before
    again.keep(2, 0)
    assert [cells["batch"] for cells in read(path)] == ["5", "6"]
    assert read(path)[1]["images"] == "; ".join(shown)


def test_a_run_that_resumes_names_what_it_meets_again_once(tmp_path):
    table, store = NonFiniteTable(tmp_path), store_of(ODD)
    table.keep(0, 0)
    assert not list(tmp_path.iterdir())  # nothing bad, no file
    updates = [bad(0, 7, 0), bad(1, 2, 1), bad(1, 10, 2), bad(2, 0, 3)]
    table.append(updates, store)
    whole = (tmp_path / "nonfinite.csv").read_bytes()
    for place, kept in (((1, 3), 2), ((1, 2), 1), ((2, 0), 3), ((2, 1), 4), ((0, 0), 0)):
        table.keep(*place)
        assert len(read(tmp_path / "nonfinite.csv")) == kept
        table.append(updates[kept:], store)
        assert (tmp_path / "nonfinite.csv").read_bytes() == whole


def test_a_batch_of_thousands_of_images_is_read_again(tmp_path):
    """Its cell is longer than the csv module reads unasked."""
    NonFiniteTable(tmp_path).append(
        [bad(0, 0, *range(2000)), bad(1, 0, 0)], store_of([f"{'x' * 90}{i}" for i in range(2000)])
    )
    NonFiniteTable(tmp_path).keep(1, 0)
    rows = CsvTable(tmp_path / "nonfinite.csv", ("epoch", "batch", "what", "images")).rows()
    assert [cells["epoch"] for cells in rows] == ["1"] and rows[0]["images"].count(";") == 1999


def test_a_stray_quote_damages_its_own_row_alone(tmp_path):
    table = CsvTable(tmp_path / "t.csv", COLUMNS)
    for epoch in range(3):
        table.append(row(epoch))
    lines = table.path.read_text().splitlines(keepends=True)
    table.path.write_text("".join([*lines[:2], lines[2].replace("1.12346", '"1.1234'), lines[3]]))
    assert [cells["epoch"] for cells in CsvTable(table.path, COLUMNS).rows()] == ["0", "2"]


# ---- loggers


def log_run(folder, epochs, start_epoch=0, **kind):
    loggers = [make(folder, start_epoch=start_epoch) for make in LOGGERS.values()]
    for epoch in range(start_epoch, epochs):
        for logger in loggers:
            logger.epoch(
                result_row(epoch, LOSSES, METRICS, [0.1 * epoch] * 3), dict.fromkeys(TIMING_COLUMNS, epoch + 1)
            )
    for logger in loggers:
        logger.close()


def test_a_resumed_run_leaves_the_csv_files_of_an_uninterrupted_one(tmp_path):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    log_run(tmp_path / "straight", 4)
    log_run(tmp_path / "resumed", 3)
    log_run(tmp_path / "resumed", 4, start_epoch=2)
    for name in ("results.csv", "timing.csv"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_tensorboard_shows_the_columns_as_tags_and_a_resumed_run_once(tmp_path, monkeypatch):
    seconds = itertools.count(int(time.time()))  # event files of one second and process are read 10 before 9
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_run(tmp_path, 3)
    log_run(tmp_path, 4, start_epoch=2)
    logger = TensorBoardLogger(tmp_path, start_epoch=4)
    logger.image("val", np.full((4, 6, 3), 200, np.uint8), 4)
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(RESULT_COLUMNS) - {"epoch"}
    assert [event.step for event in events.Scalars("x/lr1")] == [1, 2, 3, 4]
    assert events.Scalars("metrics/mAP_0.5:0.95")[0].value == pytest.approx(0.4)
    assert (events.Images("val")[0].width, events.Images("val")[0].height) == (6, 4)


def test_where_the_folder_cannot_be_written_there_is_one_note_and_nothing_else(tmp_path, capfd):
    notes, folder = [], tmp_path / "run"
    folder.mkdir()
    logger = TensorBoardLogger(folder, note=notes.append)
    logger.scalars({"x/lr0": 0.1}, 1)
    shutil.rmtree(folder)
    for step in (2, 3):
        logger.scalars({"x/lr0": 0.1}, step)
    logger.close()
    assert notes == [f"no more TensorBoard events: {folder} cannot be written"]
    assert capfd.readouterr().err == "" and not folder.exists()


def test_without_tensorboard_one_note_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    notes = []
    logger = TensorBoardLogger(tmp_path, note=notes.append)
    logger.epoch(result_row(0, LOSSES, METRICS, [0.1]), {})
    logger.image("val", np.zeros((4, 6, 3), np.uint8), 0)
    logger.close()
    assert len(notes) == 1 and "pip install tensorboard" in notes[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", LOGGERS.values())
def test_every_logger_keeps_the_contract_that_the_null_logger_states(kind):
    assert issubclass(kind, Logger)
    Logger().epoch({}, {})
    Logger().scalars({}, 0)
    Logger().image("tag", np.zeros((1, 1, 3), np.uint8), 0)
    Logger().close()


# ---- terminal


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
        bar.set_postfix_str(format_losses(LOSSES))
        if step == 1:
            console.note("in between")
    console.epoch(summary())
    drawn = stream.getvalue()
    assert "epoch 1/30" in drawn and "images/s" in drawn and "box 0.0812" in drawn
    assert "\rnote: in between\n" in drawn
    assert drawn.rpartition("\r")[2] == f"{format_header(30)}\n{format_epoch(summary())}\n"


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
    text = table(replace(METRICS, per_class=CLASSES), verbose, best=best)
    title, whole, *classes = text.splitlines()
    titles = ["Class", "Images", "Labels", "P", "R", "F1", "mAP@.5", "mAP@.5:.95"]
    assert re.findall(r"\S+(?: F1| conf)?", title) == [*titles, *(["best F1", "at conf"] if best else [])]
    assert whole.split() == ["all", "1", "1", "0.500", "0.250", "0.333", "0.750", "0.400"]
    assert [line.split()[0] for line in classes] == (["cat", "w" * 31 + "…"] if verbose else [])
    assert all(line.split()[8:] == (["0.350", "0.210"] if best else []) for line in classes)
    ends = [match.end() for match in re.finditer(r"\S+(?: F1| conf)?", title)]
    assert all([match.end() for match in re.finditer(r"\S+", line)] == ends[: len(line.split())] for line in classes)


def test_the_twelve_figures_are_shown_by_name_and_a_dash_stands_for_none():
    *_, precision, recall, note = result(replace(METRICS, coco=replace(COCO, ap_small=None)), False).splitlines()
    assert precision.split() == "COCO AP 0.000 AP50 0.010 AP75 0.020 APs - APm 0.040 APl 0.050".split()
    assert recall.split() == "AR1 0.060 AR10 0.070 AR100 0.080 ARs 0.090 ARm 0.100 ARl 0.110".split()
    assert len(precision) == len(recall) <= 90
    assert "confidence 0.300" in note


def test_nothing_found_is_said_in_place_of_a_confidence():
    nothing = replace(METRICS, f1=0.0, best_confidence=0.0)
    assert result(nothing, False).splitlines()[-1] == "Nothing that is labelled was found above confidence 0.001"


def test_outputs_that_are_no_numbers_are_counted():
    assert strange_outputs(METRICS) == ""
    assert "best.pt said" in strange_outputs(replace(METRICS, non_finite=3), "best.pt")
    assert "3 of 1,000 images" in strange_outputs(replace(METRICS, images=1000, non_finite=3))
