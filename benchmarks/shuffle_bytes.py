"""Bytes a rank receives to shuffle the keys of one step: ours against the published scheme.

    python benchmarks/shuffle_bytes.py

Counted: gloo processes take steps, and what torch.distributed hands a rank from other ranks is added up. Ours
is `MoCo.step` with uint8 crops and the parameters of their colours; the network is one layer, since its size
moves no byte of this. The published scheme is written out below. Gradients and the mean of the loss are not
counted: both schemes move them alike. Calculated: by `calculate`, for any number of ranks. Goal: 1/30 of the
published bytes.
"""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocohub.distributed import process_group
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.data import Batch
from mocohub.pretrain.dictionary import Queue
from mocohub.pretrain.encoder import Encoder
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.randomness import Draws, permutation

OURS = ("crops", "parameters of their colours", "keys")
PUBLISHED = ("crops", "permutation", "keys to unshuffle", "keys to enqueue", "queue, a DDP buffer")
EMBED_DIM, QUEUE_SIZE, NUM_PARAMETERS = 128, 65536, 11


def calculate(world_size: int, local_batch_size: int, crop_px: int) -> tuple[dict[str, float], ...]:
    """Return the bytes a rank other than 0 receives in a step, ours and published, by what they are.

    In a random order of the global batch a rank finds 1/W of its new rows at home: this is the mean over
    orders.
    """
    others = (world_size - 1) * local_batch_size  # rows of the other ranks
    crop_bytes, key_bytes = 3 * crop_px**2, 4 * EMBED_DIM
    arriving = others / world_size
    ours = (arriving * crop_bytes, arriving * 4 * NUM_PARAMETERS, others * key_bytes)
    published = (
        others * 4 * crop_bytes,
        8 * world_size * local_batch_size,
        others * key_bytes,
        others * key_bytes,
        4 * EMBED_DIM * QUEUE_SIZE,
    )
    return dict(zip(OURS, ours, strict=True)), dict(zip(PUBLISHED, published, strict=True))


def count(
    world_size: int, local_batch_size: int, crop_px: int, steps: int
) -> list[list[list[tuple[str, int]]]]:
    """Return what each rank received in each step, as pairs (collective, bytes) in the order of the calls.

    They are indexed [rank][step]. The first `steps` steps are ours, the last one is the published scheme's.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, port, Path(folder), local_batch_size, crop_px, steps)
        mp.spawn(_count_on_rank, arguments, nprocs=world_size)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world_size)]


def _count_on_rank(
    rank: int, world_size: int, port: int, out: Path, local_batch_size: int, crop_px: int, steps: int
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group("cpu"):
        pixels = torch.randint(0, 256, (local_batch_size, 3, crop_px, crop_px), dtype=torch.uint8)
        crops = Crops(pixels, torch.zeros(local_batch_size, NUM_PARAMETERS))
        batch = Batch(torch.arange(local_batch_size), crops, crops, [])
        moco = _moco()
        received = []
        for step in range(steps):
            draws = Draws(permutation(step, "shuffle", 0, world_size * local_batch_size))
            with _counting() as calls:
                moco.step(batch, draws)
            received.append(calls)
        replica = DistributedDataParallel(_EncoderWithQueue(moco.key))
        with _counting() as calls:
            published_step(pixels / 255, replica)
        received.append(calls)
        del moco, replica  # DDP must be gone before the process group is
    Path(out, str(rank)).write_text(json.dumps(received))


def _encoder() -> Encoder:
    return Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, EMBED_DIM))


def _moco() -> MoCo:
    torch.manual_seed(0)
    query, key = _encoder(), _encoder()
    queue = Queue.random(QUEUE_SIZE, EMBED_DIM, torch.default_generator)
    optimizer = torch.optim.SGD(query.parameters(), lr=0.01)
    return MoCo(query, key, queue, optimizer, finish=lambda crops: crops.pixels / 255)


class _EncoderWithQueue(nn.Module):
    """The published module is wrapped in DDP with its queue in it."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.weight = nn.Parameter(torch.zeros(1))  # DDP wants something to train
        self.register_buffer("queue", torch.zeros(EMBED_DIM, QUEUE_SIZE))

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def published_step(images: Tensor, replica: nn.Module) -> None:
    """Send what the published scheme sends for the keys of this rank's images, (N, 3, H, W) float32."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def gather(rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    everything = gather(images)
    order = torch.randperm(len(everything))
    dist.broadcast(order, src=0)
    mine = everything[order.chunk(world_size)[rank]]
    keys = replica(mine).detach()  # DDP broadcasts the queue before this forward pass
    keys = gather(keys)[order.argsort().chunk(world_size)[rank]]
    gather(keys)


@contextmanager
def _counting() -> Iterator[list[tuple[str, int]]]:
    """Note the bytes that collectives bring to this rank from other ranks, call by call."""
    calls: list[tuple[str, int]] = []
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def of_gather(parts: list[Tensor], *_: Any) -> int:
        return sum(part.nbytes for part in parts) - parts[rank].nbytes

    def of_gather_into(out: Tensor, *_: Any) -> int:
        return out.nbytes // world_size * (world_size - 1)

    def of_all_to_all(out: Tensor, _: Tensor, out_rows: list[int], *__: Any) -> int:
        return out.nbytes // len(out) * (len(out) - out_rows[rank])

    def of_broadcast(tensor: Tensor, src: int) -> int:
        return tensor.nbytes * (rank != src)

    def of_buffers(_: Any, tensors: list[Tensor], __: int, src: int) -> int:
        return sum(tensor.nbytes for tensor in tensors) * (rank != src)

    arriving = {
        "all_gather": of_gather,
        "all_gather_into_tensor": of_gather_into,
        "all_gather_single": of_gather_into,  # its name since torch 2.14
        "all_to_all_single": of_all_to_all,
        "broadcast": of_broadcast,
        "_broadcast_coalesced": of_buffers,
    }
    originals = {name: getattr(dist, name) for name in arriving if hasattr(dist, name)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, arriving[name](*args, **kwargs)))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counted(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def by_name(
    received: list[list[list[tuple[str, int]]]],
) -> tuple[dict[str, float], ...]:
    """Return the means over steps and ranks other than 0 of what `count` noted, ours and published."""
    steps = [step for rank in received[1:] for step in rank[:-1]]
    ours = [mean(step[i][1] for step in steps) for i in range(len(OURS))]
    assert all(len(step) == len(OURS) for step in steps), "the step moves something that has no name here"
    # DDP's broadcast comes before the forward pass of the keys, the third call.
    images, permutation, queue, unshuffle, enqueue = (size for _, size in received[1][-1])
    published = (images, permutation, unshuffle, enqueue, queue)
    return dict(zip(OURS, ours, strict=True)), dict(zip(PUBLISHED, published, strict=True))


def main(
    local_batch_size: Annotated[int, tyro.conf.arg(help="Images of a rank.")] = 32,
    crop_px: Annotated[int, tyro.conf.arg(help="Side of a crop.")] = 224,
    steps: Annotated[
        int, tyro.conf.arg(help="Of ours, each with an order of its own; the mean counts.")
    ] = 10,
) -> None:
    """Print what a rank receives, counted at 2 and 4 ranks and calculated at 2, 4, 8 and 64."""
    columns = {}
    for world_size in (2, 4):
        received = count(world_size, local_batch_size, crop_px, steps)
        columns[f"{world_size}, counted"] = by_name(received)
        columns[f"{world_size}, calculated"] = calculate(world_size, local_batch_size, crop_px)
    for world_size in (8, 64):
        columns[f"{world_size}, calculated"] = calculate(world_size, local_batch_size, crop_px)

    def row(title: str, cells: list[str]) -> None:
        print(f"| {title} | " + " | ".join(cells) + " |")

    print(f"MB (10^6 bytes) received per step and rank, {local_batch_size} images of {crop_px} px a rank\n")
    row("ranks", list(columns))
    print("| --- |" + " ---: |" * len(columns))
    for side, names in enumerate((OURS, PUBLISHED)):
        for name in names:
            title = f"{('ours', 'published')[side]}: {name}"
            row(title, [f"{sizes[side][name] / 1e6:.3f}" for sizes in columns.values()])
    queue = PUBLISHED[-1]
    ours = [sum(sizes[0].values()) for sizes in columns.values()]
    all_published = [sum(sizes[1].values()) for sizes in columns.values()]
    shuffle = [sum(sizes[1].values()) - sizes[1][queue] for sizes in columns.values()]
    as_floats = [sum(sizes[0].values()) + 3 * sizes[0]["crops"] for sizes in columns.values()]
    row("published / ours", [f"{b / a:.1f}" for a, b in zip(ours, shuffle, strict=True)])
    row("... had ours moved float32", [f"{b / a:.1f}" for a, b in zip(as_floats, shuffle, strict=True)])
    row("... with the queue's broadcast", [f"{b / a:.1f}" for a, b in zip(ours, all_published, strict=True)])


if __name__ == "__main__":
    tyro.cli(main)
