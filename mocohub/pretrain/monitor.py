"""The kNN monitor of InstDisc and MoCo: how good the features are while training goes on."""

import torch
from torch import nn

from mocohub.features.extract import extract
from mocohub.probes.knn import KNNProbe
from mocohub.sources import ImageList


def knn_accuracy(
    backbone: nn.Module,
    bank: ImageList,
    queries: ImageList,
    *,
    k: int = 200,
    temperature: float = 0.1,
    device: torch.device | None = None,
    num_workers: int | None = None,
) -> float:
    """Top-1 accuracy, 0..1, of a weighted kNN vote of pooled features.

    Args:
        backbone: A timm model with its `pretrained_cfg`; evaluated in eval mode, left as it was.
        bank: Labelled images that vote.
        queries: Labelled images that are classified, by the names of their classes.
        k: Voters; all of a smaller bank.
        temperature: Of the weights exp(cosine / temperature).
        device: Where to compute; where the backbone is by default.
        num_workers: Processes that decode.
    """
    train, val = (
        extract(backbone, images, device=device, num_workers=num_workers, dtype="float32", progress=False)
        for images in (bank, queries)
    )
    probe = KNNProbe(k=min(k, len(train)), temperature=temperature, device=device).fit(
        train.values, train.targets
    )
    return float(probe.score(val.values, val.targets))
