import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers.images import write_images

from mocohub.cli import VERBS, main
from mocohub.features.store import Features
from mocohub.hub.load import load
from mocohub.pretrain.recipes import RECIPES

TINY = [
    "queue_size=16",
    "global_batch_size=8",
    "bn_group_size=4",
    "epochs=1",
    "model_args={'layers': [1, 1, 1, 1], 'stem_chs': 8, 'channels': [8, 8, 8, 8]}",
]


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out + err


def test_the_whole_line_runs_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_images(tmp_path / "train", {"a": 12, "b": 12})
    val = write_images(tmp_path / "val", {"a": 4, "b": 4}, seed=1)
    r, m, f = tmp_path / "run", tmp_path / "model", tmp_path / "features"
    numbers = tmp_path / "numbers.json"
    line = [
        [
            "pretrain",
            "moco_tiny_digits",
            "--data",
            train,
            "--val",
            val,
            "--out",
            r,
            "--workers",
            0,
            "--set",
            *TINY,
        ],
        ["extract", r, "--data", train, "--out", f / "train", "--workers", 0],
        ["extract", r, "--data", val, "--out", f / "val", "--workers", 0],
        ["knn", f / "train", f / "val", "--k", 5, "--json", numbers],
        ["linear", f / "train", f / "val", "--json", numbers],
        ["linear", f / "train", f / "val", "--solver", "sgd", "--epochs", 5, "--json", numbers],
        ["export", r, "--out", m, "--license", "apache-2.0", "--probes", numbers],
    ]
    for command in line:
        code, text = run(capsys, *command)
        assert code == 0, text
    records = json.loads(numbers.read_text())
    assert [record["protocol"].split(",")[0] for record in records] == [
        "weighted kNN",
        "logistic regression",
        "linear",
    ]
    assert all(record["num_images"] == 8 and 0 <= record["value"] <= 100 for record in records)
    card = (m / "README.md").read_text()
    assert "weighted kNN, cosine, k = 5" in card and "license: apache-2.0" in card
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(load(m)(images), load(r)(images))
    assert len(Features.open(f / "train")) == 24
    for path, kind in ((r, "run"), (m, "export"), (f / "val", "features")):
        code, text = run(capsys, "inspect", path)
        assert code == 0 and text.startswith("kind") and kind in text.splitlines()[0]


def test_inspect_tells_an_official_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = torchvision.models.resnet18(num_classes=128)
    state = {f"module.encoder_{e}.{name}": v for e in "qk" for name, v in net.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    file = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, file)
    code, text = run(capsys, "inspect", file)
    assert code == 0 and "official" in text and "r18" in text and "200" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretran"], "Unknown verb 'pretran'. Choose one of: pretrain, "),
        (["info", "moco_r50_in1k"], "Unknown model or recipe 'moco_r50_in1k'. Choose one of: moco_r50_in1m"),
        (["pretrain", "moco_r50", "--data", "x", "--out", "y"], "Unknown recipe 'moco_r50'. .*moco_r50_in1m"),
        (["pretrain", "moco_r50_in1m", "--data", "x", "--out", "y", "--set", "epoch=1"], "field 'epoch'"),
        (["pretrain", "moco_r50_in1m", "--data", "nowhere", "--out", "y"], "'nowhere' does not exist"),
        (["extract", "nowhere.pth", "--data", ".", "--out", "y"], "No images in '.'"),
        (["knn", "nowhere", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "'nowhere' does not exist"),
        (
            ["export", "nowhere", "--out", "y", "--license", "apache-2"],
            "Unknown license 'apache-2'.*apache-2.0",
        ),
        (["demo", "--data", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_what_cannot_be_used_exits_with_2_and_says_why(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run(capsys, *args)
    assert code == 2
    assert re.search(message, text), text
    assert not any(tmp_path.iterdir())


def test_an_output_folder_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", {"a": 30})
    for verb in (["pretrain", "moco_tiny_digits"], ["extract", "nowhere"], ["demo"]):
        code, text = run(
            capsys,
            *verb,
            "--data",
            images,
            "--out",
            images,
            *(["--set", *TINY] if "extract" not in verb else []),
        )
        assert code == 2 and "already exists" in text, verb


def test_a_failure_while_running_exits_with_1_and_names_the_last_good_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", {"a": 30})
    wild = [*TINY, "base_lr=1e30", "epochs=3"]
    out = tmp_path / "run"
    code, text = run(
        capsys, "pretrain", "moco_tiny_digits", "--data", images, "--out", out, "--workers", 0, "--set", *wild
    )
    assert code == 1 and "last good state" in text


def test_features_of_two_models_are_not_probed_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, sha in (("train", "1"), ("val", "2")):
        features = Features(
            np.ones((2, 3), np.float32), [0, 1], ["x", "y"], [0, 1], ["a", "b"], meta={"model": {"s": sha}}
        )
        features.save(tmp_path / name)
    code, text = run(capsys, "knn", tmp_path / "train", tmp_path / "val")
    assert code == 2 and "not comparable" in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_documents_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([verb, "--help"])
    assert exit_info.value.code == 0
    function = VERBS[verb]
    names = [name for name in function.__annotations__ if name != "return"]
    documented = function.__doc__.partition("Args:")[2]
    assert all(f"{name}:" in documented for name in names)


def test_help_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys; from mocohub.cli import main; main(['list']); main(['info', 'mocov2_r50_in1m']); "
        "assert not {'torch', 'timm', 'sklearn', 'numpy', 'matplotlib'} & {*sys.modules}"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert all(name in out.stdout for name in RECIPES)
    assert "arXiv 2003.04297" in out.stdout and "temperature         0.2" in out.stdout


def test_scripts_take_the_verbs_arguments() -> None:
    scripts = Path(__file__).parent.parent / "scripts"
    out = subprocess.run([sys.executable, scripts / "knn.py", "--help"], capture_output=True, text=True)
    assert out.returncode == 0 and "--temperature" in out.stdout
    assert len(list(scripts.glob("*.py"))) >= 5
