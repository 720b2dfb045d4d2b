"""Features as a folder, a folder in another layout, and several folders as one."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mocohub.classes import sorted_names
from mocohub.errors import unknown
from mocohub.features.arrays import ArrayShard, array_format
from mocohub.features.layouts import FeatureFolder
from mocohub.features.manifest import LAYOUTS
from mocohub.features.store import Features, check_comparable
from mocohub.features.writer import (
    EXTRAS,
    NO_LABEL,
    FeatureWriter,
    Rows,
    ShardWriter,
    feature_facts,
    shard_file,
    write_manifest,
)
from mocohub.files import (
    atomic_folder,
    flush,
    read_json,
    refuse_existing,
    sha256,
    write_json,
    writing,
)

# What may differ between folders that are merged: it changes where features are from, not what they are.
_CIRCUMSTANCES = ("input", "versions", "computation")
_SHARD_FILE = re.compile(  # of any layout
    r"part-\d+-of-\d+(\.metadata)?\.(parquet|safetensors)|([\w.:-]+)_emb/\3_emb_\d+\.npy|metadata/metadata_\d+\.parquet"
)


def save(features: Features, folder: str | Path, *, rows_per_shard: int, format: str) -> Path:
    """Write features from memory, or from another folder; `Features.save` says more."""
    if format not in LAYOUTS:
        raise unknown("format", format, LAYOUTS)
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}, but must be at least 1.")
    starts = range(0, max(len(features), 1), rows_per_shard)
    with writing(folder), atomic_folder(folder) as temporary:
        facts = {"classes": features.classes, "meta": features.meta, "shapes": features.shapes}
        writer = FeatureWriter(temporary, num_shards=len(starts), **facts)
        for shard, start in enumerate(starts):
            rows = slice(start, start + rows_per_shard)
            labels = None if features.labels is None else features.labels[rows]
            values = {name: features[name][rows] for name in features.columns}
            extras = {name: column[rows] for name, column in features.extras.items()}
            writer.write(shard, features.ids[rows], features.paths[rows], labels, values, extras)
        writer.close(features.errors, num_inputs=len(features) + len(features.errors))
        change_layout(temporary, format)
    return Path(folder)


def convert(folder: str | Path, out: str | Path, *, to: Literal["parquet", "npy", "safetensors"]) -> Path:
    """Write a feature folder in another layout; to convert it back gives the same bytes.

    Every byte is verified on the way. One block of rows is in memory at a time.

    Args:
        folder: A feature folder of any layout (see `mocohub.features.layouts`), clip-retrieval's included.
        out: Where the new folder shall stand, complete or not at all.
        to: "npy" for numpy, autofaiss and embedding-reader; "safetensors"; "parquet" for pandas, DuckDB and
            `datasets`.

    Returns:
        The new folder.

    Raises:
        FileExistsError: If something is at `out`.
        FileNotFoundError: If `folder` is no feature folder, or lacks a file.
        ValueError: If it is damaged or has that layout already.
    """
    if to not in LAYOUTS:
        raise unknown("layout", to, LAYOUTS)
    refuse_existing(out)
    source = FeatureFolder(folder)
    if source.layout == to:
        raise ValueError(f"'{folder}' is in the layout '{to}' already. Copy it, or give another layout.")
    with writing(out), atomic_folder(out) as temporary:
        if to == "parquet":
            _write_parquet(temporary, [source], source.facts)
            return Path(out)
        shards = []
        described = {"shapes": source.shapes, "dtype": source.dtype, "extras": source.extras}
        digits = len(str(len(source.num_rows) - 1))
        for i, num_rows in enumerate(source.num_rows):
            name = f"{i:0{digits}d}" if to == "npy" else Path(shard_file(i, len(source.num_rows))).stem
            shard = ArrayShard(temporary, name, to, num_rows, **described)
            for rows in source.rows(i):
                shard.write(rows)
            shards.append({**shard.close(), **_incomplete(source, i)})
        lines = [json.dumps(error) + "\n" for error in source.errors()]
        (temporary / "errors.jsonl").write_text("".join(lines), "utf-8")
        found = {"format": array_format(to, source.manifest), "shards": shards}
        write_json(temporary / "manifest.json", {**source.manifest, **found})
    return Path(out)


def change_layout(folder: str | Path, to: Literal["parquet", "npy", "safetensors"]) -> None:
    """Convert a feature folder where it stands, as the last step of an extraction; it may be repeated.

    The new files get their names, then the manifest is replaced in one step, then the old files go. So the
    folder is whole in one layout or the other, whenever the process is killed; several may do this at once.
    Room for both is needed for a while.

    Args:
        folder: A feature folder that this package wrote.
        to: As for `convert`.
    """
    folder = Path(folder).resolve()  # so that what is beside it is on the same disk
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        if FeatureFolder(folder, verify=False).layout != to:
            convert(folder, scratch, to=to)
            files = [path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()]
            for name in sorted(files, key=lambda name: name == Path("manifest.json")):  # that one last
                (folder / name).parent.mkdir(exist_ok=True)
                (scratch / name).replace(folder / name)
                flush((folder / name).parent)
    except (FileNotFoundError, ValueError):  # what another process has just removed
        if FeatureFolder(folder, verify=False).layout != to:
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shards = read_json(folder / "manifest.json")["shards"]
    named = {name for shard in shards for name in shard.get("files") or [shard["file"]]}
    for place, _, files in os.walk(folder, topdown=False):  # which passes over what has just gone
        for path in (Path(place, file) for file in files):
            name = path.relative_to(folder).as_posix()
            if _SHARD_FILE.fullmatch(name) and name not in named:
                path.unlink(missing_ok=True)
        if re.fullmatch(r"[\w.:-]+_emb|metadata", Path(place).name) and Path(place) != folder:
            with suppress(OSError):  # it is not empty, or gone
                os.rmdir(place)


def merge(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write several feature folders of one model as one, as if their inputs had been listed in turn.

    Ids are counted through. Classes are joined by their names, labels renumbered accordingly. Paths stay what
    they were. `meta["input"]["merged"]` tells the inputs and how many images each had.

    Args:
        folders: Feature folders, of any layout.
        out: Feature folder (Parquet) to write, complete or not at all.

    Returns:
        The new folder.

    Raises:
        FileExistsError: If something is at `out`.
        FileNotFoundError: If one is no feature folder, or lacks a file.
        ValueError: If there are fewer than two, one is damaged, or their models, settings, columns or types
            differ; the message says how.
    """
    if len(folders) < 2:
        raise ValueError(f"There is nothing to merge: {len(folders)} folders were given. Give two or more.")
    refuse_existing(out)
    sources = [FeatureFolder(folder) for folder in folders]
    for other in sources[1:]:
        _check_mergeable(sources[0], other)
    first = sources[0].manifest
    meta = {
        name: value
        for name, value in first["meta"].items()
        if name not in _CIRCUMSTANCES or all(source.manifest["meta"].get(name) == value for source in sources)
    }
    inputs = [
        {**(source.manifest["meta"].get("input") or {}), "num_inputs": source.manifest["num_inputs"]}
        for source in sources
    ]
    source_text = f"a merge of {len(sources)} feature folders"
    meta["input"] = {"source": source_text, "paths_sha256": None, "merged": inputs}
    classes, shapes = _all_classes(sources), first.get("shapes")
    facts = feature_facts(sources[0].columns, first["dtype"], classes, meta, shapes)
    with writing(out), atomic_folder(out) as temporary:
        _write_parquet(temporary, sources, facts)
    return Path(out)


def _write_parquet(folder: Path, sources: list[FeatureFolder], facts: dict[str, Any]) -> None:
    """Write the shards of all sources in turn, with the classes that `facts` names."""
    num_shards = sum(len(source.num_rows) for source in sources)
    extras = [name for name in EXTRAS if any(name in source.extras for source in sources)]
    records: list[dict[str, Any]] = []
    first_id = 0
    for source in sources:
        last_id = first_id - 1
        for shard in range(len(source.num_rows)):
            name = shard_file(len(records), num_shards)
            writer = ShardWriter(folder / name, facts, extras)
            for rows in source.rows(shard):
                last_id = max(last_id, first_id + int(rows.ids.max(initial=-1)))
                labels = _relabelled(rows, source, facts["classes"])
                known = {name: rows.extras.get(name, [None] * len(rows.ids)) for name in extras}
                writer.write(rows.ids + first_id, rows.paths, labels, rows.values, known)
            writer.close()
            record = {"file": name, "rows": writer.rows, "sha256": sha256(folder / name), "errors": []}
            records.append({**record, **_incomplete(source, shard)})
        errors = [{**error, "id": error["id"] + first_id} for error in source.errors()]
        records[-1]["errors"] = errors
        # Ids of streamed tars leave gaps.
        first_id = 1 + max(
            [first_id + source.manifest["num_inputs"] - 1, last_id, *(e["id"] for e in errors)]
        )
    num_inputs = sum(source.manifest["num_inputs"] for source in sources)
    write_manifest(folder, facts, records, num_inputs)


def _incomplete(source: FeatureFolder, shard: int) -> dict[str, str]:
    """Return what a shard's record says of a damaged tar."""
    record = source.manifest["shards"][shard]
    return {"incomplete": record["incomplete"]} if "incomplete" in record else {}


def _relabelled(rows: Rows, source: FeatureFolder, classes: list[str] | None) -> np.ndarray:
    """Return the labels as positions in `classes`."""
    own = source.manifest["classes"]
    if own == classes or (rows.labels == NO_LABEL).all():
        return rows.labels
    if own is None:
        raise ValueError(
            f"'{source.path}' has labels without class names, the others have names. Merge it apart."
        )
    if rows.labels.max() >= len(own):
        raise ValueError(
            f"'{source.path}' has a label {rows.labels.max()}, but {len(own)} classes. Make it again."
        )
    positions = np.array([*map(classes.index, own), NO_LABEL])  # NO_LABEL is -1, the last
    return positions[rows.labels]


def _all_classes(sources: list[FeatureFolder]) -> list[str] | None:
    """Return the names of all classes, numbers in numeric order and others in code-point order."""
    given = [source.manifest["classes"] for source in sources if source.manifest["classes"] is not None]
    if not given or all(classes == given[0] for classes in given):
        return given[0] if given else None
    return sorted_names(name for classes in given for name in classes)


def _check_mergeable(first: FeatureFolder, other: FeatureFolder) -> None:
    for name, a, b in (
        ("columns", first.columns, other.columns),
        ("shapes", first.shapes, other.shapes),
        ("type", first.manifest["dtype"], other.manifest["dtype"]),
    ):
        if a != b:
            raise ValueError(f"'{first.path}' and '{other.path}' cannot be merged: {name} {a} and {b}.")
    try:
        check_comparable(*(_without_rows(folder) for folder in (first, other)))
    except ValueError as error:
        raise ValueError(f"'{first.path}' and '{other.path}' cannot be merged: {error}") from error
    first_meta, other_meta = first.manifest["meta"], other.manifest["meta"]
    for name in {**first_meta, **other_meta}:
        if name not in ("model", *_CIRCUMSTANCES) and first_meta.get(name) != other_meta.get(name):
            a, b = first_meta.get(name), other_meta.get(name)
            raise ValueError(f"'{first.path}' and '{other.path}' cannot be merged: {name} {a} and {b}.")


def _without_rows(folder: FeatureFolder) -> Features:
    values = np.empty((0, next(iter(folder.columns.values()))), folder.manifest["dtype"])
    return Features(values, [], [], meta=folder.manifest["meta"])
