"""Labelled images as batches of crops: random ones to train on, central ones to validate on.

Like in training, crops are a function of (seed, epoch, image id) and order one of (seed, epoch), whatever the
number of processes. Unlike there, a broken image is not replaced: it is missing, with the reason.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mocohub import distributed
from mocohub.evaluation.protocols import LinearProtocol
from mocohub.images import ImageError, open_image
from mocohub.pretrain.augment import View, crop_views, draw_view
from mocohub.pretrain.randomness import permutation, stream
from mocohub.pretrain.recipe import Augmentation
from mocohub.pretrain.signals import shield_worker
from mocohub.sources import ImageList


class Batch(NamedTuple):
    """This process's part of a global batch: n images that could be read, and the others."""

    ids: list[int]
    pixels: Tensor | None  # (n, 3, crop_px, crop_px) uint8; None if n is 0
    errors: list[tuple[int, str]]  # (id, reason)


class Crops(Dataset):
    """(epoch, image id) -> the id with its crop, uint8 (3, crop_px, crop_px), or with the reason for none."""

    def __init__(self, images: ImageList, protocol: LinearProtocol, seed: int | None = None) -> None:
        """Crop `images` as `protocol` says: at random with a seed, else as its validation does."""
        self.images, self.protocol, self.seed = images, protocol, seed
        self.augmentation = Augmentation(
            crop_scale_min=protocol.crop_scale_min,
            crop_ratio_max=protocol.crop_ratio_max,
            flip_probability=protocol.flip_probability,
            jitter_probability=0.0,
            grey_probability=0.0,
        )
        self.centre = transforms.Compose(
            [
                transforms.Resize(protocol.resize_px, InterpolationMode(protocol.interpolation)),
                transforms.CenterCrop(protocol.crop_px),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | str]:
        epoch, image_id = key
        try:
            with open_image(self.images.encoded(image_id)) as opened:
                if self.seed is None:
                    pixels = np.asarray(self.centre(opened.decode()))  # (crop_px, crop_px, 3)
                    return image_id, torch.from_numpy(pixels.copy()).permute(2, 0, 1)
                view = self.view(epoch, image_id, *opened.size)
                size, mode = self.protocol.crop_px, self.protocol.interpolation
                (crop,) = crop_views(opened.decode(), [view], size, mode=mode)
                return image_id, crop.flip(-1) if view.flip else crop
        except ImageError as error:
            return image_id, str(error)

    def view(self, epoch: int, image_id: int, width: int, height: int) -> View:
        """What is drawn for an image in an epoch: its crop, and whether it is mirrored."""
        return draw_view(self.augmentation, stream(self.seed, "linear", epoch, image_id), width, height)


class Batches(Sampler):
    """This process's part of every global batch, as lists of (epoch, image id).

    Every image comes once in an epoch. A global batch is divided among the processes as evenly as it can be;
    some may have an image more than others, or none.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        *,
        epochs: int = 1,
        start_step: int = 0,
        seed: int | None = None,
    ) -> None:
        """Lay out all steps; without a seed in the order of the ids."""
        self.num_images, self.global_batch_size, self.seed = num_images, global_batch_size, seed
        self.steps_per_epoch = -(-num_images // global_batch_size)
        self.total_steps, self.start_step = epochs * self.steps_per_epoch, start_step

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = torch.arange(self.num_images), None
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if self.seed is not None and epoch != order_epoch:
                order, order_epoch = permutation(self.seed, "order", epoch, self.num_images), epoch
            ids = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]
            mine = ids.tensor_split(distributed.world_size())[distributed.rank()]
            yield [(epoch, i) for i in mine.tolist()]


def collate(items: list[tuple[int, Tensor | str]]) -> Batch:
    """Join crops into a batch."""
    crops = {i: item.permute(1, 2, 0) for i, item in items if isinstance(item, Tensor)}
    # Stacked as (n, S, S, 3): channels_last, as the network wants them.
    pixels = torch.stack(list(crops.values())).permute(0, 3, 1, 2) if crops else None
    return Batch(list(crops), pixels, [(i, item) for i, item in items if isinstance(item, str)])


def loader(crops: Crops, batches: Batches, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """Return an iterator over this process's `Batch`es.

    Args:
        crops: What to show.
        batches: In which order.
        num_workers: Decoding processes; 0 to decode in this one.
        pin_memory: Whether batches come in page-locked memory, for a card. If not, workers yield to the
            network, which then runs on the same cores.
    """
    options: dict[str, Any] = {"prefetch_factor": 4} if num_workers else {}
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=partial(shield_worker, yields=not pin_memory),
        generator=torch.Generator(),  # or the loader would draw a seed from the global one
        **options,
    )


def sample(crops: Crops, tries: int = 16, count: int = 8) -> Tensor:
    """Return the first images that can be read of some that are spread over the data, as a batch.

    Raises:
        ValueError: If none of them can be read: this is no folder of images to train on.
    """
    found, reasons = [], []
    for i in sorted({k * len(crops) // tries for k in range(tries)}):
        _, item = crops[0, i]
        if isinstance(item, str):
            reasons.append(f"{crops.images.paths[i]}: {item}")
        else:
            found.append(item)
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"None of {len(reasons)} images tried can be decoded: {'; '.join(reasons[:3])}.")
    return torch.stack(found)


def normalised(pixels: Tensor, data_config: dict[str, Any]) -> Tensor:
    """Return uint8 crops as a backbone takes them, (n, 3, S, S) float32 in channels_last.

    To the bit torchvision's ToTensor and Normalize; by rows of 3 S numbers three times as fast on a CPU.
    """
    n, channels, height, width = pixels.shape
    mean, std = (_row(tuple(data_config[name]), width, pixels.device) for name in ("mean", "std"))
    rows = pixels.permute(0, 2, 3, 1).reshape(n, height, width * channels).float()
    rows.div_(255).sub_(mean).div_(std)
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


@cache
def _row(channels: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """A number a channel for each pixel of a row, (3 S,), sent to a device once."""
    return torch.tensor(channels, device=device).repeat(width)


def check_labels(train: ImageList, val: ImageList) -> list[int]:
    """Return the labels of `val` as positions in `train.classes`.

    Raises:
        ValueError: If there are no images, images without label, fewer than two classes to learn, or images
            to validate on of a class that is not among them.
    """
    for images in (train, val):
        if len(images) == 0:
            raise ValueError(f"There are no images: {images.source} is empty.")
        missing = images.paths[:1] if images.labels is None else _without_label(images)
        if missing:
            raise ValueError(
                f"Images of '{images.source}' have no label ('{missing[0]}' is the first). Give a folder "
                "with a sub-folder for each class, or a list with a column 'label'."
            )
    known = {train.classes[label] for label in set(train.labels)}
    if len(known) < 2:
        raise ValueError(
            f"Only one class in '{train.source}' ({known.pop()}): a classifier needs two or more."
        )
    strange = sorted({val.classes[label] for label in set(val.labels)} - known)
    if strange:
        shown = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise ValueError(
            f"{len(strange)} classes of '{val.source}' are not in '{train.source}': {shown}. "
            "Both need the same names for their classes."
        )
    position = {name: i for i, name in enumerate(train.classes)}
    return [position[val.classes[label]] for label in val.labels]


def _without_label(images: ImageList) -> list[str]:
    return [path for path, label in zip(images.paths, images.labels, strict=True) if label is None][:1]


def facts(images: ImageList) -> dict[str, Any]:
    """What tells two sets of images apart: their number, and SHA-256 of paths, labels and classes."""
    identity = json.dumps([images.fingerprint(), images.labels, images.classes])
    return {"num_images": len(images), "sha256": hashlib.sha256(identity.encode()).hexdigest()}
