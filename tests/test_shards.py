import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.shards import make_tar, tar_bytes

from mocohub.shard_reader import IDS_PER_SHARD, DamagedShard, ShardError, ShardImage, read_shard
from mocohub.shards import list_shards
from mocohub.sources import list_images


def images_of(path: Path | str, offset: int = 0, index: int = 0) -> list[ShardImage]:
    return list(read_shard(str(path), offset, index))


# Listing


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_gives_its_tars_in_code_point_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.tar", "a/2.tar", "a/10.TAR", "notes.txt", ".hidden.tar", ".trash/c.tar", "a-b/1.tar")
    shards = list_shards(tmp_path)
    assert shards.names == ["a-b/1.tar", "a/10.TAR", "a/2.tar", "b.tar"]
    assert shards.urls == [str(tmp_path / name) for name in shards.names]
    assert (len(shards), shards.num_images, shards.labels, shards.classes) == (4, None, None, None)


def test_patterns_give_what_they_spell_or_match(tmp_path: Path) -> None:
    touch(tmp_path, *(f"s-{i:03d}.tar" for i in range(12)), "t[1]{x,y}.tar")
    names = [f"s-{i:03d}.tar" for i in range(12)]
    assert list_shards(tmp_path / "s-{000..011}.tar").names == names
    assert list_shards(tmp_path / "s-{011..009}.tar").names == names[:8:-1]
    assert list_shards(tmp_path / "s-00{7,3}.tar").names == ["s-007.tar", "s-003.tar"]
    assert list_shards(tmp_path / "s-0*.tar").names == names
    assert list_shards([tmp_path / "s-01?.tar", tmp_path / "s-{001..002}.tar"]).names == [
        *names[10:],
        *names[1:3],
    ]
    assert list_shards(tmp_path / "t[1]{x,y}.tar").names == ["t[1]{x,y}.tar"]  # a file that is really there


def test_braces_expand_as_in_bash(tmp_path: Path) -> None:
    from mocohub.shards import expand_braces

    for pattern in ("x{8..11}", "x{08..11}y{a,b,}", "{1..2}{3..4}", "x{5..5}", "{3..1}z", "x{0..0}{p}{}"):
        expected = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True).stdout
        assert expand_braces(pattern) == expected.split()


def test_a_list_file_starts_at_its_folder_and_may_hold_urls_and_patterns(tmp_path: Path) -> None:
    touch(tmp_path / "data", "one.tar", "p-0.tar", "p-1.tar")
    text = f"\ufeffone.tar\n\n p-{{0..1}}.tar\r\nhttps://host/x/{{1..2}}.tar?key=1\n{tmp_path}/data/../data/one.tar"
    (tmp_path / "data" / "list.txt").write_text(text.replace("/../data/one", "/p-9"), encoding="utf-8")
    touch(tmp_path / "data", "p-9.tar")
    shards = list_shards(tmp_path / "data" / "list.txt")
    folder = f"{tmp_path}/data"
    assert shards.urls == [
        f"{folder}/one.tar",
        f"{folder}/p-0.tar",
        f"{folder}/p-1.tar",
        "https://host/x/1.tar?key=1",
        "https://host/x/2.tar?key=1",
        f"{folder}/p-9.tar",
    ]


def test_names_and_fingerprint_do_not_depend_on_where_the_shards_are(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        touch(tmp_path / place, "a/0.tar", "b/0.tar")
    here, there = list_shards(tmp_path / "here"), list_shards(tmp_path / "there" / "deeper")
    signed = list_shards("https://host/x/{a,b}/0.tar?signature=1")
    assert here.names == there.names == signed.names == ["a/0.tar", "b/0.tar"]
    assert here.fingerprint() == there.fingerprint() == signed.fingerprint()
    assert here.fingerprint() != list_shards(here.urls[::-1]).fingerprint()
    assert list_shards(here.urls[:1]).names == ["0.tar"]
    assert here.path(IDS_PER_SHARD + 5) == "b/0.tar#5"
    assert pickle.loads(pickle.dumps(here)).names == here.names


def test_the_number_of_images_is_that_of_sizes_json_or_the_argument(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar", "1.tar")
    assert list_shards(tmp_path, num_images=7).num_images == 7
    for text, expected in (
        ('{"0.tar": 3, "1.tar": 4}', 7),
        ('{"0.tar": 3}', None),
        ("[]", None),
        ("{", None),
    ):
        (tmp_path / "sizes.json").write_text(text)
        assert list_shards(tmp_path).num_images == expected
    assert list_shards("https://host/{0..1}.tar").num_images is None


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "",
            ValueError,
            r"No .tar shards in '.*'. Pass a folder of .tar files, a .tar file or URL, a pattern",
        ),
        (
            "no-{0..1}.tar",
            FileNotFoundError,
            r"2 of the 2 shards of .* do not exist: .*no-0.tar, .*no-1.tar. C",
        ),
        ("no-*.tar", ValueError, "No .tar shards in"),
        ("x.tar.gz", ValueError, r"x.tar.gz' is no plain .tar file. .* Decompress .* \(gzip -d"),
        ("list.csv", ValueError, "list.csv' is no plain .tar file"),
    ],
)
def test_other_sources_are_refused(tmp_path: Path, source: str, error: type, message: str) -> None:
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(error, match=message):
        list_shards(tmp_path / source)


def test_a_shard_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar")
    with pytest.raises(ValueError, match=r"0.tar' is in 'a list of 2 shards' twice. Remove one"):
        list_shards([tmp_path / "0.tar", tmp_path / "*.tar"])
    with pytest.raises(ValueError, match="'https://host/0.tar' is in .* twice"):
        list_shards(["https://host/0.tar?a", "https://host/0.tar?b"])


# Reading

MEMBERS = {
    "a/0001.jpg": b"one" * 300,
    "a/0001.json": b"{}",
    "a/0001.txt": b"",
    "./a/0002.PNG": b"",
    "a/.hidden.jpg": b"no",
    "b/" + 120 * "long" + "/0003.webp": bytes(range(256)) * 9,
    "b/é.b.jpg": b"x" * 512,
    "b/é.cls": b"7",
    "/abs.tiff": b"y" * 511,
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_gives_the_images_that_list_images_lists(tmp_path: Path, format: int) -> None:
    members = {n: d for n, d in MEMBERS.items() if format != tarfile.USTAR_FORMAT or len(n) < 100}
    path = make_tar(tmp_path / "0.tar", members, format)
    listed, read = list_images(path), images_of(path)
    assert [f"0.tar/{image.path}" for image in read] == listed.paths
    assert [image.data for image in read] == [listed.read(i) for i in range(len(listed))]
    assert [image.index for image in read] == list(range(len(members) - 4))


def test_reading_can_start_behind_any_image(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", MEMBERS)
    whole = images_of(path)
    for i, image in enumerate(whole):
        assert images_of(path, image.end, i + 1) == whole[i + 1 :]


# Faults


def test_what_lies_before_a_cut_is_delivered_and_the_error_says_where(tmp_path: Path) -> None:
    whole = tar_bytes({f"{i}.jpg": bytes(600) for i in range(3)})
    (tmp_path / "0.tar").write_bytes(whole[: 2 * 1536 + 100])
    images = read_shard(str(tmp_path / "0.tar"))
    assert [next(images).index, next(images).index] == [0, 1]
    with pytest.raises(
        DamagedShard,
        match=r"0.tar' cannot be read beyond byte 3172, after 2 images: it has been cut.*\. Copy it",
    ):
        next(images)


def test_no_cut_loses_an_image_silently(tmp_path: Path) -> None:
    members = {f"{i:03d}.jpg": bytes([i]) * (37 * i % 1500) for i in range(12)} | {"last.json": b"{}"}
    whole, path, num_cuts = tar_bytes(members), tmp_path / "cut.tar", 0
    for length in range(0, len(whole), 64):
        path.write_bytes(whole[:length])
        try:
            assert [image.data for image in images_of(path)] == list(members.values())[:-1]
        except DamagedShard:
            num_cuts += 1
    assert num_cuts > 12 * 8


def test_a_shard_without_images_is_an_error(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", {"a.txt": b"", ".b.jpg": b""})
    with pytest.raises(
        DamagedShard, match=r"after 0 images: it holds no image \(looked for members with .jpg"
    ):
        images_of(path)


def test_an_image_larger_than_any_that_could_be_decoded_is_passed_on_without_its_bytes(
    tmp_path: Path,
) -> None:
    size = 300 << 20
    info = tarfile.TarInfo("huge.jpg")
    info.size = size
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(info.tobuf())
        file.seek(size, os.SEEK_CUR)  # a hole, no bytes on the disk
        file.write(tar_bytes({"small.jpg": b"s"}))
    huge, small = images_of(tmp_path / "0.tar")
    assert (huge.path, huge.data) == ("huge.jpg", None)
    assert (small.path, small.data, small.index) == ("small.jpg", b"s", 1)


def test_hostile_members_are_names_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.CHRTYPE, "device.jpg"),
            (tarfile.BLKTYPE, "block.jpg"),
            (tarfile.FIFOTYPE, "pipe.jpg"),
            (tarfile.DIRTYPE, "folder.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../evil.jpg", "/abs.jpg", "twice.jpg", "twice.jpg", "code.pkl"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
    before = sorted(tmp_path.rglob("*"))
    assert [(i.path, i.data) for i in images_of(tmp_path / "in" / "0.tar")] == [
        ("../../evil.jpg", b"data"),
        ("abs.jpg", b"data"),
        ("twice.jpg", b"data"),
        ("twice.jpg", b"data"),
    ]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_shard_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ShardError, match=r"0.tar' cannot be read beyond byte 0, after 0 images: there is no such file. Copy"
    ):
        images_of(tmp_path / "0.tar")


def test_a_shard_holds_no_more_images_than_ids(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", {"a.jpg": b"a", "b.jpg": b"b"})
    assert [image.index for image in images_of(path, 0, IDS_PER_SHARD - 2)][-1] == IDS_PER_SHARD - 1
    with pytest.raises(ShardError, match="it holds more than 16777216 images, make several of it"):
        images_of(path, 0, IDS_PER_SHARD - 1)


def test_first_images_come_from_shards_all_over_the_list(tmp_path: Path) -> None:
    for i in range(10):
        make_tar(tmp_path / f"{i}.tar", {f"{i}-{j}.jpg": b"x" for j in range(2)})
    assert [image.path for image in list_shards(tmp_path).first_images(4)] == [
        "0-0.jpg",
        "2-0.jpg",
        "5-0.jpg",
        "7-0.jpg",
    ]
    assert len(list(list_shards(tmp_path).first_images(99))) == 10


# URLs


@pytest.fixture
def memory():
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def test_urls_are_read_and_matched_by_fsspec(memory, tmp_path: Path) -> None:
    whole = tar_bytes(MEMBERS | {"big.jpg": os.urandom(5 << 20)})
    (tmp_path / "0.tar").write_bytes(whole)
    for i in range(3):
        memory.pipe(f"/bucket/{i}.tar", whole)
    shards = list_shards("memory://bucket/*.tar")
    assert shards.names == ["0.tar", "1.tar", "2.tar"]
    assert shards.urls == list_shards(["memory:///bucket/{0..2}.tar"]).urls
    local = images_of(tmp_path / "0.tar")
    assert images_of(shards.urls[1]) == local
    assert images_of(shards.urls[1], local[2].end, 3) == local[3:]
    memory.pipe("/bucket/1.tar", whole[:4096])
    with pytest.raises(ShardError, match="'memory:///bucket/1.tar' cannot be read beyond byte 4096.* cut"):
        images_of(shards.urls[1])
    with pytest.raises(ShardError, match="cannot be read beyond byte 0"):
        images_of("memory://bucket/9.tar")


def test_local_shards_need_no_fsspec(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", MEMBERS)
    code = (
        "import sys, json; sys.modules['fsspec'] = None\n"
        "from mocohub.shards import list_shards\n"
        f"print(json.dumps([i.path for i in list_shards({str(tmp_path)!r}).first_images(1)]))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["a/0001.jpg"]
