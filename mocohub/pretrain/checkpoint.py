"""The whole training state as safetensors and JSON, written beside the training.

    RUN/checkpoints/step-00000120/state.safetensors   query.*, key.*, queue or bank, sgd_momentum.*
    RUN/checkpoints/step-00000120/state.json          step, recipe, versions, metrics, SHA-256 of the tensors
    RUN/checkpoints/step-00000120/SHA256SUMS          of both files, as `sha256sum --check` reads it

A checkpoint is complete or absent (files.atomic_folder), and those before it are removed only when it is on
disk. The order of the data, the crops and the shuffles are functions of the seed and the step, so nothing
else needs saving; a stream gives its position.

When the disk fails: the error is logged at once, with the path and the bytes needed, and training goes on,
because to end there would throw away what was learnt since the last checkpoint. The next save writes before
training continues, and if that fails as well the run ends: no more than two intervals are ever at stake. The
last save of a run is tried twice.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mocohub.files import atomic_folder, damage, read_json, remove_folder, sha256, write_checksums, write_json
from mocohub.hub.encoders import CHECKPOINT_FORMAT, newest_checkpoint
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.recipe import Recipe

logger = logging.getLogger(__name__)

_TENSORS, _STATE = "state.safetensors", "state.json"


class CheckpointWriter:
    """Writes the checkpoints of one run from a thread of its own. One rank has one, the others none.

        with CheckpointWriter(run, recipe=recipe, recipe_name="custom") as writer:
            writer.save(moco, step=120, epoch=3)  # copies the state and returns

    The block ends when the last checkpoint is on disk, and raises if it cannot be written.
    """

    def __init__(
        self,
        run: Path,
        *,
        recipe: Recipe,
        recipe_name: str,
        keep: int = 2,
        keep_every_steps: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Remove what killed processes left in `run`; nothing else is written yet.

        Args:
            run: The run folder.
            recipe: What is trained.
            recipe_name: Its name.
            keep: How many of the newest intact checkpoints stay, at least 2: one may be damaged.
            keep_every_steps: Checkpoints at multiples of it stay for good; none if None.
            facts: Further fields of state.json: versions, commit.

        Raises:
            ValueError: If `keep` is below 2 or `keep_every_steps` below 1.
        """
        if keep < 2:
            raise ValueError(f"keep ({keep}) must be at least 2: the newest checkpoint may get damaged.")
        if keep_every_steps is not None and keep_every_steps < 1:
            raise ValueError(f"keep_every_steps ({keep_every_steps}) must be at least 1, or None.")
        self._folder, self._keep, self._keep_every_steps = run / "checkpoints", keep, keep_every_steps
        self._recipe = recipe
        self._facts = {"recipe_name": recipe_name, "recipe": recipe.to_json(), **(facts or {})}
        self._intact: set[Path] = set()  # those whose checksums need not be computed again
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._unsaved: tuple[Path, dict[str, Tensor], dict[str, Any]] | None = None
        for stale in self._folder.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)

    def save(
        self,
        moco: MoCo,
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        data_position: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy the state after `step` steps to host memory and return; the thread writes it.

        Waits for the save before it. To be called after `moco.settle()` on all ranks.

        Args:
            moco: The state; may change as soon as this returns.
            step: Steps taken.
            epoch: Epochs finished.
            metrics: The latest numbers, for people; those that are not finite are saved as null.
            data_position: Where a stream of images stands, as JSON values; `restore` gives it back.

        Raises:
            RuntimeError: If a tensor is not finite; it is named, and nothing is written.
            OSError: If neither the save before nor this one can be written.
        """
        earlier_error = self._settle()
        tensors = moco.state_tensors()
        _refuse_non_finite(tensors, step)
        state = {
            "format": CHECKPOINT_FORMAT,
            "step": step,
            "epoch": epoch,
            "num_images_seen": step * self._recipe.global_batch_size,
            **moco.state_facts(),
            **self._facts,
            "metrics": {name: _finite_or_none(value) for name, value in (metrics or {}).items()},
            "data_position": data_position,
        }
        state = json.loads(json.dumps(state, allow_nan=False))  # the caller's dicts may change meanwhile
        self._unsaved = (self._folder / f"step-{step:08d}", _host_copy(tensors), state)
        self._pending = self._thread.submit(self._write)
        if earlier_error is not None:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is on disk; one that failed is tried once more.

        Raises:
            OSError: If it cannot be written; the checkpoints before it are intact.
        """
        if self._settle() is not None:
            self._pending = self._thread.submit(self._write)
            if (error := self._settle()) is not None:
                raise error

    def close(self) -> None:
        """Wait for the last save, then end the thread.

        Raises:
            OSError: As `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the error of the block is the one to see; a failed save has been logged
            self._settle()
            self._thread.shutdown()

    def _settle(self) -> OSError | None:
        """Wait for the thread; return what the disk said, raise anything else."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            return error
        return None

    def _write(self) -> None:
        """Write the unsaved state (on the thread)."""
        folder, tensors, state = self._unsaved
        try:
            # One that is there and intact is of this run and this step: the same numbers.
            if not (folder.is_dir() and _damage(folder) is None):
                remove_folder(folder)
                with atomic_folder(folder) as temporary:
                    save_file(tensors, temporary / _TENSORS, metadata={"format": "pt"})
                    digest = sha256(temporary / _TENSORS)
                    write_json(temporary / _STATE, state | {"sha256": {_TENSORS: digest}})
                    write_checksums(temporary)
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in tensors.values())
            free = shutil.disk_usage(self._folder).free if self._folder.is_dir() else 0
            failure = OSError(
                f"Checkpoint '{folder}' cannot be written: {error}. It needs {needed / 1e6:.1f} MB, the disk "
                f"has {free / 1e6:.1f} MB free (a quota may be lower). Earlier checkpoints are intact. Make "
                "room: the next checkpoint, or a second try at the end, is the last before the run fails."
            )
            logger.error("%s", failure)
            raise failure from error
        self._unsaved = None  # frees the copy
        logger.debug("Checkpoint '%s' is on disk.", folder)
        self._intact.add(folder)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove all but the newest intact checkpoints and those that stay for good."""
        folders = sorted(self._folder.glob("step-" + 8 * "[0-9]"))
        self._intact |= {f for f in folders if f not in self._intact and _damage(f) is None}
        kept = {f for f in sorted(self._intact)[-self._keep :]}
        for folder in folders:
            step = int(folder.name.removeprefix("step-"))
            for_good = self._keep_every_steps is not None and step % self._keep_every_steps == 0
            if folder not in kept and not for_good:
                remove_folder(folder)
                self._intact.discard(folder)


def restore(run: Path, moco: MoCo, recipe: Recipe) -> dict[str, Any] | None:
    """Load the newest intact checkpoint into `moco`; damaged ones are passed over and logged with reasons.

    Returns:
        Its state.json (step, epoch, metrics, data_position, ...), None if there is no checkpoint.

    Raises:
        ValueError: If it is of another format, recipe (the message names the fields) or network.
        RuntimeError: If there are checkpoints and all are damaged.
    """
    folder = newest_checkpoint(run)
    if folder is None:
        return None
    state = read_state(folder)
    refuse_other_recipe(folder, state["recipe"], recipe)
    load_state(folder, moco)
    logger.info("Resuming from '%s'.", folder)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json, with what older versions did not write.

    Raises:
        ValueError: If it is of another format.
    """
    state = read_json(folder / _STATE)
    found = state.get("format") if isinstance(state, dict) else None
    if found != CHECKPOINT_FORMAT:
        raise ValueError(
            f"'{folder}' is of format {found!r}: this resumes {CHECKPOINT_FORMAT!r}. "
            "Resume it with the version of mocohub that wrote it, or choose another --out."
        )
    if not isinstance(state.get("recipe"), dict):
        raise ValueError(f"'{folder / _STATE}' states no recipe. Use another checkpoint.")
    return {"metrics": {}, "data_position": None, "data": None} | state


@torch.no_grad()
def load_state(folder: Path, moco: MoCo) -> None:
    """Load an intact checkpoint into `moco`.

    Raises:
        ValueError: If it is of another network; the message names the first tensor that differs.
    """
    live, saved = moco.state_tensors(), load_file(folder / _TENSORS)
    shapes, saved_shapes = ({name: tuple(t.shape) for name, t in ts.items()} for ts in (live, saved))
    if differing := sorted({name for name, _ in shapes.items() ^ saved_shapes.items()}):
        first = differing[0]
        raise ValueError(
            f"'{folder}' holds another network: {len(differing)} tensors differ, the first is '{first}' "
            f"({saved_shapes.get(first)} saved, {shapes.get(first)} wanted). "
            "Resume it with the version of mocohub that wrote it, or choose another --out."
        )
    for name, value in live.items():
        value.copy_(saved[name])
    moco.load_facts(read_state(folder))


def refuse_other_recipe(
    where: Path | str,
    saved: dict[str, Any],
    recipe: Recipe,
    remedy: str = "Resume with the same recipe, or choose another --out.",
) -> None:
    """Raise ValueError, naming the fields, if the recipe saved in `where` is not `recipe`.

    A field that `saved` lacks, because it was written before the field existed, has its default.
    """
    was = _flat(Recipe().to_json()) | _flat(saved)
    now = _flat(recipe.to_json())
    differing = [
        f"{name} was {was.get(name)!r}, now {now.get(name)!r}"
        for name in was | now
        if was.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f"{where} was trained with another recipe: {'; '.join(differing)}. {remedy}")


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields as they would have been saved (tuples are lists), with names like augmentation.hue."""
    fields = json.loads(json.dumps(recipe))
    return fields | {f"augmentation.{name}": v for name, v in fields.pop("augmentation", {}).items()}


def _damage(folder: Path) -> str | None:
    return damage(folder, _STATE, _TENSORS)


@torch.no_grad()
def _refuse_non_finite(tensors: dict[str, Tensor], step: int) -> None:
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    # A sum is as finite as its terms, and ten times as fast as to look at each.
    suspects = ~torch.stack([value.sum().float() for value in floats.values()]).isfinite().cpu()
    for name, suspect in zip(floats, suspects.tolist(), strict=True):
        if suspect and not floats[name].isfinite().all():  # finite terms may have an infinite sum
            raise RuntimeError(
                f"Tensor '{name}' is not finite after step {step}, so nothing is saved. The last good state "
                "is the newest checkpoint. Lower the learning rate (--set base_lr=...)."
            )


@torch.no_grad()
def _host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, contiguous as safetensors wants them; from a card at the speed of the bus."""
    copies = {
        name: torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda).copy_(
            value, non_blocking=True
        )
        for name, value in tensors.items()
    }
    if any(value.is_cuda for value in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
