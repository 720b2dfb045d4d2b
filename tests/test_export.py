import json
import math
import os
import stat
import subprocess
import sys

import pytest
import timm
import torch
from helpers.hub import TINY_R50, TINY_WIDE, TorchvisionResNet, images, randomise, write_official, write_run
from huggingface_hub import ModelCard
from safetensors import safe_open

import mocohub
from mocohub.files import sha256
from mocohub.hub.export import export, fingerprint, fingerprint_difference

PROBE = {"dataset": "Flowers", "metric": "top-1 (%)", "value": 71.5, "protocol": "kNN, k=20, T=0.07"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return path, write_run(path)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return export(run[0], tmp_path_factory.mktemp("out") / "flowers", license="cc-by-4.0", probes=[PROBE])


@pytest.fixture(scope="module")
def wide_and_narrow(tmp_path_factory):
    """Exports of the shapes of r50 and r50w2x, with the networks that were exported."""
    root = tmp_path_factory.mktemp("shapes")
    exported = {}
    for backbone, model_args in (TINY_R50, TINY_WIDE):
        models = write_run(root / f"{backbone}-run", backbone, model_args)
        exported[backbone] = (
            export(root / f"{backbone}-run", root / backbone, license="mit"),
            models[20, "query"],
        )
    return exported


def manifest(folder):
    return json.loads((folder / "mocohub.json").read_text())


def test_the_folder_holds_exactly_the_four_files_readable_by_others(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "mocohub.json",
        "model.safetensors",
    ]
    os.umask(mask := os.umask(0))
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~mask}


def test_two_exports_of_one_checkpoint_are_the_same_bytes(run, folder, tmp_path):
    for copy in "abc":
        again = export(run[0], tmp_path / copy, license="cc-by-4.0", probes=[PROBE], name="flowers")
        assert {f.name: f.read_bytes() for f in again.iterdir()} == {
            f.name: f.read_bytes() for f in folder.iterdir()
        }


def test_the_weights_carry_their_provenance(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "name": "flowers",
            "encoder": "query",
            "license": "cc-by-4.0",
            "mocohub": mocohub.__version__,
        }


def test_the_manifest_states_where_the_model_comes_from(folder):
    facts = manifest(folder)
    assert facts["format"] == "mocohub-export/1"
    assert facts["name"] == "flowers"
    assert (facts["backbone"], facts["encoder"], facts["source"]) == ("r18tiny", "query", "run")
    assert (facts["steps"], facts["epochs"], facts["num_images_seen"]) == (20, 1, 160)
    assert facts["recipe"]["augmentation"]["crop_scale_min"] == 0.2
    assert (facts["license"], facts["commit"], facts["probes"]) == ("cc-by-4.0", "c0ffee", [PROBE])
    assert facts["stock_timm"] is False
    assert facts["sha256"] == {
        "model.safetensors": sha256(folder / "model.safetensors"),
        "config.json": sha256(folder / "config.json"),
    }


def test_the_config_says_nothing_that_is_not_ours(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"] == {"stem_chs": 16, "channels": [16, 32, 64, 128]}
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (0, 128, "avg")
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ([3, 32, 32], 1.0, "bilinear")
    assert (cfg["mean"], cfg["license"], cfg["tag"]) == ([0.5, 0.4, 0.3], "cc-by-4.0", "flowers")


def test_the_card_shows_the_probe(folder):
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.license == "cc-by-4.0"
    assert [(r.metric_value, r.metric_name) for r in card.data.eval_results] == [
        (71.5, "top-1 (%) (kNN, k=20, T=0.07)")
    ]


def test_the_fingerprint_is_that_of_a_loaded_copy_and_of_no_other_model(folder, run):
    stated = manifest(folder)["fingerprint"]
    again = fingerprint(mocohub.load(folder))
    other = fingerprint(mocohub.load(run[0], encoder="key"))
    assert len(stated["features"]) == 8
    assert again["features"] == pytest.approx(stated["features"], rel=1e-5)
    assert again["norm"] == pytest.approx(stated["norm"], rel=1e-5)
    assert other["norm"] != pytest.approx(stated["norm"], rel=1e-3)


def test_the_fingerprint_is_of_the_fixed_pattern(folder):
    model = mocohub.load(folder)
    pixels = torch.tensor([i * 7919 % 256 / 255 for i in range(3 * 32 * 32)]).reshape(1, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    with torch.inference_mode():
        features = model((pixels - mean[:, None, None]) / std[:, None, None])[0]
    assert fingerprint(model)["features"] == pytest.approx(features[:8].tolist(), rel=1e-5)


def test_the_difference_of_two_fingerprints_is_relative_to_the_length_of_the_first():
    stated = {"input_size": [3, 32, 32], "features": [3.0, 4.0], "norm": 10.0}
    assert fingerprint_difference(stated, stated) == 0
    shifted = stated | {"features": [3.0, 4.05]}
    assert fingerprint_difference(stated, shifted) == pytest.approx(0.01)
    assert fingerprint_difference(stated, shifted | {"norm": 9.0}) == pytest.approx(0.1)
    # Rounding of features that are next to nothing is no difference.
    dead = stated | {"features": [0.0, 0.0]}
    assert fingerprint_difference(dead, stated | {"features": [1e-9, 0.0]}) < 1e-6
    for other in ({"input_size": [3, 64, 64]}, {"features": [3.0]}, {"norm": math.nan}):
        assert fingerprint_difference(stated, stated | other) == math.inf
        assert fingerprint_difference(stated | other, stated) == math.inf


@pytest.mark.parametrize("broken", [{}, {"features": 5, "norm": 1.0}, {"features": [None], "norm": 1.0}])
def test_what_is_no_fingerprint_is_refused(broken):
    sound = {"input_size": [3, 32, 32], "features": [3.0, 4.0], "norm": 10.0}
    with pytest.raises(ValueError, match="This is no fingerprint"):
        fingerprint_difference(broken, sound)


STOCK = """
import sys, timm, torch
torch.set_num_threads(1)  # as here: another number of threads rounds differently
images = torch.load(sys.argv[1], weights_only=True)
found = {}
for path in sys.argv[3:]:
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    grey = timm.create_model(f"local-dir:{path}", pretrained=True, in_chans=1).eval()
    maps = timm.create_model(f"local-dir:{path}", pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        found[path] = [model(images), grey(images[:, :1])] + maps(images)
assert "mocohub" not in sys.modules
torch.save(found, sys.argv[2])
"""


def test_stock_timm_without_mocohub_computes_the_same_features(wide_and_narrow, tmp_path):
    torch.save(images(64), tmp_path / "images.pt")
    folders = [str(folder) for folder, _ in wide_and_narrow.values()]
    command = [sys.executable, "-c", STOCK, str(tmp_path / "images.pt"), str(tmp_path / "found.pt"), *folders]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for folder, trained in wide_and_narrow.values():
        pooled, grey, *maps = found[str(folder)]
        with torch.inference_mode():
            loaded = mocohub.load(folder)(images(64))
            ours = mocohub.load(folder, features_only=True)(images(64))
            our_grey = mocohub.load(folder, in_chans=1)(images(64)[:, :1])
            torch.testing.assert_close(loaded, trained(images(64)), rtol=0, atol=1e-6)
        torch.testing.assert_close(pooled, loaded, rtol=0, atol=1e-6)
        torch.testing.assert_close(grey, our_grey, rtol=0, atol=1e-6)
        torch.testing.assert_close(maps, ours, rtol=0, atol=1e-6)
        torch.testing.assert_close(maps[-1].mean((2, 3)), pooled, rtol=1e-4, atol=1e-5)


def test_a_name_of_the_zoo_is_exported_as_what_it_loads(tmp_path):
    name, pixels = "moco_tiny_cifar10", images(32)
    loaded = mocohub.load(export(name, tmp_path / "mine", license="apache-2.0"))
    assert loaded(pixels).equal(mocohub.load(name)(pixels))


def test_only_the_small_image_networks_need_mocohub(folder, wide_and_narrow):
    assert manifest(folder)["stock_timm"] is False
    assert all(manifest(folder)["stock_timm"] is True for folder, _ in wide_and_narrow.values())


def test_transformers_reads_the_folder(wide_and_narrow):
    transformers = pytest.importorskip("transformers")
    for folder, trained in wide_and_narrow.values():
        with torch.inference_mode():
            found = transformers.AutoModel.from_pretrained(folder)(images(64)).pooler_output
            torch.testing.assert_close(found, trained(images(64)), rtol=0, atol=1e-5)


def test_the_key_encoder_is_exported_on_request(run, tmp_path):
    folder = export(run[0], tmp_path / "key", license="mit", encoder="key")
    assert manifest(folder)["encoder"] == "key"
    assert "The key encoder" in (folder / "README.md").read_text()
    with torch.inference_mode():
        found = mocohub.load(folder, encoder="key")(images())
        torch.testing.assert_close(found, run[1][20, "key"](images()))
        assert not torch.allclose(found, run[1][20, "query"](images()), rtol=1e-2)


def test_an_official_file_is_exported_with_its_checksum(tmp_path):
    query, key = (randomise(TorchvisionResNet(64, (8, 16, 32, 64)), seed) for seed in (1, 2))
    write_official(tmp_path / "checkpoint_0199.pth.tar", query, key, mlp=True)
    folder = export(tmp_path / "checkpoint_0199.pth.tar", tmp_path / "out", license="other", name="theirs")
    facts = manifest(folder)
    assert facts["origin"]["file"] == "checkpoint_0199.pth.tar"
    assert (facts["name"], facts["architecture"], facts["epochs"]) == ("theirs", "resnet50", 200)
    query.fc = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(mocohub.load(folder)(images(64)), query(images(64)), rtol=0, atol=1e-6)


def test_an_exported_folder_can_be_exported_again_with_new_probes(folder, tmp_path):
    again = export(folder, tmp_path / "again", license="mit", probes=[{**PROBE, "value": 80.0}])
    old, new = manifest(folder), manifest(again)
    assert (new["license"], new["probes"][0]["value"], new["source"]) == ("mit", 80.0, "export")
    assert new["fingerprint"] == old["fingerprint"]
    assert new["recipe"] == old["recipe"]
    assert timm.create_model(f"local-dir:{again}", pretrained=True).pretrained_cfg["license"] == "mit"


@pytest.mark.parametrize("license", [None, ""])
def test_a_missing_license_is_refused_with_examples(license, run, tmp_path):
    with pytest.raises(ValueError, match="license is missing.*'apache-2.0', 'cc-by-nc-4.0'"):
        export(run[0], tmp_path / "out", license=license)


def test_an_unknown_license_is_refused_with_the_closest(run, tmp_path):
    with pytest.raises(ValueError, match="Unknown license 'CC-BY-NC-4'. Choose one of"):
        export(run[0], tmp_path / "out", license="CC-BY-NC-4")
    with pytest.raises(ValueError, match="Unknown license 'apache2'. Choose one of: apache-2.0"):
        export(run[0], tmp_path / "out", license="apache2")


def test_a_probe_without_protocol_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(ValueError, match="lacks protocol"):
        export(run[0], tmp_path / "out", license="mit", probes=[{k: PROBE[k] for k in list(PROBE)[:3]}])
    assert list(tmp_path.iterdir()) == []


def test_a_name_the_hub_would_refuse_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="'my model' cannot name a model on the Hub.*moco_r50"):
        export(run[0], tmp_path / "my model", license="mit")


def test_nothing_is_overwritten(run, folder):
    before = sha256(folder / "mocohub.json")
    with pytest.raises(FileExistsError, match="already exists"):
        export(run[0], folder, license="mit")
    assert sha256(folder / "mocohub.json") == before
