"""What is done to an image before the network: its transform, what tells it from others, several views."""

import hashlib
import inspect
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from mocohub.hub.load import transform as load_transform

CROPS = (1, 5)


class FiveCrops:
    """A transform that crops an image at its corners and its centre, where the one it is made of crops once.

    With the mirror images (`flip`) these are the ten crops of AlexNet (Krizhevsky et al. 2012, section 4.1).

    >>> steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]
    >>> FiveCrops(transforms.Compose(steps))(Image.new("RGB", (60, 40))).shape
    torch.Size([5, 3, 32, 32])
    """

    def __init__(self, transform: object) -> None:
        """Find the centre crop.

        Args:
            transform: From a PIL image to a tensor (C, H, W): a torchvision Compose with one CenterCrop, as
                those of timm's models are. What stands before the crop is done once, what stands after it to
                each crop.

        Raises:
            ValueError: If it is none.
        """
        steps = list(getattr(transform, "transforms", []))
        places = [
            i for i, step in enumerate(steps) if isinstance(step, transforms.CenterCrop | v2.CenterCrop)
        ]
        if len(places) != 1:
            raise ValueError(
                "crops=5 needs a transform that is a torchvision Compose with one CenterCrop, as those of "
                f"timm's models are, but it is {transform}. Give one that returns views (V, C, H, W), and "
                "omit crops."
            )
        at = places[0]
        self.before = transforms.Compose(steps[:at])
        self.crop = transforms.FiveCrop(tuple(steps[at].size))
        self.after = transforms.Compose(steps[at + 1 :])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the crops (5, C, H, W): top left, top right, bottom left, bottom right, centre."""
        return torch.stack([self.after(crop) for crop in self.crop(self.before(image))])

    def __str__(self) -> str:
        """All steps, for the record."""
        return str(transforms.Compose([*self.before.transforms, self.crop, *self.after.transforms]))


def own_transform(model: nn.Module, *, needed: bool) -> Callable[[Image.Image], torch.Tensor] | None:
    """Return the preprocessing of a model; None if it states none and none is needed.

    Raises:
        ValueError: If it states none, and one is needed.
    """
    if getattr(model, "pretrained_cfg", None):
        return load_transform(model)
    if needed:
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg, which states its preprocessing. "
            "Give transform=..., from a PIL image to a float tensor (C, H, W)."
        )
    return None


def resized_px(transform: Any) -> int:
    """Return how long the shorter side of an image has to be for what the transform does with it.

    Raises:
        ValueError: If it does not begin with a Resize of torchvision.
    """
    first = next(iter(getattr(transform, "transforms", [])), transform)
    if not isinstance(first, transforms.Resize | v2.Resize):
        raise ValueError(
            "fast_decode needs a transform that begins with torchvision.transforms.Resize, as those of "
            f"timm's models do, but it begins with {type(first).__name__}. Omit fast_decode."
        )
    return first.size if isinstance(first.size, int) else max(first.size)


def text_of(transform: Callable[[Image.Image], torch.Tensor] | None) -> str:
    """Return the steps of a transform, or its name, for the record."""
    text = getattr(transform, "__qualname__", str(transform))  # str of a function holds its address
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # so does that of most objects


def code_sha256(transform: Any) -> str | None:
    """SHA-256 of what a function does, which its name does not tell; None of an object, whose text does.

    Its code counts, with constants, defaults, and the numbers, texts and transforms it refers to outside.
    """
    if not isinstance(transform, FunctionType):
        return None
    return hashlib.sha256(repr(_told(transform)).encode("utf-8", "backslashreplace")).hexdigest()


def _told(value: Any) -> Any:
    """Return what is the same in each process, for `repr`."""
    if isinstance(value, FunctionType):
        names = inspect.getclosurevars(value)
        known = (int, float, str, tuple, nn.Module, transforms.Compose)
        outside = {**names.globals, **names.nonlocals}
        outside = sorted((name, _told(one)) for name, one in outside.items() if isinstance(one, known))
        return _told(value.__code__), _told(value.__defaults__), _told(value.__kwdefaults__), outside
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_told(constant) for constant in value.co_consts]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return text_of(value)
