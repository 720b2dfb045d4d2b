"""The probes of an evaluation: two sets of features in, results out, and what the page draws of them.

Every function returns its results and a dict of details as JSON values.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from mocohub.evaluation.results import Result, mean_interval
from mocohub.features.store import Features
from mocohub.features.writer import NO_LABEL
from mocohub.probes.health import health as measure_health
from mocohub.probes.health import row_hashes
from mocohub.probes.knn import KNNResult, knn_grid, wilson
from mocohub.probes.linear import LinearProbe
from mocohub.probes.lowshot import ESTIMATORS, LowShotResult, low_shot
from mocohub.probes.neighbors import unit_rows
from mocohub.probes.retrieval import retrieval as measure_retrieval

Measured = tuple[list[Result], dict[str, Any]]

MAIN_K, MAIN_TEMPERATURE = 200, 0.07  # arXiv 1805.01978, section 3.4
_HISTOGRAM_ROWS, _HISTOGRAM_BINS = 2000, 60
_MOST_SHOWN_CLASSES, _MOST_PAIRS = 40, 20
_LOW_SHOT_ESTIMATORS = ("logistic", "centroid")
_CS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)  # for features of length 1
_LOO_ROWS = 10_000  # whose nearest neighbours among themselves health looks at


class Split:
    """One column of features as a probe takes it: with `blocks()` and a length, of labelled rows or of all.

    Attributes:
        name: "val".
        labels: Class name of each row (N,), or its number where classes have no names; None for all rows.
        num_unlabelled: Rows that were left out because they have no label.
    """

    def __init__(self, name: str, features: Features, column: str, *, labelled: bool) -> None:
        """Keep the rows with a label, or all of them; nothing is read yet."""
        self.name, self.features, self.column = name, features, column
        self._kept, self.labels, self.num_unlabelled = None, None, 0
        if labelled:
            kept = features.labels != NO_LABEL
            numbers = features.labels[kept]
            self.labels = numbers if features.classes is None else np.array(features.classes)[numbers]
            self.num_unlabelled = int((~kept).sum())
            self._kept = kept if self.num_unlabelled else None

    def __len__(self) -> int:
        return len(self.features) - self.num_unlabelled

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows in order, (n, D) at a time."""
        start = 0
        for block in self.features.blocks(self.column):
            kept = slice(None) if self._kept is None else self._kept[start : start + len(block)]
            yield block[kept]
            start += len(block)

    @property
    def values(self) -> np.ndarray:
        """All rows (N, D), in memory."""
        values = self.features[self.column]
        return values if self._kept is None else values[self._kept]


@dataclass(frozen=True)
class Data:
    """What is measured, and under which name.

    Attributes:
        dataset: Name for the results.
        train: Features that are learned from, or searched.
        val: Features that are tested.
        suffix: Of every protocol: ", layer stage3", or nothing.
        device: Where to compute.
        seed: Of all that is drawn.
    """

    dataset: str
    train: Split
    val: Split
    suffix: str
    device: str
    seed: int

    def result(self, metric: str, protocol: str, share: float, **others: Any) -> Result:
        """Return a share of the test images in percent, with Wilson's interval unless another is given."""
        interval = others.pop("interval", None) or wilson(share, others.get("num_images", len(self.val)))
        return Result(
            **{
                "dataset": self.dataset,
                "split": self.val.name,
                "num_images": len(self.val),
                "metric": metric,
                "protocol": protocol + self.suffix,
                "value": _percent(share),
                "interval": tuple(_percent(min(max(bound, 0.0), 1.0)) for bound in interval),
                "interval_over": "test images (Wilson)",
                **others,
            }
        )


def knn(data: Data, ks: Sequence[int], temperatures: Sequence[float]) -> Measured:
    """Classify by the nearest neighbours for every k and T; the result is that of k = 200, T = 0.07."""
    num_train = len(data.train)
    main = min(MAIN_K, num_train), MAIN_TEMPERATURE
    wanted = sorted({*(min(k, num_train) for k in ks), main[0]})
    grid = knn_grid(
        data.train,
        data.train.labels,
        data.val.values,
        data.val.labels,
        ks=wanted,
        temperatures=sorted({*temperatures, main[1]}),
        device=data.device,
    )
    chosen = next(cell for cell in grid if (cell.k, cell.temperature) == main)
    protocol = f"weighted kNN, cosine, k = {chosen.k}, T = {chosen.temperature:g}"
    cells = [[cell.k, cell.temperature, _percent(cell.top1)] for cell in grid]
    settings = {"num_train": num_train, "grid": cells}
    results = [data.result("top-1 (%)", protocol, chosen.top1, headline=True, settings=settings)]
    if len(chosen.classes) > 5:
        results.append(data.result("top-5 (%)", protocol, chosen.top5))
    return results, {
        "protocol": protocol,
        "grid": cells,
        "note": _overlap(data),
        **_confusion(chosen),
    }


def _overlap(data: Data) -> str | None:
    """Say so if test images are among the training images, told by features that are equal to the bit."""
    hashes = [
        np.concatenate([row_hashes(np.asarray(block, np.float32)) for block in split.blocks()])
        for split in (data.train, data.val)
    ]
    if not (num := int(np.isin(hashes[1], hashes[0]).sum())):
        return None
    return (
        f"{num} of {len(data.val)} images of {data.val.name} have exactly the features of an image of "
        f"{data.train.name}. If they are the same images, no accuracy here is one on new images."
    )


def linear(data: Data) -> Measured:
    """Fit logistic regression to features of length 1; its penalty is chosen on held-out training images."""
    can_hold_out = np.unique(data.train.labels, return_counts=True)[1].max() > 1
    probe = LinearProbe("lbfgs", C=_CS if can_hold_out else 10.0, device=data.device, random_state=data.seed)
    pipeline = make_pipeline(Normalizer(), probe).fit(data.train.values, data.train.labels)
    share = float(pipeline.score(data.val.values, data.val.labels))
    settings = {"C": probe.best_params_["C"], "tried": probe.validation_scores_, "seed": data.seed}
    return [
        data.result("top-1 (%)", f"L2-normalised, {probe.protocol}", share, headline=True, settings=settings)
    ], {}


def lowshot(data: Data, shots: Sequence[int], fractions: Sequence[float], draws: int) -> Measured:
    """Train on a few labels of each class, several times, in two ways.

    Numbers and fractions that leave some class without enough labels, or without a whole one, are left out.
    """
    counts = np.unique(data.train.labels, return_counts=True)[1]
    fewest = int(counts.min())
    possible = [num for num in shots if num <= fewest]
    shares = [fraction for fraction in fractions if fraction * fewest >= 1]
    results, curves = [], {}
    for estimator in _LOW_SHOT_ESTIMATORS if possible or shares else ():
        with warnings.catch_warnings():  # one label a class is many classes for so few images
            warnings.filterwarnings("ignore", "The number of unique classes")
            points = low_shot(
                data.train.values,
                data.train.labels,
                data.val.values,
                data.val.labels,
                shots=possible,
                fractions=shares,
                draws=draws,
                estimator=estimator,
                seed=data.seed,
                device=data.device,
            )
        of_curve = [_low_shot_result(data, point, estimator) for point in points]
        curves[ESTIMATORS[estimator]] = [
            [point.shots, point.fraction, result.value, result.interval]
            for point, result in zip(points, of_curve, strict=True)
        ]
        results += of_curve
    details = {"curves": curves, "note": None}
    left_out = [f"{num} labels" for num in shots if num not in possible]
    left_out += [f"{100 * fraction:g} %" for fraction in fractions if fraction not in shares]
    if left_out:
        shown = ", ".join(left_out)
        details["note"] = f"Low-shot with {shown} was left out: the smallest class has {fewest}."
    return results, details


def _low_shot_result(data: Data, point: LowShotResult, estimator: str) -> Result:
    drawn, spread = "one draw", {}
    if point.num_draws > 1:
        drawn = f"mean of {point.num_draws} draws"
        spread = {"n": point.num_draws, "std": _percent(point.std), "interval": point.interval}
        spread["interval_over"] = "draws of labels (Student's t)"
    if point.fraction is None:
        labels = f"{point.shots} label{'s' * (point.shots > 1)} per class"
    else:
        labels = f"{100 * point.fraction:g} % of the labels of each class"
    return data.result(
        "top-1 (%)",
        f"{labels}, {ESTIMATORS[estimator]}, cached features, {drawn}",
        point.mean,
        headline=point.shots == 1 and estimator == _LOW_SHOT_ESTIMATORS[0],
        settings={"accuracies": [_percent(share) for share in point.accuracies], "seed": data.seed},
        **spread,
    )


def retrieval(data: Data, ranks: Sequence[int]) -> Measured:
    """Rank all training images for each test image."""
    found = measure_retrieval(
        data.val, data.val.labels, data.train, data.train.labels, ks=ranks, device=data.device
    )
    protocol = f"retrieval by class among {found.num_gallery:,} training images, cosine"
    common = {"num_images": found.num_queries, "settings": {"num_left_out": found.num_left_out}}
    results = [
        data.result(f"recall@{k} (%)", protocol, share, headline=k == 1, **common)
        for k, share in found.recall.items()
    ]
    for metric, precisions in (
        ("mAP (%)", found.average_precisions),
        ("mAP@R (%)", found.average_precisions_at_r),
    ):
        spread = {"interval": mean_interval(precisions), "interval_over": "test images (normal)"}
        headline = metric == "mAP (%)"
        results.append(
            data.result(metric, protocol, precisions.mean(), headline=headline, **spread, **common)
        )
    return results, {"histogram": _histogram(data)}


def health(data: Data, views: tuple[np.ndarray, np.ndarray] | None) -> Measured:
    """Look at the spread of the training features, and at how well each class finds itself."""
    split = data.train
    found = measure_health(split, split.labels, views=views, seed=data.seed)
    numbers = {
        "effective rank": found.effective_rank,
        "RankMe": found.rankme,
        "participation ratio": found.participation_ratio,
        "mean cosine of two images": found.mean_cosine,
        "uniformity": found.uniformity,
        "alignment": found.alignment,
        "squared distance within a class": found.alignment_same_class,
    }
    protocols = {
        "effective rank": f"of at most {min(found.num_features, found.num_rows - 1)}, centred features",
        "RankMe": f"of at most {min(found.num_features, found.num_rows)} (arXiv 2210.02885)",
        "participation ratio": "centred features",
        "mean cosine of two images": "all pairs",
        "uniformity": f"t = 2, among {found.uniformity_rows:,} images (arXiv 2005.10242)",
        "alignment": "image and its mirror image, alpha = 2 (arXiv 2005.10242)",
        "squared distance within a class": "all pairs of one class, length 1; not the alignment of a paper",
    }
    results = [
        Result(
            dataset=data.dataset,
            split=data.val.name if metric == "alignment" else split.name,
            num_images=len(views[0]) if metric == "alignment" else found.num_rows,
            metric=metric,
            protocol=protocols[metric] + data.suffix,
            value=float(f"{value:.6g}"),
            settings={"seed": data.seed} if metric == "uniformity" else {},
        )
        for metric, value in numbers.items()
        if value is not None
    ]
    details = {
        "verdict": found.verdict,
        "words": found.words,
        "num_rows": found.num_rows,
        "num_features": found.num_features,
        "dead": len(found.dead),
        "zero_rows": found.num_zero_rows,
        "constant_rows": found.num_constant_rows,
        "duplicate_rows": found.num_duplicate_rows,
        "norms": {name: float(f"{value:.6g}") for name, value in found.norms.items()},
        "singular_values": [float(f"{value:.6g}") for value in found.singular_values],
    }
    if split.labels is not None:
        details["knn_of_class"] = _leave_one_out(split, data)
    return results, details


def _leave_one_out(split: Split, data: Data) -> dict[str, Any]:
    """Accuracy of each class when every image is classified by the others (or by those of a sample)."""
    rows = np.random.default_rng(data.seed).permutation(len(split))[:_LOO_ROWS]
    values, labels = split.values[rows], split.labels[rows]
    k = min(20, len(rows) - 1)
    if k < 1:
        return {}
    (cell,) = knn_grid(
        values,
        labels,
        ks=(k,),
        temperatures=(MAIN_TEMPERATURE,),
        leave_one_out=True,
        device=data.device,
    )
    of_class = _confusion(cell)["of_class"]
    return {"k": k, "num_images": len(rows), "top1": _percent(cell.top1), "of_class": of_class}


def _confusion(cell: KNNResult) -> dict[str, Any]:
    """Accuracy of each class that is there, the pairs most often confused, and the matrix if it is small."""
    matrix, names = cell.confusion, [str(name) for name in cell.classes]
    counts = matrix.sum(1)
    of_class = [
        [names[i], _percent(matrix[i, i] / counts[i]), int(counts[i])] for i in np.flatnonzero(counts)
    ]
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    confused = [[names[i], names[j], int(wrong[i, j]), _percent(wrong[i, j] / counts[i])] for i, j in pairs]
    small = len(names) <= _MOST_SHOWN_CLASSES
    return {
        "of_class": of_class,
        "confused": confused,
        "classes": names if small else None,
        "matrix": matrix.astype(int).tolist() if small else None,
    }


def _histogram(data: Data) -> dict[str, Any]:
    """How often cosines of test images of one class, and of different classes, fall into each bin."""
    rows = np.random.default_rng(data.seed).permutation(len(data.val))[:_HISTOGRAM_ROWS]
    units = unit_rows(torch.tensor(data.val.values[np.sort(rows)], dtype=torch.float32)).numpy()
    labels = data.val.labels[np.sort(rows)]
    cosines = units @ units.T
    pairs = np.triu(np.ones(cosines.shape, bool), 1)
    same = labels[:, None] == labels[None]
    edges = np.linspace(min(0.95, float(cosines.min())), 1.0, _HISTOGRAM_BINS + 1)
    return {
        "num_images": len(rows),
        "edges": [float(f"{edge:.4g}") for edge in edges],
        "same": np.histogram(np.clip(cosines[pairs & same], None, 1), edges)[0].tolist(),
        "different": np.histogram(np.clip(cosines[pairs & ~same], None, 1), edges)[0].tolist(),
    }


def _percent(share: float) -> float:
    return round(100 * float(share), 2)
