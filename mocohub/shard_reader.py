"""One shard read from front to back: its images as they lie there, and the classes beside them.

Members are never extracted or unpickled, and links never followed. A shard that has been cut, wherever, or
is damaged in a header is an error when the reader comes to that place, never a shorter shard.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from mocohub.images import MAX_IMAGE_BYTES, SUFFIXES
from mocohub.tars import ForwardFile, TarError, bare, member_path, members, read_class, sample_key

IDS_PER_SHARD = 1 << 24  # images of a shard are fewer
_MOST_IN_SAMPLE = 64  # images that are held back for the class of their sample
_MOST_LINKS = 1000  # that are counted


class ShardError(RuntimeError):
    """A shard cannot be read to its end; the text names the shard, the byte, the reason and a remedy."""


class DamagedShard(ShardError):
    """It cannot because of what it is, or because it is gone: to read it again would not help."""


class ShardImage(NamedTuple):
    """One image as it lies in its shard."""

    index: int  # position among the images of the shard
    path: str  # inside the shard
    data: bytes | None  # the encoded image; None if it is larger than any that can be decoded
    end: int  # byte of the shard where the next header is
    class_name: str | None = None  # in `read_samples`: what the `.cls` file of its sample says


class _ClassFile(NamedTuple):
    """A `.cls` file as it lies in its shard."""

    path: str
    text: str | None


def read_samples(url: str) -> Iterator[ShardImage]:
    """Yield the images of one shard as `read_shard` does, each with the class that stands beside it.

    The files of a sample have the same path up to the first dot of the name and follow one another, in any
    order (webdataset's rule); so no more than one sample is held back. Of that no more than 64 images: a
    class that comes later does not reach them. (Names such as "frame.0001.jpg" make one sample of all.)

    Raises:
        DamagedShard, ShardError, ImportError: As `read_shard`, after all images that lie whole before. Also
            at the end, if links or devices were named as images, which cannot be read here.
    """
    held: list[ShardImage] = []
    key, class_name = None, None
    damage = None
    with closing(_read(url, 0, 0, is_strict=True)) as found:
        while True:
            try:
                one = next(found, None)
            except ShardError as error:
                one, damage = None, error
            is_new = one is None or sample_key(one.path) != key
            if is_new or len(held) == _MOST_IN_SAMPLE:
                yield from (image._replace(class_name=class_name) for image in held)
                held, class_name = [], None if is_new else class_name
            if one is None:
                break
            key = sample_key(one.path)
            if isinstance(one, _ClassFile):
                class_name = one.text
            else:
                held.append(one)
    if damage is not None:
        raise damage


def read_shard(url: str, offset: int = 0, index: int = 0) -> Iterator[ShardImage]:
    """Yield the images of one shard in archive order, reading it once from front to back.

    All that lies whole before the damage in a damaged shard is yielded before the error. Reads that fail are
    repeated four times over 40 seconds, unless the file does not exist or may not be read.

    Args:
        url: Path or URL of a plain tar.
        offset: Byte to start at: 0, or the `end` of an image.
        index: Position of the first image to come: 0, or one more than that image's.

    Raises:
        DamagedShard: If the shard is cut anywhere, compressed, damaged or gone; if it holds no image, more
            than 2**24 of them, a sparse file, or something behind its end.
        ShardError: If it cannot be read for another reason.
        ImportError: For a URL if fsspec, or what it needs for this one, is not installed.
    """
    return _read(url, offset, index)


def _read(url: str, offset: int, index: int, *, is_strict: bool = False) -> Iterator[ShardImage | _ClassFile]:
    """Read a shard; if `is_strict` with its `.cls` files, and with an error for images that are links."""
    links: list[str] = []

    def note(name: str) -> None:
        if image_path(name) is not None and len(links) < _MOST_LINKS:
            links.append(name)

    with ForwardFile(url, offset) as file:
        try:
            for name, size in members(file, passed_over=note):
                if is_strict and name.endswith(".cls") and (path := member_path(name)) is not None:
                    yield _ClassFile(path, _class(file, path, size))
                if (path := image_path(name)) is None:
                    continue
                if index == IDS_PER_SHARD:
                    raise TarError(f"it holds more than {IDS_PER_SHARD} images, make several of it")
                end = file.position + -size % 512 + size
                data = file.read(size) if size <= MAX_IMAGE_BYTES else None
                if data is not None and len(data) < size:
                    raise TarError(f"it has been cut inside '{path}'")
                yield ShardImage(index, path, data, end)
                index += 1
            if is_strict and links:
                raise TarError(
                    f"{len(links)}{' or more' * (len(links) == _MOST_LINKS)} of its images are links or "
                    f"devices, such as '{links[0]}': put the files in (tar --dereference --hard-dereference)"
                )
            if index == 0:
                raise TarError(f"it holds no image (looked for members with {', '.join(SUFFIXES)})")
        except (OSError, ValueError) as error:
            damaged = isinstance(error, TarError | FileNotFoundError)
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise (DamagedShard if damaged else ShardError)(
                f"Tar shard '{bare(url)}' cannot be read beyond byte {file.position}, after {index} images: "
                f"{reason}. {'Copy it or make it again.' if damaged else 'Check the connection and access.'}"
            ) from error


def _class(file: ForwardFile, path: str, size: int) -> str | None:
    try:
        return read_class(file, size)
    except UnicodeDecodeError as error:
        raise TarError(f"'{path}' is no UTF-8 text") from error


def image_path(name: str) -> str | None:
    """Return the path of a tar member without empty parts, None if it is hidden or not named as an image."""
    path = member_path(name)
    return path if path is not None and path.lower().endswith(SUFFIXES) else None
