"""The curves of training runs in one picture: `mocohub plot RUN... --out curves.png`. Needs matplotlib."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mocohub.errors import missing_extra, unknown

# Okabe and Ito's colours, which colour-blind people tell apart; without yellow, which is pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", (0, (6, 1)), (0, (2, 1)))  # the next one for every seven runs
_INK, _MUTED, _GRID = "#1f2933", "#8492a0", "#e8ebee"
_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_POINTS = 200  # of a curve; of more, neighbours are averaged, or their wiggles hide the other runs


@dataclass(frozen=True)
class _Panel:
    field: str
    title: str
    scale: float = 1.0
    chance: str | None = None  # the field that holds what guessing gives


_LARGE = (
    _Panel("loss", "Loss (nats)", chance="chance_loss"),
    _Panel("pretext_accuracy", "Contrast accuracy (%)", 100),
    _Panel("knn_accuracy", "kNN accuracy (%)", 100, "knn_chance"),
)
_SMALL = (
    _Panel("lr", "Learning rate"),
    _Panel("images_per_s", "Images/s"),
    _Panel("data_wait_share", "Waiting for images (% of time)", 100),
)


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the curves of one or several runs into one picture, a panel for each quantity.

    Loss and kNN accuracy stand beside chance (dashed). Quantities that no run has logged are left out. The
    x axis counts epochs, or steps if a run does not know its epochs. Runs may still be training.

    Args:
        runs: Run folders; the legend has their names.
        out: A .png, .svg or .pdf; a picture that is there is replaced.

    Returns:
        `out`.

    Raises:
        ValueError: If no run is given, one has logged nothing or no JSON, or `out` is no picture.
        FileNotFoundError: If a folder is not there or not a run.
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report", "A plot of runs") from error
    out = Path(out)
    if out.suffix not in _SUFFIXES:
        raise unknown("kind of picture", out.suffix, _SUFFIXES)
    folders = list(dict.fromkeys(Path(run) for run in runs))
    if not folders:
        raise ValueError("No run was given to plot. Give folders that `mocohub pretrain --out` made.")
    logs = [read_log(folder) for folder in folders]
    in_epochs = all(row.get("epoch") is not None for log in logs for row in log)
    large, small = (
        [panel for panel in panels if any(panel.field in row for log in logs for row in log)]
        for panels in (_LARGE, _SMALL)
    )
    figure = Figure(figsize=(4.6 * max(len(large), 1), 6.4), layout="constrained")
    rows = [(panels, height) for panels, height in ((large, 2), (small, 1)) if panels]
    axes = figure.subplot_mosaic(
        [[p.field for p in panels for _ in range(6 // len(panels))] for panels, _ in rows],
        height_ratios=[height for _, height in rows],
        sharex=True,
    )
    for panel in (*large, *small):
        _draw(axes[panel.field], panel, logs, "epoch" if in_epochs else "step")
    for panel in rows[-1][0]:
        axes[panel.field].set_xlabel("epoch" if in_epochs else "step", color=_INK)
    names = _names(folders)
    handles = [
        axes[rows[0][0][0].field].plot([], [], **_style(i), linewidth=3, label=name)[0]
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, labelcolor=_INK)
    figure.savefig(out, dpi=130)
    return out


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Return what a run has logged, one row for each step that has a line, in order.

    The lines of a step may have come twice: of a run that died and was resumed, the last ones count. A last
    line of which only half is there yet is left out.

    Raises:
        FileNotFoundError: If `run` is not there or not a run folder.
        ValueError: If it has logged nothing yet, or a line is no JSON.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        problem = "is not a training run: it has no run.json" if run.is_dir() else "does not exist"
        raise FileNotFoundError(f"'{run}' {problem}. Give folders that `mocohub pretrain --out` made.")
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n") if log.is_file() else [""]
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is nothing, or half a line
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {log} is not a log line: {line[:80]!r}.") from error
        if rows and step < next(reversed(rows)):
            rows = {known: old for known, old in rows.items() if known <= step}
        rows[step] = rows.get(step, {}) | row
    if not rows:
        raise ValueError(f"'{run}' has logged nothing yet. Wait for its first line in log.jsonl.")
    return list(rows.values())


def _draw(ax: Any, panel: _Panel, logs: list[list[dict[str, Any]]], x_field: str) -> None:
    """Draw one quantity of all runs, and chance: in grey, or in the colours of runs that differ in it."""
    chances = {}
    for i, log in enumerate(logs):
        rows = [row for row in log if panel.field in row]
        if not rows:
            continue
        x = np.array([row[x_field] for row in rows], float)
        y = panel.scale * np.array([row[panel.field] for row in rows], float)
        few = len(rows) <= 40
        ax.plot(*_thinned(x, y), **_style(i), linewidth=1.8, marker="o" if few else None, markersize=3.5)
        if panel.chance in rows[-1]:
            chances[i] = panel.scale * rows[-1][panel.chance]
    alike = len(set(chances.values())) == 1
    for i, chance in list(chances.items())[: 1 if alike else None]:
        colour = _MUTED if alike else _style(i)["color"]
        ax.axhline(chance, color=colour, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    if chances:
        top = max(chances.values())
        ax.annotate(
            "chance", (1, top), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", color=_MUTED, fontsize=9,
        )  # fmt: skip
    ax.set_title(panel.title, loc="left", fontsize=11, color=_INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_MUTED)
    ax.tick_params(colors=_INK, labelsize=9)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.01, y=0.1)
    if panel.field != "loss":
        top = ax.get_ylim()[1]
        ax.set_ylim(0, min(top, 103) if panel.scale == 100 else top)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average runs of neighbouring points, (n,) each, until there are few enough for a picture."""
    if len(x) <= _MOST_POINTS:
        return x, y
    starts = np.linspace(0, len(x), _MOST_POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _style(run: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[run % len(_COLOURS)],
        "linestyle": _LINES[run // len(_COLOURS) % len(_LINES)],
    }


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names
