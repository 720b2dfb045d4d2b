"""The files of a feature folder, written row group by row group."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mocohub.files import sha256, write_json

FORMAT = "mocohub-features/1"
NO_LABEL = -1

_ROW_GROUP_BYTES = 32 << 20  # what a writer keeps in memory and a reader loads at once


class FeatureWriter:
    """Writes the files of a feature folder row group by row group, so that memory stays small.

    The folder must exist; wrap it in `files.atomic_folder` to have it complete or absent.
    """

    def __init__(
        self, folder: str | Path, *, num_shards: int, classes: Sequence[str] | None, meta: dict[str, Any]
    ) -> None:
        """Begin.

        Args:
            folder: Where the files go.
            num_shards: How many Parquet files there will be.
            classes: Names of the classes, None if unknown.
            meta: What made the features, as JSON values; the manifest and every shard say it.
        """
        self._folder = Path(folder)
        self._num_shards = num_shards
        self._classes = classes
        self._meta = meta
        self._manifest: dict[str, Any] = {}  # from the first rows on
        self._finished: list[dict[str, Any]] = []  # {"file", "rows", "sha256"} of each finished shard
        self._file: pq.ParquetWriter | None = None  # of shard number len(_finished)
        self._pending: list[pa.Table] = []  # its rows that do not fill a row group yet

    def write(
        self,
        shard: int,
        ids: np.ndarray,
        paths: Sequence[str],
        labels: np.ndarray | None,
        values: np.ndarray,
    ) -> None:
        """Append rows to a shard; a shard is finished as soon as rows for a later one come.

        Args:
            shard: Its number, counted from 0.
            ids: Positions among the inputs, (n,) int64.
            paths: n names.
            labels: Classes (n,) int64 with `NO_LABEL` where one is missing, or None.
            values: Features (n, D), float32 or float16; D and type are the same in every call.
        """
        if not self._manifest:
            self._begin(values.shape[1], values.dtype)
        while len(self._finished) < shard:
            self._finish_shard()
        labels = np.full(len(ids), NO_LABEL) if labels is None else labels
        columns = [
            pa.array(ids, pa.int64()),
            pa.array(paths, pa.string()),
            pa.array(labels, pa.int64(), mask=labels == NO_LABEL),
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        ]
        self._pending.append(pa.table(columns, schema=self._schema))
        while sum(map(len, self._pending)) >= self._row_group_rows:
            self._write_row_group()

    def close(self, errors: Sequence[dict[str, Any]], *, num_inputs: int) -> None:
        """Finish all shards, then write the errors and the manifest.

        Args:
            errors: One {"id", "path", "reason"} for each input without a row.
            num_inputs: Rows and errors together.
        """
        while len(self._finished) < self._num_shards:
            self._finish_shard()
        rows = sum(shard["rows"] for shard in self._finished)
        assert rows + len(errors) == num_inputs, f"{rows} rows + {len(errors)} errors != {num_inputs} inputs"
        lines = [json.dumps(error) + "\n" for error in errors]
        (self._folder / "errors.jsonl").write_text("".join(lines), "utf-8")
        counts = {"num_inputs": num_inputs, "rows": rows, "errors": len(errors)}
        write_json(self._folder / "manifest.json", {**self._manifest, **counts, "shards": self._finished})

    def _begin(self, num_features: int, dtype: np.dtype) -> None:
        self._manifest = {
            "format": FORMAT,
            "num_features": num_features,
            "dtype": str(dtype),
            "classes": self._classes,
            "meta": self._meta,
        }
        self._row_group_rows = max(1, _ROW_GROUP_BYTES // (num_features * dtype.itemsize))
        fields = {
            "id": pa.int64(),
            "path": pa.string(),
            "label": pa.int64(),
            "embedding": pa.list_(pa.from_numpy_dtype(dtype), num_features),
        }
        self._schema = pa.schema(fields, metadata={"mocohub": json.dumps(facts_of_shards(self._manifest))})

    def _write_row_group(self) -> None:
        """Write the next row group; its length does not depend on the lengths in which rows came."""
        if self._file is None:
            self._name = f"part-{len(self._finished):05d}-of-{self._num_shards:05d}.parquet"
            self._rows = 0
            # Embeddings are neither repetitive nor compressible.
            self._file = pq.ParquetWriter(
                self._folder / self._name,
                self._schema,
                use_dictionary=False,
                compression={"id": "snappy", "path": "snappy", "label": "snappy"},
                write_statistics=["id", "label"],
            )
        table = pa.concat_tables(self._pending) if self._pending else self._schema.empty_table()
        group = table.slice(0, self._row_group_rows)
        self._file.write_table(group)
        self._rows += len(group)
        self._pending = [table.slice(len(group))]

    def _finish_shard(self) -> None:
        if self._file is None or sum(map(len, self._pending)):
            self._write_row_group()
        self._file.close()
        file = self._folder / self._name
        self._finished.append({"file": self._name, "rows": self._rows, "sha256": sha256(file)})
        self._file, self._pending = None, []


def facts_of_shards(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says about the features of every shard alike."""
    return {name: manifest[name] for name in ("format", "num_features", "dtype", "classes", "meta")}
