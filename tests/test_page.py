"""The page of features as files, and in a real browser that opens it without a server."""

import base64
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.images import write_images
from helpers.shards import make_tar
from PIL import Image, ImageColor

from mocohub.cli.searching import report
from mocohub.features import page as page_module
from mocohub.features.formats import merge
from mocohub.features.page import write_page
from mocohub.features.pictures import NEUTRAL, Pictures, thumbnail
from mocohub.features.store import Features
from mocohub.shard_reader import IDS_PER_SHARD
from mocohub.sources import list_images

COUNTS = {"cat": 120, "dog <b>": 100, "été": 80}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "photos", COUNTS, size_px=16)


@pytest.fixture(scope="module")
def features(photos: Path) -> Features:
    """A cloud for each class, in seven dimensions; every tenth image has no row."""
    images = list_images(photos)
    random = np.random.default_rng(0)
    centres = 3 * random.standard_normal((3, 7))
    ids = np.array([i for i in range(300) if i % 10 != 5])
    labels = np.array([images.labels[i] for i in ids])
    values = (centres[labels] + random.standard_normal((270, 7))).astype(np.float32)
    errors = [{"id": i, "path": images.paths[i], "reason": "cut"} for i in range(5, 300, 10)]
    meta = {
        "model": {"name": "a <i>model</i>"},
        "input": {"source": str(photos), "paths_sha256": images.fingerprint()},
    }
    paths = [images.paths[i] for i in ids]
    return Features(values, ids, paths, labels, images.classes, errors, meta)


@pytest.fixture(scope="module")
def html(features: Features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(features, tmp_path_factory.mktemp("report") / "page", k=6, thumbnail_px=32)


def part_of_a_merge(place: Path, name: str, colours: list[str]) -> Path:
    """Features of a folder of images in these colours; the second one is an error."""
    folder = place / name / "photos"
    folder.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
    images = list_images(folder)
    ids = [i for i in range(len(colours)) if i != 1]
    errors = [{"id": 1, "path": "1.png", "reason": "cut"}]
    meta = {"input": {"source": str(folder), "paths_sha256": images.fingerprint()}}
    values = np.random.default_rng(len(colours)).normal(size=(len(ids), 4)).astype(np.float32)
    paths = [images.paths[i] for i in ids]
    return Features(values, ids, paths, errors=errors, meta=meta).save(place / name / "features")


def test_merged_folders_show_the_pictures_of_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    colours = {"a": ["red", "white", "lime"], "b": ["blue", "white", "black"], "c": ["navy", "white", "gold"]}
    parts = {name: part_of_a_merge(tmp_path, name, names) for name, names in colours.items()}
    inner = merge([parts["a"], parts["b"]], tmp_path / "inner")
    merged = Features.open(merge([parts["c"], inner], tmp_path / "merged"))
    expected = [c for name in "cab" for c in (colours[name][0], colours[name][2])]
    pixels = [ImageColor.getrgb(colour) for colour in expected]

    def shown(**where: Path) -> list[tuple[int, int, int] | None]:
        pictures = Pictures(merged, **where)
        tiles = [pictures.thumbnail(row, 4) for row in range(len(merged))]
        return [tile and tile.getpixel((1, 1)) for tile in tiles]

    assert shown() == pixels
    Image.new("RGB", (8, 8), "pink").save(tmp_path / "a" / "photos" / "00.png")  # found by their paths then
    assert shown() == pixels
    index = write_page(merged, tmp_path / "page", k=2, thumbnail_px=16)
    page, sheet = read_page(index), Image.open(index.parent / "blocks" / "0000.jpg")
    for i, id_ in enumerate(page["ids"]):
        pixel = sheet.getpixel((16 * i + 8, 8))
        assert np.abs(np.subtract(pixel, pixels[merged.ids.tolist().index(id_)])).max() < 12
    (tmp_path / "c" / "photos").rename(tmp_path / "elsewhere")
    assert shown() == [None, None, *pixels[2:]]
    assert "Without 2 pictures" in caplog.text and "photos' does not exist" in caplog.text
    assert shown(images=tmp_path / "elsewhere")[:2] == pixels[:2]


def test_a_merge_with_streamed_tars_shows_the_pictures_of_each(tmp_path: Path) -> None:
    colours, paths = {"0.tar": ["red", "lime"], "1.tar": ["blue", "black"]}, []
    (tmp_path / "tars").mkdir()
    for name, own in colours.items():
        members = {}
        for i, colour in enumerate(own):
            Image.new("RGB", (8, 8), colour).save(file := io.BytesIO(), "PNG")
            members[f"{i}.png"] = file.getvalue()
            paths.append(f"{name}/{i}.png")
        make_tar(tmp_path / "tars" / name, members)
    ids = [0, 1, IDS_PER_SHARD, IDS_PER_SHARD + 1]
    meta = {"input": {"source": str(tmp_path / "tars"), "paths_sha256": None}}
    tars = Features(np.eye(4, dtype=np.float32), ids, paths, meta=meta).save(tmp_path / "features")
    photos = part_of_a_merge(tmp_path, "a", ["navy", "white", "gold"])
    merged = Features.open(merge([tars, photos, tars], tmp_path / "merged"))
    pictures = Pictures(merged)
    shown = [pictures.thumbnail(row, 4).getpixel((1, 1)) for row in range(len(merged))]
    expected = ["red", "lime", "blue", "black", "navy", "gold", "red", "lime", "blue", "black"]
    assert shown == [ImageColor.getrgb(colour) for colour in expected]


def read_page(index: Path) -> dict[str, np.ndarray | list]:
    """What the page knows, image by image, read without its own code."""
    content = json.loads((index.parent / "map.js").read_text()[len("const MAP = ") : -2])
    columns = {
        name: decode(content[name], kind) for name, kind in [("x", "<u2"), ("y", "<u2"), ("labels", "<i4")]
    }
    columns |= {"ids": [], "paths": [], "neighbours": [], "cosines": [], "classes": content["classes"]}
    for number, script in enumerate(sorted((index.parent / "blocks").glob("*.js"))):
        text = script.read_text()
        assert text.startswith(f"block({number}, ") and text.endswith(");\n")
        block = json.loads(text[len(f"block({number}, ") : -3])
        columns["ids"] += block["ids"]
        columns["paths"] += block["paths"]
        for name, kind in [("neighbours", "<u4"), ("cosines", "<f4")]:
            columns[name] += decode(block[name], kind).reshape(len(block["ids"]), -1).tolist()
    return columns


def decode(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_every_row_is_on_the_page_with_its_path_and_label(features, html):
    page = read_page(html)
    order = np.argsort(page["ids"])
    np.testing.assert_array_equal(np.array(page["ids"])[order], features.ids)
    assert [page["paths"][i] for i in order] == features.paths
    np.testing.assert_array_equal(page["labels"][order], features.labels)
    assert page["classes"] == features.classes


def test_neighbours_are_those_of_a_slow_search_without_the_image_itself(features, html):
    page = read_page(html)
    values = features.values.astype(np.float64)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    row_of = {id_: row for row, id_ in enumerate(features.ids.tolist())}
    for i, id_ in enumerate(page["ids"]):
        expected = np.argsort(-cosines[row_of[id_]])[:6]
        assert [row_of[page["ids"][j]] for j in page["neighbours"][i]] == expected.tolist()
        np.testing.assert_allclose(page["cosines"][i], cosines[row_of[id_], expected], atol=1e-6)


def test_the_map_is_pca_of_the_unit_vectors_on_one_scale(features, html):
    page = read_page(html)
    order = np.argsort(page["ids"])
    points = np.stack([page["x"], page["y"]], 1)[order].astype(np.float64)
    unit = features.values / np.linalg.norm(features.values, axis=1, keepdims=True)
    left, scale, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    expected = left[:, :2] * scale[:2]
    distances = [np.linalg.norm(a[:, None] - a[None], axis=2).ravel() for a in (points, expected)]
    ratio = distances[0].max() / distances[1].max()
    np.testing.assert_allclose(distances[0], ratio * distances[1], atol=3)  # of 65535
    assert points.min() >= 0 and points.max() == 65535
    share = (scale[:2] ** 2).sum() / (scale**2).sum()
    assert f"the main 2 axes (PCA), {100 * share:.0f} % of the variance" in html.read_text("utf-8")


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), np.float64)


def test_each_thumbnail_lies_where_its_image_is_numbered(html, photos):
    page = read_page(html)
    sheets = [Image.open(path) for path in sorted((html.parent / "blocks").glob("*.jpg"))]
    assert [sheet.size for sheet in sheets] == [(512, 512)] * 2
    for i in range(270):
        x, y = 32 * (i % 256 % 16), 32 * (i % 256 // 16)
        tile = grey(sheets[i // 256].crop((x, y, x + 32, y + 32)))
        own, other = (grey(thumbnail(photos / page["paths"][j], 32)) for j in (i, i - 1))
        assert 2.5 * np.abs(tile - own).mean() < np.abs(tile - other).mean()
    rest = np.asarray(sheets[1].crop((0, 256, 512, 512)))
    np.testing.assert_allclose(rest.reshape(-1, 3).mean(0), NEUTRAL, atol=2)


def test_images_of_one_block_are_neighbours_on_the_map(html):
    page = read_page(html)
    steps = np.hypot(np.diff(page["x"].astype(float)), np.diff(page["y"].astype(float)))
    shuffled = np.random.default_rng(0).permutation(270)
    far = np.hypot(np.diff(page["x"][shuffled].astype(float)), np.diff(page["y"][shuffled].astype(float)))
    assert np.median(steps) < 0.3 * np.median(far)


def test_of_too_many_images_the_same_are_always_drawn(features, tmp_path):
    pages = [read_page(write_page(features, tmp_path / name, max_images=100, k=3)) for name in "ab"]
    assert pages[0]["ids"] == pages[1]["ids"] and len(set(pages[0]["ids"])) == 100
    assert {j for row in pages[0]["neighbours"] for j in row} <= set(range(100))
    assert "drawn at random from 270" in (tmp_path / "a" / "index.html").read_text("utf-8")


def test_labels_of_a_list_replace_those_of_the_features(features, tmp_path):
    lines = [f"{path},{'even' if i % 2 else 'odd'}\n" for i, path in enumerate(features.paths[:200])]
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(lines), encoding="utf-8")
    page = read_page(write_page(features, tmp_path / "page", labels=tmp_path / "labels.csv"))
    names = {
        path: page["classes"][label] if label >= 0 else None
        for path, label in zip(page["paths"], page["labels"], strict=True)
    }
    assert [names[path] for path in features.paths] == ["odd", "even"] * 100 + [None] * 70


def test_numbers_are_classes_where_these_have_no_names(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    features = Features(values, range(5), list("abcde"), labels=[7, -1, 3, 7, 12])
    page = read_page(write_page(features, tmp_path / "page"))
    names = {
        path: page["classes"][label] if label >= 0 else None
        for path, label in zip(page["paths"], page["labels"], strict=True)
    }
    assert names == {"a": "7", "b": None, "c": "3", "d": "7", "e": "12"}


@pytest.mark.parametrize(
    "values",
    [np.ones((1, 4)), np.ones((2, 1)), np.zeros((40, 3)), np.eye(3), np.repeat(np.eye(4), 30, 0)],
    ids=["one", "one feature", "zeros", "three", "copies"],
)
def test_few_or_equal_rows_make_a_page_too(tmp_path, values):
    features = Features(values.astype(np.float32), range(len(values)), [f"{i}" for i in range(len(values))])
    page = read_page(write_page(features, tmp_path / "page", k=5))
    assert sorted(page["ids"]) == list(range(len(values)))
    for i, neighbours in enumerate(page["neighbours"]):
        assert len(set(neighbours) - {i}) == min(5, len(values) - 1)


@pytest.mark.slow  # numba compiles for half a minute
def test_umap_keeps_classes_together(features, tmp_path):
    pytest.importorskip("umap", reason="the extra `map` is not installed")
    html = write_page(features, tmp_path / "page", layout="umap")
    page = read_page(html)
    points = np.stack([page["x"], page["y"]], 1).astype(float)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (page["labels"][distances.argmin(1)] == page["labels"]).mean() > 0.9
    assert "UMAP by cosine" in html.read_text("utf-8")


def test_a_missing_umap_is_named_with_its_extra(features, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"layout='umap' needs umap-learn: pip install 'mocohub\[map\]'"):
        write_page(features, tmp_path / "page", layout="umap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "tsne"}, "Unknown layout 'tsne'. Choose one of: pca, umap"),
        ({"k": 0}, "k is 0, but must be at least 1"),
        ({"max_images": 0}, "max_images is 0"),
        ({"thumbnail_px": 0}, "thumbnail_px is 0"),
        ({"labels": "labels.txt"}, "'labels.txt' has no labels.*columns path and label"),
        ({"labels": "others.csv"}, "'others.csv' labels none of the images, such as 'cat/0000.png'"),
    ],
)
def test_what_cannot_be_shown_is_refused(features, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("cat/0000.png\n")
    Path("others.csv").write_text("path,label\nother.png,x\n")
    with pytest.raises(ValueError, match=message):
        write_page(features, "page", **arguments)
    assert not Path("page").exists()


def test_a_page_of_nothing_and_a_folder_that_exists_are_refused(features, tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        write_page(Features(np.zeros((0, 3), np.float32), [], []), tmp_path / "page")
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="already exists. Choose another folder"):
        write_page(features, tmp_path)


def test_an_interrupted_page_leaves_nothing(features, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_render", None)
    with pytest.raises(TypeError):
        write_page(features, tmp_path / "page")
    assert list(tmp_path.iterdir()) == []


def test_the_verb_writes_the_page(features, tmp_path, capsys):
    folder = features.save(tmp_path / "features")
    report(str(folder), html=str(tmp_path / "page"), k=2)
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    assert len(read_page(tmp_path / "page" / "index.html")["ids"]) == 270


# --- in the browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, html: Path) -> Iterator[Browser]:
    """The page, opened anew; afterwards: it asked for its own files only, and nothing went wrong in it."""
    browser.requests.clear()
    browser.errors.clear()
    browser.open("about:blank")
    browser.open(html.as_uri())
    until(browser, "width > 0")
    yield browser
    assert browser.run("document.readyState") == "complete"  # so that every event before has arrived
    ours = html.parent.as_uri()
    assert [u for u in browser.requests if not u.startswith((ours, "data:", "about:"))] == []
    assert browser.errors == []


def until(page: Browser, condition: str) -> None:
    deadline = time.monotonic() + 60
    while not page.run(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def mouse(page: Browser, kind: str, x: float, y: float, **more: object) -> None:
    page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)


def place(page: Browser, i: int) -> tuple[float, float]:
    """Where an image is in the window."""
    return page.run(
        f"(() => {{ const b = canvas.getBoundingClientRect(); return [toX({i}) + b.x, toY({i}) + b.y]; }})()"
    )


def comes_to_look(page: Browser, box: dict[str, float], right: Callable[[Image.Image], bool]) -> bool:
    """Whether a part of the window looks right in the end: it is painted some time after it is asked for."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        shot = page.send("Page.captureScreenshot", clip={**box, "scale": 1})["data"]
        with Image.open(io.BytesIO(base64.b64decode(shot))) as image:
            if right(image.convert("RGB")):
                return True
    return False


def lonely(page: Browser) -> int:
    """An image with no other close to it on the map."""
    far = "Math.hypot(toX(i) - toX(j), toY(i) - toY(j)) > 12"
    return page.run(f"[...order].find(i => [...order].every(j => j === i || {far}))")


def click_at(page: Browser, i: int) -> None:
    x, y = place(page, i)
    for kind in ("mousePressed", "mouseReleased"):
        mouse(page, kind, x, y, button="left", clickCount=1)


def test_pointing_shows_thumbnail_label_and_path(page, html):
    data, i = read_page(html), lonely(page)
    mouse(page, "mouseMoved", *place(page, i))
    text = f"{data['classes'][data['labels'][i]]} \u00b7 {data['paths'][i]}"
    until(page, f"!tip.hidden && tip.textContent === {json.dumps(text)}")
    assert f"{i // 256:04d}.jpg" in page.run("tip.querySelector('.tile').style.backgroundImage")
    mouse(page, "mouseMoved", 5, 5)
    until(page, "tip.hidden")


def test_turning_the_wheel_leaves_no_thumbnail_of_what_is_elsewhere_now(page):
    x, y = place(page, lonely(page))
    mouse(page, "mouseMoved", x + 5, y)
    until(page, "!tip.hidden")
    mouse(page, "mouseWheel", x + 5, y, deltaX=0, deltaY=-1200)
    until(page, "view.zoom > 5")
    until(page, "tip.hidden")


def test_a_click_shows_the_neighbours_and_theirs_lead_on_and_back(page, html):
    data, i = read_page(html), lonely(page)
    click_at(page, i)
    for chosen in (i, data["neighbours"][i][1]):
        near = data["neighbours"][chosen]
        until(page, f"document.querySelectorAll('#near li').length === 6 && chosen === {chosen}")
        facts = page.run("[...document.querySelectorAll('#chosen dd')].map(e => e.textContent)")
        name = data["classes"][data["labels"][chosen]]
        assert facts == [name, data["paths"][chosen], str(data["ids"][chosen])]
        titles = page.run("[...document.querySelectorAll('#near button')].map(e => e.title)")
        assert titles == [f"{data['classes'][data['labels'][j]]} \u00b7 {data['paths'][j]}" for j in near]
        cosines = page.run("[...document.querySelectorAll('#near b')].map(e => e.textContent)")
        assert cosines == [f"{cosine:.3f}" for cosine in data["cosines"][chosen]]
        page.click("#near li:nth-child(2) button")
    until(page, "chosen !== " + str(data["neighbours"][i][1]))
    page.run("history.back()")
    until(page, f"chosen === {data['neighbours'][i][1]}")


def coarse(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float64)[1:-1, 1:-1]


def test_the_picture_shown_is_that_of_the_image(page, html, photos):
    """The pixels on the screen, not what the page believes."""
    data = read_page(html)
    for i in (3, 200, 269):
        page.run(f"choose({i})")
        path = "document.querySelectorAll('#chosen dd')[1]?.textContent"
        until(page, f"chosen === {i} && {path} === {json.dumps(data['paths'][i])}")
        box = page.run(
            "(b => ({x: b.x, y: b.y, width: b.width, height: b.height}))"
            "(document.querySelector('#chosen .tile').getBoundingClientRect())"
        )
        expected = coarse(thumbnail(photos / data["paths"][i], 32))
        assert comes_to_look(page, box, lambda seen: np.abs(coarse(seen) - expected).mean() < 10), i  # noqa: B023


def test_labels_filter_the_map_and_come_back(page, html):
    data = read_page(html)
    counts = [int((data["labels"] == label).sum()) for label in range(3)]
    texts = page.run("[...document.querySelectorAll('#legend button')].map(e => e.textContent)")
    assert texts == [f"{name}{count}" for name, count in zip(COUNTS, counts, strict=True)]
    page.click("#legend [data-label='1']")
    assert page.run("document.getElementById('count').textContent") == f"{counts[1]} of 270 images shown"
    page.click("#legend [data-label='2']")
    assert (
        page.run("document.getElementById('count').textContent")
        == f"{counts[1] + counts[2]} of 270 images shown"
    )
    assert page.run("[...document.querySelectorAll('[aria-pressed=true]')].map(e => e.dataset.label)") == [
        "1",
        "2",
    ]
    hidden = page.run("[...order].find(i => labels[i] === 0)")
    x, y = page.run(f"[toX({hidden}), toY({hidden})]")
    assert page.run(f"labels[nearest({x}, {y}, 1e9)]") != 0
    page.click("#all")
    assert page.run("document.getElementById('count').textContent") == "270 of 270 images shown"
    assert page.run(f"toX(nearest({x}, {y}, 1e9))") == pytest.approx(x, abs=0.5)


def test_the_wheel_zooms_at_the_pointer_and_dragging_moves(page):
    i = lonely(page)
    before = x, y = place(page, i)
    mouse(page, "mouseWheel", x, y, deltaX=0, deltaY=-500)
    until(page, "view.zoom > 2")
    assert place(page, i) == pytest.approx((x, y), abs=2)  # the browser rounds the pointer's position
    x, y = place(page, i)
    mouse(page, "mousePressed", x, y, button="left", clickCount=1)
    mouse(page, "mouseMoved", x + 30, y + 10, button="left", buttons=1)
    mouse(page, "mouseMoved", x + 60, y + 20, button="left", buttons=1)
    mouse(page, "mouseReleased", x + 60, y + 20, button="left", clickCount=1)
    assert place(page, i) == pytest.approx((x + 60, y + 20), abs=0.5)
    assert page.run("chosen") == -1  # to drag is not to choose
    page.click("#fit")
    assert place(page, i) == pytest.approx(before, abs=0.5)


def test_few_dots_become_the_pictures_of_their_images(page, html, photos):
    data, i = read_page(html), lonely(page)
    assert page.run("(draw(), pictured)") is False
    page.run(
        f"(() => {{ zoom(1e9, toX({i}), toY({i})); view.x += 200 - toX({i}); view.y += 200 - toY({i}); }})()"
    )
    until(page, f"(draw(), pictured) && sheet(Math.floor({i} / PER_BLOCK)).naturalWidth > 0")
    page.run("draw()")
    x, y = place(page, i)
    box = {"x": x - 22, "y": y - 22, "width": 44, "height": 44}
    tiles = [grey(thumbnail(photos / path, 32)) for path in data["paths"]]

    def its_own(seen: Image.Image) -> bool:
        differences = [np.abs(grey(seen.resize((32, 32))) - tile).mean() for tile in tiles]
        return 1.5 * differences.pop(i) < min(differences)

    assert comes_to_look(page, box, its_own)


def test_a_click_beside_all_images_chooses_none(page):
    page.run("choose(7)")
    until(page, "chosen === 7")
    box = page.run("(b => [b.x + 3, b.y + b.height / 2])(canvas.getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        mouse(page, kind, *box, button="left", clickCount=1)
    until(page, "chosen === -1 && document.getElementById('hint').checkVisibility()")


def test_the_map_can_be_used_with_the_keyboard(page):
    page.run("canvas.focus()")
    for key, code in [("+", 187), ("ArrowLeft", 37), ("-", 189)]:
        page.send("Input.dispatchKeyEvent", type="rawKeyDown", key=key, windowsVirtualKeyCode=code)
    assert page.run("view.zoom") == pytest.approx(1)
    page.press("Enter")
    until(page, "chosen >= 0 && document.querySelectorAll('#near li').length === 6")
    assert page.run("nearest(width / 2, height / 2, 1e9)") == page.run("chosen")


def test_points_have_the_colours_of_their_labels(page):
    alone = "i => [...order].every(j => j === i || Math.hypot(toX(i) - toX(j), toY(i) - toY(j)) > 9)"
    pairs = page.run(
        """(() => {
        draw();
        const copy = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        [copy.canvas.width, copy.canvas.height] = [canvas.width, canvas.height];
        copy.drawImage(canvas, 0, 0);
        const at = (x, y) => [...copy.getImageData(x, y, 1, 1).data];
        return [...order].filter(ALONE).slice(0, 30).map((i) => {
          const drawn = at(toX(i), toY(i));
          copy.clearRect(0, 0, 9, 9);
          copy.globalAlpha = 0.85;
          copy.fillStyle = colour(labels[i]);
          copy.fillRect(0, 0, 9, 9);
          return [drawn, at(4, 4)];
        });
        })()""".replace("ALONE", alone)
    )
    assert len({tuple(wanted) for _, wanted in pairs}) == 3
    for drawn, wanted in pairs:
        assert drawn == pytest.approx(wanted, abs=3)


def test_names_cannot_become_markup(page, html):
    assert page.run("document.querySelectorAll('#legend b, h1 i, header i, #panel b b').length") == 0
    assert "a <i>model</i>" in page.run("document.querySelector('header').textContent")
    assert "a &lt;i&gt;model" in html.read_text("utf-8")


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 1280, 1920])
def test_nothing_is_wider_than_the_window(page, html, width):
    page.open("about:blank")
    page.open(html.as_uri(), width=width)
    page.run("choose(5)")
    until(page, "document.querySelectorAll('#near li').length === 6")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("canvas.clientWidth") >= 200 and page.run("canvas.clientHeight") >= 300


def test_the_button_changes_the_colours(page):
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.run(background) == "rgb(255, 255, 255)"
    page.click("#theme")
    assert page.run(background) == "rgb(20, 25, 31)"
    page.run("localStorage.clear()")


def test_without_labels_and_pictures_the_page_still_works(browser, tmp_path):
    values = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    html = write_page(Features(values, range(30), [f"{i}.jpg" for i in range(30)]), tmp_path / "page", k=4)
    browser.errors.clear()
    browser.open(html.as_uri())
    until(browser, "width > 0")
    click_at(browser, lonely(browser))
    until(browser, "document.querySelectorAll('#near li').length === 4")
    assert browser.run("document.getElementById('unlabelled').checkVisibility()") is True
    assert {url.split("/")[-1] for url in browser.requests if "page/" in url} >= {"map.js", "0000.js"}
    assert not list(html.parent.rglob("*.jpg")) and browser.errors == []


@pytest.mark.slow
def test_a_hundred_thousand_images_are_drawn_and_answered_at_once(browser, tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 1000, 100_000)
    values = (
        random.standard_normal((1000, 16))[labels] + 0.3 * random.standard_normal((100_000, 16))
    ).astype(np.float32)
    paths = [f"folder/of/class{label:04d}/image-{i:06d}.jpg" for i, label in enumerate(labels)]
    features = Features(values, range(100_000), paths, labels, [f"class {i}" for i in range(1000)])
    html = write_page(features, tmp_path / "page")
    assert len(list((tmp_path / "page" / "blocks").iterdir())) == 391
    browser.open("about:blank")
    browser.open(html.as_uri())
    until(browser, "width > 0")
    took = (
        "(f => {{ const t = performance.now(); for (let i = 0; i < 5; i++) f();"
        "return (performance.now() - t) / 5; }})({})"
    )
    assert browser.run(took.format("draw")) < 500
    assert browser.run(took.format("() => nearest(300, 300, 8)")) < 50
    click_at(browser, browser.run("order[0]"))
    until(browser, "document.querySelectorAll('#near li').length === 12")
    assert browser.errors == []
