"""Ranks: what they know of each other, how `--nproc` starts them, and that all of them end however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
import val
from utils import launch
from utils.launch import Place, place
from utils.machine import usable_cores
from utils.structures import RunError, UserError

ROOT = Path(__file__).resolve().parent.parent

ELASTIC = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job-7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def without(*names: str, **changes: str) -> dict[str, str]:
    return {name: value for name, value in {**ELASTIC, **changes}.items() if name not in names}


# ---- what a rank knows -----------------------------------------------------------------------------------------------


def test_a_rank_is_told_by_its_environment():
    here = Place(
        rank=5,
        ranks=8,
        local_rank=1,
        local_ranks=4,
        master=("10.0.0.1", 29500),
        served=False,
        launch="job-7",
        restarts=2,
        ours=False,
    )
    assert place(ELASTIC) == here
    assert place({**ELASTIC, "NPROC_LAUNCHER": "1"}).ours


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": " "},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "23456"},  # one container of a cluster
        {"MASTER_ADDR": "here", "MASTER_PORT": "29500"},
        {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "job-7"},
    ],
)
def test_one_process_is_no_rank(environment):
    assert place(environment) is None


def test_one_rank_is_a_rank():
    assert place(without(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")).ranks == 1


def test_where_a_launcher_does_not_say_all_ranks_are_taken_for_those_of_this_host():
    assert place(without("LOCAL_WORLD_SIZE")).local_ranks == 8


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"LOCAL_RANK": "0"},
            "LOCAL_RANK is set in the environment, but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: ",
        ),
        (without("RANK"), "LOCAL_RANK is set in the environment, but not RANK: start ranks with"),
        (without("MASTER_ADDR"), "LOCAL_RANK is set in the environment, but not MASTER_ADDR: "),
        (without(MASTER_PORT=" "), "LOCAL_RANK is set in the environment, but not MASTER_PORT: "),
        (without("LOCAL_RANK"), "WORLD_SIZE is 8 in the environment, but not LOCAL_RANK: "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: should be a whole number of 1 or more; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: should be a whole number of 1 or more; "),
        (without(RANK="8"), "RANK=8 in the environment: should be a whole number from 0 to 7; "),
        (without(RANK="-1"), "RANK=-1 in the environment: should be a whole number from 0 to 7; "),
        (without(RANK="²"), "RANK=² in the environment: should be a whole number from 0 to 7; "),
        (without(LOCAL_RANK="4"), "LOCAL_RANK=4 in the environment: should be a whole number from 0 to 3; "),
        (without(LOCAL_WORLD_SIZE="9"), "LOCAL_WORLD_SIZE=9 in the environment: should be a whole number from 1 to 8;"),
        (without(MASTER_PORT="http"), "MASTER_PORT=http in the environment: should be a whole number from 1 to 65535"),
        (without(TORCHELASTIC_RESTART_COUNT="x"), "TORCHELASTIC_RESTART_COUNT=x in the environment: should be"),
    ],
)
def test_a_part_of_what_launchers_set_is_refused_by_name(environment, message):
    with pytest.raises(UserError) as error:
        place(environment)
    line = str(error.value)
    assert line.startswith(message)
    assert "`--nproc N`, or `python -m torch.distributed.run --nproc_per_node N train.py ...`" in line
    assert "\n" not in line


def test_a_launch_that_nobody_named_is_its_agent():
    """torchrun's default where hosts meet at an address: all runs would have the one name."""
    launch = place(without(TORCHELASTIC_RUN_ID="none")).launch
    assert launch not in ("", "none")
    assert place(without(TORCHELASTIC_RUN_ID="none")).launch == launch
    assert place(without("TORCHELASTIC_RUN_ID")).launch == ""


# ---- a call from Python, and flags that need no rank -----------------------------------------------------------------


@pytest.mark.parametrize("script", [train, val])
def test_a_call_from_python_starts_no_ranks(script):
    with pytest.raises(UserError, match=r"nproc=2: only a command line starts processes: python \w+\.py --nproc 2 "):
        script.run(nproc=2, weights="w.pt")


def test_a_wrong_flag_is_told_before_any_rank_is_started(cli, monkeypatch):
    monkeypatch.setattr(launch, "_agent", lambda *_: pytest.fail("started"))
    assert cli(train, "--nproc", "2", "--epochs", "0") == (2, "", "train.py: error: --epochs 0: should be 1 or more\n")
    assert cli(val, "--nproc", "2")[::2] == (2, cli(val)[2])


def test_another_launcher_may_have_started_as_many_ranks_and_no_other_number(cli, monkeypatch):
    for name, value in ELASTIC.items():
        monkeypatch.setenv(name, value)
    assert not launch.starts_ranks(None)
    assert not launch.starts_ranks(4)
    code, _, line = cli(train, "--nproc", "8")
    assert (code, line) == (2, "")  # the first on this machine says it
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, line = cli(train, "--nproc", "8")
    assert code == 2
    assert line == "train.py: error: --nproc 8: another launcher has started 4 on this machine; leave it out\n"


def test_what_keeps_ranks_from_being_started_is_one_line(cli, monkeypatch):
    def no_port(*_):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(launch, "_agent", no_port)
    code, _, line = cli(train, "--nproc", "2")
    assert code == 1
    assert line == "train.py: error: --nproc: the ranks could not be started: [Errno 98] Address already in use\n"


def test_an_environment_that_makes_no_sense_is_nothing_to_a_program_without_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.place_if_any() is None
    with pytest.raises(UserError, match="but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        train.run(epochs=1)


# ---- ranks of a stand-in ---------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

from utils.config import TrainOptions, run_on_ranks
from utils.launch import place, tells_of_signals
from utils.stopping import leave_with, stop_signals
from utils.structures import RunError, UserError

FOLDER = Path(os.environ["FOLDER"])


def done(stop):
    here = place()
    facts = [here.ranks, here.local_ranks, here.ours, os.getppid(), os.getsid(0) == os.getpid()]
    print(json.dumps([here.rank, facts, os.environ["OMP_NUM_THREADS"], sys.argv[1:]]) + "\\n", end="")


def waits(stop):
    while not stop.requested:
        time.sleep(0.01)
    if (FOLDER / "slow").exists():
        time.sleep(1.5)
    (FOLDER / f"saved{place().rank}").touch()
    stop.check()


def stuck(stop):
    child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    (FOLDER / "pid_of_child").write_text(str(child.pid))
    (FOLDER / "stuck").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def wrong(stop):
    error = UserError("--what: no")
    error.said_elsewhere = True
    raise error


def fails(stop):
    (FOLDER / "failing").touch()
    raise RunError("the disk is full")


def complains(stop):
    while not (FOLDER / "failing").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    raise RunError("rank 1 is gone")


def is_killed(stop):
    (FOLDER / "failing").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def bug(stop):
    return 1 / 0


def leaves(stop):
    sys.exit(7)


def restarts(stop):
    print(json.dumps([place().launch, place().restarts]) + "\\n", end="")
    if not place().restarts:
        raise RunError("once")


def work(options):
    rank = place().rank
    (FOLDER / f"pid{rank}").write_text(str(os.getpid()))
    with stop_signals(ends_process=True, tells=tells_of_signals) as stop:
        (FOLDER / f"ready{rank}").touch()
        while not (FOLDER / f"ready{1 - rank}").exists() and not stop.requested:
            time.sleep(0.01)
        globals()[json.loads(os.environ["PLAN"])[rank]](stop)


if __name__ == "__main__":
    leave_with(lambda: run_on_ranks(os.path.abspath(__file__), TrainOptions, work))
"""


class Started:
    """A launcher, and the ranks that it starts."""

    def __init__(self, folder: Path, command: list[str], plan: list[str], **environment: str) -> None:
        self.folder = folder
        self.program = folder / "stand_in.py"
        self.program.write_text(STAND_IN)
        (folder / "tmp").mkdir()
        usual = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        paths = {"FOLDER": str(folder), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, *(part if part != "PROGRAM" else str(self.program) for part in command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**usual, **paths, "PLAN": json.dumps(plan), **environment},
        )

    def wait_for(self, *names: str) -> None:
        end = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, names
            time.sleep(0.01)

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self) -> tuple[int, str, str]:
        """Exit code, output and errors, the program by its name; once nothing is left of it."""
        output, errors = self.process.communicate(timeout=60)
        end = time.monotonic() + 20
        while (alive := [pid for pid in self.pids() if is_alive(pid)]) and time.monotonic() < end:
            time.sleep(0.01)
        assert alive == []
        return self.process.returncode, output, errors.replace(str(self.program), "train.py")

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("pid*") if path.read_text()]


def is_alive(pid: int) -> bool:
    """Not so a zombie, which whoever has adopted it may leave lying about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start_ranks(tmp_path):
    """Starts the stand-in as two ranks, by --nproc or by the command that is given."""
    started = []

    def start(*plan: str, command: tuple[str, ...] = ("PROGRAM", "--nproc", "2"), **environment: str) -> Started:
        started.append(Started(tmp_path, list(command), list(plan), **environment))
        return started[-1]

    yield start
    for ranks in started:
        ranks.process.kill()
        ranks.process.communicate()
        for pid in ranks.pids():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def test_ranks_share_the_cores_and_leave_nothing_behind(start_ranks):
    ranks = start_ranks("done", "done", command=("PROGRAM", "--nproc=2", "--name", "a b"))
    code, output, errors = ranks.end()
    assert (code, errors) == (0, "")
    facts = [2, 2, True, ranks.process.pid, True]
    threads = str(max(1, usable_cores() // 2))
    seen = sorted(json.loads(line) for line in output.splitlines())
    assert seen == [[rank, facts, threads, ["--nproc=2", "--name", "a b"]] for rank in range(2)]
    assert list((ranks.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "code", "line"),
    [
        (("complains", "fails"), 1, "train.py: error: the disk is full"),  # what came of it is not told
        (("complains", "is_killed"), 1, "train.py: error: rank 1 was killed (signal 9): out of memory? lower --batch"),
        (("wrong", "wrong"), 2, "train.py: error: --what: no"),  # a rank that the launcher does not ask has said it
        (("waits", "leaves"), 1, "train.py: error: rank 1 has ended with exit code 7"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_first_error_is_told_once(start_ranks, plan, code, line):
    ranks = start_ranks(*plan)
    seen = ranks.end()
    assert seen[:2] == (code, "")
    assert seen[2].startswith(line)
    assert seen[2].count("\n") == 1
    assert (ranks.folder / "saved0").exists() == ("waits" in plan)
    assert list((ranks.folder / "tmp").iterdir()) == []


def test_a_bug_keeps_its_traceback(start_ranks):
    code, output, errors = start_ranks("waits", "bug", OMP_NUM_THREADS="1").end()
    assert (code, output) == (1, "")
    assert errors.startswith("Traceback (most recent call last):\n")
    assert errors.endswith("\nZeroDivisionError: division by zero\n")
    assert errors.count("Traceback") == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_ranks_and_the_first_says_so(start_ranks, signum):
    ranks = start_ranks("waits", "waits")
    ranks.wait_for("ready0", "ready1")
    ranks.send(signum)
    by = "" if signum == signal.SIGINT else f" by {signum.name}"
    assert ranks.end() == (128 + signum, "", f"\ntrain.py: interrupted{by}\n")
    assert (ranks.folder / "saved0").exists()
    assert (ranks.folder / "saved1").exists()


def test_a_signal_to_one_rank_ends_all_of_them(start_ranks):
    ranks = start_ranks("waits", "waits")
    ranks.wait_for("ready0", "ready1")
    os.kill(int((ranks.folder / "pid1").read_text()), signal.SIGTERM)
    assert ranks.end() == (143, "", "\ntrain.py: interrupted by SIGTERM; the signal came to rank 1 alone\n")
    assert (ranks.folder / "saved0").exists()


def test_a_signal_while_ranks_start_is_heard_and_told_once(start_ranks):
    """Before a rank could handle it."""
    ranks = start_ranks("waits", "waits")
    while not children(ranks.process.pid):
        time.sleep(0.001)
    ranks.send(signal.SIGINT)
    assert ranks.end() == (130, "", "\ntrain.py: interrupted\n")


def children(pid: int) -> list[str]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.split()


def test_a_second_ctrl_c_ends_all_at_once(start_ranks):
    """Ranks that hear nothing, too, and their children."""
    ranks = start_ranks("waits", "stuck")
    (ranks.folder / "slow").touch()
    ranks.wait_for("ready0", "stuck")
    ranks.send(signal.SIGINT)
    time.sleep(0.3)
    ranks.send(signal.SIGINT)
    assert ranks.end() == (130, "", "\nleft at once\n")
    assert not (ranks.folder / "saved0").exists()
    assert list((ranks.folder / "tmp").iterdir()) == []


def test_ranks_stop_when_their_launcher_is_killed(start_ranks):
    ranks = start_ranks("waits", "waits")
    ranks.wait_for("ready0", "ready1")
    ranks.send(signal.SIGKILL)
    assert ranks.end() == (-signal.SIGKILL, "", "\ntrain.py: interrupted by SIGTERM\n")
    assert (ranks.folder / "saved0").exists()
    assert (ranks.folder / "saved1").exists()


def test_a_rank_whose_launcher_was_gone_before_it_could_ask_stops_too(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    environment = {**os.environ, **ELASTIC, "RANK": "0", "NPROC_LAUNCHER": str(os.getpid() + 1), "NPROC_ASKED": "none"}
    environment |= {"FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT), "PLAN": json.dumps(["waits"])}
    done = subprocess.run(
        [sys.executable, "stand_in.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 143
    assert done.stderr.endswith("stand_in.py: interrupted by SIGTERM\n")
    assert not (tmp_path / "ready0").exists()


# ---- ranks of torch's launcher ---------------------------------------------------------------------------------------

ELASTIC_RUN = (
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
)


def test_torchs_launcher_reports_the_line_that_a_rank_has_printed(start_ranks):
    ranks = start_ranks("waits", "fails", command=(*ELASTIC_RUN, "PROGRAM"), OMP_NUM_THREADS="1")
    code, output, errors = ranks.end()
    assert (code, output) == (1, "")
    assert errors.count("train.py: error: the disk is full\n") == 1
    assert "exitcode  : 1 " in errors
    assert errors.count("utils.structures.RunError: the disk is full") == 1  # of the report
    assert (ranks.folder / "saved0").exists()


def test_a_restart_is_the_same_launch(start_ranks):
    command = (*ELASTIC_RUN, "--rdzv-id=none", "--max-restarts=1", "PROGRAM")
    code, output, _ = start_ranks("restarts", "restarts", command=command, OMP_NUM_THREADS="1").end()
    assert code == 0
    seen = [json.loads(line) for line in output.splitlines()]
    assert {restarts for _, restarts in seen} == {0, 1}
    assert len({launch for launch, _ in seen}) == 1
    assert seen[0][0] not in ("", "none")


def test_ranks_of_torchs_launcher_stop_when_it_is_killed(start_ranks):
    ranks = start_ranks("waits", "waits", command=(*ELASTIC_RUN, "PROGRAM"), OMP_NUM_THREADS="1")
    ranks.wait_for("ready0", "ready1")
    ranks.send(signal.SIGKILL)
    assert ranks.end() == (-signal.SIGKILL, "", "\ntrain.py: interrupted by SIGTERM\n")
    assert (ranks.folder / "saved1").exists()


def test_a_rank_that_was_killed_is_told_with_what_the_others_know_of_it():
    killed = {1: SimpleNamespace(exitcode=-9)}
    missed = launch._Recorded(
        name="RunError",
        text="rank 1 (here, pid 7) is gone; its last step was batch 2 of epoch 3; continue with: x",
        traceback="",
    )
    with pytest.raises(RunError) as told:
        launch._exit_code(killed, [missed], None)
    assert str(told.value) == (
        "rank 1 was killed (signal 9): out of memory? lower --batch-size, --workers or --nproc; "
        "its last step was batch 2 of epoch 3; continue with: x"
    )


def test_processes_of_a_rank_may_know_nothing_of_it(monkeypatch):
    """As the trials of an evolution, which train each by itself."""
    for name, value in {**ELASTIC, "NPROC_LAUNCHER": "1", "GROUP_RANK": "0", "ROLE_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    code = (
        "import os, re; print([name for name in os.environ if re.search('RANK|WORLD|MASTER|TORCHELASTIC|NPROC', name)])"
    )
    with launch.as_no_rank():
        seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert place() is None and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert seen == "[]\n"
    assert place().rank == 5
