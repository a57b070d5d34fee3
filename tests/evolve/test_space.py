import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from utils.evolve.space import Gene, differences, search_space
from utils.hyp import GENES, Hyperparameters
from utils.structures import UserError

HYP = Hyperparameters()


@pytest.fixture
def genes_file(tmp_path):
    def write(content) -> str:
        path = tmp_path / "genes.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def gene(space, name: str) -> Gene:
    return next(gene for gene in space.genes if gene.name == name)


def test_every_gene_with_a_gain_evolves_from_its_value_between_its_bounds():
    space = search_space(replace(HYP, lr0=0.02))
    assert space.names == tuple(name for name, declared in GENES.items() if declared.gain > 0)
    assert space.start["lr0"] == 0.02
    assert space.start["anchors"] == 3
    assert {"iou_t", "fl_gamma", "fliplr"}.isdisjoint(space.names)
    for one in space.genes:
        declared = GENES[one.name]
        assert (one.low, one.high, one.gain) == (declared.low, declared.high, declared.gain)


def test_anchors_of_the_hyp_are_their_start_and_noautoanchor_drops_them():
    assert search_space(replace(HYP, anchors=5.0)).start["anchors"] == 5
    assert "anchors" not in search_space(HYP, noautoanchor=True).names


def test_wide_bounds_above_zero_are_searched_on_a_log_scale():
    log = {one.name for one in search_space(HYP).genes if one.scale == "log"}
    assert log == {"lr0", "lrf", "box", "cls", "obj"}


def test_genes_are_named_with_commas():
    space = search_space(HYP, genes="mosaic, lr0,fliplr")
    assert space.names == ("lr0", "fliplr", "mosaic")
    assert gene(space, "fliplr").gain == 1  # declared with 0


def test_a_file_lists_genes_or_says_how_each_is_searched(genes_file):
    assert search_space(HYP, genes=genes_file(["mosaic", "lr0"])).names == ("lr0", "mosaic")
    text = """
        lr0: {low: 1e-3, high: 0.05, scale: linear}
        momentum:
        degrees: {choices: [10, 0, 5], gain: 2}
    """
    space = search_space(HYP, genes=genes_file(text))
    assert gene(space, "lr0") == Gene("lr0", 0.01, 0.001, 0.05, 1, "linear")
    assert gene(space, "momentum") == Gene("momentum", 0.937, 0.6, 0.98, 0.3, "linear")
    assert gene(space, "degrees") == Gene("degrees", 0, 0, 10, 2, "choice", (0, 5, 10))


@pytest.mark.parametrize(
    "genes, message",
    [
        ("lr0,momentun", "--evolve-genes lr0,momentun: there is no gene 'momentun'; did you mean 'momentum'?"),
        ("albumentations", "there is no gene 'albumentations'"),
        (" , ", "names no gene; it should name at least one, such as lr0"),
        ("missing.yaml", "--evolve-genes file not found: missing.yaml"),
    ],
)
def test_names_that_cannot_be_searched(genes, message):
    with pytest.raises(UserError) as error:
        search_space(HYP, genes=genes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "names no gene"),
        ("{}", "names no gene"),
        ("", "an empty file"),
        ("3", "must be a YAML mapping"),
        ("lr0: [", "is not valid YAML"),
        ("[{lr0: 1}]", "there is no gene '{'lr0': 1}'"),
        ("nope:", "there is no gene 'nope'"),
        ("lr0: 0.1", "'lr0: 0.1' should be nothing, or a mapping such as {low: 0.1, high: 1}"),
        ("lr0: {hihg: 1}", "'lr0' has the unknown key 'hihg'; did you mean 'high'?"),
        (
            "lr0: {low: 0.02}",
            "'lr0: 0.01', where evolution starts, lies outside 0.02 to 0.1; change the value",
        ),
        ("lr0: {low: 0.02}", "or write 'lr0: {low: 0.01}' in the YAML there"),
        ("lr0: {low: 0.2, high: 0.1}", "low 0.2 should be below high 0.1"),
        ("lr0: {low: .nan}", "'low: nan' should be a number"),
        ("momentum: {high: 1.5}", "'high: 1.5' should be from 0 to 1 (SGD momentum, Adam beta1)"),
        ("lr0: {low: -1}", "'low: -1' should be 0 or more"),
        ("degrees: {scale: log}", "a log scale needs a low above 0, got 0"),
        ("lr0: {scale: sqrt}", "'scale: sqrt' should be linear or log"),
        ("lr0: {gain: 0}", "'gain: 0' should be above 0"),
        ("lr0: {choices: [0.01]}", "should be a list of two numbers or more"),
        ("lr0: {choices: 0.01}", "should be a list of two numbers or more"),
        ("lr0: {choices: [0.01, a]}", "'choices: a' should be a number"),
        ("lr0: {choices: [0.1, 0.2]}", "leave out 0.01, where evolution starts; add it, or change 'lr0' in --hyp"),
        ("lr0: {choices: [0.01, 0.1], low: 0}", "has both choices and low; choose one"),
    ],
)
def test_a_file_that_cannot_be_searched_is_named_with_what_is_wrong(genes_file, content, message):
    path = genes_file(content)
    with pytest.raises(UserError) as error:
        search_space(HYP, genes=path)
    assert message in str(error.value)
    assert path in str(error.value)


def test_a_value_outside_of_the_declared_bounds_says_what_to_do():
    with pytest.raises(UserError) as error:
        search_space(replace(HYP, lr0=0.5))
    assert str(error.value) == (
        "--hyp: 'lr0: 0.5', where evolution starts, lies outside 1e-05 to 0.1;"
        " change the value in --hyp, or write 'lr0: {high: 0.5}' in the YAML of --evolve-genes"
    )


def test_anchors_by_name_need_autoanchor():
    with pytest.raises(UserError, match="'anchors' evolves with autoanchor alone"):
        search_space(HYP, genes="lr0,anchors", noautoanchor=True)


def test_two_spaces_differ_in_short_lines(genes_file):
    mine = search_space(HYP, genes="lr0,momentum,cls")
    wider = "lr0: {low: 0.001, scale: linear}\nmomentum: {gain: 1}\ncls: {choices: [0.5, 1]}\nmixup:"
    theirs = json.loads(json.dumps(search_space(HYP, genes=genes_file(wider)).plain()))
    assert differences(mine.plain(), json.loads(json.dumps(mine.plain()))) == []
    assert differences(mine.plain(), theirs) == [
        "gene mixup: in the study, not here",
        "gene lr0: bounds 1e-05 to 0.1 here, 0.001 to 0.1 in the study",
        "gene lr0: scale log here, linear in the study",
        "gene momentum: gain 0.3 here, 1 in the study",
        "gene cls: bounds 0.2 to 4 here, one of 0.5, 1 in the study",
        "gene cls: scale log here, choice in the study",
    ]
    started = search_space(replace(HYP, lr0=0.0123456)).plain()
    assert differences(search_space(replace(HYP, lr0=0.0123457)).plain(), started) == [
        "gene lr0: start 0.0123457 here, 0.0123456 in the study"
    ]


GENES_OF_EACH_SCALE = (
    Gene("lr0", 0.01, 1e-5, 0.1, 1, "log"),
    Gene("cls", 0.5, 0.2, 4.0, 1, "linear"),
    Gene("degrees", 0, 0, 10, 1, "choice", (0, 5, 7, 10)),
)


@given(st.sampled_from(GENES_OF_EACH_SCALE), st.floats(0, 1))
def test_units_go_over_the_range_and_back(one, unit):
    value = one.from_unit(np.array(unit))
    assert one.low <= value <= one.high
    assert 0 <= one.to_unit(value) <= 1 + 1e-12
    assert np.isclose(one.from_unit(one.to_unit(value)), value)
    assert one.clip(value) == value
