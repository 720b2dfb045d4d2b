"""The folder of a training run, as far as it is text. Rank 0 writes it.

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
from mocohub.files import read_json, refuse_existing, write_json
from mocohub.pretrain.recipes import Recipe
from mocohub.sources import ImageList

FORMAT = "mocohub-run/1"
_BROKEN_PCT = 10.0  # more broken images than this end the run


class Run:
    """The run folder's text files, written by rank 0."""

    def __init__(self, out: Path, recipe: Recipe, recipe_name: str, images: ImageList, resume: bool) -> None:
        self.out, self.recipe_name, self.num_broken = out, recipe_name, 0
        facts = {
            "format": FORMAT,
            "recipe_name": recipe_name,
            "recipe": recipe.to_json(),
            "data": {
                "source": Path(images.source).name,
                "num_images": len(images),
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
        resumed = resume and (out / "run.json").is_file()
        if resumed:
            was = read_json(out / "run.json")["data"]
            if was["paths_sha256"] != facts["data"]["paths_sha256"]:
                raise ValueError(
                    f"{out} was trained on other images ({was['num_images']} of '{was['source']}', now "
                    f"{len(images)} of '{facts['data']['source']}'). Give the same --data, or another --out."
                )
        else:
            refuse_existing(out, "Choose another --out, or continue that run with --resume auto.")
        if distributed.agree(True) and distributed.rank() == 0 and not resumed:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "run.json", facts)

    def log(self, **row: Any) -> None:
        """Append one line to log.jsonl."""
        if distributed.rank() == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the log lines of steps that a resumed run takes again."""
        log = self.out / "log.jsonl"
        if distributed.rank() == 0 and log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), "utf-8")

    def note_broken(self, broken: list[tuple[int, str]], images: ImageList, num_seen: int) -> None:
        """Record images that did not decode; raise where they are more than a tenth of all seen."""
        if not broken:
            return
        with open(self.out / "errors.jsonl", "a", encoding="utf-8") as file:
            for image_id, reason in broken:
                file.write(
                    json.dumps({"id": image_id, "path": images.paths[image_id], "reason": reason}) + "\n"
                )
        self.num_broken += len(broken)
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
