"""List files: .txt, .csv, .tsv and .parquet with the paths of images and perhaps their labels."""

import csv
from collections.abc import Iterator
from contextlib import nullcontext

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".parquet")


def read_list(source: str) -> tuple[list[str], list[str | None]]:
    """Return the paths of a list file, and their labels as texts, None where there is none.

    Raises:
        ValueError: If it has no column of paths, a row without one or no row, or cannot be read as what it is
            by its name.
    """
    paths, names = [], []
    is_parquet = source.lower().endswith(".parquet")
    try:
        with nullcontext() if is_parquet else open(source, encoding="utf-8-sig", newline="") as file:
            for path, name in _parquet_rows(source) if is_parquet else _rows(source, file):
                if not path:
                    raise ValueError(f"'{source}' has a row without a path: row {len(paths) + 1}.")
                paths.append(path)
                names.append(name or None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"'{source}' cannot be read as a list of paths, it must be UTF-8 text: {error}"
        ) from error
    if not paths:
        raise ValueError(f"No images in '{source}': the list is empty.")
    return paths, names


def _rows(source: str, file: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield path and label ("" if none) of each row of a list file."""
    if source.lower().endswith(".txt"):
        for line in file:
            if line.strip():
                path, _, name = line.partition("\t")
                yield path.strip(), name.strip()
        return
    table = csv.DictReader(file, delimiter="\t" if source.lower().endswith(".tsv") else ",")
    columns = [column.strip() for column in table.fieldnames or []]
    if "path" not in columns:
        raise ValueError(
            f"'{source}' has no column 'path', only {columns}. Its first line must name the columns: "
            "path and, if there are labels, label."
        )
    table.fieldnames = columns
    for number, row in enumerate(table, start=1):
        if None in row:  # what a comma without quotes cuts off a label
            raise ValueError(
                f"Row {number} of '{source}' has more values than the {len(columns)} columns {columns}. "
                "Put values that contain the delimiter in double quotes."
            )
        yield (row["path"] or "").strip(), (row.get("label") or "").strip()


def _parquet_rows(source: str) -> Iterator[tuple[str, str]]:
    """Yield path and label ("" if none) of each row of a Parquet file."""
    import pyarrow as pa  # takes longer to import than to list a folder
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(source).names
        if "path" not in names:
            raise ValueError(
                f"'{source}' has no column 'path', only {names}. Name the column of paths so. If the images "
                "lie in the file itself, give mocohub.extract what datasets.load_dataset('parquet', "
                "data_files=...) returns."
            )
        table = pq.read_table(source, columns=["path", "label"] if "label" in names else ["path"])
        for name, column in zip(table.column_names, table.columns, strict=True):
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not is_text and (name == "path" or not pa.types.is_integer(kind)):
                accepted = "strings" if name == "path" else "strings or integers"
                raise ValueError(f"Column '{name}' of '{source}' holds {kind}, but must hold {accepted}.")
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{source}' cannot be read as Parquet: {reason}. Write it again.") from error
    for row in table.to_pylist():
        label = row.get("label")
        yield row["path"] or "", "" if label is None else str(label).strip()
