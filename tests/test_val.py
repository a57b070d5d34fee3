"""`python val.py` as a user meets it: the figures of the run that made the checkpoint, on any split; its mistakes."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
import val
from models.yolo import DetectionModel
from tests.coco_tool import tool_figures
from utils.boxes import pairwise_iou
from utils.evaluate.evaluator import Evaluator

CPU = {"device": "cpu", "workers": 0, "noplots": True}
FOUND = Path("runs/val/exp/metrics.json")
PICTURES = {
    *(f"val_batch{index}_{kind}.jpg" for index in range(3) for kind in ("labels", "pred")),
    "worst_images.jpg",
    *("confusion_matrix.png", "confusion_matrix_counts.png"),
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
def test_figures_do_not_depend_on_the_batch_size(trained, best, batch_size):
    """Up to the rounding of convolutions over more or fewer images."""
    metrics = val.run(weights=best, batch_size=batch_size, **CPU)
    figures = json.loads((trained / "metrics.json").read_text())
    assert (metrics.images, metrics.labels) == (4, 4)
    assert metrics.map50 == pytest.approx(figures["mAP_0.5"], abs=1e-6)
    assert metrics.map50_95 == pytest.approx(figures["mAP_0.5:0.95"], abs=1e-6)
    assert metrics.losses.objectness == pytest.approx(figures["losses"]["objectness"], rel=1e-5)


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
    assert "knows 1 classes" in error and "--single-cls takes all classes for one" in error
    code, output, error = cli(val, *flags("--data", str(tiny.data), "--single-cls", weights=weights))
    assert (code, error) == (0, "")
    assert "thing" in output


def test_a_network_of_many_classes_evaluates_as_one_of_a_single_one(best, cli):
    """Blue for red is a hit then. An anchor speaks for the one class alone, so boxes that are two classes' are one."""
    code, output, problems = cli(val, *flags("--single-cls", "--save-json", "--verbose", weights=best))
    assert (code, problems) == (0, "")
    assert re.search(r"^ +item +4 +4 ", output, re.MULTILINE) and "blue" not in output
    figures, predictions = read(FOUND), read(RESULTS / "predictions.json")
    assert figures["losses"] is None and figures["mAP_0.5"] > 0.3
    assert [one["name"] for one in figures["per_class"]] == ["item"]
    assert {item["category_id"] for item in predictions} == {1}
    several = val.run(weights=best, name="several", save_json=True, **CPU)
    expected = {item["score"] for item in read(Path("runs/val/several/predictions.json"))}
    assert several.labels == 4 and max(item["score"] for item in predictions) == max(expected)


def test_single_cls_is_for_speed_too(best, cli):
    assert cli(val, *flags("--single-cls", "--task", "speed", weights=best))[0] == 0


def test_command_prints_a_table_and_leaves_pictures(best, cli):
    code, output, problems = cli(val, "--weights", best, "--device", "cpu", "--workers", "1")
    assert (code, problems) == (0, "")
    assert re.search(r"Class +Images +Labels", output)
    assert all(re.search(rf"^ +{name} +\d", output, re.MULTILINE) for name in ("all", "blue", "red"))
    files = {path.name for path in FOUND.parent.iterdir()}
    assert {"metrics.json"} | PICTURES <= files
    assert not {name for name in files if name.endswith((".json", ".txt"))} - {"metrics.json"}
    speeds = r"^Per image: [\d.]+ ms waiting for data, [\d.]+ ms network, [\d.]+ ms NMS; 64 px, batches of 32, CPU \("
    assert len(re.findall(speeds, output, re.MULTILINE)) == 1
    assert max(map(len, output.split("\n"))) <= 140


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


def test_a_data_set_that_is_gone_is_told_from_a_wrong_flag(tiny, cli):
    train.run(**tiny.options())
    tiny.data.unlink()
    code, _, problems = cli(val, *flags(weights="runs/train/exp/weights/best.pt"))
    assert code == 2
    learned_from = "the data set that runs/train/exp/weights/best.pt was trained on; name another with --data"
    assert problems == f"val.py: error: not found: {tiny.data}, {learned_from}\n"


NOTE = r"^note: these figures are those of detections above {} alone, {} in an image at most; AP wants the defaults"


def test_figures_of_few_detections_are_told_to_be_that(best, cli):
    assert "note" not in cli(val, *flags("--conf-thres", "0.001", "--max-det", "100", weights=best))[1]
    for given, confidence, most in (["--conf-thres", "0.2"], "0.2", 300), (["--max-det", "99"], "0.001", 99):
        output = cli(val, *flags(*given, weights=best))[1]
        assert len(re.findall(NOTE.format(confidence, most), output, re.MULTILINE)) == 1


def test_the_best_confidence_is_one_at_which_there_is_something(best, cli):
    """F1 is flat below the weakest detection, and the first of equals would be 0."""
    output = cli(val, *flags("--conf-thres", "0.008", weights=best))[1]
    (best_at,) = re.findall(r"those at confidence ([\d.]+),", output)
    assert float(best_at) >= 0.008
    output = cli(val, *flags("--conf-thres", "0.9999", weights=best))[1]
    assert "those at confidence" not in output
    assert re.findall("^Nothing .*", output, re.MULTILINE) == [
        "Nothing that is labelled was found above confidence 0.9999"
    ]


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
    "other number of classes": (["--weights", "BEST", "--data", "THREE"], ["2 classes", "3 names", "--single-cls"]),
    "device": (["--weights", "BEST", "--device", "3"], ["--device 3", "there is", "cpu"]),
    "task speed with files": (["--weights", "BEST", "--task", "speed", "--save-txt"], ["--task speed and --save-txt"]),
    "scores without files": (["--weights", "BEST", "--save-conf"], ["--save-conf", "--save-txt or --save-hybrid"]),
    "half on the CPU": (["--weights", "BEST", "--device", "cpu", "--half"], ["--half", "needs a CUDA GPU"]),
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
    assert list(Path("runs/val").iterdir()) == []  # the next one is exp again


def test_ctrl_c_leaves_the_evaluation_that_was_to_be_replaced(best, cli, monkeypatch):
    assert cli(val, "--weights", best, "--device", "cpu", "--workers", "0", "--save-json")[0] == 0
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}

    def interrupted(*images):
        raise KeyboardInterrupt

    monkeypatch.setattr("models.yolo.DetectionModel.forward", interrupted)
    assert cli(val, *flags("--exist-ok", weights=best))[0] == 130
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before


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


# ---- results for other tools ----------------------------------------------------------------------------------------

RESULTS = FOUND.parent


def as_coco(trained, folder: Path, *, categories=("red", "blue")) -> str:
    """A data YAML whose val split is the tiny one's as a COCO file, with ids in no order, and boxes that stick out."""
    images, annotations = [], []
    for index, number in enumerate((40, 7, 2**40, 12)):
        path = trained.parent / f"set/images/val/{index}.png"
        height, width = [(64, 64), (45, 61), (63, 50)][index % 3]
        images.append({"id": number, "file_name": str(path), "height": height, "width": width})
        box = {"bbox": [10.1, 12.0, 24.8, 27.0], "area": 500.5, "iscrowd": int(index == 3)}
        annotations.append({"id": index + 1, "image_id": number, "category_id": 5 + 85 * (index % 2), **box})
        if index < 2:
            outside = {"bbox": [-7.3, 20.2, 30.6, 60.9], "area": index * 900.25, "iscrowd": index}
            annotations.append(annotations[-1] | {"id": 10 + index} | outside)
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": {"blue": 5, "red": 90}[name], "name": name} for name in categories]
    (folder / "val.json").write_text(json.dumps(content))
    return changed_data(trained, folder, val=str(folder / "val.json"))


def twelve_of(folder: Path) -> list[float]:
    told = json.loads((folder / "metrics.json").read_text())["coco"]
    return [np.nan if value is None else value for value in told.values()]


def read(path: Path):
    return json.loads(path.read_text())


def test_predictions_of_a_coco_split_carry_its_ids_and_score_the_same(trained, best, cli, tmp_path):
    data = as_coco(trained, tmp_path)
    code, _, problems = cli(val, *flags("--data", data, "--save-json", weights=best))
    assert (code, problems) == (0, "")
    predictions, against = read(RESULTS / "predictions.json"), read(RESULTS / "annotations.json")
    assert {item["image_id"] for item in predictions} == {40, 7, 2**40, 12}
    assert {item["category_id"] for item in predictions} == {5, 90}
    scored = tool_figures(read(tmp_path / "val.json"), predictions).twelve
    np.testing.assert_allclose(scored, twelve_of(RESULTS), atol=1e-9, rtol=0)
    assert scored[1] > 0.3
    np.testing.assert_allclose(tool_figures(against, predictions).twelve, twelve_of(RESULTS), atol=1e-9, rtol=0)
    given = read(tmp_path / "val.json")
    assert {item["id"] for item in against["images"]} == {40, 7, 2**40, 12}
    assert {item["id"]: item["name"] for item in against["categories"]} == {5: "blue", 90: "red"}
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    assert rows_of(against["annotations"], keys) == rows_of(given["annotations"], keys)
    assert [item["id"] for item in against["annotations"]] == list(range(1, 7))


def rows_of(items: list[dict], keys) -> list[str]:
    return sorted(json.dumps([item[key] for key in keys]) for item in items)


def test_the_two_files_agree_where_the_scan_left_something_out(trained, best, cli, tmp_path):
    """A box that is there twice, an image that cannot be read, and ids from 0: against the user's file none of it."""
    data = as_coco(trained, tmp_path)
    content = read(tmp_path / "val.json")
    twice = content["annotations"][2] | {"id": 77}
    gone = {"id": 99, "file_name": str(tmp_path / "broken.png"), "height": 10, "width": 10}
    (tmp_path / "broken.png").write_bytes(b"no image")
    content["annotations"] += [twice, twice | {"id": 78, "image_id": 99, "bbox": [1, 1, 5, 5]}]
    content["images"].append(gone)
    numbers = {40: 0, 7: 1, 2**40: 2, 12: 3, 99: 4}
    for item in content["images"]:
        item["id"] = numbers[item["id"]]
    for item in content["annotations"]:
        item |= {"image_id": numbers[item["image_id"]], "category_id": {5: 0, 90: 1}[item["category_id"]]}
        item["id"] -= 1
    for item in content["categories"]:
        item["id"] = {5: 0, 90: 1}[item["id"]]
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert cli(val, *flags("--data", data, "--save-json", weights=best))[0] == 0
    predictions, against = read(RESULTS / "predictions.json"), read(RESULTS / "annotations.json")
    assert [item["id"] for item in against["images"]] == [0, 1, 2, 3] and len(against["annotations"]) == 6
    np.testing.assert_allclose(tool_figures(against, predictions).twelve, twelve_of(RESULTS), atol=1e-9, rtol=0)
    theirs = np.array(tool_figures(content, predictions).twelve)
    assert not np.allclose(theirs, twelve_of(RESULTS), equal_nan=True)


def test_the_two_files_are_of_the_drawn_share_alone(trained, best, cli, tmp_path):
    as_coco(trained, tmp_path)
    data = changed_data(trained, tmp_path, train=str(tmp_path / "val.json"), val=0.5)
    assert cli(val, *flags("--data", data, "--save-json", weights=best))[0] == 0
    predictions, against = read(RESULTS / "predictions.json"), read(RESULTS / "annotations.json")
    ids = {item["id"] for item in against["images"]}
    assert 0 < len(ids) < 4 and ids <= {40, 7, 2**40, 12}
    assert {item["image_id"] for item in predictions + against["annotations"]} <= ids
    np.testing.assert_allclose(tool_figures(against, predictions).twelve, twelve_of(RESULTS), atol=1e-9, rtol=0)


def test_predictions_of_another_split_come_with_annotations(best, cli):
    code, output, problems = cli(val, *flags("--save-json", weights=best))
    assert (code, problems) == (0, "")
    truth, predictions = read(RESULTS / "annotations.json"), read(RESULTS / "predictions.json")
    assert [item["file_name"] for item in truth["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    scored = tool_figures(truth, predictions).twelve
    np.testing.assert_allclose(scored, twelve_of(RESULTS), atol=1e-9, rtol=0)
    shown = [
        float(value) for value in re.findall(r"A[PR]\w* +(\d\.\d+|-)", output.replace(" -", " nan")) if value != "-"
    ]
    np.testing.assert_allclose(shown, [value for value in twelve_of(RESULTS) if value == value], atol=0.0006)


def test_detections_of_a_class_that_the_coco_file_lacks(trained, best, cli, tmp_path):
    """Its boxes are gone as well, as nobody can name their class."""
    data = as_coco(trained, tmp_path)
    content = read(tmp_path / "val.json")
    content["categories"] = [item for item in content["categories"] if item["name"] == "blue"]
    content["annotations"] = [item for item in content["annotations"] if item["category_id"] == 5]
    (tmp_path / "val.json").write_text(json.dumps(content))
    code, output, _ = cli(val, *flags("--data", data, "--save-json", weights=best))
    assert code == 0
    (line,) = (line for line in output.splitlines() if line.startswith("note:"))
    assert re.search(r"\d+ detections left out.*category for: red$", line)
    assert {item["category_id"] for item in read(RESULTS / "predictions.json")} == {5}
    assert read(RESULTS / "annotations.json")["categories"] == [{"id": 5, "name": "blue"}]


def boxes_of(file: Path, size: tuple[int, int]) -> np.ndarray:
    """(K, 4) xyxy px of a label file, for an image of this height and width."""
    rows = np.array([line.split() for line in file.read_text().splitlines()], float)
    centre, sides = rows[:, 1:3] * size[::-1], rows[:, 3:5] * size[::-1]
    return np.concatenate([centre - sides / 2, centre + sides / 2], 1)


def test_label_files_hold_what_the_json_holds(best, cli):
    code, output, _ = cli(val, *flags("--save-json", "--save-txt", "--save-conf", "--conf-thres", "0.2", weights=best))
    assert code == 0 and f"{RESULTS}/labels" in output
    predictions = read(RESULTS / "predictions.json")
    for number, size in enumerate([(64, 64), (45, 61), (63, 50), (64, 64)], 1):
        mine = [item for item in predictions if item["image_id"] == number]
        file = RESULTS / f"labels/{number - 1}.txt"
        assert file.exists() == bool(mine)
        if mine:
            xywh = np.array([item["bbox"] for item in mine])
            np.testing.assert_allclose(boxes_of(file, size), np.c_[xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], atol=1e-4)
            scores = np.array([line.split()[5] for line in file.read_text().splitlines()], np.float32)
            assert scores.tolist() == [item["score"] for item in mine]


def test_hybrid_labels_hold_the_true_boxes_and_change_no_figure(trained, best):
    val.run(weights=best, save_hybrid=True, batch_size=8, **CPU)
    assert FOUND.read_bytes() == (trained / "metrics.json").read_bytes()
    for index in range(4):
        truth = (trained.parent / f"set/labels/val/{index}.txt").read_text().split()
        first = (RESULTS / f"labels/{index}.txt").read_text().splitlines()[0].split()
        assert np.array(first, float) == pytest.approx(np.array(truth, float), abs=1e-6)


@pytest.mark.parametrize("iou", ["0.3", "0.9"])
def test_hybrid_labels_take_another_overlap_for_another_object(best, cli, monkeypatch, iou):
    monkeypatch.setattr("utils.evaluate.saving._HYBRID_CONFIDENCE", 0.003)  # a network of a few epochs is not sure
    assert cli(val, *flags("--save-hybrid", "--iou-thres", iou, weights=best))[0] == 0
    overlaps = []
    for index, size in enumerate([(64, 64), (45, 61), (63, 50), (64, 64)]):
        truth, *found = boxes_of(RESULTS / f"labels/{index}.txt", size)
        overlaps += pairwise_iou(np.array(found).reshape(-1, 4), truth[None]).flatten().tolist()
    assert max(overlaps, default=0) <= float(iou)
    assert any(overlap > 0.7 for overlap in overlaps) == (iou == "0.9")


def test_hybrid_labels_are_of_what_is_sure(best, cli):
    assert cli(val, *flags("--save-hybrid", weights=best))[0] == 0
    assert [len(path.read_text().splitlines()) for path in (RESULTS / "labels").iterdir()] == [1] * 4


def test_other_rules_find_other_boxes(best):
    """Fewer with --agnostic, others with --augment."""
    counts = {}
    for name, options in {"plain": {}, "agnostic": {"agnostic": True}, "augment": {"augment": True}}.items():
        val.run(weights=best, name=name, save_json=True, **options, **CPU)
        counts[name] = len(read(Path("runs/val") / name / "predictions.json"))
    assert counts["agnostic"] < counts["plain"] != counts["augment"]


def test_an_older_evaluation_leaves_nothing_behind(best, cli):
    assert cli(val, "--weights", best, "--device", "cpu", "--workers", "0", "--save-json")[0] == 0
    (RESULTS / "notes.txt").write_text("mine")
    assert cli(val, *flags("--exist-ok", "--save-txt", weights=best))[0] == 0
    assert {path.name for path in RESULTS.iterdir()} == {"metrics.json", "notes.txt", "labels"}


def test_label_files_that_may_have_been_edited_are_not_replaced(best, cli, monkeypatch):
    assert cli(val, *flags("--save-hybrid", weights=best))[0] == 0
    (RESULTS / "labels/0.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    before = {path: path.read_bytes() for path in RESULTS.rglob("*.*")}
    monkeypatch.setattr("utils.evaluate.command.load_weights", None)  # refused before any work
    for more in ([], ["--save-txt"]):
        code, _, problems = cli(val, *flags("--exist-ok", *more, weights=best))
        assert code == 2
        assert re.fullmatch(r"val\.py: error: --exist-ok: \S+exp/labels is there .*; remove it or .*--name\n", problems)
    assert {path: path.read_bytes() for path in RESULTS.rglob("*.*")} == before


def test_a_data_set_is_no_folder_for_results(tiny, best, cli):
    where = ["--project", str(tiny.folder.parent), "--name", tiny.folder.name, "--exist-ok"]
    code, _, problems = cli(val, *flags("--save-txt", *where, weights=best))
    assert code == 2
    assert re.fullmatch(r"val\.py: error: --exist-ok: \S+/labels is there already.*\n", problems)
    assert tiny.label("val", 0).exists()


def test_a_training_run_is_no_folder_for_results(trained, best, cli):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    where = ["--project", str(trained.parent), "--name", trained.name, "--exist-ok"]
    code, _, problems = cli(val, *flags(*where, weights=best))
    assert code == 2
    assert problems.count("\n") == 1 and f"{trained} is the folder of a training run" in problems
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_full_disk_is_one_line_below_the_figures(best, cli):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        code, output, problems = cli(val, *flags("--save-json", weights=best))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert problems == "val.py: error: File too large: runs/val/exp/predictions.json\n"
    assert re.search(r"^ +all +4 +4", output, re.MULTILINE)
    assert [path.name for path in RESULTS.iterdir()] == ["metrics.json"]


def test_a_full_disk_at_the_first_picture_costs_no_figure(best, cli):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        code, output, problems = cli(val, "--weights", best, "--device", "cpu", "--workers", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert problems == "val.py: error: File too large: runs/val/exp/val_batch0_labels.jpg\n"
    assert re.search(r"^ +all +4 +4", output, re.MULTILINE)
    assert [path.name for path in RESULTS.iterdir()] == ["metrics.json"]


def test_a_split_without_labels_is_predicted_and_not_scored(tiny, best, cli):
    for path in (tiny.folder / "labels/val").iterdir():
        path.unlink()
    code, output, problems = cli(
        val,
        "--weights",
        best,
        "--data",
        str(tiny.data),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--save-json",
        "--save-txt",
    )
    assert (code, problems) == (0, "")
    assert "no usable label in 'val', so there is nothing to score" in output
    assert "mAP" not in output and "AP50" not in output
    assert read(RESULTS / "predictions.json") and list((RESULTS / "labels").iterdir())
    figures = read(FOUND)
    assert figures["labels"] == 0 and figures["images"] == 4
    for one in (figures, *figures["per_class"]):
        assert [one[name] for name in ("precision", "recall", "f1", "best_confidence")] == [None] * 4
    assert {figures["mAP_0.5"], figures["fitness"], figures["per_class"][0]["map50"]} == {None}
    assert {path.name for path in RESULTS.glob("*g")} == {name for name in PICTURES if name.startswith("val_batch")}


def test_outputs_that_are_no_numbers_are_a_warning(best, cli, monkeypatch):
    honest = DetectionModel.forward

    def broken(self, images):
        raw = honest(self, images)
        raw[0][0, 0, 0, 0, 4] = torch.nan
        return raw

    monkeypatch.setattr(DetectionModel, "forward", broken)
    code, output, _ = cli(val, *flags("--batch", "1", weights=best))
    assert code == 0
    (line,) = (line for line in output.splitlines() if line.startswith("warning:"))
    assert "4 of 4 images" in line and best in line
    assert line.endswith("its weights may be damaged: take another checkpoint")
    assert "nan" not in output.replace("NaN", "")


def test_verbose_tells_the_best_of_each_class(best, cli):
    _, output, _ = cli(val, *flags("--verbose", weights=best))
    assert re.search(r"mAP@\.5:\.95 +best F1 +at conf$", output, re.MULTILINE)
    assert re.search(r"^ +blue( +\d+){2}( +[01]\.\d{3}){7}$", output, re.MULTILINE)


def test_task_speed_is_a_table_of_times_and_nothing_else(best, cli):
    code, output, problems = cli(val, *flags("--task", "speed", "--batch", "2", weights=best))
    assert (code, problems) == (0, "")
    assert re.search(r"^ +ms per image +waiting +network +NMS +all +images/s$", output, re.MULTILINE)
    assert re.findall(r"^ *batches of (\d)(?: +[\d.]+){5}$", output, re.MULTILINE) == ["1", "2"]
    assert "confidence 0.25, IoU 0.45; CPU (" in output and "mAP" not in output
    assert not Path("runs").exists()
    assert "confidence 0.5, IoU 0.45" in cli(val, *flags("--task", "speed", "--conf-thres", "0.5", weights=best))[1]
    assert val.run(weights=best, task="speed", **CPU) is None


def test_a_training_run_on_a_coco_split_leaves_its_predictions(trained, tiny, tmp_path):
    data = as_coco(trained, tmp_path)
    train.run(**tiny.options(data=data))
    folder = Path("runs/train/exp")
    scored = tool_figures(read(tmp_path / "val.json"), read(folder / "predictions.json")).twelve
    np.testing.assert_allclose(scored, twelve_of(folder), atol=1e-9, rtol=0)
    against = tool_figures(read(folder / "annotations.json"), read(folder / "predictions.json")).twelve
    np.testing.assert_allclose(against, twelve_of(folder), atol=1e-9, rtol=0)


def test_a_training_run_on_another_split_leaves_none(trained):
    assert (trained / "metrics.json").exists()
    assert not list(trained.glob("predictions*")) and not list(trained.glob("annotations*"))
