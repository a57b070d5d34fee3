import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.logged import LOSSES, METRICS
from tests.stores import ImageLabels, build_store
from utils.report.csv_table import CsvTable
from utils.report.loggers import RESULT_COLUMNS, NonFiniteTable, result_row
from utils.structures import BadUpdate, NamedBatch

COLUMNS = ("epoch", "train/box_loss", "x/lr0")


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
