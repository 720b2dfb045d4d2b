"""Verbs from images to features: extract, features."""

import json
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def extract(
    model: Positional[str],
    *,
    data: str,
    out: str,
    batch_size: int = 64,
    workers: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    output_dtype: Literal["float32", "float16"] = "float32",
    layers: tuple[str, ...] = (),
    pool: Literal["avg", "max", "gem", "none"] = "avg",
    flip: bool = False,
    crops: Literal[1, 5] = 1,
    normalize: bool = False,
    projection: str | None = None,
    rows_per_shard: int = 100_000,
    shard: str | None = None,
    plan: bool = False,
    content_hash: bool = False,
    dedup: bool = False,
    fast_decode: bool = False,
    format: Literal["parquet", "npy", "safetensors"] | None = None,
) -> None:
    """Write the features of images as a feature folder: Parquet shards, manifest.json, errors.jsonl.

    The same command again does only what is missing, whatever stopped it.

    Args:
        model: What `mocohub.load` takes: an exported folder, a run, a MoCo checkpoint file, hf-hub:org/name.
        data: Images: a folder, a .txt/.csv/.tsv/.parquet list of paths, or tar shards, also by URL.
        out: Feature folder; may hold a part of this same extraction, or all of it, but nothing else.
        batch_size: Images in one forward pass.
        workers: Processes that decode images. Default: one per core, at most 16.
        device: Where to compute. Default: cuda if there is a card.
        dtype: Of the computation. "auto" is bfloat16 where that is fast and the features agree.
        output_dtype: Of the stored features.
        layers: Modules of the model, stage1 to stage4, embedding, or contrastive (of a run or checkpoint): a
            column for each. "stage4:max" pools this one otherwise than --pool. Default: embedding.
        pool: How maps of a layer become vectors; none keeps them.
        flip: Average each image with its mirror image.
        crops: 5 averages over crops at the corners and the centre; with --flip over ten.
        normalize: Divide each feature vector by its L2 norm.
        projection: File of a projection, applied to the features (before --normalize).
        rows_per_shard: Images for one Parquet file.
        shard: i/N does every N-th shard from the i-th (i from 0); "lease" does shards that no other process
            has in hand, until all are done. Default: what torchrun or a SLURM array says, else all.
        plan: Write plan.json only, for workers to come.
        content_hash: Add a column with the SHA-256 of each encoded image.
        dedup: Compute images with the same bytes once for each shard.
        fast_decode: Decode large JPEGs smaller; their features change a little.
        format: Layout that the finished folder gets; npy is what numpy, autofaiss and clip-retrieval read.
            Default: parquet.
    """
    from mocohub.features.extract import extract as run
    from mocohub.features.extract import write_plan

    options = {
        "out": out,
        "batch_size": batch_size,
        "num_workers": workers,
        "device": device,
        "dtype": dtype,
        "output_dtype": output_dtype,
        "layers": layers,
        "pool": pool,
        "flip": flip,
        "crops": crops,
        "normalize": normalize,
        "projection": projection,
        "rows_per_shard": rows_per_shard,
        "shard": shard,
        "content_hash": content_hash,
        "dedup": dedup,
        "fast_decode": fast_decode,
        "format": format,
    }
    if plan:
        print(write_plan(model, data, **options))
    else:
        print(f"{out}: {run(model, data, **options)}")


def features_(
    action: Positional[Literal["info", "verify", "merge", "convert"]],
    folders: Positional[tuple[str, ...]],
    *,
    out: str | None = None,
    to: Literal["parquet", "npy", "safetensors"] | None = None,
) -> None:
    """Describe, verify, merge or convert feature folders.

    Args:
        action: "info" says what a folder holds, or how far its extraction is; "verify" reads all of it and
            checks hashes, ids and values; "merge" writes several folders as one; "convert" writes one in
            another layout.
        folders: One feature folder, or those to merge.
        out: Folder to write, for merge and convert.
        to: Layout to convert to: npy is what numpy, autofaiss and clip-retrieval read.
    """
    from mocohub.features import formats

    if action != "merge" and len(folders) != 1:
        raise ValueError(f"{action} takes one feature folder, but got {len(folders)}.")
    if action in ("info", "verify"):
        if out or to:
            raise ValueError(f"{action} only reads: omit --out and --to.")
        return _info(folders[0]) if action == "info" else _verify(folders[0])
    if out is None:
        raise ValueError(f"{action} needs --out, the folder to write.")
    if action == "merge":
        if to:
            raise ValueError("merge writes Parquet: omit --to, and convert the result.")
        return print(formats.merge(folders, out))
    if to is None:
        raise ValueError("convert needs --to parquet, npy or safetensors.")
    print(formats.convert(folders[0], out, to=to))


def _info(folder: str) -> None:
    from mocohub.features.layouts import FeatureFolder
    from mocohub.files import read_json

    if (Path(folder) / "plan.json").is_file() and not (Path(folder) / "manifest.json").is_file():
        from mocohub.features.plan import Plan

        planned = read_json(Path(folder) / "plan.json")
        plan = Plan(folder, planned)
        done = len(plan.done()) if plan.progress.is_dir() else 0
        facts = {"kind": "an extraction under way", "shards done": f"{done} of {plan.num_shards}"}
        facts |= {name: value for name, value in planned.items() if name not in ("format", "meta")}
        facts |= planned["meta"]
    else:
        found = FeatureFolder(folder, verify=False)
        manifest = found.manifest
        facts = {
            "kind": f"features ({found.layout})",
            "rows": sum(found.num_rows),
            "errors": manifest.get("errors", 0),
            "shards": len(found.num_rows),
            "columns": ", ".join(
                f"{name} ({width} {manifest['dtype']})" for name, width in found.columns.items()
            ),
            "also": ", ".join(["id", "path", "label", *found.extras]),
            "classes": manifest["classes"],
            **manifest["meta"],
        }
    for name, value in facts.items():
        if value not in (None, [], {}):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"{name:<20}{text if len(text) <= 300 else text[:297] + '...'}")


def _verify(folder: str) -> None:
    import numpy as np

    from mocohub.features.layouts import FeatureFolder

    found = FeatureFolder(folder)  # compares the hashes of all files
    num_inputs = found.manifest["num_inputs"]
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
    print(f"{folder}: {sum(found.num_rows)} rows and {len(ids) - sum(found.num_rows)} errors are as written")
