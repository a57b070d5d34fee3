"""`python val.py` as a user meets it: the figures of the run that made the checkpoint, on any split; its mistakes."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import train
import val
from utils.evaluate.evaluator import Evaluator

CPU = {"device": "cpu", "workers": 0, "noplots": True}
FOUND = Path("runs/val/exp/metrics.json")
PICTURES = {
    *("val_batch0_labels.jpg", "val_batch0_pred.jpg", "confusion_matrix.png"),
    *("F1_curve.png", "P_curve.png", "R_curve.png", "PR_curve.png"),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def best(trained) -> str:
    return str(trained / "weights" / "best.pt")


def flags(*more: str, weights: str = "") -> list[str]:
    return [*(["--weights", weights] if weights else []), "--device", "cpu", "--workers", "0", "--noplots", *more]


def test_figures_are_those_of_the_run_to_the_last_digit(trained, best):
    metrics = val.run(weights=best, batch_size=8, **CPU)  # a run evaluates twice its batch of 4
    assert FOUND.read_bytes() == (trained / "metrics.json").read_bytes()
    assert metrics.map50 > 0.3  # 0 would prove little


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_figures_hardly_depend_on_the_batch_size(trained, best, batch_size):
    """Images of unlike shape get more padding when they share a batch; a batch of the whole split stays the same."""
    metrics = val.run(weights=best, batch_size=batch_size, **CPU)
    figures = json.loads((trained / "metrics.json").read_text())
    assert (metrics.images, metrics.labels) == (4, 4)
    if batch_size == 32:
        assert metrics.map50_95 == figures["mAP_0.5:0.95"]
    assert metrics.map50 == pytest.approx(figures["mAP_0.5"], abs=0.2)


def test_losses_count_label_smoothing_as_the_run_did(tiny):
    train.run(**tiny.options(label_smoothing=0.3))
    val.run(weights="runs/train/exp/weights/best.pt", batch_size=8, **CPU)
    assert FOUND.read_bytes() == Path("runs/train/exp/metrics.json").read_bytes()


def test_a_checkpoint_of_a_single_class_evaluates_on_many_by_itself(tiny):
    train.run(**tiny.options(single_cls=True))
    metrics = val.run(weights="runs/train/exp/weights/best.pt", batch_size=8, **CPU)
    assert FOUND.read_bytes() == Path("runs/train/exp/metrics.json").read_bytes()
    assert [(one.name, one.labels) for one in metrics.per_class] == [("item", 4)]


def test_a_network_of_one_class_takes_all_labels_for_it_when_told(tiny, cli):
    """Here one that was trained on a data set of one class, and so does not know by itself."""
    one = tiny.folder / "one.yaml"
    one.write_text(yaml.safe_dump(yaml.safe_load(tiny.data.read_text()) | {"names": ["thing"]}))
    for label in tiny.folder.rglob("*.txt"):
        label.write_text("0" + label.read_text()[1:])
    train.run(**tiny.options(data=str(one)))
    weights = "runs/train/exp/weights/best.pt"
    (tiny.folder / "labels/val/0.txt").write_text("1 0.5 0.5 0.3 0.3\n")
    code, _, error = cli(val, *flags("--data", str(tiny.data), weights=weights))
    assert code == 2
    assert "knows 1 classes" in error and "--single-cls takes these for one" in error
    code, output, error = cli(val, *flags("--data", str(tiny.data), "--single-cls", weights=weights))
    assert (code, error) == (0, "")
    assert "thing" in output


def test_a_network_of_many_classes_is_not_for_a_single_one(best, cli):
    code, _, error = cli(val, *flags("--single-cls", weights=best))
    assert code == 2
    assert "knows 2 classes, and should know one" in error


def test_command_prints_a_table_and_leaves_pictures(best, cli):
    code, output, problems = cli(val, "--weights", best, "--device", "cpu", "--workers", "1")
    assert (code, problems) == (0, "")
    assert re.search(r"Class +Images +Labels", output)
    assert all(re.search(rf"^ +{name} +\d", output, re.MULTILINE) for name in ("all", "blue", "red"))
    files = {path.name for path in FOUND.parent.iterdir()}
    assert files == {"metrics.json"} | PICTURES


def test_last_evaluates_like_best_but_unrounded(trained):
    metrics = val.run(weights=str(trained / "weights/last.pt"), batch_size=8, **CPU)
    assert metrics.images == 4


def test_other_splits(trained, best, tmp_path):
    assert val.run(weights=best, task="train", **CPU).images == 8
    content = yaml.safe_load((trained.parent / "set/data.yaml").read_text())
    content |= {"path": str(trained.parent / "set"), "test": "images/train"}
    (tmp_path / "with_test.yaml").write_text(yaml.safe_dump(content))
    metrics = val.run(weights=best, data=tmp_path / "with_test.yaml", task="test", **CPU)
    assert (metrics.images, metrics.labels) == (8, 8)


def test_image_size_is_rounded_up_with_a_note(best, cli):
    code, output, problems = cli(val, *flags("--img", "70", weights=best))
    assert (code, problems) == (0, "")
    assert [line for line in output.splitlines() if line.startswith("note:")] == [
        "note: --imgsz 70 is not a multiple of the network's stride 16: using 80"
    ]


def changed_data(trained, folder: Path, **changes) -> str:
    content = yaml.safe_load((trained.parent / "set/data.yaml").read_text())
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**content, "path": str(trained.parent / "set"), **changes}))
    return str(path)


def test_names_in_another_order_are_a_warning(trained, best, cli, tmp_path):
    code, output, _ = cli(val, *flags("--data", changed_data(trained, tmp_path, names=["red", "blue"]), weights=best))
    assert code == 0
    assert [line for line in output.splitlines() if line.startswith("warning:")]
    assert "warning" not in cli(val, *flags(weights=best))[1]


MISTAKES = {
    "no weights": ([], ["--weights is missing"]),
    "missing weights": (["--weights", "none.pt"], ["checkpoint not found: none.pt"]),
    "unknown flag": (["--conf", "0.1"], ["unknown flag '--conf'"]),
    "unknown task": (["--task", "tset"], ["--task", "tset", "train"]),
    "threshold": (["--weights", "BEST", "--iou-thres", "60"], ["--iou-thres 60", "between 0 and 1"]),
    "missing data": (["--weights", "BEST", "--data", "none.yaml"], ["--data file not found: none.yaml"]),
    "missing split": (["--weights", "BEST", "--task", "test"], ["data.yaml", "no 'test' split"]),
    "other number of classes": (["--weights", "BEST", "--data", "THREE"], ["2 classes", "3 names"]),
    "device": (["--weights", "BEST", "--device", "3"], ["--device 3", "there is", "cpu"]),
    "file as project": (["--weights", "BEST", "--project", "BEST"], ["--project", "is a file"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_no_folder(trained, best, cli, tmp_path, mistake):
    given, expected = MISTAKES[mistake]
    given = [
        {"BEST": best, "THREE": changed_data(trained, tmp_path, names=["a", "b", "c"])}.get(one, one) for one in given
    ]
    code, output, problems = cli(val, *given)
    assert code == 2
    assert problems.startswith("val.py: error: ") and problems.count("\n") == 1
    assert all(part in problems for part in expected), problems
    assert "Traceback" not in output + problems
    assert not Path("runs").exists()


def test_out_of_memory_names_the_remedy(best, cli, monkeypatch):
    def full(*images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("models.yolo.DetectionModel.forward", full)
    code, _, problems = cli(val, *flags(weights=best))
    assert code == 1
    assert problems == "val.py: error: out of memory: lower --batch-size (now 32) or --imgsz (now 64)\n"


def test_an_image_that_vanishes_on_the_way(tiny, cli, monkeypatch):
    train.run(**tiny.options())
    honest = Evaluator.evaluation

    def vanishing(self, *args, **kwargs):
        tiny.image("val", 2).unlink()
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "evaluation", vanishing)
    code, _, problems = cli(val, *flags(weights="runs/train/exp/weights/best.pt"))
    assert code == 1
    assert re.fullmatch(r"val\.py: error: \S+images/val/2\.png: .*\n", problems)


def test_ctrl_c(best, cli, monkeypatch):
    def interrupted(*images):
        raise KeyboardInterrupt

    monkeypatch.setattr("models.yolo.DetectionModel.forward", interrupted)
    code, _, problems = cli(val, *flags(weights=best))
    assert (code, problems.strip()) == (130, "val.py: interrupted")


def test_evaluation_changes_no_file_of_the_run(trained, best):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    val.run(weights=best, **CPU)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_from_another_folder_and_as_a_process(best, start, tmp_path):
    """The data set of a checkpoint is found from anywhere."""
    process = start("val.py", *flags(weights=best), cwd=tmp_path)
    output, problems = process.communicate(timeout=100)
    assert (process.returncode, problems) == (0, b"")
    assert b"\r" not in output
    assert FOUND.exists()
