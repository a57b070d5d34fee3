"""Ranks under torch's own launcher: they die, come again and go, and the run ends as if nothing had happened."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from tests.conftest import ROOT
from tests.groups import in_places
from utils.checkpoint import load_checkpoint, weights_digest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks of a launcher in /proc")
EPOCHS = 16
PATIENCE_S = 240  # with machines that are busy


@pytest.fixture
def launch(start):
    """Starts train.py by torch's launcher: `launch(launcher_flags, train_flags)`."""

    def launched(launcher: list[str], train: list[str]) -> subprocess.Popen:
        return start(None, "-m", "torch.distributed.run", *launcher, *train)

    return launched


def script(*flags: str) -> list[str]:
    return [str(ROOT / "train.py"), *flags]


def options(tiny, name: str, **changes) -> dict:
    return tiny.options(**{"epochs": EPOCHS, "name": name, "save_every": 0.001, "workers": 1, **changes})


def flags(tiny, name: str, **changes) -> list[str]:
    return tiny.flags(**options(tiny, name, **changes))


def calm_run(options: dict) -> None:
    train.run(**options)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def ranks_of(agent: subprocess.Popen) -> list[int]:
    """The processes of an agent's ranks, in their order."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes())


def wait_until(what, *agents: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        for agent in agents:
            assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def epochs_of(name: str) -> int:
    results = Path("runs/train", name, "results.csv")
    return max(results.read_text().count("\n") - 1, 0) if results.exists() else 0


def end_of(name: str) -> tuple:
    """What is promised to be the same."""
    folder = Path("runs/train", name)
    last = load_checkpoint(folder / "weights/last.pt")
    digests = weights_digest(last), weights_digest(load_checkpoint(folder / "weights/best.pt"))
    kept = {key: last[key] for key in ("epoch", "batch", "best_fitness", "best_epoch", "class_maps", "ema_updates")}
    return digests, kept, [(folder / file).read_bytes() for file in ("results.csv", "metrics.json")]


def test_ranks_that_are_killed_come_again_and_nobody_can_tell(tiny, launch):
    """Rank 1, and later rank 0; torch calls a launch like this one "none", as it does any other."""
    port = ["--master_port", free_port()]
    struck = launch([*port, "--nproc_per_node", "2", "--max-restarts", "2"], script(*flags(tiny, "struck")))
    for rank, after in ((1, 1), (0, 4)):
        wait_until(lambda after=after: epochs_of("struck") >= after and len(ranks_of(struck)) == 2, struck)
        os.kill(ranks_of(struck)[rank], signal.SIGKILL)
    said, problems = (text.decode() for text in struck.communicate(timeout=PATIENCE_S))
    assert struck.returncode == 0, problems
    assert said.count("note: going on with ") == 2
    for rank in (0, 1):
        line = rf"train\.py: error: rank {rank} \(.*, pid \d+\) is gone; its last step was batch [12] of epoch \d+; con"
        assert len(re.findall(line, problems)) == 1
    in_places(2, calm_run, options(tiny, "calm"))
    assert end_of("struck") == end_of("calm")
    assert sorted(path.name for path in Path("runs/train").iterdir()) == ["calm", "struck"]


def test_a_machine_may_go(tiny, launch):
    """Two launchers stand for two machines; the one that does not keep the list of them is stopped."""
    endpoint, quick = f"localhost:{free_port()}", "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=4"
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "pair", "--max-restarts", "3"]
    run = script(*flags(tiny, "pair", epochs=10))
    stays, goes = (
        launch([*meeting, "--nnodes", "1:2", "--nproc_per_node", "1", "--rdzv_conf", f"{quick},is_host={host}"], run)
        for host in (1, 0)
    )
    wait_until(lambda: epochs_of("pair") >= 1, stays, goes)
    goes.terminate()
    goes.communicate(timeout=PATIENCE_S)
    said, problems = (text.decode() for text in stays.communicate(timeout=PATIENCE_S))
    assert stays.returncode == 0, problems
    assert "2 ranks of CPU" in said
    assert re.search(r"note: the run was saved on 2 ranks of CPU .*; this is CPU ", said)
    assert re.search(r"Epochs \d+ to 10 in", said)
    assert epochs_of("pair") == 10
    assert [path.name for path in Path("runs/train").iterdir()] == ["pair"]


DIFFERENT = 'cd $0/rank$LOCAL_RANK && exec "$@" --epochs $((3 + LOCAL_RANK))'
ELSEWHERE = 'cd $0/rank$LOCAL_RANK && exec "$@"'


def test_ranks_that_are_not_at_the_same_work_are_named(tiny, launch, tmp_path):
    """As on two machines: other options; and no data on one of them."""
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
    (tmp_path / "rank0/here.yaml").write_text(tiny.data.read_text().replace("path: .", f"path: {tiny.folder}"))
    python = [sys.executable, *script()]
    cases = {
        DIFFERENT: (
            flags(tiny, "other", epochs=None),
            r"--epochs: 4 on rank 1 \(.*\), 3 on rank 0 \(.*\); all ranks sho",
        ),
        ELSEWHERE: (flags(tiny, "none", data="here.yaml"), r"rank 1 \(.*\): --data file not found: here\.yaml"),
    }
    agents = [
        launch(
            ["--standalone", "--nproc_per_node", "2", "--no-python"],
            ["sh", "-c", shell, str(tmp_path), *python, *train],
        )
        for shell, (train, _) in cases.items()
    ]
    for agent, (_, line) in zip(agents, cases.values()):
        _, problems = agent.communicate(timeout=PATIENCE_S)
        assert agent.returncode == 1
        assert len(re.findall(rf"^train\.py: error: {line}", problems.decode(), re.MULTILINE)) == 1, problems.decode()
    assert not (tmp_path / "rank0/runs").exists()
