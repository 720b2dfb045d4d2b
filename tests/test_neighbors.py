import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from sklearn.neighbors import NearestNeighbors

from mocohub.distributed import rank, world_size
from mocohub.features.store import Features
from mocohub.probes import best, neighbors
from mocohub.probes.best import top_k
from mocohub.probes.neighbors import nearest


@pytest.fixture(params=[None, (7, 11, 3), (64, 32, 32)], ids=["usual tiles", "odd tiles", "small tiles"])
def tiles(request, monkeypatch):
    if request.param:
        cut_into_tiles(monkeypatch, *request.param)


@pytest.fixture
def coarse(monkeypatch):
    """What runs on a card, on the CPU and with still fewer digits."""
    monkeypatch.setattr(neighbors, "_COARSE", {"cpu": torch.bfloat16})


def cut_into_tiles(monkeypatch, query_rows, bank_rows, group):
    monkeypatch.setattr(neighbors, "_QUERY_ROWS", query_rows)
    monkeypatch.setattr(neighbors, "_BANK_ROWS", {"cpu": bank_rows})
    monkeypatch.setattr(best, "_GROUP", group)
    monkeypatch.setattr(best, "_HITS", 5 * group)


class InBlocks:
    """A bank that is only given in blocks of certain lengths, over and over."""

    def __init__(self, rows, lengths=(5, 1, 300, 0, 2)):
        self.rows, self.lengths = rows, lengths

    def __len__(self):
        return len(self.rows)

    def blocks(self):
        start = 0
        while start < len(self.rows):
            for length in self.lengths:
                yield self.rows[start : start + length]
                start += length


def integers(num_rows, width=5, seed=0, dtype=np.float64):
    """Rows of small whole numbers: products are exact, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, (num_rows, width)).astype(dtype)


def slow_nearest(bank, queries, k, *, unit=True, own=False):
    """In plain Python: every product, sorted by it and then by the row."""
    lists = []
    for i, query in enumerate(np.float64(queries)):
        values = []
        for row in np.float64(bank):
            scale = np.sqrt((query @ query) * (row @ row)) if unit else 1.0
            values.append(float(query @ row / scale) if scale else 0.0)
        order = sorted((j for j in range(len(bank)) if not (own and i == j)), key=lambda j: (-values[j], j))
        lists.append(order[:k])
    return np.array(lists)


@pytest.mark.parametrize("k", [1, 6, 33, 400])
def test_equal_products_are_ordered_by_row_as_in_a_slow_loop(tiles, k):
    bank, queries = integers(400), integers(20, seed=1)
    found = nearest(bank, queries, k, metric="dot")
    np.testing.assert_array_equal(found.indices, slow_nearest(bank, queries, k, unit=False))
    expected = np.take_along_axis(queries @ bank.T, found.indices, 1)
    np.testing.assert_array_equal(found.similarities, expected)


@pytest.mark.parametrize("k", [1, 20, 299])
def test_a_row_does_not_find_itself(tiles, k, monkeypatch):
    monkeypatch.setattr(neighbors, "_OWN_QUERIES", 130)
    bank = integers(300)
    for own_bank in (bank, InBlocks(bank)):
        found = nearest(own_bank, None, k, metric="dot")
        np.testing.assert_array_equal(found.indices, slow_nearest(bank, bank, k, unit=False, own=True))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_neighbours_are_those_of_scikit_learn(tiles, dtype):
    random = np.random.default_rng(0)
    bank, queries = random.standard_normal((900, 24)).astype(dtype), random.standard_normal((70, 24))
    found = nearest(bank, queries, 40)
    exact = NearestNeighbors(n_neighbors=40, metric="cosine", algorithm="brute").fit(np.float64(bank))
    distances, indices = exact.kneighbors(queries)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.similarities, 1 - distances, atol=1e-6)
    assert found.similarities.dtype == (np.float64 if dtype == np.float64 else np.float32)


@pytest.mark.parametrize("order", ["ascending", "descending", "by class", "all equal"])
def test_the_order_of_the_bank_does_not_matter(order, monkeypatch):
    cut_into_tiles(monkeypatch, 16, 64, 8)
    random = np.random.default_rng(0)
    queries = np.ones((20, 8)) + 0.1 * random.standard_normal((20, 8))
    bank = random.standard_normal((1000, 8))
    likeness = bank @ queries[0] / np.linalg.norm(bank, axis=1)
    if order == "by class":
        bank = np.concatenate([bank[:480], queries[0] + 0.1 * random.standard_normal((520, 8))])
    elif order == "all equal":
        bank[:], queries = 1, np.round(4 * queries)  # whole numbers: really equal
    else:
        bank = bank[np.argsort(likeness if order == "ascending" else -likeness)]
    unit = order != "all equal"
    found = nearest(bank, queries, 50, metric="cosine" if unit else "dot")
    np.testing.assert_array_equal(found.indices, slow_nearest(bank, queries, 50, unit=unit))


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, InBlocks], ids=lambda kind: kind.__name__)
def test_arrays_tensors_lists_and_blocks_give_the_same(tiles, kind):
    bank, queries = np.float32(integers(700)), np.float32(integers(30, seed=1))
    expected = nearest(bank, queries, 60, metric="dot")
    found = nearest(bank.tolist() if kind is list else kind(bank), torch.tensor(queries), 60, metric="dot")
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


def test_a_feature_folder_is_searched_without_being_read_as_a_whole(tmp_path):
    values = integers(300, dtype=np.float16)
    folder = Features(values, range(300), [str(i) for i in range(300)]).save(
        tmp_path / "f", rows_per_shard=70
    )
    features = Features.open(folder)
    found = nearest(features, values[:9], 20)
    np.testing.assert_array_equal(found.indices, nearest(values, values[:9], 20).indices)
    assert not features._values  # the column is not in memory


def test_memory_maps_that_cannot_be_written_are_searched_without_a_warning(tmp_path, recwarn):
    np.save(tmp_path / "bank.npy", integers(100, dtype=np.float32))
    bank = np.load(tmp_path / "bank.npy", mmap_mode="r")
    found = nearest(bank, bank[:5], 10)
    np.testing.assert_array_equal(found.indices, nearest(np.array(bank), bank[:5], 10).indices)
    assert not recwarn


# --- the coarse product -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 30])
@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["spread", "nearly equal"])
def test_a_coarse_product_loses_no_neighbour(tiles, coarse, k, spread):
    random = np.random.default_rng(0)
    bank = (1 + spread * random.standard_normal((800, 48))).astype(np.float32)
    queries = (1 + spread * random.standard_normal((40, 48))).astype(np.float32)
    found = nearest(bank, queries, k)
    a, b = (np.float64(unit_rows_of_a_search(rows)) for rows in (queries, bank))
    cosines = a @ b.T
    kth = np.sort(cosines, axis=1)[:, -k]
    chosen = np.take_along_axis(cosines, found.indices, 1)
    assert (chosen >= kth[:, None] - 2e-7).all()  # what float32 can tell apart
    assert all(len(set(row)) == k for row in found.indices.tolist())
    np.testing.assert_allclose(found.similarities, chosen, atol=3e-7)
    if spread == 1.0:
        np.testing.assert_array_equal(found.indices, np.argsort(-cosines, axis=1)[:, :k])


def test_copies_that_a_coarse_product_finds_are_ordered_by_row(tiles, coarse):
    bank = np.repeat(np.float32(np.random.default_rng(0).standard_normal((40, 16))), 10, axis=0)
    found = nearest(bank, bank[::10], 25)
    for i, row in enumerate(found.indices):
        assert row[:10].tolist() == list(range(10 * i, 10 * i + 10))
        tens = row[:20].reshape(2, 10)
        np.testing.assert_array_equal(tens - tens[:, :1], np.tile(np.arange(10), (2, 1)))


def test_a_coarse_product_that_is_off_by_less_than_its_bound_changes_nothing(coarse):
    vectors = torch.nn.functional.normalize(torch.randn(300, 200, generator=torch.manual_seed(0)))
    search = neighbors._Search(vectors, 5, True, torch.device("cpu"), False)
    rows = search._vectors(vectors)
    bound = rows.uncertainty(rows)
    wrong = (rows.rounded @ rows.rounded.T).double() - vectors.double() @ vectors.double().T
    assert 0 < wrong.abs().max() < bound < 0.03


# --- several processes ------------------------------------------------------------------------------------


def search_on_ranks(folder: str) -> None:
    neighbors._BANK_ROWS, best._GROUP = {"cpu": 32}, 8
    for name, coarse_type in (("float", None), ("coarse", torch.bfloat16)):
        neighbors._COARSE = {"cpu": coarse_type}
        bank = np.load(f"{folder}/bank.npy")
        found = nearest(InBlocks(bank), bank[:33] + 0.5, 50, sharded=True)
        own = nearest(bank, None, 7, sharded=True)
        few = nearest(bank[:20], bank[:3], 20, sharded=True)  # a rank without rows
        np.savez(f"{folder}/{name}-{world_size()}-{rank()}", *found, *own, *few)


def test_two_processes_find_bit_for_bit_what_one_finds(tmp_path, monkeypatch, coarse):
    cut_into_tiles(monkeypatch, neighbors._QUERY_ROWS, 32, 8)
    random = np.random.default_rng(0)
    bank = np.float32(random.standard_normal((500, 20)))
    bank[200:420] = bank[:220]  # equal similarities across the ranks
    np.save(tmp_path / "bank.npy", bank)
    search_on_ranks(str(tmp_path))
    run_ranks(search_on_ranks, 2, str(tmp_path))
    for name in ("float", "coarse"):
        one = np.load(tmp_path / f"{name}-1-0.npz")
        assert len(one.files) == 6
        for r in range(2):
            other = np.load(tmp_path / f"{name}-2-{r}.npz")
            for part in one.files:
                np.testing.assert_array_equal(other[part], one[part])


# --- memory -----------------------------------------------------------------------------------------------

PEAK = """
import os, re, sys
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # each core counts pages by itself
import numpy as np, torch
from mocohub.probes.neighbors import nearest
torch.set_num_threads(1)
class Bank:
    dtype = np.dtype("float16")
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def blocks(self):
        random = np.random.default_rng(0)
        for start in range(0, self.n, 10_000):
            yield random.random((min(10_000, self.n - start), 16), np.float32).astype(np.float16)
queries = np.random.default_rng(1).standard_normal((64, 16))
nearest(Bank(100_000), queries, 20)
def held(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
found = nearest(Bank(int(sys.argv[1])), queries, 20)
assert found.indices.max() > 100_000
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_bank():
    root = Path(neighbors.__file__).parents[2]
    command = [sys.executable, "-c", PEAK, "1000000"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 8 << 10  # KiB; the bank in float16 is 32 MB


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e30, 1e-30, 6e4], ids=str)
def test_lengths_whose_squares_leave_float32_are_right(unit):
    bank = np.array([[1, 1], [1, -1], [-1, -1], [0.5, 1]]) * unit
    found = nearest(np.float32(bank), [[1.0, 1.0]], 4)
    assert found.indices.tolist() == [[0, 3, 1, 2]]
    np.testing.assert_allclose(found.similarities, [[1, 1.5 / np.sqrt(2.5), 0, -1]], atol=1e-6)


def test_float16_rows_whose_length_overflows_are_right(tiles):
    random = np.random.default_rng(0)
    bank = (6e4 * random.uniform(-1, 1, (300, 64))).astype(np.float16)
    assert (np.linalg.norm(np.float64(bank), axis=1) > 65504).all()
    found = nearest(bank, bank[:8].astype(np.float32), 10)
    np.testing.assert_array_equal(found.indices, slow_nearest(bank, bank[:8], 10))


def test_a_vector_of_zeros_has_similarity_0_to_everything(tiles):
    found = nearest(np.float32([[-1, 0], [0, 0], [1, 0]]), np.float32([[1, 0], [0, 0]]), 3)
    assert found.indices.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert found.similarities.tolist() == [[1, 0, -1], [0, 0, 0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_values_that_are_not_finite_are_named_by_their_row(tiles, value, metric):
    bank = np.ones((400, 3), np.float16)
    bank[317, 1] = value
    with pytest.raises(ValueError, match=r"Row 317 holds NaN or inf.*float16 ends at 65504"):
        nearest(InBlocks(bank), np.ones((2, 3)), 5, metric=metric)
    with pytest.raises(ValueError, match="Query 317 holds NaN or inf"):
        nearest(np.ones((4, 3)), bank, 2, metric=metric)


def test_dot_products_that_float32_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="Row 1 holds 1e.30, too much.*cosine"):
        nearest(np.float32([[1, 0], [1e30, 0]]), [[1.0, 0.0]], 1, metric="dot")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 must be a number of neighbours"),
        ({"metric": "cosin"}, "Unknown metric 'cosin'. Choose one of: cosine, dot"),
        ({"device": "mps"}, "device 'mps' is not supported. Choose cpu or cuda"),
        ({"queries": np.ones((2, 4))}, "Row 0 of the bank is 3 wide, but the queries are 4 wide"),
        ({"queries": np.ones(3)}, r"queries has shape \(3,\)"),
        ({"queries": np.ones((0, 3))}, r"queries has shape \(0, 3\), but must be \(n, D\), and not empty"),
        ({"bank": np.ones((9, 0)), "queries": np.ones((2, 0))}, r"queries has shape \(2, 0\)"),
        ({"bank": np.ones((0, 3))}, "A bank of 0 rows has no neighbours"),
        ({"bank": np.ones((1, 3)), "queries": None}, "A bank of 1 rows has no neighbours"),
        ({"bank": np.ones(3)}, "Row 0 of the bank"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_searched_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nearest(**{"bank": np.ones((9, 3)), "queries": np.ones((2, 3)), "k": 2, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_not_replaced():
    with pytest.raises(ValueError, match="torch sees no CUDA card. Use device 'cpu'"):
        nearest(np.ones((9, 3)), np.ones((2, 3)), 2, device="cuda")


@pytest.mark.parametrize("says", [8, 11])
def test_blocks_that_are_other_than_their_length_are_refused(says, monkeypatch):
    monkeypatch.setattr(InBlocks, "__len__", lambda self: says)
    with pytest.raises(ValueError, match=f"says that it has {says} rows"):
        nearest(InBlocks(np.ones((10, 3))), np.ones((2, 3)), 2)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_orders_equals_by_what_rows_say(k):
    values = torch.tensor([[1.0, 3, 1, 3, 2, 1, 3, 2, 1], [9, 8, 7, 6, 5, 4, 3, 2, 1]])
    rows = torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    expected = torch.tensor([[2, 5, 7, 1, 4, 0, 3, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    top, found = top_k(values, rows, k)
    assert found.tolist() == expected[:, :k].tolist()
    assert top.tolist() == values.sort(descending=True).values[:, :k].tolist()


# --- half precision ---------------------------------------------------------------------------------------


def near_ties(random):
    """Rows around one direction: cosines differ by less than half precision tells apart."""
    return np.ones(64) + 0.01 * random.standard_normal((300, 64))


def few_large(random):
    """One large value and many that are denormal in half precision, or vanish there."""
    rows = 1e-6 * random.standard_normal((300, 512))
    rows[:, 0], rows[:, 1] = 1.0, 1e-3 * random.standard_normal(300)
    return rows


def all_tiny(random):
    """Equally small values: of a unit row each is near what half precision rounds coarsely."""
    return random.choice([-1.0, 1.0], (300, 1024)) * (1 + 0.3 * random.random((300, 1024)))


def opposite(random):
    """Rows whose terms cancel."""
    rows = random.standard_normal((300, 128))
    return np.concatenate([rows[:150], -rows[:150] + 1e-3 * rows[150:]])


def of_all_lengths(random):
    """From 1e-30 to 1e30, far beyond float16."""
    return random.standard_normal((300, 32)) * 10.0 ** random.uniform(-30, 30, (300, 1))


def adversary(seed, share):
    """A product in half precision that does its worst: off by what its documented error allows, at random."""
    random = torch.Generator().manual_seed(seed)

    def mm(a, b, out):
        exact = a.double() @ b.double()
        signs = torch.randint(0, 2, exact.shape, generator=random).double() * 2 - 1
        terms = a.double().abs() @ b.double().abs()
        summed = exact + signs * share * 2.0**-22 * a.shape[1] * terms  # each addition truncated
        rounded = summed.half()
        beyond = torch.where(signs > 0, rounded.double() < summed, rounded.double() > summed)
        towards = torch.nextafter(rounded, torch.full_like(rounded, torch.inf).copysign(signs.half()))
        return out.copy_(torch.where(beyond, towards, rounded))  # and rounded the wrong way

    return mm


def unit_rows_of_a_search(values):
    """Rows of length 1 in float32, by the search's own division."""
    rows = torch.empty(values.shape)
    neighbors._Search(values, 1, True, torch.device("cpu"), False)._fill(rows, torch.tensor(values), "Row", 0)
    return rows.numpy()


@pytest.mark.parametrize("k", [1, 10, 290])
@pytest.mark.parametrize("rows", [near_ties, few_large, all_tiny, opposite, of_all_lengths])
def test_no_neighbour_is_lost_to_the_worst_product_that_half_precision_allows(tiles, monkeypatch, rows, k):
    random = np.random.default_rng(0)
    values = np.float32(rows(random))
    bank, queries = values[20:], values[:20]
    unit = np.float64(unit_rows_of_a_search(values))  # as rounded as those of the search: the rest is exact
    lengths = np.linalg.norm(np.float64(values), axis=1, keepdims=True)
    np.testing.assert_allclose(unit, values / lengths, rtol=1e-6, atol=1e-30)
    cosines = unit[:20] @ unit[20:].T
    monkeypatch.setattr(neighbors, "_COARSE", {"cpu": torch.float16})
    monkeypatch.setattr(torch, "mm", adversary(k, share=1.0))
    found = nearest(bank, queries, k)
    k = found.indices.shape[1]
    best = -np.sort(-cosines, axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(cosines, found.indices, 1), best, rtol=0, atol=2e-7)
    np.testing.assert_allclose(found.similarities, best, rtol=0, atol=3e-7)
    assert all(len(set(row)) == k for row in found.indices.tolist())


def test_rows_that_are_equal_in_half_precision_and_in_float32_keep_their_order(tiles, monkeypatch):
    monkeypatch.setattr(neighbors, "_COARSE", {"cpu": torch.float16})
    bank = np.ones((200, 8), np.float32)
    bank[50:, 0] += 1e-5  # half precision does not tell these from the others
    found = nearest(bank, np.ones((3, 8), np.float32), 120)
    assert found.indices.tolist() == [[*range(50), *range(50, 120)]] * 3
