"""The models of the MoCo papers, and one of ours: what trained them, what was published, where weights are.

A model and the recipe that trains it have one name. This file imports nothing heavy, so that listing the
zoo is instant.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_AUTHORS = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_LICENSE_UNCLEAR = (
    "The authors state no licence for the weights themselves: the LICENSE file of their repository is MIT, "
    "its README says CC-BY-NC 4.0."
)
# Of each network: its name in the papers, parameters and features without a classifier.
_NETWORKS = {
    "r50": ("ResNet-50", 23_508_032, 2048),
    "r50w2x": ("ResNet-50, 2x wide", 93_907_072, 4096),
    "r50w4x": ("ResNet-50, 4x wide", 375_378_176, 8192),
    "rx50": ("ResNeXt-50 32x8d", 45_972_800, 2048),
    "r18tiny": ("ResNet-18, 1/4 wide", 700_176, 128),
}


@dataclass(frozen=True)
class Published:
    """A number its authors printed; several metrics of one task stand in one row, as in their tables."""

    task: str
    metric: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """One published or publishable model."""

    name: str
    backbone: str  # a key of mocohub.backbones.BACKBONES
    method: str = "MoCo v1"
    data: str = "ImageNet-1k"
    epochs: int | None = None  # None where the paper counts steps
    steps: int | None = None
    linear_top1_pct: float | None  # as published: ImageNet-1k validation, linear probe on frozen features
    source: str  # of that number, or of the recipe
    transfers: tuple[Published, ...] = ()  # other published numbers, each with its source
    cost: str  # of training it
    weights_url: str | None = None  # the authors' own file; None if they released none
    weights_md5: str | None = None  # its first eight hexadecimal digits, as the authors print them
    license: str | None = None  # what the authors say about these weights
    bundled: bool = False  # whether the weights are part of this package

    @property
    def weights(self) -> Literal["bundled", "authors", "none"]:
        """Whether weights come with this package, from the authors, or nobody has published any."""
        return "bundled" if self.bundled else "authors" if self.weights_url else "none"

    @property
    def bundled_folder(self) -> Path:
        """The exported folder of a bundled model: weights, config.json, mocohub.json and the card."""
        return Path(__file__).parent / "bundled" / self.name

    @property
    def repository(self) -> str:
        """Where the Hub has this model, if it has: in the namespace `mocohub`, or MOCOHUB_NAMESPACE."""
        return f"{os.environ.get('MOCOHUB_NAMESPACE', 'mocohub')}/{self.name}"

    @property
    def network(self) -> str:
        """The backbone's name in the papers."""
        return _NETWORKS[self.backbone][0]

    @property
    def num_parameters(self) -> int:
        """Of the backbone, without classifier and projection head."""
        return _NETWORKS[self.backbone][1]

    @property
    def num_features(self) -> int:
        """Length of a pooled feature vector."""
        return _NETWORKS[self.backbone][2]

    @property
    def length(self) -> str:
        """How long it is trained."""
        return f"{self.epochs} epochs" if self.epochs else f"{self.steps:,} steps"

    @property
    def summary(self) -> str:
        """Method, network, data and length in one line."""
        return f"{self.method}, {self.network}, {self.data}, {self.length}"

    @property
    def published(self) -> tuple[Published, ...]:
        """Every number its authors printed, the linear probe first."""
        linear = "ImageNet-1k, linear probe on frozen features"
        top1 = [Published(linear, "top-1 (%)", str(self.linear_top1_pct), self.source)]
        return (*(top1 if self.linear_top1_pct is not None else []), *self.transfers)


def _of_v1(data: Literal["ImageNet-1k", "Instagram-1B"]) -> tuple[Published, ...]:
    """What arXiv 1911.05722 prints for a ResNet-50 fine-tuned from MoCo."""
    voc, coco = "AP50 / AP / AP75", "box AP / mask AP"
    rows = (  # task, metric, place in the paper, trained on ImageNet-1k, on Instagram-1B
        ("VOC detection, C4, 07+12", voc, "table 2", "81.5 / 55.9 / 62.6", "82.2 / 57.2 / 63.7"),
        ("VOC detection, dilated C5, 07+12", voc, "table 2", "81.1 / 54.6 / 59.9", "81.6 / 55.5 / 61.2"),
        ("VOC detection, C4, 07", voc, "table 4", "74.9 / 46.6 / 50.1", "75.6 / 47.6 / 51.7"),
        ("COCO Mask R-CNN, FPN, 1x", coco, "table 5", "38.5 / 35.1", "38.9 / 35.4"),
        ("COCO Mask R-CNN, FPN, 2x", coco, "table 5", "40.8 / 36.9", "41.1 / 37.4"),
        ("COCO Mask R-CNN, C4, 1x", coco, "table 5", "38.5 / 33.6", "39.1 / 34.1"),
        ("COCO Mask R-CNN, C4, 2x", coco, "table 5", "40.7 / 35.4", "41.1 / 35.6"),
        ("COCO keypoints", "AP", "table 6", "66.8", "66.9"),
        ("COCO DensePose", "AP", "table 6", "50.1", "50.6"),
        ("LVIS v0.5 masks", "AP", "table 6", "24.1", "24.9"),
        ("Cityscapes instances", "AP", "table 6", "32.3", "32.9"),
        ("Cityscapes semantic segmentation", "mIoU", "table 6", "75.3", "75.5"),
        ("VOC semantic segmentation", "mIoU", "table 6", "72.5", "73.6"),
        ("iNaturalist 2018, fine-tuned", "top-1 (%)", "appendix A.6", "65.6", "65.8"),
        ("ImageNet-1k, fine-tuned", "top-1 (%)", "appendix A.7", "77.0", "77.3"),
    )
    of_instagram = data == "Instagram-1B"
    return tuple(
        Published(task, metric, instagram if of_instagram else imagenet, f"arXiv 1911.05722, {place}")
        for task, metric, place, imagenet, instagram in rows
    )


def _of_v2(voc: str) -> tuple[Published, ...]:
    """What is printed for detection from MoCo v2, a mean of five runs."""
    source = "arXiv 2003.04297, table 1; detection/README of facebookresearch/moco"
    return (Published("VOC detection, C4, 07+12", "AP50 / AP / AP75", voc, source),)


ZOO = {
    model.name: model
    for model in (
        ZooModel(
            name="moco_r50_in1m",
            backbone="r50",
            epochs=200,
            linear_top1_pct=60.6,
            source="arXiv 1911.05722, table 1",
            transfers=_of_v1("ImageNet-1k"),
            cost="about 53 h on 8 V100 (published)",
            weights_url=f"{_AUTHORS}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
            weights_md5="b251726a",
            license=_LICENSE_UNCLEAR,
        ),
        ZooModel(
            name="mocov2_r50_in1m",
            backbone="r50",
            method="MoCo v2",
            epochs=200,
            linear_top1_pct=67.7,
            source="README of facebookresearch/moco, for the released file; the paper's table 1 says 67.5",
            transfers=_of_v2("82.4 / 57.0 / 63.6"),
            cost="about 53 h on 8 V100 (published)",
            weights_url=f"{_AUTHORS}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
            weights_md5="59fd9945",
            license=_LICENSE_UNCLEAR,
        ),
        ZooModel(
            name="mocov2_r50_in1m_800ep",
            backbone="r50",
            method="MoCo v2",
            epochs=800,
            linear_top1_pct=71.1,
            source="arXiv 2003.04297, table 1",
            transfers=_of_v2("82.5 / 57.4 / 64.0"),
            cost="four times that of 200 epochs, some 210 h on 8 V100 (estimated)",
            weights_url=f"{_AUTHORS}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
            weights_md5="a04e12f8",
            license=_LICENSE_UNCLEAR,
        ),
        ZooModel(
            name="moco_r50w2x_in1m",
            backbone="r50w2x",
            epochs=200,
            linear_top1_pct=65.4,
            source="arXiv 1911.05722, table 1",
            cost="about 4 times that of R50, some 210 h on 8 V100 (estimated)",
        ),
        ZooModel(
            name="moco_r50w4x_in1m",
            backbone="r50w4x",
            epochs=200,
            linear_top1_pct=68.6,
            source="arXiv 1911.05722, table 1",
            cost="about 16 times that of R50, some 850 h on 8 V100 (estimated)",
        ),
        ZooModel(
            name="moco_rx50_in1m",
            backbone="rx50",
            epochs=200,
            linear_top1_pct=63.9,
            source="arXiv 1911.05722, table 1, as quoted by others; not checked against the paper itself",
            cost="about twice that of R50, some 110 h on 8 V100 (estimated)",
        ),
        ZooModel(
            name="moco_r50_ig1b",
            backbone="r50",
            data="Instagram-1B",
            steps=1_250_000,
            linear_top1_pct=None,
            source="arXiv 1911.05722, section 4",
            transfers=_of_v1("Instagram-1B"),
            cost="about 6 days on 64 GPUs (published), and images that were never released",
        ),
        ZooModel(
            name="moco_tiny_cifar10",
            backbone="r18tiny",
            method="MoCo",
            data="CIFAR-10",
            epochs=40,
            linear_top1_pct=None,
            source="trained with this package; measured numbers are in its card",
            cost="about 100 minutes on 2 CPU cores (measured)",
            license="apache-2.0",
            bundled=True,
        ),
    )
}
