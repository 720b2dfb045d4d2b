"""Images to features: one pass through a frozen model, and a row or a reason for every image.

Images are decoded and transformed in worker processes. One that cannot be read, or gives no finite features,
becomes an error with its path and reason; no other takes its place, and the rest of its batch stays.
"""

import logging
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import mocohub
from mocohub.distributed import num_cpus
from mocohub.errors import unknown
from mocohub.features.inputs import Inputs, collate
from mocohub.features.network import choose_device, data_config, evaluating, model_facts, pooled
from mocohub.features.store import Features
from mocohub.features.writer import NO_LABEL, FeatureWriter
from mocohub.files import atomic_folder, refuse_existing
from mocohub.hub.load import load
from mocohub.hub.load import transform as model_transform

_log = logging.getLogger(__name__)

_COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def extract(
    model: nn.Module | str | Path,
    images: Any,
    *,
    out: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    output_dtype: Literal["float32", "float16"] = "float32",
    normalize: bool = False,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    rows_per_shard: int = 100_000,
    progress: bool = True,
) -> Features:
    """Return the pooled features of images, taken before any classifier, in the order of the images.

    Every image is either one row or one entry of `errors`. The model runs in eval mode and without gradients;
    its mode and device are restored afterwards, and torch's global random state is left alone.

    Args:
        model: A timm model; any other module from (n, C, H, W) to (n, D), called as it is; or what
            `mocohub.load` accepts.
        images: What `mocohub.list_images` accepts (a folder, a list file, a tar, a list of paths); a list of
            PIL images or of uint8 arrays (H, W, 3); or a map-style torch Dataset of images or of (image,
            label) pairs. A float tensor (C, H, W) counts as preprocessed: the model gets it as it is.
        out: Feature folder to write (see `mocohub.features.store`). Rows then go to disk as they come, and
            the result reads its `values` from there when they are first used.
        batch_size: Images in one forward pass.
        num_workers: Processes that decode and transform. Default: one for each CPU this process may use, at
            most 16; none for images that are in memory already.
        device: Where to compute. Default: where the model is, or CUDA if it is on the CPU and there is one.
        dtype: "bfloat16" computes under autocast. "float32" follows torch's settings, by which convolutions
            on CUDA may use TF32.
        output_dtype: Type of `values`. A row with a value beyond float16 is then an error.
        normalize: Divide each row by its L2 norm.
        transform: From a PIL RGB image to a float tensor (C, H, W). Default: the model's own preprocessing.
        rows_per_shard: Inputs for one Parquet file of `out`; no batch crosses that border.
        progress: Show images per second, remaining time and errors so far; on a terminal only.

    Returns:
        The features. `labels` and `classes` are those of the source.

    Raises:
        FileExistsError: If `out` exists; nothing has been computed then.
        ValueError: If an argument is not accepted, there are no images, or the model does not give (n, D).
        RuntimeError: If not one image gave features; the message shows the first reasons.
    """
    for argument, count, least in (
        ("batch_size", batch_size, 1),
        ("rows_per_shard", rows_per_shard, 1),
        ("num_workers", num_workers, 0),
    ):
        if count is not None and count < least:
            raise ValueError(f"{argument} is {count}, but must be at least {least}.")
    for argument, given, accepted in (
        ("dtype", dtype, _COMPUTE_DTYPES),
        ("output_dtype", output_dtype, _OUTPUT_DTYPES),
    ):
        if given not in accepted:
            raise unknown(argument, given, accepted)
    if out is not None:
        refuse_existing(out)
    inputs = Inputs(images)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        name, model = str(model), load(model)
    device = choose_device(device, model)
    inputs.transform = transform or _own_transform(model, needed=not isinstance(inputs.images, Dataset))

    ids = range(len(inputs))
    shards = [ids[start : start + rows_per_shard] for start in range(0, len(ids), rows_per_shard)]
    batches = [shard[i : i + batch_size] for shard in shards for i in range(0, len(shard), batch_size)]
    if num_workers is None:
        num_workers = 0 if inputs.in_memory else min(num_cpus(), 16, len(batches) - 1)
    loader = DataLoader(
        inputs,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or the loader would draw a seed from the global one
    )
    meta = {
        "model": {"name": name, **model_facts(model)},
        "transform": {
            "text": _text(inputs.transform),
            "data_config": None if transform or not inputs.transform else data_config(model),
        },
        "normalized": normalize,
        "computation": {"dtype": dtype, "device": device.type, "batch_size": batch_size},
        "input": {"source": inputs.source, "paths_sha256": inputs.paths_sha256},
        "versions": _versions(),
    }
    forward = partial(pooled, model, device=device, dtype=_COMPUTE_DTYPES[dtype], normalize=normalize)
    errors: list[dict[str, Any]] = []
    with evaluating(model, device):
        rows = _rows(loader, forward, _OUTPUT_DTYPES[output_dtype], errors, progress)
        if out is None:
            features = _gather(rows, errors, inputs, meta)
        else:
            with atomic_folder(out) as folder:
                writer = FeatureWriter(folder, num_shards=len(shards), classes=inputs.classes, meta=meta)
                for row_ids, labels, values in rows:
                    paths = [inputs.paths[i] for i in row_ids]
                    writer.write(int(row_ids[0]) // rows_per_shard, row_ids, paths, labels, values)
                writer.close(errors, num_inputs=len(inputs))
            features = Features.open(out, verify=False)
    if errors:
        _log.warning("%d of %d images have no features:%s", len(errors), len(inputs), _first(errors))
    return features


def _rows(
    loader: DataLoader,
    forward: Callable[[torch.Tensor], torch.Tensor],
    output_dtype: torch.dtype,
    errors: list[dict[str, Any]],
    progress: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield ids (n,), labels (n,) and features (n, D) batch by batch; append what has no row to `errors`."""
    inputs = loader.dataset
    with tqdm(total=len(inputs), desc="extract", unit="img", disable=None if progress else True) as bar:
        for batch in loader:
            errors += batch.errors
            if batch.ids:
                ids, labels = np.array(batch.ids), np.array(batch.labels)
                values = torch.cat([forward(pixels) for pixels in batch.pixels]).to(output_dtype).numpy()
                finite = np.isfinite(values).all(1)
                for i in ids[~finite].tolist():
                    reason = f"its features are not finite in {values.dtype}"
                    errors.append({"id": i, "path": inputs.paths[i], "reason": reason})
                if finite.any():
                    yield ids[finite], labels[finite], values[finite]
            bar.update(len(batch.ids) + len(batch.errors))
            if errors:
                bar.set_postfix(errors=len(errors), refresh=False)
    errors.sort(key=lambda error: error["id"])
    if len(errors) == len(inputs):
        raise RuntimeError(f"None of the {len(inputs)} images gave features:{_first(errors)}")


def _first(errors: list[dict[str, Any]], count: int = 3) -> str:
    lines = [f"\n  {error['path']}: {error['reason']}" for error in errors[:count]]
    return "".join(lines) + ("\n  ..." if len(errors) > count else "")


def _gather(
    rows: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    errors: list[dict[str, Any]],
    inputs: Inputs,
    meta: dict[str, Any],
) -> Features:
    all_ids, all_labels, values, count = [], [], None, 0
    for ids, labels, batch_values in rows:
        if values is None:  # all at once, since joining batches at the end would need twice the memory
            values = np.empty((len(inputs), batch_values.shape[1]), batch_values.dtype)
        values[count : count + len(ids)] = batch_values
        count += len(ids)
        all_ids += ids.tolist()
        all_labels += labels.tolist()
    assert count + len(errors) == len(inputs)
    labels = None if set(all_labels) == {NO_LABEL} else all_labels
    paths = [inputs.paths[i] for i in all_ids]
    return Features(values[:count], all_ids, paths, labels, inputs.classes, errors, meta)


def _own_transform(model: nn.Module, *, needed: bool) -> Callable[[Image.Image], torch.Tensor] | None:
    if getattr(model, "pretrained_cfg", None):
        return model_transform(model)
    if needed:
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg, which states its preprocessing. "
            "Give transform=..., from a PIL image to a float tensor (C, H, W)."
        )
    return None


def _text(transform: Callable[[Image.Image], torch.Tensor] | None) -> str:
    return getattr(transform, "__qualname__", str(transform))  # str of a function holds its address


def _versions() -> dict[str, str]:
    return {
        "mocohub": mocohub.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }
