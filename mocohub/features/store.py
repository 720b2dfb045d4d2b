"""Features on disk: Parquet shards any tool can read, a manifest that proves them, and a list of errors.

A feature folder holds

    part-00000-of-00008.parquet   id int64, path string, label int64 or null, width and height int32,
                                  embedding fixed-size list<float>[D] (or one such column for each layer,
                                  maps flattened; the manifest then says their shapes)
    manifest.json                 what made the features, and rows and SHA-256 of each shard
    errors.jsonl                  one line {"id", "path", "reason"} for each input that has no row

Every input is either one row or one error. Both carry its id, the position among the inputs.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mocohub.errors import unknown
from mocohub.features.stored import (
    REMEDY,
    Index,
    StoredFeatures,
    checked_shard,
    open_parquet,
    read_errors,
    read_manifest,
)
from mocohub.features.writer import EMBEDDING, NO_LABEL, FeatureWriter, columns_of, facts_of_shards
from mocohub.files import atomic_folder

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mocohub.features.search import Neighbors


class Features:
    """Feature vectors of images, what each row is, and which images have none.

    >>> features = Features(np.ones((2, 4), np.float32), ids=[0, 2], paths=["a.jpg", "c.jpg"])
    >>> features
    Features(2 x 4 float32, 0 errors)
    >>> features["embedding"].shape, features.row("c.jpg")
    ((2, 4), 1)

    Of an opened folder, whatever is large is read when it is first used.

    Attributes:
        columns: Width D of each column of features by its name; "embedding" alone, or one for each layer.
        shapes: Shape of a row of each column that is not a vector, {"stage4": (512, 7, 7)}: see `maps`.
        dtype: Of all of them: float32 or float16.
        classes: Names of the classes, so that `classes[label]` is one; None if unknown.
        errors: One {"id", "path", "reason"} for each input without a row, in the order of the ids.
        meta: What made the features: model, transform, computation, input, versions.
    """

    def __init__(
        self,
        values: np.ndarray | Mapping[str, np.ndarray],
        ids: Sequence[int] | np.ndarray,
        paths: Sequence[str],
        labels: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        errors: Sequence[dict[str, Any]] = (),
        meta: dict[str, Any] | None = None,
        extras: Mapping[str, Sequence[Any]] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Keep the columns described for the class.

        Raises:
            ValueError: If `values` is not a float32 or float16 matrix, or several of one type, the columns
                differ in length, a shape does not fit its column, or an id occurs twice.
        """
        columns = dict(values) if isinstance(values, Mapping) else {EMBEDDING: values}
        if not columns:
            raise ValueError("values has no column. Give a matrix (N, D), or a dict of them.")
        first = next(iter(columns.values()))
        for name, column in columns.items():
            if column.ndim != 2 or column.dtype not in (np.float32, np.float16):
                raise ValueError(
                    f"values has type {column.dtype} and shape {column.shape}, but must be float32 or "
                    "float16 of shape (N, D). Convert it, for instance with values.astype('float32')."
                )
            if (len(column), column.dtype) != (len(first), first.dtype):
                raise ValueError(
                    f"values['{name}'] is {len(column)} rows of {column.dtype}, but the first column "
                    f"{len(first)} of {first.dtype}. All columns need one length and type."
                )
        widths = {name: column.shape[1] for name, column in columns.items()}
        for name, shape in (shapes or {}).items():
            if math.prod(shape) != widths.get(name):
                raise ValueError(
                    f"shapes says {tuple(shape)} of '{name}', but the widths of values are {widths}. "
                    "Flatten maps (N, C, H, W) to (N, C * H * W)."
                )
        self._set(widths, shapes, first.dtype, len(first))
        self._values = columns
        labels = None if labels is None else np.asarray(labels, np.int64)
        self._index = Index(np.asarray(ids, np.int64), list(paths), labels, dict(extras or {}))
        self._describe(classes, errors, meta)
        self._check_index()

    def _set(
        self,
        columns: dict[str, int],
        shapes: Mapping[str, Sequence[int]] | None,
        dtype: np.dtype,
        num_rows: int,
    ) -> None:
        self.columns, self.dtype, self._num_rows = columns, dtype, num_rows
        self.shapes = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        self._values: dict[str, np.ndarray] = {}
        self._stored: StoredFeatures | None = None
        self._index: Index | None = None
        self._row_of: dict[str, int] | None = None

    def _describe(
        self,
        classes: Sequence[str] | None,
        errors: Sequence[dict[str, Any]],
        meta: dict[str, Any] | None,
    ) -> None:
        self.classes = None if classes is None else list(classes)
        self.errors = sorted(errors, key=lambda error: error["id"])
        self.meta = dict(meta or {})

    def _check_index(self) -> Index:
        index, length = self._index, len(self)
        given = {"ids": index.ids, "paths": index.paths, "labels": index.labels, **index.extras}
        for name, column in given.items():
            if column is not None and len(column) != length:
                raise ValueError(f"{name} has {len(column)} entries, but values has {length} rows.")
        all_ids = np.concatenate([index.ids, np.array([error["id"] for error in self.errors], np.int64)])
        if len(np.unique(all_ids)) < len(all_ids):
            raise ValueError("An id occurs twice among rows and errors, but each input is one of the two.")
        return index

    def _rows(self) -> Index:
        if self._index is None:
            self._index = self._stored.read_index()
            self._check_index()
        return self._index

    @property
    def ids(self) -> np.ndarray:
        """Position of each row's image among the inputs, (N,) int64."""
        return self._rows().ids

    @property
    def paths(self) -> list[str]:
        """N names of the images as their source gives them."""
        return self._rows().paths

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each row, (N,) int64, `NO_LABEL` (-1) where it is missing; None if all are."""
        return self._rows().labels

    @property
    def extras(self) -> dict[str, list[Any]]:
        """What else is known of each row: width and height in px, content_sha256; None where unknown."""
        return self._rows().extras

    @property
    def values(self) -> np.ndarray:
        """Features (N, D), float32 or float16: the first column. In memory, read at first use."""
        return self[next(iter(self.columns))]

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column of features (N, D), maps flattened.

        Raises:
            ValueError: If there is none of this name.
        """
        if column not in self.columns:
            raise unknown("column", column, self.columns)
        if column not in self._values:
            self._values[column] = self._stored.read(column)
        return self._values[column]

    def maps(self, column: str | None = None) -> np.ndarray:
        """Return a column in the shape of its rows: maps as (N, C, H, W), vectors as (N, D). No copy.

        Args:
            column: Its name. Default: the first.

        Raises:
            ValueError: If there is none of this name.
        """
        column = column or next(iter(self.columns))
        values = self[column]
        return values.reshape(len(values), *self.shapes.get(column, (self.columns[column],)))

    def blocks(self, column: str | None = None) -> Iterator[np.ndarray]:
        """Yield the features (n, D) of a column in order, one row group of an opened folder at a time.

        Args:
            column: Its name. Default: the first.

        Raises:
            ValueError: If there is none of this name.
        """
        column = column or next(iter(self.columns))
        if column not in self.columns:
            raise unknown("column", column, self.columns)
        if column in self._values:
            yield self._values[column]
        else:
            yield from self._stored.blocks(column)

    def row(self, path: str) -> int:
        """Return the row of an image; of one that was given several times, the first.

        Raises:
            KeyError: If it has none.
        """
        if self._row_of is None:
            self._row_of = {name: row for row, name in reversed(list(enumerate(self.paths)))}
        if path not in self._row_of:
            reasons = [error["reason"] for error in self.errors if error["path"] == path]
            raise KeyError(
                f"'{path}' has no features: {reasons[0] if reasons else 'it is not among the images'}."
            )
        return self._row_of[path]

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
        return next(iter(self.columns.values()))

    def __len__(self) -> int:
        return self._num_rows

    def __repr__(self) -> str:
        others = "".join(f", {name}: {width}" for name, width in list(self.columns.items())[1:])
        return f"Features({len(self)} x {self.width}{others} {self.dtype}, {len(self.errors)} errors)"

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
            facts = {"classes": self.classes, "meta": self.meta, "shapes": self.shapes}
            writer = FeatureWriter(temporary, num_shards=len(starts), **facts)
            for shard, start in enumerate(starts):
                rows = slice(start, start + rows_per_shard)
                labels = None if self.labels is None else self.labels[rows]
                values = {name: self[name][rows] for name in self.columns}
                extras = {name: column[rows] for name, column in self.extras.items()}
                writer.write(shard, self.ids[rows], self.paths[rows], labels, values, extras)
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
        manifest = read_manifest(folder)
        shards = [checked_shard(folder, shard, verify) for shard in manifest["shards"]]
        errors = read_errors(folder)
        features = cls._of_files(shards, manifest, errors)
        for name, count in (("rows", len(features)), ("errors", len(errors))):
            if count != manifest[name]:
                raise ValueError(f"'{folder}' has {count} {name}, its manifest {manifest[name]}. {REMEDY}")
        return features

    @classmethod
    def of_shards(cls, folder: Path, facts: dict[str, Any], records: Sequence[dict[str, Any]]) -> "Features":
        """Open some shards of a folder that has no manifest yet.

        Args:
            folder: The folder.
            facts: What `writer.feature_facts` returned for it.
            records: {"file", "rows", "sha256", "errors"} of each shard.
        """
        errors = [error for record in records for error in record["errors"]]
        return cls._of_files([folder / record["file"] for record in records], facts, errors)

    @classmethod
    def _of_files(
        cls, shards: list[Path], facts: dict[str, Any], errors: Sequence[dict[str, Any]]
    ) -> "Features":
        num_rows = 0
        for shard in shards:
            with open_parquet(shard) as file:
                written = json.loads((file.schema_arrow.metadata or {}).get(b"mocohub", b"{}"))
                if written != facts_of_shards(facts):
                    raise ValueError(f"'{shard}' belongs to another extraction than its manifest. {REMEDY}")
                num_rows += file.metadata.num_rows
        features = cls.__new__(cls)
        columns, dtype = columns_of(facts), np.dtype(facts["dtype"])
        features._set(columns, facts.get("shapes"), dtype, num_rows)
        features._stored = StoredFeatures(shards, columns, dtype, num_rows)
        features._describe(facts["classes"], errors, facts["meta"])
        return features

    def search(self, queries: Any, *, k: int = 10, index: str = "exact") -> "Neighbors":
        """Return the rows most like each query, see `mocohub.features.search.search`."""
        from mocohub.features.search import search

        return search(self, queries, k=k, index=index)

    def to_pandas(self) -> "pd.DataFrame":
        """Return a DataFrame with id, path, label (NA where missing), `extras` and each column of features.

        A cell of features is an array (D,), or (C, H, W) for maps.

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
            **self.extras,
            **{name: list(self.maps(name)) for name in self.columns},
        }
        return pd.DataFrame(columns)

    def to_torch(self, column: str | None = None) -> "torch.Tensor":
        """Return a column (N, D), or maps (N, C, H, W), as a tensor on the CPU that shares its memory.

        Args:
            column: Its name. Default: the first.

        Raises:
            ValueError: If there is none of this name.
        """
        import torch

        return torch.from_numpy(self.maps(column))


def check_comparable(first: Features, second: Features) -> None:
    """Refuse to compare features of different models or settings, as far as their `meta` tells.

    Raises:
        ValueError: If width, weights, transform or normalisation differ; the message says how.
    """
    differing = [f"{a} and {b} features wide" for a, b in [(first.width, second.width)] if a != b]
    for name in ("model", "transform", "layers", "pool", "flip", "projection", "normalized"):
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
