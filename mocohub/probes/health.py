"""Whether features have collapsed: how many dimensions they fill, and how they spread in them.

Features that have not collapsed need not be good: those of an untrained network have not. Features that have
are good for nothing, whatever the loss says.

No labels are needed. Everything but uniformity is of all rows, and added up in one pass over blocks, so that
the features may be larger than memory. Repeated rows are told by 64 bits of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import sparse

from mocohub.probes.inputs import Bank, as_array, check_labels, check_seed, refuse_nonfinite, row_blocks
from mocohub.probes.neighbors import unit_rows
from mocohub.probes.spectrum import (
    effective_rank,
    moments,
    participation_ratio,
    rankme,
    singular_values,
)

# The verdict. A spread is 0 if all features point the same way and 1 if they point everywhere; it is the
# standard deviation of arXiv 2011.10566, section 4.1, times the square root of D.
COLLAPSED_SPREAD = 0.01
# An effective rank below a tenth of what N rows of D features can have: most of the spectrum is empty, the
# dimensional collapse of arXiv 2110.09348.
COLLAPSED_RANK_SHARE = 0.1
LEAST_ROWS = 32  # with fewer, the rank says more about the number of rows than about the features
DEAD_STD = 1e-4  # relative to the median of the standard deviations of all dimensions
_UNIFORMITY_T = 2.0  # t of arXiv 2005.10242
_PAIR_ROWS = 1024


@dataclass(frozen=True)
class Health:
    """What one set of features (N, D) is like.

    Attributes:
        verdict: "collapsed completely", "dimensional collapse", "too few rows to tell" or "healthy".
        num_rows: N.
        num_features: D.
        effective_rank: exp(entropy) of the singular values of the centred features, at most min(D, N - 1).
        rankme: RankMe (arXiv 2210.02885): likewise of the features as they are.
        participation_ratio: (sum of variances along the principal axes)^2 / sum of their squares.
        rank_share: `effective_rank` / min(D, N - 1).
        spread: sqrt(1 - `mean_cosine`), at least 0.
        mean_cosine: Mean over all pairs of different rows; None with fewer than two that are not zero.
        uniformity: log of the mean of exp(-2 d^2) over pairs of rows scaled to length 1, d their distance
            (arXiv 2005.10242, eq. 2); lower is more uniform, -4 the limit in many dimensions. None like
            `mean_cosine`.
        uniformity_rows: Rows among which it was computed.
        alignment: Mean d^2 of two views of an image (there eq. 1, alpha = 2); None without views.
        alignment_same_class: Mean d^2 of all pairs of rows of one class; None without labels or such pairs.
            It is no alignment in the paper's sense.
        dead: Numbers of the dimensions that hardly vary: their standard deviation is at most 1e-4 of the
            median one, or what rounding makes.
        num_zero_rows: Rows of zeros; they are left out of all that compares directions.
        num_constant_rows: Rows whose D values are all equal, zeros included.
        num_duplicate_rows: Rows that are bit for bit a row that came before.
        norms: "mean", "std", "min", "median" and "max" of the lengths of the rows.
        singular_values: Of the centred features, largest first, (D,).
    """

    verdict: str
    num_rows: int
    num_features: int
    effective_rank: float
    rankme: float
    participation_ratio: float
    rank_share: float
    spread: float
    mean_cosine: float | None
    uniformity: float | None
    uniformity_rows: int
    alignment: float | None
    alignment_same_class: float | None
    dead: tuple[int, ...]
    num_zero_rows: int
    num_constant_rows: int
    num_duplicate_rows: int
    norms: dict[str, float]
    singular_values: np.ndarray

    @property
    def words(self) -> str:
        """The verdict and its reasons, as sentences."""
        limit = min(self.num_features, self.num_rows - 1)
        rank = f"an effective rank of {self.effective_rank:.1f} of at most {limit}"
        sentences = {
            "collapsed completely": "The features have collapsed completely: all images have one direction "
            f"(spread {self.spread:.2g}, collapsed below {COLLAPSED_SPREAD:g}).",
            "dimensional collapse": f"The features have lost most dimensions: they have {rank} "
            f"(collapsed below {100 * COLLAPSED_RANK_SHARE:.0f} %).",
            "too few rows to tell": f"{self.num_rows} images are too few to tell how many dimensions the "
            f"features fill; it takes {LEAST_ROWS}.",
            "healthy": f"The features have not collapsed: they have {rank} and spread "
            f"{min(self.spread, 1.0):.2f} of 1.",
        }
        text = [sentences[self.verdict]]
        if self.dead:
            text.append(f"{len(self.dead)} of {self.num_features} dimensions are dead.")
        if self.num_duplicate_rows:
            text.append(f"{self.num_duplicate_rows} of {self.num_rows} rows repeat another row exactly.")
        if self.num_zero_rows:
            text.append(f"{self.num_zero_rows} rows are zero.")
        return " ".join(text)


def health(
    X: Bank,
    y: ArrayLike | None = None,
    *,
    views: tuple[ArrayLike, ArrayLike] | None = None,
    max_pair_rows: int = 5000,
    seed: int = 0,
) -> Health:
    """Measure how features spread, and say whether they collapsed.

    Args:
        X: Features (N, D): an array, a tensor, or whatever has `blocks()` and a length.
        y: Labels (N,), integers or strings, for `alignment_same_class`.
        views: For `alignment`: features of two views of the same images, of these or of others, as two
            matrices (n, D).
        max_pair_rows: Uniformity is computed among so many rows, drawn without replacement if there are more.
        seed: Of that draw.

    Raises:
        ValueError: If X is empty or not (N, D), a value is not finite, or labels or views do not fit it.

    >>> rows = np.random.default_rng(0).normal(size=(200, 8))
    >>> health(rows).verdict, health(np.ones((200, 8))).verdict
    ('healthy', 'collapsed completely')
    """
    check_seed(seed)
    X = X if hasattr(X, "blocks") else np.asarray(as_array(X))
    if len(X) == 0:
        raise ValueError("The features have no rows, so there is nothing to measure.")
    labels = _labels(y, len(X))
    chosen = np.random.default_rng(seed).choice(len(X), min(max_pair_rows, len(X)), replace=False)
    seen = _Pass(labels, np.sort(chosen))
    count, mean, scatter = moments(seen.watch(row_blocks(X)))

    # A dimension whose values differ by their rounding only does not vary.
    stds = np.sqrt(np.diag(scatter) / count)
    stds[stds <= np.finfo(np.float32).eps * np.abs(mean)] = 0
    singular = singular_values(scatter) if stds.any() else np.zeros(len(mean))
    mean_cosine = seen.mean_cosine()
    spread = float(np.sqrt(max(0.0, 1 - mean_cosine))) if mean_cosine is not None else 0.0
    rank = effective_rank(singular)
    limit = min(len(mean), count - 1)
    norms = np.concatenate(seen.norms)
    return Health(
        verdict=_verdict(count, spread, rank / max(limit, 1)),
        num_rows=count,
        num_features=len(mean),
        effective_rank=rank,
        rankme=rankme(singular_values(scatter + count * np.outer(mean, mean))),
        participation_ratio=participation_ratio(singular**2),
        rank_share=rank / max(limit, 1),
        spread=spread,
        mean_cosine=mean_cosine,
        uniformity=_uniformity(np.concatenate(seen.sample)),
        uniformity_rows=len(chosen),
        alignment=None if views is None else _alignment(views),
        alignment_same_class=seen.alignment_same_class(),
        dead=tuple(np.flatnonzero(stds <= DEAD_STD * np.median(stds)).tolist()),
        num_zero_rows=int((norms == 0).sum()),
        num_constant_rows=seen.num_constant,
        num_duplicate_rows=count - len(np.unique(np.concatenate(seen.hashes))),
        norms={
            "mean": float(norms.mean()),
            "std": float(norms.std()),
            "min": float(norms.min()),
            "median": float(np.median(norms)),
            "max": float(norms.max()),
        },
        singular_values=singular,
    )


def _verdict(num_rows: int, spread: float, rank_share: float) -> str:
    if num_rows > 1 and spread < COLLAPSED_SPREAD:
        return "collapsed completely"
    if num_rows < LEAST_ROWS:
        return "too few rows to tell"
    return "dimensional collapse" if rank_share < COLLAPSED_RANK_SHARE else "healthy"


class _Pass:
    """What is noted of each block of rows while `moments` adds them up."""

    def __init__(self, labels: np.ndarray | None, chosen: np.ndarray) -> None:
        self._labels, self._chosen, self._start = labels, chosen, 0
        self._sums: np.ndarray | None = None  # of the unit rows of each class (num_classes, D)
        self._counts = np.zeros(1 if labels is None else labels.max() + 1)
        self.sample: list[np.ndarray] = []
        self.norms: list[np.ndarray] = []
        self.hashes: list[np.ndarray] = []
        self.num_constant = 0

    def watch(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the same blocks."""
        for block in blocks:
            if block.dtype != np.float64:
                block = block.astype(np.float32)
            stop = self._start + len(block)
            units = unit_rows(torch.from_numpy(block)).numpy().astype(np.float64)
            self.norms.append(np.linalg.norm(block.astype(np.float64), axis=1))
            self.num_constant += int((block == block[:, :1]).all(1).sum())
            self.hashes.append(row_hashes(block))
            inside = self._chosen[(self._chosen >= self._start) & (self._chosen < stop)]
            self.sample.append(units[inside - self._start])
            if self._sums is None:
                self._sums = np.zeros((len(self._counts), block.shape[1]))
            of = np.zeros(len(block), int) if self._labels is None else self._labels[self._start : stop]
            is_direction = self.norms[-1] > 0
            one_hot = sparse.csr_array(
                (is_direction.astype(float), (of, np.arange(len(of)))), (len(self._counts), len(of))
            )
            self._sums += one_hot @ units
            self._counts += one_hot.sum(1)
            self._start = stop
            yield block

    def mean_cosine(self) -> float | None:
        """Mean over pairs: the square of the sum of N units holds every pair twice, and N ones."""
        total, n = self._sums.sum(0), self._counts.sum()
        return float((total @ total - n) / (n * (n - 1))) if n > 1 else None

    def alignment_same_class(self) -> float | None:
        """Mean squared distance, 2 - 2 cos, over pairs of one class, in the same way."""
        pairs = (self._counts * (self._counts - 1)).sum()
        if self._labels is None or not pairs:
            return None
        return float(2 - 2 * ((self._sums**2).sum() - self._counts.sum()) / pairs)


def _labels(y: ArrayLike | None, num_rows: int) -> np.ndarray | None:
    if y is None:
        return None
    y = np.asarray(as_array(y))
    if y.shape != (num_rows,):
        raise ValueError(
            f"y has shape {y.shape}, but the features have {num_rows} rows. Give one label a row."
        )
    check_labels(y)
    return np.unique(y, return_inverse=True)[1]


def row_hashes(block: np.ndarray) -> np.ndarray:
    """64 bits for each row (n,), equal for equal rows: its bytes as numbers, times odd random ones, added."""
    words = np.ascontiguousarray(block + 0.0).view(np.uint32)  # + 0.0, since 0.0 and -0.0 are equal
    odd = np.random.default_rng(0).integers(0, 1 << 63, (2, words.shape[1]), np.uint64) * 2 + 1
    sums = (words.astype(np.uint64) @ odd.T).astype(np.uint64)  # (n, 2), modulo 2^64
    return sums[:, 0] ^ (sums[:, 1] >> np.uint64(32))


def _uniformity(units: np.ndarray) -> float | None:
    rows = torch.from_numpy(units[np.linalg.norm(units, axis=1) > 0])
    if len(rows) < 2:
        return None
    total = -float(len(rows))  # each row with itself, exp(0)
    for start in range(0, len(rows), _PAIR_ROWS):
        squares = (2 - 2 * rows[start : start + _PAIR_ROWS] @ rows.T).clamp_(min=0)
        total += float(squares.mul_(-_UNIFORMITY_T).exp_().sum())
    return float(np.log(total / (len(rows) * (len(rows) - 1))))


def _alignment(views: tuple[ArrayLike, ArrayLike]) -> float:
    first, second = (np.asarray(as_array(view), np.float64) for view in views)
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(
            f"views have shapes {first.shape} and {second.shape}, but must be two matrices (n, D) of the "
            "same images in the same order."
        )
    refuse_nonfinite(first)
    refuse_nonfinite(second)
    first, second = (unit_rows(torch.from_numpy(view)) for view in (first, second))
    return float(((first - second) ** 2).sum(1).mean())
