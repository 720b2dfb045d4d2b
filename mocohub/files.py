"""Folders that are complete or absent, and the checksums that prove what is in them.

Checkpoints, exported models and feature folders are all written the same way: into a hidden sibling
folder, flushed to disk, then renamed. A reader never sees half of one, whenever the writer dies.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: str | Path, record: str, file: str) -> str | None:
    """Say why `file` cannot be trusted, None if it can: its SHA-256 must be what the JSON `record` states."""
    try:
        expected = read_json(Path(folder, record))["sha256"][file]
        actual = sha256(Path(folder, file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if actual == expected else f"{file} has SHA-256 {actual}, {record} says {expected}"


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON; non-finite numbers are an error (they are not JSON)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        ValueError: If the file is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def refuse_existing(path: str | Path, remedy: str = "Choose another --out, or remove it first.") -> Path:
    """Return `path` if nothing is there yet (an empty folder counts as nothing).

    Raises:
        FileExistsError: If a file or a folder with content is there; nothing is ever overwritten.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"'{path}' already exists. {remedy}")
    return path


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends without an error.

    Files are flushed to disk, made readable under the process's umask (safetensors writes mode 0600) and
    the folder is renamed in one step; after an error nothing is left behind.

    Args:
        path: Where the folder shall stand; nothing, or an empty folder, may be there.
    """
    path = refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
            _flush(file)
        _flush(temporary)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
