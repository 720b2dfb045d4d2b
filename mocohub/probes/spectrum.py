"""How features spread over their dimensions: mean, scatter and singular values, added up block by block."""

from collections.abc import Iterable

import numpy as np

_RANKME_EPSILON = 1e-7  # of arXiv 2210.02885, section 3.1


def moments(blocks: Iterable[np.ndarray]) -> tuple[int, np.ndarray, np.ndarray]:
    """Return number of rows, mean (D,) and scatter matrix (D, D) about it, both float64.

    Means and scatters of blocks are joined as in Chan, Golub and LeVeque (1983, "Algorithms for computing the
    sample variance", eq. 2.1), which does not cancel when the mean is large.

    Raises:
        ValueError: If a value is not finite.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros(0)
    for block in blocks:
        block = block.astype(np.float64)
        if not np.isfinite(block.sum()):
            raise ValueError("The features have values that are not finite. Leave these rows out.")
        block_mean = block.mean(0)
        centred = block - block_mean
        if not count:
            mean, scatter = np.zeros(block.shape[1]), np.zeros((block.shape[1],) * 2)
        difference = block_mean - mean
        weight = count * len(block) / (count + len(block))
        scatter += centred.T @ centred + weight * np.outer(difference, difference)
        mean = mean + difference * (len(block) / (count + len(block)))
        count += len(block)
    return count, mean, scatter


def rounding_variance(scatter: np.ndarray) -> float:
    """Return the eigenvalue of a scatter matrix (D, D) that rounding of float32 rows alone can make."""
    return float(np.trace(scatter)) * len(scatter) * float(np.finfo(np.float32).eps) ** 2


def singular_values(scatter: np.ndarray) -> np.ndarray:
    """Return the singular values of the matrix whose Gram matrix is `scatter` (D, D), largest first, (D,).

    What rounding of float32 rows alone could make is 0.
    """
    squares = np.linalg.eigvalsh(scatter)[::-1]
    return np.sqrt(np.where(squares > rounding_variance(scatter), squares, 0.0))


def effective_rank(singular: np.ndarray) -> float:
    """Return exp(entropy) of singular values scaled to sum 1; 0.0 if all are 0.

    Roy and Vetterli (2007, "The effective rank", definition 1). k equal values give k.

    >>> round(effective_rank(np.array([2.0, 2.0, 0.0])), 6)
    2.0
    """
    if not singular.any():
        return 0.0
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rankme(singular: np.ndarray) -> float:
    """Return RankMe of the singular values of features that were not centred; 0.0 if all are 0.

    arXiv 2210.02885, eq. 1: as the effective rank, but 1e-7 is added to every share.
    """
    if not singular.any():
        return 0.0
    shares = singular / singular.sum() + _RANKME_EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


def participation_ratio(variances: np.ndarray) -> float:
    """Return (sum of variances)^2 / sum of their squares: k equal ones give k; 0.0 if all are 0.

    >>> participation_ratio(np.array([3.0, 3.0, 3.0, 0.0]))
    3.0
    """
    squares = float((variances**2).sum())
    return float(variances.sum()) ** 2 / squares if squares else 0.0
