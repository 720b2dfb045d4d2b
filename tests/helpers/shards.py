"""Tar shards made on the spot."""

import io
import tarfile
from pathlib import Path


def tar_bytes(members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar of these files, in this order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def make_tar(path: Path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar of these files, in this order."""
    path.write_bytes(tar_bytes(members, format))
    return path
