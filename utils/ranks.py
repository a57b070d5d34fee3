"""The ranks of a run, processes that share one training: what they tell one another, and who speaks for all.

The surprise: a process by itself is a group as well, `Ranks()`, to which every question here has an answer.
"""

from __future__ import annotations

import inspect
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from utils import __version__
from utils.files import code_digest
from utils.launch import Place
from utils.structures import RunError, UserError

_Value = TypeVar("_Value")
_Made = TypeVar("_Made")

_AGES = timedelta(days=7)  # that ranks wait while one of them looks at the data
_STARTING_S = 60.0  # that ranks have to come, if the timeout does not give them more
_CALL_S = 5.0  # that one try to reach the first rank may take
_SILENT_S = 10.0  # of waiting for other ranks, after which the user is told
_MEETING_S = 0.02  # between two looks at what others have said
_DYING_S = 5.0  # after which whoever has not told of a broken connection is taken for the cause of it
_LAST_S = 0.3  # the same, for the last one
_NCCL_LATER_S = 60.0
_STOPS, _SILENCE, _BREAK = "stops", "silence", "break"  # what a rank says of its end: its own, or what it has noticed

# What torch calls it, which warns of the older name
_WAYS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_NEVER_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _WAYS else "broadcast_buffers"

# How torch says that another process is gone or silent, where it has no exception of its own for that
_SIGNS_OF_LOSS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


class LostRank(RunError):
    """Another rank has stopped, is gone, or hangs."""

    gone: tuple[int, ...] = ()  # ranks that did not say that they would stop


class Ranks:
    """The processes of a run. This one is alone: the null object.

    What is asked of a group is asked by all of its ranks, in the same order.
    """

    place: Place | None = None  # of this process, where a launcher started it
    rank = 0  # of this process
    count = 1
    local_count = 1  # on this host
    names: Sequence[str] = ("this process",)  # host and process of each rank

    @property
    def host(self) -> str:
        return socket.gethostname()

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def speaks(self) -> bool:
        """Whether this process writes files and talks to the user, for all."""
        return self.rank == 0

    def gather(self, value: _Value) -> list[_Value]:
        """What all ranks call this with, by rank, on every rank."""
        return [value]

    def most(self, *numbers: int) -> list[int]:
        """The largest of what the ranks say, number by number."""
        return list(numbers)

    def from_first(self, make: Callable[[], _Made]) -> _Made:
        """What rank 0 makes, on every rank. A UserError there is raised on all."""
        return make()

    def each(self, make: Callable[[], _Made]) -> _Made:
        """What this rank makes, unless any of them raises a UserError, which then all do."""
        return make()

    def host_first(self, make: Callable[[], _Made]) -> _Made:
        """As `each`; but the first rank of each host is done before the others there begin, who find its caches."""
        return make()

    def check_alike(self, work: Callable[[], Mapping[str, object]]) -> None:
        """Raises UserError where ranks run other code, or do not say the same of what their `work` depends on."""

    def of_all(self, error: UserError) -> UserError:
        """An error that all ranks raise, to be told once."""
        return error

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on the device; it may take the place of `tensor`. The same bits on every rank."""
        return tensor

    def mean(self, tensor: Tensor, weight: float) -> Tensor:
        """As `sum`, of tensors times the weights of their ranks, which add up to 1."""
        return tensor

    def replicas(self, model: nn.Module) -> nn.Module:
        """What to call in the place of `model`: its gradients are means over the ranks when backward returns."""
        return model

    def reduces(self, network: nn.Module, update: bool) -> AbstractContextManager:
        """Around forward and backward of what `replicas` gave; without an `update` gradients stay with this rank."""
        return nullcontext()

    def reached(self, step: str) -> None:
        """What this rank has done, in words, for others to tell if it hangs."""

    def hurry(self) -> None:
        """From here on nobody keeps others waiting for longer than the timeout."""

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """That others are gone or silent becomes a LostRank, which says who."""
        yield

    def how_to_start(self, python: str, program: str) -> str:
        """For the user, who is to start a program as this one was."""
        return f"continue with: {python} {program}"

    def end_told(self) -> AbstractContextManager:
        """Around work that may end by an error of this rank alone: it is not to be taken for lost."""
        return nullcontext()

    def leave(self) -> None:
        """Let go of the others."""


class Group(Ranks):
    """The ranks that a launcher started, connected by torch.distributed."""

    def __init__(self, place: Place, *, backend: str, timeout_s: float) -> None:
        """`backend` serves tensors on their devices. Raises UserError where the others cannot be reached."""
        self.place, self.rank, self.count, self.local_count = place, place.rank, place.ranks, place.local_ranks
        self._timeout_s = timeout_s
        timeout, patience_s = timedelta(seconds=timeout_s), max(timeout_s, _STARTING_S)
        with _meeting_named(place):
            store = _store(place, patience_s)
            self._store = distributed.PrefixStore(_meet(store, place.rank, place.ranks, patience_s), store)
            # NCCL ends the process when its time is up: what can tell who is missing should strike first
            longer = timeout + timedelta(seconds=_NCCL_LATER_S * ("nccl" in backend))
            distributed.init_process_group(
                backend, store=self._store, rank=place.rank, world_size=place.ranks, timeout=longer
            )
            self._quick = distributed.new_group(backend="gloo", timeout=timeout)
            self._patient = distributed.new_group(backend="gloo", timeout=_AGES)
        self._control = self._patient
        self.names = self.gather(f"{self.host}, pid {os.getpid()}")

    def gather(self, value: _Value) -> list[_Value]:
        gathered = [value] * self.count
        distributed.all_gather_object(gathered, value, group=self._control)
        return gathered

    def most(self, *numbers: int) -> list[int]:
        votes = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX, group=self._control)
        return votes.tolist()

    def from_first(self, make: Callable[[], _Made]) -> _Made:
        said = [_outcome_of(make) if self.rank == 0 else None]
        distributed.broadcast_object_list(said, src=0, group=self._control)
        self._agree([said[0].error])
        return said[0].value

    def each(self, make: Callable[[], _Made]) -> _Made:
        outcome = _outcome_of(make)
        self._agree(self.gather(outcome.error))
        return outcome.value

    def host_first(self, make: Callable[[], _Made]) -> _Made:
        firsts = self.place.local_rank == 0
        outcome = _outcome_of(make) if firsts else _Outcome()
        self._agree(self.gather(outcome.error))
        return self.each(make if not firsts else lambda: outcome.value)

    def _agree(self, errors: Sequence[UserError | None]) -> None:
        """Raise the first of the errors, by rank, on all ranks; one of them tells the user."""
        failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
        if failed is None:
            return
        error = errors[failed]
        if failed > 0:
            error = type(error)(f"rank {failed} ({self.names[failed]}): {error}")
        raise self.of_all(error)

    def check_alike(self, work: Callable[[], Mapping[str, object]]) -> None:
        code = f"{__version__}, code {code_digest(Path(__file__).parent.parent)}"
        mine = {"version of this trainer": code, "torch": str(torch.__version__), **work()}
        first, *others = self.gather(mine)
        for rank, theirs in enumerate(others, 1):
            for name, value in theirs.items():
                if value != first[name]:
                    raise self.of_all(
                        UserError(
                            f"{name}: {value} on rank {rank} ({self.names[rank]}), {first[name]} on rank 0 "
                            f"({self.names[0]}); all ranks should be at the same work"
                        )
                    )

    def of_all(self, error: UserError) -> UserError:
        error.said_elsewhere = not self.speaks
        return error

    def sum(self, tensor: Tensor) -> Tensor:
        distributed.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor, weight: float) -> Tensor:
        return self.sum(tensor.mul_(weight))

    def replicas(self, model: nn.Module) -> nn.Module:
        """All ranks start from the weights of rank 0. Buffers, such as running statistics, stay the caller's care."""
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device],
            gradient_as_bucket_view=True,
            **{_NEVER_SYNC_BUFFERS: False},
        )

    def reduces(self, network: nn.Module, update: bool) -> AbstractContextManager:
        return nullcontext() if update else network.no_sync()

    def reached(self, step: str) -> None:
        with suppress(RuntimeError):  # its launcher may be gone, and ranks are about to stop for that
            self._store.set(f"reached/{self.rank}", step)

    def hurry(self) -> None:
        self._control = self._quick

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _tells_of_loss(error):
                raise
            raise self._lost(silent="imed out" in str(error) or "timeout" in str(error)) from error

    def _lost(self, *, silent: bool) -> LostRank:
        """Who does not say, as this rank does, that something is wrong; `silent`: after a timeout."""
        try:
            self._store.set(f"end/{self.rank}", _SILENCE if silent else _BREAK)
            ends = self._ends()
            gone = tuple(rank for rank in range(self.count) if rank not in ends)
            steps = [self._step_of(rank) for rank in gone]
        except RuntimeError:  # with rank 0 or its host, what holds the store is gone
            return LostRank("lost contact to the other ranks, and to what launched them")
        stopped = [rank for rank, end in ends.items() if end == _STOPS]
        silent = _SILENCE in ends.values()  # whose connections the others then see break
        how = "is gone" if not silent else f"hangs: nothing for {self._timeout_s / 60:g} minutes (--dist-timeout)"
        told = [f"rank {rank} ({self.names[rank]}) {how}; {step}" for rank, step in zip(gone, steps)]
        if not told:
            told = [f"rank {rank} has stopped" for rank in stopped] or ["the connection between ranks has failed"]
        lost = LostRank("; ".join(told))
        lost.gone = gone
        lost.said_elsewhere = self.rank > min(ends) or bool(stopped and not gone)
        return lost

    def _ends(self) -> dict[int, str]:
        """What ranks say of their end, when there was time for all of them but one that cannot."""
        until = time.monotonic() + _DYING_S
        while True:
            said = [rank for rank in range(self.count) if self._store.check([f"end/{rank}"])]
            if len(said) >= self.count - 1:
                until = min(until, time.monotonic() + _LAST_S)
            if len(said) == self.count or time.monotonic() > until:
                return {rank: self._store.get(f"end/{rank}").decode() for rank in said}
            time.sleep(_MEETING_S)

    def _step_of(self, rank: int) -> str:
        key = f"reached/{rank}"
        if not self._store.check([key]):
            return "before its first step"
        return f"its last step was {self._store.get(key).decode()}"

    def how_to_start(self, python: str, program: str) -> str:
        if self.place.ours:
            return f"continue with: {python} {program} --nproc {self.count}"
        return f"continue, by the same launcher, with: {program}"

    @contextmanager
    def end_told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not _tells_of_loss(error):
                with suppress(RuntimeError):
                    self._store.set(f"end/{self.rank}", _STOPS)
            raise

    def leave(self) -> None:
        with suppress(RuntimeError):
            distributed.destroy_process_group()


@dataclass(frozen=True)
class _Outcome:
    """What came of making something."""

    value: Any = None
    error: UserError | None = None


def _outcome_of(make: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(make())
    except UserError as error:
        return _Outcome(error=type(error)(str(error)))  # without its traceback, which cannot travel


def _tells_of_loss(error: BaseException) -> bool:
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in _SIGNS_OF_LOSS)


@contextmanager
def _meeting_named(place: Place) -> Iterator[None]:
    """What keeps ranks from meeting is told in a line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {place.rank} cannot reach the others ({reason}); MASTER_ADDR and MASTER_PORT should be those of "
            "rank 0, and the port free: see --master-addr, --master-port and --rdzv-endpoint of torch.distributed.run"
        ) from error


def _store(place: Place, timeout_s: float) -> distributed.Store:
    """Where all ranks leave messages. It is waited for here and not by torch, which hears no signal meanwhile."""
    deadline, (host, port) = time.monotonic() + timeout_s, place.master
    serves = place.rank == 0 and not place.served
    while True:
        try:
            store = distributed.TCPStore(
                host,
                port,
                place.ranks,
                is_master=serves,
                timeout=timedelta(seconds=_CALL_S),
                wait_for_workers=False,
                multi_tenant=True,
            )
            break
        except RuntimeError:
            if serves or time.monotonic() > deadline:
                raise
            time.sleep(_MEETING_S)
    store.set_timeout(timedelta(seconds=timeout_s))  # while they connect, some ranks may be slow
    return store


def _meet(store: distributed.Store, rank: int, count: int, timeout_s: float) -> str:
    """A word that only these ranks share, who have all come: the store may hold what those of an earlier start said.

    torch's launcher keeps its store when it starts ranks again. Each rank calls with a number of its own, until rank 0
    answers to that.
    """
    deadline = time.monotonic() + timeout_s
    return _lead(store, count, deadline) if rank == 0 else _follow(store, rank, deadline)


def _lead(store: distributed.Store, count: int, deadline: float) -> str:
    word, missing, silent_until = secrets.token_hex(8), set(range(1, count)), time.monotonic() + _SILENT_S
    while missing:
        for other in sorted(missing):
            if store.check([f"call/{other}"]):
                store.set(f"answer/{other}", f"{store.get(f'call/{other}').decode()} {word}")
            if store.check([f"heard/{word}/{other}"]):
                missing.remove(other)
        _wait(deadline, f"rank {min(missing, default=0)} has not come")
        if time.monotonic() > silent_until:
            silent_until, minutes = math.inf, (deadline - time.monotonic()) / 60
            who = ", ".join(map(str, sorted(missing)))
            print(f"waiting for rank {who} of {count}, for {minutes:.1f} minutes more (--dist-timeout)", flush=True)
    return word


def _follow(store: distributed.Store, rank: int, deadline: float) -> str:
    call = secrets.token_hex(8)
    store.set(f"call/{rank}", call)
    while True:
        if store.check([f"answer/{rank}"]):
            answered, word = store.get(f"answer/{rank}").decode().split()
            if answered == call:
                store.set(f"heard/{word}/{rank}", "")
                return word
        _wait(deadline, "rank 0 does not answer")


def _wait(deadline: float, missing: str) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(missing)
    time.sleep(_MEETING_S)
