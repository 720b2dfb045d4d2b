"""One self-contained HTML page about an evaluation: every number, and plots of what is behind them.

It needs no network and no other file. Needs matplotlib (extra `report`).
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader

from mocohub.errors import missing_extra
from mocohub.evaluation.results import Result, Results, interval_text, value_text
from mocohub.files import replace_file

_INK, _ACCENT, _SECOND, _MUTED, _GRID = "#1f2933", "#0072B2", "#D55E00", "#7b8794", "#e8ebee"
_MOST_BARS = 40  # classes; of more, the best and the worst


class Figure(NamedTuple):
    """A plot and what it says."""

    title: str
    note: str
    alt: str
    source: str  # data URL


def check_installed() -> None:
    """Raise the error that names the extra if matplotlib is missing, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("matplotlib", "report", "The page of an evaluation") from error


def write_page(results: Results, details: dict[str, dict[str, Any]]) -> Path:
    """Write the page beside results.json and return its path.

    Args:
        results: What the table shows.
        details: Of each layer, of each probe: what `mocohub.evaluation.measure` returned besides results.
    """
    check_installed()
    environment = Environment(
        loader=PackageLoader("mocohub.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    document, records = results.document, results.records
    page = environment.get_template("page_template.html").render(
        title=f"{document['model']['name'] or 'Features'} on {records[0].dataset if records else 'images'}",
        lead=_lead(records),
        document=document,
        groups=_groups(records),
        interval_text=interval_text,
        value_text=value_text,
        layers=[_layer(name, of, len(details) > 1) for name, of in details.items()],
        facts=_facts(document),
    )
    replace_file(results.page, page)
    return results.page


def _lead(records: list[Result]) -> str:
    best = [r for r in records if r.headline and r.metric == "top-1 (%)"]
    if not best:
        return "No classes to tell apart: what follows is about the features alone."
    first = best[0]
    return (
        f"{first.value:.1f} % of {first.num_images:,} test images are classified as they should be "
        f"({first.protocol})."
    )


def _groups(records: list[Result]) -> list[tuple[str, list[Result]]]:
    """Records under headings, in their order."""
    kinds: dict[str, list[Result]] = {"Classification": [], "Retrieval": [], "Spread of the features": []}
    for record in records:
        if record.metric.startswith("top-"):
            kinds["Classification"].append(record)
        elif record.metric.startswith(("recall@", "mAP")):
            kinds["Retrieval"].append(record)
        else:
            kinds["Spread of the features"].append(record)
    return [(name, of) for name, of in kinds.items() if of]


def _layer(name: str, details: dict[str, Any], is_one_of_many: bool) -> dict[str, Any]:
    """What is drawn and said of the features of one layer."""
    drawers: list[tuple[str, Callable[[dict[str, Any]], Figure | None]]] = [
        ("knn", _knn_grid),
        ("lowshot", _low_shot),
        ("health", _spectrum),
        ("retrieval", _similarities),
        ("knn", _classes),
        ("knn", _matrix),
    ]
    figures = [draw(details[probe]) for probe, draw in drawers if probe in details]
    return {
        "name": name if is_one_of_many else "",
        "figures": [figure for figure in figures if figure is not None],
        "health": details.get("health"),
        "confused": details.get("knn", {}).get("confused", []),
    }


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance, a line each."""
    model, facts = document["model"], []
    for key, label in (
        ("name", "model"),
        ("architecture", "architecture"),
        ("weights_sha256", "SHA-256 of its tensors"),
        ("file_sha256", "SHA-256 of model.safetensors"),
    ):
        facts.append((label, model.get(key)))
    for name, features in document["features"].items():
        size = f"{features['rows']:,} images, {features['errors']:,} without features"
        facts += [
            (name, ": ".join(filter(None, (features["source"], size)))),
            (f"manifest of {name}", features["manifest_sha256"]),
        ]
    first = document["features"]["train"]
    transform = first.get("transform") or {}
    settings = [
        f"{key} {first[key]}" for key in ("pool", "flip", "normalized", "projection") if first.get(key)
    ]
    facts += [
        ("preprocessing", " ".join(transform.get("text", "").split()) or None),
        ("features", ", ".join([*first["columns"], *settings])),
        ("computation", json.dumps(first.get("computation")) if first.get("computation") else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ("machine", document["machine"]),
        ("started", f"{document['started']}, {document['seconds']:g} s"),
    ]
    return [(label, value) for label, value in facts if value]


def _knn_grid(details: dict[str, Any]) -> Figure:
    cells = details["grid"]
    ks, temperatures = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    values = np.full((len(temperatures), len(ks)), np.nan)
    for k, temperature, top1 in cells:
        values[temperatures.index(temperature), ks.index(k)] = top1
    figure, ax = _axes(3.2)
    ax.imshow(values, cmap="Blues", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        ax.text(
            column,
            row,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if value > middle else _INK,
        )
    ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    ax.set_yticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
    ax.set_xlabel("neighbours k")
    ax.set_ylabel("temperature T")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    best = max(cells, key=lambda cell: cell[2])
    note = (
        f"Top-1 in %. The table has {details['protocol']}, fixed before. The best cell, {best[2]:.2f} % at "
        f"k = {best[0]} and T = {best[1]:g}, was found on the test images themselves: do not quote it."
    )
    return Figure(
        "kNN: neighbours and temperature", note, "Heat map of kNN accuracy over k and T", _url(figure)
    )


def _low_shot(details: dict[str, Any]) -> Figure | None:
    if not details["curves"]:
        return None
    figure, ax = _axes(3.4)
    points = next(iter(details["curves"].values()))
    places, names = _label_places([(shots, fraction) for shots, fraction, _, _ in points])
    for (label, points), colour in zip(details["curves"].items(), (_ACCENT, _SECOND), strict=True):
        values = np.array([value for _, _, value, _ in points])
        bounds = np.array([interval or (value, value) for _, _, value, interval in points])
        is_number = np.array([shots is not None for shots, *_ in points])
        for of in (is_number, ~is_number):  # two lines: numbers of labels, and shares of them
            (line,) = ax.plot(places[of], values[of], color=colour, marker="o", markersize=4, linewidth=1.8)
            if of.sum() > 1:
                ax.fill_between(places[of], *bounds[of].T, color=colour, alpha=0.18, linewidth=0)
            else:  # a single place has no width
                ax.vlines(places[of], *bounds[of].T, color=colour, alpha=0.4, linewidth=4)
        line.set_label(label)
    tops = np.max([[point[2] for point in points] for points in details["curves"].values()], axis=0)
    for x, y in zip(places, tops, strict=True):
        ax.annotate(
            f"{y:.1f}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5, color=_INK
        )
    ax.set_xticks(places, names)
    ax.set_xlabel("labels per class" + (", or share of all labels" if "%" in names[-1] else ""))
    ax.set_ylabel("top-1 (%)")
    ax.margins(x=0.08, y=0.18)
    figure.legend(loc="outside upper left", frameon=False, fontsize=8.5, labelcolor=_INK)
    note = "Mean over draws of the labelled images; shaded: its 95 % interval over these draws."
    return Figure("Few labels", note, "Low-shot accuracy over labels per class", _url(figure))


def _label_places(points: list[tuple[int | None, float | None]]) -> tuple[np.ndarray, list[str]]:
    """Return where numbers of labels stand, on a logarithmic axis, and to their right shares of all."""
    places, names = [], []
    for shots, fraction in points:
        last = places[-1] if places else 0.0
        places.append(float(np.log2(shots)) if shots is not None else last + 1.5)
        names.append(str(shots) if shots is not None else f"{100 * fraction:g} %")
    return np.array(places), names


def _spectrum(details: dict[str, Any]) -> Figure | None:
    values = np.array(details["singular_values"])
    if not values.any():
        return None
    shares = values / values.max()
    figure, ax = _axes(3.2)
    shown = shares > 0
    ax.plot(np.arange(1, len(shares) + 1)[shown], shares[shown], color=_ACCENT, linewidth=1.8)
    ax.set_yscale("log")
    ax.set_xlim(1, max(len(shares), 2))
    ax.set_xlabel("dimension")
    ax.set_ylabel("singular value / largest")
    empty = int((~shown).sum())
    note = "Of the centred training features. Flat is healthy; a cliff is a dimensional collapse."
    if empty:
        note += f" {empty} of {len(shares)} are zero."
    return Figure("Singular values", note, "Singular values of the features, largest first", _url(figure))


def _similarities(details: dict[str, Any]) -> Figure | None:
    histogram = details["histogram"]
    edges = np.array(histogram["edges"])
    filled = np.flatnonzero(np.array(histogram["same"]) + histogram["different"])
    if not len(filled):
        return None  # a single image makes no pair
    figure, ax = _axes(3.2)
    for key, label, colour in (("different", "different classes", _MUTED), ("same", "same class", _SECOND)):
        counts = np.array(histogram[key], float)
        if counts.sum():
            density = counts / counts.sum() / np.diff(edges)
            ax.stairs(density, edges, fill=True, color=colour, alpha=0.35)
            ax.stairs(density, edges, color=colour, linewidth=1.4, label=label)
    ax.set_xlim(edges[filled[0]], edges[-1])
    ax.set_xlabel("cosine similarity of two test images")
    ax.set_ylabel("density")
    ax.legend(frameon=False, loc="upper left", labelcolor=_INK)
    note = f"All pairs of {histogram['num_images']:,} test images. The less the two overlap, the better."
    return Figure("Same class and different classes", note, "Histogram of cosine similarities", _url(figure))


def _classes(details: dict[str, Any]) -> Figure:
    rows = sorted(details["of_class"], key=lambda row: (row[1], row[0]))
    note = f"Share of each class's test images that kNN gets right ({details['protocol']})."
    if len(rows) > _MOST_BARS:
        half = _MOST_BARS // 2
        note += f" The {half} worst and the {half} best of {len(rows)} classes."
        rows = rows[:half] + rows[-half:]
    figure, ax = _axes(max(2.4, 0.24 * len(rows) + 0.7))
    places = np.arange(len(rows))
    ax.barh(places, [row[1] for row in rows], color=_ACCENT, height=0.72)
    for place, row in zip(places, rows, strict=True):
        ax.text(row[1] + 1, place, f"{row[1]:.1f}", va="center", fontsize=8.5, color=_INK)
    ax.set_yticks(places, [_short(row[0]) for row in rows])
    ax.set_xlim(0, 112)
    ax.set_xticks(range(0, 101, 20))
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel("top-1 (%)")
    ax.grid(False, axis="y")
    return Figure("Accuracy of each class", note, "Bars of accuracy by class", _url(figure))


def _matrix(details: dict[str, Any]) -> Figure | None:
    if details["matrix"] is None:
        return None
    matrix, names = np.array(details["matrix"], float), [_short(name) for name in details["classes"]]
    counts = matrix.sum(1, keepdims=True)
    shares = 100 * np.divide(matrix, counts, out=np.zeros_like(matrix), where=counts > 0)
    side = 4.6
    figure, ax = _axes(side)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= 12:
        for (row, column), value in np.ndenumerate(shares):
            if value >= 0.5:
                colour = "white" if value > 55 else _INK
                ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    size = 9 if len(names) <= 20 else 6
    upright = max(map(len, names)) <= 2
    ax.set_xticks(range(len(names)), names, rotation=0 if upright else 90, fontsize=size)
    ax.set_yticks(range(len(names)), names, fontsize=size)
    ax.set_xlabel("kNN says")
    ax.set_ylabel("is")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    note = "In % of the images of each row. Rows without test images are empty."
    return Figure("What is taken for what", note, "Confusion matrix of kNN", _url(figure))


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:9]}…{name[-9:]}"  # names of one kind often begin alike


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(5.2, height), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_MUTED)
    ax.tick_params(colors=_INK, labelsize=9)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def _url(figure: Any) -> str:
    """The figure as a data URL, of the same bytes each time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "mocohub"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
