import hashlib
import io
import multiprocessing
import os
import pickle
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from mocohub.images import ImageError
from mocohub.sources import ImageList, list_images


def png(grey: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 1), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def make_files(folder: Path, *paths: str) -> Path:
    """Write one small image for each path; the n-th is of grey level n."""
    for grey, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png(grey))
    return folder


def make_tar(path: Path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def grey_of(images: ImageList, i: int) -> int:
    return images.decode(i).getpixel((0, 0))[0]


# Folders


def test_a_folder_is_listed_in_code_point_order_of_relative_paths(tmp_path: Path) -> None:
    names = ["b/x.png", "a/z.JPG", "a-b/1.png", "B.jpeg", "b/a/q.webp", "10.gif", "9.bmp", "é.tiff", "c.tif"]
    make_files(tmp_path, *names)
    (tmp_path / "notes.md").touch()
    images = list_images(tmp_path)
    assert images.paths == sorted(names)
    assert images.paths.index("a-b/1.png") < images.paths.index("a/z.JPG")  # "-" comes before "/"
    assert (images.labels, images.classes, len(images)) == (None, None, 9)
    assert [grey_of(images, i) for i in range(9)] == [names.index(path) for path in sorted(names)]


def test_images_of_formats_that_are_not_read_are_listed_and_say_so(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "c.png")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    images = list_images(tmp_path)
    assert images.paths == ["a.png", "b.HEIC", "c.png"]
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF, BMP or TIFF image"):
        images.decode(1)


def test_a_table_is_answered_with_its_column(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    table = pd.DataFrame({"path": [str(tmp_path / "a.png")], "label": ["cat"]})
    assert len(list_images(table["path"])) == 1
    with pytest.raises(
        ValueError, match=r"DataFrame is no source of images: pass one column.*frame\['path'\]"
    ):
        list_images(table)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", ".b.png", "._a.png", ".thumbnails/c.png", "d/.e/f.png")
    assert list_images(tmp_path).paths == ["a.png"]


def test_links_are_followed_and_dangling_ones_listed(tmp_path: Path) -> None:
    make_files(tmp_path / "store", "a.png", "b.png")
    data = tmp_path / "data"
    (data / "cats").mkdir(parents=True)
    (data / "cats" / "one.png").symlink_to(tmp_path / "store" / "b.png")
    (data / "cats" / "lost.png").symlink_to(tmp_path / "gone.png")
    (data / "dogs").symlink_to(tmp_path / "store")
    os.mkfifo(data / "pipe.png")  # would block whoever opens it
    images = list_images(data)
    assert images.paths == ["cats/lost.png", "cats/one.png", "dogs/a.png", "dogs/b.png"]
    assert grey_of(images, 1) == 1
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        images.decode(0)
    with pytest.raises(FileNotFoundError, match="lost.png"):
        images.read(0)


def test_a_link_to_its_own_parent_is_an_error_not_an_endless_list(tmp_path: Path) -> None:
    make_files(tmp_path, "a/b/c.png")
    (tmp_path / "a" / "b" / "latest").symlink_to("latest")
    (tmp_path / "a" / "b" / "self.png").symlink_to("self.png")
    images = list_images(tmp_path)
    assert images.paths == ["a/b/c.png", "a/b/self.png"]
    with pytest.raises(ImageError, match="cannot be read: Too many levels of symbolic links"):
        images.decode(1)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="a/b/up' is a symbolic link to a folder that contains it. Remove"):
        list_images(tmp_path)


def test_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    make_files(tmp_path, "b/2.png", "a/deep/er/1.png", "a/1.png", "a-b/1.png", "10/1.png", "9/1.png")
    images, theirs = list_images(tmp_path), ImageFolder(tmp_path)
    assert images.classes == theirs.classes == ["10", "9", "a", "a-b", "b"]
    expected = {Path(path).relative_to(tmp_path).as_posix(): label for path, label in theirs.samples}
    assert dict(zip(images.paths, images.labels, strict=True)) == expected


@pytest.mark.parametrize(
    "paths",
    [
        ["a/1.png", "b/1.png", "top.png"],  # not every image lies in a class
        ["only/1.png", "only/2.png"],  # one class is none
        ["1.png", "2.png"],
    ],
)
def test_folders_without_classes_are_unlabelled(tmp_path: Path, paths: list[str]) -> None:
    images = list_images(make_files(tmp_path, *paths))
    assert (images.labels, images.classes) == (None, None)


def test_labels_can_be_forced_or_switched_off(tmp_path: Path) -> None:
    one = make_files(tmp_path / "one", "only/1.png")
    assert list_images(one, labels="folder").classes == ["only"]
    two = make_files(tmp_path / "two", "a/1.png", "b/1.png")
    assert list_images(two).labels == [0, 1]
    assert list_images(two, labels="none").labels is None
    mixed = make_files(tmp_path / "mixed", "a/1.png", "top.png")
    with pytest.raises(
        ValueError, match="labels='folder' needs every image .* 'top.png' is in none. Move it"
    ):
        list_images(mixed, labels="folder")
    with pytest.raises(ValueError, match="Unknown labels 'folders'. Choose one of: folder"):
        list_images(two, labels="folders")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    make_files(tmp_path, "train/a/1.png", "val/a/1.png")
    with pytest.raises(
        ValueError, match=r"holds splits \(train, val\).*Pass one of them, such as '.*/train', or"
    ):
        list_images(tmp_path)
    assert len(list_images(tmp_path, labels="none")) == 2
    assert list_images(tmp_path, labels="folder").classes == ["train", "val"]
    make_files(tmp_path, "extra/a/1.png")
    assert list_images(tmp_path).classes == ["extra", "train", "val"]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (None, "NoneType"),
        (3, "int"),
        (Image.new("RGB", (8, 8)), "Image"),
        ([Image.new("RGB", (8, 8))], "list of Image"),
        ([("a.png", 0)], "list of tuple"),
        ([{"image": "a.png"}], "list of dict"),
        ([b"a.png"], "list of bytes"),
        (b"a.png", "bytes of int"),
    ],
)
def test_what_is_neither_a_path_nor_a_list_of_them_is_an_error_with_a_remedy(source, what) -> None:
    with pytest.raises(ValueError, match=f"{what} is no source of images. Pass a folder.*torch Dataset"):
        list_images(source)


def test_one_image_is_a_list_of_one(tmp_path: Path) -> None:
    make_files(tmp_path, "photos/a.JPG")
    (image,) = list_images(tmp_path / "photos").paths
    alone = list_images(tmp_path / "photos" / image)
    assert alone.paths == [(tmp_path / "photos" / image).as_posix()]
    assert alone.read(0) == list_images(tmp_path / "photos").read(0) and alone.labels is None


def test_what_holds_no_images_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos.zip").touch()
    (tmp_path / "list.txt").write_text("\n\n")
    make_tar(tmp_path / "texts.tar", {"a.txt": b"hello"})
    with pytest.raises(ValueError, match="No images in '.*empty' or below .looked for .jpg, .jpeg"):
        list_images(tmp_path / "empty")
    with pytest.raises(
        FileNotFoundError, match="nowhere' does not exist. Pass a folder of images or of .tar"
    ):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="photos.zip' is no source of images. Pass a folder"):
        list_images(tmp_path / "photos.zip")
    with pytest.raises(ValueError, match="list.txt': the list is empty"):
        list_images(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="No images in .*texts.tar .looked for members"):
        list_images(tmp_path / "texts.tar")
    with pytest.raises(ValueError, match="No images in a list of 0 paths. Pass a folder"):
        list_images([])
    with pytest.raises(ValueError, match=r"No images in .*\*.tiff. Pass a folder"):
        list_images(f"{tmp_path}/*.tiff")


def test_names_that_are_not_utf8_are_refused_before_any_work_or_spelled_out(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    make_files(tmp_path / "folder", "ok.png", name)
    with pytest.raises(ValueError, match=r"caf\\udce9.png' in .*folder is not UTF-8. Rename the file"):
        list_images(tmp_path / "folder")
    assert list_images(make_tar(tmp_path / "a.tar", {name: png()})).paths == [r"a.tar/caf\xe9.png"]


# Lists


def test_a_text_list_keeps_its_order_and_its_repetitions(tmp_path: Path) -> None:
    make_files(tmp_path / "data", "a.png", "b.png", "c d.png")
    elsewhere = make_files(tmp_path / "elsewhere", "x.dat") / "x.dat"  # a list may name any file
    (tmp_path / "data" / "list.txt").write_text(f"c d.png\r\n\nb.png\n./b.png\n{elsewhere}\n")
    images = list_images(tmp_path / "data" / "list.txt")
    assert images.paths == ["c d.png", "b.png", "b.png", elsewhere.as_posix()]
    assert [grey_of(images, i) for i in range(4)] == [2, 1, 1, 0]
    assert images.labels is None


def test_text_lists_may_carry_labels(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "list.txt").write_text("a.png\tdog\nb.png\nc.png\tcat\n")
    images = list_images(tmp_path / "list.txt")
    assert (images.labels, images.classes) == ([1, None, 0], ["cat", "dog"])
    assert list_images(tmp_path / "list.txt", labels="none").labels is None


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_tables_are_read_by_the_names_of_their_columns(tmp_path: Path, suffix: str, separator: str) -> None:
    make_files(tmp_path, "a.png", "b, c.png")
    rows = [["path", "id", "label"], ["a.png", "7", "10"], ['"b, c.png"', "8", "9"]]
    table = tmp_path / f"list.{suffix}"
    table.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8-sig")
    images = list_images(table)
    assert images.paths == ["a.png", "b, c.png"]
    assert (images.labels, images.classes) == ([1, 0], ["9", "10"])  # integers in numeric order


def test_listed_paths_can_be_labelled_by_their_folders(tmp_path: Path) -> None:
    make_files(tmp_path, "b/1.png", "a/1.png")
    (tmp_path / "list.txt").write_text("b/1.png\na/1.png\n")
    assert list_images(tmp_path / "list.txt").labels is None
    assert list_images(tmp_path / "list.txt", labels="folder").labels == [1, 0]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a/1.png\n")
    with pytest.raises(ValueError, match="a/1.png' is in none"):
        list_images(tmp_path / "list.txt", labels="folder")


def test_missing_files_are_counted_before_any_work_or_reported_one_by_one(tmp_path: Path) -> None:
    make_files(tmp_path, "there.png")
    (tmp_path / "list.txt").write_text("a.png\nthere.png\nb.png\nc.png\nd.png\n")
    with pytest.raises(
        FileNotFoundError, match="4 of the 5 files in .*: a.png, b.png, c.png, .... Correct the"
    ):
        list_images(tmp_path / "list.txt")
    images = list_images(tmp_path / "list.txt", check=False)
    assert len(images) == 5
    assert grey_of(images, 1) == 0
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        images.decode(0)


def test_malformed_lists_name_the_fault(tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    with pytest.raises(
        ValueError, match=r"has no column 'path', only \['file', 'label'\]. Its first line must"
    ):
        list_images(written("a.csv", b"file,label\nx.png,1\n"))
    with pytest.raises(ValueError, match=r"has no column 'path', only \[\]"):
        list_images(written("b.csv", b""))
    with pytest.raises(ValueError, match="has a row without a path: row 2"):
        list_images(written("c.csv", b"path,label\nx.png,1\n,2\n"))
    with pytest.raises(ValueError, match="Row 2 of .*u.csv' has more values than the 2 columns.*quotes"):
        list_images(written("u.csv", b'path,label\nx.png,"a, b"\ny.png,a, b\n'))
    with pytest.raises(ValueError, match="d.txt' cannot be read as a list of paths, it must be UTF-8 text"):
        list_images(written("d.txt", b"\xff\xfe\x00"))


def test_a_python_list_holds_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "b.png", "sub/a.png")
    monkeypatch.chdir(tmp_path)
    images = list_images([Path("sub/a.png"), "b.png"])
    monkeypatch.chdir("/")
    assert images.paths == ["sub/a.png", "b.png"]
    assert [grey_of(images, i) for i in range(2)] == [1, 0]
    assert images.source == "a list of 2 paths"
    assert list_images(f"{tmp_path}/**/*.png").paths == [f"{tmp_path}/b.png", f"{tmp_path}/sub/a.png"]
    with pytest.raises(FileNotFoundError, match="1 of the 1 files in a list of 1 paths do not exist"):
        list_images(["b.png"])


@pytest.mark.parametrize("labels", [["10", "9", None], [10, 9, None], pd.Categorical(["10", "9", None])])
def test_parquet_lists_are_read_by_the_names_of_their_columns(tmp_path: Path, labels: list) -> None:
    make_files(tmp_path, "a.png", "sub/é.png", "c.png")
    table = pd.DataFrame({"id": [7, 8, 9], "path": ["c.png", "sub/é.png", "c.png"]})
    table["label"] = pd.array(labels, "Int64") if labels[0] == 10 else labels
    table.to_parquet(tmp_path / "list.Parquet")
    images = list_images(tmp_path / "list.Parquet")
    assert images.paths == ["c.png", "sub/é.png", "c.png"]
    assert (images.labels, images.classes) == ([1, 0, None], ["9", "10"])
    assert [grey_of(images, i) for i in range(3)] == [2, 1, 2]
    table[["path"]].to_parquet(tmp_path / "bare.parquet")
    assert list_images(tmp_path / "bare.parquet").labels is None


def test_malformed_parquet_lists_name_the_fault(tmp_path: Path) -> None:
    def written(**columns: object) -> Path:
        pd.DataFrame(columns).to_parquet(tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    with pytest.raises(ValueError, match=r"no column 'path', only \['image'\].*datasets.load_dataset"):
        list_images(written(image=[b"..."]))
    with pytest.raises(ValueError, match="Column 'path' of '.*' holds int64, but must hold strings"):
        list_images(written(path=[1, 2]))
    with pytest.raises(
        ValueError, match="Column 'label' of '.*' holds double, but must hold strings or integers"
    ):
        list_images(written(path=["a.png"], label=[0.5]))
    with pytest.raises(ValueError, match="has a row without a path: row 2"):
        list_images(written(path=["a.png", None]))
    with pytest.raises(FileNotFoundError, match="1 of the 1 files"):
        list_images(written(path=["a.png"]))
    whole = (tmp_path / "x.parquet").read_bytes()
    for data in (b"", b"path\na.png\n", whole[:-9], whole[:4] + bytes(40) + whole[44:]):
        (tmp_path / "x.parquet").write_bytes(data)
        with pytest.raises(ValueError, match="x.parquet' cannot be read as Parquet: .* Write it again"):
            list_images(tmp_path / "x.parquet")


# Tar shards


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place_in_archive_order(tmp_path: Path, format: int) -> None:
    long = f"{'d' * 90}/{'n' * 60}.png"  # beyond the 100 characters of a plain header
    names = ["z/2.png", "./a/é.JPG", long, "z/1.png"]
    shard = make_tar(tmp_path / "x.tar", {name: png(grey) for grey, name in enumerate(names)}, format)
    images = list_images(shard)
    assert images.paths == ["x.tar/z/2.png", "x.tar/a/é.JPG", f"x.tar/{long}", "x.tar/z/1.png"]
    assert [images.read(i) for i in range(4)] == [png(grey) for grey in range(4)]
    assert [grey_of(images, i) for i in range(4)] == [0, 1, 2, 3]
    assert images.classes == ["a", "d" * 90, "z"]
    assert images.labels == [2, 0, 1, 2]
    assert list_images(shard, labels="none").classes is None
    assert list(tmp_path.iterdir()) == [shard]  # nothing was extracted


def test_only_regular_files_that_are_named_as_images_count(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in [
            ("d.png", tarfile.DIRTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("fifo.png", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        for name in ("a.json", "._b.png", ".hidden/c.png", "../up.png", "/etc/root.png", "ok.png", "ok.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    images = list_images(tmp_path / "x.tar")
    assert images.paths == ["x.tar/../up.png", "x.tar/etc/root.png", "x.tar/ok.png", "x.tar/ok.png"]


def test_cls_members_are_labels(tmp_path: Path) -> None:
    shard = make_tar(
        tmp_path / "a.tar",
        {"0001.cls": b"10\n", "0001.jpg": png(), "0002.png": png(), "0002.cls": b"9", "0003.png": png()},
    )
    images = list_images(shard)
    assert (images.labels, images.classes) == ([1, 0, None], ["9", "10"])
    assert list_images(shard, labels="none").labels is None
    make_tar(tmp_path / "b.tar", {"0001.cls": b"cat", "0001.left.png": png(), "0001.right.png": png()})
    images = list_images([shard, tmp_path / "b.tar"])  # keys belong to their shard
    assert images.classes == ["10", "9", "cat"]
    assert images.labels == [0, 1, None, 2, 2]


def test_many_shards_by_folder_pattern_or_list(tmp_path: Path) -> None:
    for grey, name in enumerate(["2.tar", "10.tar", "1.tar"]):
        make_tar(tmp_path / name, {f"{name[:-4]}/a.png": png(grey)})
    expected = ["1.tar/1/a.png", "10.tar/10/a.png", "2.tar/2/a.png"]
    for source in (tmp_path, f"{tmp_path}/*.tar"):
        images = list_images(source)
        assert images.paths == expected
        assert images.classes == ["1", "10", "2"]
        assert [grey_of(images, i) for i in range(3)] == [2, 1, 0]
    given = [tmp_path / "2.tar", tmp_path / "1.tar"]
    assert list_images(given).paths == ["2.tar/2/a.png", "1.tar/1/a.png"]


def test_shards_that_cannot_be_told_apart_or_mixed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shards = [make_tar(folder / "a.tar", {"a.png": png()}) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(ValueError, match="two shards are called 'a.tar'. Rename one"):
        list_images(shards)
    make_files(tmp_path, "a.png")
    with pytest.raises(ValueError, match="mixes 1 tar shards with 1 other files. List them separately"):
        list_images([shards[0], tmp_path / "a.png"])
    assert list_images(tmp_path).paths == ["a.png"]  # in a folder images come first


def test_split_shards_are_not_mixed_by_accident(tmp_path: Path) -> None:
    for name in ("train-0000.tar", "train-0001.tar", "val-0000.tar"):
        make_tar(tmp_path / name, {f"{name}.png": png()})
    with pytest.raises(ValueError, match=r"holds splits \(train-0000.tar, .*list_images.*labels='none'"):
        list_images(tmp_path)
    assert len(list_images(tmp_path, labels="none")) == 3
    assert len(list_images(f"{tmp_path}/train-*.tar")) == 2
    shard = make_tar(tmp_path / "all.tar", {"train/a.png": png(), "test/a.png": png()})
    with pytest.raises(
        ValueError, match=r"holds splits \(test, train\), not classes. Pass mocohub.list_images.*'none'"
    ):
        list_images(shard)


@pytest.mark.parametrize(
    "suffix, mode", [("tar.gz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz"), ("tar", "w:gz")]
)
def test_compressed_tars_are_refused_with_the_remedy(tmp_path: Path, suffix: str, mode: str) -> None:
    with tarfile.open(tmp_path / f"a.{suffix}", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    for source in (tmp_path, tmp_path / f"a.{suffix}"):
        with pytest.raises(ValueError, match="after 0 files: it is compressed: decompress it once .gzip -d"):
            list_images(source)


FORTY = {f"{'cat' if i % 2 else 'dog'}/{i:03d}.png": random.Random(i).randbytes(37 * i) for i in range(40)}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_no_cut_loses_an_image_silently(tmp_path: Path, format: int) -> None:
    members = FORTY | {f"dog/{'x' * 150}.png": b"y"} if format == tarfile.PAX_FORMAT else FORTY
    whole = make_tar(tmp_path / "whole.tar", members, format).read_bytes()
    cut = tmp_path / "cut.tar"
    num_missed_by_tarfile = 0
    for length in [*range(0, len(whole), 512), *range(100, len(whole), 1777)]:
        cut.write_bytes(whole[:length])
        try:
            images = list_images(cut)
        except ValueError as error:
            assert f"Tar shard '{cut}' cannot be read beyond byte" in str(error)
            num_read = int(str(error).partition(", after ")[2].split()[0])
            assert num_read <= len(members)
        else:  # only padding behind the end of the archive is gone
            assert [images.read(i) for i in range(len(images))] == list(members.values())
        try:
            with tarfile.open(cut, "r|*") as tar:
                num_missed_by_tarfile += len(tar.getmembers()) < len(members)
        except tarfile.TarError:
            pass
    assert num_missed_by_tarfile > 30  # or this test would show nothing


def test_the_number_of_members_before_a_cut_is_told(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "a.tar", {"a.png": b"1", "b.png": b"2", "c.png": b"3"})
    shard.write_bytes(shard.read_bytes()[:2048])
    with pytest.raises(
        ValueError,
        match="after 2 files: it has been cut, its end-of-archive blocks are missing. Copy it or make",
    ):
        list_images(shard)


def damage_header(whole: bytes) -> bytes:
    return whole[:1030] + b"?" + whole[1031:]


def blank_the_middle(whole: bytes) -> bytes:
    return whole[:1024] + bytes(2048) + whole[3072:]


def negative_size(whole: bytes) -> bytes:
    info = tarfile.TarInfo("b.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfa\x00"  # -1536 in base 256: back to the first member
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return whole[:1024] + bytes(header) + whole[1024:]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (damage_header, r"after 1 files: the header at byte 1024 is damaged .bad checksum"),
        (blank_the_middle, "after 1 files: more data follows its end"),
        (
            lambda whole: whole + whole,
            "more data follows its end, as if several tars had been joined with cat",
        ),
        (negative_size, "after 1 files: the header at byte 1024 states a size of -1536 bytes"),
        (lambda whole: b"", "after 0 files: it has been cut"),
        (lambda whole: b"not a tar at all" * 99, "after 0 files: the header at byte 0 is damaged"),
    ],
)
def test_damaged_tars_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    shard = make_tar(tmp_path / "a.tar", {f"{i}.png": bytes([i]) for i in range(1, 6)})
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=f"a.tar' cannot be read beyond byte .*{reason}"):
        list_images(shard)


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 512
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "10737418240"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(bytes(512)))
    with pytest.raises(ValueError, match="after 0 files: 'a member' is stored as a sparse file"):
        list_images(tmp_path / "a.tar")


def test_a_shard_that_shrinks_after_listing_is_noticed(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)})
    images = list_images(shard)
    shard.write_bytes(shard.read_bytes()[:1560])
    assert grey_of(images, 0) == 1
    with pytest.raises(OSError, match="a.tar' has become shorter since it was listed"):
        images.read(1)
    with pytest.raises(ImageError, match="cannot be read: .*shorter since it was listed"):
        images.decode(1)
    shard.unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        images.decode(0)


def test_headers_are_not_kept_in_memory(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "a.tar", {f"{i:04d}.png": b"" for i in range(2000)})
    tracemalloc.start()
    list_images(shard)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2000 * 500  # a TarInfo alone takes some 1000


# The list itself


def test_the_pixel_limit_reaches_the_decoder(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    make_tar(tmp_path / "a.tar", {"a.png": png()})
    for images in (list_images(tmp_path), list_images(tmp_path / "a.tar")):
        assert images.decode(0, max_pixels=2).size == (2, 1)
        with pytest.raises(ImageError, match="2 x 1 pixels, more than max_pixels=1"):
            images.decode(0, max_pixels=1)


@pytest.mark.parametrize("in_tar", [False, True])
def test_a_subset_reads_its_own_images_and_keeps_the_classes(tmp_path: Path, in_tar: bool) -> None:
    names = ["a/0.png", "a/1.png", "b/2.png", "b/3.png"]
    source = make_files(tmp_path / "data", *names)
    if in_tar:
        source = make_tar(tmp_path / "s.tar", {name: png(grey) for grey, name in enumerate(names)})
    chosen = list_images(source).subset([3, 0])
    assert [path[-7:] for path in chosen.paths] == ["b/3.png", "a/0.png"]
    assert [grey_of(chosen, i) for i in range(2)] == [3, 0]
    assert (chosen.labels, chosen.classes) == ([1, 0], ["a", "b"])


def test_the_fingerprint_is_of_the_paths_in_order(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "é/b.png")
    expected = hashlib.sha256("a.png\0é/b.png\0".encode()).hexdigest()
    assert list_images(tmp_path).fingerprint() == expected
    (tmp_path / "list.txt").write_text("é/b.png\na.png\n", encoding="utf-8")
    assert list_images(tmp_path / "list.txt").fingerprint() != expected


def test_printing_a_list_is_short(tmp_path: Path) -> None:
    images = list_images(make_files(tmp_path, *(f"{i}.png" for i in range(300))))
    assert len(repr(images)) < 300 + 2 * len(str(tmp_path))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same_bytes(tmp_path: Path, method: str) -> None:
    make_files(tmp_path / "files", *(f"{i}.png" for i in range(8)))
    make_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(8)})
    with multiprocessing.get_context(method).Pool(2) as pool:
        for source in (tmp_path / "files", tmp_path / "a.tar"):
            images = list_images(source)
            images.read(0)
            assert pool.map(images.read, range(8), chunksize=1) == [png(i) for i in range(8)]
    copy = pickle.loads(pickle.dumps(images))
    assert (copy.paths, copy.read(3)) == (images.paths, png(3))


def test_the_encoded_image_is_its_file_or_its_bytes_in_a_shard(tmp_path: Path) -> None:
    files = list_images(make_files(tmp_path / "files", "a.png", "b.png"))
    assert files.encoded(1) == tmp_path / "files" / "b.png"
    shard = list_images(make_tar(tmp_path / "s.tar", {"a.png": png(3), "b.png": png(4)}))
    assert shard.encoded(1) == png(4)
    os.truncate(tmp_path / "s.tar", 600)
    with pytest.raises(ImageError, match="cannot be read"):
        shard.encoded(1)


def test_shards_behind_urls_are_listed_and_read_like_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    members = {f"{name}/{i}.png": png(i) for i, name in enumerate(("cat", "dog", "cat"))}
    local = list_images([make_tar(tmp_path / f"{i}.tar", members) for i in range(2)])
    for i in range(2):
        memory.pipe(f"/sources/{i}.tar", (tmp_path / f"{i}.tar").read_bytes())
    images = list_images([f"memory://sources/{i}.tar" for i in range(2)])
    assert (images.paths, images.labels) == (local.paths, local.labels)
    assert [images.read(i) for i in range(6)] == [local.read(i) for i in range(6)]
    assert list_images("memory://sources/1.tar").paths == local.paths[3:]

    memory.pipe("/sources/1.tar", (tmp_path / "1.tar").read_bytes()[:1000])
    with pytest.raises(ImageError, match="'memory://sources/1.tar' has become shorter"):
        images.decode(5)
    with pytest.raises(ValueError, match="'memory://sources/1.tar' cannot be read beyond byte"):
        list_images("memory://sources/1.tar")
    memory.rm("/sources/1.tar")
    with pytest.raises(FileNotFoundError, match="'memory://sources/1.tar' does not exist"):
        list_images("memory://sources/1.tar")
    with pytest.raises(ValueError, match="'https://host/a.png' is no .tar file. Behind URLs"):
        list_images(["https://host/a.png?key=1", "b.png"])

    monkeypatch.setattr("mocohub.tar_index._RETRY_AFTER_S", (0.0, 0.0))
    read, failures = memory.cat_file, [TimeoutError("slow"), ConnectionError("cut")]
    monkeypatch.setattr(type(memory), "cat_file", lambda self, *a, **k: _fail(failures) or read(*a, **k))
    assert images.read(0) == local.read(0)  # the third time
    failures += [ConnectionError("cut")] * 3
    with pytest.raises(OSError, match="'memory://sources/0.tar' at byte 512: ConnectionError: cut"):
        images.read(0)


def _fail(failures: list[Exception]) -> None:
    if failures:
        raise failures.pop()


def test_a_member_larger_than_any_image_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 32
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    images = list_images(tmp_path / "a.tar")
    tracemalloc.start()
    with pytest.raises(ImageError, match="larger than any image that can be decoded"):
        images.decode(0)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
