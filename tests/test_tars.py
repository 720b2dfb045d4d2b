import errno
import io
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.shards import make_tar, tar_bytes

from mocohub import tars
from mocohub.tars import ForwardFile, TarError, filesystem, members


def files_of(path: Path | str) -> list[tuple[str, bytes]]:
    with ForwardFile(str(path)) as file:
        return [(name, file.read(size)) for name, size in members(file)]


def names_until_error(path: Path) -> tuple[list[str], str]:
    """Return the names in a tar, without reading contents, and the text of the error it ends with."""
    found = []
    try:
        with ForwardFile(str(path)) as file:
            for name, _ in members(file):
                found.append(name)
    except TarError as error:
        return found, str(error)
    return found, ""


def test_what_tar_writes_is_read(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c" * 150 + ".jpg"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(name.encode() * 99)
    os.link(tmp_path / "x" / "a.jpg", tmp_path / "x" / "linked.jpg")
    for format in ("v7", "oldgnu", "gnu", "ustar", "posix"):
        files = ["a.jpg", "b.jpg", *(["c" * 150 + ".jpg"] if format not in ("v7", "ustar") else [])]
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", "-cf", path, f"--format={format}", "-C", tmp_path / "x", *files], check=True)
        assert files_of(path) == [(n, n.encode() * 99) for n in files]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_regular_files_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "b/é.txt", "b/" + 60 * "x" + "/" + 90 * "y", "empty", "a.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += [200 * "long" + ".png", "é" * 90]
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "for all files"}) as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("other")
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 300 * i
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    assert files_of(path) == [(name, bytes([i]) * 300 * i) for i, name in enumerate(names)]
    assert names_until_error(path) == (names, "")
    with tarfile.open(path) as tar:
        assert [member.name for member in tar if member.isreg()] == names


def test_every_cut_is_an_error_or_leaves_all_files(tmp_path: Path) -> None:
    members = {f"{i:03d}.jpg": bytes([i]) * (37 * i % 1500) for i in range(40)}
    members |= {"long" * 40 + ".jpg": b"z", "last.json": b"{}" * 400}
    for format, step in ((tarfile.GNU_FORMAT, 512), (tarfile.PAX_FORMAT, 512), (tarfile.PAX_FORMAT, 64)):
        whole = tar_bytes(members if step == 512 else dict(list(members.items())[-8:]), format)
        path = tmp_path / "cut.tar"
        path.write_bytes(whole)
        files = files_of(path)
        num_errors = 0
        for length in range(0, len(whole), step):
            path.write_bytes(whole[:length])
            try:
                assert files_of(path) == files
            except TarError:
                num_errors += 1
            names, error = names_until_error(path)
            assert names == [name for name, _ in files][: len(names)]
            assert error or len(names) == len(files)
        assert num_errors > 0.75 * len(whole) / step  # the rest is padding behind the end


def flip_header(data: bytearray) -> bytes:
    data[1536 + 3] ^= 1
    return bytes(data)


def with_size(size: int) -> Callable[[bytearray], bytes]:
    """The second member states another size."""

    def change(data: bytearray) -> bytes:
        info = tarfile.TarInfo("1.jpg")
        info.size = size
        data[1536:2048] = info.tobuf(tarfile.GNU_FORMAT)
        return bytes(data)

    return change


def pax_record(
    text: bytes, kind: bytes = tarfile.XHDTYPE, size: int | None = None
) -> Callable[[bytearray], bytes]:
    """An extended header before the second member."""

    def insert(data: bytearray) -> bytes:
        info = tarfile.TarInfo("extended")
        info.type, info.size = kind, len(text) if size is None else size
        return bytes(
            data[:1536] + info.tobuf(tarfile.GNU_FORMAT) + text + bytes(-len(text) % 512) + data[1536:]
        )

    return insert


def sparse(data: bytearray) -> bytes:
    info = tarfile.TarInfo("s.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 10 << 30
    return bytes(data[:1536] + info.tobuf(tarfile.GNU_FORMAT) + data[1536:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_header, r"the header at byte 1536 is damaged \(bad checksum\)"),
        (with_size(-512), "the header at byte 1536 states a size of -512 bytes"),
        (with_size(10 << 30), "it has been cut"),
        (with_size(100 << 20), "it has been cut"),
        (with_size(1 << 43), "it has been cut"),
        (with_size(1 << 70), "the header at byte 1536 states a size of 1180591620717411303424 bytes"),
        (pax_record(b"14 size=-1024\n"), "an extended header states a size of '-1024' bytes"),
        (pax_record(b"20 size=99999999999\n"), "it has been cut"),
        (pax_record(b"99 path=x\n"), "an extended header is damaged"),
        (pax_record(b"path=x\n"), "an extended header is damaged"),
        (pax_record(b"10 path=x\n", size=8 << 30), "an extended header states 8589934592 bytes"),
        (pax_record(b"10 path=x\n", tarfile.XGLTYPE), "one name or size to all files"),
        (
            lambda data: pax_record(b"10 path=x\n")(bytearray(pax_record(b"10 path=x\n")(data))),
            "two extended headers of one kind follow each other, what was between is lost",
        ),
        (pax_record(b"22 GNU.sparse.major=1\n"), "stored as a sparse file"),
        (sparse, "'s.jpg' is stored as a sparse file"),
        (lambda data: bytes(data[:1536] + bytes(512) + data[1536:]), "end-of-archive blocks are missing"),
        (lambda data: bytes(data + data), "more data follows its end, as if several tars had been joined"),
        (
            lambda data: pax_record(b"10 path=x\n")(data)[:2560] + bytes(1024),
            "it ends behind an extended header",
        ),
        (lambda data: b"not a tar" * 1000, r"the header at byte 0 is damaged"),
        (lambda data: b"", "it has been cut"),
    ],
)
def test_damage_is_an_error_after_all_that_lies_whole_before_it(
    tmp_path: Path, change: Callable[[bytearray], bytes], message: str
) -> None:
    whole = tar_bytes({f"{i}.jpg": bytes([i]) * 600 for i in range(3)})
    changed = change(bytearray(whole))
    (tmp_path / "0.tar").write_bytes(changed)
    tracemalloc.start()
    with pytest.raises(TarError, match=message):
        files_of(tmp_path / "0.tar")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 << 20  # whatever sizes the headers state
    names, error = names_until_error(tmp_path / "0.tar")
    assert error and names[:1] == ["0.jpg"] * changed.startswith(whole[:1536])


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path: Path, compression: str) -> None:
    with tarfile.open(tmp_path / "0.tar", f"w:{compression}") as tar:
        info = tarfile.TarInfo("bomb.jpg")
        info.size = 32 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(TarError, match=r"it is compressed: decompress it once"):
        files_of(tmp_path / "0.tar")


def test_names_that_are_not_utf8_are_written_out(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes({"xx.jpg": b"1"}))
    info = tarfile.TarInfo("\udcff\udcfe.jpg")
    info.size = 1
    whole[:512] = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    (tmp_path / "0.tar").write_bytes(whole)
    assert names_until_error(tmp_path / "0.tar") == ([r"\xff\xfe.jpg"], "")


MEMBERS = {f"{i}.jpg": bytes([i]) * 1000 for i in range(5)}


def flaky_filesystem(fails_at: list[int], error: Exception):
    """An fsspec file system over local files whose n-th reads fail."""
    from fsspec.implementations.local import LocalFileSystem

    class Flaky(LocalFileSystem):
        protocol = "flaky"
        cachable = False
        reads = 0

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("flaky://")

        def open(self, path: str, mode: str = "rb", **options: object) -> io.BufferedIOBase:
            file = open(self._strip_protocol(path), mode)
            read = file.read

            class Reader:
                def read(self, size: int) -> bytes:
                    Flaky.reads += 1
                    if Flaky.reads in fails_at:
                        read(size // 2)
                        raise error
                    return read(size)

                seek, close = file.seek, file.close

            return Reader()

    return Flaky


class ServerError(Exception):
    """As aiohttp's: none of OSError."""


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ServerError("503"), TimeoutError()]
)
def test_a_read_that_fails_for_a_moment_is_repeated(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec = pytest.importorskip("fsspec")
    path = make_tar(tmp_path / "0.tar", MEMBERS)
    fsspec.register_implementation("flaky", flaky_filesystem([1, 9], error), clobber=True)
    assert files_of(f"flaky://{path}") == files_of(path)
    assert [record.message for record in caplog.records][0].endswith("Reading it again in 0.5 s.")
    assert len(caplog.records) == 2


def test_a_read_that_keeps_failing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    path = make_tar(tmp_path / "0.tar", MEMBERS)
    monkeypatch.setattr(tars, "_RETRY_AFTER_S", (0.0, 0.0))
    fails = flaky_filesystem(list(range(5, 99)), ServerError("503"))
    fsspec.register_implementation("flaky", fails, clobber=True)
    with pytest.raises(OSError, match="^ServerError: 503$"):
        files_of(f"flaky://{path}")
    assert fails.reads == 4 + 3


def test_unknown_urls_and_missing_packages_are_named(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(
        ValueError, match=r"fsspec cannot open 'nonsense://x/\*.tar': .*nonsense.*Use https://"
    ):
        filesystem("nonsense://x/*.tar")
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from mocohub.tars import filesystem\n"
        "filesystem('s3://bucket/*.tar')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Reading 's3://bucket/*.tar' needs fsspec: pip install 'mocohub[stream]'" in done.stderr
