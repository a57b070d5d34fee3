"""`val.py`: a checkpoint and a data set in, tables and pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpoint import METRICS_FILE, Checkpoint, averaged_model, load_checkpoint
from utils.config import ValOptions, validated, whole_strides
from utils.data.images import BaseImages
from utils.data.loader import EvalBatches, faults_named
from utils.data.scan import open_dataset, refuse_findings, scan_dataset
from utils.data.store import single_class
from utils.evaluate.evaluator import Evaluator
from utils.evaluate.nms import NmsRules
from utils.files import new_run_folder
from utils.hyp import hyperparameters
from utils.loss import LossGains
from utils.report.loggers import Console, table
from utils.report.run_report import PictureFiles, Pictures, write_metrics
from utils.runtime import choose_runtime, mendable_errors
from utils.structures import DatasetSpec, HeadSpec, Metrics, UserError

_CLASSES_SHOWN = 30  # more, and only --verbose lists them


def evaluate(values: Mapping[str, Any]) -> Metrics:
    """Evaluate for options by name. Raises UserError for what a user can mend."""
    options = validated(ValOptions, dict(values))
    console = Console(quiet=options.quiet)
    runtime = choose_runtime(device=options.device, amp=options.amp, workers=options.workers)
    checkpoint = load_checkpoint(Path(options.weights))
    spec = open_dataset(options.data or checkpoint["options"]["data"], note=console.note, bar=console.download_bar)
    single = options.single_cls or checkpoint["options"].get("single_cls", False)
    names = _names(options, spec, checkpoint, single=single, console=console)
    scan = scan_dataset(spec, (options.task,), progress=console.bar, cache_dir=options.cache_dir)
    for line in scan.reports[options.task].lines():
        console.line(line)
    if options.strict:
        refuse_findings(scan)
    store = single_class(scan.stores[options.task]) if single else scan.stores[options.task]
    model = averaged_model(checkpoint)
    imgsz = whole_strides(options.imgsz or checkpoint["options"]["imgsz"], max(model.head.strides), note=console.note)
    evaluator = Evaluator(
        batches=EvalBatches(
            store=store,
            images=BaseImages(store=store, imgsz=imgsz, area=True),
            imgsz=imgsz,
            batch_size=options.batch_size,
            stride=max(model.head.strides),
        ),
        names=names,
        runtime=runtime,
        rules=NmsRules(
            confidence=options.conf_thres,
            iou=options.iou_thres,
            max_detections=options.max_det,
            agnostic=options.agnostic,
        ),
        augment=options.augment,
    )
    folder = new_run_folder(Path(options.project), options.name, exist_ok=options.exist_ok)
    pictures = Pictures() if options.noplots else PictureFiles(folder, names, val=store)
    with mendable_errors(batch_size=options.batch_size, imgsz=imgsz), faults_named(evaluator.stream):
        metrics = evaluator(
            model.to(runtime.device),
            gains=_gains(checkpoint, model.head, imgsz),
            on_batch=pictures.evaluated_batch,
            watch=lambda batches: console.bar(batches, "Evaluating", images_each=batches.batch_size),
        )
        write_metrics(folder / METRICS_FILE, metrics)
        pictures.finished(metrics)
    console.line(table(metrics, verbose=options.verbose or len(names) <= _CLASSES_SHOWN))
    console.line(f"Tables and pictures: {folder}")
    return metrics


def _names(
    options: ValOptions, spec: DatasetSpec, checkpoint: Checkpoint, *, single: bool, console: Console
) -> tuple[str, ...]:
    """The classes to tell apart. Raises UserError where those of network and data set do not agree."""
    learned = tuple(checkpoint["names"])
    if single and len(learned) > 1:
        raise UserError(f"--single-cls: {options.weights} knows {len(learned)} classes, and should know one")
    if single:
        return learned
    if len(spec.names) != len(learned):
        hint = "; --single-cls takes these for one" if len(learned) == 1 else ""
        raise UserError(
            f"{options.weights} knows {len(learned)} classes, {spec.source} has {len(spec.names)} names{hint}"
        )
    if spec.names != learned:
        console.warn(f"the names of {spec.source}, or their order, are not those that {options.weights} learned")
    return spec.names


def _gains(checkpoint: Checkpoint, head: HeadSpec, imgsz: int) -> LossGains:
    """The losses as the training run counted them."""
    hyp = hyperparameters(checkpoint["hyp"], source="checkpoint")
    return LossGains.for_head(hyp, head, imgsz, label_smoothing=checkpoint["options"]["label_smoothing"])
