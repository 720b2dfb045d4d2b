"""Batch norms of a frozen network drawn into the convolutions before them."""

from collections import OrderedDict
from collections.abc import Collection

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def foldable(model: nn.Module, *, keep: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return names of (convolution, batch norm) that were registered one after the other.

    That one feeds the other, and nothing else, is likely but not certain: compare the features.

    Args:
        model: The network.
        keep: Names of modules whose own outputs are wanted, which for a convolution folding would change.
    """
    pairs = []
    for name, parent in model.named_modules():
        children = list(parent.named_children())
        for (first, conv), (second, norm) in zip(children, children[1:], strict=False):
            names = (f"{name}.{first}".lstrip("."), f"{name}.{second}".lstrip("."))
            # Not isinstance: other subclasses may do anything to the weights.
            if type(conv) in _CONVOLUTIONS and type(norm) in _NORMS and names[0] not in keep:
                if norm.running_var is not None and conv.out_channels == norm.num_features:
                    pairs.append(names)
    return pairs


@torch.no_grad()
def fold(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Change `model` such that the convolutions do the work of the batch norms as well, as in eval mode.

    A batch norm gives s (x - mean) + bias with s = weight / sqrt(var + eps), hence the convolution before it
    takes s times its weights. In the place of the batch norm stays its activation, if it has one.
    """
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        weight = conv.weight * scale[:, None, None, None]  # (out, in, h, w)
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        act = OrderedDict(drop=norm.drop, act=norm.act) if isinstance(norm, BatchNormAct2d) else {}
        rest = nn.Sequential(act) if act else nn.Identity()  # these keep their names, for hooks
        model.set_submodule(norm_name, rest.eval())
