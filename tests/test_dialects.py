import argparse
import hashlib
import pickle
import sys
import types
import zipfile

import helpers.dialects as layouts
import numpy as np
import pytest
import torch
from helpers.dialects import WRITERS, CifarResNet, headless, notebook, parts
from helpers.hub import TorchvisionResNet, images, randomise
from safetensors.torch import save_file
from torch import nn
from torch.torch_version import TorchVersion

import mocohub
from mocohub.backbones import create_backbone
from mocohub.hub.dialects import DIALECTS
from mocohub.hub.encoders import read_encoder
from mocohub.hub.pickles import _DICTS, _OBJECTS

WIDTHS = (8, 16, 32, 64)
KINDS = {
    "official v1": ("official", "linear"),
    "official v2": ("official", "mlp"),
    "official without module": ("official", "linear"),
    "official, the state alone": ("official", "linear"),
    "official, compiled": ("official", "linear"),
    "moco-v3": ("moco-v3", "mlp"),
    "pycontrast": ("pycontrast", "mlp"),
    "vissl": ("vissl", "mlp"),
    "mmselfsup 0.x": ("mmselfsup", "mlp"),
    "mmselfsup 1.x": ("mmselfsup", "mlp"),
    "solo-learn": ("solo-learn", "mlp"),
    "solo-learn before 1.0.3": ("solo-learn", "mlp"),
    "lightly": ("lightly", "mlp"),
    "lightly, early": ("lightly", "mlp"),
    "lightly's example": ("lightly", "mlp"),
}


def pair(stem_chs=64):
    return [randomise(TorchvisionResNet(stem_chs, WIDTHS), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def encoders():
    return pair()


@pytest.fixture(scope="module")
def files(tmp_path_factory, encoders):
    """One file of each layout."""
    folder = tmp_path_factory.mktemp("dialects")
    for name, write in WRITERS.items():
        torch.save(write(*encoders), folder / f"{name}.pth")
    return folder


def same_features(path, reference, encoder="query", px=64):
    with torch.inference_mode():
        model = mocohub.load(path, encoder=encoder)
        torch.testing.assert_close(model(images(px)), reference(images(px)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_gives_both_encoders_with_the_features_they_had(name, files, encoders):
    for encoder, network in zip(("query", "key"), encoders, strict=True):
        found = read_encoder(files / f"{name}.pth", encoder=encoder)
        assert (found.kind, found.facts["origin"]["head"]) == KINDS[name]
        assert found.facts["origin"]["encoders"] == ["query", "key"]
        same_features(files / f"{name}.pth", headless(network), encoder)


def test_every_dialect_has_a_layout_here():
    tested = {kind for kind, _ in KINDS.values()} | {"notebook", "plain"}
    assert {dialect.name for dialect in DIALECTS} == tested


@pytest.mark.parametrize("name", ["pycontrast", "vissl", "official v2", "lightly's example"])
def test_wide_networks_are_read_as_timms_resnetv2(name, tmp_path):
    query, key = pair(stem_chs=16)
    torch.save(WRITERS[name](query, key), tmp_path / "wide.pth")
    found = read_encoder(tmp_path / "wide.pth")
    assert (found.architecture, found.model_args["stem_chs"]) == ("resnetv2_50", 16)
    same_features(tmp_path / "wide.pth", headless(query))
    same_features(tmp_path / "wide.pth", headless(key), "key")


def test_the_notebooks_network_is_a_small_image_resnet_with_its_preprocessing(tmp_path):
    query, key = (randomise(CifarResNet(), seed) for seed in (3, 4))
    torch.save(notebook(query, key), tmp_path / "model_last.pth")
    found = read_encoder(tmp_path / "model_last.pth")
    assert (found.kind, found.backbone, found.architecture) == ("notebook", "r18tiny", "resnet18_cifar")
    assert found.facts["origin"]["head"] == "linear"
    assert found.facts["epochs"] == 200
    cfg = found.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"]) == ([3, 32, 32], 1.0)
    assert (cfg["mean"], cfg["std"]) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    same_features(tmp_path / "model_last.pth", query, px=32)
    same_features(tmp_path / "model_last.pth", key, "key", px=32)


def test_what_is_left_out_is_counted_by_group(files):
    left_out = read_encoder(files / "official v2.pth").facts["origin"]["left_out"]
    num = len(TorchvisionResNet(64, WIDTHS).state_dict()) - 2
    assert left_out == {
        "encoder_k": num + 4,
        "encoder_q.fc": 4,
        "optimizer": 2,
        "queue": 1,
        "queue_ptr": 1,
    }
    left_out = read_encoder(files / "official v2.pth", encoder="key").facts["origin"]["left_out"]
    assert (left_out["encoder_q"], left_out["encoder_k.fc"]) == (num + 4, 4)
    left_out = read_encoder(files / "vissl.pth").facts["origin"]["left_out"]
    assert left_out == {
        "loss.moco_encoder.trunk._feature_blocks": num,
        "base_model.model.heads": 4,
        "loss": 6,  # the key encoder's head, the queue and its pointer
        "optimizer": 2,
    }


def test_the_facts_say_where_the_weights_come_from(files):
    path = files / "pycontrast.pth"
    facts = read_encoder(path).facts
    origin = facts["origin"]
    assert (origin["file"], origin["written_by"]) == ("pycontrast.pth", "PyContrast")
    assert origin["md5"] == hashlib.md5(path.read_bytes()).hexdigest()
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["epochs"] == 200
    assert read_encoder(files / "official v1.pth").facts["origin"]["arch"] == "resnet50"


def test_the_epoch_of_a_lightning_file_is_not_taken_for_a_number_of_epochs(files):
    assert "epochs" not in read_encoder(files / "lightly.pth").facts


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin"])
@pytest.mark.parametrize("head", ["with fc", "without fc"])
def test_plain_files_of_torchvision_and_timm_are_read(suffix, head, tmp_path, encoders):
    network, path = encoders[0] if head == "with fc" else headless(encoders[0]), tmp_path / f"plain.{suffix}"
    if suffix == "pth":
        torch.save(network.state_dict(), path)
    else:  # safetensors are known by their content too
        save_file(network.state_dict(), path)
    found = read_encoder(path)
    assert (found.kind, found.facts["origin"]["head"]) == ("plain", None)
    assert found.facts["origin"]["left_out"] == ({"fc": 2} if head == "with fc" else {})
    same_features(path, headless(encoders[0]))
    with pytest.raises(ValueError, match="no key encoder: it is of torchvision, timm .* Omit encoder='key'"):
        read_encoder(path, encoder="key")


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_plain_tensors_may_lie_in_a_container(container, prefix, tmp_path, encoders):
    state = {prefix + name: t for name, t in headless(encoders[0]).state_dict().items()}
    torch.save({container: state, "epoch": 3}, tmp_path / "plain.pth")
    assert read_encoder(tmp_path / "plain.pth").kind == "plain"
    same_features(tmp_path / "plain.pth", headless(encoders[0]))


def test_a_plain_file_of_timms_resnetv2_keeps_its_names(tmp_path):
    args = {"layers": [1, 1, 1, 1], "stem_chs": 4, "channels": [16, 32, 64, 128], "num_classes": 10}
    model = randomise(create_backbone("r50w2x", **args), 5)
    save_file(model.state_dict(), tmp_path / "wide.safetensors")
    found = read_encoder(tmp_path / "wide.safetensors")
    assert found.facts["origin"]["left_out"] == {"head": 2}
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in found.state_dict.items())
    model.reset_classifier(0)
    same_features(tmp_path / "wide.safetensors", model)


@pytest.mark.parametrize("architecture", ["resnet18", "resnext50_32x4d"])
def test_whole_models_of_torchvision_are_read(architecture, tmp_path):
    import torchvision

    reference = randomise(torchvision.models.get_model(architecture), 6)
    torch.save(reference.state_dict(), tmp_path / "model.pth")
    found = read_encoder(tmp_path / "model.pth")
    assert found.architecture == architecture
    same_features(tmp_path / "model.pth", headless(reference))


def test_halves_become_floats_and_missing_counts_of_old_files_zero(tmp_path, encoders):
    state = {k: t for k, t in encoders[0].state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "half.pth")
    found = read_encoder(tmp_path / "half.pth").state_dict
    assert torch.equal(found["conv1.weight"], state["conv1.weight"].half().float())
    assert found["layer1.0.bn1.num_batches_tracked"] == 0
    assert {t.dtype for t in found.values()} == {torch.float32, torch.int64}


def test_small_image_models_of_others_say_what_was_assumed(tmp_path):
    network = randomise(CifarResNet(), 7)
    torch.save(
        {"state_dict": {f"backbone.{k}": t for k, t in network.net.state_dict().items()}}, tmp_path / "c.pth"
    )
    found = read_encoder(tmp_path / "c.pth")
    assert (found.kind, found.architecture) == ("plain", "resnet18_cifar")
    assert "32 px" in found.facts["origin"]["assumed"]


def test_solo_learns_small_image_models_are_refused_since_timm_pads_otherwise(tmp_path):
    names = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3", "layer4")
    network = nn.ModuleDict(zip(names, CifarResNet().net, strict=False))
    model = parts(backbone=network, momentum_backbone=network, projector=nn.Sequential(nn.Linear(4, 4)))
    torch.save(layouts.lightning(model), tmp_path / "solo.ckpt")
    with pytest.raises(ValueError, match="solo-learn model for small images.*pads by 2 pixels"):
        read_encoder(tmp_path / "solo.ckpt")


def test_a_vision_transformer_is_refused_by_name(tmp_path):
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    model = layouts.wrapped(parts(base_encoder=vit, momentum_encoder=vit))
    torch.save({"arch": "vit_small", "state_dict": model.state_dict()}, tmp_path / "vit-s-300ep.pth.tar")
    with pytest.raises(ValueError, match="holds a vision transformer, as MoCo v3.*mocohub reads ResNets"):
        read_encoder(tmp_path / "vit-s-300ep.pth.tar")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda s: s.pop("conv1.weight"), "Its first keys: .*bn1.weight"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 5, 5)}), "its stem is 5x5"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "3x3 stem .* three convolutions"),
        (
            lambda s: s.update({"layer1.0.se.weight": torch.zeros(3)}),
            "not those of timm's resnet50.*se.weight",
        ),
        (lambda s: s.update({"attnpool.weight": torch.zeros(3)}), "not those of timm's resnet50.*attnpool"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 4, 7, 7)}), "size mismatch for conv1.weight"),
        (lambda s: s.update({"module.bn1.bias": torch.zeros(64)}), "holds 'bn1.bias' twice"),
        (
            lambda s: s.update({"bn1.bias": torch.zeros(64, dtype=torch.int32)}),
            "'bn1.bias' .* no ordinary tensor",
        ),
        (lambda s: s.update({"bn1.bias": torch.zeros(64).to_sparse()}), "'bn1.bias' .* no ordinary tensor"),
        (
            lambda s: s.update({"bn1.bias": torch.zeros(64, device="meta")}),
            "'bn1.bias' .* no ordinary tensor",
        ),
        (lambda s: s.update({"bn1.bias": torch.zeros(1).expand(64)}), "'bn1.bias' .* no ordinary tensor"),
    ],
)
def test_what_is_not_quite_a_resnet_is_refused_with_the_reason(change, reason, tmp_path, encoders):
    state = dict(headless(encoders[0]).state_dict())
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        read_encoder(tmp_path / "odd.pth")


def test_a_resnet18_with_another_stem_is_refused(tmp_path):
    net = CifarResNet().net
    state = {"conv1.weight": torch.zeros(16, 3, 7, 7), **{f"layer{n}.{k}": t for n in range(1, 5)
             for k, t in net[n + 2].state_dict().items()}}  # fmt: skip
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="stem is 16 wide, and with blocks of two convolutions timm's is 64"):
        read_encoder(tmp_path / "odd.pth")


def test_a_file_that_refers_to_itself_ends(tmp_path, encoders):
    state = dict(encoders[0].state_dict())
    state["again"] = state
    for n in range(100):
        state[f"deeper{n}"] = {str(k): state for k in range(100)}
    torch.save(state, tmp_path / "cycle.pth")
    assert read_encoder(tmp_path / "cycle.pth").kind == "plain"


@pytest.mark.parametrize("name", [n for n in (*_OBJECTS, *_DICTS) if not n.startswith(("builtins", "numpy"))])
def test_what_trainers_save_besides_tensors_is_passed_over_without_its_class(
    name, tmp_path, monkeypatch, encoders
):
    module, _, cls = name.rpartition(".")
    fake = type(cls, (dict,) if name in _DICTS else (), {"__module__": module})
    value = fake()
    if name in _DICTS:
        value["lr"] = 0.03
    else:
        value.__dict__ = {"lr": 0.03, "nested": fake()}
    with monkeypatch.context() as patch:
        for end in [i for i, letter in enumerate(module + ".") if letter == "."]:
            if module[:end] not in sys.modules:
                patch.setitem(sys.modules, module[:end], types.ModuleType(module[:end]))
        patch.setattr(sys.modules[module], cls, fake, raising=False)
        torch.save({"state_dict": encoders[0].state_dict(), "args": value}, tmp_path / "file.pth")
    assert module.encode() in (tmp_path / "file.pth").read_bytes()
    assert read_encoder(tmp_path / "file.pth").kind == "plain"


def test_numpy_numbers_arrays_and_types_beside_the_tensors_are_passed_over(tmp_path, encoders):
    extra = {"acc": np.float64(67.5), "n": np.int64(3), "curve": np.arange(5.0), "dtype": np.dtype("f4")}
    extra |= {"types": [int, dict, str], "args": argparse.Namespace(best=np.float32(1), net=[np.zeros(2)])}
    torch.save({"state_dict": encoders[0].state_dict(), **extra}, tmp_path / "file.pth")
    assert read_encoder(tmp_path / "file.pth").kind == "plain"
    # As numpy 1 wrote them.
    data = pickle.dumps(np.float64(1), protocol=2)
    assert b"numpy._core.multiarray" in data
    assert "numpy.core.multiarray.scalar" in _OBJECTS


def test_real_configurations_of_omegaconf_and_lightning_are_passed_over(tmp_path, encoders):
    omegaconf = pytest.importorskip("omegaconf")
    lightning = pytest.importorskip("pytorch_lightning")
    config = omegaconf.OmegaConf.create({"lr": 0.3, "name": "moco", "on": True, "sizes": [1, 2.5, None]})
    hparams = lightning.utilities.parsing.AttributeDict(lr=0.3, cfg=config)
    torch.save({"state_dict": encoders[0].state_dict(), "cfg": config, "h": hparams}, tmp_path / "file.ckpt")
    assert read_encoder(tmp_path / "file.ckpt").kind == "plain"


def test_tensors_in_channels_last_order_come_out_in_the_usual_one(tmp_path, encoders):
    reference = headless(encoders[0])
    torch.save(
        headless(encoders[0]).to(memory_format=torch.channels_last).state_dict(), tmp_path / "last.pth"
    )
    found = read_encoder(tmp_path / "last.pth").state_dict
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in found.items())


def test_an_archive_that_swells_when_it_is_opened_is_refused(tmp_path, encoders):
    torch.save(
        {"state_dict": encoders[0].state_dict(), "zeros": torch.zeros(1 << 20)}, tmp_path / "stored.pth"
    )
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored:
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
            for name in stored.namelist():
                bomb.writestr(name, stored.read(name))
    assert read_encoder(tmp_path / "stored.pth").kind == "plain"
    with pytest.raises(ValueError, match=r"not a file torch.save wrote, or it is damaged \(BadZipFile\)"):
        read_encoder(tmp_path / "bomb.pth")


def test_pickles_are_not_opened_with_a_torch_that_may_run_them(files, tmp_path, monkeypatch, encoders):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    with pytest.raises(RuntimeError, match="torch 2.9.1 may run what is in .*Install torch 2.10 or later"):
        read_encoder(files / "vissl.pth")
    save_file(encoders[0].state_dict(), tmp_path / "model.safetensors")
    assert read_encoder(tmp_path / "model.safetensors").kind == "plain"


class Evil:
    """Writes its canary when it is unpickled without protection."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return exec, (f"open({self.canary!r}, 'w')",)


def test_code_inside_a_harmless_object_is_refused_and_does_not_run(tmp_path, encoders):
    canary, file = tmp_path / "canary", tmp_path / "evil.pth"
    for inner in (Evil(canary), [Evil(canary)], {"a": np.array([Evil(canary)], dtype=object)}):
        torch.save({"state_dict": encoders[0].state_dict(), "opt": argparse.Namespace(x=inner)}, file)
        with pytest.raises(ValueError, match="refused: .* names exec, .*tensors alone, as safetensors"):
            read_encoder(file)
        assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()  # the canary works


def test_a_class_that_is_not_known_to_be_harmless_is_refused_with_the_remedy(tmp_path, encoders):
    torch.save({"state_dict": encoders[0].state_dict(), "model": nn.Linear(2, 2)}, tmp_path / "whole.pth")
    with pytest.raises(
        ValueError, match=r"names torch.nn.modules.linear.Linear.*torch.save\(model.state_dict"
    ):
        read_encoder(tmp_path / "whole.pth")


def test_the_stand_ins_are_gone_after_reading(files):
    before = set(torch.serialization.get_safe_globals())  # torch lists a set: in any order
    read_encoder(files / "pycontrast.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_damaged_safetensors_file_is_refused(tmp_path, encoders):
    save_file(encoders[0].state_dict(), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (data[:-3], data[:50], b"\x80\x02.", b"hello"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="no safetensors file, or it is damaged"):
            read_encoder(tmp_path / "model.safetensors")
