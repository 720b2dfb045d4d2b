"""An exported folder through the programs people have: hf, timm, transformers, an old client, a mirror.

All run as they are, in processes of their own, against servers on the loopback. None of them knows mocohub.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers.hub import TINY_R50, HubServer, images, write_run
from helpers.hub_store import Blob, Storage

from mocohub.files import sha256
from mocohub.hub.export import export

REPO = "our-lab/flowers"
HF = Path(sys.executable).with_name("hf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two versions of one model, of a stock timm network."""
    root = tmp_path_factory.mktemp("exports")
    write_run(root / "run", *TINY_R50, steps=(20, 40))
    checkpoints = sorted((root / "run" / "checkpoints").iterdir())
    return [export(step, root / f"v{n}" / "flowers", license="mit") for n, step in enumerate(checkpoints, 1)]


@pytest.fixture(scope="module")
def hub(folders, tmp_path_factory):
    """A Hub with both, as `hf upload` put them there; the server, and the two commits."""
    home = tmp_path_factory.mktemp("publisher")
    with HubServer() as server:
        commits = []
        for folder, tag in zip(folders, ("v1.0", "v2.0"), strict=True):
            said = run(server, home, HF, "upload", REPO, folder, ".", "--commit-message", f"Version {tag}")
            commits.append(server.repositories[REPO].branches["main"])
            assert f"{server.endpoint}/{REPO}/commit/{commits[-1]}" in said
            run(server, home, HF, "repos", "tag", "create", REPO, tag, "-m", "release")
        yield server, commits


def run(server, home, *command, code=0, **changes):
    """What a client printed; it must end with this code."""
    ran = subprocess.run(
        [str(word) for word in command],
        env=server.environment(home, **changes),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == code, f"{command} ended with {ran.returncode}:\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


def contents(folder):
    """Path -> bytes of the files in a folder, without what a client keeps for itself."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_hf_upload_puts_each_version_there_in_one_commit(hub, folders):
    server, commits = hub
    history = server.repositories[REPO].history("main")
    assert [commit.title for commit in history] == ["Version v2.0", "Version v1.0", "initial commit"]
    assert [commit.oid for commit in history[:2]] == commits[::-1]
    for folder, tag, commit in zip(folders, ("v1.0", "v2.0"), commits, strict=True):
        held = server.files(REPO, tag)
        del held[".gitattributes"]
        assert held == contents(folder) == {k: v for k, v in server.files(REPO, commit).items() if k in held}


def test_hf_upload_of_the_same_folder_makes_no_commit(hub, folders, tmp_path):
    server, commits = hub
    run(server, tmp_path, HF, "upload", REPO, folders[1], ".")
    assert server.repositories[REPO].branches["main"] == commits[1]


@pytest.mark.parametrize("revision", [None, "v1.0", "commit"])
def test_hf_download_brings_every_byte_of_a_revision(revision, hub, folders, tmp_path):
    server, commits = hub
    arguments = ["--revision", commits[0] if revision == "commit" else revision] if revision else []
    run(server, tmp_path, HF, "download", REPO, *arguments, "--local-dir", tmp_path / "copy")
    got = contents(tmp_path / "copy")
    del got[".gitattributes"]
    assert got == contents(folders[0 if revision else 1])


def test_hf_download_takes_include_once_for_each_pattern(hub, folders, tmp_path):
    patterns = ["--include", "*.json", "--include", "*.safetensors"]
    run(hub[0], tmp_path, HF, "download", REPO, *patterns, "--local-dir", tmp_path / "copy")
    wanted = ("config.json", "mocohub.json", "model.safetensors")
    assert contents(tmp_path / "copy") == {name: contents(folders[1])[name] for name in wanted}


def test_hf_cache_verify_finds_a_flipped_bit_in_what_was_downloaded(hub, tmp_path):
    server, _ = hub
    run(server, tmp_path, HF, "download", REPO)
    said = run(server, tmp_path, HF, "cache", "verify", REPO, "--fail-on-missing-files")
    assert "Verified 5 file(s)" in said and "All checksums match" in said
    (weights,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in run(server, tmp_path, HF, "cache", "verify", REPO, code=1)


TIMM = """
import json, sys, timm, torch
model = timm.create_model(sys.argv[1], pretrained=True, num_classes=0).eval()
assert "mocohub" not in sys.modules
with torch.inference_mode():
    features = model(torch.load(sys.argv[2], weights_only=True))
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
print(json.dumps({"features": features[0].tolist(), "transform": str(transform)}))
"""


@pytest.fixture(scope="module")
def expected(folders, tmp_path_factory):
    """A file of images, and the features of both versions by timm from the local folder."""
    file = tmp_path_factory.mktemp("images") / "images.pt"
    torch.save(images(64), file)
    features = []
    for folder in folders:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        with torch.inference_mode():
            features.append(model(images(64))[0].tolist())
    assert features[0] != pytest.approx(features[1], rel=1e-2)
    return file, features


def test_timm_loads_every_revision_without_knowing_mocohub(hub, expected, tmp_path):
    server, commits = hub
    file, features = expected
    for name, version in ((REPO, 1), (f"{REPO}@{commits[0]}", 0)):
        said = run(server, tmp_path, sys.executable, "-I", "-c", TIMM, f"hf-hub:{name}", file)
        seen = json.loads(said[said.index('{"features"') :].splitlines()[0])
        assert seen["features"] == pytest.approx(features[version], abs=1e-6)
        assert "mean=tensor([0.5000, 0.4000, 0.3000])" in seen["transform"]


def test_timm_loads_a_pinned_commit_without_any_server_once_it_has_it(hub, expected, tmp_path):
    server, commits = hub
    command = [sys.executable, "-I", "-c", TIMM, f"hf-hub:{REPO}@{commits[0]}", expected[0]]
    run(server, tmp_path, HF, "download", REPO, "--revision", commits[0])
    before = len(server.requests)
    run(server, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert len(server.requests) == before


@pytest.fixture
def environment_of(tmp_path):
    """A maker of virtual environments; skips the test where packages cannot be fetched."""

    def make(*packages, share=False):
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        python = folder / "bin" / "python"
        if share:  # torch and timm are those of this environment
            (site,) = folder.glob("lib/python*/site-packages")
            ours = {str(Path(module.__file__).parents[1]) for module in (torch, pytest)}
            (site / "shared.pth").write_text("\n".join(ours))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        installed = subprocess.run(pip, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"pip cannot install {packages} here: {installed.stderr.strip()[-200:]}")
        return folder / "bin"

    return make


TRANSFORMERS = """
import json, sys, numpy, torch, transformers
from PIL import Image
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[1])
with torch.inference_mode():
    features = model(torch.load(sys.argv[2], weights_only=True)).pooler_output.flatten(1)
pixels = Image.fromarray(numpy.full((300, 400, 3), 255, dtype=numpy.uint8))
white = processor(pixels, return_tensors="pt")["pixel_values"]
assert "mocohub" not in sys.modules
brightest = white.amax((0, 2, 3)).tolist()
print(json.dumps({"features": features[0].tolist(), "shape": list(white.shape), "white": brightest}))
"""


@pytest.mark.slow
def test_transformers_loads_model_and_preprocessing(hub, expected, tmp_path, environment_of):
    python = environment_of("transformers>=5", share=True) / "python"
    said = run(hub[0], tmp_path, python, "-c", TRANSFORMERS, REPO, expected[0])
    seen = json.loads(said[said.index('{"features"') :].splitlines()[0])
    assert seen["features"] == pytest.approx(expected[1][1], abs=1e-5)
    assert seen["shape"] == [1, 3, 32, 32]
    assert seen["white"] == pytest.approx([2.5, 2.4, 0.7 / 0.3], abs=1e-4)  # (1 - mean) / std


@pytest.mark.slow
def test_an_old_huggingface_cli_uploads_and_downloads(hub, folders, tmp_path, environment_of):
    server, _ = hub
    cli = environment_of("huggingface_hub==0.36.2") / "huggingface-cli"
    options = ["--include", "*.json", "*.safetensors"]  # as they were written then
    run(server, tmp_path, cli, "download", REPO, "--revision", "v1.0", "--local-dir", tmp_path / "copy")
    got = contents(tmp_path / "copy")
    del got[".gitattributes"]
    assert got == contents(folders[0])
    run(server, tmp_path, cli, "download", REPO, *options, "--local-dir", tmp_path / "some")
    assert set(contents(tmp_path / "some")) == {"config.json", "mocohub.json", "model.safetensors"}
    run(server, tmp_path, cli, "upload", "our-lab/old", folders[0], ".")
    assert {k: v for k, v in server.files("our-lab/old").items() if k != ".gitattributes"} == got


def commit_to_git(folder, repository, storage, tag):
    """Commit an exported folder as Git LFS would: a pointer in the tree, the content beside it."""
    git = ["git", "-c", "user.name=us", "-c", "user.email=us@example.org", "-C", str(repository)]
    if not repository.exists():
        repository.mkdir(parents=True)
        subprocess.run([*git, "init", "--quiet", "--initial-branch=main"], check=True)
    for file in folder.iterdir():
        blob: Blob = storage.add(file.name, file)
        if blob.is_lfs:
            kept = repository / ".git/lfs/objects" / blob.sha256[:2] / blob.sha256[2:4] / blob.sha256
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, kept)
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.sha256}\nsize {blob.size}\n"
            )
            (repository / file.name).write_text(pointer)
        else:
            shutil.copy(file, repository / file.name)
    for command in (["add", "--all"], ["commit", "--quiet", "-m", tag], ["tag", tag]):
        subprocess.run([*git, *command], check=True)


@pytest.mark.slow
def test_a_mirror_that_others_wrote_serves_the_same_files(folders, expected, tmp_path, environment_of):
    """Olah serves Git repositories by the Hub's protocol, and does not share our misunderstandings of it."""
    olah = environment_of("olah==0.5.4") / "olah-cli"
    storage = Storage(tmp_path / "storage")
    for folder, tag in zip(folders, ("v1.0", "v2.0"), strict=True):
        commit_to_git(folder, tmp_path / "mirrors" / "models" / REPO, storage, tag)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/repos"\n'
        'hf-scheme = "http"\nhf-netloc = "127.0.0.1:9"\nhf-lfs-netloc = "127.0.0.1:9"\n'
        f'mirror-netloc = "127.0.0.1:{port}"\nmirror-lfs-netloc = "127.0.0.1:{port}"\n'
        f'mirrors-path = ["{tmp_path}/mirrors"]\n[accessibility]\noffline = true\n'
    )
    with open(tmp_path / "olah.log", "w") as log:
        server = subprocess.Popen(
            [str(olah), "-c", "olah.toml"], cwd=tmp_path, stdout=log, stderr=log, env=os.environ
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{endpoint}/api/models/{REPO}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "olah.log").read_text()
                time.sleep(0.1)
        with HubServer() as nobody:  # for its `environment` alone
            run(
                nobody, tmp_path, HF, "download", REPO, "--local-dir", tmp_path / "copy", HF_ENDPOINT=endpoint
            )
            assert contents(tmp_path / "copy") == contents(folders[1])
            run(nobody, tmp_path, HF, "download", REPO, "--revision", "v1.0", HF_ENDPOINT=endpoint)
            (weights,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
            assert sha256(weights) == sha256(folders[0] / "model.safetensors")
            command = [sys.executable, "-I", "-c", TIMM, f"hf-hub:{REPO}@v1.0", expected[0]]
            said = run(nobody, tmp_path, *command, HF_ENDPOINT=endpoint)
            seen = json.loads(said[said.index('{"features"') :].splitlines()[0])
            assert seen["features"] == pytest.approx(expected[1][0], abs=1e-6)
            assert not nobody.requests
    finally:
        server.terminate()
        server.wait()
