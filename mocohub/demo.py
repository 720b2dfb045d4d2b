"""The whole line in one function: images, pre-training, features, probes, export, and a report to look at."""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from torch import nn

from mocohub.distributed import num_cpus
from mocohub.errors import unknown
from mocohub.features.extract import extract
from mocohub.features.store import Features
from mocohub.files import read_json, refuse_existing, write_json
from mocohub.hub.cards import HUB_LICENSES
from mocohub.hub.export import export
from mocohub.hub.load import load
from mocohub.pretrain.loop import build, train
from mocohub.pretrain.recipe import Recipe, check, override
from mocohub.pretrain.recipes import recipe_by_name
from mocohub.probes.inputs import checked_device
from mocohub.probes.knn import KNNProbe
from mocohub.probes.linear import LinearProbe
from mocohub.probes.lowshot import LowShotResult, low_shot
from mocohub.report import Report, check_installed, gallery, tsne, write_report
from mocohub.sources import ImageList, list_images

_VAL_SHARE = 0.2
_PIXEL_PX = 32  # photos are shrunk to this side before their pixels are compared
_LEAST_MAP_POINTS, _MAP_POINTS = 10, 1500


def demo(
    data: str | Path | None = None,
    out: str | Path = "mocohub-demo",
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    license: str = "other",
    device: str | None = None,
    num_workers: int | None = None,
    draws: int = 20,
) -> Path:
    """Pre-train on a few images, probe the features beside pixels and an untrained network, write a report.

    Args:
        data: Images, as `mocohub.list_images` takes them; by default scikit-learn's 1,797 scans of digits.
            A folder with `train` and `val` in it is used as it is split; other images are split 80 to 20.
        out: Folder for the run, the features, the exported model, results.json and report.html.
        recipe: Name of the recipe; by default `moco_tiny_digits` for the digits, `moco_tiny_photos` else.
            Queue, batch and learning rate are shrunk to fit few images.
        overrides: "field=value" changes to the recipe, made after that.
        license: Licence of the exported weights, a Hub identifier.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
        num_workers: Processes that decode; by default what `train` and `extract` choose.
        draws: Draws of labelled images in the low-shot rows of the table.

    Returns:
        Path of report.html.
    """
    began = time.perf_counter()
    check_installed()
    out = refuse_existing(out)
    recipe_name = recipe or ("moco_tiny_photos" if data else "moco_tiny_digits")
    name = "scikit-learn's hand-written digits" if data is None else Path(data).resolve().name
    chosen = recipe_by_name(recipe_name)
    if license not in HUB_LICENSES:
        raise unknown("license", license, HUB_LICENSES)
    if draws < 1:
        raise ValueError(f"draws ({draws}) must be at least 1.")
    if device is not None:
        checked_device(device)
    override(chosen, overrides)  # so that a wrong one is refused before the digits are written
    images, val = _split(_write_digits(out / "data") if data is None else Path(data))
    labelled = _labelled(images, val)
    chosen = override(_fit(chosen, len(images)), overrides)
    try:
        check(chosen, len(images))
    except ValueError:
        if data is None:
            shutil.rmtree(out)
        raise
    print(f"{name}: {len(images)} images to train on, {len(val)} to test", flush=True)

    run = train(
        chosen,
        images,
        out / "run",
        recipe_name=recipe_name,
        val=val if labelled else None,
        device=device,
        num_workers=num_workers,
        monitor_every_epochs=max(1, chosen.epochs // 10),
        save_every_epochs=chosen.epochs,
    )

    def features(model: nn.Module, folder: str) -> list[Features]:
        return [
            extract(  # in float32, so that machines agree on the table
                model,
                some,
                out=out / "features" / folder / split,
                device=device,
                num_workers=num_workers,
                dtype="float32",
            )
            for split, some in (("train", images), ("val", val))
        ]

    moco = features(load(run), "moco")
    untrained = features(build(chosen, torch.device("cpu")).query.backbone, "untrained")
    values = {
        "raw pixels": _pixels((images, val), moco),
        "untrained network": [f.values for f in untrained],
        "MoCo": [f.values for f in moco],
    }
    results, probes = {}, []
    if labelled:
        targets = [f.targets for f in moco]
        results = {space: _low_shot(of_space, targets, draws) for space, of_space in values.items()}
        probes = _card_probes(moco, name)
        rows = {space: [dataclasses.asdict(r) for r in of_space] for space, of_space in results.items()}
        write_json(out / "results.json", {"low_shot": rows, "probes": probes})
    exported = export(run, out / "model", license=license, name=recipe_name, probes=probes)
    _verify(exported, val, moco[1], device)

    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    minutes = (time.perf_counter() - began) / 60
    head, table = _table(results)
    spaces = {"by MoCo features": values["MoCo"], "by pixels": values["raw pixels"]}
    examples, gallery_note = gallery(images, val, spaces, *moco)
    report = Report(
        title=f"MoCo on {name}",
        summary=_summary(results, log, minutes),
        facts=_facts(run, minutes, device),
        log=log,
        table_head=head,
        table=table,
        table_note=f"Accuracy in % on {len(val)} test images: mean ± standard deviation over {draws} draws "
        "of the labelled images, the same draws in every row. Logistic regression on L2-normalised "
        "features; the network saw no label.",
        gallery=examples,
        gallery_note=gallery_note,
        map_points=tsne(moco[1].values[:_MAP_POINTS]) if len(moco[1]) >= _LEAST_MAP_POINTS else None,
        map_labels=moco[1].targets[:_MAP_POINTS].astype(str).tolist() if labelled else None,
        map_images=[val.decode(int(i)) for i in moco[1].ids[:_MAP_POINTS]],
        map_note="Test images, placed by t-SNE: near means similar to the model.",
        commands=_commands(out),
    )
    path = write_report(report, out / "report.html")
    for row in (head, *table):
        print("".join(f"{cell:<20}" if i == 0 else f"{cell:>20}" for i, cell in enumerate(row)))
    print(f"{report.summary}\n{path}")
    return path


def _write_digits(folder: Path) -> Path:
    """Write scikit-learn's hand-written digits (8 px grey scans) to FOLDER/<digit>/<number>.png."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scan * 255 / 16).round().astype(np.uint8)).save(path)
    return folder


def _split(data: str | Path) -> tuple[ImageList, ImageList]:
    """Return training and test images: as the folder is split, or one in five of each class for the test."""
    data = Path(data)
    for name in ("val", "test"):
        if (data / "train").is_dir() and (data / name).is_dir():
            return list_images(data / "train"), list_images(data / name)
    images = list_images(data)
    labels = images.labels or [0] * len(images)
    order = np.random.default_rng(0).permutation(len(images))
    test: list[int] = []
    for label in set(labels):
        of_class = [int(i) for i in order if labels[i] == label]
        test += of_class[: int(len(of_class) * _VAL_SHARE)]
    chosen = set(test)
    if not test:
        raise ValueError(
            f"{len(images)} images are too few to keep one in five for the test: a class needs five. "
            "Give more images, or a folder with `train` and `val` in it."
        )
    return images.subset([i for i in range(len(images)) if i not in chosen]), images.subset(sorted(test))


def _labelled(images: ImageList, val: ImageList) -> bool:
    """Whether all images have labels; refuses a test class that has no training image."""
    if any(None in (some.labels or [None]) for some in (images, val)):
        return False
    unseen = {val.classes[i] for i in val.labels} - {images.classes[i] for i in images.labels}
    if unseen:
        raise ValueError(f"The test images have classes that no training image has: {sorted(unseen)}.")
    return True


def _fit(recipe: Recipe, num_images: int) -> Recipe:
    """Shrink queue and batch to few images; `recipes.check` refuses what is too few even so."""
    queue_size = min(recipe.queue_size, 1 << max(0, (num_images - 1).bit_length() - 1))
    batch = recipe.global_batch_size
    while batch > num_images // 4 and batch > 16:
        batch //= 2
    group = min(recipe.bn_group_size, batch)
    return dataclasses.replace(
        recipe, queue_size=queue_size, global_batch_size=batch, bn_group_size=group,
        base_lr=recipe.base_lr * batch / recipe.global_batch_size,
    )  # fmt: skip


def _pixels(lists: Sequence[ImageList], features: Sequence[Features]) -> list[np.ndarray]:
    """Raw pixels of the images that have features, squares of 32 px or less, as rows (N, 3 * side * side)."""
    side = min(_PIXEL_PX, *lists[0].decode(int(features[0].ids[0])).size)

    def row(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32).ravel() / 255

    return [
        np.stack([row(images.decode(int(i))) for i in f.ids])
        for images, f in zip(lists, features, strict=True)
    ]


def _low_shot(values: Sequence[np.ndarray], targets: Sequence[np.ndarray], draws: int) -> list[LowShotResult]:
    """Accuracy at 1, 5 and all labels per class, as far as every class has them."""
    fewest = np.unique(targets[0], return_counts=True)[1].min()
    shots = [num for num in (1, 5) if num <= fewest]
    return low_shot(values[0], targets[0], values[1], targets[1], shots=(*shots, None), draws=draws)


def _card_probes(features: Sequence[Features], dataset: str) -> list[dict[str, Any]]:
    """What the model card says was measured, with all labels."""
    train_features, val_features = features
    k = min(200, len(train_features))
    probes = {
        f"weighted kNN, cosine, k = {k}, T = 0.1": KNNProbe(k=k, temperature=0.1),
        "logistic regression on cached, L2-normalised features, C = 10": make_pipeline(
            Normalizer(), LinearProbe("lbfgs", C=10.0)
        ),
    }
    records = []
    for protocol, probe in probes.items():
        probe.fit(train_features.values, train_features.targets)
        record = {
            "dataset": dataset,
            "split": "test images of mocohub demo",
            "num_images": len(val_features),
            "metric": "top-1 (%)",
            "protocol": protocol,
            "value": round(100 * probe.score(val_features.values, val_features.targets), 2),
        }
        records.append(record)
    return records


def _verify(exported: Path, images: ImageList, features: Features, device: str | None) -> None:
    """Make sure the exported folder gives the features the run gave."""
    some = features.ids[:64]
    some_images = images.subset([int(i) for i in some])
    again = extract(
        load(exported), some_images, device=device, num_workers=0, dtype="float32", progress=False
    )
    difference = float(np.abs(again.values - features.values[:64]).max())
    if difference > 1e-3 * float(np.abs(features.values[:64]).max()):
        raise RuntimeError(
            f"{exported} gives other features than the run it comes from, by up to {difference:g}."
        )


def _table(results: dict[str, list[LowShotResult]]) -> tuple[list[str], list[list[str]]]:
    if not results:
        return [], []
    shots = [r.shots for r in next(iter(results.values()))]
    head = ["", *("all labels" if s is None else f"{s} label{'s' * (s > 1)} per class" for s in shots)]

    def cell(result: LowShotResult) -> str:
        spread = "" if result.std is None else f" ± {100 * result.std:.1f}"
        return f"{100 * result.mean:.1f}{spread}"

    return head, [[name, *map(cell, rows)] for name, rows in results.items()]


def _summary(results: dict[str, list[LowShotResult]], log: list[dict[str, Any]], minutes: float) -> str:
    last = [row for row in log if "loss" in row][-1]
    text = f"Pre-trained for {last['step']} steps without labels, {minutes:.1f} minutes in all"
    if results:
        first = {name: 100 * rows[0].mean for name, rows in results.items()}
        others = " and ".join(f"{value:.0f} % for {name}" for name, value in first.items() if name != "MoCo")
        labels = "1 label per class" if results["MoCo"][0].shots == 1 else "all labels"
        return f"{text}. With {labels}: {first['MoCo']:.0f} % for MoCo, {others}."
    return f"{text}; the loss is {last['loss']:.2f} (chance {last['chance_loss']:.2f})."


def _facts(run: Path, minutes: float, device: str | None) -> dict[str, str]:
    facts = read_json(run / "run.json")
    names = (
        "backbone",
        "crop_px",
        "queue_size",
        "global_batch_size",
        "bn_group_size",
        "epochs",
        "temperature",
    )
    settings = ", ".join(f"{name} {facts['recipe'][name]}" for name in names)
    on_card = device != "cpu" and torch.cuda.is_available()
    card = f" and {torch.cuda.get_device_name()}" if on_card else ""
    return {
        "recipe": f"{facts['recipe_name']} ({settings})",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "commit": facts["commit"] or "installed package",
        "time": f"{minutes:.1f} minutes on {num_cpus()} CPU cores{card}",
    }


def _commands(out: Path) -> list[tuple[str, str]]:
    steps = """\
mocohub pretrain moco_tiny_photos --data FOLDER/train --val FOLDER/val --out runs/mine
mocohub export runs/mine --out models/mine --license other
mocohub extract models/mine --data FOLDER/train --out features/train
mocohub extract models/mine --data FOLDER/val --out features/val
mocohub knn features/train features/val"""
    in_timm = f"""\
import mocohub  # makes the small-image networks known to timm; others need timm alone
import timm

model = timm.create_model("local-dir:{out / "model"}", pretrained=True).eval()"""
    return [
        ("All of this page, for a folder of yours", "mocohub demo --data FOLDER --out my-demo"),
        ("Step by step", steps),
        ("The model of this page, in timm", in_timm),
    ]
