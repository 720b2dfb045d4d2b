"""Runs a function on several gloo processes, as torchrun would."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from mocohub.distributed import process_group


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(*args)` in `world_size` processes that share a gloo group; any failure raises here.

    They meet at a store of this process, as at that of torchrun: a port that rank 0 had to open seconds
    after it was found free could be somebody else's by then.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_enter, (world_size, store.port, function, args), nprocs=world_size)


def _enter(
    rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    with process_group("cpu"):
        function(*args)
