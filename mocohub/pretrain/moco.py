"""Momentum Contrast, one training step in the order of the paper's Algorithm 1 (arXiv 1911.05722).

    N  images of this rank          W  ranks             B = W * N  images of the global batch
    C  width of an embedding        K  keys in the queue
    q  queries (N, C)               k  keys (N, C)       m  momentum of the key encoder       tau  temperature

The step is the same on any number of ranks and micro-batches: batch norm works on fixed groups of images
(batchnorm.py), keys are shuffled over the global batch, and the queue does not change within a step. The
paper's two other mechanisms are in baselines.py.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocohub import distributed
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.batchnorm import average_statistics, commit_statistics, discard_statistics
from mocohub.pretrain.data import Batch
from mocohub.pretrain.dictionary import Queue
from mocohub.pretrain.encoder import Encoder
from mocohub.pretrain.infonce import infonce
from mocohub.pretrain.randomness import Draws


class StepResult(NamedTuple):
    """What a step saw, means over the global batch: 0-dim tensors, so that only who reads them waits."""

    loss: Tensor  # nats
    accuracy: Tensor  # 0..1, top-1 of the pretext task


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
        symmetric: bool = False,
        finish: Callable[[Crops], Tensor] = lambda crops: crops.pixels,
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
            symmetric: Whether each view is query once and key once. The two losses are added, and the keys of
                both views are enqueued, the second view's first.
            finish: From crops to the encoders' input (augment_batch.finish_views).
            micro_batch_size: Images of this rank in a forward pass; N if None. Whole batch-norm groups.
            autocast_dtype: torch.bfloat16 to run the encoders in mixed precision; None for their own.
        """
        self.query, self.key, self.queue, self.optimizer = query, key, queue, optimizer
        self.key_momentum, self.temperature, self.symmetric = key_momentum, temperature, symmetric
        self.finish, self.micro_batch_size, self.autocast_dtype = finish, micro_batch_size, autocast_dtype
        self.device = next(query.parameters()).device
        self.reads_late = self.device.type == "cuda"  # whether a step is looked at after the next began
        self._unread: _Unread | None = None
        key.requires_grad_(False)
        self._replica = self._replicated(query) if distributed.world_size() > 1 else query

    def step(self, batch: Batch, draws: Draws) -> StepResult:
        """Train on one global batch. All ranks must call this.

        Args:
            batch: This rank's N images, two crops of each, on `device`.
            draws: The shuffles, the same on every rank.

        Raises:
            FloatingPointError: If loss, gradients or keys are not finite on some rank. On a CPU this step's;
                weights, statistics and queue are then as before it, but for the key encoder's momentum
                update. On a card the step before, so that nobody waits for it; the queue is as before that.
        """
        self._train()
        self._update_key_encoder()
        directions = [(batch.x_q, batch.x_k, draws.shuffle)]
        if self.symmetric:
            directions.append((batch.x_k, batch.x_q, draws.second_shuffle))
        losses, accuracies, new_keys = [], [], []
        for i, (x_q, x_k, shuffle) in enumerate(directions):
            keys = self._encode_keys(x_k, shuffle)  # (B, C)
            k = keys.chunk(distributed.world_size())[distributed.rank()]  # (N, C), of this rank's queries
            loss, accuracy, _ = self._backward(x_q, k, self.queue.embeddings, last=i == len(directions) - 1)
            losses.append(loss)
            accuracies.append(accuracy)
            new_keys.append(keys)
        keys = torch.cat(new_keys)
        result, accepted = self._accept(torch.stack(losses).mean(), torch.stack(accuracies).mean(), keys)
        self.queue.enqueue(keys, accepted)
        return result

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        # Parameters only: batch-norm statistics of the key encoder are its own.
        weight = 1 - self.key_momentum
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), weight)

    @torch.no_grad()
    def _encode_keys(self, x_k: Crops, shuffle: Tensor) -> Tensor:
        """Encode the keys in shuffled order and return all ranks' in the original one, (B, C)."""
        x_k = _exchange(x_k, shuffle)
        keys = torch.cat([self._embed(self.key, part) for part in self._parts(x_k)])  # (N, C)
        return distributed.gather_rows(keys)[distributed.send_index(shuffle.argsort(), keys.device)]

    def _backward(
        self, x_q: Crops, k: Tensor, negatives: Tensor, last: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradient of the mean loss to the query encoder's; return loss, accuracy, queries (N, C).

        `last` is whether the gradients of the step are complete and shall be averaged over ranks.
        """
        parts = self._parts(x_q)
        loss, accuracy, queries = 0.0, 0.0, []
        for i, (x, positives) in enumerate(zip(parts, k.split(len(parts[0].pixels)), strict=True)):
            share = len(positives) / len(k)
            with nullcontext() if last and i == len(parts) - 1 else self._gradients_stay_local():
                q = self._embed(self._replica, x)
                part_loss, part_accuracy = self.contrast(q, positives, negatives)
                (part_loss * share).backward()
            with torch.no_grad():
                loss = loss + part_loss.detach() * share
                accuracy = accuracy + part_accuracy * share
            queries.append(q.detach())
        return loss, accuracy, torch.cat(queries)

    def contrast(self, q: Tensor, k: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of picking each query's key, and the accuracy of it; see `infonce`."""
        return infonce(q, k, negatives, self.temperature)

    def _accept(self, loss: Tensor, accuracy: Tensor, embeddings: Tensor) -> tuple[StepResult, Tensor | None]:
        """Take the optimiser's step if everything is finite on all ranks, and end the step.

        Returns:
            The means over ranks, and, where nobody has waited for it, whether the step was finite.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        finite = loss.isfinite() & embeddings.isfinite().all() & norms.isfinite().all()
        report = torch.stack([loss, accuracy, (~finite).to(loss.dtype)])
        distributed.average_over_ranks([report])
        loss, accuracy, rejected = report.unbind()
        accepted = None
        if self.reads_late:
            accepted = rejected == 0
            unread, self._unread = self._unread, _Unread(report)
            if unread:
                unread.raise_if_rejected()
        elif rejected:
            self.optimizer.zero_grad()
            for encoder in self._encoders():
                discard_statistics(encoder)
            raise FloatingPointError(_complaint(loss))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for encoder in self._encoders():
            commit_statistics(encoder)
        return StepResult(loss, accuracy), accepted

    def settle(self) -> None:
        """Make the state fit to be read: wait for the last step and average statistics. All ranks call this.

        Raises:
            FloatingPointError: If the last step was not finite.
        """
        unread, self._unread = self._unread, None
        if unread:
            unread.raise_if_rejected()
        for encoder in self._encoders():
            average_statistics(encoder)

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """The live tensors of the whole state, by their names in a checkpoint."""
        tensors = {f"query.{name}": value for name, value in self.query.state_dict().items()}
        if self.key is not None:
            tensors |= {f"key.{name}": value for name, value in self.key.state_dict().items()}
        tensors |= self._dictionary_tensors()
        for name, parameter in self._trained_parameters():
            slot = self.optimizer.state[parameter]
            if slot.get("momentum_buffer") is None:
                # Zero momentum and none at all make the same first step.
                slot["momentum_buffer"] = torch.zeros_like(parameter)
            tensors[f"sgd_momentum.{name}"] = slot["momentum_buffer"]
        return tensors

    def state_facts(self) -> dict[str, Any]:
        """The state that is not tensors, as JSON values."""
        return {"queue_pointer": self.queue.pointer}

    def load_facts(self, facts: dict[str, Any]) -> None:
        """The inverse of `state_facts`; the tensors are copied into those of `state_tensors`."""
        self.queue.pointer = facts["queue_pointer"]

    def _dictionary_tensors(self) -> dict[str, Tensor]:
        return {"queue": self.queue.embeddings}

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.query.named_parameters()

    def _replicated(self, query: nn.Module) -> nn.Module:
        # Unlike facebookresearch/moco: no buffer is broadcast before each forward pass. The queue is equal on
        # all ranks by construction, and running statistics are averaged when they are read.
        return DistributedDataParallel(query, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def _encoders(self) -> list[Encoder]:
        return [encoder for encoder in (self.query, self.key) if encoder is not None]

    def _train(self) -> None:
        for encoder in self._encoders():
            encoder.train()

    def _embed(self, encoder: nn.Module, crops: Crops) -> Tensor:
        images = self.finish(crops)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return encoder(images)

    def _parts(self, crops: Crops) -> list[Crops]:
        """Cut crops into micro-batches."""
        size = self.micro_batch_size or len(crops.pixels)
        columns = [None if rows is None else rows.split(size) for rows in crops]
        count = len(columns[0])
        return [Crops(*(None if c is None else c[i] for c in columns)) for i in range(count)]

    def _gradients_stay_local(self):  # noqa: ANN202 (a context manager of either kind)
        return self._replica.no_sync() if self._replica is not self.query else nullcontext()


class _Unread:
    """The report of a step (loss, accuracy, share of ranks that reject it), on its way to the host."""

    def __init__(self, report: Tensor) -> None:
        self._report, self._arrived = report, None
        if report.is_cuda:
            host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
            self._report = host.copy_(report, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def raise_if_rejected(self) -> None:
        if self._arrived:
            self._arrived.synchronize()
        loss, _, rejected = self._report
        if rejected:
            raise FloatingPointError(_complaint(loss))


def _exchange(crops: Crops, order: Tensor) -> Crops:
    """Return this rank's part of the global batch of crops in another order."""
    return Crops(*(None if rows is None else distributed.exchange_rows(rows, order) for rows in crops))


def _complaint(loss: Tensor) -> str:
    return "a key or a gradient is not finite" if loss.isfinite() else f"loss is {loss.item()}"
