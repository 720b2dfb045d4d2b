"""Checkpoints in the layouts of other projects, from modules built as those projects build theirs.

The names of the tensors are those that `state_dict()` gives, not written by hand. Every writer takes the
query and the key encoder as torchvision ResNets with a linear `fc`, and returns what torch.save is given.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

Writer = Callable[[nn.Module, nn.Module], dict[str, Any]]
WRITERS: dict[str, Writer] = {}


def writer(name: str) -> Callable[[Writer], Writer]:
    return lambda function: WRITERS.setdefault(name, function)


def parts(**children: nn.Module | Tensor) -> nn.Module:
    """A module with these children and buffers."""
    module = nn.Module()
    for name, child in children.items():
        add = module.add_module if isinstance(child, nn.Module) else module.register_buffer
        add(name, child)
    return module


def wrapped(module: nn.Module) -> nn.Module:
    """What DistributedDataParallel makes of the names."""
    return parts(module=module)


def headless(resnet: nn.Module) -> nn.Module:
    resnet = copy.deepcopy(resnet)
    resnet.fc = nn.Identity()
    return resnet


def mlp(resnet: nn.Module, dim: int = 16) -> nn.Sequential:
    width = resnet.fc.in_features
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))


def with_head(resnet: nn.Module, head: nn.Module) -> nn.Module:
    resnet = copy.deepcopy(resnet)
    resnet.fc = head
    return resnet


def queue(dim: int = 16) -> dict[str, Tensor]:
    return {"queue": torch.zeros(dim, 64), "queue_ptr": torch.zeros(1).long()}


def sgd(module: nn.Module) -> dict[str, Any]:
    """An optimiser's state after a step."""
    optimizer = torch.optim.SGD(list(module.parameters())[:2], lr=0.03, momentum=0.9)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def moco(query: nn.Module, key: nn.Module) -> nn.Module:
    return parts(encoder_q=query, encoder_k=key, **queue())


@writer("official v1")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    model = wrapped(moco(query, key))
    return {"epoch": 200, "arch": "resnet50", "state_dict": model.state_dict(), "optimizer": sgd(model)}


@writer("official v2")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    model = wrapped(moco(with_head(query, mlp(query)), with_head(key, mlp(key))))
    return {"epoch": 800, "arch": "resnet50", "state_dict": model.state_dict(), "optimizer": sgd(model)}


@writer("official without module")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    return {"epoch": 200, "state_dict": moco(query, key).state_dict()}


@writer("official, the state alone")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    return dict(moco(query, key).state_dict())


@writer("official, compiled")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    return {"state_dict": wrapped(parts(_orig_mod=moco(query, key))).state_dict()}


@writer("moco-v3")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    def projector(resnet: nn.Module) -> nn.Sequential:
        width = resnet.fc.in_features
        first = [nn.Linear(width, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16, affine=False))

    predictor = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    model = parts(
        base_encoder=with_head(query, projector(query)),
        momentum_encoder=with_head(key, projector(key)),
        predictor=predictor,
    )
    state = {"state_dict": wrapped(model).state_dict(), "optimizer": sgd(model), "scaler": {"scale": 65536.0}}
    return {"epoch": 100, "arch": "resnet50", **state}


@writer("pycontrast")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    model = parts(encoder=headless(query), head=mlp(query))
    average = parts(encoder=headless(key), head=mlp(key))
    return {
        "opt": argparse.Namespace(method="MoCov2", lr=0.03, nce_t=np.float64(0.2), crop=[0.2, 1.0]),
        "model": wrapped(model).state_dict(),
        "contrast": {"memory": torch.zeros(64, 16)},
        "optimizer": sgd(model),
        "epoch": 200,
        "model_ema": average.state_dict(),
    }


@writer("vissl")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    def network(resnet: nn.Module) -> nn.Module:
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
        blocks = nn.ModuleDict({name: getattr(resnet, name) for name in names})
        heads = nn.ModuleList([parts(clf=mlp(resnet)[:2]), parts(clf=mlp(resnet)[2:])])
        return parts(trunk=parts(_feature_blocks=blocks), heads=heads)

    model = network(query)
    base_model = {
        "model": {"trunk": model.trunk.state_dict(), "heads": model.heads.state_dict()},
        "meta": {"trunk": {}, "heads": {}},
    }
    loss = parts(moco_encoder=network(key), **queue()).state_dict()
    state = {"base_model": base_model, "loss": loss, "optimizer": {"optim": sgd(model)}, "meters": []}
    return {
        "phase_idx": 199,
        "iteration": 1001000,
        "loss": 6.8,
        "type": "phase",
        "classy_state_dict": {"train": True, "train_phase_idx": 199, **state},
    }


@writer("mmselfsup 0.x")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    q, k = (nn.Sequential(headless(net), parts(mlp=mlp(net))) for net in (query, key))
    model = parts(encoder_q=q, encoder_k=k, backbone=q[0], neck=q[1], **queue())
    meta = {"mmselfsup_version": "0.9", "epoch": 200, "iter": 1001000, "config": "model = dict()"}
    return {"meta": meta, "state_dict": model.state_dict(), "optimizer": sgd(model)}


@writer("mmselfsup 1.x")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    average = nn.Sequential(headless(key), parts(mlp=mlp(key)))
    ema = parts(module=average, steps=torch.tensor(1001000))
    model = parts(backbone=headless(query), neck=parts(mlp=mlp(query)), encoder_k=ema, **queue())
    return {"meta": {"epoch": 200, "experiment_name": "mocov2"}, "state_dict": model.state_dict()}


@writer("solo-learn")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    model = parts(
        backbone=headless(query),
        classifier=nn.Linear(8, 10),
        momentum_backbone=headless(key),
        projector=mlp(query),
        momentum_projector=mlp(key),
        queue=torch.zeros(2, 16, 64),
        queue_ptr=torch.zeros(1).long(),
    )
    return lightning(model, num_large_crops=np.int64(2))


@writer("solo-learn before 1.0.3")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    model = parts(encoder=headless(query), momentum_encoder=headless(key), projector=mlp(query))
    return lightning(model)


@writer("lightly")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    head = parts(layers=mlp(query))
    model = parts(
        backbone=headless(query),
        projection_head=head,
        key_backbone=headless(key),
        key_projection_head=copy.deepcopy(head),
        online_classifier=parts(linear=nn.Linear(8, 10)),
    )
    return lightning(model, batch_size_per_device=32)


@writer("lightly, early")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    head = parts(layers=mlp(query))
    model = parts(
        backbone=headless(key),
        projection_head=copy.deepcopy(head),
        query_backbone=headless(query),
        query_projection_head=head,
    )
    return lightning(model)


@writer("lightly's example")
def _(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    model = parts(
        backbone=nn.Sequential(*list(query.children())[:-1]),
        projection_head=parts(layers=mlp(query)),
        backbone_momentum=nn.Sequential(*list(key.children())[:-1]),
        projection_head_momentum=parts(layers=mlp(key)),
    )
    return lightning(model)


def lightning(model: nn.Module, **hparams: Any) -> dict[str, Any]:
    return {
        "epoch": 99,
        "global_step": 500400,
        "pytorch-lightning_version": "2.1.3",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 100}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "last.ckpt"}},
        "optimizer_states": [sgd(model)],
        "lr_schedulers": [{"last_epoch": 500400}],
        "hparams_name": "kwargs",
        "hyper_parameters": hparams,
    }


class SplitBatchNorm(nn.BatchNorm2d):
    """The notebook's layer: as many statistics as plain batch norm, so the same names and shapes."""

    def __init__(self, num_features: int, num_splits: int = 8) -> None:
        super().__init__(num_features)
        self.num_splits = num_splits


class CifarResNet(nn.Module):
    """The notebook's network, a quarter as wide: the shape of r18tiny.

    It is torchvision's ResNet-18 as an nn.Sequential, with a 3x3 convolution of stride 1 for a stem.
    """

    def __init__(self, stem_chs: int = 16, dim: int = 16) -> None:
        super().__init__()
        resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=dim, norm_layer=SplitBatchNorm)
        resnet.inplanes = stem_chs
        resnet.conv1 = nn.Conv2d(3, stem_chs, 3, stride=1, padding=1, bias=False)
        resnet.bn1 = SplitBatchNorm(stem_chs)
        for n in range(4):
            layer = resnet._make_layer(BasicBlock, stem_chs << n, 2, stride=1 + (n > 0))
            setattr(resnet, f"layer{n + 1}", layer)
        resnet.fc = nn.Linear(stem_chs << 3, dim)
        layers = []
        for name, module in resnet.named_children():
            if name == "maxpool":
                continue
            layers += [nn.Flatten(1), module] if name == "fc" else [module]
        self.net = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.net[:-1](images)


def notebook(query: CifarResNet, key: CifarResNet) -> dict[str, Any]:
    model = moco(query, key)
    return {"epoch": 200, "state_dict": model.state_dict(), "optimizer": sgd(model)}
