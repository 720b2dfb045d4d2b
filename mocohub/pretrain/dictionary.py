"""The dictionary keys are compared in: a first-in, first-out queue (arXiv 1911.05722, section 3.2)."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Queue:
    """The last K keys of all ranks, one a row. The same on every rank; nothing broadcasts it.

    Unlike facebookresearch/moco: the batch need not divide K (the queue wraps around), and rows are items.
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
        return cls(F.normalize(torch.randn(queue_size, embed_dim, generator=generator), dim=1))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows by `keys`, (B, C), those of all ranks in global order."""
        size = len(self.embeddings)
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        # Of a batch larger than the queue only the last K keys remain; they are the ones written last.
        self.embeddings[rows[-size:]] = keys[-size:].to(self.embeddings.dtype)
        self.pointer = (self.pointer + len(keys)) % size
