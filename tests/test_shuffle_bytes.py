import sys
from pathlib import Path

import pytest

from mocohub.pretrain.randomness import permutation

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import shuffle_bytes  # noqa: E402

RANKS, IMAGES, PX = 2, 6, 8
ORDERS = [permutation(step, "shuffle", 0, RANKS * IMAGES).tolist() for step in range(3)]


@pytest.fixture(scope="module")
def received() -> list[list[list[tuple[str, int]]]]:
    return shuffle_bytes.count(RANKS, IMAGES, PX, steps=len(ORDERS))


def test_of_crops_only_the_rows_that_live_elsewhere_arrive(received: list) -> None:
    for step, order in enumerate(ORDERS):
        for rank in range(RANKS):
            wanted = order[rank * IMAGES : (rank + 1) * IMAGES]
            foreign = sum(row // IMAGES != rank for row in wanted)
            crops, parameters, keys = (size for _, size in received[rank][step])
            assert crops == foreign * 3 * PX * PX
            assert parameters == foreign * 11 * 4
            assert keys == (RANKS - 1) * IMAGES * 128 * 4


def test_the_published_scheme_receives_exactly_what_is_calculated(received: list) -> None:
    _, counted = shuffle_bytes.by_name(received)
    _, calculated = shuffle_bytes.calculate(RANKS, IMAGES, PX)
    assert counted == calculated


def test_what_is_calculated_for_ours_is_the_mean_over_orders() -> None:
    ranks, images = 4, 8
    draws = [permutation(seed, "shuffle", 0, ranks * images).tolist() for seed in range(1000)]
    foreign = [sum(row // images != 1 for row in order[images : 2 * images]) for order in draws]
    ours, _ = shuffle_bytes.calculate(ranks, images, PX)
    mean_rows = sum(foreign) / len(foreign)  # standard error 0.04 rows
    assert ours["crops"] / (3 * PX * PX) == pytest.approx(mean_rows, abs=0.15)
