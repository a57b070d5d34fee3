"""Two ranks in `make soak`: one of them is killed, the launcher starts both again, and nobody can tell.

    python -m benchmarks.soak_ranks [--kills 20] [--seed 0] [--jobs 2] [--out FILE]

A round starts a real train.py by torch's launcher with two ranks, kills one of them by SIGKILL at a random moment, in
some rounds another one later, waits for the end, and compares weights, average, optimizer, best.pt,
results.csv and metrics.json with those of an undisturbed run of two ranks. No process may live on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.results import FOLDER, describe_machine, write_json
from benchmarks.soak_cases import VARIANTS, Scene, Variant, draw
from benchmarks.soak_process import Hung, Watched
from benchmarks.soak_round import RUN, verdict
from benchmarks.soak_sameness import differences, unfinished

_RANKS = 2
_NAMES = ("plain", "image weights", "rect", "accumulation", "saves always", "cache ram", "noval", "quad")
_EPOCHS = 24  # so that a run takes longer than its start
_TWICE = 0.3  # of the rounds have a second kill
_ORPHANS_S = 15


@dataclass(kw_only=True)
class Story:
    """What a round did, and what was wrong with it."""

    number: int
    variant: str
    steps: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    killed: int = 0

    @property
    def verdict(self) -> str:
        return verdict(self.problems, struck=self.killed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="soak_ranks", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="runs to strike (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done; when it is depends on time as well")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--out", default="", metavar="FILE", help="default: benchmarks/results/soak-ranks.json")
    flags = parser.parse_args(argv)
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    machine = describe_machine() | {"jobs": flags.jobs}
    try:
        stories = _played(folder, flags)
    finally:
        for process in list(Watched.running):
            _clear(process, folder)
    bad = [story for story in stories if story.problems]
    killed, seconds = sum(story.killed for story in stories), time.monotonic() - started
    told = f"{len(stories)} runs of {_RANKS} ranks lost one {killed} times in {seconds:.0f} s"
    print(f"{told}; {len(bad)} did not end the same")
    rounds: list[dict[str, Any]] = [vars(story) | {"verdict": story.verdict} for story in stories]
    content = {"machine": machine, "seed": flags.seed, "seconds": round(seconds), "killed": killed, "bad": len(bad)}
    write_json(Path(flags.out) if flags.out else FOLDER / "soak-ranks.json", content | {"rounds": rounds})
    if bad:
        print(f"Their folders are kept: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if bad else 0


def _played(folder: Path, flags: argparse.Namespace) -> list[Story]:
    shared, rng = folder / "shared", Random(flags.seed)
    shared.mkdir()
    draw(shared, quick=True)
    scene, known = Scene(folder=shared, weights=None), {variant.name: variant for variant in VARIANTS}
    chosen = [replace(known[_NAMES[number % len(_NAMES)]], epochs=_EPOCHS) for number in range(flags.kills)]
    with ThreadPoolExecutor(flags.jobs) as pool:
        variants = list({one.name: one for one in chosen}.values())
        took = dict(
            zip((one.name for one in variants), pool.map(lambda one: _undisturbed(one, scene, folder), variants))
        )
        print(f"undisturbed runs: {min(took.values()):.0f} to {max(took.values()):.0f} s", flush=True)
        seeds = [rng.random() for _ in chosen]
        rounds = zip(range(1, flags.kills + 1), chosen, seeds)
        return list(pool.map(lambda one: _round(*one, scene, folder, took), rounds))


def _command(variant: Variant, scene: Scene, folder: Path, *, restarts: int, workers: int) -> list[str]:
    flags = scene.write_settings(variant, folder, f"ranks{folder.name}")
    launcher = ["--standalone", "--nproc_per_node", str(_RANKS), "--max-restarts", str(restarts)]
    run = ["train.py", *flags, "--name", RUN, "--workers", str(workers)]
    return [sys.executable, "-m", "torch.distributed.run", *launcher, *run]


def _undisturbed(variant: Variant, scene: Scene, folder: Path) -> float:
    """Its seconds. Raises RuntimeError when it fails."""
    own = _reference(folder, variant)
    own.mkdir(parents=True)
    process = Watched(_command(variant, scene, own, restarts=0, workers=1), own, 0)
    if process.end(600):
        raise RuntimeError(f"{variant.name}, undisturbed: {process.errors.strip()[-500:]}")
    return process.age


def _reference(folder: Path, variant: Variant) -> Path:
    return folder / "undisturbed" / variant.name.replace(" ", "-")


def _round(number: int, variant: Variant, seed: float, scene: Scene, folder: Path, took: dict[str, float]) -> Story:
    story, rng, own = Story(number=number, variant=variant.name), Random(seed), folder / f"{number:03d}"
    own.mkdir()
    process = Watched(_command(variant, scene, own, restarts=5, workers=rng.choice([0, 1, 2])), own, 0)
    try:
        for _ in range(2 if rng.random() < _TWICE else 1):
            if process.lives_for(rng.uniform(0.2, 0.7) * took[variant.name]):
                _kill_one(process, rng, story)
        code = process.end(120 + 10 * took[variant.name])
        story.problems += [f"exit code {code}: {process.errors.strip()[-300:]}"] if code else []
        story.problems += differences(own / RUN, _reference(folder, variant) / RUN)
        story.problems += [f"left {name}" for name in unfinished(own / RUN)]
    except (Hung, OSError) as fault:
        story.problems.append(str(fault))
    left = _living(own, seconds=_ORPHANS_S)
    story.problems += [f"process {pid} lives on" for pid in left]
    _clear(process, own)
    print(f"[{number}] {variant.name}: {'; '.join(story.steps)}: {story.verdict}", flush=True)
    if not story.problems:
        shutil.rmtree(own)
    return story


def _kill_one(process: Watched, rng: Random, story: Story) -> None:
    """One of its ranks, if there are any just now."""
    ranks = [pid for pid in _children(process.pid) if b"train.py" in _read(f"/proc/{pid}/cmdline")]
    if not ranks:
        return
    victim = rng.choice(ranks)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        story.killed += 1
        story.steps.append(f"rank {ranks.index(victim)} killed at {process.age:.1f} s")


def _children(pid: int) -> list[int]:
    return sorted(map(int, _read(f"/proc/{pid}/task/{pid}/children").split()))


def _read(path: str) -> bytes:
    with suppress(OSError):
        return Path(path).read_bytes()
    return b""


def _living(folder: Path, *, seconds: float) -> list[int]:
    """Processes that still work in a folder after so long; each has it on its command line."""
    deadline = time.monotonic() + seconds
    while True:
        commands = {int(path.parent.name): _read(str(path)) for path in Path("/proc").glob("[0-9]*/cmdline")}
        left = [pid for pid, command in commands.items() if f"{folder}/".encode() in command]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _clear(process: Watched, folder: Path) -> None:
    process.clear()
    for pid in _living(folder, seconds=0):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
