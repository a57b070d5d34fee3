"""One round of the soak test: a run is struck, once or more often, goes on, and must end as the one nobody struck."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.soak_cases import Scene, Variant
from benchmarks.soak_moments import MOMENTS, Facts
from benchmarks.soak_process import Hung, Watched, train_command
from benchmarks.soak_sameness import differences, position, unfinished

RUN = "run"  # the name of every run
_TRIES = 4  # to strike before the run is over
_ORPHANS_S = 15  # torch's loader processes look every 5 s whether their parent is there
_LEAVING_S = 10  # that a signal may take
_AT_ONCE_S = 2  # and a second Ctrl-C
_COMMAND = re.compile(r"train\.py: interrupted( by SIG\w+)?(; continue with: (?P<command>.+))?")
_NOT_YET = "stopping as soon as this step is done; a second Ctrl-C does not wait for it"
_AT_ONCE = "left at once"
_RESUMED = re.compile(r"Resuming \S+ after epoch (\d+) of \d+(?: and batch (\d+) of the next)?")


@dataclass(frozen=True, kw_only=True)
class Blow:
    """A signal at a moment; `twice` sends it again a little later."""

    moment: str
    signum: int = signal.SIGKILL
    group: bool = True  # the whole group of processes, else the main one alone
    twice: bool = False

    @property
    def kills(self) -> bool:
        return self.signum == signal.SIGKILL

    def __str__(self) -> str:
        name = "" if self.kills else f" {signal.Signals(self.signum).name}{' twice' * self.twice}"
        return f"{self.moment}{name}{'' if self.group else ' (main alone)'}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a round does. `damages`: after the last blow, last.pt is damaged as well."""

    number: int
    variant: Variant
    blows: Sequence[Blow]
    damages: bool = False


@dataclass(kw_only=True)
class Story:
    """What a round did, and what was wrong with it."""

    plan: Plan
    steps: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    landed: list[str] = field(default_factory=list)  # moments of the blows
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return verdict(self.problems, struck=bool(self.landed))

    def as_json(self) -> dict[str, Any]:
        return {
            "round": self.plan.number,
            "variant": self.plan.variant.name,
            "blows": [str(blow) for blow in self.plan.blows],
            "landed": self.landed,
            "steps": self.steps,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 2),
        }


def verdict(problems: Sequence[str], *, struck: bool) -> str:
    if problems:
        return "DIFFERS: " + "; ".join(problems)
    return "identical" if struck else "never struck"


class _Round:
    def __init__(self, plan: Plan, scene: Scene, reference: Path, facts: Facts, folder: Path, rng: Random) -> None:
        self.plan, self.scene, self.reference, self.folder, self.rng = plan, scene, reference, folder, rng
        self.run = folder / RUN
        self.last, self.previous = (self.run / "weights" / name for name in ("last.pt", "previous.pt"))
        self.stem = f"soak{plan.number:03d}x{rng.randrange(16**6):06x}"
        self.facts = replace(
            facts,
            weights=self.last.parent,
            caches=folder / "caches",
            stem=self.stem,
            caches_images=plan.variant.caches_images,
        )
        self.story = Story(plan=plan)
        self.processes: list[Watched] = []
        self.killed: set[Watched] = set()  # whose loader processes may complain
        self.expected = ""  # where the next process should say that it resumes

    def play(self) -> Story:
        started = time.monotonic()
        try:
            for _ in range(_TRIES):
                self._clear()
                self._train()
                if self.story.landed or self.story.problems:
                    break
            self._judge()
        except Hung as hung:
            self.story.problems.append(str(hung))
        finally:
            for process in self.processes:
                process.clear()
        self.story.seconds = time.monotonic() - started
        return self.story

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.processes.clear()
        self.story.steps.clear()
        flags = self.scene.write_settings(self.plan.variant, self.folder, self.stem)
        self.begin = train_command(*flags, "--name", RUN, "--exist-ok", "--workers", str(self.rng.choice([0, 1, 2])))

    def _train(self) -> None:
        """Until the run is finished, whatever strikes it."""
        command: list[str] | None = self.begin
        for blow in self.plan.blows:
            command = self._struck(command, blow)
            if command is None:
                return
        self._finished(self._start(command))

    def _start(self, command: Sequence[str]) -> Watched:
        if self.plan.variant.caches_images:  # orphans share a killed run's lock on images in memory, which stay with it
            for process in self.killed:
                process.survivors(_ORPHANS_S)
        process = Watched(command, self.folder, len(self.processes))
        self.processes.append(process)
        return process

    # ---- blows ------------------------------------------------------------------------------------------------------

    def _struck(self, command: Sequence[str], blow: Blow) -> list[str] | None:
        """How to go on after a blow; None where the run was finished before, or by it."""
        if blow.moment == "scan":
            shutil.rmtree(self.facts.caches, ignore_errors=True)
        process = self._start(command)
        if not MOMENTS[blow.moment](process, self.facts, self.rng):
            self._finished(process)
            return None
        age = process.age
        after = self._killed(process, blow) if blow.kills else self._stopped(process, blow)
        self._check_resumed(process)
        last = blow is self.plan.blows[-1]
        if last and self.plan.damages and self.previous.exists():
            _flip_a_byte(self.last)
        left = f", unfinished {' '.join(half)}" if (half := unfinished(self.run, self.facts.caches)) else ""
        where = f"last.pt {position(self.last)}, previous.pt {position(self.previous)}{left}"
        self.story.steps.append(f"{blow} at {age:.2f} s: {where}")
        self.expected = next((at for at in map(position, (self.last, self.previous)) if "+" in at), "")
        if (self.run / "metrics.json").exists():
            return None
        return after

    def _killed(self, process: Watched, blow: Blow) -> list[str]:
        process.kill(group=blow.group)
        self.killed.add(process)
        self.story.landed.append(blow.moment)
        if not self.last.exists():
            return self.begin
        workers = ["--workers", str(self.rng.choice([0, 1, 2]))] if self.rng.random() < 0.5 else []
        return train_command("--resume", str(self.last), *workers)

    def _stopped(self, process: Watched, blow: Blow) -> list[str] | None:
        """As its last words say."""
        process.send(blow.signum, group=blow.group)
        if blow.twice:
            process.lives_for(self.rng.uniform(0.01, 0.2))
            process.send(blow.signum, group=blow.group)
        asked = time.monotonic()
        code = process.end(60)
        took, most = time.monotonic() - asked, _AT_ONCE_S if blow.twice else _LEAVING_S
        if code in (0, -blow.signum) and (self.run / "metrics.json").exists():  # it came too late
            return None
        self.story.landed.append(str(blow))
        self._expect(code == 128 + blow.signum, f"exit code {code} after {blow}")
        self._expect(took <= most, f"{took:.1f} s to leave after {blow}")
        command = self._last_words(process, blow)
        self._expect(command or "Epoch " not in process.shown, f"no command to continue after {blow}")
        if not (blow.twice and _AT_ONCE in process.errors):  # else what it was at stays half done
            self._check_ended(process)
            self._leaves_nothing()
        return command or self.begin

    def _last_words(self, process: Watched, blow: Blow) -> list[str] | None:
        """The command that they name."""
        lines = [line for line in process.errors.splitlines() if line.strip() and line != _NOT_YET]
        if blow.twice and _AT_ONCE in lines:
            self._expect(lines == [_AT_ONCE], f"said {lines}")
            return train_command("--resume", str(self.last)) if self.last.exists() else self.begin
        said = _COMMAND.fullmatch(lines[0]) if len(lines) == 1 else None
        self._expect(said, f"said {lines} after {blow}")
        return shlex.split(said["command"]) if said and said["command"] else None

    # ---- ends -------------------------------------------------------------------------------------------------------

    def _finished(self, process: Watched) -> None:
        code = process.end(60 + 10 * self.facts.seconds)
        self._expect(code == 0, f"exit code {code}: {process.errors.strip()[-300:]}")
        self._expect(not process.errors.strip() or code, f"said {process.errors.strip()[-300:]}")
        self._check_resumed(process)
        self._check_ended(process)

    def _check_resumed(self, process: Watched) -> None:
        """Where it says it does."""
        said = _RESUMED.search(process.shown)
        if said:
            at = f"{said[1]}+{said[2] or 0}"
            self.story.steps.append(f"resumed at {at}")
            self._expect(at == self.expected, f"resumed at {at}, not at {self.expected}")

    def _check_ended(self, process: Watched) -> None:
        """By itself, so nothing of it may be there any more."""
        left = [*process.survivors(1), *process.left_in_memory(), *(path.name for path in process.temporary.iterdir())]
        self._expect(not left, f"left {', '.join(left)}")

    def _judge(self) -> None:
        for process in self.processes:
            left = [*process.survivors(_ORPHANS_S), *process.left_in_memory()]
            self._expect(not left, f"orphans {', '.join(left)}")
            quiet = process in self.killed or "Traceback" not in process.errors
            self._expect(quiet, f"a traceback: {process.errors.strip()[-300:]}")
        self._leaves_nothing()
        for problem in differences(self.run, self.reference):
            self._expect(False, problem)

    def _leaves_nothing(self) -> None:
        left = unfinished(self.run, self.facts.caches)
        left += [path.name for path in Path("/dev/shm").glob(f"*{self.stem}*")]
        self._expect(not left, f"left {', '.join(left)}")

    def _expect(self, holds: object, problem: str) -> None:
        if not holds and problem not in self.story.problems:
            self.story.problems.append(problem)


def play(plan: Plan, scene: Scene, reference: Path, facts: Facts, folder: Path, rng: Random) -> Story:
    """A round, in an empty folder of its own, against the run folder `reference` of which `facts` are known."""
    return _Round(plan, scene, reference, facts, folder, rng).play()


def undisturbed(variant: Variant, scene: Scene, folder: Path) -> Facts:
    """A run of a variant in an empty folder, its files below `RUN`. Raises RuntimeError when it fails."""
    folder.mkdir(parents=True)
    flags = scene.write_settings(variant, folder, "reference")
    process = Watched(train_command(*flags, "--name", RUN, "--workers", str(variant.workers)), folder, 0)
    code, seconds = process.end(600), process.age
    if code or process.errors.strip():
        raise RuntimeError(f"{variant.name}, undisturbed: exit code {code}: {process.errors.strip()}")
    return Facts(**Facts.of(process, seconds))


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.unlink()  # previous.pt may be another name of the same file
    path.write_bytes(content)
