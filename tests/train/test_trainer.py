"""Training as a whole: the same bytes from the same seed, an interrupted run equal to an uninterrupted one."""

import csv
import errno
import itertools
import json
import os
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import train
from models.yolo import DetectionModel
from utils.checkpoint import averaged_model, load_checkpoint, save_checkpoint, snapshot
from utils.data.loader import TrainStream
from utils.evaluate.evaluator import Evaluator
from utils.report import mosaics
from utils.report.logger import Logger
from utils.report.loggers import LOGGERS
from utils.report.pictures import PictureFiles
from utils.run_folder import LateRunFolder, RunFolder
from utils.stopping import Interrupted
from utils.structures import ClassMetrics, CocoFigures, LossMeans, Metrics, RunError, UserError
from utils.train.build import build_trainer
from utils.train.optim import Schedule
from utils.train.step import TrainStep
from utils.train.trainer import RunState, Trainer

RUNS = Path("runs/train")
LAST = RUNS / "exp/weights/last.pt"
NO_FIGURES = CocoFigures(**dict.fromkeys(CocoFigures.__annotations__))
CLASS = {"images": 1, "labels": 1, "coco": NO_FIGURES} | dict.fromkeys(
    ("precision", "recall", "f1", "map50", "best_f1", "best_confidence"), 0.0
)


def tensors(value, name="") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path: tensor for key, item in items for path, tensor in tensors(item, f"{name}/{key}").items()}


def same(first: Path, second: Path) -> bool:
    """Whether two last.pt hold the same run, bit for bit, wherever it lies."""
    one, two = load_checkpoint(first), load_checkpoint(second)
    for checkpoint in (one, two):
        for place in ("project", "name", "workers", "save_every"):
            checkpoint["options"].pop(place)
    ours, theirs = tensors(one), tensors(two)
    assert len(ours) > 200
    plain_equal = repr_without_tensors(one) == repr_without_tensors(two)
    return plain_equal and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def repr_without_tensors(value) -> str:
    if isinstance(value, dict):
        return repr({key: repr_without_tensors(item) for key, item in value.items()})
    return "tensor" if isinstance(value, torch.Tensor) else repr(value)


@pytest.fixture
def augmented(tiny):
    """The tiny data set with everything random that there is."""
    chances = {"mosaic": 0.7, "mixup": 0.5, "degrees": 10, "scale": 0.5, "translate": 0.1, "hsv_h": 0.02, "hsv_s": 0.5}
    tiny.hyp.write_text(yaml.safe_dump(yaml.safe_load(tiny.hyp.read_text()) | chances | {"warmup_epochs": 1}))
    return tiny


def interrupt(monkeypatch, *, epoch: int, batch: int, signum: int | None = None):
    """The end, as by a kill, before a batch of an epoch, both counted from 0; or a signal that asks for it there."""
    honest = TrainStream.epoch

    def interrupted(self, number, *args, start=0):
        for index, one in enumerate(honest(self, number, *args, start=start), start):
            if (number, index) == (epoch, batch):
                if signum is None:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signum)
            yield one

    monkeypatch.setattr(TrainStream, "epoch", interrupted)


# ---- the same again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_same_seed_gives_the_same_bytes(augmented, amp, tmp_path, monkeypatch):
    files = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        torch.rand(3)  # the global random state must not matter
        train.run(**augmented.options(epochs=2, amp=amp, workers=0))
        names = ("weights/last.pt", "weights/best.pt", "results.csv", "metrics.json", "opt.yaml", "hyp.yaml")
        files.append({name: (RUNS / "exp" / name).read_bytes() for name in names})
    assert files[0] == files[1]


def test_another_seed_gives_another_network(augmented):
    for seed in (0, 1):
        train.run(**augmented.options(name=str(seed), seed=seed))
    first, second = (load_checkpoint(RUNS / str(seed) / "weights/last.pt")["model"] for seed in (0, 1))
    weights = [name for name in first if name.endswith("conv.weight")]
    assert not any(torch.equal(first[name], second[name]) for name in weights)


def test_loader_processes_do_not_matter(augmented):
    for workers in (0, 1, 2):
        train.run(**augmented.options(name=str(workers), workers=workers, epochs=2))
    for workers in (1, 2):
        assert same(RUNS / "0/weights/last.pt", RUNS / f"{workers}/weights/last.pt")


def test_training_learns(trained):
    """From nothing to finding most of four rectangles, in 120 updates."""
    rows = [line.split(", ") for line in (trained / "results.csv").read_text().splitlines()]
    box = [float(row[1]) for row in rows[1:]]
    assert box[-1] < 0.6 * box[0]
    assert load_checkpoint(trained / "weights/best.pt")["best_fitness"] > 0.1


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(augmented, monkeypatch, batch, amp):
    train.run(**augmented.options(name="whole", epochs=4, amp=amp))
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt, match="--resume"):
        interrupt(context, epoch=2, batch=batch)
        train.run(**augmented.options(epochs=4, amp=amp))
    assert load_checkpoint(LAST)["epoch"] == 2
    metrics = train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    for name in ("results.csv", "metrics.json"):
        assert (RUNS / "whole" / name).read_bytes() == (RUNS / "exp" / name).read_bytes()
    assert metrics.images == 4


def test_a_checkpoint_that_was_loaded_is_saved_as_the_same_file(augmented):
    """So a resumed run may be compared with any tool."""
    options = augmented.options(epochs=2, save_every=0)
    train.run(**options)
    again = RUNS.parent / "again.pt"
    save_checkpoint(again, snapshot(load_checkpoint(LAST)))
    assert again.read_bytes() == LAST.read_bytes()
    whole = LAST.read_bytes()
    trainer = build_trainer({"resume": str(LAST), "epochs": 3})
    trainer.options = replace(trainer.options, epochs=2)
    save_checkpoint(again, snapshot(trainer.checkpoint()))
    assert again.read_bytes() == whole


STOPS = [(1, 1, signal.SIGTERM), (2, 0, signal.SIGINT), (0, 1, signal.SIGUSR1)]


@pytest.mark.parametrize(("epoch", "batch", "signum"), STOPS)
def test_a_signal_stops_between_two_steps_and_the_run_goes_on_from_there(augmented, monkeypatch, epoch, batch, signum):
    train.run(**augmented.options(name="whole", epochs=3, nominal_batch="4", batch_size=2))
    with monkeypatch.context() as context, pytest.raises(Interrupted, match="--resume") as stopped:
        interrupt(context, epoch=epoch, batch=batch, signum=signum)
        train.run(**augmented.options(epochs=3, nominal_batch="4", batch_size=2))
    assert stopped.value.signum == signum
    left = load_checkpoint(LAST)
    assert left["epoch"] == epoch and batch - 1 <= left["batch"] <= batch  # after warm-up two batches make an update
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    for name in ("results.csv", "metrics.json"):
        assert (RUNS / "whole" / name).read_bytes() == (RUNS / "exp" / name).read_bytes()


@pytest.mark.parametrize("chosen", [{}, {"noval": True}])
def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(augmented, monkeypatch, chosen):
    train.run(**augmented.options(name="whole", epochs=3, **chosen))
    honest = Trainer.evaluate

    def asked(self):
        if self.state.epoch == (2 if chosen else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self)

    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr(Trainer, "evaluate", asked)
        train.run(**augmented.options(epochs=3, **chosen))
    left = load_checkpoint(LAST)
    assert (left["epoch"], left["batch"]) == (2 if chosen else 1, 2)
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    assert (RUNS / "whole/results.csv").read_bytes() == (RUNS / "exp/results.csv").read_bytes()


def test_checkpoints_within_an_epoch_change_nothing(augmented):
    """One after every update, as often as there can be."""
    for name, minutes in (("seldom", 10), ("often", 1e-9)):
        train.run(**augmented.options(name=name, epochs=3, save_every=minutes))
    assert same(RUNS / "seldom/weights/last.pt", RUNS / "often/weights/last.pt")
    assert (RUNS / "seldom/results.csv").read_bytes() == (RUNS / "often/results.csv").read_bytes()


@pytest.mark.parametrize("nosave", [False, True])
def test_a_run_dies_within_an_epoch_and_goes_on_from_its_last_checkpoint(augmented, monkeypatch, nosave):
    options = augmented.options(epochs=2, batch_size=1, nominal_batch="1", save_every=None if nosave else 1e-9)
    train.run(**options, name="whole", nosave=nosave)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt(context, epoch=1, batch=5)
        train.run(**options, nosave=nosave)
    if nosave:
        assert not LAST.exists()
        return
    assert load_checkpoint(LAST)["batch"] == 5
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    assert (RUNS / "whole/results.csv").read_bytes() == (RUNS / "exp/results.csv").read_bytes()


def test_a_death_before_the_checkpoint_leaves_no_gap_in_the_table(augmented, monkeypatch):
    """The row is written, the checkpoint is not: the resumed run writes the row anew."""
    train.run(**augmented.options(name="whole", epochs=3))

    def killed(self, checkpoint, **choices):
        if checkpoint["epoch"] == 2:
            raise KeyboardInterrupt
        honest(self, checkpoint, **choices)

    honest = RunFolder.save
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(RunFolder, "save", killed)
        train.run(**augmented.options(epochs=3))
    assert len((RUNS / "exp/results.csv").read_text().splitlines()) == 3
    assert load_checkpoint(LAST)["epoch"] == 1
    train.run(resume=str(LAST))
    assert (RUNS / "whole/results.csv").read_bytes() == (RUNS / "exp/results.csv").read_bytes()
    assert same(RUNS / "whole/weights/last.pt", LAST)


def test_a_run_interrupted_at_its_final_evaluation_is_finished_by_resume(tiny, monkeypatch):
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Trainer, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train.run(**tiny.options(epochs=2))
    assert not (RUNS / "exp/metrics.json").exists()
    train.run(resume=str(LAST))
    assert (RUNS / "exp/metrics.json").exists()
    assert len((RUNS / "exp/results.csv").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="all 2 epochs are done"):
        train.run(resume=str(LAST))


def test_a_finished_run_can_be_extended(tiny):
    train.run(**tiny.options(epochs=2))
    train.run(resume=str(LAST), epochs=4)
    rows = (RUNS / "exp/results.csv").read_text().splitlines()
    assert [row.split(",")[0].strip() for row in rows] == ["epoch", "1", "2", "3", "4"]
    assert load_checkpoint(LAST)["options"]["epochs"] == 4


def test_resume_from_the_folder_of_the_checkpoint(tiny, monkeypatch):
    """A relative path such as `last.pt` finds its run as well."""
    train.run(**tiny.options(epochs=1))
    run = (RUNS / "exp").resolve()
    monkeypatch.chdir(run / "weights")
    train.run(resume="last.pt", epochs=2)
    assert len((run / "results.csv").read_text().splitlines()) == 3
    assert {path.name for path in (run / "weights").iterdir()} == {"last.pt", "best.pt"}


def test_resume_without_a_path_takes_the_newest_run(tiny, cli):
    for name in ("one", "two"):
        train.run(**tiny.options(name=name))
    code, output, _ = cli(train, "--resume", "--epochs", "2")
    assert code == 0
    assert "Resuming runs/train/two/weights/last.pt after epoch 1 of 2" in output


def test_a_run_out_of_patience_stops_and_says_so(tiny, cli, monkeypatch):
    monkeypatch.setattr(Metrics, "fitness", property(lambda self: 0.25))  # never better than in the first epoch
    code, output, _ = cli(train, *tiny.flags(epochs=50, patience=2))
    assert code == 0
    assert len((RUNS / "exp/results.csv").read_text().splitlines()) == 1 + 3
    assert "no improvement in 2 epochs" in output and "best.pt is of epoch 1" in output
    with pytest.raises(UserError, match=r"stopped after epoch 3.*--patience"):
        train.run(resume=str(LAST))
    train.run(resume=str(LAST), patience=3)
    assert load_checkpoint(LAST)["epoch"] == 4


MANY_OPTIONS = {
    "adaptive": {
        "optimizer": "AdamW",
        "multi_scale": True,
        "image_weights": True,
        "quad": True,
        "freeze": [0, 1],
        "label_smoothing": 0.1,
        "save_period": 2,
        "linear_lr": True,
    },
    "plain": {"rect": True, "noval": True, "single_cls": True, "deterministic": True, "multi_scale": True},
    "rare": {"rect": True, "image_weights": True, "adam": True, "workers": 1, "amp": "bf16"},
}


@pytest.mark.parametrize("chosen", MANY_OPTIONS)
def test_every_option_lives_on_in_a_resumed_run(augmented, monkeypatch, chosen, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    options = MANY_OPTIONS[chosen]
    train.run(**augmented.options(name="whole", epochs=4) | options)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt, match="--resume"):
        interrupt(context, epoch=1, batch=1)
        train.run(**augmented.options(epochs=4) | options)
    assert load_checkpoint(LAST)["epoch"] == 1
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    for name in ("results.csv", "metrics.json", "weights/best.pt"):
        ours, theirs = (RUNS / run / name for run in ("exp", "whole"))
        if name.endswith(".pt"):
            assert load_checkpoint(ours)["epoch"] == load_checkpoint(theirs)["epoch"]
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.name for path in (RUNS / "exp/weights").iterdir()) == sorted(
        path.name for path in (RUNS / "whole/weights").iterdir()
    )


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_the_head_alone_may_learn(tiny, kind):
    """All batch norms are frozen, so a group of the optimizer is empty."""
    train.run(**tiny.options(optimizer=kind, freeze=10, epochs=2))
    fresh = build_trainer(tiny.options(name="fresh")).step.model.state_dict()
    trained = load_checkpoint(LAST)["model"]
    changed = {name for name, value in fresh.items() if not torch.equal(value, trained[name])}
    assert changed == {name for name in fresh if name.startswith("model.10.m.")}


# ---- what is evaluated and saved when -------------------------------------------------------------------------------


def fitness_of_epochs(monkeypatch, *figures: float) -> list[int]:
    """Evaluations give these; the epochs in which they happened."""
    epochs, left = [], list(figures)

    def evaluated(self):
        epochs.append(self.state.epoch + 1)
        return metrics_of(left.pop(0))

    monkeypatch.setattr(Trainer, "evaluate", evaluated)
    return epochs


def test_noval_evaluates_the_final_epoch_which_is_the_best(tiny, monkeypatch):
    evaluated = fitness_of_epochs(monkeypatch, 0.2, 0.1)
    train.run(**tiny.options(epochs=3, noval=True))
    assert evaluated == [3]
    assert load_checkpoint(RUNS / "exp/weights/best.pt")["epoch"] == 3
    train.run(resume=str(LAST), epochs=5)
    assert evaluated == [3, 5]
    assert load_checkpoint(RUNS / "exp/weights/best.pt")["epoch"] == 5  # though it scored less


def test_noval_outlasts_any_patience(tiny, monkeypatch):
    trainer = build_trainer(tiny.options(epochs=300, noval=True))
    trainer.state.epoch = 250
    assert not trainer.finished


def test_a_run_with_noval_cannot_be_cut_short_to_what_was_never_evaluated(tiny, monkeypatch):
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt(context, epoch=2, batch=0)
        train.run(**tiny.options(epochs=4, noval=True))
    with pytest.raises(UserError, match="2 epochs are done and none was evaluated; raise --epochs"):
        train.run(resume=str(LAST), epochs=2)


def test_nosave_writes_weights_at_the_end_alone(tiny, monkeypatch):
    fitness_of_epochs(monkeypatch, 0.1, 0.3, 0.2)
    seen, honest = [], Trainer.train_epoch

    def looking(self):
        seen.append(sorted(path.name for path in self.run.path.rglob("*.pt")))
        return honest(self)

    monkeypatch.setattr(Trainer, "train_epoch", looking)
    train.run(**tiny.options(epochs=3, nosave=True))
    assert seen == [[], [], []]
    assert load_checkpoint(LAST)["epoch"] == 3
    assert load_checkpoint(RUNS / "exp/weights/best.pt")["epoch"] == 2


def test_nosave_gives_the_same_files_as_saving_each_epoch(augmented):
    for name, nosave in (("saves", False), ("waits", True)):
        train.run(**augmented.options(name=name, epochs=3, nosave=nosave))
    first, second = (load_checkpoint(RUNS / name / "weights/best.pt") for name in ("saves", "waits"))
    assert first["epoch"] == second["epoch"]
    assert all(torch.equal(tensor, second["ema"][name]) for name, tensor in first["ema"].items())
    assert (RUNS / "saves/metrics.json").read_bytes() == (RUNS / "waits/metrics.json").read_bytes()


def test_an_early_stop_is_an_end_too(tiny, monkeypatch):
    fitness_of_epochs(monkeypatch, 0.3, 0.2)
    train.run(**tiny.options(epochs=30, nosave=True, patience=1))
    assert load_checkpoint(LAST)["epoch"] == 2


def test_ctrl_c_promises_no_checkpoint_that_nosave_never_wrote(tiny, monkeypatch):
    train.run(**tiny.options(epochs=1))  # whose last.pt is there
    with (
        monkeypatch.context() as context,
        pytest.raises(KeyboardInterrupt, match="--nosave saves nothing before the end"),
    ):
        interrupt(context, epoch=2, batch=0)
        train.run(**tiny.options(epochs=4, nosave=True, exist_ok=True))


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("signum", [None, signal.SIGTERM])
def test_a_run_can_be_continued_from_its_first_moment(augmented, monkeypatch, signum):
    """With its first batch at hand, or when a signal ends the wait for that."""
    train.run(**augmented.options(name="whole", epochs=1))
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt, match=r"continue with: .*py --resume "):
        interrupt(context, epoch=0, batch=0 if signum else 1, signum=signum)
        train.run(**augmented.options(epochs=1, save_every=0))
    assert (load_checkpoint(LAST)["epoch"], load_checkpoint(LAST)["batch"]) == (0, 0)
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)


def test_other_epochs_of_a_resumed_run_are_remembered_though_it_dies_at_once(tiny, monkeypatch):
    train.run(**tiny.options(epochs=1))
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt(context, epoch=1, batch=1)
        train.run(resume=str(LAST), epochs=3)
    train.run(resume=str(LAST))
    assert load_checkpoint(LAST)["epoch"] == 3


@pytest.mark.parametrize("batch", [0, 1])
def test_a_signal_saves_what_nosave_would_have_saved_at_the_end(augmented, monkeypatch, batch):
    train.run(**augmented.options(name="whole", epochs=4, nosave=True))
    with monkeypatch.context() as context, pytest.raises(Interrupted, match="--resume"):
        interrupt(context, epoch=2, batch=batch, signum=signal.SIGTERM)
        train.run(**augmented.options(epochs=4, nosave=True))
    assert (RUNS / "exp/weights/best.pt").exists()
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    first, second = (load_checkpoint(RUNS / name / "weights/best.pt") for name in ("whole", "exp"))
    assert all(torch.equal(tensor, second["ema"][name]) for name, tensor in first["ema"].items())


def test_ctrl_c_while_nosave_writes_its_only_checkpoint(tiny, monkeypatch):
    monkeypatch.setattr("utils.run_folder.save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--nosave saves nothing before the end: start it again"):
        train.run(**tiny.options(epochs=2, nosave=True))


def test_save_period_keeps_every_so_many_epochs(tiny):
    train.run(**tiny.options(epochs=5, save_period=2))
    names = {path.name for path in (RUNS / "exp/weights").iterdir()}
    assert names == {"last.pt", "best.pt", "epoch2.pt", "epoch4.pt"}
    kept = load_checkpoint(RUNS / "exp/weights/epoch2.pt")
    assert kept["epoch"] == 2
    assert "optimizer" in kept


def test_the_aps_of_the_classes_are_in_the_checkpoint(trained):
    figures = json.loads((trained / "metrics.json").read_text())["per_class"]
    maps = load_checkpoint(trained / "weights/last.pt")["class_maps"]
    assert len(maps) == len(figures) == 2
    assert all(type(value) is float for value in maps)
    assert max(maps) > 0


def test_image_weights_follow_the_last_evaluation(tiny, monkeypatch):
    """A class that is found for certain is not shown again."""
    certain = [ClassMetrics(**CLASS, name="blue", map50_95=1.0), ClassMetrics(**CLASS, name="red", map50_95=0.0)]
    monkeypatch.setattr(Trainer, "evaluate", lambda self: replace(metrics_of(0.1), per_class=tuple(certain)))
    shown, honest = {0: set(), 1: set()}, TrainStream.epoch

    def watched(self, number, *args, **choices):
        for batch in honest(self, number, *args, **choices):
            shown[number] |= set(batch.classes.tolist())
            yield batch

    monkeypatch.setattr(TrainStream, "epoch", watched)
    train.run(**tiny.options(epochs=2, image_weights=True))
    assert shown == {0: {0, 1}, 1: {1}}


# ---- fp16 -----------------------------------------------------------------------------------------------------------


def scaled(tiny, init_scale: float) -> Trainer:
    """A trainer with a GradScaler at work, as on a GPU in fp16."""
    trainer = build_trainer(tiny.options(batch_size=1, nominal_batch="1"))
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return trainer


def test_an_overflow_of_the_gradients_is_nothing_to_speak_of(tiny, capsys, recwarn, monkeypatch):
    """The step is left out, the scale is halved, the loss is as finite as ever."""
    trainer = scaled(tiny, 2.0**16)
    gradients = iter([float("inf"), float("nan")])
    next(trainer.step.model.parameters()).register_hook(lambda gradient: gradient * next(gradients, 1.0))
    weights, honest = [], TrainStep.__call__

    def recorded(step, batch, settings):
        losses = honest(step, batch, settings)
        assert losses.total.isfinite()
        weights.append(next(trainer.step.model.parameters()).detach().clone())
        return losses

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    capsys.readouterr()
    means = trainer.train_epoch()
    assert means.box > 0
    assert [torch.equal(before, after) for before, after in itertools.pairwise(weights)] == [True] + [False] * 6
    assert trainer.step.scaler.get_scale() == 2.0**14
    assert all(value.isfinite().all() for value in trainer.step.model.state_dict().values())
    assert all(value.isfinite().all() for value in tensors(trainer.checkpoint()).values())
    assert "overflow" not in "".join(capsys.readouterr())
    assert not [str(one.message) for one in recwarn if "overflow" in str(one.message)]


def test_gradients_that_never_fit_into_fp16_end_the_run_with_one_line(tiny):
    trainer = scaled(tiny, 2.0**-4)
    next(trainer.step.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match=r"overflow in fp16 at every step of epoch 1.*use --amp bf16 or --amp off"):
        trainer.fit()


def test_a_run_without_a_scaler_resumes_with_one(tiny):
    """As when a run moves from a CPU to an old GPU."""
    trainer = build_trainer(tiny.options())
    saved = trainer.checkpoint()
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.step.load_state_dict(saved)
    assert trainer.step.scaler.get_scale() == 8.0


# ---- numbers that are none ------------------------------------------------------------------------------------------


def lose(monkeypatch, *places: tuple[int, int]):
    """The loss of these batches, by epoch and number, is not a number; as often as they are trained on."""
    honest = DetectionModel.forward

    def lost(self, images):
        outputs = honest(self, images)
        return [level * float("nan") for level in outputs] if self.training and now[0] in places else outputs

    now, step = [None], TrainStep.__call__

    def noting(self, batch, settings):
        now[0] = settings.place
        return step(self, batch, settings)

    monkeypatch.setattr(DetectionModel, "forward", lost)
    monkeypatch.setattr(TrainStep, "__call__", noting)


def table(name: str, run: str = "exp") -> list[dict[str, str]]:
    with (RUNS / run / name).open() as file:
        return list(csv.DictReader(file, skipinitialspace=True))


def test_a_batch_without_numbers_is_skipped_counted_and_named(augmented, monkeypatch, capsys):
    lose(monkeypatch, (1, 0))
    metrics = train.run(**augmented.options(epochs=3))
    assert metrics.non_finite == 0
    assert [row["train/skipped"] for row in table("results.csv")] == ["0", "1", "0"]
    assert all(np.isfinite(float(cell)) for row in table("results.csv") for cell in row.values())
    [row] = table("nonfinite.csv")
    assert (row["epoch"], row["batch"], row["what"]) == ("2", "1", "loss")
    assert len(row["images"].split("; ")) == 4 and all(Path(one).is_file() for one in row["images"].split("; "))
    assert "warning: epoch 2: 1 update skipped" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in tensors(load_checkpoint(LAST)).values())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_run_resumed_among_batches_without_numbers_is_the_same_run(augmented, monkeypatch, batch):
    """No checkpoint is made in the midst of them: the run goes on from the one before."""
    lose(monkeypatch, (1, 1), (1, 2))
    options = augmented.options(epochs=2, batch_size=2, nominal_batch="2", save_every=1e-9)
    train.run(**options, name="whole")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt(context, epoch=1, batch=batch)
        train.run(**options)
    assert load_checkpoint(LAST)["batch"] == 1
    train.run(resume=str(LAST))
    assert same(RUNS / "whole/weights/last.pt", LAST)
    for name in ("results.csv", "nonfinite.csv"):
        assert (RUNS / "whole" / name).read_bytes() == (RUNS / "exp" / name).read_bytes()


EVER_AFTER = [(epoch, batch) for epoch in range(2, 40) for batch in range(2)]


def test_numbers_that_never_come_back_end_the_run_after_one_more_attempt(tiny, monkeypatch, capsys):
    lose(monkeypatch, *EVER_AFTER)
    rates, honest = set(), TrainStep.__call__

    def noting(self, batch, settings):
        rates.add(settings.lrs[1])
        return honest(self, batch, settings)

    monkeypatch.setattr(TrainStep, "__call__", noting)
    with pytest.raises(RunError, match=r"^20 updates in a row, or more, .* at half .* as well: .*lower lr0"):
        train.run(**tiny.options(epochs=40))
    assert rates == {0.02, 0.01}
    assert "back to the last checkpoint, after epoch 2, and on at half the learning rate" in capsys.readouterr().out
    assert [row["epoch"] for row in table("results.csv")][:2] == ["1", "2"]
    assert load_checkpoint(LAST)["epoch"] == 2
    assert {(int(row["epoch"]), int(row["batch"])) for row in table("nonfinite.csv")} == {
        (epoch + 1, batch + 1) for epoch, batch in EVER_AFTER[:20]
    }


@pytest.mark.parametrize("nosave", [False, True])
def test_the_best_epoch_may_end_with_a_batch_without_numbers(tiny, monkeypatch, nosave):
    lose(monkeypatch, (1, 1))
    evaluated = fitness_of_epochs(monkeypatch, 0.1, 0.3, 0.2)
    train.run(**tiny.options(epochs=3, nominal_batch="4", nosave=nosave))
    assert evaluated == [1, 2, 3]
    assert load_checkpoint(RUNS / "exp/weights/best.pt")["epoch"] == 2
    assert load_checkpoint(LAST)["best_epoch"] == 1


def test_half_the_learning_rate_may_be_enough(tiny, monkeypatch):
    """The run then ends as it should, and says so in every later row."""
    honest, calls = TrainStep.__call__, []

    def wild(self, batch, settings):
        calls.append(settings.place)
        if settings.lrs[1] == 0.02 and settings.place >= (1, 0):
            batch = replace(batch, boxes=batch.boxes * float("nan"))
        return honest(self, batch, settings)

    monkeypatch.setattr(TrainStep, "__call__", wild)
    train.run(**tiny.options(epochs=15))
    assert [row["epoch"] for row in table("results.csv")] == [str(epoch) for epoch in range(1, 16)]
    assert {float(row["x/lr1"]) for row in table("results.csv")[1:]} == {0.01}
    assert len(table("nonfinite.csv")) == 20
    assert load_checkpoint(LAST)["lr_scale"] == 0.5
    train.run(resume=str(LAST), epochs=16)  # stays so
    assert float(table("results.csv")[-1]["x/lr1"]) == 0.01


def test_without_a_checkpoint_to_go_back_to_the_run_ends(tiny, monkeypatch):
    lose(monkeypatch, *EVER_AFTER)
    with pytest.raises(RunError, match=r"^20 updates in a row, or more, gave no finite numbers: "):
        train.run(**tiny.options(epochs=40, nosave=True))


# ---- where the time goes --------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """Time that stands still but for these: slow(owner, name, seconds) per call. The calls so far."""
    now = [0.0]
    monkeypatch.setattr("utils.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(owner: type, name: str, seconds: float) -> list:
        honest, calls = getattr(owner, name), []

        def slowed(*args, **choices):
            now[0] += seconds
            calls.append(name)
            return honest(*args, **choices)

        monkeypatch.setattr(owner, name, slowed)
        return calls

    return make


@pytest.mark.parametrize("options", [{"epochs": 1}, {"epochs": 2}, {"epochs": 2, "nosave": True, "noval": True}])
def test_the_summary_covers_the_run_to_its_end_and_the_table_each_epoch(tiny, slow, cli, options):
    """The last checkpoint and the evaluation of best.pt come after the last row; pictures are the rest."""
    saves = slow(LateRunFolder if "nosave" in options else RunFolder, "save", 1)
    evaluations = slow(Evaluator, "evaluation", 10)
    batches = slow(PictureFiles, "evaluated_batch", 100)
    slow(PictureFiles, "finished", 1000)
    code, output, _ = cli(train, *tiny.flags(**options, noplots=None))
    assert code == 0 and saves and batches
    saved, evaluated, rest = len(saves), 10 * len(evaluations), 1000 + 100 * len(batches)
    names, seconds = output[output.index("   time") :].replace("data wait", "data_wait").splitlines()[:2]
    said = dict(zip(names.split(), seconds.split()))
    assert {name: float(said[name]) for name in ("evaluate", "save", "rest", "all")} == {
        "evaluate": evaluated,
        "save": saved,
        "rest": rest,
        "all": saved + evaluated + rest,
    }
    with (RUNS / "exp/timing.csv").open() as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    assert sum(float(row["save_s"]) for row in rows) == saved - 1
    assert sum(float(row["evaluate_s"]) for row in rows) == evaluated - 10


# ---- the loop's parts -----------------------------------------------------------------------------------------------


def metrics_of(fitness: float) -> Metrics:
    figures = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "best_confidence": 0.0}
    return Metrics(**figures, coco=NO_FIGURES, map50=fitness, map50_95=fitness, images=1, labels=1, per_class=())


def test_an_input_is_resized_as_the_schedule_says(tiny):
    trainer = build_trainer(tiny.options(multi_scale=True, imgsz=64, batch_size=1, seed=1))
    sides, honest = [], trainer.step.model.forward
    trainer.step.model.forward = lambda images: (sides.append(tuple(images.shape[2:])), honest(images))[1]
    trainer.train_epoch()
    assert sides == [(round(64 * trainer.schedule(step).scale),) * 2 for step in range(8)]
    assert len(set(sides)) > 2


def test_images_are_counted_before_they_are_merged(tiny):
    """Two quad batches of four images are two network inputs."""
    trainer = build_trainer(tiny.options(quad=True))
    inputs, honest = [], trainer.step.model.forward
    trainer.step.model.forward = lambda images: (inputs.append(tuple(images.shape)), honest(images))[1]
    trainer.train_epoch()
    assert inputs == [(1, 3, 128, 128)] * 2
    assert trainer.clock.split().images == 8


def test_state_remembers_the_first_of_equally_good_epochs():
    state = RunState()
    assert [state.finish_epoch(metrics_of(fitness)) for fitness in (0.0, 0.3, 0.3, 0.2)] == [True, True, False, False]
    assert (state.epoch, state.best_epoch, state.best_fitness) == (4, 1, pytest.approx(0.3))
    assert [state.out_of_patience(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]


def test_evaluation_leaves_the_training_as_it_was(augmented, random_states):
    """Weights, running averages, gradients, optimizer and random state."""
    trainer = build_trainer(augmented.options())
    trainer.train_epoch()

    def everything():
        return {key: value.clone() for key, value in tensors(trainer.checkpoint()).items()}

    weights, states = everything(), random_states()
    first = trainer.evaluate()
    second = trainer.evaluate()
    after = everything()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[key], after[key]) for key in weights)
    assert random_states() == states
    assert trainer.step.model.training
    assert (first.losses, first.map50_95) == (second.losses, second.map50_95)


def test_best_is_the_average_and_not_the_trained_weights(trained):
    last = load_checkpoint(trained / "weights/last.pt")
    averaged = averaged_model(last).state_dict()
    assert all(torch.equal(averaged[name], tensor) for name, tensor in last["ema"].items())
    assert not all(torch.equal(last["model"][name], tensor) for name, tensor in last["ema"].items())


def test_gradients_add_up_over_batches_and_are_clipped(tiny):
    """Two batches before a step give the sum of their gradients; no step moves along more than norm 10."""
    trainer = build_trainer(tiny.options())
    batches = list(trainer.stream.epoch(0))
    trainer.step.model.eval()  # so that a batch does not change the next one's normalisation
    waits = Schedule(hyp=trainer.hyp, epochs=1, batches_per_epoch=3, accumulation=3)(1)
    assert not waits.update

    def gradients(*listed) -> list[torch.Tensor]:
        trainer.step.optimizer.zero_grad()
        for batch in listed:
            trainer.step(batch, waits)
        return [parameter.grad.clone() for parameter in trainer.step.model.parameters()]

    one, two, both = gradients(batches[0]), gradients(batches[1]), gradients(*batches)
    for first, second, together in zip(one, two, both):
        torch.testing.assert_close(first + second, together, rtol=1e-4, atol=1e-6)
    norms = []
    trainer.step.optimizer.step = lambda: norms.append(
        torch.stack([parameter.grad.norm() for parameter in trainer.step.model.parameters()]).norm()
    )
    for parameter in trainer.step.model.parameters():
        parameter.grad.fill_(3.0)
    steps = Schedule(hyp=trainer.hyp, epochs=1, batches_per_epoch=1, accumulation=1)(0)
    trainer.step(batches[0], steps)
    assert norms[0] == pytest.approx(10, rel=1e-3)
    assert trainer.step.average.updates == 1
    assert all(parameter.grad is None for parameter in trainer.step.model.parameters())


def test_losses_of_an_epoch_are_means_over_images(augmented, monkeypatch):
    """The last batch of an epoch is smaller and counts for less."""
    trainer = build_trainer(augmented.options(batch_size=3))
    seen, honest = [], TrainStep.__call__

    def recorded(step, batch, settings):
        losses = honest(step, batch, settings)
        seen.append((len(batch.images), losses.box.item(), losses.objectness.item(), losses.classification.item()))
        return losses

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    means = trainer.train_epoch()
    assert [row[0] for row in seen] == [3, 3, 2]
    expected = [sum(row[0] * row[column] for row in seen) / 8 for column in (1, 2, 3)]
    assert [means.box, means.objectness, means.classification] == pytest.approx(expected, rel=1e-6)
    assert isinstance(means, LossMeans)


def test_frozen_options_reach_the_schedule(tiny):
    trainer = build_trainer(tiny.options(epochs=5, linear_lr=True, nominal_batch="8", patience=7))
    assert (trainer.schedule.epochs, trainer.schedule.linear, trainer.schedule.accumulation) == (5, True, 2)
    assert trainer.options.patience == 7


def test_errors_on_the_way_are_run_errors(tiny, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda self: (_ for _ in ()).throw(UserError("a plain mistake")))
    with pytest.raises(RunError, match=re.escape("a plain mistake")):
        train.run(**tiny.options())


def test_evaluation_changes_neither_model_nor_average_nor_random_state(tiny, random_states):
    trainer = build_trainer(tiny.options())
    trainer.train_epoch()
    models = trainer.step.model, trainer.step.average.model
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    modes, states = [model.training for model in models], random_states()
    trainer.evaluate()
    for model, weights in zip(models, before):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [model.training for model in models] == modes
    assert random_states() == states


def test_outputs_that_are_no_numbers_are_said_once_in_a_run(tiny, cli, monkeypatch):
    honest = DetectionModel.forward

    def broken(self, images):
        raw = honest(self, images)
        if not self.training:
            raw[0][0, 0, 0, 0, 4] = torch.nan
        return raw

    monkeypatch.setattr(DetectionModel, "forward", broken)
    code, output, _ = cli(train, *tiny.flags(epochs=2))
    assert code == 0
    assert len([line for line in output.splitlines() if line.startswith("warning: for ")]) == 1


# ---- watching -------------------------------------------------------------------------------------------------------


class Recorder(Logger):
    """Keeps what it is told."""

    def __init__(self, run):
        self.told, self.pictures, self.result, self.closings = [], [], None, []
        logged.append(self)

    def epoch(self, epoch):
        self.told.append(replace(epoch, tensors={name: one.clone() for name, one in epoch.tensors.items()}))

    def images(self, pictures, step):
        self.pictures += [(tag, step, picture) for tag, picture in pictures.items()]

    def close(self, result=None):
        self.result = result


logged: list[Recorder] = []


def test_watching_a_run_closely_shows_all_of_it_and_changes_nothing(augmented, monkeypatch):
    monkeypatch.setitem(LOGGERS, "recorder", Recorder)
    train.run(**augmented.options(name="unwatched", epochs=3))
    logged.clear()
    metrics = train.run(**augmented.options(epochs=3, tb_histograms=True, bbox_interval=2, noplots=False))
    ours, theirs = (tensors(load_checkpoint(RUNS / name / "weights/last.pt")) for name in ("unwatched", "exp"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    (recorder,) = logged
    assert [one.number for one in recorder.told] == [1, 2, 3] and recorder.result is metrics
    assert [one.results["epoch"] for one in recorder.told] == [1, 2, 3]
    last = recorder.told[-1].tensors
    weights, gradients = ({name[8:] for name in last if name.startswith(kind)} for kind in ("weights/", "gradient"))
    assert weights == {name for name, _ in DetectionModel(yaml.safe_load(augmented.cfg.read_text())).named_parameters()}
    assert {f"s/{name}" for name in weights} == gradients and all(one.isfinite().all() for one in last.values())
    seen = [(tag, step) for tag, step, _ in recorder.pictures]
    progress = [("val/labels_and_predictions", step) for step in (1, 2, 3)]
    assert sorted(seen) == sorted([("train/batch0", 0), ("train/batch1", 0), *progress])
    assert all(picture.ndim == 3 and picture.dtype == np.uint8 for _, _, picture in recorder.pictures)


def test_what_only_shows_a_run_may_fail_and_the_run_does_not(tiny, monkeypatch, capsys):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mosaics, "draw_batch", no_room)
    monkeypatch.setitem(LOGGERS, "fragile", type("Fragile", (Recorder,), {"epoch": no_room}))
    metrics = train.run(**tiny.options(epochs=2, noplots=False))
    said = capsys.readouterr().out
    assert said.count("warning: no more pictures in this run, which goes on: No space left on device") == 1
    assert said.count("warning: no more fragile in this run, which goes on: No space left on device") == 1
    assert metrics.labels and (RUNS / "exp/metrics.json").exists() and len(rows_of(RUNS / "exp")) == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_loggers_hear_of_an_end_that_is_none(augmented, monkeypatch, signum):
    monkeypatch.setitem(LOGGERS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "close", lambda self, result=None: self.closings.append(result))
    logged.clear()
    with pytest.raises(Interrupted):
        interrupt(monkeypatch, epoch=1, batch=0, signum=signum)
        train.run(**augmented.options(epochs=3))
    assert logged[0].closings == [None]


def test_what_to_type_next_works_after_an_early_stop(tiny, cli, monkeypatch):
    monkeypatch.setattr(RunState, "out_of_patience", lambda self, patience: self.epoch >= patience)
    _, said, _ = cli(train, *tiny.flags(epochs=5, patience=2))
    (advice,) = (line for line in said.splitlines() if line.startswith("  train on"))
    flags = shlex.split(advice.partition("train.py ")[2])
    assert flags == ["--resume", str(LAST), "--patience", "4"]
    code, said, errors = cli(train, *flags)
    assert code == 0 and "Epochs 3 to 4" in said, errors


def test_one_class_has_all_labels(tiny):
    train.run(**tiny.options(single_cls=True))
    about = json.loads((RUNS / "exp/about.json").read_text())
    assert about["names"] == ["item"]
    assert [about["splits"][split]["labels_of_class"] for split in ("train", "val")] == [[8], [4]]


def test_nothing_of_a_run_is_left_in_the_folder_of_the_next(tiny):
    train.run(**tiny.options(noplots=False))
    train.run(**tiny.options(exist_ok=True))
    assert not [path.name for path in (RUNS / "exp").iterdir() if path.suffix in (".png", ".jpg")]


def rows_of(folder: Path) -> list[str]:
    return (folder / "results.csv").read_text().splitlines()[1:]
