"""The contrastive embedding: the projection head of runs and checkpoints, kept and extracted."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.dialects import WRITERS, CifarResNet, headless, notebook
from helpers.hub import TorchvisionResNet, images, randomise
from helpers.images import write_images
from helpers.recipes import smallest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import mocohub
from mocohub.backbones import create_backbone
from mocohub.features.extract import extract
from mocohub.features.search import extract_like
from mocohub.features.store import Features
from mocohub.files import read_json, sha256, write_json
from mocohub.hub.encoders import read_encoder
from mocohub.hub.export import export
from mocohub.hub.heads import ContrastiveHead, head_of
from mocohub.pretrain.encoder import Encoder, projection_head
from mocohub.pretrain.loop import train
from mocohub.pretrain.recipe import Recipe

# Of each layout of helpers.dialects: the weights of the query and the key encoder's projection by their full
# names, with the layers' places between.
PLACES = {
    "official v1": ("state_dict/module.encoder_q.fc.weight", "state_dict/module.encoder_k.fc.weight"),
    "official v2": ("state_dict/module.encoder_q.fc.{}.weight", "state_dict/module.encoder_k.fc.{}.weight"),
    "official without module": ("state_dict/encoder_q.fc.weight", "state_dict/encoder_k.fc.weight"),
    "pycontrast": ("model/module.head.{}.weight", "model_ema/head.{}.weight"),
    "mmselfsup 0.x": ("state_dict/encoder_q.1.mlp.{}.weight", "state_dict/encoder_k.1.mlp.{}.weight"),
    "mmselfsup 1.x": ("state_dict/neck.mlp.{}.weight", "state_dict/encoder_k.module.1.mlp.{}.weight"),
    "solo-learn": ("state_dict/projector.{}.weight", "state_dict/momentum_projector.{}.weight"),
    "solo-learn before 1.0.3": ("state_dict/projector.{}.weight", None),
    "lightly": (
        "state_dict/projection_head.layers.{}.weight",
        "state_dict/key_projection_head.layers.{}.weight",
    ),
    "lightly, early": (
        "state_dict/query_projection_head.layers.{}.weight",
        "state_dict/projection_head.layers.{}.weight",
    ),
    "lightly's example": (
        "state_dict/projection_head.layers.{}.weight",
        "state_dict/projection_head_momentum.layers.{}.weight",
    ),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"a": 9, "b": 9})


@pytest.fixture(scope="module", params=["linear", "mlp"])
def trained(request, photos, tmp_path_factory):
    """A run with a head of each kind, and its recipe."""
    recipe = dataclasses.replace(smallest(epochs=2), head=request.param)
    out = tmp_path_factory.mktemp("runs") / request.param
    return train(recipe, photos, out, num_workers=0, precision="float32"), recipe


def checkpoint(run):
    return max((run / "checkpoints").iterdir())


def encoder_of(run, recipe: Recipe, name: str) -> Encoder:
    """What was trained, put together as in training."""
    backbone = create_backbone(recipe.backbone, **recipe.model_args)
    encoder = Encoder(backbone, projection_head(recipe.head, backbone.num_features, recipe.embed_dim))
    tensors = load_file(checkpoint(run) / "state.safetensors")
    prefix = f"{name}."
    encoder.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    return encoder.eval()


@torch.no_grad()
def pixels_of(model, photos):
    """Preprocessed images in the order of their paths."""
    transform = mocohub.transform(model)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(photos.rglob("*.png"))])


@pytest.mark.parametrize("name", ["query", "key"])
def test_the_contrastive_embedding_is_that_of_the_encoder_in_training(trained, photos, name):
    run, recipe = trained
    for source in (run, checkpoint(run)):
        model = mocohub.load(source, encoder=name, head=True)
        pixels = pixels_of(model, photos)
        encoder = encoder_of(run, recipe, name)
        with torch.no_grad():
            expected, features = encoder(pixels), encoder.backbone(pixels)
            assert torch.equal(model(pixels), features)  # the backbone gives what it gives without head
            assert torch.equal(model.contrastive(model(pixels)), expected)
        assert expected.shape == (18, recipe.embed_dim)
        found = extract(model, photos, layers=["contrastive"], dtype="float32", num_workers=0)
        assert np.abs(found.values - expected.numpy()).max() < 1e-6
        np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), 1, atol=1e-6)


def test_a_run_is_loaded_with_its_head_where_the_layers_ask_for_it(trained, photos, tmp_path):
    run, recipe = trained
    layers = ["contrastive", "embedding", "stage4:max", "contrastive.layers.0"]
    found = extract(run, photos, layers=layers, pool="avg", out=tmp_path / "features", dtype="float32")
    encoder = encoder_of(run, recipe, "query")
    pixels = pixels_of(mocohub.load(run), photos)
    with torch.no_grad():
        rows = encoder.backbone(pixels)
        first = encoder.head if recipe.head == "linear" else encoder.head[0]
        expected = {
            "contrastive": encoder(pixels),
            "embedding": rows,
            "stage4": encoder.backbone.forward_features(pixels).amax((2, 3)),
            "contrastive.layers.0": first(rows),
        }
    assert list(found.columns) == list(expected)
    opened = Features.open(tmp_path / "features")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(opened[name], found[name])
    again = extract_like(found, photos / "a")  # loads the run with its head by itself
    np.testing.assert_allclose(again["contrastive"], found["contrastive"][:9], atol=1e-6)


def test_one_pass_gives_embedding_and_contrastive_embedding(trained, photos):
    model = mocohub.load(trained[0], head=True)
    pixels = pixels_of(model, photos)
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    found = extract(model, pixels, layers=["contrastive", "embedding:none"], dtype="float32", num_workers=0)
    with torch.no_grad():
        calls.clear()
        expected = model.contrastive(model(pixels))
    np.testing.assert_allclose(found["contrastive"], expected, atol=1e-6)
    np.testing.assert_allclose(found.maps("embedding"), model.forward_features(pixels).detach(), atol=1e-5)


def test_the_hash_of_the_weights_covers_the_head(trained, photos):
    model = mocohub.load(trained[0], head=True)
    options = {"layers": ["contrastive"], "dtype": "float32", "num_workers": 0}
    first = extract(model, photos, **options).meta["model"]["weights_sha256"]
    assert extract(trained[0], photos, **options).meta["model"]["weights_sha256"] == first
    with torch.no_grad():
        model.contrastive.layers[-1].weight[0, 0] += 1e-6
    assert extract(model, photos, **options).meta["model"]["weights_sha256"] != first


def test_a_head_under_bfloat16_gives_float32_of_unit_length(trained, photos):
    found = extract(trained[0], photos, layers=["contrastive"], dtype="bfloat16", num_workers=0).values
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    model = mocohub.load(trained[0], head=True, dtype=torch.bfloat16)
    found = extract(model, photos, layers=["contrastive"], num_workers=0).values
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.fixture(scope="module")
def pair():
    return [randomise(TorchvisionResNet(64, (8, 16, 32, 64)), seed) for seed in (1, 2)]


def weights_of(written, place):
    """Weight and bias of each layer, by their full names in the file."""
    container, name = place.split("/")
    names = [name] if "{}" not in name else [name.format(i) for i in (0, 2)]
    return [(written[container][n], written[container][n.replace("weight", "bias")]) for n in names]


def embed(rows, layers):
    for i, (weight, bias) in enumerate(layers):
        rows = F.linear(rows.relu() if i else rows, weight, bias)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("encoder", ["query", "key"])
@pytest.mark.parametrize("layout", PLACES)
def test_files_of_other_projects_give_the_head_of_each_encoder(layout, encoder, pair, tmp_path):
    written = WRITERS[layout](*pair)
    torch.save(written, tmp_path / "moco.pth")
    number = ("query", "key").index(encoder)
    place = PLACES[layout][number]
    if place is None:
        with pytest.raises(
            ValueError, match="key encoder of solo-learn before 1.0.3.*holds no projection head"
        ):
            mocohub.load(tmp_path / "moco.pth", encoder=encoder, head=True)
        return
    model = mocohub.load(tmp_path / "moco.pth", encoder=encoder, head=True)
    with torch.no_grad():
        expected = embed(headless(pair[number])(images(64)), weights_of(written, place))
        torch.testing.assert_close(model.contrastive(model(images(64))), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoder", ["query", "key"])
def test_vissl_keeps_one_layer_of_the_head_in_each_of_its_heads(encoder, pair, tmp_path):
    written = WRITERS["vissl"](*pair)
    torch.save(written, tmp_path / "moco.torch")
    state = written["classy_state_dict"]
    tensors = state["base_model"]["model"]["heads"]
    if encoder == "key":
        prefix = "moco_encoder.heads."
        tensors = {n.removeprefix(prefix): t for n, t in state["loss"].items() if n.startswith(prefix)}
    layers = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("0.clf.0", "1.clf.2")]
    model = mocohub.load(tmp_path / "moco.torch", encoder=encoder, head=True)
    with torch.no_grad():
        expected = embed(headless(pair[encoder == "key"])(images(64)), layers)
        torch.testing.assert_close(model.contrastive(model(images(64))), expected, rtol=0, atol=1e-6)


def test_the_notebooks_head_is_the_last_layer_of_its_network(tmp_path):
    query, key = (randomise(CifarResNet(), seed) for seed in (3, 4))
    torch.save(notebook(query, key), tmp_path / "model_last.pth")
    model = mocohub.load(tmp_path / "model_last.pth", head=True)
    with torch.no_grad():
        expected = F.normalize(query.net(images(32)), dim=1)
        torch.testing.assert_close(model.contrastive(model(images(32))), expected, rtol=0, atol=1e-6)


def test_a_head_cannot_be_put_on_maps(trained):
    with pytest.raises(
        ValueError, match="needs pooled features, but features_only=True gives maps. Omit one"
    ):
        mocohub.load(trained[0], head=True, features_only=True)


def test_timms_own_arguments_adapt_a_backbone_with_a_head(trained):
    grey, colour = (mocohub.load(trained[0], head=True, in_chans=n) for n in (1, 3))
    channel = images(16)[:, :1]
    with torch.no_grad():
        expected = colour.contrastive(colour(channel.expand(-1, 3, -1, -1)))
        torch.testing.assert_close(grey.contrastive(grey(channel)), expected, rtol=1e-4, atol=1e-5)


def test_a_head_with_batch_norms_is_refused(pair, tmp_path):
    torch.save(WRITERS["moco-v3"](*pair), tmp_path / "r-50.pth")
    for encoder in ("query", "key"):
        with pytest.raises(ValueError, match="in '.*r-50.pth' is none of MoCo v1 or v2.*Omit head=True"):
            mocohub.load(tmp_path / "r-50.pth", encoder=encoder, head=True)
    assert mocohub.load(tmp_path / "r-50.pth").num_classes == 0  # as ever


def test_a_classifier_is_no_projection_head(pair, tmp_path):
    torch.save(pair[0].state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="torchvision, timm.*holds no projection head.*Training runs and"):
        mocohub.load(tmp_path / "resnet.pth", head=True)


def test_an_exported_folder_names_the_run_that_holds_its_head(trained, photos, tmp_path):
    run, recipe = trained
    folder = export(run, tmp_path / "model", license="mit")
    message = (
        r"exported model and holds no projection head.*Give the run of .*, which was started 20.*step \d+"
    )
    with pytest.raises(ValueError, match=message):
        mocohub.load(folder, head=True)
    with pytest.raises(ValueError, match=message):
        extract(folder, photos, layers=["contrastive"])
    with pytest.raises(ValueError, match=message):
        read_encoder(folder, head=True)
    (folder / "training-state").mkdir()
    (folder / "training-state/state.json").write_text("{}")
    with pytest.raises(ValueError, match="Give '.*model/training-state', which was published with it"):
        mocohub.load(folder, head=True)


def test_an_export_of_a_file_names_the_file_and_other_folders_say_what_holds_a_head(pair, tmp_path):
    torch.save(WRITERS["official v2"](*pair), tmp_path / "moco.pth")
    folder = export(tmp_path / "moco.pth", tmp_path / "model", license="mit")
    with pytest.raises(ValueError, match="Give the file 'moco.pth', from which it was exported"):
        mocohub.load(folder, head=True)
    (folder / "mocohub.json").write_text("[]")
    with pytest.raises(ValueError, match="Give what it was exported from"):
        mocohub.load(folder, head=True)
    (folder / "mocohub.json").unlink()
    with pytest.raises(
        ValueError, match="Give what it was exported from. Training runs and their checkpoints"
    ):
        mocohub.load(folder, head=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moco_tiny_cifar10", "is an exported model and holds no projection head.*Give the run of"),
        ("mocov2_r50_in1m", r"'mocov2_r50_in1m' .* no projection head.*Fetch https://.*\.tar and give that"),
        ("moco_r50w4x_in1m", "no projection head.*Train moco_r50w4x_in1m and give that"),
        ("somebody/model", "'somebody/model' is no path on this disk.*no projection head.*training state"),
    ],
)
def test_published_models_hold_no_head_and_nothing_is_fetched(name, message, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=message):
        mocohub.load(name, head=True)


def test_a_model_without_a_head_says_how_to_load_one(photos):
    with pytest.raises(ValueError, match="SmallImageResNet has no projection head.*load.RUN, head=True"):
        extract(create_backbone("r18tiny"), photos, layers=["contrastive"])


class Own(nn.Module):
    """A module of the user that is called contrastive and takes part in the pass."""

    def __init__(self):
        super().__init__()
        self.contrastive = nn.Linear(3, 2)

    def forward(self, x):
        return 2 * self.contrastive(x.mean((2, 3)))


def test_a_users_own_layer_of_that_name_is_a_layer_like_any_other():
    model, pixels = randomise(Own(), 1), images(8)
    layers = ["contrastive", "embedding"]
    found = extract(model, pixels, layers=layers, transform=torch.nn.Identity(), dtype="float32")
    np.testing.assert_allclose(found["embedding"], 2 * found["contrastive"], rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "given"),
    [
        ({}, "{}"),
        ({"weight": (16, 7)}, r"\(16, 7\)"),
        ({"0.weight": (8, 8), "2.weight": (16, 9)}, r"\(16, 9\)"),
        ({"0.weight": (8, 8), "0.bias": (9,), "2.weight": (16, 8)}, r"\(9,\)"),
        ({"0.weight": (8, 8), "1.weight": (8,), "3.weight": (16, 8)}, r"'1.weight': \(8,\)"),
        ({"0.weight": (8, 8), "2.weight": (8, 8), "4.weight": (16, 8)}, r"'4.weight': \(16, 8\)"),
    ],
)
def test_tensors_that_are_no_head_of_moco_are_refused(shapes, given):
    with pytest.raises(ValueError, match=f"'moco.pth' is none of MoCo v1 or v2.*after 8 features: .*{given}"):
        head_of({name: torch.zeros(shape) for name, shape in shapes.items()}, 8, "moco.pth")


def test_a_head_of_whole_numbers_is_refused():
    with pytest.raises(ValueError, match="none of MoCo v1 or v2"):
        head_of({"weight": torch.zeros(16, 8, dtype=torch.int64)}, 8, "moco.pth")


def test_layers_come_in_the_order_of_their_numbers_and_may_lack_biases():
    torch.manual_seed(0)
    tensors = {"10.weight": torch.randn(4, 3), "9.weight": torch.randn(3, 8), "9.bias": torch.randn(3)}
    head = head_of(tensors, 8, "x")
    assert isinstance(head, ContrastiveHead) and head.layers[2].bias is None
    rows = torch.randn(5, 8)
    hidden = (rows @ tensors["9.weight"].T + tensors["9.bias"]).relu()
    expected = F.normalize(hidden @ tensors["10.weight"].T)
    torch.testing.assert_close(head(rows), expected)


def test_a_checkpoint_whose_head_is_damaged_says_so(trained, tmp_path):
    tensors = load_file(checkpoint(trained[0]) / "state.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.startswith("query.head.")}
    save_file(tensors, tmp_path / "state.safetensors")
    digest = sha256(tmp_path / "state.safetensors")
    state = read_json(checkpoint(trained[0]) / "state.json")
    write_json(tmp_path / "state.json", {**state, "sha256": {"state.safetensors": digest}})
    with pytest.raises(ValueError, match="The projection head in .* is none of MoCo v1 or v2"):
        mocohub.load(tmp_path, head=True)
    assert mocohub.load(tmp_path).num_classes == 0
