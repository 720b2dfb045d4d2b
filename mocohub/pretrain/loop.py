"""The training loop: one function, in one process or under torchrun with any number of them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mocohub import distributed
from mocohub.backbones import backbone
from mocohub.errors import unknown
from mocohub.images import ImageError, decode_image
from mocohub.pretrain import checkpoint
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.build import autocast_dtype, build, shared_cores
from mocohub.pretrain.data import Batch, loader
from mocohub.pretrain.initial import initial_state
from mocohub.pretrain.meters import CheatingAlarm, Meters
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.monitor import knn_accuracy
from mocohub.pretrain.randomness import Draws, draws
from mocohub.pretrain.recipe import Recipe, check
from mocohub.pretrain.recipes import RECIPES, recipe_by_name
from mocohub.pretrain.run import Run
from mocohub.pretrain.signals import StopRequest
from mocohub.pretrain.sinks import Sink, check_sinks, open_sinks
from mocohub.pretrain.stream import StreamLoader, merge_positions, stream_loader
from mocohub.shards import Shards
from mocohub.sources import ImageList, list_images

logger = logging.getLogger(__name__)

_PROBED_IMAGES = 16  # decoded before training starts
_SAVE_EVERY_STEPS = 1000  # where there are no epochs to count
_DATA_FACTS = ("source", "num_images", "paths_sha256")  # of run.json that checkpoints repeat
_STOP_EVERY_STEPS = 10  # how often processes on cards ask each other whether to stop


class Stopped(Exception):
    """The run was asked to stop, has saved a checkpoint, and can be resumed."""


def train(
    recipe: Recipe | str,
    data: ImageList | Shards | str | Path,
    out: str | Path,
    *,
    recipe_name: str | None = None,
    val: ImageList | str | Path | None = None,
    device: str | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: bool = False,
    augment_on: Literal["auto", "workers", "device"] = "auto",
    micro_batch_size: int | None = None,
    num_workers: int | None = None,
    init: str | Path | None = None,
    init_restart: bool = False,
    resume: Literal["never", "auto"] = "never",
    log_every_steps: int = 10,
    save_every_epochs: int = 1,
    save_every_steps: int | None = None,
    keep_checkpoints: int = 2,
    keep_every_steps: int | None = None,
    monitor_every_epochs: int = 10,
    log_to: Sequence[Literal["tensorboard", "wandb"]] = (),
    stream_options: Mapping[str, Any] | None = None,
) -> Path:
    """Train a MoCo model and return the run folder. Under torchrun all ranks must call this.

    Args:
        recipe: A `Recipe`, or the name of one.
        data: Images to train on, or anything `mocohub.list_images` accepts. Labels are not used for training.
            `Shards` (of `mocohub.shards.list_shards`) are streamed.
        out: The run folder; must not exist unless resumed.
        recipe_name: Name for logs and cards; by default that of the recipe, or "custom".
        val: Labelled images for the kNN monitor, classified by the labelled images of `data`.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
        precision: Of the encoders; "auto" is bfloat16 autocast where there are units for it (cards, CPUs with
            AMX or AVX-512 BF16), else float32.
        compile: Whether to compile the encoders (torch.compile): minutes at the start, faster steps.
        augment_on: Where colours, blur and flips are computed: in the decoding "workers", image by image, or
            on the "device", batch by batch; "auto" is the device on a card. Same distribution and parameters,
            other rounding.
        micro_batch_size: Images of this process in a forward pass, to save memory; the step stays the same.
        num_workers: Decoding processes of this rank; by default its share of the cores, at most 8.
        init: Full training state to begin the new run from: another run (its newest checkpoint), a
            checkpoint, a folder with training-state/, or org/name or org/name@revision on the Hub. With the
            same recipe and data the run goes on at that step, bit for bit as if it had not been moved.
        init_restart: Whether to take only encoders, heads and queue from `init`, into step 0 of any recipe
            for that network and a fresh optimiser.
        resume: "auto" continues the run in `out` if there is one, bit for bit as if it had not stopped.
        log_every_steps: Steps between lines of log.jsonl.
        save_every_epochs: Epochs between checkpoints; the last step always makes one.
        save_every_steps: Steps between checkpoints, instead of epochs.
        keep_checkpoints: How many of the newest stay on disk, at least 2.
        keep_every_steps: Checkpoints at multiples of this stay as well.
        monitor_every_epochs: Epochs between kNN evaluations (with `val`); each extracts all images once. The
            last step always makes one.
        log_to: Where log lines go as well: "tensorboard" (extra `tensorboard`), "wandb" (extra `wandb`).
        stream_options: `num_lanes`, `buffer_images` and `on_damage` of `stream.stream_loader`, for `Shards`.

    Raises:
        ValueError: For settings and images that cannot work, before anything is written.
        FileExistsError: If `out` is there and `resume` is "never".
        FileNotFoundError: If `init` does not exist or holds no training state.
        RuntimeError: If too many images do not decode, the loss is not finite, or ranks start differently.
        Stopped: On SIGTERM, SIGINT or SIGUSR1, after a checkpoint was saved.
    """
    for name, value, least in (
        ("keep_checkpoints", keep_checkpoints, 2),  # one may be damaged
        ("log_every_steps", log_every_steps, 1),
        ("save_every_epochs", save_every_epochs, 1),
        ("save_every_steps", save_every_steps, 1),
        ("keep_every_steps", keep_every_steps, 1),
        ("monitor_every_epochs", monitor_every_epochs, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}.")
    for name, value, accepted in (
        ("resume", resume, ("never", "auto")),
        ("augment_on", augment_on, ("auto", "workers", "device")),
    ):
        if value not in accepted:
            raise unknown(name, value, accepted)
    out = Path(out)
    images = data if isinstance(data, ImageList | Shards) else list_images(data)
    val_images = val if val is None or isinstance(val, ImageList) else list_images(val)
    if val_images is not None and any(None in (some.labels or [None]) for some in (images, val_images)):
        raise ValueError(
            "The kNN monitor (val) needs a label for every training and validation image. "
            "Omit val, or give folders with a sub-folder for each class."
        )
    if isinstance(recipe, str):
        recipe_name, recipe = recipe_name or recipe, recipe_by_name(recipe, images.num_images)
    elif recipe_name in RECIPES and recipe != recipe_by_name(recipe_name, images.num_images):
        recipe_name += " (changed)"
    recipe_name = recipe_name or "custom"
    backbone(recipe.backbone)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        chosen = stack.enter_context(distributed.process_group(device))
        num_workers = stack.enter_context(shared_cores(chosen, num_workers))
        stop = stack.enter_context(StopRequest())
        check(recipe, images.num_images, distributed.world_size(), micro_batch_size)
        check_sinks(log_to)
        _try_some(images)
        dtype = autocast_dtype(precision, chosen)
        run = Run(out, recipe, recipe_name, images, resume == "auto")
        origin = initial_state(init, run, recipe, images, restart=init_restart)
        moco = build(
            recipe,
            chosen,
            num_images=images.num_images,
            micro_batch_size=micro_batch_size,
            autocast_dtype=dtype,
            compile=compile,
        )
        if origin:
            state = origin.load(moco, images, init_restart)
            run.facts["init"] = origin.facts(init_restart)
        else:
            state = checkpoint.restore(out, moco, recipe) if resume == "auto" else None
        start_step = state["step"] if state else 0
        run.begin(start_step)
        options = {
            "start_step": start_step,
            "num_workers": num_workers,
            "pin_memory": chosen.type == "cuda",
            "on_device": augment_on == "device" or (augment_on == "auto" and chosen.type == "cuda"),
        }
        if isinstance(images, Shards):
            position = state and state["data_position"]
            batches = stream_loader(images, recipe, position=position, **options, **(stream_options or {}))
        else:
            batches = loader(images, recipe, **options)
        steps_per_epoch = (images.num_images or 0) // recipe.global_batch_size or None
        meters = Meters(
            recipe, steps_per_epoch, chosen, log_every_steps=log_every_steps, start_step=start_step
        )
        sinks, writer = [], None
        if distributed.rank() == 0:
            sinks = open_sinks(log_to, out, run.facts, start_step)
            for sink in sinks:
                stack.callback(sink.close)
            writer = stack.enter_context(
                checkpoint.CheckpointWriter(
                    out,
                    recipe=recipe,
                    recipe_name=recipe_name,
                    keep=keep_checkpoints,
                    keep_every_steps=keep_every_steps,
                    facts={name: run.facts[name] for name in ("versions", "commit")}
                    | {"data": {name: run.facts["data"][name] for name in _DATA_FACTS}},
                )
            )
        training = _Training(
            recipe,
            images,
            val_images,
            moco,
            run,
            meters,
            sinks,
            writer,
            stop,
            save_every=save_every_steps or _steps(save_every_epochs, steps_per_epoch),
            monitor_every=_steps(monitor_every_epochs, steps_per_epoch),
        )
        try:
            training.go(batches, start_step)
            if writer:
                writer.wait()
            distributed.barrier()  # the last checkpoint is there when any rank returns
        finally:
            del moco, batches, training  # DDP must be gone before the process group is
    return out


@dataclass
class _Training:
    """Takes the steps, and looks after them: log, evaluation, checkpoints, requests to stop."""

    recipe: Recipe
    images: ImageList | Shards
    val_images: ImageList | None
    moco: MoCo
    run: Run
    meters: Meters
    sinks: list[Sink]  # of rank 0
    writer: checkpoint.CheckpointWriter | None  # of rank 0
    stop: StopRequest
    save_every: int  # steps
    monitor_every: int  # steps

    def __post_init__(self) -> None:
        self.alarm = CheatingAlarm(self.recipe)
        self.latest: dict[str, float] = {}  # of all that was logged

    def go(self, batches: Iterable[Batch], start_step: int) -> None:
        """Take all steps that remain.

        Raises:
            Stopped: After a save, if some rank was asked to stop.
        """
        size, total = self.recipe.global_batch_size, self.meters.total_steps
        num_seen = 0
        for row in self.run.logged:
            self.alarm.see(row)
        with tqdm(
            total=total * size,
            initial=start_step * size,
            unit="img",
            desc=self.run.recipe_name,
            disable=True if distributed.rank() else None,
        ) as bar:
            for step, batch in enumerate(_on(self.moco.device, self.meters.watch(batches)), start_step):
                num_seen += len(batch.ids)
                self.run.note_broken(batch.broken, self.images, num_seen)
                self._step(step, batch, draws(self.recipe, step, self.images.num_images))
                bar.update(size)
                if "loss" in self.latest:
                    bar.set_postfix_str("loss {loss:.3f} (chance {chance_loss:.3f})".format(**self.latest))
                done = step + 1
                last = done == total
                if self.val_images is not None and (last or done % self.monitor_every == 0):
                    self._evaluate(done)
                stopping = not last and self._stopping(done)
                if last or stopping or done % self.save_every == 0:
                    position = batches.position_after(done) if isinstance(batches, StreamLoader) else None
                    self._save(done, position)
                if stopping:
                    if self.writer:
                        self.writer.wait()
                    distributed.barrier()
                    raise Stopped(f"Stopped after step {done} of {total}, saved. Go on with --resume auto.")

    def _step(self, step: int, batch: Batch, drawn: Draws) -> None:
        lr = self.recipe.lr(step, self.meters.steps_per_epoch)
        for group in self.moco.optimizer.param_groups:
            group["lr"] = lr
        try:
            result = self.moco.step(batch, drawn)
        except FloatingPointError as error:
            raise self._diverged(error, step, lr) from None
        if row := self.meters.add(result, lr, self.run.num_broken):
            self._log(row)

    def _diverged(self, error: FloatingPointError, step: int, lr: float) -> RuntimeError:
        return RuntimeError(
            f"{error} at step {step} (lr {lr:g}). The last good state is the newest in "
            f"{self.run.out / 'checkpoints'}. Lower the learning rate (--set base_lr=...)"
            + (" or use --precision float32." if self.moco.autocast_dtype else ".")
        )

    def _log(self, row: dict[str, Any]) -> None:
        self.latest |= row
        if distributed.rank() == 0:
            self.run.log(row)
            for sink in self.sinks:
                sink.log(row)
            if warning := self.alarm.see(row):
                logger.warning(warning)

    def _settle(self, done: int) -> None:
        try:
            self.moco.settle()
        except FloatingPointError as error:  # on a card: found now, not a step later
            raise self._diverged(error, done - 1, self.latest.get("lr", self.recipe.base_lr)) from None

    def _evaluate(self, done: int) -> None:
        self._settle(done)
        with self.meters.paused():
            if distributed.rank() == 0:
                accuracy = knn_accuracy(
                    self.moco.query.backbone, self.images, self.val_images, device=self.moco.device
                )
                names = [self.val_images.classes[label] for label in self.val_images.labels]
                chance = max(map(names.count, set(names))) / len(names)
                epoch = done / self.meters.steps_per_epoch
                self._log({"step": done, "epoch": epoch, "knn_accuracy": accuracy, "knn_chance": chance})
            distributed.barrier()

    def _save(self, done: int, position: dict[str, Any] | None) -> None:
        self._settle(done)
        with self.meters.paused():
            if position is not None:
                position = merge_positions(distributed.gather_objects(position))
            if self.writer:
                epoch = done // self.meters.steps_per_epoch if self.meters.steps_per_epoch else 0
                self.writer.save(
                    self.moco, step=done, epoch=epoch, metrics=self.latest, data_position=position
                )

    def _stopping(self, done: int) -> bool:
        """Whether some rank was asked to stop; processes on cards do not ask each other at every step."""
        if distributed.world_size() > 1 and self.moco.device.type == "cuda" and done % _STOP_EVERY_STEPS:
            return False
        return distributed.any_rank(self.stop.requested)


def _on(device: torch.device, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Move batches to the device; to a card on a stream of its own, while the step before is computed."""
    if device.type == "cpu":
        yield from batches
        return
    copying = torch.cuda.Stream()
    ahead: tuple[Batch, list[torch.Tensor], torch.cuda.Event] | None = None
    for batch in chain(batches, [None]):
        arrived = ahead
        if batch is not None:
            with torch.cuda.stream(copying):
                ahead = *_moved(batch, device), copying.record_event()
        if arrived is not None:
            now = torch.cuda.current_stream()
            now.wait_event(arrived[2])  # and not for the batch that has just been sent after it
            for tensor in arrived[1]:
                tensor.record_stream(now)
            yield arrived[0]


def _moved(batch: Batch, device: torch.device) -> tuple[Batch, list[torch.Tensor]]:
    """Return the batch on the device, and its tensors there."""
    ids = batch.ids.to(device, non_blocking=True)
    x_q, x_k = (
        crops and Crops(*(None if t is None else t.to(device, non_blocking=True) for t in crops))
        for crops in (batch.x_q, batch.x_k)
    )
    tensors = [t for t in (ids, *x_q, *(x_k or ())) if t is not None]
    return batch._replace(ids=ids, x_q=x_q, x_k=x_k), tensors


def _steps(epochs: int, steps_per_epoch: int | None) -> int:
    return epochs * steps_per_epoch if steps_per_epoch else _SAVE_EVERY_STEPS


def _try_some(images: ImageList | Shards) -> None:
    """Decode a few images spread over the data, so that a wrong folder fails now and not in a worker."""
    reasons = []
    if isinstance(images, Shards):
        for image in images.first_images(min(len(images), _PROBED_IMAGES)):
            try:
                if image.data is not None:
                    decode_image(image.data)
                    return
                reasons.append(f"{image.path}: larger than any image that can be decoded")
            except ImageError as error:
                reasons.append(f"{image.path}: {error}")
    else:
        for index in sorted({i * len(images) // _PROBED_IMAGES for i in range(_PROBED_IMAGES)}):
            try:
                images.decode(index)
                return
            except ImageError as error:
                reasons.append(f"{images.paths[index]}: {error}")
    raise ValueError(f"None of {len(reasons)} images tried can be decoded: {'; '.join(reasons[:3])}.")
