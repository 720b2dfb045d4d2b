"""The projection head of a pre-trained encoder, which makes the embedding that the contrastive loss compares.

It is left behind after pre-training; `mocohub.load(..., head=True)` keeps it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTRASTIVE = "contrastive"  # its name in the backbone, and that of the column of features


class ContrastiveHead(nn.Module):
    """Pooled features (N, num_features) to embeddings (N, C) of unit length: q or k of arXiv 1911.05722.

    One layer is the head of MoCo v1, two with a ReLU between them that of v2 (arXiv 2003.04297).
    """

    def __init__(self, *layers: nn.Linear) -> None:
        """Join the layers."""
        super().__init__()
        self.layers = nn.Sequential(layers[0])
        for layer in layers[1:]:
            self.layers += nn.Sequential(nn.ReLU(), layer)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features; under bfloat16 autocast too the embeddings are float32."""
        z = self.layers(features)
        return F.normalize(z.float() if z.dtype == torch.bfloat16 else z, dim=1)


def head_of(tensors: Mapping[str, Tensor], num_features: int, source: str | Path) -> ContrastiveHead:
    """Return the head that has these very tensors.

    Args:
        tensors: Weights and biases of one or two linear layers, named in their order.
        num_features: Of the backbone.
        source: Where they are from, for errors.

    Raises:
        ValueError: If they are not those of such a head.
    """
    names = sorted(tensors, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    weights = [name for name in names if name.endswith("weight") and tensors[name].ndim == 2]
    biases = [name.removesuffix("weight") + "bias" for name in weights]
    widths = [num_features, *(len(tensors[name]) for name in weights)]
    fits = [tensors[name].shape[1] for name in weights] == widths[:-1]
    for name, width in zip(biases, widths[1:], strict=True):
        fits = fits and (name not in tensors or tensors[name].shape == (width,))
    fits = fits and all(tensor.is_floating_point() for tensor in tensors.values())
    if not 1 <= len(weights) <= 2 or set(names) - {*weights, *biases} or not fits:
        shapes = {name: tuple(tensors[name].shape) for name in names[:8]}
        raise ValueError(
            f"The projection head in '{source}' is none of MoCo v1 or v2, which are one linear layer or two "
            f"after {num_features} features: {shapes}. Omit head=True, and the layer '{CONTRASTIVE}'."
        )
    layers = []
    for weight, bias in zip(weights, biases, strict=True):
        num_out, num_in = tensors[weight].shape
        layer = nn.Linear(num_in, num_out, bias=bias in tensors, device="meta")
        layer.load_state_dict(
            {"weight": tensors[weight], **({"bias": tensors[bias]} if bias in tensors else {})}, assign=True
        )
        layers.append(layer)
    return ContrastiveHead(*layers)
