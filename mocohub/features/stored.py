"""A feature folder read back: its manifest, its errors, and the columns of its shards, a part at a time."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mocohub.features.writer import EXTRAS, FORMAT, FORMAT_OF_COLUMNS, FORMAT_OF_SHAPES, NO_LABEL
from mocohub.files import read_json, sha256

REMEDY = "Copy the folder again, or extract the features again."


@dataclass(frozen=True)
class Index:
    """What each row is."""

    ids: np.ndarray
    paths: list[str]
    labels: np.ndarray | None
    extras: dict[str, Sequence[Any]]


@dataclass(frozen=True)
class StoredFeatures:
    """The columns of an opened folder, before they are read."""

    shards: list[Path]
    columns: dict[str, int]
    dtype: np.dtype
    num_rows: int

    def read(self, column: str) -> np.ndarray:
        """Return one (N, D); besides the result one row group is in memory at a time."""
        values = np.empty((self.num_rows, self.columns[column]), self.dtype)
        row = 0
        for block in self.blocks(column):
            values[row : row + len(block)] = block
            row += len(block)
        return values

    def blocks(self, column: str) -> Iterator[np.ndarray]:
        """Yield one (n, D) after the other."""
        for shard in self.shards:
            with open_parquet(shard) as file:
                for group in range(file.num_row_groups):
                    for chunk in file.read_row_group(group, [column])[column].chunks:
                        yield chunk.flatten().to_numpy().reshape(-1, self.columns[column])

    def read_index(self) -> Index:
        """Read what each row is."""
        tables = []
        for shard in self.shards:
            with open_parquet(shard) as file:
                extras = [name for name in EXTRAS if name in file.schema_arrow.names]
                tables.append(file.read(["id", "path", "label", *extras]))
        table = pa.concat_tables(tables)
        has_labels = table["label"].null_count < len(table)
        return Index(
            table["id"].to_numpy(),
            table["path"].to_pylist(),
            table["label"].fill_null(NO_LABEL).to_numpy() if has_labels else None,
            {name: table[name].to_pylist() for name in table.column_names if name in EXTRAS},
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json once it is known to be one.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of another format, or lacks something.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        problem = "has no manifest.json" if folder.is_dir() else "is not there"
        raise FileNotFoundError(
            f"'{folder}' is not a feature folder: it {problem}. "
            "Give a folder that `mocohub extract --out` or Features.save wrote."
        )
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in (FORMAT, FORMAT_OF_COLUMNS, FORMAT_OF_SHAPES):
        raise ValueError(
            f"'{path}' has format {found!r}, but this version of mocohub reads {FORMAT_OF_SHAPES!r}. "
            "Give a feature folder, or update mocohub."
        )
    missing = {"num_features", "dtype", "classes", "meta", "rows", "errors", "shards"} - manifest.keys()
    if missing:
        raise ValueError(f"'{path}' does not say {', '.join(sorted(missing))}. {REMEDY}")
    return manifest


def checked_shard(folder: Path, shard: dict[str, Any], verify: bool) -> Path:
    """Return the path of a shard, whose hash is compared if `verify`.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, or its name is not one of a shard.
    """
    if not re.fullmatch(r"part-\d+-of-\d+\.parquet", shard["file"]):
        raise ValueError(f"'{folder / 'manifest.json'}' names a shard {shard['file']!r}. {REMEDY}")
    path = folder / shard["file"]
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing, but the manifest lists it. {REMEDY}")
    if verify and sha256(path) != shard["sha256"]:
        raise ValueError(f"'{path}' is damaged: its SHA-256 is not the manifest's. {REMEDY}")
    return path


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a shard.

    Raises:
        ValueError: If its footer is damaged.
    """
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"'{path}' is damaged: {error}. {REMEDY}") from error


def read_errors(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of errors.jsonl.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged.
    """
    path = folder / "errors.jsonl"
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing. {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}. {REMEDY}") from error
