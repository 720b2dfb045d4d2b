"""Accuracy when only a few training images of each class are labelled."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, normalize
from sklearn.svm import LinearSVC
from sklearn.utils import check_array, check_consistent_length, column_or_1d

from mocohub.errors import unknown
from mocohub.probes.inputs import (
    DTYPES,
    as_array,
    check_labels,
    check_queries,
    check_seed,
    check_training_set,
    checked_device,
    refuse_nonfinite,
)
from mocohub.probes.linear import LinearProbe

# What `estimator` may name, and what each is.
ESTIMATORS = {
    "logistic": "logistic regression (C = 10) on L2-normalised features",
    "centroid": "nearest class centroid by cosine",
    "svm": "linear SVM (one class against the rest, squared hinge, C = 1) on L2-normalised features",
}


class CentroidProbe(ClassifierMixin, BaseEstimator):
    """Classifies by the largest cosine to a class's centroid: the mean of its features, each of length 1.

    Attributes:
        classes_: The labels seen by `fit`, sorted, shape (num_classes,).
        centroids_: Of length 1, (num_classes, D); zeros if the features of a class cancel out.
        n_features_in_: Width D of the features.

    >>> probe = CentroidProbe().fit([[1.0, 0.0], [3.0, 3.0], [0.0, 1.0]], ["cat", "cat", "dog"])
    >>> print(*probe.predict([[2.0, 1.0], [0.1, 5.0]]))
    cat dog
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Average features X (N, D) of each label of y (N,); arrays or tensors.

        Raises:
            ValueError: If a feature is NaN or infinite, a label is None, or the lengths differ.
        """
        X, y = check_training_set(self, X, y)
        self.classes_, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
        order, starts = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts
        self.centroids_ = normalize(np.add.reduceat(normalize(X)[order], starts))
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Return cosines (N, num_classes); with two classes (N,), the second's less the first's."""
        cosines = normalize(check_queries(self, X)) @ self.centroids_.T
        return cosines[:, 1] - cosines[:, 0] if len(self.classes_) == 2 else cosines

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the class of the nearest centroid of each row of X (N, D); of equal ones the first."""
        cosines = self.decision_function(X)
        return self.classes_[(cosines > 0).astype(int) if cosines.ndim == 1 else cosines.argmax(axis=1)]


@dataclass(frozen=True)
class LowShotResult:
    """Accuracy on one test set after training on a few labels of each class, over several draws of them.

    Attributes:
        shots: Labels of each class; None for all there are, which is a single draw, or for a fraction.
        num_draws: Draws of labels, n.
        mean: Mean accuracy of the draws, a share in 0..1.
        std: Standard deviation between draws, with n - 1 below; None for a single draw.
        interval: 95 % confidence interval of `mean` by Student's t, within 0..1; None for a single draw. It
            covers the luck of which images are labelled, not that of which images are in the test set.
        accuracies: Accuracy of each draw.
        fraction: Share of each class that was labelled; None where `shots` says how many.
    """

    shots: int | None
    num_draws: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    accuracies: tuple[float, ...]
    fraction: float | None = None


def low_shot(
    X_train: ArrayLike,
    y_train: ArrayLike,
    X_test: ArrayLike,
    y_test: ArrayLike,
    *,
    shots: Sequence[int | None] = (1, 5, None),
    fractions: Sequence[float] = (),
    draws: int = 20,
    estimator: BaseEstimator | str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[LowShotResult]:
    """Measure how accuracy grows with the number of labelled training images of each class.

    Which images are labelled follows from `seed`, the draw's number and `y_train` alone. So different
    features of the same images, passed in the same order, are compared on the same labelled images, draw
    by draw; and the 5 labels of a draw contain its 1 label. Nothing is augmented or fine-tuned, unlike in the
    semi-supervised protocols that are also called 1 % and 10 %.

    Args:
        X_train: Features (N, D) to draw from, an array or a tensor.
        y_train: Labels (N,), integers or strings.
        X_test: Features (M, D), always used in full.
        y_test: Labels (M,). Classes may be absent, but not unknown to `y_train`.
        shots: Labels drawn from each class, one result for each entry; None takes all labels, once.
        fractions: Shares of each class that are labelled, between 0 and 1 (0.01 and 0.1 are usual), rounded
            to whole images, at least one of each class; one result for each, after those of `shots`.
        draws: Draws for each entry of `shots` but None, and of `fractions`.
        estimator: A scikit-learn classifier, cloned for each draw; or "logistic" for logistic regression
            (`LinearProbe("lbfgs", C=10)`) on L2-normalised features, which is the default; "centroid" for
            `CentroidProbe`; "svm" for scikit-learn's LinearSVC on L2-normalised features.
        seed: Changes all draws.
        device: "cpu" or "cuda", for "logistic"; the others compute on the CPU.

    Returns:
        One result for each entry of `shots`, then of `fractions`, in that order.

    Raises:
        ValueError: If a class has fewer labels than are to be drawn, `shots` or `draws` is below 1, `shots`
            and `fractions` are empty, `y_test` has a class that `y_train` lacks, features are not finite or
            lengths differ.

    >>> X, y = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]], ["cat", "cat", "dog", "dog"]
    >>> one_label, all_labels = low_shot(X, y, X, y, shots=(1, None))
    >>> one_label.num_draws, one_label.mean, all_labels.num_draws
    (20, 1.0, 1)
    """
    check_seed(seed)
    X_train, y_train = _checked(X_train, y_train)
    X_test, y_test = _checked(X_test, y_test)
    if X_train.shape[1] != X_test.shape[1]:
        widths = f"X_train is {X_train.shape[1]} wide and X_test {X_test.shape[1]}"
        raise ValueError(f"{widths}: extract both with the same model and layer.")
    classes, labels, counts = np.unique(y_train, return_inverse=True, return_counts=True)
    if strangers := sorted(set(y_test.tolist()) - set(classes.tolist()), key=str):
        raise ValueError(f"y_test has classes that y_train lacks: {strangers}. Remove these test images.")
    if not isinstance(draws, Integral) or draws < 1:
        raise ValueError(f"draws={draws} must be a whole number, 1 or more.")
    if not len(shots) and not len(fractions):
        raise ValueError("shots and fractions are both empty: give at least one number of labels.")
    for num in shots:
        _check_shots(num, classes, counts)
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction {fraction} must be between 0 and 1; shots=None takes all labels.")
    estimator = _estimator(estimator, device)

    results = []
    wanted = [(num, None) for num in shots] + [(None, fraction) for fraction in fractions]
    for num, fraction in wanted:
        of_class = np.full_like(counts, num or 0)
        if fraction is not None:
            of_class = np.maximum(1, np.rint(fraction * counts).astype(counts.dtype))
        accuracies = []
        for draw in range(draws if of_class.any() else 1):
            rows = _draw_rows(labels, counts, of_class, seed, draw) if of_class.any() else slice(None)
            fitted = clone(estimator).fit(X_train[rows], y_train[rows])
            accuracies.append(float(np.mean(fitted.predict(X_test) == y_test)))
        results.append(_summary(num, fraction, accuracies))
    return results


def _estimator(given: BaseEstimator | str | None, device: str) -> BaseEstimator:
    if given is None or given == "logistic":
        checked_device(device)
        return make_pipeline(Normalizer(), LinearProbe("lbfgs", C=10.0, device=device))
    if given == "centroid":
        return CentroidProbe()
    if given == "svm":
        return make_pipeline(Normalizer(), LinearSVC(random_state=0))
    if isinstance(given, str):
        raise unknown("estimator", given, ESTIMATORS)
    return given


def _draw_rows(
    labels: np.ndarray, counts: np.ndarray, of_class: np.ndarray, seed: int, draw: int
) -> np.ndarray:
    """Draw `of_class` rows of each class; a larger number adds rows to the same draw."""
    order = np.random.default_rng([seed, draw]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, shuffled within each
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
    return order[place < np.repeat(of_class, counts)]


def _summary(num: int | None, fraction: float | None, accuracies: list[float]) -> LowShotResult:
    n, mean = len(accuracies), statistics.fmean(accuracies)
    std = interval = None
    if n > 1:
        std = statistics.stdev(accuracies)
        half = float(student_t.ppf(0.975, df=n - 1)) * std / n**0.5
        interval = (max(0.0, mean - half), min(1.0, mean + half))
    return LowShotResult(num, n, mean, std, interval, tuple(accuracies), fraction)


def _checked(X: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    X, y = check_array(as_array(X), dtype=DTYPES, ensure_all_finite=False), column_or_1d(as_array(y))
    check_consistent_length(X, y)
    refuse_nonfinite(X)
    check_labels(y)
    return X, y


def _check_shots(num: int | None, classes: np.ndarray, counts: np.ndarray) -> None:
    rarest = counts.argmin()
    if num is not None and (not isinstance(num, Integral) or num < 1):
        raise ValueError(f"shots={num} must be whole labels a class, 1 or more; None takes all labels.")
    if num is not None and num > counts[rarest]:
        raise ValueError(
            f"shots={num}, but class {classes[rarest]} has {counts[rarest]} labelled images. Ask for "
            f"{counts[rarest]} at most, leave the class out, or take None for all labels."
        )
