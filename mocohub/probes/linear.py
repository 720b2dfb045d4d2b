"""Linear classification on frozen, stored features: SGD as in the papers, or logistic regression."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state, column_or_1d

from mocohub.errors import unknown
from mocohub.probes.heads import PRECISIONS, SCHEDULES, Heads, train_heads
from mocohub.probes.inputs import as_array, check_counts, check_queries, check_training_set, checked_device
from mocohub.probes.logistic import logistic_path, row_space

# With fewer rows than features their covariance tells our own L-BFGS little: such a fit is left to
# scikit-learn, if rows x features x classes are below this. Its own tolerance, 1e-4, stops several percent
# above the optimum when C is large.
_LARGE = 2e8
_TOL = 1e-9
_DOUBLE = 1 << 22  # features, rows x width, up to which logistic regression computes in float64 at no cost
_CACHED = "cached features are not the paper's protocol"


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Trains a linear softmax classifier on features of a frozen backbone.

    Cached features are not the paper's protocol: the paper sees each image through a new random crop and
    flip in every epoch; features extracted once are seen as they are. So this is the optimisation of that
    protocol, not the whole of it, and a number from here must not be set beside the published ones without
    saying so. `protocol` says it.

    `solver="sgd"` trains as the linear classification of MoCo does (arXiv 1911.05722, section 4.1): SGD on
    the cross-entropy, momentum 0.9, no weight decay, learning rate `base_lr` x batch / 256 that falls
    tenfold at 60 % and at 80 % of the epochs, weights drawn from N(0, 0.01^2), biases 0.

    `solver="lbfgs"` is multinomial logistic regression with an L2 penalty, as scikit-learn defines it. Its
    optimum is unique: no learning rate, no seed. Fewer images than features are left to scikit-learn; more,
    one on a card, or several C go to `logistic_path`. Either ends within about 1e-4 of the optimum.

    Where `base_lr`, `weight_decay` (sgd) or `C` (lbfgs) is a sequence, `fit` tries every combination and
    takes the one with the highest accuracy on images held out, of equal ones the first. These are a
    stratified share of the training images, after which the chosen setting is fitted again to all of them;
    or, if `fit` gets a validation set, that set, and the classifier that won is kept. The heads of a grid
    are trained at once, on the same batches.

    Neither solver rescales the features. A learning rate of 30 suits the small pooled activations of MoCo's
    backbones; for features of another scale lower `base_lr` or put a scaler in front, for instance
    `make_pipeline(StandardScaler(), LinearProbe("lbfgs"))`. float64 features are computed in float64, all
    others in float32, but for small logistic regressions, which take float64 too.

    Attributes:
        classes_: The labels seen by `fit`, sorted, shape (num_classes,).
        coef_: Weights (num_classes, D); with two classes (1, D), those of the second class.
        intercept_: Biases (num_classes,), or (1,).
        n_iter_: Epochs trained, or iterations of L-BFGS.
        n_features_in_: Width D of the features.
        best_params_: {"base_lr", "weight_decay"} or {"C"} that was fitted.
        validation_scores_: One {parameters..., "accuracy"} for each combination tried; empty without a grid.

    >>> probe = LinearProbe("lbfgs").fit([[0.0], [1.0], [3.0], [4.0]], ["low", "low", "high", "high"])
    >>> print(*probe.predict([[0.5], [3.5]]))
    low high
    """

    def __init__(
        self,
        solver: str = "sgd",
        *,
        base_lr: float | Sequence[float] = 30.0,
        weight_decay: float | Sequence[float] = 0.0,
        epochs: int = 100,
        global_batch_size: int = 256,
        schedule: str = "step",
        precision: str = "float32",
        C: float | Sequence[float] = 1.0,
        max_iter: int = 1000,
        validation_fraction: float = 0.1,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        """Set the solver; nothing is checked before `fit`.

        Args:
            solver: "sgd" or "lbfgs".
            base_lr: For sgd: learning rate at 256 images a step (the paper's is 30), or several to try.
            weight_decay: For sgd (the paper's is 0), or several to try.
            epochs: For sgd: passes over the training features (the paper's are 100).
            global_batch_size: For sgd: images a step (the paper's are 256). The last step of an epoch takes
                what is left.
            schedule: For sgd: "step" as above, or "cosine" (moco-v3).
            precision: For sgd: "bfloat16" multiplies in it, about twice as fast for wide features where the
                processor or card computes in it, and says so in `protocol`; see `train_heads`.
            C: For lbfgs: inverse strength of the L2 penalty, as in scikit-learn, or several to try.
            max_iter: For lbfgs: iterations after which it stops with a ConvergenceWarning.
            validation_fraction: Share of each class that is held out to choose among several settings,
                between 0 and 1; at least one image where a class has two, and never all of them.
            device: "cpu" or "cuda".
            random_state: For sgd: seed of the initial weights and of the order of the images; for a grid: of
                the images held out. None draws a new one in each `fit`.
        """
        self.solver = solver
        self.base_lr = base_lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.global_batch_size = global_batch_size
        self.schedule = schedule
        self.precision = precision
        self.C = C
        self.max_iter = max_iter
        self.validation_fraction = validation_fraction
        self.device = device
        self.random_state = random_state

    @property
    def protocol(self) -> str:
        """What is done, in a line for tables and cards; after `fit` with the setting that was chosen."""
        grid = self._grid()
        chosen = getattr(self, "best_params_", grid[0] if len(grid) == 1 else None)
        how = "" if len(grid) == 1 else f" (best of {len(grid)} on held-out images)"
        if self.solver == "lbfgs":
            C = "a grid" if chosen is None else f"{chosen['C']:g}"
            return f"logistic regression, C = {C}{how}, {_CACHED}"
        products = ", products in bfloat16" if self.precision == "bfloat16" else ""
        lr, decay = ("a grid",) * 2 if chosen is None else (f"{v:g}" for v in chosen.values())
        return (
            f"linear, SGD lr {lr} x batch / 256, weight decay {decay}{how}, {self.schedule} schedule, "
            f"{self.epochs} epochs, batch {self.global_batch_size}{products}, {_CACHED}"
        )

    def fit(
        self, X: ArrayLike, y: ArrayLike, X_val: ArrayLike | None = None, y_val: ArrayLike | None = None
    ) -> Self:
        """Train on features X (N, D) and labels y (N,), integers or strings; arrays or tensors.

        Args:
            X: Features (N, D).
            y: Labels (N,).
            X_val: Features to choose among several settings. Default: `validation_fraction` of X.
            y_val: Their labels; all must occur in y.

        Raises:
            ValueError: If a setting is out of range, a feature is NaN or infinite, a label is None, there
                is only one class, lengths or widths differ, or nothing can be held out.
            RuntimeError: If SGD leaves the range of floating-point numbers.
        """
        if self.solver not in ("sgd", "lbfgs"):
            raise unknown("solver", str(self.solver), ("sgd", "lbfgs"))
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", str(self.schedule), SCHEDULES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", str(self.precision), PRECISIONS)
        grid = self._grid()
        self._check_settings(grid)
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val belong together: give both, or neither.")
        X, y = check_training_set(self, X, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(f"Only one class in y ({self.classes_[0]}): LinearProbe needs two or more.")
        seed = int(check_random_state(self.random_state).randint(2**31))
        if len(grid) == 1:
            self.best_params_, self.validation_scores_ = grid[0], []
            self.coef_, self.intercept_, self.n_iter_ = self._solve(X, labels, grid, seed)[0]
            return self
        X_train, train_labels, refit = X, labels, X_val is None
        if refit:
            held_out = _held_out(labels, self.validation_fraction, seed)
            X_val, y_val = X[held_out], y[held_out]
            X_train, train_labels = X[~held_out], labels[~held_out]
        else:
            X_val, y_val = self._checked_validation(X_val, y_val)
        solutions = self._solve(X_train, train_labels, grid, seed)
        accuracies = [self._accuracy(solution, X_val, y_val) for solution in solutions]
        best = int(np.argmax(accuracies))
        self.best_params_ = grid[best]
        self.validation_scores_ = [
            {**setting, "accuracy": share} for setting, share in zip(grid, accuracies, strict=True)
        ]
        solution = self._solve(X, labels, [grid[best]], seed)[0] if refit else solutions[best]
        self.coef_, self.intercept_, self.n_iter_ = solution
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

    def _grid(self) -> list[dict[str, float]]:
        """Return every combination of settings to try."""
        if self.solver == "lbfgs":
            return [{"C": float(C)} for C in np.atleast_1d(self.C)]
        return [
            {"base_lr": float(lr), "weight_decay": float(decay)}
            for lr in np.atleast_1d(self.base_lr)
            for decay in np.atleast_1d(self.weight_decay)
        ]

    def _check_settings(self, grid: list[dict[str, float]]) -> None:
        check_counts(epochs=self.epochs, global_batch_size=self.global_batch_size, max_iter=self.max_iter)
        for name in ("C",) if self.solver == "lbfgs" else ("base_lr", "weight_decay"):
            least = 0 if name == "weight_decay" else np.nextafter(0, 1)
            if not grid or not all(least <= setting[name] < np.inf for setting in grid):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be {'0 or more' if least == 0 else 'positive'}."
                )
        if len(grid) > 1 and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be between 0 and 1.")
        checked_device(self.device)

    def _checked_validation(self, X_val: ArrayLike, y_val: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        X_val, y_val = check_queries(self, X_val), column_or_1d(as_array(y_val))
        if len(X_val) != len(y_val):
            raise ValueError(f"X_val has {len(X_val)} rows, but y_val {len(y_val)} labels.")
        if strangers := sorted(set(y_val.tolist()) - set(self.classes_.tolist()), key=str):
            raise ValueError(f"y_val has classes that y lacks: {strangers}. Remove these images.")
        return X_val, y_val

    def _solve(
        self, X: np.ndarray, labels: np.ndarray, grid: list[dict[str, float]], seed: int
    ) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """Return weights (num_classes or 1, D), biases and iterations for each setting."""
        if self.solver == "sgd":
            heads = train_heads(
                X,
                labels,
                base_lr=[setting["base_lr"] for setting in grid],
                weight_decay=[setting["weight_decay"] for setting in grid],
                epochs=self.epochs,
                global_batch_size=self.global_batch_size,
                schedule=self.schedule,
                precision=self.precision,
                seed=seed,
                device=self.device,
            )
            return [(*_head(heads, number), self.epochs) for number in range(len(grid))]
        dtype, Cs = X.dtype, [setting["C"] for setting in grid]
        few = len(X) <= X.shape[1] and X.size * len(self.classes_) <= _LARGE
        if X.size <= _DOUBLE:
            X = X.astype(np.float64)
        if len(Cs) == 1 and few and X.dtype == np.float64 and self.device == "cpu":
            # Centred features have the same optimum, found in less than half the iterations.
            mean = X.mean(axis=0)
            rows, basis = row_space(torch.from_numpy(X - mean))
            fit = LogisticRegression(C=Cs[0], tol=_TOL, max_iter=self.max_iter).fit(rows.numpy(), labels)
            coef = fit.coef_ if basis is None else fit.coef_ @ basis.numpy().T
            intercept = fit.intercept_ - coef @ mean
            return [(coef.astype(dtype), intercept.astype(dtype), int(fit.n_iter_[0]))]
        fits = logistic_path(X, labels, Cs, max_iter=self.max_iter, device=self.device)
        return [
            (fit.coef.numpy().astype(dtype), fit.intercept.numpy().astype(dtype), fit.num_iter)
            for fit in fits
        ]

    def _accuracy(
        self, solution: tuple[np.ndarray, np.ndarray, int], X_val: np.ndarray, y_val: np.ndarray
    ) -> float:
        self.coef_, self.intercept_, self.n_iter_ = solution
        diverged = not np.isfinite(self.coef_).all()
        return 0.0 if diverged else float(self.score(X_val, y_val))


def _head(heads: Heads, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (num_classes, D) and biases of one head; (1, D) for two classes, as in scikit-learn."""
    weight, bias = heads.weight[number].cpu(), heads.bias[number].cpu()
    if len(weight) == 2:  # the probabilities are the same
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return weight.numpy().copy(), bias.numpy().copy()  # a copy, or every head would keep all the others


def _held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw `fraction` of each class, at least one row where it has two, and never all; a mask (N,)."""
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in range(labels.max() + 1):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    if not held_out.any():
        raise ValueError(
            "Every class has a single image, so that none can be held out to choose among several settings. "
            "Pass X_val and y_val, or give one setting instead of several."
        )
    return held_out
