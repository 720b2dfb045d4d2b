"""Rows of tar shards that are not listed: each tar is read once, front to back, by whoever has it in hand.

A thread reads the tar some batches ahead; the decoding processes get the bytes of a batch instead of its ids,
so that memory holds a few batches whatever the size of a tar. A tar that is cut or damaged gives a row for
every image that lies whole before the damage, then one error with the name of the tar in the place of an
image's path; its shard is recorded as incomplete.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from mocohub.features.inputs import ImageRow, Inputs, TarImage
from mocohub.features.rows import Portion, RowMaker
from mocohub.shard_reader import IDS_PER_SHARD, DamagedShard, read_samples
from mocohub.shards import Shards

_BATCHES_AHEAD = 2


class TarBatch(NamedTuple):
    """Images of one tar that follow one another."""

    tar: int
    images: list[TarImage]
    is_last: bool
    damage: dict[str, Any] | None  # the error that stands for what could not be read of the tar


@dataclass
class TarShard:
    """The shard of one tar, under way.

    Attributes:
        number: Position of the tar among all.
        num_inputs: Images found so far, and 1 for a damage.
        is_finished: Whether that is all.
        incomplete: Name of the tar if it is damaged.
    """

    number: int
    num_inputs: int = 0
    is_finished: bool = False
    incomplete: str | None = None


def read_batches(shards: Shards, tars: Iterable[int], batch_size: int) -> Iterator[TarBatch]:
    """Yield the images of some tars in order, at least one batch of each; no batch crosses a border of tars.

    The class of an image is what the `.cls` file of its sample says, else the first folder of its path.

    Raises:
        ShardError: If a tar can neither be read nor is known to be damaged: the network, access.
        ImportError: For URLs if fsspec, or what it needs, is not installed.
    """
    prefixes = shards.prefixes()
    for tar in tars:
        images: list[TarImage] = []
        first_id, count, damage = tar * IDS_PER_SHARD, 0, None
        try:
            for image in read_samples(shards.urls[tar]):
                if len(images) == batch_size:
                    yield TarBatch(tar, images, False, None)
                    images = []
                folder, slash, _ = image.path.partition("/")
                class_name = image.class_name or (folder if slash else None)
                path = f"{prefixes[tar]}/{image.path}"
                images.append(TarImage(first_id + image.index, path, class_name, image.data))
                count += 1
        except DamagedShard as error:
            if count == IDS_PER_SHARD:
                raise  # no id is left to tell of it
            damage = {"id": first_id + count, "path": prefixes[tar], "reason": str(error)}
        yield TarBatch(tar, images, True, damage)


def portions(
    maker: RowMaker, tars: Iterable[int], batch_size: int, loader: Callable[[Iterable[Any]], DataLoader]
) -> Iterator[Portion]:
    """Yield rows and errors batch by batch, as `RowMaker.shards` does.

    Args:
        maker: Its inputs are `Shards`.
        tars: Positions of those to read; one is asked for when the reader is about to need it.
        batch_size: Images of a batch, of which the views of one image count each, as far as that goes.
        loader: Makes a DataLoader from an iterable of batches.
    """
    batch_size = max(1, batch_size // maker.network.views)
    under_way: deque[TarBatch] = deque()

    def batches() -> Iterator[list[TarImage]]:
        with closing(_ahead(read_batches(maker.inputs.images, tars, batch_size))) as read:
            for batch in read:
                under_way.append(batch._replace(images=[image._replace(data=None) for image in batch.images]))
                yield batch.images

    shard = None
    for decoded, begun in maker.begun(loader(batches())):
        batch = under_way.popleft()
        shard = shard or TarShard(batch.tar)
        found, known = maker.compute(decoded, begun), {image.id: image for image in batch.images}
        in_order = ((i, found[i]) for i in known)
        rows, errors = maker.split(in_order, lambda i, known=known: known[i].path)
        if rows is not None:
            rows.extras["class_name"] = [known[i].class_name for i in rows.ids.tolist()]
        if batch.damage is not None:
            errors.append(batch.damage)
            shard.incomplete = batch.damage["path"]
        shard.num_inputs += len(batch.images) + (batch.damage is not None)
        shard.is_finished = batch.is_last
        yield Portion(shard, rows, errors)
        shard = None if batch.is_last else shard


def first_items(inputs: Inputs) -> Iterator[ImageRow | dict[str, Any]]:
    """Yield the images of all tars as they come, and the errors of those that cannot be used."""
    for batch in read_batches(inputs.images, range(len(inputs.images)), 1):
        yield from (inputs[image] for image in batch.images)
        if batch.damage is not None:
            yield batch.damage


def _ahead(items: Iterator[TarBatch]) -> Iterator[TarBatch]:
    """Yield what an iterator does, which a thread asks for the next ones meanwhile."""
    pending: deque[Future[TarBatch | None]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        while True:
            while len(pending) < _BATCHES_AHEAD:
                pending.append(pool.submit(next, items, None))
            item = pending.popleft().result()
            if item is None:
                return
            yield item
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the read under way, then nobody else uses `items`
        items.close()
