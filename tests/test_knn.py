import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from mocohub.probes import neighbors
from mocohub.probes.knn import KNNProbe


@pytest.fixture(autouse=True)
def one_thread():
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(neighbors, "_QUERY_ROWS", 7)
    monkeypatch.setattr(neighbors, "_BANK_ROWS", {"cpu": 11})
    monkeypatch.setattr(neighbors, "_GROUP", 3)


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
