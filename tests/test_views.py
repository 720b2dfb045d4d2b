"""Features averaged over several views of an image."""

import io
import pickle

import numpy as np
import pytest
import torch
from helpers.hub import randomise
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import v2

from mocohub.backbones import create_backbone
from mocohub.features.extract import extract
from mocohub.features.network import FrozenNetwork
from mocohub.features.search import extract_like
from mocohub.features.views import FiveCrops, resized_px
from mocohub.shards import list_shards
from tests.helpers.shards import make_tar

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS = {"dtype": "float32", "num_workers": 0}


@pytest.fixture(scope="module")
def model():
    model = randomise(create_backbone("r18tiny"), 1)
    model.pretrained_cfg["crop_pct"] = 0.8  # Resize(40), CenterCrop(32)
    return model


@pytest.fixture(scope="module")
def photos():
    """Images of several sizes, no two crops of which are alike."""
    noise = np.random.RandomState(0)
    sizes = [(60, 40), (40, 60), (48, 48), (200, 50), (41, 43)]
    return [Image.fromarray(noise.randint(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


@torch.no_grad()
def slow(model, photos, crops):
    """The mean over views, one view at a time, in torchvision's terms."""
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    resize = transforms.Resize(40, transforms.InterpolationMode.BILINEAR)
    rows = [[model(prepare(view)[None])[0] for view in crops(resize(photo))] for photo in photos]
    return torch.stack([torch.stack(views).mean(0) for views in rows]).numpy()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_five_crops_are_those_of_a_plain_loop(model, photos, batch_size):
    found = extract(model, photos, crops=5, batch_size=batch_size, **OPTIONS)
    expected = slow(model, photos, transforms.FiveCrop(32))
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
    once = extract(model, photos, **OPTIONS).values
    assert np.linalg.norm(once - expected, axis=1).min() > 1e-2 * np.linalg.norm(expected, axis=1).max()


def test_with_flip_these_are_the_ten_crops(model, photos):
    found = extract(model, photos, crops=5, flip=True, **OPTIONS)
    expected = slow(model, photos, transforms.TenCrop(32))
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
    assert (found.meta["crops"], found.meta["flip"]) == (5, True)


def test_views_are_averaged_before_rows_are_normalised(model, photos):
    mean = torch.from_numpy(slow(model, photos, transforms.FiveCrop(32)))
    found = extract(model, photos, crops=5, normalize=True, **OPTIONS).values
    np.testing.assert_allclose(found, F.normalize(mean), atol=1e-5)


def test_workers_and_the_disk_do_not_change_anything(model, photos, tmp_path):
    for i, photo in enumerate(photos):
        (tmp_path / "photos").mkdir(exist_ok=True)
        photo.save(tmp_path / f"photos/{i}.png")
    expected = extract(model, photos, crops=5, batch_size=10, **OPTIONS)
    options = {"crops": 5, "batch_size": 10, "dtype": "float32", "num_workers": 2}
    found = extract(model, tmp_path / "photos", out=tmp_path / "features", **options)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.extras["width"] == [photo.width for photo in photos]
    with pytest.raises(ValueError, match="begun with other settings"):
        extract(model, tmp_path / "photos", out=tmp_path / "features", **{**options, "crops": 1})


def test_streamed_tars_give_the_crops_and_maps_of_the_images_in_memory(model, photos, tmp_path):
    files = {}
    for i, photo in enumerate(photos):
        file = io.BytesIO()
        photo.save(file, "PNG")
        files[f"{i}.png"] = file.getvalue()
    make_tar(tmp_path / "photos-0.tar", files)
    tars = list_shards([tmp_path / "photos-0.tar"])
    for options in ({"crops": 5}, {"layers": ["layer3:none"]}):
        expected = extract(model, photos, batch_size=10, **options, **OPTIONS)
        out = tmp_path / "-".join(options)
        found = extract(model, tars, out=out, batch_size=10, **options, **OPTIONS)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
        assert found.shapes == expected.shapes


def test_a_batch_holds_no_more_views_than_images_were_asked_for(model, photos):
    sizes = []
    hook = model.conv1.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        extract(model, photos * 4, crops=5, batch_size=12, **OPTIONS)
    finally:
        hook.remove()
    assert max(sizes) == 10  # two images


def test_a_search_takes_crops_as_the_features_did(model, photos):
    features = extract(model, photos, crops=5, **OPTIONS)
    again = extract_like(features, photos[2:3], model=model)
    np.testing.assert_allclose(again.values, features.values[2:3], rtol=1e-4, atol=1e-5)


def test_the_record_tells_all_steps(model, photos):
    text = extract(model, photos, crops=5, **OPTIONS).meta["transform"]["text"]
    positions = [text.index(name) for name in ("Resize(size=40", "FiveCrop(size=(32, 32))", "Normalize(mean")]
    assert positions == sorted(positions) and "CenterCrop" not in text


def test_a_transform_of_the_user_may_return_any_number_of_views(model, photos):
    def views(image):
        """Two views of wide images, three of others."""
        image = transforms.functional.to_tensor(image.resize((32, 32)))
        return torch.stack([image * k for k in ((1, 2) if image[0, 0, 0] < 0.5 else (1, 2, 3))])

    found = extract(model, photos, transform=views, batch_size=6, **OPTIONS)
    counts = [len(views(photo)) for photo in photos]
    assert set(counts) == {2, 3}
    with torch.no_grad():
        expected = torch.stack([model(views(photo)).mean(0) for photo in photos]).numpy()
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)


def test_maps_are_not_averaged_over_views(model, photos):
    def views(image):
        return torch.zeros(2, 3, 32, 32)

    with pytest.raises(ValueError, match="Maps are not averaged.* of layer4 does not go with 2 views"):
        extract(model, photos, transform=views, layers=["layer4:none"], **OPTIONS)
    with FrozenNetwork(model, device="cpu", layers=["layer4:none"]) as network:
        network(torch.zeros(1, 3, 32, 32))
        with pytest.raises(ValueError, match="does not go with 2 views of an image"):
            network(torch.zeros(1, 2, 3, 32, 32))


@pytest.mark.slow
def test_a_compiled_network_takes_batches_of_views(model):
    views = torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with FrozenNetwork(model, device="cpu", dtype="float32", compile=True) as network:
        network.prepare(views)
        assert network.facts["compiled"] == [10, 3, 32, 32] and network.views == 5
        found = network(views)["embedding"]
    with torch.no_grad():
        expected = torch.stack([model(image).mean(0) for image in views])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_views_and_batches_of_images_are_errors(model, photos):
    def views(image):
        return torch.zeros(0, 3, 32, 32) if image.width == 60 else torch.zeros(1, 3, 32, 32)

    (error,) = extract(model, photos, transform=views, **OPTIONS).errors
    assert error["id"] == 0 and error["reason"] == (
        "tensor is torch.float32 (0, 3, 32, 32), but must be float (C, H, W), or views (V, C, H, W)"
    )
    given = [photos[0], torch.zeros(5, 3, 32, 32)]  # which may be views, or a batch by mistake
    (error,) = extract(model, given, **OPTIONS).errors
    assert error["reason"] == "tensor is torch.float32 (5, 3, 32, 32), but must be float (C, H, W)"


def test_of_preprocessed_images_no_crops_are_taken(model, photos):
    (error,) = extract(model, [photos[0], torch.zeros(3, 32, 32)], crops=5, **OPTIONS).errors
    assert error["id"] == 1 and error["reason"].startswith("it is preprocessed, but crops have to be taken")


def test_crops_that_cannot_be_taken_are_refused(model, photos):
    with pytest.raises(
        ValueError, match="crops is 10, but must be 1 or 5. The ten crops are crops=5 and flip"
    ):
        extract(model, photos, crops=10)
    with pytest.raises(
        ValueError, match="with one CenterCrop.*but it is ToTensor.*Give one that returns views"
    ):
        extract(model, photos, crops=5, transform=transforms.ToTensor())
    small = transforms.Compose([transforms.CenterCrop(90), transforms.ToTensor()])
    with pytest.raises(
        RuntimeError, match="None of the 5 images(?s:.*)Requested crop size .* is bigger than"
    ):
        extract(model, photos, crops=5, transform=small, **OPTIONS)


def test_the_transform_can_be_sent_to_processes(photos):
    steps = [transforms.Resize(40), transforms.CenterCrop((32, 24)), transforms.ToTensor()]
    crops = pickle.loads(pickle.dumps(FiveCrops(transforms.Compose(steps))))
    found = crops(photos[0])
    assert found.shape == (5, 3, 32, 24)
    assert torch.equal(found[4], transforms.Compose(steps)(photos[0]))  # the last is the centre's


def test_transforms_of_torchvision_v2_crop_and_resize_as_those_of_v1(photos):
    after = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    newer = v2.Compose([v2.Resize(40), v2.CenterCrop(32), *after])
    older = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()])
    assert resized_px(newer) == resized_px(older) == 40
    torch.testing.assert_close(FiveCrops(newer)(photos[0]), FiveCrops(older)(photos[0]))
