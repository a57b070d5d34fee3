"""`val.py`: a checkpoint and a data set in; tables, pictures and results for other tools out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint, averaged_model, load_weights
from utils.clock import TimeSplit
from utils.config import SINGLE_CLASS, DetectOptions, ValOptions, by_flag, find_file, validated, whole_strides
from utils.data.images import BaseImages
from utils.data.loader import EvalBatches, faults_named
from utils.data.scan import open_dataset, refuse_findings, scan_dataset
from utils.data.store import content_digest, single_class
from utils.evaluate.evaluator import Evaluation, Evaluator
from utils.evaluate.figures import MOST_DETECTIONS
from utils.evaluate.nms import MAX_CANDIDATES, NmsRules
from utils.evaluate.saving import LABELS_FOLDER, check_folder, clear_results, write_labels, write_predictions
from utils.files import new_run_folder
from utils.hyp import hyperparameters
from utils.loss import LossGains
from utils.ranks import Ranks
from utils.report.console import Console, SilentConsole, labelled, result, strange_outputs
from utils.report.pictures import PictureFiles, Pictures
from utils.report.run_report import write_metrics
from utils.run_folder import METRICS_FILE
from utils.runtime import Runtime, choose_runtime, join_ranks, mendable_errors
from utils.structures import Batch, DatasetSpec, Detections, HeadSpec, LabelStore, Metrics, UserError

_CLASSES_SHOWN = 30  # more, and only --verbose lists them
# Options that hosts may differ in; data are compared by content, and weights are read by the first rank
_OF_A_RANK = ("device", "workers", "cache_dir", "data", "weights")
_IN_USE = {"conf_thres": DetectOptions.conf_thres, "iou_thres": DetectOptions.iou_thres}  # `--task speed`, unless given


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What has been found out before anything is evaluated."""

    options: ValOptions
    checkpoint: Checkpoint
    spec: DatasetSpec
    names: tuple[str, ...]
    runtime: Runtime
    model: DetectionModel
    store: LabelStore
    imgsz: int
    console: Console

    @property
    def merges_classes(self) -> bool:
        """Whether what the network tells apart counts as one, by --single-cls."""
        return len(self.names) < self.model.head.num_classes

    def evaluator(self, batch_size: int) -> Evaluator:
        stride = max(self.model.head.strides)
        return Evaluator(
            batches=EvalBatches(
                store=self.store,
                images=BaseImages(store=self.store, imgsz=self.imgsz, area=True),
                imgsz=self.imgsz,
                batch_size=batch_size,
                stride=stride,
            ),
            names=self.names,
            runtime=self.runtime,
            rules=NmsRules(
                confidence=self.options.conf_thres,
                iou=self.options.iou_thres,
                max_detections=self.options.max_det,
                agnostic=self.options.agnostic,
            ),
            augment=self.options.augment,
            merge_classes=self.merges_classes,
        )


def evaluate(values: Mapping[str, Any]) -> Metrics | None:
    """Evaluate for options by name; without a result for `task="speed"`. Raises UserError for what a user can mend."""
    options = _options(values)
    ranks = join_ranks(dist_timeout=options.dist_timeout)
    with ranks.losses_named(), ranks.end_told():
        ranks.check_alike(partial(by_flag, options, but=_OF_A_RANK))
        if options.task == "speed":
            if not ranks.alone:
                raise ranks.of_all(UserError("--task speed: measures one process; leave out --nproc, or the launcher"))
            _measure(_parts(options, ranks))
            return None
        return _evaluated_by(ranks, options)


def _evaluated_by(ranks: Ranks, options: ValOptions) -> Metrics:
    """Each rank takes its share of the batches; the first one tells, and writes."""
    if options.exist_ok:
        ranks.from_first(lambda: check_folder(Path(options.project) / options.name))
    parts = _parts(options, ranks)
    folder = ranks.from_first(lambda: new_run_folder(Path(options.project), options.name, exist_ok=options.exist_ok))
    ranks.hurry()
    try:
        metrics = _evaluated(parts, folder)
        ranks.leave()
        return metrics
    except BaseException:
        if ranks.speaks:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        raise


def _evaluated(parts: _Parts, folder: Path) -> Metrics:
    """The figures first, on the screen and on disk: what could go wrong with the pictures costs nobody these."""
    options, speaks = parts.options, parts.runtime.ranks.speaks
    drawn = speaks and not options.noplots
    pictures = PictureFiles(folder, parts.names, val=parts.store) if drawn else Pictures()
    pictured: list[tuple[int, Batch, list[Detections]]] = []
    evaluator = parts.evaluator(options.batch_size)
    with mendable_errors(batch_size=options.batch_size, imgsz=parts.imgsz), faults_named(evaluator.stream):
        evaluation = evaluator.evaluation(
            parts.model.to(parts.runtime.device),
            gains=None if parts.merges_classes else _gains(parts.checkpoint, parts.model.head, parts.imgsz),
            on_batch=lambda *seen: pictured.append(seen) if seen[0] < pictures.batches else None,
            shown=pictures.batches,
            watch=lambda batches: parts.console.bar(batches, "Evaluating", images_each=batches.batch_size),
        )
        if speaks:
            _tell(parts, evaluation)
            _save(parts, evaluation, folder)
        for seen in pictured:
            pictures.evaluated_batch(*seen)
        pictures.finished(evaluation.metrics)
    parts.console.line(f"Results: {folder}")
    return evaluation.metrics


def _parts(options: ValOptions, ranks: Ranks) -> _Parts:
    console = Console(quiet=options.quiet) if ranks.speaks else SilentConsole()
    runtime = ranks.each(
        lambda: choose_runtime(device=options.device, amp=options.amp, workers=options.workers, ranks=ranks)
    )
    checkpoint = ranks.from_first(lambda: load_weights(Path(options.weights)))
    spec = ranks.host_first(
        lambda: open_dataset(_data(options, checkpoint), note=console.note, bar=console.download_bar)
    )
    single = options.single_cls or checkpoint["options"].get("single_cls", False)
    names = ranks.each(lambda: _names(options, spec, checkpoint, single=single, console=console))
    store = ranks.host_first(lambda: _store(options, spec, console))
    store = single_class(store) if single else store
    ranks.check_alike(lambda: {"images or labels": content_digest(store), "classes": ", ".join(names)})
    model = averaged_model(checkpoint)
    imgsz = options.imgsz or checkpoint["options"]["imgsz"]
    return _Parts(
        options=options,
        checkpoint=checkpoint,
        spec=spec,
        names=names,
        runtime=runtime,
        model=model,
        store=store,
        imgsz=ranks.each(lambda: whole_strides(imgsz, max(model.head.strides), note=console.note)),
        console=console,
    )


def _store(options: ValOptions, spec: DatasetSpec, console: Console) -> LabelStore:
    """The labels of the split, after its report."""
    split = "val" if options.task == "speed" else options.task
    scan = scan_dataset(spec, (split,), progress=console.bar, cache_dir=options.cache_dir)
    for line in scan.reports[split].lines():
        console.line(line)
    if options.strict:
        refuse_findings(scan)
    return scan.stores[split]


def _options(values: Mapping[str, Any]) -> ValOptions:
    given = {name: value for name, value in values.items() if value is not None}
    return validated(ValOptions, {**_IN_USE, **given} if given.get("task") == "speed" else given)


def _data(options: ValOptions, checkpoint: Checkpoint) -> str:
    """The data set to evaluate on. Raises UserError where it is that of the checkpoint, and gone."""
    if options.data:
        return options.data
    learned_from = checkpoint["options"]["data"]
    if not learned_from:
        raise UserError(f"{options.weights} does not say what it was trained on; name a data set with --data")
    if not find_file(learned_from, "data").exists():
        raise UserError(
            f"not found: {learned_from}, the data set that {options.weights} was trained on; name another with --data"
        )
    return learned_from


def _names(
    options: ValOptions, spec: DatasetSpec, checkpoint: Checkpoint, *, single: bool, console: Console
) -> tuple[str, ...]:
    """The classes to tell apart. Raises UserError where those of network and data set do not agree."""
    learned = tuple(checkpoint["names"])
    if single:
        return learned if len(learned) == 1 else SINGLE_CLASS
    if len(spec.names) != len(learned):
        raise UserError(
            f"{options.weights} knows {len(learned)} classes, {spec.source} has {len(spec.names)} names; "
            "--single-cls takes all classes for one"
        )
    if spec.names != learned:
        console.warn(f"the names of {spec.source}, or their order, are not those that {options.weights} learned")
    return spec.names


def _gains(checkpoint: Checkpoint, head: HeadSpec, imgsz: int) -> LossGains:
    """The losses as the training run counted them."""
    hyp = hyperparameters(checkpoint["hyp"], source="checkpoint")
    return LossGains.for_head(hyp, head, imgsz, label_smoothing=checkpoint["options"]["label_smoothing"])


# ---- what is said and written -------------------------------------------------------------------------------------


def _tell(parts: _Parts, evaluation: Evaluation) -> None:
    options, console, metrics = parts.options, parts.console, evaluation.metrics
    if strange := strange_outputs(metrics, options.weights):
        remedy = ", or use --amp off" if parts.runtime.amp_dtype else ""
        console.warn(f"{strange}; its weights may be damaged: take another checkpoint{remedy}")
    if evaluation.cut:
        console.note(
            f"in {evaluation.cut:,} of {metrics.images:,} images there were more than {MAX_CANDIDATES:,} candidates "
            "for a detection: NMS took the best of them"
        )
    if metrics.labels:
        listed = labelled(metrics) if options.verbose or len(parts.names) <= _CLASSES_SHOWN else ()
        console.line(result(metrics, listed, best=options.verbose, least=options.conf_thres))
        if options.conf_thres > ValOptions.conf_thres or options.max_det < MOST_DETECTIONS:
            console.note(
                f"these figures are those of detections above {options.conf_thres:g} alone, {options.max_det:,} in an "
                f"image at most; AP wants the defaults, --conf-thres {ValOptions.conf_thres:g} and --max-det "
                f"{ValOptions.max_det}"
            )
    else:
        console.line(
            f"{parts.spec.source}: no usable label in '{options.task}', so there is nothing to score; "
            f"{len(evaluation.evidence.scores):,} detections in {metrics.images:,} images"
        )
    console.line(_speeds(parts, evaluation.times))


def _save(parts: _Parts, evaluation: Evaluation, folder: Path) -> None:
    options, evidence = parts.options, evaluation.evidence
    clear_results(folder)
    epoch = parts.checkpoint["epoch"] or None  # of weights from elsewhere nobody knows it
    write_metrics(folder / METRICS_FILE, evaluation.metrics, epoch=epoch)  # first: it says whose the other files are
    if options.save_json:
        for line in write_predictions(folder, evidence, parts.store, parts.names):
            parts.console.note(line)
    if options.save_txt or options.save_hybrid:
        files = write_labels(
            folder,
            evidence,
            parts.store,
            scores=options.save_conf,
            hybrid_iou=options.iou_thres if options.save_hybrid else None,
        )
        parts.console.line(f"Label files of {files:,} of {len(parts.store):,} images: {folder / LABELS_FOLDER}")


# ---- speed --------------------------------------------------------------------------------------------------------


def _speeds(parts: _Parts, times: TimeSplit) -> str:
    ms, size = times.ms_per_image, parts.options.batch_size
    return (
        f"Per image: {ms['load']:.1f} ms waiting for data, {ms['network']:.1f} ms network, {ms['nms']:.1f} ms NMS; "
        f"{parts.imgsz} px, batches of {size}, {parts.runtime.description}"
    )


def _measure(parts: _Parts) -> None:
    """A table of times, image by image and at --batch-size."""
    options, console = parts.options, parts.console
    sizes = sorted({1, min(options.batch_size, len(parts.store))})
    lines = [f"{'ms per image':>14}{'waiting':>10}{'network':>10}{'NMS':>10}{'all':>10}{'images/s':>11}"]
    for size in sizes:
        evaluator = parts.evaluator(size)
        with mendable_errors(batch_size=size, imgsz=parts.imgsz), faults_named(evaluator.stream):
            times = evaluator.measured(
                parts.model.to(parts.runtime.device),
                watch=lambda batches: console.bar(batches, "Measuring", images_each=batches.batch_size),
            )
        each = times.ms_per_image.values()  # in the order of the titles
        cells = "".join(f"{ms:>10.2f}" for ms in (*each, sum(each)))
        lines.append(f"{f'batches of {size}':>14}{cells}{1000 / max(sum(each), 1e-9):>11.1f}")
    console.line("\n".join(lines))
    console.line(
        f"{parts.imgsz} px, confidence {options.conf_thres:g}, IoU {options.iou_thres:g}; {parts.runtime.description}"
    )
    if parts.runtime.workers:
        console.line("Waiting is for data, which the loader processes read while the network is at work")
