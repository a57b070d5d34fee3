"""Options to a trainer: what is chosen for the user, what is refused; nothing is written before all is well."""

import gc
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from utils.checkpoint import for_inference, load_checkpoint, save_checkpoint
from utils.config import TrainOptions
from utils.data import cache
from utils.hyp import hyperparameters
from utils.runtime import Runtime
from utils.structures import UserError
from utils.train import build
from utils.train.build import _WITH_RESUME, build_trainer
from utils.train.trainer import Trainer

RUN = Path("runs/train/exp")
LAST = RUN / "weights/last.pt"


def lines(capsys, start: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]


# ---- what is chosen -------------------------------------------------------------------------------------------------


def test_the_data_set_may_ask_for_epochs_and_size(tiny):
    content = yaml.safe_load(tiny.data.read_text()) | {"epochs": 7, "imgsz": 32}
    tiny.data.write_text(yaml.safe_dump(content))
    asked = build_trainer(tiny.options(epochs=None, imgsz=None)).options
    assert (asked.epochs, asked.imgsz) == (7, 32)
    told = build_trainer(tiny.options(epochs=2, imgsz=64)).options
    assert (told.epochs, told.imgsz) == (2, 64)


def test_defaults_without_anyone_asking(tiny):
    options = build_trainer(tiny.options(epochs=None, imgsz=None, batch_size=None)).options
    assert (options.epochs, options.imgsz) == (300, 640)
    assert options.batch_size == 8  # 16, but there are 8 images
    assert Path(options.data).is_absolute()


def test_batch_size_minus_one_on_the_cpu(tiny, capsys):
    assert build_trainer(tiny.options(batch_size=-1)).options.batch_size == 8
    assert "--batch-size 16 is larger than the 8 training images: using 8" in capsys.readouterr().out


def test_the_head_gets_the_classes_of_the_data_set(tiny):
    content = yaml.safe_load(tiny.data.read_text()) | {"names": ["blue", "red", "green", "grey"]}
    tiny.data.write_text(yaml.safe_dump(content))
    trainer = build_trainer(tiny.options())
    assert trainer.step.model.head.num_classes == 4
    assert trainer.names == ("blue", "red", "green", "grey")
    assert trainer.checkpoint()["network"]["nc"] == 4


@pytest.mark.parametrize(("rate", "said"), [(0.5, 0), (1000, 1)])
def test_a_learning_rate_that_nobody_means_is_said(tiny, capsys, rate, said):
    tiny.hyp.write_text(f"lr0: {rate}\n")
    build_trainer(tiny.options())
    assert len([line for line in lines(capsys, "note: ") if f"'lr0: {rate}' is far above" in line]) == said


def test_evaluation_stays_in_full_precision(tiny):
    trainer = build_trainer(tiny.options(amp="bf16"))
    assert trainer.runtime.amp_dtype == torch.bfloat16
    assert trainer.evaluator.runtime.amp_dtype is None


def test_weight_decay_is_that_of_the_nominal_batch(tiny):
    """3 images, accumulated to a nominal batch of 8, come to 9: the decay is scaled by 9 / 8."""
    trainer = build_trainer(tiny.options(batch_size=3, nominal_batch="8"))
    decays = [group["weight_decay"] for group in trainer.step.optimizer.param_groups]
    assert decays == [0, pytest.approx(0.0005 * 9 / 8), 0]
    assert build_trainer(tiny.options(name="auto")).step.optimizer.param_groups[1]["weight_decay"] == 0.0005


def test_label_smoothing_reaches_the_loss(tiny):
    assert build_trainer(tiny.options(label_smoothing=0.2)).step.gains.label_smoothing == 0.2


@pytest.mark.parametrize(
    ("options", "hyp", "line"),
    [
        ({"optimizer": "Adam"}, {}, "Adam runs with learning rates made for SGD"),
        ({"rect": True}, {"mosaic": 0.5}, "--rect: no mosaics, though the hyp file has 'mosaic: 0.5'"),
        ({"freeze": 2}, {}, "--freeze without --weights"),
        ({"single_cls": True, "label_smoothing": 0.1}, {}, "--label-smoothing: with one class"),
        ({"paint": "device"}, {}, "--paint device: on the CPU, --paint loader is many times faster"),
        ({"batch_size": -1}, {}, "--batch-size -1: without a CUDA GPU that is 16"),
    ],
)
def test_options_that_may_surprise_are_worth_a_line(tiny, capsys, options, hyp, line):
    tiny.hyp.write_text(yaml.safe_dump(yaml.safe_load(tiny.hyp.read_text()) | hyp))
    build_trainer(tiny.options())
    assert line not in capsys.readouterr().out
    build_trainer(tiny.options() | options)
    assert line in capsys.readouterr().out


def test_compiling_for_many_shapes_is_worth_a_line(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Runtime, "compiles_network", True)  # as on a GPU
    for options, line in (
        ({}, None),
        ({"multi_scale": True}, "--compile with --multi-scale: each new shape may be compiled anew"),
        ({"rect": True}, "--compile with --rect: each new shape may be compiled anew"),
    ):
        monkeypatch.setattr(torch, "compile", lambda model: model)
        build_trainer(tiny.options(**options))
        out = capsys.readouterr().out
        assert line in out if line else "--compile" not in out


def test_a_chosen_batch_size_is_written_down(tiny, monkeypatch):
    monkeypatch.setattr("utils.train.build.largest_batch_size", lambda *_, **__: 6)
    assert build_trainer(tiny.options(batch_size=-1)).options.batch_size == 6
    assert yaml.safe_load((RUN / "opt.yaml").read_text())["batch_size"] == 6


def test_frozen_layers_are_those_of_the_options(trained, tiny):
    weights = str(trained / "weights/best.pt")
    model = build_trainer(tiny.options(weights=weights, cfg=None, freeze=[0, 3])).step.model
    assert [layer.training for layer in model.train().model] == [index not in (0, 3) for index in range(11)]
    with pytest.raises(UserError, match="--freeze 30: this network has 11 layers"):
        build_trainer(tiny.options(freeze=30))


def test_a_quad_batch_is_lowered_to_a_multiple_of_four(tiny):
    for index in (6, 7):
        tiny.image("train", index).unlink()
    assert build_trainer(tiny.options(quad=True, batch_size=8)).options.batch_size == 4
    for index in (3, 4, 5):
        tiny.image("train", index).unlink()
    with pytest.raises(UserError, match="--quad takes images by four, and there are 3"):
        build_trainer(tiny.options(quad=True))


def test_adam_needs_a_momentum_below_one(tiny):
    tiny.hyp.write_text(tiny.hyp.read_text() + "momentum: 1.0\n")
    build_trainer(tiny.options())
    with pytest.raises(UserError, match="should be below 1 for AdamW"):
        build_trainer(tiny.options(optimizer="AdamW"))


def test_albumentations_need_images_painted_by_the_loader(tiny):
    tiny.hyp.write_text(tiny.hyp.read_text() + "albumentations: [ToGray]\n")
    with pytest.raises(UserError, match="--paint device: knows no 'albumentations', which"):
        build_trainer(tiny.options(paint="device"))


def test_a_single_class_replaces_all(tiny):
    trainer = build_trainer(tiny.options(single_cls=True))
    assert trainer.names == ("item",)
    assert trainer.step.model.head.num_classes == 1
    batch = next(trainer.stream.epoch(0))
    assert len(batch.classes) and not batch.classes.any()


# ---- anchors --------------------------------------------------------------------------------------------------------


def network_with(tiny, anchors) -> str:
    content = yaml.safe_load(tiny.cfg.read_text()) | {"anchors": anchors}
    tiny.cfg.write_text(yaml.safe_dump(content))
    return str(tiny.cfg)


def test_anchors_that_fit_are_kept(tiny, capsys):
    trainer = build_trainer(tiny.options())
    assert trainer.step.model.head.anchors.tolist() == [[[10, 13], [33, 23]], [[30, 61], [59, 119]]]
    assert lines(capsys, "Anchors") == ["Anchors reach 100.0% of the labels"]


def test_anchors_that_do_not_fit_are_replaced_and_saved(tiny, capsys):
    cfg = network_with(tiny, [[300, 10, 10, 300], [500, 20, 20, 500]])
    trainer = build_trainer(tiny.options(cfg=cfg))
    assert "Anchors reach 0.0% of the labels; new ones" in lines(capsys, "Anchors")[0]
    found = trainer.step.model.head.anchors
    assert (found < 100).all()
    assert (found.prod(-1).flatten().diff() >= 0).all()  # small ones to the fine level
    assert torch.equal(trainer.step.average.model.head.anchors, found)
    train.run(**tiny.options(cfg=cfg, name="saved"))
    network = load_checkpoint(Path("runs/train/saved/weights/best.pt"))["network"]
    assert torch.equal(torch.tensor(network["anchors"]).view(2, 2, 2), found)


def test_noautoanchor_keeps_any(tiny, capsys):
    given = [[300, 10, 10, 300], [500, 20, 20, 500]]
    trainer = build_trainer(tiny.options(cfg=network_with(tiny, given), noautoanchor=True))
    assert trainer.step.model.head.anchors.flatten(1).tolist() == given
    assert lines(capsys, "Anchors") == []


def test_the_hyp_file_may_ask_for_a_number_of_anchors(tiny):
    tiny.hyp.write_text(tiny.hyp.read_text() + "anchors: 3\n")
    assert build_trainer(tiny.options()).step.model.head.anchors.shape == (2, 3, 2)
    with pytest.raises(UserError, match="--noautoanchor"):
        build_trainer(tiny.options(noautoanchor=True))


# ---- weights to start from ------------------------------------------------------------------------------------------


def test_weights_bring_network_and_values(trained, tiny, capsys):
    weights = trained / "weights/best.pt"
    trainer = build_trainer(tiny.options(weights=str(weights), cfg=None))
    entries = trainer.step.model.state_dict()
    count = len(entries) - 1  # anchors are not weights
    assert lines(capsys, "Weights:") == [f"Weights: {count} of {count} entries of {weights} fit this network"]
    given = load_checkpoint(weights)["ema"]
    assert all(torch.equal(entries[name], tensor.to(entries[name].dtype)) for name, tensor in given.items())
    assert trainer.state.epoch == 0


def test_weights_of_other_classes_keep_all_but_the_head(trained, tiny):
    content = yaml.safe_load(tiny.data.read_text()) | {"names": ["blue", "red", "green"]}
    tiny.data.write_text(yaml.safe_dump(content))
    given = load_checkpoint(trained / "weights/best.pt")["ema"]
    entries = build_trainer(tiny.options(weights=str(trained / "weights/best.pt"))).step.model.state_dict()
    taken = {name for name in given if entries[name].shape == given[name].shape}
    assert {name for name in given if name not in taken} == {name for name in given if name.startswith("model.10.m.")}
    assert all(torch.equal(entries[name], given[name].to(entries[name].dtype)) for name in taken)


def test_training_from_weights_starts_better(trained, tiny):
    fresh = train.run(**tiny.options(name="fresh"))
    warm = train.run(**tiny.options(name="warm", weights=str(trained / "weights/best.pt")))
    assert warm.map50 > fresh.map50


# ---- refusals -------------------------------------------------------------------------------------------------------


OF_EVOLUTION = {name for name in vars(TrainOptions()) if name.startswith("evolve")}  # train.py takes another way


@pytest.mark.parametrize("name", sorted(vars(TrainOptions()).keys() - set(_WITH_RESUME) - OF_EVOLUTION))
def test_resume_refuses_other_options(name):
    with pytest.raises(UserError, match="cannot change") as raised:
        given = {"imgsz": 64, "cache": "ram"}.get(name, getattr(TrainOptions(), name))
        build_trainer({"resume": "last.pt", name: given})
    assert f"--{name.replace('_', '-')} cannot change" in str(raised.value)


def test_resume_refuses_what_holds_weights_alone(trained):
    with pytest.raises(UserError, match="holds weights alone; continue from last"):
        build_trainer({"resume": str(trained / "weights/best.pt")})


def test_resume_refuses_a_copy_outside_its_run(trained, tmp_path):
    (tmp_path / "downloads").mkdir()
    copy = tmp_path / "downloads/last.pt"
    copy.write_bytes((trained / "weights/last.pt").read_bytes())
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(UserError, match=r"should be RUN/weights/last\.pt"):
        build_trainer({"resume": str(copy), "epochs": 90})
    assert (tmp_path / "metrics.json").read_text() == "mine"


def test_resume_refuses_a_finished_run(trained):
    with pytest.raises(UserError, match="all 60 epochs are done; extend the run with --epochs"):
        build_trainer({"resume": str(trained / "weights/last.pt")})


def test_resume_refuses_other_classes(tiny):
    train.run(**tiny.options())
    tiny.data.write_text(tiny.data.read_text().replace("red", "pink"))
    with pytest.raises(UserError, match="no longer those of the run"):
        build_trainer({"resume": str(LAST), "epochs": 2})


def test_resume_without_any_run(tiny):
    with pytest.raises(UserError, match="below runs/; name the checkpoint"):
        build_trainer({"resume": "latest"})


def test_resume_keeps_the_updates_of_the_run(tiny):
    """Batches per update follow from the epochs of the first start, and an extended run goes on with them."""
    train.run(**tiny.options(epochs=2, nominal_batch="8"))
    trainer = build_trainer({"resume": str(LAST), "epochs": 3})
    assert trainer.schedule.accumulation == 2
    assert trainer.state.epoch == 2
    assert trainer.step.average.updates == load_checkpoint(LAST)["ema_updates"]


def saved_within_an_epoch(tiny, **changes) -> dict:
    """The last.pt of a run of 3 epochs that stopped after 2 of the 4 batches of its second epoch, somewhat changed."""
    trainer = build_trainer(tiny.options(epochs=3, batch_size=2, nominal_batch="2"))
    trainer.train_epoch()
    trainer.state.finish_epoch(None)
    batches = trainer.stream.epoch(1)
    trainer.step.health.start_epoch()
    for index in range(2):
        trainer.step(next(batches), trainer.schedule(4 + index))
    trainer.state.batch = 2
    trainer.run.settle()
    checkpoint = trainer.checkpoint() | changes
    LAST.parent.mkdir(exist_ok=True)
    save_checkpoint(LAST, checkpoint)
    return checkpoint


def resumed(capsys, **options) -> tuple[Trainer, list[str]]:
    """The trainer, and the notes that were said."""
    capsys.readouterr()
    trainer = build_trainer({"resume": str(LAST)} | options)
    out = capsys.readouterr().out
    return trainer, [line for line in out.splitlines() if line.startswith(("note: ", "Resuming "))]


def test_a_resumed_run_says_where_it_goes_on_and_nothing_else(tiny, capsys):
    saved_within_an_epoch(tiny)
    trainer, said = resumed(capsys, workers=1)
    assert said == [f"Resuming {LAST} after epoch 1 of 3 and batch 2 of the next"]
    assert [batch.indices.tolist() for batch in trainer.stream.epoch(1, start=2)] == [
        batch.indices.tolist() for batch in trainer.stream.epoch(1)
    ][2:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"torch": "2.6.0"},
            "the run was saved on CPU .* torch 2\\.6\\.0; this is CPU .*: it goes on, and",
        ),
        ({"made_on": "NVIDIA H100 (80 GiB), bf16"}, "the run was saved on NVIDIA H100 .*; this is CPU"),
        ({"project": "0.0.1"}, "the run was saved by version 0\\.0\\.1 of this trainer, this is "),
    ],
)
def test_what_a_result_may_depend_on_is_said_when_it_is_another(tiny, capsys, change, words):
    saved_within_an_epoch(tiny, **change)
    _, said = resumed(capsys)
    assert len(said) == 2 and re.search(words, said[0])


def test_an_epoch_of_other_images_is_begun_anew(tiny, capsys):
    saved_within_an_epoch(tiny)
    tiny.image("train", 7).unlink()
    tiny.label("train", 7).unlink()
    trainer, said = resumed(capsys)
    assert said[0].startswith("note: images or labels of 'train' are no longer those of the run so far; the epoch ")
    assert (trainer.state.epoch, trainer.state.batch) == (1, 0)
    assert math.isfinite(trainer.train_epoch().box)


def test_other_labels_for_validation_are_said(tiny, capsys):
    saved_within_an_epoch(tiny)
    tiny.label("val", 1).write_text("0 .5 .5 .2 .2\n")
    trainer, said = resumed(capsys)
    assert said[0] == "note: images or labels of 'val' are no longer those of the run so far"
    assert trainer.state.batch == 2


@pytest.mark.parametrize("epochs", [2, 5])
def test_the_rates_of_a_run_with_other_epochs_are_those_of_a_run_that_always_had_them(tiny, capsys, epochs):
    saved_within_an_epoch(tiny)
    trainer, said = resumed(capsys, epochs=epochs)
    assert said[0] == f"note: --epochs {epochs} after 3: from here on, rates are those of a run of {epochs} epochs"
    always = build_trainer(tiny.options(name="always", epochs=epochs, batch_size=2, nominal_batch="2"))
    assert [trainer.schedule(step) for step in range(6, 4 * epochs)] == [
        always.schedule(step) for step in range(6, 4 * epochs)
    ]


def test_a_run_that_is_cut_short_ends_where_it_stands(tiny, capsys):
    saved_within_an_epoch(tiny, best_epoch=0, best_fitness=0.0)
    save_checkpoint(LAST.with_name("best.pt"), for_inference(load_checkpoint(LAST)))
    metrics = train.run(resume=str(LAST), epochs=1)
    assert metrics.images == 4
    with pytest.raises(UserError, match="all 1 epochs are done"):
        train.run(resume=str(LAST))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
@pytest.mark.parametrize("more", [0, 1])
def test_a_best_that_is_damaged_or_lost_is_stood_in_for(tiny, capsys, monkeypatch, damage, more):
    """last.pt is all that --resume needs, even for the final evaluation alone."""
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Trainer, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train.run(**tiny.options(epochs=2))
    damage(LAST.with_name("best.pt"))
    capsys.readouterr()
    train.run(resume=str(LAST), epochs=2 + more)
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "weights/best.pt" in warning and "the weights of last.pt take its place" in warning
    best, last = (load_checkpoint(LAST.with_name(name)) for name in ("best.pt", "last.pt"))
    assert best["epoch"] == 2 + more
    name = "model.0.conv.weight"
    assert torch.equal(best["ema"][name], last["ema"][name].half())


def test_resume_takes_the_folder_of_a_run(tiny):
    train.run(**tiny.options())
    assert build_trainer({"resume": str(RUN), "epochs": 2}).state.epoch == 1


def test_a_new_run_in_the_folder_of_an_unfinished_one_says_so(tiny, capsys):
    saved_within_an_epoch(tiny)
    capsys.readouterr()
    build_trainer(tiny.options(exist_ok=True))
    note = f"note: --exist-ok: {RUN} held a run that was not finished; its checkpoints are gone\n"
    assert note in capsys.readouterr().out
    assert not LAST.exists()


def test_the_weights_that_a_run_began_with_are_not_read_again(tiny, tmp_path, monkeypatch):
    train.run(**tiny.options(name="first"))
    weights = tmp_path / "start.pt"
    weights.write_bytes(Path("runs/train/first/weights/best.pt").read_bytes())
    train.run(**tiny.options(cfg=None, weights=str(weights)))
    before = load_checkpoint(LAST)["model"]
    weights.unlink()
    trainer = build_trainer({"resume": str(LAST), "epochs": 2})
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.step.model.state_dict().items())


def test_a_run_goes_on_where_its_precision_and_its_compiler_are_not(tiny, monkeypatch, capsys):
    """Neither can be changed with --resume; neither is lost, should the run return to where it came from."""

    def refuse(model):
        raise UserError("--compile needs a C++ compiler on the CPU; install one or leave it out")

    train.run(**tiny.options())
    checkpoint = load_checkpoint(LAST)
    checkpoint["options"] |= {"amp": "fp16", "compile": True}  # as on a GPU
    save_checkpoint(LAST, checkpoint)
    monkeypatch.setattr("utils.train.build.accelerate", refuse)
    capsys.readouterr()
    trainer = build_trainer({"resume": str(LAST), "device": "cpu", "epochs": 2})
    out = capsys.readouterr().out
    assert "--amp fp16 (--half): needs a CUDA GPU; going on with --amp auto\n" in out
    assert "--compile needs a C++ compiler on the CPU; going on without it\n" in out
    assert (trainer.runtime.amp_dtype, trainer.runtime.compile) in ((torch.bfloat16, False), (None, False))
    assert (trainer.options.amp, trainer.options.compile) == ("fp16", True)
    for options, message in (({"amp": "fp16"}, "needs a CUDA GPU; use --amp"), ({"compile": True}, "leave it out")):
        with pytest.raises(UserError, match=message):
            build_trainer(tiny.options(name="new", device="cpu", **options))


# ---- images


@pytest.fixture
def memory(monkeypatch, tmp_path) -> Path:
    """In place of /dev/shm, an empty folder."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(cache, "_MEMORY", folder)
    return folder


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_run_from_a_cache_is_the_run_from_files(kind, tiny, memory, capsys):
    plain = train.run(**tiny.options(epochs=2, name="plain"))
    assert "cached" not in capsys.readouterr().out
    cached = train.run(**tiny.options(epochs=2, name="cached", cache=kind))
    where = memory if kind == "ram" else tiny.folder
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Images cached")]
    assert line.endswith(f": train (8, 0.1 MiB, built), val (4, 0.0 MiB, built); in {where}")
    assert (plain.fitness, plain.losses) == (cached.fitness, cached.losses)
    results = [Path(f"runs/train/{name}/results.csv").read_text() for name in ("plain", "cached")]
    assert results[0] == results[1]
    gc.collect()
    assert not list(memory.iterdir())
    train.run(**tiny.options(epochs=1, name="again", cache=kind))
    assert ("8, 0.1 MiB, found" in capsys.readouterr().out) == (kind == "disk")


def test_cache_dir_holds_the_cached_images(tiny, tmp_path):
    train.run(**tiny.options(cache="disk", cache_dir=str(tmp_path / "fast")))
    assert len(list((tmp_path / "fast").glob(".data-*-64-*.images"))) == 2


def test_a_cache_that_does_not_fit_is_refused_before_the_run_folder(tiny, memory, monkeypatch):
    monkeypatch.setattr(cache, "_free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"^--cache ram: the images take 0\.1 MiB, .* use --cache disk"):
        build_trainer(tiny.options(cache="ram"))
    assert not Path("runs").exists()


def test_a_resumed_run_goes_on_where_its_cache_has_no_room(tiny, memory, monkeypatch, capsys):
    train.run(**tiny.options(cache="ram"))
    monkeypatch.setattr(cache, "_free_memory", lambda: 1000)
    capsys.readouterr()
    trainer = build_trainer({"resume": str(LAST), "epochs": 2})
    assert re.search(r"note: --cache ram: the images take .*; .*going on without it\n", capsys.readouterr().out)
    trainer.fit()
    assert trainer.options.cache == "ram"


def test_what_a_killed_run_left_in_memory_goes_when_the_next_begins(tiny, memory):
    left = memory / f"{cache._ours()}.coco-train-640-12345678.images"
    left.touch()
    build_trainer(tiny.options())
    assert not left.exists()


def test_the_repeat_factor_says_what_it_does(tiny, capsys):
    for index in range(1, 8):
        tiny.label("train", index).write_text("0 .5 .5 .5 .5\n")
    tiny.label("train", 0).write_text("1 .5 .5 .5 .5\n")
    build_trainer(tiny.options(repeat_factor=0.5))
    says = "--repeat-factor 0.5: 1 of 8 images are shown more often than the others, up to 2.0 times as often; "
    assert says in capsys.readouterr().out
    build_trainer(tiny.options(repeat_factor=0.1, exist_ok=True))
    assert "--repeat-factor 0.1: no class is in less than this share of the images" in capsys.readouterr().out


def test_the_repeat_factor_reaches_the_order_of_images(tiny):
    for index in range(1, 8):
        tiny.label("train", index).write_text("0 .5 .5 .5 .5\n")
    tiny.label("train", 0).write_text("1 .5 .5 .5 .5\n")
    counts = []
    for factor in (0.0, 1.0):
        trainer = build_trainer(tiny.options(repeat_factor=factor, epochs=20, exist_ok=True))
        epochs = [list(trainer.stream.epoch(epoch)) for epoch in range(20)]
        counts.append(sum(batch.indices.tolist().count(0) for made in epochs for batch in made))
    assert counts[0] == 20
    assert 40 <= counts[1] <= 60  # 2.2 times an epoch are its due


@pytest.mark.parametrize(
    ("closed", "line"), [(1, "No mosaics from epoch 3 of 3 on"), (9, "No mosaics from epoch 1 of")]
)
def test_epochs_without_mosaics_are_worth_a_line(closed, line, tiny, capsys):
    tiny.hyp.write_text(tiny.hyp.read_text().replace("mosaic: 0", f"mosaic: 1\nclose_mosaic: {closed}"))
    train.run(**tiny.options(epochs=3))
    assert line in capsys.readouterr().out
    trainer = build_trainer({"resume": str(LAST), "epochs": 20})  # a run that was extended closes later
    assert f"No mosaics from epoch {21 - closed} of 20 on" in capsys.readouterr().out
    assert trainer.stream._batches._has_mosaics(19 - closed)
    assert not trainer.stream._batches._has_mosaics(20 - closed)
    build_trainer(tiny.options(epochs=3, rect=True))
    assert "epoch 3 of" not in capsys.readouterr().out


def test_copy_paste_without_polygons_is_a_note(tiny, capsys):
    tiny.hyp.write_text(tiny.hyp.read_text() + "copy_paste: 0.5\n")
    build_trainer(tiny.options())
    assert "'copy_paste: 0.5' does nothing: no label of 'train' is a polygon" in capsys.readouterr().out


def test_transforms_of_a_package_that_is_not_there_stop_the_run_before_its_folder(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    tiny.hyp.write_text(tiny.hyp.read_text() + "albumentations: [ToGray]\n")
    with pytest.raises(UserError, match=r"hyp.yaml: 'albumentations': the package is not installed"):
        build_trainer(tiny.options())
    assert not Path("runs").exists()


def test_transforms_are_written_as_they_were_read(tiny, monkeypatch):
    monkeypatch.setattr(build, "check_transforms", lambda transforms, source: None)
    tiny.hyp.write_text(tiny.hyp.read_text() + "albumentations: [ToGray, Blur: {p: 0.01, blur_limit: [3, 5]}]\n")
    trainer = build_trainer(tiny.options())
    wanted = ["ToGray", {"Blur": {"p": 0.01, "blur_limit": [3, 5]}}]
    assert yaml.safe_load((trainer.run.path / "hyp.yaml").read_text())["albumentations"] == wanted
    assert trainer.checkpoint()["hyp"]["albumentations"] == wanted
    assert hyperparameters(trainer.checkpoint()["hyp"], source="last.pt") == trainer.hyp


def test_half_a_launcher_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        build_trainer(tiny.options())


def test_building_reads_the_data_set_and_writes_the_folder_last(tiny, monkeypatch):
    """Whatever part fails, no folder is left."""
    parts = ["read_hyp", "open_dataset", "choose_runtime", "read_network", "scan_dataset", "choose_anchors"]
    for part in parts:
        with monkeypatch.context() as context, pytest.raises(UserError, match=part):
            context.setattr(f"utils.train.build.{part}", lambda *_, **__: (_ for _ in ()).throw(UserError(part)))  # noqa: B023
            build_trainer(tiny.options())
    assert not Path("runs").exists()


def test_a_real_data_set(shared_datasets, tiny, tmp_path):
    caches = tmp_path / "caches"  # the shared folder is left alone
    trainer = build_trainer(tiny.options(data=str(shared_datasets / "road_signs/data.yaml"), cache_dir=str(caches)))
    assert len(list(caches.iterdir())) == 2
    assert len(trainer.evaluator.batches.store) == 128
    assert trainer.step.model.head.num_classes == 21
    assert next(trainer.stream.epoch(0)).images.shape == (4, 3, 64, 64)
