"""Where each image of a list of tars lies, so that it is read alone and in place, from a disk or by a URL."""

import os
import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from mocohub.images import SUFFIXES
from mocohub.tars import (
    ForwardFile,
    TarError,
    bare,
    filesystem,
    is_url,
    member_path,
    members,
    read_class,
    sample_key,
)

_RETRY_AFTER_S = (0.5, 2.0, 8.0)


class TarMembers(NamedTuple):
    """Where each image of a list of tar shards lies: N images, 20 bytes each."""

    shards: list[str]  # absolute paths, or URLs that fsspec can open
    shard_ids: array  # (N,) positions in `shards`
    offsets: array  # (N,) bytes from the start of the shard
    sizes: array  # (N,) bytes

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image `i`.

        Raises:
            OSError: If its tar is missing, has become shorter or cannot be read.
        """
        shard, offset, size = self.shards[self.shard_ids[i]], self.offsets[i], self.sizes[i]
        if is_url(shard):
            data = _read_url(shard, offset, size)
        else:
            with open(shard, "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        if len(data) < size:
            raise OSError(f"tar shard '{bare(shard)}' has become shorter since it was listed")
        return data

    def subset(self, ids: Sequence[int]) -> "TarMembers":
        """Return where the images of these ids lie, in this order."""
        return TarMembers(self.shards, *(array(c.typecode, (c[i] for i in ids)) for c in self[1:]))


def index_tars(source: str, shards: list[str]) -> tuple[list[str], list[str | None], TarMembers]:
    """Read all headers of some tars.

    Args:
        source: What they are, for messages.
        shards: Paths and URLs.

    Returns:
        Of each image its path, "<shard file name>/<member name>"; the text of its sample's `.cls` file, None
        if there is none; and where it lies.

    Raises:
        FileNotFoundError: If a tar does not exist.
        ValueError: If one is compressed, cut or damaged, two have one file name, or there is no image.
        OSError: If one cannot be read.
    """
    places = [shard if is_url(shard) else os.path.abspath(shard) for shard in shards]
    found = TarMembers(places, array("I"), array("Q"), array("Q"))
    paths, texts = [], []
    shard_names = [os.path.basename(bare(shard)) for shard in shards]
    if len(set(shard_names)) < len(shards):
        twice = next(name for name in shard_names if shard_names.count(name) > 1)
        raise ValueError(
            f"{source}: two shards are called '{twice}'. Rename one: file names identify images."
        )
    for shard_id, (shard, shard_name) in enumerate(zip(shards, shard_names, strict=True)):
        images, class_of_key = _scan_tar(shard)
        for path, offset, size in images:
            found.shard_ids.append(shard_id)
            found.offsets.append(offset)
            found.sizes.append(size)
            paths.append(f"{shard_name}/{path}")
            texts.append(class_of_key.get(sample_key(path)))
    if not paths:
        raise ValueError(f"No images in {source} (looked for members with {', '.join(SUFFIXES)}).")
    return paths, texts, found


def _scan_tar(shard: str) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """Return (path, offset, size) of the images in one tar, and the texts of its `.cls` members by key."""
    images, class_of_key = [], {}
    num_files = 0
    with ForwardFile(shard) as file:
        try:
            for name, size in members(file):
                num_files += 1
                path = member_path(name)
                if path is None:
                    continue
                if path.lower().endswith(SUFFIXES):
                    images.append((path, file.position, size))
                elif path.endswith(".cls"):
                    if text := read_class(file, size):
                        class_of_key[sample_key(path)] = text
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Tar shard '{bare(shard)}' does not exist. Correct the list or the URL."
            ) from error
        except (TarError, UnicodeDecodeError) as error:
            raise ValueError(
                f"Tar shard '{bare(shard)}' cannot be read beyond byte {file.position}, "
                f"after {num_files} files: {error}. Copy it or make it again."
            ) from error
    return images, class_of_key


def _read_url(url: str, offset: int, size: int) -> bytes:
    """Read a part of a file behind a URL; what may have been the network's fault is tried again."""
    files, path = filesystem(url)
    for wait_s in (*_RETRY_AFTER_S, None):
        try:
            return files.cat_file(path, start=offset, end=offset + size)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each kind of storage has its own
            if wait_s is None:
                reason = f"{type(error).__name__}: {error}".replace(url, bare(url))
                raise OSError(f"'{bare(url)}' at byte {offset}: {reason}") from error
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")
