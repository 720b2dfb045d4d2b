"""manifest.schema.json fits every manifest there is, and no damaged one."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

from mocohub.features.formats import convert, merge
from mocohub.features.projection import Projection
from mocohub.features.store import Features
from mocohub.features.verify import schema, verify
from mocohub.files import read_json, write_json
from tests.helpers.images import write_images

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every format, from an extraction, from memory, and merged."""
    import mocohub

    place = tmp_path_factory.mktemp("folders")
    photos = write_images(place / "photos", {"cat": 3, "dog": 2}, size_px=32)
    (photos / "cat" / "broken.png").write_bytes(b"no image")
    options = {"num_workers": 0, "progress": False, "dtype": "float32"}
    model = "moco_tiny_cifar10"
    mocohub.extract(model, photos, out=place / "extracted", content_hash=True, **options)
    layers = ["stage1", "embedding"]
    mocohub.extract(model, photos, out=place / "layers", layers=layers, rows_per_shard=2, **options)
    features = Features.open(place / "extracted")
    projection = Projection.fit(features, 2, whiten=True)
    mocohub.extract(model, photos, out=place / "projected", projection=projection, **options)
    values = np.zeros((2, 12), np.float16)
    maps = Features({"a": values, "b": values}, [0, 1], ["x", "y"], shapes={"a": [3, 2, 2]})
    maps.save(place / "maps")
    for name in ("extracted", "layers", "maps"):
        for to in ("npy", "safetensors"):
            convert(place / name, place / f"{name}-{to}", to=to)
    merge([place / "layers", place / "layers-npy"], place / "merged")
    return {path.name: path for path in place.iterdir() if path != photos}


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_it_fits_every_manifest(folders: dict[str, Path]) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    formats = set()
    for folder in folders.values():
        manifest = read_json(folder / "manifest.json")
        validator.validate(manifest)
        formats.add(manifest["format"])
        assert sum(verify(folder)) == manifest["num_inputs"]
    assert formats == set(schema()["properties"]["format"]["enum"])


def test_every_fact_of_a_manifest_is_described(folders: dict[str, Path]) -> None:
    described = schema()["properties"]
    for folder in folders.values():
        manifest = read_json(folder / "manifest.json")
        assert manifest.keys() <= described.keys()
        assert manifest["meta"].keys() <= described["meta"]["properties"].keys()


def damaged(manifest: dict) -> list[dict]:
    """A fact missing, of another type, or what no version has; for each fact and each of a shard."""
    found = []
    for name in manifest:
        without = copy.deepcopy(manifest)
        del without[name]
        optional = ["errors_sha256"] + (["columns"] if manifest["format"].endswith("/1") else [])
        if name not in optional:
            found.append(without)
        found.append({**copy.deepcopy(manifest), name: 1.5})
    for name in manifest["shards"][0]:
        without = copy.deepcopy(manifest)
        del without["shards"][0][name]
        found.append(without)
        wrong = copy.deepcopy(manifest)
        wrong["shards"][0][name] = "../part-00000-of-00001.parquet"
        found.append(wrong)
    is_parquet = manifest["format"].startswith("mocohub-features/")
    found += [
        {**manifest, "shards": []},
        {**manifest, "rows": -1},
        {**manifest, "shapes": {}},
        {**manifest, "colums": {"embedding": 3}},
        {**manifest, "dtype": "float64"},
        {**manifest, "format": "mocohub-features-csv/1"},
        {**manifest, "format": "mocohub-features-npy/1" if is_parquet else "mocohub-features/3"},
        {**manifest, "meta": {**manifest["meta"], "normalized": "no"}},
    ]
    return found


@pytest.mark.parametrize("name", ["extracted", "layers-npy", "layers-safetensors", "maps", "maps-npy"])
def test_it_fits_no_damaged_manifest(folders: dict[str, Path], name: str) -> None:
    manifest = read_json(folders[name] / "manifest.json")
    validator = jsonschema.Draft202012Validator(schema())
    cases = damaged(manifest)
    assert len(cases) > 25
    for case in cases:
        assert not validator.is_valid(case), case


def test_verify_says_where_a_manifest_does_not_fit(folders: dict[str, Path], monkeypatch) -> None:
    path = folders["projected"] / "manifest.json"
    manifest = read_json(path)
    write_json(path, {**manifest, "meta": {**manifest["meta"], "flip": "perhaps"}})
    try:
        with pytest.raises(ValueError, match=r"manifest.json' does not fit .*at \$.meta.flip, 'perhaps'"):
            verify(folders["projected"])
        monkeypatch.setitem(sys.modules, "jsonschema", None)  # without the package the shard itself tells
        with pytest.raises(ValueError, match="belongs to another extraction"):
            verify(folders["projected"])
    finally:
        write_json(path, manifest)
