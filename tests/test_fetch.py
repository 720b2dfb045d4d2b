"""Faults of the Hub, the network and the cache: a real server, and clients in processes of their own."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.hub_server import Fault, HubServer

from mocohub.files import sha256, write_json
from mocohub.hub import verified, web
from mocohub.hub.verified import sha256_once, stated_sha256

INF = float("inf")
ASK, WEIGHTS, CONFIG, MANIFEST = (
    "/api/models/REPOSITORY",
    "REPOSITORY/resolve/.*/model.safetensors",
    "REPOSITORY/resolve/.*/config.json",
    "REPOSITORY/resolve/.*/mocohub.json",
)

# Answers one call a line. Nothing of torch is imported, so that a client starts in half a second.
CLIENT = """
import json, sys, time
from pathlib import Path
from huggingface_hub import constants
from mocohub.hub import fetch, web
assert "torch" not in sys.modules
for line in sys.stdin:
    call = json.loads(line)
    web.PATIENCE_S = fetch.PATIENCE_S = call.pop("patience_s", 60.0)
    web.TIMEOUT_S = fetch.TIMEOUT_S = call.pop("timeout_s", 60.0)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = fetch.TIMEOUT_S
    begun = time.monotonic()
    try:
        if "url" in call:
            answer = {"path": str(web.download(call["url"], Path(call["folder"]), md5=call["md5"]))}
        else:
            answer = {"path": str(fetch.snapshot(**call))}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer | {"seconds": time.monotonic() - begun}), flush=True)
"""


class Client:
    """A process that calls `snapshot` and `download`; only of what a parent sets before it starts."""

    def __init__(self, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def send(self, **call):
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()

    def receive(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def call(self, **call):
        self.send(**call)
        return self.receive()

    def close(self):
        self.process.kill()
        self.process.communicate()


def write_model(folder, seed=0):
    """Files of an exported folder, as far as fetching looks into them; weights large enough for a note."""
    folder.mkdir()
    data = hashlib.shake_128(str(seed).encode()).digest(200_000)
    (folder / "model.safetensors").write_bytes(data)
    write_json(folder / "config.json", {"architecture": "resnet50", "seed": seed})
    stated = {name: sha256(folder / name) for name in ("model.safetensors", "config.json")}
    write_json(folder / "mocohub.json", {"format": "mocohub-export/1", "sha256": stated})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [write_model(root / f"model{seed}", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(server, home):
    client = Client(server.environment(home))
    yield client
    client.close()


@pytest.fixture
def repository(server, models, request):
    """A repository of its own for each test: nothing of it is in the cache."""
    name = "lab/" + hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    server.add(name, models[0], "v1.0")
    yield name
    server.faults.clear()


def same(folder, model):
    return all((Path(folder) / file.name).read_bytes() == file.read_bytes() for file in model.iterdir())


def cached(home, repository):
    """Every file of a repository in the cache of the Hub's client."""
    root = home / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    return [p for p in root.rglob("*") if p.is_file() and not {"refs", ".no_exist", "trees"} & {*p.parts}]


TRANSIENT = {
    "the question answered 500": Fault("status", ASK, status=500),
    "the question answered 502": Fault("status", ASK, status=502),
    "the question answered 503, twice": Fault("status", ASK, times=2),
    "the question answered 504": Fault("status", ASK, status=504),
    "too many questions": Fault("status", ASK, status=429, headers={"Retry-After": "1"}),
    "the question never answered": Fault("stall", ASK, seconds=600),
    "the question cut": Fault("close", ASK),
    "the answer cut": Fault("cut", ASK),
    "metadata answered 503": Fault("status", WEIGHTS, "HEAD", status=503),
    "metadata answered 429": Fault("status", WEIGHTS, "HEAD", status=429, headers={"Retry-After": "1"}),
    "metadata never answered": Fault("stall", WEIGHTS, "HEAD", seconds=600),
    "metadata cut": Fault("close", WEIGHTS, "HEAD"),
    "weights answered 500": Fault("status", WEIGHTS, "GET", status=500),
    "weights answered 503, twice": Fault("status", WEIGHTS, "GET", times=2),
    "weights answered 429": Fault("status", WEIGHTS, "GET", status=429, headers={"Retry-After": "1"}),
    "weights never answered": Fault("stall", WEIGHTS, "GET", seconds=600),
    "weights cut": Fault("cut", WEIGHTS, "GET"),
    "weights one byte short": Fault("short", WEIGHTS, "GET"),
    "weights refused by hanging up": Fault("close", WEIGHTS, "GET"),
    "one bit of the weights flipped": Fault("corrupt", WEIGHTS, "GET"),
    "one bit of the configuration flipped": Fault("corrupt", CONFIG, "GET"),
    "one bit of the manifest flipped": Fault("corrupt", MANIFEST, "GET"),
    "the weights under another's hash": Fault("wrong_etag", WEIGHTS, times=2),
}


LASTING = {
    "down": (Fault("status", ASK, times=INF), "ConnectionError", "answered 503 when asked for '"),
    "too busy": (
        Fault("status", ASK, times=INF, status=429, headers={"Retry-After": "3600"}),
        "ConnectionError",
        "answered 429 .*Try again in 3600 s",
    ),
    "too busy for the metadata": (
        Fault("status", WEIGHTS, "HEAD", times=INF, status=429, headers={"Retry-After": "3600"}),
        "ConnectionError",
        "answered 429 when asked for model.safetensors of '.*Try again in 3600 s",
    ),
    "too busy for the weights": (
        Fault("status", WEIGHTS, "GET", times=INF, status=429, headers={"Retry-After": "3600"}),
        "ConnectionError",
        "answered 429 when asked for model.safetensors of '.*Try again in 3600 s",
    ),
    "silent": (Fault("stall", ASK, times=INF), "ConnectionError", "ReadTimeout.*offline=True"),
    "hanging up": (Fault("close", WEIGHTS, times=INF), "ConnectionError", "did not give model.safetensors"),
    "not a Hub": (Fault("status", ASK, status=200), "ConnectionError", "HF_ENDPOINT"),
    "circles": (Fault("redirect_loop", ASK, times=INF), "ConnectionError", "round in circles"),
    "circles for the weights": (
        Fault("redirect_loop", WEIGHTS, times=INF),
        "ConnectionError",
        "sends model.safetensors of '.* round in circles",
    ),
    "unknown user": (
        Fault("status", ASK, times=INF, status=401),
        "FileNotFoundError",
        r"has no '.*' \(401\).*hf auth login",
    ),
    "unknown user for the weights": (
        Fault("status", WEIGHTS, times=INF, status=401),
        "FileNotFoundError",
        r"has no model.safetensors of '.*' \(401\).*hf auth login",
    ),
    "forbidden": (
        Fault("status", ASK, times=INF, status=403),
        "PermissionError",
        r"refuses '.*' \(403\). Log in with `hf auth login`",
    ),
    "terms not accepted": (
        Fault("status", WEIGHTS, times=INF, status=403, headers={"X-Error-Code": "GatedRepo"}),
        "PermissionError",
        r"refuses model.safetensors of .*accept them on its page",
    ),
    "weights gone": (
        Fault("status", WEIGHTS, times=INF, status=404, headers={"X-Error-Code": "EntryNotFound"}),
        "FileNotFoundError",
        r"has no model.safetensors of '.*' \(404\)",
    ),
    "weights always flipped": (
        Fault("corrupt", WEIGHTS, "GET", times=INF),
        "RuntimeError",
        r"model.safetensors of .* arrived wrong twice from http://127.0.0.1:\d+: it has SHA-256 \w{64}, the",
    ),
    "configuration always flipped": (
        Fault("corrupt", CONFIG, "GET", times=INF),
        "RuntimeError",
        r"config.json of '.*' arrived wrong twice .* it has Git's SHA-1",
    ),
    "weights always under another's hash": (
        Fault("wrong_etag", WEIGHTS, times=INF),
        "RuntimeError",
        "model.safetensors of '.*' arrived wrong twice .* the Hub says 0000",
    ),
}


@pytest.fixture(scope="module")
def answers(server, models, home):
    """What a client was answered under each fault: (repository, fault, answer). Six at a time: they wait."""
    cases = [(name, fault, 60) for name, fault in TRANSIENT.items()]
    cases += [(name, fault, 2) for name, (fault, _, _) in LASTING.items()]
    left = iter([*enumerate(cases)])  # shared: a thread takes the next one in one step
    answered = {}

    def work():
        client = Client(server.environment(home))
        for number, (name, fault, patience_s) in left:
            repository = f"lab/fault{number}"
            server.add(repository, models[0])
            server.faults.append(fault := on(fault, repository))
            waits = {"patience_s": patience_s, "timeout_s": timeout_s(fault)}
            answered[name] = (repository, fault, client.call(repository=repository, **waits))
        client.close()

    with ThreadPoolExecutor() as threads:
        for future in [threads.submit(work) for _ in range(6)]:
            future.result()
    server.faults.clear()
    return answered


def timeout_s(fault):
    """Short where an answer is waited for that does not come: on a busy machine others may take long."""
    return 1 if fault and fault.kind == "stall" else 60


def on(fault, repository):
    return dataclasses.replace(fault, path=fault.path.replace("REPOSITORY", repository + r"\b"))


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_fault_that_passes_costs_time_only(name, answers, models, home):
    repository, fault, answer = answers[name]
    assert fault.hits >= 1
    assert "path" in answer, answer
    assert same(answer["path"], models[0])
    assert answer["seconds"] < 300  # and not the 600 of a server that stalls
    assert len(cached(home, repository)) == 6  # three files and their three names: nothing wrong is left


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_stays_is_named_with_its_host_and_the_remedy(name, server, answers, home):
    _, error, message = LASTING[name]
    repository, _, answer = answers[name]
    assert answer.get("error") == error, answer
    assert re.search(message, answer["message"]), answer["message"]
    assert server.endpoint in answer["message"]
    assert answer["seconds"] < 300  # and not the 3600 that a server asks for
    wrong = "config.json" if "configuration" in name else "model.safetensors"
    assert wrong not in [path.name for path in cached(home, repository)]
    large = [path for path in cached(home, repository) if len(path.name) == 64]
    assert [path.name for path in large] == [sha256(path) for path in large]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault("status", "", times=INF), Fault("stall", "", times=INF)])
def test_with_the_real_patience_a_load_gives_up_within_a_minute(fault, server, home, repository):
    fresh = Client(server.environment(home))
    server.faults.append(fault)
    begun = time.monotonic()
    answer = fresh.call(repository=repository, patience_s=web.PATIENCE_S, timeout_s=0.7)
    assert answer["error"] == "ConnectionError"
    assert 20 < time.monotonic() - begun < 60
    fresh.close()


@pytest.mark.parametrize("endpoint", ["http://no-such-host.invalid", "http://127.0.0.1:1"])
def test_a_host_that_cannot_be_reached_is_named_at_once(endpoint, server, tmp_path):
    client = Client(server.environment(tmp_path, HF_ENDPOINT=endpoint))
    answer = client.call(repository="lab/flowers", patience_s=600)
    client.close()
    assert answer["error"] == "ConnectionError"
    assert answer["message"].startswith(f"{endpoint} did not give 'lab/flowers' (ConnectError: ")
    assert "offline=True" in answer["message"]
    assert answer["seconds"] < 300  # some resolvers need half a minute to say no; that is not asked again


def test_nothing_is_asked_for_a_commit_that_is_in_the_cache(server, client, repository, models):
    commit = server.add(repository, models[0])
    first = client.call(repository=repository)
    server.requests.clear()
    assert client.call(repository=repository, revision=commit)["path"] == first["path"]
    assert server.requests == []


def test_that_a_commit_has_no_manifest_is_asked_once(server, client, repository, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "plain")
    (tmp_path / "plain" / "mocohub.json").unlink()
    commit = server.add(repository, tmp_path / "plain")
    first = client.call(repository=repository, revision=commit)
    assert sorted(os.listdir(first["path"])) == ["config.json", "model.safetensors"]
    server.requests.clear()
    assert client.call(repository=repository, revision=commit)["path"] == first["path"]
    assert server.requests == []


def test_weights_without_a_manifest_must_be_what_the_hub_says(server, client, repository, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "plain")
    (tmp_path / "plain" / "mocohub.json").unlink()
    server.add(repository, tmp_path / "plain")
    server.faults.append(on(Fault("corrupt", WEIGHTS, "GET", times=INF), repository))
    answer = client.call(repository=repository)
    assert re.search(r"arrived wrong twice .* it has SHA-256 \w{64}, the Hub says \w{64}", answer["message"])


def test_a_branch_is_resolved_once_and_everything_comes_from_that_commit(server, client, repository, models):
    before = client.call(repository=repository)
    newer = server.add(repository, models[1])
    server.requests.clear()
    answer = client.call(repository=repository)
    assert Path(answer["path"]).name == newer != Path(before["path"]).name
    assert same(answer["path"], models[1])
    assert [path for _, path in server.requests if path.startswith("/api/")] == [f"/api/models/{repository}"]
    asked = {path.split("/resolve/")[1].split("/")[0] for _, path in server.requests if "/resolve/" in path}
    assert asked == {newer}
    assert same(client.call(repository=repository, revision="v1.0")["path"], models[0])


def test_offline_takes_branch_tag_and_commit_from_the_cache(server, client, repository, models):
    commit = Path(client.call(repository=repository)["path"]).name
    client.call(repository=repository, revision="v1.0")
    server.requests.clear()
    for revision in (None, "v1.0", commit):
        assert same(client.call(repository=repository, revision=revision, offline=True)["path"], models[0])
    assert server.requests == []


def test_offline_without_a_cached_copy_says_how_to_get_one(client, repository, server):
    for revision in (None, "v1.0", "0" * 40):
        answer = client.call(repository=repository, revision=revision, offline=True)
        assert answer["error"] == "FileNotFoundError"
        assert f"hf download {repository}" in answer["message"]
    assert not [path for _, path in server.requests if repository in path]


def test_the_clients_own_offline_mode_counts(server, client, repository, models, home):
    client.call(repository=repository)
    offline = Client(server.environment(home, HF_HUB_OFFLINE="1"))
    server.requests.clear()
    assert same(offline.call(repository=repository)["path"], models[0])
    assert server.requests == []
    offline.close()


def test_while_the_hub_is_down_the_cached_commit_is_used(server, client, repository, models):
    client.call(repository=repository)
    server.faults.append(on(Fault("status", ASK, times=INF), repository))
    assert same(client.call(repository=repository, patience_s=1)["path"], models[0])


def test_a_bit_that_flips_in_the_cache_is_fetched_again(server, client, repository, models):
    folder = Path(client.call(repository=repository)["path"])
    commit = folder.name
    flip(folder / "model.safetensors")
    assert same(client.call(repository=repository, revision=commit)["path"], models[0])


def test_a_bit_that_flips_in_the_cache_offline_is_refused_and_removed(server, client, repository, home):
    folder = Path(client.call(repository=repository)["path"])
    flip(folder / "model.safetensors")
    answer = client.call(repository=repository, offline=True)
    assert answer["error"] == "RuntimeError"
    assert "in the cache is damaged: it has SHA-256" in answer["message"]
    assert "model.safetensors" not in [path.name for path in cached(home, repository)]


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_content_from_another_host_is_fetched_without_the_token(models, tmp_path):
    with HubServer(cdn=True) as server:
        server.add("lab/private", models[0], private=True)
        client = Client(server.environment(tmp_path))
        assert same(client.call(repository="lab/private")["path"], models[0])
        client.close()
        hosts = {host.split(":")[0]: token for host, token in server.tokens_seen}
    assert hosts == {"127.0.0.1": "hf_test", "localhost": None}


def test_files_in_folders_are_fetched_by_pattern(server, client, repository, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "model")
    shutil.copytree(models[1], tmp_path / "model" / "training-state")
    server.add(repository, tmp_path / "model")
    folder = Path(client.call(repository=repository, patterns=["training-state/*"])["path"])
    assert os.listdir(folder) == ["training-state"]
    assert same(folder / "training-state", models[1])


def test_a_repository_cannot_name_files_outside_of_itself(server, client, models, home):
    server.add("lab/escape", models[0])
    commit = server.repositories["lab/escape"].find("main")
    commit.files["training-state/../../../../../escaped"] = commit.files["config.json"]
    answer = client.call(repository="lab/escape", patterns=["training-state/*"])
    assert answer["error"] == "ValueError"
    assert "names a file outside of it: 'training-state/../" in answer["message"]
    assert not cached(home, "lab/escape")


@pytest.mark.parametrize("revision", ["../../../etc", "/etc/passwd"])
def test_a_revision_cannot_be_a_path(client, revision):
    answer = client.call(repository="lab/flowers", revision=revision)
    assert answer["error"] == "ValueError"
    assert f"'{revision}' cannot be a revision. Give a branch" in answer["message"]


def test_a_revision_that_does_not_exist_is_named(client, repository):
    answer = client.call(repository=repository, revision="v9")
    assert answer["error"] == "ValueError"
    assert f"has no '{repository}' at revision 'v9'. Give a branch, a tag" in answer["message"]


def test_a_manifest_without_hashes_is_refused(server, client, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "model")
    write_json(tmp_path / "model" / "mocohub.json", {"format": "mocohub-export/1"})
    server.add("lab/nohash", tmp_path / "model")
    answer = client.call(repository="lab/nohash")
    assert answer["error"] == "ValueError"
    assert "does not state the SHA-256 of model.safetensors" in answer["message"]


def test_a_repository_that_contradicts_itself_is_refused(server, client, models, tmp_path, home):
    shutil.copytree(models[0], tmp_path / "model")
    shutil.copy(models[1] / "model.safetensors", tmp_path / "model")
    server.add("lab/mixed", tmp_path / "model")
    answer = client.call(repository="lab/mixed")
    assert answer["error"] == "RuntimeError"
    assert re.search(r"it has SHA-256 \w{64}, mocohub.json says \w{64}.*tell its owner", answer["message"])
    assert "model.safetensors" not in [path.name for path in cached(home, "lab/mixed")]


def gets(server, pattern):
    return len([path for method, path in server.requests if method == "GET" and re.search(pattern, path)])


@pytest.mark.parametrize("num", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_processes_that_start_at_once_download_once_though_one_is_killed(num, server, models, tmp_path):
    server.add("lab/crowd", models[0])
    stall = on(Fault("stall", WEIGHTS, "GET", seconds=600), "lab/crowd")
    server.faults.append(stall)
    clients = [Client(server.environment(tmp_path)) for _ in range(num)]
    clients[0].send(repository="lab/crowd", timeout_s=600)
    while not stall.hits:
        time.sleep(0.01)
    for client in clients[1:]:
        client.send(repository="lab/crowd")
    time.sleep(0.5)
    (left,) = (tmp_path / "hf").rglob("*.incomplete")
    os.utime(left, (0, 0))  # as if nobody had written to it for long
    clients[0].process.send_signal(signal.SIGKILL)  # amid its download, with the lock
    answers = [client.receive() for client in clients[1:]]
    assert all(same(answer["path"], models[0]) for answer in answers)
    assert gets(server, "lab/crowd/resolve/.*safetensors") == 2  # one for the dead, one for all others
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    for client in clients:
        client.close()
    server.faults.clear()


@pytest.mark.parametrize("num", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_where_locks_lie_everybody_still_gets_the_right_bytes(num, server, models, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "lie.c").write_text("int flock(int fd, int operation) { return 0; }")
    library = tmp_path / "lie.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "lie.c", "-o", library], check=True)
    server.add("lab/liars", models[0])
    server.requests.clear()
    lying = server.environment(tmp_path, LD_PRELOAD=str(library))
    clients = [Client(lying) for _ in range(num)]
    for client in clients:
        client.send(repository="lab/liars")
    answers = [client.receive() for client in clients]
    for client in clients:
        client.close()
    assert all(same(answer["path"], models[0]) for answer in answers), answers
    assert 1 <= gets(server, "lab/liars/resolve/.*safetensors") <= num
    assert len(cached(tmp_path, "lab/liars")) == 6
    assert not list(tmp_path.rglob("*.incomplete"))


PLAIN = {
    "none": None,
    "cut": Fault("cut", "/files/", "GET"),
    "cut twice": Fault("cut", "/files/", "GET", times=2),
    "short": Fault("short", "/files/", "GET"),
    "503": Fault("status", "/files/", "GET"),
    "stall": Fault("stall", "/files/", "GET", seconds=600),
    "flipped": Fault("corrupt", "/files/", "GET"),
}


@pytest.fixture
def plain(server, tmp_path):
    """A file of a server that is no Hub: (its URL, its path, its MD5)."""
    folder = tmp_path / "served"
    folder.mkdir()
    file = folder / "weights.pth.tar"
    file.write_bytes(hashlib.shake_128(b"authors").digest(500_000))
    server.serve("/files", folder)
    yield f"{server.endpoint}/files/weights.pth.tar", file, hashlib.md5(file.read_bytes()).hexdigest()
    server.faults.clear()


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_file_arrives_whole_whatever_happens_once(name, server, client, plain, tmp_path):
    url, file, md5 = plain
    server.faults.extend([PLAIN[name]] if PLAIN[name] else [])
    answer = client.call(url=url, folder=str(tmp_path), md5=md5[:8], timeout_s=timeout_s(PLAIN[name]))
    assert Path(answer["path"]).read_bytes() == file.read_bytes()
    assert PLAIN[name] is None or PLAIN[name].hits


def test_a_plain_file_with_another_md5_is_refused_and_removed(server, client, plain, tmp_path):
    answer = client.call(url=plain[0], folder=str(tmp_path), md5="b251726a")
    assert answer["error"] == "RuntimeError"
    assert (
        f"{plain[0]} arrived twice with MD5 {plain[2]}, and its authors state b251726a" in answer["message"]
    )
    assert not (tmp_path / "weights.pth.tar").exists()


def test_a_plain_file_that_is_not_there_is_named(server, client, plain, tmp_path):
    answer = client.call(url=plain[0].replace("weights", "other"), folder=str(tmp_path), md5="")
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith(f"{server.endpoint} has no other.pth.tar (404)")


def test_an_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOHUB_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(bytes(100_000))
    digest = hashlib.sha256(bytes(100_000)).hexdigest()
    assert sha256_once(file) == digest
    notes = tmp_path / "cache" / "verified.json"
    notes.write_text(notes.read_text().replace(digest, "noted"))  # what a second computation would not say
    assert sha256_once(file) == "noted"
    file.write_bytes(bytes(100_000))  # the same bytes, but it was touched
    assert sha256_once(file) == digest
    os.utime(file, ns=(0, 0))
    notes.write_text(notes.read_text().replace(digest, "noted"))
    assert sha256_once(file) == digest


def test_notes_of_files_that_are_gone_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOHUB_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(100_000))
        sha256_once(tmp_path / name)
        (tmp_path / "a").unlink(missing_ok=True)
    notes = json.loads((tmp_path / "cache" / "verified.json").read_text())
    assert list(notes) == [str(tmp_path / "b")]


@pytest.mark.parametrize("notes", ["[]", "{", '{"x": 1}', '{"x": []}'])
def test_notes_that_make_no_sense_are_computed_again(notes, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCOHUB_CACHE", str(tmp_path))
    (tmp_path / "verified.json").write_text(notes)
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert sha256_once(tmp_path / "file") == hashlib.sha256(bytes(100_000)).hexdigest()
    assert list(json.loads((tmp_path / "verified.json").read_text())) == [str(tmp_path / "file")]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(100_000))
    monkeypatch.setenv("MOCOHUB_CACHE", str(tmp_path / "file"))
    assert sha256_once(tmp_path / "file") == hashlib.sha256(bytes(100_000)).hexdigest()


def test_the_cache_stands_where_the_user_has_caches(monkeypatch):
    monkeypatch.delenv("MOCOHUB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert verified.cache_folder() == Path("/var/caches/mocohub")
    monkeypatch.setenv("MOCOHUB_CACHE", "~/models")
    assert verified.cache_folder() == Path.home() / "models"


@pytest.mark.parametrize("content", [[], {}, {"sha256": []}, {"sha256": {"model.safetensors": 1}}])
def test_a_manifest_must_state_the_hash_of_the_weights(content, tmp_path):
    write_json(tmp_path / "mocohub.json", content)
    with pytest.raises(ValueError, match="does not state the SHA-256 of model.safetensors"):
        stated_sha256(tmp_path)
