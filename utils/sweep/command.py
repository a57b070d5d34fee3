"""What `train.py --evolve` does: one worker of a study whose trials are training runs.

Where a launcher has started several processes each is a worker of its own, on its own device; the first one tells what
all have in common.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optuna.study import Study

from utils.config import (
    LATEST,
    PROJECT_ROOT,
    TrainOptions,
    by_flag,
    find_file,
    read_dataset,
    spelling,
    validated,
)
from utils.data import cache
from utils.evolve import space as spaces
from utils.evolve.history import finished_of
from utils.evolve.pruners import make_pruner, rungs
from utils.evolve.record import StudyRecord
from utils.evolve.samplers import distributions, make_sampler
from utils.evolve.space import Space, search_space
from utils.evolve.storage import Storage, open_storage
from utils.evolve.study import HEARTBEAT_S, Outcome, Report, Worker, agreed, open_study
from utils.files import from_here, read_yaml, this_python, write_yaml
from utils.hyp import GENES, Hyperparameters, plain_values, read_hyp
from utils.launch import Place, place
from utils.report.loggers import Console, SilentConsole
from utils.stopping import Interrupted, StopRequest
from utils.structures import UserError
from utils.sweep.process import Evaluated, Ready, Request
from utils.sweep.progress import Progress
from utils.sweep.trials import Trials

DEFAULT_PROJECT = "runs/evolve"
_DEFAULT_EPOCHS = 300
_PRUNER = "asha"
_OPTIONS_FILE, _HYP_FILE = "opt.yaml", "hyp.yaml"
# Options that workers of one study may differ in, besides all that begin with evolve
_OF_A_WORKER = (
    *("weights", "cfg", "data", "hyp", "project", "name", "exist_ok", "resume", "cache", "cache_dir", "strict"),
    *("paint", "sync_bn", "workers", "device", "compile", "deterministic", "nosave", "noval", "noplots", "quiet"),
    *("patience", "save_every", "save_period", "nproc", "dist_timeout", "local_rank", "bucket"),
)
# May accompany --resume
_WITH_RESUME = (
    *("resume", "evolve", "device", "workers", "nproc", "quiet", "noplots", "bucket", "project", "name"),
    *("evolve_storage", "evolve_grace", "evolve_confirm", "evolve_confirm_seeds", "evolve_confirm_epochs"),
)


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """What is to be evolved, and where."""

    options: TrainOptions
    hyp: Hyperparameters
    space: Space
    folder: Path
    place: Place | None
    console: Console
    stop: StopRequest

    @property
    def plain_hyp(self) -> dict[str, Any]:
        return plain_values(self.hyp)

    @property
    def goal(self) -> int:
        return self.options.evolve

    @property
    def speaks(self) -> bool:
        return self.place is None or self.place.rank == 0


def evolve(values: Mapping[str, Any], stop: StopRequest) -> Path:
    """Work on a study until it is finished; the file of the best hyperparameters.

    Raises UserError before any trial for what a user can mend, and Interrupted when a signal asks to stop; the trial
    under way is taken up again by whoever works on the study next.
    """
    sweep = _prepared(values, stop)
    try:
        return _worked(sweep)
    except Interrupted as interrupted:
        raise Interrupted(interrupted.signum, _how_to_continue(sweep)) from None


def _prepared(values: Mapping[str, Any], stop: StopRequest) -> _Sweep:
    here = place()
    options, folder = _options(dict(values))
    hyp = read_hyp(find_file(options.hyp, "data/hyps"))
    spec, _ = read_dataset(options.data)
    options = replace(options, epochs=options.epochs or spec.epochs or _DEFAULT_EPOCHS)
    console = Console(quiet=options.quiet) if here is None or here.rank == 0 else SilentConsole()
    return _Sweep(
        options=replace(options, evolve_pruner=_pruner(options, console)),
        hyp=hyp,
        space=search_space(hyp, genes=options.evolve_genes, noautoanchor=options.noautoanchor),
        folder=folder,
        place=here,
        console=console,
        stop=stop,
    )


# ---- options ------------------------------------------------------------------------------------------------------


def _options(values: dict[str, Any]) -> tuple[TrainOptions, Path]:
    """The options of a sweep, and its folder. With --resume they are those that it was begun with."""
    given = validated(TrainOptions, values)
    if given.resume is None:
        return given, Path(values.get("project") or DEFAULT_PROJECT) / given.name
    folder = (
        Path(values.get("project") or DEFAULT_PROJECT) / given.name if given.resume == LATEST else Path(given.resume)
    )
    saved = folder / _OPTIONS_FILE
    if folder.suffix == ".pt" or (folder / "weights").is_dir():
        raise UserError(
            f"--resume {given.resume}: is a training run; with --evolve name the folder of a sweep, such as "
            f"{DEFAULT_PROJECT}/exp, or leave out --evolve"
        )
    if not saved.is_file():
        raise UserError(f"--resume: no sweep to continue in {folder}; leave out --resume to begin one")
    begun = validated(TrainOptions, read_yaml(saved, what=str(saved)))
    changed = {name: value for name, value in values.items() if value is not None}
    for name in changed:
        if name not in _WITH_RESUME and getattr(given, name, None) != getattr(begun, name, None):
            allowed = ", ".join(spelling(one) for one in _WITH_RESUME if one not in ("resume", "project", "name"))
            raise UserError(f"--resume continues a sweep as it was; {spelling(name)} cannot change, only {allowed}")
    kept = {name: getattr(given, name) for name in changed if name in _WITH_RESUME}
    hyp = folder / _HYP_FILE
    return replace(begun, **{**kept, "resume": None, "hyp": str(hyp) if hyp.is_file() else begun.hyp}), folder


def _pruner(options: TrainOptions, console: Console) -> str:
    """What ends bad trials early; where nobody asked for anything and nothing can, it is said."""
    if options.evolve_pruner is not None:
        rungs(options.epochs, options.evolve_pruner)
        return options.evolve_pruner
    try:
        rungs(options.epochs, _PRUNER)
    except UserError:
        console.note(f"with --epochs {options.epochs} no trial can be ended early")
        return "none"
    return _PRUNER


def _what_counts(sweep: _Sweep) -> dict[str, Any]:
    """The options that must be the same for all trials of a study, by flag."""
    options = sweep.options
    names = {"weights": Path(options.weights).name, "cfg": Path(options.cfg).name}
    same = {flag: value for flag, value in by_flag(options, but=_OF_A_WORKER).items() if "--evolve" not in flag}
    return {**{spelling(name): value for name, value in names.items()}, **same, "--freeze": list(options.freeze)}


# ---- the study ----------------------------------------------------------------------------------------------------


def _study(sweep: _Sweep, storage: Storage) -> Study:
    """New or joined. Raises UserError where it is another than this worker's."""
    options = sweep.options
    study = open_study(
        options.name,
        storage,
        sampler=make_sampler(options.evolve_sampler, sweep.space, seed=options.seed, parents=options.evolve_parents),
        pruner=make_pruner(options.evolve_pruner, options.epochs),
    )
    _refuse_strangers(sweep, study)
    done = len(finished_of(study))
    if done > sweep.goal:
        raise UserError(f"--evolve {sweep.goal}: {done} trials are done already; name that many or more")
    return study


def _refuse_strangers(sweep: _Sweep, study: Study) -> None:
    mine, hyp = _what_counts(sweep), sweep.plain_hyp
    theirs = agreed(study, "options", mine)
    differ = [
        f"{flag} {_shown(theirs.get(flag))} there, {_shown(value)} here"
        for flag, value in mine.items()
        if theirs.get(flag) != value
    ]
    differ += spaces.differences(sweep.space.plain(), agreed(study, "space", sweep.space.plain()))
    their_hyp = agreed(study, "hyp", hyp)
    differ += [
        f"{name}: {their_hyp.get(name)} there, {value} here (--hyp)"
        for name, value in hyp.items()
        if their_hyp.get(name) != value and name not in sweep.space.names
    ]
    _refuse_difference(sweep, differ)


def _shown(value: Any) -> str:
    return "nothing" if value in ("", None, []) else str(value)


def _refuse_difference(sweep: _Sweep, differ: list[str]) -> None:
    if differ:
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise UserError(
            f"the study {sweep.options.name} in {sweep.folder} is another: {differ[0]}{more}; use what it was begun "
            "with, or begin another study with --name"
        )


def _worked(sweep: _Sweep) -> Path:
    options, folder = sweep.options, sweep.folder
    folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(options.evolve_storage, folder, heartbeat_s=HEARTBEAT_S, grace_s=options.evolve_grace)
    study = _study(sweep, storage)
    if sweep.speaks:
        write_yaml(folder / _OPTIONS_FILE, asdict(options))
        write_yaml(folder / _HYP_FILE, sweep.plain_hyp)
    record = StudyRecord(folder, names=tuple(GENES))
    progress = Progress(
        study=study,
        goal=sweep.goal,
        epochs=options.epochs,
        console=Console(quiet=options.quiet),
        wrote=lambda: record.write(study, sweep.plain_hyp),
    )
    worker = Worker(
        study=study,
        storage=storage,
        distributions=distributions(sweep.space),
        goal=sweep.goal,
        objective=_Objective(sweep, study, progress),
        watch=progress,
        stop=sweep.stop,
    )
    worker.work()
    return folder / "hyp_evolved.yaml"


class _Objective:
    """A training run with the values of a trial."""

    def __init__(self, sweep: _Sweep, study: Study, progress: Progress) -> None:
        self._sweep, self._study, self._progress = sweep, study, progress
        self._caches: dict[Path, Any] = {}
        self._spoke = not sweep.speaks
        self._run = Trials(
            stop=sweep.stop,
            failures=sweep.folder / "failures",
            on_ready=self._ready,
            on_epoch=progress.epoch,
        )

    def __call__(self, values: Mapping[str, Any], report: Report) -> Outcome:
        options = self._sweep.options
        request = Request(
            options=asdict(options),
            hyp={**self._sweep.plain_hyp, **values},
            rungs=rungs(options.epochs, options.evolve_pruner),
            place=self._sweep.place,
            speaks=not self._spoke,
        )
        self._spoke = True

        def judged(message: Evaluated) -> None:
            report(message.epoch, message.fitness, message.results)

        try:
            return self._run(f"trial_{self._progress.number:04d}", request, judged)
        finally:
            self._progress.over()

    def _ready(self, message: Ready) -> None:
        theirs = agreed(self._study, "work", dict(message.work))
        differ = [f"{name} here" for name, value in message.work.items() if theirs.get(name) != value]
        _refuse_difference(self._sweep, differ)
        for path in message.caches:
            if path not in self._caches:
                self._caches[path] = cache.hold(path)
        self._progress.ready()


def _how_to_continue(sweep: _Sweep) -> str:
    script = shlex.quote(str(from_here(PROJECT_ROOT / "train.py")))
    folder = shlex.quote(str(sweep.folder))
    command = f"{this_python()} {script} --evolve {sweep.goal} --resume {folder}"
    return f"the trial under way will be run again; `{command}` goes on"
