"""Batches of two views, in an order that is a pure function of (seed, epoch): resuming is starting later."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mocohub import distributed
from mocohub.images import ImageError
from mocohub.pretrain.augment import draw_view, render_view
from mocohub.pretrain.randomness import permutation, stream
from mocohub.pretrain.recipes import Recipe
from mocohub.sources import ImageList

_TRIES = 20  # images that are drawn in place of a broken one until one decodes


class Batch(NamedTuple):
    """What one rank needs for one step."""

    x_q: Tensor  # (N, 3, crop_px, crop_px) uint8
    x_k: Tensor  # likewise, the same images
    broken: list[list[tuple[int, str]]]  # for each image that was replaced: (id, reason) of all that failed


class TwoViews(Dataset):
    """(epoch, image id) -> two random views of that image, the same wherever and whenever they are drawn."""

    def __init__(self, images: ImageList, recipe: Recipe) -> None:
        """Draw views of `images` as `recipe` says."""
        self.images, self.recipe = images, recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        epoch, image_id = key
        recipe, broken = self.recipe, []
        others = stream(recipe.seed, "replacement", epoch, image_id)
        for attempt in range(_TRIES):
            index = int(others.integers(len(self.images))) if attempt else image_id
            try:
                image = self.images.decode(index)
                break
            except ImageError as error:
                broken.append((index, str(error)))
        else:
            reasons = "; ".join(f"{self.images.paths[i]}: {why}" for i, why in broken[:3])
            raise RuntimeError(f"{_TRIES} images drawn one after the other cannot be decoded: {reasons}")
        views = []
        for view in range(2):
            random = stream(recipe.seed, "view", epoch, image_id, view)
            drawn = draw_view(recipe.augmentation, random, *image.size)
            views.append(render_view(image, drawn, recipe.crop_px, recipe.augmentation.colour_order))
        return views[0], views[1], broken


class GlobalOrder(Sampler):
    """This rank's part of every global batch from `start_step` to the end: lists of (epoch, image id).

    Each epoch is a permutation of all images; what does not fill a global batch at its end is left out, as
    the authors' code does. The order does not depend on the number of ranks.
    """

    def __init__(self, num_images: int, recipe: Recipe, start_step: int = 0) -> None:
        """Lay out all epochs of `recipe`."""
        self.num_images, self.recipe, self.start_step = num_images, recipe, start_step
        self.steps_per_epoch = num_images // recipe.global_batch_size
        self.total_steps = self.steps_per_epoch * recipe.epochs

    def __len__(self) -> int:
        return self.total_steps - self.start_step

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


def _collate(samples: list[tuple[Tensor, Tensor, list[tuple[int, str]]]]) -> Batch:
    x_q, x_k, broken = zip(*samples, strict=True)
    return Batch(torch.stack(x_q), torch.stack(x_k), [failed for failed in broken if failed])


def loader(
    images: ImageList, recipe: Recipe, *, start_step: int = 0, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Return an iterator over this rank's `Batch`es from `start_step` to the end of the last epoch."""
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
    return DataLoader(
        TwoViews(images, recipe),
        batch_sampler=GlobalOrder(len(images), recipe, start_step),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        **options,
    )
