import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocohub.plot import _thinned, plot_runs, read_log

pytest.importorskip("matplotlib")


def rows(num_steps: int = 6, queue_size: int = 1024, knn: bool = True) -> list[dict]:
    found = []
    for step in range(1, num_steps + 1):
        found.append(
            {
                "step": step,
                "epoch": step / 2,
                "loss": 6.0 - 0.1 * step,
                "chance_loss": math.log(queue_size + 1),
                "pretext_accuracy": 0.1 * step,
                "lr": 0.03,
                "images_per_s": 500.0,
            }
        )
        if knn and step % 2 == 0:
            found.append({"step": step, "epoch": step / 2, "knn_accuracy": 0.3, "knn_chance": 0.1})
    return found


def write_run(folder: Path, log: list[dict] | None, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    if log is not None:
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + tail)
    return folder


def texts(picture: Path) -> list[str]:
    """What is written in an SVG: matplotlib leaves each text as a comment before its shapes."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text(encoding="utf-8"))


def test_several_runs_make_one_picture_with_their_names_and_quantities(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, rows(queue_size=k)) for name, k in (("small", 64), ("large", 4096))]
    with Image.open(plot_runs(runs, tmp_path / "curves.png")) as image:
        assert image.format == "PNG" and image.width > image.height > 600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    found = texts(plot_runs(runs, tmp_path / "curves.svg"))
    titles = ["Loss (nats)", "Contrast accuracy (%)", "kNN accuracy (%)", "Learning rate", "Images/s"]
    assert [title for title in [*titles, "small", "large", "epoch"] if title not in found] == []
    assert found.count("chance") == 2
    assert "step" not in found and "Waiting for images (% of time)" not in found


def test_curves_have_the_values_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = {}
    plot, title = Axes.plot, Axes.set_title

    def remember(ax: Axes, x: list, y: list, **style: object) -> list:
        if len(x):
            drawn.setdefault(ax, []).append((list(x), list(y)))
        return plot(ax, x, y, **style)

    named = {}
    monkeypatch.setattr(Axes, "plot", remember)
    monkeypatch.setattr(
        Axes, "set_title", lambda ax, text, **k: (named.update({text: ax}), title(ax, text, **k))
    )
    plot_runs([write_run(tmp_path / "run", rows())], tmp_path / "curves.png")
    ((x, y),) = drawn[named["Contrast accuracy (%)"]]
    assert x == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert y == pytest.approx([10, 20, 30, 40, 50, 60])
    assert drawn[named["kNN accuracy (%)"]] == [([1.0, 2.0, 3.0], [30.0, 30.0, 30.0])]


def test_long_runs_are_averaged_and_keep_their_mean(tmp_path: Path) -> None:
    x, y = np.arange(1003.0), np.random.RandomState(0).rand(1003)
    few_x, few_y = _thinned(x, y)
    assert len(few_x) == len(few_y) <= 200
    assert (np.diff(few_x) > 0).all()
    assert few_y.mean() == pytest.approx(y.mean(), rel=0.01) and few_y.std() < y.std() / 2


def test_a_run_without_evaluations_has_no_panel_for_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows(knn=False))
    assert "kNN accuracy (%)" not in texts(plot_runs([run], tmp_path / "curves.svg"))


def test_runs_that_know_no_epochs_are_drawn_over_steps(tmp_path: Path) -> None:
    stream = write_run(tmp_path / "stream", [row | {"epoch": None} for row in rows()])
    found = texts(plot_runs([write_run(tmp_path / "a", rows()), stream], tmp_path / "curves.svg"))
    assert "step" in found and "epoch" not in found


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / seed / "run", rows()) for seed in ("seed0", "seed1")]
    found = texts(plot_runs(runs, tmp_path / "curves.svg"))
    assert "seed0/run" in found and "seed1/run" in found


def test_a_picture_is_replaced_when_it_is_drawn_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows())
    first = plot_runs([run], tmp_path / "curves.png").read_bytes()
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    assert plot_runs([run], tmp_path / "curves.png").read_bytes() != first


def test_both_lines_of_a_step_are_one_row_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    log = read_log(write_run(tmp_path / "run", rows(4), tail='{"step": 5, "lo'))
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert log[1]["loss"] == 5.8 and log[1]["knn_accuracy"] == 0.3
    assert "knn_accuracy" not in log[0]


def test_of_steps_that_a_resumed_run_took_twice_the_later_lines_count(tmp_path: Path) -> None:
    again = [row | {"loss": 1.0} for row in rows(5, knn=False)[2:]]
    log = read_log(write_run(tmp_path / "run", rows(4) + again))
    assert [(row["step"], row["loss"]) for row in log] == [(1, 5.9), (2, 5.8), (3, 1.0), (4, 1.0), (5, 1.0)]


def test_what_cannot_be_drawn_is_refused_with_a_remedy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows())
    (tmp_path / "photos").mkdir()
    fresh = write_run(tmp_path / "fresh", None)
    damaged = write_run(tmp_path / "damaged", rows(2), tail="junk\n" + json.dumps(rows(1)[0]) + "\n")
    cases = [
        (FileNotFoundError, "nowhere' does not exist. Give folders", [tmp_path / "nowhere"], "c.png"),
        (
            FileNotFoundError,
            "photos' is not a training run: it has no run.json",
            [tmp_path / "photos"],
            "c.png",
        ),
        (ValueError, "fresh' has logged nothing yet. Wait", [run, fresh], "c.png"),
        (ValueError, r"Line 4 of .*log.jsonl is not a log line: 'junk'", [damaged], "c.png"),
        (ValueError, "No run was given to plot", [], "c.png"),
        (ValueError, r"Unknown kind of picture '.jsonl'. Choose one of: .*\.png", [run], "run/log.jsonl"),
    ]
    for error, message, runs, out in cases:
        with pytest.raises(error, match=message):
            plot_runs(runs, tmp_path / out)
    assert not (tmp_path / "c.png").exists()


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from mocohub.plot import plot_runs\n"
        "plot_runs([], 'c.png')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "A plot of runs needs matplotlib: pip install 'mocohub[report]'" in out.stderr


def test_drawing_needs_neither_torch_nor_timm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows())
    code = (
        "import sys; from mocohub.plot import plot_runs; plot_runs([sys.argv[1]], sys.argv[2]);"
        "print(sorted({'torch', 'timm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(run), str(tmp_path / "c.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
