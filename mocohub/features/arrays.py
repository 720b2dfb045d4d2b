"""A shard of the layouts "npy" and "safetensors": where its arrays are, and how they are written."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from mocohub.features.manifest import FLOATS, REMEDY
from mocohub.features.writer import EMBEDDING, EXTRAS, NO_LABEL, Rows, feature_facts
from mocohub.files import sha256

_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


def arrays_in(path: Path, first_column: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return type, shape and first byte of each array in a file of a shard, by the name of its column.

    Args:
        path: The file; tables have no arrays.
        first_column: That of img_emb/, whose name the folder does not tell.

    Raises:
        ValueError, OSError, SafetensorError: If it cannot be read as what it is by its name.
    """
    if path.suffix == ".npy":
        column = first_column if path.parent.name == "img_emb" else path.parent.name.removesuffix("_emb")
        array = np.lib.format.open_memmap(path, mode="r")  # np.load takes other formats for it
        if not array.flags.c_contiguous:
            raise ValueError("its rows do not follow one another")
        return {column: (array.dtype.name, array.shape, array.offset)}
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="numpy"):  # refuses a header that does not fit its file
        pass
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    dtypes = {short: name for name, short in _SAFETENSORS_TYPES.items()}
    return {
        name: (
            dtypes.get(tensor["dtype"], tensor["dtype"]),
            tuple(tensor["shape"]),
            8 + length + tensor["data_offsets"][0],
        )
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def manifest_of_arrays(folder: Path) -> dict[str, Any]:
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
            values = np.lib.format.open_memmap(array, mode="r")
        except ValueError as error:
            raise ValueError(f"'{array}' is no array that can be read: {error}. {REMEDY}") from error
        width, dtype = (width, dtype) if shards else (values.shape[-1:], str(values.dtype))
        if values.ndim != 2 or values.shape[1:] != width or values.dtype != dtype or dtype not in FLOATS:
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
        "format": "mocohub-features-npy/1",
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

    def __init__(
        self,
        folder: Path,
        name: str,
        layout: str,
        num_rows: int,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype,
        extras: Sequence[str],
    ) -> None:
        """Begin its files.

        Args:
            folder: Where, with no file of this shard yet.
            name: Of the shard; in "npy" its number.
            layout: "npy" or "safetensors".
            num_rows: How many will come.
            shapes: Of a row of each column of features.
            dtype: Of all of them.
            extras: Which of `EXTRAS` each row has.
        """
        self._folder, self._layout, self._num_rows = folder, layout, num_rows
        self._dtype = dtype
        self._start = 0
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[str, int]] = {}  # column -> file and byte where its first row is
        if layout == "npy":
            for i, (column, shape) in enumerate(shapes.items()):
                kind = f"{column}_emb" if i else "img_emb"
                self._begin_npy(f"{kind}/{kind}_{name}.npy", column, shape)
            self._table = f"metadata/metadata_{name}.parquet"
        else:
            self._begin_safetensors(f"{name}.safetensors", shapes)
            self._table = f"{name}.metadata.parquet"
        self._path_column = "image_path" if layout == "npy" else "path"
        fields = {"id": pa.int64(), self._path_column: pa.string(), "label": pa.int64()}
        fields |= {name: EXTRAS[name] for name in extras}
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

    def _begin_safetensors(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
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
