import dataclasses
import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.images import write_images
from helpers.ranks import run_ranks
from helpers.recipes import smallest
from helpers.shards import make_tar
from safetensors.torch import load_file

from mocohub import distributed
from mocohub.pretrain.build import build
from mocohub.pretrain.loop import train
from mocohub.pretrain.recipe import Recipe
from mocohub.shards import list_shards

RECIPE = smallest(epochs=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"a": 9, "b": 9})


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        RECIPE,
        data,
        tmp_path_factory.mktemp("runs") / "straight",
        num_workers=0,
        precision="float32",
        val=data,
        log_every_steps=1,
        monitor_every_epochs=1,
    )


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000006"
    return load_file(newest / "state.safetensors")


def assert_same_run(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding, which the steps of a network this small multiply a hundredfold; that differs
    from processor to processor, and most in entries near 0. One wrong step is off by more than a tenth."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = torch.linalg.vector_norm(found[name].double() - value.double())
        assert error <= 1e-4 * torch.linalg.vector_norm(value.double()) + 1e-9, name


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_logs_loss_beside_chance_and_knn_beside_chance(straight: Path) -> None:
    steps = [row for row in log(straight) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row["chance_loss"] == math.log(17) and math.isfinite(row["loss"]) for row in steps)
    assert [row["lr"] for row in steps] == [RECIPE.lr(step, 2) for step in range(6)]
    evaluations = [row for row in log(straight) if "knn_accuracy" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    assert all(row["knn_chance"] == 0.5 and 0 <= row["knn_accuracy"] <= 1 for row in evaluations)


def test_a_run_says_what_made_it(straight: Path) -> None:
    facts = json.loads((straight / "run.json").read_text())
    assert facts["format"] == "mocohub-run/1" and facts["recipe_name"] == "custom"
    assert Recipe.from_json(facts["recipe"]) == RECIPE
    assert facts["data"]["num_images"] == 18 and facts["data"]["classes"] == ["a", "b"]
    assert {"mocohub", "torch", "timm", "python"} <= facts["versions"].keys()


def test_the_same_seed_gives_the_same_bytes_and_the_monitor_changes_nothing(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    again = final_state(train(RECIPE, data, tmp_path / "again", num_workers=1, precision="float32"))
    assert all(again[name].equal(value) for name, value in final_state(straight).items())


def test_a_resumed_run_ends_with_the_same_bytes_as_a_straight_one(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(RECIPE, data, run, num_workers=0, precision="float32", log_every_steps=1)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train(RECIPE, data, run, num_workers=0, precision="float32", resume="auto", log_every_steps=1)
    resumed = final_state(run)
    assert all(resumed[name].equal(value) for name, value in final_state(straight).items())
    assert [row["step"] for row in log(run)] == [1, 2, 3, 4, 5, 6]
    assert log(run)[-1]["loss"] == log(straight)[-2]["loss"]


def test_a_run_killed_before_its_first_checkpoint_keeps_its_recipe(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(RECIPE, epochs=1), data, run, num_workers=0)
    shutil.rmtree(run / "checkpoints")
    (run / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')  # cut by the kill
    with pytest.raises(ValueError, match="epochs was 1, now 3"):
        train(RECIPE, data, run, num_workers=0, resume="auto")
    train(dataclasses.replace(RECIPE, epochs=1), data, run, num_workers=0, resume="auto", log_every_steps=1)
    assert [row["step"] for row in log(run)] == [1, 2]


def train_on_ranks(data: Path, out: Path, micro_batch_size: int | None = None, resume: str = "never") -> None:
    recipe = RECIPE if micro_batch_size is None else dataclasses.replace(RECIPE, bn_group_size=2)
    train(
        recipe,
        data,
        out,
        num_workers=0,
        device="cpu",
        precision="float32",
        micro_batch_size=micro_batch_size,
        resume=resume,
    )


def test_micro_batches_on_two_processes_train_the_run_of_one(data: Path, tmp_path: Path) -> None:
    run_ranks(train_on_ranks, 2, data, tmp_path / "two", 2)
    train_on_ranks(data, tmp_path / "one", 8)
    assert_same_run(final_state(tmp_path / "two"), final_state(tmp_path / "one"))


def test_a_run_goes_on_with_another_number_of_processes(straight: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(train_on_ranks, 2, data, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train_on_ranks(data, run, resume="auto")
    assert_same_run(final_state(run), final_state(straight))


def data_of_rank(first: Path, second: Path, out: Path) -> None:
    with pytest.raises(RuntimeError, match="do not start alike; this one starts at step 0"):
        train_on_ranks(second if distributed.rank() else first, out)
    assert not out.exists()


def test_ranks_that_see_other_images_stop_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", {"a": 9, "c": 9})
    run_ranks(data_of_rank, 2, data, other, tmp_path / "run")


def test_two_processes_train_the_run_that_one_process_trains(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    run_ranks(train_on_ranks, 2, data, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe_name"] == "custom"
    assert_same_run(final_state(tmp_path / "run"), final_state(straight))


def test_torchrun_starts_the_script_and_ends_cleanly(straight: Path, data: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "pretrain.py"
    settings = [
        f"{name}={getattr(RECIPE, name)}" for name in ("global_batch_size", "bn_group_size", "queue_size")
    ]
    settings += ["crop_px=16", "epochs=3", f"model_args={RECIPE.model_args}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [
        "moco_tiny_digits",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    command += ["--precision", "float32", "--set", *settings]
    out = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert_same_run(final_state(tmp_path / "run"), final_state(straight))


def test_micro_batches_train_the_same_run(straight: Path, data: Path, tmp_path: Path) -> None:
    run = train(RECIPE, data, tmp_path / "run", num_workers=0, precision="float32", micro_batch_size=4)
    assert_same_run(final_state(run), final_state(straight))


def test_bfloat16_trains(data: Path, tmp_path: Path) -> None:
    run = train(
        dataclasses.replace(RECIPE, epochs=1), data, tmp_path / "run", num_workers=0, precision="bfloat16"
    )
    assert math.isfinite(log(run)[-1]["loss"])


def test_both_encoders_start_with_the_same_weights_and_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    moco = build(RECIPE, torch.device("cpu"))
    torch.manual_seed(4)
    again = build(RECIPE, torch.device("cpu"))
    first, second = moco.state_tensors(), again.state_tensors()
    assert all(first[name].equal(second[name]) for name in first)
    assert all(first[name].equal(first[name.replace("query.", "key.")]) for name in first)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one = write_images(tmp_path / "one", {"a": 1})
    broken = write_images(tmp_path / "broken", {"a": 20})
    for file in broken.rglob("*.png"):
        file.write_bytes(b"junk")
    flat = write_images(tmp_path / "flat", {".": 20})
    partly = tmp_path / "partly.csv"
    rows = [f"{path},{'a' if i else ''}" for i, path in enumerate(sorted(data.rglob("*.png")))]
    partly.write_text("\n".join(["path,label", *rows]))
    out = tmp_path / "out"
    cases = [
        (FileNotFoundError, "nowhere", dict(data=tmp_path / "nowhere")),
        (ValueError, "empty", dict(data=tmp_path / "empty")),
        (ValueError, "1 image is fewer than one batch", dict(data=one)),
        (ValueError, r"None of 16 images tried can be decoded: .*\.png", dict(data=broken)),
        (ValueError, r"queue_size \(64\)", dict(recipe=dataclasses.replace(RECIPE, queue_size=64))),
        (ValueError, r"bn_group_size \(3\)", dict(recipe=dataclasses.replace(RECIPE, bn_group_size=3))),
        (ValueError, "Unknown recipe 'moco_r51", dict(recipe="moco_r51")),
        (ValueError, "Unknown backbone 'r51'", dict(recipe=dataclasses.replace(RECIPE, backbone="r51"))),
        (ValueError, "precision 'half'", dict(precision="half")),
        (ValueError, "Unknown resume 'yes'", dict(resume="yes")),
        (ValueError, "keep_checkpoints", dict(keep_checkpoints=1)),
        (ValueError, "kNN monitor .* needs a label for every", dict(val=flat)),
        (ValueError, "kNN monitor .* needs a label for every", dict(data=partly, val=data)),
        (ValueError, r"save_every_epochs \(0\) must be at least 1", dict(save_every_epochs=0)),
        (ValueError, r"num_workers \(-1\) must be at least 0", dict(num_workers=-1)),
        (TypeError, "layer", dict(recipe=dataclasses.replace(RECIPE, model_args={"layer": [1]}))),
    ]
    for error, message, change in cases:
        with pytest.raises(error, match=message):
            train(**{"recipe": RECIPE, "data": data, "out": out, "num_workers": 0} | change)
        assert not out.exists(), message


def test_an_existing_run_is_neither_overwritten_nor_continued_unasked(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match="continue that run with --resume auto"):
        train(RECIPE, data, straight)
    other = write_images(tmp_path / "other", {"a": 10, "c": 10})
    with pytest.raises(ValueError, match="trained on other images"):
        train(RECIPE, other, straight, resume="auto")
    with pytest.raises(ValueError, match="another recipe: epochs was 3, now 4"):
        train(dataclasses.replace(RECIPE, epochs=4), data, straight, resume="auto")


def test_a_few_broken_images_are_listed_and_many_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images", {"a": 40})
    (images / "a" / "0007.png").write_bytes(b"junk")
    caplog.set_level(logging.WARNING)
    run = train(RECIPE, images, tmp_path / "run", num_workers=0)
    rows = [json.loads(line) for line in (run / "errors.jsonl").read_text().splitlines()]
    assert {(row["id"], row["path"]) for row in rows} == {(7, "a/0007.png")}
    for i in range(10, 20):
        (images / "a" / f"00{i}.png").write_bytes(b"junk")
    with pytest.raises(RuntimeError, match=r"images cannot be decoded, more than 10 %"):
        train(RECIPE, images, tmp_path / "run2", num_workers=0)


def test_a_loss_that_explodes_ends_the_run_and_names_the_last_good_state(data: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(RECIPE, base_lr=1e30, epochs=5)
    with pytest.raises(RuntimeError, match=r"loss is nan at step \d+ \(lr 1e\+30\).*checkpoints"):
        train(wild, data, tmp_path / "run", num_workers=0)


VARIANTS = {
    "end_to_end": {"mechanism": "end_to_end"},
    "memory_bank": {"mechanism": "memory_bank"},
    "nce": {"mechanism": "memory_bank", "loss": "nce"},
    "symmetric": {"symmetric": True},
    "mlp_steps": {"head": "mlp", "steps": 5},
}


def train_variants(
    data: Path, out: Path, resume: str = "never", names: Sequence[str] = tuple(VARIANTS)
) -> None:
    for name in names:
        recipe = dataclasses.replace(RECIPE, **VARIANTS[name])
        options = dict(num_workers=0, device="cpu", precision="float32", log_every_steps=1)
        train(recipe, data, out / name, resume=resume, save_every_steps=1, keep_checkpoints=9, **options)


@pytest.fixture(scope="module")
def variants(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("variants")
    train_variants(data, out)
    return out


def newest_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors")


def forget_after(run: Path, step: int) -> None:
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_mechanism_resumes_in_mid_epoch_to_the_same_bytes(
    name: str, variants: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(variants / name, tmp_path / name)
    forget_after(tmp_path / name, 3)
    train_variants(data, tmp_path, resume="auto", names=[name])
    expected, resumed = newest_state(variants / name), newest_state(tmp_path / name)
    assert resumed.keys() == expected.keys()
    assert all(resumed[key].equal(value) for key, value in expected.items())
    assert log(tmp_path / name)[-1]["loss"] == log(variants / name)[-1]["loss"]


def test_each_mechanism_keeps_its_own_state(variants: Path) -> None:
    def kinds(name: str) -> set[str]:
        return {key.split(".")[0] for key in newest_state(variants / name)}

    assert kinds("end_to_end") == {"query", "key", "sgd_momentum"}
    assert kinds("memory_bank") == kinds("nce") == {"query", "bank", "sgd_momentum"}
    assert kinds("symmetric") == {"query", "key", "queue", "sgd_momentum"}
    assert newest_state(variants / "nce")["bank"].shape == (18, 128)
    facts = json.loads((variants / "nce/checkpoints/step-00000006/state.json").read_text())
    assert facts["nce_constant"] > 0
    assert not (variants / "mlp_steps/checkpoints/step-00000006").exists()  # 5 steps, in mid-epoch


def train_and_resume_variants(data: Path, out: Path) -> None:
    train_variants(data, out / "new")
    train_variants(data, out / "begun", "auto")


def test_two_processes_train_every_mechanism_as_one_does(variants: Path, data: Path, tmp_path: Path) -> None:
    # Each step from the same state: those of a network this small multiply what the ones before have rounded.
    shutil.copytree(variants, tmp_path / "begun")
    for name in VARIANTS:
        forget_after(tmp_path / "begun" / name, 4)
    run_ranks(train_and_resume_variants, 2, data, tmp_path)
    for name in VARIANTS:
        for out, step in (("new", "step-00000001"), ("begun", "step-00000005")):
            file = Path(name, "checkpoints", step, "state.safetensors")
            assert_same_run(load_file(tmp_path / out / file), load_file(variants / file))


def test_a_run_goes_on_with_1_2_4_and_1_processes(variants: Path, data: Path, tmp_path: Path) -> None:
    recipe_of_groups_of_2 = {"elastic": {"bn_group_size": 2}}
    VARIANTS.update(recipe_of_groups_of_2)
    try:
        train_variants(data, tmp_path / "straight", names=["elastic"])
        train_variants(data, tmp_path / "run", names=["elastic"])
        for processes, after in ((2, 1), (4, 3), (1, 5)):
            forget_after(tmp_path / "run/elastic", after)
            if processes > 1:
                run_ranks(_elastic, processes, data, tmp_path / "run")
            else:
                train_variants(data, tmp_path / "run", "auto", ["elastic"])
    finally:
        VARIANTS.pop("elastic")
    assert_same_run(newest_state(tmp_path / "run/elastic"), newest_state(tmp_path / "straight/elastic"))
    losses = [[row["loss"] for row in log(tmp_path / name / "elastic")] for name in ("straight", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def _elastic(data: Path, out: Path) -> None:
    VARIANTS["elastic"] = {"bn_group_size": 2}
    train_variants(data, out, "auto", ["elastic"])


def test_views_finished_on_the_device_train_almost_the_same_run(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    options = dict(num_workers=0, precision="float32", log_every_steps=1)
    run = train(RECIPE, data, tmp_path / "run", augment_on="device", **options)
    first = [log(path)[0]["loss"] for path in (straight, run)]
    assert first[1] == pytest.approx(first[0], rel=0.05) and first[1] != first[0]


@pytest.fixture(scope="module")
def tars(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, files = tmp_path_factory.mktemp("tars"), sorted(data.rglob("*.png"))
    for n in range(4):
        make_tar(folder / f"part-{n}.tar", {f"{n}-{f.name}": f.read_bytes() for f in files[n::4]})
    return folder


STREAM_OPTIONS = {"num_lanes": 2, "buffer_images": 6}


def train_stream(tars: Path, out: Path, resume: str = "never") -> None:
    recipe = dataclasses.replace(RECIPE, steps=6, lr_schedule="cosine")
    options = dict(num_workers=0, device="cpu", precision="float32", log_every_steps=1, save_every_steps=1)
    shards = list_shards(tars)
    assert shards.num_images is None
    train(recipe, shards, out, resume=resume, stream_options=STREAM_OPTIONS, keep_checkpoints=9, **options)


def test_a_stream_of_unknown_length_trains_and_resumes_on_any_number_of_processes(
    tars: Path, tmp_path: Path
) -> None:
    train_stream(tars, tmp_path / "straight")
    assert [row["epoch"] for row in log(tmp_path / "straight")] == [None] * 6
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    forget_after(tmp_path / "resumed", 3)
    train_stream(tars, tmp_path / "resumed", resume="auto")
    expected, resumed = final_state(tmp_path / "straight"), final_state(tmp_path / "resumed")
    assert all(resumed[name].equal(value) for name, value in expected.items())
    forget_after(tmp_path / "resumed", 2)
    run_ranks(train_stream, 2, tars, tmp_path / "resumed", "auto")
    assert_same_run(final_state(tmp_path / "resumed"), expected)
