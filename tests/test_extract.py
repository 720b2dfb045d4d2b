import io
import logging
import multiprocessing
import os
import random
import re
import struct
import sys
import tarfile
import zlib

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import transforms

from mocohub.backbones import create_backbone, pretrained_cfg
from mocohub.features import extract as extraction
from mocohub.features.projection import Projection
from mocohub.features.store import Features
from mocohub.files import read_json, write_json
from mocohub.images import decode_image
from mocohub.sources import list_images
from tests.helpers.images import write_images


def extract(model, images, **options):
    """In float32 unless told otherwise: what "auto" computes in depends on the processor."""
    return extraction.extract(model, images, **{"dtype": "float32", **options})


@pytest.fixture(scope="module")
def model():
    """A tiny network whose batch statistics differ from its running ones."""
    torch.manual_seed(0)
    model = create_backbone("r18tiny")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", {"cat": 5, "dog": 4, "eel": 3}, size_px=40)


def preprocess(image):
    """What the tiny network's pretrained_cfg says, in torchvision's own terms."""
    steps = [
        transforms.Resize(32, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return transforms.Compose(steps)(image)


@torch.no_grad()
def reference(model, images):
    """Features of PIL images, one image at a time and pooled by hand."""
    maps = [model.forward_features(preprocess(image)[None]) for image in images]
    return torch.cat(maps).mean((2, 3)).numpy()


class MeanColour(nn.Module):
    """Features without weights: 1 / the mean of each channel."""

    def forward(self, x):
        return 1 / x.mean((2, 3))


class OneForAll(MeanColour):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


def colours(*values):
    return [Image.new("RGB", (4, 4), (value, value, value)) for value in values]


def broken_files(folder):
    """Write one file of each kind that is no image, under the name of its kind."""
    photo = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(photo, "JPEG")
    jpeg = photo.getvalue()
    photo = io.BytesIO()
    Image.fromarray(noise).save(photo, "PNG")
    png = photo.getvalue()
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    files = {
        "bomb.png": png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "header_only.jpg": jpeg[:20],
        "html.jpg": b"<html>404 Not Found</html>",
        "zeros.png": bytes(500),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    Image.fromarray(noise[..., 0].astype(np.float32)).save(folder / "float.tif")
    (folder / "dangling.jpg").symlink_to("nowhere")
    return sorted([*files, "float.tif", "dangling.jpg"])


def unusual_files(folder):
    """Write one file of each kind that is an image after all."""
    noise = Image.fromarray(np.random.RandomState(1).randint(0, 256, (40, 48, 3), np.uint8))
    noise.convert("L").save(folder / "grey.jpg")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.convert("P").save(folder / "palette.gif")
    noise.convert("RGBA").save(folder / "alpha.png")
    noise.resize((1, 1)).save(folder / "one_pixel.png")
    noise.save(folder / "really_a_webp.jpg", "WEBP")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(folder / "sixteen_bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)


def test_features_equal_a_plain_loop(model, photos):
    features = extract(model, photos)
    images = [Image.open(path) for path in sorted(photos.rglob("*.png"))]
    np.testing.assert_allclose(features.values, reference(model, images), atol=1e-5)
    assert features.values.dtype == np.float32 and features.values.shape == (12, 128)


def test_auto_features_have_nearly_the_directions_of_exact_ones(model, photos):
    exact, auto = (
        extract(model, photos, dtype=dtype, normalize=True).values for dtype in ("float32", "auto")
    )
    assert (exact * auto).sum(1).min() > 0.998


def test_rows_come_in_the_order_of_the_paths_with_labels_and_class_names(model, photos):
    features = extract(model, photos, batch_size=5)
    expected = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert features.paths == expected
    assert features.ids.tolist() == list(range(12))
    assert features.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert features.classes == ["cat", "dog", "eel"]
    assert features.errors == []


def test_workers_do_not_change_anything(model, photos, tmp_path):
    broken_files(photos / "dog")
    serial, parallel = (extract(model, photos, batch_size=3, num_workers=n) for n in (0, 2))
    np.testing.assert_array_equal(serial.values, parallel.values)
    assert serial.paths == parallel.paths and serial.errors == parallel.errors
    assert serial.ids.tolist() == parallel.ids.tolist()
    assert serial.labels.tolist() == parallel.labels.tolist()


def test_workers_may_be_started_by_spawn(model, photos):
    former = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        features = extract(model, photos, num_workers=1)
    finally:
        multiprocessing.set_start_method(former, force=True)
    np.testing.assert_array_equal(features.values, extract(model, photos, num_workers=0).values)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_input_is_a_row_or_an_error_and_no_neighbour_takes_a_place(model, photos, batch_size):
    broken = broken_files(photos / "dog")
    unusual_files(photos / "eel")
    features = extract(model, photos, batch_size=batch_size, num_workers=0)
    listed = list_images(photos)
    assert len(features) + len(features.errors) == len(listed)
    assert [error["path"] for error in features.errors] == [f"dog/{name}" for name in broken]
    assert all(listed.paths[error["id"]] == error["path"] for error in features.errors)
    assert all(error["reason"] for error in features.errors)
    assert [listed.paths[i] for i in features.ids] == features.paths
    images = [decode_image(photos / path) for path in features.paths]
    np.testing.assert_allclose(features.values, reference(model, images), atol=1e-5)


def test_errors_are_logged_once_at_the_end(model, photos, caplog):
    broken_files(photos / "dog")
    with caplog.at_level(logging.WARNING):
        extract(model, photos)
    (record,) = caplog.records
    assert re.match(r"9 of 21 images have no features:\n  dog/bomb.png: .*pixels", record.getMessage())


def test_a_run_without_one_good_image_shows_the_first_reasons_and_writes_nothing(model, tmp_path):
    (tmp_path / "bad").mkdir()
    broken_files(tmp_path / "bad")
    for out in (None, tmp_path / "features"):
        with pytest.raises(RuntimeError, match=r"None of the 9 images gave features:\n  bomb.png: .*\n  cut"):
            extract(model, tmp_path / "bad", out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_folder_written_holds_what_is_returned_without_one(model, photos, tmp_path):
    broken_files(photos / "dog")
    options = {"batch_size": 4, "rows_per_shard": 6, "num_workers": 0}
    returned = extract(model, photos, **options)
    written = extract(model, photos, out=tmp_path / "features", **options)
    for features in (written, Features.open(tmp_path / "features")):
        np.testing.assert_array_equal(features.values, returned.values)
        assert features.labels.tolist() == returned.labels.tolist()
        assert features.ids.tolist() == returned.ids.tolist()
        for name in ("paths", "classes", "errors", "meta"):
            assert getattr(features, name) == getattr(returned, name)
    shards = sorted((tmp_path / "features").glob("*.parquet"))
    assert [shard.name for shard in shards] == [f"part-0000{i}-of-00004.parquet" for i in range(4)]
    ids = [pd.read_parquet(shard)["id"].tolist() for shard in shards]
    assert [{i // 6 for i in shard} for shard in ids] == [{0}, {1}, set(), {3}]  # all of one failed


def test_two_extractions_write_the_same_bytes(model, photos, tmp_path):
    for name in ("a", "b"):
        extract(model, photos, out=tmp_path / name, rows_per_shard=5)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_manifest_says_what_made_the_features(model, photos, tmp_path):
    extract(model, photos, out=tmp_path / "features", normalize=True, output_dtype="float16")
    manifest = read_json(tmp_path / "features" / "manifest.json")
    meta = manifest["meta"]
    assert (manifest["num_features"], manifest["dtype"], manifest["rows"]) == (128, "float16", 12)
    assert meta["model"]["architecture"] == "resnet18_cifar"
    assert len(meta["model"]["weights_sha256"]) == 64
    assert meta["transform"]["data_config"]["input_size"] == [3, 32, 32]
    assert "Resize(size=32, interpolation=bilinear" in meta["transform"]["text"]
    assert meta["normalized"] is True
    assert meta["input"] == {"source": str(photos), "paths_sha256": list_images(photos).fingerprint()}
    assert meta["versions"]["torch"] == torch.__version__


def test_the_fingerprint_of_the_weights_changes_with_any_weight(photos):
    model = create_backbone("r18tiny")
    before = extract(model, photos).meta["model"]["weights_sha256"]
    assert extract(model, photos).meta["model"]["weights_sha256"] == before
    with torch.no_grad():
        model.layer4[1].bn2.bias[3] += 1e-6
    assert extract(model, photos).meta["model"]["weights_sha256"] != before


def test_a_tar_and_a_list_file_give_the_features_of_the_folder(model, photos, tmp_path):
    folder = extract(model, photos)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in sorted(photos.rglob("*.png")):
            tar.add(path, path.relative_to(photos).as_posix())
    tar = extract(model, tmp_path / "photos.tar", num_workers=2, batch_size=12)
    np.testing.assert_array_equal(tar.values, folder.values)
    assert tar.labels.tolist() == folder.labels.tolist() and tar.classes == folder.classes
    assert tar.paths == [f"photos.tar/{path}" for path in folder.paths]

    rows = [f"photos/{path}\t{label}" for path, label in zip(folder.paths, folder.labels, strict=True)]
    (tmp_path / "list.txt").write_text("\n".join(reversed(rows)))
    listed = extract(model, tmp_path / "list.txt")
    np.testing.assert_allclose(listed.values, folder.values[::-1], atol=1e-5)
    assert listed.labels.tolist() == folder.labels.tolist()[::-1]
    assert listed.classes == ["0", "1", "2"]


def test_a_missing_file_of_an_unchecked_list_is_an_error_row(model, photos):
    images = list_images([photos / "cat/0000.png", photos / "cat/none.png"], check=False)
    features = extract(model, images)
    assert features.ids.tolist() == [0]
    assert features.errors[0]["id"] == 1 and "No such file" in features.errors[0]["reason"]


def test_pil_images_and_arrays_in_memory(model, photos):
    images = [Image.open(path) for path in sorted(photos.rglob("*.png"))]
    expected = extract(model, photos).values
    arrays = [np.asarray(image) for image in images]
    for given in (images, arrays, np.stack(arrays), [*images[:6], *arrays[6:]]):
        features = extract(model, given)
        np.testing.assert_array_equal(features.values, expected)
        assert features.labels is None and features.classes is None
        assert features.paths[3] == "images[3]"


def test_what_is_no_image_among_images_in_memory_is_an_error_row(model):
    images = [*colours(9), "photo.jpg", np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), *colours(8)]
    features = extract(model, images)
    assert features.ids.tolist() == [0, 4]
    reasons = [error["reason"] for error in features.errors]
    assert reasons[0] == "got str, but need an image, a float tensor (C, H, W), or (image, label)"
    assert reasons[1].startswith("array is uint8 (3, 8, 8), but must be uint8 (H, W, 3), or a float tensor")
    assert reasons[2].startswith("array is float64 (8, 8, 3), but must be uint8 (H, W, 3), or a float tensor")


class Pairs(Dataset):
    """A user's Dataset; an item that is an exception is raised."""

    classes = ("cat", "dog")

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


def test_a_dataset_of_images_labels_and_preprocessed_tensors(model, photos):
    images = [Image.open(path).convert("RGB") for path in sorted(photos.rglob("*.png"))]
    items = [
        (images[0], 1),
        (images[1], np.int64(0)),
        (images[2], torch.tensor(1)),
        (preprocess(images[3]), None),
        preprocess(images[4]).double(),
    ]
    features = extract(model, Pairs(items))
    np.testing.assert_allclose(features.values, reference(model, images[:5]), atol=1e-5)
    assert features.labels.tolist() == [1, 0, 1, -1, -1]
    assert features.classes == ["cat", "dog"]
    assert features.meta["input"] == {"source": "Pairs", "paths_sha256": None}


def test_bad_items_of_a_dataset_are_error_rows(model):
    (image,) = colours(7)
    nan = torch.full((3, 32, 32), torch.nan)
    items = [
        (image, 0),
        KeyError("annotation"),
        (image, "cat"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), 0),
        (torch.zeros(1, 3, 32, 32), 0),
        (nan, 0),
        (-torch.inf * torch.ones(3, 32, 32), 0),  # a ReLU would turn it into finite features
        {"image": image},
        (image, 1),
    ]
    features = extract(model, Pairs(items), batch_size=4)
    assert features.ids.tolist() == [0, 8]
    assert features.labels.tolist() == [0, 1]
    expected = [
        "KeyError: 'annotation'",
        "its label is 'cat', but must be an integer",
        "tensor is torch.uint8 (3, 32, 32), but must be float (C, H, W)",
        "tensor is torch.float32 (1, 3, 32, 32), but must be float (C, H, W)",
        "the preprocessed image has values that are not finite",
        "the preprocessed image has values that are not finite",
        "got dict, but need an image, a float tensor (C, H, W), or (image, label)",
    ]
    assert [error["reason"] for error in features.errors] == expected


class Counted(Pairs):
    def __init__(self, items):
        super().__init__(items)
        self.asked = 0

    def __getitem__(self, i):
        self.asked += 1
        return super().__getitem__(i)


def test_a_dataset_of_something_else_is_refused_before_all_of_it_is_read(model):
    dataset = Counted([{"image": image} for image in colours(7)] * 1000)
    with pytest.raises(
        RuntimeError, match=r"(?s)None of the first 64 images .*got dict, but need .*image, label"
    ):
        extract(model, dataset, num_workers=0)
    assert dataset.asked == 64
    with pytest.raises(
        RuntimeError, match=r"(?s)None of the first 64 images .*\(3, 8, 8\), but must be uint8"
    ):
        extract(model, np.zeros((100, 3, 8, 8), np.uint8))


def test_many_broken_images_at_the_start_are_errors_of_their_own(model, tmp_path):
    images = [tmp_path / f"{i:03d}.png" for i in range(70)]
    for path in images:
        path.touch()
    colours(7)[0].save(images[-1])
    assert extract(model, tmp_path).ids.tolist() == [69]
    items = [KeyError(f"annotation {i}") for i in range(70)]
    assert extract(model, Pairs([*items, colours(7)[0]])).ids.tolist() == [70]


@pytest.mark.parametrize("image", [np.zeros((8, 9, 3), np.uint8), torch.zeros(3, 8, 9)])
def test_one_array_is_not_taken_for_many(model, image):
    with pytest.raises(ValueError, match=r"images is one .* of shape .*Give one image as \[image\]"):
        extract(model, image)
    assert len(extract(model, [image])) == 1
    images = np.empty(2, object)  # as pandas has a column of images
    images[:] = [image, image]
    assert len(extract(model, images)) == 2


def test_a_compiled_model_is_the_model(model, photos):
    expected = extract(model, photos)
    features = extract(torch.compile(model), photos)
    np.testing.assert_array_equal(features.values, expected.values)
    assert features.meta["model"] == expected.meta["model"]


def test_what_is_no_model_is_refused_by_name(photos):
    with pytest.raises(ValueError, match="model is <function .*, but must be a module, or a name or path"):
        extract(preprocess, photos)


def test_a_model_that_fails_on_the_images_says_what_it_was_given(photos):
    model = timm.create_model("vit_tiny_patch16_224", img_size=384, depth=1)  # with the transform of 224 px
    message = r"fails on the first images, \(8, 3, 224, 224\) .*AssertionError: .* give transform="
    with pytest.raises(RuntimeError, match=message):
        extract(model, photos)


def test_layers_as_one_text_are_refused_by_name(model, photos):
    with pytest.raises(ValueError, match=r"layers is the text 'stage4', .*layers=\['stage4'\]"):
        extract(model, photos, layers="stage4")


def test_tensors_of_several_shapes_in_one_batch(model):
    torch.manual_seed(1)
    tensors = [torch.randn(3, *shape) for shape in [(32, 32), (40, 24), (40, 24), (32, 32)]]
    with torch.no_grad():
        expected = torch.cat([model(tensor[None]) for tensor in tensors]).numpy()
    np.testing.assert_allclose(extract(model, Pairs(tensors)).values, expected, atol=1e-5)


def test_preprocessed_tensors_in_memory(model, photos):
    tensors = [preprocess(Image.open(path)) for path in sorted(photos.rglob("*.png"))]
    expected = extract(model, photos).values
    for given in (tensors, torch.stack(tensors)):
        np.testing.assert_array_equal(extract(model, given).values, expected)


def test_a_dataset_without_positions_is_refused(model):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(colours(1))

    with pytest.raises(ValueError, match="Stream without length and positions. Give a map-style Dataset"):
        extract(model, Stream())
    with pytest.raises(ValueError, match="DataLoader without length and positions. Give a map-style Dataset"):
        extract(model, DataLoader(colours(1)))


def test_a_dataset_may_give_images_alone_in_tuples(model):
    pixels = torch.rand(3, 3, 32, 32)
    features = extract(model, TensorDataset(pixels))
    assert features.labels is None and (features.values == extract(model, pixels).values).all()


def test_a_transform_that_gives_no_tensor_is_named(model):
    with pytest.raises(RuntimeError, match="the transform gives Image, but must give a tensor: float"):
        extract(model, colours(1), transform=lambda image: image)


@pytest.mark.parametrize("images", [[], Pairs([])])
def test_no_images_are_refused(model, images):
    with pytest.raises(ValueError, match="no images|No images"):
        extract(model, images)


def test_features_that_are_not_finite_are_error_rows():
    options = {"transform": transforms.ToTensor(), "batch_size": 3}
    features = extract(MeanColour(), colours(255, 0, 51), **options)
    assert features.ids.tolist() == [0, 2]
    np.testing.assert_allclose(features.values, [[1] * 3, [5] * 3], rtol=1e-6)
    assert features.errors == [
        {"id": 1, "path": "images[1]", "reason": "its features are not finite in float32"}
    ]


def test_values_beyond_float16_are_error_rows_only_there():
    images = Pairs([torch.full((3, 2, 2), value) for value in (1.0, 1e-5)])
    assert len(extract(MeanColour(), images)) == 2
    features = extract(MeanColour(), images, output_dtype="float16")
    assert features.values.dtype == np.float16 and features.values.tolist() == [[1, 1, 1]]
    assert features.errors[0]["reason"] == "its features are not finite in float16"


def test_a_classifier_does_not_change_the_features(photos):
    torch.manual_seed(0)
    options = {"stem_chs": 16, "channels": [16, 32, 64, 128]}
    model = timm.create_model("resnet18_cifar", num_classes=10, **options)
    with_classifier = extract(model, photos).values
    model.reset_classifier(0)
    np.testing.assert_array_equal(with_classifier, extract(model, photos).values)


def test_normalized_rows_have_norm_one(model, photos):
    values = extract(model, photos).values
    expected = values / np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(extract(model, photos, normalize=True).values, expected, rtol=1e-5)


def test_float16_is_the_rounded_float32(model, photos):
    values = extract(model, photos, output_dtype="float16").values
    np.testing.assert_array_equal(values, extract(model, photos).values.astype(np.float16))


def test_bfloat16_computes_coarsely_and_returns_float32(model, photos):
    fine, coarse = (extract(model, photos, dtype=dtype).values for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == np.float32
    assert 1e-5 < np.abs(coarse - fine).max() / np.abs(fine).max() < 0.05


def test_a_model_stored_in_bfloat16_is_fed_bfloat16(photos):
    features = extract(create_backbone("r18tiny").bfloat16(), photos, dtype="auto")
    assert features.values.dtype == np.float32 and len(features) == 12


def test_several_layers_in_one_pass_are_columns_that_hand_made_hooks_confirm(model, photos, tmp_path):
    images = torch.stack([preprocess(Image.open(path)) for path in sorted(photos.rglob("*.png"))])
    seen = {}
    hook = model.layer2.register_forward_hook(lambda module, given, maps: seen.update(maps=maps))
    with torch.no_grad():
        embedding = model(images)
    hook.remove()
    options = {"layers": ["layer2", "embedding"], "rows_per_shard": 5}
    returned = extract(model, photos, pool="max", layers=["layer2"])
    np.testing.assert_allclose(returned["layer2"], seen["maps"].amax((2, 3)), atol=1e-5)
    written = extract(model, photos, out=tmp_path / "features", **options)
    for features in (written, extract(model, photos, **options)):
        assert features.columns == {"layer2": 32, "embedding": 128}
        np.testing.assert_allclose(features["layer2"], seen["maps"].mean((2, 3)), atol=1e-5)
        np.testing.assert_allclose(features["embedding"], embedding, atol=1e-5)
        np.testing.assert_array_equal(features.values, features["layer2"])
    manifest = read_json(tmp_path / "features" / "manifest.json")
    assert manifest["format"] == "mocohub-features/2" and manifest["meta"]["layers"] == options["layers"]


def test_flip_averages_an_image_and_its_mirror_image(model, photos):
    images = [Image.open(path) for path in sorted(photos.rglob("*.png"))]
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    expected = (reference(model, images) + reference(model, mirrored)) / 2
    features = extract(model, photos, flip=True)
    np.testing.assert_allclose(features.values, expected, atol=1e-5)
    assert features.meta["flip"] is True


def test_a_projection_is_applied_before_normalisation_and_recorded(model, photos, tmp_path):
    plain = extract(model, photos)
    projection = Projection.fit(plain, 3, whiten=True)
    file = projection.save(tmp_path / "pca.safetensors")
    for given in (projection, file):
        features = extract(
            model, photos, projection=given, normalize=True, out=tmp_path / given.__class__.__name__
        )
        expected = projection(plain.values)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(features.values, expected, atol=1e-5)
        assert features.meta["projection"] == projection.facts
    with pytest.raises(ValueError, match="projection is for one column of features, but layers names 2"):
        extract(model, photos, projection=projection, layers=["layer1", "layer2"])
    with pytest.raises(ValueError, match="fitted on features with model"):
        extract(create_backbone("r18tiny"), photos, projection=projection)


def test_rows_know_the_size_of_their_image_before_it_was_preprocessed(model, photos):
    Image.new("RGB", (60, 20)).save(photos / "eel/wide.jpg")
    features = extract(model, photos)
    row = features.row("eel/wide.jpg")
    assert (features.extras["width"][row], features.extras["height"][row]) == (60, 20)
    assert features.extras["width"][0] == features.extras["height"][0] == 40
    tensors = extract(model, torch.zeros(2, 3, 32, 32) + torch.arange(2)[:, None, None, None])
    assert tensors.extras == {"width": [None] * 2, "height": [None] * 2}


def test_fast_decode_changes_the_features_of_large_jpegs_a_little_and_of_others_not(model, tmp_path):
    (tmp_path / "jpegs").mkdir()
    coarse = np.random.RandomState(0).randint(0, 256, (6, 8, 3), np.uint8)
    for name, size in (("large", (320, 240)), ("small", (60, 45))):
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(tmp_path / f"jpegs/{name}.jpg", quality=95)
    exact = extract(model, tmp_path / "jpegs", normalize=True)
    fast = extract(model, tmp_path / "jpegs", normalize=True, fast_decode=True)
    cosine = float(fast.values[0] @ exact.values[0])
    assert cosine > 0.99 and not np.array_equal(fast.values[0], exact.values[0])
    np.testing.assert_array_equal(fast.values[1], exact.values[1])
    assert fast.extras == exact.extras == {"width": [320, 60], "height": [240, 45]}
    assert fast.meta["transform"]["fast_decode_px"] == 32
    with pytest.raises(ValueError, match="begins with torchvision.transforms.Resize.*begins with ToTensor"):
        transform = transforms.Compose([transforms.ToTensor()])
        extract(model, tmp_path / "jpegs", transform=transform, fast_decode=True)


@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_of_every_module_is_restored(photos, fails):
    model = create_backbone("r18tiny").train()
    model.bn1.eval()  # as for fine-tuning with frozen statistics
    before = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        model.layer4.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="fails on the first images, .*ZeroDivisionError: division by"):
            extract(model, photos)
    else:
        extract(model, photos)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_states_are_left_alone(model, photos, num_workers):
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].copy()
    extract(model, photos, num_workers=num_workers, batch_size=4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_ctrl_c_leaves_nothing_half_written(photos, tmp_path):
    class Interrupted(MeanColour):
        def forward(self, x):
            if len(x) < 8:  # the second batch
                raise KeyboardInterrupt
            return super().forward(x)

    options = {"batch_size": 8, "rows_per_shard": 8, "num_workers": 2, "transform": transforms.ToTensor()}
    with pytest.raises(KeyboardInterrupt):
        extract(Interrupted(), photos, out=tmp_path / "features", **options)
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        Features.open(tmp_path / "features")
    done = list((tmp_path / "features").glob("*.parquet"))
    assert [path.name for path in done] == ["part-00000-of-00002.parquet"]
    assert not list((tmp_path / "features/progress").glob(".*"))


def test_an_existing_folder_is_refused_before_anything_is_computed(photos, tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="features' already exists"):
        extract("no/such/model", "no/such/images", out=tmp_path / "features")


def test_a_model_may_be_named_by_its_folder(model, photos, tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    args = {"stem_chs": 16, "channels": [16, 32, 64, 128]}
    cfg = pretrained_cfg("r18tiny", crop_px=32, crop_pct=1.0)
    config = {"architecture": "resnet18_cifar", "num_classes": 0, "model_args": args, "pretrained_cfg": cfg}
    write_json(folder / "config.json", config)
    features = extract(folder, photos)
    np.testing.assert_array_equal(features.values, extract(model, photos).values)
    assert features.meta["model"]["name"] == str(folder)


def test_a_model_that_does_not_say_its_preprocessing_needs_a_transform(photos):
    with pytest.raises(ValueError, match="MeanColour has no pretrained_cfg.*Give transform="):
        extract(MeanColour(), photos)
    with pytest.raises(RuntimeError, match="no pretrained_cfg to preprocess it by; give transform="):
        extract(MeanColour(), Pairs(colours(1, 2)))


def test_a_transform_of_the_user_is_used_and_recorded(photos):
    def half(image):
        return transforms.functional.to_tensor(image) / 2

    features = extract(MeanColour(), colours(255), transform=half)
    np.testing.assert_allclose(features.values, [[2, 2, 2]])
    assert features.meta["transform"]["data_config"] is None
    assert features.meta["transform"]["text"].endswith(".half")


def test_a_model_that_does_not_pool_is_refused(photos):
    model = create_backbone("r18tiny", global_pool="")
    with pytest.raises(ValueError, match=r"gives \(8, 128, 4, 4\) for 8 images.*num_classes=0"):
        extract(model, photos)
    with pytest.raises(ValueError, match=r"gives \(1, 3\) for 8 images"):
        extract(OneForAll(), photos, transform=preprocess)
    with pytest.raises(ValueError, match="gives list"):
        extract(timm.create_model("resnet18_cifar", features_only=True), photos)


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("batch_size", 0, "batch_size is 0, but must be at least 1"),
        ("rows_per_shard", 0, "rows_per_shard is 0, but must be at least 1"),
        ("num_workers", -1, "num_workers is -1, but must be at least 0"),
        ("dtype", "float16", "Unknown dtype 'float16'. Choose one of: .*float32"),
        ("output_dtype", "int8", "Unknown output_dtype 'int8'. Choose one of: float"),
        ("device", "no-such", "device='no-such' cannot be used: .*Omit it, or give 'cpu'"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(model, photos, argument, given, message):
    with pytest.raises(ValueError, match=message):
        extract(model, photos, **{argument: given})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused_and_not_replaced(model, photos):
    with pytest.raises(ValueError, match="device='cuda' cannot be used: .*Omit it, or give 'cpu'") as error:
        extract(model, photos, device="cuda")
    assert len(str(error.value)) < 200  # and not the pages that torch adds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_speed_and_errors_on_a_terminal_only(model, photos, monkeypatch, caplog):
    broken_files(photos / "dog")
    shown = []
    for stream, progress in [(Terminal(), True), (Terminal(), False), (io.StringIO(), True)]:
        monkeypatch.setattr(sys, "stderr", stream)
        extract(model, photos, progress=progress)
        shown.append(stream.getvalue())
    assert re.search(r"21/21 .*img/s.*errors=9", shown[0])
    assert shown[1] == shown[2] == ""


class Labelled(Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return torch.ones(3, 4, 4), self.labels[i]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_label_beyond_int64_costs_its_own_row_only(tmp_path, on_disk):
    labels = [2**63 - 1, 2**63, -(2**63), 10**30]
    features = extract(MeanColour(), Labelled(labels), out=tmp_path / "out" if on_disk else None)
    assert features.labels.tolist() == [2**63 - 1, -(2**63)]
    assert [error["reason"] for error in features.errors] == [
        f"its label, {label}, is beyond int64" for label in (2**63, 10**30)
    ]


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1, 1e10, 1e25])
def test_normalized_rows_have_unit_length_however_long_they_were(scale):
    images = [torch.full((3, 2, 2), 1.0) * torch.tensor([1.0, 2.0, -4.0])[:, None, None] / scale] * 2
    values = extract(MeanColour(), images, normalize=True).values
    np.testing.assert_allclose(values, np.tile(np.float32([4, 2, -1]) / 21**0.5, (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("name", ["path", "width", "a b", "a/b"])
def test_a_layer_whose_name_cannot_be_a_column_is_refused_at_once(tmp_path, name):
    network = nn.Module()
    network.add_module(name, nn.Flatten())
    with pytest.raises(ValueError, match=f"layers names '{name}', which cannot be the name of a column"):
        extract(network, colours(1, 2), layers=[name], transform=transforms.ToTensor())


def test_a_folder_whose_name_is_not_utf8_is_extracted(model, photos, tmp_path):
    odd = photos.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    features = extract(model, odd, out=tmp_path / "out", num_workers=0)
    assert len(features) == 12 and features.meta["input"]["source"] == str(odd)
    assert len(extract(model, odd, out=tmp_path / "out", num_workers=0)) == 12
