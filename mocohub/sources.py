"""Where images come from: folders, lists of paths and tar shards, each in one documented order.

An image's id is its position in the list, so one source always gives the same ids: folders in the code-point
order of their relative POSIX paths, lists in their own order, shards in name order with their members in
archive order. Nothing is dropped silently: a list that names missing files, a folder that cannot be read and
a tar that has been cut are errors before any work starts.
"""

import csv
import glob
import hashlib
import os
import re
import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from PIL.Image import Image

from mocohub.errors import unknown
from mocohub.images import MAX_PIXELS, ImageError, decode_image
from mocohub.tars import ForwardFile, TarError, bare, filesystem, is_url, members

# Folders and tars are searched for these suffixes, in any case; a list may name any file.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_LISTS = (".txt", ".csv", ".tsv", ".parquet")
_ACCEPTED = (
    "a folder of images or of .tar shards, a .tar file, a .txt, .csv, .tsv or .parquet list, "
    "a glob pattern, or a Python list of paths"
)
_SPLITS = {"train", "val", "test", "valid", "validation"}
_MAX_LABEL_BYTES = 1024
_RETRY_AFTER_S = (0.5, 2.0, 8.0)

Labels = Literal["auto", "folder", "none"]


class TarMembers(NamedTuple):
    """Where each image of a list of tar shards lies: N images, 20 bytes each."""

    shards: list[str]  # absolute paths, or URLs that fsspec can open
    shard_ids: array  # (N,) positions in `shards`
    offsets: array  # (N,) bytes from the start of the shard
    sizes: array  # (N,) bytes


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images in a fixed order, read one at a time.

    No file stays open between two reads, so a list can be pickled to worker processes, forked and used from
    several threads. (Opening a shard for each read costs 3 microseconds on a local disk, against 90 for
    decoding a 32 px JPEG.)

    Attributes:
        source: What was listed, for reports.
        paths: POSIX path of each image, relative to `root` unless a list gives absolute ones; "<shard file
            name>/<member name>" in tar shards.
        labels: For each image the position of its class in `classes`, None where the source gives none; None
            instead of the list if there are no labels at all.
        classes: Class names, or None with `labels`.
        root: Absolute path of the folder where relative `paths` start.
        members: Where the images of tar shards lie.
    """

    source: str
    paths: list[str] = field(repr=False)
    labels: list[int | None] | None = field(repr=False)
    classes: list[str] | None
    root: str
    members: TarMembers | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    @property
    def num_images(self) -> int:
        """Their number, by the name it has for `Shards` too."""
        return len(self.paths)

    def path(self, i: int) -> str:
        """Return the path of image `i`."""
        return self.paths[i]

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image `i`.

        Raises:
            OSError: If the file is missing or cannot be read in full.
        """
        if self.members is None:
            return Path(self.root, self.paths[i]).read_bytes()
        shards, shard_ids, offsets, sizes = self.members
        shard, offset, size = shards[shard_ids[i]], offsets[i], sizes[i]
        if is_url(shard):
            data = _read_url(shard, offset, size)
        else:
            with open(shard, "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        if len(data) < size:
            raise OSError(f"tar shard '{bare(shard)}' has become shorter since it was listed")
        return data

    def decode(self, i: int, *, max_pixels: int = MAX_PIXELS) -> Image:
        """Return image `i` as upright 8-bit RGB (see `mocohub.images.decode_image`).

        Raises:
            ImageError: For anything that is wrong with this image, a missing file included.
        """
        return decode_image(self.encoded(i), max_pixels=max_pixels)

    def encoded(self, i: int) -> bytes | Path:
        """Return image `i` as `mocohub.images.open_image` takes it: its file, or its bytes from a tar shard.

        Raises:
            ImageError: If the shard cannot be read.
        """
        if self.members is None:
            return Path(self.root, self.paths[i])
        try:
            return self.read(i)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def subset(self, ids: Sequence[int]) -> "ImageList":
        """Return the images of these ids, in this order; the classes stay. Their ids count from 0 again."""
        members = self.members
        if members is not None:
            columns = (array(c.typecode, (c[i] for i in ids)) for c in members[1:])
            members = TarMembers(members.shards, *columns)
        return replace(
            self,
            paths=[self.paths[i] for i in ids],
            labels=None if self.labels is None else [self.labels[i] for i in ids],
            members=members,
        )

    def fingerprint(self) -> str:
        """SHA-256 of all paths in order (UTF-8, each closed by a zero byte), as 64 hexadecimal digits."""
        return hashlib.sha256("".join(f"{path}\0" for path in self.paths).encode()).hexdigest()


def list_images(
    source: str | Path | Sequence[str | Path], *, labels: Labels = "auto", check: bool = True
) -> ImageList:
    """List the images of a folder, a list of paths or tar shards, with their labels if there are any.

    - A folder: all images below it, in the code-point order of their relative paths. Hidden files and folders
      (.name) are passed over, symbolic links followed. If there is no image but there are .tar files, those.
    - A .tar file, or several (by folder, glob pattern or Python list): all members that are regular files and
      named as images. They are read in place, never extracted. A Python list of tars keeps its order.
      They may be URLs that fsspec knows, in a Python list or one alone: listing reads such a shard once from
      front to back, and each image is one range request afterwards.
    - A list file: .txt with one path a line, optionally a tab and a label; .csv or .tsv with the names of the
      columns in its first line, `path` and optionally `label` among them; .parquet with these columns, the
      labels being strings or integers. Relative paths start at its folder.
    - A Python list of paths, a glob pattern that matches images (in code-point order), or one image.

    A path that a list names twice is listed twice, so that every row of a list has its row in the features.

    Args:
        source: One of the above.
        labels: "auto" takes labels from the list file or, in tar shards, from webdataset's `.cls` files. In
            folders and other shards the first-level sub-folders are the classes if all images lie below at
            least two of them, as in torchvision's ImageFolder. "folder" demands that, whatever the source;
            "none" gives no labels.
        check: Whether every file that a list names must exist. With False a missing file becomes an
            `ImageError` when it is decoded.

    Returns:
        The list. Classes are in code-point order; labels of a list file or of `.cls` files that are all
        integers are in numeric order.

    Raises:
        FileNotFoundError: If the source, or a file it lists, does not exist.
        ValueError: If the source is none of the above, holds no image or is not well-formed; if a shard is
            compressed, truncated or damaged; if "auto" finds train, val and test in the place of classes.
        OSError: If a folder, list or shard cannot be read.
    """
    if labels not in ("auto", "folder", "none"):
        raise unknown("labels", labels, ["auto", "folder", "none"])
    if not isinstance(source, str | os.PathLike):
        paths = _as_paths(source)
        images = _list_paths(f"a list of {len(paths)} paths", paths, labels, check)
    elif is_url(str(source)):
        images = _list_paths(bare(str(source)), [str(source)], labels, check)
    elif os.path.isdir(source):
        images = _list_folder(str(source), labels)
    elif os.path.isfile(source) and str(source).lower().endswith(_ARCHIVES):
        images = _list_tars(str(source), [str(source)], labels)
    elif os.path.isfile(source) and str(source).lower().endswith(_LISTS):
        images = _list_file(str(source), labels, check)
    elif os.path.isfile(source) and str(source).lower().endswith(SUFFIXES):
        images = _list_paths(str(source), [str(source)], labels, check)
    elif os.path.exists(source):
        raise ValueError(f"'{source}' is no source of images. Pass {_ACCEPTED}.")
    elif glob.has_magic(str(source)):
        matches = sorted(glob.glob(str(source), recursive=True))
        paths = [path for path in matches if path.lower().endswith(SUFFIXES + _ARCHIVES)]
        images = _list_paths(str(source), paths, labels, check)
    else:
        raise FileNotFoundError(f"'{source}' does not exist. Pass {_ACCEPTED}.")
    for path in images.paths:
        try:
            path.encode()
        except UnicodeEncodeError:  # it would fail when the results are written, after all the work
            raise ValueError(f"The name {path!r} in {images.source} is not UTF-8. Rename the file.") from None
    return images


def _as_paths(source: Any) -> list[str]:
    entries = iter(source) if isinstance(source, Iterable) else [source]
    paths = []
    for entry in entries:
        if not isinstance(entry, str | os.PathLike):
            kind = type(entry).__name__
            what = kind if entry is source else f"{type(source).__name__} of {kind}"
            raise ValueError(
                f"{what} is no source of images. Pass {_ACCEPTED}. mocohub.extract also takes a list of PIL "
                "images or of uint8 arrays (H, W, 3), and a torch Dataset of images or of (image, label)."
            )
        paths.append(os.fspath(entry))
    return paths


def _list_folder(folder: str, labels: Labels) -> ImageList:
    images, archives = [], []
    for path in walk(folder):
        (images if path.lower().endswith(SUFFIXES) else archives).append(path)
    if not images and archives:
        first_words = {re.match("[a-z]*", PurePath(path).name.lower())[0] for path in archives}
        if labels == "auto" and len(first_words) > 1 and first_words <= _SPLITS:  # train-00.tar, val-00.tar
            raise _splits_error(folder, archives)
        return _list_tars(folder, [os.path.join(folder, path) for path in sorted(archives)], labels)
    if not images:
        raise ValueError(f"No images in '{folder}' or below (looked for {', '.join(SUFFIXES)}).")
    images.sort()
    return ImageList(folder, images, *_folder_classes(folder, images, labels), os.path.abspath(folder))


def walk(folder: str) -> Iterator[str]:
    """Yield the relative POSIX paths of all images and archives below a folder, in no order."""
    known = SUFFIXES + _ARCHIVES
    to_visit = [(folder, "", frozenset())]
    while to_visit:
        folder, prefix, parents = to_visit.pop()
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in parents:
            raise ValueError(f"'{folder}' is a symbolic link to a folder that contains it. Remove the link.")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    to_visit.append((entry.path, f"{prefix}{entry.name}/", parents | {identity}))
                elif entry.name.lower().endswith(known) and (entry.is_file() or entry.is_symlink()):
                    yield prefix + entry.name  # a dangling link too: it will be reported, not left out


def _folder_classes(
    source: str, paths: list[str], labels: Labels
) -> tuple[list[int | None] | None, list[str] | None]:
    """Take the first folder of each path as its class, if `labels` wants that."""
    if labels == "none":
        return None, None
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]  # "" for absolute paths too
    names = set(folders)
    if labels == "folder" and "" in names:
        raise ValueError(
            f"labels='folder' needs every image of '{source}' in a sub-folder that names its class, "
            f"but '{paths[folders.index('')]}' is in none. Move it, or use labels='none'."
        )
    if labels == "auto":
        if {name.lower() for name in names} <= _SPLITS:
            raise _splits_error(source, names)
        if "" in names or len(names) < 2:
            return None, None
    return _index(folders, sorted(names))


def _splits_error(source: str, names: Collection[str]) -> ValueError:
    names = sorted(names)
    one = f"{source}/{names[0]}"
    remedy = f"Pass one of them, such as '{one}', or" if os.path.exists(one) else "Pass"
    return ValueError(
        f"'{source}' holds splits ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), not classes. "
        f"{remedy} mocohub.list_images(..., labels='none') to take all images unlabelled."
    )


def _named_classes(names: list[str | None]) -> tuple[list[int | None] | None, list[str] | None]:
    """Turn label texts, None where there is none, into class positions and class names."""
    classes = {name for name in names if name is not None}
    if not classes:
        return None, None
    try:
        return _index(names, sorted(classes, key=lambda name: (int(name), name)))
    except ValueError:  # not all are integers
        return _index(names, sorted(classes))


def _index(names: Sequence[str | None], classes: list[str]) -> tuple[list[int | None], list[str]]:
    position = {name: i for i, name in enumerate(classes)}
    return [position.get(name) for name in names], classes


def _list_paths(source: str, paths: list[str], labels: Labels, check: bool) -> ImageList:
    """List a Python list: either tar shards or images."""
    archives = [path for path in paths if bare(path).lower().endswith(_ARCHIVES)]
    others = {path for path in paths if is_url(path)}.difference(archives)
    if others:
        raise ValueError(
            f"'{bare(min(others))}' is no .tar file. Behind URLs images are read from tar shards only: "
            "put them in one, or download them."
        )
    if not paths:
        raise ValueError(f"No images in {source}. Pass {_ACCEPTED}.")
    if len(archives) == len(paths):
        return _list_tars(source, archives, labels)
    if archives:
        raise ValueError(
            f"{source} mixes {len(archives)} tar shards with {len(paths) - len(archives)} other files. "
            "List them separately."
        )
    return _list_files(source, paths, [None] * len(paths), os.getcwd(), labels, check)


def _list_file(source: str, labels: Labels, check: bool) -> ImageList:
    """List a .txt, .csv, .tsv or .parquet file."""
    paths, names = [], []
    is_parquet = source.lower().endswith(".parquet")
    try:
        with nullcontext() if is_parquet else open(source, encoding="utf-8-sig", newline="") as file:
            for path, name in _parquet_rows(source) if is_parquet else _rows(source, file):
                if not path:
                    raise ValueError(f"'{source}' has a row without a path: row {len(paths) + 1}.")
                paths.append(path)
                names.append(name or None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"'{source}' cannot be read as a list of paths, it must be UTF-8 text: {error}"
        ) from error
    if not paths:
        raise ValueError(f"No images in '{source}': the list is empty.")
    return _list_files(source, paths, names, os.path.dirname(os.path.abspath(source)), labels, check)


def _rows(source: str, file: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield path and label ("" if none) of each row of a list file."""
    if source.lower().endswith(".txt"):
        for line in file:
            if line.strip():
                path, _, name = line.partition("\t")
                yield path.strip(), name.strip()
        return
    table = csv.DictReader(file, delimiter="\t" if source.lower().endswith(".tsv") else ",")
    columns = [column.strip() for column in table.fieldnames or []]
    if "path" not in columns:
        raise ValueError(
            f"'{source}' has no column 'path', only {columns}. Its first line must name the columns: "
            "path and, if there are labels, label."
        )
    table.fieldnames = columns
    for row in table:
        yield (row["path"] or "").strip(), (row.get("label") or "").strip()


def _parquet_rows(source: str) -> Iterator[tuple[str, str]]:
    """Yield path and label ("" if none) of each row of a Parquet file."""
    import pyarrow as pa  # takes longer to import than to list a folder
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(source).names
        if "path" not in names:
            raise ValueError(
                f"'{source}' has no column 'path', only {names}. Name the column of paths so. If the images "
                "lie in the file itself, give mocohub.extract what datasets.load_dataset('parquet', "
                "data_files=...) returns."
            )
        table = pq.read_table(source, columns=["path", "label"] if "label" in names else ["path"])
        for name, column in zip(table.column_names, table.columns, strict=True):
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not is_text and (name == "path" or not pa.types.is_integer(kind)):
                accepted = "strings" if name == "path" else "strings or integers"
                raise ValueError(f"Column '{name}' of '{source}' holds {kind}, but must hold {accepted}.")
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{source}' cannot be read as Parquet: {reason}. Write it again.") from error
    for row in table.to_pylist():
        label = row.get("label")
        yield row["path"] or "", "" if label is None else str(label).strip()


def _list_files(
    source: str, paths: list[str], names: list[str | None], root: str, labels: Labels, check: bool
) -> ImageList:
    """List named files; `names` are their label texts."""
    paths = [PurePath(path).as_posix() for path in paths]
    if check:
        missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(paths)} files in {source} do not exist (relative paths start at "
                f"'{root}'): {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. "
                "Correct the list, or pass mocohub.list_images(..., check=False) to have each reported when "
                "it is read."
            )
    found = _named_classes(names) if labels == "auto" else _folder_classes(source, paths, labels)
    return ImageList(source, paths, *found, root)


def _list_tars(source: str, shards: list[str], labels: Labels) -> ImageList:
    places = [shard if is_url(shard) else os.path.abspath(shard) for shard in shards]
    members = TarMembers(places, array("I"), array("Q"), array("Q"))
    paths, inner_paths, names = [], [], []
    shard_names = [os.path.basename(bare(shard)) for shard in shards]
    if len(set(shard_names)) < len(shards):
        twice = next(name for name in shard_names if shard_names.count(name) > 1)
        raise ValueError(
            f"{source}: two shards are called '{twice}'. Rename one: file names identify images."
        )
    for shard_id, (shard, shard_name) in enumerate(zip(shards, shard_names, strict=True)):
        images, class_of_key = _scan_tar(shard)
        for path, offset, size in images:
            members.shard_ids.append(shard_id)
            members.offsets.append(offset)
            members.sizes.append(size)
            paths.append(f"{shard_name}/{path}")
            inner_paths.append(path)
            names.append(class_of_key.get(sample_key(path)))
    if not paths:
        raise ValueError(f"No images in {source} (looked for members with {', '.join(SUFFIXES)}).")
    if labels == "auto" and any(name is not None for name in names):
        found = _named_classes(names)
    else:
        found = _folder_classes(source, inner_paths, labels)
    return ImageList(source, paths, *found, "", members)


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


def labels_of_names(names: Sequence[str | None]) -> tuple[list[int | None] | None, list[str] | None]:
    """Return the position of each class name among all of them, and these in the order of `list_images`.

    Returns:
        None twice if there are fewer than two names, or they are those of splits: then they tell no classes.
    """
    found = {name for name in names if name is not None}
    if len(found) < 2 or {name.lower() for name in found} <= _SPLITS:
        return None, None
    return _named_classes(names)


def read_class(file: ForwardFile, size: int) -> str | None:
    """Read the text of webdataset's `.cls` file, None if it is empty.

    Raises:
        UnicodeDecodeError: If it is no text.
    """
    return file.read(min(size, _MAX_LABEL_BYTES)).decode().strip() or None


def member_path(name: str) -> str | None:
    """Return the path of a tar member without empty parts, None if it is hidden."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return None if hidden else "/".join(parts)


def sample_key(path: str) -> str:
    """What the files of one webdataset sample share: the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]
