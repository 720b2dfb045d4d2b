"""Batches from tar shards, in an order that is a pure function of the seed, the shards and two numbers.

The shards of epoch 0 in random order, then those of epoch 1 in another, and so on, are one endless sequence.
It is dealt to L lanes: lane l reads shards l, l + L, l + 2L, ... of it, one after the other, and brings
batch / L images to every step, in the order of the lanes. Each lane shuffles its images in blocks: a block is
as many images as the lane's buffer holds, or fewer where its shards of an epoch end.

Each of W ranks owns L / W neighbouring lanes, each of its workers some of those. So one process reads each
byte, and neither ranks nor workers change the order. A lane stands at five integers, so a run goes on where
it stopped, with any number of ranks that divides L, after at most two buffers have been read again.

An image comes once in every epoch of its lane. Shards differ in size, so lanes do not end an epoch at the
same step: they go on with the next one, and the epochs of a recipe are numbers of steps.
"""

import functools
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mocohub import distributed
from mocohub.errors import unknown
from mocohub.images import ImageError
from mocohub.pretrain.data import Batch, Sample, collate, make_views, views_per_image
from mocohub.pretrain.randomness import permutation, stream
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.signals import shield_worker
from mocohub.shard_reader import IDS_PER_SHARD, DamagedShard, ShardError, ShardImage, read_shard
from mocohub.shards import Shards

logger = logging.getLogger(__name__)

_MOST_LANES = 128  # by default
_BUFFER_IMAGES = 8192  # by default: 0.9 GB of ImageNet's files, divided among the ranks
_POSITIONS_KEPT = 8  # steps
_TRIES = 1000  # images of a lane, one after the other, of which one must decode


class Item(NamedTuple):
    """What a lane finds: an image, or the damage that ends a shard."""

    epoch: int
    image_id: int
    found: ShardImage | ShardError
    place: tuple[int, int, int]  # where it begins: position in the endless sequence, image, byte


@dataclass(frozen=True)
class Lanes:
    """The order of the images of `num_lanes` lanes."""

    urls: list[str]
    seed: int
    num_lanes: int
    buffer_images: int  # of all lanes together

    def start(self, lane: int) -> list[int]:
        """Return the position of a lane that has read nothing."""
        return [0, lane, 0, 0, 0]

    def read(self, lane: int, position: Sequence[int]) -> Iterator[tuple[Item, list[int]]]:
        """Yield the items of a lane from a position on, without end, each with the position behind it.

        A position is the number of a block, the place of its first item and how many of its items are used.
        For each item that is used, one is read ahead, so that work and memory are even.
        """
        block, *place, num_used = position
        per_block = max(1, self.buffer_images // self.num_lanes)
        items = self._read_shards(lane, *place)
        ahead = deque([next(items)])
        while True:
            epoch, place = ahead[0].epoch, ahead[0].place
            while len(ahead) < per_block and ahead[-1].epoch == epoch:
                ahead.append(next(items))
            num_items = sum(item.epoch == epoch for item in ahead)
            current = [ahead.popleft() for _ in range(num_items)]
            for i, chosen in enumerate(stream(self.seed, "block", lane, block).permutation(num_items), 1):
                if i > num_used:
                    yield current[chosen], [block, *place, i]
                current[chosen] = None
                ahead.append(next(items))
            block, num_used = block + 1, 0

    def _read_shards(self, lane: int, turn: int, index: int, offset: int) -> Iterator[Item]:
        while True:
            epoch, number = divmod(turn, len(self.urls))
            shard = int(_order_of_shards(self.seed, epoch, len(self.urls))[number])
            try:
                for image in read_shard(self.urls[shard], offset, index):
                    yield Item(epoch, shard * IDS_PER_SHARD + index, image, (turn, index, offset))
                    index, offset = image.index + 1, image.end
            except ShardError as error:
                yield Item(epoch, shard * IDS_PER_SHARD + index, error, (turn, index, offset))
            turn, index, offset = turn + self.num_lanes, 0, 0


@functools.lru_cache(maxsize=4)
def _order_of_shards(seed: int, epoch: int, num_shards: int) -> Tensor:
    return permutation(seed, "shards", epoch, num_shards)


@dataclass
class _Parts(IterableDataset):
    """One worker's part of each of this rank's batches, with the positions of its lanes behind it."""

    lanes: Lanes
    shards: Shards
    recipe: Recipe
    on_device: bool
    on_damage: str
    owned: range  # lanes of this rank
    positions: list[list[int]]  # of these lanes
    num_steps: int

    def __iter__(self) -> Iterator[tuple[Batch, list[list[int]]] | str]:
        """Yield the part of each step, or the text of the error that ends them."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first, last = (len(self.owned) * n // num_workers for n in (number, number + 1))
        positions = self.positions[first:last]
        readers = [self.lanes.read(*start) for start in zip(self.owned[first:last], positions, strict=True)]
        rows_per_lane = self.recipe.global_batch_size // self.lanes.num_lanes
        try:
            for _ in range(self.num_steps):
                samples = []
                for i, reader in enumerate(readers):
                    for _ in range(rows_per_lane):
                        sample, positions[i] = self._next_sample(reader)
                        samples.append(sample)
                yield collate(samples), list(positions)
        except ShardError as error:  # raised again where no traceback of a worker hides it
            yield str(error)

    def _next_sample(self, reader: Iterator[tuple[Item, list[int]]]) -> tuple[Sample, list[int]]:
        """Return the views of the next image of a lane that decodes."""
        broken = []
        for item, position in islice(reader, _TRIES):
            try:
                return Sample(item.image_id, self._views(item), broken), position
            except ImageError as error:
                broken.append((item.image_id, str(error)))
        reasons = "; ".join(f"{self.shards.path(i)}: {why}" for i, why in broken[:3])
        raise ShardError(f"{_TRIES} images, one after the other, cannot be decoded: {reasons}.")

    def _views(self, item: Item) -> list[Any]:
        found = item.found
        if isinstance(found, DamagedShard):
            if self.on_damage == "skip":
                raise ImageError(str(found))
            raise ShardError(f"{found} With on_damage='skip' a run goes on without the rest of it.")
        if isinstance(found, ShardError):
            raise found
        try:
            if found.data is None:
                raise ImageError("larger than any image that can be decoded")
            options = {"on_device": self.on_device, "num_views": views_per_image(self.recipe)}
            return make_views(found.data, self.recipe, item.epoch, item.image_id, **options)
        except ImageError as error:
            raise ImageError(f"'{found.path}': {error}") from error


class StreamLoader:
    """This rank's batches, one for each step, and where the stream stands behind each."""

    def __init__(self, parts: _Parts, start_step: int, num_workers: int, pin_memory: bool) -> None:
        """Take what a worker does; `stream_loader` makes it."""
        self._parts, self._start_step, self._pin_memory = parts, start_step, pin_memory
        self._num_parts = max(1, num_workers)
        options: dict[str, Any] = {"prefetch_factor": 4} if num_workers else {}
        self._loader = DataLoader(
            parts,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            worker_init_fn=partial(shield_worker, yields=not self._pin_memory),
            **options,
        )
        self._positions = {start_step: parts.positions}
        self._settings = {
            "shards_sha256": parts.shards.fingerprint(),
            "num_lanes": parts.lanes.num_lanes,
            "buffer_images": parts.lanes.buffer_images,
            "first_lane": parts.owned.start,
        }

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._parts.num_steps

    def __iter__(self) -> Iterator[Batch]:
        parts = iter(self._loader)  # one of each worker in turn
        try:
            for step in range(self._start_step + 1, self._start_step + len(self) + 1):
                of_step = list(islice(parts, self._num_parts))
                for part in of_step:
                    if isinstance(part, str):
                        raise ShardError(part)
                batches, positions = zip(*of_step, strict=True)
                self._positions[step] = sum(positions, [])
                self._positions.pop(step - _POSITIONS_KEPT, None)
                yield _join(batches, self._pin_memory)
        finally:
            del parts  # ends the workers now; later, in no certain order, it can take five seconds each

    def position_after(self, step: int) -> dict[str, Any]:
        """Return where this rank's lanes stand after `step` steps, as JSON values for `merge_positions`.

        Args:
            step: One of the last eight: a caller may take batches ahead of the step it saves.
        """
        return {"step": step, **self._settings, "positions": self._positions[step]}


def stream_loader(
    shards: Shards,
    recipe: Recipe,
    *,
    start_step: int = 0,
    position: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_device: bool = False,
    num_lanes: int | None = None,
    buffer_images: int | None = None,
    on_damage: Literal["stop", "skip"] = "stop",
) -> StreamLoader:
    """Return this rank's batches from `start_step` to the end of the training.

    Broken images are passed over: the next one of the same lane takes their place.

    Args:
        shards: The training set.
        recipe: What is drawn from it. It must say how many `steps`, or `shards` how many images.
        start_step: Where to begin.
        position: Where the stream stood then, of all ranks (`merge_positions`); None at step 0.
        num_workers: Reading and decoding processes of this rank, at most one for each of its lanes; 0 to do
            it in this one.
        pin_memory: Whether batches come in page-locked memory, for copies to a GPU that do not wait.
        on_device: Whether colours, blur and mirror images are left to `augment_batch.finish_views`.
        num_lanes: Shards that are read at a time, over all ranks: divides the batch, is a multiple of the
            ranks, and at most the number of shards. By default that of `position`, else the largest divisor
            of the batch up to 128.
        buffer_images: Encoded images in memory to shuffle from, over all ranks; by default that of
            `position`, else 8192.
        on_damage: What becomes of a shard that is cut, damaged or gone. "stop" ends the run when the damage
            is reached, after all that lies whole before it: resume when the shard has been repaired, and
            nothing is lost. "skip" counts the damage as a broken image and goes on without the rest of the
            shard. A shard that cannot be read for another reason (network, permissions) always ends the run.

    Raises:
        ValueError: If the settings do not go together, or are not those of `position`.
        ShardError: While iterating, for a shard that cannot be read to its end (see `on_damage`), or if 1,000
            images of a lane, one after the other, are broken.
    """
    if on_damage not in ("stop", "skip"):
        raise unknown("on_damage", on_damage, ["stop", "skip"])
    if recipe.mechanism == "memory_bank":
        raise ValueError("A memory bank has an entry for each image and cannot train from a stream.")
    steps_per_epoch = (shards.num_images or 0) // recipe.global_batch_size
    total_steps = recipe.total_steps(steps_per_epoch)
    if not total_steps:
        raise ValueError(
            f"The length of the training is unknown, as '{shards.source}' does not say how many images there "
            "are. Give their number (num_images), or steps in the recipe (--set steps=N)."
        )
    given = {"num_lanes": num_lanes, "buffer_images": buffer_images}
    if position is not None:
        given = _settings(position, start_step, shards, given)
    elif start_step:
        raise ValueError(f"Step {start_step} of a stream can only be found with the position saved there.")
    num_lanes = _num_lanes(recipe.global_batch_size, len(shards), given["num_lanes"])
    buffer_images = _BUFFER_IMAGES if given["buffer_images"] is None else given["buffer_images"]
    if buffer_images < 1:
        raise ValueError(f"buffer_images ({buffer_images}) must be at least 1.")
    lanes = Lanes(shards.urls, recipe.seed, num_lanes, buffer_images)
    share = num_lanes // distributed.world_size()
    owned = range(share * distributed.rank(), share * (distributed.rank() + 1))
    if num_workers > share:
        logger.warning(
            f"This rank has {share} of {num_lanes} lanes, so {share} of {num_workers} workers are started. "
            "More lanes (num_lanes) would keep all busy."
        )
    starts = [lanes.start(lane) for lane in owned]
    if position is not None:
        starts = position["positions"][owned.start : owned.stop]
    num_steps = max(0, total_steps - start_step)
    parts = _Parts(lanes, shards, recipe, on_device, on_damage, owned, starts, num_steps)
    return StreamLoader(parts, start_step, min(num_workers, share), pin_memory)


def merge_positions(positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the positions of all ranks, in any order, into the one to save."""
    positions = sorted(positions, key=lambda position: position["first_lane"])
    merged = [lane for position in positions for lane in position["positions"]]
    assert len(merged) == positions[0]["num_lanes"], "a rank is missing"
    assert len({position["step"] for position in positions}) == 1, "ranks are at different steps"
    return {**positions[0], "positions": merged}


def _settings(
    position: Mapping[str, Any], start_step: int, shards: Shards, given: dict[str, int | None]
) -> dict[str, int]:
    """Return the settings that a saved position goes with; refuse others."""
    now = {"step": start_step, "shards_sha256": shards.fingerprint()}
    now |= {name: value for name, value in given.items() if value is not None}
    differing = [
        f"{name} was {position[name]}, now {value}" for name, value in now.items() if value != position[name]
    ]
    if differing:
        raise ValueError(
            f"The position in the stream does not fit: {'; '.join(differing)}. Resume with the same shards "
            "and settings, or start another run."
        )
    return {name: position[name] for name in given}


def _num_lanes(batch: int, num_shards: int, given: int | None) -> int:
    """Return the number of lanes, which must not depend on the number of ranks unless it is given."""
    world_size = distributed.world_size()
    possible = [n for n in range(1, min(batch, num_shards) + 1) if batch % n == 0]
    num_lanes = max(n for n in possible if n <= _MOST_LANES) if given is None else given
    if num_lanes not in possible or num_lanes % world_size:
        choices = [n for n in possible if n % world_size == 0]
        raise ValueError(
            f"num_lanes ({num_lanes}) must divide global_batch_size ({batch}), be a multiple of the "
            f"{world_size} processes and at most the number of shards ({num_shards}). "
            + (
                f"Choose one of: {', '.join(map(str, choices))}."
                if choices
                else f"There is no such number: make at least {world_size} shards, or use fewer processes."
            )
        )
    return num_lanes


def _unchanged(part: Any) -> Any:
    return part


def _join(parts: Sequence[Any], pin_memory: bool) -> Any:
    """Put the rows of some batches after each other: tensors and lists, inside tuples."""
    one = parts[0]
    if one is None or (len(parts) == 1 and not pin_memory):
        return one
    if isinstance(one, list):
        return [entry for part in parts for entry in part]
    if isinstance(one, Tensor):
        shape = (sum(map(len, parts)), *one.shape[1:])
        return torch.cat(parts, out=torch.empty(shape, dtype=one.dtype, pin_memory=pin_memory))
    return type(one)(*(_join(values, pin_memory) for values in zip(*parts, strict=True)))
