"""One self-contained HTML page about a model: curves, a table, neighbours, a map. Needs matplotlib."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from mocohub.errors import missing_extra
from mocohub.features.store import Features
from mocohub.sources import ImageList

_INK, _ACCENT, _MUTED = "#1f2933", "#0b6e99", "#9aa5b1"
_MAP_THUMBNAILS = 400  # more would hide each other
_GALLERY_ROWS, _NEIGHBOURS = 10, 10


@dataclass(frozen=True)
class Neighbours:
    """One query image and its nearest neighbours, for the gallery."""

    query: Image.Image
    query_label: str
    rows: dict[str, list[tuple[Image.Image, str, bool | None]]]  # features -> (image, label, same class)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows. Empty parts are left out."""

    title: str
    summary: str
    facts: dict[str, str]  # a line of small print each
    log: list[dict[str, Any]]  # lines of a run's log.jsonl
    table_head: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    table_note: str = ""
    gallery: Sequence[Neighbours] = ()
    gallery_note: str = ""
    map_points: np.ndarray | None = None  # (N, 2)
    map_labels: Sequence[str] | None = None  # (N,) class names
    map_images: Sequence[Image.Image] = field(default_factory=list)  # (N,) or none
    map_note: str = ""
    commands: Sequence[tuple[str, str]] = ()  # (what it does, the command)


def check_installed() -> None:
    """Raise the error that names the extra if matplotlib is missing, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("matplotlib", "report", "An HTML report") from error


def gallery(
    bank_images: ImageList,
    query_images: ImageList,
    spaces: dict[str, tuple[np.ndarray, np.ndarray]],
    bank: Features,
    queries: Features,
) -> tuple[list[Neighbours], str]:
    """Find the nearest bank images of one query image of each class (or of some, without classes).

    Args:
        bank_images: The images of `bank`.
        query_images: The images of `queries`.
        spaces: Name of a kind of features -> (rows of the bank, rows of the queries), compared by cosine.
        bank: Says which image and label each row has.
        queries: Likewise.

    Returns:
        The examples, and a sentence on how often a neighbour has the query's class, over all queries.
    """
    labelled = bank.labels is not None and queries.labels is not None
    names = [f.targets.astype(str) if labelled else np.full(len(f), "") for f in (bank, queries)]
    if labelled:
        rows = np.unique(names[1], return_index=True)[1][:_GALLERY_ROWS]
    else:
        rows = np.linspace(0, len(queries) - 1, min(_GALLERY_ROWS, len(queries))).astype(int)
    nearest, shares = {}, []
    for space, (bank_values, query_values) in spaces.items():
        search = NearestNeighbors(n_neighbors=min(_NEIGHBOURS, len(bank)), metric="cosine").fit(bank_values)
        nearest[space] = search.kneighbors(query_values, return_distance=False)
        same = (names[0][nearest[space]] == names[1][:, None]).mean()
        shares.append(f"{100 * same:.1f} % {space}")

    def neighbour(row: int, query: int) -> tuple[Image.Image, str, bool | None]:
        same = bool(names[0][row] == names[1][query]) if labelled else None
        return bank_images.decode(int(bank.ids[row])), str(names[0][row]), same

    examples = [
        Neighbours(
            query=query_images.decode(int(queries.ids[row])),
            query_label=str(names[1][row]),
            rows={space: [neighbour(n, row) for n in found[row]] for space, found in nearest.items()},
        )
        for row in rows
    ]
    note = f"Of the {_NEIGHBOURS} nearest to each test image, {' and '.join(shares)} are of its class."
    return examples, note if labelled else ""


def tsne(values: np.ndarray) -> np.ndarray:
    """Place rows (N, D) in two dimensions for the eye, (N, 2): near means a high cosine."""
    unit = normalize(values)
    perplexity = min(30, (len(unit) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page and return its path. It needs no other file and no network."""
    check_installed()
    environment = Environment(
        loader=PackageLoader("mocohub", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report_template.html").render(
        report=report,
        curves=_curves(report.log),
        map_picture=_map(report) if report.map_points is not None else None,
        picture=_picture,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _curves(log: list[dict[str, Any]]) -> str | None:
    """Loss and kNN accuracy over epochs, each beside chance, as a data URL."""
    steps = [row for row in log if "loss" in row]
    evaluations = [row for row in log if "knn_accuracy" in row]
    if not steps:
        return None
    figure, axes = _figure(1 + bool(evaluations))
    epochs = [row["epoch"] for row in steps]
    _line(axes[0], epochs, [row["loss"] for row in steps], "InfoNCE loss (nats)")
    axes[0].axhline(steps[0]["chance_loss"], color=_MUTED, linestyle="--")
    axes[0].text(
        epochs[-1], steps[0]["chance_loss"], "chance, ln(K + 1)", ha="right", va="bottom", color=_MUTED
    )
    if evaluations:
        accuracies = [100 * row["knn_accuracy"] for row in evaluations]
        _line(axes[1], [row["epoch"] for row in evaluations], accuracies, "kNN accuracy (%)")
        chance = 100 * evaluations[0]["knn_chance"]
        axes[1].axhline(chance, color=_MUTED, linestyle="--")
        axes[1].text(epochs[-1], chance, "chance, largest class", ha="right", va="bottom", color=_MUTED)
        axes[1].set_ylim(0, 100)
    return _data_url(figure, "svg")


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=_INK)
    return figure, list(axes)


def _line(ax: Any, x: list[float], y: list[float], title: str) -> None:
    ax.plot(x, y, color=_ACCENT, linewidth=2)
    ax.set_title(title, loc="left", fontsize=11, color=_INK)
    ax.set_xlabel("epoch")
    ax.margins(y=0.12)


def _map(report: Report) -> str:
    """Images (or dots) in their places on the map, coloured by class, as a data URL."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    points, labels = report.map_points, report.map_labels
    figure = Figure(figsize=(9.4, 7.2))
    ax = figure.subplots()
    ax.set_axis_off()
    names = sorted(set(labels)) if labels is not None else []
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = (
        [palette(names.index(name) % palette.N) for name in labels] if names else [_ACCENT] * len(points)
    )
    ax.scatter(*points.T, c=colours, s=70 if len(report.map_images) else 14, alpha=0.8, linewidths=0)
    chosen = np.linspace(0, len(points) - 1, min(_MAP_THUMBNAILS, len(points))).astype(int)
    for i in chosen if len(report.map_images) else ():
        image = report.map_images[i].copy()
        image.thumbnail((28, 28))
        thumbnail = OffsetImage(np.asarray(image), zoom=16 / max(image.size), cmap="gray")
        frame = {"edgecolor": colours[i], "linewidth": 1.5, "boxstyle": "square,pad=0.08"}
        ax.add_artist(AnnotationBbox(thumbnail, points[i], bboxprops=frame, pad=0.1))
    for name in names[:20]:
        ax.scatter([], [], color=palette(names.index(name) % palette.N), s=40, label=name)
    if names:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="class")
    return _data_url(figure, "png")


def _data_url(figure: Any, kind: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, bbox_inches="tight")
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(image: Image.Image) -> str:
    """A thumbnail as a data URL; tiny images stay as they are (the page enlarges their pixels)."""
    image = image.copy()
    image.thumbnail((96, 96))
    buffer = io.BytesIO()
    lossless = max(image.size) <= 32
    image.save(buffer, "PNG" if lossless else "JPEG", quality=85)
    mime = "image/png" if lossless else "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
