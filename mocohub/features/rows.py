"""From batches of images to rows of features: shard by shard, in the order of the ids.

Of images with the same bytes, the first of a shard may stand for the others: it alone is read and computed,
and its row is repeated where they are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mocohub.features.inputs import Batch, ImageRow, Inputs
from mocohub.features.network import FrozenNetwork
from mocohub.features.precision import Rows as Computed
from mocohub.features.projection import Projection
from mocohub.features.writer import NO_LABEL, Rows

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class _Row(NamedTuple):
    """What was found out about one image."""

    label: int
    size: tuple[int, int]  # (None, None) if unknown
    sha256: str | None
    values: list[np.ndarray]  # (D,) of each column


class Shard:
    """A shard of listed images, under way: which are to be computed, and which rows are complete."""

    def __init__(self, number: int, ids: range, hashes: list[str | None] | None = None) -> None:
        """Begin a shard; `hashes`, one for each id, says which images are the same."""
        self.number, self.ids = number, ids
        self.distinct: range | list[int] = ids
        self.num_inputs, self.incomplete = len(ids), None
        self._first: dict[int, int] = {}  # of each repeated image: the image it repeats
        self._last: dict[int, int] = {}  # of each image that is repeated: its last repetition
        self._found: dict[int, _Row | str] = {}  # rows, or reasons, that are still needed
        self._next, self._num_seen = ids.start, 0
        if hashes is not None:
            seen: dict[str, int] = {}
            for i, digest in zip(ids, hashes, strict=True):
                if digest is not None and (first := seen.setdefault(digest, i)) != i:
                    self._first[i], self._last[first] = first, i
            self.distinct = [i for i in ids if i not in self._first]

    @property
    def is_finished(self) -> bool:
        """Whether all rows and errors have been given out."""
        return self._next == self.ids.stop

    def add(self, found: dict[int, "_Row | str"]) -> Iterator[tuple[int, "_Row | str"]]:
        """Take what the next batch of `distinct` gave; yield what is known up to the image after it."""
        self._found |= found
        self._num_seen += len(found)
        stop = self.distinct[self._num_seen] if self._num_seen < len(self.distinct) else self.ids.stop
        for i in range(self._next, stop):
            first = self._first.get(i, i)
            yield i, self._found[first]
            if self._last.get(first, first) <= i:
                del self._found[first]
        for i in found.keys() & self._found.keys():  # so that its whole batch need not stay in memory
            row = self._found[i]
            if not isinstance(row, str):
                self._found[i] = row._replace(values=[values.copy() for values in row.values])
        self._next = stop


class Portion(NamedTuple):
    """What one batch has brought."""

    shard: Any  # a `Shard`, or a `stream.TarShard`
    rows: Rows | None  # None if there are none
    errors: list[dict[str, Any]]


class RowMaker:
    """A frozen network and all that is done to its output, over the images of an input."""

    def __init__(
        self,
        inputs: Inputs,
        network: FrozenNetwork,
        *,
        output_dtype: str,
        normalize: bool,
        projection: Projection | None,
        dedup: bool,
    ) -> None:
        """Keep the arguments; they are those of `extract`."""
        self.inputs, self.network, self.projection = inputs, network, projection
        self.output_dtype, self.normalize, self.dedup = output_dtype, normalize, dedup

    @property
    def columns(self) -> dict[str, int]:
        """Name and width of each column of the rows."""
        columns = self.network.columns
        return dict.fromkeys(columns, self.projection.num_components) if self.projection else dict(columns)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the columns that are not vectors, the shape of a row: its values in that order are the row."""
        return dict(self.network.shapes)

    @property
    def extras(self) -> list[str]:
        """Names of the columns that rows have besides."""
        extras = {"content_sha256": self.inputs.content_hash, "class_name": self.inputs.is_stream}
        return ["width", "height", *(name for name, is_known in extras.items() if is_known)]

    def shards(
        self,
        shards: Iterable[tuple[int, range]],
        batch_size: int,
        loader: Callable[[Iterable[Any]], DataLoader],
    ) -> Iterator[Portion]:
        """Yield the shard in hand, its next rows (None if there are none) and errors, batch by batch.

        Args:
            shards: Number and ids of each shard; one is asked for when the loader is about to need it.
            batch_size: Images of a batch, of which the views of one image count each, as far as that goes;
                no batch crosses the border of shards.
            loader: Makes a DataLoader from an iterable of batches of ids.
        """
        under_way: deque[Shard] = deque()
        batch_size = max(1, batch_size // self.network.views)

        def batches() -> Iterator[range | list[int]]:
            for number, ids in shards:
                shard = Shard(number, ids, self._hashes(ids) if self.dedup else None)
                under_way.append(shard)
                for start in range(0, len(shard.distinct), batch_size):
                    yield shard.distinct[start : start + batch_size]

        for batch, begun in self.begun(loader(batches())):
            shard = under_way[0]
            rows, errors = self.split(shard.add(self.compute(batch, begun)), self.inputs.paths.__getitem__)
            if shard.is_finished:
                under_way.popleft()
            yield Portion(shard, rows, errors)

    def _hashes(self, ids: range) -> list[str | None]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(self.inputs.content_sha256, ids))

    def begun(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[Callable[[], Computed]]]]:
        """Yield each batch and its features under way, once the next is begun: no card waits for rows."""
        former = None
        try:
            for batch in batches:
                begun = batch, [self.network.begin(pixels) for pixels in batch.pixels]
                if former is not None:
                    yield former
                former = begun
        except (Exception, KeyboardInterrupt):
            if former is not None:  # what is computed is not lost with what cannot be
                yield former
            raise
        if former is not None:
            yield former

    @torch.inference_mode()
    def compute(self, batch: Batch, begun: list[Callable[[], Computed]]) -> dict[int, _Row | str]:
        """Return the row of each image of a batch of `begun` by its id, or the reason why it has none."""
        found: dict[int, _Row | str] = {error["id"]: error["reason"] for error in batch.errors}
        if not batch.ids:
            return found
        parts, kept, stop = [], [], 0  # kept: positions in the batch
        for pixels, wait in zip(batch.pixels, begun, strict=True):
            part, start, stop = wait(), stop, stop + len(pixels)
            if reason := self._misfit(part):
                found |= dict.fromkeys(batch.ids[start:stop], reason)
            else:
                parts.append(part)
                kept += range(start, stop)
        if not kept:
            return found
        columns = [self._finish(torch.cat([part[name] for part in parts])) for name in self.columns]
        finite = np.logical_and.reduce([np.isfinite(values).all(1) for values in columns])
        for row, at in enumerate(kept):
            i, size = batch.ids[at], batch.sizes[at] or (None, None)
            if finite[row]:
                values = [column[row] for column in columns]
                found[i] = _Row(batch.labels[at], size, batch.sha256s[at], values)
            else:
                found[i] = f"its features are not finite in {self.output_dtype}"
        return found

    def _misfit(self, part: dict[str, torch.Tensor]) -> str | None:
        """Say in what the features of some images have another shape than those of the first images."""
        for name, width in self.network.columns.items():
            expected, found = self.network.shapes.get(name, [width]), [*part[name].shape[1:]]
            if found != expected:
                return f"its {name} has the shape {found}, but that of the first images {expected}"
        return None

    def _finish(self, values: torch.Tensor) -> np.ndarray:
        if self.projection is not None:
            values = torch.from_numpy(self.projection(values.numpy()))
        values = values.flatten(1)  # of a map the channels' maps, one after the other
        if self.normalize:
            # By powers of two, which is exact, such that squares are neither infinite nor lost.
            _, exponents = torch.frexp(values.abs().amax(1, keepdim=True))
            values = F.normalize(torch.ldexp(values, -exponents))
        return values.to(_DTYPES[self.output_dtype]).numpy()

    def split(
        self, found: Iterator[tuple[int, _Row | str]], path_of: Callable[[int], str]
    ) -> tuple[Rows | None, list[dict[str, Any]]]:
        """Return what `compute` has found as rows, None if there are none, and as errors."""
        ids, rows, errors = [], [], []
        for i, row in found:
            if isinstance(row, str):
                errors.append({"id": i, "path": path_of(i), "reason": row})
            else:
                ids.append(i)
                rows.append(row)
        if not ids:
            return None, errors
        columns = zip(*(row.values for row in rows), strict=True)
        values = {name: np.stack(column) for name, column in zip(self.columns, columns, strict=True)}
        labels = self._labels(ids) if self.dedup else [row.label for row in rows]
        widths, heights = zip(*(row.size for row in rows), strict=True)
        extras = {"width": list(widths), "height": list(heights)}
        if self.inputs.content_hash:
            extras["content_sha256"] = [row.sha256 for row in rows]
        paths = [path_of(i) for i in ids]
        return Rows(np.array(ids), paths, np.array(labels), values, extras), errors

    def _labels(self, ids: list[int]) -> list[int]:
        """Labels of the images themselves: those that look the same may have several."""
        labels = self.inputs.images.labels
        return [NO_LABEL if labels is None or labels[i] is None else labels[i] for i in ids]


def sample(
    items: Iterator[ImageRow | dict[str, Any]],
    batch_size: int,
    num_images: int,
    count: int = 8,
    tries: int = 64,
    one_reason_ends: bool = False,
) -> torch.Tensor | list[dict[str, Any]]:
    """Return a batch (n, [V,] C, H, W) made of the first images; the errors, if there is not one image.

    It is of the size that `RowMaker.shards` makes. Every process that looks at the same inputs gets the same.
    With `one_reason_ends`, `tries` errors with one reason are enough, if there was no image before them.
    """
    found, errors = [], []
    for i, item in enumerate(items):
        if isinstance(item, dict):
            errors.append(item)
        elif not found or item.pixels.shape == found[0].shape:
            found.append(item.pixels)
        if len(found) == min(count, batch_size) or (found and i >= tries):
            break
        if one_reason_ends and not found and i + 1 == tries and len({e["reason"] for e in errors}) == 1:
            break
    if not found:
        return errors
    views = len(found[0]) if found[0].ndim == 4 else 1
    size = min(max(1, batch_size // views), num_images)
    return torch.stack(found)[torch.arange(size) % len(found)]
