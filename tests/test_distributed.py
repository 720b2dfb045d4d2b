import warnings
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks

from mocohub import distributed


def exchange(out: Path) -> None:
    warnings.simplefilter("error")  # of torch, about names it gave up: each process would print it
    world, me = distributed.world_size(), distributed.rank()
    for dtype in (torch.uint8, torch.float64):
        everything = torch.randint(0, 255, (world * 4, 3, 2, 2), generator=torch.Generator().manual_seed(1))
        everything = everything.to(dtype).contiguous(memory_format=torch.channels_last)
        mine = everything[me * 4 : me * 4 + 4]
        for seed in range(5):
            order = torch.randperm(world * 4, generator=torch.Generator().manual_seed(seed))
            assert distributed.exchange_rows(mine, order).equal(everything[order][me * 4 : me * 4 + 4])
        assert distributed.gather_rows(mine).equal(everything)
    means = [torch.tensor([float(me)]), torch.ones(2)]
    distributed.average_over_ranks(means)
    assert means[0].item() == (world - 1) / 2 and means[1].tolist() == [1, 1]
    assert distributed.any_rank(me == 0) and not distributed.any_rank(False)
    assert distributed.same_on_all_ranks("x") and not distributed.same_on_all_ranks(f"{me}")
    distributed.barrier()
    (out / f"{me}").touch()


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_go_where_a_gather_and_an_index_would_put_them(tmp_path: Path, world_size: int) -> None:
    run_ranks(exchange, world_size, tmp_path)
    assert len(list(tmp_path.iterdir())) == world_size


def test_everything_works_with_no_process_group() -> None:
    x = torch.arange(6).view(3, 2)
    order = torch.tensor([2, 0, 1])
    assert distributed.exchange_rows(x, order).equal(x[order])
    assert distributed.gather_rows(x).equal(x)
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about machines without a card")
def test_asking_for_a_missing_card_is_an_error_and_not_a_slow_run() -> None:
    with pytest.raises(ValueError, match="no CUDA card"), distributed.process_group("cuda"):
        pass


def test_an_unknown_device_names_the_two_known_ones() -> None:
    with pytest.raises(ValueError, match="'tpu' is not supported. Choose cpu or cuda"):
        with distributed.process_group("tpu"):
            pass
