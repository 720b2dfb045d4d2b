"""Verbs from features to numbers: knn, lowshot, svm; and the file in which verbs collect their numbers."""

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
    from mocohub.features.store import Features
    from mocohub.probes.knn import knn_grid

    bank, queries = (Features.open(train), None) if val is None else opened(train, val)
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
    records = []
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
        records.append({**record, "interval": [round(low, 2), round(high, 2)]})
    record_results(records, train, val or train, results[0].num_images, json_file)


def lowshot(
    train: Positional[str],
    val: Positional[str],
    *,
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    fractions: tuple[float, ...] = (),
    draws: int = 20,
    estimator: Literal["logistic", "centroid", "svm"] = "logistic",
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
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
        device: Where logistic regression computes.
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.probes.lowshot import ESTIMATORS, low_shot

    collected(json_file)
    train_features, val_features = opened(train, val)
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
        device=device,
    )
    what = f"{ESTIMATORS[estimator]}, cached features"
    print(f"{what}; top-1 on {len(val_features)} images, %, {draws} draws")
    print(f"{'labels of a class':<20}{'mean':>8}{'std':>8}   95 % interval")
    records = []
    for result in results:
        labels = str(result.shots) if result.fraction is None else f"{100 * result.fraction:g} %"
        drawn = f"mean of {draws} draws" if draws > 1 else "one draw"
        protocol = f"{labels} label{'s' * (labels != '1')} of a class, {what}, {drawn}"
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
    from mocohub.probes.svm import COSTS, PRESENT, MultiLabelSVM, average_precision

    collected(json_file)
    train_labels = read_voc(voc, splits[0], year=year)
    val_labels = read_voc(voc, splits[1], year=year, classes=train_labels.classes)
    for name, column in zip(val_labels.classes, val_labels.labels.T, strict=True):
        if PRESENT not in column:
            raise ValueError(
                f"{splits[1]} has no image of class {name} to test on: all are absent or difficult. "
                "Choose other --splits."
            )
    train_features, val_features = opened(train, val, may_be_one=True)
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


def opened(train: str, val: str, *, may_be_one: bool = False) -> tuple[Any, Any]:
    """Return the features of two folders.

    Raises:
        ValueError: If they are not comparable, or are one folder where they must not be.
    """
    from mocohub.features.store import Features, check_comparable

    train_features, val_features = Features.open(train), Features.open(val)
    if not may_be_one and Path(train).resolve() == Path(val).resolve():
        raise ValueError(
            f"'{train}' would be tested on what it has learned from. Give another folder to test on; "
            "`mocohub knn FEATURES --leave-one-out` classifies each image of one folder by all others."
        )
    check_comparable(train_features, val_features)
    return train_features, val_features


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
