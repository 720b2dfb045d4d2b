"""The recipes that have a name: functions, each with its source, published result, cost and command.

A recipe and the model it makes have one name. Variants are `dataclasses.replace`, or `--set field=value`.
"""

import dataclasses
import inspect
from collections.abc import Callable

from mocohub.errors import unknown
from mocohub.pretrain.recipe import CIFAR10_MEAN, CIFAR10_STD, Augmentation, Recipe, moco_v1, moco_v2


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


def moco_r50_ig1b() -> Recipe:
    """MoCo v1, ResNet-50, a billion Instagram images: a length and a schedule in steps, about 1.4 epochs.

    Source: arXiv 1911.05722, section 4: 64 GPUs of 16 images. Published: detection and segmentation only (VOC
    C4 AP50 82.2), no linear top-1. Published cost: about 6 days on 64 GPUs. The images were never released;
    for shards of your own, give --stream.
    Command: sbatch scripts/slurm_pretrain.sh moco_r50_ig1b --data "s3://bucket/{00000..09999}.tar" --stream
    """
    return dataclasses.replace(
        moco_r50_in1m(),
        global_batch_size=1024,
        bn_group_size=16,
        base_lr=0.12,
        lr_schedule="exponential",
        lr_decay_factor=0.9,
        lr_decay_every_steps=62_500,
        steps=1_250_000,
    )


def moco_r50_in1m_k4096() -> Recipe:
    """MoCo v1 with a queue of 4,096: the family of the key-momentum ablation, by --set key_momentum=m.

    Source: arXiv 1911.05722, section 4.1. Published linear top-1: 55.2 (m = 0.9), 57.8 (0.99), 59.0 (0.999,
    the default here), 58.9 (0.9999); m = 0 fails, its loss oscillates. Cost: as moco_r50_in1m, each.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py moco_r50_in1m_k4096 --set key_momentum=0.99 ...
    """
    return dataclasses.replace(moco_r50_in1m(), queue_size=4096)


def end_to_end_r50_in1m() -> Recipe:
    """The end-to-end baseline: negatives are the other keys of the batch, and both encoders get gradients.

    Source: arXiv 1911.05722, figures 2a and 3: the largest batch that fits 8 V100, 1,024 (128 a GPU), with
    the learning rate scaled linearly. Published: on a par with MoCo of as many negatives (figure 3);
    VOC C4 AP50 80.4 (table 3). Cost: more than moco_r50_in1m, two encoders have gradients.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py end_to_end_r50_in1m --data train --out runs/e2e
    """
    return end_to_end(moco_r50_in1m(), global_batch_size=1024, bn_group_size=128)


def end_to_end(recipe: Recipe, global_batch_size: int, bn_group_size: int) -> Recipe:
    """Return `recipe` with the end-to-end mechanism, and the learning rate scaled with the batch."""
    return dataclasses.replace(
        recipe,
        mechanism="end_to_end",
        global_batch_size=global_batch_size,
        bn_group_size=bn_group_size,
        base_lr=recipe.base_lr * global_batch_size / recipe.global_batch_size,
    )


def memory_bank_r50_in1m() -> Recipe:
    """The memory-bank baseline: an entry for every image, 65,536 of them drawn as negatives, InfoNCE.

    Source: arXiv 1911.05722, figures 2b and 3, with the bank of InstDisc (arXiv 1805.01978), its momentum of
    0.5 included. Published linear top-1: 58.0. Cost: less than moco_r50_in1m, one view is encoded; the bank
    takes 656 MB.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py memory_bank_r50_in1m --data train --out runs/bank
    """
    return dataclasses.replace(moco_r50_in1m(), mechanism="memory_bank")


def memory_bank_nce_r50_in1m() -> Recipe:
    """The memory bank with noise-contrastive estimation and 4,096 negatives, as InstDisc published it.

    Source: arXiv 1805.01978, equation 7. Published linear top-1: 54.3 as quoted in arXiv 1911.05722.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py memory_bank_nce_r50_in1m --data train --out runs
    """
    return dataclasses.replace(memory_bank_r50_in1m(), loss="nce", queue_size=4096)


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
    """`moco_r18_cifar10` for two CPU cores: a sixteenth of the weights, 40 epochs, milder crops.

    Command: mocohub pretrain moco_tiny_cifar10 --data cifar10/train --out runs/tiny --compile
    """
    recipe = moco_r18_cifar10()
    return dataclasses.replace(
        recipe,
        backbone="r18tiny",
        augmentation=dataclasses.replace(recipe.augmentation, crop_scale_min=0.2),
        epochs=40,
        global_batch_size=256,
        bn_group_size=64,
    )


def mocov2_own_images(num_images: int = 100_000) -> Recipe:
    """MoCo v2 for a folder of one's own, 1,000 to 1,000,000 images: sized by their number, our judgement.

    The queue is at most a quarter of the images (a longer one holds keys of the query's own image), the batch
    leaves at least 20 steps an epoch, and the learning rate follows the batch as in the published code
    (0.03 for 256). Short runs need faster keys: the momentum is 0.99 below 20,000 steps. Epochs by a budget
    of 40 million images, at least 100 and at most 800. ResNet-18 below 20,000 images, else ResNet-50.
    Cost: at most 40 million images up to 400,000 of them, else 100 epochs; about 8 h on a card that trains
    1,400 images a second. Not compared with other settings on large data.
    Command: mocohub pretrain mocov2_own_images --data photos --out runs/photos
    """
    batch = max(32, min(256, _power_of_two(num_images // 20)))
    epochs = min(800, max(100, 40_000_000 // num_images))
    steps = epochs * (num_images // batch)
    return dataclasses.replace(
        mocov2_r50_in1m(),
        backbone="r18" if num_images < 20_000 else "r50",
        queue_size=max(batch, min(65536, _power_of_two(num_images // 4))),
        key_momentum=0.99 if steps < 20_000 else 0.999,
        epochs=epochs,
        global_batch_size=batch,
        bn_group_size=min(32, batch // 2),
        base_lr=0.03 * batch / 256,
    )


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


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


RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        moco_r50_in1m,
        mocov2_r50_in1m,
        mocov2_r50_in1m_800ep,
        moco_r50w2x_in1m,
        moco_r50w4x_in1m,
        moco_rx50_in1m,
        moco_r50_ig1b,
        moco_r50_in1m_k4096,
        end_to_end_r50_in1m,
        memory_bank_r50_in1m,
        memory_bank_nce_r50_in1m,
        mocov2_own_images,
        moco_r18_cifar10,
        moco_tiny_cifar10,
        moco_tiny_photos,
        moco_tiny_digits,
    )
}


def recipe_by_name(name: str, num_images: int | None = None) -> Recipe:
    """Return a named recipe.

    Args:
        name: A key of `RECIPES`.
        num_images: Of the training set, for the recipe that is sized by it.

    Raises:
        ValueError: If there is none of that name; the message lists all, the closest first.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    sized = num_images and "num_images" in inspect.signature(RECIPES[name]).parameters
    return RECIPES[name](num_images) if sized else RECIPES[name]()
