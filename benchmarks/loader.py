"""Images per second and core of the training loader, beside the published code's transforms.

    python benchmarks/loader.py [--data FOLDER] [--recipe mocov2_r50_in1m] [--rounds 7]

Decodes each file and draws two views of it, in one process with one thread, in rounds that interleave:

- published: torchvision's transforms on Pillow images, as the authors' main_moco.py composes them
- mocohub: the same to 8-bit crops, ready for the encoder, which normalises them on its device
- mocohub, worker's half: 8-bit crops and parameters; the rest is done by
- mocohub, device's half: `finish_views`, here on the CPU; it is meant for a GPU

Time is that of the CPU, so that other programs disturb little. Ratios are medians of those of single rounds.
Without --data it makes its own files: smooth random colours with noise, 500 x 375 px, JPEG quality 90, 70 KB.
Goals with those files and the default recipe: at least 1.3 and 3.5 times the published transforms.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from machine import machine
from PIL import Image, ImageFilter
from torchvision import transforms

from mocohub.pretrain.augment_batch import finish_views
from mocohub.pretrain.data import Sample, collate, make_views
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.recipes import recipe_by_name
from mocohub.sources import list_images


def published(recipe: Recipe) -> Callable[[Image.Image], torch.Tensor]:
    """The authors' transforms, in their order."""
    a = recipe.augmentation
    jitter = transforms.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
    colours = [
        transforms.RandomApply([jitter], a.jitter_probability),
        transforms.RandomGrayscale(a.grey_probability),
    ]
    blur = [transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))]
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.crop_px, (a.crop_scale_min, 1.0)),
            *(
                [transforms.RandomAffine(a.rotation_deg, shear=a.shear_deg)]
                if a.rotation_deg or a.shear_deg
                else []
            ),
            *(colours if a.colour_order == "jitter_first" else reversed(colours)),
            *([transforms.RandomApply(blur, a.blur_probability)] if a.blur_probability else []),
            transforms.RandomHorizontalFlip(a.flip_probability),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
    )


def write_photos(folder: Path, count: int) -> None:
    """Write JPEGs of 500 x 375 px, as hard to decode as photos: coarse and fine fields of colour, noise."""
    for number in range(count):
        dice = np.random.RandomState(number)
        pixels = 120 + dice.normal(scale=8, size=(375, 500, 1))
        for columns in (4, 8, 16, 32, 64, 128):
            field = dice.normal(size=(3, columns * 3 // 4, columns)).astype(np.float32)
            smooth = [Image.fromarray(band).resize((500, 375), Image.Resampling.BICUBIC) for band in field]
            pixels = pixels + np.stack(smooth, axis=2) * 60 / columns**0.6
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)


def main(
    data: Annotated[Path | None, tyro.conf.arg(help="Images of your own; by default made here.")] = None,
    recipe: Annotated[str, tyro.conf.arg(help="Whose crops and augmentation.")] = "mocov2_r50_in1m",
    num_images: Annotated[int, tyro.conf.arg(help="Images in a round, spread over the data.")] = 32,
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds, after one to warm up.")] = 7,
) -> None:
    """Print images/s and core, the median with smallest and largest, and ratios to the published code."""
    torch.set_num_threads(1)
    chosen = recipe_by_name(recipe)
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            write_photos(Path(folder), num_images)
        images = list_images(data or folder)
        ids = [i * len(images) // num_images for i in range(num_images)]
        transform = published(chosen)

        def run_published(_: int) -> None:
            for i in ids:
                with Image.open(Path(images.root, images.paths[i])) as file:
                    image = file.convert("RGB")
                transform(image), transform(image)

        def views(epoch: int, on_device: bool) -> list[Sample]:
            return [
                Sample(i, make_views(images.encoded(i), chosen, epoch, i, on_device=on_device), [])
                for i in ids
            ]

        batch = collate(views(0, True))

        def run_device(_: int) -> None:
            for crops in (batch.x_q, batch.x_k):
                finish_views(crops, chosen.augmentation, chosen.mean, chosen.std)

        runs: dict[str, Callable[[int], object]] = {
            "published (torchvision on Pillow)": run_published,
            "mocohub": lambda epoch: views(epoch, False),
            "mocohub, worker's half": lambda epoch: views(epoch, True),
            "mocohub, device's half on this CPU": run_device,
        }
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for epoch in range(rounds + 1):
            for name, run in runs.items():
                start = time.process_time()
                run(epoch)
                if epoch:
                    speeds[name].append(num_images / (time.process_time() - start))
    source = data or "JPEGs made here"
    print(f"{recipe}, two views of {num_images} images from {source}, crop {chosen.crop_px} px")
    print(f"{machine()}; {rounds} rounds")
    first = next(iter(speeds.values()))
    for name, found in speeds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found, first, strict=True))
        spread = f"({min(found):.0f} to {max(found):.0f})"
        print(f"{name:<36}{statistics.median(found):8.0f} images/s {spread:<16}{ratio:6.2f} x")


if __name__ == "__main__":
    tyro.cli(main)
