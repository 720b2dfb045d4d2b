"""Sources of images: archives and lists that lead elsewhere, files that are no images, or far too large."""

import gzip
import os
import pickle
import struct
import tarfile
import zlib

from helpers.malice import IMAGES, attack, png, run_exec, write_tar, write_zip

LISTS = ("list_images", "extract")


def tar(name, members, harmless_to=(), readers=IMAGES):
    """A tar of what `members` returns for the site."""

    @attack(f"tar: {name}", readers, "shard.tar", harmless_to)
    def _(site, path):
        write_tar(path, members(site))


def member(kind, link="", size=0):
    info = tarfile.TarInfo()
    info.type, info.linkname, info.size = kind, link, size
    return info


# Members are read in place, whatever they are called: a name is text. Links and devices are not followed.
tar("names lead outside", lambda s: {"../../../canaries/tar.png": png()}, harmless_to=IMAGES)
tar("absolute names", lambda s: {str(s.canaries / "tar2.png"): png()}, harmless_to=IMAGES)
tar("symbolic link outside", lambda s: {"a.png": member(tarfile.SYMTYPE, str(s.outside / "secret.png"))})
tar(
    "a member behind a link outside",
    lambda s: {"d": member(tarfile.SYMTYPE, str(s.canaries)), "d/a.png": png()},
    harmless_to=IMAGES,
)
tar("hard link outside", lambda s: {"a.png": member(tarfile.LNKTYPE, str(s.outside / "secret.png"))})
tar("a device", lambda s: {"a.png": member(tarfile.CHRTYPE)})
tar("a pipe", lambda s: {"a.png": member(tarfile.FIFOTYPE)})
tar(
    "pickled labels",
    lambda s: {"a.png": png(), "a.cls": b"cos\nsystem\n(S'touch x'\ntR."},
    harmless_to=IMAGES,
)
tar(
    "pickles beside images",
    lambda s: {"a.png": png(), "a.pyd": b"cos\nsystem\n(S'true'\ntR."},
    harmless_to=IMAGES,
)


@attack("tar: ten gigabytes of holes", IMAGES, "shard.tar")
def _(site, path):
    info = member(tarfile.GNUTYPE_SPARSE, size=0)
    info.name = "a.png"
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = b"%011o\0" % (10 << 30)
    block[148:156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:512])
    path.write_bytes(bytes(block) + b"\0" * 1024)


@attack("tar: a member larger than the file", IMAGES, "shard.tar")
def _(site, path):
    info = member(tarfile.REGTYPE, size=1 << 40)
    info.name = "a.png"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + png())


@attack("tar: a name of a gigabyte", IMAGES, "shard.tar")
def _(site, path):
    info = member(tarfile.GNUTYPE_LONGNAME, size=1 << 30)
    info.name = "././@LongLink"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"a" * 1024)


@attack("tar: a bomb of gzip", IMAGES, "shard.tar.gz")
def _(site, path):
    path.write_bytes(gzip.compress(bytes(64 << 20)))


@attack("zip of images", LISTS, "images.zip")
def _(site, path):
    write_zip(path, {"../../../canaries/zip.png": png(), "a.png": png()})


@attack("zip under the name of a tar", IMAGES, "images.tar")
def _(site, path):
    write_zip(path, {"../../../canaries/zip.png": png()})


@attack("pickle under the name of a list", LISTS, "list.txt", harmless_to=("extract",))
def _(site, path):
    path.write_bytes(pickle.dumps(run_exec(site, path)))


def listing(name, lines, harmless_to=(), file="list.txt"):
    """A list file. A list may name any file: what is no image must be an error of that image, no more."""

    @attack(f"list: {name}", LISTS, file, harmless_to)
    def _(site, path):
        path.write_text("".join(f"{line}\n" for line in lines(site)))


listing("files that are no images", lambda s: ["/etc/passwd", "../../../evil.py"], harmless_to=LISTS)
listing("URLs", lambda s: ["http://127.0.0.1:9/a.png", "file:///etc/passwd", "s3://bucket/a.png"])
listing("commands", lambda s: [f"|touch {s.canaries}/pipe", f"$(touch {s.canaries}/sub)", "`true`"])
listing("endless devices", lambda s: ["/dev/zero", "/dev/urandom"], harmless_to=LISTS)
listing("a null character", lambda s: ["a\0.png"])
listing("a spreadsheet's formula", lambda s: ["path,label", "=cmd|' /C calc'!A0,1"], file="list.csv")


def picture(name, content, harmless_to=("list_images",)):
    """A folder with a good image and a bad one: the bad one must be an error of its own."""

    @attack(f"image: {name}", LISTS, "images", (*harmless_to, "extract"))
    def _(site, path):
        path.mkdir()
        (path / "a.png").write_bytes(png())
        (path / "b.png").write_bytes(content(site, path))


def bomb(width, height):
    """A PNG of a few bytes that says it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def text_bomb(site, path):
    """A PNG with a compressed text of 64 MB."""
    data = b"a\0\0" + zlib.compress(bytes(64 << 20), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    good = png()
    return good[:33] + chunk + good[33:]


POSTSCRIPT = b"%%!PS-Adobe-3.0 EPSF-3.0\n%%%%BoundingBox: 0 0 9 9\n(%s) (w) file closefile\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:9/a.png"/></svg>'

picture("PostScript", lambda s, p: POSTSCRIPT % str(s.canaries / "ps").encode())
picture("SVG", lambda s, p: SVG)
picture("a pickle", lambda s, p: pickle.dumps(run_exec(s, p)))
picture("four billion pixels", lambda s, p: bomb(1 << 16, 1 << 16))
picture("negative size", lambda s, p: bomb((1 << 32) - 1, 1))
picture("a bomb in its text", text_bomb)


@attack("images through links that turn in a circle", LISTS, "images", harmless_to=LISTS)
def _(site, path):
    path.mkdir()
    (path / "a.png").write_bytes(png())
    (path / "again").symlink_to(path)


@attack("image that is a pipe", LISTS, "images", harmless_to=LISTS)
def _(site, path):
    path.mkdir()
    (path / "a.png").write_bytes(png())
    os.mkfifo(path / "b.png")
