"""Verbs that judge a model or its features: evaluate, retrieval, health."""

import logging
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from mocohub.cli.probing import JsonFile, collected, record_results

Probe = Literal["knn", "linear", "lowshot", "retrieval", "health"]


def evaluate(
    model: Positional[str | None] = None,
    *,
    train: str,
    val: str,
    out: str,
    probes: tuple[Probe, ...] | None = None,
    layers: tuple[str, ...] = (),
    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200),
    temperatures: tuple[float, ...] = (0.02, 0.07, 0.1, 0.2, 0.5),
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    fractions: tuple[float, ...] = (0.01, 0.1),
    draws: int = 20,
    ranks: tuple[int, ...] = (1, 5, 10),
    seed: int = 0,
    linear_protocol: Literal["moco", "mocov3", "dinov2"] | None = None,
    epochs: int | None = None,
    dataset: str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    batch_size: int = 64,
    workers: int | None = None,
    no_page: bool = False,
) -> None:
    """Measure a model with every probe from one extraction: results.json and a page with plots.

    The same command again does only what is missing, whatever stopped it.

    Args:
        model: What `mocohub.load` takes; omitted if --train and --val are feature folders.
        train: Labelled images (a folder with a sub-folder for each class, a list, tar shards), or a finished
            feature folder: what classifiers learn from and what is searched.
        val: What is tested: images or a feature folder, as for --train.
        out: Folder for features, results.json and index.html.
        probes: What to measure. Default: all that the data allow; without labels that is health.
        layers: Modules of the model, stage1 to stage4, or embedding: each is evaluated. Default: embedding.
        ks: Numbers of neighbours for the grid of kNN; 200 is always among them.
        temperatures: T in the weights exp(cosine / T) for the grid of kNN; 0.07 is always among them.
        shots: Labels of each class for low-shot, one result for each number.
        fractions: Shares of the labels of each class, likewise; only those that leave the smallest class at
            least one label.
        draws: Draws of the labels for each of --shots and --fractions.
        ranks: k of recall@k, for retrieval.
        seed: Changes all draws.
        linear_protocol: Also train a paper's linear classifier on the images, which takes hours.
        epochs: Epochs of --linear-protocol instead of its own.
        dataset: Name of the data in the results. Default: that of the folder.
        device: Where to compute. Default: cuda if there is a card.
        dtype: Of the forward pass. "auto" is bfloat16 where that is fast and the features agree.
        batch_size: Images in one forward pass.
        workers: Processes that decode images. Default: one per core, at most 16.
        no_page: Write results.json only.
    """
    from mocohub.evaluation.evaluate import evaluate as run

    logging.getLogger("mocohub").setLevel(logging.INFO)  # which probe is at work
    results = run(
        model,
        train=train,
        val=val,
        out=out,
        probes=probes,
        layers=layers,
        ks=ks,
        temperatures=temperatures,
        shots=shots,
        fractions=fractions,
        draws=draws,
        ranks=ranks,
        seed=seed,
        linear_protocol=linear_protocol,
        epochs=epochs,
        dataset=dataset,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        num_workers=workers,
        page=not no_page,
    )
    print(results)
    for path in (results.path, *([] if no_page else [results.page])):
        print(path)


def retrieval(
    queries: Positional[str],
    gallery: Positional[str | None] = None,
    *,
    ranks: tuple[int, ...] = (1, 5, 10),
    labels: str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    json_file: JsonFile = None,
) -> None:
    """Rank a gallery for every query by cosine: recall@k, mAP, MAP@R.

    Args:
        queries: Feature folder whose images ask.
        gallery: Feature folder whose images are ranked. Default: the queries, each without itself.
        ranks: k of recall@k.
        labels: List file (.csv, .tsv, .txt) of paths and labels: what makes two images relevant to each
            other, for instance the object each shows (instance retrieval). Default: the class. Images that it
            does not name are no queries, and distractors in the gallery.
        device: Where to compute. Default: cuda if there is a card.
        json_file: File that collects results for `mocohub export --probes`.
    """
    import numpy as np

    from mocohub.evaluation.results import mean_interval
    from mocohub.features.page import labels_of_rows
    from mocohub.features.store import Features, check_comparable
    from mocohub.features.writer import NO_LABEL
    from mocohub.probes.knn import wilson
    from mocohub.probes.retrieval import retrieval as run

    collected(json_file)
    asked = Features.open(queries)
    ranked = asked if gallery is None else Features.open(gallery)
    if gallery is not None and Path(queries).resolve() == Path(gallery).resolve():
        raise ValueError(
            f"'{queries}' is given twice, so that each image would find itself. Give it once: then each is "
            "left out of its own ranking."
        )
    check_comparable(asked, ranked)
    names = []
    for features in (asked, ranked):
        numbers, classes = labels_of_rows(features, labels)
        names.append(np.array([None if i == NO_LABEL else classes[i] for i in numbers], object))
    rows = np.flatnonzero([name is not None for name in names[0]])
    if not len(rows):
        raise ValueError(f"'{queries}' has no labels. Give --labels, a list file of paths and labels.")
    distractor = "-" + max(filter(None, names[0]), key=len)  # a name that no query has
    found = run(
        asked.values[rows],
        names[0][rows].astype(str),
        ranked,
        np.array([distractor if name is None else name for name in names[1]]),
        ks=ranks,
        ignored=[[row] for row in rows] if gallery is None else None,
        device=device,
    )
    num_gallery = len(ranked) - (gallery is None)
    protocol = f"retrieval by {'label' if labels else 'class'} among {num_gallery} images, cosine"
    num, precisions, at_r = found.num_queries, found.average_precisions, found.average_precisions_at_r
    numbers = {f"recall@{k} (%)": (share, wilson(share, num)) for k, share in found.recall.items()}
    numbers["mAP (%)"] = found.mean_average_precision, mean_interval(precisions)
    numbers["mAP@R (%)"] = found.mean_average_precision_at_r, mean_interval(at_r)
    for metric, (share, (low, high)) in numbers.items():
        print(f"{metric:<14}{100 * share:6.2f}   {100 * low:.2f} to {100 * high:.2f}")
    left_out = len(asked) - found.num_queries
    print(f"{num} queries, {left_out} left out ({protocol}; 95 % intervals over queries)")
    records = [
        {
            "metric": metric,
            "protocol": protocol,
            "value": round(100 * share, 2),
            "interval": [round(100 * end, 2) for end in interval],
        }
        for metric, (share, interval) in numbers.items()
    ]
    record_results(records, gallery or queries, queries, num, json_file)


def health(features: Positional[str], *, seed: int = 0, json_file: JsonFile = None) -> None:
    """Say whether features have collapsed: ranks, uniformity, dead dimensions, repeated rows.

    Args:
        features: Feature folder; labels are used where there are any, but need not be.
        seed: Changes the rows among which uniformity is computed.
        json_file: File to write all numbers to, singular values included.
    """
    import dataclasses

    import numpy as np

    from mocohub.features.store import Features
    from mocohub.files import write_json
    from mocohub.probes.health import health as run

    store = Features.open(features)
    labelled = store.labels is not None and (store.labels >= 0).all()
    found = run(store, store.targets if labelled else None, seed=seed)
    facts: dict[str, Any] = {
        field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "dead"
    }
    facts["dead"] = list(found.dead)
    facts["singular_values"] = np.asarray(found.singular_values).tolist()
    print(found.words)
    for name, value in facts.items():
        if isinstance(value, float | int):
            print(f"{name:<24}{value:.6g}")
    if json_file:
        write_json(json_file, {"words": found.words, **facts})
