import os
import pickle
import pickletools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.dialects import WRITERS, CifarResNet, headless, notebook
from helpers.hub import TINY_WIDE, TorchvisionResNet, images, randomise, write_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import mocohub
from mocohub.backbones import create_backbone
from mocohub.hub.convert import convert
from mocohub.hub.encoders import read_encoder
from mocohub.hub.export import export

WIDE = {"stem_chs": 8, "channels": [16, 32, 64, 128]}  # at the depth of a ResNet-50


def same(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def state(path, backbone, **model_args):
    """A checkpoint file and the timm model that it holds."""
    model = randomise(create_backbone(backbone, **model_args), 1)
    torch.save(model.state_dict(), path)
    return path, model


@pytest.fixture
def wide_run(tmp_path):
    return tmp_path / "run", write_run(tmp_path / "run", *TINY_WIDE)[20, "query"]


# -- torchvision --------------------------------------------------------------------------------


def built(usage):
    """The model that the printed lines of Python build."""
    names = {}
    exec(usage, names)
    return names["model"]


def test_a_wide_encoder_computes_in_torchvision_what_it_does_in_timm(tmp_path, wide_run):
    run, model = wide_run
    made = convert(run, tmp_path / "wide.safetensors", to="torchvision")
    assert "model.inplanes = 8" in made.usage
    with torch.inference_mode():
        same(built(made.usage)(images(64)), model(images(64)))


@pytest.mark.parametrize(
    "backbone, args, line",
    [
        ("r50", {}, r"ResNet\(Bottleneck, \[3, 4, 6, 3\]\)$"),
        ("rx50", {"layers": [1, 1, 1, 1]}, r"\[1, 1, 1, 1\], groups=32, width_per_group=8\)$"),
        ("r18", {}, r"ResNet\(BasicBlock, \[2, 2, 2, 2\]\)$"),
        ("r18tiny", {}, r"nn\.Conv2d\(3, model.inplanes, 3, stride=1, padding=1, bias=False\)$"),
        ("r50w2x", {"layers": [1, 1, 1, 1]}, r"model\.inplanes = 128 "),
    ],
)
def test_the_printed_lines_build_every_backbone(backbone, args, line, tmp_path):
    path, model = state(tmp_path / "model.pth", backbone, **args)
    made = convert(path, tmp_path / "out.safetensors", to="torchvision")
    assert re.search(line, made.usage, re.MULTILINE)
    px = 32 if backbone == "r18tiny" else 64
    with torch.inference_mode():
        expected = model(images(px))
        same(built(made.usage)(images(px)), expected, 1e-5 * expected.abs().max().item())


def test_torchvisions_file_converted_back_has_the_same_bits(tmp_path, wide_run):
    run, _ = wide_run
    made = convert(run, tmp_path / "wide.safetensors", to="torchvision")
    found, original = read_encoder(made), read_encoder(run)
    assert (found.architecture, found.model_args["stem_chs"]) == (original.architecture, 8)
    assert all(torch.equal(found.state_dict[name], t) for name, t in original.state_dict.items())
    again = convert(made, tmp_path / "again.safetensors", to="torchvision")
    assert again.path.read_bytes() == made.path.read_bytes()


def test_the_key_encoder_can_be_converted_too(tmp_path):
    models = write_run(tmp_path / "run")
    made = convert(tmp_path / "run", tmp_path / "key.safetensors", to="torchvision", encoder="key")
    with safe_open(made.path, "pt") as file:
        assert torch.equal(file.get_tensor("conv1.weight"), models[20, "key"].conv1.weight)
        assert file.metadata()["format"] == "pt"


def test_every_source_converts_to_the_same_file(tmp_path, wide_run):
    run, _ = wide_run
    export(run, tmp_path / "exported", license="mit")
    first = convert(run, tmp_path / "a.safetensors", to="torchvision")
    second = convert(tmp_path / "exported", tmp_path / "b.safetensors", to="torchvision")
    assert first.path.read_bytes() == second.path.read_bytes()


# -- detectron2 --------------------------------------------------------------------------------


def in_detectron2(name):
    """The name of a torchvision tensor in detectron2, part by part, from its list of modules."""
    parts = name.split(".")
    if not parts[0].startswith("layer"):
        return {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}[parts[0]] + f".{parts[1]}"
    stage = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}[parts[0]]
    inner = {
        "conv1": "conv1", "bn1": "conv1.norm", "conv2": "conv2", "bn2": "conv2.norm",
        "conv3": "conv3", "bn3": "conv3.norm", "downsample.0": "shortcut", "downsample.1": "shortcut.norm",
    }  # fmt: skip
    return f"{stage}.{parts[1]}.{inner['.'.join(parts[2:-1])]}.{parts[-1]}"


class Conv(nn.Conv2d):
    """detectron2's convolution: its batch norm is its child `norm`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    def __init__(self, in_chs, out_chs, inner, stride, groups, stride_in_1x1):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = Conv(in_chs, out_chs, 1, stride=stride) if in_chs != out_chs else None
        self.conv1 = Conv(in_chs, inner, 1, stride=first)
        self.conv2 = Conv(inner, inner, 3, stride=second, padding=1, groups=groups)
        self.conv3 = Conv(inner, out_chs, 1)

    def forward(self, x):
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Detectron2ResNet(nn.Module):
    """A ResNet as detectron2 builds one from MODEL.RESNETS, for bottleneck blocks."""

    def __init__(self, cfg):
        super().__init__()
        chs, out_chs = cfg["STEM_OUT_CHANNELS"], cfg["RES2_OUT_CHANNELS"]
        inner = cfg["NUM_GROUPS"] * cfg["WIDTH_PER_GROUP"]
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, chs, 7, stride=2, padding=3)
        for n, depth in enumerate({50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[cfg["DEPTH"]]):
            blocks = []
            for i in range(depth):
                stride = 2 if n and i == 0 else 1
                blocks += [Block(chs, out_chs, inner, stride, cfg["NUM_GROUPS"], cfg["STRIDE_IN_1X1"])]
                chs = out_chs
            setattr(self, f"res{n + 2}", nn.Sequential(*blocks))
            out_chs, inner = 2 * out_chs, 2 * inner

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, stride=2, padding=1)
        return self.res5(self.res4(self.res3(self.res2(x)))).mean((2, 3))


def configured(usage):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(usage)


@pytest.mark.parametrize(
    "backbone, args, expected",
    [
        ("r50", {}, (50, 64, 256, 1, 64)),
        ("rx50", {}, (50, 64, 256, 32, 8)),
        ("r50w2x", WIDE, (50, 16, 32, 1, 8)),
        ("r50", {"layers": [3, 4, 23, 3], "channels": [8, 16, 32, 64]}, (101, 64, 32, 1, 8)),
    ],
)
def test_detectron2_builds_from_the_printed_configuration_what_the_file_fits(
    backbone, args, expected, tmp_path
):
    path, model = state(tmp_path / "model.pth", backbone, **args)
    made = convert(path, tmp_path / "model.pkl", to="detectron2")
    cfg = configured(made.usage)["MODEL"]["RESNETS"]
    keys = ("DEPTH", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "NUM_GROUPS", "WIDTH_PER_GROUP")
    assert tuple(cfg[key] for key in keys) == expected
    content = pickle.loads(made.path.read_bytes())
    network = Detectron2ResNet(cfg).eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in content["model"].items()})
    with torch.inference_mode():
        features = model(images(64))
        same(network(images(64)), features, 1e-5 * features.abs().max().item())


@pytest.mark.parametrize("factor", [2, 4])
def test_the_papers_wide_networks_get_the_configuration_of_vissl(factor, tmp_path):
    from mocohub.hub import convert as module
    from mocohub.hub.encoders import Encoder

    name = f"r50w{factor}x"
    model = create_backbone(name, device="meta")
    fields = {"kind": "run", "backbone": name, "architecture": "resnetv2_50", "model_args": {}, "facts": {}}
    cfg = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    wide = Encoder(**fields, num_features=0, state_dict=model.state_dict(), pretrained_cfg=cfg)
    resnets = configured(module._detectron2_usage(wide, tmp_path / "w.pkl"))["MODEL"]["RESNETS"]
    assert resnets["STEM_OUT_CHANNELS"] == 64 * factor
    assert resnets["RES2_OUT_CHANNELS"] == 256 * factor
    assert resnets["WIDTH_PER_GROUP"] == 64 * factor


def test_detectron2s_names_and_numbers_are_those_of_an_independent_map(tmp_path):
    path, model = state(tmp_path / "model.pth", "r18")
    content = pickle.loads(convert(path, tmp_path / "r18.pkl", to="detectron2").path.read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("mocohub", True)
    expected = {in_detectron2(name): t.numpy() for name, t in model.state_dict().items()}
    assert content["model"].keys() == expected.keys()
    assert all(np.array_equal(content["model"][name], array) for name, array in expected.items())


def test_the_whole_configuration_is_that_of_the_authors_detection_code(tmp_path):
    path, _ = state(tmp_path / "model.pth", "r50", channels=[8, 16, 32, 64])
    cfg = configured(convert(path, tmp_path / "model.pkl", to="detectron2").usage)
    assert cfg["MODEL"]["WEIGHTS"] == str(tmp_path / "model.pkl")
    assert cfg["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert cfg["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert cfg["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False
    assert cfg["INPUT"]["FORMAT"] == "RGB"


def test_detectron2s_pickle_names_nothing_but_numpy_arrays_under_their_old_name(tmp_path):
    path, _ = state(tmp_path / "model.pth", "r18")
    data = convert(path, tmp_path / "r18.pkl", to="detectron2").path.read_bytes()
    found = {arg for opcode, arg, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    assert found == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


@pytest.mark.parametrize(
    "backbone, args, shown",
    [
        ("r18tiny", {}, r"\[2, 2, 2, 2\] times BasicBlock.* 3x3 stem"),
        ("r50", {"layers": [1, 1, 1, 1]}, r"\[1, 1, 1, 1\] times Bottleneck.*has depths 18, 34, 50"),
        ("r50", {"channels": [8, 16, 32, 32]}, r"\[32, 64, 128, 128\] channels.*double"),
    ],
)
def test_what_detectron2_cannot_build_is_refused_before_anything_is_written(backbone, args, shown, tmp_path):
    path, _ = state(tmp_path / "model.pth", backbone, **args)
    with pytest.raises(ValueError, match=f"detectron2 has no such ResNet: .*{shown}"):
        convert(path, tmp_path / "model.pkl", to="detectron2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


# -- ONNX --------------------------------------------------------------------------------


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("wide", [False, True])
def test_an_onnx_graph_gives_the_same_features_for_any_number_of_images(wide, tmp_path, onnxruntime):
    if wide:
        model = write_run(tmp_path / "source", *TINY_WIDE)[20, "query"]
    else:
        query, key = (randomise(CifarResNet(), seed) for seed in (3, 4))
        torch.save(notebook(query, key), tmp_path / "source")
        model = query
    made = convert(tmp_path / "source", tmp_path / "model.onnx", to="onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "source"]  # no second file
    assert made.usage.startswith("import onnxruntime")
    session = onnxruntime.InferenceSession(made)
    (node,), (output,) = session.get_inputs(), session.get_outputs()
    assert (node.name, output.name) == ("images", "features")
    assert node.shape[1:] == [3, 32, 32]
    assert session.get_modelmeta().custom_metadata_map["input_size"] == "[3, 32, 32]"
    for num_images in (1, 2, 5):
        x = images(32, num_images)
        (features,) = session.run(["features"], {"images": x.numpy()})
        with torch.inference_mode():
            expected = model(x)
        same(torch.from_numpy(features), expected, 1e-4 * expected.abs().max().item())


def test_a_graph_that_computes_something_else_is_refused_and_not_kept(tmp_path, onnxruntime, monkeypatch):
    write_run(tmp_path / "run")
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda self, *a: [1.001 * f for f in run(self, *a)]
    )
    with pytest.raises(RuntimeError, match="features differ by 1.0e-03 .* Nothing was written"):
        convert(tmp_path / "run", tmp_path / "model.onnx", to="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_without_onnxruntime_the_graph_is_written_and_said_to_be_unchecked(
    tmp_path, onnxruntime, monkeypatch
):
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = convert(tmp_path / "run", tmp_path / "model.onnx", to="onnx")
    assert made.usage.startswith("# onnxruntime is missing: it was not compared")
    monkeypatch.undo()
    onnxruntime.InferenceSession(made)


def test_without_the_extra_onnx_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install 'mocohub\[onnx\]'"):
        convert(tmp_path / "nothing", tmp_path / "model.onnx", to="onnx")


# -- all --------------------------------------------------------------------------------


def test_a_target_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown target 'torch'. Choose one of: torchvision"):
        convert(tmp_path / "nothing", tmp_path / "out", to="torch")


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out' already exists. Choose another --out"):
        convert(tmp_path / "nothing", tmp_path / "out", to="torchvision")
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="folder' is a folder. Give the name of the file"):
        convert(tmp_path / "nothing", tmp_path / "folder", to="torchvision")


def test_a_source_that_does_not_exist_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing' does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out", to="torchvision")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["torchvision", "detectron2"])
def test_files_have_the_mode_that_the_umask_leaves(to, tmp_path):
    source = write_run(tmp_path / "run") and tmp_path / "run"
    if to == "detectron2":
        source = state(tmp_path / "model.pth", "r50", channels=[8, 16, 32, 64])[0]
    before = os.umask(0o027)
    try:
        made = convert(source, tmp_path / "new" / "out", to=to)
    finally:
        os.umask(before)
    assert made.path.stat().st_mode & 0o777 == 0o640


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    import mocohub.hub.convert as module

    write_run(tmp_path / "run")

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "run", tmp_path / "out", to="torchvision")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_the_command_line_prints_the_path_and_how_to_read_the_file(tmp_path, capsys):
    from mocohub.cli import main

    write_run(tmp_path / "run")
    out = str(tmp_path / "out.safetensors")
    assert main(["convert", str(tmp_path / "run"), "--to", "torchvision", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}\n\n")
    assert "model.load_state_dict(load_file(" in printed


def test_inspect_says_which_dialect_which_encoders_and_what_is_left_out(tmp_path, capsys):
    from mocohub.cli import main

    query, key = (randomise(TorchvisionResNet(64, (8, 16, 32, 64)), seed) for seed in (1, 2))
    torch.save(WRITERS["pycontrast"](query, key), tmp_path / "MoCov2.pth")
    assert main(["inspect", str(tmp_path / "MoCov2.pth")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["kind"] == "pycontrast"
    assert lines["written_by"] == "PyContrast"
    assert lines["encoders"] == "query, key"
    assert lines["head"] == "mlp"
    num = len(headless(query).state_dict())
    assert f"{num} model_ema.encoder, 4 model.head" in lines["left_out"]


def test_a_name_of_the_zoo_is_converted_and_a_path_of_that_name_is_a_path(tmp_path):
    name = "moco_tiny_cifar10"
    written = load_file(convert(name, tmp_path / "tiny.safetensors", to="torchvision"))
    assert written["conv1.weight"].equal(mocohub.load(name).state_dict()["conv1.weight"])
    with pytest.raises(FileNotFoundError, match=f"'{name}' does not exist"):
        convert(Path(name), tmp_path / "other.safetensors", to="torchvision")
