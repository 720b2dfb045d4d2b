"""Against loops over pairs and numpy's own SVD; verdicts on features whose state is known."""

import math

import numpy as np
import pytest
import torch

from mocohub.probes import inputs
from mocohub.probes.health import health
from mocohub.probes.spectrum import effective_rank, moments, participation_ratio, rankme

RNG = np.random.default_rng(0)
GAUSSIAN = RNG.normal(size=(300, 16)).astype(np.float32)
LABELS = RNG.integers(0, 4, 300)


def entropy_rank(values):
    shares = [value / sum(values) for value in values if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def pairs(rows):
    units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows.tolist()]
    for i, a in enumerate(units):
        for j, b in enumerate(units):
            if i != j:
                yield i, j, sum(x * y for x, y in zip(a, b, strict=True))


@pytest.fixture(params=[4096, 7])
def block_rows(request, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_ROWS", request.param)


def test_ranks_are_those_of_a_singular_value_decomposition(block_rows):
    X = GAUSSIAN * 2.0 ** -np.arange(16) + 3
    found = health(X)
    centred = np.linalg.svd(X.astype(float) - X.astype(float).mean(0), compute_uv=False)
    as_they_are = np.linalg.svd(X.astype(float), compute_uv=False)
    np.testing.assert_allclose(found.singular_values, centred, rtol=1e-6)
    assert found.effective_rank == pytest.approx(entropy_rank(centred.tolist()))
    assert found.participation_ratio == pytest.approx((centred**2).sum() ** 2 / (centred**4).sum())
    shares = as_they_are / as_they_are.sum() + 1e-7
    assert found.rankme == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert found.rank_share == pytest.approx(found.effective_rank / 16)


def test_numbers_of_pairs_equal_a_loop_over_all_pairs(block_rows):
    X = GAUSSIAN[:60] + 0.5
    found = health(X, LABELS[:60])
    all_pairs = list(pairs(X))
    cosines = [cosine for _, _, cosine in all_pairs]
    assert found.mean_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert found.spread == pytest.approx(math.sqrt(1 - sum(cosines) / len(cosines)), abs=1e-6)
    potentials = [math.exp(-2 * (2 - 2 * cosine)) for cosine in cosines]
    assert found.uniformity == pytest.approx(math.log(sum(potentials) / len(potentials)), abs=1e-6)
    same = [2 - 2 * cosine for i, j, cosine in all_pairs if LABELS[i] == LABELS[j]]
    assert found.alignment_same_class == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert found.alignment is None


def test_alignment_is_the_mean_squared_distance_of_two_views():
    first, second = GAUSSIAN[:20], GAUSSIAN[:20] + 0.1
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second)]
    expected = np.mean([np.sum((a - b) ** 2) for a, b in zip(*units, strict=True)])
    assert health(GAUSSIAN, views=(first, second)).alignment == pytest.approx(expected, rel=1e-5)
    assert health(GAUSSIAN, views=(first, 7 * first)).alignment == pytest.approx(0, abs=1e-12)


def test_uniformity_of_many_rows_is_that_of_some_drawn_at_random():
    everything, some, again = health(GAUSSIAN), *(health(GAUSSIAN, max_pair_rows=100) for _ in range(2))
    assert (everything.uniformity_rows, some.uniformity_rows) == (300, 100)
    assert some.uniformity == again.uniformity != everything.uniformity
    assert some.uniformity == pytest.approx(everything.uniformity, abs=0.1)
    assert some.uniformity != health(GAUSSIAN, max_pair_rows=100, seed=1).uniformity


def test_identical_rows_have_collapsed_completely():
    for row in (np.ones(128), RNG.normal(size=128) * 1000):
        found = health(np.tile(row, (200, 1)).astype(np.float32))
        assert found.verdict == "collapsed completely"
        assert found.effective_rank == found.participation_ratio == 0 and len(found.dead) == 128
        assert found.num_duplicate_rows == 199
        assert "all images have one direction" in found.words and "199 of 200 rows repeat" in found.words


def test_rows_that_differ_in_length_or_by_a_hair_have_collapsed_too():
    row = RNG.normal(size=64)
    assert health(RNG.uniform(1, 9, (100, 1)) * row).verdict == "collapsed completely"
    assert health(row + 1e-3 * RNG.normal(size=(100, 64))).verdict == "collapsed completely"
    assert health(row + 0.1 * RNG.normal(size=(100, 64))).verdict == "healthy"


def test_two_of_128_dimensions_are_a_dimensional_collapse():
    found = health(RNG.normal(size=(500, 2)) @ RNG.normal(size=(2, 128)))
    assert found.verdict == "dimensional collapse" and found.dead == ()
    assert 1.5 < found.effective_rank <= 2.0001
    assert "effective rank of 2.0 of at most 128 (collapsed below 10 %)" in found.words


def test_a_gaussian_cloud_is_healthy():
    found = health(RNG.normal(size=(2000, 128)))
    assert found.verdict == "healthy" and found.rank_share > 0.95 and found.spread > 0.99
    assert found.participation_ratio > 110 and found.uniformity == pytest.approx(-4, abs=0.15)
    assert "have not collapsed" in found.words


def test_one_hot_clusters_are_healthy_where_they_fill_the_space_and_not_where_they_do_not():
    labels = RNG.integers(0, 10, 500)
    found = health(np.eye(10)[labels], labels)
    assert found.verdict == "healthy" and found.effective_rank == pytest.approx(9, abs=0.05)
    assert found.alignment_same_class == pytest.approx(0, abs=1e-12)
    assert found.num_duplicate_rows == 490
    found = health(np.eye(128)[labels], labels)
    assert found.verdict == "dimensional collapse" and len(found.dead) == 118


def test_rows_that_point_away_from_each_other_spread_as_far_as_can_be():
    found = health(np.random.default_rng(0).normal(size=(50, 8)))
    assert found.mean_cosine < 0 and found.words.endswith("spread 1.00 of 1.")


def test_a_few_rows_are_not_judged_but_for_complete_collapse():
    assert health(GAUSSIAN[:3]).verdict == "too few rows to tell"
    assert "3 images are too few" in health(GAUSSIAN[:3]).words
    assert health(np.ones((3, 16))).verdict == "collapsed completely"
    one = health(GAUSSIAN[:1])
    assert one.verdict == "too few rows to tell" and one.mean_cosine is one.uniformity is None


def test_dimensions_that_hardly_vary_are_dead(block_rows):
    X = GAUSSIAN.copy()
    X[:, 3], X[:, 7] = 1000.0, RNG.normal(size=300) * 1e-6
    X[:10, 3] = np.nextafter(np.float32(1000), np.float32(0))  # rounding is no life
    assert health(X).dead == (3, 7)
    assert "2 of 16 dimensions are dead" in health(X).words


def test_zero_constant_and_repeated_rows_are_counted(block_rows):
    X = GAUSSIAN.copy()
    X[20], X[21], X[100] = 0, 2, X[5]
    X[200] = -0.0
    found = health(X)
    assert found.num_zero_rows == 2
    assert found.num_constant_rows == 3
    assert found.num_duplicate_rows == 2  # 0.0 and -0.0 are equal
    lengths = np.linalg.norm(X.astype(float), axis=1)
    expected = [lengths.mean(), lengths.std(), 0, np.median(lengths), lengths.max()]
    assert list(found.norms.values()) == pytest.approx(expected)


def test_zero_rows_take_no_part_in_numbers_of_pairs():
    X = np.concatenate([GAUSSIAN, np.zeros((5, 16), np.float32)])
    with_zeros, without = health(X, [*LABELS, 0, 1, 2, 3, 3]), health(GAUSSIAN, LABELS)
    for name in ("mean_cosine", "uniformity", "alignment_same_class"):
        assert getattr(with_zeros, name) == pytest.approx(getattr(without, name), abs=1e-12)
    assert "5 rows are zero" in with_zeros.words


def test_stored_float16_and_tensors_are_taken():
    class Stored:
        def __len__(self):
            return 300

        def blocks(self):
            yield from np.array_split(GAUSSIAN.astype(np.float16), 4)

    expected = health(GAUSSIAN.astype(np.float16).astype(np.float32), LABELS)
    for given in (Stored(), torch.from_numpy(GAUSSIAN).half()):
        found = health(given, torch.from_numpy(LABELS))
        assert found.effective_rank == pytest.approx(expected.effective_rank)
        assert found.uniformity == pytest.approx(expected.uniformity)
        assert found.alignment_same_class == pytest.approx(expected.alignment_same_class)


def test_names_of_classes_are_taken():
    names = np.array(["cat", "cow", "dog", "emu"])[LABELS]
    assert health(GAUSSIAN, names).alignment_same_class == health(GAUSSIAN, LABELS).alignment_same_class


def test_a_large_mean_cancels_nothing():
    count, mean, scatter = moments(np.array_split(GAUSSIAN.astype(float) + 1e6, 5))
    assert count == 300
    np.testing.assert_allclose(mean, GAUSSIAN.astype(float).mean(0) + 1e6)
    np.testing.assert_allclose(scatter, np.cov(GAUSSIAN.T.astype(float)) * 299, rtol=1e-6, atol=1e-4)


def test_a_spectrum_of_zeros_has_rank_zero():
    zeros = np.zeros(4)
    assert effective_rank(zeros) == rankme(zeros) == participation_ratio(zeros) == 0.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"X": np.ones((0, 4))}, "have no rows"),
        ({"X": np.ones(4)}, r"must be \(N, D\)"),
        ({"X": np.array([[1, np.nan], [1, 2]])}, "not finite"),
        ({"X": np.ones((3, 0))}, r"shape \(3, 0\), but must be \(N, D\)"),
        ({"X": np.eye(3) + 1j}, "features are of type complex128, but must be real numbers"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"y": np.array(["a", 1, "b"], object)}, "Labels differ in kind"),
        ({"y": [0, 1]}, r"y has shape \(2,\), but the features have 3 rows"),
        ({"y": np.array(["a", None, "b"], object)}, "1 of 3 labels are None"),
        ({"views": (np.eye(3), np.eye(4))}, "must be two matrices"),
        ({"views": (np.eye(3), np.full((3, 3), np.inf))}, "3 of 3 rows hold NaN or inf"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        health(**{"X": np.eye(3), **arguments})
