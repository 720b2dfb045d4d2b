"""Random views of an image, as data: parameters are drawn first, pixels are changed second.

A view is cropped, resized and slanted as 8-bit pixels. What follows (colours, blur, mirror image) is computed
here for one image on the CPU and in augment_batch.py for many on their device, with one meaning:
torchvision's operations on float tensors, in the order the authors' code applies them.

Unlike facebookresearch/moco: their operations are Pillow's, which round to 8 bits after each, hold the hue in
256 steps and blur by three box filters. Here nothing is rounded before the end and the blur is a Gaussian.
"""

from dataclasses import dataclass
from math import ceil, exp, floor, log
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine

from mocohub.pretrain.recipe import Augmentation

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
BLUR_REACH = 4  # standard deviations on either side that the blur takes in: all but 6e-5 of the weight
_OWN_HUES = np.array([0, 1 / 3, 2 / 3], np.float32)[:, None, None]  # of red, green and blue, in turns


class Crops(NamedTuple):
    """Crops of N images, and what remains to be done to each. Rows of both travel together.

    Attributes:
        pixels: (N, 3, crop_px, crop_px) uint8.
        parameters: (N, 11) float32, the `View.row` of each; None if nothing remains but to normalise.
    """

    pixels: Tensor
    parameters: Tensor | None


@dataclass(frozen=True)
class View:
    """The parameters of one view."""

    top: int
    left: int
    height: int
    width: int
    jitter: tuple[tuple[str, float], ...]  # (operation, factor) in the order they are applied
    grey: bool
    blur_sigma: float | None
    flip: bool
    angle_deg: float
    shear_deg: float

    def row(self) -> list[float]:
        """What `finish_view` does, as 11 numbers.

        Four operations (0: none, else 1 + the position in OPERATIONS), their four factors, whether grey, the
        sigma of the blur (0: none), and whether mirrored.
        """
        operations = [1.0 + OPERATIONS.index(name) for name, _ in self.jitter]
        factors = [factor for _, factor in self.jitter]
        none = [0.0] * (4 - len(operations))
        return [*operations, *none, *factors, *none, self.grey, self.blur_sigma or 0.0, self.flip]


def draw_view(augmentation: Augmentation, random: np.random.Generator, width: int, height: int) -> View:
    """Draw the parameters of one view.

    Args:
        augmentation: The distribution.
        random: The stream of this view.
        width: Of the image, px.
        height: Of the image, px.
    """
    a = augmentation
    top, left, crop_height, crop_width = _draw_crop(random, a.crop_scale_min, a.crop_ratio_max, width, height)
    jitter = ()
    if random.random() < a.jitter_probability:
        # Every factor is drawn even where its range is empty, so that one setting does not move the others.
        factors = {
            "brightness": _uniform(random, 1 - a.brightness, 1 + a.brightness),
            "contrast": _uniform(random, 1 - a.contrast, 1 + a.contrast),
            "saturation": _uniform(random, 1 - a.saturation, 1 + a.saturation),
            "hue": _uniform(random, -a.hue, a.hue),
        }
        names = [list(factors)[i] for i in random.permutation(4)]
        jitter = tuple((name, factors[name]) for name in names if getattr(a, name) > 0)
    grey = random.random() < a.grey_probability
    sigma = _uniform(random, a.blur_sigma_min, a.blur_sigma_max)
    blurred = random.random() < a.blur_probability
    return View(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        jitter=jitter,
        grey=grey,
        blur_sigma=sigma if blurred else None,
        flip=random.random() < a.flip_probability,
        angle_deg=_uniform(random, -a.rotation_deg, a.rotation_deg),
        shear_deg=_uniform(random, -a.shear_deg, a.shear_deg),
    )


def _draw_crop(
    random: np.random.Generator, scale_min: float, ratio_max: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width), drawn as torchvision's RandomResizedCrop does."""
    area = width * height
    for _ in range(10):
        target = area * _uniform(random, scale_min, 1)
        ratio = exp(_uniform(random, -log(ratio_max), log(ratio_max)))
        w, h = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    ratio = min(max(width / height, 1 / ratio_max), ratio_max)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniform(random: np.random.Generator, low: float, high: float) -> float:
    """What `random.uniform(low, high)` returns, in a fifth of the time."""
    return low + (high - low) * random.random()


def crop_views(
    image: Image.Image, views: list[View], crop_px: int, shrink: int = 1, mode: str = "bilinear"
) -> list[Tensor]:
    """Cut, resize, turn and slant views of one image; return uint8 (3, crop_px, crop_px) for each.

    The resize is antialiased, as Pillow's, to one level.

    Args:
        image: RGB.
        views: Drawn for the image as it was before it was shrunk.
        crop_px: Side of the results.
        shrink: 1, or by how much the image was shrunk as it was decoded (`mocohub.images.open_image`).
        mode: Of the resize, "bilinear" or "bicubic".
    """
    if shrink > 1 or any(view.angle_deg or view.shear_deg for view in views):
        return [_crop_by_pillow(image, view, crop_px, shrink, mode) for view in views]
    pixels = np.asarray(image)
    crops = []
    for view in views:  # torch resizes in a third of Pillow's time
        part = pixels[view.top : view.top + view.height, view.left : view.left + view.width].copy()
        part = torch.from_numpy(part).permute(2, 0, 1)[None]  # (1, 3, h, w), in memory (h, w, 3)
        crops.append(F.interpolate(part, (crop_px, crop_px), mode=mode, antialias=True)[0].contiguous())
    return crops


def _crop_by_pillow(image: Image.Image, view: View, crop_px: int, shrink: int, mode: str) -> Tensor:
    """Crop at edges that may lie between two pixels of the shrunk image."""
    edges = (view.left, view.top, view.left + view.width, view.top + view.height)
    left, top, right, bottom = (edge / shrink for edge in edges)
    x, y = floor(left), floor(top)
    part = image.crop((x, y, ceil(right), ceil(bottom)))
    box = (left - x, top - y, right - x, bottom - y)
    crop = part.resize((crop_px, crop_px), Image.Resampling[mode.upper()], box=box)
    if view.angle_deg or view.shear_deg:
        shear = [view.shear_deg, 0.0]
        crop = affine(crop, view.angle_deg, [0, 0], 1.0, shear, InterpolationMode.BILINEAR)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def finish_view(crop: Tensor, view: View, colour_order: str) -> Tensor:
    """Jitter, grey, blur and mirror one view, uint8 (3, S, S) to the same, rounded once at the end.

    Args:
        crop: Of `crop_views`.
        view: Its parameters.
        colour_order: "grey_first" (v1) or "jitter_first" (v2).
    """
    if view.jitter or view.grey or view.blur_sigma is not None:
        x = crop.numpy() * np.float32(1 / 255)
        for operation in ("grey", "jitter") if colour_order == "grey_first" else ("jitter", "grey"):
            if operation == "grey" and view.grey:
                x = _grey(x)[None].repeat(3, axis=0)
            elif operation == "jitter":
                for name, factor in view.jitter:
                    x = _JITTER[name](x, factor)
        if view.blur_sigma is not None:
            x = _blur(x, view.blur_sigma)
        crop = torch.from_numpy((x * 255 + 0.5).astype(np.uint8))
    return crop.flip(-1) if view.flip else crop


def _grey(x: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) of (3, H, W), as (H, W)."""
    r, g, b = x
    return r * LUMA[0] + g * LUMA[1] + b * LUMA[2]


def _blend(x: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    """Go from `other` towards `x` and, with a factor above 1, beyond it."""
    x = x * factor
    x += other * (1 - factor)
    return x.clip(0, 1, out=x)


def _shift_hue(x: np.ndarray, turns: float) -> np.ndarray:
    """Turn the hue of RGB colours in 0..1, (3, H, W), at equal HSV saturation and value.

    With c = max - min, the hue is 1 + (g + b - r - min) / c sixths of a turn, with the sign of g - b. A
    channel is min + c * clip(2 - 6 d, 0, 1), where d is the distance of the hue, in turns, from the channel's
    own: 0 for red, 1/3 for green, 2/3 for blue. Both are the usual six cases in one expression.
    """
    r, g, b = x
    least = np.minimum(np.minimum(r, g), b)
    chroma = np.maximum(np.maximum(r, g), b) - least
    hue = (g + b - r - least) / np.maximum(chroma, 1e-8)
    hue += 1
    hue = np.copysign(hue, g - b) * (1 / 6) + turns
    distance = hue - _OWN_HUES
    distance -= np.rint(distance)
    np.abs(distance, out=distance)
    x = (1 / 3 - distance).clip(0, 1 / 6)
    x *= 6 * chroma
    x += least
    return x


_JITTER = {
    "brightness": lambda x, factor: _blend(x, 0.0, factor),
    "contrast": lambda x, factor: _blend(x, float(x.mean((1, 2)) @ LUMA), factor),
    "saturation": lambda x, factor: _blend(x, _grey(x), factor),
    "hue": _shift_hue,
}


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (3, H, W) whose edge pixels go on outside, as in Pillow."""
    radius = ceil(BLUR_REACH * sigma)
    weights = [exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    blurred = torch.from_numpy(x)  # whose sums are twice as fast
    for dim in (1, 2):
        padding = (radius, radius, 0, 0) if dim == 2 else (0, 0, radius, radius)
        padded = F.pad(blurred[None], padding, mode="replicate")[0]
        blurred = torch.zeros_like(blurred)
        for k, weight in enumerate(weights):
            blurred.add_(padded.narrow(dim, k, x.shape[dim]), alpha=weight / sum(weights))
    return blurred.numpy()
