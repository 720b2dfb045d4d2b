"""Whether a feature folder is what its manifest says, and its manifest what the schema says.

The JSON Schema of manifest.json is `manifest.schema.json` beside this file.
"""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np

from mocohub.features.layouts import FeatureFolder
from mocohub.files import read_json


def verify(folder: str | Path) -> tuple[int, int]:
    """Read all of a feature folder, of any layout, and return its number of rows and of errors.

    Hashes, counts, ids and values are checked, and the manifest against its schema if the package jsonschema
    is installed. What clip-retrieval wrote has neither hashes nor manifest.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If it is no feature folder, or a file is missing.
        ValueError: If something is not as it must be; the message says what.
    """
    manifest = Path(folder, "manifest.json")
    if manifest.is_file():
        check_manifest(read_json(manifest), manifest)
    found = FeatureFolder(folder)  # compares the hashes of all files
    num_rows, num_inputs = sum(found.num_rows), found.manifest["num_inputs"]
    ids = [np.array([error["id"] for error in found.errors()], np.int64)]
    for shard in range(len(found.num_rows)):
        for rows in found.rows(shard):
            ids.append(rows.ids)
            for name, values in rows.values.items():
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"'{folder}' has values in '{name}' of shard {shard} that are not finite."
                    )
    ids = np.concatenate(ids)
    if len(ids) != num_inputs or len(np.unique(ids)) != len(ids):
        raise ValueError(f"'{folder}' has {len(ids)} rows and errors for {num_inputs} inputs, or one twice.")
    return num_rows, len(ids) - num_rows


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of manifest.json."""
    text = importlib.resources.files("mocohub.features").joinpath("manifest.schema.json").read_text("utf-8")
    return json.loads(text)


def check_manifest(manifest: Any, path: Path) -> None:
    """Compare a manifest with its schema, if the package jsonschema is installed.

    Args:
        manifest: What the file says.
        path: Its name, for the message.

    Raises:
        ValueError: If it does not fit; the message says where.
    """
    try:
        import jsonschema
    except ImportError:
        return
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(manifest))
    if error is not None:
        raise ValueError(
            f"'{path}' does not fit manifest.schema.json: at {error.json_path}, {error.message[:300]}. "
            "Copy the folder again, or extract the features again."
        )
