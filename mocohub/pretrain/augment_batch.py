"""The second half of a view for a whole batch on its device: colours, blur, mirror image, normalisation.

The same operations as `augment.finish_view`, each image with parameters of its own. All images pass through
all operations of the recipe, with parameters that change nothing where none were drawn; so the host never
waits for the device.
"""

from functools import cache
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from mocohub.pretrain.augment import BLUR_REACH, LUMA, OPERATIONS, Crops
from mocohub.pretrain.recipe import Augmentation

_CONTRAST, _SATURATION, _HUE = (1 + OPERATIONS.index(name) for name in OPERATIONS[1:])


def finish_views(
    crops: Crops, augmentation: Augmentation, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Return the encoder's input, (N, 3, S, S) float32 in channels_last, on the crops' device.

    Args:
        crops: Pixels and parameters on one device. Without parameters, pixels are only normalised.
        augmentation: What the parameters were drawn from.
        mean: Per-channel mean of RGB in 0..1, subtracted.
        std: Per-channel standard deviation likewise.
    """
    x = crops.pixels / 255
    if crops.parameters is not None:
        x = _finish(x, crops.parameters, augmentation)
    device = x.device
    x = x.sub_(_channels(mean, device)).div_(_channels(std, device))
    return x.contiguous(memory_format=torch.channels_last)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel, (3, 1, 1), sent to a device once: each transfer would make the host wait."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def _finish(x: Tensor, parameters: Tensor, augmentation: Augmentation) -> Tensor:
    operations, factors, rest = parameters.split([4, 4, 3], dim=1)
    is_grey, sigma, flip = rest.unbind(1)  # (N,) each
    for operation in ("grey", "jitter") if augmentation.colour_order == "grey_first" else ("jitter", "grey"):
        if operation == "grey" and augmentation.grey_probability:
            x = torch.lerp(x, _grey(x), _images(is_grey))
        elif operation == "jitter" and augmentation.jitter_probability:
            x = _jitter(x, operations, factors)
    if augmentation.blur_probability:
        x = _blur(x, sigma, ceil(BLUR_REACH * augmentation.blur_sigma_max))
    if augmentation.flip_probability:
        x = torch.lerp(x, x.flip(-1), _images(flip))
    return x


def _jitter(x: Tensor, operations: Tensor, factors: Tensor) -> Tensor:
    """Apply up to four operations to each image, in its own order.

    The hue is costly and comes once in each image, but at any of the four places. So all images take the
    places before their hue, then their hue, then the places after it.

    Args:
        x: (N, 3, S, S) in 0..1.
        operations: (N, 4), as in `View.row`.
        factors: (N, 4).
    """
    is_hue = operations == _HUE
    before = is_hue.cumsum(1) == 0  # (N, 4)
    for place in range(3):
        x = _blend(x, operations[:, place], factors[:, place], before[:, place])
    x = _shift_hue(x, _images((factors * is_hue).sum(1)))
    for place in range(1, 4):
        x = _blend(x, operations[:, place], factors[:, place], ~before[:, place])
    return x


def _blend(x: Tensor, operation: Tensor, factor: Tensor, now: Tensor) -> Tensor:
    """Brightness, contrast and saturation are one operation: towards or away from black or some grey.

    Args:
        x: (N, 3, S, S) in 0..1.
        operation: (N,), as in `View.row`.
        factor: (N,).
        now: (N,) bool, which images take part.
    """
    now = now & (operation > 0) & (operation != _HUE)
    grey = _grey(x)
    towards = grey * _images(operation == _SATURATION)
    towards += grey.mean((2, 3), keepdim=True) * _images(operation == _CONTRAST)
    return torch.lerp(towards, x, _images(torch.where(now, factor, 1.0))).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """Luma of (N, 3, S, S), as (N, 1, S, S)."""
    r, g, b = x.split(1, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """As `augment._shift_hue`, (N, 3, S, S) by (N, 1, 1, 1)."""
    r, g, b = x.split(1, dim=1)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b) - least
    hue = ((g + b - r - least) / chroma.clamp_min(1e-8) + 1).copysign_(g - b) / 6 + turns
    distance = torch.cat([hue, hue - 1 / 3, hue - 2 / 3], dim=1)
    distance = (distance - distance.round()).abs_()
    return torch.addcmul(least, (1 / 3 - distance).clamp_(0, 1 / 6), 6 * chroma)


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of (N, 3, S, S), each image with its own sigma (N,) in px; 0 leaves it as it is."""
    num_images, _, size, _ = x.shape
    offset = torch.arange(-radius, radius + 1, device=x.device)
    sigma = sigma[:, None]
    weights = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-6)).square())  # (N, 2 * radius + 1)
    weights = weights * (offset.abs() <= torch.ceil(BLUR_REACH * sigma))
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(3, dim=0)  # (3 N, 2 * radius + 1)
    x = F.pad(x, (radius,) * 4, mode="replicate").view(1, 3 * num_images, *2 * (size + 2 * radius,))
    x = F.conv2d(x, weights[:, None, :, None], groups=3 * num_images)
    x = F.conv2d(x, weights[:, None, None, :], groups=3 * num_images)
    return x.view(num_images, 3, size, size)


def _images(values: Tensor) -> Tensor:
    """One number an image, (N,), to be broadcast over its pixels."""
    return values.view(-1, 1, 1, 1).float()
