"""The two sets of features that an evaluation is made from: extracted once, or opened, and proved to fit."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps
from torch import nn
from torchvision.transforms import Compose

from mocohub.features.extract import extract
from mocohub.features.inputs import Inputs
from mocohub.features.model import model_facts
from mocohub.features.store import Features, check_comparable
from mocohub.features.writer import NO_LABEL
from mocohub.files import read_json, sha256
from mocohub.hub.load import load, local_copy
from mocohub.hub.load import transform as model_transform
from mocohub.sources import ImageList

_MIRRORED = 1000  # images of val that are seen twice


class Sets:
    """Features of `train` and `val`, and of a part of `val` mirrored where there are images.

    Attributes:
        features: By name: "train", "val".
        folders: Where they are.
        model: Name, architecture, SHA-256 of all weights and of the file they came in, as far as known.
    """

    def __init__(
        self,
        model: nn.Module | str | Path | None,
        train: Any,
        val: Any,
        folder: Path,
        options: dict[str, Any],
        asked: list[str],
    ) -> None:
        """Extract what is not extracted yet, and read all of it once to compare its hashes.

        Args:
            model: As for `evaluate`.
            train: Likewise.
            val: Likewise.
            folder: For what is extracted.
            options: For `extract`.
            asked: What the user wants that needs classes: without them nothing is extracted.

        Raises:
            FileNotFoundError, ValueError: As `evaluate`.
        """
        self._model, self._images = model, {"train": train, "val": val}
        self._folder, self._options = folder, options
        self._refuse_strangers({name: _classes(images) for name, images in self._images.items()})
        for name, images in self._images.items():
            listed = None if is_folder(images) else Inputs(images).images
            if isinstance(listed, ImageList):
                what_lacks(name, listed.labels, asked)
        self.folders = {name: self._extracted(name, images) for name, images in self._images.items()}
        self.features = {name: Features.open(path) for name, path in self.folders.items()}
        check_comparable(self.features["train"], self.features["val"])
        self._refuse_strangers({name: _classes_of(f.labels, f.classes) for name, f in self.features.items()})
        self.model = self._model_facts()

    def facts(self) -> dict[str, dict[str, Any]]:
        """What results.json says of each set."""
        facts = {}
        for name, features in self.features.items():
            meta = features.meta
            facts[name] = {
                "source": meta.get("input", {}).get("source"),
                "manifest_sha256": sha256(self.folders[name] / "manifest.json"),  # has those of the shards
                "rows": len(features),
                "errors": len(features.errors),
                "columns": features.columns,
                "dtype": str(features.dtype),
                "num_classes": len(_classes_of(features.labels, features.classes)),
                **{
                    key: meta.get(key)
                    for key in ("transform", "pool", "flip", "projection", "normalized", "computation")
                },
                "versions": meta.get("versions"),
            }
        return facts

    def mirrored(self, column: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return features (n, D) of some images of `val`, as they are and mirrored; None without images."""
        images = None if is_folder(self._images["val"]) else Inputs(self._images["val"]).images
        if not isinstance(images, ImageList):
            return None
        transform = self._options["transform"] or model_transform(self._loaded())
        chosen = np.unique(np.linspace(0, len(images) - 1, min(_MIRRORED, len(images))).astype(int))
        options = {**self._options, "transform": Compose([ImageOps.mirror, transform])}
        found = extract(
            self._model, images.subset(chosen.tolist()), out=self._folder / "val_mirrored", **options
        )
        val = self.features["val"]
        row_of = {int(i): row for row, i in enumerate(val.ids)}
        pairs = [(row_of[int(chosen[i])], row) for row, i in enumerate(found.ids) if int(chosen[i]) in row_of]
        straight, mirror = np.array(pairs, int).reshape(-1, 2).T
        return (val[column][straight], found[column][mirror]) if len(straight) else None

    def _extracted(self, name: str, images: Any) -> Path:
        if is_folder(images):
            return Path(images)
        if self._model is None:
            raise ValueError(
                f"{name}='{images}' is no finished feature folder, and there is no model to extract features "
                "with. Give a model."
            )
        if not len(extract(self._model, images, out=self._folder / name, **self._options)):
            raise RuntimeError(
                f"'{self._folder / name}' is not complete yet: other processes are at work on it."
            )
        return self._folder / name

    def _loaded(self) -> nn.Module:
        return self._model if isinstance(self._model, nn.Module) else load(self._model)

    def _model_facts(self) -> dict[str, Any]:
        facts = {"name": None, "architecture": None, "weights_sha256": None, "file_sha256": None}
        facts |= self.features["train"].meta.get("model", {})
        if self._model is None:
            return facts
        given = model_facts(self._loaded())["weights_sha256"]
        if facts["weights_sha256"] not in (None, given):
            raise ValueError(
                f"'{self.folders['train']}' holds features of another model: their weights have SHA-256 "
                f"{facts['weights_sha256']}, those of the model given {given}. Omit the model, or extract "
                "again."
            )
        if not isinstance(self._model, nn.Module):
            manifest = local_copy(self._model) / "mocohub.json"
            if manifest.is_file():
                facts["file_sha256"] = read_json(manifest).get("sha256", {}).get("model.safetensors")
        return facts

    @staticmethod
    def _refuse_strangers(classes: dict[str, set[Any]]) -> None:
        if classes["train"] and (strangers := sorted(map(str, classes["val"] - classes["train"]))):
            shown = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
            raise ValueError(
                f"{len(strangers)} classes of val are not in train: {shown}. Both need the same names for "
                "their classes; remove these images, or give train images of them."
            )


def is_folder(images: Any) -> bool:
    """Whether this is a feature folder, finished or not, and not images."""
    files = ("manifest.json", "plan.json")
    return isinstance(images, str | Path) and any((Path(images) / name).is_file() for name in files)


def what_lacks(name: str, labels: Any, asked: list[str]) -> str | None:
    """Say why images with these labels cannot be classified; None if they can.

    Raises:
        ValueError: If they cannot, but something that is asked for needs it.
    """
    known = set() if labels is None else set(np.unique([i for i in labels if i is not None])) - {NO_LABEL}
    problem = None
    if not known:
        problem = f"{name} has no labels"
    elif name == "train" and len(known) == 1:
        problem = "train has one class only"
    if problem and asked:
        raise ValueError(
            f"{problem}, but {', '.join(asked)} needs two or more classes. Give a folder with a "
            "sub-folder for each, or a list with a label column; or ask for health only."
        )
    return problem


def _classes(images: Any) -> set[Any]:
    """Classes that are known before anything is extracted."""
    if is_folder(images):
        return set()  # known when it is opened
    inputs = Inputs(images)
    labels = getattr(inputs.images, "labels", None)
    return _classes_of(
        None if labels is None else [NO_LABEL if i is None else i for i in labels], inputs.classes
    )


def _classes_of(labels: Any, classes: Any) -> set[Any]:
    numbers = set() if labels is None else {int(i) for i in np.unique(labels)} - {NO_LABEL}
    return numbers if classes is None else {classes[i] for i in numbers}
