"""Image files as they lie around: odd ones that must be read, broken ones and bombs that must not.

Each kind has a picture of its own, so that no row can stand for another one unnoticed.
"""

import functools
import io
import itertools
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

NOT_AN_IMAGE = "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
_HTML = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
_SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


def picture(number: int, size: tuple[int, int] = (26, 18)) -> Image.Image:
    """A smooth picture without symmetry, unlike those of all other numbers."""
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if options.pop("with_a_second_image", False):
        options.update(save_all=True, append_images=[image.rotate(180)])
    image.copy().save(file, format, **options)  # a copy, since Pillow's writers leave settings in the image
    return file.getvalue()


def chunk(kind: bytes, data: bytes, crc_error: int = 0) -> bytes:
    """One of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ crc_error)


def png(
    width: int,
    height: int,
    depth: int,
    colour_type: int,
    rows: bytes,
    extra: bytes = b"",
    interlaced: int = 0,
) -> bytes:
    """A PNG made by hand: `rows` are its bytes before compression, `extra` chunks behind the header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def interlaced_png(image: Image.Image) -> bytes:
    """Its seven passes (PNG, section 8.2), which Pillow reads and does not write."""
    pixels = np.asarray(image)
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    lines = [b"\0" + row[x::dx].tobytes() for x, y, dx, dy in passes for row in pixels[y::dy]]
    return png(*image.size, 8, 2, b"".join(lines), interlaced=1)


def behind_header(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with further chunks."""
    return data[:33] + b"".join(chunks) + data[33:]


def before_pixels(jpeg: bytes, segment: bytes) -> bytes:
    """A JPEG with one more segment."""
    return jpeg[:2] + segment + jpeg[2:]


def segment(marker: int, data: bytes) -> bytes:
    """One of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def bmp(width: int, height: int, depth: int, data: bytes, compression: int = 0, table: bytes = b"") -> bytes:
    """A BMP made by hand; `table` is its palette, or its masks."""
    colours = len(table) // 4 if depth <= 8 else 0
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, depth, compression, len(data), 0, 0, colours, 0
    )
    start = 14 + len(header) + len(table)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + table + data


def grey_jpeg(frame: int, width: int = 16, height: int = 16, precision: int = 8, scan: bytes = b"") -> bytes:
    """A JPEG made by hand, with the marker of its frame: 0xC1 is Huffman-coded, 0xC9 arithmetic."""
    frame_header = struct.pack(">BHHBBBB", precision, height, width, 1, 1, 0x11, 0)
    codes = bytes([1, *[0] * 15, 0])  # one code: no difference, no coefficients
    tables = segment(0xDB, bytes(65).replace(b"\0", b"\1").replace(b"\1", b"\0", 1))
    tables += segment(0xC4, b"\0" + codes) + segment(0xC4, b"\x10" + codes)
    scan_header = segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
    return b"\xff\xd8" + tables + segment(frame, frame_header) + scan_header + scan + b"\xff\xd9"


def gif_with_a_frame_at(image: Image.Image, left: int, top: int) -> bytes:
    """A GIF whose screen is larger than its only frame."""
    data = bytearray(encode(image, "GIF"))
    screen = image.width + left + 2, image.height + top + 1
    data[6:10] = struct.pack("<HH", *screen)
    frame = data.rindex(struct.pack("<HH", *image.size), 0, len(data)) - 4
    assert data[frame - 1 : frame] == b","
    data[frame : frame + 4] = struct.pack("<HH", left, top)
    return bytes(data)


def odd_images() -> dict[str, bytes]:
    """Files that must become rows, by name; the suffix is not always that of the format."""
    pictures: Iterator[Image.Image] = map(picture, itertools.count())

    def jpeg(**options: Any) -> bytes:
        return encode(next(pictures), "JPEG", quality=92, **options)

    def plain_png() -> bytes:
        return encode(next(pictures), "PNG")

    def alpha() -> Image.Image:
        rgba = next(pictures)
        rgba.putalpha(next(pictures).convert("L"))
        return rgba

    cmyk = encode(next(pictures).convert("CMYK"), "JPEG", quality=92)
    adobe = cmyk.index(b"Adobe") + 11  # its transform: 0 is CMYK, 2 is YCCK (Adobe technical note 5116)
    split = plain_png()
    at = split.index(b"IDAT")
    (length,) = struct.unpack(">I", split[at - 4 : at])
    pixels = split[at + 4 : at + 4 + length]
    pieces = [chunk(b"IDAT", part) for part in (b"", pixels[:7], b"", pixels[7:], b"")]
    longer = plain_png()
    longer_at = longer.index(b"IDAT")
    grey16 = np.uint16(next(pictures).convert("L")) * 257
    big_endian = Image.frombytes("I;16B", grey16.shape[::-1], grey16.astype(">u2").tobytes())
    files = {
        "baseline.jpg": jpeg(),
        "progressive.jpg": jpeg(progressive=True),
        "optimized.jpg": jpeg(optimize=True),
        "restart markers.jpg": jpeg(restart_marker_rows=1),
        "grey.jpg": encode(next(pictures).convert("L"), "JPEG"),
        "CMYK.jpg": cmyk,
        "YCCK.jpg": cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :],
        "RGB without conversion.jpg": jpeg(keep_rgb=True),
        "arithmetic-coded.jpg": grey_jpeg(0xC9, scan=bytes.fromhex("9d4c1b70")),
        "extended sequential.jpg": grey_jpeg(0xC1, scan=b"\0"),
        "several images.mpo": encode(next(pictures), "MPO", with_a_second_image=True),
        "rubbish behind the end.jpg": jpeg() + b"\0rubbish" * 9,
        "another one behind it.jpg": jpeg() + jpeg(),
        "filled up with zeros.jpg": jpeg() + bytes(4096),
        "long comment.jpg": before_pixels(jpeg(), segment(0xFE, b"c" * 60_000)),
        "damaged profile.jpg": jpeg(icc_profile=b"no profile" * 20),
        "first of two parts of a profile.jpg": before_pixels(jpeg(), segment(0xE2, b"ICC_PROFILE\0\1\2abc")),
        "damaged Exif.jpg": before_pixels(jpeg(), segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f")),
        "Photoshop data.jpg": before_pixels(
            jpeg(), segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\2ab")
        ),
        **{f"turned {turn}.jpg": jpeg(exif=exif(turn)) for turn in range(1, 9)},
        "turned 9.jpg": jpeg(exif=exif(9)),
        "PNG by another name.jpg": plain_png(),
        "JPEG by another name.png": jpeg(),
        "WebP by another name.jpg": encode(next(pictures), "WEBP"),
        "GIF by another name.JPEG": encode(next(pictures), "GIF"),
        "16 bits.png": encode(Image.fromarray(np.uint16(next(pictures).convert("L")) * 257), "PNG"),
        "16 bits of each colour.png": png(
            13, 9, 16, 2, b"".join(b"\0" + bytes([row] * 78) for row in range(9))
        ),
        "palette.png": encode(next(pictures).quantize(16), "PNG"),
        "palette with transparency.png": encode(
            next(pictures).quantize(8), "PNG", transparency=bytes(range(0, 256, 32))
        ),
        "one transparent colour.png": encode(next(pictures), "PNG", transparency=(1, 2, 3)),
        "one bit.png": encode(next(pictures).convert("1"), "PNG"),
        "two bits.png": png(8, 2, 2, 0, b"\0\x1b\xe4\0\x00\xff"),
        "grey with alpha.png": encode(alpha().convert("LA"), "PNG"),
        "alpha.png": encode(alpha(), "PNG"),
        "interlaced.png": interlaced_png(next(pictures)),
        "animated.png": encode(next(pictures), "PNG", with_a_second_image=True),
        "empty and split chunks.png": split[: at - 4] + b"".join(pieces) + chunk(b"IEND", b""),
        "without an end.png": plain_png()[:-12],
        "chunk longer than the file.png": longer[: longer_at - 4] + b"\x7f\xff\xff\xff" + longer[longer_at:],
        "unknown chunk.png": behind_header(plain_png(), chunk(b"prVt", bytes(100))),
        "damaged profile.png": behind_header(plain_png(), chunk(b"iCCP", b"p\0\0no zlib stream")),
        "compressed text.png": behind_header(
            plain_png(), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 99))
        ),
        "one pixel.png": encode(picture(900, (1, 1)), "PNG"),
        "one pixel.jpg": encode(picture(901, (1, 1)), "JPEG"),
        "one pixel.gif": encode(picture(902, (1, 1)), "GIF"),
        "one column.png": encode(picture(903, (1, 700)), "PNG"),
        "one row.jpg": encode(picture(904, (700, 1)), "JPEG"),
        "three thousand to two.png": encode(picture(905, (3000, 2)), "PNG"),
        "lossy.webp": encode(next(pictures), "WEBP"),
        "lossless.webp": encode(next(pictures), "WEBP", lossless=True),
        "alpha.webp": encode(alpha(), "WEBP"),
        "animated.webp": encode(next(pictures), "WEBP", lossless=True, with_a_second_image=True),
        "turned.webp": encode(next(pictures), "WEBP", exif=exif(6)),
        "still.gif": encode(next(pictures), "GIF", interlace=0),
        "interlaced.gif": encode(next(pictures), "GIF", interlace=1),
        "animated.gif": encode(next(pictures), "GIF", disposal=2, with_a_second_image=True),
        "transparent.gif": encode(next(pictures).quantize(8), "GIF", transparency=2),
        "smaller than its screen.gif": gif_with_a_frame_at(next(pictures), 3, 2),
        "without an end.gif": encode(next(pictures), "GIF")[:-1],
        "24 bits.bmp": encode(next(pictures), "BMP"),
        "palette.bmp": encode(next(pictures).quantize(16), "BMP"),
        "one bit.bmp": encode(next(pictures).convert("1"), "BMP"),
        "from the top.bmp": bmp(4, -2, 24, bytes(range(100, 124))),
        "16 bits.bmp": bmp(2, 2, 16, b"\x1f\0\xe0\7\0\xf8\xff\xff", 3, struct.pack("<III", 63488, 2016, 31)),
        "run lengths.bmp": bmp(4, 2, 8, b"\4\1\0\0\2\0\2\1\0\1", 1, b"\0\x20\xc0\0\xf0\x10\x60\0"),
        "little-endian.tiff": encode(next(pictures), "TIFF"),
        "big-endian.tiff": encode(big_endian, "TIFF"),
        "BigTIFF.tiff": encode(next(pictures), "TIFF", big_tiff=True),
        "two pages.tiff": encode(next(pictures), "TIFF", with_a_second_image=True),
        "LZW.tiff": encode(next(pictures), "TIFF", compression="tiff_lzw"),
        "deflate.tiff": encode(next(pictures), "TIFF", compression="tiff_adobe_deflate"),
        "packbits.tiff": encode(next(pictures), "TIFF", compression="packbits"),
        "JPEG inside.tiff": encode(next(pictures), "TIFF", compression="jpeg"),
        "fax.tiff": encode(next(pictures).convert("1"), "TIFF", compression="group4"),
        "16 bits.tiff": encode(Image.fromarray(np.uint16(next(pictures).convert("L")) * 257), "TIFF"),
        "CMYK.tiff": encode(next(pictures).convert("CMYK"), "TIFF"),
        "alpha.tiff": encode(alpha(), "TIFF"),
        "turned.tiff": encode(next(pictures), "TIFF", exif=exif(8)),
    }
    return files


def broken_images() -> dict[str, tuple[bytes, str]]:
    """Files that must become errors, by name, with a pattern of the reason."""
    pictures: Iterator[Image.Image] = map(picture, itertools.count(500))
    jpeg = encode(next(pictures), "JPEG", quality=92)
    progressive = encode(next(pictures), "JPEG", quality=92, progressive=True)
    plain = encode(next(pictures), "PNG")
    interlaced = interlaced_png(next(pictures))
    webp = encode(next(pictures), "WEBP", lossless=True)
    gif = encode(next(pictures), "GIF")
    bitmap = encode(next(pictures), "BMP")
    tiff = encode(next(pictures), "TIFF", compression="tiff_lzw")
    scan = jpeg.index(b"\xff\xda")
    data = plain.index(b"IDAT") + 4
    huffman = bytearray(jpeg)
    huffman[jpeg.index(b"\xff\xc4") + 5 : jpeg.index(b"\xff\xc4") + 21] = b"\xff" * 16  # codes of each length
    ramp = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    circle = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 9, 8)  # its next page is itself
    cut = {
        "cut in its first marker.jpg": (jpeg[:3], "truncated or damaged JPEG"),
        "cut in its tables.jpg": (jpeg[: scan // 2], "truncated or damaged JPEG"),
        "cut before its pixels.jpg": (jpeg[:scan], "truncated or damaged JPEG"),
        "cut behind its last table.jpg": (jpeg[: scan + 14], "truncated or damaged JPEG"),
        "cut in the middle.jpg": (jpeg[: (scan + len(jpeg)) // 2], "truncated or damaged JPEG"),
        "cut between two scans.jpg": (
            progressive[: progressive.index(b"\xff\xda", 700)],
            "truncated or damaged JPEG",
        ),
        "cut in its signature.png": (plain[:7], NOT_AN_IMAGE),
        "cut in its header.png": (plain[:20], "truncated or damaged PNG"),
        "cut in the middle.png": (plain[: (data + len(plain)) // 2], "truncated or damaged PNG"),
        "interlaced and cut.png": (interlaced[:-400], "truncated or damaged PNG"),
        "cut.webp": (webp[: len(webp) // 2], "truncated or damaged WebP"),
        "cut.gif": (gif[: len(gif) * 2 // 3], "truncated or damaged GIF"),
        "cut in its palette.gif": (gif[:200], "truncated or damaged GIF"),
        "cut.bmp": (bitmap[: len(bitmap) // 2], "truncated or damaged BMP"),
        "cut.tiff": (tiff[: len(tiff) // 2], "truncated or damaged TIFF"),
    }
    foreign = {
        "empty.jpg": b"",
        "text.jpg": b"These are not the pixels you are looking for.\n",
        "zeros.jpg": bytes(5000),
        "HTML page.jpg": _HTML,
        "JSON.jpg": b'{"error": "access denied"}',
        "pointer of Git LFS.png": _LFS,
        "SVG.png": _SVG,
        "PDF.jpg": b"%PDF-1.7\n1 0 obj<<>>endobj\n",
        "PostScript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "HEIC.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500),
        "AVIF.jpg": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(500),
        "JPEG XL.jpg": b"\xff\x0a" + bytes(500),
        "JPEG 2000.jpg": encode(next(pictures), "JPEG2000"),
        "icon.png": encode(next(pictures), "ICO"),
        "portable pixmap.png": encode(next(pictures), "PPM"),
        "gzip.jpg": b"\x1f\x8b\x08\0" + bytes(40),
        "zip.jpg": b"PK\x03\x04" + bytes(40),
        "AppleDouble.jpg": b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60),
        "sound.webp": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
        "line ends of text.png": plain.replace(b"\r\n", b"\n"),
    }
    wrong = {
        "impossible Huffman codes.jpg": (bytes(huffman), "truncated or damaged JPEG"),
        "no pixels.jpg": (jpeg[:scan] + b"\xff\xd9", "truncated or damaged JPEG"),
        "no tables.jpg": (b"\xff\xd8" + jpeg[jpeg.index(b"\xff\xc0") :], "truncated or damaged JPEG"),
        "no width.jpg": (grey_jpeg(0xC0, width=0), "truncated or damaged JPEG"),
        "12 bits.jpg": (grey_jpeg(0xC1, precision=12, scan=b"\0"), "truncated or damaged JPEG"),
        "lossless.jpg": (grey_jpeg(0xC3, scan=b"\0"), "truncated or damaged JPEG"),
        "wrong checksum of the header.png": (
            plain[:29] + bytes([plain[29] ^ 1]) + plain[30:],
            "truncated or damaged PNG",
        ),
        "wrong stream.png": (plain[:data] + b"\0" * 20 + plain[data + 20 :], "truncated or damaged PNG"),
        "no pixels.png": (plain[: data - 8] + chunk(b"IEND", b""), "truncated or damaged PNG"),
        "no header.png": (plain[:8] + plain[33:], "truncated or damaged PNG"),
        "no width.png": (png(0, 5, 8, 2, b""), "truncated or damaged PNG"),
        "three bits.png": (png(8, 1, 3, 0, bytes(4)), "truncated or damaged PNG"),
        "no such kind of colour.png": (png(8, 1, 8, 7, bytes(9)), "truncated or damaged PNG"),
        "wrong checksum of a text.png": (
            behind_header(plain, chunk(b"tEXt", b"a\0b", crc_error=1)),
            "truncated or damaged PNG",
        ),
        "no frame.gif": (gif[:13] + b";", "truncated or damaged GIF"),
        "no such header.bmp": (bitmap[:14] + b"\7" + bitmap[15:], "truncated or damaged BMP"),
        "directory beyond the end.tiff": (b"II*\0" + struct.pack("<I", 10**6), "truncated or damaged TIFF"),
        "directory in a circle.tiff": (circle, "truncated or damaged TIFF"),
        "float pixels.tiff": (encode(ramp, "TIFF"), "float pixels have no known range"),
        "beyond 16 bits.tiff": (
            encode(Image.fromarray(np.array([[5, 70_000]], np.int32)), "TIFF"),
            "integer pixels from 5 to 70000",
        ),
    }
    reasons = {name: (data, "empty file" if not data else NOT_AN_IMAGE) for name, data in foreign.items()}
    return {**cut, **reasons, **wrong}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes set, flipped, deleted and inserted in a few places, often near the start; sometimes a cut."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        position = chance.randrange(min(len(data), chance.choice([40, 10_000])))
        action = chance.choice(["set", "set", "flip", "delete", "insert", "cut"])
        if action == "set":
            data[position] = chance.randrange(256)
        elif action == "flip":
            data[position] ^= 1 << chance.randrange(8)
        elif action == "delete":
            del data[position : position + chance.randrange(1, 9)]
        elif action == "insert":
            data[position:position] = chance.randbytes(chance.randrange(1, 9))
        elif chance.random() < 0.2:
            del data[max(position, 20) :]
    return bytes(data)


def mutated_images(count: int) -> dict[str, bytes]:
    """So many damaged JPEG, PNG and WebP images, by name; always the same."""
    images = [picture(number) for number in range(600, 620)]
    writers = {
        "jpg": [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}],
        "png": [{"format": "PNG"}],
        "webp": [{"format": "WEBP"}, {"format": "WEBP", "lossless": True}],
    }
    whole = [
        (encode(image, **options), suffix)
        for image in images
        for suffix, kinds in writers.items()
        for options in kinds
    ]
    whole += [(interlaced_png(image), "png") for image in images]
    files = {}
    for i in range(count):
        chance = random.Random(i)
        data, suffix = chance.choice(whole)
        files[f"{i:05d}.{suffix}"] = mutated(data, chance)
    return files


def gif_bomb(frame_px: int = 13_000, screen_px: int = 1) -> bytes:
    """A small screen under a large frame, with the disposal method that makes Pillow allocate at once."""
    screen = b"GIF89a" + struct.pack("<HHBBB", screen_px, screen_px, 0x80, 0, 0) + bytes(6)
    control = b"!\xf9\x04\x08\0\0\0\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, frame_px, frame_px, 0) + b"\x02\x02\x44\x01\0"
    return screen + control + frame + b";"


def tiff_bomb(width: int = 16, height: int = 16, **tags: int) -> bytes:
    """A TIFF of a few bytes; `tags` as t322 are set, or left out where 0."""
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 273: 99, 277: 1, 278: height, 279: 99}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    kept = sorted((tag, value) for tag, value in entries.items() if value or tag == 256)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in kept)
    return b"II*\0" + struct.pack("<IH", 8, len(kept)) + body + bytes(4)


def tile_bomb(width: int = 16, tile_px: int = 16_384) -> bytes:
    """A small image in one large, compressed tile."""
    return tiff_bomb(width, t322=tile_px, t323=tile_px, t324=8, t325=99, t273=0, t278=0, t279=0)


def webp_bomb() -> bytes:
    """12,000 x 12,000 pixels of one colour, lossless."""
    return bytes.fromhex(
        "5249464626000000574542505650384c190000002fdfeeb71b075081540820000a1a02495bbced8f8f88e87f0000"
    )


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP of one frame, which is small, on a large canvas (WebP container, "VP8X")."""
    still = encode(picture(990), "WEBP")[12:]

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    def part(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data

    frame = bytes(6) + three(25) + three(17) + three(100) + b"\0" + still
    body = part(b"VP8X", b"\2\0\0\0" + three(width - 1) + three(height - 1))
    body += part(b"ANIM", bytes(6)) + part(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def texts(kind: bytes, count: int, megabytes: int, behind: bool = False) -> bytes:
    """A small PNG with compressed texts that are large, before or behind its pixels."""
    packed = zlib.compress(bytes(megabytes << 20), 9)
    head = {b"zTXt": b"%d\0\0", b"iTXt": b"%d\0\1\0\0\0", b"iCCP": b"%d\0\0"}[kind]
    chunks = [chunk(kind, head % i + packed) for i in range(count)]
    image = encode(picture(991), "PNG")
    return image[:-12] + b"".join(chunks) + image[-12:] if behind else behind_header(image, *chunks)


@functools.cache
def bombs() -> dict[str, tuple[bytes, str]]:
    """Files that declare far more than they hold, by name, with a pattern of the reason."""
    jpeg = encode(picture(992), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5

    def jpeg_of(height: int, width: int, data: bytes = jpeg, at: int = at) -> bytes:
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]

    progressive = encode(picture(993), "JPEG", progressive=True)
    black = bytes(14_000 * (1 + 14_000 // 8))
    more = " pixels, more than max_pixels="
    return {
        "196 million black.png": (png(14_000, 14_000, 1, 0, black), f"14000 x 14000{more}"),
        "100 million.png": (png(10_000, 10_000, 8, 2, b""), f"10000 x 10000{more}"),
        "10 thousand million.png": (png(100_000, 100_000, 8, 6, b""), f"100000 x 100000{more}"),
        "a million million.png": (png(10**6, 10**6, 16, 6, b""), f"1000000 x 1000000{more}"),
        "all that fits.png": (png(2**31 - 1, 2**31 - 1, 8, 3, b""), more),
        "one high column.png": (png(1, 10**9, 8, 2, b""), f"1 x 1000000000{more}"),
        "interlaced.png": (png(60_000, 60_000, 8, 2, b"", interlaced=1), f"60000 x 60000{more}"),
        "one text of 64 MB.png": (texts(b"zTXt", 1, 64), "truncated or damaged PNG"),
        "an international text of 64 MB.png": (texts(b"iTXt", 1, 64), "truncated or damaged PNG"),
        "a profile of 64 MB.png": (texts(b"iCCP", 1, 64), "truncated or damaged PNG"),
        "a hundred texts of 1 MB.png": (
            texts(b"zTXt", 100, 1),
            "truncated or damaged PNG .texts of up to 104857600 bytes",
        ),
        "a hundred texts behind the pixels.png": (
            texts(b"zTXt", 100, 1, behind=True),
            "truncated or damaged PNG .texts of up to 104857600 bytes",
        ),
        "lossless.webp": (webp_bomb(), f"12000 x 12000{more}"),
        "canvas of 1e8.webp": (webp_canvas(10_000, 10_000), f"10000 x 10000{more}"),
        "canvas of 4e9.webp": (webp_canvas(65_535, 65_535), f"65535 x 65535{more}|damaged WebP"),
        "canvas of 2e14.webp": (webp_canvas(1 << 24, 1 << 24), f"16777216{more}|damaged WebP"),
        "frame.gif": (gif_bomb(), f"13000 x 13000{more}"),
        "screen.gif": (gif_bomb(1, 65_535), f"65535 x 65535{more}"),
        "frame and screen.gif": (gif_bomb(65_535, 65_535), f"65535 x 65535{more}"),
        "1e8.bmp": (bmp(10_000, 10_000, 24, b""), f"10000 x 10000{more}"),
        "4e18.bmp": (bmp(2**31 - 1, 2**31 - 1, 1, b"", 0, bytes(8)), f"2147483647 x 2147483647{more}"),
        "from the top.bmp": (bmp(50_000, -50_000, 24, b""), f"50000 x 50000{more}"),
        "run lengths.bmp": (bmp(30_000, 30_000, 8, b"\0\1", 1, bytes(1024)), f"30000 x 30000{more}"),
        "tile.tiff": (tile_bomb(), f"16384 x 16384{more}"),
        "strips of 1e10.tiff": (tiff_bomb(100_000, 100_000), f"100000 x 100000{more}"),
        "1e19.tiff": (tiff_bomb(2**32 - 1, 2**32 - 1), more),
        "65500 x 65500.jpg": (jpeg_of(65_500, 65_500), f"65500 x 65500{more}"),
        "65500 x 65500 progressive.jpg": (
            jpeg_of(65_500, 65_500, progressive, progressive.index(b"\xff\xc2") + 5),
            f"65500 x 65500{more}",
        ),
        "JPEG 2000 by another name.jpg": (encode(picture(994), "JPEG2000"), NOT_AN_IMAGE),
        "bomb in an archive.png": (zlib.compress(png(10**6, 10**6, 8, 2, b"")), NOT_AN_IMAGE),
    }


@functools.cache
def harmless_giants() -> dict[str, bytes]:
    """Files that hold far more than their first image, which alone counts: they are rows."""
    image = encode(picture(995).quantize(4), "GIF")
    start = image.rindex(b",")
    many = image[:-1] + b"".join([image[start:-1]] * 100_000) + b";"
    second = image[:-1] + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\0;"
    return {
        "100,000 frames.gif": many,
        "second frame of 4e9.gif": second,
        "texts of a kilobyte.png": behind_header(
            encode(picture(996), "PNG"), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000))) * 1000
        ),
    }
