import dataclasses
import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

from mocohub.cli import main
from mocohub.features.store import Features
from mocohub.probes.lowshot import ESTIMATORS, CentroidProbe, low_shot

Y = np.repeat([0, 1, 2], [6, 9, 12])
X = np.arange(27.0)[:, None]  # the only feature of a row is its number


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):  # more only wait for each other in problems as small as these
        yield


class Recorder(ClassifierMixin, BaseEstimator):
    """A constant classifier that notes which rows it was trained on."""

    seen = []

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.seen.append(X[:, 0].astype(int).tolist())
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


@pytest.fixture
def rows_drawn(monkeypatch):
    def drawn(shots, y=Y, **kwargs):
        monkeypatch.setattr(Recorder, "seen", [])
        low_shot(X, y, X, y, shots=(shots,), estimator=Recorder(), **kwargs)
        return Recorder.seen

    return drawn


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X / 16, y, test_size=0.2, stratify=y, random_state=0)
    return X_train, y_train, X_test, y_test


def test_each_draw_takes_that_many_different_images_of_every_class(rows_drawn):
    draws = rows_drawn(4, draws=30)
    assert len(draws) == 30
    for rows in draws:
        assert len(set(rows)) == 12
        assert np.bincount(Y[rows]).tolist() == [4, 4, 4]


def test_every_image_can_be_drawn_and_draws_differ(rows_drawn):
    draws = rows_drawn(1, draws=200)
    assert set(np.concatenate(draws)) == set(range(27))
    assert len({tuple(rows) for rows in draws}) > 150  # of 6 * 9 * 12 = 648 possible ones


def test_a_draw_of_more_labels_contains_the_draw_of_fewer(rows_drawn):
    for few, many in zip(rows_drawn(2), rows_drawn(5), strict=True):
        assert set(few) < set(many)


def test_draws_follow_from_the_labels_and_the_seed_alone(rows_drawn):
    first = rows_drawn(3)
    np.random.seed(7)  # noqa: NPY002
    assert rows_drawn(3) == first
    assert rows_drawn(3, y=np.array(["ant", "bee", "cow"])[Y]) == first
    assert rows_drawn(3, seed=1) != first
    assert rows_drawn(3, draws=40)[:20] == first


def test_all_labels_are_one_draw_of_everything_in_order(rows_drawn):
    assert rows_drawn(None) == [list(range(27))]


def test_features_that_say_the_same_in_another_order_get_equal_accuracies(digits):
    X_train, y_train, X_test, y_test = digits
    order = np.random.default_rng(0).permutation(X_train.shape[1])
    nearest = KNeighborsClassifier(n_neighbors=1)
    one = low_shot(X_train, y_train, X_test, y_test, draws=5, estimator=nearest)
    other = low_shot(X_train[:, order], y_train, X_test[:, order], y_test, draws=5, estimator=nearest)
    assert [result.accuracies for result in one] == [result.accuracies for result in other]


def test_the_summary_is_that_of_the_accuracies():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((27, 2))
    few, all_labels = low_shot(features, Y, features, Y, shots=(2, None), draws=5)
    assert (few.shots, few.num_draws, len(few.accuracies)) == (2, 5, 5)
    assert few.mean == pytest.approx(np.mean(few.accuracies))
    assert few.std == pytest.approx(statistics.stdev(few.accuracies))
    half = 2.776 * few.std / 5**0.5  # Student's t for 95 % and 4 degrees of freedom, from a printed table
    assert few.interval == pytest.approx((few.mean - half, few.mean + half), abs=1e-4)
    assert (all_labels.shots, all_labels.num_draws) == (None, 1)
    assert all_labels.accuracies == (all_labels.mean,)
    assert all_labels.std is None and all_labels.interval is None


def test_an_interval_of_shares_ends_at_0_and_1():
    features = np.random.default_rng(0).standard_normal((27, 2))
    (result,) = low_shot(features, Y, features, Y, shots=(1,), draws=2)
    assert result.std * 12.7 / 2**0.5 > 1  # Student's t for 1 degree of freedom
    assert result.interval == (0.0, 1.0)


def test_results_are_frozen_and_can_be_written_as_json():
    result = low_shot(X, Y, X, Y, shots=(None,), estimator=Recorder())[0]
    assert json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))["mean"] == 6 / 27
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mean = 1.0


def test_the_default_is_logistic_regression_on_features_of_length_1(digits):
    X_train, y_train, X_test, y_test = digits
    (result,) = low_shot(X_train, y_train, X_test, y_test, shots=(None,))
    expected = LogisticRegression(C=10, max_iter=1000).fit(normalize(X_train), y_train)
    assert result.mean == pytest.approx(expected.score(normalize(X_test), y_test), abs=0.003)  # one image


def test_digits_reach_the_accuracies_of_raw_pixels(digits):
    one, five, all_labels = low_shot(*digits)
    assert 0.58 < one.mean < 0.70
    assert 0.82 < five.mean < 0.90
    assert 0.95 < all_labels.mean < 0.98


def test_tensors_and_half_precision_are_taken(digits):
    X_train, y_train, X_test, y_test = digits  # sixteenths: exact in float16
    expected = low_shot(X_train.astype(np.float32), y_train, X_test.astype(np.float32), y_test, draws=2)
    tensors = [torch.tensor(part) for part in (X_train, y_train, X_test, y_test)]
    assert low_shot(tensors[0].half(), tensors[1], tensors[2].half(), tensors[3], draws=2) == expected


def test_classes_may_be_absent_from_the_test_set():
    assert low_shot(X, Y, X[:6], Y[:6], shots=(1,), estimator=Recorder())[0].mean == 1.0


def test_more_shots_than_a_class_has_are_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(Recorder, "seen", [])
    with pytest.raises(ValueError, match="shots=7, but class 0 has 6 labelled images. Ask for 6 at most"):
        low_shot(X, Y, X, Y, shots=(1, 7), estimator=Recorder())
    assert Recorder.seen == []


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"shots": (0,)}, "shots=0 must"),
        ({"shots": (1.5,)}, "shots=1.5 must be whole labels a class"),
        ({"shots": ()}, "shots and fractions are both empty"),
        ({"draws": 0}, "draws=0 must"),
        ({"draws": 2.5}, "draws=2.5 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
    ],
)
def test_fewer_than_one_shot_or_draw_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        low_shot(X, Y, X, Y, **setting)


def test_test_images_of_an_unknown_class_are_refused():
    with pytest.raises(ValueError, match=r"y_test has classes that y_train lacks: \[8, 9\]"):
        low_shot(X, Y, X[:3], [0, 9, 8])


def test_features_of_two_widths_are_refused():
    with pytest.raises(ValueError, match="X_train is 1 wide and X_test 2: extract both with the same model"):
        low_shot(X, Y, np.ones((3, 2)), [0, 1, 2])


def test_labels_that_are_missing_or_too_few_are_refused():
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[27, 20\]"):
        low_shot(X, Y[:20], X, Y)
    with pytest.raises(ValueError, match="27 of 27 labels are None"):
        low_shot(X, [None] * 27, X, Y)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="27 of 27 rows hold NaN or inf"):
        low_shot(X, Y, X * np.nan, Y)


def test_draws_are_those_they_have_always_been(rows_drawn):
    order = np.random.default_rng([0, 0]).permutation(27)
    expected = [row for label in range(3) for row in [r for r in order if Y[r] == label][:2]]
    assert rows_drawn(2)[0] == expected
    assert rows_drawn(1)[0] == expected[::2]


def test_a_fraction_is_that_share_of_every_class_and_at_least_one(monkeypatch):
    y = np.repeat([0, 1, 2], [50, 20, 3])
    features = np.arange(73.0)[:, None]
    monkeypatch.setattr(Recorder, "seen", [])
    one, ten, some = low_shot(
        features, y, features, y, shots=(1,), fractions=(0.01, 0.1, 0.5), draws=3, estimator=Recorder()
    )[1:]
    assert [result.fraction for result in (one, ten, some)] == [0.01, 0.1, 0.5]
    assert [(result.shots, result.num_draws) for result in (one, ten, some)] == [(None, 3)] * 3
    assert [np.bincount(y[rows]).tolist() for rows in Recorder.seen[::3]] == [
        [1, 1, 1],
        [1, 1, 1],
        [5, 2, 1],
        [25, 10, 2],
    ]
    for draw in range(3):  # the rows of a smaller share are among those of a larger
        shot, hundredth, tenth, half = (set(Recorder.seen[3 * entry + draw]) for entry in range(4))
        assert shot == hundredth and hundredth < tenth < half


@parametrize_with_checks([CentroidProbe()])
def test_the_centroid_probe_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_nearest_centroid_is_that_of_a_slow_loop(digits, num_classes):
    X_train, y_train, X_test, _ = digits
    few = y_train < num_classes
    probe = CentroidProbe().fit(X_train[few], y_train[few])
    for row, predicted in zip(X_test[:40], probe.predict(X_test[:40]), strict=True):
        cosines = []
        for label in range(num_classes):
            unit = [x / np.sqrt((x * x).sum()) for x in X_train[y_train == label]]
            mean = sum(unit) / len(unit)
            cosines.append(row @ mean / np.sqrt((row @ row) * (mean @ mean)))
        assert predicted == int(np.argmax(cosines))


def test_estimators_are_called_by_name(digits):
    X_train, y_train, X_test, y_test = digits
    settings = {"shots": (4,), "draws": 2}
    default = low_shot(*digits, **settings)
    assert low_shot(*digits, estimator="logistic", **settings) == default
    by_name = {name: low_shot(*digits, estimator=name, **settings)[0] for name in ESTIMATORS}
    assert by_name["centroid"] == low_shot(*digits, estimator=CentroidProbe(), **settings)[0]
    svm = LinearSVC(random_state=0)
    units = [normalize(X_train), y_train, normalize(X_test), y_test]
    assert by_name["svm"] == low_shot(*units, estimator=svm, **settings)[0]
    assert all(0.6 < result.mean < 0.95 for result in by_name.values())
    with pytest.raises(ValueError, match="Unknown estimator 'svn'. Choose one of: svm, "):
        low_shot(*digits, estimator="svn")


def test_constant_features_are_no_better_than_a_guess():
    for name in ESTIMATORS:
        (result,) = low_shot(np.ones((27, 2)), Y, np.ones((27, 2)), Y, shots=(2,), draws=2, estimator=name)
        assert result.mean in (6 / 27, 9 / 27, 12 / 27)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 10])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction {fraction} must be between 0 and 1"):
        low_shot(X, Y, X, Y, fractions=(0.1, fraction))


@pytest.fixture
def folders(tmp_path, digits):
    X_train, y_train, X_test, y_test = digits
    classes = [f"digit {number}" for number in range(10)]
    for name, values, labels in (("train", X_train, y_train), ("val", X_test, y_test)):
        paths = [f"{row}.png" for row in range(len(labels))]
        features = Features(values.astype(np.float32), range(len(labels)), paths, labels, classes)
        features.save(tmp_path / name)
    return str(tmp_path / "train"), str(tmp_path / "val")


def test_the_verb_prints_a_table_and_records_mean_and_spread(folders, digits, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    settings = ["--shots", "1", "4", "--fractions", "0.1", "--draws", "3", "--estimator", "centroid"]
    assert main(["lowshot", *folders, *settings, "--json", str(numbers)]) == 0
    X_train, y_train, X_test, y_test = digits
    X_train, X_test = X_train.astype(np.float32), X_test.astype(np.float32)
    expected = low_shot(
        X_train, y_train, X_test, y_test, shots=(1, 4), fractions=(0.1,), draws=3, estimator="centroid"
    )
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert "nearest class centroid by cosine" in head and "360 images" in head and "3 draws" in head
    for row, result in zip(rows, expected, strict=True):
        numbers_in_row = [
            f"{100 * result.mean:.2f}",
            f"{100 * result.std:.2f}",
            f"{100 * result.interval[0]:.2f}",
        ]
        assert row.split()[-5:-2] == numbers_in_row
    assert [row.split()[0] for row in rows] == ["1", "4", "10"]
    records = json.loads(numbers.read_text())
    assert [record["value"] for record in records] == [round(100 * result.mean, 2) for result in expected]
    assert [record["std"] for record in records] == [round(100 * result.std, 2) for result in expected]
    assert records[2]["protocol"].startswith("10 % labels of a class, nearest class centroid")


def test_the_linear_verb_takes_several_settings_and_says_which_it_took(folders, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    settings = ["--solver", "sgd", "--lr", "0.01", "10", "--weight-decay", "0", "1e-4", "--epochs", "3"]
    assert main(["linear", *folders, *settings, "--precision", "bfloat16"]) == 0
    assert "products in bfloat16" in capsys.readouterr().out
    assert main(["linear", *folders, *settings, "--json", str(numbers)]) == 0
    assert main(["linear", *folders, "--C", "0.001", "1", "--json", str(numbers)]) == 0
    assert "360 images (linear, SGD lr 10 x batch / 256" in capsys.readouterr().out
    sgd, lbfgs = (record["protocol"] for record in json.loads(numbers.read_text()))
    assert "(best of 4 on held-out images)" in sgd and "(best of 2 on held-out images)" in lbfgs
    assert all(text.endswith("cached features are not the paper's protocol") for text in (sgd, lbfgs))


@pytest.mark.parametrize("verb", [["knn"], ["linear"], ["lowshot"], ["retrieval"], ["svm", "--voc", "voc"]])
def test_a_file_that_cannot_collect_results_is_refused_before_anything_is_read(verb, tmp_path, capsys):
    other = tmp_path / "manifest.json"
    other.write_text('{"format": "another"}')
    assert main([*verb, "nowhere", "nowhere", "--json", str(other)]) == 2
    assert "manifest.json is there and holds no list of results. Choose another" in capsys.readouterr().err
    assert other.read_text() == '{"format": "another"}'
    assert main([*verb, "nowhere", "nowhere", "--json", str(tmp_path / "lost" / "x.json")]) == 2
    assert "lost'. Make it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--lr", "3"], "--lr is for --solver sgd"),
        (["--batch-size", "64"], "--batch-size is for --solver sgd"),
        (["--precision", "bfloat16"], "--precision is for --solver sgd"),
        (["--solver", "sgd", "--C", "3"], "--C is for --solver lbfgs"),
        (["--C"], r"C=() must be positive"),
    ],
)
def test_settings_of_the_other_solver_are_refused(settings, message, folders, capsys):
    assert main(["linear", *folders, *settings]) == 2
    assert message in capsys.readouterr().err


def test_a_warning_is_one_line_without_code(folders):
    command = [sys.executable, "-m", "mocohub", "knn", *folders, "--k", "5000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("top-1 ")
    (line,) = (line for line in done.stderr.splitlines() if "k=5000" in line)  # others may have lines too
    assert re.fullmatch(r"mocohub: k=5000, but there are only \d+ training images: all vote.", line)
    assert "warnings.warn" not in done.stderr


def test_the_linear_verb_refuses_test_images_of_other_classes_and_images_where_features_are(folders, capsys):
    train, val = folders
    features = Features.open(val)
    names = [f"other {name}" for name in features.classes]
    Features(features.values, features.ids, features.paths, features.labels, names).save(f"{val}-other")
    assert main(["linear", train, f"{val}-other"]) == 2
    assert "is a training class" in capsys.readouterr().err
    assert main(["linear", train, val, "--protocol", "moco", "--model", "m", "--out", "run"]) == 2
    assert "is a feature folder, but --protocol moco trains on images" in capsys.readouterr().err
    assert main(["linear", ".", ".", "--protocol", "moco", "--model", "m", "--out", "run"]) == 2
    assert "'.' would be tested on what it has learned from" in capsys.readouterr().err
