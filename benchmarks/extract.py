"""What `mocohub.extract` reaches of what the machine could, beside the usual loop.

    python benchmarks/extract.py [--model resnet50] [--device cuda] [--parts forward jpeg ...]

- forward: images that are decoded already, against the best forward pass written by hand: batch norms
  folded by torch, channels_last, bfloat16 autocast where the processor or card has it, one batch in memory
  again and again; on a CPU also with freed memory kept, as ours does. Goal 0.95 of the images/s of each.
- jpeg: files of 500 x 375 px made here, against the ceilings of the loader alone and of the forward part. On
  a CPU both share the cores, so an image costs the sum: goal 0.92 of 1 / (1/decode + 1/forward). On a card
  goal 0.90 of the lower. Beside it the usual loop: ImageFolder and DataLoader with a worker for each core,
  the timm model in float32, features in a list. Goal 3 times its images/s; the features are compared.
- store: seconds of an extraction into a folder / of the same one in memory, of n images more, resnet18 at
  64 px, goal 1.02; and the same of processor time, which other work on the machine disturbs less. What a
  folder costs once (files flushed to the disk) is printed apart. Bytes of a folder / bytes of its values,
  20,000 x 2048 float32, goal 1.02.
- memory: the most that a process holds beyond its imports, with 100,000 and 1,000,000 rows of 128 values
  from a network without convolutions. Goal: at most 64 MB between them.
- restart: a folder of 100,000 planned shards whose worker was killed; seconds from the call of `extract` to
  the first new shard, without the imports. Goal 5. Once with images that are listed, once with tars of two
  images that are streamed.

Speeds are those of whole calls, of 2 n less of n images: what a call costs once (choosing the computation,
the SHA-256 of the weights, starting workers) is printed apart. Those of the usual loop are of n images. All
take turns, round after round, after one batch each; ratios are medians of those of single rounds.
"""

import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import tyro
from loader import write_photos
from machine import machine
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import mocohub
from mocohub.distributed import num_cpus
from mocohub.features.inputs import Inputs, collate
from mocohub.features.precision import fast_bfloat16
from mocohub.features.store import Features
from mocohub.memory import freed_memory_kept, large_blocks_reused

ROWS = {"memory": 128, "store": 2048}  # widths


class Tensors(Dataset):
    """Images that are preprocessed, as many as wanted: a few, over and over."""

    def __init__(self, num_images: int, images: torch.Tensor) -> None:
        self.num_images, self.images = num_images, images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, i: int) -> torch.Tensor:
        if i >= self.num_images:
            raise IndexError(i)
        return self.images[i % len(self.images)]


def best_forward(model: nn.Module, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest eager pass: a timm ResNet, by hand."""
    for block in [model, *(module for module in model.modules() if hasattr(module, "conv1"))]:
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
            if isinstance(getattr(block, norm, None), nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        if getattr(block, "downsample", None) is not None:
            block.downsample = fuse_conv_bn_eval(block.downsample[0], block.downsample[1])
    model = model.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(torch.device(device))):
            return model(pixels).float().cpu()

    return forward


def usual_loop(model: nn.Module, folder: Path, transform: Any, batch_size: int, device: str) -> torch.Tensor:
    """What one writes without this library."""
    model = model.to(device).eval()
    loader = DataLoader(ImageFolder(folder, transform), batch_size, num_workers=num_cpus())
    features = []
    with torch.no_grad():
        for images, _ in loader:
            features.append(model(images.to(device)).cpu())
    return torch.cat(features)


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(
    model: Annotated[str, tyro.conf.arg(help="A ResNet of timm; its weights are random.")] = "resnet50",
    parts: Annotated[tuple[str, ...], tyro.conf.arg(help="What to measure.")] = (
        "forward",
        "jpeg",
        "store",
        "memory",
        "restart",
    ),
    num_images: Annotated[int, tyro.conf.arg(help="n, more than a batch; 2 n are made.")] = 512,
    batch_size: Annotated[int, tyro.conf.arg(help="Images in one forward pass.")] = 64,
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds.")] = 5,
    device: Annotated[str, tyro.conf.arg(help="Where to compute.")] = "cpu",
    worker: Annotated[str | None, tyro.conf.arg(help="Used by the script itself.")] = None,
) -> None:
    """Print images/s and ratios, bytes, seconds and memory."""
    if worker:
        print(json.dumps(work(*json.loads(worker))))
        return
    print(f"{machine(device)}; {model}, n = {num_images}, batches of {batch_size}, {rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"forward", "jpeg"} & set(parts):
            report_speed(model, folder, parts, num_images, batch_size, rounds, device)
        if "store" in parts:
            report_store(folder, num_images, rounds)
        if "memory" in parts:
            report_memory(folder)
        if "restart" in parts:
            report_restart(folder)


def report_speed(
    name: str,
    folder: Path,
    parts: tuple[str, ...],
    num_images: int,
    batch_size: int,
    rounds: int,
    device: str,
) -> None:
    """Print the table of the forward and JPEG parts."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    by_hand = best_forward(timm.create_model(name, num_classes=0).eval(), device)
    transform = mocohub.transform(model)
    options = {"batch_size": batch_size, "dtype": "auto", "device": device, "progress": False}
    batch = torch.randn(batch_size, *timm.data.resolve_model_data_config(model)["input_size"])
    batch_there = batch.to(device, memory_format=torch.channels_last)
    sources: dict[int, Path] = {}
    if "jpeg" in parts:
        for count in (2 * num_images, num_images, batch_size):
            sources[count] = folder / f"{count}"
            (sources[count] / "photos").mkdir(parents=True)
        write_photos(sources[2 * num_images] / "photos", 2 * num_images)
        files = sorted((sources[2 * num_images] / "photos").iterdir())
        for count in (num_images, batch_size):
            for file in files[:count]:
                os.link(file, sources[count] / "photos" / file.name)

    def run_hand(count: int) -> None:
        for _ in range(count // batch_size):
            by_hand(batch_there)

    def run_decoded(count: int) -> None:
        mocohub.extract(model, Tensors(count, batch), num_workers=0, **options)

    def run_loader(count: int) -> None:
        inputs = Inputs(sources[count])
        inputs.transform = transform
        for _ in DataLoader(inputs, batch_size, num_workers=num_cpus(), collate_fn=collate):
            pass

    def run_usual(count: int) -> None:
        usual_loop(model, sources[count], transform, batch_size, device)

    def run_hand_kept(count: int) -> None:
        with freed_memory_kept(), large_blocks_reused():
            run_hand(count)

    runs: dict[str, Callable[[int], None]] = {"by hand": run_hand, "extract, decoded": run_decoded}
    if device == "cpu":
        runs["by hand, memory kept"] = run_hand_kept
    if "jpeg" in parts:
        runs |= {
            "loader alone": run_loader,
            "extract, JPEG": lambda count: mocohub.extract(model, sources[count], **options) and None,
            "usual loop, JPEG": run_usual,
        }
    speeds: dict[str, list[float]] = {way: [] for way in runs}
    once = []
    for run in runs.values():
        run(batch_size)
    for _ in range(rounds):
        for way, run in runs.items():
            short = seconds(lambda run=run: run(num_images))
            if way == "usual loop, JPEG":  # the last one; starting is nothing to it
                speeds[way].append(num_images / short)
                break
            long = seconds(lambda run=run: run(2 * num_images))
            if long <= short:
                raise RuntimeError(f"{way}: other work disturbs. Repeat it, or give a larger --num-images.")
            speeds[way].append(num_images / (long - short))
            once += [2 * short - long] if way == "extract, decoded" else []
        print({way: round(found[-1], 1) for way, found in speeds.items()}, file=sys.stderr)
    for way, found in speeds.items():
        print(f"{way:<20}{statistics.median(found):9.1f} images/s ({min(found):.1f} to {max(found):.1f})")
    for way in runs:
        if way.startswith("by hand"):
            _ratio(f"extract, decoded / {way}", speeds["extract, decoded"], speeds[way], "0.95")
    print(f"once in a call of extract: {statistics.median(once):.1f} s")
    if "jpeg" not in parts:
        return
    ceilings = [
        1 / (1 / decode + 1 / forward) if device == "cpu" else min(decode, forward)
        for decode, forward in zip(speeds["loader alone"], speeds["extract, decoded"], strict=True)
    ]
    _ratio(
        "extract, JPEG / ceiling", speeds["extract, JPEG"], ceilings, "0.92" if device == "cpu" else "0.90"
    )
    _ratio("extract, JPEG / usual loop", speeds["extract, JPEG"], speeds["usual loop, JPEG"], "3")
    found = torch.from_numpy(np.array(mocohub.extract(model, sources[num_images], **options).values))
    expected = usual_loop(model, sources[num_images], transform, batch_size, device)
    cosine = torch.cosine_similarity(found.float(), expected)
    print(f"cosine of their features: at least {cosine.min():.5f}")


def report_store(folder: Path, num_images: int, rounds: int) -> None:
    """Print what the folder costs in time and bytes."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0).eval()
    pixels = torch.randn(64, 3, 64, 64)
    options = {"num_workers": 0, "progress": False}
    more: dict[str, list[tuple[float, float]]] = {"folder": [], "memory": []}  # of n images more: time, CPU
    once = []
    for round_ in range(rounds):
        whole = {}
        for place, count in (("folder", 1), ("memory", 1), ("memory", 2), ("folder", 2)):
            out = folder / f"store-{round_}-{count}" if place == "folder" else None
            images, cpu = Tensors(count * num_images, pixels), time.process_time()
            took = seconds(lambda images=images, out=out: mocohub.extract(model, images, out=out, **options))
            whole[place, count] = took, time.process_time() - cpu
        for place, found in more.items():
            found.append(tuple(np.subtract(whole[place, 2], whole[place, 1])))
        once.append(whole["folder", 1][0] - whole["memory", 1][0])
    for i, kind in enumerate(("seconds", "processor time")):
        _ratio(
            f"{kind} into a folder / in memory", *([t[i] for t in found] for found in more.values()), "1.02"
        )
    print(f"of {num_images} images, a folder takes longer by {1000 * statistics.median(once):.0f} ms")
    values = np.random.default_rng(0).normal(size=(20_000, ROWS["store"])).astype(np.float32)
    paths = [f"class_{i % 100:03d}/ILSVRC2012_val_{i:08d}.JPEG" for i in range(len(values))]
    saved = Features(values, range(len(values)), paths).save(folder / "bytes")
    size = sum(file.stat().st_size for file in saved.iterdir())
    print(f"bytes of the folder / of its values: {size / values.nbytes:.4f}, goal 1.02")


def report_memory(folder: Path) -> None:
    """Print the memory of two extractions, each in a fresh process."""
    peaks = [_worker("memory", str(folder / f"rows-{count}"), count) for count in (100_000, 1_000_000)]
    print(
        f"memory beyond the imports, MB: {peaks[0]:.0f} with 100,000 rows, {peaks[1]:.0f} with 1,000,000; ",
        end="",
    )
    print(f"difference {peaks[1] - peaks[0]:.0f}, goal 64")


def report_restart(folder: Path) -> None:
    """Print how long a killed extraction of 100,000 shards needs to go on."""
    (folder / "tars").mkdir()
    for i in range(100_000):
        if i % 50_000 == 0:  # file systems limit the links to a file
            _write_tar(first := folder / "tars" / f"{i:05d}.tar", 2)
        else:
            os.link(first, folder / "tars" / f"{i:05d}.tar")
    for task in ("restart", "restart-tars"):
        out = folder / task
        command = [sys.executable, __file__, "--worker", json.dumps([task, str(out), 100_000])]
        found = []
        for _ in range(2):  # the first one plans
            before = {path.name for path in out.glob("part-*")}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            process.stdout.readline()  # it has imported, and calls extract now
            start = time.perf_counter()
            while process.poll() is None and not {path.name for path in out.glob("part-*")} - before:
                time.sleep(0.05)
            found.append(time.perf_counter() - start)
            if process.poll() is not None:
                raise RuntimeError(f"The worker ended with exit code {process.returncode}.")
            time.sleep(10)  # for more shards to be done
            process.send_signal(signal.SIGKILL)
            process.wait()
        kind = "tars, streamed" if task == "restart-tars" else "shards"
        print(f"100,000 {kind}, {len(before)} done: {found[1]:.1f} s to the first new one, goal 5")


def _write_tar(path: Path, num_images: int) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).save(file, "PNG")
    with tarfile.open(path, "w") as tar:
        for i in range(num_images):
            info = tarfile.TarInfo(f"{i:07d}.png")
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))


def work(task: str, out: str, count: int) -> float:
    """Extract `count` rows in a process of its own; returns the megabytes it held beyond its imports."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, ROWS["memory"]))
    images = torch.randn(256, 3, 4, 4)
    if task == "restart":
        print("starts", flush=True)
        mocohub.extract(network, Tensors(count, images), out=out, rows_per_shard=1, num_workers=0)
    if task == "restart-tars":
        print("starts", flush=True)
        tars = Path(out).parent / "tars"
        mocohub.extract(network, tars, out=out, transform=to_tensor, num_workers=0)
    mocohub.extract(network, Tensors(1000, images), num_workers=0)  # what the first call imports
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    mocohub.extract(network, Tensors(count, images), out=out, num_workers=0, batch_size=256, progress=False)
    return _status("VmHWM") - before


def _worker(*task: Any) -> float:
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _status(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000


def _ratio(name: str, ours: list[float], theirs: list[float], goal: str) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), goal {goal}")


if __name__ == "__main__":
    tyro.cli(main)
