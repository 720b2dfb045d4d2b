"""Verbs from features to numbers: knn, linear."""

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
