import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from utils.data.pool import by_processes, by_threads
from utils.structures import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import itertools, os, signal
from tests.data.test_pool import processes, square
for index, _ in processes(square, itertools.count(), 3):
    if index == 5:
        print("working", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def square(number: int) -> int:
    return number * number


def slow_first(other_is_done: Path, number: int) -> int:
    if number == 9:  # after others have handed over theirs
        other_is_done.touch()
    while number == 0 and not other_is_done.exists():
        time.sleep(0.01)
    return number


def fail_from_three_on(number: int) -> int:
    if number == 3:
        time.sleep(0.2)  # so that a later one fails first
    if number >= 3:
        raise UserError(f"number {number}")
    return number


def divide(number: int) -> float:
    return 1 / number


def leave(number: int) -> int:
    if number == 2:
        os._exit(7)
    return number


def processes(function, tasks, count=2):
    return by_processes(function, tasks, count, name=lambda task: f"task {task}")


@pytest.mark.parametrize("run", [processes, lambda function, tasks: by_threads(function, tasks, 2)])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_every_task_is_done_once(run, count):
    assert sorted(run(square, range(count))) == [(number, number**2) for number in range(count)]
    assert not multiprocessing.active_children()


def test_results_come_as_they_are_ready_with_their_numbers(tmp_path):
    results = list(processes(partial(slow_first, tmp_path / "done"), iter(range(20))))
    assert sorted(results) == [(number, number) for number in range(20)]
    assert results[0] != (0, 0)


@pytest.mark.parametrize("run", [processes, lambda function, tasks: by_threads(function, tasks, 2)])
def test_the_error_of_the_first_task_is_raised(run):
    with pytest.raises(UserError, match=r"^number 3$"):
        list(run(fail_from_three_on, range(1000)))
    assert not multiprocessing.active_children()


def test_an_error_of_ours_shows_where_it_came_from():
    with pytest.raises(ZeroDivisionError) as error:
        list(processes(divide, range(3)))
    assert "in divide" in str(error.value.__cause__)


def test_a_process_that_ends_is_reported_with_its_task():
    with pytest.raises(RunError, match=r"^a process ended \(7\) at task 2$"):
        list(processes(leave, range(10)))
    assert not multiprocessing.active_children()


def test_processes_end_with_the_loop_that_they_work_for():
    results = processes(square, range(1000))
    next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes here")
def test_processes_end_when_the_main_one_is_killed():
    """Each holds a copy of the ends of pipes that the main process had when it was forked."""
    main = subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE)
    assert main.stdout.readline() == b"working\n"
    assert main.wait(30) == -signal.SIGKILL
    for _ in range(600):
        try:
            os.killpg(main.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(main.pid, signal.SIGKILL)
    pytest.fail("processes live on")
