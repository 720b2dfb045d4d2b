import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.images import write_images
from PIL import Image

from mocohub.features.store import Features
from mocohub.report import Neighbours, Report, gallery, tsne, write_report
from mocohub.sources import list_images

pytest.importorskip("matplotlib")
LOG = [
    {"step": 1, "epoch": 0.5, "loss": 5.0, "chance_loss": 7.0},
    {"step": 2, "epoch": 1.0, "loss": 4.0, "chance_loss": 7.0},
    {"step": 2, "epoch": 1.0, "knn_accuracy": 0.4, "knn_chance": 0.1},
]


def pictures(page: str) -> list[str]:
    return re.findall(r'src="([^"]{0,40})', page)


def test_the_page_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    report = Report(
        title="Title <b>",
        summary="Summary",
        facts={"recipe": "r"},
        log=LOG,
        table_head=["", "1 label"],
        table=[["pixels", "66.0"], ["MoCo", "80.0"]],
        gallery=[Neighbours(image, "cat", {"by MoCo": [(image, "cat", True), (image, "dog", False)]})],
        map_points=np.random.RandomState(0).rand(5, 2),
        map_labels=["a", "b", "a", "b", "a"],
        map_images=[image] * 5,
        commands=[("Do it", "mocohub demo")],
    )
    page = write_report(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Title &lt;b&gt;" in page and "mocohub demo" in page and "80.0" in page
    assert len(pictures(page)) == 1 + 3 + 1  # curves, query and neighbours, map
    assert all(source.startswith("data:image/") for source in pictures(page))
    assert not re.search(r"(src|href)=\"https?:", page)
    assert page.count('class="same"') == page.count('class="other"') == 1


def test_parts_without_content_are_left_out(tmp_path: Path) -> None:
    page = write_report(Report(title="t", summary="s", facts={}, log=[]), tmp_path / "r.html").read_text()
    assert "<img" not in page and "<table" not in page and "neighbours" not in page


def features_of(folder: Path) -> Features:
    images = list_images(folder)
    values = np.stack([np.asarray(images.decode(i), np.float32).ravel() for i in range(len(images))])
    return Features(values, range(len(images)), images.paths, images.labels, images.classes)


def test_the_gallery_shows_true_neighbours_and_counts_all_queries(tmp_path: Path) -> None:
    bank, queries = (
        write_images(tmp_path / "bank", {"a": 12, "b": 12}),
        write_images(tmp_path / "q", {"a": 2, "b": 3}, seed=1),
    )
    train, val = features_of(bank), features_of(queries)
    random = np.random.RandomState(0)
    noise = (random.rand(24, 3), random.rand(5, 3))
    spaces = {"by pixels": (train.values, val.values), "by noise": noise}
    examples, note = gallery(list_images(bank), list_images(queries), spaces, train, val)
    assert [e.query_label for e in examples] == ["a", "b"]
    for example in examples:
        assert [label for _, label, _ in example.rows["by pixels"]] == [example.query_label] * 10
        assert all(same for _, _, same in example.rows["by pixels"])
    assert "100.0 % by pixels" in note and re.search(r"[2-7]\d\.\d % by noise", note)


def test_without_labels_the_gallery_judges_nothing(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {".": 15})
    features = features_of(folder)
    values = (features.values, features.values)
    examples, note = gallery(
        list_images(folder), list_images(folder), {"by pixels": values}, features, features
    )
    assert note == "" and len(examples) == 10
    assert all(same is None for example in examples for _, _, same in example.rows["by pixels"])


def test_the_map_keeps_clusters_apart() -> None:
    random = np.random.RandomState(0)
    values = np.repeat(np.eye(2, 8), 20, axis=0) + 0.05 * random.randn(40, 8)
    places = tsne(values.astype(np.float32))
    assert places.shape == (40, 2)
    nearest = np.linalg.norm(places[:, None] - places, axis=2).argsort(1)[:, 1]
    assert (nearest // 20 == np.arange(40) // 20).mean() > 0.95


def test_a_missing_matplotlib_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from mocohub.report import check_installed\n"
        "check_installed()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'mocohub[report]'" in out.stderr
