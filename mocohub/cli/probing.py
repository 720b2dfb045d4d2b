"""Verbs from features, or images, to numbers: knn, linear."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional


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
    C: float = 1.0,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Linear classification of a frozen backbone: of images by a paper's protocol, or of stored features.

    With --protocol, of images: augmentation, schedule and everything else as its authors have it; runs under
    torchrun too; SIGTERM and Ctrl-C save, then exit with 75. Without, of features that were extracted once:
    no augmentation, hence not a paper's protocol.

    Args:
        train: Labelled images (a folder, list or tar shards) with --protocol, else a feature folder.
        val: Likewise, to test on.
        protocol: moco (v1 and v2; lr 30, 100 epochs), mocov3 (lr 0.1, batch 1024, 90 epochs) or dinov2 (13
            learning rates at once, 10 epochs).
        model: Backbone, as for `mocohub extract`; with --protocol.
        out: Run folder for classifier, results and checkpoints; with --protocol. Must not exist, unless
            resumed.
        resume: "auto" continues the run in --out if there is one; with --protocol, as all that follow up to
            save-every-steps.
        seed: Of crops, order and initial weights.
        device: Where to compute. Default: cuda if there is a card.
        precision: Of the backbone. "auto" is bfloat16 where it is fast and features agree.
        compile: Compile the backbone with torch.compile.
        workers: Decoding processes for each training process. Default: its share of the cores, at most 8.
        save_every_steps: Steps between checkpoints, besides one after each epoch.
        solver: "lbfgs" is logistic regression; "sgd" the papers' schedule (lr 30, drops at 60 % and 80 %);
            of features.
        C: Inverse strength of L2 regularisation, for lbfgs.
        lr: Learning rate for a batch of 256. Default: the protocol's, or 30 for sgd.
        epochs: Passes over the images or features. Default: the protocol's, or 100 for sgd.
        batch_size: Images or features in one step, over all processes; the learning rate follows it. Default:
            the protocol's, or 256 for sgd.
        json_file: File that collects results for `mocohub export --probes`.
    """
    run = {"resume": resume, "seed": seed, "device": device, "precision": precision, "compile": compile}
    run |= {"workers": workers, "save_every_steps": save_every_steps}
    if protocol is not None:
        if solver != "lbfgs" or C != 1.0:
            raise ValueError(f"--solver and --C are for features, and --protocol {protocol} has its own.")
        if model is None or out is None:
            raise ValueError(f"--protocol {protocol} needs the backbone (--model) and a run folder (--out).")
        settings = {
            "epochs": epochs,
            "global_batch_size": batch_size,
            "base_lrs": () if lr is None else (lr,),
        }
        _linear_protocol(protocol, settings, model, train, val, out, json_file, **run)
        return
    usual = {"resume": "never", "seed": 0, "precision": "auto", "compile": False}
    given = {"model": model, "out": out, **run}
    if extra := [name for name, value in given.items() if value != usual.get(name)]:
        raise ValueError(
            f"--{extra[0].replace('_', '-')} is for images and needs --protocol moco, mocov3 or dinov2. "
            "Without it, TRAIN and VAL are feature folders, as mocohub extract writes them."
        )
    from mocohub.probes.linear import LinearProbe

    lr = 30.0 if lr is None else lr
    epochs = 100 if epochs is None else epochs
    batch_size = 256 if batch_size is None else batch_size
    if solver == "sgd":
        probe = LinearProbe("sgd", base_lr=lr, epochs=epochs, global_batch_size=batch_size)
        how = f"linear, SGD lr {lr:g} x batch / 256, {epochs} epochs, batch {batch_size}, cached features"
    else:
        probe = LinearProbe("lbfgs", C=C)
        how = f"logistic regression, C = {C:g}, cached features"
    _probe(probe, how, train, val, json_file)


def _linear_protocol(
    protocol: str,
    settings: dict[str, Any],
    model: str,
    train: str,
    val: str,
    out: str,
    json_file: str | None,
    *,
    workers: int | None,
    **run: Any,
) -> None:
    from mocohub.evaluation.linear import linear_protocol
    from mocohub.evaluation.protocols import protocol_by_name

    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        logging.getLogger("mocohub").setLevel(logging.INFO)  # how features are computed, for instance
    changed = protocol_by_name(protocol, **settings)
    result = linear_protocol(model, train, val, out=out, protocol=changed, num_workers=workers, **run)
    if not first:
        return
    if len(result.heads) > 1:
        for head in result.heads:
            print("lr {base_lr:g}: top-1 {top1_pct:.2f} %".format(**head))
    for record in result.results:
        print("{metric} {value:.2f} on {num_images} images ({protocol})".format(**record))
    _collect(json_file, result.results)


def _probe(probe: Any, protocol: str, train: str, val: str, json_file: str | None) -> None:
    from mocohub.features.store import Features, check_comparable

    train_features, val_features = Features.open(train), Features.open(val)
    check_comparable(train_features, val_features)
    probe.fit(train_features.values, train_features.targets)
    accuracy = 100 * float(probe.score(val_features.values, val_features.targets))
    print(f"top-1 {accuracy:.2f} % on {len(val_features)} images ({protocol}, {len(train_features)} labels)")
    record = {
        "dataset": Path(train).resolve().name,
        "split": Path(val).resolve().name,
        "num_images": len(val_features),
        "metric": "top-1 (%)",
        "protocol": protocol,
        "value": round(accuracy, 2),
    }
    _collect(json_file, [record])


def _collect(json_file: str | None, records: list[dict[str, Any]]) -> None:
    """Add records to the file, if there is one."""
    from mocohub.files import read_json, write_json

    if json_file:
        known = read_json(json_file) if Path(json_file).exists() else []
        write_json(json_file, [*known, *records])
