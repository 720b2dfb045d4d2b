"""Verbs that train: demo, pretrain, plot."""

import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

_Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE ...")]


def demo(
    data: str | None = None,
    out: str = "mocohub-demo",
    recipe: str | None = None,
    overrides: _Overrides = (),
    license: str = "other",
    device: Literal["cpu", "cuda"] | None = None,
    workers: int | None = None,
    draws: int = 20,
) -> None:
    """Run the whole line on a few images and write a report: train, export, extract, probe.

    Args:
        data: Folder of images (sub-folders are classes; `train` and `val` in it are used as they are), list
            file or tar. Default: scikit-learn's 1,797 hand-written digits, nothing to download.
        out: Folder for everything that is written; must not exist.
        recipe: See `mocohub list`. Default: moco_tiny_digits, or moco_tiny_photos with --data.
        overrides: Changes to the recipe, for instance epochs=5 augmentation.hue=0.1.
        license: Licence of the exported weights, by its Hugging Face Hub identifier.
        device: Where to train. Default: cuda if there is a card.
        workers: Processes that decode images. Default: as for pretrain and extract.
        draws: Draws of labelled images in the few-label rows of the table.
    """
    from mocohub.demo import demo as run

    run(
        data,
        out,
        recipe=recipe,
        overrides=overrides,
        license=license,
        device=device,
        num_workers=workers,
        draws=draws,
    )


def pretrain(
    recipe: Positional[str],
    *,
    data: str,
    out: str,
    val: str | None = None,
    stream: bool = False,
    num_images: int | None = None,
    num_lanes: int | None = None,
    buffer_images: int | None = None,
    on_damage: Literal["stop", "skip"] = "stop",
    overrides: _Overrides = (),
    init: str | None = None,
    init_restart: bool = False,
    resume: Literal["never", "auto"] = "never",
    device: Literal["cpu", "cuda"] | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: bool = False,
    augment_on: Literal["auto", "workers", "device"] = "auto",
    micro_batch: int | None = None,
    workers: int | None = None,
    log_every_steps: int = 10,
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = (),
    save_every_epochs: int = 1,
    save_every_steps: int | None = None,
    keep_checkpoints: int = 2,
    keep_every_steps: int | None = None,
    monitor_every_epochs: int = 10,
) -> None:
    """Train a MoCo model; under torchrun, on all its processes.

    SIGTERM, Ctrl-C and SIGUSR1 save a checkpoint, then exit with 75; a second Ctrl-C stops at once.

    Args:
        recipe: Name of a recipe, see `mocohub list`.
        data: Training images: a folder, a .txt/.csv/.tsv list of paths, or tar shards. Labels are not used.
        out: Run folder; must not exist, unless resumed.
        val: Labelled images for the kNN monitor; --data must then have the same classes.
        stream: Read tar shards from front to back, local ones or URLs ("s3://bucket/{00000..00099}.tar"),
            instead of listing their images first. URLs are always streamed.
        num_images: In all streamed shards, if nothing beside them says so: it gives epochs their length.
        num_lanes: Shards that are streamed at a time, over all processes. Default: the largest divisor of the
            batch up to 128.
        buffer_images: Encoded images in memory to shuffle a stream from, over all processes. Default: 8192.
        on_damage: Whether a streamed shard that is cut ends the run when its turn comes, or counts as a
            broken image.
        overrides: Changes to the recipe, for instance epochs=5 queue_size=4096.
        init: Full training state to begin from: a run, a checkpoint, a folder with training-state/, or
            org/name[@revision] on the Hub. With the same recipe and data, it goes on at that step.
        init_restart: Take only encoders, heads and queue from --init, to step 0 of this recipe.
        resume: "auto" continues the run in --out if there is one.
        device: Where to train. Default: cuda if there is a card.
        precision: Of the encoders. "auto" is bfloat16 autocast where it is fast (cards, CPUs with AMX or
            AVX-512 BF16).
        compile: Compile the encoders with torch.compile: a minute at the start, faster steps.
        augment_on: Where colours, blur and flips are computed. "auto": on a card if there is one, else in the
            decoding workers.
        micro_batch: Images of one process in one forward pass, for small memories. The result is the same.
        workers: Decoding processes for each training process. Default: its share of the cores, at
            most 8.
        log_every_steps: Steps between lines of log.jsonl.
        log_to: Where log lines go as well (extras `tensorboard`, `wandb`).
        save_every_epochs: Epochs between checkpoints.
        save_every_steps: Steps between checkpoints, instead of epochs.
        keep_checkpoints: How many of the newest checkpoints stay.
        keep_every_steps: Checkpoints at multiples of this stay as well.
        monitor_every_epochs: Epochs between kNN evaluations (with --val); each extracts all images once.
    """
    from mocohub.pretrain.loop import train
    from mocohub.pretrain.recipe import override
    from mocohub.pretrain.recipes import recipe_by_name
    from mocohub.shards import list_shards
    from mocohub.sources import list_images

    if int(os.environ.get("RANK", 0)) == 0:
        logging.getLogger("mocohub").setLevel(logging.INFO)  # which checkpoint is resumed, for instance
    override(recipe_by_name(recipe), overrides)  # a wrong one is found before a long listing
    images = list_shards(data, num_images=num_images) if stream or "://" in data else list_images(data)
    train(
        override(recipe_by_name(recipe, images.num_images), overrides),
        images,
        out,
        recipe_name=recipe,
        val=val,
        device=device,
        precision=precision,
        compile=compile,
        augment_on=augment_on,
        micro_batch_size=micro_batch,
        num_workers=workers,
        init=init,
        init_restart=init_restart,
        resume=resume,
        log_every_steps=log_every_steps,
        log_to=log_to,
        save_every_epochs=save_every_epochs,
        save_every_steps=save_every_steps,
        keep_checkpoints=keep_checkpoints,
        keep_every_steps=keep_every_steps,
        monitor_every_epochs=monitor_every_epochs,
        stream_options={"num_lanes": num_lanes, "buffer_images": buffer_images, "on_damage": on_damage},
    )


def plot(runs: Positional[tuple[str, ...]], *, out: str = "curves.png") -> None:
    """Draw the curves of one or several training runs: loss, contrast and kNN accuracy, lr, images/s.

    Args:
        runs: Run folders.
        out: Picture to write: .png, .svg or .pdf.
    """
    from mocohub.plot import plot_runs

    print(plot_runs([Path(run) for run in runs], Path(out)))
