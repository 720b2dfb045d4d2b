"""What decides the weights: one frozen `Recipe` per model, complete, with its source.

A recipe and the model it makes have one name. Facts of the machine (paths, workers, precision, micro-batch)
are arguments of `train`, not of a recipe. Variants are `dataclasses.replace`, or `--set field=value`.
This file imports nothing heavy, so that listing recipes is instant.
"""

import ast
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mocohub.errors import unknown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How views are drawn. The defaults are MoCo v1's (arXiv 1911.05722, section 3.3)."""

    crop_scale_min: float = 0.2  # smallest area of a crop / area of the image
    crop_ratio_max: float = 4 / 3  # longest side / shortest side of a crop, before it is made square
    jitter_probability: float = 1.0
    brightness: float = 0.4  # factor drawn from 1 - b .. 1 + b
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.4  # shift in turns of the colour circle, -h .. h
    grey_probability: float = 0.2
    colour_order: Literal["grey_first", "jitter_first"] = "grey_first"
    blur_probability: float = 0.0
    blur_sigma_min: float = 0.1  # px, standard deviation of the Gaussian
    blur_sigma_max: float = 2.0
    flip_probability: float = 0.5
    rotation_deg: float = 0.0  # angle drawn from -r .. r; not in the papers, for images without an upright
    shear_deg: float = 0.0  # horizontal slant likewise, for handwriting


def moco_v1() -> Augmentation:
    """Return the augmentation of MoCo v1, "as InstDisc": greyscale before colour jitter, no blur."""
    return Augmentation()


def moco_v2() -> Augmentation:
    """Return the augmentation of MoCo v2 (arXiv 2003.04297): weaker hue, jitter before greyscale, blur."""
    return Augmentation(jitter_probability=0.8, hue=0.1, colour_order="jitter_first", blur_probability=0.5)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that changes the weights. The defaults are MoCo v1's on ImageNet (arXiv 1911.05722, 3.3)."""

    backbone: str = "r50"  # a key of mocohub.backbones.BACKBONES
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # timm arguments that reshape it
    head: Literal["linear", "mlp"] = "linear"
    embed_dim: int = 128
    queue_size: int = 65536
    key_momentum: float = 0.999
    temperature: float = 0.07
    augmentation: Augmentation = Augmentation()
    crop_px: int = 224
    eval_crop_pct: float = 0.875  # crop_px / shorter side of the resized image at evaluation
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    epochs: int = 200
    global_batch_size: int = 256  # over all processes
    bn_group_size: int = 32  # images that share batch-norm statistics: the paper's images per GPU
    base_lr: float = 0.03  # at this recipe's batch size; never rescaled
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_drop_epochs: tuple[int, ...] = (120, 160)  # x0.1 at each, for "step"
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4  # on all parameters, batch norm and biases included
    seed: int = 0

    def lr(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; constant within it, no warm-up, as the authors' code."""
        if self.lr_schedule == "cosine":
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.base_lr * 0.1 ** sum(epoch >= drop for drop in self.lr_drop_epochs)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Recipe":
        """The inverse of `to_json`."""
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**(fields | {"augmentation": Augmentation(**fields["augmentation"])}))


def moco_r50_in1m() -> Recipe:
    """MoCo v1, ResNet-50, ImageNet-1k, 200 epochs.

    Source: arXiv 1911.05722, section 3.3 and 4. Published linear top-1: 60.6 (60.8 +- 0.2 over 5 runs of the
    authors' code). Published cost: about 53 h on 8 V100.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py moco_r50_in1m --data train --out runs/v1
    """
    return Recipe(augmentation=moco_v1())


def mocov2_r50_in1m() -> Recipe:
    """MoCo v2, ResNet-50, ImageNet-1k, 200 epochs.

    Source: arXiv 2003.04297, table 1. Published linear top-1: 67.5 (67.5 +- 0.1 over 5 runs of the
    authors' code). Published cost: about 53 h on 8 V100.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py mocov2_r50_in1m --data train --out runs/v2
    """
    return Recipe(head="mlp", temperature=0.2, augmentation=moco_v2(), lr_schedule="cosine")


def mocov2_r50_in1m_800ep() -> Recipe:
    """MoCo v2, ResNet-50, ImageNet-1k, 800 epochs.

    Source: arXiv 2003.04297, table 1. Published linear top-1: 71.1. Cost: four times that of 200 epochs.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py mocov2_r50_in1m_800ep --data train --out runs/v2
    """
    return dataclasses.replace(mocov2_r50_in1m(), epochs=800)


def moco_r50w2x_in1m() -> Recipe:
    """MoCo v1, ResNet-50 of twice the width, ImageNet-1k, 200 epochs.

    Source: arXiv 1911.05722, table 1. Published linear top-1: 65.4. Cost: about 4 times that of R50.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py moco_r50w2x_in1m --data train --out runs/w2x
    """
    return dataclasses.replace(moco_r50_in1m(), backbone="r50w2x")


def moco_r50w4x_in1m() -> Recipe:
    """MoCo v1, ResNet-50 of four times the width, ImageNet-1k, 200 epochs.

    Source: arXiv 1911.05722, table 1. Published linear top-1: 68.6. Cost: about 16 times that of R50.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py moco_r50w4x_in1m --data train --out runs/w4x
    """
    return dataclasses.replace(moco_r50_in1m(), backbone="r50w4x")


def moco_rx50_in1m() -> Recipe:
    """MoCo v1, ResNeXt-50 32x8d, ImageNet-1k, 200 epochs.

    Source: arXiv 1911.05722, table 1. Cost: about twice that of R50.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py moco_rx50_in1m --data train --out runs/rx50
    """
    return dataclasses.replace(moco_r50_in1m(), backbone="rx50")


def moco_r18_cifar10() -> Recipe:
    """MoCo, ResNet-18 with a 3x3 stem, CIFAR-10, 200 epochs.

    Source: the authors' CIFAR notebook: asymmetric loss, batch norm split in 8, kNN monitor k = 200, T = 0.1.
    Published kNN top-1: 82.6 (86.3 at 400 epochs, 88.7 at 800).
    Command: mocohub pretrain moco_r18_cifar10 --data cifar10/train --out runs/cifar10 --device cuda
    """
    return Recipe(
        backbone="r18cifar",
        queue_size=4096,
        key_momentum=0.99,
        temperature=0.1,
        augmentation=dataclasses.replace(moco_v2(), crop_scale_min=0.08, blur_probability=0.0),
        crop_px=32,
        eval_crop_pct=1.0,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        epochs=200,
        global_batch_size=512,
        bn_group_size=64,
        base_lr=0.06,
        lr_schedule="cosine",
        weight_decay=5e-4,
    )


def moco_tiny_cifar10() -> Recipe:
    """`moco_r18_cifar10` for two CPU cores: an eighth of the network, 20 epochs, milder crops.

    Command: mocohub pretrain moco_tiny_cifar10 --data cifar10/train --out runs/tiny
    """
    recipe = moco_r18_cifar10()
    return dataclasses.replace(
        recipe,
        backbone="r18tiny",
        augmentation=dataclasses.replace(recipe.augmentation, crop_scale_min=0.2),
        epochs=20,
        global_batch_size=256,
        bn_group_size=64,
    )


def moco_tiny_photos() -> Recipe:
    """A few thousand photos of one's own at 64 px: a look at what MoCo makes of them, in minutes on a CPU.

    Command: mocohub demo --data FOLDER
    """
    return Recipe(
        backbone="r18",
        queue_size=2048,
        key_momentum=0.995,
        temperature=0.07,
        augmentation=moco_v2(),
        crop_px=64,
        epochs=10,
        global_batch_size=64,
        bn_group_size=32,
        base_lr=0.03,
        lr_schedule="cosine",
        weight_decay=5e-4,
    )


def moco_tiny_digits() -> Recipe:
    """Grey scans of 8 px, as scikit-learn's digits: what `mocohub demo` runs. No colours, no mirror images.

    Command: mocohub demo
    """
    return Recipe(
        backbone="r18tiny",
        queue_size=1024,
        key_momentum=0.995,
        temperature=0.07,
        augmentation=Augmentation(
            crop_scale_min=0.4,
            saturation=0.0,
            hue=0.0,
            grey_probability=0.0,
            flip_probability=0.0,
            rotation_deg=15.0,
            shear_deg=25.0,
        ),
        crop_px=16,
        eval_crop_pct=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        epochs=40,
        global_batch_size=64,
        bn_group_size=32,
        base_lr=0.06,
        lr_schedule="cosine",
        weight_decay=5e-4,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        moco_r50_in1m,
        mocov2_r50_in1m,
        mocov2_r50_in1m_800ep,
        moco_r50w2x_in1m,
        moco_r50w4x_in1m,
        moco_rx50_in1m,
        moco_r18_cifar10,
        moco_tiny_cifar10,
        moco_tiny_photos,
        moco_tiny_digits,
    )
}


def recipe_by_name(name: str) -> Recipe:
    """Return a named recipe.

    Raises:
        ValueError: If there is none of that name; the message lists all, the closest first.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """Return a recipe with fields set from text.

    Args:
        recipe: To start from.
        overrides: "field=value" or "augmentation.field=value", as on the command line.

    Raises:
        ValueError: If a field is unknown, or a value is not of the field's kind.
    """
    for setting in overrides:
        field, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: expected field=value, for instance --set epochs=1.")
        recipe = _replace(recipe, field, text)
    return recipe


def _replace(target: Any, path: str, text: str) -> Any:
    field, _, rest = path.partition(".")
    current = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
    if field not in current:
        raise unknown("recipe field", field, current)
    old = current[field]
    if rest and not dataclasses.is_dataclass(old):
        raise ValueError(f"--set {path}: {field} has no fields. Set it as a whole, now {old!r}.")
    if dataclasses.is_dataclass(old) and not rest:
        raise ValueError(f"--set {path}: set one of its fields, for instance {path}.crop_scale_min=0.2.")
    new = _replace(old, rest, text) if rest else _parse(path, text, old)
    return dataclasses.replace(target, **{field: new})


def _parse(path: str, text: str, old: Any) -> Any:
    """Read a value of the kind the field holds now."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, (int, float, list, tuple)):
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if type(value) is not type(old):
        raise ValueError(f"--set {path}={text}: expected a value like {old!r} ({type(old).__name__}).")
    return value


def check(recipe: Recipe, num_images: int, world_size: int = 1, micro_batch_size: int | None = None) -> None:
    """Refuse, before anything expensive, a recipe that cannot or should not run on this data and machine.

    Args:
        recipe: To be checked.
        num_images: Of the training set.
        world_size: Number of processes.
        micro_batch_size: Images of one process in a forward pass, or None for all of its batch.

    Raises:
        ValueError: With the setting, its value, what is accepted and what to change.
    """
    r, a = recipe, recipe.augmentation
    integers = ("embed_dim", "queue_size", "crop_px", "epochs", "global_batch_size")
    for name in (*integers, "temperature", "base_lr"):
        if getattr(r, name) <= 0:
            raise ValueError(f"{name} ({getattr(r, name)}) must be positive.")
    shares = {
        "key_momentum": r.key_momentum,
        "sgd_momentum": r.sgd_momentum,
        "eval_crop_pct": r.eval_crop_pct,
    }
    shares |= {f"augmentation.{name}": getattr(a, name) for name in dir(a) if name.endswith("probability")}
    shares |= {f"augmentation.{name}": getattr(a, name) for name in ("brightness", "contrast", "saturation")}
    for name, value in {**shares, "augmentation.crop_scale_min": a.crop_scale_min}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} ({value}) must lie in 0..1.")
    if not 0 <= a.hue <= 0.5:
        raise ValueError(f"augmentation.hue ({a.hue}) must lie in 0..0.5, in turns of the colour circle.")
    if r.weight_decay < 0:
        raise ValueError(f"weight_decay ({r.weight_decay}) must not be negative.")
    if len(r.mean) != 3 or len(r.std) != 3 or min(r.std) <= 0:
        raise ValueError(f"mean {r.mean} and std {r.std} must be three numbers each, std positive.")
    for name, value, accepted in (
        ("lr_schedule", r.lr_schedule, ("step", "cosine")),
        ("head", r.head, ("linear", "mlp")),
        ("augmentation.colour_order", a.colour_order, ("grey_first", "jitter_first")),
    ):
        if value not in accepted:
            raise unknown(name, value, accepted)
    if num_images < r.global_batch_size:
        raise ValueError(
            f"{num_images} image{'s are' if num_images != 1 else ' is'} fewer than one batch: "
            f"global_batch_size is {r.global_batch_size}. Give more images, or --set global_batch_size=N."
        )
    if num_images <= r.queue_size:
        raise ValueError(
            f"queue_size ({r.queue_size}) must be smaller than the number of images ({num_images}): a longer "
            "queue holds older keys of the query's own image as negatives. "
            f"Use --set queue_size={1 << max(0, (num_images // 2).bit_length() - 1)} or less."
        )
    if r.global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size ({r.global_batch_size}) must be a multiple of the {world_size} processes."
        )
    local = r.global_batch_size // world_size
    micro = local if micro_batch_size is None else micro_batch_size
    for name, size, least, whole, whose in (
        ("micro_batch_size", micro, 1, local, "the batch of one process"),
        ("bn_group_size", r.bn_group_size, 2, micro, "the images of one forward pass"),
    ):
        if size < least or whole % size:
            divisors = ", ".join(str(d) for d in range(least, whole + 1) if whole % d == 0)
            raise ValueError(f"{name} ({size}) must divide {whose} ({whole}). Choose one of: {divisors}.")
