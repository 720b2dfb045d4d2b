"""Everything one measures of a model, from one extraction: results.json, and a page to look at.

    OUT/features/train, val     feature folders; val_mirrored has some images of val once more, mirrored
    OUT/probes/knn-<key>.json   what one probe found, under a key of all that decides it
    OUT/linear-moco/            the papers' linear classification, if it was asked for
    OUT/results.json            see `mocohub.evaluation.results`
    OUT/index.html

The same call goes on where another stopped, and repeats nothing that is finished.
"""

import hashlib
import inspect
import json
import logging
import math
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

import mocohub
from mocohub.distributed import num_cpus
from mocohub.errors import unknown
from mocohub.evaluation import measure
from mocohub.evaluation.inputs import Sets, is_folder, what_lacks
from mocohub.evaluation.measure import Data, Split
from mocohub.evaluation.page import check_installed, write_page
from mocohub.evaluation.results import Result, Results, as_records
from mocohub.files import read_json, refuse_existing, replace_file
from mocohub.probes.inputs import check_seed, checked_device

_log = logging.getLogger(__name__)

PROBES = ("knn", "linear", "lowshot", "retrieval", "health")
_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def evaluate(
    model: nn.Module | str | Path | None,
    *,
    train: Any,
    val: Any,
    out: str | Path,
    probes: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    ks: Sequence[int] = (1, 5, 10, 20, 50, 100, 200),
    temperatures: Sequence[float] = (0.02, 0.07, 0.1, 0.2, 0.5),
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    fractions: Sequence[float] = (0.01, 0.1),
    draws: int = 20,
    ranks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    linear_protocol: str | None = None,
    epochs: int | None = None,
    dataset: str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    batch_size: int = 64,
    num_workers: int | None = None,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    page: bool = True,
    progress: bool = True,
) -> Results:
    """Extract features once, run every probe on them, and write results.json and a page.

    Args:
        model: What `mocohub.extract` takes; None if `train` and `val` are feature folders.
        train: Images with labels, as `mocohub.extract` takes them, or a finished feature folder: what
            classifiers learn from and what is searched.
        val: Likewise: what is tested. Its classes must be among those of `train`, which may have more.
        out: Folder for all of it; may hold an evaluation of the same features, finished or not.
        probes: Of "knn", "linear", "lowshot", "retrieval" and "health". Default: all that the data allow;
            without labels, or with one class only, that is health, and the results say so.
        layers: Modules of the model (see `mocohub.extract`), each of which is evaluated.
        ks: Numbers of neighbours for the grid of kNN; 200, or all there are, is always among them.
        temperatures: Likewise; 0.07 is always among them.
        shots: Labels of each class for low-shot; those that the smallest class has are used.
        fractions: Likewise shares of the labels of each class, between 0 and 1; those that leave at least
            one whole label in the smallest class are used. May be empty.
        draws: Draws of labels for each of both.
        ranks: Of recall@k.
        seed: Of all draws.
        linear_protocol: Also train the papers' linear classifier on images: "moco", "mocov3" or "dinov2" (see
            `mocohub.evaluation.linear`), which takes hours where the rest takes minutes.
        epochs: Of that, instead of the protocol's own.
        dataset: Name of the data for the results. Default: of the folder of `train`.
        device: Where to compute. Default: CUDA if there is a card.
        dtype: Of the extraction. float32 gives the same numbers on all machines, up to rounding.
        batch_size: Images in one forward pass.
        num_workers: Processes that decode images.
        transform: From a PIL image to the model's input. Default: the model's own.
        page: Write index.html too (extra `report`).
        progress: Show how far an extraction is; on a terminal only.

    Returns:
        The results; `print` shows them as a table.

    Raises:
        FileExistsError: If `out` holds something else.
        FileNotFoundError: If images or features are not there.
        ValueError: If an argument is not accepted; the features are of different models or settings, or not
            of this model; a shard is damaged; a probe that was asked for by name needs labels that are not
            there; `val` has classes that `train` lacks; or `out` holds results of other features.
        ImportError: If matplotlib is missing for the page.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checked_device(device)
    check_seed(seed)
    _check(probes, {"ks": ks, "shots": shots, "draws": [draws], "ranks": ranks}, temperatures, fractions)
    settings = {
        "knn": {"ks": _ascending(int, ks), "temperatures": _ascending(float, temperatures)},
        "linear": {},
        "lowshot": {
            "shots": _ascending(int, shots),
            "fractions": _ascending(float, fractions),
            "draws": int(draws),
        },
        "retrieval": {"ranks": _ascending(int, ranks)},
        "health": {},
    }
    out, started, began = Path(out), datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    protocol = None
    if linear_protocol is not None:
        from mocohub.evaluation.protocols import protocol_by_name

        protocol = protocol_by_name(linear_protocol, epochs=epochs)
        if model is None or is_folder(train) or is_folder(val):
            raise ValueError(
                "The linear protocol trains on images: give a model and images, not feature folders."
            )
    elif epochs is not None:
        raise ValueError(f"epochs={epochs} is of the linear protocol: give linear_protocol too.")
    if layers and is_folder(train) and is_folder(val):
        raise ValueError(
            f"layers={tuple(layers)} are chosen when features are extracted: omit them, and every column of "
            "the feature folders is evaluated."
        )
    _refuse_other_folder(out)
    if page:
        check_installed()
    decisive = {name: value for of in settings.values() for name, value in of.items()}
    decisive = {name: tuple(value) if isinstance(value, list) else value for name, value in decisive.items()}
    decisive |= {"seed": seed, "linear_protocol": linear_protocol, "epochs": epochs, "dtype": dtype}
    decisive |= {"layers": tuple(layers), "dataset": dataset}
    options = {"device": device, "dtype": dtype, "batch_size": batch_size, "num_workers": num_workers}
    options |= {"transform": transform, "layers": tuple(layers), "progress": progress}
    asked = [probe for probe in probes or () if probe != "health"]
    asked += ["the linear protocol"] if protocol is not None else []
    sets = Sets(model, train, val, out / "features", options, asked)
    features = sets.facts()
    _refuse_other_evaluation(out / "results.json", features)
    chosen, notes = _choose(probes, sets, asked)
    for note in notes:
        _log.warning("%s", note)

    results: list[Result] = []
    details: dict[str, dict[str, Any]] = {}
    name = dataset or _dataset(train)
    for column in sets.features["train"].columns:
        labelled = chosen != ["health"]
        train_set, val_set = (
            Split(_split(images, part), sets.features[part], column, labelled=labelled)
            for part, images in (("train", train), ("val", val))
        )
        suffix = f", layer {column}" if len(sets.features["train"].columns) > 1 else ""
        data = Data(name, train_set, val_set, suffix, device, seed)
        details[column] = {}
        for probe in chosen:
            decided_by = {
                "probe": probe,
                "settings": settings[probe],
                "features": [features[part]["manifest_sha256"] for part in ("train", "val")],
                "column": column,
                "names": [name, train_set.name, val_set.name, suffix],
                "seed": seed,
                "version": mocohub.__version__,
            }

            def run(probe: str = probe, data: Data = data, column: str = column) -> measure.Measured:
                _log.info("Measuring %s of %s", probe, column)
                if probe == "health":
                    return measure.health(data, sets.mirrored(column))
                return getattr(measure, probe)(data, **settings[probe])

            found, details[column][probe] = _once(out / "probes", decided_by, run)
            results += found
    if protocol is not None:
        results += _linear_protocol(
            model, train, val, out / f"linear-{linear_protocol}", protocol, seed, device
        )
    notes += [d["note"] for of in details.values() for d in of.values() if d.get("note")]
    document = {
        "model": sets.model,
        "features": features,
        "versions": {"mocohub": mocohub.__version__, **{package: version(package) for package in _PACKAGES}},
        "machine": _machine(device),
        "started": started,
        "seconds": round(time.perf_counter() - began, 1),
        "notes": list(dict.fromkeys(notes)),  # layers may say the same
        "commands": _commands(model, train, val, transform, {"out": str(out), "probes": chosen, **decisive}),
        "results": as_records(results),
    }
    written = Results.write(out / "results.json", document)
    if page:
        write_page(written, details)
    return written


def _check(
    probes: Sequence[str] | None,
    numbers: dict[str, Sequence[int]],
    temperatures: Sequence[float],
    fractions: Sequence[float],
) -> None:
    for probe in probes if probes is not None else ():
        if probe not in PROBES:
            raise unknown("probe", probe, PROBES)
    if probes is not None and not probes:
        raise ValueError(f"probes is empty. Give some of {', '.join(PROBES)}, or omit it for all.")
    for name, given in numbers.items():
        if not len(given) or not all(isinstance(n, Integral) and n > 0 for n in given):
            raise ValueError(f"{name} is {list(given)}, but must be whole numbers, 1 or more.")
    if not len(temperatures) or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperatures is {list(temperatures)}, but must be positive.")
    if not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"fractions is {list(fractions)}, but must be between 0 and 1, such as 0.01.")


def _ascending(kind: type, numbers: Sequence[Any]) -> list[Any]:
    return sorted({kind(number) for number in numbers})


def _refuse_other_folder(out: Path) -> None:
    ours = any((out / name).exists() for name in ("features", "probes", "results.json"))
    if not ours:
        refuse_existing(out)


def _choose(probes: Sequence[str] | None, sets: Sets, asked: list[str]) -> tuple[list[str], list[str]]:
    """Return the probes that the data allow, in our order, and notes on what is missing."""
    notes, problem = [], None
    for name, features in sets.features.items():
        if features.errors:
            total = len(features) + len(features.errors)
            notes.append(
                f"{len(features.errors)} of {total} images of {name} have no features; no number counts them."
            )
        problem = problem or what_lacks(name, features.labels, asked)
        if features.labels is not None and (missing := int((features.labels < 0).sum())):
            notes.append(f"{missing} of {len(features)} images of {name} have no label and were left out.")
    if problem is None:
        return [probe for probe in PROBES if probe in (probes or PROBES)], notes
    return ["health"], [*notes, f"{problem}: only the health of the features was measured."]


def _once(folder: Path, decided_by: dict[str, Any], run: Callable[[], measure.Measured]) -> measure.Measured:
    """Return what was measured before under the same key, or measure it and keep it."""
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
    path = folder / f"{decided_by['probe']}-{digest[:16]}.json"
    if path.is_file():
        known = read_json(path)
    else:
        results, details = run()
        known = {"decided_by": decided_by, "results": as_records(results), "details": details}
        known = json.loads(json.dumps(known, allow_nan=False))  # the same whether it is read or not
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(known, ensure_ascii=False) + "\n")
    return [Result(**record) for record in known["results"]], known["details"]


def _refuse_other_evaluation(path: Path, features: dict[str, Any]) -> None:
    if not path.is_file():
        return
    known = Results.open(path).document["features"]
    for name in ("train", "val"):
        if known[name]["manifest_sha256"] != features[name]["manifest_sha256"]:
            raise ValueError(
                f"'{path}' holds results of other features of {name}. Choose another --out, or remove it."
            )


def _linear_protocol(
    model: Any, train: Any, val: Any, out: Path, protocol: Any, seed: int, device: str
) -> list[Result]:
    from mocohub.evaluation.linear import linear_protocol

    found = linear_protocol(
        model, train, val, out=out, protocol=protocol, seed=seed, resume="auto", device=device
    )
    known, common = Result.__dataclass_fields__, {"headline": True, "interval_over": "test images (Wilson)"}
    return [
        Result(**{key: value for key, value in record.items() if key in known} | common)
        for record in found.results
    ]


def _dataset(train: Any) -> str:
    """Name of the folder of the training images, or of the one around it if it is only called train."""
    if not isinstance(train, str | Path):
        return "images"
    path = Path(train).resolve()
    return path.parent.name if path.name in ("train", "training") else path.name


def _split(images: Any, name: str) -> str:
    return Path(images).resolve().name if isinstance(images, str | Path) else name


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{num_cpus()} CPU cores, {platform.processor() or platform.machine()}"


def _commands(model: Any, train: Any, val: Any, transform: Any, options: dict[str, Any]) -> list[str]:
    """What repeats the evaluation, if it can be typed."""
    if transform is not None or not all(isinstance(given, str | Path) for given in (train, val, model or "")):
        return []
    words = ["mocohub", "evaluate", *([str(model)] if model else [])]
    words += ["--train", str(train), "--val", str(val)]
    usual = inspect.signature(evaluate).parameters
    for name, value in options.items():
        if value != usual[name].default:
            several = value if isinstance(value, tuple | list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, several)]
    return [shlex.join(words)]
