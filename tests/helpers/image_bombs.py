"""Image files that declare far more than they hold, and such that hold far more than counts."""

import functools
import struct
import zlib

from tests.helpers.bad_images import NOT_AN_IMAGE
from tests.helpers.image_bytes import behind_header, bmp, chunk, encode, picture, png


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
