"""What people see in a browser while a run trains and when it is over: TensorBoard's own server and pages."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import urlsafe_b64decode
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

import train
from tests.browser import browser
from tests.conftest import NETWORK, ROOT

EPOCHS = 2
NAMES = ["RBC", "WBC", "Platelets"]
RUNS = ("finished", "running")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("tensorboard")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def watched(page, shared_datasets, tmp_path_factory):
    """A finished run and one that trains all the while, on a few images of bccd, and where TensorBoard shows them."""
    folder = tmp_path_factory.mktemp("watched")
    options = bccd_options(folder, shared_datasets / "bccd")
    flags = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
    running = started(
        [str(ROOT / "train.py"), *flags, "--name", "running", "--epochs", "5000", "--patience", "0"],
        folder / "running.log",
    )
    server = started(
        ["-m", "tensorboard.main", "--logdir", "runs", "--port", "0", "--host", "127.0.0.1", "--reload_interval", "1"],
        folder / "server.log",
    )
    try:
        train.run(**options, name="finished", epochs=EPOCHS, quiet=True)
        url = wait_until(lambda: re.search(r"http://127\S+/", (folder / "server.log").read_text()), server)[0]
        wait_until(lambda: logged(url, "finished") >= {"final/fitness"}, server, running)
        wait_until(lambda: logged(url, "running") >= {"metrics/mAP_0.5"}, server, running)
        os.setpriority(os.PRIO_PROCESS, running.pid, 15)  # it would take its core from what is tested
        page.open(url)
        yield SimpleNamespace(url=url, runs=folder / "runs", running=running)
        assert running.poll() is None  # all pages were read while it trained
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 128 + signal.SIGTERM
    finally:
        for process in (running, server):
            process.kill()
            process.wait()


def bccd_options(folder: Path, bccd: Path) -> dict:
    for split, count in (("train", 8), ("val", 4)):
        images = sorted((bccd / "images" / split).iterdir())[:count]
        (folder / f"{split}.txt").write_text("".join(f"{image}\n" for image in images))
    data = {"path": str(folder), "train": "train.txt", "val": "val.txt", "names": NAMES}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**NETWORK, "nc": len(NAMES)}))
    files = {"data": str(folder / "data.yaml"), "cfg": str(folder / "tiny.yaml"), "project": str(folder / "runs")}
    return {**files, "imgsz": 64, "batch_size": 4, "device": "cpu", "workers": 0, "amp": "off"}


def started(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, *arguments], cwd=log.parent, stdout=output, stderr=output)


def wait_until(found, *processes, seconds=60):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.2)
    return value


def logged(url: str, run: str) -> set:
    with urllib.request.urlopen(f"{url}data/plugin/scalars/tags") as answer:
        return set(json.load(answer).get(run, {}))


def read_tab(page, tab: str, *texts: str) -> str:
    """What the page says at a tab, in single spaces, once it has all of these texts, of both runs among others."""
    page.run(f"location.hash = {tab!r}")
    return " ".join(page.wait_for("finished", "running", *texts).split())


def selected(page, css: str, script: str) -> list:
    """A JavaScript expression of each `element` that matches, shadow trees included."""
    return page.run(
        f"""
        function find(root) {{
          const inner = [...root.querySelectorAll("*")].filter(one => one.shadowRoot).map(one => find(one.shadowRoot));
          return [...root.querySelectorAll({css!r}), ...inner.flat()];
        }}
        return find(document).map(element => {script});
        """
    )


def test_scalars_show_the_losses_of_results_csv(page, watched):
    page.open(f"{watched.url}#timeseries", height=3600)  # a card is filled when it is on the screen
    page.wait_for("final", "train", "5 cards")
    toggled = "['final', 'metrics', 'train'].some(one => element.textContent.includes(one)) && element.click()"
    selected(page, "button.group-toolbar", toggled)  # the first two are open from the start
    with (watched.runs / "finished/results.csv").open() as file:
        *_, last = csv.DictReader(file, skipinitialspace=True)
    losses = {loss: f"{float(last[f'train/{loss}_loss']):.4f}".rstrip("0") for loss in ("box", "cls", "obj")}
    rows = [rf"/{loss}_loss .*? finished \S+ {shown} {EPOCHS} " for loss, shown in losses.items()]
    wait_until(lambda: re.search(".*?".join(rows), " ".join(page.text.split())))
    page.wait_for("running")


def test_images_show_mosaics_and_predictions_beside_labels(page, watched):
    text = read_tab(page, "images", "train/batch0", "val/labels_and_predictions")
    assert f"val/labels_and_predictions finished tag: val/labels_and_predictions step {EPOCHS} " in text
    tags = ("train/batch0", "val/labels_and_predictions")
    wait_until(lambda: shown_pictures(page) >= {(run, tag) for run in RUNS for tag in tags})


def shown_pictures(page) -> set:
    """Run and tag of the pictures that are there, which TensorBoard has in their keys."""
    images = selected(page, "img", "[element.src, element.naturalWidth]")
    keys = [parse_qs(urlsplit(source).query).get("blob_key") for source, width in images if width > 100]
    return {tuple(json.loads(urlsafe_b64decode(f"{key[0]}=="))[1:3]) for key in keys if key}


def test_pr_curves_show_one_for_each_class(page, watched):
    tags = [f"{kind}/{name}" for kind in ("final/pr_curve", "pr_curve") for name in ("all classes", *NAMES)]
    text = read_tab(page, "pr_curves", *tags, f"step {EPOCHS}")
    assert "running is at step" in text
    assert len([line for line in selected(page, "path", "element.getAttribute('d')") if line]) >= len(tags)


def test_hparams_show_a_row_for_each_run_with_what_differs_first(page, watched):
    text = read_tab(page, "hparams", "Trial ID", "final/fitness", "weight_decay")
    titles, rows = text.partition("Trial ID Show Metrics ")[2].split(" finished ", 1)
    assert titles.startswith("epochs ") and titles.endswith(" final/recall")
    metrics = json.loads((watched.runs / "finished/metrics.json").read_text())
    finals = [f"{metrics[name]:.4f}" for name in ("fitness", "mAP_0.5", "mAP_0.5:0.95", "precision", "recall")]
    finished, running = rows.split(" running ", 1)
    assert finished.startswith(f"{EPOCHS:.4f} ") and finished.endswith(" ".join(finals))
    assert running.startswith("5000.0 ")


def test_graphs_show_the_layers_and_the_shapes_between_them(page, watched):
    text = read_tab(page, "graphs", "0 Conv", "10 Detect", "output")
    assert all(part in text for part in ("input", "3 C3", "5 SPPF", "8 Concat", "1×3×64×64", "1×32×4×4"))


def test_texts_show_options_data_environment_and_result(page, watched):
    metrics = json.loads((watched.runs / "finished/metrics.json").read_text())
    text = read_tab(page, "text", "final/result", "final/time", "run/options", "run/environment", "run/hyperparameters")
    for one in metrics["per_class"]:
        assert f"{one['name']} {one['images']} {one['labels']} {one['precision']:.3f} " in text
    assert "--imgsz 64" in text and "lr0 0.01 initial learning rate" in text and "--epochs 5000" in text


def test_custom_scalars_put_train_and_val_together(page, watched):
    losses = [
        f"{split}/{loss}_loss ({run})" for split in ("train", "val") for loss in ("box", "obj", "cls") for run in RUNS
    ]
    text = read_tab(page, "custom_scalars", "losses, train and val", *losses)
    assert all(part in text for part in ("metrics/recall (running)", "x/lr2 (finished)", "time/data_wait_s (running)"))
