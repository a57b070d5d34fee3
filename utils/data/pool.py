"""One function over many tasks, by threads or by as many processes as there are cores.

The processes are our own and not those of `concurrent.futures`: one that dies is noticed at once and its task named,
and an error or Ctrl-C ends them all without waiting for what they are at.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from utils.stopping import signals_held_back
from utils.structures import RunError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4  # tasks of a thread that are queued at a time: an error does not wait for all of them


def by_threads(function: Callable[[Task], Result], tasks: Iterable[Task], count: int) -> Iterator[tuple[int, Result]]:
    """(index, result) of every task, in their order."""
    with ThreadPoolExecutor(count) as pool:
        queue = []
        try:
            for index, task in enumerate(tasks):
                queue.append((index, pool.submit(function, task)))
                if len(queue) >= _AHEAD * count:
                    index, future = queue.pop(0)
                    yield index, future.result()
            for index, future in queue:
                yield index, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def by_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], count: int, *, name: Callable[[Task], str]
) -> Iterator[tuple[int, Result]]:
    """(index, result) of every task, as they come. Function, tasks and results are pickled.

    What `function` raises is raised here, of several errors that of the first task. Raises RunError, with the `name` of
    the task, when a process dies.
    """
    workers = []
    try:
        for _ in range(count):
            workers.append(_Worker(function))  # one by one, so that those that were started are ended
        yield from _results(workers, enumerate(tasks), name)
    finally:
        for worker in workers:
            worker.kill()


def can_start_processes() -> bool:
    """Whether this process may have children: loader processes and the like may not."""
    return not multiprocessing.current_process().daemon


class _Worker:
    def __init__(self, function: Callable) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(function, theirs, self.pipe), daemon=True)
        with signals_held_back():
            self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.index, self.task = -1, None  # what it is at

    def give(self, index: int, task: Any) -> None:
        self.index, self.task = index, task
        self.pipe.send((index, task))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _results(workers: list[_Worker], tasks: Iterator[tuple[int, Any]], name: Callable) -> Iterator[tuple[int, Any]]:
    busy: dict[Connection, _Worker] = {}
    failures: dict[int, Exception] = {}
    for worker, (index, task) in zip(workers, tasks):  # zip asks the workers first: no task is lost
        _give(worker, index, task, name)
        busy[worker.pipe] = worker
    while busy:
        for pipe in wait(list(busy)):
            worker = busy.pop(pipe)
            index, result, failure = _answer(worker, name)
            if failure is not None:
                failures[index] = failure
            following = next(tasks, None) if not failures else None
            if following is not None:
                _give(worker, *following, name)
                busy[pipe] = worker
            if not failures:
                yield index, result
    if failures:
        raise failures[min(failures)]


def _give(worker: _Worker, index: int, task: Any, name: Callable) -> None:
    try:
        worker.give(index, task)
    except OSError:  # it is gone
        raise _death(worker, name) from None


def _answer(worker: _Worker, name: Callable) -> tuple[int, Any, Exception | None]:
    try:
        result, failure = worker.pipe.recv()
    except (EOFError, OSError):
        raise _death(worker, name) from None
    if failure is None:
        return worker.index, result, None
    error, text = failure
    error.__cause__ = None if isinstance(error, UserError) else RuntimeError(f"in another process:\n{text}")
    return worker.index, None, error


def _death(worker: _Worker, name: Callable) -> RunError:
    worker.process.join(5)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}, most likely of lack of memory," if code and code < 0 else f"ended ({code})"
    return RunError(f"a process {how} at {name(worker.task)}")


def _serve(function: Callable, pipe: Connection, other_end: Connection) -> None:
    """The life of a process: it answers tasks until the pipe closes, as it does when the main process dies."""
    other_end.close()  # a fork has it as well, and no pipe closes while somebody holds its other end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    while True:
        try:
            _, task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = function(task), None
        except Exception as error:
            answer = None, (error, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
