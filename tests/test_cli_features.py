"""`mocohub extract` and `mocohub features`: what they print and refuse."""

import dataclasses

import numpy as np
import pytest
from helpers.recipes import smallest
from safetensors.torch import save_file

import mocohub
from mocohub.backbones import create_backbone, pretrained_cfg
from mocohub.cli import main
from mocohub.cli.features import extract
from mocohub.cli.features import features_ as features
from mocohub.features.store import Features
from mocohub.files import read_json, sha256, write_json
from mocohub.pretrain.loop import train
from tests.helpers.images import write_images


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(create_backbone("r18tiny").state_dict(), folder / "model.safetensors")
    args = {"stem_chs": 16, "channels": [16, 32, 64, 128]}
    cfg = pretrained_cfg("r18tiny", crop_px=32, crop_pct=1.0)
    config = {"architecture": "resnet18_cifar", "num_classes": 0, "model_args": args, "pretrained_cfg": cfg}
    write_json(folder / "config.json", config)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    return str(write_images(tmp_path / "photos", {"cat": 5, "dog": 4}, size_px=32))


def test_plan_workers_info_verify_convert_merge(model, photos, tmp_path, capsys):
    out = str(tmp_path / "features")
    options = {"data": photos, "out": out, "rows_per_shard": 4, "workers": 0, "dtype": "float32"}
    extract(model, plan=True, layers=("stage1", "embedding"), **options)
    assert read_json(f"{out}/plan.json")["num_shards"] == 3
    for i in (1, 0):
        features("info", (out,))
        assert f"shards done         {1 - i} of 3" in capsys.readouterr().out
        extract(model, shard=f"{i}/2", layers=("stage1", "embedding"), **options)
    assert "features: Features(9 x 16, embedding: 128 float32, 0 errors)" in capsys.readouterr().out
    features("info", (out,))
    assert "columns             stage1 (16 float32), embedding (128 float32)" in capsys.readouterr().out
    features("verify", (out,))
    assert "9 rows and 0 errors are as written" in capsys.readouterr().out

    features("convert", (out,), out=f"{out}-npy", to="npy")
    features("verify", (f"{out}-npy",))
    features("merge", (out, out), out=f"{out}-twice")
    features("verify", (f"{out}-twice",))
    assert "18 rows" in capsys.readouterr().out
    assert len(Features.open(f"{out}-twice")) == 18


def test_maps_crops_and_the_contrastive_embedding_from_the_command_line(photos, tmp_path, capsys):
    recipe = dataclasses.replace(smallest(epochs=1), embed_dim=24, queue_size=4)
    run = str(train(recipe, photos, tmp_path / "run", num_workers=0, precision="float32"))
    common = ["--data", photos, "--workers", "0", "--dtype", "float32"]
    maps, crops = str(tmp_path / "maps"), str(tmp_path / "crops")
    code = main(
        ["extract", run, "--out", maps, "--pool", "none", "--layers", "stage4", "embedding:avg", *common]
    )
    assert not code
    found = Features.open(maps)
    assert found.maps("stage4").shape == (9, 8, 2, 2)
    features("info", (maps,))
    assert "stage4 (8 x 2 x 2 float32), embedding (8 float32)" in capsys.readouterr().out
    np.testing.assert_allclose(found.maps("stage4").mean((2, 3)), found["embedding"], rtol=1e-5, atol=1e-6)
    code = main(
        ["extract", run, "--out", crops, "--crops", "5", "--layers", "stage4:max", "contrastive", *common]
    )
    assert not code
    found = Features.open(crops)
    assert found.columns == {"stage4": 8, "contrastive": 24} and found.meta["crops"] == 5
    assert main(["extract", run, "--out", maps + "2", "--pool", "none", "--normalize", *common])
    assert "normalize is for vectors, but pool='none' gives maps of embedding" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_the_finished_folder_has_the_format_asked_for_and_is_found_finished(
    model, photos, tmp_path, capsys, format
):
    plain, out = tmp_path / "plain", tmp_path / "out"
    options = {"data": photos, "rows_per_shard": 4, "workers": 0, "dtype": "float32"}
    extract(model, out=str(plain), **options)
    extract(model, out=str(out), format=format, shard="0/2", **options)
    assert list(out.glob("part-*.parquet"))  # a share is not the whole
    extract(model, out=str(out), format=format, shard="1/2", **options)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert not list(out.glob("part-0000?-of-0000?.parquet"))
    features("info", (str(out),))
    assert f"features ({format})" in capsys.readouterr().out
    features("verify", (str(out),))
    for again in (format, None):
        extract(model, out=str(out), format=again, **options)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files
    np.testing.assert_array_equal(Features.open(out).values, Features.open(plain).values)
    extract(model, out=str(out), format="parquet", **options)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (out, plain)]
    assert contents[0] == contents[1]


def test_a_format_that_cannot_be_met_is_refused_before_anything_is_computed(photos, tmp_path):
    with pytest.raises(ValueError, match="Unknown format 'csv'. Choose one of: parquet, npy, safetensors"):
        mocohub.extract("nowhere", photos, out=tmp_path / "out", format="csv")
    with pytest.raises(ValueError, match="format='npy' needs out="):
        mocohub.extract("nowhere", photos, format="npy")
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_flipped_bit_and_an_id_in_two_places(model, photos, tmp_path):
    out = tmp_path / "features"
    extract(model, data=photos, out=str(out), workers=0)
    shard = out / "part-00000-of-00001.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(ValueError, match="part-00000-of-00001.parquet' is damaged"):
        features("verify", (str(out),))
    shard.write_bytes(good)
    (out / "errors.jsonl").write_text('{"id": 0, "path": "x", "reason": "y"}\n')
    changes = {"errors": 1, "num_inputs": 10, "errors_sha256": sha256(out / "errors.jsonl")}
    write_json(out / "manifest.json", {**read_json(out / "manifest.json"), **changes})
    with pytest.raises(ValueError, match="has 10 rows and errors for 10 inputs, or one twice"):
        features("verify", (str(out),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", ()), "verify takes one feature folder, but got 0"),
        (("convert", ("a", "b")), "convert takes one feature folder, but got 2"),
        (("info", ("a",), "out"), "info does not take --out: omit it"),
        (("merge", ("a", "b")), "merge needs --out"),
        (("merge", ("a", "b"), "out", "npy"), "merge does not take --to: omit it"),
        (("convert", ("a",), "out"), "convert needs --to"),
        (("project", ("a",), "out"), "project needs --components"),
        (("apply", ("a",), "out", None, 3), "apply does not take --components"),
        (("apply", ("a",), "out"), "apply needs --projection"),
        (("apply", ("a",), "out", None, None, True), "apply does not take --whiten"),
        (("info", ("nowhere",)), "'nowhere' is not a feature folder"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    action, folders, *rest = arguments
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        features(action, folders, **dict(zip(("out", "to", "components", "whiten"), rest, strict=False)))


def test_project_and_apply_are_an_extraction_with_that_projection(model, photos, tmp_path, capsys):
    options = {"data": photos, "workers": 0, "dtype": "float32", "rows_per_shard": 4}
    extract(model, out=str(tmp_path / "plain"), **options)
    pca = str(tmp_path / "pca.safetensors")
    features("project", (str(tmp_path / "plain"),), out=pca, components=3, whiten=True)
    assert "pca.safetensors: 3 components of 128, " in capsys.readouterr().out
    features("apply", (str(tmp_path / "plain"),), out=str(tmp_path / "applied"), projection=pca)
    features("verify", (str(tmp_path / "applied"),))
    extract(model, out=str(tmp_path / "extracted"), projection=pca, **options)
    applied, extracted = (Features.open(tmp_path / name) for name in ("applied", "extracted"))
    assert applied.columns == {"embedding": 3} and applied.meta == extracted.meta
    np.testing.assert_allclose(applied.values, extracted.values, atol=1e-5)
    for name in ("paths", "classes", "extras"):
        assert getattr(applied, name) == getattr(extracted, name)
    assert applied.meta["projection"]["whiten"] and len(applied.meta["projection"]["sha256"]) == 64
    with pytest.raises(ValueError, match="are projected already"):
        features("apply", (str(tmp_path / "applied"),), out=str(tmp_path / "twice"), projection=pca)


def test_info_names_a_plan_of_something_else(tmp_path):
    (tmp_path / "plan.json").write_text('{"terraform_version": "1.9"}')
    with pytest.raises(ValueError, match="plan.json' is not the plan of an extraction"):
        features("info", (str(tmp_path),))
