"""Files and folders made to harm whoever opens them, one for each known way in.

Every payload tries to leave a file in `canaries`, and `outside` holds what no reader may reach: an attack
succeeded if one of the two is touched. `helpers.malice_corpus` writes all of them, and
`helpers.malice_readers` opens them.
"""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mocohub.files import sha256, write_json

FILE = ("load", "read_encoder", "inspect", "convert", "export")
FOLDER = (*FILE, "verify", "publish")
RUN = (*FILE, "restore", "init")
IMAGES = ("list_images", "extract", "list_shards")
FEATURES = ("features", "inspect")


@dataclass(frozen=True)
class Site:
    """Where a corpus stands, and the harmless things it is made of."""

    root: Path
    model: Path  # an exported folder
    run: Path
    tensors: dict[str, Any]  # an official checkpoint

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def canaries(self) -> Path:
        return self.root / "canaries"


@dataclass(frozen=True)
class Attack:
    """One malicious input.

    Attributes:
        name: Unique; the payload's canary has this name.
        readers: All that are given the input, by the names of `helpers.malice_readers`.
        write: Makes it, from the site and the path where it shall be.
        path: Of the input, relative to its own folder.
        harmless_to: Readers that may answer without an error, since they do not look at what is bad.
    """

    name: str
    readers: tuple[str, ...]
    write: Callable[[Site, Path], Any]
    path: str
    harmless_to: tuple[str, ...] = ()


ATTACKS: list[Attack] = []


def attack(name: str, readers: tuple[str, ...], path: str, harmless_to: Iterable[str] = ()) -> Callable:
    """Add the decorated writer to the corpus."""

    def add(write: Callable[[Site, Path], Any]) -> Callable[[Site, Path], Any]:
        ATTACKS.append(Attack(name, readers, write, path, tuple(harmless_to)))
        return write

    return add


class Payload:
    """What runs `function(*args)` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def touch(site: Site, path: Path) -> str:
    return f"open({str(site.canaries / path.parent.name)!r}, 'w').close()"


def run_exec(site: Site, path: Path) -> Payload:
    return Payload(exec, touch(site, path))


def run_system(site: Site, path: Path) -> Payload:
    return Payload(os.system, f"touch '{site.canaries / path.parent.name}'")


def copy_model(site: Site, path: Path) -> Path:
    return shutil.copytree(site.model, path)


def reseal(folder: Path, **changes: Any) -> None:
    """Let the manifest agree with the files: whoever publishes a bad model publishes its manifest too."""
    manifest = json.loads((folder / "mocohub.json").read_text()) | changes
    manifest["sha256"] = {name: sha256(folder / name) for name in ("model.safetensors", "config.json")}
    write_json(folder / "mocohub.json", manifest)


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> None:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(file, "PNG")
    return file.getvalue()
