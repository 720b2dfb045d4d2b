"""Tar archives read from front to back, local or behind a URL: every member, or an error.

Python's tarfile takes a cut between two members, or inside a header, for the end of the archive. Here the
end is where two blocks of zeros are, and nothing after them. Memory does not depend on what headers declare.
"""

import logging
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from mocohub.errors import missing_extra

logger = logging.getLogger(__name__)

_BLOCK = 512  # bytes; headers and contents start at multiples of it (POSIX.1-2017, pax, "ustar")
_MAX_RECORD_BYTES = 1 << 20  # of an extended header: in practice one path
_MAX_CLASS_BYTES = 1024  # of a `.cls` file
_MAX_BYTES = 1 << 43  # of a member; file systems refuse to go much further
_PIECE_BYTES = 1 << 21  # the most that is read at once; of a URL, one request
_LOCAL_BUFFER_BYTES = 1 << 17
_RETRY_AFTER_S = (0.5, 2.0, 8.0, 30.0)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_RECORDS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class TarError(ValueError):
    """The bytes are not those of a whole, plain tar."""


class ForwardFile:
    """The bytes of a file from `position` on. A read that fails is repeated from where it began.

    Attributes:
        url: Path or URL.
        position: Byte that is read next.
    """

    def __init__(self, url: str, position: int = 0) -> None:
        """Stand at `position`; the file is opened by the first read."""
        self.url, self.position = url, position
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ForwardFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; another read would open it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file.

        Raises:
            OSError: If the file is missing, or still cannot be read after four repetitions in 40 seconds.
            ValueError: If it is behind a URL that cannot be read from any place, as web servers without range
                requests.
            ImportError: If this is a URL and fsspec, or what it needs for this one, is not installed.
        """
        data = self._read_piece(size)
        if len(data) == size:
            return data
        pieces = [data]
        while pieces[-1] and (missing := size - sum(map(len, pieces))):
            pieces.append(self._read_piece(missing))
        return b"".join(pieces)

    def skip_to(self, position: int) -> None:
        """Go forward to `position`, be it there or not."""
        if self._file is not None and not is_url(self.url) and position > self.position:
            self._file.seek(position)
            self.position = position
        while self.position < position and self._read_piece(position - self.position):
            pass

    def _read_piece(self, size: int) -> bytes:
        for wait_s in (*_RETRY_AFTER_S, None):
            try:
                if self._file is None:
                    self._file = _open(self.url, self.position)
                data = self._file.read(min(size, _PIECE_BYTES))
                self.position += len(data)
                return data
            except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError):
                raise
            except Exception as error:  # each kind of storage has its own
                self._file = None  # to close what does not answer may hang or fail as well
                reason = f"{type(error).__name__}: {error}".replace(self.url, bare(self.url))
                if wait_s is None:
                    raise OSError(reason) from error
                logger.warning(
                    f"'{bare(self.url)}' at byte {self.position}: {reason}. Reading it again in {wait_s:g} s."
                )
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def is_url(path: str) -> bool:
    """Say whether fsspec is to open `path`: it has a scheme."""
    return "://" in path


def bare(url: str) -> str:
    """Return a URL without its query, which may hold a signature and change from day to day."""
    return url.partition("?")[0] if is_url(url) else url


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
        ImportError: If fsspec, or the package it needs for this kind of URL, is not installed.
        ValueError: If it does not know the kind.
    """
    try:
        import fsspec
    except ImportError:
        raise missing_extra("fsspec", "stream", f"Reading '{bare(url)}'") from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"Reading '{bare(url)}': {error}") from error
    except ValueError as error:
        raise ValueError(f"fsspec cannot open '{bare(url)}': {error}. Use https://, s3://, ...") from error


def _open(url: str, position: int) -> BinaryIO:
    if is_url(url):
        files, path = filesystem(url)
        # The next block is on its way while this one is used; three, as a piece may lie across two.
        file = files.open(
            path, "rb", block_size=_PIECE_BYTES, cache_type="background", cache_options={"maxblocks": 3}
        )
    else:
        file = open(url, "rb", buffering=_LOCAL_BUFFER_BYTES)
    if position:
        file.seek(position)
    return file


def members(
    file: ForwardFile, *, passed_over: Callable[[str], None] | None = None
) -> Iterator[tuple[str, int]]:
    """Yield (name, size in bytes) of each regular file of a tar, and then prove that they are all.

    At each, `file` stands at the first byte of its content, which may be read or left. `file` may begin
    behind any member. `passed_over` is called with the name of each member that is neither a regular file nor
    a folder: links, devices.

    Raises:
        TarError: If the tar is cut, damaged, compressed, has sparse files or data behind its end.
        OSError, ValueError, ImportError: If it cannot be read (see `ForwardFile.read`).
    """
    name, size = None, None  # what extended headers say of the next member
    extended: set[bytes] = set()  # their kinds
    while True:
        start = file.position
        header = file.read(_BLOCK)
        if start == 0 and header.startswith(_COMPRESSED):
            raise TarError("it is compressed: decompress it once (gzip -d, bzip2 -d, xz -d, zstd -d)")
        if len(header) < _BLOCK:
            raise TarError("it has been cut, its end-of-archive blocks are missing")
        if not header.strip(b"\0"):
            break
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")  # compares the checksum
        except tarfile.HeaderError as error:
            raise TarError(f"the header at byte {start} is damaged ({error})") from error
        if member.type == tarfile.XGLTYPE:  # for all files that follow
            if _records(_text(file, member.size)).keys() & {"path", "size"}:
                raise TarError("a header gives one name or size to all files")
            continue
        if member.type in (_LONG_NAME, _LONG_LINK, *_RECORDS):
            if member.type in extended:
                raise TarError("two extended headers of one kind follow each other, what was between is lost")
            extended.add(member.type)
            text = _text(file, member.size)
            if member.type == _LONG_NAME:
                name = text.partition(b"\0")[0].decode("utf-8", "backslashreplace")
            elif member.type in _RECORDS:
                records = _records(text)
                name = records.get("path", name)
                size = _whole(records["size"]) if "size" in records else size
            continue
        size = member.size if size is None else size
        if not 0 <= size <= _MAX_BYTES:
            raise TarError(f"the header at byte {start} states a size of {size} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise TarError(f"'{name or member.name}' is stored as a sparse file")
        has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
        end = file.position + (-size % _BLOCK + size if has_content else 0)
        if member.isreg():
            yield name or member.name, size
        elif passed_over is not None and not member.isdir():
            passed_over(name or member.name)
        file.skip_to(end)
        name, size = None, None
        extended.clear()
    if extended:
        raise TarError("it ends behind an extended header")
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise TarError("it has been cut, its end-of-archive blocks are missing")
    while padding := file.read(1 << 16):
        if padding.strip(b"\0"):
            raise TarError("more data follows its end, as if several tars had been joined with cat")


def _text(file: ForwardFile, size: int) -> bytes:
    """Read the content of an extended header."""
    if not 0 <= size <= _MAX_RECORD_BYTES:
        raise TarError(f"an extended header states {size} bytes")
    padded = file.read(-size % _BLOCK + size)
    if len(padded) < size:
        raise TarError("it has been cut inside an extended header")
    return padded[:size]


def _records(text: bytes) -> dict[str, str]:
    r"""Parse the records of a pax header: b"12 path=a.b\n" each, the number being the record's length."""
    records, position = {}, 0
    while position < len(text) and text[position]:  # zeros may fill the rest
        start = re.compile(rb"(\d{1,9}) ([^=]+)=").match(text, position)
        end = position + int(start[1]) if start else position
        if not start or not start.end() < end <= len(text) or text[end - 1] != ord("\n"):
            raise TarError("an extended header is damaged")
        value = text[start.end() : end - 1]
        records[start[2].decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        position = end
    if any(key.startswith("GNU.sparse") for key in records):
        raise TarError(f"'{records.get('GNU.sparse.name', 'a member')}' is stored as a sparse file")
    return records


def _whole(number: str) -> int:
    if not re.fullmatch("[0-9]{1,20}", number):
        raise TarError(f"an extended header states a size of '{number}' bytes")
    return int(number)


def read_class(file: ForwardFile, size: int) -> str | None:
    """Read the text of webdataset's `.cls` file, None if it is empty.

    Raises:
        UnicodeDecodeError: If it is no text.
    """
    return file.read(min(size, _MAX_CLASS_BYTES)).decode().strip() or None


def member_path(name: str) -> str | None:
    """Return the path of a tar member without empty parts, None if it is hidden."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return None if hidden else "/".join(parts)


def sample_key(path: str) -> str:
    """What the files of one webdataset sample share: the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]
