from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from mocohub.pretrain.augment import View, draw_view, render_view
from mocohub.pretrain.randomness import stream
from mocohub.pretrain.recipe import Augmentation, moco_v1, moco_v2

PLAIN = View(
    top=0,
    left=0,
    height=60,
    width=80,
    jitter=(),
    grey=False,
    blur_sigma=None,
    flip=False,
    angle_deg=0,
    shear_deg=0,
)


def photo(width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return tvf.pil_to_tensor(image)


def views(augmentation: Augmentation, n: int = 3000) -> list[View]:
    return [draw_view(augmentation, stream(0, "view", i), 80, 60) for i in range(n)]


@pytest.mark.parametrize("order", ["grey_first", "jitter_first"])
def test_a_view_is_what_torchvision_makes_of_the_same_parameters(order: str) -> None:
    jitter = (("hue", 0.3), ("contrast", 1.3), ("brightness", 0.7), ("saturation", 1.4))
    view = View(
        top=7,
        left=11,
        height=40,
        width=50,
        jitter=jitter,
        grey=True,
        blur_sigma=1.3,
        flip=True,
        angle_deg=0.0,
        shear_deg=0.0,
    )
    expected = tvf.resized_crop(photo(), 7, 11, 40, 50, [32, 32], tv.InterpolationMode.BILINEAR)
    if order == "grey_first":
        expected = tvf.rgb_to_grayscale(expected, 3)
    for name, factor in jitter:
        expected = getattr(tvf, f"adjust_{name}")(expected, factor)
    if order == "jitter_first":
        expected = tvf.rgb_to_grayscale(expected, 3)
    expected = tvf.hflip(expected.filter(ImageFilter.GaussianBlur(1.3)))
    assert render_view(photo(), view, 32, order).equal(pixels(expected))


def test_order_of_grey_and_jitter_matters_as_in_v1_and_v2() -> None:
    view = replace(PLAIN, jitter=(("hue", 0.3), ("saturation", 1.4), ("brightness", 1.2)), grey=True)
    v1, v2 = (render_view(photo(), view, 32, order) for order in ("grey_first", "jitter_first"))
    assert not v1.equal(v2)
    assert v2[0].equal(v2[1]) and v2[1].equal(v2[2])


def test_shear_slants_the_crop_and_leaves_its_middle_row() -> None:
    bar = Image.new("RGB", (63, 63))
    bar.paste((255, 255, 255), (30, 0, 33, 63))
    slanted = render_view(bar, replace(PLAIN, height=63, width=63, shear_deg=20.0), 63, "grey_first")
    centre = (slanted[0].float() * torch.arange(63)).sum(1) / slanted[0].float().sum(1)  # of the bar, by row
    assert centre[31].item() == pytest.approx(31, abs=0.1)
    assert (centre[51] - centre[11]).abs().item() == pytest.approx(40 * np.tan(np.deg2rad(20)), abs=0.5)


def test_rotation_turns_the_crop_and_a_plain_view_is_a_plain_resize() -> None:
    assert render_view(photo(), PLAIN, 16, "grey_first").equal(
        pixels(photo().resize((16, 16), Image.Resampling.BILINEAR))
    )
    turned = render_view(photo(64, 64), replace(PLAIN, height=64, width=64, angle_deg=90.0), 64, "grey_first")
    clockwise = pixels(photo(64, 64).transpose(Image.Transpose.ROTATE_270))
    assert (turned.int() - clockwise.int()).abs().max() <= 1


def test_crops_are_distributed_as_torchvisions_random_resized_crop() -> None:
    torch.manual_seed(0)
    theirs = [tv.RandomResizedCrop.get_params(photo(), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    ours = [(v.top, v.left, v.height, v.width) for v in views(moco_v1())]
    for of in (lambda c: c[0], lambda c: c[1], lambda c: c[2], lambda c: c[2] * c[3], lambda c: c[3] / c[2]):
        assert ks_2samp([of(c) for c in theirs], [of(c) for c in ours]).pvalue > 1e-3


def test_a_crop_that_never_fits_falls_back_to_the_centre_as_torchvision_does() -> None:
    narrow = Image.new("RGB", (400, 4))
    view = draw_view(replace(moco_v1(), crop_scale_min=0.99), stream(0, "view", 0), 400, 4)
    torch.manual_seed(0)
    expected = tv.RandomResizedCrop.get_params(narrow, (0.99, 1.0), (3 / 4, 4 / 3))
    assert (view.top, view.left, view.height, view.width) == tuple(expected)


@pytest.mark.parametrize(
    ("augmentation", "jitter", "hue", "blur"), [(moco_v1(), 1.0, 0.4, 0.0), (moco_v2(), 0.8, 0.1, 0.5)]
)
def test_probabilities_and_ranges_are_the_papers(
    augmentation: Augmentation, jitter: float, hue: float, blur: float
) -> None:
    drawn = views(augmentation)

    def share(condition) -> float:  # noqa: ANN001
        return sum(map(condition, drawn)) / len(drawn)

    assert share(lambda v: bool(v.jitter)) == pytest.approx(jitter, abs=0.03)
    assert share(lambda v: v.grey) == pytest.approx(0.2, abs=0.03)
    assert share(lambda v: v.flip) == pytest.approx(0.5, abs=0.03)
    assert share(lambda v: v.blur_sigma is not None) == pytest.approx(blur, abs=0.03)
    assert all(0.1 <= v.blur_sigma <= 2.0 for v in drawn if v.blur_sigma is not None)
    factors = {
        name: [dict(v.jitter)[name] for v in drawn if v.jitter]
        for name in dict(drawn[0].jitter or drawn[1].jitter)
    }
    for name, (low, high) in {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.4),
        "hue": (-hue, hue),
    }.items():
        uniform = np.linspace(low, high, 3000)
        assert ks_2samp(factors[name], uniform).pvalue > 1e-3, name
    first_operations = Counter(v.jitter[0][0] for v in drawn if v.jitter)
    assert all(
        n / sum(first_operations.values()) == pytest.approx(0.25, abs=0.04) for n in first_operations.values()
    )


def test_a_view_depends_on_its_key_alone() -> None:
    one = draw_view(moco_v2(), stream(0, "view", 3, 17, 0), 80, 60)
    stream(0, "view", 9, 9, 9).random(100)
    assert draw_view(moco_v2(), stream(0, "view", 3, 17, 0), 80, 60) == one
    others = [(1, (3, 17, 0)), (0, (4, 17, 0)), (0, (3, 18, 0)), (0, (3, 17, 1)), (0, (3, 17))]
    for seed, key in others:
        assert draw_view(moco_v2(), stream(seed, "view", *key), 80, 60) != one


def test_a_setting_turned_off_leaves_the_other_draws_where_they_were() -> None:
    for i in range(20):
        full = draw_view(moco_v2(), stream(0, "view", i), 80, 60)
        no_hue = draw_view(replace(moco_v2(), hue=0.0), stream(0, "view", i), 80, 60)
        assert no_hue == replace(full, jitter=tuple(j for j in full.jitter if j[0] != "hue"))
