"""The weighted k-nearest-neighbour classifier with which MoCo features are monitored, for one k or many."""

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import norm
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import column_or_1d

from mocohub.probes.inputs import (
    DTYPES,
    Blocks,
    as_array,
    check_labels,
    check_queries,
    check_training_set,
    checked_device,
    refuse_mixed_labels,
)
from mocohub.probes.neighbors import nearest

_BANK_DTYPES = (*DTYPES, np.float16)  # which a search reads as they are
_VOTES = 1 << 24  # of images for classes, and of neighbours, that are in memory at once
_QUANTILE = float(norm.ppf(0.975))


class KNNProbe(ClassifierMixin, BaseEstimator):
    """Classifies by a vote of the k most cosine-similar training images, each weighted by exp(sim / T).

    The classifier of arXiv 1805.01978, section 3.4 (k = 200, T = 0.07), which is also the kNN monitor of
    MoCo (arXiv 1911.05722, appendix A.9). The search is exact: every similarity is computed, in float32 or,
    if the training features are float64, in float64. The training features are kept as they are given, not
    copied, and may be larger than memory: see `mocohub.probes.neighbors.nearest`.

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

    def __init__(
        self, k: int = 200, temperature: float = 0.07, device: str | torch.device | None = None
    ) -> None:
        """Set the vote; nothing is checked before `fit`.

        Args:
            k: Neighbours that vote. With fewer training images than that, all of them vote and `fit` warns.
            temperature: T above, positive; the lower, the more the nearest count.
            device: Where to search, "cpu" or "cuda". Default: where the training features are, the CPU if
                they are no tensor.
        """
        self.k = k
        self.temperature = temperature
        self.device = device

    def fit(self, X: ArrayLike | Blocks, y: ArrayLike) -> Self:
        """Keep the training features and their labels.

        Args:
            X: Features (M, D), an array or a tensor; or what has `len()` and `blocks()`, such as
                `mocohub.Features`, which is read, and checked, whenever something is predicted.
            y: Labels (M,), integers or strings.

        Raises:
            ValueError: If `k` or `temperature` is out of range, a feature is NaN or infinite, a label is
                None, or the lengths of `X` and `y` differ.
        """
        _check_vote(self.k, self.temperature)
        self._device = checked_device(self.device or getattr(X, "device", "cpu"))
        if hasattr(X, "blocks"):
            y = column_or_1d(as_array(y))
            check_labels(y)
            if len(X) != len(y):
                raise ValueError(
                    f"There are {len(X)} training features, but {len(y)} labels. Give one for each."
                )
            if not len(X):
                raise ValueError("The training features have no rows. Give at least one.")
            self.n_features_in_ = next(iter(X.blocks())).shape[1]
        else:
            X, y = check_training_set(self, X, y, dtypes=_BANK_DTYPES)
        if self.k > len(X):
            warnings.warn(f"k={self.k}, but there are only {len(X)} training images: all vote.", stacklevel=2)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self._labels = torch.tensor(labels)  # (M,)
        self._bank = X  # (M, D)
        return self

    def kneighbors(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest training images of each query, nearest first.

        Args:
            X: Queries (N, D), an array or a tensor.

        Returns:
            Cosine distances 1 - sim, and training indices (int64); both (N, min(k, M)).
        """
        indices, similarities = self._search(X)
        return (1 - similarities).clamp_(min=0).numpy(), indices.numpy()  # rounding knows no bounds

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return each class's share of the votes (N, num_classes), columns in the order of `classes_`."""
        votes, dtype = self._votes(X)
        return (votes / votes.sum(dim=1, keepdim=True)).to(dtype).numpy()

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the class with the most votes for each query (N,)."""
        votes, _ = self._votes(X)
        return self.classes_[votes.numpy().argmax(axis=1)]

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the share of queries whose class is `y`; the labels need not include every class."""
        return super().score(X, as_array(y), sample_weight)

    def _votes(self, X: ArrayLike) -> tuple[torch.Tensor, torch.dtype]:
        indices, similarities = self._search(X)
        weights = _weights(similarities, self.temperature)
        votes = weights.new_zeros(len(weights), len(self.classes_))  # (N, num_classes)
        return votes.scatter_add_(1, self._labels[indices], weights), similarities.dtype

    def _search(self, X: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        X = check_queries(self, X)
        found = nearest(self._bank, X, self.k, device=self._device)
        return torch.from_numpy(found.indices), torch.from_numpy(found.similarities)  # (N, k) each


@dataclass(frozen=True, eq=False)
class KNNResult:
    """How well one k and one temperature classify; shares are 0..1.

    Attributes:
        k: Neighbours that voted, all if there were fewer.
        temperature: T of the weights exp(sim / T).
        top1: Share of the images whose class got the most votes, of equal votes the first class.
        top5: Share whose class is among the five with the most votes. A class without any vote is not among
            them, so that with five classes or fewer this is the share with a neighbour of their own class.
        classes: Labels of training and test images, sorted, (C,).
        targets: Position of each image's label in `classes`, (N,).
        predictions: Position of the class that got the most votes, (N,).
    """

    k: int
    temperature: float
    top1: float
    top5: float
    classes: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    predictions: np.ndarray = field(repr=False)

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.targets)

    @property
    def per_class(self) -> dict[Hashable, float]:
        """Share of right answers of each class that has test images, by its label."""
        correct = self.targets[self.targets == self.predictions]
        counts = np.bincount(self.targets, minlength=len(self.classes))
        right = np.bincount(correct, minlength=len(self.classes))
        present = np.flatnonzero(counts)
        return dict(
            zip(self.classes[present].tolist(), (right / counts.clip(1))[present].tolist(), strict=True)
        )

    @property
    def confusion(self) -> np.ndarray:
        """Number of images of each class (row) that were taken for each class (column), (C, C) int64."""
        num_classes = len(self.classes)
        pairs = np.bincount(self.targets * num_classes + self.predictions, minlength=num_classes**2)
        return pairs.reshape(num_classes, num_classes)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of right answers among all such images lies with 95 % confidence (Wilson's score).

        It tells the chance in the choice of test images, not that in training.
        """
        return wilson(self.top1, self.num_images)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent trials (Wilson 1927).

    >>> tuple(round(bound, 2) for bound in wilson(1.0, 3))
    (0.44, 1.0)
    """
    z2 = _QUANTILE**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _QUANTILE * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def knn_grid(
    X_train: ArrayLike | Blocks,
    y_train: ArrayLike,
    X_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10, 20, 50, 100, 200),
    temperatures: Sequence[float] = (0.03, 0.05, 0.07, 0.1, 0.2),
    leave_one_out: bool = False,
    device: str | torch.device | None = None,
    sharded: bool = False,
) -> list[KNNResult]:
    """Evaluate `KNNProbe` for every k and temperature with one search.

    Classes are those of training and test images together. A test class without training images counts as
    wrong, and a warning names it.

    Args:
        X_train: Features (M, D) that vote, see `KNNProbe.fit`.
        y_train: Their labels (M,).
        X_test: Features (N, D) that are classified.
        y_test: Their labels (N,), of the kind of `y_train`.
        ks: Numbers of neighbours; of fewer training images all vote, with a warning.
        temperatures: Of the weights exp(sim / T).
        leave_one_out: Classify each training image by all the others; without `X_test` and `y_test`.
        device: Where to search, as for `KNNProbe`.
        sharded: The ranks of the process group share the search; all must call this, and get the same.

    Returns:
        One result for each pair, ordered by k, then by temperature, as these are given.

    Raises:
        ValueError: If an argument is not accepted, as by `KNNProbe`, or no test class is a training class.
    """
    if not len(ks) or not len(temperatures):
        raise ValueError(f"ks={ks} and temperatures={temperatures} must hold at least one value each.")
    for k, temperature in [*((k, 0.07) for k in ks), *((1, T) for T in temperatures)]:
        _check_vote(k, temperature)
    if leave_one_out != (X_test is None) or leave_one_out != (y_test is None):
        raise ValueError(
            "Give X_test and y_test, or leave_one_out=True without them: it classifies the training images."
        )
    probe = KNNProbe(max(ks), device=device).fit(X_train, y_train)
    y_train = probe.classes_[probe._labels.numpy()]
    y_test = y_train if leave_one_out else column_or_1d(as_array(y_test))
    check_labels(y_test)
    queries = None if leave_one_out else check_queries(probe, X_test)
    if not leave_one_out and len(queries) != len(y_test):
        raise ValueError(
            f"There are {len(queries)} test features, but {len(y_test)} labels. Give one for each."
        )
    classes = all_classes(probe.classes_, y_test)
    targets = torch.from_numpy(np.searchsorted(classes, y_test))  # (N,)
    labels = torch.from_numpy(np.searchsorted(classes, probe.classes_))[probe._labels]  # (M,)
    found = nearest(probe._bank, queries, max(ks), device=probe._device, sharded=sharded)
    similarities, voters = torch.from_numpy(found.similarities), labels[torch.from_numpy(found.indices)]
    predictions = {(k, T): [] for k in ks for T in temperatures}
    num_in_top5 = dict.fromkeys(predictions, 0)
    rows = max(1, _VOTES // max(len(classes), max(ks)))
    for votes_of, of_images, wanted in zip(
        similarities.split(rows), voters.split(rows), targets.split(rows), strict=True
    ):
        for T in temperatures:
            weights = _weights(votes_of, T)
            votes = weights.new_zeros(len(weights), len(classes))
            counted = 0
            for k in sorted(set(ks)):
                more = slice(counted, k)
                votes.scatter_add_(1, of_images[:, more], weights[:, more])
                counted = k
                predictions[k, T].append(votes.numpy().argmax(1))
                num_in_top5[k, T] += _num_in_top(votes, wanted, 5)
    results = []
    for (k, T), parts in predictions.items():
        guesses = np.concatenate(parts)
        top1 = float((guesses == targets.numpy()).mean())
        top5 = num_in_top5[k, T] / len(targets)
        results.append(KNNResult(int(k), float(T), top1, top5, classes, targets.numpy(), guesses))
    return results


def _check_vote(k: Any, temperature: Any) -> None:
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k={k!r} must be a whole number of neighbours, 1 or more.")
    if not isinstance(temperature, Real) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r} must be positive; usual is 0.07.")


def _weights(similarities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return exp(sim / T) (N, k) float64, each row divided by its first: shares are the same, none overflows.

    float32 would lose votes of less than 1e-7 of the first, and all of them where T is small.
    """
    similarities = similarities.double()
    return ((similarities - similarities[:, :1]) / temperature).exp()


def _num_in_top(votes: torch.Tensor, targets: torch.Tensor, num_top: int) -> int:
    """Return how many rows of votes (N, C) have their target among the classes with the most."""
    own = votes.gather(1, targets[:, None])
    earlier = torch.arange(votes.shape[1]) < targets[:, None]
    before = ((votes > own) | ((votes == own) & earlier)).sum(1)
    return int(((before < num_top) & (own[:, 0] > 0)).sum())


def all_classes(train: np.ndarray, y_test: np.ndarray) -> np.ndarray:
    """Return the labels of both, sorted, if they can be compared; warn of those that cannot be found."""
    test = np.unique(y_test)
    refuse_mixed_labels(train, test)
    absent = np.setdiff1d(test, train).tolist()
    if len(absent) == len(test):
        raise ValueError(
            f"No test class ({', '.join(map(str, absent[:5]))}) is a training class "
            f"({', '.join(map(str, train[:5]))}). Give both the same labels."
        )
    if absent:
        names = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warnings.warn(
            f"{len(absent)} of {len(test)} test classes have no training images, so that theirs count as "
            f"wrong: {names}.",
            stacklevel=3,
        )
    return np.union1d(train, test)
