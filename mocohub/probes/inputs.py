"""What probes take: features and labels as arrays, tensors or blocks, made alike and checked."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

DTYPES = (np.float32, np.float64)  # float64 stays, everything else becomes float32
BLOCK_ROWS = 4096  # looked at together, where the order of the rows is theirs


class Blocks(Protocol):
    """Features that need not be in memory, such as `mocohub.Features`."""

    def __len__(self) -> int:
        """Return N."""

    def blocks(self) -> Iterable[np.ndarray]:
        """Yield all rows in order, (n, D) at a time."""


Bank = ArrayLike | Blocks


def as_array(values: Any) -> Any:
    """Return a tensor as a NumPy array, wherever it lives; anything else is returned as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def as_tensor(rows: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return rows as a tensor; torch shares no memory that may not be written, such as that of a map."""
    if isinstance(rows, torch.Tensor):
        return rows
    return torch.from_numpy(forwards(rows) if rows.flags.writeable else rows.copy())


def row_blocks(features: Bank) -> Iterator[np.ndarray]:
    """Yield features in order as blocks (n, D).

    Args:
        features: An array or tensor (N, D); or whatever has `blocks()`, as a feature folder does.

    Raises:
        ValueError: If they are not (N, D).
    """
    if hasattr(features, "blocks"):
        blocks = features.blocks()
    else:
        values = np.asarray(as_array(features))
        if values.ndim != 2 or not values.shape[1]:
            raise ValueError(f"features has shape {values.shape}, but must be (N, D).")
        if values.dtype.kind not in "biuf":
            raise ValueError(f"features are of type {values.dtype}, but must be real numbers.")
        blocks = [forwards(values)]
    for block in blocks:
        for start in range(0, len(block), BLOCK_ROWS):
            yield block[start : start + BLOCK_ROWS]


def cut(bank: Bank, num_rows: int) -> Iterator[list[Any]]:
    """Yield the bank in lists of arrays (n, D) that are `num_rows` together, the last may be fewer."""
    parts, missing = [], num_rows
    for block in bank.blocks() if hasattr(bank, "blocks") else [bank]:
        for start, stop in _ranges(len(block), missing, num_rows):
            parts.append(block[start:stop])
            missing -= stop - start
            if not missing:
                yield parts
                parts, missing = [], num_rows
    if parts:
        yield parts


def _ranges(length: int, first: int, others: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of a first range and of others in a row, up to `length`."""
    start, stop = 0, first
    while start < length:
        yield start, min(stop, length)
        start, stop = stop, stop + others


def checked_device(device: str | torch.device) -> torch.device:
    """Return the device that was asked for.

    Raises:
        ValueError: If it is neither a CPU nor a CUDA card that torch sees.
    """
    if str(device).split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device '{device}' is not supported. Choose cpu or cuda.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA card. Use device 'cpu'.")
    return torch.device(device)


def check_counts(**counts: Any) -> None:
    """Raise ValueError if a number of epochs, images or the like is not a whole number from 1."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name}={count!r} must be a whole number, 1 or more.")


def check_seed(seed: Any) -> None:
    """Raise ValueError if a seed is none that all generators take."""
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.")


def check_training_set(
    probe: BaseEstimator, X: ArrayLike, y: ArrayLike, *, dtypes: Sequence[type] = DTYPES
) -> tuple[np.ndarray, np.ndarray]:
    """Return X (N, D) and y (N,) as arrays a probe can be fitted to, and note D in the probe.

    Args:
        probe: The estimator.
        X: Features.
        y: Labels.
        dtypes: Types that X keeps; another becomes the first of them.

    Raises:
        ValueError: If X is not a finite matrix, or y is not one class label for each of its rows.
    """
    X, y = validate_data(probe, as_array(X), as_array(y), dtype=dtypes, ensure_all_finite=False)
    refuse_nonfinite(X)
    check_labels(y)
    return forwards(X), y


def check_queries(probe: BaseEstimator, X: ArrayLike) -> np.ndarray:
    """Return X (N, D) as an array that a fitted probe can take.

    Raises:
        ValueError: If X is not a finite matrix as wide as the training features.
    """
    check_is_fitted(probe)
    X = validate_data(probe, as_array(X), dtype=DTYPES, reset=False, ensure_all_finite=False)
    refuse_nonfinite(X)
    return forwards(X)


def forwards(X: np.ndarray) -> np.ndarray:
    """Return X, or a copy where it is a reversed view such as X[::-1], which torch does not take."""
    return X if min(X.strides) >= 0 else X.copy()


def check_labels(y: np.ndarray) -> None:
    """Raise ValueError if labels y (N,) are not one class for each row."""
    refuse_unlabelled(y)
    if y.dtype == object:
        refuse_mixed_labels(y, y)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # Of scikit-learn, that so many different labels might be numbers.
        warnings.filterwarnings("ignore", "The number of unique classes")
        check_classification_targets(y)


def refuse_unlabelled(y: np.ndarray) -> None:
    """Raise ValueError if a label of y (N,) is None."""
    unlabelled = [row for row, label in enumerate(y) if label is None] if y.dtype == object else []
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(y)} labels are None, the first in row {unlabelled[0]}. "
            "Keep the labelled rows only."
        )


def refuse_mixed_labels(first: np.ndarray, second: np.ndarray) -> None:
    """Raise ValueError if the labels of one set (N,) are names and those of the other (M,) are numbers."""
    both = [labels.tolist() if labels.dtype == object else labels[:1].tolist() for labels in (first, second)]
    if len({isinstance(label, str | bytes) for labels in both for label in labels}) > 1:
        raise ValueError(
            f"Labels differ in kind: {first[:3].tolist()} in one set, {second[:3].tolist()} in the other. "
            "Give names for both, or numbers for both."
        )


def refuse_nonfinite(X: np.ndarray) -> None:
    """Raise ValueError if features X (N, D) hold NaN or infinity anywhere."""
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(X.sum(axis=1, dtype=np.float64)))  # one pass, no (N, D) mask
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(X)} rows hold NaN or inf, the first is row {bad[0]}. "
            "Drop these images or extract their features again."
        )


def class_numbers(labels: ArrayLike) -> torch.Tensor:
    """Return labels (N,), integers from 0, as int64 on the CPU; refuse all others."""
    labels = np.asarray(as_array(labels))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise ValueError(
            f"labels of shape {labels.shape} and type {labels.dtype} must be (N,) integers from 0. "
            "np.unique(labels, return_inverse=True)[1] numbers others."
        )
    return torch.from_numpy(labels.astype(np.int64))
