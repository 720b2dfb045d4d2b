"""What tells images of a program from others: a hash of their contents, as far as that is cheap."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile

_PIECE_BYTES = 512
_NUM_PIECES = 8  # of each image that is hashed; all of one that is no longer than that
_NUM_ITEMS = 4  # of a Dataset, whose items may be slow to come by


def contents_sha256(images: Any, *, in_memory: bool) -> str | None:
    """SHA-256 of samples from all images in memory, or from four items of a Dataset.

    A change of a few pixels of a large image may escape it. None for a Dataset that gives another item at
    each reading.
    """
    if in_memory:
        return _sha256(images)
    last = len(images) - 1
    places = sorted({last * i // (_NUM_ITEMS - 1) for i in range(_NUM_ITEMS)})
    first, second = (_sha256(_item(images, i) for i in places) for _ in range(2))
    return first if first == second else None


def _item(images: Any, i: int) -> Any:
    try:
        return images[i]
    except Exception as error:  # it will be an error of its own
        return type(error).__name__


def _sha256(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        for part in item if isinstance(item, tuple | list) else [item]:
            try:
                kind, data = _kind_and_bytes(part)
            except Exception as error:  # of no pixels, of a file that is cut
                kind, data = f"{type(part).__name__} {type(error).__name__}", b""
            digest.update(f"{kind} {len(data)}\0".encode("utf-8", "backslashreplace"))
            step = max(_PIECE_BYTES, len(data) // _NUM_PIECES)
            for start in range(0, len(data), step):
                digest.update(data[start : start + _PIECE_BYTES])
    return digest.hexdigest()


def _kind_and_bytes(item: Any) -> tuple[str, bytes | memoryview]:
    if isinstance(item, ImageFile.ImageFile) and getattr(item, "filename", ""):  # may not be loaded yet
        return f"{item.filename.rpartition('/')[2]} {item.mode} {item.size}", b""
    if isinstance(item, Image.Image):
        few_rows = item.width, min(item.height, _NUM_PIECES)
        return f"{item.mode} {item.size}", item.resize(few_rows, Image.Resampling.NEAREST).tobytes()
    if isinstance(item, torch.Tensor):
        plain = item.detach().cpu().contiguous()
        return f"{plain.dtype} {tuple(plain.shape)}", plain.reshape(-1).view(torch.uint8).numpy().data
    if isinstance(item, np.ndarray) and not item.dtype.hasobject:
        return f"{item.dtype} {item.shape}", np.ascontiguousarray(item).reshape(-1).view(np.uint8).data
    return str(item) if isinstance(item, int | str | np.generic) else type(item).__name__, b""
