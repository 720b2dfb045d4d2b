"""Exact kNN beside the product it consists of, and a search of features as many as ImageNet's.

    python benchmarks/probes.py --parts knn [--device cuda]
    python benchmarks/probes.py --parts imagenet --folder /somewhere/with/6/GB

- knn: the 200 nearest of each of 1,024 queries among 131,072 x 2048 and 1,000,000 x 128 random float32 rows
  (on a card, halves that are there already), by cosine. Times are divided by that of the bare product: tiles
  as ours, written over each other into one buffer, of the same type (on a card halves). Goals: 1.25 and 1.5
  on a CPU, 1.3 and 2.5 on a card. Beside it: a product and `topk` for each block of 16,384 rows; all
  similarities of 256 queries at once and one `topk`, as DINOv2's evaluation does; scikit-learn's brute force;
  faiss's flat index over rows of length 1, without the time to build it. Those that return neighbours must
  return ours, but for similarities closer than 2e-6. Then search and vote of 1,000 classes: `knn_grid`, with
  its checks of the features, and lightly's `knn_predict` (pip install lightly), whose rows are scaled and
  transposed beforehand. It must predict our classes, but for votes that rounding decides: at most of 0.5 % of
  the queries, and 5 % of halves.
- imagenet: 1,281,167 x 2048 float16 features of 1,000 classes are made shard by shard and written as a
  feature folder (5.3 GB), then classify 200 and 1,000 queries, each in a process of its own: seconds, and the
  most memory beyond its imports. What a query costs is the slope between the two; 50,000 are extrapolated
  with it. A folder that is there already is used again.

Runs take turns, round after round, after one that is not counted; ratios are medians (range) of those of
single rounds. On a machine that is busy with other work --threads 1 --cpu-time tells more than wall time.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import tyro
from machine import machine
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from mocohub.features.store import Features
from mocohub.features.writer import FeatureWriter
from mocohub.files import atomic_folder
from mocohub.probes import neighbors
from mocohub.probes.knn import knn_grid

K = 200
GOALS = {("cpu", 2048): 1.25, ("cpu", 128): 1.5, ("cuda", 2048): 1.3, ("cuda", 128): 2.5}
VOTE = "mocohub, with the vote"
CLOSE = 2e-6  # what sums of float32 in another order differ by
SHARD_ROWS = 10_000


def bare_product(bank: torch.Tensor, queries: torch.Tensor) -> None:
    """The multiplications alone."""
    rows, num_queries = neighbors._BANK_ROWS[bank.device.type], neighbors._QUERY_ROWS
    area = bank.new_empty(num_queries * rows)
    for part in bank.split(rows):
        for some in queries.split(num_queries):
            out = area[: len(some) * len(part)].view(len(some), len(part))
            torch.mm(some, part.T, out=out)


def product_and_topk(bank: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """What one writes first: the best of each block of rows, and of those the best."""
    found = []
    for some in F.normalize(queries).split(1024):
        values, rows = [], []
        for i, part in enumerate(bank.split(16384)):
            top = (some @ F.normalize(part).T).topk(min(K, len(part)), dim=1)
            values.append(top.values)
            rows.append(top.indices + i * 16384)
        best = torch.cat(values, 1).topk(K, dim=1).indices
        found.append(torch.cat(rows, 1).gather(1, best))
    return torch.cat(found)


def whole_rows(unit_bank: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """All similarities of some queries at once; the bank is scaled and transposed beforehand."""
    return torch.cat([(q @ unit_bank).topk(K, dim=1).indices for q in F.normalize(queries).split(256)])


def check_same(name: str, found: Any, ours: neighbors.Neighbors, bank: torch.Tensor, q: torch.Tensor) -> None:
    """Refuse neighbours that are not ours, but for those as near as the last of ours."""
    found = torch.as_tensor(found, device="cpu")
    for i, (theirs, rows) in enumerate(zip(found.tolist(), ours.indices.tolist(), strict=True)):
        other = sorted(set(theirs) ^ set(rows))
        if other:
            cosines = F.cosine_similarity(bank[other].double().cpu(), q[i : i + 1].double().cpu())
            error = float((cosines - float(ours.similarities[i, -1])).abs().max())
            if error > (CLOSE if bank.dtype == torch.float32 else 2e-3):
                raise RuntimeError(f"{name} finds other neighbours of query {i} than we do, by {error:.1e}.")


def report_knn(
    width: int, num_rows: int, num_queries: int, rounds: int, device: str, clock: Callable[[], float]
) -> None:
    """Print a table of the searches for one width."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(num_rows, width, generator=generator)
    queries = torch.randn(num_queries, width, generator=generator)
    if device == "cuda":
        bank, queries = bank.half().cuda(), queries.half().cuda()
    unit = F.normalize(bank)
    transposed = unit.T.contiguous()
    runs: dict[str, Callable[[], Any]] = {
        "bare product": lambda: bare_product(bank, queries),
        "mocohub": lambda: neighbors.nearest(bank, queries, K, device=device),
        "product, topk by block": lambda: product_and_topk(bank, queries),
        "whole rows, as DINOv2": lambda: whole_rows(transposed, queries),
    }
    if device == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexFlatIP(width)
        flat.add(unit.numpy())
        brute = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(bank.numpy())
        unit_queries = F.normalize(queries).numpy()
        runs["faiss IndexFlatIP"] = lambda: flat.search(unit_queries, K)[1]
        runs["scikit-learn brute"] = lambda: brute.kneighbors(queries.numpy(), return_distance=False)
    labels = torch.arange(num_rows, device=device) % 1000
    settings = {"ks": [K], "temperatures": [0.07], "device": device}
    runs[VOTE] = lambda: knn_grid(bank, labels, queries, labels[:num_queries], **settings)[0].predictions
    try:
        from lightly.utils.benchmarking import knn_predict

        runs["lightly knn_predict"] = lambda: knn_predict(
            F.normalize(queries), transposed, labels, num_classes=1000, knn_k=K, knn_t=0.07
        )[:, 0]
    except ImportError as error:
        print(f"lightly is left out: {error}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            found = run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - start)
            elif name == "mocohub":
                ours = found
            elif name == VOTE:
                predictions = found
            elif name == "lightly knn_predict":
                differ = (found.cpu().numpy() != predictions).mean()
                print(f"lightly predicts another class of {100 * differ:.2f} % of the queries than we do")
                if differ > (0.005 if bank.dtype == torch.float32 else 0.05):
                    raise RuntimeError("That is more than rounding explains.")
            elif name != "bare product":
                check_same(name, found, ours, bank, queries)
    print(f"{num_queries} queries, {num_rows} x {width} {bank.dtype}; all find the same {K} neighbours")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["bare product"], strict=True)]
        goal = f", goal {GOALS[device, width]}" if name == "mocohub" and (device, width) in GOALS else ""
        low, high = min(ratios), max(ratios)
        print(
            f"  {name:24} {statistics.median(times):8.3f} s, / bare product "
            f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}){goal}"
        )


def class_vectors(rows: range, num_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float16 features of some rows, each near the centre of its class, and labels, class by class."""
    labels = np.arange(rows.start, rows.stop) * 1000 // num_rows
    values = np.random.default_rng(rows.start).standard_normal((len(rows), width), np.float32)
    for label in np.unique(labels):
        values[labels == label] += np.random.default_rng([1, label]).standard_normal(width, np.float32) / 4
    return values.astype(np.float16), labels


def write_folder(folder: Path, num_rows: int, width: int) -> None:
    """Write a feature folder; one shard is in memory at a time."""
    starts = range(0, num_rows, SHARD_ROWS)
    with atomic_folder(folder) as temporary:
        writer = FeatureWriter(
            temporary, num_shards=len(starts), classes=[f"class {i}" for i in range(1000)], meta={}
        )
        for shard, start in enumerate(starts):
            rows = range(start, min(start + SHARD_ROWS, num_rows))
            values, labels = class_vectors(rows, num_rows, width)
            writer.write(shard, np.array(rows), [f"{i}.jpg" for i in rows], labels, values)
        writer.close([], num_inputs=num_rows)


def classify(folder: str, num_queries: int, device: str) -> dict[str, float]:
    """Classify queries in a process of its own."""
    Features(np.zeros((1, 2), np.float32), [0], ["x"])
    small = np.eye(4, dtype=np.float32)
    knn_grid(small, range(4), small, range(4), ks=[1], device=device)  # what first calls import
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    start = time.perf_counter()
    features = Features.open(folder)
    targets = features.targets
    opened = time.perf_counter() - start
    rows = np.linspace(0, len(features) - 1, num_queries).astype(int)
    queries = np.concatenate([class_vectors(range(i, i + 1), len(features), features.width)[0] for i in rows])
    start = time.perf_counter()
    results = knn_grid(features, targets, queries, targets[rows], device=device)
    searched = time.perf_counter() - start
    best = max(result.top1 for result in results)
    return {"opened": opened, "searched": searched, "MB": _status("VmHWM") - before, "top1": best}


def report_imagenet(folder: Path, num_rows: int, width: int, queries: tuple[int, int], device: str) -> None:
    """Print what searches of a folder take."""
    if not folder.exists():
        start = time.perf_counter()
        write_folder(folder, num_rows, width)
        print(f"{num_rows} x {width} float16 written in {time.perf_counter() - start:.0f} s")
    found = {}
    for count in queries:
        task = json.dumps([str(folder), count, device])
        command = [sys.executable, __file__, "--worker", task]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[count] = json.loads(out)
        print(
            f"{count} queries, 7 k x 5 T: opened and verified in {found[count]['opened']:.1f} s, searched in "
            f"{found[count]['searched']:.1f} s, at most {found[count]['MB']:.0f} MB beyond imports, "
            f"top-1 {100 * found[count]['top1']:.1f} %"
        )
    few, many = queries
    slope = (found[many]["searched"] - found[few]["searched"]) / (many - few)
    total = found[many]["searched"] + slope * (50_000 - many)
    print(f"50,000 queries, extrapolated: {total / 60:.1f} min")


def _status(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000


def main(
    parts: Annotated[tuple[str, ...], tyro.conf.arg(help="What to measure.")] = ("knn", "imagenet"),
    widths: Annotated[tuple[int, ...], tyro.conf.arg(help="D, for knn.")] = (2048, 128),
    num_rows: Annotated[tuple[int, ...], tyro.conf.arg(help="N of each width, for knn.")] = (
        131_072,
        1_000_000,
    ),
    num_queries: Annotated[int, tyro.conf.arg(help="Queries, for knn.")] = 1024,
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds, for knn.")] = 5,
    device: Annotated[str, tyro.conf.arg(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, tyro.conf.arg(help="Default: as torch chooses.")] = None,
    cpu_time: Annotated[bool, tyro.conf.arg(help="Seconds of the processor, for knn.")] = False,
    folder: Annotated[Path | None, tyro.conf.arg(help="Of the ImageNet-size features, kept.")] = None,
    imagenet_rows: Annotated[int, tyro.conf.arg(help="N, for imagenet.")] = 1_281_167,
    imagenet_width: Annotated[int, tyro.conf.arg(help="D, for imagenet.")] = 2048,
    imagenet_queries: Annotated[tuple[int, int], tyro.conf.arg(help="Few and many.")] = (200, 1000),
    worker: Annotated[str | None, tyro.conf.arg(help="Used by the script itself.")] = None,
) -> None:
    """Print ratios, seconds and memory."""
    if worker:
        print(json.dumps(classify(*json.loads(worker))))
        return
    if len(widths) != len(num_rows):
        raise SystemExit(f"--widths {widths} and --num-rows {num_rows} must be as many.")
    if threads:
        torch.set_num_threads(threads)
    print(f"{machine(device)}; {rounds} rounds{', seconds of the processor' if cpu_time else ''}")
    if "knn" in parts:
        for width, rows in zip(widths, num_rows, strict=True):
            report_knn(
                width, rows, num_queries, rounds, device, time.process_time if cpu_time else time.perf_counter
            )
    if "imagenet" in parts:
        with tempfile.TemporaryDirectory() as name:
            there = folder or Path(name) / "features"
            report_imagenet(there, imagenet_rows, imagenet_width, imagenet_queries, device)


if __name__ == "__main__":
    tyro.cli(main)
