"""Batch norm over fixed groups of the batch: the paper's per-GPU statistics on any number of GPUs.

MoCo normalises each GPU's 32 images by themselves, and shuffles the keys across GPUs so that query and key
do not share statistics (arXiv 1911.05722, section 3.3). What matters is the group of images, not the GPU:
with the group a setting, one process with eight groups computes what eight processes with one group compute.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from mocohub.distributed import average_over_ranks


class GroupBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose training statistics are those of consecutive groups of `group_size` images.

    The running statistics move once a step, by the mean over all groups of the step, however many forward
    passes (micro-batches, views) the step takes: `commit_statistics` ends a step. Unlike
    facebookresearch/moco, which saves those of GPU 0 alone.
    """

    step_sums: Tensor

    def __init__(self, norm: nn.BatchNorm2d, group_size: int) -> None:
        """Take over a batch norm, its parameters included.

        Args:
            norm: Plain torch or timm batch norm; timm's fused activation is kept.
            group_size: Images in a group. Every training batch must be a multiple of it.
        """
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.act = getattr(norm, "act", nn.Identity())
        self.group_size = group_size
        # Over the groups of this step: sums of their means, of their variances, and of ones. The count is a
        # tensor because a Python number that changes would make torch.compile compile again.
        self.register_buffer("step_sums", self.running_mean.new_zeros(3, self.num_features), persistent=False)
        self.in_step = False
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W) group by group when training, by the running statistics otherwise."""
        if not self.training:
            return self.act(super().forward(x))
        assert len(x) % self.group_size == 0, f"{len(x)} images are not whole groups of {self.group_size}"
        num_groups = len(x) // self.group_size
        statistics = self.step_sums.new_ones(3, num_groups, self.num_features)
        if num_groups == 1:
            mean, var, _ = statistics[:, 0]
            y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        elif torch.compiler.is_compiling():
            y = _fusible_batch_norm(x, statistics, self.weight, self.bias, self.eps)
        else:
            y = _EachGroup.apply(x, statistics, self.weight, self.bias, self.eps)
        self.step_sums += statistics.sum(1)
        self.in_step = True
        return self.act(y)


class _EachGroup(torch.autograd.Function):
    """torch's batch norm of one group after the other into a single output, so that nothing is concatenated.

    Takes x (N, C, H, W), statistics (3, groups, C) of which the first two rows are overwritten by the groups'
    means and unbiased variances, weight (C,), bias (C,) and epsilon.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        num_groups = statistics.shape[1]
        y = torch.empty_like(x)
        saved = torch.empty_like(statistics[:2])  # (2, groups, C), means and 1 / deviations, for backward
        for group, out, mean, var, saved_mean, saved_invstd in zip(
            x.chunk(num_groups), y.chunk(num_groups), *statistics[:2], *saved, strict=True
        ):
            # With a momentum of 1 the running statistics become the group's own, the variance unbiased.
            torch.native_batch_norm(
                group, weight, bias, mean, var, True, 1.0, eps, out=(out, saved_mean, saved_invstd)
            )
        ctx.save_for_backward(x, weight, saved)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        num_groups = saved.shape[1]
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        dx = torch.empty_like(x) if wanted[0] else None
        affine = []  # of each group, the gradients of weight and bias
        for i, (group, dy_group) in enumerate(zip(x.chunk(num_groups), dy.chunk(num_groups), strict=True)):
            dx_group, *dweight_dbias = torch.ops.aten.native_batch_norm_backward(
                dy_group, group, weight, None, None, *saved[:, i], True, ctx.eps, wanted
            )
            affine.append(dweight_dbias)
            if dx is not None:
                dx[i * len(group) : (i + 1) * len(group)] = dx_group
        dweight, dbias = (
            torch.stack(parts).sum(0) if is_wanted else None
            for parts, is_wanted in zip(zip(*affine, strict=True), wanted[1:], strict=True)
        )
        return dx, None, dweight, dbias, None


def _fusible_batch_norm(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same as `_EachGroup`, in operations that torch.compile fuses, those of all groups together."""
    groups = x.unflatten(0, (statistics.shape[1], -1)).to(weight.dtype)  # (groups, n, C, H, W)
    var, mean = torch.var_mean(groups, (1, 3, 4), correction=0)  # (groups, C)
    count = groups[0, :, 0].numel()
    with torch.no_grad():
        statistics[0] = mean
        statistics[1] = var * (count / (count - 1))
    scale = weight * (var + eps).rsqrt()
    shift = bias - mean * scale
    y = groups * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    return y.to(x.dtype).flatten(0, 1)


def group_batch_norms(module: nn.Module, group_size: int) -> nn.Module:
    """Exchange every batch norm inside `module` for one over groups, in place; state-dict names stay.

    Raises:
        ValueError: If `group_size` is smaller than 2 (one image has no variance over the batch).
    """
    if group_size < 2:
        raise ValueError(f"bn_group_size ({group_size}) must be at least 2. The paper's is 32.")
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GroupBatchNorm2d(child, group_size))
        else:
            group_batch_norms(child, group_size)
    return module


@torch.no_grad()
def commit_statistics(module: nn.Module) -> None:
    """End a step: move the running statistics by the mean over the groups seen since the last call."""
    norms = _norms_in_step(module)
    if not norms:
        return
    sums, counts = [n.step_sums[:2] for n in norms], [n.step_sums[2:] for n in norms]
    means = [row for pair in torch._foreach_div(sums, counts) for row in pair]  # of means and of variances
    running = [buffer for n in norms for buffer in (n.running_mean, n.running_var)]
    torch._foreach_lerp_(running, means, [n.momentum for n in norms for _ in range(2)])
    torch._foreach_add_([n.num_batches_tracked for n in norms], 1)
    _forget(norms)


@torch.no_grad()
def discard_statistics(module: nn.Module) -> None:
    """Forget the groups seen since the last step, of which none or not all numbers shall count."""
    _forget(_norms_in_step(module))


def _forget(norms: list[GroupBatchNorm2d]) -> None:
    if norms:
        torch._foreach_zero_([n.step_sums for n in norms])
    for norm in norms:
        norm.in_step = False


def _norms_in_step(module: nn.Module) -> list[GroupBatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, GroupBatchNorm2d) and m.in_step]


def average_statistics(module: nn.Module) -> None:
    """Average the running statistics over the ranks (all must call this).

    The update is linear, so the mean of the ranks' running statistics is the running mean over all groups:
    once before saving or evaluating is as good as every step.
    """
    average_over_ranks(
        buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))
    )
