"""The folder of a training run, as far as it is text. Rank 0 writes it, but for errors.jsonl.

RUN/run.json       recipe, data, versions, commit
RUN/log.jsonl      a line per logged step and per evaluation
RUN/errors.jsonl   images that could not be decoded (only if there were any)
RUN/checkpoints/   see checkpoint.py
"""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

import mocohub
from mocohub import distributed
from mocohub.files import atomic_folder, read_json, refuse_existing, write_json
from mocohub.pretrain.checkpoint import refuse_other_recipe
from mocohub.pretrain.recipe import Recipe
from mocohub.shards import Shards
from mocohub.sources import ImageList

FORMAT = "mocohub-run/1"
_BROKEN_PCT = 10.0  # more broken images than this end the run


class Run:
    """The run folder's text files."""

    def __init__(
        self, out: Path, recipe: Recipe, recipe_name: str, images: ImageList | Shards, resume: bool
    ) -> None:
        """Check that this run may start, or go on, in `out`; `begin` then writes.

        Raises:
            FileExistsError: If something is in `out` and is not to be resumed.
            ValueError: If the run in `out` has other images or another recipe.
        """
        self.out, self.recipe_name = out, recipe_name
        self.num_broken, self.known_broken = 0, set()
        self.logged: list[dict[str, Any]] = []  # before this start, of a resumed run
        self.facts = facts = {
            "format": FORMAT,
            "recipe_name": recipe_name,
            "recipe": recipe.to_json(),
            "data": {
                "source": Path(images.source).resolve().name,
                "num_images": images.num_images,
                "classes": images.classes,
                "paths_sha256": images.fingerprint(),
            },
            "versions": {
                "mocohub": mocohub.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
            "commit": _commit(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.resumed = resume and (out / "run.json").is_file()
        if self.resumed:
            saved = read_json(out / "run.json")
            refuse_other_recipe(out, saved["recipe"], recipe)
            was = saved["data"]
            if was["paths_sha256"] != facts["data"]["paths_sha256"]:
                now = facts["data"]
                raise ValueError(
                    f"{out} was trained on other images ({was['num_images']} of '{was['source']}', now "
                    f"{now['num_images']} of '{now['source']}'). Give the same --data, or another --out."
                )
        else:
            refuse_existing(out, "Choose another --out, or continue that run with --resume auto.")

    def begin(self, start_step: int) -> None:
        """Make sure that all ranks start alike; write run.json, or cut the log of a resumed run.

        Raises:
            RuntimeError: If ranks see other images, another recipe or another checkpoint.
        """
        facts = json.dumps([start_step, self.facts["recipe"], self.facts["data"]["paths_sha256"]])
        if not distributed.same_on_all_ranks(facts):
            raise RuntimeError(
                f"The processes do not start alike; this one starts at step {start_step}. "
                f"All must see the same --data, and the same files in --out ({self.out})."
            )
        if distributed.rank() == 0 and self.resumed:
            self._forget_after(start_step)
        elif distributed.rank() == 0:
            with atomic_folder(self.out) as folder:  # a kill leaves no run, or one that says what it is
                write_json(folder / "run.json", self.facts)

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to log.jsonl; rank 0 alone calls this."""
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drop the log lines of steps that are taken again, and a last one that was cut by a kill."""
        log = self.out / "log.jsonl"
        if not log.is_file():
            return
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        self.logged = [json.loads(line) for line in kept]
        temporary = log.with_suffix(".partial")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(log)

    def note_broken(
        self, broken: list[list[tuple[int, str]]], images: ImageList | Shards, num_seen: int
    ) -> None:
        """Record images that did not decode, each once; raise if more than a tenth of all seen did not."""
        self.num_broken += len(broken)
        for image_id, reason in (failed for failures in broken for failed in failures):
            if image_id not in self.known_broken:
                self.known_broken.add(image_id)
                row = {"id": image_id, "path": images.path(image_id), "reason": reason}
                with open(self.out / "errors.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        if self.num_broken > _BROKEN_PCT / 100 * max(num_seen, 100):
            raise RuntimeError(
                f"{self.num_broken} of the first {num_seen} images cannot be decoded, more than "
                f"{_BROKEN_PCT:g} %. They are listed with reasons in {self.out / 'errors.jsonl'}."
            )


def _commit() -> str | None:
    """The commit of the source tree this runs from, None if it was installed from a package."""
    tree = Path(mocohub.__file__).parent.parent
    if not (tree / ".git").exists():
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
