"""Publishing to a Hub on the loopback, by the real client; every success was verified by a fresh process."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hub import TINY_R50, write_run
from helpers.hub_process import HubProcess
from helpers.hub_server import Fault, HubServer
from huggingface_hub import ModelCard, constants

from mocohub.files import read_json, sha256, write_json
from mocohub.hub.export import export
from mocohub.hub.publish import publish

INF = float("inf")
STATE = {f"training-state/{name}" for name in ("SHA256SUMS", "state.json", "state.safetensors")}
MODEL = {"README.md", "config.json", "mocohub.json", "model.safetensors"}


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    return server.environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def process(environment):
    with HubProcess(environment) as process:
        yield process


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of one run."""
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, *TINY_R50, steps=(20, 40))
    return run


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """Their exports, under one name."""
    root = tmp_path_factory.mktemp("folders")
    steps = ("step-00000020", "step-00000040")
    return [export(runs / "checkpoints" / s, root / s, license="mit", name="flowers") for s in steps]


@pytest.fixture(autouse=True)
def no_faults_left(server):
    yield
    server.faults.clear()


def commits(server, repo, branch="main"):
    return server.repositories[repo].history(branch)


def test_a_folder_is_published_in_one_commit_under_a_tag_with_a_card_that_names_it(server, process, folders):
    found = process.call(publish, folders[0], "org/first", tag="v1.0", message="Flowers, day one")
    files = server.files("org/first")
    assert files.keys() == MODEL | {".gitattributes"} and set(found.changed) == MODEL
    assert [commit.title for commit in commits(server, "org/first")] == ["Flowers, day one", "initial commit"]
    assert server.repositories["org/first"].tags == {"v1.0": found.commit}
    assert files["model.safetensors"] == (folders[0] / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert 'mocohub.load("org/first")' in card and "ORG/flowers" not in card
    assert ModelCard(card).data.license == "mit"
    assert json.loads(files["mocohub.json"]) == read_json(folders[0] / "mocohub.json") | {"repo": "org/first"}
    assert f"{server.endpoint}/org/first/tree/v1.0" in str(found) and found.commit in str(found)
    before = server.requests.copy()
    again = process.call(publish, folders[0], "org/first", tag="v1.0")
    assert again.commit == found.commit and again.changed == () and "nothing had changed" in str(again)
    assert not any(method == "POST" and "/commit/" in path for method, path in server.requests[len(before) :])


def test_a_training_state_travels_in_the_same_commit_and_goes_with_the_weights_it_belongs_to(
    server, process, runs, folders, tmp_path
):
    found = process.call(publish, folders[1], "org/full", training_state=runs)
    files = server.files("org/full")
    assert files.keys() == MODEL | STATE | {".gitattributes"} and set(found.changed) == MODEL | STATE
    newest = runs / "checkpoints" / "step-00000040"
    for name in ("state.json", "state.safetensors"):
        assert files[f"training-state/{name}"] == (newest / name).read_bytes()
    expected = [f"{sha256(newest / name)}  {name}" for name in ("state.json", "state.safetensors")]
    assert files["training-state/SHA256SUMS"].decode().splitlines() == expected
    edited = shutil.copytree(folders[1], tmp_path / "edited")
    text = (edited / "README.md").read_text().replace("# flowers", "# Flowers\n\nBy hand.")
    (edited / "README.md").write_text(text)
    again = process.call(publish, edited, "org/full")
    assert set(again.changed) == {"README.md"} and server.files("org/full").keys() == files.keys()
    assert "By hand." in server.files("org/full")["README.md"].decode()
    other = process.call(publish, folders[0], "org/full")
    assert STATE < set(other.changed)
    assert server.files("org/full").keys() == MODEL | {".gitattributes"}


def test_cut_at_any_request_the_repository_is_as_before_and_the_next_attempt_succeeds(
    server, process, folders, tmp_path
):
    write_run(tmp_path / "run", *TINY_R50, steps=(60,))  # which no other test has uploaded
    folder = export(tmp_path / "run", tmp_path / "new", license="mit", name="flowers")
    server.add("org/cut", folders[0])
    old = server.files("org/cut")
    begun = len(server.requests)
    wishes = {"training_state": tmp_path / "run", "revision": "next", "tag": "v2"}
    for number in range(100):
        server.faults[:] = [Fault("status", after=number, status=400)]
        with pytest.raises(
            (ConnectionError, RuntimeError, ValueError), match="answered 400|Invalid metadata|verified from"
        ) as raised:
            process.call(publish, folder, "org/cut", **wishes)
        assert server.files("org/cut") == old and "v2" not in server.repositories["org/cut"].tags
        if "cannot be verified from there" in str(raised.value):
            break
        branch = server.repositories["org/cut"].branches.get("next")
        assert branch is None or server.files("org/cut", "next") == old
    methods = {f"{method} {path.split('/')[-2]}" for method, path in server.requests[begun:]}
    assert (
        number >= 9 and {"POST repos", "POST branch", "POST preupload", "PUT lfs", "POST commit"} <= methods
    )
    server.faults.clear()
    head = server.repositories["org/cut"].branches["next"]
    found = process.call(publish, folder, "org/cut", **wishes)
    assert found.commit == head and found.changed == ()  # the last attempt had committed
    assert server.files("org/cut", "v2").keys() >= MODEL | STATE and server.files("org/cut") == old


def test_when_the_answer_to_the_commit_is_lost_the_next_attempt_finds_it_there(server, process, folders):
    server.faults.append(Fault("close_after", r"/commit/"))
    with pytest.raises(ConnectionError, match="did not answer.*all of this commit or nothing of it"):
        process.call(publish, folders[0], "org/lost")
    assert len(commits(server, "org/lost")) == 2
    assert process.call(publish, folders[0], "org/lost").changed == ()
    assert len(commits(server, "org/lost")) == 2


def test_what_arrives_wrong_from_the_hub_is_not_called_done(server, process, folders):
    server.faults.append(Fault("corrupt", r"resolve/.*model\.safetensors", "GET", times=INF))
    with pytest.raises(RuntimeError, match="(?s)cannot be verified from there.*model.safetensors.*SHA-256"):
        process.call(publish, folders[0], "org/corrupt", tag="v1")
    assert server.repositories["org/corrupt"].tags == {}


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(server, process, folders):
    server.add("org/busy", folders[0])
    busy = server.repositories["org/busy"]

    class Meanwhile(Fault):
        def strikes(self, method, path):
            struck = super().strikes(method, path)
            if struck:
                busy.commit("theirs", busy.find("main").files)
            return struck

    server.faults.append(meanwhile := Meanwhile("stall", r"org/busy/preupload", seconds=0))
    with pytest.raises(RuntimeError, match="Somebody else has committed to 'org/busy'.*Run it again"):
        process.call(publish, folders[1], "org/busy")
    assert meanwhile.hits == 1 and commits(server, "org/busy")[0].title == "theirs"


@pytest.mark.parametrize(("token", "status"), [("hf_read", 403), ("hf_wrong", 401)])
def test_without_the_right_to_write_the_error_says_how_to_log_in(server, process, folders, token, status):
    server.create("org/theirs")
    process.set(HF_TOKEN=token)
    try:
        with pytest.raises(PermissionError, match=f"write to 'org/theirs' .{status}.*`hf auth login`"):
            process.call(publish, folders[0], "org/theirs")
    finally:
        process.set(HF_TOKEN="hf_test")
    assert len(commits(server, "org/theirs")) == 1


def test_a_repository_that_holds_something_else_is_refused(server, process, folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.bin").write_text("theirs")
    server.add("org/other", other)
    with pytest.raises(ValueError, match="'org/other' holds something else: weights.bin.*another --repo"):
        process.call(publish, folders[0], "org/other")
    (other / "mocohub.json").write_text("[]")
    server.add("org/other", other)
    with pytest.raises(
        ValueError, match="'org/other' has a mocohub.json that is none of ours.*another --repo"
    ):
        process.call(publish, folders[0], "org/other")
    manifest = read_json(folders[0] / "mocohub.json")
    for name, value in (("name", "trees"), ("architecture", "resnet18"), ("encoder", "key")):
        write_json(other / "mocohub.json", manifest | {name: value})
        server.add("org/other", other)
        with pytest.raises(ValueError, match=f"another model: its {name} is '{value}'"):
            process.call(publish, folders[0], "org/other")
    assert "model.safetensors" not in server.files("org/other")


def test_a_tag_that_names_another_commit_is_refused_before_anything_is_committed(server, process, folders):
    server.add("org/tagged", folders[0])
    first = server.repositories["org/tagged"].branches["main"]
    server.repositories["org/tagged"].tags["v1"] = first
    with pytest.raises(ValueError, match=f"The tag 'v1' of 'org/tagged' already names commit {first}"):
        process.call(publish, folders[1], "org/tagged", tag="v1")
    assert server.repositories["org/tagged"].branches["main"] == first


def test_a_new_repository_is_private_on_request(server, process, folders):
    server.faults.append(Fault("status", r"/preupload/", status=400))
    with pytest.raises(ConnectionError, match="answered 400"):
        process.call(publish, folders[0], "org/secret", private=True)
    assert server.repositories["org/secret"].private
    server.create("org/open")
    with pytest.raises(ValueError, match="'org/open' is public. Make it private.*or omit private"):
        process.call(publish, folders[0], "org/open", private=True)
    assert len(commits(server, "org/open")) == 1


def test_a_folder_that_fails_a_check_is_refused_without_a_request(folders, tmp_path):
    broken = shutil.copytree(folders[0], tmp_path / "broken")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="(?s)is not published.*FAILED SHA-256 of model.safetensors"):
        publish(broken, "org/broken")
    with pytest.raises(FileNotFoundError, match="'absent' is no folder.*mocohub export"):
        publish("absent", "org/broken")


def test_a_training_state_that_is_not_of_this_encoder_is_refused_without_a_request(runs, folders, tmp_path):
    with pytest.raises(ValueError, match="is of step 40, and .* of step 20 .*was exported from"):
        publish(folders[0], "org/model", training_state=runs)
    with pytest.raises(FileNotFoundError, match="training_state='absent' is no folder"):
        publish(folders[0], "org/model", training_state="absent")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        publish(folders[0], "org/model", training_state=tmp_path)
    checkpoint = shutil.copytree(runs / "checkpoints" / "step-00000020", tmp_path / "damaged")
    with open(checkpoint / "state.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ValueError, match="damaged' is damaged: state.safetensors has SHA-256"):
        publish(folders[0], "org/model", training_state=checkpoint)


@pytest.mark.parametrize(
    ("repo", "names", "message"),
    [
        ("flowers", {}, "'flowers' cannot be a repository on the Hub. Give org/name"),
        ("org/my flowers", {}, "'org/my flowers' cannot be a repository"),
        ("org/flowers", {"tag": "v 1"}, "'v 1' cannot be a tag"),
        ("org/flowers", {"revision": "../main"}, "'../main' cannot be a branch"),
        ("org/flowers", {"tag": "0123456789" * 4}, "cannot be a tag"),
    ],
)
def test_names_the_hub_would_not_take_are_refused(folders, repo, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        publish(folders[0], repo, **names)


def test_offline_nothing_can_be_published(folders, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set. Unset it."):
        publish(folders[0], "org/name")


def script(*arguments):
    return [
        sys.executable,
        str(Path(__file__).parent.parent / "scripts" / "publish.py"),
        *map(str, arguments),
    ]


@pytest.mark.slow  # each attempt is a process of its own, and dies
def test_killed_at_any_request_the_repository_is_as_before_or_as_wanted(
    server, environment, process, runs, folders
):
    server.add("org/killed", folders[0])
    old = server.files("org/killed")
    new = None
    for number in range(100):
        stall = Fault("stall", after=number, seconds=60)
        server.faults[:] = [stall]
        command = script(folders[1], "--repo", "org/killed", "--training-state", runs, "--tag", "v2")
        attempt = subprocess.Popen(command, env=environment, start_new_session=True)
        while not stall.hits and attempt.poll() is None:
            time.sleep(0.02)
        subprocess.run(["kill", "-9", "--", f"-{attempt.pid}"], check=False)
        attempt.wait()
        server.faults.clear()
        if not stall.hits:
            break
        files = server.files("org/killed")
        assert files in (old, new) or new is None
        if files != old and new is None:
            assert (
                files.keys() - {".gitattributes"} == MODEL | STATE and len(commits(server, "org/killed")) == 2
            )
            new = files
    assert number > 20 and new is not None and len(commits(server, "org/killed")) == 2
    assert server.repositories["org/killed"].tags == {
        "v2": server.repositories["org/killed"].branches["main"]
    }


@pytest.mark.slow  # the xet library needs seconds to start and to end
def test_the_xet_protocol_and_uploads_in_parts_publish_as_well(environment, folders, runs, tmp_path):
    pytest.importorskip("hf_xet")
    for xet, multipart in (("0", None), ("1", 100_000)):
        with HubServer(multipart_bytes=multipart) as server:
            changed = {"HF_HUB_DISABLE_XET": xet, "HF_HOME": str(tmp_path / xet)}
            settings = server.environment(tmp_path / xet, **changed)
            command = script(folders[1], "--repo", "org/name", "--training-state", runs)
            done = subprocess.run(command, env=settings, capture_output=True, text=True)
            assert done.returncode == 0 and "verified from the Hub" in done.stdout, done.stderr
            assert (
                server.files("org/name")["model.safetensors"]
                == (folders[1] / "model.safetensors").read_bytes()
            )
            paths = [path for _, path in server.requests]
            assert any("xet-write-token" in path for path in paths) == (xet == "0")
            assert any("/part/2" in path for path in paths) == (xet == "1")
