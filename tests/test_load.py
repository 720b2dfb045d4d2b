import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.hub import HubServer, TorchvisionResNet, images, randomise, write_official, write_run
from PIL import Image

import mocohub
from mocohub.files import read_json
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


# What follows runs in one fresh process, since the Hub's address is read when its client is imported. Each
# scenario is the arguments of one call; the process prints the features, or the error, of each as JSON.
CLIENT = """
import json, sys, torch, mocohub
images = torch.load(sys.argv[1], weights_only=True)
for arguments in json.loads(sys.argv[2]):
    try:
        with torch.inference_mode():
            answer = mocohub.load(**arguments)(images)[0].tolist()
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def hub(run, folder, tmp_path_factory):
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
        scenarios = {
            "main": {"name_or_path": "our-lab/flowers"},
            "prefix": {"name_or_path": "hf-hub:our-lab/flowers"},
            "tag": {"name_or_path": "hf-hub:our-lab/flowers@v1.0"},
            "commit": {"name_or_path": "our-lab/flowers", "revision": commit},
            "no such revision": {"name_or_path": "our-lab/flowers@v9"},
            "no such repository": {"name_or_path": "our-lab/trees"},
            "key": {"name_or_path": "our-lab/flowers", "encoder": "key"},
            "flipped": {"name_or_path": "our-lab/flipped"},
            "plain": {"name_or_path": "our-lab/plain"},
            "data": {"name_or_path": "our-lab/data"},
            "bundled": {"name_or_path": "moco_tiny_cifar10"},
            "zoo": {"name_or_path": "moco_r50_in1m"},
            "zoo, authors only": {"name_or_path": "mocov2_r50_in1m"},
            "zoo, nobody": {"name_or_path": "moco_r50w2x_in1m"},
        }
        torch.save(images(), root / "images.pt")
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(root / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "MOCOHUB_NAMESPACE": "our-lab",
        }
        for name in (
            "HF_TOKEN",
            "HF_HUB_OFFLINE",
            "HF_HUB_CACHE",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ):
            environment.pop(name, None)
        printed = subprocess.run(
            [sys.executable, "-c", CLIENT, str(root / "images.pt"), json.dumps(list(scenarios.values()))],
            env=environment,
            capture_output=True,
            text=True,
            cwd=root,
            timeout=120,
        )
        assert printed.returncode == 0, printed.stderr
        answers = [json.loads(line) for line in printed.stdout.splitlines()]
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
    assert "RuntimeError" in hub[0]["flipped"]
    assert "model.safetensors has SHA-256" in hub[0]["flipped"]


def test_a_plain_timm_repository_loads_without_manifest(hub, run):
    check(hub[0]["plain"], run, 40)


def test_a_repository_that_is_no_model_is_refused(hub):
    assert hub[0]["data"] == "ValueError: 'our-lab/data' has no config.json: it is not a timm model."


def test_a_repository_that_does_not_exist_is_neither_path_nor_model(hub):
    assert hub[0]["no such repository"].startswith(
        "FileNotFoundError: 'our-lab/trees' is neither a path on this disk nor a model on http://127.0.0.1"
    )


def test_a_revision_that_does_not_exist_is_named(hub):
    assert hub[0]["no such revision"].startswith("ValueError: 'our-lab/flowers' has no revision 'v9'.")


def test_the_key_encoder_is_not_on_the_hub(hub):
    assert "only training runs and checkpoints hold both" in hub[0]["key"]


def test_the_bundled_model_is_not_asked_of_the_hub(hub):
    assert hub[0]["bundled"] == pytest.approx(features(load("moco_tiny_cifar10"))[0].tolist(), abs=1e-5)
    assert not [path for _, path in hub[1] if "moco_tiny_cifar10" in path]


def test_a_zoo_model_is_looked_for_in_the_namespace(hub, run):
    check(hub[0]["zoo"], run, 40)


def test_a_zoo_model_that_only_its_authors_published_is_answered_with_their_file(hub):
    answer = hub[0]["zoo, authors only"]
    assert answer.startswith(
        "FileNotFoundError: 'mocov2_r50_in1m' could not be fetched as 'our-lab/mocov2_r50_in1m'"
    )
    assert "moco_v2_200ep_pretrain.pth.tar (MD5 59fd9945...)" in answer
    assert "mocohub.load(FILE)" in answer


def test_a_zoo_model_that_nobody_published_is_answered_with_its_recipe(hub):
    assert "Nobody has published its weights" in hub[0]["zoo, nobody"]
    assert "`mocohub info moco_r50w2x_in1m`" in hub[0]["zoo, nobody"]
