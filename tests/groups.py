"""Several ranks on this machine, each in a process of its own, for tests of what they find out together."""

import os
import tempfile
from collections.abc import Container
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from utils.ranks import Ranks
from utils.runtime import join_ranks


def in_places(count: int, work, *arguments, missing: Container[int] = ()) -> list:
    """What `work(*arguments)`, a function of a module, returns in each of so many processes, as a launcher's ranks."""
    # as torch's launcher does: a store that is there before anybody asks for it
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # torch is imported once for all
        told = dict(os.environ), count, store.port, work, arguments, folder
        multiprocessing.start_processes(_in_place, told, nprocs=count, start_method="forkserver")
        files = [None if rank in missing else Path(folder) / str(rank) for rank in range(count)]
        return [torch.load(file, weights_only=False) if file else None for file in files]


def in_ranks(count: int, work, *arguments, minutes: float = 2.0, missing: Container[int] = ()) -> list:
    """The same of `work(ranks, *arguments)`, with a --dist-timeout; None for ranks that are to end without a result."""
    return in_places(count, _joined, minutes, work, arguments, missing=missing)


def _joined(minutes: float, work, arguments: tuple):
    ranks: Ranks = join_ranks(dist_timeout=minutes)
    result = work(ranks, *arguments)
    ranks.leave()
    return result


def _in_place(rank: int, environment: dict, count: int, port: int, work, arguments: tuple, folder: str) -> None:
    os.environ |= {
        **environment,  # of now, not of when the server of forks began
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    torch.save(work(*arguments), Path(folder) / str(rank))
