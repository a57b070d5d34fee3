"""`python -m utils.evaluate.coco`: the figures of COCO's tool from its own files, and a line for each bad file."""

import copy
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from tests.coco_tool import coco_content, coco_results, tool_figures
from utils.evaluate import coco
from utils.evaluate.coco import CocoOptions, read_case, report
from utils.structures import CocoFigures

ROOT = Path(__file__).resolve().parents[2]
IMAGE_IDS = (7, 3, 900)


@pytest.fixture(scope="module")
def case(random_scene):
    """A COCO file and a results file, parsed."""
    generator = np.random.default_rng(1)
    scenes = [random_scene(generator, 3, most=20, coarse=True, excused=0.2, span=200) for _ in IMAGE_IDS]
    return coco_content([one for _, one in scenes], IMAGE_IDS, 3), coco_results([one for one, _ in scenes], IMAGE_IDS)


def written(folder: Path, content, results) -> CocoOptions:
    """Strings are written as they are."""
    options = CocoOptions(annotations=folder / "truth.json", results=folder / "found.json")
    for path, value in ((options.annotations, content), (options.results, results)):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return options


def plain(figures: CocoFigures) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in astuple(figures)])


def main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["coco", *map(str, arguments)])
    return coco.main()


def test_the_figures_are_those_of_the_tool(case, tmp_path, capsys):
    content, results = case
    figures = report(written(tmp_path, content, results))
    assert plain(figures) == pytest.approx(tool_figures(content, results).twelve, abs=1e-9, nan_ok=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 images, 3 categories, ") and lines[0].endswith(f" {len(results)} detections")
    assert len(lines) == 13
    assert lines[1].split() == [*"Average precision IoU .50:.95 area all detections 100".split(), f"{figures.ap:.4f}"]
    assert [line.split()[-1] for line in lines[1:]] == [
        "-" if value is None else f"{value:.4f}" for value in astuple(figures)
    ]


def test_ids_that_are_strings_and_scores_that_float32_cannot_tell_apart(case, tmp_path):
    content, results = copy.deepcopy(case)
    for row in [*content["annotations"], *results]:
        row["image_id"] = f"img-{row['image_id']}"
        row["bbox"] = [value + 1 / 3 for value in row["bbox"]]
    for row in content["images"]:
        row["id"] = f"img-{row['id']}"
    for place, row in enumerate(results):
        row["score"] = 0.5 + place % 5 * 1e-12
    figures = report(written(tmp_path, content, results))
    assert plain(figures) == pytest.approx(tool_figures(content, results).twelve, abs=1e-9, nan_ok=True)


def test_as_the_tool_does_it_goes_by_iscrowd_and_leaves_out_what_is_not_listed(case, tmp_path, capsys):
    content, results = copy.deepcopy(case)
    for row in content["annotations"]:
        row["ignore"] = 1
    box = content["annotations"][0] | {"iscrowd": 0}
    content["annotations"] += [box | {"id": 9001, "image_id": 1}, box | {"id": 9002, "category_id": 44}]
    figures = report(written(tmp_path, content, results))
    assert plain(figures) == pytest.approx(tool_figures(content, results).twelve, abs=1e-9, nan_ok=True)
    words = " ".join(capsys.readouterr().out.split())
    assert "truth.json: 2 annotations are of no image or category that it lists" in words


def test_annotation_0_can_be_found(case, tmp_path):
    content, results = copy.deepcopy(case)
    whole = report(written(tmp_path, content, results))
    for row in content["annotations"]:
        row["id"] -= 1
    assert report(written(tmp_path, content, results)) == whole


def test_areas_and_crowds_may_be_left_out(case, tmp_path):
    content, results = copy.deepcopy(case)
    for row in content["annotations"]:
        row |= {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
    whole = report(written(tmp_path, content, results))
    for row in content["annotations"]:
        del row["area"], row["iscrowd"]
    assert report(written(tmp_path, content, results)) == whole


def test_nothing_found_and_nothing_to_find(case, tmp_path):
    content, results = case
    nothing = report(written(tmp_path, content, []))
    assert nothing.ap == nothing.ar100 == 0
    assert set(astuple(report(written(tmp_path, content | {"annotations": []}, results)))) == {None}
    assert set(astuple(report(written(tmp_path, {"images": [], "annotations": [], "categories": []}, [])))) == {None}


FOUND = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ("", "not valid JSON: line 1, column 1"),
        ("[1,", "not valid JSON: line 1, column 4"),
        ({}, "should be a list, as --save-json writes it, got a mapping"),
        ([3], "[0] should be a mapping, got a number"),
        ([FOUND, "x"], "[1] should be a mapping, got a string"),
        ([FOUND, {**FOUND, "image_id": 8}, {**FOUND, "image_id": 9}], "[1]: {truth} has no image_id 8; 2 of 3"),
        ([{**FOUND, "category_id": 0}], "[0]: {truth} has no category_id 0; 1 of 1 detections have one that it lacks"),
        ([{**FOUND, "image_id": "7"}], '[0]: {truth} has no image_id "7"'),
        ([{**FOUND, "image_id": [7]}], "[0]: 'image_id' should be a number or a string, got [7]"),
        *(
            ([FOUND, {name: value for name, value in FOUND.items() if name != key}], f"[1] has no '{key}'")
            for key in FOUND
        ),
        ([{**FOUND, "bbox": [1, 2, 3]}], "[0]: 'bbox' should be [x, y, width, height], got [1, 2, 3]"),
        ([FOUND, {**FOUND, "bbox": [1, 2, 3]}], "[1]: 'bbox' should be [x, y, width, height], got [1, 2, 3]"),
        ([{**FOUND, "bbox": ["1", 2, 3, 4]}], "[0]: 'bbox' should be [x, y, width, height]"),
        ([{**FOUND, "bbox": None}], "[0]: 'bbox' should be [x, y, width, height], got null"),
        (
            [{**FOUND, "bbox": [1, 2, 3, float("nan")]}],
            "[0]: 'bbox' should be [x, y, width, height], got [1, 2, 3, NaN]",
        ),
        ([FOUND, {**FOUND, "score": float("nan")}], "[1]: 'score' should be a number, got NaN"),
        ([{**FOUND, "score": float("inf")}], "[0]: 'score' should be a number, got Infinity"),
        ([{**FOUND, "score": "high"}], "[0]: 'score' should be a number, got \"high\""),
        ([{**FOUND, "score": True}], "[0]: 'score' should be a number, got true"),
    ],
)
def test_a_bad_results_file_is_one_line(case, tmp_path, monkeypatch, capsys, results, line):
    options = written(tmp_path, case[0], results)
    assert main(monkeypatch, options.annotations, options.results) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert f"error: {options.results}: {line.replace('{truth}', str(options.annotations))}" in output.err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda content: [], "should be a COCO file, which is a mapping, got a list; are the two files swapped?"),
        (lambda content: {"images": []}, "'categories' is missing; a COCO file has"),
        (lambda content: content | {"images": 3}, "'images' should be a list, got a number"),
        (lambda content: content | {"images": [{}]}, "images[0] has no 'id'"),
        (lambda content: content | {"images": [{"id": 1}, {"id": "1"}]}, "images: ids should be all numbers or all"),
        (lambda content: content | {"annotations": [{"id": 1}]}, "annotations[0] has no 'image_id'"),
        (
            lambda content: content | {"annotations": [{**FOUND, "area": "large"}]},
            "annotations[0]: 'area' should be a number, got \"large\"",
        ),
        (
            lambda content: content | {"annotations": [{**FOUND, "bbox": []}]},
            "annotations[0]: 'bbox' should be [x, y, width, height], got []",
        ),
    ],
)
def test_a_bad_annotation_file_is_one_line(case, tmp_path, monkeypatch, capsys, change, line):
    options = written(tmp_path, change(case[0]), case[1])
    assert main(monkeypatch, options.annotations, options.results) == 2
    assert f"error: {options.annotations}: {line}" in capsys.readouterr().err


def test_files_that_are_not_there_and_wrong_usage(case, tmp_path, monkeypatch, capsys):
    options = written(tmp_path, *case)
    assert main(monkeypatch, tmp_path / "none.json", options.results) == 2
    assert "none.json: cannot be read: No such file or directory" in capsys.readouterr().err
    assert main(monkeypatch, options.annotations, tmp_path) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err
    assert main(monkeypatch, options.annotations) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_numbers_beyond_64_bits_are_numbers(case, tmp_path):
    found = read_case(written(tmp_path, case[0], [{**FOUND, "bbox": [2**70, 0, 1, 1]}])).found
    assert found.xywh[0, 0] == 2.0**70


def test_sides_whose_product_is_no_number_find_nothing(case, tmp_path):
    content, results = copy.deepcopy(case)
    huge = {"bbox": [0, 0, 1e308, 1e308], "category_id": 1, "image_id": 7}
    content["annotations"].append(huge | {"id": 9001, "iscrowd": 0, "area": 100})
    figures = report(written(tmp_path, content, [*results, huge | {"score": 0.99}]))
    assert figures.ap > 0
    assert figures.ar100 < report(written(tmp_path, case[0], results)).ar100


def test_it_runs_as_a_module(case, tmp_path):
    options = written(tmp_path, *case)
    command = [sys.executable, "-m", "utils.evaluate.coco", options.annotations, options.results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 13
