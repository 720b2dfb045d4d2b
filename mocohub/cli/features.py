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
    retry_damaged: bool = False,
    launcher: Literal["ray"] | None = None,
    ray_address: str = "auto",
    ray_workers: int | None = None,
    ray_gpus: float | None = None,
    ray_cpus: float | None = None,
) -> None:
    """Write the features of images as a feature folder: Parquet shards, manifest.json, errors.jsonl.

    The same command again does only what is missing, whatever stopped it.

    Args:
        model: What `mocohub.load` takes: a name of `mocohub list`, an exported folder, a run, a MoCo
            checkpoint file, or org/name on the Hub, such as timm/resnet50.a1_in1k.
        data: Images: a folder, one image, a pattern, a .txt/.csv/.tsv/.parquet list of paths, or tar shards,
            also by URL. Several tars and URLs are streamed: each is read once, and gives one shard.
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
        rows_per_shard: Images for one Parquet file; tars that are streamed give one each.
        shard: i/N does every N-th shard from the i-th (i from 0); "lease" does shards that no other process
            has in hand, until all are done. Default: what torchrun or a SLURM array says, else all.
        plan: Write plan.json only, for workers to come.
        content_hash: Add a column with the SHA-256 of each encoded image.
        dedup: Compute images with the same bytes once for each shard.
        fast_decode: Decode large JPEGs smaller; their features change a little.
        format: Layout that the finished folder gets; npy is what numpy, autofaiss and clip-retrieval read.
            Default: parquet.
        retry_damaged: Do shards with images that could not be read again, once these are mended; of tars that
            are streamed, those that were cut or missing. Also shards whose file is damaged or gone.
        launcher: "ray" has workers on a running Ray cluster take shards by lease, until all are done. They
            need the folder, the images and this environment under the same paths.
        ray_address: Of the cluster.
        ray_workers: How many. Default: as many as the cluster has room for.
        ray_gpus: Cards of each, also a part of one. Default: 1 if the cluster has any.
        ray_cpus: Cores of each. Default: its share of them.
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
        "retry_damaged": retry_damaged,
    }
    if launcher is None and (ray_address, ray_workers, ray_gpus, ray_cpus) != ("auto", None, None, None):
        raise ValueError("--ray-address, --ray-workers, --ray-gpus and --ray-cpus need --launcher ray.")
    if launcher is not None and (plan or shard is not None):
        raise ValueError(f"--launcher {launcher} hands out shards by lease: omit --plan and --shard.")
    if launcher == "ray":
        from mocohub.features.ray import extract_on_ray

        del options["shard"]
        options |= {"ray_address": ray_address, "ray_workers": ray_workers}
        options |= {"ray_gpus": ray_gpus, "ray_cpus": ray_cpus}
        print(f"{out}: {extract_on_ray(model, data, **options)}")
    elif plan:
        print(write_plan(model, data, **options))
    else:
        print(f"{out}: {run(model, data, **options)}")


_NEEDED = {  # options of each action of `mocohub features`
    "info": (),
    "verify": (),
    "merge": ("out",),
    "convert": ("out", "to"),
    "project": ("out", "components"),
    "apply": ("out", "projection"),
}


def features_(
    action: Positional[Literal["info", "verify", "merge", "convert", "project", "apply"]],
    folders: Positional[tuple[str, ...]],
    *,
    out: str | None = None,
    to: Literal["parquet", "npy", "safetensors"] | None = None,
    components: int | None = None,
    whiten: bool = False,
    projection: str | None = None,
) -> None:
    """Describe, verify, merge, convert or project feature folders.

    Args:
        action: "info" says what a folder holds, or how far its extraction is; "verify" reads all of it and
            checks hashes, ids and values; "merge" writes several folders as one; "convert" writes one in
            another layout; "project" finds principal components and stores them as one file; "apply" writes
            a folder projected by them.
        folders: One feature folder, or those to merge.
        out: What to write: a folder, or the .safetensors file of "project".
        to: Layout to convert to: npy is what numpy, autofaiss and clip-retrieval read.
        components: How many principal components.
        whiten: Divide each component by its standard deviation.
        projection: File that "project" wrote.
    """
    given = {"out": out, "to": to, "components": components, "projection": projection}
    given = {name: value for name, value in given.items() if value is not None} | (
        {"whiten": True} if whiten else {}
    )
    if action != "merge" and len(folders) != 1:
        raise ValueError(f"{action} takes one feature folder, but got {len(folders)}.")
    for name in given:
        if name not in (*_NEEDED[action], *(["whiten"] if action == "project" else [])):
            raise ValueError(f"{action} does not take --{name}: omit it.")
    for name in _NEEDED[action]:
        if name not in given:
            raise ValueError(f"{action} needs --{name}.")
    if action == "info":
        _info(folders[0])
    elif action == "verify":
        from mocohub.features.verify import verify

        rows, errors = verify(folders[0])
        print(f"{folders[0]}: {rows} rows and {errors} errors are as written")
    elif action in ("merge", "convert"):
        from mocohub.features import formats

        print(formats.merge(folders, out) if action == "merge" else formats.convert(folders[0], out, to=to))
    else:
        from mocohub.features.projection import Projection

        if action == "apply":
            return print(Projection.open(projection).apply_to_folder(folders[0], out))
        found = Projection.fit(folders[0], components, whiten=whiten)
        share = 100 * found.fitted_on["explained_variance"]
        print(
            f"{found.save(out)}: {components} components of {len(found.mean)}, {share:.1f} % of the variance"
        )


def _info(folder: str) -> None:
    from mocohub.features.layouts import FeatureFolder

    if (Path(folder) / "plan.json").is_file() and not (Path(folder) / "manifest.json").is_file():
        from mocohub.features.plan import Plan, read_plan

        planned = read_plan(folder)
        plan = Plan(folder, planned)
        done = len(plan.done()) if plan.progress.is_dir() else 0
        facts = {"kind": "an extraction under way", "shards done": f"{done} of {plan.num_shards}"}
        facts |= {n: value for n, value in planned.items() if n not in ("format", "meta", "num_shards")}
        facts |= planned["meta"]
    else:
        found = FeatureFolder(folder, verify=False)
        manifest = found.manifest
        facts = {
            "kind": f"features ({found.layout})",
            "rows": sum(found.num_rows),
            "errors": manifest.get("errors", 0),
            "shards": len(found.num_rows),
            "incomplete": [s["incomplete"] for s in manifest["shards"] if "incomplete" in s],
            "columns": ", ".join(
                f"{name} ({' x '.join(map(str, shape))} {manifest['dtype']})"
                for name, shape in found.shapes.items()
            ),
            "also": ", ".join(["id", "path", "label", *found.extras]),
            "classes": manifest["classes"],
            **manifest["meta"],
        }
    for name, value in facts.items():
        if value not in (None, [], {}):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"{name:<19} {text if len(text) <= 300 else text[:297] + '...'}")
