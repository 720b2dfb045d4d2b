"""Verbs from features, or images, to numbers: knn, linear, lowshot, svm."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

JsonFile = Annotated[str | None, tyro.conf.arg(name="json")]


def knn(
    train: Positional[str],
    val: Positional[str | None] = None,
    *,
    k: tuple[int, ...] = (200,),
    temperature: tuple[float, ...] = (0.07,),
    leave_one_out: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    json_file: JsonFile = None,
) -> None:
    """Weighted k-nearest-neighbour accuracy of features (arXiv 1805.01978, section 3.4).

    Several values of --k or --temperature give a table, from one search. The features that vote are read
    block by block. Started by torchrun, the processes share the search.

    Args:
        train: Feature folder whose images vote.
        val: Feature folder whose images are classified.
        k: Number of nearest images that vote; one or several.
        temperature: T in the weights exp(cosine / T); one or several.
        leave_one_out: Classify each image of the one folder by all its others.
        device: Where to search. Default: cuda if there is a card.
        json_file: File that collects results for `mocohub export --probes`.
    """
    if (val is None) != leave_one_out:
        raise ValueError("Give two feature folders, or one and --leave-one-out.")
    collected(json_file)
    import torch

    from mocohub.distributed import process_group, rank
    from mocohub.features.store import Features, check_comparable
    from mocohub.probes.knn import knn_grid

    bank = Features.open(train)
    queries = None
    if val is not None:
        queries = Features.open(val)
        check_comparable(bank, queries)
    with process_group(device or ("cuda" if torch.cuda.is_available() else "cpu")) as chosen:
        results = knn_grid(
            bank,
            bank.targets,
            None if queries is None else queries.values,
            None if queries is None else queries.targets,
            ks=k,
            temperatures=temperature,
            leave_one_out=leave_one_out,
            device=chosen,
            sharded=True,
        )
        if rank() != 0:
            return
    if len(results) > 1:
        print(f"{'k':>6} {'T':>6} {'top-1 (%)':>10} {'95 % interval':>14} {'top-5 (%)':>10}")
    for result in results:
        top1, top5 = 100 * result.top1, 100 * result.top5
        protocol = f"weighted kNN, cosine, k = {result.k} (or all there are), T = {result.temperature:g}"
        protocol += ", leave one out" if leave_one_out else ""
        low, high = (100 * share for share in result.interval)
        if len(results) > 1:
            interval = f"{low:.2f} to {high:.2f}"
            print(f"{result.k:>6} {result.temperature:>6g} {top1:>10.2f} {interval:>14} {top5:>10.2f}")
        else:
            print(
                f"top-1 {top1:.2f} %, top-5 {top5:.2f} % on {result.num_images} images "
                f"({protocol}, {len(bank)} labels; 95 % interval of top-1 {low:.2f} to {high:.2f})"
            )
        record = {"metric": "top-1 (%)", "protocol": protocol, "value": round(top1, 2)}
        record_results([record], train, val or train, result.num_images, json_file)


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
        resume: "auto" continues the run in --out if there is one. This, --precision, --compile, --workers
            and --save-every-steps are for --protocol.
        seed: Of crops, order and initial weights.
        device: Where to compute. Default: cuda if there is a card; of features, cpu.
        precision: Of the backbone. "auto" is bfloat16 where it is fast and features agree.
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
    run = {"resume": resume, "seed": seed, "device": device, "precision": precision, "compile": compile}
    run |= {"workers": workers, "save_every_steps": save_every_steps}
    if protocol is not None:
        if (solver, C, weight_decay, schedule) != ("lbfgs", (1.0,), (0.0,), "step"):
            raise ValueError(
                "--solver and --C are for features, and so are --weight-decay and --schedule; "
                f"--protocol {protocol} has its own."
            )
        if model is None or out is None:
            raise ValueError(f"--protocol {protocol} needs the backbone (--model) and a run folder (--out).")
        settings = {"epochs": epochs, "global_batch_size": batch_size, "base_lrs": lr}
        _linear_protocol(protocol, settings, model, train, val, out, json_file, **run)
        return
    usual = {"resume": "never", "seed": 0, "precision": "auto", "compile": False}
    given = {"model": model, "out": out, **run, "seed": 0, "device": None}  # these two are for both
    if extra := [name for name, value in given.items() if value != usual.get(name)]:
        raise ValueError(
            f"--{extra[0].replace('_', '-')} is for images and needs --protocol moco, mocov3 or dinov2. "
            "Without it, TRAIN and VAL are feature folders, as mocohub extract writes them."
        )
    of_sgd = {"lr": lr or None, "epochs": epochs, "batch_size": batch_size}
    of_sgd |= {"weight_decay": weight_decay, "schedule": schedule}
    others = of_sgd if solver == "lbfgs" else {"C": C}
    usual = {"weight_decay": (0.0,), "schedule": "step", "C": (1.0,)}
    if extra := [name for name, value in others.items() if value != usual.get(name)]:
        other = "sgd" if solver == "lbfgs" else "lbfgs"
        raise ValueError(
            f"--{extra[0].replace('_', '-')} is for --solver {other}: give that too, or omit both."
        )
    from mocohub.probes.linear import LinearProbe

    probe = LinearProbe(
        solver,
        base_lr=lr or (30.0,),
        weight_decay=weight_decay,
        epochs=100 if epochs is None else epochs,
        global_batch_size=256 if batch_size is None else batch_size,
        schedule=schedule,
        C=C,
        device=device or "cpu",
        random_state=seed,
    )
    _probe(probe, None, train, val, json_file)


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
    for folder in (train, val):
        if (Path(folder) / "manifest.json").is_file():
            raise ValueError(
                f"'{folder}' is a feature folder, but --protocol {protocol} trains on images, cropped anew "
                "in every epoch. Give the images, or omit --protocol."
            )
    result = linear_protocol(model, train, val, out=out, protocol=changed, num_workers=workers, **run)
    if not first:
        return
    if len(result.heads) > 1:
        for head in result.heads:
            print("lr {base_lr:g}: top-1 {top1_pct:.2f} %".format(**head))
    for record in result.results:
        print("{metric} {value:.2f} on {num_images} images ({protocol})".format(**record))
    collect(json_file, result.results)


def lowshot(
    train: Positional[str],
    val: Positional[str],
    *,
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    fractions: tuple[float, ...] = (),
    draws: int = 20,
    estimator: Literal["logistic", "centroid", "svm"] = "logistic",
    seed: int = 0,
    json_file: JsonFile = None,
) -> None:
    """Accuracy with a few labels of each class: mean, deviation and 95 % interval over draws of the labels.

    Args:
        train: Feature folder the labels are drawn from.
        val: Feature folder it is tested on.
        shots: Labels of each class, one result for each number.
        fractions: Shares of each class, one result for each; at least one label of each class.
        draws: Draws of the labels for each result.
        estimator: Logistic regression (C = 10) or a linear SVM (C = 1) on features of length 1, or the
            nearest centroid by cosine.
        seed: Changes which labels are drawn.
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.probes.lowshot import ESTIMATORS, low_shot

    collected(json_file)
    train_features, val_features = _opened(train, val)
    results = low_shot(
        train_features.values,
        train_features.targets,
        val_features.values,
        val_features.targets,
        shots=shots,
        fractions=fractions,
        draws=draws,
        estimator=estimator,
        seed=seed,
    )
    what = f"{ESTIMATORS[estimator]}, cached features"
    print(f"{what}; top-1 on {len(val_features)} images, %, {draws} draws")
    print(f"{'labels of a class':<20}{'mean':>8}{'std':>8}   95 % interval")
    records = []
    for result in results:
        labels = str(result.shots) if result.fraction is None else f"{100 * result.fraction:g} %"
        protocol = f"{labels} labels of a class, {what}, mean of {draws} draws"
        mean = 100 * result.mean
        record = {"metric": "top-1 (%)", "protocol": protocol, "value": round(mean, 2)}
        spread = ""
        if result.std is not None:
            std, (low, high) = 100 * result.std, (100 * end for end in result.interval)
            spread = f"{std:8.2f}   {low:.2f} to {high:.2f}"
            record |= {"std": round(std, 2), "interval": [round(low, 2), round(high, 2)]}
        print(f"{labels:<20}{mean:8.2f}{spread}")
        records.append(record)
    record_results(records, train, val, len(val_features), json_file)


def svm(
    train: Positional[str],
    val: Positional[str],
    *,
    voc: str,
    year: int = 2007,
    splits: tuple[str, str] = ("trainval", "test"),
    costs: tuple[float, ...] = (),
    jobs: int = -1,
    json_file: JsonFile = None,
) -> None:
    """Mean average precision of linear SVMs on VOC07, the protocol of Goyal et al. (arXiv 1905.01235).

    Features and labels meet by the images' file names. Both folders may be one, of all images.

    Args:
        train: Feature folder of the images of the first split.
        val: Feature folder of the images of the second.
        voc: The folder VOCdevkit, or the VOC2007 in it.
        year: Of the folder VOC2007 in it.
        splits: What to train and to test on.
        costs: SVM costs C, of which 3-fold cross-validation chooses one for each class. Default: the paper's.
        jobs: Processes; -1 for one on each core.
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.evaluation.voc import read_voc, rows_of
    from mocohub.probes.svm import COSTS, MultiLabelSVM, average_precision

    collected(json_file)
    train_labels = read_voc(voc, splits[0], year=year)
    val_labels = read_voc(voc, splits[1], year=year, classes=train_labels.classes)
    train_features, val_features = _opened(train, val)
    train_rows = rows_of(train_features, train_labels, val_labels.stems)
    val_rows = rows_of(val_features, val_labels, train_labels.stems)
    probe = MultiLabelSVM(costs or COSTS, n_jobs=jobs)
    probe.fit(train_features.values[train_rows], train_labels.labels)
    scores = probe.decision_function(val_features.values[val_rows])
    area = 100 * average_precision(val_labels.labels, scores)
    eleven = 100 * average_precision(val_labels.labels, scores, points=11)
    print(f"{'':<16}{'AP':>8}{'11-point':>10}{'cost':>12}   (%, {len(val_rows)} images of {splits[1]})")
    for name, ap, ap_11, cost in zip(train_labels.classes, area, eleven, probe.costs_, strict=True):
        print(f"{name:<16}{ap:8.2f}{ap_11:10.2f}{cost:12.3g}")
    print(f"{'mean':<16}{area.mean():8.2f}{eleven.mean():10.2f}")
    protocol = f"linear SVMs on {splits[0]}, cost of each class by 3 folds (arXiv 1905.01235)"
    records = [
        {"metric": f"VOC{year} mAP (%)", "protocol": f"{protocol}, area", "value": round(area.mean(), 2)},
        {"metric": f"VOC{year} 11-point mAP (%)", "protocol": protocol, "value": round(eleven.mean(), 2)},
    ]
    record_results(records, train, val, len(val_rows), json_file)


def _opened(train: str, val: str) -> tuple[Any, Any]:
    from mocohub.features.store import Features, check_comparable

    train_features, val_features = Features.open(train), Features.open(val)
    check_comparable(train_features, val_features)
    return train_features, val_features


def _probe(probe: Any, protocol: str | None, train: str, val: str, json_file: str | None) -> None:
    """Fit and score; a probe that chooses its setting says its protocol afterwards."""
    import numpy as np

    from mocohub.probes.knn import all_classes

    train_features, val_features = _opened(train, val)
    all_classes(np.unique(train_features.targets), val_features.targets)  # refuses and warns
    probe.fit(train_features.values, train_features.targets)
    protocol = protocol or probe.protocol
    accuracy = 100 * float(probe.score(val_features.values, val_features.targets))
    print(f"top-1 {accuracy:.2f} % on {len(val_features)} images ({protocol}, {len(train_features)} labels)")
    records = [{"metric": "top-1 (%)", "protocol": protocol, "value": round(accuracy, 2)}]
    record_results(records, train, val, len(val_features), json_file)


def record_results(
    records: list[dict[str, Any]], train: str, val: str, num_images: int, json_file: str | None
) -> None:
    """Add records to the file, with what they were measured on."""
    data = {"dataset": Path(train).resolve().name, "split": Path(val).resolve().name}
    collect(json_file, [{**data, "num_images": num_images, **record} for record in records])


def collect(json_file: str | None, records: list[dict[str, Any]]) -> None:
    """Add records to the file, if there is one."""
    from mocohub.files import write_json

    if json_file:
        write_json(json_file, [*collected(json_file), *records])


def collected(json_file: str | None) -> list[dict[str, Any]]:
    """Return the records in the file; verbs ask before they measure anything.

    Raises:
        ValueError: If it is another file, which must not be written over.
        FileNotFoundError: If there is no such folder.
    """
    from mocohub.files import read_json

    if json_file is None:
        return []
    if not Path(json_file).parent.is_dir():
        raise FileNotFoundError(
            f"--json {json_file}: there is no folder '{Path(json_file).parent}'. Make it first."
        )
    known = read_json(json_file) if Path(json_file).exists() else []
    if not isinstance(known, list):
        raise ValueError(f"--json {json_file} is there and holds no list of results. Choose another file.")
    return known
