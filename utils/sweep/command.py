"""What `train.py --evolve` does: one worker of a study whose trials are training runs.

Where a launcher has started several processes each is a worker of its own, on its own device; the first one tells what
all have in common.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from optuna.pruners import NopPruner
from optuna.study import Study

from utils.config import LATEST, PROJECT_ROOT, TrainOptions, by_flag, find_file, read_dataset, spelling, validated
from utils.evolve import space as spaces
from utils.evolve.bucket import Bucket
from utils.evolve.confirm import PairSampler, Verdict, by_seed, candidates, fresh_seeds, plain_verdict, table, verdict
from utils.evolve.confirm import comments as confirmed_comments
from utils.evolve.confirm import distributions as pairs
from utils.evolve.history import best, finished_of
from utils.evolve.pruners import make_pruner, rungs
from utils.evolve.record import HYP_NAME, write_hyp
from utils.evolve.samplers import distributions, make_sampler
from utils.evolve.space import Space, search_space
from utils.evolve.storage import Storage, mask_password, open_storage
from utils.evolve.study import HEARTBEAT_S, Worker, agreed, open_study
from utils.files import from_here, read_yaml, this_python, write_text, write_yaml
from utils.hyp import Hyperparameters, plain_values, read_hyp
from utils.launch import Place, place
from utils.report.loggers import Console, SilentConsole
from utils.stopping import Interrupted, StopRequest
from utils.structures import UserError
from utils.sweep.files import SweepFiles
from utils.sweep.objective import Caches, TrainingObjective
from utils.sweep.process import Request
from utils.sweep.progress import Pairs, Progress

DEFAULT_PROJECT = "runs/evolve"
_DEFAULT_EPOCHS = 300
_PRUNER = "asha"
_OPTIONS_FILE, _HYP_FILE, CONFIRM_NAME = "opt.yaml", "hyp.yaml", "confirm.json"
_FAILURES = "failures"  # a folder
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
    def trial_options(self) -> dict[str, Any]:
        """Of a trial, which knows nothing of the study."""
        return {**asdict(self.options), "evolve_storage": "", "bucket": ""}

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
    if "***" in begun.evolve_storage and given.evolve_storage == "":
        raise UserError(f"--resume: the study is in {begun.evolve_storage}; name it again with --evolve-storage")
    kept = {name: getattr(given, name) for name in changed if name in _WITH_RESUME and name not in ("project", "name")}
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


# ---- the work -----------------------------------------------------------------------------------------------------


def _worked(sweep: _Sweep) -> Path:
    options, folder = sweep.options, sweep.folder
    bucket = _bucket(sweep)
    storage = _storage(sweep)
    study = _study(sweep, storage)
    if sweep.speaks:
        write_yaml(folder / _OPTIONS_FILE, {**asdict(options), "evolve_storage": mask_password(options.evolve_storage)})
        write_yaml(folder / _HYP_FILE, sweep.plain_hyp)
    files = SweepFiles(
        folder=folder,
        study=study,
        hyp=sweep.plain_hyp,
        space=sweep.space,
        console=sweep.console,
        bucket=bucket,
        plots=not options.noplots,
    )
    caches = Caches()
    reached = _evolved(sweep, storage, study, files, caches)
    files.write(last=True)
    if not reached:
        sweep.console.note("other workers have the last trials, or were lost with them; whoever ends last goes on")
        return folder / HYP_NAME
    outcome = _confirmed(sweep, storage, study, caches)
    if outcome is not None:
        write_text(folder / CONFIRM_NAME, json.dumps(plain_verdict(outcome), indent=2) + "\n")
        comments = [line.removeprefix("# ") for line in confirmed_comments(outcome)]
        write_hyp(folder / HYP_NAME, {**sweep.plain_hyp, **outcome.winner.values}, comments)
        files.send()
    for line in _last_words(sweep, study, outcome):
        sweep.console.line(line)
    return folder / HYP_NAME


def _bucket(sweep: _Sweep) -> Bucket | None:
    if not sweep.options.bucket:
        return None
    bucket = Bucket(sweep.options.bucket)
    if sweep.speaks and bucket.fetch(sweep.folder):
        sweep.console.note(f"going on with the study of {bucket.shown}")
    return bucket


def _storage(sweep: _Sweep) -> Storage:
    options, folder = sweep.options, sweep.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--project {folder.parent}: cannot make {folder}: {error.strerror}") from None
    storage = open_storage(options.evolve_storage, folder, heartbeat_s=HEARTBEAT_S, grace_s=options.evolve_grace)
    if not storage.finds_lost:
        sweep.console.note(f"{storage.shown}: trials that are lost with their worker cannot be recognised in a journal")
    return storage


def _evolved(sweep: _Sweep, storage: Storage, study: Study, files: SweepFiles, caches: Caches) -> bool:
    """Whether all trials are done."""
    options = sweep.options
    hyp, judged_at = sweep.plain_hyp, rungs(options.epochs, options.evolve_pruner)
    progress = Progress(
        study=study,
        goal=sweep.goal,
        epochs=options.epochs,
        console=Console(quiet=options.quiet),
        wrote=files.write,
        headed=not sweep.speaks,
    )
    objective = TrainingObjective(
        request=lambda values: Request(
            options=sweep.trial_options, hyp={**hyp, **values}, rungs=judged_at, place=sweep.place
        ),
        progress=progress,
        caches=caches,
        check=partial(_refuse_other_work, sweep, study),
        failures=sweep.folder / _FAILURES,
        speaks=sweep.speaks,
        stop=sweep.stop,
    )
    worker = Worker(
        study=study,
        storage=storage,
        distributions=distributions(sweep.space),
        goal=sweep.goal,
        objective=objective,
        watch=progress,
        stop=sweep.stop,
    )
    return worker.work()


def _refuse_other_work(sweep: _Sweep, study: Study, work: Mapping[str, Any]) -> None:
    """Raises UserError where this worker's trials train something else than those of the study."""
    theirs = agreed(study, "work", dict(work))
    differ = [f"{name} there and here are not the same" for name, value in work.items() if theirs.get(name) != value]
    _refuse_difference(sweep, differ)


def _confirmed(sweep: _Sweep, storage: Storage, study: Study, caches: Caches) -> Verdict | None:
    """What is left of the best trials on fresh seeds; None where that is not wanted, or there is nothing to try."""
    options = sweep.options
    tried = candidates(finished_of(study), sweep.plain_hyp, options.evolve_confirm)
    if len(tried) == 1:
        return None
    seeds, epochs = fresh_seeds(options.seed, options.evolve_confirm_seeds), options.evolve_confirm_epochs
    epochs = epochs or options.epochs
    name = f"{options.name}: {len(tried)} of {sweep.goal} on {len(seeds)} seeds for {epochs} epochs"
    confirming = open_study(name, storage, sampler=PairSampler(len(tried), seeds), pruner=NopPruner())
    goal = len(tried) * len(seeds)
    sweep.console.line(
        f"\nThe default and the best {len(tried) - 1}, on {len(seeds)} fresh seed{'s' * (len(seeds) > 1)} each, "
        f"for {epochs} epochs:"
    )
    progress = Pairs(
        study=confirming,
        goal=goal,
        epochs=epochs,
        console=Console(quiet=options.quiet),
        names=[one.name for one in tried],
        headed=not sweep.speaks,
    )
    objective = TrainingObjective(
        request=lambda pair: Request(
            options={**sweep.trial_options, "seed": pair["seed"], "epochs": epochs},
            hyp={**sweep.plain_hyp, **tried[pair["candidate"]].values},
            rungs=(),
            place=sweep.place,
        ),
        progress=progress,
        caches=caches,
        check=partial(_refuse_other_work, sweep, study),
        failures=sweep.folder / _FAILURES,
        speaks=False,
        stop=sweep.stop,
    )
    worker = Worker(
        study=confirming,
        storage=storage,
        distributions=pairs(len(tried), seeds),
        goal=goal,
        objective=objective,
        watch=progress,
        stop=sweep.stop,
    )
    return verdict(tried, by_seed(finished_of(confirming), len(tried))) if worker.work() else None


# ---- last words ---------------------------------------------------------------------------------------------------


def _last_words(sweep: _Sweep, study: Study, outcome: Verdict | None) -> list[str]:
    trials = finished_of(study)
    winner = best(trials)
    if winner is None:
        failures = sweep.folder / _FAILURES
        told = f"; what they said: {failures}" if failures.is_dir() else ""
        return [f"\nNo trial is complete{told}"]
    lines = [f"\nBest of {len(trials)} trials: trial {winner.number}, fitness {winner.fitness:.4f}"]
    if outcome is not None:
        lines = ["", *table(outcome), *lines[1:]]
    elif sweep.options.evolve_confirm == 0:
        lines.append("Not confirmed on other seeds (--evolve-confirm 0): a part of that is luck")
    hyp = shlex.quote(str(sweep.folder / HYP_NAME))
    script = shlex.quote(str(from_here(PROJECT_ROOT / "train.py")))
    return [
        *lines,
        f"Hyperparameters, tables and pictures: {sweep.folder}",
        f"Train with them: {this_python()} {script} --data {shlex.quote(sweep.options.data)} --hyp {hyp}",
    ]


def _how_to_continue(sweep: _Sweep) -> str:
    script = shlex.quote(str(from_here(PROJECT_ROOT / "train.py")))
    folder = shlex.quote(str(sweep.folder))
    storage = " --evolve-storage URL" if "***" in mask_password(sweep.options.evolve_storage) else ""
    command = f"{this_python()} {script} --evolve {sweep.goal} --resume {folder}{storage}"
    return f"the trial under way will be run again; `{command}` goes on"
