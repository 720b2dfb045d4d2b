import dataclasses
import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers.hub import TINY_R50, TINY_WIDE, TorchvisionResNet, images, randomise, write_official, write_run

from mocohub.backbones import BACKBONES, create_backbone
from mocohub.files import write_json
from mocohub.hub.encoders import read_encoder
from mocohub.hub.export import export
from mocohub.hub.resnets import detect, resnetv2_name, torchvision_name
from mocohub.hub.zoo import ZOO


def same(tensors, reference):
    return tensors.keys() == reference.keys() and all(
        torch.equal(tensors[k], reference[k]) for k in reference
    )


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run", write_run(tmp_path / "run", steps=(20, 40))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """One official file of the shape of r50, and its two encoders."""
    path = tmp_path_factory.mktemp("official") / "checkpoint_0199.pth.tar"
    query, key = (randomise(TorchvisionResNet(64, (8, 16, 32, 64)), seed) for seed in (1, 2))
    write_official(path, query, key)
    return path, query, key


def test_a_run_gives_the_query_backbone_of_its_newest_checkpoint(run):
    path, models = run
    found = read_encoder(path)
    assert (found.kind, found.backbone, found.architecture) == ("run", "r18tiny", "resnet18_cifar")
    assert same(found.state_dict, models[40, "query"].state_dict())


def test_the_key_encoder_of_a_run_is_another_one(run):
    path, models = run
    assert same(read_encoder(path, encoder="key").state_dict, models[40, "key"].state_dict())
    assert not same(read_encoder(path).state_dict, models[40, "key"].state_dict())


def test_a_checkpoint_folder_can_be_read_by_itself(run):
    path, models = run
    found = read_encoder(path / "checkpoints" / "step-00000020")
    assert found.kind == "checkpoint"
    assert found.facts["steps"] == 20
    assert found.facts["commit"] == "c0ffee"
    assert same(found.state_dict, models[20, "query"].state_dict())


def test_a_checkpoint_away_from_its_run_has_only_the_facts_of_the_checkpoint(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints" / "step-00000040", tmp_path / "alone")
    facts = read_encoder(tmp_path / "alone").facts
    assert facts.keys() == {"recipe_name", "recipe", "steps", "epochs", "num_images_seen"}


def test_the_preprocessing_is_that_of_the_recipe(run):
    cfg = read_encoder(run[0]).pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"]) == ([3, 32, 32], 1.0)
    assert (cfg["mean"], cfg["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


def test_facts_hold_the_history_but_not_where_the_images_lie(run):
    facts = read_encoder(run[0]).facts
    assert (facts["steps"], facts["num_images_seen"], facts["epochs"]) == (40, 320, 1)
    assert facts["data"] == {"source": "flowers", "num_images": 64, "paths_sha256": "0" * 64}
    assert "somebody" not in json.dumps(facts)


@pytest.mark.parametrize("shape", [TINY_R50, TINY_WIDE])
def test_a_recipe_may_reshape_its_backbone(shape, tmp_path):
    backbone, model_args = shape
    models = write_run(tmp_path / "run", backbone, model_args)
    found = read_encoder(tmp_path / "run")
    assert found.model_args == {**BACKBONES[backbone].model_args, **model_args}
    assert found.num_features == models[20, "query"].num_features
    assert same(found.state_dict, models[20, "query"].state_dict())


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run, caplog):
    path, models = run
    flip_a_bit(path / "checkpoints" / "step-00000040" / "state.safetensors")
    assert same(read_encoder(path).state_dict, models[20, "query"].state_dict())
    assert "step-00000040' is damaged" in caplog.text


def test_a_run_without_any_intact_checkpoint_is_an_error_that_names_all(run):
    path, _ = run
    flip_a_bit(path / "checkpoints" / "step-00000040" / "state.safetensors")
    (path / "checkpoints" / "step-00000020" / "state.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"(?s)step-00000040: .*SHA-256.*step-00000020: .*not valid JSON"):
        read_encoder(path)


def test_a_run_without_checkpoints_says_so(run):
    shutil.rmtree(run[0] / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        read_encoder(run[0])


def test_a_damaged_checkpoint_folder_is_refused(run):
    folder = run[0] / "checkpoints" / "step-00000020"
    flip_a_bit(folder / "state.safetensors")
    with pytest.raises(RuntimeError, match=r"damaged: state.safetensors has SHA-256 \w{64}, state.json says"):
        read_encoder(folder)


def test_a_checkpoint_of_a_newer_format_is_refused(run):
    folder = run[0] / "checkpoints" / "step-00000020"
    state = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", state | {"format": "mocohub-checkpoint/9"})
    with pytest.raises(ValueError, match="mocohub-checkpoint/9.*mocohub-checkpoint/1"):
        read_encoder(folder)


def test_tensors_that_do_not_fit_the_recipe_are_refused(run):
    folder = run[0] / "checkpoints" / "step-00000020"
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["backbone"] = "r18cifar"
    write_json(folder / "state.json", state)
    with pytest.raises(ValueError, match="(?s)not those of timm's resnet18_cifar.*size mismatch"):
        read_encoder(folder)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("zip_format", [False, True])
def test_official_files_give_the_query_backbone_without_its_head(prefix, mlp, zip_format, tmp_path, official):
    _, query, key = official
    path = tmp_path / "moco.pth.tar"
    write_official(path, query, key, prefix=prefix, mlp=mlp, zip_format=zip_format)
    found = read_encoder(path)
    reference = {name: t for name, t in query.state_dict().items() if not name.startswith("fc.")}
    assert (found.kind, found.backbone, found.architecture) == ("official", "r50", "resnet50")
    assert same(found.state_dict, reference)
    assert found.state_dict["bn1.num_batches_tracked"] == 101
    assert found.facts["epochs"] == 200
    assert found.facts["origin"]["head"] == ("mlp" if mlp else "linear")


def test_a_file_with_the_checksum_of_a_zoo_model_is_recognised(official, monkeypatch):
    assert "data" not in read_encoder(official[0]).facts
    md5 = hashlib.md5(official[0].read_bytes()).hexdigest()
    model = dataclasses.replace(ZOO["moco_r50_in1m"], weights_md5=md5[:8])
    monkeypatch.setitem(ZOO, "moco_r50_in1m", model)
    facts = read_encoder(official[0]).facts
    assert (facts["recipe_name"], facts["data"]) == ("moco_r50_in1m", {"source": "ImageNet-1k"})
    assert facts["origin"]["md5"] == md5
    assert "CC-BY-NC" in facts["license_statement"]


def test_official_files_hold_the_key_encoder_too(official):
    path, _, key = official
    assert torch.equal(read_encoder(path, encoder="key").state_dict["conv1.weight"], key.conv1.weight)


def test_a_wide_official_file_computes_in_timm_what_it_did_in_torchvision(tmp_path):
    import mocohub

    path = tmp_path / "wide.pth.tar"
    query, key = (randomise(TorchvisionResNet(16, (8, 16, 32, 64)), seed) for seed in (3, 4))
    write_official(path, query, key)
    found = read_encoder(path)
    assert found.architecture == "resnetv2_50"
    assert found.model_args == {
        "preact": False,
        "stem_chs": 16,
        "layers": [1, 1, 1, 1],
        "channels": [32, 64, 128, 256],
    }
    query.fc = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(mocohub.load(path)(images(64)), query(images(64)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["r18", "r50", "r50w2x", "r50w4x", "rx50"])
def test_every_large_backbone_is_told_from_its_shapes(name):
    state_dict = create_backbone(name, device="meta").state_dict()
    wide = BACKBONES[name].architecture == "resnetv2_50"
    shapes = {torchvision_name(k) if wide else k: tuple(t.shape) for k, t in state_dict.items()}
    assert detect(shapes) == (name, dict(BACKBONES[name].model_args))


@pytest.mark.parametrize(
    "torchvision_model, expected",
    [
        ("resnet34", ("r18", {"layers": [3, 4, 6, 3]})),
        ("resnet101", ("r50", {"layers": [3, 4, 23, 3]})),
        ("wide_resnet50_2", ("r50", {"base_width": 128})),
        ("resnext50_32x4d", ("rx50", {})),
    ],
)
def test_other_torchvision_resnets_are_variants_with_the_same_tensors(torchvision_model, expected):
    import timm
    import torchvision

    with torch.device("meta"):
        reference = getattr(torchvision.models, torchvision_model)()
    shapes = {k: tuple(t.shape) for k, t in reference.state_dict().items() if not k.startswith("fc.")}
    name, model_args = detect(shapes)
    assert (name, model_args) == expected
    model = timm.create_model(BACKBONES[name].architecture, num_classes=0, device="meta", **model_args)
    assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == shapes


def test_the_key_map_is_one_to_one_both_ways_on_a_wide_network():
    timm_names = list(create_backbone("r50w2x", device="meta").state_dict())
    names = [torchvision_name(name) for name in timm_names]
    with torch.device("meta"):
        reference = TorchvisionResNet(128, (128, 256, 512, 1024))
    one_block = {name for name in names if not name.startswith("layer") or name.split(".")[1] == "0"}
    assert one_block == {name for name in reference.state_dict() if not name.startswith("fc.")}
    assert [resnetv2_name(name) for name in names] == timm_names


def test_an_exported_folder_can_be_read_and_keeps_its_facts(run, tmp_path):
    path, models = run
    export(path, tmp_path / "out", license="mit")
    found, original = read_encoder(tmp_path / "out"), read_encoder(path)
    assert found.kind == "export"
    assert found.facts == original.facts
    assert found.model_args == original.model_args
    assert same(found.state_dict, models[40, "query"].state_dict())


def test_an_exported_folder_has_no_key_encoder(run, tmp_path):
    export(run[0], tmp_path / "out", license="mit")
    with pytest.raises(ValueError, match="only training runs and checkpoints hold both"):
        read_encoder(tmp_path / "out", encoder="key")


def test_an_encoder_that_does_not_exist_is_refused(run):
    with pytest.raises(ValueError, match="Unknown encoder 'teacher'. Choose one of: .*key"):
        read_encoder(run[0], encoder="teacher")


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        read_encoder(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_refused_with_the_layouts(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)photo.jpg.*training run.*encoder_q"):
        read_encoder(tmp_path)


@pytest.mark.parametrize(
    "checkpoint, shown",
    [
        ({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, r"state_dict\.backbone\.conv1\.weight"),
        ({"state_dict": {"module.encoder_q.net.0.weight": torch.zeros(1)}}, r"module\.encoder_q\.net\.0"),
        ({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(())}}, r"module\.encoder_q\.conv1"),
        ({"model": {}, "model_ema": {}}, "model_ema"),
        (torch.zeros(3), "Tensor"),
    ],
)
def test_a_torch_file_that_is_not_mocos_is_refused_with_its_keys(checkpoint, shown, tmp_path):
    torch.save(checkpoint, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=rf"(?s)no ResNet this can read.*{shown}.*What is accepted.*module\.encoder_q"
    ):
        read_encoder(tmp_path / "other.pth")


def test_an_official_file_with_a_tensor_too_few_is_refused(official, tmp_path):
    checkpoint = torch.load(official[0], weights_only=True)
    del checkpoint["state_dict"]["module.encoder_q.layer3.0.bn2.running_mean"]
    torch.save(checkpoint, tmp_path / "less.pth.tar")
    with pytest.raises(ValueError, match=r"(?s)not those of timm's resnet50.*layer3.0.bn2.running_mean"):
        read_encoder(tmp_path / "less.pth.tar")


class Malicious:
    """Creates a file when it is unpickled without protection."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle"])
def test_code_in_a_pickle_never_runs(layout, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "evil.pth.tar"
    evil = {"epoch": 1, "state_dict": {"module.encoder_q.conv1.weight": Malicious(canary)}}
    if layout == "bare pickle":
        file.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(ValueError, match="refused: it is a pickle that names posix.mkdir"):
        read_encoder(file)
    assert not canary.exists()
    pickle.loads(pickle.dumps(evil))
    assert canary.exists()  # the canary works


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="empty.pth' is empty"):
        read_encoder(tmp_path / "empty.pth")


@pytest.mark.parametrize("content", [b"hello, I am no model", bytes(range(256)), b"PK\x03\x04", b"\x80\x02."])
def test_a_file_that_torch_did_not_write_is_refused(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match="not a file torch.save wrote, or it is damaged.*Fetch it again"):
        read_encoder(tmp_path / "file.pth")


def test_an_official_file_cut_anywhere_is_refused(official, tmp_path):
    data = official[0].read_bytes()
    for length in np.linspace(1, len(data) - 1, 12).astype(int):
        (tmp_path / "cut.pth.tar").write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged"):
            read_encoder(tmp_path / "cut.pth.tar")


def test_the_tensors_of_a_checkpoint_without_its_folder_are_refused(run):
    file = run[0] / "checkpoints" / "step-00000020" / "state.safetensors"
    with pytest.raises(ValueError, match="(?s)key.backbone.bn1.*give the folder.*state.json"):
        read_encoder(file)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("mocohub.json", {"architecture": "hf-hub:org/name"}, "names no network of timm: 'hf-hub:org/name'"),
        ("mocohub.json", {"model_args": {"checkpoint_path": "x.pth"}}, "names no network of .*'x.pth'"),
        ("mocohub.json", {"model_args": {"block": "Evil"}}, "not those of timm's resnet18_cifar"),
        ("mocohub.json", {"model_args": ["layers"]}, "not those of timm's resnet18_cifar"),
        ("mocohub.json", {"architecture": ["resnet18"]}, "out' is not what mocohub writes"),
        ("config.json", {"pretrained_cfg": "bicubic"}, "not what mocohub writes: TypeError"),
    ],
)
def test_an_exported_folder_cannot_make_timm_fetch_open_or_build_anything_else(
    file, change, message, run, tmp_path
):
    export(run[0], tmp_path / "out", license="mit")
    write_json(tmp_path / "out" / file, json.loads((tmp_path / "out" / file).read_text()) | change)
    with pytest.raises(ValueError, match=message):
        read_encoder(tmp_path / "out")


def test_an_exported_folder_without_its_configuration_is_refused(run, tmp_path):
    export(run[0], tmp_path / "out", license="mit")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ValueError, match="out' has no config.json.*Export it again"):
        read_encoder(tmp_path / "out")


@pytest.mark.parametrize("change", [{"mean": "0.5"}, {"input_size": [32]}])
def test_an_exported_folder_whose_preprocessing_is_none_is_refused(run, tmp_path, change):
    file = export(run[0], tmp_path / "out", license="mit") / "config.json"
    config = json.loads(file.read_text())
    write_json(file, config | {"pretrained_cfg": config["pretrained_cfg"] | change})
    with pytest.raises(ValueError, match="must state input_size, mean, std as three numbers"):
        read_encoder(tmp_path / "out")


def test_a_checkpoint_that_lacks_its_recipe_is_refused(run):
    folder = run[0] / "checkpoints" / "step-00000020"
    state = json.loads((folder / "state.json").read_text())
    del state["recipe"]
    write_json(folder / "state.json", state)
    with pytest.raises(ValueError, match="step-00000020' is not what mocohub writes: KeyError: 'recipe'"):
        read_encoder(folder)


def test_what_is_neither_a_file_nor_a_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe' is neither a file nor a folder"):
        read_encoder(tmp_path / "pipe")


def test_a_long_list_of_tensors_that_do_not_fit_is_cut(official, tmp_path):
    checkpoint = torch.load(official[0], weights_only=True)
    wrong = {k: t[:-1] if t.ndim else t for k, t in checkpoint["state_dict"].items() if ".layer2." in k}
    torch.save(checkpoint | {"state_dict": checkpoint["state_dict"] | wrong}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"\d+ lines like these$"):
        read_encoder(tmp_path / "wrong.pth")
