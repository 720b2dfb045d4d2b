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
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from mocohub.features.writer import (
    EMBEDDING,
    EXTRAS,
    FORMAT,
    FORMAT_OF_COLUMNS,
    FORMAT_OF_SHAPES,
    NO_LABEL,
    Rows,
    columns_of,
    facts_of_shards,
    feature_facts,
    shapes_of,
)
from mocohub.files import read_json, sha256

LAYOUTS = ("parquet", "npy", "safetensors")

_LAYOUT_OF = {
    **dict.fromkeys((FORMAT, FORMAT_OF_COLUMNS, FORMAT_OF_SHAPES), "parquet"),
    **{f"mocohub-features-{layout}/{version}": layout for layout in LAYOUTS[1:] for version in (1, 2)},
}
_FILE_NAME = re.compile(r"([\w.-]*\w[\w.-]*/)?[\w.-]*\w[\w.-]*")
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}
_FLOATS = ("float32", "float16")
_BLOCK_BYTES = 32 << 20
_REMEDY = "Copy the folder again, or make it again."


class FeatureFolder:
    """A feature folder of any layout, whose rows are read one block at a time.

    Attributes:
        path: The folder.
        layout: "parquet", "npy" or "safetensors".
        manifest: What manifest.json says; what can be known, if there is none.
        columns: Name and width of each column of features.
        shapes: Name and shape of a row of each, (D,) unless they are maps.
        num_rows: Of each shard.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        """Read the manifest and look for every file it names.

        Args:
            folder: One of the layouts above.
            verify: Compare the SHA-256 of every file with the manifest's, which reads every byte once.

        Raises:
            FileNotFoundError: If this is no feature folder, or a file is missing.
            ValueError: If a file is damaged or not what the manifest says.
        """
        self.path = Path(folder)
        self._is_ours = (self.path / "manifest.json").is_file()
        if self._is_ours:
            self.manifest = read_json(self.path / "manifest.json")
        elif (self.path / "img_emb").is_dir():
            self.manifest, verify = _foreign_manifest(self.path), False
        else:
            raise FileNotFoundError(
                f"'{folder}' is not a feature folder: it has neither manifest.json nor img_emb/. "
                "Give one that `mocohub extract --out` has finished, or one in clip-retrieval's layout."
            )
        try:
            found = self.manifest["format"]
            if found not in _LAYOUT_OF:
                raise ValueError(f"its format is {found!r}, known are {', '.join(_LAYOUT_OF)}")
            if missing := {"dtype", "classes", "meta", "num_inputs", "errors"} - self.manifest.keys():
                raise ValueError(f"it does not say {', '.join(sorted(missing))}")
            self.layout = _LAYOUT_OF[found]
            self.columns, self.shapes = columns_of(self.manifest), shapes_of(self.manifest)
            shards = self.manifest["shards"]
            self._files = [shard.get("files") or {shard["file"]: shard["sha256"]} for shard in shards]
            self.num_rows = [int(shard["rows"]) for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{self.path / 'manifest.json'}' does not describe features: {error!r}. {_REMEDY}"
            ) from error
        for name, digest in (item for files in self._files for item in files.items()):
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"'{self.path / 'manifest.json'}' names a file {name!r}. {_REMEDY}")
            if not (self.path / name).is_file():
                raise FileNotFoundError(f"'{self.path / name}' is missing. {_REMEDY}")
            if verify and sha256(self.path / name) != digest:
                raise ValueError(
                    f"'{self.path / name}' is damaged: its SHA-256 is not the manifest's. {_REMEDY}"
                )

    @property
    def facts(self) -> dict[str, Any]:
        """What `writer.feature_facts` said of these features."""
        if self.layout == "parquet":
            return facts_of_shards(self.manifest)
        given = [self.manifest.get(name) for name in ("dtype", "classes", "meta", "shapes")]
        return feature_facts(self.columns, *given)

    @property
    def extras(self) -> list[str]:
        """Names of the `EXTRAS` that rows have."""
        names = set(pq.read_schema(self._table(0)).names) if self._files else set()
        return [name for name in EXTRAS if name in names]

    def errors(self) -> list[dict[str, Any]]:
        """Return the lines of errors.jsonl.

        Raises:
            ValueError: If it is damaged.
        """
        path = self.path / "errors.jsonl"
        try:
            lines = path.read_text("utf-8").splitlines() if self._is_ours else []
            errors = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise ValueError(f"'{path}' is missing or damaged: {error}. {_REMEDY}") from error
        if len(errors) != self.manifest["errors"]:
            raise ValueError(f"'{path}' has {len(errors)} lines, not {self.manifest['errors']}. {_REMEDY}")
        return errors

    def rows(self, shard: int) -> Iterator[Rows]:
        """Yield the rows of a shard in order, some tens of megabytes at a time.

        Raises:
            ValueError: If the shard is damaged, or has other rows than the manifest says.
        """
        count = 0
        try:
            for rows in self._parquet(shard) if self.layout == "parquet" else self._arrays(shard):
                count += len(rows.ids)
                yield rows
        except (pa.ArrowException, SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"'{self._table(shard)}' cannot be read: {error}. {_REMEDY}") from error
        if count != self.num_rows[shard]:
            raise ValueError(
                f"'{self._table(shard)}' has {count} rows, not {self.num_rows[shard]} as its manifest says. "
                f"{_REMEDY}"
            )

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the first column of features (n, D) of all rows in order."""
        for shard in range(len(self._files)):
            for rows in self.rows(shard):
                yield rows.values[next(iter(self.columns))]

    def _table(self, shard: int) -> Path:
        (name,) = (name for name in self._files[shard] if name.endswith(".parquet"))
        return self.path / name

    def _parquet(self, shard: int) -> Iterator[Rows]:
        with pq.ParquetFile(self._table(shard)) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                values = {
                    name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, width)
                    for name, width in self.columns.items()
                }
                yield _named(table, values)

    def _arrays(self, shard: int) -> Iterator[Rows]:
        bytes_of_row = sum(self.columns.values()) * np.dtype(self.manifest["dtype"]).itemsize
        with ExitStack() as stack:
            arrays = self._map(shard, stack)
            file = stack.enter_context(pq.ParquetFile(self._table(shard)))
            start = 0
            for batch in file.iter_batches(batch_size=max(1, _BLOCK_BYTES // bytes_of_row)):
                table = pa.Table.from_batches([batch])
                if "id" not in table.column_names:  # not ours: rows are counted through
                    first = sum(self.num_rows[:shard]) + start
                    table = table.append_column("id", pa.array(range(first, first + len(table)), pa.int64()))
                end = start + len(table)
                values = {name: np.array(array[start:end]) for name, array in arrays.items()}
                yield _named(
                    table, {name: rows.reshape(-1, self.columns[name]) for name, rows in values.items()}
                )
                start = end

    def _map(self, shard: int, stack: ExitStack) -> dict[str, Any]:
        """Return what gives rows [a:b] of each column of features without reading the others."""
        arrays = {}
        for name in self._files[shard]:
            if name.endswith(".npy"):
                column = (
                    next(iter(self.columns)) if name.startswith("img_emb/") else name.partition("_emb/")[0]
                )
                arrays[column] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
            elif name.endswith(".safetensors"):
                tensors = stack.enter_context(safe_open(self.path / name, framework="numpy"))
                arrays = {column: tensors.get_slice(column) for column in self.columns}
        for column, shape_of_row in self.shapes.items():
            array, expected = arrays[column], (self.num_rows[shard], *shape_of_row)
            shape = tuple(array.shape if isinstance(array, np.ndarray) else array.get_shape())
            if shape != expected:
                raise KeyError(f"'{column}' has shape {shape}, not {expected}")
        return arrays


def _named(table: pa.Table, values: dict[str, np.ndarray]) -> Rows:
    names = table.column_names
    path = "path" if "path" in names else "image_path" if "image_path" in names else None
    ids = table["id"].to_numpy()
    return Rows(
        ids,
        table[path].to_pylist() if path else [f"row {i}" for i in ids],
        table["label"].fill_null(NO_LABEL).to_numpy() if "label" in names else np.full(len(ids), NO_LABEL),
        values,
        {name: table[name].to_pylist() for name in EXTRAS if name in names},
    )


def _foreign_manifest(folder: Path) -> dict[str, Any]:
    """Describe a folder of clip-retrieval's layout that somebody else has written."""
    arrays, tables = (
        sorted((folder / "img_emb").glob("*.npy")),
        sorted((folder / "metadata").glob("*.parquet")),
    )
    if not arrays or len(arrays) != len(tables):
        raise ValueError(
            f"'{folder}' has {len(arrays)} files img_emb/*.npy and {len(tables)} metadata/*.parquet, "
            "but every array needs the table of its rows."
        )
    shards, width, dtype = [], None, None
    for array, table in zip(arrays, tables, strict=True):
        try:
            values = np.load(array, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"'{array}' is no array that can be read: {error}. {_REMEDY}") from error
        width, dtype = (width, dtype) if shards else (values.shape[-1:], str(values.dtype))
        if values.ndim != 2 or values.shape[1:] != width or values.dtype != dtype or dtype not in _FLOATS:
            raise ValueError(
                f"'{array}' is {values.dtype} {values.shape}, but must be float32 or float16 (N, D), "
                "like all others."
            )
        files = {path.relative_to(folder).as_posix(): None for path in (array, table)}
        shards.append({"rows": len(values), "files": files})
    rows = sum(shard["rows"] for shard in shards)
    facts = feature_facts({EMBEDDING: width[0]}, dtype, None, {"input": {"source": str(folder)}})
    return {
        **facts,
        "format": array_format("npy", facts),
        "num_inputs": rows,
        "rows": rows,
        "errors": 0,
        "shards": shards,
    }


def array_format(layout: str, facts: dict[str, Any]) -> str:
    """Name of the format of a folder in the layout "npy" or "safetensors"; only maps need version 2."""
    return f"mocohub-features-{layout}/{2 if facts.get('shapes') else 1}"


class ArrayShard:
    """Writes one shard of the layout "npy" or "safetensors", whose number of rows is known from the start."""

    def __init__(self, folder: Path, name: str, layout: str, num_rows: int, source: FeatureFolder) -> None:
        """Begin its files.

        Args:
            folder: Where, with no file of this shard yet.
            name: Of the shard; in "npy" its number.
            layout: "npy" or "safetensors".
            num_rows: How many will come.
            source: Folder whose columns and type it takes.
        """
        self._folder, self._layout, self._num_rows = folder, layout, num_rows
        self._dtype = np.dtype(source.manifest["dtype"])
        self._start = 0
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[str, int]] = {}  # column -> file and byte where its first row is
        if layout == "npy":
            for i, (column, shape) in enumerate(source.shapes.items()):
                kind = f"{column}_emb" if i else "img_emb"
                self._begin_npy(f"{kind}/{kind}_{name}.npy", column, shape)
            self._table = f"metadata/metadata_{name}.parquet"
        else:
            self._begin_safetensors(f"{name}.safetensors", source.shapes)
            self._table = f"{name}.metadata.parquet"
        self._path_column = "image_path" if layout == "npy" else "path"
        fields = {"id": pa.int64(), self._path_column: pa.string(), "label": pa.int64()}
        fields |= {name: EXTRAS[name] for name in source.extras}
        (folder / self._table).parent.mkdir(exist_ok=True)
        self._schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(folder / self._table, self._schema)

    def write(self, rows: Rows) -> None:
        """Append rows."""
        columns = {
            "id": rows.ids,
            self._path_column: rows.paths,
            "label": pa.array(rows.labels, pa.int64(), mask=rows.labels == NO_LABEL),
            **rows.extras,
        }
        self._writer.write_table(
            pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        )
        arrays = {"id": rows.ids, "label": rows.labels, **rows.values}
        for column, (name, place) in self._places.items():
            data = np.ascontiguousarray(arrays[column])
            self._files[name].seek(place + self._start * data[:1].nbytes)
            self._files[name].write(data)
        self._start += len(rows.ids)

    def close(self) -> dict[str, Any]:
        """Finish the files and return the shard's record for the manifest."""
        self._writer.close()
        for file in self._files.values():
            file.close()
        names = [*self._files, self._table]
        return {"rows": self._num_rows, "files": {name: sha256(self._folder / name) for name in names}}

    def _begin_npy(self, name: str, column: str, shape: tuple[int, ...]) -> None:
        (self._folder / name).parent.mkdir(exist_ok=True)
        file = self._files[name] = open(self._folder / name, "wb")
        header = {"shape": (self._num_rows, *shape), "fortran_order": False, "descr": self._dtype.str}
        np.lib.format.write_array_header_1_0(file, header)
        self._places[column] = name, file.tell()

    def _begin_safetensors(self, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        types = {"id": ("int64", ()), "label": ("int64", ())}
        types |= {column: (str(self._dtype), shape) for column, shape in shapes.items()}
        header, end = {}, 0
        for column, (dtype, shape) in types.items():
            shape = [self._num_rows, *shape]
            begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
            kind = _SAFETENSORS_TYPES[dtype]
            header[column] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of 8
        file = self._files[name] = open(self._folder / name, "wb")
        file.write(struct.pack("<Q", len(text)) + text)
        for column in types:
            self._places[column] = name, 8 + len(text) + header[column]["data_offsets"][0]
        file.truncate(8 + len(text) + end)
