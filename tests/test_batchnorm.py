import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from mocohub.pretrain.batchnorm import (
    GroupBatchNorm2d,
    commit_statistics,
    discard_statistics,
    group_batch_norms,
)


def random_norm(num_features: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(num_features)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm


def output_and_gradients(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)]


class EachByItself(nn.Module):
    """Plain batch norm, one call for each group: the slow reference."""

    def __init__(self, norm: nn.BatchNorm2d, group_size: int) -> None:
        super().__init__()
        self.norm, self.group_size = norm, group_size
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(group) for group in x.split(self.group_size)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_groups_equal_plain_batch_norm_on_each(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4).to(dtype, memory_format=layout)
    dy = torch.randn(12, 5, 4, 4).to(dtype)
    plain = random_norm(5).to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = output_and_gradients(EachByItself(copy.deepcopy(plain), 4), x, dy)
    ours = output_and_gradients(GroupBatchNorm2d(plain, 4), x, dy)
    assert ours[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(ours[0], expected[0])


def test_gradients_equal_those_of_plain_batch_norm_on_each_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    grouped = GroupBatchNorm2d(nn.BatchNorm2d(3, dtype=torch.float64), 4)
    assert torch.autograd.gradcheck(grouped, (x,))


def test_running_statistics_move_once_a_step_by_the_mean_over_its_groups() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64) * 3 + 1
    grouped = GroupBatchNorm2d(nn.BatchNorm2d(5, dtype=torch.float64), 4)
    for micro_batch in x.split(4):
        grouped(micro_batch)
    commit_statistics(grouped)
    means = torch.stack([g.mean((0, 2, 3)) for g in x.split(4)]).mean(0)
    variances = torch.stack([g.transpose(0, 1).flatten(1).var(1) for g in x.split(4)]).mean(0)
    torch.testing.assert_close(grouped.running_mean, 0.1 * means)
    torch.testing.assert_close(grouped.running_var, 0.9 + 0.1 * variances)
    assert grouped.num_batches_tracked == 1
    before = grouped.running_mean.clone()
    commit_statistics(grouped)
    assert grouped.running_mean.equal(before)


def test_passes_that_were_discarded_leave_no_trace_even_if_not_finite() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4, 4)
    grouped, once = (GroupBatchNorm2d(nn.BatchNorm2d(5), 4) for _ in range(2))
    grouped(x * float("nan"))
    discard_statistics(grouped)
    commit_statistics(grouped)
    assert grouped.num_batches_tracked == 0 and grouped.running_mean.eq(0).all()
    for norm in (grouped, once):
        norm(x)
        commit_statistics(norm)
    torch.testing.assert_close(dict(grouped.named_buffers()), dict(once.named_buffers()))


@pytest.mark.parametrize("num_groups", [1, 3])
def test_compiled_in_one_graph_and_once_for_all_steps(num_groups: int) -> None:
    torch.manual_seed(0)
    plain = random_norm(5).double()
    ours, expected = GroupBatchNorm2d(copy.deepcopy(plain), 4), GroupBatchNorm2d(plain, 4)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):  # steps of two micro-batches
            for _ in range(2):
                x, dy = torch.randn(2, 4 * num_groups, 5, 4, 4, dtype=torch.float64)
                results = [output_and_gradients(norm, x, dy) for norm in (compiled, expected)]
                torch.testing.assert_close(*results)
            for norm in (ours, expected):
                commit_statistics(norm)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(expected.named_buffers()))
    assert ours.num_batches_tracked == 3


def test_the_activation_of_timms_batch_norm_is_kept() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 8, 5, 4, 4)
    each = EachByItself(BatchNormAct2d(5), 4)
    ours = GroupBatchNorm2d(copy.deepcopy(each.norm), 4)
    assert ours(x).min() == 0
    torch.testing.assert_close(output_and_gradients(ours, x, dy), output_and_gradients(each, x, dy))


@pytest.mark.parametrize("architecture", ["resnet18", "resnetv2_50"])
def test_networks_keep_their_entries_and_their_output_in_eval_mode(architecture: str) -> None:
    torch.manual_seed(0)
    args = {"layers": (1, 1, 1, 1)} | ({"preact": False} if architecture == "resnetv2_50" else {})
    net = timm.create_model(architecture, num_classes=0, **args).eval()
    images = torch.randn(2, 3, 64, 64)
    entries, expected = list(net.state_dict()), net(images)
    group_batch_norms(net, 2)
    assert list(net.state_dict()) == entries
    assert torch.equal(net(images), expected)


def test_groups_of_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bn_group_size \(1\) must be at least 2"):
        group_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), 1)
