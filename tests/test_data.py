import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import write_images
from helpers.ranks import run_ranks
from PIL import Image

from mocohub import distributed
from mocohub.images import ImageError
from mocohub.pretrain.augment_batch import finish_views
from mocohub.pretrain.data import GlobalOrder, Views, collate, loader, make_views
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.recipes import moco_tiny_cifar10, moco_tiny_digits
from mocohub.sources import ImageList, list_images

RECIPE = dataclasses.replace(
    moco_tiny_digits(), global_batch_size=8, bn_group_size=4, epochs=3, queue_size=16, crop_px=8
)


def ids(order: GlobalOrder) -> list[list[tuple[int, int]]]:
    return list(order)


def test_each_epoch_is_a_permutation_without_its_incomplete_last_batch() -> None:
    batches = ids(GlobalOrder(21, RECIPE))
    assert len(batches) == len(GlobalOrder(21, RECIPE)) == 3 * 2
    for epoch in range(3):
        seen = [image for batch in batches[2 * epoch : 2 * epoch + 2] for e, image in batch if e == epoch]
        assert len(set(seen)) == 16 and set(seen) <= set(range(21))
    assert batches[0] != [(0, image) for _, image in batches[2]]


def test_starting_later_gives_the_rest_of_the_same_order() -> None:
    whole = ids(GlobalOrder(21, RECIPE))
    for start_step in range(len(whole) + 2):
        rest = GlobalOrder(21, RECIPE, start_step)
        assert ids(rest) == whole[start_step:] and len(rest) == len(whole[start_step:])


def test_a_length_in_steps_may_end_within_an_epoch() -> None:
    recipe = dataclasses.replace(RECIPE, steps=5, epochs=1)
    assert ids(GlobalOrder(21, recipe)) == ids(GlobalOrder(21, RECIPE))[:5]


def save_ids(out: Path) -> None:
    rows = np.array(ids(GlobalOrder(21, RECIPE)))
    np.save(out / f"{distributed.rank()}.npy", rows)


def test_ranks_share_the_global_batches_that_one_process_sees(tmp_path: Path) -> None:
    run_ranks(save_ids, 2, tmp_path)
    parts = np.concatenate([np.load(tmp_path / f"{rank}.npy") for rank in range(2)], axis=1)
    assert np.array_equal(parts, np.array(ids(GlobalOrder(21, RECIPE))))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_views_do_not_depend_on_workers(tmp_path: Path, num_workers: int) -> None:
    images = list_images(write_images(tmp_path, {"a": 10, "b": 11}))
    torch.manual_seed(1)
    alone = list(loader(images, RECIPE))
    torch.manual_seed(2)
    together = list(loader(images, RECIPE, num_workers=num_workers))
    for one, other in zip(alone, together, strict=True):
        assert one.x_q.pixels.equal(other.x_q.pixels) and one.x_k.pixels.equal(other.x_k.pixels)
        assert one.ids.equal(other.ids)
    batch = alone[0]
    assert batch.x_q.pixels.dtype == torch.uint8 and batch.x_q.pixels.shape == (8, 3, 8, 8)
    assert not batch.x_q.pixels.equal(batch.x_k.pixels) and batch.x_q.parameters is None
    assert batch.ids.tolist() == [image for _, image in ids(GlobalOrder(21, RECIPE))[0]] and not batch.broken


def one_view(images: ImageList, recipe: Recipe, epoch: int, image_id: int) -> torch.Tensor:
    return Views(images, recipe)[epoch, image_id].views[0].pixels


def test_views_change_with_epoch_and_seed(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 3}))
    first = one_view(images, RECIPE, 0, 1)
    assert first.equal(one_view(images, RECIPE, 0, 1))
    assert not first.equal(one_view(images, RECIPE, 1, 1))
    assert not first.equal(one_view(images, dataclasses.replace(RECIPE, seed=1), 0, 1))


@pytest.mark.parametrize("recipe", [RECIPE, dataclasses.replace(moco_tiny_cifar10(), global_batch_size=8)])
def test_what_is_left_to_the_device_gives_the_views_of_the_worker(tmp_path: Path, recipe: Recipe) -> None:
    images = list_images(write_images(tmp_path, {"a": 16}, size_px=40))
    on_worker, on_device = (next(iter(loader(images, recipe, on_device=where))) for where in (False, True))
    settings = recipe.augmentation, recipe.mean, recipe.std
    for done, left in ((on_worker.x_q, on_device.x_q), (on_worker.x_k, on_device.x_k)):
        assert left.parameters.shape == (8, 11) and left.parameters.dtype == torch.float32
        one_level = 1 / 255 / min(recipe.std)
        errors = (finish_views(done, *settings) - finish_views(left, *settings)).abs()
        assert errors.max() <= 0.51 * one_level


def test_a_memory_bank_sees_one_view_of_each_image(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 16}))
    bank = dataclasses.replace(RECIPE, mechanism="memory_bank")
    batch, two = (next(iter(loader(images, recipe))) for recipe in (bank, RECIPE))
    assert batch.x_k is None and batch.x_q.pixels.equal(two.x_q.pixels)


def test_large_jpegs_are_decoded_smaller_and_show_the_same(tmp_path: Path) -> None:
    y, x = np.mgrid[0:400, 0:600]
    picture = Image.fromarray(np.stack([x * 0.4, y * 0.6, (x + y) * 0.25], axis=2).astype(np.uint8))
    large, lossless = io.BytesIO(), io.BytesIO()
    picture.save(large, "JPEG", quality=95)
    picture.save(lossless, "PNG")
    recipe = dataclasses.replace(moco_tiny_cifar10(), crop_px=20)
    for image_id in range(8):
        smaller, whole = (
            make_views(file.getvalue(), recipe, 0, image_id, on_device=True) for file in (large, lossless)
        )
        for one, other in zip(smaller, whole, strict=True):
            assert one.parameters.equal(other.parameters)
            assert (one.pixels.int() - other.pixels.int()).abs().max() <= 8


def test_views_of_a_broken_file_are_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    for source in (b"", tmp_path / "a.jpg", tmp_path / "gone.jpg"):
        with pytest.raises(ImageError, match="empty file|not a JPEG|cannot be read"):
            make_views(source, RECIPE, 0, 0, on_device=False)


def test_a_broken_image_is_replaced_by_a_drawn_one_and_reported(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 3}))
    (tmp_path / images.paths[1]).write_bytes(b"not an image")
    sample = Views(images, RECIPE)[0, 1]
    assert {image for image, _ in sample.broken} == {1} and "image" in sample.broken[0][1]
    assert sample.image_id in (0, 2)
    assert sample.views[0].pixels.equal(one_view(images, RECIPE, 0, 1))
    assert not sample.views[0].pixels.equal(one_view(images, RECIPE, 0, sample.image_id))
    batch = collate([sample, Views(images, RECIPE)[0, 2]])
    assert batch.ids.tolist() == [sample.image_id, 2] and batch.ids.dtype == torch.int64
    assert batch.broken == [sample.broken]


def test_nothing_but_broken_images_is_an_error_with_reasons(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 3}))
    for path in images.paths:
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"20 images drawn .* cannot be decoded: .*\.png"):
        Views(images, Recipe())[0, 1]
