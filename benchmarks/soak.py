"""`make soak`: runs are killed at random moments, go on, and must end as runs that nobody touched, to the last bit.

    python -m benchmarks.soak [--kills 50] [--seed 0] [--jobs 2] [--only VARIANT] [--quick] [--out FILE]

A round starts a real train.py, ends it by SIGKILL, or every seventh time by a signal that asks it to stop, resumes it,
and compares weights, average, optimizer, best.pt, results.csv and metrics.json. Nothing may hang, no process may live
on, no file may be left over. What is trained stands in soak_cases.py, when it is struck in soak_moments.py.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.results import FOLDER, describe_machine, table, write_json
from benchmarks.soak_cases import QUICK, VARIANTS, Scene, Variant, draw
from benchmarks.soak_moments import Facts
from benchmarks.soak_process import Watched, train_command
from benchmarks.soak_round import RUN, Blow, Plan, Story, play, undisturbed

_KILLS = ("any", "checkpoint", "training", "evaluation", "scan", "checkpoint", "any", "cache", "training", "evaluation")
_STOPS = (
    Blow(moment="under way", signum=signal.SIGTERM, group=False),
    Blow(moment="under way", signum=signal.SIGINT),
    Blow(moment="under way", signum=signal.SIGUSR1),
    Blow(moment="under way", signum=signal.SIGINT, twice=True),
    Blow(moment="under way", signum=signal.SIGTERM),
    Blow(moment="under way", signum=signal.SIGINT, group=False),
    Blow(moment="training", signum=signal.SIGUSR1, group=False),
)
_STOPS_EVERY = 7  # rounds
_AGAIN = ("any", "checkpoint", "training", "evaluation", "scan")  # for a second kill
_AGAIN_SHARE, _DAMAGES_SHARE = 0.3, 0.2  # of the rounds
_QUICK = ("training", "checkpoint", "evaluation")


def main(argv: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(argv)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as behind a shell's `&`, and processes would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    variants = [QUICK] if flags.quick else [one for one in VARIANTS if flags.only in ("", one.name)]
    if not variants:
        names = ", ".join(one.name for one in VARIANTS)
        print(f"soak: error: --only {flags.only} names no variant; there is: {names}", file=sys.stderr)
        return 2
    machine = describe_machine() | {"jobs": flags.jobs}
    print(f"{machine['cpu']}, {machine['cores']} cores, {flags.jobs} runs at a time, commit {machine['commit']}")
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    plans = _quick_plans() if flags.quick else plans_of(flags.kills, variants, flags.seed)
    try:
        stories = _played(plans, folder, flags)
    finally:
        for process in list(Watched.running):
            process.clear()
    seconds = time.monotonic() - started
    bad = [story for story in stories if story.problems]
    print(f"\n{_summary('moment', stories)}\n\n{_summary('variant', stories)}\n")
    landed = sum(len(story.landed) for story in stories)
    print(f"{len(stories)} runs were struck {landed} times in {seconds:.0f} s; {len(bad)} did not end the same")
    out = Path(flags.out) if flags.out else FOLDER / ("soak-quick.json" if flags.quick else "soak.json")
    content = {"machine": machine, "seed": flags.seed, "seconds": round(seconds), "struck": landed, "bad": len(bad)}
    write_json(out, content | {"rounds": [story.as_json() for story in stories]})
    print(f"All rounds: {out}")
    if bad:
        print(f"Their folders are kept: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="runs to strike (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done; when it is depends on time as well")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="runs at a time, on a thread each (default: 2)"
    )
    parser.add_argument("--only", default="", metavar="VARIANT", help="one of those in benchmarks/soak_cases.py")
    parser.add_argument("--quick", action="store_true", help="three kills of a small run")
    parser.add_argument("--out", default="", metavar="FILE", help="default: benchmarks/results/soak.json")
    return parser


# ---- what to do -----------------------------------------------------------------------------------------------------


def plans_of(kills: int, variants: Sequence[Variant], seed: int) -> list[Plan]:
    """As many rounds, over all moments and variants."""
    rng = Random(seed)
    turns, caching, scanned = (_turns(rng, part) for part in _kinds(variants))
    moments, stops = itertools.cycle(_KILLS), itertools.cycle(_STOPS)
    plans = []
    for number in range(1, kills + 1):
        kill = Blow(moment=next(moments), group=rng.random() < 0.5)
        first = kill if number % _STOPS_EVERY else next(stops)
        source = {"scan": scanned, "cache": rng.choice([caching, caching, turns])}.get(first.moment, turns)
        again = [Blow(moment=rng.choice(_AGAIN), group=rng.random() < 0.5)] if rng.random() < _AGAIN_SHARE else []
        damages = rng.random() < _DAMAGES_SHARE and (not again or first.kills)
        plans.append(Plan(number=number, variant=next(source), blows=[first, *again], damages=damages))
    return plans


def _kinds(variants: Sequence[Variant]) -> list[Sequence[Variant]]:
    """All, those that cache images, and those whose scan takes a while; all where there are none of a kind."""
    caching = [one for one in variants if one.caches_images]
    scanned = [one for one in variants if one.data == "many"]
    return [variants, caching or variants, scanned or variants]


def _turns(rng: Random, variants: Sequence[Variant]) -> Iterable[Variant]:
    """Without end, each as often as any other."""
    while True:
        yield from rng.sample(variants, len(variants))


def _quick_plans() -> list[Plan]:
    return [
        Plan(number=number, variant=QUICK, blows=[Blow(moment=moment, group=number != 1)])
        for number, moment in enumerate(_QUICK, start=1)
    ]


# ---- doing it -------------------------------------------------------------------------------------------------------


def _played(plans: Sequence[Plan], folder: Path, flags: argparse.Namespace) -> list[Story]:
    (folder / "shared").mkdir()
    draw(folder / "shared", quick=flags.quick)
    scene = Scene(folder=folder / "shared", weights=None)
    if not flags.quick:
        scene = _taught(scene)
    variants = list(dict.fromkeys(plan.variant.name for plan in plans))
    by_name = {plan.variant.name: plan.variant for plan in plans}
    with ThreadPoolExecutor(flags.jobs) as pool:
        try:
            facts = dict(zip(variants, pool.map(lambda name: _reference(by_name[name], scene, folder), variants)))
            print(f"\n{len(plans)} runs to strike")
            rounds = [pool.submit(_round, plan, scene, facts, folder, flags.seed) for plan in plans]
            for done in as_completed(rounds):
                _tell(done.result(), len(plans))
            return [done.result() for done in rounds]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(Watched.running):
                process.clear()
            raise


def _taught(scene: Scene) -> Scene:
    """With weights that see something."""
    folder = scene.folder / "taught"
    folder.mkdir()
    process = Watched(train_command(*scene.flags_for_weights(), "--name", "start", "--workers", "0"), folder, 0)
    if process.end(600):
        raise RuntimeError(f"the run for the first weights failed: {process.errors}")
    print(f"first weights: {process.age:.1f} s")
    return Scene(folder=scene.folder, weights=scene.folder / "start" / "weights" / "best.pt")


def _reference(variant: Variant, scene: Scene, folder: Path) -> Facts:
    facts = undisturbed(variant, scene, _reference_folder(folder, variant))
    print(f"undisturbed: {variant.name}, {facts.seconds:.1f} s", flush=True)
    return facts


def _reference_folder(folder: Path, variant: Variant) -> Path:
    return folder / "undisturbed" / variant.name.replace(" ", "-")


def _round(plan: Plan, scene: Scene, facts: dict[str, Facts], folder: Path, seed: int) -> Story:
    own, rng = folder / f"{plan.number:03d}", Random(f"{seed} {plan.number}")
    story = play(plan, scene, _reference_folder(folder, plan.variant) / RUN, facts[plan.variant.name], own, rng)
    if not story.problems:
        shutil.rmtree(own)
    return story


def _tell(story: Story, rounds: int) -> None:
    head = f"[{story.plan.number:>{len(str(rounds))}}/{rounds}] {story.plan.variant.name}"
    print(f"{head}: {'; '.join(story.steps)}: {story.verdict} ({story.seconds:.1f} s)", flush=True)


def _summary(by: str, stories: Sequence[Story]) -> str:
    """Rounds, blows that landed, and rounds that ended the same, by variant or by the moment of the first blow."""

    def group(story: Story) -> str:
        return story.plan.variant.name if by == "variant" else str(story.plan.blows[0]).removesuffix(" (main alone)")

    rows: list[list[Any]] = []
    for name in sorted({group(story) for story in stories}):
        mine = [story for story in stories if group(story) == name]
        landed = sum(len(story.landed) for story in mine)
        rows.append([name, str(len(mine)), str(landed), str(sum(not story.problems for story in mine))])
    return table([by, "rounds", "struck", "identical"], rows)


if __name__ == "__main__":
    sys.exit(main())
