"""One small evaluation from images to results.json, and everything that must not go on silently."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.images import write_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

import mocohub
from mocohub.cli import main
from mocohub.evaluation import measure
from mocohub.evaluation.results import Result, Results, mean_interval
from mocohub.features.store import Features
from mocohub.files import read_json, sha256, write_json
from mocohub.probes.health import health
from mocohub.probes.knn import KNNProbe, wilson
from mocohub.probes.lowshot import low_shot

pytest.importorskip("matplotlib")
MODEL = "moco_tiny_cifar10"
SMALL = {"ks": (1, 5), "shots": (1, 2, 16), "draws": 3, "num_workers": 0, "progress": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Training and test images; class c is absent from the test."""
    folder = tmp_path_factory.mktemp("shapes")
    write_images(folder / "train", {"a": 12, "b": 12, "c": 8})
    write_images(folder / "val", {"a": 5, "b": 7}, seed=1)
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    mocohub.evaluate(MODEL, train=images / "train", val=images / "val", out=out, **SMALL)
    return out


@pytest.fixture
def again(images, finished, tmp_path):
    """Evaluate into a copy of the finished folder."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))

    def run(**changes):
        arguments = {"model": MODEL, "train": images / "train", "val": images / "val", **SMALL, **changes}
        return mocohub.evaluate(out=out, **arguments)

    run.out = out
    return run


def numbers(results):
    return {(r.metric, r.protocol): r.value for r in results.records}


def value(results, metric, start):
    (found,) = [r.value for r in results.records if r.metric == metric and r.protocol.startswith(start)]
    return found


def test_every_number_is_what_the_features_themselves_give(finished):
    results = Results.open(finished)
    train, val = (Features.open(finished / "features" / name) for name in ("train", "val"))
    probe = KNNProbe(k=32, temperature=0.07).fit(train.values, train.targets)
    assert value(results, "top-1 (%)", "weighted kNN, cosine, k = 32, T = 0.07") == round(
        100 * probe.score(val.values, val.targets), 2
    )
    units, others = (f.values / np.linalg.norm(f.values, axis=1, keepdims=True) for f in (val, train))
    aps = [
        average_precision_score(train.targets == target, others @ row)
        for row, target in zip(units, val.targets, strict=True)
    ]
    assert value(results, "mAP (%)", "retrieval") == pytest.approx(100 * np.mean(aps), abs=0.006)
    nearest = (units @ others.T).argmax(1)
    recall = 100 * np.mean(train.targets[nearest] == val.targets)
    assert value(results, "recall@1 (%)", "retrieval") == pytest.approx(recall, abs=0.006)
    expected = health(train.values, train.targets)
    assert value(results, "effective rank", "of at most 31") == pytest.approx(
        expected.effective_rank, rel=1e-5
    )
    assert value(results, "RankMe", "of at most 32") == pytest.approx(expected.rankme, rel=1e-5)


def test_alignment_is_of_the_test_images_and_their_mirror_images(images, finished):
    val = Features.open(finished / "features" / "val")
    from PIL import ImageOps

    loaded = mocohub.load(MODEL)
    pictures = [ImageOps.mirror(mocohub.list_images(images / "val").decode(int(i))) for i in val.ids]
    mirrored = mocohub.extract(loaded, pictures, dtype="float32", num_workers=0, progress=False)
    expected = health(val.values, views=(val.values, mirrored.values)).alignment
    results = Results.open(finished)
    assert value(results, "alignment", "image and its mirror image") == pytest.approx(expected, rel=1e-3)


def test_results_say_of_what_they_are_and_how_sure(finished):
    document = read_json(finished / "results.json")
    assert document["format"] == "mocohub-results/1"
    assert document["model"]["name"] == MODEL
    bundled = Path(mocohub.__file__).parent / "hub" / "bundled" / MODEL
    assert document["model"]["file_sha256"] == sha256(bundled / "model.safetensors")
    for name, rows in (("train", 32), ("val", 12)):
        features = document["features"][name]
        assert features["manifest_sha256"] == sha256(finished / "features" / name / "manifest.json")
        assert (features["rows"], features["errors"]) == (rows, 0)
        assert "Resize" in features["transform"]["text"] and features["columns"] == {"embedding": 128}
    assert {"mocohub", "torch", "scikit-learn"} <= document["versions"].keys()
    assert document["seconds"] > 0 and document["machine"] and document["started"]
    (command,) = document["commands"]
    assert command.startswith(f"mocohub evaluate {MODEL} --train ")
    for record in Results.open(finished).records:
        assert record.dataset.startswith("shapes") and record.split in ("train", "val") and record.num_images
        if record.metric.endswith("(%)"):
            low, high = record.interval
            assert 0 <= low <= record.value <= high <= 100 and record.interval_over
    headlines = [r.metric for r in Results.open(finished).records if r.headline]
    assert headlines == ["top-1 (%)", "top-1 (%)", "top-1 (%)", "recall@1 (%)", "mAP (%)"]


def test_low_shot_says_how_many_draws_and_what_is_left_out(finished):
    results = Results.open(finished)
    rows = [r for r in results.records if "per class" in r.protocol]
    assert [(r.n, r.num_images, len(r.settings["accuracies"])) for r in rows] == [(3, 12, 3)] * 4
    assert ["nearest class centroid by cosine" in r.protocol for r in rows] == [False, False, True, True]
    assert all(r.std is not None and r.interval_over == "draws of labels (Student's t)" for r in rows)
    assert results.document["notes"] == [
        "Low-shot with 16 labels, 1 %, 10 % was left out: the smallest class has 8."
    ]


def test_fractions_are_those_of_low_shot_and_need_a_whole_label_of_each_class(finished, tmp_path):
    folders = {name: finished / "features" / name for name in ("train", "val")}
    arguments = {**SMALL, "fractions": (0.5, 0.125, 0.12), "probes": ("lowshot",)}
    results = mocohub.evaluate(None, **folders, out=tmp_path, **arguments)
    train, val = (Features.open(folders[name]) for name in ("train", "val"))
    for estimator, what in (("logistic", "logistic regression"), ("centroid", "nearest class centroid")):
        points = low_shot(
            train.values, train.targets, val.values, val.targets,
            shots=(), fractions=(0.125, 0.5), draws=3, estimator=estimator,
        )  # fmt: skip
        rows = [
            r for r in results.records if "% of the labels of each class" in r.protocol and what in r.protocol
        ]
        assert [r.protocol.split(" %")[0] for r in rows] == ["12.5", "50"]
        for row, point in zip(rows, points, strict=True):
            assert row.settings["accuracies"] == [round(100 * share, 2) for share in point.accuracies]
            assert (row.value, row.std) == (round(100 * point.mean, 2), round(100 * point.std, 2))
            assert (row.n, row.interval_over) == (3, "draws of labels (Student's t)") and not row.headline
    assert results.document["notes"] == [
        "Low-shot with 16 labels, 12 % was left out: the smallest class has 8."
    ]
    page = results.page.read_text()
    assert "12.5 % of the labels of each class" in page and "Few labels" in page
    (command,) = results.document["commands"]
    assert "--fractions 0.12 0.125 0.5 --draws 3" in command


def test_without_numbers_that_the_data_allow_fractions_stand_alone(finished, tmp_path):
    folders = {name: finished / "features" / name for name in ("train", "val")}
    arguments = {**SMALL, "shots": (99,), "fractions": (0.25,), "probes": ("lowshot",)}
    results = mocohub.evaluate(None, **folders, out=tmp_path, **arguments)
    assert len(results.records) == 2 and "Few labels" in results.page.read_text()


def test_a_single_draw_has_the_interval_of_the_test_images(finished, tmp_path):
    folders = {name: finished / "features" / name for name in ("train", "val")}
    arguments = {**SMALL, "draws": 1, "fractions": (0.25,), "probes": ("lowshot",)}
    for record in mocohub.evaluate(None, **folders, out=tmp_path, **arguments).records:
        assert record.protocol.endswith("cached features, one draw")
        assert (record.n, record.std, record.interval_over) == (1, None, "test images (Wilson)")


def test_numpy_numbers_are_taken_and_the_command_repeats_the_evaluation(finished, tmp_path, monkeypatch):
    folders = {name: finished / "features" / name for name in ("train", "val")}
    results = mocohub.evaluate(
        None, **folders, out=tmp_path / "out", probes=("knn", "lowshot"), ks=np.array([3, 1]),
        temperatures=np.array([0.5]), shots=range(1, 3), fractions=(), draws=np.int64(2), ranks=(2,), seed=7,
        dataset="two words", page=False,
    )  # fmt: skip
    (command,) = results.document["commands"]
    words = shlex.split(command)[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert main([*words, "--no-page"]) == 0
    again = Results.open(tmp_path / "again")
    assert again.records == results.records
    assert [r.settings.get("seed") for r in again.records if "draws" in r.protocol] == [7] * 4


def test_what_saw_images_through_a_function_is_repeated_by_no_command(images, tmp_path):
    arguments = {"train": images / "train", "val": images / "val", "out": tmp_path, "probes": ("knn",)}
    results = mocohub.evaluate(MODEL, **arguments, transform=mocohub.transform(mocohub.load(MODEL)), **SMALL)
    assert results.document["commands"] == []


def test_test_images_that_are_training_images_are_counted(images, tmp_path):
    folders = {"train": images / "train", "val": images / "train"}
    arguments = {**SMALL, "probes": ("knn",), "layers": ("stage3", "stage4")}
    results = mocohub.evaluate(MODEL, **folders, out=tmp_path, **arguments)
    assert results.document["notes"] == [  # once, not for each layer
        "32 of 32 images of train have exactly the features of an image of train. If they are the same "
        "images, no accuracy here is one on new images."
    ]


def test_the_same_call_again_measures_nothing_and_changes_no_byte(again, monkeypatch):
    before = (again.out / "results.json").read_bytes(), (again.out / "index.html").read_bytes()

    def refuse(*_, **__):
        raise AssertionError("measured again")

    for probe in ("knn", "linear", "lowshot", "retrieval", "health"):
        monkeypatch.setattr(measure, probe, refuse)
    again()
    assert ((again.out / "results.json").read_bytes(), (again.out / "index.html").read_bytes()) == before


def test_an_evaluation_from_nothing_gives_the_same_values(images, finished, tmp_path):
    arguments = {"train": images / "train", "val": images / "val", **SMALL}
    assert numbers(mocohub.evaluate(MODEL, out=tmp_path / "new", **arguments)) == numbers(
        Results.open(finished)
    )


def test_what_was_cut_short_is_gone_on_with(images, finished, tmp_path, monkeypatch):
    arguments = {"train": images / "train", "val": images / "val", "out": tmp_path / "out", **SMALL}
    with monkeypatch.context() as patched:
        patched.setattr(measure, "retrieval", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mocohub.evaluate(MODEL, **arguments)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(measure, "lowshot", None)  # is not measured again
    assert numbers(mocohub.evaluate(MODEL, **arguments)) == numbers(Results.open(finished))


def test_other_settings_measure_that_probe_anew(again, monkeypatch):
    monkeypatch.setattr(measure, "lowshot", None)
    results = again(ks=(1, 3))
    (grid,) = [r.settings["grid"] for r in results.records if "grid" in r.settings]
    assert {k for k, _, _ in grid} == {1, 3, 32} and {t for _, t, _ in grid} == {0.02, 0.07, 0.1, 0.2, 0.5}


def test_some_probes_and_no_page(again):
    (again.out / "index.html").unlink()
    results = again(probes=("knn",), page=False)
    assert {r.metric for r in results.records} == {"top-1 (%)"} and not results.page.exists()


def test_finished_feature_folders_serve_instead_of_images(finished, tmp_path):
    folders = {name: finished / "features" / name for name in ("train", "val")}
    results = mocohub.evaluate(None, **folders, out=tmp_path, **SMALL)
    expected = numbers(Results.open(finished))
    found = numbers(results)
    assert expected.keys() - found.keys() == {
        ("alignment", "image and its mirror image, alpha = 2 (arXiv 2005.10242)")
    }
    assert all(found[key] == expected[key] for key in found)
    assert results.document["model"]["architecture"] == "resnet18_cifar"
    assert not (tmp_path / "features").exists()
    assert numbers(mocohub.evaluate(MODEL, **folders, out=tmp_path, **SMALL)) == found


def test_layers_are_evaluated_one_by_one(images, tmp_path):
    results = mocohub.evaluate(
        MODEL, train=images / "train", val=images / "val", out=tmp_path,
        probes=("knn", "health"), layers=("stage3", "stage4"), **SMALL,
    )  # fmt: skip
    protocols = [r.protocol for r in results.records if r.metric == "top-1 (%)"]
    assert protocols == [f"weighted kNN, cosine, k = 32, T = 0.07, layer stage{i}" for i in (3, 4)]
    assert "<h2>stage3</h2>" in results.page.read_text()


def test_the_linear_protocol_runs_on_the_images_when_asked(images, tmp_path):
    arguments = {"train": images / "train", "val": images / "val", "out": tmp_path, **SMALL}
    results = mocohub.evaluate(MODEL, probes=("knn",), linear_protocol="moco", epochs=1, **arguments)
    found = [r for r in results.records if "moco linear protocol" in r.protocol]
    assert found and found[0].headline and "changed: epochs 1" in found[0].protocol
    assert found[0].interval_over == "test images (Wilson)"
    assert list(found[0].interval) == [round(100 * p, 2) for p in wilson(found[0].value / 100, 12)]
    assert {p.name for p in tmp_path.iterdir()} >= {"linear-moco", "results.json", "index.html"}


def test_three_test_images_are_enough_and_say_how_little_they_tell(images, tmp_path):
    write_images(tmp_path / "val", {"a": 1, "b": 2}, seed=2)
    results = mocohub.evaluate(
        MODEL, train=images / "train", val=tmp_path / "val", out=tmp_path / "out", **SMALL
    )
    low, high = next(r.interval for r in results.records if r.metric == "top-1 (%)")
    assert high - low > 40
    assert next(r for r in results.records if r.metric == "top-1 (%)").num_images == 3


@pytest.mark.parametrize("without", ["train", "val"])
def test_without_labels_health_alone_is_measured_and_said(without, images, tmp_path, caplog):
    write_images(tmp_path / "flat", {".": 40})
    folders = {"train": images / "train", "val": images / "val", without: tmp_path / "flat"}
    results = mocohub.evaluate(MODEL, **folders, out=tmp_path / "out", **SMALL)
    note = f"{without} has no labels: only the health of the features was measured."
    assert results.document["notes"] == [note] and note in caplog.text
    assert note in results.page.read_text() and note in str(results)
    assert {r.metric for r in results.records} >= {"effective rank", "RankMe", "alignment"}
    assert not any(r.metric.endswith("(%)") for r in results.records)
    with pytest.raises(ValueError, match=f"{without} has no labels, but knn needs two or more classes"):
        mocohub.evaluate(MODEL, **folders, out=tmp_path / "new", probes=("knn", "health"), **SMALL)
    with pytest.raises(ValueError, match=f"{without} has no labels, but the linear protocol needs"):
        mocohub.evaluate(MODEL, **folders, out=tmp_path / "new", linear_protocol="moco", **SMALL)
    assert not (tmp_path / "new").exists()  # nothing was extracted


def test_one_class_alone_is_likewise_only_health(tmp_path):
    folders = {}
    for name, count in (("train", 40), ("val", 3)):
        write_images(tmp_path / name, {"a": count})
        rows = [f"{path},a" for path in sorted((tmp_path / name).rglob("*.png"))]
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,label", *rows]) + "\n")
        folders[name] = tmp_path / f"{name}.csv"
    results = mocohub.evaluate(MODEL, **folders, out=tmp_path / "out", **SMALL)
    assert results.document["notes"] == [
        "train has one class only: only the health of the features was measured."
    ]
    with pytest.raises(ValueError, match="train has one class only, but linear, retrieval needs"):
        mocohub.evaluate(MODEL, **folders, out=tmp_path / "new", probes=("linear", "retrieval"), **SMALL)
    assert not (tmp_path / "new").exists()


def test_images_without_label_or_features_are_left_out_and_counted(images, tmp_path):
    shutil.copytree(images / "val", tmp_path / "val")
    (tmp_path / "val" / "a" / "9999.png").write_bytes(b"no image")
    rows = [f"{path},{path.parent.name}" for path in sorted((tmp_path / "val").rglob("*.png"))]
    rows[0] = rows[0].rpartition(",")[0] + ","
    (tmp_path / "val.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    results = mocohub.evaluate(
        MODEL, train=images / "train", val=tmp_path / "val.csv", out=tmp_path / "out", **SMALL
    )
    assert results.document["notes"][:2] == [
        "1 of 13 images of val have no features; no number counts them.",
        "1 of 12 images of val have no label and were left out.",
    ]
    assert next(r for r in results.records if r.metric == "top-1 (%)").num_images == 11


def test_a_test_class_that_training_lacks_is_refused_before_anything_is_extracted(images, tmp_path):
    write_images(tmp_path / "val", {"a": 2, "zebra": 2})
    with pytest.raises(ValueError, match="1 classes of val are not in train: zebra"):
        mocohub.evaluate(MODEL, train=images / "train", val=tmp_path / "val", out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def other_features(folder, to, **changes):
    """Copy a feature folder whose features say that another model made them."""
    features = Features.open(folder)
    meta = {**features.meta, **changes}
    Features(features.values, features.ids, features.paths, features.labels, features.classes, (), meta).save(
        to
    )
    return to


def test_features_of_two_models_are_refused(finished, tmp_path):
    folder = finished / "features"
    other = other_features(folder / "val", tmp_path / "val", model={"weights_sha256": "ab" * 32})
    with pytest.raises(ValueError, match="not comparable: model .*abab"):
        mocohub.evaluate(None, train=folder / "train", val=other, out=tmp_path / "out", **SMALL)
    train = other_features(folder / "train", tmp_path / "train", model={"weights_sha256": "ab" * 32})
    with pytest.raises(ValueError, match="holds features of another model.*abab.*Omit the model"):
        mocohub.evaluate(MODEL, train=train, val=other, out=tmp_path / "out", **SMALL)


def test_a_damaged_shard_is_named(again):
    shard = again.out / "features" / "val" / "part-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="part-00000-of-00001.parquet' is damaged"):
        again()


def test_results_of_other_features_are_not_written_over(finished, again, tmp_path):
    other = other_features(finished / "features" / "val", tmp_path / "val", extra=1)
    with pytest.raises(ValueError, match="holds results of other features of val. Choose another --out"):
        again(val=other)


def test_layers_of_features_and_a_folder_of_something_else_are_refused(finished, tmp_path):
    folders = {part: finished / "features" / part for part in ("train", "val")}
    with pytest.raises(ValueError, match=r"layers=\('stage1',\) are chosen when features are extracted"):
        mocohub.evaluate(None, **folders, out=tmp_path / "out", layers=("stage1",))
    with pytest.raises(FileExistsError, match="train' already exists. Choose another --out"):
        mocohub.evaluate(None, **folders, out=folders["train"])
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="its extraction has not finished"):
        mocohub.evaluate(None, train=tmp_path, val=folders["val"], out=tmp_path / "out")


def test_another_model_in_the_same_folder_is_refused(again):
    with pytest.raises(ValueError, match="model"):
        again(model=mocohub.load(MODEL, in_chans=3).double().float().apply(_disturb))


def _disturb(module):
    if getattr(module, "weight", None) is not None:
        module.weight.data.mul_(1.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"probes": ("knm",)}, "Unknown probe 'knm'. Choose one of: knn"),
        ({"probes": ()}, "probes is empty"),
        ({"ks": (0,)}, r"ks is \[0\], but must be whole numbers, 1 or more"),
        ({"shots": ()}, r"shots is \[\]"),
        ({"draws": 0}, r"draws is \[0\]"),
        ({"ranks": (1.5,)}, r"ranks is \[1.5\]"),
        ({"temperatures": (0.0,)}, "temperatures is .* must be positive"),
        ({"temperatures": (float("inf"),)}, "temperatures is .* must be positive"),
        ({"fractions": (0.1, 1.0)}, r"fractions is \[0.1, 1.0\], but must be between 0 and 1"),
        ({"fractions": (float("nan"),)}, "fractions is .* must be between 0 and 1"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"device": "tpu"}, "device 'tpu' is not supported"),
        ({"epochs": 3}, "epochs=3 is of the linear protocol"),
        ({"linear_protocol": "mocov9"}, "Unknown protocol 'mocov9'"),
        ({"model": None, "linear_protocol": "moco"}, "trains on images"),
        ({"model": None}, "is no finished feature folder, and there is no model"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, message, images, tmp_path):
    given = {
        "model": MODEL,
        "train": images / "train",
        "val": images / "val",
        "out": tmp_path / "o",
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        mocohub.evaluate(**given)
    assert not (tmp_path / "o").exists()


def test_wilsons_interval_covers_what_it_should():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Brown, Cai and DasGupta 2001
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    random = np.random.default_rng(0)
    hits = sum(
        low <= 0.9 <= high for low, high in (wilson(random.binomial(50, 0.9) / 50, 50) for _ in range(2000))
    )
    assert 0.92 < hits / 2000 < 0.98


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).random(400)
    low, high = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-4)
    assert mean_interval(values[:1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="mocohub-results/9"), "has format 'mocohub-results/9'"),
        (lambda d: d.pop("features"), "does not say features"),
        (lambda d: d["results"][0].pop("protocol"), "lacks protocol"),
        (lambda d: d["results"][0].update(value=None), "lacks value"),
        (lambda d: d["results"][0].update(colour="red"), "a record that is none.*colour"),
        (lambda d: d["results"][0].update(interval=[101, 102]), "outside of its interval"),
    ],
)
def test_results_that_are_incomplete_are_refused(change, message, finished, tmp_path):
    document = read_json(finished / "results.json")
    change(document)
    write_json(tmp_path / "results.json", document)
    with pytest.raises(ValueError, match=message):
        Results.open(tmp_path)


def test_results_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json' does not exist"):
        Results.open(tmp_path)


def test_a_record_without_protocol_is_not_written(tmp_path):
    record = Result(dataset="d", split="val", num_images=3, metric="top-1 (%)", protocol="", value=1.0)
    keys = ("model", "features", "versions", "machine", "started", "seconds", "notes", "commands")
    with pytest.raises(ValueError, match="lacks protocol"):
        Results.write(tmp_path / "results.json", {**dict.fromkeys(keys), "results": [record.__dict__]})
    assert not (tmp_path / "results.json").exists()


def test_linear_equals_scikit_learn_with_the_penalty_that_was_chosen(finished):
    train, val = (Features.open(finished / "features" / name) for name in ("train", "val"))
    (record,) = [r for r in Results.open(finished).records if "best of 6 on held-out images" in r.protocol]
    assert len(record.settings["tried"]) == 6 and record.settings["C"] in {
        t["C"] for t in record.settings["tried"]
    }
    units = [f.values / np.linalg.norm(f.values, axis=1, keepdims=True) for f in (train, val)]
    regression = LogisticRegression(C=record.settings["C"], max_iter=1000).fit(units[0], train.targets)
    assert record.value == round(100 * regression.score(units[1], val.targets), 2)
    assert "cached features are not the paper's protocol" in record.protocol


def test_one_image_a_class_leaves_nothing_to_choose_a_penalty_by(images, tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    results = mocohub.evaluate(
        MODEL, train=tmp_path / "train", val=images / "val", out=tmp_path / "out", probes=("linear",), **SMALL
    )
    assert results.records[0].protocol.startswith("L2-normalised, logistic regression, C = 10, cached")


def test_the_verb_prints_the_table_and_where_it_is(images, finished, tmp_path, capsys):
    folders = [str(finished / "features" / name) for name in ("train", "val")]
    arguments = [
        "--train",
        folders[0],
        "--val",
        folders[1],
        "--out",
        str(tmp_path / "out"),
        "--probes",
        "knn",
    ]
    assert main(["evaluate", *arguments, "--no-page"]) == 0
    out = capsys.readouterr().out
    assert "weighted kNN, cosine, k = 32, T = 0.07" in out and out.endswith(
        f"{tmp_path / 'out' / 'results.json'}\n"
    )
    assert main(["evaluate", MODEL, *arguments, "--linear-protocol", "moco"]) == 2
    assert "trains on images" in capsys.readouterr().err


def test_the_verb_retrieval_ranks_by_class_or_by_a_list_of_objects(images, finished, tmp_path, capsys):
    val, train = (str(finished / "features" / name) for name in ("val", "train"))
    assert main(["retrieval", val, train, "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    expected = value(Results.open(finished), "mAP (%)", "retrieval")
    assert f"mAP (%)       {expected:6.2f}" in shown and "12 queries, 0 left out" in shown
    found = {r["metric"]: r for r in read_json(tmp_path / "r.json")}
    of_evaluate = {r.metric: r for r in Results.open(finished).records if "retrieval" in r.protocol}
    assert found["mAP (%)"]["value"] == expected
    assert found.keys() == of_evaluate.keys()
    assert all(found[name]["interval"] == list(of_evaluate[name].interval) for name in found)

    paths = Features.open(val).paths
    rows = [f"{path},thing {i // 2}" for i, path in enumerate(paths[:6])]  # three things, and distractors
    (tmp_path / "things.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    assert main(["retrieval", val, "--labels", str(tmp_path / "things.csv"), "--ranks", "1", "11"]) == 0
    shown = capsys.readouterr().out
    assert "recall@11 (%) 100.00" in shown and "6 queries, 6 left out (retrieval by label among 11" in shown


def test_the_verb_health_says_whether_features_collapsed(finished, tmp_path, capsys):
    folder = finished / "features" / "train"
    assert main(["health", str(folder), "--json", str(tmp_path / "h.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "h.json").read_text())
    assert shown.startswith(found["words"]) and len(found["singular_values"]) == 128
    assert found["effective_rank"] == pytest.approx(health(Features.open(folder)).effective_rank)
