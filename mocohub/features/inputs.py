"""Whatever holds images, as a dataset of preprocessed images or of the reasons why there is none."""

import math
import operator
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, default_collate

from mocohub.features.writer import NO_LABEL
from mocohub.images import ImageError, to_rgb
from mocohub.sources import ImageList, list_images


class ImageRow(NamedTuple):
    """One image as the model takes it."""

    id: int
    label: int
    pixels: torch.Tensor  # (C, H, W) float32


class Batch(NamedTuple):
    """What the loader yields: the images that could be read, and the errors of the others."""

    ids: list[int]
    labels: list[int]
    pixels: list[torch.Tensor]  # in runs of one shape (n, C, H, W); all runs together as long as ids
    errors: list[dict[str, Any]]


class Inputs(Dataset):
    """Whatever holds the images as a dataset of `ImageRow`, or of an error for one that cannot be used."""

    def __init__(self, images: Any) -> None:
        is_sequence = isinstance(images, list | tuple | np.ndarray | torch.Tensor) and len(images) > 0
        self.in_memory = is_sequence and isinstance(images[0], np.ndarray | torch.Tensor | Image.Image)
        if isinstance(images, IterableDataset) or (
            isinstance(images, Dataset) and not hasattr(images, "__len__")
        ):
            raise ValueError(
                f"images is a {type(images).__name__} without length and positions. Give a map-style Dataset."
            )
        if not self.in_memory and not isinstance(images, Dataset | ImageList):
            images = list_images(images)
        self.images = images
        self.transform: Callable[[Image.Image], torch.Tensor] | None = None
        self.classes: list[str] | None = getattr(images, "classes", None)
        if isinstance(images, ImageList):
            self.source, self.paths, self.paths_sha256 = images.source, images.paths, images.fingerprint()
        else:
            self.source = "images in memory" if self.in_memory else type(images).__name__
            self.paths, self.paths_sha256 = [f"images[{i}]" for i in range(len(images))], None
        if len(self) == 0:
            raise ValueError(f"There are no images: {self.source} is empty.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> ImageRow | dict[str, Any]:
        try:
            image, label = self._read(i)
            return ImageRow(i, NO_LABEL if label is None else operator.index(label), self._pixels(image))
        except ImageError as error:
            reason = str(error)
        except Exception as error:  # a Dataset or transform that is not ours may raise anything
            reason = f"{type(error).__name__}: {error}"
        return {"id": i, "path": self.paths[i], "reason": reason}

    def _read(self, i: int) -> tuple[Any, Any]:
        if isinstance(self.images, ImageList):
            return self.images.decode(i), self.images.labels and self.images.labels[i]
        item = self.images[i]
        return item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)

    def _pixels(self, image: Any) -> torch.Tensor:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ImageError(f"array is {image.dtype} {image.shape}, but must be uint8 (H, W, 3)")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            if self.transform is None:
                raise ImageError("the model has no pretrained_cfg to preprocess it by; give transform=...")
            image = self.transform(to_rgb(image))
        if not isinstance(image, torch.Tensor):
            raise ImageError(f"got {type(image).__name__}, but need an image or a float tensor (C, H, W)")
        if image.ndim != 3 or not image.is_floating_point():
            raise ImageError(f"tensor is {image.dtype} {tuple(image.shape)}, but must be float (C, H, W)")
        image = image.float()
        if not math.isfinite(image.sum()):
            raise ImageError("the preprocessed image has values that are not finite")
        return image


def collate(items: list[ImageRow | dict[str, Any]]) -> Batch:
    """Join images of one shape that follow one another; the loader's `collate_fn`."""
    images = [item for item in items if isinstance(item, ImageRow)]
    runs = groupby((image.pixels for image in images), key=lambda pixels: pixels.shape)
    return Batch(
        ids=[image.id for image in images],
        labels=[image.label for image in images],
        pixels=[default_collate(list(run)) for _, run in runs],
        errors=[item for item in items if isinstance(item, dict)],
    )
