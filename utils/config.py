"""Options and data set descriptions: argv, keyword arguments and YAML in, validated values out.

Never imports torch, so that `--help` is instant. A flag is a field here; its type, choices and help stand beside it.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import types
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.files import nearest_name, printable, read_yaml
from utils.launch import Place, join, launch, place_if_any, record, said_once, starts_ranks, tells_of_signals
from utils.stopping import Interrupted, signals_raised
from utils.structures import DatasetSpec, Download, RunError, UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
_USERS_OS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
SINGLE_CLASS = ("item",)  # the names under --single-cls
LARGEST_IMGSZ = 16_384  # px; the system kills a process that tries what nobody means
DEFAULT_EPOCHS, DEFAULT_IMGSZ = 300, 640  # where neither the user nor the data set says otherwise
LATEST = "latest"  # what `--resume` without a path means

Amp = Literal["auto", "bf16", "fp16", "off"]
OptimizerName = Literal["SGD", "Adam", "AdamW"]
CacheKind = Literal["ram", "disk"]
Painter = Literal["loader", "device"]
Task = Literal["train", "val", "test", "speed"]
Sampler = Literal["classic", "genetic", "tpe", "cmaes", "gp", "random"]
Parents = Literal["single", "weighted"]
Pruner = Literal["asha", "hyperband", "median", "none"]


def _flag(
    default: Any,
    meaning: str,
    *,
    also: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    bare: Any = None,
) -> Any:
    """A field that is a flag: `also` are further spellings, `low` and `high` limits, `bare` what a flag alone says."""
    return field(
        default=default, metadata={"meaning": meaning, "also": tuple(also), "low": low, "high": high, "bare": bare}
    )


# Of programs that run as several processes
_NPROC = "processes (ranks) on this machine, one per GPU, or sharing the cores"
_DIST_TIMEOUT = "minutes that ranks wait for one another"
_LONGEST_TIMEOUT = 525_600  # minutes, a year; torch cannot count to what nobody means

# Flags that stand for a value of another
_SHORT_FOR = {"adam": ("optimizer", "Adam"), "cache_images": ("cache", "ram"), "half": ("amp", "fp16")}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `python train.py` and `train.run`."""

    weights: str = _flag("", "start from a checkpoint: of this trainer, or a .pt of YOLOv5 v5 to v7")
    cfg: str = _flag("", "network YAML; a bare name is looked up in models/ (default: yolov5n.yaml when no --weights)")
    data: str = _flag("data/shapes.yaml", "data set YAML")
    hyp: str = _flag("data/hyps/hyp.scratch.yaml", "hyperparameter YAML")
    epochs: int | None = _flag(None, "default: what the data set YAML says, else 300", low=1)
    batch_size: int = _flag(
        16,
        "images per forward, over all ranks; -1: the largest that fits into the GPUs (elsewhere: 16)",
        also=["--batch"],
        low=-1,
    )
    nominal_batch: str = _flag("auto", "images per optimizer update; auto: 64, less for small data sets")
    imgsz: int | None = _flag(
        None,
        "network input size in px; default: what the data set YAML says, else 640",
        also=["--img", "--img-size"],
        low=1,
        high=LARGEST_IMGSZ,
    )
    project: str = _flag("runs/train", "folder that holds the runs")
    name: str = _flag("exp", "name of the run; exp2, exp3, ... when taken")
    exist_ok: bool = _flag(False, "write into an existing run folder")
    resume: str | None = _flag(None, "continue the run of this last.pt (no path: the newest in runs/)", bare=LATEST)
    rect: bool = _flag(False, "batches of images of like shape, with less padding; turns mosaic off")
    noautoanchor: bool = _flag(False, "keep the anchors of the network YAML")
    multi_scale: bool = _flag(False, "resize each batch at random, to 0.5 to 1.5 times --imgsz")
    linear_lr: bool = _flag(False, "linear decay of the learning rate in place of the one-cycle cosine")
    cos_lr: bool = _flag(False, "accepted; the one-cycle cosine is the default")
    label_smoothing: float = _flag(0.0, "class targets 1 - eps/2 and eps/2 in place of 1 and 0", low=0)
    cache: CacheKind | None = _flag(
        None, "decode each image once, and keep it in memory (ram, or no value) or in a file (disk)", bare="ram"
    )
    cache_dir: str = _flag("", "folder for caches of labels and images; default: beside the data, else ~/.cache")
    strict: bool = _flag(False, "stop at any finding in the data")
    paint: Painter = _flag(
        "loader", "where training images are painted: by loader processes, or on the GPU, which leaves these less to do"
    )
    image_weights: bool = _flag(False, "show images more often whose classes are rare or found badly")
    repeat_factor: float = _flag(
        0.0, "show images more often whose classes are in less than this share of the images, e.g. 0.01; 0: off", low=0
    )
    single_cls: bool = _flag(False, "treat all classes as one, named item")
    optimizer: OptimizerName = _flag("SGD", "Adam and AdamW want lr0 and warmup_bias_lr near 0.001 in --hyp")
    sync_bn: bool = _flag(False, "batch-norm statistics over all GPUs, where each has its rank (--nproc, torchrun)")
    workers: int = _flag(8, "loader processes, lowered to the cores there are; 0: load in this process", low=0)
    device: str = _flag("", "cpu, 0 (the first GPU), 0,1 (several), mps; default: the best there is, for each rank")
    amp: Amp = _flag("auto", "mixed precision: auto picks bf16 or fp16 where the device computes it fast")
    compile: bool = _flag(
        False,
        "faster steps: by torch.compile on a GPU, which takes minutes; by a C++ library on the CPU",
    )
    deterministic: bool = _flag(False, "on a GPU: kernels that repeat their result to the bit, where there are any")
    nosave: bool = _flag(False, "write weights only at the end of the run")
    noval: bool = _flag(False, "evaluate only the final epoch, whose weights become best.pt")
    noplots: bool = _flag(False, "draw no pictures")
    quiet: bool = _flag(False, "no progress bars")
    quad: bool = _flag(False, "make each four images one input of twice the side: side by side, or the first enlarged")
    freeze: tuple[int, ...] = _flag(
        (), "layers that keep their weights; one number: so many from the first; several: those", low=0
    )
    patience: int = _flag(100, "epochs without improvement before stopping; 0: never", low=0)
    seed: int = _flag(0, "of weights, order and augmentation", low=0)
    save_every: float = _flag(
        10.0, "minutes between checkpoints within an epoch, besides the one at its end; 0: none within", low=0
    )
    save_period: int = _flag(-1, "also keep weights/epochN.pt, every so many epochs; -1: never", low=-1)
    nproc: int = _flag(1, _NPROC, low=1)
    dist_timeout: float = _flag(10.0, _DIST_TIMEOUT, high=_LONGEST_TIMEOUT)
    evolve: int | None = _flag(
        None, "so many trials (alone: 300) that look for better hyperparameters, in runs/evolve/NAME", low=1, bare=300
    )
    evolve_sampler: Sampler = _flag("genetic", "what proposes the next hyperparameters")
    evolve_parents: Parents = _flag("single", "of the classic sampler: one of the best trials, or their weighted mean")
    evolve_genes: str = _flag(
        "", "the hyperparameters to vary, such as lr0,momentum,mosaic, or a YAML of them with bounds; default: most"
    )
    evolve_pruner: Pruner | None = _flag(
        None, "what ends bad trials early (default: asha, where there are epochs enough)"
    )
    evolve_storage: str = _flag(
        "",
        "where workers on several hosts find the study: a URL such as postgresql://user:password@host/base, or "
        "journal:FILE on a shared file system; default: a file in the folder, for one host",
    )
    evolve_confirm: int = _flag(
        3, "so many of the best, and the default, are trained again at the end on fresh seeds; 0: none", low=0
    )
    evolve_confirm_seeds: int = _flag(3, "seeds that each of these is trained with", low=1)
    evolve_confirm_epochs: int | None = _flag(
        None, "epochs that each of these is trained for; default: --epochs", low=1
    )
    evolve_grace: int = _flag(60, "seconds without a sign of life after which a trial is taken up by another", low=5)
    bucket: str = _flag(
        "", "where --evolve copies its results, and finds them again: any URL of fsspec; a bare name means gs://NAME"
    )
    tb_histograms: bool = _flag(False, "show histograms of weights and gradients in TensorBoard, an epoch each")
    entity: str = _flag(
        "", "Weights & Biases: the user or team that the run is for; any of these four asks for it (docs/loggers.md)"
    )
    upload_dataset: bool = _flag(False, "Weights & Biases: upload the images and labels as an artifact, at the end")
    bbox_interval: int = _flag(
        -1,
        "Weights & Biases, and TensorBoard: epochs between pictures of predictions; -1: up to ten times a run; 0: none",
        low=-1,
    )
    artifact_alias: str = _flag("latest", "Weights & Biases: a further name for this version of the weights")
    local_rank: int = _flag(-1, "accepted for old launchers and ignored; the environment decides")


@dataclass(frozen=True, kw_only=True)
class ValOptions:
    """Options of `python val.py`."""

    weights: str = _flag("", "checkpoint to evaluate (best.pt or last.pt of a run, or a .pt of YOLOv5)")
    data: str = _flag("", "data set YAML (default: the one the checkpoint was trained on)")
    batch_size: int = _flag(32, "images per forward", also=["--batch"], low=1)
    imgsz: int | None = _flag(
        None,
        "network input size in px; default: that of the training run",
        also=["--img", "--img-size"],
        low=1,
        high=LARGEST_IMGSZ,
    )
    conf_thres: float = _flag(0.001, "least score of a detection", low=0)
    iou_thres: float = _flag(0.6, "IoU above which NMS drops the weaker detection of a class", low=0)
    max_det: int = _flag(300, "most detections per image", low=1)
    agnostic: bool = _flag(False, "NMS drops the weaker of two overlapping detections whatever their classes")
    augment: bool = _flag(False, "detect in enlarged, reduced and mirrored images as well, and merge what is found")
    task: Task = _flag(
        "val",
        "split to evaluate; speed: how long an image of val takes (at confidence 0.25, IoU 0.45), without figures",
    )
    device: str = _flag("", "cpu, 0 (the first GPU), mps; default: the best there is")
    amp: Amp = _flag("off", "mixed precision; off gives the exact figures")
    workers: int = _flag(8, "loader processes, lowered to the cores there are; 0: load in this process", low=0)
    nproc: int = _flag(1, _NPROC, low=1)
    dist_timeout: float = _flag(10.0, _DIST_TIMEOUT, high=_LONGEST_TIMEOUT)
    cache_dir: str = _flag("", "folder for label caches; default: beside the data, else ~/.cache")
    strict: bool = _flag(False, "stop at any finding in the data")
    single_cls: bool = _flag(
        False, "treat all classes as one, those of the network too; by itself for a checkpoint trained so"
    )
    verbose: bool = _flag(False, "results per class, whatever the number of classes")
    save_json: bool = _flag(
        False,
        "write the detections as COCO results, predictions.json, and annotations.json to score them",
    )
    save_txt: bool = _flag(False, "write the detections of each image to labels/IMAGE.txt, as YOLO labels")
    save_conf: bool = _flag(False, "with --save-txt: the score at the end of each line")
    save_hybrid: bool = _flag(
        False,
        "as --save-txt, with the true boxes, and detections above 0.25 (or --conf-thres, if higher) that overlap none "
        "of them, of any class, by more than --iou-thres",
    )
    project: str = _flag("runs/val", "folder that holds the results")
    name: str = _flag("exp", "name of the results folder; exp2, exp3, ... when taken")
    exist_ok: bool = _flag(False, "write into an existing folder")
    noplots: bool = _flag(False, "draw no pictures")
    quiet: bool = _flag(False, "no progress bars")


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """Options of `python detect.py`."""

    weights: str = _flag("", "checkpoint to detect with (best.pt or last.pt of a run, or a .pt of YOLOv5)")
    source: str = _flag("", "image, video, folder, glob such as 'photos/*.jpg' (in quotes), or a .txt list of these")
    imgsz: int | None = _flag(
        None,
        "network input size in px; default: that of the training run",
        also=["--img", "--img-size"],
        low=1,
        high=LARGEST_IMGSZ,
    )
    conf_thres: float = _flag(0.25, "least score of a detection", low=0)
    iou_thres: float = _flag(0.45, "IoU above which NMS drops the weaker detection of a class", low=0)
    max_det: int = _flag(1000, "most detections per image", low=1)
    classes: tuple[int, ...] = _flag((), "only these classes, by number, from 0 in the order of their names", low=0)
    agnostic: bool = _flag(False, "NMS drops the weaker of two overlapping detections whatever their classes")
    augment: bool = _flag(False, "detect in enlarged, reduced and mirrored images as well, and merge what is found")
    batch_size: int = _flag(16, "images per forward", also=["--batch"], low=1)
    device: str = _flag("", "cpu, 0 (the first GPU), mps; default: the best there is")
    amp: Amp = _flag("off", "mixed precision; off gives the boxes of val.py")
    save_txt: bool = _flag(False, "write the detections of each image to labels/IMAGE.txt, as YOLO labels")
    save_conf: bool = _flag(False, "with --save-txt: the score at the end of each line")
    save_crop: bool = _flag(False, "write what each box holds to crops/CLASS/")
    nosave: bool = _flag(False, "draw no pictures and videos")
    line_thickness: int = _flag(0, "of boxes, in px; 0: by the size of the image", low=0)
    project: str = _flag("runs/detect", "folder that holds the results")
    name: str = _flag("exp", "name of the results folder; exp2, exp3, ... when taken")
    exist_ok: bool = _flag(False, "write into an existing folder")
    quiet: bool = _flag(False, "no progress bars")


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """Options of `python -m utils.data.scan`, which reports on a data set."""

    data: str = _flag("data/shapes.yaml", "data set YAML")
    cache_dir: str = _flag("", "folder for label caches; default: beside the data, else ~/.cache")
    strict: bool = _flag(False, "exit with code 2 at any finding in the data")
    project: str = _flag("runs/scan", "folder that holds the reports")
    name: str = _flag("exp", "name of the report's folder; exp2, exp3, ... when taken")
    exist_ok: bool = _flag(False, "write into an existing folder")
    noplots: bool = _flag(False, "draw no picture")
    quiet: bool = _flag(False, "no progress bars")


def usual_options() -> dict[str, Any]:
    """What each option of training is where neither the user nor the data set says otherwise."""
    return {**asdict(TrainOptions()), "epochs": DEFAULT_EPOCHS, "imgsz": DEFAULT_IMGSZ}


Options = TypeVar("Options", TrainOptions, ValOptions, DetectOptions, ScanOptions)


# ---- command line -------------------------------------------------------------------------------------------------


class FlagParser(argparse.ArgumentParser):
    """What it cannot parse is a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse_flags(kind: type[Options], argv: Sequence[str], *, program: str) -> dict[str, Any]:
    """The options that a command line names, by field name; defaults are left out. Raises UserError for bad usage."""
    parser = FlagParser(prog=program, description=kind.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for item, base in _typed_fields(kind):
        meaning = item.metadata["meaning"].replace("%", "%%")
        if item.default not in (None, "", False, ()):
            meaning += f" (default: {item.default})"
        spelled = [spelling(item.name), *item.metadata["also"]]
        if base is bool:
            parser.add_argument(*spelled, dest=item.name, action="store_true", help=meaning)
        elif get_origin(base) is Literal:
            bare = {} if item.metadata["bare"] is None else {"nargs": "?", "const": item.metadata["bare"]}
            parser.add_argument(*spelled, dest=item.name, choices=get_args(base), help=meaning, **bare)
        elif get_origin(base) is tuple:
            parser.add_argument(*spelled, dest=item.name, nargs="+", type=_whole, metavar="N", help=meaning)
        else:
            bare = {} if item.metadata["bare"] is None else {"nargs": "?", "const": item.metadata["bare"]}
            metavar = {int: "N", float: "X", str: "PATH" if bare else "TEXT"}[base]
            kind_of_text = _whole if base is int else base
            parser.add_argument(*spelled, dest=item.name, type=kind_of_text, metavar=metavar, help=meaning, **bare)
        for short, (_, value) in _shorts_of(item.name):
            meaning = f"the same as {spelling(item.name)} {value}"
            parser.add_argument(spelling(short), dest=short, action="store_true", help=meaning)
    values, unknown = parser.parse_known_args(_underscores_to_dashes(kind, argv))
    if unknown:
        head = unknown[0].split("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        hint = _meant(kind, unknown[0], vars(values)) or nearest_name(head, flags)
        raise UserError(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} '{unknown[0]}'{hint}")
    return vars(values)


def _meant(kind: type[Options], word: str, given: Container[str]) -> str:
    """A hint where a word that belongs to no flag tells what is missing around it."""
    if kind is not DetectOptions:
        return f"; did you mean '--data {word}'?" if word.endswith((".yaml", ".yml")) else ""
    if not os.path.exists(word):  # noqa: PTH110 (takes any text)
        return ""
    if "source" not in given:
        return f"; did you mean '--source {word}'?"
    return "; a glob such as --source 'photos/*.jpg' should be in quotes, or the shell makes many words of it"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' should be a whole number") from None


def _shorts_of(name: str) -> list[tuple[str, tuple[str, Any]]]:
    return [(short, whole) for short, whole in _SHORT_FOR.items() if whole[0] == name]


def spelling(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def by_flag(options: Options, *, but: Container[str] = ()) -> dict[str, Any]:
    """Values by the flags that people type, without those of some options."""
    return {spelling(name): value for name, value in asdict(options).items() if name not in but}


def _underscores_to_dashes(kind: type[Options], argv: Sequence[str]) -> list[str]:
    """`--batch_size 8` is as good as `--batch-size 8`, and so for further spellings."""
    names = [item.name for item in fields(kind)]
    shorts = [short for name in names for short, _ in _shorts_of(name)]
    dashed = {spelling(name) for name in names + shorts} | {s for item in fields(kind) for s in item.metadata["also"]}
    known = {"--" + spelled[2:].replace("-", "_") for spelled in dashed}
    heads = [argument.split("=", 1) for argument in argv]
    return ["=".join([spelling(head[0][2:]), *head[1:]] if head[0] in known else head) for head in heads]


def _typed_fields(kind: type[Options]) -> list[tuple[Any, Any]]:
    """(field, type without None) for each field."""
    hints = get_type_hints(kind)
    result = []
    for item in fields(kind):
        hint = hints[item.name]
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(part for part in get_args(hint) if part is not type(None))
        result.append((item, hint))
    return result


def run_command(program: str, command: Callable[[], object]) -> int:
    """Run a command line and return its exit code: 2 for wrong usage, 1 for a failure on the way, 130 for Ctrl-C.

    For other signals that ask to stop it is 128 and their number, as shells have it. A whole number that the command
    returns is its exit code.

    What a user can mend is one line on standard error; anything else is our bug and keeps its traceback. Ranks record
    both, and those that --nproc has started leave it to their launcher to show it.
    """
    here = place_if_any()
    try:
        with signals_raised():
            if here is not None:
                join(here)
            result = command()
            return result if isinstance(result, int) else 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes nowhere
        return 128 + 13  # as a program that SIGPIPE ends
    except Interrupted as interrupted:
        if tells_of_signals():
            _complain(f"\n{program}: interrupted{interrupted.by}{f'; {interrupted}' if str(interrupted) else ''}")
        return 128 + interrupted.signum
    except KeyboardInterrupt as interrupt:
        if tells_of_signals():
            _complain(f"\n{program}: interrupted{f'; {interrupt}' if str(interrupt) else ''}")
        return 130
    except Exception as error:
        code = _failed(program, here, error)
        if code is None:
            raise
        return code


def run_on_ranks(
    program: str, kind: type[TrainOptions] | type[ValOptions], work: Callable[[dict[str, Any]], object]
) -> int:
    """As `run_command`, of work that ranks may share, for the options of sys.argv by name; --nproc starts the ranks."""

    def command() -> object:
        argv = sys.argv[1:]
        with said_once():
            given = parse_flags(kind, argv, program=program)
            options = validated(kind, given)
            starts = starts_ranks(given.get("nproc"))
        return launch(program, argv, nproc=options.nproc) if starts else work(given)

    return run_command(program, command)


def _failed(program: str, here: Place | None, error: Exception) -> int | None:
    """The exit code of a command that an error has ended, once the user is told; None where its traceback is to be."""
    mendable = _mendable(error)
    code = 2 if mendable is not None and not isinstance(mendable, RunError) else 1
    if here is not None and record(mendable or error) and here.ours:
        return code
    if mendable is None:
        return None
    if not mendable.said_elsewhere:
        _complain(f"{program}: error: {mendable}")
    return code


def _mendable(error: Exception) -> UserError | None:
    """As what a user can mend, if they can."""
    if isinstance(error, OSError) and error.errno in _USERS_OS_ERRORS:
        return RunError(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
    if not isinstance(error, UserError):
        return None
    kind = RunError if isinstance(error, RunError) else UserError  # the names that a launcher knows
    plain = kind(str(error))
    plain.said_elsewhere = error.said_elsewhere
    return plain


def _complain(line: str) -> None:
    with suppress(OSError):  # the terminal is gone, and with it whoever would read this
        print(printable(line, sys.stderr), file=sys.stderr)


# ---- validation ---------------------------------------------------------------------------------------------------


def validated(kind: type[Options], values: dict[str, Any]) -> Options:
    """Options from values by name, aliases such as `batch` and `img` included. Raises UserError for a bad one."""
    aliases = {
        alias.lstrip("-").replace("-", "_"): item.name for item in fields(kind) for alias in item.metadata["also"]
    }
    typed = {item.name: (item, base) for item, base in _typed_fields(kind)}
    checked = {}
    for given_name, value in _without_shorts(values, typed).items():
        name = aliases.get(given_name, given_name)
        if name not in typed:
            raise UserError(f"unknown option '{given_name}'{nearest_name(given_name, [*typed, *aliases])}")
        item, base = typed[name]
        if value is not None:  # None stands for the default, also where a flag has no such value
            checked[name] = _checked(item, base, value)
    options = kind(**checked)
    if isinstance(options, TrainOptions):
        _check_train(options)
    elif isinstance(options, ValOptions):
        _check_val(options)
    elif isinstance(options, DetectOptions):
        _check_detect(options)
    _check_name(options.name)
    return options


def _without_shorts(values: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """`adam=True` as `optimizer="Adam"`."""
    result = dict(values)
    for short, (name, stands_for) in _SHORT_FOR.items():
        if name not in known or short not in result:
            continue
        wanted = result.pop(short)
        if wanted is not None and not isinstance(wanted, bool):
            raise UserError(f"{spelling(short)} {wanted!r}: should be bool, got {type(wanted).__name__}")
        if wanted and result.get(name) not in (None, stands_for):
            raise UserError(f"{spelling(short)} and {spelling(name)} {result[name]}: choose one")
        if wanted:
            result[name] = stands_for
    return result


def _checked(item: Any, base: Any, value: Any) -> Any:
    flag, low = spelling(item.name), item.metadata["low"]
    if item.metadata["bare"] is not None and value is True:
        value = item.metadata["bare"]  # resume=True
    if get_origin(base) is tuple:
        return _checked_numbers(flag, value, low)
    if get_origin(base) is Literal:
        if value not in get_args(base):
            raise UserError(f"{flag} {value}: should be one of {', '.join(get_args(base))}")
        return value
    if base is str and isinstance(value, (Path, int)) and not isinstance(value, bool):
        value = str(value)  # device=0, nominal_batch=64, data=Path(...)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not base:
        raise UserError(f"{flag} {value!r}: should be {base.__name__}, got {type(value).__name__}")
    if low is not None and not value >= low:
        raise UserError(f"{flag} {value}: should be {low} or more")
    high = item.metadata["high"]
    if high is not None and value > high:
        raise UserError(f"{flag} {value}: should be {high} or less")
    return value


def _checked_numbers(flag: str, value: Any, low: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple, range)) else (value,)
    for number in numbers:
        if type(number) is not int:
            raise UserError(f"{flag} {number!r}: should be whole numbers, got {type(number).__name__}")
        if number < low:
            raise UserError(f"{flag} {number}: should be {low} or more")
    return numbers


# Options that make no sense together, and the reason.
_EXCLUDED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("linear_lr", "cos_lr"), "choose one"),
    (("nosave", "save_period"), "the one writes no weights before the end, the other does; choose one"),
    (("nosave", "save_every"), "the one writes no weights before the end, the other does; choose one"),
    (("noval", "patience"), "patience waits for better evaluations, and there are none before the end; choose one"),
    (("noval", "image_weights"), "the weights of the images come from evaluations; choose one"),
    (("image_weights", "repeat_factor"), "both say how often an image is shown; choose one"),
    (("evolve", "noval"), "trials are judged by their evaluations; choose one"),
    (("evolve", "save_period"), "nothing is saved of a trial; choose one"),
)


def _check_excluded(options: TrainOptions) -> None:
    default = TrainOptions()
    for names, reason in _EXCLUDED:
        # 0 turns off what a number turns on
        if all(getattr(options, name) not in (getattr(default, name), 0) for name in names):
            raise UserError(f"{' and '.join(map(spelling, names))}: {reason}")


def _check_train(options: TrainOptions) -> None:
    _check_excluded(options)
    if options.batch_size == 0:
        raise UserError("--batch-size 0: should be 1 or more, or -1 for the largest that fits")
    if options.nominal_batch != "auto" and not (options.nominal_batch.isdecimal() and int(options.nominal_batch) > 0):
        raise UserError(f"--nominal-batch {options.nominal_batch}: should be auto or a whole number of 1 or more")
    if options.quad and options.batch_size % 4 and options.batch_size != -1:
        raise UserError(f"--batch-size {options.batch_size}: should be a multiple of 4 with --quad")
    _check_evolution(options)
    if not re.fullmatch(r"[^/:\s]+", options.artifact_alias):
        raise UserError(f"--artifact-alias {options.artifact_alias!r}: should be a name without '/', ':' and spaces")
    if options.save_period == 0:
        raise UserError("--save-period 0: should be 1 or more, or -1 to keep none")
    if options.label_smoothing >= 1:
        raise UserError(f"--label-smoothing {options.label_smoothing:g}: should be 0 or more and below 1")
    if options.repeat_factor > 1:
        raise UserError(f"--repeat-factor {options.repeat_factor:g}: should be a share of the images, from 0 to 1")
    if options.seed >= 2**32:
        raise UserError(f"--seed {options.seed}: should be below {2**32}")
    _check_timeout(options)


def _check_evolution(options: TrainOptions) -> None:
    default = TrainOptions()
    names = [item.name for item in fields(options) if item.name.startswith("evolve_") or item.name == "bucket"]
    given = [name for name in names if getattr(options, name) != getattr(default, name)]
    if given and options.evolve is None:
        raise UserError(f"{spelling(given[0])} is of --evolve, which is not there; add it, or leave this out")
    if options.evolve_parents != default.evolve_parents and options.evolve_sampler != "classic":
        raise UserError(
            f"--evolve-parents {options.evolve_parents}: is of --evolve-sampler classic, and this is "
            f"{options.evolve_sampler}; leave it out"
        )


def _check_val(options: ValOptions) -> None:
    if not options.weights:
        raise UserError("--weights is missing: name the checkpoint to evaluate, e.g. runs/train/exp/weights/best.pt")
    asked = [spelling(name) for name in ("save_json", "save_txt", "save_hybrid") if getattr(options, name)]
    if options.task == "speed" and asked:
        raise UserError(f"--task speed and {asked[0]}: it measures time and keeps no detections; choose one")
    if options.save_conf and not (options.save_txt or options.save_hybrid):
        raise UserError("--save-conf adds scores to label files; ask for these with --save-txt or --save-hybrid")
    _check_thresholds(options)
    _check_timeout(options)


def _check_detect(options: DetectOptions) -> None:
    if not options.weights:
        raise UserError("--weights is missing: name the checkpoint to detect with, e.g. runs/train/exp/weights/best.pt")
    if not options.source:
        raise UserError(
            "--source is missing: name an image, a video, a folder, a glob in quotes or a .txt list of these"
        )
    _check_thresholds(options)
    if options.save_conf and not options.save_txt:
        raise UserError("--save-conf adds scores to label files; ask for these with --save-txt")


def _check_thresholds(options: ValOptions | DetectOptions) -> None:
    for flag, value in (("--conf-thres", options.conf_thres), ("--iou-thres", options.iou_thres)):
        if value > 1:
            raise UserError(f"{flag} {value:g}: should be between 0 and 1")


def _check_timeout(options: TrainOptions | ValOptions) -> None:
    if not options.dist_timeout > 0:
        raise UserError(f"--dist-timeout {options.dist_timeout:g}: should be above 0")


def whole_strides(imgsz: int, stride: int, *, note: Callable[[str], object]) -> int:
    """`imgsz` rounded up to a multiple of the network's largest stride, with a note where that changes it."""
    rounded = -(-imgsz // stride) * stride
    if rounded != imgsz:
        note(f"--imgsz {imgsz} is not a multiple of the network's stride {stride}: using {rounded}")
    return rounded


def _check_name(name: str) -> None:
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name {name!r}: should be one folder name; --project says where it lies")


# ---- data set -----------------------------------------------------------------------------------------------------

_DATASET_KEYS = {"path", "train", "val", "test", "names", "nc", "imgsz", "epochs", "embedded", "download"}
_DOWNLOAD_KEYS = ("url", "size", "sha256", "to")
_ENTRY = "a folder of images, a .txt list, a COCO .json, a VOC list or a folder of VOC .xml"
_NAMES = "a list of class names or a mapping of index to name"
_KEY_OF_COCO = re.compile(rb'"(images|annotations|categories)"\s*:')
_START_BYTES = 1 << 20  # of a file, in which its first keys stand
_LISTED_MOST = 60  # characters of a wrong value that an error line shows


def find_file(given: str, folder: str) -> Path:
    """`given` from the working directory, else from the project, else a bare name from the project's `folder`."""
    candidates = [Path(given).expanduser(), PROJECT_ROOT / given, PROJECT_ROOT / folder / given]
    return next((path for path in candidates if path.exists()), candidates[0])


def read_dataset(given: str) -> tuple[DatasetSpec, list[str]]:
    """A data set YAML and notes on it for the user. Raises UserError, naming file and key, when it cannot be used.

    Whether the splits exist is seen when they are listed: an embedded data set is not drawn yet.
    """
    source = find_file(given, "data")
    _refuse_coco(source)
    content = read_yaml(source, what="--data file")
    for key in ("train", "val", "names"):
        if content.get(key) in (None, "", []):
            raise UserError(f"{source}: {_what_is_missing(key)}{_misspelt(key, content)}")
    names = _class_names(source, content)
    root = _root(source, content)
    fraction = _val_fraction(source, content["val"])
    splits = {
        "train": _split_paths(source, root, "train", content["train"]),
        "val": () if fraction else _split_paths(source, root, "val", content["val"]),
        "test": _split_paths(source, root, "test", content["test"]) if content.get("test") else (),
    }
    given_defaults = [key for key in ("imgsz", "epochs") if content.get(key) is not None]
    defaults = {key: _whole_number(source, key, content[key]) for key in given_defaults}
    unknown = sorted(str(key) for key in content if key not in _DATASET_KEYS)
    notes = [f"{source.name}: keys that this trainer does not use: {', '.join(unknown)}"] if unknown else []
    spec = DatasetSpec(
        source=source.resolve(),
        root=root,
        names=names,
        val_fraction=fraction,
        embedded=content.get("embedded") is True,
        downloads=_downloads(source, root, content.get("download")),
        **splits,
        **defaults,
    )
    return spec, notes


def _refuse_coco(source: Path) -> None:
    """Raises UserError for a COCO file; YAML would read it for minutes, and miss keys that nobody writes there."""
    with suppress(OSError), source.open("rb") as file:  # what cannot be read is said elsewhere
        if source.suffix.lower() == ".json" and _KEY_OF_COCO.search(file.read(_START_BYTES)):
            raise UserError(
                f"--data {source}: is a COCO file; --data should be a data set YAML that names it as 'train' or 'val'"
            )


def _what_is_missing(key: str) -> str:
    should_be = _NAMES if key == "names" else f"{_ENTRY}, or a list of these"
    return f"'{key}' is missing; it should be {should_be}"


def _misspelt(key: str, content: dict[str, Any]) -> str:
    """A hint where a key that nobody asked for looks like the one that is missing."""
    strangers = [str(other) for other in content if other not in _DATASET_KEYS]
    near = next((other for other in strangers if nearest_name(other, (key,))), None)
    return f"; did you mean '{key}' by '{near}'?" if near else ""


def _shortly(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= _LISTED_MOST else f"{text[:_LISTED_MOST]}..."


def _class_names(source: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{source}: 'names' as a mapping should have the keys 0 to {len(names) - 1}, each once")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{source}: 'names' should be {_NAMES}")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            shown = _shortly(repr(name))
            raise UserError(f"{source}: 'names' holds {shown}: put it in quotes (YAML reads yes, no, on, off as bool)")
    if "nc" in content and content["nc"] != len(names):
        raise UserError(f"{source}: 'nc: {_shortly(content['nc'])}' does not agree with the {len(names)} names")
    names = [str(name) for name in names]
    _refuse_twice(source, names)
    return tuple(names)


def _refuse_twice(source: Path, names: list[str]) -> None:
    first: dict[str, int] = {}
    for index, name in enumerate(map(str.strip, names)):
        if first.setdefault(name, index) != index:
            where = f"as classes {first[name]} and {index}"
            raise UserError(f"{source}: 'names' holds '{_shortly(name)}' twice, {where}; each should be there once")


def _root(source: Path, content: dict[str, Any]) -> Path:
    given = content.get("path") or "."
    if not _is_path(given):
        raise UserError(f"{source}: 'path: {_shortly(given)}' should be a folder")
    path = _at_home(given)
    beside, here = source.parent / path, Path.cwd() / path
    return _resolved(here if os.path.isdir(here) and not os.path.isdir(beside) else beside)  # noqa: PTH112 (takes any name)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def _at_home(given: str) -> Path:
    """`~/x` in the user's home; a `~` that stands for nobody's is a name like any other."""
    return Path(os.path.expanduser(given))  # noqa: PTH111 (which raises)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle: RuntimeError before Python 3.13
        return path.absolute()


def _val_fraction(source: Path, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return 0.0
    if not 0 < value < 1:
        raise UserError(
            f"{source}: 'val: {_shortly(value)}' should be a fraction between 0 and 1, or {_ENTRY}, or a list of these"
        )
    return float(value)


def _split_paths(source: Path, root: Path, key: str, value: Any) -> tuple[Path, ...]:
    entries = value if isinstance(value, list) else [value]
    if not all(map(_is_path, entries)):
        raise UserError(f"{source}: '{key}: {_shortly(value)}' should be {_ENTRY}, or a list of these")
    return tuple(_split_path(root, entry) for entry in entries)


def _split_path(root: Path, entry: str) -> Path:
    path = _at_home(entry)
    # Roboflow writes ../train/images though the folder lies beside the YAML
    inside = Path(*(part for part in path.parts if part != ".."))
    candidates = [root / path, root / inside, Path.cwd() / path]
    found = next((path for path in candidates if os.path.exists(path)), candidates[0])  # noqa: PTH110
    return Path(os.path.abspath(found))  # noqa: PTH100 (links stay: labels may lie beside the link)


def _downloads(source: Path, root: Path, value: Any) -> tuple[Download, ...]:
    if value in (None, "", []):
        return ()
    return tuple(_download(source, root, item) for item in (value if isinstance(value, list) else [value]))


def _download(source: Path, root: Path, item: Any) -> Download:
    given = {"url": item} if isinstance(item, str) else item
    where = f"{source}: 'download'"
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        raise UserError(
            f"{where} should be a URL, or a mapping with the keys url, size, sha256 and to, or a list of these"
        )
    for key in given:
        if key not in _DOWNLOAD_KEYS:
            raise UserError(f"{where} has the unknown key '{_shortly(key)}'{nearest_name(str(key), _DOWNLOAD_KEYS)}")
    url, size, sha256 = given["url"].strip(), given.get("size"), given.get("sha256")
    if "\n" in url or not re.fullmatch(r"(?i)https?://[^/\s]+(/\S*)?", url):
        what = "is a script, which is not run" if re.search(r"\s", url) else f"'{_shortly(url)}' is no URL"
        raise UserError(f"{where} {what}; it should be the URL of an archive, such as https://site/data.zip")
    if size is not None and (type(size) is not int or size < 1):
        raise UserError(f"{where}: 'size: {_shortly(size)}' should be a number of bytes")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", str(sha256)):
        raise UserError(f"{where}: 'sha256: {_shortly(sha256)}' should be 64 hexadecimal digits, in quotes")
    if given.get("to") is not None and not _is_path(given["to"]):
        raise UserError(f"{where}: 'to: {_shortly(given['to'])}' should be a folder")
    to = _resolved(root / _at_home(given.get("to") or "."))
    return Download(url=url, to=to, size=size, sha256=None if sha256 is None else str(sha256).lower())


def _whole_number(source: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: '{key}: {_shortly(value)}' should be a whole number of 1 or more")
    return value
