"""Extractions from tar shards that are streamed: one shard of the folder for each tar, read once."""

import collections
import io
import os
import re
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from mocohub.cli.features import features_ as features_verb
from mocohub.features import loading, stream
from mocohub.features.extract import extract, write_plan
from mocohub.features.formats import convert, merge
from mocohub.features.inputs import Inputs
from mocohub.features.store import Features
from mocohub.files import read_json
from mocohub.shard_reader import IDS_PER_SHARD, ShardError, read_samples, read_shard
from mocohub.shards import list_shards
from mocohub.sources import list_images
from mocohub.tars import ForwardFile
from tests.helpers.shards import make_tar, tar_bytes

STEP = IDS_PER_SHARD


class Colours(nn.Module):
    """Mean and variance of each channel."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.var((2, 3))], 1)


OPTIONS = {
    "batch_size": 4,
    "num_workers": 0,
    "transform": transforms.ToTensor(),
    "dtype": "float32",
    "progress": False,
}


def png(value):
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def members(start, stop, folders=("cat", "dog")):
    return {f"{folders[i % len(folders)]}/{i:03d}.png": png(i) for i in range(start, stop)}


@pytest.fixture
def tars(tmp_path):
    """Three tars: 8 images, which is two whole batches; 9, one of them no image; 3."""
    folder = tmp_path / "tars"
    folder.mkdir()
    make_tar(folder / "0.tar", members(0, 8))
    make_tar(folder / "1.tar", {**members(8, 16), "dog/016.png": b"no image"})
    make_tar(folder / "2.tar", members(17, 20))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_at_once(folder):
    """Features of the images that `list_images` finds in the tars of a folder, computed one at a time."""
    listed = list_images(folder)
    rows, paths, labels = [], [], []
    for i, path in enumerate(listed.paths):
        try:
            image = listed.decode(i)
        except ValueError:
            continue
        rows.append(Colours()(transforms.ToTensor()(image)[None])[0].numpy())
        paths.append(path)
        labels.append(None if listed.labels is None else listed.labels[i])
    return np.stack(rows), paths, labels, listed.classes


def test_rows_are_those_of_the_listed_images_with_the_ids_of_training(tars, tmp_path):
    values, paths, labels, classes = all_at_once(tars)
    out = tmp_path / "features"
    opened = extract(Colours(), tars, out=out, **OPTIONS)
    for features in (opened, extract(Colours(), tars, **OPTIONS), Features.open(out)):
        np.testing.assert_allclose(features.values, values, rtol=1e-5, atol=1e-6)
        assert features.paths == paths
        assert features.labels.tolist() == labels and features.classes == classes == ["cat", "dog"]
        assert features.targets.tolist() == [classes[label] for label in labels]
        assert features.extras["width"] == [6] * 19
        assert [(e["id"], e["path"]) for e in features.errors] == [(STEP + 8, "1.tar/dog/016.png")]
    training = [k * STEP + image.index for k in range(3) for image in read_shard(str(tars / f"{k}.tar"))]
    assert sorted([*opened.ids.tolist(), STEP + 8]) == training
    manifest = read_json(out / "manifest.json")
    assert (manifest["num_inputs"], manifest["rows"], manifest["errors"]) == (20, 19, 1)
    assert [(s["file"], s["rows"]) for s in manifest["shards"]] == [
        (f"part-0000{k}-of-00003.parquet", rows) for k, rows in enumerate((8, 8, 3))
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_no_byte(tars, tmp_path, num_workers):
    for workers in (0, num_workers):
        options = {**OPTIONS, "num_workers": workers, "content_hash": True}
        extract(Colours(), tars, out=tmp_path / str(workers), **options)
    assert contents(tmp_path / "0") == contents(tmp_path / str(num_workers))


def test_each_tar_is_opened_once_and_never_read_backwards(tars, tmp_path, monkeypatch):
    opened, position = collections.Counter(), {}
    read_piece = ForwardFile._read_piece

    def counted(file, size):
        if id(file) not in position:
            opened[file.url.rpartition("/")[2]] += 1
            position[id(file)] = file  # kept, so that no other gets its id
        return read_piece(file, size)

    monkeypatch.setattr(ForwardFile, "_read_piece", counted)
    write_plan(Colours(), tars, out=tmp_path / "features", **OPTIONS)
    assert not opened
    extract(Colours(), tars, out=tmp_path / "features", **OPTIONS)
    # The first images of all are looked at before, to choose how to compute.
    assert opened == {"0.tar": 2, "1.tar": 1, "2.tar": 1}


def test_a_plan_of_a_hundred_thousand_tars_opens_none_of_them(tmp_path):
    seen, active = [], True
    sys.addaudithook(lambda event, args: seen.append(args[0]) if event == "open" and active else None)
    names = "memory://bucket/{00000..99999}.tar"
    file = write_plan(Colours(), names, out=tmp_path / "features", **OPTIONS)
    active = False
    assert not [path for path in seen if str(path).endswith(".tar")]
    plan = read_json(file)
    assert (plan["num_shards"], plan["num_inputs"], plan["rows_per_shard"]) == (100_000, None, None)
    assert plan["input_fingerprint"] == list_shards(names).fingerprint()


def test_tars_behind_urls_give_the_same_bytes_but_for_their_source(tars, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for path in tars.iterdir():
        memory.pipe(f"/streamed/{path.name}", path.read_bytes())
    local = extract(Colours(), tars, **OPTIONS)
    there = extract(Colours(), "memory://streamed/{0..2}.tar", out=tmp_path / "x", **OPTIONS)
    np.testing.assert_array_equal(there.values, local.values)
    assert there.paths == local.paths and there.ids.tolist() == local.ids.tolist()
    memory.rm("/streamed", recursive=True)


@pytest.mark.parametrize("number_of", [{"cat": "7", "dog": "10"}, {"cat": "cat", "dog": "a dog"}])
@pytest.mark.parametrize("cls_first", [False, True])
def test_classes_stand_beside_images_in_any_order(tmp_path, number_of, cls_first):
    folder = tmp_path / "tars"
    folder.mkdir()
    for k in range(2):
        files = {}
        for i in range(6 * k, 6 * k + 6):
            label = number_of["cat" if i % 3 else "dog"].encode()
            sample = [
                (f"x/{i:03d}.png", png(i)),
                (f"x/{i:03d}.cls", label + b"\n"),
                (f"x/{i:03d}.json", b"{}"),
            ]
            files |= dict(sample[::-1] if cls_first else sample)
        files[f"x/{99 + k:03d}.png"] = png(99)  # without a class beside it
        make_tar(folder / f"{k}.tar", files)
    _, paths, labels, classes = all_at_once(folder)
    features = extract(Colours(), folder, out=tmp_path / "features", **OPTIONS)
    assert features.paths == paths
    known = [i for i, label in enumerate(labels) if label is not None]
    assert len(known) == 12
    names = [features.extras["class_name"][i] for i in known]
    assert names == [classes[labels[i]] for i in known]
    assert features.extras["class_name"][6] == "x"  # its folder
    if "7" in number_of.values():
        assert classes == ["7", "10"]  # in numeric order


def test_one_folder_in_all_tars_is_no_class(tmp_path):
    for k in range(2):
        make_tar(tmp_path / f"{k}.tar", members(4 * k, 4 * k + 4, folders=["images"]))
    features = extract(Colours(), [tmp_path / "0.tar", tmp_path / "1.tar"], **OPTIONS)
    assert features.labels is None and features.classes is None
    with pytest.raises(ValueError, match="8 of 8 rows have no label"):
        _ = features.targets


def test_classes_survive_save_convert_and_merge_and_ids_stay_apart(tars, tmp_path):
    streamed = extract(Colours(), tars, out=tmp_path / "streamed", **OPTIONS)
    extract(Colours(), tars / "0.tar", out=tmp_path / "listed", **OPTIONS)
    streamed.save(tmp_path / "saved")
    convert(tmp_path / "streamed", tmp_path / "npy", to="npy")
    convert(tmp_path / "npy", tmp_path / "back", to="parquet")
    for name in ("saved", "back"):
        again = Features.open(tmp_path / name)
        assert again.targets.tolist() == streamed.targets.tolist() and again.classes == streamed.classes
    merge([tmp_path / "streamed", tmp_path / "listed", tmp_path / "streamed"], tmp_path / "merged")
    merged = Features.open(tmp_path / "merged")
    listed = Features.open(tmp_path / "listed")
    assert merged.targets.tolist() == [*streamed.targets, *listed.targets, *streamed.targets]
    assert len(set(merged.ids.tolist())) == len(merged) == 46 and len(merged.errors) == 2
    features_verb("verify", (str(tmp_path / "merged"),))


def test_two_tars_of_one_name_have_their_folders_in_the_paths(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "tars" / folder).mkdir(parents=True)
        make_tar(tmp_path / "tars" / folder / "0.tar", members(0, 2))
    features = extract(Colours(), tmp_path / "tars", **OPTIONS)
    assert features.paths == [f"{f}/0.tar/{name}" for f in "ab" for name in ("cat/000.png", "dog/001.png")]


def test_a_damaged_tar_gives_its_good_images_an_error_and_a_shard_that_is_retried_when_asked(
    tars, tmp_path, capsys
):
    good = (tars / "1.tar").read_bytes()
    extract(Colours(), tars, out=tmp_path / "undisturbed", **OPTIONS)
    (tars / "1.tar").write_bytes(
        good[: 5 * 1024 + 700]
    )  # inside the sixth image, each of 1 KB with its header
    out = tmp_path / "features"
    features = extract(Colours(), tars, out=out, **OPTIONS)
    whole = len([path for path in features.paths if path.startswith("1.tar")])
    assert 0 < whole < 8 and len(features) == 8 + whole + 3
    (error,) = features.errors
    assert (error["id"], error["path"]) == (STEP + whole, "1.tar")
    assert "it has been cut" in error["reason"] and "1.tar' cannot be read beyond byte" in error["reason"]
    manifest = read_json(out / "manifest.json")
    assert [shard.get("incomplete") for shard in manifest["shards"]] == [None, "1.tar", None]
    assert manifest["num_inputs"] == len(features) + 1
    features_verb("info", (str(out),))
    assert 'incomplete          ["1.tar"]' in capsys.readouterr().out
    features_verb("verify", (str(out),))

    convert(out, tmp_path / "npy", to="npy")
    convert(tmp_path / "npy", tmp_path / "back", to="parquet")
    merge([out, out], tmp_path / "merged")
    for name, times in (("npy", 1), ("back", 1), ("merged", 2)):
        shards = read_json(tmp_path / name / "manifest.json")["shards"]
        assert [shard.get("incomplete") for shard in shards] == [None, "1.tar", None] * times

    before = contents(out)
    extract(Colours(), tars, out=out, **OPTIONS)
    assert contents(out) == before  # the same call leaves it: nobody said that anything is repaired
    extract(Colours(), tars, out=out, retry_damaged=True, **OPTIONS)
    assert contents(out) == before  # nothing was
    (tars / "1.tar").write_bytes(good)
    for path in out.glob("*.parquet"):
        os.utime(path, (0, 0))  # or a file system with coarse times would show one time for two writes
    extract(Colours(), tars, out=out, retry_damaged=True, **OPTIONS)
    assert contents(out) == contents(tmp_path / "undisturbed")
    changed = [path.name for path in out.glob("*.parquet") if path.stat().st_mtime]
    assert changed == ["part-00001-of-00003.parquet"]


def test_damaged_tars_of_an_extraction_under_way_are_retried_too(tars, tmp_path):
    extract(Colours(), tars, out=tmp_path / "undisturbed", **OPTIONS)
    good = (tars / "0.tar").read_bytes()
    (tars / "0.tar").unlink()
    shards = list_shards([tars / "1.tar", tars / "2.tar"])
    shards.urls.insert(0, str(tars / "0.tar"))  # gone since it was listed
    shards.names.insert(0, "0.tar")
    out = tmp_path / "features"
    features = extract(Colours(), shards, out=out, shard="0/2", **OPTIONS)
    assert [(e["id"], e["path"]) for e in features.errors] == [(0, "0.tar")]
    assert "there is no such file" in features.errors[0]["reason"]
    (tars / "0.tar").write_bytes(good)
    extract(Colours(), tars, out=out, retry_damaged=True, **OPTIONS)
    found, expected = contents(out), contents(tmp_path / "undisturbed")
    plans = [read_json(tmp_path / name / "plan.json") for name in ("features", "undisturbed")]
    for files, plan in zip((found, expected), plans, strict=True):
        plan["meta"]["input"].pop("source")
        del files["plan.json"], files["manifest.json"]
    assert plans[0] == plans[1]
    assert found.keys() == expected.keys() and found["errors.jsonl"] == expected["errors.jsonl"]


def test_in_another_layout_nothing_is_retried(tars, tmp_path):
    (tars / "1.tar").write_bytes((tars / "1.tar").read_bytes()[:3000])
    extract(Colours(), tars, out=tmp_path / "features", format="npy", **OPTIONS)
    before = contents(tmp_path / "features")
    with pytest.raises(ValueError, match="in the layout 'mocohub-features-npy/1', .*--format parquet"):
        extract(Colours(), tars, out=tmp_path / "features", retry_damaged=True, **OPTIONS)
    assert contents(tmp_path / "features") == before


def test_the_bar_counts_tars_and_shows_images_per_second(tars, tmp_path, monkeypatch):
    shown = io.StringIO()

    class Terminal(loading.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "file": shown, "disable": False, "mininterval": 0, "ascii": True})

    monkeypatch.setattr(loading, "tqdm", Terminal)
    extract(Colours(), tars, out=tmp_path / "features", shard="0/2", **OPTIONS)
    extract(Colours(), tars, out=tmp_path / "features", **OPTIONS)
    lines = re.split(r"[\r\n]+", shown.getvalue().strip())
    assert any(re.search(r"2/2 .*tar.*, img/s=\d+", line) for line in lines), lines
    assert any(re.search(r"1/1 .*tar.*, errors=1, img/s=\d+", line) for line in lines), lines


def test_what_is_no_damage_but_the_network_ends_the_extraction_and_counts_for_nothing(
    tars, tmp_path, monkeypatch
):
    opens = stream.read_samples

    def read(url):
        if url.endswith("1.tar"):
            raise ShardError("Tar shard '1.tar' cannot be read: timeout. Check the connection and access.")
        return opens(url)

    monkeypatch.setattr(stream, "read_samples", read)
    out = tmp_path / "features"
    with pytest.raises(ShardError, match="timeout. Check the connection"):
        extract(Colours(), tars, out=out, **OPTIONS)
    assert sorted(path.name for path in (out / "progress").glob("0*.json")) == ["00000.json"]
    monkeypatch.undo()
    assert len(extract(Colours(), tars, out=out, **OPTIONS)) == 19


def test_tars_without_any_image_that_can_be_used_are_no_result(tmp_path):
    for k in range(2):
        make_tar(tmp_path / f"{k}.tar", {"a.png": b"no image", "b.txt": b"text"})
    with pytest.raises(RuntimeError, match=r"None of the 2 images gave features:\n  0.tar/a.png: not"):
        extract(Colours(), [tmp_path / "0.tar", tmp_path / "1.tar"], **OPTIONS)


def test_an_extraction_under_way_says_how_many_tars_are_done(tars, tmp_path, capsys):
    out = tmp_path / "features"
    extract(Colours(), tars, out=out, shard="0/2", **OPTIONS)
    features_verb("info", (str(out),))
    assert "shards done         2 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "fewer"}, "num_shards: 3 there, 2 here"),
        ({"images": "other"}, "input_fingerprint: "),
        ({"batch_size": 3}, "batch_size: 4 there, 3 here"),
    ],
    ids=["fewer", "other", "batch"],
)
def test_other_tars_are_not_mixed_in(tars, tmp_path, change, message):
    extract(Colours(), tars, out=tmp_path / "features", shard="0/2", **OPTIONS)
    if change.get("images") == "fewer":
        (tars / "2.tar").unlink()
    elif "images" in change:
        (tars / "2.tar").rename(tars / "3.tar")
    options = {**OPTIONS, **{name: value for name, value in change.items() if name != "images"}}
    with pytest.raises(ValueError, match=f"(?s)begun with other settings.*{message}"):
        extract(Colours(), tars, out=tmp_path / "features", **options)


def test_what_streams_cannot_do_is_refused(tars):
    with pytest.raises(ValueError, match="dedup needs images that are listed, but .* Use content_hash"):
        extract(Colours(), tars, dedup=True, **OPTIONS)
    with pytest.raises(ValueError, match="retry_damaged needs out=..., the folder whose damaged shards"):
        extract(Colours(), tars, retry_damaged=True, **OPTIONS)


def test_the_reader_is_only_some_batches_ahead(tmp_path):
    make_tar(tmp_path / "0.tar", members(0, 40))
    asked = []

    def tars():
        for tar in range(1):
            asked.append(tar)
            yield tar

    shards = list_shards(tmp_path / "0.tar")
    read = [batch for batch in stream.read_batches(shards, tars(), 7)]
    assert [len(batch.images) for batch in read] == [7] * 5 + [5]
    assert [batch.is_last for batch in read] == [False] * 5 + [True]
    num_taken = 0

    def endless():
        nonlocal num_taken
        while True:
            num_taken += 1
            yield read[0]

    ahead = stream._ahead(endless())
    for _ in range(10):
        next(ahead)
    ahead.close()
    assert 10 <= num_taken <= 10 + stream._BATCHES_AHEAD


def test_a_class_file_that_is_no_text_is_damage_behind_its_images(tmp_path):
    path = make_tar(tmp_path / "0.tar", {"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.cls": b"\xff"})
    samples = read_samples(str(path))
    assert [(image.path, image.class_name) for image in (next(samples), next(samples))] == [
        ("0.png", "1"),
        ("1.png", None),
    ]
    with pytest.raises(ShardError, match="'1.cls' is no UTF-8 text"):
        next(samples)


def test_the_sample_is_made_of_the_first_images_of_the_first_tars_that_have_any(tars):
    (tars / "0.tar").write_bytes(tar_bytes(members(0, 1))[:600])
    inputs = Inputs(tars)
    inputs.transform = transforms.ToTensor()
    items = stream.first_items(inputs)
    first, second = next(items), next(items)
    assert first["path"] == "0.tar" and second.id == STEP
    items.close()


def test_tar_formats_agree(tmp_path):
    rows = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(form)
        folder.mkdir()
        long = {f"{'d' * 90}/{'e' * 90}/{i}.png": png(i) for i in range(5)}
        make_tar(folder / "0.tar", long, form)
        make_tar(folder / "1.tar", members(5, 7), form)
        features = extract(Colours(), folder, **OPTIONS)
        rows.append((features.paths, features.ids.tolist(), features.values.tolist()))
    assert rows[0] == rows[1]


def test_tars_whose_names_are_not_utf8_are_extracted(tars, tmp_path):
    (tars / "0.tar").rename(os.fsdecode(os.fsencode(tars) + b"/0\xe9.tar"))
    features = extract(Colours(), tars, out=tmp_path / "out", **OPTIONS)
    assert len(features) == 19 and features.paths[0] == "0\\udce9.tar/cat/000.png"


def test_to_read_again_what_was_damaged_may_be_asked_of_the_first_call_already(tars, tmp_path):
    features = extract(Colours(), tars, out=tmp_path / "out", retry_damaged=True, **OPTIONS)
    assert len(features) == 19


@pytest.mark.parametrize("place", [0, 70, 200])
def test_names_that_make_one_sample_of_a_shard_are_read_in_little_memory(tmp_path, place):
    names = {f"frame.{i:04d}.png": os.urandom(20_000) for i in range(200)}
    entries = list(names.items())
    path = make_tar(tmp_path / "0.tar", dict([*entries[:place], ("frame.cls", b"cat"), *entries[place:]]))
    tracemalloc.start()
    samples = read_samples(str(path))
    found = [sample.class_name for sample in samples]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    without = place - place % 64  # what has been given out before the class came
    assert found == [None] * min(without, 200) + ["cat"] * (200 - without)
    assert peak < 3e6  # of 4 MB
