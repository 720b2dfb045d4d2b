"""The dictionaries that keys are compared in: MoCo's queue, and InstDisc's memory bank."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Queue:
    """The last K keys of all ranks, one a row (arXiv 1911.05722, section 3.2), first in, first out.

    The same on every rank; nothing broadcasts it. Unlike facebookresearch/moco: the batch need not divide K
    (the queue wraps around), and rows are items.
    """

    def __init__(self, embeddings: Tensor, pointer: int = 0) -> None:
        """Take over a queue.

        Args:
            embeddings: (K, C), rows of unit length. Held, not copied; no gradient.
            pointer: The row that is overwritten next, the oldest.
        """
        self.embeddings = embeddings  # (K, C)
        self.pointer = pointer

    @classmethod
    def random(cls, queue_size: int, embed_dim: int, generator: torch.Generator) -> "Queue":
        """Return a queue of random unit vectors, as the published code starts with."""
        return cls(_random_units(queue_size, embed_dim, generator))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, accepted: Tensor | None = None) -> None:
        """Overwrite the oldest rows by `keys`, (B, C), those of all ranks in global order.

        Args:
            keys: On the queue's device.
            accepted: A bool on that device that nobody has looked at yet; if false, nothing changes.
        """
        size = len(self.embeddings)
        # Of a batch larger than the queue only the last K keys remain; they are the ones written last.
        rows = ((self.pointer + torch.arange(len(keys), device=keys.device)) % size)[-size:]
        self.pointer = (self.pointer + len(keys)) % size
        keys = keys[-size:].to(self.embeddings.dtype)
        if accepted is not None:
            keys = torch.where(accepted, keys, self.embeddings[rows])
        self.embeddings[rows] = keys


class MemoryBank:
    """One entry for every training image, a moving average of its embeddings (arXiv 1805.01978, section 3.4).

    The same on every rank. Bytes: 4 * C for each image.
    """

    def __init__(self, entries: Tensor, momentum: float = 0.5) -> None:
        """Take over a bank.

        Args:
            entries: (M, C), rows of unit length. Held, not copied; no gradient.
            momentum: Share of the old entry in the new one, before it is scaled to unit length.
        """
        self.entries, self.momentum = entries, momentum  # (M, C)

    @classmethod
    def random(
        cls, num_images: int, embed_dim: int, momentum: float, generator: torch.Generator
    ) -> "MemoryBank":
        """Return a bank of random unit vectors."""
        return cls(_random_units(num_images, embed_dim, generator), momentum)

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Move the entries of `ids` (B,) towards `embeddings` (B, C), those of all ranks in global order.

        An image that a batch shows twice (in place of a broken one) counts once, by its last row.
        """
        last = torch.tensor(list({i: row for row, i in enumerate(ids.tolist())}.values()), device=ids.device)
        rows = ids[last]
        moved = self.momentum * self.entries[rows] + (1 - self.momentum) * embeddings[last]
        self.entries[rows] = F.normalize(moved.to(self.entries.dtype), dim=1)


def _random_units(n: int, dim: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=generator), dim=1)
