"""results.json: numbers, each with its data, its protocol and how far it can be trusted.

    {
      "format": "mocohub-results/1",
      "model":    {"name", "architecture", "weights_sha256", "file_sha256"},
      "features": {"train": {...}, "val": {...}},   manifest_sha256, rows, errors, transform, ... of each
      "versions": {...}, "machine": "...", "started": "...", "seconds": 12.3,
      "notes":    ["what was left out, and why"],
      "commands": ["what repeats it"],
      "results":  [records, see `Result`]
    }

The file is complete or absent.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from mocohub.files import read_json, replace_file
from mocohub.hub.records import RESULTS_FORMAT, check_probes

_KEYS = ("model", "features", "versions", "machine", "started", "seconds", "notes", "commands", "results")
_OF_THE_RUN = ("versions", "machine", "started", "seconds", "commands")  # may differ for the same numbers
_QUANTILE = float(norm.ppf(0.975))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number.

    Attributes:
        dataset: Name of the data.
        split: Part of them it was measured on.
        num_images: Images it was measured on.
        metric: What it is, with its unit: "top-1 (%)".
        protocol: How it was measured, complete enough to do it again.
        value: The number; the mean, if there are several measurements.
        n: Measurements: draws of labels, runs; 1 where nothing is drawn.
        std: Standard deviation between them; None for one.
        interval: 95 % confidence interval of the value; None where none is known.
        interval_over: What would be drawn anew: "test images (Wilson)".
        headline: Whether it goes into the model card.
        settings: Everything the probe was told or has chosen, as JSON values.
    """

    dataset: str
    split: str
    num_images: int
    metric: str
    protocol: str
    value: float
    n: int = 1
    std: float | None = None
    interval: tuple[float, float] | None = None
    interval_over: str | None = None
    headline: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """An evaluation that is finished.

    Attributes:
        path: results.json.
        document: Its content.
    """

    path: Path
    document: dict[str, Any] = field(repr=False)

    @property
    def records(self) -> list[Result]:
        """The numbers."""
        return [_record(record, self.path) for record in self.document["results"]]

    @property
    def page(self) -> Path:
        """The page with plots, if it was written."""
        return self.path.with_name("index.html")

    def __str__(self) -> str:
        rows = [(value_text(r), interval_text(r), r.metric, r.protocol) for r in self.records]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]] if rows else []
        lines = [
            "  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), row[3]])
            for row in rows
        ]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.document["notes"])])

    @classmethod
    def open(cls, path: str | Path) -> "Results":
        """Read results.json, or the folder that holds it, and check it.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of another format, lacks something or holds an incomplete record.
        """
        path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"'{path}' does not exist. Give what `mocohub evaluate --out` wrote.")
        return cls(path, _checked(read_json(path), path))

    @classmethod
    def write(cls, path: Path, document: dict[str, Any]) -> "Results":
        """Write results.json, or leave it as it is if it says the same of another run.

        Raises:
            ValueError: If the document is incomplete.
        """
        document = json.loads(json.dumps({"format": RESULTS_FORMAT, **document}, allow_nan=False))
        _checked(document, path)
        if path.is_file():
            known = read_json(path)
            if isinstance(known, dict) and _lasting(known) == _lasting(document):
                return cls(path, known)
        replace_file(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return cls(path, document)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent shares (n,), by their spread; (0, 1) for one."""
    if len(values) < 2:
        return 0.0, 1.0
    half = _QUANTILE * float(values.std(ddof=1)) / math.sqrt(len(values))
    return max(0.0, float(values.mean()) - half), min(1.0, float(values.mean()) + half)


def value_text(record: Result) -> str:
    """A number as a reader wants it: two decimals of a percentage, four digits of anything else.

    >>> common = {"dataset": "d", "split": "val", "num_images": 9, "protocol": "p"}
    >>> [value_text(Result(metric=metric, value=5.0, **common)) for metric in ("mAP (%)", "rank")]
    ['5.00', '5']
    """
    return f"{record.value:.2f}" if record.metric.endswith("(%)") else f"{record.value:.4g}"


def interval_text(record: Result) -> str:
    """Interval or standard deviation of a number, as a reader wants it beside the value."""
    if record.interval is not None:
        return f"[{record.interval[0]:.2f}, {record.interval[1]:.2f}]"
    return "" if record.std is None else f"± {record.std:.2f}"


def as_records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return numbers as they stand in results.json."""
    return [asdict(result) for result in results]


def _lasting(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _OF_THE_RUN}


def _checked(document: Any, path: Path) -> dict[str, Any]:
    found = document.get("format") if isinstance(document, dict) else None
    if found != RESULTS_FORMAT:
        raise ValueError(f"'{path}' has format {found!r}, but results have {RESULTS_FORMAT!r}.")
    if missing := [key for key in _KEYS if key not in document]:
        raise ValueError(f"'{path}' does not say {', '.join(missing)}. Evaluate again.")
    try:
        check_probes(document["results"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' has a record that is not complete: {error}") from error
    for record in document["results"]:
        _record(record, path)
    return document


def _record(record: Mapping[str, Any], path: Path) -> Result:
    try:
        result = Result(**record)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(Result))
        raise ValueError(f"'{path}' has a record that is none: {error}. A record has {known}.") from error
    low_high = result.interval
    if low_high is not None and not (len(low_high) == 2 and low_high[0] <= result.value <= low_high[1]):
        raise ValueError(f"'{path}' has a value {result.value} outside of its interval {low_high}.")
    return result
