"""The weighted k-nearest-neighbour classifier with which MoCo features are monitored."""

import warnings
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

# One tile of similarities: 1024 x 16384, 64 MiB in float32. Wide enough for full matmul speed, and the
# memory of a search depends neither on the number of queries nor on the size of the bank.
_QUERY_ROWS = 1024
_BANK_ROWS = 16384
DTYPES = (np.float32, np.float64)  # float64 stays, everything else becomes float32


class KNNProbe(ClassifierMixin, BaseEstimator):
    """Classifies by a vote of the k most cosine-similar training images, each weighted by exp(sim / T).

    The classifier of arXiv 1805.01978, section 3.4 (k = 200, T = 0.07), which is also the kNN monitor of
    MoCo (arXiv 1911.05722, appendix A.9). The search is exact: every similarity is computed, in float32 or,
    if the training features are float64, in float64. Beside the bank, a scaled copy of the training features,
    it holds one tile of 1024 x 16384 similarities (64 MiB in float32) and at most a few copies of it.

    Three rules make every answer definite: of similarities that come out equal the lower training index
    goes first; of equal votes the class that is first in `classes_` wins; a vector of zeros has similarity
    0 to everything.

    Attributes:
        classes_: The labels seen by `fit`, sorted, shape (num_classes,).
        n_features_in_: Width D of the features.

    >>> probe = KNNProbe(k=2).fit([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]], ["cat", "dog", "dog"])
    >>> print(*probe.predict([[2.0, 0.1], [0.2, 3.0]]))
    cat dog
    """

    def __init__(self, k: int = 200, temperature: float = 0.07) -> None:
        """Set the vote; nothing is checked before `fit`.

        Args:
            k: Neighbours that vote. With fewer training images than that, all of them vote and `fit` warns.
            temperature: T above, positive; the lower, the more the nearest count.
        """
        self.k = k
        self.temperature = temperature

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Store the training features, scaled to length 1, and their labels.

        Args:
            X: Features (M, D), an array or a tensor; other types than float64 become float32.
            y: Labels (M,), integers or strings.

        Raises:
            ValueError: If `k` or `temperature` is out of range, a feature is NaN or infinite, a label is
                None, or the lengths of `X` and `y` differ.
        """
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"k={self.k!r} must be a whole number of neighbours, 1 or more.")
        if not isinstance(self.temperature, Real) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be positive; usual is 0.07.")
        X, y = check_training_set(self, X, y)
        if self.k > len(X):
            warnings.warn(f"k={self.k}, but there are only {len(X)} training images: all vote.", stacklevel=2)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self._labels = torch.tensor(labels)  # (M,)
        self._bank = unit_rows(X)  # (M, D)
        return self

    def kneighbors(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest training images of each query, nearest first.

        Args:
            X: Queries (N, D), an array or a tensor.

        Returns:
            Cosine distances 1 - sim, and training indices (int64); both (N, min(k, M)).
        """
        similarities, indices = self._search(X)
        return (1 - similarities).numpy(), indices.numpy()

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return each class's share of the votes (N, num_classes), columns in the order of `classes_`."""
        similarities, indices = self._search(X)
        # The nearest gets weight 1: the shares are the same, and no exp can overflow.
        weights = ((similarities - similarities[:, :1]) / self.temperature).exp()  # (N, k)
        votes = weights.new_zeros(len(weights), len(self.classes_))
        votes.scatter_add_(1, self._labels[indices], weights)
        return (votes / votes.sum(dim=1, keepdim=True)).numpy()

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the class with the most votes for each query (N,)."""
        winners = self.predict_proba(X).argmax(axis=1)
        return self.classes_[winners]

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the share of queries whose class is `y`; the labels need not include every class."""
        return super().score(X, as_array(y), sample_weight)

    def _search(self, X: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        X = check_queries(self, X)
        k = min(self.k, len(self._bank))
        found = []
        for first_query in range(0, len(X), _QUERY_ROWS):
            queries = unit_rows(X[first_query : first_query + _QUERY_ROWS]).to(self._bank.dtype)
            best = torch.empty(len(queries), 0, dtype=self._bank.dtype)  # (B, up to k), nearest first
            indices = torch.empty(len(queries), 0, dtype=torch.int64)
            for first_row in range(0, len(self._bank), _BANK_ROWS):
                similarities = queries @ self._bank[first_row : first_row + _BANK_ROWS].T
                nearest, positions = top_k(similarities, k)
                # Earlier rows stand before later ones, so position still decides between equals.
                best, chosen = top_k(torch.cat([best, nearest], dim=1), k)
                indices = torch.cat([indices, positions + first_row], dim=1).gather(1, chosen)
            found.append((best, indices))
        similarities, indices = map(torch.cat, zip(*found, strict=True))
        return similarities, indices  # (N, k) each


def as_array(values: Any) -> Any:
    """Return a tensor as a NumPy array, wherever it lives; anything else is returned as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def check_training_set(probe: BaseEstimator, X: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return X (N, D) and y (N,) as arrays a probe can be fitted to, and note D in the probe.

    Raises:
        ValueError: If X is not a finite matrix, or y is not one class label for each of its rows.
    """
    X, y = validate_data(probe, as_array(X), as_array(y), dtype=DTYPES, ensure_all_finite=False)
    refuse_nonfinite(X)
    check_labels(y)
    return X, y


def check_queries(probe: BaseEstimator, X: ArrayLike) -> np.ndarray:
    """Return X (N, D) as an array that a fitted probe can take.

    Raises:
        ValueError: If X is not a finite matrix as wide as the training features.
    """
    check_is_fitted(probe)
    X = validate_data(probe, as_array(X), dtype=DTYPES, reset=False, ensure_all_finite=False)
    refuse_nonfinite(X)
    return X


def check_labels(y: np.ndarray) -> None:
    """Raise ValueError if labels y (N,) are not one class for each row."""
    unlabelled = [row for row, label in enumerate(y) if label is None] if y.dtype == object else []
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(y)} labels are None, the first in row {unlabelled[0]}. "
            "Keep the labelled rows only."
        )
    check_classification_targets(y)


def refuse_nonfinite(X: np.ndarray) -> None:
    """Raise ValueError if features X (N, D) hold NaN or infinity anywhere."""
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(X.sum(axis=1, dtype=np.float64)))  # one pass, no (N, D) mask
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(X)} rows hold NaN or inf, the first is row {bad[0]}. "
            "Drop these images or extract their features again."
        )


def unit_rows(X: np.ndarray) -> torch.Tensor:
    """Return a copy whose rows have L2 norm 1; rows of zeros stay."""
    rows = torch.tensor(X)  # a copy, so that it may be changed in place
    for order in (float("inf"), 2):  # first by the largest entry: squares of huge or tiny ones would not fit
        norm = torch.linalg.vector_norm(rows, order, dim=1, keepdim=True)
        rows /= norm.masked_fill_(norm == 0, 1)
    return rows


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row and their positions, of equal values the lower position first."""
    width = values.shape[1]
    top, positions = values.topk(min(k + 1, width), dim=1)
    rows = (top[:, 1:] == top[:, :-1]).any(dim=1).nonzero()[:, 0]  # where topk's own order of equals shows
    top, positions = top[:, :k], positions[:, :k]
    if len(rows):
        some, last, place = values[rows], top[rows, -1:], torch.arange(width, dtype=values.dtype)
        # What is above the k-th value stays; of what equals it, the lowest positions.
        claim = torch.where(some == last, -place, -torch.inf).masked_fill_(some > last, torch.inf)
        kept = claim.topk(top.shape[1], dim=1).indices.sort(dim=1).values
        order = some.gather(1, kept).argsort(dim=1, descending=True, stable=True)
        positions[rows] = kept.gather(1, order)
    return top, positions
