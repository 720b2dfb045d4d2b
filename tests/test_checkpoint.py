import dataclasses
import json
import math
import resource
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from helpers.recipes import smallest
from safetensors.torch import load_file

from mocohub.files import write_checksums, write_json
from mocohub.hub.encoders import newest_checkpoint
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.build import build
from mocohub.pretrain.checkpoint import CheckpointWriter, restore
from mocohub.pretrain.data import Batch
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.randomness import draws
from mocohub.pretrain.recipe import Recipe

CPU = torch.device("cpu")
RECIPE = smallest(epochs=40)


def trained(steps: int = 2, recipe: Recipe = RECIPE) -> MoCo:
    moco = build(recipe, CPU, num_images=8)
    for step in range(steps):
        pixels = torch.randint(
            256, (2, 8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
        )
        batch = Batch(torch.arange(8), Crops(pixels[0], None), Crops(pixels[1], None), [])
        moco.step(batch, draws(recipe, step, num_images=8))
    return moco


def writer(run: Path, recipe: Recipe = RECIPE, **settings: object) -> CheckpointWriter:
    return CheckpointWriter(run, recipe=recipe, recipe_name="tiny", **settings)


def save(run: Path, moco: MoCo, step: int, **settings: object) -> Path:
    with writer(run, **settings) as checkpoints:
        checkpoints.save(moco, step=step, epoch=1)
    return run / "checkpoints" / f"step-{step:08d}"


def state(moco: MoCo) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in moco.state_tensors().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("mechanism", ["queue", "end_to_end", "memory_bank"])
def test_restoring_brings_back_every_tensor_and_fact(tmp_path: Path, mechanism: str) -> None:
    recipe = dataclasses.replace(RECIPE, mechanism=mechanism)
    moco = trained(3, recipe)
    save(tmp_path, moco, 3, recipe=recipe)
    fresh = build(dataclasses.replace(recipe, seed=5), CPU, num_images=8)
    assert not same(state(fresh), state(moco))
    assert restore(tmp_path, fresh, recipe)["step"] == 3
    assert same(state(fresh), state(moco))
    assert fresh.state_facts() == moco.state_facts()


def test_the_files_name_the_tensors_and_the_facts(tmp_path: Path) -> None:
    facts = {"versions": {"torch": "2.15"}, "commit": "abc"}
    with writer(tmp_path, facts=facts) as checkpoints:
        checkpoints.save(
            trained(1),
            step=1,
            epoch=0,
            metrics={"loss": 2.5, "knn_accuracy": math.nan},
            data_position={"shard": 3, "sample": 7},
        )
    folder = tmp_path / "checkpoints" / "step-00000001"
    tensors = load_file(folder / "state.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"query", "key", "queue", "sgd_momentum"}
    assert tensors["queue"].shape == (16, 128)
    saved = json.loads((folder / "state.json").read_text())
    assert (saved["format"], saved["step"], saved["queue_pointer"]) == ("mocohub-checkpoint/1", 1, 8)
    assert saved["num_images_seen"] == 8 and saved["recipe_name"] == "tiny"
    assert Recipe.from_json(saved["recipe"]) == RECIPE
    assert saved["metrics"] == {"loss": 2.5, "knn_accuracy": None}
    assert facts.items() <= saved.items()
    restored = restore(tmp_path, trained(0), RECIPE)
    assert restored["data_position"] == {"shard": 3, "sample": 7}


def test_the_standard_tool_verifies_a_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(1), 1)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    out = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert out == "state.json: OK\nstate.safetensors: OK\n"


def test_the_state_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    moco = trained(1)
    expected, metrics = state(moco), {"loss": 1.0}
    with writer(tmp_path) as checkpoints:
        checkpoints._thread.submit(release := threading.Event().wait)  # keeps the thread from starting
        checkpoints.save(moco, step=1, epoch=1, metrics=metrics)
        for value in moco.state_tensors().values():
            value.zero_()
        metrics["loss"] = 9.0
        assert newest_checkpoint(tmp_path) is None, "reported before it is on disk"
        release.__self__.set()
    fresh = trained(0)
    assert restore(tmp_path, fresh, RECIPE)["metrics"] == {"loss": 1.0}
    assert same(state(fresh), expected)


def test_only_the_newest_and_every_nth_checkpoint_stay(tmp_path: Path) -> None:
    moco = trained(1)
    with writer(tmp_path, keep=2, keep_every_steps=4) as checkpoints:
        for step in range(1, 12):
            checkpoints.save(moco, step=step, epoch=step)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 10, 11)]


def test_damaged_checkpoints_do_not_count_as_kept_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, trained(1), step, keep=3)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    save(tmp_path, trained(1), 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000001.x.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes of the user").mkdir()
    save(tmp_path, trained(1), 2)
    assert names(tmp_path) == ["notes of the user", "step-00000002"]


def test_every_flipped_bit_and_every_cut_is_detected_and_the_checkpoint_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, trained(1), 1)
    newest = save(tmp_path, trained(2), 2)
    fresh, expected, detected, random = trained(0), state(trained(1)), 0, torch.Generator().manual_seed(0)
    cases = []
    for file in sorted(newest.iterdir()):
        size = file.stat().st_size
        offsets = [0, size - 1, *torch.randint(size, (6,), generator=random).tolist()]
        cases += [(file, how, offset) for how in ("flip", "cut") for offset in offsets]
        cases += [(file, "append", size)]
    cases += [(newest / "state.json", "remove", 0), (newest / "state.safetensors", "remove", 0)]
    for file, how, offset in cases:
        content = file.read_bytes()
        if how == "flip":
            flipped = bytearray(content)
            flipped[offset] ^= 1 << offset % 8
            file.write_bytes(flipped)
        elif how == "cut":
            file.write_bytes(content[:offset])
        elif how == "append":
            file.write_bytes(content + b"\n")
        else:
            file.unlink()
        caplog.clear()
        assert restore(tmp_path, fresh, RECIPE)["step"] == 1, (file.name, how, offset)
        assert same(state(fresh), expected)
        assert "step-00000002' is damaged" in caplog.text
        detected += 1
        file.write_bytes(content)
    assert restore(tmp_path, fresh, RECIPE)["step"] == 2
    print(f"{detected} of {len(cases)} damages detected")


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_there_again(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(1), 1)
    (folder / "state.safetensors").write_bytes(b"")
    save(tmp_path, trained(1), 1)
    assert names(tmp_path) == ["step-00000001"]
    assert restore(tmp_path, trained(0), RECIPE)["step"] == 1


def test_an_intact_checkpoint_of_the_same_step_is_left_as_it_is(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(1), 1)
    before = folder.stat().st_ino
    save(tmp_path, trained(1), 1)
    assert folder.stat().st_ino == before


def test_without_an_intact_checkpoint_nothing_is_resumed_silently(tmp_path: Path) -> None:
    assert restore(tmp_path, trained(0), RECIPE) is None
    (save(tmp_path, trained(1), 1) / "state.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="No checkpoint of run .* is intact: step-00000001"):
        restore(tmp_path, trained(0), RECIPE)


def rewrite(folder: Path, **changes: object) -> None:
    facts = json.loads((folder / "state.json").read_text()) | changes
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    write_json(folder / "state.json", facts)
    write_checksums(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.2}, r"another recipe: temperature was 0.07, now 0.2\. Resume with"),
        ({"seed": 3, "epochs": 7}, r"epochs was \d+, now 7; seed was 0, now 3"),
        ({"queue_size": 32}, "queue_size was 16, now 32"),
        ({"global_batch_size": 16}, "global_batch_size was 8, now 16"),
        ({"bn_group_size": 2}, "bn_group_size was 4, now 2"),
        ({"mechanism": "end_to_end"}, "mechanism was 'queue', now 'end_to_end'"),
        ({"model_args": {}}, r"model_args was \{'layers'.*now \{\}"),
        (
            {"augmentation": dataclasses.replace(RECIPE.augmentation, hue=0.3)},
            "augmentation.hue was .*, now 0.3",
        ),
    ],
)
def test_another_recipe_is_refused_and_the_differing_fields_named(
    tmp_path: Path, change: dict, message: str
) -> None:
    save(tmp_path, trained(1), 1)
    moco = trained(0)
    before = state(moco)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, moco, dataclasses.replace(RECIPE, **change))
    assert same(state(moco), before)


def test_a_newer_format_is_refused_by_its_name(tmp_path: Path) -> None:
    rewrite(save(tmp_path, trained(1), 1), format="mocohub-checkpoint/9")
    with pytest.raises(
        ValueError, match="of format 'mocohub-checkpoint/9': this resumes .*version of mocohub"
    ):
        restore(tmp_path, trained(0), RECIPE)


@pytest.mark.parametrize("recipe", [None, []])
def test_a_checkpoint_without_a_recipe_is_refused(tmp_path: Path, recipe: object) -> None:
    rewrite(save(tmp_path, trained(1), 1), recipe=recipe)
    with pytest.raises(ValueError, match=r"state\.json' states no recipe"):
        restore(tmp_path, trained(0), RECIPE)


def test_another_network_under_the_same_recipe_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save(tmp_path, trained(1), 1)
    wider = build(dataclasses.replace(RECIPE, embed_dim=64), CPU, num_images=8)
    before = state(wider)
    with pytest.raises(ValueError, match=r"tensors differ, the first is '.*head.*saved.*wanted"):
        restore(tmp_path, wider, RECIPE)
    assert same(state(wider), before)


def test_a_checkpoint_written_before_there_were_these_fields_still_loads(tmp_path: Path) -> None:
    moco = trained(2)
    folder = save(tmp_path, moco, 2)
    (folder / "SHA256SUMS").unlink()
    now = json.loads((folder / "state.json").read_text())
    new_fields = {"mechanism", "loss", "symmetric", "shuffle_bn", "bank_momentum", "steps"}
    recipe = {name: value for name, value in now["recipe"].items() if name not in new_fields}
    fields = ("format", "step", "epoch", "num_images_seen", "queue_pointer", "recipe_name", "sha256")
    write_json(folder / "state.json", {name: now[name] for name in fields} | {"recipe": recipe})
    fresh = trained(0)
    restored = restore(tmp_path, fresh, RECIPE)
    assert (restored["step"], restored["data_position"]) == (2, None)
    assert same(state(fresh), state(moco)) and fresh.queue.pointer == moco.queue.pointer
    with pytest.raises(ValueError, match="symmetric was False, now True"):
        restore(tmp_path, fresh, dataclasses.replace(RECIPE, symmetric=True))


def test_tuples_and_lists_are_the_same_recipe(tmp_path: Path) -> None:
    args = {name: tuple(v) if isinstance(v, list) else v for name, v in RECIPE.model_args.items()}
    recipe = dataclasses.replace(RECIPE, model_args=args)
    save(tmp_path, trained(1), 1, recipe=recipe)
    assert restore(tmp_path, trained(0), recipe)["step"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["queue", "key.backbone.conv1.weight", "sgd_momentum.backbone.bn1.bias"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, name: str, value: float) -> None:
    moco = trained(1)
    save(tmp_path, moco, 1)
    tensor = moco.state_tensors()[name]
    tensor[(-1,) * tensor.ndim] = value
    with (
        pytest.raises(RuntimeError, match=f"Tensor '{name}' is not finite after step 2, so nothing is saved"),
        writer(tmp_path) as checkpoints,
    ):
        checkpoints.save(moco, step=2, epoch=1)
    assert names(tmp_path) == ["step-00000001"]


def test_large_finite_numbers_are_saved_though_their_sum_overflows(tmp_path: Path) -> None:
    moco = trained(1)
    moco.state_tensors()["queue"].fill_(3e38)
    save(tmp_path, moco, 1)
    assert load_file(tmp_path / "checkpoints" / "step-00000001" / "state.safetensors")["queue"][0, 0] == 3e38


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep \(1\) must be at least 2"):
        writer(tmp_path, keep=1)
    with pytest.raises(ValueError, match=r"keep_every_steps \(0\) must be at least 1"):
        writer(tmp_path, keep_every_steps=0)


@pytest.fixture
def full_disk(tmp_path: Path):
    """A function that lets no file of this process grow beyond a number of bytes; None lifts the limit.

    To be lifted before the test ends: pytest then writes to its own output, which may be a file.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    yield limit
    limit(None)


def test_a_failed_save_is_logged_and_the_next_one_makes_up_for_it(
    tmp_path: Path, full_disk, caplog: pytest.LogCaptureFixture
) -> None:
    moco = trained(1)
    with writer(tmp_path) as checkpoints:
        checkpoints.save(moco, step=1, epoch=1)
        checkpoints.wait()
        full_disk(5000)
        checkpoints.save(moco, step=2, epoch=2)
        checkpoints._pending.exception()  # until the thread has tried
        full_disk(None)
        needed = sum(value.nbytes for value in moco.state_tensors().values()) / 1e6
        for part in (
            "step-00000002' cannot be written",
            f"It needs {needed:.1f} MB",
            "checkpoints are intact",
        ):
            assert part in caplog.text
        assert names(tmp_path) == ["step-00000001"], "temporary files are left"
        checkpoints.save(moco, step=3, epoch=3)
        assert newest_checkpoint(tmp_path).name == "step-00000003", (
            "the one after a failure waits for the disk"
        )
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_disk_that_stays_full_ends_the_run_at_the_next_save(tmp_path: Path, full_disk) -> None:
    moco = trained(1)
    save(tmp_path, moco, 1)
    with pytest.raises(OSError, match=r"step-00000003' cannot be written: .*It needs .* MB, the disk has"):
        with writer(tmp_path) as checkpoints:
            full_disk(5000)
            checkpoints.save(moco, step=2, epoch=2)
            checkpoints.save(moco, step=3, epoch=3)
    full_disk(None)
    assert names(tmp_path) == ["step-00000001"]
    assert restore(tmp_path, trained(0), RECIPE)["step"] == 1


def test_the_last_save_of_a_run_is_tried_twice_and_then_raises(tmp_path: Path, full_disk) -> None:
    moco = trained(1)
    with pytest.raises(OSError, match="cannot be written"), writer(tmp_path) as checkpoints:
        full_disk(5000)
        checkpoints.save(moco, step=1, epoch=1)
    with writer(tmp_path) as checkpoints:
        checkpoints.save(moco, step=1, epoch=1)
        checkpoints._pending.exception()
        full_disk(None)
    assert names(tmp_path) == ["step-00000001"]


def test_an_error_of_the_block_is_the_one_that_is_seen(tmp_path: Path, full_disk) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as checkpoints:
        full_disk(5000)
        checkpoints.save(trained(1), step=1, epoch=1)
        raise KeyboardInterrupt
    full_disk(None)
    assert names(tmp_path) == []
