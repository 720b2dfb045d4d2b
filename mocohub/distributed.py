"""What torchrun tells a process, and the collectives MoCo needs. All of it works with no process group.

The global batch is the ranks' local batches one after the other: with W ranks of N rows each, rank r holds
global rows r*N to (r+1)*N. Every collective here must be called by all ranks.
"""

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=2)  # ranks wait for rank 0 while it evaluates


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join torchrun's process group, if torchrun started us, and leave it at the end.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl; this process takes the card of its LOCAL_RANK).

    Yields:
        The device of this process.

    Raises:
        ValueError: If `device` is another, or "cuda" and torch sees no card, or fewer than processes here.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device '{device}' is not supported. Choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA card. Use device 'cpu'.")
    chosen = torch.device(device)
    if device == "cuda":
        local_rank, num_cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= num_cards:
            raise ValueError(
                f"Process {local_rank} of this machine (LOCAL_RANK, from 0) has no card of its own: torch "
                f"sees {num_cards}. Start one process for each card: torchrun --nproc-per-node={num_cards}."
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if started:
        # With the card's id no collective has to guess it.
        backend, device_id = ("nccl", chosen) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=device_id)
    try:
        yield chosen
    finally:
        if started:
            gc.collect()  # a DistributedDataParallel object that outlives the group aborts the process
            dist.destroy_process_group()


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all ranks, (W * N, ...), from (N, ...) on each. No gradient flows."""
    if world_size() == 1:
        return x
    gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
    # torch 2.14 renamed it, and each process warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, x.contiguous())
    return gathered


@torch.no_grad()
def exchange_rows(x: Tensor, order: Tensor) -> Tensor:
    """Return this rank's part of the global batch in another order, sending each row only where it is needed.

    This is `gather_rows(x)[order]`, cut to this rank, at 1/W of its traffic.

    Args:
        x: This rank's rows, (N, ...), any dtype.
        order: A permutation of the W * N global rows, int64, on the CPU, the same on every rank.

    Returns:
        Global rows `order[r*N : (r+1)*N]`, (N, ...).
    """
    if world_size() == 1:
        return x[send_index(order, x.device)]
    n, me = len(x), rank()
    wanted_by = order.view(world_size(), n)  # (W, N) global row ids
    owner = wanted_by // n
    sent = [row[held == me] - me * n for row, held in zip(wanted_by, owner, strict=True)]
    received_counts = owner[me].bincount(minlength=world_size()).tolist()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Bytes, because gloo and nccl move every dtype and memory format the same way as bytes.
    _all_to_all(
        received,
        x[send_index(torch.cat(sent), x.device)].contiguous(),
        received_counts,
        [len(s) for s in sent],
    )
    arrived = send_index(owner[me].argsort(stable=True), x.device)  # received rows are sorted by owner
    result = torch.empty_like(received)
    result[arrived] = received
    return result


def send_index(index: Tensor, device: torch.device) -> Tensor:
    """Return a CPU index on `device`; the host does not wait for a card to take it."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def _all_to_all(out: Tensor, rows: Tensor, out_counts: list[int], in_counts: list[int]) -> None:
    flat_out, flat_rows = (t.view(len(t), -1).view(torch.uint8) for t in (out, rows))
    dist.all_to_all_single(flat_out, flat_rows, out_counts, in_counts)


@torch.no_grad()
def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= world_size()


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def same_on_all_ranks(value: str) -> bool:
    """Return whether all ranks pass the same text."""
    return len(set(gather_objects(value))) == 1


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def num_cpus() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def any_rank(value: bool) -> bool:
    """Return whether `value` is true on some rank."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order; they are pickled between our own processes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
