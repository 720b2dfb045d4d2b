"""The networks MoCo trains, each as a timm architecture with the arguments that shape it.

This is the only place that says what `r50` or `r50w2x` is. Everything but the two small-image networks is
stock timm, so a published folder loads wherever timm does; those two need `import mocohub` first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from mocohub.errors import unknown


@dataclass(frozen=True)
class Backbone:
    """One network: how timm builds it and how wide its features are."""

    architecture: str
    num_features: int
    model_args: Mapping[str, Any] = field(default_factory=dict)
    first_conv: str = "conv1"
    classifier: str = "fc"


BACKBONES = {
    "r18": Backbone("resnet18", 512),
    "r50": Backbone("resnet50", 2048),
    # 2x and 4x wider everywhere, stem included (arXiv 1911.05722, Table 1). `wide_resnet50_2` is another
    # network (only its 3x3 convolutions are wider), and timm's `resnet50` cannot widen its stem.
    "r50w2x": Backbone(
        "resnetv2_50",
        4096,
        {"preact": False, "width_factor": 2},
        first_conv="stem.conv",
        classifier="head.fc",
    ),
    "r50w4x": Backbone(
        "resnetv2_50",
        8192,
        {"preact": False, "width_factor": 4},
        first_conv="stem.conv",
        classifier="head.fc",
    ),
    "rx50": Backbone("resnext50_32x4d", 2048, {"base_width": 8}),
    # For 32 to 64 px images: the ResNet-18 of the CIFAR literature, and an eighth of it for CPUs.
    "r18cifar": Backbone("resnet18_cifar", 512),
    "r18tiny": Backbone("resnet18_cifar", 128, {"stem_chs": 16, "channels": [16, 32, 64, 128]}),
}


def backbone(name: str) -> Backbone:
    """Look a backbone up by name.

    Raises:
        ValueError: If there is none of that name; the message lists all, the closest first.
    """
    if name not in BACKBONES:
        raise unknown("backbone", name, BACKBONES)
    return BACKBONES[name]


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Return an untrained timm model without classifier, initialised as torchvision initialises it.

    Convolutions are He-normal (fan-out), batch-norm weights 1 and biases 0. Unlike timm's default the last
    batch norm of a residual branch is not zeroed, since MoCo v1 and v2 were trained without that.

    Args:
        name: A key of `BACKBONES`.
        **kwargs: Passed to `timm.create_model`, for instance `in_chans`, or what reshapes the network.

    Returns:
        A module from images (N, 3, H, W) to pooled features (N, num_features).
    """
    spec = backbone(name)
    args = {"num_classes": 0, "zero_init_last": False, **spec.model_args, **kwargs}
    return timm.create_model(spec.architecture, **args)


def pretrained_cfg(
    name: str,
    *,
    crop_px: int = 224,
    crop_pct: float = 0.875,
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
) -> dict[str, Any]:
    """Return the preprocessing of a MoCo model in timm's terms; the defaults are the paper's.

    Args:
        name: A key of `BACKBONES`.
        crop_px: Side of the square the network sees.
        crop_pct: `crop_px` / the length to which the image's shorter side is resized first.
        mean: Per-channel mean of RGB values in 0..1.
        std: Per-channel standard deviation likewise.
    """
    spec = backbone(name)
    return {
        "input_size": [3, crop_px, crop_px],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "first_conv": spec.first_conv,
        "classifier": spec.classifier,
    }


default_cfgs = generate_default_cfgs(
    {"resnet18_cifar.untrained": pretrained_cfg("r18cifar", crop_px=32, crop_pct=1.0)}
)


class SmallImageResNet(ResNet):
    """A ResNet whose stem keeps the resolution: one 3x3 convolution of stride 1 and no max-pool."""

    def __init__(self, *args: Any, stem_chs: int = 64, in_chans: int = 3, **kwargs: Any) -> None:
        """Build timm's ResNet and exchange its stem.

        Args:
            *args: As for timm's ResNet.
            stem_chs: Channels of the stem (even).
            in_chans: Channels of the image.
            **kwargs: As for timm's ResNet.
        """
        # timm takes the stem's width from `stem_width` only for deep stems, whose convolutions we replace.
        super().__init__(*args, in_chans=in_chans, stem_type="deep", stem_width=stem_chs // 2, **kwargs)
        like = self.bn1.weight
        self.conv1 = nn.Conv2d(
            in_chans, stem_chs, 3, padding=1, bias=False, device=like.device, dtype=like.dtype
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for 32 to 64 px images, as the CIFAR literature uses it; timm knows it by this name."""
    kwargs = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(SmallImageResNet, "resnet18_cifar", pretrained, **kwargs)
