"""The pages of runs, most of it as a browser shows them."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.browser import browser
from tests.report.logged import COCO, LOSSES, METRICS, about
from utils.clock import PARTS, TimeSplit
from utils.config import TrainOptions
from utils.files import locked, write_yaml
from utils.hyp import Hyperparameters, plain_values
from utils.report.about import write_about
from utils.report.annotate import write_image
from utils.report.html import COMPARISON_FILE, compare, main, write_report
from utils.report.logger import LoggedEpoch
from utils.report.loggers import NonFiniteTable, ResultsLogger, TimingLogger, result_row
from utils.report.run_files import FILES
from utils.report.run_report import write_metrics
from utils.report.timing import timing_row
from utils.structures import ClassMetrics, LossMeans, UserError

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    "\"quoted\" & 'both' </script><img src=x onerror=alert(1)>",
    "שלום \u202e עולם",
    "🦓 {{ 7 * 7 }}",
    "x" * 70,
)
NAMES = ("cat", "dog", "bird 2", "bird 10")


class Run:
    """What loggers of CSV files want to know of a run."""

    def __init__(self, folder, start_epoch=0):
        self.folder, self.start_epoch = folder, start_epoch


def class_metrics(name, index):
    share = (index * 37 % 101) / 101
    return ClassMetrics(
        name=name,
        images=index + 1,
        labels=10 * index,  # the first has none, so no figures either
        precision=share,
        recall=1 - share,
        f1=share / 3,
        map50=share / 1.5,
        map50_95=share / 2,
        best_f1=share,
        best_confidence=0.123456789,
        coco=COCO,
    )


def epoch_metrics(epoch, epochs):
    """The best is the last but one."""
    share = (epoch + 1) / epochs if epoch < epochs - 1 else 0.1
    return replace(METRICS, map50=0.8 * share, map50_95=0.6 * share + 1e-5, precision=0.7 * share, recall=0.9 * share)


def write_run(folder, *, names=NAMES, epochs=5, finished=True, hyp=None, **options):
    """A run's folder, as training leaves it."""
    folder.mkdir(parents=True)
    loggers = ResultsLogger(Run(folder)), TimingLogger(Run(folder))
    for epoch in range(epochs):
        losses = LossMeans(box=0.1 / (epoch + 1), objectness=0.03 + 1e-6 * epoch, classification=1e-7)
        row = result_row(epoch, losses, epoch_metrics(epoch, epochs), [0.1 / (epoch + 1)] * 3)
        times = TimeSplit(wall=3.0 + epoch % 7, parts=dict.fromkeys(PARTS, 0.1 + epoch % 3), images=8)
        for logger in loggers:
            logger.epoch(LoggedEpoch(number=epoch + 1, results=row, timing=timing_row(epoch, times)))
    known = about()
    splits = {name: replace(split, labels_of_class=tuple(range(len(names)))) for name, split in known.splits.items()}
    write_about(folder / "about.json", replace(known, names=names, splits=splits))
    write_yaml(folder / "hyp.yaml", plain_values(hyp or Hyperparameters()))
    write_yaml(
        folder / "opt.yaml", {**asdict(TrainOptions(**{"epochs": epochs, "imgsz": 640, **options})), "freeze": []}
    )
    (folder / "scan.csv").write_text("split,file,line,problem,severity\ntrain,a.txt,2,box is empty,low\n")
    (folder / "weights").mkdir()
    for name in ("best.pt", "last.pt"):
        (folder / "weights" / name).touch()
    if finished:
        per_class = tuple(class_metrics(name, index) for index, name in enumerate(names))
        best = epoch_metrics(max(epochs - 2, 0), epochs)
        write_metrics(folder / "metrics.json", replace(best, labels=7, per_class=per_class, losses=LOSSES))
    return folder


def write_pictures(folder, side=400):
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    for name in ("val_batch0_labels.jpg", "val_batch0_pred.jpg", "worst_images.jpg", "PR_curve.png"):
        write_image(noise, folder / name)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / 'it\'s <b>bold & "ש"'
    write_run(folder, names=HOSTILE, hyp=Hyperparameters(lr0=0.02), name="<i>", cache="ram")
    write_pictures(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def comparison(hostile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    others = [write_run(folder / "a", epochs=3, batch_size=8), write_run(folder / "b", finished=False, patience=7)]
    return compare([hostile, *others], folder / COMPARISON_FILE)


def shown_cells(page, table):
    """By row name: title and text of the cells by column key."""
    return page.run(f"""
        const table = document.getElementById("{table}");
        const keys = [...table.tHead.rows[0].cells].map(one => one.dataset.key);
        return [...table.tBodies[0].rows].map(row => [row.cells[0].textContent,
            Object.fromEntries([...row.cells].slice(1).map((one, n) => [keys[n + 1], [one.title, one.textContent]]))]);
    """)


def point_at(page, chart, epoch):
    """Move the mouse over a chart to where an epoch is, and read all values."""
    return page.run(f"""
        const chart = charts[{chart}], box = chart.svg.getBoundingClientRect();
        const x = box.left + chart.x({epoch}) / 360 * box.width;
        const event = {{ clientX: x, clientY: box.top + 20, bubbles: true, pointerType: "mouse" }};
        chart.svg.dispatchEvent(new PointerEvent("pointermove", event));
        return [document.querySelector(".at").textContent, charts.flatMap(one => one.lines.map(
            line => [one.figure.dataset.table, line.item.dataset.column, line.value.textContent]))];
    """)


# ------------------------------------------------------------------------------------------------ as a browser shows it


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_show_without_error_overflow_or_network_whatever_names_hold(page, hostile, comparison, width, dark):
    for path in (hostile / "report.html", comparison):
        page.open(path.as_uri(), width=width, dark=dark)
        assert page.errors() == []
        assert page.requests() == [path.as_uri()]
        assert page.run("return document.documentElement.scrollWidth") == width
        assert page.run(
            "return document.images.length > 0 && [...document.images].every(one => !one.src || one.naturalWidth > 0)"
        )
        text = page.text
        for name in HOSTILE:
            assert name in text
        assert page.driver.title in (hostile.name, "3 runs")


@pytest.fixture(scope="module", params=["hostile", "real"])
def any_run(request, tmp_path_factory):
    """One written by hand with the writers of runs, and one that was trained."""
    if request.param == "hostile":
        return request.getfixturevalue("hostile")
    import train

    folder = tmp_path_factory.mktemp("trained")
    tiny = request.getfixturevalue("draw_tiny")(folder / "set")
    train.run(**tiny.options(project=str(folder), name="run", epochs=3, quiet=True))
    return folder / "run"


def test_every_figure_is_that_of_metrics_json(page, any_run):
    page.open((any_run / "report.html").as_uri())
    metrics = json.loads((any_run / "metrics.json").read_text())
    rows = shown_cells(page, "per-class")
    assert [name for name, _ in rows] == [one["name"] for one in metrics["per_class"]]
    for one, (_, cells) in zip(metrics["per_class"], rows):
        assert len(cells) == 9
        for key, (full, shown) in cells.items():
            if one[key] is None:
                assert (full, shown) == ("", "–")
            else:
                assert full == json.dumps(one[key])
                assert shown == (f"{one[key]:.3f}" if isinstance(one[key], float) else f"{one[key]:,}")
    figures = page.run(
        "return [...document.querySelectorAll('data')].map(o => [o.dataset.key, o.value, o.textContent])"
    )
    assert len(figures) == 5 + 2 + 12 + 3
    for key, full, shown in figures:
        value = metrics
        for part in [key] if key in metrics else key.split("/"):
            value = value[part]
        assert full == ("" if value is None else json.dumps(value))
        assert shown == "–" if value is None else float(shown) == pytest.approx(value, abs=0.0005)


def test_pointing_at_a_chart_shows_every_cell_of_that_epoch_in_all_charts(page, any_run):
    page.open((any_run / "report.html").as_uri())
    tables = {}
    for name in ("results", "timing"):
        head, *rows = [re.split(r", *", line.strip()) for line in (any_run / f"{name}.csv").read_text().splitlines()]
        tables[name] = [dict(zip(head, row)) for row in rows]
    for epoch in range(1, len(tables["results"]) + 1):
        said, values = point_at(page, epoch % 7, epoch)
        assert said == f"Values of epoch {epoch}"
        assert len(values) == 14
        for table, column, value in values:
            assert value == tables[table][epoch - 1][column]
    page.run("charts[0].svg.dispatchEvent(new PointerEvent('pointerleave', { pointerType: 'mouse' }))")
    best = max(
        tables["results"],
        key=lambda row: 0.1 * float(row["metrics/mAP_0.5"]) + 0.9 * float(row["metrics/mAP_0.5:0.95"]),
    )
    assert page.run("return document.querySelector('.at').textContent") == f"Values of epoch {best['epoch']}, the best"
    page.run("document.querySelector('#all-epochs summary').click()")
    page.wait_for("train/skipped")
    cells = page.run("return [...document.querySelectorAll('#all-epochs td')].map(one => one.textContent)")
    assert cells == [cell for row in tables["results"] for cell in row.values()]


def test_charts_are_read_by_keyboard_and_by_touch(page, hostile):
    from selenium.webdriver.common.keys import Keys

    page.open((hostile / "report.html").as_uri(), width=390)
    chart = page.driver.find_element("css selector", ".chart svg[role=slider]")
    chart.send_keys(Keys.ARROW_LEFT)
    assert chart.get_attribute("aria-valuetext").startswith("epoch 3: mAP@.5 0.48")
    chart.send_keys(Keys.END)
    assert "Values of epoch 5" in page.text
    x, y = page.run("""
        charts[1].svg.scrollIntoView({ block: "center" });
        const box = charts[1].svg.getBoundingClientRect();
        return [box.left + charts[1].x(2) / 360 * box.width, box.top + 50];
    """)
    touch = {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]}
    page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert "Values of epoch 2" in page.text


def test_the_class_table_sorts_by_click_and_by_keyboard_with_what_has_no_figure_last(page, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page.open(write_report(write_run(tmp_path / "run")).as_uri())
    button = page.driver.find_element("css selector", "#per-class th[data-key=map50] button")
    order = "return document.querySelector('#per-class th[data-key=map50]').getAttribute('aria-sort')"
    names = "return [...document.querySelectorAll('#per-class tbody th')].map(one => one.textContent)"
    button.click()
    assert (page.run(order), page.run(names)) == ("descending", ["bird 2", "dog", "bird 10", "cat"])
    button.send_keys(Keys.ENTER)
    assert (page.run(order), page.run(names)) == ("ascending", ["bird 10", "dog", "bird 2", "cat"])
    page.driver.find_element("css selector", "#per-class th:first-child button").send_keys(Keys.SPACE)
    assert (page.run(order), page.run(names)) == (None, ["bird 2", "bird 10", "cat", "dog"])


def test_settings_show_what_differs_and_on_request_all(page, hostile):
    page.open((hostile / "report.html").as_uri())
    seen = (
        "return [...document.querySelectorAll('.settings tbody tr')].filter(o => o.offsetHeight).map(o => o.innerText)"
    )
    rows = page.run(seen)
    assert [row.split()[0] for row in rows] == ["--epochs", "--name", "--cache", "lr0"]
    assert rows[-1].split()[:4] == ["lr0", "differs:", "0.02", "0.01"]
    page.driver.find_element("css selector", "#hyp-filter").click()
    assert len(page.run(seen)) == 3 + len(plain_values(Hyperparameters()))


def test_a_picture_is_enlarged_and_a_command_copied(page, hostile):
    page.open((hostile / "report.html").as_uri())
    page.run("document.querySelector('.enlarge').click()")
    assert page.run(
        "const one = document.getElementById('enlarged'); return one.open && one.querySelector('img').src.length > 1000"
    )
    page.run("document.querySelector('#enlarged button').click()")
    assert not page.run("return document.getElementById('enlarged').open")
    page.run("document.querySelector('.copy').click()")
    assert page.wait_for("Copied")
    commands = page.run("return [...document.querySelectorAll('.commands code')].map(one => one.textContent)")
    quoted = str(hostile).replace("'", "'\"'\"'")
    assert commands[0] == f"python train.py --resume '{quoted}/weights/last.pt' --epochs 10"
    assert page.errors() == []


def test_many_classes_and_epochs_stay_usable(page, tmp_path):
    names = tuple(f"class {index}" for index in range(1200))
    folder = write_run(tmp_path / "large", names=names, epochs=20)
    table = (folder / "results.csv").read_text().splitlines()
    rows = [table[1 + index % 20].split(",", 1)[1] for index in range(3000)]
    rows[1234] = rows[1234].replace(" 0.03", " 9.87", 1)
    (folder / "results.csv").write_text("\n".join([table[0], *(f"{i + 1},{row}" for i, row in enumerate(rows))]) + "\n")
    report = write_report(folder)
    assert report.stat().st_size < 3_000_000
    drawn = re.findall(r'<path d="(M[^"]*)"/>', report.read_text())
    assert max(path.count("L") for path in drawn) < 650
    page.open(report.as_uri(), width=390)
    search = page.driver.find_element("id", "per-class-search")
    search.send_keys("S 119")
    assert page.run("return document.querySelector('#per-class-search ~ output').textContent") == "11 of 1,200"
    assert (
        page.run("return [...document.querySelectorAll('#per-class tbody tr')].filter(one => one.offsetHeight).length")
        == 11
    )
    assert ["results", "train/obj_loss", "9.870014"] in point_at(page, 4, 1235)[1]
    assert page.errors() == []


def test_a_comparison_marks_the_best_and_lists_what_differs(page, comparison):
    page.open(comparison.as_uri())
    overview = dict(shown_cells(page, "overview"))
    assert list(overview)[1:] == ["a", "b"]
    assert overview["a"]["mAP_0.5"][1] == "0.533"
    assert overview["b"]["mAP_0.5"][1] == "0.640 best"
    assert overview["b"]["f1"] == ["", "–"]
    assert overview["b"]["status"][1] == "Not finished"
    differing = page.run("return [...document.querySelectorAll('.compared tbody th')].map(one => one.textContent)")
    assert differing == ["--epochs", "--batch-size", "--name", "--cache", "--patience", "lr0"]
    _, values = point_at(page, 0, 4)
    assert [value for _, column, value in values if column == "metrics/mAP_0.5"] == ["0.64", "–", "0.64"]


# --------------------------------------------------------------------------------------------- files, whatever they are


def test_one_epoch_and_numbers_that_are_none_are_shown_as_what_they_are(page, tmp_path):
    folder = write_run(tmp_path / "run", epochs=1, names=("only",))
    csv = folder / "results.csv"
    csv.write_text(csv.read_text().replace("0.03", "nan ").replace("1e-07", " inf "))
    page.open(write_report(folder).as_uri())
    assert page.errors() == []
    values = {column: value for _, column, value in point_at(page, 0, 1)[1]}
    assert values["train/box_loss"] == "0.1"
    assert "train/obj_loss" not in values
    assert "No value so far." in page.text
    page.run("document.querySelector('#all-epochs summary').click()")
    assert "nan" in page.wait_for("inf")


DAMAGED = (None, b"", b"\xff\x00 {] , \n,,\n", b"[1, {}]", b'{"per_class": [3, {"name": 4}], "names": 3}')


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_damaged_is_said_to_be(tmp_path, name):
    folder = write_run(tmp_path / "run", epochs=2)
    (folder / "nonfinite.csv").write_text("epoch, batch, what, images\n1, 2, loss, a.jpg\n")
    for content in DAMAGED:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        page = write_report(folder).read_text()
        is_said = re.search(rf'class="trouble">[^<]*{re.escape(name)}', page)
        is_sound = (name, content) == ("nonfinite.csv", None) or (name.endswith(".yaml") and content == DAMAGED[-1])
        assert is_said or is_sound, (content, page)
        (folder / name).touch()


def test_numbers_beyond_all_sense_leave_a_report(tmp_path):
    folder = write_run(tmp_path / "run", epochs=3)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["per_class"][1] |= {"map50_95": 10**400, "recall": float("nan"), "labels": "many", "f1": [1]}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"recall": 1e308, "images": -1.5}))
    for name in ("results.csv", "timing.csv"):
        lines = (folder / name).read_text().splitlines()
        row = lines[2].split(",")
        lines[2] = ",".join([row[0], "1e308", "-1e308", "1e-320", *row[4:]])
        lines[3] = ",".join(["1e300", *lines[3].split(",")[1:]])
        (folder / name).write_text("\n".join([*lines, lines[1]]) + "\n")
    (folder / "opt.yaml").write_text("epochs: -3\nfreeze: &a [*a]\nimgsz: {a: 1}\n3: 2026-01-01\n")
    page = write_report(folder).read_text()
    assert "1e+308" in page
    assert "results.csv is damaged: 2 of its 4 rows are left out." in page


def test_cut_files_and_pictures_leave_a_report(tmp_path):
    folder = write_run(tmp_path / "run")
    write_pictures(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    (folder / "worst_images.jpg").write_bytes(b"no picture")
    page = write_report(folder).read_text()
    assert "worst_images.jpg is damaged" in page
    assert "metrics.json is damaged: not valid JSON: line" in page


def test_a_report_changes_no_other_file(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / "results.csv").open("a") as file:
        file.write("6, 0.1, 0.")  # the row that is being written
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    write_report(folder)
    assert {path: path.read_bytes() for path in before} == before


def test_the_state_of_a_run_is_told(tmp_path):
    folder = write_run(tmp_path / "run", finished=False, epochs=4)
    assert ">Not finished<" in write_report(folder).read_text()
    handle = locked(folder, patience_s=0)
    assert ">Under way<" in write_report(folder).read_text()
    os.close(handle)
    write_metrics(folder / "metrics.json", METRICS)
    page = write_report(folder).read_text()
    assert ">Finished<" in page
    assert "python train.py --resume" in page


@pytest.mark.parametrize(("told", "noval", "best"), [(2, False, 2), (None, False, 4), (None, True, 5), (99, False, 4)])
def test_the_best_epoch_is_that_of_metrics_json_else_what_can_be_known(tmp_path, told, noval, best):
    folder = write_run(tmp_path / "run", noval=noval)
    if told is not None:
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(metrics | {"epoch": told}))
    assert f"Values of epoch {best}, the best" in write_report(folder).read_text()


def test_a_comparison_says_of_which_runs_it_does_not_know_the_settings(page, tmp_path):
    runs = [write_run(tmp_path / name, finished=name != "b") for name in "abc"]
    (runs[1] / "opt.yaml").unlink()
    page.open(compare(runs, tmp_path / COMPARISON_FILE).as_uri())
    text = " ".join(page.text.split())
    assert "Not known of b." in text and "The options are the same in all runs where they are known." in text
    assert "The hyperparameters are the same in all runs." in text
    assert page.run("return document.querySelectorAll('#overview td.best').length") == 0  # all are alike
    for expected in (["b", "a", "c"], ["a", "c", "b"]):  # Not finished, Finished, and the other way round
        page.run("document.querySelector('#overview th[data-key=status] button').click()")
        names = page.run("return [...document.querySelectorAll('#overview tbody th')].map(one => one.textContent)")
        assert names == expected


def test_skipped_updates_are_listed(tmp_path):
    folder = write_run(tmp_path / "run")
    path = NonFiniteTable.path_in(folder)
    path.write_text('epoch, batch, what, images\n1, 2, gradient, "a.jpg; <b>.jpg"\n')
    assert '<td>gradient</td><td class="path"><bdi>a.jpg; &lt;b&gt;.jpg</bdi></td>' in write_report(folder).read_text()


def test_large_pictures_are_made_smaller(tmp_path):
    folder = write_run(tmp_path / "run")
    write_pictures(folder, side=900)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 4_000_000
    report = write_report(folder)
    assert report.stat().st_size < 3_000_000
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', report.read_text())
    assert len(uris) == 4


def test_names_that_are_no_text_become_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"run \xff")
    try:
        write_run(folder)
    except OSError:
        pytest.skip("names are text here")
    (folder / "nonfinite.csv").write_text("epoch, batch, what, images\n1, 2, loss, \x01\x7f\n")
    page = write_report(folder).read_bytes().decode()
    assert "run \ufffd" in page
    assert "\x01" not in page


# -------------------------------------------------------------------------------------------------------- command line


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["html", *map(str, argv)])
    return main()


def test_the_command_writes_a_report_or_beside_several_runs_a_comparison(tmp_path, monkeypatch, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "more" / "two")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "one") == 0
    assert command(monkeypatch, one, two) == 0
    assert command(monkeypatch, one, one, "comparison.html", "--output", "page.html") == 0  # as of a glob
    assert capsys.readouterr().out.split() == ["one/report.html", "comparison.html", "page.html"]
    assert all((tmp_path / name).is_file() for name in ("one/report.html", "comparison.html", "page.html"))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["none"], "none: not found; expected the folder of a run"),
        (["file"], "file: is a file; expected the folder of a run"),
        (["."], ".: holds none of the files of a run (results.csv, "),
        (["--colour", "."], "unrecognized arguments: --colour"),
        ([], "the following arguments are required: RUN"),
        (["run", "--output", "no/such/page.html"], "no/such/page.html: cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    write_run(tmp_path / "run", epochs=1)
    assert command(monkeypatch, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m utils.report.html: error: {complaint}")


def test_write_report_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds none of the files of a run"):
        write_report(tmp_path)
