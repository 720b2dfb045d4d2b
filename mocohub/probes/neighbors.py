"""Exact nearest neighbours: queries stay in memory, the bank passes by in tiles, each query keeps its k best.

On a card the product is one of half precision. Its error is bounded, so that whatever may belong to the k
best is found, and is then computed again: the neighbours are those of float32.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from mocohub.distributed import gather_rows, rank, world_size
from mocohub.errors import unknown
from mocohub.probes.best import Best, filled, top_k
from mocohub.probes.inputs import Bank, checked_device, cut

# A tile of similarities: large enough for the speed of the product, small enough for a processor's cache.
_QUERY_ROWS = 1024
_BANK_ROWS = {"cpu": 4096, "cuda": 65536}
_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 26}  # scaled, or computed again, at once
_COARSE = {"cpu": None, "cuda": torch.float16}  # type of the first product, if another than the result's
_OWN_QUERIES = 32768  # rows of a bank that search it at once


class Neighbors(NamedTuple):
    """The nearest rows of each query, nearest first."""

    indices: np.ndarray  # (n, k) int64, rows of the bank
    similarities: np.ndarray  # (n, k) cosines, or dot products


def nearest(
    bank: Bank,
    queries: ArrayLike | None,
    k: int,
    *,
    metric: Literal["cosine", "dot"] = "cosine",
    device: str | torch.device | None = None,
    sharded: bool = False,
    progress: bool = False,
) -> Neighbors:
    """Find the k rows of the bank most similar to each query; every similarity is computed.

    Of similarities that come out equal the lower row goes first. A vector of zeros has similarity 0 to
    everything. In memory are the queries, 36 k bytes for each, and one tile of the bank with its similarities
    (at most 4096 rows by 1024 queries, on a card 65536), however long the bank is.

    Args:
        bank: N rows of D features: an array, memory map or tensor of floats, which is not copied; or anything
            with `len()` and `blocks()`, see `Blocks`.
        queries: Vectors (n, D). None searches with the rows of the bank, none of which finds itself; of a
            bank of blocks 32,768 at a time, each time reading all of it.
        k: Neighbours of a query; with fewer rows than that, all of them are given.
        metric: "dot" leaves vectors as long as they are, which saves time where all have length 1.
        device: Where to compute, "cpu" or "cuda". Default: where the bank is, the CPU if it is no tensor.
        sharded: The ranks of the process group share the tiles of the bank. All of them must call this with
            the same arguments; each gets what one process of as many threads gets, bit for bit.
        progress: Show how far it is; on a terminal only.

    Returns:
        Rows and similarities, both (n, min(k, N)), the latter float32, or float64 if the bank is.

    Raises:
        ValueError: If an argument is not accepted, widths differ, or a value is NaN or infinite.
    """
    if metric not in ("cosine", "dot"):
        raise unknown("metric", metric, ["cosine", "dot"])
    if k < 1:
        raise ValueError(f"k={k} must be a number of neighbours, 1 or more.")
    bank = bank if hasattr(bank, "blocks") or isinstance(bank, torch.Tensor) else np.asarray(bank)
    k = min(int(k), len(bank) - (queries is None))
    if k < 1:
        raise ValueError(f"A bank of {len(bank)} rows has no neighbours to give. Give more rows.")
    device = checked_device(device or getattr(bank, "device", "cpu"))
    search = _Search(bank, k, metric == "cosine", device, sharded)
    with torch.no_grad(), exact_products():
        if queries is not None:
            return search.run(_tensor(queries), None, progress)
        found, first_row = [], 0
        for parts in cut(bank, _OWN_QUERIES):
            rows = torch.cat([_tensor(part) for part in parts])
            found.append(search.run(rows, first_row, progress))
            first_row += len(rows)
    return Neighbors(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


class _Vectors(NamedTuple):
    """Rows as the answer needs them, and as the product takes them."""

    exact: Tensor  # (n, D)
    rounded: Tensor  # (n, D), the same tensor unless the product is coarse
    error: float  # the largest length of a difference between the two

    def split(self, num_rows: int) -> list["_Vectors"]:
        """Return the rows in parts."""
        pairs = zip(self.exact.split(num_rows), self.rounded.split(num_rows), strict=True)
        return [_Vectors(exact, rounded, self.error) for exact, rounded in pairs]

    def uncertainty(self, other: "_Vectors") -> float:
        """Return how far the product of two unit rows may be from the one computed again, at most."""
        if self.rounded.dtype == self.exact.dtype:
            return 0.0
        summed = 2.0**-22 * self.exact.shape[1]  # of D terms that add up to 1 at most, twice
        written = torch.finfo(self.rounded.dtype).eps
        return 1.01 * (self.error + other.error) + summed + written


class _Search:
    """A bank, and how it is searched."""

    def __init__(self, bank: Bank, k: int, unit: bool, device: torch.device, sharded: bool) -> None:
        self.bank, self.k, self.unit, self.device = bank, k, unit, device
        self.shard, self.num_shards = (rank(), world_size()) if sharded else (0, 1)
        double = str(getattr(bank, "dtype", "")).endswith("float64")
        self.dtype = torch.float64 if double else torch.float32
        # Dot products have no bound: half precision might not hold them.
        self.coarse = _COARSE[device.type] if unit and not double else None

    def run(self, queries: Tensor, own: int | None, progress: bool) -> Neighbors:
        """Search with queries (n, D); they are the rows of the bank from row `own` on, if that is given."""
        if queries.ndim != 2 or not queries.numel():
            raise ValueError(f"queries has shape {tuple(queries.shape)}, but must be (n, D), and not empty.")
        rows = torch.empty(queries.shape, dtype=self.dtype, device=self.device)
        self._fill(rows, queries, "Query", 0)
        parts = self._vectors(rows).split(_QUERY_ROWS)
        bests = [Best(len(part.exact), self.k, rows) for part in parts]
        area = None  # for the similarities of a tile
        with tqdm(total=len(self.bank), desc="search", unit="row", disable=None if progress else True) as bar:
            for first_row, num_rows, tile in self._tiles(rows.shape[1]):
                width = len(tile.exact)
                area = tile.rounded.new_empty(_QUERY_ROWS * width) if area is None else area
                for i, (part, best) in enumerate(zip(parts, bests, strict=True)):
                    scores = area[: len(part.exact) * width].view(-1, width)
                    torch.mm(part.rounded, tile.rounded.T, out=scores)
                    scores[:, num_rows:] = -torch.inf  # beyond the end of the bank
                    if own is not None:
                        _forget_diagonal(scores, own + i * _QUERY_ROWS - first_row)
                    exact = partial(_products, part.exact, tile.exact)
                    best.take(scores, first_row, part.uncertainty(tile), exact)
                bar.update(first_row + num_rows - bar.n)
        answers = [self._joined(best) for best in bests]
        values, indices = (torch.cat(columns).cpu().numpy() for columns in zip(*answers, strict=True))
        return Neighbors(indices, values)

    def _tiles(self, width: int) -> Iterator[tuple[int, int, _Vectors]]:
        """Yield first row, number of rows and vectors of each tile of this rank; zeros fill up the last."""
        most, first_row = _BANK_ROWS[self.device.type], 0
        area = torch.empty(filled(min(most, len(self.bank))), width, dtype=self.dtype, device=self.device)
        for number, parts in enumerate(cut(self.bank, most)):
            num_rows = sum(map(len, parts))
            if first_row + num_rows > len(self.bank):
                break
            if number % self.num_shards == self.shard:
                row = 0
                for part in parts:
                    self._fill(area[row : row + len(part)], _tensor(part), "Row", first_row + row)
                    row += len(part)
                area[row:] = 0
                yield first_row, num_rows, self._vectors(area[: filled(num_rows)])
            first_row += num_rows
        else:
            if first_row == len(self.bank):
                return
        raise ValueError(
            f"The bank says that it has {len(self.bank)} rows, but its blocks hold other than that."
        )

    def _fill(self, out: Tensor, rows: Tensor, name: str, first_row: int) -> None:
        """Copy rows (n, D) into `out`, scaled to length 1 if cosines are wanted."""
        if rows.shape[1:] != out.shape[1:]:
            raise ValueError(
                f"{name} {first_row} of the bank is {rows.shape[1:].numel()} wide, but the queries are "
                f"{out.shape[1]} wide. Give features of the same model."
            )
        step = max(1, _CHUNK_VALUES[self.device.type] // out.shape[1])
        for start in range(0, len(rows), step):
            part = out[start : start + step].copy_(
                rows[start : start + step].to(out.device)
            )  # as narrow as it is
            lengths = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            plain = (lengths > 1e-15) & (lengths < 1e15)  # the squares of other rows may leave float32
            if not plain.all():
                odd = (~plain[:, 0]).nonzero()[:, 0]
                bad = odd[~part[odd].isfinite().all(1)]
                if len(bad):
                    raise ValueError(
                        f"{name} {first_row + start + int(bad[0])} holds NaN or inf. Drop such images or "
                        "extract their features again (float16 ends at 65504)."
                    )
                if self.unit:
                    part[odd], lengths[odd] = unit_rows(part[odd]), 1.0
                elif (lengths[odd] > 1).any():
                    far = int(lengths[:, 0].argmax())
                    largest = float(part[far].abs().max())
                    raise ValueError(
                        f"{name} {first_row + start + far} holds {largest:.0e}, too much for products. "
                        "Scale the features, or use metric='cosine'."
                    )
            if self.unit:
                part /= lengths

    def _vectors(self, rows: Tensor) -> _Vectors:
        if self.coarse is None:
            return _Vectors(rows, rows, 0.0)
        rounded = rows.to(self.coarse)
        step = max(1, _CHUNK_VALUES[self.device.type] // rows.shape[1])
        errors = [
            torch.linalg.vector_norm(a - b.float(), dim=1).max()
            for a, b in zip(rows.split(step), rounded.split(step), strict=True)
        ]
        return _Vectors(rows, rounded, float(torch.stack(errors).max()))

    def _joined(self, best: Best) -> tuple[Tensor, Tensor]:
        """Return the k best of all ranks, (n, k) values and rows of the bank."""
        best.settle()
        values, rows = best.values[:, : self.k].contiguous(), best.rows[:, : self.k].contiguous()
        if self.num_shards > 1:
            n = len(values)
            values, rows = (
                gather_rows(x).view(-1, n, self.k).transpose(0, 1).reshape(n, -1) for x in (values, rows)
            )
            values, rows = top_k(values, rows, self.k)
        return values, rows


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows (n, D) scaled to length 1, however large or small they are; rows of zeros stay."""
    for order in (float("inf"), 2):  # first by the largest entry: squares of huge or tiny ones would not fit
        norm = torch.linalg.vector_norm(rows, order, dim=1, keepdim=True)
        rows = rows / norm.masked_fill_(norm == 0, 1)
    return rows


def _tensor(rows: Any) -> Tensor:
    """Return rows as a tensor that shares their memory where it can."""
    if isinstance(rows, Tensor):
        return rows.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        return torch.as_tensor(rows)


def _forget_diagonal(scores: Tensor, offset: int) -> None:
    """Take out the similarities of row i of `scores` to column i + offset."""
    scores.diagonal(offset).fill_(-torch.inf)


def _products(a: Tensor, b: Tensor, row_of_a: Tensor, row_of_b: Tensor) -> Tensor:
    """Return products (P,) of pairs of rows, each the same whatever is computed beside it."""
    step = max(1, _CHUNK_VALUES[a.device.type] // a.shape[1])
    pairs = zip(row_of_a.split(step), row_of_b.split(step), strict=True)
    # Summed in float64, where the order of the terms does not reach the digits of float32.
    return torch.cat([(a[i] * b[j]).sum(1, dtype=torch.float64).to(a.dtype) for i, j in pairs])


@contextmanager
def exact_products() -> Iterator[None]:
    """Have products computed in the type of their factors: TF32 keeps three digits, sums of halves as few."""
    matmul = torch.backends.cuda.matmul
    settings = (
        (matmul, "fp32_precision", "ieee"),
        (torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
        (matmul, "allow_fp16_accumulation", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
    )
    former = [getattr(backend, name) for backend, name, _ in settings]
    former[-1] = former[-1], matmul.allow_fp16_reduced_precision_reduction_split_k  # set together
    try:
        for backend, name, value in settings:
            setattr(backend, name, value)
        yield
    finally:
        for (backend, name, _), value in zip(settings, former, strict=True):
            setattr(backend, name, value)
