"""ResNets by their tensors: which network has these shapes, and what torchvision and timm call each."""

import re
from collections.abc import Mapping
from typing import Any

from mocohub.backbones import BACKBONES

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def detect(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Tell a ResNet from the shapes of its tensors.

    Args:
        shapes: Of all tensors but the classifier's, by torchvision's names.

    Returns:
        The key of BACKBONES that it is or of which it is a variant, and timm's complete arguments.

    Raises:
        ValueError: If it is a ResNet that no timm model computes.
        LookupError, ZeroDivisionError: If the shapes are not those of a ResNet.
    """
    layers = [len({name.split(".")[1] for name in shapes if name.startswith(f"{s}.")}) for s in _STAGES]
    stem_chs, stem_px = shapes["conv1.weight"][0], shapes["conv1.weight"][3]
    if stem_px not in (3, 7):
        raise ValueError(f"its stem is {stem_px}x{stem_px}; ResNets have 7x7, or 3x3 for small images")
    if "layer1.0.conv3.weight" not in shapes:  # two convolutions in a block
        planes = [shapes[f"{stage}.0.conv2.weight"][0] for stage in _STAGES]
        args: dict[str, Any] = {}
        name, usual = "r18", {"layers": [2, 2, 2, 2]}  # `usual`: what timm assumes unless told otherwise
        if stem_px == 3:
            name, args["stem_chs"] = "r18cifar", stem_chs
            usual["stem_chs"] = 64
        elif stem_chs != 64:
            raise ValueError(f"its stem is {stem_chs} wide, and with blocks of two convolutions timm's is 64")
    else:
        if stem_px == 3:
            raise ValueError("it has a 3x3 stem for small images and blocks of three convolutions")
        planes = [shapes[f"{stage}.0.conv3.weight"][0] // 4 for stage in _STAGES]
        width, group_width = shapes["layer1.0.conv2.weight"][:2]
        cardinality, base_width = width // group_width, 64 * group_width // planes[0]
        usual = {"layers": [3, 4, 6, 3]}
        if cardinality > 1:
            name, usual = "rx50", usual | {"cardinality": 32, "base_width": 4}
            args = {"cardinality": cardinality, "base_width": base_width}
        elif stem_chs == 64:
            name, usual, args = "r50", usual | {"base_width": 64}, {"base_width": base_width}
        else:  # another stem than 64 wide, which only ResNetV2 can have
            name, args = "r50w2x", {"preact": False}
            factor = stem_chs // 64
            if [stem_chs, *planes] == [64 * factor, 64 * factor, 128 * factor, 256 * factor, 512 * factor]:
                planes, args["width_factor"] = [p // factor for p in planes], factor
            else:
                planes, args["stem_chs"] = [4 * p for p in planes], stem_chs  # timm counts the block's output
                usual["channels"] = [256, 512, 1024, 2048]
    args |= {"layers": layers, "channels": planes}
    usual.setdefault("channels", [64, 128, 256, 512])
    args = {key: value for key, value in args.items() if usual.get(key) != value}
    architecture = BACKBONES[name].architecture
    for known, spec in BACKBONES.items():
        if (spec.architecture, dict(spec.model_args)) == (architecture, args):
            return known, args
    return name, args


def resnetv2_name(name: str) -> str:
    """Name of a torchvision ResNet's tensor in timm's post-activation ResNetV2, which can widen its stem.

    >>> resnetv2_name("layer2.0.downsample.1.weight"), resnetv2_name("bn1.running_mean")
    ('stages.1.blocks.0.downsample.norm.weight', 'stem.norm.running_mean')
    """
    name = re.sub(r"^conv1\.", "stem.conv.", name)
    name = re.sub(r"^bn1\.", "stem.norm.", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", name)
    name = re.sub(r"\.bn(\d)\.", r".norm\1.", name)
    return name.replace(".downsample.0.", ".downsample.conv.").replace(".downsample.1.", ".downsample.norm.")


def torchvision_name(name: str) -> str:
    """The inverse of `resnetv2_name`; names that are torchvision's already stay as they are.

    >>> torchvision_name("stages.1.blocks.0.norm2.bias")
    'layer2.0.bn2.bias'
    """
    name = name.replace(".downsample.conv.", ".downsample.0.").replace(".downsample.norm.", ".downsample.1.")
    name = re.sub(r"\.norm(\d)\.", r".bn\1.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
    return re.sub(r"^stem\.conv\.", "conv1.", re.sub(r"^stem\.norm\.", "bn1.", name))


def sequential_names(names: list[str]) -> dict[str, str]:
    """Torchvision's names for a ResNet whose parts stand in an nn.Sequential, by their numbers in it.

    Args:
        names: Of all its tensors; `0.weight` is the first convolution's, `1.weight` its batch norm's.

    Returns:
        By old name; what comes after the four stages becomes `fc`.

    >>> sequential_names(["0.weight", "4.0.conv1.weight", "5.0.bn1.bias", "9.bias"])["5.0.bn1.bias"]
    'layer2.0.bn1.bias'
    """
    stages = sorted({int(m[1]) for name in names if (m := re.match(r"(\d+)\.\d+\.[a-z]", name))})
    parts = {0: "conv1", 1: "bn1"} | {n: f"layer{i}" for i, n in enumerate(stages, start=1)}
    renamed = {}
    for name in names:
        number, _, rest = name.partition(".")
        after = number.isdecimal() and bool(stages) and int(number) > stages[-1]
        part = "fc" if after else parts.get(int(number), number) if number.isdecimal() else number
        renamed[name] = f"{part}.{rest}"
    return renamed
