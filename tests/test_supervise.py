"""The supervisor around real torchruns. The training is a script that takes steps in step with its peers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.images import write_images
from helpers.ranks import free_port

from mocohub.pretrain import supervise as module
from mocohub.pretrain.signals import RESUMABLE, StopRequest
from mocohub.pretrain.supervise import main, supervise

TRAINING = """
import os, signal, sys, time
from pathlib import Path
from mocohub.pretrain.signals import RESUMABLE, StopRequest

out, faults, resume = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[-2:] == ["--resume", "auto"]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
out.mkdir(exist_ok=True)
attempt = os.environ["TORCHELASTIC_RUN_ID"]
mine, stopping = out / f"steps-{attempt}-{rank}", out / f"stop-{attempt}"
(out / "heartbeat").touch()
log = out / "log.jsonl"
start = len(log.read_text().splitlines()) if resume and log.exists() else 0
with StopRequest() as stop:
    for step in range(start, 8):
        fault = faults[len(list(out.glob("fault-*")))] if len(list(out.glob("fault-*"))) < len(faults) else ""
        if fault and rank == world_size - 1 and step == 3:
            (out / f"fault-{time.time()}").touch()
            if fault.isdigit():
                sys.exit(int(fault))
            if fault == "raise":
                raise RuntimeError("as injected")
            os.kill(os.getpid(), getattr(signal, fault))
        if stop.requested:
            stopping.touch()
        mine.write_text(str(step))
        others = [out / f"steps-{attempt}-{other}" for other in range(world_size)]
        while not all(other.exists() and int(other.read_text() or -1) >= step for other in others):
            time.sleep(0.01)
            if stop.requested and time.time() - mine.stat().st_mtime > 2:
                sys.exit("a peer is gone")
        if rank == 0:
            with log.open("a") as file:
                file.write(f"{step}\\n")
        if stopping.exists():  # on all ranks after the same step
            time.sleep(0.3)  # a checkpoint
            sys.exit(RESUMABLE)
        time.sleep(0.02)
"""


@pytest.fixture
def training(tmp_path: Path):
    """A function that supervises the training with faults, one after the other."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)

    def run(faults: str, *, steps_s: float = 0.02, **settings: object) -> int:
        script.write_text(TRAINING.replace("time.sleep(0.02)", f"time.sleep({steps_s})"))
        command = [str(script), str(tmp_path / "run"), faults]
        return supervise(command, tmp_path / "run", **{"backoff_s": 0.1, "hang_timeout_s": 600} | settings)

    return run


def ends(tmp_path: Path) -> list[tuple[int, str]]:
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "run.attempts").iterdir())]
    return [(record["exit_code"], record["reason"]) for record in records]


def steps(tmp_path: Path) -> list[str]:
    return (tmp_path / "run" / "log.jsonl").read_text().splitlines()


def left_over(tmp_path: Path) -> list[str]:
    """Command lines of processes of the training that still live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or belongs to somebody else
            command = (process / "cmdline").read_bytes()
            if os.fsencode(tmp_path / "run") in command and int(process.name) != os.getpid():
                found.append(os.fsdecode(command.replace(b"\0", b" ")))
    return found


def test_a_killed_rank_is_followed_by_a_restart_that_resumes(training, tmp_path: Path) -> None:
    assert training("SIGKILL", nproc_per_node=2) == 0
    assert ends(tmp_path) == [(1, "a process failed"), (0, "done")]
    assert sorted(set(steps(tmp_path))) == [str(i) for i in range(8)]
    assert not left_over(tmp_path)


def test_unusable_input_is_not_tried_again(training, tmp_path: Path) -> None:
    assert training("2") == 2
    assert ends(tmp_path) == [(2, "unusable arguments or input")]


@pytest.mark.slow
def test_ranks_that_die_hang_or_raise_are_all_recovered(training, tmp_path: Path) -> None:
    faults = ["SIGKILL", "SIGSTOP", "raise", "SIGABRT", "1", "SIGSTOP"]
    assert training(",".join(faults), nproc_per_node=2, hang_timeout_s=8, max_restarts=6) == 0
    assert [code for code, _ in ends(tmp_path)] == [1] * 6 + [0]
    assert [reason for _, reason in ends(tmp_path)].count("no progress for 8 s") == 2
    assert not left_over(tmp_path)
    print(f"{len(faults)} of {len(faults)} failed attempts recovered")


@pytest.mark.slow
def test_it_gives_up_after_so_many_failures_within_the_window(training, tmp_path: Path) -> None:
    assert training("1,1,1,1", max_restarts=1) == 1
    assert len(ends(tmp_path)) == 2
    assert training("1,1,1,1", max_restarts=0) == 1, "an earlier launch does not count"
    assert len(ends(tmp_path)) == 3
    assert training("", max_restarts=0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_requested_stop_is_passed_on_and_not_restarted(
    training, tmp_path: Path, number: signal.Signals
) -> None:
    def stop_when_it_runs() -> None:
        while not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_it_runs).start()
    assert training("", nproc_per_node=2, steps_s=1) == RESUMABLE
    assert ends(tmp_path) == [(RESUMABLE, f"stopped by {number.name}")]
    assert not left_over(tmp_path)
    assert training("", nproc_per_node=2) == 0


@pytest.mark.slow
def test_a_job_that_stops_by_itself_is_not_restarted(training, tmp_path: Path) -> None:
    assert training("SIGTERM", nproc_per_node=2) == RESUMABLE
    assert ends(tmp_path) == [(RESUMABLE, "stopped on request")]


@pytest.mark.slow
def test_a_second_interrupt_kills_the_job(training, tmp_path: Path) -> None:
    def interrupt_twice() -> None:
        while not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_twice).start()
    with pytest.raises(KeyboardInterrupt):
        training("", nproc_per_node=2, steps_s=60)
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("faults", ["SIGKILL", "SIGSTOP,raise"])
def test_two_nodes_agree_on_their_attempts(training, tmp_path: Path, faults: str) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as nodes:
        codes = [
            nodes.submit(
                training,
                faults,
                nnodes=2,
                node_rank=node,
                rdzv_endpoint=endpoint,
                hang_timeout_s=15,
                backoff_s=2,
            )
            for node in (1, 0)
        ]
        assert [code.result() for code in codes] == [0, 0]
    assert [code for code, _ in ends(tmp_path)] == [1] * len(faults.split(",")) + [0]
    assert sorted(set(steps(tmp_path))) == [str(i) for i in range(8)]
    assert not left_over(tmp_path)


def test_the_first_node_decides_how_an_attempt_ended(tmp_path: Path) -> None:
    path = tmp_path / "0000.json"
    first = module._agree(path, 0, "done", 1)
    assert (first["exit_code"], first["node_rank"]) == (0, 1)
    assert module._agree(path, 1, "a process failed", 0) == first
    assert [p.name for p in tmp_path.iterdir()] == ["0000.json"]
    assert module._next_attempt(tmp_path) == 1


@pytest.mark.parametrize(
    ("command", "resumed"),
    [
        (["x", "--out", "r"], ["x", "--out", "r", "--resume", "auto"]),
        (["x", "--resume", "never", "--out", "r"], ["x", "--out", "r", "--resume", "auto"]),
        (["x", "--resume=never"], ["x", "--resume", "auto"]),
        (["x", "--resume", "auto"], ["x", "--resume", "auto"]),
    ],
)
def test_restarts_say_resume_auto_once(command: list[str], resumed: list[str]) -> None:
    assert module._resumed(command) == resumed


def test_waiting_ends_with_a_requested_stop() -> None:
    with StopRequest() as stop:
        assert not module._wait(0.01, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        assert module._wait(1000, stop)


def test_nodes_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"nnodes": 2}, r"nnodes \(2\) needs rdzv_endpoint"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, r"node_rank \(2\) must be 0 to nnodes - 1"),
        ({"nproc_per_node": 0}, r"nproc_per_node \(0\) at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            supervise(["x"], tmp_path / "run", **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_a_run_to_watch(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--nproc-per-node", "2", "moco_tiny_digits", "--data", "d"])
    assert error.value.code == 2 and "must name the run: --out RUN" in capsys.readouterr().err


def test_the_script_says_how_it_is_used() -> None:
    script = Path(__file__).parent.parent / "scripts" / "supervise.py"
    out = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "RECIPE --data D --out RUN" in out.stdout


FAKE_SCONTROL = """#!/bin/bash
echo "$@" >> "$FAKE_LOG"
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; fi
"""
# Runs the command once for each node, hands USR1 on, and exits with the highest code, as srun does.
FAKE_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
highest=0
for pid in "${pids[@]}"; do
    while true; do
        code=0
        wait "$pid" || code=$?
        if [ "$code" -ne 138 ]; then break; fi
    done
    if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""


@pytest.fixture
def slurm(tmp_path: Path):
    """A function that starts the batch script as SLURM would on two nodes, here both on this machine."""
    (tmp_path / "bin").mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, content in (("scontrol", FAKE_SCONTROL), ("srun", FAKE_SRUN), ("python", python)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    root = Path(__file__).parent.parent
    facts = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "FAKE_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "OMP_NUM_THREADS": "1",
        "SUPERVISE_OPTIONS": "--backoff-s 1",
    }

    def start(*arguments: str) -> subprocess.Popen:
        script = root / "scripts" / "slurm_pretrain.sh"
        return subprocess.Popen(["bash", script, *arguments], env=os.environ | facts, cwd=root)

    return start


@pytest.mark.slow
def test_the_slurm_script_requeues_a_job_whose_time_is_up_and_only_that(slurm, tmp_path: Path) -> None:
    images, run = write_images(tmp_path / "images", {"a": 9, "b": 9}), tmp_path / "run"
    small = ["global_batch_size=8", "bn_group_size=4", "queue_size=16", "backbone=r18tiny"]
    arguments = ["moco_tiny_digits", "--data", str(images), "--out", str(run), "--device", "cpu"]
    arguments += ["--workers", "0", "--log-every-steps", "1", "--set", *small]
    job = slurm(*arguments, "epochs=40")
    while not (run / "log.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)  # as sbatch --signal=B:USR1@300
    assert job.wait(120) == RESUMABLE
    assert "requeue" in (tmp_path / "scontrol.log").read_text()
    assert list((run / "checkpoints").glob("step-*"))
    (tmp_path / "scontrol.log").unlink()
    assert slurm(*arguments, "epochs=40").wait(300) == 0
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 80
    assert [code for code, _ in ends(tmp_path)] == [RESUMABLE, 0]


def test_the_slurm_script_says_how_it_is_used(slurm) -> None:
    assert slurm().wait() == 2
