"""Images/s of `mocohub.train` as a whole, against its parts and against lightly.

    python benchmarks/pretrain_end_to_end.py                 # JPEGs of 500x375 px that it makes itself
    python benchmarks/pretrain_end_to_end.py --data photos --lightly

The parts are measured alone, each with the whole machine: the loader with a worker for each core, the step on
one batch in memory with a thread for each core. On a CPU they share the cores, and an image costs the sum
of both: goal 0.92 of 1 / (1/loader + 1/step). On a card they run side by side: goal 0.95 of the lower one.

`--lightly` (pip install lightly) trains lightly's MoCo v2 beside it, with its own transform, memory bank and
dataset: same files, network, batch, crops, K, workers and threads. Goal: 1.5 times its images/s, ours in the
precision `train` chooses, lightly's in float32 as in its examples; ratios at equal precision stand beside it.

Everything takes turns, round after round. The first steps, while processes start, and the last, whose batches
were made before, are left out.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn

import mocohub
from mocohub.backbones import create_backbone
from mocohub.distributed import num_cpus
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.build import autocast_dtype, build, shared_cores
from mocohub.pretrain.data import loader
from mocohub.pretrain.randomness import draws
from mocohub.pretrain.recipe import Recipe, moco_v2

_FIRST_STEPS = 3  # of each measurement, left out
_AHEAD = 5  # batches a worker may be ahead of the step: at the end of `train` it has nothing left to do
_PRECISIONS = {"bfloat16": torch.bfloat16, "float32": None}  # name and autocast


def write_photos(folder: Path, num_photos: int) -> Path:
    """Write JPEGs of 500x375 px and about 75 KB: blurred random colours with some noise."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for i in range(num_photos):
        colours = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (smooth + random.integers(-14, 15, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:05d}.jpg", quality=85)
    return folder


def steps_per_s(steps: Iterator[object], num_steps: int) -> float:
    """Return the mean speed of `num_steps` steps, after some that are not timed."""
    for _ in range(_FIRST_STEPS):
        next(steps)
    start = _now()
    for _ in range(num_steps):
        next(steps)
    return num_steps / (_now() - start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    """The parts of `train`, and the whole."""

    def __init__(self, images: mocohub.sources.ImageList, recipe: Recipe, device: str, steps: int) -> None:
        self.images, self.recipe, self.device, self.steps = images, recipe, torch.device(device), steps
        self.on_device = self.device.type == "cuda"
        batch = next(iter(loader(images, recipe, on_device=self.on_device)))
        x_q, x_k = (
            Crops(*(None if rows is None else rows.to(self.device) for rows in crops))
            for crops in (batch.x_q, batch.x_k)
        )
        self.batch = batch._replace(ids=batch.ids.to(self.device), x_q=x_q, x_k=x_k)

    def loader_alone(self) -> float:
        """Images/s of the loader with a worker for each core."""
        batches = loader(self.images, self.recipe, num_workers=num_cpus(), on_device=self.on_device)
        return self._rate(iter(batches))

    def step_alone(self, precision: str) -> float:
        """Images/s of the step with all cores, on a batch in memory."""
        moco = build(self.recipe, self.device, autocast_dtype=_PRECISIONS[precision])
        return self._rate(moco.step(self.batch, draws(self.recipe, step)) for step in count())

    def whole(self, precision: str, num_workers: int) -> float:
        """Images/s of `mocohub.train`, from the second line of its log."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run")
            mocohub.train(
                self.recipe,
                self.images,
                out,
                device=self.device.type,
                precision=precision,
                num_workers=num_workers,
                log_every_steps=self.steps,
                save_every_steps=self.recipe.steps,
            )
            rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return rows[1]["images_per_s"]

    def _rate(self, steps: Iterator[object]) -> float:
        return self.recipe.global_batch_size * steps_per_s(steps, self.steps)


class Lightly:
    """MoCo v2 written with lightly's parts, on one process: without a batch shuffle, as its examples."""

    def __init__(self, folder: Path, recipe: Recipe, device: str, steps: int) -> None:
        from lightly.data import LightlyDataset
        from lightly.transforms import MoCoV2Transform

        self.recipe, self.device, self.steps = recipe, torch.device(device), steps
        transform = MoCoV2Transform(input_size=recipe.crop_px)
        self.dataset = LightlyDataset(str(folder), transform=transform)

    def whole(self, precision: str, num_workers: int) -> float:
        """Images/s; in "bfloat16" with autocast and channels_last."""
        with shared_cores(self.device, num_workers) as num_workers:
            batches = torch.utils.data.DataLoader(
                self.dataset,
                batch_size=self.recipe.global_batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
            )
            endless = (batch for epoch in iter(lambda: iter(batches), None) for batch in epoch)
            steps = self._steps(endless, _PRECISIONS[precision])
            return self.recipe.global_batch_size * steps_per_s(steps, self.steps)

    def _steps(self, batches: Iterator, autocast: torch.dtype | None) -> Iterator[None]:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        backbone = create_backbone(self.recipe.backbone)
        width = backbone.num_features
        query = nn.Sequential(backbone, MoCoProjectionHead(width, width, self.recipe.embed_dim))
        layout = torch.channels_last if autocast else torch.contiguous_format
        query.to(self.device, memory_format=layout)
        key = deepcopy(query)
        deactivate_requires_grad(key)
        size = (self.recipe.queue_size, self.recipe.embed_dim)
        criterion = NTXentLoss(temperature=self.recipe.temperature, memory_bank_size=size).to(self.device)
        optimizer = torch.optim.SGD(
            query.parameters(),
            lr=self.recipe.base_lr,
            momentum=self.recipe.sgd_momentum,
            weight_decay=self.recipe.weight_decay,
        )
        for (x_q, x_k), *_ in batches:
            x_q, x_k = (x.to(self.device, memory_format=layout, non_blocking=True) for x in (x_q, x_k))
            update_momentum(query, key, self.recipe.key_momentum)
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                q = query(x_q)
                with torch.no_grad():
                    k = key(x_k)
            loss = criterion(q.float(), k.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def main(
    data: Annotated[Path | None, tyro.conf.arg(help="Folder of images; made here if not given.")] = None,
    lightly: Annotated[bool, tyro.conf.arg(help="Train with lightly too.")] = False,
    device: Annotated[str, tyro.conf.arg(help="cpu or cuda.")] = "cpu",
    backbone: Annotated[str, tyro.conf.arg(help="A key of mocohub.backbones.BACKBONES.")] = "r18",
    crop_px: Annotated[int, tyro.conf.arg(help="Side of a crop.")] = 96,
    batch_size: Annotated[int, tyro.conf.arg(help="Images of a step.")] = 64,
    workers: Annotated[
        int | None, tyro.conf.arg(help="Decoding processes; None: as `train` chooses.")
    ] = None,
    rounds: Annotated[int, tyro.conf.arg(help="Rounds in which everything takes its turn.")] = 5,
    steps: Annotated[int, tyro.conf.arg(help="Timed steps of each measurement.")] = 5,
) -> None:
    """Print the medians and ranges over rounds, then the ratios."""
    with shared_cores(torch.device(device), workers) as num_workers:
        print(f"{num_cpus()} cores; num_workers {num_workers}, beside {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as made:
        folder = data or write_photos(Path(made), 1200)
        images = mocohub.list_images(folder)
        recipe = Recipe(
            backbone=backbone,
            head="mlp",
            temperature=0.2,
            augmentation=moco_v2(),
            crop_px=crop_px,
            global_batch_size=batch_size,
            queue_size=min(65536, len(images) - 1),
            steps=2 * steps + _AHEAD * num_workers,
            lr_schedule="cosine",
        )
        ours = Ours(images, recipe, device, steps)
        measured: dict[str, Callable[[], float]] = {"loader alone": ours.loader_alone}
        for precision in _PRECISIONS:
            measured[f"step alone, {precision}"] = lambda p=precision: ours.step_alone(p)
            measured[f"train, {precision}"] = lambda p=precision: ours.whole(p, num_workers)
        if lightly:
            theirs = Lightly(folder, recipe, device, steps)
            for precision in _PRECISIONS:
                measured[f"lightly, {precision}"] = lambda p=precision: theirs.whole(p, num_workers)
        rates: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(rounds):
            for name, measure in measured.items():
                rates[name].append(measure())
    report(rates, torch.device(device))


def report(rates: dict[str, list[float]], device: torch.device) -> None:
    """Print medians and ranges of images/s, and medians of the ratios of each round."""
    for name, of_name in rates.items():
        low, middle, high = min(of_name), statistics.median(of_name), max(of_name)
        print(f"{name:<24}{middle:8.1f} images/s   ({low:.1f} to {high:.1f})")

    def ratio(what: str, over: list[float], under: list[float], goal: float | None = None) -> None:
        value = statistics.median(a / b for a, b in zip(over, under, strict=True))
        print(f"{what:<68}{value:5.2f}" + (f"   (goal: at least {goal})" if goal else ""))

    for precision in _PRECISIONS:
        parts = list(zip(rates["loader alone"], rates[f"step alone, {precision}"], strict=True))
        if device.type == "cpu":
            bound, name, goal = [1 / (1 / a + 1 / b) for a, b in parts], "1 / (1/loader + 1/step)", 0.92
        else:
            bound, name, goal = [min(a, b) for a, b in parts], "min(loader, step)", 0.95
        ratio(f"train / [{name}], {precision}", rates[f"train, {precision}"], bound, goal)
    if "lightly, float32" in rates:
        chosen = "bfloat16" if autocast_dtype("auto", device) else "float32"
        ratio(
            f"train, {chosen} (its choice) / lightly, float32 (its examples')",
            rates[f"train, {chosen}"],
            rates["lightly, float32"],
            1.5,
        )
        for precision in _PRECISIONS:
            ratio(
                f"train / lightly, both {precision}",
                rates[f"train, {precision}"],
                rates[f"lightly, {precision}"],
            )


if __name__ == "__main__":
    tyro.cli(main)
