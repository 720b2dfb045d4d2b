"""The command line: one function for each verb, thin over the Python interface.

Exit codes: 0 done; 2 the arguments or inputs cannot be used; 1 it failed while running; 75 a training was
asked to stop, saved, and can be resumed.
Nothing heavy is imported before a verb needs it, so that `mocohub --help` is instant.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from mocohub.errors import unknown

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
        resume: "auto" continues the run in --out if there is one.
        device: Where to train. Default: cuda if there is a card.
        precision: Of the encoders. "auto" is bfloat16 autocast where it is fast (cards, CPUs with AMX).
        compile: Compile the encoders with torch.compile: a minute at the start, faster steps.
        augment_on: Where colours, blur and flips are computed. "auto": on a card if there is one, else in the
            decoding workers.
        micro_batch: Images of one process in one forward pass, for small memories. The result is the same.
        workers: Decoding processes for each training process. Default: its share of the cores, on a CPU half
            of it; at most 8.
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


def export(
    source: Positional[str],
    *,
    out: str,
    license: str,
    name: str | None = None,
    probes: str | None = None,
    encoder: Literal["query", "key"] = "query",
) -> None:
    """Write a model folder that stock timm, transformers and `mocohub.load` read.

    Args:
        source: A run, one of its checkpoints, or an official MoCo checkpoint file.
        out: Model folder; must not exist.
        license: Licence of the weights, by its Hub identifier (apache-2.0, cc-by-nc-4.0, other, ...).
        name: Name of the model. Default: the name of --out.
        probes: JSON file of measured numbers for the card, as `mocohub knn --json FILE` writes it.
        encoder: "query", which the papers evaluate, or "key".
    """
    from mocohub.files import read_json
    from mocohub.hub.export import export as run

    measured = read_json(probes) if probes else ()
    print(run(source, out, license=license, name=name, probes=measured, encoder=encoder))


def extract(
    model: Positional[str],
    *,
    data: str,
    out: str,
    batch_size: int = 64,
    workers: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    output_dtype: Literal["float32", "float16"] = "float32",
    normalize: bool = False,
    rows_per_shard: int = 100_000,
) -> None:
    """Write the features of images as a feature folder: Parquet shards, manifest.json, errors.jsonl.

    Args:
        model: What `mocohub.load` takes: an exported folder, a run, a MoCo checkpoint file, hf-hub:org/name.
        data: Images: a folder, a .txt/.csv/.tsv list of paths, or tar shards.
        out: Feature folder; must not exist.
        batch_size: Images in one forward pass.
        workers: Processes that decode images. Default: one per core, at most 16.
        device: Where to compute. Default: cuda if there is a card.
        dtype: Of the computation.
        output_dtype: Of the stored features.
        normalize: Divide each feature vector by its L2 norm.
        rows_per_shard: Images for one Parquet file.
    """
    from mocohub.features.extract import extract as run

    features = run(
        model,
        data,
        out=out,
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        dtype=dtype,
        output_dtype=output_dtype,
        normalize=normalize,
        rows_per_shard=rows_per_shard,
    )
    print(f"{out}: {features}")


def knn(
    train: Positional[str],
    val: Positional[str],
    *,
    k: int = 200,
    temperature: float = 0.07,
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Weighted k-nearest-neighbour accuracy of features (arXiv 1805.01978, section 3.4).

    Args:
        train: Feature folder whose images vote.
        val: Feature folder whose images are classified.
        k: Number of voters.
        temperature: T in the weights exp(cosine / T).
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.probes.knn import KNNProbe

    protocol = f"weighted kNN, cosine, k = {k} (or all there are), T = {temperature:g}"
    _probe(KNNProbe(k=k, temperature=temperature), protocol, train, val, json_file)


def linear(
    train: Positional[str],
    val: Positional[str],
    *,
    solver: Literal["sgd", "lbfgs"] = "lbfgs",
    C: float = 1.0,
    lr: float = 30.0,
    epochs: int = 100,
    batch_size: int = 256,
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Linear classification of frozen, cached features (no augmentation: not the papers' full protocol).

    Args:
        train: Feature folder the classifier is trained on.
        val: Feature folder it is tested on.
        solver: "lbfgs" is logistic regression; "sgd" the papers' schedule (lr 30, drops at 60 % and 80 %).
        C: Inverse strength of L2 regularisation, for lbfgs.
        lr: Learning rate for a batch of 256, for sgd.
        epochs: Passes over the features, for sgd.
        batch_size: Features in one step, for sgd.
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.probes.linear import LinearProbe

    if solver == "sgd":
        probe = LinearProbe("sgd", base_lr=lr, epochs=epochs, global_batch_size=batch_size)
        protocol = (
            f"linear, SGD lr {lr:g} x batch / 256, {epochs} epochs, batch {batch_size}, cached features"
        )
    else:
        probe = LinearProbe("lbfgs", C=C)
        protocol = f"logistic regression, C = {C:g}, cached features"
    _probe(probe, protocol, train, val, json_file)


def inspect(path: Positional[str]) -> None:
    """Say what a file or folder is: a run, a checkpoint, a model, features, or a MoCo checkpoint of others.

    Args:
        path: The file or folder.
    """
    if (Path(path) / "manifest.json").is_file():
        from mocohub.features.store import Features

        features = Features.open(path)
        _print_facts(
            {"kind": "features", "content": repr(features), "classes": features.classes} | features.meta
        )
        return
    from mocohub.hub.convert import read_encoder

    found = read_encoder(path)
    _print_facts(
        {
            "kind": found.kind,
            "backbone": found.backbone or "-",
            "architecture": found.architecture,
            "model_args": found.model_args,
            "features": found.num_features,
            "tensors": len(found.state_dict),
            **found.facts,
        }
    )


def info(name: Positional[str]) -> None:
    """Tell what is known of a model of the zoo or of a recipe.

    Args:
        name: A name of `mocohub list`.
    """
    from mocohub.hub.zoo import ZOO
    from mocohub.pretrain.recipes import RECIPES

    if name not in RECIPES and name not in ZOO:
        raise unknown("model or recipe", name, dict.fromkeys([*ZOO, *RECIPES]))
    if name in ZOO:
        _print_facts(dataclasses.asdict(ZOO[name]))
    if name in RECIPES:
        print()
        print(*(line.strip() for line in RECIPES[name].__doc__.strip().splitlines()), sep="\n")
        print()
        _print_facts(RECIPES[name]().to_json())


def list_() -> None:
    """List the models of the zoo and the recipes, one a line."""
    from mocohub.hub.zoo import ZOO
    from mocohub.pretrain.recipes import RECIPES

    line = "{:<26}{:<10}{:<28}{:>12}  {:<8}{}".format
    print(line("name", "backbone", "data", "linear top-1", "recipe", "weights"))
    for model in ZOO.values():
        published = "-" if model.linear_top1_pct is None else f"{model.linear_top1_pct:.1f} %"
        weights = "published by the authors" if model.weights_url else "none published"
        weights = "comes with mocohub" if model.bundled else weights
        recipe = "yes" if model.name in RECIPES else "-"
        print(line(model.name, model.backbone, model.data, published, recipe, weights))
    for name in [name for name in RECIPES if name not in ZOO]:
        print(line(name, RECIPES[name]().backbone, "your own", "-", "yes", "made by you"))


def plot(runs: Positional[tuple[str, ...]], *, out: str = "curves.png") -> None:
    """Draw the curves of one or several training runs: loss, contrast and kNN accuracy, lr, images/s.

    Args:
        runs: Run folders.
        out: Picture to write: .png, .svg or .pdf.
    """
    from mocohub.plot import plot_runs

    print(plot_runs([Path(run) for run in runs], Path(out)))


def _probe(probe: Any, protocol: str, train: str, val: str, json_file: str | None) -> None:
    from mocohub.features.store import Features, check_comparable
    from mocohub.files import read_json, write_json

    train_features, val_features = Features.open(train), Features.open(val)
    check_comparable(train_features, val_features)
    probe.fit(train_features.values, train_features.targets)
    accuracy = 100 * float(probe.score(val_features.values, val_features.targets))
    print(f"top-1 {accuracy:.2f} % on {len(val_features)} images ({protocol}, {len(train_features)} labels)")
    if json_file:
        record = {
            "dataset": Path(train).resolve().name,
            "split": Path(val).resolve().name,
            "num_images": len(val_features),
            "metric": "top-1 (%)",
            "protocol": protocol,
            "value": round(accuracy, 2),
        }
        known = read_json(json_file) if Path(json_file).exists() else []
        write_json(json_file, [*known, record])


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        print(f"{name:<20}{text}")


VERBS = {
    "demo": demo,
    "pretrain": pretrain,
    "export": export,
    "extract": extract,
    "knn": knn,
    "linear": linear,
    "plot": plot,
    "inspect": inspect,
    "info": info,
    "list": list_,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code (wrong usage exits with 2 from within)."""
    args = sys.argv[1:] if args is None else list(args)
    logging.basicConfig(format="mocohub: %(message)s")
    try:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise unknown("verb", args[0], VERBS)
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="mocohub",
            description="Momentum Contrast: pre-train, export, load, extract and probe.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError) as error:
        print(f"mocohub: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"mocohub: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mocohub: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__name__ != "Stopped":  # of pretrain/loop.py, which is not imported for its sake
            raise
        print(f"mocohub: {error}", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
