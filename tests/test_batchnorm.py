import copy

import pytest
import timm
import torch
from torch import nn

from mocohub.pretrain.batchnorm import GroupBatchNorm2d, commit_statistics, group_batch_norms


def test_a_batch_of_groups_equals_plain_batch_norm_on_each_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    plain = nn.BatchNorm2d(5, dtype=torch.float64)
    nn.init.normal_(plain.weight)
    grouped = GroupBatchNorm2d(copy.deepcopy(plain), 4)
    expected = torch.cat([copy.deepcopy(plain)(group) for group in x.split(4)])
    assert torch.equal(grouped(x), expected)


def test_gradients_equal_those_of_plain_batch_norm_on_each_group() -> None:
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
