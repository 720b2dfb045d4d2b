"""The whole training state as safetensors and JSON: both encoders, queue, SGD momentum and two integers.

    RUN/checkpoints/step-00000120/state.safetensors   query.*, key.*, queue, sgd_momentum.*
    RUN/checkpoints/step-00000120/state.json          step, epoch, queue pointer, recipe, SHA-256

A checkpoint is complete or absent (files.atomic_folder). The order of the data, the crops and the shuffles
are functions of the seed and the step, so nothing else needs saving.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mocohub.files import atomic_folder, read_json, sha256, write_json
from mocohub.hub.convert import CHECKPOINT_FORMAT, newest_checkpoint
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.recipes import Recipe


def save(
    run: Path, moco: MoCo, *, step: int, epoch: int, recipe: Recipe, recipe_name: str, keep: int
) -> Path:
    """Write the state after `step` steps and remove all but the newest `keep` checkpoints.

    To be called by one rank, after `average_statistics` on all.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    # What a killed process left, and a damaged checkpoint that the run comes to again.
    for stale in (*folder.parent.glob(".step-*.partial"), folder):
        shutil.rmtree(stale, ignore_errors=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in _tensors(moco).items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "state.safetensors", metadata={"format": "pt"})
        state = {
            "format": CHECKPOINT_FORMAT,
            "step": step,
            "epoch": epoch,
            "num_images_seen": step * recipe.global_batch_size,
            "queue_pointer": moco.queue.pointer,
            "recipe_name": recipe_name,
            "recipe": recipe.to_json(),
            "sha256": {"state.safetensors": sha256(temporary / "state.safetensors")},
        }
        write_json(temporary / "state.json", state)
    for old in sorted(folder.parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def restore(run: Path, moco: MoCo, recipe: Recipe) -> int:
    """Load the newest intact checkpoint into `moco` and return its step, 0 if there is none.

    Raises:
        ValueError: If the checkpoint belongs to another recipe; the message names the fields.
        RuntimeError: If there are checkpoints and all are damaged.
    """
    folder = newest_checkpoint(run)
    if folder is None:
        return 0
    state = read_json(folder / "state.json")
    if state["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"'{folder}' is of format {state['format']!r}: this resumes {CHECKPOINT_FORMAT!r}.")
    refuse_other_recipe(folder, state["recipe"], recipe)
    saved = load_file(folder / "state.safetensors")
    for name, value in _tensors(moco).items():
        value.copy_(saved[name])
    moco.queue.pointer = state["queue_pointer"]
    return state["step"]


def refuse_other_recipe(where: Path, saved: dict[str, Any], recipe: Recipe) -> None:
    """Raise ValueError, naming the fields, if the recipe saved in `where` is not `recipe`."""
    given = json.loads(json.dumps(recipe.to_json()))  # as it would have been saved: tuples are lists
    differing = [
        f"{name} was {saved.get(name)!r}, now {given.get(name)!r}"
        for name in saved | given
        if saved.get(name) != given.get(name)
    ]
    if differing:
        raise ValueError(
            f"{where} was trained with another recipe: {'; '.join(differing)}. "
            "Resume with the same recipe, or choose another --out."
        )


@torch.no_grad()
def _tensors(moco: MoCo) -> dict[str, Tensor]:
    """The live tensors of the state by their names in the file."""
    tensors = {f"query.{name}": value for name, value in moco.query.state_dict().items()}
    tensors |= {f"key.{name}": value for name, value in moco.key.state_dict().items()}
    tensors["queue"] = moco.queue.embeddings
    for name, parameter in moco.query.named_parameters():
        slot = moco.optimizer.state[parameter]
        if slot.get("momentum_buffer") is None:
            # Zero momentum and none at all make the same first step.
            slot["momentum_buffer"] = torch.zeros_like(parameter)
        tensors[f"sgd_momentum.{name}"] = slot["momentum_buffer"]
    return tensors
