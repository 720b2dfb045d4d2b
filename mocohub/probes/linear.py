"""Linear classification on frozen features: the paper's SGD protocol, or logistic regression."""

import math
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state

from mocohub.errors import unknown
from mocohub.probes.knn import as_array, check_queries, check_training_set

# The protocol of arXiv 1911.05722, section 4.1, and of facebookresearch/moco, main_lincls.py.
_SGD_MOMENTUM = 0.9
_WEIGHT_STD = 0.01
_LR_DROPS = (6, 8)  # tenths of the epochs after which the learning rate falls tenfold: 60 and 80 of 100


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Trains a linear softmax classifier on features of a frozen backbone.

    `solver="sgd"` trains as the linear classification of MoCo does (arXiv 1911.05722, section 4.1): SGD on
    the cross-entropy, momentum 0.9, no weight decay, learning rate `base_lr` x batch / 256 that falls
    tenfold at 60 % and at 80 % of the epochs, weights drawn from N(0, 0.01^2), biases 0. The paper sees
    each image through a new random crop and flip in every epoch; features extracted once are seen as they
    are. So this is the optimisation of that protocol, not the whole of it, and a number from here must not
    be set beside the published ones without saying so.

    `solver="lbfgs"` is scikit-learn's multinomial logistic regression with an L2 penalty. Its optimum is
    unique: no learning rate, no seed.

    Neither rescales the features. A learning rate of 30 suits the small pooled activations of MoCo's
    backbones; for features of another scale lower `base_lr` or put a scaler in front, for instance
    `make_pipeline(StandardScaler(), LinearProbe("lbfgs"))`. float64 features are computed in float64, all
    others in float32.

    Attributes:
        classes_: The labels seen by `fit`, sorted, shape (num_classes,).
        coef_: Weights (num_classes, D); with two classes (1, D), those of the second class.
        intercept_: Biases (num_classes,), or (1,).
        n_iter_: Epochs trained, or iterations of L-BFGS.
        n_features_in_: Width D of the features.

    >>> probe = LinearProbe("lbfgs").fit([[0.0], [1.0], [3.0], [4.0]], ["low", "low", "high", "high"])
    >>> print(*probe.predict([[0.5], [3.5]]))
    low high
    """

    def __init__(
        self,
        solver: str = "sgd",
        *,
        base_lr: float = 30.0,
        epochs: int = 100,
        global_batch_size: int = 256,
        C: float = 1.0,
        max_iter: int = 1000,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        """Set the solver; nothing is checked before `fit`.

        Args:
            solver: "sgd" or "lbfgs".
            base_lr: For sgd: learning rate at 256 images a step (the paper's is 30).
            epochs: For sgd: passes over the training features (the paper's are 100).
            global_batch_size: For sgd: images a step (the paper's are 256). The last step of an epoch takes
                what is left.
            C: For lbfgs: inverse strength of the L2 penalty, as in scikit-learn.
            max_iter: For lbfgs: iterations after which it stops with a ConvergenceWarning.
            random_state: For sgd: seed of the initial weights and of the order of the images; None draws
                a new one in each `fit`.
        """
        self.solver = solver
        self.base_lr = base_lr
        self.epochs = epochs
        self.global_batch_size = global_batch_size
        self.C = C
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on features X (N, D) and labels y (N,), integers or strings; arrays or tensors.

        Raises:
            ValueError: If a setting is out of range, a feature is NaN or infinite, a label is None, there
                is only one class, or the lengths of `X` and `y` differ.
            RuntimeError: If SGD leaves the range of floating-point numbers.
        """
        if self.solver not in ("sgd", "lbfgs"):
            raise unknown("solver", str(self.solver), ("sgd", "lbfgs"))
        if min(self.epochs, self.global_batch_size) < 1 or not 0 < self.base_lr < math.inf:
            raise ValueError(
                f"epochs={self.epochs} and global_batch_size={self.global_batch_size} must be 1 or more, "
                f"base_lr={self.base_lr} must be positive."
            )
        X, y = check_training_set(self, X, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(f"Only one class in y ({self.classes_[0]}): LinearProbe needs two or more.")
        if self.solver == "sgd":
            self._fit_sgd(X, labels)
        else:
            self._fit_lbfgs(X, labels)
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Return the logits (N, num_classes); with two classes (N,), positive for the second."""
        X = check_queries(self, X)
        logits = X @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return the probability of each class (N, num_classes), columns in the order of `classes_`."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            logits = np.stack([np.zeros_like(logits), logits], axis=1)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the most probable class of each row of X (N, D); shape (N,)."""
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)]

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the share of rows of X whose class is `y`."""
        return super().score(X, as_array(y), sample_weight)

    def _fit_sgd(self, X: np.ndarray, labels: np.ndarray) -> None:
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31)))
        targets = torch.from_numpy(labels)
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        weight = torch.empty(len(self.classes_), X.shape[1], dtype=dtype)
        weight.normal_(std=_WEIGHT_STD, generator=generator)
        # The biases are one more column, whose feature is always 1.
        parameters = torch.cat([weight, weight.new_zeros(len(weight), 1)], dim=1)  # (num_classes, D + 1)
        velocity = torch.zeros_like(parameters)
        for epoch in range(self.epochs):
            lr = self.base_lr * self.global_batch_size / 256
            lr *= 0.1 ** sum(10 * epoch >= tenths * self.epochs for tenths in _LR_DROPS)
            for rows in torch.randperm(len(X), generator=generator).split(self.global_batch_size):
                features = torch.from_numpy(X[rows.numpy()])  # (B, D)
                features = torch.cat([features, features.new_ones(len(rows), 1)], dim=1)
                # The gradient of the mean cross-entropy by the logits is (softmax - one-hot) / B.
                error = (features @ parameters.T).softmax(dim=1)  # (B, num_classes)
                error[torch.arange(len(rows)), targets[rows]] -= 1
                velocity.mul_(_SGD_MOMENTUM).addmm_(error.T, features, alpha=1 / len(rows))
                parameters -= lr * velocity
            if not parameters.isfinite().all():
                raise RuntimeError(
                    f"The weights are no longer finite after epoch {epoch + 1} with base_lr={self.base_lr:g} "
                    f"and features up to {np.abs(X).max():.3g}. Lower base_lr or scale the features."
                )
        if len(parameters) == 2:  # as scikit-learn has it; the probabilities are the same
            parameters = parameters[1:] - parameters[:1]
        self.coef_, self.intercept_ = parameters[:, :-1].numpy(), parameters[:, -1].numpy()
        self.n_iter_ = self.epochs

    def _fit_lbfgs(self, X: np.ndarray, labels: np.ndarray) -> None:
        regression = LogisticRegression(C=self.C, max_iter=self.max_iter).fit(X, labels)
        self.coef_, self.intercept_ = regression.coef_, regression.intercept_
        self.n_iter_ = int(regression.n_iter_[0])
