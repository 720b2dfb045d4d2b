"""Three layouts of a feature folder, each read and written block by block, so that memory stays small.

    parquet      part-00000-of-00002.parquet      see `mocohub.features.store`
    npy          img_emb/img_emb_0.npy            features (N, D)
                 metadata/metadata_0.parquet      id, image_path, label of the same rows
    safetensors  part-00000-of-00002.safetensors  id, label (-1 if missing), embedding
                 part-00000-of-00002.metadata.parquet   id, path, label of the same rows

Each has manifest.json, with the SHA-256 of every file, and errors.jsonl. "npy" is clip-retrieval's layout,
which autofaiss and embedding-reader read; further columns of features are <name>_emb/<name>_emb_0.npy. What
clip-retrieval or another tool wrote in that layout has no manifest, and is read as well. Maps, whose rows are
not vectors, are flattened in Parquet, where the manifest says their shapes, and (N, C, H, W) in the others.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from mocohub.features.arrays import REMEDY, arrays_in, manifest_of_arrays
from mocohub.features.manifest import (
    files_of,
    layout_of,
    no_features,
    read_errors,
    read_manifest,
)
from mocohub.features.mapped import mapped
from mocohub.features.writer import (
    EXTRAS,
    NO_LABEL,
    Rows,
    columns_of,
    facts_of_shards,
    feature_facts,
    shapes_of,
)
from mocohub.files import sha256

_BLOCK_BYTES = 16 << 20


class FeatureFolder:
    """A feature folder of any layout, whose rows are read one block at a time.

    Attributes:
        path: The folder.
        layout: "parquet", "npy" or "safetensors".
        manifest: What manifest.json says; what can be known, if there is none.
        columns: Name and width of each column of features.
        shapes: Name and shape of a row of each, (D,) unless they are maps.
        dtype: Of all of them.
        num_rows: Of each shard.
    """

    def __init__(
        self, folder: str | Path, *, verify: bool = True, manifest: dict[str, Any] | None = None
    ) -> None:
        """Read the manifest and look at every file it names.

        Args:
            folder: One of the layouts above.
            verify: Compare the SHA-256 of every file with the manifest's, which reads every byte once.
            manifest: What to believe of a folder that has no manifest.json yet.

        Raises:
            FileNotFoundError: If this is no feature folder, or a file is missing.
            ValueError: If a file is damaged or not what the manifest says.
        """
        self.path = Path(folder)
        self._is_ours = manifest is not None or (self.path / "manifest.json").is_file()
        if self._is_ours:
            self.manifest = read_manifest(self.path, manifest)
        elif (self.path / "img_emb").is_dir():
            self.manifest, verify = manifest_of_arrays(self.path), False
        else:
            raise FileNotFoundError(no_features(self.path))
        self.layout = layout_of(self.manifest)
        self.columns, self.shapes = columns_of(self.manifest), shapes_of(self.manifest)
        self.dtype = np.dtype(self.manifest["dtype"])
        self.num_rows = [int(shard["rows"]) for shard in self.manifest["shards"]]
        self._files = [files_of(shard) for shard in self.manifest["shards"]]
        for name, digest in (item for files in self._files for item in files.items()):
            if not (self.path / name).is_file():
                raise FileNotFoundError(
                    f"'{self.path / name}' is missing, but the manifest lists it. {REMEDY}"
                )
            if verify and sha256(self.path / name) != digest:
                raise ValueError(
                    f"'{self.path / name}' is damaged: its SHA-256 is not the manifest's. {REMEDY}"
                )
        for shard in range(len(self._files)):
            self._check(shard)

    def _check(self, shard: int) -> None:
        """Compare the number of rows, and what the shard itself says, with the manifest."""
        path = self._table_path(shard)
        with self._table(shard) as file:
            num_rows, schema = file.metadata.num_rows, file.schema_arrow
        if num_rows != self.num_rows[shard]:
            raise ValueError(
                f"'{path}' has {num_rows} rows, not {self.num_rows[shard]} as its manifest says. {REMEDY}"
            )
        if self.layout != "parquet":
            self._places(shard)
            return
        try:
            written = json.loads((schema.metadata or {}).get(b"mocohub", b"{}"))
        except ValueError as error:
            raise ValueError(f"'{path}' is damaged: {error}. {REMEDY}") from error
        if written != facts_of_shards(self.manifest):
            raise ValueError(f"'{path}' belongs to another extraction than its manifest. {REMEDY}")
        for name, width in self.columns.items():
            number = pa.from_numpy_dtype(self.dtype)
            found = schema.field(name).type if name in schema.names else pa.null()
            is_list = pa.types.is_fixed_size_list(found)  # that of earlier versions may hold nulls
            if not is_list or (found.value_type, found.list_size) != (number, width):
                raise ValueError(
                    f"'{path}' has '{name}' of type {found}, not {pa.list_(number, width)}. {REMEDY}"
                )

    @property
    def facts(self) -> dict[str, Any]:
        """What `writer.feature_facts` said of these features."""
        given = [self.manifest.get(name) for name in ("dtype", "classes", "meta", "shapes")]
        return feature_facts(self.columns, *given)

    @property
    def extras(self) -> list[str]:
        """Names of the `EXTRAS` that rows have."""
        names = set(pq.read_schema(self._table_path(0)).names) if self._files else set()
        return [name for name in EXTRAS if name in names]

    def errors(self) -> list[dict[str, Any]]:
        """Return the lines of errors.jsonl.

        Raises:
            FileNotFoundError: If it is missing.
            ValueError: If it is damaged.
        """
        return read_errors(self.path, self.manifest) if self._is_ours else []

    def rows(self, shard: int) -> Iterator[Rows]:
        """Yield the rows of a shard in order, some tens of megabytes at a time.

        Raises:
            ValueError: If the shard is damaged.
        """
        with self._table(shard) as file:
            if self.layout == "parquet":
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    values = {
                        name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, width)
                        for name, width in self.columns.items()
                    }
                    yield self._named(table, values, shard)
                return
            places, start = self._places(shard), 0
            for batch in file.iter_batches(batch_size=self._block_rows(*self.columns)):
                values = {
                    name: self._read(name, place, start, start + len(batch)) for name, place in places.items()
                }
                yield self._named(pa.Table.from_batches([batch]), values, shard, start)
                start += len(batch)

    def blocks(self, column: str | None = None) -> Iterator[np.ndarray]:
        """Yield a column of features (n, D) of all rows in order, some tens of megabytes at a time.

        Args:
            column: Its name. Default: the first.

        Raises:
            ValueError: If a shard is damaged.
        """
        column = column or next(iter(self.columns))
        step = self._block_rows(column)
        for shard, num_rows in enumerate(self.num_rows):
            if self.layout != "parquet":
                place = self._places(shard)[column]
                for start in range(0, num_rows, step):
                    yield self._read(column, place, start, min(start + step, num_rows))
                continue
            with self._table(shard) as file:
                parts: list[np.ndarray] = []
                for group in range(file.num_row_groups):
                    for chunk in file.read_row_group(group, [column])[column].chunks:
                        parts.append(chunk.flatten().to_numpy().reshape(-1, self.columns[column]))
                    if parts and (sum(map(len, parts)) >= step or group == file.num_row_groups - 1):
                        yield np.concatenate(parts)
                        parts = []

    def values(self, column: str) -> np.ndarray:
        """Return a column of features (N, D) as an array on disk, of which memory holds what is looked at.

        An array in one file is mapped where it is. Of Parquet, whose pages are no array, and of several files
        a copy is made, see `mapped`. To change the array changes no file.
        """
        shape = sum(self.num_rows), self.columns[column]
        filled = [shard for shard, num_rows in enumerate(self.num_rows) if num_rows]
        if self.layout != "parquet" and len(filled) == 1:
            path, offset = self._places(filled[0])[column]
            return np.memmap(path, self.dtype, "c", offset, shape)
        return mapped(self.blocks(column), shape, self.dtype, self.path)

    def index(self) -> Rows:
        """Read what every row is, without its features."""
        parts = []
        for shard in range(len(self._files)):
            with self._table(shard) as file:
                names = ("id", "path", "image_path", "label", *EXTRAS)
                table = file.read([name for name in names if name in file.schema_arrow.names])
                parts.append(self._named(table, {}, shard))
        none = np.empty(0, np.int64)
        return Rows(
            np.concatenate([none, *(part.ids for part in parts)]),
            [path for part in parts for path in part.paths],
            np.concatenate([none, *(part.labels for part in parts)]),
            {},
            {name: [one for part in parts for one in part.extras[name]] for name in self.extras},
        )

    def _table_path(self, shard: int) -> Path:
        names = [name for name in self._files[shard] if name.endswith(".parquet")]
        if len(names) != 1:
            raise ValueError(
                f"'{self.path / 'manifest.json'}' lists {names} as the table of a shard. {REMEDY}"
            )
        return self.path / names[0]

    @contextmanager
    def _table(self, shard: int) -> Iterator[pq.ParquetFile]:
        path = self._table_path(shard)
        try:
            with pq.ParquetFile(path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"'{path}' is damaged: {error}. {REMEDY}") from error

    def _block_rows(self, *columns: str) -> int:
        """Rows of a block with these columns."""
        return max(1, _BLOCK_BYTES // (sum(self.columns[name] for name in columns) * self.dtype.itemsize))

    def _places(self, shard: int) -> dict[str, tuple[Path, int]]:
        """Return for each column of a shard the file with its array, and the byte where its first row is."""
        found: dict[str, tuple[Path, int]] = {}
        for name in self._files[shard]:
            path = self.path / name
            try:
                kinds = arrays_in(path, next(iter(self.columns)))
                for column in self.columns.keys() & kinds.keys():
                    *kind, offset = kinds[column]
                    expected = [self.dtype.name, (self.num_rows[shard], *self.shapes[column])]
                    if kind != expected:
                        raise ValueError(
                            f"'{column}' is {kind[0]} {kind[1]}, not {expected[0]} {expected[1]}"
                        )
                    found[column] = path, offset
            except (ValueError, OSError, SafetensorError) as error:
                raise ValueError(f"'{path}' is no array of these features: {error}. {REMEDY}") from error
        if missing := [column for column in self.columns if column not in found]:
            raise ValueError(f"'{self.path}' has no array of {missing} in shard {shard}. {REMEDY}")
        return found

    def _read(self, column: str, place: tuple[Path, int], start: int, stop: int) -> np.ndarray:
        path, offset = place
        width = self.columns[column]
        offset += start * width * self.dtype.itemsize
        return np.fromfile(path, self.dtype, (stop - start) * width, offset=offset).reshape(-1, width)

    def _named(self, table: pa.Table, values: dict[str, np.ndarray], shard: int, start: int = 0) -> Rows:
        """Join what a table says with features of the same rows, those from number `start` of a shard."""
        if self._is_ours:
            ids = table["id"].to_numpy()
        else:  # rows are counted through
            ids = sum(self.num_rows[:shard]) + start + np.arange(len(table))
        names = table.column_names
        path = "path" if "path" in names else "image_path" if "image_path" in names else None
        has_labels = "label" in names and pa.types.is_integer(table.schema.field("label").type)
        return Rows(
            ids,
            table[path].to_pylist() if path else [f"row {i}" for i in ids],
            table["label"].fill_null(NO_LABEL).to_numpy() if has_labels else np.full(len(ids), NO_LABEL),
            values,
            {name: table[name].to_pylist() for name in EXTRAS if name in names},
        )
