"""Where images come from: folders, lists of paths and tar shards, each in one documented order.

An image's id is its position in the list, so one source always gives the same ids: folders in the code-point
order of their relative POSIX paths, lists in their own order, shards in name order with their members in
archive order. Nothing is dropped silently: a list that names missing files, a folder that cannot be read and
a tar that has been cut are errors before any work starts.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from PIL.Image import Image

from mocohub.classes import Classes, classes_of_folders, classes_of_texts, refuse_splits
from mocohub.errors import unknown
from mocohub.images import MAX_IMAGE_BYTES, MAX_PIXELS, SUFFIXES, TOO_LARGE, ImageError, decode_image
from mocohub.lists import LIST_SUFFIXES, read_list
from mocohub.tar_index import TarMembers, index_tars
from mocohub.tars import bare, is_url

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_ACCEPTED = (
    "a folder of images or of .tar shards, a .tar file, a .txt, .csv, .tsv or .parquet list, "
    "a glob pattern, or a Python list of paths"
)

Labels = Literal["auto", "folder", "none"]


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
        return self.members.read(i)

    def decode(self, i: int, *, max_pixels: int = MAX_PIXELS) -> Image:
        """Return image `i` as upright 8-bit RGB (see `mocohub.images.decode_image`).

        Raises:
            ImageError: For anything that is wrong with this image, a missing file included.
        """
        return decode_image(self.encoded(i), max_pixels=max_pixels)

    def encoded(self, i: int) -> bytes | Path:
        """Return image `i` as `mocohub.images.open_image` takes it: its file, or its bytes from a tar shard.

        Raises:
            ImageError: If the shard cannot be read, or states a size beyond `mocohub.images.MAX_IMAGE_BYTES`.
        """
        if self.members is None:
            return Path(self.root, self.paths[i])
        if self.members.sizes[i] > MAX_IMAGE_BYTES:
            raise ImageError(TOO_LARGE)
        try:
            return self.read(i)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def subset(self, ids: Sequence[int]) -> "ImageList":
        """Return the images of these ids, in this order; the classes stay. Their ids count from 0 again."""
        return replace(
            self,
            paths=[self.paths[i] for i in ids],
            labels=None if self.labels is None else [self.labels[i] for i in ids],
            members=None if self.members is None else self.members.subset(ids),
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
    elif os.path.isfile(source) and str(source).lower().endswith(LIST_SUFFIXES):
        images = _list_files(
            str(source), *read_list(str(source)), os.path.dirname(os.path.abspath(source)), labels, check
        )
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
    if hasattr(source, "columns"):  # iterating over a DataFrame gives their names
        raise ValueError(
            f"{type(source).__name__} is no source of images: pass one column, such as frame['path'], or "
            "save it as .parquet or .csv with columns path and label."
        )
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
        if labels == "auto" and len(first_words) > 1:  # train-00.tar, val-00.tar
            refuse_splits(folder, first_words, archives)
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
                # A link that leads to itself raises errors in the entry's own methods.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    to_visit.append((entry.path, f"{prefix}{entry.name}/", parents | {identity}))
                elif entry.name.lower().endswith(known) and (entry.is_symlink() or entry.is_file()):
                    yield prefix + entry.name  # a dangling link too: it will be reported, not left out


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
    found = classes_of_texts(names) if labels == "auto" else _folder_classes(source, paths, labels)
    return ImageList(source, paths, *found, root)


def _list_tars(source: str, shards: list[str], labels: Labels) -> ImageList:
    paths, texts, members = index_tars(source, shards)
    if labels == "auto" and any(text is not None for text in texts):
        found = classes_of_texts(texts)
    else:
        found = _folder_classes(source, [path.partition("/")[2] for path in paths], labels)
    return ImageList(source, paths, *found, "", members)


def _folder_classes(source: str, paths: list[str], labels: Labels) -> Classes:
    if labels == "none":
        return None, None
    return classes_of_folders(source, paths, demanded=labels == "folder")
