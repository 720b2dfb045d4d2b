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

import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
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

CLAIMS = ("shuffling", "momentum", "mechanisms")
RESULTS = Path(__file__).parent / "results" / "paper_ablations"
KNN = "kNN accuracy, %"


@dataclass(frozen=True)
class Scale:
    """How much is trained, and where the claims are looked at."""

    recipe: Recipe
    num_train: int  # images, which vote in the kNN as well
    num_test: int
    queue_sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # of end to end, whose K is one less
    monitor_every_epochs: int  # where curves are drawn; else only the end is looked at


def tiny() -> Scale:
    """Under a minute a run on one core: a tenth of the images, at half their size, and 86,000 weights."""
    recipe = replace(
        recipe_by_name("moco_tiny_cifar10"),
        model_args={"layers": [1, 1, 1, 1], "stem_chs": 8, "channels": [8, 16, 32, 64]},
        queue_size=512,
        key_momentum=0.999,
        temperature=0.1,
        augmentation=Augmentation(jitter_probability=0.8, hue=0.0, colour_order="jitter_first"),
        crop_px=16,
        epochs=6,
        global_batch_size=64,
        bn_group_size=8,
        base_lr=0.06,
    )
    return Scale(recipe, 5_000, 2_000, (64, 512, 4096), (64, 256), 2)


def full() -> Scale:
    """The published CIFAR-10 setting, on all images: hours a run on a card."""
    recipe = recipe_by_name("moco_r18_cifar10")
    return Scale(recipe, 50_000, 10_000, (512, 2048, 4096, 16384), (256, 512, 1024, 2048), 20)


class Experiment(NamedTuple):
    """A point of a figure, for all seeds."""

    claim: str
    line: str
    x: float
    recipe: Recipe


def experiments(scale: Scale) -> list[Experiment]:
    """List the points of the three figures. A recipe that is in two of them is run once."""
    base, points = scale.recipe, []
    for line, shuffle in (("shuffled", True), ("not shuffled", False)):
        recipe = replace(base, shuffle_bn=shuffle)
        points.append(Experiment("shuffling", line, base.bn_group_size, recipe))
    for m in (0.0, 0.9, 0.99, 0.999, 0.9999):
        points.append(Experiment("momentum", "queue", m, replace(base, key_momentum=m)))
    for size in scale.queue_sizes:
        points.append(Experiment("mechanisms", "queue", size, replace(base, queue_size=size)))
    for size in scale.queue_sizes:
        recipe = replace(base, queue_size=size, mechanism="memory_bank")
        points.append(Experiment("mechanisms", "memory bank", size, recipe))
    for size in scale.batch_sizes:
        # The paper scales the learning rate of end to end with its batch, and so with K.
        lr = base.base_lr * size / base.global_batch_size
        recipe = replace(base, mechanism="end_to_end", global_batch_size=size, base_lr=lr)
        points.append(Experiment("mechanisms", "end to end", size - 1, recipe))
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
        facts = [_settings(recipe), self.train.fingerprint(), self.test.fingerprint()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __getitem__(self, recipe: Recipe | str) -> dict[str, Any] | None:
        return self.rows.get(self.key(recipe))

    def add(self, recipe: Recipe | str, **result: Any) -> dict[str, Any]:
        """Write a result down and return it."""
        row = {"key": self.key(recipe), **result, "settings": _settings(recipe)}
        self.rows[row["key"]] = row
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def train_one(self, recipe: Recipe, monitor_every_epochs: int) -> dict[str, Any]:
        """Train, note the curves and return them."""
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
        return self.add(
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
        name = untrained_name(recipe)
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


def _settings(recipe: Recipe | str) -> dict[str, Any] | str:
    """Return the fields that are not at their defaults, so that a new field leaves old results valid."""
    if isinstance(recipe, str):
        return recipe
    fields, defaults = recipe.to_json(), Recipe().to_json()
    changed = {
        f"augmentation.{name}": value
        for name, value in fields.pop("augmentation").items()
        if value != defaults["augmentation"][name]
    }
    return {name: value for name, value in fields.items() if value != defaults[name]} | changed


def summary(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def tables(points: list[Experiment], runs: Runs, seeds: int) -> str:
    """Return a Markdown table for each claim: means and standard deviations over the seeds that are there."""
    lines = []
    for claim in dict.fromkeys(point.claim for point in points):
        lines += [f"\n{claim}\n", "| | x | kNN, % | contrast accuracy, % | loss / chance | seeds |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for point in (p for p in points if p.claim == claim):
            rows = finished(point, runs, seeds)
            if rows:
                contrast = [row["contrast_curve"][-1][2] for row in rows]
                loss = statistics.mean(row["contrast_curve"][-1][1] / row["chance_loss"] for row in rows)
                knn = summary([row["knn"] for row in rows])
                lines.append(
                    f"| {point.line} | {point.x:g} | {knn} | {summary(contrast)} | {loss:.2f} | {len(rows)} |"
                )
    for name, rows in base_line_rows(points[0].recipe, runs, seeds).items():
        lines.append(f"\n{name}: kNN {summary([row['knn'] for row in rows])} %")
    return "\n".join(lines)


def finished(point: Experiment, runs: Runs, seeds: int) -> list[dict[str, Any]]:
    """Return the results of a point that are there, by seed."""
    rows = [runs[replace(point.recipe, seed=seed)] for seed in range(seeds)]
    return [row for row in rows if row]


def base_line_rows(recipe: Recipe, runs: Runs, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Return the results to compare with: untrained networks and pixels."""
    untrained = [runs[untrained_name(replace(recipe, seed=seed))] for seed in range(seeds)]
    found = {"untrained network": [row for row in untrained if row], "pixels": [runs["pixels"]]}
    return {name: rows for name, rows in found.items() if rows and rows[0]}


def untrained_name(recipe: Recipe) -> str:
    """Name the untrained network of a recipe in the results."""
    return f"untrained {recipe.backbone} {recipe.model_args} {recipe.crop_px} px, seed {recipe.seed}"


def draw(points: list[Experiment], runs: Runs, seeds: int, out: Path) -> None:
    """Write OUT/<claim>.png for each claim that has results."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "report", "Drawing figures") from None
    panels = {
        "mechanisms": (knn_against_x,),
        "momentum": (knn_against_x, loss_over_time),
        "shuffling": (
            partial(curve_over_time, curve="contrast_curve", label="contrast accuracy, %"),
            partial(curve_over_time, curve="knn_curve", label=KNN),
        ),
    }
    base_lines = base_line_rows(points[0].recipe, runs, seeds)
    for claim, draw_panels in panels.items():
        done = [(point, finished(point, runs, seeds)) for point in points if point.claim == claim]
        done = [(point, rows) for point, rows in done if rows]
        if not done:
            continue
        figure = Figure(figsize=(5 * len(draw_panels), 3.6), layout="constrained")
        all_axes = figure.subplots(1, len(draw_panels), squeeze=False)[0]
        for axes, draw_panel in zip(all_axes, draw_panels, strict=True):
            draw_panel(axes, done)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_ylabel() == KNN:
                for name, rows in base_lines.items():
                    level = 100 * statistics.mean(row["knn"] for row in rows)
                    axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
                    axes.annotate(
                        name,
                        (0.01, level),
                        (0, 2),
                        xycoords=("axes fraction", "data"),
                        textcoords="offset points",
                        color="grey",
                        fontsize=8,
                    )
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(frameon=False, fontsize=8)
        figure.savefig(out / f"{claim}.png", dpi=110)


def knn_against_x(axes: Any, done: list[tuple[Experiment, list[dict[str, Any]]]]) -> None:
    """Final kNN accuracy, mean and standard deviation over seeds, against K or the momentum."""
    xs = sorted({point.x for point, _ in done})
    of_k = done[0][0].claim == "mechanisms"
    for line in dict.fromkeys(point.line for point, _ in done):
        of_line = [
            (point.x, [100 * row["knn"] for row in rows]) for point, rows in done if point.line == line
        ]
        places = [x if of_k else xs.index(x) for x, _ in of_line]
        means = [statistics.mean(knn) for _, knn in of_line]
        spreads = [statistics.stdev(knn) if len(knn) > 1 else 0 for _, knn in of_line]
        axes.errorbar(places, means, spreads, marker="o", capsize=3, label=line)
    if of_k:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("K, number of negatives")
    else:
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_xlabel("m, momentum of the key encoder")
    axes.set_ylabel(KNN)


def loss_over_time(axes: Any, done: list[tuple[Experiment, list[dict[str, Any]]]]) -> None:
    """The loss of the first seed."""
    for point, rows in done:
        epochs, losses, _ = zip(*rows[0]["contrast_curve"], strict=True)
        axes.plot(epochs, losses, label=f"m = {point.x:g}")
    axes.axhline(done[0][1][0]["chance_loss"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss, nats (dotted: chance)")


def curve_over_time(
    axes: Any, done: list[tuple[Experiment, list[dict[str, Any]]]], curve: str, label: str
) -> None:
    """The last column of a curve, in percent: mean over seeds, and one standard deviation on either side."""
    for point, rows in done:
        epochs = [values[0] for values in rows[0][curve]]
        percent = 100 * np.array([[values[-1] for values in row[curve]] for row in rows])  # (seeds, T)
        mean, spread = percent.mean(0), percent.std(0, ddof=1 if len(rows) > 1 else 0)
        axes.plot(epochs, mean, marker=".", label=point.line)
        axes.fill_between(epochs, mean - spread, mean + spread, alpha=0.2)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)


def main(
    data: Annotated[Path, tyro.conf.arg(help="Folder with train/<class>/ and test/<class>/.")],
    out: Annotated[Path, tyro.conf.arg(help="Where results are and go.")] = RESULTS,
    scale: Annotated[Literal["tiny", "full"], tyro.conf.arg(help="tiny: a CPU; full: a card.")] = "tiny",
    seeds: Annotated[int, tyro.conf.arg(help="Runs of each setting, seeds 0, 1, ...")] = 3,
    claims: Annotated[tuple[str, ...], tyro.conf.arg(help="Which to look at.")] = CLAIMS,
    device: Annotated[str, tyro.conf.arg(help="cpu or cuda.")] = "cpu",
    train: Annotated[
        bool, tyro.conf.arg(help="--no-train makes tables and figures of what is there.")
    ] = True,
) -> None:
    """Train what is not there yet, seed by seed; then print the tables and draw the figures."""
    size = {"tiny": tiny, "full": full}[scale]()
    images = subset(mocohub.list_images(data / "train"), size.num_train)
    runs = Runs(out, images, subset(mocohub.list_images(data / "test"), size.num_test), device)
    points = [point for point in experiments(size) if point.claim in claims]
    for seed in range(seeds if train else 0):
        runs.base_lines(replace(size.recipe, seed=seed))
        for point in points:
            recipe = replace(point.recipe, seed=seed)
            if not runs[recipe]:
                curves = point.claim == "shuffling"
                row = runs.train_one(recipe, size.monitor_every_epochs if curves else recipe.epochs)
                print(
                    f"{point.claim}, {point.line}, {point.x:g}, seed {seed}: kNN {row['knn']:.3f}, "
                    f"{row['seconds']} s",
                    flush=True,
                )
    text = tables(points, runs, seeds)
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(points, runs, seeds, out)


if __name__ == "__main__":
    tyro.cli(main)
