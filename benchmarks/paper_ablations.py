"""Three claims of the MoCo paper (arXiv 1911.05722) on CIFAR-10, at a size a CPU can do.

    python benchmarks/paper_ablations.py --data cifar10 --seeds 3
    python benchmarks/paper_ablations.py --data cifar10 --seeds 3 --scale full --device cuda

`cifar10` holds train/<class>/ and test/<class>/. The measure is the kNN monitor of `mocohub.train`.

mechanisms  Figure 3: queue, end to end and memory bank against the number of negatives K
momentum    section 4.1, table of the momentum of the key encoder: m = 0 fails, slow keys are best
shuffling   appendix A.9: without shuffling, contrast accuracy is higher and kNN accuracy lower

Each run is a line of OUT/runs.jsonl, with its settings; what is there is not run again, so the runs may be
spread over time, or over machines whose files are put together. Tables and figures are made of what there is.
"""

import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

import mocohub
from mocohub.errors import missing_extra
from mocohub.pretrain.build import build
from mocohub.pretrain.monitor import knn_accuracy
from mocohub.pretrain.recipe import Augmentation, Recipe
from mocohub.pretrain.recipes import recipe_by_name
from mocohub.sources import ImageList


@dataclass(frozen=True)
class Scale:
    """How much is trained, and where the claims are looked at."""

    recipe: Recipe
    num_train: int  # images, which vote in the kNN as well
    num_test: int
    queue_sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # of end to end, whose K is one less
    group_size_of_shuffling: int
    monitor_every_epochs: int


def tiny() -> Scale:
    """Half a minute a run on one core: an eighth of a ResNet-18's width, half its depth, a tenth of the images."""
    recipe = replace(
        recipe_by_name("moco_tiny_cifar10"),
        model_args={"layers": [1, 1, 1, 1], "stem_chs": 8, "channels": [8, 16, 32, 64]},
        queue_size=1024,
        key_momentum=0.999,
        temperature=0.1,
        augmentation=Augmentation(jitter_probability=0.8, hue=0.0, colour_order="jitter_first"),
        crop_px=16,
        epochs=8,
        global_batch_size=64,
        bn_group_size=8,
        base_lr=0.06,
    )
    return Scale(recipe, 5_000, 2_000, (64, 256, 1024, 4096), (64, 128, 256), 8, 4)


def full() -> Scale:
    """The published CIFAR-10 setting, on all images: hours a run on a card."""
    recipe = recipe_by_name("moco_r18_cifar10")
    return Scale(recipe, 50_000, 10_000, (512, 2048, 4096, 16384), (256, 512, 1024, 2048), 32, 20)


class Experiment(NamedTuple):
    """A point of a figure, for all seeds."""

    claim: str
    line: str
    x: float
    recipe: Recipe


def experiments(scale: Scale) -> list[Experiment]:
    """List the points of the three figures. A recipe that is in two of them is run once."""
    base, points = scale.recipe, []
    for size in scale.queue_sizes:
        points.append(Experiment("mechanisms", "queue", size, replace(base, queue_size=size)))
        bank = replace(base, queue_size=size, mechanism="memory_bank")
        points.append(Experiment("mechanisms", "memory bank", size, bank))
    for size in scale.batch_sizes:
        # The paper scales the learning rate of end to end with its batch, and so with K.
        lr = base.base_lr * size / base.global_batch_size
        recipe = replace(base, mechanism="end_to_end", global_batch_size=size, base_lr=lr)
        points.append(Experiment("mechanisms", "end to end", size - 1, recipe))
    for m in (0.0, 0.9, 0.99, 0.999, 0.9999):
        points.append(Experiment("momentum", "queue", m, replace(base, key_momentum=m)))
    for shuffle in (True, False):
        recipe = replace(base, shuffle_bn=shuffle, bn_group_size=scale.group_size_of_shuffling)
        points.append(Experiment("shuffling", "shuffled" if shuffle else "not shuffled", shuffle, recipe))
    return points


def subset(images: ImageList, size: int) -> ImageList:
    """Return `size` images evenly spread over a list that is sorted by class: as many of each class."""
    chosen = [i * len(images) // size for i in range(size)]
    paths, labels = ([values[i] for i in chosen] for values in (images.paths, images.labels))
    return replace(images, paths=paths, labels=labels)


class Runs:
    """Results on disk, a JSON line each: key, settings, kNN and contrast accuracy over time."""

    def __init__(self, out: Path, train: ImageList, test: ImageList, device: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.train, self.test, self.device = out / "runs.jsonl", train, test, device
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows = {row["key"]: row for row in map(json.loads, lines)}

    def key(self, recipe: Recipe | str) -> str:
        """Name what was run on what."""
        settings = recipe if isinstance(recipe, str) else recipe.to_json()
        facts = [settings, self.train.fingerprint(), self.test.fingerprint()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __getitem__(self, recipe: Recipe | str) -> dict[str, Any] | None:
        return self.rows.get(self.key(recipe))

    def add(self, recipe: Recipe | str, **result: Any) -> None:
        """Write a result down."""
        settings = recipe if isinstance(recipe, str) else recipe.to_json()
        row = {"key": self.key(recipe), **result, "settings": settings}
        self.rows[row["key"]] = row
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def train_one(self, recipe: Recipe, monitor_every_epochs: int) -> None:
        """Train and note the curves."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = mocohub.train(
                recipe,
                self.train,
                Path(folder, "run"),
                val=self.test,
                device=self.device,
                num_workers=0 if self.device == "cpu" else None,
                log_every_steps=max(1, len(self.train) // recipe.global_batch_size // 2),
                save_every_epochs=recipe.epochs,
                monitor_every_epochs=monitor_every_epochs,
            )
            log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        contrast = [row for row in log if "loss" in row]
        knn = [[row["epoch"], row["knn_accuracy"]] for row in log if "knn_accuracy" in row]
        self.add(
            recipe,
            knn=knn[-1][1],
            knn_curve=[[round(epoch, 3), accuracy] for epoch, accuracy in knn],
            contrast_curve=[
                [round(row["epoch"], 3), round(row["loss"], 4), round(row["pretext_accuracy"], 4)]
                for row in contrast
            ],
            chance_loss=contrast[-1]["chance_loss"],
            seconds=round(time.perf_counter() - start, 1),
        )

    def base_lines(self, recipe: Recipe) -> None:
        """Note the kNN accuracy of this seed's untrained network and, once, of pixels."""
        name = f"untrained {recipe.seed} {recipe.crop_px} {recipe.model_args} {recipe.backbone}"
        if not self[name]:
            moco = build(recipe, torch.device(self.device))
            self.add(name, knn=knn_accuracy(moco.query.backbone, self.train, self.test))
        if not self["pixels"]:
            rows = [
                np.stack([np.asarray(images.decode(i)).ravel() / 127.5 - 1 for i in range(len(images))])
                for images in (self.train, self.test)
            ]
            probe = mocohub.KNNProbe(k=200, temperature=0.1).fit(rows[0].astype("f4"), self.train.labels)
            self.add("pixels", knn=probe.score(rows[1].astype("f4"), self.test.labels))
