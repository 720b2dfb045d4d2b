"""Momentum Contrast, one training step in the order of the paper's Algorithm 1 (arXiv 1911.05722).

    N  images of this rank          W  ranks             B = W * N  images of the global batch
    C  width of an embedding        K  keys in the queue
    q  queries (N, C)               k  keys (N, C)       m  momentum of the key encoder       tau  temperature

The step is the same on any number of ranks and micro-batches: batch norm works on fixed groups of images
(batchnorm.py), keys are shuffled over the global batch, and the queue does not change within a step.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mocohub import distributed
from mocohub.pretrain.batchnorm import commit_statistics, discard_statistics
from mocohub.pretrain.dictionary import Queue


class Encoder(nn.Module):
    """Backbone, projection head, and unit length: images (N, 3, H, W) to embeddings (N, C)."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Join the parts.

        Args:
            backbone: A timm model without classifier, (N, 3, H, W) to (N, num_features).
            head: (N, num_features) to (N, C), see `projection_head`.
            mean: Per-channel mean of RGB in 0..1, subtracted from uint8 images.
            std: Per-channel standard deviation likewise.
        """
        super().__init__()
        self.backbone, self.head = backbone, head
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images; uint8 ones are normalised here, so that bytes and not floats travel between ranks."""
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
            images = images.contiguous(memory_format=torch.channels_last)
        z = self.head(self.backbone(images))
        return F.normalize(z.float() if z.dtype == torch.bfloat16 else z, dim=1)


def projection_head(kind: str, num_features: int, embed_dim: int = 128) -> nn.Module:
    """Return the layer(s) after the pooled features: "linear" (v1) or "mlp" (v2, arXiv 2003.04297)."""
    if kind == "linear":
        return nn.Linear(num_features, embed_dim)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, embed_dim)
        )
    raise ValueError(f"Unknown head '{kind}'. Choose linear (MoCo v1) or mlp (MoCo v2).")


@dataclass(frozen=True)
class StepResult:
    """What a step saw, mean over the global batch: the loss in nats, top-1 of the (K+1)-way pretext task."""

    loss: float
    accuracy: float


class MoCo:
    """Query encoder, key encoder, queue and optimiser, and the step that moves them."""

    def __init__(
        self,
        query: Encoder,
        key: Encoder,
        queue: Queue,
        optimizer: torch.optim.Optimizer,
        *,
        key_momentum: float = 0.999,
        temperature: float = 0.07,
        micro_batch_size: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        """Take over the parts; under a process group the query encoder's gradients are averaged over ranks.

        Args:
            query: The encoder that is trained. Both encoders must already work on batch-norm groups.
            key: One of the same shape, with the weights it shall start from. It gets no gradient.
            queue: Equal on all ranks.
            optimizer: Over the parameters of `query`.
            key_momentum: m, in 0..1.
            temperature: tau.
            micro_batch_size: Images of this rank in a forward pass; N if None. Whole batch-norm groups.
            autocast_dtype: torch.bfloat16 to run the encoders in mixed precision; None for their own.
        """
        self.query, self.key, self.queue, self.optimizer = query, key, queue, optimizer
        self.key_momentum, self.temperature = key_momentum, temperature
        self.micro_batch_size, self.autocast_dtype = micro_batch_size, autocast_dtype
        self.device = next(query.parameters()).device
        key.requires_grad_(False)
        self._replica: nn.Module = query
        if distributed.world_size() > 1:
            # Unlike facebookresearch/moco: no buffer is broadcast before each forward pass. The queue is
            # equal on all ranks by construction, and running statistics are averaged when they are read.
            self._replica = DistributedDataParallel(
                query, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def step(self, x_q: Tensor, x_k: Tensor, shuffle: Tensor) -> StepResult:
        """Train on one global batch. All ranks must call this.

        Args:
            x_q: This rank's query crops, (N, 3, H, W), uint8 or already normalised floats.
            x_k: The key crops of the same images, likewise.
            shuffle: A permutation of the B global rows, int64 on the CPU, the same on every rank.

        Raises:
            FloatingPointError: If the loss or a key is not finite on some rank. Weights, statistics and queue
                are then as before the step, but for the key encoder's momentum update.
        """
        self.query.train()
        self.key.train()
        self._update_key_encoder()
        keys = self._encode_keys(x_k, shuffle)  # (B, C)
        k = keys.chunk(distributed.world_size())[distributed.rank()]  # (N, C), of this rank's queries
        loss, accuracy = self._backward(x_q, k)
        if not distributed.agree(bool(loss.isfinite() & keys.isfinite().all())):
            self.optimizer.zero_grad()
            discard_statistics(self.query)
            discard_statistics(self.key)
            elsewhere = "a key, or the loss of another rank, is not finite"
            raise FloatingPointError(elsewhere if loss.isfinite() else f"loss is {loss.item()}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.queue.enqueue(keys)
        commit_statistics(self.query)
        commit_statistics(self.key)
        distributed.average_over_ranks([loss, accuracy])
        return StepResult(loss.item(), accuracy.item())

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        # Parameters only: batch-norm statistics of the key encoder are its own.
        weight = 1 - self.key_momentum
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), weight)

    @torch.no_grad()
    def _encode_keys(self, x_k: Tensor, shuffle: Tensor) -> Tensor:
        """Encode the keys in shuffled order and return all ranks' in the original one, (B, C)."""
        x_k = distributed.exchange_rows(x_k, shuffle)
        keys = torch.cat([self._embed(self.key, part) for part in x_k.split(self._micro(x_k))])  # (N, C)
        unshuffle = shuffle.argsort()
        return distributed.gather_rows(keys)[unshuffle.to(keys.device)]

    def _backward(self, x_q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the mean loss in the query encoder; return this rank's loss and accuracy."""
        parts = list(zip(x_q.split(self._micro(x_q)), k.split(self._micro(x_q)), strict=True))
        loss, accuracy = torch.zeros((), device=x_q.device), torch.zeros((), device=x_q.device)
        for i, (x, positives) in enumerate(parts):
            share = len(x) / len(x_q)
            with self._gradients_stay_local() if i < len(parts) - 1 else nullcontext():
                logits = self.logits(self._embed(self._replica, x), positives)  # (n, 1 + K)
                part_loss = F.cross_entropy(logits, logits.new_zeros(len(x), dtype=torch.long))
                (part_loss * share).backward()
            loss = loss + part_loss.detach() * share
            accuracy = accuracy + (logits.detach().argmax(1) == 0).float().mean() * share
        return loss, accuracy

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the (1 + K)-way InfoNCE logits (n, 1 + K), the positive first (equation 1).

        Args:
            q: Queries (n, C); gradient flows.
            k: Their keys (n, C); none does.
        """
        positive = (q * k).sum(1, keepdim=True)  # (n, 1)
        negative = q @ self.queue.embeddings.T  # (n, K)
        return torch.cat([positive, negative], dim=1) / self.temperature

    def _embed(self, encoder: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return encoder(images)

    def _micro(self, images: Tensor) -> int:
        return self.micro_batch_size or len(images)

    def _gradients_stay_local(self):  # noqa: ANN202 (a context manager of either kind)
        return self._replica.no_sync() if self._replica is not self.query else nullcontext()
