"""The loopback Hub does what the real one does, which makes tests against it mean something."""

import hashlib
import http.client
import json
import math
import shutil
import subprocess
import sys
import time

import pytest
from helpers.hub_server import KINDS, Fault, HubServer
from helpers.hub_store import Refusal

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "folder"
    (folder / "training-state").mkdir(parents=True)
    (folder / "config.json").write_bytes(b'{"architecture": "resnet18"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "training-state" / "state.json").write_bytes(b"{}")
    with HubServer() as hub:
        hub.add("our-lab/flowers", folder, "v1.0")
        yield hub


def ask(server, path, method="GET", body=None, token="hf_test", **headers):
    """One request: its status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def commit(server, *operations, parent=None, branch="main"):
    header = {"summary": "change", "description": "", **({"parentCommit": parent} if parent else {})}
    lines = [{"key": "header", "value": header}, *({"key": key, "value": value} for key, value in operations)]
    text = "\n".join(json.dumps(line) for line in lines).encode()
    return ask(server, f"/api/models/our-lab/flowers/commit/{branch}", "POST", text)


# The public client, in a process of its own, goes through everything that a publisher does.
CLIENT = """
import json, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api, folder = HfApi(), Path(sys.argv[1])
url = api.create_repo("our-lab/trees", private=True)
assert url.repo_id == "our-lab/trees", url
api.create_repo("our-lab/trees", exist_ok=True)
first = api.upload_folder(repo_id="our-lab/trees", folder_path=folder).oid
assert api.upload_folder(repo_id="our-lab/trees", folder_path=folder).oid == first, "unchanged, yet a commit"
api.create_tag("our-lab/trees", tag="v1.0", revision=first)
api.create_tag("our-lab/trees", tag="v1.0", revision=first, exist_ok=True)
api.create_branch("our-lab/trees", branch="wip/one")
operations = [CommitOperationDelete("training-state/"), CommitOperationAdd("new.txt", b"new")]
second = api.create_commit("our-lab/trees", operations, commit_message="second", parent_commit=first).oid
try:
    late = [CommitOperationAdd("new.txt", b"late")]
    api.create_commit("our-lab/trees", late, commit_message="third", parent_commit=first)
except HfHubHTTPError as error:
    stale = error.response.status_code
refs = api.list_repo_refs("our-lab/trees")
infos = api.get_paths_info("our-lab/trees", ["model.safetensors", "nothing"], revision="v1.0")
branch = snapshot_download("our-lab/trees", revision="wip/one")
print(json.dumps({
    "first": first,
    "second": second,
    "stale": stale,
    "who": api.whoami()["name"],
    "private": api.model_info("our-lab/trees").private,
    "sizes": {s.rfilename: s.size for s in api.model_info("our-lab/trees", files_metadata=True).siblings},
    "tags": {ref.name: ref.target_commit for ref in refs.tags},
    "branches": {ref.name: ref.target_commit for ref in refs.branches},
    "titles": [commit.title for commit in api.list_repo_commits("our-lab/trees")],
    "top": sorted(entry.path for entry in api.list_repo_tree("our-lab/trees", revision="v1.0")),
    "all": sorted(api.list_repo_files("our-lab/trees", revision="v1.0")),
    "lfs": [info.lfs.sha256 for info in infos],
    "branch": (Path(branch) / "model.safetensors").read_bytes().hex(),
}))
"""


@pytest.mark.parametrize("way", ["lfs", "multipart", "xet"])
def test_what_the_real_client_uploads_comes_back_byte_for_byte(way, server, tmp_path):
    if way == "xet":
        pytest.importorskip("hf_xet")
    server.multipart_bytes = 3000 if way == "multipart" else None
    folder = shutil.copytree(tmp_path / "folder", tmp_path / "trees")
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    changes = {"HF_HUB_DISABLE_XET": "0"} if way == "xet" else {}
    ran = subprocess.run(
        [sys.executable, "-c", CLIENT, str(folder)],
        env=server.environment(tmp_path / "home", **changes),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    paths = [".gitattributes", "config.json", "model.safetensors", "training-state/state.json"]
    assert seen["all"] == paths
    assert seen["top"] == [*paths[:3], "training-state"]
    assert seen["stale"] == 412
    assert seen["who"] == "tester" and seen["private"]
    assert seen["titles"] == ["second", "Upload folder using huggingface_hub", "initial commit"]
    assert seen["tags"] == {"v1.0": seen["first"]}
    assert seen["branches"] == {"main": seen["second"], "wip/one": seen["first"]}
    assert sorted(seen["sizes"]) == [".gitattributes", "config.json", "model.safetensors", "new.txt"]
    assert seen["sizes"]["model.safetensors"] == len(WEIGHTS)
    assert seen["lfs"] == [hashlib.sha256(WEIGHTS[::-1]).hexdigest()]
    assert bytes.fromhex(seen["branch"]) == WEIGHTS[::-1]
    # And without the client's own way of transfer, as a browser would get it.
    status, headers, body = ask(server, "/our-lab/trees/resolve/v1.0/model.safetensors")
    assert (status, body) == (200, WEIGHTS[::-1])
    assert headers["X-Linked-Etag"].strip('"') == seen["lfs"][0]
    assert ("X-Xet-Hash" in headers) == (way == "xet")
    sent = {path.rsplit("/", 1)[0] if "/part/" in path else path for method, path in server.requests}
    assert any(path.endswith("/part") for path in sent) == (way == "multipart")
    assert any("xet-write-token" in path for path in sent) == (way == "xet")


def test_the_content_of_large_files_may_come_from_another_host_which_is_told_no_token(server, tmp_path):
    server.cdn = True
    script = "from huggingface_hub import snapshot_download as s; print(s('our-lab/flowers'))"
    environment = server.environment(tmp_path)
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    folder = ran.stdout.strip()
    with open(f"{folder}/model.safetensors", "rb") as file:
        assert file.read() == WEIGHTS
    tokens = dict(server.tokens_seen)
    assert tokens == {f"127.0.0.1:{server.port}": "hf_test", f"localhost:{server.port}": None}


def test_a_part_of_a_file_is_served(server):
    path = "/our-lab/flowers/resolve/main/model.safetensors"
    status, headers, body = ask(server, path, Range="bytes=100-199")
    assert (status, body) == (206, WEIGHTS[100:200])
    assert headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
    assert ask(server, path, Range="bytes=10000-")[2] == WEIGHTS[10000:]
    assert ask(server, path, Range="bytes=-7")[2] == WEIGHTS[-7:]
    assert ask(server, path, Range=f"bytes={len(WEIGHTS)}-")[0] == 416


def test_plain_files_are_served_beside_the_repositories(server, tmp_path):
    server.serve("/moco/moco_checkpoints/", tmp_path / "folder")
    status, _, body = ask(server, "/moco/moco_checkpoints/model.safetensors", Range="bytes=5-9", token=None)
    assert (status, body) == (206, WEIGHTS[5:10])
    assert ask(server, "/moco/moco_checkpoints/none.pth.tar")[0] == 404


def test_a_commit_is_whole_or_not_at_all(server):
    before = server.repositories["our-lab/flowers"].branches["main"]
    new = ("file", {"path": "new.txt", "content": "bmV3", "encoding": "base64"})
    never_sent = ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 3})
    for bad in (
        never_sent,
        ("deletedFile", {"path": "none.txt"}),
        ("file", {"path": "../up.txt", "content": ""}),
    ):
        assert commit(server, new, bad)[0] == 400
        assert server.repositories["our-lab/flowers"].branches["main"] == before
    assert commit(server, new, parent="0" * 40)[0] == 412
    assert commit(server, new, branch="none")[0] == 404
    status, _, body = commit(server, new, parent=before)
    assert status == 200
    assert server.files("our-lab/flowers")["new.txt"] == b"new"
    assert "new.txt" not in server.files("our-lab/flowers", "v1.0")
    assert server.repositories["our-lab/flowers"].find("main").oid == json.loads(body)["commitOid"]


def test_an_object_is_kept_only_under_its_own_hash(server):
    assert ask(server, f"/lfs/{'0' * 64}", "PUT", b"other")[0] == 400
    oid = hashlib.sha256(b"this").hexdigest()
    assert ask(server, f"/lfs/{oid}/verify", "POST", {"oid": oid, "size": 4})[0] == 404
    assert ask(server, f"/lfs/{oid}", "PUT", b"this")[0] == 200
    assert ask(server, f"/lfs/{oid}/verify", "POST", {"oid": oid, "size": 4})[0] == 200


def test_who_may_not_read_or_write_is_told_so(server):
    server.create("our-lab/secret", private=True)
    info = "/api/models/our-lab/secret"
    assert [ask(server, info, token=token)[0] for token in ("hf_test", "hf_read", None, "hf_stolen")] == [
        200,
        200,
        401,
        401,
    ]
    assert ask(server, "/api/models/our-lab/none")[1]["X-Error-Code"] == "RepoNotFound"
    assert [ask(server, "/api/models/our-lab/none", token=token)[0] for token in ("hf_test", None)] == [
        404,
        401,
    ]
    create = {"name": "mine", "organization": None}
    for token, status in ((None, 401), ("hf_read", 403), ("hf_test", 200), ("hf_test", 409)):
        assert ask(server, "/api/repos/create", "POST", create, token)[0] == status
    assert list(server.files("tester/mine")) == [".gitattributes"]


def test_tags_and_branches_are_made_once_and_removed(server):
    for path, body in (("tag/main", {"tag": "v2"}), ("branch/wip%2Fone", {})):
        url = f"/api/models/our-lab/flowers/{path}"
        assert [ask(server, url, "POST", body)[0] for _ in range(2)] == [200, 409]
    tip = server.repositories["our-lab/flowers"].find("main")
    assert server.repositories["our-lab/flowers"].find("v2") == tip
    assert server.repositories["our-lab/flowers"].find("wip/one") == tip
    for name in ("tag/v2", "branch/wip%2Fone"):
        url = f"/api/models/our-lab/flowers/{name}"
        assert [ask(server, url, "DELETE")[0] for _ in range(2)] == [200, 404]
    with pytest.raises(Refusal, match="Invalid rev id: v2"):
        server.repositories["our-lab/flowers"].find("v2")


@pytest.mark.parametrize(
    ("readme", "problem"),
    [
        ("# no metadata", None),
        ("---\nlicense: mit\n---\n", None),
        ("---\nlicense: [\n---\n", "not YAML"),
        ("---\n- a\n---\n", "not a mapping"),
        ("---\nlicense: other\n---\n", "license_name"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n", "task.type"),
    ],
)
def test_a_cards_metadata_is_validated(server, readme, problem):
    status, _, body = ask(server, "/api/validate-yaml", "POST", {"content": readme, "repoType": "model"})
    assert status == (400 if problem else 200)
    assert (problem or "[]") in body.decode()


def test_every_kind_of_fault_is_as_ordered_and_then_over(server):
    path = "/our-lab/flowers/resolve/main/model.safetensors"
    etag = ask(server, path)[1]["ETag"]
    for kind in KINDS:
        fault = Fault(kind, r"resolve/.*\.safetensors$", "GET", status=429, headers={"Retry-After": "7"})
        fault.seconds, fault.after = 0.2 if kind == "stall" else 600, 1  # if another waited, `ask` would not
        server.faults.append(fault)
        assert ask(server, path)[2] == WEIGHTS  # `after` lets one pass
        assert ask(server, "/our-lab/flowers/resolve/main/config.json")[0] == 200  # not meant
        start = time.monotonic()
        if kind in ("close", "close_after"):
            with pytest.raises(http.client.RemoteDisconnected):
                ask(server, path)
        elif kind == "cut":
            with pytest.raises(http.client.IncompleteRead, match=f"{len(WEIGHTS) // 2} bytes read"):
                ask(server, path)
        else:
            status, headers, body = ask(server, path)
            different = sum(a != b for a, b in zip(body, WEIGHTS, strict=False))
            assert (status, headers.get("Retry-After")) == (
                (429, "7") if kind == "status" else (status, None)
            )
            assert (status, headers.get("Location")) == (
                (302, path) if kind == "redirect_loop" else (status, None)
            )
            if status == 200:
                assert len(body) == len(WEIGHTS) - (kind == "short")
                assert different == (kind == "corrupt")
                assert (headers["ETag"] == etag) == (kind != "wrong_etag")
            assert kind != "stall" or time.monotonic() - start >= 0.2
        assert (fault.hits, fault.times) == (1, 0)
        assert ask(server, path)[2] == WEIGHTS


def test_closing_before_and_after_differ_in_what_was_done(server):
    new = ("file", {"path": "new.txt", "content": "bmV3", "encoding": "base64"})
    for kind, done in (("close", False), ("close_after", True)):
        server.faults.append(Fault(kind, "/commit/"))
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            commit(server, new)
        assert ("new.txt" in server.files("our-lab/flowers")) == done


def test_a_fault_may_last_for_ever(server):
    server.faults.append(Fault("status", times=math.inf, status=500))
    assert {ask(server, "/api/models/our-lab/flowers")[0] for _ in range(5)} == {500}
    assert server.faults[0].hits == 5


def test_a_stalled_server_can_be_stopped(tmp_path):
    with HubServer() as hub:
        hub.faults.append(Fault("stall", seconds=600))
        connection = http.client.HTTPConnection("127.0.0.1", hub.port)
        connection.request("GET", "/")
        start = time.monotonic()
    assert time.monotonic() - start < 300
