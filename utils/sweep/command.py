"""What `train.py --evolve` does: one worker of a study whose trials are training runs.

Where a launcher has started several processes each is a worker of its own, on its own device; the first one tells what
all have in common.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import NopPruner
from optuna.study import Study
from optuna.trial import TrialState

from utils.config import PROJECT_ROOT
from utils.evolve import confirm
from utils.evolve.confirm import Candidate, PairSampler, Verdict
from utils.evolve.history import CONFIRMED, Finished, best, finished_of, is_lost
from utils.evolve.pruners import make_pruner, rungs
from utils.evolve.record import CSV_NAME, HYP_NAME, LOCK_NAME, PATIENCE_S, alone
from utils.evolve.samplers import distributions, make_sampler
from utils.evolve.storage import Storage, errors_named, open_storage
from utils.evolve.study import HEARTBEAT_S, Worker, agreed, open_study
from utils.files import from_here, this_python, write_text
from utils.launch import place
from utils.report.console import Console, SilentConsole
from utils.stopping import Interrupted, StopRequest
from utils.structures import RunError, UserError
from utils.sweep.files import CONFIRM_NAME, SweepFiles
from utils.sweep.identity import Work, differences, refuse
from utils.sweep.objective import Caches, TrainingObjective
from utils.sweep.options import OPTIONS_FILE, Sweep, flags_of_training, prepared, secrets_to_name, write_options
from utils.sweep.process import Request
from utils.sweep.progress import ConfirmProgress, Progress

_FAILURES = "failures"  # a folder


def evolve(values: Mapping[str, Any], stop: StopRequest) -> Path:
    """Work on a study until it is finished; the file of the best hyperparameters.

    Raises UserError before any trial for what a user can mend, and Interrupted when a signal asks to stop; the trial
    under way is taken up again by whoever works on the study next.
    """
    here = place()
    console = Console(quiet=bool(values.get("quiet"))) if here is None or here.rank == 0 else SilentConsole()
    sweep = prepared(dict(values), stop, console.note)
    try:
        storage = _storage(sweep, console)
        with errors_named(storage.shown), _removal_named(sweep.folder):
            return _Work(sweep, storage, console).done()
    except Interrupted as interrupted:
        raise Interrupted(interrupted.signum, _how_to_continue(sweep)) from None


@contextmanager
def _removal_named(folder: Path) -> Iterator[None]:
    """What goes wrong while the folder is no longer there, goes wrong for that."""
    try:
        yield
    except Exception:
        if not folder.is_dir():
            raise RunError(f"the folder of this sweep has been removed: {folder}") from None
        raise


def _storage(sweep: Sweep, console: Console) -> Storage:
    folder, grace = sweep.folder, sweep.options.evolve_grace
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--project {folder.parent}: cannot make {folder}: {error.strerror}") from None
    storage = open_storage(sweep.options.evolve_storage, folder, heartbeat_s=_heartbeat_s(sweep), grace_s=grace)
    if not storage.finds_lost:
        console.note(
            f"{storage.shown}: trials that are lost with their worker cannot be recognised in a journal; --resume runs "
            "all again that are under way"
        )
    return storage


def _heartbeat_s(sweep: Sweep) -> int:
    return min(max(sweep.options.evolve_grace // 3, 1), HEARTBEAT_S)


class _Work:
    """That of one worker, from the first trial to the last word."""

    def __init__(self, sweep: Sweep, storage: Storage, console: Console) -> None:
        self._sweep, self._storage, self._console = sweep, storage, console
        self._study, is_new = _study(sweep, storage)
        if sweep.speaks:
            write_options(sweep, anew=is_new)
        self._work = Work(sweep, self._study)
        self._caches = Caches()
        self._trial_console = Console(quiet=sweep.options.quiet or not sweep.speaks)  # each tells of its own trials
        self._files = SweepFiles(sweep, self._study, console, storage=storage.shown)

    def done(self) -> Path:
        """The file of the best hyperparameters, when there is nothing left to do."""
        sweep = self._sweep
        if sweep.options.resume is not None and not self._storage.finds_lost:
            self._storage.queue_running(self._study)
        try:
            if not self._evolved():
                self._console.note(
                    "the last trials are with other workers, or were lost with them: --resume runs them again"
                )
                return sweep.folder / HYP_NAME
            self._files.write(last=True)
            verdict = self._confirmed()
        finally:
            self._files.send()
        for line in _last_words(sweep, self._study, verdict):
            self._console.line(line)
        return sweep.folder / HYP_NAME

    def _evolved(self) -> bool:
        """Whether all trials are done."""
        options, hyp = self._sweep.options, self._sweep.plain_hyp
        judged_at = rungs(options.epochs, options.evolve_pruner)
        progress = Progress(
            goal=self._sweep.goal,
            epochs=options.epochs,
            grace_s=options.evolve_grace,
            console=self._trial_console,
            wrote=self._files.write,
        )

        def request(values: Mapping[str, Any]) -> Request:
            return Request(options=self._work.options, hyp={**hyp, **values}, rungs=judged_at, place=self._sweep.place)

        return self._work_on(
            self._study,
            self._sweep.goal,
            distributions(self._sweep.space),
            progress,
            request,
            speaks=self._sweep.speaks,
        )

    def _confirmed(self) -> Verdict | None:
        """What is left of the best trials on fresh seeds; None where that is not wanted, or there is nothing to try."""
        options = self._sweep.options
        tried = _candidates(self._sweep, self._study)
        if len(tried) == 1:
            return None
        seeds = confirm.fresh_seeds(options.seed, options.evolve_confirm_seeds)
        epochs, goal = options.evolve_confirm_epochs or options.epochs, len(tried) * len(seeds)
        study, tried = _confirming_study(self._sweep, self._storage, tried, seeds, epochs)
        self._console.line(
            f"\nThe default and the best {_trials(len(tried) - 1).removeprefix('1 ')}, "
            f"on {len(seeds)} fresh seed{'s' * (len(seeds) > 1)} each, for {epochs} epoch{'s' * (epochs > 1)}:"
        )
        progress = ConfirmProgress(
            goal=goal,
            epochs=epochs,
            grace_s=options.evolve_grace,
            console=self._trial_console,
            names=[one.name for one in tried],
        )

        def request(pair: Mapping[str, int]) -> Request:
            return Request(
                options={**self._work.options, "seed": pair["seed"], "epochs": epochs},
                hyp={**self._sweep.plain_hyp, **tried[pair["candidate"]].values},
                rungs=(),
                place=self._sweep.place,
            )

        if not self._work_on(study, goal, confirm.distributions(len(tried), seeds), progress, request):
            return None
        verdict = confirm.verdict(tried, confirm.by_seed(finished_of(study), len(tried)))
        self._keep(verdict)
        return verdict

    def _work_on(
        self,
        study: Study,
        goal: int,
        space: Mapping[str, BaseDistribution],
        progress: Progress,
        request: Callable[[Mapping[str, Any]], Request],
        *,
        speaks: bool = False,
    ) -> bool:
        progress.headed = not self._sweep.speaks
        objective = TrainingObjective(
            request=request,
            progress=progress,
            caches=self._caches,
            check=self._work.check,
            failures=self._sweep.folder / _FAILURES,
            speaks=speaks,
            stop=self._sweep.stop,
        )
        worker = Worker(
            study=study,
            storage=self._storage,
            distributions=space,
            goal=goal,
            objective=objective,
            watch=progress,
            stop=self._sweep.stop,
            heartbeat_s=_heartbeat_s(self._sweep),
        )
        return worker.work()

    def _keep(self, verdict: Verdict) -> None:
        """In the study, for hyp_evolved.yaml, and in a file of its own."""
        winner = verdict.winner
        self._study.set_user_attr(
            CONFIRMED,
            {
                "trials": len(finished_of(self._study)),
                "name": winner.name,
                "trial": winner.trial,
                "values": dict(winner.values),
                "comments": [line.removeprefix("# ") for line in confirm.comments(verdict)],
            },
        )
        plain = json.dumps(confirm.plain_verdict(verdict), indent=2) + "\n"
        write_text(self._sweep.folder / CONFIRM_NAME, plain)
        self._files.write()


# ---- studies ------------------------------------------------------------------------------------------------------


def _study(sweep: Sweep, storage: Storage) -> tuple[Study, bool]:
    """New or joined, and whether it is new. Raises UserError where it is another than this worker's.

    One that was never begun, for a mistake, is no obstacle.
    """
    with alone(sweep.folder / LOCK_NAME, patience_s=PATIENCE_S):  # several may begin it at once
        study = _opened(sweep, storage)
        differ, begun = differences(sweep, study), _is_begun(study)
        if differ and not begun:
            optuna.delete_study(study_name=study.study_name, storage=storage.backend)
            study = _opened(sweep, storage)
            differ = differences(sweep, study)
    refuse(sweep, differ)
    done, table = len(finished_of(study)), sweep.folder / CSV_NAME
    if not begun and table.exists() and len(table.read_text().splitlines()) > 1:
        raise UserError(
            f"{table} tells of trials that the study in {storage.shown} does not have; bring that back, or begin "
            "another study with --name"
        )
    if done > sweep.goal:
        raise UserError(f"--evolve {sweep.goal}: {done} trials are done already; name that many or more")
    return study, not begun


def _opened(sweep: Sweep, storage: Storage) -> Study:
    options = sweep.options
    sampler = make_sampler(options.evolve_sampler, sweep.space, seed=options.seed, parents=options.evolve_parents)
    return open_study(options.name, storage, sampler=sampler, pruner=make_pruner(options.evolve_pruner, options.epochs))


def _is_begun(study: Study) -> bool:
    """Whether a trial was run, or is now."""
    trials = study.get_trials(deepcopy=False)
    return any(trial.state != TrialState.WAITING and not is_lost(trial) for trial in trials)


def _candidates(sweep: Sweep, study: Study) -> list[Candidate]:
    most = sweep.options.evolve_confirm
    trials = finished_of(study)[: sweep.goal]
    return confirm.candidates(trials, sweep.plain_hyp, most)


def _confirming_study(
    sweep: Sweep, storage: Storage, tried: Sequence[Candidate], seeds: Sequence[int], epochs: int
) -> tuple[Study, list[Candidate]]:
    """The same for all that are to try the same; with the candidates as it has them."""
    plain = [vars(one) for one in tried]
    content = blake2b(json.dumps([plain, seeds, epochs]).encode(), digest_size=6).hexdigest()
    name = f"{sweep.options.name}: confirmation {content}"
    study = open_study(name, storage, sampler=PairSampler(len(tried), seeds), pruner=NopPruner())
    return study, [Candidate(**one) for one in agreed(study, "candidates", plain)]


# ---- last words ---------------------------------------------------------------------------------------------------


def _last_words(sweep: Sweep, study: Study, verdict: Verdict | None) -> list[str]:
    trials = finished_of(study)
    winner = best(trials)
    if winner is None:
        failures = sweep.folder / _FAILURES
        said = f"{sweep.folder / CSV_NAME} says why{f', {failures} at length' if failures.is_dir() else ''}"
        return [f"\nNo trial is complete, so there are no hyperparameters to recommend; {said}"]
    words = [*flags_of_training(sweep.options), "--hyp", str(sweep.folder / HYP_NAME)]
    script = shlex.quote(str(from_here(PROJECT_ROOT / "train.py")))
    return [
        "",
        *(confirm.table(verdict) if verdict is not None else _unconfirmed(winner, len(trials))),
        f"Hyperparameters, tables and pictures: {sweep.folder}",
        f"Train with them: {this_python()} {script} {shlex.join(words)}",
    ]


def _unconfirmed(winner: Finished, trials: int) -> list[str]:
    told = [f"Best of {_trials(trials)}: trial {winner.number}, fitness {winner.fitness:.4f}"]
    if trials > 1:
        told.append("Not confirmed on other seeds: a part of that is luck")
    return told


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"


def _how_to_continue(sweep: Sweep) -> str:
    if not (sweep.folder / OPTIONS_FILE).exists():
        return "no trial was begun: the same command starts anew"
    script = shlex.quote(str(from_here(PROJECT_ROOT / "train.py")))
    folder = shlex.quote(str(sweep.folder))
    command = f"{this_python()} {script} --evolve {sweep.goal} --resume {folder}{secrets_to_name(sweep.options)}"
    return f"the trial under way will be run again; `{command}` goes on"
