"""The options of a sweep: as given, or with --resume those it was begun with; and which all workers must share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from utils.config import DEFAULT_EPOCHS, LATEST, TrainOptions, by_flag, find_file, read_dataset, spelling, validated
from utils.evolve.bucket import Bucket
from utils.evolve.pruners import rungs
from utils.evolve.space import Space, search_space
from utils.evolve.storage import mask_password
from utils.files import read_yaml, write_yaml
from utils.hyp import Hyperparameters, plain_values, read_hyp
from utils.launch import Place, place
from utils.stopping import StopRequest
from utils.structures import UserError

DEFAULT_PROJECT = "runs/evolve"
OPTIONS_FILE, HYP_FILE = "opt.yaml", "hyp.yaml"
_DEFAULT_PRUNER = "asha"
_MASK = "***"
_SECRETS = ("evolve_storage", "bucket")  # may hold passwords
# Not of how a run trains
_ELSEWHERE = (
    *("hyp", "epochs", "project", "name", "exist_ok", "resume", "quiet", "noplots", "nproc", "bucket", "local_rank"),
    *("patience", "save_every", "save_period", "dist_timeout"),
)
# May accompany --resume
_WITH_RESUME = (
    *("resume", "evolve", "device", "workers", "nproc", "quiet", "noplots", "bucket", "project", "name"),
    *("evolve_storage", "evolve_grace", "evolve_confirm", "evolve_confirm_seeds", "evolve_confirm_epochs"),
)
# Options that workers of one study may differ in; weights, network and data are compared by content
_OF_A_WORKER = (
    *("weights", "cfg", "data", "hyp", "project", "name", "exist_ok", "resume", "cache", "cache_dir", "strict"),
    *("paint", "sync_bn", "workers", "device", "compile", "deterministic", "nosave", "noval", "noplots", "quiet"),
    *("patience", "save_every", "save_period", "nproc", "dist_timeout", "local_rank", "bucket", "batch_size"),
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is to be evolved, and where."""

    options: TrainOptions  # without anything that is left open, but --batch-size -1
    hyp: Hyperparameters  # as given
    space: Space
    folder: Path
    place: Place | None  # of this worker, where a launcher has started several
    bucket: Bucket | None
    stop: StopRequest

    @property
    def goal(self) -> int:
        """Trials."""
        return self.options.evolve

    @property
    def speaks(self) -> bool:
        """For all workers of its launcher."""
        return self.place is None or self.place.rank == 0

    @property
    def plain_hyp(self) -> dict[str, Any]:
        return plain_values(self.hyp)

    @property
    def trial_options(self) -> dict[str, Any]:
        """Of a trial, which knows nothing of the study."""
        return {**asdict(self.options), **dict.fromkeys(_SECRETS, "")}

    @property
    def alike(self) -> dict[str, Any]:
        """Options that must be the same for all trials of a study, by flag."""
        options = by_flag(self.options, but=_OF_A_WORKER)
        return {flag: _plain(value) for flag, value in options.items() if "--evolve" not in flag}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def prepared(values: dict[str, Any], stop: StopRequest, note: Callable[[str], object]) -> Sweep:
    """What options by name ask for. Raises UserError before anything is written but what a bucket holds."""
    given = validated(TrainOptions, values)
    folder, bucket = _folder(values, given), Bucket(given.bucket) if given.bucket else None
    if bucket is not None:
        bucket.check_writable()
        if bucket.fetch(folder, _study_name(given)):
            note(f"going on with the study of {bucket.shown}")
    options = given if given.resume is None else _resumed(values, given, folder)
    if bucket is None and options.bucket:
        bucket = Bucket(options.bucket)
    _check_weights(options.weights)
    hyp = read_hyp(find_file(options.hyp, "data/hyps"))
    spec, _ = read_dataset(options.data)
    options = replace(options, epochs=options.epochs or spec.epochs or DEFAULT_EPOCHS)
    return Sweep(
        options=replace(options, evolve_pruner=_pruner(options, note)),
        hyp=hyp,
        space=search_space(hyp, genes=options.evolve_genes, noautoanchor=options.noautoanchor),
        folder=folder,
        place=place(),
        bucket=bucket,
        stop=stop,
    )


def write_options(sweep: Sweep, *, anew: bool) -> None:
    """What --resume reads, if it is not there or has to be made `anew`."""
    if anew or not (sweep.folder / OPTIONS_FILE).exists():
        masked = {name: mask_password(getattr(sweep.options, name)) for name in _SECRETS}
        write_yaml(sweep.folder / HYP_FILE, sweep.plain_hyp)
        write_yaml(
            sweep.folder / OPTIONS_FILE, {**asdict(sweep.options), **masked, "project": str(sweep.folder.parent)}
        )


def flags_of_training(options: TrainOptions) -> list[str]:
    """Of a command that trains as the trials were trained, but for how long and with which hyperparameters."""
    words = []
    for item in fields(TrainOptions):
        value = getattr(options, item.name)
        if item.name in _ELSEWHERE or item.name.startswith("evolve") or value == item.default:
            continue
        shown = value if isinstance(value, tuple) else [] if value is True else [value]
        words += [spelling(item.name), *map(str, shown)]
    return words


def _study_name(given: TrainOptions) -> str:
    if given.resume in (None, LATEST):
        return given.name
    return Path(given.resume).name


def _check_weights(weights: str) -> None:
    """Before anything is written; the same is said where they are read."""
    if weights and not Path(weights).is_file():
        raise UserError(f"checkpoint not found: {weights}; weights are never downloaded")


def secrets_to_name(options: TrainOptions) -> str:
    """Flags that a command to go on needs, as their values are not to be written down."""
    hidden = [name for name in _SECRETS if _MASK in mask_password(getattr(options, name))]
    return "".join(f" {spelling(name)} URL" for name in hidden)


def _folder(values: dict[str, Any], given: TrainOptions) -> Path:
    if given.resume in (None, LATEST):
        return Path(values.get("project") or DEFAULT_PROJECT) / given.name
    folder = Path(given.resume)
    if folder.suffix == ".pt" or (folder / "weights").is_dir():
        raise UserError(
            f"--resume {given.resume}: is a training run; with --evolve name the folder of a sweep, such as "
            f"{DEFAULT_PROJECT}/exp, or leave out --evolve"
        )
    return folder


def _resumed(values: dict[str, Any], given: TrainOptions, folder: Path) -> TrainOptions:
    saved, hyp = folder / OPTIONS_FILE, folder / HYP_FILE
    if not saved.is_file():
        raise UserError(
            f"--resume: {folder} has no {OPTIONS_FILE} of a sweep; name its folder (--resume {DEFAULT_PROJECT}/NAME), "
            "or type its whole command without --resume, which begins a sweep or goes on with it"
        )
    begun = validated(TrainOptions, {**read_yaml(saved, what=str(saved)), "resume": None})
    changed = [name for name, value in values.items() if value is not None]
    for name in changed:
        if name not in _WITH_RESUME and getattr(given, name, None) != getattr(begun, name, None):
            allowed = ", ".join(spelling(one) for one in _WITH_RESUME if one not in ("resume", "project", "name"))
            raise UserError(f"--resume continues a sweep as it was; {spelling(name)} cannot change, only {allowed}")
    for name in _SECRETS:
        if _MASK in getattr(begun, name) and not getattr(given, name):
            raise UserError(f"--resume: {spelling(name)} was {getattr(begun, name)}; name it again, with its password")
    kept = {name: getattr(given, name) for name in changed if name in _WITH_RESUME and name not in ("project", "name")}
    return replace(begun, **{**kept, "hyp": str(hyp) if hyp.is_file() else begun.hyp})


def _pruner(options: TrainOptions, note: Callable[[str], object]) -> str:
    """What ends bad trials early; where nobody asked for anything and nothing can, it is said."""
    if options.evolve_pruner is not None:
        rungs(options.epochs, options.evolve_pruner)
        return options.evolve_pruner
    try:
        rungs(options.epochs, _DEFAULT_PRUNER)
    except UserError:
        note(f"with --epochs {options.epochs} no trial can be ended early")
        return "none"
    return _DEFAULT_PRUNER
