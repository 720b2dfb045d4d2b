"""Logistic regression for a path of penalties: L-BFGS that knows the covariance of the features.

scikit-learn's L-BFGS starts each fit from zero and knows nothing of the features, whose directions differ in
scale by orders of magnitude, so it needs hundreds of passes over them, or stops short. Here each C starts
from the optimum of the one before, the features' covariance preconditions the iteration, and the line search
costs no pass, because logits are linear in the weights. An iteration is two products with the features; where
these are many times the rows, with their coordinates in the space that the rows span.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mocohub.probes.inputs import as_tensor, checked_device, class_numbers
from mocohub.probes.neighbors import exact_products

_HISTORY = 10  # pairs of steps and changes of the gradient that L-BFGS remembers
_COVARIANCE_ROWS = 4  # the covariance is estimated from this many rows for each feature, drawn at random
_MAX_DENSE = 8192  # features; wider ones are preconditioned by their variances alone
_SAME_RATIO = 30  # a preconditioner serves while penalty / variance changes by less than this factor
_FLAT = 1e-4  # what float32 may leave of the objective when no step lowers it any more

Solver = Callable[[Tensor], Tensor]  # rows (K, D + 1) times the inverse of an approximate Hessian


@dataclass(frozen=True)
class LogisticFit:
    """Optimum of a logistic regression for one C.

    Attributes:
        C: Inverse strength of the penalty, as in scikit-learn.
        coef: Weights (num_classes, D); for two classes (1, D), those of the second. On the CPU.
        intercept: Not penalised, (num_classes,) or (1,).
        objective: Mean cross-entropy + |coef|^2 / (2 C N): scikit-learn's objective divided by C N.
        num_iter: Iterations, of two products with the features each.
        converged: Whether the estimated distance to the optimum fell below `tol` times the objective.
    """

    C: float
    coef: Tensor
    intercept: Tensor
    objective: float
    num_iter: int
    converged: bool


@exact_products()
def logistic_path(
    X: ArrayLike,
    labels: ArrayLike,
    Cs: Sequence[float],
    *,
    max_iter: int = 1000,
    tol: float = 1e-6,
    device: str | torch.device = "cpu",
) -> list[LogisticFit]:
    """Fit multinomial logistic regressions with an L2 penalty for several C, each from the one before.

    The optimum is that of `sklearn.linear_model.LogisticRegression(C=C)`: the intercept is not penalised, and
    two classes have one row of weights. Preconditioning changes the way there, not the optimum. In memory are
    X, a centred copy of it, and about six matrices (N, num_classes).

    Args:
        X: Features (N, D), an array or a tensor; float64 is computed in float64, all others in float32.
        labels: Classes (N,), integers from 0; every class up to the largest must occur.
        Cs: Positive numbers. They are fitted from the smallest to the largest.
        max_iter: Iterations for each C, after which it stops with a ConvergenceWarning.
        tol: A fit ends when half the Newton decrement, an estimate of how far the objective is above its
            minimum, is below `tol` times the objective and a hundredth of what it was.
        device: "cpu" or "cuda".

    Returns:
        One fit for each entry of `Cs`, in that order.

    Raises:
        ValueError: If a C is not positive, a class is missing, features are not finite, or lengths differ.
    """
    Cs = [float(C) for C in Cs]
    if not Cs or not all(0 < C < float("inf") for C in Cs):
        raise ValueError(f"C={Cs} must be positive numbers.")
    problem = _Problem(X, labels, checked_device(device))
    fits = {C: problem.minimise(C, max_iter, tol) for C in sorted(set(Cs))}
    if stopped := [f"{C:g}" for C, fit in fits.items() if not fit.converged]:
        warnings.warn(
            f"L-BFGS stopped before the optimum for C = {', '.join(stopped)}. Increase max_iter "
            f"({max_iter}), scale the features, or lower C.",
            ConvergenceWarning,
            stacklevel=3,  # beyond the decorator
        )
    return [fits[C] for C in Cs]


def row_space(X: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return N features for each of N rows instead of D, and the orthonormal basis (D, N) that leads back.

    The best weights under an L2 penalty are sums of rows of X; within what these span, inner products and
    lengths are the same. So the optimum for X is that for the N features, times the basis. With more than
    D / 2 rows the decomposition takes longer than it saves: then X itself and None.
    """
    if 2 * len(X) > X.shape[1]:
        return X, None
    basis, coordinates = torch.linalg.qr(X.T)
    return coordinates.T.contiguous(), basis


class _Problem:
    """Features, labels, and the point (weights, logits) that the next C starts from.

    Logits are (K, N), classes in rows: sums over few classes then run along the rows in memory.
    """

    def __init__(self, X: ArrayLike, labels: ArrayLike, device: torch.device) -> None:
        X = X.detach() if isinstance(X, Tensor) else as_tensor(np.asarray(X))
        X = X.to(device, torch.float64 if X.dtype == torch.float64 else torch.float32)  # (N, D)
        self.labels = class_numbers(labels).to(device)  # (N,)
        if X.ndim != 2 or len(X) != len(self.labels):
            raise ValueError(
                f"X of shape {tuple(X.shape)} must be (N, D) with N = {len(self.labels)} labels."
            )
        if not all(end.isfinite() for end in X.aminmax()):
            raise ValueError("X holds NaN or inf. Drop these images or extract their features again.")
        # Centred, and divided by one number: the optimum is the same, since intercepts are not penalised, but
        # float32 is left for what tells images apart.
        self.mean = X.mean(dim=0)
        self.X = X - self.mean
        self.scale = max(abs(float(end)) for end in self.X.aminmax()) or 1.0
        self.X /= self.scale
        self.X, self._basis = row_space(self.X)
        counts = torch.bincount(self.labels)
        if len(counts) < 2 or not counts.all():
            raise ValueError(f"Classes have {counts.tolist()} rows: two or more are needed, and none empty.")
        # With two classes the logits of the first are 0: one row of weights, as in scikit-learn.
        self.num_fixed = int(len(counts) == 2)
        num_rows = len(counts) - self.num_fixed
        self.weights = self.X.new_zeros(num_rows, self.X.shape[1] + 1)  # (K, D + 1), the intercepts last
        self.logits = self.X.new_zeros(num_rows, len(self.X))  # (K, N)
        self._moments = self._second_moments()
        self._solve: Solver | None = None
        self._ratio = 0.0  # of penalty and variance, for which `_solve` was made

    def _second_moments(self) -> Tensor:
        """Return the mean of x x^T over rows x of (X, 1), (D + 1, D + 1) float64, or its diagonal alone."""
        N, D = self.X.shape
        num = min(N, _COVARIANCE_ROWS * D)
        generator = torch.Generator().manual_seed(0)
        rows = self.X if num == N else self.X[torch.randperm(N, generator=generator)[:num].to(self.X.device)]
        if D > _MAX_DENSE:
            return torch.nn.functional.pad(rows.square().mean(dim=0).double(), (0, 1), value=1.0)
        moments = torch.ones(D + 1, D + 1, dtype=torch.float64, device=rows.device)
        # On a CPU by NumPy, which computes half of a matrix times itself; torch computes both halves.
        product = rows.T @ rows if rows.is_cuda else torch.from_numpy(rows.numpy().T @ rows.numpy())
        moments[:D, :D] = product / num
        moments[D, :D] = moments[:D, D] = rows.mean(dim=0)
        return moments

    def minimise(self, C: float, max_iter: int, tol: float) -> LogisticFit:
        """Move to the optimum for C."""
        penalty = 1 / (C * len(self.X) * self.scale**2)
        solve = self._preconditioner(penalty)
        value, gradient = self._value(penalty), self._gradient(penalty)
        steps: list[tuple[Tensor, Tensor]] = []
        first_decrement, num_iter = None, 0
        while True:
            direction = _lbfgs_direction(gradient, steps, solve)
            decrement = -float((gradient * direction).sum())
            first_decrement = decrement if first_decrement is None else first_decrement
            # Where the penalty rules, the whole gain is small, but the weights are what is asked for.
            converged = decrement / 2 <= tol * value and decrement <= 0.01 * first_decrement
            if converged or num_iter == max_iter:
                break
            change = direction[:, :-1] @ self.X.T + direction[:, -1:]  # of the logits, (K, N)
            length = self._line_search(direction, change, penalty, decrement)
            before = self.weights, self.logits, gradient
            self.weights, self.logits = self.weights + length * direction, self.logits + length * change
            next_value = self._value(penalty)
            if not next_value < value:  # rounding hides what is left, or it is no number
                (self.weights, self.logits, gradient), converged = before, decrement / 2 <= _FLAT * value
                break
            value, gradient = next_value, self._gradient(penalty)
            steps = [*steps, (length * direction, gradient - before[2])][-_HISTORY:]
            num_iter += 1
        weights = self.weights[:, :-1].double() / self.scale
        if self._basis is not None:
            weights = weights @ self._basis.double().T
        intercept = self.weights[:, -1] - weights @ self.mean.double()
        coef, intercept = (t.to("cpu", self.X.dtype) for t in (weights, intercept))
        return LogisticFit(C, coef, intercept, value, num_iter, converged)

    def _value(self, penalty: float) -> float:
        losses = self._all_classes(self.logits).logsumexp(dim=0) - self._of_label(self.logits)
        return float(losses.double().mean() + penalty / 2 * self.weights[:, :-1].double().square().sum())

    def _gradient(self, penalty: float) -> Tensor:
        error = self._probabilities(self.logits)  # (K, N)
        if self.num_fixed:
            error -= self.labels
        else:
            error[self.labels, torch.arange(len(self.X), device=error.device)] -= 1
        error /= len(self.X)
        return torch.cat([error @ self.X + penalty * self.weights[:, :-1], error.sum(dim=1)[:, None]], dim=1)

    def _line_search(self, direction: Tensor, change: Tensor, penalty: float, decrement: float) -> float:
        """Return the length at which the slope along `direction` has fallen to a tenth (Newton's method)."""
        weights, step = self.weights[:, :-1], direction[:, :-1]
        own = float(self._of_label(change).double().mean())
        along, square = penalty * float((weights * step).sum()), penalty * float(step.square().sum())
        length = 1.0
        for _ in range(10):
            shares = self._probabilities(self.logits + length * change)
            mean = (shares * change).sum(dim=0)  # (N,)
            slope = float(mean.double().mean()) - own + along + length * square
            if abs(slope) <= 0.1 * decrement:
                break
            curvature = float(((shares * change * change).sum(dim=0) - mean**2).double().mean()) + square
            length = min(max(length - slope / curvature, 0.1 * length), 10 * length)
        return length

    def _preconditioner(self, penalty: float) -> Solver:
        """Return a function that solves with the Hessian as if all labels had the same variance."""
        shares = self._probabilities(self.logits)
        variance = float((shares * (1 - shares)).mean())
        ratio = penalty / variance
        # L-BFGS finds the overall scale itself; only the ratio of the two terms matters, and not much.
        if self._solve is not None and 1 / _SAME_RATIO < ratio / self._ratio < _SAME_RATIO:
            return self._solve
        hessian = variance * self._moments
        diagonal = hessian if hessian.ndim == 1 else hessian.diagonal()
        diagonal[:-1] += penalty
        added = 1e-7 * diagonal.mean()
        diagonal += added
        if hessian.ndim == 1:
            inverse = (1 / hessian).to(self.X.dtype)
            self._solve = lambda rows: rows * inverse
        else:
            factor, failed = torch.linalg.cholesky_ex(hessian)
            while failed:  # float32 has rounded an eigenvalue below zero
                added *= 10
                diagonal += added
                factor, failed = torch.linalg.cholesky_ex(hessian)
            # The inverse itself: with few rows, two triangular solves take much longer than one product.
            inverse = torch.cholesky_inverse(factor).to(self.X.dtype)
            self._solve = lambda rows: rows @ inverse
        self._ratio = ratio
        return self._solve

    def _all_classes(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits, (0, 0, self.num_fixed, 0))

    def _of_label(self, logits: Tensor) -> Tensor:
        return self._all_classes(logits).gather(0, self.labels[None])[0]

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.num_fixed else logits.softmax(dim=0)


def _lbfgs_direction(gradient: Tensor, steps: list[tuple[Tensor, Tensor]], solve: Solver) -> Tensor:
    """Return minus the estimated inverse Hessian times the gradient: L-BFGS's two loops."""
    rest, shares = gradient.clone(), []
    for step, change in reversed(steps):
        shares.append((step * rest).sum() / (step * change).sum())
        rest -= shares[-1] * change
    rest = solve(rest)
    if steps:
        step, change = steps[-1]
        rest *= (step * change).sum() / (change * solve(change)).sum()
    for (step, change), share in zip(steps, reversed(shares), strict=True):
        rest += (share - (change * rest).sum() / (step * change).sum()) * step
    return -rest
