import json
import sys

import numpy as np
import pytest
import timm
import torch
from helpers.images import write_images
from PIL import Image

from mocohub.backbones import create_backbone
from mocohub.cli.searching import search as search_verb
from mocohub.features import search as search_module
from mocohub.features.extract import extract
from mocohub.features.pictures import NEUTRAL, Pictures, picture_grid, thumbnail
from mocohub.features.projection import Projection
from mocohub.features.search import extract_like, search
from mocohub.features.store import Features
from mocohub.images import ImageError, decode_image
from mocohub.probes import neighbors


def make_features(values, **columns):
    return Features(values, range(len(values)), [f"{i}.jpg" for i in range(len(values))], **columns)


def clouds(num_rows, num_features=16, seed=0):
    """Vectors of very different lengths around eight centres."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((8, num_features))
    values = centres[random.integers(0, 8, num_rows)] + 0.4 * random.standard_normal((num_rows, num_features))
    return (values * 10.0 ** random.uniform(-3, 3, (num_rows, 1))).astype(np.float32)


def slow_search(values, queries, k):
    """Every cosine in float64, all of them sorted."""
    values, queries = np.float64(values), np.float64(queries)
    cosines = np.array([[q @ v / np.linalg.norm(q) / np.linalg.norm(v) for v in values] for q in queries])
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tile", [(1024, 16384), (7, 50), (64, 3)], ids=str)
def test_neighbours_are_those_of_a_slow_search_however_the_work_is_cut(monkeypatch, tile, dtype):
    monkeypatch.setattr(neighbors, "_QUERY_ROWS", tile[0])
    monkeypatch.setattr(neighbors, "_BANK_ROWS", {"cpu": tile[1]})
    values, queries = clouds(120).astype(dtype), clouds(30, seed=0)
    indices, similarities = search(make_features(values), torch.tensor(queries), k=9)
    expected, cosines = slow_search(values, queries, 9)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarities, cosines, atol=1e-6)
    assert (indices.dtype, similarities.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("block_rows", [16384, 4])
def test_of_equal_rows_the_lower_goes_first_and_zeros_have_similarity_0(monkeypatch, block_rows):
    monkeypatch.setattr(neighbors, "_BANK_ROWS", {"cpu": block_rows})
    values = np.zeros((11, 2), np.float32)
    values[[2, 5, 9]] = [3, 0]
    values[7] = [-1, 0]
    indices, similarities = search(make_features(values), [[1, 0], [0, 0]], k=5)
    assert indices.tolist() == [[2, 5, 9, 0, 1], [0, 1, 2, 3, 4]]
    assert similarities.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_with_fewer_rows_than_k_all_are_given(tmp_path):
    folder = make_features(clouds(3)).save(tmp_path / "features")
    indices, similarities = search(Features.open(folder), clouds(2), k=10)
    assert indices.shape == similarities.shape == (2, 3)
    assert np.sort(indices).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 must be a number of neighbours"),
        ({"index": "annoy"}, "Unknown index 'annoy'. Choose one of: exact, faiss"),
        ({"queries": np.ones(16)}, r"queries has shape \(16,\) .*but must be \(n, 16\).*extract_like"),
        ({"queries": np.ones((1, 3))}, r"queries has shape \(1, 3\)"),
        ({"queries": "photo.jpg"}, r"queries has shape \(\) and type <U9.*extract_like\(features, images\)"),
        ({"queries": np.full((2, 16), np.nan)}, "2 of 2 rows hold NaN or inf"),
        ({"queries": make_features(np.ones((1, 16), np.float32), meta={"normalized": True})}, "normalized"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, message):
    features = make_features(clouds(5), meta={"normalized": False})
    with pytest.raises(ValueError, match=message):
        search(features, **{"queries": np.ones((1, 16)), **arguments})


def test_the_graph_of_faiss_finds_nearly_all_neighbours(monkeypatch):
    pytest.importorskip("faiss", reason="the extra `search` is not installed")
    monkeypatch.setattr(search_module, "_BLOCK_ROWS", 700)
    values = clouds(2000, 32)
    features, queries = make_features(values), clouds(100, 32, seed=0)
    expected, cosines = search(features, queries, k=10)
    indices, similarities = search(features, queries, k=10, index="faiss")
    shared = [len(set(a) & set(b)) for a, b in zip(indices, expected, strict=True)]
    assert np.mean(shared) >= 9.9
    np.testing.assert_allclose(similarities[:, 0], cosines[:, 0], atol=1e-5)
    assert (indices.dtype, similarities.dtype) == (np.int64, np.float32)


def test_rows_the_graph_does_not_reach_are_searched_exactly():
    pytest.importorskip("faiss", reason="the extra `search` is not installed")
    values = np.ones((1500, 4), np.float32)  # one point: its copies fill all links of the graph
    values[1490:] = np.eye(4, dtype=np.float32)[np.arange(10) % 4]
    indices, _ = search(make_features(values), values[-3:], k=1400, index="faiss")
    assert all(len(set(row)) == 1400 and min(row) >= 0 for row in indices.tolist())


def test_a_missing_faiss_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"index='faiss' needs faiss: pip install 'mocohub\[search\]'"):
        search(make_features(clouds(5)), clouds(1), index="faiss")


# --- images as queries ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_backbone("r18tiny").eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "photos", {"cat": 5, "dog": 4}, size_px=40)


@pytest.fixture(scope="module")
def stored(photos, tmp_path_factory):
    """Features by a model that has a name."""
    out = tmp_path_factory.mktemp("features") / "features"
    return extract("moco_tiny_cifar10", photos, out=out, num_workers=0, progress=False)


def test_an_image_of_the_features_finds_itself_by_the_model_they_name(stored, photos):
    files = [str(photos / path) for path in stored.paths]
    indices, similarities = search(stored, extract_like(stored, files), k=1)
    assert indices[:, 0].tolist() == list(range(9))
    np.testing.assert_allclose(similarities, 1, atol=2e-3)  # bfloat16 may have made the features


@pytest.mark.parametrize(
    "settings",
    [{"normalize": True}, {"flip": True}, {"layers": ["layer3", "stage2"], "pool": "max"}],
    ids=str,
)
def test_queries_are_extracted_with_the_settings_of_the_features(model, photos, settings):
    features = extract(model, photos, **settings, dtype="float32", num_workers=0, progress=False)
    found = extract_like(features, photos, model=model)
    np.testing.assert_allclose(found.values, features.values, rtol=1e-4, atol=1e-5)


def test_projected_features_need_their_projection(model, photos, tmp_path):
    plain = extract(model, photos, dtype="float32", num_workers=0, progress=False)
    projection = Projection.fit(plain, 4)
    features = extract(model, photos, projection=projection, dtype="float32", num_workers=0, progress=False)
    with pytest.raises(ValueError, match="projected.*projection=... or --projection"):
        extract_like(features, photos, model=model)
    found = extract_like(features, photos, model=model, projection=projection)
    np.testing.assert_allclose(found.values, features.values, rtol=1e-3, atol=1e-4)


def test_another_model_is_refused(stored, photos):
    torch.manual_seed(1)
    other = create_backbone("r18tiny").eval()
    with pytest.raises(ValueError, match="not comparable"):
        extract_like(stored, photos, model=other)


@pytest.mark.parametrize("meta", [{}, {"model": {"name": "ResNet"}}], ids=str)
def test_features_without_a_model_that_can_be_loaded_ask_for_it(meta, photos):
    features = make_features(clouds(3), meta=meta)
    with pytest.raises(ValueError, match="cannot be loaded here: .*model=... or --model"):
        extract_like(features, photos)


def test_a_stock_timm_model_searches_too(photos):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)).eval()
    features = extract(model, photos, dtype="float32", num_workers=0, progress=False)
    found = search(features, extract_like(features, [photos / "dog" / "0002.png"], model=model), k=1)
    assert features.paths[found.indices[0, 0]] == "dog/0002.png"


# --- pictures ---------------------------------------------------------------------------------------------


def colour_of(tile):
    return np.asarray(tile).reshape(-1, 3).mean(0)


def test_every_row_has_the_picture_of_its_image(stored, photos):
    pictures = Pictures(stored)
    assert pictures.found
    for row, path in enumerate(stored.paths):
        tile = pictures.thumbnail(row, 24)
        assert tile.size == (24, 24)
        np.testing.assert_allclose(colour_of(tile), colour_of(Image.open(photos / path)), atol=1.5)


def test_in_a_folder_that_has_grown_rows_are_found_by_their_paths(stored, photos, tmp_path):
    grown = write_images(tmp_path / "photos", {"cat": 5, "dog": 4}, size_px=40)
    Image.new("RGB", (8, 8), "red").save(grown / "cat" / "0000a.png")
    (grown / "dog" / "0003.png").unlink()
    old, new = Pictures(stored), Pictures(stored, grown)
    for row in range(8):
        assert old.thumbnail(row, 16).tobytes() == new.thumbnail(row, 16).tobytes()
    assert new.thumbnail(8, 16) is None


def test_images_that_are_gone_give_a_warning_and_no_pictures(stored, caplog):
    features = make_features(clouds(2), meta={"input": {"source": "nowhere"}})
    pictures = Pictures(features)
    assert not pictures.found and pictures.thumbnail(0, 16) is None
    assert "'nowhere' does not exist" in caplog.text and "--data" in caplog.text


def test_given_images_that_are_not_those_are_refused(stored, tmp_path):
    other = write_images(tmp_path / "other", {"fox": 2, "owl": 2})
    with pytest.raises(ValueError, match="none of the 9 images of the features, such as 'cat/0000.png'"):
        Pictures(stored, other)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Pictures(stored, "nowhere")


def test_a_list_of_files_is_found_again(model, photos):
    files = [photos / "dog" / "0001.png", photos / "cat" / "0001.png"]
    features = extract(model, files, dtype="float32", num_workers=0, progress=False)
    assert Pictures(features).thumbnail(1, 40).tobytes() == decode_image(files[1]).tobytes()


@pytest.mark.parametrize("size", [(400, 300), (37, 500), (3, 3), (17, 901)], ids=str)
def test_a_thumbnail_is_the_middle_square(tmp_path, size):
    image = Image.new("RGB", size, "red")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste((0, 0, 255), (left, top, left + side, top + side))
    image.save(tmp_path / "x.jpg", quality=100, subsampling=0)
    tile = thumbnail(tmp_path / "x.jpg", 32)
    assert tile.size == (32, 32)
    np.testing.assert_allclose(colour_of(tile.crop((4, 4, 28, 28))), (0, 0, 255), atol=12)


def test_a_file_that_is_no_image_has_no_thumbnail(tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(ImageError, match="not a JPEG"):
        thumbnail(tmp_path / "x.jpg", 32)


def test_a_grid_shows_every_tile_in_its_place_and_a_frame_around_the_first():
    tiles = [Image.new("RGB", (100, 100), (10 * i, 0, 0)) for i in range(7)]
    tiles[4] = None
    captions = [("0.9 " + "wide " * 50, "a/very/long/path/\u202e\n" * 100 + "end.jpg")] * 7
    grid = picture_grid(tiles, captions, num_columns=3, tile_px=100)
    pixels = np.asarray(grid)
    step_x, step_y = 110, 110 + 3 * 10
    assert grid.size == (3 * step_x + 10, 3 * step_y + 10)
    for i in range(7):
        x, y = 10 + i % 3 * step_x, 10 + i // 3 * step_y
        expected = NEUTRAL if i == 4 else (10 * i, 0, 0)
        assert (pixels[y : y + 100, x : x + 100] == expected).all(), i
        below = pixels[y + 102 : y + 138, x : x + 100]
        assert below.min() < 120  # something is written
        between = pixels[y + 102 : y + 138, x + 104 : x + 106]
        assert (between == 255).all()  # and nothing beside it
    frame = tuple(pixels[7, 60])
    assert frame != (255, 255, 255) and tuple(pixels[7, 60 + step_x]) == (255, 255, 255)


# --- the verb ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(stored, tmp_path):
    return str(stored.save(tmp_path / "stored"))


def test_the_verb_prints_rank_cosine_label_and_path(folder, photos, capsys):
    search_verb(folder, str(photos / "dog" / "0002.png"), k=3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert lines[0][2:] == ["dog", "dog/0002.png"] and float(lines[0][1]) > 0.99
    assert float(lines[0][1]) >= float(lines[1][1]) >= float(lines[2][1])


def test_the_verb_writes_a_picture_grid(folder, photos, tmp_path, capsys):
    out = tmp_path / "grid.png"
    search_verb(folder, str(photos / "cat" / "0001.png"), k=4, out=str(out))
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    with Image.open(out) as grid:
        first = grid.crop((16, 16, 176, 176))
        nearest = grid.crop((192, 16, 352, 176))
    assert first.tobytes() == nearest.tobytes() == thumbnail(photos / "cat" / "0001.png", 160).tobytes()


def test_the_verb_writes_one_html_file_that_cannot_be_made_to_run_anything(photos, tmp_path):
    evil = write_images(tmp_path / "photos", {"<script>alert(1)<": 3, "b": 2}, size_px=40)
    features = extract("moco_tiny_cifar10", evil, num_workers=0, progress=False)
    folder = features.save(tmp_path / "evil")
    search_verb(str(folder), str(photos / "cat" / "0001.png"), k=5, out=str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.count('<img src="data:image/jpeg;base64,') == 6
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize(
    ("image", "out", "error", "message"),
    [
        ("nowhere.jpg", None, FileNotFoundError, "'nowhere.jpg' does not exist"),
        (__file__, "grid.gif", ValueError, r"'grid.gif' must end in .png or .html"),
        (__file__, None, RuntimeError, "not a JPEG, PNG, WebP"),
    ],
)
def test_the_verb_refuses_what_it_cannot_do(folder, image, out, error, message):
    with pytest.raises(error, match=message):
        search_verb(folder, image, out=out)


def test_the_verb_says_when_the_images_are_elsewhere(folder, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        search_verb(folder, str(photos / "cat" / "0000.png"), out=str(tmp_path / "x.png"), data="nowhere")
    assert not (tmp_path / "x.png").exists()
    assert json.loads((tmp_path / "stored" / "manifest.json").read_text())["rows"] == 9


def test_features_search_themselves():
    features = Features(np.eye(3, 4, dtype=np.float32), ids=[0, 1, 2], paths=["a", "b", "c"])
    assert features.search(features.values[1:2], k=1).indices.tolist() == [[1]]


def test_images_are_extracted_as_fast_as_the_features_were(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for path, coarse in zip(paths, pixels, strict=True):
        Image.fromarray(coarse).resize((160, 160)).save(path)
    torch.manual_seed(0)
    model = create_backbone("r18tiny").eval()
    stored = extract(model, paths, fast_decode=True, dtype="float32", num_workers=0, progress=False)
    queries = extract_like(stored, paths, model=model)
    np.testing.assert_allclose(queries.values, stored.values, rtol=1e-4, atol=1e-6)
    assert search(stored, queries, k=1).indices.ravel().tolist() == [0, 1, 2]


def test_a_grid_of_tiny_pictures_has_captions_that_fit():
    assert picture_grid([None, None], [("query", "a.jpg"), ("0.5", "b.jpg")], tile_px=4).size == (32, 50)
