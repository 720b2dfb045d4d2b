"""Multi-label classification by linear SVMs on frozen features, and average precision: the VOC07 protocol."""

import logging
import warnings
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import validate_data

from mocohub.probes.inputs import DTYPES, as_array, check_queries, refuse_nonfinite

logger = logging.getLogger(__name__)

ABSENT, DIFFICULT, PRESENT = -1, 0, 1

# The grid of arXiv 1905.01235, appendix, and of facebookresearch/fair_self_supervision_benchmark.
COSTS = tuple(sorted({*(2.0**power for power in range(-19, -3)), *(10.0**power for power in range(-7, 3))}))


class MultiLabelSVM(BaseEstimator):
    """One linear SVM for each class against the rest, each with the cost that cross-validation chooses.

    The protocol of Goyal et al. (arXiv 1905.01235) for VOC07, which VISSL and most papers on self-supervised
    learning follow: features divided by their L2 norm (plus 1e-5); liblinear's dual solver with the squared
    hinge loss, at most 2000 iterations, tolerance 1e-4, an image of the class weighing twice as much as one
    without; the cost of each class from 2^-19 ... 2^-4 and 10^-7 ... 10^2 by the mean average precision over
    3 folds, of equal ones the smallest. A label of 0 (the class is there, but difficult to see) counts as
    absent in training and is left out of tests, as in their code.

    Attributes:
        coef_: Weights (num_classes, D).
        intercept_: Biases (num_classes,).
        costs_: Cost chosen for each class, (num_classes,).
        validation_ap_: Mean average precision over the folds, (num_classes, number of costs).
        n_features_in_: Width D of the features.

    >>> X, Y = [[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.2]], [[1, -1], [1, -1], [-1, 1], [-1, 1]]
    >>> MultiLabelSVM(costs=[1.0], num_folds=2).fit(X, Y).score(X, Y)
    1.0
    """

    def __init__(
        self,
        costs: Sequence[float] = COSTS,
        *,
        num_folds: int = 3,
        max_iter: int = 2000,
        n_jobs: int | None = None,
        random_state: int | None = 0,
    ) -> None:
        """Set the protocol; nothing is checked before `fit`.

        Args:
            costs: To choose from; with a single one there is no cross-validation.
            num_folds: Of the cross-validation, in the order of the images, stratified.
            max_iter: Of liblinear; reaching it is only logged, since the published protocol does too.
            n_jobs: Processes; -1 for one on each core.
            random_state: Of liblinear's order of coordinates.
        """
        self.costs = costs
        self.num_folds = num_folds
        self.max_iter = max_iter
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: ArrayLike, Y: ArrayLike) -> Self:
        """Train on features X (N, D) and labels Y (N, num_classes).

        Args:
            X: Arrays or tensors of any floating-point type; liblinear computes in float64.
            Y: 1 where the class is present, -1 where it is absent, 0 where it is difficult.

        Raises:
            ValueError: If a setting is out of range, a feature is NaN or infinite, a label is none of the
                three or -1 nowhere, a class has fewer images with it or without it than there are folds, or
                lengths differ.
        """
        costs = sorted(float(cost) for cost in self.costs)
        if not costs or not all(0 < cost < np.inf for cost in costs):
            raise ValueError(f"costs={list(self.costs)} must be positive numbers.")
        if self.num_folds < 2 or self.max_iter < 1:
            raise ValueError(
                f"num_folds={self.num_folds} must be 2 or more and max_iter={self.max_iter} 1 or more."
            )
        X = validate_data(self, as_array(X), dtype=DTYPES, ensure_all_finite=False)
        refuse_nonfinite(X)
        present = np.where(_checked_labels(Y, len(X)) == PRESENT, PRESENT, ABSENT)  # (N, num_classes)
        least = self.num_folds if len(costs) > 1 else 1
        for name, label in (("with it", PRESENT), ("without it", ABSENT)):
            counts = (present == label).sum(axis=0)
            if counts.min() < least:
                raise ValueError(
                    f"Class {counts.argmin()} has {counts.min()} images {name}, but {least} are needed. "
                    "Leave the class out, or label more images."
                )
        X = _normalized(X)
        run, classes = Parallel(n_jobs=self.n_jobs), range(present.shape[1])
        if len(costs) > 1:
            scores = run(
                delayed(_cross_validate)(self._svm(cost), X, present[:, number], self.num_folds)
                for number in classes
                for cost in costs
            )
            self.validation_ap_ = np.reshape(scores, (len(classes), len(costs)))
        else:
            self.validation_ap_ = np.full((len(classes), 1), np.nan)
        best = self.validation_ap_.argmax(axis=1)
        self.costs_ = np.array(costs)[best]
        fitted = run(
            delayed(_fit)(self._svm(self.costs_[number]), X, present[:, number]) for number in classes
        )
        self.coef_ = np.concatenate([svm.coef_ for svm in fitted])
        self.intercept_ = np.concatenate([svm.intercept_ for svm in fitted])
        if unfinished := [
            number for number, svm in zip(classes, fitted, strict=True) if svm.n_iter_ >= self.max_iter
        ]:
            logger.warning("liblinear stopped after max_iter=%d for classes %s.", self.max_iter, unfinished)
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Return the score of each class (N, num_classes) for features X (N, D)."""
        return _normalized(check_queries(self, X)) @ self.coef_.T + self.intercept_

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return 1 where a class is present and -1 where it is absent, (N, num_classes)."""
        return np.where(self.decision_function(X) > 0, PRESENT, ABSENT)

    def score(self, X: ArrayLike, Y: ArrayLike) -> float:
        """Return the mean over classes of the average precision (area), without the difficult images."""
        return float(average_precision(Y, self.decision_function(X)).mean())

    def _svm(self, cost: float) -> LinearSVC:
        return LinearSVC(
            C=cost,
            class_weight={PRESENT: 2, ABSENT: 1},
            dual=True,
            max_iter=self.max_iter,
            random_state=self.random_state,
        )


def average_precision(labels: ArrayLike, scores: ArrayLike, *, points: int | None = None) -> np.ndarray:
    """Return the average precision of each class (num_classes,), its difficult images (0) left out.

    Precision at a recall is the highest precision at that recall or a larger one. Images of equal score enter
    together, so that their order does not matter.

    Args:
        labels: (N, num_classes), 1 present, -1 absent, 0 difficult.
        scores: (N, num_classes).
        points: None takes the area under the curve, as VOC does since 2010 and VISSL does for VOC07; 11 takes
            the mean of the precisions at recall 0, 0.1, ..., 1, as VOC07 did.

    Raises:
        ValueError: If shapes differ, a label is none of the three or -1 nowhere, a score is not finite, or a
            class is present nowhere.
    """
    scores = np.asarray(as_array(scores), float)
    labels = _checked_labels(labels, len(scores))
    if scores.shape != labels.shape or not np.isfinite(scores).all():
        raise ValueError(f"scores {scores.shape} must be finite, and of the shape of labels {labels.shape}.")
    if points is not None and points < 2:
        raise ValueError(f"points={points} must be 2 or more (VOC07 had 11), or None for the area.")
    missing = np.flatnonzero(~(labels == PRESENT).any(axis=0))
    if len(missing):
        raise ValueError(f"Class {missing[0]} is present in no image. Leave it out of the mean.")
    return np.array([_one_class(labels[:, c], scores[:, c], points) for c in range(labels.shape[1])])


def _one_class(labels: np.ndarray, scores: np.ndarray, points: int | None) -> float:
    labels, scores = labels[labels != DIFFICULT], scores[labels != DIFFICULT]
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    found = np.cumsum(labels[order] == PRESENT)[last_of_equals]  # images of the class so far
    precision = found / (last_of_equals + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the highest from here on
    if points is None:
        return float((np.diff(found, prepend=0) / found[-1] * precision).sum())
    # found / all >= step / (points - 1), in whole numbers: 0.3 as a float is not three tenths.
    wanted = np.arange(points) * found[-1]
    return float(precision[np.searchsorted(found * (points - 1), wanted)].mean())


def _checked_labels(labels: ArrayLike, num_rows: int) -> np.ndarray:
    labels = np.asarray(as_array(labels))
    if labels.ndim != 2 or len(labels) != num_rows or not labels.size:
        raise ValueError(f"Labels of shape {labels.shape} must be (N, num_classes) with N = {num_rows} rows.")
    is_known = np.isin(labels, (ABSENT, DIFFICULT, PRESENT))
    if not is_known.all():
        strange = sorted(set(labels[~is_known].tolist()), key=str)
        raise ValueError(f"Labels {strange} must be 1 (present), -1 (absent) or 0 (difficult).")
    if not (labels == ABSENT).any():  # of 0 and 1, which would leave out of tests all that is absent
        raise ValueError("No label is -1 (absent); 0 is difficult to see. Of labels 0 and 1, give 2 * Y - 1.")
    return labels


def _normalized(X: np.ndarray) -> np.ndarray:
    """Return X in float64 with rows of length nearly 1: the 1e-5 is the published code's."""
    X = X.astype(np.float64)
    return X / (np.linalg.norm(X, axis=1, keepdims=True) + 1e-5)


def _cross_validate(svm: LinearSVC, X: np.ndarray, present: np.ndarray, num_folds: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(svm, X, present, cv=num_folds, scoring="average_precision").mean())


def _fit(svm: LinearSVC, X: np.ndarray, present: np.ndarray) -> LinearSVC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return svm.fit(X, present)
