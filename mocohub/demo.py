"""The whole line in one function: images, pre-training, features, probes, export, and a report to look at."""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, normalize
from torch import nn

from mocohub.features.extract import extract
from mocohub.features.store import Features
from mocohub.files import read_json, refuse_existing, write_json
from mocohub.hub.export import export
from mocohub.hub.load import load
from mocohub.pretrain.loop import build, train
from mocohub.pretrain.recipes import Recipe, recipe_by_name
from mocohub.probes.knn import KNNProbe
from mocohub.probes.linear import LinearProbe
from mocohub.probes.lowshot import LowShotResult, low_shot
from mocohub.report import Neighbours, Report, check_installed, write_report
from mocohub.sources import ImageList, list_images

_VAL_SHARE = 0.2
_PIXEL_PX = 32  # photos are shrunk to this side before their pixels are compared
_GALLERY_ROWS, _NEIGHBOURS, _MAP_POINTS = 10, 7, 1500


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
    """Pre-train on a few images, probe the features beside pixels and an untrained network, and write a report.

    Args:
        data: Images, as `mocohub.list_images` takes them; by default scikit-learn's 1,797 scans of digits.
            A folder with `train` and `val` in it is used as it is split; other images are split 80 to 20.
        out: Folder for the run, the features, the exported model, results.json and report.html.
        recipe: Name of the recipe; by default `moco_tiny_digits` for the digits, `moco_tiny_photos` else.
            Queue and batch are shrunk to fit few images.
        overrides: "field=value" changes to the recipe.
        license: Licence of the exported weights, a Hub identifier.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
        num_workers: Processes that decode; by default one per core, at most 8.
        draws: Draws of labelled images in the low-shot rows of the table.

    Returns:
        Path of report.html.
    """
    began = time.perf_counter()
    check_installed()
    out = refuse_existing(out)
    recipe_name = recipe or ("moco_tiny_photos" if data else "moco_tiny_digits")
    chosen = recipe_by_name(recipe_name, overrides)
    images, val = _split(_write_digits(out / "data") if data is None else Path(data))
    chosen = _fit(chosen, len(images))
    labelled = images.labels is not None and val.labels is not None
    print(f"{len(images)} images to train on, {len(val)} to test", flush=True)

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
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def features(model: nn.Module, folder: str) -> tuple[Features, Features]:
        extracted = (
            extract(model, some, out=out / "features" / folder / name, device=device, num_workers=num_workers)
            for name, some in (("train", images), ("val", val))
        )
        return tuple(extracted)

    moco = features(load(run), "moco")
    untrained = features(build(chosen, torch.device("cpu")).query.backbone, "untrained")
    pixels = tuple(_pixels(some, f.ids) for some, f in zip((images, val), moco, strict=True))
    results: dict[str, list[LowShotResult]] = {}
    probes: list[dict[str, Any]] = []
    if labelled:
        values = {
            "raw pixels": pixels,
            "untrained network": [f.values for f in untrained],
            "MoCo": [f.values for f in moco],
        }
        targets = [f.targets for f in moco]
        results = {name: _low_shot(train_and_val, targets, draws) for name, train_and_val in values.items()}
        probes = _card_probes(moco, _name_of(data))
        rows = {name: [dataclasses.asdict(r) for r in of_name] for name, of_name in results.items()}
        write_json(out / "results.json", {"low_shot": rows, "probes": probes})

    exported = export(run, out / "model", license=license, name=recipe_name, probes=probes)
    _verify(exported, val, moco[1])
    minutes = (time.perf_counter() - began) / 60
    head, table = _table(results)
    report = Report(
        title=f"MoCo on {_name_of(data)}",
        summary=_summary(results, log, minutes),
        facts=_facts(run, images, minutes),
        log=log,
        table_head=head,
        table=table,
        table_note=f"Accuracy in % on {len(val)} test images: mean ± standard deviation over {draws} draws of the "
        "labelled images, the same draws in every row. Logistic regression on L2-normalised features; the "
        "network saw no label.",
        gallery=_gallery(images, val, moco, pixels),
        map_points=_map(moco[1].values[:_MAP_POINTS]),
        map_labels=list(moco[1].targets[:_MAP_POINTS]) if labelled else None,
        map_images=[val.decode(int(i)) for i in moco[1].ids[:_MAP_POINTS]],
        map_note="Test images, placed by t-SNE: near means similar to the model.",
        commands=_commands(out),
    )
    path = write_report(report, out / "report.html")
    for row in (head, *table):
        print("".join(f"{cell:<22}" if i == 0 else f"{cell:>18}" for i, cell in enumerate(row)))
    print(f"{report.summary}\n{path}")
    return path


def _name_of(data: str | Path | None) -> str:
    return "scikit-learn's hand-written digits" if data is None else Path(data).resolve().name


def _write_digits(folder: Path) -> Path:
    """Write scikit-learn's hand-written digits (8 px grey scans) as PNG files, FOLDER/<digit>/<number>.png."""
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
    return images.subset([i for i in range(len(images)) if i not in chosen]), images.subset(sorted(test))


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


def _pixels(images: ImageList, ids: np.ndarray) -> np.ndarray:
    """Raw pixels, shrunk to 32 px where larger, as rows (N, 3 * side * side)."""
    side = min(_PIXEL_PX, *images.decode(int(ids[0])).size)
    rows = [images.decode(int(i)).resize((side, side), Image.Resampling.BILINEAR) for i in ids]
    return np.stack([np.asarray(row, np.float32).ravel() / 255 for row in rows])


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
    return [
        {
            "dataset": dataset,
            "split": "test images of mocohub demo",
            "num_images": len(val_features),
            "metric": "top-1 (%)",
            "protocol": protocol,
            "value": round(
                100
                * probe.fit(train_features.values, train_features.targets).score(
                    val_features.values, val_features.targets
                ),
                2,
            ),
        }
        for protocol, probe in probes.items()
    ]


def _verify(exported: Path, images: ImageList, features: Features) -> None:
    """Make sure the exported folder gives the features the run gave."""
    some = features.ids[:64]
    again = extract(load(exported), images.subset([int(i) for i in some]), num_workers=0, progress=False)
    difference = float(np.abs(again.values - features.values[:64]).max())
    if difference > 1e-4:
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


def _facts(run: Path, images: ImageList, minutes: float) -> dict[str, str]:
    facts = read_json(run / "run.json")
    recipe = facts["recipe"]
    return {
        "images": f"{len(images)} for training, ids and order from {Path(images.source).name}",
        "recipe": f"{facts['recipe_name']}: {recipe['backbone']}, {recipe['crop_px']} px, queue {recipe['queue_size']}, "
        f"batch {recipe['global_batch_size']}, batch-norm groups of {recipe['bn_group_size']}, "
        f"{recipe['epochs']} epochs, temperature {recipe['temperature']}, key momentum {recipe['key_momentum']}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "commit": facts["commit"] or "installed package",
        "time": f"{minutes:.1f} minutes on {len(os.sched_getaffinity(0))} CPU cores"
        + (f" and {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }


def _gallery(
    images: ImageList, val: ImageList, features: Sequence[Features], pixels: Sequence[np.ndarray]
) -> list[Neighbours]:
    """One test image of each class (or some), and its nearest training images by features and by pixels."""
    train_features, val_features = features
    names = [f.targets if f.labels is not None else None for f in features]
    if names[1] is not None:
        rows = sorted(
            int(np.flatnonzero(names[1] == name)[0]) for name in np.unique(names[1])[:_GALLERY_ROWS]
        )
        rows.sort(key=lambda row: str(names[1][row]))
    else:
        rows = np.linspace(0, len(val_features) - 1, _GALLERY_ROWS).astype(int).tolist()
    spaces = {"by MoCo features": [f.values for f in features], "by pixels": pixels}
    nearest = {
        space: NearestNeighbors(n_neighbors=_NEIGHBOURS, metric="cosine")
        .fit(bank)
        .kneighbors(queries[rows])[1]
        for space, (bank, queries) in spaces.items()
    }

    def label(which: int, row: int) -> str:
        return "" if names[which] is None else str(names[which][row])

    return [
        Neighbours(
            query=val.decode(int(val_features.ids[row])),
            query_label=label(1, row),
            rows={
                space: [
                    (
                        images.decode(int(train_features.ids[n])),
                        label(0, n),
                        None if names[0] is None else bool(names[0][n] == names[1][row]),
                    )
                    for n in found[i]
                ]
                for space, found in nearest.items()
            },
        )
        for i, row in enumerate(rows)
    ]


def _map(values: np.ndarray) -> np.ndarray:
    """Two dimensions for the eye, (N, 2)."""
    perplexity = min(30, (len(values) - 1) / 3)
    unit = normalize(values)
    return TSNE(
        perplexity=perplexity, init="pca" if min(unit.shape) > 2 else "random", random_state=0
    ).fit_transform(unit)


def _commands(out: Path) -> list[tuple[str, str]]:
    return [
        ("This page, for a folder of your images (sub-folders are classes)", "mocohub demo --data FOLDER --out my-demo"),
        ("Step by step: train, export, extract, probe", "\n".join((
            "mocohub pretrain moco_tiny_photos --data FOLDER/train --out runs/mine",
            "mocohub export runs/mine --out models/mine --license other",
            "mocohub extract models/mine --data FOLDER/train --out features/train",
            "mocohub extract models/mine --data FOLDER/val --out features/val",
            "mocohub knn features/train features/val",
        ))),
        ("This model in stock timm, after `import mocohub` for the small-image network", "\n".join((
            "import mocohub, timm",
            f'model = timm.create_model("local-dir:{out / "model"}", pretrained=True).eval()',
        ))),
    ]  # fmt: skip
