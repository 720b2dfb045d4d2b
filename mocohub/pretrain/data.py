"""Batches of views, in an order that is a pure function of (seed, epoch): resuming is starting later."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mocohub import distributed
from mocohub.images import ImageError, open_image
from mocohub.pretrain.augment import Crops, crop_views, draw_view, finish_view
from mocohub.pretrain.randomness import permutation, stream
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.signals import shield_worker
from mocohub.sources import ImageList

_TRIES = 20  # images that are drawn in place of a broken one until one decodes


class Batch(NamedTuple):
    """What one rank needs for one step, N images.

    Attributes:
        ids: (N,) int64, the image that each row shows: in place of a broken one, its replacement.
        x_q: The queries' crops.
        x_k: The keys' crops of the same images; None for a mechanism that sees one view of each.
        broken: For each image that was replaced: (id, reason) of all that failed.
    """

    ids: Tensor
    x_q: Crops
    x_k: Crops | None
    broken: list[list[tuple[int, str]]]


class Sample(NamedTuple):
    """One row of a batch: an image and its views, Crops without their first dimension."""

    image_id: int
    views: list[Crops]
    broken: list[tuple[int, str]]


def views_per_image(recipe: Recipe) -> int:
    """Two, or one where the memory bank takes the place of the second."""
    return 1 if recipe.mechanism == "memory_bank" else 2


def make_views(
    source: bytes | Path, recipe: Recipe, epoch: int, image_id: int, *, on_device: bool, num_views: int = 2
) -> list[Crops]:
    """Return random views of one image, the same wherever and whenever they are drawn.

    JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where all crops keep `crop_px` pixels on each side.

    Args:
        source: The file, or its bytes.
        recipe: Gives the seed and the distribution.
        epoch: With `image_id` and the number of the view, the key of its randomness.
        image_id: Likewise.
        on_device: Whether colours, blur and mirror images are left to `augment_batch.finish_views`.
        num_views: How many.

    Returns:
        Crops without their first dimension: pixels (3, crop_px, crop_px), parameters (11,) or None.

    Raises:
        ImageError: If the image cannot be used.
    """
    augmentation, size = recipe.augmentation, recipe.crop_px
    with open_image(source) as opened:
        views = [
            draw_view(augmentation, stream(recipe.seed, "view", epoch, image_id, number), *opened.size)
            for number in range(num_views)
        ]
        least = min(min(view.width, view.height) for view in views)
        shrink = max(k for k in opened.shrinks if k == 1 or least // k >= size)
        crops = crop_views(opened.decode(shrink), views, size, shrink)
    if on_device:
        return [Crops(crop, torch.tensor(v.row())) for crop, v in zip(crops, views, strict=True)]
    order = augmentation.colour_order
    return [Crops(finish_view(crop, v, order), None) for crop, v in zip(crops, views, strict=True)]


class Views(Dataset):
    """(epoch, image id) -> a `Sample`."""

    def __init__(self, images: ImageList, recipe: Recipe, on_device: bool = False) -> None:
        """Draw views of `images` as `recipe` says; see `make_views`."""
        self.images, self.recipe, self.on_device = images, recipe, on_device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        (epoch, image_id), recipe, broken = key, self.recipe, []
        options = {"on_device": self.on_device, "num_views": views_per_image(recipe)}
        shown, others = image_id, None
        for _ in range(_TRIES):
            try:
                source = self.images.encoded(shown)
                # The key stays that of the broken image: its replacement comes up for itself in this epoch.
                return Sample(shown, make_views(source, recipe, epoch, image_id, **options), broken)
            except ImageError as error:
                broken.append((shown, str(error)))
                others = others or stream(recipe.seed, "replacement", epoch, image_id)
                shown = int(others.integers(len(self.images)))
        reasons = "; ".join(f"{self.images.paths[i]}: {why}" for i, why in broken[:3])
        raise RuntimeError(f"{_TRIES} images drawn one after the other cannot be decoded: {reasons}")


class GlobalOrder(Sampler):
    """This rank's part of every global batch from `start_step` to the end: lists of (epoch, image id).

    Each epoch is a permutation of all images; what does not fill a global batch at its end is left out, as
    the authors' code does. The order does not depend on the number of ranks.
    """

    def __init__(self, num_images: int, recipe: Recipe, start_step: int = 0) -> None:
        """Lay out all steps of `recipe`."""
        self.num_images, self.recipe, self.start_step = num_images, recipe, start_step
        self.steps_per_epoch = num_images // recipe.global_batch_size
        self.total_steps = recipe.total_steps(self.steps_per_epoch)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.recipe.global_batch_size
        local = size // distributed.world_size()
        first = local * distributed.rank()
        order, order_epoch = None, None
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = permutation(self.recipe.seed, "order", epoch, self.num_images)
                order_epoch = epoch
            start = batch * size + first
            yield [(epoch, int(i)) for i in order[start : start + local]]


def collate(samples: list[Sample]) -> Batch:
    """Join samples into a batch."""
    ids, views, broken = zip(*samples, strict=True)
    x_q, *x_k = [_stack(crops) for crops in zip(*views, strict=True)]
    return Batch(torch.tensor(ids), x_q, x_k[0] if x_k else None, [failed for failed in broken if failed])


def _stack(crops: tuple[Crops, ...]) -> Crops:
    pixels, parameters = zip(*crops, strict=True)
    return Crops(torch.stack(pixels), None if parameters[0] is None else torch.stack(parameters))


def loader(
    images: ImageList,
    recipe: Recipe,
    *,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_device: bool = False,
) -> DataLoader:
    """Return an iterator over this rank's `Batch`es from `start_step` to the end of the training.

    Args:
        images: The training set.
        recipe: What is drawn from it.
        start_step: Where to begin.
        num_workers: Decoding processes; 0 to decode in this one.
        pin_memory: Whether batches come in page-locked memory, for copies to a GPU that do not wait. If not,
            the step is on the CPU too, and workers yield to it.
        on_device: Whether colours, blur and mirror images are left to `augment_batch.finish_views`.
    """
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
    return DataLoader(
        Views(images, recipe, on_device),
        batch_sampler=GlobalOrder(len(images), recipe, start_step),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=partial(shield_worker, yields=not pin_memory),
        **options,
    )
