"""Tar shards to stream from: what a training on a billion images reads.

Only the names of the shards are listed, never their images (`mocohub.list_images` indexes local shards
instead). A shard is a plain tar in webdataset's layout, on a local disk or behind any URL that fsspec knows.
Its images are its regular files that are named as images: the ones `list_images` finds, in the same order.
A class may stand beside an image, in the `.cls` file of its sample.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mocohub.shard_reader import IDS_PER_SHARD, ShardImage, read_shard
from mocohub.sources import walk
from mocohub.tars import bare, filesystem, is_url

_ACCEPTED = (
    "a folder of .tar files, a .tar file or URL, a pattern such as 'shards-{00000..00099}.tar' or "
    "'s3://bucket/*.tar', a .txt file with one of these on each line, or a Python list of them"
)


@dataclass(frozen=True, eq=False)
class Shards:
    """Tar shards in a fixed order, not yet opened.

    An image's id is the position of its shard x 2**24 + its position among the images of the shard.

    Attributes:
        source: What was listed, for reports.
        urls: Absolute paths and URLs.
        names: The path of each shard below the folder that all share, which stays the same wherever they are.
        num_images: In all shards, None if unknown.
        labels: None: streams have no labels.
        classes: None likewise.
    """

    source: str
    urls: list[str] = field(repr=False)
    names: list[str] = field(repr=False)
    num_images: int | None = None
    labels: None = None
    classes: None = None

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.urls)

    def path(self, image_id: int) -> str:
        """Return "<name of the shard>#<position in it>" of an image."""
        shard, index = divmod(image_id, IDS_PER_SHARD)
        return f"{self.names[shard]}#{index}"

    def prefixes(self) -> list[str]:
        """Return what the paths of images begin with: the shards' file names, `names` if two are the same."""
        names = [name.encode("utf-8", "backslashreplace").decode() for name in self.names]
        files = [name.rpartition("/")[2] for name in names]
        return files if len(set(files)) == len(files) else names

    def fingerprint(self) -> str:
        """SHA-256 of all names in order (UTF-8, each closed by a zero byte), as 64 hexadecimal digits."""
        return hashlib.sha256(
            "".join(f"{name}\0" for name in self.names).encode("utf-8", "surrogateescape")
        ).hexdigest()

    def first_images(self, num_shards: int) -> Iterator[ShardImage]:
        """Yield the first image of some shards, spread over the list, to see whether they open and decode.

        Raises:
            ShardError: If one cannot be opened, is no tar or holds no image.
            ImportError: If URLs are listed and fsspec, or what it needs for them, is not installed.
        """
        for shard in sorted({i * len(self) // num_shards for i in range(num_shards)}):
            images = read_shard(self.urls[shard])
            yield next(images)
            images.close()


def find_shards(source: Any) -> Shards | None:
    """List what is tar shards without doubt, None if it is something else or a single local tar.

    That is a URL, a pattern or a .txt list of tars, a folder of tars without any image, or a Python list of
    several tars or of URLs.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `list_shards`.
    """
    if isinstance(source, list | tuple):
        paths = [os.fspath(entry) for entry in source if isinstance(entry, str | os.PathLike)]
        are_tars = len(paths) == len(source) and all(map(_is_tar, paths))
        is_local = len(paths) == 1 and os.path.isfile(paths[0])
        return list_shards(paths) if paths and are_tars and not is_local else None
    if not isinstance(source, str | os.PathLike):
        return None
    text = os.fspath(source)
    if os.path.isdir(text):
        tars = []
        for path in walk(text):
            if not _is_tar(path):
                return None
            tars.append(path)
        return _in_folder(text, tars) if tars else None
    if os.path.isfile(text):
        is_list = text.lower().endswith(".txt") and _is_tar(_first_line(text))
    else:
        is_list = is_url(text) or (_is_tar(text) and (glob.has_magic(text) or expand_braces(text) != [text]))
    return list_shards(text) if is_list else None


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return next((line.strip() for line in file if line.strip()), "")


def _is_tar(path: str) -> bool:
    return bare(path).lower().endswith(".tar")


def list_shards(source: str | Path | Sequence[str | Path], *, num_images: int | None = None) -> Shards:
    """List tar shards without opening them.

    - A folder: all .tar files in it and below, in the code-point order of their relative paths. Hidden files
      and folders (.name) are passed over.
    - A .tar file, or the URL of one (s3, gs, hf, https with range requests: whatever fsspec can open).
    - A pattern of paths or URLs: with braces ({00000..00099}, {a,b}) in the order it spells, with * and [...]
      in code-point order.
    - A .txt file with one path, URL or pattern on each line; relative paths start at its folder.
    - A Python list of paths, URLs and patterns.

    Compressed tars are refused: images hardly shrink by it, and nobody could start in the middle of one.

    Args:
        source: One of the above.
        num_images: In all shards, which gives an epoch its length. By default the sum of webdataset's
            `sizes.json` beside local shards, if that lists them all; else unknown.

    Raises:
        FileNotFoundError: If local shards do not exist.
        ValueError: If there is no shard, another kind of file, or a shard twice.
        ImportError: If a pattern of URLs is to be listed and fsspec is not installed.
    """
    if not isinstance(source, str | os.PathLike):
        urls = [url for entry in source for url in _expand(os.fspath(entry), os.getcwd())]
        source = f"a list of {len(urls)} shards"
    elif os.path.isdir(source):
        paths = [path for path in walk(os.fspath(source)) if _is_tar(path)]
        return _in_folder(os.fspath(source), paths, num_images)
    elif os.path.isfile(source) and str(source).lower().endswith(".txt"):
        lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
        folder = os.path.dirname(os.path.abspath(source))
        urls = [url for line in lines if line.strip() for url in _expand(line.strip(), folder)]
    else:
        urls = _expand(os.fspath(source), os.getcwd())
    _check(bare(str(source)), urls)
    missing = [url for url in urls if not is_url(url) and not os.path.isfile(url)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(urls)} shards of '{source}' do not exist: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Correct the list or the pattern."
        )
    return _shards(bare(str(source)), urls, num_images)


def _in_folder(folder: str, paths: list[str], num_images: int | None = None) -> Shards:
    prefix = os.path.join(os.path.abspath(folder), "")
    urls = [prefix + path for path in sorted(paths)]
    _check(folder, urls)
    return _shards(folder, urls, num_images)


def _shards(source: str, urls: list[str], num_images: int | None) -> Shards:
    parts = [bare(url).split("/") for url in urls]
    num_shared = len(os.path.commonprefix([folders for *folders, _ in parts]))
    names = ["/".join(part[num_shared:]) for part in parts]
    return Shards(source, urls, names, _sum_of_sizes(urls) if num_images is None else num_images)


def _check(source: str, urls: list[str]) -> None:
    if not urls:
        raise ValueError(f"No .tar shards in '{source}'. Pass {_ACCEPTED}.")
    seen = set()
    for url in map(bare, urls):
        if not url.lower().endswith(".tar"):
            raise ValueError(
                f"'{url}' is no plain .tar file. Pass {_ACCEPTED}. Decompress .tar.gz and the like once "
                "(gzip -d, bzip2 -d, xz -d, zstd -d): images hardly shrink by it."
            )
        if url in seen:
            raise ValueError(f"Shard '{url}' is in '{source}' twice. Remove one of the two.")
        seen.add(url)


def _expand(pattern: str, folder: str) -> list[str]:
    """Return the URLs and absolute paths that one entry stands for; relative paths start at `folder`."""
    if not is_url(pattern) and os.path.isfile(os.path.join(folder, pattern)):
        return [os.path.join(folder, pattern)]  # whatever characters are in its name
    urls = []
    for url in expand_braces(pattern):
        if not is_url(url):
            path = os.path.normpath(os.path.join(folder, url))
            urls += sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        elif re.search(r"[*[]", url):
            files, path = filesystem(url)
            urls += sorted(files.unstrip_protocol(match) for match in files.glob(path))
        else:
            urls.append(url)
    return urls


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern with {first..last} and {one,other} stands for, as in bash and webdataset.

    >>> expand_braces("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if braces is None:
        return [pattern]
    first, last, words = braces.groups()
    if words is not None:
        choices = words.split(",")
    else:
        zeros = any(len(number) > 1 and number.startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if zeros else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    rests = expand_braces(pattern[braces.end() :])
    return [pattern[: braces.start()] + choice + rest for choice in choices for rest in rests]


def _sum_of_sizes(urls: list[str]) -> int | None:
    """Add up webdataset's sizes.json ({file name: number of samples}) beside local shards."""
    sizes_in = {}
    total = 0
    for folder, name in map(os.path.split, urls):
        if folder not in sizes_in:
            try:
                sizes_in[folder] = json.loads(Path(folder, "sizes.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return None
        size = sizes_in[folder].get(name) if isinstance(sizes_in[folder], dict) else None
        if not isinstance(size, int):
            return None
        total += size
    return total
