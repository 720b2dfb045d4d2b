import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocohub.backbones import BACKBONES, backbone, create_backbone, pretrained_cfg


def torchvision_forward(w: dict[str, Tensor], x: Tensor, groups: int = 1, small_stem: bool = False) -> Tensor:
    """A ResNet v1.5 written out by hand on torchvision's names: images to pooled features."""

    def norm(x: Tensor, name: str) -> Tensor:
        entries = (f"{name}.{entry}" for entry in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *(w[entry] for entry in entries), eps=1e-5)

    x = F.conv2d(x, w["conv1.weight"], stride=1 if small_stem else 2, padding=1 if small_stem else 3)
    x = F.relu(norm(x, "bn1"))
    if not small_stem:
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage in range(1, 5):
        block = 0
        while (name := f"layer{stage}.{block}") + ".conv1.weight" in w:
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in w:
                shortcut = norm(
                    F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1"
                )
            if f"{name}.conv3.weight" in w:
                y = F.relu(norm(F.conv2d(x, w[f"{name}.conv1.weight"]), f"{name}.bn1"))
                y = F.conv2d(y, w[f"{name}.conv2.weight"], stride=stride, padding=1, groups=groups)
                y = norm(F.conv2d(F.relu(norm(y, f"{name}.bn2")), w[f"{name}.conv3.weight"]), f"{name}.bn3")
            else:
                y = F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)
                y = F.conv2d(F.relu(norm(y, f"{name}.bn1")), w[f"{name}.conv2.weight"], padding=1)
                y = norm(y, f"{name}.bn2")
            x = F.relu(y + shortcut)
            block += 1
    return x.mean((2, 3))


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename resnetv2 entries to torchvision's; those of timm's ResNet are torchvision's already."""

    def rename(name: str) -> str:
        name = name.replace("stem.conv", "conv1").replace("stem.norm", "bn1")
        name = name.replace("downsample.conv", "downsample.0").replace("downsample.norm", "downsample.1")
        name = re.sub(r"stages\.(\d)\.blocks\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}", name)
        return re.sub(r"\.norm(\d)", r".bn\1", name)

    return {rename(name): value for name, value in state.items()}


def randomise_statistics(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)


@pytest.mark.parametrize(
    ("name", "millions", "num_features"),
    [("r18", 11.177, 512), ("r50", 23.508, 2048), ("r50w2x", 93.907, 4096)]
    + [("r50w4x", 375.378, 8192), ("rx50", 45.973, 2048), ("r18cifar", 11.169, 512)],
)
def test_parameter_counts_without_classifier_are_the_papers(
    name: str, millions: float, num_features: int
) -> None:
    with torch.device("meta"):
        net = create_backbone(name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    assert net.num_features == backbone(name).num_features == num_features
    assert net.num_classes == 0


@pytest.mark.parametrize(
    ("name", "extra", "groups", "small_stem"),
    [
        ("r18", {}, 1, False),
        ("r50", {}, 1, False),
        ("rx50", {}, 32, False),
        ("r50w2x", {"layers": (1, 2, 1, 1)}, 1, False),
        ("r50w4x", {"layers": (1, 1, 1, 1)}, 1, False),
        ("r18cifar", {}, 1, True),
        ("r18tiny", {}, 1, True),
    ],
)
def test_each_equals_a_hand_written_torchvision_network_on_the_same_weights(
    name: str, extra: dict, groups: int, small_stem: bool
) -> None:
    torch.manual_seed(0)
    net = create_backbone(name, **extra).eval()
    randomise_statistics(net)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = torchvision_forward(torchvision_names(net.state_dict()), images, groups, small_stem)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["r50", "r50w2x", "r18tiny"])
def test_weights_start_as_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    extra = {} if name == "r18tiny" else {"layers": (1, 1, 1, 1)}
    for module in create_backbone(name, **extra).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_preprocessing_is_the_papers() -> None:
    net = create_backbone("r18")
    net.pretrained_cfg = pretrained_cfg("r18")
    config = timm.data.resolve_model_data_config(net)
    assert tuple(config["input_size"]) == (3, 224, 224)
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.875)
    assert tuple(config["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(config["std"]) == (0.229, 0.224, 0.225)


def test_every_first_convolution_and_classifier_is_named_as_timm_needs_it() -> None:
    for name, spec in BACKBONES.items():
        with torch.device("meta"):
            net = timm.create_model(spec.architecture, num_classes=3, **spec.model_args)
        assert net.get_submodule(spec.first_conv).in_channels == 3, name
        assert net.get_submodule(spec.classifier).weight.shape[0] == 3, name


def test_small_image_stages_report_their_true_strides() -> None:
    net = timm.create_model("resnet18_cifar", features_only=True)
    for level, reduction in zip(net(torch.randn(1, 3, 32, 32)), net.feature_info.reduction(), strict=True):
        assert level.shape[-1] == 32 // reduction


def test_an_unknown_backbone_is_answered_with_the_closest_first() -> None:
    with pytest.raises(ValueError, match="Unknown backbone 'r50w2'. Choose one of: r50w2x, "):
        create_backbone("r50w2")


@pytest.mark.parametrize("imports", ["import mocohub, timm", "import timm, mocohub"])
def test_importing_mocohub_makes_its_networks_known_to_timm_in_either_order(imports: str) -> None:
    code = f"{imports}; import json, sys; print(json.dumps([timm.is_model('resnet18_cifar'), timm.__name__]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [True, "timm"]


def test_importing_mocohub_alone_imports_neither_torch_nor_timm() -> None:
    code = "import mocohub, importlib.util, sys; importlib.util.find_spec('timm')"
    code += "; print({'torch', 'timm'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
