"""The paper's two other mechanisms (arXiv 1911.05722, figure 2): end to end, and a memory bank.

Each is MoCo with another step; the letters are those of moco.py, and M is the number of training images.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocohub import distributed
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.batchnorm import discard_statistics
from mocohub.pretrain.data import Batch
from mocohub.pretrain.dictionary import MemoryBank
from mocohub.pretrain.encoder import Encoder
from mocohub.pretrain.moco import MoCo, StepResult, _exchange
from mocohub.pretrain.randomness import Draws


class EndToEnd(MoCo):
    """Negatives are the other keys of the global batch; both encoders get gradients (figure 2a)."""

    def __init__(
        self, query: Encoder, key: Encoder, optimizer: torch.optim.Optimizer, **settings: Any
    ) -> None:
        """Take over the parts.

        Args:
            query: Encodes the first view.
            key: Encodes the second, shuffled.
            optimizer: Over the parameters of both.
            **settings: Those of `MoCo` but for the queue and the key momentum.
        """
        super().__init__(query, key, None, optimizer, **settings)
        key.requires_grad_(True)

    def step(self, batch: Batch, draws: Draws) -> StepResult:
        """Train on one global batch, as `MoCo.step`."""
        self._train()
        directions = [(batch.x_q, batch.x_k, draws.shuffle)]
        if self.symmetric:
            directions.append((batch.x_k, batch.x_q, draws.second_shuffle))
        outcomes = [self._contrast(*direction) for direction in directions]
        distributed.average_over_ranks(p.grad for p in self._parameters())
        loss, accuracy, embeddings = zip(*outcomes, strict=True)
        result, _ = self._accept(
            torch.stack(loss).mean(), torch.stack(accuracy).mean(), torch.cat(embeddings)
        )
        return result

    def _contrast(self, x_q: Crops, x_k: Crops, shuffle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradient of the mean loss to both encoders'; return loss, accuracy and embeddings."""
        x_k = _exchange(x_k, shuffle)
        queries, keys = self._parts(x_q), self._parts(x_k)
        if len(queries) == 1:
            q, k = self._embed(self.query, x_q), self._embed(self.key, x_k)
            loss, accuracy = self._loss_of_batch(q, k, shuffle)
            loss.backward()
            return loss.detach(), accuracy, torch.cat([q, k]).detach()
        # Every embedding needs all others before its gradient is known: embed all, differentiate the loss
        # by the embeddings, then embed each micro-batch again and go on from there (arXiv 2101.06983).
        with torch.no_grad():
            q = torch.cat([self._embed(self.query, part) for part in queries])
            k = torch.cat([self._embed(self.key, part) for part in keys])
        for encoder in self._encoders():
            discard_statistics(encoder)
        loss, accuracy = self._loss_of_batch(q.requires_grad_(), k.requires_grad_(), shuffle)
        loss.backward()
        for encoder, parts, gradient in ((self.query, queries, q.grad), (self.key, keys, k.grad)):
            for part, part_gradient in zip(parts, gradient.split(len(parts[0].pixels)), strict=True):
                self._embed(encoder, part).backward(part_gradient)
        return loss.detach(), accuracy, torch.cat([q, k]).detach()

    def _loss_of_batch(self, q: Tensor, k: Tensor, shuffle: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE over the keys of all ranks, from this rank's queries and its shuffled keys (N, C)."""
        keys = _GatherRows.apply(k)[distributed.send_index(shuffle.argsort(), k.device)]  # (B, C)
        logits = q @ keys.T / self.temperature  # (N, B)
        own = torch.arange(len(q), device=q.device) + distributed.rank() * len(q)
        accuracy = (logits.detach().argmax(1) == own).to(logits.dtype).mean()
        return F.cross_entropy(logits, own), accuracy

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, encoder in (("", self.query), ("key.", self.key)):
            yield from ((prefix + name, parameter) for name, parameter in encoder.named_parameters())

    def _replicated(self, query: nn.Module) -> nn.Module:
        return query  # these gradients run through collectives; `step` averages them, not DDP

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._trained_parameters()]

    def _dictionary_tensors(self) -> dict[str, Tensor]:
        return {}

    def state_facts(self) -> dict[str, Any]:
        """Nothing but tensors."""
        return {}

    def load_facts(self, facts: dict[str, Any]) -> None:
        """Nothing to load."""


class _GatherRows(torch.autograd.Function):
    """`distributed.gather_rows` with a gradient: each rank gets the sum of what all ranks ask of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return distributed.gather_rows(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        distributed.sum_over_ranks(total)
        return total.chunk(distributed.world_size())[distributed.rank()]


class MemoryBankContrast(MoCo):
    """The dictionary stores an entry for every image; queries are compared with a sample of it (figure 2b).

    As in InstDisc the key of an image is its own entry, and there is no key encoder. Unlike InstDisc, which
    draws negatives for every query, one draw of K serves all queries of a step: the logits are then one
    product of matrices, at the memory of the queue.
    """

    def __init__(
        self,
        query: Encoder,
        bank: MemoryBank,
        optimizer: torch.optim.Optimizer,
        *,
        loss: str = "infonce",
        **settings: Any,
    ) -> None:
        """Take over the parts.

        Args:
            query: The encoder.
            bank: Equal on all ranks.
            optimizer: Over the parameters of `query`.
            loss: "infonce" or "nce".
            **settings: Those of `MoCo` but for the queue, the key momentum and `symmetric`.
        """
        # A bank has no key encoder; the one it is given to start with is let go.
        super().__init__(query, nn.Identity(), None, optimizer, **settings)
        self.reads_late = False  # a bank is worth more than the time a card waits
        self.key, self.bank, self.nce = None, bank, loss == "nce"
        self.nce_constant: float | None = None  # Z of arXiv 1805.01978, equation 8

    def step(self, batch: Batch, draws: Draws) -> StepResult:
        """Train on one global batch of single crops, as `MoCo.step`."""
        self._train()
        negatives = self.bank.entries[distributed.send_index(draws.negatives, self.device)]  # (K, C)
        own = self.bank.entries[batch.ids]  # (N, C)
        if self.nce and self.nce_constant is None:
            self.nce_constant = self._estimate_constant(batch.x_q, own, negatives)
        loss, accuracy, queries = self._backward(batch.x_q, own, negatives)
        result, _ = self._accept(loss, accuracy, queries)
        self.bank.update(distributed.gather_rows(batch.ids), distributed.gather_rows(queries))
        return result

    @torch.no_grad()
    def _estimate_constant(self, x: Crops, own: Tensor, negatives: Tensor) -> float:
        """Z, from the first global batch and constant from then on, as InstDisc's: M times the mean."""
        queries = torch.cat([self._embed(self.query, part) for part in self._parts(x)])
        discard_statistics(self.query)
        mean = self._logits(queries, own, negatives).exp().mean()
        distributed.average_over_ranks([mean])
        return mean.item() * len(self.bank.entries)

    def contrast(self, q: Tensor, k: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE, or NCE against uniform noise (arXiv 1805.01978, equations 5 to 7), mean over queries."""
        if not self.nce:
            return super().contrast(q, k, negatives)
        logits = self._logits(q, k, negatives)
        # log of P(i|v) / (K * P_noise), with P = exp(logit) / Z and P_noise = 1 / M
        log_odds = logits - math.log(self.nce_constant * len(negatives) / len(self.bank.entries))
        loss = -(F.logsigmoid(log_odds[:, 0]) + F.logsigmoid(-log_odds[:, 1:]).sum(1)).mean()
        return loss, (logits.detach().argmax(1) == 0).to(loss.dtype).mean()

    def _logits(self, q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
        """The (1 + K)-way logits (n, 1 + K), the image's own first."""
        return torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / self.temperature

    def _dictionary_tensors(self) -> dict[str, Tensor]:
        return {"bank": self.bank.entries}

    def state_facts(self) -> dict[str, Any]:
        """The constant of NCE."""
        return {"nce_constant": self.nce_constant}

    def load_facts(self, facts: dict[str, Any]) -> None:
        """The inverse of `state_facts`."""
        self.nce_constant = facts["nce_constant"]
