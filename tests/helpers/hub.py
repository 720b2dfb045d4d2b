"""Tiny runs and official checkpoints; the Hub on the loopback is in `helpers.hub_server`."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from helpers.hub_server import Fault, HubServer
from mocohub.backbones import BACKBONES
from mocohub.files import sha256, write_json

__all__ = ["Fault", "HubServer"]  # for those who import all of this from one place

# The shapes of r50 and r50w2x at a depth and width for tests: as (backbone, model_args of a recipe).
TINY_R50 = ("r50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]})
TINY_WIDE = ("r50w2x", {"layers": [1, 1, 1, 1], "stem_chs": 4, "channels": [16, 32, 64, 128]})


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give a model weights and batch-norm statistics under which every tensor matters; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(seed + 100)
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0, 0.1, generator=generator)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return model.eval()


def images(px: int = 32, num_images: int = 2) -> Tensor:
    return torch.randn(num_images, 3, px, px, generator=torch.Generator().manual_seed(0))


def write_run(
    run: Path,
    backbone: str = "r18tiny",
    model_args: dict[str, Any] | None = None,
    steps: tuple[int, ...] = (20,),
) -> dict[tuple[int, str], nn.Module]:
    """Write a training run; returns the backbone of each (step, encoder) as the reference."""
    spec = BACKBONES[backbone]
    recipe = {
        "backbone": backbone,
        "model_args": model_args or {},
        "head": "mlp",
        "embed_dim": 16,
        "queue_size": 64,
        "augmentation": {"crop_scale_min": 0.2, "blur_probability": 0.5},
        "crop_px": 32,
        "eval_crop_pct": 1.0,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "epochs": 4,
    }
    models = {}
    for step in steps:
        tensors = {"queue": torch.zeros(64, 16)}
        for seed, encoder in enumerate(("query", "key")):
            model = timm.create_model(
                spec.architecture, num_classes=0, **{**spec.model_args, **(model_args or {})}
            )
            models[step, encoder] = randomise(model, 10 * step + seed)
            tensors |= {f"{encoder}.backbone.{name}": t for name, t in model.state_dict().items()}
            tensors[f"{encoder}.head.0.weight"] = torch.zeros(16, 16)
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "state.safetensors")
        state = {
            "format": "mocohub-checkpoint/1",
            "step": step,
            "epoch": 1,
            "recipe_name": "moco_tiny",
            "recipe": recipe,
            "num_images_seen": step * 8,
            "sha256": {"state.safetensors": sha256(folder / "state.safetensors")},
        }
        write_json(folder / "state.json", state)
    meta = {
        "format": "mocohub-run/1",
        "recipe_name": "moco_tiny",
        "recipe": recipe,
        "data": {
            "source": "/home/somebody/private/flowers",
            "num_images": 64,
            "classes": ["a", "b"],
            "paths_sha256": "0" * 64,
        },
        "versions": {"mocohub": "0.1", "torch": "2.15", "timm": "1.0.31", "python": "3.11"},
        "commit": "c0ffee",
        "started": "2026-01-02T03:04:05+00:00",
    }
    write_json(run / "run.json", meta)
    return models


class TorchvisionResNet(ResNet):
    """torchvision's ResNet-50 at any width, stem included, one block a stage: an independent reference."""

    def __init__(self, stem_chs: int, planes: tuple[int, int, int, int], dim: int = 16) -> None:
        nn.Module.__init__(self)
        self._norm_layer, self.inplanes, self.dilation, self.groups, self.base_width = (
            nn.BatchNorm2d,
            stem_chs,
            1,
            1,
            64,
        )
        self.conv1 = nn.Conv2d(3, stem_chs, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, width in enumerate(planes, start=1):
            layer = self._make_layer(Bottleneck, width, 1, stride=1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * planes[-1], dim)


def write_official(
    path: Path,
    query: nn.Module,
    key: nn.Module,
    *,
    prefix: str = "module.",
    mlp: bool = False,
    zip_format: bool = True,
) -> None:
    """Save what facebookresearch/moco's main_moco.py saves at the end of an epoch."""
    dim, features = query.fc.weight.shape
    state_dict = {f"{prefix}queue": torch.zeros(dim, 64), f"{prefix}queue_ptr": torch.zeros(1).long()}
    for letter, model in (("q", query), ("k", key)):
        tensors = dict(model.state_dict())
        if mlp:
            tensors |= {f"fc.2.{name}": tensors.pop(f"fc.{name}") for name in ("weight", "bias")}
            tensors |= {"fc.0.weight": torch.zeros(features, features), "fc.0.bias": torch.zeros(features)}
        state_dict |= {f"{prefix}encoder_{letter}.{name}": t for name, t in tensors.items()}
    optimizer = {
        "state": {0: {"momentum_buffer": torch.zeros(3)}},
        "param_groups": [{"lr": 0.03, "params": [0]}],
    }
    checkpoint = {"epoch": 200, "arch": "resnet50", "state_dict": state_dict, "optimizer": optimizer}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zip_format)
