import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from mocohub.cli import main
from mocohub.cli.probing import knn as knn_verb
from mocohub.features.store import Features
from mocohub.probes import best, neighbors
from mocohub.probes.health import health
from mocohub.probes.knn import KNNProbe, KNNResult, knn_grid
from mocohub.probes.linear import LinearProbe
from mocohub.probes.retrieval import retrieval


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(neighbors, "_QUERY_ROWS", 7)
    monkeypatch.setattr(neighbors, "_BANK_ROWS", {"cpu": 11})
    monkeypatch.setattr(best, "_GROUP", 3)


def random_set(num_train=100, num_test=30, width=8, num_classes=4, dtype=np.float64):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((num_train + num_test, width)).astype(dtype)
    y = rng.integers(0, num_classes, num_train + num_test)
    return X[:num_train], y[:num_train], X[num_train:], y[num_train:]


def slow_shares(X, y, queries, k, temperature):
    """Each query alone, in plain Python: sort all similarities, add up the weights of the first k."""
    shares = []
    for query in queries.tolist():
        similarities = []
        for row in X.tolist():
            lengths = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in row))
            similarities.append(sum(a * b for a, b in zip(query, row, strict=True)) / lengths)
        nearest = sorted(range(len(X)), key=lambda i: (-similarities[i], i))[:k]  # noqa: B023
        votes = dict.fromkeys(sorted(set(y.tolist())), 0.0)
        for i in nearest:
            votes[y[i]] += math.exp(similarities[i] / temperature)
        shares.append([vote / sum(votes.values()) for vote in votes.values()])
    return np.array(shares)


@pytest.mark.filterwarnings("ignore:k=200, but there are only")
@parametrize_with_checks([KNNProbe(), KNNProbe(k=5)])
def test_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (10, 0.07), (10, 1.0), (100, 0.2)])
def test_shares_of_the_vote_equal_a_plain_python_loop(k, temperature, small_tiles):
    X, y, queries, _ = random_set()
    probe = KNNProbe(k=k, temperature=temperature).fit(X, y)
    expected = slow_shares(X, y, queries, k, temperature)
    np.testing.assert_allclose(probe.predict_proba(queries), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(probe.predict(queries), expected.argmax(axis=1))


@pytest.mark.parametrize("k", [1, 5, 11, 12, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbours_equal_those_of_scikit_learn(k, dtype, small_tiles):
    X, y, queries, _ = random_set(dtype=dtype)
    distances, indices = KNNProbe(k=k).fit(X, y).kneighbors(queries)
    exact = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(X)
    expected_distances, expected_indices = exact.kneighbors(queries)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-6)


def test_neighbours_do_not_depend_on_the_size_of_the_tiles(monkeypatch):
    X, y, queries, _ = random_set(num_train=300, num_test=50)
    probe = KNNProbe(k=20).fit(X, y)
    expected = probe.kneighbors(queries)[1]
    for query_rows, bank_rows in [(1, 1), (3, 19), (50, 20), (64, 21), (7, 299)]:
        monkeypatch.setattr(neighbors, "_QUERY_ROWS", query_rows)
        monkeypatch.setattr(neighbors, "_BANK_ROWS", {"cpu": bank_rows})
        np.testing.assert_array_equal(probe.kneighbors(queries)[1], expected)


@pytest.mark.parametrize("k", [1, 4, 5, 15, 16, 29, 30])
def test_of_equal_similarities_the_lower_index_goes_first(k, small_tiles):
    axis = np.arange(30) % 2  # rows 0, 2, 4, ... lie on the first axis: similarity exactly 1 or 0
    X = np.eye(2)[axis] * np.arange(1, 31)[:, None]
    _, indices = KNNProbe(k=k).fit(X, axis).kneighbors(np.eye(2))
    even, odd = list(range(0, 30, 2)), list(range(1, 30, 2))
    assert indices.tolist() == [(even + odd)[:k], (odd + even)[:k]]


def test_of_equal_votes_the_first_class_wins():
    probe = KNNProbe(k=2).fit(np.eye(2), ["zebra", "ant"])
    assert probe.predict([[1.0, 1.0]]) == ["ant"]


def test_a_vector_of_zeros_has_similarity_0_to_everything():
    probe = KNNProbe(k=3).fit([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0, 1, 2])
    distances, indices = probe.kneighbors([[1.0, 0.0], [0.0, 0.0]])
    assert indices.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert distances.tolist() == [[0, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 1e38])
def test_lengths_whose_squares_leave_float32_are_normalised(scale):
    X = np.array([[1.0, 0.0], [0.6, 0.8]]) * scale
    distances, _ = KNNProbe(k=2).fit(X.astype(np.float32), [0, 1]).kneighbors(X.astype(np.float32))
    np.testing.assert_allclose(distances, [[0, 0.4], [0, 0.4]], atol=1e-4)


def test_more_neighbours_than_training_images_lets_all_vote_and_warns():
    X, y, queries, _ = random_set(num_train=20)
    with pytest.warns(UserWarning, match="k=200, but there are only 20 training images: all vote"):
        probe = KNNProbe(k=200).fit(X, y)
    np.testing.assert_allclose(probe.predict_proba(queries), slow_shares(X, y, queries, 20, 0.07), atol=1e-12)
    assert probe.kneighbors(queries)[1].shape == (30, 20)


def test_a_tiny_temperature_lets_the_nearest_decide_without_overflow():
    X, y, queries, _ = random_set(dtype=np.float32)
    shares = KNNProbe(k=50, temperature=1e-6).fit(X, y).predict_proba(queries)
    nearest = KNNProbe(k=1).fit(X, y).predict(queries)
    np.testing.assert_allclose(shares[np.arange(30), nearest], 1, atol=1e-3)


def test_one_test_image_of_one_class_is_scored():
    X, y, queries, _ = random_set()
    probe = KNNProbe(k=5).fit(X, y)
    guess = probe.predict(queries[:1])
    assert probe.predict_proba(queries[:1]).shape == (1, 4)
    assert probe.score(queries[:1], guess) == 1.0
    assert probe.score(queries[:1], (guess + 1) % 4) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_give_what_arrays_give(dtype):
    X, y, queries, labels = (torch.from_numpy(part) for part in random_set())
    X, queries = X.to(dtype).requires_grad_(), queries.to(dtype)
    of_tensors = KNNProbe(k=5).fit(X, y)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    X_array, queries_array = X.detach().to(wide).numpy(), queries.to(wide).numpy()
    of_arrays = KNNProbe(k=5).fit(X_array, y.numpy())
    shares = of_tensors.predict_proba(queries)
    assert shares.dtype == X_array.dtype
    np.testing.assert_array_equal(shares, of_arrays.predict_proba(queries_array))
    assert of_tensors.score(queries, labels) == of_arrays.score(queries_array, labels.numpy())


def test_float16_arrays_are_searched_in_float32():
    X, y, queries, _ = random_set(dtype=np.float16)
    expected = KNNProbe(k=5).fit(X.astype(np.float32), y).kneighbors(queries.astype(np.float32))[0]
    distances = KNNProbe(k=5).fit(X, y).kneighbors(queries)[0]
    assert distances.dtype == np.float32
    np.testing.assert_array_equal(distances, expected)


def test_reversed_views_give_what_their_copies_give():
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    probe = KNNProbe(k=5).fit(X[::-1], y[::-1])
    expected = KNNProbe(k=5).fit(X[::-1].copy(), y[::-1]).predict_proba(X[::-1].copy())
    np.testing.assert_array_equal(probe.predict_proba(X[::-1]), expected)
    assert health(X[::-1]).uniformity == health(X[::-1].copy()).uniformity
    assert retrieval(X[::-1], y[::-1]).recall == retrieval(X[::-1].copy(), y[::-1]).recall
    LinearProbe(epochs=1).fit(X[:, ::-1], y)


def test_features_are_left_as_they_were():
    X, y, queries, _ = random_set()
    before = X.copy(), queries.copy()
    KNNProbe(k=5).fit(X, y).predict(queries)
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(queries, before[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_row(value):
    X, y, queries, _ = random_set()
    probe = KNNProbe(k=5).fit(X, y)
    X[[3, 9], 2] = value
    queries[4, 0] = value
    with pytest.raises(ValueError, match="2 of 100 rows hold NaN or inf, the first is row 3"):
        KNNProbe(k=5).fit(X, y)
    with pytest.raises(ValueError, match="1 of 30 rows hold NaN or inf, the first is row 4"):
        probe.predict(queries)


def test_infinities_that_cancel_are_found():
    X, y, _, _ = random_set()
    X[5, :2] = np.inf, -np.inf
    with pytest.raises(ValueError, match="the first is row 5"):
        KNNProbe(k=5).fit(X, y)


def test_queries_of_another_width_are_refused():
    X, y, queries, _ = random_set()
    with pytest.raises(ValueError, match="X has 7 features, but KNNProbe is expecting 8"):
        KNNProbe(k=5).fit(X, y).predict(queries[:, :7])


def test_labels_of_another_length_are_refused():
    X, y, _, _ = random_set()
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[100, 99\]"):
        KNNProbe(k=5).fit(X, y[:-1])


def test_images_without_a_label_are_refused():
    X, y, _, _ = random_set()
    labels = [None if row in (2, 3) else int(label) for row, label in enumerate(y)]
    with pytest.raises(ValueError, match="2 of 100 labels are None, the first in row 2"):
        KNNProbe(k=5).fit(X, labels)


@pytest.mark.parametrize("k", [0, -1, 2.5, "5"])
def test_a_number_of_neighbours_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k!r} must be a whole number of neighbours, 1 or more"):
        KNNProbe(k=k).fit([[1.0], [2.0]], [0, 1])


@pytest.mark.parametrize("temperature", [0, -0.07, math.nan, math.inf, None])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature!r} must be positive"):
        KNNProbe(k=1, temperature=temperature).fit([[1.0], [2.0]], [0, 1])


# --- banks that are streamed ------------------------------------------------------------------------------


def make_features(X, y, classes=None, **meta):
    return Features(X, range(len(X)), [f"{i}.jpg" for i in range(len(X))], y, classes, meta=meta)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_feature_folder_votes_without_being_in_memory(tmp_path, dtype, small_tiles):
    X, y, queries, labels = random_set(dtype=dtype)
    folder = make_features(X, y).save(tmp_path / "features", rows_per_shard=30)
    features = Features.open(folder)
    probe = KNNProbe(k=9).fit(features, features.targets)
    expected = KNNProbe(k=9).fit(X, y)
    np.testing.assert_array_equal(probe.predict_proba(queries), expected.predict_proba(queries))
    assert probe.score(queries, labels) == expected.score(queries, labels)
    assert not features._values and probe.n_features_in_ == 8


def test_training_features_are_not_copied():
    X, y, _, _ = random_set(dtype=np.float16)
    assert np.shares_memory(KNNProbe(k=5).fit(X, y)._bank, X)


def test_streamed_features_need_a_label_each():
    X, y, _, _ = random_set(dtype=np.float32)
    with pytest.raises(ValueError, match="100 training features, but 99 labels"):
        KNNProbe(k=5).fit(make_features(X, y), y[:-1])
    empty = make_features(X[:0], y[:0])
    with pytest.raises(ValueError, match="training features have no rows"):
        KNNProbe(k=5).fit(empty, y[:0])


def test_streamed_features_that_are_not_finite_are_named_when_they_are_read():
    X, y, queries, _ = random_set(dtype=np.float32)
    X[77, 3] = np.nan
    probe = KNNProbe(k=5).fit(make_features(X, y), y)
    with pytest.raises(ValueError, match="Row 77 holds NaN or inf"):
        probe.predict(queries)


# --- the grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 24, 12])
def test_each_cell_of_the_grid_is_the_probe_of_its_k_and_temperature(chunk, monkeypatch):
    monkeypatch.setattr("mocohub.probes.knn._VOTES", chunk)
    X, y, queries, labels = random_set(num_train=200, num_test=60, dtype=np.float32, num_classes=7)
    results = knn_grid(X, y, queries, labels, ks=(20, 1, 7, 150), temperatures=(1.0, 0.05))
    assert [(r.k, r.temperature) for r in results] == [(k, T) for k in (20, 1, 7, 150) for T in (1.0, 0.05)]
    for result in results:
        probe = KNNProbe(result.k, result.temperature).fit(X, y)
        shares = probe.predict_proba(queries)
        np.testing.assert_array_equal(result.classes[result.predictions], probe.predict(queries))
        assert result.top1 == probe.score(queries, labels)
        ranked = np.argsort(-shares, axis=1, kind="stable")[:, :5]
        voted = np.take_along_axis(shares, labels[:, None], 1)[:, 0] > 0
        assert result.top5 == ((ranked == labels[:, None]).any(1) & voted).mean()
        confusion = np.zeros((7, 7), int)
        for label, guess in zip(labels, probe.predict(queries), strict=True):
            confusion[label, guess] += 1
        np.testing.assert_array_equal(result.confusion, confusion)
        assert result.num_images == confusion.sum() == 60
        for label, share in result.per_class.items():
            assert share == confusion[label, label] / confusion[label].sum()


def test_one_search_serves_the_whole_grid(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mocohub.probes.knn.nearest", lambda *a, **k: calls.append(1) or neighbors.nearest(*a, **k)
    )
    X, y, queries, labels = random_set(num_train=300)
    assert len(knn_grid(X, y, queries, labels)) == 35
    assert len(calls) == 1


def test_leave_one_out_classifies_each_image_by_all_others(small_tiles):
    X, y, _, _ = random_set(num_train=40)
    for result in knn_grid(X, y, ks=(1, 5, 39), temperatures=(0.07,), leave_one_out=True):
        for i in range(40):
            others = np.arange(40) != i
            probe = KNNProbe(result.k).fit(X[others], y[others])
            assert result.classes[result.predictions[i]] == probe.predict(X[i : i + 1])[0]


def test_three_test_images_and_classes_that_are_absent_on_either_side():
    X, y, queries, _ = random_set()
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    only_test = np.array(["bee", "elk", "bee"])
    with pytest.warns(UserWarning) as caught:
        (result,) = knn_grid(X, names, queries[:3], only_test, ks=[5], temperatures=[0.07])
    (warning,) = caught  # and not that three images with two labels look like a regression
    assert "1 of 2 test classes have no training images" in str(warning.message)
    assert str(warning.message).endswith("wrong: elk.")
    assert result.classes.tolist() == ["ant", "bee", "cat", "dog", "elk"]
    assert result.confusion.shape == (5, 5) and result.num_images == 3
    assert result.per_class.keys() == {"bee", "elk"} and result.per_class["elk"] == 0
    predicted = KNNProbe(5).fit(X, names).predict(queries[:3])
    assert result.top1 == (predicted == only_test).mean()
    assert result.top5 <= 2 / 3


def test_with_five_classes_or_fewer_top5_asks_for_one_neighbour_of_the_class():
    X = np.array([[1, 0], [1, 0.1], [0, 1], [-1, 0]])
    (result,) = knn_grid(X, [0, 0, 1, 2], X[:1].repeat(3, 0), [0, 1, 2], ks=[3], temperatures=[0.5])
    assert result.top1 == 1 / 3
    assert result.top5 == 2 / 3  # classes 0 and 1 are among the three neighbours, 2 is not


def test_votes_of_far_neighbours_decide_between_equal_near_ones():
    X = [[1.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5], [-1.0, 0.0]]
    y = np.array(["a", "b", "b", "a"])  # 1 + exp(-100) against 1 + exp(-25), which float32 calls equal
    (result,) = knn_grid(np.float32(X), y, np.float32(X[:1]), ["b"], ks=[4], temperatures=[0.02])
    assert result.top1 == 1.0
    assert KNNProbe(k=4, temperature=0.02).fit(np.float32(X), y).predict(np.float32(X[:1])) == ["b"]


def test_as_the_temperature_falls_the_nearest_image_alone_decides():
    X, y, queries, labels = random_set(dtype=np.float32)
    nearest = KNNProbe(k=1).fit(X, y).predict(queries)
    for result in knn_grid(X, y, queries, labels, ks=[9], temperatures=[1e-6, 1e-40, 1e-300]):
        np.testing.assert_array_equal(result.classes[result.predictions], nearest)
        probe = KNNProbe(k=9, temperature=result.temperature).fit(X, y)
        np.testing.assert_array_equal(probe.predict(queries), nearest)


def test_distances_are_never_negative():
    X = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    distances, _ = KNNProbe(k=3).fit(X, np.arange(50) % 5).kneighbors(X)
    assert distances.min() == 0.0


def test_one_class_is_always_right():
    X, _, queries, _ = random_set()
    (result,) = knn_grid(X, ["a"] * 100, queries, ["a"] * 30, ks=[5], temperatures=[0.07])
    assert (result.top1, result.top5, result.confusion.tolist()) == (1.0, 1.0, [[30]])


def test_of_fewer_training_images_all_vote_in_the_grid():
    X, y, queries, labels = random_set(num_train=20)
    with pytest.warns(UserWarning, match="k=200, but there are only 20"):
        results = knn_grid(X, y, queries, labels, ks=(20, 200), temperatures=[0.07])
    np.testing.assert_array_equal(results[0].predictions, results[1].predictions)


@pytest.mark.parametrize(
    ("right", "num_images", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)],
)
def test_the_interval_is_wilsons(right, num_images, low, high):
    """Against values of R, prop.test(right, num_images, correct = FALSE)."""
    classes, zeros = np.arange(2), np.zeros(num_images, int)
    result = KNNResult(1, 0.07, right / num_images, 1.0, classes, zeros, zeros)
    np.testing.assert_allclose(result.interval, (low, high), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ks": ()}, "ks=.*must hold at least one value"),
        ({"ks": (5, 0)}, "k=0 must be a whole number"),
        ({"temperatures": (0.1, -1)}, "temperature=-1 must be positive"),
        ({"leave_one_out": True}, "leave_one_out=True without them"),
        ({"X_test": None, "y_test": None}, "Give X_test and y_test, or leave_one_out=True"),
        ({"y_test": [0, 1]}, "30 test features, but 2 labels"),
        ({"y_test": ["a"] * 30}, "Labels differ in kind"),
        ({"y_test": [9] * 30}, r"No test class \(9\) is a training class \(0, 1, 2, 3\)"),
        ({"y_test": [None] * 30}, "30 of 30 labels are None"),
        ({"y_test": [np.nan] + [0.0] * 29}, "contains NaN"),
        ({"y_test": np.array(["a"] + [0] * 29, object)}, "Labels differ in kind"),
        ({"device": "tpu"}, "device 'tpu' is not supported. Choose cpu or cuda"),
        ({"y_test": np.array(["a"] * 30, object)}, "Labels differ in kind"),
        ({"X_test": np.full((30, 8), np.inf)}, "30 of 30 rows hold NaN or inf"),
        ({"X_test": np.ones((30, 7))}, "X has 7 features, but KNNProbe is expecting 8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_grid_that_cannot_be_computed_is_refused(arguments, message):
    X, y, queries, labels = random_set()
    given = {"X_test": queries, "y_test": labels, "ks": (5,), **arguments}
    with pytest.raises(ValueError, match=message):
        knn_grid(X, y, **given)


def test_one_image_cannot_be_classified_by_the_others():
    with (
        pytest.warns(UserWarning, match="only 1 training image"),
        pytest.raises(ValueError, match="A bank of 1 rows has no neighbours"),
    ):
        knn_grid([[1.0, 2.0]], ["a"], ks=(5,), leave_one_out=True)


# --- the verb ---------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    X, y, queries, labels = random_set(num_train=300, num_classes=6, dtype=np.float32)
    classes = list("abcdef")
    train = make_features(X, y, classes).save(tmp_path / "train", rows_per_shard=100)
    val = make_features(queries, labels, classes).save(tmp_path / "val")
    return str(train), str(val)


def test_the_verb_prints_top1_and_top5_and_records_top1(folders, tmp_path, capsys):
    X, y, queries, labels = random_set(num_train=300, num_classes=6, dtype=np.float32)
    out = tmp_path / "numbers.json"
    knn_verb(*folders, k=(9,), device="cpu", json_file=str(out))
    (result,) = knn_grid(X, y, queries, labels, ks=[9], temperatures=[0.07])
    text = capsys.readouterr().out
    assert text.startswith(f"top-1 {100 * result.top1:.2f} %, top-5 {100 * result.top5:.2f} % on 30 images (")
    assert json.loads(out.read_text()) == [
        {
            "dataset": "train",
            "split": "val",
            "num_images": 30,
            "metric": "top-1 (%)",
            "protocol": "weighted kNN, cosine, k = 9 (or all there are), T = 0.07",
            "value": round(100 * result.top1, 2),
            "interval": [round(100 * end, 2) for end in result.interval],
        }
    ]


@pytest.mark.parametrize("verb", ["knn", "linear", "lowshot", "retrieval"])
def test_verbs_refuse_to_test_a_folder_on_itself(verb, folders, capsys):
    assert main([verb, folders[1], folders[1]]) == 2
    remedy = "Give it once" if verb == "retrieval" else "Give another folder to test on; `mocohub knn"
    assert remedy in capsys.readouterr().err


def test_the_verb_prints_a_table_of_several_k_and_temperatures(folders, capsys):
    knn_verb(*folders, k=(1, 20), temperature=(0.03, 0.1), device="cpu")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["k", "T", "top-1"]
    assert [line.split()[:2] for line in lines] == [
        ["1", "0.03"],
        ["1", "0.1"],
        ["20", "0.03"],
        ["20", "0.1"],
    ]


def test_the_verb_leaves_one_out_of_one_folder(folders, capsys):
    X, y, _, _ = random_set(num_train=300, num_classes=6, dtype=np.float32)
    knn_verb(folders[0], k=(9,), leave_one_out=True, device="cpu")
    (result,) = knn_grid(X, y, ks=[9], temperatures=[0.07], leave_one_out=True)
    text = capsys.readouterr().out
    assert f"top-1 {100 * result.top1:.2f} %" in text and "on 300 images" in text and "leave one out" in text
    for wrong in ((folders[0],), folders):
        with pytest.raises(ValueError, match="Give two feature folders, or one and --leave-one-out"):
            knn_verb(*wrong, leave_one_out=len(wrong) == 2)


def test_the_verb_names_a_damaged_shard(folders, tmp_path):
    shard = tmp_path / "train" / "part-00001-of-00003.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="part-00001-of-00003.parquet' is damaged"):
        knn_verb(*folders, device="cpu")


def test_the_verb_refuses_features_of_another_model(tmp_path):
    _, _, queries, labels = random_set(dtype=np.float32)
    for name, model in (("a", "1"), ("b", "2")):
        make_features(queries, labels, model={"sha256": model}).save(tmp_path / name)
    with pytest.raises(ValueError, match="not comparable"):
        knn_verb(str(tmp_path / "a"), str(tmp_path / "b"), device="cpu")


def test_a_probe_of_features_that_are_all_the_same_gives_an_answer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = knn_grid(
            np.ones((50, 4)),
            np.arange(50) % 5,
            np.ones((10, 4)),
            np.arange(10) % 5,
            ks=[10],
            temperatures=[0.07],
        )
    assert result.top1 == 0.2 and result.top5 == 1.0
