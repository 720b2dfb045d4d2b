"""Features on disk: Parquet shards any tool can read, a manifest that proves them, and a list of errors.

A feature folder holds

    part-00000-of-00008.parquet   id int64, path string, label int64 or null, width and height int32,
                                  embedding fixed-size list<float>[D] (or one such column for each layer,
                                  maps flattened; the manifest then says their shapes)
    manifest.json                 what made the features, and rows and SHA-256 of each shard
    errors.jsonl                  one line {"id", "path", "reason"} for each input that has no row

Every input is either one row or one error. Both carry its id, the position among the inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mocohub.errors import unknown
from mocohub.features.checks import check_columns, check_index, numbered
from mocohub.features.layouts import FeatureFolder
from mocohub.features.writer import EMBEDDING, NO_LABEL, Rows

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mocohub.features.search import Neighbors


_BLOCK_BYTES = 16 << 20


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
        widths = check_columns(columns, shapes)
        first = next(iter(columns.values()))
        self._describe(widths, shapes, first.dtype, len(first), classes, errors, meta)
        self._values = columns
        labels = None if labels is None else np.asarray(labels, np.int64)
        self._index = Rows(np.asarray(ids, np.int64), list(paths), labels, {}, dict(extras or {}))
        self._check_index()

    def _describe(
        self,
        columns: dict[str, int],
        shapes: Mapping[str, Sequence[int]] | None,
        dtype: np.dtype,
        num_rows: int,
        classes: Sequence[str] | None,
        errors: Sequence[dict[str, Any]],
        meta: dict[str, Any] | None,
    ) -> None:
        self.columns, self.dtype, self._num_rows = columns, dtype, num_rows
        self.shapes = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        self._classes = None if classes is None else list(classes)
        self.errors = sorted(errors, key=lambda error: error["id"])
        self.meta = dict(meta or {})
        self._values: dict[str, np.ndarray] = {}  # columns in memory, or mapped
        self._folder: FeatureFolder | None = None  # where the others are
        self._index: Rows | None = None
        self._row_of: dict[str, int] | None = None

    def _check_index(self) -> None:
        check_index(self._index, self.errors, len(self))
        if "class_name" in self._index.extras:
            self._index, self._classes = numbered(self._index, self._classes)

    def _rows(self) -> Rows:
        if self._index is None:
            index = self._folder.index()
            self._index = index._replace(labels=None) if (index.labels == NO_LABEL).all() else index
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
    def classes(self) -> list[str] | None:
        """Names of the classes, so that `classes[label]` is one; None if unknown."""
        self._rows()  # which may name them
        return self._classes

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
        """Features (N, D), float32 or float16: the first column. Of a folder memory-mapped, see `open`."""
        return self[next(iter(self.columns))]

    @property
    def shape(self) -> tuple[int, int]:
        """Of `values`, (N, D)."""
        return len(self), self.width

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return `values`, so that whatever takes an array takes features: np.asarray, scikit-learn."""
        return np.array(self.values, dtype, copy=copy)

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column of features (N, D), maps flattened.

        Raises:
            TypeError: If it is no name: a row, or the first step of a loop over rows.
            ValueError: If there is no column of this name.
        """
        if not isinstance(column, str):
            raise TypeError(
                f"Features are indexed by a column's name, as features['{next(iter(self.columns))}'], not "
                f"by {column!r}. Rows are those of features.values, and features.row(path) finds one."
            )
        if column not in self.columns:
            raise unknown("column", column, self.columns)
        if column not in self._values:
            self._values[column] = self._folder.values(column)
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
        """Yield the features (n, D) of a column in order, some tens of megabytes at a time.

        Args:
            column: Its name. Default: the first.

        Raises:
            ValueError: If there is none of this name.
        """
        column = column or next(iter(self.columns))
        if column not in self.columns:
            raise unknown("column", column, self.columns)
        if column not in self._values:
            yield from self._folder.blocks(column)
            return
        step = max(1, _BLOCK_BYTES // (self.columns[column] * self.dtype.itemsize))
        for start in range(0, len(self), step):
            yield self._values[column][start : start + step]

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

    def save(
        self,
        folder: str | Path,
        *,
        rows_per_shard: int = 100_000,
        format: Literal["parquet", "npy", "safetensors"] = "parquet",
    ) -> Path:
        """Write a feature folder; it is complete or absent.

        Args:
            folder: Where it shall stand; nothing, or an empty folder, may be there.
            rows_per_shard: Rows of one shard.
            format: Its layout, see `mocohub.features.layouts`.

        Returns:
            The folder.

        Raises:
            FileExistsError: If something is there already.
            ValueError: If there is no such format, or `rows_per_shard` is below 1.
        """
        from mocohub.features.formats import save

        return save(self, folder, rows_per_shard=rows_per_shard, format=format)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Features":
        """Open a feature folder.

        A column is on disk, and memory holds what is looked at. An array in one file (layouts npy and
        safetensors) is mapped where it is. Parquet, whose pages are no array, and arrays in several files are
        copied at first use, block by block, into a file that has no name and goes with the process: in the
        folder if one may write there, else in that for temporary files. `blocks` needs no copy. To change
        `values` changes no file.

        Args:
            folder: What `extract(..., out=folder)`, `save(folder)` or `mocohub.features.formats` wrote, or
                clip-retrieval: any layout of `mocohub.features.layouts`.
            verify: Compare the SHA-256 of every shard with the manifest's, which reads every byte once.

        Returns:
            The features.

        Raises:
            FileNotFoundError: If there is no such folder, it is no feature folder, or a shard is missing.
            ValueError: If a file is damaged, cut short or of another extraction.
            RuntimeError: At first use of a column, if there is no room for its copy.
        """
        found = FeatureFolder(folder, verify=verify)
        return cls._of_folder(found, found.errors())

    @classmethod
    def of_shards(cls, folder: Path, facts: dict[str, Any], records: Sequence[dict[str, Any]]) -> "Features":
        """Open some shards of a folder that has no manifest yet.

        Args:
            folder: The folder.
            facts: What `writer.feature_facts` returned for it.
            records: {"file", "rows", "sha256", "errors"} of each shard.
        """
        errors = [error for record in records for error in record["errors"]]
        rows = sum(record["rows"] for record in records)
        counts = {"num_inputs": rows + len(errors), "rows": rows, "errors": len(errors)}
        manifest = {**facts, **counts, "shards": records}
        return cls._of_folder(FeatureFolder(folder, verify=False, manifest=manifest), errors)

    @classmethod
    def _of_folder(cls, folder: FeatureFolder, errors: Sequence[dict[str, Any]]) -> "Features":
        features, manifest = cls.__new__(cls), folder.manifest
        described = manifest["classes"], errors, manifest["meta"]
        shapes, num_rows = manifest.get("shapes"), sum(folder.num_rows)
        features._describe(folder.columns, shapes, folder.dtype, num_rows, *described)
        features._folder = folder
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
    for name in ("model", "transform", "layers", "pool", "flip", "crops", "projection", "normalized"):
        a, b = first.meta.get(name), second.meta.get(name)
        if isinstance(a, dict) and isinstance(b, dict):  # a model's name is where it was loaded from
            names = [k for k in {**a, **b} if k != "name" and a.get(k) != b.get(k)]
            a, b = ({k: facts[k] for k in names if k in facts} for facts in (a, b))
        if a is not None and b is not None and a != b:
            differing.append(f"{name} {a} and {b}")
    if differing:
        raise ValueError(
            f"The two sets of features are not comparable: {'; '.join(differing)}. "
            "Extract both with the same model and settings."
        )
