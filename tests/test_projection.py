from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from mocohub.features import writer
from mocohub.features.formats import convert
from mocohub.features.projection import Projection
from mocohub.features.store import Features
from mocohub.files import sha256

META = {
    "model": {"name": "here/r18", "weights_sha256": "ab"},
    "transform": {"text": "Resize"},
    "normalized": False,
    "input": {"source": "photos"},
}


def make_values(num_rows: int = 300, num_features: int = 12, mean: float = 0) -> np.ndarray:
    """Correlated features, some directions much longer than others."""
    random = np.random.default_rng(3)
    mixed = random.normal(size=(num_rows, num_features)) * 2.0 ** -np.arange(num_features)
    rotation = np.linalg.qr(random.normal(size=(num_features, num_features)))[0]
    return (mixed @ rotation + mean).astype(np.float32)


def make_features(values: np.ndarray, **meta: object) -> Features:
    paths = [f"{i}.jpg" for i in range(len(values))]
    return Features(values, range(len(values)), paths, meta={**META, **meta})


@pytest.mark.parametrize("whiten", [False, True])
def test_projected_rows_are_those_of_scikit_learn_signs_included(whiten: bool) -> None:
    values = make_values()
    expected = PCA(5, whiten=whiten, svd_solver="full").fit(values[:200].astype(np.float64))
    projection = Projection.fit(values[:200], 5, whiten=whiten)
    np.testing.assert_allclose(projection(values), expected.transform(values.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(projection.variances, expected.explained_variance_, rtol=1e-9)
    share = projection.fitted_on["explained_variance"]
    assert share == pytest.approx(expected.explained_variance_ratio_.sum())
    assert projection(values).dtype == np.float32


def test_a_large_mean_and_many_blocks_cancel_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("probes.inputs", "features.projection"):
        monkeypatch.setattr(f"mocohub.{module}.BLOCK_ROWS", 7)
    values = make_values(mean=4096.0)
    expected = PCA(4, svd_solver="full").fit(values.astype(np.float64))
    projection = Projection.fit(values, 4)
    np.testing.assert_allclose(projection.variances, expected.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose(projection(values), expected.transform(values.astype(np.float64)), atol=1e-6)


def test_whitened_components_are_uncorrelated_and_of_variance_one() -> None:
    values = make_values()
    np.testing.assert_allclose(np.cov(Projection.fit(values, 6, whiten=True)(values).T), np.eye(6), atol=1e-5)


def test_a_folder_is_read_in_blocks_and_gives_the_same_projection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = make_features(make_values())
    folder = features.save(tmp_path / "features", rows_per_shard=70)
    monkeypatch.setattr(Features, "values", property(lambda self: pytest.fail("all rows are in memory")))
    from_folder = Projection.fit(folder, 3)
    monkeypatch.undo()
    in_memory = Projection.fit(features, 3)
    np.testing.assert_allclose(from_folder.components, in_memory.components, atol=1e-9)
    assert from_folder.fitted_on["rows"] == 300 and from_folder.fitted_on["model"] == META["model"]


def test_a_saved_projection_is_the_same_to_the_bit(tmp_path: Path) -> None:
    values = make_values()
    projection = Projection.fit(make_features(values), 4, whiten=True)
    path = projection.save(tmp_path / "new" / "pca.safetensors")
    opened = Projection.open(path)
    np.testing.assert_array_equal(opened(values), projection(values))
    assert opened.facts == projection.facts and opened.whiten
    assert [file.name for file in path.parent.iterdir()] == ["pca.safetensors"]
    again = Projection.fit(make_features(values), 4, whiten=True).save(tmp_path / "b.safetensors")
    assert sha256(again) == sha256(path)
    with pytest.raises(FileExistsError, match="pca.safetensors' already exists"):
        projection.save(path)


def test_float16_features_are_projected_like_their_float32_values() -> None:
    values = make_values().astype(np.float16)
    projection = Projection.fit(values, 3)
    np.testing.assert_array_equal(projection(values), projection(values.astype(np.float32)))


def test_projected_features_keep_their_rows_and_say_by_what() -> None:
    values = make_values()
    errors = [{"id": 300, "path": "300.jpg", "reason": "truncated"}]
    labels = np.arange(300) % 2
    features = Features(values, range(300), ["x"] * 300, labels, ["cat", "dog"], errors, META)
    projection = Projection.fit(features, 2)
    projected = projection.apply(features)
    np.testing.assert_array_equal(projected.values, projection(values))
    assert projected.ids.tolist() == features.ids.tolist() and projected.labels.tolist() == labels.tolist()
    for name in ("paths", "classes", "errors"):
        assert getattr(projected, name) == getattr(features, name)
    assert projected.meta == {**META, "projection": projection.facts}
    assert projection.facts["name"] == "pca" and len(projection.facts["sha256"]) == 64
    with pytest.raises(ValueError, match="are projected already"):
        projection.apply(projected)


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_a_folder_is_projected_block_by_block_like_features_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(writer, "_ROW_GROUP_BYTES", 4 * 12 * 20)
    values = make_values().astype(np.float16)
    errors = [{"id": 300, "path": "300.jpg", "reason": "truncated"}]
    labels, extras = np.arange(300) % 3 - 1, {"width": [640] * 300}
    columns = {"layer3": values, "embedding": values[:, :2]}
    features = Features(columns, range(300), ["x"] * 300, labels, ["cat", "dog"], errors, META, extras)
    folder = features.save(tmp_path / "features", rows_per_shard=70)
    if layout == "npy":
        folder = convert(folder, tmp_path / "npy", to="npy")
    projection = Projection.fit(folder, 2)
    monkeypatch.setattr(Features, "values", property(lambda self: pytest.fail("all rows are in memory")))
    out = projection.apply_to_folder(folder, tmp_path / "out")
    monkeypatch.undo()
    expected, found = projection.apply(features), Features.open(out)
    np.testing.assert_array_equal(found.values, expected.values.astype(np.float16))
    assert found.columns == expected.columns == {"layer3": 2}
    np.testing.assert_array_equal(found.labels, expected.labels)
    for name in ("paths", "classes", "errors", "meta", "extras"):
        assert getattr(found, name) == getattr(expected, name)
    assert len(list(out.glob("*.parquet"))) == 5


def test_a_folder_that_cannot_be_projected_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    values = make_values()
    folder = make_features(values).save(tmp_path / "features")
    projection = Projection.fit(folder, 2)
    with pytest.raises(FileExistsError, match="features' already exists"):
        projection.apply_to_folder(folder, folder)
    empty = make_features(values[:0]).save(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty' has no rows"):
        projection.apply_to_folder(empty, tmp_path / "out")
    other = make_features(values, normalized=True).save(tmp_path / "other")
    with pytest.raises(ValueError, match="normalized False, but these have True"):
        projection.apply_to_folder(other, tmp_path / "out")
    small = make_features((values / 1e-3).clip(-6e4, 6e4).astype(np.float16)).save(tmp_path / "small")
    scale = Projection(projection.mean, projection.components, np.full(2, 1e-9), True, {})
    with pytest.raises(ValueError, match="beyond float16. Extract in float32"):
        scale.apply_to_folder(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_of_another_model_are_not_projected() -> None:
    values = make_values()
    projection = Projection.fit(make_features(values), 2)
    elsewhere = {"name": "there/r18", "weights_sha256": "ab"}
    assert (
        len(projection.apply(make_features(values, model=elsewhere))) == 300
    )  # the same model by other name
    with pytest.raises(ValueError, match="fitted on features with normalized False, but these have True"):
        projection.apply(make_features(values, normalized=True))
    with pytest.raises(ValueError, match="with model {'weights_sha256': 'ab'}, but these have .*'cd'"):
        projection.apply(make_features(values, model={"name": "here/r18", "weights_sha256": "cd"}))


def test_what_cannot_be_fitted_is_refused() -> None:
    values = make_values()
    for num_components in (0, 13):
        with pytest.raises(
            ValueError, match=f"num_components is {num_components}, but 300 rows of 12 features"
        ):
            Projection.fit(values, num_components)
    with pytest.raises(ValueError, match="5 rows of 12 features have at most 4 principal components"):
        Projection.fit(values[:5], 5)
    with pytest.raises(ValueError, match="but 0 rows of"):
        Projection.fit(values[:0], 1)
    flat = np.concatenate([values[:, :3], values[:, :3]], 1)
    assert Projection.fit(flat, 3).num_components == 3
    with pytest.raises(ValueError, match="vary in 3 directions only. Give 3 or fewer"):
        Projection.fit(flat, 4)
    with pytest.raises(ValueError, match="vary in 0 directions only"):
        Projection.fit(np.ones((9, 4), np.float32), 1)
    values[17, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        Projection.fit(values, 2)
    with pytest.raises(ValueError, match=r"shape \(3,\), but must be \(N, D\)"):
        Projection.fit(values[0, :3], 1)


def test_rows_of_another_width_are_refused() -> None:
    projection = Projection.fit(make_values(), 2)
    for wrong in (np.ones((3, 11)), np.ones(12)):
        with pytest.raises(ValueError, match=r"takes features \(n, 12\), but got"):
            projection(wrong)


def test_what_is_no_projection_is_refused_with_its_name(tmp_path: Path) -> None:
    projection = Projection.fit(make_values(), 2)
    with pytest.raises(ValueError, match="is a .safetensors file, not .*pca.npz"):
        projection.save(tmp_path / "pca.npz")
    path = projection.save(tmp_path / "pca.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors' does not exist"):
        Projection.open(tmp_path / "none.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for data in (b"", b"hello", whole[:-1], bytes(flipped), whole.replace(b"projection/1", b"projection/9")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="pca.safetensors' is no projection that can be read"):
            Projection.open(path)
