"""What `verify` finds in folders, in the cache and on the Hub, and what it makes of damage and malice."""

import shutil
import struct

import pytest
import torch
from helpers.hub import TINY_R50, write_run
from helpers.hub_process import HubProcess
from helpers.hub_server import Fault, HubServer
from safetensors.torch import load_file, save_file

from mocohub.cli import main
from mocohub.files import read_json, sha256, write_json
from mocohub.hub.export import export
from mocohub.hub.verify import Check, check_training_state, verify

PROBE = {"dataset": "Flowers", "metric": "top-1 (%)", "value": 71.5, "protocol": "kNN, k=20, T=0.07"}
NAMES = [
    "files",
    "mocohub.json",
    "SHA-256 of model.safetensors",
    "SHA-256 of config.json",
    "README.md",
    "config.json",
    "model.safetensors",
    "fingerprint",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_run(path, *TINY_R50, steps=(20, 40))
    return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("out") / "flowers", license="cc-by-4.0", probes=[PROBE])


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "flowers")


def failures(checks):
    return {check.name: check.detail for check in checks if not check.ok}


def change(folder, file, **changes):
    """Change a JSON file of a folder, and the hash of it that the manifest states."""
    write_json(folder / file, read_json(folder / file) | changes)
    rehash(folder)


def rehash(folder):
    manifest = read_json(folder / "mocohub.json")
    manifest["sha256"] |= {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}
    write_json(folder / "mocohub.json", manifest)


def test_an_exported_folder_passes_every_check(exported):
    checks = verify(exported)
    assert [check.name for check in checks] == NAMES and not failures(checks)
    details = {check.name: check.detail for check in checks}
    assert details["mocohub.json"] == "flowers, the query encoder, license cc-by-4.0"
    assert details["SHA-256 of model.safetensors"] == sha256(exported / "model.safetensors")
    assert details["README.md"] == "license cc-by-4.0, 1 results"
    assert details["config.json"] == "resnet50, 256 features"


def test_the_command_prints_a_line_for_each_check_and_exits_with_1_if_one_failed(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"ok     {name}" for name in NAMES]
    (folder / "weights.pt").write_text("x")
    assert main(["verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "FAILED files: weights.pt did not come" in out and "failed 1 of 8 checks" in err


def test_the_bundled_model_passes_every_check():
    assert not failures(verify("moco_tiny_cifar10"))


def test_a_check_is_one_line():
    assert str(Check("config.json", True, "resnet50")) == "ok     config.json: resnet50"
    assert str(Check("files", False, "two\n  lines")) == "FAILED files: two lines"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_found_and_what_depends_on_it_left_out(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    checks = verify(folder)
    stated = read_json(folder / "mocohub.json")["sha256"][file]
    assert f"{sha256(folder / file)}, mocohub.json says {stated}" in failures(checks)[f"SHA-256 of {file}"]
    assert not {"model.safetensors", "fingerprint"} & {check.name for check in checks}


def test_missing_and_unexpected_files_are_named(folder):
    (folder / "README.md").unlink()
    for name in ("pytorch_model.bin", "code/model.py", "training-state/rng.pkl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert failures(verify(folder)) == {"files": "README.md missing"}
    (folder / "README.md").write_text("")
    found = failures(verify(folder))["files"]
    assert found.startswith(
        "code/model.py, pytorch_model.bin, training-state/rng.pkl did not come from mocohub"
    )


def test_licences_pictures_and_what_tools_leave_behind_are_no_reason_to_fail(folder):
    for name in (
        ".cache/huggingface/download/config.json.metadata",
        ".git/HEAD",
        ".gitattributes",
        "LICENSE",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "curves.png").write_text("x")
    assert not failures(verify(folder))
    (folder / ".cache" / "model.pkl").write_text("x")
    assert ".cache/model.pkl did not come" in failures(verify(folder))["files"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "format None; this verifies 'mocohub-export/1'"),
        ("{", "is not valid JSON"),
        ('{"format": "mocohub-export/9"}', "format 'mocohub-export/9'"),
        ('{"format": "mocohub-export/1"}', "states no SHA-256"),
        ('{"format": "mocohub-export/1", "sha256": {"model.safetensors": 1, "config.json": 2}}', "KeyError"),
        ("[" * 100_000, "mocohub.json is not valid JSON"),
    ],
)
def test_a_manifest_that_is_none_ends_the_checks(folder, content, reason):
    (folder / "mocohub.json").write_text(content)
    checks = verify(folder)
    assert [check.name for check in checks] == ["files", "mocohub.json"] and reason in checks[1].detail


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a\\..\\b"])
def test_a_manifest_cannot_name_files_elsewhere(folder, name):
    (folder.parent / "outside").write_text("x")
    manifest = read_json(folder / "mocohub.json")
    manifest["sha256"][name] = sha256(folder.parent / "outside")
    write_json(folder / "mocohub.json", manifest)
    assert "outside of its folder" in failures(verify(folder))[f"SHA-256 of {name}"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("library_name: timm", "library_name: other", "snippets only if both say timm"),
        ("license: cc-by-4.0", "license: mit", "license 'mit', mocohub.json says 'cc-by-4.0'"),
        (
            "license: cc-by-4.0",
            "license: free",
            "Unknown license in the card's metadata: 'free'|Unknown license",
        ),
        ("license: cc-by-4.0", "license: other", "the Hub wants license_name and license_link"),
        ("library_name: timm", "library_name: [timm", "cannot be parsed"),
        ("library_name: timm", "library_name: !!python/object/apply:os.getcwd []", "cannot be parsed"),
        ("---\n", "", "snippets only if both say timm"),
    ],
)
def test_metadata_the_hub_could_not_use_is_found(folder, old, new, reason):
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new))
    found = failures(verify(folder))
    assert found.keys() == {"README.md"} and any(part in found["README.md"] for part in reason.split("|"))


def test_a_config_of_another_network_is_found(folder):
    change(folder, "config.json", architecture="resnet18")
    assert (
        "architecture is 'resnet18', mocohub.json says 'resnet50'" in failures(verify(folder))["config.json"]
    )
    change(folder, "mocohub.json", architecture="resnet18")
    assert "num_features is 256, the network has 64" in failures(verify(folder))["config.json"]
    change(folder, "config.json", architecture="hf-hub:org/evil")
    change(folder, "mocohub.json", architecture="hf-hub:org/evil")
    assert "Unknown model (hf-hub:org/evil)" in failures(verify(folder))["config.json"]


def test_arguments_that_name_weights_to_open_are_refused(folder):
    (folder.parent / "weights.pth").write_bytes(b"")
    for poison in ({"checkpoint_path": str(folder.parent / "weights.pth")}, {"pretrained": True}):
        args = read_json(folder / "mocohub.json")["model_args"] | poison
        change(folder, "config.json", model_args=args)
        change(folder, "mocohub.json", model_args=args)
        assert "TypeError" in failures(verify(folder))["config.json"]


def test_preprocessing_that_is_not_the_manifests_is_found(folder):
    cfg = read_json(folder / "config.json")["pretrained_cfg"]
    change(folder, "config.json", pretrained_cfg=cfg | {"mean": [0, 0, 0]})
    assert "mean is [0, 0, 0], mocohub.json says [0.5, 0.4, 0.3]" in failures(verify(folder))["config.json"]


def test_tensors_that_are_not_the_networks_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["conv1.weight"] = torch.zeros(8, 3, 5, 5)
    del tensors["bn1.bias"]
    save_file(tensors | {"fc.weight": torch.zeros(1)}, folder / "model.safetensors")
    rehash(folder)
    found = failures(verify(folder))["model.safetensors"]
    assert found.startswith("3 tensors are not those") and "'bn1.bias': None instead of (64,)" in found


def test_weights_that_are_no_safetensors_are_a_failed_check(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    rehash(folder)
    assert "SafetensorError" in failures(verify(folder))["model.safetensors"]


def test_other_weights_under_right_hashes_have_other_features(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["layer4.0.bn3.weight"] *= 1.001
    save_file(tensors, folder / "model.safetensors")
    rehash(folder)
    found = failures(verify(folder))
    assert found.keys() == {"fingerprint"} and "relative) from those in mocohub.json" in found["fingerprint"]
    for fingerprint in ({}, {"features": ["x"], "norm": 1, "input_size": [3, 32, 32]}, 5):
        change(folder, "mocohub.json", fingerprint=fingerprint)
        assert "fingerprint" in failures(verify(folder))


def test_a_training_state_is_checked_against_the_weights(folder, run):
    newest = run / "checkpoints" / "step-00000040"
    shutil.copytree(newest, folder / "training-state")
    checks = verify(folder)
    assert not failures(checks)
    assert checks[-1].detail == "step 40, with this query encoder"
    with open(folder / "training-state" / "state.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert "is damaged: state.safetensors has SHA-256" in failures(verify(folder))["training-state"]
    manifest = read_json(folder / "mocohub.json")
    with pytest.raises(ValueError, match="is of step 20, and .* of step 40 or of another run: .* differs"):
        check_training_state(run / "checkpoints" / "step-00000020", folder, manifest)
    other = write_other(run, folder.parent)
    with pytest.raises(ValueError, match="holds another network"):
        check_training_state(other, folder, manifest)


def write_other(run, root):
    other = shutil.copytree(run / "checkpoints" / "step-00000040", root / "other")
    tensors = load_file(other / "state.safetensors")
    save_file(tensors | {"query.backbone.extra": torch.zeros(1)}, other / "state.safetensors")
    digests = {"state.safetensors": sha256(other / "state.safetensors")}
    write_json(other / "state.json", read_json(other / "state.json") | {"sha256": digests})
    return other


def test_what_cannot_be_looked_at_raises(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="'absent' does not exist.*org/name.*mocohub list"):
        verify("absent")
    with pytest.raises(ValueError, match="is a file. What is verified are model folders"):
        verify(folder / "model.safetensors")
    with pytest.raises(ValueError, match="revision='v1' is for the Hub. Omit it"):
        verify(folder, revision="v1")


def test_a_repository_is_verified_as_the_hub_serves_it_then_from_the_cache(exported, run, tmp_path):
    full = shutil.copytree(exported, tmp_path / "full")
    shutil.copytree(run / "checkpoints" / "step-00000040", full / "training-state")
    with HubServer() as server:
        with HubProcess(server.environment(tmp_path / "home", MOCOHUB_NAMESPACE="org")) as process:
            commit = server.add("org/flowers", full, "v1")
            for source, revision in (("org/flowers", "v1"), ("hf-hub:org/flowers@v1", None)):
                checks = process.call(verify, source, revision=revision)
                assert [c.name for c in checks] == ["commit", *NAMES, "hashes on the Hub"]
                assert not failures(checks) and checks[0].detail == f"org/flowers at {commit}"
            # The large file of the training state is judged without being fetched.
            assert not any("state.safetensors" in path for _, path in server.requests)
            zoo = shutil.copytree(exported, tmp_path / "zoo")
            server.add("org/moco_r50_in1m", zoo)
            assert "org/moco_r50_in1m at" in process.call(verify, "moco_r50_in1m")[0].detail

            bad = shutil.copytree(full, tmp_path / "bad")
            (bad / "pickle.pt").write_text("x")
            change(bad, "training-state/state.json", sha256={"state.safetensors": "0"})
            server.add("org/bad", bad)
            found = failures(process.call(verify, "org/bad"))
            assert found.keys() == {"files", "hashes on the Hub"} and "pickle.pt" in found["files"]
            assert "has training-state/state.safetensors with SHA-256" in found["hashes on the Hub"]

            server.faults.append(Fault("corrupt", "org/other/resolve/.*/model", "GET", times=float("inf")))
            server.add("org/other", zoo)
            shutil.rmtree(tmp_path / "home" / "hf" / "hub")
            (check,) = process.call(verify, "org/other")
            assert (check.name, check.ok) == ("download", False) and "arrived wrong twice" in check.detail
            server.faults[:] = [Fault("status", "/tree/", status=403)]
            with pytest.raises(PermissionError, match="refuses the list of files of 'org/flowers' .403"):
                process.call(verify, "org/flowers", revision=commit)
            server.faults.clear()
            with pytest.raises(FileNotFoundError, match="has no 'org/absent'"):
                process.call(verify, "org/absent")
            process.call(verify, "org/flowers", revision=commit)
        offline = server.environment(tmp_path / "home", HF_HUB_OFFLINE="1")
        server.requests.clear()
        with HubProcess(offline) as process:
            checks = process.call(verify, "org/flowers", revision=commit)
            assert not failures(checks) and checks[0].detail == f"org/flowers at {commit}, from the cache"
            with pytest.raises(FileNotFoundError, match="'org/full' at revision 'main' is not in the cache"):
                process.call(verify, "org/full")
        assert server.requests == []
