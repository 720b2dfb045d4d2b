"""Random views of an image, as data: parameters are drawn first, pixels are changed second.

The operations are torchvision's on PIL images, in the order the authors' code applies them.
"""

from dataclasses import dataclass
from math import exp, log

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocohub.pretrain.recipes import Augmentation

_BILINEAR = InterpolationMode.BILINEAR


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
            "brightness": random.uniform(1 - a.brightness, 1 + a.brightness),
            "contrast": random.uniform(1 - a.contrast, 1 + a.contrast),
            "saturation": random.uniform(1 - a.saturation, 1 + a.saturation),
            "hue": random.uniform(-a.hue, a.hue),
        }
        names = [list(factors)[i] for i in random.permutation(4)]
        jitter = tuple((name, float(factors[name])) for name in names if getattr(a, name) > 0)
    grey = random.random() < a.grey_probability
    sigma = random.uniform(a.blur_sigma_min, a.blur_sigma_max)
    blurred = random.random() < a.blur_probability
    return View(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        jitter=jitter,
        grey=bool(grey),
        blur_sigma=float(sigma) if blurred else None,
        flip=bool(random.random() < a.flip_probability),
        angle_deg=float(random.uniform(-a.rotation_deg, a.rotation_deg)),
        shear_deg=float(random.uniform(-a.shear_deg, a.shear_deg)),
    )


def _draw_crop(
    random: np.random.Generator, scale_min: float, ratio_max: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width), drawn as torchvision's RandomResizedCrop does."""
    area = width * height
    for _ in range(10):
        target = area * random.uniform(scale_min, 1)
        ratio = exp(random.uniform(-log(ratio_max), log(ratio_max)))
        w, h = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    ratio = min(max(width / height, 1 / ratio_max), ratio_max)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


_JITTER = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def render_view(image: Image.Image, view: View, crop_px: int, colour_order: str) -> Tensor:
    """Return the pixels of a view, uint8 (3, crop_px, crop_px).

    Args:
        image: RGB.
        view: Parameters drawn for an image of this size.
        crop_px: Side of the result; the crop is resized bilinearly with antialiasing.
        colour_order: "grey_first" (v1) or "jitter_first" (v2).
    """
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    image = image.crop(box).resize((crop_px, crop_px), Image.Resampling.BILINEAR)
    if view.angle_deg or view.shear_deg:
        image = F.affine(image, view.angle_deg, [0, 0], 1.0, [view.shear_deg, 0.0], _BILINEAR)
    for operation in ("grey", "jitter") if colour_order == "grey_first" else ("jitter", "grey"):
        if operation == "grey" and view.grey:
            image = F.to_grayscale(image, num_output_channels=3)
        elif operation == "jitter":
            for name, factor in view.jitter:
                image = _JITTER[name](image, factor)
    if view.blur_sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(view.blur_sigma))  # Pillow's radius is the sigma
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
