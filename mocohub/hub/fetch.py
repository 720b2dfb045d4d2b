"""Files of repositories on the Hub, in the cache of its client: of one commit, proved right, fetched once.

That client checks only the length of what it downloads. Here every file must have the hash under which the
Hub stores it, and the one its manifest states; what has another is removed, fetched once more, and refused.

Processes that want one file at the same time wait for one of them at a file lock. This also serves torchrun,
with or without a process group: one process on each node downloads, and the others find the file. Where locks
lie (some network file systems) each downloads its own copy, and the last rename wins: the same bytes.
"""

import functools
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, filter_repo_objects, get_session, httpx

import mocohub
from mocohub.files import git_sha1
from mocohub.hub.verified import sha256_once, stated_sha256
from mocohub.hub.web import PATIENCE_S, TIMEOUT_S, patiently

_LOG = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "mocohub.json", "model.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ABANDONED_S = 600.0  # nobody downloads who has written nothing for so long
_CLIENT = {"library_name": "mocohub", "library_version": mocohub.__version__}


def snapshot(
    repository: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    patterns: Iterable[str] = MODEL_FILES,
) -> Path:
    """Return a folder of the Hub's cache with files of one commit, each verified.

    The Hub is asked once which commit a revision is. It is asked nothing if `revision` is a full commit and
    `patterns` are plain names that are in the cache. If it does not answer, and the cache knows which commit
    the revision was, that one is returned, with a warning.

    Args:
        repository: org/name.
        revision: Branch, tag or full commit; the default branch if None.
        offline: Whether to use the cache only, as the environment variable HF_HUB_OFFLINE=1 does.
        patterns: Names, or patterns such as "training-state/*", of the files wanted; what the repository does
            not have is not in the folder.

    Raises:
        FileNotFoundError: If there is no such repository, or offline and nothing of it is in the cache.
        ValueError: If there is no such revision.
        PermissionError: If the Hub refuses the files (private, or terms to accept).
        ConnectionError: If the Hub cannot be reached or goes on failing.
        RuntimeError: If a file has the wrong hash, twice. It is not kept.
    """
    patterns = list(patterns)
    if revision is not None and (".." in revision or revision.startswith("/")):
        raise ValueError(f"'{revision}' cannot be a revision. Give a branch, a tag, or a full commit.")
    home = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
    if offline or is_offline_mode():
        return _from_cache(home, repository, revision, patterns)
    if revision and _COMMIT.fullmatch(revision) and _is_complete(home, revision, patterns):
        folder = home / "snapshots" / revision
        if not _damages(folder, _present(folder, patterns)):
            return folder
    try:
        commit, names = _ask(repository, revision, patterns)
    except ConnectionError as error:
        try:
            folder = _from_cache(home, repository, revision, patterns)
        except FileNotFoundError:
            raise error from None
        _LOG.warning("%s Using commit %s from the cache.", error, folder.name)
        return folder
    folder = home / "snapshots" / commit
    if any(not (folder / name).is_file() for name in names) or _damages(folder, names):
        lock = home.parent / ".locks" / home.name / "mocohub.lock"  # where the client has its own
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            _sweep(home / "blobs", "*.incomplete")
            _fill(folder, repository, names)
    if revision != commit:
        _note(home / "refs" / (revision or "main"), commit)
    for name in set(patterns) - set(names):  # so that the next load of this commit need not ask
        if not _is_glob(name):
            _note(home / ".no_exist" / commit / name, "")
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; what a killed one left beside it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        _sweep(path.parent, ".*.partial")
        yield


def _ask(repository: str, revision: str | None, patterns: list[str]) -> tuple[str, list[str]]:
    """Return the commit that a revision is, and the names of its files that are wanted."""
    what = f"'{repository}'" + (f" at revision '{revision}'" if revision else "")
    ask = functools.partial(HfApi(**_CLIENT).model_info, repository, revision=revision, timeout=TIMEOUT_S)
    try:
        info = patiently(ask, constants.ENDPOINT, what)
        commit, files = _COMMIT.fullmatch(info.sha)[0], [file.rfilename for file in info.siblings]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConnectionError(
            f"{constants.ENDPOINT} did not answer as the Hub does when asked for {what}. Is a login page of "
            "the network between, or another server at HF_ENDPOINT?"
        ) from error
    names = list(filter_repo_objects(files, allow_patterns=patterns))
    for name in names:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise ValueError(f"{what} names a file outside of it: '{name}'. Nothing was fetched.")
    return commit, sorted(names, key=lambda name: name.endswith(".safetensors"))  # what is large last


def _from_cache(home: Path, repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Return what the cache has of a revision, without any request."""
    reference = home / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    folder = home / "snapshots" / commit
    if not (names := _present(folder, patterns)):
        raise FileNotFoundError(
            f"'{repository}' at revision '{revision or 'main'}' is not in the cache "
            f"'{constants.HF_HUB_CACHE}', and offline nothing is fetched. Omit offline, or run "
            f"`hf download {repository}` where there is a network."
        )
    for name, reason in _damages(folder, names).items():
        _drop(folder / name)
        raise RuntimeError(
            f"{name} of '{repository}' in the cache is damaged: it {reason}. It was removed. Load it once "
            "while there is a network."
        )
    return folder


def _fill(folder: Path, repository: str, names: list[str]) -> None:
    """Fetch what is missing or wrong; what is wrong twice is refused, and not kept."""
    for name in names:
        _fetch(repository, name, folder)
    if not (wrong := _damages(folder, names)):
        return
    for name, reason in wrong.items():
        _LOG.warning("%s of '%s' %s: fetching it again.", name, repository, reason)
        _drop(folder / name)
        _fetch(repository, name, folder, anew=True)
    wrong = _damages(folder, names)
    for name in wrong:
        _drop(folder / name)
    for name, reason in wrong.items():
        raise RuntimeError(
            f"{name} of '{repository}' arrived wrong twice from {constants.ENDPOINT}: it {reason}. It was "
            "not kept. Something on the way changes it, or the repository contradicts itself: tell its owner."
        )


def _fetch(repository: str, name: str, folder: Path, *, anew: bool = False) -> None:
    if (folder / name).is_file():
        return

    def attempt() -> None:
        # Asked first because it fails at once where the same question of the next line may take minutes.
        url = hf_hub_url(repository, name, revision=folder.name)
        get_hf_file_metadata(url, timeout=TIMEOUT_S, **_CLIENT)
        with _no_long_waits():
            hf_hub_download(repository, name, revision=folder.name, force_download=anew, **_CLIENT)

    patiently(attempt, constants.ENDPOINT, f"{name} of '{repository}'")


@contextmanager
def _no_long_waits() -> Iterator[None]:
    """Let an answer that asks for a long wait raise: the client would sleep that long."""

    def refuse(response: httpx.Response) -> None:
        asked = response.headers.get("Retry-After", "")
        if response.is_error and asked.isdigit() and float(asked) > PATIENCE_S:
            response.raise_for_status()

    hooks = get_session().event_hooks["response"]
    hooks.append(refuse)
    try:
        yield
    finally:
        hooks.remove(refuse)


def _damages(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Which files are not what the Hub's name for them and the manifest state, and how each is wrong."""
    names = list(names)
    wrong = {name: reason for name in names if (reason := _blob_damage(folder / name))}
    if "mocohub.json" in names and "mocohub.json" not in wrong:
        for name, expected in stated_sha256(folder).items():
            if name in names and name not in wrong and (found := sha256_once(folder / name)) != expected:
                wrong[name] = f"has SHA-256 {found}, mocohub.json says {expected}"
    return wrong


def _blob_damage(file: Path) -> str | None:
    """Compare with the hash that names the stored file: SHA-256 if it is large, else Git's SHA-1."""
    stated = os.path.basename(os.readlink(file)) if file.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", stated):
        found = sha256_once(file)
        return None if found == stated else f"has SHA-256 {found}, the Hub says {stated}"
    if _COMMIT.fullmatch(stated):
        found = git_sha1(file.read_bytes())
        return None if found == stated else f"has Git's SHA-1 {found}, the Hub says {stated}"
    return None  # a system without symbolic links: the manifest must do


def _present(folder: Path, patterns: list[str]) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return list(filter_repo_objects(names, allow_patterns=patterns))


def _is_complete(home: Path, commit: str, patterns: list[str]) -> bool:
    """Whether each name is in the cache or known not to be in the repository."""
    places = (home / "snapshots" / commit, home / ".no_exist" / commit)
    return all(not _is_glob(p) and any((place / p).is_file() for place in places) for p in patterns)


def _is_glob(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")


def _drop(file: Path) -> None:
    if file.is_symlink():
        (file.parent / os.readlink(file)).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _note(file: Path, text: str) -> None:
    """Write a note of the Hub's cache, as its client does; a cache that cannot be written is no error."""
    if file.is_file() and file.read_text() == text:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
        temporary.write_text(text)
        temporary.replace(file)
    except OSError as error:
        _LOG.debug("'%s' is not kept: %s", file, error)


def _sweep(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders that a killed process left."""
    for path in folder.glob(pattern):
        try:
            touched = max(p.stat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - touched > _ABANDONED_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            pass  # its process ended, or another one swept
