"""Many softmax classifiers at once: one product of a batch of features with all weights, one update for all.

A grid of learning rates and weight decays costs one pass over the features instead of one for each setting,
and the processor sees one large product instead of many thin ones.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mocohub.errors import unknown
from mocohub.memory import freed_memory_kept, large_blocks_reused
from mocohub.probes.inputs import as_tensor, check_counts, checked_device, class_numbers
from mocohub.probes.minibatches import (
    MEMORY_BYTES,
    WINDOW_ROWS,
    copied,
    largest_of,
    matrix_of,
    minibatches,
)
from mocohub.probes.neighbors import exact_products

logger = logging.getLogger(__name__)

# The protocol of arXiv 1911.05722, section 4.1, and of facebookresearch/moco, main_lincls.py.
SGD_MOMENTUM = 0.9
_WEIGHT_STD = 0.01
_LR_DROPS = (6, 8)  # tenths of the epochs after which the learning rate falls tenfold: 60 and 80 of 100
SCHEDULES = ("step", "cosine")
PRECISIONS = ("float32", "bfloat16")


class Heads:
    """H linear softmax classifiers of the same features, each with its own learning rate and weight decay.

    Each is trained as `torch.optim.SGD` with momentum 0.9 would train it alone; weight decay acts on the
    biases too, as it does there. All start from the same weights, drawn from N(0, 0.01^2), and biases of 0.

    Attributes:
        base_lr: Learning rates at 256 images a step, (H,) float64 on the CPU.
        weight_decay: (H,) float64 on the CPU.
    """

    def __init__(
        self,
        base_lr: ArrayLike,
        weight_decay: ArrayLike,
        num_classes: int,
        num_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        precision: str = "float32",
        device: str | torch.device = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the initial weights.

        Args:
            base_lr: One for each head, or one for all; positive.
            weight_decay: Likewise; 0 or more.
            num_classes: C.
            num_features: D.
            dtype: float32 or float64.
            precision: Of the products in `step`, as for `train_heads`.
            device: Where the weights live and batches must be.
            generator: A CPU generator for the initial weights. Default: torch's own.

        Raises:
            ValueError: If a learning rate or weight decay is out of range, their numbers differ, or the
                precision is unknown.
        """
        if precision not in PRECISIONS:
            raise unknown("precision", str(precision), PRECISIONS)
        lrs = np.atleast_1d(np.asarray(base_lr, float))
        decays = np.atleast_1d(np.asarray(weight_decay, float))
        if lrs.ndim != 1 or decays.ndim != 1 or len({len(lrs), len(decays), 1}) > 2:
            raise ValueError(
                f"base_lr has {lrs.size} values and weight_decay {decays.size}: "
                "give one for each head, or one for all."
            )
        if not len(lrs) or not len(decays) or not ((lrs > 0) & np.isfinite(lrs)).all():
            raise ValueError(f"base_lr={base_lr} must be positive.")
        if not ((decays >= 0) & np.isfinite(decays)).all():
            raise ValueError(f"weight_decay={weight_decay} must be 0 or more.")
        lrs, decays = np.broadcast_arrays(lrs, decays)
        self.base_lr, self.weight_decay = torch.tensor(lrs), torch.tensor(decays)
        self._lr = self.base_lr.to(device, dtype)  # (H,)
        decay = (self.base_lr * self.weight_decay).repeat_interleave(num_classes)
        self._decay = decay.to(device, dtype) if decay.any() else None  # (H * C,)
        # H rows of classes under each other, so that one matrix product serves all heads.
        first = torch.empty(num_classes, num_features, dtype=dtype)
        first.normal_(std=_WEIGHT_STD, generator=generator)
        self._weight = first.to(device).repeat(len(lrs), 1)  # (H * C, D)
        self._bias = self._weight.new_zeros(len(self._weight))  # (H * C,)
        # What `step` multiplies with: these weights themselves, or a copy in bfloat16.
        self._factor = self._weight.bfloat16() if precision == "bfloat16" else self._weight
        # Each head's momentum times its learning rate: then one subtraction updates all heads.
        self._velocity, self._bias_velocity = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        self._scale = 1.0  # of the learning rates in the last step

    def __len__(self) -> int:
        return len(self.base_lr)

    @property
    def weight(self) -> Tensor:
        """Weights (H, C, D), a view."""
        return self._weight.view(len(self), -1, self._weight.shape[1])

    @property
    def bias(self) -> Tensor:
        """Biases (H, C), a view."""
        return self._bias.view(len(self), -1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, H, C) of features (B, D)."""
        return self._logits(features).permute(2, 0, 1)

    def _logits(self, features: Tensor) -> Tensor:
        """Logits (H, C, B): a softmax over few classes is several times faster along rows of images."""
        weight = self._weight if features.dtype == self._weight.dtype else self._factor
        logits = torch.addmm(self._bias[:, None].to(weight.dtype), weight, features.T)  # (H * C, B)
        return logits.to(self._weight.dtype).view(len(self), -1, len(features))

    @torch.no_grad()
    def step(self, features: Tensor, targets: Tensor, lr_scale: float = 1.0) -> None:
        """Take one step of SGD on the mean cross-entropy of a batch.

        Args:
            features: (B, D), of the weights' type, or already in bfloat16 if that is the precision; on their
                device. No gradient flows into them.
            targets: Classes (B,), int64.
            lr_scale: The learning rates are `base_lr` times this, positive: batch / 256 times the schedule.
        """
        if lr_scale != self._scale:  # the momentum is stored times the learning rate
            for velocity in (self._velocity, self._bias_velocity):
                velocity.mul_(lr_scale / self._scale)
            self._scale = lr_scale
        features = features.to(self._factor.dtype)
        # The gradient of the mean cross-entropy by the logits is (softmax - one-hot) / B.
        error = self._logits(features).softmax(dim=1)  # (H, C, B)
        error -= torch.zeros_like(error[0]).scatter_(0, targets[None], 1)
        error *= (self._lr * (lr_scale / len(targets)))[:, None, None]
        error = error.flatten(0, 1)  # (H * C, B)
        if features.dtype == error.dtype:
            self._velocity.addmm_(error, features, beta=SGD_MOMENTUM)
        else:
            gradient = error.to(features.dtype) @ features
            torch.add(gradient, self._velocity, alpha=SGD_MOMENTUM, out=self._velocity)
        self._bias_velocity.mul_(SGD_MOMENTUM).add_(error.sum(dim=1))
        if self._decay is not None:
            self._velocity.addcmul_(self._weight, self._decay[:, None], value=lr_scale)
            self._bias_velocity.addcmul_(self._bias, self._decay, value=lr_scale)
        self._weight -= self._velocity
        self._bias -= self._bias_velocity
        self._factor.copy_(self._weight)  # nothing, where they are one tensor

    def finite(self) -> Tensor:
        """Return whether each head's weights are finite, (H,) bool: a head that diverges harms no other."""
        return self.weight.isfinite().flatten(1).all(dim=1) & self.bias.isfinite().all(dim=1)

    @exact_products()
    def accuracy(self, features: Any, labels: ArrayLike) -> np.ndarray:
        """Return the share of rows that each head classifies right, (H,) float64; 0 for a head that diverged.

        Args:
            features: (N, D), an array, a tensor, or an object whose `blocks()` yields them in order.
            labels: Classes (N,), integers from 0.
        """
        labels, row = class_numbers(labels), 0
        right = torch.zeros(len(self), dtype=torch.int64)
        blocks = features.blocks() if hasattr(features, "blocks") else [features]
        for block in blocks:
            for start in range(0, len(block), 1024):
                rows = _to(block[start : start + 1024], self._weight)
                predicted = self._logits(rows).argmax(dim=1).cpu()  # (H, B)
                wanted = labels[row : row + len(rows)]  # fewer, if there are too few labels
                right += (predicted[:, : len(wanted)] == wanted).sum(dim=1)
                row += len(rows)
        if row != len(labels):
            raise ValueError(f"There are {row} rows of features, but {len(labels)} labels.")
        return torch.where(self.finite().cpu(), right / row, 0.0).double().numpy()


@exact_products()
def train_heads(
    features: Any,
    labels: ArrayLike,
    *,
    base_lr: float | Sequence[float],
    weight_decay: float | Sequence[float] = 0.0,
    epochs: int = 100,
    global_batch_size: int = 256,
    schedule: str = "step",
    precision: str = "float32",
    seed: int = 0,
    device: str | torch.device = "cpu",
    memory_bytes: int = MEMORY_BYTES,
    window_rows: int = WINDOW_ROWS,
) -> Heads:
    """Train H softmax classifiers on the same minibatches, as each would be trained alone.

    Features of up to `memory_bytes` are shuffled as a whole in every epoch. Larger ones are read a window at
    a time: blocks of 16 consecutive rows are put in random order, the blocks of a window are read, and the
    rows of the window are shuffled. So a batch mixes rows from all over the features, whatever their order
    on disk, and memory holds one window. Features that come as `blocks()` are first copied: into memory, or,
    if they are larger than `memory_bytes`, into a temporary file without a name (where `tempfile` puts it).

    Args:
        features: (N, D), a NumPy array (a memory map too) or a tensor, float16, float32 or float64; or an
            object whose `blocks()` yields arrays (n, D) in order, such as `mocohub.Features`. float64 is
            computed in float64, everything else in float32.
        labels: Classes (N,), integers from 0 to C - 1.
        base_lr: Learning rate at 256 images a step: one for each head, or one for all. The paper's is 30.
        weight_decay: One for each head, or one for all. The paper's is 0.
        epochs: Passes over the features. The paper's are 100.
        global_batch_size: Rows of a step; the last step of an epoch takes what is left.
        schedule: "step" divides the learning rates by 10 at 60 % and at 80 % of the epochs (MoCo);
            "cosine" follows a half cosine, constant within an epoch (moco-v3).
        precision: "bfloat16" rounds features, weights and errors of the logits to it before they are
            multiplied, and the products after it; weights, momentum and softmax stay in float32 or float64.
            Of wide features this takes 0.6 of the time on a CPU with AVX-512 BF16; results
            differ about as those of two seeds. Features are rounded once, if `memory_bytes` has room for the
            copy beside them. "float32" rounds nothing.
        seed: Of the initial weights and the order of the rows.
        device: "cpu", or "cuda"; there features stay on the card if they fit into a third of what is free.
        memory_bytes: Features larger than this are read in windows.
        window_rows: Rows of a window.

    Raises:
        ValueError: If a setting is out of range, features are not a finite matrix, or lengths differ.
        RuntimeError: If the weights of all heads leave the range of floating-point numbers.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", str(schedule), SCHEDULES)
    if precision not in PRECISIONS:
        raise unknown("precision", str(precision), PRECISIONS)
    check_counts(epochs=epochs, global_batch_size=global_batch_size, window_rows=window_rows)
    device = checked_device(device)
    targets = class_numbers(labels)  # (N,)
    matrix = matrix_of(features, len(targets), memory_bytes)
    dtype = torch.float64 if str(matrix.dtype).endswith("float64") else torch.float32
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(
        base_lr,
        weight_decay,
        int(targets.max()) + 1,
        matrix.shape[1],
        dtype=dtype,
        precision=precision,
        device=device,
        generator=generator,
    )
    largest = largest_of(matrix)
    num_values = len(matrix) * matrix.shape[1]
    num_bytes = num_values * matrix.dtype.itemsize
    in_windows = num_bytes > memory_bytes and not isinstance(matrix, Tensor)
    targets = targets.to(device)
    to_card = device.type == "cuda" and num_bytes < torch.cuda.mem_get_info(device)[0] / 3
    rounded = torch.bfloat16 if precision == "bfloat16" else None
    if to_card or (rounded and num_bytes + 2 * num_values <= memory_bytes):
        matrix, in_windows = copied(matrix, device if to_card else "cpu", rounded), False
    with freed_memory_kept(), large_blocks_reused():
        for epoch in range(epochs):
            lr_scale = global_batch_size / 256 * _schedule(schedule, epoch, epochs)
            window = window_rows if in_windows else None
            for rows, chosen in minibatches(matrix, global_batch_size, generator, window):
                rows = as_tensor(rows).to(device)
                rows = rows if rows.dtype == rounded else rows.to(dtype)
                heads.step(rows, targets[chosen.to(device)], lr_scale)
            finite = heads.finite()
            if not finite.any():
                lrs = ", ".join(f"{lr:g}" for lr in heads.base_lr.unique().tolist())
                raise RuntimeError(
                    f"The weights are no longer finite after epoch {epoch + 1} with base_lr={lrs} "
                    f"and features up to {largest:.3g}. Lower base_lr or scale the features."
                )
    if not finite.all():
        logger.warning(
            "%d of %d heads diverged: their learning rates are too high.", (~finite).sum(), len(heads)
        )
    return heads


def _schedule(name: str, epoch: int, epochs: int) -> float:
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return 0.1 ** sum(10 * epoch >= tenths * epochs for tenths in _LR_DROPS)


def _to(rows: np.ndarray | Tensor, like: Tensor) -> Tensor:
    """Return rows (B, D) as a tensor of the weights' type, on their device."""
    return as_tensor(rows).to(like.device, like.dtype)
