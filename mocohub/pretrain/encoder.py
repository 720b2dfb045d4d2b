"""The network that is trained: a timm backbone, a projection head, and unit length."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Images (N, 3, H, W), normalised, to embeddings (N, C) of unit length."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        """Join the parts.

        Args:
            backbone: A timm model without classifier, (N, 3, H, W) to (N, num_features).
            head: (N, num_features) to (N, C), see `projection_head`.
        """
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Embed images; under bfloat16 autocast too the embeddings are float32."""
        z = self.head(self.backbone(images))
        return F.normalize(z.float() if z.dtype == torch.bfloat16 else z, dim=1)


def projection_head(kind: str, num_features: int, embed_dim: int = 128) -> nn.Module:
    """Return the layer(s) after the pooled features: "linear" (v1) or "mlp" (v2, arXiv 2003.04297)."""
    if kind == "linear":
        return nn.Linear(num_features, embed_dim)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, embed_dim)
        )
    raise ValueError(f"Unknown head '{kind}'. Choose linear (MoCo v1) or mlp (MoCo v2).")
