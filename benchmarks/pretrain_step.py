"""One training step against the least that it can cost, and against other people's steps.

    python benchmarks/pretrain_step.py                      # r18, 96 px, batch 64, float32 and bfloat16
    python benchmarks/pretrain_step.py --setting r50        # r50, 224 px, batch 32
    python benchmarks/pretrain_step.py --memory             # peak memory in place of time
    python benchmarks/pretrain_step.py --device cuda --compile --setting r50 r50_large

The bare step is what no implementation can leave out: a timm backbone forward and backward with a dot product
for a loss, the no-grad forward of a second copy, SGD. Goal: our step takes at most 1.05 times as long, at the
same precision, memory format and compilation, and no longer than these two, which get all of that as well:

    lightly     MoCo v2 as in lightly's documentation, from its own parts (pip install 'mocohub[benchmarks]')
    published   the published step on one process, written from its description: torchvision networks, a loop
                over parameters for the momentum update, a clone of the queue, joined logits, top-1 and top-5

All have K = 65,536 and, but for the bare one, the two-layer head. The others normalise over the whole batch;
ours over groups of 32 images, once more over the whole batch to show what groups cost, and once with the
groups as micro-batches. Only ours begins with bytes and normalises them. (The setting "tiny" is that of
`moco_tiny_cifar10`: K = 4,096, groups of 64.) The variants take turns; a table gives the median time of a
step, and the median, least and greatest of its ratio to the bare step of the same turn.

Goal for memory: at most 1.15 times that of the bare encoder's forward, backward and SGD step, plus key
weights and queue. Each variant is a fresh process; what torch itself takes is left out.
"""

import copy
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Literal

import torch
import torchvision
import tyro
from machine import machine
from torch import Tensor, nn
from torch.nn import functional as F

from mocohub.backbones import BACKBONES, create_backbone
from mocohub.errors import missing_extra
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.build import build
from mocohub.pretrain.data import Batch
from mocohub.pretrain.randomness import draws
from mocohub.pretrain.recipes import mocov2_r50_in1m

EMBED_DIM, KEY_MOMENTUM, TEMPERATURE = 128, 0.999, 0.2
GOAL_TIME, GOAL_MEMORY = 1.05, 1.15
TORCHVISION = {"r18": torchvision.models.resnet18, "r50": torchvision.models.resnet50}
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What all variants of one table share."""

    backbone: str
    crop_px: int
    batch_size: int
    bn_group_size: int = 32
    queue_size: int = 65536
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compile: bool = False

    def autocast(self) -> torch.autocast:
        """The precision all of a step's forward passes run in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def place(self, net: nn.Module) -> nn.Module:
        """Train mode, channels_last, compiled if that is the setting."""
        net = net.to(self.device, memory_format=torch.channels_last).train()
        if self.compile:
            net.compile()
        return net

    def images(self) -> list[Tensor]:
        """Two views as the loaders of the others hand them over: float32, here in channels_last too."""
        torch.manual_seed(0)
        images = torch.randn(2, self.batch_size, 3, self.crop_px, self.crop_px, device=self.device)
        return [view.contiguous(memory_format=torch.channels_last) for view in images]


SETTINGS = {
    "r18": Setting("r18", 96, 64),
    "r50": Setting("r50", 224, 32),
    "r50_large": Setting("r50", 224, 256),  # for a card
    "tiny": Setting("r18tiny", 32, 256, 64, 4096),  # what moco_tiny_cifar10 trains
}


def sgd(net: nn.Module) -> torch.optim.SGD:
    """The optimiser of all but ours, as torch makes it by default."""
    return torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)


def bare(setting: Setting, with_keys: bool = True) -> Step:
    """Forward and backward of a backbone, forward of another, SGD."""
    net = create_backbone(setting.backbone)
    key = setting.place(copy.deepcopy(net))
    net, (x_q, x_k) = setting.place(net), setting.images()
    direction, optimizer = torch.randn(net.num_features, device=setting.device), sgd(net)

    def step() -> None:
        if with_keys:
            with torch.no_grad(), setting.autocast():
                key(x_k)
        with setting.autocast():
            features = net(x_q)
        (features.float() @ direction).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(setting: Setting, bn_group_size: int | None = None, micro_batch_size: int | None = None) -> Step:
    """`mocohub.train`'s step on crops as its loader hands them over."""
    r = replace(
        mocov2_r50_in1m(),
        backbone=setting.backbone,
        crop_px=setting.crop_px,
        global_batch_size=setting.batch_size,
        bn_group_size=bn_group_size or setting.bn_group_size,
        queue_size=setting.queue_size,
    )
    moco = build(
        r,
        torch.device(setting.device),
        micro_batch_size=micro_batch_size,
        autocast_dtype=setting.dtype if setting.dtype == torch.bfloat16 else None,
        compile=setting.compile,
    )
    pixels = torch.randint(0, 256, (2, setting.batch_size, 3, setting.crop_px, setting.crop_px))
    views = [Crops(view.to(setting.device, torch.uint8), None) for view in pixels]
    batch = Batch(torch.arange(setting.batch_size), *views, [])
    return lambda: moco.step(batch, draws(r, 0))


def lightly(setting: Setting) -> Step:
    """MoCo v2 from lightly's parts."""
    try:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
    except ImportError:
        raise missing_extra("lightly", "benchmarks", "Its step (--only leaves it out)") from None

    backbone, width = create_backbone(setting.backbone), BACKBONES[setting.backbone].num_features
    query = nn.Sequential(backbone, MoCoProjectionHead(width, width, EMBED_DIM))
    key = setting.place(copy.deepcopy(query).requires_grad_(False))
    query, (x_q, x_k) = setting.place(query), setting.images()
    criterion = NTXentLoss(TEMPERATURE, memory_bank_size=(setting.queue_size, EMBED_DIM)).to(setting.device)
    optimizer = sgd(query)

    def step() -> Tensor:
        update_momentum(query, key, KEY_MOMENTUM)
        with setting.autocast():
            q = query(x_q)
            shuffled, shuffle = batch_shuffle(x_k)
            k = batch_unshuffle(key(shuffled).detach(), shuffle)
            loss = criterion(q, k)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class Published(nn.Module):
    """The published step of MoCo v2, on one process."""

    def __init__(self, backbone: str, queue_size: int) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (TORCHVISION[backbone](num_classes=EMBED_DIM) for _ in range(2))
        for encoder in (self.encoder_q, self.encoder_k):
            width = encoder.fc.weight.shape[1]
            encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(EMBED_DIM, queue_size), dim=0))  # (C, K)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Update the key encoder and encode, in shuffled order."""
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data = k.data * KEY_MOMENTUM + q.data * (1 - KEY_MOMENTUM)
        shuffle = torch.randperm(len(images), device=images.device)
        return F.normalize(self.encoder_k(images[shuffle]), dim=1)[shuffle.argsort()]

    def forward(self, x_q: Tensor, x_k: Tensor) -> Tensor:
        """Logits of (N, 1 + K); the keys enter the queue."""
        q = F.normalize(self.encoder_q(x_q), dim=1)
        k = self.keys(x_k)
        positive = torch.einsum("nc,nc->n", q, k)[:, None]
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        start = int(self.queue_ptr)
        self.queue[:, start : start + len(k)] = k.T
        self.queue_ptr[0] = (start + len(k)) % self.queue.shape[1]
        return logits


def published(setting: Setting) -> Step:
    """The published step and what its training loop does with each: loss, accuracies, SGD."""
    moco = Published(setting.backbone, setting.queue_size)
    for encoder in (moco.encoder_q, moco.encoder_k):
        setting.place(encoder)
    moco, (x_q, x_k) = moco.to(setting.device), setting.images()
    optimizer = sgd(moco.encoder_q)

    def step() -> list[float]:
        with setting.autocast():
            logits = moco(x_q, x_k)
            labels = torch.zeros(len(logits), dtype=torch.long, device=setting.device)
            loss = F.cross_entropy(logits, labels)
        hits = logits.topk(5, dim=1).indices == 0
        top1, top5 = (hits[:, :n].any(1).float().mean().item() for n in (1, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.item(), top1, top5]

    return step


VARIANTS: dict[str, Callable[[Setting], Step]] = {
    "bare": bare,
    "ours": ours,
    "ours, one group": lambda setting: ours(setting, bn_group_size=setting.batch_size),
    "ours, micro-batches": lambda setting: ours(setting, micro_batch_size=setting.bn_group_size),
    "lightly": lightly,
    "published": published,
}


def seconds(step: Step, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean time of a step over `repeats` of them."""
    start = clock()
    for _ in range(repeats):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def print_times(setting: Setting, names: list[str], rounds: int, repeats: int, cpu_time: bool) -> None:
    """Let the variants take turns; the first turn compiles and warms up and is not counted."""
    clock = time.process_time if cpu_time else time.perf_counter
    steps = {name: VARIANTS[name](setting) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            s = seconds(step, repeats, clock)
            if turn:
                taken[name].append(s)
            elif setting.compile:
                print(f"{name}: first step {s * repeats:.0f} s")
    print(f"{'':<24}{'s/step':>9}{'images/s':>10}   / bare")
    for name, of_name in taken.items():
        ratios = [a / b for a, b in zip(of_name, taken["bare"], strict=True)]
        s, ratio = statistics.median(of_name), statistics.median(ratios)
        spread = f"{ratio:.3f}   ({min(ratios):.3f} to {max(ratios):.3f})"
        goal = f"   goal {GOAL_TIME}" if name.startswith("ours") else ""
        print(f"{name:<24}{s:9.3f}{setting.batch_size / s:10.1f}   {spread}{goal}", flush=True)


def print_memory(setting: Setting, names: list[str]) -> None:
    """Run each variant in a process of its own and compare peaks."""
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            peaks[name] = fresh.submit(peak_bytes, name, setting, torch.get_num_threads()).result()
    net = create_backbone(setting.backbone)
    head = net.num_features * (net.num_features + EMBED_DIM)
    key_bytes = 4 * (sum(p.numel() for p in net.parameters()) + head)
    more = key_bytes + 4 * setting.queue_size * EMBED_DIM
    print(f"key weights and queue: {more / 1e6:.0f} MB")
    print(f"{'':<24}{'peak MB':>9}   (peak - key weights - queue) / bare")
    for name, peak in peaks.items():
        share = (peak - (more if name != "bare" else 0)) / peaks["bare"]
        goal = f"   goal {GOAL_MEMORY}" if name.startswith("ours") else ""
        print(f"{name:<24}{peak / 1e6:9.0f}   {share:.3f}{goal}", flush=True)


def peak_bytes(name: str, setting: Setting, threads: int) -> int:
    """Most bytes that building a variant and taking three steps needs, over what the process began with."""
    torch.set_num_threads(threads)
    make = partial(bare, with_keys=False) if name == "bare" else VARIANTS[name]
    # What the first use of any network allocates for good is nobody's.
    seconds(bare(replace(SETTINGS["tiny"], batch_size=2, device=setting.device, dtype=setting.dtype)), 1)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seconds(make(setting), 3)
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    seconds(make(setting), 3)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main(
    setting: Annotated[tuple[str, ...], tyro.conf.arg(help=f"Of {', '.join(SETTINGS)}.")] = ("r18",),
    precision: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    device: Literal["cpu", "cuda"] = "cpu",
    compile: Annotated[bool, tyro.conf.arg(help="Compile all networks with torch.compile.")] = False,
    threads: int = 1,
    rounds: Annotated[int, tyro.conf.arg(help="Turns that count.")] = 5,
    repeats: Annotated[int, tyro.conf.arg(help="Steps in a turn; more for a card, where steps overlap.")] = 1,
    only: Annotated[tuple[str, ...], tyro.conf.arg(help="Variants beside bare; default all.")] = (),
    cpu_time: Annotated[
        bool, tyro.conf.arg(help="Count CPU seconds, which other processes disturb less, not wall time.")
    ] = False,
    memory: Annotated[bool, tyro.conf.arg(help="Compare peak memory, not time.")] = False,
) -> None:
    """Print a table for each setting and precision."""
    torch.set_num_threads(threads)
    print(machine(device))
    for name in setting:
        for dtype in precision:
            chosen = replace(SETTINGS[name], device=device, dtype=getattr(torch, dtype), compile=compile)
            print(f"\n{chosen.backbone}, {chosen.crop_px} px, batch {chosen.batch_size}, {dtype}")
            names = [n for n in VARIANTS if n == "bare" or n in (only or VARIANTS)]
            if chosen.backbone not in TORCHVISION:
                names = [n for n in names if n != "published"]  # its code has no such network
            if memory:
                print_memory(chosen, names)
            else:
                print_times(chosen, names, rounds, repeats, cpu_time)


if __name__ == "__main__":
    tyro.cli(main)
