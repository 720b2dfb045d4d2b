"""Verbs from features to numbers: knn, linear, lowshot, svm."""

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
    solver: Literal["sgd", "lbfgs"] = "lbfgs",
    C: tuple[float, ...] = (1.0,),
    lr: tuple[float, ...] = (30.0,),
    weight_decay: tuple[float, ...] = (0.0,),
    epochs: int = 100,
    batch_size: int = 256,
    schedule: Literal["step", "cosine"] = "step",
    device: Literal["cpu", "cuda"] = "cpu",
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Linear classification of frozen, cached features (no augmentation: not the papers' full protocol).

    Of several values the best on a tenth of the training images, held out, is taken; then all train.

    Args:
        train: Feature folder the classifier is trained on.
        val: Feature folder it is tested on.
        solver: "lbfgs" is logistic regression; "sgd" the papers' schedule (lr 30, drops at 60 % and 80 %).
        C: Inverse strength of L2 regularisation, for lbfgs; several are fitted as one path.
        lr: Learning rate for a batch of 256, for sgd; several are trained at once.
        weight_decay: For sgd; all combinations with --lr are trained at once.
        epochs: Passes over the features, for sgd.
        batch_size: Features in one step, for sgd.
        schedule: Of the learning rate, for sgd.
        device: Where to compute.
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.probes.linear import LinearProbe

    probe = LinearProbe(
        solver,
        base_lr=lr,
        weight_decay=weight_decay,
        epochs=epochs,
        global_batch_size=batch_size,
        schedule=schedule,
        C=C,
        device=device,
    )
    _probe(probe, None, train, val, json_file)


def lowshot(
    train: Positional[str],
    val: Positional[str],
    *,
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    fractions: tuple[float, ...] = (),
    draws: int = 20,
    estimator: Literal["logistic", "centroid", "svm"] = "logistic",
    seed: int = 0,
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
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
    print(f"{ESTIMATORS[estimator]}, cached features; top-1 on {len(val_features)} images, %, {draws} draws")
    print(f"{'labels of a class':<20}{'mean':>8}{'std':>8}   95 % interval")
    records = []
    for result in results:
        labels = str(result.shots) if result.fraction is None else f"{100 * result.fraction:g} %"
        mean, std = 100 * result.mean, None if result.std is None else 100 * result.std
        spread = (
            ""
            if std is None
            else f"{std:8.2f}   {100 * result.interval[0]:.2f} to {100 * result.interval[1]:.2f}"
        )
        print(f"{labels:<20}{mean:8.2f}{spread}")
        protocol = (
            f"{labels} labels of a class, {ESTIMATORS[estimator]}, cached features, mean of {draws} draws"
        )
        records.append({"metric": "top-1 (%)", "protocol": protocol, "value": round(mean, 2)})
        if std is not None:
            interval = [round(100 * end, 2) for end in result.interval]
            records[-1] |= {"std": round(std, 2), "interval": interval}
    _record(records, train, val, len(val_features), json_file)


def svm(
    train: Positional[str],
    val: Positional[str],
    *,
    voc: str,
    year: int = 2007,
    splits: tuple[str, str] = ("trainval", "test"),
    costs: tuple[float, ...] = (),
    jobs: int = -1,
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Mean average precision of linear SVMs on VOC07, the protocol of Goyal et al. (arXiv 1905.01235).

    Features and labels meet by the images' file names. Both folders may be one, of all images.

    Args:
        train: Feature folder of the images of the first split.
        val: Feature folder of the images of the second.
        voc: The folder VOCdevkit, or the VOC2007 in it.
        year: Names the folder in it.
        splits: What to train and to test on.
        costs: To choose from by 3-fold cross-validation, for each class. Default: those of the paper.
        jobs: Processes; -1 for one on each core.
        json_file: File that collects results for `mocohub export --probes`.
    """
    from mocohub.evaluation.voc import read_voc, rows_of
    from mocohub.probes.svm import COSTS, MultiLabelSVM, average_precision

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
    _record(records, train, val, len(val_rows), json_file)


def _opened(train: str, val: str) -> tuple[Any, Any]:
    from mocohub.features.store import Features, check_comparable

    train_features, val_features = Features.open(train), Features.open(val)
    check_comparable(train_features, val_features)
    return train_features, val_features


def _probe(probe: Any, protocol: str | None, train: str, val: str, json_file: str | None) -> None:
    """Fit and score; a probe that chooses its setting says its protocol afterwards."""
    train_features, val_features = _opened(train, val)
    probe.fit(train_features.values, train_features.targets)
    protocol = protocol or probe.protocol
    accuracy = 100 * float(probe.score(val_features.values, val_features.targets))
    print(f"top-1 {accuracy:.2f} % on {len(val_features)} images ({protocol}, {len(train_features)} labels)")
    records = [{"metric": "top-1 (%)", "protocol": protocol, "value": round(accuracy, 2)}]
    _record(records, train, val, len(val_features), json_file)


def _record(
    records: list[dict[str, Any]], train: str, val: str, num_images: int, json_file: str | None
) -> None:
    """Add records to the file that collects them, with what they were measured on."""
    from mocohub.files import read_json, write_json

    if json_file:
        data = {"dataset": Path(train).resolve().name, "split": Path(val).resolve().name}
        known = read_json(json_file) if Path(json_file).exists() else []
        write_json(json_file, [*known, *({**data, "num_images": num_images, **record} for record in records)])
