"""The page of an evaluation as text, and in a real browser at the widths of a desk and of a telephone."""

import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.browser import CHROMIUM, Browser

from mocohub.evaluation.evaluate import evaluate
from mocohub.evaluation.page import write_page
from mocohub.evaluation.results import Results
from mocohub.features.store import Features

pytest.importorskip("matplotlib")
SMALL = {"ks": (1, 5), "shots": (1, 2), "draws": 3}


def features(folder, num_rows, seed, num_classes=4, names=None, labelled=True, collapsed=False):
    """A feature folder of noisy clusters."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    centres = np.random.default_rng(0).normal(size=(num_classes, 24))
    noisy = centres[labels] + 2 * random.normal(size=(num_rows, 24))
    values = np.ones((num_rows, 24)) if collapsed else noisy
    names = names or [f"class {i}" for i in range(num_classes)]
    paths = [f"{i}.jpg" for i in range(num_rows)]
    meta = {
        "model": {"name": "<b>model</b>", "weights_sha256": "ab" * 32},
        "transform": {"text": "Resize(32)"},
    }
    rows = values.astype(np.float32), range(num_rows), paths
    Features(*rows, labels if labelled else None, names if labelled else None, (), meta).save(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    train, val = features(folder / "train", 200, 1), features(folder / "val", 60, 2)
    return evaluate(None, train=train, val=val, out=folder / "out", **SMALL)


def test_every_number_stands_in_the_table_with_its_protocol(results):
    page = results.page.read_text(encoding="utf-8")
    rows = re.findall(
        r"<tr(?: class=\"headline\")?><td>(.*?)</td><td class=\"number\">(.*?)</td>.*<td>(.*)</td></tr>", page
    )
    shown = {(metric, value, protocol.replace("&#39;", "'")) for metric, value, protocol in rows}
    for record in results.records:
        value = f"{record.value:.2f}" if record.metric.endswith("(%)") else f"{record.value:.4g}"
        assert (record.metric, value, record.protocol) in shown
    assert page.count('class="headline"') == sum(record.headline for record in results.records) == 5


def test_the_page_shows_what_is_behind_the_numbers(results):
    page = results.page.read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        "kNN: neighbours and temperature", "Few labels", "Singular values",
        "Same class and different classes", "Accuracy of each class", "What is taken for what",
        "Most often confused", "Rows and dimensions",
    ]  # fmt: skip
    assert page.count('<img src="data:image/svg+xml;base64,') == 6 and page.count("alt=") == 6
    assert "<b>Healthy.</b> The features have not collapsed" in page
    assert (
        results.document["features"]["val"]["manifest_sha256"] in page and "mocohub evaluate --train" in page
    )


def test_the_page_is_one_file_that_asks_for_nothing(results):
    page = results.page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href|action)=\"(?!data:)", page) and "<script" not in page
    assert "default-src 'none'" in page


def test_names_cannot_become_markup(results):
    page = results.page.read_text(encoding="utf-8")
    assert "<b>model</b>" not in page and "&lt;b&gt;model&lt;/b&gt; on " in page


def test_the_same_evaluation_gives_the_same_bytes(results):
    before = results.page.read_bytes()
    folders = {name: results.path.parent.parent / name for name in ("train", "val")}
    evaluate(None, **folders, out=results.path.parent, **SMALL)
    assert results.page.read_bytes() == before


def test_collapse_is_said_in_words_and_colours(tmp_path):
    folders = {name: features(tmp_path / name, 40, 3, collapsed=True) for name in ("train", "val")}
    page = evaluate(None, **folders, out=tmp_path / "out", **SMALL).page.read_text()
    assert 'class="verdict bad"><b>Collapsed completely.</b> The features have collapsed completely' in page
    assert "24 of 24 dimensions are dead" in page and "39 of 40 rows repeat" in page
    assert "Singular values" not in page  # there is none to draw


def test_without_labels_only_the_spread_is_shown(tmp_path):
    folders = {name: features(tmp_path / name, 40, 3, labelled=False) for name in ("train", "val")}
    page = evaluate(None, **folders, out=tmp_path / "out", **SMALL).page.read_text()
    assert "train has no labels: only the health of the features was measured." in page
    assert re.findall("<h3>(.*?)</h3>", page) == ["Singular values", "Rows and dimensions"]
    assert "<h2>Classification</h2>" not in page and "<h2>Spread of the features</h2>" in page


# Not all warnings: what other tests have left open warns whenever it is collected.
@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_one_test_image_makes_a_page_without_the_plot_of_pairs(tmp_path):
    folders = {"train": features(tmp_path / "train", 40, 3), "val": features(tmp_path / "val", 1, 4)}
    page = evaluate(
        None, **folders, out=tmp_path / "out", probes=("knn", "retrieval"), **SMALL
    ).page.read_text()
    assert "Same class and different classes" not in page and "Accuracy of each class" in page


def test_of_many_classes_the_best_and_worst_are_shown_and_no_matrix(tmp_path):
    folders = {
        name: features(tmp_path / name, 200, seed, num_classes=50)
        for seed, name in enumerate(("train", "val"))
    }
    results = evaluate(None, **folders, out=tmp_path / "out", probes=("knn",), **SMALL)
    page = results.page.read_text()
    assert "The 20 worst and the 20 best of 50 classes" in page and "What is taken for what" not in page
    assert "top-5 (%)" in page and "Most often confused" in page


def test_a_page_without_matplotlib_names_the_extra_before_any_work(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from mocohub.evaluation.evaluate import evaluate\n"
        "evaluate(None, train='nowhere', val='nowhere', out='nowhere')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "pip install 'mocohub[report]'" in out.stderr and not list(tmp_path.iterdir())


def test_the_page_can_be_written_again_from_what_is_kept(results):
    opened = Results.open(results.path)
    before = results.page.read_bytes()
    write_page(opened, {})
    assert b"<h3>" not in results.page.read_bytes() and b"Classification" in results.page.read_bytes()
    results.page.write_bytes(before)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_the_browser_shows_all_of_it_at_every_width(browser, results, tmp_path, width):
    browser.requests.clear()
    browser.open(results.page.as_uri() + f"?{width}", width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    wide = """[...document.querySelectorAll('td, th, p, pre, img, dd')]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"""
    assert browser.run(wide) == 0
    assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
    assert browser.run("[...document.images].every(i => i.getBoundingClientRect().width > 250)")
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)
    assert sum(url.startswith("file:") for url in browser.requests) == 1
    assert browser.errors == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
