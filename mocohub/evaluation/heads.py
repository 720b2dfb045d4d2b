"""Linear classifiers on the features of a batch of images, trained at once by all processes.

Those of `mocohub.probes.heads` learn from stored features in one process, where their step is what takes the
time. Here the backbone does; so a step also counts loss and hits, and its state is laid out as it is saved.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mocohub import distributed
from mocohub.evaluation.protocols import LinearProtocol
from mocohub.features.precision import without_tf32
from mocohub.pretrain.randomness import stream

_ROWS = 1024  # features that are classified at a time


class Counts(NamedTuple):
    """Sums over images of all processes, H classifiers; float64 on the device."""

    loss: Tensor  # (H,) cross-entropy
    correct: Tensor  # (H,) images whose class is the most probable one
    num_images: Tensor  # ()


class Heads:
    """H softmax classifiers of D features into C classes, under SGD with momentum; float32.

    The gradient is written out: that of the cross-entropy by the logits is softmax - one-hot.

    Attributes:
        parameters: (H, C, D + 1); the last column is the biases, whose feature is always 1.
        velocity: The momentum buffer, likewise.
    """

    def __init__(
        self, protocol: LinearProtocol, num_features: int, num_classes: int, seed: int, device: torch.device
    ) -> None:
        """Draw the initial weights, the same on every process and device."""
        self.protocol, self.num_classes = protocol, num_classes
        weights = [
            torch.from_numpy(stream(seed, "classifier", head).standard_normal((num_classes, num_features)))
            for head in range(len(protocol.base_lrs))
        ]
        weight = protocol.weight_std * torch.stack(weights).float()  # (H, C, D)
        self.parameters = torch.cat([weight, torch.zeros_like(weight[..., :1])], dim=2).to(device)
        self.velocity = torch.zeros_like(self.parameters)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, lrs: list[float]) -> Counts:
        """Take one step on the global batch. All ranks must call this.

        Args:
            features: This process's rows, (n, D); n may be 0.
            labels: (n,) int64.
            lrs: Learning rate of each classifier.
        """
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)  # (n, D + 1)
        target = labels[:, None, None].expand(-1, len(lrs), 1)  # (n, H, 1)
        with without_tf32(features.device):
            log_p = self._logits(features).log_softmax(dim=2)  # (n, H, C)
            loss = -log_p.gather(2, target).sum((0, 2), dtype=torch.float64)  # (H,)
            correct = (log_p.argmax(dim=2, keepdim=True) == target).sum((0, 2), dtype=torch.float64)
            error = log_p.exp_().scatter_add_(2, target, -torch.ones_like(target, dtype=log_p.dtype))
            gradient = (error.flatten(1).T @ features).view_as(self.parameters)
        sums = torch.cat([loss, correct, loss.new_full((1,), len(features))])  # (2 H + 1,)
        distributed.sum_over_ranks(gradient)
        distributed.sum_over_ranks(sums)
        gradient /= sums[-1].clamp(min=1).float()  # the mean over the global batch
        if self.protocol.weight_decay:
            gradient.add_(self.parameters, alpha=self.protocol.weight_decay)
        self.velocity.mul_(self.protocol.sgd_momentum).add_(gradient)
        self.parameters -= self.velocity * self.velocity.new_tensor(lrs)[:, None, None]
        return Counts(sums[: len(lrs)], sums[len(lrs) : -1], sums[-1])

    @torch.no_grad()
    def num_correct(self, features: Tensor, labels: Tensor, k: int) -> Tensor:
        """Return for how many images the class is the first, and among the first k, (2, H) float64.

        All ranks must call this; the counts are over the rows of all of them.

        Args:
            features: This process's rows, (n, D); n may be 0.
            labels: (n,) int64.
            k: At most the number of classes.
        """
        device = self.parameters.device
        correct = torch.zeros(2, len(self.parameters), dtype=torch.float64, device=device)
        for rows, target in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            rows = rows.to(device)
            with without_tf32(device):
                logits = self._logits(torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1))
            hits = logits.topk(k, dim=2).indices == target.to(device)[:, None, None]  # (n, H, k)
            correct += torch.stack([hits[..., 0].sum(0), hits.any(2).sum(0)])
        distributed.sum_over_ranks(correct)
        return correct

    def classifier(self, head: int) -> dict[str, Tensor]:
        """Return a copy of one classifier, on the CPU, under the names of timm's ResNets."""
        parameters = self.parameters[head].cpu()
        return {"fc.weight": parameters[:, :-1].clone(), "fc.bias": parameters[:, -1].clone()}

    def _logits(self, features: Tensor) -> Tensor:
        """(n, D + 1) to (n, H, C)."""
        return (features @ self.parameters.flatten(0, 1).T).view(len(features), *self.parameters.shape[:2])
