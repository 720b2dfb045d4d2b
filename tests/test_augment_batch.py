import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from mocohub.pretrain.augment import OPERATIONS, Crops, View, crop_views, draw_view, finish_view
from mocohub.pretrain.augment_batch import finish_views
from mocohub.pretrain.randomness import stream
from mocohub.pretrain.recipe import IMAGENET_MEAN, IMAGENET_STD, Augmentation, moco_v1, moco_v2

JITTER_ONLY = Augmentation(grey_probability=0.0, flip_probability=0.0)
BLUR_ONLY = replace(JITTER_ONLY, jitter_probability=0.0, blur_probability=1.0)
PLAIN = View(0, 0, 24, 24, jitter=(), grey=False, blur_sigma=None, flip=False, angle_deg=0, shear_deg=0)


def pixels(n: int, size: int = 24) -> torch.Tensor:
    """Smooth colours with noise, every hue and some grey among them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic") + 0.1 * torch.rand(
        n, 3, size, size, generator=generator
    )
    smooth[:, :, :2, :2] = 0.5
    return (smooth.clamp(0, 1) * 255).byte()


def finish(views: list[View], images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    crops = Crops(images, torch.tensor([view.row() for view in views]))
    return finish_views(crops, augmentation, (0.0,) * 3, (1.0,) * 3)


def jitter(x: torch.Tensor, operations: tuple[tuple[str, float], ...]) -> torch.Tensor:
    for name, factor in operations:
        x = getattr(tvf, f"adjust_{name}")(x, factor)
    return x


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions_with_a_factor_for_each_image(name: str) -> None:
    factors = (-0.5, -0.1, 0.0, 0.23, 0.4) if name == "hue" else (0.0, 0.6, 1.0, 1.17, 1.4)
    images = pixels(len(factors))
    finished = finish([replace(PLAIN, jitter=((name, f),)) for f in factors], images, JITTER_ONLY)
    for x, factor, ours in zip(images / 255, factors, finished, strict=True):
        # torchvision's luma has 0.2989 where ITU-R BT.601, Pillow and we have 0.299.
        tolerance = 1e-5 if name in ("brightness", "hue") else 2e-4
        torch.testing.assert_close(ours, jitter(x, ((name, factor),)), rtol=0, atol=tolerance)


def test_contrast_and_saturation_are_blends_with_the_luma_of_itu_bt_601() -> None:
    images = pixels(1).repeat(2, 1, 1, 1)
    views = [replace(PLAIN, jitter=((name, 1.3),)) for name in ("contrast", "saturation")]
    x = images[0] / 255
    luma = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    for ours, other in zip(finish(views, images, JITTER_ONLY), (luma.mean(), luma), strict=True):
        torch.testing.assert_close(ours, (1.3 * x - 0.3 * other).clamp(0, 1), rtol=0, atol=1e-5)


def test_each_image_has_its_own_order_of_operations() -> None:
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.2}
    orders = [
        tuple((name, factors[name]) for name in order)
        for count in range(5)
        for order in itertools.permutations(OPERATIONS, count)
    ]
    images = pixels(1).repeat(len(orders), 1, 1, 1)
    finished = finish([replace(PLAIN, jitter=order) for order in orders], images, JITTER_ONLY)
    for order, ours in zip(orders, finished, strict=True):
        torch.testing.assert_close(ours, jitter(images[0] / 255, order), rtol=0, atol=1e-3)
    assert len({ours.numpy().tobytes() for ours in finished}) == len(orders)


def test_the_blur_is_torchvisions_with_a_sigma_for_each_image() -> None:
    sigmas = (0.1, 0.4, 1.0, 2.0)
    images = pixels(5)
    views = [replace(PLAIN, blur_sigma=sigma) for sigma in (*sigmas, None)]
    finished = finish(views, images, BLUR_ONLY)
    for x, sigma, ours in zip(images / 255, sigmas, finished, strict=False):
        radius = int(np.ceil(4 * sigma))
        edge = 2 * radius  # torchvision mirrors at the edges; Pillow and we repeat the last pixel
        padded = F.pad(x[None], (edge,) * 4, mode="replicate")[0]
        expected = tvf.gaussian_blur(padded, [2 * radius + 1] * 2, [sigma] * 2)[:, edge:-edge, edge:-edge]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        exact = gaussian_filter(x.double().numpy(), sigma, mode="nearest", axes=(1, 2), radius=40)
        assert np.abs(ours.numpy() - exact).max() < 1e-3
    assert finished[4].equal(images[4] / 255)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_the_blur_is_pillows_to_a_few_levels(sigma: float) -> None:
    images = pixels(1, 96)
    image = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    expected = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).transpose(2, 0, 1)
    ours = 255 * finish([replace(PLAIN, blur_sigma=sigma)], images, BLUR_ONLY)[0].numpy()
    assert np.abs(ours - expected).mean() < 1 and np.abs(ours - expected).max() < 16


@pytest.mark.parametrize("augmentation", [moco_v1(), moco_v2()])
def test_views_are_those_of_a_worker_before_it_rounds(augmentation: Augmentation) -> None:
    image = Image.fromarray(pixels(1, 90)[0].permute(1, 2, 0).numpy())
    views = [draw_view(augmentation, stream(0, "view", i), 90, 90) for i in range(48)]
    crops = torch.stack(crop_views(image, views, 20))
    alone = [finish_view(crop, v, augmentation.colour_order) for crop, v in zip(crops, views, strict=True)]
    together = 255 * finish(views, crops, augmentation)
    assert (together - torch.stack(alone)).abs().max() < 0.5 + 1e-3


def test_rows_are_independent_and_may_change_places() -> None:
    views = [draw_view(moco_v2(), stream(0, "view", i), 24, 24) for i in range(16)]
    images, order = pixels(16), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    straight = finish(views, images, moco_v2())
    moved = finish([views[i] for i in order], images[order], moco_v2())
    torch.testing.assert_close(moved, straight[order], rtol=0, atol=1e-6)


def test_without_parameters_pixels_are_only_normalised() -> None:
    images = pixels(3)
    ours = finish_views(Crops(images, None), moco_v2(), IMAGENET_MEAN, IMAGENET_STD)
    expected = tvf.normalize(images / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)


def test_the_host_never_looks_at_a_value_and_so_never_waits_for_the_device() -> None:
    # Tensors of the device "meta" have no values: to look at one is an error.
    crops = Crops(pixels(4).to("meta"), torch.zeros(4, 11, device="meta"))
    for augmentation in (moco_v1(), moco_v2()):
        ours = finish_views(crops, augmentation, IMAGENET_MEAN, IMAGENET_STD)
        assert ours.shape == (4, 3, 24, 24) and ours.device.type == "meta"


@pytest.mark.cuda
def test_a_gpu_gives_what_the_cpu_gives_and_does_not_synchronise() -> None:
    views = [draw_view(moco_v2(), stream(0, "view", i), 24, 24) for i in range(16)]
    images, rows = pixels(16), torch.tensor([view.row() for view in views])
    expected = finish_views(Crops(images, rows), moco_v2(), IMAGENET_MEAN, IMAGENET_STD)
    crops = Crops(images.cuda(), rows.cuda())
    finish_views(crops, moco_v2(), IMAGENET_MEAN, IMAGENET_STD)  # sends its constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = finish_views(crops, moco_v2(), IMAGENET_MEAN, IMAGENET_STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    views = [draw_view(moco_v2(), stream(0, "view", i), 24, 24) for i in range(8)]
    crops = Crops(pixels(8), torch.tensor([view.row() for view in views]))
    compiled = torch.compile(finish_views, fullgraph=True)
    settings = moco_v2(), IMAGENET_MEAN, IMAGENET_STD
    torch.testing.assert_close(compiled(crops, *settings), finish_views(crops, *settings), rtol=0, atol=1e-4)
