from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2 import functional as tvf2

from mocohub.pretrain.augment import OPERATIONS, View, crop_views, draw_view, finish_view
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


def views(augmentation: Augmentation, n: int = 3000) -> list[View]:
    return [draw_view(augmentation, stream(0, "view", i), 80, 60) for i in range(n)]


def render(image: Image.Image, view: View, crop_px: int, colour_order: str = "jitter_first") -> torch.Tensor:
    return finish_view(crop_views(image, [view], crop_px)[0], view, colour_order)


def drawn_view(augmentation: Augmentation, i: int) -> tuple[Image.Image, View]:
    image = photo(200, 150)
    return image, draw_view(augmentation, stream(1, "view", i), *image.size)


def authors_view(image: Image.Image, view: View, crop_px: int, colour_order: str) -> torch.Tensor:
    """The published pipeline, torchvision on Pillow images, with the parameters of `view`."""
    box = view.top, view.left, view.height, view.width
    image = tvf.resized_crop(image, *box, [crop_px, crop_px], tv.InterpolationMode.BILINEAR)
    if view.grey and colour_order == "grey_first":
        image = tvf.rgb_to_grayscale(image, 3)
    for name, factor in view.jitter:
        image = getattr(tvf, f"adjust_{name}")(image, factor)
    if view.grey and colour_order == "jitter_first":
        image = tvf.rgb_to_grayscale(image, 3)
    if view.blur_sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(view.blur_sigma))  # Pillow's radius is the sigma
    return tvf.pil_to_tensor(tvf.hflip(image) if view.flip else image)


@pytest.mark.parametrize("augmentation", [moco_v1(), moco_v2()])
def test_views_are_those_of_the_published_pipeline_but_for_its_rounding(augmentation: Augmentation) -> None:
    errors = []
    for i in range(60):
        image, view = drawn_view(augmentation, i)
        ours = render(image, view, 64, augmentation.colour_order)
        theirs = authors_view(image, view, 64, augmentation.colour_order)
        errors.append((ours.int() - theirs.int()).abs().flatten())
    errors = torch.cat(errors).float()
    # Pillow cuts to whole levels after each operation, holds the hue in 256 steps and blurs by boxes.
    assert errors.mean() < 2 and errors.quantile(0.99) <= 8 and errors.max() <= 24


@pytest.mark.parametrize("augmentation", [moco_v1(), moco_v2()])
def test_colours_are_torchvisions_on_floats_rounded_once(augmentation: Augmentation) -> None:
    for i in range(60):
        image, view = drawn_view(augmentation, i)
        view = replace(view, blur_sigma=None)
        x = crop_views(image, [view], 32)[0]
        expected = x / 255
        for operation in (
            ("grey", "jitter") if augmentation.colour_order == "grey_first" else ("jitter", "grey")
        ):
            if operation == "grey" and view.grey:
                expected = tvf2.rgb_to_grayscale(expected, 3)
            elif operation == "jitter":
                for name, factor in view.jitter:
                    expected = getattr(tvf2, f"adjust_{name}")(expected, factor)
        expected = expected.flip(-1) if view.flip else expected
        ours = finish_view(x, view, augmentation.colour_order)
        assert (ours - 255 * expected).abs().max() <= 0.5 + 0.1  # luma has three digits there, four here


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_colour_operation_is_pillows_to_a_few_levels(name: str) -> None:
    limit, factors = (16, (-0.4, -0.1, 0.07, 0.5)) if name == "hue" else (2, (0.6, 1.0, 1.4))
    for factor in factors:
        view = replace(PLAIN, jitter=((name, factor),))
        errors = (render(photo(), view, 48).int() - authors_view(photo(), view, 48, "").int()).abs()
        assert errors.max() <= limit and errors.float().mean() < 1.5, factor


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_the_blur_is_a_gaussian_over_repeated_edges(sigma: float) -> None:
    view = replace(PLAIN, blur_sigma=sigma)
    sharp = render(photo(), PLAIN, 48).numpy().astype(float)
    expected = gaussian_filter(sharp, sigma, mode="nearest", axes=(1, 2), radius=40)
    blurred = render(photo(), view, 48)
    assert np.abs(blurred.numpy() - expected).max() <= 0.6
    pillow = (blurred.int() - authors_view(photo(), view, 48, "").int()).abs().float()
    assert pillow.mean() < 1 and pillow.max() <= 9


def test_order_of_grey_and_jitter_matters_as_in_v1_and_v2() -> None:
    view = replace(PLAIN, jitter=(("hue", 0.3), ("saturation", 1.4), ("brightness", 1.2)), grey=True)
    v1, v2 = (render(photo(), view, 32, order) for order in ("grey_first", "jitter_first"))
    assert not v1.equal(v2)
    for view in (v1, v2):
        assert view[0].equal(view[1]) and view[1].equal(view[2])


def test_crops_are_pillows_to_one_level() -> None:
    image = photo(200, 150)
    for i in range(40):
        view = draw_view(moco_v2(), stream(0, "view", i), *image.size)
        box = (view.left, view.top, view.left + view.width, view.top + view.height)
        expected = image.crop(box).resize((48, 48), Image.Resampling.BILINEAR)
        crop = crop_views(image, [view], 48)[0]
        assert (crop.int() - tvf.pil_to_tensor(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("shrink", [2, 4])
def test_crops_of_an_image_that_was_decoded_smaller_show_the_same_part(shrink: int) -> None:
    image = photo(403, 301)  # not a multiple: the last pixel of the smaller image stands for a rest
    padded = np.pad(np.asarray(image), [(0, -301 % shrink), (0, -403 % shrink), (0, 0)], mode="edge")
    small = Image.fromarray(padded).reduce(shrink)
    for i in range(20):
        view = replace(draw_view(moco_v2(), stream(0, "view", i), 403, 301), angle_deg=0.0)
        errors = crop_views(small, [view], 32, shrink)[0].int() - crop_views(image, [view], 32)[0].int()
        assert errors.abs().max() <= 8 and errors.float().abs().mean() < 1


def test_shear_slants_the_crop_and_leaves_its_middle_row() -> None:
    bar = Image.new("RGB", (63, 63))
    bar.paste((255, 255, 255), (30, 0, 33, 63))
    slanted = render(bar, replace(PLAIN, height=63, width=63, shear_deg=20.0), 63)
    centre = (slanted[0].float() * torch.arange(63)).sum(1) / slanted[0].float().sum(1)  # of the bar, by row
    assert centre[31].item() == pytest.approx(31, abs=0.1)
    assert (centre[51] - centre[11]).abs().item() == pytest.approx(40 * np.tan(np.deg2rad(20)), abs=0.5)


def test_rotation_turns_the_crop() -> None:
    turned = render(photo(64, 64), replace(PLAIN, height=64, width=64, angle_deg=90.0), 64)
    clockwise = tvf.pil_to_tensor(photo(64, 64).transpose(Image.Transpose.ROTATE_270))
    assert (turned.int() - clockwise.int()).abs().max() <= 1


def test_the_bytes_of_a_view_do_not_depend_on_the_number_of_threads() -> None:
    image = photo(500, 375)
    views = [draw_view(moco_v2(), stream(5, "view", i), 500, 375) for i in range(12)]
    try:
        made = {}
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            made[threads] = torch.stack([render(image, view, 211) for view in views])
    finally:
        torch.set_num_threads(1)
    assert all(views.equal(made[1]) for views in made.values())


def test_a_row_holds_what_remains_to_be_done() -> None:
    view = replace(PLAIN, jitter=(("hue", 0.25), ("brightness", 1.5)), blur_sigma=2.0, flip=True)
    assert view.row() == [4, 1, 0, 0, 0.25, 1.5, 0, 0, 0, 2, 1]
    assert PLAIN.row() == [0.0] * 11


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
    torch.manual_seed(0)
    jittered = [dict(v.jitter) for v in drawn if v.jitter]
    theirs = tv.ColorJitter(0.4, 0.4, 0.4, hue)
    ranges = theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
    expected = [tv.ColorJitter.get_params(*ranges) for _ in range(3000)]
    for column, name in enumerate(OPERATIONS, start=1):
        assert ks_2samp([f[name] for f in jittered], [e[column] for e in expected]).pvalue > 1e-3, name
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
