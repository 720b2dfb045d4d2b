"""The models of the MoCo papers, and one of ours: what trained them, what was published, where weights are.

A model and the recipe that trains it have one name. This file imports nothing heavy, so that listing the
zoo is instant.
"""

from dataclasses import dataclass
from pathlib import Path

_AUTHORS = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_LICENSE_UNCLEAR = (
    "The authors state no licence for the weights themselves: the LICENSE file of their repository is MIT, "
    "its README says CC-BY-NC 4.0."
)


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """One published or publishable model."""

    name: str
    backbone: str  # a key of mocohub.backbones.BACKBONES
    data: str
    epochs: int | None = None  # None where the paper counts steps
    steps: int | None = None
    linear_top1_pct: float | None  # as published: ImageNet-1k validation, linear probe on frozen features
    source: str  # of the published facts
    weights_url: str | None = None  # the authors' own file; None if they released none
    weights_md5: str | None = None  # its first eight hexadecimal digits, as the authors print them
    license: str | None = None  # what the authors say about these weights
    bundled: bool = False  # whether the weights are part of this package

    @property
    def bundled_folder(self) -> Path:
        """The exported folder of a bundled model: weights, config.json, mocohub.json and the card."""
        return Path(__file__).parent / "bundled" / self.name


ZOO = {
    model.name: model
    for model in (
        ZooModel(
            name="moco_r50_in1m",
            backbone="r50",
            data="ImageNet-1k",
            epochs=200,
            linear_top1_pct=60.6,
            source="arXiv 1911.05722, table 1",
            weights_url=f"{_AUTHORS}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
            weights_md5="b251726a",
            license=_LICENSE_UNCLEAR,
        ),
        ZooModel(
            name="mocov2_r50_in1m",
            backbone="r50",
            data="ImageNet-1k",
            epochs=200,
            linear_top1_pct=67.7,  # of the released file; arXiv 2003.04297, table 1 reports 67.5
            source="README of facebookresearch/moco",
            weights_url=f"{_AUTHORS}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
            weights_md5="59fd9945",
            license=_LICENSE_UNCLEAR,
        ),
        ZooModel(
            name="mocov2_r50_in1m_800ep",
            backbone="r50",
            data="ImageNet-1k",
            epochs=800,
            linear_top1_pct=71.1,
            source="arXiv 2003.04297, table 1",
            weights_url=f"{_AUTHORS}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
            weights_md5="a04e12f8",
            license=_LICENSE_UNCLEAR,
        ),
        ZooModel(
            name="moco_r50w2x_in1m",
            backbone="r50w2x",
            data="ImageNet-1k",
            epochs=200,
            linear_top1_pct=65.4,
            source="arXiv 1911.05722, table 1",
        ),
        ZooModel(
            name="moco_r50w4x_in1m",
            backbone="r50w4x",
            data="ImageNet-1k",
            epochs=200,
            linear_top1_pct=68.6,
            source="arXiv 1911.05722, table 1",
        ),
        ZooModel(
            name="moco_rx50_in1m",
            backbone="rx50",
            data="ImageNet-1k",
            epochs=200,
            linear_top1_pct=63.9,
            source="arXiv 1911.05722, table 1, as quoted by others; not checked against the paper itself",
        ),
        ZooModel(
            name="moco_r50_ig1b",
            backbone="r50",
            data="Instagram-1B",
            steps=1_250_000,
            linear_top1_pct=None,
            source="arXiv 1911.05722, section 4",
        ),
        ZooModel(
            name="moco_tiny_cifar10",
            backbone="r18tiny",
            data="CIFAR-10",
            epochs=40,
            linear_top1_pct=None,
            source="trained with this package; measured numbers are in its card",
            license="apache-2.0",
            bundled=True,
        ),
    )
}
