import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mocohub.features import layouts, writer
from mocohub.features.formats import change_layout, convert, merge
from mocohub.features.layouts import FeatureFolder
from mocohub.features.store import Features
from mocohub.features.writer import FeatureWriter
from mocohub.files import read_json, sha256, write_json

META = {
    "model": {"name": "here/r18", "weights_sha256": "ab"},
    "transform": {"text": "Resize"},
    "normalized": False,
    "input": {"source": "photos"},
}
ERRORS = [{"id": 2, "path": "cut/2.jpg", "reason": "zu kurz: é"}, {"id": 9, "path": "9.jpg", "reason": "?"}]


def write_folder(
    folder: Path,
    *,
    sizes: tuple[int, ...] = (10, 0, 5),
    columns: tuple[str, ...] = ("embedding",),
    dtype: str = "float32",
    classes: list[str] | None = ("cat", "dog", "été"),
    labels: bool = True,
    errors: list[dict] = ERRORS,
    extras: bool = False,
    seed: int = 0,
    shapes: dict[str, list[int]] | None = None,
    **meta: object,
) -> Path:
    """Write a feature folder with shards of these sizes; ids pass over those of the errors."""
    num_rows = sum(sizes)
    random = np.random.default_rng(seed)
    ids = np.setdiff1d(np.arange(num_rows + len(errors)), [error["id"] for error in errors])
    classes = None if classes is None else list(classes)
    folder.mkdir()
    facts = {"classes": classes, "meta": {**META, **meta}, "shapes": shapes}
    store = FeatureWriter(folder, num_shards=len(sizes), **facts)
    start = 0
    for shard, size in enumerate(sizes):
        here = ids[start : start + size]
        widths = {name: prod((shapes or {}).get(name, [3 + i])) for i, name in enumerate(columns)}
        values = {name: random.normal(size=(size, width)).astype(dtype) for name, width in widths.items()}
        of_class = np.where(here % 4 == 3, -1, here % 3) if labels else None
        known = {"width": [int(i) + 5 for i in here], "height": [None] * size} if extras else None
        store.write(shard, here, [f"dög/{i} x.jpg" for i in here], of_class, values, known)
        start += size
    store.close(errors, num_inputs=num_rows + len(errors))
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("to", ["npy", "safetensors"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16"},
        {"columns": ("layer3", "embedding"), "extras": True},
        {"labels": False, "classes": None, "errors": []},
        {"sizes": (3,) * 12},
        {"columns": ("stage4", "embedding"), "shapes": {"stage4": [4, 2, 3]}},
        {"shapes": {"embedding": [4, 2, 3]}},
    ],
    ids=["float32", "float16", "columns", "unlabelled", "twelve shards", "maps", "only maps"],
)
def test_there_and_back_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, to: str
) -> None:
    monkeypatch.setattr(writer, "_ROW_GROUP_BYTES", 70)  # several groups a shard
    monkeypatch.setattr(layouts, "_BLOCK_BYTES", 50)  # that end elsewhere
    folder = write_folder(tmp_path / "features", **options)
    there = convert(folder, tmp_path / "there", to=to)
    back = convert(there, tmp_path / "back", to="parquet")
    assert bytes_of(back) == bytes_of(folder)
    other = convert(there, tmp_path / "other", to="npy" if to == "safetensors" else "safetensors")
    assert bytes_of(convert(other, tmp_path / "home", to="parquet")) == bytes_of(folder)


def test_the_npy_layout_is_clip_retrievals_and_is_read_by_numpy_and_pandas_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "features", sizes=(4,) * 11, columns=("layer3", "embedding"))
    out = convert(folder, tmp_path / "npy", to="npy")
    features = Features.open(folder)
    arrays = sorted((out / "img_emb").iterdir())
    tables = sorted((out / "metadata").iterdir())
    assert [path.name for path in arrays] == [f"img_emb_{i:02d}.npy" for i in range(11)]
    assert [path.name for path in tables] == [f"metadata_{i:02d}.parquet" for i in range(11)]
    np.testing.assert_array_equal(np.concatenate([np.load(path) for path in arrays]), features.values)
    np.testing.assert_array_equal(
        np.concatenate([np.load(path) for path in sorted((out / "embedding_emb").iterdir())]),
        np.concatenate(
            [np.stack(pd.read_parquet(path)["embedding"]) for path in sorted(folder.glob("*.parquet"))]
        ),
    )
    table = pd.concat(map(pd.read_parquet, tables))
    assert table["image_path"].tolist() == features.paths
    assert table["id"].tolist() == features.ids.tolist()
    assert table["label"].fillna(-1).tolist() == features.labels.tolist()
    assert (out / "errors.jsonl").read_bytes() == (folder / "errors.jsonl").read_bytes()


def test_maps_have_their_shape_in_arrays_and_their_own_version_of_each_format(tmp_path: Path) -> None:
    options = {"columns": ("stage4", "embedding"), "shapes": {"stage4": [4, 2, 3]}, "sizes": (5, 0)}
    folder = write_folder(tmp_path / "features", **options)
    maps = Features.open(folder).maps("stage4")
    npy, safe = (convert(folder, tmp_path / to, to=to) for to in ("npy", "safetensors"))
    np.testing.assert_array_equal(np.load(npy / "img_emb" / "img_emb_0.npy"), maps)
    assert np.load(npy / "img_emb" / "img_emb_1.npy").shape == (0, 4, 2, 3)
    np.testing.assert_array_equal(load_file(safe / "part-00000-of-00002.safetensors")["stage4"], maps)
    formats = [read_json(path / "manifest.json")["format"] for path in (folder, npy, safe)]
    assert formats == [
        "mocohub-features/3",
        "mocohub-features-npy/2",
        "mocohub-features-safetensors/2",
    ]
    merged = Features.open(merge([npy, safe], tmp_path / "merged"))
    np.testing.assert_array_equal(merged.maps("stage4"), np.concatenate([maps, maps]))


def test_arrays_are_those_that_numpy_itself_would_write(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "features", sizes=(7,), dtype="float16")
    out = convert(folder, tmp_path / "npy", to="npy")
    expected = io.BytesIO()
    np.save(expected, Features.open(folder).values)
    assert (out / "img_emb" / "img_emb_0.npy").read_bytes() == expected.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_safetensors_are_read_by_safetensors_alone(tmp_path: Path, dtype: str) -> None:
    folder = write_folder(tmp_path / "features", sizes=(5, 0, 8), dtype=dtype)
    out = convert(folder, tmp_path / "safe", to="safetensors")
    features = Features.open(folder)
    shards = sorted(out.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"part-0000{i}-of-00003.safetensors" for i in range(3)]
    tensors = [load_file(shard) for shard in shards]
    for name, expected in (("embedding", features.values), ("id", features.ids), ("label", features.labels)):
        column = np.concatenate([shard[name] for shard in tensors])
        np.testing.assert_array_equal(column, expected)
        assert column.dtype == expected.dtype
    with safe_open(shards[0], framework="pt") as file:
        assert file.get_slice("embedding").get_shape() == [5, 3]
    tables = [pd.read_parquet(path) for path in sorted(out.glob("*.metadata.parquet"))]
    assert pd.concat(tables)["path"].tolist() == features.paths


def test_a_folder_of_clip_retrieval_becomes_features(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float16)
    for name in ("img_emb", "metadata"):
        (tmp_path / "clip" / name).mkdir(parents=True)
    for i, rows in enumerate((slice(0, 4), slice(4, 7))):
        np.save(tmp_path / "clip" / "img_emb" / f"img_emb_{i}.npy", values[rows])
        table = pd.DataFrame(
            {"image_path": [f"{r}.jpg" for r in range(7)][rows], "caption": ["?"] * len(values[rows])}
        )
        table.to_parquet(tmp_path / "clip" / "metadata" / f"metadata_{i}.parquet")
    features = Features.open(convert(tmp_path / "clip", tmp_path / "out", to="parquet"))
    np.testing.assert_array_equal(features.values, values)
    assert features.ids.tolist() == list(range(7)) and features.labels is None
    assert features.paths == [f"{r}.jpg" for r in range(7)]
    assert features.meta == {"input": {"source": str(tmp_path / "clip")}}
    tensors = convert(tmp_path / "clip", tmp_path / "tensors", to="safetensors")
    assert bytes_of(convert(tensors, tmp_path / "same", to="parquet")) == bytes_of(tmp_path / "out")

    (tmp_path / "clip" / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(ValueError, match=r"2 files img_emb/\*.npy and 1 metadata/\*.parquet"):
        convert(tmp_path / "clip", tmp_path / "again", to="parquet")
    (tmp_path / "clip" / "img_emb" / "img_emb_1.npy").unlink()
    pd.DataFrame({"image_path": ["0.jpg"] * 3}).to_parquet(tmp_path / "clip/metadata/metadata_0.parquet")
    with pytest.raises(ValueError, match="has 3 rows, not 4 as its manifest says"):
        convert(tmp_path / "clip", tmp_path / "again", to="parquet")
    np.save(tmp_path / "clip" / "img_emb" / "img_emb_0.npy", np.array([{}]))
    with pytest.raises(ValueError, match="img_emb_0.npy' is no array that can be read"):
        convert(tmp_path / "clip", tmp_path / "again", to="parquet")
    np.save(tmp_path / "clip" / "img_emb" / "img_emb_0.npy", np.arange(4))
    with pytest.raises(ValueError, match=r"int64 \(4,\), but must be float32 or float16 \(N, D\)"):
        convert(tmp_path / "clip", tmp_path / "again", to="parquet")


def test_memory_holds_one_block_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_ROW_GROUP_BYTES", 4 * 3 * 4)
    monkeypatch.setattr(layouts, "_BLOCK_BYTES", 4 * 3 * 4)
    folder = write_folder(tmp_path / "features", sizes=(90, 30))
    for to in ("npy", "safetensors"):
        convert(folder, tmp_path / to, to=to)
    for path in (folder, tmp_path / "npy", tmp_path / "safetensors"):
        blocks = list(FeatureFolder(path).blocks())
        assert max(map(len, blocks)) == 4
        np.testing.assert_array_equal(np.concatenate(blocks), Features.open(folder).values)


@pytest.mark.parametrize("to", ["parquet", "npy", "safetensors"])
def test_damage_is_found_in_every_file_of_every_layout_and_nothing_is_written(
    tmp_path: Path, to: str
) -> None:
    folder = write_folder(tmp_path / "features")
    source = folder if to == "parquet" else convert(folder, tmp_path / "source", to=to)
    target = "npy" if to == "parquet" else "parquet"
    names = [name for name in bytes_of(source) if name != "manifest.json"]
    assert len(names) >= 4
    for name in names:
        whole = (source / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        broken = b"{" if name == "errors.jsonl" else bytes(flipped)
        (source / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name}' is (missing or )?damaged.*Copy the folder again"):
            convert(source, tmp_path / "out", to=target)
        (source / name).unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=f"{name}' is missing"):
            convert(source, tmp_path / "out", to=target)
        (source / name).write_bytes(whole)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    convert(source, tmp_path / "out", to=target)


def test_rows_that_do_not_fit_the_manifest_are_refused_even_with_right_checksums(tmp_path: Path) -> None:
    out = convert(write_folder(tmp_path / "features", sizes=(6,)), tmp_path / "npy", to="npy")
    manifest = read_json(out / "manifest.json")
    np.save(out / "img_emb" / "img_emb_0.npy", np.zeros((5, 3), np.float32))
    manifest["shards"][0]["files"]["img_emb/img_emb_0.npy"] = sha256(out / "img_emb" / "img_emb_0.npy")
    write_json(out / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"'embedding' is float32 \(5, 3\), not float32 \(6, 3\)"):
        convert(out, tmp_path / "back", to="parquet")
    with open(tmp_path / "features" / "errors.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="errors.jsonl' has 3 lines, not 2"):
        FeatureFolder(tmp_path / "features").errors()


@pytest.mark.parametrize("name", ["../x.parquet", "/etc/x.parquet", "a/../../x.parquet", "..", "a/b/c.npy"])
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    out = convert(write_folder(tmp_path / "features"), tmp_path / "npy", to="npy")
    manifest = read_json(out / "manifest.json")
    manifest["shards"][0]["files"] = {name: "0" * 64}
    write_json(out / "manifest.json", manifest)
    with pytest.raises(ValueError, match="manifest.json' names a file"):
        convert(out, tmp_path / "back", to="parquet")


def test_what_is_no_feature_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "features")
    with pytest.raises(FileNotFoundError, match="neither manifest.json nor img_emb/"):
        convert(tmp_path, tmp_path / "out", to="npy")
    with pytest.raises(ValueError, match="Unknown layout 'numpy'. Choose one of: npy"):
        convert(folder, tmp_path / "out", to="numpy")
    with pytest.raises(ValueError, match="is in the layout 'parquet' already"):
        convert(folder, tmp_path / "out", to="parquet")
    with pytest.raises(FileExistsError, match="features' already exists"):
        convert(folder, folder, to="npy")
    for manifest in (
        [],
        {},
        {"format": "mocohub-features/9"},
        {"format": "mocohub-features/1", "shards": [1]},
    ):
        write_json(folder / "manifest.json", manifest)
        with pytest.raises(ValueError, match="manifest.json' does not describe features"):
            convert(folder, tmp_path / "out", to="npy")


# Where it stands


FORK = multiprocessing.get_context("fork")
CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


def start(folder: Path, to: str, kill_at: int | None = None) -> multiprocessing.Process:
    """Change the layout in a process of its own, which kills itself before the n-th change of files."""

    def work() -> None:
        count = itertools.count(1)

        def watch(event: str, args: tuple) -> None:
            if (
                event in CHANGES
                and folder.name in str(args[0])
                and (event != "open" or "w" in (args[1] or ""))
            ):
                if next(count) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        change_layout(folder, to)

    process = FORK.Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize("to", ["npy", "safetensors"])
def test_killed_at_any_change_a_folder_is_whole_and_goes_on_to_the_same_bytes(
    tmp_path: Path, to: str
) -> None:
    original = write_folder(tmp_path / "original", columns=("layer3", "embedding"))
    expected = bytes_of(convert(original, tmp_path / "expected", to=to))
    features = Features.open(original)
    layouts_seen = set()
    for kill_at in range(1, 1000):
        folder = Path(shutil.copytree(original, tmp_path / f"copy-{kill_at}"))
        process = start(folder, to, kill_at)
        process.join()
        layouts_seen.add(FeatureFolder(folder).layout)
        np.testing.assert_array_equal(Features.open(folder).values, features.values)
        change_layout(folder, to)
        assert bytes_of(folder) == expected, kill_at
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kill_at > 20 and layouts_seen == {"parquet", to}
    change_layout(folder, "parquet")
    assert bytes_of(folder) == bytes_of(original)
    assert not any(path.is_dir() for path in folder.iterdir())


def test_several_processes_change_one_folder_at_once(tmp_path: Path) -> None:
    original = write_folder(tmp_path / "original", sizes=(3,) * 12)
    expected = bytes_of(convert(original, tmp_path / "expected", to="npy"))
    for attempt in range(5):
        folder = Path(shutil.copytree(original, tmp_path / f"copy-{attempt}"))
        processes = [start(folder, "npy") for _ in range(4)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert bytes_of(folder) == expected
        processes = [start(folder, "parquet") for _ in range(4)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert bytes_of(folder) == bytes_of(original)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [".", "../link"])
def test_a_folder_changes_its_layout_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "disk").mkdir()
    folder = write_folder(tmp_path / "disk" / "features")
    expected = Features.open(folder).values.copy()
    (tmp_path / "disk" / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    change_layout(name, "npy")
    np.testing.assert_array_equal(Features.open(folder).values, expected)
    assert (folder / "img_emb").is_dir() and {path.name for path in folder.parent.iterdir()} == {
        "features",
        "link",
    }


def test_a_damaged_folder_keeps_its_layout(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "features")
    shard = folder / "part-00000-of-00003.parquet"
    shard.write_bytes(shard.read_bytes().replace(b"x.jpg", b"y.jpg"))
    before = bytes_of(folder)
    with pytest.raises(ValueError, match="part-00000-of-00003.parquet' is damaged"):
        change_layout(folder, "npy")
    assert bytes_of(folder) == before and not list(tmp_path.glob(".*"))


# Merging


def test_merged_folders_are_their_inputs_listed_in_turn(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", sizes=(10, 5), classes=["cat", "dog", "eel"])
    other = write_folder(tmp_path / "b", sizes=(4,), classes=["ant", "dog", "cat"], errors=[], seed=1)
    layout = convert(other, tmp_path / "b_npy", to="npy")
    merged = Features.open(merge([first, layout], tmp_path / "out"))
    a, b = Features.open(first), Features.open(other)
    np.testing.assert_array_equal(merged.values, np.concatenate([a.values, b.values]))
    assert merged.ids.tolist() == a.ids.tolist() + [17 + i for i in range(4)]
    assert merged.paths == a.paths + b.paths
    assert merged.classes == ["ant", "cat", "dog", "eel"]
    names = [f.classes[label] if label >= 0 else None for f in (a, b) for label in f.labels]
    assert [merged.classes[label] if label >= 0 else None for label in merged.labels] == names
    assert None in names and {"ant", "cat", "dog", "eel"} <= set(names)
    assert merged.errors == ERRORS
    counts = [{"source": "photos", "num_inputs": count} for count in (17, 4)]
    assert merged.meta["input"]["merged"] == counts
    assert merged.meta["model"] == META["model"]
    shards = [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert shards == [f"part-0000{i}-of-00003.parquet" for i in range(3)]


def test_errors_of_later_folders_get_their_new_ids(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name, sizes=(10,)) for name in "abc"]
    merged = Features.open(merge(folders, tmp_path / "out"))
    assert [error["id"] for error in merged.errors] == [2, 9, 14, 21, 26, 33]
    assert sorted([*merged.ids.tolist(), *(error["id"] for error in merged.errors)]) == list(range(36))
    again = merge(folders, tmp_path / "again")
    assert bytes_of(again) == bytes_of(tmp_path / "out")


def test_classes_that_are_numbers_are_merged_in_numeric_order(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", classes=["1", "10", "2"])
    b = write_folder(tmp_path / "b", classes=["0", "9", "10"])
    assert Features.open(merge([a, b], tmp_path / "out")).classes == ["0", "1", "2", "9", "10"]


def test_columns_that_only_one_folder_has_are_null_in_the_others(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", sizes=(4,), extras=True, errors=[])
    b = write_folder(tmp_path / "b", sizes=(2,), errors=[])
    out = merge([b, a], tmp_path / "out")
    table = pa.concat_tables(pq.read_table(path, columns=["width"]) for path in sorted(out.glob("*.parquet")))
    assert table["width"].to_pylist() == [None, None, 5, 6, 7, 8]


def test_unlabelled_folders_go_with_labelled_ones_but_nameless_labels_do_not(tmp_path: Path) -> None:
    named = write_folder(tmp_path / "named")
    unlabelled = write_folder(tmp_path / "unlabelled", labels=False, classes=None)
    merged = Features.open(merge([unlabelled, named], tmp_path / "out"))
    assert merged.classes == ["cat", "dog", "été"]
    assert merged.labels.tolist() == [-1] * 15 + Features.open(named).labels.tolist()
    nameless = write_folder(tmp_path / "nameless", classes=None)
    with pytest.raises(ValueError, match="nameless' has labels without class names"):
        merge([named, nameless], tmp_path / "no")
    assert not (tmp_path / "no").exists()
    beyond = write_folder(tmp_path / "beyond", classes=["cat", "dog"])
    with pytest.raises(ValueError, match="beyond' has a label 2, but 2 classes"):
        merge([named, beyond], tmp_path / "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"name": "here/r18", "weights_sha256": "cd"}}, "model .*'ab'.*'cd'"),
        ({"transform": {"text": "Crop"}}, "transform .*Resize.*Crop"),
        ({"normalized": True}, "normalized False and True"),
        ({"flip": True}, "flip None and True"),
        ({"columns": ("layer3",)}, "columns {'embedding': 3} and {'layer3': 3}"),
        ({"dtype": "float16"}, "type float32 and float16"),
        ({"shapes": {"embedding": [3, 1]}}, r"shapes {'embedding': \(3,\)} and {'embedding': \(3, 1\)}"),
    ],
)
def test_features_that_differ_in_kind_are_not_merged(tmp_path: Path, options: dict, message: str) -> None:
    first, other = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", **options)
    with pytest.raises(ValueError, match=f"/a' and '.*/b' cannot be merged: .*{message}"):
        merge([first, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_name_the_input_and_the_circumstances_of_a_model_may_differ(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", versions={"torch": "1"}, computation={"dtype": "float32"})
    model = {"name": "there/r18", "weights_sha256": "ab"}
    other = write_folder(
        tmp_path / "b",
        model=model,
        versions={"torch": "2"},
        computation={"dtype": "float32"},
        input={"source": "x"},
    )
    meta = Features.open(merge([first, other], tmp_path / "out")).meta
    assert "versions" not in meta  # there is no one answer
    assert meta["computation"] == {"dtype": "float32"}
    assert meta["input"] == {
        "source": "a merge of 2 feature folders",
        "paths_sha256": None,
        "merged": [{"source": "photos", "num_inputs": 17}, {"source": "x", "num_inputs": 17}],
    }


def test_merging_needs_two_folders_and_a_free_place(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="nothing to merge: 1 folders were given"):
        merge([first], tmp_path / "out")
    with pytest.raises(FileExistsError, match="a' already exists"):
        merge([first, first], first)
    shutil.rmtree(first / "manifest.json", ignore_errors=True)
    (first / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="a' is not a feature folder"):
        merge([first, first], tmp_path / "out")


def test_manifests_of_all_layouts_say_what_made_the_features(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "features")
    for to in ("npy", "safetensors"):
        manifest = read_json(convert(folder, tmp_path / to, to=to) / "manifest.json")
        assert manifest["format"] == f"mocohub-features-{to}/1" and manifest["meta"] == META
        assert [shard["rows"] for shard in manifest["shards"]] == [10, 0, 5]
        for shard in manifest["shards"]:
            for name, digest in shard["files"].items():
                assert sha256(tmp_path / to / name) == digest
        json.dumps(manifest, allow_nan=False)


@pytest.mark.parametrize("content", ["nothing", "npz", "objects"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_an_array_file_that_is_something_else_is_named(tmp_path, content, has_manifest):
    rows = Features(np.ones((3, 4), np.float32), range(3), ["a", "b", "c"])
    folder = rows.save(tmp_path / "features", format="npy")
    path = folder / "img_emb" / "img_emb_0.npy"
    path.write_bytes(b"")
    if content == "npz":
        np.savez(file := io.BytesIO(), values=np.ones((3, 4), np.float32))
        path.write_bytes(file.getvalue())
    elif content == "objects":
        np.save(path, np.array([{}]))
    if not has_manifest:
        (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="img_emb_0.npy' is no array"):
        Features.open(folder, verify=False)
