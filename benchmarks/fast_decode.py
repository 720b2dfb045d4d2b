"""What `--fast-decode` changes in features and gains in time: JPEGs decoded at 1/2, 1/4 or 1/8 of their size.

    python benchmarks/fast_decode.py --train train.tar --val val.tar [--models moco_tiny_cifar10 resnet50]
    python benchmarks/fast_decode.py [--enlarge 4]

For each model: the cosine between the features of a photo that was decoded smaller and one that was not, in
float32; the accuracy of weighted kNN (k = 200, T = 0.07) with either, and with one for training images and
the other for test images; and how long decoding and transforming take, in rounds that take turns.

Without --val photos of 500 x 375 px are made here. With --enlarge F every photo is written again F times as
large, as a JPEG of quality 92, so that small photos reach the sizes at which JPEGs are decoded smaller. The
weights of a timm name are random, those of a mocohub name the model's own. Of random weights the features of
all photos are nearly the same: there the cosines of the centred features say more.
"""

import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import tyro
from loader import write_photos
from machine import machine
from PIL import Image
from torch import nn

import mocohub
from mocohub.features.inputs import Inputs
from mocohub.features.store import Features
from mocohub.features.views import resized_px
from mocohub.images import open_image


def network(name: str) -> nn.Module:
    """A model of mocohub's zoo, or one of timm with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0).eval() if timm.is_model(name) else mocohub.load(name)


def enlarged(source: str | Path, factor: float, folder: Path) -> Path:
    """Write every image of a source again, `factor` times as large, in folders of their classes."""
    images = mocohub.list_images(source)
    for i in range(len(images)):
        image = images.decode(i)
        label = images.labels[i] if images.labels else None
        place = folder / ("photos" if label is None else images.classes[label])
        place.mkdir(parents=True, exist_ok=True)
        large = image.resize(tuple(round(side * factor) for side in image.size), Image.Resampling.BICUBIC)
        large.save(place / f"{i:06d}.jpg", quality=92)
    return folder


def accuracy(train: Features, val: Features) -> float:
    """Of weighted kNN, in per cent."""
    probe = mocohub.KNNProbe(k=min(200, len(train))).fit(train.values, train.targets)
    return 100 * probe.score(val.values, val.targets)


def loader_ms(inputs: dict[str, Inputs], rounds: int, num_images: int) -> dict[str, list[float]]:
    """Milliseconds of CPU for an image, of each way, round after round."""
    found: dict[str, list[float]] = {way: [] for way in inputs}
    for round_ in range(rounds + 1):
        for way, images in inputs.items():
            start = time.process_time()
            for i in range(min(num_images, len(images))):
                images[i]
            if round_:
                found[way].append((time.process_time() - start) * 1000 / min(num_images, len(images)))
    return found


def main(
    train: Annotated[str | None, tyro.conf.arg(help="Labelled photos, for kNN.")] = None,
    val: Annotated[str | None, tyro.conf.arg(help="Photos; by default made here.")] = None,
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="Names of timm or of mocohub.")] = (
        "resnet18",
        "resnet50",
        "moco_tiny_cifar10",
    ),
    enlarge: Annotated[float, tyro.conf.arg(help="Write the photos again, so many times as large.")] = 1,
    num_images: Annotated[int, tyro.conf.arg(help="Photos made here, and of a timed round.")] = 64,
    rounds: Annotated[int, tyro.conf.arg(help="Timed rounds, after one to warm up.")] = 5,
) -> None:
    """Print a table for each model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if val is None:
            (folder / "made").mkdir()
            write_photos(folder / "made", num_images)
        sources = {"val": val or folder / "made", **({"train": train} if train else {})}
        if enlarge != 1:
            sources = {split: enlarged(source, enlarge, folder / split) for split, source in sources.items()}
        print(f"{machine()}; {val or 'photos made here'}, {enlarge:g} times as large")
        for model in models:
            report(model, sources, rounds, num_images)


def report(name: str, sources: dict[str, str | Path], rounds: int, num_images: int) -> None:
    """Print what changes for one model."""
    model = network(name)
    transform = mocohub.transform(model)
    inputs = {"exact": Inputs(sources["val"]), "fast": Inputs(sources["val"])}
    for images in inputs.values():
        images.transform = transform
    least_px = inputs["fast"].least_px = resized_px(transform)
    shrinks = Counter()
    for i in range(len(inputs["fast"])):
        with open_image(inputs["fast"].images.encoded(i)) as opened:
            shrinks[opened.largest_shrink(least_px)] += 1
    options = {"dtype": "float32", "device": "cpu", "progress": False}
    found = {
        (split, fast): mocohub.extract(model, source, fast_decode=fast, **options)
        for split, source in sources.items()
        for fast in (False, True)
    }
    exact, fast = (torch.tensor(np.array(found["val", way].values)) for way in (False, True))
    print(f"{name}, resized to {least_px} px; decoded at 1/1, 1/2, 1/4, 1/8: ", end="")
    print(", ".join(str(shrinks[k]) for k in (1, 2, 4, 8)))
    for what, mean in (("cosine", 0.0), ("of centred features", exact.mean(0))):
        cosines = torch.cosine_similarity(exact - mean, fast - mean).sort().values.tolist()
        least, one_pct, median = (cosines[int(share * (len(cosines) - 1))] for share in (0.0, 0.01, 0.5))
        print(f"  {what}: least {least:.5f}, 1 % {one_pct:.5f}, median {median:.5f}")
    if "train" in sources:
        both = {
            (a, b): accuracy(found["train", a], found["val", b]) for a in (False, True) for b in (False, True)
        }
        print(
            f"  kNN: exact {both[False, False]:.2f} %, fast {both[True, True]:.2f} %, "
            f"fast test images against exact training images {both[False, True]:.2f} %"
        )
    times = loader_ms(inputs, rounds, num_images)
    ratios = [a / b for a, b in zip(times["exact"], times["fast"], strict=True)]
    print(
        f"  decode and transform: {statistics.median(times['exact']):.2f} ms, fast "
        f"{statistics.median(times['fast']):.2f} ms, {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    tyro.cli(main)
