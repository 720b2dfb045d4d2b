import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import write_images
from helpers.ranks import run_ranks

from mocohub import distributed
from mocohub.pretrain.data import GlobalOrder, TwoViews, loader
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.recipes import moco_tiny_digits
from mocohub.sources import list_images

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
    assert ids(GlobalOrder(21, RECIPE, start_step=3)) == ids(GlobalOrder(21, RECIPE))[3:]


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
        assert one.x_q.equal(other.x_q) and one.x_k.equal(other.x_k)
    assert alone[0].x_q.dtype == torch.uint8 and alone[0].x_q.shape == (8, 3, 8, 8)
    assert not alone[0].x_q.equal(alone[0].x_k)


def test_views_change_with_epoch_and_seed(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 3}))
    first = TwoViews(images, RECIPE)[0, 1][0]
    assert first.equal(TwoViews(images, RECIPE)[0, 1][0])
    assert not first.equal(TwoViews(images, RECIPE)[1, 1][0])
    assert not first.equal(TwoViews(images, dataclasses.replace(RECIPE, seed=1))[0, 1][0])


def test_a_broken_image_is_replaced_by_a_drawn_one_and_reported(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 3}))
    (tmp_path / images.paths[1]).write_bytes(b"not an image")
    x_q, _, broken = TwoViews(images, RECIPE)[0, 1]
    assert {image for image, _ in broken} == {1} and "image" in broken[0][1]
    assert x_q.equal(TwoViews(images, RECIPE)[0, 1][0])
    assert x_q.shape == (3, 8, 8)


def test_nothing_but_broken_images_is_an_error_with_reasons(tmp_path: Path) -> None:
    images = list_images(write_images(tmp_path, {"a": 3}))
    for path in images.paths:
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"20 images drawn .* cannot be decoded: .*\.png"):
        TwoViews(images, Recipe())[0, 1]
