import errno
import os
import stat
from pathlib import Path

import pytest

from mocohub.files import (
    atomic_folder,
    damage,
    read_json,
    refuse_existing,
    remove_folder,
    replace_file,
    sha256,
    write_checksums,
    write_json,
    writing,
)


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
        raise RuntimeError("half way")
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (out / "a").read_text() == "1"


def test_files_become_readable_as_the_umask_says(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "private").touch(mode=0o600)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out" / "private").stat().st_mode) == 0o644


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="full' already exists. Choose another --out"):
        refuse_existing(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))


def test_a_folder_with_checksums_is_verified_to_the_last_byte(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"abc")
    write_json(tmp_path / "record.json", {"sha256": {"data": sha256(tmp_path / "data")}, "step": 1})
    assert damage(tmp_path, "record.json", "data") is None
    write_checksums(tmp_path)
    assert damage(tmp_path, "record.json", "data") is None
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        for offset in range(len(content)):
            flipped = bytearray(content)
            flipped[offset] ^= 2
            file.write_bytes(flipped)
            assert damage(tmp_path, "record.json", "data"), f"{file.name} byte {offset}"
        file.write_bytes(content)
    assert "FileNotFoundError" in damage(tmp_path / "nowhere", "record.json", "data")


def test_removing_a_folder_leaves_nothing_and_may_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    remove_folder(tmp_path / "out")
    remove_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [] and not caplog.text
    (tmp_path / ("x" * 250)).mkdir()  # its hidden name is too long
    remove_folder(tmp_path / ("x" * 250))
    assert "x' cannot be removed" in caplog.text


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (sha256, read_json):
        with pytest.raises(ValueError, match="pipe is no regular file"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 1_000_000])
def test_json_that_python_gives_up_on_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.json").write_text(text)
    with pytest.raises(ValueError, match=r"deep\.json is not valid JSON"):
        read_json(tmp_path / "deep.json")


def test_a_file_is_replaced_whole_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "a.txt", "old")
    replace_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        replace_file(tmp_path / "a.txt", "newer")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a.txt", "new")]


def test_an_output_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error, remedy in ((errno.ENOSPC, "Make room there"), (errno.EROFS, "Choose another --out")):
        with pytest.raises(OSError, match=f"'out' cannot be written. {remedy}") as raised, writing("out"):
            raise OSError(error, "")
        assert raised.value.errno == error
    with pytest.raises(FileExistsError, match="file/out' cannot be written. Choose another --out"):
        with atomic_folder(tmp_path / "file" / "out"):
            pass
    with pytest.raises(FileNotFoundError, match="^images$"), writing("out"):
        raise FileNotFoundError("images")


def test_names_that_are_not_utf8_come_back_from_json(tmp_path: Path) -> None:
    value = {"source": os.fsdecode(b"caf\xe9/photos"), "text": "caf\N{LATIN SMALL LETTER E WITH ACUTE}"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "caf\N{LATIN SMALL LETTER E WITH ACUTE}" in (tmp_path / "a.json").read_text("utf-8")


def test_a_file_system_that_cannot_flush_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or refuses_files:
            raise OSError(errno.EINVAL, "Invalid argument")

    refuses_files = False
    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"
    refuses_files = True
    with pytest.raises(OSError, match="Invalid argument"), atomic_folder(tmp_path / "other") as folder:
        (folder / "a").write_text("1")
