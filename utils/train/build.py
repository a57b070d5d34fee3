"""Options in, a Trainer out: one named builder per part.

Every mistake of the user is found before the run folder exists.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn

from models.norm_silu import accelerate
from models.yolo import DetectionModel, count_parameters, gflops, read_network
from utils import __version__
from utils.archive import DamagedFile
from utils.checkpoint import Checkpoint, for_inference, load_checkpoint, load_weights, save_checkpoint
from utils.config import (
    DEFAULT_EPOCHS,
    DEFAULT_IMGSZ,
    LATEST,
    SINGLE_CLASS,
    TrainOptions,
    by_flag,
    find_file,
    spelling,
    validated,
    whole_strides,
)
from utils.data import colours
from utils.data.cache import NoRoom, cached_images, remove_abandoned, summary
from utils.data.findings import ScanReport, write_findings
from utils.data.images import BaseImages, ImageSource
from utils.data.loader import EvalBatches, TrainBatches, TrainStream, part_of
from utils.data.pixels import check_transforms
from utils.data.plan import repeat_factors
from utils.data.scan import DatasetScan, open_dataset, refuse_findings, refuse_no_label, scan_dataset
from utils.data.store import content_digest, single_class
from utils.evaluate.evaluator import Evaluator, evaluated_at_once
from utils.files import from_here, new_run_folder, write_yaml
from utils.hyp import Hyperparameters, hyperparameters, plain_values, read_hyp
from utils.loss import LossGains
from utils.ranks import Ranks
from utils.report.about import ABOUT_FILE, About, SplitSummary, read_about, this_start, write_about
from utils.report.console import Console, SilentConsole
from utils.report.logger import LoggedRun
from utils.report.pictures import PictureFiles, Pictures
from utils.report.run_report import RunReport, WrittenReport
from utils.report.weights_and_biases import asked_for, check_installed, is_known, missing, run_id
from utils.run_folder import FollowedRunFolder, LateRunFolder, RunFolder, load_last, newest_checkpoint
from utils.runtime import Note, Runtime, choose_runtime, join_ranks, mendable_errors, raise_or_note, wandb_mode
from utils.stopping import Interrupted, StopRequest
from utils.structures import DatasetSpec, LabelStore, UserError
from utils.train.anchors import choose_anchors
from utils.train.batchsize import largest_batch_size
from utils.train.optim import (
    NOMINAL_BATCH,
    Schedule,
    choose_accumulation,
    make_optimizer,
    multi_scales,
    rates_of_sgd,
)
from utils.train.relaunch import Launch
from utils.train.step import TrainStep
from utils.train.trainer import RunState, Trainer
from utils.transfer import Transfer, transfer

_DEFAULT_CFG = "yolov5n.yaml"
_HIGH_LR0 = 1.0
_NAMES_SHOWN = 4  # of entries or classes, in a line on weights
_CLASSES_SHOWN = 6  # in the report on the data; `python -m utils.data.scan` shows more
# May accompany --resume
_WITH_RESUME = ("resume", "epochs", "device", "workers", "nproc", "dist_timeout", "patience", "save_every", "quiet")
# Options that hosts may differ in; data are compared by content
_OF_A_RANK = ("device", "workers", "cache_dir", "data", "local_rank")


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What new and resumed runs have found out before they are put together."""

    options: TrainOptions
    hyp: Hyperparameters
    names: tuple[str, ...]
    runtime: Runtime
    model: DetectionModel
    train: LabelStore
    val: LabelStore
    data: dict[str, str]  # by split, a digest of its images and labels
    reports: Mapping[str, ScanReport]  # by split, what the scan saw
    images: Mapping[str, ImageSource]  # of train and val
    run: RunFolder
    console: Console
    stop: StopRequest

    @property
    def made_on(self) -> str:
        """All of this machine that the last digits of a result may depend on."""
        library = "C++" if colours.prepare() else "OpenCV's"
        return f"{self.runtime.made_on}; OpenCV {cv2.__version__}, {library} colours"


def build_trainer(values: Mapping[str, Any], stop: StopRequest | None = None) -> Trainer:
    """A trainer, new or resumed, for options by name; it heeds `stop`. Raises UserError before anything is written.

    Ranks that a launcher started build theirs together: what is read from files but the data, and what is decided, is
    rank 0's. A launcher that starts them again finds the run that it began, and they go on with it.
    """
    given, stop = validated(TrainOptions, dict(values)), stop or StopRequest()
    ranks = join_ranks(dist_timeout=given.dist_timeout)
    console = Console(quiet=given.quiet) if ranks.speaks else SilentConsole()
    with _nothing_trained(given), ranks.losses_named(), ranks.end_told():
        ranks.check_alike(partial(by_flag, given, but=_OF_A_RANK))
        launch = Launch.of(ranks, given)
        begun = ranks.from_first(launch.begun) if given.resume is None else None
        if begun is not None and begun.saved:
            console.note(f"going on with {begun.path}, which this launch began")
            launch.note_in(_run_folder(begun.path, given, ranks))
            kept = {name: value for name, value in values.items() if name in _WITH_RESUME}
            return _resumed({**kept, "resume": str(begun.last)}, ranks, console, stop, relaunched=True)
        if given.resume is not None:
            return _resumed(values, ranks, console, stop, relaunched=launch.again)
        return _new(given, ranks, console, stop, launch=launch, begun=begun)


@contextmanager
def _nothing_trained(given: TrainOptions) -> Iterator[None]:
    try:
        yield
    except Interrupted as interrupted:
        does = "starts anew" if given.resume is None else "goes on from the same checkpoint"
        raise Interrupted(interrupted.signum, f"nothing was trained yet: the same command {does}") from None


def _new(
    given: TrainOptions,
    ranks: Ranks,
    console: Console,
    stop: StopRequest,
    *,
    launch: Launch,
    begun: RunFolder | None,
) -> Trainer:
    """`begun`: the folder of a run that this launch began and never saved."""
    hyp = ranks.from_first(partial(_hyperparameters, given))
    ranks.from_first(lambda: check_installed(given, wandb_mode()))
    parts, scan, lines = _parts_of_new(given, hyp, ranks, console, stop)
    run = _new_run(parts.options, ranks, console, begun)
    run.take_over()
    launch.note_in(run)
    run.put("hyp.yaml", partial(write_yaml, content=plain_values(hyp)))
    if scan.count:
        run.put("scan.csv", partial(write_findings, reports=scan.reports.values()))
        lines.append(f"All findings in the data: {run.path / 'scan.csv'}")
    for line in lines:
        console.line(line)
    return _assemble(replace(parts, run=run), RunState())


def build_trial(values: Mapping[str, Any], hyp: Mapping[str, Any], *, console: Console) -> Trainer:
    """A trainer for `Trainer.try_out`, with hyperparameters by name in place of those that `values` would name.

    It writes nothing, and knows nothing of ranks. Raises UserError as `build_trainer` does.
    """
    named = {"hyp": "these hyperparameters", "resume": None, "save_every": 0, "noplots": True}
    given = validated(TrainOptions, {**values, **named})
    trial = _checked_hyperparameters(hyperparameters(dict(hyp), source=given.hyp), given)
    parts, _, lines = _parts_of_new(given, trial, Ranks(), console, StopRequest())
    for line in lines:
        console.line(line)
    trainer = _assemble(parts, RunState(), silent=True)
    trainer.save_first = False
    return trainer


def _parts_of_new(
    given: TrainOptions, hyp: Hyperparameters, ranks: Ranks, console: Console, stop: StopRequest
) -> tuple[_Parts, DatasetScan, list[str]]:
    """All but the folder of a new run, which is for the caller to make, and then to say these lines."""
    spec = ranks.host_first(lambda: open_dataset(given.data, note=console.note, bar=console.download_bar))
    names = _names(given, spec)
    runtime = ranks.each(lambda: _runtime(given, ranks))
    if given.sync_bn:
        ranks.each(runtime.check_synchronises)
    for line in _advice(given, hyp, names, runtime):
        console.note(line)
    model, lines = _model(given, hyp, names, ranks, note=console.note)
    ranks.host_first(lambda: _accelerated(model, runtime))
    scan = ranks.host_first(lambda: _scan(given, spec, console))
    train, val = _stores(given, scan)
    if hyp.copy_paste and not len(train.points):
        console.note(f"{given.hyp}: 'copy_paste: {hyp.copy_paste:g}' does nothing: no label of 'train' is a polygon")
    resolved = ranks.each(lambda: _resolved(given, spec, model, console))
    batch_size = ranks.from_first(
        lambda: _batch_size(resolved, hyp, model, runtime, train=train, val=val, console=console)
    )
    options = replace(resolved, batch_size=batch_size)
    images = ranks.host_first(lambda: _images(options, spec, stop, train=train, val=val, console=console))
    lines += _choose_anchors(model, options, hyp, train, ranks) + _repeated(options, names, train)
    data = _digests(train, val)
    ranks.check_alike(partial(_work, options, names, runtime, data))
    parts = _Parts(
        options=options,
        hyp=hyp,
        names=names,
        runtime=runtime,
        model=model,
        train=train,
        val=val,
        data=data,
        reports=scan.reports,
        images=images,
        run=FollowedRunFolder(Path()),
        console=console,
        stop=stop,
    )
    return parts, scan, lines


def _new_run(options: TrainOptions, ranks: Ranks, console: Console, begun: RunFolder | None) -> RunFolder:
    """The folder of a new run, held by this process; where this launch has `begun` one and never saved it, the same."""

    def made() -> Path:
        path = begun.path if begun else None
        return path or new_run_folder(Path(options.project), options.name, exist_ok=options.exist_ok)

    run = _run_folder(ranks.from_first(made), options, ranks)
    ranks.from_first(run.hold)
    if run.last.exists() and not run.finished:
        console.note(f"--exist-ok: {run.path} held a run that was not finished; its checkpoints are gone")
    return run


def _resumed(
    values: Mapping[str, Any], ranks: Ranks, console: Console, stop: StopRequest, *, relaunched: bool
) -> Trainer:
    """`relaunched`: by a launcher that began the run, or went on with it, and may not have heard of its end."""
    ranks.each(partial(_refuse_changes, values))
    path, source, checkpoint = ranks.from_first(partial(_saved_run, str(values["resume"]), console))
    changed = {name: values[name] for name in values if name != "resume" and values[name] is not None}
    options = validated(TrainOptions, {**checkpoint["options"], **changed})
    hyp = hyperparameters(checkpoint["hyp"], source=str(path))
    ranks.each(partial(check_transforms, hyp.albumentations, source=str(path)))
    run = _run_folder(ranks.from_first(partial(_folder_of, path, checkpoint)), options, ranks, saved=True)
    if not relaunched:
        ranks.from_first(partial(_refuse_finished, path, checkpoint, run, options))
    spec = ranks.host_first(lambda: open_dataset(options.data, note=console.note, bar=console.download_bar))
    names = _names(options, spec)
    if list(names) != checkpoint["names"]:
        raise ranks.of_all(UserError(f"--resume {path}: the classes of {spec.source} are no longer those of the run"))
    # another machine may lack what the run had, and the run goes on
    runtime = ranks.each(lambda: _runtime(options, ranks, note=console.note))
    if options.sync_bn and not runtime.synchronises:
        console.note("--sync-bn: there are no batch norms over all ranks here; going on without")
    model = DetectionModel(checkpoint["network"], seed=options.seed)
    model.freeze(options.freeze)
    runtime = _accelerated(model, runtime, note=console.note)
    scan = ranks.host_first(lambda: _scan(options, spec, console))
    train, val = _stores(options, scan)
    data = _digests(train, val)
    ranks.check_alike(partial(_work, options, names, runtime, data))
    images = ranks.host_first(
        lambda: _images(options, spec, stop, train=train, val=val, console=console, note=console.note)
    )
    parts = _Parts(
        options=options,
        hyp=hyp,
        names=names,
        runtime=runtime,
        model=model,
        train=train,
        val=val,
        data=data,
        reports=scan.reports,
        images=images,
        run=run,
        console=console,
        stop=stop,
    )
    return _continued(parts, path, source, checkpoint)


def _refuse_changes(values: Mapping[str, Any]) -> None:
    """Raises UserError for what cannot accompany --resume."""
    refused = sorted(name for name in values if name not in _WITH_RESUME and values[name] is not None)
    if refused:
        allowed = ", ".join(spelling(name) for name in _WITH_RESUME[1:])
        raise UserError(f"--resume continues a run as it was; {spelling(refused[0])} cannot change, only {allowed}")


def _continued(parts: _Parts, path: Path, source: Path, checkpoint: Checkpoint) -> Trainer:
    """The trainer that goes on from a checkpoint: that of the last.pt at `path`, read from `source`."""
    options, run, console = parts.options, parts.run, parts.console
    for line in _what_differs(checkpoint, parts):
        console.note(line)
    if checkpoint["data"]["train"] != parts.data["train"]:
        checkpoint["batch"] = 0  # the epoch under way is another one now
    run.take_over(source)
    checkpoint |= parts.runtime.ranks.from_first(partial(_mended_best, run, checkpoint, console))
    state = RunState.of(checkpoint)
    within = f" and batch {state.batch} of the next" if state.batch else ""
    console.line(f"Resuming {path} after epoch {state.epoch} of {options.epochs}{within}")
    trainer = _assemble(parts, state, accumulation=checkpoint["accumulation"])
    trainer.load_state_dict(checkpoint)
    trainer.save_first = asdict(options) != checkpoint["options"]
    return trainer


def _saved_run(given: str, console: Console) -> tuple[Path, Path, Checkpoint]:
    """The last.pt that `--resume` means, the file that stands for it, and what that holds. Its folder is held now."""
    path = newest_checkpoint(Path("runs")) if given == LATEST else Path(given)
    if path.is_dir():
        if (path / "evolve.csv").exists():
            raise UserError(f"--resume {path}: is a sweep; add --evolve N, the number of its trials")
        path = RunFolder(path).last
    _hold_run_of(path)
    checkpoint, source = load_last(path, console.warn)
    return path, source, checkpoint


def _mended_best(run: RunFolder, checkpoint: Checkpoint, console: Console) -> dict[str, Any]:
    """Where best.pt is damaged or lost, let the averaged weights of the run stand in until the next evaluation.

    What the run is to know of it.
    """
    if checkpoint["best_epoch"] < 0:
        return {}
    try:
        load_checkpoint(run.best)
    except DamagedFile as error:
        console.warn(f"{error}; the weights of last.pt take its place, until the next epoch is evaluated")
        changed = {"best_fitness": -1.0, "best_epoch": checkpoint["epoch"] - 1}
        save_checkpoint(run.best, for_inference({**checkpoint, **changed}))
        return changed
    return {}


def _what_differs(checkpoint: Checkpoint, parts: _Parts) -> list[str]:
    """Lines on what is no longer as it was when the run was saved."""
    lines = []
    before, now = (checkpoint["made_on"], checkpoint["torch"]), (parts.made_on, str(torch.__version__))
    if before != now:
        ours, theirs = (f"{device}, torch {version}" for device, version in (now, before))
        lines.append(
            f"the run was saved on {theirs}; this is {ours}: it goes on, and figures may differ in their last digits "
            "from those it would have had there"
        )
    if (epochs := parts.options.epochs) != (planned := checkpoint["options"]["epochs"]):
        lines.append(f"--epochs {epochs} after {planned}: from here on, rates are those of a run of {epochs} epochs")
    if checkpoint["project"] != __version__:
        lines.append(f"the run was saved by version {checkpoint['project']} of this trainer, this is {__version__}")
    for split, digest in parts.data.items():
        if checkpoint["data"][split] != digest:
            anew = "; the epoch under way is begun anew" if split == "train" and checkpoint["batch"] else ""
            lines.append(f"images or labels of '{split}' are no longer those of the run so far{anew}")
    return lines


def _run_folder(path: Path, options: TrainOptions, ranks: Ranks, *, saved: bool = False) -> RunFolder:
    if not ranks.speaks:
        return FollowedRunFolder(path, saved)
    return LateRunFolder(path, saved) if options.nosave else RunFolder(path, saved)


def _hold_run_of(path: Path) -> None:
    """Raises UserError where another process is at work in the run of a last.pt."""
    folder = from_here(path.resolve().parent.parent)
    if path.parent.is_dir():
        RunFolder(folder).hold()


def _folder_of(path: Path, checkpoint: Checkpoint) -> Path:
    """The folder that a last.pt continues to fill. Raises UserError for a file that is not in its place."""
    run = RunFolder(from_here(path.resolve().parent.parent))
    if "optimizer" not in checkpoint:
        raise UserError(
            f"--resume {path}: holds weights alone; continue from last.pt, or start anew with --weights {path}"
        )
    if path.resolve() != run.last.resolve():
        raise UserError(f"--resume {path}: a run continues in its folder, so the file should be RUN/weights/last.pt")
    return run.path


def _refuse_finished(path: Path, checkpoint: Checkpoint, run: RunFolder, options: TrainOptions) -> None:
    """Raises UserError when there is nothing left to do."""
    state = RunState.of(checkpoint)
    if state.best_epoch < 0 and state.epoch >= options.epochs:  # with --noval, and --epochs lowered
        raise UserError(f"--resume {path}: {state.epoch} epochs are done and none was evaluated; raise --epochs")
    if run.finished and state.epoch >= options.epochs:
        raise UserError(f"--resume {path}: all {state.epoch} epochs are done; extend the run with --epochs")
    if run.finished and state.out_of_patience(options.patience):
        raise UserError(
            f"--resume {path}: stopped after epoch {state.epoch}, {options.patience} epochs without improvement; "
            "extend the run with --patience"
        )


# ---- parts --------------------------------------------------------------------------------------------------------


def _hyperparameters(options: TrainOptions) -> Hyperparameters:
    return _checked_hyperparameters(read_hyp(find_file(options.hyp, "data/hyps")), options)


def _checked_hyperparameters(hyp: Hyperparameters, options: TrainOptions) -> Hyperparameters:
    """Raises UserError for what does not go with these options."""
    if hyp.albumentations and options.paint == "device":
        raise UserError(f"--paint device: knows no 'albumentations', which {options.hyp} asks for; use --paint loader")
    check_transforms(hyp.albumentations, source=options.hyp)
    if options.optimizer != "SGD" and max(hyp.momentum, hyp.warmup_momentum) >= 1:
        raise UserError(f"{options.hyp}: 'momentum' and 'warmup_momentum' should be below 1 for {options.optimizer}")
    if hyp.anchors is not None and options.noautoanchor:
        raise UserError("--noautoanchor keeps the network's anchors, but the hyp file asks for new ones with 'anchors'")
    return hyp


def _names(options: TrainOptions, spec: DatasetSpec) -> tuple[str, ...]:
    return SINGLE_CLASS if options.single_cls else spec.names


def _runtime(options: TrainOptions, ranks: Ranks, *, note: Note | None = None) -> Runtime:
    return choose_runtime(
        ranks=ranks,
        device=options.device,
        amp=options.amp,
        workers=options.workers,
        compile=options.compile,
        deterministic=options.deterministic,
        fixed_shapes=not (options.rect or options.multi_scale),
        note=note,
    )


def _accelerated(model: DetectionModel, runtime: Runtime, *, note: Note | None = None) -> Runtime:
    """Give the model what `runtime` has for it; the runtime that came of it. See `choose_runtime` for `note`."""
    if not runtime.uses_library:
        return runtime
    try:
        accelerate(model)
    except UserError as refusal:
        raise_or_note(refusal, note, "without it")
        return replace(runtime, compile=False)
    return runtime


def _advice(options: TrainOptions, hyp: Hyperparameters, names: tuple[str, ...], runtime: Runtime) -> list[str]:
    """Lines on options of a new run that do less, or other, than one may expect."""
    lines = [rates_of_sgd(options.optimizer, hyp)]
    if hyp.lr0 > _HIGH_LR0:
        lines.append(f"{options.hyp}: 'lr0: {hyp.lr0:g}' is far above what networks learn with, some 0.01")
    if options.rect and hyp.mosaic > 0:
        lines.append(f"--rect: no mosaics, though the hyp file has 'mosaic: {hyp.mosaic:g}'")
    if options.freeze not in ((), (0,)) and not options.weights:
        lines.append("--freeze without --weights: the frozen layers keep random weights")
    if options.label_smoothing and len(names) == 1:
        lines.append("--label-smoothing: with one class there is no class loss to smooth")
    if runtime.compiles_network and (options.multi_scale or options.rect):
        flag = "--multi-scale" if options.multi_scale else "--rect"
        lines.append(f"--compile with {flag}: each new shape may be compiled anew, which takes minutes")
    if runtime.unused and runtime.ranks.alone:
        there = runtime.unused + 1
        lines.append(f"one of the {there} GPUs here is used; --nproc {there} trains on all of them")
    if runtime.devices:
        lines.append(f"DataParallel on {len(runtime.devices)} GPUs; --nproc {len(runtime.devices)} is faster")
    if options.paint == "device" and runtime.device.type == "cpu":
        lines.append("--paint device: on the CPU, --paint loader is many times faster")
    return [line for line in lines if line]


def _model(
    options: TrainOptions, hyp: Hyperparameters, names: tuple[str, ...], ranks: Ranks, *, note: Note
) -> tuple[DetectionModel, list[str]]:
    """The network with the weights to start from, and lines on these for the user."""
    network, checkpoint = ranks.from_first(partial(_network, options))
    return ranks.each(partial(_started_model, options, hyp, names, network, checkpoint, note))


def _network(options: TrainOptions) -> tuple[dict[str, Any], Checkpoint | None]:
    """The description of the network, and the weights to start from."""
    checkpoint = load_weights(Path(options.weights)) if options.weights else None
    cfg = str(find_file(options.cfg or _DEFAULT_CFG, "models"))
    return checkpoint["network"] if checkpoint and not options.cfg else read_network(cfg), checkpoint


def _started_model(
    options: TrainOptions,
    hyp: Hyperparameters,
    names: tuple[str, ...],
    network: dict[str, Any],
    checkpoint: Checkpoint | None,
    note: Note,
) -> tuple[DetectionModel, list[str]]:
    anchors = _placeholder_anchors(network, round(hyp.anchors)) if hyp.anchors is not None else None
    model = DetectionModel(network, num_classes=len(names), anchors=anchors, seed=options.seed)
    model.freeze(options.freeze)
    if checkpoint is None:
        return model, []
    taken = transfer(model, checkpoint["ema"], learned=checkpoint["names"], names=names)
    _refuse_strangers(options, taken)
    if _can_go_on(Path(options.weights), checkpoint):
        note(
            f"--weights {options.weights} starts anew from the weights of a run that is not finished; "
            f"--resume {shlex.quote(options.weights)} continues it"
        )
    return model, _transferred(options, taken)


def _refuse_strangers(options: TrainOptions, taken: Transfer) -> None:
    """Raise UserError where a network took nothing of the weights."""
    if not taken.whole and not taken.by_class:
        raise UserError(
            f"--weights {options.weights}: not one of its entries fits {options.cfg}, where {taken.left_out[0]} has "
            "another shape or name; leave out --cfg to train the network of the weights, or leave out --weights"
        )


def _transferred(options: TrainOptions, taken: Transfer) -> list[str]:
    """What the user is told about the weights to start from."""
    lines = [f"Weights: {len(taken.whole)} of {taken.total} entries of {options.weights} fit this network"]
    if taken.by_class:
        classes = f"the rows of {_few(taken.classes)}" if taken.classes else "no class of the same name"
        lines.append(f"Weights: {len(taken.by_class)} entries of the head by class: boxes, objectness and {classes}")
    if taken.left_out:
        lines.append(f"Weights: left as they start: {_few(taken.left_out)}")
    if taken.unused:
        lines.append(f"Weights: not used: {_few(taken.unused)}")
    return lines


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _can_go_on(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is that of a run which `--resume` would continue."""
    run = RunFolder(path.absolute().parent.parent)
    return path.absolute() == run.last and not run.finished and "optimizer" in checkpoint


def _placeholder_anchors(network: dict[str, Any], per_level: int) -> torch.Tensor:
    """(L, per_level, 2) px for a head of another width, until autoanchor has found real ones."""
    first = torch.tensor(network["anchors"], dtype=torch.float32)[:, :2]  # (L, 2)
    return first[:, None].repeat(1, per_level, 1)


def _scan(options: TrainOptions, spec: DatasetSpec, console: Console) -> DatasetScan:
    """The data looked at and its report shown. Raises UserError where there is nothing to train on."""
    scan = scan_dataset(spec, ("train", "val"), progress=console.bar, cache_dir=options.cache_dir)
    for line in scan.lines(most_classes=_CLASSES_SHOWN):
        console.line(line)
    refuse_no_label(scan)
    if options.strict:
        refuse_findings(scan)
    if not (scan.stores["val"].ignore == 0).any():
        console.warn("no usable label for 'val': metrics will be 0, so best.pt is simply the last epoch")
    return scan


def _stores(options: TrainOptions, scan: DatasetScan) -> tuple[LabelStore, LabelStore]:
    train, val = scan.stores["train"], scan.stores["val"]
    return (single_class(train), single_class(val)) if options.single_cls else (train, val)


def _resolved(options: TrainOptions, spec: DatasetSpec, model: DetectionModel, console: Console) -> TrainOptions:
    """The options with what is `automatic` in them replaced by what it means for this run; all but the batch size."""
    return replace(
        options,
        data=str(spec.source),
        epochs=options.epochs or spec.epochs or DEFAULT_EPOCHS,
        imgsz=whole_strides(options.imgsz or spec.imgsz or DEFAULT_IMGSZ, max(model.head.strides), note=console.note),
    )


def _batch_size(
    options: TrainOptions,
    hyp: Hyperparameters,
    model: DetectionModel,
    runtime: Runtime,
    *,
    train: LabelStore,
    val: LabelStore,
    console: Console,
) -> int:
    """What the run works with."""
    step, ranks = 4 if options.quad else 1, runtime.ranks.count
    batch_size, most = options.batch_size, len(train) // step * step
    if not most:
        raise UserError(f"--quad takes images by four, and there are {len(train)} to train on")
    if most < ranks * step:
        raise UserError(f"{ranks} ranks, and only {len(train)} images to train on; start fewer ranks")
    if batch_size == -1:
        batch_size = ranks * largest_batch_size(
            model=model,
            hyp=hyp,
            options=options,
            train=train,
            val=val,
            runtime=runtime,
            limit=most // ranks // step * step,
            step=step,
            note=console.note,
        )
    if batch_size < ranks * step:
        raise UserError(
            f"--batch-size {batch_size}: is for all {ranks} ranks together, of which each has a part; make it "
            f"{ranks * step} or more, or start fewer ranks"
        )
    if batch_size > most:
        console.note(f"--batch-size {batch_size} is larger than the {len(train)} training images: using {most}")
    return min(batch_size, most)


def _images(
    options: TrainOptions,
    spec: DatasetSpec,
    stop: StopRequest,
    *,
    train: LabelStore,
    val: LabelStore,
    console: Console,
    note: Note | None = None,
) -> Mapping[str, ImageSource]:
    """Where the images of each split come from. Where a cache has no room, see `choose_runtime` for `note`."""
    files = {
        "train": BaseImages(store=train, imgsz=options.imgsz),
        "val": BaseImages(store=val, imgsz=options.imgsz, area=True),
    }
    if options.cache is None:
        remove_abandoned()
        return files
    try:
        caches = cached_images(
            files, options.cache, spec=spec, cache_dir=options.cache_dir, progress=console.bar, note=console.note
        )
    except NoRoom as refusal:
        raise_or_note(refusal, note, "without it")
        return files
    for cache in caches.values():
        stop.before_leaving(cache.release)
    console.line(summary(options.cache, caches))
    return caches


def _choose_anchors(
    model: DetectionModel, options: TrainOptions, hyp: Hyperparameters, store: LabelStore, ranks: Ranks
) -> list[str]:
    """Give the model anchors that reach the labels; a line for the user."""
    if options.noautoanchor:
        return []
    choice = ranks.from_first(
        lambda: choose_anchors(
            model.head.anchors.numpy(),
            store,
            imgsz=options.imgsz,
            anchor_t=hyp.anchor_t,
            seed=options.seed,
            force=hyp.anchors is not None,
        )
    )
    verdict = f"Anchors reach {choice.recall_before:.1%} of the labels"
    if choice.changed:
        model.set_anchors(torch.from_numpy(choice.anchors))
        verdict += f"; new ones, found by k-means and evolution, reach {choice.recall_after:.1%}"
    return [verdict]


def _repeated(options: TrainOptions, names: tuple[str, ...], store: LabelStore) -> list[str]:
    """A line for the user on what --repeat-factor does to this data set."""
    if not options.repeat_factor:
        return []
    factors = repeat_factors(store, len(names), options.repeat_factor)
    more = int((factors > 1).sum())
    if not more:
        return [f"--repeat-factor {options.repeat_factor:g}: no class is in less than this share of the images"]
    return [
        f"--repeat-factor {options.repeat_factor:g}: {more:,} of {len(store):,} images are shown more often than the "
        f"others, up to {factors.max():.1f} times as often; an epoch stays as long"
    ]


def _assemble(parts: _Parts, state: RunState, *, accumulation: int | None = None, silent: bool = False) -> Trainer:
    """`silent`: nobody is told of the run."""
    options, runtime = parts.options, parts.runtime
    with mendable_errors(batch_size=options.batch_size, imgsz=options.imgsz):
        model = parts.model.to(runtime.device, memory_format=torch.channels_last)
    if options.sync_bn and runtime.synchronises:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    parts.run.put("opt.yaml", partial(write_yaml, content=asdict(options)))
    batches = _batches(parts)
    schedule = _schedule(parts, batches.per_epoch, accumulation=accumulation, lr_scale=state.lr_scale)
    return Trainer(
        options=options,
        hyp=parts.hyp,
        names=parts.names,
        runtime=runtime,
        step=_step(parts, model, schedule),
        schedule=schedule,
        stream=TrainStream(
            batches,
            end_epoch=options.epochs,
            workers=runtime.workers,
            pin_memory=runtime.pin_memory,
            sharers=runtime.ranks.local_count,
            image_weights=options.image_weights,
            repeat_factor=options.repeat_factor,
            num_classes=len(parts.names),
        ),
        evaluator=_evaluator(parts),
        run=parts.run,
        report=RunReport(parts.run.path) if silent else _report(parts, schedule, start=(state.epoch, state.batch)),
        state=state,
        data=parts.data,
        made_on=parts.made_on,
        stop=parts.stop,
    )


def _batches(parts: _Parts) -> TrainBatches:
    options = parts.options
    colours.prepare()
    return TrainBatches(
        store=parts.train,
        images=parts.images["train"],
        imgsz=options.imgsz,
        batch_size=options.batch_size,
        hyp=parts.hyp,
        seed=options.seed,
        rect=options.rect,
        quad=options.quad,
        stride=max(parts.model.head.strides),
        epochs=options.epochs,
        unpainted=options.paint == "device",
        rank=parts.runtime.ranks.rank,
        ranks=parts.runtime.ranks.count,
    )


def _digests(train: LabelStore, val: LabelStore) -> dict[str, str]:
    """Of the images and labels of each split."""
    return {"train": content_digest(train), "val": content_digest(val)}


def _work(
    options: TrainOptions, names: tuple[str, ...], runtime: Runtime, data: Mapping[str, str]
) -> dict[str, object]:
    """What must be the same on all ranks, hosts with their own files and devices included."""
    return {
        **by_flag(options, but=_OF_A_RANK),
        "classes": ", ".join(names),
        "precision": f"{runtime.amp_dtype or 'fp32'} on {runtime.device.type}{', compiled' * runtime.compile}",
        **{f"images or labels of '{split}'": digest for split, digest in data.items()},
    }


def _ranks_table(parts: _Parts) -> list[str]:
    """Lines on who does what, where there are several."""
    runtime, images = parts.runtime, parts.options.batch_size
    ranks, each = runtime.ranks, 4 if parts.options.quad else 1
    rows = ranks.gather((ranks.host, runtime.device_description))
    if ranks.alone:
        return []
    parts_of_it = [each * len(part_of(images // each, rank, ranks.count)) for rank in range(ranks.count)]
    width = max(4, *(len(host) for host, _ in rows)) + 2
    wide = max(6, *(len(device) for _, device in rows)) + 2
    lines = [f"{'Rank':>6}  {'Host':<{width}}{'Device':<{wide}}{'Images':>6}"]
    for rank, ((host, device), own) in enumerate(zip(rows, parts_of_it)):
        lines.append(f"{rank:>6}  {host:<{width}}{device:<{wide}}{own:>6}")
    if len(set(parts_of_it)) > 1:
        lines.append(f"--batch-size {images} is no multiple of {ranks.count}: the parts differ, the result does not")
    return lines


def _schedule(parts: _Parts, per_epoch: int, *, accumulation: int | None, lr_scale: float) -> Schedule:
    """The schedule of so many batches per epoch; without `accumulation` one is chosen."""
    options, stride = parts.options, max(parts.model.head.strides)
    chosen = accumulation or choose_accumulation(
        options.nominal_batch, batch_size=options.batch_size, batches_per_epoch=per_epoch, epochs=options.epochs
    )
    return Schedule(
        hyp=parts.hyp,
        epochs=options.epochs,
        batches_per_epoch=per_epoch,
        accumulation=chosen,
        linear=options.linear_lr,
        seed=options.seed,
        lr_scale=lr_scale,
        scales=multi_scales(options.imgsz, stride) if options.multi_scale else (1.0,),
    )


def _step(parts: _Parts, model: DetectionModel, schedule: Schedule) -> TrainStep:
    """The step that trains `model`, which lies on its device already: the optimizer holds its very tensors."""
    options, hyp = parts.options, parts.hyp
    weight_decay = _weight_decay(options, hyp, schedule.accumulation)
    smoothing = options.label_smoothing
    return TrainStep(
        runtime=parts.runtime,
        model=model,
        optimizer=make_optimizer(model, hyp, weight_decay=weight_decay, kind=options.optimizer),
        gains=LossGains.for_head(hyp, model.head, options.imgsz, label_smoothing=smoothing, quad=options.quad),
    )


def _weight_decay(options: TrainOptions, hyp: Hyperparameters, accumulation: int) -> float:
    """Scaled by the images of an update over the nominal batch, where whole batches do not make it up exactly."""
    per_update = options.batch_size * accumulation
    if options.nominal_batch != "auto":
        nominal = int(options.nominal_batch)
    else:  # one that was lowered is lowered to what an update holds
        lowered = accumulation < round(NOMINAL_BATCH / options.batch_size)
        nominal = per_update if lowered else NOMINAL_BATCH
    return hyp.weight_decay * per_update / nominal


def _evaluator(parts: _Parts) -> Evaluator:
    options, stride = parts.options, max(parts.model.head.strides)
    return Evaluator(
        batches=EvalBatches(
            store=parts.val,
            images=parts.images["val"],
            imgsz=options.imgsz,
            batch_size=evaluated_at_once(options.batch_size),
            stride=stride,
        ),
        names=parts.names,
        runtime=replace(parts.runtime, amp_dtype=None),  # a figure must not depend on the precision of training
    )


def _report(parts: _Parts, schedule: Schedule, *, start: tuple[int, int]) -> RunReport:
    """The reporter, after its first lines: what is trained, on what, and where to."""
    table = _ranks_table(parts)
    if not parts.runtime.ranks.speaks:
        return RunReport(parts.run.path)
    options, model, folder = parts.options, parts.model, parts.run.path
    network = f"Network of {options.weights}" if options.weights and not options.cfg else options.cfg or _DEFAULT_CFG
    per_update = options.batch_size * schedule.accumulation
    parts.console.line(
        f"{network}: {count_parameters(model):,} parameters, {gflops(model, options.imgsz):.1f} GFLOPs at "
        f"{options.imgsz}; batches of {options.batch_size}, {per_update} images per update"
    )
    parts.console.line(f"{parts.runtime.description}; writing to {folder}")
    for line in table:
        parts.console.line(line)
    if parts.hyp.close_mosaic and parts.hyp.mosaic and not options.rect:
        first = max(math.ceil(options.epochs - parts.hyp.close_mosaic), 0) + 1
        parts.console.line(f"No mosaics from epoch {first} of {options.epochs} on (close_mosaic)")
    files = PictureFiles(folder, parts.names, val=parts.val, train=parts.train)
    return WrittenReport(
        LoggedRun(
            folder=folder,
            options=options,
            hyp=parts.hyp,
            about=_about(parts, network, start_epoch=start[0]),
            model=model,
            start_epoch=start[0],
            note=parts.console.note,
            wandb_id=_wandb_id(parts),
        ),
        console=parts.console,
        pictures=Pictures() if options.noplots else files,
        train=parts.train,
        start_batch=start[1],
    )


def _wandb_id(parts: _Parts) -> str | None:
    """Of the run in Weights & Biases, if somebody asks for that; a note where it is not installed."""
    mode, folder, note = wandb_mode(), parts.run.path, parts.console.note
    if line := missing(parts.options, mode):
        note(line)
        return None
    if not asked_for(parts.options, mode):
        if parts.run.saved and is_known(folder) and mode != "disabled":
            note("this run is in Weights & Biases so far; with WANDB_MODE=online, or offline, it would go on there")
        return None
    offline = f"offline; `wandb sync {folder}/wandb/offline-run-*` sends it later"
    note(f"Weights & Biases: {offline if mode in ('offline', 'dryrun') else 'online'}")
    return run_id(folder, resumed=parts.run.saved)


def _about(parts: _Parts, network: str, *, start_epoch: int) -> About:
    """What is written of the run for those who look at it later."""
    options, model, runtime = parts.options, parts.model, parts.runtime
    about = About(
        network=network,
        parameters=count_parameters(model),
        gflops=gflops(model, options.imgsz),
        data=options.data,
        names=parts.names,
        splits={
            split: SplitSummary.of(report, single_class=options.single_cls) for split, report in parts.reports.items()
        },
        starts=(this_start(first_epoch=start_epoch + 1, device=runtime.description, ranks=runtime.ranks.count),),
    )
    about = about.after(read_about(parts.run.path) if parts.run.saved else None)
    parts.run.put(ABOUT_FILE, partial(write_about, content=about))
    return about
