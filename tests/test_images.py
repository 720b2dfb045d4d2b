import io
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from mocohub import images
from mocohub.images import MAX_PIXELS, ImageError, decode_image, open_image, to_rgb
from tests.helpers.bad_images import mutated
from tests.helpers.image_bombs import bombs, gif_bomb, tile_bomb, webp_bomb
from tests.helpers.image_bytes import chunk, encode, png

# A smooth picture without symmetry, 13 wide and 9 high: survives JPEG, betrays every wrong turn.
_Y, _X = np.mgrid[0:9, 0:13]
PIXELS = np.stack([20 * _X, 25 * _Y, 8 * (_X + _Y)], axis=2).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def every_format() -> dict[str, bytes]:
    animation = {"with_a_second_image": True}
    grey16 = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    files = {
        "JPEG": encode(PICTURE, "JPEG", quality=95, subsampling=0),
        "progressive JPEG": encode(PICTURE, "JPEG", progressive=True),
        "CMYK JPEG": encode(PICTURE.convert("CMYK"), "JPEG"),
        "MPO": encode(PICTURE, "MPO", quality=95, subsampling=0, **animation),
        "PNG": encode(PICTURE, "PNG"),
        "16-bit PNG": encode(grey16, "PNG"),
        "palette PNG": encode(PICTURE.quantize(16), "PNG", transparency=3),
        "animated PNG": encode(PICTURE, "PNG", **animation),
        "WebP": encode(PICTURE, "WEBP"),
        "lossless WebP": encode(PICTURE, "WEBP", lossless=True),
        "animated WebP": encode(PICTURE, "WEBP", lossless=True, **animation),
        "GIF": encode(PICTURE, "GIF"),
        "animated GIF": encode(PICTURE, "GIF", disposal=2, **animation),
        "BMP": encode(PICTURE, "BMP"),
        "TIFF of two pages": encode(PICTURE, "TIFF", **animation),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"{compression} TIFF"] = encode(PICTURE, "TIFF", compression=compression)
    return files


FILES = every_format()
LOSSLESS = [
    name for name in FILES if not any(word in name for word in ("JPEG", "jpeg", "MPO", "16", "palette"))
]
LOSSLESS.remove("WebP")


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_first_images_own_pixels(name: str) -> None:
    np.testing.assert_array_equal(pixels(decode_image(FILES[name])), PIXELS)


@pytest.mark.parametrize("name", ["JPEG", "MPO"])
def test_jpeg_and_the_first_image_of_an_mpo_are_close_to_the_original(name: str) -> None:
    assert np.abs(pixels(decode_image(FILES[name])) - PIXELS).max() <= 10


def test_the_content_decides_and_not_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(FILES["PNG"])
    for given in (path, str(path)):
        np.testing.assert_array_equal(pixels(decode_image(given)), PIXELS)


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF", "DDS", "EPS"])
def test_other_formats_are_refused_although_pillow_reads_them(format: str) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF, BMP or TIFF image"):
        decode_image(encode(PICTURE, format))


@pytest.mark.parametrize("data", [b"hello, this is text", b"RIFF\x24\0\0\0WAVEfmt ", b"\xff", b"\0" * 600])
def test_what_is_no_image_is_called_so(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF, BMP or TIFF image"):
        decode_image(data)


def test_empty_and_unreadable_files_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="empty file"):
        decode_image(b"")
    with pytest.raises(ImageError, match="cannot be read: No such file or directory"):
        decode_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read: .*null"):
        decode_image("a\0b.jpg")


# Exif 2.32, tag 0x0112: where the stored first row and first column belong in the upright picture.
UPRIGHT = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: np.rot90(a, -1),  # right, top
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda a: np.rot90(a),  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    "format, options, tolerance",
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 10),
    ],
)
def test_the_exif_orientation_is_applied_once(
    orientation: int, format: str, options: dict[str, Any], tolerance: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PICTURE, format, exif=exif, **options)
    image = decode_image(data)
    expected = UPRIGHT[orientation](PIXELS.astype(int))
    assert pixels(image).shape == expected.shape
    assert np.abs(pixels(image) - expected).max() <= tolerance
    for again in (ImageOps.exif_transpose(image), to_rgb(image), to_rgb(Image.open(io.BytesIO(data)))):
        np.testing.assert_array_equal(pixels(again), pixels(image))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the metadata
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
@pytest.mark.parametrize("format, tolerance", [("PNG", 0), ("JPEG", 10)])
def test_damaged_exif_data_does_not_lose_the_image(exif: bytes, format: str, tolerance: int) -> None:
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    data = encode(PICTURE, format, exif=exif, **options)
    assert exif[6:] in data
    assert np.abs(pixels(decode_image(data)) - PIXELS).max() <= tolerance


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The composite by its definition; `colour` (..., 3) and `alpha` (...) in 0..255."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


ALPHA = (19 * _X + 3 * _Y).astype(np.uint8)  # 0 to 252


def test_an_alpha_channel_is_laid_over_white() -> None:
    alpha = Image.fromarray(ALPHA)
    rgba = PICTURE.copy()
    rgba.putalpha(alpha)
    expected = over_white(PIXELS, ALPHA)
    assert np.abs(pixels(to_rgb(rgba)) - expected).max() <= 1
    assert np.abs(pixels(decode_image(encode(rgba, "PNG"))) - expected).max() <= 1
    assert np.abs(pixels(decode_image(encode(rgba, "TIFF"))) - expected).max() <= 1
    visible = ALPHA > 0  # WebP may drop the colour of invisible pixels
    webp = pixels(decode_image(encode(rgba, "WEBP", lossless=True)))
    assert np.abs(webp - expected)[visible].max() <= 1
    assert (webp[~visible] == 255).all()
    # Premultiplied colours are rounded to ALPHA levels, so they come back only roughly where ALPHA is small.
    assert np.abs(pixels(to_rgb(rgba.convert("RGBa"))) - expected).max() <= 2


def test_grey_with_alpha_is_laid_over_white() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    grey_alpha = Image.merge("LA", [grey, Image.fromarray(ALPHA)])
    expected = over_white(np.repeat(PIXELS[..., :1], 3, axis=2), ALPHA)
    assert np.abs(pixels(to_rgb(grey_alpha)) - expected).max() <= 1
    assert np.abs(pixels(decode_image(encode(grey_alpha, "PNG"))) - expected).max() <= 1
    assert np.abs(pixels(to_rgb(grey_alpha.convert("La"))) - expected).max() <= 2


def palette_picture() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A picture of 4 colours, its palette (4, 3) and its indices (H, W)."""
    palette = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 40], [50, 60, 230]], dtype=np.uint8)
    indices = ((_X + 2 * _Y) % 4).astype(np.uint8)
    image = Image.new("P", (13, 9))
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.tobytes())
    return image, palette, indices


def test_palettes_with_and_without_transparency() -> None:
    image, palette, indices = palette_picture()
    np.testing.assert_array_equal(pixels(to_rgb(image)), palette[indices])
    np.testing.assert_array_equal(pixels(decode_image(encode(image, "BMP"))), palette[indices])

    one_clear = np.array([255, 255, 0, 255])[indices]
    expected = over_white(palette[indices], one_clear)
    for format in ("PNG", "GIF"):
        data = encode(image, format, transparency=2)
        np.testing.assert_array_equal(pixels(decode_image(data)), expected)

    levels = bytes([255, 128, 0, 64])
    expected = over_white(palette[indices], np.frombuffer(levels, np.uint8)[indices])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = pixels(decode_image(encode(image, "PNG", transparency=levels)))
    assert np.abs(decoded - expected).max() <= 1

    with_alpha = image.copy()
    rgba_palette = np.concatenate([palette, np.frombuffer(levels, np.uint8)[:, None]], axis=1)
    with_alpha.putpalette(rgba_palette.tobytes(), "RGBA")
    assert np.abs(pixels(to_rgb(with_alpha)) - expected).max() <= 1
    assert np.abs(pixels(to_rgb(image.convert("PA"))) - palette[indices]).max() == 0


def test_one_transparent_colour_becomes_white() -> None:
    grey = Image.fromarray(np.array([[7, 8, 9]], dtype=np.uint8))
    assert pixels(decode_image(encode(grey, "PNG", transparency=8)))[0, :, 0].tolist() == [7, 255, 9]
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], dtype=np.uint8))
    image = decode_image(encode(colour, "PNG", transparency=(1, 2, 3)))
    assert pixels(image)[0].tolist() == [[255, 255, 255], [1, 2, 4]]
    grey16 = png(
        2, 1, 16, 0, struct.pack(">B2H", 0, 1000, 2570), extra=chunk(b"tRNS", struct.pack(">H", 1000))
    )
    assert pixels(decode_image(grey16))[0].tolist() == [[255, 255, 255], [10, 10, 10]]


def test_grey_and_one_bit_images_become_three_equal_channels() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(pixels(to_rgb(grey)), np.repeat(PIXELS[..., :1], 3, axis=2))
    bits = (_X + _Y) % 3 == 0
    for data in (
        encode(Image.fromarray(bits), "PNG"),
        encode(Image.fromarray(bits), "TIFF", compression="group4"),
    ):
        expected = np.where(bits[..., None], 255, 0).repeat(3, axis=2)
        np.testing.assert_array_equal(pixels(decode_image(data)), expected)


def test_cmyk_is_read_as_ink_on_white() -> None:
    ink = np.concatenate([PIXELS, ALPHA[..., None]], axis=2)
    image = Image.fromarray(ink, "CMYK")
    expected = (255 - ink[..., :3].astype(int)) * (255 - ink[..., 3:].astype(int)) / 255
    assert np.abs(pixels(to_rgb(image)) - expected).max() <= 1
    assert np.abs(pixels(decode_image(encode(image, "TIFF"))) - expected).max() <= 1
    assert np.abs(pixels(decode_image(encode(image, "JPEG", quality=100))) - expected).max() <= 8


def test_ycbcr_and_lab_are_converted_by_their_definitions() -> None:
    y, cb, cr = (PICTURE.convert("YCbCr").getchannel(i) for i in range(3))
    luma, blue, red = (np.asarray(channel).astype(float) for channel in (y, cb, cr))
    expected = np.stack(  # JFIF 1.02, page 3
        [
            luma + 1.402 * (red - 128),
            luma - 0.34414 * (blue - 128) - 0.71414 * (red - 128),
            luma + 1.772 * (blue - 128),
        ],
        axis=2,
    )
    image = to_rgb(Image.merge("YCbCr", [y, cb, cr]))
    assert np.abs(pixels(image) - expected.clip(0, 255)).max() <= 1

    def lightness_of(grey: int) -> float:  # CIE 1976 L*, sRGB transfer function (IEC 61966-2-1)
        linear = ((grey / 255 + 0.055) / 1.055) ** 2.4
        return 116 * linear ** (1 / 3) - 16

    for grey in (60, 128, 255):
        lab = Image.new("LAB", (1, 1), (round(lightness_of(grey) * 2.55), 128, 128))
        for image in (to_rgb(lab), decode_image(encode(lab, "TIFF"))):
            assert np.abs(pixels(image) - grey).max() <= 2


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_all_65536_grey_levels_are_divided_by_257_and_rounded(mode: str) -> None:
    levels = np.arange(65536).reshape(256, 256)
    kind = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": "=i4"}[mode]
    image = Image.frombytes(mode, (256, 256), levels.astype(kind).tobytes())
    expected = [round(level / 257) for level in range(65536)]  # never half way, 257 being odd
    assert pixels(to_rgb(image)).reshape(-1, 3).tolist() == [[grey] * 3 for grey in expected]


def test_16_bit_files_keep_their_range() -> None:
    levels = (PIXELS[..., 0].astype(np.uint16) * 257) + 100
    for format in ("PNG", "TIFF"):
        decoded = pixels(decode_image(encode(Image.fromarray(levels), format)))
        np.testing.assert_array_equal(decoded, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_pixels_without_a_known_range_are_refused_with_the_remedy() -> None:
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    with pytest.raises(
        ImageError, match="float pixels have no known range: save them as 8-bit RGB or 16-bit"
    ):
        decode_image(encode(Image.fromarray(ramp), "TIFF"))
    for wrong in (-1, 65536):
        image = Image.fromarray(np.array([[5, wrong]], dtype=np.int32))
        with pytest.raises(ImageError, match=f"{wrong}.*: scale them to 0..65535 first"):
            to_rgb(image)


def test_images_without_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        to_rgb(Image.new("RGB", (0, 5)))
    for data in (png(0, 5, 8, 2, b""), gif_bomb(0).replace(b"\1\0\1\0", bytes(4), 1), tile_bomb(width=0)):
        with pytest.raises(ImageError, match="truncated or damaged"):
            decode_image(data)


def test_an_rgb_image_passes_untouched_and_no_image_is_changed() -> None:
    assert to_rgb(PICTURE) is PICTURE
    for mode in ("L", "P", "LA", "RGBA", "CMYK", "I;16", "1"):
        image = PICTURE.convert("L").convert(mode) if mode == "I;16" else PICTURE.convert(mode)
        before = image.mode, image.tobytes(), dict(image.info)
        once = to_rgb(image)
        assert (image.mode, image.tobytes(), dict(image.info)) == before
        assert to_rgb(once) is once


def test_the_users_truncated_image_is_refused_too() -> None:
    image = Image.open(io.BytesIO(FILES["PNG"][:-40]))
    with pytest.raises(ImageError, match="cannot be converted from mode RGB to RGB .*truncated"):
        to_rgb(image)


@pytest.mark.parametrize("name", FILES)
def test_the_size_limit_is_exact_and_names_the_size(name: str) -> None:
    assert decode_image(FILES[name], max_pixels=13 * 9).size == (13, 9)
    with pytest.raises(ImageError, match="^13 x 9 pixels, more than max_pixels=116$"):
        decode_image(FILES[name], max_pixels=13 * 9 - 1)


def test_no_colour_of_a_gif_is_mistaken_for_a_block() -> None:
    image = Image.new("P", (13, 9), 1)
    image.putpalette(b",!;;!,;,!!,," * 21)  # what starts a frame, an extension and the end
    data = encode(image, "GIF")
    assert pixels(decode_image(data, max_pixels=13 * 9))[0, 0].tolist() == list(b";!,")


def test_the_default_limit_is_pillows_own() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


STATUS = Path("/proc/self/status")
BOMBS = {
    "PNG": (lambda: bombs()["196 million black.png"][0], 14_000),
    "GIF": (gif_bomb, 13_000),
    "TIFF": (tile_bomb, 16_384),
    "WebP": (webp_bomb, 12_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_image_bombs_are_refused_without_a_warning(name: str) -> None:
    make, side = BOMBS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=f"{side} x {side} pixels, more than max_pixels={MAX_PIXELS}"):
            decode_image(make())


@pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="the peak of memory is read from /proc"
)
def test_image_bombs_take_no_memory(tmp_path: Path) -> None:
    paths = []
    for name, (make, _) in BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(make())
    script = """
import re, sys
from mocohub.images import ImageError, decode_image
# Not ru_maxrss, which begins with what the process held that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
for path in sys.argv[1:]:
    try:
        decode_image(path)
    except ImageError:
        continue
    sys.exit(f"{path} was decoded")
print((peak() - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 16  # MiB; the smallest bomb holds 138


def test_a_raised_limit_overrides_pillows_and_leaves_it_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 117 pixels are an error for Pillow, 99 a warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LOSSLESS:
            if "WebP" not in name and "animated GIF" not in name:  # for these Pillow's holds, as documented
                np.testing.assert_array_equal(pixels(decode_image(FILES[name], max_pixels=117)), PIXELS)
    assert Image.MAX_IMAGE_PIXELS == 50


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WebP"])
def test_what_other_code_tells_pillow_changes_no_verdict(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    noise.save(file := io.BytesIO(), name)
    data = file.getvalue()
    expected = pixels(decode_image(data))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    np.testing.assert_array_equal(pixels(decode_image(data)), expected)
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode_image(data[: len(data) * 2 // 3])
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1600 are a warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(decode_image(data)), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about odd metadata
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_or_whole(name: str) -> None:
    data = FILES[name]
    whole = pixels(decode_image(data))
    num_refused = 0
    for length in range(len(data)):
        try:
            image = decode_image(data[:length])
        except ImageError:
            num_refused += 1
        else:  # only what follows the pixels was cut off: an end marker, padding or a second image
            np.testing.assert_array_equal(pixels(image), whole)
    assert num_refused >= len(data) // 3


@pytest.mark.parametrize("name", ["JPEG", "PNG", "lossless WebP", "GIF", "BMP", "TIFF of two pages"])
def test_truncated_files_name_their_format(name: str) -> None:
    format = name.replace("lossless ", "").split()[0]
    with pytest.raises(ImageError, match=f"truncated or damaged {format}"):
        decode_image(FILES[name][: len(FILES[name]) // 3])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about odd metadata
@pytest.mark.parametrize("name", FILES)
def test_mutated_files_raise_nothing_but_image_errors(name: str) -> None:
    chance = random.Random(name)
    refused = 0
    for _ in range(150):
        try:
            assert decode_image(mutated(FILES[name], chance), max_pixels=1_000_000).mode == "RGB"
        except ImageError as error:
            refused += 1
            assert str(error)
    assert refused


@pytest.mark.parametrize("name", FILES)
def test_an_opened_image_knows_its_size_and_gives_the_pixels_of_decode_image(name: str) -> None:
    with open_image(FILES[name]) as opened:
        assert opened.size == (13, 9)
        np.testing.assert_array_equal(pixels(opened.decode()), pixels(decode_image(FILES[name])))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_smaller_and_upright(orientation: int, shrink: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PICTURE.resize((96, 64), Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
    whole = decode_image(data)
    with open_image(data) as opened:
        assert opened.size == whole.size and opened.shrinks == [1, 2, 4, 8]
        small = opened.decode(shrink)
    assert np.abs(pixels(small) - pixels(whole.reduce(shrink))).max() <= 12


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_pixel_i_of_a_smaller_jpeg_stands_for_those_from_i_times_shrink_on(
    orientation: int, shrink: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size in ((93, 61), (93, 64), (96, 61)):
        data = encode(PICTURE.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
        whole = decode_image(data)
        with open_image(data) as opened:
            if shrink not in opened.shrinks:
                continue
            small = opened.decode(shrink)
        rest = [(0, -side % shrink) for side in (whole.height, whole.width)]
        padded = Image.fromarray(np.pad(pixels(whole).astype(np.uint8), [*rest, (0, 0)], mode="edge"))
        assert np.abs(pixels(small) - pixels(padded.reduce(shrink))).max() <= 12


def test_a_jpeg_is_not_decoded_smaller_where_that_would_move_it() -> None:
    def shrinks(orientation: int, size: tuple[int, int]) -> list[int]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        with open_image(encode(PICTURE.resize(size), "JPEG", exif=exif)) as opened:
            return opened.shrinks

    assert shrinks(1, (93, 61)) == shrinks(5, (93, 61)) == [1, 2, 4, 8]
    assert shrinks(2, (93, 64)) == shrinks(8, (93, 64)) == [1]
    assert shrinks(4, (93, 64)) == shrinks(6, (93, 64)) == [1, 2, 4, 8]
    assert shrinks(3, (92, 62)) == shrinks(7, (92, 62)) == [1, 2]


@pytest.mark.parametrize("mode, format", [("RGB", "MPO"), ("L", "JPEG"), ("CMYK", "JPEG")])
def test_other_kinds_of_jpeg_are_decoded_smaller_too(mode: str, format: str) -> None:
    data = encode(
        PICTURE.resize((96, 64)).convert(mode), format, quality=95, with_a_second_image=format == "MPO"
    )
    with open_image(data) as opened:
        small = opened.decode(4)
    assert np.abs(pixels(small) - pixels(decode_image(data).reduce(4))).max() <= 12


def test_other_formats_are_decoded_in_full() -> None:
    with open_image(FILES["PNG"]) as opened:
        assert opened.shrinks == [1]


def test_a_jpeg_damaged_behind_its_header_has_a_size_and_no_pixels() -> None:
    with open_image(FILES["JPEG"][:-40]) as opened:
        assert opened.size == (13, 9)
        with pytest.raises(ImageError, match="truncated or damaged JPEG"):
            opened.decode()


def test_the_size_limit_holds_for_an_image_that_is_only_opened() -> None:
    with pytest.raises(ImageError, match="13 x 9 pixels, more than max_pixels=116"):
        with open_image(FILES["JPEG"], max_pixels=116):
            pass
