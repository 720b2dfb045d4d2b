"""Image files as they lie around: odd ones that must be read, broken ones that must not.

Each kind has a picture of its own, so that no row can stand for another one unnoticed.
"""

import itertools
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.image_bytes import (
    before_pixels,
    behind_header,
    bmp,
    chunk,
    encode,
    exif,
    gif_with_a_frame_at,
    grey_jpeg,
    interlaced_png,
    picture,
    png,
    segment,
)

NOT_AN_IMAGE = "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
_HTML = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
_SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


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
