"""Whatever goes wrong, the newest complete checkpoint is found, and the run ends with the same bytes."""

import dataclasses
import functools
import json
import math
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.faults import (
    FAIL_FROM_THERE,
    FAIL_ONCE,
    KILL_AFTER,
    KILL_AMID_WRITE,
    KILL_BEFORE,
    at_every_operation,
    fill_disk,
    in_fork,
    with_counted_file_operations,
)
from helpers.images import write_images
from helpers.ranks import run_ranks
from helpers.recipes import smallest
from safetensors.torch import load_file

from mocohub import distributed
from mocohub.files import damage, read_json, write_checksums, write_json
from mocohub.hub.encoders import newest_checkpoint
from mocohub.pretrain import loop
from mocohub.pretrain.build import build
from mocohub.pretrain.checkpoint import CheckpointWriter, restore
from mocohub.pretrain.loop import train
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.signals import RESUMABLE
from mocohub.pretrain.supervise import supervise

CPU = torch.device("cpu")
RECIPE = smallest(epochs=6)
OPTIONS = {
    "num_workers": 0,
    "device": "cpu",
    "precision": "float32",
    "log_every_steps": 1,
    "save_every_steps": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"a": 9, "b": 9})


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(RECIPE, data, tmp_path_factory.mktemp("runs") / "straight", **OPTIONS)


def outcome(run: Path) -> tuple:
    """All that must not depend on what happened on the way: the bytes of the last state, and the log."""
    folder = newest_checkpoint(run)
    facts = read_json(folder / "state.json")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [(row["step"], row["loss"], row["lr"], row["pretext_accuracy"]) for row in rows if "loss" in row]
    return folder.name, facts["sha256"], facts["queue_pointer"], log


def complete(run: Path) -> list[str]:
    """The checkpoints of a run that readers see; all of them must be intact."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert not [f for f in folders if damage(f, "state.json", "state.safetensors")]
    return [folder.name for folder in folders]


# --- a kill, at any moment ---


def killed_often(run: Path, data: Path, num_kills: int, seed: int) -> int:
    """Start the same training again and again, each time with a kill at some step, then let it end."""
    choice, kills = random.Random(seed), 0
    for i in range(num_kills + 1):
        arguments = {"resume": "auto"} | OPTIONS
        training = mp.get_context("fork").Process(target=train, args=(RECIPE, data, run), kwargs=arguments)
        begun, lines = num_lines(run), choice.randrange(3)
        training.start()
        while (
            i < num_kills and training.is_alive() and num_lines(run) not in range(begun + lines, begun + 99)
        ):
            time.sleep(0.002)
        training.join(choice.uniform(0, 0.02) if i < num_kills else None)
        training.kill()
        training.join()
        kills += training.exitcode == -signal.SIGKILL
        assert training.exitcode in (0, -signal.SIGKILL)
    return kills


def num_lines(run: Path) -> int:
    return len((run / "log.jsonl").read_text().splitlines()) if (run / "log.jsonl").exists() else 0


def test_a_training_killed_at_random_times_ends_with_the_same_bytes(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    kills = killed_often(tmp_path / "run", data, 5, seed=0)
    assert kills >= 1  # how many come before the end is a matter of the machine's speed
    assert outcome(tmp_path / "run") == outcome(straight)
    print(f"recovered after {kills} of {kills} kills, with the same bytes")


@pytest.mark.slow
def test_ten_trainings_killed_often_end_with_the_same_bytes(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    expected, kills = outcome(straight), 0
    for seed in range(1, 11):
        run = tmp_path / str(seed)
        kills += killed_often(run, data, 8, seed)
        assert outcome(run) == expected, f"seed {seed}"
    assert kills >= 30
    print(f"10 of 10 trainings ended with the same bytes after {kills} kills")


def each_operation_of_a_save(tmp_path: Path, modes: tuple[int, ...], go_on: bool) -> None:
    torch.set_num_threads(1)
    template, run = tmp_path / "template", tmp_path / "run"
    moco = build(RECIPE, CPU)
    states = {}

    def save(where: Path, *steps: int) -> None:
        with CheckpointWriter(where, recipe=RECIPE, recipe_name="tiny") as writer:
            for step in steps:
                moco.queue.embeddings.fill_(step)
                states[step] = {name: value.clone() for name, value in moco.state_tensors().items()}
                writer.save(moco, step=step, epoch=step)

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)

    save(template, 1, 2)
    states[3] = states[2] | {"queue": torch.full_like(states[2]["queue"], 3)}
    found = []

    def check(code: int) -> None:
        if code == 0:  # there is no middle of it
            return
        assert code == -signal.SIGKILL
        names = complete(run)
        assert names[0] <= "step-00000002" and len(names) in (2, 3), names
        step = restore(run, moco, RECIPE)["step"]
        found.append(step)
        assert all(value.equal(states[step][name]) for name, value in moco.state_tensors().items())
        if go_on:
            save(run, 3)
            assert complete(run) == ["step-00000002", "step-00000003"]
            assert len(list((run / "checkpoints").iterdir())) == 2, "something is left over"

    for mode in modes:
        count = at_every_operation(mode, run, prepare, functools.partial(save, run, 3), check)
        assert count >= 20, f"the faults are not counted: {count}"
    assert set(found) == {2, 3} or KILL_AFTER not in modes
    print(f"{len(found)} of {len(found)} kills left a complete newest checkpoint")


def test_a_kill_after_any_file_operation_of_a_save_leaves_a_complete_newest_checkpoint(
    tmp_path: Path,
) -> None:
    with_counted_file_operations(tmp_path, each_operation_of_a_save, tmp_path, (KILL_AFTER,), False)


@pytest.mark.slow
def test_so_does_a_kill_before_it_or_amid_a_write_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    modes = (KILL_BEFORE, KILL_AFTER, KILL_AMID_WRITE)
    with_counted_file_operations(tmp_path, each_operation_of_a_save, tmp_path, modes, True)


def each_operation_of_a_training(tmp_path: Path, data: Path) -> None:
    torch.set_num_threads(1)
    recipe, run = dataclasses.replace(RECIPE, epochs=1), tmp_path / "runs" / "run"
    run.parent.mkdir()
    go = functools.partial(train, recipe, data, run, resume="auto", **OPTIONS)
    expected = outcome(train(recipe, data, tmp_path / "straight", **OPTIONS))

    def check(code: int) -> None:
        assert code in (0, -signal.SIGKILL)
        go()
        assert outcome(run) == expected
        codes.append(code)

    codes: list[int] = []
    for mode in (KILL_AFTER, KILL_AMID_WRITE):
        prepare = functools.partial(shutil.rmtree, run, ignore_errors=True)
        at_every_operation(mode, run.parent, prepare, go, check)
    kills = codes.count(-signal.SIGKILL)
    print(f"{kills} of {kills} killed trainings ended with the same bytes")


@pytest.mark.slow
def test_a_kill_at_any_file_operation_of_a_training_changes_nothing(data: Path, tmp_path: Path) -> None:
    with_counted_file_operations(tmp_path, each_operation_of_a_training, tmp_path, data)


# --- a disk that is full, or fails ---


def every_failing_operation_of_a_save(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run, moco = tmp_path / "run", build(RECIPE, CPU)

    def save(where: Path, *steps: int) -> None:
        with CheckpointWriter(where, recipe=RECIPE, recipe_name="tiny") as writer:
            for step in steps:
                writer.save(moco, step=step, epoch=step)

    def save_or_say_why() -> None:
        try:
            save(run, 3)
        except OSError as error:
            for part in (str(run / "checkpoints" / "step-00000003"), "It needs", "No space left on device"):
                assert part in str(error), error
            os._exit(3)

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        save(run, 1, 2)

    def check(expected: tuple[int, ...], code: int) -> None:
        assert code in expected
        assert complete(run)[-2:] == ["step-00000002", "step-00000003"] if code == 0 else complete(run)[-1:]
        codes.append(code)

    codes: list[int] = []
    count = at_every_operation(FAIL_ONCE, run, prepare, save_or_say_why, functools.partial(check, (0,)))
    print(f"{count} of {count} operations that failed once were made up for")
    count = at_every_operation(
        FAIL_FROM_THERE, run, prepare, save_or_say_why, functools.partial(check, (0, 3))
    )
    assert codes.count(3) >= 10
    print(f"{count} of {count} disks that failed from then on left the old checkpoints intact")
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "step-00000003").iterdir())
    space = random.Random(0)
    budgets = [0, 1, *(space.randrange(size) for _ in range(28))]
    for budget in budgets:
        prepare()
        assert in_fork(save_or_say_why, functools.partial(fill_disk, run, budget)) == 3, budget
        assert complete(run) == ["step-00000001", "step-00000002"]
        assert len(list((run / "checkpoints").iterdir())) == 2, "temporary files are left"
    assert in_fork(save_or_say_why, functools.partial(fill_disk, run, size)) == 0
    print(f"{len(budgets)} of {len(budgets)} full disks left the old checkpoints intact")


@pytest.mark.slow
def test_a_disk_that_fails_or_is_full_at_any_byte_leaves_the_old_checkpoints_intact(tmp_path: Path) -> None:
    with_counted_file_operations(tmp_path, every_failing_operation_of_a_save, tmp_path)


def test_a_training_on_a_full_disk_ends_with_what_is_missing_and_resumes(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(RECIPE), data, run, **OPTIONS)
    for folder in list((run / "checkpoints").iterdir()):
        shutil.rmtree(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002' cannot be written.*It needs .* MB"):
            train(RECIPE, data, run, resume="auto", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert complete(run) == []
    train(RECIPE, data, run, resume="auto", **OPTIONS)
    assert outcome(run) == outcome(straight)


# --- numbers that are not finite ---


def poisoned(monkeypatch: pytest.MonkeyPatch, where: str, at_step: int, value: float) -> list[MoCo]:
    """Let a number go bad in one step of the training that `train` builds; give that training."""
    built = []

    def build_poisoned(*args: object, **kwargs: object) -> MoCo:
        moco = build(*args, **kwargs)
        built.append(moco)
        calls = []

        def spoil(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
            calls.append(module)
            if len(calls) == at_step + 1:
                if where == "gradient":
                    output.register_hook(lambda gradient: gradient * value)
                    return None
                return torch.cat([output[:1] * value, output[1:]])
            return None

        (moco.key if where == "key" else moco.query).head.register_forward_hook(spoil)
        return moco

    monkeypatch.setattr(loop, "build", build_poisoned)
    return built


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in tensors.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "key"])
def test_a_number_that_is_not_finite_reaches_neither_queue_nor_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    at_step = random.Random(where + str(value)).randrange(1, 8)
    built = poisoned(monkeypatch, where, at_step, value)
    with pytest.raises(
        RuntimeError, match=rf"at step {at_step} \(lr .*\)\. The last good state is the newest"
    ):
        train(RECIPE, data, tmp_path / "run", **OPTIONS)
    assert all_finite(built[0].state_tensors())
    folders = [tmp_path / "run" / "checkpoints" / name for name in complete(tmp_path / "run")]
    assert folders[-1].name == f"step-{at_step:08d}"
    assert all(all_finite(load_file(folder / "state.safetensors")) for folder in folders)


def train_with_a_poisoned_rank(data: Path, out: Path, where: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        built = poisoned(monkeypatch, where, 3 if distributed.rank() else 1000, math.nan)
        with pytest.raises(RuntimeError, match="at step 3"):
            train(RECIPE, data, out, **OPTIONS)
        assert all_finite(built[0].state_tensors())
        built.clear()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient", "key"])
def test_all_ranks_stop_when_the_numbers_of_one_are_not_finite(
    data: Path, tmp_path: Path, where: str
) -> None:
    run_ranks(train_with_a_poisoned_rank, 2, data, tmp_path / "run", where)
    assert complete(tmp_path / "run")[-1] == "step-00000003"
    assert all_finite(load_file(newest_checkpoint(tmp_path / "run") / "state.safetensors"))


# --- wrong resumes ---


def edit_state(run: Path, **changes: object) -> None:
    for folder in (run / "checkpoints").iterdir():
        facts = read_json(folder / "state.json") | changes
        (folder / "SHA256SUMS").unlink()
        write_json(folder / "state.json", facts)
        write_checksums(folder)


def test_a_wrong_resume_is_refused_with_what_differs_and_changes_nothing(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    change = dataclasses.replace
    hue = change(RECIPE.augmentation, hue=0.1)
    renamed = write_images(tmp_path / "renamed", {"a": 9, "c": 9})
    fewer = write_images(tmp_path / "fewer", {"a": 8, "b": 9})
    cases: list[tuple[str, dict, Callable[[Path], None] | None]] = [
        (
            "backbone was 'r18tiny', now 'r50'",
            {"recipe": change(RECIPE, backbone="r50", model_args={})},
            None,
        ),
        ("model_args was", {"recipe": change(RECIPE, model_args={})}, None),
        ("head was 'linear', now 'mlp'", {"recipe": change(RECIPE, head="mlp")}, None),
        ("epochs was 6, now 7", {"recipe": change(RECIPE, epochs=7)}, None),
        ("seed was 0, now 1", {"recipe": change(RECIPE, seed=1)}, None),
        ("queue_size was 16, now 12", {"recipe": change(RECIPE, queue_size=12)}, None),
        ("temperature was", {"recipe": change(RECIPE, temperature=0.5)}, None),
        ("base_lr was", {"recipe": change(RECIPE, base_lr=9.0)}, None),
        ("bn_group_size was 4, now 2", {"recipe": change(RECIPE, bn_group_size=2)}, None),
        ("symmetric was False, now True", {"recipe": change(RECIPE, symmetric=True)}, None),
        ("trained on other images", {"data": renamed}, None),
        ("other images .18 of 'images.*', now 17 of 'fewer'", {"data": fewer}, None),
        ("augmentation.hue was 0.0, now 0.1", {"recipe": change(RECIPE, augmentation=hue)}, None),
        ("format 'mocohub-checkpoint/2'", {}, lambda run: edit_state(run, format="mocohub-checkpoint/2")),
        ("already exists", {"resume": "never"}, None),
        ("run.json", {}, lambda run: (run / "run.json").write_text("{")),
    ]
    for i, (message, arguments, damaged) in enumerate(cases):
        run = tmp_path / f"run{i}"
        shutil.copytree(straight, run)
        if damaged:
            damaged(run)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises((ValueError, FileExistsError), match=message):
            train(**{"recipe": RECIPE, "data": data, "out": run, "resume": "auto"} | OPTIONS | arguments)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, message
    print(f"{len(cases)} of {len(cases)} wrong resumes refused")


# --- signals to the command ---


def command(data: Path, out: Path, *more: str, epochs: int = 6) -> list[str]:
    names = ("global_batch_size", "bn_group_size", "queue_size", "crop_px", "model_args")
    settings = [f"{name}={getattr(RECIPE, name)}".replace(" ", "") for name in names]
    return [
        *("moco_tiny_digits", "--data", str(data), "--out", str(out), "--device", "cpu", "--workers", "0"),
        *("--precision", "float32", "--log-every-steps", "1", "--save-every-steps", "1000", *more),
        *("--set", *settings, f"epochs={epochs}"),
    ]


def start(data: Path, out: Path, *more: str, epochs: int) -> subprocess.Popen:
    """Start the command and return when it has taken a step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mocohub", "pretrain", *command(data, out, *more, epochs=epochs)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def signalled(data: Path, out: Path, number: int, *more: str) -> None:
    process = start(data, out, *more, epochs=100_000)
    os.killpg(process.pid, number)  # as a terminal and a scheduler do: its workers too
    _, errors = process.communicate(timeout=600)
    assert process.returncode == RESUMABLE, errors
    assert f"{signal.Signals(number).name}: saving at the next step" in errors
    assert "--resume auto" in errors and "Traceback" not in errors
    step = read_json(newest_checkpoint(out) / "state.json")["step"]
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert step == last, "no step is lost"


def test_a_request_to_stop_saves_at_the_next_step_and_the_run_resumes(data: Path, tmp_path: Path) -> None:
    signalled(data, tmp_path / "run", signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_so_does_every_such_signal_to_a_training_with_workers(
    data: Path, tmp_path: Path, number: int
) -> None:
    signalled(data, tmp_path / "run", number, "--workers", "2")


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once_and_the_old_checkpoint_is_intact(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(RECIPE, data, out, **OPTIONS)
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    before = complete(out)
    # A step of minutes, in which nothing can be saved: the second interrupt must end it.
    slow = "import time, sys; from mocohub.pretrain import loop; from mocohub.cli import main\n"
    slow += "step = loop.MoCo.step; print('ready', file=sys.stderr, flush=True)\n"
    slow += "loop.MoCo.step = lambda *a: (print('in a step', file=sys.stderr, flush=True), time.sleep(600))\n"
    slow += "sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "pretrain", *command(data, out, "--resume", "auto")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while "in a step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "interrupted" in errors, errors
    assert complete(out) == before


# --- ranks under the supervisor ---


FAULTY = """
import os, signal, sys
from pathlib import Path
from mocohub.cli import main
from mocohub.pretrain import loop
draws = loop.draws
def faulty(recipe, step, num_images):
    fault, flag = os.environ["FAULT"], Path(sys.argv[0] + os.environ["FAULT"])
    if fault and step == 25 and os.environ["RANK"] == "1" and not flag.exists():
        flag.touch()
        if fault == "raise":
            raise RuntimeError("as injected")
        os.kill(os.getpid(), getattr(signal, fault))
    return draws(recipe, step, num_images)
loop.draws = faulty
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_that_die_hang_or_raise_under_the_supervisor_change_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script := tmp_path / "training.py").write_text(FAULTY)
    faults = ("", "SIGKILL", "SIGSTOP", "raise")
    for fault in faults:
        monkeypatch.setenv("FAULT", fault)
        run = tmp_path / f"run{fault}"
        started = [str(script), "pretrain", *command(data, run, "--save-every-steps", "10", epochs=20)]
        assert supervise(started, run, nproc_per_node=2, backoff_s=0.5, hang_timeout_s=20) == 0
        ended = [
            read_json(path)["exit_code"] for path in sorted((tmp_path / f"run{fault}.attempts").iterdir())
        ]
        assert ended == ([1, 0] if fault else [0]), fault
        assert outcome(run) == outcome(tmp_path / "run"), fault
    print(f"{len(faults) - 1} of {len(faults) - 1} faults of a rank recovered, with the same bytes")


RANKS_THAT_END = """
import os, socket, sys
import mocohub.pretrain.loop
from mocohub.cli import main
codes = []
for run in range(20):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(2):
        if (pid := os.fork()) == 0:  # ends as any program does, through sys.exit and all destructors
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.exit(main([word.replace("RUN", str(run)) for word in sys.argv[1:]]))
        pids.append(pid)
    codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
print(f"{codes.count(0)} of {len(codes)} processes ended with exit code 0")
sys.exit(set(codes) != {0})
"""


@pytest.mark.slow
def test_twenty_trainings_on_two_processes_all_end_cleanly(data: Path, tmp_path: Path) -> None:
    arguments = ["pretrain", *command(data, tmp_path / "RUN", epochs=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RANKS_THAT_END, *arguments], env=environment, check=True)
    assert len(list(tmp_path.glob("*/checkpoints/step-00000002"))) == 20
