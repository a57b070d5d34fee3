from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from utils.hyp import GENES, Hyperparameters, hyperparameters, plain_values, read_hyp
from utils.structures import PixelTransform, UserError

SCRATCH = Path(__file__).parents[1] / "data" / "hyps" / "hyp.scratch.yaml"

TABLE = """
lr0             0.01    1    1e-5  1e-1
lrf             0.1     1    0.01  1.0
momentum        0.937   0.3  0.6   0.98
weight_decay    0.0005  1    0.0   0.001
warmup_epochs   3.0     1    0.0   5.0
warmup_momentum 0.8     1    0.0   0.95
warmup_bias_lr  0.1     1    0.0   0.2
box             0.05    1    0.02  0.2
cls             0.5     1    0.2   4.0
cls_pw          1.0     1    0.5   2.0
obj             1.0     1    0.2   4.0
obj_pw          1.0     1    0.5   2.0
iou_t           0.20    0    0.1   0.7
anchor_t        4.0     1    2.0   8.0
anchors         absent  2    2.0   10.0
fl_gamma        0.0     0    0.0   2.0
hsv_h           0.015   1    0     0.1
hsv_s           0.7     1    0     0.9
hsv_v           0.4     1    0     0.9
degrees         0.0     1    0.0   45.0
translate       0.1     1    0.0   0.9
scale           0.5     1    0.0   0.9
shear           0.0     1    0.0   10.0
perspective     0.0     0    0.0   0.001
flipud          0.0     1    0.0   1.0
fliplr          0.5     0    0.0   1.0
mosaic          1.0     1    0.0   1.0
mosaic9         0.0     1    0.0   1.0
close_mosaic    0.0     0    0.0   50.0
mixup           0.0     1    0.0   1.0
copy_paste      0.0     1    0.0   1.0
cutout          0.0     1    0.0   1.0
"""  # SPEC 2 and issue 4: name, default, gain, low, high


def test_every_hyperparameter_is_that_of_the_table():
    declared = [
        (item.name, item.default, gene.gain, gene.low, gene.high)
        for item, gene in zip(fields(Hyperparameters), GENES.values())
    ]
    expected = []
    for row in TABLE.split("\n")[1:-1]:
        name, default, *numbers = row.split()
        expected.append((name, None if default == "absent" else float(default), *map(float, numbers)))
    assert declared == expected


def test_bounds_of_evolution_are_values_that_a_run_accepts():
    for name, gene in GENES.items():
        assert gene.meaning
        for value in (gene.low, gene.high):
            assert getattr(hyperparameters({name: value}, source="a.yaml"), name) == value


def test_the_yaml_for_training_from_scratch_holds_the_defaults():
    assert read_hyp(SCRATCH) == Hyperparameters()
    assert list(yaml.safe_load(SCRATCH.read_text())) == [name for name in GENES if name != "anchors"]


def test_the_yaml_for_training_from_scratch_tells_the_meanings():
    lines = SCRATCH.read_text().splitlines()
    for name, gene in GENES.items():
        (line,) = [line for line in lines if line.removeprefix("# ").startswith(f"{name}:")]
        assert line.endswith(f"# {gene.meaning}")


def test_keys_that_are_left_out_keep_their_defaults(tmp_path):
    (tmp_path / "my.yaml").write_text("lr0: 0.02\nmosaic: 0\n")
    assert asdict(read_hyp(tmp_path / "my.yaml")) == {**asdict(Hyperparameters()), "lr0": 0.02, "mosaic": 0.0}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-2", 0.01), ("1.0e-2", 0.01), ("1E-2", 0.01), ("'0.01'", 0.01), ("1", 1.0), ("0", 0.0)]
)
def test_numbers_as_people_write_them(tmp_path, text, value):
    (tmp_path / "my.yaml").write_text(f"lr0: {text}\n")
    got = read_hyp(tmp_path / "my.yaml").lr0
    assert got == value
    assert type(got) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentun": 0.9}, "a.yaml: unknown hyperparameter 'momentun: 0.9'; did you mean 'momentum'?"),
        ({"learning": 1}, "a.yaml: unknown hyperparameter 'learning: 1'"),
        ({3: 1}, "a.yaml: unknown hyperparameter '3: 1'"),
        (
            {"lr0": -1},
            "a.yaml: 'lr0: -1' should be a number of 0 or more (initial learning rate (SGD 1e-2, Adam 1e-3))",
        ),
        ({"mosaic": 1.5}, "a.yaml: 'mosaic: 1.5' should be a number from 0 to 1 (probability of a mosaic of four)"),
        ({"lr0": "fast"}, "a.yaml: 'lr0: fast' should be a number of 0 or more"),
        ({"lr0": None}, "a.yaml: 'lr0: None' should be a number of 0 or more"),
        ({"lr0": True}, "a.yaml: 'lr0: True' should be a number of 0 or more"),
        ({"lr0": [0.1]}, "a.yaml: 'lr0: [0.1]' should be a number of 0 or more"),
        ({"lr0": float("nan")}, "a.yaml: 'lr0: nan' should be a number of 0 or more"),
        ({"lr0": "inf"}, "a.yaml: 'lr0: inf' should be a number of 0 or more"),
        ({"lr0": 10**400}, "a.yaml: 'lr0: 1000"),
        ({"anchor_t": 0.5}, "a.yaml: 'anchor_t: 0.5' should be a number of 1 or more"),
    ],
)
def test_a_bad_key_or_value_is_one_line(values, message):
    with pytest.raises(UserError) as error:
        hyperparameters(values, source="a.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_anchors_may_be_absent_in_words():
    assert hyperparameters({"anchors": None}, source="a.yaml").anchors is None
    assert hyperparameters({"anchors": 0}, source="a.yaml").anchors is None
    assert hyperparameters({"anchors": 4}, source="a.yaml").anchors == 4


@given(st.sampled_from(sorted(GENES)), st.floats())
def test_a_value_is_taken_as_it_is_or_refused(name, value):
    low, high = GENES[name].domain
    if name == "anchors" and value == 0:
        return
    if low <= value <= high and abs(value) != float("inf"):
        assert getattr(hyperparameters({name: value}, source="a.yaml"), name) == value
    else:
        with pytest.raises(UserError, match=f"a.yaml: '{name}: "):
            hyperparameters({name: value}, source="a.yaml")


# ---- the list of transforms

LIST = """
albumentations:
  - Blur: {p: 0.01, blur_limit: [3, 7]}
  - ToGray
  - CLAHE:
"""


def test_a_list_of_transforms_is_read_and_written_as_people_write_it(tmp_path):
    (tmp_path / "my.yaml").write_text("lr0: 0.02\n" + LIST)
    hyp = read_hyp(tmp_path / "my.yaml")
    assert hyp.albumentations == (
        PixelTransform(name="Blur", arguments=(("p", 0.01), ("blur_limit", (3, 7)))),
        PixelTransform(name="ToGray", arguments=()),
        PixelTransform(name="CLAHE", arguments=()),
    )
    hash(hyp)  # loader processes keep what they made of it
    written = plain_values(hyp)
    assert written["albumentations"] == [{"Blur": {"p": 0.01, "blur_limit": [3, 7]}}, "ToGray", "CLAHE"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    assert read_hyp(tmp_path / "again.yaml") == hyp
    assert "albumentations" not in GENES


def test_checkpoints_from_before_the_list_and_empty_lists_are_fine():
    for value in (None, [], ()):
        assert hyperparameters({"albumentations": value}, source="a.yaml") == Hyperparameters()
    assert plain_values(Hyperparameters())["albumentations"] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Blur", "a.yaml: 'albumentations: Blur' should be a list such as [ToGray, Blur: {p: 0.01, blur_limit: 3}]"),
        ({"Blur": {"p": 1}}, "a.yaml: 'albumentations: {'Blur': {'p': 1}}' should be a list such as"),
        ([3], "a.yaml: 'albumentations': '3' should be the name of a transform, as in"),
        ([{"Blur": 3}], "a.yaml: 'albumentations': '{'Blur': 3}' should be the name of a transform"),
        ([{"Blur": {}, "ToGray": {}}], "a.yaml: 'albumentations': '{'Blur': {}, 'ToGray': {}}' should be the name"),
        ([{"Blur": {"p": {"a": 1}}}], "a.yaml: 'albumentations': 'Blur': 'p: {'a': 1}' should be a plain value"),
    ],
)
def test_a_list_that_is_none_is_one_line(value, message):
    with pytest.raises(UserError) as error:
        hyperparameters({"albumentations": value}, source="a.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_key_that_is_nearly_right_is_named():
    with pytest.raises(UserError, match="did you mean 'albumentations'"):
        hyperparameters({"albumentation": []}, source="a.yaml")
