"""Shards through a loader and the network, batch by batch, with a progress bar."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mocohub.distributed import num_cpus
from mocohub.features.inputs import collate
from mocohub.features.leases import Leases
from mocohub.features.rows import Portion, RowMaker
from mocohub.features.stream import portions


def load_portions(
    maker: RowMaker,
    shards: Iterable[tuple[int, range]],
    total: int,
    *,
    batch_size: int,
    num_workers: int | None,
    device: torch.device,
    progress: bool,
    leases: Leases | None = None,
) -> Iterator[Portion]:
    """Yield rows and errors of shards batch by batch, in order.

    Args:
        maker: What makes rows of batches.
        shards: Number and ids of each shard; one is asked for when the loader is about to need it.
        total: Images in all of them, or tars that are streamed.
        batch_size: Images of a batch, views counted.
        num_workers: Processes that decode; None for as many as `extract` says.
        device: Where the network computes.
        progress: Show images per second, remaining time and errors so far; on a terminal only.
        leases: What shows that this worker is alive, if shards are taken by lease.
    """
    shards = iter(shards)
    first = next(shards, None)
    if first is None:
        return  # before processes are started for nothing
    shards = chain([first], shards)
    inputs, is_stream = maker.inputs, maker.inputs.is_stream
    if num_workers is None:
        num_workers = min(16, max(1, num_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        if not is_stream:
            num_batches = -(-total // batch_size)
            num_workers = 0 if inputs.in_memory else min(num_workers, num_batches - 1)

    def loader(batches: Iterable[Any]) -> DataLoader:
        return DataLoader(
            inputs,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_yield_cores if device.type == "cpu" else None,
            generator=torch.Generator(),  # or the loader would draw a seed from the global one
        )

    if is_stream:
        found = portions(maker, (number for number, _ in shards), batch_size, loader)
    else:
        found = maker.shards(shards, batch_size, loader)
    num_images = num_errors = 0
    unit = "tar" if is_stream else "img"
    with tqdm(total=total, desc="extract", unit=unit, disable=None if progress else True) as bar:
        for portion in found:
            num_new = (0 if portion.rows is None else len(portion.rows.ids)) + len(portion.errors)
            num_images, num_errors = num_images + num_new, num_errors + len(portion.errors)
            if not bar.disable:
                speed = {"img/s": f"{num_images / bar.format_dict['elapsed']:.1f}"} if is_stream else {}
                bar.set_postfix(**speed, **({"errors": num_errors} if num_errors else {}), refresh=False)
            if leases is not None:
                leases.beat()
            yield portion
            bar.update(portion.shard.is_finished if is_stream else num_new)


def _yield_cores(worker_id: int) -> None:
    """Take only the processor time that the network leaves over: all its threads wait for a displaced one."""
    os.nice(19)
