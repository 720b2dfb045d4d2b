import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mocohub.pretrain.sinks import check_sinks, open_sinks

FACTS = {"recipe_name": "moco_r50_in1m", "recipe": {"queue_size": 65536}}
ROWS = [
    {"step": 10, "epoch": 0.5, "loss": 7.5, "images_per_s": 400.0},
    {"step": 20, "epoch": 1.0, "loss": 6.25, "images_per_s": 410.5},
    {"step": 20, "epoch": 1.0, "knn_accuracy": 0.25, "knn_chance": 0.125},
]


def log(names: list[str], out: Path, rows: list[dict], start_step: int = 0) -> None:
    sinks = open_sinks(names, out, FACTS, start_step)
    for row in rows:
        for sink in sinks:
            sink.log(row)
    for sink in sinks:
        sink.close()


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }


def test_tensorboard_reads_back_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log(["tensorboard"], tmp_path, [*ROWS, {"step": 30, "epoch": None, "loss": 6.0, "note": "text"}])
    assert curves(tmp_path) == {
        "epoch": [(10, 0.5), (20, 1.0), (20, 1.0)],
        "loss": [(10, 7.5), (20, 6.25), (30, 6.0)],
        "images_per_s": [(10, 400.0), (20, 410.5)],
        "knn_accuracy": [(20, 0.25)],
        "knn_chance": [(20, 0.125)],
    }


def test_steps_taken_again_after_a_resume_replace_the_old_ones_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log(["tensorboard"], tmp_path, [{"step": step, "loss": 8.0} for step in (10, 20, 30)])
    log(["tensorboard"], tmp_path, [{"step": step, "loss": 7.0} for step in (25, 30)], start_step=20)
    assert curves(tmp_path)["loss"] == [(10, 8.0), (20, 8.0), (25, 7.0), (30, 7.0)]


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
from mocohub.pretrain.sinks import open_sinks

logging.basicConfig(format="%(message)s")
(sink,) = open_sinks(["tensorboard"], Path(sys.argv[1]), {}, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # writing more is an OSError, as on a full disk
for step in range(1, 1001):
    sink.log({"step": step, "loss": 1.0})
sink.close()
print("trained to the end")
"""


def test_a_sink_that_fails_while_training_warns_once_and_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.stdout == "trained to the end\n", out.stderr
    # TensorBoard's thread prints at the same time, so the warning may stand in the middle of a line.
    warning = (
        r"Logging to tensorboard failed and is off from here \(OSError: .*The run goes on; see log.jsonl."
    )
    assert len(re.findall(warning, out.stderr)) == 1, out.stderr


def test_a_sink_that_cannot_be_opened_is_an_error_before_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(RuntimeError, match="Logging to tensorboard cannot start: .*Train without it"):
        open_sinks(["tensorboard"], tmp_path, FACTS, 0)


def test_an_unknown_sink_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="Unknown log sink 'tensorbord'. Choose one of: tensorboard, wandb"):
        check_sinks(["tensorbord"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf"Logging to {name} needs {name}: pip install 'mocohub\[{name}\]'"
    ):
        check_sinks([name])


def test_without_sinks_nothing_is_opened(tmp_path: Path) -> None:
    check_sinks([])
    assert open_sinks([], tmp_path, FACTS, 0) == []
    assert not list(tmp_path.iterdir())


WANDB = """
import json, sys
from pathlib import Path
from mocohub.pretrain.sinks import check_sinks, open_sinks

out, rows, start_step = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
check_sinks(["wandb"])
(sink,) = open_sinks(["wandb"], out, {"recipe": {"queue_size": 65536}}, start_step)
for row in rows:
    sink.log(row)
sink.close()
"""


def run_wandb(out: Path, rows: str, start_step: int = 0, **variables: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    # A home without settings, and nobody listening: whatever would go out fails.
    environment = clean | {"HOME": str(out), "WANDB_BASE_URL": "http://127.0.0.1:9", **variables}
    command = [sys.executable, "-c", WANDB, str(out), rows, str(start_step)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
    )


def wandb_records(folder: Path) -> list:
    """Read a .wandb file: 7 bytes, then records of checksum (4 bytes), length (2), kind (1) and message."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, records = file.read_bytes()[7:], []
    while len(data) >= 7:
        length, kind = struct.unpack("<HB", data[4:7])
        assert kind == 1  # whole; these files are shorter than the block at which records are split
        records.append(Record.FromString(data[7 : 7 + length]))
        data = data[7 + length :]
    return records


def test_weights_and_biases_offline_holds_every_number_and_goes_on_as_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for rows, start_step in ((ROWS, 0), ([{"step": 30, "loss": 6.0}], 20)):
        out = run_wandb(tmp_path, json.dumps(rows), start_step, WANDB_MODE="offline")
        assert out.returncode == 0, out.stderr
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    logged = []
    for folder in folders:
        for record in wandb_records(folder):
            if record.HasField("history"):
                items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                logged.append({name: value for name, value in items.items() if name[0] != "_"})
    assert logged == [*ROWS, {"step": 30, "loss": 6.0}]
    run_id = (tmp_path / "wandb-id.txt").read_text().strip()
    assert {folder.name.rpartition("-")[2] for folder in folders} == {run_id}


def test_weights_and_biases_without_a_login_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = run_wandb(tmp_path, "[]")
    assert out.returncode == 1
    assert "RuntimeError: Logging to wandb cannot start: No API key" in out.stderr
    assert "Run `wandb login`, set WANDB_MODE=offline, or train without it" in out.stderr
    assert not (tmp_path / "wandb-id.txt").exists()
