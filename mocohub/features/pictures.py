"""Small pictures of the rows of features, and grids of them as one image."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mocohub.features.store import Features
from mocohub.images import ImageError, open_image
from mocohub.sources import ImageList, list_images

_log = logging.getLogger(__name__)

NEUTRAL = (200, 206, 212)  # where no picture can be shown
_INK, _MUTED, _ACCENT = (28, 39, 51), (90, 104, 117), (11, 97, 144)


class Pictures:
    """Thumbnails of the rows of features, None for an image that cannot be read (any more)."""

    def __init__(self, features: Features, images: Any = None) -> None:
        """Find the images of the features, those of a merge in the inputs of each part.

        A row is looked up by its id where the images are the list that was extracted, else by its path, so
        that a folder that has grown since shows no row a picture of another.

        Args:
            features: The features.
            images: Where they are now, as `mocohub.list_images` takes it. Default: where they were.

        Raises:
            ValueError, FileNotFoundError: If the given `images` cannot be listed, or hold none of the rows.
        """
        self._places: dict[int, tuple[ImageList, int]] = {}  # of a row: its list, and where it is in it
        given = None if images is None else list_images(images, labels="none", check=False)
        all_ids = np.array([*features.ids, *(error["id"] for error in features.errors)], np.int64)
        rows, source = np.arange(len(features)), features.meta.get("input", {})
        inputs = _inputs(source, rows, features.ids, np.sort(all_ids))
        for facts, rows, ids in inputs:
            try:
                self._places |= _places(facts, rows, ids, [features.paths[row] for row in rows], given)
            except (ValueError, OSError) as error:
                if images is None:
                    _log.warning(
                        "Without %d pictures, as the images were not found; say where they are (--data): %s",
                        len(rows),
                        error,
                    )
        if images is not None and not self._places:
            raise ValueError(
                f"'{images}' has none of the {len(features)} images of the features, such as "
                f"'{features.paths[0]}'. Give the folder or list they were extracted from."
            )

    @property
    def found(self) -> bool:
        """Whether there is any hope of a picture."""
        return bool(self._places)

    def thumbnail(self, row: int, size_px: int) -> Image.Image | None:
        """Return the middle square of a row's image in this size, None if it cannot be read."""
        if row not in self._places:
            return None
        images, position = self._places[row]
        try:
            return thumbnail(images.encoded(position), size_px)
        except ImageError:
            return None


def _inputs(
    facts: dict[str, Any], rows: np.ndarray, ids: np.ndarray, all_ids: np.ndarray
) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Yield each input of a merge, or the one that was not merged, with its rows and their ids within it.

    Args:
        facts: What `meta` says of the input.
        rows: Positions among the features, (n,).
        ids: Of these rows, (n,).
        all_ids: Of all rows and errors in order, by which the parts are told apart: streamed tars leave gaps.
    """
    parts = facts.get("merged") or []
    if not parts or any("num_inputs" not in part for part in parts):
        yield facts, rows, ids
        return
    ends = np.cumsum([part["num_inputs"] for part in parts])
    if len(all_ids) != ends[-1]:  # some rows only
        all_ids = np.arange(ends[-1])
    for part, own_ids in zip(parts, np.split(all_ids, ends[:-1]), strict=True):
        if len(own_ids):
            here = (ids >= own_ids[0]) & (ids <= own_ids[-1])
            yield from _inputs(part, rows[here], ids[here] - own_ids[0], own_ids - own_ids[0])


def _places(
    facts: dict[str, Any], rows: np.ndarray, ids: np.ndarray, paths: list[str], given: ImageList | None
) -> dict[int, tuple[ImageList, int]]:
    """Return where the images of some rows are: in the list that is given, or where `facts` says they were.

    Raises:
        ValueError, OSError: If there is no such list, or none of them is in it.
    """
    images = given
    if images is None:
        is_list_of_files = bool(paths) and Path(paths[0]).is_file()
        source = paths if is_list_of_files else facts.get("source")
        if not source:
            raise ValueError("the features do not say where they were.")
        images = list_images(source, labels="none", check=False)
    if images.fingerprint() == facts.get("paths_sha256"):
        return {int(row): (images, int(i)) for row, i in zip(rows, ids, strict=True)}
    place = {path: i for i, path in enumerate(images.paths)}
    found = {int(row): (images, place[path]) for row, path in zip(rows, paths, strict=True) if path in place}
    if not found and given is None:
        raise ValueError(f"'{facts.get('source')}' has none of them, such as {paths[:1]}.")
    return found


def thumbnail(data: bytes | Path, size_px: int) -> Image.Image:
    """Return the middle square of an image in this size, RGB.

    Args:
        data: The bytes of an image file, or its path.
        size_px: Side of the square.

    Raises:
        ImageError: As `mocohub.images.decode_image`.
    """
    with open_image(data) as opened:
        shrink = max(k for k in opened.shrinks if k == 1 or min(opened.size) >= k * size_px)
        image = opened.decode(shrink)
    return ImageOps.fit(image, (size_px, size_px), Image.Resampling.BICUBIC)


def picture_grid(
    tiles: Sequence[Image.Image | None],
    captions: Sequence[tuple[str, str]],
    *,
    num_columns: int = 5,
    tile_px: int = 160,
) -> Image.Image:
    """Lay pictures out in rows, each with two lines below it; the first, the query, has a frame.

    Args:
        tiles: Square pictures of `tile_px`; None is a neutral square.
        captions: Two lines for each; a line that is too wide loses its beginning, as paths differ at the end.
        num_columns: Pictures in one row.
        tile_px: Side of a picture.
    """
    gap_px, font_px = max(8, tile_px // 10), max(10, tile_px // 12)
    step_x, step_y = tile_px + gap_px, tile_px + gap_px + 3 * font_px
    num_columns = min(num_columns, len(tiles))
    num_rows = -(-len(tiles) // num_columns)
    grid = Image.new("RGB", (num_columns * step_x + gap_px, num_rows * step_y + gap_px), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(font_px)
    for i, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        x, y = gap_px + i % num_columns * step_x, gap_px + i // num_columns * step_y
        grid.paste(NEUTRAL if tile is None else tile, (x, y, x + tile_px, y + tile_px))
        if i == 0:
            draw.rectangle((x - 4, y - 4, x + tile_px + 3, y + tile_px + 3), outline=_ACCENT, width=3)
        for number, (line, colour) in enumerate(zip(lines, (_INK, _MUTED), strict=True)):
            where = x, y + tile_px + 6 + round(1.25 * number * font_px)
            draw.text(where, _fitting(line, font, tile_px), colour, font)
    return grid


def _fitting(line: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    line = "".join(letter if letter.isprintable() else "?" for letter in line)[-200:]
    shown = line
    while line and font.getlength(shown) > width_px:
        line = line[1:]
        shown = "\N{HORIZONTAL ELLIPSIS}" + line
    return shown
