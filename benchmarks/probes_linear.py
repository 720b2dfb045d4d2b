"""Linear probes on stored features: many heads at once, and a path of C.

    python benchmarks/probes_linear.py [--parts heads streamed logistic] [--device cuda]

heads: the time of a training step of H heads at once, of one head, and of H separate heads as DINOv2's linear
evaluation has them: an nn.Linear each, the losses summed, one autograd pass, one SGD with H groups. All get
the same minibatches, drawn from features in memory as `train_heads` draws them; heads are trained in float32,
then with products in bfloat16, of features rounded beforehand. Goal: 40 heads / one head at most 3. Of a step
nobody can omit its products, 2 x B x D x C x H multiply-adds: beside the times stand those of the bare
products and of drawing rows alone, how many GFLOPS of products three times one head would allow, and how many
a large square product reaches.
H heads are H times the multiplications of one, on rows that are drawn once. They cost like few heads only
where rows are slow to get, as from a disk, or where one head leaves the device idle, as on a card.

streamed: an epoch of `train_heads` over features on disk, read a window at a time, for H heads and for one.
The page cache drops the file before each turn of 4 epochs, so that the disk is read once at least.

logistic: `logistic_path` for several C against scikit-learn's LogisticRegression, one C at a time. Equal
optimum: scikit-learn's `tol` is lowered tenfold from its default until every objective is within 1e-4 of the
lowest known; its time at that `tol` counts, and the time at its default is printed too. Goal: at least 3
times as fast.

Rounds are interleaved: in each, everybody takes one turn. Printed are medians of the times, with minimum and
maximum, and the median of the ratios within a round.
"""

import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from machine import machine
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from mocohub.memory import freed_memory_kept, large_blocks_reused
from mocohub.probes.heads import PRECISIONS, Heads, train_heads
from mocohub.probes.logistic import logistic_path
from mocohub.probes.minibatches import copied, minibatches

Times = dict[str, list[float]]


def main(
    parts: Annotated[
        tuple[Literal["heads", "streamed", "logistic"], ...], tyro.conf.arg(help="What to measure.")
    ] = (
        "heads",
        "streamed",
        "logistic",
    ),
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: Annotated[int, tyro.conf.arg(help="Interleaved rounds, after one to warm up.")] = 5,
    num_features: Annotated[int, tyro.conf.arg(help="D.")] = 2048,
    num_heads: int = 40,
    num_classes: Annotated[tuple[int, ...], tyro.conf.arg(help="Of the heads, one table each.")] = (
        10,
        100,
        1000,
    ),
    num_steps: Annotated[int, tyro.conf.arg(help="Steps of one turn of the heads.")] = 20,
    streamed_rows: Annotated[int, tyro.conf.arg(help="Rows of features on disk.")] = 50_000,
    logistic_rows: Annotated[int, tyro.conf.arg(help="N of the logistic regressions.")] = 20_000,
    logistic_classes: int = 10,
    num_c: Annotated[int, tyro.conf.arg(help="Values of C, from 1e-3 to 1e3.")] = 10,
) -> None:
    """Print the tables."""
    print(machine(device))
    if "heads" in parts:
        for classes in num_classes:
            measure_heads(device, rounds, num_features, num_heads, classes, num_steps)
    if "streamed" in parts:
        measure_streamed(device, rounds, streamed_rows, num_features, num_heads, num_classes[0])
    if "logistic" in parts:
        measure_logistic(device, rounds, logistic_rows, num_features, logistic_classes, num_c)


def measure_heads(
    device: str, rounds: int, num_features: int, num_heads: int, num_classes: int, num_steps: int
) -> None:
    """Print the times of one step."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20_000, num_features), np.float32)
    X = {precision: copied(X, device, getattr(torch, precision)) for precision in PRECISIONS}
    y = torch.from_numpy(rng.integers(num_classes, size=20_000)).to(device)
    lrs = np.logspace(-4, -1, num_heads)

    def batches(precision: str = "float32") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        drawn = minibatches(X[precision], 256, torch.Generator().manual_seed(0), None)
        for rows, chosen in itertools.islice(drawn, num_steps):
            yield rows, y[chosen]

    def ours(heads: int, precision: str) -> Callable[[], object]:
        model = Heads(lrs[:heads], 0.0, num_classes, num_features, precision=precision, device=device)
        return lambda: [model.step(*batch) for batch in batches(precision)]

    separate = nn.ModuleList(nn.Linear(num_features, num_classes) for _ in lrs).to(device)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(separate, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    def dinov2_style() -> None:
        for features, targets in batches():
            loss = sum(nn.functional.cross_entropy(head(features), targets) for head in separate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def products(heads: int, precision: str) -> Callable[[], None]:
        dtype = getattr(torch, precision)
        features = torch.randn(256, num_features, device=device).to(dtype)
        weight = torch.randn(heads * num_classes, num_features, device=device).to(dtype)
        error = torch.randn(heads * num_classes, 256, device=device).to(dtype)
        logits, gradient = torch.empty_like(error), torch.empty_like(weight)

        def run() -> None:
            for _ in range(num_steps):
                torch.mm(weight, features.T, out=logits)
                torch.mm(error, features, out=gradient)

        return run

    turns: dict[str, Callable[[], object]] = {
        f"rows alone, {precision}": lambda precision=precision: [None for _ in batches(precision)]
        for precision in PRECISIONS
    }
    for precision, heads in itertools.product(PRECISIONS, (num_heads, 1)):
        turns[f"{heads} at once, {precision}"] = ours(heads, precision)
        turns[f"{heads}, bare products, {precision}"] = products(heads, precision)
    turns[f"{num_heads}, DINOv2-style, float32"] = dinov2_style
    with freed_memory_kept(), large_blocks_reused():  # as in `train_heads`, but for all
        times = take_turns(turns, rounds, device)
    times = {name: [1e3 * seconds / num_steps for seconds in of_name] for name, of_name in times.items()}
    show(
        f"heads: batch 256, D = {num_features}, {num_classes} classes, ms a step, {rounds} rounds",
        times,
        "ms",
    )
    operations = 4 * 256 * num_features * num_classes * num_heads
    for precision in PRECISIONS:
        many, one = f"{num_heads} at once, {precision}", f"1 at once, {precision}"
        bare = f"{num_heads}, bare products, {precision}"
        ratio(f"{num_heads} heads / one head, {precision}", times, many, one, "goal: at most 3")
        ratio("  their bare products / one head", times, bare, one)
        ratio("  heads / their bare products", times, many, bare)
        allowed = operations / (3e6 * statistics.median(times[one]))
        print(f"  GFLOPS that 3 x one head allows, and peak {allowed:.0f}, {gflops(precision, device):.0f}")
    many = f"{num_heads} at once, "
    ratio("float32 / bfloat16, all heads", times, f"{many}float32", f"{many}bfloat16")
    ratio(
        "DINOv2-style / heads at once, float32",
        times,
        f"{num_heads}, DINOv2-style, float32",
        f"{many}float32",
    )


def gflops(precision: str, device: str, size: int = 2048, tries: int = 10) -> float:
    """Return the most that a product of square matrices reaches."""
    matrix = torch.randn(size, size, device=device).to(getattr(torch, precision))
    out = torch.empty_like(matrix)
    turns = take_turns({"product": lambda: torch.mm(matrix, matrix.T, out=out)}, tries, device)
    return 2e-9 * size**3 / min(turns["product"])


def measure_streamed(
    device: str, rounds: int, num_rows: int, num_features: int, num_heads: int, num_classes: int
) -> None:
    """Print the times of an epoch."""
    num_epochs = 4  # so that the first look at all features, for what is not finite, counts little
    rng = np.random.default_rng(0)
    y = rng.integers(num_classes, size=num_rows)
    y[:num_classes] = np.arange(num_classes)
    with tempfile.TemporaryDirectory() as folder:
        X = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float32, (num_rows, num_features))
        for start in range(0, num_rows, 4096):
            X[start : start + 4096] = rng.standard_normal(X[start : start + 4096].shape, np.float32)
        X.flush()
        X = np.load(f"{folder}/x.npy", mmap_mode="r")

        def epochs(heads: int, precision: str) -> Callable[[], None]:
            lrs = np.logspace(-4, -1, heads)
            settings = {"epochs": num_epochs, "device": device, "memory_bytes": 0, "window_rows": 16384}

            def run() -> None:
                with open(X.filename, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                train_heads(X, y, base_lr=lrs, precision=precision, **settings)

            return run

        turns = {
            f"{heads} at once, {precision}": epochs(heads, precision)
            for precision, heads in itertools.product(PRECISIONS, (num_heads, 1))
        }
        times = take_turns(turns, rounds, device)
    times = {name: [seconds / num_epochs for seconds in of_name] for name, of_name in times.items()}
    title = f"streamed: {num_rows} rows of {num_features} on disk, {num_classes} classes, s an epoch"
    show(f"{title}, {rounds} rounds", times, "s")
    for precision in PRECISIONS:
        many, one = f"{num_heads} at once, {precision}", f"1 at once, {precision}"
        ratio(f"{num_heads} heads / one head, {precision}", times, many, one)


def measure_logistic(
    device: str, rounds: int, num_rows: int, num_features: int, num_classes: int, num_c: int
) -> None:
    """Print the times of a whole path, and both objectives of each C."""
    X, y = activations(num_rows, num_features, num_classes)
    Cs = np.logspace(-3, 3, num_c)
    ours = logistic_path(X, y, Cs, device=device)
    mine = [objective(X, y, fit.C, fit.coef.numpy(), fit.intercept.numpy()) for fit in ours]
    tol, theirs = 1e-4, []
    while True:
        fits = scikit_learn(X, y, Cs, tol)
        theirs = [objective(X, y, C, fit.coef_, fit.intercept_) for C, fit in zip(Cs, fits, strict=True)]
        best = np.minimum(mine, theirs)
        if (np.array(theirs) <= best * (1 + 1e-4)).all() or tol < 1e-9:
            break
        tol /= 10
    print(f"\nlogistic: N = {num_rows}, D = {num_features}, {num_classes} classes, {X.dtype}")
    print(f"{'C':>10}{'ours':>14}{'scikit-learn':>14}{'iterations':>12}{'':>6}   (tol {tol:.0e})")
    for C, a, b, fit, other in zip(Cs, mine, theirs, ours, fits, strict=True):
        print(f"{C:10.3g}{a:14.8f}{b:14.8f}{fit.num_iter:12d}{int(other.n_iter_[0]):6d}")
    equal = max(a / b for a, b in zip(mine, best, strict=True)) - 1, max(np.array(theirs) / best) - 1
    print(f"furthest above the lower of the two: ours {equal[0]:.1e}, scikit-learn {equal[1]:.1e}")
    names = ["path", "scikit-learn, equal optimum", "scikit-learn, default tol"]
    turns = {
        names[0]: lambda: logistic_path(X, y, Cs, device=device),
        names[1]: lambda: scikit_learn(X, y, Cs, tol),
        names[2]: lambda: scikit_learn(X, y, Cs, 1e-4),
    }
    times = take_turns(turns, rounds, device)
    show(f"{num_c} values of C, s, {rounds} rounds", times, "s")
    ratio("scikit-learn at equal optimum / path", times, names[1], names[0], "goal: at least 3")
    ratio("scikit-learn at its default / path", times, names[2], names[0])


def activations(num_rows: int, num_features: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features like pooled ResNet activations: positive, correlated, with a falling spectrum."""
    rng = np.random.default_rng(0)
    y = rng.integers(num_classes, size=num_rows)
    y[:num_classes] = np.arange(num_classes)
    scales = (np.arange(1, num_features + 1) ** -0.5).astype(np.float32)
    X = 1.5 * rng.standard_normal((num_rows, num_features), np.float32)
    X += rng.standard_normal((num_classes, num_features), np.float32)[y]
    rotation = np.linalg.qr(rng.standard_normal((num_features, num_features), np.float32))[0]
    return 0.3 * np.maximum((X * scales) @ rotation + 0.1, 0), y


def scikit_learn(X: np.ndarray, y: np.ndarray, Cs: np.ndarray, tol: float) -> list[LogisticRegression]:
    """Fit one C at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # float32 cannot reach every tol
        return [LogisticRegression(C=C, tol=tol, max_iter=5000).fit(X, y) for C in Cs]


def objective(X: np.ndarray, y: np.ndarray, C: float, coef: np.ndarray, intercept: np.ndarray) -> float:
    """scikit-learn's objective divided by C N, in float64."""
    logits = X.astype(np.float64) @ coef.T.astype(np.float64) + intercept
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(losses.mean() + (coef.astype(np.float64) ** 2).sum() / (2 * C * len(y)))


def take_turns(turns: dict[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Return the seconds of each in every round but the first."""
    times: Times = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, run in turns.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def show(title: str, times: Times, unit: str) -> None:
    """Print medians and extremes."""
    print(f"\n{title}")
    for name, values in times.items():
        print(
            f"  {name:<36}{statistics.median(values):9.3f} {unit}   ({min(values):.3f} to {max(values):.3f})"
        )


def ratio(what: str, times: Times, over: str, under: str, goal: str = "") -> None:
    """Print the median of the ratios within a round."""
    value = statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
    print(f"  {what:<46}{value:7.2f}" + (f"   ({goal})" if goal else ""))


if __name__ == "__main__":
    tyro.cli(main)
