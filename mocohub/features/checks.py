"""What `Features` are made of, checked when it comes from a program or from files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mocohub.classes import labels_of_names
from mocohub.features.writer import NO_LABEL, Rows


def check_columns(
    columns: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, int]:
    """Return the width D of each column of features.

    Raises:
        ValueError: If one is no float32 or float16 matrix, they differ in length or type, or a shape does not
            fit its column.
    """
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
    return widths


def check_index(index: Rows, errors: Sequence[dict[str, Any]], num_rows: int) -> None:
    """Compare what is known of each row with the number of rows.

    Raises:
        ValueError: If something is not known of each, or an id occurs twice among rows and errors.
    """
    given = {"ids": index.ids, "paths": index.paths, "labels": index.labels, **index.extras}
    for name, column in given.items():
        if column is not None and len(column) != num_rows:
            raise ValueError(f"{name} has {len(column)} entries, but values has {num_rows} rows.")
    all_ids = np.concatenate([index.ids, np.array([error["id"] for error in errors], np.int64)])
    if len(np.unique(all_ids)) < len(all_ids):
        raise ValueError("An id occurs twice among rows and errors, but each input is one of the two.")


def numbered(index: Rows, classes: list[str] | None) -> tuple[Rows, list[str] | None]:
    """Number the classes of rows that name theirs: of streamed tars, or merged with such.

    The numbers are those that a list of the same images has. Fewer than two names are no classes: one folder
    in all tars tells nothing.
    """
    names, labels = list(index.extras["class_name"]), index.labels
    if labels is not None:
        known = {k: str(k) if classes is None else classes[k] for k in set(labels.tolist())}
        known[NO_LABEL] = None
        names = [known[k] if name is None else name for name, k in zip(names, labels.tolist(), strict=True)]
    labels, found = labels_of_names(names)
    if labels is None:
        return index, classes
    array = np.array([NO_LABEL if label is None else label for label in labels], np.int64)
    return index._replace(labels=array), found
