"""The files of a feature folder: a shard, row group by row group; a folder, shard by shard."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mocohub.files import sha256, write_json

FORMAT = "mocohub-features/1"
FORMAT_OF_COLUMNS = "mocohub-features/2"  # what version 1 cannot say: other columns than "embedding"
FORMAT_OF_SHAPES = "mocohub-features/3"  # what version 2 cannot say: columns that are not vectors
EMBEDDING = "embedding"
NO_LABEL = -1
EXTRAS = {  # columns one may add
    "width": pa.int32(),
    "height": pa.int32(),
    "content_sha256": pa.string(),
    "class_name": pa.string(),  # of streamed tars, whose classes are known when all of them are read
}
RESERVED = frozenset({"id", "path", "image_path", "label", *EXTRAS})  # not for columns of features

_ROW_GROUP_BYTES = 4 << 20  # a writer keeps it in memory; a reader of lists needs several times that


def feature_facts(
    columns: Mapping[str, int],
    dtype: np.dtype | str,
    classes: Sequence[str] | None,
    meta: dict[str, Any],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """What every shard and the manifest say about the features alike.

    Args:
        columns: Name and width D of each column of features; the first is `Features.values`.
        dtype: float32 or float16.
        classes: Names of the classes, None if unknown.
        meta: What made the features, as JSON values.
        shapes: Of a row, for columns that are not vectors: {"stage4": [512, 7, 7]}. Its product is D.
    """
    names = list(columns)
    facts = {
        "format": FORMAT_OF_SHAPES if shapes else FORMAT if names == [EMBEDDING] else FORMAT_OF_COLUMNS,
        "num_features": columns[names[0]],
        "dtype": str(dtype),
        "classes": None if classes is None else list(classes),
        "meta": meta,
    }
    facts |= {} if facts["format"] == FORMAT else {"columns": dict(columns)}
    return facts | ({"shapes": {name: list(shape) for name, shape in shapes.items()}} if shapes else {})


def facts_of_shards(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says about the features of every shard alike."""
    names = ("format", "num_features", "dtype", "classes", "meta", "columns", "shapes")
    return {name: manifest[name] for name in names if name in manifest}


def columns_of(manifest: dict[str, Any]) -> dict[str, int]:
    """Name and width of each column of features."""
    return dict(manifest.get("columns") or {EMBEDDING: manifest["num_features"]})


def shapes_of(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of a row of each column of features."""
    given = manifest.get("shapes") or {}
    return {name: tuple(given.get(name, [width])) for name, width in columns_of(manifest).items()}


def shard_file(shard: int, num_shards: int) -> str:
    """Name of a shard's file."""
    return f"part-{shard:05d}-of-{num_shards:05d}.parquet"


def write_manifest(
    folder: Path, facts: dict[str, Any], records: Iterable[dict[str, Any]], num_inputs: int | None
) -> dict[str, Any]:
    """Write errors.jsonl and manifest.json, one record at a time, and return the manifest.

    Args:
        folder: Where.
        facts: What `feature_facts` returned.
        records: {"file", "rows", "sha256", "errors"} of each shard, in order.
        num_inputs: Rows and errors together, None if nobody knows it otherwise.
    """
    shards, num_errors = [], 0
    with open(folder / "errors.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            file.writelines(json.dumps(error) + "\n" for error in record["errors"])
            num_errors += len(record["errors"])
            names = ("file", "rows", "sha256", "incomplete")
            shards.append({name: record[name] for name in names if name in record})
    rows = sum(shard["rows"] for shard in shards)
    num_inputs = rows + num_errors if num_inputs is None else num_inputs
    assert rows + num_errors == num_inputs, f"{rows} rows + {num_errors} errors != {num_inputs} inputs"
    counts = {"num_inputs": num_inputs, "rows": rows, "errors": num_errors}
    digest = {"errors_sha256": sha256(folder / "errors.jsonl")}
    manifest = {**facts, **counts, **digest, "shards": shards}
    write_json(folder / "manifest.json", manifest)
    return manifest


class Rows(NamedTuple):
    """Rows of one shard that follow one another."""

    ids: np.ndarray  # (n,) int64
    paths: list[str]
    labels: np.ndarray  # (n,) int64, NO_LABEL where one is missing
    values: dict[str, np.ndarray]  # (n, D) of each column of features
    extras: dict[str, list[Any]]  # n values of each of some EXTRAS


class ShardWriter:
    """Writes one Parquet file; its bytes do not depend on the portions in which rows come."""

    def __init__(self, path: Path, facts: dict[str, Any], extras: Iterable[str] = ()) -> None:
        """Begin the file.

        Args:
            path: Its name.
            facts: What `feature_facts` returned.
            extras: Which of `EXTRAS` each row has.
        """
        columns, dtype = columns_of(facts), np.dtype(facts["dtype"])
        fields = {"id": pa.int64(), "path": pa.string(), "label": pa.int64()}
        fields |= {name: EXTRAS[name] for name in extras}
        self._extras = list(extras)
        compressed = {name: "snappy" for name in fields}  # embeddings are neither repetitive nor compressible
        # Lists that cannot hold nulls are written and read in two thirds of the time.
        number = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        self._lists = {name: pa.list_(number, width) for name, width in columns.items()}
        lists = [pa.field(name, kind, nullable=False) for name, kind in self._lists.items()]
        named = [pa.field(name, kind) for name, kind in fields.items()]
        self._schema = pa.schema([*named, *lists], metadata={"mocohub": json.dumps(facts)})
        self._row_group_rows = max(1, _ROW_GROUP_BYTES // (sum(columns.values()) * dtype.itemsize))
        self._pending: list[pa.Table] = []  # rows that do not fill a row group yet
        self.rows = 0
        self._file = pq.ParquetWriter(
            path,
            self._schema,
            use_dictionary=False,
            compression=compressed,
            write_statistics=["id", "label"],
        )

    def write(
        self,
        ids: np.ndarray,
        paths: Sequence[str],
        labels: np.ndarray | None,
        values: Mapping[str, np.ndarray],
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Append rows.

        Args:
            ids: Positions among the inputs, (n,) int64.
            paths: n names.
            labels: Classes (n,) int64 with `NO_LABEL` where one is missing, or None.
            values: Features (n, D) of each column.
            extras: n values of each extra column, None where one is unknown.
        """
        labels = np.full(len(ids), NO_LABEL) if labels is None else np.asarray(labels)
        arrays = [
            pa.array(ids, pa.int64()),
            pa.array(paths, pa.string()),
            pa.array(labels, pa.int64(), mask=labels == NO_LABEL),
        ]
        arrays += [pa.array(extras[name], EXTRAS[name]) for name in self._extras]
        for name, kind in self._lists.items():
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values[name].reshape(-1)), type=kind))
        self._pending.append(pa.table(arrays, schema=self._schema))
        while sum(map(len, self._pending)) >= self._row_group_rows:
            self._write_row_group()

    def _write_row_group(self) -> None:
        table = pa.concat_tables(self._pending) if self._pending else self._schema.empty_table()
        group = table.slice(0, self._row_group_rows)
        self._file.write_table(group)
        self.rows += len(group)
        self._pending = [table.slice(len(group))]

    def close(self) -> None:
        """Write what is left and the file's footer."""
        if self.rows == 0 or sum(map(len, self._pending)):
            self._write_row_group()
        self._file.close()


class FeatureWriter:
    """Writes all files of a feature folder, one shard after the other, so that memory stays small.

    The folder must exist; wrap it in `files.atomic_folder` to have it complete or absent.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_shards: int,
        classes: Sequence[str] | None,
        meta: dict[str, Any],
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Begin.

        Args:
            folder: Where the files go.
            num_shards: How many Parquet files there will be.
            classes: Names of the classes, None if unknown.
            meta: What made the features, as JSON values; the manifest and every shard say it.
            shapes: Of a row, for columns that are not vectors, as for `feature_facts`.
        """
        self._folder = Path(folder)
        self._num_shards = num_shards
        self._classes = classes
        self._meta = meta
        self._shapes = shapes
        self._facts: dict[str, Any] = {}  # from the first rows on
        self._extras: list[str] = []
        self._records: list[dict[str, Any]] = []  # of each finished shard
        self._writer: ShardWriter | None = None  # of shard number len(_records)

    def write(
        self,
        shard: int,
        ids: np.ndarray,
        paths: Sequence[str],
        labels: np.ndarray | None,
        values: np.ndarray | Mapping[str, np.ndarray],
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Append rows to a shard; a shard is finished as soon as rows for a later one come.

        Args:
            shard: Its number, counted from 0.
            ids: Positions among the inputs, (n,) int64.
            paths: n names.
            labels: Classes (n,) int64 with `NO_LABEL` where one is missing, or None.
            values: Features (n, D), float32 or float16, or those of each column; columns, D and type are the
                same in every call.
            extras: n values of each of some `EXTRAS`, the same ones in every call.
        """
        values = {EMBEDDING: values} if isinstance(values, np.ndarray) else values
        if not self._facts:
            columns = {name: column.shape[1] for name, column in values.items()}
            dtype = next(iter(values.values())).dtype
            self._facts = feature_facts(columns, dtype, self._classes, self._meta, self._shapes)
            self._extras = list(extras or ())
        while len(self._records) < shard:
            self._finish_shard()
        self._shard().write(ids, paths, labels, values, extras)

    def close(self, errors: Sequence[dict[str, Any]], *, num_inputs: int) -> None:
        """Finish all shards, then write the errors and the manifest.

        Args:
            errors: One {"id", "path", "reason"} for each input without a row.
            num_inputs: Rows and errors together.
        """
        while len(self._records) < self._num_shards:
            self._finish_shard()
        self._records[-1]["errors"] = errors
        write_manifest(self._folder, self._facts, self._records, num_inputs)

    def _shard(self) -> ShardWriter:
        if self._writer is None:
            file = self._folder / shard_file(len(self._records), self._num_shards)
            self._writer = ShardWriter(file, self._facts, self._extras)
        return self._writer

    def _finish_shard(self) -> None:
        writer, file = self._shard(), shard_file(len(self._records), self._num_shards)
        writer.close()
        digest = sha256(self._folder / file)
        self._records.append({"file": file, "rows": writer.rows, "sha256": digest, "errors": []})
        self._writer = None
