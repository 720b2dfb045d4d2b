"""The training loop: one function, in one process or under torchrun with any number of them."""

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from mocohub import distributed
from mocohub.backbones import backbone, create_backbone, pretrained_cfg
from mocohub.images import ImageError
from mocohub.pretrain import checkpoint
from mocohub.pretrain.batchnorm import average_statistics, group_batch_norms
from mocohub.pretrain.data import loader
from mocohub.pretrain.dictionary import Queue
from mocohub.pretrain.moco import Encoder, MoCo, projection_head
from mocohub.pretrain.monitor import knn_accuracy
from mocohub.pretrain.randomness import permutation, stream
from mocohub.pretrain.recipes import RECIPES, Recipe, check, recipe_by_name
from mocohub.pretrain.run import Run
from mocohub.sources import ImageList, list_images

_PROBED_IMAGES = 16  # decoded before training starts


def train(
    recipe: Recipe | str,
    data: ImageList | str | Path,
    out: str | Path,
    *,
    recipe_name: str | None = None,
    val: ImageList | str | Path | None = None,
    device: str | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    micro_batch_size: int | None = None,
    num_workers: int | None = None,
    resume: Literal["never", "auto"] = "never",
    log_every_steps: int = 10,
    save_every_epochs: int = 1,
    monitor_every_epochs: int = 10,
    keep_checkpoints: int = 2,
) -> Path:
    """Train a MoCo model and return the run folder. Under torchrun all ranks must call this.

    Args:
        recipe: A `Recipe`, or the name of one.
        data: Images to train on, or anything `mocohub.list_images` accepts. Labels are not used for training.
        out: The run folder; must not exist unless resumed.
        recipe_name: Name for logs and cards; by default that of the recipe, or "custom".
        val: Labelled images for the kNN monitor, classified by the labelled images of `data`.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
        precision: Of the encoders; "auto" is bfloat16 autocast where there are units for it (cards, CPUs with
            AMX), else float32.
        micro_batch_size: Images of this process in a forward pass, to save memory; the step stays the same.
        num_workers: Decoding processes of this rank; by default its share of the cores, on a CPU half of it,
            at most 8.
        resume: "auto" continues the run in `out` if there is one, bit for bit as if it had not stopped.
        log_every_steps: Steps between lines of log.jsonl.
        save_every_epochs: Epochs between checkpoints; the last epoch always makes one.
        monitor_every_epochs: Epochs between kNN evaluations (with `val`); each extracts all images once. The
            last epoch always makes one.
        keep_checkpoints: How many of the newest stay on disk, at least 2.

    Raises:
        ValueError: For settings and images that cannot work, before anything is written.
        FileExistsError: If `out` is there and `resume` is "never".
        RuntimeError: If too many images do not decode, the loss is not finite, or ranks start differently.
    """
    if isinstance(recipe, str):
        recipe_name, recipe = recipe_name or recipe, recipe_by_name(recipe)
    for name, value, least in (
        ("keep_checkpoints", keep_checkpoints, 2),  # one may be damaged
        ("log_every_steps", log_every_steps, 1),
        ("save_every_epochs", save_every_epochs, 1),
        ("monitor_every_epochs", monitor_every_epochs, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}.")
    if resume not in ("never", "auto"):
        raise ValueError(f"resume '{resume}' is not known. Choose never or auto.")
    out = Path(out)
    backbone(recipe.backbone)
    images = data if isinstance(data, ImageList) else list_images(data)
    val_images = val if val is None or isinstance(val, ImageList) else list_images(val)
    if val_images is not None and any(None in (some.labels or [None]) for some in (images, val_images)):
        raise ValueError(
            "The kNN monitor (val) needs a label for every training and validation image. "
            "Omit val, or give folders with a sub-folder for each class."
        )
    if recipe_name in RECIPES and recipe != RECIPES[recipe_name]():
        recipe_name += " (changed)"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with distributed.process_group(device) as chosen, _shared_cores(chosen, num_workers) as num_workers:
        check(recipe, len(images), distributed.world_size(), micro_batch_size)
        _try_some(images)
        autocast_dtype = _autocast_dtype(precision, chosen)
        run = Run(out, recipe, recipe_name or "custom", images, resume == "auto")
        moco = build(recipe, chosen, micro_batch_size, autocast_dtype)
        start_step = checkpoint.restore(out, moco, recipe) if resume == "auto" else 0
        batches = loader(
            images,
            recipe,
            start_step=start_step,
            num_workers=num_workers,
            pin_memory=chosen.type == "cuda",
        )
        run.begin(start_step)
        order = batches.batch_sampler
        chance = math.log(recipe.queue_size + 1)
        bar = tqdm(
            total=order.total_steps * recipe.global_batch_size,
            initial=start_step * recipe.global_batch_size,
            unit="img",
            desc=recipe_name,
            disable=True if distributed.rank() else None,
        )
        results, since = [], time.perf_counter()
        for step, batch in enumerate(batches, start_step):
            epoch = step // order.steps_per_epoch
            for group in moco.optimizer.param_groups:
                group["lr"] = recipe.lr(epoch)
            run.note_broken(batch.broken, images, (step - start_step + 1) * len(batch.x_q))
            shuffle = permutation(recipe.seed, "shuffle", step, recipe.global_batch_size)
            try:
                result = moco.step(
                    batch.x_q.to(chosen, non_blocking=True), batch.x_k.to(chosen, non_blocking=True), shuffle
                )
            except FloatingPointError as error:
                raise RuntimeError(
                    f"{error} at step {step} (lr {recipe.lr(epoch):g}). The last good state is the newest in "
                    f"{out / 'checkpoints'}. Lower the learning rate (--set base_lr=...)"
                    + (" or use --precision float32." if moco.autocast_dtype else ".")
                ) from None
            results.append(result)
            bar.update(recipe.global_batch_size)
            done = step + 1
            if done % log_every_steps == 0 or done == order.total_steps:
                loss, accuracy = (
                    sum(getattr(r, f) for r in results) / len(results) for f in ("loss", "accuracy")
                )
                speed = len(results) * recipe.global_batch_size / (time.perf_counter() - since)
                run.log(
                    step=done,
                    epoch=done / order.steps_per_epoch,
                    loss=loss,
                    chance_loss=chance,
                    pretext_accuracy=accuracy,
                    lr=recipe.lr(epoch),
                    images_per_s=round(speed, 1),
                )
                bar.set_postfix_str(
                    f"loss {loss:.3f} (chance {chance:.3f}), epoch {epoch + 1}/{recipe.epochs}"
                )
                results, since = [], time.perf_counter()
            epoch_ends, last = done % order.steps_per_epoch == 0, done == order.total_steps
            if val_images is not None and (last or (epoch_ends and (epoch + 1) % monitor_every_epochs == 0)):
                _evaluate(run, moco, recipe, images, val_images, done, done / order.steps_per_epoch)
                since = time.perf_counter()
            if last or (epoch_ends and (epoch + 1) % save_every_epochs == 0):
                for encoder in (moco.query, moco.key):
                    average_statistics(encoder)
                if distributed.rank() == 0:
                    checkpoint.save(
                        out,
                        moco,
                        step=done,
                        epoch=epoch + 1,
                        recipe=recipe,
                        recipe_name=run.recipe_name,
                        keep=keep_checkpoints,
                    )
        bar.close()
        distributed.barrier()  # the last checkpoint is there when any rank returns
        del moco, batches, order  # DDP must be gone before the process group is
    return out


def build(
    recipe: Recipe,
    device: torch.device,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> MoCo:
    """Return an untrained MoCo: a function of the recipe and its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(recipe.seed, "initial weights").integers(2**63)))
        net = create_backbone(recipe.backbone, **recipe.model_args)
        net.pretrained_cfg |= pretrained_cfg(
            recipe.backbone,
            crop_px=recipe.crop_px,
            crop_pct=recipe.eval_crop_pct,
            mean=recipe.mean,
            std=recipe.std,
        )
        head = projection_head(recipe.head, net.num_features, recipe.embed_dim)
        queue = Queue.random(recipe.queue_size, recipe.embed_dim, torch.default_generator)
    query = group_batch_norms(Encoder(net, head, recipe.mean, recipe.std), recipe.bn_group_size)
    query = query.to(device, memory_format=torch.channels_last)
    key = copy.deepcopy(query)
    queue.embeddings = queue.embeddings.to(device)
    optimizer = torch.optim.SGD(
        query.parameters(),
        lr=recipe.base_lr,
        momentum=recipe.sgd_momentum,
        weight_decay=recipe.weight_decay,
    )
    return MoCo(
        query,
        key,
        queue,
        optimizer,
        key_momentum=recipe.key_momentum,
        temperature=recipe.temperature,
        micro_batch_size=micro_batch_size,
        autocast_dtype=autocast_dtype,
    )


def _try_some(images: ImageList) -> None:
    """Decode a few images spread over the listing, so that a wrong folder fails now and not in a worker."""
    some = sorted({i * len(images) // _PROBED_IMAGES for i in range(_PROBED_IMAGES)})
    reasons = []
    for index in some:
        try:
            images.decode(index)
            return
        except ImageError as error:
            reasons.append(f"{images.paths[index]}: {error}")
    raise ValueError(f"None of {len(some)} images tried can be decoded: {'; '.join(reasons[:3])}.")


def _evaluate(
    run: Run, moco: MoCo, recipe: Recipe, bank: ImageList, queries: ImageList, step: int, epoch: float
) -> None:
    average_statistics(moco.query)
    if distributed.rank() == 0:
        accuracy = knn_accuracy(moco.query.backbone, bank, queries, device=moco.device)
        names = [queries.classes[label] for label in queries.labels]
        run.log(
            step=step,
            epoch=epoch,
            knn_accuracy=accuracy,
            knn_chance=max(map(names.count, set(names))) / len(names),
        )
    distributed.barrier()


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision '{precision}' is not known. Choose auto, float32 or bfloat16.")
    if precision == "auto":
        on_cpu = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else on_cpu
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bfloat16" else None


@contextmanager
def _shared_cores(device: torch.device, num_workers: int | None) -> Iterator[int]:
    """Give the number of decoding processes; on the CPU, leave torch only the cores beside them meanwhile."""
    cores = max(1, distributed.num_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if num_workers is None:
        num_workers = min(8, max(1, cores // 2) if device.type == "cpu" else cores)
    threads = torch.get_num_threads()
    if device.type == "cpu":  # more threads than cores make each other wait: half the speed on two cores
        torch.set_num_threads(min(threads, max(1, cores - num_workers)))
    try:
        yield num_workers
    finally:
        torch.set_num_threads(threads)
