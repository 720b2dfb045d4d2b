import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from mocohub.cli import main
from mocohub.features.store import Features
from mocohub.probes.svm import COSTS, MultiLabelSVM, average_precision

FEW_COSTS = (1e-3, 0.1, 10.0)


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def images(num=90, width=8, num_classes=3, difficult=0.0, seed=0):
    """Features and labels of images that show any number of classes."""
    rng = np.random.default_rng(seed)
    shown = rng.random((num, num_classes)) < 0.35
    shown[:6], shown[6:12] = True, False
    directions = np.random.default_rng(7).standard_normal((num_classes, width))
    X = shown @ directions + rng.standard_normal((num, width)) + 0.5
    Y = np.where(shown, 1, -1)
    return X, np.where(rng.random(Y.shape) < difficult, 0, Y)


def slow_precisions(labels, scores):
    """(recall, precision) at every threshold, by counting."""
    kept = [(score, label) for score, label in zip(scores, labels, strict=True) if label != 0]
    all_present = sum(label == 1 for _, label in kept)
    curve = []
    for threshold in sorted({score for score, _ in kept}):
        above = [label for score, label in kept if score >= threshold]
        true = sum(label == 1 for label in above)
        curve.append((true, all_present, true / len(above)))
    return curve


def slow_11_points(labels, scores):
    curve = slow_precisions(labels, scores)
    best = [
        max(p for true, all_present, p in curve if 10 * true >= tenths * all_present) for tenths in range(11)
    ]
    return sum(best) / 11


def slow_area(labels, scores):
    """One rectangle for each image of the class: the best precision at its recall or a larger one."""
    curve = slow_precisions(labels, scores)
    num = curve[0][1]
    return sum(max(p for true, _, p in curve if true >= rank) for rank in range(1, num + 1)) / num


@pytest.mark.parametrize("difficult", [0.0, 0.2])
@pytest.mark.parametrize("decimals", [9, 1, 0])  # rounded scores: many are equal
def test_average_precision_is_that_of_a_slow_count(difficult, decimals):
    X, Y = images(difficult=difficult)
    scores = np.round(X[:, :3] + 0.5 * Y, decimals)
    area, eleven = average_precision(Y, scores), average_precision(Y, scores, points=11)
    for c in range(3):
        assert area[c] == pytest.approx(slow_area(Y[:, c], scores[:, c]), abs=1e-12)
        assert eleven[c] == pytest.approx(slow_11_points(Y[:, c], scores[:, c]), abs=1e-12)
        kept = Y[:, c] != 0  # scikit-learn's does not raise precision to the best at larger recall
        assert area[c] >= average_precision_score(Y[kept, c] == 1, scores[kept, c]) - 1e-12


def test_average_precision_of_rankings_worked_out_by_hand():
    labels = np.array([[1], [-1], [1], [0], [-1]])
    scores = np.array([[5.0], [4.0], [3.0], [9.0], [1.0]])  # the difficult one, ranked first, is left out
    assert average_precision(labels, scores)[0] == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(labels, scores, points=11)[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert average_precision(labels, np.zeros((5, 1)))[0] == 0.5  # nothing is ranked: the share of the class
    assert average_precision(labels, scores * [[1], [-1], [1], [1], [-1]])[0] == 1.0


def slow_protocol(X, Y, X_test):
    """Goyal et al.'s protocol for each class in a loop, by scikit-learn's parts."""
    X, X_test = (x / (np.sqrt((x**2).sum(1)) + 1e-5)[:, None] for x in (X, X_test))
    scores, costs, validation = [], [], []
    for labels in np.where(Y == 1, 1, -1).T:
        ap = []
        for cost in FEW_COSTS:
            svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
            folds = [
                average_precision_score(
                    labels[held_out] == 1,
                    clone(svm).fit(X[rows], labels[rows]).decision_function(X[held_out]),
                )
                for rows, held_out in StratifiedKFold(3).split(X, labels)
            ]
            ap.append(np.mean(folds))
        costs.append(FEW_COSTS[int(np.argmax(ap))])
        validation.append(ap)
        scores.append(svm.set_params(C=costs[-1]).fit(X, labels).decision_function(X_test))
    return np.stack(scores, axis=1), costs, validation


# Two processes import torch anew, which takes most of a minute where others compute too.
@pytest.mark.parametrize("n_jobs", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_the_protocol_is_that_of_a_slow_loop(n_jobs):
    X, Y = images(difficult=0.1)
    X_test, Y_test = images(seed=1, difficult=0.1)
    expected, costs, validation = slow_protocol(X, Y, X_test)
    probe = MultiLabelSVM(FEW_COSTS, n_jobs=n_jobs).fit(X, Y)
    np.testing.assert_array_equal(probe.costs_, costs)
    np.testing.assert_allclose(probe.validation_ap_, validation, atol=1e-12)
    np.testing.assert_allclose(probe.decision_function(X_test), expected, atol=1e-9)
    areas = [slow_area(Y_test[:, c], expected[:, c]) for c in range(3)]
    assert probe.score(X_test, Y_test) == pytest.approx(np.mean(areas), abs=1e-12)
    np.testing.assert_array_equal(probe.predict(X_test), np.where(expected > 0, 1, -1))


def test_the_costs_are_the_published_grid():
    assert len(COSTS) == 26 and list(COSTS) == sorted(COSTS)
    assert {2.0**-19, 2.0**-4, 1e-7, 100.0} <= set(COSTS) and 0.125 not in COSTS


def test_conventions_of_scikit_learn():
    X, Y = images()
    probe = clone(MultiLabelSVM(FEW_COSTS, num_folds=2))
    assert probe.get_params()["num_folds"] == 2
    assert probe.fit(X, Y) is probe and probe.n_features_in_ == 8
    assert (probe.coef_.shape, probe.intercept_.shape, probe.validation_ap_.shape) == ((3, 8), (3,), (3, 3))


def test_one_cost_needs_no_folds_and_half_precision_is_taken():
    X, Y = images()
    one = MultiLabelSVM([0.1]).fit(X.astype(np.float16), Y)
    same = MultiLabelSVM([0.1]).fit(torch.tensor(X).half(), torch.tensor(Y))
    np.testing.assert_array_equal(one.coef_, same.coef_)
    assert one.costs_.tolist() == [0.1] * 3 and np.isnan(one.validation_ap_).all()


def test_constant_features_score_the_share_of_the_class():
    X, Y = images()
    probe = MultiLabelSVM(FEW_COSTS).fit(np.ones_like(X), Y)
    assert probe.score(np.ones_like(X), Y) == pytest.approx((Y == 1).mean(axis=0).mean())
    assert (probe.costs_ == 1e-3).all()  # all are equally good: the smallest


def test_liblinear_that_stops_early_is_logged(caplog):
    MultiLabelSVM([1000.0], max_iter=1).fit(*images())
    assert "liblinear stopped after max_iter=1 for classes [0, 1, 2]" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"costs": []}, r"costs=\[\] must be positive"),
        ({"costs": [1.0, -1.0]}, r"costs=\[1.0, -1.0\] must be positive"),
        ({"num_folds": 1}, "num_folds=1 must be 2 or more"),
        ({"max_iter": 0}, "max_iter=0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelSVM(**setting).fit(*images())


def test_bad_features_and_labels_are_refused():
    X, Y = images()
    probe = MultiLabelSVM(FEW_COSTS)
    with pytest.raises(ValueError, match=r"Labels of shape \(80, 3\) must be \(N, num_classes\) with N = 90"):
        probe.fit(X, Y[:80])
    with pytest.raises(ValueError, match=r"Labels of shape \(90,\) must be"):
        probe.fit(X, Y[:, 0])
    with pytest.raises(ValueError, match=r"Labels \[2\] must be 1 \(present\), -1 \(absent\) or 0"):
        probe.fit(X, np.where(Y == 1, 2, Y))
    with pytest.raises(ValueError, match="90 of 90 rows hold NaN or inf"):
        probe.fit(X * np.nan, Y)
    few = Y.copy()
    few[2:, 1] = -1
    with pytest.raises(ValueError, match="Class 1 has 2 images with it, but 3 are needed"):
        probe.fit(X, few)
    with pytest.raises(ValueError, match="Class 1 has 2 images without it, but 3 are needed"):
        probe.fit(X, -few)
    with pytest.raises(ValueError, match="X has 5 features, but MultiLabelSVM is expecting 8"):
        probe.fit(X, Y).score(X[:, :5], Y)


@pytest.mark.parametrize("labels", [int, bool], ids=["0 and 1", "False and True"])
def test_labels_of_scikit_learn_are_not_taken_for_difficult_ones(labels):
    X, Y = images()
    labels = (Y == 1).astype(labels)
    with pytest.raises(ValueError, match=r"No label is -1 .* give 2 \* Y - 1"):
        average_precision(labels, X[:, :3])  # was 1.0: whatever was absent was left out
    with pytest.raises(ValueError, match="No label is -1"):
        MultiLabelSVM([1.0]).fit(X, labels)


def test_what_has_no_average_precision_is_refused():
    X, Y = images()
    with pytest.raises(ValueError, match="Class 2 is present in no image"):
        average_precision(np.where([False, False, True], -1, Y), X[:, :3])
    with pytest.raises(
        ValueError, match=r"scores \(90, 2\) must be finite, and of the shape of labels \(90, 3\)"
    ):
        average_precision(Y, X[:, :2])
    with pytest.raises(ValueError, match="must be finite"):
        average_precision(Y, X[:, :3] * np.inf)
    with pytest.raises(ValueError, match=r"Labels \[None\] must be 1"):
        average_precision(np.where(Y == 1, None, Y), X[:, :3])
    with pytest.raises(ValueError, match=r"Labels of shape \(90, 0\)"):
        average_precision(Y[:, :0], X[:, :0])
    with pytest.raises(ValueError, match="points=1 must be 2 or more"):
        average_precision(Y, X[:, :3], points=1)


@pytest.fixture
def devkit(tmp_path):
    """Two splits of a VOC-style folder, and one feature folder of all images."""
    parts = {"trainval": images(difficult=0.05), "test": images(seed=1, difficult=0.05)}
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, (_, Y) in parts.items():
        for name, labels in zip(("bird", "cat", "dog"), Y.T, strict=True):
            lines = [f"{split}{row:03d} {label:2d}\n" for row, label in enumerate(labels)]
            (lists / f"{name}_{split}.txt").write_text("".join(lines))
    paths = [f"JPEGImages/{split}{row:03d}.jpg" for split, (X, _) in parts.items() for row in range(len(X))]
    values = np.concatenate([X for X, _ in parts.values()]).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(paths))  # rows are found by name, not by place
    features = Features(values[order], ids=range(len(paths)), paths=[paths[i] for i in order])
    features.save(tmp_path / "features")
    return tmp_path, parts


def test_the_verb_prints_each_class_and_records_both_means(devkit, capsys):
    tmp_path, parts = devkit
    (X, Y), (X_test, Y_test) = parts.values()
    features, numbers = str(tmp_path / "features"), tmp_path / "numbers.json"
    args = ["svm", features, features, "--voc", str(tmp_path / "VOCdevkit"), "--jobs", "1"]
    assert main([*args, "--costs", *map(str, FEW_COSTS), "--json", str(numbers)]) == 0
    scores, costs, _ = slow_protocol(X.astype(np.float32), Y, X_test.astype(np.float32))
    area = [100 * slow_area(Y_test[:, c], scores[:, c]) for c in range(3)]
    eleven = [100 * slow_11_points(Y_test[:, c], scores[:, c]) for c in range(3)]
    lines = capsys.readouterr().out.splitlines()
    assert "90 images of test" in lines[0]
    for line, name, *row in zip(lines[1:], ("bird", "cat", "dog"), area, eleven, costs, strict=False):
        assert line.split() == [name, f"{row[0]:.2f}", f"{row[1]:.2f}", f"{row[2]:.3g}"]
    records = json.loads(numbers.read_text())
    assert [(r["metric"], r["value"], r["num_images"]) for r in records] == [
        ("VOC2007 mAP (%)", round(np.mean(area), 2), 90),
        ("VOC2007 11-point mAP (%)", round(np.mean(eleven), 2), 90),
    ]


def test_the_verb_refuses_images_without_labels(devkit, capsys):
    tmp_path, _ = devkit
    values, paths = np.ones((181, 8), np.float32), Features.open(tmp_path / "features").paths
    Features(values, ids=range(181), paths=[*paths, "x/stranger.jpg"]).save(tmp_path / "more")
    args = ["svm", str(tmp_path / "more"), str(tmp_path / "more"), "--voc", str(tmp_path / "VOCdevkit")]
    assert main(args) == 2
    assert "1 of 181 rows of the features have no label, the first is stranger" in capsys.readouterr().err


def test_the_verb_names_a_class_that_cannot_be_tested_before_anything_is_trained(devkit, capsys, monkeypatch):
    tmp_path, _ = devkit
    cats = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "cat_test.txt"
    cats.write_text(cats.read_text().replace("  1\n", "  0\n"))
    monkeypatch.setattr(MultiLabelSVM, "fit", lambda *_: pytest.fail("trained"))
    features = str(tmp_path / "features")
    assert main(["svm", features, features, "--voc", str(tmp_path / "VOCdevkit")]) == 2
    assert "test has no image of class cat to test on: all are absent or difficult" in capsys.readouterr().err
