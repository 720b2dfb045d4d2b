"""Folders that are complete or absent, and the checksums that prove what is in them.

Checkpoints, exported models and feature folders are all written the same way: into a hidden sibling
folder, flushed to disk, then renamed. A reader never sees half of one, whenever the writer dies.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_CHECKSUMS = "SHA256SUMS"
_REMEDY_OF = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there and repeat the command."),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG),
        "Choose another --out, or make that a folder one may write to.",
    ),
}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    _refuse_pipe(path)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def git_sha1(content: bytes) -> str:
    """SHA-1 under which Git, and so the Hub, stores a small file of this content: 40 hexadecimal digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def write_checksums(folder: str | Path) -> None:
    """Write SHA256SUMS of the files in `folder`, which `sha256sum --check SHA256SUMS` can verify."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(Path(folder).iterdir())]
    Path(folder, _CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: str | Path, record: str, file: str) -> str | None:
    """Say why `file` cannot be trusted, None if it can: its SHA-256 must be what the JSON `record` states.

    In a folder with SHA256SUMS, `record` itself and that file are verified too, to the last byte.
    """
    try:
        expected = read_json(Path(folder, record))["sha256"][file]
        actual = sha256(Path(folder, file))
        if actual != expected:
            return f"{file} has SHA-256 {actual}, {record} says {expected}"
        if Path(folder, _CHECKSUMS).is_file():
            digests = {file: actual, record: sha256(Path(folder, record))}
            lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
            if Path(folder, _CHECKSUMS).read_bytes() != "".join(lines).encode():
                return f"{record} is not the file whose SHA-256 is in {_CHECKSUMS}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _refuse_pipe(path: str | Path) -> None:
    """Refuse what would be waited for: to open a pipe takes somebody at its other end."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is no regular file.")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON; non-finite numbers are an error (they are not JSON).

    Names of files that are not UTF-8, whose odd bytes Python holds as surrogates, come back as they were.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # \udce9 is JSON as well


def replace_file(path: str | Path, text: str) -> None:
    """Write a text file that a reader sees whole, as it was or as it is."""
    partial = _partial(Path(path))
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        ValueError: If the file is not JSON; the message names it.
    """
    _refuse_pipe(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested or numbers too long
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
def writing(path: str | Path) -> Iterator[None]:
    """Have errors of the disk or of access say which output it was, and what to do.

    Raises:
        OSError: Of the same errno and kind.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDY_OF:
            raise
        reason = f"{os.strerror(error.errno)}: '{path}' cannot be written. {_REMEDY_OF[error.errno]}"
        raise type(error)(error.errno, reason) from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends without an error.

    Files are flushed to disk, made readable under the process's umask (safetensors writes mode 0600) and
    the folder is renamed in one step; after an error nothing is left behind. A process that is killed leaves
    a hidden folder beside `path` that ends in .partial.

    Args:
        path: Where the folder shall stand; nothing, or an empty folder, may be there.
    """
    path = refuse_existing(path)
    temporary = _partial(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    readable = temporary.stat().st_mode & 0o666  # what the umask left; to ask for it would change it
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(readable)
            flush(file)
        flush(temporary)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Remove a folder, if there is one, so that no reader ever sees half of it; a failure is only logged."""
    doomed = _partial(Path(path))
    try:
        Path(path).rename(doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("'%s' cannot be removed: %s", path, error)


def _partial(path: Path) -> Path:
    """A new name beside `path` that readers pass over."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def publish(temporary: Path, target: Path, *, keep: bool = False) -> bool:
    """Give a complete file its name in one step; return False if something has that name."""
    flush(temporary)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links: the same but for a race between two equal files
        if target.exists():
            return False
        temporary.replace(target)
    finally:
        if not keep:
            temporary.unlink(missing_ok=True)
    flush(target.parent)
    return True


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder as far as its file system does that, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # several network file systems refuse folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
