"""A page to walk through features: a map of all images, their thumbnails, and the neighbours of each.

A folder of static files that needs no server and no network, for up to 100,000 images:

    index.html
    map.js              where each image stands on the map, and its label
    blocks/0000.js      ids, paths and neighbours of 256 images
    blocks/0000.jpg     their thumbnails, 16 x 16 on one sheet

Images are numbered along a curve through the map, so that one block holds a neighbourhood of it, and a look
around needs few files. Data are scripts, because a page that is opened as a file may not fetch anything else.
"""

import base64
import importlib.resources
import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

import mocohub
from mocohub.distributed import num_cpus
from mocohub.errors import missing_extra, unknown
from mocohub.features.pictures import NEUTRAL, Pictures, thumbnail
from mocohub.features.search import Neighbors, search
from mocohub.features.store import Features
from mocohub.features.writer import NO_LABEL
from mocohub.files import atomic_folder, refuse_existing
from mocohub.sources import list_images

_SHEET_TILES = 16  # on a side
_BLOCK_ROWS = _SHEET_TILES**2
_JPEG_QUALITY = 80
_MAP_STEPS = 65535  # positions on the map are uint16


def write_page(
    features: Features,
    html: str | Path,
    *,
    images: Any = None,
    labels: str | Path | None = None,
    layout: Literal["pca", "umap"] = "pca",
    k: int = 12,
    max_images: int = 100_000,
    thumbnail_px: int = 96,
    index: Literal["exact", "faiss"] = "exact",
    progress: bool = True,
) -> Path:
    """Write the page of features and return the path of its index.html.

    Args:
        features: Of the images to show.
        html: Folder to write; it is complete or absent.
        images: Where the images are now, as `mocohub.list_images` takes it. Default: where they were; if they
            are gone, neutral tiles stand for them.
        labels: A list file (.csv, .tsv or .txt) of paths and labels that replace those of the features.
        layout: Of the map: "pca" are the two main axes of the features scaled to length 1; "umap" keeps
            neighbours together (arXiv 1802.03426; extra `map`; minutes for 100,000 images).
        k: Neighbours shown of each image.
        max_images: Of more than that, so many are drawn at random, always the same ones.
        thumbnail_px: Side of a thumbnail.
        index: How neighbours are found, see `mocohub.features.search.search`.
        progress: Show how far it is; on a terminal only.

    Raises:
        FileExistsError: If `html` exists; nothing has been computed then.
        FileNotFoundError: If `images` or `labels` is not there.
        ValueError: If an argument is not accepted, there are no rows, or `images` or `labels` know none.
        ImportError: If the extra for `layout` or `index` is not installed.
    """
    if layout not in ("pca", "umap"):
        raise unknown("layout", layout, ["pca", "umap"])
    for name, count in (("k", k), ("max_images", max_images), ("thumbnail_px", thumbnail_px)):
        if count < 1:
            raise ValueError(f"{name} is {count}, but must be at least 1.")
    if len(features) == 0:
        raise ValueError("The features have no rows, so there is nothing to show.")
    refuse_existing(html, "Choose another folder, or remove it first.")
    row_labels, classes = labels_of_rows(features, labels)
    pictures = Pictures(features, images)

    rows = np.arange(len(features))
    if len(rows) > max_images:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), max_images, replace=False))
    values = features.values[rows].astype(np.float32)
    points, axes = _layout(values, layout)
    order = np.argsort(_along_a_curve(points), kind="stable")
    rows, values, points = rows[order], values[order], points[order]
    shown = Features(values, np.arange(len(rows)), [features.paths[row] for row in rows])
    found = _neighbours_of_all(shown, k, index, progress)

    with atomic_folder(html) as folder:
        (folder / "blocks").mkdir()
        num_blocks = -(-len(rows) // _BLOCK_ROWS)
        for block in tqdm(range(num_blocks), desc="thumbnails", disable=None if progress else True):
            some = slice(block * _BLOCK_ROWS, (block + 1) * _BLOCK_ROWS)
            content = {
                "ids": features.ids[rows[some]].tolist(),
                "paths": shown.paths[some],
                "neighbours": _base64(found.indices[some], "<u4"),
                "cosines": _base64(found.similarities[some], "<f4"),
            }
            stem = folder / "blocks" / f"{block:04d}"
            _write_script(stem.with_suffix(".js"), f"block({block}, {{}});", content)
            if pictures.found:
                _sheet(pictures, rows[some], thumbnail_px).save(
                    stem.with_suffix(".jpg"), quality=_JPEG_QUALITY
                )
        content = {
            "x": _base64(points[:, 0], "<u2"),
            "y": _base64(points[:, 1], "<u2"),
            "labels": _base64(row_labels[rows], "<i4"),
            "classes": classes,
            "pictures": pictures.found,
            "neighbours": found.indices.shape[1],
            "sheet": _SHEET_TILES,
        }
        _write_script(folder / "map.js", "const MAP = {};", content)
        (folder / "index.html").write_text(
            _render(
                "page_template.html",
                model=features.meta.get("model", {}).get("name") or "an unnamed model",
                source=features.meta.get("input", {}).get("source"),
                num_images=len(rows),
                num_left_out=len(features) - len(rows),
                num_errors=len(features.errors),
                width=features.width,
                axes=axes,
                pictures=pictures.found,
            ),
            encoding="utf-8",
        )
    return Path(html) / "index.html"


def write_search_page(
    html: str | Path, query: Path, features: Features, found: Neighbors, pictures: Pictures
) -> None:
    """Write the neighbours of one image as one file, pictures included.

    Args:
        html: The file.
        query: The image that was searched with.
        features: What was searched.
        found: Its neighbours, (1, k) each.
        pictures: Of `features`.
    """
    tiles = [{"picture": _data_url(thumbnail(query, 192)), "path": str(query)}]
    for row, cosine in zip(found.indices[0].tolist(), found.similarities[0].tolist(), strict=True):
        tile = pictures.thumbnail(row, 192)
        label = label_of(features, row)
        picture = None if tile is None else _data_url(tile)
        tiles.append({"picture": picture, "path": features.paths[row], "label": label, "cosine": cosine})
    model = features.meta.get("model", {}).get("name") or "an unnamed model"
    Path(html).write_text(
        _render("search_template.html", tiles=tiles, model=model, num_images=len(features)), encoding="utf-8"
    )


def label_of(features: Features, row: int) -> str:
    """Return the name of a row's class, "" if it has none."""
    if features.labels is None or features.labels[row] == NO_LABEL:
        return ""
    label = int(features.labels[row])
    return str(label) if features.classes is None else features.classes[label]


def labels_of_rows(features: Features, file: str | Path | None) -> tuple[np.ndarray, list[str]]:
    """Return the position of each row's label among the classes (N,), NO_LABEL for none, and the classes."""
    if file is None:
        if features.labels is None:
            return np.full(len(features), NO_LABEL), []
        if features.classes is not None:
            return features.labels, features.classes
        names = np.unique(features.labels[features.labels != NO_LABEL])
        places = np.searchsorted(names, features.labels)
        return np.where(features.labels == NO_LABEL, NO_LABEL, places), [str(name) for name in names]
    listed = list_images(file, check=False)
    if listed.labels is None:
        raise ValueError(f"'{file}' has no labels. Give a list with the columns path and label.")
    given = {
        path: label for path, label in zip(listed.paths, listed.labels, strict=True) if label is not None
    }
    labels = np.array([given.get(path, NO_LABEL) for path in features.paths])
    if (labels == NO_LABEL).all():
        raise ValueError(
            f"'{file}' labels none of the images, such as '{features.paths[0]}'. "
            "Its paths must be written as those of the features."
        )
    return labels, listed.classes


def _layout(values: np.ndarray, layout: str) -> tuple[np.ndarray, str]:
    """Return positions (N, 2) uint16, the first axis to the right and the second up, and their name."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.where(norms == 0, 1, norms)
    if layout == "umap" and len(values) > 3:
        try:
            import umap
        except ImportError as error:
            raise missing_extra("umap-learn", "map", "layout='umap'") from error
        reducer = umap.UMAP(metric="cosine", n_neighbors=min(15, len(values) - 1), random_state=0, n_jobs=1)
        points, axes = reducer.fit_transform(unit), "UMAP by cosine"
    else:
        points, axes = _main_axes(unit)
    low, high = points.min(0), points.max(0)
    margin = (np.max(high - low) or 1) - (high - low)  # one scale for both axes, the narrower in the middle
    points = (points - low + margin / 2) / (np.max(high - low) or 1)
    return np.round(points * _MAP_STEPS).astype(np.uint16), axes


def _main_axes(unit: np.ndarray) -> tuple[np.ndarray, str]:
    from sklearn.decomposition import PCA

    if len(unit) < 2:
        return np.zeros((len(unit), 2)), "one point"
    num_axes = min(2, *unit.shape)
    pca = PCA(num_axes, random_state=0)
    points = np.zeros((len(unit), 2))
    with np.errstate(invalid="ignore"):  # of rows that are all equal, the share is 0 / 0
        points[:, :num_axes] = pca.fit_transform(unit)
    share = np.nan_to_num(pca.explained_variance_ratio_).sum()
    return points, f"the main {num_axes} axes (PCA), {100 * share:.0f} % of the variance"


def _along_a_curve(points: np.ndarray) -> np.ndarray:
    """Return the place of each point on a Z-order curve (N,): the bits of x and y in turn."""
    place = np.zeros(len(points), np.int64)
    for bit in range(16):
        for axis in (0, 1):
            place |= (points[:, axis].astype(np.int64) >> bit & 1) << (2 * bit + axis)
    return place


def _neighbours_of_all(features: Features, k: int, index: str, progress: bool) -> Neighbors:
    """Find the neighbours of every row, itself left out."""
    found = search(features, features.values, k=k + 1, index=index, progress=progress)
    itself = found.indices == np.arange(len(features))[:, None]
    # Of more than k rows that are equal to it, a row may not be among its own nearest: then the last goes.
    itself[~itself.any(1), -1] = True
    shape = len(features), found.indices.shape[1] - 1
    return Neighbors(found.indices[~itself].reshape(shape), found.similarities[~itself].reshape(shape))


def _sheet(pictures: Pictures, rows: Iterable[int], size_px: int) -> Image.Image:
    sheet = Image.new("RGB", (_SHEET_TILES * size_px, _SHEET_TILES * size_px), NEUTRAL)
    with ThreadPoolExecutor(num_cpus()) as pool:  # Pillow decodes without the interpreter's lock
        for i, tile in enumerate(pool.map(lambda row: pictures.thumbnail(row, size_px), map(int, rows))):
            if tile is not None:
                sheet.paste(tile, (i % _SHEET_TILES * size_px, i // _SHEET_TILES * size_px))
    return sheet


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _write_script(path: Path, statement: str, content: dict[str, Any]) -> None:
    path.write_text(statement.replace("{}", json.dumps(content), 1) + "\n", encoding="ascii")


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _render(template: str, **facts: Any) -> str:
    text = importlib.resources.files("mocohub.features").joinpath(template).read_text("utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(text).render(version=mocohub.__version__, **facts)
