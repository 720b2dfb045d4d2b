"""SHA-256 of files, computed again only when a file has changed, and what a model folder's manifest states.

To hash the weights takes longer than to load them. So a computed hash is noted, with all by which the system
shows that a file was touched, in one small file of the cache.
"""

import logging
import os
import secrets
import time
from pathlib import Path

from mocohub.files import read_json, sha256, write_json

_LOG = logging.getLogger(__name__)
_SMALL_BYTES = 1 << 16  # not worth a note
_TICK_S = 0.02  # what is touched twice within a tick of the system's coarse clock shows one time for both


def cache_folder() -> Path:
    """Return where this package keeps what it computed: MOCOHUB_CACHE, else `mocohub` in the user's cache."""
    if chosen := os.environ.get("MOCOHUB_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mocohub"


def sha256_once(path: str | Path) -> str:
    """Return a file's SHA-256, from the notes if the file is the one that was hashed before.

    It is the same file while path, size, inode and the times of its last change of content and of its entry
    are the same. A cache that cannot be written costs time only.
    """
    path = os.path.realpath(path)
    stamp = _stamp(path)
    if stamp[0] < _SMALL_BYTES:
        return sha256(path)
    if (note := _notes().get(path)) and note[1:] == stamp:
        return note[0]
    if time.time() - max(stamp[1], stamp[2]) / 1e9 < _TICK_S:
        time.sleep(_TICK_S)
        stamp = _stamp(path)
    digest = sha256(path)
    if _stamp(path) == stamp:
        # Another process may write its own notes at this moment: one of the two is lost, and hashes again.
        kept = {name: note for name, note in _notes().items() if os.path.exists(name)}
        _write_notes({**kept, path: [digest, *stamp]})
    return digest


def stated_sha256(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a model folder's mocohub.json states, {} if there is none.

    Raises:
        ValueError: If there is one, and it states no SHA-256 of the weights.
    """
    manifest = Path(folder, "mocohub.json")
    if not manifest.is_file():
        return {}
    content = read_json(manifest)
    stated = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(stated, dict) or not isinstance(stated.get("model.safetensors"), str):
        raise ValueError(
            f"'{manifest}' does not state the SHA-256 of model.safetensors. Export or fetch it again."
        )
    return stated


def _stamp(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _notes() -> dict[str, list]:
    try:
        notes = read_json(cache_folder() / "verified.json")
        return {name: note for name, note in notes.items() if isinstance(note[0], str)}
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return {}  # absent, or not what we write: then hashes are computed again


def _write_notes(notes: dict[str, list]) -> None:
    file = cache_folder() / "verified.json"
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(temporary, notes)
        temporary.replace(file)
    except OSError as error:
        _LOG.debug("Hashes are not kept: %s", error)
