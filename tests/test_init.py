"""Runs that begin from a full training state: moved without a trace, or restarted under another recipe."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.hub_process import HubProcess
from helpers.hub_server import Fault, HubServer
from helpers.images import write_images
from helpers.ranks import run_ranks
from helpers.recipes import smallest
from helpers.shards import make_tar
from safetensors.torch import load, load_file, save_file

from mocohub.cli import main
from mocohub.files import read_json, sha256, write_json
from mocohub.hub.export import export
from mocohub.pretrain.initial import find
from mocohub.pretrain.loop import train
from mocohub.pretrain.recipe import Recipe
from mocohub.shards import list_shards

RECIPE = smallest(epochs=3)  # 6 steps of 8 of 18 images
SETTINGS = {"num_workers": 0, "precision": "float32", "log_every_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"a": 9, "b": 9})


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never moved, with a checkpoint of each of its 6 steps."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return train(RECIPE, data, out, save_every_steps=1, keep_every_steps=1, **SETTINGS)


@pytest.fixture(scope="module")
def published(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a repository holds: an exported folder with the training state it was exported from."""
    folder = tmp_path_factory.mktemp("published") / "model"
    export(checkpoint(straight, 4), folder, license="mit")
    shutil.copytree(checkpoint(straight, 4), folder / "training-state")
    return folder


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run, step) / "state.safetensors")


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def moved(run: Path, straight: Path, origin: str, steps: list[int]) -> None:
    """Assert that a run went on from `origin` to the bytes of the straight one."""
    assert all(tensors(run)[name].equal(value) for name, value in tensors(straight).items())
    assert [row["step"] for row in log(run)] == steps
    assert [row["loss"] for row in log(run)] == [row["loss"] for row in log(straight)[-len(steps) :]]
    facts = read_json(run / "run.json")["init"]
    digest = sha256(checkpoint(straight, steps[0] - 1) / "state.safetensors")
    assert facts == {"source": origin, "step": steps[0] - 1, "sha256": digest, "restart": False}


def test_a_run_that_is_moved_ends_with_the_bytes_of_one_that_was_not(
    straight: Path, published: Path, data: Path, tmp_path: Path
) -> None:
    sources = {checkpoint(straight, 2): [3, 4, 5, 6], published: [5, 6]}
    for number, (source, steps) in enumerate(sources.items()):
        run = train(RECIPE, data, tmp_path / str(number), init=source, **SETTINGS)
        moved(run, straight, source.name, steps)
    unfinished = shutil.copytree(straight, tmp_path / "unfinished")
    shutil.rmtree(checkpoint(unfinished, 6))
    run = train(RECIPE, data, tmp_path / "from run", init=unfinished, **SETTINGS)
    moved(run, straight, "unfinished", [6])


def test_the_command_line_restarts_a_run_too(data: Path, tmp_path: Path) -> None:
    sets = ["queue_size=8", "global_batch_size=8", "bn_group_size=4", "crop_px=16"]
    sets += ["model_args={'layers': [1, 1, 1, 1], 'stem_chs': 8, 'channels': [8, 8, 8, 8]}"]
    line = ["pretrain", "moco_tiny_digits", "--data", str(data), "--workers", "0", "--set", *sets]
    assert main([*line, "epochs=1", "--out", str(tmp_path / "first")]) == 0
    init = ["--init", str(tmp_path / "first")]
    assert main([*line, "epochs=2", "--out", str(tmp_path / "second"), *init]) == 2
    assert main([*line, "epochs=2", "--out", str(tmp_path / "second"), *init, "--init-restart"]) == 0
    facts = read_json(tmp_path / "second" / "run.json")["init"]
    assert (facts["source"], facts["step"], facts["restart"]) == ("first", 2, True)
    assert checkpoint(tmp_path / "second", 4).is_dir()


def test_a_run_goes_on_from_the_hub_at_the_commit_it_names(
    straight: Path, published: Path, data: Path, tmp_path: Path
) -> None:
    with HubServer() as server, HubProcess(server.environment(tmp_path / "home")) as process:
        commit = server.add("org/name", published, "v1")
        run = process.call(train, RECIPE, data, tmp_path / "run", init="org/name@v1", **SETTINGS)
        moved(run, straight, f"org/name@{commit}", [5, 6])
        server.requests.clear()
        again = process.call(train, RECIPE, data, tmp_path / "2", init=f"org/name@{commit}", **SETTINGS)
        moved(again, straight, f"org/name@{commit}", [5, 6])
        assert server.requests == []  # pinned and cached
        bare = shutil.copytree(published, tmp_path / "bare", ignore=lambda *_: {"training-state"})
        server.add("org/bare", bare)
        with pytest.raises(FileNotFoundError, match="'org/bare@.*' holds no training state.*mocohub publish"):
            process.call(train, RECIPE, data, tmp_path / "3", init="org/bare", **SETTINGS)
        other = dataclasses.replace(RECIPE, temperature=0.5)
        shutil.rmtree(tmp_path / "home" / "hf" / "hub")
        server.requests.clear()
        with pytest.raises(ValueError, match="another recipe: temperature was"):
            process.call(train, other, data, tmp_path / "3", init="org/name", **SETTINGS)
        assert not any("state.safetensors" in path for _, path in server.requests)  # refused before
        server.faults.append(Fault("corrupt", r"resolve/.*/state\.safetensors", "GET", times=float("inf")))
        with pytest.raises(RuntimeError, match="state.safetensors of 'org/name' arrived wrong twice"):
            process.call(train, RECIPE, data, tmp_path / "3", init="org/name", **SETTINGS)
        assert not (tmp_path / "3").exists()


def test_a_stream_goes_on_where_it_stood(data: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, steps=5, lr_schedule="cosine")
    (tmp_path / "shards").mkdir()
    files = sorted(data.rglob("*.png"))
    for number in range(2):
        members = {f"{i:04d}.png": file.read_bytes() for i, file in enumerate(files[number::2])}
        make_tar(tmp_path / "shards" / f"{number}.tar", members)
    shards = list_shards(tmp_path / "shards", num_images=18)
    options = SETTINGS | {"stream_options": {"num_lanes": 2, "buffer_images": 8}}
    whole = train(recipe, shards, tmp_path / "whole", save_every_steps=1, keep_every_steps=1, **options)
    run = train(recipe, shards, tmp_path / "run", init=checkpoint(whole, 3), **options)
    assert all(tensors(run, 5)[name].equal(value) for name, value in tensors(whole, 5).items())


def test_a_moved_run_is_resumed_like_any_other(
    straight: Path, published: Path, data: Path, tmp_path: Path
) -> None:
    run, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree(published, source)
    settings = SETTINGS | {"save_every_steps": 1}
    train(RECIPE, data, run, init=source, **settings)
    shutil.rmtree(checkpoint(run, 6))
    hidden = source.rename(tmp_path / "hidden")  # its own checkpoints are enough
    train(RECIPE, data, run, init=source, resume="auto", **settings)
    moved(run, straight, "source", [5, 6])
    shutil.rmtree(checkpoint(run, 6))
    train(RECIPE, data, run, resume="auto", **settings)
    moved(run, straight, "source", [5, 6])
    # Killed before its first checkpoint it must not begin from scratch.
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="began from 'source' and has no checkpoint.*same --init again"):
        train(RECIPE, data, run, resume="auto", **settings)
    with pytest.raises(ValueError, match="at step 4, and .* is another state now, of step 2"):
        train(RECIPE, data, run, init=checkpoint(straight, 2), resume="auto", **settings)
    with pytest.raises(ValueError, match="began with init_restart=False. Resume it the same way"):
        train(RECIPE, data, run, init=hidden, init_restart=True, resume="auto", **settings)
    train(RECIPE, data, run, init=hidden, resume="auto", **settings)
    moved(run, straight, "source", [5, 6])
    with pytest.raises(ValueError, match="straight' began without --init. Resume it the same way"):
        train(RECIPE, data, straight, init=hidden, resume="auto", **settings)


def begin_on_ranks(data: Path, source: Path, out: Path) -> None:
    train(RECIPE, data, out, init=source, device="cpu", **SETTINGS)


def test_a_run_is_moved_to_another_number_of_processes(straight: Path, data: Path, tmp_path: Path) -> None:
    run_ranks(begin_on_ranks, 2, data, checkpoint(straight, 4), tmp_path / "run")
    for name, value in tensors(straight).items():
        torch.testing.assert_close(tensors(tmp_path / "run")[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_another_recipe_or_other_images_are_refused_with_what_differs(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(RECIPE, base_lr=0.5, epochs=9)
    with pytest.raises(ValueError, match="epochs was 3, now 9; base_lr was .*, now 0.5.*--init-restart"):
        train(other, data, tmp_path / "run", init=checkpoint(straight, 4), **SETTINGS)
    elsewhere = write_images(tmp_path / "images", {"a": 9, "c": 9})
    with pytest.raises(ValueError, match="'step-00000004' was trained on other images.*same --data"):
        train(RECIPE, elsewhere, tmp_path / "run", init=checkpoint(straight, 4), **SETTINGS)
    with pytest.raises(ValueError, match="'straight' has taken all 6 steps of its recipe.*--init-restart"):
        train(RECIPE, data, tmp_path / "run", init=straight, **SETTINGS)
    with pytest.raises(ValueError, match="init_restart says how to begin from init. Give --init too"):
        train(RECIPE, data, tmp_path / "run", init_restart=True, **SETTINGS)
    assert not (tmp_path / "run").exists()


def first_save(recipe: Recipe, data: Path, run: Path, source: Path) -> dict[str, torch.Tensor]:
    """Restart with steps that change nothing, and return the state behind the first."""
    still = dataclasses.replace(
        recipe, base_lr=1e-30, key_momentum=1.0, weight_decay=0.0, bank_momentum=1.0, epochs=1, seed=5
    )
    train(still, data, run, init=source, init_restart=True, save_every_steps=1, **SETTINGS)
    assert [row["step"] for row in log(run)] == list(range(1, len(log(run)) + 1))
    return tensors(run, 1)


def test_a_restart_takes_encoders_heads_and_queue_into_step_0_with_a_fresh_optimiser(
    straight: Path, tmp_path: Path
) -> None:
    elsewhere = write_images(tmp_path / "images", {"x": 18}, seed=3)
    recipe = dataclasses.replace(RECIPE, temperature=0.5, lr_schedule="cosine")
    first = first_save(recipe, elsewhere, tmp_path / "run", checkpoint(straight, 5))
    source = tensors(straight, 5)
    learnt = [
        n for n in source if n.startswith(("query.", "key.")) and "running" not in n and "num_b" not in n
    ]
    assert len(learnt) > 40 and all(first[name].equal(source[name]) for name in learnt)
    # The first step replaced 8 of the 16 keys, those from the pointer of the source on.
    pointer = read_json(checkpoint(straight, 5) / "state.json")["queue_pointer"]
    assert pointer == 8
    kept = [row for row in range(16) if not pointer <= row < pointer + 8]
    assert first["queue"][kept].equal(source["queue"][kept]) and not first["queue"].equal(source["queue"])
    # Behind one step the momentum is its gradient, whatever it was before: run it from other momenta.
    forgotten = shutil.copytree(checkpoint(straight, 5), tmp_path / "forgotten")
    zeroed = {n: torch.zeros_like(t) if n.startswith("sgd_momentum.") else t for n, t in source.items()}
    rewrite(forgotten, zeroed)
    again = first_save(recipe, elsewhere, tmp_path / "again", forgotten)
    assert all(again[name].equal(value) for name, value in first.items())
    assert read_json(tmp_path / "run" / "run.json")["init"]["restart"] is True


def rewrite(folder: Path, state: dict[str, torch.Tensor], **facts: object) -> None:
    save_file(state, folder / "state.safetensors")
    digest = {"sha256": {"state.safetensors": sha256(folder / "state.safetensors")}}
    write_json(folder / "state.json", read_json(folder / "state.json") | digest | facts)
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def test_a_restart_with_another_queue_says_that_it_begins_at_random(
    straight: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = dataclasses.replace(RECIPE, queue_size=8)
    with caplog.at_level(logging.WARNING):
        first = first_save(recipe, data, tmp_path / "run", straight)
    assert "The queue of 'straight' does not fit: it begins at random." in caplog.text
    assert first["queue"].shape == (8, 128)


@pytest.mark.parametrize("same_images", [True, False])
def test_a_restart_keeps_a_memory_bank_for_the_same_images_only(
    data: Path, tmp_path: Path, same_images: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, mechanism="memory_bank", loss="nce", epochs=1)
    source = train(recipe, data, tmp_path / "source", **SETTINGS)
    images = data if same_images else write_images(tmp_path / "images", {"c": 18}, seed=2)
    first = first_save(recipe, images, tmp_path / "run", source)
    distance = (first["bank"] - tensors(source, 2)["bank"]).norm()
    assert (distance < 1e-4) == same_images
    constants = [
        read_json(checkpoint(r, s) / "state.json")["nce_constant"]
        for r, s in ((source, 2), (tmp_path / "run", 1))
    ]
    assert (constants[0] == constants[1]) == same_images


def test_a_restart_for_another_network_is_refused_with_the_recipe_it_needs(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    for change in ({"embed_dim": 64}, {"head": "mlp"}, {"model_args": {}}):
        with pytest.raises(
            ValueError, match="(?s)holds another network: .*Give its backbone.*head='linear', embed_dim=128"
        ):
            recipe = dataclasses.replace(RECIPE, **change)
            train(recipe, data, tmp_path / "run", init=straight, init_restart=True, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_none_is_refused_with_what_is_accepted(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="init='runs' does not exist. Give a run.*Omit --init"):
        find("runs")
    with pytest.raises(FileNotFoundError, match="'nothing' holds no training state"):
        find(write_images(tmp_path / "nothing", {"a": 1}))
    copy = shutil.copytree(checkpoint(straight, 4), tmp_path / "copy")
    state = read_json(copy / "state.json")
    write_json(copy / "state.json", state | {"format": "mocohub-checkpoint/9"})
    with pytest.raises(ValueError, match="copy' is of format 'mocohub-checkpoint/9'"):
        find(copy)
    for poison in (
        {"step": "4"},
        {"recipe": []},
        {"recipe": {"augmentation": 3}},
        {"sha256": {}},
        {"data": 5},
    ):
        write_json(copy / "state.json", state | poison)
        with pytest.raises(ValueError, match="does not state step, recipe and SHA-256|states no recipe"):
            find(copy)


def test_a_damaged_or_senseless_state_is_refused(straight: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint(straight, 4), tmp_path / "copy")
    saved = load((copy / "state.safetensors").read_bytes())  # not mapped: the file is about to change
    (copy / "state.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(RuntimeError, match="training state of 'copy' is damaged: state.safetensors has SHA"):
        train(RECIPE, data, tmp_path / "run", init=copy, **SETTINGS)
    digest = {"sha256": {"state.safetensors": sha256(copy / "state.safetensors")}}
    write_json(copy / "state.json", read_json(copy / "state.json") | digest)
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="training state of 'copy' cannot be read: SafetensorError"):
        train(RECIPE, data, tmp_path / "run", init=copy, **SETTINGS)
    del saved["queue"]
    rewrite(copy, saved)
    with pytest.raises(ValueError, match="another network: 1 tensors differ, the first is 'queue'"):
        train(RECIPE, data, tmp_path / "run", init=copy, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_name_its_images_is_trusted_with_a_warning(
    straight: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = shutil.copytree(checkpoint(straight, 4), tmp_path / "old")
    rewrite(old, load_file(old / "state.safetensors"), data=None)
    train(RECIPE, data, tmp_path / "run", init=old, **SETTINGS)
    assert "'old' does not say which images it was trained on" in caplog.text
    run = shutil.copytree(straight, tmp_path / "old run")
    rewrite(checkpoint(run, 4), tensors(run, 4), data=None)
    expected = read_json(straight / "run.json")["data"]["paths_sha256"]
    assert find(checkpoint(run, 4)).images_sha256 == expected  # from the run.json above it
