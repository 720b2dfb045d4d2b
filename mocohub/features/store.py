"""Features on disk: Parquet shards any tool can read, a manifest that proves them, and a list of errors.

A feature folder holds

    part-00000-of-00008.parquet   id int64, path string, label int64 or null, embedding list<float>[D]
    manifest.json                 what made the features, and rows and SHA-256 of each shard
    errors.jsonl                  one line {"id", "path", "reason"} for each input that has no row

Every input is either one row or one error. Both carry its id, the position among the inputs.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mocohub.features.writer import FORMAT, NO_LABEL, FeatureWriter, facts_of_shards
from mocohub.files import atomic_folder, read_json, sha256

if TYPE_CHECKING:
    import pandas as pd

_REMEDY = "Copy the folder again, or extract the features again."


class Features:
    """Feature vectors of images, what each row is, and which images have none.

    >>> features = Features(np.ones((2, 4), np.float32), ids=[0, 2], paths=["a.jpg", "c.jpg"])
    >>> features
    Features(2 x 4 float32, 0 errors)

    Attributes:
        ids: Position of each row's image among the inputs, (N,) int64.
        paths: N names of the images as their source gives them.
        labels: Class of each row, (N,) int64, `NO_LABEL` (-1) where it is missing; None if all are.
        classes: Names of the classes, so that `classes[label]` is one; None if unknown.
        errors: One {"id", "path", "reason"} for each input without a row, in the order of the ids.
        meta: What made the features: model, transform, computation, input, versions.
    """

    def __init__(
        self,
        values: "np.ndarray | _StoredValues",
        ids: Sequence[int] | np.ndarray,
        paths: Sequence[str],
        labels: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        errors: Sequence[dict[str, Any]] = (),
        meta: dict[str, Any] | None = None,
    ) -> None:
        """Keep the columns described for the class.

        Raises:
            ValueError: If `values` is not a float32 or float16 matrix, the columns differ in length, or an id
                occurs twice.
        """
        if len(values.shape) != 2 or values.dtype not in (np.float32, np.float16):
            raise ValueError(
                f"values has type {values.dtype} and shape {values.shape}, but must be float32 or float16 of "
                "shape (N, D). Convert it, for instance with values.astype('float32')."
            )
        self._values = values
        self.ids = np.asarray(ids, np.int64)
        self.paths = list(paths)
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.classes = None if classes is None else list(classes)
        self.errors = sorted(errors, key=lambda error: error["id"])
        self.meta = dict(meta or {})
        for name, column in (("ids", self.ids), ("paths", self.paths), ("labels", self.labels)):
            if column is not None and len(column) != len(self):
                raise ValueError(f"{name} has {len(column)} entries, but values has {len(self)} rows.")
        all_ids = np.concatenate([self.ids, np.array([error["id"] for error in self.errors], np.int64)])
        if len(np.unique(all_ids)) < len(all_ids):
            raise ValueError("An id occurs twice, but every input must be exactly one row or one error.")

    @property
    def values(self) -> np.ndarray:
        """Features (N, D), float32 or float16; those of an opened folder are read on first use."""
        if isinstance(self._values, _StoredValues):
            self._values = self._values.read()
        return self._values

    @property
    def targets(self) -> np.ndarray:
        """Class name of each row, (N,) str (or its number where classes have no names), as probes take them.

        Raises:
            ValueError: If some row has no label.
        """
        if self.labels is None or (self.labels == NO_LABEL).any():
            missing = len(self) if self.labels is None else int((self.labels == NO_LABEL).sum())
            raise ValueError(
                f"{missing} of {len(self)} rows have no label, but a probe needs all of them. Extract from a "
                "folder with a sub-folder for each class, or from a list with a label column."
            )
        return self.labels if self.classes is None else np.array(self.classes)[self.labels]

    @property
    def width(self) -> int:
        """Features of a row, D."""
        return self._values.shape[1]

    def __len__(self) -> int:
        return self._values.shape[0]

    def __repr__(self) -> str:
        num_features, dtype = self._values.shape[1], self._values.dtype
        return f"Features({len(self)} x {num_features} {dtype}, {len(self.errors)} errors)"

    def save(self, folder: str | Path, *, rows_per_shard: int = 100_000) -> Path:
        """Write a feature folder; it is complete or absent.

        Args:
            folder: Where it shall stand; nothing, or an empty folder, may be there.
            rows_per_shard: Rows of one Parquet file.

        Returns:
            The folder.

        Raises:
            FileExistsError: If something is there already.
        """
        starts = range(0, max(len(self), 1), rows_per_shard)
        with atomic_folder(folder) as temporary:
            writer = FeatureWriter(temporary, num_shards=len(starts), classes=self.classes, meta=self.meta)
            for shard, start in enumerate(starts):
                rows = slice(start, start + rows_per_shard)
                labels = None if self.labels is None else self.labels[rows]
                writer.write(shard, self.ids[rows], self.paths[rows], labels, self.values[rows])
            writer.close(self.errors, num_inputs=len(self) + len(self.errors))
        return Path(folder)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Features":
        """Open a feature folder.

        Args:
            folder: What `extract(..., out=folder)` or `save(folder)` wrote.
            verify: Compare the SHA-256 of every shard with the manifest's, which reads every byte once.

        Returns:
            The features; `values` are read from the folder when they are first used.

        Raises:
            FileNotFoundError: If there is no such folder, it is no feature folder, or a shard is missing.
            ValueError: If a file is damaged, cut short or of another extraction.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        shards = [_checked_shard(folder, shard, verify) for shard in manifest["shards"]]
        tables = []
        for shard in shards:
            with _open_parquet(shard) as file:
                if json.loads((file.schema_arrow.metadata or {}).get(b"mocohub", b"{}")) != facts_of_shards(
                    manifest
                ):
                    raise ValueError(f"'{shard}' belongs to another extraction than its manifest. {_REMEDY}")
                tables.append(file.read(["id", "path", "label"]))
        table = pa.concat_tables(tables)
        errors = _read_errors(folder)
        for name, count in (("rows", len(table)), ("errors", len(errors))):
            if count != manifest[name]:
                raise ValueError(f"'{folder}' has {count} {name}, its manifest {manifest[name]}. {_REMEDY}")

        has_labels = table["label"].null_count < len(table)
        return cls(
            _StoredValues(shards, (len(table), manifest["num_features"]), np.dtype(manifest["dtype"])),
            ids=table["id"].to_numpy(),
            paths=table["path"].to_pylist(),
            labels=table["label"].fill_null(NO_LABEL).to_numpy() if has_labels else None,
            classes=manifest["classes"],
            errors=errors,
            meta=manifest["meta"],
        )

    def to_pandas(self) -> "pd.DataFrame":
        """Return a DataFrame with columns id, path, label (NA where missing) and embedding.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Features.to_pandas needs pandas: pip install pandas") from error
        labels = np.full(len(self), NO_LABEL) if self.labels is None else self.labels
        columns = {
            "id": self.ids,
            "path": self.paths,
            "label": pd.arrays.IntegerArray(labels.copy(), labels == NO_LABEL),
            "embedding": list(self.values),
        }
        return pd.DataFrame(columns)


@dataclass(frozen=True)
class _StoredValues:
    """The embeddings of an opened folder, before they are read."""

    shards: list[Path]
    shape: tuple[int, int]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Return them (N, D); besides the result one row group is in memory at a time."""
        values = np.empty(self.shape, self.dtype)
        row = 0
        for shard in self.shards:
            with _open_parquet(shard) as file:
                for group in range(file.num_row_groups):
                    for chunk in file.read_row_group(group, ["embedding"])["embedding"].chunks:
                        values[row : row + len(chunk)] = chunk.flatten().to_numpy().reshape(-1, self.shape[1])
                        row += len(chunk)
        return values


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        problem = "has no manifest.json" if folder.is_dir() else "is not there"
        raise FileNotFoundError(
            f"'{folder}' is not a feature folder: it {problem}. "
            "Give a folder that `mocohub extract --out` or Features.save wrote."
        )
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"'{path}' has format {found!r}, but this version of mocohub reads {FORMAT!r}. "
            "Give a feature folder, or update mocohub."
        )
    missing = {"num_features", "dtype", "classes", "meta", "rows", "errors", "shards"} - manifest.keys()
    if missing:
        raise ValueError(f"'{path}' does not say {', '.join(sorted(missing))}. {_REMEDY}")
    return manifest


def _checked_shard(folder: Path, shard: dict[str, Any], verify: bool) -> Path:
    if not re.fullmatch(r"part-\d+-of-\d+\.parquet", shard["file"]):
        raise ValueError(f"'{folder / 'manifest.json'}' names a shard {shard['file']!r}. {_REMEDY}")
    path = folder / shard["file"]
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing, but the manifest lists it. {_REMEDY}")
    if verify and sha256(path) != shard["sha256"]:
        raise ValueError(f"'{path}' is damaged: its SHA-256 is not the manifest's. {_REMEDY}")
    return path


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"'{path}' is damaged: {error}. {_REMEDY}") from error


def _read_errors(folder: Path) -> list[dict[str, Any]]:
    path = folder / "errors.jsonl"
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing. {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}. {_REMEDY}") from error


def check_comparable(first: Features, second: Features) -> None:
    """Refuse to compare features of different models or settings, as far as their `meta` tells.

    Raises:
        ValueError: If width, weights, transform or normalisation differ; the message says how.
    """
    differing = [f"{a} and {b} features wide" for a, b in [(first.width, second.width)] if a != b]
    for name in ("model", "transform", "normalized"):
        a, b = first.meta.get(name), second.meta.get(name)
        if isinstance(a, dict) and isinstance(b, dict):  # a model's name is where it was loaded from
            a, b = ({k: v for k, v in facts.items() if k != "name"} for facts in (a, b))
        if a is not None and b is not None and a != b:
            differing.append(f"{name} {a} and {b}")
    if differing:
        raise ValueError(
            f"The two sets of features are not comparable: {'; '.join(differing)}. "
            "Extract both with the same model and settings."
        )
