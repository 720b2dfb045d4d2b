"""Batch norm over fixed groups of the batch: the paper's per-GPU statistics on any number of GPUs.

MoCo normalises each GPU's 32 images by themselves, and shuffles the keys across GPUs so that query and key
do not share statistics (arXiv 1911.05722, section 3.3). What matters is the group of images, not the GPU:
with the group a setting, one process with eight groups computes what eight processes with one group compute.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocohub.distributed import average_over_ranks


class GroupBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose training statistics are those of consecutive groups of `group_size` images.

    The running statistics move once a step, by the mean over all groups of the step, however many forward
    passes (micro-batches) the step takes: `commit_statistics` ends a step. Unlike facebookresearch/moco,
    which saves those of GPU 0 alone.
    """

    step_mean: Tensor
    step_var: Tensor

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
        self.register_buffer("step_mean", torch.zeros_like(self.running_mean), persistent=False)
        self.register_buffer("step_var", torch.ones_like(self.running_var), persistent=False)
        self.groups_seen = 0
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W) group by group when training, by the running statistics otherwise."""
        if not self.training:
            return self.act(super().forward(x))
        assert len(x) % self.group_size == 0, f"{len(x)} images are not whole groups of {self.group_size}"
        normalised = [self._normalise(group) for group in x.split(self.group_size)]
        return self.act(torch.cat(normalised) if len(normalised) > 1 else normalised[0])

    def _normalise(self, group: Tensor) -> Tensor:
        self.groups_seen += 1
        # A momentum of 1/i makes the running update the plain mean of the i groups seen so far.
        momentum = 1 / self.groups_seen
        return F.batch_norm(
            group, self.step_mean, self.step_var, self.weight, self.bias, True, momentum, self.eps
        )


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
    norms = [m for m in module.modules() if isinstance(m, GroupBatchNorm2d) and m.groups_seen]
    for norm in norms:
        norm.running_mean.lerp_(norm.step_mean, norm.momentum)
        norm.running_var.lerp_(norm.step_var, norm.momentum)
        norm.num_batches_tracked += 1
        norm.groups_seen = 0


@torch.no_grad()
def discard_statistics(module: nn.Module) -> None:
    """Forget the groups seen since the last step, whose numbers may not be finite."""
    for norm in module.modules():
        if isinstance(norm, GroupBatchNorm2d):
            norm.step_mean.zero_()
            norm.step_var.fill_(1)
            norm.groups_seen = 0


def average_statistics(module: nn.Module) -> None:
    """Average the running statistics over the ranks (all must call this).

    The update is linear, so the mean of the ranks' running statistics is the running mean over all groups:
    once before saving or evaluating is as good as every step.
    """
    average_over_ranks(
        buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))
    )
