import errno
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import (
    LATEST,
    TrainOptions,
    ValOptions,
    find_file,
    parse_flags,
    read_dataset,
    run_command,
    validated,
    whole_strides,
)
from utils.structures import DatasetSpec, Download, RunError, UserError

ROOT = Path(__file__).parents[1]
URL = "https://site.org/a/data.zip"

TRAIN_DEFAULTS = {  # SPEC 1; what None stands for depends on the data set and is the builder's to say
    "weights": "",
    "cfg": "",
    "data": "data/shapes.yaml",
    "hyp": "data/hyps/hyp.scratch.yaml",
    "epochs": None,
    "batch_size": 16,
    "nominal_batch": "auto",
    "imgsz": None,
    "project": "runs/train",
    "name": "exp",
    "exist_ok": False,
    "resume": None,
    "rect": False,
    "noautoanchor": False,
    "multi_scale": False,
    "label_smoothing": 0.0,
    "linear_lr": False,
    "cos_lr": False,
    "evolve": None,
    "cache": None,
    "cache_dir": "",
    "strict": False,
    "image_weights": False,
    "repeat_factor": 0.0,
    "paint": "loader",
    "single_cls": False,
    "optimizer": "SGD",
    "sync_bn": False,
    "workers": 8,
    "device": "",
    "amp": "auto",
    "compile": False,
    "deterministic": False,
    "nosave": False,
    "noval": False,
    "noplots": False,
    "quiet": False,
    "quad": False,
    "freeze": (),
    "patience": 100,
    "seed": 0,
    "save_every": 10.0,
    "save_period": -1,
    "evolve_sampler": "genetic",
    "evolve_parents": "single",
    "evolve_genes": "",
    "evolve_pruner": None,
    "evolve_storage": "",
    "evolve_confirm": 3,
    "evolve_confirm_seeds": 3,
    "evolve_confirm_epochs": None,
    "evolve_grace": 60,
    "bucket": "",
    "nproc": 1,
    "dist_timeout": 10.0,
    "tb_histograms": False,
    "entity": "",
    "upload_dataset": False,
    "bbox_interval": -1,
    "artifact_alias": "latest",
    "local_rank": -1,
}
VAL_DEFAULTS = {
    "weights": "w.pt",
    "data": "",
    "batch_size": 32,
    "imgsz": None,
    "conf_thres": 0.001,
    "iou_thres": 0.6,
    "max_det": 300,
    "task": "val",
    "device": "",
    "amp": "off",
    "workers": 8,
    "nproc": 1,
    "dist_timeout": 10.0,
    "cache_dir": "",
    "strict": False,
    "single_cls": False,
    "augment": False,
    "agnostic": False,
    "verbose": False,
    "save_txt": False,
    "save_conf": False,
    "save_hybrid": False,
    "save_json": False,
    "half": False,
    "project": "runs/val",
    "name": "exp",
    "exist_ok": False,
    "noplots": False,
    "quiet": False,
}


def train_options(*argv: str) -> TrainOptions:
    return validated(TrainOptions, parse_flags(TrainOptions, argv, program="train.py"))


def val_options(*argv: str) -> ValOptions:
    return validated(ValOptions, parse_flags(ValOptions, argv, program="val.py"))


# ---- flags --------------------------------------------------------------------------------------------------------


def test_no_flags_are_the_defaults():
    assert parse_flags(TrainOptions, [], program="train.py") == {}
    assert train_options() == TrainOptions()
    assert val_options("--weights", "w.pt") == ValOptions(weights="w.pt")


@pytest.mark.parametrize(
    ("options", "defaults"), [(TrainOptions(), TRAIN_DEFAULTS), (ValOptions(weights="w.pt"), VAL_DEFAULTS)]
)
def test_every_flag_has_the_default_of_the_contract(options, defaults):
    declared = vars(options)
    assert declared == {name: defaults[name] for name in declared}


def test_every_flag_is_parsed_and_typed():
    given = train_options(
        *"--weights w.pt --cfg c.yaml --data d.yaml --hyp h.yaml --epochs 3 --batch-size 4 --nominal-batch 32".split(),
        *"--imgsz 320 --project p --name n --exist-ok --resume r.pt --noautoanchor --linear-lr".split(),
        *"--label-smoothing 0.1 --workers 0 --device cpu --amp bf16 --noplots --quiet --patience 5 --seed 7".split(),
    )
    assert given == TrainOptions(
        weights="w.pt",
        cfg="c.yaml",
        data="d.yaml",
        hyp="h.yaml",
        epochs=3,
        batch_size=4,
        nominal_batch="32",
        imgsz=320,
        project="p",
        name="n",
        exist_ok=True,
        resume="r.pt",
        noautoanchor=True,
        linear_lr=True,
        label_smoothing=0.1,
        workers=0,
        device="cpu",
        amp="bf16",
        noplots=True,
        quiet=True,
        patience=5,
        seed=7,
    )


@pytest.mark.parametrize("given", ["--cache", "--cache ram", "--cache=ram", "--cache-images", "--cache_images"])
def test_spellings_of_the_image_cache(given):
    assert train_options(*given.split()).cache == "ram"
    assert train_options("--cache", "disk").cache == "disk"
    assert validated(TrainOptions, {"cache": True}).cache == validated(TrainOptions, {"cache": "ram"}).cache == "ram"


@pytest.mark.parametrize(
    "spelling",
    ["--batch-size 8", "--batch 8", "--batch_size 8", "--batch-size=8", "--batch_size=8", "--batch=8"],
)
def test_spellings_of_the_batch_size(spelling):
    assert train_options(*spelling.split()).batch_size == 8
    assert val_options("--weights", "w.pt", *spelling.split()).batch_size == 8


@pytest.mark.parametrize("flag", ["--imgsz", "--img", "--img-size", "--img_size"])
def test_spellings_of_the_image_size(flag):
    assert train_options(flag, "320").imgsz == 320
    assert val_options("--weights", "w.pt", f"{flag}=320").imgsz == 320


def test_every_flag_of_the_recipe_is_parsed():
    given = train_options(
        *"--rect --multi-scale --image-weights --single-cls --optimizer AdamW --compile --deterministic".split(),
        *"--nosave --noplots --quad --freeze 0 3 10 --local_rank=0".split(),
    )
    assert given == TrainOptions(
        rect=True,
        multi_scale=True,
        image_weights=True,
        single_cls=True,
        optimizer="AdamW",
        compile=True,
        deterministic=True,
        nosave=True,
        noplots=True,
        quad=True,
        freeze=(0, 3, 10),
        local_rank=0,
    )
    assert train_options("--noval", "--save_period", "3") == TrainOptions(noval=True, save_period=3)
    assert train_options("--local-rank", "2").local_rank == 2
    assert val_options("--weights", "w.pt", "--single-cls").single_cls


def test_adam_is_short_for_a_choice_of_optimizer():
    for argv in ("--adam", "--optimizer Adam", "--adam --optimizer Adam"):
        assert train_options(*argv.split()) == TrainOptions(optimizer="Adam")
    assert validated(TrainOptions, {"adam": True}).optimizer == "Adam"
    assert validated(TrainOptions, {"adam": False, "optimizer": "SGD"}).optimizer == "SGD"


def test_patience_that_is_off_goes_with_no_evaluations():
    assert train_options("--noval", "--patience", "0").patience == 0


@pytest.mark.parametrize("freeze", [(10,), 10, [10], range(10, 11)])
def test_frozen_layers_by_name(freeze):
    assert validated(TrainOptions, {"freeze": freeze}).freeze == (10,)


def test_values_keep_their_underscores_and_equal_signs():
    given = train_options("--name", "my_run=2", "--project=a_b=c")
    assert (given.name, given.project) == ("my_run=2", "a_b=c")


def test_negative_numbers_are_values():
    assert train_options("--batch-size", "-1").batch_size == -1


@pytest.mark.parametrize(("argv", "resume"), [([], None), (["--resume"], LATEST), (["--resume", "a.pt"], "a.pt")])
def test_resume_takes_a_path_or_none(argv, resume):
    assert train_options(*argv).resume == resume
    assert train_options(*argv, "--epochs", "5").resume == resume


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--batchsize 8", "unknown flag '--batchsize'; did you mean '--batch-size'?"),
        ("--epoch=3", "unknown flag '--epoch=3'; did you mean '--epochs'?"),  # no abbreviations
        ("--exist_okay", "unknown flag '--exist_okay'; did you mean '--exist-ok'?"),
        ("--frobnicate", "unknown flag '--frobnicate'"),
        ("--evolve many", "--evolve: 'many' should be a whole number"),
        ("--evolve 0", "--evolve 0: should be 1 or more"),
        ("--evolve-jobs 2", "unknown flag '--evolve-jobs'"),
        ("--evolve --evolve-sampler tpa", "--evolve-sampler: invalid choice: 'tpa'"),
        ("--evolve --evolve-parents weighted", "--evolve-parents weighted: is of --evolve-sampler classic"),
        ("--evolve_sampler tpe", "--evolve-sampler is of --evolve, which is not there"),
        ("--evolve --noval", "--evolve and --noval: trials are judged by their evaluations; choose one"),
        ("--bucket b", "--bucket is of --evolve, which is not there"),
        ("--cache tape", "--cache: invalid choice: 'tape' (choose from"),
        ("--cache disk --cache-images", "--cache-images and --cache disk: choose one"),
        ("--repeat-factor 2", "--repeat-factor 2: should be a share of the images, from 0 to 1"),
        ("--repeat-factor .1 --image-weights", "--image-weights and --repeat-factor: both say how often"),
        ("--artifact-alias a/b", "--artifact-alias 'a/b': should be a name without"),
        ("--bbox_interval -2", "--bbox-interval -2: should be -1 or more"),
        ("train", "unknown argument 'train'"),
        ("--epochs three", "--epochs: 'three' should be a whole number"),
        ("--epochs", "--epochs: expected one argument"),
        ("--amp fp8", "--amp: invalid choice: 'fp8'"),
        ("--epochs 0", "--epochs 0: should be 1 or more"),
        ("--batch-size 0", "--batch-size 0: should be 1 or more, or -1 for the largest that fits"),
        ("--batch-size -2", "--batch-size -2: should be -1 or more"),
        ("--workers -1", "--workers -1: should be 0 or more"),
        ("--label-smoothing 1", "--label-smoothing 1: should be 0 or more and below 1"),
        ("--label-smoothing nan", "--label-smoothing nan: should be 0 or more"),
        ("--nominal-batch 0", "--nominal-batch 0: should be auto or a whole number of 1 or more"),
        ("--nominal-batch large", "--nominal-batch large: should be auto or a whole number of 1 or more"),
        ("--linear-lr --cos-lr", "--linear-lr and --cos-lr: choose one"),
        ("--adam --optimizer SGD", "--adam and --optimizer SGD: choose one"),
        ("--optimizer adam", "--optimizer: invalid choice: 'adam'"),
        ("--quad --batch 6", "--batch-size 6: should be a multiple of 4 with --quad"),
        ("--freeze", "--freeze: expected at least one argument"),
        ("--freeze 3 -1", "--freeze -1: should be 0 or more"),
        ("--freeze all", "--freeze: 'all' should be a whole number"),
        ("--save-period 0", "--save-period 0: should be 1 or more, or -1 to keep none"),
        ("--save-period -2", "--save-period -2: should be -1 or more"),
        ("--nosave --save-period 2", "--nosave and --save-period: "),
        ("--noval --patience 5", "--noval and --patience: "),
        ("--noval --image-weights", "--noval and --image-weights: "),
        ("--seed 4294967296", "--seed 4294967296: should be below 4294967296"),
        ("--nproc 0", "--nproc 0: should be 1 or more"),
        ("--dist-timeout 0", "--dist-timeout 0: should be above 0"),
        ("--dist-timeout nan", "--dist-timeout nan: should be above 0"),
        ("--dist-timeout inf", "--dist-timeout inf: should be 525600 or less"),
        ("--name a/b", "--name 'a/b': should be one folder name; --project says where it lies"),
        ("--name ..", "--name '..': should be one folder name"),
        ("--name .", "--name '.': should be one folder name"),
        ("--name=", "--name '': should be one folder name"),
    ],
)
def test_bad_usage_is_one_line(argv, message):
    with pytest.raises(UserError) as error:
        train_options(*argv.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "--weights is missing: name the checkpoint to evaluate"),
        ("--weights w --conf-thres 1.5", "--conf-thres 1.5: should be between 0 and 1"),
        ("--weights w --iou-thres -0.1", "--iou-thres -0.1: should be 0 or more"),
        ("--weights w --task holdout", "--task: invalid choice: 'holdout'"),
        ("--weights w --batch-size -1", "--batch-size -1: should be 1 or more"),
        ("--weights w --task speed --save-json", "--task speed and --save-json: it measures time"),
        ("--weights w --task speed --save_hybrid", "--task speed and --save-hybrid: it measures time"),
        ("--weights w --save-conf", "--save-conf adds scores to label files; ask for these with --save-txt or"),
        ("--weights w --half --amp bf16", "--half and --amp bf16: choose one"),
        ("--weights w --evolve-jobs 2", "unknown flag '--evolve-jobs'"),
        ("--weights w --nproc -1", "--nproc -1: should be 1 or more"),
        ("--weights w --dist-timeout -1", "--dist-timeout -1: should be above 0"),
    ],
)
def test_bad_usage_of_val_is_one_line(argv, message):
    with pytest.raises(UserError) as error:
        val_options(*argv.split())
    assert str(error.value).startswith(message)


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(TrainOptions, ["--help"], program="train.py")
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens too
    for item in fields(TrainOptions):
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["meaning"].replace(" ", "") in text
    assert "(default:runs/train)" in text


@pytest.mark.parametrize("script", ["train", "val"])
def test_help_does_not_wait_for_torch(script):
    code = (
        f"import sys; sys.argv = ['{script}.py', '--help']; import {script}\n"
        f"try: {script}.main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'torchvision', 'cv2', 'matplotlib', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: {script}.py" in shown.stdout


# ---- options by name ----------------------------------------------------------------------------------------------


def test_options_by_name_take_the_aliases_of_the_flags():
    assert validated(TrainOptions, {"batch": 8, "img": 320}) == TrainOptions(batch_size=8, imgsz=320)
    assert validated(TrainOptions, {"img_size": 96}) == TrainOptions(imgsz=96)


def test_options_by_name_are_mended_where_the_meaning_is_plain():
    given = {"device": 0, "nominal_batch": 64, "data": Path("a") / "b.yaml", "label_smoothing": 0, "epochs": None}
    options = validated(TrainOptions, given)
    assert options == TrainOptions(device="0", nominal_batch="64", data=str(Path("a") / "b.yaml"))
    assert type(options.label_smoothing) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'?"),
        ({"batchsize": 3}, "unknown option 'batchsize'; did you mean 'batch_size'?"),
        ({"evolve": "3"}, "--evolve '3': should be int, got str"),
        ({"epochs": "3"}, "--epochs '3': should be int, got str"),
        ({"epochs": 3.0}, "--epochs 3.0: should be int, got float"),
        ({"epochs": True}, "--epochs True: should be int, got bool"),
        ({"quiet": 1}, "--quiet 1: should be bool, got int"),
        ({"device": True}, "--device True: should be str, got bool"),
        ({"label_smoothing": False}, "--label-smoothing False: should be float, got bool"),
        ({"amp": "fp8"}, "--amp fp8: should be one of auto, bf16, fp16, off"),
        ({"imgsz": 0}, "--imgsz 0: should be 1 or more"),
        ({"imgsz": 16_385}, "--imgsz 16385: should be 16384 or less"),
        ({"freeze": "10"}, "--freeze '10': should be whole numbers, got str"),
        ({"freeze": [1, True]}, "--freeze True: should be whole numbers, got bool"),
        ({"adam": "yes"}, "--adam 'yes': should be bool, got str"),
        ({"adam": True, "optimizer": "SGD"}, "--adam and --optimizer SGD: choose one"),
        ({"optimizer": "sgd"}, "--optimizer sgd: should be one of SGD, Adam, AdamW"),
    ],
)
def test_options_of_a_wrong_name_or_type(values, message):
    with pytest.raises(UserError) as error:
        validated(TrainOptions, values)
    assert str(error.value).startswith(message)


def test_options_are_frozen_and_valid_again_after_a_round_trip():
    options = train_options("--epochs", "3", "--resume")
    assert validated(TrainOptions, vars(options)) == options
    with pytest.raises(AttributeError):
        options.epochs = 4


@pytest.mark.parametrize(("imgsz", "rounded"), [(640, 640), (641, 672), (1, 32), (639, 640)])
def test_image_sizes_are_whole_strides(imgsz, rounded):
    notes = []
    assert whole_strides(imgsz, 32, note=notes.append) == rounded
    assert len(notes) == (imgsz != rounded)


# ---- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--epochs 0: no"), 2, "train.py: error: --epochs 0: no\n"),
        (RunError("disk full"), 1, "train.py: error: disk full\n"),
        (OSError(errno.ENOSPC, "No space left", "a.csv"), 1, "train.py: error: No space left: a.csv\n"),
        (KeyboardInterrupt(), 130, "\ntrain.py: interrupted\n"),
        (KeyboardInterrupt("continue with --resume"), 130, "\ntrain.py: interrupted; continue with --resume\n"),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def command():
        raise error

    assert run_command("train.py", command) == code
    assert capsys.readouterr() == ("", line)


def test_success_is_exit_code_zero_and_our_bugs_keep_their_traceback():
    assert run_command("train.py", lambda: "metrics") == 0
    with pytest.raises(ZeroDivisionError):
        run_command("train.py", lambda: 1 / 0)


@pytest.mark.parametrize("script", ["train.py", "val.py"])
def test_a_wrong_flag_stops_a_script_with_exit_code_two(script):
    done = subprocess.run([sys.executable, script, "--wieghts", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{script}: error: unknown flag '--wieghts'; did you mean '--weights'?\n"


# ---- data sets ----------------------------------------------------------------------------------------------------


def dataset(folder: Path, **changes) -> tuple[DatasetSpec, list[str]]:
    """Write `data.yaml` into the folder, with keys changed or (None) left out, and read it."""
    content = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return read_dataset(str(path))


def test_paths_are_relative_to_the_yaml(tmp_path):
    spec, notes = dataset(tmp_path)
    assert spec == DatasetSpec(
        source=tmp_path / "data.yaml",
        root=tmp_path,
        train=(tmp_path / "images/train",),
        val=(tmp_path / "images/val",),
        names=("cat", "dog"),
    )
    assert notes == []


def test_path_is_the_root_of_the_splits(tmp_path):
    spec, _ = dataset(tmp_path / "yamls", path="../pets", test="images/test")
    assert spec.root == tmp_path / "pets"
    assert spec.train == (tmp_path / "pets/images/train",)
    assert spec.test == (tmp_path / "pets/images/test",)


def test_path_is_sought_beside_the_yaml_then_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert dataset(tmp_path / "yamls", path="pets")[0].root == tmp_path / "pets"
    (tmp_path / "yamls" / "pets").mkdir()
    assert dataset(tmp_path / "yamls", path="pets")[0].root == tmp_path / "yamls" / "pets"


def test_a_split_may_be_a_list(tmp_path):
    spec, _ = dataset(tmp_path, train=["a", "b.txt", str(tmp_path / "c")])
    assert spec.train == (tmp_path / "a", tmp_path / "b.txt", tmp_path / "c")


def test_roboflow_names_folders_beside_the_yaml_as_if_they_lay_above(tmp_path):
    (tmp_path / "export" / "train" / "images").mkdir(parents=True)
    spec, _ = dataset(tmp_path / "export", train="../train/images", val="../valid/images")
    assert spec.train == (tmp_path / "export/train/images",)
    assert spec.val == (tmp_path / "valid/images",)  # neither exists: the path as it was written


def test_a_folder_above_the_yaml_goes_first_where_it_exists(tmp_path):
    for folder in ("train/images", "export/train/images"):
        (tmp_path / folder).mkdir(parents=True)
    assert dataset(tmp_path / "export", train="../train/images")[0].train == (tmp_path / "train/images",)


def test_names_may_be_a_mapping_in_any_order(tmp_path):
    assert dataset(tmp_path, names={2: "owl", 0: "cat", 1: 7}, nc=3)[0].names == ("cat", "7", "owl")


def test_val_may_be_a_fraction_of_train(tmp_path):
    spec, _ = dataset(tmp_path, val=0.2)
    assert (spec.val, spec.val_fraction) == ((), 0.2)


def test_defaults_that_a_data_set_asks_for(tmp_path):
    spec, notes = dataset(tmp_path, imgsz=160, epochs=30, embedded=True)
    assert (spec.imgsz, spec.epochs, spec.embedded) == (160, 30, True)
    assert notes == []


def test_unknown_keys_are_one_note(tmp_path):
    _, notes = dataset(tmp_path, roboflow={"license": "CC"}, colours=3)
    assert notes == ["data.yaml: keys that this trainer does not use: colours, roboflow"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": None},
            "'train' is missing; it should be a folder of images, a .txt list, a COCO .json, a VOC list",
        ),
        ({"val": None}, "'val' is missing"),
        ({"val": ""}, "'val' is missing"),
        ({"train": []}, "'train' is missing"),
        (
            {"train": 3},
            "'train: 3' should be a folder of images, a .txt list, a COCO .json, a VOC list or a folder of VOC .xml, ",
        ),
        ({"train": ["a", 3]}, "'train: ['a', 3]' should be a folder"),
        ({"test": {"a": 1}}, "'test: {'a': 1}' should be a folder"),
        ({"val": 1.5}, "'val: 1.5' should be a fraction between 0 and 1, or a folder of images, a .txt list"),
        ({"val": 0}, "'val: 0' should be a fraction between 0 and 1, or a folder"),
        ({"val": True}, "'val: True' should be a folder"),
        ({"path": 3}, "'path: 3' should be a folder"),
        ({"names": None}, "'names' is missing; it should be a list of class names or a mapping of index to name"),
        ({"names": []}, "'names' is missing; it should be a list of class names"),
        ({"names": ["a", "b", "a "], "nc": 3}, "'names' holds 'a' twice, as classes 0 and 2; each should be there"),
        ({"names": {1: "a", 0: "a"}}, "'names' holds 'a' twice, as classes 0 and 1"),
        ({"names": "cat"}, "'names' should be a list of class names"),
        ({"names": {1: "cat", 2: "dog"}}, "'names' as a mapping should have the keys 0 to 1, each once"),
        ({"names": {"a": "cat"}}, "'names' as a mapping should have the keys 0 to 0, each once"),
        ({"names": ["yes", False]}, "'names' holds False: put it in quotes"),
        ({"names": ["cat", ["dog"]]}, "'names' holds ['dog']"),
        ({"nc": 3}, "'nc: 3' does not agree with the 2 names"),
        ({"imgsz": 0}, "'imgsz: 0' should be a whole number of 1 or more"),
        ({"epochs": "many"}, "'epochs: many' should be a whole number of 1 or more"),
        ({"train": "a\0b"}, "'train: a\0b' should be a folder"),
        ({"train": None, "trian": "images"}, "'train' is missing; it should be"),
        ({"download": 3}, "'download' should be a URL, or a mapping with the keys url, size, sha256 and to, or a list"),
        ({"download": [{"size": 3}]}, "'download' should be a URL, or a mapping"),
        (
            {"download": "wget http://x/a.zip"},
            "'download' is a script, which is not run; it should be the URL of an ar",
        ),
        ({"download": "import os\nos.remove('x')"}, "'download' is a script, which is not run"),
        ({"download": "a.zip"}, "'download' 'a.zip' is no URL; it should be the URL of an archive"),
        ({"download": "file:///etc/passwd"}, "'download' 'file:///etc/passwd' is no URL"),
        ({"download": {"url": URL, "sha": "ab"}}, "'download' has the unknown key 'sha'; did you mean 'sha256'?"),
        ({"download": {"url": URL, "sha256": "ab"}}, "'download': 'sha256: ab' should be 64 hexadecimal digits"),
        ({"download": {"url": URL, "size": "1 GB"}}, "'download': 'size: 1 GB' should be a number of bytes"),
        ({"download": {"url": URL, "to": ["x"]}}, "'download': 'to: ['x']' should be a folder"),
    ],
)
def test_a_data_set_that_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        dataset(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path / 'data.yaml'}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("right", "wrong"), [("train", "trian"), ("val", "valid"), ("names", "name")])
def test_a_misspelt_key_is_named(tmp_path, right, wrong):
    content = {"train": "images", "val": "images", "names": ["cat"]}
    content[wrong] = content.pop(right)
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=rf"; did you mean '{right}' by '{wrong}'\?$"):
        read_dataset(str(tmp_path / "data.yaml"))


def test_downloads_have_a_folder_and_perhaps_a_check(tmp_path):
    assert dataset(tmp_path)[0].downloads == ()
    assert dataset(tmp_path, download=URL)[0].downloads == (Download(url=URL, to=tmp_path),)
    listed = [URL, {"url": URL, "size": 9, "sha256": "AB" * 32, "to": "images"}]
    second = Download(url=URL, to=tmp_path / "images", size=9, sha256="ab" * 32)
    spec, notes = dataset(tmp_path, download=listed)
    assert spec.downloads == (Download(url=URL, to=tmp_path), second)
    assert notes == []


texts = st.one_of(
    st.text(max_size=6), st.sampled_from(["a.txt", "../a", "~", "~nobody/x", "/", "n" * 300, URL, "loop"])
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=3), texts)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=5
)
paths = texts | st.lists(texts, max_size=2) | anything
files = st.fixed_dictionaries(
    {"train": paths, "val": st.floats(0, 1) | paths, "names": st.lists(texts, max_size=3) | anything},
    optional={
        key: anything | texts | st.fixed_dictionaries({"url": texts}, optional={"size": anything, "to": paths})
        for key in ("path", "test", "nc", "imgsz", "epochs", "embedded", "download", "trian")
    },
)


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(files.map(lambda content: yaml.safe_dump(content, allow_unicode=True).encode()), st.binary(max_size=50))
)
def test_any_data_set_yaml_is_read_or_a_user_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "yamls"
    folder.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / "loop").symlink_to("loop")
    (folder / "any.yaml").write_bytes(data)
    try:
        spec, notes = read_dataset(str(folder / "any.yaml"))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert spec.train
    assert spec.names
    assert all("\n" not in note for note in notes)


def test_a_coco_file_is_no_data_set(tmp_path):
    (tmp_path / "x.JSON").write_text('{"info": {}, "images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match=r"x\.JSON: is a COCO file; --data should be a data set YAML that names it as"):
        read_dataset(str(tmp_path / "x.JSON"))
    (tmp_path / "d.json").write_text('{"train": "images", "val": "images", "names": ["a"]}')
    assert read_dataset(str(tmp_path / "d.json"))[0].names == ("a",)


def test_a_data_set_yaml_that_is_missing_or_broken(tmp_path):
    (tmp_path / "broken.yaml").write_text("names: [cat\n")
    with pytest.raises(UserError, match=r"^--data file not found: .*missing\.yaml$"):
        read_dataset(str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match=r"^--data file is not valid YAML: .*broken\.yaml:2: "):
        read_dataset(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize("given", ["data/shapes.yaml", "shapes.yaml"])
def test_the_embedded_data_set_is_found_from_anywhere(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    spec, notes = read_dataset(given)
    assert spec.source == ROOT / "data" / "shapes.yaml"
    assert (spec.embedded, spec.imgsz, notes) == (True, 160, [])
    assert spec.train == (ROOT / "data/shapes/images/train",)


def test_a_file_of_the_working_directory_goes_before_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("yolov5n.yaml", "models") == ROOT / "models" / "yolov5n.yaml"
    Path("yolov5n.yaml").touch()
    assert find_file("yolov5n.yaml", "models").resolve() == tmp_path / "yolov5n.yaml"
    assert find_file("nowhere.yaml", "models") == Path("nowhere.yaml")


def test_real_data_sets_are_read_and_their_splits_exist(shared_datasets):
    sources = sorted(shared_datasets.glob("*/*.yaml"))
    assert sources
    for source in sources:
        spec, _ = read_dataset(str(source))
        assert all(path.exists() for path in spec.train + spec.val + spec.test), source


@pytest.mark.parametrize(
    ("argv", "trials"), [((), None), (("--evolve",), 300), (("--evolve", "--quiet"), 300), (("--evolve", "7"), 7)]
)
def test_evolve_takes_a_number_or_none(argv, trials):
    assert train_options(*argv).evolve == trials
