"""What a Hub holds: repositories with branches, tags and commits, and the files that commits name.

Nothing here speaks HTTP; `helpers.hub_server` does. Commits never change. A file that is already on this disk
is referred to, not copied, so that repositories of several GB cost nothing.
"""

import hashlib
import itertools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|tar|gz|pkl|onnx|npy|npz|parquet|zip)$")
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
DATE = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """What the Hub says no with: an HTTP status, its X-Error-Code if it has one, and a sentence."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Blob:
    """One version of one file. `file` is None if only the xet store has its content."""

    file: Path | None
    size: int
    sha256: str
    git_oid: str  # of the pointer, for a file in LFS
    is_lfs: bool
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid

    @property
    def lfs(self) -> dict[str, Any]:
        return {"oid": self.sha256, "size": self.size, "pointerSize": len(_pointer(self.sha256, self.size))}


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: "Commit | None"
    files: Mapping[str, Blob]  # by path in the repository


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def commit(self, title: str, files: Mapping[str, Blob], branch: str = "main") -> Commit:
        """Add a commit with exactly these files to a branch."""
        parent = self.commits.get(self.branches.get(branch, ""))
        text = [title, parent.oid if parent else "", *sorted(f"{p} {b.git_oid}" for p, b in files.items())]
        oid = hashlib.sha1("\n".join(text).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full SHA-1 names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        chain: list[Commit] = []
        commit: Commit | None = self.find(revision)
        while commit:
            chain.append(commit)
            commit = commit.parent
        return chain


class Storage:
    """The bytes of files: on this disk, uploaded to `folder`, or in the xet store beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.xet = folder, folder / "xet"
        self.xet.mkdir(parents=True)
        self._by_sha256: dict[str, Blob] = {}
        self._names = itertools.count()

    def new_file(self) -> Path:
        return self.folder / f"{next(self._names):06d}"

    def add(self, name: str, file: Path) -> Blob:
        """Take a file that stays where it is; its name says whether it is in LFS."""
        with open(file, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        size = file.stat().st_size
        if LFS.search(name) and size:
            return self.add_object(file, sha256, size)
        return Blob(file, size, sha256, _git_oid(file.read_bytes()), is_lfs=False)

    def add_bytes(self, name: str, content: bytes) -> Blob:
        file = self.new_file()
        file.write_bytes(content)
        return self.add(name, file)

    def add_object(self, file: Path | None, sha256: str, size: int, xet_hash: str | None = None) -> Blob:
        """Take an LFS object, whatever its name will be."""
        blob = Blob(file, size, sha256, _git_oid(_pointer(sha256, size)), is_lfs=True, xet_hash=xet_hash)
        return self._by_sha256.setdefault(sha256, blob)

    def find(self, sha256: str, size: int = 0) -> Blob | None:
        """An uploaded object: by LFS, or by xet, whose own index then says which hash it has there."""
        if sha256 not in self._by_sha256 and (xet_hash := _xet_hashes(self.xet).get(sha256)):
            self.add_object(None, sha256, size, xet_hash)
        return self._by_sha256.get(sha256)

    def content(self, blob: Blob) -> Path:
        """The file to serve over plain HTTP; content that came by xet is put together first."""
        if blob.file:
            return blob.file
        file = self.folder / f"xet-{blob.xet_hash}"
        if not file.exists():
            import hf_xet

            partial = self.new_file()
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.xet}") as group:
                group.start_download_file(hf_xet.XetFileInfo(blob.xet_hash, blob.size), str(partial))
            partial.rename(file)
        return file


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _xet_hashes(store: Path) -> dict[str, str]:
    """SHA-256 -> xet hash of all files in a local xet store, from its shards.

    A shard is a header of 48 bytes, then for each file: its hash (32), flags (4), number of entries (4),
    padding to 48, the entries (48 each), as many again if bit 31 of the flags says that they are verified,
    and if bit 30 is set a block of 48 that begins with the SHA-256. A hash of 32 times 0xff ends the list.
    """
    found = {}
    for shard in sorted(store.rglob("*.mdb")):
        data, at = shard.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            file_hash = data[at : at + 32]
            flags, entries = (int.from_bytes(data[i : i + 4], "little") for i in (at + 32, at + 36))
            at += 48 * (1 + entries * (2 if flags >> 31 & 1 else 1))
            if flags >> 30 & 1:
                found[_hex(data[at : at + 32])] = _hex(file_hash)
                at += 48
    return found


def _hex(digest: bytes) -> str:
    """As xet writes hashes: four little-endian numbers of 64 bits."""
    return "".join(f"{int.from_bytes(digest[i : i + 8], 'little'):016x}" for i in range(0, 32, 8))
