"""Speed of a paper's linear protocol beside the usual script, and of a grid of heads beside one head.

    python benchmarks/linear_protocol.py [--model resnet50] [--data FOLDER] [--device cuda]

- protocol: `linear_protocol` under "moco", against a plain script of the same protocol: ImageFolder with
  torchvision's transforms, a DataLoader with a worker for each core, the timm model in eval mode in float32,
  nn.Linear and torch.optim.SGD. Also with our backbone in float32, so that one sees what bfloat16 brings.
- grid: the same under "dinov2" at the same batch, 13 classifiers at once / one. Goal 1.1.

Speeds are training images/s. Ours is of the second and third epoch of a call (their log lines' times: what a
call costs once is left out), the script's of its second and third epoch. All take turns, round after round;
printed are medians with smallest and largest. Images are JPEGs of 500 x 375 px made here, or FOLDER with a
sub-folder for each class.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import timm
import torch
import tyro
from loader import write_photos
from machine import machine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mocohub.distributed import num_cpus
from mocohub.evaluation.linear import linear_protocol
from mocohub.evaluation.linear_run import LinearRun
from mocohub.evaluation.protocols import protocol_by_name
from mocohub.features.model import data_config
from mocohub.sources import list_images

_EPOCHS = 3


def script(model: nn.Module, data: Path, batch_size: int, device: str) -> list[float]:
    """Train as most people's scripts do; return when each epoch ended."""
    config = data_config(model)
    px = config["input_size"][-1]
    steps = [transforms.RandomResizedCrop(px), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(
        str(data), transforms.Compose([*steps, transforms.Normalize(config["mean"], config["std"])])
    )
    batches = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=num_cpus(),
        pin_memory=device == "cuda",
        persistent_workers=True,
    )
    model = model.eval().to(device)
    fc = nn.Linear(model.num_features, len(images.classes)).to(device)
    nn.init.normal_(fc.weight, std=0.01)
    optimizer = torch.optim.SGD(fc.parameters(), lr=30 * batch_size / 256, momentum=0.9)
    ends = []
    for _ in range(_EPOCHS):
        for pixels, labels in batches:
            with torch.no_grad():
                features = model(pixels.to(device, non_blocking=True))
            loss = F.cross_entropy(fc(features), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # they print it
        ends.append(time.perf_counter())
    return ends


def ours(
    model: nn.Module, data: Path, batch_size: int, device: str, name: str, precision: str, out: Path
) -> list[float]:
    """Train by `linear_protocol`; return when each epoch ended."""
    ends, log = [], LinearRun.log

    def noting(self: LinearRun, *arguments: object) -> None:
        log(self, *arguments)
        ends.append(time.perf_counter())

    LinearRun.log = noting
    try:
        images = list_images(data)
        few = images.subset(range(0, len(images), max(1, len(images) // 8)))  # training alone is measured
        protocol = replace(protocol_by_name(name, epochs=_EPOCHS), global_batch_size=batch_size)
        linear_protocol(model, images, few, out=out, protocol=protocol, device=device, precision=precision)
    finally:
        LinearRun.log = log
    return ends


def main(
    model: Annotated[str, tyro.conf.arg(help="timm's name.")] = "resnet50",
    data: Annotated[Path | None, tyro.conf.arg(help="Images in a folder for each class.")] = None,
    num_images: Annotated[int, tyro.conf.arg(help="Images that are made here.")] = 512,
    batch_size: Annotated[int, tyro.conf.arg(help="Images in a step.")] = 64,
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds.")] = 3,
    device: Annotated[str, tyro.conf.arg(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print images/s, the median with smallest and largest, and the median ratios of single rounds."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder, "photos")
            for name in "ab":
                (data / name).mkdir(parents=True)
                write_photos(data / name, num_images // 2)
        count = len(list_images(data))
        print(f"{machine(device)}; {model}, n = {count}, batches of {batch_size}, {rounds} rounds")
        network = timm.create_model(model, num_classes=0)
        arguments = (network, data, batch_size, device)

        def run(name: str, precision: str) -> Callable[[], list[float]]:
            return lambda: ours(*arguments, name, precision, Path(tempfile.mkdtemp(dir=folder), "run"))

        ways: dict[str, Callable[[], list[float]]] = {
            "usual script": lambda: script(*arguments),
            "moco, float32": run("moco", "float32"),
            "moco": run("moco", "auto"),
            "dinov2": run("dinov2", "auto"),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, train in ways.items():
                ends = train()
                speeds[way].append((_EPOCHS - 1) * count / (ends[-1] - ends[0]))
    for way, found in speeds.items():
        print(f"{way:<16}{statistics.median(found):9.1f} images/s ({min(found):.1f} to {max(found):.1f})")
    for above, below in (("moco", "usual script"), ("moco, float32", "usual script"), ("moco", "dinov2")):
        ratios = [a / b for a, b in zip(speeds[above], speeds[below], strict=True)]
        print(f"{above} / {below}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    tyro.cli(main)
