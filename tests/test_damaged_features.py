"""Feature folders that were damaged on their way: a reader names the file, or gets what was written."""

import io
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mocohub.backbones import create_backbone, pretrained_cfg
from mocohub.cli.features import features_
from mocohub.cli.linear import linear
from mocohub.cli.probing import knn
from mocohub.cli.searching import search
from mocohub.features import writer as feature_writer
from mocohub.features.extract import extract
from mocohub.features.store import Features
from mocohub.files import read_json, sha256, write_json
from tests.helpers.images import write_images

PARTS = [f"part-0000{i}-of-00003.parquet" for i in range(3)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an extraction of 3 shards with 3 errors, and others: of another model, of other images."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("damaged")
    photos = write_images(root / "photos", {"cat": 12, "dog": 11}, size_px=32)
    others = write_images(root / "others", {"cat": 12, "dog": 11}, size_px=32, seed=1)
    for folder in (photos, others):
        for name in ("cat/0003", "dog/0002", "dog/0009"):
            (folder / f"{name}.png").write_bytes(b"no image")
    args = {"stem_chs": 16, "channels": [16, 32, 64, 128]}
    cfg = pretrained_cfg("r18tiny", crop_px=32, crop_pct=1.0)
    for seed, name in enumerate(("model", "model2")):
        (root / name).mkdir()
        torch.manual_seed(seed)  # the same bytes, hence the same damage, each time
        save_file(create_backbone("r18tiny").state_dict(), root / name / "model.safetensors")
        config = {
            "architecture": "resnet18_cifar", "num_classes": 0, "model_args": args, "pretrained_cfg": cfg,
        }  # fmt: skip
        write_json(root / name / "config.json", config)
    options = {"rows_per_shard": 8, "num_workers": 0, "dtype": "float32", "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_writer, "_ROW_GROUP_BYTES", 4 * 128 * 3)  # row groups of 3 rows
        extract(root / "model", photos, out=root / "features", **options)
        extract(root / "model2", photos, out=root / "of another model", **options)
        extract(root / "model", others, out=root / "of other images", **options)
    assert pq.ParquetFile(root / "features" / PARTS[0]).num_row_groups == 3
    return root


READERS: dict[str, Callable[[Path, Path], object]] = {
    "Features.open": lambda site, folder: Features.open(folder),
    "knn, train": lambda site, folder: knn(str(folder), str(site / "features"), k=(3,)),
    "knn, val": lambda site, folder: knn(str(site / "features"), str(folder), k=(3,)),
    "linear, train": lambda site, folder: linear(str(folder), str(site / "features")),
    "linear, val": lambda site, folder: linear(str(site / "features"), str(folder)),
    "search": lambda site, folder: search(str(folder), str(site / "photos/cat/0000.png"), k=2),
    "verify": lambda site, folder: features_("verify", (str(folder),)),
}


def flip(position: float) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        at = min(int(position * len(data)), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return damage


def of_table(change: Callable[[pa.Table], pa.Table]) -> Callable[[bytes], bytes]:
    """Write a shard again with other rows or columns, whose footer says the same facts."""

    def damage(data: bytes) -> bytes:
        table = pq.read_table(io.BytesIO(data))
        file = io.BytesIO()
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file, row_group_size=3)
        return file.getvalue()

    return damage


def retyped(dtype: str, width: int) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = np.stack(table["embedding"].to_numpy())[:, :width].astype(dtype)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
        return table.set_column(table.column_names.index("embedding"), "embedding", column)

    return change


def swap(folder: Path, site: Path) -> None:
    (folder / PARTS[0]).rename(folder / "aside")
    (folder / PARTS[1]).rename(folder / PARTS[0])
    (folder / "aside").rename(folder / PARTS[1])


def dangle(folder: Path, site: Path) -> None:
    (folder / PARTS[1]).unlink()
    (folder / PARTS[1]).symlink_to("nowhere")


def copy(name: str, file: str) -> Callable[[Path, Path], None]:
    return lambda folder, site: shutil.copy(site / name / file, folder / file) and None


def rewrite(
    file: str, change: Callable[[bytes], bytes], reseal: bool = False
) -> Callable[[Path, Path], None]:
    """Change a file; with `reseal` the manifest then states its hash and its rows."""

    def damage(folder: Path, site: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        if reseal:
            manifest = read_json(folder / "manifest.json")
            for shard in manifest["shards"]:
                shard["sha256"] = sha256(folder / shard["file"])
            manifest["errors_sha256"] = sha256(folder / "errors.jsonl")
            write_json(folder / "manifest.json", manifest)

    return damage


def state(**facts: object) -> Callable[[Path, Path], None]:
    """Let the manifest say something else."""

    def damage(folder: Path, site: Path) -> None:
        write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), **facts})

    return damage


def forget_a_shard(folder: Path, site: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    gone = manifest["shards"].pop()
    write_json(folder / "manifest.json", {**manifest, "rows": manifest["rows"] - gone["rows"]})


def list_a_shard_twice(folder: Path, site: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    manifest["shards"][1] = manifest["shards"][0]
    rows = sum(shard["rows"] for shard in manifest["shards"])
    write_json(folder / "manifest.json", {**manifest, "rows": rows})


def another_id(data: bytes) -> bytes:
    lines = [json.loads(line) for line in data.splitlines()]
    lines[1]["id"] += 100
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


# What was done -> (how, pattern of the file that the refusal names)
DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a bit at the start of a shard": (rewrite(PARTS[0], flip(0)), PARTS[0]),
    "a bit of its values": (rewrite(PARTS[1], flip(0.4)), PARTS[1]),
    "a bit of its paths": (rewrite(PARTS[2], lambda data: data.replace(b"dog/0", b"eog/0", 1)), PARTS[2]),
    "a bit of its footer": (rewrite(PARTS[1], flip(0.97)), PARTS[1]),
    "its last bit": (rewrite(PARTS[2], flip(1)), PARTS[2]),
    "its last byte is missing": (rewrite(PARTS[0], lambda data: data[:-1]), PARTS[0]),
    "half of it is missing": (rewrite(PARTS[0], lambda data: data[: len(data) // 2]), PARTS[0]),
    "a block of it is zeros": (
        rewrite(PARTS[1], lambda data: data[:1024] + bytes(512) + data[1536:]),
        PARTS[1],
    ),
    "it is empty": (rewrite(PARTS[2], lambda data: b""), PARTS[2]),
    "bytes were appended": (rewrite(PARTS[1], lambda data: data + b"\0"), PARTS[1]),
    "it is missing": (lambda folder, site: (folder / PARTS[1]).unlink(), PARTS[1]),
    "it is a dangling link": (dangle, PARTS[1]),
    "two shards are swapped": (swap, PARTS[0]),
    "a shard of another model": (copy("of another model", PARTS[1]), PARTS[1]),
    "a shard of other images": (copy("of other images", PARTS[2]), PARTS[2]),
    "a row group is missing": (rewrite(PARTS[0], of_table(lambda table: table.slice(3))), PARTS[0]),
    "a row group is missing, resealed": (
        rewrite(PARTS[0], of_table(lambda table: table.slice(3)), reseal=True),
        f"{PARTS[0]}|manifest.json",
    ),
    "float16 instead of float32, resealed": (
        rewrite(PARTS[1], of_table(retyped("float16", 128)), reseal=True),
        PARTS[1],
    ),
    "half as wide, resealed": (rewrite(PARTS[1], of_table(retyped("float32", 64)), reseal=True), PARTS[1]),
    "the manifest of another model": (copy("of another model", "manifest.json"), PARTS[0]),
    "the manifest of other images": (copy("of other images", "manifest.json"), PARTS[0]),
    "the manifest is cut": (rewrite("manifest.json", lambda data: data[: len(data) // 2]), "manifest.json"),
    "the manifest is empty": (rewrite("manifest.json", lambda data: b""), "manifest.json"),
    "the manifest is no text": (rewrite("manifest.json", lambda data: b"\xff" + data), "manifest.json"),
    "the manifest is a list": (rewrite("manifest.json", lambda data: b"[]"), "manifest.json"),
    "it says another type": (state(dtype="float16"), PARTS[0]),
    "it says another width": (state(num_features=64), PARTS[0]),
    "it says fewer rows": (state(rows=19), "manifest.json"),
    "it says more inputs": (state(num_inputs=24), "manifest.json"),
    "it forgets a shard": (forget_a_shard, "manifest.json"),
    "it lists a shard twice": (list_a_shard_twice, f"{PARTS[0]}|manifest.json"),
    "an error is missing": (
        rewrite("errors.jsonl", lambda data: data[: data.index(b"\n") + 1]), "errors.jsonl",
    ),
    "a bit of an error": (rewrite("errors.jsonl", flip(0.5)), "errors.jsonl"),
    "an error of another input": (rewrite("errors.jsonl", another_id), "errors.jsonl"),
    "the errors are cut": (rewrite("errors.jsonl", lambda data: data[:-9]), "errors.jsonl"),
    "the errors are missing": (lambda folder, site: (folder / "errors.jsonl").unlink(), "errors.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_an_intact_folder_is_read(site: Path, tmp_path: Path, reader: str) -> None:
    READERS[reader](site, shutil.copytree(site / "features", tmp_path / "copy"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_reader_refuses_and_names_the_file(site: Path, tmp_path: Path, damage: str) -> None:
    change, names = DAMAGE[damage]
    folder = tmp_path / "copy"
    shutil.copytree(site / "features", folder)
    change(folder, site)
    for reader, read in READERS.items():
        with pytest.raises(
            (ValueError, FileNotFoundError), match=f"{re.escape(str(folder))}/?({names})"
        ) as refusal:
            read(site, folder)
        assert len(str(refusal.value).splitlines()) == 1, reader


def everything(folder: Path) -> dict[str, object]:
    found = Features.open(folder)
    index = {"ids": found.ids.tolist(), "paths": found.paths, "labels": found.labels.tolist()}
    facts = {"classes": found.classes, "errors": found.errors, "meta": found.meta, "extras": found.extras}
    return {"values": found.values.tobytes(), **index, **facts}


def check_random_damage(site: Path, folder: Path, count: int) -> None:
    """Flip, cut, insert: either a refusal that names a file of the folder, or exactly what was written."""
    shutil.copytree(site / "features", folder)
    written = everything(folder)
    files = [*PARTS, "manifest.json", "errors.jsonl"]
    num_refused = 0
    for i in range(count):
        chance = random.Random(i)
        file = folder / chance.choice(files)
        whole = file.read_bytes()
        at = chance.randrange(len(whole))
        kind = chance.choice(["flip", "flip", "cut", "insert", "delete"])
        if kind == "flip":
            data = whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
        elif kind == "cut":
            data = whole[:at]
        elif kind == "insert":
            data = whole[:at] + chance.randbytes(3) + whole[at:]
        else:
            data = whole[:at] + whole[at + 1 :]
        file.write_bytes(data)
        try:
            assert everything(folder) == written, f"{kind} at byte {at} of {file.name}, case {i}"
        except (ValueError, FileNotFoundError) as error:
            assert re.search(rf"{re.escape(str(folder))}/[\w.-]+", str(error)), (
                error
            )  # a name in the manifest may be hit
            num_refused += 1
        file.write_bytes(whole)
    assert num_refused > count * 0.8  # the others are in numbers that only `verify` needs, and the like


def test_random_damage_is_refused_or_harmless(site: Path, tmp_path: Path) -> None:
    check_random_damage(site, tmp_path / "copy", 150)


@pytest.mark.slow
def test_much_random_damage_is_refused_or_harmless(site: Path, tmp_path: Path) -> None:
    check_random_damage(site, tmp_path / "copy", 5000)
