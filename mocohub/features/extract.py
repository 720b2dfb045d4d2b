"""Images to features: one pass through a frozen model, and a row or a reason for every image.

Images are decoded and transformed in worker processes. One that cannot be read, or gives no finite features,
becomes an error with its path and reason; no other takes its place, and the rest of its batch stays. A folder
is filled shard by shard (see `plan`): whatever stops an extraction, the same call goes on with it. Tar shards
are streamed (see `stream`), one for each shard of the folder.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from mocohub.features.job import Job
from mocohub.features.plan import first_errors
from mocohub.features.projection import Projection
from mocohub.features.store import Features
from mocohub.files import writing

_log = logging.getLogger(__name__)


def extract(
    model: nn.Module | str | Path,
    images: Any,
    *,
    out: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    output_dtype: Literal["float32", "float16"] = "float32",
    layers: Sequence[str] = (),
    pool: Literal["avg", "max", "gem", "none"] = "avg",
    flip: bool = False,
    crops: Literal[1, 5] = 1,
    normalize: bool = False,
    projection: Projection | str | Path | None = None,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    rows_per_shard: int = 100_000,
    shard: str | None = None,
    content_hash: bool = False,
    dedup: bool = False,
    fast_decode: bool = False,
    format: Literal["parquet", "npy", "safetensors"] | None = None,
    retry_damaged: bool = False,
    progress: bool = True,
) -> Features:
    """Return the features of images, by default pooled and from before any classifier, in the images' order.

    Every image is either one row or one entry of `errors`. The model runs in eval mode and without gradients;
    its mode and device are restored afterwards, and torch's global random state is left alone.

    With `out`, the same call may be repeated after an interruption of any kind, and made by several processes
    at once: only shards that are missing are computed, and the folder ends with the same bytes. If it is
    finished already, nothing is computed.

    Args:
        model: A timm model; any other module from (n, C, H, W) to (n, D), called as it is; one of these in
            torch.compile or DataParallel; or what `mocohub.load` accepts.
        images: What `mocohub.list_images` accepts (a folder, a list file, a tar, a list of paths); a list of
            PIL images or of uint8 arrays (H, W, 3); a dataset of the Hugging Face `datasets` library; or a
            map-style torch Dataset of images or of (image, label) pairs. A float tensor (C, H, W) counts as
            preprocessed: the model gets it as it is.
            Several tars (a folder, pattern, list file or list of them) and URLs are not listed but streamed,
            as `mocohub.shards.Shards` are: each is read once, and gives one shard of `out`. An image's id is
            then the position of its tar x 2**24 + its position in it. The column class_name has what its
            `.cls` file says, else the first folder of its path; labels are numbered when the features are
            opened, as `list_images` would, if there are two names or more.
        out: Feature folder to write (see `mocohub.features.store`). Rows then go to disk as they come, and
            the result reads its `values` from there when they are first used.
        batch_size: Images in one forward pass, views counted.
        num_workers: Processes that decode and transform. Default: one for each CPU this process may use, at
            most 16; none for images that are in memory already.
        device: Where to compute. Default: where the model is, or CUDA if it is on the CPU and there is one
            (under torchrun the card of the local rank).
        dtype: "float32" is exact to 1e-5. "bfloat16" computes under autocast. "auto" is bfloat16 where that
            is fast and gives features with a cosine of at least 0.999 to the exact ones, which is checked on
            the first images, and float32 elsewhere; weights of another type compute in it.
        output_dtype: Type of `values`. A row with a value beyond float16 is then an error.
        layers: Names of modules of the model, or stage1 to stage4, or "embedding", or "contrastive": each
            becomes a column. A pooling of its own may follow a name, as in "stage4:max". "contrastive" is the
            embedding that the contrastive loss compares, of unit length (128-d in the papers): for runs and
            checkpoints, or a model of `mocohub.load(..., head=True)`. Of a module that is called several
            times in a pass, the last output counts. Default: the embedding alone.
        pool: How the maps of a layer become vectors. "none" keeps maps (C, H, W) and tokens (T, D), see
            `Features.maps`; an image whose maps have another shape than those of the first is an error.
        flip: Average the features of an image and of its mirror image.
        crops: 5 averages over crops at the corners and the centre, where the transform has one at the centre.
            With `flip` these are ten. Features are averaged as the network gives them, before `projection`
            and `normalize`: the mean of contrastive embeddings is shorter than they are.
        normalize: Divide each row by its L2 norm, as the last thing. Not of maps.
        projection: What to apply to the features (see `mocohub.features.projection`), or its file.
        transform: From a PIL RGB image to a float tensor (C, H, W), or to several views of the image
            (V, C, H, W), whose features are averaged. Default: the model's own preprocessing. To go on with
            another one is refused: a function is told from others by its code, an object by its text.
        rows_per_shard: Inputs for one Parquet file of `out`, and what an interruption may cost; no batch
            crosses that border.
        shard: Which shards of `out` this process does: "i/N" (i from 0) each N-th; "lease" any that no other
            process has in hand, until all are done. Default: as torchrun or a SLURM array says, else all.
            Tars that are streamed are one shard each.
        content_hash: Add a column content_sha256: of the encoded images, so only for files and tar shards.
        dedup: Compute images with the same bytes once for each shard. Likewise only for files.
        fast_decode: Decode JPEGs at 1/2, 1/4 or 1/8 of their size where that is no smaller than what the
            transform resizes to. Faster for large photos; their features change a little.
        format: Layout of `out` (see `mocohub.features.layouts`), "npy" being clip-retrieval's. Shards are
            always filled as Parquet; the process that finds all of them done converts the folder, which has
            one layout or the other whenever it is stopped. Default: Parquet, or what a finished folder has.
        retry_damaged: Do the shards of `out` again that have images without a row, once these are mended; of
            tars that are streamed, those whose tar was cut or gone when it was read. The images before that
            have rows, and the damage is an error with the name of the tar; the manifest says "incomplete" of
            such a shard. Also shards whose Parquet file is gone or damaged, for which all of them are read.
            Give it to one process, before others join.
        progress: Show images per second, remaining time and errors so far; on a terminal only.

    Returns:
        The features; `labels` and `classes` are those of the source. While other processes are still at work
        on `out`, those of the shards that fell to this one.

    Raises:
        FileExistsError: If `out` holds something else than an extraction.
        ValueError: If an argument is not accepted, `out` holds an extraction with another model, transform,
            input or setting, there are no images, or the model does not give (n, D).
        RuntimeError: If not one image gave features; the message shows the first reasons.
        ShardError: If a tar can neither be read nor is known to be damaged, because of the network or access.
    """
    job = Job(**locals())
    # Loaders pin memory by way of the current card, which is the first one of the machine otherwise.
    with torch.cuda.device(job.device) if job.device.type == "cuda" else nullcontext():
        features = job.in_memory() if out is None else job.to_folder()
    if features.errors:
        shown = first_errors(features.errors)
        total = len(features) + len(features.errors)
        _log.warning("%d of %d images have no features:%s", len(features.errors), total, shown)
    return features


def write_plan(model: nn.Module | str | Path, images: Any, *, out: str | Path, **options: Any) -> Path:
    """Write plan.json alone: the shards of an extraction, for processes that join later.

    Args:
        model: As for `extract`, which then has to get the same model, images and options.
        images: Likewise.
        out: Feature folder.
        options: Likewise.

    Returns:
        The file.

    Raises:
        FileExistsError: As `extract` does.
        ValueError: Likewise.
    """
    arguments = inspect.signature(extract).bind(model, images, out=out, **options)
    arguments.apply_defaults()
    job = Job(**arguments.arguments)
    with writing(out):
        job.plan.begin()
    return job.plan.folder / "plan.json"
