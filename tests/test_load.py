import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers.hub import TorchvisionResNet, images, randomise, write_official, write_run
from helpers.hub_server import Fault, HubServer
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock

import mocohub
from mocohub.files import read_json, sha256, write_json
from mocohub.hub.export import export, fingerprint
from mocohub.hub.load import load, transform
from mocohub.hub.zoo import ZOO


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return path, write_run(path, steps=(20, 40))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return export(run[0], tmp_path_factory.mktemp("out") / "flowers", license="mit")


def features(model, inputs=None):
    with torch.inference_mode():
        return model(images() if inputs is None else inputs)


def corrupt(folder, copy):
    """Copy an exported folder with one bit of its last weight flipped."""
    copy.mkdir()
    for file in folder.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "model.safetensors":
            data[-1] ^= 1
        (copy / file.name).write_bytes(data)
    return copy


def test_run_checkpoint_and_export_give_the_same_model(run, folder):
    path, models = run
    reference = models[40, "query"](images())
    for source in (path, path / "checkpoints" / "step-00000040", folder, str(folder)):
        model = load(source)
        assert not model.training
        assert model.num_classes == 0
        torch.testing.assert_close(features(model), reference, rtol=0, atol=1e-6)


def test_the_key_encoder_of_a_run_differs_from_the_query_encoder(run):
    path, models = run
    key = features(load(path, encoder="key"))
    torch.testing.assert_close(key, models[40, "key"](images()), rtol=0, atol=1e-6)
    assert not torch.allclose(key, features(load(path)), rtol=1e-2)


def test_an_official_file_loads_as_it_is(tmp_path):
    query, key = (randomise(TorchvisionResNet(64, (8, 16, 32, 64)), seed) for seed in (1, 2))
    write_official(tmp_path / "moco.pth.tar", query, key)
    query.fc = torch.nn.Identity()
    model = load(tmp_path / "moco.pth.tar")
    torch.testing.assert_close(features(model, images(64)), query(images(64)), rtol=0, atol=1e-6)
    assert model.pretrained_cfg["crop_pct"] == 0.875
    assert model.pretrained_cfg["input_size"] == [3, 224, 224]


@pytest.mark.parametrize("which", ["run", "export"])
def test_the_model_states_its_preprocessing_and_holds_its_weights_once(which, run, folder):
    model = load(run[0] if which == "run" else folder)
    assert "state_dict" not in model.pretrained_cfg
    assert list(model.pretrained_cfg["mean"]) == [0.5, 0.4, 0.3]
    assert model.pretrained_cfg["interpolation"] == "bilinear"


@pytest.mark.parametrize("which", ["run", "export"])
def test_timms_own_arguments_adapt_the_weights(which, run, folder):
    source = run[0] if which == "run" else folder
    query = run[1][40, "query"]
    grey = load(source, in_chans=1)
    # timm sums the kernels over colours, so a grey image gives what three equal channels gave.
    channel = images()[:, :1]
    torch.testing.assert_close(
        features(grey, channel), query(channel.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
    )
    maps = features(load(source, features_only=True, out_indices=(1, 4)))
    assert [m.shape[1] for m in maps] == [16, 128]
    torch.testing.assert_close(maps[1].mean((2, 3)), query(images()), rtol=1e-4, atol=1e-5)
    unpooled = features(load(source, global_pool=""))
    torch.testing.assert_close(unpooled, query.forward_features(images()), rtol=0, atol=1e-6)
    assert features(load(source, num_classes=7)).shape == (2, 7)


def test_the_output_stride_of_a_stock_network_can_be_reduced(tmp_path):
    query, key = (randomise(TorchvisionResNet(16, (8, 16, 32, 64)), seed) for seed in (1, 2))
    write_official(tmp_path / "wide.pth.tar", query, key)
    folder = export(tmp_path / "wide.pth.tar", tmp_path / "wide", license="mit")
    for source in (folder, tmp_path / "wide.pth.tar"):
        model = load(source, output_stride=8, global_pool="")
        assert features(model, images(64)).shape == (2, 256, 8, 8)


def same_state(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"global_pool": ""},
        {"in_chans": 1},
        {"in_chans": 6},
        {"features_only": True, "out_indices": (1, 4)},
        {"features_only": True},
        {"drop_path_rate": 0.1},
    ],
    ids=str,
)
def test_every_tensor_and_fact_is_what_timm_itself_loads(arguments, folder):
    model = load(folder, **arguments)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, **{"num_classes": 0, **arguments})
    same_state(model, theirs)
    assert type(model) is type(theirs)
    assert model.pretrained_cfg == theirs.pretrained_cfg
    inputs = torch.randn(2, arguments.get("in_chans", 3), 32, 32)
    for mine, other in zip(features(model, inputs), features(theirs.eval(), inputs), strict=True):
        assert torch.equal(mine, other)


def test_weights_stay_in_the_file_they_are_mapped_from(folder):
    model = load(folder)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0].split("-") for fields in maps if fields[-1] == str(folder / "model.safetensors")]
    address = model.layer4[1].conv2.weight.data_ptr()
    assert any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


def test_training_a_loaded_model_leaves_its_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).sum().backward()
    optimizer.step()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(model.conv1.weight, load(folder).conv1.weight)


def remanifested(folder, copy, **config):
    """A copy of an exported folder with other facts in its config.json, and a manifest that says so."""
    shutil.copytree(folder, copy)
    write_json(copy / "config.json", read_json(copy / "config.json") | config)
    manifest = read_json(copy / "mocohub.json")
    manifest["sha256"] = {name: sha256(copy / name) for name in manifest["sha256"]}
    write_json(copy / "mocohub.json", manifest)
    return copy


def test_weights_stored_in_half_precision_become_what_timm_makes_of_them(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "original")
    tensors = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    half = remanifested(copy, tmp_path / "half")
    same_state(load(half), timm.create_model(f"local-dir:{half}", pretrained=True, num_classes=0))
    assert {p.dtype for p in load(half).parameters()} == {torch.float32}


class WithTable(timm.models.ResNet):
    """A network with a buffer that no file holds, as many transformers have."""

    def __init__(self, **kwargs):
        super().__init__(BasicBlock, [2, 2, 2, 2], **kwargs)
        self.register_buffer("table", torch.arange(4.0, device=self.conv1.weight.device), persistent=False)


@timm.models.register_model
def resnet_with_table(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg(WithTable, "resnet_with_table", pretrained, **kwargs)


def test_what_no_file_holds_is_computed(tmp_path):
    model = randomise(timm.create_model("resnet_with_table", num_classes=0, channels=(8, 8, 8, 8)), 1)
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "num_classes": 0, "classifier": "fc", "first_conv": "conv1"}
    config = {"architecture": "resnet_with_table", "num_classes": 0, "pretrained_cfg": cfg}
    write_json(tmp_path / "model" / "config.json", config | {"model_args": {"channels": [8, 8, 8, 8]}})
    stated = {"sha256": {"model.safetensors": sha256(tmp_path / "model" / "model.safetensors")}}
    write_json(tmp_path / "model" / "mocohub.json", stated)
    loaded = load(tmp_path / "model")
    assert loaded.table.tolist() == [0, 1, 2, 3]
    assert torch.equal(features(loaded), features(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "os.system"}, "timm cannot build what .* Unknown model"),
        ({"model_args": {"no_such_argument": 1}}, "timm cannot build what .*no_such_argument"),
        ({"model_args": "layers"}, "timm cannot build what"),
        ({"pretrained_cfg": None}, "timm cannot build what"),
    ],
)
def test_a_configuration_that_describes_no_network_is_refused(config, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(remanifested(folder, tmp_path / "copy", **config))


def test_weights_that_are_no_safetensors_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "mocohub.json").unlink()
    (copy / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="The weights in .* are no safetensors file, or cut"):
        load(copy)


def test_a_changed_configuration_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_json(copy / "config.json", read_json(copy / "config.json") | {"num_features": 7})
    with pytest.raises(RuntimeError, match=r"is damaged: config.json has SHA-256 \w{64}, mocohub.json says"):
        load(copy)


def test_device_and_dtype_are_those_asked_for(folder):
    model = load(folder, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


def test_the_transform_is_the_models_own(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = transform(load(folder))(Image.fromarray(pixels))
    resized = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BILINEAR)  # crop_pct is 1
    reference = torch.tensor(np.array(resized.crop((8, 0, 40, 32)))).permute(2, 0, 1) / 255
    reference = (reference - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[
        :, None, None
    ]
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)


def test_a_module_without_preprocessing_has_no_transform():
    with pytest.raises(ValueError, match="Linear has no pretrained_cfg.*mocohub.load"):
        transform(torch.nn.Linear(1, 1))


def test_the_public_names_are_these_functions():
    assert mocohub.load is load
    assert mocohub.transform is transform


def test_a_flipped_bit_in_exported_weights_is_refused(folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"has SHA-256 \w{64}, mocohub.json says \w{64}"):
        load(corrupt(folder, tmp_path / "copy"))


def test_a_folder_of_another_tool_loads_without_manifest(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert torch.equal(features(load(tmp_path)), features(load(folder)))


def test_pickled_weights_in_a_model_folder_are_not_opened(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no model.safetensors; weights in other formats are not opened"):
        load(tmp_path)


def test_the_bundled_model_loads_by_its_name_and_computes_what_it_did_when_it_was_exported():
    model = load("moco_tiny_cifar10")
    assert not model.training
    assert features(model, images(32, 5)).shape == (5, 128)
    stated = read_json(ZOO["moco_tiny_cifar10"].bundled_folder / "mocohub.json")["fingerprint"]
    assert fingerprint(model)["features"] == pytest.approx(stated["features"], rel=1e-4, abs=1e-5)
    assert fingerprint(model)["norm"] == pytest.approx(stated["norm"], rel=1e-4)


def test_a_folder_of_the_bundled_models_name_is_named_as_a_path(folder, tmp_path, monkeypatch, caplog):
    shutil.copytree(folder, tmp_path / "moco_tiny_cifar10")
    monkeypatch.chdir(tmp_path)
    for path in ("./moco_tiny_cifar10", Path("moco_tiny_cifar10")):
        assert torch.equal(features(load(path)), features(load(folder)))
    assert not caplog.records
    bundled = load("moco_tiny_cifar10")
    assert torch.equal(features(bundled), features(load(ZOO["moco_tiny_cifar10"].bundled_folder)))
    assert "'./moco_tiny_cifar10' is what stands here" in caplog.text


def test_the_bundled_model_has_no_revisions():
    for arguments in ({"revision": "v1"}, {"name_or_path": "moco_tiny_cifar10@v1"}):
        with pytest.raises(ValueError, match="comes with mocohub, in one version. Omit the revision 'v1'"):
            load(**{"name_or_path": "moco_tiny_cifar10"} | arguments)


def test_an_export_has_no_key_encoder(folder):
    with pytest.raises(ValueError, match="only training runs and checkpoints hold both"):
        load(folder, encoder="key")


def test_an_unknown_encoder_is_refused(folder):
    with pytest.raises(ValueError, match="Unknown encoder 'momentum'"):
        load(folder, encoder="momentum")


def test_a_revision_is_only_for_the_hub(folder):
    with pytest.raises(ValueError, match="revision='v1' is for the Hub"):
        load(folder, revision="v1")


def test_two_different_revisions_are_refused():
    with pytest.raises(ValueError, match="name two revisions"):
        load("org/name@v1", revision="v2")


@pytest.mark.parametrize("name", ["resnet50", "resnet50.a1_in1k"])
def test_a_name_of_timm_is_answered_with_its_repository(name):
    with pytest.raises(
        ValueError, match=f"'{name}' is an architecture of timm.*timm/resnet50.a1_in1k, or, in"
    ):
        load(name)


def test_a_path_that_is_taken_for_a_repository_is_named_when_the_hub_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match="'models/photoz' is no path on this disk. .*did not give"):
        load("models/photoz")


def test_an_unknown_name_is_answered_with_the_closest_model():
    with pytest.raises(ValueError, match="Unknown model 'moco_r50w2_in1m'. Choose one of: moco_r50w2x_in1m"):
        load("moco_r50w2_in1m")


@pytest.mark.parametrize(
    "path",
    [
        "./runs/v2",
        "runs/v2/checkpoints",
        "moco_v1.pth.tar",
        "runs/moco.pth",
        "~/no-such-run",
        Path("runs/v2"),
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path):
    with pytest.raises(FileNotFoundError, match="does not exist on this disk"):
        load(path)


# What follows runs in fresh processes, since the address of the Hub is read when its client is imported. Each
# scenario is the arguments of one call; the process prints the features, or the error, of each as JSON.
CLIENT = """
import dataclasses, json, sys, torch, mocohub
from mocohub.hub import web
from mocohub.hub.zoo import ZOO
images, scenarios, md5 = sys.argv[1:]
web.PATIENCE_S = 1.0
for name, value in json.loads(md5).items():  # of our small files under the names of the authors'
    ZOO[name] = dataclasses.replace(ZOO[name], weights_md5=value)
images = torch.load(images, weights_only=True)
for arguments in json.loads(scenarios):
    try:
        with torch.inference_mode():
            answer = mocohub.load(**arguments)(images)[0].tolist()
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""
V1, V2 = "moco_r50_in1m", "mocov2_r50_in1m"
V1_FILE = "moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar"
V2_FILE = "moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar"


def start(scenarios, environment, pixels, md5=None):
    arguments = [str(pixels), json.dumps(scenarios), json.dumps(md5 or {})]
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """The authors' files, small: (folder of their server, features of (model, encoder), MD5s, images)."""
    root = tmp_path_factory.mktemp("authors")
    torch.save(images(64), root / "images.pt")
    expected, md5 = {}, {}
    for seed, (name, file) in enumerate(((V1, V1_FILE), (V2, V2_FILE))):
        query, key = (randomise(TorchvisionResNet(64, (8, 16, 32, 64)), 2 * seed + i) for i in (1, 2))
        path = root / "served" / file
        path.parent.mkdir(parents=True)
        write_official(path, query, key, mlp=name == V2)
        md5[name] = hashlib.md5(path.read_bytes()).hexdigest()[:8]
        for encoder, model in (("query", query), ("key", key)):
            model.fc = torch.nn.Identity()
            expected[name, encoder] = features(model, images(64))[0].tolist()
    return root / "served", expected, md5, root / "images.pt"


@pytest.fixture(scope="module")
def hub(run, folder, authors, tmp_path_factory):
    """Answers of a client to every scenario below, and the requests that the Hub saw."""
    root = tmp_path_factory.mktemp("hub")
    newer = export(run[0] / "checkpoints" / "step-00000020", root / "newer", license="mit")
    plain = root / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).write_bytes((folder / name).read_bytes())
    data = root / "data"
    data.mkdir()
    (data / "train.csv").write_text("a,b\n")
    with HubServer() as server:
        commit = server.add("our-lab/flowers", folder, "v1.0")
        server.add("our-lab/flowers", newer)
        server.add("our-lab/flipped", corrupt(folder, root / "flipped"))
        server.add("our-lab/plain", plain)
        server.add("our-lab/data", data)
        server.add("our-lab/moco_r50_in1m", folder)
        server.add("our-lab/moco_rx50_in1m", data)
        server.serve("/moco/moco_checkpoints", authors[0])
        scenarios = {
            "main": {"name_or_path": "our-lab/flowers"},
            "prefix": {"name_or_path": "hf-hub:our-lab/flowers"},
            "tag": {"name_or_path": "hf-hub:our-lab/flowers@v1.0"},
            "commit": {"name_or_path": "our-lab/flowers", "revision": commit},
            "offline": {"name_or_path": "our-lab/flowers@v1.0", "offline": True},
            "offline, never seen": {"name_or_path": "our-lab/never", "offline": True},
            "no such revision": {"name_or_path": "our-lab/flowers@v9"},
            "no such repository": {"name_or_path": "our-lab/trees"},
            "key": {"name_or_path": "our-lab/flowers", "encoder": "key"},
            "flipped": {"name_or_path": "our-lab/flipped"},
            "plain": {"name_or_path": "our-lab/plain"},
            "data": {"name_or_path": "our-lab/data"},
            "bundled": {"name_or_path": "moco_tiny_cifar10"},
            "zoo": {"name_or_path": V1},
            "zoo, offline": {"name_or_path": V1, "offline": True},
            "zoo, authors, offline": {"name_or_path": V2, "offline": True},
            "zoo, nobody": {"name_or_path": "moco_r50w2x_in1m"},
            "zoo, no model": {"name_or_path": "moco_rx50_in1m"},
            "zoo, a revision": {"name_or_path": V2, "revision": "v1.0"},
            "zoo, authors, another MD5": {"name_or_path": V2},
        }
        torch.save(images(), root / "images.pt")
        environment = server.environment(root, MOCOHUB_NAMESPACE="our-lab")
        answers = finish(start(list(scenarios.values()), environment, root / "images.pt"))
        return dict(zip(scenarios, answers, strict=True)), server.requests, commit


def check(answer, run, step):
    expected = features(run[1][step, "query"])[0].tolist()
    assert answer == pytest.approx(expected, abs=1e-5)


def test_a_repository_on_the_hub_loads_from_its_default_branch(hub, run):
    check(hub[0]["main"], run, 20)
    check(hub[0]["prefix"], run, 20)


def test_a_pinned_tag_or_commit_gives_the_older_model(hub, run):
    check(hub[0]["tag"], run, 40)
    check(hub[0]["commit"], run, 40)


def test_every_file_is_asked_for_by_commit_and_no_others_are(hub):
    files = [path.split("/resolve/")[1].split("/") for _, path in hub[1] if "/resolve/" in path]
    assert {len(revision) for revision, _ in files} == {40}
    assert {name for _, name in files} == {"config.json", "model.safetensors", "mocohub.json"}


def test_weights_that_arrive_damaged_are_refused(hub):
    assert hub[0]["flipped"].startswith(
        "RuntimeError: model.safetensors of 'our-lab/flipped' arrived wrong twice"
    )


def test_offline_takes_what_is_in_the_cache(hub, run):
    check(hub[0]["offline"], run, 40)
    check(hub[0]["zoo, offline"], run, 40)
    assert "FileNotFoundError" in hub[0]["offline, never seen"]
    assert "`hf download our-lab/never`" in hub[0]["offline, never seen"]
    assert not [path for _, path in hub[1] if "never" in path]


def test_a_plain_timm_repository_loads_without_manifest(hub, run):
    check(hub[0]["plain"], run, 40)


def test_a_repository_that_is_no_model_is_refused(hub):
    assert hub[0]["data"] == "ValueError: 'our-lab/data' has no config.json: it is not a timm model."


def test_a_repository_that_does_not_exist_is_neither_path_nor_model(hub):
    assert re.fullmatch(
        r"FileNotFoundError: 'our-lab/trees' is no path on this disk. http://127.0.0.1:\d+ has no "
        r"'our-lab/trees' \(404\). If it is private or gated, log in with `hf auth login`.",
        hub[0]["no such repository"],
    )


def test_a_revision_that_does_not_exist_is_named(hub):
    assert "ValueError" in hub[0]["no such revision"]
    assert "has no 'our-lab/flowers' at revision 'v9'" in hub[0]["no such revision"]


def test_the_key_encoder_is_not_on_the_hub(hub):
    assert "only training runs and checkpoints hold both" in hub[0]["key"]


def test_the_bundled_model_is_not_asked_of_the_hub(hub):
    assert hub[0]["bundled"] == pytest.approx(features(load("moco_tiny_cifar10"))[0].tolist(), abs=1e-5)
    assert not [path for _, path in hub[1] if "moco_tiny_cifar10" in path]


def test_a_zoo_model_is_looked_for_in_the_namespace(hub, run):
    check(hub[0]["zoo"], run, 40)


def test_a_zoo_model_that_nobody_published_is_answered_with_its_recipe(hub):
    answer = hub[0]["zoo, nobody"]
    assert answer.startswith("FileNotFoundError: 'moco_r50w2x_in1m' is not published as 'our-lab/moco_r50w2x")
    assert "`mocohub pretrain moco_r50w2x_in1m --data IMAGES --out RUN` trains it" in answer
    assert ZOO["moco_r50w2x_in1m"].cost in answer
    assert "`mocohub publish`" in answer


def test_a_repository_under_a_zoo_models_name_must_hold_a_model(hub):
    assert hub[0]["zoo, no model"].startswith("ValueError: 'our-lab/moco_rx50_in1m' has no config.json")


def test_an_authors_file_with_another_md5_is_refused(hub, authors):
    answer = hub[0]["zoo, authors, another MD5"]
    assert re.match(
        rf"RuntimeError: http://127.0.0.1:\d+/moco/moco_checkpoints/{V2_FILE} arrived twice", answer
    )
    assert f"with MD5 {authors[2][V2]}" in answer
    assert "its authors state 59fd9945" in answer


def test_an_authors_file_is_not_fetched_offline_nor_for_a_revision(hub):
    assert "FileNotFoundError" in hub[0]["zoo, authors, offline"]
    assert "moco_v2_200ep_pretrain.pth.tar where there is a network" in hub[0]["zoo, authors, offline"]
    assert hub[0]["zoo, a revision"].startswith("FileNotFoundError: http://127.0.0.1")
    assert len([path for _, path in hub[1] if "moco_checkpoints" in path]) == 2  # of the other MD5


@pytest.fixture
def server(authors):
    with HubServer() as server:
        server.serve("/moco/moco_checkpoints", authors[0])
        yield server


def files_fetched(server):
    return [path for method, path in server.requests if method == "GET" and "moco_checkpoints" in path]


def test_authors_files_are_converted_once_and_verified_ever_after(server, authors, tmp_path):
    _, expected, md5, pixels = authors
    environment = server.environment(tmp_path)
    calls = [
        {"name_or_path": V1},
        {"name_or_path": V2},
        {"name_or_path": V1, "encoder": "key"},
        {"name_or_path": V2},
        {"name_or_path": V2, "offline": True},
    ]
    answers = finish(start(calls, environment, pixels, md5))
    which = [(V1, "query"), (V2, "query"), (V1, "key"), (V2, "query"), (V2, "query")]
    for answer, one in zip(answers, which, strict=True):
        assert answer == pytest.approx(expected[one], abs=1e-5)
    v1, v2 = (f"/moco/moco_checkpoints/{file}" for file in (V1_FILE, V2_FILE))
    assert files_fetched(server) == [v1, v2, v1]
    made = sorted((tmp_path / "mocohub" / "models").glob("[!.]*"))
    assert [path.name for path in made] == [
        f"{V1}-{md5[V1]}-key",
        f"{V1}-{md5[V1]}-query",
        f"{V2}-{md5[V2]}-query",
    ]
    assert read_json(made[2] / "mocohub.json")["origin"]["file"] == "moco_v2_200ep_pretrain.pth.tar"
    assert not list((tmp_path / "mocohub").rglob("*.partial"))

    weights = bytearray((made[2] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (made[2] / "model.safetensors").write_bytes(weights)
    server.faults.append(Fault("redirect_loop", "/api/models/", times=float("inf")))
    calls = [
        {"name_or_path": V2, "offline": True},
        {"name_or_path": V2},
        {"name_or_path": "moco_r50w2x_in1m"},
    ]
    broken, again, nobody = finish(start(calls, environment, pixels, md5))
    assert "is not in the cache" in broken
    assert again == pytest.approx(expected[V2, "query"], abs=1e-5)  # while the Hub is down
    assert nobody.startswith(f"ConnectionError: {server.endpoint} sends 'mocohub/moco_r50w2x_in1m' round")


@pytest.mark.parametrize(
    ("num", "lies"), [(3, False), *(pytest.param(16, lies, marks=pytest.mark.slow) for lies in (False, True))]
)
def test_processes_that_start_at_once_convert_once_though_one_is_killed(num, lies, server, authors, tmp_path):
    _, expected, md5, pixels = authors
    library = {"LD_PRELOAD": lying_locks(tmp_path)} if lies else {}
    environment = server.environment(tmp_path, **library)
    stall = Fault("stall", "pretrain.pth.tar", "GET", seconds=60)
    server.faults.append(stall)
    first = start([{"name_or_path": V1}], environment, pixels, md5)
    while not stall.hits:
        time.sleep(0.02)
        assert first.poll() is None, first.communicate()
    models = tmp_path / "mocohub" / "models"
    (left,) = models.glob(".*.partial")
    for path in (*left.rglob("*"), left):
        os.utime(path, (0, 0))  # as if nobody had written to it for long; before others look at it
    others = [start([{"name_or_path": V1}], environment, pixels, md5) for _ in range(num - 1)]
    first.kill()
    first.communicate()
    for process in others:
        assert finish(process)[0] == pytest.approx(expected[V1, "query"], abs=1e-5)
    assert (2 <= len(files_fetched(server)) <= num) if lies else len(files_fetched(server)) == 2
    assert [path.name for path in models.glob("[!.]*")] == [f"{V1}-{md5[V1]}-query"]
    assert not list(models.glob(".*.partial"))


def lying_locks(folder):
    """A library under which every process holds every lock."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (folder / "lie.c").write_text("int flock(int fd, int operation) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", folder / "lie.c", "-o", folder / "lie.so"], check=True)
    return str(folder / "lie.so")


@pytest.mark.slow
def test_under_torchrun_one_process_downloads(server, authors, folder, tmp_path):
    server.add("mocohub/moco_r50_in1m", folder)
    script = "import mocohub; mocohub.load('moco_r50_in1m'); mocohub.load('mocov2_r50_in1m')"
    patch = "import dataclasses; from mocohub.hub.zoo import ZOO; n = 'mocov2_r50_in1m'; "
    patch += f"ZOO[n] = dataclasses.replace(ZOO[n], weights_md5='{authors[2][V2]}'); "
    (tmp_path / "work.py").write_text(patch + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    subprocess.run([*command, tmp_path / "work.py"], env=server.environment(tmp_path), check=True)
    fetched = [path for method, path in server.requests if method == "GET"]
    assert len([path for path in fetched if path.endswith("model.safetensors")]) == 1
    assert len(files_fetched(server)) == 1


@pytest.mark.slow
def test_the_authors_three_checkpoints_load_at_their_size(tmp_path):
    """v1 has one layer behind the backbone, v2 two; momentum buffers for all of the query encoder."""
    names = {V1: False, V2: True, "mocov2_r50_in1m_800ep": True}
    expected, md5 = [], {}
    for seed, (name, mlp) in enumerate(names.items()):
        query, key = (randomise(torchvision.models.resnet50(num_classes=128), 2 * seed + i) for i in (1, 2))
        file = tmp_path / "served" / ZOO[name].weights_url.split("/moco_checkpoints/")[1]
        file.parent.mkdir(parents=True)
        write_official(file, query, key, mlp=mlp, zip_format=False)
        checkpoint = torch.load(file, weights_only=True)
        tensors = checkpoint["state_dict"]
        tensors["module.queue"] = torch.randn(128, 65536)
        trained = [t for n, t in tensors.items() if "encoder_q" in n and not re.search("running|num_b", n)]
        state = {i: {"momentum_buffer": torch.zeros_like(t)} for i, t in enumerate(trained)}
        checkpoint["optimizer"]["state"] = state
        torch.save(checkpoint, file, _use_new_zipfile_serialization=False)
        assert file.stat().st_size / 1e6 == pytest.approx(369 if mlp else 319, rel=0.03)
        with open(file, "rb") as opened:
            md5[name] = hashlib.file_digest(opened, "md5").hexdigest()[:8]
        query.fc = torch.nn.Identity()
        expected.append(features(query, images(64))[0].tolist())
    torch.save(images(64), tmp_path / "images.pt")
    with HubServer() as server:
        server.serve("/moco/moco_checkpoints", tmp_path / "served")
        calls = [{"name_or_path": name} for name in names]
        answers = finish(start(calls, server.environment(tmp_path), tmp_path / "images.pt", md5))
    for answer, reference in zip(answers, expected, strict=True):
        assert answer == pytest.approx(reference, rel=1e-4, abs=1e-4)
