"""What decides the weights: the fields of a frozen `Recipe`, how text changes them, which values can work.

Facts of the machine (paths, workers, precision, micro-batch) are arguments of `train`, not of a recipe. The
recipes that have a name are in recipes.py. Both files import nothing heavy, so that listing them is instant.
"""

import ast
import dataclasses
import math
from collections.abc import Iterable
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
    # Figure 2: MoCo's queue; keys of the same batch, both encoders trained; one stored entry per image.
    mechanism: Literal["queue", "end_to_end", "memory_bank"] = "queue"
    loss: Literal["infonce", "nce"] = "infonce"  # "nce" (arXiv 1805.01978, equation 7): memory bank only
    symmetric: bool = False  # each view is query once and key once; two losses are added
    queue_size: int = 65536  # K: keys in the queue, or entries drawn from the memory bank; unused end to end
    key_momentum: float = 0.999  # of the key encoder's weights, "queue" only
    bank_momentum: float = 0.5  # of the entries of the memory bank
    shuffle_bn: bool = True  # whether keys are shuffled over the batch-norm groups (section 3.3)
    temperature: float = 0.07
    augmentation: Augmentation = Augmentation()
    crop_px: int = 224
    eval_crop_pct: float = 0.875  # crop_px / shorter side of the resized image at evaluation
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    epochs: int = 200
    steps: int = 0  # length in steps instead of epochs; 0: `epochs` counts
    global_batch_size: int = 256  # over all processes
    bn_group_size: int = 32  # images that share batch-norm statistics: the paper's images per GPU
    base_lr: float = 0.03  # at this recipe's batch size; never rescaled
    lr_schedule: Literal["step", "cosine", "exponential"] = "step"
    lr_drop_epochs: tuple[int, ...] = (120, 160)  # x0.1 at each, for "step"
    lr_decay_factor: float = 0.9  # x this every `lr_decay_every_steps`, for "exponential"
    lr_decay_every_steps: int = 62500
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4  # on all parameters, batch norm and biases included
    seed: int = 0

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """Length of the training in steps; with `steps` nobody needs to know how long an epoch is."""
        return self.steps or self.epochs * steps_per_epoch

    def lr(self, step: int, steps_per_epoch: int | None) -> float:
        """Learning rate of a step, counted from 0; no warm-up.

        As in the authors' code "step" and "cosine" are constant within an epoch (a cosine over `steps` moves
        with every step). Only "step", and "cosine" over epochs, need to know how long an epoch is.
        """
        if self.lr_schedule == "exponential":
            return self.base_lr * self.lr_decay_factor ** (step // self.lr_decay_every_steps)
        if self.lr_schedule == "cosine" and self.steps:
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        epoch = step // steps_per_epoch
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


def check(
    recipe: Recipe, num_images: int | None, world_size: int = 1, micro_batch_size: int | None = None
) -> None:
    """Refuse, before anything expensive, a recipe that cannot or should not run on this data and machine.

    Args:
        recipe: To be checked.
        num_images: Of the training set; None if nobody knows (a stream).
        world_size: Number of processes.
        micro_batch_size: Images of one process in a forward pass, or None for all of its batch.

    Raises:
        ValueError: With the setting, its value, what is accepted and what to change.
    """
    _check_values(recipe)
    _check_mechanism(recipe)
    _check_length(recipe, num_images)
    _check_batch(recipe, world_size, micro_batch_size)


def _check_values(r: Recipe) -> None:
    a = r.augmentation
    positive = ("embed_dim", "queue_size", "crop_px", "epochs", "global_batch_size", "lr_decay_every_steps")
    for name in (*positive, "temperature", "base_lr", "lr_decay_factor"):
        if getattr(r, name) <= 0:
            raise ValueError(f"{name} ({getattr(r, name)}) must be positive.")
    for name in ("weight_decay", "steps"):
        if getattr(r, name) < 0:
            raise ValueError(f"{name} ({getattr(r, name)}) must not be negative.")
    shares = {n: getattr(r, n) for n in ("key_momentum", "bank_momentum", "sgd_momentum", "eval_crop_pct")}
    shares |= {f"augmentation.{n}": getattr(a, n) for n in dir(a) if n.endswith("probability")}
    in_0_1 = ("brightness", "contrast", "saturation", "crop_scale_min")
    for name, value in {**shares, **{f"augmentation.{n}": getattr(a, n) for n in in_0_1}}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} ({value}) must lie in 0..1.")
    if not 0 <= a.hue <= 0.5:
        raise ValueError(f"augmentation.hue ({a.hue}) must lie in 0..0.5, in turns of the colour circle.")
    if len(r.mean) != 3 or len(r.std) != 3 or min(r.std) <= 0:
        raise ValueError(f"mean {r.mean} and std {r.std} must be three numbers each, std positive.")
    for name, value, accepted in (
        ("lr_schedule", r.lr_schedule, ("step", "cosine", "exponential")),
        ("head", r.head, ("linear", "mlp")),
        ("mechanism", r.mechanism, ("queue", "end_to_end", "memory_bank")),
        ("loss", r.loss, ("infonce", "nce")),
        ("augmentation.colour_order", a.colour_order, ("grey_first", "jitter_first")),
    ):
        if value not in accepted:
            raise unknown(name, value, accepted)


def _check_mechanism(r: Recipe) -> None:
    if r.loss == "nce" and r.mechanism != "memory_bank":
        raise ValueError(
            f"loss 'nce' goes with mechanism 'memory_bank', not '{r.mechanism}'. Use --set loss=infonce."
        )
    if r.symmetric and r.mechanism == "memory_bank":
        raise ValueError(
            "symmetric (True) needs two encoded views, and a memory bank encodes one. "
            "Use --set symmetric=False."
        )


def _check_length(r: Recipe, num_images: int | None) -> None:
    if num_images is None:
        if r.mechanism == "memory_bank":
            raise ValueError(
                "mechanism 'memory_bank' stores an entry for each image and cannot train from a stream. "
                "Give a folder, a list or local shards without --stream, or --set mechanism=queue."
            )
        if not r.steps:
            raise ValueError(
                f"epochs ({r.epochs}) cannot be counted in a stream of unknown length. Give the length in "
                "steps (--set steps=N) or the number of images (--num-images N)."
            )
        if r.lr_schedule == "step":
            raise ValueError(
                f"lr_drop_epochs {r.lr_drop_epochs} cannot be counted in a stream of unknown length. Give "
                "the number of images (--num-images N), or --set lr_schedule=cosine."
            )
        return
    if num_images < r.global_batch_size:
        raise ValueError(
            f"{num_images} image{'s are' if num_images != 1 else ' is'} fewer than one batch: "
            f"global_batch_size is {r.global_batch_size}. Give more images, or --set global_batch_size=N."
        )
    if r.mechanism == "queue" and num_images <= r.queue_size:
        raise ValueError(
            f"queue_size ({r.queue_size}) must be smaller than the number of images ({num_images}): a longer "
            "queue holds older keys of the query's own image as negatives. "
            f"Use --set queue_size={1 << max(0, (num_images // 2).bit_length() - 1)} or less."
        )


def _check_batch(r: Recipe, world_size: int, micro_batch_size: int | None) -> None:
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
