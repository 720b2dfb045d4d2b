import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mocohub.features import layouts, mapped, store
from mocohub.features import writer as feature_writer
from mocohub.features.formats import convert
from mocohub.features.store import Features, check_comparable
from mocohub.features.writer import FeatureWriter
from mocohub.files import read_json, sha256, write_json
from mocohub.probes.knn import KNNProbe
from mocohub.probes.linear import LinearProbe

META = {"model": {"name": "r18"}, "normalized": False}


def make_features(num_rows=25, num_features=6, dtype=np.float32, **columns):
    """Features of every input but the third, which is an error."""
    values = np.random.default_rng(0).standard_normal((num_rows, num_features)).astype(dtype)
    ids = np.delete(np.arange(num_rows + 1), 2)
    columns = {
        "labels": ids % 3,
        "classes": ["cat", "dog", "été"],
        "errors": [{"id": 2, "path": "cut/2.jpg", "reason": "truncated"}],
        "meta": META,
        **columns,
    }
    return Features(values, ids, [f"dög/{i} x.jpg" for i in ids], **columns)


@pytest.fixture
def folder(tmp_path):
    return make_features().save(tmp_path / "features", rows_per_shard=10)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_and_open_return_the_same_features(tmp_path, dtype):
    features = make_features(dtype=dtype)
    opened = Features.open(features.save(tmp_path / "features", rows_per_shard=10))
    np.testing.assert_array_equal(opened.values, features.values)
    assert opened.values.dtype == dtype
    np.testing.assert_array_equal(opened.ids, features.ids)
    np.testing.assert_array_equal(opened.labels, features.labels)
    for name in ("paths", "classes", "errors", "meta"):
        assert getattr(opened, name) == getattr(features, name)
    assert len(opened) == 25
    assert repr(opened) == repr(features) == f"Features(25 x 6 {dtype}, 1 errors)"


def test_features_are_arrays_to_numpy_and_scikit_learn(folder):
    features = Features.open(folder)
    X, y = features.values, np.arange(25) % 2
    np.testing.assert_array_equal(np.asarray(features), X)
    assert np.asarray(features, np.float64).dtype == np.float64
    for probe in (KNNProbe(k=3), LinearProbe("lbfgs"), make_pipeline(StandardScaler(), KNNProbe(k=3))):
        expected = clone(probe).fit(X, y).predict_proba(X)
        np.testing.assert_array_equal(clone(probe).fit(features, y).predict_proba(features), expected)


def test_row_groups_shorter_than_what_is_written_at_once_keep_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_writer, "_ROW_GROUP_BYTES", 4 * 6 * 4)
    features = make_features()
    folder = features.save(tmp_path / "features", rows_per_shard=10)
    groups = [pq.ParquetFile(shard).num_row_groups for shard in sorted(folder.glob("*.parquet"))]
    assert groups == [3, 3, 2]
    np.testing.assert_array_equal(Features.open(folder).values, features.values)


def test_files_do_not_depend_on_the_portions_in_which_rows_come(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_writer, "_ROW_GROUP_BYTES", 4 * 6 * 4)
    features = make_features()
    hashes = []
    for portion in (1, 3, 25):
        folder = tmp_path / str(portion)
        folder.mkdir()
        writer = FeatureWriter(folder, num_shards=1, classes=None, meta={})
        for i in range(0, 25, portion):
            rows = slice(i, i + portion)
            writer.write(0, features.ids[rows], features.paths[rows], None, features.values[rows])
        writer.close(features.errors, num_inputs=26)
        hashes.append([sha256(file) for file in sorted(folder.iterdir())])
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_shard_whose_inputs_all_failed_is_an_empty_file(tmp_path):
    writer = FeatureWriter(tmp_path, num_shards=4, classes=None, meta={})
    for shard in (1, 2):
        writer.write(shard, np.array([shard]), [f"{shard}.jpg"], None, np.full((1, 3), shard, np.float32))
    errors = [{"id": i, "path": f"{i}.jpg", "reason": "empty"} for i in (0, 3)]
    writer.close(errors, num_inputs=4)
    assert [shard["rows"] for shard in read_json(tmp_path / "manifest.json")["shards"]] == [0, 1, 1, 0]
    assert Features.open(tmp_path).values.tolist() == [[1, 1, 1], [2, 2, 2]]


def test_the_writer_asserts_that_no_input_is_lost(tmp_path):
    writer = FeatureWriter(tmp_path, num_shards=1, classes=None, meta={})
    writer.write(0, np.array([0]), ["a"], None, np.zeros((1, 2), np.float32))
    with pytest.raises(AssertionError, match="1 rows"):
        writer.close([], num_inputs=2)


def test_shards_are_plain_parquet_for_pyarrow_and_pandas(folder):
    table = pq.read_table(folder / "part-00002-of-00003.parquet")
    assert [f"{field.name}: {field.type}" for field in table.schema] == [
        "id: int64",
        "path: string",
        "label: int64",
        "embedding: fixed_size_list<element: float not null>[6]",
    ]
    frame = pd.concat([pd.read_parquet(shard) for shard in sorted(folder.glob("*.parquet"))])
    features = make_features()
    np.testing.assert_array_equal(np.stack(frame["embedding"]), features.values)
    assert frame["path"].tolist() == features.paths
    assert frame["id"].tolist() == features.ids.tolist()


def test_lists_that_may_hold_nulls_as_earlier_versions_wrote_them_are_read(folder):
    for shard in folder.glob("*.parquet"):
        table = pq.read_table(shard)
        kind = pa.list_(pa.float32(), 6)
        nullable = pa.FixedSizeListArray.from_arrays(table["embedding"].combine_chunks().flatten(), type=kind)
        schema = table.schema.set(3, pa.field("embedding", kind))
        columns = [*(table[name] for name in ("id", "path", "label")), nullable]
        pq.write_table(pa.table(columns, schema=schema), shard)
    opened = Features.open(folder, verify=False)
    np.testing.assert_array_equal(opened.values, make_features().values)
    np.testing.assert_array_equal(np.concatenate(list(opened.blocks())), make_features().values)


def test_missing_labels_are_null_on_disk_minus_one_in_arrays_and_na_in_pandas(tmp_path):
    labels = np.where(np.arange(25) == 4, -1, 1)
    folder = make_features(labels=labels).save(tmp_path / "features")
    column = pq.read_table(folder / "part-00000-of-00001.parquet")["label"]
    assert column.null_count == 1 and column[4].as_py() is None
    opened = Features.open(folder)
    np.testing.assert_array_equal(opened.labels, labels)
    frame = opened.to_pandas()
    assert list(frame.columns) == ["id", "path", "label", "embedding"]
    assert frame["label"].isna().tolist() == (labels == -1).tolist()
    np.testing.assert_array_equal(frame["embedding"][7], opened.values[7])


def test_features_without_labels_come_back_without_labels(tmp_path):
    opened = Features.open(make_features(labels=None, classes=None).save(tmp_path / "features"))
    assert opened.labels is None and opened.classes is None
    assert opened.to_pandas()["label"].isna().all()


def test_zero_rows_can_be_saved(tmp_path):
    features = Features(np.empty((0, 3), np.float32), [], [])
    assert Features.open(features.save(tmp_path / "features")).values.shape == (0, 3)


@pytest.mark.parametrize("rows", [0, -1])
def test_shards_without_rows_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=f"rows_per_shard is {rows}, but must be at least 1"):
        make_features().save(tmp_path / "features", rows_per_shard=rows)
    assert not list(tmp_path.iterdir())


def test_to_pandas_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        make_features().to_pandas()


def test_save_does_not_overwrite(folder):
    with pytest.raises(FileExistsError, match="already exists"):
        make_features().save(folder)


@pytest.mark.parametrize(
    "values", [np.zeros((2, 3)), np.zeros(3, np.float32), np.zeros((2, 3), np.int64)], ids=str
)
def test_values_of_another_type_or_shape_are_refused(values):
    with pytest.raises(ValueError, match="must be float32 or float16 of shape"):
        Features(values, range(len(values)), ["x"] * len(values))


@pytest.mark.parametrize("column", ["ids", "paths", "labels"])
def test_columns_of_another_length_are_refused(column):
    columns = {"ids": [0, 1], "paths": ["a", "b"], "labels": [0, 0]}
    columns[column] = columns[column][:1]
    with pytest.raises(ValueError, match=f"{column} has 1 entries, but values has 2 rows"):
        Features(np.zeros((2, 3), np.float32), **columns)


def test_an_id_in_two_places_is_refused():
    with pytest.raises(ValueError, match="occurs twice"):
        make_features(errors=[{"id": 7, "path": "7.jpg", "reason": "?"}])


@pytest.mark.parametrize("what", ["nothing", "empty folder", "file"])
def test_what_is_not_a_feature_folder_is_refused(tmp_path, what):
    if what == "empty folder":
        (tmp_path / "x").mkdir()
    elif what == "file":
        (tmp_path / "x").write_text("hello")
    with pytest.raises(FileNotFoundError, match="is not a feature folder.*extract --out"):
        Features.open(tmp_path / "x")


def test_an_extraction_that_has_not_finished_is_named_as_such(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has not finished. Run the same `mocohub extract` again"):
        Features.open(tmp_path)


def test_a_manifest_of_another_format_is_refused(folder):
    write_json(folder / "manifest.json", {"format": "mocohub-features/9"})
    with pytest.raises(ValueError, match="mocohub-features/9.*update mocohub"):
        Features.open(folder)


def test_a_manifest_that_lacks_a_fact_is_refused(folder):
    manifest = read_json(folder / "manifest.json")
    del manifest["dtype"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(ValueError, match="does not say dtype"):
        Features.open(folder)


def test_a_manifest_that_points_outside_the_folder_is_refused(folder):
    manifest = read_json(folder / "manifest.json")
    manifest["shards"][0]["file"] = "../part-00000-of-00003.parquet"
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"names a file '\.\./part"):
        Features.open(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "part-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="part-00001-of-00003.parquet' is missing"):
        Features.open(folder)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_one_flipped_bit_in_a_shard_is_found(folder, share):
    shard = folder / "part-00001-of-00003.parquet"
    data = bytearray(shard.read_bytes())
    data[int(share * len(data))] ^= 4
    shard.write_bytes(data)
    with pytest.raises(
        ValueError, match="part-00001-of-00003.parquet' is damaged.*extract the features again"
    ):
        Features.open(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard_is_found(folder, verify):
    shard = folder / "part-00000-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match="part-00000-of-00003.parquet' is damaged"):
        Features.open(folder, verify=verify)


def test_a_shard_of_another_extraction_is_found_even_without_checksums(folder, tmp_path):
    other = make_features(meta={**META, "normalized": True}).save(tmp_path / "other", rows_per_shard=10)
    shutil.copy(other / "part-00001-of-00003.parquet", folder)
    with pytest.raises(ValueError, match="another extraction"):
        Features.open(folder, verify=False)


def test_an_error_list_that_lacks_a_line_is_found(folder):
    (folder / "errors.jsonl").write_text("")
    with pytest.raises(ValueError, match="errors.jsonl' has 0 lines, not 1"):
        Features.open(folder)


def test_a_damaged_or_missing_error_list_is_named(folder):
    (folder / "errors.jsonl").write_text('{"id": 2, "pa')
    with pytest.raises(ValueError, match="errors.jsonl' is damaged"):
        Features.open(folder)
    (folder / "errors.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="errors.jsonl' is missing"):
        Features.open(folder)


def test_the_manifest_and_every_shard_say_what_made_the_features(folder):
    manifest = read_json(folder / "manifest.json")
    assert manifest["meta"] == META
    assert (manifest["num_inputs"], manifest["rows"], manifest["errors"]) == (26, 25, 1)
    for shard in manifest["shards"]:
        metadata = json.loads(pq.read_schema(folder / shard["file"]).metadata[b"mocohub"])
        assert metadata["meta"] == META and metadata["num_features"] == 6


def test_targets_are_class_names_and_need_a_label_for_every_row() -> None:
    values = np.ones((2, 3), np.float32)
    named = Features(values, [0, 1], ["x", "y"], labels=[1, 0], classes=["cat", "dog"])
    assert named.targets.tolist() == ["dog", "cat"]
    assert Features(values, [0, 1], ["x", "y"], labels=[7, 5]).targets.tolist() == [7, 5]
    with pytest.raises(ValueError, match="1 of 2 rows have no label.*sub-folder for each class"):
        _ = Features(values, [0, 1], ["x", "y"], labels=[1, -1], classes=["cat", "dog"]).targets
    with pytest.raises(ValueError, match="2 of 2 rows have no label"):
        _ = Features(values, [0, 1], ["x", "y"]).targets


def test_several_columns_and_extras_survive_a_folder(tmp_path):
    rows = make_features()
    extras = {"width": [640, *[None] * 24], "content_sha256": ["ab"] * 25}
    columns = {"layer1.0": rows.values[:, :2], "embedding": rows.values}
    features = Features(columns, rows.ids, rows.paths, rows.labels, rows.classes, rows.errors, META, extras)
    opened = Features.open(features.save(tmp_path / "features", rows_per_shard=10))
    assert opened.columns == {"layer1.0": 2, "embedding": 6} and opened.extras == extras
    assert repr(opened) == "Features(25 x 2, embedding: 6 float32, 1 errors)"
    for name, values in columns.items():
        np.testing.assert_array_equal(opened[name], values)
        np.testing.assert_array_equal(opened.to_torch(name).numpy(), values)
    np.testing.assert_array_equal(opened.values, columns["layer1.0"])
    assert list(opened.to_pandas().columns) == ["id", "path", "label", *extras, *columns]
    with pytest.raises(ValueError, match="Unknown column 'layer1'. Choose one of: layer1.0, embedding"):
        opened["layer1"]
    with pytest.raises(
        TypeError, match="indexed by a column's name, as features.'layer1.0'., not by 0. Rows"
    ):
        opened[0]


def test_maps_are_stored_flat_and_come_back_in_their_shape(tmp_path):
    maps = np.random.default_rng(1).normal(size=(25, 4, 3, 2)).astype(np.float16)
    rows = make_features(dtype=np.float16)
    columns = {"stage4": maps.reshape(25, 24), "embedding": rows.values}
    features = Features(columns, rows.ids, rows.paths, shapes={"stage4": [4, 3, 2]}, errors=rows.errors)
    folder = features.save(tmp_path / "features", rows_per_shard=10)
    manifest = read_json(folder / "manifest.json")
    assert manifest["format"] == "mocohub-features/3" and manifest["shapes"] == {"stage4": [4, 3, 2]}
    for found in (features, Features.open(folder)):
        assert found.shapes == {"stage4": (4, 3, 2)} and found.values.shape == (25, 24)
        np.testing.assert_array_equal(found.maps("stage4"), maps)
        np.testing.assert_array_equal(found.maps(), maps)
        np.testing.assert_array_equal(found.maps("embedding"), rows.values)
        np.testing.assert_array_equal(found.to_torch("stage4").numpy(), maps)
        np.testing.assert_array_equal(found.to_pandas()["stage4"][7], maps[7])
    flat = pq.read_table(folder / "part-00000-of-00003.parquet")["stage4"]
    assert str(flat.type) == "fixed_size_list<element: halffloat not null>[24]"


def test_a_shape_that_does_not_fit_its_column_is_refused():
    values = np.zeros((2, 12), np.float32)
    for shapes in ({"embedding": (3, 5)}, {"stage4": (3, 4)}):
        with pytest.raises(ValueError, match=r"shapes says \(3, .\) of .*Flatten maps"):
            Features(values, [0, 1], ["x", "y"], shapes=shapes)


def test_a_folder_of_the_embedding_alone_is_what_older_versions_read(folder):
    manifest = read_json(folder / "manifest.json")
    assert manifest["format"] == "mocohub-features/1" and not {"columns", "shapes"} & manifest.keys()


def test_columns_that_do_not_fit_together_are_refused():
    first = np.zeros((2, 3), np.float32)
    for second in (np.zeros((3, 3), np.float32), np.zeros((2, 3), np.float16)):
        with pytest.raises(ValueError, match=r"values\['b'\] is . rows of float.*one length and type"):
            Features({"a": first, "b": second}, [0, 1], ["x", "y"])
    with pytest.raises(ValueError, match="values has no column"):
        Features({}, [], [])


def test_blocks_give_all_rows_without_reading_them_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_writer, "_ROW_GROUP_BYTES", 4 * 6 * 4)
    features = make_features()
    opened = Features.open(features.save(tmp_path / "other", rows_per_shard=10))
    monkeypatch.setattr(layouts, "_BLOCK_BYTES", 6 * 6 * 4)  # more than one row group
    monkeypatch.setattr(store, "_BLOCK_BYTES", 6 * 6 * 4)
    blocks = list(opened.blocks())
    assert [len(block) for block in blocks] == [8, 2, 8, 2, 5] and not opened._values
    assert [len(block) for block in features.blocks()] == [6, 6, 6, 6, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), features.values)
    np.testing.assert_array_equal(np.concatenate(list(features.blocks("embedding"))), features.values)
    with pytest.raises(ValueError, match="Unknown column 'head'"):
        next(opened.blocks("head"))


# On disk


@pytest.fixture(params=["parquet", "npy", "npy in one file", "safetensors", "safetensors in one file"])
def stored(request, tmp_path):
    layout, _, one = request.param.partition(" ")
    return make_features().save(tmp_path / "features", rows_per_shard=100 if one else 10, format=layout)


def test_save_writes_what_convert_writes(tmp_path):
    plain = make_features().save(tmp_path / "plain", rows_per_shard=10)
    for layout in ("npy", "safetensors"):
        saved = make_features().save(tmp_path / "saved" / layout, rows_per_shard=10, format=layout)
        converted = convert(plain, tmp_path / layout, to=layout)
        files = [
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (saved, converted)
        ]
        assert files[0] == files[1]
        assert [path.name for path in saved.parent.iterdir() if path.name[0] == "."] == []
    with pytest.raises(ValueError, match="Unknown format 'numpy'. Choose one of: npy"):
        make_features().save(tmp_path / "other", format="numpy")
    assert not (tmp_path / "other").exists()


def test_every_layout_is_opened_and_its_values_are_on_disk(stored):
    before = sorted(path.name for path in stored.rglob("*"))
    opened, features = Features.open(stored), make_features()
    assert isinstance(opened.values, np.memmap) and opened.values is opened.values
    np.testing.assert_array_equal(opened.values, features.values)
    for name in ("ids", "labels"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(features, name))
    for name in ("paths", "classes", "errors", "meta", "extras", "columns"):
        assert getattr(opened, name) == getattr(features, name)
    assert sorted(path.name for path in stored.rglob("*")) == before


def test_to_change_values_changes_no_file(stored):
    opened = Features.open(stored)
    opened.values[:] = 7
    assert (opened.to_torch() == 7).all()
    np.testing.assert_array_equal(Features.open(stored).values, make_features().values)


def test_one_array_in_one_file_is_mapped_where_it_is(tmp_path):
    folder = make_features().save(tmp_path / "features")
    files = {"npy": "npy/img_emb/img_emb_0.npy", "safetensors": "safetensors/part-00000-of-00001.safetensors"}
    for layout, name in files.items():
        values = Features.open(convert(folder, tmp_path / layout, to=layout)).values
        assert Path(values.filename) == tmp_path / name


def test_clip_retrievals_own_folder_is_opened(tmp_path):
    for name in ("img_emb", "metadata"):
        (tmp_path / name).mkdir()
    expected = make_features(dtype=np.float16).values
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", expected)
    table = pd.DataFrame({"image_path": [f"{i}.jpg" for i in range(25)], "label": ["cat"] * 25})
    table.to_parquet(tmp_path / "metadata" / "metadata_0.parquet")
    opened = Features.open(tmp_path)
    np.testing.assert_array_equal(opened.values, expected)
    assert opened.ids.tolist() == list(range(25)) and opened.row("7.jpg") == 7
    assert opened.labels is None and opened.errors == []  # words are no class numbers
    with pytest.raises(ValueError, match="img_emb_0.npy' is no array.*rows do not follow one another"):
        np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.asfortranarray(expected))
        Features.open(tmp_path)


def test_processes_of_joblib_read_values(folder):
    joblib = pytest.importorskip("joblib")
    values = Features.open(folder).values
    found = joblib.Parallel(2, max_nbytes=1)(joblib.delayed(np.sum)(values[i::2]) for i in range(2))
    np.testing.assert_allclose(found, [make_features().values[i::2].sum() for i in range(2)], rtol=1e-5)


def test_the_copy_is_made_in_the_folder_or_where_temporary_files_are(folder, tmp_path, monkeypatch):
    def place():
        values = Features.open(folder).values
        return Path(os.readlink(values.filename)).parent

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(mapped.tempfile, "tempdir", str(elsewhere))
    assert place() == folder
    room = {folder: 25 * 6 * 4, elsewhere: 25 * 6 * 4 + 1}  # one must be left
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda path: usage._replace(free=room[path]))
    assert place() == elsewhere
    room[elsewhere] = 0
    with pytest.raises(RuntimeError, match=r"need 0.0 GB .*set TMPDIR .* or use blocks\(\)"):
        _ = Features.open(folder).values
    assert sum(map(len, Features.open(folder).blocks())) == 25


def test_a_disk_that_is_full_meanwhile_is_an_error_with_the_way_out(tmp_path):
    def blocks():
        yield np.zeros((1, 2), np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RuntimeError, match=r"set TMPDIR .* or use blocks\(\)"):
        mapped.mapped(blocks(), (2, 2), np.dtype("float32"), tmp_path)


MEMORY = """
import re, sys
from pathlib import Path
from mocohub.features.store import Features

def megabytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

features = Features.open(sys.argv[1], verify=False)
before, own = megabytes("VmRSS"), megabytes("RssAnon")
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
values = features.values
print(megabytes("VmHWM") - before)
print(sum(float(values[i : i + 1000].sum()) for i in range(0, len(values), 1000)) > 0)
print(megabytes("RssAnon") - own)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_features(tmp_path):
    writer = FeatureWriter(tmp_path, num_shards=1, classes=None, meta={})
    for start in range(0, 80_000, 1000):
        ids = np.arange(start, start + 1000)
        writer.write(0, ids, ["x"] * 1000, None, np.ones((1000, 1024), np.float32))
    writer.close([], num_inputs=80_000)  # 328 MB
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    # As on one core: pyarrow decodes as many row groups at once as there are threads, and keeps their memory.
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    made, walked, kept = run.stdout.split()
    assert walked == "True"
    assert float(made) < 250 and float(kept) < 250, (made, kept)


def test_rows_are_found_by_path(folder):
    opened = Features.open(folder)
    assert opened.paths[opened.row("dög/17 x.jpg")] == "dög/17 x.jpg"
    with pytest.raises(KeyError, match="'cut/2.jpg' has no features: truncated"):
        opened.row("cut/2.jpg")
    with pytest.raises(KeyError, match="it is not among the images"):
        opened.row("nowhere.jpg")
    twice = Features(np.zeros((2, 1), np.float32), [0, 1], ["x", "x"])
    assert twice.row("x") == 0


def test_ids_of_a_folder_are_checked_when_they_are_used(folder):
    (folder / "errors.jsonl").write_text('{"id": 7, "path": "7.jpg", "reason": "?"}\n')
    manifest = read_json(folder / "manifest.json")
    del manifest["errors_sha256"]  # as in folders of older versions
    write_json(folder / "manifest.json", manifest)
    opened = Features.open(folder)
    with pytest.raises(ValueError, match="occurs twice"):
        _ = opened.ids


def test_features_of_different_models_are_not_compared() -> None:
    def features(width: int = 3, **meta: object) -> Features:
        return Features(np.ones((1, width), np.float32), [0], ["x"], meta=meta)

    check_comparable(features(model={"name": "a", "sha": 1}), features(model={"name": "b", "sha": 1}))
    check_comparable(features(), features(normalized=True))
    for other, message in [
        (features(width=4), "3 and 4 features wide"),
        (features(model={"sha": 2}), "model {'sha': 1} and {'sha': 2}"),
        (features(normalized=True), "normalized False and True"),
        (features(flip=True), "flip False and True"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_comparable(features(model={"sha": 1}, normalized=False, flip=False), other)
    exact, fast = features(transform={"text": "T"}), features(transform={"text": "T", "fast_decode_px": 32})
    with pytest.raises(ValueError, match="comparable: transform {} and {'fast_decode_px': 32}. Extract"):
        check_comparable(exact, fast)
