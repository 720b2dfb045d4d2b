"""The folder of a linear classification, written by rank 0; complete or absent in each of its parts.

RUN/linear.json      protocol, model, data, how features are computed, versions
RUN/log.jsonl        a line per epoch
RUN/errors.jsonl     images that could not be read (only if there were any)
RUN/checkpoints/     step-00000120/: state.safetensors, state.json, SHA256SUMS
RUN/classifier/      classifier.safetensors (fc.weight, fc.bias), classifier.json (classes), SHA256SUMS
RUN/results.json     the numbers; it is written last, and says that the run is finished
"""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import mocohub
from mocohub import distributed
from mocohub.files import (
    atomic_folder,
    damage,
    read_json,
    refuse_existing,
    remove_folder,
    replace_file,
    sha256,
    write_checksums,
    write_json,
)
from mocohub.hub.encoders import newest_checkpoint

FORMAT = "mocohub-linear/1"
_KEPT_CHECKPOINTS = 2  # one may get damaged
_NAMES_ONLY = ("model.name", "train.source", "val.source")  # the same thing may be reached by other names


class LinearRun:
    """The run folder.

    Attributes:
        computation: How a run that goes on computes features, as `FrozenNetwork.facts`; None for a new one.
    """

    def __init__(self, out: Path, facts: dict[str, Any], resume: bool) -> None:
        """Check that this run may start, or go on, in `out`; nothing is written yet.

        Args:
            out: The folder.
            facts: What decides the numbers: protocol, model, data, seed, precision; JSON values.
            resume: Whether a run that is there goes on.

        Raises:
            FileExistsError: If something is in `out` and is not to be resumed.
            ValueError: If the run in `out` is another one; the message names the fields.
        """
        self.out, self.facts = out, {"format": FORMAT, **facts}
        self.resumed = resume and (out / "linear.json").is_file()
        self.computation: dict[str, Any] | None = None
        if not self.resumed:
            refuse_existing(out, "Choose another --out, or continue that run with --resume auto.")
            return
        saved = read_json(out / "linear.json")
        self._refuse_other(saved)
        self.computation = saved["computation"]

    def _refuse_other(self, saved: dict[str, Any]) -> None:
        was, now = _flat(saved), _flat(self.facts)
        differing = [
            f"{name} was {was.get(name)!r}, now {value!r}"
            for name, value in now.items()
            if was.get(name) != value and name not in _NAMES_ONLY
        ]
        if differing:
            raise ValueError(
                f"{self.out} is another run: {'; '.join(differing)}. "
                "Resume with the same protocol, model and images, or choose another --out."
            )

    def results(self) -> dict[str, Any] | None:
        """What a finished run has found; None if there is more to do."""
        file = self.out / "results.json"
        return read_json(file)["results"] if self.resumed and file.is_file() else None

    def begin(self, computation: dict[str, Any], start_step: int) -> None:
        """Make sure that all ranks start alike, and write linear.json of a new run.

        Raises:
            RuntimeError: If ranks see other images, another model or another checkpoint.
        """
        if not distributed.same_on_all_ranks(json.dumps([self.facts, start_step])):
            raise RuntimeError(
                f"The processes do not start alike; this one starts at step {start_step}. All must see the "
                f"same model and images, and the same files in --out ({self.out})."
            )
        if distributed.rank() == 0 and not self.resumed:
            versions = {
                "mocohub": mocohub.__version__,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            }
            with atomic_folder(self.out) as folder:
                record = {**self.facts, "computation": computation, "versions": versions}
                write_json(folder / "linear.json", record)

    def restore(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return state and tensors of the newest intact checkpoint, None if there are none.

        Raises:
            RuntimeError: If there are checkpoints and all are damaged.
        """
        folder = newest_checkpoint(self.out) if self.resumed else None
        if folder is None:
            return None
        return read_json(folder / "state.json"), load_file(folder / "state.safetensors")

    def save(self, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, then remove all but the newest; rank 0 alone calls this.

        Raises:
            OSError: If it cannot be written; those before it are intact.
        """
        checkpoints = self.out / "checkpoints"
        folder = checkpoints / f"step-{step:08d}"
        try:
            remove_folder(folder)  # of a run that was resumed before it, because it is damaged
            with atomic_folder(folder) as temporary:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(tensors, temporary / "state.safetensors", metadata={"format": "pt"})
                digest = sha256(temporary / "state.safetensors")
                record = {"step": step, **state, "sha256": {"state.safetensors": digest}}
                write_json(temporary / "state.json", record)
                write_checksums(temporary)
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in tensors.values())
            raise OSError(
                f"Checkpoint '{folder}' cannot be written: {error}. It needs {needed / 1e6:.1f} MB. Earlier "
                "ones are intact: make room, then go on with --resume auto."
            ) from error
        folders = sorted(checkpoints.glob("step-*"), reverse=True)
        intact = [f for f in folders if damage(f, "state.json", "state.safetensors") is None]
        for old in set(folders) - set(intact[:_KEPT_CHECKPOINTS]):
            remove_folder(old)

    def log(self, rows: Iterable[dict[str, Any]], errors: Iterable[dict[str, Any]]) -> None:
        """Write log.jsonl and errors.jsonl as they are by now; rank 0 alone calls this."""
        replace_file(self.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if text := "".join(json.dumps(error) + "\n" for error in errors):
            replace_file(self.out / "errors.jsonl", text)

    def finish(
        self, results: dict[str, Any], classifier: dict[str, Tensor], about_classifier: dict[str, Any]
    ) -> None:
        """Write the classifier, then the results; rank 0 alone calls this."""
        folder = self.out / "classifier"
        remove_folder(folder)  # of a run that was killed before the results were written
        with atomic_folder(folder) as temporary:
            save_file(classifier, temporary / "classifier.safetensors", metadata={"format": "pt"})
            digest = sha256(temporary / "classifier.safetensors")
            record = {**about_classifier, "sha256": {"classifier.safetensors": digest}}
            write_json(temporary / "classifier.json", record)
            write_checksums(temporary)
        record = {**self.facts, "results": results, "sha256": {"classifier/classifier.safetensors": digest}}
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(self.out / "results.json", text + "\n")


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields with names like protocol.epochs, as JSON would give them back."""
    flat = {}
    for name, value in json.loads(json.dumps(facts)).items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
