"""The verb linear: of images by a paper's protocol, or of stored features."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from mocohub.cli.probing import JsonFile, collect, collected, opened, record_results

_DEFAULTS: dict[str, Any] = {  # of options that are for one kind of input or one solver, None if not here
    "resume": "never",
    "precision": "auto",
    "compile": False,
    "solver": "lbfgs",
    "C": (1.0,),
    "lr": (),
    "weight_decay": (0.0,),
    "schedule": "step",
}


def linear(
    train: Positional[str],
    val: Positional[str],
    *,
    protocol: Literal["moco", "mocov3", "dinov2"] | None = None,
    model: str | None = None,
    out: str | None = None,
    resume: Literal["never", "auto"] = "never",
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: bool = False,
    workers: int | None = None,
    save_every_steps: int | None = None,
    solver: Literal["sgd", "lbfgs"] = "lbfgs",
    C: tuple[float, ...] = (1.0,),
    lr: tuple[float, ...] = (),
    weight_decay: tuple[float, ...] = (0.0,),
    schedule: Literal["step", "cosine"] = "step",
    epochs: int | None = None,
    batch_size: int | None = None,
    json_file: JsonFile = None,
) -> None:
    """Linear classification of a frozen backbone: of images by a paper's protocol, or of stored features.

    With --protocol, of images: augmentation, schedule and everything else as its authors have it; runs under
    torchrun too; SIGTERM and Ctrl-C save, then exit with 75. Without, of features that were extracted once:
    no augmentation, hence not a paper's protocol; of several settings the one that is best on a tenth of the
    training images, held out, is then fitted to all.

    Args:
        train: Labelled images (a folder, list or tar shards) with --protocol, else a feature folder.
        val: What it is tested on: images or a feature folder, as TRAIN.
        protocol: moco (v1 and v2; lr 30, 100 epochs), mocov3 (lr 0.1, batch 1024, 90 epochs) or dinov2 (13
            learning rates at once, 10 epochs).
        model: Backbone, as for `mocohub extract`; with --protocol.
        out: Run folder for classifier, results and checkpoints; with --protocol. Must not exist, unless
            resumed.
        resume: "auto" continues the run in --out if there is one. This, --compile, --workers and
            --save-every-steps are for --protocol.
        seed: Of crops, order and initial weights.
        device: Where to compute. Default: cuda if there is a card; of features, cpu.
        precision: Of the backbone; "auto" is bfloat16 where it is fast and features agree. Of the products,
            for sgd on features; "auto" is float32.
        compile: Compile the backbone with torch.compile.
        workers: Decoding processes for each training process. Default: its share of the cores, at most 8.
        save_every_steps: Steps between checkpoints, besides one after each epoch.
        solver: "lbfgs" is logistic regression; "sgd" the papers' schedule (lr 30, drops at 60 % and 80 %);
            of features.
        C: Inverse strength of L2 regularisation, for lbfgs; several are fitted as one path.
        lr: Learning rate for a batch of 256; several are trained at once. Default: the protocol's, or 30 for
            sgd.
        weight_decay: For sgd on features; all combinations with --lr are trained at once.
        schedule: Of the learning rate, for sgd on features.
        epochs: Passes over the images or features. Default: the protocol's, or 100 for sgd.
        batch_size: Images or features in one step, over all processes; the learning rate follows it. Default:
            the protocol's, or 256 for sgd.
        json_file: File that collects results for `mocohub export --probes`.
    """
    collected(json_file)
    if protocol is not None:
        if _changed(solver=solver, C=C, weight_decay=weight_decay, schedule=schedule):
            raise ValueError(
                "--solver and --C are for features, and so are --weight-decay and --schedule; "
                f"--protocol {protocol} has its own."
            )
        if model is None or out is None:
            raise ValueError(f"--protocol {protocol} needs the backbone (--model) and a run folder (--out).")
        settings = {"epochs": epochs, "global_batch_size": batch_size, "base_lrs": lr}
        run = {"out": out, "resume": resume, "seed": seed, "device": device, "precision": precision}
        run |= {"compile": compile, "num_workers": workers, "save_every_steps": save_every_steps}
        _of_images(protocol, settings, model, train, val, json_file, **run)
        return
    of_images = {"model": model, "out": out, "resume": resume, "compile": compile}
    if extra := _changed(**of_images, workers=workers, save_every_steps=save_every_steps):
        raise ValueError(
            f"--{extra} is for images and needs --protocol moco, mocov3 or dinov2. "
            "Without it, TRAIN and VAL are feature folders, as mocohub extract writes them."
        )
    of_sgd = {"lr": lr, "epochs": epochs, "batch_size": batch_size}
    of_sgd |= {"weight_decay": weight_decay, "schedule": schedule, "precision": precision}
    if extra := _changed(**of_sgd) if solver == "lbfgs" else _changed(C=C):
        other = "sgd" if solver == "lbfgs" else "lbfgs"
        raise ValueError(f"--{extra} is for --solver {other}: give that too, or omit both.")
    from mocohub.probes.linear import LinearProbe

    probe = LinearProbe(
        solver,
        base_lr=lr or (30.0,),
        weight_decay=weight_decay,
        epochs=100 if epochs is None else epochs,
        global_batch_size=256 if batch_size is None else batch_size,
        schedule=schedule,
        precision="float32" if precision == "auto" else precision,
        C=C,
        device=device or "cpu",
        random_state=seed,
    )
    _of_features(probe, train, val, json_file)


def _changed(**options: Any) -> str | None:
    """Return the first option that is not what it is by default, as one types it."""
    names = [name for name, value in options.items() if value != _DEFAULTS.get(name)]
    return names[0].replace("_", "-") if names else None


def _of_images(
    protocol: str,
    settings: dict[str, Any],
    model: str,
    train: str,
    val: str,
    json_file: str | None,
    **run: Any,
) -> None:
    from mocohub.evaluation.linear import linear_protocol
    from mocohub.evaluation.protocols import protocol_by_name

    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        logging.getLogger("mocohub").setLevel(logging.INFO)  # how features are computed, for instance
    changed = protocol_by_name(protocol, **settings)
    for folder in (train, val):
        if (Path(folder) / "manifest.json").is_file():
            raise ValueError(
                f"'{folder}' is a feature folder, but --protocol {protocol} trains on images, cropped anew "
                "in every epoch. Give the images, or omit --protocol."
            )
    if Path(train).resolve() == Path(val).resolve():
        raise ValueError(
            f"'{train}' would be tested on what it has learned from. Give other images to test on."
        )
    result = linear_protocol(model, train, val, protocol=changed, **run)
    if not first:
        return
    if len(result.heads) > 1:
        for head in result.heads:
            print("lr {base_lr:g}: top-1 {top1_pct:.2f} %".format(**head))
    for record in result.results:
        print("{metric} {value:.2f} on {num_images} images ({protocol})".format(**record))
    collect(json_file, result.results)


def _of_features(probe: Any, train: str, val: str, json_file: str | None) -> None:
    import numpy as np

    from mocohub.probes.knn import all_classes, wilson

    train_features, val_features = opened(train, val)
    all_classes(np.unique(train_features.targets), val_features.targets)  # refuses and warns
    probe.fit(train_features.values, train_features.targets)
    accuracy = 100 * float(probe.score(val_features.values, val_features.targets))
    low, high = interval = [round(100 * end, 2) for end in wilson(accuracy / 100, len(val_features))]
    about = f"{probe.protocol}, {len(train_features)} labels; 95 % interval {low:.2f} to {high:.2f}"
    print(f"top-1 {accuracy:.2f} % on {len(val_features)} images ({about})")
    record = {"metric": "top-1 (%)", "protocol": probe.protocol, "value": round(accuracy, 2)}
    records = [{**record, "interval": interval}]
    record_results(records, train, val, len(val_features), json_file)
