"""Images/s of `mocohub.extract` beside thingsvision and img2vec-pytorch, on the same files and weights.

    python -m venv TV && TV/bin/pip install thingsvision
    python -m venv IV && IV/bin/pip install img2vec-pytorch
    python benchmarks/extract_peers.py --thingsvision TV/bin/python --img2vec IV/bin/python

Each peer runs in a process of its own environment (their dependencies exclude each other's and ours), with
its own preprocessing, in the way its documentation shows; img2vec gets lists of images, its faster way. All
compute the features of one ResNet-50 before its classifier, with the same random weights, from JPEGs of
500 x 375 px made here. Times are those of whole calls on n images in processes that are warm, with what a
call costs once; all take turns, round after round, and ratios are medians of those of single rounds. Goal: 3
times the images/s of each. Then the features are compared with ours from the peer's own preprocessing in
float32.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import tyro
from loader import write_photos
from machine import machine
from torchvision import transforms
from torchvision.transforms import v2

import mocohub

_NORMALIZE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# What each peer does to an image by default.
PREPROCESSING: dict[str, Callable[[Any], torch.Tensor]] = {
    "thingsvision": transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(**_NORMALIZE),
        ]
    ),
    "img2vec": v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((224, 224)),
            v2.Normalize(**_NORMALIZE),
        ]
    ),
}


class Peer:
    """A process that is told folders, and says how long their features took."""

    def __init__(self, name: str, python: str, *arguments: str) -> None:
        """Start it."""
        script = Path(__file__).with_name("extract_peer_process.py")
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        self.name, self.versions = name, {}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", script, name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )

    def seconds(self, folder: Path, features: Path | None = None) -> float:
        """Have the features of a folder computed, and saved if a file is named."""
        print(json.dumps([str(folder), features and str(features)]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                found, self.versions = json.loads(line.removeprefix("RESULT "))
                return found
        raise RuntimeError(
            f"{self.name} ended with exit code {self._process.wait()}. Does its environment hold it? "
            f"Try: {self._process.args[0]} -c 'import {self.name.replace('img2vec', 'img2vec_pytorch')}'"
        )

    def end(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.wait()


def main(
    thingsvision: Annotated[str | None, tyro.conf.arg(help="Python of its environment.")] = None,
    img2vec: Annotated[str | None, tyro.conf.arg(help="Python of its environment.")] = None,
    num_images: Annotated[int, tyro.conf.arg(help="n.")] = 512,
    batch_size: Annotated[int, tyro.conf.arg(help="Images in one forward pass.")] = 64,
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds.")] = 5,
    device: Annotated[str, tyro.conf.arg(help="Where to compute.")] = "cpu",
) -> None:
    """Print a table."""
    pythons = {"thingsvision": thingsvision, "img2vec": img2vec}
    pythons = {name: python for name, python in pythons.items() if python}
    if not pythons:
        raise ValueError("There is no peer. Give --thingsvision PYTHON, --img2vec PYTHON or both.")
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(model.state_dict(), folder / "weights.pth")  # timm names them as torchvision does
        model.reset_classifier(0)
        model.eval()
        photos, few = folder / "photos", folder / "few"
        photos.mkdir()
        write_photos(photos, num_images)
        few.mkdir()
        for file in sorted(photos.iterdir())[:batch_size]:
            os.link(file, few / file.name)

        def ours(source: Path) -> float:
            start = time.perf_counter()
            mocohub.extract(model, source, batch_size=batch_size, device=device, progress=False)
            return time.perf_counter() - start

        weights = str(folder / "weights.pth")
        peers = [Peer(name, python, weights, str(batch_size), device) for name, python in pythons.items()]
        runs = {"mocohub": ours, **{peer.name: peer.seconds for peer in peers}}
        speeds: dict[str, list[float]] = {way: [] for way in runs}
        for run in runs.values():
            run(few)
        for _ in range(rounds):
            for way, run in runs.items():
                speeds[way].append(num_images / run(photos))
            print({way: round(found[-1], 1) for way, found in speeds.items()}, file=sys.stderr)
        print(f"{machine(device)}; resnet50, n = {num_images}, batches of {batch_size}, {rounds} rounds")
        _print_speed("mocohub", speeds["mocohub"])
        for peer in peers:
            peer.seconds(few, folder / "features.npy")
            theirs = torch.tensor(np.load(folder / "features.npy"))
            options = {"transform": PREPROCESSING[peer.name], "dtype": "float32", "progress": False}
            features = torch.tensor(np.array(mocohub.extract(model, few, device=device, **options).values))
            mean = features.mean(0)  # of random weights all images have nearly the same features
            cosine = torch.cosine_similarity(features - mean, theirs - mean).min()
            ratios = [a / b for a, b in zip(speeds["mocohub"], speeds[peer.name], strict=True)]
            _print_speed(peer.name, speeds[peer.name])
            print(
                f"  mocohub / {peer.name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}), goal 3; cosine of the centred features with its preprocessing at least "
                f"{cosine:.5f}; {', '.join(f'{k} {v}' for k, v in peer.versions.items())}"
            )
            peer.end()


def _print_speed(name: str, found: list[float]) -> None:
    print(f"{name:<14}{statistics.median(found):8.1f} images/s ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    tyro.cli(main)
