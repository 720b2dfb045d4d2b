"""Begin a run from a full training state that exists: of another run, a checkpoint, or one on the Hub.

With the recipe and the images of that state the run goes on at its step, and ends with the same bytes as if
it had never been moved. Under another recipe, or on other images, only a restart makes sense: both encoders,
the heads and the queue are taken over, the schedule and the optimiser begin anew.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mocohub.files import damage, read_json
from mocohub.hub.encoders import newest_checkpoint
from mocohub.hub.fetch import snapshot
from mocohub.hub.verify import STATE_FILES, STATE_FOLDER
from mocohub.pretrain.checkpoint import load_state, read_state, refuse_other_recipe
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.run import Run
from mocohub.shards import Shards
from mocohub.sources import ImageList

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_RESTART = "Or take its encoders and queue into a fresh schedule: --init-restart."


@dataclass(frozen=True)
class InitialState:
    """A training state to begin from, looked up and accepted but not yet loaded."""

    source: str  # org/name@commit, or the names of folders; no full path, since run.json keeps it
    folder: Path  # its files; of one on the Hub, so far, only those that are small
    state: dict[str, Any]  # its state.json
    images_sha256: str | None  # which images it was trained on; older checkpoints do not say
    repository: str | None = None

    def facts(self, restart: bool) -> dict[str, Any]:
        """What run.json keeps of it."""
        digest = self.state["sha256"]["state.safetensors"]
        return {"source": self.source, "step": self.state["step"], "sha256": digest, "restart": restart}

    def check(self, recipe: Recipe, images: ImageList | Shards) -> None:
        """Refuse what cannot go on at its step.

        Raises:
            ValueError: If recipe or images are not those of the state, or its training is over.
        """
        where = f"'{self.source}'"
        remedy = f"Give that recipe to go on at its step {self.state['step']}. {_RESTART}"
        refuse_other_recipe(where, self.state["recipe"], recipe, remedy)
        if self.images_sha256 is None:
            logger.warning("%s does not say which images it was trained on; taken to be these.", where)
        elif self.images_sha256 != images.fingerprint():
            raise ValueError(
                f"{where} was trained on other images than '{images.source}'. Give the same --data to go on "
                f"at its step {self.state['step']}. {_RESTART}"
            )
        steps_per_epoch = (images.num_images or 0) // recipe.global_batch_size or None
        if self.state["step"] >= recipe.total_steps(steps_per_epoch):
            raise ValueError(f"{where} has taken all {self.state['step']} steps of its recipe. {_RESTART}")

    def load(self, moco: MoCo, images: ImageList | Shards, restart: bool) -> dict[str, Any]:
        """Load it into `moco`, and return where to start, as `checkpoint.restore` does.

        Raises:
            ValueError: If it is of another network.
            RuntimeError: If its files are damaged, or the Hub delivers wrong ones twice.
        """
        folder = self.folder
        if self.repository:
            commit = self.source.partition("@")[2]
            folder = snapshot(self.repository, revision=commit, patterns=STATE_FILES) / STATE_FOLDER
        if reason := damage(folder, "state.json", "state.safetensors"):
            raise RuntimeError(f"The training state of '{self.source}' is damaged: {reason}.")
        try:
            if restart:
                self._take_over(folder, moco, images)
            else:
                load_state(folder, moco)
        except (SafetensorError, KeyError, TypeError) as error:  # hashes that fit prove no sense
            raise ValueError(f"The training state of '{self.source}' cannot be read: {error!r}.") from error
        start = {"step": 0, "data_position": None} if restart else self.state
        logger.info("Beginning at step %d from '%s'.", start["step"], self.source)
        return start

    @torch.no_grad()
    def _take_over(self, folder: Path, moco: MoCo, images: ImageList | Shards) -> None:
        """Copy encoders and heads, which must fit, and the dictionary if it does."""
        live, saved = moco.state_tensors(), load_file(folder / "state.safetensors")
        for name, value in live.items():
            found = tuple(saved[name].shape) if name in saved else None
            fits = found == tuple(value.shape)
            if name.startswith(("query.", "key.")):
                if not fits:
                    raise ValueError(
                        f"'{self.source}' holds another network: '{name}' is {found} there and "
                        f"{tuple(value.shape)} under this recipe. Give its backbone, model_args, head, "
                        f"embed_dim and mechanism: {self._network()}."
                    )
                value.copy_(saved[name])
            elif name in ("queue", "bank"):
                # The entries of a bank belong to images, those of a queue to nobody.
                if fits and (name == "queue" or self.images_sha256 == images.fingerprint()):
                    value.copy_(saved[name])
                    moco.load_facts(self.state)
                else:
                    logger.warning("The %s of '%s' does not fit: it begins at random.", name, self.source)

    def _network(self) -> str:
        names = ("backbone", "model_args", "head", "embed_dim", "mechanism")
        return ", ".join(f"{name}={self.state['recipe'].get(name)!r}" for name in names)


def initial_state(
    init: str | Path | None, run: Run, recipe: Recipe, images: ImageList | Shards, *, restart: bool
) -> InitialState | None:
    """Find and accept what `run` shall begin from. All ranks must call this, before the run begins.

    Args:
        init: A run, a checkpoint, a folder with training-state/, or org/name or org/name@revision on the Hub.
        run: A resumed one that has checkpoints goes on from those.
        recipe: Of the run.
        images: Of the run.
        restart: Whether to take over encoders, heads and queue only, at step 0.

    Returns:
        None if the run begins from nothing, or goes on from its own checkpoints.

    Raises:
        FileNotFoundError: If `init` does not exist or holds no training state.
        ValueError: If it is of another recipe or other images, or the run in `out` began otherwise.
        PermissionError, ConnectionError, RuntimeError: As `mocohub.hub.fetch.snapshot`.
    """
    if restart and init is None:
        raise ValueError("init_restart says how to begin from init. Give --init too, or omit it.")
    recorded = read_json(run.out / "run.json").get("init") if run.resumed else None
    has_checkpoints = run.resumed and any((run.out / "checkpoints").glob("step-*"))
    if init is None:
        if recorded and not has_checkpoints:
            raise ValueError(
                f"'{run.out}' began from '{recorded['source']}' and has no checkpoint of its own yet. "
                "Give the same --init again."
            )
        return None
    if run.resumed and (recorded is None or recorded["restart"] != restart):
        began = "without --init" if recorded is None else f"with init_restart={recorded['restart']}"
        raise ValueError(f"'{run.out}' began {began}. Resume it the same way, or choose another --out.")
    if has_checkpoints:
        return None
    found = find(init)
    if not restart:
        found.check(recipe, images)
    if recorded and recorded["sha256"] != found.facts(restart)["sha256"]:
        raise ValueError(
            f"'{run.out}' began from '{recorded['source']}' at step {recorded['step']}, and '{init}' is "
            f"another state now, of step {found.state['step']}. Give the first, or choose another --out."
        )
    return found


def find(source: str | Path) -> InitialState:
    """Look up a training state; of one on the Hub only the small files are fetched.

    Raises:
        FileNotFoundError: If nothing is there, or it holds no training state.
        ValueError: If what is there is no state that this reads.
        PermissionError, ConnectionError, RuntimeError: As `mocohub.hub.fetch.snapshot`.
    """
    path, repository = Path(source).expanduser(), None
    if path.exists():
        if (path / "run.json").is_file():
            folder = newest_checkpoint(path) or path
        else:
            folder = path / STATE_FOLDER if (path / STATE_FOLDER).is_dir() else path
        source = path.resolve().name
    else:
        repository, _, revision = os.fspath(source).removeprefix("hf-hub:").partition("@")
        if not _REPOSITORY.fullmatch(repository):
            raise FileNotFoundError(
                f"init='{source}' does not exist. Give a run, a checkpoint, a folder with {STATE_FOLDER}/, "
                "or org/name on the Hub. Omit --init to start from scratch."
            )
        small = [name for name in STATE_FILES if not name.endswith(".safetensors")]
        commit_folder = snapshot(repository, revision=revision or None, patterns=small)
        source, folder = f"{repository}@{commit_folder.name}", commit_folder / STATE_FOLDER
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(
            f"'{source}' holds no training state (state.json, state.safetensors, SHA256SUMS), an encoder at "
            "best. Its owner can add it: `mocohub publish FOLDER --repo ORG/NAME --training-state RUN`."
        )
    state = read_state(folder)
    recipe, data, digests = state.get("recipe"), state["data"], state.get("sha256")
    sound = (
        isinstance(recipe, dict)
        and isinstance(recipe.get("augmentation", {}), dict)
        and isinstance(data, dict | None)
        and isinstance(digests, dict)
        and isinstance(digests.get("state.safetensors"), str)
        and type(state.get("step")) is int
        and state["step"] >= 0
    )
    if not sound:
        raise ValueError(
            f"state.json of '{source}' does not state step, recipe and SHA-256 as a checkpoint does."
        )
    run_file = folder.parent.parent / "run.json"  # where older checkpoints have their data's facts
    if data is None and folder.parent.name == "checkpoints" and run_file.is_file():
        data = read_json(run_file)["data"]
    return InitialState(source, folder, state, (data or {}).get("paths_sha256"), repository)
