import pytest
import torch

from mocohub.pretrain.dictionary import Queue


@pytest.mark.parametrize("batch", [2, 3, 5, 7, 16])
def test_queue_holds_the_last_K_keys_whatever_the_batch(batch: int) -> None:
    queue = Queue(torch.zeros(7, 2))
    keys = torch.arange(1.0, 8 * batch + 1).repeat(2, 1).T  # row i holds i + 1
    for part in keys.split(batch):
        queue.enqueue(part)
    assert sorted(queue.embeddings[:, 0].tolist()) == keys[-7:, 0].tolist()
    oldest_first = queue.embeddings.roll(-queue.pointer, 0)
    assert oldest_first.equal(keys[-7:])


def test_a_random_queue_has_unit_rows_and_depends_on_the_generator_alone() -> None:
    first, second = (Queue.random(9, 4, torch.Generator().manual_seed(3)).embeddings for _ in range(2))
    assert first.equal(second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(9))


def test_no_gradient_reaches_the_queue() -> None:
    queue = Queue(torch.zeros(4, 2))
    queue.enqueue(torch.ones(2, 2, requires_grad=True))
    assert not queue.embeddings.requires_grad
