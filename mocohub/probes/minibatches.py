"""Rows of features in random order, a minibatch at a time, from memory, from a card, or from disk."""

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocohub.probes.inputs import as_tensor, forwards

MEMORY_BYTES = 8 << 30  # features larger than this are read a window at a time
WINDOW_ROWS = 65536  # 512 MiB of 2048 float32
_BLOCK_ROWS = 16  # rows that are read together: 128 KiB, which a disk reads anywhere at nearly full speed


def minibatches(
    matrix: np.ndarray | Tensor, size: int, generator: torch.Generator, window_rows: int | None
) -> Iterator[tuple[np.ndarray | Tensor, Tensor]]:
    """Yield the rows (B, D) of each batch of an epoch, and their numbers (B,).

    Args:
        matrix: Features (N, D); a memory map if they are larger than memory.
        size: B; the last batch takes what is left.
        generator: Of the order, on the CPU.
        window_rows: None shuffles all rows. A number puts blocks of 16 consecutive rows in random order,
            reads blocks of so many rows at a time, and shuffles the rows of each such window.
    """
    if window_rows is None:
        order = torch.randperm(len(matrix), generator=generator)
        if isinstance(matrix, np.ndarray) and matrix.flags.writeable:
            matrix = torch.from_numpy(matrix)  # it gathers rows in half the time
        in_numpy = isinstance(matrix, np.ndarray)
        for chosen in (order if in_numpy else order.to(matrix.device)).split(size):
            yield matrix[chosen.numpy()] if in_numpy else matrix.index_select(0, chosen), chosen
        return
    num_blocks = max(1, window_rows // _BLOCK_ROWS)  # of a window
    # The only memory of size, filled anew by each window: fresh pages cost more than reading does.
    area = np.empty((min(len(matrix), num_blocks * _BLOCK_ROWS + size), matrix.shape[1]), matrix.dtype)
    numbers = torch.arange(0)  # of the first rows of `area`: left over, fewer than a batch
    order = torch.randperm(-(-len(matrix) // _BLOCK_ROWS), generator=generator)
    for window in order.split(num_blocks):
        left = end = len(numbers)
        starts = window.sort().values * _BLOCK_ROWS  # ascending, as disks like it
        for start in starts.tolist():
            block = matrix[start : start + _BLOCK_ROWS]
            area[end : end + len(block)] = block
            end += len(block)
        shuffled = torch.randperm(end - left, generator=generator)
        read = (starts[:, None] + torch.arange(_BLOCK_ROWS)).flatten()
        numbers = torch.cat([numbers, read[read < len(matrix)][shuffled]])
        places = torch.cat([torch.arange(left), left + shuffled]).numpy()
        whole = end // size * size
        for start in range(0, whole, size):
            yield area[places[start : start + size]], numbers[start : start + size]
        area[: end - whole], numbers = area[places[whole:]], numbers[whole:]
    if len(numbers):
        yield area[: len(numbers)], numbers


def matrix_of(features: Any, num_rows: int, memory_bytes: int) -> np.ndarray | Tensor:
    """Return features as something with rows (N, D) that can be read in any order.

    Args:
        features: An array, a tensor, or an object whose `blocks()` yields arrays (n, D) in order. These are
            copied into memory, or, if larger than `memory_bytes`, into a temporary file without a name.
        num_rows: N.
        memory_bytes: As above.

    Raises:
        ValueError: If they are no matrix of floating-point numbers with so many rows.
    """
    if hasattr(features, "blocks"):
        matrix, row = None, 0
        for block in features.blocks():
            if matrix is None:
                shape, size = (num_rows, block.shape[1]), num_rows * block.shape[1] * block.dtype.itemsize
                if size > memory_bytes:
                    matrix = np.memmap(tempfile.TemporaryFile(), block.dtype, "w+", shape=shape)
                else:
                    matrix = np.empty(shape, block.dtype)
            matrix[row : row + len(block)] = block[: max(0, num_rows - row)]
            row += len(block)
        features, length = matrix, row
    else:
        features = features.detach() if isinstance(features, Tensor) else np.asanyarray(features)
        length = len(features)
    if length != num_rows:
        raise ValueError(f"There are {length} rows of features, but {num_rows} labels.")
    if features.ndim != 2 or str(features.dtype).split(".")[-1] not in ("float16", "float32", "float64"):
        raise ValueError(
            f"features of shape {tuple(features.shape)} and type {features.dtype} must be a matrix (N, D) "
            "of float16, float32 or float64."
        )
    return features if isinstance(features, Tensor) else forwards(features)


def largest_of(matrix: np.ndarray | Tensor) -> float:
    """Return the largest absolute value, read 4096 rows at a time; refuse what is not finite."""
    largest = 0.0
    for start in range(0, len(matrix), 4096):
        rows = as_tensor(matrix[start : start + 4096]).abs().amax(dim=1)
        bad = (~rows.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"Row {start + int(bad[0])} of the features holds NaN or inf. "
                "Drop this image or extract its features again."
            )
        largest = max(largest, float(rows.max()))
    return largest


def copied(
    matrix: np.ndarray | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a copy there, of this type or its own, made 4096 rows at a time."""
    dtype = dtype or as_tensor(matrix[:1]).dtype
    copy = torch.empty(tuple(matrix.shape), dtype=dtype, device=device)
    for start in range(0, len(matrix), 4096):
        copy[start : start + 4096] = as_tensor(matrix[start : start + 4096]).to(device)
    return copy
