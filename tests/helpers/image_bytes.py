"""Image files byte by byte: what Pillow does not write, and pieces of what it does."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


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
