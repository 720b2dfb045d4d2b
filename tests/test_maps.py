"""Features without pooling: maps (C, H, W) and tokens (T, D), from the network to the disk and back."""

import numpy as np
import pytest
import timm
import torch
from helpers.hub import TINY_R50, TINY_WIDE, images, randomise
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from mocohub.backbones import create_backbone
from mocohub.features.extract import extract
from mocohub.features.formats import convert
from mocohub.features.network import FrozenNetwork
from mocohub.features.precision import largest_error, least_cosine
from mocohub.features.projection import Projection
from mocohub.features.store import Features
from mocohub.features.verify import verify
from tests.helpers.images import write_images

SWIN = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}


@pytest.fixture(scope="module")
def model():
    return randomise(create_backbone("r18tiny"), 1)


def network_of(architecture, arguments, seed=3):
    return randomise(timm.create_model(architecture, num_classes=0, **arguments), seed)


def features(model, pixels, **arguments):
    with FrozenNetwork(model, device="cpu", **{"dtype": "float32", **arguments}) as network:
        found = network(pixels)
        assert network.columns == {name: values[0].numel() for name, values in found.items()}
        assert network.shapes == {
            name: list(values.shape[1:]) for name, values in found.items() if values.ndim > 2
        }
        return found


@torch.no_grad()
def outputs(model, pixels, *names):
    """What modules give, by hooks that copy."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.clone()})
        )
        for name in names
    ]
    model.eval()(pixels)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


def assert_same(found, expected):
    assert found.shape == expected.shape
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert found.dtype == torch.float32 and error.max() <= 1e-5


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("resnet50", TINY_R50[1]),
        ("resnetv2_50", {**TINY_WIDE[1], "preact": False}),
        ("test_efficientnet", {}),
        ("test_convnext", {}),
        ("swin_tiny_patch4_window7_224", SWIN),  # whose maps are (n, H, W, C)
    ],
)
def test_maps_of_stages_are_timms_intermediates(architecture, arguments):
    model, pixels = network_of(architecture, arguments), images(32)
    found = features(model, pixels, layers=["stage1", "stage4", "embedding"], pool="none")
    with torch.no_grad():
        maps = model.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")
        whole = model.forward_features(pixels)
    assert_same(found["stage1"], maps[-4])
    assert_same(found["stage4"], maps[-1])
    assert_same(found["embedding"], whole.permute(0, 3, 1, 2) if architecture.startswith("swin") else whole)


def test_a_vision_transformer_gives_its_tokens():
    model, pixels = network_of("test_vit", {"img_size": 32}), images(32)
    found = features(model, pixels, layers=["blocks.1", "embedding"], pool="none")
    (tokens,) = outputs(model, pixels, "blocks.1")
    assert tokens.shape[1] == 5  # four patches and a class token
    assert_same(found["blocks.1"], tokens)
    assert_same(found["embedding"], model.forward_features(pixels).detach())


@pytest.mark.parametrize("shape", [(32, 32), (32, 64)])
def test_inner_modules_may_have_another_layout_than_the_network(shape):
    pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    convnext = network_of("test_convnext", {})
    inner = "stages.0.blocks.0.mlp"  # its maps are (n, H, W, C)
    (maps,) = outputs(convnext, pixels, inner)
    assert maps.shape[1:3] == (shape[0] // 4, shape[1] // 4)
    found = features(convnext, pixels, layers=[f"{inner}:none", f"{inner}:max", f"{inner}.fc1"])
    assert_same(found[f"{inner}:none"], maps.permute(0, 3, 1, 2))
    assert_same(found[f"{inner}:max"], maps.amax((1, 2)))
    assert_same(found[f"{inner}.fc1"], outputs(convnext, pixels, f"{inner}.fc1")[0].mean((1, 2)))
    swin = network_of("swin_tiny_patch4_window7_224", {**SWIN, "img_size": shape})
    (maps,) = outputs(swin, pixels, "patch_embed.proj")  # and here (n, C, H, W), where H may be C too
    assert_same(features(swin, pixels, layers=["patch_embed.proj:none"])["patch_embed.proj"], maps)


def test_layers_have_poolings_of_their_own_in_one_pass():
    model, pixels = network_of("resnet50", TINY_R50[1]), images(64)
    calls = []
    hook = model.conv1.register_forward_hook(lambda *_: calls.append(1))
    layers = ["stage2:none", "stage3", "stage4:max", "stage4:gem", "embedding:none", "embedding:avg"]
    with FrozenNetwork(model, device="cpu", dtype="float32", layers=layers, pool="avg") as network:
        network.prepare(pixels)
        calls.clear()
        found = network(pixels)
    hook.remove()
    assert len(calls) == 1
    assert list(found) == ["stage2", "stage3", "stage4:max", "stage4:gem", "embedding:none", "embedding:avg"]
    maps = dict(zip(("2", "3", "4"), outputs(model, pixels, "layer2", "layer3", "layer4"), strict=True))
    assert_same(found["stage2"], maps["2"])
    assert_same(found["stage3"], maps["3"].mean((2, 3)))
    assert_same(found["stage4:max"], maps["4"].amax((2, 3)))
    assert_same(found["stage4:gem"], maps["4"].clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))
    assert_same(found["embedding:none"], maps["4"])
    assert_same(found["embedding:avg"], model(pixels).detach())


def test_stages_that_timm_tells_of_but_does_not_have_are_unknown():
    shape = {"img_size": 32, "embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}
    model = timm.create_model("twins_svt_small", num_classes=0, **shape)
    assert model.feature_info[-1]["module"] not in dict(model.named_modules())
    with pytest.raises(ValueError, match="Unknown layer 'stage4'. Choose one of: "):
        FrozenNetwork(model, device="cpu", layers=["stage4"])


def test_the_embedding_of_a_classifier_is_the_same_beside_its_maps():
    model, pixels = randomise(timm.create_model("resnet50", num_classes=7, **TINY_R50[1]), 1), images(32)
    alone = features(model, pixels)["embedding"]
    found = features(model, pixels, layers=["embedding", "embedding:none", "fc"])
    assert_same(found["embedding:avg"], alone)
    assert_same(found["embedding:none"], model.forward_features(pixels).detach())
    assert_same(found["fc"], model(pixels).detach())


def test_maps_and_rows_are_copied_before_what_follows_writes_over_them():
    model, pixels = network_of("resnet50", TINY_R50[1]), images(32)
    (maps,) = outputs(model, pixels, "bn1")
    assert (maps < 0).any()  # the activation after it works in place
    assert_same(features(model, pixels, layers=["bn1:none"])["bn1"], maps)
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    (rows,) = outputs(perceptron, images(2), "1")
    assert (rows < 0).any()
    assert_same(features(perceptron, images(2), layers=["1"])["1"], rows)


def test_two_ways_to_compute_are_compared_over_all_values_of_a_map():
    reference = {"maps": images(4)}
    found = {"maps": images(4) + 0.1 * images(4).flip(0)}
    a, b = (values["maps"].reshape(2, -1).double().numpy() for values in (found, reference))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    assert least_cosine(found, reference) == pytest.approx(cosines.min(), abs=1e-6)
    assert largest_error(found, reference) == pytest.approx(errors.max(), rel=1e-5)


class ReadsBefore(nn.Module):
    """Its maps would change if its batch norm were folded; its mean over images does not."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.both = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity()

    def forward(self, x):
        before = self.conv(x)
        self.both(torch.cat([before, self.norm(before)], 1))
        return x.mean((2, 3))


def test_batch_norms_are_not_folded_where_only_maps_would_change():
    model = randomise(ReadsBefore(), 4)
    with FrozenNetwork(model, device="cpu", dtype="float32", layers=["both:none", "embedding"]) as network:
        found = network(images(8))
        assert network.facts["folded"] == 0
    assert_same(found["both"], outputs(model, images(8), "both")[0])
    with FrozenNetwork(model, device="cpu", dtype="float32") as network:
        network(images(8))
        assert network.facts["folded"] == 1


def test_maps_on_disk_and_in_memory_are_those_of_a_plain_loop(model, tmp_path):
    photos = write_images(tmp_path / "photos", {"cat": 5, "dog": 4}, size_px=32)
    (photos / "dog/broken.png").write_bytes(b"?")
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    maps, embeddings = [], []
    for path in sorted(photos.rglob("0*.png")):
        pixels = normalise(transforms.ToTensor()(Image.open(path)))[None]
        maps += outputs(model, pixels, "layer3")
        embeddings.append(model(pixels).detach())
    maps, embeddings = torch.cat(maps), torch.cat(embeddings)
    options = {
        "layers": ["stage3:none", "embedding"],
        "dtype": "float32",
        "batch_size": 4,
        "rows_per_shard": 6,
        "num_workers": 0,
    }
    in_memory = extract(model, photos, **options)
    written = extract(model, photos, out=tmp_path / "features", **options)
    for found in (in_memory, written, Features.open(tmp_path / "features")):
        assert found.shapes == {"stage3": (64, 8, 8)}
        assert found.columns == {"stage3": 4096, "embedding": 128}
        assert found.maps("stage3").shape == (9, 64, 8, 8)
        assert_same(torch.from_numpy(found.maps("stage3")), maps)
        np.testing.assert_array_equal(found["stage3"], found.maps("stage3").reshape(9, -1))
        assert_same(torch.from_numpy(found["embedding"]), embeddings)
        assert [error["path"] for error in found.errors] == ["dog/broken.png"]
        assert found.meta["layers"] == ["stage3:none", "embedding"] and found.meta["pool"] == "avg"
    before = {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()}
    extract(model, photos, out=tmp_path / "again", **{**options, "num_workers": 2})
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == before


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_maps_and_two_poolings_of_a_layer_are_kept_in_other_layouts(model, tmp_path, format):
    pixels = images(32, 5)
    layers = ["stage4:max", "stage4:none", "embedding"]
    options = {"layers": layers, "dtype": "float32", "out": tmp_path / "features", "format": format}
    extract(model, pixels, **options)
    verify(tmp_path / "features")
    found = Features.open(tmp_path / "features")
    assert list(found.columns) == layers and found.shapes == {"stage4:none": (128, 4, 4)}
    (maps,) = outputs(model, pixels, "layer4")
    assert_same(torch.tensor(found.maps("stage4:none")), maps)
    assert_same(torch.tensor(found["stage4:max"]), maps.amax((2, 3)))
    back = convert(tmp_path / "features", tmp_path / "parquet", to="parquet")
    np.testing.assert_array_equal(Features.open(back).maps("stage4:none"), found.maps("stage4:none"))


@pytest.mark.slow
def test_compiling_gives_the_same_maps(model):
    pixels = images(32, 6)
    layers = ["layer3:none", "embedding", "layer4:max"]
    with FrozenNetwork(model, device="cpu", dtype="float32", compile=True, layers=layers) as network:
        network.prepare(pixels[:4])
        assert network.facts["compiled"] == [4, 3, 32, 32]
        found = network(pixels[:4])
    assert_same(found["layer3"], outputs(model, pixels[:4], "layer3")[0])
    assert_same(found["layer4"], outputs(model, pixels[:4], "layer4")[0].amax((2, 3)))


class Tensors(Dataset):
    def __init__(self, *shapes):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, i):
        return torch.randn(3, *self.shapes[i], generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_image_whose_maps_have_another_shape_is_an_error_and_no_wrong_row(model, tmp_path, batch_size):
    tensors = Tensors((32, 48), (48, 32), (32, 48), (40, 48), (32, 48))  # the second has as many values
    options = {"dtype": "float32", "batch_size": batch_size, "num_workers": 0}
    found = extract(model, tensors, pool="none", layers=["layer4", "layer1:avg"], **options)
    assert found.ids.tolist() == [0, 2, 4]
    assert [(error["id"], error["reason"]) for error in found.errors] == [
        (1, "its layer4 has the shape [128, 6, 4], but that of the first images [128, 4, 6]"),
        (3, "its layer4 has the shape [128, 5, 6], but that of the first images [128, 4, 6]"),
    ]
    for row, i in enumerate(found.ids.tolist()):
        assert_same(
            torch.from_numpy(found.maps("layer4")[row : row + 1]),
            outputs(model, tensors[i][None], "layer4")[0],
        )
    assert len(extract(model, tensors, **options)) == 5  # pooled, all are rows


def test_features_whose_width_depends_on_the_image_are_errors_too():
    found = extract(nn.Flatten(), Tensors((2, 2), (2, 3), (2, 2)), dtype="float32", batch_size=3)
    assert found.values.shape == (2, 12) and found.ids.tolist() == [0, 2]
    assert found.errors[0]["reason"] == (
        "its embedding has the shape [18], but that of the first images [12]"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pool": "none", "normalize": True},
            "normalize is for vectors, but .* maps of embedding.*pool the maps",
        ),
        ({"layers": ["layer1:none", "layer2"], "normalize": True}, "maps of layer1. Omit normalize"),
        ({"pool": "none", "crops": 5}, "crops is for vectors, but pool='none'"),
        ({"pool": "none", "flip": True}, "Maps are not averaged"),
    ],
)
def test_what_is_for_vectors_is_refused_for_maps(model, options, message):
    with pytest.raises(ValueError, match=message):
        extract(model, [Image.new("RGB", (32, 32))], **options)


def test_a_projection_is_refused_for_maps(model):
    projection = Projection.fit(np.random.default_rng(0).normal(size=(9, 128)).astype("float32"), 3)
    with pytest.raises(
        ValueError, match="projection is for vectors, but pool='none' gives maps of embedding"
    ):
        extract(model, [Image.new("RGB", (32, 32))], pool="none", projection=projection)
