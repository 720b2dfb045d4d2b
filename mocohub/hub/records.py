"""Measured numbers for model cards, each with its protocol: read, checked, put beside those known."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mocohub.files import read_json

# What a probe's record must state: a number without its protocol compares with nothing.
PROBE_KEYS = ("dataset", "metric", "value", "protocol")

RESULTS_FORMAT = "mocohub-results/1"  # of results.json, see mocohub/evaluation/results.py
# What a card keeps of a record there, as far as it is known.
_KEPT = (
    "dataset",
    "dataset_id",
    "split",
    "num_images",
    "metric",
    "protocol",
    "value",
    "n",
    "std",
    "interval",
)


def check_probes(probes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of measured numbers, each complete.

    Args:
        probes: Each with `dataset`, `metric` ("top-1 (%)"), `value`, `protocol` ("kNN, k=200, T=0.07"), and
            if known `dataset_id` (on the Hub), `split`, `num_images`, `source`.

    Raises:
        ValueError: If a record lacks one of the first four, or its value is not a finite number.
    """
    probes = [dict(probe) for probe in probes]
    for probe in probes:
        if missing := [key for key in PROBE_KEYS if probe.get(key) in (None, "")]:
            raise ValueError(
                f"The probe {probe} lacks {', '.join(missing)}. A number is published with its protocol "
                f"or not at all: give {', '.join(PROBE_KEYS)}."
            )
        value = probe["value"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"The value {value!r} of the probe {probe} is not a finite number.")
    return probes


def read_results(path: str | Path) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Return the numbers for a card, and what is said of the model they are of.

    Args:
        path: A list of records, or results.json of `mocohub evaluate`, or the folder of that.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds neither, or a record is incomplete.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else path
    records, model = read_json(path), None
    if isinstance(records, Mapping) and records.get("format") == RESULTS_FORMAT:
        model, records = records.get("model"), records.get("results")
        if isinstance(records, list):
            chosen = [r for r in records if isinstance(r, Mapping) and r.get("headline")]
            records = [{key: r[key] for key in _KEPT if r.get(key) is not None} for r in chosen]
            if not records:
                raise ValueError(
                    f"'{path}' has no headline number for a card: set \"headline\" of one to true."
                )
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise ValueError(
            f"'{path}' holds no list of measured numbers, as `mocohub knn --json FILE` writes it, nor is it "
            "results.json of `mocohub evaluate`."
        )
    return check_probes(records), model if isinstance(model, Mapping) else {}


def refuse_other_model(facts: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Raise ValueError if numbers were measured with other weights than those the facts are of."""
    weights, own = measured.get("file_sha256"), facts.get("sha256", {}).get("model.safetensors")
    if weights and own and weights != own:
        raise ValueError(
            f"The results are of weights with SHA-256 {weights}, but those of '{facts['name']}' have {own}. "
            "Give results of this model."
        )
    architecture, own = measured.get("architecture"), facts.get("architecture")
    if architecture and own and architecture != own:
        raise ValueError(
            f"The results are of a {architecture}, but '{facts['name']}' is a {own}. Give results of this "
            "model."
        )


def merged(known: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of both; of the same data, metric and protocol only the newer one, in the older one's place."""

    def protocol(probe: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(probe.get(key) for key in ("dataset", "split", "metric", "protocol"))

    return list({protocol(probe): probe for probe in (*known, *measured)}.values())
