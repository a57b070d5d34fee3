"""Several ranks on this machine, each in a process of its own, for tests of what they find out together."""

import os
import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from utils.ranks import Ranks
from utils.runtime import join_ranks


def in_ranks(count: int, work, *arguments, minutes: float = 2.0) -> list:
    """What `work(ranks, *arguments)`, a function of a module, returns on each of so many ranks."""
    # as torch's launcher does: a store that is there before anybody asks for it
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (count, store.port, minutes, work, arguments, folder), nprocs=count)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, port: int, minutes: float, work, arguments: tuple, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    ranks: Ranks = join_ranks(dist_timeout=minutes)
    torch.set_num_threads(1)
    torch.save(work(ranks, *arguments), Path(folder) / str(rank))
    ranks.leave()
