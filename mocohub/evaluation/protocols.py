"""The papers' protocols of linear classification on images, each as data with its source.

A protocol trains a linear classifier on the pooled features of a frozen backbone, with its own random crops
and flips. Numbers of one protocol must not be set beside those of another. Nothing heavy is imported here.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mocohub.errors import unknown


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """Everything that decides the classifier, but for the seed. The defaults are what all three share."""

    name: str
    source: str
    epochs: int  # passes over the training images
    global_batch_size: int  # over all processes; the last batch of an epoch takes what is left
    base_lrs: tuple[float, ...]  # at 256 images a step; one classifier is trained with each, all at once
    lr_schedule: Literal["step", "cosine_epoch", "cosine_step"]  # the last moves with every step
    lr_drop_epochs: tuple[int, ...] = ()  # x0.1 at each, for "step"
    sgd_momentum: float = 0.9
    weight_decay: float = 0.0
    weight_std: float = 0.01  # of the initial weights, normal around 0; biases begin at 0
    crop_px: int = 224  # side of training and validation crops
    crop_scale_min: float = 0.08  # smallest area of a training crop / area of the image
    crop_ratio_max: float = 4 / 3  # longest side / shortest side of a training crop before it is made square
    flip_probability: float = 0.5
    resize_px: int = 256  # shorter side of a validation image before its centre is cut out
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    reported: Literal["best_epoch", "last_epoch"] = "best_epoch"  # which validation the authors report

    def lrs(self, step: int, steps_per_epoch: int) -> list[float]:
        """Learning rate of each classifier in a step, counted from 0."""
        epoch = step // steps_per_epoch
        if self.lr_schedule == "step":
            factor = 0.1 ** sum(epoch >= drop for drop in self.lr_drop_epochs)
        else:
            passed = epoch / self.epochs
            if self.lr_schedule == "cosine_step":
                passed = step / (self.epochs * steps_per_epoch)
            factor = 0.5 * (1 + math.cos(math.pi * passed))
        # Unlike facebookresearch/moco: there --lr is the learning rate whatever the batch is, and who
        # changes the batch must change it as well. Here it always follows, as in moco-v3 and DINOv2.
        return [base_lr * self.global_batch_size / 256 * factor for base_lr in self.base_lrs]

    def changes(self) -> list[str]:
        """What differs from the protocol of this name, for instance ["epochs 10"]."""
        return [
            f"{field.name} {_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(PROTOCOLS[self.name], field.name)
        ]

    def text(self) -> str:
        """The protocol in a line, with what was changed."""
        lr = f"lr {_text(self.base_lrs)}"
        if len(self.base_lrs) > 1:
            lr = f"{len(self.base_lrs)} lrs {min(self.base_lrs):g} to {max(self.base_lrs):g}"
        schedule = {"cosine_epoch": "cosine by epoch", "cosine_step": "cosine by step"}.get(self.lr_schedule)
        schedule = schedule or f"x0.1 at {_text(self.lr_drop_epochs)}"
        changed = self.changes()
        return (
            f"{self.name} linear protocol ({self.source}): frozen backbone, random resized crops and flips, "
            f"SGD {lr} x batch / 256, {schedule}, weight decay {self.weight_decay:g}, "
            f"{self.epochs} epochs, batch {self.global_batch_size}"
            + (f" (changed: {', '.join(changed)})" if changed else "")
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


# MoCo v1 and v2: arXiv 1911.05722, section 4.1; facebookresearch/moco, main_lincls.py.
MOCO = LinearProtocol(
    name="moco",
    source="arXiv 1911.05722",
    epochs=100,
    global_batch_size=256,
    base_lrs=(30.0,),
    lr_schedule="step",
    lr_drop_epochs=(60, 80),
)

# MoCo v3: arXiv 2104.02057; facebookresearch/moco-v3, main_lincls.py and CONFIG.md. Its ViTs take lr 3.
MOCOV3 = LinearProtocol(
    name="mocov3",
    source="arXiv 2104.02057",
    epochs=90,
    global_batch_size=1024,
    base_lrs=(0.1,),
    lr_schedule="cosine_epoch",
)

# DINOv2: arXiv 2304.07193; facebookresearch/dinov2, dinov2/eval/linear.py and dinov2/data/transforms.py.
# Its 12,500 steps of 128 images on each of 8 GPUs are 10 epochs of ImageNet. It chooses among the learning
# rates by the very validation images that it reports, after the last step; so do we, to be comparable.
# Unlike facebookresearch/dinov2: there each learning rate is also tried on the class token of the last block
# or the last 4, with and without the mean of the patches, which only ViTs have; here on the pooled features.
DINOV2 = LinearProtocol(
    name="dinov2",
    source="arXiv 2304.07193",
    epochs=10,
    global_batch_size=1024,
    base_lrs=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    lr_schedule="cosine_step",
    interpolation="bicubic",
    reported="last_epoch",
)

PROTOCOLS = {protocol.name: protocol for protocol in (MOCO, MOCOV3, DINOV2)}


def protocol_by_name(
    name: str,
    *,
    epochs: int | None = None,
    global_batch_size: int | None = None,
    base_lrs: Sequence[float] = (),
) -> LinearProtocol:
    """Return a named protocol, with what is given changed.

    Args:
        name: A key of `PROTOCOLS`.
        epochs: Drops of the learning rate move along: 60 and 80 of 100 become 6 and 8 of 10.
        global_batch_size: Learning rates follow it in proportion.
        base_lrs: At 256 images a step, in place of the protocol's; of several, one classifier each.

    Raises:
        ValueError: If there is none of that name, or a number is not positive.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    changes: dict[str, Any] = {}
    if epochs is not None:
        drops = tuple(-(-drop * epochs // protocol.epochs) for drop in protocol.lr_drop_epochs)
        changes |= {"epochs": epochs, "lr_drop_epochs": drops}
    if global_batch_size is not None:
        changes["global_batch_size"] = global_batch_size
    if base_lrs:
        changes["base_lrs"] = tuple(base_lrs)
    changed = dataclasses.replace(protocol, **changes)
    check(changed)
    return changed


def check(protocol: LinearProtocol) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: If the name is not one of `PROTOCOLS`, or a number is out of range.
    """
    p = protocol
    if p.name not in PROTOCOLS:
        raise unknown("protocol", p.name, PROTOCOLS)
    for name in ("epochs", "global_batch_size", "crop_px"):
        if getattr(p, name) < 1:
            raise ValueError(f"{name} ({getattr(p, name)}) must be at least 1.")
    for name, least, most in (
        ("sgd_momentum", 0, 1),
        ("weight_decay", 0, math.inf),
        ("weight_std", 0, math.inf),
        ("crop_scale_min", 0, 1),
        ("crop_ratio_max", 1, math.inf),
        ("flip_probability", 0, 1),
    ):
        if not least <= getattr(p, name) <= most:
            raise ValueError(f"{name} ({getattr(p, name)}) must be between {least} and {most}.")
    if not p.base_lrs or not all(0 < lr < math.inf for lr in p.base_lrs):
        raise ValueError(f"base_lrs {p.base_lrs} must be one or more positive numbers.")
    if p.resize_px < p.crop_px:
        raise ValueError(f"resize_px ({p.resize_px}) must not be smaller than crop_px ({p.crop_px}).")
    for name, accepted in (
        ("lr_schedule", ("step", "cosine_epoch", "cosine_step")),
        ("interpolation", ("bilinear", "bicubic")),
        ("reported", ("best_epoch", "last_epoch")),
    ):
        if getattr(p, name) not in accepted:
            raise unknown(name, getattr(p, name), accepted)


def fitted(protocol: LinearProtocol, data_config: dict[str, Any]) -> LinearProtocol:
    """Return the protocol as a model can take it.

    The protocols were written for 224 px. For a backbone of another input size, crops have that size, and
    validation images are resized as the model's own evaluation does it: `changes` will say so. Resizing a
    32 px CIFAR image to 224 px would be another protocol too, at fifty times the cost.

    Args:
        protocol: To be fitted; if its `crop_px` was changed, it is taken as it is.
        data_config: The model's preprocessing, of `mocohub.features.model.data_config`.

    Raises:
        ValueError: If the model does not take square images.
    """
    _, height, width = data_config["input_size"]
    if height != width:
        raise ValueError(f"The model takes {width} x {height} px, but linear protocols crop squares.")
    if width == protocol.crop_px or protocol.crop_px != PROTOCOLS[protocol.name].crop_px:
        return protocol
    resize_px = math.floor(width / data_config["crop_pct"] + 1e-6)
    interpolation = data_config["interpolation"]
    if interpolation not in ("bilinear", "bicubic"):
        interpolation = protocol.interpolation
    return dataclasses.replace(protocol, crop_px=width, resize_px=resize_px, interpolation=interpolation)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(_text(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
