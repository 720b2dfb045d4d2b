"""Bytes in, 8-bit RGB pixels out: the one decoder of training, extraction and transfer.

It reads six formats, whatever the file is called; compares the size with a limit before decoding a pixel;
and raises nothing but `ImageError`, whatever the bytes are. All parts of mocohub therefore see the same
pixels, and accept and refuse the same files.
"""

import io
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# A quarter of a gibibyte as RGB bytes: the size from which Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485
MAX_IMAGE_BYTES = 3 * MAX_PIXELS  # of one in a tar, which is read as a whole: the largest as RGB
# Files that are listed as images, in any case. Those of the second line cannot be read: each is an error with
# its reason, instead of missing without a word.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SUFFIXES += (".heic", ".heif", ".avif", ".jxl", ".jp2", ".ppm", ".pgm")
TOO_LARGE = "larger than any image that can be decoded"

# The first bytes of a file decide. Pillow's readers are called directly because Image.open compares every
# image with a limit of its own, which is a global variable, and answers with warnings.
_READERS = (
    (rb"\xff\xd8\xff", "JPEG", JpegImagePlugin.jpeg_factory),  # and MPO: a JPEG with others behind it
    (rb"\x89PNG\r\n\x1a\n", "PNG", PngImagePlugin.PngImageFile),
    (rb"RIFF.{4}WEBP", "WebP", WebPImagePlugin.WebPImageFile),
    (rb"GIF8[79]a", "GIF", GifImagePlugin.GifImageFile),
    (rb"BM", "BMP", BmpImagePlugin.BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", "TIFF", TiffImagePlugin.TiffImageFile),
)
_MAGIC_BYTES = 16

# What the compressed texts of a PNG may become in memory. Deflate makes 1032 bytes of one at most, and Pillow
# refuses a text of more than a mebibyte.
_MAX_TEXT_BYTES = 32 << 20
_MAX_EXPANSION, _PILLOWS_MAX_TEXT_BYTES = 1032, 1 << 20

# EXIF orientation -> what turns the stored pixels upright (Exif 2.32, section 4.6.4, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_changing_pillow = threading.Lock()


class ImageError(ValueError):
    """One image cannot be used; the text is the reason, to stand beside the image's path."""


def decode_image(data: bytes | str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one JPEG (or MPO), PNG, WebP, GIF, BMP or TIFF image to upright 8-bit RGB.

    Of an animation or a file with several pages the first image counts. Colours and orientation follow the
    rules of `to_rgb`.

    Args:
        data: The bytes of an image file, or its path.
        max_pixels: Largest width x height that is decoded; the header alone decides. It replaces Pillow's
            own limit, except that WebP and animated GIF cannot pass twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        A loaded image of mode RGB that needs no open file.

    Raises:
        ImageError: If the file cannot be read, is empty, of another format, too large, truncated or damaged,
            or its pixels have no meaning as RGB (see `to_rgb`). No other exception leaves this function.
    """
    with open_image(data, max_pixels=max_pixels) as opened:
        return opened.decode()


@contextmanager
def open_image(data: bytes | str | Path, *, max_pixels: int = MAX_PIXELS) -> Iterator["OpenImage"]:
    """Read the header of an image, whose pixels may then be decoded, also smaller; see `decode_image`.

    >>> file = io.BytesIO()
    >>> Image.new("RGB", (640, 481)).save(file, "JPEG")
    >>> with open_image(file.getvalue()) as opened:
    ...     opened.size, opened.decode(shrink=4).size
    ((640, 481), (160, 121))
    """
    if isinstance(data, bytes):
        file: BinaryIO = io.BytesIO(data)
    else:
        file = open_file(data)
    with file:
        yield OpenImage(*_read_header(file, max_pixels))


def open_file(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes, unless it is a pipe or a device: one waits for those, or has no end.

    Raises:
        ImageError: If that cannot be done.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ImageError("cannot be read: it is a pipe or a device, not a file")
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


class OpenImage:
    """An image whose size is known before its pixels are, if it is a JPEG; others are decoded at once.

    Attributes:
        size: Upright width and height in px, undiminished.
        shrinks: What `decode` accepts, from 1 up.
    """

    def __init__(self, image: Image.Image, name: str) -> None:
        """Take an image that Pillow has opened, and the name of its format."""
        self._image, self._name, self._rgb = image, name, None
        if name != "JPEG":
            self._rgb = self.decode()
            self.size, self.shrinks = self._rgb.size, [1]
            return
        width, height = image.size
        turn = _orientation(image)
        self.size = (height, width) if turn in (5, 6, 7, 8) else (width, height)
        # Pixel i of a smaller image covers those from i * shrink on. Where the upright image begins at the
        # far end of the stored one, no pixel may be left over there.
        begins = width if turn in (2, 3, 7, 8) else 0, height if turn in (3, 4, 6, 7) else 0
        self.shrinks = [k for k in (1, 2, 4, 8) if begins[0] % k == begins[1] % k == 0]

    def largest_shrink(self, least_px: int) -> int:
        """Return the largest of `shrinks` that keeps `least_px` of the shorter side; 1 if none does."""
        return max(k for k in self.shrinks if k == 1 or min(self.size) // k >= least_px)

    def decode(self, shrink: int = 1) -> Image.Image:
        """Return the pixels, upright RGB; call it once.

        Args:
            shrink: One of `shrinks`: the side of the squares of pixels that become one while the JPEG is
                decoded. A rest at the right and lower edge counts as one more pixel.

        Raises:
            ImageError: As `decode_image`.
        """
        if self._rgb is not None:
            return self._rgb
        try:
            if shrink > 1:
                width, height = self._image.size
                self._image.draft(None, (max(1, width // shrink), max(1, height // shrink)))
            _load(self._image)
        except Exception as error:
            raise _damaged(self._name, error) from error
        return to_rgb(self._image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as upright 8-bit RGB, by the rules of `decode_image`.

    The EXIF orientation is applied. Transparency is laid over white, be it an alpha channel, a palette with
    alpha or one transparent colour. Integer pixels of 16 or 32 bits (modes I;16 and I) are taken as 0 to
    65535 and divided by 257, so that 65535 becomes 255. All other modes convert as Pillow converts them.

    Args:
        image: Any PIL image; it is not changed.

    Returns:
        An image of mode RGB: `image` itself if there is nothing to do.

    Raises:
        ImageError: If the image has no pixels, cannot be loaded, has float pixels (mode F) or integer pixels
            outside 0 to 65535.

    >>> to_rgb(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0))  # half transparent black
    (127, 127, 127)
    """
    try:
        image.load()
        rgb = _over_white(image)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            rgb = rgb.transpose(turn)
            rgb.info = {}  # with the EXIF data left in, a later reader would turn the image again
        return rgb
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be converted from mode {image.mode} to RGB ({error})") from error


def _read_header(file: BinaryIO, max_pixels: int) -> tuple[Image.Image, str]:
    """Identify and measure an image; return it unloaded, with the name of its format."""
    name = "file"
    try:
        magic = file.read(_MAGIC_BYTES)
        found = [(name, reader) for start, name, reader in _READERS if re.match(start, magic, re.DOTALL)]
        if not found:
            raise ImageError("not a JPEG, PNG, WebP, GIF, BMP or TIFF image" if magic else "empty file")
        name, reader = found[0]
        if name == "GIF":  # Pillow allocates GIF frames while it opens the file
            file.seek(0)
            _check_size(*_gif_size(file), max_pixels)
        if name == "PNG":
            _check_texts(file)
        file.seek(0)
        image = reader(file)
        _check_size(*image.size, max_pixels)
        if name == "TIFF":  # a tile is decoded as a whole, however little of it the image shows
            tags = image.tag_v2
            tile = tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0)
            _check_size(*tile, max_pixels)
        return image, name
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageError:
    """What stands for the some ten kinds that Pillow lets out, from SyntaxError to struct.error."""
    return ImageError(f"truncated or damaged {name} ({error})")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels, more than max_pixels={max_pixels}")


def _check_texts(file: BinaryIO) -> None:
    """Refuse a PNG whose compressed texts are many: Pillow would keep 64 MiB of them."""
    file.seek(8)
    total = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            total += min(length * _MAX_EXPANSION, _PILLOWS_MAX_TEXT_BYTES)
        file.seek(length + 4, io.SEEK_CUR)
    if total > _MAX_TEXT_BYTES:
        raise ImageError(f"truncated or damaged PNG (texts of up to {total} bytes)")


def _gif_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height of the screen and the first frame together, from the headers (GIF89a, 17 to 20)."""
    width, height, flags = struct.unpack("<HHB", file.read(13)[6:11])
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), io.SEEK_CUR)  # the palette
    while (block := file.read(1)) != b",":
        if block == b"!":  # an extension: its kind, then sub-blocks up to an empty one
            file.read(1)
            while length := file.read(1)[0]:
                file.seek(length, io.SEEK_CUR)
        elif block in (b"", b";"):
            raise ImageError("truncated or damaged GIF (no frame)")
    left, top, frame_width, frame_height = struct.unpack("<4H", file.read(8))
    return max(width, left + frame_width), max(height, top + frame_height)


def _load(image: Image.Image) -> None:
    """Decode the pixels, whatever Pillow's global settings are.

    Its TIFF reader applies its limit once more, where ours has already passed. And many a script has it load
    truncated images, whose missing part would be grey.
    """
    limit, is_lax = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    if not is_lax and (limit is None or image.width * image.height <= limit):
        image.load()
        return
    with _changing_pillow:
        limit, is_lax = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        try:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
            image.load()
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, is_lax


def _over_white(image: Image.Image) -> Image.Image:
    """Convert the pixels to 8-bit RGB."""
    if 0 in image.size:
        raise ImageError(f"{image.width} x {image.height} pixels")
    if image.mode == "F":
        raise ImageError("float pixels have no known range: save them as 8-bit RGB or 16-bit grey first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int32)  # (H, W)
        if levels.min() < 0 or levels.max() > 65535:
            raise ImageError(
                f"integer pixels from {levels.min()} to {levels.max()}: scale them to 0..65535 first"
            )
        grey = ((levels + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[levels == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow has no direct way from here to RGBA
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata does not make the pixels wrong
        return 1
