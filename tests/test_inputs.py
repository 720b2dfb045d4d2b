import errno
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from mocohub import images
from mocohub.features import inputs as input_module
from mocohub.features.inputs import Inputs, Numbered, TarImage, collate
from mocohub.features.writer import NO_LABEL
from mocohub.images import decode_image
from mocohub.shards import list_shards
from mocohub.sources import list_images
from tests.helpers.images import write_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", {"cat": 2, "dog": 3})


def inputs_of(images: Any, *, content_hash: bool = False) -> Inputs:
    inputs = Inputs(images)
    inputs.transform, inputs.content_hash = to_tensor, content_hash
    return inputs


def encoded(grey: int, size: tuple[int, int] = (5, 4), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(file, kind)
    return file.getvalue()


def assert_same_rows(inputs: Inputs, expected: Inputs) -> None:
    assert len(inputs) == len(expected)
    for row, other in zip(inputs, expected, strict=True):
        assert (row.id, row.label, row.size) == (other.id, other.label, other.size)
        assert torch.equal(row.pixels, other.pixels)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "txt"])
def test_lists_of_paths_give_the_rows_of_the_folder(photos: Path, suffix: str) -> None:
    folder = inputs_of(photos)
    names = [path.partition("/")[0] for path in folder.paths]
    table = pd.DataFrame({"label": names, "path": [f"photos/{path}" for path in folder.paths]})
    file = photos.parent / f"list.{suffix}"
    if suffix == "parquet":
        table.to_parquet(file)
    elif suffix == "txt":
        file.write_text("".join(f"{path}\t{name}\n" for name, path in table.itertuples(index=False)))
    else:
        table.to_csv(file, sep="," if suffix == "csv" else "\t")
    listed = inputs_of(file)
    assert_same_rows(listed, folder)
    assert listed.classes == ["cat", "dog"] and listed.source == str(file)
    assert listed.paths == [f"photos/{path}" for path in folder.paths]


def test_several_tars_are_streamed_and_a_single_local_one_is_listed(photos: Path, tmp_path: Path) -> None:
    for folder in ("tars", "one", "mixed"):
        (tmp_path / folder).mkdir()
    for name in ("tars/0.tar", "tars/1.tar", "one/0.tar", "mixed/0.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for path in sorted(photos.rglob("*.png")):
                tar.add(path, path.relative_to(photos).as_posix())
    (tmp_path / "mixed/cat.png").write_bytes((photos / "cat/0000.png").read_bytes())
    (tmp_path / "tars.txt").write_text("tars/0.tar\ntars/1.tar\n")
    tars = [str(tmp_path / "tars/0.tar"), tmp_path / "tars/1.tar"]
    streamed = [tmp_path / "tars", tmp_path / "one", tmp_path / "tars/*.tar", tmp_path / "tars/{0..1}.tar"]
    streamed += [tmp_path / "tars.txt", tars, list_shards(tars), "memory://bucket/{0..1}.tar"]
    streamed += [["memory://bucket/0.tar"]]
    for source in streamed:
        inputs = inputs_of(source)
        assert inputs.is_stream, source
        assert inputs.images.prefixes() == ["0.tar", "1.tar"][: len(inputs.images)]
        assert inputs.fingerprint == list_shards(inputs.images.urls).fingerprint()
    for source in (tars[0], tars[:1], tmp_path / "mixed", photos):
        assert not inputs_of(source).is_stream, source
    with pytest.raises(FileNotFoundError, match="1 of the 2 shards of .* do not exist: .*2.tar"):
        inputs_of(tmp_path / "tars/{1..2}.tar")


def test_an_image_of_a_tar_that_is_streamed_is_that_of_its_file(photos: Path) -> None:
    streamed, expected = inputs_of("memory://bucket/0.tar"), inputs_of(photos)
    image = TarImage(7, "0.tar/cat/0000.png", "cat", (photos / "cat/0000.png").read_bytes())
    row = streamed[image]
    assert (row.id, row.label, row.size) == (7, NO_LABEL, expected[0].size)
    assert torch.equal(row.pixels, expected[0].pixels)
    for data, reason in ((b"no image", "not a"), (None, "larger than any image that can be decoded")):
        error = streamed[image._replace(data=data)]
        assert (error["id"], error["path"]) == (7, "0.tar/cat/0000.png") and reason in error["reason"]


def test_rows_tell_the_upright_size_and_the_hash_of_the_bytes_if_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    digest = hashlib.sha256((tmp_path / "turned.jpg").read_bytes()).hexdigest()
    for content_hash in (False, True):
        inputs = inputs_of(tmp_path, content_hash=content_hash)
        assert inputs[0].size == (20, 30)
        assert inputs[0].sha256 == (digest if content_hash else None)
        assert inputs.content_sha256(0) == digest
    with Image.open(tmp_path / "turned.jpg") as image:
        assert inputs_of([image])[0].size == (20, 30)
    assert inputs_of([torch.zeros(3, 8, 9)])[0].size is None


@pytest.mark.parametrize("content_hash", [False, True])
def test_hashes_are_of_files_and_tar_members_and_none_where_nothing_can_be_read(
    photos: Path, content_hash: bool
) -> None:
    data = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    with tarfile.open(photos.parent / "x.tar", "w") as tar:
        for path in sorted(photos.rglob("*.png")):
            tar.add(path, path.relative_to(photos).as_posix())
    expected = [hashlib.sha256(image).hexdigest() for image in data]
    for source in (photos, photos.parent / "x.tar"):
        inputs = inputs_of(source, content_hash=content_hash)
        assert [inputs.content_sha256(i) for i in range(5)] == expected
        assert [row.sha256 for row in inputs] == (expected if content_hash else [None] * 5)
    missing = inputs_of(list_images([photos / "none.png"], check=False), content_hash=content_hash)
    assert missing.content_sha256(0) is None
    assert missing[0]["reason"] == "cannot be read: No such file or directory"
    in_memory = inputs_of([decode_image(image) for image in data], content_hash=content_hash)
    assert in_memory.content_sha256(0) is None and in_memory[0].sha256 is None


@pytest.mark.parametrize("content_hash", [False, True])
def test_jpegs_are_decoded_smaller_only_if_asked_and_only_as_far_as_allowed(
    tmp_path: Path, content_hash: bool
) -> None:
    ramp = np.add.outer(np.arange(48) * 2, np.arange(64) * 2).astype(np.uint8)
    photo = Image.fromarray(np.stack([ramp] * 3, 2))
    photo.save(tmp_path / "0.jpg", quality=95)
    photo.save(tmp_path / "1.png")
    inputs = inputs_of(tmp_path, content_hash=content_hash)
    assert torch.equal(inputs[0].pixels, to_tensor(decode_image(tmp_path / "0.jpg")))
    for least_px, shape in ((49, (48, 64)), (25, (48, 64)), (24, (24, 32)), (12, (12, 16)), (1, (6, 8))):
        inputs.least_px = least_px
        assert inputs[0].pixels.shape == (3, *shape) and inputs[0].size == (64, 48)
        small = torch.nn.functional.interpolate(to_tensor(photo)[None], shape, mode="area")[0]
        assert (inputs[0].pixels - small).abs().max() < 0.02
        assert torch.equal(inputs[1].pixels, to_tensor(photo))


def test_batches_carry_sizes_and_hashes_in_the_order_of_the_ids(tmp_path: Path) -> None:
    for i, size in enumerate([(5, 4), (6, 4), (6, 4)]):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, size))
    (tmp_path / "1.png").write_bytes(b"no image")
    inputs = inputs_of(tmp_path, content_hash=True)
    (batch,) = DataLoader(inputs, batch_size=3, collate_fn=collate)
    assert batch.ids == [0, 2] and [error["id"] for error in batch.errors] == [1]
    assert batch.sizes == [(5, 4), (6, 4)]
    assert batch.sha256s == [inputs.content_sha256(0), inputs.content_sha256(2)]


def test_the_fingerprint_changes_with_paths_and_labels(photos: Path) -> None:
    before = Inputs(photos)
    assert len(before.fingerprint) == 64 and Inputs(photos).fingerprint == before.fingerprint
    assert Inputs(list_images(photos, labels="none")).fingerprint != before.fingerprint
    (photos / "dog" / "0002.png").rename(photos / "cat" / "0002.png")
    assert Inputs(photos).fingerprint != before.fingerprint
    assert Inputs([np.zeros((4, 4, 3), np.uint8)]).fingerprint is None


# The datasets library


@pytest.fixture
def library() -> Any:
    library = pytest.importorskip("datasets", reason="the datasets library is not installed")
    library.disable_progress_bars()
    return library


def stored(library: Any, rows: list[dict], **features: Any) -> Any:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return library.Dataset.from_dict(
        columns, features=library.Features({"photo": library.Image(), **features})
    )


def test_a_dataset_of_the_datasets_library_gives_the_rows_of_its_files(photos: Path, library: Any) -> None:
    folder = inputs_of(photos, content_hash=True)
    paths = [photos / path for path in folder.paths]
    rows = [
        {"photo": {"bytes": path.read_bytes(), "path": None}, "kind": i // 2 and 1}
        for i, path in enumerate(paths)
    ]
    kinds = library.ClassLabel(names=["cat", "dog"])
    inside = stored(library, rows, kind=kinds)
    outside = stored(
        library, [{**row, "photo": str(path)} for row, path in zip(rows, paths, strict=True)], kind=kinds
    )
    for dataset in (inside, outside, inside.with_format("torch"), outside.with_format("numpy")):
        inputs = inputs_of(dataset, content_hash=True)
        assert_same_rows(inputs, folder)
        assert [row.sha256 for row in inputs] == [row.sha256 for row in folder]
        assert inputs.classes == ["cat", "dog"]
        assert inputs.source == "datasets.Dataset: photo" and inputs.paths[1] == "images[1]"
    assert_same_rows(inputs_of(inside.select([1, 0]).select([1, 0])), inputs_of(inside.select([0, 1])))
    assert Inputs(inside).fingerprint == Inputs(inside).fingerprint != Inputs(inside.select([0])).fingerprint


def test_workers_read_a_dataset_of_the_datasets_library(photos: Path, library: Any) -> None:
    paths = [photos / path for path in inputs_of(photos).paths]
    dataset = stored(library, [{"photo": str(path)} for path in paths])
    for context in ("fork", "spawn"):
        loader = DataLoader(
            inputs_of(dataset),
            batch_size=2,
            num_workers=1,
            collate_fn=collate,
            multiprocessing_context=context,
        )
        assert [i for batch in loader for i in batch.ids] == [0, 1, 2, 3, 4]


def test_bad_images_of_a_dataset_are_errors_and_missing_labels_are_none(tmp_path: Path, library: Any) -> None:
    photos = [encoded(1), b"no image", None, str(tmp_path / "none.png"), encoded(2, kind="BMP")]
    rows = [
        {"photo": {"bytes": photo, "path": None} if isinstance(photo, bytes) else photo, "label": label}
        for photo, label in zip(photos, [1, 0, 0, 0, None], strict=True)
    ]
    inputs = inputs_of(stored(library, rows, label=library.ClassLabel(names=["a", "b"])), content_hash=True)
    assert [(row.id, row.label) for row in (inputs[0], inputs[4])] == [(0, 1), (4, -1)]
    reasons = [inputs[i]["reason"] for i in (1, 2, 3)]
    assert reasons[0].startswith("not a JPEG")
    assert reasons[1:] == ["the row has no image", "cannot be read: No such file or directory"]
    assert inputs.content_sha256(2) is None and inputs.content_sha256(3) is None


def test_of_several_columns_of_classes_only_one_called_label_counts(library: Any) -> None:
    kinds = library.ClassLabel(names=["a", "b"])
    row = {"photo": {"bytes": encoded(1), "path": None}, "coarse": 1, "fine": 0}
    assert inputs_of(stored(library, [row], coarse=kinds, fine=kinds))[0].label == -1
    dataset = stored(library, [{**row, "label": 1}], coarse=kinds, fine=kinds, label=kinds)
    assert inputs_of(dataset)[0].label == 1


def test_a_label_column_of_texts_or_integers_is_classes_as_in_a_list_file(library: Any) -> None:
    def classes(labels: list, kind: str) -> tuple:
        rows = [{"photo": {"bytes": encoded(1), "path": None}, "label": label} for label in labels]
        inputs = inputs_of(stored(library, rows, label=library.Value(kind)))
        return inputs.classes, [row.label for row in inputs]

    assert classes(["b", "a", None], "string") == (["a", "b"], [1, 0, -1])
    assert classes([10, None, 2], "int64") == (["2", "10"], [1, -1, 0])
    assert classes([0.5], "float32") == (None, [-1])


def test_datasets_that_cannot_be_used_are_refused_with_the_remedy(library: Any) -> None:
    row = {"photo": {"bytes": encoded(1), "path": None}}
    dataset = stored(library, [row])
    with pytest.raises(ValueError, match="images is a DatasetDict of train, test. Give one of its entries"):
        Inputs(library.DatasetDict({"train": dataset, "test": dataset}))
    with pytest.raises(ValueError, match="IterableDataset without length.*map-style"):
        Inputs(dataset.to_iterable_dataset())
    with pytest.raises(
        ValueError, match=r"0 columns of images, but must have one; all columns are \['text'\]"
    ):
        Inputs(library.Dataset.from_dict({"text": ["?"]}))
    with pytest.raises(ValueError, match="has 2 columns of images.*remove_columns"):
        Inputs(stored(library, [{**row, "mask": row["photo"]}], mask=library.Image()))
    with pytest.raises(ValueError, match="has a transform of its own.*with_format"):
        Inputs(dataset.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="There are no images: datasets.Dataset: photo is empty"):
        Inputs(dataset.select([]))


class Pairs(Dataset):
    classes = ("a", "b")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (7, 6)), i


def test_a_torch_dataset_gives_its_images_and_labels() -> None:
    inputs = inputs_of(Pairs(), content_hash=True)
    assert [(row.id, row.label, row.size, row.sha256) for row in map(inputs.__getitem__, range(2))] == [
        (0, 0, (7, 6), None),
        (1, 1, (7, 6), None),
    ]
    assert inputs.source == "Pairs" and inputs.fingerprint is None and inputs.content_sha256(0) is None


@pytest.mark.parametrize(
    ("classes", "names"),
    [(np.arange(2), ["0", "1"]), ([np.int64(3), "b"], ["3", "b"]), (10, None), ({}, None)],
)
def test_what_a_dataset_calls_classes_are_texts_or_unknown(classes: Any, names: list[str] | None) -> None:
    pairs = Pairs()
    pairs.classes = classes
    inputs = Inputs(pairs)
    assert inputs.classes == names and all(type(name) is str for name in inputs.classes or [])


def test_names_of_images_without_paths_are_made_when_they_are_asked_for():
    names = Numbered(10**12)
    assert len(names) == 10**12 and names[7] == "images[7]" and names[-1] == f"images[{10**12 - 1}]"
    assert list(Numbered(2)) == ["images[0]", "images[1]"]
    with pytest.raises(IndexError):
        names[10**12]


@pytest.mark.parametrize("where", ["open", "read"])
def test_what_a_network_disk_refuses_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    Image.new("RGB", (7, 6)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    failures = 2

    class Flaky(io.FileIO):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.fail("open")

        def read(self, *arguments: Any) -> bytes:
            self.fail("read")
            return super().read(*arguments)

        def fail(self, here: str) -> None:
            nonlocal failures
            if here == where and failures > 0:
                failures -= 1
                raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(images, "open", Flaky, raising=False)
    monkeypatch.setattr(input_module, "_RETRY_AFTER_S", (0, 0, 0))
    inputs = inputs_of(tmp_path)
    assert inputs[0].size == (7, 6) and failures == 0
    assert len(caplog.messages) == 2 and all("Stale file handle" in text for text in caplog.messages)
    assert caplog.messages[0].startswith("'a.png' ") and caplog.messages[0].endswith("read again in 0 s.")
    failures = 2
    assert inputs[1]["reason"].startswith("not a JPEG") and failures == 0
    failures = 4
    assert "Stale file handle" in inputs[0]["reason"] and failures == 0
