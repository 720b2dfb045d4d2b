"""What manifest.json and errors.jsonl of a feature folder of any layout say, and whether that can be."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from mocohub.features.writer import FORMAT, FORMAT_OF_COLUMNS, FORMAT_OF_SHAPES, columns_of, shapes_of
from mocohub.files import read_json

LAYOUTS = ("parquet", "npy", "safetensors")
FLOATS = ("float32", "float16")
REMEDY = "Copy the folder again, or extract the features again (with --retry-damaged: only damaged shards)."

_LAYOUT_OF = {
    **dict.fromkeys((FORMAT, FORMAT_OF_COLUMNS, FORMAT_OF_SHAPES), "parquet"),
    **{f"mocohub-features-{layout}/{version}": layout for layout in LAYOUTS[1:] for version in (1, 2)},
}
_FILE_NAME = re.compile(r"([\w.:-]*\w[\w.:-]*/)?[\w.:-]*\w[\w.:-]*")  # a column may be stage4:max


def read_manifest(folder: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read the manifest of a feature folder; nothing is said yet of the files it names.

    Args:
        folder: The folder.
        manifest: What to believe of one that has no manifest.json yet.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not that of a feature folder, or contradicts itself.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path) if manifest is None else manifest
    except ValueError as error:
        raise ValueError(f"{error}. {REMEDY}") from error
    try:
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' does not describe features: {error}. {REMEDY}") from error
    for name in (name for shard in manifest["shards"] for name in files_of(shard)):
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"'{path}' names a file {name!r}. {REMEDY}")
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    found = manifest["format"]
    if found not in _LAYOUT_OF:
        raise ValueError(
            f"its format is {found!r}, known are {', '.join(_LAYOUT_OF)}; "
            "if it is a later one, update mocohub"
        )
    facts = {"dtype", "classes", "meta", "num_inputs", "rows", "errors", "shards"}
    if missing := facts - manifest.keys():
        raise ValueError(f"it does not say {', '.join(sorted(missing))}")
    if manifest["dtype"] not in FLOATS:
        raise ValueError(f"its dtype is {manifest['dtype']!r}, known are {', '.join(FLOATS)}")
    shapes = shapes_of(manifest)
    for name, width in columns_of(manifest).items():
        if math.prod(shapes[name]) != width or width < 1:
            raise ValueError(f"{name} is {width} wide, but its shape {shapes[name]}")
    num_rows = sum(int(shard["rows"]) for shard in manifest["shards"])
    if num_rows != manifest["rows"]:
        raise ValueError(f"it says {manifest['rows']} rows, its shards {num_rows}")
    counts = [manifest[name] for name in ("rows", "errors", "num_inputs")]
    if counts[0] + counts[1] != counts[2]:
        raise ValueError(f"it says {counts[0]} rows and {counts[1]} errors for {counts[2]} inputs")
    names = [name for shard in manifest["shards"] for name in files_of(shard)]
    if len(set(names)) < len(names):
        raise ValueError("it lists a file twice")


def layout_of(manifest: dict[str, Any]) -> str:
    """Which of `LAYOUTS` it describes."""
    return _LAYOUT_OF[manifest["format"]]


def files_of(shard: dict[str, Any]) -> dict[str, str | None]:
    """SHA-256 of each file of a shard, by its name in the folder."""
    return shard.get("files") or {shard["file"]: shard["sha256"]}


def read_errors(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of errors.jsonl.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged.
    """
    path = folder / "errors.jsonl"
    try:
        data = path.read_bytes()
        errors = [json.loads(line) for line in data.decode().splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing. {REMEDY}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}. {REMEDY}") from error
    if len(errors) != manifest["errors"]:
        raise ValueError(f"'{path}' has {len(errors)} lines, not {manifest['errors']}. {REMEDY}")
    digest = hashlib.sha256(data).hexdigest()
    if manifest.get("errors_sha256", digest) != digest:  # older folders do not state it
        raise ValueError(f"'{path}' is damaged: its SHA-256 is not the manifest's. {REMEDY}")
    return errors


def no_features(path: Path) -> str:
    """Say why a path is not a feature folder, and how one comes about."""
    if (path / "plan.json").is_file():
        return (
            f"'{path}' is not a feature folder yet: it has no manifest.json, for its extraction has not "
            "finished. Run the same `mocohub extract` again, which does what is missing; `mocohub features "
            "info` says how much that is."
        )
    problem = "is not there"
    if path.exists():
        problem = "has neither manifest.json nor img_emb/" if path.is_dir() else "is a file"
    return (
        f"'{path}' is not a feature folder: it {problem}. `mocohub extract --out` makes one of images; "
        "folders of Features.save and of clip-retrieval are taken too."
    )
