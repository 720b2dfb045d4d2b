"""Verbs to look at features: search, report."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def search(
    features: Positional[str],
    image: Positional[str],
    *,
    k: int = 10,
    out: str | None = None,
    index: Literal["exact", "faiss"] = "exact",
    model: str | None = None,
    projection: str | None = None,
    data: str | None = None,
) -> None:
    """Find the images most like one image: rank, cosine, label and path of each, nearest first.

    Args:
        features: Feature folder to search.
        image: Image file.
        k: How many.
        out: Picture grid to write, .png, or .html for a page; replaced if it exists.
        index: "faiss" searches a graph, which may miss some (extra `search`).
        model: The model, if what the features name is not here.
        projection: File of the projection, if the features were projected.
        data: Where the images of the features are now, for --out. Default: where they were.
    """
    from mocohub.features.page import label_of, write_search_page
    from mocohub.features.pictures import Pictures, picture_grid, thumbnail
    from mocohub.features.search import extract_like
    from mocohub.features.search import search as run
    from mocohub.features.store import Features

    if out is not None and Path(out).suffix.lower() not in (".png", ".html"):
        raise ValueError(f"--out '{out}' must end in .png or .html.")
    if not Path(image).is_file():
        raise FileNotFoundError(f"'{image}' does not exist. Give an image file.")
    store = Features.open(features)
    query = extract_like(store, [image], model=model, projection=projection)
    found = run(store, query, k=k, index=index)
    rows, cosines = found.indices[0].tolist(), found.similarities[0].tolist()
    for rank, (row, cosine) in enumerate(zip(rows, cosines, strict=True), 1):
        print(f"{rank:>4}  {cosine:.4f}  {label_of(store, row) or '-':<16}  {store.paths[row]}")
    if out is None:
        return
    pictures = Pictures(store, data)
    if out.lower().endswith(".html"):
        write_search_page(out, Path(image), store, found, pictures)
    else:
        tiles = [thumbnail(Path(image), 160), *(pictures.thumbnail(row, 160) for row in rows)]
        captions = [("query", image)]
        for row, cosine in zip(rows, cosines, strict=True):
            captions.append((f"{cosine:.3f}  {label_of(store, row)}", store.paths[row]))
        picture_grid(tiles, captions).save(out)
    print(out)


def report(
    features: Positional[str],
    *,
    html: str,
    labels: str | None = None,
    layout: Literal["pca", "umap"] = "pca",
    k: int = 12,
    data: str | None = None,
    max_images: int = 100_000,
    index: Literal["exact", "faiss"] = "exact",
) -> None:
    """Write a page to browse features: a map, thumbnails, the neighbours of each image, labels as filters.

    Args:
        features: Feature folder.
        html: Folder of static files to write; must not exist. Open its index.html.
        labels: List file (.csv, .tsv, .txt) of paths and labels that replace those of the features.
        layout: Of the map; "umap" keeps neighbours together, and takes longer (extra `map`).
        k: Neighbours of each image.
        data: Where the images are now. Default: where they were.
        max_images: Of more than that, so many are drawn at random.
        index: "faiss" finds the neighbours over a graph, which may miss some (extra `search`).
    """
    from mocohub.features.page import write_page
    from mocohub.features.store import Features

    page = write_page(
        Features.open(features),
        html,
        images=data,
        labels=labels,
        layout=layout,
        k=k,
        max_images=max_images,
        index=index,
    )
    print(page)
