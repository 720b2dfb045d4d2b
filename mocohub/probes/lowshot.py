"""Accuracy when only a few training images of each class are labelled."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils import check_array, check_consistent_length, column_or_1d

from mocohub.probes.knn import DTYPES, as_array, check_labels, refuse_nonfinite
from mocohub.probes.linear import LinearProbe


@dataclass(frozen=True)
class LowShotResult:
    """Accuracy on one test set after training on a few labels of each class, over several draws of them.

    Attributes:
        shots: Labels of each class; None for all there are, which is a single draw.
        num_draws: Draws of labels, n.
        mean: Mean accuracy of the draws, a share in 0..1.
        std: Standard deviation between draws, with n - 1 below; None for a single draw.
        interval: 95 % confidence interval of `mean` by Student's t; None for a single draw. It covers the
            luck of which images are labelled, not that of which images are in the test set.
        accuracies: Accuracy of each draw.
    """

    shots: int | None
    num_draws: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    accuracies: tuple[float, ...]


def low_shot(
    X_train: ArrayLike,
    y_train: ArrayLike,
    X_test: ArrayLike,
    y_test: ArrayLike,
    *,
    shots: Sequence[int | None] = (1, 5, None),
    draws: int = 20,
    estimator: BaseEstimator | None = None,
    seed: int = 0,
) -> list[LowShotResult]:
    """Measure how accuracy grows with the number of labelled training images of each class.

    Which images are labelled follows from `seed`, the draw's number and `y_train` alone. So different
    features of the same images, passed in the same order, are compared on the same labelled images, draw
    by draw; and the 5 labels of a draw contain its 1 label.

    Args:
        X_train: Features (N, D) to draw from, an array or a tensor.
        y_train: Labels (N,), integers or strings.
        X_test: Features (M, D), always used in full.
        y_test: Labels (M,). Classes may be absent, but not unknown to `y_train`.
        shots: Labels drawn from each class, one result for each entry; None takes all labels, once.
        draws: Draws for each entry of `shots` but None.
        estimator: A scikit-learn classifier, cloned for each draw. None takes logistic regression
            (`LinearProbe("lbfgs", C=10)`) on L2-normalised features.
        seed: Changes all draws.

    Returns:
        One result for each entry of `shots`, in that order.

    Raises:
        ValueError: If a class has fewer labels than are to be drawn, `shots` or `draws` is below 1,
            `y_test` has a class that `y_train` lacks, features are not finite or lengths differ.

    >>> X, y = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]], ["cat", "cat", "dog", "dog"]
    >>> one_label, all_labels = low_shot(X, y, X, y, shots=(1, None))
    >>> one_label.num_draws, one_label.mean, all_labels.num_draws
    (20, 1.0, 1)
    """
    X_train, y_train = _checked(X_train, y_train)
    X_test, y_test = _checked(X_test, y_test)
    if X_train.shape[1] != X_test.shape[1]:
        widths = f"X_train is {X_train.shape[1]} wide and X_test {X_test.shape[1]}"
        raise ValueError(f"{widths}: extract both with the same model and layer.")
    classes, labels, counts = np.unique(y_train, return_inverse=True, return_counts=True)
    if strangers := sorted(set(y_test.tolist()) - set(classes.tolist()), key=str):
        raise ValueError(f"y_test has classes that y_train lacks: {strangers}. Remove these test images.")
    if draws < 1:
        raise ValueError(f"draws={draws} must be 1 or more.")
    for num in shots:
        _check_shots(num, classes, counts)
    if estimator is None:
        estimator = make_pipeline(Normalizer(), LinearProbe("lbfgs", C=10.0))

    results = []
    for num in shots:
        accuracies = []
        for draw in range(1 if num is None else draws):
            rows = slice(None) if num is None else _draw_rows(labels, counts, num, seed, draw)
            fitted = clone(estimator).fit(X_train[rows], y_train[rows])
            accuracies.append(float(np.mean(fitted.predict(X_test) == y_test)))
        results.append(_summary(num, accuracies))
    return results


def _draw_rows(labels: np.ndarray, counts: np.ndarray, num: int, seed: int, draw: int) -> np.ndarray:
    """Draw `num` rows of each class; a larger `num` adds rows to the same draw."""
    order = np.random.default_rng([seed, draw]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, shuffled within each
    first = np.cumsum(counts) - counts  # where each class begins
    return order[first[:, None] + np.arange(num)].ravel()


def _summary(num: int | None, accuracies: list[float]) -> LowShotResult:
    n, mean = len(accuracies), statistics.fmean(accuracies)
    std = interval = None
    if n > 1:
        std = statistics.stdev(accuracies)
        half = float(student_t.ppf(0.975, df=n - 1)) * std / n**0.5
        interval = (mean - half, mean + half)
    return LowShotResult(num, n, mean, std, interval, tuple(accuracies))


def _checked(X: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    X, y = check_array(as_array(X), dtype=DTYPES, ensure_all_finite=False), column_or_1d(as_array(y))
    check_consistent_length(X, y)
    refuse_nonfinite(X)
    check_labels(y)
    return X, y


def _check_shots(num: int | None, classes: np.ndarray, counts: np.ndarray) -> None:
    rarest = counts.argmin()
    if num is not None and num < 1:
        raise ValueError(f"shots={num} must be 1 label a class or more; None takes all labels.")
    if num is not None and num > counts[rarest]:
        raise ValueError(
            f"shots={num}, but class {classes[rarest]} has {counts[rarest]} labelled images. Ask for "
            f"{counts[rarest]} at most, leave the class out, or take None for all labels."
        )
