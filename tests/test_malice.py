"""What strangers made never runs code, writes or asks elsewhere when it is opened: it is refused, clearly.

One process opens the whole corpus of `helpers.malice` with every public reader under an audit hook; the tests
then look at what it saw.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import TINY_R50, HubServer, TorchvisionResNet, randomise, write_official, write_run
from helpers.malice import ATTACKS, Site
from helpers.malice_corpus import write

from mocohub.files import sha256
from mocohub.hub.export import export

ACCEPTED = {"ValueError", "RuntimeError", "FileNotFoundError"}
PACKAGE = str(Path(sys.modules["mocohub"].__file__).parent)


# Name -> what the error must say, None if the model may load.
ON_THE_HUB = {
    "our-lab/pickles": "model.safetensors",
    "our-lab/class-path": "evil.Network",
    "our-lab/code": None,
    "our-lab/outside": None,  # names that lead out of it are not among those that are asked for
    "moco_r50_in1m": "MD5",
}


def listing(folder):
    """What is in a folder: hashes of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = str(path.readlink()) if path.is_symlink() else sha256(path) if path.is_file() else "other"
        found[str(path)] = kind
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(attack, reader) -> what happened; the folders before and after; the Hub's requests; peak memory."""
    root = tmp_path_factory.mktemp("malice")
    write_run(root / "run", *TINY_R50)
    model = export(root / "run", root / "model", license="mit")
    query, key = (randomise(TorchvisionResNet(64, (8, 16, 32, 64)), seed) for seed in (1, 2))
    write_official(root / "moco.pth", query, key)
    tensors = torch.load(root / "moco.pth", weights_only=True)["state_dict"]
    paths = write(Site(root, model, root / "run", tensors))
    before = listing(root)
    (root / "work").mkdir()
    tasks = {"root": str(root), "model": str(model), "run": str(root / "run")}
    tasks["attacks"] = [[attack.name, str(paths[attack.name]), attack.readers] for attack in ATTACKS]
    tasks["attacks"] += [[name, name, ["load by name"]] for name in ON_THE_HUB]
    tasks["attacks"] += [["control", str(paths["bare pickle of protocol 4"]), ["fall for everything"]]]
    (root / "work" / "tasks.json").write_text(json.dumps(tasks))
    with HubServer() as server:
        fill(server, root, model, paths)
        ran = subprocess.run(
            [sys.executable, "-m", "helpers.malice_readers", "tasks.json", "answers.json"],
            cwd=root / "work",
            env=server.environment(
                root / "work",
                PYTHONPATH=str(Path(__file__).parent),
                PYTHONDONTWRITEBYTECODE="1",
                TMPDIR=str(root / "work"),
            ),
            capture_output=True,
            text=True,
            timeout=600,
        )
        requests = list(server.requests)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads((root / "work" / "answers.json").read_text())
    answers = {(a["attack"], a["reader"]): a for a in report["answers"]}
    after = {path: kind for path, kind in listing(root).items() if "/work" not in path}
    return answers, (before, after), requests, report["peak_bytes"]


def fill(server, root, model, paths):
    """Put on the server what ON_THE_HUB names."""
    for name, attack in (
        ("our-lab/pickles", "pickle instead of safetensors"),
        ("our-lab/class-path", "architecture is a class path"),
        ("our-lab/code", "code by auto_map"),
    ):
        server.add(name, paths[attack])
    server.add("our-lab/outside", model)
    repository = server.repositories["our-lab/outside"]
    bad = server.storage.add_bytes("x.json", b"{}")
    names = ("../../../../../../canaries/config.json", str(root / "canaries" / "mocohub.json"))
    repository.commit("Upload", {**repository.find("main").files, **dict.fromkeys(names, bad)})
    authors = root / "work" / "authors"
    authors.mkdir()
    pickled = paths["pickle beside good tensors"].read_bytes()
    (authors / "moco_v1_200ep_pretrain.pth.tar").write_bytes(pickled)
    server.serve("/moco/moco_checkpoints/moco_v1_200ep", authors)


def cases(attack, seen):
    return {reader: seen[0][attack.name, reader] for reader in attack.readers}


def test_the_corpus_is_large_and_every_case_was_tried(seen):
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40
    assert len(seen[0]) == sum(len(attack.readers) for attack in ATTACKS) + len(ON_THE_HUB) + 1 >= 400


def test_the_watch_sees_a_reader_without_care(seen):
    case = seen[0]["control", "fall for everything"]
    assert case["canaries"] == ["bare_pickle_of_protocol_4", "import evil"]
    found = {event.split(":")[0] for event in case["events"]}
    calls = {"open", "os.remove", "subprocess.Popen", "exec", "compile", "import", "socket.connect"}
    assert found == calls | {"pickle.find_class"}
    assert len([event for event in case["events"] if event.startswith("open")]) == 4


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_no_payload_runs_or_reaches_out(attack, seen):
    for reader, case in cases(attack, seen).items():
        assert case["canaries"] == [], reader
        assert case["events"] == [], reader


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_it_is_refused_by_an_error_of_ours_that_names_what_is_wrong(attack, seen):
    for reader, case in cases(attack, seen).items():
        what = f"{reader}: {case['type']}: {case['message']} (from {case['raised_in']})"
        if case["outcome"] == "answered":
            assert reader in attack.harmless_to, reader
            continue
        assert ACCEPTED & set(case["bases"]), what
        assert case["raised_in"].startswith(PACKAGE) or reader == "verify", what
        named = (attack.name.replace(" ", "_"), attack.path, "evil")  # the file, or the name in it
        assert any(name in case["message"] for name in named), what
        assert len(case["message"]) < 4000 and "weights_only=False" not in case["message"], what
        assert case["seconds"] < 10, what  # of processor time


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_of_a_malicious_repository_only_safe_files_are_asked_for(name, seen):
    case = seen[0][name, "load by name"]
    assert case["canaries"] == case["events"] == []
    if (reason := ON_THE_HUB[name]) is None:
        assert case["outcome"] == "answered", case["message"]
    else:
        assert case["outcome"] == "refused" and ACCEPTED & set(case["bases"])
        assert reason in case["message"], case["message"]
    files = {path.rsplit("/", 1)[1] for _, path in seen[2] if f"/{name}/resolve/" in path}
    assert files <= {"config.json", "mocohub.json", "model.safetensors"}


def test_nothing_is_written_beside_the_outputs(seen):
    before, after = seen[1]
    assert after == before


def test_nothing_is_published(seen):
    assert {method for method, _ in seen[2]} <= {"GET", "HEAD"}


def test_a_few_bytes_cannot_claim_much_memory(seen):
    assert seen[3] < 3 << 30
