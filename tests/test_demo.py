import json
from pathlib import Path

import pytest
from helpers.images import write_images

from mocohub.demo import demo
from mocohub.features.store import Features
from mocohub.hub.load import load

pytest.importorskip("matplotlib")
SMALL = ["model_args={'layers': [1, 1, 1, 1], 'stem_chs': 8, 'channels': [8, 8, 8, 8]}", "epochs=2"]


def test_the_demo_makes_a_run_features_numbers_a_model_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = demo(out=tmp_path / "out", overrides=[*SMALL, "epochs=1"], num_workers=0, draws=3)
    assert page.read_text(encoding="utf-8").count("data:image/") > 100
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["low_shot"]) == ["raw pixels", "untrained network", "MoCo"]
    assert [row["shots"] for row in results["low_shot"]["MoCo"]] == [1, 5, None]
    assert 0.55 < results["low_shot"]["raw pixels"][0]["mean"] < 0.75
    features = [Features.open(tmp_path / "out" / "features" / "moco" / split) for split in ("train", "val")]
    assert sum(map(len, features)) == 1797 and features[0].values.shape[1] == 8
    assert load(tmp_path / "out" / "model").num_features == 8
    assert "1442 images to train on, 355 to test" in capsys.readouterr().out


@pytest.mark.parametrize("labelled", [True, False])
def test_the_demo_takes_a_folder_of_ones_own(tmp_path: Path, labelled: bool) -> None:
    counts = {"a": 30, "b": 30} if labelled else {".": 60}
    images = write_images(tmp_path / "images", counts)
    page = demo(images, tmp_path / "out", recipe="moco_tiny_digits", overrides=SMALL, num_workers=0, draws=2)
    text = page.read_text(encoding="utf-8")
    assert "MoCo on images" in text and ("1 label per class" in text) == labelled
    recipe = json.loads((tmp_path / "out" / "run" / "run.json").read_text())["recipe"]
    assert recipe["queue_size"] == 32 and recipe["global_batch_size"] == 16  # shrunk to 48 images


def test_a_folder_that_is_split_is_used_as_it_is(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", {"a": 20, "b": 20})
    write_images(tmp_path / "images" / "val", {"a": 3, "b": 4}, seed=1)
    demo(
        tmp_path / "images",
        tmp_path / "out",
        recipe="moco_tiny_digits",
        overrides=SMALL,
        num_workers=0,
        draws=2,
    )
    assert len(Features.open(tmp_path / "out" / "features" / "moco" / "val")) == 7


def test_broken_images_are_left_out_of_the_numbers_and_listed(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"a": 60, "b": 60})
    (images / "a" / "0003.png").write_bytes(b"junk")
    demo(images, tmp_path / "out", recipe="moco_tiny_digits", overrides=SMALL, num_workers=0, draws=2)
    folders = [Features.open(tmp_path / "out" / "features" / "moco" / split) for split in ("train", "val")]
    assert sum(map(len, folders)) == 119
    assert [e["path"] for f in folders for e in f.errors] == ["a/0003.png"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 1, "b": 1}, "2 images are too few"),
        ({".": 12}, "fewer than one batch: global_batch_size is 16"),
    ],
)
def test_too_few_images_are_refused_before_training(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    images = write_images(tmp_path / "images", counts)
    with pytest.raises(ValueError, match=message):
        demo(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_images(tmp_path / "split" / "train", {"a": 20, "b": 20})
    write_images(tmp_path / "split" / "val", {"a": 3, "c": 3})
    for change, message in [
        (dict(license="apache2"), "Unknown license 'apache2'. Choose one of: apache-2.0"),
        (dict(draws=0), r"draws \(0\) must be at least 1"),
        (dict(data=tmp_path / "split"), r"classes that no training image has: \['c'\]"),
        (dict(recipe="moco_tiny_digit"), "Unknown recipe 'moco_tiny_digit'. Choose one of: moco_tiny_digits"),
        (dict(overrides=["epoch=1"]), "Unknown recipe field 'epoch'"),
        (dict(overrides=["queue_size=100000"]), r"queue_size \(100000\) must be smaller"),
    ]:
        with pytest.raises(ValueError, match=message):
            demo(**{"out": tmp_path / "out"} | change)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_moco_beats_pixels_and_the_untrained_network_where_labels_are_few(tmp_path: Path) -> None:
    demo(out=tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())["low_shot"]
    moco = results["MoCo"]
    for rival in ("raw pixels", "untrained network"):
        assert moco[0]["mean"] - results[rival][0]["mean"] >= 0.08
        assert moco[0]["mean"] - moco[0]["std"] > results[rival][0]["mean"]
        assert moco[1]["mean"] - moco[1]["std"] > results[rival][1]["mean"]
