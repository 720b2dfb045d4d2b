"""Against a loop in plain Python that sorts one query's gallery at a time, and against scikit-learn."""

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mocohub.cli import main
from mocohub.features.store import Features
from mocohub.probes import inputs
from mocohub.probes import retrieval as module
from mocohub.probes.retrieval import retrieval


@pytest.fixture(params=["whole", "blocks"])
def tiles(request, monkeypatch):
    """The gallery as one block that is kept, or as many that are read twice."""
    if request.param == "blocks":
        monkeypatch.setattr(inputs, "BLOCK_ROWS", 7)
        monkeypatch.setattr(module, "_QUERY_ROWS", 5)
        monkeypatch.setattr(module, "_TILE_VALUES", 5 * 9)


def random_set(num_queries=23, num_gallery=60, width=6, num_classes=4, seed=0):
    """Queries and gallery whose similarities are few and exact, so that many are equal."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 2, (num_queries + num_gallery, width)).astype(float)
    labels = rng.integers(0, num_classes, num_queries + num_gallery)
    return rows[:num_queries], labels[:num_queries], rows[num_queries:], labels[num_queries:]


def cosine(a, b):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def slow(queries, query_labels, gallery, gallery_labels, ks, ignored):
    """Sort each ranking, irrelevant before relevant among equals, and walk down."""
    hits, precisions, precisions_at_r, left_out = [], [], [], 0
    for query, label, skip in zip(queries.tolist(), query_labels.tolist(), ignored, strict=True):
        ranking = [
            (-round(cosine(query, row), 9), other == label)
            for i, (row, other) in enumerate(zip(gallery.tolist(), gallery_labels.tolist(), strict=True))
            if i not in skip
        ]
        relevant = [is_relevant for _, is_relevant in sorted(ranking)]
        num_relevant = sum(relevant)
        if not num_relevant:
            left_out += 1
            continue
        first = relevant.index(True) + 1
        hits.append([first <= k for k in ks])
        # Equal relevant ones share the place of the last of them, as precision is a function of a threshold.
        scores = sorted(ranking)
        total = total_at_r = 0.0
        for score, is_relevant in scores:
            if is_relevant:
                rank = sum(other <= score for other, _ in scores)
                precision = sum(other <= score and good for other, good in scores) / rank
                total += precision
                total_at_r += precision if rank <= num_relevant else 0.0
        precisions.append(total / num_relevant)
        precisions_at_r.append(total_at_r / num_relevant)
    recall = {k: sum(row[i] for row in hits) / len(hits) for i, k in enumerate(ks)}
    n = len(precisions)
    return recall, sum(precisions) / n, sum(precisions_at_r) / n, n, left_out


def check(found, expected):
    recall, mean, mean_at_r, num_queries, num_left_out = expected
    assert found.recall == pytest.approx(recall, abs=1e-12)
    assert found.mean_average_precision == pytest.approx(mean, abs=1e-9)
    assert found.mean_average_precision_at_r == pytest.approx(mean_at_r, abs=1e-9)
    assert (found.num_queries, found.num_left_out) == (num_queries, num_left_out)


def lattice(rows):
    """Rows with entries 0 and 1, one or four of them, so that lengths are whole numbers and cosines exact."""
    kept = np.zeros_like(rows)
    for row, out in zip(rows, kept, strict=True):
        ones = np.flatnonzero(row)
        out[ones[: 4 if len(ones) >= 4 else 1]] = 1
    return kept


def test_numbers_equal_a_plain_python_loop_with_ties_and_ignored_pairs(tiles):
    X, y, gallery, labels = random_set()
    X, gallery = lattice(X), lattice(gallery)
    assert len(np.unique(gallery, axis=0)) < len(gallery) / 2  # so there are many ties
    y[3] = 99  # has no relevant image
    rng = np.random.default_rng(1)
    ignored = [rng.choice(60, 5, replace=False) for _ in X]
    found = retrieval(X, y, gallery, labels, ks=(1, 2, 5, 10, 1000), ignored=ignored)
    check(found, slow(X, y, gallery, labels, (1, 2, 5, 10, 1000), ignored))
    assert found.num_left_out == 1 and 3 not in found.counted and found.num_gallery == 60


def test_within_one_set_a_query_is_not_its_own_answer(tiles):
    X, y, _, _ = random_set(num_queries=40)
    X = lattice(X)
    found = retrieval(X, y, ks=(1, 3))
    check(found, slow(X, y, X, y, (1, 3), [[i] for i in range(40)]))
    assert found.num_gallery == 39


def test_average_precision_is_that_of_scikit_learn(tiles):
    rng = np.random.default_rng(2)
    X, y = rng.normal(size=(50, 8)), rng.integers(0, 5, 50)
    gallery, labels = rng.normal(size=(80, 8)), rng.integers(0, 5, 80)
    found = retrieval(X, y, gallery, labels)
    units, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (X, gallery))
    expected = [
        average_precision_score(labels == label, others @ row) for row, label in zip(units, y, strict=True)
    ]
    np.testing.assert_allclose(found.average_precisions, expected, atol=1e-12)
    assert found.mean_average_precision == pytest.approx(np.mean(expected))


def test_a_perfect_ranking_scores_one_and_the_worst_what_can_be_computed_by_hand():
    gallery = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])
    best = retrieval([[1.0, 0.05]], ["a"], gallery, ["a", "a", "b", "b"])
    assert (best.precision_at_1, best.mean_average_precision, best.mean_average_precision_at_r) == (1, 1, 1)
    worst = retrieval([[1.0, 0.05]], ["b"], gallery, ["a", "a", "b", "b"], ks=(2, 3))
    assert worst.recall == {1: 0, 2: 0, 3: 1}
    assert worst.mean_average_precision == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert worst.mean_average_precision_at_r == 0


def test_features_that_are_all_alike_gain_nothing():
    y = np.arange(20) % 2
    found = retrieval(np.ones((20, 4)), y)
    assert found.recall == {1: 0, 5: 0, 10: 0}
    assert found.mean_average_precision == pytest.approx(9 / 19)


def test_names_tensors_and_groups_of_objects_are_taken():
    X = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], dtype=torch.bfloat16)
    groups = ["lamp 1", "lamp 1", "lamp 2", "lamp 2"]
    assert retrieval(X, groups).recall[1] == 1.0
    assert retrieval(X, torch.tensor([0, 0, 1, 1])).recall[1] == 1.0
    assert retrieval(X, np.array(groups, object), X, groups).recall[1] == 1.0  # object, as pandas has names
    assert retrieval(X, groups, ks=np.array([1, 2])).recall == {1: 1.0, 2: 1.0}
    found = retrieval(X, groups, X, groups, ignored=np.arange(4)[:, None])
    assert found.mean_average_precision == retrieval(X, groups).mean_average_precision


def test_float64_queries_tell_what_float32_cannot():
    gallery = np.array([[1.0, 1e-9], [1.0, 2e-9]])
    query = [[1.0, 3e-9]]
    angle = retrieval(np.array(query) * [1, 1e5], ["a"], gallery * [1, 1e5], ["b", "a"])
    assert angle.recall[1] == 1.0
    blurred = retrieval(np.array(query, np.float32), ["a"], gallery.astype(np.float32), ["b", "a"])
    assert blurred.recall[1] == 0.0


class Stored:
    """Features that are read block by block only."""

    def __init__(self, values):
        self.values, self.times_read = values, 0

    def __len__(self):
        return len(self.values)

    def blocks(self):
        self.times_read += 1
        yield from np.array_split(self.values, 3)


def test_a_stored_gallery_is_read_in_blocks(monkeypatch):
    X, y, gallery, labels = random_set()
    X, gallery = X.astype(np.float32), gallery.astype(np.float16)
    expected = retrieval(X, y, gallery, labels)
    stored = Stored(gallery)
    assert retrieval(X, y, stored, labels).mean_average_precision == expected.mean_average_precision
    assert stored.times_read == 1
    monkeypatch.setattr(module, "_TILE_VALUES", 0)
    retrieval(X, y, stored, labels)
    assert stored.times_read == 3


PEAK = """
import os, re
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # each core counts pages by itself
import numpy as np, torch
import mocohub.probes.retrieval as module
torch.set_num_threads(1)
module._TILE_VALUES = 1 << 18
queries = np.random.default_rng(0).standard_normal((64, 4), np.float32)
def peak(num_distractors):
    gallery = np.ones((num_distractors + 64, 4), np.float32)
    gallery[:64] = queries
    labels = np.append(np.arange(64), np.full(num_distractors, 64))
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    module.retrieval(queries, np.arange(64), gallery, labels)
    return held("VmHWM") - before
def held(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
small = peak(10_000)
print(peak(300_000) - small)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_distractors_take_no_memory_beside_their_features():
    root = Path(module.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=root)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 32 << 10  # KiB; a similarity of each query to each distractor takes 77 MB


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ks": ()}, r"ks=\(\) must be ranks"),
        ({"ks": (0, 1)}, r"ks=\(0, 1\) must be ranks"),
        ({"gallery_labels": None}, "go together"),
        ({"query_labels": [0, 1]}, "query_labels has 2 entries, but there are 3 queries"),
        ({"gallery_labels": [0, 1, 1]}, "gallery_labels has 3 entries, but the gallery 4 rows"),
        ({"gallery": np.ones((4, 3))}, "The gallery is 3 features wide, the queries 2"),
        ({"gallery": np.full((4, 2), np.nan)}, "4 of 4 rows hold NaN or inf"),
        ({"queries": [[1, 2], [3, 4], [np.inf, 0]]}, "1 of 3 rows hold NaN or inf"),
        ({"gallery_labels": [7, 8, 9, 7]}, "None of the 3 queries has a relevant image"),
        ({"query_labels": ["a", "b", "a"]}, r"differ in kind: \['a', 'b', 'a'\] in one set, \[0, 1, 0\]"),
        ({"query_labels": np.array(["a", "b", "a"], object)}, "Labels differ in kind"),
        ({"queries": np.ones((0, 2)), "query_labels": []}, "There are no queries: give at least one row"),
        ({"query_labels": np.array(["a", None, "a"], object)}, "1 of 3 labels are None"),
        ({"query_labels": [[0], [1], [0]]}, r"query_labels has shape \(3, 1\)"),
        ({"ignored": [[0]]}, "ignored has 1 entries, but there are 3 queries"),
        ({"ignored": [[0], [4], []]}, "ignored must hold rows of the gallery, 0 to 3"),
        ({"device": "mps"}, "device 'mps' is not supported. Choose cpu or cuda"),
        ({"queries": [1.0, 2.0]}, r"must be \(N, D\)"),
        ({"gallery": np.eye(4, 2).astype(str)}, "features are of type <U32, but must be real numbers"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, message):
    given = {
        "queries": [[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]],
        "query_labels": [0, 1, 0],
        "gallery": np.eye(4, 2),
        "gallery_labels": [0, 1, 0, 1],
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        retrieval(**given)


def test_images_without_a_label_cost_the_verb_no_memory_for_each_name_of_a_class(tmp_path, capsys):
    labels = np.append(np.repeat(np.arange(500), 2), -1)  # pairs, and one distractor
    values = np.random.default_rng(0).standard_normal((1001, 4), np.float32)
    paths = [f"{row}.jpg" for row in range(1001)]
    names = [f"a class with a rather long name {number}" for number in range(500)]
    Features(values, range(1001), paths, labels, names).save(tmp_path / "features")
    verb = ["retrieval", str(tmp_path / "features")]
    assert main(verb) == 0  # once before, for what is imported
    tracemalloc.start()
    assert main(verb) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "1000 queries, 1 left out (retrieval by class among 1000 images" in capsys.readouterr().out
    assert peak < 30e6  # bytes; all names of classes together, for each row, would be 74 MB
