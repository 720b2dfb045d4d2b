"""Linear classification of images by a frozen backbone, in one process or under torchrun with any number."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mocohub import distributed
from mocohub.errors import unknown
from mocohub.evaluation import labelled, protocols
from mocohub.evaluation.guard import Guard
from mocohub.evaluation.heads import Heads
from mocohub.evaluation.labelled import Batches, Crops
from mocohub.evaluation.linear_loop import Backbone, Training
from mocohub.evaluation.linear_run import LinearRun
from mocohub.evaluation.protocols import LinearProtocol, protocol_by_name
from mocohub.features.model import data_config, model_facts
from mocohub.features.network import FrozenNetwork
from mocohub.hub.load import load
from mocohub.pretrain.build import shared_cores
from mocohub.pretrain.signals import StopRequest
from mocohub.probes.inputs import check_seed
from mocohub.sources import ImageList, list_images

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """What a linear classification found.

    A validation is a dict of epoch (from 1), base_lr, lr (at the first step), top1_pct and top5_pct (None
    with fewer than six classes).

    Attributes:
        out: The run folder, with the classifier.
        protocol: In a line, changes and precision included.
        reported: The validation that the protocol's authors report: `best` or `last`.
        best: The best epoch, of the best classifier, both chosen on the validation images.
        last: The last epoch, of its best classifier.
        heads: Each classifier after the last epoch: the table of a grid of learning rates.
        num_train: Training images.
        num_val: Validation images, all of them: those that cannot be read count as wrong.
        num_train_unreadable: Training images that were skipped.
        num_val_unreadable: Validation images that count as wrong.
        results: Records for model cards (`mocohub export --probes`, `mocohub card --results`).
    """

    out: Path
    protocol: str
    reported: dict[str, Any]
    best: dict[str, Any]
    last: dict[str, Any]
    heads: list[dict[str, Any]]
    num_train: int
    num_val: int
    num_train_unreadable: int
    num_val_unreadable: int
    results: list[dict[str, Any]]


def linear_protocol(
    model: nn.Module | str | Path,
    train: ImageList | str | Path,
    val: ImageList | str | Path,
    *,
    out: str | Path,
    protocol: LinearProtocol | str = "moco",
    seed: int = 0,
    resume: Literal["never", "auto"] = "never",
    device: str | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: bool = False,
    num_workers: int | None = None,
    save_every_steps: int | None = None,
) -> LinearResult:
    """Train a linear classifier on images through a frozen backbone. Under torchrun all ranks must call this.

    Training crops and their order are functions of the seed; a global batch is divided among the processes,
    so that any number of them trains the same classifier up to rounding. Validation images are not augmented
    and the backbone does not change, so their features are computed once. That it does not change is checked
    after the first epoch and at the end, to the bit.

    Args:
        model: A timm model, or whatever `mocohub.load` takes.
        train: Labelled images, or anything `mocohub.list_images` accepts.
        val: Likewise; its classes must be among those of `train`.
        out: The run folder (see linear_run.py); must not exist unless resumed.
        protocol: "moco", "mocov3" or "dinov2", or one of these changed (`protocols.protocol_by_name`).
        seed: Of crops, order and initial weights.
        resume: "auto" continues the run in `out` if there is one, to the same bytes as if it had not stopped;
            of a finished one it returns the result.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
        precision: Of the backbone, whose features always come as float32. "auto" is bfloat16 where the
            machine is fast in it and features agree (cosine >= 0.999), "float32" computes without TF32.
        compile: Whether to compile the backbone (torch.compile): a minute at the start, faster steps.
        num_workers: Decoding processes of this rank; by default its share of the cores, at most 8.
        save_every_steps: Steps between checkpoints, besides those after every epoch.

    Raises:
        ValueError: For settings, a model or images that cannot work, before anything is written; if the run
            in `out` has another protocol, model or images.
        FileExistsError: If `out` is there and `resume` is "never".
        RuntimeError: If the backbone changes, the loss is not finite, or more than a tenth of the training
            images, or all of the validation images, cannot be read.
        OSError: If the disk is full; checkpoints that were there are intact.
        Stopped: On SIGTERM, SIGINT or SIGUSR1, after a checkpoint was saved (of `mocohub.pretrain.loop`).
    """
    for name, value, least in (("num_workers", num_workers, 0), ("save_every_steps", save_every_steps, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}.")
    for name, given, accepted in (
        ("resume", resume, ("never", "auto")),
        ("precision", precision, ("auto", "float32", "bfloat16")),
    ):
        if given not in accepted:
            raise unknown(name, given, accepted)
    check_seed(seed)
    protocol = protocol_by_name(protocol) if isinstance(protocol, str) else protocol
    protocols.check(protocol)
    train, val = (images if isinstance(images, ImageList) else list_images(images) for images in (train, val))
    val_labels = labelled.check_labels(train, val)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        name, model = str(model), load(model)
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{name} has no pretrained_cfg, which states its preprocessing. "
            "Give a model from mocohub.load or timm.create_model, not a module that wraps one."
        )
    config = data_config(model)
    protocol = protocols.fitted(protocol, config)
    _warn(protocol)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        chosen = stack.enter_context(distributed.process_group(device))
        num_workers = stack.enter_context(shared_cores(chosen, num_workers))
        facts = {
            "protocol": protocol.to_json(),
            "seed": seed,
            "precision": precision,
            "device": chosen.type,
            "model": {"name": name, **model_facts(model), "mean": config["mean"], "std": config["std"]},
            "train": {"source": _name(train), **labelled.facts(train)},
            "val": {"source": _name(val), **labelled.facts(val)},
        }
        run = LinearRun(Path(out), facts, resume == "auto")
        if (found := run.results()) is not None:
            return LinearResult(out=run.out, **found)
        stop = stack.enter_context(StopRequest())
        crops = Crops(train, protocol, seed)
        frozen, guard = _frozen(stack, model, chosen, precision, compile, run, crops)
        training = Training(
            run=run,
            protocol=protocol,
            heads=Heads(protocol, frozen.width, len(train.classes), seed, chosen),
            backbone=frozen,
            guard=guard,
            train=train,
            val=val,
            loading={"num_workers": num_workers, "pin_memory": chosen.type == "cuda"},
        )
        start_step = training.restore()
        run.begin(frozen.network.facts, start_step)
        training.validate_on(Crops(val, protocol), val_labels, stop)
        batches = Batches(
            len(train),
            protocol.global_batch_size,
            epochs=protocol.epochs,
            start_step=start_step,
            seed=seed,
        )
        training.go(crops, batches, stop, save_every_steps)
        return LinearResult(out=run.out, **training.finish())


def _warn(protocol: LinearProtocol) -> None:
    """Say that the learning rate is not the one that people know from the paper."""
    batch = protocol.global_batch_size
    usual = protocols.PROTOCOLS[protocol.name].global_batch_size
    if batch != usual and distributed.rank() == 0:
        lr = max(protocol.base_lrs)
        _log.warning(
            "The batch is %d instead of %d, so learning rates are scaled: %s%g x %d / 256 = %g.",
            *(batch, usual, "up to " if len(protocol.base_lrs) > 1 else "", lr, batch, lr * batch / 256),
        )


def _name(images: ImageList) -> str:
    return Path(images.source).resolve().name


def _frozen(
    stack: ExitStack,
    model: nn.Module,
    device: torch.device,
    precision: str,
    compile: bool,
    run: LinearRun,
    crops: Crops,
) -> tuple[Backbone, Guard]:
    """Return what makes features, in one way on all ranks, and what watches over it."""
    before = Guard({"": model})
    config = data_config(model)
    pixels = labelled.sample(crops)
    if compile:  # for the shape that batches will have
        local = -(-crops.protocol.global_batch_size // distributed.world_size())
        pixels = pixels[torch.arange(local) % len(pixels)]
    pixels = labelled.normalised(pixels, config)
    options: dict[str, Any] = {"device": device, "dtype": precision, "compile": compile}
    choice = run.computation
    if choice is None:
        if distributed.rank() == 0:
            with FrozenNetwork(model, **options) as network:
                choice = network.prepare(pixels)
        choice = distributed.gather_objects(choice)[0]
    network = stack.enter_context(FrozenNetwork(model, **options, choice=choice))
    network.prepare(pixels)
    if distributed.rank() == 0:
        _log.info("%s", network)
    before.check()  # to look at a few images has changed nothing
    modules = {"": model} if network.module is model else {"": model, "copy": network.module}
    return Backbone(network, config, device), Guard(modules)
