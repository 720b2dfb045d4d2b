"""Retrieval: how high the images of one class, or of one object, stand when all are ranked by similarity."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from mocohub.probes.inputs import (
    Bank,
    as_array,
    check_labels,
    checked_device,
    cut,
    refuse_mixed_labels,
    refuse_nonfinite,
    row_blocks,
)
from mocohub.probes.neighbors import exact_products, unit_rows

_QUERY_ROWS = 1024
_TILE_VALUES = 1 << 26  # similarities of some queries in memory; if they cover the gallery it is read once


@dataclass(frozen=True)
class RetrievalResult:
    """How well the relevant images of a gallery rank, as means over queries; shares in 0..1.

    Attributes:
        recall: recall@k by k: share of queries with at least one relevant image among the first k (Jegou et
            al. 2011; in metric learning since arXiv 1511.06452).
        mean_average_precision: mAP over the whole ranking, without interpolation.
        mean_average_precision_at_r: MAP@R (arXiv 2003.08505, section 3.2): only the first R of the ranking
            count, R being the number of relevant images of the query.
        num_queries: Queries that count.
        num_left_out: Queries without any relevant image in the gallery; no number counts them.
        num_gallery: Images that were ranked.
        average_precisions: AP of each query that counts, (num_queries,), in the order of the queries.
        average_precisions_at_r: Likewise AP@R.
        counted: Positions of these queries, (num_queries,).
    """

    recall: dict[int, float]
    mean_average_precision: float
    mean_average_precision_at_r: float
    num_queries: int
    num_left_out: int
    num_gallery: int
    average_precisions: np.ndarray
    average_precisions_at_r: np.ndarray
    counted: np.ndarray

    @property
    def precision_at_1(self) -> float:
        """Share of queries whose nearest image is relevant."""
        return self.recall[1]


@exact_products()
def retrieval(
    queries: Bank,
    query_labels: ArrayLike,
    gallery: Bank | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    ignored: Sequence[ArrayLike] | None = None,
    device: str | torch.device | None = None,
) -> RetrievalResult:
    """Rank a gallery for each query by cosine similarity, exactly, and say how high relevant images stand.

    An image is relevant if its label is the query's. Three rules make every answer definite: of equal
    similarities the irrelevant image stands first, so that features which are all alike gain nothing, and
    relevant ones share the last place among them, as in scikit-learn's average precision; a query without
    any relevant image is left out and counted; a vector of zeros has similarity 0 to everything.

    The gallery is read in blocks, for every 1024 queries once if it has at most 65,536 rows, else twice.
    Similarities are float32, or float64 if the queries are. In memory are 1024 x 65,536 of them, and those of
    relevant images: 1024 x the largest class of a query.

    Args:
        queries: Features (Q, D): an array, a tensor, or whatever has `blocks()`, as a feature folder.
        query_labels: What makes two images relevant to each other, (Q,), integers or strings: the class, or
            the object or place that an image shows.
        gallery: Features (N, D) that are ranked. None ranks the queries themselves, each without itself.
        gallery_labels: Likewise (N,).
        ks: Of recall@k; 1 is always among them. A k beyond the gallery takes all of it.
        ignored: For each query the rows of the gallery that neither help nor harm: further pictures of
            the same scene, or "junk" as in arXiv 1803.11285.
        device: Where to compute. Default: CUDA if there is a card.

    Raises:
        ValueError: If labels, widths or rows do not fit, the device cannot be used, a value is not finite,
            `ks` is out of range, or no query has a relevant image.

    >>> X = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 0.9], [1.0, 1.0]]
    >>> found = retrieval(X, ["cat", "cat", "dog", "dog", "cow"])
    >>> found.recall[1], found.mean_average_precision, found.num_queries, found.num_left_out
    (1.0, 1.0, 4, 1)
    """
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)} must be ranks, 1 or more, for instance (1, 5, 10).")
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels go together: give both, or none to rank the queries.")
    within = gallery is None
    if not len(queries):
        raise ValueError("There are no queries: give at least one row.")
    Q = np.concatenate([*row_blocks(queries)])
    Q = Q if Q.dtype == np.float64 else Q.astype(np.float32)
    gallery, gallery_labels = (Q, query_labels) if within else (gallery, gallery_labels)
    wanted, labels = _codes(query_labels, gallery_labels)
    if len(wanted) != len(Q):
        raise ValueError(f"query_labels has {len(wanted)} entries, but there are {len(Q)} queries.")
    if ignored is not None and len(ignored) != len(Q):
        raise ValueError(
            f"ignored has {len(ignored)} entries, but there are {len(Q)} queries: give one for each."
        )
    ignored = [np.asarray(rows, np.int64) for rows in ([[]] * len(Q) if ignored is None else ignored)]
    if any(((rows < 0) | (rows >= len(labels))).any() for rows in ignored):
        raise ValueError(f"ignored must hold rows of the gallery, 0 to {len(labels) - 1}.")
    refuse_nonfinite(Q)
    device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    found, counted = [], []
    for start in range(0, len(Q), _QUERY_ROWS):
        rows = range(start, min(start + _QUERY_ROWS, len(Q)))
        left_out = [[*ignored[row].tolist(), *([row] if within else [])] for row in rows]
        chunk = _Queries(
            unit_rows(torch.from_numpy(Q[rows.start : rows.stop])),
            wanted[rows.start : rows.stop],
            left_out,
            device,
        )
        numbers, has_relevant = chunk.rank(gallery, labels)
        found.append(numbers)
        counted.append(np.flatnonzero(has_relevant) + start)
    first_rank, precision, precision_at_r = (np.concatenate(column) for column in zip(*found, strict=True))
    counted = np.concatenate(counted)
    if not len(counted):
        raise ValueError(
            f"None of the {len(Q)} queries has a relevant image in the gallery. "
            "Give a gallery with their labels."
        )
    return RetrievalResult(
        recall={int(k): float((first_rank <= k).mean()) for k in sorted({1, *ks})},
        mean_average_precision=float(precision.mean()),
        mean_average_precision_at_r=float(precision_at_r.mean()),
        num_queries=len(counted),
        num_left_out=len(Q) - len(counted),
        num_gallery=len(labels) - within,
        average_precisions=precision,
        average_precisions_at_r=precision_at_r,
        counted=counted,
    )


class _Queries:
    """Some queries (B, D), and their similarities to a gallery, tile by tile."""

    def __init__(
        self, units: torch.Tensor, wanted: np.ndarray, left_out: list[list[int]], device: torch.device
    ) -> None:
        self._units, self._wanted = units.to(device), torch.from_numpy(wanted).to(device)
        self._rows = torch.tensor(
            [row for row, columns in enumerate(left_out) for _ in columns], dtype=torch.long
        )
        self._columns = torch.tensor([column for columns in left_out for column in columns], dtype=torch.long)
        self._device = device

    def rank(self, gallery: Any, labels: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Return rank of the first relevant image, AP and AP@R of each query that has one; and which have."""
        labels = torch.from_numpy(labels)
        sizes = labels.bincount(minlength=int(self._wanted.max()) + 1).to(self._device)
        most = max(1, int(sizes[self._wanted].max()))  # relevant images of a query, however many others
        num_columns = min(len(labels), max(1, _TILE_VALUES // len(self._units)))
        tiles = partial(self._tiles, gallery, labels, num_columns)
        only = list(tiles()) if num_columns == len(labels) else None  # one tile is not computed twice
        relevant, counts = self._relevant(only or tiles(), most)  # (B, R), (B,)
        # How many irrelevant images have at least the similarity of each relevant one.
        irrelevant = torch.zeros_like(relevant, dtype=torch.long)
        for similarities, kind in only or tiles():
            ascending = _sorted(similarities.masked_fill_(kind != 0, -torch.inf))
            irrelevant += num_columns - torch.searchsorted(ascending, relevant)
        places = torch.arange(most, device=self._device).where(_differs(relevant), 0)
        not_below = counts[:, None] - places.cummax(1).values  # relevant ones, itself and its equals included
        rank = not_below + irrelevant
        precision = torch.where(relevant.isfinite(), not_below / rank.double(), 0.0)
        has = counts > 0
        best = (counts - 1).clamp(min=0)[:, None]
        numbers = (
            irrelevant.gather(1, best)[:, 0] + 1,
            precision.sum(1) / counts,
            (precision * (rank <= counts[:, None])).sum(1) / counts,
        )
        return tuple(column[has].cpu().numpy() for column in numbers), has.cpu().numpy()

    def _tiles(
        self, gallery: Any, labels: torch.Tensor, num_columns: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield similarities (B, num_columns) to the next part of the gallery, each in the same memory.

        Beside them 1 where the image is relevant, 0 where it is not, -1 where it is ignored or there is none.
        """
        similarities = self._units.new_empty(len(self._units), num_columns)
        kind = torch.empty(similarities.shape, dtype=torch.int8, device=self._device)
        first = 0
        for parts in cut(gallery, num_columns):
            kind.fill_(-1)
            start = first
            for block in itertools.chain.from_iterable(map(row_blocks, parts)):
                refuse_nonfinite(block)
                if block.shape[1] != self._units.shape[1]:
                    raise ValueError(
                        f"The gallery is {block.shape[1]} features wide, the queries {self._units.shape[1]}: "
                        "extract both with the same model and layer."
                    )
                stop = start + len(block)
                if stop <= len(labels):
                    here = slice(start - first, stop - first)
                    double = block.dtype == np.float64
                    units = unit_rows(torch.tensor(block, dtype=torch.float64 if double else torch.float32))
                    units = units.to(self._device, self._units.dtype)
                    torch.mm(self._units, units.T, out=similarities[:, here])
                    kind[:, here] = self._wanted[:, None] == labels[None, start:stop].to(self._device)
                start = stop
            inside = (self._columns >= first) & (self._columns < start)
            kind[self._rows[inside].to(self._device), (self._columns[inside] - first).to(self._device)] = -1
            first = start
            if first <= len(labels):
                yield similarities, kind
        if first != len(labels):
            raise ValueError(f"gallery_labels has {len(labels)} entries, but the gallery {first} rows.")

    def _relevant(self, tiles: Any, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarities of relevant images, ascending and filled up with infinity, and their numbers.

        Args:
            tiles: As `_tiles` yields them.
            most: R, no query has more.

        Returns:
            (B, R) and (B,).
        """
        relevant = self._units.new_full((len(self._units), most), torch.inf)
        counts = torch.zeros(len(relevant), dtype=torch.long, device=self._device)
        places = torch.arange(most, device=self._device)
        for similarities, kind in tiles:
            found = kind == 1
            upto = counts + found.sum(1, dtype=torch.int32)
            free = (places >= counts[:, None]) & (places < upto[:, None])
            relevant.masked_scatter_(free, similarities[found])
            counts = upto
        return _sorted(relevant), counts


def _differs(values: torch.Tensor) -> torch.Tensor:
    """Return where a value differs from the one before it in its row, (B, R) bool; the first one does."""
    return torch.cat([values.new_ones(len(values), 1, dtype=torch.bool), values[:, 1:] != values[:, :-1]], 1)


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """Return (B, n) with each row ascending; on the CPU in place, where NumPy's sort is 3 times as fast."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    parts = np.array_split(values.numpy(), torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(np.ndarray.sort, parts))
    return values


def _codes(query_labels: ArrayLike, gallery_labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both as numbers that are equal where the labels are."""
    both = []
    for name, labels in (("query_labels", query_labels), ("gallery_labels", gallery_labels)):
        labels = np.asarray(as_array(labels))
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"{name} has shape {labels.shape}, but must have one label for each row.")
        check_labels(labels)
        both.append(labels)
    refuse_mixed_labels(*both)
    codes = np.unique(np.concatenate(both), return_inverse=True)[1]
    return codes[: len(both[0])], codes[len(both[0]) :]
