import dataclasses
import math

import pytest

from mocohub.evaluation.protocols import DINOV2, MOCO, MOCOV3, PROTOCOLS, check, fitted, protocol_by_name

# What the authors' code does, field by field, and nothing that is computed.
SHARED = {
    "sgd_momentum": 0.9,
    "weight_decay": 0.0,
    "weight_std": 0.01,
    "crop_px": 224,
    "crop_scale_min": 0.08,
    "crop_ratio_max": 4 / 3,
    "flip_probability": 0.5,
    "resize_px": 256,
}
TABLE = {
    "moco": {
        "source": "arXiv 1911.05722",
        "epochs": 100,
        "global_batch_size": 256,
        "base_lrs": (30.0,),
        "lr_schedule": "step",
        "lr_drop_epochs": (60, 80),
        "interpolation": "bilinear",
        "reported": "best_epoch",
    },
    "mocov3": {
        "source": "arXiv 2104.02057",
        "epochs": 90,
        "global_batch_size": 1024,
        "base_lrs": (0.1,),
        "lr_schedule": "cosine_epoch",
        "lr_drop_epochs": (),
        "interpolation": "bilinear",
        "reported": "best_epoch",
    },
    "dinov2": {
        "source": "arXiv 2304.07193",
        "epochs": 10,
        "global_batch_size": 1024,
        "base_lrs": (
            *(0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005),
            *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
        ),
        "lr_schedule": "cosine_step",
        "lr_drop_epochs": (),
        "interpolation": "bicubic",
        "reported": "last_epoch",
    },
}
CIFAR = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}


@pytest.mark.parametrize("name", TABLE)
def test_each_protocol_is_what_its_authors_do(name: str) -> None:
    assert dataclasses.asdict(PROTOCOLS[name]) == {"name": name, **SHARED, **TABLE[name]}


def test_there_are_no_protocols_beside_those_of_the_table() -> None:
    assert list(PROTOCOLS) == list(TABLE)


def test_moco_divides_its_learning_rate_by_ten_at_epochs_60_and_80() -> None:
    lrs = [MOCO.lrs(5 * epoch, steps_per_epoch=5)[0] for epoch in range(100)]
    assert lrs == pytest.approx([30.0] * 60 + [3.0] * 20 + [0.3] * 20)


def test_moco_v3_lowers_it_by_a_cosine_that_moves_once_an_epoch() -> None:
    lrs = [MOCOV3.lrs(step, steps_per_epoch=2)[0] for step in range(180)]
    assert lrs == pytest.approx([0.4 * (1 + math.cos(math.pi * (k // 2) / 90)) / 2 for k in range(180)])


def test_dinov2_lowers_all_of_them_by_a_cosine_that_moves_at_every_step() -> None:
    half = DINOV2.lrs(10, steps_per_epoch=2)
    assert half == pytest.approx([4 * lr / 2 for lr in TABLE["dinov2"]["base_lrs"]])
    assert DINOV2.lrs(1, steps_per_epoch=2) < DINOV2.lrs(0, steps_per_epoch=2)


def test_the_learning_rate_follows_the_batch() -> None:
    assert protocol_by_name("moco", global_batch_size=1024).lrs(0, 10) == [120.0]


def test_an_unchanged_protocol_says_nothing_of_changes_and_names_its_source() -> None:
    text = MOCO.text()
    assert text.startswith("moco linear protocol (arXiv 1911.05722): frozen backbone, random resized crops")
    assert text.endswith("SGD lr 30 x batch / 256, x0.1 at 60 and 80, weight decay 0, 100 epochs, batch 256")
    assert "13 lrs 1e-05 to 0.1" in DINOV2.text()


def test_what_was_changed_stands_in_the_text() -> None:
    changed = protocol_by_name("moco", epochs=10, base_lrs=[3.0])
    assert changed.lr_drop_epochs == (6, 8)
    assert changed.text().endswith("(changed: epochs 10, base_lrs 3, lr_drop_epochs 6 and 8)")
    assert protocol_by_name("moco", epochs=1).lrs(0, 5) == [30.0]  # it does not begin with the drops
    assert protocol_by_name("mocov3", epochs=5).text().endswith("(changed: epochs 5)")
    assert dataclasses.replace(MOCO, weight_decay=1e-4).text().endswith("(changed: weight_decay 0.0001)")


def test_to_give_what_a_protocol_does_anyway_changes_nothing() -> None:
    assert protocol_by_name("moco", epochs=100, global_batch_size=256, base_lrs=(30.0,)) == MOCO


def test_crops_of_small_images_follow_the_model_and_say_so() -> None:
    assert fitted(MOCO, CIFAR).text().endswith("(changed: crop_px 32, resize_px 32)")
    large = fitted(MOCO, {"input_size": (3, 384, 384), "crop_pct": 0.96, "interpolation": "bicubic"})
    assert (large.crop_px, large.resize_px, large.interpolation) == (384, 400, "bicubic")


def test_a_224_px_model_is_evaluated_by_the_protocol_and_not_by_its_own_habits() -> None:
    assert fitted(MOCO, {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bicubic"}) == MOCO


def test_crops_that_were_asked_for_are_not_replaced_by_those_of_the_model() -> None:
    small = dataclasses.replace(MOCO, crop_px=96, resize_px=110)
    assert (
        fitted(small, {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bilinear"}) == small
    )


def test_a_model_of_oblong_images_is_refused() -> None:
    with pytest.raises(ValueError, match="64 x 32 px"):
        fitted(MOCO, {**CIFAR, "input_size": (3, 32, 64)})


def test_an_unknown_protocol_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Unknown protocol 'moco3'. Choose one of: moco"):
        protocol_by_name("moco3")
    with pytest.raises(ValueError, match="Unknown protocol 'mine'"):
        check(dataclasses.replace(MOCO, name="mine"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs \(0\) must be at least 1"),
        ({"global_batch_size": -1}, r"global_batch_size \(-1\) must be at least 1"),
        ({"base_lrs": ()}, r"base_lrs \(\) must be one or more positive"),
        ({"base_lrs": (0.1, 0.0)}, "positive numbers"),
        ({"resize_px": 200}, r"resize_px \(200\) must not be smaller than crop_px \(224\)"),
        ({"crop_scale_min": 2.0}, r"crop_scale_min \(2.0\) must be between 0 and 1"),
        ({"crop_ratio_max": 0.75}, r"crop_ratio_max \(0.75\) must be between 1 and inf"),
        ({"sgd_momentum": 9.0}, r"sgd_momentum \(9.0\) must be between 0 and 1"),
        ({"weight_decay": -1e-4}, r"weight_decay \(-0.0001\) must be between 0 and inf"),
        ({"lr_schedule": "cosine"}, "Unknown lr_schedule 'cosine'. Choose one of: cosine_step"),
        ({"interpolation": "lanczos"}, "Unknown interpolation 'lanczos'"),
        ({"reported": "best"}, "Unknown reported 'best'. Choose one of: best_epoch"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(MOCO, **changes))
