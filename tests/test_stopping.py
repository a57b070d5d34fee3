"""Signals that ask a run to stop: heard between steps, or at once; a second Ctrl-C does not wait."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from utils.stopping import (
    STOP_SIGNALS,
    Interrupted,
    StopRequest,
    signals_held_back,
    signals_raised,
    stop_signals,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """As it may be where the tests run in the background."""
    usual = dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def handlers() -> list:
    return [signal.getsignal(signum) for signum in STOP_SIGNALS]


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_a_request_that_is_heard_when_somebody_asks(signum):
    with stop_signals() as stop:
        assert not stop.requested
        stop.check()
        send(signum)
        assert stop.requested
        with pytest.raises(Interrupted) as raised:
            stop.check()
    assert raised.value.signum == signum
    assert isinstance(raised.value, KeyboardInterrupt)


def test_a_block_is_ended_at_once():
    with stop_signals() as stop:
        with pytest.raises(Interrupted), stop.at_once():
            send(signal.SIGTERM)
            pytest.fail("went on")
        send(signal.SIGTERM)  # one at a time is raised


def test_a_request_from_before_ends_a_block_before_it_begins():
    with stop_signals() as stop:
        send(signal.SIGUSR1)
        with pytest.raises(Interrupted), stop.at_once():
            pytest.fail("began")


def test_a_request_that_was_swallowed_is_not_forgotten():
    with stop_signals() as stop, pytest.raises(Interrupted), stop.at_once(), suppress(Interrupted):
        send(signal.SIGTERM)


def test_while_one_is_on_its_way_out_another_does_not_strike():
    cleaned = []
    with stop_signals() as stop, pytest.raises(Interrupted), stop.at_once():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned == [True]


def test_everything_is_as_it_was_afterwards():
    before = handlers(), signal.set_wakeup_fd(-1), threading.active_count()
    with stop_signals():
        assert handlers() != before[0]
    assert (handlers(), signal.set_wakeup_fd(-1), threading.active_count()) == before


def test_other_threads_may_not_ask_for_signals_and_get_a_request_that_never_comes():
    seen = []

    def work():
        with stop_signals() as stop, signals_raised():
            seen.append((stop.requested, handlers()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, handlers())]


def test_the_null_object_never_asks():
    stop = StopRequest()
    with stop.at_once():
        stop.check()
    assert not stop.requested


def test_a_command_without_a_run_is_ended_by_any_of_them():
    with pytest.raises(Interrupted) as raised, signals_raised():
        send(signal.SIGTERM)
    assert (raised.value.signum, raised.value.by) == (signal.SIGTERM, " by SIGTERM")


def test_a_command_on_its_way_out_is_struck_again_by_ctrl_c_alone():
    cleaned = []
    with pytest.raises(Interrupted) as raised, signals_raised():
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)
            cleaned.append(True)
            with pytest.raises(Interrupted):
                send(signal.SIGINT)
    assert (raised.value.signum, cleaned) == (signal.SIGINT, [True])


def test_what_another_process_tells_is_not_told(capfd):
    for tells in (True, False):
        StopRequest(tells=lambda tells=tells: tells).say("left at once")
    assert capfd.readouterr().err == "\nleft at once\n"


def test_last_words_are_said_whatever_comes_meanwhile():
    code = """
import os, signal
from utils.stopping import leave_with
def command():
    os.kill(os.getpid(), signal.SIGTERM)
    print("last words", flush=True)
    return 143
leave_with(command)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "last words\n", "")


def test_a_second_ctrl_c_ends_no_program_that_is_not_ours():
    """As of a notebook."""
    with pytest.raises(KeyboardInterrupt) as raised, stop_signals() as stop:
        send(signal.SIGINT)
        assert stop.requested
        send(signal.SIGINT)
    assert not isinstance(raised.value, Interrupted)


def test_handlers_of_others_stay():
    came = []
    before = signal.signal(signal.SIGUSR1, lambda signum, _: came.append(signum))
    try:
        with stop_signals() as stop:
            send(signal.SIGUSR1)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]


def test_a_signal_waits_until_children_have_started():
    """Though other threads may hear of it."""
    steps = []
    with stop_signals() as stop, pytest.raises(Interrupted), stop.at_once():
        with signals_held_back():
            send(signal.SIGTERM)
            time.sleep(0.1)
            steps.append("started")
        steps.append("went on")
    assert steps == ["started"]


def test_a_child_that_lives_on_does_not_hold_up_the_end():
    with stop_signals():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with signals_raised(), stop_signals() as stop:
            send(signal.SIGUSR1)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_children_that_are_started_meanwhile_never_hear_of_them():
    with stop_signals() as stop:
        with signals_held_back():
            child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(30)"])
        for signum in STOP_SIGNALS:
            os.kill(child.pid, signum)
        time.sleep(0.3)
        assert child.poll() is None
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert not stop.requested


# ---- a second Ctrl-C -------------------------------------------------------------------------------------------------

_BUSY = """
import ctypes, signal, sys
from utils import stopping

stopping._ONE_PRESS_S = float(sys.argv[1])
with stopping.stop_signals(ends_process=True) as stop:
    stop.before_leaving(lambda: print("cleaned", flush=True))
    for signum in stopping.STOP_SIGNALS:
        signal.siginterrupt(signum, False)  # a read that they interrupt goes on
    print("busy", flush=True)
    ctypes.CDLL(None).read(0, ctypes.create_string_buffer(1), 1)  # one long call, as of torch: not a line of Python
    print("asked" if stop.requested else "not asked", flush=True)
"""


@pytest.fixture
def busy():
    """Starts a process whose main thread is in one long call, until its standard input is closed."""
    processes = []

    def start(one_press_s: float = 0.1) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", _BUSY, str(one_press_s)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "busy\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def announced(process: subprocess.Popen) -> str:
    """What it says when it has not stopped a second after it was asked to."""
    return process.stderr.readline() + process.stderr.readline()


WAITS = "\nstopping as soon as this step is done; a second Ctrl-C does not wait for it\n"


def test_a_first_one_waits_and_says_so_when_it_takes_long(busy):
    process = busy()
    process.send_signal(signal.SIGINT)
    assert announced(process) == WAITS
    output, problems = process.communicate(timeout=60)
    assert (process.returncode, output, problems) == (0, "asked\n", "")


def test_a_second_one_does_not_wait(busy):
    process = busy()
    process.send_signal(signal.SIGINT)
    assert announced(process) == WAITS
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == "cleaned\n"
    assert process.stderr.read() == "\nleft at once\n"


def test_one_that_is_sent_twice_is_one(busy):
    """To the process and to its group, as `timeout` does."""
    process = busy(one_press_s=60)
    process.send_signal(signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    assert announced(process) == WAITS
    assert process.communicate(timeout=60)[0] == "asked\n"


def test_a_second_request_of_another_kind_is_patient(busy):
    process = busy()
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(signum)
        time.sleep(0.1)
    assert process.communicate(timeout=60)[0] == "asked\n"
    assert process.returncode == 0
