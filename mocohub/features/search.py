"""Nearest neighbours among stored features by cosine similarity: exact, or over a faiss graph when asked."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from tqdm import tqdm

from mocohub.errors import missing_extra, unknown
from mocohub.features.extract import extract
from mocohub.features.layers import needs_head
from mocohub.features.projection import Projection
from mocohub.features.store import Features, check_comparable
from mocohub.hub.load import load
from mocohub.probes.inputs import as_array, refuse_nonfinite
from mocohub.probes.neighbors import Neighbors, nearest, unit_rows

_BLOCK_ROWS = 16384  # given to faiss at once

# Of the graph (arXiv 1603.09320): links of a node, candidates while it is built, least while searching.
_HNSW_LINKS, _HNSW_BUILD, _HNSW_SEARCH = 32, 80, 128


def search(
    features: Features,
    queries: ArrayLike | Features,
    *,
    k: int = 10,
    index: Literal["exact", "faiss"] = "exact",
    progress: bool = False,
) -> Neighbors:
    """Find the k rows most similar to each query, by cosine in float32.

    Of similarities that come out equal the lower row goes first; zeros have similarity 0 to everything. The
    exact search reads the features block by block, so that a folder may be larger than memory.

    Args:
        features: What is searched, N rows.
        queries: Vectors (n, D) of the same model, an array or a tensor; or features, which are checked to be
            of the same model (`extract_like` makes them from images).
        k: Neighbours of a query; with fewer rows than that, all of them are given.
        index: "exact" computes every similarity. "faiss" builds an HNSW graph first (extra `search`) and then
            looks at a few thousand rows a query: worth it for many queries against many rows. It may miss a
            neighbour, and holds a float32 copy of the features.
        progress: Show how far it is; on a terminal only.

    Returns:
        Rows and similarities, both (n, min(k, N)).

    Raises:
        ValueError: If `k` or `index` is not accepted, the widths differ, a query is not finite, or
            the queries are features of another model or of other settings.
        ImportError: If `index` is "faiss" and faiss is not installed.
    """
    if index not in ("exact", "faiss"):
        raise unknown("index", index, ["exact", "faiss"])
    if k < 1:
        raise ValueError(f"k={k} must be a number of neighbours, 1 or more.")
    if isinstance(queries, Features):
        check_comparable(features, queries)
        queries = queries.values
    queries = np.asarray(as_array(queries))
    if queries.ndim != 2 or queries.shape[1] != features.width or queries.dtype.kind not in "fiub":
        raise ValueError(
            f"queries has shape {queries.shape} and type {queries.dtype}, but must be (n, {features.width}): "
            "vectors of the model that made the features. Of images, "
            "mocohub.features.search.extract_like(features, images) makes them."
        )
    queries = queries.astype(np.float32)
    refuse_nonfinite(queries)
    if index == "exact":
        return nearest(features, queries, k, progress=progress)
    return _faiss(features, unit_rows(torch.from_numpy(queries)), min(k, len(features)), progress)


def extract_like(
    features: Features,
    images: Any,
    *,
    model: nn.Module | str | Path | None = None,
    projection: Projection | str | Path | None = None,
) -> Features:
    """Extract images as `features` were extracted, to search with them.

    Args:
        features: Where the settings come from, and the model unless it is given.
        images: What `mocohub.extract` accepts.
        model: The model, if what the features name cannot be loaded here.
        projection: What the features were projected by, if they were.

    Returns:
        Features that can be compared with `features`.

    Raises:
        ValueError: If the model cannot be loaded or is not the one of the features, or the projection is
            missing.
        RuntimeError: If not one image can be read; the message says why.
    """
    if features.meta.get("projection") and projection is None:
        raise ValueError(
            "The features are projected. Give the projection too: projection=... or --projection."
        )
    if model is None:
        name = features.meta.get("model", {}).get("name")
        try:
            model = load(name, head=needs_head(features.meta.get("layers", ())))
        except (ValueError, OSError, TypeError) as error:  # TypeError: nothing is named
            raise ValueError(
                f"The model of the features, {name!r}, cannot be loaded here: {error} "
                "Give the model yourself: model=... or --model."
            ) from error
    settings = ("layers", "pool", "flip", "crops")
    settings = {name: features.meta[name] for name in settings if name in features.meta}
    fast_decode = "fast_decode_px" in features.meta.get("transform", {})
    settings |= {
        "fast_decode": fast_decode,
        "normalize": features.meta.get("normalized", False),
        "projection": projection,
    }
    found = extract(model, images, **settings, dtype="float32", num_workers=0, progress=False)
    check_comparable(features, found)
    return found


def _faiss(features: Features, queries: torch.Tensor, k: int, progress: bool) -> Neighbors:
    try:
        import faiss
    except ImportError as error:
        raise missing_extra("faiss", "search", "index='faiss'") from error
    values = features.values
    graph = faiss.IndexHNSWFlat(values.shape[1], _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = _HNSW_BUILD
    graph.hnsw.efSearch = max(_HNSW_SEARCH, 4 * k)
    with tqdm(total=len(values), desc="index", unit="row", disable=None if progress else True) as bar:
        for first_row in range(0, len(values), _BLOCK_ROWS):
            block = unit_rows(torch.tensor(values[first_row : first_row + _BLOCK_ROWS], dtype=torch.float32))
            graph.add(block.numpy())
            bar.update(len(block))
    similarities, indices = graph.search(queries.numpy(), k)
    unreached = np.flatnonzero((indices < 0).any(1))  # many equal rows can be an island of the graph
    if len(unreached):
        indices[unreached], similarities[unreached] = nearest(values, queries[unreached], k)
    return Neighbors(indices, similarities)
