import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mocohub.pretrain import checkpoint
from mocohub.pretrain.loop import build
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.recipes import Recipe, moco_tiny_digits

RECIPE = dataclasses.replace(
    moco_tiny_digits(),
    global_batch_size=8,
    bn_group_size=4,
    queue_size=16,
    model_args={"layers": [1, 1, 1, 1], "stem_chs": 8, "channels": [8, 8, 8, 8]},
)


def trained(steps: int = 2) -> MoCo:
    moco = build(RECIPE, torch.device("cpu"))
    for step in range(steps):
        x_q, x_k = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        moco.step(x_q, x_k, torch.arange(8))
    return moco


def save(run: Path, moco: MoCo, step: int, recipe: Recipe = RECIPE, keep: int = 2) -> Path:
    return checkpoint.save(run, moco, step=step, epoch=1, recipe=recipe, recipe_name="tiny", keep=keep)


def state(moco: MoCo) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in checkpoint._tensors(moco).items()}


def test_restoring_brings_back_every_tensor_and_the_pointer(tmp_path: Path) -> None:
    moco = trained()
    save(tmp_path, moco, 2)
    fresh = build(dataclasses.replace(RECIPE, seed=5), torch.device("cpu"))
    assert not state(fresh)["query.backbone.conv1.weight"].equal(state(moco)["query.backbone.conv1.weight"])
    assert checkpoint.restore(tmp_path, fresh, RECIPE) == 2
    expected, got = state(moco), state(fresh)
    assert expected.keys() == got.keys()
    assert all(got[name].equal(value) for name, value in expected.items())
    assert fresh.queue.pointer == moco.queue.pointer == 0


def test_the_file_names_its_tensors_and_the_json_its_facts(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(1), 1)
    tensors = load_file(folder / "state.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"query", "key", "queue", "sgd_momentum"}
    assert tensors["queue"].shape == (16, 128)
    facts = json.loads((folder / "state.json").read_text())
    assert (facts["format"], facts["step"], facts["queue_pointer"]) == ("mocohub-checkpoint/1", 1, 8)
    assert facts["num_images_seen"] == 8 and Recipe.from_json(facts["recipe"]) == RECIPE


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    moco = trained(1)
    for step in (1, 2, 3):
        save(tmp_path, moco, step)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "no json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, trained(1), 1)
    newest = save(tmp_path, trained(2), 2)
    content = bytearray((newest / "state.safetensors").read_bytes())
    if damage == "flip":
        content[-100] ^= 1
        (newest / "state.safetensors").write_bytes(content)
    elif damage == "cut":
        (newest / "state.safetensors").write_bytes(content[:-1])
    else:
        (newest / "state.json").unlink()
    fresh = build(RECIPE, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.restore(tmp_path, fresh, RECIPE) == 1
    assert "step-00000002" in caplog.text
    assert all(state(fresh)[name].equal(value) for name, value in state(trained(1)).items())


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_there_again(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(1), 1)
    (folder / "state.safetensors").write_bytes(b"")
    (folder.parent / ".step-00000001.x.partial").mkdir()  # of a killed process
    save(tmp_path, trained(1), 1)
    assert [p.name for p in folder.parent.iterdir()] == ["step-00000001"]
    assert checkpoint.restore(tmp_path, build(RECIPE, torch.device("cpu")), RECIPE) == 1


def test_tuples_and_lists_are_the_same_recipe(tmp_path: Path) -> None:
    args = {name: tuple(v) if isinstance(v, list) else v for name, v in RECIPE.model_args.items()}
    recipe = dataclasses.replace(RECIPE, model_args=args)
    save(tmp_path, trained(1), 1, recipe)
    assert checkpoint.restore(tmp_path, build(recipe, torch.device("cpu")), recipe) == 1


def test_without_an_intact_checkpoint_nothing_is_resumed_silently(tmp_path: Path) -> None:
    fresh = build(RECIPE, torch.device("cpu"))
    assert checkpoint.restore(tmp_path, fresh, RECIPE) == 0
    (save(tmp_path, trained(1), 1) / "state.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="No checkpoint of run .* is intact: step-00000001"):
        checkpoint.restore(tmp_path, fresh, RECIPE)


def test_another_recipe_is_refused_and_the_differing_fields_named(tmp_path: Path) -> None:
    save(tmp_path, trained(1), 1)
    other = dataclasses.replace(RECIPE, temperature=0.2)
    with pytest.raises(ValueError, match=r"another recipe: temperature was 0.07, now 0.2\. Resume with"):
        checkpoint.restore(tmp_path, build(other, torch.device("cpu")), other)
