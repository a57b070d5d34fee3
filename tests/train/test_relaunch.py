"""Which run a launcher goes on with when it starts its ranks again."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from utils.config import TrainOptions
from utils.launch import Place
from utils.ranks import Ranks
from utils.run_folder import METRICS_FILE, RunFolder
from utils.train.relaunch import Launch


class Started(Ranks):
    """Ranks on hosts whose launches have these names."""

    def __init__(self, *names: str, restarts: int = 0) -> None:
        self.place = Place(
            rank=0,
            ranks=2,
            local_rank=0,
            local_ranks=1,
            launch=names[0],
            master=("here", 1),
            served=True,
            restarts=restarts,
            ours=False,
        )
        self._launches = names

    def gather(self, value):
        return list(self._launches)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/train"


def launch(*names: str, restarts: int = 0, **options) -> Launch:
    return Launch.of(Started(*names, restarts=restarts), replace(TrainOptions(), **options))


def run_of(begun: Launch, name: str, *, saved: bool = True, finished: bool = False, age: int = 0) -> RunFolder:
    run = RunFolder(Path("runs/train") / name)
    run.last.parent.mkdir(parents=True)
    begun.note_in(run)
    os.utime(run.path / "launch.json", (10**9 - age, 10**9 - age))
    if saved:
        run.last.touch()
    if finished:
        (run.path / METRICS_FILE).touch()
    return run


def test_a_launch_finds_the_run_that_it_began(here):
    run_of(launch("monday"), "exp")
    run_of(launch("tuesday"), "exp2", saved=False)
    run_of(launch("monday"), "other")
    found = launch("monday").begun()
    assert (found.path.name, found.saved) == ("exp", True)
    assert (launch("tuesday").begun().path.name, launch("tuesday").begun().saved) == ("exp2", False)
    assert launch("wednesday").begun() is None


def test_other_options_are_another_run(here):
    run_of(launch("monday", epochs=3), "exp")
    assert launch("monday", epochs=4).begun() is None
    assert launch("monday", epochs=3, freeze=(1, 2)).begun() is None
    assert launch("monday", epochs=3).begun() is not None


def test_hosts_may_come_and_go_without_a_name_that_all_know(here):
    run = run_of(launch("a-1", "b-2"), "exp")
    later = launch("b-2", "c-3")
    assert later.begun().path.name == "exp"
    later.note_in(run)
    assert json.loads((run.path / "launch.json").read_text())["launches"] == ["a-1", "b-2", "c-3"]
    assert launch("c-3").begun().path.name == "exp"
    assert launch("d-4").begun() is None


def test_a_finished_run_is_gone_on_with_only_by_ranks_that_were_started_again(here):
    """Its last words may have been cut off; a name that is used again another day means another run."""
    run_of(launch("monday"), "exp", finished=True)
    assert launch("monday").begun() is None
    assert launch("monday", restarts=1).begun().path.name == "exp"
    run_of(launch("monday"), "exp2", age=1000)
    assert launch("monday", restarts=1).begun().path.name == "exp2"


def test_of_several_the_newest_goes_on(here):
    run_of(launch("monday"), "exp", age=100)
    run_of(launch("monday"), "exp3", age=50)
    run_of(launch("monday"), "exp2", age=70)
    assert launch("monday").begun().path.name == "exp3"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"launches": "monday"}'])
def test_files_that_say_nothing_are_of_no_launch(here, content):
    run = run_of(launch("monday"), "exp")
    (run.path / "launch.json").write_text(content)
    assert launch("monday").begun() is None


def test_without_a_launcher_nothing_is_looked_for_or_written(here):
    alone = Launch.of(Ranks(), TrainOptions())
    run = run_of(launch("monday"), "exp")
    (run.path / "launch.json").unlink()
    alone.note_in(run)
    assert alone.begun() is None
    assert not (run.path / "launch.json").exists()
