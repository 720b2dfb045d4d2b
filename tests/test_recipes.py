import dataclasses
import json
import math

import pytest

from mocohub.backbones import BACKBONES
from mocohub.pretrain.recipe import Recipe, check, override
from mocohub.pretrain.recipes import RECIPES, recipe_by_name

# Copied from the papers and the authors' read-me and CIFAR notebook.
PAPERS = {
    "moco_r50_in1m": dict(
        backbone="r50", head="linear", embed_dim=128, queue_size=65536, key_momentum=0.999, temperature=0.07,
        epochs=200, global_batch_size=256, bn_group_size=32, base_lr=0.03, lr_schedule="step",
        lr_drop_epochs=(120, 160), sgd_momentum=0.9, weight_decay=1e-4, crop_px=224, eval_crop_pct=0.875,
    ),
    "mocov2_r50_in1m": dict(
        backbone="r50", head="mlp", embed_dim=128, queue_size=65536, key_momentum=0.999, temperature=0.2,
        epochs=200, global_batch_size=256, bn_group_size=32, base_lr=0.03, lr_schedule="cosine",
        sgd_momentum=0.9, weight_decay=1e-4, crop_px=224, eval_crop_pct=0.875,
    ),
    "moco_r18_cifar10": dict(
        backbone="r18cifar", head="linear", embed_dim=128, queue_size=4096, key_momentum=0.99,
        temperature=0.1, epochs=200, global_batch_size=512, bn_group_size=512 // 8, base_lr=0.06,
        lr_schedule="cosine", sgd_momentum=0.9, weight_decay=5e-4, crop_px=32,
    ),
}  # fmt: skip
PAPERS |= {
    "mocov2_r50_in1m_800ep": PAPERS["mocov2_r50_in1m"] | {"epochs": 800},
    "moco_r50w2x_in1m": PAPERS["moco_r50_in1m"] | {"backbone": "r50w2x"},
    "moco_r50w4x_in1m": PAPERS["moco_r50_in1m"] | {"backbone": "r50w4x"},
    "moco_rx50_in1m": PAPERS["moco_r50_in1m"] | {"backbone": "rx50"},
    "moco_r50_ig1b": PAPERS["moco_r50_in1m"]
    | dict(
        steps=1_250_000, global_batch_size=1024, bn_group_size=1024 // 64, base_lr=0.12,
        lr_schedule="exponential", lr_decay_factor=0.9, lr_decay_every_steps=62_500,
    ),
    "moco_r50_in1m_k4096": PAPERS["moco_r50_in1m"] | {"queue_size": 4096},
    "end_to_end_r50_in1m": PAPERS["moco_r50_in1m"]
    | dict(mechanism="end_to_end", global_batch_size=1024, bn_group_size=1024 // 8, base_lr=0.03 * 4),
    "memory_bank_r50_in1m": PAPERS["moco_r50_in1m"] | {"mechanism": "memory_bank", "bank_momentum": 0.5},
    "memory_bank_nce_r50_in1m": PAPERS["moco_r50_in1m"]
    | dict(mechanism="memory_bank", loss="nce", queue_size=4096),
}  # fmt: skip
DEFAULTS = dict(mechanism="queue", loss="infonce", symmetric=False, shuffle_bn=True, steps=0)
AUGMENTATIONS = {
    "moco_r50_in1m": dict(
        crop_scale_min=0.2, jitter_probability=1.0, hue=0.4, colour_order="grey_first", blur_probability=0.0
    ),
    "mocov2_r50_in1m": dict(
        crop_scale_min=0.2, jitter_probability=0.8, hue=0.1, colour_order="jitter_first", blur_probability=0.5
    ),
    "moco_r18_cifar10": dict(
        crop_scale_min=0.08,
        jitter_probability=0.8,
        hue=0.1,
        colour_order="jitter_first",
        blur_probability=0.0,
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_named_recipes_are_the_papers(name: str) -> None:
    recipe = RECIPES[name]()
    paper = DEFAULTS | PAPERS[name]
    assert {field: getattr(recipe, field) for field in paper} == paper
    drawn, version = recipe.augmentation, "mocov2_r50_in1m" if name.startswith("mocov2") else "moco_r50_in1m"
    expected = AUGMENTATIONS[name if name in AUGMENTATIONS else version]
    assert {field: getattr(drawn, field) for field in expected} == expected
    assert drawn.brightness == drawn.contrast == drawn.saturation == 0.4
    assert (drawn.grey_probability, drawn.flip_probability, drawn.rotation_deg) == (0.2, 0.5, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_names_a_backbone_and_a_command(name: str) -> None:
    recipe = RECIPES[name]()
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.backbone in BACKBONES
    assert "Command: " in RECIPES[name].__doc__
    check(recipe, num_images=1_281_167)


def test_learning_rates_are_the_authors_per_epoch_schedules() -> None:
    v1, v2 = RECIPES["moco_r50_in1m"](), RECIPES["mocov2_r50_in1m"]()
    assert [v1.lr(step, 10) for step in (0, 1199)] == [0.03, 0.03]
    assert [v1.lr(10 * e, 10) for e in (120, 159, 160, 199)] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4])
    assert v2.lr(0, 10) == v2.lr(9, 10) == 0.03 and v2.lr(1009, 10) == pytest.approx(0.015)
    assert v2.lr(1999, 10) == pytest.approx(0.015 * (1 + math.cos(math.pi * 199 / 200))) and v2.lr(1999, 10)
    assert v2.total_steps(10) == 2000


def test_the_schedule_of_a_billion_images_counts_steps() -> None:
    recipe = RECIPES["moco_r50_ig1b"]()
    assert recipe.total_steps(steps_per_epoch=900_000) == 1_250_000
    assert [recipe.lr(step, 900_000) for step in (0, 62_499)] == [0.12, 0.12]
    assert [recipe.lr(step, 900_000) for step in (62_500, 125_000)] == pytest.approx([0.108, 0.0972])
    assert recipe.lr(1_249_999, 900_000) == pytest.approx(0.12 * 0.9**19)
    cosine = dataclasses.replace(recipe, lr_schedule="cosine")
    assert cosine.lr(625_000, 900_000) == pytest.approx(0.06)


@pytest.mark.parametrize("num_images", [1_000, 1_999, 5_000, 20_000, 100_000, 1_000_000])
def test_the_recipe_for_own_images_fits_their_number(num_images: int) -> None:
    recipe = recipe_by_name("mocov2_own_images", num_images)
    check(recipe, num_images)
    assert recipe.queue_size <= num_images / 4 and recipe.queue_size >= recipe.global_batch_size
    assert num_images // recipe.global_batch_size >= 20
    assert 100 <= recipe.epochs <= 800
    assert recipe.epochs == 100 or recipe.epochs * num_images <= 40_000_000
    assert recipe.base_lr / recipe.global_batch_size == pytest.approx(0.03 / 256)


def test_the_momentum_ablation_is_one_recipe_and_its_momentum() -> None:
    family = [override(recipe_by_name("moco_r50_in1m_k4096"), [f"key_momentum={m}"]) for m in (0, 0.9999)]
    assert [r.key_momentum for r in family] == [0.0, 0.9999]
    for recipe in family:
        check(recipe, 1_281_167)


def test_overrides_set_fields_of_their_own_kind() -> None:
    recipe = override(
        recipe_by_name("moco_r50_in1m"),
        ["epochs=3", "base_lr=1", "augmentation.hue=0.1", "lr_drop_epochs=1,2", "backbone=r18"],
    )
    assert (recipe.epochs, recipe.base_lr, recipe.augmentation.hue) == (3, 1.0, 0.1)
    assert (recipe.lr_drop_epochs, recipe.backbone) == ((1, 2), "r18")
    assert isinstance(recipe.base_lr, float)
    assert override(recipe, ["lr_drop_epochs=5"]).lr_drop_epochs == (5,)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("moco_r50_in1k", "epochs=1", "Unknown recipe 'moco_r50_in1k'. Choose one of: moco_r50_in1m, "),
        ("moco_r50_in1m", "epoch=1", "Unknown recipe field 'epoch'. Choose one of: epochs"),
        ("moco_r50_in1m", "augmentation.hu=1", "Unknown recipe field 'hu'. Choose one of: hue"),
        ("moco_r50_in1m", "epochs", "expected field=value"),
        ("moco_r50_in1m", "epochs=many", r"epochs=many: expected a value like 200 \(int\)"),
        ("moco_r50_in1m", "epochs=1.5", r"epochs=1.5: expected a value like 200 \(int\)"),
        ("moco_r50_in1m", "augmentation=v2", "set one of its fields"),
        ("moco_r50_in1m", "epochs.x=1", "epochs has no fields"),
    ],
)
def test_wrong_names_and_values_say_what_is_accepted(name: str, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(recipe_by_name(name), [setting])


@pytest.mark.parametrize(
    ("overrides", "num_images", "world_size", "micro", "message"),
    [
        ([], 60_000, 1, None, r"queue_size \(65536\) must be smaller .* \(60000\).*--set queue_size=16384"),
        ([], 1, 1, None, "1 image is fewer than one batch: global_batch_size is 256"),
        ([], 10**6, 3, None, r"global_batch_size \(256\) must be a multiple of the 3 processes"),
        ([], 10**6, 16, None, r"bn_group_size \(32\) must divide the images of one forward pass \(16\)"),
        (
            ["bn_group_size=48"],
            10**6,
            1,
            None,
            r"bn_group_size \(48\) must divide .* \(256\). .*64, 128, 256",
        ),
        ([], 10**6, 1, 48, r"micro_batch_size \(48\) must divide the batch of one process \(256\)"),
        ([], 10**6, 1, 16, r"bn_group_size \(32\) must divide the images of one forward pass \(16\)"),
        (["lr_schedule=linear"], 10**6, 1, None, "Unknown lr_schedule 'linear'"),
        (["head=mpl"], 10**6, 1, None, "Unknown head 'mpl'. Choose one of: mlp, linear"),
        (["temperature=0.0"], 10**6, 1, None, r"temperature \(0.0\) must be positive"),
        ([], 10**6, 1, 0, r"micro_batch_size \(0\) must divide"),
        (["bn_group_size=1"], 10**6, 1, None, r"bn_group_size \(1\) must divide .* Choose one of: 2, 4"),
        (["augmentation.hue=0.6"], 10**6, 1, None, r"augmentation.hue \(0.6\) must lie in 0..0.5"),
        (["augmentation.blur_probability=2.0"], 10**6, 1, None, r"blur_probability \(2.0\) must lie in 0..1"),
        (["weight_decay=-1.0"], 10**6, 1, None, r"weight_decay \(-1.0\) must not be negative"),
        (["std=0.5,"], 10**6, 1, None, r"mean .* and std \(0.5,\) must be three numbers each"),
        (["loss=nce"], 10**6, 1, None, "loss 'nce' goes with mechanism 'memory_bank', not 'queue'"),
        (["mechanism=bank"], 10**6, 1, None, "Unknown mechanism 'bank'. Choose one of: .*memory_bank"),
        (
            ["mechanism=memory_bank", "symmetric=True"],
            10**6,
            1,
            None,
            r"symmetric \(True\) needs two encoded views",
        ),
        ([], None, 1, None, r"epochs \(200\) cannot be counted in a stream .*--set steps=N"),
        (["steps=9", "mechanism=memory_bank"], None, 1, None, "cannot train from a stream"),
        (["steps=-1"], 10**6, 1, None, r"steps \(-1\) must not be negative"),
        (["key_momentum=1.5"], 10**6, 1, None, r"key_momentum \(1.5\) must lie in 0..1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    overrides: list[str], num_images: int | None, world_size: int, micro: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(override(recipe_by_name("moco_r50_in1m"), overrides), num_images, world_size, micro)
