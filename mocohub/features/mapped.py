"""An array on disk instead of in memory, in a file without a name, which goes with whoever uses it."""

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np


def mapped(blocks: Iterable[np.ndarray], shape: tuple[int, int], dtype: np.dtype, folder: Path) -> np.ndarray:
    """Write blocks of rows (n, D) one after the other and return them as one memory-mapped array (N, D).

    Args:
        blocks: Together N rows.
        shape: (N, D).
        dtype: Of the blocks.
        folder: Where the file goes, if one may write there and it fits; else into the folder for temporary
            files (TMPDIR). It has no name, so it goes with the array, or the process, however that ends.

    Raises:
        RuntimeError: If it fits into neither.
    """
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if num_bytes == 0:
        return np.empty(shape, dtype)
    file = _open(num_bytes, folder)
    try:
        for block in blocks:
            file.write(np.ascontiguousarray(block))
        file.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(num_bytes, [folder]) from error
        raise
    # By this name other processes of the machine, such as joblib's, can open it.
    name = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    values = np.memmap(name if os.path.exists(name) else file, dtype, "c", shape=shape)
    weakref.finalize(values, file.close)
    return values


def _open(num_bytes: int, folder: Path) -> BinaryIO:
    places = [folder, Path(tempfile.gettempdir())]
    for place in places:
        if shutil.disk_usage(place).free > num_bytes:
            try:
                return tempfile.TemporaryFile(dir=place)
            except OSError:  # not to be written to
                pass
    raise _no_room(num_bytes, places)


def _no_room(num_bytes: int, places: list[Path]) -> RuntimeError:
    free = ", ".join(f"{shutil.disk_usage(place).free / 1e9:.1f} GB free in '{place}'" for place in places)
    return RuntimeError(
        f"These features need {num_bytes / 1e9:.1f} GB on disk to be one array, but there are {free}. "
        "Free some, set TMPDIR to a folder with room, or use blocks(), which needs no copy."
    )
